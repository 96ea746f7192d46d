"""`python -m kvp`: compose the configuration, run the experiment, print its table."""

# ruff: noqa: E402 (an interrupt during the imports is a line, too)
from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

INTERRUPTED = "interrupted; finished stages stay, the same command goes on from them"


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what ends the process; an interrupt during the imports is a line."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _end
os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to `worded`
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import kvp.composing  # noqa: F401  (registers the resolvers of conf/)
from hydra_plugins.kvp import register
from kvp.choices import described
from kvp.commands import dispatch
from kvp.hints import CONF, DRY_RUN, check_flags, overshadowed, parted, words

if TYPE_CHECKING:
    from kvp.pipeline.experiment import Experiment


USER_ERRORS = (
    ValueError,
    ArithmeticError,
    OSError,
    RuntimeError,
    MemoryError,
    HydraException,
    OmegaConfBaseException,
    yaml.YAMLError,
)


@contextmanager
def worded() -> Iterator[None]:
    """Turn an error that a user can mend into one line and exit code 1; any other keeps its traceback.

    KVP_TRACEBACK=1 shows the traceback of the former, too.
    """
    try:
        try:
            yield
            sys.stdout.flush()
        except BrokenPipeError:  # such as `kvp --help | head`: the reader has what it wants
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except USER_ERRORS as error:
            if isinstance(error, ZeroDivisionError | NotImplementedError | RecursionError) or os.environ.get(
                "KVP_TRACEBACK"
            ):
                raise
            hint = " (KVP_TRACEBACK=1 shows where)" if type(error) is RuntimeError else ""
            print(f"kvp: error: {words(error)}{hint}", file=sys.stderr)
            sys.exit(1)
    except KeyboardInterrupt:
        print(INTERRUPTED, file=sys.stderr)
        sys.exit(1)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def job(config: DictConfig) -> str | None:
    """One run of a single command, or of a sweep."""
    from kvp.bars import only_on_terminals

    only_on_terminals()
    for chatty in ("httpx", "accelerate", "datasets", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return _swept(config)
    with worded():  # here, because Hydra prints the overrides before an error that reaches it
        _single(config)
    return None


def _single(config: DictConfig) -> None:
    x = _composed(config)
    if os.environ.get(DRY_RUN):
        from kvp.sweep.dry import dry_run

        dry_run([list(x.overrides or ())], [x])
        return
    from kvp.pipeline.run import run  # modelling code takes seconds, a wrong option need not wait for it
    from kvp.pipeline.summary import print_summary

    print_summary(run(x))


def _swept(config: DictConfig) -> str:
    from kvp.sweep.worker import attempt, settle

    settle()
    return attempt(_composed(config), HydraConfig.get().job.num)


def _composed(config: DictConfig) -> Experiment:
    from kvp.pipeline.experiment import Experiment

    command = HydraConfig.get()
    own = [source.path for source in command.runtime.config_sources if source.provider == "command-line"]
    places = [word for word in command.overrides.hydra if word.startswith("hydra.searchpath=")]
    words = [*places, *command.overrides.task]
    return Experiment.compose(config, words, command.runtime.choices, own[0] if own else None)


def main() -> None:
    """The console script: exit code 1 and one clear error for whatever a user can mend."""
    with worded():
        if "--version" in sys.argv[1:]:
            from kvp import __version__

            print(f"kvp {__version__}")
            return
        if os.getcwd() not in sys.path and "" not in sys.path:  # as `python -m kvp` has it
            sys.path.insert(0, os.getcwd())
        if dispatch():
            return
        if "--dry-run" in sys.argv[1:]:  # Hydra refuses flags that it does not know
            sys.argv.remove("--dry-run")
            os.environ |= {DRY_RUN: "1", "HF_HUB_OFFLINE": "1"}  # what is not here is named, not downloaded
        flags, words = parted(sys.argv[1:])
        check_flags(flags)
        groups = [word for word in words if "=" not in word]
        if {"-h", "--help"} & {*flags} and len(groups) == 1:
            print(described(groups[0]))
            return
        sys.argv[1:] = [*flags, *words]
        register()
        for line in overshadowed():
            print(f"kvp: {line}", file=sys.stderr)
        job()


if __name__ == "__main__":
    from kvp.__main__ import main  # a sweep's launcher finds `job` in other processes by this name

    main()
