"""Records from strangers: damage is refused by file and field, names stay names, files are whole or not there."""

from __future__ import annotations

import copy
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kvp.report.__main__ import _parser, main, report
from kvp.report.records.runs import read_runs
from kvp.report.table.references import load_published
from kvp.report.whole import whole
from kvp.tables import LABEL, plain
from tests.report.page.test_html import Page
from tests.report.sample_records import make_failed, make_record, perplexity, put, write, zero_shot

ROOT = Path(__file__).parents[2]
NAMES = ["table.md", "table.csv", "table.tex", "sources.json"]


def run(place: Path, *records, words=("--no-plots",)) -> Path:
    """Report on records, each in a file of its own, and return the directory of the report."""
    for i, record in enumerate(records):
        path = place / "runs" / f"run-{i}" / "run.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    report(_parser().parse_args([str(place / "runs"), "--out", str(place / "out"), *words]))
    return place / "out"


DENSE = {
    "one run": ([make_record("none")], ["dense"]),
    "two seeds": ([make_record("none"), make_record("none", seed=1)], ["dense"]),
    "tuned": ([make_record("none", steps=10)], ["dense", "dense, tuned alike"]),
    "both": ([make_record("none"), make_record("none", steps=10)], ["dense", "dense, tuned alike"]),
    "one failed": ([make_record("none"), make_failed("MemoryError", "", strategy="none", seed=1)], ["dense"]),
}


@pytest.mark.parametrize("case", DENSE)
def test_dense_runs_alone_have_a_table_and_a_page(tmp_path, case):
    records, names = DENSE[case]
    out = run(tmp_path, *records)
    head, _, *rows = [line for line in (out / "table.md").read_text().splitlines() if line.startswith("|")]
    assert head.startswith("| Strategy") and [row.split("|")[1].strip() for row in rows] == names
    assert Page(out / "report.html").root


def test_dense_runs_alone_have_their_plots_or_none(tmp_path):
    out = run(tmp_path, make_record("none", steps=10), words=())
    assert {path.name for path in out.glob("*.svg")} == {"recovery_losses.svg"}


PERPLEXITY = perplexity("squad", 40.0)
DAMAGE = {  # dotted path -> value, and what the message says beside the file
    "pruned.evaluation.perplexity.squad.value": [(float("nan"), "nan"), (-3.0, "below 0"), (0, "is 0")],
    "pruned.evaluation.perplexity.squad.protocol.corpus": [({}, "corpus.name"), ({"name": 3}, "corpus.name")],
    "pruned.size.params": [(10**300, "is too large"), (-1, "below 0"), ("many", "pruned.size.params")],
    "pruned.size.layers": [([], "pruned.size.layers is empty"), (None, "pruned.size.layers")],
    "recovered": [(None, "recovered is missing")],
    "recovered.measure.decode.iqr": [([1], "recovered.measure.decode.iqr"), ([1, 1e308], "not a finite")],
    "recovered.evaluation.zero_shot.piqa.acc": [(1.5, "acc is 1.5, above 1"), (None, "piqa.acc")],
    "recovered.evaluation.zero_shot.average.tasks": [(["boolq"], "names 'boolq', which has no result")],
    "recovered.evaluation.zero_shot.average.metrics": [({"piqa": "f1"}, "names 'piqa' 'f1'")],
    "ratio.achieved": [
        ({"params": 0.1}, "ratio.achieved has no kv_cache"),
        ({"../x": 0.1}, "ratio.achieved"),
    ],
    "ratio.asked.value": [(7, "ratio.asked is 7.0")],
    "config.ratio": [(None, "config.ratio is no mapping"), ({"value": "x", "of": "kv_cache"}, "ratio.value")],
    "config.ratio.of": [("../../../etc", "config.ratio.of is '../../../etc', not one of kv_cache")],
    "config.seed": [("zero", "config.seed is 'zero'"), (None, "config.seed")],
    "config.model": [(None, "config.model.name is no text"), ({"name": ["a"]}, "config.model.name")],
    "config.strategy": [([], "config.strategy.class is no text"), ({"class": 3}, "config.strategy.class")],
    "config.calibration.class": [([], r"config.calibration.class is \[\]")],
    "config.recovery": [("lora", "config.recovery is neither")],
    "config.device": [("\ud800", "half a character")],
    "pruned.evaluation.perplexity": [({"a.b": {}}, "a.b.value"), ({"a.b": PERPLEXITY}, "names 'a.b'")],
    "recovery.losses": [([[1, "x"]], "recovery.losses"), ([[1]], "recovery.losses")],
    "provenance": [({}, "provenance.origins"), ([], "provenance")],
    "stages": [([{}], "stages.0"), (None, "stages")],
}


