"""The draft's shape from real targets' config.json spellings, overrides, refusals and the parameter count."""

import copy
import json

import pytest
import torch
import yaml
from tiny import LLAMA_8B as LLAMA
from transformers import Gemma3Config, GptOssConfig, LlamaConfig, Phi3Config, PhiConfig, Qwen2Config, Qwen3MoeConfig

from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.target_config import canonical_rope, read_target_config


def test_llama_in_the_old_spelling():
    c = DraftConfig.from_target(LLAMA)
    assert (c.hidden_size, c.target_hidden_size, c.head_dim, c.num_key_value_heads) == (4096, 4096, 128, 8)
    assert c.layers == (1, 15, 28) and c.uses_default_layers
    assert (c.draft_vocab_size, c.vocab_size, c.max_position_embeddings) == (32000, 128256, 131072)
    assert c.rope_parameters == LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    assert c.eos_token_id == [128001, 128008, 128009]


def test_both_spellings_and_a_config_object_agree():
    new = {k: v for k, v in LLAMA.items() if k not in ("rope_scaling", "rope_theta")}
    new["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": 500000.0}
    old_type = LLAMA | {
        "rope_scaling": {k: v for k, v in LLAMA["rope_scaling"].items() if k != "rope_type"} | {"type": "llama3"}
    }
    expected = DraftConfig.from_target(LLAMA)
    assert DraftConfig.from_target(new) == DraftConfig.from_target(old_type) == expected
    assert DraftConfig.from_target(LlamaConfig(**copy.deepcopy(LLAMA))) == expected


def test_defaults_a_convention_defines():
    c = DraftConfig.from_target({k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"vocab_size": 5000})
    assert c.num_key_value_heads == 32 and c.head_dim == 128 and c.draft_vocab_size == 5000


def test_qwen_bias_is_not_the_drafts_and_head_dim_is():
    c = DraftConfig.from_target(Qwen2Config().to_dict() | {"attention_bias": True, "head_dim": 96})
    assert c.head_dim == 96 and c.to_serving(torch.bfloat16)["attention_bias"] is False


def test_moe_widths():
    assert DraftConfig.from_target(Qwen3MoeConfig(intermediate_size=6144)).intermediate_size == 6144
    config = Qwen3MoeConfig(moe_intermediate_size=768, num_experts_per_tok=8).to_dict()
    del config["intermediate_size"]
    assert DraftConfig.from_target(config).intermediate_size == 6144


def test_gpt_oss():
    c = DraftConfig.from_target(GptOssConfig(num_hidden_layers=24))
    assert (c.head_dim, c.hidden_size, c.intermediate_size, c.num_attention_heads) == (64, 2880, 2880, 64)
    assert c.rope_parameters == {
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    }


def test_gemma_multimodal_takes_the_global_rope_and_the_outer_tokens():
    config = Gemma3Config(eos_token_id=[1, 106]).to_dict()
    c = DraftConfig.from_target(config)
    assert c.head_dim == 256 and c.vocab_size == 262208
    assert c.rope_parameters == {"rope_type": "default", "rope_theta": 1000000.0}
    assert c.eos_token_id == [1, 106]
    config["text_config"]["rope_parameters"] = {"sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    with pytest.raises(ValueError, match=r"sliding_attention.*full_attention"):
        DraftConfig.from_target(config)


def test_phi_partial_rotary_and_longrope():
    with pytest.raises(ValueError, match="does not say rms_norm_eps"):
        DraftConfig.from_target(PhiConfig())
    c = DraftConfig.from_target(PhiConfig(), rms_norm_eps=1e-5)
    assert c.rope_parameters["partial_rotary_factor"] == 0.5
    served = c.to_serving(torch.bfloat16)
    assert served["partial_rotary_factor"] == 0.5 == served["rope_parameters"]["partial_rotary_factor"]
    longrope = Phi3Config().to_dict() | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="'longrope' is not computed alike"):
        DraftConfig.from_target(longrope)
    plain = DraftConfig.from_target(longrope, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    assert plain.rope_parameters["rope_type"] == "default"


def test_mrope_is_plain_rope_on_text():
    vl = {"text_config": {k: v for k, v in LLAMA.items() if k != "rope_scaling"}, "model_type": "some_vl"}
    vl["text_config"]["rope_scaling"] = {"type": "mrope", "mrope_section": [16, 24, 24]}
    assert DraftConfig.from_target(vl).rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}


