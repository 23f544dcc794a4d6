"""Where a new draft of blocks starts: what `init: target` takes of the target, and what is said where it takes less."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from fastdraft.batch import Ends, TargetHead
from fastdraft.config import Config, parse_config
from fastdraft.kernels.chain_qkv import rotate
from fastdraft.model.dflash.start import SURE, backbone, typical_size
from fastdraft.model.methods import METHODS
from fastdraft.run.draft import draft_shape, fit_to_target, new_draft
from fastdraft.run.plan import recipe_lines
from fastdraft.target.layers import layer_weights, target_layers

BLOCKS = ("dflash", "dspark", "dflash2")
SIZES = TINY | {"vocab_size": 64, "tie_word_embeddings": True, "initializer_range": 0.02}
KINDS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
MASK = 63


def make_target(folder, kind="qwen3"):
    """A random target whose norms are no ones, saved and as it is."""
    config_class, model_class = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZES)).eval()
    for name, p in model.named_parameters():
        if "norm" in name:
            p.data.uniform_(0.5, 1.5)
        else:
            p.data.mul_(4)
    model.save_pretrained(folder)
    Tokenizer(WordLevel({f"t{i}": i for i in range(64)}, unk_token="t0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


def config_of(folder, method="dflash", **draft) -> Config:
    overrides = {"mask_token_id": MASK, "num_hidden_layers": 2, "block_size": 4, "layers": [1, 5]}
    draft = {"method": method, "overrides": overrides | draft.pop("overrides", {})} | draft
    return parse_config({"target": {"path": str(folder)}, "data": {"paths": ["d"]}, "draft": draft}, Config)


def fitted(model, config):
    ends = Ends(
        model.get_input_embeddings().weight.detach(), TargetHead(model.lm_head.weight), model.model.norm.weight, "t"
    )
    draft = new_draft(config)
    return draft, fit_to_target(draft, config, ends, None)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("method", BLOCKS)
def test_layers_norm_and_fc_are_the_targets(tmp_path, method):
    model = make_target(tmp_path)
    draft, lines = fitted(model, config_of(tmp_path, method))
    assert any(line == "draft.init target: the draft's layers start as the target's layers [6, 7]" for line in lines)
    for layer, theirs in zip(draft.layers, model.model.layers[6:], strict=True):
        state = theirs.state_dict()
        assert backbone(layer).keys() == state.keys()
        assert all(torch.equal(p, state[name]) for name, p in backbone(layer).items())
    assert torch.equal(draft.norm.weight, SURE * model.model.norm.weight)


@pytest.mark.parametrize("method", BLOCKS)
@torch.no_grad()
def test_the_contexts_keys_and_values_are_those_of_the_targets_next_layer(tmp_path, method):
    """Of layer 6, which reads the output of layer 5, the last one captured: as its own cache has them."""
    model = make_target(tmp_path)
    draft, _ = fitted(model, config_of(tmp_path, method))
    ids = torch.randint(MASK, (1, 11), generator=torch.Generator().manual_seed(1))
    out = model(ids, output_hidden_states=True, use_cache=True)
    g = torch.cat([out.hidden_states[2][0], out.hidden_states[6][0]], -1)
    keys, values = draft.keys_values(0, draft.context(g), torch.arange(11))
    cached = out.past_key_values.layers[6]
    torch.testing.assert_close(keys, cached.keys[0].transpose(0, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, cached.values[0].transpose(0, 1), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_stays_as_sharp_as_the_targets_where_that_has_no_norms_over_heads(tmp_path):
    """Keys point where the target's do, and their products with queries are on average about as large."""
    model = make_target(tmp_path, "llama")
    draft, _ = fitted(model, config_of(tmp_path))
    ids = torch.randint(MASK, (1, 200), generator=torch.Generator().manual_seed(1))
    out = model(ids, output_hidden_states=True, use_cache=True)
    g = torch.cat([out.hidden_states[2][0], out.hidden_states[6][0]], -1)
    keys, values = draft.keys_values(0, draft.context(g), torch.arange(200))
    cached = out.past_key_values.layers[6]
    theirs, of_theirs = cached.keys[0].transpose(0, 1), cached.values[0].transpose(0, 1)
    torch.testing.assert_close(values, of_theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cosine_similarity(keys, theirs, -1), torch.ones(200, 2), rtol=0, atol=1e-4)
    layer, norm = model.model.layers[6], model.model.layers[6].input_layernorm
    x = norm(out.hidden_states[6][0])
    queries = draft.queries(0, x, torch.arange(200))
    cos, sin = draft.rope(torch.arange(200), torch.float32)
    of_target = rotate(layer.self_attn.q_proj(x).unflatten(-1, (4, 8)), cos, sin)
    ours = torch.einsum("qhd,khd->hqk", queries, keys.repeat_interleave(2, 1)).square().mean().sqrt()
    target = torch.einsum("qhd,khd->hqk", of_target, theirs.repeat_interleave(2, 1)).square().mean().sqrt()
    assert abs(ours / target - 1) < 0.25 and abs(target / ours * draft.layers[0].self_attn.q_norm.weight[0] - 1) > 0.5
    assert all(torch.equal(m.self_attn.k_norm.weight, torch.ones(8)) for m in draft.layers)


def test_the_typical_size_is_that_of_a_heads_entries():
    generator = torch.Generator().manual_seed(2)
    weight, norm = torch.randn(16, 32, generator=generator), torch.rand(32, generator=generator) + 0.5
    entries = (torch.randn(4000, 32, generator=generator) * norm) @ weight.T
    assert float(entries.square().mean().sqrt()) == pytest.approx(typical_size(weight, norm), rel=0.03)


