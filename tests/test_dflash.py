"""A DFlash draft through the commands a user types: init, plan, train, resume, evaluate, export, check; bad input."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_blocks import block_run, decode_all_ways, train_stop_and_resume
from small_runs import losses
from tiny import refusal, save_target, write_chats

from fastdraft.config import load_config
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.run.plan import known_work, predict


@pytest.fixture
def run_yaml(tree, tmp_path):
    return block_run(tree, tmp_path, "dflash")


def test_a_draft_goes_through_the_commands(run_yaml, runs, target_dir, tmp_path):
    run, prompts = tmp_path / "run", write_chats(tmp_path / "prompts.jsonl", 4, turns=1)
    init = runs("init", target_dir, "--method", "dflash")
    assert "mask_token_id: 187" in init and yaml.safe_load(init)["layers"] == [1, 2, 3, 4, 5]
    assert "draft's attention" in runs("train", run_yaml, "--plan")

    said, _ = train_stop_and_resume(runs, run_yaml, run)
    assert "blocks of 5 rows draft 4 tokens (fill_in labels) from the target's layers [1, 5]" in said
    decode_all_ways(runs, run, prompts)

    out = tmp_path / "out"
    runs("export", run, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["DFlashDraftModel"] and config["block_size"] == 5
    assert config["dflash_config"] == {"target_layer_ids": [1, 5], "mask_token_id": 187, "block_size": 5}
    assert not {"embed_tokens.weight", "lm_head.weight"} & load_file(out / "model.safetensors").keys()
    assert "verified for SGLang and vLLM" in runs("check", "--checkpoint", out, "--target", target_dir)
    runs("train", run_yaml, "draft.overrides={}", f"draft.init_from={out}", f"run_dir={tmp_path / 'warm'}")


def test_a_resumed_run_draws_the_anchors_of_the_whole_one(run_yaml, runs, tmp_path):
    """With fewer anchors than places every step draws others, so a resume that began its count anew would show."""
    few = ("block.anchors=2", "checkpoint.keep=9", "max_steps=8", "metrics.log_every=1")
    runs("train", run_yaml, *few)
    whole = losses(tmp_path / "run")
    for step in (8, 6):
        for path in (tmp_path / "run" / "checkpoints").glob(f"step-*{step}"):
            path.rename(path.with_name(f"aside-{step}"))
    runs("train", run_yaml, *few)
    assert losses(tmp_path / "run") == whole
    runs("train", run_yaml, *few, "seed=1", f"run_dir={tmp_path / 'other'}")
    assert losses(tmp_path / "other") != whole


MASKED = {
    "train": (),
    "train, streaming": ("data.streaming=true", "data.block_conversations=64", "data.vocab_samples=64"),
    "train, a later block": (
        "data.streaming=true",
        "data.block_conversations=9",
        "data.vocab_samples=8",
        "data.eval_fraction=0",
    ),
    "train, held out": ("data.eval_fraction=0", "data.paths=[{clean}]", "data.eval_paths=[{chats}]"),
    "train, held out, streaming": (
        "data.streaming=true",
        "data.eval_fraction=0",
        "data.paths=[{clean}]",
        "data.eval_paths=[{chats}]",
    ),
    "data prepare": (),
    "features capture": (),
}


@pytest.mark.parametrize("how", MASKED)
def test_a_conversation_with_the_mask_token_is_named_before_the_first_step(how, tree, run_yaml, fastdraft, tmp_path):
    """In the only line that has it, wherever the data come from. Lines before it are of an older kind, and one is bad."""
    chats, clean = write_chats(tmp_path / "some.jsonl", 24), write_chats(tmp_path / "clean.jsonl", 24, seed=1)
    lines = chats.read_text().splitlines()
    masked = {"input_ids": [5, 6, 7, 187, 8, 9], "loss_mask": [0, 0, 1, 1, 1, 1]}
    lines[20:20] = ["{}", json.dumps(masked)]
    chats.write_text("\n".join(lines) + "\n")
    changes = [change.format(chats=chats, clean=clean) for change in MASKED[how]]
    if not any("paths" in change for change in changes):
        changes.append(f"data.paths=[{chats}]")
    command = how.partition(",")[0].split()
    store = [tmp_path / "store"] if command[0] == "features" else []
    said = refusal(fastdraft(*command, run_yaml, *store, "data.on_bad_line=skip", *changes))
    assert f"{chats}:22 has token 187, which is the draft's mask_token_id" in said and "1 of " in said
    if "later" not in how:  # of which steps come before
        assert not list((tmp_path / "run").glob("checkpoints/*")) and "loss" not in said


@pytest.mark.parametrize("how", ["train", "held-out", "train, streaming", "in one document"])
def test_documents_without_room_for_a_block_are_refused_before_the_first_step(how, tree, run_yaml, fastdraft, tmp_path):
    """Tokens that are trained on one at a time, at a document's begin, or on both sides of a border; never two in a row."""
    lone, chats = tmp_path / "lone.jsonl", write_chats(tmp_path / "some.jsonl", 8)
    masks = [0, 0, 1, 0, 1, 0, 0, 1], [1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 1, 0, 0]
    rows = [{"input_ids": list(range(5 + n, 13 + n)), "loss_mask": list(mask)} for n, mask in enumerate(masks)]
    if how == "in one document":
        rows[2]["loss_mask"][6] = 1
    lone.write_text("\n".join(map(json.dumps, rows)))
    paths = {"held-out": (f"data.paths=[{chats}]", f"data.eval_paths=[{lone}]")}.get(how, (f"data.paths=[{lone}]",))
    changes = "data.eval_fraction=0", f"data.streaming={'streaming' in how}", "data.vocab_samples=20", "max_steps=1", *paths
    called = fastdraft("train", run_yaml, *changes, "optim.packs_per_step=1")
    if how == "in one document":
        assert called[0] == 0 and losses(tmp_path / "run")[-1]["loss"] > 0
        return
    name = how.partition(",")[0]
    assert f"none of the 4 {name} documents has a place where a block can begin" in refusal(called)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_the_plan_says_how_slots_are_weighed(run_yaml, runs):
    """In a run's words: the division, too, is each loss's own."""
    ce = runs("train", run_yaml, "--plan", "block.loss=ce", "block.gamma=3")
    assert "The loss ce compares a slot with the data's own token. Drafted token j = 0, 1, ..." in ce
    assert "weighs exp(-j / 3)" in ce and "divided by the sum of the weights" in ce
    dpace = runs("train", run_yaml, "--plan", "block.loss=dpace")
    assert "exp(-j" not in dpace and "the sum is divided by the number of blocks" in dpace


