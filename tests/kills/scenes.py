"""Commands to be killed, and what must hold after every kill and at the end.

Each runs in a process of its own that has imported already what commands import, so that kills fall on the work.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from kvp.models.load import byte_tokenizer, save
from kvp.record import RunRecord
from kvp.store import Store
from kvp.store.contents import entries
from kvp.store.locks import is_held
from tests.helpers.stock import stock_model
from tests.process import start, start_kvp
from tests.report.sample_records import make_record

SMALL = ("debug=smoke", "measure=none", "evaluation.zero_shot=null", "tracker=none")
SMALL += ("evaluation.perplexity.corpora=[squad]", "evaluation.perplexity.max_tokens=128")
SMALL += ("calibration.num_samples=2", "recovery.max_steps=3")
CLOCKS = ("seconds", "iqr", "peak_bytes", "found", "started", "command", "path", "tracker", "origins")


def main_of(module: str, words: Sequence[str]) -> None:
    """Run `python -m module words` in this process."""
    from importlib import import_module

    torch.set_num_threads(1)
    sys.argv = [module, *words]
    import_module(f"{module}.__main__").main()


def numbers(data: Any) -> Any:
    """Return JSON data without what a clock, a directory or an interruption decides."""
    if isinstance(data, dict):
        skip = (*CLOCKS, "directory", "overrides", "provenance", "seconds_per_step", "checkpoint")
        return {key: numbers(value) for key, value in data.items() if key not in skip}
    return [numbers(value) for value in data] if isinstance(data, list) else data


class Scene:
    """A command over a directory of its own."""

    name: str

    def __init__(self, home: Path) -> None:
        self.home = home

    def prepare(self) -> None:
        """Make what the command works on."""

    def start(self) -> BaseProcess:
        """Start the command."""
        raise NotImplementedError

    def where(self) -> str:
        """Return where the last kill fell."""
        return self.name

    def check(self) -> None:
        """Raise if a kill left something half where it can be seen, or a lock."""
        raise NotImplementedError

    def result(self) -> Any:
        """Return the numbers or files that must be those of an undisturbed command."""
        raise NotImplementedError


def check_store(root: Path) -> None:
    """Raise if a stage that looks finished is not, or if a lock is held by nobody alive."""
    for entry in entries(root, whole=True):
        assert entry.state in ("finished", "unfinished", "removed"), entry
        assert not is_held(entry.final), entry


class RunScene(Scene):
    """One run: dense, pruned, recovered."""

    name = "run"
    words: tuple[str, ...] = ("strategy=kvpruner_plus",)

    def start(self) -> BaseProcess:
        places = (f"store={self.home}/store", f"runs={self.home}/runs")
        return start_kvp(*self.words, *SMALL, *places, log=self.home / "log")

    def records(self) -> list[RunRecord]:
        return [RunRecord.read(file) for file in sorted((self.home / "runs").glob("*/run.json"))]

    def where(self) -> str:
        running = [
            record.stage or "between stages" for record in self.records() if record.status == "running"
        ]
        return running[-1].partition("/")[0] if running else "before or after the stages"

    def check(self) -> None:
        if (self.home / "store").exists():
            check_store(self.home / "store")
        self.records()  # each can be read

    def result(self) -> Any:
        check_store(self.home / "store")
        records = [record.data() for record in self.records()]
        assert records and all(record["status"] == "finished" for record in records)
        assert not any(entry.state != "finished" for entry in entries(self.home / "store"))
        return numbers(records)


class SweepScene(RunScene):
    """Three runs that share stages."""

    name = "sweep"
    words = ("-m", "strategy=magnitude,random", "ratio.value=0.25,0.5", "recovery=none")


class ExportScene(Scene):
    """A checkpoint for stock engines, with its proof."""

    name = "export"

    def prepare(self) -> None:
        save(stock_model("llama", "gqa", vocab_size=259), byte_tokenizer(), self.home / "pruned")

    def start(self) -> BaseProcess:
        words = [str(self.home / "pruned"), "--out", str(self.home / "out")]
        return start(main_of, "kvp.export", words, log=self.home / "log")

    def where(self) -> str:
        partial = self.home / ".out.partial"
        if not partial.exists():
            return "before or after writing"
        return "proving" if (partial / "config.json").exists() else "writing"

    def check(self) -> None:
        names = {path.name for path in self.home.iterdir()}
        assert names <= {"pruned", "log", "out", ".out.partial"}, names
        if "out" in names:
            self.result()
            shutil.rmtree(self.home / "out")  # the next attempt writes it again

    def result(self) -> Any:
        out = self.home / "out"
        files = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "serving.json"}
        serving = json.loads((out / "serving.json").read_text())
        assert serving["check"]["passed"] and {"config.json", "model.safetensors"} <= files.keys()
        return files, numbers(serving)


class ReportScene(Scene):
    """A report of four runs over the page of three."""

    name = "report"

    def prepare(self) -> None:
        for number in range(4):
            record = make_record("kvpruner", ratio=0.1 * (number + 1), ppl=30.0 + number, steps=3)
            RunRecord.model_validate(record).write(self.home / "runs" / str(number) / "run.json")
        (self.home / "runs" / "3").rename(self.home / "later")
        old = self.start()
        old.join()
        (self.home / "later").rename(self.home / "runs" / "3")
        self.old = self.result()

    def start(self) -> BaseProcess:
        words = [str(self.home / "runs"), "--out", str(self.home / "report")]
        return start(main_of, "kvp.report", words, log=self.home / "log")

    def check(self) -> None:
        """Old or new, each file is whole."""
        now = self.result()
        assert now.keys() >= self.old.keys()
        for name, text in now.items():
            if text != self.old.get(name):
                assert _is_whole(name, text), f"{name} is half"

    def result(self) -> Any:
        files = [path for path in (self.home / "report").rglob("*") if path.is_file()]
        here = str(self.home).encode()
        return {path.name: path.read_bytes().replace(here, b"HOME") for path in files if _is_shown(path)}


def _is_shown(path: Path) -> bool:
    """Return whether no part of a path is hidden."""
    return not any(part.startswith(".") for part in path.parts)


def _is_whole(name: str, text: bytes) -> bool:
    ends = {
        ".html": b"</html>",
        ".svg": b"</svg>",
        ".png": b"IEND",
        ".json": b"]",
        ".md": b"",
        ".csv": b"",
        ".tex": b"",
    }
    if name == "sources.json":
        return bool(json.loads(text))
    return ends[Path(name).suffix] in text[-40:]


class HousekeepingScene(Scene):
    """`gc --yes` over a hundred stages, of which a run needs half."""

    name = "gc"
    stages = 120

    def prepare(self) -> None:
        store = Store(self.home / "store")

        def work(directory: Path) -> dict[str, Any]:
            (directory / "model").mkdir()
            for number in range(8):
                (directory / "model" / str(number)).write_bytes(bytes(20_000))
            return {"loss": 1.0}

        done = [store.once("prune", {"seed": seed}, work) for seed in range(self.stages)]
        needed = [{"name": "prune", "fingerprint": one.fingerprint} for one in done[::2]]
        (self.home / "runs" / "one").mkdir(parents=True)
        record = {"schema": 3, "status": "finished", "stages": needed}
        (self.home / "runs" / "one" / "run.json").write_text(json.dumps(record))

    def start(self) -> BaseProcess:
        words = ["gc", "--yes", "--store", str(self.home / "store"), "--runs", str(self.home / "runs")]
        return start(main_of, "kvp.store", words, log=self.home / "log")

    def where(self) -> str:
        left = len([entry for entry in entries(self.home / "store") if entry.state == "finished"])
        return "removing" if self.stages // 2 < left < self.stages else "before or after removing"

    def check(self) -> None:
        check_store(self.home / "store")
        present = {entry.digest for entry in entries(self.home / "store") if entry.state == "finished"}
        record = json.loads((self.home / "runs" / "one" / "run.json").read_text())
        assert {one["fingerprint"][:16] for one in record["stages"]} <= present

    def result(self) -> Any:
        return sorted(path.relative_to(self.home).as_posix() for path in (self.home / "store").rglob("*"))


SCENES: dict[str, type[Scene]] = {
    scene.name: scene for scene in (RunScene, SweepScene, ExportScene, ReportScene, HousekeepingScene)
}
