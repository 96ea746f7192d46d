"""The tensors of a checkpoint by the headers of its safetensors, held against the config's model.

No weights are read, but for the embedding and the head of a tied model whose files hold both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from kvp.models.checkpoint.files import INDEX, WEIGHTS, weight_map

HEAD = "lm_head.weight"
IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")  # old checkpoints store what is computed
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CHUNK = 4096  # rows of the vocabulary that are compared at a time
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Header:
    """One tensor of a file: its shape, its dtype in safetensors' words, and the file."""

    shape: tuple[int, ...]
    dtype: str
    file: Path


def read_headers(files: Sequence[Path]) -> dict[str, Header]:
    """Return every tensor of the files, by name.

    Raises:
        ValueError: A file is truncated or no safetensors, or a tensor lies in two of them.
    """
    found: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                names = list(opened.keys())
                slices = {name: opened.get_slice(name) for name in names}
                here = {name: Header(tuple(s.get_shape()), s.get_dtype(), file) for name, s in slices.items()}
        except (SafetensorError, ValueError) as error:
            raise ValueError(f"{file} cannot be opened as safetensors ({error}): {_why(file)}") from error
        if again := sorted(here.keys() & found.keys()):
            raise ValueError(
                f"{again[0]} lies in {found[again[0]].file.name} and in {file.name} of {file.parent}: files of two "
                "checkpoints are mixed; copy one of them again"
            )
        found |= here
    if files and files[0].name != WEIGHTS:
        _check_index(files[0].parent, found)
    return {name: header for name, header in found.items() if not IGNORED.search(name)}


def _why(file: Path) -> str:
    with file.open("rb") as opened:
        pointer = opened.read(len(LFS)) == LFS
    return "it is a pointer of Git LFS, run git lfs pull" if pointer else "copy it again"


def _check_index(directory: Path, found: Mapping[str, Header]) -> None:
    """Refuse an index that places a tensor where it is not, or leaves one out."""
    for name, place in weight_map(directory).items():
        if name not in found or found[name].file.name != place:
            there = f"it lies in {found[name].file.name}" if name in found else "which does not hold it"
            raise ValueError(
                f"{directory / INDEX} places {name} in {place}, {there}: files of two checkpoints are mixed; copy "
                "one of them again"
            )
    if more := sorted(found.keys() - weight_map(directory).keys()):
        raise ValueError(
            f"{found[more[0]].file} holds {more[0]}, which {INDEX} does not name: files of two checkpoints are "
            "mixed; copy one of them again"
        )


def check_layers(directory: Path, headers: Mapping[str, Header], layers: str, count: int) -> None:
    """Refuse a config of another depth than the tensors have.

    Raises:
        ValueError: Their numbers of layers differ.
    """
    numbers = [re.match(rf"{re.escape(layers)}\.(\d+)\.", name) for name in headers]
    stored = {int(number[1]) for number in numbers if number}
    if stored and max(stored) + 1 != count:
        raise ValueError(
            f"{directory}/config.json says num_hidden_layers={count}, the files hold layers up to {max(stored)}: the "
            "config or the weights belong to another model"
        )


def check_tensors(
    directory: Path,
    headers: Mapping[str, Header],
    expected: Mapping[str, tuple[int, ...]],
    embedding: str | None,
) -> None:
    """Refuse tensors that are missing, of another shape, or that the config does not ask for.

    Args:
        directory: The checkpoint's.
        headers: What its files hold.
        expected: Shapes of what the config's model has, by name.
        embedding: The tensor that the head shares, if the config ties them.

    Raises:
        ValueError: The first that disagrees, and the way out.
    """
    tied = embedding is not None
    needed = expected.keys() - ({HEAD} if tied else set())
    if missing := sorted(needed - headers.keys()):
        if missing == [HEAD]:
            raise ValueError(
                f"{directory} holds no {HEAD}, and config.json says tie_word_embeddings=false: set it to true, if the "
                "model shares its embedding with the head; else copy the checkpoint again"
            )
        raise ValueError(
            f"{directory} lacks {len(missing)} of the weights its config asks for, {missing[0]} among them"
            f"{_renamed(headers, expected)}: an incomplete copy, or the config of another model; copy or convert it "
            "again"
        )
    for name in sorted(headers.keys() & expected.keys()):
        if headers[name].shape != expected[name]:
            raise ValueError(
                f"{headers[name].file} holds {name} of shape {headers[name].shape}, config.json asks for "
                f"{expected[name]}: weights and config belong to different models (mismatched); copy one of them again"
            )
    if unexpected := sorted(headers.keys() - expected.keys()):
        name = unexpected[0]
        bias = "; if the model has biases, set attention_bias or mlp_bias, where its family reads them"
        raise ValueError(
            f"{headers[name].file} holds {name}, which config.json does not ask for ({len(unexpected)} such tensors); "
            f"they would be dropped{bias if name.endswith('.bias') else ''}: use the config that was saved with them"
        )
    if embedding is not None and HEAD in headers and not _equal(headers, embedding, HEAD):
        raise ValueError(
            f"{directory}/config.json says tie_word_embeddings=true, and {headers[HEAD].file.name} holds a {HEAD} that "
            f"differs from {embedding}: set tie_word_embeddings to false, if the model has a head of its own"
        )


def _renamed(headers: Mapping[str, Header], expected: Mapping[str, tuple[int, ...]]) -> str:
    strange = sorted(headers.keys() - expected.keys())
    return f", and holds {strange[0]} instead" if strange else ""


def _equal(headers: Mapping[str, Header], one: str, other: str) -> bool:
    """Compare two tensors of the files chunk by chunk, and stop at the first difference."""
    with (
        safe_open(headers[one].file, framework="pt") as left,
        safe_open(headers[other].file, framework="pt") as right,
    ):
        a, b = left.get_slice(one), right.get_slice(other)
        rows = headers[one].shape[0]
        return all(torch.equal(a[n : n + CHUNK], b[n : n + CHUNK]) for n in range(0, rows, CHUNK))


def stored_dtype(directory: Path, headers: Mapping[str, Header]) -> torch.dtype:
    """Return the one dtype of the weights.

    Raises:
        ValueError: They have several, or one that kvp does not compute with, such as a quantised one.
    """
    first: dict[str, str] = {}
    for name, header in headers.items():
        first.setdefault(header.dtype, name)
    if strange := sorted(first.keys() - DTYPES.keys()):
        name = first[strange[0]]
        raise ValueError(
            f"{headers[name].file} holds {name} as {strange[0]}, kvp reads {', '.join(DTYPES)}: "
            "dequantise or convert it once with from_pretrained(DIR, dtype='bfloat16').save_pretrained(OTHER)"
        )
    if len(first) > 1:
        mixed = ", ".join(f"{name} as {dtype}" for dtype, name in sorted(first.items()))
        raise ValueError(
            f"{directory} mixes dtypes: {mixed}. Convert it once to one of them with "
            "from_pretrained(DIR, dtype='float32').save_pretrained(OTHER)"
        )
    return DTYPES[next(iter(first))]


def parameters(expected: Mapping[str, tuple[int, ...]], tied: bool) -> int:
    """Return how many parameters the tensors have; a shared head counts once."""
    return sum(prod(shape) for name, shape in expected.items() if not (tied and name == HEAD))
