"""SGLang's own code reads exports of DFlash, DSpark and DFlash2 drafts, and drafts on a CPU what fastdraft drafts.

Its draft model, heads and PyTorch attention run; its kernels for GPUs and the workers around them do not.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import LLAMA3, load_in_sglang
from drafting import One
from safetensors.torch import load_file, save_file
from tiny import tiny_llama

from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.methods import METHODS, method_of
from fastdraft.model.proposal import DecodeSettings
from fastdraft.serving.export import export_draft, load_draft, verify
from fastdraft.target.hf import Target

SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.15}
SLIDING = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 8}
SELECTOR = {"selector_rank": 16, "selector_top_k": 8}
MASK, CONTEXT = 190, 23

# name: the method, what is unusual about the target, and about the draft
CASES: dict[str, tuple[str, dict, dict]] = {
    "dflash": ("dflash", {}, {"layers": (1, 4, 6)}),
    "dflash sliding": ("dflash", {"rope_parameters": LLAMA3}, SLIDING),
    "dspark": ("dspark", {}, {"markov_rank": 16}),
    "dspark sliding": ("dspark", {"rope_parameters": LLAMA3}, {"markov_rank": 24, "layers": (1, 4, 6)} | SLIDING),
    "dflash2": ("dflash2", {}, SELECTOR),
    "dflash2 sliding": ("dflash2", {"rope_parameters": LLAMA3}, SELECTOR | {"conv_kernel_size": 3} | SLIDING),
}

# A tensor under another name, and what SGLang says. Where it says nothing, its parameter is what memory held before.
WRONG_NAMES: dict[str, tuple[str, str | None]] = {
    "dspark": ("markov_head.markov_w2.weight", "DSpark unexpected markov weight 'markov_head.markov_w2.other'"),
    "dspark sliding": ("confidence_head.proj.bias", "DSpark unexpected confidence weight 'confidence_head.proj.other'"),
    "dflash": ("hidden_norm.weight", None),
    "dflash2": ("layers.1.mlp_conv.base_kernel", None),
    "dflash2 sliding": ("candidate_selector.successor_codebook", None),
}


@dataclass(frozen=True)
class BlockCase:
    target: Target
    draft: DFlashDraft  # as its export is read back
    target_dir: Path
    checkpoint: Path
    ids: torch.Tensor  # [CONTEXT + 1] the last is the root
    g: torch.Tensor  # [CONTEXT, K*H]

    def work(self, checkpoint: Path, **more) -> dict:
        name = method_of(self.draft).engine_names["sglang"]
        return {"target": str(self.target_dir), "checkpoint": str(checkpoint), "algorithm": name} | more


def make_case(name: str, folder: Path) -> BlockCase:
    """A random draft in which every part changes what is drafted: norms, convolutions, heads."""
    method, target_changes, changes = CASES[name]
    model = tiny_llama(0, **SHAPE | target_changes)
    model.save_pretrained(folder / "target")
    shape = METHODS[method].shape
    c = shape.from_target(
        model.config.to_dict(), **{"mask_token_id": MASK, "block_size": 6, "num_hidden_layers": 2} | changes
    )
    generator = torch.Generator().manual_seed(1)
    target, draft = Target(model, c.layers), METHODS[method].draft(c)
    draft.init_weights(0.15, generator)
    for tensor, p in draft.trainable().items():
        own_head = tensor.startswith(("markov_head", "candidate_selector"))
        p.data += (0.75 if own_head else 0.25) * torch.randn(p.shape, generator=generator)
    checkpoint = export_draft(draft, folder / "draft", torch.float32)
    assert not verify(checkpoint, folder / "target").errors
    read = load_draft(checkpoint, target.config)
    read.take_from_target(target.embedding)
    ids = torch.randint(MASK, (CONTEXT + 1,), generator=generator)
    return BlockCase(target, read, folder / "target", checkpoint, ids, target.forward(ids[None, :-1])[0][0])


def rename(case: BlockCase, tensor: str, folder: Path) -> Path:
    """A copy of the checkpoint with one tensor under another name."""
    shutil.copytree(case.checkpoint, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[tensor.rpartition(".")[0] + ".other"] = tensors.pop(tensor)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Every case, what SGLang made of it, and of its copy with a wrong name."""
    folder = tmp_path_factory.mktemp("sglang")
    cases, work = {}, []
    for i, name in enumerate(CASES):
        case = cases[name] = make_case(name, tmp_path_factory.mktemp("case"))
        block = torch.full((case.draft.config.block_size,), MASK)
        block[0] = case.ids[-1]
        inputs = folder / f"inputs-{i}.safetensors"
        save_file({"g": case.g, "block_ids": block}, inputs)
        work.append(case.work(case.checkpoint, inputs=str(inputs), steps=case.draft.config.num_drafted))
    renamed = {name: rename(cases[name], tensor, folder / f"wrong-{name}") for name, (tensor, _) in WRONG_NAMES.items()}
    work += [cases[name].work(path) for name, path in renamed.items()]
    said = load_in_sglang(folder, work)
    return cases, dict(zip(CASES, said, strict=False)), dict(zip(renamed, said[len(CASES) :], strict=True)), renamed


