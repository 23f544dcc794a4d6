"""What a run on many GPUs needs: the memory of one GPU, and the time that its collectives take. Arithmetic only.

Memory: a sharded target leaves 1/n of its layers on each of the n processes that hold it, and what the draft reads of it
(embedding, head) whole; FSDP2 has up to GATHERED layers whole at a time. The draft's weights, gradient and step divide by
`tensor` where heads, MLP and vocabulary do; masters and moments lie on one process each; what is kept for a token divides
by `sequence`, except the keys and values of the pack's tokens, which every process has.

Time: a GPU computes at a fixed rate, and a collective of b bytes among n processes moves b (n - 1) / n (a sum of all
twice that) through each GPU's link, at the speed of links within a host if all n are there, else at that between hosts.
A target's layer is gathered while the layer before it computes, so only what takes longer than that counts; nothing else
is taken as hidden. Latency, the work of the host, and unequal work of the processes are not in it: shares are a lower
bound where messages are small.

# N tokens of a pack, S sequence, T tensor, H draft hidden, D head dim
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from fastdraft.cost import Training
from fastdraft.files import GIB
from fastdraft.model.method import Row

GATHERED = 3  # layers of a sharded target that are whole at a time: one runs, one arrives, one is copied out of its message
UNCOUNTED = 0.06  # share of a GPU that is left to the CUDA context, libraries' scratch and the allocator


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

    @property
    def total(self) -> int:
        return self.layers + self.outside


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
    def kept(self) -> str:
        """What a process keeps of the target's layers."""
        return "whole" if self.holders == 1 else f"1/{self.holders}"

    def __str__(self) -> str:
        return f"data {self.data}, sequence {self.sequence}, tensor {self.tensor}, target {self.kept}"


@dataclass(frozen=True)
class Hardware:
    """GPUs and their links. The defaults are an H100 host's, in what training reaches and not what is rated: of 989 TFLOP/s
    what the steps in bench/results/fleet.jsonl come to, and of NVLink what NCCL moves."""

    gpu_gib: float = 80.0
    tflops: float = 540.0  # 1e12 FLOPs a second that a GPU's matrix products reach
    host: int = 8  # GPUs in one host
    link: float = 360.0  # 1e9 bytes a second through one GPU's link to the others of its host
    host_link: float = 45.0  # the same between hosts

    def seconds(self, num_bytes: float, span: int) -> float:
        """Of a message through each GPU's link, among `span` processes that are consecutive in rank or reach so far."""
        return num_bytes / (1e9 * (self.link if span <= self.host else self.host_link))


class Collective(NamedTuple):
    name: str
    seconds: float  # an optimizer step
    exposed: float  # of them, those that nothing hides


@dataclass(frozen=True)
class FleetPlan:
    """Of one GPU; seconds are of an optimizer step."""

    layout: Layout
    memory: tuple[Row, ...]  # bytes at the peak
    target_s: float
    draft_s: float
    muon_s: float  # in which matrices are orthogonalised; the rest of an optimizer's step is not counted
    collectives: tuple[Collective, ...]
    tokens: float  # of an optimizer step, over all GPUs
    gpu_gib: float

    @property
    def memory_bytes(self) -> int:
        return sum(row.size for row in self.memory)

    @property
    def fits(self) -> bool:
        return self.memory_bytes <= (1 - UNCOUNTED) * self.gpu_gib * GIB

    @property
    def step_s(self) -> float:
        return self.target_s + self.draft_s + self.muon_s + sum(c.exposed for c in self.collectives)

    @property
    def exposed_share(self) -> float:
        """Of a step, the share in which a GPU waits for its links."""
        return sum(c.exposed for c in self.collectives) / self.step_s

    @property
    def tokens_per_s(self) -> float:
        """Of one GPU."""
        return self.tokens / self.layout.world / self.step_s


