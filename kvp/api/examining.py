"""Evaluate and measure a model that is in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvp.api.chosen import check_choice, check_memory, chosen, experiment
from kvp.api.given import GivenTexts
from kvp.api.memory import as_loaded, check_in_memory, check_tokenizer
from kvp.evaluation.zeroshot import average
from kvp.models.load import save
from kvp.pipeline.gate import check_model, check_sources
from kvp.pipeline.texts import check_texts
from kvp.results import MeasureRecord


@dataclass(frozen=True)
class Evaluation:
    """The quality of a model, and the protocol behind every number.

    Attributes:
        perplexity: By corpus; lower is better.
        zero_shot: Metrics by task, such as {"piqa": {"acc": 0.7, "acc_stderr": 0.1}}.
        needles: By task and length, such as {"single_512": {"accuracy": 0.9, "stderr": 0.04, "bound": 0.38, ...}}.
        average: "value" and "stderr" over those of LLM-Pruner's seven tasks that were scored; "value" None without any.
        results: All that run.json says of each, by corpus and task: window, BOS, splits, hashes.
    """

    perplexity: Mapping[str, float]
    zero_shot: Mapping[str, Mapping[str, float]]
    needles: Mapping[str, Mapping[str, Any]]
    average: Mapping[str, Any]
    results: Mapping[str, Mapping[str, Any]]

    def __str__(self) -> str:
        words = [f"perplexity {name} {value:.2f}" for name, value in self.perplexity.items()]
        if self.average["value"] is not None:
            words.append(
                f"zero-shot average {100 * self.average['value']:.1f} % ({len(self.zero_shot)} tasks)"
            )
        for name, found in self.needles.items():
            share = f"{100 * found['accuracy']:.0f} %" if found["accuracy"] >= found["bound"] else "at chance"
            words.append(f"needles {name} {share}")
        return ", ".join(words)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    protocol: str = "packaged",
    *,
    perplexity: str | Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    window: int | None = None,
    max_tokens: int | None = None,
    lengths: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Return perplexity, zero-shot accuracy, and with protocol="needles" retrieval from long texts of a model.

        kvp.evaluate(model, tokenizer, perplexity=["squad"], tasks=["piqa"], limit=100)

    Args:
        model: A Hugging Face decoder, pruned or not.
        tokenizer: The model's.
        protocol: An option of conf/evaluation; the other arguments change parts of it.
        perplexity: Names of corpora, or texts by name; empty: none.
        tasks: Names of lm-eval tasks; empty: none.
        limit: The first documents of a task, or the texts that hide needles.
        window: Tokens of a perplexity window; numbers of different windows are not comparable.
        max_tokens: Tokens of a corpus.
        lengths: Tokens of texts that hide needles.
        batch_size: Windows and requests per pass.

    Raises:
        ValueError: An option, a corpus or a task is unknown, or the protocol has no use for it; nothing was computed.
        FileNotFoundError: Data are missing; the message names the ways out.
        FloatingPointError: A loss is not finite.
    """
    check_in_memory(model)
    check_tokenizer(tokenizer)
    if protocol == "none":
        raise ValueError("protocol must be an option that evaluates, such as packaged; got 'none'")
    perplexity = [perplexity] if isinstance(perplexity, str) else perplexity
    tasks = [tasks] if isinstance(tasks, str) else tasks
    lengths = [lengths] if isinstance(lengths, int | str) else lengths
    for name, given in (("perplexity", perplexity), ("tasks", tasks), ("lengths", lengths)):
        if not (given is None or isinstance(given, Mapping | Sequence)):
            raise ValueError(f"{name} must be a list, got {given!r}: an empty list asks for none")
    own = perplexity if isinstance(perplexity, Mapping) else {}
    settings: dict[str, dict[str, Any]] = {
        "perplexity": {"perplexity.corpora": [*perplexity] if perplexity else None},
        "tasks": {"zero_shot.tasks": [*tasks] if tasks else None},
        "lengths": {"needles.lengths": [*lengths] if lengths else None},
        "limit": {"zero_shot.limit": limit, "needles.samples": limit},
        "window": {"perplexity.window": window},
        "max_tokens": {"perplexity.max_tokens": max_tokens},
        "batch_size": {"perplexity.batch_size": batch_size, "zero_shot.batch_size": batch_size},
    }
    words = [f"evaluation={check_choice('evaluation', protocol)}", "strategy=none"]
    usual = experiment(model, words, {})
    asked = {"perplexity": perplexity, "zero_shot": tasks, "needles": lengths}
    parts = [part for part in asked if getattr(usual, part) and (asked[part] is None or asked[part])]
    if not parts:
        raise ValueError(f"nothing is left to evaluate of protocol={protocol!r}: an empty list asks for none")
    values: dict[str, Any] = {}
    for argument, keys in settings.items():
        given = {f"evaluation.{key}": value for key, value in keys.items() if value is not None}
        taken = {key: value for key, value in given.items() if key.split(".")[1] in parts}
        if given and not taken:
            other = "needles" if argument == "lengths" else "packaged"
            raise ValueError(
                f"{argument} has no part in an evaluation of {' and '.join(parts)}: leave it out"
                f"{f', or choose protocol={other!r}' if other != protocol else ''}"
            )
        values |= taken
    off: dict[str, Any] = {part: None for part in asked if part not in parts}
    x = experiment(model, words, values)
    x = replace(
        x,
        **off,
        corpora={**x.corpora, **{name: GivenTexts(texts=texts) for name, texts in own.items()}},
    )
    check_sources(x)
    check_model(x, model.config)
    check_texts(x, lambda: tokenizer, model.config.max_position_embeddings)
    losses, scores, found = {}, {}, {}
    with as_loaded(model):
        if x.perplexity is not None:
            for name in x.perplexity.corpora:
                losses[name] = x.perplexity.evaluate(model, tokenizer, x.corpora[name])
        if x.zero_shot is not None:
            for task in x.zero_shot.tasks:
                scores[task] = x.zero_shot.evaluate(model, tokenizer, task)
        if (needles := x.needles) is not None:
            for task, length in product(needles.tasks, needles.lengths):
                corpus = x.corpora[needles.corpus]
                found[f"{task}_{length}"] = needles.evaluate(model, tokenizer, corpus, task, length)
    return Evaluation(
        perplexity={name: result["value"] for name, result in losses.items()},
        zero_shot={
            task: {k: v for k, v in result.items() if k.startswith("acc")} for task, result in scores.items()
        },
        needles=found,
        average=average(scores),
        results={**losses, **scores, **found},
    )


def measure(model: PreTrainedModel, protocol: str = "cpu_quick", **options: Any) -> MeasureRecord:
    """Return the speed and memory of a model, measured in a process of its own.

        kvp.measure(pruned.model, batch_size=8).decode.tokens_per_second

    The process reads a copy of the model on disk, so a temporary directory holds it meanwhile.

    Args:
        model: A Hugging Face decoder, pruned or not.
        protocol: An option of conf/measure.
        options: Options of the protocol, such as `prompt_length=512`.

    Raises:
        ValueError: An option is out of its bounds, or the model has too few positions.
        RuntimeError: The process failed; the end of its output is in the message.
    """
    check_in_memory(model)
    words, values = chosen("measure", protocol, options)
    x = experiment(model, [*words, "strategy=none"], values)
    if x.protocol is None:
        raise ValueError("protocol must be an option that measures, such as cpu_quick; got 'none'")
    check_model(x, model.config)
    check_memory(x, model)
    with tempfile.TemporaryDirectory(prefix="kvp-measure-") as directory:
        save(model, None, Path(directory))
        dtype = str(model.dtype).removeprefix("torch.")
        return MeasureRecord.model_validate(x.protocol.measure(Path(directory), device=x.device, dtype=dtype))
