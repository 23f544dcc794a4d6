"""AdamW over flat buffers, with the gradient kept as an un-normalised sum until the step.

Every trainable weight is a view into one flat buffer in the compute dtype; master weights, both moments and the
gradient sum are flat fp32 buffers of the same length. One step, with G the gradient sum over the global batch and N its
number of live step-0 rows:

    g = G / N;  g *= min(1, clip / |g|);  m, v as Adam's;  w -= lr * (m^ / (sqrt(v^) + eps) + weight_decay * w)

so the result does not depend on how the global batch was cut. Norm weights (1-D) take no weight decay. The arithmetic is
`kernels/adamw.py`.
Source: AdamW (arXiv 1711.05101).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from fastdraft.config import OptimConfig
from fastdraft.kernels.adamw import adamw_, adamw_scratch
from fastdraft.kernels.jit import compile_together


class FlatAdamW:
    """Owns the flat buffers of `parameters`; the parameters become views into `self.weights`."""

    def __init__(self, parameters: dict[str, nn.Parameter], config: OptimConfig, total_steps: int, dtype: torch.dtype):
        if not parameters:
            raise ValueError("the draft has no trainable parameter")
        self.config, self.total_steps, self.step_count = config, total_steps, 0
        self.names = list(parameters)
        first = next(iter(parameters.values()))
        count = sum(p.numel() for p in parameters.values())
        buffer = dict(device=first.device, dtype=torch.promote_types(dtype, torch.float32))
        self.master = torch.cat([p.detach().reshape(-1) for p in parameters.values()]).to(**buffer)
        self.m, self.v, self.grad = (torch.zeros(count, **buffer) for _ in range(3))
        self.weights = self.master.to(dtype) if dtype != self.master.dtype else self.master
        self.updates = torch.zeros((), dtype=torch.float64, device=first.device)  # steps that had a live row
        self.scratch = adamw_scratch(first.device)
        self.compiled = not self.grad.is_cuda
        self.grads: dict[str, Tensor] = {}  # views of the gradient sum, by parameter name
        norms, start = [], 0
        for name, p in parameters.items():
            end = start + p.numel()
            p.data = self.weights[start:end].view(p.shape)
            self.grads[name] = self.grad[start:end].view(p.shape)
            if p.ndim == 1:
                norms.append((start, end))
            start = end
        self.not_decayed = torch.tensor(norms, dtype=torch.int64, device=first.device).view(-1, 2)

    def lr(self, step: int) -> float:
        """Linear warm-up then cosine to min_lr_ratio, by optimizer step, counted from 0."""
        c = self.config
        warmup = max(1, round(c.warmup_ratio * self.total_steps))
        if step < warmup:
            return c.lr * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.total_steps - warmup))
        return c.lr * (c.min_lr_ratio + (1 - c.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))

    def step(self, num_live: Tensor) -> Tensor:  # scalar tensor: norm of G / N before clipping
        """One AdamW step from the summed gradient over `num_live` (device scalar), then zeroes the sum.

        A batch without a live row (num_live 0) leaves weights and moments as they are; the schedule still counts it.
        """
        c = self.config
        lr = self.lr(self.step_count)
        self.step_count += 1
        step = partial(
            adamw_,
            self.grad,
            self.master,
            self.m,
            self.v,
            None if self.weights is self.master else self.weights,
            self.not_decayed,
            num_live,
            self.updates,
            self.scratch,
            lr=lr,
            betas=c.betas,
            eps=c.eps,
            weight_decay=c.weight_decay,
            clip=c.clip,
        )
        if not self.compiled:
            compile_together(step, self.grad.device)
            self.compiled = True
        return step()

    def state_dict(self) -> dict[str, Tensor]:
        """The live buffers, and the step count in a tensor of its own."""
        step_count = torch.tensor(self.step_count)
        return {"master": self.master, "m": self.m, "v": self.v, "updates": self.updates, "step_count": step_count}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name in ("master", "m", "v", "updates"):
            mine = getattr(self, name)
            if state[name].shape != mine.shape:
                raise ValueError(f"checkpoint has {state[name].numel()} trainable weights, this draft {mine.numel()}")
            mine.copy_(state[name])
        self.step_count = int(state["step_count"])
        if self.weights is not self.master:
            self.weights.copy_(self.master)
