"""Small trained tokenizers, and checkpoints of tiny models with them."""

from __future__ import annotations

import json

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from kvp.models.load import save
from kvp.serving.gguf_tokens import LETTERS, NAMES, REST
from kvp.serving.sample import TEXT
from tests.helpers.stock import stock_model

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}

BYTE_LEVEL = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    **{
        NAMES[regex]: [pre_tokenizers.Split(Regex(regex), "isolated")]
        for regex in (LETTERS + r"|\p{N}{1,3}" + REST, LETTERS + r"|\p{N}" + REST)
    },
}


def trained(name="gpt-2") -> PreTrainedTokenizerFast:
    """A BPE of the given pre-tokenizer, or SentencePiece's, trained on the sample's text."""
    if name == "sentencepiece":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(steps)
        special = [*SPECIAL.values(), *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special)
        text = TEXT.replace("ï", "")  # which is left to the bytes
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
        whole = not BYTE_LEVEL[name] or name == "smollm"
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole)
        steps = [*BYTE_LEVEL[name], level]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else level
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=340, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet
        )
        text = TEXT
    tokenizer.train_from_iterator([text] * 3, trainer)
    if name in ("llama-bpe", "sentencepiece"):  # as the real ones do
        tokenizer.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    made = tokenizer.to_str()
    if name == "sentencepiece":  # bytes are ordinary tokens there
        state = json.loads(made)
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < len(SPECIAL)]
        made = json.dumps(state)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(made), **SPECIAL)


def saved(path, family="llama", rope="default", tokenizer="gpt-2", pairs=(0, 2, 3)):
    tokens = trained(tokenizer)
    model = stock_model(family, "gqa", rope, pairs, vocab_size=len(tokens) + 5)
    save(model, tokens, path)
    return path
