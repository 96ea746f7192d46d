"""Every way to decode walks the same tokens; a step of fixed size copies no cache and gathers twice."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvp.estimate.serving import room
from kvp.measurement import paths
from kvp.measurement.cache import fixed_cache
from kvp.measurement.count import cache_bytes, cache_bytes_per_token
from kvp.measurement.grouped import grouped
from kvp.measurement.native_step import NATIVE, NativeLinears, check_native, native
from kvp.measurement.paths import Eager, Native, Static, attention_kernels, next_token, prepare
from kvp.models import skinny_linear
from kvp.models.caches import bytes_per_token
from kvp.models.family import FAMILIES
from kvp.models.shapes import layer_shapes, size
from kvp.models.skinny_linear import MOST_ROWS
from kvp.models.surgery import apply
from kvp.types import Plan
from tests.conftest import random_plan, tiny_model

KINDS = ["attention", "kv_group", "qk", "vo", "ffn"]
PROMPT, NEW = 10, 20
NEEDS_COMPILER = pytest.mark.skipif(not skinny_linear.buildable(), reason="no C++ compiler")


def build(kind, heads="gqa", **changes):
    model = tiny_model(heads=heads, dtype=torch.float64, **changes)
    return model if kind == "dense" else apply(model, random_plan(model, KINDS))


@torch.inference_mode()
def decoded(decoder, prompt, new=NEW):
    decoder.read(prompt)
    tokens = [decoder.token.clone()]
    for _ in range(new):
        decoder.step()
        tokens.append(decoder.token.clone())
    return torch.cat(tokens, dim=1)


@pytest.fixture
def prompt():
    return torch.arange(3, 3 + 3 * PROMPT).view(3, PROMPT)


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_all_paths_decode_the_same_tokens(kind, heads, prompt, monkeypatch):
    model = build(kind, heads)
    expected = decoded(Eager(model), prompt)
    length = PROMPT + NEW
    assert torch.equal(decoded(Static(model, batch_size=3, length=length), prompt), expected)
    masked = Static(model, batch_size=3, length=length, window=8)  # as a GPU would capture it
    assert torch.equal(decoded(masked, prompt), expected)
    monkeypatch.setitem(paths.SLICE, "cpu", PROMPT)  # one sequence of the prompt at a time
    assert torch.equal(decoded(masked, prompt), expected), "a second run on the same cache"


@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_a_step_can_be_traced_as_one_graph(kind, prompt):
    """Without this neither torch.compile nor a CUDA graph could hold it; no kernels are compiled here."""
    model = build(kind)
    expected = decoded(Eager(model), prompt)
    model.set_attn_implementation(paths.GROUPED)
    decoder = Static(model, batch_size=3, length=PROMPT + NEW, window=64)
    decoder.next_token = torch.compile(next_token, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(decoded(decoder, prompt), expected)


@pytest.mark.parametrize("width", [4, 16])  # the attention's kernel takes multiples of 8
@pytest.mark.parametrize("kind", ["dense", "pruned"])
@NEEDS_COMPILER
def test_native_kernels_decode_the_same_tokens_and_leave_the_model_as_it_was(kind, width, heads, prompt):
    model = build(kind, heads, head_dim=width).float()
    expected, before = decoded(Eager(model), prompt), model(prompt).logits
    decoder = prepare("native", model, batch_size=3, prompt_length=PROMPT, new_tokens=NEW)
    assert torch.equal(decoded(decoder, prompt), expected)
    assert torch.equal(decoded(decoder, prompt), expected), "a second run on the same cache"
    assert kind == "pruned" or ("native" in attention_kernels(decoder)) == (width == 16)
    states = torch.randn(3, 1, model.config.hidden_size)
    with torch.inference_mode(), decoder.linears.used():
        found = model.lm_head(states)
    torch.testing.assert_close(found, model.lm_head(states), atol=1e-5, rtol=1e-5)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(prompt).logits, before)


@pytest.mark.parametrize("window", [3, 64])
@NEEDS_COMPILER
def test_native_kernels_decode_a_sparse_cache_as_its_own_does(window, prompt):
    dense = tiny_model(head_dim=16)
    model = apply(dense, random_plan(dense, ["attention", "kv_group", "ffn"])).float()
    model.config.kvp_cache = {"key_sparsity": 0.5, "value_sparsity": 0.3, "window": window}
    expected = decoded(Eager(model), prompt)
    decoder = prepare("native", model, batch_size=3, prompt_length=PROMPT, new_tokens=NEW)
    assert torch.equal(decoded(decoder, prompt), expected)
    assert torch.equal(decoded(decoder, prompt), expected), "a second run on the same cache"
    assert cache_bytes_per_token(decoder.cache) == bytes_per_token(model.config, 4)
    assert attention_kernels(decoder) == ["all layers"]


@pytest.mark.parametrize("path", ["eager", "static", "native"])
def test_a_sparse_cache_of_layers_that_the_kernel_has_not_is_for_eager_alone(path):
    options = {"batch_size": 1, "prompt_length": 4, "new_tokens": 4}
    model = apply(tiny_model("qwen3", head_dim=16), random_plan(tiny_model("qwen3", head_dim=16), ["ffn"]))
    model.config.kvp_cache = {"key_sparsity": 0.5}
    if path == "eager":
        assert isinstance(prepare(path, model.float(), **options), Eager)
    else:
        with pytest.raises(
            ValueError, match="no kernel of this path reads in place: give --path eager alone"
        ):
            prepare(path, model.float(), **options)
    narrow = apply(tiny_model(head_dim=12), random_plan(tiny_model(head_dim=12), ["ffn"])).float()
    narrow.config.kvp_cache = {"key_sparsity": 0.5}
    with pytest.raises(ValueError, match="no multiple of 8"):
        prepare(path, narrow, **options)


def test_a_sparse_cache_takes_no_more_memory_while_it_is_made():
    model = apply(tiny_model(head_dim=16), Plan({}))
    model.config.kvp_cache = {"key_sparsity": 0.75, "value_sparsity": 0.75}
    made: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend([result.nbytes] if isinstance(result, torch.Tensor) else [])
            return result

    with Watch():
        cache, _ = fixed_cache(
            model.config, batch_size=3, length=512, dtype=torch.float32, device=torch.device("cpu")
        )
    assert sum(made) == cache_bytes(cache) + 8  # and the position of the cursor


@pytest.mark.parametrize("kind", ["dense", "pruned"])
@NEEDS_COMPILER
def test_a_native_step_can_be_traced_as_one_graph_whose_mask_bounds_what_it_reads(kind, prompt):
    model = build(kind, head_dim=16).float()
    expected = decoded(Eager(model), prompt)
    model.set_attn_implementation(NATIVE)
    decoder = Native(model, batch_size=3, length=PROMPT + NEW, window=64)
    decoder.next_token = torch.compile(next_token, fullgraph=True, dynamic=False, backend="aot_eager")
    assert torch.equal(decoded(decoder, prompt), expected)


@pytest.mark.parametrize("width", [4, 16])
@torch.inference_mode()
@NEEDS_COMPILER
def test_native_attention_reads_what_the_fallback_reads(width):
    query, key, value = (torch.randn(2, heads, tokens, width) for heads, tokens in ((6, 1), (2, 40), (2, 40)))
    mask = torch.zeros(1, 1, 1, 40)
    mask[..., 33:], mask[..., 5] = -torch.inf, -torch.inf
    for seen in (None, mask):
        expected = grouped(None, query, key, value, seen, scaling=0.3)[0]
        torch.testing.assert_close(native(None, query, key, value, seen, scaling=0.3)[0], expected)
    torch.testing.assert_close(
        native(None, query, key[:, :, :7], value[:, :, :7], None)[
            0
        ],  # views with gaps, as a fixed cache gives
        grouped(None, query, key[:, :, :7], value[:, :, :7], None)[0],
    )


@torch.inference_mode()
@NEEDS_COMPILER
def test_native_matrices_keep_their_bias_and_read_prompts_as_before():
    model = torch.nn.Sequential(torch.nn.Linear(24, 40)).requires_grad_(False)
    few, many = torch.randn(5, 24), torch.randn(MOST_ROWS + 1, 24)
    expected = model(few), model(many)
    with NativeLinears(model).used():
        torch.testing.assert_close(model(few), expected[0])
        assert torch.equal(model(many), expected[1])


def test_models_without_native_kernels_are_refused(monkeypatch):
    for device, dtype, words in (
        ("cuda", torch.float32, "path native computes in float32 on a CPU; got torch.float32 on device cuda"),
        ("cpu", torch.float64, "got torch.float64 on device cpu: use --dtype float32"),
    ):
        with pytest.raises(ValueError, match=words):
            check_native(torch.device(device), dtype)
    monkeypatch.setattr(skinny_linear, "library", lambda source: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, and none built its kernels"):
        check_native(torch.device("cpu"), torch.float32)


@pytest.mark.slow
def test_compiled_decodes_the_same_tokens(prompt):
    model = build("pruned")
    expected = decoded(Eager(model), prompt)
    for _ in range(2):  # the second decoder finds the first one's code
        decoder = prepare("compiled", model, batch_size=3, prompt_length=PROMPT, new_tokens=NEW)
        assert torch.equal(decoded(decoder, prompt), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="captures need a CUDA device")
@pytest.mark.parametrize("path", ["static", "compiled"])
@pytest.mark.parametrize("kind", ["dense", "pruned"])
def test_captured_steps_decode_the_same_tokens(kind, path, prompt, monkeypatch):
    monkeypatch.setattr(paths, "WINDOW", 16)  # two graphs
    model, prompt = build(kind).float().cuda(), prompt.cuda()
    expected = decoded(Eager(model), prompt)
    decoder = prepare(path, model, batch_size=3, prompt_length=PROMPT, new_tokens=NEW)
    assert len(decoder.graphs) == (2 if path == "static" else 1)
    for _ in range(2):
        assert torch.equal(decoded(decoder, prompt), expected)


def test_families_decode_statically(family, prompt):
    model = tiny_model(family, dtype=torch.float64)
    if FAMILIES[family].sinks:
        with pytest.raises(ValueError, match=r"has attention sinks, .*: use --path eager"):
            prepare("static", model, batch_size=3, prompt_length=PROMPT, new_tokens=NEW)
        return
    decoder = prepare("static", model, batch_size=3, prompt_length=PROMPT, new_tokens=NEW)
    assert torch.equal(decoded(decoder, prompt), decoded(Eager(model), prompt))


def test_fixed_cache_holds_what_the_shapes_say():
    model = build("pruned")
    cache, _ = fixed_cache(
        model.config, batch_size=3, length=30, dtype=torch.float64, device=torch.device("cpu")
    )
    per_token = 2 * size(model.config, layer_shapes(model.config)).kv_bytes_per_token  # float64, not 32
    assert room(30) == 32 and room(32) == 32
    assert cache_bytes_per_token(cache) == per_token
    assert cache_bytes(cache) == 3 * 32 * per_token


@torch.inference_mode()
def test_no_step_copies_the_cache(prompt):
    model = build("pruned")
    decoder = Static(model, batch_size=3, length=PROMPT + NEW)
    decoder.read(prompt)
    before = [layer.keys.data_ptr() for layer in decoder.cache.layers]
    decoder.step()
    shape = decoder.cache.layers[0].keys.shape
    keys, _ = decoder.cache.layers[0].update(
        torch.zeros(*shape[:2], 1, shape[-1]).double(),
        torch.zeros_like(decoder.cache.layers[0].values[:, :, :1]),
    )
    assert [layer.keys.data_ptr() for layer in decoder.cache.layers] == before
    assert keys.data_ptr() == before[0] and keys.shape[2] == PROMPT + 1


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_a_step_gathers_rope_pairs_once_for_all_layers():
    """Two gathers (cos and sin), however many layers and sets there are, and the same numbers bit for bit."""
    model = tiny_model(num_hidden_layers=6)
    pruned = apply(model, random_plan(model, ["qk"]))
    token, cache = torch.tensor([[5]]), Eager(pruned).cache
    with Counted() as counted:
        pruned(token, past_key_values=cache)
    assert counted.calls.count("index") == 2
    rotary, layers = pruned.model.rotary_emb, pruned.model.layers
    states, position = torch.zeros(1, 1, 48), torch.tensor([[7]])
    dense_cos, dense_sin, *gathered = rotary(states, position)
    assert len(rotary.sets) > 1 and len(gathered) == len(layers)
    for layer, tables in zip(layers, gathered, strict=True):
        own = layer.self_attn._tables(dense_cos, dense_sin)
        assert all(torch.equal(a, b) for a, b in zip(tables, own, strict=True))


@torch.no_grad()
def test_nothing_is_gathered_where_all_pairs_stay(tokens):
    model = tiny_model()
    pruned = apply(model, random_plan(model, ["vo", "ffn"]))
    assert len(pruned.model.rotary_emb(torch.zeros(1, 1, 48), torch.tensor([[3]]))) == 2
    assert len(pruned.model.rotary_emb(torch.zeros(2, 17, 48), torch.arange(17)[None])) == 2


def test_the_attention_that_ran_is_named(prompt):
    model = tiny_model()
    unequal = apply(model, random_plan(model, ["qk"]))
    for one, name in ((model, "flash"), (unequal, "math")):  # the fused CPU kernel wants one width
        decoder = prepare("static", one, batch_size=3, prompt_length=PROMPT, new_tokens=NEW)
        decoded(decoder, prompt, new=1)
        assert attention_kernels(decoder) == [name]


def test_what_a_fixed_cache_cannot_serve():
    options = {"batch_size": 1, "prompt_length": 8, "new_tokens": 8}
    sliding = tiny_model("mistral", sliding_window=15)
    with pytest.raises(ValueError, match="attends to 15 tokens only"):
        prepare("static", sliding, **options)
    sparse = apply(tiny_model(head_dim=16), random_plan(tiny_model(head_dim=16), ["ffn"]))
    sparse.config.kvp_cache = {"key_sparsity": 0.5}
    with pytest.raises(ValueError, match=r"packed cache .*: give --path native or eager alone, or"):
        prepare("static", sparse, **options)
    sparse.config.kvp_cache = {"format": "int", "key_bits": 4, "value_bits": 4}
    with pytest.raises(ValueError, match="packed cache"):
        prepare("native", sparse.float(), **options)
    stretched = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ValueError, match="depend on the position"):
        prepare("compiled", stretched, **options)
