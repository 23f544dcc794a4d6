"""A target of which each process holds a part gives what the whole target gives, and every command runs with it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from small_runs import by_ranks, by_two_ranks, losses
from tiny import TINY, make_tokenizer, write_chats
from transformers import AutoConfig, AutoModelForCausalLM

from fastdraft.batch import Batch
from fastdraft.dist import mesh
from fastdraft.model.proposal import DecodeSettings
from fastdraft.run.features import capture_features
from fastdraft.run.finished import evaluate_run, export_run
from fastdraft.run.inputs import choose_holders
from fastdraft.target.hf import load_target
from fastdraft.target.identity import target_fingerprint
from fastdraft.target.sharded import Piece, own_rows
from fastdraft.train import train

SMALL = TINY | {"vocab_size": 96, "max_position_embeddings": 128, "initializer_range": 0.3}
KINDS = {
    "llama": {"tie_word_embeddings": True},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 7, "num_experts_per_tok": 2},  # three do not divide 7
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 4},  # documents run apart
}


def save_model(kind: str, folder: Path, **changes) -> Path:
    """A random model in several files, biases and norms not what they are by default."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | KINDS.get(kind, {}) | changes)).float()
    for name, p in model.named_parameters():
        if name.endswith("bias") or p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder, max_shard_size="100KB")
    return folder


def packs(count: int) -> list[Batch]:
    lengths = [(12, 3, 11, 1, 7), (30,), (5, 5, 20)]
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 96, (sum(x),), generator=generator) for x in lengths]
    return [Batch(x, torch.ones(len(x), dtype=torch.bool), n) for x, n in zip(ids, lengths, strict=True)][:count]


def test_a_sharded_target_is_the_whole_one(tmp_path):
    folders = {kind: save_model(kind, tmp_path / kind) for kind in KINDS}
    assert all(len(list(folder.glob("*.safetensors"))) > 1 for folder in folders.values())
    assert by_ranks(3, _compare, folders) == [0] * 3


def _compare(folders: dict[str, Path]) -> None:
    device = mesh.start_process("cpu")
    torch.set_num_threads(1)
    holders, me = mesh.holders(3), mesh.rank()
    read = []
    for method in ("whole", "rows"):  # count what is read from the disk
        original = getattr(Piece, method)
        setattr(Piece, method, lambda *x, original=original: read.append(original(*x)) or read[-1])
    for kind, folder in folders.items():
        for dtype in (torch.float32, torch.bfloat16):
            whole = load_target(str(folder), dtype, device)
            read.clear()
            target = load_target(str(folder), dtype, device, holders=holders)
            assert target_fingerprint(target) == target_fingerprint(whole) and target.apart == whole.apart
            assert (target.layers, target.eos_ids, target.head.scale) == (whole.layers, whole.eos_ids, whole.head.scale)
            assert target.num_parameters == whole.num_parameters and target.dtype == whole.dtype

            # Each process holds its rows of the layers and no others, and nobody read those of another from the disk.
            whole_layers = {n: p for n, p in whole.model.named_parameters() if ".layers." in n}
            for name, p in target.model.named_parameters():
                if name in whole_layers:
                    assert p.to_local().equal(whole_layers[name][slice(*own_rows(len(p), holders))]), name
                else:
                    assert p.equal(whole.model.get_parameter(name)), name
            outside = sum(p.numel() for n, p in whole.model.named_parameters() if n not in whole_layers)
            total = torch.tensor(sum(x.numel() for x in read) - outside)
            assert int(holders.sum_(total)) == sum(p.numel() for p in whole_layers.values())

            # One process captures one pack, the next two, the last three; a CPU's product in fp32 may depend on where a
            # weight lies in memory, so a model that shows it is compared up to rounding.
            for batch in packs(me + 1):
                ours, theirs = target.capture(batch), whole.capture(batch)
                if kind == "gpt_oss" and dtype == torch.float32:
                    torch.testing.assert_close(ours.g, theirs.g, rtol=1e-4, atol=1e-4)
                    torch.testing.assert_close(ours.f, theirs.f, rtol=1e-4, atol=1e-4)
                else:
                    assert ours.g.equal(theirs.g) and ours.f.equal(theirs.f), (kind, dtype)
            target.meet()


def test_every_command_runs_with_a_sharded_target(tmp_path, make_config):
    """With a target whose documents run apart the processes have different numbers of forwards, at every step."""
    folder = save_model("mistral", tmp_path / "target", vocab_size=192, sliding_window=8, max_position_embeddings=512)
    make_tokenizer().save_pretrained(folder)
    write_chats(tmp_path / "prompts.jsonl", 3, seed=5)

    def config(name: str, **changes):
        changes = {"target.path": str(folder), "run_dir": str(tmp_path / name), "optim.packs_per_step": 4} | changes
        return make_config(**changes)

    sharded = {"dist.target": "sharded"}
    runs = {name: config(name, **sharded if name == "sharded" else {}) for name in ("whole", "sharded")}
    cache = {"features.path": str(tmp_path / "store"), "features.mode": "cache", "features.max_gib": 0.1}
    runs["cache"] = config("cache", **sharded | cache)
    assert by_two_ranks(train, runs["whole"]) == by_two_ranks(_all_commands, runs, tmp_path) == [0, 0]
    assert losses(tmp_path / "sharded") == losses(tmp_path / "whole")
    cached = zip(losses(tmp_path / "cache"), losses(tmp_path / "whole"), strict=True)
    assert all(abs(a[k] - b[k]) <= 1e-3 * abs(b[k]) + 1e-3 for a, b in cached for k in b)

    # What two processes have made with parts of the target, this one makes with the whole.
    export_run(tmp_path / "sharded", tmp_path / "alone", "last", False)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("exported", "alone"))
    assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in ours)
    report = _evaluate(tmp_path / "sharded", tmp_path / "prompts.jsonl")
    for rank in range(2):
        found = json.loads((tmp_path / f"report-{rank}.json").read_text())
        for name, value in report["held_out"]["overall"].items():
            torch.testing.assert_close(torch.tensor(found["held_out"]["overall"][name]), torch.tensor(value))
        assert found["decode"] == report["decode"]
    whole = config("whole", **{"data.max_length": 64})
    capture_features(whole, tmp_path / "captured-alone")
    files = [sorted(p.name for p in (tmp_path / n).glob("*.safetensors")) for n in ("captured", "captured-alone")]
    assert files[0] == files[1] and len(files[0]) > 1


def _all_commands(runs: dict, folder: Path) -> None:
    train(runs["sharded"])
    train(runs["cache"])
    assert choose_holders(runs["sharded"], torch.device("cpu"))[0].size == 2
    export_run(folder / "sharded", folder / "exported", "last", False)
    mesh.barrier()
    report = _evaluate(folder / "sharded", folder / "prompts.jsonl")
    (folder / f"report-{mesh.rank()}.json").write_text(json.dumps(report))
    capture_features(runs["sharded"], folder / "captured")


def _evaluate(run_dir: Path, prompts: Path) -> dict:
    """The report but for its clocks."""
    found = dataclasses.asdict(evaluate_run(run_dir, "last", prompts, 3, 12, DecodeSettings()))
    for name in ("tokens_per_s", "plain_tokens_per_s"):
        del found["decode"][name]
    return found
