"""What a training run will need before it starts: memory by category, disk, FLOPs per token. Arithmetic only, no tensors.

What a draft step itself takes is its method's to say (`model/eagle3/cost.py`).

On the CPU a run's peak may lie outside the step. AdamW there is plain PyTorch with two temporaries as long as the weights
(Muon's are of one matrix at a time, and its norm is taken in float64); what of it goes beyond a step's short-lived tensors
is counted.
From the first checkpoint on a process keeps a copy of what checkpoints hold, from which they are written while training
goes on (`checkpoint.py`). With a GPU it is the host's memory; nothing else of that is predicted.

Not counted: the target's own forward, a second g and f for a small draft's graphs (`model/eagle3/graph_engine.py`),
allocator slack, the CUDA context (0.5-1 GiB), Triton's and cuBLAS's scratch, a CPU library's own copies of bf16 weights.

# N tokens of a pack, L tokens of a document
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from fastdraft.files import GIB
from fastdraft.model.method import Precision, Row
from fastdraft.model.methods import method_of
from fastdraft.optim import Matrix, MuonCost, muon_cost

# Dense bf16 FLOP/s by what a GPU's name contains, from the maker's data sheets; the first that fits counts.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """None on a CPU, and for a GPU whose peak is not in the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


@dataclass(frozen=True)
class Plan:
    trainable_params: int
    frozen_params: int  # the draft's copy of the target's embedding
    target_params: int
    memory: tuple[Row, ...]  # bytes on one device at the peak of a step
    disk: tuple[Row, ...]  # bytes
    flops: tuple[Row, ...]  # forward and backward, per packed token
    host: tuple[Row, ...] = ()  # bytes of the host's memory for the process of a GPU; what it needs beside is not known

    @property
    def memory_bytes(self) -> int:
        return sum(row.size for row in self.memory)

    @property
    def disk_bytes(self) -> int:
        return sum(row.size for row in self.disk)

    @property
    def flops_per_token(self) -> int:
        return sum(row.size for row in self.flops)


