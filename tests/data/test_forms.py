"""Text files as people have them: each is read right, or refused with file, row and reason before anything runs."""

from __future__ import annotations

import gzip
import json
import os
import random
import time

import pyarrow
import pytest
from pyarrow import Table, parquet

from kvp.data.corpora import FileCorpus, HubCorpus
from kvp.data.instructions import Instructions
from kvp.data.rows import LONGEST_LINE
from kvp.data.text import PackedText
from kvp.data.tokens import encode
from tests.data.test_corpora import COMMIT, hub_cache  # noqa: F401

TEXTS = ["eins, zwei", 'drei "vier"\nfünf', "", "語 sechs"]
LINES = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in TEXTS)
ARRAY = json.dumps([{"text": text, "id": 3} for text in TEXTS], indent=1)
CSV = 'id,text\n1,"eins, zwei"\n2,"drei ""vier""\nfünf"\n3,""\n4,語 sechs\n'
TSV = 'text\tid\neins, zwei\t1\n"drei ""vier""\nfünf"\t2\n\t3\n語 sechs\t4\n'


def gzipped(data: bytes, level: int = 9) -> bytes:
    """Pack bytes without the time of day, so that the names of tests are the same in all processes."""
    return gzip.compress(data, level, mtime=0)


PLAIN = "eins\nzwei, fünf, 語\n"


def corpus(path, data: bytes, **options) -> FileCorpus:
    path.write_bytes(data)
    return FileCorpus(path=str(path), **options)


def packed(columns, **kinds) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(Table.from_pydict(columns), sink, **kinds)
    return sink.getvalue().to_pybytes()


READ = {  # name -> bytes, documents, what the identity says of the reading
    "mark.txt": (PLAIN.encode("utf-8-sig"), [PLAIN], {"encoding": "utf-8-sig"}),
    "wide.txt": (PLAIN.encode("utf-16"), [PLAIN], {"encoding": "utf-16"}),
    "big-endian.txt": (b"\xfe\xff" + PLAIN.encode("utf-16-be"), [PLAIN], {"encoding": "utf-16"}),
    "widest.txt": (PLAIN.encode("utf-32"), [PLAIN], {"encoding": "utf-32"}),
    "windows.txt": (PLAIN.replace("\n", "\r\n").encode(), [PLAIN], {}),
    "packed.txt.gz": (gzipped(PLAIN.encode()), [PLAIN], {}),
    "LOUD.TXT": (PLAIN.encode(), [PLAIN], {}),
    "LOUD.Txt.GZ": (gzipped(PLAIN.encode()), [PLAIN], {}),
    "lies.txt": (
        gzipped(PLAIN.encode("utf-16")),
        [PLAIN],
        {"compression": "gzip", "encoding": "utf-16"},
    ),
    "unpacked.txt.gz": (PLAIN.encode(), [PLAIN], {"compression": "none"}),
    "rows.jsonl": (LINES.encode(), TEXTS, {}),
    "rows.JSONL.GZ": (gzipped(LINES.encode()), TEXTS, {}),
    "mark.jsonl": (LINES.encode("utf-8-sig"), TEXTS, {"encoding": "utf-8-sig"}),
    "mark.json": (ARRAY.encode("utf-8-sig"), TEXTS, {"encoding": "utf-8-sig"}),
    "wide.json": (ARRAY.encode("utf-16"), TEXTS, {"encoding": "utf-16"}),
    "indented.json": (b"\n  " + ARRAY.encode(), TEXTS, {}),
    "lines.json": (LINES.replace("\n", "\r\n").encode(), TEXTS, {}),
    "nulls.jsonl": (b'{"text": null}\nnull\n' + LINES.encode(), TEXTS, {"null_rows": "2 left out"}),
    "twice.jsonl": (LINES.encode() * 2, TEXTS * 2, {}),
    "unknown.data": (LINES.encode(), TEXTS, {}),
    "rows.csv": (CSV.encode(), TEXTS, {"format": "csv"}),
    "windows.csv": (CSV.replace("\n", "\r\n").encode(), TEXTS, {"format": "csv"}),
    "excel.CSV": (CSV.encode("utf-8-sig"), TEXTS, {"format": "csv", "encoding": "utf-8-sig"}),
    "excel.txt.csv.gz": (gzipped(CSV.encode()), TEXTS, {"format": "csv"}),
    "rows.tsv": (TSV.encode(), TEXTS, {"format": "tsv"}),
    "rows.parquet": (packed({"text": TEXTS, "id": [1, 2, 3, 4]}), TEXTS, {}),
    "dictionary.parquet": (packed({"text": pyarrow.array(TEXTS).dictionary_encode()}), TEXTS, {}),
    "nulls.parquet": (packed({"text": [None, *TEXTS]}), TEXTS, {"null_rows": "1 left out"}),
    "lies.jsonl": (packed({"text": TEXTS}), TEXTS, {"format": "parquet"}),
}


