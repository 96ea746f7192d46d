"""The versions that a result names."""

from __future__ import annotations

from importlib.metadata import version

from kvp import provenance
from kvp.provenance import PACKAGES


def test_every_package_that_is_installed_is_named(monkeypatch):
    """Names of distributions are spelt in several ways: lm-eval calls itself lm_eval."""
    assert provenance._versions() == {name: version(name) for name in PACKAGES}
    monkeypatch.setattr(provenance, "PACKAGES", ("torch", "no-such-package"))
    assert provenance._versions.__wrapped__() == {"torch": version("torch")}
