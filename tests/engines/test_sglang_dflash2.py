"""SGLang's own code loads every tensor of a DFlash2 export, and convolves and scores as fastdraft does, each by itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from cases import engine_place
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from fastdraft.kernels.block_conv import block_conv_ref
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.serving.export import export_draft

STEPS, K = 5, 8


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A draft whose weights are all random, what SGLang made of its export, and what SGLang's parts were given."""
    place, folder = engine_place("sglang", os.environ), tmp_path_factory.mktemp("case")
    model = tiny_llama(0, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=32)
    model.save_pretrained(folder / "target")
    changes = {"mask_token_id": 190, "block_size": STEPS + 1, "num_hidden_layers": 2, "layers": (1, 4, 6)}
    c = DFlash2Config.from_target(model.config.to_dict(), selector_rank=16, selector_top_k=K, **changes)
    draft, gen = DFlash2Draft(c), torch.Generator().manual_seed(0)
    for p in draft.parameters():
        p.data = torch.randn(p.shape, generator=gen) * 0.3
    export_draft(draft, folder / "draft", torch.float32)
    inputs = {
        "rows": torch.randn(2 * (STEPS + 1), 64, generator=gen),
        "candidate_ids": torch.randint(190, (2, STEPS, K), generator=gen),
        "unary_logits": torch.randn(2, STEPS, K, generator=gen),
        "hidden_states": torch.randn(2, STEPS, 64, generator=gen),
        "anchor_token_ids": torch.tensor([3, 7]),
    }
    save_file(inputs, folder / "inputs.safetensors")
    job = {"target": folder / "target", "checkpoint": folder / "draft"}
    job |= {"inputs": folder / "inputs.safetensors", "out": folder / "out.safetensors"}
    (folder / "job.json").write_text(json.dumps({name: str(path) for name, path in job.items()}))
    child = [place.python, str(Path(__file__).with_name("sglang_dflash2_child.py")), str(folder / "job.json")]
    environment = os.environ | {"PYTHONPATH": place.pythonpath or "", "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(child, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return draft, load_file(job["out"]), inputs


def test_every_tensor_is_taken_over(loaded):
    draft, found, _ = loaded
    theirs = {name.removeprefix("parameter."): p for name, p in found.items() if name.startswith("parameter.")}
    assert not any(p.isnan().any() for p in theirs.values())
    ours = draft.state_dict()
    for layer in range(draft.config.num_hidden_layers):
        at = f"layers.{layer}"
        for whole, parts in {
            f"{at}.self_attn.qkv_proj.weight": [f"{at}.self_attn.{x}_proj.weight" for x in "qkv"],
            f"{at}.mlp.gate_up_proj.weight": [f"{at}.mlp.{x}_proj.weight" for x in ("gate", "up")],
        }.items():
            ours[whole] = torch.cat([ours.pop(part) for part in parts])
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(p, ours[name]) for name, p in theirs.items())


def test_sglang_convolves_as_we_do(loaded):
    draft, found, inputs = loaded
    rows, m = inputs["rows"], draft.layers[0].attention_conv
    slot = torch.arange(len(rows)) % draft.config.block_size
    with torch.no_grad():
        delta = m.coefficients(rows)
        for side, name in enumerate(("conv_in", "conv_out")):
            ours = block_conv_ref(rows, delta[:, side], m.base_kernel[side], slot)
            torch.testing.assert_close(ours, found[name], rtol=1e-5, atol=1e-5)


def test_sglang_scores_candidates_as_we_do(loaded):
    draft, found, inputs = loaded
    ids = inputs["candidate_ids"]
    anchors = inputs["anchor_token_ids"][:, None, None].expand(-1, 1, K)
    before = torch.cat([anchors, ids[:, :-1]], 1)  # [blocks, slots, candidate before]
    wide = lambda x: x[:, :, None].expand(-1, -1, K, -1)  # noqa: E731
    with torch.no_grad():
        query = draft.candidate_selector.hidden_projection(inputs["hidden_states"])
        ours = draft.scores(wide(inputs["unary_logits"]), wide(ids), wide(query), before)
    torch.testing.assert_close(ours, found["scores"], rtol=1e-5, atol=1e-5)
