"""The selector among the highest logits: candidates, choice, loss and every gradient against float64 autograd."""

from __future__ import annotations

import pytest
import torch

from fastdraft.batch import TargetHead
from fastdraft.kernels.selector import (
    Candidates,
    SelectedRows,
    SelectorConfig,
    SelectorGrads,
    _add_rows,
    _candidates,
    _select_rows,
    add_rows_,
    candidates,
    candidates_ref,
    select_rows_,
    selected_ref,
)
from fastdraft.kernels.teacher import teacher_ref

SMALL = SelectorConfig(tile=16, search_warps=1, row_warps=1, entries=2)
SHAPES = {  # n, V, K, R
    "several columns a lane": (5, 70, 4, 8),
    "one lane each": (3, 16, 5, 4),
    "fewer tokens than lanes": (4, 11, 3, 6),
    "all tokens are candidates": (3, 7, 7, 3),
    "one candidate": (3, 40, 1, 2),
    "one row": (1, 33, 6, 5),
}


def make(n, k, device, stats):
    ids = torch.empty(n, k + 1, dtype=torch.int64, device=device)
    return Candidates(ids, torch.empty(n, k + 1, dtype=stats, device=device))


class Case:
    def __init__(self, shape, device, dtype=torch.float32):
        n, vocab, self.k, rank = shape
        gen = torch.Generator(device).manual_seed(0)

        def normal(*size):
            return torch.randn(*size, generator=gen, device=device).to(dtype)

        self.z, self.h = 2 * normal(n, vocab), normal(n, rank)
        self.predecessor, self.successor = normal(vocab, rank), normal(vocab, rank)
        self.label = torch.randint(vocab, (n,), generator=gen, device=device)
        self.label[::2] = self.z[::2].argmax(-1)  # some labels are candidates
        self.before = torch.randint(vocab, (n,), generator=gen, device=device)
        self.before[-1] = self.before[0]
        self.w = torch.rand(n, generator=gen, device=device, dtype=torch.promote_types(dtype, torch.float32))
        self.dz = normal(n, vocab)
        self.teacher = teacher_ref(normal(3, 6), TargetHead(normal(vocab, 6)), torch.arange(vocab, device=device))
        self.teacher_row = torch.randint(3, (n,), generator=gen, device=device)

    def found(self):
        return candidates_ref(self.z, self.label, self.k)

    def truth(self):
        """Rows and gradients by autograd in float64, of dz as it stood plus this loss's."""
        names = ("z", "h", "predecessor", "successor")
        z, h, predecessor, successor = (getattr(self, name).double().requires_grad_() for name in names)
        ids = self.found().ids
        teacher = self.teacher._replace(logits=self.teacher.logits.double(), lse_full=self.teacher.lse_full.double())
        rows = selected_ref(
            Candidates(ids, z.gather(1, ids)), h, self.before, predecessor, successor, teacher, self.teacher_row
        )
        grads = torch.autograd.grad((rows.loss * self.w.double()).sum(), (z, h, predecessor, successor))
        return rows._replace(loss=rows.loss.detach()), dict(zip(names, grads, strict=True))


def search_small(z, label, out):
    _candidates(z, label, out, SMALL)


def select_small(found, h, before, predecessor, successor, w, dz, grads, teacher, teacher_row):
    stats = found.logits.dtype
    rows = SelectedRows(*(torch.empty(len(h), dtype=d, device=h.device) for d in (stats, torch.int64, stats)))
    _select_rows(dz, found, h, before, predecessor, successor, w, teacher, teacher_row, rows, grads, SMALL)
    return rows


def add_small(out, ids, rows, weight=None):
    ordered, order = ids.flatten().sort(stable=True)
    _add_rows(ordered, order, weight, rows, ids[0].numel(), out, SMALL)


