"""Exported drafts against an independent forward, read back byte for byte, and every seeded fault named."""

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from serving_forward import ServedDraft
from transformers import LlamaConfig

from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.serving import serving_shapes
from fastdraft.serving import export
from fastdraft.serving.export import export_draft, load_draft, verify

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 32,
}
SHAPES = {
    "plain": {},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12},
    "full_vocabulary": {"draft_vocab_size": 61},
    "narrower": {"hidden_size": 16},
    "wider": {"hidden_size": 48},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "yarn_truncated": {"rope_parameters": {**YARN, "truncate": True}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "partial_rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "partial_yarn": {"rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    "fc_norm": {"fc_norm": True},
    "norm_output": {"norm_output": True, "fc_norm": True},
    "norm_before_fc": {"norm_before_fc": True, "norm_output": True, "hidden_size": 24, "layers": (0, 2, 5)},
    "other_layers": {"layers": (0, 2, 5)},
    "all_at_once": {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "fc_norm": True,
        "layers": (2, 3, 6),
        "rope_parameters": LLAMA3,
    },
}


def target_config(rope: dict | None = None) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=61,
        max_position_embeddings=1024,
        rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0},
        dtype="float32",
    )


def random_draft(**overrides) -> Draft:
    overrides = {"draft_vocab_size": 23, **overrides}
    draft = Draft(DraftConfig.from_target(target_config(), **overrides))
    generator = torch.Generator().manual_seed(0)
    for p in draft.parameters():  # norms away from 1, so that one left out is seen
        p.data = torch.randn(p.shape, generator=generator) * (p.shape[-1] ** -0.5) + (p.ndim == 1)
    draft.set_vocab(torch.randperm(61, generator=generator)[: draft.config.draft_vocab_size].sort().values)
    draft.set_embedding(torch.randn(61, 32, generator=generator))
    return draft


