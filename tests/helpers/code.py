"""A process that has looked at no source yet, for tests that edit code."""

from __future__ import annotations

import sys

from kvp import code


def forget(*packages: str) -> None:
    """Forget what `kvp.code` remembers for the life of a process, and the modules of some packages."""
    for remembered in vars(code).values():
        if hasattr(remembered, "cache_clear"):
            remembered.cache_clear()
    code._seen.clear()
    code._reached.clear()
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]
