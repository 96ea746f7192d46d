"""A package of the user's own: found by --config-dir or as an installed plugin, refused by name where it is broken."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from hydra_plugins.kvp import register
from kvp import methods, plugins
from kvp.composing import compose, target_of
from kvp.models.load import byte_tokenizer, save
from kvp.serving.check import check
from kvp.serving.write import export
from kvp.sweep.status import look
from tests.helpers.bad_options import TINY
from tests.helpers.runs import ROOT
from tests.helpers.stock import stock_model
from tests.test_command import kvp_here

EXAMPLE = ROOT / "tests" / "plugin_example"
WORDS = [*TINY, "strategy=key_norm", "corpora=sums", "calibration=sums", "evaluation=none"]
RAMP = ["strategy/allocator=ramp", "recovery=lora_sums", "recovery.max_steps=2"]


METHOD = "from kvp.strategies.methods.random import Random\nclass Mine(Random): ...\n"
YAML = "defaults: [random]\n_target_: gt_p.method.Mine\n"
FINE = {"gt_p/__init__.py": "", "gt_p/method.py": METHOD, "gt_p/conf/strategy/mine.yaml": YAML}


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A directory on Python's path that packages can be put into, and a working directory beside it."""
    (tmp_path / "site").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    monkeypatch.syspath_prepend(tmp_path / "site")
    plugins.installed.cache_clear()
    yield tmp_path / "site"
    plugins.installed.cache_clear()
    for name in [name for name in sys.modules if name.startswith(("kvp_keynorm", "gt_"))]:
        del sys.modules[name]


def install(site: Path, distribution: str, entries: str, files: dict[str, str]) -> None:
    """Lay out what pip would."""
    info = site / f"{distribution.replace('-', '_')}-1.dist-info"
    tops = {name.partition("/")[0] for name in files}
    for name, text in {
        f"{info.name}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1\n",
        f"{info.name}/entry_points.txt": f"[kvp.strategies]\n{entries}\n",
        f"{info.name}/top_level.txt": "\n".join(tops),
        **files,
    }.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
    plugins.installed.cache_clear()


def install_example(site: Path) -> None:
    files = {str(path.relative_to(EXAMPLE)): path.read_text() for path in EXAMPLE.rglob("kvp_keynorm/**/*.*")}
    install(site, "kvp-keynorm", "key_norm = kvp_keynorm.method:KeyNorm", files)


def fail(record: Path) -> str:
    """Return the command that retries a run, had it failed."""
    record.write_text(record.read_text().replace('"status": "finished"', '"status": "failed"'))
    return look(record).retry


def test_a_package_of_this_directory_runs_by_config_dir(site, monkeypatch, capsys):
    shutil.copytree(EXAMPLE / "kvp_keynorm", "kvp_keynorm")
    words = ["--config-dir", "kvp_keynorm/conf", *WORDS, "strategy/allocator=ramp", "recovery=none"]
    code, stdout, stderr = kvp_here(monkeypatch, capsys, "run", *words)
    assert code == 0, stderr
    assert "-key_norm-kv_cache0.25-none-" in stdout
    (record,) = Path().glob("outputs/runs/*/run.json")
    assert fail(record) == f"python -m kvp --config-dir {Path.cwd()}/kvp_keynorm/conf {' '.join(words[2:])}"


def test_a_package_of_this_directory_runs_by_hydras_search_path(site, monkeypatch, capsys):
    shutil.copytree(EXAMPLE / "kvp_keynorm", "kvp_keynorm")
    place = "hydra.searchpath=[file://kvp_keynorm/conf]"
    code, stdout, stderr = kvp_here(monkeypatch, capsys, *WORDS, place, "recovery=none")
    assert code == 0, stderr
    assert "-key_norm-" in stdout
    (record,) = Path().glob("outputs/runs/*/run.json")
    assert fail(record) == f"python -m kvp '{place}' {' '.join(WORDS)} recovery=none"
    code, _, stderr = kvp_here(monkeypatch, capsys, place, "strategy=key_nrm")
    assert code == 1 and "Did you mean key_norm?" in stderr


def test_an_installed_plugin_needs_no_further_word(site, monkeypatch, capsys):
    install_example(site)
    code, stdout, stderr = kvp_here(monkeypatch, capsys, "sweep", *WORDS, "recovery=none", "seed=0,1")
    assert code == 0, stderr
    assert "2 of 2 jobs finished" in stdout
    record = next(Path().glob("outputs/runs/*/run.json"))
    assert fail(record).startswith("python -m kvp debug=smoke")


