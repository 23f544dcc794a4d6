"""What both attentions of drafts must keep: how near they are to the truth, and the shapes that they refuse."""

from __future__ import annotations

import torch

UNCOVERED = [  # head dimension, group, dtype, compute capability; and a word of why
    ((80, 4, torch.bfloat16, (9, 0)), "80"),
    ((128, 4, torch.float16, (9, 0)), "float16"),
    ((128, 64, torch.bfloat16, (9, 0)), "64"),
    ((128, 4, torch.bfloat16, (7, 5)), "7.5"),
    ((256, 4, torch.float32, (8, 9)), "shared memory"),
]


def assert_close(ours, plain, truth, dtype, names):
    """STYLE: max|ours - truth| <= 2 * max|plain - truth| + one ulp of the dtype at max|truth|. In fp32 twice that:
    P comes back from the rounded lse, where the plain softmax keeps it."""
    slack = 2 if dtype == torch.float32 else 1
    for name, a, b, c in zip(names, ours, plain, truth, strict=True):
        if c.numel() == 0:
            continue
        a, b, c = (t.double().cpu().nan_to_num(nan=torch.inf, neginf=-1e30) for t in (a, b, c))
        kind = torch.float32 if name == "lse" else dtype
        bound = slack * 2 * (b - c).abs().max() + slack * torch.finfo(kind).eps * c[c > -1e29].abs().max()
        worst = (a - c).abs().max()
        assert worst <= bound, f"{name}: error {worst:.3e} above {bound:.3e}"