def test_yarn_original_length_comes_from_the_target_when_unsaid():
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}
    c = DraftConfig.from_target(LLAMA | {"rope_parameters": rope, "original_max_position_embeddings": 4096})
    assert c.rope_parameters["original_max_position_embeddings"] == 4096
    c = DraftConfig.from_target(LLAMA | {"rope_parameters": rope})
    assert c.rope_parameters["original_max_position_embeddings"] == 131072


def test_deepseeks_scale_of_scores_is_not_inherited():
    rope = {"rope_type": "yarn", "factor": 40.0, "rope_theta": 1e4, "original_max_position_embeddings": 4096}
    theirs = rope | {"beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707}
    c = DraftConfig.from_target(LLAMA | {"rope_parameters": theirs})
    assert c.rope_parameters == rope | {"beta_fast": 32, "beta_slow": 1}
    old = {"type": "yarn"} | {key: x for key, x in theirs.items() if key not in ("rope_type", "rope_theta")}
    assert DraftConfig.from_target(LLAMA | {"rope_scaling": old, "rope_theta": 1e4}).rope_parameters == c.rope_parameters
    with pytest.raises(ValueError, match="mscale"):
        DraftConfig.from_target(LLAMA, rope_parameters=theirs)


@pytest.mark.parametrize(
    ("rope", "words"),
    [
        ({"rope_type": "default"}, "rope_theta"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "needs low_freq_factor, high_freq_factor, original"),
        (
            {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 9, "mscale": 1.0},
            "mscale = 1.0",
        ),
        ({"rope_type": "default", "rope_theta": 1e4, "facter": 8.0}, "facter"),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 8.0}, "dynamic"),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": "8"}, "factor is '8'"),
        ({"rope_type": "default", "rope_theta": 0}, "rope_theta is 0"),
        ({"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}, "at most 1"),
    ],
)
def test_rope_that_engines_would_read_differently_is_refused(rope, words):
    with pytest.raises(ValueError, match=words):
        canonical_rope(rope)


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "vocab_size", "rms_norm_eps", "rope_theta", "intermediate_size"]
)
def test_missing_fields_are_named(key):
    with pytest.raises(ValueError, match=f"does not say {key}"):
        DraftConfig.from_target({k: v for k, v in LLAMA.items() if k != key})


def test_several_missing_fields_are_named_together():
    with pytest.raises(ValueError, match="does not say vocab_size, num_hidden_layers, max_position_embeddings"):
        gone = ("vocab_size", "num_hidden_layers", "max_position_embeddings")
        DraftConfig.from_target({k: v for k, v in LLAMA.items() if k not in gone})


def test_overrides():
    c = DraftConfig.from_target(LLAMA, hidden_size=2048, layers=[3, 9, 20], draft_vocab_size=128256, fc_norm=True)
    assert (c.hidden_size, c.target_hidden_size, c.head_dim, c.layers) == (2048, 4096, 128, (3, 9, 20))
    with pytest.raises(ValueError, match="'draft_vocab' does not exist; the nearest is 'draft_vocab_size'"):
        DraftConfig.from_target(LLAMA, draft_vocab=5)
    with pytest.raises(ValueError, match=r"vocab_size is 128256 in the target's config\.json"):
        DraftConfig.from_target(LLAMA, vocab_size=5)
    with pytest.raises(ValueError, match=r"hidden_size: Input should be a valid integer.*'wide'"):
        DraftConfig.from_target(LLAMA, hidden_size="wide")
    with pytest.raises(ValueError, match="draft_vocab_size 200000 is larger than vocab_size 128256"):
        DraftConfig.from_target(LLAMA, draft_vocab_size=200000)
    with pytest.raises(ValueError, match=r"layers \[3, 9, 31\] must ascend and lie in 0\.\.30"):
        DraftConfig.from_target(LLAMA, layers=[3, 9, 31])
    with pytest.raises(ValueError, match="leave it 5; choose an even number"):
        DraftConfig.from_target(LLAMA, head_dim=5)


