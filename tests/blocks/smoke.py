"""The rule that makes a command of the docs small: it runs on a tiny model, and its options stay its own.

| in the docs | in the test |
|---|---|
| a run or sweep | gets `debug=smoke`, and each of LIGHT that its words do not name |
| a run with `debug=smoke` | as it is |
| an experiment of the reader's own | keeps its recovery and evaluation |
| `model=NAME` | goes, so that debug=smoke names the tiny model; `model=local` stays |
| an option of HUB, which reads the hub | the packaged option beside it |
| `recovery.max_steps=N` | 4 |
| a sweep over `experiment=NAME` | its first two rows, each with its first values |
| a shape for `kvp bench` | `tiny`, with BENCH |
| `model.path=owner/name` | `/data/model`, a tiny checkpoint |
| RUN, CKPT | what the last run printed; every page begins with one run |
| /path | the same below the session's directory |
| a model's name in Python | `tiny` |
| a form, such as `kvp status [DIR]` | `--help` of that command |
| a YAML block after a sentence that ends with the name of a file | is that file |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from tests.blocks.pages import ROOT

LIGHT = ("measure=none", "recovery=none", "evaluation.zero_shot=null", "tracker=none")
HUB = {
    "recovery=lora_alpaca": "recovery=lora_text",
    "evaluation=llm_pruner": "evaluation=packaged",
}
BENCH = ("--memory", "0.05", "--batch", "1", "--prompt", "32", "--new", "8", "--runs", "1", "--warmup", "0")
NAMES = sorted(path.stem for path in (ROOT / "conf" / "model").glob("*.yaml") if path.stem != "local")
REPOSITORY = r"[\w-]+/[\w.-]+-\d+(?:\.\d+)?[BbMm][\w.-]*"
DOORS = ("status", "report", "export", "check", "bench", "fit", "doctor", "store", "schema")


def split(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the door of a command and what follows: ("kvp", ["-m", ...]) of `kvp sweep ...`, ("report", [...])."""
    door, rest = (words[2], words[3:]) if words[0] == "python" else (words[0], words[1:])
    door, rest = door.removeprefix("kvp."), list(rest)
    if door == "kvp" and rest and rest[0] in DOORS:
        return rest[0], rest[1:]
    if door == "kvp" and rest and rest[0] in ("run", "sweep"):
        return "kvp", [*(["-m"] if rest[0] == "sweep" else []), *rest[1:]]
    return door, rest


def small(door: str, words: Sequence[str]) -> list[str]:
    """Return the words of a command, made small."""
    if door == "kvp" and not {"--help", "--cfg", "--info", "--version"}.intersection(words):
        return _small_run(words)
    if door == "bench" and "--help" not in words and "compare" not in words[:1]:
        named = ["tiny" if word in NAMES else word for word in words]
        pairs = zip(BENCH[::2], BENCH[1::2], strict=True)
        return [*named, *(word for pair in pairs if pair[0] not in words for word in pair)]
    return list(words)


def _small_run(words: Sequence[str]) -> list[str]:
    if "debug=smoke" in words:
        return list(words)
    hub = {} if any("data.path=" in word for word in words) else HUB
    kept = [hub.get(word, word) for word in words if not re.fullmatch(rf"model=({'|'.join(NAMES)})", word)]
    kept = [re.sub(rf"^model\.path={REPOSITORY}$", "model.path=/data/model", word) for word in kept]
    kept = [re.sub(r"^(recovery\.max_steps)=\d+$", r"\1=4", word) for word in kept]
    named = {re.split(r"[.=]", word)[0] for word in kept if "=" in word}
    light = [option for option in LIGHT if re.split(r"[.=]", option)[0] not in named]
    if "--config-dir" in words and any(word.startswith("experiment=") for word in words):
        light = [option for option in light if option.startswith(("measure", "tracker"))]
    if "-m" in words and (
        experiment := next((word for word in kept if word.startswith("experiment=")), None)
    ):
        own = [words[at + 1] for at, word in enumerate(words) if word == "--config-dir"]
        name = f"experiment/{experiment.partition('=')[2]}.yaml"
        places = [folder / name for folder in (*map(Path, own), ROOT / "conf")]
        light += _first_rows(next(path for path in places if path.exists()))
    return [*kept, "debug=smoke", *light]


def _first_rows(path: Path) -> list[str]:
    rows = (yaml.safe_load(path.read_text()).get("rows") or [])[:2]
    first = [re.sub(r"(=[^, ]+),[^ ]+", r"\1", row) for row in rows]
    return [f"rows={first}"] if first else []


def small_python(text: str) -> str:
    """Return a Python block whose models are tiny."""
    return re.sub(rf"""(["'])(?:{"|".join(NAMES)}|{REPOSITORY})\1""", r"\1tiny\1", text)
