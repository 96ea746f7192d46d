"""No number outlives the code that made it: an edit computes again and says so, a found stage keeps its maker."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from kvp import code
from kvp.pipeline.experiment import Experiment
from kvp.pipeline.run import run
from kvp.record import RunRecord
from tests.helpers import code as code_helper
from tests.helpers.runs import LIGHT, ROOT, compose_here

QUICK = (
    *LIGHT,
    "recovery=none",
    "evaluation.perplexity.corpora=[squad]",
    "evaluation.perplexity.max_tokens=256",
)
STRATEGY = """
from torch import arange
from kvp.options import options
from kvp.strategies.methods.magnitude import Magnitude
from own.sign import SIGN

@options
class Own(Magnitude):
    def score(self, target):
        scores = super().score(target)
        return {space: SIGN * score for space, score in scores.items()}
"""
CORPUS = """
from kvp.data.corpora import PackagedCorpus
from kvp.options import options

@options
class Shouted(PackagedCorpus):
    def documents(self, part):
        return [text.upper() for text in super().documents(part)]
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A user's package with a strategy and a corpus, as a new process would find it after every `edit`."""
    package = tmp_path / "own"
    package.mkdir()
    for name, text in {"__init__": "", "sign": "SIGN = 1\n", "mine": STRATEGY, "texts": CORPUS}.items():
        (package / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    code_helper.forget()

    def edit(file: str, old: str, new: str) -> None:
        text = (package / file).read_text()
        assert old in text
        (package / file).write_text(text.replace(old, new))
        forget()

    def forget() -> None:
        code_helper.forget("own")
        shutil.rmtree(package / "__pycache__", ignore_errors=True)

    yield edit
    forget()


def once(tmp_path, **targets):
    """Run with nodes of the configuration replaced by the user's classes."""
    config = compose_here(tmp_path, "strategy=magnitude", "trusted=[own]", *QUICK)
    OmegaConf.set_struct(config, False)
    for node, target in targets.items():
        OmegaConf.update(config, f"{node.replace('__', '.')}._target_", target)
    return run(Experiment.compose(config))


def computed(record: RunRecord) -> set[str]:
    return {stage.name for stage in record.stages if not stage.found}


def perplexity(record: RunRecord, model: str = "pruned") -> float:
    return record.models()[model].evaluation.perplexity["squad"].value


def test_an_edited_strategy_is_computed_again_and_the_run_says_why(tmp_path, own, caplog):
    caplog.set_level(logging.INFO)
    first = once(tmp_path, strategy="own.mine.Own")
    assert not computed(once(tmp_path, strategy="own.mine.Own"))
    assert "changed" not in caplog.text
    own("sign.py", "1", "-1")  # a module beside the strategy, which it imports
    second = once(tmp_path, strategy="own.mine.Own")
    assert computed(second) >= {"score", "plan", "prune"}
    assert [s.found for s in second.stages if s.model == "dense"] == [True, True], (
        "the dense model has no part in it"
    )
    assert perplexity(second) != perplexity(first) and second.hash == first.hash
    assert "score was computed because this code has changed: own.sign" in caplog.text
    own("sign.py", "-1", "1")
    assert perplexity(once(tmp_path, strategy="own.mine.Own")) == perplexity(first), (
        "the old code's number is its own"
    )


def test_an_edited_corpus_is_computed_again(tmp_path, own, caplog):
    caplog.set_level(logging.INFO)
    first = once(tmp_path, corpora__squad="own.texts.Shouted")
    own("texts.py", "upper", "lower")
    second = once(tmp_path, corpora__squad="own.texts.Shouted")
    assert computed(second) == {"evaluate/perplexity/squad"} and perplexity(second) != perplexity(first)
    assert "this code has changed: own.texts" in caplog.text
    assert {name for stage in second.stages for name in stage.edits} >= {"own", "own.texts"}


def test_an_edit_inside_kvp_is_part_of_what_it_makes_and_cannot_be_washed_off(tmp_path, monkeypatch, caplog):
    """The record and the footnotes name the code behind a number, not the code of the last command."""
    words = {"strategy": "kvp.strategies.methods.magnitude.Magnitude"}
    file = "kvp/strategies/methods/magnitude.py"
    monkeypatch.setattr(code, "_changed_since_commit", lambda: frozenset({file}))
    dirty = once(tmp_path, **words)
    assert all(origin.dirty for origin in dirty.provenance.origins)
    assert "kvp.strategies.methods.magnitude" in next(s.edits for s in dirty.stages if s.name == "score")
    monkeypatch.setattr(code, "_changed_since_commit", lambda: frozenset())
    caplog.set_level(logging.INFO)
    clean = once(tmp_path, **words)
    assert computed(clean) >= {"score", "plan", "prune"}, (
        "what edited code made is not found by committed code"
    )
    assert "score was computed because this code has changed: kvp.strategies.methods.magnitude" in caplog.text
    assert not any(origin.dirty for origin in clean.origins(s for s in clean.stages if s.name == "score"))
    dense = [stage for stage in clean.stages if stage.model == "dense"]
    assert all(stage.found and not stage.edits for stage in dense)
    assert all(origin.dirty for origin in clean.origins(dense)), (
        "the checkout was dirty, though not this code"
    )


def test_found_stages_of_other_code_are_named_in_one_line(tmp_path, monkeypatch, caplog):
    words = {"strategy": "kvp.strategies.methods.magnitude.Magnitude"}
    once(tmp_path, **words)
    monkeypatch.setattr("kvp.pipeline.session.digest", lambda modules: "0" * 64)
    found = once(tmp_path, **words)
    lines = [line for line in caplog.text.splitlines() if "made by other code" in line]
    assert not computed(found) and len(lines) == 1
    assert "score, plan, prune" in lines[0] and "force=[" in lines[0]
    assert all(stage.code != "0" * 64 for stage in found.stages), "the record names the code that made them"


def command(tree: Path, where: Path, *words: str) -> tuple[RunRecord, str]:
    """Run `python -m kvp` of a checkout in a directory; the record, and what it printed."""
    environment = {**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{where}"}
    line = [sys.executable, "-m", "kvp", "debug=smoke", "strategy=magnitude", *QUICK, *words]
    done = subprocess.run(line, cwd=where, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = where.glob("outputs/runs/*/run.json")
    return RunRecord.read(path), done.stdout + done.stderr


@pytest.mark.slow
def test_the_edit_and_rerun_loop_and_the_washed_off_edit_by_real_commands(tmp_path):
    if not (ROOT / ".git").exists():
        pytest.skip("needs a checkout")
    tree, where = tmp_path / "clone", tmp_path / "work"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(tree)], check=True)
    where.mkdir()
    file = tree / "kvp" / "strategies" / "methods" / "magnitude.py"
    text = file.read_text()
    clean, _ = command(tree, where)
    file.write_text(
        text + "\n_score = Magnitude.score\nMagnitude.score = lambda self, target: "
        "{k: -v for k, v in _score(self, target).items()}\n"
    )
    edited, said = command(tree, where)
    assert perplexity(edited) != perplexity(clean) and "this code has changed" in said
    assert edited.provenance.origins[-1].dirty and not clean.provenance.origins[-1].dirty
    subprocess.run(["git", "checkout", "-q", "--", "."], cwd=tree, check=True)
    again, said = command(tree, where)
    assert perplexity(again) == perplexity(clean) and not computed(again)
    assert not any(origin.dirty for origin in again.provenance.origins)
