"""The Python API does what the command does, leaves the given model as it is, and refuses what cannot be."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForSequenceClassification, LlamaModel

import kvp
from kvp.api.chosen import chosen
from kvp.api.memory import as_loaded, weights_digest
from kvp.choices import choices
from kvp.composing import compose, target_of
from kvp.hints import CONF
from kvp.models.load import byte_tokenizer
from kvp.models.shapes import layer_shapes
from kvp.options import options
from kvp.pipeline.experiment import Experiment
from kvp.strategies.methods.magnitude import Magnitude
from tests.conftest import HEADS, tiny_model
from tests.helpers.runs import LIGHT, compose_here, run_here

IDS = torch.randint(3, 96, (4, 24), generator=torch.Generator().manual_seed(1))
FINE = {"allocator": {"multiple_of": 2}}  # steps that a tiny model can take
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 40, "Pack my box with five dozen jugs. " * 40]


@pytest.fixture
def model():
    return tiny_model("llama", "gqa", vocab_size=264)


def equal(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


def test_every_name_of_the_api_is_there():
    for name in kvp.__all__:
        assert getattr(kvp, name) is getattr(import_module("kvp.api"), name)
    assert {*kvp.__all__} <= {*dir(kvp)}
    with pytest.raises(AttributeError, match="no attribute 'pruned_'"):
        _ = kvp.pruned_
    classes = {target_of("strategy", name).rpartition(".")[2] for name in choices("strategy")}
    assert classes <= {*kvp.__all__}


def made_by_yaml(tmp_path, name):
    return Experiment.compose(compose_here(tmp_path, *LIGHT, f"strategy={name}", "recovery=none")).strategy


@pytest.mark.parametrize("name", ["adapruner", "flap", "kvpruner", "kvpruner_plus", "llm_bip", "llm_pruner"])
def test_an_object_has_the_defaults_of_its_yaml(tmp_path, name):
    made = made_by_yaml(tmp_path, name)
    assert type(made)() == made


@pytest.mark.slow
@pytest.mark.parametrize("name", choices("strategy"))
def test_every_object_has_the_defaults_of_its_yaml(tmp_path, name):
    made = made_by_yaml(tmp_path, name)
    if name in ("chain", "mosaic_composite", "regrow"):
        with pytest.raises(ValueError, match="is not set"):
            type(made)()
    elif name.endswith("_stock"):
        assert type(made)() != made
    else:
        assert type(made)() == made


def same_as_command(tmp_path, *words, **options):
    record = run_here(tmp_path, *LIGHT, "recovery=none", "evaluation=none", *words)
    dense, tokenizer = kvp.load(record["dense"]["checkpoint"])
    commanded, _ = kvp.load(record["pruned"]["checkpoint"])
    text = {"num_samples": 4, "length": 64}
    pruned = kvp.prune(dense, tokenizer, record["choices"]["strategy"], **text, **options)
    assert pruned.achieved == pytest.approx(record["ratio"]["achieved"])
    assert layer_shapes(pruned.model.config) == layer_shapes(commanded.config)
    assert equal(pruned.model, commanded)


def test_prune_is_the_command(tmp_path):
    same_as_command(tmp_path, "strategy=kvpruner", "strategy.allocator.multiple_of=2", **FINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["flap", "kvpruner_plus", "llm_pruner", "wanda_sp", "sleb", "slicegpt", "nirvana"]
)
def test_prune_is_the_command_for_every_template(tmp_path, name):
    of = {
        "sleb": ("blocks", 0.5),
        "slicegpt": ("block_params", 0.2219),
        "kvpruner_plus": ("kv_cache", 0.25),
    }.get(name, ("block_params", 0.25))
    fine = {} if name in ("sleb", "slicegpt") else FINE
    words = ["strategy.allocator.multiple_of=2"] if fine else []
    words += [f"strategy={name}", f"ratio={of[0]}", f"ratio.value={of[1]}"]
    same_as_command(tmp_path, *words, of=of[0], ratio=of[1], **fine)


@pytest.mark.parametrize("heads", HEADS)
def test_the_given_model_stays_and_the_ratio_is_counted(heads):
    dense = tiny_model("llama", heads).train()
    frozen = dense.get_parameter("model.layers.0.self_attn.q_proj.weight").requires_grad_(False)
    held = dense.get_parameter("model.norm.weight")
    held.grad = torch.ones_like(held)
    before = weights_digest(dense)
    pruned = kvp.prune(dense, ratio=0.25, calibration=IDS, **FINE)
    assert weights_digest(dense) == before
    assert dense.training
    assert not frozen.requires_grad
    assert torch.equal(held.grad, torch.ones_like(held))
    assert [name for name, each in dense.named_parameters() if each.grad is not None] == ["model.norm.weight"]
    widths = [sum(shape.kv_width for shape in layer_shapes(m.config)) for m in (dense, pruned.model)]
    assert pruned.achieved["kv_cache"] == 1 - widths[1] / widths[0] == pytest.approx(0.25, abs=0.02)
    cache = pruned.model.eval()(IDS, use_cache=True).past_key_values
    stored = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers)
    assert stored == widths[1]
    assert str(pruned).startswith("asked 25 % of kv_cache; achieved kv_cache 25.")


def test_text_is_given_by_name_as_texts_or_as_ids(model):
    tokenizer = byte_tokenizer()
    how = {"num_samples": 2, "length": 32, **FINE}
    named = kvp.prune(model, tokenizer, calibration="squad", **how)
    again = kvp.prune(model, tokenizer, calibration="squad", **how)
    assert equal(named.model, again.model)
    given = kvp.prune(model, tokenizer, calibration=TEXTS, length=32, **FINE)
    ids = torch.tensor(tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // 32 * 32].view(-1, 32)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:32]
    sample = windows[order][torch.randperm(32, generator=torch.Generator().manual_seed(0))]
    assert {tuple(row) for row in sample.tolist()} <= {tuple(row) for row in windows.tolist()}
    assert given.achieved["kv_cache"] == pytest.approx(0.25, abs=0.02)


def test_an_object_is_the_named_strategy_with_its_options():
    model, how = tiny_model(head_dim=16), {"calibration": IDS, "ratio": 0.5}
    made = kvp.KVPruner(grouping="coupled", allocator=kvp.Uniform())
    found = kvp.prune(model, strategy=made, **how).model
    for allocator in ("uniform", made.allocator):
        named = kvp.prune(model, strategy="kvpruner", grouping="coupled", allocator=allocator, **how)
        assert equal(named.model, found)


@pytest.mark.parametrize(
    ("group", "name", "key"),
    [
        ("strategy", "kvpruner_plus", "context"),
        ("strategy", "kvpruner_plus_mla", "context"),
        ("recovery", "lora_text", "max_steps"),
        ("recovery", "lora_alpaca", "epochs"),
    ],
)
def test_an_option_that_is_none_is_null(group, name, key):
    assert compose([f"{group}={name}"])[group][key] is not None
    words, values = chosen(group, name, {key: None})
    assert compose(words, values)[group][key] is None


def test_none_reaches_a_strategy_and_no_option_that_it_lacks():
    model, how = tiny_model(head_dim=16), {"calibration": IDS, "ratio": 0.5}
    folded, free = (
        kvp.prune(model, strategy="kvpruner_plus", context=context, **how, **FINE).model
        for context in (8, None)
    )
    made = kvp.KVPrunerPlus(context=None, allocator=kvp.Global(multiple_of=2))
    assert equal(free, kvp.prune(model, strategy=made, **how).model) and not equal(free, folded)
    with pytest.raises(ValueError, match="contxt"):
        kvp.prune(model, strategy="kvpruner_plus", contxt=None, **how)


def test_a_strategy_of_the_users_own_needs_no_configuration(model):
    @options
    class Cubic(Magnitude):
        """Score by the third power."""

    pruned = kvp.prune(
        model, strategy=Cubic(grouping="vo", allocator=kvp.Uniform(multiple_of=2)), calibration=IDS
    )
    assert pruned.achieved["kv_cache"] == pytest.approx(0.25, abs=0.02)


def test_a_store_keeps_steps_by_weights_and_options(model, tmp_path, caplog):
    def counts():
        return {
            place.name: len([*place.glob("[!.]*")])
            for place in (tmp_path / "store").iterdir()
            if place.is_dir()
        }

    how = {"calibration": IDS, "store": tmp_path / "store", "allocator": kvp.Uniform(multiple_of=2)}
    first = kvp.prune(model, ratio=0.5, **how)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("manifest.json")}
    assert equal(first.model, kvp.prune(model, ratio=0.5, **how).model)
    assert equal(first.model, kvp.prune(model, ratio=0.5, calibration=IDS, allocator=how["allocator"]).model)
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("manifest.json")}
    kvp.prune(model, ratio=0.25, **how, of="block_params", grouping="ffn")
    assert counts()["plan"] == 2
    with torch.no_grad():
        model.get_parameter("model.layers.1.self_attn.v_proj.weight").mul_(1.5)
    kvp.prune(model, ratio=0.5, **how)
    assert counts() == {"score": 3, "plan": 3}


def test_recover_evaluate_save_and_load(model, tmp_path):
    tokenizer = byte_tokenizer()
    pruned = kvp.prune(model, calibration=IDS, **FINE)
    before = weights_digest(pruned.model)
    tuned = kvp.recover(
        pruned.model, tokenizer, texts=TEXTS, max_steps=3, warmup_steps=0, data={"length": 32}, rank=2
    )
    assert weights_digest(pruned.model) == before
    kept = {"texts": TEXTS, "max_steps": 3, "warmup_steps": 0, "data": {"length": 32}, "rank": 2}
    first = kvp.recover(pruned.model, tokenizer, store=tmp_path / "store", **kept)
    found = kvp.recover(pruned.model, tokenizer, store=tmp_path / "store", **kept)
    assert equal(first.model, tuned.model) and equal(found.model, tuned.model)
    other = kvp.recover(model, tokenizer, store=tmp_path / "store", **kept)
    assert not equal(other.model, tuned.model)
    assert len([*(tmp_path / "store" / "recover").glob("[!.]*")]) == 2
    assert len(tuned.losses) == tuned.figures["steps"] == 3
    assert not equal(tuned.model, pruned.model)
    quality = [
        kvp.evaluate(each, tokenizer, perplexity={"mine": TEXTS}, tasks=[], window=64).perplexity["mine"]
        for each in (pruned.model, tuned.model)
    ]
    assert quality[1] < quality[0]
    tuned_dir = pruned.save(tmp_path / "saved", tokenizer)
    assert (tuned_dir / "plan.json").exists()
    card = (tuned_dir / "README.md").read_text()
    assert f"made this checkpoint: {pruned}." in card
    assert re.search(rf"\| parameters +\| +{sum(p.numel() for p in pruned.model.parameters()):,} \|", card)
    opened, _ = kvp.load(tuned_dir, dtype="float32")
    assert torch.equal(opened(IDS).logits, pruned.model(IDS).logits)
    with pytest.raises(FileExistsError, match="is there already: choose another directory"):
        pruned.save(tuned_dir)


def test_a_pruned_model_is_pruned_again_and_exported(model, tmp_path):
    tokenizer = byte_tokenizer()
    once = kvp.prune(model, strategy="kvpruner_stock", calibration=IDS, **FINE)
    twice = kvp.prune(once.model, strategy="shortgpt", of="blocks", ratio=0.3333, calibration=IDS)
    assert twice.achieved["blocks"] == pytest.approx(1 / 3)
    serving = kvp.export(twice.model, tokenizer, tmp_path / "served")
    assert serving["check"]["passed"]
    assert serving["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize("recipe", ["lora_txt", "none"])
def test_a_recipe_that_is_none_is_refused(model, recipe):
    with pytest.raises(ValueError, match=r"lora_text"):
        kvp.recover(model, byte_tokenizer(), recipe)


def test_a_method_that_reads_no_text_needs_no_tokenizer(model):
    method = kvp.prune(model, strategy="magnitude", allocator={"multiple_of": 2}, ratio=0.25)
    assert method.achieved["kv_cache"] == 0.25


BAD = {  # arguments of prune, and the beginning of their error
    "strategy": ({"strategy": "kvprunr"}, "there is no strategy 'kvprunr'. Did you mean kvpruner?"),
    "no strategy": ({"strategy": 3}, "strategy must be a name or an object such as kvp.FLAP"),
    "options beside an object": (
        {"strategy": kvp.FLAP(), "metric": "ifv"},
        "metric: an object has its options",
    ),
    "ratio": ({"ratio": 1.5}, r"ratio.value must be in \[0, 1\), got 1.5"),
    "ratio in words": ({"ratio": "half"}, "ratio.value must be a number, got 'half'"),
    "ratio that is none": ({"ratio": float("nan")}, "ratio.value must be a finite number, got nan"),
    "ratio out of reach": ({"ratio": 0.97}, "ratio.value=0.97 of kv_cache cannot be reached"),
    "denominator": ({"of": "kv"}, "of must be one of kv_cache, .* got 'kv'"),
    "option": ({"gruping": "vo"}, "strategy has no option 'gruping'; KVPruner has "),
    "value of an option": ({"grouping": "foo"}, "strategy.grouping must be one of coupled, "),
    "type of an option": ({"grouping": 3}, "strategy.grouping must be one of coupled, "),
    "inner option": ({"allocator": {"multiple": 2}}, "strategy.allocator has no option 'multiple'"),
    "allocator": (
        {"allocator": "unform"},
        "there is no strategy/allocator 'unform'. Did you mean uniform?",
    ),
    "corpus": ({"calibration": "dropp", "tokenizer": byte_tokenizer()}, "Unknown corpus 'dropp'"),
    "no tokenizer": ({"calibration": "drop"}, "calibration text needs a tokenizer"),
    "no texts": (
        {"calibration": [], "tokenizer": byte_tokenizer()},
        r"texts must be a list of text such as \['one', 'another'\], got list \[\]",
    ),
    "texts that are none": (
        {"calibration": [1], "tokenizer": byte_tokenizer()},
        r"texts\[0\] must be text, got int 1",
    ),
    "half a character": (
        {"calibration": ["\ud800"], "tokenizer": byte_tokenizer()},
        r"texts\[0\] has half a character",
    ),
    "no tokenizer of transformers": (
        {"calibration": "drop", "tokenizer": "tokenizer"},
        "tokenizer must be a transformers tokenizer, got str",
    ),
    "store": ({"store": ""}, "store must be a directory, got ''"),
    "blank texts": ({"calibration": [" "], "tokenizer": byte_tokenizer()}, "texts must have text in them"),
    "short texts": (
        {"calibration": ["a"], "tokenizer": byte_tokenizer()},
        "the texts have 1 tokens, fewer than one",
    ),
    "ids that are none": ({"calibration": torch.rand(2, 4)}, "calibration must be token ids of shape"),
    "ids of one sample": ({"calibration": IDS[0]}, "calibration must be token ids of shape"),
    "ids of another model": ({"calibration": IDS + 1000}, r"calibration must hold token ids in \[0, 264\)"),
    "long ids": ({"calibration": IDS.repeat(1, 9)}, "calibration.length must be <= 128"),
    "windows of ids": ({"num_samples": 2}, "num_samples and length choose windows of text"),
    "seed": ({"seed": -1}, "seed must be in"),
    "samples": (
        {"calibration": "drop", "num_samples": 0, "tokenizer": byte_tokenizer()},
        "calibration.num_samples must be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(model, name):
    given, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        kvp.prune(model, **{"calibration": IDS, **FINE, **given})


def other_models(model):
    yield get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])), "has an adapter"
    yield GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16)), "gpt2"
    yield "a path", "must be a transformers PreTrainedModel"
    yield tiny_model().to("meta"), "must lie on one device"
    mixed = tiny_model()
    mixed.lm_head.half()
    yield mixed, "must have one dtype of bfloat16, float16, float32, got float16, float32"
    yield tiny_model().double(), "got float64"
    inside = tiny_model()
    inside.add_adapter(LoraConfig(target_modules=["q_proj"]))
    yield inside, "has an adapter inside"
    yield LlamaModel(tiny_model().config), "must be a causal language model, got LlamaModel"
    yield LlamaForSequenceClassification(tiny_model().config), "must be a causal language model"
    broken = tiny_model()
    broken.lm_head.weight.data[3, 3] = float("nan")
    yield broken, "values that are not finite"
    packed = tiny_model()
    packed.is_quantized = True
    yield packed, "prune first, then quantise"


def test_models_that_cannot_be_cut_are_refused(model):
    for other, message in other_models(model):
        with pytest.raises(ValueError, match=message):
            kvp.prune(other, calibration=IDS)


def test_models_out_of_reach_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model.path=\./nowhere is no directory here"):
        kvp.load("./nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises((FileNotFoundError, ValueError), match="empty"):
        kvp.load(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"no model 'smolm2_135m'. Did you mean smollm2_135m\?"):
        kvp.load("smolm2_135m")
    with pytest.raises(ValueError, match=r"model\.path is not set"):
        kvp.load("local")
    for given, message in (
        ({"path": ""}, "path must be a model's name"),
        ({"dtype": "int8"}, r"model\.dtype must be one of"),
        ({"dtype": torch.int8}, r"model\.dtype must be one of"),
        ({"device": "gpu"}, "device must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            kvp.load(**{"path": "tiny", **given})
    assert not [*Path(tmp_path).glob("**/*.safetensors")]


def test_methods_have_descriptions():
    found = kvp.methods()
    assert {*found} == {*choices("strategy")}
    assert all(len(line) > 10 for line in found.values())


def test_two_threads_prune_as_one_does():
    models = [tiny_model(), tiny_model()]
    with ThreadPoolExecutor(2) as pool:
        both = [*pool.map(lambda model: kvp.prune(model, calibration=IDS, **FINE), models)]
    alone = kvp.prune(tiny_model(), calibration=IDS, **FINE)
    assert all(equal(each.model, alone.model) for each in both)


def test_a_model_at_work_is_refused_to_another_call(model):
    with as_loaded(model), pytest.raises(ValueError, match="model is at work in another call"):
        kvp.prune(model, calibration=IDS, **FINE)
    assert kvp.prune(model, calibration=IDS, **FINE).achieved["kv_cache"] > 0.2


def test_the_api_works_inside_an_application_that_uses_hydra():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert "flap" in choices("strategy")
        assert hydra_compose("ratio/params").ratio.of == "params"
    assert not GlobalHydra.instance().is_initialized()


def test_needles_are_evaluated_in_memory():
    tokenizer = byte_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=900)
    found = kvp.evaluate(model, tokenizer, "needles", lengths=[900], limit=5)
    assert [*found.needles] == ["single_900", "multikey_900", "variables_900"]
    assert {result["n"] for result in found.needles.values()} == {5}
    assert found.results["single_900"]["protocol"]["corpus"]["name"] == "squad"
    assert str(found).count("needles") == 3 and not found.perplexity
    with pytest.raises(ValueError, match=r"lengths must be <= 900 \(max_position_embeddings"):
        kvp.evaluate(model, tokenizer, "needles", lengths=[901])


@pytest.mark.parametrize(
    ("protocol", "arguments", "message"),
    [
        ("packaged", {"lengths": [512]}, "lengths has no part in .* or choose protocol='needles'"),
        ("needles", {"tasks": ["piqa"]}, "tasks has no part in an evaluation of needles"),
        ("needles", {"perplexity": ["squad"]}, "perplexity has no part in an evaluation of needles"),
        ("needles", {"window": 64}, "window has no part in an evaluation of needles"),
        ("needles", {"batch_size": 2}, "batch_size has no part in an evaluation of needles"),
        (
            "packaged",
            {"tasks": [], "limit": 5},
            "limit has no part in an evaluation of perplexity: leave it out",
        ),
        ("packaged", {"tasks": [], "perplexity": []}, "nothing is left to evaluate of protocol='packaged'"),
        (
            "needles",
            {"lengths": 100},
            "evaluation.needles.lengths must be >= .* and the question alone, got 100",
        ),
        ("needles", {"lengths": 3.5}, "lengths must be a list, got 3.5"),
        ("needles", {"limit": 10**9}, r"evaluation.needles.samples must be in \[5, 10000\]"),
        ("packaged", {"tasks": [], "window": 0}, "evaluation.perplexity.window must be >= 2, got 0"),
        (
            "packaged",
            {"tasks": [], "perplexity": {"long": ["word " * 999], "short": ["word"]}},
            "test part of short has",
        ),
    ],
)
def test_an_evaluation_refuses_what_it_has_no_use_for(model, monkeypatch, protocol, arguments, message):
    monkeypatch.setattr(model, "forward", None)  # nothing may be computed
    with pytest.raises(ValueError, match=message):
        kvp.evaluate(model, byte_tokenizer(), protocol, **arguments)


def test_numbers_of_numpy_and_dtypes_of_torch_are_options(model):
    pruned = kvp.prune(
        model, None, "magnitude", np.float32(0.5), seed=np.int64(3), allocator={"multiple_of": np.int64(1)}
    )
    assert pruned.achieved["kv_cache"] == 0.5
    config = compose([], {"recovery.dtype": torch.bfloat16, "corpora.own": {"part": np.array([1, 2])}})
    assert config.recovery.dtype == "bfloat16" and config.corpora.own.part == [1, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: kvp.prune(model, None, "magnitude", None), "ratio must be a number, got None"),
        (lambda model: kvp.prune(model, None, "magnitude", seed=None), "seed must be a number, got None"),
        (lambda model: kvp.recover(model, byte_tokenizer(), seed=None), "seed must be a number, got None"),
        (
            lambda model: kvp.prune(model, None, "magnitude", of="memory"),
            "of must be one of kv_cache, params",
        ),
        (
            lambda model: kvp.measure(model, batch_size=10**9, prompt_length=8, new_tokens=4),
            r"measure is estimated .*batch_size=1 would fit$",
        ),
        (
            lambda model: kvp.recover(model, byte_tokenizer(), batch_size=10**7, micro_batch_size=10**7),
            r"recover is estimated .*recovery.micro_batch_size=1 would fit$",
        ),
        (
            lambda model: kvp.prune(model, None, "flap", calibration=torch.ones(2, 8, dtype=torch.bool)),
            "got bool of shape",
        ),
        (
            lambda model: kvp.prune(model, None, "flap", calibration=torch.ones(2, 8).long(), batch_size=0),
            "calibration.batch_size must be >= 1, got 0",
        ),
    ],
)
def test_a_call_refuses_numbers_that_mean_nothing_or_do_not_fit(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_every_function_says_what_it_was_not_given(model):
    tokenizer = byte_tokenizer()
    for call in (
        lambda: kvp.evaluate(model, None, perplexity={"own": ["text"]}, tasks=[]),
        lambda: kvp.recover(model, None),
        lambda: kvp.export(model, None, "nowhere"),
    ):
        with pytest.raises(ValueError, match="tokenizer must be a transformers tokenizer, got NoneType"):
            call()
    with pytest.raises(ValueError, match="protocol must be an option that evaluates"):
        kvp.evaluate(model, tokenizer, "none", perplexity=["squad"])
    with pytest.raises(ValueError, match="perplexity must be a list, got 3"):
        kvp.evaluate(model, tokenizer, perplexity=3)
    with pytest.raises(ValueError, match="teacher must be a transformers PreTrainedModel, got str"):
        kvp.recover(model, tokenizer, teacher="tiny", distillation="logits")


def test_inference_mode_around_a_call_does_not_take_the_gradients():
    with torch.inference_mode():
        inside = tiny_model()
    outside = tiny_model()
    with torch.inference_mode():
        pruned = kvp.prune(
            outside,
            strategy="llm_pruner",
            ratio=1 / 3,
            calibration=IDS,
            allocator={"multiple_of": 2},
            protect_first=0,
            protect_last=0,
        )
    assert pruned.achieved["kv_cache"] > 0.2
    with pytest.raises(ValueError, match=r"loaded in torch\.inference_mode"):
        kvp.prune(inside, calibration=IDS)
