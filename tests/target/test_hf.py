"""Capture from targets of many kinds: each document alone, the asked layers, the state lm_head reads, the head's logits."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save_file
from tiny import TINY, save_target, tiny_llama
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from fastdraft.batch import Batch
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.graph import GraphPool
from fastdraft.target import hf
from fastdraft.target import packed as packing
from fastdraft.target.hf import (
    Target,
    _groups_of_like_length,
    load_target,
    load_target_config,
    load_tokenizer,
    target_sizes,
)
from fastdraft.target.identity import target_fingerprint

SMALL = TINY | dict(vocab_size=96, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0)
KINDS = {
    "llama": {},
    "qwen3": {},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": 4},
    "mistral": {"sliding_window": 4},
    "phimoe": {"sliding_window": 20, "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {"attention_chunk_size": 4, "num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "phi": {"partial_rotary_factor": 0.5},  # a bias on lm_head
}


def make_model(kind: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SMALL | KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, p in model.named_parameters():
        if name.endswith("bias") or p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model


def make_batch(lengths=(12, 3, 11, 1, 7), vocab_size=96) -> Batch:
    n = sum(lengths)
    ids = torch.randint(3, vocab_size, (n,), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones(n, dtype=torch.bool), lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_equals_each_document_alone(kind):
    """g is the output of the asked layers, f gives the model's own logits, and no document sees another, or padding."""
    model = make_model(kind)
    target, batch = Target(model), make_batch()
    assert target.layers == (1, 3, 4)
    features = target.capture(batch)
    assert features.g.shape == (34, 96) and features.f.shape == (34, 32)
    first = 0
    for length in batch.lengths:
        rows = slice(first, first + length)
        with torch.no_grad():
            out = model(batch.input_ids[None, rows], output_hidden_states=True)
        states = out.hidden_states  # [0] is the embedding, so the output of layer l is [l + 1]
        expected = torch.cat([states[layer + 1][0] for layer in target.layers], -1)
        torch.testing.assert_close(features.g[rows], expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(features.f[rows], states[-1][0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(target.head.logits(features.f[rows]), out.logits[0], rtol=1e-4, atol=1e-4)
        first += length


@pytest.mark.parametrize(
    ("kind", "field"), [("gemma2", "softcap"), ("cohere", "scale"), ("granite", "scale"), ("phi", "bias")]
)
def test_heads_that_are_more_than_a_matrix(kind, field):
    head = Target(make_model(kind)).head
    if field == "bias":
        assert head.bias is not None and head.bias.any()
    else:
        assert getattr(head, field) == pytest.approx({"gemma2": 2.0, "cohere": 0.25, "granite": 1 / 3}[kind])


def test_f_is_after_the_final_norm():
    model = make_model("llama")
    target, batch = Target(model), make_batch((9,))
    model.model.norm.weight.data.mul_(3.0)
    raw = target.capture(batch).f
    model.model.norm.weight.data.div_(3.0)
    torch.testing.assert_close(raw, 3 * target.capture(batch).f, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [(0, 1, 2), (2, 5, 6), (0, 3, 7)])
def test_asked_layers(layers):
    model = make_model("llama")
    target, batch = Target(model, layers), make_batch((9,))
    blocks, seen = model.model.layers, {}
    hooks = [
        blocks[layer].register_forward_hook(lambda m, i, out, layer=layer: seen.__setitem__(layer, out)) for layer in layers
    ]
    g = target.capture(batch).g
    for hook in hooks:
        hook.remove()
    assert torch.equal(g, torch.cat([seen[layer][0] for layer in layers], -1))


def test_layers_that_do_not_fit_are_refused():
    model = make_model("llama")
    for layers in ((3, 2, 4), (1, 1, 2), (0, 1, 8), (-1, 1, 2)):
        with pytest.raises(ValueError, match=r"must ascend and lie in 0\.\.7"):
            Target(model, layers)
    with pytest.raises(ValueError, match="needs a target of at least 7 layers"):
        Target(tiny_llama(num_hidden_layers=4))


def test_nothing_carries_a_gradient():
    target = Target(make_model("llama"))
    features = target.capture(make_batch())
    assert not features.g.requires_grad and not features.f.requires_grad
    assert not any(p.requires_grad for p in target.model.parameters()) and not target.model.training


CHANGES = {"scaled": lambda z: 2 * z, "capped": lambda z: 0.5 * torch.tanh(z), "permuted": lambda z: z.roll(1, -1)}


@pytest.mark.parametrize("change", CHANGES)
def test_an_unknown_logit_transform_is_refused(change):
    model = make_model("llama")
    forward = model.forward

    def changed(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = CHANGES[change](out.logits)
        return out

    model.forward = changed
    with pytest.raises(ValueError, match="LlamaForCausalLM turns its last hidden state into logits in a way fastdraft"):
        Target(model)


def test_final_norm_only_where_it_is_a_plain_rms_norm():
    for kind, plain in (("llama", True), ("qwen3", True), ("gemma2", False), ("cohere", False), ("phi", False)):
        model = make_model(kind)
        norm = Target(model).final_norm
        assert (norm is not None) == plain, kind
        assert norm is None or norm is model.model.norm.weight


def test_cached_forward_equals_the_whole():
    from transformers import DynamicCache

    model = make_model("llama")
    target, ids = Target(model), make_batch((9,)).input_ids[None]
    g, f = target.forward(ids)
    cache = DynamicCache(config=model.config)
    parts = [target.forward(ids[:, :6], cache), target.forward(ids[:, 6:], cache)]
    torch.testing.assert_close(torch.cat([p[0] for p in parts], 1), g, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([p[1] for p in parts], 1), f, rtol=1e-4, atol=1e-5)


APART = {
    "gpt_oss": "sliding_attention",
    "mistral": "a window of 4 tokens",
    "phimoe": "a window of 20 tokens",
    "llama4_text": "chunked_attention",
    "gemma2": "sliding_attention",
}


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_packed_where_attention_is_plain(kind):
    target = Target(make_model(kind))
    assert (target.apart is None) == (kind not in APART)
    assert target.apart is None or APART[kind] in target.apart
    assert target.decoder.config._attn_implementation == "eager"  # as before


def rows(features):
    return features.g, features.f


def test_packed_documents_equal_padded_ones():
    target, batch = Target(make_model("qwen3")), make_batch((30, 1, 17, 16, 2, 9))
    for packed, padded in zip(rows(target.capture(batch)), rows(target._capture_apart(batch)), strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-4)


def test_a_pack_runs_in_parts_of_bounded_size(monkeypatch):
    target, batch = Target(make_model("llama")), make_batch((9, 12, 3, 40, 1, 7))
    whole = target.capture(batch)
    monkeypatch.setattr(hf, "RUN_TOKENS", 21)
    assert [lengths for _, lengths in target.packed_runs(batch)] == [(9, 12), (3,), (40,), (1, 7)]
    for parts, one in zip(rows(target.capture(batch)), rows(whole), strict=True):
        torch.testing.assert_close(parts, one, rtol=1e-4, atol=1e-4)


def test_a_model_that_lets_documents_see_each_other_runs_them_apart(monkeypatch):
    """As one would whose code does not ask transformers for its attention."""

    def one_document(module, query, key, value, attention_mask, scaling=None, **more):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, packing.NAME, one_document)
    target = Target(make_model("llama"))
    assert "packed documents give states that are off by" in target.apart
    batch = make_batch()
    alone = [target.forward(ids[None])[1][0] for ids in batch.input_ids.split(batch.lengths)]
    torch.testing.assert_close(target.capture(batch).f, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_rounding_that_grows_keeps_no_model_from_running_packed(monkeypatch):
    """In bf16 another kernel's last bits make a mixture of experts choose others; a document's first token has no such."""
    attend, noise = packing._attend, torch.Generator().manual_seed(0)

    def rounded(*args, **more):
        out, none = attend(*args, **more)
        other = torch.randn(out.shape, generator=noise) * (packing._documents.get().position > 0)[None, :, None, None]
        return out * (1 + 0.06 * other), none

    monkeypatch.setitem(AttentionInterface._global_mapping, packing.NAME, rounded)
    target = Target(make_model("llama"))
    ids = make_batch((20,)).input_ids
    off = target.forward_packed(ids, (20,))[1] - target.forward(ids[None])[1][0]
    assert target.apart is None and off.abs().max() > 0.05 * target.forward(ids[None])[1].abs().max()


def test_a_model_that_cannot_run_packed_says_what_failed(monkeypatch):
    def fails(*_args, **_more):
        raise RuntimeError("no kernel for this GPU\nand more")

    monkeypatch.setitem(AttentionInterface._global_mapping, packing.NAME, fails)
    assert Target(make_model("llama")).apart == "a packed forward fails: no kernel for this GPU"


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "lm_head.weight", "model.layers.3.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_weights_that_are_not_finite_are_named(name, value):
    """Also where few tokens meet them, as one row of the embedding."""
    model = make_model("llama")
    model.get_parameter(name).data[-1] = value
    with pytest.raises(ValueError, match=rf"weights hold NaN or Inf: {re.escape(name)}; its files are damaged"):
        Target(model)


def test_a_state_that_overflows_is_not_blamed_on_the_weights():
    model = make_model("llama")
    model.get_parameter("model.layers.3.mlp.down_proj.weight").data.fill_(3e38)
    with pytest.raises(ValueError, match=r"logits are not finite in torch\.float32, though all its weights are: a state"):
        Target(model)


def test_layers_that_carry_several_states_are_refused(monkeypatch):
    forward = Target.forward
    monkeypatch.setattr(Target, "forward", lambda self, ids: (forward(self, ids)[0].expand(4, -1, -1, -1), None))
    with pytest.raises(ValueError, match=r"give states \(4, 1, 8, 96\) for 8 tokens, not \(1, 8, 96\)"):
        Target(make_model("llama"))


def test_rope_that_depends_on_the_length_runs_documents_apart():
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert "RoPE (dynamic)" in Target(tiny_llama(rope_parameters=rope)).apart


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_packed_documents_equal_padded_ones_on_a_gpu(kind, dtype):
    target, batch = Target(make_model(kind).to("cuda", dtype)), make_batch((300, 1, 170, 16, 2, 90))
    exact = Target(make_model(kind).to("cuda", torch.float64))
    assert target.apart is None
    found = target.capture(batch), target._capture_apart(batch), exact._capture_apart(batch)
    for packed, padded, truth in zip(*map(rows, found), strict=True):
        allowed = 3 * (padded - truth).abs().max() + 4 * torch.finfo(dtype).eps * truth.abs().max()
        assert (packed - truth).abs().max() <= allowed


def test_a_recorded_forward_has_a_document_more():
    """On a CPU nothing is recorded; what goes in and out is as on a GPU."""
    target, calls = Target(make_model("llama")), []

    def forward(ids, documents):
        calls.append(documents.lengths)
        return target._run_packed(ids, documents)

    recorded = packing.Recorded(40, forward, torch.device("cpu"), GraphPool())
    for lengths in ((12, 3, 11), (40,), (7, 1)):
        batch = make_batch(lengths)
        g, f = recorded(batch.input_ids, lengths)
        alone = target.capture(batch)
        torch.testing.assert_close(g, alone.g, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(f, alone.f, rtol=1e-4, atol=1e-4)
    assert calls == [(12, 3, 11, 14), (40,), (7, 1, 32)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_recorded_forwards_on_a_gpu(kind):
    target = Target(make_model(kind).cuda())
    batches = [make_batch(lengths) for lengths in ((12, 3, 11), (300, 40), (7, 1), (250,), (12, 3, 11))]
    found = [[rows(target.capture(batch)) for batch in batches] for _ in range(3)]
    assert target.recorded is None or sorted(target.recorded) == [256, 512]
    assert kind == "qwen3_moe" or all(r.replay.graph is not None for r in target.recorded.values())
    assert all(torch.equal(a, b) for again in found[1:] for x, y in zip(again, found[0]) for a, b in zip(x, y))  # noqa: B905
    target.recorded = None
    for batch, recorded in zip(batches, found[0], strict=True):
        for a, b in zip(recorded, rows(target.capture(batch)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_groups_hold_every_document_once_and_bound_padding():
    lengths = (5, 100, 1, 99, 81, 4, 100, 3)
    groups = _groups_of_like_length(lengths, least_fill=0.8, most_tokens=250)
    assert sorted(d for group in groups for d in group) == list(range(8))
    for group in groups:
        longest = lengths[group[0]]
        assert all(0.8 * longest <= lengths[d] <= longest for d in group) and len(group) * longest <= 250
    assert len(groups) == 5


# --- loading -----------------------------------------------------------------------------------------------------------


def load(path):
    return load_target(str(path), torch.float32, "cpu")


def test_load(target_dir):
    target = load(target_dir)
    assert (target.vocab_size, target.hidden_size, target.num_layers, target.dtype) == (192, 32, 8, torch.float32)
    assert target.eos_ids == {2}
    facts = load_target_config(str(target_dir))
    assert facts["num_hidden_layers"] == 8
    assert target_sizes(facts).total == sum(p.numel() for p in target.model.parameters())
    assert load_tokenizer(str(target_dir)).chat_template


def test_tied_embeddings_are_counted_once_and_not_missing(tmp_path):
    save_target(tmp_path, tie_word_embeddings=True)
    target = load(tmp_path)
    assert torch.equal(target.head.weight, target.embedding)
    assert target_sizes(load_target_config(str(tmp_path))).total == sum(p.numel() for p in target.model.parameters())


def test_what_cannot_be_loaded_is_said(target_dir, tmp_path):
    with pytest.raises(ValueError, match="target '/nowhere' cannot be loaded: there is no such folder"):
        load("/nowhere")
    for path in ("/nowhere", "../nowhere/at/all", "./nowhere"):
        with pytest.raises(ValueError, match="has no readable tokenizer: there is no such folder"):
            load_tokenizer(path)
    with pytest.raises(ValueError, match=r"has no readable config\.json"):
        load_target_config(str(tmp_path))
    with pytest.raises(ValueError, match="has no readable tokenizer"):
        load_tokenizer(str(tmp_path))
    shutil.copytree(target_dir, tmp_path / "t")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "t" / name).rename(tmp_path / name)
        for read in (load_tokenizer, DFlashConfig.init_config):
            with pytest.raises(
                ValueError, match=r"readable.*: its folder has no tokenizer\.json, nor what one .* put it there"
            ):
                read(str(tmp_path / "t"))
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"mask token is chosen by the tokenizer, and that of '.*t' is not readable: "):
        DFlashConfig.init_config(str(tmp_path / "t"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / "t" / name)
    weights = tmp_path / "t" / "model.safetensors"
    tensors, whole = load_bytes(weights.read_bytes()), weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="t' cannot be loaded"):
        load(tmp_path / "t")
    del tensors["lm_head.weight"], tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weights lm_head\.weight, model\.layers\.3\.mlp\.up_proj\.weight"):
        load(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"has no readable config\.json"):
        load_target_config(str(tmp_path / "t"))


def test_remote_code_is_off(target_dir, tmp_path):
    shutil.copytree(target_dir, tmp_path / "t")
    config = json.loads((tmp_path / "t" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "t" / "config.json").write_text(json.dumps(config))
    (tmp_path / "t" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(tmp_path / "t")
    with pytest.raises(ValueError, match="no readable config"):
        load_target_config(str(tmp_path / "t"))
    assert not (tmp_path / "ran").exists()


def test_fingerprint_tells_targets_apart(target_dir, tmp_path):
    target = load(target_dir)
    same = target_fingerprint(load(target_dir))
    assert target_fingerprint(target) == same
    with torch.no_grad():  # a fine-tune that leaves embedding and head alone
        target.model.model.layers[5].mlp.up_proj.weight += 1e-3
    assert target_fingerprint(target) != same
    assert target_fingerprint(load(save_target(tmp_path, seed=1))) != same
