"""Every examples/*.yaml loads, and gives the intended draft for its target's published shape."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import LLAMA_8B

from fastdraft.config import load_config
from fastdraft.files import GIB
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.run.plan import predict

EXAMPLES = Path(__file__).parents[1] / "examples"

# the shape fields of each target's published config.json
QWEN3_8B = {
    "model_type": "qwen3",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rope_scaling": None,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-06,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
}
GPT_OSS_20B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
}
# target; the draft's H, I, Hq, Hkv, D; layers; trained parameters: fc, QKV, O, MLP, norms, lm_head
CASES = {
    "llama-3.1-8b": (
        LLAMA_8B,
        (4096, 14336, 32, 8, 128),
        (1, 15, 28),
        3 * 4096**2 + 2 * 4096 * 6144 + 4096**2 + 3 * 4096 * 14336 + 4 * 4096 + 32000 * 4096,
    ),
    "qwen3-8b": (
        QWEN3_8B,
        (4096, 12288, 32, 8, 128),
        (1, 17, 32),
        3 * 4096**2 + 2 * 4096 * 6144 + 4096**2 + 3 * 4096 * 12288 + 4 * 4096 + 32000 * 4096,
    ),
    "qwen3-30b-a3b": (
        QWEN3_30B_A3B,
        (2048, 6144, 32, 4, 128),
        (1, 23, 44),
        3 * 2048**2 + 2 * 2048 * 5120 + 4096 * 2048 + 3 * 2048 * 6144 + 4 * 2048 + 32000 * 2048,
    ),
    "gpt-oss-20b": (
        GPT_OSS_20B,
        (2880, 17280, 64, 8, 64),
        (1, 11, 20),
        3 * 2880**2 + 2 * 2880 * 5120 + 4096 * 2880 + 3 * 2880 * 17280 + 4 * 2880 + 32000 * 2880,
    ),
}


def test_every_example_has_a_case():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_example_loads(path: Path):
    load_config(path)


@pytest.mark.parametrize("name", CASES)
def test_an_examples_memory_is_what_plan_predicts(name: str, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"torch_dtype": "bfloat16"} | CASES[name][0]))
    comment = " ".join(line[2:] for line in (EXAMPLES / f"{name}.yaml").read_text().splitlines() if line.startswith("# "))
    said = re.findall(r"(?:predicts|and) (\d+) GiB (?:on one GPU|with (data\S+) (data\S+[^. ]))", comment)
    assert said and comment.count(" GiB") == len(said) + (name in ("qwen3-30b-a3b", "gpt-oss-20b"))  # their weights
    for gib, *changes in said:
        changes = [f"target.path={tmp_path}", "precision=bf16", *filter(None, changes)]
        needed = predict(load_config(EXAMPLES / f"{name}.yaml", changes), torch.device("cuda")).memory_bytes
        assert f"{needed / GIB:.0f}" == gib, (gib, changes)


@pytest.mark.parametrize("name", CASES)
def test_draft_of_example(name: str):
    target, shape, layers, trainable = CASES[name]
    config = load_config(EXAMPLES / f"{name}.yaml")
    draft = DraftConfig.from_target(target, **config.draft.overrides)
    assert shape == (
        draft.hidden_size,
        draft.intermediate_size,
        draft.num_attention_heads,
        draft.num_key_value_heads,
        draft.head_dim,
    )
    assert draft.layers == layers
    assert (draft.vocab_size, draft.draft_vocab_size) == (target["vocab_size"], 32000)
    assert draft.num_parameters()["trainable"] == trainable
    rope = {"rope_type": "default"} | (target["rope_scaling"] or {}) | {"rope_theta": target["rope_theta"]}
    assert draft.rope_parameters == rope
    assert config.data.max_length <= draft.max_position_embeddings == target["max_position_embeddings"]


def test_examples_train_alike():
    """The runs differ in target, data, shape and place; a setting changed in one file alone is a slip."""
    seen = []
    for name in CASES:
        config = load_config(EXAMPLES / f"{name}.yaml")
        assert config.run_dir == f"runs/{name}" and config.data.paths == [f"data/{name}/*.jsonl"]
        seen.append(config.model_dump(include={"loss", "optim", "ttt_length", "epochs", "checkpoint", "eval"}))
    assert all(settings == seen[0] for settings in seen)


@pytest.mark.parametrize("name, target, mask", [("qwen3-8b", QWEN3_8B, 151669), ("llama-3.1-8b", LLAMA_8B, 128002)])
def test_dflash_draft_of_example(name: str, target: dict, mask: int):
    """Five Qwen3-shaped layers of the target's widths, which read five of its layers; the mask token is the file's, or the
    first id behind the tokenizer's last (Qwen3's is 151668)."""
    config = load_config(EXAMPLES / "dflash" / f"{name}.yaml")
    draft = DFlashConfig.from_target(target, **{"mask_token_id": mask} | config.draft.overrides)
    wide = target["intermediate_size"]
    layers = {36: (1, 9, 17, 25, 33), 32: (1, 8, 15, 22, 29)}[target["num_hidden_layers"]]
    assert (draft.layers, draft.block_size, draft.mask_token_id) == (layers, 16, mask)
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * wide + 2 * 4096 + 2 * 128
    assert draft.num_parameters()["trainable"] == 5 * 4096 * 4096 + 2 * 4096 + 5 * layer
    assert config.draft.method == "dflash" and config.run_dir == f"runs/{name}-dflash"


@pytest.mark.parametrize("method", ["dflash", "dspark"])
def test_a_methods_examples_train_alike(method):
    seen = [
        load_config(path).model_dump(include={"block", "optim", "epochs", "checkpoint", "eval"})
        for path in sorted((EXAMPLES / method).glob("*.yaml"))
    ]
    assert len(seen) == 2 and seen[0] == seen[1]


def test_dflash2_draft_of_example():
    """DFlash's five layers and blocks of sixteen, the convolutions' and the selector's weights beside."""
    config = load_config(EXAMPLES / "dflash2" / "qwen3-8b.yaml")
    draft = DFlash2Config.from_target(QWEN3_8B, **{"mask_token_id": 151669} | config.draft.overrides)
    assert (draft.block_size, draft.selector_top_k, draft.selector_rank, draft.conv_kernel_size) == (16, 16, 256, 2)
    plain = DFlashConfig.from_target(QWEN3_8B, mask_token_id=151669)
    convolution = 2 * 2 * 4096 + 2 * 2 * 256 * 4096
    more = 5 * 2 * convolution + (2 * 151936 + 4096) * 256
    assert draft.num_parameters()["trainable"] == plain.num_parameters()["trainable"] + more
    assert config.draft.method == "dflash2" and config.run_dir == "runs/qwen3-8b-dflash2"
    beside = load_config(EXAMPLES / "dflash" / "qwen3-8b.yaml")
    same = {"optim", "epochs", "checkpoint", "eval"}
    assert config.model_dump(include=same) == beside.model_dump(include=same)


