"""Trackers: where a person looks at a run - Weights & Biases, a JSON-lines file, or nowhere.

    with Jsonl().run(name="kvpruner", run_id="1f3a", directory=Path("run"), config={"seed": 0}) as log:
        log.metrics({"loss": 3.2}, step=10)

A tracker shows results; the store keeps them, and nothing is ever read back from a tracker.
"""

from kvp.tracking.base import Log, RunInfo, Tracker
from kvp.tracking.jsonl import Jsonl
from kvp.tracking.nowhere import Null
from kvp.tracking.weights_and_biases import Wandb, upload_command

__all__ = ["Jsonl", "Log", "Null", "RunInfo", "Tracker", "Wandb", "upload_command"]