@pytest.mark.parametrize(
    ("path", "value", "message"), [(path, *each) for path, some in DAMAGE.items() for each in some]
)
def test_a_damaged_record_is_refused_by_file_and_field_and_nothing_is_written(
    tmp_path, capsys, path, value, message
):
    record = make_record(steps=10)
    put(record, path.split("."), value)
    write(tmp_path / "runs", make_record("magnitude"))
    (tmp_path / "runs" / "bad").mkdir()
    (tmp_path / "runs" / "bad" / "run.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "runs"), "--out", str(tmp_path / "new" / "out")])
    text = str(caught.value)
    assert re.search(message, text) and "bad/run.json" in text and "\n" not in text and "leave it out" in text
    assert not (tmp_path / "new").exists() and not capsys.readouterr().out


@pytest.mark.parametrize("schema", [1, 2, 3])
@pytest.mark.parametrize(
    ("key", "value"), [("provenance", None), ("stages", [3]), ("stages", {}), ("provenance", {})]
)
def test_a_damaged_origin_of_an_old_schema_is_refused_too(tmp_path, schema, key, value):
    with pytest.raises(ValueError, match=rf"run-0/run\.json .*{key}"):
        run(tmp_path, {**make_record(schema=schema), key: value})


@pytest.mark.parametrize("schema", [1, 2, 3])
@pytest.mark.parametrize("config", [None, [], {"strategy": {"_target_": 3}}, {"strategy": {"_target_": "x"}}])
def test_a_damaged_record_of_an_old_schema_is_refused_too(tmp_path, schema, config):
    with pytest.raises(ValueError, match=r"run-0/run\.json .*config"):
        run(tmp_path, {**make_record(schema=schema), "config": config})


def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(ValueError, match=r"run\.json is no file"):
        read_runs([tmp_path])
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    with pytest.raises(ValueError, match=r"run\.json is no file"):
        read_runs([tmp_path])
    (tmp_path / "run.json").rmdir()
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"run\.json is corrupt .too deep.: delete it"):
        read_runs([tmp_path])


MARKUP = {
    "tag": "<script>alert(1)</script>",
    "rich": "[red]x[/red]",
    "pipe": "a|b\\|c",
    "code": "`x` *y* _z_",
    "lines": "one\ntwo\r\n\x1b[31mthree",
    "math": "$x_1$ \\frac{1}{2",
    "tex": "_&%#{}~^\\end{tabular}",
    "bidi": "abc\u202egnp.exe\u2066",
    "long": "x" * 10_000,
    "formula": "=cmd|' /C calc'!A0",
    "link": "[a](javascript:alert(1))",
    "path": "../../../../tmp/kvp-evil",
}


def named(text: str, **options):
    """Return a record whose every name is this text."""
    corpus = text.replace(".", "")
    origin = {f"provenance__origins__0__{name}": text for name in ("device", "commit")}
    record = make_record(ppl={corpus: 40.0}, steps=10, **origin, **options)
    record["config"]["model"]["name"] = record["name"] = text
    record["config"]["strategy"]["grouping"] = text
    record["choices"]["strategy"] = record["choices"]["recovery"] = text
    for part in ("dense", "pruned", "recovered"):
        results = record[part]["evaluation"]
        results["zero_shot"] = zero_shot({"piqa": 0.5})
        results["zero_shot"][corpus] = results["zero_shot"]["piqa"]
        results["perplexity"][corpus]["protocol"]["corpus"]["name"] = text
        record[part]["measure"]["device"] = text
    return record


def records(text: str):
    """Return a tuned run, another of another setting, and a failed one, all with this text for a name."""
    other, failed = named(text, ratio=0.5), named(text, ratio=0.75)
    other["config"]["strategy"]["grouping"] = f"{text}2"
    for part in ("pruned", "recovered"):
        del failed[part]
    error = {"type": text, "message": text, "traceback": text}
    return (
        named(text),
        {**other, "hash": "other"},
        {**failed, "hash": text[:64], "status": "failed", "error": error},
    )


