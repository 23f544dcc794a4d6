"""What holds of every method that fills blocks, through the commands a user types."""

from __future__ import annotations

import signal

import pytest
import torch
from safetensors.torch import load_file
from small_blocks import OVERRIDES, block_run
from small_runs import at_step, by_two_ranks, losses
from tiny import refusal

from fastdraft.checkpoint import list_checkpoints
from fastdraft.config import Config, parse_config


@pytest.fixture(params=OVERRIDES)
def run_yaml(request, tree, tmp_path):
    return block_run(tree, tmp_path, request.param)


def losses_alone(run_dir) -> list[float]:
    return [record["loss"] for record in losses(run_dir) if "loss" in record]


def _train(tree):
    from fastdraft.train import train

    train(parse_config(tree, Config))


def test_two_ranks_train_what_one_does(tree, run_yaml, tmp_path):
    tree |= {"max_steps": 4, "block": {"anchors": 3}, "metrics": {"log_every": 1, "tensorboard": False}}
    _train(tree | {"run_dir": str(tmp_path / "one")})
    assert by_two_ranks(_train, tree | {"run_dir": str(tmp_path / "two")}) == [0, 0]
    assert losses_alone(tmp_path / "one") == pytest.approx(losses_alone(tmp_path / "two"), rel=1e-4)


def test_the_engines_train_alike(run_yaml, runs, tmp_path):
    for engine in ("fused", "reference"):
        runs("train", run_yaml, f"step={engine}", f"run_dir={tmp_path / engine}", "optim.lr=1e-3")
    assert losses_alone(tmp_path / "fused") == pytest.approx(losses_alone(tmp_path / "reference"), rel=1e-4)


def test_a_store_feeds_it_as_the_target_does(run_yaml, runs, tmp_path):
    store = tmp_path / "store"
    runs("features", "capture", run_yaml, store)
    runs("train", run_yaml)
    runs("train", run_yaml, f"features.path={store}", f"run_dir={tmp_path / 'stored'}")
    assert losses_alone(tmp_path / "stored") == pytest.approx(losses_alone(tmp_path / "run"), rel=1e-5)


def test_muon_trains_it_is_stopped_goes_on_and_is_exported(run_yaml, runs, fastdraft, tmp_path, monkeypatch):
    """Bit for bit as without a stop, also in bf16; the plan says what Muon steps and at which rates."""
    muon = ("optim.optimizer=muon", "optim.muon_lr=0.04", "precision=bf16")
    assert "at a rate of 0.04" in runs("train", run_yaml, *muon, "--plan")
    runs("train", run_yaml, *muon, f"run_dir={tmp_path / 'whole'}")
    runs("train", run_yaml, "optim.optimizer=adamw", "precision=bf16", f"run_dir={tmp_path / 'adamw'}")
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda _: signal.raise_signal(signal.SIGTERM))
        assert fastdraft("train", run_yaml, *muon)[0] == 128 + signal.SIGTERM
    assert "step-00000003, step 3" in runs("train", run_yaml, *muon).replace("\n", "")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    states = [
        load_file(next(list_checkpoints(tmp_path / name)[-1].glob("*.safetensors"))) for name in ("run", "whole", "adamw")
    ]
    assert all(torch.equal(states[0][name], x) for name, x in states[1].items())
    assert not torch.equal(states[2]["master"], states[0]["master"])
    assert "verified" in runs("export", tmp_path / "run", tmp_path / "out")


OTHER_SETTINGS = {
    "dflash": ["step=reference", "precision=bf16", "block.loss=ce", "block.loss=kl", "chunk_rows=3"],
    "dflash2": ["precision=bf16", "block.loss=dpace", "block.loss=kl", "chunk_rows=3"],
    "dspark": ["precision=bf16", "block.l1_weight=0", "chunk_rows=3"],
}


@pytest.mark.parametrize("method, change", [(m, change) for m, changes in OTHER_SETTINGS.items() for change in changes])
def test_other_settings_train_too(method, change, tree, runs, tmp_path):
    runs("train", block_run(tree, tmp_path, method), change, "max_steps=3")
    assert losses(tmp_path / "run")[-1]["step"] == 3
    assert "a0" in losses(tmp_path / "run")[0]


