"""A sparse cache that is read as it is stored, against the same cache expanded: on a CPU, a GPU, in an interpreter."""

from __future__ import annotations

import logging
import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kvp.models import native, packed_states
from kvp.models.mustafar import pack, unpack
from kvp.models.packed_cache import cache_for
from kvp.models.packed_states import SEGMENT
from kvp.models.sparse_attention import SOURCE, Segment, attend, readable
from tests.models.test_packed_cache import random_twin

HERE = torch.device("cpu")
NEAR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
WIDTHS = {(64, 64): (32, 20), (8, 128): (3, 38), (24, 40): (1, 40)}  # of keys and values: channels that stay

needs_kernel = pytest.mark.skipif(not readable(HERE, torch.float32), reason="no C++ compiler here")


def stored(
    widths, sizes, *, batch=2, groups=2, heads=3, dtype=torch.float32, device=HERE
) -> tuple[Tensor, list[Segment], Tensor, Tensor]:
    """Queries of one token, segments of these sizes, and five tokens that are whole."""
    generator = torch.Generator().manual_seed(0)

    def states(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    segments = []
    for size in sizes:
        parts = [
            pack(states(batch, groups, size, width), count)
            for width, count in zip(widths, WIDTHS[widths], strict=True)
        ]
        segments.append((*parts[0], *parts[1]))
    recent = [states(batch, groups, 5, width) for width in widths]
    return states(batch, groups * heads, widths[0]), segments, *recent


def expanded(query: Tensor, segments, recent_keys: Tensor, recent_values: Tensor, mask, scaling) -> Tensor:
    """Attend in float64 over states that are expanded."""
    heads = query.shape[1] // recent_keys.shape[1]
    keys = torch.cat([*(unpack(k, bits) for k, bits, _, _ in segments), recent_keys], dim=2)
    values = torch.cat([*(unpack(v, bits) for _, _, v, bits in segments), recent_values], dim=2)
    keys, values = (states.double().repeat_interleave(heads, dim=1) for states in (keys, values))
    scores = scaling * (query.double()[:, :, None] * keys).sum(-1)
    if mask is not None:
        scores = scores + mask.double()[:, None]
    return (scores.softmax(-1)[..., None] * values).sum(2)


def masked(segments, batch: int) -> Tensor:
    """The first three tokens of the first of `batch` sequences hidden, and a number added to another."""
    mask = torch.zeros(batch, sum(segment[0].shape[2] for segment in segments) + 5)
    mask[0, :3], mask[-1, -1] = -torch.inf, 0.7
    return mask


@needs_kernel
@pytest.mark.parametrize("dtype", NEAR, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("grouped", [(1, 4, 1), (2, 2, 3), (3, 1, 11)], ids=["mha", "gqa", "mqa"])
def test_the_kernel_reads_what_expanding_reads(dtype, widths, grouped):
    batch, groups, heads = grouped
    for sizes in ((), (1,), (100,), (1, 7, 33)):
        given = stored(widths, sizes, batch=batch, groups=groups, heads=heads, dtype=dtype)
        for mask in (None, masked(given[1], 1), masked(given[1], batch)):
            read = attend(*given, mask, 0.3)
            assert read.dtype == dtype and read.shape == (batch, groups * heads, widths[1])
            torch.testing.assert_close(
                read.double(), expanded(*given, mask, 0.3), atol=NEAR[dtype], rtol=NEAR[dtype]
            )


@needs_kernel
def test_scores_far_apart_neither_overflow_nor_vanish():
    query, *rest = stored((64, 64), (40,))
    read = attend(40 * query, *rest, None, 1.0)
    torch.testing.assert_close(read.double(), expanded(40 * query, *rest, None, 1.0), atol=1e-3, rtol=1e-3)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Number of segments of every step that a kernel read."""
    seen: list[int] = []

    def watched(query: Tensor, segments, *rest):
        seen.append(len(segments))
        return attend(query, segments, *rest)

    monkeypatch.setattr(packed_states, "attend", watched)
    return seen


def decoded(twin, cache, tokens: Tensor, sizes, **options) -> Tensor:
    """Logits of passes over so many tokens each, one after the other."""
    with torch.no_grad():
        parts, done = [], 0
        for part in tokens.split(sizes, dim=1):
            done += part.shape[1]
            mask = {name: value[:, :done] for name, value in options.items()}
            parts.append(twin(part, past_key_values=cache, **mask).logits)
    return torch.cat(parts, dim=1)


@needs_kernel
@pytest.mark.parametrize("prompt", [1, 3, 20])  # the window holds 4
def test_a_model_decodes_as_with_the_expanded_cache(heads, prompt, reads):
    """A prompt, single tokens, several at once, and single ones again."""
    twin = random_twin(heads=heads).double()
    sizes = [prompt, *[1] * 9, 6, *[1] * 4]
    tokens = torch.randint(96, (3, sum(sizes)), generator=torch.Generator().manual_seed(1))
    logits = decoded(twin, cache_for(twin.config), tokens, sizes)
    layers, steps = 3, sizes.count(1)  # of four layers one has no attention
    assert len(reads) == layers * steps
    plain = decoded(twin, cache_for(twin.config, expanded=True), tokens, sizes)
    assert len(reads) == layers * steps
    torch.testing.assert_close(logits, plain, atol=1e-10, rtol=1e-10)


@needs_kernel
def test_a_sequence_that_is_padded_on_the_left_decodes_as_without_padding(reads):
    twin = random_twin().double()
    tokens = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, :5] = 0
    sizes = [14, *[1] * 10]
    logits = decoded(twin, cache_for(twin.config), tokens, sizes, attention_mask=mask)
    plain = decoded(twin, cache_for(twin.config, expanded=True), tokens, sizes, attention_mask=mask)
    torch.testing.assert_close(logits[:, 14:], plain[:, 14:], atol=1e-10, rtol=1e-10)
    short = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    padded = twin.generate(tokens[:, :14], attention_mask=mask[:, :14], **short)
    assert torch.equal(padded[:1, 14:], twin.generate(tokens[:1, 5:14], **short)[:, 9:])
    assert len(reads) == 3 * (10 + 2 * 8)


@needs_kernel
def test_segments_grow_and_then_others_begin(reads):
    twin = random_twin(max_position_embeddings=512)
    tokens = torch.randint(96, (1, 300), generator=torch.Generator().manual_seed(1))
    sizes = [150, *[1] * 150]
    logits = decoded(twin, cache_for(twin.config), tokens, sizes)
    assert SEGMENT < 150 - 4 and reads[:3] == [1] * 3 and reads[-1] == 3
    plain = decoded(twin, cache_for(twin.config, expanded=True), tokens, sizes)
    torch.testing.assert_close(logits, plain, atol=1e-4, rtol=1e-4)


@needs_kernel
def test_what_the_kernel_does_not_do_is_expanded(reads):
    twin = random_twin()
    tokens = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(1))
    cache = cache_for(twin.config)
    for token in tokens.split(1, dim=1):
        logits = twin(token, past_key_values=cache).logits
    logits.sum().backward()
    assert not reads and twin.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0
    twin.set_attn_implementation("eager")
    plain = decoded(twin, cache_for(twin.config, expanded=True), tokens, [8, *[1] * 4])
    assert torch.equal(decoded(twin, cache_for(twin.config), tokens, [8, *[1] * 4]), plain)
    assert not reads


def test_without_a_compiler_the_cache_is_expanded_and_the_log_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            twin = random_twin()
            tokens = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(1))
            logits = decoded(twin, cache_for(twin.config), tokens, [8, *[1] * 4])
        assert [record.getMessage() for record in caplog.records] == [
            "sparse_attention.cpp was not compiled, which costs speed alone: "
            "[Errno 2] No such file or directory: 'no-such-compiler'"
        ]
        plain = decoded(twin, cache_for(twin.config, expanded=True), tokens, [8, *[1] * 4])
        assert torch.equal(logits, plain)
    finally:
        native.library.cache_clear()


@needs_kernel
def test_a_build_is_kept_for_this_cpu_and_this_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build = native.library.__wrapped__
    assert build(SOURCE) is not None
    (built,) = (tmp_path / "kvp").iterdir()
    assert stat.S_IMODE((tmp_path / "kvp").stat().st_mode) == 0o700
    monkeypatch.setattr(subprocess, "run", None)  # nothing is compiled again
    assert build(SOURCE) is not None
    here = native._identity(SOURCE)
    assert built.stem == f"{SOURCE.stem}-{here}"
    other = tmp_path / "cpuinfo"
    other.write_text("model name\t: another\nflags\t\t: fpu\n")
    monkeypatch.setattr(native, "CPUINFO", other)
    assert native._identity(SOURCE) != here
    (tmp_path / "kvp").chmod(0o777)
    assert build(SOURCE) is None


TRITON = """
import torch
from kvp.models.sparse_attention_triton import attend_on_gpu
from tests.models.test_sparse_attention import NEAR, expanded, masked, stored

for dtype in (torch.float32, torch.bfloat16):
    for widths, groups, heads in (((24, 40), 1, 3), ((8, 128), 2, 1)):
        given = stored(widths, (515, 7), groups=groups, heads=heads, dtype=dtype)
        for mask in (None, masked(given[1], 2)):
            read = attend_on_gpu(*given, mask, 0.3).double()
            torch.testing.assert_close(read, expanded(*given, mask, 0.3), atol=NEAR[dtype], rtol=NEAR[dtype])
"""


def test_the_kernel_of_a_gpu_reads_the_same_in_tritons_interpreter():
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")
    done = subprocess.run(
        [sys.executable, "-c", TRITON],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_a_gpu_reads_what_expanding_reads(dtype, widths):
    pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")
    device = torch.device("cuda")
    for batch, groups, heads in ((1, 4, 1), (2, 2, 3), (3, 1, 17)):
        shape = {"batch": batch, "groups": groups, "heads": heads}
        given = stored(widths, (1, 7, 1100), dtype=dtype, device=device, **shape)
        for mask in (None, masked(given[1], batch).to(device)):
            read = attend(*given, mask, 0.3)
            torch.testing.assert_close(
                read.double(), expanded(*given, mask, 0.3), atol=NEAR[dtype], rtol=NEAR[dtype]
            )


@pytest.mark.gpu
def test_a_model_on_a_gpu_decodes_as_with_the_expanded_cache(heads, reads):
    pytest.importorskip("triton", reason="Triton comes with torch's builds for GPUs")
    twin = random_twin(heads=heads).cuda()
    tokens = torch.randint(96, (3, 30), generator=torch.Generator().manual_seed(1)).cuda()
    sizes = [20, *[1] * 10]
    logits = decoded(twin, cache_for(twin.config), tokens, sizes)
    assert len(reads) == 3 * 10
    plain = decoded(twin, cache_for(twin.config, expanded=True), tokens, sizes)
    torch.testing.assert_close(logits, plain, atol=1e-3, rtol=1e-3)