def cells(line: str) -> int:
    """Count the cells of a Markdown row; an escaped pipe is text."""
    return len(re.sub(r"\\.", "", line).split("|"))


@pytest.mark.parametrize("kind", MARKUP)
def test_a_name_that_is_markup_stays_a_name(tmp_path, capsys, kind):
    out = run(tmp_path, *records(MARKUP[kind]))
    shown = capsys.readouterr().out
    files = {name: (out / name).read_text() for name in [*NAMES, "report.html"]}
    for text in (shown, *files.values()):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)
        assert "x" * (LABEL + 1) not in text
    rows = [line for line in files["table.md"].splitlines() if line.startswith("|")]
    assert len({cells(row) for row in rows}) == 1
    assert not re.search(r"<(?!/?(u|sup)>)", files["table.md"])
    assert not re.search(r"(?<!\\)\[[^\]]*\]\(", files["table.md"])
    for row in csv.reader(files["table.csv"].splitlines()):
        assert not any(re.match(r"[=+@]|-[^\d]", cell) for cell in row)
    body = files["table.tex"].partition(r"\midrule")[2].partition(r"\bottomrule")[0]
    lines = [line for line in body.splitlines() if line not in ("", r"\midrule")]
    assert len({len(re.split(r"(?<!\\)&", line)) for line in lines}) == 1
    for line in lines:
        bare = re.sub(r"\$\\?\w*[<>]?\$|\\text\w+\{|\\underline\{|\\[&%$#_{}]|\\\\$|\{[][]\}", "", line)
        assert not re.search(r"(?<!\\)[$%#_^~]|^\s*\[", bare), bare
    page = Page(out / "report.html").root
    assert len(list(page.all("script"))) == 1
    assert all("javascript:" not in (link["href"] or "") for link in page.all("a"))


def drawn(place: Path, *strange) -> Path:
    """Report, with plots, on records whose names are markup, and return the directory of the report."""
    for i, record in enumerate(strange):
        record["hash"] = f"{i:012}"
    out = run(place, *strange, words=())
    made = {path.relative_to(place).parts[0] for path in place.rglob("*") if path.is_file()}
    assert made == {"runs", "out"} and all(path.parent == out for path in out.rglob("*"))
    for path in out.glob("*.svg"):
        ElementTree.parse(path)  # our own
    return out


def test_plots_of_names_that_are_markup_are_drawn_and_stay_inside(tmp_path):
    strange = [named("$x_1$ \\frac{1}{2"), named("../../../../tmp/$evil")]
    for record in strange:
        for part in ("dense", "pruned", "recovered"):
            record[part] |= {"measure": None}
            record[part]["evaluation"] = {"perplexity": {}, "zero_shot": {"average": None}}
    out = drawn(tmp_path, *strange)
    assert len(list(out.glob("kept_widths_*.png"))) == 2


@pytest.mark.slow
def test_plots_of_all_names_that_are_markup_are_drawn(tmp_path):
    drawn(tmp_path, *map(named, MARKUP.values()))


def test_a_model_s_name_is_no_path_of_published_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments" / "references").mkdir(parents=True)
    for place in ("experiments/secret.yaml", "experiments/references/mine.yaml"):
        (tmp_path / place).write_text("p: {source: s, rows: [{method: m}]}")
    assert load_published(["../secret", str(tmp_path / "experiments" / "secret"), ".."]) == []
    assert len(load_published(["mine"])) == 1


def test_plain_text_is_one_visible_line_and_two_long_ones_stay_two():
    assert plain("a\u202eb\x1b\n\u00adc") == "a\\u202eb\\x1b \\xadc"
    assert plain("kvpruner 25 % ±") == "kvpruner 25 % ±"
    one, two = plain("x" * 9999 + "1"), plain("x" * 9999 + "2")
    assert len(one) == LABEL and one != two


