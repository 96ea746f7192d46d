"""README.md, docs/ and examples/: every command and every Python block runs, or a list says why it does not."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

from kvp.pipeline.experiment import Experiment
from kvp.pipeline.gate import check_inputs
from tests.blocks.pages import PAGES, ROOT, Block, Command, blocks, commands
from tests.blocks.session import Session
from tests.blocks.smoke import DOORS, small, small_python, split
from tests.helpers.runs import compose_here

NOT_RUN: dict[str, str] = yaml.safe_load((Path(__file__).parent / "not_run.yaml").read_text())
LANGUAGES = ("", "bash", "python", "yaml", "json", "mermaid", "latex", "bibtex", "text", "toml")


@cache
def everything() -> dict[str, list[Block | Command]]:
    """Return the commands, Python blocks and files of each page in order."""
    return {
        str(page.relative_to(ROOT)): sorted(
            [*(block for block in blocks(page) if block.language == "python" or block.file), *commands(page)],
            key=lambda part: part.line,
        )
        for page in PAGES
    }


def of(kind: type) -> list:
    return [part for parts in everything().values() for part in parts if isinstance(part, kind)]


def reason(command: Command) -> str | None:
    """Return why a command is not run; None if it is."""
    return next((why for start, why in NOT_RUN.items() if f"{command.text} ".startswith(f"{start} ")), None)


def test_every_line_is_run_or_on_the_list():
    for command in of(Command):
        door, _ = split(command.words)
        assert reason(command) or door in ("kvp", *DOORS), (
            f"{command.place}: {command.text!r} is neither a command that the test runs nor in not_run.yaml"
        )


def test_the_list_is_true():
    assert all(NOT_RUN.values())
    for start in NOT_RUN:
        assert any(f"{c.text} ".startswith(f"{start} ") for c in of(Command)), f"no page says {start!r}"


def test_most_is_run():
    count = Counter("not run" if reason(command) else "run" for command in of(Command))
    print(
        f"{count['run']} commands and {len(of(Block))} Python blocks run, {count['not run']} commands do not"
    )
    assert count["run"] >= 60
    skipped = [c for c in of(Command) if reason(c) and not re.match(r"make|pip|python -m pip", c.text)]
    elsewhere = [c for c in skipped if "not in the test environment" in str(reason(c))]
    assert len(skipped) - len(elsewhere) <= 18, "commands that could run here"
    assert len(elsewhere) <= 16, "commands of other engines and clusters"


def test_blocks_parse():
    for page in PAGES:
        for block in blocks(page):
            assert block.language in LANGUAGES, f"{block.place}: ```{block.language}"
            if block.language == "python":
                ast.parse(small_python(block.text), block.place)
            elif block.language in ("yaml", "json"):
                yaml.safe_load(block.text)


def test_make_has_the_targets():
    for command in of(Command):
        if command.words[0] == "make":
            done = subprocess.run(
                ["make", "-n", *command.words[1:]], cwd=ROOT, capture_output=True, text=True
            )
            assert done.returncode == 0, f"{command.place}: {done.stderr}"


def test_pip_lines_name_what_there_is():
    extras = re.findall(
        r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().partition("optional-dep")[2], re.M
    )
    pinned = re.findall(r"^[\w-]+==[\d.]+", (ROOT / "assets.txt").read_text(), re.MULTILINE)
    optional = {file.name for file in ROOT.glob("assets*.txt")}
    for command in of(Command):
        if re.match(r"(python -m )?pip ", command.text):
            for named in re.findall(r"kvp\[([\w,]+)\]", command.text):
                assert set(named.split(",")) <= set(extras), f"{command.place}: {command.text}"
            for wheel in re.findall(r"[\w-]+==[\w.]+", command.text):
                assert wheel in pinned, f"{command.place}: {wheel} is not in assets.txt"
            for file in re.findall(r"-r (\S+)", command.text):
                assert file in optional, f"{command.place}: there is no {file}"


def test_runs_that_do_not_run_pass_the_gate(tmp_path):
    gated = [c for c in of(Command) if (reason(c) or "").startswith(("Slurm", "Ray", "an account"))]
    gated = [command for command in gated if split(command.words)[0] == "kvp"]
    assert len(gated) >= 3
    for command in gated:
        words = small("kvp", split(command.words)[1])
        options = [
            word for word in words if "=" in word and not word.startswith(("hydra.", "rows=", "device="))
        ]
        config = compose_here(tmp_path, *(option.split(",")[0] for option in options), "rows=null")
        check_inputs(Experiment.compose(config), here=False)


def test_the_rule_makes_commands_small():
    assert split(["python", "-m", "kvp.report", "--where", "a=b"]) == ("report", ["--where", "a=b"])
    assert split(["kvp", "sweep", "seed=0,1"]) == ("kvp", ["-m", "seed=0,1"])
    assert small("kvp", ["model=llama2_7b", "recovery=lora_alpaca", "seed=1"]) == [
        *["recovery=lora_text", "seed=1", "debug=smoke"],
        *["measure=none", "evaluation.zero_shot=null", "tracker=none"],
    ]
    assert small("kvp", ["-m", "experiment=rivals_kv"])[-1] == (
        "rows=['strategy=none', 'strategy=kvpruner ratio.value=0.2']"
    )
    assert small("bench", ["llama_7b_shape", "--batch", "2"])[:5] == [
        "tiny",
        "--batch",
        "2",
        "--memory",
        "0.05",
    ]
    assert (
        small_python("""kvp.load("llama3_8b"), kvp.load('Qwen/Qwen3-8B')""")
        == """kvp.load("tiny"), kvp.load('tiny')"""
    )


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    home = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        reader = Session(home)
        yield reader
        reader.close()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, parts in everything().items() if parts])
def test_a_page_runs_from_top_to_bottom(page, session):
    session.open()
    for part in everything()[page]:
        if isinstance(part, Block):
            session.write(part) if part.file else session.execute(part)
        elif not reason(part):
            session.run(part)
