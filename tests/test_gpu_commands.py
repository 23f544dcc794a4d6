"""The README's commands on a GPU, as a user types them, for a target of SmolLM2-135M's shape, also in odd shapes.

They run in processes of their own, and many in turn in a single one. Weights are random, which changes nothing that could
fail here.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny import WORDS, make_tokenizer, refusal, write_chats
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

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


def write_run(folder: Path, target: Path, chats: Path) -> Path:
    """A short run as the README's, all defaults but what makes it short."""
    tree = {
        "target": {"path": str(target)},
        "data": {
            "paths": [str(chats)],
            "pack_tokens": 8192,
            "eval_fraction": 0.1,
            "cache_dir": str(chats.parent / "cache"),
        },
        "optim": {"packs_per_step": 2},
        "checkpoint": {"every": 4},
        "eval": {"every": 4},
        "metrics": {"log_every": 2},
        "max_steps": 6,
        "run_dir": str(folder / "run"),
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(tree))
    return folder / "run.yaml"


@pytest.fixture
def run_yaml(target, long_chats, tmp_path) -> Path:
    return write_run(tmp_path, target, long_chats)


def start(*arguments: object, launcher: tuple[str, ...] = ("-m",)) -> subprocess.Popen:
    """Starts `python -m fastdraft.cli ...`, which takes 12 s to import what it needs: some of them run side by side."""
    line = (sys.executable, *launcher, "fastdraft.cli", *map(str, arguments))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(line, **pipes, text=True, env=env, start_new_session=True)


def torchrun_of(processes: int) -> tuple[str, ...]:
    """A launcher for `start`."""
    return "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"


def succeeds(process: subprocess.Popen) -> str:
    """What it printed; its exit code must be 0. Of one that does not end all processes say where they are."""
    try:
        out, _ = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        out, _ = process.communicate(timeout=60)
        pytest.fail(f"{process.args} had not ended after 300 s:\n{out[-20000:]}")
    assert process.returncode == 0, out[-5000:]
    return out


def assert_trained(run_dir: Path, steps: int) -> None:
    """Every loss is there and finite; a random target's distribution is nearly flat, so nothing is said of their size."""
    records = read_metrics(run_dir)
    assert max(record["step"] for record in records) == steps
    found = [record["loss"] for record in records if "loss" in record]
    assert found and all(0 < loss < 1e3 for loss in found)


WAYS = {
    "defaults": (),
    "fp8": ("precision=fp8",),
    "reference step": ("step=reference", "data.pack_tokens=2048", "data.max_length=2048"),
    "packs of 32768": ("data.pack_tokens=32768", "optim.packs_per_step=1"),
    "chunks of 512": ("chunk_rows=512",),
    "an lk loss, T 3": ("loss.kind=lk_lambda", "ttt_length=3"),
    "packs of 1000": ("data.pack_tokens=1000", "data.max_length=1000"),
}


@pytest.fixture(scope="module")
def trainings(target, long_chats, tmp_path_factory) -> dict[str, tuple[Path, subprocess.Popen]]:
    """Every way to train, side by side in processes of their own, after one that tokenises for them all."""
    files = {way: write_run(tmp_path_factory.mktemp("way"), target, long_chats) for way in WAYS}
    succeeds(start("data", "prepare", files["defaults"]))
    return {way: (file.parent / "run", start("train", file, *WAYS[way])) for way, file in files.items()}


@pytest.mark.parametrize("way", WAYS)
def test_train(trainings, way):
    run_dir, process = trainings[way]
    succeeds(process)
    assert_trained(run_dir, 6)


def test_capture_and_every_way_to_train_from_a_store(run_yaml):
    folder = run_yaml.parent
    captures = [
        start("features", "capture", run_yaml, folder / "plan", "--plan"),
        start("features", "capture", run_yaml, folder / "store"),
        start("features", "capture", run_yaml, folder / "fp8", "--dtype", "fp8"),
    ]
    plan, _, _ = (succeeds(process) for process in captures)
    assert "bytes" in plan
    ways = {
        "store": (f"features.path={folder / 'store'}",),
        "narrow": (f"features.path={folder / 'fp8'}",),
        "cache": (f"features.path={folder / 'cache'}", "features.mode=cache", "features.max_gib=20"),
        "stream": ("data.streaming=true",),
    }
    looks = [start("features", look, folder / "store") for look in ("inspect", "verify")]
    trainings = [start("train", run_yaml, *way, f"run_dir={folder / 'by' / name}") for name, way in ways.items()]
    for process in (*looks, *trainings):
        succeeds(process)
    for name in ways:
        assert_trained(folder / "by" / name, 6)


def test_under_torchrun_and_with_experts(run_yaml, tmp_path):
    """One process of a group, whose collectives run over NCCL; and a mixture of experts. Its routing may read on the host:
    no graph can hold that, so such a target runs without one."""
    fields = SMOLLM2 | dict(
        num_hidden_layers=8,
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        moe_intermediate_size=64,
        num_experts=16,
        num_experts_per_tok=4,
    )
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    make_tokenizer().save_pretrained(tmp_path / "moe")
    torchrun = torchrun_of(1)
    experts = (f"target.path={tmp_path / 'moe'}", "draft.overrides.draft_vocab_size=256", f"run_dir={tmp_path / 'experts'}")
    for process in (start("train", run_yaml, launcher=torchrun), start("train", run_yaml, *experts), start("check")):
        assert "WRONG" not in succeeds(process)
    assert_trained(tmp_path / "run", 6)
    assert_trained(tmp_path / "experts", 6)


