"""Commands of `kvp`, with one line each: `kvp report` does what `python -m kvp.report` does.

A module is imported when its command is called, so `kvp --help` imports none of them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from runpy import run_module

FLAGS = {"run": [], "sweep": ["-m"]}  # commands that Hydra reads, with the flag that each stands for
COMMANDS = {
    "run": "one run: prune, recover, evaluate, measure; finished stages are found",
    "sweep": "many runs: values with commas, or the rows of an experiment",
    "status": "runs that finished, run, wait, died or failed, and how to retry",
    "report": "tables, plots and a page from the records of runs",
    "export": "a checkpoint that stock engines open, or a GGUF",
    "check": "whether an engine gives the answers of an exported checkpoint",
    "bench": "speed and memory of models, beside their limits",
    "fit": "what fits into memory, from a model's config alone",
    "doctor": "what works here, what is missing, and how to get it",
    "store": "finished stages on disk: list them, remove what no run needs",
}
HELP = """kvp: prune a language model, recover it, and measure what it costs and saves.

  kvp COMMAND --help     what a command takes
  kvp OPTION=VALUE ...   short for kvp run OPTION=VALUE ...
  kvp --version          the version

{commands}

  kvp run strategy=kvpruner ratio.value=0.25
  kvp sweep ratio.value=0.25,0.5 recovery=none,lora_text
"""


def dispatch() -> bool:
    """Do what the command line's first word names; of a run or sweep, leave the words that Hydra reads.

    Returns:
        Whether nothing is left for Hydra.
    """
    script, words = Path(sys.argv[0]).name in ("kvp", "kvp.exe"), sys.argv[1:]
    if script and words in ([], ["-h"], ["--help"]):  # `python -m kvp` is a run with all defaults
        lines = (f"  {name:<8} {line}" for name, line in COMMANDS.items())
        print(HELP.format(commands="\n".join(lines)), end="")
        return True
    if words[1:] and words[0] in ("-sc", "--shell-completion") and words[1].startswith("query="):
        return _completes()
    name, *rest = words or [""]
    if name in FLAGS:
        sys.argv[1:] = [*FLAGS[name], *rest]
    elif name in COMMANDS:
        sys.argv = [f"{'kvp' if script else 'python -m kvp'} {name}", *rest]
        run_module(f"kvp.{name}", run_name="__main__")  # an import would hide kvp.export, the function
        return True
    return False


def called(name: str) -> str:
    """Return how the user called a command, for its usage: `kvp report` or `python -m kvp.report`."""
    return sys.argv[0] if sys.argv[0].endswith(f"kvp {name}") else f"python -m kvp.{name}"


def _completes() -> bool:
    """Offer commands for the first word that the shell completes; take the command out of the line for Hydra.

    Returns:
        Whether nothing is left for Hydra: the shell completes files after commands that Hydra does not read.
    """
    line = os.environ.get("COMP_LINE", "")
    program, *words = line.split() or [""]
    end = " " if line.endswith(" ") else ""
    if not words or (len(words) == 1 and not end):
        print(*(name for name in COMMANDS if name.startswith("".join(words))), end=" ")
    elif words[0] in FLAGS:
        os.environ["COMP_LINE"] = " ".join([program, *FLAGS[words[0]], *words[1:]]) + end
    return bool(words and (end or words[1:]) and words[0] in COMMANDS and words[0] not in FLAGS)
