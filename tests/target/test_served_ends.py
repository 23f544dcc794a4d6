"""Embedding, head and final norm from a target's files alone: those that the whole target has, whatever its family, or a
sentence."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_target_families import build
from tiny import tiny_llama

from fastdraft.target.hf import Target
from fastdraft.target.identity import target_fingerprint
from fastdraft.target.served.ends import load_ends

CPU = torch.device("cpu")


def last_norm_input(target: Target, ids: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    """What enters the whole target's own final norm, which is the module that gives its last hidden state."""
    seen = {}
    alike = [m for m in target.decoder.modules() if type(m) is type(norm)]
    hooks = [m.register_forward_hook(lambda m, x, y: seen.__setitem__(m, (x[0], y))) for m in alike]
    last = target.decoder(input_ids=ids, use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return next(x for x, y in seen.values() if y.shape == last.shape and torch.equal(y, last))


@pytest.mark.parametrize(
    "kind",
    # Tied heads, RMSNorm of 1 + weight, caps, scales, LayerNorm with a bias, experts, MLA, sinks, linear attention, Mamba.
    (
        *("llama", "qwen3", "gemma2", "gemma3_text", "granite", "cohere", "gpt_neox", "gpt2", "qwen3_moe", "gpt_oss"),
        *("deepseek_v3", "qwen3_next", "olmo2", "phi3", "mamba"),
    ),
)
def test_the_ends_are_the_whole_targets(kind, tmp_path):
    model = build(kind)
    model.save_pretrained(tmp_path)
    whole, ends = Target(model), load_ends(str(tmp_path), torch.float32, CPU)
    head = ends.ends.head
    assert ends.num_layers == whole.num_layers
    assert torch.equal(ends.ends.embedding, whole.embedding) and torch.equal(head.weight, whole.head.weight)
    assert (head.scale, head.softcap) == (whole.head.scale, whole.head.softcap)
    assert (head.bias is None) == (whole.head.bias is None)
    assert (ends.ends.final_norm is None) == (whole.final_norm is None)
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        state = last_norm_input(whole, ids, ends.norm)
        torch.testing.assert_close(ends.norm(state), whole.forward(ids)[1])


def test_a_tied_head_is_one_tensor_and_shards_are_read_wherever_they_lie(tmp_path):
    model = tiny_llama(0, tie_word_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    ends = load_ends(str(tmp_path), torch.float32, CPU).ends
    assert ends.head.weight.data_ptr() == ends.embedding.data_ptr()
    assert torch.equal(ends.embedding, model.get_input_embeddings().weight)


def test_in_bf16(tmp_path):
    tiny_llama(0).save_pretrained(tmp_path)
    ends = load_ends(str(tmp_path), torch.bfloat16, CPU)
    assert ends.ends.dtype == ends.ends.head.weight.dtype == torch.bfloat16
    assert ends.norm(torch.ones(2, 32, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_fingerprint_is_of_the_files_and_no_loaded_targets(tmp_path):
    tiny_llama(0).save_pretrained(tmp_path / "a")
    tiny_llama(1).save_pretrained(tmp_path / "b")
    a, b = (load_ends(str(tmp_path / x), torch.float32, CPU).ends.fingerprint for x in "ab")
    assert a != b and a.startswith("files:") and a != target_fingerprint(Target(tiny_llama(0)))


@pytest.fixture
def quantized(tmp_path):
    """Quantised layers and plain ends, as published checkpoints have them; a change to the tensors makes another."""
    tiny_llama(0).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)

    def write(**changes):
        save_file({k: v for k, v in (tensors | changes).items() if v is not None}, tmp_path / "model.safetensors")
        return str(tmp_path)

    return write


def test_quantised_layers_are_never_read(quantized):
    ends = load_ends(quantized(), torch.float32, CPU).ends
    assert torch.equal(ends.head.weight, tiny_llama(0).lm_head.weight)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"lm_head.weight": torch.ones(192, 32).to(torch.float8_e4m3fn)}, r"keeps lm_head.weight as F8_E4M3"),
        ({"lm_head.weight_scale_inv": torch.ones(2, 1)}, r"keeps lm_head.weight_scale_inv as F32"),
        ({"lm_head.weight": None, "lm_head.qweight": torch.ones(4, 4, dtype=torch.int32)}, r"lm_head.qweight as I32"),
        ({"model.embed_tokens.weight": torch.ones(192, 32, dtype=torch.int8)}, r"embed_tokens.weight as I8"),
        ({"model.norm.weight": None}, r"lacks the weights model.norm.weight"),
    ],
)
def test_quantised_or_missing_ends_are_refused_by_name(quantized, changes, words):
    with pytest.raises(ValueError, match=words):
        load_ends(quantized(**changes), torch.float32, CPU)


def test_a_family_that_cannot_do_without_layers_is_refused(tmp_path):
    model = build("recurrent_gemma")
    model.save_pretrained(tmp_path)
    try:
        ends = load_ends(str(tmp_path), torch.float32, CPU)
    except ValueError as error:
        assert "train with this target in the process" in str(error)
    else:
        assert torch.equal(ends.ends.embedding, Target(model).embedding)
