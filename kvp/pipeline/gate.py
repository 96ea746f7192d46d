"""One gate before anything is computed: what options, configs and files can tell of a run is checked in seconds.

    check_inputs(x)  # ValueError or OSError: what, value, bound, way out

A run passes it before its first stage, a sweep with all of its jobs before any of them starts. Nothing is written, and
no weights are read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvp.data.corpora import Part, find
from kvp.models.cache_formats import CacheFormat
from kvp.models.caches import cache_format
from kvp.models.checkpoint.fields import check_fields
from kvp.models.directions import Directions, stored_bits
from kvp.models.family import family_of
from kvp.models.linears import linear_names
from kvp.models.load import check_device, load_tokenizer
from kvp.models.shapes import require_whole_stream
from kvp.models.sources import ModelSource, RandomModel
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.foretell import foretell
from kvp.pipeline.room import check_room, check_weights
from kvp.pipeline.settings import LONGEST_NAME
from kvp.pipeline.stages import check_force
from kvp.pipeline.texts import check_texts
from kvp.strategies.limits import Limit, expected_ratio

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from kvp.models.checkpoint.check import Checked

log = logging.getLogger(__name__)

COUNTS = (  # fields of a config that are whole numbers above 0
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def check_inputs(x: Experiment, *, here: bool = True) -> None:
    """Refuse a run that cannot end well, before anything is computed or written.

    Args:
        x: The run.
        here: Whether this machine is the one that computes; false: device and memory are the other one's.

    Raises:
        ValueError: An option is out of its bounds, or does not go with the model or the text.
        OSError: Model or text are missing, or a directory cannot be written.
    """
    check_force(x)
    if len(x.name.encode()) > LONGEST_NAME:
        raise ValueError(
            f"the run's name has {len(x.name)} characters, more than a directory may: shorten model.name"
        )
    if here:
        check_device(x.device)
    check_sources(x, here=here)
    foretold, dense = foretell(x) if x.place.is_dir() and here else ([], x.source.locate())
    if dense is not None and not (dense / "config.json").exists():
        dense = None  # still to be written
    if foretold and all(stage.stands for stage in foretold):
        return
    checked = _checked(dense, json.dumps(x.source.identity())) if dense else None
    config = checked.config if checked else _expected(x.source)
    if here:
        check_weights(x, config)
    check_model(x, config)
    check_modules(x, checked.linears if checked else _linears(config))
    tokenizing = partial(load_tokenizer, dense) if dense else x.source.expected_tokenizer
    check_texts(x, tokenizing, config.max_position_embeddings)
    if here:
        check_room(x, config, foretold)


def refusal(x: Experiment, *, here: bool = True) -> str:
    """Return why a run is refused; empty if it is not."""
    try:
        check_inputs(x, here=here)
    except (ValueError, OSError) as error:
        return str(error)
    return ""


def check_sources(x: Experiment, *, here: bool = True) -> None:
    """Refuse missing data before anything expensive."""
    for check in _source_checks(x, here):
        check()


def missing_sources(x: Experiment, *, here: bool = True) -> list[str]:
    """Return what is the matter with each source of a run, the model among them; a run stops at the first."""
    found = []
    for check in (x.source.locate, *_source_checks(x, here)):
        try:
            check()
        except (ValueError, OSError) as error:
            found.append(str(error))
    return list(dict.fromkeys(found))


def _source_checks(x: Experiment, here: bool) -> Iterator[Callable[[], object]]:
    if x.reads_calibration:
        yield partial(x.calibration.check, x.corpora)
    if x.recovery is not None:
        yield partial(x.recovery.check, x.corpora, x.device if here else "cpu")
    if text := x.perplexity:
        yield from (partial(_check_corpus, x, name, text.part) for name in text.corpora)
    if x.zero_shot is not None:
        yield x.zero_shot.check
    if x.needles is not None:
        yield partial(x.needles.check, x.corpora)


def _check_corpus(x: Experiment, name: str, part: Part) -> None:
    find(x.corpora, name).check(part)


def check_model(x: Experiment, config: PretrainedConfig) -> None:
    """Refuse a budget, a space, a length or a protocol that this model cannot offer; read no weights."""
    if not x.unpruned:
        require_whole_stream(config)
    if isinstance(x.cache, Directions):
        _check_directions(x, x.cache)
    x.strategy.check(config, expected_ratio(x.budget, x.strategy, config, x.cache))
    if x.recovery is not None and x.strategy.sparsifies and not x.recovery.keep_zeros:
        raise ValueError(
            "LoRA's update is dense: merged into the weights, it leaves none of this strategy's zeros. Choose "
            "recovery=none, or recovery.keep_zeros=true to drop the update where the weight is zero"
        )
    distillation = x.recovery and x.recovery.distillation
    if x.unpruned and distillation and not distillation.text_weight:
        raise ValueError(
            "the dense model has nothing to learn from itself alone: set recovery.distillation.text_weight above "
            "0, or choose recovery/distillation=none for the control"
        )
    check_lengths(x, config)
    if x.protocol is not None:
        x.protocol.check_positions(config.max_position_embeddings)
    if cache := x.cache or cache_format(config):
        if isinstance(x.cache, Directions):  # whose bits the run divides
            x.cache.check_attention(x.strategy.recast_config(config))
        else:
            cache.check(x.strategy.recast_config(config))
        _check_decoding(x, cache)


def check_lengths(x: Experiment, config: PretrainedConfig) -> None:
    """Refuse text in longer pieces than the model has positions."""
    for key, tokens in _lengths(x):
        if tokens > config.max_position_embeddings:
            raise ValueError(
                f"{key} must be <= {config.max_position_embeddings} (max_position_embeddings of {x.source.name}), got "
                f"{tokens}: the model knows no further positions"
            )


def _lengths(x: Experiment) -> Iterator[tuple[str, int]]:
    """Yield the tokens that a model reads at a time, by option."""
    if x.reads_calibration:
        yield "calibration.length", x.calibration.length
    for length in x.needles.lengths if x.needles else ():
        if length != "longest":
            yield "evaluation.needles.lengths", length
    for name in ("length", "cutoff") if x.recovery else ():
        if tokens := getattr(x.recovery and x.recovery.data, name, None):
            yield f"recovery.data.{name}", tokens


def _check_directions(x: Experiment, cache: Directions) -> None:
    """Refuse bits that no score divides."""
    if not x.strategy.prices:
        raise ValueError(
            f"cache=directions gives bits to directions by their worth in nats, which strategy={x.chosen('strategy')} "
            "does not measure: choose strategy=kvpruner_plus with strategy.importance=output, or cache=kivi4"
        )
    if isinstance(x.budget, Limit):
        raise ValueError(
            "cache=directions has a budget of its own, cache.bits: choose ratio=kv_cache for the cut before it"
        )
    if cache.keys or cache.values:
        raise ValueError("cache.keys and cache.values are written by the run: leave them out")
    room = float(stored_bits(cache.most, cache.group)) * (
        1 - x.budget.value if x.budget.of == "kv_cache" else 1
    )
    if cache.bits > room:
        raise ValueError(
            f"cache.bits must be <= {room:g}, got {cache.bits:g}: with cache.most={cache.most} and scales, what stays "
            "takes no more. Ask for fewer bits, raise cache.most, or cut less"
        )


def _check_decoding(x: Experiment, cache: CacheFormat) -> None:
    """Refuse numbers that a packed cache would have no part in."""
    if x.zero_shot is not None and not x.zero_shot.decodes:
        raise ValueError(
            f"zero-shot tasks such as {x.zero_shot.tasks[0]} are scored in one forward pass, which reads no cache: "
            "their accuracy would be that of the dense cache. Choose evaluation.zero_shot=null, cache=none, or "
            "evaluation=longbench, whose answers are decoded"
        )
    decoded = {"evaluation.perplexity.window": x.perplexity.window} if x.perplexity else {}
    if lengths := [length for length in x.needles.lengths if length != "longest"] if x.needles else []:
        decoded["evaluation.needles.lengths"] = min(lengths)
    if protocol := x.protocol:
        decoded["measure.prompt_length + measure.new_tokens"] = protocol.prompt_length + protocol.new_tokens
    for name, tokens in decoded.items():
        if tokens < cache.whole + 3:  # the first token that is packed is read two predictions later
            raise ValueError(
                f"{name} must be >= {cache.whole + 3}, got {tokens}: cache.window={cache.window} would keep "
                "all of these tokens whole"
            )


@cache
def _checked(dense: Path, identity: str) -> Checked:
    """Return what the files of a directory say, once for all jobs of a sweep; another identity is another model."""
    from kvp.models.checkpoint.check import (
        check_checkpoint,  # modelling code, which a finished run need not wait for
    )

    return check_checkpoint(dense)


def _expected(source: ModelSource) -> PretrainedConfig:
    """Return the config of a model that is still to be written."""
    if not isinstance(source, RandomModel):
        return source.expected()
    for key in COUNTS:
        value = source.config.get(key, 1)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"model.config.{key} must be a whole number >= 1, got {value!r}")
    try:
        config = source.expected()
    except OSError:
        raise
    except Exception as error:  # transformers has many kinds for one mistake
        raise ValueError(f"model.config is no config of a model: {_one_line(error)}") from error
    family_of(config)
    check_fields(Path("model.config"), config.to_dict())
    tokens = len(source.expected_tokenizer())
    if config.vocab_size < tokens:
        raise ValueError(
            f"model.config.vocab_size must be >= {tokens} (the tokenizer's tokens), got {config.vocab_size}"
        )
    return config


def _linears(config: PretrainedConfig) -> Sequence[str]:
    """Return the linear modules of a model that is still to be written; refuse shapes that make none."""
    from transformers import AutoModelForCausalLM

    import kvp.models.pruned  # noqa: F401  (registers the classes)

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"model.config makes no model: {_one_line(error)}") from error
    return linear_names(config, model)


def check_modules(x: Experiment, linears: Collection[str]) -> None:
    """Refuse modules to tune that the model does not have, also beside others that it has."""
    for target in x.recovery.target_modules if x.recovery else ():
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            known = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            raise ValueError(
                f"recovery.target_modules must name linear modules of {x.source.name}, which has {', '.join(known)}; "
                f"got {target!r}"
            )


def _one_line(error: BaseException) -> str:
    return " ".join([f"{type(error).__name__}:", *str(error).split()])
