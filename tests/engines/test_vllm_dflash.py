"""Real vLLM drafts with an exported DFlash checkpoint what fastdraft drafts from it, in full and in sliding layers."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import engine_place
from drafting import One
from test_decode import prompts
from tiny import tiny_llama

from fastdraft.batch import Batch
from fastdraft.decode import generate_plain
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash import METHOD
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.config import DFlashConfig
from fastdraft.model.dflash.draft import DFlashDraft
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash.propose import BlockDrafter
from fastdraft.model.proposal import DecodeSettings
from fastdraft.serving.engines import Run, run_engine
from fastdraft.serving.export import export_draft, load_draft, verify
from fastdraft.target.hf import Target

NEW_TOKENS = 30
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.15}
CASES = {
    "full": {"layers": (1, 4, 6)},
    "sliding": {"layer_types": ("sliding_attention",) * 2, "sliding_window": 8},
}


@dataclass(frozen=True)
class BlockCase:
    target: Target
    checkpoint: Path
    run: Run


def make_block_case(changes: dict, folder: Path, steps: int = 16) -> BlockCase:
    """A draft trained so little on its target's outputs that about half of its tokens are wrong."""
    model = tiny_llama(0, **SHAPE)
    model.save_pretrained(folder / "target")
    c = DFlashConfig.from_target(
        model.config.to_dict(), **{"mask_token_id": 190, "block_size": 6, "num_hidden_layers": 2} | changes
    )
    target, draft = Target(model, c.layers), DFlashDraft(c)
    draft.init_weights(0.1, torch.Generator().manual_seed(0))
    draft.take_from_target(target.embedding)
    texts = [(p, generate_plain(target, p, 40).tokens) for p in prompts()]
    ids = torch.cat([torch.tensor(p + out) for p, out in texts])
    mask = torch.cat([torch.arange(len(p) + len(out)) >= len(p) for p, out in texts])
    batch = Batch(ids.where(ids != 190, 189), mask, tuple(len(p) + len(out) for p, out in texts))
    features = target.capture(batch)
    loss = BlockLoss(gamma=4.0)
    engine = BlockEngine(draft, target.head, loss, lambda batch, step: draw_anchors(batch, 64, 0, step))
    optimizer = torch.optim.AdamW(draft.trainable().values(), lr=5e-3)
    for step in range(1, steps):
        grads = flat_gradients(draft.trainable())
        engine.begin(step)
        rows = engine.step(batch, features, grads)
        for name, p in draft.trainable().items():
            p.grad = grads[name] / rows.live.sum()
        optimizer.step()
    checkpoint = export_draft(draft, folder / "draft", torch.float32)
    assert not verify(checkpoint, folder / "target").errors
    name = METHOD.engine_names["vllm"]
    run = Run(str(folder / "target"), str(checkpoint), prompts(), NEW_TOKENS, [2], "float32", c.num_drafted, algorithm=name)
    return BlockCase(target, checkpoint, run)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    cases = [make_block_case(changes, tmp_path_factory.mktemp("case")) for changes in CASES.values()]
    found = run_engine(engine_place("vllm", os.environ), [case.run for case in cases], 900)
    return dict(zip(CASES, zip(cases, found, strict=True), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_vllm_drafts_what_we_draft(name, served):
    case, found = served[name]
    draft = load_draft(case.checkpoint, case.target.config)
    draft.take_from_target(case.target.embedding)
    steps = case.run.num_steps
    equal = total = right = 0
    for prompt, output in zip(case.run.prompts, found.outputs, strict=True):
        assert output.tokens == generate_plain(case.target, prompt, NEW_TOKENS).tokens
        ids = torch.tensor(prompt + output.tokens)
        g = case.target.forward(ids[None])[0][0]
        for r in output.rounds:
            root = len(prompt) + r.after - 1
            drafter = One(BlockDrafter(draft, case.target.head, 1, len(ids)))
            with torch.no_grad():
                ours = drafter.propose(ids[1 : root + 1], g[:root], steps, DecodeSettings(num_steps=steps), None)
            equal += sum(a == b for a, b in zip(ours.tokens.tolist(), r.drafted, strict=True))
            right += sum(a == b for a, b in zip(output.tokens[r.after :], r.drafted, strict=False))
            total += steps
    assert equal == total and 0.1 * total < right < 0.9 * total
