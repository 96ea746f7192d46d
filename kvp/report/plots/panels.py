"""Panels: values share one if they were measured alike, by the same facts that keep a table's column together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from kvp.report.plots.points import Point
from kvp.report.records.facts import facts, phrase
from kvp.tables import plain

BATCH = frozenset({"batch_size"})


class Panel(NamedTuple):
    """A title, and all the facts that must agree between the values of one panel."""

    title: str
    facts: tuple[tuple[str, Any], ...]

    def under(self, *more: tuple[str, Any]) -> Panel:
        """Return the panel of those values that share these facts, too."""
        return self._replace(facts=(*more, *self.facts))


def panel_of(point: Point, metric: str, title: str, without: Collection[str] = ()) -> Panel:
    """Return the panel of a number of a point's model.

    Args:
        point: The model.
        metric: Path of the number in the model: "size.params".
        title: Title of the panel.
        without: Facts that may differ within the panel, for an axis shows them.
    """
    shared = facts(point.run.record, f"{point.part}.{metric}").items()
    return Panel(title, tuple((name, value) for name, value in shared if name not in without))


def size(point: Point, key: str) -> dict[Panel, float]:
    """Return a model's parameters ("params") or cache bytes per token ("kv_bytes_per_token")."""
    return {panel_of(point, f"size.{key}", ""): getattr(point.model.size, key)}


def perplexity(point: Point) -> dict[Panel, float]:
    """Return a model's perplexity on each corpus."""
    return {
        panel_of(
            point, f"evaluation.perplexity.{corpus}.value", f"{corpus}, window {result.protocol.window}"
        ): result.value
        for corpus, result in point.model.evaluation.perplexity.items()
    }


def zero_shot(point: Point) -> dict[Panel, float]:
    """Return a model's average accuracy in percent; nothing without tasks."""
    average, tasks = point.model.evaluation.zero_shot.average, point.model.evaluation.zero_shot.tasks
    if average is None or average.value is None:
        return {}
    limit = max((tasks[task].limit or 0 for task in average.tasks), default=0)
    title = ", ".join(average.tasks) + (f" (first {limit} each)" if limit else "")
    return {panel_of(point, "evaluation.zero_shot.average.value", title): 100 * average.value}


def decode_speed(point: Point, *, any_batch: bool = False) -> dict[Panel, float]:
    """Return a model's decoded tokens per second; nothing if it was not measured."""
    measured = point.model.measure
    return {_timed(point, any_batch): measured.decode.tokens_per_second} if measured else {}


def peak_memory(point: Point, *, any_batch: bool = False) -> dict[Panel, float]:
    """Return a model's peak memory over that of an empty process, in MiB; nothing if it was not measured."""
    measured = point.model.measure
    return {_timed(point, any_batch): measured.memory.above_baseline / 2**20} if measured else {}


def _timed(point: Point, any_batch: bool) -> Panel:
    """Return the panel of a timing; with `any_batch`, of all batch sizes."""
    measured = point.model.measure
    assert measured is not None
    protocol = measured.protocol
    title = f"{protocol.prompt_length} + {protocol.new_tokens} tokens, {measured.device}"
    if any_batch:
        return panel_of(point, "measure", title, without=BATCH)
    return panel_of(point, "measure", f"batch {protocol.batch_size}, {title}")


def titles(panels: Iterable[Panel]) -> dict[Panel, str]:
    """Return the title of each panel; where two would agree, with the facts that tell them apart."""
    panels = list(panels)
    crowds = {title for title, count in Counter(panel.title for panel in panels).items() if count > 1}
    named = {}
    for panel in panels:
        rivals = [dict(other.facts) for other in panels if other.title == panel.title]
        apart = [
            phrase(name, value)
            for name, value in panel.facts
            if panel.title in crowds and any(other.get(name) != value for other in rivals)
        ]
        named[panel] = plain(", ".join(filter(None, [panel.title, *apart])))
    return named
