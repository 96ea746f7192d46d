"""The source behind a result: what it reaches, what of it nobody committed, and that an edit is another origin."""

from __future__ import annotations

import base64
import hashlib
import importlib
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from kvp import code
from kvp.code import commit, digest, edits, reachable
from tests.helpers.code import forget


@pytest.fixture(autouse=True)
def _fresh():
    forget()
    yield
    forget("mine", "beside_mine")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A user's project on the path: a package, a module beside it, an unused module."""
    write(tmp_path / "mine" / "__init__.py", "")
    write(
        tmp_path / "mine" / "rule.py",
        "from torch import nn\nfrom .parts import half\nfrom kvp.types import Plan\nclass Rule: ...\n",
    )
    write(tmp_path / "mine" / "parts.py", "def late():\n    import beside_mine\nhalf = 0.5\n")
    write(tmp_path / "mine" / "unused.py", "")
    write(tmp_path / "beside_mine.py", "import numpy, mine.spaces.inner\n")
    write(tmp_path / "mine" / "spaces" / "inner.py", "x = 1\n")  # a namespace package: it has no __init__
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_users_modules_are_followed_and_installed_ones_are_not(user):
    found = reachable(["mine.rule.Rule"])
    own = {name for name in found if not name.startswith("kvp")}
    assert own == {"mine", "mine.rule", "mine.parts", "mine.spaces.inner", "beside_mine"}
    assert {"kvp", "kvp.types"} <= found.keys() and "torch" not in found and "mine" not in sys.modules
    assert set(edits(found)) >= own
    assert edits(found)["mine.parts"] == hashlib.sha256((user / "mine" / "parts.py").read_bytes()).hexdigest()


@pytest.mark.parametrize("file", ["mine/rule.py", "mine/parts.py", "beside_mine.py", "mine/spaces/inner.py"])
def test_an_edit_anywhere_below_is_another_digest(user, file):
    before, seen = digest(reachable(["mine.rule"])), edits(reachable(["mine.rule"]))
    forget()
    with (user / file).open("a") as stream:
        stream.write("y = 2\n")
    now = edits(reachable(["mine.rule"]))
    changed = {name for name in now if now[name] != seen.get(name)}
    assert digest(reachable(["mine.rule"])) != before
    assert changed == {file.removesuffix(".py").replace("/", ".")}


def test_an_edit_while_a_process_runs_is_no_edit_of_what_it_loaded(user):
    """A sweep of hours runs the code that it started with; a reload runs the new one."""
    file = user / "mine" / "rule.py"
    module = importlib.import_module("mine.rule")
    loaded = edits(reachable(["mine.rule"]))["mine.rule"]
    write(file, "class Rule: new = True\n")
    assert edits(reachable(["mine.rule"]))["mine.rule"] == loaded
    importlib.reload(module)
    now = edits(reachable(["mine.rule"]))["mine.rule"]
    assert now != loaded and now == hashlib.sha256(file.read_bytes()).hexdigest()


