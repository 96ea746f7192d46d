"""A class default is what the configuration says, or it is listed here: no second truth."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kvp.__main__ import CONF

NODES = {  # by group of conf
    "calibration": ("calibration",),
    "evaluation": ("evaluation.perplexity", "evaluation.zero_shot"),
    "recovery": ("recovery", "recovery.data"),
    "recovery/distillation": ("recovery.distillation",),
    "ratio": ("ratio",),
    "cache": ("cache",),
    "model": ("model",),
    "tracker": ("tracker",),
}
MEANT = {  # where a preset or a source differs from the class default on purpose
    ("calibration.join", "llm_pruner"),
    ("calibration.join", "shortened_llm"),
    ("evaluation.perplexity.bos", "llm_pruner"),
    ("evaluation.perplexity.bos", "wikitext2_2048"),
    ("evaluation.perplexity.batch_size", "wikitext2_2048"),
    ("evaluation.zero_shot.add_bos_token", "llm_pruner"),
    ("evaluation.zero_shot.batch_size", "llm_pruner"),
    ("evaluation.zero_shot.batch_size", "packaged_full"),
    ("evaluation.zero_shot.limit", "packaged"),
    *((f"evaluation.zero_shot.{field}", "longbench") for field in ("batch_size", "source")),
    ("evaluation.zero_shot.source", "llm_pruner"),
    ("recovery.epochs", "lora_alpaca"),
    ("recovery.max_steps", "lora_text"),
    *(
        (f"model.{field}", name)
        for name in ("qwen25_coder_05b", "gemma3_270m")
        for field in ("wheels", "files", "sha256", "origin")
    ),
    ("model.licence", "gemma3_270m"),
    ("cache.group", "int8"),
    *((f"cache.{field}", name) for name in ("kivi4", "kivi2") for field in ("keys", "window")),
    ("corpora.column", "ptb"),
    ("corpora.max_documents", "bookcorpus"),
    ("corpora.max_documents", "c4"),
}


def differing(node, options):
    """Yield the names of fields whose default is not the value of the node."""
    for name, field in getattr(options, "__pydantic_fields__", {}).items():
        value = getattr(options, name)
        if isinstance(field.default, tuple):
            value = tuple(value)
        if not field.is_required() and value != field.default:
            yield f"{node}.{name}"


@pytest.fixture(scope="module")
def found():
    differences = set()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for group, nodes in NODES.items():
            for path in sorted((CONF / group).glob("*.yaml")):
                local = ["model.path=somewhere"] if path.stem == "local" else []
                config = compose("config", overrides=[f"{group}={path.stem}", *local])
                for node in nodes:
                    if "_target_" in (OmegaConf.select(config, node) or {}):
                        options = instantiate(OmegaConf.select(config, node), _convert_="all")
                        differences |= {(name, path.stem) for name in differing(node, options)}
        for name, corpus in instantiate(compose("config").corpora, _convert_="all").items():
            differences |= {(field, name) for field in differing("corpora", corpus)}
    return differences


def test_a_default_is_what_the_configuration_says_or_listed(found):
    assert found == MEANT