def chain(draft: Draft, g: torch.Tensor, next_tokens: torch.Tensor, forced: list[int]) -> list[torch.Tensor]:
    """Logits of prefill [n, Vd] and of each step reading a forced token [1, Vd], from the draft's pieces."""
    h, positions, tokens = draft.combine(g), torch.arange(len(g)), next_tokens
    keys, values, logits = [], [], []
    for token in [*forced, None]:
        q, k, v = draft.qkv(tokens, h, positions)
        keys.append(k)
        values.append(v)
        k, v = (torch.cat(x).repeat_interleave(q.shape[1] // k.shape[1], 1).transpose(0, 1) for x in (keys, values))
        seen = torch.arange(k.shape[1])[None] <= positions[:, None]
        y = draft.finish(h, F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=seen).transpose(0, 1))
        logits.append(draft.logits(y))
        h, positions, tokens = draft.fed_back(y[-1:]), positions[-1:] + 1, torch.tensor([token or 0])
    return logits


@pytest.fixture
def target_dir(tmp_path):
    path = tmp_path / "target"
    target_config().save_pretrained(path)
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_independent_forward_agrees(shape, tmp_path):
    draft = random_draft(**SHAPES[shape])
    out = export_draft(draft, tmp_path / "draft", torch.float32)
    c = draft.config
    served = ServedDraft(out, draft.embed_tokens.weight.data if c.hidden_size == c.target_hidden_size else None)
    g, next_tokens, forced = torch.randn(40, 96), torch.randint(61, (40,)), [3, 60, 17]
    with torch.no_grad():
        prefill, *steps = chain(draft, g, next_tokens, forced)
    torch.testing.assert_close(served.prefill(g, next_tokens), prefill, atol=1e-5, rtol=1e-5)
    for token, logits in zip(forced, steps, strict=True):
        torch.testing.assert_close(served.step(token), logits[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(served.target_ids, draft.draft_ids)
    assert served.captured_layers == (None if c.uses_default_layers else list(c.layers))
    assert set(served.w) == set(serving_shapes(c))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_round_trip_is_byte_identical(shape, dtype, tmp_path):
    draft = random_draft(**SHAPES[shape])
    first = export_draft(draft, tmp_path / "first", dtype)
    loaded = load_draft(first, target_config())
    assert loaded.config == draft.config
    if draft.config.hidden_size == 32:
        assert loaded.embed_tokens.weight.isnan().all()
        loaded.set_embedding(draft.embed_tokens.weight)
    second = export_draft(loaded, tmp_path / "second", dtype)
    for name in ("config.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_verify_finds_nothing_in_an_export(shape, tmp_path, target_dir):
    draft = random_draft(**SHAPES[shape])
    found = verify(export_draft(draft, tmp_path / "draft", torch.float32), target_dir)
    assert found.errors == []
    assert len(found.warnings) == ("rope_parameters" in SHAPES[shape])


def test_left_out_and_written_twice(tmp_path):
    draft = random_draft(layers=(0, 2, 5), rope_parameters=LLAMA3)
    out = export_draft(draft, tmp_path / "draft")
    config, weights = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["eagle_config"] == {"eagle_aux_hidden_state_layer_ids": [0, 2, 5]}
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"]["factor"] == 8.0
    assert config["rope_parameters"] == LLAMA3
    assert config["tie_word_embeddings"] is False and config["draft_vocab_size"] == 23
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert "target_hidden_size" not in config and "fc_norm" not in config and "embed_tokens.weight" not in weights
    assert weights["d2t"].dtype == torch.int64 and weights["t2d"].dtype == torch.bool
    assert {w.dtype for w in weights.values() if w.is_floating_point()} == {torch.bfloat16}
    assert not {"norm_output", "norm_before_fc", "trained_by"} & config.keys()
    full = export_draft(random_draft(draft_vocab_size=61), tmp_path / "full")
    assert "d2t" not in load_file(full / "model.safetensors")
    assert "eagle_config" not in json.loads((full / "config.json").read_text())
    narrow = export_draft(random_draft(hidden_size=16), tmp_path / "narrow")
    assert json.loads((narrow / "config.json").read_text())["target_hidden_size"] == 32
    assert load_file(narrow / "model.safetensors")["embed_tokens.weight"].shape == (61, 16)


# --- seeded faults: (edit, words the finding must hold) ------------------------------------------------------------------


def setting(**fields):
    return lambda config, tensors: config.update(fields)


def without(*names):
    def edit(config, tensors):
        for name in names:
            (config if name in config else tensors).pop(name)

    return edit


def tensor(name, change):
    def edit(config, tensors):
        tensors[name] = change(tensors.get(name))

    return edit


def renamed(old, new):
    def edit(config, tensors):
        tensors[new] = tensors.pop(old)

    return edit


def spoiled(t):
    t = t.clone()
    t.view(-1)[0] = float("nan")
    return t


IDS = "eagle_aux_hidden_state_layer_ids"
FAULTS = {
    "tensor missing": (without("norm.weight"), ["missing", "norm.weight"]),
    "head missing": (without("lm_head.weight"), ["missing", "lm_head.weight"]),
    "t2d missing": (without("t2d"), ["missing", "t2d"]),
    "d2t missing": (without("d2t"), ["missing", "d2t"]),
    "tensor unknown": (tensor("midlayer.bias", lambda t: torch.zeros(3)), ["midlayer.bias", "unknown"]),
    "model prefix": (renamed("fc.weight", "model.fc.weight"), ["missing: fc.weight", "model.fc.weight is there"]),
    "embedding shipped": (
        tensor("embed_tokens.weight", lambda t: torch.zeros(61, 32)),
        ["embed_tokens.weight", "leave it out"],
    ),
    "misshaped": (tensor("fc.weight", lambda t: t[:, :64].contiguous()), ["fc.weight is [32, 64]", "[32, 96]"]),
    "NaN": (tensor("midlayer.mlp.up_proj.weight", spoiled), ["midlayer.mlp.up_proj.weight has 1 NaN"]),
    "one dtype off": (tensor("norm.weight", lambda t: t.bfloat16()), ["several dtypes", "norm.weight"]),
    "weight not float": (tensor("norm.weight", lambda t: t.to(torch.int8)), ["norm.weight is int8;"]),
    "d2t int32": (tensor("d2t", lambda t: t.int()), ["d2t is int32,", "int64"]),
    "t2d bytes": (tensor("t2d", lambda t: t.to(torch.uint8)), ["t2d is uint8,", "bool"]),
    "d2t is ids": (tensor("d2t", lambda t: t + torch.arange(len(t))), ["d2t holds the target ids themselves", "offset"]),
    "d2t out of range": (tensor("d2t", lambda t: t + 61), ["outside the vocabulary of 61"]),
    "d2t negative": (tensor("d2t", lambda t: t - 40), ["target id -", "outside the vocabulary"]),
    "d2t not ascending": (tensor("d2t", lambda t: torch.zeros_like(t) - torch.arange(len(t)) + 3), ["must ascend"]),
    "t2d of another map": (tensor("t2d", lambda t: ~t), ["t2d marks 38"]),
    "tied": (setting(tie_word_embeddings=True), ["tie_word_embeddings is true", "must be false"]),
    "tie not said": (without("tie_word_embeddings"), ["tie_word_embeddings is missing"]),
    "no draft vocabulary": (without("draft_vocab_size"), ["draft_vocab_size is missing"]),
    "other draft vocabulary": (setting(draft_vocab_size=24), ["lm_head.weight is [23, 32]", "[24, 32]"]),
    "vocabulary of another target": (setting(vocab_size=62), ["vocab_size is 62", "target's is 61"]),
    "width of another target": (setting(target_hidden_size=64), ["target_hidden_size", "64", "32", "another target"]),
    "no head_dim": (without("head_dim"), ["head_dim is missing"]),
    "biased": (setting(attention_bias=True), ["attention_bias is true"]),
    "residual after the norm": (setting(norm_before_residual=True), ["norm_before_residual is true"]),
    "other activation": (setting(hidden_act="gelu"), ["hidden_act", "silu"]),
    "two layers": (setting(num_hidden_layers=2), ["num_hidden_layers is 2"]),
    "other architecture": (setting(architectures=["LlamaForCausalLM"]), ["architectures", "LlamaForCausalLMEagle3"]),
    "other model type": (setting(model_type="qwen3"), ["model_type", "llama"]),
    "short context": (setting(max_position_embeddings=512), ["max_position_embeddings is 512", "1024"]),
    "rope spellings differ": (setting(rope_theta=5e5), ["rope_parameters says", "must agree"]),
    "rope scaling forgotten": (setting(rope_parameters=LLAMA3, rope_theta=5e5), ["rope_parameters says", "must agree"]),
    "old rope missing": (without("rope_theta"), ["rope_theta is missing"]),
    "new rope missing": (without("rope_parameters"), ["rope_parameters is missing"]),
    "theta not inside": (setting(rope_parameters={"rope_type": "default"}), ["rope_parameters has no rope_theta"]),
    "rope unknown": (setting(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), ["dynamic"]),
    "nested ids alone": (setting(eagle_config={IDS: [0, 2, 5]}), ["layer ids disagree", "[0, 2, 5]", "[1, 3, 6]"]),
    "top ids alone": (setting(**{IDS: [1, 3, 6]}), ["layer ids disagree", "[1, 3, 4]", "[0, 2, 5]"]),
    "ids with one offset": (
        setting(eagle_config={IDS: [0, 2, 5]}, **{IDS: [0, 2, 5]}),
        ["layer ids disagree", "[1, 3, 6]"],
    ),
    "ids beyond": (setting(eagle_config={IDS: [0, 2, 8]}, **{IDS: [1, 3, 9]}), ["[0, 2, 8]", "8 layers"]),
    "id of the last layer": (setting(eagle_config={IDS: [0, 2, 7]}, **{IDS: [1, 3, 8]}), ["[0, 2, 7]", "0..6"]),
    "two ids": (setting(eagle_config={IDS: [0, 2]}, **{IDS: [1, 3]}), ["[0, 2]", "list of three integers"]),
    "ids twice": (setting(eagle_config={IDS: [0, 2, 2]}, **{IDS: [1, 3, 3]}), ["[0, 2, 2]", "ascend"]),
    "dtype said twice": (setting(torch_dtype="float16"), ["torch_dtype is float16", "float32"]),
    "heads do not divide": (setting(num_key_value_heads=3), ["num_key_value_heads 3"]),
    "fc_norm without weights": (setting(fc_norm=True), ["fc_norm.0.weight", "missing"]),
    "norm_before_fc without weight": (setting(norm_before_fc=True), ["missing: input_norm.weight"]),
    "norm_before_fc nested, without weight": (
        setting(eagle_config={"norm_before_fc": True}),
        ["missing: input_norm.weight"],
    ),
    "norm_before_fc said twice": (
        setting(eagle_config={"norm_before_fc": False}, norm_before_fc=True),
        ["eagle_config.norm_before_fc is false and norm_before_fc true", "make them agree"],
    ),
    "norm_before_fc no bool": (setting(eagle_config={"norm_before_fc": "no"}), ['eagle_config.norm_before_fc is "no"']),
    "norm_output no bool": (setting(norm_output=1), ["norm_output is 1, it must be a bool"]),
    "both kinds of norm before fc": (setting(norm_before_fc=True, fc_norm=True), ["both true", "take one out"]),
    "weight without norm_before_fc": (
        tensor("input_norm.weight", lambda t: torch.ones(96)),
        ["input_norm.weight is there, unknown"],
    ),
    "SGLang's old names": (
        lambda config, tensors: (
            config.update(use_aux_norm=True),
            tensors.update({f"aux_norm_{part}.weight": torch.ones(32) for part in ("low", "mid", "high")}),
        ),
        ["use_aux_norm is true", "write fc_norm", "aux_norm_mid.weight is there", "call it fc_norm.1.weight"],
    ),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return export_draft(random_draft(), tmp_path_factory.mktemp("sound") / "draft", torch.float32)


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_the_fault(fault, sound, tmp_path, target_dir):
    edit, words = FAULTS[fault]
    path = tmp_path / "draft"
    path.mkdir()
    config, tensors = json.loads((sound / "config.json").read_text()), load_file(sound / "model.safetensors")
    edit(config, tensors)
    (path / "config.json").write_text(json.dumps(config))
    save_file(tensors, path / "model.safetensors")
    said = " ".join(verify(path, target_dir).errors)
    assert said and all(word in said for word in words), said


def test_what_eagle_3_1_adds_is_written_and_read_back(tmp_path, target_dir):
    draft = random_draft(norm_output=True, norm_before_fc=True)
    out = export_draft(draft, tmp_path / "draft", torch.float32)
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["norm_output"] is True and config["norm_before_fc"] is True and "fc_norm" not in config
    assert tensors["input_norm.weight"].shape == (96,)
    findings = verify(out, target_dir)
    assert not findings.errors and not [line for line in findings.warnings if "norm" in line]
    loaded = load_draft(out, target_config())
    assert loaded.config == draft.config and torch.equal(loaded.input_norm.weight, draft.input_norm.weight)
    nested = {k: v for k, v in config.items() if k != "norm_before_fc"} | {"eagle_config": {"norm_before_fc": True}}
    (out / "config.json").write_text(json.dumps(nested))
    assert load_draft(out, target_config()).config == draft.config


def test_sglangs_old_names_of_fc_norm_are_read(tmp_path):
    draft = random_draft(fc_norm=True)
    out = export_draft(draft, tmp_path / "draft", torch.float32)
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    config["use_aux_norm"] = config.pop("fc_norm")
    for j, part in enumerate(("low", "mid", "high")):
        tensors[f"aux_norm_{part}.weight"] = tensors.pop(f"fc_norm.{j}.weight")
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors")
    loaded = load_draft(out, target_config())
    assert loaded.config == draft.config
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(loaded.fc_norm, draft.fc_norm, strict=True))


@pytest.mark.parametrize(
    ("fields", "unit", "words"),
    [
        ({"norm_output": True}, False, ["trained on the state before the norm", "take norm_output out", "--engine"]),
        ({"norm_output": True, "trained_by": "fastdraft"}, False, []),
        ({"norm_output": False}, True, ["without the norm before it", "draft.init_from"]),
        ({"norm_output": False}, False, []),
        ({}, True, []),
    ],
)
def test_a_recurrence_that_may_be_another_than_trained_is_warned_of(fields, unit, words, sound, tmp_path, target_dir):
    path = tmp_path / "draft"
    path.mkdir()
    config, tensors = json.loads((sound / "config.json").read_text()), load_file(sound / "model.safetensors")
    if unit:
        tensors["norm.weight"].fill_(1.0)
    (path / "config.json").write_text(json.dumps(config | fields))
    save_file(tensors, path / "model.safetensors")
    errors, warnings = verify(path, target_dir)
    said = [line for line in warnings if line.startswith("norm_output")]
    assert not errors and len(said) == bool(words) and all(word in said[0] for word in words)


@pytest.mark.parametrize("junk", ["x", [], {}, -1, 0.5, True, [[1]], {"a": 1}, 10**30], ids=repr)
def test_no_field_value_breaks_verify_or_load(junk, sound, tmp_path, target_dir):
    path = tmp_path / "draft"
    shutil.copytree(sound, path)
    config = json.loads((sound / "config.json").read_text())
    harmless = {"bos_token_id", "eos_token_id", "use_cache", "initializer_range", "rms_norm_eps", "max_position_embeddings"}
    extra = ("eagle_config", IDS, "target_hidden_size", "layer_types", "quantization_config", "partial_rotary_factor")
    for key in [*config, *extra]:
        (path / "config.json").write_text(json.dumps(config | {key: junk}))
        errors = verify(path, target_dir).errors
        if junk in ("x", -1) and key not in harmless:
            assert errors, key
        with suppress(ValueError):
            load_draft(path, target_config())


def test_verify_wrong_dtype_for_the_target(tmp_path, target_dir):
    found = verify(export_draft(random_draft(), tmp_path / "draft", torch.bfloat16), target_dir)
    assert found.errors == ["Weights are bfloat16, the target's are float32; export with the target's dtype."]


def test_verify_says_when_the_target_has_no_dtype(sound, tmp_path):
    config = {k: v for k, v in target_config().to_dict().items() if k != "dtype"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    errors, warnings = verify(sound, tmp_path)
    assert errors == [] and len(warnings) == 1 and "does not say its dtype" in warnings[0]


def test_verify_warns_of_another_rope_and_of_needless_ids(sound, tmp_path, target_dir):
    shutil.copytree(sound, tmp_path / "draft")
    config = json.loads((sound / "config.json").read_text())
    config |= {"eagle_config": {IDS: [1, 3, 4]}, IDS: [2, 4, 5], "rope_theta": 7.0}
    config["rope_parameters"]["rope_theta"] = 7.0
    (tmp_path / "draft/config.json").write_text(json.dumps(config))
    errors, warnings = verify(tmp_path / "draft", target_dir)
    assert errors == [] and len(warnings) == 2
    assert "default layers" in warnings[0] and "RoPE" in warnings[1]


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "config gone", "config not JSON"])
def test_damaged_directories_are_named(damage, sound, tmp_path, target_dir):
    path = tmp_path / "draft"
    shutil.copytree(sound, path)
    weights, config = path / "model.safetensors", path / "config.json"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "gone":
        weights.unlink()
    elif damage == "config gone":
        config.unlink()
    else:
        config.write_text("{")
    words = {"truncated": "truncated", "empty": "truncated", "gone": "has no model.safetensors"}.get(damage, "config.json")
    assert words in " ".join(verify(path, target_dir).errors)
    with pytest.raises(ValueError, match=words):
        load_draft(path, target_config())


@pytest.mark.parametrize("named", ["[]", "null", '{"a": 3}', '{"a": ""}'])
def test_an_index_of_no_files_is_named(named, sound, tmp_path, target_dir):
    shutil.copy(sound / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {named}}}')
    assert "has no weight_map" in " ".join(verify(tmp_path, target_dir).errors)
    with pytest.raises(ValueError, match="has no weight_map"):
        load_draft(tmp_path, target_config())


def test_a_bin_whose_names_are_no_names_is_refused(sound, tmp_path):
    shutil.copy(sound / "config.json", tmp_path)
    torch.save({3: torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="not a dict of tensors"):
        load_draft(tmp_path, target_config())


# --- warm start ------------------------------------------------------------------------------------------------------


def test_load_accepts_layers_0_shards_bin_and_tensors_best_left_out(sound, tmp_path):
    config, tensors = (sound / "config.json").read_text(), load_file(sound / "model.safetensors")
    other = {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()}
    other["embed_tokens.weight"] = torch.ones(61, 32)
    names = sorted(other)
    shards, binary = tmp_path / "shards", tmp_path / "bin"
    for path in (shards, binary):
        path.mkdir()
        (path / "config.json").write_text(config)
    halves = {"model-1.safetensors": names[:8], "model-2.safetensors": names[8:]}
    for file, part in halves.items():
        save_file({name: other[name] for name in part}, shards / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save(other, binary / "pytorch_model.bin")
    for path in (shards, binary):
        draft = load_draft(path, target_config())
        assert torch.equal(draft.midlayer.mlp.up_proj.weight, tensors["midlayer.mlp.up_proj.weight"])
        assert draft.embed_tokens.weight.isnan().all()  # served with the target's, so trained with it
    (shards / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=r"names model-2\.safetensors, which the directory lacks"):
        load_draft(shards, target_config())


@pytest.mark.parametrize("size", [23, 61])
def test_a_warm_start_needs_no_t2d_that_d2t_tells(size, tmp_path):
    """Engines read d2t alone, and a draft of the whole vocabulary has not even that."""
    draft = random_draft(draft_vocab_size=size)
    path = export_draft(draft, tmp_path / "draft")
    tensors = load_file(path / "model.safetensors")
    assert ("d2t" in tensors) == (size < 61)
    del tensors["t2d"]
    save_file(tensors, path / "model.safetensors")
    loaded = load_draft(path, target_config())
    assert torch.equal(loaded.t2d, draft.t2d) and torch.equal(loaded.d2t, draft.d2t)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda d2t: d2t + torch.arange(23),
            "t2d is missing, and d2t rises from every draft id to the next, as target ids",
        ),
        (lambda d2t: d2t + 60, "d2t maps to target id .*outside the vocabulary of 61"),
        (lambda d2t: d2t - torch.arange(23), "which must ascend|outside the vocabulary"),
        (lambda d2t: d2t[:-1].clone(), r"missing: t2d; .*d2t is \[22\], config.json makes it \[23\]"),
        (lambda d2t: d2t.int(), r"missing: t2d; .*d2t is int32, it must be int64"),
        (None, "missing: d2t; engines would take draft ids for target ids"),
    ],
)
def test_a_map_without_t2d_that_is_none_is_refused(change, reason, tmp_path):
    path = export_draft(random_draft(draft_vocab_size=23), tmp_path / "draft")
    tensors = load_file(path / "model.safetensors")
    del tensors["t2d"]
    d2t = tensors.pop("d2t")
    if change is not None:
        tensors["d2t"] = change(d2t)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(ValueError, match=f"is not a draft to start from: .*({reason})"):
        load_draft(path, target_config())


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def test_load_does_not_unpickle(sound, tmp_path, capsys):
    shutil.copy(sound / "config.json", tmp_path)
    torch.save({"fc.weight": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        load_draft(tmp_path, target_config())
    assert "unpickled" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "fault", ["tensor missing", "tensor unknown", "misshaped", "d2t is ids", "tied", "nested ids alone"]
)
def test_load_refuses_what_verify_would(fault, sound, tmp_path):
    edit, words = FAULTS[fault]
    config, tensors = json.loads((sound / "config.json").read_text()), load_file(sound / "model.safetensors")
    edit(config, tensors)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as raised:
        load_draft(tmp_path, target_config())
    assert all(word in str(raised.value) for word in words)


def test_load_refuses_one_name_twice(sound, tmp_path):
    shutil.copy(sound / "config.json", tmp_path)
    tensors = load_file(sound / "model.safetensors")
    tensors["layers.0.hidden_norm.weight"] = torch.ones(32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"midlayer\.hidden_norm\.weight is there twice"):
        load_draft(tmp_path, target_config())


def test_load_refuses_another_target(sound):
    other = target_config().to_dict()
    with pytest.raises(
        ValueError, match=r"target_hidden_size .* is 32, the target's is 48; the draft was made for another"
    ):
        load_draft(sound, other | {"hidden_size": 48})
    with pytest.raises(ValueError, match="vocab_size is 61, the target's is 99; the draft was made for another target"):
        load_draft(sound, other | {"vocab_size": 99})
    with pytest.raises(ValueError, match="does not say vocab_size"):
        load_draft(sound, {k: v for k, v in other.items() if k != "vocab_size"})


# --- refusing to write -------------------------------------------------------------------------------------------------


def test_export_refuses_to_overwrite_unless_asked(tmp_path):
    out = export_draft(random_draft(), tmp_path / "draft")
    with pytest.raises(ValueError, match="exists"):
        export_draft(random_draft(), out)
    export_draft(random_draft(fc_norm=True), out, overwrite=True)
    assert json.loads((out / "config.json").read_text())["fc_norm"] is True
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds notes\.txt"):
        export_draft(random_draft(), out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_overwriting_a_link_writes_what_it_names_and_leaves_no_litter(tmp_path):
    out = export_draft(random_draft(), tmp_path / "draft")
    (tmp_path / "latest").symlink_to(out)
    assert export_draft(random_draft(fc_norm=True), tmp_path / "latest", overwrite=True) == out
    assert json.loads((out / "config.json").read_text())["fc_norm"] is True
    assert (tmp_path / "latest").is_symlink() and {p.name for p in tmp_path.iterdir()} == {"draft", "latest"}


def test_export_refuses_an_unset_map_and_overflow(tmp_path):
    draft = random_draft()
    draft.t2d.zero_()
    with pytest.raises(ValueError, match="t2d marks 0"):
        export_draft(draft, tmp_path / "draft")
    draft = random_draft()
    draft.lm_head.weight.data[3, 4] = 1e6
    with pytest.raises(ValueError, match=r"lm_head\.weight has NaN or infinite values in float16;"):
        export_draft(draft, tmp_path / "draft", torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    """Its files are written and the old folder is set aside; then the new one cannot be renamed."""
    out = export_draft(random_draft(), tmp_path / "draft")
    before, rename = (out / "model.safetensors").read_bytes(), Path.rename

    def fails(path, to):
        if path.name.endswith(".new"):
            raise OSError(5, "Input/output error")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match=r"draft was not written: .*Input/output error.*nothing was left behind"):
        export_draft(random_draft(fc_norm=True), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["draft"]


def test_a_full_disk_leaves_the_old_export_and_nothing_else(tmp_path, monkeypatch):
    out = export_draft(random_draft(), tmp_path / "draft")
    before = (out / "model.safetensors").read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "save_file", full)
    with pytest.raises(OSError, match=r"the disk is full; it takes 0\.0 MB and nothing was left behind"):
        export_draft(random_draft(), out, overwrite=True)
    assert (out / "model.safetensors").read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["draft"]
