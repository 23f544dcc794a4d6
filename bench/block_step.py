"""Times the whole step of a draft of blocks: python -m bench.block_step --shape qwen3-8b --tokens 2048,8192 --specforge DIR

--method names DFlash, DSpark, DFlash2, or several with commas. Rows of another method than DFlash say so in their shape.

It is measured as `bench.step` measures EAGLE-3's, whose docstring names what both say of memory, first steps, kernels and
synchronisations. Rows go to bench/results/block_step.jsonl and besides say

us_per_row, p20, p80      of the whole step, by block row (B rows for each anchor, whether they have a label or not);
                          `model_us_per_row` is forward and backward alone
us_per_trained_token      the same by rows that have a label
mfu, pct_of_gemm          `block_work.flop_parts` a second, of forward and backward: products that are done twice, or for
                          rows that nothing reads, count for nobody
loss_error                of a peer: relative difference of the summed, weighted loss from ours at the same weights, inputs
                          and anchors; above `providers.AGREE` the rows are written and the program fails

Peers: --specforge DIR is a checkout of SpecForge, which has DFlash and DSpark; --speculators DIR a folder that `pip install
--no-deps --target DIR speculators` filled, whose DFlash runs. Both run what their trainers run (bench/peers); --peer-batch
is how many conversations SpecForge pads together (its recipe for Qwen3-8B: 4).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from bench.block_work import (
    BLOCK_METHODS,
    SHAPES,
    BlockWork,
    block_engine,
    block_reference,
    block_shape,
    default_loss,
    make_block_work,
    make_draft,
    make_head,
    without_mask_token,
)
from bench.providers import arguments, begin, end, free, measure_work
from bench.work import chat_batches, live_batch
from fastdraft.batch import Batch, Features
from fastdraft.config import OptimConfig
from fastdraft.kernels import dense_attention
from fastdraft.model.dflash.engine import BlockEngine
from fastdraft.model.dflash.graph_engine import GraphBlockEngine
from fastdraft.model.dflash.loss import dpace_weights
from fastdraft.optim import FlatAdamW

PEER_METHODS = {"specforge": ("dflash", "dspark"), "speculators": ("dflash",)}


class Ours:
    """An engine of the package with its optimizer: a provider (`bench.providers`)."""

    own_inputs = 0
    late_moments = False

    def __init__(self, work: BlockWork, engine: str, chunk_blocks: int | None):
        self.work = work
        draft = make_draft(work.config, work.dtype, work.device)
        self.optimizer = FlatAdamW(draft.trainable(), OptimConfig(optimizer="adamw"), 1000, work.dtype)
        self.anchors = work.anchors[0]
        given = draft, make_head(work.config, work.dtype, work.device), work.loss, lambda batch, number: self.anchors
        if engine == "reference":
            self.engine = block_reference(*given)
        else:
            made = {"fused": GraphBlockEngine, "no-graphs": BlockEngine}[engine]
            self.engine = block_engine(*given, chunk_blocks, made)
        self.per_token_bytes = None if engine == "reference" else per_token_bytes
        steps = work.config.num_drafted
        self.step_weights = torch.tensor(work.loss.weights(steps), dtype=torch.float64, device=work.device)
        self.normaliser = torch.tensor(work.loss.normaliser(steps), dtype=torch.float64, device=work.device)

    def model(self, k: int) -> None:
        """Forward and backward of pack k."""
        self.run(self.work.batches[k], self.work.features[k], self.work.anchors[k])

    def run(self, batch: Batch, features: Features, anchors: Tensor) -> None:
        self.anchors = anchors
        needed = features if self.work.loss.needs_teacher else Features(features.g, None)
        self.rows = self.engine.step(batch, needed, self.optimizer.grads)

    def update(self) -> None:
        self.optimizer.step((self.rows.live.sum(1) * self.normaliser).sum())

    def losses(self) -> Tensor:  # [1] the last pack's sum of weighted losses
        loss, live = self.rows.loss.double(), self.rows.live
        if self.work.loss.kind == "dpace":
            weight = dpace_weights(loss.neg().exp().T, live.T, self.work.loss.dpace_alpha).T
        else:
            weight = self.step_weights[:, None]
        return (loss * weight * live).sum()[None]


def per_token_bytes(make: Callable[[BlockWork], Ours], work: BlockWork) -> int:
    """Peak of the largest pack with the last of its blocks alone, less that of its first 32 tokens with one."""
    k = max(range(len(work.batches)), key=lambda k: work.batches[k].num_tokens)
    batch, features, peaks = work.batches[k], work.features[k], []
    for n in (32, batch.num_tokens):
        free()
        provider = make(work)
        mask = torch.ones(n, dtype=torch.bool)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        part = Batch(batch.input_ids[:n], mask, (n,))
        provider.run(part, Features(features.g[:n], features.f[:n]), torch.tensor([n - 3]))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del provider
    return peaks[1] - peaks[0]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "block_step")
    parser.add_argument("--method", default="dflash", help=f"comma-separated: {', '.join(BLOCK_METHODS)}")
    parser.add_argument("--shape", default="qwen3-8b", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--pattern", default="live", help="comma-separated: live, chats")
    parser.add_argument("--block", default="16", help="comma-separated: rows of a block")
    parser.add_argument("--anchors", type=int, default=512, help="of a document at most")
    parser.add_argument("--loss", choices=["ce", "dpace"], default="ce")
    parser.add_argument("--engine", default="fused", help="comma-separated: fused, no-graphs, reference; or none")
    parser.add_argument("--speculators", type=Path, metavar="DIR", help="where speculators is installed")
    parser.add_argument(
        "--speculators-loss", choices=["fused", "eager"], default="fused", help="its trainer's --loss-implementation"
    )
    parser.add_argument("--chunk-blocks", type=int, help="of the fused engine, if not its default")
    args = parser.parse_args(argv)
    device, dtype = begin(args)

    makes: dict[str, Callable[[BlockWork], object]] = {}
    for engine in args.engine.split(","):
        if engine != "none":
            ours = "fastdraft" + ", flash-attn" * dense_attention.installed()
            name = {"fused": ours, "no-graphs": f"{ours}, no graphs", "reference": "reference"}[engine]
            makes[name] = lambda work, engine=engine: Ours(work, engine, args.chunk_blocks)
    if args.specforge:
        from bench.peers.specforge_dflash import SpecForgeDFlash

        makes["specforge"] = lambda work: SpecForgeDFlash(work, args.specforge, args.peer_attention, args.peer_batch)
    if args.speculators:
        from bench.peers.speculators_dflash import SpeculatorsDFlash

        name = "speculators" + ", eager loss" * (args.speculators_loss == "eager")
        makes[name] = lambda work: SpeculatorsDFlash(work, args.speculators, args.speculators_loss)
    agree = True
    cases = itertools.product(*(x.split(",") for x in (args.method, args.shape, args.block, args.pattern, args.tokens)))
    for method, shape_name, block, pattern, tokens in cases:
        config = block_shape(shape_name, method, int(block))
        loss = default_loss(method, args.loss, int(block))
        if pattern == "chats":
            batches = chat_batches(config, int(tokens), args.chats, args.packs)
        else:
            batches = [live_batch(config, int(tokens))]
        batches = without_mask_token(batches, config)
        shape = {"model": shape_name, "tokens": int(tokens), "pattern": pattern, "B": int(block), "anchors": args.anchors}
        shape |= {"method": method} if method != "dflash" else {}
        shape |= {"loss": args.loss} if args.loss != "ce" else {}
        shape |= {"chunk_blocks": args.chunk_blocks} if args.chunk_blocks else {}
        named = {
            name + f", {args.peer_batch} a batch" * (name == "specforge" and pattern == "chats"): make
            for name, make in makes.items()
            if method in PEER_METHODS.get(name.partition(", ")[0], BLOCK_METHODS)
        }
        work = make_block_work(config, batches, args.anchors, loss, dtype, device)
        agree &= measure_work("block_step", named, work, args, shape, {})
        args.first_step = "later"
        del work
        free()
    end(agree)


if __name__ == "__main__":
    main()
