"""The README's commands on a GPU, as a user types them, for a target of SmolLM2-135M's shape, also in odd shapes.

Each test starts processes of its own, except the one that runs many commands in a single process. Weights are random, which
changes nothing that could fail here.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import WORDS, make_tokenizer, refusal, write_chats
from transformers import LlamaConfig, LlamaForCausalLM

from fastdraft.batch import Batch
from fastdraft.metrics import read_metrics
from fastdraft.target.hf import Target

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SMOLLM2 = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=2,
)
LLAMA_8B = SMOLLM2 | dict(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=128256,
)


def random_llama(fields: dict) -> LlamaForCausalLM:
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            return LlamaForCausalLM(LlamaConfig(**fields)).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2")
    random_llama(SMOLLM2).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def long_chats(tmp_path_factory) -> Path:
    """600 conversations of 20 to 900 tokens: about thirty packs of 8192, the last one short."""
    path, rng = tmp_path_factory.mktemp("chats") / "chats.jsonl", random.Random(0)
    with path.open("w") as file:
        for _ in range(600):
            turns = [
                {"role": role, "content": " ".join(rng.choices(WORDS, k=rng.randint(5, 220)))}
                for _ in range(rng.randint(1, 3))
                for role in ("user", "assistant")
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture
def run_yaml(target, long_chats, tmp_path) -> Path:
    """A short run as the README's, all defaults but what makes it short."""
    tree = {
        "target": {"path": str(target)},
        "data": {
            "paths": [str(long_chats)],
            "pack_tokens": 8192,
            "eval_fraction": 0.1,
            "cache_dir": str(long_chats.parent / "cache"),
        },
        "optim": {"packs_per_step": 2},
        "checkpoint": {"every": 4},
        "eval": {"every": 4},
        "metrics": {"log_every": 2},
        "max_steps": 6,
        "run_dir": str(tmp_path / "run"),
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "run.yaml"


def command(*arguments: object, launcher: tuple[str, ...] = ()) -> str:
    """Runs `python -m fastdraft.cli ...` and gives what it printed; its exit code must be 0."""
    start = (sys.executable, *(launcher or ("-m",)), "fastdraft.cli", *map(str, arguments))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(start, capture_output=True, text=True, env=env, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def assert_trained(run_dir: Path, steps: int) -> None:
    """Every loss is there and finite; a random target's distribution is nearly flat, so nothing is said of their size."""
    records = read_metrics(run_dir)
    assert max(record["step"] for record in records) == steps
    found = [record["loss"] for record in records if "loss" in record]
    assert found and all(0 < loss < 1e3 for loss in found)


WAYS = {
    "defaults": (),
    "fp8": ("precision=fp8",),
    "reference step": ("engine=reference", "data.pack_tokens=2048", "data.max_length=2048"),
    "packs of 32768": ("data.pack_tokens=32768", "optim.packs_per_step=1"),
    "chunks of 512": ("chunk_rows=512",),
    "an lk loss, T 3": ("loss.kind=lk_lambda", "ttt_length=3"),
    "packs of 1000": ("data.pack_tokens=1000", "data.max_length=1000"),
}


@pytest.mark.parametrize("way", WAYS)
def test_train(run_yaml, way):
    command("train", run_yaml, *WAYS[way])
    assert_trained(run_yaml.parent / "run", 6)


def test_capture_and_every_way_to_train_from_a_store(run_yaml):
    folder = run_yaml.parent
    assert "bytes" in command("features", "capture", run_yaml, folder / "store", "--plan")
    command("features", "capture", run_yaml, folder / "store")
    command("features", "capture", run_yaml, folder / "fp8", "--dtype", "fp8")
    command("features", "inspect", folder / "store")
    command("features", "verify", folder / "store")
    command("train", run_yaml, f"features.path={folder / 'store'}")
    assert_trained(folder / "run", 6)
    for name, changes in {
        "cache": (f"features.path={folder / 'cache'}", "features.mode=cache", "features.max_gib=20"),
        "narrow": (f"features.path={folder / 'fp8'}",),
        "stream": ("data.streaming=true",),
    }.items():
        command("train", run_yaml, *changes, f"run_dir={folder / name}")
        assert_trained(folder / name, 6)


def test_under_torchrun(run_yaml):
    """One process of a group: collectives run over NCCL."""
    command("train", run_yaml, launcher=("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m"))
    assert_trained(run_yaml.parent / "run", 6)


def test_many_commands_in_one_process(run_yaml, target, tmp_path, fastdraft):
    """What one command leaves on the GPU (graphs, pools, buffers) must not disturb the next."""
    run, prompts = tmp_path / "run", write_chats(tmp_path / "prompts.jsonl", 6, turns=1)

    def succeeds(*arguments) -> str:
        code, out, err = fastdraft(*arguments)
        assert code == 0, out[-2000:] + err[-4000:]
        return out

    succeeds("init", target, tmp_path / "draft.yaml")
    succeeds("data", "prepare", run_yaml)
    succeeds("data", "preview", run_yaml, "-n", 1)
    succeeds("train", run_yaml, "--plan")
    succeeds("train", run_yaml, "max_steps=3", f"draft.config={tmp_path / 'draft.yaml'}", f"run_dir={tmp_path / 'other'}")
    succeeds("train", run_yaml)
    assert "already" in succeeds("train", run_yaml)  # resumes, finds nothing to do
    answers = tmp_path / "answers.jsonl"
    regenerate = ("data", "regenerate", prompts, "--out", answers, "--target", target, "--max-new-tokens", 24)
    succeeds(*regenerate)
    assert len(answers.read_text().splitlines()) == 6
    tree = ("--num-steps", 3, "--eagle-topk", 4, "--num-draft-tokens", 16)
    for way in ((), tree, ("--temperature", 0.8)):
        succeeds("evaluate", run, "--prompts", prompts, "--max-prompts", 2, "--max-new-tokens", 16, *way)
    succeeds("evaluate", run)
    succeeds("export", run, tmp_path / "out")
    succeeds("check", "--checkpoint", tmp_path / "out", "--target", target)
    warm = (f"draft.init_from={tmp_path / 'out'}", "precision=fp8", f"run_dir={tmp_path / 'warm'}")
    succeeds("train", run_yaml, *warm)
    succeeds("features", "capture", run_yaml, tmp_path / "store")
    succeeds("train", run_yaml, "max_steps=8", f"run_dir={tmp_path / 'longer'}")
    assert_trained(tmp_path / "longer", 8)
    assert "device" in refusal(fastdraft("train", run_yaml, "device=tpu", f"run_dir={tmp_path / 'none'}"))


def test_a_mixture_of_experts_trains(run_yaml, tmp_path):
    """Its routing may read on the host, which no graph can hold: then it runs without one."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    fields = SMOLLM2 | dict(
        num_hidden_layers=8, hidden_size=256, num_attention_heads=4, num_key_value_heads=2, vocab_size=512,
        moe_intermediate_size=64, num_experts=16, num_experts_per_tok=4,
    )  # fmt: skip
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    command("train", run_yaml, f"target.path={tmp_path / 'moe'}", "draft.overrides.draft_vocab_size=256")
    assert_trained(tmp_path / "run", 6)


def test_this_machine_is_checked():
    assert "WRONG" not in command("check")


def test_an_8b_target_takes_packs_of_1000_and_of_4096_tokens_in_turn():
    """Short packs, as the last of an epoch or of an evaluation, run as graphs; long ones do not."""
    made = Target(random_llama(LLAMA_8B))
    generator = torch.Generator().manual_seed(0)
    packs = []
    for lengths in ((1000,), (4096,), (300, 700), (1900, 2196), (1250,), (77,), (4000, 96)):
        ids = torch.randint(LLAMA_8B["vocab_size"], (sum(lengths),), generator=generator)
        packs.append(Batch(ids, torch.ones(len(ids), dtype=torch.bool), lengths))
    rounds = [[made.capture(pack) for pack in packs] for _ in range(3)]
    assert made.recorded and all(forward.graph is not None for forward in made.recorded.values())
    for again in rounds[1:]:
        for features, first in zip(again, rounds[0], strict=True):
            assert torch.equal(features.g, first.g) and torch.equal(features.f, first.f)
    made.recorded = None
    for pack, recorded in zip(packs, rounds[0], strict=True):
        torch.testing.assert_close(recorded.f, made.capture(pack).f, rtol=0.1, atol=0.1)
