"""SGLang's own loading code takes over every tensor of an export, its RoPE, its vocabulary map and its target layers."""

import pytest
import torch
from cases import CASES, load_in_sglang, make_case
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Every case, and the tensors that one SGLang process loaded from it."""
    cases = [make_case(name, tmp_path_factory.mktemp("case"), steps=0) for name in CASES]
    work = [{"target": str(c.target_dir), "checkpoint": str(c.checkpoint), "algorithm": "EAGLE3"} for c in cases]
    found = load_in_sglang(tmp_path_factory.mktemp("sglang"), work)
    return dict(zip(CASES, zip(cases, found, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_arrives(loaded, name):
    case, found = loaded[name]
    ours = load_file(case.checkpoint / "model.safetensors")
    theirs = {key.removeprefix("parameter."): t for key, t in found.items() if key.startswith("parameter.")}
    ours.pop("t2d")
    map_ = ours.pop("d2t", None)
    for stacked, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
        room = stacked.split(".")[0]
        names = [f"midlayer.{room}.{part}_proj.weight" for part in parts]
        assert torch.equal(theirs.pop(f"model.layers.0.{stacked}.weight"), torch.cat([ours.pop(n) for n in names]))
    if "embed_tokens.weight" not in ours:
        assert theirs.pop("model.embed_tokens.weight").isnan().all()  # nothing wrote it: the target's is put in its place
    for key, tensor in ours.items():
        there = key if key.startswith("lm_head") else "model." + key.replace("midlayer.", "layers.0.")
        padded = theirs.pop(there)  # rows are padded to a multiple of 64
        assert torch.equal(padded[: len(tensor)], tensor) and not padded[len(tensor) :].any(), key
    assert not theirs  # and nothing is left that no tensor wrote
    if map_ is None:
        assert "draft_ids" not in found
    else:
        assert torch.equal(found["draft_ids"], case.draft.draft_ids)


@pytest.mark.parametrize("name", CASES)
def test_norms(loaded, name):
    case, found = loaded[name]
    c = case.draft.config
    assert found["norms"].tolist() == [c.fc_norm, c.norm_before_fc, c.norm_output]


@pytest.mark.parametrize("name", CASES)
def test_rope_and_layers(loaded, name):
    case, found = loaded[name]
    rows = min(len(found["rope"]), 512)
    cos, sin = case.draft.rope(torch.arange(rows), torch.float32)
    torch.testing.assert_close(found["rope"][:rows].float(), torch.cat([cos, sin], -1), rtol=1e-5, atol=1e-5)
    assert found["captured"].tolist() == [layer + 1 for layer in case.draft.config.layers]  # boundaries, not outputs
