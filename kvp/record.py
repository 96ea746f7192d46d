"""The record of a run: what `run.json` holds, one field a line with its unit and meaning.

record = RunRecord.read(Path("outputs/runs/NAME/run.json"))
record.models()["pruned"].evaluation.perplexity["squad"].value

Every part is frozen, and a key that it does not know is an error. `kvp.results` has the parts of one model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from kvp.results import Bytes, Fraction, ModelRecord, Nats, Part, Seconds, Tokens
from kvp.upgrade import SCHEMA, upgraded
from kvp.whole import write_whole

SCHEMAS = (1, 2, 3, SCHEMA)  # that `RunRecord.read` understands
MODELS = ("dense", "pruned", "recovered")
EXAMINING = ("sparsity", "evaluate", "measure")  # stages by the first part of their names
WAY_OUT = "delete it and repeat its command (finished stages are found), or leave it out"

Denominator = Literal["kv_cache", "params", "block_params", "blocks", "sparsity", "cache_bytes", "memory"]
Curve = tuple[tuple[int, Nats | None], ...]


class BudgetRecord(Part):
    """A budget that was asked for."""

    value: Fraction = Field(description="fraction removed")
    of: Denominator = Field(description="what it is a fraction of")


class AskedRecord(BudgetRecord):
    """The budget of a run."""

    then: tuple[BudgetRecord, ...] = Field((), description="budgets of the strategies chained after it")

    @property
    def budgets(self) -> tuple[BudgetRecord, ...]:
        """The budgets of all chained strategies, in order."""
        return (self, *self.then)


class RatioRecord(Part):
    """The fraction asked for, and the fraction achieved."""

    asked: AskedRecord | None = Field(
        description="the budget; null: nothing is pruned, or the limit is in GiB and the run has not finished"
    )
    achieved: dict[Denominator, Fraction] | None = Field(
        None, description="if finished: fraction removed, by denominator"
    )


class ValidationRecord(Part):
    """The loss on the examples held out from a recovery."""

    examples: int = Field(description="examples held out")
    loss_before: Nats = Field(description="mean loss of the pruned model")
    loss_after: Nats = Field(description="mean loss of the recovered model")


class DistillationRecord(Part):
    """The lessons of the dense model: weights of the loss's parts, and their values."""

    text_weight: float = Field(description="weight of the text's own loss")
    logits_weight: float = Field(description="weight of the divergence from the teacher's logits")
    hidden_weight: float = Field(description="weight of the distance to the teacher's hidden states")
    temperature: float = Field(description="divisor of both logits")
    first_text_loss: Nats | None = Field(None, description="text part at the first step")
    first_logits_loss: Nats | None = Field(None, description="logits part at the first step")
    first_hidden_loss: float | None = Field(None, description="hidden part at the first step")
    final_text_loss: Nats | None = Field(None, description="text part, mean of the last ten steps")
    final_logits_loss: Nats | None = Field(None, description="logits part, mean of the last ten steps")
    final_hidden_loss: float | None = Field(None, description="hidden part, mean of the last ten steps")


class RecoveryRecord(Part):
    """The tuning of the pruned model."""

    steps: int = Field(description="optimizer steps")
    epochs: float = Field(description="passes over the examples")
    tokens_seen: Tokens = Field(description="tokens trained on")
    trainable_params: int = Field(description="parameters of the adapter")
    num_processes: int = Field(1, description="processes that trained together")
    first_loss: Nats = Field(description="training loss at the first step")
    final_loss: Nats = Field(description="training loss, mean of the last ten steps")
    validation: ValidationRecord | None = Field(description="null: no examples were held out")
    seconds_per_step: Seconds = Field(description="median")
    merge_max_diff: float = Field(description="largest difference of merged and adapter logits")
    adapter: str = Field(description="directory of the adapter in the stage")
    model: str = Field(description="directory of the merged model in the stage")
    losses: Curve = Field(description="(step, training loss) pairs")
    loss_parts: dict[str, Curve] = Field({}, description="the same of each part of the loss, unweighted")
    distillation: DistillationRecord | None = Field(None, description="null: no teacher")
    teacher: str | None = Field(None, description="fingerprint of the teacher; null: no teacher")


