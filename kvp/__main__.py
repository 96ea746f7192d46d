"""`python -m kvp`: compose the configuration, run the experiment, print its table."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import textwrap
import warnings
from pathlib import Path

os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to `main`, which words them
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin lose most of a shared CPU

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hydra_plugins.kvp.ray import RayLauncher
from hydra_plugins.kvp.sweeper import KvpSweeper

HERE = Path(__file__).resolve().parent
CONF = next(path for path in (HERE / "conf", HERE.parent / "conf") if path.is_dir())


def _compute_dtype(dtype: str, device: str) -> str:
    from kvp.models.load import resolve_device, resolve_dtype

    return str(resolve_dtype(dtype, resolve_device(device))).removeprefix("torch.")


def _options_of(group: str) -> str:
    """Return the options of a group for --help, in lines of 80 characters."""
    names = sorted(path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.endswith("_shape"))
    indent = " " * 13
    return textwrap.fill(" ".join(names), 80, initial_indent=indent, subsequent_indent=indent).strip()


OmegaConf.register_new_resolver("options_of", _options_of, replace=True)
OmegaConf.register_new_resolver("compute_dtype", _compute_dtype, replace=True)

EXTRAS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm"}  # of launchers
USER_ERRORS = (
    ValueError,
    FloatingPointError,
    OSError,
    RuntimeError,
    MemoryError,
    HydraException,
    OmegaConfBaseException,
)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(config: DictConfig) -> str | None:
    """One run of a single command, or of a sweep."""
    from kvp.bars import only_on_terminals
    from kvp.pipeline.experiment import Experiment
    from kvp.pipeline.summary import print_summary

    only_on_terminals()
    for chatty in ("httpx", "accelerate", "datasets", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    command = HydraConfig.get()
    swept = command.mode == RunMode.MULTIRUN
    if swept:
        from kvp.sweep.worker import attempt, settle

        settle()
    x = Experiment.compose(config, list(command.overrides.task), command.runtime.choices)
    if swept:
        return attempt(x, command.job.num)
    from kvp.pipeline.run import run  # modelling code takes seconds, a wrong option need not wait for it

    print_summary(run(x))
    return None


def main() -> None:
    """The console script: exit code 1 and one clear error for whatever a user can mend."""
    for plugin in (KvpSweeper, RayLauncher):  # Hydra overlooks those of an editable install
        Plugins.instance().register(plugin)
    try:
        job()
    except KeyboardInterrupt:
        sys.exit("interrupted; finished stages stay, the same command goes on from them")
    except USER_ERRORS as error:
        if os.environ.get("KVP_TRACEBACK"):
            raise
        print(f"kvp: error: {_words(error)}", file=sys.stderr)
        sys.exit(1)


def _words(error: BaseException) -> str:
    """The innermost message, and the nearest valid name for a misspelt option."""
    while error.__cause__ is not None and isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error.__cause__, OmegaConfBaseException) and "not in struct" in str(error.__cause__):
            break
        error = error.__cause__
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"{error}. Lower batch sizes (calibration, evaluation, recovery), or device=cpu"
    message = str(error) or type(error).__name__
    if missing := re.search(r"Could not find '([\w/]+)/(\w+)'", message):
        return _no_such_choice(*missing.groups())
    misspelt = re.search(r"Could not override '([\w./@]+)'|Key '([\w.]+)' is not in struct", message)
    if misspelt is None:
        return message
    return f"there is no option {misspelt[1] or misspelt[2]!r}." + _nearest(misspelt[1] or misspelt[2])


def _no_such_choice(group: str, name: str) -> str:
    if group == "hydra/launcher":
        return f"launcher={name} needs another package: pip install 'kvp[{EXTRAS.get(name, '...')}]'"
    choices = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    if not choices:
        return f"there is no group {group!r}. See --help for all groups."
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"there is no {group}={name}.{hint} There are: {', '.join(choices)}"


def _nearest(name: str) -> str:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    groups = [
        word
        for word in sys.argv[1:]
        if re.fullmatch(r"[\w/]+=[\w]+", word) and (CONF / f"{word.replace('=', '/')}.yaml").is_file()
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        known = _keys(OmegaConf.to_container(compose("config", overrides=groups)), "")
    same_leaf = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6) or same_leaf[:3]
    return f" Did you mean {' or '.join(close)}?" if close else " See --cfg job for all options."


def _keys(node: object, prefix: str) -> list[str]:
    if not isinstance(node, dict):
        return []
    here = [f"{prefix}{key}" for key in node]
    return here + [name for key, child in node.items() for name in _keys(child, f"{prefix}{key}.")]


if __name__ == "__main__":
    from kvp.__main__ import main  # a sweep's launcher finds `job` in other processes by this name

    main()
