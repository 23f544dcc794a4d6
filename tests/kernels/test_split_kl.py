"""The head and its losses where processes have parts of the columns, against one process that has all of them.

The processes are threads that take turns, so that every pass runs as it would in its own process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from fastdraft.batch import TargetHead
from fastdraft.kernels.linear_kl import KLConfig, kl_rows_ref, linear_kl_grad
from fastdraft.kernels.split_kl import _PlainRows, _TritonRows, join_teacher_, split_kl_grad, split_kl_rows_
from fastdraft.kernels.teacher import TeacherRows, permute_head, teacher, teacher_ref
from fastdraft.model.eagle3.shard import cut_head

LOSSES = ["kl", "lk_alpha", "lk_lambda"]
LK = (0.9, 1.7)  # lk_scale, lk_decay
SHAPES = {  # n, m, H, V, Vd of all, processes
    "one tile each": (5, 4, 8, 150, 128, 2),
    "tile + 1": (5, 4, 8, 150, 130, 2),
    "ragged": (9, 3, 16, 400, 300, 4),
    "one row, one token each": (1, 1, 8, 20, 2, 2),
    "Vd = V": (6, 6, 8, 132, 132, 4),
}


class InTurns:
    """A group of threads. One of them runs at a time, and all meet in every call."""

    def __init__(self, size: int):
        self.size, self.turn, self.sent = size, threading.Lock(), [None] * size
        self.met = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> InTurns.Member:
        return InTurns.Member(self, rank)

    class Member:
        def __init__(self, group: InTurns, rank: int):
            self.group, self.rank, self.size = group, rank, group.size

        def exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
            self.group.sent[self.rank] = x.clone()
            self.group.turn.release()
            self.group.met.wait()
            sent = list(self.group.sent)
            self.group.met.wait()
            self.group.turn.acquire()
            return sent

        def gather(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat(self.exchange(x))

        def sum_(self, x: torch.Tensor) -> torch.Tensor:
            return x.copy_(sum(self.exchange(x)))


def by_members(size: int, act: Callable) -> list:
    """act(member) of each member of a group, by rank."""
    group, results, errors = InTurns(size), [None] * size, []

    def run(rank: int) -> None:
        with group.turn:
            try:
                results[rank] = act(group.of(rank))
            except Exception as error:
                errors.append(error)
                group.met.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


class Case:
    def __init__(self, shape, device, dtype=torch.float32):
        n, m, hidden, vocab, draft, self.size = shape
        gen = torch.Generator(device).manual_seed(0)

        def normal(*size, std=1.0):
            return (torch.randn(*size, generator=gen, device=device) * std).to(dtype)

        self.head = TargetHead(normal(vocab, hidden), bias=normal(vocab), scale=0.7, softcap=5.0)
        self.f = normal(m, hidden, std=3 * hidden**-0.5)
        self.ids = torch.randperm(vocab, generator=gen, device=device)[:draft].sort().values
        self.x, self.weight = normal(n, hidden, std=3 * hidden**-0.5), normal(draft, hidden)
        self.teacher_row = torch.randint(0, m, (n,), generator=gen, device=device)
        self.w = 0.8 ** torch.randint(0, 7, (n,), generator=gen, device=device).to(
            torch.promote_types(dtype, torch.float32)
        )
        if n > 2:
            self.w[torch.randperm(n, generator=gen, device=device)[: n // 3]] = 0
        self.z = self.x @ self.weight.T
        self.teacher = teacher_ref(self.f, self.head, self.ids)

    def columns(self, member) -> slice:
        width = len(self.ids) // self.size
        return slice(member.rank * width, (member.rank + 1) * width)

    def part(self, member) -> TeacherRows:
        return self.teacher._replace(logits=self.teacher.logits[:, self.columns(member)].contiguous())


class SmallTiles(_TritonRows):
    def __init__(self, *args):
        super().__init__(*args, KLConfig(tile=64, num_warps=1, stages=2))


@pytest.fixture(params=[SmallTiles, _PlainRows], ids=["kernel", "plain"])
def passes(request, device):
    if request.param is _PlainRows and device.type == "cuda":
        pytest.skip("plain torch is the CPU's")
    return request.param


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_rows_and_gradient_are_those_of_one_process(shape, loss, passes, device, three_way):
    case = Case(shape, device)
    truth, d_truth = kl_rows_ref(
        case.z.double(),
        TeacherRows(*(x.double() if x.is_floating_point() else x for x in case.teacher)),
        case.teacher_row,
        case.w.double(),
        loss,
        *LK,
    )
    plain, d_plain = kl_rows_ref(case.z, case.teacher, case.teacher_row, case.w, loss, *LK)
    rounding = torch.finfo(torch.float32).eps * float(case.teacher.lse_draft.abs().max())

    def act(member):
        z = case.z[:, case.columns(member)].contiguous()
        kept = z.clone()
        args = case.part(member), case.teacher_row, case.w, case.columns(member).start, member, loss, *LK
        looked_at = split_kl_rows_(kept, *args, grad=False, passes=passes)
        assert torch.equal(kept, case.z[:, case.columns(member)])
        rows = split_kl_rows_(z, *args, passes=passes)
        assert all(map(torch.equal, rows, looked_at))
        return rows, z

    of_each = by_members(case.size, act)
    dz = torch.cat([z for _, z in of_each], 1)
    dead = case.w == 0
    for rows, _ in of_each:
        three_way(rows.loss, plain.loss, truth.loss, "loss", extra=rounding)
        three_way(rows.acceptance, plain.acceptance, truth.acceptance, "acceptance", extra=rounding)
        assert torch.equal(rows.hit, truth.hit)
        assert not any(x[dead].any() for x in rows)
    three_way(dz, d_plain, d_truth, "dz", extra=rounding)
    assert not dz[dead].any()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_dead_row_is_exactly_zero_whatever_it_holds(loss, passes, device):
    case = Case(SHAPES["ragged"], device)
    dead = case.w == 0
    assert dead.any()
    case.z[dead] = torch.nan
    case.teacher_row[dead] = 2**40  # nothing may be read through it

    def act(member):
        z = case.z[:, case.columns(member)].contiguous()
        args = case.part(member), case.teacher_row, case.w, case.columns(member).start, member, loss, *LK
        return *split_kl_rows_(z, *args, passes=passes), z

    for results in by_members(case.size, act):
        for x in results:
            assert not x[dead].any() and bool(x.float().isfinite().all())


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_teacher_of_all_columns(shape):
    """On the CPU in float64, and in whole numbers, so that no product rounds. Of equal largest logits, which here lie with
    different processes, the lowest target id wins."""
    case = Case(shape, torch.device("cpu"), torch.float64)
    vocab, draft = len(case.head.weight), len(case.ids)
    case.ids = torch.arange(vocab - draft, vocab)
    lower, higher = (vocab - draft - 1, vocab - draft) if draft < vocab else (vocab // 2, vocab - 1)
    twin = case.head.weight.mul(2).round()
    twin[lower] = twin[higher] = 9
    case.f = torch.cat([case.f.mul(2).round(), torch.ones_like(case.f[:1])])
    head = TargetHead(twin, None)
    law = teacher(case.f, permute_head(head, case.ids))
    assert int(law.argmax[-1]) == lower

    def act(member):
        rows = teacher(case.f, cut_head(head, case.ids, member.rank, member.size))
        return join_teacher_(rows, case.columns(member).start, member)

    of_each = by_members(case.size, act)
    assert torch.equal(torch.cat([rows.logits for rows in of_each], 1), law.logits)
    for rows in of_each:
        assert torch.equal(rows.argmax, law.argmax) and torch.equal(rows.draft_argmax, law.draft_argmax)
        for name in ("lse_draft", "lse_full", "peak"):
            torch.testing.assert_close(getattr(rows, name), getattr(law, name), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_head_forward_and_backward(loss):
    case = Case(SHAPES["ragged"], torch.device("cpu"), torch.float64)
    dx, dweight = torch.empty_like(case.x), torch.zeros_like(case.weight)
    args = case.teacher_row, case.w
    law = linear_kl_grad(case.x, case.weight, case.teacher, *args, dx, dweight, torch.empty_like(case.z), loss, *LK)

    def act(member):
        columns = case.columns(member)
        mine, d_mine = torch.empty_like(case.x), torch.zeros_like(case.weight[columns])
        logits = torch.empty_like(case.z[:, columns]).contiguous()
        weight = case.weight[columns]
        buffers = mine, d_mine, logits, columns.start, member
        rows = split_kl_grad(case.x, weight, case.part(member), *args, *buffers, loss, *LK)
        return rows, mine, d_mine

    of_each = by_members(case.size, act)
    torch.testing.assert_close(torch.cat([d for _, _, d in of_each]), dweight, rtol=1e-12, atol=1e-12)
    for rows, mine, _ in of_each:
        torch.testing.assert_close(mine, dx, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(rows, law, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
