"""What a draft is worth: acceptance simulated on held-out documents, and measured by real speculative decoding.

tau_sim = 1 + sum_i prod_{j<=i} alpha_j from mean acceptance alpha_j of TTT step j (sampled decoding at temperature 1);
greedy_tau is the same from the top-1 hit rates. Sums run in float64, so neither packing nor ranks change a result.

# N packed tokens, T TTT steps, B position buckets
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastdraft.batch import Batch, Rows, tau_sim
from fastdraft.decode import BATCH_SIZE, DecodeResult, Difference, first_difference, generate, generate_batch
from fastdraft.dist import mesh
from fastdraft.model.proposal import DecodeSettings
from fastdraft.target.hf import Target
from fastdraft.target.ragged import why_apart

A, R = TypeVar("A"), TypeVar("R")
POSITION_EDGES = (0, 128, 512, 2048, 8192, 32768, 131072)


@dataclass(frozen=True)
class StepMeans:
    """Means of each TTT step over some rows; None where a step had no row to average."""

    acceptance: list[float | None]  # [T] mean over live rows
    top1: list[float | None]  # [T] share of hits among rows that loss_mask and document allow
    loss: list[float | None]  # [T] mean over live rows, no step weight
    num_live: list[int]  # [T]
    tau_sim: float  # over the steps before the first that had no live row
    greedy_tau: float  # likewise, from top1


@dataclass(frozen=True)
class PositionBucket:
    start: int  # first position in the document
    end: int | None  # one past the last; None: to the end
    means: StepMeans


@dataclass(frozen=True)
class TauReport:
    """`asdict` gives what JSON can hold. Buckets without any live row are left out."""

    overall: StepMeans
    by_position: list[PositionBucket]


@torch.no_grad()
def evaluate_tau(
    step_rows: Callable[[Batch], Rows],
    batches: Iterable[Batch],
    ttt_length: int,
    position_edges: Sequence[int] = POSITION_EDGES,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> TauReport:
    """Acceptance, top-1 and loss of every TTT step over all batches, whole and by the row's position in its document.

    `reduce` adds up ranks that hold parts of the set: it gets and gives a float64 tensor [5, T, B] on the CPU, and is
    called once on every rank, also one without batches. Raises ValueError when the edges do not ascend from 0 or no rank
    has a live row.
    """
    edges = list(position_edges)
    if edges[:1] != [0] or edges != sorted(set(edges)):
        raise ValueError(f"position_edges {edges} must ascend from 0")
    sums = torch.zeros(5, ttt_length, len(edges), dtype=torch.float64)
    for batch in batches:
        rows = step_rows(batch)
        if rows.live.shape != (ttt_length, batch.num_tokens):
            raise ValueError(f"rows are {tuple(rows.live.shape)}, not [{ttt_length} steps, {batch.num_tokens} tokens]")
        each = torch.stack([x.double() for x in (rows.loss, rows.acceptance, rows.hit, rows.live, rows.masked_in)])
        bucket = torch.bucketize(batch.positions, torch.tensor(edges[1:]), right=True)
        sums = sums.to(each.device).index_add_(2, bucket.to(each.device), each)
    sums = sums.cpu()
    if reduce is not None:
        sums = reduce(sums)
    if not bool(sums[3].any()):
        raise ValueError(
            "no live row in the evaluation set: every document is shorter than 3 tokens, masked throughout, or has no "
            "token of the draft vocabulary as the target's choice; give it documents with trained tokens"
        )
    ends = [*edges[1:], None]
    buckets = [
        PositionBucket(start, end, _means(sums[..., b]))
        for b, (start, end) in enumerate(zip(edges, ends, strict=True))
        if bool(sums[3, :, b].any())
    ]
    return TauReport(_means(sums.sum(-1)), buckets)


def _means(
    sums: Tensor,  # [5, T] float64: loss, acceptance, hits, live, masked_in
) -> StepMeans:
    loss, acceptance, hits, live, masked_in = sums
    alpha, top1 = _ratio(acceptance, live), _ratio(hits, masked_in)
    return StepMeans(alpha, top1, _ratio(loss, live), [int(n) for n in live.tolist()], _tau(alpha), _tau(top1))


def _ratio(total: Tensor, count: Tensor) -> list[float | None]:
    return [t / n if n else None for t, n in zip(total.tolist(), count.tolist(), strict=True)]


def _tau(rates: list[float | None]) -> float:
    known = rates[: rates.index(None)] if None in rates else rates
    return tau_sim(torch.tensor(known, dtype=torch.float64))


@dataclass(frozen=True)
class DecodeReport:
    """`asdict` gives what JSON can hold. Lengths and rates are totals over all prompts divided once."""

    settings: DecodeSettings
    num_prompts: int
    num_tokens: int
    num_rounds: int
    # tokens a verifying forward gave, its own (bonus) token included, the prefill's left out: 1 without any acceptance;
    # vLLM's "mean acceptance length", but that of an output's last round only the tokens before the stop count
    accepted_length: float
    spec_accept_length: float  # SGLang's: all completion tokens / rounds, the prefill's in the numerator too
    step_acceptance: list[float]  # [num_steps] share of rounds that kept a drafted token at this depth
    tokens_per_s: float  # prefill's time included; of all sequences that are decoded together
    plain_tokens_per_s: float  # the target alone
    batch_size: int  # the most sequences that may be decoded together, no more than there are
    one_at_a_time: str | None  # why each was decoded alone, where more together were asked for
    num_equal: int | None  # prompts with exactly the target's own output; None when sampled
    first_difference: Difference | None  # in the first prompt that differs
    first_difference_prompt: int | None  # its index
    largest_logit_gap: float | None  # of all prompts that differ, the target's |gap| where they part: a near-tie or a bug


def evaluate_decode(
    target: Target,
    draft: nn.Module,
    prompts: Sequence[list[int]],
    settings: DecodeSettings,
    max_new_tokens: int,
    plain: Sequence[DecodeResult] | None = None,
    batch_size: int = BATCH_SIZE,
) -> DecodeReport:
    """Decodes every prompt with and without the draft. `plain`: `generate` of the same without the draft, if made.

    Up to `batch_size` prompts are decoded at once: each has the tokens and rounds that it has alone, up to rounding. A
    target or method that cannot do so decodes them one at a time, and the report says why. Several processes share the
    prompts, and each has the report of all; speeds are those of one process.

    Raises ValueError when there is no prompt, none needs a second token, or prompt and draft do not fit the target.
    """
    if not prompts:
        raise ValueError("no prompts to decode; give at least one")
    if plain is not None and len(plain) != len(prompts):
        raise ValueError(f"{len(plain)} plain results were given for {len(prompts)} prompts")
    generate(target, draft, prompts[0], 2, settings)  # warm: neither side's clock pays for first calls
    reason = why_apart(target) if min(batch_size, len(prompts)) > 1 else None
    size = min(batch_size, len(prompts)) if reason is None else min(1, batch_size)
    target.meet()

    def decode(own: Sequence[list[int]], draft: nn.Module | None) -> list[DecodeResult]:
        return generate_batch(target, draft, own, max_new_tokens, settings, None if size == 1 else size)

    plain = plain or _shared(target, lambda own: decode(own, None), prompts)
    results = _shared(target, lambda own: decode(own, draft), prompts)
    rounds = sum(r.num_rounds for r in results)
    if not rounds:
        raise ValueError("the target ends every output at its first token: no draft was ever verified; use other prompts")
    num_tokens = sum(len(r.tokens) for r in results)
    drafted, accepted = (torch.tensor([getattr(r, name) for r in results]).sum(0) for name in ("drafted", "accepted"))

    different: dict[int, Difference] = {}
    if settings.temperature == 0:
        found = _shared(
            target,
            lambda own: [first_difference(target, prompts[i], results[i].tokens, plain[i].tokens) for i in own],
            range(len(prompts)),
        )
        different = {index: difference for index, difference in enumerate(found) if difference}
    return DecodeReport(
        settings=settings,
        num_prompts=len(prompts),
        num_tokens=num_tokens,
        num_rounds=rounds,
        accepted_length=(num_tokens - len(results)) / rounds,
        spec_accept_length=num_tokens / rounds,
        step_acceptance=(accepted / drafted.clamp_min(1)).tolist(),
        tokens_per_s=num_tokens / sum(r.seconds for r in results),
        plain_tokens_per_s=sum(len(p.tokens) for p in plain) / sum(p.seconds for p in plain),
        batch_size=size,
        one_at_a_time=reason,
        num_equal=len(prompts) - len(different) if settings.temperature == 0 else None,
        first_difference=next(iter(different.values()), None),
        first_difference_prompt=next(iter(different), None),
        largest_logit_gap=max((abs(d.logit_gap) for d in different.values()), default=None),
    )


def _shared(target: Target, act: Callable[[Sequence[A]], list[R]], things: Sequence[A]) -> list[R]:
    """act(things), of which each process makes its share."""
    rank, world = mesh.rank(), mesh.world()
    own = act(things[rank::world]) if len(things) > rank else []
    target.meet()
    parts = mesh.from_all(own)
    return [parts[i % world][i // world] for i in range(len(things))]
