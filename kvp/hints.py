"""Errors of the command line in words: the innermost message, and the nearest valid word for a mistaken one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError

from kvp.choices import choices, config_dirs, file, own
from kvp.commands import COMMANDS
from kvp.nearest import did_you_mean
from kvp.plugins import CONF, lacking

EXTRAS = {
    "joblib": "joblib",
    "ray": "ray",
    "submitit_local": "slurm",
    "submitit_slurm": "slurm",
}  # of launchers
NO_NAMES = ("null", "true", "false", "nan", "inf")  # words that Hydra reads as values
DRY_RUN = "KVP_DRY_RUN"  # the environment variable that turns runs and sweeps into dry ones


def words(error: BaseException, command: Sequence[str] | None = None) -> str:
    """Return the innermost message, and the way out for a mistaken word of `command` (None: the process's own)."""
    command = sys.argv[1:] if command is None else command
    while error.__cause__ is not None and isinstance(error, HydraException | OmegaConfBaseException):
        if isinstance(error.__cause__, OmegaConfBaseException) and "not in struct" in str(error.__cause__):
            break
        if str(error.__cause__) in ("", "None"):  # as of the parser's own errors
            break
        error = error.__cause__
    message = str(error) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"{message}. Lower batch sizes (calibration, evaluation, recovery), or device=cpu"
    if isinstance(error, MissingMandatoryValue) and (missing := re.search(r"full_key: ([\w.]+)", message)):
        return f"{missing[1]} is not set, and this configuration needs it: say {missing[1]}=VALUE"
    if re.search(
        r"no viable alternative|LexerNoViableAlt|token recognition error|"
        r"extraneous input|mismatched input|missing EQUAL",
        message,
    ):
        return _unparsed(command)
    if several := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", message):
        key, values = several.groups()
        return (
            f"{key}={values} are several values: `kvp sweep {key}={values}` runs each. To mean one list or text, write "
            f'"{key}=[{values}]" or "{key}=\'{values}\'"'
        )
    if isinstance(error, YAMLError):
        return f"a configuration file is no YAML: {' '.join(message.split())}"
    if message.startswith("Config group override must be"):
        return _no_choice_of_a_group(command)
    if inner := re.match(r"\w+ raised while resolving interpolation: (.*)", message):
        return inner[1]
    if missing := re.search(r"Could not find '([\w/]+)/([^']*)'", message):
        return _no_such_choice(*_given(command, *missing.groups()))
    if launcher := re.search(r"Key '(\w+)' not in '\w*Conf'\s+full_key: (hydra\.launcher\.\w+)", message):
        return f"there is no option {launcher[2]!r} of this launcher: choose one with it, such as launcher=joblib"
    misspelt = re.search(r"Could not override '([^']+)'|Key '([\w.]+)' is not in struct", message)
    if misspelt is None:
        return (
            " ".join(message.split())
            if isinstance(error, HydraException | OmegaConfBaseException)
            else message
        )
    return (
        f"there is no option {misspelt[1] or misspelt[2]!r}.{_nearest(misspelt[1] or misspelt[2], command)}"
    )


def _unparsed(command: Sequence[str]) -> str:
    """Return which word of the command is no option, and how it would be one."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    for word in command:
        if word.startswith("-") or word in config_dirs():
            continue
        try:
            OverridesParser.create().parse_override(word)
        except (HydraException, ValueError):
            key, equals, value = word.partition("=")
            if not equals:
                return _no_command(word)
            quoted = value.replace("'", r"\'")
            return (
                f"{key}={value} cannot be read: quote a value with special characters for the shell and for kvp, "
                f"\"{key}='{quoted}'\""
            )
    return "an option cannot be read: quote a value with special characters twice, \"option='value'\""


def _no_command(word: str) -> str:
    """Return how a word without a value is a command, or an option."""
    if word in COMMANDS:
        return f"{word} comes first: kvp {word} ..., see kvp {word} --help"
    return (
        f"{word!r} is no option: options have the form option=value. Nor is it a command."
        f"{did_you_mean(word, COMMANDS)} Commands: {', '.join(COMMANDS)}"
    )


def _no_choice_of_a_group(command: Sequence[str]) -> str:
    """Return which word gives a group a value that names no option."""
    for word in command:
        group, _, value = word.partition("=")
        if (value.lower() in NO_NAMES or not re.search(r"[A-Za-z]", value)) and (known := choices(group)):
            return f"{group} must be one of {', '.join(known)}, got {value or 'nothing'}"
    return "an option of a group must be a name, see --help"


def parted(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags of a command with their values, and its other words: Hydra reads each in one piece only."""
    from hydra._internal.utils import get_args_parser

    takes = {
        flag: action.choices or ()
        for action in get_args_parser()._actions
        for flag in action.option_strings
        if action.nargs in (None, "?")
    }
    flags: list[str] = []
    others: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        is_value = before in takes and (word in takes[before] or not takes[before])
        (flags if word.startswith("-") or is_value else others).append(word)
    return flags, others


def check_flags(flags: Sequence[str]) -> None:
    """Refuse a long flag that neither kvp nor Hydra has.

    Raises:
        ValueError: The message names the nearest.
    """
    from hydra._internal.utils import get_args_parser

    known = [flag for action in get_args_parser()._actions for flag in action.option_strings]
    for flag in (word.partition("=")[0] for word in flags if word.startswith("--")):
        if not any(each.startswith(flag) for each in known):
            near = did_you_mean(flag, [*known, "--dry-run", "--version"])
            raise ValueError(f"there is no flag {flag}.{near} Options have no dashes: ratio.value=0.5")


def overshadowed() -> list[str]:
    """Return a line for each option of the command that a plugin has, too, and that is kvp's."""
    pairs = (word.partition("=") for word in sys.argv[1:])
    found = [(group, option, lacking(group, option)) for group, _, option in pairs]
    return [
        f"{group}={option} is kvp's own: {plugin.left_out}"
        for group, option, plugin in found
        if plugin and (CONF / group / f"{option}.yaml").is_file()
    ]


def _given(command: Sequence[str], group: str, name: str) -> tuple[str, str]:
    """Return the group and the choice that a command has: Hydra joins them, and a path has slashes of its own."""
    pairs = (word.partition("=") for word in command)
    return next(
        ((key, value) for key, _, value in pairs if f"{key}/{value}" == f"{group}/{name}"), (group, name)
    )


def _no_such_choice(group: str, name: str) -> str:
    if group == "hydra/launcher":
        return f"launcher={name} needs another package: pip install 'kvp[{EXTRAS.get(name, '...')}]'"
    if plugin := lacking(group, name):
        return f"there is no {group}={name}: {plugin.left_out}"
    known = choices(group)
    if not known:
        return f"there is no group {group!r}. See --help for all groups."
    if not name:
        return f"{group} must be one of {', '.join(known)}, got nothing"
    if group == "model" and "/" in name:
        return f"model must be a name of --help, got {name}: a path or owner/name is model=local model.path={name}"
    return f"there is no {group}={name}.{did_you_mean(name, known)} There are: {', '.join(known)}"


def _nearest(name: str, command: Sequence[str]) -> str:
    """Return where a misspelt option may be meant, or which choice of a group has it."""
    known = [key for key in _known(command) if key != name]
    group, slash, part = name.partition("/")
    if slash and choices(name):
        chosen = next((word for word in command if word.startswith(f"{group}=")), f"this {group}")
        return f" {chosen} has no {part} to choose."
    group, _, rest = name.partition(".")
    if having := [choice for choice in choices(group) if rest in _keys(_read(group, choice), "")]:
        choice = "local" if "local" in having else having[0]
        return f" It is one of {group}={choice}: choose that first."
    same_leaf = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    if near := did_you_mean(name, known, most=3):
        return near
    return f" Did you mean {' or '.join(same_leaf[:3])}?" if same_leaf else " See --cfg job for all options."


def _read(group: str, choice: str) -> Any:
    """Return the plain keys of a choice; what its defaults add is not read."""
    path = file(group, choice)
    try:
        return OmegaConf.to_container(OmegaConf.load(path)) if path else {}
    except (OSError, ValueError, YAMLError):
        return {}


def _known(command: Sequence[str]) -> list[str]:
    """Return every option of the configuration under the choices of the command; none if they do not compose."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    pairs = [(word, word.partition("=")) for word in command if re.fullmatch(r"[\w/]+=\w+", word)]
    chosen = [word for word, (group, _, choice) in pairs if file(group, choice) and group != "launcher"]
    places = ",".join(f"'{folder.absolute()}'" for folder in own())
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose("config", overrides=[*chosen, f"hydra.searchpath=[{places}]"])
            return [*_keys(OmegaConf.to_container(config), "")]
    except HydraException:
        return []


def _keys(node: Any, prefix: str) -> Iterator[str]:
    for key, child in node.items() if isinstance(node, dict) else ():
        yield f"{prefix}{key}"
        yield from _keys(child, f"{prefix}{key}.")
