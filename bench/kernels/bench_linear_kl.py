"""Times the draft's head: python -m bench.kernels.bench_linear_kl, or pytest. Rows go to bench/results/linear_kl.jsonl.

`linear_kl/rows` is the row kernel alone (roof: student and teacher logits read once, gradient written once),
`linear_kl/step` the three GEMMs and the row kernel that is used. Of rows "fastdraft" is Triton's kernel, "cuda" the one of
csrc/linear_kl_rows.cu where it is built. "torch" is the same mathematics with autograd, "torch.compile" that
compiled, "liger" its KL divergence on log-softmaxed student logits and a ready softmax of the teacher's (the loss only,
no acceptance). From the second round on a row's student logits are the last round's gradient: other numbers, the same work.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.timing import arguments, measure, record
from fastdraft.kernels.linear_kl import _kl_rows, _kl_rows_cuda, kl_config, linear_kl_grad, rows_in_cuda
from fastdraft.kernels.teacher import TeacherRows

SHAPES = [  # H, Vd
    (4096, 32000),
    (576, 8192),
    (576, 49152),
]
ROWS, LOSSES = (4096, 8192), ("kl", "lk_alpha")


def torch_rows(
    z: Tensor,  # [n, Vd]
    t: Tensor,  # [n, Vd]
    lse_draft: Tensor,  # [n]
    lse_full: Tensor,  # [n]
    best: Tensor,  # [n]
    loss: str,
) -> tuple[Tensor, Tensor, Tensor]:
    log_q, t = z.float().log_softmax(-1), t.float()
    alpha = torch.minimum((t - lse_full[:, None]).exp(), log_q.exp()).sum(-1)
    value = -alpha.log() if loss == "lk_alpha" else -((t - lse_draft[:, None]).exp() * log_q).sum(-1)
    return value, alpha.detach(), z.argmax(-1) == best


def providers(n: int, hidden: int, draft: int, loss: str, compiled: bool):
    gen = torch.Generator("cuda").manual_seed(0)

    def normal(*size, std=1.0):
        return (torch.randn(*size, device="cuda", generator=gen) * std).bfloat16()

    logits = normal(n, draft, std=2.0)
    lse, best = torch.cat([part.float().logsumexp(-1) for part in logits.split(1024)]), logits.argmax(-1)
    teacher = TeacherRows(logits, lse, lse + 0.1, best, best, lse)
    row, w = torch.arange(n, device="cuda"), torch.ones(n, device="cuda")
    zs = [normal(n, draft, std=2.0) for _ in range(2)]
    x, weight = [normal(n, hidden) for _ in range(2)], normal(draft, hidden, std=2 * hidden**-0.5)
    dx, dweight, scratch = torch.empty_like(x[0]), torch.zeros_like(weight, dtype=torch.float32), torch.empty_like(zs[0])
    stats = (lse, teacher.lse_full, best)

    def by_autograd(function):
        def rows(i):
            z = zs[i % 2].requires_grad_()
            torch.autograd.grad(function(z, logits, *stats, loss)[0].sum(), z)
            z.requires_grad_(False)

        def step(i):
            a, b = x[i % 2].detach().requires_grad_(), weight.detach().requires_grad_()
            torch.autograd.grad(function(a @ b.T, logits, *stats, loss)[0].sum(), (a, b))

        return rows, step

    def ours_step(i):
        linear_kl_grad(x[i % 2], weight, teacher, row, w, dx, dweight, scratch, loss)

    args, config = (teacher, row, w, loss, 1.0, 1.0, True), kl_config(draft, 2)
    rows, step = {"fastdraft": lambda i: _kl_rows(zs[i % 2], *args, config)}, {"fastdraft": ours_step}
    if rows_in_cuda(zs[0], logits):
        rows["cuda"] = lambda i: _kl_rows_cuda(zs[i % 2], *args)
    rows["torch"], step["torch"] = by_autograd(torch_rows)
    if compiled:
        rows["torch.compile"], step["torch.compile"] = by_autograd(torch.compile(torch_rows))
    try:
        from liger_kernel.transformers import LigerKLDIVLoss
    except ImportError:
        return rows, step
    if loss == "kl":
        kl, p = LigerKLDIVLoss(reduction="sum"), logits.float().softmax(-1)

        def liger_rows(z, *_):
            return kl(z.float().log_softmax(-1), p), None, None

        rows["liger"], step["liger"] = by_autograd(liger_rows)
    return rows, step


def bench_case(
    hidden: int, draft: int, n: int, loss: str, rounds: int = 15, commit: str | None = None, compiled: bool = False
) -> dict[str, dict[str, list[float]]]:
    rows, step = providers(n, hidden, draft, loss, compiled)
    shape, found = {"n": n, "H": hidden, "Vd": draft, "loss": loss}, {}
    found["rows"] = measure(rows, rounds)
    record("linear_kl/rows", shape, "bf16", found["rows"], 3 * 2 * n * draft, 0, commit)
    num_bytes = 2 * (2 * n * hidden + n * draft + draft * hidden) + 8 * draft * hidden
    found["step"] = measure(step, rounds)
    record("linear_kl/step", shape, "bf16", found["step"], num_bytes, 6 * n * hidden * draft, commit)
    return found


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("hidden", "draft"), SHAPES)
def test_linear_kl(hidden, draft, n, loss, show):
    show(bench_case(hidden, draft, n, loss)["step"])


def main() -> None:
    args = arguments(__doc__)
    args.add_argument("--compile", action="store_true", help="also the compiled plain torch, at the largest hidden size")
    args.add_argument("--vocab", type=int, help="only the shapes of this draft vocabulary")
    args = args.parse_args()
    for hidden, draft in SHAPES:
        if args.vocab and draft != args.vocab:
            continue
        for n in ROWS:
            for loss in LOSSES:
                compiled = args.compile and hidden == 4096 and n == 4096
                bench_case(hidden, draft, n, loss, args.rounds, args.commit, compiled)


if __name__ == "__main__":
    main()
