"""Perplexity over fixed windows of a corpus: exp of the mean negative log-likelihood of the predicted tokens.

LLM-Pruner (arXiv:2305.11627) and Shortened LLaMA (arXiv:2402.02834) cut the joined test split into
non-overlapping windows of 128 tokens, drop the remainder, and average the 127 predictions of every
window. Numbers of another window, join or BOS habit are not comparable, so the protocol goes into
the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from kvp.data.corpora import Corpus, Part, Selection
from kvp.data.tokens import digest, encode
from kvp.models.nll import token_nll

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Bos = Literal["none", "start", "window"]


def window_nll(model: PreTrainedModel, windows: Tensor, scored: int) -> Tensor:
    """(windows, scored) NLL of the last `scored` tokens of each window, from those before them.

    One forward pass reads no cache: if the model's config asks for a sparse one, it decodes token by token.
    """
    if getattr(model.config, "kvp_cache", None) is None:
        logits = model(windows[:, :-1], logits_to_keep=scored, use_cache=False).logits
        return token_nll(logits, windows[:, -scored:])
    from kvp.models.sparse_cache import cache_for

    cache, losses = cache_for(model.config), []
    for token, target in pairwise(windows.split(1, dim=1)):
        losses.append(token_nll(model(token, past_key_values=cache, use_cache=True).logits, target))
    return torch.cat(losses[-scored:], dim=1)


@dataclass(frozen=True, kw_only=True)
class Perplexity(Selection):
    """Perplexity of a model on one part of each of `corpora`.

    Attributes:
        window: Corpus tokens that the model sees at once; lowered to what its positions allow.
        stride: Tokens between the starts of two windows, None for `window`. With a smaller one the
            windows overlap, and each scores only the tokens that the one before it did not reach.
        bos: "none", "start" (one BOS opens the stream, as the first token of the first window) or
            "window" (a BOS before every window, on top of it: its first token is predicted too).
        max_tokens: Length of the stream, None for all of it.
        batch_size: Windows per forward pass.
    """

    part: Part = "test"
    window: int = 128
    stride: int | None = None
    bos: Bos = "none"
    max_tokens: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 2:
            raise ValueError(f"window must be >= 2, got {self.window}: one token predicts nothing")
        if self.stride is not None and not 1 <= self.stride <= self.window:
            raise ValueError(f"stride must be in [1, window={self.window}] or null, got {self.stride}")
        if self.bos not in get_args(Bos):
            raise ValueError(f"bos must be one of {', '.join(get_args(Bos))}, got {self.bos!r}")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ValueError(f"max_tokens must be >= 2, or null for the whole corpus, got {self.max_tokens}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
    ) -> dict[str, Any]:
        """The perplexity as "value", the mean NLL in nats per token as "nll", and how they were made.

        Raises:
            ValueError: The corpus does not fill one window, or the tokenizer has no BOS to add.
            FloatingPointError: The NLL of a window is not finite.
        """
        window = min(self.window, model.config.max_position_embeddings - (self.bos == "window"))
        stride = min(self.stride or window, window)
        identity = corpus.identity(self.part)
        ids = self._stream(tokenizer, corpus, window)
        windows = ids.unfold(0, window, stride)
        if self.bos == "window":
            windows = F.pad(windows, (1, 0), value=tokenizer.bos_token_id)
        nll, count = self._score(model, windows, stride, identity["name"])
        protocol = {
            "corpus": identity,
            "part": self.part,
            "window": window,
            "asked_window": self.window,
            "stride": stride,
            "join": self.join,
            "bos": self.bos,
            "max_tokens": self.max_tokens,
        }
        return {
            "value": math.exp(nll / count),
            "nll": nll / count,
            "num_tokens": count,
            "num_windows": len(windows),
            "protocol": protocol,
            "cache": getattr(model.config, "kvp_cache", None),
            "data_hash": digest(ids[: window + stride * (len(windows) - 1)]),
        }

    def _stream(self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, window: int) -> Tensor:
        """The token ids of the corpus, (tokens,), at least one window of them."""
        if self.bos != "none" and tokenizer.bos_token_id is None:
            raise ValueError(f"bos={self.bos}, but the tokenizer has no BOS token: set bos=none")
        ids = encode(corpus.documents(self.part), tokenizer, join=self.join, bos=self.bos == "start")
        ids = ids[: self.max_tokens]
        if len(ids) < window:
            raise ValueError(
                f"A window is {window} tokens, but {corpus.identity(self.part)['name']}/{self.part} gives "
                f"{len(ids)} (max_tokens={self.max_tokens}): lower window or raise max_tokens"
            )
        return ids

    @torch.inference_mode()
    def _score(self, model: PreTrainedModel, windows: Tensor, stride: int, name: str) -> tuple[float, int]:
        """The sum of the NLL of all predictions, and their number; `windows` is (windows, tokens).

        The first window scores all it can predict, and goes alone; the others score their last `stride`.
        """
        bounds = [0, *range(1, len(windows), self.batch_size), len(windows)]
        predictions = windows.shape[1] - 1
        training, nll, count = model.training, 0.0, 0
        model.eval()
        for start, stop in tqdm(list(pairwise(bounds)), desc=f"perplexity {name}", leave=False):
            batch = windows[start:stop].to(model.device)
            scored = min(stride, predictions) if start else predictions
            losses = window_nll(model, batch, scored)
            finite = losses.isfinite().all(dim=1)
            if not finite.all():
                raise FloatingPointError(
                    f"The NLL of {name} is not finite in window {start + int(finite.int().argmin())} of "
                    f"{len(windows)}: broken weights, or {model.dtype} overflows (try model.dtype=float32)"
                )
            nll += losses.double().sum().item()
            count += losses.numel()
        model.train(training)
        return nll, count