def test_the_plan_counts_the_teacher_of_held_out_data(run_yaml, runs):
    """Where the loss has none of its own; it is kept from the first evaluation on."""
    row = "teacher of held-out data"
    assert row in runs("train", run_yaml, "--plan")
    assert row not in runs("train", run_yaml, "--plan", "data.eval_fraction=0")
    assert row not in runs("train", run_yaml, "--plan", "block.loss=kl")


def test_the_mfu_is_of_blocks(run_yaml, monkeypatch):
    """A run counts blocks, and the plan's FLOPs are of a packed token: of a document's 64 only 4 are anchors here."""
    monkeypatch.setattr("fastdraft.run.plan.peak_flops", lambda device: 1e12)
    device, pack = torch.device("cpu"), ("data.max_length=64", "data.pack_tokens=128", "block.anchors=4")
    config = load_config(run_yaml, list(pack))
    planned, work = predict(config, device).flops[1:], known_work(config, device)
    sums = torch.zeros(5, 3, dtype=torch.float64)
    sums[4, 0] = 2 * 4  # blocks of two whole documents
    draft = work.flops(128, sums) - 128 * work.target_flops
    assert draft == pytest.approx(128 * sum(row.size for row in planned))


def test_a_section_of_another_method_is_refused(run_yaml, fastdraft):
    line = refusal(fastdraft("train", run_yaml, "draft={method: eagle3}", "block.anchors=3"))
    assert "the section block is for methods that draft blocks" in line
    line = refusal(fastdraft("train", run_yaml, "draft={method: eagle3}", "block={}", "loss.lk_decay=3"))
    assert "loss.lk_decay is of loss.kind lk_lambda, and the kind is kl" in line


def test_shifted_labels_train_but_are_not_exported(run_yaml, runs, fastdraft, tmp_path):
    assert "can be measured, not exported" in runs("train", run_yaml, "draft.overrides.labels=shifted", "max_steps=2")
    assert len(json.loads(runs("evaluate", tmp_path / "run"))["held_out"]["overall"]["loss"]) == 5
    assert "labels: shifted is a training of slot k" in refusal(fastdraft("export", tmp_path / "run", tmp_path / "out"))


def test_a_tree_and_too_many_steps_are_refused(run_yaml, runs, fastdraft, tmp_path):
    prompts = write_chats(tmp_path / "prompts.jsonl", 1, turns=1)
    runs("train", run_yaml, "max_steps=1")
    ask = ("evaluate", tmp_path / "run", "--prompts", prompts)
    assert "proposes a chain, not a tree" in refusal(fastdraft(*ask, "--eagle-topk", 2))
    assert "num_steps 5 is more than the 4 tokens" in refusal(fastdraft(*ask, "--num-steps", 5))


def test_a_tokenizer_that_fills_the_vocabulary_is_named(tmp_path, fastdraft):
    target = save_target(tmp_path / "full", vocab_size=187)
    line = refusal(fastdraft("init", target, "--method", "dflash"))
    assert "has a token for each of the 187 ids" in line and "none of its tokens is reserved by its name" in line


def test_anchors_reach_the_engine(run_yaml, runs, monkeypatch):
    """Every optimizer step draws for itself, and every evaluation draws the same."""
    from fastdraft.model import dflash

    drawn = []
    monkeypatch.setattr(
        dflash, "draw_anchors", lambda b, n, seed, step: drawn.append(step) or draw_anchors(b, n, seed, step)
    )
    runs("train", run_yaml, "max_steps=3", "optim.packs_per_step=1")
    assert [step for step in drawn if step] == [1, 2, 3] and drawn[-1] == 0
