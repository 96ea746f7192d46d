"""The README.md of a checkpoint: what it is, what was cut, what that cost, and how to open it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

import kvp
from kvp.models.family import PRUNED_PREFIX
from kvp.models.packaged import PackagedModel
from kvp.models.shapes import layer_shapes, size
from kvp.record import removed_words
from kvp.serving.forms import FORMS
from kvp.serving.made import Made
from kvp.serving.mla import mla_size
from kvp.tables import markdown

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
LICENCE = "The licence of the model that was pruned holds for this one, too."
OPEN = {
    "transformers": """```python
{first}from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("DIRECTORY"{more})
tokenizer = AutoTokenizer.from_pretrained("DIRECTORY"{more})
```""",
    "vllm": """```bash
vllm serve DIRECTORY
```""",
    "llama_cpp": """```bash
llama-server -m model.gguf
```""",
}
TITLES = {"transformers": "transformers", "vllm": "vLLM", "llama_cpp": "llama.cpp"}


def card(
    config: PretrainedConfig,
    removed: str = "",
    *,
    form: str | None = None,
    made: Made | None = None,
    quantized: dict[str, Any] | None = None,
) -> str:
    """Return the model card of a checkpoint in Markdown, with the header that the hub reads.

    Args:
        config: The checkpoint's.
        removed: What was asked for and achieved, in words.
        form: The form of an export; None: a checkpoint as a run leaves it.
        made: The run that made the checkpoint, whose numbers the card shows.
        quantized: What `kvp.serving.quantize` says about a quantised GGUF.
    """
    base, licence = _origin(config, made)
    own = config.model_type.startswith(PRUNED_PREFIX)
    engines = FORMS[form].engines if form else ("transformers",)
    header = ModelCardData(
        library_name="gguf" if engines[0] == "llama_cpp" else "transformers",
        pipeline_tag="text-generation",
        license=licence,
        base_model=base,
        base_model_relation=("quantized" if quantized else "finetune") if base else None,
        tags=["kvp", "pruned"],
    )
    first = "import kvp  # registers its class\n" if own and form != "remote_code" else ""
    more = ", trust_remote_code=True" if form == "remote_code" else ""
    removed = removed or (_removed(made) if made else "")
    parts = [
        f"# {(base or config.model_type.removeprefix(PRUNED_PREFIX)).rpartition('/')[2]}, pruned",
        f"kvp {kvp.__version__} made this checkpoint{f': {removed}' if removed else ''}.",
        _numbers(made) if made else _sizes(config),
        *([_provenance(made)] if made else []),
        *([_quantized(quantized)] if quantized else []),
        "## Open it",
    ]
    for engine in engines:
        parts += [f"{TITLES[engine]}:", OPEN[engine].format(first=first, more=more)]
    parts += ["## Licence", f"{licence}. {LICENCE}" if licence else LICENCE]
    return f"---\n{header.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"


def _origin(config: PretrainedConfig, made: Made | None) -> tuple[str | None, str | None]:
    """Return name on the hub and licence of the model that was pruned, as far as they are known."""
    base, licence = str(getattr(config, "_name_or_path", "")), None
    if made and made.record.dense:
        source = made.record.config.get("model", {})
        if source.get("class") == PackagedModel.__name__:
            smollm2 = PackagedModel(name="smollm2_135m", dtype="auto")  # whose records name no origin
            return source.get("origin", smollm2.origin), source.get("licence", smollm2.licence)
        base = str(source.get("path", base))
        readme = Path(made.record.dense.checkpoint) / "README.md"
        if readme.is_file():
            given = ModelCard.load(readme, ignore_metadata_errors=True).data
            base, licence = (base if HUB_NAME.fullmatch(base) else str(given.base_model)), given.license
    return (base if HUB_NAME.fullmatch(base) else None), licence


def _removed(made: Made) -> str:
    """Return in words by which strategy how much was removed, and how the model was tuned afterwards."""
    record = made.record
    if made.model == "dense" or record.ratio.asked is None:
        return "nothing was removed"
    achieved: dict[str, float] = dict((record.ratio.achieved or {}).items())
    budgets = ((each.of, each.value) for each in record.ratio.asked.budgets)
    words = f"`strategy={record.choices.get('strategy', '?')}`, {removed_words(budgets, achieved)}"
    if made.model == "recovered" and record.recovery:
        by = record.choices.get("recovery", "?")
        words += f"; tuned on {record.recovery.tokens_seen:,} tokens by `recovery={by}`"
    return words


def _sizes(config: PretrainedConfig) -> str:
    mla = config.model_type == "deepseek_v3"
    counted = mla_size(config) if mla else size(config, layer_shapes(config))
    dtype = str(config.dtype).removeprefix("torch.")
    rows = [
        ["parameters", f"{counted.params:,}"],
        ["KV cache per token", f"{counted.kv_bytes_per_token:,} bytes ({dtype})"],
        ["layers", f"{counted.blocks}"],
    ]
    return markdown(["of this checkpoint", ""], rows)


def _numbers(made: Made) -> str:
    """Return the table of the run: sizes, perplexities and accuracies of the dense model and those made of it."""
    models = made.record.models()
    models = {name: models[name] for name in list(models)[: list(models).index(made.model) + 1]}
    rows = [
        ["parameters", *(f"{model.size.params:,}" for model in models.values())],
        ["KV cache per token, bytes", *(f"{model.size.kv_bytes_per_token:,}" for model in models.values())],
        ["layers", *(f"{model.size.blocks}" for model in models.values())],
    ]
    measured = [model.evaluation for model in models.values()]
    for corpus, one in measured[0].perplexity.items():
        values = [each.perplexity.get(corpus) for each in measured]
        label = f"perplexity of {corpus}, {one.num_tokens:,} tokens in windows of {one.protocol.window}"
        rows.append([label, *(f"{value.value:.2f}" if value else "-" for value in values)])
    for task, first in measured[0].zero_shot.tasks.items():
        metric = "acc_norm" if "acc_norm" in first.metrics else "acc"
        scores = [each.zero_shot.tasks.get(task) for each in measured]
        cells = (
            f"{score.metrics[metric]:.3f} ± {score.metrics[f'{metric}_stderr']:.3f}" if score else "-"
            for score in scores
        )
        rows.append([f"{metric} of {task}, {first.n} documents", *cells])
    heads = [f"**{name}**" if name == made.model else name for name in models]
    return markdown(["", *heads], rows)


def _provenance(made: Made) -> str:
    """Return where the numbers come from, without any path."""
    record = made.record
    origin = record.provenance.origins[-1]
    commit = f", commit {origin.commit[:12]}{' with edits' if origin.dirty else ''}" if origin.commit else ""
    versions = [
        f"{name} {origin.versions[name]}" for name in ("torch", "transformers") if name in origin.versions
    ]
    options = [option for option in record.overrides or () if "/" not in option]
    return (
        f"The numbers are of run `{record.name}`, {record.provenance.started[:10]}: "
        f"{', '.join([f'kvp {origin.kvp}{commit}', *versions])}, computed in {origin.dtype.removeprefix('torch.')} on "
        f"{origin.device_name or origin.device}. The bold column is this checkpoint before its export.\n\n"
        f"```bash\n{' '.join(['python -m kvp', *options])}\n```"
    )


def _quantized(quantized: dict[str, Any]) -> str:
    return (
        f"The weights are quantised to {quantized['type']}: {quantized['bytes']:,} bytes instead of "
        f"{quantized['bytes_before']:,}. On a sample of {quantized['tokens']} tokens llama.cpp's log-probabilities are "
        f"{quantized['logprobs_rms_difference']:.4f} nats (rms) from those of the checkpoint."
    )
