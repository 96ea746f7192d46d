"""Rows of data files, and one column of them as texts; what cannot be read is refused with file, row and reason."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from pyarrow.lib import ArrowException
from pyarrow.parquet import ParquetFile

from kvp.data.files import Form, form_of, text_of

LONGEST_LINE = 10_000_000  # characters; a longer line takes a tokenizer minutes and gigabytes
NUL = "holds a NUL: it is binary, or UTF-16 without its byte order mark"
HINT = "a .json file holds a list of rows, a .jsonl file one row a line"


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of a file, how it was read, and how many rows without a text (null) were left out."""

    documents: list[str]
    form: Form
    nulls: int


def rows(path: Path, form: Form | None = None) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a file, each after its place: "data.jsonl, line 3".

    Raises:
        OSError: The file cannot be opened.
        ValueError: The file holds no rows, or a row cannot be read.
    """
    form = form or form_of(path)
    if form.format == "parquet":
        yield from _parquet(path)
    elif form.format == "text":
        raise ValueError(f"{path} holds plain text: rows come from .json, .jsonl, .csv, .tsv or .parquet")
    else:
        with text_of(path, form) as stream:
            if form.format == "json":
                yield from _json(path, stream)
            else:
                yield from _separated(path, stream, "\t" if form.format == "tsv" else ",")


def read_texts(path: Path, column: str, limit: int | None = None) -> Texts:
    """Return the text of a plain file as one document, or one column of the first `limit` rows of any other.

    Raises:
        OSError: The file cannot be opened.
        ValueError: A row has no such column or no text there, or the file has no text at all.
    """
    form, nulls, documents = form_of(path), 0, []
    if form.format == "text":
        with text_of(path, form) as stream:
            documents = [stream.read()]
        if (nul := documents[0].find("\0")) >= 0:
            raise ValueError(f"{path}, line {documents[0].count(chr(10), 0, nul) + 1} {NUL}")
        _check_lines(documents[0], str(path))
    else:
        for place, row in islice(rows(path, form), limit):
            text = None if row is None else cell(row, column, place)
            if text is None:
                nulls += 1
            else:
                documents.append(text)
    if not any(text and not text.isspace() for text in documents):
        count = (
            f"none in column {column!r} of {len(documents) + nulls} rows"
            if form.format != "text"
            else "blank"
        )
        raise ValueError(f"{path} holds no text: {count}")
    return Texts(documents=documents, form=form, nulls=nulls)


def cell(row: Any, column: str, place: str, way_out: str = "set `column`") -> str | None:
    """Return the text in a column of a row, None for a null.

    Raises:
        ValueError: The row has no such column, or no text there; the message ends with the way out.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{place} is {_kind(row)}, not an object with columns: {way_out}")
    if column not in row:
        raise ValueError(f"{place} has no column {column!r}; it has {_listed(row)}: {way_out}")
    text = row[column]
    if text is None:
        return None
    if not isinstance(text, str):
        raise ValueError(f"{place} has {_kind(text)} in column {column!r}, not text: {way_out}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} holds half a character, {text[error.start]!r}: mend the row") from None
    _check_lines(text, place)
    return text


def _listed(names: Iterable[Any]) -> str:
    """Return names of columns in one line."""
    words = (str(name) if str(name).isprintable() else repr(name) for name in names)
    return ", ".join(words)[:300]


def _kind(value: Any) -> str:
    names = {type(None): "null", list: "a list", dict: "an object", str: "a string", bool: "true or false"}
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}"
    )


def _check_lines(text: str, place: str) -> None:
    """Refuse a line that no tokenizer ends with in seconds."""
    start = 0
    while len(text) - start > LONGEST_LINE:
        end = text.rfind("\n", start, start + LONGEST_LINE + 1)
        if end < 0:
            length = (text.find("\n", start) + 1 or len(text) + 1) - 1 - start
            raise ValueError(
                f"{place}: one line holds {length:,} characters, the bound is {LONGEST_LINE:,}: break it, such as by "
                "fold -s -w 1000"
            )
        start = end + 1


def _json(path: Path, stream: TextIO) -> Iterator[tuple[str, Any]]:
    """Yield the items of an array, or the values of lines; blank lines are none."""
    start = stream.read(1)
    while start.isspace():
        start = stream.read(1)
    stream.seek(0)
    if start == "[":
        for number, row in enumerate(_parsed(stream.read(), path), start=1):
            yield f"{path}, row {number}", row
        return
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield f"{path}, line {number}", _parsed(line, path, number)


def _parsed(text: str, path: Path, line: int | None = None) -> Any:
    """Return the value of JSON text: a whole file, or one line of it."""
    try:
        return json.loads(text.rstrip("\n"))
    except json.JSONDecodeError as error:
        cut = "" if text.endswith("\n") or text.endswith(("]", "}")) else "; the file seems cut short"
        raise ValueError(
            f"{path}, line {line or error.lineno}, column {error.colno} is no JSON ({error.msg}){cut}: {HINT}"
        ) from None
    except (RecursionError, ValueError) as error:  # too deep; a number of too many digits
        raise ValueError(f"{path}, line {line or 1} cannot be read as JSON ({error})") from None


def _separated(path: Path, stream: TextIO, delimiter: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows below the header of a CSV or TSV file; quotes are doubled, quoted line breaks are text."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(stream, delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            place = f"{path}, line {reader.line_num}"
            if any("\0" in cell for cell in cells):
                raise ValueError(f"{place} {NUL}")
            if cells and not header:
                header = cells
                if len({*header}) < len(header):
                    raise ValueError(f"{place} names a column twice: {_listed(header)}")
            elif cells:
                if len(cells) != len(header):
                    wide = f"{len(cells)} cells, the header {len(header)}"
                    raise ValueError(f"{place} has {wide}: quote what holds a {delimiter!r}")
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num} is no {delimiter!r}-separated row: {error}"
        ) from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is a damaged or truncated parquet file: {' '.join(str(error).split())}"
        ) from error
