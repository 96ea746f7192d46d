"""A tiny random Llama over bytes."""

from __future__ import annotations

import pytest

from kvp.models.load import byte_tokenizer
from tests.conftest import tiny_model


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model(tokenizer):
    return tiny_model(vocab_size=len(tokenizer))
