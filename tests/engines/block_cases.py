"""A tiny target, and a draft of each block method trained so little on its outputs that many of its tokens are wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from test_decode import prompts
from tiny import tiny_llama

from fastdraft.batch import Batch
from fastdraft.decode import generate
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.dflash.blocks import draw_anchors
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.dflash2.head import SelectorHead
from fastdraft.model.dflash2.loss import SelectorLoss
from fastdraft.model.dflash2.mixer import ConvolutionMixer
from fastdraft.model.dspark.head import DSparkHead
from fastdraft.model.dspark.loss import DSparkLoss
from fastdraft.model.methods import METHODS
from fastdraft.serving.engines import Run
from fastdraft.serving.export import export_draft, verify
from fastdraft.target.hf import Target
from fastdraft.target.identity import origin

NEW_TOKENS, MASK = 30, 190
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "initializer_range": 0.15}
FIELDS = {
    "dflash": {"block_size": 6},
    "dspark": {"block_size": 5, "markov_rank": 16},
    "dflash2": {"block_size": 6, "selector_rank": 16, "selector_top_k": 8},
}


@dataclass(frozen=True)
class BlockCase:
    target: Target
    checkpoint: Path
    run: Run


def far_apart(draft: torch.nn.Module) -> None:
    """Norms of the layers' keys as after long training, where one layer's cannot stand for another's."""
    generator = torch.Generator().manual_seed(1)
    for layer in draft.layers:
        weight = layer.self_attn.k_norm.weight
        weight.data *= (0.5 * torch.randn(weight.shape, generator=generator)).exp()


def engine_of(method: str, draft: torch.nn.Module, target: Target) -> BlockEngine:
    draw = lambda batch, step: draw_anchors(batch, 64, 0, step)  # noqa: E731
    if method == "dspark":
        return BlockEngine(draft, target.head, DSparkLoss(gamma=4.0), draw, None, DSparkHead)
    if method == "dflash2":
        return BlockEngine(draft, target.head, SelectorLoss(gamma=4.0), draw, None, SelectorHead, ConvolutionMixer(draft))
    return BlockEngine(draft, target.head, BlockLoss(gamma=4.0), draw)


def make_block_case(
    changes: dict,  # of the draft's shape
    folder: Path,
    method: str = "dflash",
    start: Callable[[torch.nn.Module], None] = lambda draft: None,  # changes a new draft's weights
    steps: int = 16,
    end: Callable[[torch.nn.Module], None] = lambda draft: None,  # changes the trained draft before it is exported
) -> BlockCase:
    model = tiny_llama(0, **SHAPE)
    model.save_pretrained(folder / "target")
    fields = {"mask_token_id": MASK, "num_hidden_layers": 2} | FIELDS[method] | changes
    c = METHODS[method].shape.from_target(model.config.to_dict(), **fields)
    target, draft = Target(model, c.layers), METHODS[method].draft(c)
    draft.init_weights(0.1, torch.Generator().manual_seed(0))
    start(draft)
    draft.take_from_target(target.embedding)
    texts = [(p, generate(target, None, p, 40).tokens) for p in prompts()]
    ids = torch.cat([torch.tensor(p + out) for p, out in texts])
    mask = torch.cat([torch.arange(len(p) + len(out)) >= len(p) for p, out in texts])
    batch = Batch(ids.where(ids != MASK, MASK - 1), mask, tuple(len(p) + len(out) for p, out in texts))
    features, engine = target.capture(batch), engine_of(method, draft, target)
    optimizer = torch.optim.AdamW(draft.trainable().values(), lr=5e-3)
    for step in range(1, steps):
        grads = flat_gradients(draft.trainable())
        engine.begin(step)
        rows = engine.step(batch, features, grads)
        for name, p in draft.trainable().items():
            p.grad = grads[name] / rows.live.sum()
        optimizer.step()
    end(draft)
    checkpoint = export_draft(draft, folder / "draft", torch.float32, trained_for=origin(str(folder / "target")))
    assert not verify(checkpoint, folder / "target").errors
    name = METHODS[method].engine_names["vllm"]
    asked = str(folder / "target"), str(checkpoint), prompts(), NEW_TOKENS, [2], "float32", c.num_drafted
    return BlockCase(target, checkpoint, Run(*asked, algorithm=name))
