"""Runs whose processes share packs and weights: the curve of one process, checkpoints that go on in another layout, export.

In float64 (`fp32` stands for it here) a curve differs by no more than the order of sums.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_runs import at_step, by_ranks, losses
from tiny import TINY, make_tokenizer
from transformers import AutoModelForCausalLM, MistralConfig

from fastdraft import cli
from fastdraft.checkpoint import list_checkpoints, load_tensors, read_state
from fastdraft.dist.shard import FLAT
from fastdraft.model.precision import DTYPES
from fastdraft.run.draft import check_layout, draft_shape
from fastdraft.train import train


def flat_state(run_dir, count: int) -> dict[str, torch.Tensor]:
    """Masters and moments of the newest checkpoint, which as many files hold as processes wrote it."""
    state = {name: torch.empty(count, dtype=torch.float64) for name in FLAT}
    load_tensors(read_state(list_checkpoints(Path(run_dir))[-1]), state)
    return state


@pytest.fixture
def in_float64(monkeypatch):
    monkeypatch.setitem(DTYPES, "fp32", torch.float64)


def stopped(config, step: int) -> None:
    """Trains, and dies where the loader hands out a step."""

    def die(_batches) -> None:
        raise KeyboardInterrupt

    at_step(pytest.MonkeyPatch(), step, die)
    with pytest.raises(KeyboardInterrupt):
        train(config)


def assert_same_run(ours, theirs, tolerance: float) -> None:
    for mine, other in zip(losses(ours.run_dir), losses(theirs.run_dir), strict=True):
        assert mine == pytest.approx(other, rel=tolerance)
    count = draft_shape(ours).num_parameters()["trainable"]
    mine, other = flat_state(ours.run_dir, count), flat_state(theirs.run_dir, count)
    for name in FLAT:
        torch.testing.assert_close(mine[name], other[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_in_other_layouts_as_if_one_process_had_run_it(make_config, tmp_path, in_float64, optimizer):
    """Two steps by four processes (2 x 2), two by two that share weights, two by four of which two share the tokens."""
    changes = {"loss.kind": "lk_lambda", "optim.packs_per_step": 4, "eval.every": 2, "optim.clip": 0.05}
    changes |= {"draft.overrides": {"draft_vocab_size": 64, "fc_norm": True, "layers": [0, 2, 5]}}
    changes |= {"optim.optimizer": optimizer} | ({"optim.muon_lr": 0.02} if optimizer == "muon" else {})
    alone = make_config(run_dir=str(tmp_path / "alone"), **changes)
    train(alone)
    run = make_config(run_dir=str(tmp_path / "run"), **changes)

    def laid_out(sequence: int, tensor: int):
        dist = run.dist.model_copy(update={"sequence": sequence, "tensor": tensor})
        return run.model_copy(update={"dist": dist})

    assert by_ranks(4, stopped, laid_out(2, 2), 3) == [0] * 4
    assert by_ranks(2, stopped, laid_out(1, 2), 3) == [0] * 2
    assert by_ranks(4, train, laid_out(2, 1)) == [0] * 4
    assert_same_run(run, alone, 1e-8)


METHODS = {
    "dflash": {"block.loss": "dpace", "draft.overrides": {"block_size": 4, "num_hidden_layers": 2, "layers": [1, 5]}},
    "dspark": {"draft.overrides": {"block_size": 4, "num_hidden_layers": 1, "layers": [1, 5]}},
    "dflash2": {"draft.overrides": {"block_size": 4, "num_hidden_layers": 1, "layers": [1, 5], "selector_top_k": 4}},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_draft_of_blocks_goes_on_in_other_layouts_as_if_one_process_had_run_it(make_config, tmp_path, in_float64, method):
    """Two steps by four processes of which two share the tokens and all hold the target, two by one process, two by two."""
    changes = {"draft.method": method, "block.anchors": 5, "optim.packs_per_step": 2, "eval.every": 2, "optim.clip": 0.05}
    changes |= METHODS[method] | {"ttt_length": 7}
    alone = make_config(run_dir=str(tmp_path / "alone"), **changes)
    train(alone)
    run = make_config(run_dir=str(tmp_path / "run"), **changes)

    def laid_out(sequence: int, target: str = "auto"):
        return run.model_copy(update={"dist": run.dist.model_copy(update={"sequence": sequence, "target": target})})

    assert by_ranks(4, stopped, laid_out(2, "sharded"), 3) == [0] * 4
    assert by_ranks(1, stopped, run, 3) == [0]
    assert by_ranks(2, train, laid_out(2)) == [0] * 2
    assert_same_run(run, alone, 1e-8)


def test_a_target_with_windows_is_shared_in_a_run(make_config, tmp_path, in_float64):
    """Mistral with a window of 8 tokens, documents of up to 64: two processes share the tokens, then the weights, too."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MistralConfig(**TINY, sliding_window=8)).save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    changes = {"target.path": str(tmp_path / "target"), "eval.every": 2}
    alone = make_config(run_dir=str(tmp_path / "alone"), **changes)
    train(alone)
    for sequence, tensor in ((2, 1), (2, 2)):
        shared = {"dist.sequence": sequence, "dist.tensor": tensor, "chunk_rows": 8}
        run = make_config(run_dir=str(tmp_path / f"{sequence}x{tensor}"), **changes | shared)
        assert by_ranks(sequence * tensor, train, run) == [0] * (sequence * tensor)
        assert_same_run(run, alone, 1e-8)