REFUSED = {
    "dflash": {
        "draft.overrides.mask_token_id=500": "mask_token_id 500 lies outside the target's vocabulary of 192",
        "draft.overrides.mask_token_id=2": "mask_token_id 2 is the target's eos and pad token",
        "draft.overrides.mask_token_id=30": "chats.jsonl:4 has token 30, which is the draft's mask_token_id",
        "draft.overrides.draft_vocab_size=64": "a DFlash draft has no draft_vocab_size",
        "draft.overrides.hidden_size=64": "hidden_size is 32 in the target's config.json and cannot be set to 64",
        "draft.overrides.target_hidden_size=64": "a DFlash draft has no target_hidden_size",
        "draft.overrides.layers=[1, 7]": "must ascend and lie in 0..6",
        "draft.overrides.layers=[]": "layers: ",
        "draft.overrides.block_size=1": "block_size: ",
        "draft.overrides.blok_size=4": "draft setting 'blok_size' does not exist; the nearest is 'block_size'",
        "draft.overrides={num_hidden_layers:1}": "draft setting 'num_hidden_layers:1' does not exist; YAML wants a space",
        "draft.overrides.layer_types=null": "layer_types of the draft is null; give a value, or take the key out",
        "draft.overrides.num_layers=2": "draft setting 'num_layers' does not exist; the nearest is 'num_hidden_layers'",
        "draft.overrides.vocab_sise=9": "does not exist; those of DFlash are intermediate_size, num_attention_heads, ",
        "draft.overrides.labels=left": "labels: ",
        "draft.overrides.sliding_window=64": "a window needs a sliding_attention layer",
        "ttt_length=3": "ttt_length 3 is EAGLE-3's",
        "sampled_depth=0.8": "sampled_depth 0.8 is EAGLE-3's",
        "loss.kind=lk_alpha": "the section loss is EAGLE-3's",
        "draft.vocab_map=x.pt": "a DFlash draft has the target's",
        "block.anchors=0": "block.anchors",
        "block={loss: ce, dpace_alpha: 0.3}": "block.dpace_alpha is of block.loss dpace, and the loss is ce",
        "block.lk_decay=2": "block.lk_decay is of block.loss lk_lambda, and the loss is dpace",
        "block.gamma=2": "block.gamma is 2 and block.loss dpace, DFlash's own where none is set, which makes its "
        "weights of",
        "block.anchor=7": "did you mean 'anchors'?",
        "block={loss: dpace, gamma: 3}": "block.gamma is 3 and block.loss dpace, which makes its weights of the draft's "
        "own",
    },
    "dflash2": {
        "draft.overrides.conv_group_size=12": "conv_group_size 12 is no power of two",
        "draft.overrides.conv_group_size=64": "conv_group_size 64 does not divide hidden_size 32",
        "draft.overrides.conv_kernel_size=6": "conv_kernel_size 6 is more than the 5 rows of a block",
        "draft.overrides.selector_top_k=1": "selector_top_k: ",
        "draft.overrides.selector_rank=0": "selector_rank: ",
        "draft.overrides.draft_vocab_size=64": "a DFlash2 draft has no draft_vocab_size",
        "draft.overrides.selector=3": "draft setting 'selector' does not exist; the nearest is 'selector_",
        "block.selector_alpha=-1": "block.selector_alpha",
        "ttt_length=3": "ttt_length 3 is EAGLE-3's",
    },
    "dspark": {
        "draft.overrides.labels=fill_in": "labels: ",
        "draft.overrides.markov_head_type=gated": "a Markov head of type 'gated' is not made here",
        "draft.overrides.markov_rank=0": "markov_rank: ",
        "draft.overrides.markov_rnk=4": "draft setting 'markov_rnk' does not exist; the nearest is 'markov_rank'",
        "draft.overrides.draft_vocab_size=64": "a DSpark draft has no draft_vocab_size",
        "draft.overrides.mask_token_id=2": "mask_token_id 2 is the target's eos and pad token",
        "block.loss=kl": "block.loss is DFlash and DFlash2's, and draft.method is dspark",
        "block.dpace_alpha=0.2": "block.dpace_alpha is DFlash and DFlash2's",
        "block={ce_weight: 0, l1_weight: 0}": "block.ce_weight and block.l1_weight are both 0",
        "block.confidence_weight=0": "block.confidence_weight",
        "loss.kind=lk_alpha": "the section loss is EAGLE-3's; a DSpark draft's loss is in the section block",
    },
}


@pytest.mark.parametrize("method, change", [(m, change) for m, changes in REFUSED.items() for change in changes])
def test_what_does_not_fit_is_one_sentence(method, change, tree, tmp_path, fastdraft):
    assert REFUSED[method][change] in refusal(fastdraft("train", block_run(tree, tmp_path, method), change))


def test_a_vocabulary_is_refused_before_the_target_is_loaded(run_yaml, fastdraft):
    said = refusal(fastdraft("train", run_yaml, "--plan", "draft.vocab_map=x.pt"))
    assert "draft.vocab_map is for drafts with a vocabulary of their own; a D" in said
