"""`python -m kvp.fit`: does a model fit? From its config alone: bytes, batches, contexts, what a run on it takes."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence

from kvp.commands import called

HELP = """

Does a model fit? From its config alone: bytes, batches, contexts, and what
pruning, tuning and evaluating it take. No weights are read or downloaded.

  kvp fit model=llama3_8b memory=24GiB context=8192 batch=16

  model=NAME         an option of conf/model, or owner/name of the hub
  memory=24GiB       what there is (default: what is free on the device)
  context=8192       tokens per sequence (default: 4096, or the positions)
  batch=16           sequences at a time (default: 1)
  ratio=0.25,0.5     fractions to remove (default); of what: ratio=params
  dtype=bfloat16     of weights and computation (default: the run's)
  device=cuda        auto, cpu or cuda, which need not be here
  tflops=100         rate of the device in 10^12 operations per second
                     (default: measured here)
  strategy=NAME ...  every option of a run, such as recovery.rank=16

  --json             the answer as JSON
  --check            measure the peaks of a small model here, beside their
                     estimates (minutes)
"""
FLAGS = ("--json", "--check", "--help", "-h")


def main(words: Sequence[str] | None = None) -> None:
    """Run the command; exit code 1 and one clear error for whatever a user can mend."""
    given = list(sys.argv[1:] if words is None else words)
    if not given or "-h" in given or "--help" in given:
        print(f"usage: {called('fit')} model=NAME [option=value ...] [--json | --check]{HELP}", end="")
        return
    from kvp.bars import only_on_terminals
    from kvp.hints import words as worded

    only_on_terminals()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of libraries that are asked for a config only
    try:
        run(given)
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if os.environ.get("KVP_TRACEBACK"):
            raise
        print(f"kvp.fit: error: {worded(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        logging.disable(before)


def run(given: Sequence[str]) -> None:
    """Answer the question of the words, or measure what the estimates say.

    Raises:
        ValueError: A word is no option, or a value out of its bounds.
    """
    flags = [word for word in given if word.startswith("-")]
    if unknown := [flag for flag in flags if flag not in FLAGS]:
        raise ValueError(f"there is no {unknown[0]}: the flags are {', '.join(FLAGS[:3])}")
    words = [word for word in given if word not in flags]
    if "--check" in flags:
        _check(words, flags)
        return
    from kvp.fit.answer import answer
    from kvp.fit.words import question

    found = answer(question(words))
    if "--json" in flags:
        print(json.dumps(found.data(), indent=1))
    else:
        from kvp.fit.show import show

        show(found)


def _check(words: Sequence[str], flags: Sequence[str]) -> None:
    """Measure what the estimates say; an error or Ctrl-C ends it after the table of what was measured."""
    from kvp.fit.check import Row, check, table
    from kvp.fit.words import check_fixed

    if "--json" in flags:
        raise ValueError("--check prints a table, and --json is for an answer: leave one of them out")
    check_fixed(words)
    rows: list[Row] = []
    try:
        rows.extend(check(words))
    finally:
        if rows:
            print(table(rows), flush=True)


if __name__ == "__main__":
    main()