def empty_grads(case):
    stats = case.w.dtype
    n, rank = case.h.shape
    wide = lambda *size: torch.empty(*size, dtype=stats, device=case.h.device)  # noqa: E731
    return SelectorGrads(wide(n, case.k + 1), wide(n, rank), wide(n, rank), torch.empty_like(case.h))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_candidates_are_the_largest_in_order(shape, device, poison):
    case = Case(shape, device)
    want = case.found()
    for search in (search_small, candidates):
        ours = make(shape[0], case.k, device, torch.float32)
        search(case.z, case.label, ours)
        assert torch.equal(ours.ids, want.ids) and torch.equal(ours.logits, want.logits)


def test_equal_logits_and_infinities_give_distinct_candidates(device, poison):
    """The values are the largest there are and the ids differ, among -inf too; beside NaN the ids stay in the row."""
    z = torch.tensor(
        [[1.0] * 40, [0.5, 2.0] * 20, [-torch.inf] * 36 + [1.0] * 4, [torch.nan] * 3 + [0.0] * 37], device=device
    )
    label = torch.tensor([3, 4, 5, 6], device=device)
    for search in (search_small, candidates):
        ours = make(4, 6, device, torch.float32)
        search(z, label, ours)
        assert bool(((ours.ids >= 0) & (ours.ids < 40)).all())
        assert all(len(set(row.tolist())) == 6 for row in ours.ids[:, :6])
        assert torch.equal(ours.logits[:3, :6], z[:3].topk(6).values)
        assert torch.equal(ours.ids[:, 6], label)


def check(select, add, case, three_way, extra=0.0):
    truth, gradients = case.truth()
    found, grads, dz = case.found(), empty_grads(case), case.dz.clone()
    args = case.h, case.before, case.predecessor, case.successor
    rows = select(found, *args, case.w, dz, grads, case.teacher, case.teacher_row)
    plain = selected_ref(found, *args, case.teacher, case.teacher_row)
    three_way(rows.loss, plain.loss, truth.loss, "loss", extra)
    three_way(rows.acceptance, plain.acceptance, truth.acceptance, "acceptance", extra)
    assert torch.equal(rows.choice, plain.choice)
    law = case.dz.double() + gradients["z"]
    three_way(dz, law.to(dz.dtype), law, "dz", extra)
    three_way(grads.state, gradients["h"].to(grads.state.dtype), gradients["h"], "dh", extra + 1e-6)
    for name, ids, source, weight in (
        ("successor", found.ids, grads.query, grads.place),
        ("predecessor", case.before, grads.pull, None),
    ):
        table = torch.zeros(case.predecessor.shape, dtype=case.w.dtype, device=dz.device)
        add(table, ids, source, weight)
        three_way(table, gradients[name].to(table.dtype), gradients[name], name, extra + 1e-6)
    return rows


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_every_gradient(shape, device, three_way, poison):
    case = Case(shape, device)
    check(select_small, add_small, case, three_way)
    check(select_rows_, add_rows_, case, three_way)


def test_without_gradient_and_teacher(device, poison):
    case = Case(SHAPES["several columns a lane"], device)
    args = case.found(), case.h, case.before, case.predecessor, case.successor
    want, _ = case.truth()
    for rows in (select_small(*args, None, None, None, None, None), select_rows_(*args)):
        torch.testing.assert_close(rows.loss, want.loss.float())
        assert torch.equal(rows.choice, want.choice) and not rows.acceptance.any()


def test_a_label_that_is_no_candidate_takes_the_last_ones_place():
    """By hand: of logits 3, 2, 1, 0 with tables of zeros and K = 2, label 3 is trained against token 0 alone."""
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0]], dtype=torch.float64)
    zeros = torch.zeros(4, 2, dtype=torch.float64)
    for label, rival in ((3, 3.0), (1, 3.0), (0, 2.0)):
        found = candidates_ref(z, torch.tensor([label]), 2)
        rows = selected_ref(found, zeros[:1], torch.tensor([0]), zeros, zeros)
        want = torch.log(torch.exp(torch.tensor(rival - float(z[0, label]))) + 1)
        assert float(rows.loss) == pytest.approx(float(want)) and int(rows.choice) == 0


