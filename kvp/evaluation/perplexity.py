"""Perplexity over fixed windows of a corpus: exp of the mean negative log-likelihood of the predicted tokens.

LLM-Pruner (arXiv:2305.11627) and Shortened LLaMA (arXiv:2402.02834) cut the joined test split into non-overlapping
windows of 128 tokens and drop the remainder. They average the 127 predictions of every window. Numbers of another
window, join or use of BOS are not comparable, so the result carries the protocol.
"""

from __future__ import annotations

import math
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from kvp.data.corpora import Corpus, Part, Selection
from kvp.data.tokens import digest, encode
from kvp.models.caches import stated
from kvp.models.nll import hidden_nll
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Bos = Literal["none", "start", "window"]
LARGEST_NLL = math.log(sys.float_info.max)  # nats per token


def window_nll(model: PreTrainedModel, windows: Tensor, scored: int) -> Tensor:
    """Return the NLL of the last `scored` tokens of each window given the tokens before them, (windows, scored).

    With a packed cache every token reads what a decoder would have read, in one forward pass all the same.
    """
    read: dict[str, Any] = {"use_cache": False}
    if getattr(model.config, "kvp_cache", None) is not None:
        from kvp.models.one_pass import as_decoded

        read = as_decoded(model, windows.shape[1] - 1)
    hidden = model.base_model(windows[:, :-1], **read).last_hidden_state
    return hidden_nll(model, hidden[:, -scored:], windows[:, -scored:])


@options
class Perplexity(Selection):
    """exp of the mean negative log-likelihood of every predicted token, corpus by corpus.

    With a stride below the window the windows overlap. Each then scores only the tokens that the window before it did
    not reach. The model's positions bound the window.

    | bos      | where a BOS stands                                                                      |
    | -------- | --------------------------------------------------------------------------------------- |
    | "none"   | nowhere                                                                                 |
    | "start"  | first in the stream, as the first token of the first window                             |
    | "window" | before every window, on top of its tokens, so that the first of them is predicted too   |
    """

    node: ClassVar[str] = "evaluation.perplexity"
    part: Part = Field(default="test", description="which documents of each corpus")
    window: int = Field(ge=2, description="tokens of a window; one token predicts nothing")
    stride: int | None = Field(
        default=None, ge=1, description="tokens between window starts; null: the window"
    )
    bos: Bos = Field(default="none", description="where a BOS stands")
    max_tokens: int | None = Field(ge=2, description="tokens of the stream; null: the whole corpus")
    batch_size: int = Field(default=8, ge=1, description="windows per forward pass")

    def __post_init__(self) -> None:
        if self.stride is not None and self.stride > self.window:
            raise ValueError(
                f"evaluation.perplexity.stride must be in [1, window={self.window}] or null, got {self.stride}: "
                "a longer stride skips tokens"
            )

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, corpus: Corpus
    ) -> dict[str, Any]:
        """Return the perplexity as "value", the mean NLL in nats per token as "nll", and the protocol.

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
        if nll / count > LARGEST_NLL:
            raise FloatingPointError(
                f"The NLL of {identity['name']} is {nll / count:.0f} nats per token, whose exp no number holds: broken "
                "weights, or another model's tokenizer"
            )
        return {
            "value": math.exp(nll / count),
            "nll": nll / count,
            "num_tokens": count,
            "num_windows": len(windows),
            "protocol": protocol,
            "cache": stated(model.config),
            "data_hash": digest(ids[: window + stride * (len(windows) - 1)]),
        }

    def _stream(self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, window: int) -> Tensor:
        """Return the token ids of the corpus, (tokens,), at least one window."""
        if self.bos != "none" and tokenizer.bos_token_id is None:
            raise ValueError(
                f"evaluation.perplexity.bos={self.bos}, but the tokenizer has no BOS token: set bos=none"
            )
        documents, bos = corpus.documents(self.part), self.bos == "start"
        ids = encode(documents, tokenizer, join=self.join, bos=bos, limit=self.max_tokens)
        if len(ids) < window:
            raise ValueError(
                f"A window is {window} tokens, but {corpus.identity(self.part)['name']}/{self.part} gives "
                f"{len(ids)} (max_tokens={self.max_tokens}): lower window or raise max_tokens"
            )
        return ids

    @torch.inference_mode()
    def _score(self, model: PreTrainedModel, windows: Tensor, stride: int, name: str) -> tuple[float, int]:
        """Return the sum of the NLL of all predictions, in nats, and their number; `windows` is (windows, tokens).

        The first window scores all its predictions, in a batch of its own. Every other scores its last `stride`.
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