@pytest.mark.parametrize("name", READ)
def test_a_file_is_read_right_and_its_identity_says_how(tmp_path, name):
    data, documents, read = READ[name]
    source = corpus(tmp_path / name, data)
    source.check("test")
    assert source.documents("test") == documents
    identity = source.identity("test")
    assert identity.pop("read", {}) == read
    is_text = documents == [PLAIN]
    assert set(identity) == {"name", "sha256"} | (set() if is_text else {"column"})  # as ever for plain files


REFUSED = {  # name -> bytes, and what the message says beside the file
    "empty.txt": (b"", "is empty"),
    "mark-alone.txt": (b"\xef\xbb\xbf", "holds no text"),
    "blank.txt": (b"\n \n", "holds no text: blank"),
    "empty.json.gz": (gzipped(b""), "no text"),
    "latin.txt": ("eins\nfünf".encode("latin-1"), r"line 2 \(byte 0xfc after 1 bytes\) is not UTF-8.*iconv"),
    "cp1252.jsonl": ('{"text": "a"}\n{"text": "“a”"}'.encode("cp1252"), "line 2.*0x93.*not UTF-8"),
    "latin.csv.gz": (gzipped("text\nfünf".encode("latin-1")), "line 2.*not UTF-8"),
    "odd.txt": (PLAIN.encode("utf-16")[:-1], "is not UTF-16"),
    "nul.txt": (b"one\ntwo\0three", "line 2 holds a NUL"),
    "no-mark.txt": (PLAIN[:5].encode("utf-16-le"), "line 1 holds a NUL.*UTF-16"),
    "nul.csv": (b"text\na\0b\n", "line 2 holds a NUL"),
    "nul.jsonl": (b'{"text": "a\0b"}', "line 1, column 12 is no JSON"),
    "cut.jsonl": (LINES.encode()[:-5], "line 4, column 10 is no JSON.*cut short"),
    "cut.json": (ARRAY.encode()[:-5], r"line \d+, column \d+ is no JSON"),
    "middle.jsonl": (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "line 2, column 10 is no JSON"),
    "deep.json": (b"[" * 100_000, "line 1 cannot be read as JSON"),
    "long.jsonl": (b'{"text": ' + b"1" * 5000 + b"}", "line 1 cannot be read as JSON"),
    "indented.json": (b'{\n "text": "a"\n}', "line 1, column 2 is no JSON.*a list of rows"),
    "wrapped.json": (b'{"data": [{"text": "a"}]}', "line 1 has no column 'text'; it has data: set `column`"),
    "strings.json": (b'["a", "b"]', "row 1 is a string, not an object"),
    "lists.jsonl": (b'{"text": "a"}\n"b"\n', "line 2 is a string, not an object"),
    "late.jsonl": (LINES.encode() + b'{"body": "a"}\n', "line 5 has no column 'text'; it has body"),
    "number.jsonl": (b'{"text": 3}', "line 1 has a number in column 'text', not text"),
    "list.jsonl": (b'{"text": "a"}\n{"text": ["b"]}', "line 2 has a list in column 'text'"),
    "chat.json": (b'[{"text": [{"role": "user", "content": "a"}]}]', "row 1 has a list"),
    "bool.jsonl": (b'{"text": true}', "has true or false"),
    "half.jsonl": (b'{"text": "\\ud83d"}', "line 1 holds half a character"),
    "nulls.jsonl": (b'{"text": null}\n' * 3, "holds no text: none in column 'text' of 3 rows"),
    "nothing.json": (b"[]", "holds no text: none in column 'text' of 0 rows"),
    "numbers.parquet": (packed({"text": [1, 2]}), "row 1 has a number"),
    "lists.parquet": (packed({"text": [["a"]]}), "row 1 has a list"),
    "bytes.parquet": (packed({"text": [b"a"]}), "row 1 has a bytes"),
    "other.parquet": (packed({"body": ["a"], "id": [1]}), "row 1 has no column 'text'; it has body, id"),
    "cut.parquet": (packed({"text": TEXTS})[:-9], "damaged or truncated parquet"),
    "lies.parquet": (LINES.encode(), "is no parquet file: it begins with"),
    "ragged.csv": (b"id,text\n1,a\n2,b,c\n", "line 3 has 3 cells, the header 2"),
    "quote.csv": (b'id,text\n1,"a\n', "line 2 is no ','-separated row: unexpected end of data"),
    "semicolon.csv": (b"id;text\n1;a\n", "line 2 has no column 'text'; it has id;text"),
    "twice.csv": (b"text,text\na,b\n", "line 1 names a column twice"),
    "header.csv": (b"id,text\n", "holds no text"),
    "cut.txt.gz": (gzipped(random.Random(0).randbytes(9999).hex().encode())[:-99], "truncated gzip"),
    "crc.jsonl.gz": (gzipped(LINES.encode())[:-8] + bytes(8), "damaged or truncated gzip"),
    "cut-head.txt": (b"\x1f\x8b\x08", "damaged or truncated gzip"),
    "twice.txt.gz": (gzipped(gzipped(b"a")), "gzip within gzip"),
    "packed.txt": (b"PK\x03\x04rest", "is a zip archive: unpack it"),
    "paper.txt": (b"%PDF-1.7 ", "is a PDF"),
    "table.arrow": (b"ARROW1\0\0", "is an Arrow file"),
    "notes.docm": (b"some words", r"no known suffix: rename it to one of \.txt"),
    "line.txt": (b"a" * (LONGEST_LINE + 1) + b"\nb", r"one line holds 10,000,001 characters, the bound is"),
    "line.jsonl.gz": (
        gzipped(b'{"text": "' + b"a " * LONGEST_LINE + b'"}', 1),
        "line 1: one line holds",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_with_its_name_the_row_and_the_reason(tmp_path, name):
    data, message = REFUSED[name]
    source = corpus(tmp_path / name, data)
    for read in (source.check, source.identity, source.documents):
        with pytest.raises(ValueError, match=message) as caught:
            read("test")
        assert str(tmp_path / name) in str(caught.value)


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    for path, message in (
        (tmp_path / "pipe.txt", r"pipe\.txt is a pipe: write it to a file first"),
        (tmp_path / "folder.txt", r"folder\.txt is a directory: name a file in it"),
        ("/dev/zero", "/dev/zero is a device"),
        (tmp_path / "loop.txt", r"loop\.txt"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            FileCorpus(path=str(path)).check("train")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_without_permission_is_named(tmp_path):
    source = corpus(tmp_path / "mine.txt", b"text")
    (tmp_path / "mine.txt").chmod(0)
    with pytest.raises(PermissionError, match=r"mine\.txt"):
        source.check("train")


def test_two_readings_of_one_content_are_two_corpora(tmp_path):
    one = corpus(tmp_path / "a.jsonl", LINES.encode()).identity("test")
    again = corpus(tmp_path / "a.json", LINES.encode()).identity("test")
    marked = corpus(tmp_path / "a.ndjson", LINES.encode("utf-8-sig")).identity("test")
    packed_up = corpus(tmp_path / "a.jsonl", gzipped(LINES.encode())).identity("test")
    assert one == again
    assert marked["sha256"] != one["sha256"] and marked["read"] != packed_up["read"]


def test_an_edited_file_is_read_again(tmp_path):
    source = corpus(tmp_path / "mine.jsonl", LINES.encode())
    source.check("test")
    before = source.identity("test")
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "a"}\n{"text": 3}\n')
    with pytest.raises(ValueError, match="line 2 has a number"):
        source.check("test")
    (tmp_path / "mine.jsonl").write_bytes(b'{"text": "a"}\n')
    assert source.identity("test")["sha256"] != before["sha256"]


def test_halves_that_share_a_text_or_have_none_are_refused(tmp_path):
    rows = [b'{"text": "%s"}' % text for text in (b"a", b"b", b"c", b"a")]
    with pytest.raises(ValueError, match=r"mine\.jsonl: 1 texts stand in both halves, such as 'a'"):
        corpus(tmp_path / "mine.jsonl", b"\n".join(rows), disjoint=True).check("train")
    with pytest.raises(ValueError, match="no text in one half: disjoint=true needs two rows"):
        corpus(tmp_path / "mine.jsonl", rows[0], disjoint=True).check("train")
    corpus(tmp_path / "mine.jsonl", b"\n".join(rows[:3]), disjoint=True).check("train")
    corpus(tmp_path / "mine.jsonl", b"\n".join(rows)).check("train")  # both parts are all of it anyway


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (gzipped(b'{"sentence": "a"}\n{"sentence": null}'), "not plain .null_rows 1 left out"),
        (gzipped(b'{"sentence": "a"}\n{"sentence":'), "line 2, column 13 is no JSON"),
        (gzipped('{"sentence": "ä"}'.encode("utf-16")), "not plain .encoding utf-16"),
        (b'{"sentence": "a"}', "not plain .compression none"),
        (gzipped(b'{"sentence": "a"}')[:-4], "truncated gzip"),
    ],
)
def test_a_hub_file_is_read_in_check_and_is_plain_or_refused(tmp_path, data, message):
    file = tmp_path / "datasets--owner--name" / "snapshots" / COMMIT / "en" / "train.json.gz"
    file.write_bytes(data)
    hub = HubCorpus(
        repo="owner/name", revision=COMMIT, files={"train": "en/train.json.gz"}, column="sentence"
    )
    with pytest.raises(ValueError, match=message):
        hub.check("train")


EXAMPLE = {"instruction": "Name a colour.", "input": "", "output": "Blue."}


@pytest.mark.parametrize(
    "name", ["a.json", "a.jsonl", "a.CSV", "a.parquet", "a.JSON.GZ", "mark.json", "null.jsonl"]
)
def test_instructions_are_read_in_every_form(tmp_path, tokenizer, name):
    rows = [EXAMPLE, {**EXAMPLE, "input": "red"}]
    if name == "null.jsonl":
        rows = [{**EXAMPLE, "input": None}, {**EXAMPLE, "input": "red"}]
    data = {
        "a.CSV": b"instruction,input,output\nName a colour.,,Blue.\nName a colour.,red,Blue.\n",
        "a.parquet": packed({key: [row[key] for row in rows] for key in EXAMPLE}),
        "a.JSON.GZ": gzipped(json.dumps(rows).encode()),
        "mark.json": json.dumps(rows).encode("utf-8-sig"),
        "a.json": json.dumps(rows).encode(),
    }.get(name, "\n".join(map(json.dumps, rows)).encode())
    (tmp_path / name).write_bytes(data)
    source = Instructions(path=str(tmp_path / name))
    source.check({})
    first, second = source.examples(tokenizer, {})
    assert tokenizer.decode(first["input_ids"]).endswith("colour.\n\n### Response:\nBlue.")
    assert "### Input:\nred" in tokenizer.decode(second["input_ids"])
    read = {"a.CSV": {"format": "csv"}, "mark.json": {"encoding": "utf-8-sig"}}.get(name)
    assert source.identity({})["source"].get("read") == read


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{**EXAMPLE, "output": None}], "row 1 has null in 'output'"),
        ([EXAMPLE, {"instruction": "x"}], "row 2 has no column 'output'; it has input, instruction"),
        ([EXAMPLE, ["x", "y"]], "row 2 is a list, not an object"),
        ([{**EXAMPLE, "instruction": 3}], "row 1 has a number in column 'instruction'"),
        ([{**EXAMPLE, "input": ["x"]}], "row 1 has a list in column 'input'"),
        (
            [{"messages": [{"role": "user", "content": "x"}]}],
            "has no column 'instruction'; it has .*messages",
        ),
        ({"data": [EXAMPLE]}, "line 1 has no column 'instruction'; it has .*data"),
        ("text", r"line 1 is a string|no known suffix|is a string"),
        ([], "holds no rows"),
        ([None], "row 1 is null, not an object"),
    ],
)
def test_instructions_that_are_no_examples_are_refused_in_check(tmp_path, data, message):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message) as caught:
        Instructions(path=str(path)).check({})
    assert str(path) in str(caught.value)


