"""Compare runs in llama.cpp: perplexity and text next to those of transformers, speed, and bytes of the cache.

    python -m kvp.bench.llama_cpp outputs/runs/NAME/run.json outputs/runs/OTHER/run.json --out experiments/serving

The command exports the dense model of the first run and the pruned one of each to a GGUF in OUT/gguf. It compares
with the perplexity in the record, and with greedy text, both of transformers in float32. llama.cpp has its defaults:
the dtype of the GGUF, and a cache of 16 bits. Times are of one sequence, models in turns; on a busy machine take
`--threads 1 --clock cpu`. Every window, text and round is kept in OUT/steps, so a repeated command goes on after the
last one. The results are OUT/results.json and OUT/table.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvp.bench.llama_cpp.compare import (
    CLOCKS,
    ENGINE,
    Model,
    compare_perplexity,
    compare_speed,
    compare_texts,
)
from kvp.bench.llama_cpp.table import table
from kvp.cost import device_name
from kvp.models.contents import contents
from kvp.provenance import provenance
from kvp.record import RunRecord
from kvp.serving.gguf_file import FILE
from kvp.serving.write import export
from kvp.store import Store, fingerprint


def find_models(runs: list[Path], store: Path) -> list[Model]:
    """Return the dense model of the first run, and the pruned one of each; GGUFs lie by the content of checkpoints.

    Raises:
        ValueError: A run is unfinished, or has no perplexity of windows that llama.cpp can read one by one.
        FileNotFoundError: A checkpoint is not there any more.
    """
    records = [_finished(path) for path in runs]
    places = _places(records)
    found: dict[str, Model] = {}
    for path, record in zip(runs, records, strict=True):
        models, pruned = record.models(), _cut(record)
        if len(places[pruned]) > 1:
            pruned = f"{pruned} ({record.name})"
        for name, part in (("dense", models["dense"]), (pruned, models["pruned"])):
            checkpoint = Path(part.checkpoint)
            if name not in found:
                gguf = store / _folder(name, checkpoint, path)
                found[name] = Model(name, checkpoint, part.evaluation.perplexity, gguf)
            elif name != "dense" and found[name].checkpoint != checkpoint:
                raise ValueError(f"{path} is the second run called {record.name}: leave one of them out")
    return list(found.values())


def _finished(path: Path) -> RunRecord:
    """Return the record of a run that has pruned, and read windows that llama.cpp can read."""
    record = RunRecord.read(path)
    if record.status != "finished":
        raise ValueError(f"{path} is {record.status}: finish the run first")
    if record.ratio.asked is None:
        raise ValueError(f"{path} is of a dense model: name runs that prune, they hold the dense one too")
    models = record.models()
    for known in (models[name].evaluation.perplexity for name in ("dense", "pruned")):
        if not known or any(one.protocol.stride != one.protocol.window for one in known.values()):
            raise ValueError(
                f"{path} has no perplexity of windows that do not overlap: use evaluation=packaged"
            )
    return record


def _cut(record: RunRecord) -> str:
    """Return the name of a pruned model that needs no other: the fraction removed."""
    asked = record.ratio.asked
    assert asked is not None
    return f"pruned {asked.value:.0%} of {asked.of}"


def _places(records: list[RunRecord]) -> dict[str, set[str]]:
    """Return the checkpoints of pruned models by name; several have one name if only their method differs."""
    places: dict[str, set[str]] = {}
    for record in records:
        places.setdefault(_cut(record), set()).add(record.models()["pruned"].checkpoint)
    return places


def _folder(name: str, checkpoint: Path, run: Path) -> str:
    """Return the folder of a GGUF: the model's name, and a fingerprint of the files of its checkpoint."""
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(
            f"{run} names the checkpoint {checkpoint}, which is not there: repeat its run"
        )
    files = sorted(file for file in checkpoint.iterdir() if file.is_file())
    words = re.sub(r"[^\w.-]+", "_", name.replace("%", "")).strip("_")
    return f"{words}-{fingerprint('gguf', 1, contents(files))[:16]}"


def run(options: argparse.Namespace) -> None:
    """Export and measure what is missing, write the results and print the table."""
    models = find_models(options.runs, options.out / "gguf")
    store = Store(options.out / "steps")
    record: dict[str, Any] = {"models": {}, "speed": {}}
    for model in models:
        if not model.gguf.exists():
            model.gguf.parent.mkdir(parents=True, exist_ok=True)
            export(model.checkpoint, model.gguf, "gguf")
        serving = json.loads((model.gguf / "serving.json").read_text())
        record["models"][model.name] = {
            "gguf_bytes": (model.gguf / FILE).stat().st_size,
            **{key: serving[key] for key in ("dtype", "head_dim", "kv_bytes_per_token", "params", "check")},
        }
    for prompt in options.prompt:
        record["speed"][f"{prompt}+{options.steps}"] = compare_speed(models, prompt, options, store)
    for model in models:
        record["models"][model.name]["texts"] = compare_texts(model, options.threads, store)
    for model in models:
        record["models"][model.name]["perplexity"] = compare_perplexity(model, options.threads, store)
    record["provenance"] = {
        **provenance("cpu"),
        "device": device_name("cpu"),
        "engine": f"{ENGINE} {version(ENGINE)}",
        "command": " ".join(["python -m kvp.bench.llama_cpp", *sys.argv[1:]]),
    }
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    text = table(record)
    (options.out / "table.md").write_text(text)
    print(text)


def main() -> None:
    """Run the command; exit code 1 and one clear error for whatever a user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m kvp.bench.llama_cpp",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.JSON")
    parser.add_argument("--out", type=Path, default=Path("outputs/llama_cpp"), metavar="DIR")
    parser.add_argument("--prompt", type=int, nargs="+", default=[512], metavar="N", help="tokens read")
    parser.add_argument("--steps", type=int, default=32, metavar="N", help="tokens after them")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="default: llama-cpp-python's, half the cores"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        run(options)
    except (ValueError, OSError, ArithmeticError, ImportError, RuntimeError) as error:
        print(f"kvp.bench.llama_cpp: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
