"""What passes between the rooms: the rows of a pack that each of several processes owns."""

from __future__ import annotations

import pytest
import torch

from fastdraft.batch import PackShare, StepWeights


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 3, 7, 8, 16, 41])
def test_every_row_has_one_owner_and_slices_pair_early_with_late(n, size):
    shares = [PackShare(n, rank, size) for rank in range(size)]
    rows = torch.cat([share.rows for share in shares])
    assert sorted(rows.tolist()) == list(range(n))
    for share in shares:
        (a, b), (c, d) = share.slices
        assert share.rows.tolist() == [*range(a, b), *range(c, d)] and share.rows_and_halo.equal(share.rows)
    if n % (2 * size) == 0:  # keys that the own rows look at, themselves included
        assert len({int((share.rows + 1).sum()) for share in shares}) == 1


def test_a_halo_is_the_rows_behind_each_slice():
    share = PackShare(32, 1, 4, halo=3)
    assert share.slices == ((4, 8), (24, 28))
    assert share.rows_and_halo.tolist() == [*range(4, 11), *range(24, 31)]
    assert PackShare(30, 0, 4, halo=3).rows_and_halo.tolist() == [*range(7), *range(28, 30)]  # the pack ends
    assert PackShare(32, 3, 4, halo=9).rows_and_halo.tolist() == list(range(12, 29))  # the slices lie together
    assert PackShare(16, 0, 1, halo=5).rows_and_halo.tolist() == list(range(16))


def test_rows_are_counted_where_they_lie():
    """A copy between devices in each step would make the host wait for the GPU, so `count` makes none."""
    weights = StepWeights(*(torch.ones(3, dtype=torch.float64) for _ in range(3)))
    assert float(weights.count(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64))) == 7
    assert weights.to(torch.device("meta")).count(torch.ones(3, dtype=torch.float64, device="meta")).is_meta
    with pytest.raises(RuntimeError, match="not on the expected device"):
        weights.count(torch.ones(3, dtype=torch.float64, device="meta"))
