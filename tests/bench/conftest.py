"""What makes the benchmark's tests quick: garbage that is not looked for, and a small copy instead of a large one."""

from __future__ import annotations

import gc

import pytest

from kvp.measurement.roofline import COPIED


@pytest.fixture(autouse=True, scope="module")
def _quick():
    gc.collect()
    gc.freeze()  # every run collects first: what was imported is no garbage, and there is a lot of it
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COPIED, "cpu", 2**24)
        yield
    gc.unfreeze()
