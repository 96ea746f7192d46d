"""Disks and services: room for stages and downloads, W&B, the hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import get_token
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE

from kvp.doctor.finding import GIB, Finding, either

LITTLE = 5 * GIB  # free bytes below which a disk is mentioned
SECONDS = 4.0  # in which the hub has to answer


def places(store: Path) -> Iterator[Finding]:
    """Yield the free disk of the store and of the hub's cache."""
    for name, path, way in (
        ("store", store, "store=DIR names another, kvp store gc makes room"),
        ("hub's cache", Path(HF_HUB_CACHE), "HF_HOME=DIR names another"),
    ):
        present = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        free, writable = shutil.disk_usage(present).free, os.access(present, os.W_OK)
        fault = "" if writable else "not writable"
        fault = fault or (f"less than {LITTLE / GIB:.0f} GiB" if free < LITTLE else "")
        yield either("places", name, not fault, f"{path}, {free / GIB:.1f} GiB free", f"{fault}: {way}")


def services() -> Iterator[Finding]:
    """Yield whether W&B is logged in, and whether the hub answers."""
    logged_in = _wandb_key()
    said = "logged in" if logged_in else "not logged in"
    yield either("services", "W&B", logged_in, said, "tracker.mode=online: wandb login")
    if HF_HUB_OFFLINE:
        yield Finding("services", "hub", "ok", "off: HF_HUB_OFFLINE is set")
        return
    why = _silence(ENDPOINT)
    way = "models and texts of the hub: copy them here, model=local model.path=DIR"
    yield either("services", "hub", not why, why or ENDPOINT, way)
    account = get_token() is not None
    said = "a token" if account else "no token"
    yield either(
        "services", "hub account", account, said, "gated models such as model=llama2_7b: hf auth login"
    )


def _wandb_key() -> bool:
    """Return whether W&B finds a key: in the environment, or in netrc, where `wandb login` writes it."""
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0]
    try:
        entry = netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(host)
    except (OSError, NetrcParseError):
        entry = None
    return bool(os.environ.get("WANDB_API_KEY") or entry)


def _silence(address: str) -> str:
    """Return why an address does not answer; empty if it does."""
    try:
        urlopen(Request(address, method="HEAD"), timeout=SECONDS).close()
    except HTTPError:  # an answer, too
        return ""
    except (OSError, ValueError) as error:
        return f"no answer from {address}: {getattr(error, 'reason', error)}"
    return ""
