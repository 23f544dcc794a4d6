"""What an engine drafted beside what fastdraft drafts from the same checkpoint, and which reading explains a difference.

The engine's output is given, so nothing is generated here: the target runs prompt and output once, and the draft's chains
or blocks start at every position of it at once. With x the tokens, t a position and c^i_t the token that stands at depth i
of what is drafted from t:

    parity          c = the engine's proposals where it made them: is each the draft's own choice at that place?
    acceptance      c^i_t = x_{t+2+i}, the output itself: a round from t keeps the leading steps whose choice is c. Greedy
                    rounds follow from that alone, so the accepted length of any reading is known without decoding again

A `Reading` is one way to understand a checkpoint: the documented one, or that with one fault. If the engine's proposals are
another reading's, the engine reads the checkpoint so; if another reading would be accepted more, it was trained so.

# L tokens of prompt and output, S draft steps, Ht target hidden
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastdraft.model.methods import method_of
from fastdraft.model.reading import Reading, read_as
from fastdraft.serving.engines import Output
from fastdraft.target.hf import Target

# a token may be another than ours where its logit is this near to the best, as a share of the largest logit
NEAR_TIE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
SAME_ROUNDS = 0.03  # relative difference in verifying rounds that near-ties may make


@dataclass(frozen=True)
class Evidence:
    """How one reading fits what an engine did, added up over all outputs."""

    reading: Reading
    num_proposed: int  # tokens the engine proposed and showed
    num_equal: int  # of them, those that are this reading's choice
    num_near: int  # others whose logit is a near-tie
    num_tokens: int  # output tokens, the first of each output left out
    rounds: tuple[int, ...]  # verifying rounds of each output if the draft ran so
    lengths: Tensor  # [positions] float64, accepted length of a round from every place of the outputs

    @property
    def accepted_length(self) -> float:
        """As `DecodeReport.accepted_length`: tokens a verifying forward, the prefill's left out."""
        return self.num_tokens / max(sum(self.rounds), 1)

    @property
    def agreement(self) -> float:
        return (self.num_equal + self.num_near) / max(self.num_proposed, 1)

    @property
    def num_missed(self) -> int:
        return self.num_proposed - self.num_equal


@dataclass(frozen=True)
class TargetEvidence:
    """Output tokens against the target's own choice for the same tokens before them."""

    num_tokens: int
    num_equal: int
    num_near: int

    @property
    def agreement(self) -> float:
        return (self.num_equal + self.num_near) / max(self.num_tokens, 1)