def test_the_table_turns_the_choice():
    """The token before decides between two equal candidates."""
    z = torch.tensor([[1.0, 1.0, -9.0], [1.0, 1.0, -9.0]], dtype=torch.float64)
    before = torch.tensor([0, 1])
    predecessor = torch.eye(3, dtype=torch.float64)[:, :2].contiguous()
    successor = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    found = candidates_ref(z, torch.tensor([1, 1]), 2)
    rows = selected_ref(found, torch.ones(2, 2, dtype=torch.float64), before, predecessor, successor)
    assert rows.choice.tolist() == [1, 0] and float(rows.loss[0]) < float(rows.loss[1])


def test_many_entries_of_one_row_are_all_added(device):
    ids = torch.tensor([[3, 3, 3], [3, 1, 3], [3, 3, 3], [0, 3, 3]], device=device)
    rows, weight = torch.randn(4, 5, device=device), torch.randn(4, 3, device=device)
    want = torch.ones(6, 5, device=device).index_add(0, ids.flatten(), (weight[..., None] * rows[:, None]).flatten(0, 1))
    for add in (add_small, add_rows_):
        out = torch.ones(6, 5, device=device)
        add(out, ids, rows, weight)
        torch.testing.assert_close(out, want)


def test_the_plain_path_runs_in_float64():
    case = Case(SHAPES["several columns a lane"], "cpu", torch.float64)
    truth, gradients = case.truth()
    found, grads, dz = make(5, 4, "cpu", torch.float64), empty_grads(case), case.dz.clone()
    candidates(case.z, case.label, found)
    rows = select_rows_(
        found, case.h, case.before, case.predecessor, case.successor, case.w, dz, grads, case.teacher, case.teacher_row
    )
    table = torch.zeros_like(case.successor)
    add_rows_(table, found.ids, grads.query, grads.place)
    pairs = [(rows.loss, truth.loss), (rows.acceptance, truth.acceptance), (dz - case.dz, gradients["z"])]
    for ours, law in (*pairs, (grads.state, gradients["h"]), (table, gradients["successor"])):
        torch.testing.assert_close(ours, law, rtol=1e-12, atol=1e-12)


def test_errors_say_what_came():
    case = Case(SHAPES["one lane each"], "cpu")
    with pytest.raises(ValueError, match=r"17 candidates of 16 tokens were asked for; it must be 1..16"):
        candidates(case.z, case.label, make(3, 17, "cpu", torch.float32))
    with pytest.raises(ValueError, match=r"label is \(2,\)"):
        candidates(case.z, case.label[:2], make(3, 4, "cpu", torch.float32))
    with pytest.raises(ValueError, match=r"successor is \(15, 4\).*\[16, 4\]"):
        select_rows_(case.found(), case.h, case.before, case.predecessor, case.successor[:15])
    with pytest.raises(ValueError, match="give w, dz and grads together"):
        select_rows_(case.found(), case.h, case.before, case.predecessor, case.successor, w=case.w)
    with pytest.raises(ValueError, match=r"rows is \(2, 4\).*\[3, 4\]"):
        add_rows_(torch.zeros(16, 4), case.before, torch.zeros(2, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("vocab, rank", [(151936, 256), (1000, 64)], ids=str)
def test_on_the_gpu(vocab, rank, dtype, device, three_way, poison):
    case = Case((67, vocab, 16, rank), device, dtype)
    found = make(67, 16, device, torch.float32)
    candidates(case.z, case.label, found)
    assert torch.equal(found.logits[:, :16], case.z.float().topk(16).values)
    assert torch.equal(case.z.float().gather(1, found.ids), found.logits)
    case.found = lambda: found
    again = [check(select_rows_, add_rows_, case, three_way, extra=1e-5) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
