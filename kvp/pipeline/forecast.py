"""Seconds that stages will take, by the seconds of the same work on a sibling model or in an earlier run.

Work is the same where stage, version, options and device agree, and the model comes from the same dense one. Ratio,
seed and edits of code may differ. Nothing is guessed for work that the store has never seen.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from kvp.pipeline.session import MAKERS
from kvp.provenance import hardware
from kvp.store import Store

FINGERPRINT = re.compile("[0-9a-f]{64}")
MAY_DIFFER = ("seed", "value", "code")  # of the draw, of the budget, and edits
DERIVED = tuple({stage for stages in MAKERS.values() for stage in stages} - {"model"})


def kind_of_work(stage: str, version: int, inputs: Mapping[str, Any], dense: str) -> str:
    """Return what stages of about the same cost have in common, as JSON; `dense` is their dense model's fingerprint."""
    return json.dumps([stage, version, dense, _common(inputs)], sort_keys=True)


class Forecast:
    """Seconds by kind of work, as a store has seen it on a device (`device_of`)."""

    def __init__(self, store: Store, device: str) -> None:
        self._store, self._device = store, device
        self._seconds: dict[str, list[float]] = {}
        self._dense: dict[str, str] = {}

    def learn(self, stages: Iterable[str]) -> None:
        """Read what the finished stages of these names took; what cannot be read teaches nothing."""
        self._seconds = {}
        for name in sorted(set(stages)):
            for file in (self._store.root / name).glob("[!.]*/manifest.json"):
                try:
                    manifest = json.loads(file.read_bytes())
                    if manifest["stage"] == name and self._tells(manifest.get("origins", ())):
                        self.add(self._kind(manifest), float(manifest["seconds"]))
                except (OSError, ValueError, TypeError, KeyError, AttributeError):
                    continue

    def add(self, kind: str, seconds: float) -> None:
        """Note what work of a kind took."""
        self._seconds.setdefault(kind, []).append(seconds)

    def seconds(self, kind: str) -> float | None:
        """Return what work of a kind took, as a median; None if it was never seen."""
        return median(self._seconds[kind]) if kind in self._seconds else None

    def left(self, kinds: Sequence[str]) -> str:
        """Return "about 6 min left", with the number of stages whose time nobody knows; empty if nothing is left."""
        known = [seconds for kind in kinds if (seconds := self.seconds(kind)) is not None]
        unknown = len(kinds) - len(known)
        words = [f"about {duration(sum(known))}"] if known else []
        words += [f"{unknown} stage{'s' * (unknown > 1)} of unknown time"] if unknown else []
        return f"{' and '.join(words)} left" if words else ""

    def _tells(self, origins: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether one process did the whole work, on this device; of more, the last one's seconds are known."""
        return [origin.get("device_name", self._device) for origin in origins] in ([], [self._device])

    def _kind(self, manifest: Mapping[str, Any]) -> str:
        inputs = manifest["inputs"]
        dense = self._ancestor(inputs["model"]) if "model" in inputs else manifest["fingerprint"]
        return kind_of_work(manifest["stage"], manifest["version"], inputs, dense)

    def _ancestor(self, model: str) -> str:
        """Return the dense model that a model was made of, by fingerprint; itself if no stage of the store made it."""
        if model not in self._dense:
            files = (self._store.place(name, model) / "manifest.json" for name in DERIVED)
            made = next((file for file in files if file.exists()), None)
            parent = json.loads(made.read_bytes())["inputs"]["model"] if made else model
            self._dense[model] = parent if parent == model else self._ancestor(parent)
        return self._dense[model]


def device_of(device: str) -> str:
    """Return the model of the CPU or GPU that "cpu" or "cuda" means here."""
    return str(hardware(device)["device"])


def duration(seconds: float) -> str:
    """Return a duration as a person says it: "40 s", "6 min", "2.5 h"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 99.5 * 60 else f"{seconds / 3600:.1f} h"


def _common(value: Any) -> Any:
    """Return inputs without fingerprints and without what may differ."""
    if isinstance(value, Mapping):
        kept = {
            key: item for key, item in value.items() if key not in MAY_DIFFER and not _is_fingerprint(item)
        }
        return {key: _common(item) for key, item in kept.items()}
    return [_common(item) for item in value] if isinstance(value, list | tuple) else value


def _is_fingerprint(value: Any) -> bool:
    return isinstance(value, str) and FINGERPRINT.fullmatch(value) is not None
