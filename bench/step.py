"""Times the whole draft step, forward, backward and optimizer: python -m bench.step --shape llama-3.1-8b --tokens 2048,8192

Each provider runs alone first: its first step, its memory, the kernels and host synchronisations of a warm step. Then all
that fit run interleaved. A sample is a burst of steps without a synchronisation between them, as in training, so launches
that the GPU waits for count. Rows go to bench/results/step.jsonl:

us_per_token, p20, p80   of the whole step; `model_us_per_token` is forward and backward alone
mfu, pct_of_gemm         `work.model_flops` a second, of forward and backward, over the GPU's peak (`cost.PEAK_FLOPS`), and
                         over what an 8192^3 product reaches in the same process (`timing.roof`);
                         pct_of_sustained_gemm over what two seconds of them do (`timing.sustained_matrix_rate`)
tokens_per_s, useful_tokens_per_s   all tokens, and those whose step-0 row the loss mask trains on
memory                   bytes, disjoint: `weights_optimizer` (draft, frozen embedding, head as the provider keeps it,
                         masters, moments, gradient), `inputs` (g, f, ids of the largest pack), `per_token` (what the fused
                         engine holds for every token: the peak of a pack with one trained token, less that of 16 tokens),
                         `transient` (the peak above all these); `peak` is their sum; `transient_model` is without the
                         optimizer's step
first_step_s, first_step a provider's first step; "cold" in a fresh process with empty compile caches (--cold), "warm" in a
                         fresh process, "later" after another length in the same process
host_us_per_token        what the host takes to launch a step; where it is not below us_per_token the GPU waits
kernels, syncs           launched in a step by torch.profiler; `torch.cuda.set_sync_debug_mode` warnings (.item, nonzero, a
                         blocking copy), which know nothing of synchronize and cudaFree
csrc                     whether our engine ran with the CUDA C++ kernels (`fastdraft.kernels.cuda`)
loss_error               of a peer: largest relative difference of a TTT step's summed loss from ours at the same weights;
                         above AGREE the rows are written and the program fails

--precision bf16,fp8 runs our fused engine in each, as providers "fastdraft" and "fastdraft, fp8". FLOPs are then still
counted over the bf16 rates: mfu and pct_of_gemm of a row of dtype fp8 are shares of what bf16 could do.

Where flash-attn 4 is installed the fused engine's provider is "fastdraft, flash-attn": a row of its own, not the gate's.
A provider without the memory gets a row with `failed` and no times. On a CPU (--device cpu) there is nothing but times.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.providers import arguments, begin, end, free, measure_work
from bench.work import SHAPES, Work, chat_batches, live_batch, make_draft, make_head, make_work
from fastdraft.batch import Batch, Features
from fastdraft.config import OptimConfig
from fastdraft.kernels import cuda, dense_attention
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.model.eagle3.graph_engine import GraphEngine
from fastdraft.model.eagle3.ref import ReferenceEngine
from fastdraft.optim import FlatAdamW

FLASH = ", flash-attn"
TAIL = 8192  # tokens trained on of a long document: its memory is the whole document's, its time is not


class Ours:
    """An engine of the package with its optimizer: a provider (`bench.providers`)."""

    own_inputs = 0  # bytes of inputs in a layout of its own
    late_moments = False

    def __init__(self, work: Work, engine: str, chunk_rows: int | None, fp8: bool = False):
        self.work = work
        draft = make_draft(work.config, work.dtype, work.device)
        self.optimizer = FlatAdamW(draft.trainable(), OptimConfig(optimizer="adamw"), 1000, work.dtype)
        made = {"fused": GraphEngine, "reference": ReferenceEngine}[engine]
        changes = {} if engine == "reference" else {"chunk_rows": chunk_rows, "fp8": fp8}
        self.engine = made(draft, make_head(work.config, work.dtype, work.device), work.step_weights, **changes)
        self.per_token_bytes = per_token_bytes if isinstance(self.engine, TTTEngine) else None

    def model(self, k: int) -> None:
        """Forward and backward of pack k."""
        self.run(self.work.batches[k], self.work.features[k])

    def run(self, batch: Batch, features: Features) -> None:
        self.rows = self.engine.step(batch, features, self.optimizer.grads)

    def update(self) -> None:
        self.optimizer.step(self.rows.live[0].sum())

    def losses(self) -> Tensor:  # [T] sums over the last pack's live rows
        return self.rows.loss.sum(1)


def per_token_bytes(make: Callable[[Work], Ours], work: Work) -> int:
    """Peak of the largest pack with one trained token, less that of its first 16 tokens."""
    k = max(range(len(work.batches)), key=lambda k: work.batches[k].num_tokens)
    batch, features, peaks = work.batches[k], work.features[k], []
    for n in (16, batch.num_tokens):
        free()
        provider = make(work)
        mask = torch.zeros(n, dtype=torch.bool)
        mask[-1] = True
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        provider.run(Batch(batch.input_ids[:n], mask, (n,)), Features(features.g[:n], features.f[:n]))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del provider
    return peaks[1] - peaks[0]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, "step")
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--pattern", default="live", help="comma-separated: live, chats, tail (the last 8192 tokens)")
    parser.add_argument("--engine", default="fused", help="comma-separated: fused, reference; or none")
    parser.add_argument("--peer", choices=["specforge"])
    parser.add_argument("--ttt", type=int, default=7)
    parser.add_argument("--chunk-rows", type=int, help="of the fused engine, if not its default")
    parser.add_argument("--precision", default="bf16", help="comma-separated, of our engine with --dtype bf16: bf16, fp8")
    args = parser.parse_args(argv)
    if args.peer and not args.specforge:
        parser.error("--peer specforge needs --specforge DIR, a checkout of SpecForge")
    device, dtype = begin(args)

    engines: dict[str, Callable[[Work], object]] = {}
    for engine in args.engine.split(","):
        if engine != "none":
            name = {"fused": "fastdraft" + FLASH * dense_attention.installed(), "reference": "reference"}[engine]
            engines[name] = lambda work, engine=engine: Ours(work, engine, args.chunk_rows)
    if "bf16" not in args.precision.split(","):
        engines.pop("fastdraft" + FLASH * dense_attention.installed(), None)
    if "fp8" in args.precision.split(","):
        engines["fastdraft, fp8"] = lambda work: Ours(work, "fused", args.chunk_rows, fp8=True)
    if args.peer:
        from bench.peers.specforge import SpecForge

        specforge = lambda work: SpecForge(work, args.specforge, args.peer_attention, args.peer_batch)  # noqa: E731
    agree = True
    for shape_name in args.shape.split(","):
        config = SHAPES[shape_name]
        for pattern in args.pattern.split(","):
            for tokens in map(int, args.tokens.split(",")):
                if pattern == "chats":
                    batches = chat_batches(config, tokens, args.chats, args.packs)
                else:
                    batches = [live_batch(config, tokens, TAIL if pattern == "tail" else None)]
                shape = {"model": shape_name, "tokens": tokens, "pattern": pattern, "T": args.ttt}
                makes = dict(engines)
                if args.peer:
                    makes["specforge" + (f", {args.peer_batch} a batch" if pattern == "chats" else "")] = specforge
                if args.chunk_rows:
                    shape["chunk_rows"] = args.chunk_rows
                work = make_work(config, batches, args.ttt, dtype, device)
                csrc = {"csrc": work.device.type == "cuda" and cuda.takes(work.step_weights)}
                agree &= measure_work("step", makes, work, args, shape, csrc)
                del work
                args.first_step = "later"
                free()
    end(agree)


if __name__ == "__main__":
    main()
