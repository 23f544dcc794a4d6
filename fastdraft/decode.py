"""Speculative decoding in PyTorch: what a draft is worth when really used.

`generate` decodes one sequence, and `generate_batch` many at once: the same tokens, rounds and draws, in fewer forwards.
The loop is one; only the target's cache differs (`target/ragged.py`).

A round starts with tokens x_0 .. x_n, of which the target has run x_0 .. x_{n-1}; x_n is the root. The draft's method
proposes a chain or a tree of tokens behind it. The target runs the root and all of them in one forward, a tree under a mask
of its own, keeps a path of them, and adds one token.

Which tokens are kept leaves the target's distribution P exactly as it is:
    greedy              a child is kept when it is argmax P
    chain, drawn from Q kept with probability min(1, P/Q), else one token from max(P - Q, 0) / Z ends the round
                        (arXiv 2211.17192); P, Q after temperature, top_k and top_p, Q zero outside the draft vocabulary
    the same, by block  the chain is judged as a whole, so that a token which P likes makes up for one before it which it
                        likes less; on average never fewer are kept (`_block_chances`; arXiv 2403.10444)
    tree, argmax chain  the candidates are no random draws, so recursive rejection has point masses for Q: it keeps a child
                        with its share of the P that is left. That is: draw from P, go down when the token is a child

# B sequences, r rows, m drafted tokens, Ht target hidden, V / Vd target / draft vocabulary
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

from fastdraft.model.methods import method_of
from fastdraft.model.proposal import DecodeSettings, Proposals, draw_each, probabilities
from fastdraft.target.hf import ANY_SHAPE, Target
from fastdraft.target.ragged import RaggedCache, SingleCache

BATCH_SIZE = 64  # prompts decoded at once
BATCH_TOKENS = 65536  # of their prompts, padding included: what the target's states take is bounded so


@dataclass(frozen=True)
class DecodeResult:
    """One generation. A round is one verifying target forward; the prefill, which gives the first token, is none."""

    tokens: list[int]  # generated, the stop token included
    stopped_by: str  # "eos", "length" (max_new_tokens) or "context"
    num_rounds: int  # 0 without a draft
    drafted: tuple[int, ...]  # [num_steps] rounds that drafted to this depth
    accepted: tuple[int, ...]  # [num_steps] rounds that kept a drafted token at this depth
    per_round: tuple[int, ...]  # tokens of each round, in order; the prefill's token comes before them
    # Wall clock, prefill included. Of sequences that were decoded together each has its share, so a sum is what they took.
    seconds: float


@dataclass(frozen=True)
class Difference:
    """The first token at which two greedy outputs part, and how nearly the target was undecided there."""

    index: int  # place in the output, from 0
    token: int
    plain_token: int
    logit_gap: float  # the target's logit of plain_token minus that of token, from one forward of the common prefix


def generate(
    target: Target,
    draft: nn.Module | None,  # None: the target alone, one token a forward, with the same cache, sampling and stops
    prompt: list[int],
    max_new_tokens: int,
    settings: DecodeSettings | None = None,
    follow: list[int] | None = None,
) -> DecodeResult:
    """Generates with the draft until a stop token, max_new_tokens or the target's context is full.

    `follow` is an output made elsewhere, an engine's: its tokens are taken for the target's choice, up to its last, and
    max_new_tokens is not read. What is counted is then free of near-ties that fall another way here. Greedy settings only.

    Raises ValueError when draft and target do not fit, or the prompt is empty, out of range or fills the context.
    """
    if follow is not None:
        max_new_tokens = len(follow)
        if settings is not None and settings.temperature > 0:
            raise ValueError(f"an output can only be followed greedily, not at temperature {settings.temperature}")
    return generate_batch(target, draft, [prompt], max_new_tokens, settings, None, follow)[0]


def generate_batch(
    target: Target,
    draft: nn.Module | None,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    settings: DecodeSettings | None = None,
    batch_size: int | None = BATCH_SIZE,  # None: one at a time, in transformers' own cache, which any target can be given
    follow: list[int] | None = None,  # as for `generate`, of the only prompt
) -> list[DecodeResult]:
    """What `generate` gives for each prompt, up to `batch_size` of them at a time; fewer where they are so long that they
    would have more than BATCH_TOKENS tokens, padding included. Those of like length run together.

    ValueError as in `generate`, and where the memory is too small. Whether the target may run several sequences together is
    for the caller to ask: `target.ragged.why_apart`.
    """
    settings = settings or DecodeSettings()
    refuse_undecodable(target, draft, prompts, max_new_tokens, settings, batch_size)
    groups: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
        if groups and len(groups[-1]) < (batch_size or 1) and (len(groups[-1]) + 1) * len(prompts[i]) <= BATCH_TOKENS:
            groups[-1].append(i)
        else:
            groups.append([i])
    results: dict[int, DecodeResult] = {}
    for group in groups:
        start = time.perf_counter()
        try:
            own = [prompts[i] for i in group]
            made = _decode_together(target, own, max_new_tokens, settings, draft, batch_size is None, follow)
        except torch.OutOfMemoryError as error:
            raise ValueError(f"out of memory with {len(group)} prompts at once: lower the batch size; {error}") from error
        seconds = (time.perf_counter() - start) / len(group)
        results |= {i: replace(result, seconds=seconds) for i, result in zip(group, made, strict=True)}
    return [results[i] for i in range(len(prompts))]


@torch.no_grad()
def first_difference(target: Target, prompt: list[int], tokens: list[int], plain: list[int]) -> Difference | None:
    """Where a greedy output leaves the target's own. In bf16 a near-tie may fall either way: the gap tells."""
    for index, (token, plain_token) in enumerate(zip(tokens, plain, strict=False)):
        if token != plain_token:
            ids = torch.tensor(prompt + plain[:index], device=target.device)
            logits = target.head.logits(target.forward(ids[None])[1][0, -1:])[0].float()
            return Difference(index, token, plain_token, float(logits[plain_token] - logits[token]))
    if len(tokens) != len(plain):
        raise ValueError(f"outputs of {len(tokens)} and {len(plain)} tokens agree as far as both go: their limits differed")
    return None


