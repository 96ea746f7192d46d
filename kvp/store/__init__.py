"""Stages on disk: done once per fingerprint, whole or not there."""

from kvp.store.manifest import StageError, fingerprint
from kvp.store.store import Finished, Store

__all__ = ["Finished", "StageError", "Store", "fingerprint"]