def test_serving_round_trip_and_refusals():
    c = DraftConfig.from_target(LLAMA, layers=[2, 9, 20], fc_norm=True, hidden_size=2048)
    served = json.loads(json.dumps(c.to_serving(torch.bfloat16)))
    assert DraftConfig.from_serving(served, 32, 4096) == c
    with pytest.raises(
        ValueError, match=r"target_hidden_size .* is 4096, the target's is 5120; the draft was made for another target"
    ):
        DraftConfig.from_serving(served, 32, 5120)
    for key in ("attention_bias", "tie_word_embeddings", "norm_before_residual"):
        with pytest.raises(ValueError, match=f"{key} is true"):
            DraftConfig.from_serving(served | {key: True}, 32)
    with pytest.raises(ValueError, match="architectures"):
        DraftConfig.from_serving(served | {"architectures": ["DeepseekV3ForCausalLMEagle3"]}, 32)
    with pytest.raises(ValueError, match=r"draft_vocab_size is missing\. rms_norm_eps is missing"):
        DraftConfig.from_serving({k: v for k, v in served.items() if k not in ("draft_vocab_size", "rms_norm_eps")}, 32)


def test_older_checkpoints_with_one_rope_spelling_and_no_head_dim_are_read():
    served = DraftConfig.from_target(LLAMA).to_serving(torch.float16)
    old = {k: v for k, v in served.items() if k not in ("rope_parameters", "head_dim")}
    assert DraftConfig.from_serving(old, 32) == DraftConfig.from_target(LLAMA)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"fc_norm": True, "hidden_size": 24, "draft_vocab_size": 100, "head_dim": 10},
        {"norm_before_fc": True, "norm_output": True, "hidden_size": 24},
    ],
)
def test_parameter_counts_are_the_modules(overrides):
    small = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
    }
    c = DraftConfig.from_target(LLAMA | small, **overrides)
    draft, count = Draft(c), c.num_parameters()
    assert count["trainable"] == sum(p.numel() for p in draft.trainable().values())
    assert sum(count.values()) == sum(p.numel() for p in draft.parameters())


def test_init_writes_overrides_that_give_the_same_draft(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    text = DraftConfig.init_config(tmp_path)
    settings = yaml.safe_load(text)
    assert DraftConfig.from_target(LLAMA, **settings) == DraftConfig.from_target(LLAMA)
    assert settings["layers"] == [1, 15, 28] and settings["rope_parameters"]["factor"] == 8.0
    assert all(line.startswith("#") or yaml.safe_load(line) for line in text.splitlines())


def test_target_config_is_completed_by_its_class_or_taken_as_written(tmp_path):
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "intermediate_size": 10240}
    outer = {"model_type": "gemma3", "text_config": text | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    c = DraftConfig.from_target(read_target_config(tmp_path))
    assert c.head_dim == 256 and c.layers == (1, 16, 30)
    assert c.rope_parameters == {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"model_type": "nobody_knows"}))
    assert DraftConfig.from_target(read_target_config(tmp_path)) == DraftConfig.from_target(LLAMA)
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        read_target_config(tmp_path / "nowhere")


def test_an_override_of_the_wrong_type_is_a_sentence():
    with pytest.raises(ValueError, match="num_attention_heads"):
        DraftConfig.from_target(LLAMA | {"head_dim": None}, num_attention_heads="x")
