"""The header of a GGUF: its scalar fields and the types of its matrices.

It is read in a second, where `gguf.GGUFReader` takes ten and more for a large vocabulary.
Layout: magic, version, number of tensors, number of fields; fields; tensors' names, shapes, types and offsets.
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGMLQuantizationType, LlamaFileType

from kvp.models.checkpoint.files import require_file

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = ("B", "b", "H", "h", "I", "i", "f", "?", None, None, "Q", "q", "d")  # by the number of their type
STRING, ARRAY = 8, 9
LONGEST = 2**24  # bytes of a string


@dataclass(frozen=True)
class Header:
    """The part of a GGUF before its weights.

    Attributes:
        fields: Scalars and strings by name, such as "general.architecture"; arrays are left out.
        matrices: How many matrices have each type, such as Q4_K.
    """

    fields: dict[str, Any]
    matrices: Counter[str]

    @property
    def kind(self) -> str:
        """Return the quantisation as people name it, such as Q4_K_M."""
        number = self.fields.get("general.file_type")
        if number in set(LlamaFileType):
            return LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_")
        return self.matrices.most_common(1)[0][0]


def read_header(file: Path) -> Header:
    """Return the header of a GGUF.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: It is no GGUF, is truncated, or is one of several parts.
    """
    require_file(file)
    with file.open("rb") as opened:
        try:
            header = _read(opened)
        except (struct.error, ValueError, IndexError, TypeError) as error:
            raise ValueError(
                f"{file} is no whole GGUF ({error}): download or copy it again, and join parts that were split"
            ) from error
    if (count := header.fields.get("split.count", 1)) > 1:
        raise ValueError(f"{file} is one of {count} parts: join them with llama-gguf-split --merge")
    return header


def _read(opened: BinaryIO) -> Header:
    if opened.read(4) != MAGIC:
        raise ValueError("it does not begin with GGUF")
    (version,) = _unpack(opened, "I")
    if version not in VERSIONS:
        raise ValueError(f"version {version}, known: {VERSIONS}")
    tensors, count = _unpack(opened, "QQ")
    fields = {}
    for _ in range(count):
        name = _string(opened)
        (kind,) = _unpack(opened, "I")
        if (value := _value(opened, kind)) is not None:
            fields[name] = value
    matrices: Counter[str] = Counter()
    last = 0
    for _ in range(tensors):
        _string(opened)
        (dimensions,) = _unpack(opened, "I")
        *_, number, offset = _unpack(opened, f"{dimensions}QIQ")
        last = max(last, offset)
        if dimensions > 1:
            matrices[GGMLQuantizationType(number).name] += 1
    if not matrices:
        raise ValueError("it holds no matrix")
    if opened.tell() + last >= opened.seek(0, 2):
        raise ValueError("it ends before its last tensor")
    return Header(fields, matrices)


def _value(opened: BinaryIO, kind: int) -> Any:
    """Return a scalar or string; None: an array, which is skipped."""
    if kind == STRING:
        return _string(opened)
    if kind != ARRAY:
        return _unpack(opened, str(SCALARS[kind]))[0]
    inner, count = _unpack(opened, "IQ")
    if inner in (STRING, ARRAY):
        for _ in range(count):
            _value(opened, inner)
    else:
        opened.seek(count * struct.calcsize(f"<{SCALARS[inner]}"), 1)
    return None


def _string(opened: BinaryIO) -> str:
    (length,) = _unpack(opened, "Q")
    if length > LONGEST:
        raise ValueError(f"a string of {length} bytes")
    return opened.read(length).decode("utf-8", "replace")


def _unpack(opened: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(f"<{form}", opened.read(struct.calcsize(f"<{form}")))
