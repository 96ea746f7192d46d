from __future__ import annotations

import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import get_args

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from kvp.record import Denominator
from kvp.report.plots import choices, layers, losses, panels, quality, speed
from kvp.report.plots.means import means
from kvp.report.plots.offscale import ceiling
from kvp.report.plots.points import find_points
from kvp.report.plots.style import INK, looks, style
from kvp.report.plots.write import figures, write_plots
from kvp.report.records.runs import Run, read_runs
from tests.report.sample_records import as_runs, decode, layer, make_failed, make_record, perplexity, write

ROOT = Path(__file__).parents[3]
LAYERS = [layer()] * 4


def full_record(strategy: str = "kvpruner", ratio: float = 0.25, seed: int = 0, **options) -> dict:
    """A record with all that plots read: timings, memory, widths per layer, sensitivity, losses."""
    batch = options.pop("batch", 4)
    record = make_record(strategy, ratio, seed, **options)
    for name in ("dense", "pruned", "recovered"):
        if name in record:
            record[name]["measure"]["protocol"]["batch_size"] = batch
            record[name]["measure"]["decode"] = decode(25.0 * batch, 24.0, 27.0)
            record[name]["size"]["layers"] = LAYERS
    if strategy != "none":
        record["pruned"]["size"]["layers"] = [
            layer | {"qk_head_dim": 64 - 16 * i, "v_head_dim": 64 - 16 * i} for i, layer in enumerate(LAYERS)
        ]
    record["sensitivity"] = [2.0, 0.5, 0.01, 0.1] if strategy == "kvpruner" else None
    return record


def test_runs_that_differ_in_what_no_label_names_are_no_repeats():
    """Two models under one name, two columns of one corpus."""
    deep = make_record("kvpruner", config__model__num_hidden_layers=4, ppl=50.0)
    flat = make_record(
        "kvpruner", config__model__num_hidden_layers=2, config__corpora__drop__column="question", ppl=40.0
    )
    other = make_record(
        "kvpruner", config__model__num_hidden_layers=2, config__corpora__drop__column="answer", ppl=30.0
    )
    points = [point for point in find_points(as_runs(deep, flat, other)) if point.state == "pruned"]
    assert len({point.group for point in points}) == 3
    assert {point.base for point in points} == {f"smollm2_135m num_hidden_layers={n}" for n in (2, 4)}
    assert "kvpruner column=answer" in {point.strategy for point in points}


def test_every_seed_of_a_model_is_a_draw():
    records = [make_record("kvpruner", config__calibration__seed=n, ppl=40.0 + n) for n in range(3)]
    found = means(find_points(as_runs(*records)), panels.perplexity)
    drawn = next(each for group in found.values() for each in group if each.point.state == "pruned")
    assert (drawn.value, drawn.std) == (41.0, 1.0)


def test_a_percentage_is_never_off_scale():
    assert ceiling([0.0, 50.0]) >= 100 and ceiling([20.0, 1e6]) == 600


def study() -> list[dict]:
    """Three strategies, two ratios, two seeds, tuned and not, and the control."""
    cost = {"kvpruner": 1, "magnitude": 4, "random": 30}
    pruned = [
        full_record(
            strategy, ratio, seed, steps=steps, ppl=20 + 40 * ratio * factor + seed, recovered=19 + seed
        )
        for strategy, factor in cost.items()
        for ratio in (0.25, 0.5)
        for seed in (0, 1)
        for steps in (None, 60)
    ]
    return [*pruned, *(full_record("none", seed=seed, steps=60, recovered=17.0 + seed) for seed in (0, 1))]


def names(files: list[Path]) -> set[str]:
    return {path.name for path in files}


@pytest.mark.slow
def test_a_full_study_has_every_plot_and_the_same_bytes_in_another_process(tmp_path):
    runs = write(tmp_path / "runs", *study())
    files = write_plots(read_runs([runs]), tmp_path / "here")
    plots = (
        "perplexity_by_kv_cache",
        "zero_shot_by_kv_cache",
        "pareto_kv_bytes",
        "pareto_params",
        "speed_and_memory",
        "sensitivity",
        "kept_widths",
        "recovery_losses",
    )
    assert names(files) == {f"{name}.{kind}" for name in plots for kind in ("png", "svg")}
    assert all(path.read_bytes().startswith((b"\x89PNG", b"<?xml")) for path in files)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-m", "kvp.report", runs, "--out", tmp_path / "there"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    for path in files:
        assert path.read_bytes() == (tmp_path / "there" / path.name).read_bytes(), path.name


