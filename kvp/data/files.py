"""Data files as people have them: format, compression and encoding of each, or why it is refused.

| what        | is found by                                    | refused                                |
| ----------- | ---------------------------------------------- | -------------------------------------- |
| the file    | its kind on the disk                           | empty, a directory, a pipe, a device   |
| compression | the first bytes, whatever the suffix says      | zip, bzip2, xz, zstd, gzip within gzip |
| format      | PAR1 for parquet, else the suffix, in any case | PDF, Arrow, an unknown suffix          |
| encoding    | a byte order mark, else UTF-8                  | any other byte; a NUL                  |

Line ends of .txt, .csv and .tsv become a line feed, so a text is the same on every system.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, TextIO

Format = Literal["text", "json", "csv", "tsv", "parquet"]

SUFFIXES: dict[str, Format] = {
    **dict.fromkeys((".txt", ".text", ".md"), "text"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
MARKS = {  # byte order marks, the longer ones first
    b"\xff\xfe\x00\x00": "utf-32",
    b"\x00\x00\xfe\xff": "utf-32",
    b"\xef\xbb\xbf": "utf-8-sig",
    b"\xff\xfe": "utf-16",
    b"\xfe\xff": "utf-16",
}
FOREIGN = {  # first bytes -> what the file is
    b"PK\x03\x04": "a zip archive: unpack it",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    GZIP: "gzip within gzip: unpack it once",
    b"%PDF": "a PDF: take its text out",
    b"ARROW1": "an Arrow file: write it as parquet",
}
CONVERT = "convert it, such as by iconv -f CP1252 -t UTF-8"
KINDS = {
    stat.S_IFDIR: "a directory: name a file in it",
    stat.S_IFIFO: "a pipe: write it to a file first",
    stat.S_IFCHR: "a device: name a file",
    stat.S_IFBLK: "a device: name a file",
    stat.S_IFSOCK: "a socket: name a file",
}


@dataclass(frozen=True, kw_only=True)
class Form:
    """The reading of a file: format, compression and encoding, which is empty for parquet."""

    format: Format
    gzipped: bool
    encoding: str

    def departures(self, path: Path) -> dict[str, str]:
        """Return in what the file is not plain: not UTF-8, packed or laid out against its suffix, or CSV."""
        named, packed = by_suffix(path)
        plain = self.format == (named or "json") and self.format not in ("csv", "tsv")
        found = {} if plain else {"format": str(self.format)}
        found |= {} if self.gzipped == packed else {"compression": "gzip" if self.gzipped else "none"}
        return found | ({} if self.encoding in ("utf-8", "") else {"encoding": self.encoding})


def by_suffix(path: Path) -> tuple[Format | None, bool]:
    """Return the format that a file's name promises, None if it promises none, and whether it promises gzip."""
    packed = path.suffix.lower() == ".gz"
    return SUFFIXES.get((path.with_suffix("") if packed else path).suffix.lower()), packed


def form_of(path: Path) -> Form:
    """Return how a file is to be read.

    Raises:
        OSError: The file is not there or cannot be opened.
        ValueError: It is nothing that can be read as text or rows; the message names file and reason.
    """
    kind = stat.S_IFMT(path.stat().st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(f"{path} is {KINDS.get(kind, 'no file')}")
    with path.open("rb") as stream:
        head = stream.read(4096)
    if not head:
        raise ValueError(f"{path} is empty")
    if gzipped := head.startswith(GZIP):
        with unpacked(path, gzipped=True) as stream:
            head = stream.read(4096)
    for start, what in FOREIGN.items():
        if head.startswith(start):
            raise ValueError(f"{path} is {what}")
    named, _ = by_suffix(path)
    if head.startswith(PARQUET):
        if gzipped:
            raise ValueError(f"{path} is parquet within gzip: unpack it")
        return Form(format="parquet", gzipped=False, encoding="")
    if named == "parquet":
        raise ValueError(f"{path} is no parquet file: it begins with {head[:8]!r}")
    encoding = next((name for mark, name in MARKS.items() if head.startswith(mark)), "utf-8")
    if named is None and not head.lstrip().startswith((b"[", b"{")):
        raise ValueError(
            f"{path} has no known suffix: rename it to one of {', '.join(SUFFIXES)}, or .gz of it"
        )
    return Form(format=named or "json", gzipped=gzipped, encoding=encoding)


@contextmanager
def unpacked(path: Path, *, gzipped: bool) -> Iterator[BinaryIO]:
    """Open the bytes of a file behind its compression; damage inside the block is a ValueError."""
    try:
        with gzip.open(path) if gzipped else path.open("rb") as stream:
            yield stream  # type: ignore[misc]  # GzipFile reads like a BinaryIO
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is a damaged or truncated gzip file: {error}") from error


@contextmanager
def text_of(path: Path, form: Form) -> Iterator[TextIO]:
    """Open the text of a file; a byte that its encoding does not have is a ValueError that names the line."""
    with unpacked(path, gzipped=form.gzipped) as stream:
        try:
            yield io.TextIOWrapper(stream, encoding=form.encoding)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}{_undecodable(path, form)} is not {form.encoding.upper()}: {CONVERT}"
            ) from error


def _undecodable(path: Path, form: Form) -> str:
    """Return the first line that is not UTF-8; nothing for encodings whose lines do not end in one byte."""
    if not form.encoding.startswith("utf-8"):
        return ""
    with unpacked(path, gzipped=form.gzipped) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f", line {number} (byte 0x{line[error.start]:02x} after {error.start} bytes)"
    return ""


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
