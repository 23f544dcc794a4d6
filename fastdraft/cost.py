"""What a training run will need before it starts: memory by category, disk, FLOPs per token. Arithmetic only, no tensors.

Memory is that of one process, alone or of a `Layout` of several. A sharded target leaves 1/n of its layers on each of the
n processes that hold it, and what the draft reads of it (embedding, head) whole; FSDP2 has up to GATHERED layers whole at a
time. The draft's weights, gradient and step divide by `tensor` where heads, MLP and vocabulary do; masters and moments lie
on one process each; what is kept for a token divides by `sequence`, except the keys and values of the pack's tokens, which
every process has. What a draft step itself takes is its method's to say (`model/eagle3/cost.py`).

On a GPU the step's buffers stay where they are while the target runs and the optimizer steps. On the CPU a step's
short-lived tensors are gone by then, and the peak may lie there: AdamW is plain PyTorch with two temporaries as long as the
weights (Muon's are of one matrix at a time, and its norm is taken in float64). What goes beyond the step's is counted.
From the first checkpoint on a process keeps a copy of what checkpoints hold, from which they are written while training
goes on (`checkpoint.py`). With a GPU it is the host's memory; nothing else of that is predicted.

Not counted: a second g and f for a small draft's graphs (`model/eagle3/graph_engine.py`), allocator slack, the CUDA context
(0.5-1 GiB), Triton's and cuBLAS's scratch, a CPU library's own copies of bf16 weights.

# N tokens of a pack, L tokens of a document
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from fastdraft.batch import PackShare
from fastdraft.files import GIB
from fastdraft.model.method import Precision, Row
from fastdraft.model.methods import method_of
from fastdraft.optim import Matrix, MuonCost, muon_cost

GATHERED = 3  # layers of a sharded target that are whole at a time: one runs, one arrives, one is copied out of its message
# Dense bf16 FLOP/s by whole words of a GPU's name, from the maker's data sheets; the first that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """None on a CPU, and for a GPU whose peak is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name)), None)


@dataclass(frozen=True)
class TargetSizes:
    """A target as far as a plan needs it. Parameters are counted, not bytes."""

    num_layers: int
    layers: int  # parameters of all layers
    largest_layer: int
    outside: int  # of embedding, head and norms
    active: int  # that one token goes through, in layers and head: of a layer's experts only those chosen
    hidden_size: int
    kv_width: int  # keys and values of a token in one layer, 2 Hkv D
    attention_width: int  # Hq D
    mlp_width: int  # of all that one token goes through
    apart: str | None = None  # why processes cannot share a pack's tokens, as far as config.json tells
    idle: int | None = 0  # of experts that one token does not go through; None: config.json does not tell

    @property
    def total(self) -> int:
        return self.layers + self.outside

    @property
    def used(self) -> int:
        """All but the idle ones, so far as they are known."""
        return self.total - (self.idle or 0)


@dataclass(frozen=True)
class Plan:
    trainable_params: int
    frozen_params: int  # the draft's copy of the target's embedding
    target: TargetSizes
    memory: tuple[Row, ...]  # bytes on one device at the peak
    disk: tuple[Row, ...]  # bytes
    flops: tuple[Row, ...]  # forward and backward, per packed token
    host: tuple[Row, ...] = ()  # bytes of the host's memory for the process of a GPU; what it needs beside is not known

    @property
    def memory_bytes(self) -> int:
        return sum(row.size for row in self.memory)

    @property
    def flops_per_token(self) -> int:
        return sum(row.size for row in self.flops)


@dataclass(frozen=True)
class Layout:
    """world = data x sequence x tensor; `holders` processes of consecutive ranks hold the target together, 1: alone."""

    world: int = 1
    sequence: int = 1
    tensor: int = 1
    holders: int = 1

    @property
    def data(self) -> int:
        return self.world // (self.sequence * self.tensor)

    @property
    def replicas(self) -> int:
        """Processes that divide masters and moments among themselves (`dist/shard.py`)."""
        return self.world // self.tensor

    @property
    def kept(self) -> str:
        """What a process keeps of the target's layers."""
        return "whole" if self.holders == 1 else f"1/{self.holders}"

    def __str__(self) -> str:
        return f"data {self.data}, sequence {self.sequence}, tensor {self.tensor}, target {self.kept}"


ALONE = Layout()


