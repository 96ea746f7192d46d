"""The tokenizer of a checkpoint: there, readable, without code of its own, and no larger than the embedding."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvp.models.checkpoint.fields import REMOTE, check_ids
from kvp.models.checkpoint.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
GENERIC = ("TokenizersBackend", "PreTrainedTokenizerFast")
PROBE = "A probe, 1 2."
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def open_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint; no code of the checkpoint runs.

    Raises:
        FileNotFoundError: It has none.
        ValueError: A file cannot be read, or asks for code; the message names it.
    """
    import transformers

    if not any(all((directory / name).exists() for name in names) for names in VOCABULARIES):
        raise FileNotFoundError(
            f"{directory} has no tokenizer, such as {VOCABULARIES[0][0]}: copy the tokenizer's files from the model "
            "that it was made from"
        )
    settings = {name: _settings(directory / name) for name in SETTINGS}
    options: Any = {"trust_remote_code": False, "local_files_only": True}
    try:
        opened = transformers.AutoTokenizer.from_pretrained(directory, **options)
        if settings["tokenizer_config.json"].get("tokenizer_class") in GENERIC and len(opened) > _listed(
            settings
        ):
            # the class of the model's family has put a token of its own beside those of the files
            opened = transformers.PreTrainedTokenizerFast.from_pretrained(directory, **options)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the tokenizer of {directory} cannot be opened ({type(error).__name__}: {said}): copy its files again"
        ) from error
    return opened


def _settings(file: Path) -> dict[str, Any]:
    """Return what a file says, nothing if it is not there; refuse one that asks for code."""
    found = read_json(file) if file.is_symlink() or file.exists() else {}
    if found.get(REMOTE):
        raise ValueError(
            f"{file}: {REMOTE} asks for Python code of the checkpoint, and kvp runs none: save the tokenizer once as a "
            "fast one, tokenizer.json"
        )
    return found


def _listed(settings: Mapping[str, dict[str, Any]]) -> int:
    """Return how many tokens tokenizer.json lists."""
    tokenizer = settings["tokenizer.json"]
    added = {token["content"] for token in tokenizer.get("added_tokens", ())}
    return len(added.union(tokenizer["model"]["vocab"])) if tokenizer else 0


def check_tokenizer(directory: Path, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> int:
    """Return how many tokens the tokenizer names, after refusing one that the embedding has no rows for.

    Raises:
        ValueError: Names both sizes and the way out.
    """
    names = tokenizer.get_vocab()
    largest = max(names.values(), default=-1)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {directory} has ids up to {largest}, the embedding {vocab_size} rows: take the "
            "tokenizer that belongs to the model, or resize the embedding once with "
            "resize_token_embeddings(len(tokenizer))"
        )
    try:
        ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    except Exception as error:
        raise ValueError(
            f"the tokenizer of {directory} cannot read text ({type(error).__name__}: {error}): copy its files again"
        ) from error
    if not set(ids) - {tokenizer.unk_token_id}:
        raise ValueError(f"the tokenizer of {directory} knows no word of {PROBE!r}: copy its files again")
    return len(names)


def check_generation(directory: Path, vocab_size: int) -> None:
    """Refuse a generation_config.json that no model could be saved with, or whose ids are out of range.

    Raises:
        ValueError: Names the file and what is wrong in it.
    """
    import transformers

    file = directory / "generation_config.json"
    if not file.is_symlink() and not file.exists():
        return
    fields = read_json(file)
    try:
        for name in IDS:
            check_ids(name, fields.get(name), vocab_size)
        transformers.GenerationConfig.from_dict(fields).validate(strict=True)
    except Exception as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{file}: {said} Correct it, or remove the file") from error