def test_layers_of_the_end_where_few_are_behind_the_last_captured(tmp_path):
    model = make_target(tmp_path)
    draft, lines = fitted(model, config_of(tmp_path, overrides={"layers": [1, 6]}))
    assert any("layers [6, 7]" in line for line in lines)
    assert torch.equal(draft.layers[0].mlp.up_proj.weight, model.model.layers[6].mlp.up_proj.weight)
    assert torch.equal(draft.hidden_norm.weight, model.model.layers[7].input_layernorm.weight)


def with_a_bias(tensors):
    tensors["model.layers.7.self_attn.q_proj.bias"] = torch.zeros(32)


def without_a_gate(tensors):
    del tensors["model.layers.6.mlp.gate_proj.weight"]


def in_eight_bits(tensors):
    name = "model.layers.6.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "draft", "why"),
    [
        (with_a_bias, {}, "layer 7 has self_attn.q_proj.bias, which a draft's layer has not"),
        (without_a_gate, {}, "layer 6 has no mlp.gate_proj.weight"),
        (in_eight_bits, {}, "mlp.up_proj.weight of the target's layer 6 is quantised, F8_E4M3"),
        (dict.clear, {}, "files have no layer 6 in safetensors"),
        (
            lambda tensors: None,
            {"overrides": {"intermediate_size": 40}},
            r"is \[32, 48\] in the target's layer 6 and \[32, 40\]",
        ),
        (lambda tensors: None, {"overrides": {"num_hidden_layers": 9}}, "the target has 8 layers, the draft 9"),
    ],
)
def test_layers_of_another_form_are_left_random_and_it_is_said(tmp_path, change, draft, why):
    model = make_target(tmp_path)
    rewrite(tmp_path, change)
    config = config_of(tmp_path, **draft)
    made, lines = fitted(model, config)
    (said,) = [line for line in lines if line.startswith("draft.init target")]
    assert re.search(f"random weights: .*{why}", said)
    untouched = dict(new_draft(config).named_parameters())
    changed = {name for name, p in made.named_parameters() if not torch.equal(p, untouched[name])}
    assert changed == {"norm.weight"}


@pytest.mark.parametrize("init", ["target", "random"])
def test_layers_are_read_only_by_a_draft_that_may_start_from_them(tmp_path, monkeypatch, init):
    read = []
    monkeypatch.setattr("fastdraft.run.draft.target_layers", lambda *args: read.append(args) or target_layers(*args))
    model = make_target(tmp_path)
    fitted(model, config_of(tmp_path, init=init))
    assert len(read) == (init == "target")


@pytest.mark.parametrize(
    ("kind", "fields", "why"),
    [
        ("llama", {"model_type": "granite"}, "those of granite, and a draft's compute as those of llama, mistral, qwen3"),
        ("llama", {"model_type": "gemma"}, "those of gemma"),
        ("qwen3", {"hidden_act": "gelu"}, "the activation gelu, and a draft's silu"),
    ],
)
def test_layers_of_the_same_names_that_compute_otherwise_are_not_copied(tmp_path, kind, fields, why):
    model = make_target(tmp_path, kind)
    config_file = tmp_path / "config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | fields))
    made, lines = fitted(model, config := config_of(tmp_path))
    (said,) = [line for line in lines if line.startswith("draft.init target")]
    assert why in said
    untouched = dict(new_draft(config).named_parameters())
    assert {name for name, p in made.named_parameters() if not torch.equal(p, untouched[name])} == {"norm.weight"}


def test_random_weights_stay_random(tmp_path):
    model = make_target(tmp_path)
    config = config_of(tmp_path, init="random")
    draft, lines = fitted(model, config)
    assert "draft.init random: the draft starts from random weights" in lines
    untouched = dict(new_draft(config).named_parameters())
    assert all(torch.equal(p, untouched[name]) for name, p in draft.named_parameters())


@pytest.mark.parametrize("method", BLOCKS)
def test_the_plan_says_what_the_run_will_start_from(tmp_path, method):
    model = make_target(tmp_path)
    for config in (config_of(tmp_path, method), config_of(tmp_path, method, init="random")):
        said = recipe_lines(config, draft_shape(config))[-1]
        assert said.startswith("draft.init ") and said in fitted(model, config)[1]


def test_a_checkpoint_is_where_a_warm_start_starts(tmp_path):
    model = make_target(tmp_path / "target")
    draft, _ = fitted(model, config_of(tmp_path / "target", init="random"))
    folder = tmp_path / "draft"
    folder.mkdir()
    save_file(METHODS["dflash"].serving_tensors(draft, torch.float32), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(draft.config.to_serving(torch.float32)))
    tree = {"target": {"path": str(tmp_path / "target")}, "data": {"paths": ["d"]}}
    tree["draft"] = {"method": "dflash", "init_from": str(folder)}
    warm, lines = fitted(model, parse_config(tree, Config))
    assert not [line for line in lines if line.startswith("draft.init ")]
    assert all(torch.equal(p, q) for p, q in zip(warm.parameters(), draft.parameters(), strict=True))


def test_layers_are_found_in_the_files_that_can_be_read_and_inside_a_model_with_pictures(tmp_path):
    save_file({"model.language_model.layers.0.mlp.up_proj.weight": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    save_file(
        {
            "model.language_model.layers.0.mlp.down_proj.weight": torch.zeros(3, 2),
            "model.visual.layers.0.mlp.up_proj.weight": torch.zeros(9, 9),
            "model.language_model.norm.weight": torch.ones(3),
        },
        tmp_path / "b.safetensors",
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "c.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    (layer,) = layer_weights(str(tmp_path)).values()
    assert sorted(layer) == ["mlp.down_proj.weight", "mlp.up_proj.weight"]
    assert torch.equal(layer["mlp.up_proj.weight"][:], torch.ones(2, 3))
