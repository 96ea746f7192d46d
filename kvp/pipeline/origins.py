"""Words on who made a stage: found stages of other code, and code that changed since the last run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kvp.record import RunRecord

Origin = Mapping[str, Any]


def differences(origins: Iterable[Origin], now: Origin) -> str:
    """Return how the makers of a found stage differ from what would make it now; "" if they do not.

    The machine and the number of threads do not count: what depends on them has them in its fingerprint.
    """
    origins = [origin for origin in origins if origin]
    if not origins:
        return "by whom is not known"
    said: dict[str, None] = {}
    for origin in origins:
        if origin.get("code") != now["code"]:
            said[f"kvp {_version(origin)}, now {_version(now)}"] = None
        for name, version in now["versions"].items():
            before = origin.get("versions", {}).get(name, version)  # an old record does not name all packages
            if before != version:
                said[f"{name} {before}, now {version}"] = None
        if origin.get("device") != now["device"]:
            said[f"{origin.get('device')}, now {now['device']}"] = None
    return "; ".join(said)


def _version(origin: Origin) -> str:
    """Return the commit, or outside a checkout the version; "+" says that code was edited."""
    edited = "+" if origin.get("dirty") or origin.get("edits") else ""
    return (str(origin.get("commit") or origin.get("kvp"))[:8]) + edited


def made_by_others(found: Mapping[str, list[str]]) -> str:
    """Return the one line on found stages of other code.

    Args:
        found: Kinds of stages, by how their makers differ.
    """
    listed = "; ".join(f"{', '.join(dict.fromkeys(kinds))} ({words})" for words, kinds in found.items())
    kinds = ",".join(dict.fromkeys(kind for kinds in found.values() for kind in kinds))
    return f"found, but made by other code: {listed}. force=[{kinds}] computes them again"


def changed_since(earlier: RunRecord | None, model: str, place: str, edits: Mapping[str, str]) -> list[str]:
    """Return the modules nobody committed that are new, gone or different since a run recorded a stage."""
    before = next(
        (each for each in earlier.stages if (each.model, each.name) == (model, place))
        if earlier
        else iter(()),
        None,
    )
    if before is None:
        return []
    return sorted(name for name in {*edits, *before.edits} if edits.get(name) != before.edits.get(name))