def drawn(runs: list[Run]) -> dict[str, Figure]:
    """The plots, not rendered."""
    with style():
        return {name: figure for name, figure in figures(runs) if figure}


def test_what_the_records_do_not_hold_is_not_drawn():
    bare = make_record("random", steps=60)
    for name in ("dense", "pruned", "recovered"):
        bare[name]["measure"] = None
        bare[name]["evaluation"]["zero_shot"] = {"average": None}
        bare[name]["size"]["layers"] = LAYERS
    bare["recovery"]["losses"] = []
    found = drawn(as_runs(bare, make_failed("E", "x", ratio=0.5)))
    assert found.keys() == {"perplexity_by_kv_cache", "pareto_kv_bytes", "pareto_params"}


def test_bytes_are_drawn_as_stored_where_a_cache_has_a_format():
    records = [make_record(strategy, ppl=ppl) for strategy, ppl in (("kvpruner", 40.0), ("none", 21.0))]
    for record in records:
        for model in ("dense", "pruned"):
            record[model]["size"]["stored_bytes_per_token"] = record[model]["size"]["kv_bytes_per_token"]
    assert "pareto_kv_bytes" in drawn(as_runs(*records))
    records[1]["config"]["cache"] = {"class": "Quantized", "key_bits": 8, "value_bits": 8}
    records[1]["pruned"]["size"]["stored_bytes_per_token"] = 5 << 10
    found = drawn(as_runs(*records))
    assert {"pareto_stored_bytes", "pareto_params"} <= found.keys() and "pareto_kv_bytes" not in found
    (panel,) = (
        ax
        for ax in found["pareto_stored_bytes"].axes
        if ax.get_xlabel() == "KV cache as stored (KiB per token)"
    )
    assert 5.0 in {float(x) for line in panel.lines for x in line.get_xdata()}


def test_only_dense_or_only_failed_runs_draw_nothing(tmp_path):
    assert write_plots(as_runs(make_record("none"), make_failed("MemoryError", "x")), tmp_path) == []


def test_means_over_seeds_count_a_seed_once():
    alike = [
        full_record(seed=seed, steps=steps, ppl=ppl)
        for seed, ppl in ((0, 40.0), (1, 44.0))
        for steps in (None, 9)
    ]
    (group,) = means(find_points(as_runs(*alike)), panels.perplexity).values()
    found = {m.point.state: (m.value, m.std) for m in group}
    assert found["pruned"] == (mean([40, 44]), stdev([40, 44]))
    assert found["dense"] == (20.0, 0.0)


def test_other_protocols_make_other_panels_and_say_how_they_differ():
    wide = full_record(ratio=0.5)
    for name in ("dense", "pruned"):
        wide[name]["evaluation"]["perplexity"]["squad"] = perplexity("squad", 9.0, stride=64)
    found = means(find_points(as_runs(full_record(), wide)), panels.perplexity)
    assert sorted(panels.titles(found).values()) == [
        "squad, window 128, stride 128",
        "squad, window 128, stride 64",
    ]


def labels(*records: dict) -> list[str]:
    return [point.label for point in find_points(as_runs(*records)) if point.ratio]


def test_labels_state_the_one_setting_that_differs():
    coupled = [full_record(ratio=ratio, config__strategy__grouping="coupled") for ratio in (0.25, 0.5)]
    assert labels(full_record(), *coupled, full_record("magnitude", seed=1)) == [
        "kvpruner grouping=coupled 25 %",
        "kvpruner grouping=coupled 50 %",
        "kvpruner grouping=separate 25 %",
        "magnitude 25 %",
    ]


def test_labels_of_an_ablation_state_the_departures():
    uniform = full_record(config__strategy__allocator={"class": "Uniform"})
    coupled = full_record(config__strategy__grouping="coupled")
    hot = full_record(config__strategy__allocator__temperature=2.0)
    assert labels(full_record(), full_record(ratio=0.5), uniform, coupled, hot) == [
        "kvpruner 25 %",
        "kvpruner 50 %",
        "kvpruner allocator=uniform 25 %",
        "kvpruner grouping=coupled 25 %",
        "kvpruner temperature=2 25 %",
    ]