def fleet_plan(
    layout: Layout,
    hardware: Hardware,
    target: TargetSizes,
    training: Training,
    *,
    run_tokens: int,  # the target runs so many tokens at a time, or a longer document
    packs_per_step: int,
    sums: int,  # [M, H] sums over the tensor axis that a token's chain takes forward and backward
    stored: bool = False,  # features are read from a store or come from servers: only embedding and head are loaded
) -> FleetPlan:
    """What a layout needs. ValueError naming the setting where it does not divide what it is to divide."""
    refuse_uneven(layout, packs_per_step)
    if layout.sequence > 1 and target.apart is not None and not stored:
        raise ValueError(
            f"dist.sequence={layout.sequence}: processes cannot share a pack's tokens with this target, because "
            + target.apart
        )
    s, t, h = layout.sequence, layout.tensor, layout.holders
    draft, pack_tokens = training.draft, training.pack_tokens
    target_bytes, draft_bytes = training.target_dtype.itemsize, training.itemsize
    trainable, embedding = training.trainable / t, draft.num_parameters()["embedding"]
    replicas = layout.world // t
    own_tokens = pack_tokens if s == 1 else 2 * -(-pack_tokens // (2 * s))  # two slices, of which the last are filled up
    packs = packs_per_step / layout.data  # of one process
    muon = training.muon_cost(replicas, t)
    length = min(training.document_tokens, pack_tokens)

    # Memory. A target whose documents share processes runs the pack at once, another one `run_tokens` at a time.
    part = tensor_part(draft, t)
    step, _ = training.step_cost(part, own_tokens, t)
    running = own_tokens if s > 1 else min(pack_tokens, max(run_tokens, length))
    activations = running * (6 * target.hidden_size + target.attention_width + 3 * target.mlp_width) * target_bytes
    kv = 2 * part.num_key_value_heads * part.head_dim * getattr(part, "num_hidden_layers", 1)  # of all layers of the draft
    gathered_kv = kv * (pack_tokens - own_tokens) * (draft_bytes + 4)
    of_target = [
        Row("target's embedding, head and norms", target.outside * target_bytes),
        Row("target's layers" + (f", 1/{h}" if h > 1 else ""), -(-target.layers // h) * target_bytes),
        Row(f"{GATHERED} layers of the target whole", (GATHERED * target.largest_layer if h > 1 else 0) * target_bytes),
        Row("target's activations", activations),
    ]
    if stored:  # whoever shares a pack reads all of it, and keeps what is its own
        of_target = [Row("target's embedding and head", 2 * draft.vocab_size * draft.target_hidden_size * target_bytes)]
    read = pack_tokens if stored and s > 1 else 0
    memory = [
        *of_target,
        Row("draft's weights", int(trainable * draft_bytes if draft_bytes < 4 else 0) + embedding * draft_bytes),
        Row(f"fp32 masters and moments, 1/{replicas}", int(12 * trainable / replicas)),
        Row("fp32 gradient", int(4 * trainable)),
        *training.between_steps(step, int(trainable / replicas), replicas, t),
        Row("features g and f", training.feature_bytes(read + own_tokens)),
        Row("keys and values of the others' tokens, and gradients", gathered_kv),
        *step,
    ]

    # Work of one GPU in a step, and what its links move. Processes of a tensor axis run the target on the same tokens. Of a
    # pack that is shared a process has some tokens only, and each of them sees as much as in the whole pack.
    _, flops = training.step_cost(part, pack_tokens, t)
    tokens = packs * pack_tokens / s
    rate = hardware.tflops * 1e12
    attention = 2 * target.attention_width * length * target.num_layers  # two products over half the pairs
    target_s = 0.0 if stored else tokens * (2 * target.active + attention) / rate
    draft_s = tokens * sum(row.size for row in flops) / rate
    runs = 0 if stored else packs * (1 if s > 1 else math.ceil(pack_tokens / max(run_tokens, length)))
    muon_s = muon.flops / rate
    gather_s = hardware.seconds(runs * target.layers * target_bytes * _others(h), h)
    pack_kv = runs * target.num_layers * target.kv_width * pack_tokens * target_bytes * _others(s)
    draft_kv = packs * kv * pack_tokens * (draft_bytes + 4) * _others(s)
    chain_sums = tokens * sums * draft.hidden_size * draft_bytes * 2 * _others(t)
    collectives = [Collective("target's layers gathered", gather_s, max(0.0, gather_s - target_s))]
    for name, num_bytes, span in (
        ("gradient summed", 4 * trainable * _others(replicas), layout.world),
        ("draft's weights gathered", draft_bytes * trainable * _others(replicas), layout.world),
        ("Muon's directions gathered", draft_bytes * trainable * _others(replicas) if muon.flops else 0, layout.world),
        ("Muon's matrices joined and taken apart", muon.sent, t),
        ("target's keys and values gathered", pack_kv, s * t),
        ("draft's keys, values and their gradients", draft_kv, s * t),
        ("sums over the tensor axis", chain_sums, t),
    ):
        seconds = hardware.seconds(num_bytes, span)
        collectives.append(Collective(name, seconds, seconds))
    return FleetPlan(
        layout,
        tuple(row for row in memory if row.size),
        target_s,
        draft_s,
        muon_s,
        tuple(c for c in collectives if c.seconds),
        packs_per_step * pack_tokens,
        hardware.gpu_gib,
    )


def _others(n: int) -> float:
    """Of a message among n processes, the share that comes from the others."""
    return (n - 1) / n


def tensor_part(draft: BaseModel, n: int) -> BaseModel:
    """The shape of what one of n processes of the tensor axis computes; the shape itself alone."""
    names = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "draft_vocab_size", "vocab_size")
    return draft if n == 1 else draft.model_copy(update={k: -(-getattr(draft, k) // n) for k in names if hasattr(draft, k)})


def refuse_uneven(layout: Layout, packs_per_step: int) -> None:
    """ValueError where a layout does not divide processes or packs; a draft's parts are its method's to check."""
    s, t, world = layout.sequence, layout.tensor, layout.world
    if world % (s * t):
        raise ValueError(f"dist.sequence={s} and dist.tensor={t} need a multiple of {s * t} processes, not {world}")
    if packs_per_step % layout.data:
        raise ValueError(
            f"optim.packs_per_step={packs_per_step} is not a multiple of the {layout.data} groups of processes that have "
            f"packs of their own ({world} processes, dist.sequence={s}, dist.tensor={t}); set it to {layout.data} or a "
            "multiple of that"
        )


def holder_choices(world: int, host: int) -> Iterator[int]:
    """How many processes may hold a target together: a host's, whose links are fast, then twice as many, ... all."""
    n = host if world % host == 0 else world
    while n < world:
        yield n
        n = 2 * n if world % (2 * n) == 0 else world
    if world > 1:
        yield world


def layouts(world: int, host: int) -> Iterator[Layout]:
    """Every layout that is worth a look: axes in powers of two that stay within a host."""
    powers = [2**i for i in range(host.bit_length()) if 2**i <= host and world % 2**i == 0]
    for tensor in powers:
        for sequence in powers:
            if sequence * tensor <= host and world % (sequence * tensor) == 0:
                for holders in (1, *holder_choices(world, host)):
                    yield Layout(world, sequence, tensor, holders)


def render_fleet(chosen: FleetPlan, others: list[FleetPlan], hardware: Hardware, console: Console) -> None:
    """Prints one GPU's memory and time in the chosen layout, and the fastest of the others."""
    world = chosen.layout.world
    console.print(
        f"{world} GPUs of {hardware.gpu_gib:g} GiB at {hardware.tflops:g} TFLOP/s, {hardware.host} in a host; a GPU's link "
        f"moves {hardware.link:g} GB/s within a host and {hardware.host_link:g} GB/s between hosts",
        soft_wrap=True,
    )
    total = "total, which fits" if chosen.fits else "total, which does not fit"
    table = Table(title=f"Memory of one GPU: {chosen.layout}", title_justify="left", show_footer=True)
    table.add_column("", footer=f"{total} in {hardware.gpu_gib:g} GiB less {UNCOUNTED:.0%} that is not counted")
    table.add_column("GiB", f"{chosen.memory_bytes / GIB:.3f}", justify="right")
    for row in chosen.memory:
        table.add_row(row.name, f"{row.size / GIB:.3f}")
    console.print(table)
    table = Table(title="Time of an optimizer step on one GPU", title_justify="left", show_footer=True)
    table.add_column("", footer=f"total; {chosen.exposed_share:.1%} of it waits for links")
    table.add_column("s", f"{chosen.step_s:.3f}", justify="right")
    table.add_column("on its link, hidden or not", justify="right")
    table.add_row("target", f"{chosen.target_s:.3f}", "")
    table.add_row("draft", f"{chosen.draft_s:.3f}", "")
    if chosen.muon_s:
        table.add_row("Muon's matrices orthogonalised", f"{chosen.muon_s:.3f}", "")
    for c in chosen.collectives:
        table.add_row(c.name, f"{c.exposed:.3f}", f"{c.seconds:.3f}")
    console.print(table)
    fitting = sorted((p for p in others if p.fits), key=lambda p: -p.tokens_per_s)
    if not fitting:
        console.print(f"no layout of {world} GPUs fits; use more of them, or a smaller data.pack_tokens", soft_wrap=True)
        return
    table = Table(title=f"Layouts that fit, the fastest {min(len(fitting), 8)} of {len(fitting)}", title_justify="left")
    for name in ("sequence", "tensor", "target", "GiB", "tokens/s a GPU", "waits for links"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in fitting[:8]:
        axes = (str(p.layout.sequence), str(p.layout.tensor), p.layout.kept)
        table.add_row(*axes, f"{p.memory_bytes / GIB:.1f}", f"{p.tokens_per_s:,.0f}", f"{p.exposed_share:.1%}")
    console.print(table)
