"""What `fastdraft check` says of an export of a draft of blocks: a fault of config.json or of the tensors is named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_blocks import OVERRIDES, block_run
from tiny import refusal

from fastdraft.model.methods import METHODS
from fastdraft.model.target_config import read_target_config
from fastdraft.serving.export import export_draft


@pytest.fixture(scope="module")
def exports(target_dir, tmp_path_factory):
    """By method, in float32, of drafts of random weights."""
    folder, found = tmp_path_factory.mktemp("exports"), {}
    for name, fields in OVERRIDES.items():
        method = METHODS[name]
        draft = method.draft(method.shape.from_target(read_target_config(target_dir), mask_token_id=190, **fields))
        draft.init_weights(0.1, torch.Generator().manual_seed(0))
        found[name] = export_draft(draft, folder / name, torch.float32)
    return found


@pytest.fixture
def checked(exports, target_dir, tmp_path, fastdraft):
    """The exit code of `check` and its words, of an export whose config.json and tensors these functions have changed."""

    def check(method, config=lambda fields: None, tensors=lambda named: None):
        fields = json.loads((exports[method] / "config.json").read_text())
        named = load_file(exports[method] / "model.safetensors")
        config(fields)
        tensors(named)
        (tmp_path / "config.json").write_text(json.dumps(fields))
        save_file(named, tmp_path / "model.safetensors")
        code, said, _ = fastdraft("check", "--checkpoint", tmp_path, "--target", target_dir)
        return code, " ".join(said.split())

    return check


DFLASH = {
    "pad": (lambda c: c["dflash_config"].update(mask_token_id=2), "mask_token_id 2 is the target's eos token"),
    "mask outside": (
        lambda c: c["dflash_config"].update(mask_token_id=192),
        "must be an id of the target's vocabulary of 192",
    ),
    "two masks": (lambda c: c.update(mask_token_id=189), "mask_token_id is 189 and dflash_config.mask_token_id 190"),
    "causal": (lambda c: c.update(is_causal=True), "is_causal is true, with which engines make the block causal"),
    "causal inside": (lambda c: c["dflash_config"].update(causal=True), "dflash_config.causal is true"),
    "shifted": (lambda c: c.update(sample_from_anchor=True), "its labels are shifted by one slot"),
    "layers": (lambda c: c["dflash_config"].update(target_layer_ids=[1, 7]), "must ascend and lie in 0..6"),
    "boundaries": (lambda c: c.update(eagle_aux_hidden_state_layer_ids=[2, 6]), "engines differ, leave it out"),
    "blocks": (lambda c: c.update(block_size=16), "block_size is 16 and dflash_config.block_size 5"),
    "width": (lambda c: c.update(hidden_size=64), "hidden_size is 64, the target's is 32"),
    "vocabulary": (lambda c: c.update(draft_vocab_size=64), "SGLang serves a DFlash draft with the target's whole"),
    "rope": (lambda c: c.update(rope_theta=5.0), "so they must agree"),
    "layer types": (lambda c: c.update(layer_types=["full_attention"]), "for each of 2 layers"),
    "no window": (lambda c: c.update(layer_types=["sliding_attention"] * 2), "a sliding layer needs a whole number"),
    "bias": (lambda c: c.update(attention_bias=True), "attention_bias is True; a DFlash draft here is trained with False"),
    "sliding layers not causal": (
        lambda c: c.update(is_causal=False, layer_types=["sliding_attention"] * 2, sliding_window=8),
        "is_causal is false, with which engines let a row of a sliding layer see later rows",
    ),
    "sliding layers not causal, nested": (
        lambda c: (
            c["dflash_config"].update(causal=False),
            c.update(layer_types=["sliding_attention"] * 2, sliding_window=8),
        ),
        "dflash_config.causal is false, with which engines",
    ),
    "windows in full layers": (lambda c: c["dflash_config"].update(use_swa=True), "vLLM then gives each a sliding window"),
    "interleaved RoPE": (lambda c: c.update(is_neox_style=False), "is_neox_style is False, with which engines compute"),
    "interleaved for SGLang": (lambda c: c.update(rope_is_neox_style=False), "rope_is_neox_style is False, with which"),
    "Domino": (lambda c: c["dflash_config"].update(projector_type="domino"), "dflash_config.projector_type is 'domino'"),
    "sinks": (lambda c: c["dflash_config"].update(attention_sink_bias=True), "dflash_config.attention_sink_bias is True"),
    "scaled values": (lambda c: c["dflash_config"].update(attention_value_scale=0.5), "attention_value_scale is 0.5"),
    "a cap": (lambda c: c["dflash_config"].update(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
    "speculators": (lambda c: c.update(speculators_model_type="dflash"), "speculators_model_type is 'dflash'"),
    "nothing nested": (lambda c: c.pop("dflash_config"), "dflash_config is None"),
    "dtype": (lambda c: c.update(dtype="bfloat16"), "dtype is bfloat16, the weights are float32"),
}

DSPARK = {
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

DFLASH2 = {
    "no rank": (lambda c: c["dflash_config"].pop("selector_rank"), "dflash_config.selector_rank is None"),
    "no taps": (lambda c: c["dflash_config"].update(conv_kernel_size=0), "dflash_config.conv_kernel_size is 0"),
    "another rank": (lambda c: c["dflash_config"].update(selector_rank=16), "config.json makes it [192, 16]"),
    "a scale": (lambda c: c["dflash_config"].update(output_multiplier=0.5), "dflash_config.output_multiplier is 0.5"),
    "a cap": (lambda c: c["dflash_config"].update(final_logit_softcapping=30.0), "final_logit_softcapping is 30.0"),
    "DFlash's name": (lambda c: c.update(architectures=["DFlashDraftModel"]), "leave it out"),
    "causal": (lambda c: c.update(is_causal=True), "is_causal is true, with which engines make the block causal"),
    "shifted": (lambda c: c.update(sample_from_anchor=True), "its labels are shifted by one slot"),
    "pad": (lambda c: c["dflash_config"].update(mask_token_id=2), "mask_token_id 2 is the target's eos token"),
    "layers": (lambda c: c["dflash_config"].update(target_layer_ids=[1, 7]), "must ascend and lie in 0..6"),
}

FAULTS = {"dflash": DFLASH, "dspark": DSPARK, "dflash2": DFLASH2}


@pytest.mark.parametrize(("method", "fault"), [(method, fault) for method, faults in FAULTS.items() for fault in faults])
def test_a_fault_in_the_config_is_named(method, fault, checked):
    break_it, words = FAULTS[method][fault]
    code, said = checked(method, config=break_it)
    assert code == 1 and words in said


DFLASH_TENSORS = {
    "missing": (lambda t: t.pop("norm.weight"), "missing: norm.weight"),
    "head": (lambda t: t.update({"lm_head.weight": torch.zeros(192, 32)}), "both engines take the target's head"),
    "shape": (
        lambda t: t.update({"fc.weight": torch.zeros(32, 96)}),
        "fc.weight is [32, 96], config.json makes it [32, 64]",
    ),
    "nan": (lambda t: t["norm.weight"].fill_(torch.nan), "norm.weight has 32 NaN or infinite values"),
    "mixed": (lambda t: t.update({"norm.weight": t["norm.weight"].half()}), "weights are of several dtypes"),
}

DSPARK_TENSORS = {
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

DFLASH2_TENSORS = {
    "no projection": (
        lambda t: t.pop("candidate_selector.hidden_projection.weight"),
        "missing: candidate_selector.hidden_projection.weight",
    ),
    "nan": (
        lambda t: t["layers.0.mlp_conv.base_kernel"][0, 1].fill_(torch.nan),
        "layers.0.mlp_conv.base_kernel has 32 NaN",
    ),
}

TENSORS = {"dflash": DFLASH_TENSORS, "dspark": DSPARK_TENSORS, "dflash2": DFLASH2_TENSORS}


@pytest.mark.parametrize(("method", "fault"), [(method, fault) for method, faults in TENSORS.items() for fault in faults])
def test_a_fault_in_the_tensors_is_named(method, fault, checked):
    break_it, words = TENSORS[method][fault]
    code, said = checked(method, tensors=break_it)
    assert code == 1 and words in said


def test_all_faults_of_one_checkpoint_are_named(checked):
    """One does not hide another."""

    def change(tensors):
        for break_it, _ in TENSORS["dflash2"].values():
            break_it(tensors)

    code, said = checked("dflash2", tensors=change)
    assert code == 1 and all(words in said for _, words in TENSORS["dflash2"].values())


def test_a_mask_embedding_of_its_own_is_named(exports, target_dir, tree, tmp_path, fastdraft):
    """Engines embed mask rows with it, and no tensor of the checkpoint would tell."""
    draft = tmp_path / "draft"
    shutil.copytree(exports["dflash"], draft)
    torch.save({"embedding": torch.zeros(32), "mask_token_id": 190}, draft / "mask_embedding.pt")
    code, out, _ = fastdraft("check", "--checkpoint", draft, "--target", target_dir)
    assert code == 1 and "mask_embedding.pt is there: both engines embed the mask rows with it" in " ".join(out.split())
    run_yaml = block_run(tree, tmp_path, "dflash")
    said = refusal(fastdraft("train", run_yaml, "draft.overrides={}", f"draft.init_from={draft}"))
    assert "mask_embedding.pt is there" in said


def test_what_changes_nothing_is_no_fault(checked):
    """Fields of published checkpoints, at the values at which engines do what is trained here; RoPE in the old spelling."""

    def change(config):
        config |= {"auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "use_sliding_window": False}
        config |= {"is_causal": False, "is_neox_style": True, "rope_scaling": None, "sliding_window": None}
        config["max_window_layers"], config["rope_theta"] = 5, config.pop("rope_parameters")["rope_theta"]
        config["dflash_config"] |= {"causal": False, "projector_type": "dflash", "attention_value_scale": 1.0}

    code, said = checked("dflash", config=change)
    assert code == 0 and "verified for SGLang and vLLM" in said


def test_a_word_as_mask_is_a_warning(checked):
    code, said = checked("dflash", config=lambda c: c["dflash_config"].update(mask_token_id=40))
    assert code == 0 and "mask_token_id 40 is" in said


def test_fewer_candidates_are_a_warning(checked):
    code, said = checked("dspark", config=lambda c: c.update(dspark_draft_topk=8))
    assert code == 0 and "dspark_draft_topk is 8: vLLM then chooses among so many" in said


def test_a_checkpoint_of_another_method_is_no_start(exports, tree, tmp_path, fastdraft):
    """Of the two their labels differ by one place."""
    run_yaml = block_run(tree, tmp_path, "dflash")
    line = refusal(fastdraft("train", run_yaml, "draft.overrides={}", f"draft.init_from={exports['dspark']}"))
    assert "architectures is ['Qwen3DSparkModel']; it must be ['DFlashDraftModel']" in line
