"""A DSpark draft through the commands a user types: init, plan, train, resume, evaluate, export, check; bad input."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_blocks import OVERRIDES, block_run, decode_all_ways, train_stop_and_resume
from small_runs import losses
from tiny import refusal, write_chats

BLOCKS = OVERRIDES["dspark"]


@pytest.fixture
def run_yaml(tree, tmp_path):
    return block_run(tree, tmp_path, "dspark")


def test_a_draft_goes_through_the_commands(run_yaml, runs, target_dir, tmp_path):
    run, prompts = tmp_path / "run", write_chats(tmp_path / "prompts.jsonl", 4, turns=1)
    init = runs("init", target_dir, "--method", "dspark")
    assert "# DSpark draft for" in init and "labels" not in yaml.safe_load(init)
    assert yaml.safe_load(init)["markov_rank"] == 256 and yaml.safe_load(init)["block_size"] == 7
    assert "draft's attention" in runs("train", run_yaml, "--plan")

    said, trained = train_stop_and_resume(runs, run_yaml, run)
    assert "blocks of 4 rows draft 4 tokens (shifted labels) from the target's layers [1, 5]" in said
    assert "not exported" not in said
    decode_all_ways(runs, run, prompts)

    out = tmp_path / "out"
    runs("export", run, out)
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["Qwen3DSparkModel"] and config["model_type"] == "qwen3"
    at_root = {
        "block_size": 4,
        "target_layer_ids": [1, 5],
        "mask_token_id": 187,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
    }
    assert {name: config[name] for name in at_root} == at_root
    assert config["dflash_config"] == {"target_layer_ids": [1, 5]}  # all that vLLM 0.26 looks for there
    shapes = {name: list(t.shape) for name, t in load_file(out / "model.safetensors").items()}
    assert not {"embed_tokens.weight", "lm_head.weight"} & shapes.keys()
    heads = {name: shape for name, shape in shapes.items() if "head" in name}
    assert heads == {
        "markov_head.markov_w1.weight": [192, 8],
        "markov_head.markov_w2.weight": [192, 8],
        "confidence_head.proj.weight": [1, 40],
        "confidence_head.proj.bias": [1],
    }
    assert "verified for SGLang and vLLM" in runs("check", "--checkpoint", out, "--target", target_dir)
    warm = ("draft.overrides={}", f"draft.init_from={out}", f"run_dir={tmp_path / 'warm'}", "optim.lr=1e-5")
    runs("train", run_yaml, *warm)
    assert losses(tmp_path / "warm")[0]["loss"] < trained[0]["loss"] - 0.1


@pytest.mark.parametrize("change", ["precision=bf16", "block.l1_weight=0", "chunk_rows=3"])
def test_other_settings_train_too(change, run_yaml, runs, tmp_path):
    runs("train", run_yaml, change, "max_steps=3")
    assert losses(tmp_path / "run")[-1]["step"] == 3


REFUSED = {
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
}


@pytest.mark.parametrize("change", REFUSED)
def test_what_does_not_fit_is_one_sentence(change, run_yaml, fastdraft):
    assert REFUSED[change] in refusal(fastdraft("train", run_yaml, change))


def test_a_run_is_kept_under_its_methods_name(run_yaml):
    from fastdraft.config import load_config

    tree = yaml.safe_load(run_yaml.read_text())
    del tree["run_dir"]
    run_yaml.write_text(yaml.safe_dump(tree))
    assert load_config(run_yaml).run_dir == "runs/dspark"
    assert load_config(run_yaml, ["draft={}"]).run_dir == "runs/eagle3"
    assert load_config(run_yaml, ["run_dir=mine"]).run_dir == "mine"


def test_the_plan_says_what_dsparks_loss_is(run_yaml, runs):
    said = runs("train", run_yaml, "--plan", "block.ce_weight=0.2")
    law = (
        "A slot's loss is 0.2 times the cross entropy with the data's own token, 0.9 times the L1 distance from the "
        "target's distribution, and 1 times the confidence head's. Drafted token j = 0, 1, ... of a block weighs "
        "exp(-j / 4)"
    )
    assert law in said and "The loss ce" not in said


def test_dsparks_settings_are_not_dflashs(run_yaml, fastdraft):
    line = refusal(fastdraft("train", run_yaml, "draft={method: dflash}", "block.ce_weight=0.3"))
    assert "block.ce_weight is DSpark's, and draft.method is dflash" in line


# --- verification: a fault of an export is named -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(target_dir, tmp_path_factory):
    from fastdraft.model.dspark.config import DSparkConfig
    from fastdraft.model.dspark.draft import DSparkDraft
    from fastdraft.model.target_config import read_target_config
    from fastdraft.serving.export import export_draft

    draft = DSparkDraft(DSparkConfig.from_target(read_target_config(target_dir), mask_token_id=190, **BLOCKS))
    draft.init_weights(0.1, torch.Generator().manual_seed(0))
    return export_draft(draft, tmp_path_factory.mktemp("export") / "out", torch.float32)


FAULTS = {
    "pad": (lambda c: c.update(mask_token_id=2), "mask_token_id 2 is the target's eos token"),
    "mask outside": (lambda c: c.update(mask_token_id=192), "must be an id of the target's vocabulary of 192"),
    "causal": (lambda c: c.update(is_causal=True), "is_causal is true, with which engines make the block causal"),
    "not shifted": (lambda c: c.update(sample_from_anchor=False), "sample_from_anchor is False"),
    "labels unsaid": (lambda c: c.pop("sample_from_anchor"), "sample_from_anchor is None"),
    "confidence unsaid": (lambda c: c.pop("confidence_head_with_markov"), "confidence_head_with_markov is None"),
    "layers": (lambda c: c.update(target_layer_ids=[1, 7]), "target_layer_ids [1, 7] must ascend and lie in 0..6"),
    "boundaries": (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 6]), "engines differ, leave it out"),
    "elsewhere": (lambda c: c.update(dflash_config={"mask_token_id": 3}), "dflash_config.mask_token_id is 3"),
    "prefixed": (lambda c: c.update(dspark_block_size=8), "dspark_block_size is there, which SGLang reads before block"),
    "no rank": (lambda c: c.pop("markov_rank"), "markov_rank is None; it must be a whole number above 0"),
    "gated": (lambda c: c.update(markov_head_type="gated"), "markov_head_type is 'gated'; it must be 'vanilla'"),
    "a scale": (lambda c: c.update(logit_scale=0.5), "logit_scale is 0.5, with which engines compute something else"),
    "no block": (lambda c: c.pop("block_size"), "block_size is None"),
    "vocabulary": (lambda c: c.update(draft_vocab_size=64), "SGLang serves a DSpark draft with the target's whole"),
    "dtype": (lambda c: c.update(dtype="bfloat16"), "dtype is bfloat16, the weights are float32"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_config_is_named(fault, exported, target_dir, tmp_path, fastdraft):
    break_it, words = FAULTS[fault]
    config = json.loads((exported / "config.json").read_text())
    break_it(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    code, out, _ = fastdraft("check", "--checkpoint", tmp_path, "--target", target_dir)
    assert code == 1 and words in " ".join(out.split()), out


def test_fewer_candidates_are_a_warning(exported, target_dir, tmp_path, fastdraft):
    config = json.loads((exported / "config.json").read_text()) | {"dspark_draft_topk": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes())
    code, out, _ = fastdraft("check", "--checkpoint", tmp_path, "--target", target_dir)
    assert code == 0 and "dspark_draft_topk is 8: vLLM then chooses among so many" in " ".join(out.split())


TENSORS = {
    "no confidence": (lambda t: t.pop("confidence_head.proj.bias"), "missing: confidence_head.proj.bias"),
    "rank": (
        lambda t: t.update({"markov_head.markov_w2.weight": torch.zeros(192, 4)}),
        "markov_head.markov_w2.weight is [192, 4], config.json makes it [192, 8]",
    ),
    "gate": (
        lambda t: t.update({"markov_head.gate_proj.weight": torch.zeros(8, 40)}),
        "markov_head.gate_proj.weight is there: no DSpark draft has it",
    ),
}


@pytest.mark.parametrize("fault", TENSORS)
def test_a_fault_in_the_tensors_is_named(fault, exported, target_dir, tmp_path, fastdraft):
    break_it, words = TENSORS[fault]
    tensors = load_file(exported / "model.safetensors")
    break_it(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((exported / "config.json").read_bytes())
    code, out, _ = fastdraft("check", "--checkpoint", tmp_path, "--target", target_dir)
    assert code == 1 and words in " ".join(out.split()), out


def test_a_checkpoint_of_dflash_is_no_start(run_yaml, exported, target_dir, tmp_path, fastdraft):
    """The other way round too: their labels differ by one place."""
    line = refusal(fastdraft("train", run_yaml, "draft.method=dflash", "draft.overrides={}", f"draft.init_from={exported}"))
    assert "architectures is ['Qwen3DSparkModel']; it must be ['DFlashDraftModel']" in line
