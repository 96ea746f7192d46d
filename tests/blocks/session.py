"""A reader who pastes every command and block of the docs into one directory with one store."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import runpy
import shutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from joblib.externals.loky import get_reusable_executor

from kvp.__main__ import main
from tests.blocks.pages import Block, Command
from tests.blocks.smoke import small, small_python, split
from tests.helpers.checkpoints import write

TEXT = "\n".join(f"{n} foxes jump over {n + 1} dogs while wizards mix jade and amber." for n in range(80))
ROW = {"instruction": "Say it.", "input": "", "output": "It is said. " * 20}
SPEC = """
title: Mine
rows: {Removed: ratio, Strategy: strategy}
columns:
  - {title: "PPL {}", metric: pruned.evaluation.perplexity.*.value, better: lower}
"""


class Session:
    """Commands in this process, in one working directory; RUN and CKPT are what the last run printed."""

    def __init__(self, home: Path) -> None:
        self.home = home  # the working directory
        self.done: dict[tuple[str, ...], str] = {}
        self.values: dict[str, str] = {}
        self.modules: list[str] = []
        (home / "my.txt").write_text(TEXT)
        (home / "mine.yaml").write_text(SPEC)
        (home / "my_instructions.jsonl").write_text(json.dumps(ROW) + "\n")
        for place in ("data/model", "data/Llama-2-7b-hf"):
            write(home / place, "llama-plain")
        (home / "data" / "news.jsonl").write_text(
            "".join(json.dumps({"text": TEXT + n}) + "\n" for n in "ab")
        )
        (home / "data" / "mails.csv").write_text(f"body\n{TEXT}\n")
        (home / "outputs").mkdir()
        self.given = {*home.iterdir()}

    def open(self) -> None:
        """Begin a page: one run stands in outputs/runs, what other pages wrote is out of the way."""
        self.done.clear()
        for path in {*self.home.iterdir()} - self.given:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if (runs := self.home / "outputs" / "runs").exists():
            runs.rename(self.home / "outputs" / f"runs-{len(list(runs.parent.iterdir()))}")
        self.run(Command("", 0, "python -m kvp", ("python", "-m", "kvp"), fenced=True))

    def run(self, command: Command) -> str:
        """Run a command and return its output; one that ran before is not run again.

        Raises:
            AssertionError: It does not end with exit code 0.
        """
        door, words = split(command.words)
        words = ["--help"] if command.is_form else [self._filled(word) for word in small(door, words)]
        key = (door, *words)
        if key not in self.done:
            code, output = self._call(door, words)
            assert code == 0, f"{command.place}: {command.text}\nas {door} {' '.join(words)}\n{output}"
            self.done[key] = output
        self._remember(self.done[key])
        return self.done[key]

    def write(self, block: Block) -> None:
        """Write a YAML block into the file that the page names."""
        path = self.home / block.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(re.sub(r"(?<=path: )/", f"{self.home}/", block.text))

    def execute(self, block: Block) -> None:
        """Execute a Python block in the namespace of its page."""
        name = f"page_{re.sub(r'[^a-z]', '_', block.page)}"
        module = sys.modules.get(name)
        if module is None:
            module = sys.modules[name] = types.ModuleType(name)
            self.modules.append(name)
        code = compile("\n" * block.line + small_python(block.text), block.page, "exec")
        exec(code, module.__dict__)

    def close(self) -> None:
        """Forget the namespaces of the pages."""
        for name in self.modules:
            del sys.modules[name]

    def _call(self, door: str, words: Sequence[str]) -> tuple[object, str]:
        stream, before = io.StringIO(), sys.argv
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        gc.collect()  # a run that has ended would keep its store from `kvp store rm`
        sys.argv = ["kvp" if door == "kvp" else f"kvp.{door}", *words]
        try:
            with (
                patch.dict(os.environ),  # what --dry-run sets belongs to one command
                contextlib.redirect_stdout(stream),
                contextlib.redirect_stderr(stream),
            ):
                main() if door == "kvp" else runpy.run_module(f"kvp.{door}", run_name="__main__")
            code: object = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.argv = before
            if "launcher=joblib" in words:
                get_reusable_executor().shutdown(
                    wait=True
                )  # its workers would wait for more, and keep the store
        return code, f"{stream.getvalue()}{code if isinstance(code, str) else ''}"

    def _filled(self, word: str) -> str:
        word = re.sub(r"\b(RUN|CKPT)\b", lambda found: self.values[found[0]], word)
        return re.sub(r"(^|=)/(?=\w)(?!tmp/)", rf"\1{self.home}{os.sep}", word)

    def _remember(self, output: str) -> None:
        if found := re.search(r"^record: .*/(.+)/run\.json$", output, re.MULTILINE):
            self.values["RUN"] = found[1]
        if found := re.search(r"^checkpoint: (.+)$", output, re.MULTILINE):
            self.values["CKPT"] = found[1]
