"""How long a step takes on many GPUs, what of it their collectives are, and which layouts fit. Arithmetic only.

What a layout takes of memory is `cost.py`'s to say. A GPU computes at a fixed rate, and a collective of b bytes among n
processes moves b (n - 1) / n (a sum of all twice that) through each GPU's link, at the speed of links within a host if all
n are there, else at that between hosts. A target's layer is gathered while the layer before it computes, so only what takes
longer than that counts; nothing else is taken as hidden. Latency, the work of the host, and unequal work of the processes
are not in it: shares are a lower bound where messages are small.

# N tokens of a pack, S sequence, T tensor, H draft hidden, D head dim
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fastdraft.cost import Layout, TargetSizes, Training, size_table, tensor_part
from fastdraft.files import GIB
from fastdraft.model.method import Row

UNCOUNTED = 0.06  # share of a GPU that is left to the CUDA context, libraries' scratch and the allocator


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
        return fits(self.memory, self.gpu_gib)

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
    packs_per_step: int,
    sums: int,  # [M, H] sums over the tensor axis that a token's chain takes forward and backward
    stored: bool = False,  # features are read from a store or come from servers: only embedding and head are loaded
) -> FleetPlan:
    """What a layout needs that `refuse_uneven` lets through."""
    s, t, h = layout.sequence, layout.tensor, layout.holders
    draft, pack_tokens = training.draft, training.pack_tokens
    target_bytes, draft_bytes, trained = training.target_dtype.itemsize, training.itemsize, training.trainable / t
    packs = packs_per_step / layout.data  # of one process
    length = min(training.document_tokens, pack_tokens)

    # Work of one GPU in a step. Processes of a tensor axis run the target on the same tokens. Of a pack that is shared a
    # process has some tokens only, and each of them sees as much as in the whole pack.
    _, flops = training.step_cost(layout)
    muon = training.muon_cost(layout)
    tokens = packs * pack_tokens / s
    rate = hardware.tflops * 1e12
    attention = 2 * target.attention_width * length * target.num_layers  # two products over half the pairs
    target_s = 0.0 if stored else tokens * (2 * target.active + attention) / rate

    # What its links move.
    runs = 0 if stored else packs * (1 if s > 1 else math.ceil(pack_tokens / max(training.run_tokens, length)))
    gather_s = hardware.seconds(runs * target.layers * target_bytes * _others(h), h)
    part = tensor_part(draft, t)
    kv = 2 * part.num_key_value_heads * part.head_dim * getattr(part, "num_hidden_layers", 1)  # of all layers of the draft
    pack_kv = runs * target.num_layers * target.kv_width * pack_tokens * target_bytes * _others(s)
    draft_kv = packs * kv * pack_tokens * (draft_bytes + 4) * _others(s)
    chain_sums = tokens * sums * draft.hidden_size * draft_bytes * 2 * _others(t)
    others = _others(layout.replicas)
    collectives = [Collective("target's layers gathered", gather_s, max(0.0, gather_s - target_s))]
    for name, num_bytes, span in (
        ("gradient summed", 4 * trained * others, layout.world),
        ("draft's weights gathered", draft_bytes * trained * others, layout.world),
        ("Muon's directions gathered", draft_bytes * trained * others if muon.flops else 0, layout.world),
        ("Muon's matrices joined and taken apart", muon.sent, t),
        ("target's keys and values gathered", pack_kv, s * t),
        ("draft's keys, values and their gradients", draft_kv, s * t),
        ("sums over the tensor axis", chain_sums, t),
    ):
        seconds = hardware.seconds(num_bytes, span)
        collectives.append(Collective(name, seconds, seconds))
    return FleetPlan(
        layout,
        training.memory(target, layout, stored),
        target_s,
        tokens * sum(row.size for row in flops) / rate,
        muon.flops / rate,
        tuple(c for c in collectives if c.seconds),
        packs_per_step * pack_tokens,
        hardware.gpu_gib,
    )


def fits(memory: Iterable[Row], gpu_gib: float) -> bool:
    return sum(row.size for row in memory) <= (1 - UNCOUNTED) * gpu_gib * GIB


def _others(n: int) -> float:
    """Of a message among n processes, the share that comes from the others."""
    return (n - 1) / n


def refuse_uneven(layout: Layout, packs_per_step: int, apart: str | None) -> None:
    """ValueError where a layout does not divide processes or packs, or the target's documents (`apart`: why not); a draft's
    parts are its method's to check."""
    s, t, world = layout.sequence, layout.tensor, layout.world
    if world % (s * t):
        raise ValueError(f"dist.sequence={s} and dist.tensor={t} need a multiple of {s * t} processes, not {world}")
    if packs_per_step % layout.data:
        raise ValueError(
            f"optim.packs_per_step={packs_per_step} is not a multiple of the {layout.data} groups of processes that have "
            f"packs of their own ({world} processes, dist.sequence={s}, dist.tensor={t}); set it to {layout.data} or a "
            "multiple of that"
        )
    if s > 1 and apart is not None:
        raise ValueError(f"dist.sequence={s}: processes cannot share a pack's tokens with this target, because {apart}")


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
    gpus = "1 GPU" if chosen.layout.world == 1 else f"{chosen.layout.world} GPUs"
    console.print(
        f"{gpus} of {hardware.gpu_gib:.4g} GiB at {hardware.tflops:g} TFLOP/s, {hardware.host} in a host; a GPU's link "
        f"moves {hardware.link:g} GB/s within a host and {hardware.host_link:g} GB/s between hosts",
        soft_wrap=True,
    )
    total = "total, which fits" if chosen.fits else "total, which does not fit"
    total += f" in {hardware.gpu_gib:.4g} GiB less {UNCOUNTED:.0%} that is not counted"
    console.print(size_table(f"Memory of one GPU: {chosen.layout}", chosen.memory, total))
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
        console.print(f"no layout of {gpus} fits; use more of them, or a smaller data.pack_tokens", soft_wrap=True)
        return
    table = Table(title=f"Layouts that fit, the fastest {min(len(fitting), 8)} of {len(fitting)}", title_justify="left")
    for name in ("sequence", "tensor", "target", "GiB", "tokens/s a GPU", "waits for links"):
        table.add_column(name, justify="right", no_wrap=True)
    for p in fitting[:8]:
        axes = (str(p.layout.sequence), str(p.layout.tensor), p.layout.kept)
        table.add_row(*axes, f"{p.memory_bytes / GIB:.1f}", f"{p.tokens_per_s:,.0f}", f"{p.exposed_share:.1%}")
    console.print(table)