class StageRecord(Part):
    """A stage that the run computed or found."""

    name: str = Field(description="kind of the stage, with corpus or task")
    fingerprint: str = Field(description="sha256 of everything that decides the result")
    path: str = Field(description="directory in the store")
    seconds: Seconds = Field(description="time of the process that computed it")
    peak_bytes: Bytes | None = Field(description="peak memory of that process; null: not known")
    found: bool = Field(description="whether it was finished before this run")
    model: str | None = Field(None, description="model that it makes or looks at; null: an old record")
    started: str | None = Field(None, description="start of its work, ISO 8601, UTC; null: not known")
    code: str | None = Field(None, description="sha256 of the source that its work runs; null: not known")
    edits: dict[str, str] = Field(
        {}, description="sha256 of each module of it that is no committed code of kvp"
    )
    origins: tuple[int, ...] = Field((), description="who made it, as places in provenance.origins")

    @property
    def examines(self) -> bool:
        """Whether it looks at a model, and makes none."""
        return self.name.partition("/")[0] in EXAMINING


class ErrorRecord(Part):
    """The reason why a run failed."""

    type: str = Field(description="class of the exception")
    message: str = Field(description="message of the exception")
    traceback: str | None = Field(None, description="where it was raised; null in results.jsonl")


class OriginRecord(Part):
    """The maker of some stages: code, versions, machine, command."""

    kvp: str = Field(description="version of kvp")
    commit: str | None = Field(description="git commit of the code; null outside a checkout")
    dirty: bool | None = Field(description="whether the code had uncommitted changes")
    dirty_sha256: str | None = Field(
        None, description="sha256 of what was changed; null: nothing, or not known"
    )
    versions: dict[str, str] = Field(description="versions of packages")
    python: str = Field(description="version of Python")
    platform: str = Field(description="operating system")
    device: str = Field(description="kind of device")
    device_name: str | None = Field(None, description="model of the CPU or GPU; null: not known")
    threads: int = Field(description="CPU threads")
    dtype: str = Field(description="dtype that the models are evaluated in")
    command: str = Field(description="command line")


class ProvenanceRecord(Part):
    """The origin of the numbers: the makers of all stages, and the command that wrote the record."""

    origins: tuple[OriginRecord, ...] = Field(description="distinct makers of the stages")
    command: str = Field(description="command line of the record")
    dtype: str = Field(description="dtype that the models are evaluated in")
    seed: int = Field(description="seed of the run")
    started: str = Field(description="start of the command, ISO 8601, UTC")
    model: dict[str, Any] | None = Field(None, description="if finished: identity of the dense model")
    data_hashes: dict[str, str] | None = Field(
        None, description="if finished: sha256 of the tokens, by corpus"
    )
    seconds: Seconds | None = Field(None, description="if finished: duration of the command")