def test_a_long_text_is_tokenised_as_far_as_it_is_read(tokenizer, drop):
    passages = "\n\n".join(drop.documents("train"))
    short = (passages * (1 + 200_000 // len(passages)))[:200_000]
    long = short + "\n" + short * (4_000_000 // len(short) + 1)
    started = time.process_time()
    limited = encode([long], tokenizer, limit=3000, bos=True)
    assert time.process_time() - started < 3
    assert limited.tolist() == encode([short], tokenizer, bos=True)[:3000].tolist()
    assert encode([short], tokenizer, limit=50).tolist() == encode([short], tokenizer)[:50].tolist()


def test_training_text_of_a_limit_reads_so_many_tokens(tmp_path, tokenizer):
    source = corpus(tmp_path / "mine.txt", b"one two three four\n" * (4_000_000 // 18))
    started = time.process_time()
    examples = PackedText(corpora=["mine"], length=64, max_tokens=640).examples(tokenizer, {"mine": source})
    assert len(examples) == 10 and time.process_time() - started < 3


SWAPS = [(b'"', b"'"), (b"\n", b""), (b"{", b"["), (b",", b"\t"), (b"text", b"txt")]


def damaged(random: random.Random, data: bytes) -> bytes:
    """Return a file after one accident: cut, overwritten, repeated, with bytes put in or a page of zeros."""
    at, other = sorted(random.randrange(len(data) + 1) for _ in range(2))
    return random.choice(
        [
            data[:at],
            data[:at] + random.randbytes(random.randint(1, 8)) + data[at:],
            data[:at] + data[other:],
            data[:at] + bytes(other - at) + data[other:],
            data[:other] + data[at:],
            data.replace(*random.choice(SWAPS)),
        ]
    )


def survives(path, seed: int) -> None:
    """A damaged file is read as some text, or refused in one line with its name; every reading agrees."""
    seeded = random.Random(seed)
    name, data = seeded.choice([(name, entry[0]) for name, entry in READ.items()])
    source = corpus(path / f"{seed}-{name}", damaged(seeded, data))
    refused = None
    try:
        source.check("train")
    except (ValueError, OSError) as error:
        refused = str(error)
    if refused is not None:
        assert f"{seed}-{name}" in refused and "\n" not in refused
        return
    documents = source.documents("train")
    assert all(isinstance(text, str) for text in documents) and "".join(documents).strip()
    assert source.identity("train")["sha256"]


@pytest.mark.parametrize("seed", range(40))
def test_no_damage_ends_in_a_traceback(tmp_path, seed):
    survives(tmp_path, seed)


@pytest.mark.slow
def test_a_thousand_damages_end_in_no_traceback(tmp_path):
    for seed in range(40, 1540):
        survives(tmp_path, seed)


@pytest.mark.slow
def test_a_hundred_megabytes_in_one_line_are_refused_in_seconds(tmp_path):
    for name, data in (("a.txt", b"a" * 10**8), ("a.jsonl", b'{"text": "' + b"word " * 2 * 10**7 + b'"}')):
        started = time.process_time()
        with pytest.raises(ValueError, match="one line holds 100,000,000 characters"):
            corpus(tmp_path / name, data).check("train")
        assert time.process_time() - started < 10
