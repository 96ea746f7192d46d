"""Recoveries with and without a teacher in one table and one plot."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from kvp.report.plots.losses import PARTS, recovery_losses
from kvp.report.plots.points import find_points
from kvp.report.plots.style import style
from kvp.report.table.build import build
from kvp.report.table.spec import Spec, load_spec
from tests.report.sample_records import as_runs, make_record

TEACHER = {
    "class": "Distillation",
    "text_weight": 0.5,
    "logits_weight": 1.0,
    "hidden_weight": 0.0,
    "temperature": 1.0,
}


def record(temperature: float | None, **options) -> dict:
    """A recovery of three steps; no temperature: no teacher."""
    if temperature:
        options["config__recovery__distillation"] = TEACHER | {"temperature": temperature}
    made = make_record(steps=60, **options)
    made["recovery"]["losses"] = [[1, 5.0], [2, 4.0], [3, 3.0]]
    if temperature:
        parts = {"text": [4.0, 3.0, 2.0], "logits": [3.0, 2.5, 2.0], "hidden": [0.1, 0.1, 0.1]}
        made["recovery"]["loss_parts"] = {
            name: [[1 + i, value] for i, value in enumerate(values)] for name, values in parts.items()
        }
    return made


def test_the_table_tells_the_teachers_apart_and_needs_none():
    spec = load_spec("recovery_ablation")
    table = build(spec, as_runs(record(None), record(1.0, recovered=29.0), record(2.0, recovered=28.0)))
    assert table.keys == ("Removed", "Strategy", "steps", "rank", "text", "logits", "hidden", "temperature")
    labels = [row.labels[4:] for row in table.rows if row.kind == "run"]
    assert labels == [("—", "—", "—", "—"), ("0.5", "1", "0", "1"), ("0.5", "1", "0", "2")]
    old = build(spec, as_runs(record(None), record(None, ratio=0.5)))
    assert old.keys == ("Removed", "Strategy", "steps", "rank")


def test_an_optional_heading_that_is_no_row_is_refused():
    with pytest.raises(ValueError, match="optional names 'txt', which is no row; near it: text"):
        Spec(name="x", title="x", rows={"text": "recovery"}, columns=[], optional=["txt"])


def test_thin_lines_are_the_parts_in_nats():
    with style():
        (ax,) = recovery_losses(find_points(as_runs(record(1.0)))).axes
    solid, text, logits = ax.lines[1:]
    assert (text.get_linestyle(), logits.get_linestyle()) == (PARTS["text"], PARTS["logits"])
    assert to_hex(text.get_color()) == to_hex(solid.get_color())
    assert [line.get_ydata()[0] for line in (solid, text, logits)] == pytest.approx([5.0, 4.0, 3.0])
    assert [text.get_text() for text in ax.figure.legends[0].texts] == [
        "kvpruner",
        "text part",
        "logits part",
    ]
