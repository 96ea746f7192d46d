"""An export on disk: a checkpoint or a GGUF, and `serving.json`: what it is, who opens it, and what it must answer."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvp.models.checkpoint.check import check_weights
from kvp.models.checkpoint.tokens import check_tokenizer, open_tokenizer
from kvp.models.family import PRUNED_PREFIX
from kvp.models.load import load_config, load_model, load_tokenizer, save
from kvp.models.shapes import layer_shapes, require_whole_stream, size
from kvp.serving.card import card
from kvp.serving.engines import engines, engines_of_own
from kvp.serving.forms import MLA, Engine, Write, engines_of, imports_of, own_form
from kvp.serving.layout import stock_layout
from kvp.serving.made import checkpoint_of, made_by
from kvp.serving.mla import mla_facts, to_mla
from kvp.serving.mla_check import mla_layout
from kvp.serving.quantize import quantize_gguf, require_quantizer
from kvp.serving.remote_code import write_code
from kvp.serving.rope import require_fixed_factors
from kvp.serving.sample import Sample, make_sample, require_positions
from kvp.serving.stock import add_old_keys, to_stock
from kvp.serving.verify import ask, compare, has
from kvp.serving.whole import whole

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DISTRIBUTIONS = {"transformers": "transformers", "llama_cpp": "llama-cpp-python"}
SERVING = "serving.json"


def export(
    checkpoint: Path, out: Path, to: str, trusted: Collection[str] = (), quantize: str | None = None
) -> dict[str, Any]:
    """Write `checkpoint` for other engines, and check it in a process that does not know kvp (custom: does).

    Args:
        checkpoint: Directory of a checkpoint, or the run.json of a run: the model that it made last.
        out: Directory to write.
        to: Name of a form, or a user's own as "mypkg.forms:half".
        trusted: Packages whose forms may run, beside those that `kvp.trust` trusts.
        quantize: Type of the weights of a GGUF, as llama.cpp names it; None: that of the checkpoint.

    Returns:
        What `serving.json` says.

    Raises:
        FileNotFoundError: `checkpoint` is not one.
        FileExistsError: `out` is there already.
        ValueError: Its shapes have no such form; nothing was written.
        ArithmeticError: The export does not give the answer of the checkpoint; it was removed.
        RuntimeError: The engine cannot open it; it was removed.
        ModuleNotFoundError: `quantize` needs llama.cpp.
    """
    if quantize is not None:
        require_quantizer(to, quantize)
    own, checkpoint = own_form(to, trusted), checkpoint_of(checkpoint)
    config = _checked(checkpoint, out, to if own is None else None)
    with whole(out, SERVING) as partial:
        model = load_model(checkpoint, dtype=_stored_dtype(config), device="cpu")
        exported = _write(model, checkpoint, partial, to, own)
        del model
        sample, check = _proof(checkpoint, partial, to, exported, imports_of(to, own))
        quantized = quantize_gguf(partial, quantize, sample) if quantize else None
        serving = {
            "form": to,
            "dtype": _name(exported),
            **({} if own else mla_facts(config, exported) if to in MLA else _facts(config, exported)),
            "engines": engines_of_own(own) if own else engines(exported, to, check),
            "check": check,
            **({"quantized": quantized} if quantized else {}),
            "sample": sample.stored(),
        }
        (partial / SERVING).write_text(json.dumps(serving, indent=2))
        if own is None:
            (partial / "README.md").write_text(
                card(exported, form=to, made=made_by(checkpoint), quantized=quantized)
            )
    return serving


def _checked(checkpoint: Path, out: Path, to: str | None) -> PretrainedConfig:
    """Return the checkpoint's config, once everything that its files can tell allows the export (None: own form)."""
    if out.exists():
        raise FileExistsError(f"{out} is there already: choose another directory")
    config = check_weights(checkpoint).config
    _check_form(checkpoint, config, to)
    check_tokenizer(checkpoint, open_tokenizer(checkpoint), config.vocab_size)
    return config


