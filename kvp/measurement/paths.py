"""Ways to decode: what runs between two tokens beside the model's arithmetic.

    eager     transformers' own: Python launches every kernel, the cache is copied to grow by a token
    static    a cache of fixed size, written in place; on a GPU a step is one CUDA graph, replayed
    native    the same with kernels compiled for this CPU: one for all layers where they are Llama's, else one for
              each linear layer and attention
    compiled  those kernels one by one, after torch.compile; static where there are none

All decode greedily and stop at no end of text, so that a run is as long as it was asked to be.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from typing_extensions import override

from kvp.estimate.serving import SLICE, room
from kvp.measurement.cache import SparseLayer, check_cache, fixed_cache
from kvp.measurement.grouped import GROUPED
from kvp.measurement.native_step import ATTEND, NATIVE, NativeLinears, available, check_native
from kvp.models.decode_layers import DecodeLayers, serves
from kvp.models.family import family_of
from kvp.models.packed_cache import cache_for
from kvp.models.rope import ROPE_BY_LENGTH, ropes

DecodePath = Literal["eager", "static", "native", "compiled"]

WINDOW = 128  # tokens by which the part of a cache that captured steps read grows: one graph each
WARMUP = 3  # steps before a capture: libraries take their workspaces, compilers compile
SDPA = "_scaled_dot_product_"


class Decoder(Protocol):
    """One way to decode one batch; `token` (batch, 1) is the last one."""

    token: Tensor
    cache: Cache

    def read(self, prompt: Tensor) -> None:
        """The forward pass of (batch, prompt_length) ids, logits of the last position only."""

    def step(self) -> None:
        """The next token."""

    def plain_step(self) -> None:
        """Take the same step once more, launched kernel by kernel, for those who want to watch; ends the run.

        A decoder with one kernel for all layers takes it by one for each linear layer and attention.
        """


def check_path(path: DecodePath, config: PretrainedConfig, length: int) -> None:
    """Refuse a model that a path cannot decode `length` tokens of; reads no weights.

    Raises:
        ValueError: Its cache cannot be held there, or its attention has sinks; names the path that serves it.
    """
    check_cache(config, length, path=path)
    if path != "eager" and family_of(config).sinks:
        raise ValueError(
            f"{config.model_type} has attention sinks, which the kernels of a fixed cache have not: use --path eager"
        )


@torch.inference_mode()
def prepare(
    path: DecodePath, model: PreTrainedModel, *, batch_size: int, prompt_length: int, new_tokens: int
) -> Decoder:
    """A decoder for one run; allocates, compiles and captures, none of which is timed.

    Raises:
        ValueError: The path cannot serve this model.
    """
    length = prompt_length + new_tokens
    check_path(path, model.config, length)
    if path == "native":
        check_native(model.device, model.dtype)
    natively = path in ("native", "compiled") and available(model.device, model.dtype)
    sinks = family_of(model.config).sinks
    model.set_attn_implementation(
        "eager" if sinks else "sdpa" if path == "eager" else NATIVE if natively else GROUPED
    )
    if path == "eager":
        return Eager(model)
    kind = Native if natively else Static
    decoder = kind(model, batch_size=batch_size, length=length, compiled=path == "compiled")
    decoder.record(range(prompt_length + 1, length + 1))
    return decoder


class Eager:
    """A cache of the kind that the checkpoint asks for."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.cache = model, cache_for(model.config)

    def read(self, prompt: Tensor) -> None:
        """All of it at once."""
        self.token = next_token(self.model, prompt, self.cache)

    def step(self) -> None:
        """The next token."""
        self.token = next_token(self.model, self.token, self.cache)

    plain_step = step