def test_help_and_hints_know_a_plugins_options(site, monkeypatch, capsys):
    install_example(site)
    code, stdout, _ = kvp_here(monkeypatch, capsys, "run", "--help")
    assert code == 0 and {"key_norm", "ramp", "lora_sums"} <= {*stdout.split()}
    code, stdout, _ = kvp_here(monkeypatch, capsys, "run", "--help", "strategy/allocator")
    assert "ramp Late layers give more, in a straight line" in " ".join(stdout.split())
    code, _, stderr = kvp_here(monkeypatch, capsys, "strategy=key_nrm")
    assert code == 1 and "Did you mean key_norm?" in stderr
    code, _, stderr = kvp_here(monkeypatch, capsys, *WORDS, "strategy.powr=1")
    assert code == 1 and "Did you mean strategy.power" in stderr


def test_python_finds_an_installed_plugin(site):
    install_example(site)
    assert compose(["strategy=key_norm"]).strategy.power == 2.0
    assert target_of("strategy", "key_norm") == "kvp_keynorm.method.KeyNorm"


@pytest.mark.slow
def test_python_describes_plugins_and_survives_a_broken_one(site):
    install_example(site)
    install(site, "gt-p", "mine = gt_p.method:Mine", {**FINE, "gt_p/method.py": "import gt_gone"})
    found = methods()
    assert found["key_norm"].startswith("Score a KV group by the sum")
    assert "gt_p.method cannot be imported" in found["mine"]


def test_other_applications_of_hydra_do_not_see_plugins(site, tmp_path):
    install_example(site)
    register()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.yaml").write_text("defaults: [optional strategy: key_norm]\n")
    with hydra.initialize_config_dir(str(tmp_path / "theirs"), version_base="1.3"):
        assert hydra.compose("config") == {}


@pytest.mark.parametrize(
    ("entries", "files", "line"),
    [
        (
            "mine = gt_p.method:Mine",
            {"gt_p/conf/strategy/mine.yaml": None},
            "there is no strategy=mine: the plugin gt-p is left out: gt_p has no folder conf",
        ),
        (
            "mine = gt_p.method:Mine\nother = gt_p.method:Mine",
            {},
            "there is no strategy=mine: the plugin gt-p is left out: there is no conf/strategy/other.yaml in gt_p",
        ),
        (
            "mine = gt_p.method:Mine",
            {"gt_p/conf/ratio/params.yaml": "of: x"},
            "there is no strategy=mine: the plugin gt-p is left out: its conf/ratio/params.yaml has the name of an "
            "option of kvp",
        ),
        (
            "mine = gt_p.method:Mine",
            {"gt_p/conf/machine/local.yaml": "seed: 3"},
            "there is no strategy=mine: the plugin gt-p is left out: its conf/machine/local.yaml would change",
        ),
        (
            "mine = gt_p.method:Mine",
            {"gt_p/conf/strategy/mine.yaml": ": : bad yaml ["},
            "there is no strategy=mine: the plugin gt-p is left out: its conf/strategy/mine.yaml cannot be read (",
        ),
        (
            "mine = pandas.api:Mine",
            {},
            "there is no strategy=mine: the plugin gt-p is left out: its entry point names pandas, which is not its",
        ),
        (
            "mine = gt_p.method",
            {},
            "there is no strategy=mine: the plugin gt-p is left out: its entry point mine = gt_p.method is no class",
        ),
        (
            "mine = gt_p.method:Mine",
            {"gt_p/method.py": "import gt_gone"},
            "gt_p.method cannot be imported (ModuleNotFoundError: No module named 'gt_gone'). It is of the plugin gt-p",
        ),
        (
            "mine = gt_p.method:Mine",
            {"gt_p/method.py": "raise KeyError('boom')"},
            "gt_p.method cannot be imported (KeyError: 'boom'). It is of the plugin gt-p",
        ),
        (
            "mine = gt_p.method:Mine",
            {"gt_p/method.py": "class Yours: ..."},
            "gt_p.method has no Mine. It is of the plugin gt-p",
        ),
        (
            "mine = gt_p.method:Mine",
            {"gt_p/method.py": "class Mine:\n    def __init__(self, **options): ..."},
            "strategy must be a Strategy, got a Mine: choose an option of strategy. It is of the plugin gt-p",
        ),
    ],
)
def test_a_broken_plugin_is_a_line_that_names_it_and_breaks_nothing_else(
    entries, files, line, site, monkeypatch, capsys
):
    install(
        site, "gt-p", entries, {name: text for name, text in {**FINE, **files}.items() if text is not None}
    )
    code, _, stderr = kvp_here(monkeypatch, capsys, *TINY, "strategy=mine")
    assert code == 1 and line in stderr and "pip uninstall gt-p" in stderr
    assert len(stderr.splitlines()) == 1
    assert compose(["strategy=random"]).strategy._target_ == "kvp.strategies.methods.random.Random"
    assert not capsys.readouterr().err


