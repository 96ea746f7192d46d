"""Options that a run of the tiny model refuses: the words of a command, and what the error says."""

from __future__ import annotations

TINY = ("debug=smoke", "tracker=none", "measure=none")

HARDWARE = [
    (["device=cuda"], "device must be cpu or auto here, got 'cuda'"),
    (["device=cuda:7"], "CUDA_VISIBLE_DEVICES=7"),
    (["device=mps"], "device must be one of auto, cpu, cuda, got 'mps'"),
    (["device=null"], "device must be one of auto, cpu, cuda, got None"),
    (["device=[cpu]"], "device must be one of auto, cpu, cuda, got ['cpu']"),
    (["dtype=int8"], "dtype must be one of bfloat16, float16, float32, got 'int8'"),
    (["model.config.vocab_size=100000000000"], "GiB are free on cpu"),
    (["model.config.hidden_size=98304000"], "GiB are free on cpu"),
    (["model=llama_7b_shape", "model.config.num_hidden_layers=4000"], "GiB are free on cpu"),
]
SEEDS = [
    (["seed=abc"], "seed must be a whole number, got 'abc'"),
    (["seed=1.5"], "seed must be a whole number, got 1.5"),
    (["seed=-1"], "seed must be in [0, 2**32), got -1"),
    (["seed=1180591620717411303424"], "seed must be in [0, 2**32), got 1180591620717411303424"),
    (["seed=null"], "seed must be a whole number, got None"),
    (["seed=true"], "seed must be a whole number, got True"),
    (["model.seed=-1"], "model.seed must be in [0, 2**32), got -1"),
    (["calibration.seed=1180591620717411303424"], "calibration.seed must be in [0, 2**32)"),
    (["measure=cpu_quick", "measure.seed=4294967296"], "measure.seed must be in [0, 2**32), got 4294967296"),
    (["~seed"], "Interpolation key 'seed' not found full_key: calibration.seed"),
]
LENGTHS = [
    (["calibration.num_samples=100000000"], "the train part of drop has at most"),
    (["calibration.num_samples=40000"], "calibration.num_samples=40000 of calibration.length=64"),
    (
        ["calibration.length=3000"],
        "calibration.length must be <= 2048 (max_position_embeddings of tiny), got 3000",
    ),
    (["calibration.length=100000"], "calibration.length must be <= 2048"),
    (["calibration.batch_size=1.5"], "calibration.batch_size must be a whole number, got 1.5"),
    (["recovery.data.length=2500"], "recovery.data.length must be <= 2048"),
    (["recovery.data.length=100000"], "recovery.data.length must be <= 2048"),
    (
        ["measure=cpu_quick", "measure.prompt_length=2048"],
        "measure.prompt_length + measure.new_tokens must be <= 2048",
    ),
    (["evaluation.perplexity.max_tokens=32"], "evaluation.perplexity.max_tokens must be >= 64"),
    (["recovery.validation=1000000"], "recovery.validation=1000000"),
    (["recovery.data.max_tokens=1280", "recovery.validation=10"], "recovery.validation must be < 10"),
]
RECOVERY = [
    (["recovery.target_modules=[foo]"], "recovery.target_modules must name linear modules of tiny"),
    (["recovery.target_modules=[q_proj,o_prj]"], "got 'o_prj'"),
    (["recovery.target_modules=[embed_tokens]"], "got 'embed_tokens'"),
    (["recovery.target_modules=[]"], "recovery.target_modules must be a list of at least 1"),
    (["recovery.max_steps=1"], "recovery.max_steps must be >= 2 with recovery.warmup_steps=5, got 1"),
    (["recovery.rank=8.5"], "recovery.rank must be a whole number, got 8.5"),
    (["recovery.num_processes=2.5"], "recovery.num_processes must be a whole number, got 2.5"),
    (["recovery.save_steps=0"], "recovery.save_steps must be > 0, got 0"),
    (["recovery=none", "recovery.save_steps=5"], "It is one of recovery=lora_"),
]
NAMES = [
    (["model.name=../../../evil"], "model.name=evil would do"),
    (["model.name=/tmp/evil"], "model.name=tmp-evil would do"),
    (["model.name=org/model"], "model.name=org-model would do"),
    (["model.name=''"], "model.name must be letters"),
    (["model.name=.."], "model.name must be letters"),
    (["model.name='[bold]x'"], "model.name=bold-x would do"),
    (["model.name=" + "x" * 300], "of 300 characters"),
    (["model.name='a\\b'"], "model.name=a-b would do"),
]
PLACES = [
    (["store="], "store must be a directory such as outputs/store, got ''"),
    (["store=null"], "store must be a directory such as outputs/store, got None"),
    (["runs=null"], "runs must be a directory such as outputs/runs, got None"),
    (["store=3"], "store must be a directory such as outputs/store, got 3"),
    (["store=/dev/null"], "/dev/null is no directory; choose another place with store=DIR"),
    (["runs=/dev/null/runs"], "/dev/null is no directory; choose another place with runs=DIR"),
    (["store=/proc/store"], "choose another place with store=DIR"),
    (["store=a", "runs=a"], "lie inside each other"),
    (["store=a", "runs=a/b"], "lie inside each other"),
    (["store=a/b", "runs=a"], "lie inside each other"),
    (["store=" + "x" * 300], "choose another with store=DIR"),
]
TYPES = [
    (["since=abc"], "since must be seconds since 1970, a number >= 0, or null, got 'abc'"),
    (["since=-5"], "since must be seconds since 1970"),
    (["since=nan"], "since must be a finite number, got nan"),
    (["force=prune"], "force must be a list of stages"),
    (["force=[evaluate]"], "force is a list of stages to compute again"),
    (["force=null"], "force must be a list of stages"),
    (["rows=5"], "sweep over them with python -m kvp -m"),
    (["+foo=1"], "there is no option 'foo'"),
    (["+evaluation.foo=1"], "there is no option 'evaluation.foo'"),
    (["+widths.most=1"], "there is no option 'widths.most'"),
    (["strategy=null"], "strategy must be one of adapruner,"),
    (["corpora=null"], "corpora must be one of default, got null"),
    (["~tracker"], "tracker is not set"),
    (["recovery=5"], "recovery must be one of lora_alpaca, lora_text, none, got 5"),
    (["+model.config.rms_norm_eps=nan"], "model.config.rms_norm_eps must be a finite number, got nan"),
    (["+model.config.rope_theta=inf"], "model.config.rope_theta must be a finite number, got inf"),
    (["model=local"], "model.path is not set, and this configuration needs it: say model.path=VALUE"),
    (["model.name=a(b"], "quote a value with special characters"),
    (["store=/tmp/ü"], "store=/tmp/ü cannot be read: quote a value with special characters"),
    (["recovery=false"], "recovery must be one of lora_alpaca, lora_text, none, got false"),
    (["report"], "report comes first: kvp report ..., see kvp report --help"),
    (["ratio"], "'ratio' is no option: options have the form option=value"),
    (["strategy=minee"], "there is no strategy=minee."),
    (["strategy=shortgpt", "strategy/allocator=uniform"], "strategy=shortgpt has no allocator to choose"),
    (["widths.free=abc"], "widths.free must be a whole number >= 1, got 'abc'"),
    (["widths.multiple_of=0"], "widths.multiple_of must be a whole number >= 1, got 0"),
    (["model=/a/path"], "a path or owner/name is model=local model.path=/a/path"),
    (["model=owner/name"], "a path or owner/name is model=local model.path=owner/name"),
    (["model=smollm2_135m", "model.path=/a/path"], "It is one of model=local: choose that first"),
    (["evaluation=needles", "evaluation.needles.lengths=[300]"], "and the question alone, got 300"),
    (
        ["evaluation=needles", "evaluation.needles.hops=100"],
        "evaluation.needles.hops must be in [1, 64], got 100",
    ),
    (["hydra.launcher.n_jobs=3"], "there is no option 'hydra.launcher.n_jobs' of this launcher"),
]
MODELS = [
    (
        ["+model.config.rope_theta=0"],
        "model.config: rope_parameters.rope_theta must be greater than 1, got 0",
    ),
    (["+model.config.sliding_window=4"], "model.config: sliding_window=4, and llama models have no sliding"),
    (["+model.config.rope_scaling={rope_type: linear, factor: 0}"], "factor must be greater than 0, got 0"),
    (
        ["+model.config.quantization_config={bits: 4}"],
        "model.config: quantization_config: these weights are quant",
    ),
    (["model.config.eos_token_id=9999"], "eos_token_id must be below vocab_size=259, got 9999"),
    (
        ["model.config.num_hidden_layers=0"],
        "model.config.num_hidden_layers must be a whole number >= 1, got 0",
    ),
    (["model.config.num_attention_heads=0"], "model.config.num_attention_heads must be a whole number >= 1"),
    (["model.config.vocab_size=big"], "model.config.vocab_size must be a whole number >= 1, got 'big'"),
    (["model.config.vocab_size=100"], "model.config.vocab_size must be >= 259"),
    (["model.config.hidden_size=97", "~model.config.head_dim"], "model.config"),
    (
        ["model.config.num_key_value_heads=4"],
        "model.config: num_key_value_heads must divide num_attention_heads=6, got 4",
    ),
    (["model.config.head_dim=31"], "model.config is no config of a model"),
    (["model.config.model_type=gpt2"], "known families"),
    (["model.config.model_type=nonsense"], "nonsense"),
    (["+model.config.hidden_act=nonsense"], "nonsense"),
    (["strategy=kvpruner_plus", "strategy.num_key_value_heads=3"], "num_key_value_heads"),
    (
        ["strategy=kvpruner_plus", "strategy.num_key_value_heads=0"],
        "strategy.num_key_value_heads must be >= 1",
    ),
    (
        ["strategy=llm_pruner", "strategy.unit_ratio=0.9"],
        "strategy.unit_ratio must be <= strategy.allocator.max_ratio=0.75",
    ),
    (["ratio.value=0.99", "ratio.tolerance=0.01"], "the nearest is"),
    (["ratio=blocks", "ratio.value=0.33", "ratio.tolerance=0"], "ratio"),
    (["strategy=llm_pruner", "strategy.protect_first=9"], "protect"),
    (["strategy.allocator.max_ratio=2"], "strategy.allocator.max_ratio must be in (0, 1], got 2"),
]
TARGETS = [
    (["strategy._target_=os.system"], "names code of os, which kvp does not trust"),
    (["+corpora.x={_target_: pandas.read_pickle, path: x}"], "names code of pandas"),
    (
        ["+model.config.extra={_target_: transformers.AutoConfig.from_pretrained}"],
        "names code of transformers",
    ),
    (["strategy._target_=kvp.measurement.measure.subprocess.run"], "cannot be imported"),
    (["tracker._target_=kvp.measurement.memory.psutil"], "is no class of kvp"),
    (["tracker._target_=kvp.models.packaged.version"], "is no class of kvp"),
    (["strategy._target_=kvp.strategies.methods.random.Randm"], "Did you mean"),
    (["strategy._target_=null"], "strategy._target_ must be a class"),
    (
        ["tracker._target_=kvp.evaluation.zeroshot.ZeroShot", "+tracker.tasks=[piqa]"],
        "tracker must be a Tracker",
    ),
    (["trusted=os"], "trusted must be a list of top-level packages"),
]
SOURCES = [
    (["calibration.corpora=[drop,drop]"], "calibration.corpora names drop twice"),
    (["calibration.corpora=[squat]"], "Did you mean squad?"),
    (["evaluation.perplexity.corpora=[text]"], "KVP_TEXT"),
    (["evaluation.zero_shot.tasks=[piqua]"], "piqua"),
    (["corpora.text.path=nowhere.txt", "calibration.corpora=[text]"], "There is no file nowhere.txt"),
    (["+corpora.x={path: y}"], "corpora.x must be a Corpus"),
    (["calibration.corpora=[drop]", "calibration.bos=maybe"], "calibration.bos must be true or false"),
]
ALL = [*HARDWARE, *SEEDS, *LENGTHS, *RECOVERY, *NAMES, *PLACES, *TYPES, *MODELS, *TARGETS, *SOURCES]