def git(tree: Path, *words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tree, check=True)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A committed tree of kvp in place of the real one."""
    tree = tmp_path / "tree"
    write(tree / "kvp" / "__init__.py", "")
    write(tree / "kvp" / "rule.py", "import kvp.parts\n")
    write(tree / "kvp" / "parts.py", "half = 0.5\n")
    write(tree / "kvp" / "page.py", "")
    write(tree / "README.md", "")
    git(tree, "init", "-q")
    git(tree, "add", "-A")
    git(tree, "commit", "-qm", "all")
    monkeypatch.setattr(code, "TREE", tree)
    return tree


def test_committed_code_stands_for_itself(checkout):
    write(checkout / "README.md", "no code")
    write(checkout / "outputs" / "x.py", "no code of kvp")
    assert edits(reachable(["kvp.rule"])) == {}
    known = commit()
    assert len(known["commit"]) == 40 and known["dirty"] is False and known["dirty_sha256"] is None


@pytest.mark.parametrize("file", ["kvp/rule.py", "kvp/parts.py"])
def test_an_edit_inside_kvp_is_named_until_it_is_taken_back(checkout, file):
    text = (checkout / file).read_text()
    write(checkout / file, text + "# edited\n")
    edited, dirty = edits(reachable(["kvp.rule"])), commit()
    assert list(edited) == [file.removesuffix(".py").replace("/", ".")]
    assert dirty["dirty"] and len(dirty["dirty_sha256"]) == 64
    forget()
    git(checkout, "checkout", "-q", "--", file)
    assert edits(reachable(["kvp.rule"])) == {} and commit()["dirty"] is False


def test_an_edit_that_the_work_does_not_reach_is_dirty_but_no_part_of_it(checkout):
    write(checkout / "kvp" / "page.py", "edited = 1\n")
    write(checkout / "kvp" / "fresh.py", "new = 1\n")
    assert edits(reachable(["kvp.rule"])) == {} and commit()["dirty"] is True
    write(checkout / "kvp" / "rule.py", "import kvp.fresh\n")
    forget()
    assert list(edits(reachable(["kvp.rule"]))) == ["kvp.fresh", "kvp.rule"]


def test_without_a_checkout_a_file_is_compared_with_its_wheel(checkout, monkeypatch):
    subprocess.run(["rm", "-rf", str(checkout / ".git")], check=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(checkout.parent))

    lines = []
    for name in ("kvp/__init__.py", "kvp/rule.py", "kvp/parts.py"):
        hashed = base64.urlsafe_b64encode(hashlib.sha256((checkout / name).read_bytes()).digest()).decode()
        lines.append(f"{name},sha256={hashed.rstrip('=')},1")
    write(checkout / "kvp-9.dist-info" / "METADATA", "Metadata-Version: 2.1\nName: kvp\nVersion: 9\n")
    write(checkout / "kvp-9.dist-info" / "RECORD", "\n".join(lines))
    monkeypatch.setattr(code, "distribution", lambda name: Distribution.at(checkout / "kvp-9.dist-info"))
    assert edits(reachable(["kvp.rule"])) == {} and commit()["commit"] is None
    write(checkout / "kvp" / "parts.py", "half = 0.25\n")
    forget()
    assert list(edits(reachable(["kvp.rule"]))) == ["kvp.parts"]


def test_a_module_that_nobody_can_import_imports_nothing(user):
    write(user / "mine" / "parts.py", "print 'python 2'\nimport beside_mine\n")
    assert "mine.parts" in reachable(["mine.rule"]) and "beside_mine" not in reachable(["mine.rule"])


def test_code_that_git_ignores_is_an_edit(checkout):
    write(checkout / ".git" / "info" / "exclude", "scratch_*\n")
    write(checkout / "kvp" / "scratch_mine.py", "half = 0.1\n")
    assert list(edits(reachable(["kvp.scratch_mine"]))) == ["kvp.scratch_mine"] and commit()["dirty"]
    git(checkout, "update-index", "--assume-unchanged", "kvp/parts.py")
    write(checkout / "kvp" / "parts.py", "half = 0.25\n")
    forget()
    assert list(edits(reachable(["kvp.rule"]))) == ["kvp.parts"]


def test_a_module_imported_by_its_name_in_a_string_is_followed(user):
    write(
        user / "mine" / "parts.py",
        "import importlib\nhalf = importlib.import_module('mine.spaces.inner').x\n",
    )
    write(user / "beside_mine.py", "")
    assert "mine.spaces.inner" in reachable(["mine.rule"])


@pytest.mark.parametrize("folder", ["lib/python3/dist-packages", ".local/lib/python3.11/site-packages"])
def test_packages_installed_elsewhere_are_not_followed(user, monkeypatch, folder):
    write(user / folder / "big_library" / "__init__.py", "import big_library.more\n")
    write(user / folder / "big_library" / "more.py", "")
    monkeypatch.syspath_prepend(user / folder)
    write(user / "mine" / "parts.py", "import big_library\n")
    assert not [name for name in reachable(["mine.rule"]) if name.startswith("big_library")]


def test_a_named_package_is_followed_even_if_it_is_installed(user, monkeypatch):
    place = user / "site-packages"
    write(place / "plugin" / "__init__.py", "from .rule import Rule\n")
    write(place / "plugin" / "rule.py", "class Rule: ...\n")
    monkeypatch.syspath_prepend(place)
    assert {"plugin", "plugin.rule"} <= edits(reachable(["plugin.Rule"])).keys()


def test_the_names_that_kvp_offers_are_not_behind_every_stage():
    found = reachable(["kvp.models.load"])
    assert "kvp" in found and "kvp.models.pruned" in found
    assert not [name for name in found if name.startswith(("kvp.api", "kvp.pipeline", "kvp.composing"))]
