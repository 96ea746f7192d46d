"""Comparisons of one model in transformers and llama.cpp; a store keeps every window, text and round.

The functions take what `kvp.store.Store` holds already. They open an engine only for a step that is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from kvp.bench.llama_cpp.engine import cache_bytes_per_token, greedy, open_gguf, time_once, window_nll
from kvp.cost import device_name
from kvp.data.corpora import PackagedCorpus
from kvp.data.tokens import digest, encode
from kvp.models.load import load_model, load_tokenizer
from kvp.results import PerplexityRecord
from kvp.serving.gguf_file import FILE
from kvp.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
PROMPTS = (
    "The capital of France is",
    "To make a cup of tea, first",
    "Once upon a time there was a dragon who",
)
NEW_TOKENS, COUNTED = 32, 64
ENGINE = "llama-cpp-python"


@dataclass(frozen=True)
class Model:
    """A checkpoint of a run, with its perplexity in transformers and the directory of its GGUF."""

    name: str
    checkpoint: Path
    perplexity: dict[str, PerplexityRecord]
    gguf: Path


def identity(model: Model, threads: int | None) -> dict[str, Any]:
    """Return what decides the answers of a model in llama.cpp, for fingerprints of steps."""
    with (model.gguf / FILE).open("rb") as file:
        gguf = hashlib.file_digest(file, "sha256").hexdigest()
    return {"gguf": gguf, "llama_cpp": version(ENGINE), "threads": threads}


def compare_perplexity(model: Model, threads: int | None, store: Store) -> dict[str, Any]:
    """Return transformers' value and the loss of every window in llama.cpp, per corpus of the record.

    Raises:
        ValueError: A corpus has other tokens now than those of the record, or its windows overlap or begin with a BOS.
    """
    return {
        corpus: _perplexity(model, corpus, known, threads, store)
        for corpus, known in model.perplexity.items()
    }


def _perplexity(
    model: Model, corpus: str, known: PerplexityRecord, threads: int | None, store: Store
) -> dict[str, Any]:
    protocol = known.protocol
    window = protocol.window
    if protocol.stride != window or protocol.bos != "none":
        raise ValueError(
            "llama.cpp reads windows that do not overlap, without a BOS; the record of "
            f"{model.name} has window={window} stride={protocol.stride} bos={protocol.bos}: repeat the run with "
            "evaluation.perplexity.stride=null evaluation.perplexity.bos=none"
        )
    packaged = PackagedCorpus(source=corpus)  # type: ignore[arg-type] # which refuses other names
    documents = packaged.documents(protocol.part)  # type: ignore[arg-type]
    ids = encode(documents, load_tokenizer(model.checkpoint), join=protocol.join)
    windows = ids[: protocol.max_tokens].unfold(0, window, window)
    if digest(windows.flatten()) != known.data_hash:
        raise ValueError(
            f"{corpus} has other tokens than those of the record of {model.name}: repeat the run with this version"
        )
    own = identity(model, threads)

    @cache
    def engine() -> Any:
        return open_gguf(model.gguf, window, threads=threads, all_logits=True)

    def nll(ids: list[int]) -> float:
        inputs = {**own, "ids": ids}
        return store.once("window", inputs, lambda _: {"nll": window_nll(engine(), ids)}).result["nll"]

    losses = [nll(ids) for ids in windows.tolist()]
    return {
        "transformers": known.value,
        "nll": known.nll,
        "protocol": protocol.model_dump(),
        "window_nll": losses,
        "llama_cpp": math.exp(fmean(losses)),
    }


def compare_texts(model: Model, threads: int | None, store: Store) -> list[dict[str, Any]]:
    """Return the greedy continuations of `PROMPTS` in transformers and in llama.cpp."""
    tokenizer = load_tokenizer(model.checkpoint)
    own = identity(model, threads)

    @cache
    def whole() -> PreTrainedModel:
        return load_model(model.checkpoint, dtype=torch.float32, device="cpu")

    @cache
    def engine() -> Any:
        return open_gguf(model.gguf, 2 * NEW_TOKENS, threads=threads, all_logits=True)

    def continued(prompt: str, _: Path) -> dict[str, Any]:
        ids = tokenizer(prompt).input_ids
        with torch.inference_mode():
            output = whole().generate(  # type: ignore[operator]
                torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False
            )
        expected = output[0, len(ids) :].tolist()
        answer = greedy(engine(), ids, len(expected))
        pairs = enumerate(zip(answer, expected, strict=True))
        return {
            "prompt": prompt,
            "transformers": tokenizer.decode(expected),
            "llama_cpp": tokenizer.decode(answer),
            "tokens": len(answer),
            "equal_tokens": next((i for i, (one, other) in pairs if one != other), len(answer)),
        }

    return [
        store.once("text", {**own, "prompt": prompt}, partial(continued, prompt)).result for prompt in PROMPTS
    ]


def compare_speed(
    models: list[Model], prompt: int, options: argparse.Namespace, store: Store
) -> dict[str, Any]:
    """Return the seconds of rounds in turns, and bytes of cache per token; each process warms up first."""
    own = {
        "models": [identity(model, options.threads) for model in models],
        "device": device_name("cpu"),
        "clock": options.clock,
        "prompt": prompt,
        "steps": options.steps,
    }
    generator = torch.Generator().manual_seed(0)

    @cache
    def warm() -> tuple[dict[str, Any], list[int], dict[str, float]]:
        """Return the engines, the prompt, and the bytes of cache per token, which warm the engines up."""
        engines = {
            model.name: open_gguf(model.gguf, prompt + options.steps, threads=options.threads)
            for model in models
        }
        vocabulary = min(engine.n_vocab() for engine in engines.values())
        ids = torch.randint(3, vocabulary, (prompt,), generator=generator).tolist()
        sizes = {name: cache_bytes_per_token(engine, ids[:COUNTED]) for name, engine in engines.items()}
        return engines, ids, sizes

    def one_round() -> dict[str, Any]:
        engines, ids, _ = warm()
        timed = {
            name: time_once(engine, ids, options.steps, CLOCKS[options.clock])
            for name, engine in engines.items()
        }
        return {name: {"prefill": prefill, "decode": decode} for name, (prefill, decode) in timed.items()}

    sizes = store.once("cache", own, lambda _: warm()[2]).result
    rounds = [
        store.once("round", {**own, "number": number}, lambda _: one_round()).result
        for number in range(options.rounds)
    ]
    seconds = {
        model.name: {phase: [one[model.name][phase] for one in rounds] for phase in ("prefill", "decode")}
        for model in models
    }
    return {
        "seconds": seconds,
        "cache_bytes_per_token": sizes,
        "clock": options.clock,
        "threads": options.threads,
    }