def _check_form(checkpoint: Path, config: PretrainedConfig, to: str | None) -> None:
    """Refuse a form that the config cannot have; a user's own form knows itself what it can write."""
    require_positions(config)
    if to is None:
        return
    if to in ("custom", "remote_code"):
        if not config.model_type.startswith(PRUNED_PREFIX):
            raise ValueError(
                f"{checkpoint} is an ordinary {config.model_type} checkpoint: export it --to stock"
            )
        if to == "remote_code" and getattr(config, "kvp_cache", None) is not None:
            raise ValueError(
                f"{checkpoint} decodes with a sparse cache, which needs more of kvp than a modelling file: --to "
                "custom, or export the checkpoint of the same run with cache=none"
            )
        return
    require_whole_stream(
        config,
        "no stock class has its shortcut matrices: --to custom, opened by transformers and `import kvp`",
    )
    if getattr(config, "kvp_cache", None) is not None:
        raise ValueError(
            f"{checkpoint} decodes with a sparse cache, which no stock engine has: export the checkpoint of the "
            "same run with cache=none, or --to custom"
        )
    if any(shape.k_latents for shape in layer_shapes(config)):
        raise ValueError(
            f"{checkpoint} expands keys from latents on every step, which no stock engine does: export it --to "
            "remote_code or custom, for transformers"
        )
    if to not in MLA and any(shape.latent for shape in layer_shapes(config)):
        raise ValueError(f"{checkpoint} is multi-head latent attention, which --to {to} is not: use --to mla")
    if to in MLA:
        mla_layout(config, to)
    elif to != "padded":
        layout = stock_layout(config)
        if not layout.keeps_rope:
            require_fixed_factors(config)
    if to in ("gguf", "mla_gguf"):
        from kvp.serving.gguf_file import check_gguf

        check_gguf(config)


def _write(
    model: PreTrainedModel, checkpoint: Path, directory: Path, to: str, own: Write | None
) -> PretrainedConfig:
    """Write everything but serving.json; the config of what was written."""
    tokenizer = load_tokenizer(checkpoint)
    if own:
        own(model, tokenizer, directory)
        return load_config(directory)
    if to in ("custom", "remote_code"):
        save(model, tokenizer, directory)
        if to == "remote_code":
            write_code(model.config, directory)
        return model.config
    if to == "gguf":
        from kvp.serving.gguf_file import write_gguf

        stock = to_stock(model, "stock")
        write_gguf(stock, checkpoint, directory)
        return stock.config
    if to in MLA:
        mla = to_mla(model, to)
        if to == "mla_gguf":
            from kvp.serving.mla_gguf import write_mla_gguf

            write_mla_gguf(mla, checkpoint, directory)
            return mla.config
        save(mla, tokenizer, directory)
        add_old_keys(directory / "config.json")
        return mla.config
    stock = to_stock(model, to)  # type: ignore[arg-type]  # one of the three that are left
    save(stock, tokenizer, directory)
    add_old_keys(directory / "config.json")
    return stock.config


def _proof(
    checkpoint: Path, exported: Path, to: str, config: PretrainedConfig, imports: Sequence[str]
) -> tuple[Sample, dict[str, Any] | None]:
    """The checkpoint's sample in float32, and how near the export comes; None if its engine is not here."""
    model = load_model(checkpoint, dtype=torch.float32, device="cpu")
    sample, logits = make_sample(model, load_tokenizer(checkpoint))
    del model
    engine: Engine = engines_of(to)[0]
    if engine == "llama_cpp" and not has(engine):
        return sample, None
    answer = ask(exported, sample, engine, imports=imports, own_code=to == "remote_code")
    exact = _stored_dtype(config) == torch.float32
    check = compare(sample, answer, exact=exact, logits=logits)
    if not check["passed"]:
        raise ArithmeticError(
            f"in {engine} the export is not the checkpoint: {check['why']}. The export was removed; please "
            "report the checkpoint's config.json"
        )
    return sample, {"engine": engine, "version": version(DISTRIBUTIONS[engine]), **check}


def _stored_dtype(config: PretrainedConfig) -> torch.dtype:
    return getattr(torch, _name(config))


def _name(config: PretrainedConfig) -> str:
    return str(config.dtype or "float32").removeprefix("torch.")


def _facts(before: PretrainedConfig, after: PretrainedConfig) -> dict[str, Any]:
    sizes = {
        name: size(config, layer_shapes(config))
        for name, config in {"checkpoint": before, "export": after}.items()
    }
    shapes = layer_shapes(after)
    return {
        "architecture": type(after).__name__.removesuffix("Config") + "ForCausalLM",
        "head_dim": _one({shape.qk_head_dim for shape in shapes}),
        "num_key_value_heads": _one({shape.num_key_value_heads for shape in shapes}),
        "kv_bytes_per_token": {name: it.kv_bytes_per_token for name, it in sizes.items()},
        "params": {name: it.params for name, it in sizes.items()},
    }


def _one(values: set[int]) -> int | None:
    """The value, if it is the same in all layers."""
    return next(iter(values)) if len(values) == 1 else None
