"""The files of a checkpoint directory: JSON that parses, one set of safetensors, and no neighbour that says otherwise.

Links are followed, because the hub's cache is made of them. A broken link is refused, and so is whatever is no
ordinary file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

CONFIG = "config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def require_file(file: Path) -> None:
    """Refuse a path that is no ordinary file.

    Raises:
        FileNotFoundError: It is missing, or a link to nothing.
        ValueError: It is something else, such as a directory or a pipe.
    """
    if file.is_file():
        return
    if file.is_symlink() and not file.exists():
        raise FileNotFoundError(
            f"{file} is a link to {file.readlink()}, which is not there: copy the file itself"
        )
    if file.exists():
        raise ValueError(f"{file} is no ordinary file: copy the checkpoint again")
    raise FileNotFoundError(f"{file} is missing: copy the checkpoint again")


def read_json(file: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        FileNotFoundError: It is missing.
        ValueError: It is no JSON object, or not as transformers reads it; the message names the file.
    """
    require_file(file)

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        found = json.loads(file.read_text("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{file} cannot be read as JSON ({error}): copy it again, as plain UTF-8") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(found).__name__}: copy it again")
    return found


def require_directory(directory: Path) -> None:
    """Refuse a path that is no checkpoint directory.

    Raises:
        FileNotFoundError: It is missing, no directory, or has no config.json.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{directory} is no directory: give a checkpoint's, with {CONFIG} and safetensors"
        )
    if not (directory / CONFIG).is_symlink() and not (directory / CONFIG).exists():
        raise FileNotFoundError(
            f"{directory} has no {CONFIG}: not a checkpoint. A run's table and run.json name its checkpoints"
        )


def weight_files(directory: Path) -> list[Path]:
    """Return the safetensors that transformers opens, after refusing neighbours that contradict them.

    Raises:
        FileNotFoundError: There are none, or the index names one that is missing.
        ValueError: Two sets of weights lie there, or an adapter that is not merged.
    """
    found = sorted(directory.glob("*.safetensors"))
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory}/adapter_config.json belongs to an adapter that is not merged: merge it with peft's "
            "merge_and_unload() and save the result, or move the adapter's files away"
        )
    if not found:
        raise FileNotFoundError(f"{directory} has no safetensors weights, {_instead(directory)}")
    if (directory / WEIGHTS) in found:
        used = [directory / WEIGHTS]
    elif (directory / INDEX).exists() or (directory / INDEX).is_symlink():
        used = _indexed(directory)
    else:
        raise FileNotFoundError(
            f"{directory} has neither {WEIGHTS} nor {INDEX}, only {_some(found)}: transformers opens none of them; "
            "copy the index too"
        )
    for file in used:
        require_file(file)
    _check_single(directory, found, used)
    return used


def weight_map(directory: Path) -> dict[str, str]:
    """Return the file of each tensor that the index names.

    Raises:
        ValueError: The index has no map of tensors to files of this directory.
    """
    places = read_json(directory / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{directory / INDEX} has no weight_map: copy it again")
    for tensor, file in places.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{directory / INDEX} places {tensor} in {file!r}, which must name a safetensors file beside it: "
                "copy it again"
            )
    return places


def _indexed(directory: Path) -> list[Path]:
    return [directory / name for name in sorted(set(weight_map(directory).values()))]


def _check_single(directory: Path, found: list[Path], used: list[Path]) -> None:
    """Refuse a second set of weights that transformers could open, because nobody can say which of the two is meant.

    Publishers put other forms of the same weights beside them (pytorch_model.bin, consolidated.safetensors). Nothing
    opens those here.
    """
    others = [file for file in found if file not in used and not file.name.startswith("consolidated")]
    if used == [directory / WEIGHTS] and (directory / INDEX).exists():
        others.append(directory / INDEX)
    if others and not _published(directory):
        raise ValueError(
            f"{directory} holds two sets of weights: {_some(used)}, and {_some(others)}. kvp opens only the first: "
            "move the others away, or link the files that you mean into a directory of their own"
        )


def _published(directory: Path) -> bool:
    """Whether this is a snapshot in the hub's cache, whose sets of weights were published together."""
    return directory.parent.name == "snapshots" and (directory.parents[1] / "blobs").is_dir()


def _instead(directory: Path) -> str:
    if any(directory.glob("*.gguf")):
        return (
            "only a GGUF: kvp prunes no quantised weights. Take the model's own safetensors, or convert it once "
            "with AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE).save_pretrained(OTHER)"
        )
    return (
        "and kvp opens no pickles: convert it once with "
        "AutoModelForCausalLM.from_pretrained(...).save_pretrained(DIR) and use model=local model.path=DIR"
    )


def _some(files: list[Path]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
