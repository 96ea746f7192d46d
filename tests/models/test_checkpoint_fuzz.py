"""A checkpoint directory that is damaged at random is either right or refused in words; none is silently wrong."""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
import torch
from transformers import AutoModelForCausalLM

from kvp.models.checkpoint.check import check_checkpoint
from kvp.models.load import load_model, load_tokenizer, save
from kvp.models.shapes import layer_shapes, size
from kvp.models.spaces import available_kinds
from kvp.models.surgery import apply
from tests.conftest import random_plan
from tests.helpers.checkpoints import DENSE, PRUNED, SHARDED, TYPES, Library, tokens_of
from tests.helpers.damage import DAMAGES, REFUSED, SAME, nothing
from tests.helpers.masks import mask

NAMES = (*DENSE, *(f"pruned-{name}" for name in PRUNED), *(f"sharded-{name}" for name in SHARDED))
CASES = 500
SECONDS = 10.0  # of a refusal, on a machine that others use too


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Library(tmp_path_factory.mktemp("library"))


@torch.no_grad()
def logits(model):
    return model(tokens_of(), use_cache=False).logits


def opened(path):
    check_checkpoint(path)
    return load_model(path, dtype=torch.float32, device="cpu")


def require_right(path, model, again):
    """Hold an opened model against transformers, its masks, its count, and itself after a round trip."""
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        path, output_loading_info=True, dtype=torch.float32
    )
    assert not loading["missing_keys"]
    assert not loading["mismatched_keys"]
    assert all(name.endswith("inv_freq") or name == "lm_head.weight" for name in loading["unexpected_keys"])
    ours, expected = logits(model), logits(theirs)
    twin = theirs.config.model_type == "phi3"  # which kvp opens with its matrices one by one: other products
    same = torch.allclose(ours, expected, atol=1e-3) if twin else torch.equal(ours, expected)
    assert same, "not what transformers opens"
    kinds = [kind for kind in ("kv_group", "qk", "vo", "ffn") if kind in available_kinds(model.config)]
    plan = random_plan(model, kinds)
    sliced, masked = logits(apply(model, plan)), logits(mask(model, plan))
    assert (sliced - masked).norm() <= 1e-4 * masked.norm(), "masked is not sliced"
    assert size(model.config, layer_shapes(model.config)).params == sum(p.numel() for p in model.parameters())
    save(model, load_tokenizer(path), again)
    assert torch.equal(logits(opened(again)), logits(model)), "not the same after a round trip"


def case(seed, library, tmp_path):
    """Damage a checkpoint, and return what came of it."""
    rng = random.Random(seed)
    damage = DAMAGES[seed % len(DAMAGES)]
    name = rng.choice(NAMES)
    path = library.copy(name, tmp_path / f"{seed}")
    expected, words = damage(rng, path, library)
    what = f"seed {seed}, {name}: {damage.__name__}, {words}"
    began = time.perf_counter()
    try:
        model = opened(path)
    except (ValueError, OSError) as error:
        said = str(error)
        assert str(path) in said, f"{what}: names no file: {said}"
        assert ": " in said and "\n" not in said and "Traceback" not in said, f"{what}: {said}"
        assert time.perf_counter() - began < SECONDS, f"{what}: late"
        assert not list(path.parent.glob(f"{seed}-*")), f"{what}: wrote something"
        assert damage is not nothing, f"{what}: {said}"
        return f"{damage.__name__}: refused", f"{what}\n    {said}"
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert expected != REFUSED, f"{what}: accepted"
    try:
        require_right(path, model, tmp_path / f"{seed}-again")
        if expected == SAME:
            assert torch.equal(logits(model), logits(opened(library.original(name)))), (
                "not the original's logits"
            )
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return f"{damage.__name__}: right", what


def run(seeds, library, tmp_path):
    outcomes, failures = Counter(), []
    for seed in seeds:
        try:
            outcome, _ = case(seed, library, tmp_path)
        except AssertionError as error:
            failures.append(str(error))
        else:
            outcomes[outcome] += 1
    assert not failures, f"{len(failures)} of {len(seeds)}:\n" + "\n".join(failures)
    return outcomes


def test_a_sample_of_damages_is_right_or_refused(library, tmp_path):
    run(range(len(DAMAGES)), library, tmp_path)


@pytest.mark.slow
def test_every_damage_is_right_or_refused(library, tmp_path):
    outcomes = run(range(len(DAMAGES), CASES), library, tmp_path)
    assert sum(count for outcome, count in outcomes.items() if outcome.endswith("right")) > CASES // 10


@pytest.mark.parametrize("name", TYPES)
def test_other_types_are_refused(name, library):
    with pytest.raises(ValueError, match=r"is not supported.*; known families"):
        check_checkpoint(library.original(name))
