"""Runs in llama.cpp: the same perplexity and text as in transformers, how fast, and with how large a cache.

    python -m kvp.bench.llama_cpp outputs/runs/NAME/run.json outputs/runs/OTHER/run.json --out experiments/serving

Exports the dense model of the first run and the pruned one of each to a GGUF in OUT/gguf, and compares with the
perplexity that the record holds, and with greedy text, both of transformers in float32. llama.cpp runs as it comes: in
the dtype of the GGUF, with a cache of 16 bits. Times are of one sequence, models in turns; on a busy machine take
`--threads 1 --clock cpu`. Writes results.json and table.md after each step, and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from kvp.bench.llama_cpp.engine import cache_bytes_per_token, greedy, open_gguf, time_once, window_nll
from kvp.bench.llama_cpp.table import table
from kvp.cost import device_name
from kvp.data.corpora import PackagedCorpus
from kvp.data.tokens import digest, encode
from kvp.export.gguf_file import FILE
from kvp.export.write import export
from kvp.models.load import load_model, load_tokenizer
from kvp.provenance import provenance

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PROMPTS = (
    "The capital of France is",
    "To make a cup of tea, first",
    "Once upon a time there was a dragon who",
)
NEW_TOKENS, COUNTED = 32, 64


@dataclass(frozen=True)
class Model:
    """A checkpoint of a run, its perplexity in transformers, and its GGUF."""

    name: str
    checkpoint: Path
    perplexity: dict[str, Any]
    gguf: Path


def find_models(runs: list[Path], store: Path) -> list[Model]:
    """The dense model of the first run, and the pruned one of each.

    Raises:
        ValueError: A run is unfinished, or has no perplexity of windows that llama.cpp can read one by one.
    """
    found: dict[str, Model] = {}
    for path in runs:
        record = json.loads(path.read_text())
        if record["status"] != "finished":
            raise ValueError(f"{path} is {record['status']}: finish the run first")
        asked = record["ratio"]["asked"]
        if asked is None:
            raise ValueError(f"{path} is of a dense model: name runs that prune, they hold the dense one too")
        pruned = f"pruned {asked['value']:.0%} of {asked['of']}"
        for name, part in (("dense", record["dense"]), (pruned, record["pruned"])):
            known = (part["evaluation"] or {}).get("perplexity") or {}
            plain = all(one["protocol"]["stride"] == one["protocol"]["window"] for one in known.values())
            if not known or not plain:
                raise ValueError(
                    f"{path} has no perplexity of windows that do not overlap: use evaluation=packaged"
                )
            directory = store / name.replace(" ", "_").replace("%", "")
            found.setdefault(name, Model(name, Path(part["checkpoint"]), known, directory))
    return list(found.values())


def compare_perplexity(model: Model, threads: int | None, results: dict[str, Any], save: Any) -> None:
    """Per corpus of the record: transformers' value, and the loss of every window in llama.cpp."""
    for corpus, known in model.perplexity.items():
        protocol = known["protocol"]
        window = protocol["window"]
        one = results.setdefault("perplexity", {}).setdefault(
            corpus,
            {"transformers": known["value"], "nll": known["nll"], "protocol": protocol, "window_nll": []},
        )
        if len(one["window_nll"]) == known["num_windows"]:
            continue
        documents = PackagedCorpus(source=corpus).documents(protocol["part"])
        ids = encode(documents, load_tokenizer(model.checkpoint), join=protocol["join"])
        windows = ids[: protocol["max_tokens"]].unfold(0, window, window)
        if digest(windows.flatten()) != known["data_hash"]:
            raise ValueError(f"{corpus} has other tokens than those that the record of {model.name} is about")
        engine = open_gguf(model.gguf, window, threads=threads, all_logits=True)
        for ids_of_window in windows[len(one["window_nll"]) :].tolist():
            one["window_nll"].append(window_nll(engine, ids_of_window))
            save()
        one["llama_cpp"] = math.exp(fmean(one["window_nll"]))
        save()