def test_a_run_older_than_an_option_is_not_one_with_it():
    newer = full_record(config__strategy__num_key_value_heads=1)
    assert labels(full_record(), newer) == ["kvpruner 25 %", "kvpruner num_key_value_heads=1 25 %"]


def test_an_option_is_stated_where_it_is_set_though_most_runs_set_it():
    joined = [full_record(ratio=ratio, config__strategy__num_key_value_heads=1) for ratio in (0.25, 0.5)]
    coupled = full_record(config__strategy__grouping="coupled", config__strategy__num_key_value_heads=1)
    assert labels(full_record(), *joined, coupled) == [
        "kvpruner 25 %",
        "kvpruner grouping=coupled num_key_value_heads=1 25 %",
        "kvpruner num_key_value_heads=1 25 %",
        "kvpruner num_key_value_heads=1 50 %",
    ]


def test_ratio_plot_shows_pruned_dashed_recovered_solid_and_both_controls():
    with style():
        figure = quality.against_ratio(
            find_points(as_runs(*study())), "kv_cache", panels.perplexity, "perplexity"
        )
    (ax,) = figure.axes
    lines = {tuple(line.get_ydata()): line for line in ax.lines if len(line.get_xdata()) == 2}
    pruned, recovered = lines[(30.5, 40.5)], lines[(19.5, 19.5)]
    assert pruned.is_dashed() and pruned.get_markerfacecolor() == "white"
    assert not recovered.is_dashed() and recovered.get_markerfacecolor() == recovered.get_color()
    black = {line.get_ydata()[0]: line.is_dashed() for line in ax.lines if line.get_color() == INK}
    assert black == {20.0: True, 17.5: False}
    assert list(pruned.get_xdata()) == [25.0, 50.0]


def test_one_ratio_has_a_row_per_strategy_and_the_dense_models_as_lines():
    runs = as_runs(
        full_record(steps=60),
        full_record("magnitude", ppl=60.0),
        full_record("random", ppl=200_000.0),
        full_record("none", steps=60, recovered=17.0),
    )
    figure = drawn(runs)["perplexity_by_kv_cache"]
    (ax,) = figure.axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["kvpruner", "magnitude", "random"]
    spots = {(line.get_xdata()[0], line.get_ydata()[0]) for line in ax.lines if line.get_marker() != "None"}
    assert {(40.0, 0), (30.0, 0), (60.0, 1), (1, 2)} <= spots  # what collapsed stands on the edge
    lines = {line.get_xdata()[0]: line.is_dashed() for line in ax.lines if line.get_color() == INK}
    assert lines == {20.0: True, 17.0: False}
    assert ax.get_xlim()[1] < 100
    assert ax.get_xlabel() == "perplexity, 25 % of kv_cache removed"
    assert choices.NOTE in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(("worst", "scale"), [(60.0, "linear"), (400.0, "log")])
def test_the_axis_is_logarithmic_where_the_range_demands_it(worst, scale):
    points = find_points(as_runs(full_record(), full_record(ratio=0.5, ppl=worst)))
    with style():
        (ax,) = quality.against_ratio(points, "kv_cache", panels.perplexity, "perplexity").axes
    assert ax.get_yscale() == scale


def test_a_collapsed_model_is_marked_above_the_axis_and_does_not_squeeze_the_others():
    points = find_points(as_runs(full_record(), full_record(ratio=0.5), full_record("random", ppl=200_000.0)))
    with style():
        figure = quality.against_ratio(points, "kv_cache", panels.perplexity, "perplexity")
    (ax,) = figure.axes
    assert ax.get_ylim()[1] == 30 * 20.0
    marks = [line for line in ax.lines if line.get_transform() == ax.get_xaxis_transform()]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [(25.0, 1.0)]
    assert "above the axis: off scale" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_front_keeps_what_nothing_beats():
    spots = [(1.0, 9.0), (2.0, 9.0), (2.0, 5.0), (3.0, 6.0), (4.0, 1.0)]
    assert quality.front(spots) == [(1.0, 9.0), (2.0, 5.0), (4.0, 1.0)]