def parameters(said: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key.removeprefix("parameter."): t for key, t in said.items() if key.startswith("parameter.")}


@pytest.mark.parametrize("name", CASES)
def test_every_tensor_arrives(found, name):
    case, theirs = found[0][name], parameters(found[1][name])
    ours = load_file(case.checkpoint / "model.safetensors")
    for layer in range(case.draft.config.num_hidden_layers):
        for stacked, parts in (("self_attn.qkv_proj", "qkv"), ("mlp.gate_up_proj", ("gate", "up"))):
            room = f"layers.{layer}.{stacked.split('.')[0]}"
            together = torch.cat([ours.pop(f"{room}.{part}_proj.weight") for part in parts])
            assert torch.equal(theirs.pop(f"layers.{layer}.{stacked}.weight"), together)
    assert ours.keys() == theirs.keys()  # nothing of theirs is left that no tensor wrote
    for key, tensor in ours.items():
        assert torch.equal(theirs[key], tensor), key


@pytest.mark.parametrize("name", CASES)
def test_rope_and_layers(found, name):
    case, said = found[0][name], found[1][name]
    rows = min(len(said["rope"]), 512)
    cos, sin = case.draft.rope(torch.arange(rows), torch.float32)
    torch.testing.assert_close(said["rope"][:rows].float(), torch.cat([cos, sin], -1), rtol=1e-5, atol=1e-5)
    assert said["captured"].tolist() == [layer + 1 for layer in case.draft.config.layers]  # boundaries, not outputs


@pytest.mark.parametrize("name", CASES)
def test_sglang_drafts_what_we_draft(found, name):
    """The states of the block's rows, and the tokens through whatever head the method has."""
    case, said = found[0][name], found[1][name]
    c = case.draft.config
    method = method_of(case.draft)
    drafter = One(method.drafter(case.draft, case.target.head, 1, CONTEXT + 1))
    with torch.no_grad():
        ours = drafter.propose(case.ids[1:], case.g, c.num_drafted, DecodeSettings(num_steps=c.num_drafted), None)
        states = drafter.block(case.ids[-1:])
    torch.testing.assert_close(said["states"], states, rtol=1e-4, atol=1e-4)
    assert said["tokens"].tolist() == ours.tokens.tolist() and len(set(ours.tokens.tolist())) > 1
    before = torch.cat([case.ids[-1:], ours.tokens[:-1]])
    states = states[c.first_slot :][: c.num_drafted]
    with torch.no_grad():
        plain = case.target.head.logits(states).argmax(-1)
        if c.title == "DSpark":
            assert (plain != ours.tokens).any(), "the Markov head changes nothing here"
            confidence = case.draft.confidence(states, before)
            torch.testing.assert_close(said["confidence"], confidence, rtol=1e-4, atol=1e-4)
        if c.title == "DFlash2":
            assert (plain != ours.tokens).any(), "the selector changes nothing here"
            logits, ids, query = case.draft.candidates(states, case.target.head)
            assert torch.equal(said["candidates"], ids)
            k = c.selector_top_k
            previous = torch.cat([case.ids[-1:].expand(1, k), ids[:-1]])  # [slots, candidates before]
            wide = lambda x: x[:, None].expand(-1, k, -1)  # noqa: E731
            scores = case.draft.scores(wide(logits), wide(ids), wide(query), previous)
            torch.testing.assert_close(said["scores"], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CASES if "sliding" in name])
def test_a_window_of_one_token_more_or_less_is_another(found, name):
    """So that the states above say how SGLang counts a window."""
    case, theirs = found[0][name], found[1][name]["states"]
    c = case.draft.config
    try:
        for window in (c.sliding_window - 1, c.sliding_window + 1):
            case.draft.config = c.model_copy(update={"sliding_window": window})
            drafter = One(method_of(c).drafter(case.draft, case.target.head, 1, CONTEXT + 1))
            with torch.no_grad():
                drafter.extend(case.g)
                assert (drafter.block(case.ids[-1:]) - theirs).abs().max() > 0.01
    finally:
        case.draft.config = c


@pytest.mark.parametrize("name", WRONG_NAMES)
def test_a_tensor_under_another_name(found, name):
    """We name it always, SGLang only where a head of DSpark is concerned: elsewhere it serves what memory held."""
    cases, _, wrong, paths = found
    tensor, sentence = WRONG_NAMES[name]
    errors = verify(paths[name], cases[name].target_dir).errors
    assert any(tensor in e for e in errors) and any(tensor.rpartition(".")[0] + ".other" in e for e in errors)
    if sentence is None:
        assert parameters(wrong[name])[tensor].isnan().all()
    else:
        assert sentence in wrong[name]