class Static:
    """A cache of fixed size; see the module.

    Without a mask a step reads exactly the tokens there are. A captured or compiled step has a fixed shape: it
    reads the cache up to the end of a window, and a mask hides what is not written yet.

    Attributes:
        window: Tokens by which the visible part grows; None: one by one, without a mask.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        batch_size: int,
        length: int,
        compiled: bool = False,
        window: int | None = None,
    ) -> None:
        self.model, device = model, model.device
        self.cache, self.cursor = fixed_cache(
            model.config, batch_size=batch_size, length=length, dtype=model.dtype, device=device
        )
        self.length, self.position = room(length), self.cursor.positions
        self.token = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.mask = torch.zeros(1, 1, 1, self.length, dtype=model.dtype, device=device)
        self.captures = device.type == "cuda"
        self.window = self.length if compiled else window or (WINDOW if self.captures else None)
        self.next_token: Callable[..., Tensor] = _compiled() if compiled else next_token
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def read(self, prompt: Tensor) -> None:
        """Read the prompt, as many sequences at a time as `SLICE` tokens hold."""
        batch_size, tokens = prompt.shape
        positions = torch.arange(tokens, device=prompt.device)
        rows = max(1, SLICE[prompt.device.type] // tokens)
        for start in range(0, batch_size, rows):
            part = slice(start, start + rows)
            self.cursor.positions, self.cursor.visible, self.cursor.rows = positions, tokens, part
            self.token[part] = next_token(self.model, prompt[part], self.cache, positions)
        self.seek(tokens)

    def seek(self, tokens: int) -> None:
        """Let the next step write the token after `tokens`."""
        self.cursor.positions, self.cursor.rows = self.position, slice(None)
        self.tokens = tokens
        self.position.fill_(tokens)
        self.mask.fill_(-math.inf)
        self.mask[..., :tokens] = 0

    def record(self, lengths: Iterable[int]) -> None:
        """Compile and capture the steps that lead to these numbers of tokens; forgets the cache."""
        if self.window is None:
            return
        if any(rope["rope_type"] in ROPE_BY_LENGTH for rope in ropes(self.model.config)):
            raise ValueError(
                f"the rotary frequencies of this model depend on the position ({', '.join(ROPE_BY_LENGTH)}), which "
                "a captured step cannot look at: use --path eager"
            )
        for visible in sorted({self._visible(tokens) for tokens in lengths}):
            self.cursor.visible = visible
            self.seek(0)
            if self.captures:
                self.graphs[visible] = self._captured()
            else:
                self._step(self.next_token)

    def _captured(self) -> torch.cuda.CUDAGraph:
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP):
                self._step(self.next_token)
        torch.cuda.current_stream().wait_stream(stream)
        shared = next((other.pool() for other in self.graphs.values()), None)
        with torch.cuda.graph(graph, pool=shared):
            self._step(self.next_token)
        return graph

    def step(self) -> None:
        """The next token."""
        self.tokens += 1
        self.cursor.visible = self._visible(self.tokens)
        if self.captures:
            self.graphs[self.cursor.visible].replay()
        else:
            self._step(self.next_token)

    def plain_step(self) -> None:
        """Into the last place there is."""
        self.seek(self.length - 1)
        self.cursor.visible = self.length
        self._step(next_token)

    def _visible(self, tokens: int) -> int:
        if self.window is None:
            return tokens
        return min(-(-tokens // self.window) * self.window, self.length)

    def _step(self, next_token: Callable[..., Tensor]) -> None:
        self.mask.index_fill_(-1, self.position, 0)
        mask = None if self.window is None else self.mask[..., : self.cursor.visible]
        self.token.copy_(next_token(self.model, self.token, self.cache, self.position, mask))
        self.position.add_(1)


class Native(Static):
    """A static cache, read and multiplied by kernels compiled for this CPU.

    Attributes:
        layers: The kernel of all layers; None: the model is not like that, or a compiler sees the step.

    Raises:
        ValueError: The cache is sparse, and the kernel has not the model's layers.
    """

    def __init__(self, model: PreTrainedModel, **options: Any) -> None:
        super().__init__(model, **options)
        self.linears = NativeLinears(model)
        self.layers: DecodeLayers | None = None
        layers: Any = self.cache.layers
        self.sparse = isinstance(layers[0], SparseLayer)
        if self.window is None and serves(model):
            self.layers = DecodeLayers(model, [layer.states for layer in layers])
        elif self.sparse:
            raise ValueError(
                "path native reads a sparse cache (kvp_cache) by its kernel of all layers, which has not those of this "
                "model: measure it with `python -m kvp`, measure=..."
            )

    @override
    def step(self) -> None:
        if self.layers is None:
            super().step()
            return
        hidden = self.layers.step(self.model.get_input_embeddings()(self.token), self.tokens)
        self.tokens += 1
        self.cursor.visible = self.tokens
        with self.linears.used():
            hidden = self.model.get_submodule(family_of(self.model.config).norm)(hidden)
            self.token.copy_(self.model.get_output_embeddings()(hidden).argmax(-1))

    @override
    def plain_step(self) -> None:
        if self.sparse:  # which no other kernel reads
            self.seek(self.length - 1)
            self.step()
        else:
            super().plain_step()

    @override
    def _step(self, next_token: Callable[..., Tensor]) -> None:
        with self.linears.used():
            super()._step(next_token)


def next_token(
    model: PreTrainedModel,
    tokens: Tensor,
    cache: Cache,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """(batch, 1) most likely ids after (batch, seq_len) ones; `mask` is added to the attention's scores."""
    ids: dict[str, Any] = {} if positions is None else {"position_ids": positions[None]}
    output = model(
        tokens, past_key_values=cache, use_cache=True, logits_to_keep=1, attention_mask=mask, **ids
    )
    return output.logits.argmax(-1)


@cache
def _compiled() -> Any:
    torch._dynamo.config.recompile_limit = 64  # one per model and batch size
    return torch.compile(next_token, fullgraph=True, dynamic=False)


class _Watch(TorchDispatchMode):
    """Notes which implementations of the attention are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if name.startswith(SDPA):
            self.seen.add(re.sub("_attention|attention_|_for_cpu", "", name.removeprefix(SDPA)))
        if name == ATTEND:
            self.seen.add("native")
        with self:  # an operator made of others chooses among them
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result


@torch.inference_mode()
def attention_kernels(decoder: Decoder) -> list[str]:
    """Return what computes the attention of a step; ends the run.

    That is what torch chose, before a compiler fuses it, or "native". With it stands "all layers" where one kernel of
    all layers takes the steps that are timed.
    """
    with _Watch() as watch:
        decoder.plain_step()
    whole = {"all layers"} if getattr(decoder, "layers", None) else set()
    return sorted(watch.seen | whole) or ["math"]