def test_a_report_replaces_links_and_keeps_what_is_not_its_own(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for name in NAMES:
        (tmp_path / "out" / name).symlink_to(precious)
    out = run(tmp_path, make_record())
    assert precious.read_text() == "mine" == (out / "notes.txt").read_text()
    assert not any((out / name).is_symlink() for name in NAMES)
    assert not list(out.glob(".*"))


@pytest.mark.parametrize("there", [False, True])
def test_a_report_that_fails_on_the_way_leaves_everything_as_it_was(tmp_path, there):
    out = tmp_path / "a" / "out"
    if there:
        out.mkdir(parents=True)
        (out / "table.md").write_text("old")

    def fail():
        with whole(out) as partial:
            (partial / "table.md").write_text("new")
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        fail()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == (["table.md"] if there else [])
    assert not there or (out / "table.md").read_text() == "old"


def test_the_rest_of_a_killed_report_is_removed_by_the_next(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with whole(tmp_path / "out") as partial:
        left = partial.with_name(partial.name.replace(str(os.getpid()), str(gone.pid)))
    left.mkdir()
    (left / "table.md").write_text("half")
    with whole(tmp_path / "other"):
        pass
    assert not left.exists() and (tmp_path / "out").is_dir()


def leaves(node, path=()):
    """Yield the path of everything in a record, nodes and values."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


ODD = [None, -1, 0, 0.5, 1e308, float("nan"), float("inf"), 10**30, "x", "", [], {}, True, [1, 2], {"a": 1}]
ODD += ["<script>", "\ud800", "x" * 5000, "2026-99-99", "../..", {"value": 1, "of": 2}, [[]], -0.5]
BASE = [
    make_record(),
    make_record(steps=10),
    make_record("none", steps=10),
    make_record("magnitude", ratio=0.5),
]


def survives(place: Path, seed: int, words=("--no-plots",)) -> bool:
    """Report on four records of which one is damaged: a report, or a refusal in one line that names the file."""
    seeded = random.Random(seed)
    made, which = copy.deepcopy(BASE), seeded.randrange(len(BASE))
    for _ in range(seeded.choice([1, 1, 2, 3])):
        node = made[which]
        top = seeded.choice(sorted(node))
        path = seeded.choice([each for each in leaves(node) if each[0] == top])
        for key in path[:-1]:
            node = node[key]
        if seeded.random() < 0.25:
            del node[path[-1]]
        else:
            node[path[-1]] = copy.deepcopy(seeded.choice(ODD))
    refusal = None
    try:
        out = run(place / str(seed), *made, words=words)
    except (ValueError, OSError) as error:
        refusal = str(error)
    if refusal is None:
        assert all((out / name).stat().st_size for name in [*NAMES, "report.html"])
        return True
    named = f"run-{which}/run.json" in refusal or "must not" in refusal  # numbers of two protocols
    assert named and "\n" not in refusal and not (place / str(seed) / "out").exists(), refusal
    return False


def test_no_damage_ends_in_a_traceback(tmp_path):
    outcomes = [survives(tmp_path, seed) for seed in range(30)]
    assert 3 < sum(outcomes) < 27


@pytest.mark.slow
def test_six_hundred_damages_end_in_no_traceback(tmp_path):
    outcomes = [survives(tmp_path, seed) for seed in range(30, 630)]
    assert 100 < sum(outcomes) < 500


@pytest.mark.slow
def test_damages_that_reach_the_plots_end_in_no_traceback(tmp_path):
    outcomes = [survives(tmp_path, seed, words=()) for seed in range(1000, 1060)]
    assert any(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("there", [False, True])
def test_ten_killed_reports_leave_whole_files(tmp_path, there):
    write(tmp_path / "runs", *BASE)
    whole_one = run(tmp_path / "a", *BASE, words=())
    sizes = {path.name for path in whole_one.iterdir()}
    seeded, killed = random.Random(0), 0
    command = [sys.executable, "-m", "kvp.report", str(tmp_path / "runs"), "--out"]
    started = time.monotonic()
    subprocess.run([*command, str(tmp_path / "timed")], cwd=ROOT, check=True, capture_output=True)
    long = time.monotonic() - started
    for i in range(10):
        out = tmp_path / (f"out-{i}" if not there else "out")
        if there:
            out.mkdir(exist_ok=True)
        process = subprocess.Popen(
            [*command, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(long * seeded.uniform(0.3, 1.05))
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        seen = {path.name for path in out.glob("[!.]*")} if out.exists() else set()
        assert there or seen in (set(), sizes)
        for path in out.glob("[!.]*.json"):
            json.loads(path.read_text())
        for path in out.glob("*.html"):
            assert path.read_text().rstrip().endswith("</html>")
    assert killed > 3
    subprocess.run([*command, str(out)], cwd=ROOT, check=True, capture_output=True)
    assert {path.name for path in out.iterdir()} == sizes
