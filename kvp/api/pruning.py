"""Prune a model that is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvp.api.chosen import TOKENIZER, Text, calibrated, check_given, chosen, experiment, with_strategy
from kvp.api.memory import as_loaded, check_in_memory, weights_digest, written
from kvp.models.linears import all_linears
from kvp.models.plans import write_plan
from kvp.models.shapes import layer_shapes, size
from kvp.models.surgery import apply
from kvp.models.unfused import unfused
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_model, check_sources
from kvp.pipeline.session import origin_of
from kvp.pipeline.stages import Join, Planning
from kvp.pipeline.summary import removed_words
from kvp.store import fingerprint
from kvp.strategies.base import Strategy
from kvp.strategies.steps import Job, Step, Values, find_plan, in_folders
from kvp.strategies.target import Target
from kvp.types import DENOMINATORS, Plan


@dataclass(frozen=True)
class Pruned:
    """A pruned model, and what was removed.

    Attributes:
        model: An ordinary Hugging Face model, smaller. Matrices that were not cut are the dense model's own.
        plan: The indices that stay, per space.
        asked: The fraction asked for, by denominator, of all chained strategies.
        achieved: The fraction removed, under every denominator.
    """

    model: PreTrainedModel
    plan: Plan
    asked: Mapping[str, float]
    achieved: Mapping[str, float]

    def __str__(self) -> str:
        return removed_words(self.asked.items(), self.achieved)

    def save(self, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
        """Write the checkpoint, with plan.json beside it, whole or not at all, and return its directory.

        Raises:
            FileExistsError: The directory is there already.
        """
        with written(directory, self.model, tokenizer, str(self)) as partial:
            write_plan(partial, self.plan)
        return Path(directory)


def prune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    strategy: str | Strategy = "kvpruner",
    ratio: float = 0.25,
    *,
    of: str = "kv_cache",
    calibration: Text = "drop",
    num_samples: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    store: str | Path | None = None,
    **options: Any,
) -> Pruned:
    """Return a smaller model; the given one stays as it is.

        pruned = kvp.prune(model, tokenizer, "kvpruner", 0.25, grouping="coupled")

    Args:
        model: A dense or pruned Hugging Face decoder, on one device, in bfloat16, float16 or float32.
        tokenizer: The model's; only calibration text needs it.
        strategy: An option of conf/strategy, or an object such as `kvp.FLAP(metric="ifv")`.
        ratio: The fraction to remove, in [0, 1).
        of: What it is a fraction of: kv_cache, params, block_params, blocks or sparsity.
        calibration: What the strategy may read: an option of conf/calibration, a corpus, texts, or token ids of shape
            (num_samples, length).
        num_samples: Windows of text; None: the option's own, or as many as the texts fill.
        length: Tokens of a window; None: the option's own.
        batch_size: Windows per pass; None: the option's own.
        seed: The seed of everything that is drawn.
        store: Directory where finished steps are kept and found; None keeps nothing.
        options: Options of the named strategy, such as `grouping="vo"` or `allocator="uniform"`.

    Raises:
        ValueError: An option or the budget is out of reach for this model; nothing was computed.
        FileNotFoundError: Data are missing; the message names the ways out.
    """
    check_in_memory(model)
    if of not in DENOMINATORS:
        raise ValueError(f"of must be one of {', '.join(DENOMINATORS)}, got {of!r}")
    check_given(ratio=ratio, seed=seed)
    model = unfused(model)
    text = {"num_samples": num_samples, "length": length, "batch_size": batch_size}
    x = _experiment(model, tokenizer, strategy, options, calibration, text, of, ratio, seed, store)
    check_sources(x)
    check_model(x, model.config)
    ids = x.calibration.sample(x.corpora, tokenizer) if x.reads_calibration else None  # type: ignore[arg-type]
    with as_loaded(model), tempfile.TemporaryDirectory() as directory:
        dense = x.strategy.recast(model)
        target = Target(dense, ids, x.calibration.batch_size, seed)
        keep = InStore(x, model) if store else in_folders(Path(directory))
        plan = find_plan(Job(x.strategy, x.budget, dense.config, lambda: target), keep)
        pruned = apply(dense, plan)
    asked: dict[str, float] = {budget.of: budget.value for budget in (x.budget, *x.strategy.then)}
    return Pruned(pruned, plan, asked, removed(pruned, model, zeros=x.strategy.sparsifies))


def _experiment(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    strategy: str | Strategy,
    options: Mapping[str, Any],
    calibration: Text,
    text: Mapping[str, int | None],
    of: str,
    ratio: float,
    seed: int,
    store: str | Path | None,
) -> Experiment:
    words, values, parts = calibrated(calibration, model, tokenizer, text)
    values |= {"ratio.value": ratio, "seed": seed}
    if not isinstance(strategy, str | Strategy):
        raise ValueError(f"strategy must be a name or an object such as kvp.FLAP(), got {strategy!r}")
    if isinstance(strategy, str):
        picked, own = chosen("strategy", strategy, options)
        words, values = [*words, *picked], {**values, **own}
    elif options:
        raise ValueError(
            f"{', '.join(options)}: an object has its options already: kvp.{type(strategy).__name__}(...)"
        )
    x = experiment(model, [*words, f"ratio={of}"], values, store=store)
    objects: dict[str, Any] = {name: value for name, value in options.items() if is_dataclass(value)}
    if not isinstance(strategy, str) or objects:
        x = with_strategy(x, replace(x.strategy, **objects) if isinstance(strategy, str) else strategy)
    if tokenizer is None and "calibration" not in parts and x.reads_calibration:
        raise ValueError(TOKENIZER)
    corpora = {**x.corpora, **parts.pop("corpora", {})}
    return replace(x, corpora=corpora, **parts)


class InStore:
    """Steps that are kept in the experiment's store and found there, under the fingerprint of the model's weights."""

    def __init__(self, x: Experiment, model: PreTrainedModel) -> None:
        self._x, self._before = x, {"model": weights_digest(model)}
        join = Join()
        if join.applies(x):
            inputs = join.inputs(x, self._before)
            self._before["join"] = fingerprint(join.place, join.version, inputs)

    def __call__(self, step: Step, values: Values, make: Callable[[Path], Any]) -> Any:
        """Find a step's value, or make and keep it."""
        stage = Planning(step)
        done = self._x.store.once(
            stage.place,
            stage.decides(self._x, self._before),
            lambda directory: step.write(make(directory), directory),
            version=stage.version,
            resumable=stage.resumable,
            origin=lambda: origin_of(self._x, stage),
        )
        self._before[step.name] = done.fingerprint
        return step.read(done.path, done.result, values)


def removed(pruned: PreTrainedModel, dense: PreTrainedModel, *, zeros: bool = False) -> dict[str, float]:
    """Return the fraction that is gone under every denominator; zeros are counted if asked for."""
    sizes = [size(model.config, layer_shapes(model.config)) for model in (pruned, dense)]
    found = sizes[0].removed_from(sizes[1])
    if zeros:
        weights = [pruned.get_parameter(linear.weight) for linear in all_linears(pruned.config)]
        gone = sum(weight.numel() - int(weight.count_nonzero()) for weight in weights)
        found["sparsity"] = gone / sum(weight.numel() for weight in weights)
    return found