def test_several_batch_sizes_make_lines_and_one_makes_bars():
    several = [full_record(batch=size, config__measure__batch_size=size) for size in (1, 4, 8)]
    with style():
        lines = speed.speed_and_memory(find_points(as_runs(*several)))
        bars = speed.speed_and_memory(find_points(as_runs(full_record())))
    assert [line.get_xdata().tolist() for line in lines.axes[0].lines[:1]] == [[1, 4, 8]]
    widths = [bar.get_width() for bar in bars.axes[1].patches]
    assert sum(widths) == pytest.approx(2 * 3.0)  # MiB of weights, cache and rest, of dense and of pruned


def test_strategies_that_share_a_profile_share_a_line():
    hot = full_record(config__strategy__allocator__temperature=2.0, config__strategy__grouping="coupled")
    second = full_record(seed=1)
    second["sensitivity"] = [4.0, 1.5, 0.03, -0.1]
    with style():
        (ax,) = layers.sensitivity(find_points(as_runs(full_record(), second, hot))).axes
    (line,) = ax.lines
    assert list(line.get_ydata()) == pytest.approx([3.0, 1.0, 0.02, 0.0])


def test_axes_cut_alike_share_a_heat_map():
    with style():
        figure = layers.kept_widths(find_points(as_runs(full_record(), full_record(ratio=0.5))))
    heat, bar = figure.axes
    assert heat.get_title() == "query and key channels; value channels"
    assert heat.images[0].get_array().tolist() == [[100, 75, 50, 25]] * 2
    assert [text.get_text() for text in heat.get_yticklabels()] == ["kvpruner 25 %", "kvpruner 50 %"]
    assert bar.get_ylabel() == "kept (%)"


def test_two_dense_models_share_no_panel():
    other = full_record(ratio=0.5, config__model__name="big")
    for name in ("dense", "pruned"):
        other[name]["size"]["layers"] = other[name]["size"]["layers"][:3]
    runs = as_runs(full_record(), other)
    assert {"kept_widths_big", "kept_widths_smollm2_135m"} <= drawn(runs).keys()
    found = panels.titles(means(find_points(runs), panels.perplexity)).values()
    assert sorted(found) == ["squad, window 128, model big", "squad, window 128, model smollm2_135m"]


def test_smoothing_keeps_a_constant_and_the_first_value():
    assert losses.smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    assert losses.smoothed([5.0, 1.0])[0] == pytest.approx(5.0)


def test_no_two_series_look_alike():
    made = [(look.color, look.marker) for look in looks(map(str, range(60))).values()]
    assert len(set(made)) == 60
    assert len({marker for _, marker in made[:11]}) == 11
    assert INK not in {to_hex(color) for color, _ in made}


@pytest.mark.parametrize(("count", "long"), [(1, ""), (8, ""), (3, " with settings that take room=yes")])
def test_legends_stay_off_the_data_and_text_is_readable(count, long):
    records = [
        full_record(ratio=ratio, steps=60, config__strategy__grouping=f"g{i}{long}")
        for i in range(count)
        for ratio in (0.25, 0.5)
    ]
    points = find_points(as_runs(*records))
    with style():
        figures = [
            quality.against_ratio(points, "kv_cache", panels.perplexity, "perplexity"),
            choices.at_one_ratio(points, "kv_cache", panels.perplexity, "perplexity"),
            quality.pareto(points, "params", panels.perplexity, "perplexity"),
            speed.speed_and_memory(points),
            layers.sensitivity(points),
            losses.recovery_losses(points),
        ]
        for figure in figures:
            figure.draw_without_rendering()
            (legend,) = figure.legends
            box = legend.get_window_extent()
            assert not any(box.overlaps(ax.get_tightbbox()) for ax in figure.axes)
            assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1
            assert not any(
                a.get_window_extent().overlaps(b.get_window_extent()) for a, b in combinations(figure.axes, 2)
            )
            assert all(ax.get_window_extent().height > 20 for ax in figure.axes)
            assert all(text.get_fontsize() >= 8 for text in figure.findobj(Text) if text.get_text())


def test_every_denominator_has_an_axis():
    assert set(quality.REMOVED) == set(get_args(Denominator))
