"""Every family of causal LMs in transformers that can be built tiny: its head is the model's own, also where logits are
large, or it is refused with a sentence."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastdraft.target.hf import Target

# Values for the names that families give to the same sizes; a config takes those that it has.
SIZES = {
    32: "hidden_size n_embd d_model word_embed_proj_dim embedding_size attention_hidden_size lru_width",
    48: "intermediate_size n_inner ffn_dim decoder_ffn_dim ffn_hidden_size d_ff",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size kv_lora_rank q_lora_rank",
    8: "num_hidden_layers n_layer n_layers decoder_layers num_layers head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim "
    "state_size mamba_d_state mamba_n_heads mamba_d_head mamba_num_heads mamba_head_dim linear_key_head_dim "
    "linear_value_head_dim linear_head_dim hidden_size_per_layer_input rotary_dim d_kv",
    4: "num_attention_heads n_head n_heads decoder_attention_heads num_heads num_experts num_local_experts expert_num "
    "n_routed_experts sliding_window time_step_rank",
    2: "num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token moe_topk mamba_expand "
    "linear_num_value_heads linear_num_key_heads linear_num_heads encoder_layers eos_token_id",
    1: "n_group topk_group n_groups mamba_n_groups bos_token_id",
    0: "num_kv_shared_layers pad_token_id",
    96: "vocab_size vocab_size_per_layer_input",
    128: "max_position_embeddings n_positions max_seq_len",
    0.3: "initializer_range",
    # What lies between lm_head and the logits, as no default has it.
    1.7: "logit_scale logits_scaling lm_head_multiplier",
    2.5: "final_logit_softcapping logits_soft_cap",
}
NAMES = """
afmoe apertus arcee bamba biogpt bitnet bloom codegen cohere cohere2 ctrl cwm deepseek_v2 deepseek_v3 diffllama
doge ernie4_5 ernie4_5_moe exaone4 falcon_mamba flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2
gpt_bigcode gpt_neox gpt_oss gptj granite granitemoe granitemoehybrid granitemoeshared helium hunyuan_v1_dense
hunyuan_v1_moe hyperclovax jamba jetmoe lfm2 llama llama4_text mamba minicpm3 minimax minimax_m2 ministral
mistral mixtral mpt nanochat nemotron olmo olmo2 olmo3 olmo_hybrid olmoe opt persimmon phi phi3 phimoe qwen2
qwen2_moe qwen3 qwen3_5 qwen3_moe qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm
starcoder2 vaultgemma xglm
"""
WORK = NAMES.split()


def build(kind: str, **changes):
    """A tiny random model of the family; whatever its config raises when the recipe does not fit it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no {kind}")
    whole = CONFIG_MAPPING[kind]()
    text = whole.get_text_config()
    names = {name: value for value, names in SIZES.items() for name in names.split() if hasattr(text, name)}
    values = {name: x for name, x in names.items() if not isinstance(getattr(type(text), name, None), property)} | changes
    if "kv_lora_rank" in values:
        values["num_key_value_heads"] = 4
    config = CONFIG_MAPPING[kind](
        **(values if text is whole else {"text_config": values | {"model_type": text.model_type}})
    )
    with torch.device("meta"):
        if sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters()) > 2e7:
            raise ValueError("it stays large")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for p in itertools.islice((p for name, p in model.named_parameters() if name.endswith("bias")), 1000):
        p.data += 0.3 * torch.randn_like(p)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_the_head_is_the_models_own_or_the_family_is_refused(kind):
    try:
        model = build(kind)
    except Exception as error:  # of its config: the recipe is for sizes that most families name
        assert kind not in WORK, error
        pytest.skip(f"cannot be built tiny: {type(error).__name__}")
    try:
        target = Target(model)
    except ValueError as error:
        assert kind not in WORK, error
        assert type(model).__name__ in str(error) or "must ascend" in str(error)
        return
    ids = torch.arange(3, 12)[None]
    head = model.get_output_embeddings().weight
    for factor in (1.0, 300.0):  # logits that no cap leaves as they are
        head.data *= factor
        with torch.no_grad():
            theirs = model(input_ids=ids, use_cache=False).logits
        _, f = target.forward(ids)  # after them: an embedding that is tied has grown, too
        torch.testing.assert_close(target.head.logits(f), theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["llama", "mamba", "gemma2", "recurrent_gemma", "granite", "qwen3_moe"])
def test_in_bf16(kind):
    target = Target(build(kind).bfloat16())
    g, f = target.forward(torch.arange(3, 12)[None])
    assert g.dtype == f.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("kind", "changes", "scale", "softcap"),
    [
        ("recurrent_gemma", {"logits_soft_cap": 30.0}, 1, 30.0),
        ("granite", {"logits_scaling": 8.0}, 1 / 8, None),
        ("hyperclovax", {"logits_scaling": 0.125}, 1 / 8, None),
        ("minicpm3", {"dim_model_base": 8}, 1 / 4, None),
        ("cohere", {"logit_scale": 0.0625}, 0.0625, None),
        ("gemma2", {"final_logit_softcapping": 30.0}, 1, 30.0),
        ("nanochat", {"final_logit_softcapping": 15.0}, 1, 15.0),
    ],
)
def test_small_logits_hide_neither_a_scale_nor_a_cap(kind, changes, scale, softcap):
    """With weights as small as an untrained model's, tanh(z / 30) is z / 30 to six digits."""
    head = Target(build(kind, **changes, initializer_range=1e-3)).head
    assert (head.scale, head.softcap) == (pytest.approx(scale), softcap)


@pytest.mark.parametrize("field", ["logits_soft_cap", "logits_scaling"])
def test_a_cap_or_scale_under_an_unknown_name_is_refused_by_name(monkeypatch, field):
    """As RecurrentGemma was before its name was known: small logits gave it away to nobody."""
    kind, changes = {
        "logits_soft_cap": ("recurrent_gemma", {"logits_soft_cap": 30.0}),
        "logits_scaling": ("granite", {"logits_scaling": 8.0}),
    }[field]
    monkeypatch.setattr("fastdraft.target.hf.SOFTCAPS", ())
    monkeypatch.setattr("fastdraft.target.hf.SCALES", ())
    model = build(kind, **changes, initializer_range=1e-3)
    with pytest.raises(
        ValueError, match=f"a way fastdraft does not know: .*config.json says .*'{field}': {changes[field]}"
    ):
        Target(model)


def test_a_model_that_looks_ahead_is_refused():
    with pytest.raises(ValueError, match=r"BertGenerationDecoder lets tokens see those that follow .*is_decoder or causal"):
        Target(build("bert-generation"))
    assert Target(build("bert-generation", is_decoder=True)).vocab_size == 96
