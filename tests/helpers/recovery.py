"""Recoveries of a small checkpoint on a small text, in this process or one that is killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from kvp.data.text import PackedText
from kvp.recovery.lora import Lora
from kvp.recovery.training import train
from tests.process import start

TEXT = (
    " ".join(
        f"the {animal} {verb} the {thing}"
        for animal in ("cat", "dog", "cow", "hen")
        for verb in ("sees", "eats", "likes")
        for thing in ("grass", "corn", "milk", "bread", "moon")
    )
    * 4
)

OPTIONS: dict[str, Any] = {
    "learning_rate": 3e-2,
    "max_steps": 25,
    "batch_size": 4,
    "micro_batch_size": 2,
    "warmup_steps": 2,
    "dropout": 0.05,
    "scheduler": "linear",
    "validation": 0,
    "dtype": "float32",
    "save_steps": 7,
}


def save_checkpoint(path: Path, dtype: torch.dtype = torch.float32, hidden_size: int = 32) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel(unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(special_tokens=["?"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(path)
    return path


def make(**changes: Any) -> Lora:
    return Lora(**{"data": PackedText(corpora=["text"], length=16), **OPTIONS, **changes})


def recover(recovery: Lora, checkpoint: Path, directory: Path, corpora, seed: int = 0) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    return train(recovery, checkpoint, directory, corpora=corpora, seed=seed, device="cpu")


def adapter(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter" / "adapter_model.safetensors")


def train_here(checkpoint, directory, corpora, options):
    """What is killed: recovery in a process of its own."""
    torch.set_num_threads(1)
    recipe = make(max_steps=60, **options)
    train(recipe, checkpoint, directory, corpora=corpora, seed=3, device="cpu")


def train_until_killed(checkpoint, directory, corpora, **options):
    """Until there are losses of more than 16 steps."""
    directory.mkdir()
    losses = directory / "losses.jsonl"
    child = start(train_here, checkpoint, directory, corpora, options)
    while child.is_alive() and not (losses.exists() and losses.read_text().count("\n") > 16):
        time.sleep(0.002)
    child.kill()
    child.join()
    assert child.exitcode == -signal.SIGKILL