def tensor_part(draft: BaseModel, n: int) -> BaseModel:
    """The shape of what one of n processes of the tensor axis computes; the shape itself alone."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "draft_vocab_size", "vocab_size")
    return draft if n == 1 else draft.model_copy(update={k: -(-getattr(draft, k) // n) for k in names if hasattr(draft, k)})


@dataclass(frozen=True)
class Training:
    """What a run trains and how, wherever that is. `plan` says what it takes, `dist/fleet.py` how long on many GPUs."""

    draft: BaseModel  # the draft's shape
    target_dtype: torch.dtype
    pack_tokens: int  # N
    document_tokens: int  # longest document L
    precision: Precision = "bf16"
    device: Literal["cuda", "cpu"] = "cuda"  # the fused step's attention: kernels, or the reference that keeps scores
    run_tokens: int = 0  # of documents that the target runs together; a longer one runs alone
    # The weights that Muon steps, of one of so many processes that share the draft's.
    muon: Callable[[int], list[Matrix]] = lambda tensor: []
    step: dict[str, Any] = field(default_factory=dict)  # what else the method's `step_cost` reads

    @property
    def itemsize(self) -> int:
        """Bytes of a number that the draft is computed in."""
        return 4 if self.precision == "fp32" else 2

    @property
    def trainable(self) -> int:
        return self.draft.num_parameters()["trainable"]

    def part(self, layout: Layout) -> int:
        """Trained weights of one process."""
        return -(-self.trainable // layout.tensor)

    def share(self, layout: Layout) -> int:
        """Of them, those whose masters and moments it has."""
        return -(-self.part(layout) // layout.replicas)

    def step_cost(
        self, layout: Layout = ALONE
    ) -> tuple[
        tuple[Row, ...], tuple[Row, ...]
    ]:  # bytes at a draft step's peak, FLOPs per packed token of a process's part
        return method_of(self.draft).step_cost(
            tensor_part(self.draft, layout.tensor),
            pack_tokens=self.pack_tokens,
            document_tokens=min(self.document_tokens, self.pack_tokens),
            precision=self.precision,
            target_dtype=self.target_dtype,
            device=self.device,
            tensor=layout.tensor,
            sequence=layout.sequence,
            **self.step,
        )

    def feature_bytes(self, tokens: int) -> int:
        """Of g and f: the states of the layers that are read, and of the last."""
        return (len(self.draft.layers) + 1) * self.draft.target_hidden_size * tokens * self.target_dtype.itemsize

    def muon_cost(self, layout: Layout) -> MuonCost:
        weights = self.muon(layout.tensor)
        return muon_cost(weights, self.itemsize, self.part(layout), layout.replicas, layout.tensor)

    def outside_steps(
        self,
        draft_step: tuple[Row, ...],
        activations: int,  # bytes that the target's forward takes
        layout: Layout,
    ) -> tuple[Row, ...]:
        """What the target's forward and the optimizer's step take of the device, beyond what a draft step's rows count, and
        on the CPU what the last checkpoint is written from."""
        muon = self.muon_cost(layout).num_bytes
        if self.device == "cuda":
            return Row("target's activations", activations), Row("Muon's directions and temporaries", muon)
        short_lived = sum(row.size for row in draft_step if row.short_lived)
        most = max(activations, 8 * self.share(layout), muon)
        return Row("target's or optimizer's temporaries, beyond a step's", max(0, most - short_lived)), *self.copies(layout)

    def memory(self, target: TargetSizes, layout: Layout = ALONE, stored: bool = False) -> tuple[Row, ...]:
        """Bytes on the device of one process of a layout at the peak, the draft step's own last. `stored`: features are
        read from a store or come from servers, and only the target's embedding and head are loaded."""
        draft, tokens, b, of_target = self.draft, self.pack_tokens, self.itemsize, self.target_dtype.itemsize
        s, holders, replicas = layout.sequence, layout.holders, layout.replicas
        own = PackShare(tokens, size=s).full_rows
        step, _ = self.step_cost(layout)
        share, frozen = self.share(layout), draft.num_parameters()["embedding"]
        trained = self.part(layout)

        # A target whose documents share processes runs the pack at once, another one so many tokens at a time.
        running = own if s > 1 else min(tokens, max(self.run_tokens, min(self.document_tokens, tokens)))
        width = 6 * target.hidden_size + target.attention_width + 3 * target.mlp_width
        activations = 0 if stored else running * width * of_target
        if stored:
            ends = 2 * draft.vocab_size * draft.target_hidden_size
            held = [Row("target's embedding and head", ends * of_target)]
        elif holders == 1:
            held = [Row("target weights", target.total * of_target)]
        else:
            held = [
                Row("target's embedding, head and norms", target.outside * of_target),
                Row(f"target's layers, 1/{holders}", -(-target.layers // holders) * of_target),
                Row(f"{GATHERED} layers of the target whole", GATHERED * target.largest_layer * of_target),
            ]

        # Alone, fp32 masters are the weights. What a process of several sends and gets is its slice of the gradient and,
        # where they are no masters, of the weights. Whoever shares a stored pack reads all of it and keeps what is its own.
        own_weights = b < 4 or replicas > 1
        weights = Row(
            f"draft weights ({'fp32' if b == 4 else 'bf16'})" if own_weights else "draft's frozen embedding",
            (own_weights * trained + frozen) * b + map_bytes(draft),
        )
        slices = (4 + (b if b < 4 else 0)) * share if replicas > 1 else 0
        of_several = f", 1/{replicas}" if replicas > 1 else ""
        rows = (
            *held,
            weights,
            Row(f"fp32 master weights{of_several}", 4 * share),
            Row(f"fp32 moments (two){of_several}", 8 * share),
            Row("fp32 gradient", 4 * trained),
            Row("slices of gradient and weights, on their way", slices),
            *self.outside_steps(step, activations, layout),
            Row("features g and f", self.feature_bytes(own + (tokens if stored and s > 1 else 0))),
            *step,
        )
        return tuple(row for row in rows if row.size)

    @property
    def frozen_bytes(self) -> int:
        """Of what a checkpoint holds beside masters and moments: the map of the vocabulary, and an embedding of its own."""
        own_embedding = self.draft.hidden_size != self.draft.target_hidden_size
        return map_bytes(self.draft) + (self.draft.num_parameters()["embedding"] * self.itemsize if own_embedding else 0)

    def copies(self, layout: Layout) -> tuple[Row, ...]:
        pinned = self.device == "cuda"
        return checkpoint_copies(self.trainable, self.frozen_bytes, layout.replicas, layout.tensor, pinned)


def plan(
    training: Training,
    target: TargetSizes,
    layout: Layout = ALONE,
    *,
    keep: int = 2,  # latest checkpoints kept, besides the best one
    stored: bool = False,  # features are read from a store or come from servers: only embedding and head are loaded
    export_dtype: torch.dtype | None = None,  # None: the target's
    cache_bytes: int = 0,  # of disk that a cache of features may fill
) -> Plan:
    """Predicted needs of a run, for what `Config` allows. ValueError for fp8 on a CPU, where no run is."""
    draft, trainable = training.draft, training.trainable
    if training.precision == "fp8" and training.device == "cpu":
        raise ValueError(
            "precision: fp8 is for GPUs, a run on the CPU refuses it; set precision=bf16, or plan for device=cuda"
        )
    frozen, maps = draft.num_parameters()["embedding"], map_bytes(draft)
    checkpoint = 12 * trainable + training.frozen_bytes  # fp32 master, two moments
    served = (export_dtype or training.target_dtype).itemsize
    export = trainable * served + maps
    if draft.hidden_size != draft.target_hidden_size:
        export += frozen * served
    if maps and draft.draft_vocab_size == draft.vocab_size:
        export -= 8 * draft.draft_vocab_size  # the full vocabulary ships without d2t
    disk = (
        Row(f"checkpoints ({keep} latest and the best)", (keep + 1) * checkpoint),
        Row("one more while it is written", checkpoint),
        Row("export", export),
        *([Row("cache of features, at most", cache_bytes)] if cache_bytes else []),
    )
    _, flops = training.step_cost()
    if not stored:
        named = "target forward"
        if target.idle != 0:
            named += ", of the experts those chosen" if target.idle else ", every expert counted"
        flops = (Row(named, 2 * target.used), *flops)
    host = training.copies(layout) if training.device == "cuda" else ()
    memory = training.memory(target, layout, stored)
    return Plan(trainable, frozen, target, memory, disk, flops, host)


def map_bytes(draft: BaseModel) -> int:
    """Of the vocabulary map: d2t int64, t2d bool."""
    return 8 * draft.draft_vocab_size + draft.vocab_size if method_of(draft).has_vocabulary_map else 0


def checkpoint_copies(trainable: int, frozen: int, replicas: int, tensor: int, pinned: bool) -> tuple[Row, ...]:
    """Bytes of the host's memory that rank 0 takes for writing checkpoints; the others have no copy of what is `frozen`
    (bytes) or, with `tensor`, of the weights. `pinned`: for a GPU, whose copies PyTorch gives page-locked memory in powers
    of two."""
    if tensor > 1:  # the weights are joined on the host, in ordinary memory, and copied from there
        return (
            Row("copy for writing checkpoints, of the whole draft", 12 * trainable + frozen),
            Row("the draft's joined weights, while they are copied", 12 * trainable),
        )
    flat = 4 * -(-trainable // replicas)
    if pinned:
        flat = 1 << max(0, flat - 1).bit_length()
    of_several = f", 1/{replicas}" if replicas > 1 else ""
    return (Row(f"copy for writing checkpoints{of_several}", 3 * flat + frozen),)


def render(plan: Plan, console: Console) -> None:
    """Prints parameter counts, memory, disk and FLOPs as tables."""
    console.print(
        f"parameters: draft {plan.trainable_params:,} trained + {plan.frozen_params:,} frozen embedding, "
        f"target {plan.target.total:,}"
    )
    console.print(size_table("Memory of one device", plan.memory))
    if plan.host:
        console.print(size_table("Memory of the host, for one device", plan.host))
    console.print(size_table("Disk", plan.disk))
    table = Table(title="Work", title_justify="left", show_footer=True)
    table.add_column("", footer="total")
    table.add_column("GFLOP/token", f"{plan.flops_per_token / 1e9:.3f}", justify="right")
    for row in plan.flops:
        table.add_row(row.name, f"{row.size / 1e9:.3f}")
    console.print(table)


def size_table(title: str, rows: tuple[Row, ...], total: str = "total") -> Table:
    """Rows of bytes in GiB, and what each is of their sum, which `total` names."""
    size = sum(row.size for row in rows)
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("", footer=total)
    table.add_column("GiB", f"{size / GIB:.3f}", justify="right")
    table.add_column("share", "", justify="right")
    for row in rows:
        table.add_row(row.name, f"{row.size / GIB:.3f}", f"{row.size / max(size, 1):.0%}")
    return table