class RunRecord(Part):
    """One run, whole: which it is, how far it is, and what it found."""

    model_config = ConfigDict(populate_by_name=True)

    schema_version: Literal[4] = Field(alias="schema", description="version of this table")
    name: str = Field(description="model-strategy-ratio-cache-recovery-seed-hash")
    hash: str = Field(description="one per configuration")
    group: str | None = Field(None, description="group in the tracker")
    directory: str | None = Field(None, description="directory of run.json; null in results.jsonl")
    status: Literal["running", "finished", "failed"] = Field(description="how far it is")
    config: dict[str, Any] = Field(description="resolved configuration; classes by name")
    choices: dict[str, str] = Field(description="option chosen for each node of the configuration")
    overrides: tuple[str, ...] | None = Field(None, description="options that composed it; null from Python")
    config_dir: str | None = Field(None, description="folder of the user's own options; null: none")
    host: str | None = Field(None, description="unless finished: machine of the process")
    pid: int | None = Field(None, description="unless finished: number of the process")
    stage: str | None = Field(None, description="unless finished: stage it is in; null: between stages")
    error: ErrorRecord | None = Field(None, description="if failed: why")
    ratio: RatioRecord = Field(description="fraction asked for and achieved")
    dense: ModelRecord | None = Field(None, description="if finished: the model before pruning")
    pruned: ModelRecord | None = Field(None, description="if finished: the pruned model")
    recovered: ModelRecord | None = Field(None, description="if finished, with a recovery: the tuned model")
    sensitivity: tuple[Nats, ...] | None = Field(None, description="loss rise per layer; null: not probed")
    recovery: RecoveryRecord | None = Field(None, description="how the model was tuned; null: it was not")
    stages: tuple[StageRecord, ...] = Field(description="stages computed or found so far")
    tracker: str | None = Field(None, description="where the tracker keeps the run; null: no tracker")
    provenance: ProvenanceRecord = Field(description="code, versions, machine")

    @model_validator(mode="after")
    def _is_whole(self) -> RunRecord:
        parts = {"dense": self.dense, "pruned": self.pruned, "ratio.achieved": self.ratio.achieved}
        missing = [name for name, part in parts.items() if part is None]
        count = len(self.provenance.origins)
        if any(not 0 <= place < count for stage in self.stages for place in stage.origins):
            raise ValueError(f"stages[].origins are places in provenance.origins, which has {count}")
        if self.status == "finished" and missing:
            raise ValueError(f"a finished run has {', '.join(missing)}")
        return self

    @classmethod
    def read(
        cls, source: Path | bytes | Mapping[str, Any] | RunRecord, place: str | None = None
    ) -> RunRecord:
        """Return the record of a file, of its text or of its JSON data; old schemas are brought up to date.

        Args:
            source: A path, the bytes of a run.json, its data, or a record, which is returned as it is.
            place: Name of the source in errors; the path by default.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no record, or one of an unknown schema; the message names place and way out.
        """
        if isinstance(source, RunRecord):
            return source
        if isinstance(source, Path):
            return cls.read(source.read_bytes(), place or str(source))
        place = place or "the record"
        try:
            data = json.loads(source) if isinstance(source, bytes) else source
        except ValueError as error:
            raise ValueError(f"{place} is corrupt ({error}): {WAY_OUT}") from error
        if not isinstance(data, Mapping) or not {"schema", "name", "hash", "config"} <= data.keys():
            raise ValueError(f"{place} is not the record of a run (schema, name, hash, config): {WAY_OUT}")
        if data["schema"] not in SCHEMAS:
            known = ", ".join(map(str, SCHEMAS))
            raise ValueError(
                f"{place} has schema {data['schema']}, this kvp reads {known}: use the kvp that wrote it"
            )
        try:
            return cls.model_validate(upgraded(data))
        except ValidationError as error:
            raise ValueError(f"{place} is no valid record ({_worded(error)}): {WAY_OUT}") from None

    def write(self, path: Path) -> None:
        """Write the record whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.data(), indent=2, allow_nan=False)
        try:
            write_whole(path, text)
        except OSError as error:
            why = f"{error.strerror}: free space or get write access there, or choose another runs=DIR"
            raise OSError(error.errno, why, str(path)) from error

    def data(self) -> dict[str, Any]:
        """Return the record as JSON data, without the fields that it lacks."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)

    def behind(self, model: str, place: str = "") -> list[StageRecord]:
        """Return the stages behind a number: those that made its model, and those at a place that looked at it.

        Args:
            model: "dense", "pruned" or "recovered".
            place: The beginning of the looking stage's name, such as "evaluate/perplexity/squad"; "": none.

        Old records do not say which model a stage belongs to: all of their stages are returned.
        """
        if any(stage.model is None for stage in self.stages):
            return list(self.stages)
        made = MODELS[: MODELS.index(model) + 1]

        def is_behind(stage: StageRecord) -> bool:
            if stage.examines:
                return bool(place) and stage.model == model and stage.name.startswith(place)
            return stage.model in made

        return list(filter(is_behind, self.stages))

    def origins(self, stages: Iterable[StageRecord]) -> list[OriginRecord]:
        """Return the makers of some stages; of those that do not know theirs, none."""
        places = dict.fromkeys(place for stage in stages for place in stage.origins)
        return [self.provenance.origins[place] for place in places]

    def models(self) -> dict[str, ModelRecord]:
        """Return the models that the record holds, by name: dense, pruned and, after a recovery, recovered."""
        found = {name: getattr(self, name) for name in MODELS}
        return {name: model for name, model in found.items() if model is not None}


def removed_words(asked: Iterable[tuple[str, float]], achieved: Mapping[str, float]) -> str:
    """Return "asked 25 % of kv_cache; achieved kv_cache 25.00 %, params 4.93 %"."""
    words = ", then ".join(f"{100 * value:g} % of {of}" for of, value in asked)
    found = ", ".join(f"{of} {100 * value:.2f} %" for of, value in achieved.items())
    return f"{f'asked {words}; ' if words else ''}achieved {found}"


def _worded(error: ValidationError) -> str:
    """Say where a record is wrong: "dense.size.parms: extra inputs are not permitted"."""
    first, *others = error.errors()
    where = ".".join(map(str, first["loc"]))
    more = f"; and {len(others)} more" if others else ""
    return f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}{more}".removeprefix(": ")
