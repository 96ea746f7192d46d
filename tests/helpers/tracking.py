"""A picture of one pixel, and a reader of W&B's offline runs."""

from __future__ import annotations

import base64
import struct
import time
from collections.abc import Iterator
from pathlib import Path

PNG = base64.b64decode(  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
PATIENCE = 30  # seconds that W&B's own process may take to write the last record


def records(run_directory: Path) -> list:
    """The records of an offline run that has ended."""
    (file,) = run_directory.glob("wandb/offline-run-*/run-*.wandb")
    deadline = time.time() + PATIENCE
    while True:
        found = list(_records(file.read_bytes()))
        if any(record.HasField("exit") for record in found) or time.time() > deadline:
            return found
        time.sleep(0.01)


def _records(data: bytes) -> Iterator:
    """The records of LevelDB's log format: blocks of 32 KiB, after a header of 7 bytes; half a record is none."""
    from wandb.proto.wandb_internal_pb2 import Record

    position, record = 7, b""
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        if position + 7 > len(data):
            return
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if position + 7 + length > len(data):
            return
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b""
