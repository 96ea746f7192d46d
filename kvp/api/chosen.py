"""Options by name, by value and by object, as one experiment: the classes, defaults and checks that a run has."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvp.api.given import GIVEN, GivenIds, GivenTexts, check_ids, windows_in
from kvp.api.memory import check_tokenizer
from kvp.choices import choices
from kvp.composing import compose, in_words
from kvp.identity import described, named, targets
from kvp.nearest import did_you_mean
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.room import shortage
from kvp.strategies.base import Strategy

Text = str | Sequence[str] | Tensor  # the name of an option or a corpus, texts, or token ids
NOTHING = ("recovery=none", "evaluation=none", "measure=none", "tracker=none")


def experiment(
    model: PreTrainedModel | None,
    options: Sequence[str],
    values: Mapping[str, Any],
    *,
    store: str | Path | None = None,
) -> Experiment:
    """Return the experiment of some options; of what they do not name, nothing is done.

    Args:
        model: What it works on; its dtype and device are the experiment's.
        options: Choices of groups, such as "strategy=flap".
        values: Values by key, such as {"ratio.value": 0.25}; None leaves the option's own.
        store: Directory of finished stages.

    Raises:
        ValueError: A value is out of its bounds, or no option has its name.
    """
    if store is not None and not (isinstance(store, str | Path) and str(store)):
        raise ValueError(f"store must be a directory, got {store!r}: None keeps nothing")
    place = Path(store).absolute() if store else Path(tempfile.gettempdir()) / "kvp-store"
    fixed: dict[str, Any] = {"store": str(place), "runs": f"{place}-runs"}
    if model is not None:
        fixed |= {"model.path": ".", "model.name": "model"}
        fixed |= {"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type}
    words = [*NOTHING, "model=local", *options]
    with in_words(words):
        return Experiment.compose(compose(words, {**fixed, **values}))


def chosen(group: str, name: str, given: Mapping[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return an option of a group and what is given to it, as choices and as values.

    A value whose name is a group of its own, such as strategy/allocator, may name an option of that group. None is
    null.

    Raises:
        ValueError: There is no such option; the message names the nearest.
    """
    inner = {k: v for k, v in given.items() if isinstance(v, str) and choices(f"{group}/{k}")}
    picked = {group: name, **{f"{group}/{key}": value for key, value in inner.items()}}
    words = [f"{where}={check_choice(where, value)}" for where, value in picked.items()]
    words += [f"{group}.{key}=null" for key, value in given.items() if value is None]
    return words, {f"{group}.{k}": v for k, v in given.items() if k not in inner and not is_dataclass(v)}


def check_choice(group: str, name: str) -> str:
    """Return a name, if it is an option of a group.

    Raises:
        ValueError: It is not; the message names the nearest.
    """
    if name in (known := choices(group)):
        return name
    near = did_you_mean(name, known)
    raise ValueError(f"there is no {group} {name!r}.{near} There are: {', '.join(known)}")


def check_given(**numbers: Any) -> None:
    """Refuse None where a number has no option of its own to fall back on.

    Raises:
        ValueError: The message names the argument.
    """
    for name, value in numbers.items():
        if value is None:
            raise ValueError(f"{name} must be a number, got None")


def check_memory(x: Experiment, model: PreTrainedModel) -> None:
    """Refuse work that is estimated to take more memory than is free.

    Raises:
        ValueError: It names both sizes, and what would fit.
    """
    if lines := shortage(x, model.config):
        raise ValueError(lines)


def with_strategy(x: Experiment, strategy: Strategy) -> Experiment:
    """Return the experiment with a strategy that was made in Python."""
    node = described(strategy)
    others = {at: target for at, target in x.targets.items() if at.partition(".")[0] != "strategy"}
    return replace(
        x,
        strategy=strategy,
        node={**x.node, "strategy": named(node)},
        choices={at: option for at, option in x.choices.items() if at.partition(".")[0] != "strategy"},
        targets={**others, **targets(node, "strategy")},
    )


TOKENIZER = "calibration text needs a tokenizer: give the model's, or token ids as calibration"


def calibrated(
    calibration: Text,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    given: Mapping[str, Any],
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Return which text a strategy reads: as choices, as values, and as fields of the experiment.

    Args:
        given: "num_samples", "length", "batch_size"; None leaves the option's own.

    Raises:
        ValueError: There is no such option or corpus, or ids or texts cannot be read.
    """
    values = {f"calibration.{key}": value for key, value in given.items()}
    if isinstance(calibration, Tensor):
        if given["num_samples"] is not None or given["length"] is not None:
            raise ValueError(
                "num_samples and length choose windows of text; token ids have theirs: slice the ids"
            )
        ids = check_ids(calibration, model.config.vocab_size)
        batch = min(4, len(ids)) if given["batch_size"] is None else given["batch_size"]
        made = GivenIds(ids=ids, num_samples=len(ids), length=ids.shape[1], batch_size=batch, seed=0)
        return ["calibration=drop"], {}, {"calibration": made}
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    if isinstance(calibration, str):  # a method that reads no text needs no tokenizer
        if calibration in choices("calibration"):
            return [f"calibration={calibration}"], values, {}
        return ["calibration=drop"], {**values, "calibration.corpora": [calibration]}, {}
    if tokenizer is None:
        raise ValueError(TOKENIZER)
    texts = GivenTexts(texts=calibration)
    if given["num_samples"] is None:
        usual = experiment(model, ["calibration=drop"], {}).calibration
        windows = windows_in(texts.texts, tokenizer, given["length"] or usual.length)
        values["calibration.num_samples"] = min(usual.num_samples, windows)
    return ["calibration=drop"], {**values, "calibration.corpora": [GIVEN]}, {"corpora": {GIVEN: texts}}
