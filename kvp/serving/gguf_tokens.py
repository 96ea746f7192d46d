"""A tokenizer.json as GGUF metadata, for llama.cpp's two kinds of BPE: on bytes, and SentencePiece's.

llama.cpp knows byte-level pre-tokenizers by name only, and reads the text differently, without a word, under
another name. So the name is taken from the pre-tokenizer itself, and what has none is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMES = {  # what the text is split by, and what llama.cpp calls that
    "digits": "smollm",
    "": "gpt-2",
    LETTERS + r"|\p{N}{1,3}" + REST: "llama-bpe",
    LETTERS + r"|\p{N}" + REST: "qwen2",
}
NO_MERGE = "\u0100 \u0100"  # llama.cpp refuses an empty list; it splits what no token is into bytes again
BYTE = re.compile("<0x[0-9A-F]{2}>")


def add_tokens(writer: gguf.GGUFWriter, directory: Path, vocab_size: int) -> None:
    """Write the vocabulary, padded to the rows of the embedding, the special tokens and the chat template.

    Raises:
        ValueError: llama.cpp has no such tokenizer.
    """
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    model = tokenizer["model"]
    if model["type"] != "BPE":
        raise ValueError(f"no GGUF for a tokenizer of type {model['type']}: only BPE is supported")
    sentencepiece = model.get("byte_fallback", False)
    if sentencepiece and not model["merges"]:
        raise ValueError(
            "no GGUF for a SentencePiece tokenizer without merges: llama.cpp would score every token 0"
        )
    pieces, types = _pieces(tokenizer, vocab_size, model.get("unk_token") if sentencepiece else None)
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _split_name(tokenizer["pre_tokenizer"]))
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    if sentencepiece:
        writer.add_token_scores(_scores(model["merges"], pieces))
        writer.add_add_space_prefix(_prefixes_space(tokenizer))
    elif not model["merges"]:
        writer.add_token_merges([NO_MERGE])
    special = gguf.SpecialVocab(directory, load_merges=not sentencepiece, n_vocab=vocab_size)
    for name in ("bos", "eos"):
        special.add_special_token.setdefault(name, False)  # llama.cpp has other defaults
    special.add_to_gguf(writer, quiet=True)


def _pieces(
    tokenizer: dict[str, Any], vocab_size: int, unknown: str | None
) -> tuple[list[str], list[TokenType]]:
    pieces = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [TokenType.UNUSED] * vocab_size
    for piece, index in tokenizer["model"]["vocab"].items():
        pieces[index], types[index] = piece, TokenType.NORMAL
        if unknown and BYTE.fullmatch(piece):
            types[index] = TokenType.BYTE
    for added in tokenizer["added_tokens"]:
        pieces[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        if added["content"] == unknown:
            types[added["id"]] = TokenType.UNKNOWN
    return pieces, types


def _split_name(pre_tokenizer: dict[str, Any] | None) -> str:
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer])
    splits = [
        "digits" if step["type"] == "Digits" and step["individual_digits"] else step["pattern"]["Regex"]
        for step in steps
        if step and step["type"] in ("Digits", "Split") and "String" not in step.get("pattern", {})
    ]
    known = all(step and step["type"] in ("Digits", "Split", "ByteLevel") for step in steps)
    if not known or "".join(splits) not in NAMES:
        raise ValueError(
            f"no llama.cpp pre-tokenizer is known to split text like {json.dumps(pre_tokenizer)[:300]}: export "
            "--to stock and convert with llama.cpp's own converter, if head_dim is the dense model's"
        )
    return NAMES["".join(splits)]


def _scores(merges: list[Any], pieces: list[str]) -> list[float]:
    """llama.cpp merges the pair whose union scores highest, tokenizers the pair that is listed first."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(merges):
        rank.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), index)
    return [-float(rank.get(piece, 0)) for piece in pieces]


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    steps = [
        step
        for part in (tokenizer["normalizer"], tokenizer["pre_tokenizer"])
        for step in (part or {}).get("normalizers", (part or {}).get("pretokenizers", [part]))
        if step
    ]
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step["prepend_scheme"] != "never")
        for step in steps
    )
