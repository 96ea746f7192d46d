"""A `_target_` is code: classes of kvp, of this directory and of trusted packages are made, others are refused."""

from __future__ import annotations

import sys

import pytest

from kvp.pipeline.targets import check_targets, check_trusted


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A researcher's directory with a package and a module of its own, and an installed package elsewhere."""
    files = {
        "work/gt_own/__init__.py": "",
        "work/gt_own/methods.py": "class Mine: ...\ndef make(): ...\nVALUE = 3\n",
        "work/gt_single.py": "class Mine: ...\n",
        "work/gt_broken.py": "import gt_not_there\n",
        "work/gt_typo.py": "def (:\n",
        "site/gt_installed/__init__.py": "class Theirs: ...\n",
        "site/gt_other.py": "class Theirs: ...\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "work")
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("gt_")]:
        del sys.modules[name]


def config(target):
    return {"strategy": {"_target_": "kvp.strategies.methods.random.Random", "parts": [{"_target_": target}]}}


@pytest.mark.parametrize("target", ["gt_own.methods.Mine", "gt_own.methods.make", "gt_single.Mine"])
def test_code_of_this_directory_needs_no_word(project, target):
    check_targets(config(target), [])


@pytest.mark.parametrize("target", ["gt_installed.Theirs", "gt_other.Theirs"])
def test_an_installed_package_is_named_as_trusted(project, target):
    root = target.partition(".")[0]
    with pytest.raises(ValueError, match=rf"strategy\.parts\.0\._target_={target}.*trusted=\[{root}\]"):
        check_targets(config(target), [])
    assert root not in sys.modules  # nothing of it has run
    check_targets(config(target), [root])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "names code of os"),
        ("builtins.eval", "names code of builtins"),
        ("pandas.read_pickle", "names code of pandas"),
        ("torch.load", "names code of torch"),
        ("transformers.AutoConfig.from_pretrained", "names code of transformers"),
        ("kvp.store.shutil.rmtree", "cannot be imported"),
        ("kvp.measurement.measure.subprocess.run", "cannot be imported"),
        ("kvp.models.load.Path", "is no class of kvp"),
        ("kvp.models.load.load_model", "is no class of kvp"),
        ("kvp.types.Bugdet", "Did you mean Budget?"),
        ("kvp.nowhere.Class", "cannot be imported"),
        ("gt_own.methods.VALUE", "is no class, it is 3"),
        ("gt_own.methods.Mien", "Did you mean Mine?"),
        ("gt_broken.Mine", "gt_broken cannot be imported .*gt_not_there"),
        ("gt_typo.Mine", "gt_typo cannot be imported .*line 1"),
        ("gt_nowhere.Mine", "names code of gt_nowhere"),
        ("Mine", "must be a class such as"),
        (None, "must be a class such as"),
        ("", "must be a class such as"),
        ("..", "must be a class such as"),
    ],
)
def test_other_code_is_refused_by_name(project, target, message):
    with pytest.raises(ValueError, match=message):
        check_targets(config(target), [])


def test_a_file_may_not_trust_itself():
    assert check_trusted(["mypkg"], ["seed=1", "trusted=[mypkg]"]) == ["mypkg"]
    assert check_trusted(["mypkg"], None) == ["mypkg"]  # composed in Python
    assert check_trusted([], ["seed=1"]) == []
    with pytest.raises(ValueError, match="a file may not trust itself"):
        check_trusted(["mypkg"], ["seed=1"])


@pytest.mark.parametrize("trusted", ["os", None, 3, ["a.b"], [1], [None], {"os": 1}])
def test_trusted_is_a_list_of_packages(trusted):
    with pytest.raises(ValueError, match="trusted must be a list of top-level packages"):
        check_trusted(trusted, None)