@dataclass(frozen=True)
class Training:
    """What a run trains and how, wherever that is. `plan` says what it takes on one device, `dist/fleet.py` on one GPU of
    many that share it."""

    draft: BaseModel  # the draft's shape
    target_dtype: torch.dtype
    pack_tokens: int  # N
    document_tokens: int  # longest document L
    precision: Precision = "bf16"
    device: Literal["cuda", "cpu"] = "cuda"  # the fused step's attention: kernels, or the reference that keeps scores
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

    def step_cost(
        self,
        part: BaseModel,  # the shape of what one of `tensor` processes has
        tokens: int,  # of a pack, that this process has
        tensor: int = 1,
    ) -> tuple[tuple[Row, ...], tuple[Row, ...]]:  # bytes at the peak of a draft step, FLOPs per packed token
        return method_of(self.draft).step_cost(
            part,
            pack_tokens=tokens,
            document_tokens=min(self.document_tokens, tokens),
            precision=self.precision,
            target_dtype=self.target_dtype,
            device=self.device,
            tensor=tensor,
            **self.step,
        )

    def feature_bytes(self, tokens: int) -> int:
        """Of g and f: the states of the layers that are read, and of the last."""
        return (len(self.draft.layers) + 1) * self.draft.target_hidden_size * tokens * self.target_dtype.itemsize

    def muon_cost(self, replicas: int, tensor: int) -> MuonCost:
        return muon_cost(self.muon(tensor), self.itemsize, -(-self.trainable // tensor), replicas, tensor)

    def between_steps(self, draft_step: tuple[Row, ...], share: int, replicas: int, tensor: int) -> tuple[Row, ...]:
        """What an optimizer's step over masters of `share` weights takes of the device, beyond what a draft step's rows
        count, and on the CPU what the last checkpoint is written from."""
        muon = self.muon_cost(replicas, tensor).num_bytes
        if self.device == "cuda":
            return (Row("Muon's directions and temporaries", muon),) if muon else ()
        short_lived = sum(row.size for row in draft_step if row.short_lived)
        update = max(0, max(8 * share, muon) - short_lived)
        return Row("the optimizer's temporaries, beyond a step's", update), *self.checkpoint_copies(replicas, tensor)

    @property
    def frozen_bytes(self) -> int:
        """Of what a checkpoint holds beside masters and moments: the map of the vocabulary, and an embedding of its own."""
        own_embedding = self.draft.hidden_size != self.draft.target_hidden_size
        return map_bytes(self.draft) + (self.draft.num_parameters()["embedding"] * self.itemsize if own_embedding else 0)

    def checkpoint_copies(self, replicas: int, tensor: int) -> tuple[Row, ...]:
        return checkpoint_copies(self.trainable, self.frozen_bytes, replicas, tensor, pinned=self.device == "cuda")


def plan(
    training: Training,
    *,
    target_params: int,
    keep: int = 2,  # latest checkpoints kept, besides the best one
    stored: bool = False,  # features are read from a store or come from servers: only embedding and head are loaded
    export_dtype: torch.dtype | None = None,  # None: the target's
    cache_bytes: int = 0,  # of disk that a cache of features may fill
    replicas: int = 1,  # processes that divide masters and moments among themselves (dist/shard.py)
    tensor: int = 1,  # processes that share the draft's weights
) -> Plan:
    """Predicted needs of a run on one device, for what `Config` allows. ValueError for fp8 on a CPU, where no run is."""
    draft, target_dtype, b = training.draft, training.target_dtype, training.itemsize
    if training.precision == "fp8" and training.device == "cpu":
        raise ValueError(
            "precision: fp8 is for GPUs, a run on the CPU refuses it; set precision=bf16, or plan for device=cuda"
        )
    trainable, frozen = training.trainable, draft.num_parameters()["embedding"]
    maps, compute = map_bytes(draft), "fp32" if b == 4 else "bf16"
    draft_step, work = training.step_cost(draft, training.pack_tokens)
    checkpoint = 12 * trainable + training.frozen_bytes  # fp32 master, two moments
    share = -(-trainable // replicas)
    shares_masters = replicas > 1
    weights = trainable + frozen if b < 4 or shares_masters else frozen  # alone, fp32 masters are the weights
    # What a process sends and gets is its slice of the gradient and, where they are no masters, of the weights.
    slices = (4 + (b if b < 4 else 0)) * share if shares_masters else 0
    of_several = f", 1/{replicas}" if shares_masters else ""
    memory = (
        Row("target's embedding and head", 2 * draft.vocab_size * draft.target_hidden_size * target_dtype.itemsize)
        if stored
        else Row("target weights", target_params * target_dtype.itemsize),
        Row("draft's frozen embedding" if weights == frozen else f"draft weights ({compute})", weights * b + maps),
        Row(f"fp32 master weights{of_several}", 4 * share),
        Row(f"fp32 moments (two){of_several}", 8 * share),
        Row("fp32 gradient", 4 * trainable),
        *([Row("slices of gradient and weights, on their way", slices)] if slices else []),
        *training.between_steps(draft_step, share, replicas, tensor),
        Row("features g and f of a pack", training.feature_bytes(training.pack_tokens)),
        *draft_step,
    )
    served = (export_dtype or target_dtype).itemsize
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
    flops = work if stored else (Row("target forward (every parameter active)", 2 * target_params), *work)
    host = training.checkpoint_copies(replicas, tensor) if training.device == "cuda" else ()
    return Plan(trainable, frozen, target_params, memory, disk, flops, host)


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
        f"target {plan.target_params:,}"
    )
    of_host = [("Memory of the host, for one device", plan.host, sum(row.size for row in plan.host))] if plan.host else []
    for title, rows, total in (
        ("Memory of one device", plan.memory, plan.memory_bytes),
        *of_host,
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
