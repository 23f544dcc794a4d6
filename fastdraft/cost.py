"""What a training run will need before it starts: memory by category, disk, FLOPs per token. Arithmetic only, no tensors.

The reference engine (`model/eagle3/ref.py`) keeps, for the backward of one pack, every row of every TTT step: two to four
float32 rows over the draft vocabulary (by loss), attention probabilities [Hq, L, L + i] of every document, and keys and
values repeated for each query head. On top of what is kept comes the largest short-lived part: full-vocabulary teacher
logits or one document's attention.

The fused engine (`model/eagle3/engine.py`) lists what it takes: a chunk's buffers, once, and what it keeps for every token
of a pack. On the CPU its attention keeps [rows, Hq, N] probabilities too. Its FLOPs are counted with every token trained
on: loss masks make its chunks fewer and its work less.

On the CPU a run's peak may lie outside the step. AdamW there is plain PyTorch with two temporaries as long as the weights;
and to write a checkpoint, safetensors first copies all of its tensors and then lays the file out in memory. What of it goes
beyond a step's short-lived tensors is counted. With a GPU those copies are the host's, whose memory is not predicted.

Not counted: the target's own forward, a second g and f for a small draft's graphs (`model/eagle3/graph_engine.py`),
allocator slack, the CUDA context (0.5-1 GiB), Triton's and cuBLAS's scratch, a CPU library's own copies of bf16 weights.

# N tokens of a pack, L tokens of a document, T TTT steps, M chains of a chunk, R = T*M, H draft hidden, Ht target hidden,
# V target vocabulary, Vd draft vocabulary, Hq/Hkv heads, D head dim, E = Hq*D, K = Hkv*D, W = E + 2K, I MLP width,
# b bytes of a compute number, w of a softmax number, tb of a target number
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from fastdraft.batch import LossKind
from fastdraft.files import GIB
from fastdraft.model.buffers import table_bytes
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.memory import buffer_rows, chunk_buffers, fp8_buffers, pack_buffers, pick_chunk_rows

Precision = Literal["fp32", "bf16", "fp8"]
Engine = Literal["reference", "fused"]
ROWS_KEPT: dict[LossKind, int] = {"kl": 2, "lk_alpha": 3, "lk_lambda": 4}  # of log Q, Q, P, P~, those the backward reads


@dataclass(frozen=True)
class Row:
    name: str
    size: int  # bytes, or FLOPs per token among `Plan.flops`
    short_lived: bool = False  # memory that is free again between two steps


@dataclass(frozen=True)
class Plan:
    trainable_params: int
    frozen_params: int  # the draft's copy of the target's embedding
    target_params: int
    memory: tuple[Row, ...]  # bytes on one device at the peak of a step
    disk: tuple[Row, ...]  # bytes
    flops: tuple[Row, ...]  # forward and backward, per packed token

    @property
    def memory_bytes(self) -> int:
        return sum(row.size for row in self.memory)

    @property
    def disk_bytes(self) -> int:
        return sum(row.size for row in self.disk)

    @property
    def flops_per_token(self) -> int:
        return sum(row.size for row in self.flops)


def plan(
    draft: DraftConfig,
    *,
    target_params: int,
    target_dtype: torch.dtype,
    pack_tokens: int,  # N
    ttt_length: int,  # T
    precision: Precision = "bf16",
    document_tokens: int | None = None,  # longest document L; a pack is one document when left out
    keep: int = 2,  # latest checkpoints kept, besides the best one
    loss: LossKind = "kl",
    engine: Engine = "reference",
    device: Literal["cuda", "cpu"] = "cuda",  # the fused engine's attention: kernels, or the reference that keeps scores
    chunk_rows: int | None = None,  # M of the fused engine; None: its own choice
    stored: bool = False,  # features are read from a store: of the target, only embedding and head are loaded
    export_dtype: torch.dtype | None = None,  # None: target_dtype
    cache_bytes: int = 0,  # of disk that a cache of features may fill
) -> Plan:
    """Predicted needs of a run on one device, for what `Config` allows. ValueError for fp8 on a CPU, where no run is."""
    if precision == "fp8" and device == "cpu":
        raise ValueError(
            "precision: fp8 is for GPUs, a run on the CPU refuses it; set precision=bf16, or plan for device=cuda"
        )
    length = pack_tokens if document_tokens is None else min(document_tokens, pack_tokens)
    b, compute = (4, "fp32") if precision == "fp32" else (2, "bf16")
    count = draft.num_parameters()
    trainable, frozen = count["trainable"], count["embedding"]
    maps = 8 * draft.draft_vocab_size + draft.vocab_size  # d2t int64, t2d bool
    if engine == "fused":
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        step = _fused_step(draft, pack_tokens, ttt_length, chunk_rows, dtype, target_dtype, device, precision == "fp8")
        work = _fused_flops(draft, pack_tokens, length, ttt_length, device == "cpu")
    else:
        step = _reference_step(draft, pack_tokens, length, ttt_length, b, ROWS_KEPT[loss])
        step = (Row(f"gradient of one pack ({compute})", b * trainable, True), *step)
        work = (Row("draft step, forward and backward", _reference_flops(draft, length, ttt_length)),)
    checkpoint = 12 * trainable + maps  # fp32 master, two moments, vocabulary map
    if draft.hidden_size != draft.target_hidden_size:  # an embedding of its own, not the target's
        checkpoint += frozen * b
    between = _between_steps(trainable, checkpoint, step) if device == "cpu" else ()
    weights = trainable + frozen if b < 4 else frozen  # in fp32 the masters are the weights
    memory = (
        Row("target's embedding and head", 2 * draft.vocab_size * draft.target_hidden_size * target_dtype.itemsize)
        if stored
        else Row("target weights", target_params * target_dtype.itemsize),
        Row(f"draft weights ({compute})" if b < 4 else "draft's frozen embedding", weights * b + maps),
        Row("fp32 master weights", 4 * trainable),
        Row("fp32 moments (two)", 8 * trainable),
        Row("fp32 gradient", 4 * trainable),
        *between,
        Row("features g and f of a pack", 4 * draft.target_hidden_size * pack_tokens * target_dtype.itemsize),
        *step,
    )
    served = (export_dtype or target_dtype).itemsize
    export = trainable * served + draft.vocab_size + 8 * draft.draft_vocab_size
    if draft.hidden_size != draft.target_hidden_size:
        export += frozen * served
    if draft.draft_vocab_size == draft.vocab_size:
        export -= 8 * draft.draft_vocab_size  # the full vocabulary ships without d2t
    disk = (
        Row(f"checkpoints ({keep} latest and the best)", (keep + 1) * checkpoint),
        Row("one more while it is written", checkpoint),
        Row("export", export),
        *([Row("cache of features, at most", cache_bytes)] if cache_bytes else []),
    )
    flops = work if stored else (Row("target forward (every parameter active)", 2 * target_params), *work)
    return Plan(trainable, frozen, target_params, memory, disk, flops)


def _between_steps(trainable: int, checkpoint: int, step: tuple[Row, ...]) -> tuple[Row, ...]:
    """What a run on the CPU needs between two steps, beyond what a step had and no longer has."""
    short_lived = sum(row.size for row in step if row.short_lived)
    update = max(0, 8 * trainable - short_lived)
    writing = max(0, 2 * checkpoint - short_lived - update)
    return (
        Row("AdamW's temporaries, beyond a step's", update),
        Row("copies while a checkpoint is written, beyond those", writing),
    )


def _reference_step(c: DraftConfig, n: int, length: int, steps: int, b: int, rows_kept: int) -> tuple[Row, ...]:
    """Bytes one forward of ttt_ref keeps (activations, attention scores, logits), and its largest short-lived part."""
    h, e, inner, heads = c.hidden_size, c.num_attention_heads * c.head_dim, c.intermediate_size, c.num_attention_heads
    w, cast = max(b, 4), b < 4  # a cast to float32 is a copy only below float32
    per_token = 0
    for i in range(steps):
        norms = 6 * h * b + 3 * h * w  # four norms' inputs and outputs; in fp32 the layer's output serves two of them
        concat = 2 * h * b
        mlp = 4 * inner * b
        keys = (2 * (i + 1) + i) * e * b  # K^0..K^i and V^0..V^i for every query head, and einsum's copy of K^1..K^i
        queries = (3 if i else 2) * e * b  # q, einsum's copy of it, the attention's output
        per_token += norms + concat + mlp + keys + queries
    docs, rest = divmod(n, length)
    pairs = docs * length * length + rest * rest
    probabilities = sum(heads * (pairs + i * n) * (w + (b if cast else 0)) + pairs for i in range(steps))
    logits = (rows_kept * steps + 1) * n * c.draft_vocab_size * w  # and the teacher's, shared by all steps
    vocabulary = n * c.vocab_size * ((b if cast else 0) + 2 * w)  # teacher logits as computed, cast, exponentiated
    rows = 5 * n * c.draft_vocab_size * w  # one step's loss and acceptance
    attention = heads * length * (length + steps) * (3 * b + w)
    return (
        Row("activations kept for the backward", n * per_token, True),
        Row("attention scores kept", probabilities, True),
        Row("logits kept", logits, True),
        Row("largest short-lived tensors", max(vocabulary, rows, attention), True),
    )


def _reference_flops(c: DraftConfig, length: int, steps: int) -> int:
    """Matrix FLOPs of ttt_ref per token, 2 per multiply-add; a backward costs twice its forward."""
    e, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = 2 * c.hidden_size * (e + 2 * kv) + e * c.hidden_size + 3 * c.hidden_size * c.intermediate_size
    forward = sum(layer + c.hidden_size * c.draft_vocab_size + 2 * e * (length + i) for i in range(steps))
    fc = 3 * c.target_hidden_size * c.hidden_size
    teacher = c.target_hidden_size * c.vocab_size
    fc_backward = 2 * fc if c.fc_norm else fc  # without norms before it, nothing needs the gradient of g
    return 2 * (3 * forward + fc + fc_backward + teacher)


def _fused_step(
    c: DraftConfig,
    n: int,
    steps: int,
    chunk_rows: int | None,
    dtype: torch.dtype,
    target_dtype: torch.dtype,
    device: str,
    fp8: bool,
) -> tuple[Row, ...]:
    """Bytes of one step of the fused engine, every token trained on."""
    room, m = buffer_rows(n, pick_chunk_rows(chunk_rows, c, steps, dtype, target_dtype, device))
    stats = torch.promote_types(dtype, torch.float32).itemsize
    rows, width = steps * min(m, n), c.target_hidden_size
    results = n * (16 + 9 + steps * (2 * stats + 3))  # next ids and positions, ids and mask, `Rows`
    kept = table_bytes(pack_buffers(c, room, dtype)) + results
    index = rows * (8 * 7 + 40) + min(m + steps, n) * width * target_dtype.itemsize  # the plan's rows, their results, and f
    cast = 0 if dtype == target_dtype else min(2 * m, n) * 3 * width * dtype.itemsize
    found = [
        Row("target's head, draft vocabulary first", target_dtype.itemsize * c.vocab_size * width + 8 * c.vocab_size),
        Row("buffers of a chunk", table_bytes(chunk_buffers(c, m, steps, dtype, target_dtype, device))),
        Row("kept for every token of a pack", kept),
        Row("short-lived tensors", max(index, cast), True),
    ]
    if fp8:
        found.append(Row("weights and rows in fp8", table_bytes(fp8_buffers(c, m, steps))))
    if device == "cpu":
        heads, b = c.num_attention_heads, dtype.itemsize
        scores = sum(min(m, n) * (heads * ((n + i) * stats + n * b) + n) for i in range(steps))
        sums = 2 * n * c.num_key_value_heads * c.head_dim * stats
        backward = (4 if steps > 1 else 2) * min(m, n) * heads * n * stats
        found.append(Row("attention's scores and gradients of a chunk (CPU)", scores + sums + backward, True))
    return tuple(found)


def _fused_flops(c: DraftConfig, n: int, length: int, steps: int, cpu: bool) -> tuple[Row, Row]:
    """Matrix FLOPs of the fused engine per token, every token trained on: what it executes, recomputed products too."""
    h, ht, e, kv = (
        c.hidden_size,
        c.target_hidden_size,
        c.num_attention_heads * c.head_dim,
        c.num_key_value_heads * c.head_dim,
    )
    qkv, mlp = h * (e + 2 * kv), 3 * h * c.intermediate_size
    products = attention = 0
    for size, count in ((length, n // length), (n % length, 1)):
        products += count * size * (3 * ht * h * (2 + c.fc_norm) + 3 * 2 * h * 2 * kv)
        products += count * max(size - 2, 0) * (ht * c.vocab_size + 3 * qkv)
        for i in range(steps):
            rows = max(size - 2 - i, 0)  # x_{t+2+i} exists
            products += count * rows * (3 * (e * h + mlp + h * c.draft_vocab_size) + 3 * (qkv if i else h * e))
            if cpu:  # every key of the pack, two products forward, four back
                attention += count * rows * 6 * e * (n + i)
            else:  # keys up to its own; two products forward, three for dq, four for dk and dv
                attention += count * e * (9 * rows * (rows + 1) // 2 + 7 * rows * i)
    return Row("draft step but for attention", 2 * products // n), Row("draft's attention", 2 * attention // n)


def pair_cost(c: DraftConfig, target_params: int, steps: int) -> float:
    """What attention in a document of L tokens costs per L^2, where the other work of a token (the target's forward and the
    fused draft step) costs 1. The target's attention is counted as wide as its hidden state; half the pairs are causal."""
    rest, _ = _fused_flops(c, 4096, 4096, steps, cpu=False)
    target = 2 * c.target_hidden_size * c.num_target_layers
    draft = 9 * c.num_attention_heads * c.head_dim * steps
    return (target + draft) / (2 * target_params + rest.size)


def render(plan: Plan, console: Console) -> None:
    """Prints parameter counts, memory, disk and FLOPs as tables."""
    console.print(
        f"parameters: draft {plan.trainable_params:,} trained + {plan.frozen_params:,} frozen embedding, "
        f"target {plan.target_params:,}"
    )
    for title, rows, total in (
        ("Memory of one device", plan.memory, plan.memory_bytes),
        ("Disk", plan.disk, plan.disk_bytes),
    ):
        table = Table(title=title, title_justify="left", show_footer=True)
        table.add_column("", footer="total")
        table.add_column("GiB", f"{total / GIB:.3f}", justify="right")
        table.add_column("share", "", justify="right")
        for row in rows:
            table.add_row(row.name, f"{row.size / GIB:.3f}", f"{row.size / max(total, 1):.0%}")
        console.print(table)
    table = Table(title="Work", title_justify="left", show_footer=True)
    table.add_column("", footer="total")
    table.add_column("GFLOP/token", f"{plan.flops_per_token / 1e9:.3f}", justify="right")
    for row in plan.flops:
        table.add_row(row.name, f"{row.size / 1e9:.3f}")
    console.print(table)