def test_the_commands_read_what_processes_that_share_a_step_have_written(make_config, tmp_path, fastdraft):
    """A stream of documents, trained by two processes that share the weights and two that share the tokens."""
    changes = {"data.streaming": True, "data.block_conversations": 8, "optim.lr": 1e-3, "max_steps": 4}
    exports = {}
    for name, size in (("alone", 1), ("shared", 2)):
        config = make_config(run_dir=str(tmp_path / name), **changes, **{"dist.tensor": size, "dist.sequence": size})
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
        assert by_ranks(size**2, command, "train", str(file)) == [0] * size**2
        code, out, err = fastdraft("export", config.run_dir, tmp_path / f"{name}-out")
        assert code == 0 and "verified" in out + err
        exports[name] = load_file(tmp_path / f"{name}-out" / "model.safetensors")
    assert exports["alone"].keys() == exports["shared"].keys()
    for name, theirs in exports["alone"].items():
        torch.testing.assert_close(exports["shared"][name], theirs, rtol=1e-3, atol=1e-4)
    code, out, err = fastdraft("evaluate", tmp_path / "shared")
    assert code == 0 and "tau" in out + err


def command(*arguments: str) -> None:
    sys.argv = ["fastdraft", *arguments]
    cli.main()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"dist.tensor": 4},
            "dist.tensor=4 does not divide the draft's num_key_value_heads 2; set dist.tensor to 1 or 2, or",
        ),
        ({"dist.sequence": 2, "step": "reference"}, "dist.sequence=2: step=reference runs in one process; set step=fused"),
        (
            {"dist.tensor": 2, "draft.method": "dflash", "draft.overrides": {}, "ttt_length": 7},
            "dist.tensor=2: the weights of a DFlash draft are not divided among processes; set dist.tensor=1, and",
        ),
        (
            {"dist.sequence": 2, "draft.method": "dspark", "draft.overrides": {}, "ttt_length": 7, "step": "reference"},
            "dist.sequence=2: step=reference runs in one process; set step=fused",
        ),
        (
            {"dist.tensor": 2, "features.path": "x", "features.mode": "cache", "features.max_gib": 1},
            "set features.mode=read",
        ),
        ({"dist.tensor": 2, "features.path": "x", "features.on_bad_shard": "skip"}, "set features.on_bad_shard=error"),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(make_config, changes, sentence):
    config = make_config(**changes)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_layout(config, draft_shape(config))