@pytest.mark.parametrize("name, target, mask", [("qwen3-8b", QWEN3_8B, 151669), ("llama-3.1-8b", LLAMA_8B, 128002)])
def test_dspark_draft_of_example(name: str, target: dict, mask: int):
    """DFlash's five layers, blocks of seven, and the two heads."""
    config = load_config(EXAMPLES / "dspark" / f"{name}.yaml")
    draft = DSparkConfig.from_target(target, **{"mask_token_id": mask} | config.draft.overrides)
    assert (draft.block_size, draft.num_drafted, draft.markov_rank, draft.mask_token_id) == (7, 7, 256, mask)
    plain = DFlashConfig.from_target(target, mask_token_id=mask)
    heads = 2 * target["vocab_size"] * 256 + 4096 + 256 + 1
    assert draft.num_parameters()["trainable"] == plain.num_parameters()["trainable"] + heads
    assert config.draft.method == "dspark" and config.run_dir == f"runs/{name}-dspark"


@pytest.mark.parametrize("cores", [{"SLURM_CPUS_PER_TASK": "96"}, {}], ids=["cores named", "none named"])
def test_the_slurm_script_starts_one_torchrun_on_each_host(tmp_path, cores):
    """With what Slurm tells a batch script, and its two commands played."""
    for name, does in {"scontrol": "echo gpu7; echo gpu8", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    told = {"SLURM_JOB_NODELIST": "gpu[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "12", **cores}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **told}
    script = [EXAMPLES / "fleet/slurm.sh", "run.yaml", "optim.lr=2e-4"]
    called = subprocess.check_output(["bash", *script], env=environment, text=True).splitlines()
    srun, torchrun = called[: called.index("torchrun")], " ".join(called[called.index("torchrun") :])
    assert srun == ["--kill-on-bad-exit=1", *(f"--cpus-per-task={n}" for n in cores.values())]
    assert torchrun == (
        "torchrun --nnodes 2 --nproc-per-node 8 --max-restarts 3 --rdzv-backend c10d --rdzv-id 12 "
        "--rdzv-endpoint gpu7:29500 -m fastdraft.cli train run.yaml optim.lr=2e-4"
    )
