"""Questions to a GGUF in llama.cpp: losses of windows, a greedy text, seconds and bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kvp.serving.gguf_file import FILE

if TYPE_CHECKING:
    from llama_cpp import Llama

OVERHEAD = 12  # bytes per token with which a saved sequence says where it belongs


def open_gguf(directory: Path, context: int, *, threads: int | None, all_logits: bool = False) -> Llama:
    """Open the GGUF of an export with room for `context` tokens and llama.cpp's default cache of 16 bits."""
    from llama_cpp import Llama

    return Llama(
        model_path=str(directory / FILE),
        n_ctx=context,
        logits_all=all_logits,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
    )


def window_nll(engine: Llama, window: Sequence[int]) -> float:
    """Return the nats per predicted token of a window on its own."""
    engine.reset()
    engine.eval(window)
    logits = engine.scores[: len(window) - 1].astype(np.float64)
    peak = logits.max(-1)
    normaliser = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak
    return float((normaliser - logits[np.arange(len(logits)), window[1:]]).mean())


def greedy(engine: Llama, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """Return the tokens that follow; an end of the text does not stop them. Needs all logits."""
    engine.reset()
    engine.eval(prompt)
    said: list[int] = []
    for _ in range(new_tokens):
        said.append(int(engine.scores[engine.n_tokens - 1].argmax()))
        engine.eval(said[-1:])
    return said


def time_once(
    engine: Llama, prompt: Sequence[int], steps: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Return the seconds of reading a prompt, and of the steps after it, which say the prompt again and again."""
    engine.reset()
    start = clock()
    engine.eval(prompt)
    middle = clock()
    for token in islice(cycle(prompt), steps):
        engine.eval([token])
    return middle - start, clock() - middle


def cache_bytes_per_token(engine: Llama, ids: Sequence[int]) -> float:
    """Return the bytes of keys and values per token: the growth of a saved sequence, less the overhead."""
    import llama_cpp

    sizes = []
    for length in (len(ids) // 2, len(ids)):
        engine.reset()
        engine.eval(ids[:length])
        sizes.append(llama_cpp.llama_state_seq_get_size(engine.ctx, 0))
    return (sizes[1] - sizes[0]) / (len(ids) - len(ids) // 2) - OVERHEAD
