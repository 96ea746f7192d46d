"""The models of a benchmark: checkpoints, and shapes whose random weights are drawn on the device."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
import yaml

import kvp
import kvp.models.pruned  # registers the pruned classes, which a command does not do at its start
from kvp.estimate.passes import weights_bytes
from kvp.estimate.serving import room
from kvp.measurement import memory
from kvp.models.caches import bytes_per_token, stored_bytes
from kvp.models.load import load_config, load_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

HERE = Path(kvp.__file__).parent
MODELS = next(path for path in (HERE / "conf", HERE.parent / "conf") if path.is_dir()) / "model"
RANDOM = "kvp.models.sources.RandomModel"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model by name; without a checkpoint its weights are random."""

    name: str
    config: PretrainedConfig
    checkpoint: Path | None = None

    def load(self, *, device: torch.device, dtype: torch.dtype, seed: int) -> PreTrainedModel:
        """Return the model in eval mode, all of it on the device."""
        if self.checkpoint is not None:
            model = load_model(self.checkpoint, dtype=dtype, device="cpu")
            return memory.place(model, device)
        torch.manual_seed(seed)
        with device:
            return transformers.AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, trust_remote_code=False
            ).eval()

    def weights_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of the parameters, from the shapes."""
        return weights_bytes(self.config, dtype.itemsize)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        """Return the bytes of keys and values per token of one sequence, from the shapes."""
        return bytes_per_token(self.config, dtype.itemsize)

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Return the bytes of keys and values of one sequence with room for `length` tokens, from the shapes."""
        return stored_bytes(self.config, dtype.itemsize, room(length))


def find_subjects(word: str) -> list[Subject]:
    """Return what a word of the command line names: a checkpoint, a run.json (its dense and pruned models), a shape.

    Raises:
        ValueError: It is none of them, or a record of another kind.
        FileNotFoundError: A run's checkpoint is not there any more.
    """
    path = Path(word)
    if path.suffix == ".json" or (path / "run.json").is_file():
        return _recorded(path if path.suffix == ".json" else path / "run.json")
    if (path / "config.json").is_file():
        return [Subject(name=path.name or word, config=load_config(path), checkpoint=path)]
    shapes = {file.stem: file for file in sorted(MODELS.glob("*.yaml")) if RANDOM in file.read_text()}
    if word in shapes:
        fields = yaml.safe_load(shapes[word].read_text())["config"]
        return [Subject(name=word, config=transformers.AutoConfig.for_model(**fields))]
    raise ValueError(
        f"{word} is no model: give a directory with a config.json, a run.json, or a shape of "
        f"{', '.join(shapes)}"
    )


def _recorded(path: Path) -> list[Subject]:
    if not path.is_file():
        raise ValueError(f"there is no {path}: a run writes its run.json into outputs/runs/NAME")
    subjects = []
    for name, place in _places(path):
        checkpoint = Path(place)
        if not (checkpoint / "config.json").is_file():
            raise FileNotFoundError(
                f"{path} names the checkpoint {place}, which is not there: repeat its run, or bench a checkpoint "
                "that is"
            )
        subjects.append(Subject(name=name, config=load_config(checkpoint), checkpoint=checkpoint))
    first, second = subjects
    return subjects if first.checkpoint != second.checkpoint else subjects[:1]


def _places(path: Path) -> list[tuple[str, str]]:
    """Return the names and checkpoints of the dense and the pruned model in a run.json."""
    try:
        record: Any = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no run.json: {error}; repeat its run, or give a checkpoint") from error
    if isinstance(record, dict) and record.get("pruned") is None:
        raise ValueError(f"{path} records no finished run: `pruned` is missing")
    try:
        places = [("dense", record["dense"]["checkpoint"]), (record["name"], record["pruned"]["checkpoint"])]
    except (KeyError, TypeError):
        places = []
    if not places or not all(isinstance(word, str) for place in places for word in place):
        raise ValueError(
            f"{path} is no run.json: `name` and the `checkpoint` of `dense` and `pruned` are not all there; give one "
            "that a run wrote, or a checkpoint"
        )
    return places


def distinct(subjects: list[Subject]) -> list[Subject]:
    """Return the subjects without repeated checkpoints.

    Raises:
        ValueError: Two of those left have one name.
    """
    found: dict[str, Subject] = {}
    for subject in subjects:
        if any(subject.checkpoint and subject.checkpoint == other.checkpoint for other in found.values()):
            continue
        if subject.name in found:
            raise ValueError(
                f"two models are called {subject.name}, and a row is known by its name: give one of them by "
                "another path or leave it out"
            )
        found[subject.name] = subject
    return list(found.values())
