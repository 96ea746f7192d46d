"""What may stand in one panel: values whose protocols agree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from kvp.results import MeasureRecord, ModelRecord

TASK = ("version", "lm_eval", "split", "limit", "num_fewshot", "dtype", "data_hash")
TIMING = ("device", "dtype", "attention", "threads")


class Panel(NamedTuple):
    """A title, and all the facts that must agree between the values of one panel."""

    title: str
    facts: tuple[tuple[str, Any], ...]

    def of(self, base: str) -> Panel:
        """The same for one dense model only."""
        return self._replace(facts=(("model", base), *self.facts))


def perplexity(model: ModelRecord) -> dict[Panel, float]:
    """Perplexity of each corpus: the same tokens in the same windows, in one dtype."""
    return {
        Panel(
            f"{corpus}, window {result.protocol.window}",
            _facts(result.protocol, "window", "stride", "bos") + _facts(result, "dtype", "data_hash"),
        ): result.value
        for corpus, result in model.evaluation.perplexity.items()
    }


def zero_shot(model: ModelRecord) -> dict[Panel, float]:
    """Average accuracy in percent: the same tasks and metrics, of one version, on the same documents."""
    average, tasks = model.evaluation.zero_shot.average, model.evaluation.zero_shot.tasks
    if average is None or average.value is None:
        return {}
    facts = [
        (task, (("metric", metric), *_facts(tasks[task], *TASK))) for task, metric in average.metrics.items()
    ]
    limit = max((tasks[task].limit or 0 for task in average.tasks), default=0)
    first = f" (first {limit} each)" if limit else ""
    return {Panel(", ".join(average.tasks) + first, tuple(facts)): 100 * average.value}


def decode_speed(model: ModelRecord, *, batch: bool = True) -> dict[Panel, float]:
    """Decoded tokens per second: one device, one length of prompt and output, and one batch size or any."""
    measured = model.measure
    return {_timed(measured, batch): measured.decode.tokens_per_second} if measured else {}


def peak_memory(model: ModelRecord, *, batch: bool = True) -> dict[Panel, float]:
    """Peak memory over that of an empty process, in MiB; one panel as for `decode_speed`."""
    measured = model.measure
    return {_timed(measured, batch): measured.memory.above_baseline / 2**20} if measured else {}


def _timed(measured: MeasureRecord, batch: bool) -> Panel:
    protocol = measured.protocol
    title = f"{protocol.prompt_length} + {protocol.new_tokens} tokens, {measured.device}"
    facts = _facts(protocol, "prompt_length", "new_tokens") + _facts(measured, *TIMING)
    if not batch:
        return Panel(title, facts)
    return Panel(f"batch {protocol.batch_size}, {title}", facts + _facts(protocol, "batch_size"))


def _facts(source: Any, *keys: str) -> tuple[tuple[str, Any], ...]:
    return tuple((key, getattr(source, key)) for key in keys)


def titles(panels: Iterable[Panel]) -> dict[Panel, str]:
    """The title of each panel; where two would agree, with the facts that tell them apart."""
    panels = list(panels)
    crowds = {title for title, count in Counter(panel.title for panel in panels).items() if count > 1}
    named = {}
    for panel in panels:
        rivals = [dict(other.facts) for other in panels if other.title == panel.title]
        apart = [
            f"{key} {str(value)[:16]}"
            for key, value in panel.facts
            if panel.title in crowds and any(other.get(key) != value for other in rivals)
        ]
        named[panel] = ", ".join([panel.title, *apart])
    return named
