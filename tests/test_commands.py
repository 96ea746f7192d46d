"""One console script: its commands, their help, the order of words, and what a shell completes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from kvp.commands import COMMANDS
from tests.helpers.runs import ROOT
from tests.test_command import kvp_here, project  # noqa: F401  (a fixture)

OWN = [name for name in COMMANDS if name not in ("run", "sweep") and find_spec(f"kvp.{name}")]


def fits_a_screen(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) <= 40 and all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_kvp_alone_shows_every_command_on_a_screen(words, monkeypatch, capsys):
    code, stdout, _ = kvp_here(monkeypatch, capsys, *words)
    assert code == 0 and fits_a_screen(stdout)
    listed = [name for name in re.findall(r"^  (\w+) ", stdout, flags=re.MULTILINE) if name != "kvp"]
    assert listed == [*COMMANDS]


def test_help_imports_no_torch():
    script = (
        "import sys; sys.argv = ['kvp']; from kvp.__main__ import main; main(); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.endswith("False\n")


@pytest.mark.parametrize("name", OWN)
def test_help_of_a_command_fits_a_screen_and_says_how_it_was_called(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    code, stdout, _ = kvp_here(monkeypatch, capsys, name, "--help")
    assert code == 0 and fits_a_screen(stdout), stdout
    assert stdout.startswith(f"usage: kvp {name} ")


def test_a_module_says_how_it_was_called(monkeypatch, capsys):
    from kvp.store.__main__ import main

    monkeypatch.setattr(sys, "argv", ["/somewhere/kvp/store/__main__.py", "--help"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().out.startswith("usage: python -m kvp.store ")


def test_errors_of_a_command_are_a_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, _, stderr = kvp_here(monkeypatch, capsys, "status")
    assert code != 0 and "there is no run below outputs/runs" in (stderr or str(code))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["reprot"], "'reprot' is no option: .* Did you mean report"),
        (["run", "zzz"], "'zzz' is no option: options have the form option=value"),
        (["strategy=random", "report"], "report comes first: kvp report"),
        (["--help", "stratgy"], "there is no group 'stratgy'"),
    ],
)
def test_a_word_that_is_no_command_is_named(words, message, monkeypatch, capsys):
    code, _, stderr = kvp_here(monkeypatch, capsys, *words)
    assert code == 1
    assert re.search(message, stderr), stderr


def test_flags_may_stand_anywhere(project, monkeypatch, capsys):  # noqa: F811
    words = ["run", "model=tiny", "--config-dir", "conf", "strategy=mine", "--cfg", "job", "seed=3"]
    code, stdout, stderr = kvp_here(monkeypatch, capsys, *words)
    assert code == 0, stderr
    assert "gt_mine.own.Own" in stdout and "seed: 3" in stdout


def test_the_options_of_a_group_are_described(project, monkeypatch, capsys):  # noqa: F811
    code, stdout, _ = kvp_here(monkeypatch, capsys, "run", "--config-dir", "conf", "--help", "strategy")
    assert code == 0
    assert "shortgpt" in stdout and "the blocks that turn the" in stdout and "\nmine" in stdout


@pytest.mark.parametrize(
    ("line", "offers", "others"),
    [
        ("kvp ", {"run", "status", "strategy.", "ratio."}, {"conf"}),
        ("kvp st", {"status", "store", "strategy."}, {"run"}),
        ("kvp run strategy=sl", {"strategy=sleb", "strategy=slicegpt"}, {"status"}),
        ("kvp sweep ratio=", {"ratio=params"}, set()),
        ("kvp run ratio.", {"ratio.value="}, set()),
        ("kvp report st", set(), {"status", "strategy."}),
    ],
)
def test_words_are_completed(line, offers, others, monkeypatch, capsys):
    monkeypatch.setenv("COMP_LINE", line)
    code, stdout, stderr = kvp_here(monkeypatch, capsys, "-sc", "query=bash")
    assert code == 0, stderr
    offered = {*stdout.split()}
    assert offers <= offered
    assert not others & offered


@pytest.mark.slow
def test_a_real_bash_completes(tmp_path):
    script = tmp_path / "kvp"
    script.write_text(f"#!{sys.executable}\nfrom kvp.__main__ import main\nmain()\n")
    script.chmod(0o755)
    asks = """
        eval "$(kvp -sc install=bash)"
        ask() {
            COMP_LINE="$1"; COMP_POINT=${#COMP_LINE}
            COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); COMPREPLY=()
            hydra_bash_completion
            echo "${COMPREPLY[@]}"
        }
        ask "kvp st"; ask "kvp run strategy=sle"; ask "kvp sweep recovery=lora_t"
    """
    done = subprocess.run(
        ["bash", "-c", asks],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=True,
    )
    first, second, third = done.stdout.splitlines()
    assert {"status", "store", "strategy."} <= {*first.split()}
    assert (second.strip(), third.strip()) == ("strategy=sleb", "recovery=lora_text")