class Parity:
    """The target's states of every prompt with its output, captured once per choice of layers."""

    def __init__(
        self, target: Target, draft: nn.Module, prompts: Sequence[list[int]], outputs: Sequence[Output], num_steps: int
    ):
        self.readings = method_of(draft).readings
        self.target, self.draft, self.outputs, self.num_steps = target, draft, outputs, num_steps
        self.prompts = [len(p) for p in prompts]
        self.ids = [torch.tensor(p + o.tokens, device=target.device) for p, o in zip(prompts, outputs, strict=True)]
        self._states: dict[tuple[int, ...], list[Tensor]] = {}

    def states(self, layers: tuple[int, ...]) -> list[Tensor]:  # [L, 3*Ht] each
        if layers not in self._states:
            target = self.target if layers == self.target.layers else Target(self.target.model, layers)
            self._states[layers] = [target.forward(ids[None])[0][0] for ids in self.ids]
        return self._states[layers]

    def target_evidence(self) -> TargetEvidence:
        equal = near = total = 0
        tie = NEAR_TIE[self.target.dtype]
        for ids, start in zip(self.ids, self.prompts, strict=True):
            with torch.no_grad():
                logits = self.target.head.logits(self.target.forward(ids[None])[1][0, start - 1 : -1]).float()
            best = logits.max(-1).values
            gap = (best - logits.gather(1, ids[start:, None])[:, 0]) / logits.abs().amax(-1)
            equal, total = equal + int((gap == 0).sum()), total + len(gap)
            near += int(((gap > 0) & (gap <= tie)).sum())
        return TargetEvidence(total, equal, near)

    def evidence(self, reading: Reading) -> Evidence:
        draft = read_as(self.draft, reading)
        tie = NEAR_TIE[draft.fc.weight.dtype]
        states = self.states(reading.layers or self.draft.config.layers)
        proposed = equal = near = tokens = 0
        rounds, lengths = [], []
        for ids, start, output, g in zip(self.ids, self.prompts, self.outputs, states, strict=True):
            hits = self._hits(draft, reading, ids, g)
            kept = hits.long().cumprod(1).sum(1)  # [L-1] leading hits of a round from t = root - 1
            root, count, last = start, 0, len(ids) - 1
            while root < last:
                root, count = root + int(kept[root - 1]) + 1, count + 1
            rounds.append(count)
            tokens += last - start
            lengths.append(1 + kept[start - 1 : last - 1].double())
            if output.rounds:
                roots = torch.tensor([start + r.after - 1 for r in output.rounds], device=ids.device)
                theirs = torch.tensor([r.drafted for r in output.rounds], device=ids.device)  # [rounds, S]
                chain = torch.zeros_like(ids[:-1])[:, None].repeat(1, theirs.shape[1])
                chain[roots - 1] = theirs
                choice, gap = self.readings.run(draft, reading, self.target.head, ids, g, chain)
                gap = gap[roots - 1]
                same = choice[roots - 1] == theirs
                proposed, equal = proposed + theirs.numel(), equal + int(same.sum())
                near += int((~same & (gap <= tie)).sum())
        return Evidence(reading, proposed, equal, near, tokens, tuple(rounds), torch.cat(lengths))

    def _hits(self, draft: nn.Module, reading: Reading, ids: Tensor, g: Tensor) -> Tensor:  # [L-1, S] bool
        """Where the reading's choice is the token that the output has there."""
        wanted = (
            torch.arange(len(ids) - 1, device=ids.device)[:, None] + 2 + torch.arange(self.num_steps, device=ids.device)
        )
        inside = wanted < len(ids)
        chain = ids[wanted.clamp_max(len(ids) - 1)]
        choice, _ = self.readings.run(draft, reading, self.target.head, ids, g, chain)
        return (choice == chain) & inside


# --- diagnosis -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Diagnosis:
    reference: Evidence
    served_as: list[Evidence]  # readings that explain the engine's proposals where the documented one does not
    trained_as: list[Evidence]  # readings that would be accepted clearly more often
    agrees: bool  # every proposal is the documented reading's, near-ties aside (or its rounds, where none are shown)


def diagnose(parity: Parity) -> Diagnosis:
    """Tries every reading. `served_as` and `trained_as` hold the best reading of each fault, best first."""
    reference, *others = (
        parity.evidence(reading) for reading in parity.readings.every(parity.draft, parity.target.num_layers)
    )
    if reference.num_proposed:
        agrees = reference.agreement == 1 and reference.num_near <= 0.1 * reference.num_proposed
        better = [e for e in others if e.num_missed <= 0.5 * reference.num_missed and e.agreement >= 0.8]
        better.sort(key=lambda e: e.num_missed)
    else:
        agrees = _round_error(parity, reference) <= SAME_ROUNDS
        better = [e for e in others if _round_error(parity, e) <= SAME_ROUNDS]
        better.sort(key=lambda e: _round_error(parity, e))
    gained = sorted((e for e in others if _gain(e, reference)), key=lambda e: -_gain(e, reference))
    return Diagnosis(reference, [] if agrees else _best_of_each_fault(better), _best_of_each_fault(gained), agrees)


def _best_of_each_fault(best_first: list[Evidence]) -> list[Evidence]:
    found: dict[str, Evidence] = {}
    for evidence in best_first:
        found.setdefault(evidence.reading.fault, evidence)
    return list(found.values())


def _gain(evidence: Evidence, reference: Evidence) -> float:
    """Tokens a round more than the reference, 0 unless that is more than a tenth of a token and three standard errors."""
    difference = evidence.lengths - reference.lengths
    if len(difference) < 2:
        return 0.0
    gain, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    return gain if gain > max(0.1, 3 * error) else 0.0


def _round_error(parity: Parity, evidence: Evidence) -> float:
    """Relative difference of the engine's number of rounds from the reading's; inf when the engine does not tell."""
    theirs = [o.num_rounds for o in parity.outputs]
    if any(n is None for n in theirs):
        return float("inf")
    return abs(sum(theirs) - sum(evidence.rounds)) / max(sum(theirs), 1)