def compare_texts(model: Model, threads: int | None, results: dict[str, Any], save: Any) -> None:
    """Greedy continuations in both."""
    texts = results.setdefault("texts", [])
    if len(texts) == len(PROMPTS):
        return
    tokenizer = load_tokenizer(model.checkpoint)
    whole = load_model(model.checkpoint, dtype=torch.float32, device="cpu")
    engine = open_gguf(model.gguf, 2 * NEW_TOKENS, threads=threads, all_logits=True)
    for prompt in PROMPTS[len(texts) :]:
        ids = tokenizer(prompt).input_ids
        with torch.inference_mode():
            said = whole.generate(  # type: ignore[operator]
                torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        expected = said[0, len(ids) :].tolist()
        answer = greedy(engine, ids, len(expected))
        pairs = enumerate(zip(answer, expected, strict=True))
        texts.append(
            {
                "prompt": prompt,
                "transformers": tokenizer.decode(expected),
                "llama_cpp": tokenizer.decode(answer),
                "tokens": len(answer),
                "equal_tokens": next((i for i, (one, other) in pairs if one != other), len(answer)),
            }
        )
        save()


def compare_speed(
    models: list[Model],
    point: tuple[int, int],
    options: argparse.Namespace,
    results: dict[str, Any],
    save: Any,
) -> None:
    """Seconds of rounds in turns, the first of which (of this process) does not count; bytes of cache per token."""
    prompt, steps = point
    seconds = results.setdefault("seconds", {model.name: {"prefill": [], "decode": []} for model in models})
    if len(seconds[models[-1].name]["decode"]) >= options.rounds:
        return
    engines = {model.name: open_gguf(model.gguf, prompt + steps, threads=options.threads) for model in models}
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(engine.n_vocab() for engine in engines.values())
    ids = torch.randint(3, vocabulary, (prompt,), generator=generator).tolist()
    for name, engine in engines.items():  # warms it up
        results.setdefault("cache_bytes_per_token", {})[name] = cache_bytes_per_token(engine, ids[:COUNTED])
    results |= {"clock": options.clock, "threads": options.threads}
    while len(seconds[models[-1].name]["decode"]) < options.rounds:
        one_round = {
            name: time_once(engine, ids, steps, CLOCKS[options.clock]) for name, engine in engines.items()
        }
        for name, (prefill, decode) in one_round.items():
            seconds[name]["prefill"].append(prefill)
            seconds[name]["decode"].append(decode)
        save()


def run(options: argparse.Namespace) -> None:
    """Export what is missing, measure what is missing, write."""
    models = find_models(options.runs, options.out / "gguf")
    engine = f"llama-cpp-python {version('llama-cpp-python')}"
    file = options.out / "results.json"
    record = json.loads(file.read_text()) if file.exists() else {"models": {}, "speed": {}}
    record["provenance"] = {
        **provenance("cpu"),
        "device": device_name("cpu"),
        "engine": engine,
        "command": " ".join(["python -m kvp.bench.llama_cpp", *sys.argv[1:]]),
    }

    def save() -> None:
        file.write_text(json.dumps(record, indent=1) + "\n")

    for model in models:
        if not model.gguf.exists():
            model.gguf.parent.mkdir(parents=True, exist_ok=True)
            export(model.checkpoint, model.gguf, "gguf")
        serving = json.loads((model.gguf / "serving.json").read_text())
        results = record["models"].setdefault(model.name, {})
        results["gguf_bytes"] = (model.gguf / FILE).stat().st_size
        results |= {
            key: serving[key] for key in ("dtype", "head_dim", "kv_bytes_per_token", "params", "check")
        }
    for prompt in options.prompt:
        point = record["speed"].setdefault(f"{prompt}+{options.steps}", {})
        compare_speed(models, (prompt, options.steps), options, point, save)
    for model in models:
        compare_texts(model, options.threads, record["models"][model.name], save)
    for model in models:
        compare_perplexity(model, options.threads, record["models"][model.name], save)
    text = table(record)
    (options.out / "table.md").write_text(text)
    print(text)


def main() -> None:
    """The command; exit code 1 and one clear error for whatever a user can mend."""
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
        print(f"kvp.bench.llama_cpp.__main__: error: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
