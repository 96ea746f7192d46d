"""The YAML of this layer builds what it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from kvp.data.corpora import FileCorpus, HubCorpus

CONF = Path(__file__).parents[2] / "conf"
MODELS = [path for path in (CONF / "model").glob("*.yaml") if "HubModel" in path.read_text()]
COMMIT = re.compile("[0-9a-f]{40}")


def build(config):
    """As plain objects: Hydra's default turns a mapping of dataclass instances into configs again."""
    return instantiate(config, _convert_="all")


@pytest.fixture
def corpora(monkeypatch):
    monkeypatch.delenv("KVP_TEXT", raising=False)
    return build(OmegaConf.load(CONF / "corpora" / "default.yaml"))


@pytest.mark.parametrize("path", (CONF / "calibration").glob("*.yaml"), ids=lambda path: path.stem)
def test_every_calibration_names_corpora_that_exist(path, corpora):
    config = OmegaConf.merge(OmegaConf.load(path), {"seed": 3})
    calibration = build(config)
    assert calibration.seed == 3 and set(calibration.corpora) <= set(corpora)
    if not any(isinstance(corpora[name], HubCorpus) for name in calibration.corpora):
        identity = calibration.identity(corpora)
        assert json.loads(json.dumps(identity)) == identity


def test_your_own_text_is_asked_for_only_if_it_is_used(corpora, monkeypatch):
    with pytest.raises(ValueError, match="KVP_TEXT"):
        corpora["text"].check("test")
    monkeypatch.setenv("KVP_TEXT", __file__)
    named = build(OmegaConf.load(CONF / "corpora" / "default.yaml"))["text"]
    assert named == FileCorpus(path=__file__)


def test_hub_corpora_have_both_parts_and_a_commit_or_the_parquet_branch(corpora):
    hub = [corpus for corpus in corpora.values() if isinstance(corpus, HubCorpus)]
    assert len(hub) == 4
    for corpus in hub:
        assert set(corpus.files) == {"train", "test"} and corpus.files["train"] != corpus.files["test"]
        assert COMMIT.fullmatch(corpus.revision) or corpus.revision == "refs/convert/parquet"


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_model_is_named_after_its_file_and_pinned(path):
    model = OmegaConf.load(path)
    assert model.name == path.stem and model.dtype == ("auto" if path.stem == "local" else "bfloat16")
    assert path.read_text().startswith("# ") and f"python -m kvp model={path.stem}" in path.read_text()
    assert model.name in ("llama_7b", "local") or COMMIT.fullmatch(model.revision)
