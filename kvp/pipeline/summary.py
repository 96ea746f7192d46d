"""The table at the end of a run: dense, pruned and recovered side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from kvp.record import RunRecord, removed_words
from kvp.results import MeasureRecord, ModelRecord, Storage, TimingRecord
from kvp.tables import console_table, print_table
from kvp.tracking import upload_command

STORAGES: tuple[Storage, ...] = ("dense", "2:4", "bitmap")
CONTROL_NOTE = (
    "read recovered against the dense model tuned alike (strategy=none with the same recovery), not "
    "against dense: tuning on text lowers perplexity by itself"
)

Row = tuple[str, Callable[[ModelRecord], str]]  # a label, and what the table shows of a model


def print_summary(record: RunRecord) -> None:
    """Print the table of a finished run, what was achieved of what was asked, and where everything lies."""
    heads, rows = results(record)
    print_table(console_table(heads, rows, title=record.name))
    for line in [*_notes(record), *_places(record)]:
        print(line)


def results(record: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Return the heads and rows of the table: a column per model, a row per kind of number."""
    models = record.models()
    return ["", *models], [[label, *map(read, models.values())] for label, read in _rows(record)]


def _rows(record: RunRecord) -> Iterator[Row]:
    """Yield the rows that the record has numbers for."""
    dense = record.models()["dense"]
    yield "parameters", lambda m: f"{m.size.params / 1e6:,.2f} M"
    values = sum(layer.kv_width for layer in dense.size.layers)
    width = f" ({dense.size.kv_bytes_per_token // values} bytes a value)" if values else ""
    yield f"KV cache per token{width}", lambda m: f"{m.size.kv_bytes_per_token:,} B"
    if record.config.get("cache") and dense.size.stored_bytes_per_token:
        yield "KV cache per token, stored, over 4,096 tokens", _stored_cache
    if dense.size.sparsity:
        yield "zeros in linear weights", _zeros
        for how in STORAGES:
            yield f"weights, if stored {how}", partial(_stored, how)
    for name, result in dense.evaluation.perplexity.items():
        yield f"perplexity {name} (window {result.protocol.window})", partial(_perplexity, name)
    if average := dense.evaluation.zero_shot.average:
        for name, task in dense.evaluation.zero_shot.tasks.items():
            if metric := average.metrics.get(name):
                limit = f", first {task.limit}" if task.limit else ""
                yield f"{name} % ({metric}, {task.split}{limit})", partial(_task, name, metric)
        yield f"zero-shot average % ({len(average.tasks)} tasks)", _average
    for name, found in dense.evaluation.needles.items():
        yield f"needles {name} % ({found.n} texts, chance {100 * found.chance:.0f})", partial(_needles, name)
    if dense.measure:
        yield from _measured_rows(dense.measure, stored=bool(record.config.get("cache")))


def _stored_cache(model: ModelRecord) -> str:
    stored = model.size.stored_bytes_per_token
    return "-" if stored is None else f"{stored:,} B"


def _measured_rows(dense: MeasureRecord, *, stored: bool) -> Iterator[Row]:
    protocol = dense.protocol
    shape = f"batch {protocol.batch_size}, {protocol.prompt_length}+{protocol.new_tokens}"
    if stored:
        yield (
            "KV cache per token outside the window, measured",
            lambda m: f"{_measure(m).kv_bytes_per_token:,} B",
        )
    yield f"prefill tokens/s ({shape})", lambda m: _rate(_measure(m).prefill)
    yield f"decode tokens/s ({shape})", lambda m: _rate(_measure(m).decode)
    yield f"memory: weights ({dense.dtype})", lambda m: _mebibytes(_measure(m).memory.weights_bytes)
    yield f"memory: KV cache ({dense.dtype})", lambda m: _mebibytes(_measure(m).memory.cache_bytes)
    yield "memory: peak over an empty process", lambda m: _mebibytes(_measure(m).memory.above_baseline)


def _measure(model: ModelRecord) -> MeasureRecord:
    assert model.measure is not None  # a run measures all of its models or none
    return model.measure


def _zeros(model: ModelRecord) -> str:
    return f"{100 * model.size.sparsity.fraction:.2f} %" if model.size.sparsity else "-"


def _stored(how: Storage, model: ModelRecord) -> str:
    taken = model.size.sparsity.model_bytes[how] if model.size.sparsity else None
    return "-" if taken is None else _mebibytes(taken)


def _perplexity(corpus: str, model: ModelRecord) -> str:
    return f"{model.evaluation.perplexity[corpus].value:.2f}"


def _task(task: str, metric: str, model: ModelRecord) -> str:
    metrics = model.evaluation.zero_shot.tasks[task].metrics
    return _percent(metrics[metric], metrics.get(f"{metric}_stderr"))


def _average(model: ModelRecord) -> str:
    average = model.evaluation.zero_shot.average
    if average is None or average.value is None:
        return "-"
    return _percent(average.value, average.stderr)


def _needles(name: str, model: ModelRecord) -> str:
    found = model.evaluation.needles[name]
    return _percent(found.accuracy, found.stderr) if found.above_chance else "at chance"


def _percent(value: float, error: float | None) -> str:
    return f"{100 * value:.1f}" if error is None else f"{100 * value:.1f} ± {100 * error:.1f}"


def _rate(timing: TimingRecord) -> str:
    low, high = timing.iqr
    return f"{timing.tokens_per_second:,.0f} ± {(high - low) / 2:,.0f}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def _notes(record: RunRecord) -> Iterator[str]:
    """Yield what was achieved, who read the evaluated text, and what to compare recovered with."""
    budgets = record.ratio.asked.budgets if record.ratio.asked else ()
    yield f"removed: {removed_words(((b.of, b.value) for b in budgets), dict((record.ratio.achieved or {}).items()))}"
    removed = record.ratio.achieved or {}
    if record.ratio.asked and record.ratio.asked.value and not any(removed.values()):
        yield "warning: nothing was removed: widths come in steps; choose widths=method, or a larger ratio.value"
    models = record.models()
    for corpus in models["dense"].evaluation.perplexity:
        overlaps: dict[str, str] = {}
        for model in models.values():
            overlaps |= model.evaluation.perplexity[corpus].overlap.present()
        for reader, text in overlaps.items():
            if text != "none":
                yield f"note: {reader} read the {text} as perplexity on {corpus}"
    if "recovered" in models:
        yield CONTROL_NOTE


def _places(record: RunRecord) -> list[str]:
    last = [*record.models().values()][-1]
    found = sum(stage.found for stage in record.stages)
    upload = upload_command(record.tracker)
    return [
        f"stages: {len(record.stages)}, {found} found finished, {record.provenance.seconds:.1f} s in all",
        f"record: {record.directory}/run.json",
        f"checkpoint: {last.checkpoint}",
        f"tracker: {record.tracker or 'none'}{f'; to upload it: {upload}' if upload else ''}",
    ]
