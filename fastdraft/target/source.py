"""Where a target's features come from: the target in this process, a feature store, or both with the store as a cache.

Training speaks to one `Source` and does not know which it is.
"""

from __future__ import annotations

from collections.abc import Callable

from fastdraft.batch import Batch, Ends, Features
from fastdraft.target.hf import Target
from fastdraft.target.identity import target_fingerprint


class Source:
    """Gives the features of batches, in any order, though those that were announced come fastest. What a source does not
    define of this has nothing to do in it."""

    ends: Ends
    notes: list[str]  # what to tell the user before the first step
    gives_share = False  # whether `capture` gives what this process owns (`Target.capture_share`), not the whole pack's
    waited = 0.0  # seconds that `capture` kept its caller for what had been announced; the caller sets it back
    # What the caller may set. Tells the user something while a run goes on, from any thread:
    say: Callable[[str], None] = staticmethod(lambda line: None)
    # Is called each second while `capture` waits for servers, with the seconds so far. What it raises ends the wait:
    while_waiting: Callable[[float], None] = staticmethod(lambda seconds: None)

    def expect(self, batches: list[Batch]) -> None:
        """Announces batches that `capture` will be called with, in this order."""

    def capture(self, batch: Batch) -> tuple[Batch, Features]:
        """The batch and its features on the device. A document whose features cannot be had loses its loss mask."""
        raise NotImplementedError

    def meet(self) -> None:
        """Waits, once it has nothing to capture, for the processes that hold the target together with this one: every one
        of them calls it before it turns to what all processes do together. Where no target is shared nothing is done."""

    def counts(self) -> dict[str, int]:
        """What was left out or done again so far, by the name of its metric; empty where nothing was."""
        return {}

    def flush(self) -> None:
        """Puts on the disk what is to outlast this process. ValueError when the disk is full."""

    def close(self) -> None:
        """Ends threads and gives locks back."""


class InProcess(Source):
    """A target that runs here, whenever it is asked."""

    def __init__(
        self,
        target: Target,
        halo: int = 0,  # rows behind those that this process owns, where processes share a pack's tokens
    ):
        self.target, self.halo = target, halo
        self.gives_share = target.sequence.size > 1
        self.ends = ends_of(target)
        self.notes = runs_apart(target)

    def capture(self, batch: Batch) -> tuple[Batch, Features]:
        if self.gives_share:
            return batch, self.target.capture_share(batch, self.halo)
        return batch, self.target.capture(batch.to(self.target.device))

    def meet(self) -> None:
        self.target.meet()


def ends_of(target: Target, fingerprint: str | None = None) -> Ends:
    """A live target's ends; its fingerprint is taken unless it is at hand."""
    return Ends(target.embedding, target.head, target.final_norm, fingerprint or target_fingerprint(target))


def runs_apart(target: Target) -> list[str]:
    """What to tell of a target whose documents cannot be packed."""
    padded = target.apart is not None and target.sequence.size == 1
    return [f"the target's documents run padded, not packed: {target.apart}"] if padded else []