LAYOUTS = {
    "sequence": "dist.sequence=2",
    "tensor": "dist.tensor=2",
    "sharded": "dist.target=sharded",
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_resume_each_others_layouts(long_chats, tmp_path):
    """A run of two processes over NCCL, each with packs of its own, is continued from its first checkpoint by every layout
    that two GPUs have, and evaluated and exported under torchrun."""
    random_llama(SMOLLM2 | dict(hidden_size=512, num_attention_heads=8, num_key_value_heads=4)).save_pretrained(
        tmp_path / "even"
    )
    make_tokenizer().save_pretrained(tmp_path / "even")
    torchrun = torchrun_of(2)
    run_yaml, run = write_run(tmp_path, tmp_path / "even", long_chats), tmp_path / "run"
    steps = ("checkpoint.every=2", "checkpoint.keep=3", "metrics.log_every=1")
    succeeds(start("train", run_yaml, *steps, launcher=torchrun))
    resumed = {}
    for name in LAYOUTS:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        shutil.copytree(run / "checkpoints" / "step-00000002", tmp_path / name / "checkpoints" / "step-00000002")
        for file in run.iterdir():
            if file.is_file() and not file.name.startswith("."):
                shutil.copy(file, tmp_path / name)
    for name, layout in LAYOUTS.items():
        line = ("train", run_yaml, *steps, layout, f"run_dir={tmp_path / name}")
        resumed[name] = start(*line, launcher=torchrun)
    reads = [start("evaluate", run, launcher=torchrun), start("export", run, tmp_path / "out", launcher=torchrun)]
    for process in (*resumed.values(), *reads):
        succeeds(process)
    assert "WRONG" not in succeeds(start("check", "--checkpoint", tmp_path / "out", "--target", tmp_path / "even"))
    whole = {r["step"]: r["loss"] for r in read_metrics(run) if "loss" in r}
    for name in LAYOUTS:
        ours = {r["step"]: r["loss"] for r in read_metrics(tmp_path / name) if "loss" in r}
        assert ours.keys() == whole.keys() == {*range(1, 7)}, name
        assert [ours[i] for i in whole] == pytest.approx([*whole.values()], rel=0.02), name  # bf16, in other orders of sums


def test_many_commands_in_one_process(run_yaml, target, tmp_path, fastdraft):
    """What one command leaves on the GPU (graphs, pools, buffers) must not disturb the next."""
    run, prompts = tmp_path / "run", write_chats(tmp_path / "prompts.jsonl", 6, turns=1)

    def runs(*arguments) -> str:
        code, out, err = fastdraft(*arguments)
        assert code == 0, out[-2000:] + err[-4000:]
        return out

    runs("init", target, tmp_path / "draft.yaml")
    runs("data", "prepare", run_yaml)
    runs("data", "preview", run_yaml, "-n", 1)
    runs("train", run_yaml, "--plan")
    runs("train", run_yaml, "max_steps=3", f"draft.config={tmp_path / 'draft.yaml'}", f"run_dir={tmp_path / 'other'}")
    runs("train", run_yaml)
    assert "already" in runs("train", run_yaml)  # resumes, finds nothing to do
    answers = tmp_path / "answers.jsonl"
    regenerate = ("data", "regenerate", prompts, "--out", answers, "--target", target, "--max-new-tokens", 24)
    runs(*regenerate)
    assert len(answers.read_text().splitlines()) == 6
    tree = ("--num-steps", 3, "--eagle-topk", 4, "--num-draft-tokens", 16)
    for way in ((), tree, ("--temperature", 0.8)):
        runs("evaluate", run, "--prompts", prompts, "--max-prompts", 2, "--max-new-tokens", 16, *way)
    runs("evaluate", run)
    runs("export", run, tmp_path / "out")
    runs("check", "--checkpoint", tmp_path / "out", "--target", target)
    warm = (f"draft.init_from={tmp_path / 'out'}", "precision=fp8", f"run_dir={tmp_path / 'warm'}")
    runs("train", run_yaml, *warm)
    runs("features", "capture", run_yaml, tmp_path / "store")
    runs("train", run_yaml, "max_steps=8", f"run_dir={tmp_path / 'longer'}")
    assert_trained(tmp_path / "longer", 8)
    assert "device" in refusal(fastdraft("train", run_yaml, "device=tpu", f"run_dir={tmp_path / 'none'}"))


def test_an_8b_target_takes_packs_of_1000_and_of_4096_tokens_in_turn():
    """Short packs, as the last of an epoch or of an evaluation, run as graphs; long ones do not."""
    made = Target(random_llama(LLAMA_8B))
    generator = torch.Generator().manual_seed(0)
    packs = []
    for lengths in ((1000,), (4096,), (300, 700), (1900, 2196), (1250,), (77,), (4000, 96)):
        ids = torch.randint(LLAMA_8B["vocab_size"], (sum(lengths),), generator=generator)
        packs.append(Batch(ids, torch.ones(len(ids), dtype=torch.bool), lengths))
    rounds = [[made.capture(pack) for pack in packs] for _ in range(3)]
    assert made.recorded and all(forward.replay.graph is not None for forward in made.recorded.values())
    for again in rounds[1:]:
        for features, first in zip(again, rounds[0], strict=True):
            assert torch.equal(features.g, first.g) and torch.equal(features.f, first.f)
    made.recorded = None
    for pack, recorded in zip(packs, rounds[0], strict=True):
        plain = made.capture(pack).f.float()
        off = (recorded.f.float() - plain).norm() / plain.norm()  # other lengths let cuBLAS choose other kernels
        assert off < 0.1