# --- limits and stops ----------------------------------------------------------------------------------------------------


def refuse_undecodable(
    target: Target,
    draft: nn.Module | None,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    settings: DecodeSettings,
    batch_size: int | None = BATCH_SIZE,
) -> None:
    """The ValueErrors of `generate_batch` but for the memory's, before anything is run."""
    if draft is not None:
        _check_fit(target, draft, settings)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least one prompt must be decoded at a time")
    for prompt in prompts:
        _limits(target, prompt, max_new_tokens)


def _limits(target: Target, prompt: list[int], max_new_tokens: int) -> tuple[int, int]:  # most new tokens, context
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; at least 1 is needed")
    if not prompt or not 0 <= min(prompt) <= max(prompt) < target.vocab_size:
        raise ValueError(
            f"a prompt needs token ids in 0..{target.vocab_size - 1}; this one has "
            + (f"ids from {min(prompt)} to {max(prompt)}" if prompt else "none")
        )
    context = getattr(target.config, "max_position_embeddings", None) or len(prompt) + max_new_tokens
    if len(prompt) >= context:
        raise ValueError(f"the prompt has {len(prompt)} tokens and fills the target's context of {context}; shorten it")
    return min(max_new_tokens, context - len(prompt)), context


def _check_fit(target: Target, draft: nn.Module, settings: DecodeSettings) -> None:
    c = draft.config
    ours = (c.vocab_size, c.target_hidden_size, c.layers)
    theirs = (target.vocab_size, target.hidden_size, target.layers)
    if ours != theirs:
        raise ValueError(f"the draft is for a target with (vocab_size, hidden_size, layers) {ours}; this one has {theirs}")
    method_of(draft).refuse_settings(c, settings)
    if settings.eagle_topk > c.draft_vocab_size:
        raise ValueError(f"eagle_topk {settings.eagle_topk} is more than the draft vocabulary of {c.draft_vocab_size}")
    window = getattr(target.config, "sliding_window", None)
    kinds = set(getattr(target.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"])
    if settings.eagle_topk > 1 and kinds != {"full_attention"}:
        raise ValueError(
            f"a tree's mask covers full attention only, and this target's layers are {sorted(kinds)}; use eagle_topk 1"
        )
    if not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(f"the target has layers of kinds {sorted(kinds)}: only attention can take rejected tokens back")


def _stopped(out: list[int], eos_ids: frozenset[int], limit: int, max_new_tokens: int) -> str | None:
    if out and out[-1] in eos_ids:
        return "eos"
    if len(out) >= limit:
        return "length" if limit == max_new_tokens else "context"
    return None


def _until_stop(tokens: list[int], eos_ids: frozenset[int]) -> list[int]:
    for place, token in enumerate(tokens):
        if token in eos_ids:
            return tokens[: place + 1]
    return tokens


# --- many sequences ------------------------------------------------------------------------------------------------------


@dataclass
class _Sequence:
    """One prompt of a batch, and what became of it so far."""

    place: int  # among the group's prompts
    num_prompt: int
    limit: int
    context: int
    generator: torch.Generator
    drafted: list[int]  # as in `DecodeResult`
    accepted: list[int]
    out: list[int] = field(default_factory=list)
    per_round: list[int] = field(default_factory=list)

    @property
    def root(self) -> int:
        return self.num_prompt + len(self.out) - 1

    def count_round(self, depth: int, kept: int, given: list[int]) -> None:
        """Of the target alone depth is 0, and nothing is a round."""
        self.out += given
        self.per_round += [len(given)] if depth else []
        for j in range(depth):
            self.drafted[j] += 1
            self.accepted[j] += kept > j

    def result(self, stopped_by: str) -> DecodeResult:
        drafted, accepted, per_round = tuple(self.drafted), tuple(self.accepted), tuple(self.per_round)
        return DecodeResult(self.out, stopped_by, len(per_round), drafted, accepted, per_round, 0.0)


def _sequence(target: Target, place: int, prompt: list[int], max_new_tokens: int, seed: int, steps: int) -> _Sequence:
    limit, context = _limits(target, prompt, max_new_tokens)
    generator = torch.Generator(target.device).manual_seed(_seed_of(seed, prompt))
    return _Sequence(place, len(prompt), limit, context, generator, [0] * steps, [0] * steps)


def _seed_of(seed: int, prompt: list[int]) -> int:
    """Every prompt draws numbers of its own, or a mean over prompts would have the noise of few, and those that it draws
    alone."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=8).digest(), "big")


@torch.no_grad()
@sdpa_kernel(ANY_SHAPE)
def _decode_together(
    target: Target,
    prompts: list[list[int]],
    max_new_tokens: int,
    settings: DecodeSettings,
    draft: nn.Module | None,
    single: bool,  # one prompt, in a `SingleCache`
    follow: list[int] | None,
) -> list[DecodeResult]:
    """`generate` of all prompts. A sequence that ends leaves the batch, and its place is given up."""
    device, steps, nodes = target.device, 0, 0
    if draft is not None:
        steps, nodes = settings.num_steps, settings.num_verified - 1
    going = [_sequence(target, i, prompt, max_new_tokens, settings.seed, steps) for i, prompt in enumerate(prompts)]
    longest = max(s.num_prompt + s.limit for s in going)
    cache = SingleCache(target) if single else RaggedCache(target, len(prompts), longest + nodes + 1)
    counts = [len(prompt) for prompt in prompts]
    g, f = cache.prefill(prompts)
    first = _choose(target.head.logits(f)[:, None], settings, [s.generator for s in going], [1] * len(going))
    if follow is not None:
        first = first.new_tensor([follow[:1]])
    for s, token in zip(going, first[:, 0].tolist(), strict=True):
        s.out.append(token)
    known = torch.tensor([p[1:] + [s.out[0]] + [0] * (g.shape[1] - len(p)) for s, p in zip(going, prompts, strict=True)])
    drafter = None
    if draft is not None:
        room = longest + 2 * steps + steps * settings.eagle_topk  # fillers included
        drafter = method_of(draft).drafter(draft, target.head, len(prompts), room)

    results: dict[int, DecodeResult] = {}
    while True:
        ended = {s.place: why for s in going if (why := _stopped(s.out, target.eos_ids, s.limit, max_new_tokens))}
        results |= {s.place: s.result(ended[s.place]) for s in going if s.place in ended}
        rows = [row for row, s in enumerate(going) if s.place not in ended]
        if not rows:
            return [results[place] for place in range(len(prompts))]
        if len(rows) < len(going):
            going, counts = [going[row] for row in rows], [counts[row] for row in rows]
            known, g = known[rows], g[rows]
            cache.select(rows)
            if drafter is not None:
                drafter.select(rows)
        generators, roots = [s.generator for s in going], [s.root for s in going]
        depths = [min(steps, s.context - 1 - s.root) for s in going]
        if drafter is None:
            none = torch.empty(len(going), 0, dtype=torch.int64)
            proposal = Proposals(none, none, [0] * len(going))
        else:
            proposal = drafter.propose(known.to(device), g, counts, depths, settings, generators)
        root_tokens = torch.tensor([[s.out[-1]] for s in going], device=device)
        tokens = torch.cat([root_tokens, proposal.tokens.to(device)], 1)
        last_position = min(s.context for s in going) - 1
        g, f = cache.run(tokens, proposal.parents, roots, last_position)
        draft_ids = None if drafter is None else drafter.draft_ids
        choice = None if follow is None else _next_of(follow, len(going[0].out), proposal)
        paths, gained = _verify(target.head.logits(f), proposal, settings, generators, draft_ids, choice)
        counts, width = [len(path) for path in paths], max(map(len, paths))
        padded = torch.tensor([path + [0] * (width - len(path)) for path in paths])
        known = torch.tensor([given + [0] * (width - len(given)) for given in gained])
        cache.keep(roots, padded)
        g = g.gather(1, padded.to(device)[:, :, None].expand(-1, -1, g.shape[2]))
        for s, depth, path, given in zip(going, depths, paths, gained, strict=True):
            given = _until_stop(given, target.eos_ids)[: s.limit - len(s.out)]
            s.count_round(depth, len(path) - 1, given)


# --- verification --------------------------------------------------------------------------------------------------------


def _verify(
    logits: Tensor,  # [B, 1+m, V] the target's, root first
    proposal: Proposals,
    settings: DecodeSettings,
    generators: list[torch.Generator],
    draft_ids: Tensor | None,  # [Vd]; None: nothing was drafted
    choice: Tensor | None = None,  # [B, 1+m] int64 tokens to take for the target's; None: the target's own
) -> tuple[list[list[int]], list[list[int]]]:  # of each sequence the nodes kept (the root, then downwards), and the tokens
    # gained: theirs, then a new one
    if proposal.q is not None:
        return _reject(logits, proposal, settings, generators, draft_ids)
    if choice is None:
        choice = _choose(logits, settings, generators, [1 + count for count in proposal.counts])
    paths, gained = [], []
    for parents, tokens, chosen, count in zip(
        proposal.parents.tolist(), proposal.tokens.tolist(), choice.tolist(), proposal.counts, strict=True
    ):
        path = [0]
        for node in range(1, count + 1):  # parents come first and siblings differ: one pass goes down
            if parents[node - 1] == path[-1] and tokens[node - 1] == chosen[path[-1]]:
                path.append(node)
        paths.append(path)
        gained.append([chosen[node] for node in path])
    return paths, gained


def _next_of(follow: list[int], done: int, proposal: Proposals) -> Tensor:  # [1, 1+m] int64
    """The token after each node of a tree, if the node were on the output's way; its last token past its end."""
    depth = [0]
    for parent in proposal.parents[0].tolist():
        depth.append(depth[parent] + 1)
    return torch.tensor([[follow[min(done + d, len(follow) - 1)] for d in depth]])


def _reject(
    logits: Tensor,  # [B, m+1, V]
    proposal: Proposals,
    settings: DecodeSettings,
    generators: list[torch.Generator],
    draft_ids: Tensor,  # [Vd]
) -> tuple[list[list[int]], list[list[int]]]:
    """Speculative sampling down a chain: some of its first tokens stay, and one more is drawn."""
    p = probabilities(logits.flatten(0, 1), settings).unflatten(0, logits.shape[:2])
    (b, m), device = proposal.tokens.shape, p.device
    own = torch.arange(m, device=device) < torch.tensor(proposal.counts, device=device)[:, None]
    q = torch.zeros_like(p)  # 0 behind a sequence's last token: what is left after all were kept is p itself
    q[:, :m, draft_ids] = proposal.q.to(p.dtype) * own[:, :, None]
    draws = torch.zeros(b, m, dtype=p.dtype, device=device)
    for row, generator, count in zip(draws, generators, proposal.counts, strict=True):
        row[:count] = torch.rand(count, dtype=p.dtype, device=device, generator=generator)
    kept, rest = _keep(p, q, proposal.tokens, draws, settings)
    last = draw_each(rest[:, None], generators, [1] * b)[:, 0].tolist()
    tokens, kept = proposal.tokens.tolist(), kept.tolist()
    gained = [[*own_tokens[:k], token] for own_tokens, k, token in zip(tokens, kept, last, strict=True)]
    return [list(range(k + 1)) for k in kept], gained


def _keep(
    p: Tensor,  # [B, m+1, V]
    q: Tensor,  # [B, m+1, V], 0 in the rows behind a sequence's last token
    tokens: Tensor,  # [B, m] int64, drawn from q
    draws: Tensor,  # [B, m] uniform in [0, 1)
    settings: DecodeSettings,
) -> tuple[Tensor, Tensor]:  # [B] drafted tokens kept, and [B, V] what the next is drawn from, up to a factor
    p_drafted, q_drafted = (x[:, :-1].gather(2, tokens[:, :, None])[:, :, 0] for x in (p, q))
    if settings.verify == "token":  # the first to fall ends the chain
        stays = (draws * q_drafted < p_drafted) & (q_drafted > 0)
        kept, share = stays.long().cumprod(1).sum(1), p.new_ones(p.shape[:2])
    else:  # the last that stays takes all before it along
        chance, share = _block_chances(p, q, torch.where(q_drafted > 0, p_drafted / q_drafted, 0))
        kept = ((draws < chance).flip(1).cumsum(1) > 0).sum(1)
    rows = torch.arange(len(p), device=p.device)
    rest = (share[rows, kept, None] * p[rows, kept] - q[rows, kept]).clamp_min(0)
    # Where P = Q to the last bit nothing is left; a rejection can then only be rounding.
    return kept, torch.where(rest.sum(-1, keepdim=True) > 0, rest, p[rows, kept])


def _block_chances(
    p: Tensor,  # [B, m+1, V]
    q: Tensor,  # [B, m+1, V], 0 in the rows behind a sequence's last token
    ratio: Tensor,  # [B, m] P / Q of the drafted tokens, 0 behind a sequence's last
) -> tuple[Tensor, Tensor]:  # [B, m] the chance of each place to stay, and [B, m+1] s
    """Block verification of tokens y_1 .. y_m (arXiv 2403.10444, algorithm 2). With r_i = P(y_i) / Q(y_i)

        s_0 = 1,  s_i = min(1, s_{i-1} r_i),  R_i = sum over v of max(s_i P(v) - Q(v), 0), with P and Q of what follows y_i,

    place i stays with chance R_i / (R_i + 1 - s_i). The chain ends at the last place that stays, or at 0, and the token
    after it is drawn from max(s_i P - Q, 0). After y_m nothing is drafted: Q = 0 there, so that R_m = s_m is the chance of
    the whole chain.
    """
    shares = [torch.ones_like(p[:, 0, 0])]
    for own in ratio.unbind(1):
        shares.append((shares[-1] * own).clamp_max(1))
    s = torch.stack(shares, 1)
    left = (s[:, 1:, None] * p[:, 1:]).sub_(q[:, 1:]).clamp_min_(0).sum(-1)
    # With s = 1 nothing speaks against the place, also where P = Q leaves R = 0.
    return torch.where(s[:, 1:] < 1, left / (left + 1 - s[:, 1:]), 1), s


def _choose(
    logits: Tensor,  # [B, r, V]
    settings: DecodeSettings,
    generators: list[torch.Generator],
    counts: list[int],  # rows of each sequence that are no fillers
) -> Tensor:  # [B, r] int64
    if settings.temperature == 0:
        return logits.argmax(-1)
    p = probabilities(logits.flatten(0, 1), settings).unflatten(0, logits.shape[:2])
    return draw_each(p, generators, counts)
