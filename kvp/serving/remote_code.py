"""The modelling file of a checkpoint that opens by `trust_remote_code=True`, without kvp.

The file is cut out of kvp's own source: the definitions that the twin's class needs, and no others. So no logic is
written twice. kvp never runs such a file of a stranger: it compares it with the one that it writes itself.
"""

from __future__ import annotations

import ast
import inspect
import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import kvp
from kvp.models.checkpoint.files import CONFIG, read_json
from kvp.models.family import FAMILIES, Family, family_named, family_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODULE = "modeling_kvp"
NEEDS = "transformers>=5.19,<6"  # 5.19 is that of vLLM 0.32
ROOTS = (
    ("kvp.models.configs", "config_twin"),
    ("kvp.models.pruned", "model_twin"),
    ("kvp.serving.vllm_layers", "declare_to_vllm"),
)
HEAD = '''"""The model of this checkpoint: a pruned {prefix} with widths of its own; made by kvp {version}.

    AutoModelForCausalLM.from_pretrained(DIRECTORY, trust_remote_code=True)

config.json holds the widths as `kvp_layers`. The code is a part of kvp's own source, under Apache-2.0.
"""

{imports}

require_version({needs!r})


{parts}


FAMILY = {family!r}
FAMILIES = {{FAMILY.name: FAMILY}}
{config} = config_twin(FAMILY)
{model} = model_twin(FAMILY, {config})
{decoder} = {model}.decoder_class
declare_to_vllm(FAMILY)
'''


def write_code(config: PretrainedConfig, directory: Path) -> None:
    """Write the modelling file beside a checkpoint of this config, and name it in config.json."""
    family, path = family_of(config), directory / CONFIG
    (directory / f"{MODULE}.py").write_text(code(family.name))
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": auto_map(family)}, indent=2))


def require_own_code(directory: Path) -> None:
    """Refuse a directory whose code is not, byte for byte, what this kvp writes.

    Raises:
        ValueError: Names the file.
    """
    config, file = read_json(directory / CONFIG), directory / f"{MODULE}.py"
    family = family_named(str(config.get("model_type")))
    if (
        config.get("auto_map") != auto_map(family)
        or not file.is_file()
        or file.read_text() != code(family.name)
    ):
        raise ValueError(
            f"{file} and auto_map in config.json are not what kvp {kvp.__version__} writes, and kvp runs no code of a "
            "checkpoint: export it again"
        )


def auto_map(family: Family) -> dict[str, str]:
    """Return the field of config.json that names the classes."""
    return {
        "AutoConfig": f"{MODULE}.Kvp{family.prefix}Config",
        "AutoModel": f"{MODULE}.Kvp{family.prefix}Model",
        "AutoModelForCausalLM": f"{MODULE}.Kvp{family.prefix}ForCausalLM",
    }


@cache
def code(name: str) -> str:
    """Return the modelling file of a family's twin."""
    family, parts = FAMILIES[name], dict[str, str]()
    imports = {"from transformers.utils.versions import require_version"}
    for module, root in ROOTS:
        _take(module, root, imports, parts)
    classes = auto_map(family)
    return HEAD.format(
        prefix=family.prefix,
        version=kvp.__version__,
        imports="\n".join(sorted(imports)),
        needs=NEEDS,
        parts="\n\n\n".join(parts.values()),
        family=family,
        config=classes["AutoConfig"].rpartition(".")[2],
        model=classes["AutoModelForCausalLM"].rpartition(".")[2],
        decoder=classes["AutoModel"].rpartition(".")[2],
    )


def _take(module: str, name: str, imports: set[str], parts: dict[str, str]) -> None:
    """Add a definition of a module, after those that it needs, and the imports from elsewhere."""
    source = inspect.getsource(import_module(module))
    defined, imported = _names(ast.parse(source))
    node = defined[name]
    parts[name] = ""  # on its way
    for used in sorted({each.id for each in ast.walk(node) if isinstance(each, ast.Name)}):
        where, line = imported.get(used, ("", ""))
        where = module if used in defined else where
        if where.startswith("kvp."):
            if used not in parts:
                _take(where, used, imports, parts)
        elif line:
            imports.add(line)
    first = min(each.lineno for each in (node, *getattr(node, "decorator_list", ())))
    del parts[name]
    parts[name] = "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def _names(tree: ast.Module) -> tuple[dict[str, ast.stmt], dict[str, tuple[str, str]]]:
    """Return the definitions of a module by name, and for each imported name its module and a line that imports it."""
    defined: dict[str, ast.stmt] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined[node.name] = node
        elif isinstance(node, ast.Assign):
            defined |= {target.id: node for target in node.targets if isinstance(target, ast.Name)}
    imported: dict[str, tuple[str, str]] = {}
    for each in ast.walk(tree):
        if isinstance(each, ast.Import):
            imported |= {name.name: ("", f"import {name.name}") for name in each.names}
        elif isinstance(each, ast.ImportFrom) and each.module:
            line = f"from {each.module} import "
            imported |= {name.name: (each.module, line + name.name) for name in each.names}
    return defined, imported
