"""A draft whose weights, and packs whose tokens, are shared by processes: losses and gradients are those of one alone.

Everything runs over gloo on the CPU. The processes are forked with the law at hand, which the reference step has computed.

# N packed tokens, T TTT steps, V target vocabulary
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import pytest
import torch
from small_runs import by_ranks
from tiny import draft_shape, noisy_draft

from fastdraft.batch import Batch, Features, PackShare, Rows, TargetHead, own_features
from fastdraft.dist import mesh
from fastdraft.dist.tensor import Parts
from fastdraft.model.buffers import flat_gradients
from fastdraft.model.eagle3.chunks import SampledDepth, deal_chains
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.engine import TTTEngine
from fastdraft.model.eagle3.ref import ReferenceEngine, ttt_ref_step
from fastdraft.model.eagle3.shard import check_cut, cut_draft, part

CPU = torch.device("cpu")
V, HT, T = 32, 12, 4
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": V,
    "draft_vocab_size": 20,
}
# The documents of each pack. One is longer than all others together, some have a single token, and one pack trains nothing.
PACKS = ((23, 1, 9, 2, 17, 3, 12), (5, 40, 6), (3, 3, 3, 3), (1, 2), (64,), (2, 1, 1, 9), (11,), (4, 4))
LAYOUTS = ((1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (2, 2), (4, 2), (2, 4), (8, 1))  # sequence, tensor; of 8 processes
FOR_ALL = ((1, 4), (4, 1), (2, 2))  # the others see the first case alone: processes that wait for each other are slow
CASES = {  # changes of the shape, loss, chains at a time
    "kl": ({}, ("kl",), 20),
    "fc_norm, lk_alpha, other layers": ({"fc_norm": True, "layers": (0, 2, 5)}, ("lk_alpha",), 4096),
    "lk_lambda, 4 tokens beside the draft's": ({"draft_vocab_size": 28}, ("lk_lambda", 0.9, 2.0), 13),
    "the whole vocabulary, EAGLE-3.1": (
        {"draft_vocab_size": V, "norm_output": True, "norm_before_fc": True},
        ("kl",),
        4096,
    ),
}


def make_draft(changes: dict) -> Draft:
    return noisy_draft(draft_shape(**SHAPE | changes))


def make_packs() -> list[tuple[Batch, Features]]:
    """Masks with dead rows before, between and behind the trained ones."""
    generator = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    packs = []
    for k, lengths in enumerate(PACKS):
        n = sum(lengths)
        mask = (torch.rand(n, generator=generator) < (0.3, 0.9)[k % 2]).repeat_interleave(3)[:n]
        if k == 4:
            mask[:] = True
        packs.append(
            (Batch(torch.randint(V, (n,), generator=generator), mask, lengths), Features(normal(n, 3 * HT), normal(n, HT)))
        )
    return packs


def make_head() -> TargetHead:
    generator = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((V, HT), (V,)))
    return TargetHead(weight, bias, scale=0.7, softcap=5.0)


def decay() -> torch.Tensor:
    return 0.8 ** torch.arange(T, dtype=torch.float64)


def assert_close(got: torch.Tensor, law: torch.Tensor, what: object) -> None:
    """Relative to the largest number: float64 to 1e-10, float32 to 1e-4."""
    tolerance = 1e-10 if got.dtype == torch.float64 else 1e-4
    assert float((got.cpu().double() - law).abs().max()) <= tolerance * max(float(law.abs().max()), 1e-3), what


def law_of(changes: dict, loss: tuple) -> tuple[list[Rows], dict[str, torch.Tensor]]:
    """The rows of every pack, and the gradients of all, by the reference step in float64."""
    steps = [ttt_ref_step(make_draft(changes), *pack, make_head(), decay(), *loss) for pack in make_packs()]
    return [rows for rows, _ in steps], {name: sum(grads[name] for _, grads in steps) for name in steps[0][1]}


def test_every_layout_of_eight_processes_gives_the_same_losses_and_gradients():
    law = {name: law_of(changes, loss) for name, (changes, loss, _) in CASES.items()}
    for rows, _ in law.values():
        assert any(r.live.any(1).all() for r in rows) and not rows[3].live.any()
    assert by_ranks(8, _every_layout, law) == [0] * 8


def _every_layout(law) -> None:
    mesh.start_process("cpu")
    for sequence, tensor in LAYOUTS:
        mesh.lay_out(sequence, tensor)
        for name in CASES if (sequence, tensor) in FOR_ALL else list(CASES)[:1]:
            _one_layout(*CASES[name], *law[name], (name, sequence, tensor))


ON_GPUS = {"hidden_size": 32, "head_dim": 16}  # what the kernels cover
FEW = {2: ((2, 1), (1, 2)), 4: ((2, 2), (1, 4), (4, 1))}


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [2, 4])
def test_layouts_over_nccl(gpus):
    """In float32, by the kernels, and by what a first step on a GPU does before it."""
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} CUDA GPUs")
    law = {loss: law_of(ON_GPUS, loss) for loss in (("kl",), ("lk_lambda", 0.9, 2.0))}
    assert by_ranks(gpus, _few_layouts, gpus, law, "cuda", start="spawn", seconds=280) == [0] * gpus


def test_what_gpus_are_asked_runs_on_two_processes_of_a_cpu():
    law = {loss: law_of(ON_GPUS, loss) for loss in (("kl",),)}
    assert by_ranks(2, _few_layouts, 2, law, "cpu") == [0] * 2


def _few_layouts(world, law, kind) -> None:
    device = mesh.start_process(kind)
    for sequence, tensor in FEW[world]:
        mesh.lay_out(sequence, tensor)
        for loss, (rows, grads) in law.items():
            _one_layout(ON_GPUS, loss, 20, rows, grads, (loss, sequence, tensor), device, torch.float32)


def _one_layout(changes, loss, chunk_rows, rows_law, grads_law, what, device=CPU, dtype=torch.float64, depth=None) -> None:
    tensor, sequence, data = (mesh.axis(name) for name in ("tensor", "sequence", "data"))
    draft = make_draft(changes)
    shapes = {name: p.shape for name, p in draft.trainable().items()}
    parts = Parts(shapes, part, tensor)
    numbers = torch.arange(sum(shape.numel() for shape in shapes.values()), dtype=torch.float32)
    assert parts.whole(parts.own(numbers)).equal(numbers), what
    cut_draft(draft, tensor.rank, tensor.size)
    assert {name: p.shape for name, p in draft.trainable().items()} == parts.local_shapes
    draft.to(device, dtype)
    head = make_head()
    head = replace(head, weight=head.weight.to(device, dtype), bias=head.bias.to(device, dtype))
    weights = decay().to(device, dtype)
    engine = TTTEngine(draft, head, weights, *loss, chunk_rows=chunk_rows, tensor=tensor, sequence=sequence, depth=depth)
    engine.begin(7)
    grads = flat_gradients(draft.trainable())
    for k, (batch, features) in enumerate(make_packs()):
        if k % data.size != data.rank:
            continue
        features = Features(features.g.to(device, dtype), features.f.to(device, dtype))
        if sequence.size > 1:
            share = PackShare(batch.num_tokens, sequence.rank, sequence.size, halo=T)
            features = own_features(features, share)
            assert len(features.g) == len(share.rows) and len(features.f) == len(share.rows_and_halo)
        rows = engine.step(batch, features, grads)
        if k == 0 and depth is None:
            assert all(map(torch.equal, astuple(rows), astuple(engine.rows(batch, features)))), what
        for ours, theirs in zip(astuple(rows), astuple(rows_law[k]), strict=True):
            assert_close(sequence.sum_(ours.to(dtype)), theirs.double(), what)
    for name, grad in grads.items():
        theirs = grads_law[name][part(name, shapes[name], tensor.rank, tensor.size)]
        assert_close(mesh.axis("replicas").sum_(grad), theirs, (*what, name))


@dataclass(frozen=True)
class Recorded:
    """A group that remembers how many of its sums are under way whenever one begins."""

    axis: mesh.Axis
    under_way: list[int]
    most: list[int]

    def __getattr__(self, name: str):
        return getattr(self.axis, name)

    def start_sum(self, x: torch.Tensor):
        self.under_way.append(0)
        self.most.append(len(self.under_way))
        work = self.axis.start_sum(x)

        class Handle:
            def wait(_) -> None:
                self.under_way.pop()
                work.wait()

        return Handle()


def test_one_chunk_computes_while_the_sum_of_another_is_on_its_way():
    assert by_ranks(2, _in_turns) == [0] * 2


def _in_turns() -> None:
    mesh.start_process("cpu")
    mesh.lay_out(tensor=2)
    batch, features = make_packs()[0]
    for chunk_rows, at_once in ((4, [1, 2]), (1000, [1])):
        draft = make_draft({})
        cut_draft(draft, mesh.rank(), 2)
        group = Recorded(mesh.axis("tensor"), [], [])
        engine = TTTEngine(draft.double(), make_head(), decay(), chunk_rows=chunk_rows, tensor=group)
        engine.step(batch, features, flat_gradients(draft.trainable()))
        assert sorted(set(group.most)) == at_once and not group.under_way
        assert len(engine.lanes) == 2 and bool(engine.lanes[1].held) is (chunk_rows == 4)


def test_every_layout_draws_the_depths_of_one_process():
    """A third of the live rows and more is left out, on every process the same, and the gradients are those of one."""
    law = law_of_drawn()
    assert 0 < sum(rows.live.sum() for rows in law[0]) < 0.7 * sum(rows.live.sum() for rows in law_of({}, ("kl",))[0])
    assert by_ranks(4, _drawn_layouts, law) == [0] * 4


DEPTH = SampledDepth(0.5, seed=11)


def law_of_drawn() -> tuple[list[Rows], dict[str, torch.Tensor]]:
    draft = make_draft({})
    engine, grads = ReferenceEngine(draft, make_head(), decay(), depth=DEPTH), flat_gradients(draft.trainable())
    engine.begin(7)
    return [engine.step(*pack, grads) for pack in make_packs()], grads


def _drawn_layouts(law) -> None:
    mesh.start_process("cpu")
    for sequence, tensor in ((2, 2), (4, 1), (1, 4), (1, 1)):
        mesh.lay_out(sequence, tensor)
        _one_layout({}, ("kl",), 20, *law, ("drawn", sequence, tensor), depth=DEPTH)


def test_chains_stay_with_their_tokens_unless_that_is_uneven():
    packs = make_packs()
    for rank in range(2):
        even, uneven = (deal_chains(packs[k][0], T, PackShare(sum(PACKS[k]), rank, 2, T), 0.01) for k in (4, 0))
        assert even.h.send is even.f.send is None and len(even.pieces) == 2
        assert uneven.h.send is not None and uneven.f.send is not None and len(uneven.pieces) == 1


def test_the_answer_to_a_long_prompt_is_dealt_to_all():
    batch = Batch(torch.zeros(400, dtype=torch.int64), torch.arange(400) >= 350, (400,))
    deals = [deal_chains(batch, T, PackShare(400, rank, 4, T), 0.01) for rank in range(4)]
    chains = [deal.pieces[0] for deal in deals]
    assert sorted(t for mine in chains for t in mine) == list(range(350 - T - 1, 398))
    assert all(11 <= len(mine) <= 16 for mine in chains)
    # Rank 1 owns the first five of these tokens and rank 0 the others: they send each to whoever runs its chain.
    sizes = [len(mine) for mine in chains]
    assert deals[1].h.sends == (5, 0, 0, 0) and deals[0].h.sends == (sizes[0] - 5, *sizes[1:])
    assert not any(sum(deal.h.sends) for deal in deals[2:])
    assert all(sum(deal.h.gets) == len(mine) for deal, mine in zip(deals, chains, strict=True))
    nothing = Batch(batch.input_ids, torch.zeros(400, dtype=torch.bool), (400,))
    assert deal_chains(nothing, T, PackShare(400, 0, 4, T), 0.01) is None


def test_a_layout_that_does_not_divide_the_draft_names_the_setting():
    with pytest.raises(
        ValueError, match=r"dist\.tensor=3 does not divide the draft's num_attention_heads 8, num_key_value_h"
    ):
        check_cut(draft_shape(**SHAPE), 3)
    with pytest.raises(
        ValueError, match=r"num_key_value_heads 4, draft_vocab_size 20; set dist\.tensor to 1 or 2 or 4, or change"
    ):
        check_cut(draft_shape(**SHAPE), 8)