def test_a_plugin_that_takes_a_name_of_kvp_is_named_where_it_is_used(site, monkeypatch, capsys):
    install(site, "gt-p", "random = gt_p.method:Mine", {**FINE, "gt_p/conf/strategy/random.yaml": YAML})
    code, stdout, stderr = kvp_here(monkeypatch, capsys, *TINY, "strategy=random", "--cfg", "job")
    assert code == 0 and "kvp.strategies.methods.random.Random" in stdout
    assert stderr.startswith("kvp: strategy=random is kvp's own: the plugin gt-p is left out")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("form") / "model"
    save(stock_model("llama", "gqa", pairs=(0, 2), vocab_size=259), byte_tokenizer(), path)
    return path


@pytest.mark.slow
def test_a_form_of_the_users_own_is_proved_like_others(checkpoint, site):
    install_example(site)
    serving = export(checkpoint, Path("out"), "kvp_keynorm.forms:half")
    assert (serving["form"], serving["dtype"]) == ("kvp_keynorm.forms:half", "float16")
    assert serving["check"]["passed"] and serving["engines"] == {"transformers": "yes: verified, see check"}
    with pytest.raises(ValueError, match="opens in transformers, not in vllm"):
        check(Path("out"), "vllm")


@pytest.mark.parametrize(
    ("form", "message"),
    [
        (
            "stok",
            r"the form \(--to\) must be one of stock, .*mypkg.forms:half; got 'stok'. Did you mean stock",
        ),
        ("pandas.io:half", "names code of pandas.*say --trust pandas on the command line"),
        ("kvp_keynorm.forms:hlaf", r"kvp_keynorm.forms has no hlaf\. Did you mean half"),
    ],
)
def test_a_form_that_is_none_is_refused_before_anything_is_read(form, message, site):
    install_example(site)
    with pytest.raises(ValueError, match=message):
        export(Path("nowhere"), Path("out"), form)
    assert not Path("out").exists()


@pytest.mark.slow
def test_a_form_that_writes_something_else_is_removed(checkpoint, site, monkeypatch):
    from kvp.models.load import save as write

    def wrong(model, tokenizer, directory):
        model.model.layers[0].mlp.down_proj.weight.data.mul_(1.5)
        write(model, tokenizer, directory)

    wrong.imports = ("kvp",)
    monkeypatch.setattr("kvp.serving.write.own_form", lambda name, trusted: wrong)
    with pytest.raises(ArithmeticError, match="the export is not the checkpoint"):
        export(checkpoint, Path("out"), "mine:wrong")
    assert not Path("out").exists()


@pytest.mark.slow
def test_the_example_is_installed_and_run_by_name(tmp_path):
    """pip installs it, and every door finds it: run, sweep, status, export, check, help."""
    target = tmp_path / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    copy = shutil.copytree(EXAMPLE, tmp_path / "source")
    subprocess.run([*pip, "--target", str(target), str(copy)], check=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{target}"}

    def kvp(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kvp", *words],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "key_norm" in kvp("run", "--help")
    kvp("run", *WORDS, *RAMP)
    assert "2 of 2 jobs finished" in kvp("sweep", *WORDS, "recovery=none", "ratio.value=0.25,0.5")
    assert "3 finished" in kvp("status")
    (run,) = tmp_path.glob("outputs/runs/*0.5-none*/run.json")
    (model,) = [
        path for path in tmp_path.glob("outputs/store/prune/*/model") if path.parent.name in run.read_text()
    ]
    kvp("export", str(model), "--to", "kvp_keynorm.forms:half", "--out", "half")
    assert kvp("check", "half").endswith("passed\n")
