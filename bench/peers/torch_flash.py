"""PyTorch's own FlashAttention under the names by which peers call the package flash_attn 2.8, for machines that lack it.

Both are FlashAttention 2: PyTorch carries a copy of its kernels. Offered are the four private functions with which a ring
attention is made, forward and backward, of dense tensors and of one document (cu_seqlens [0, n]); all arguments that would
change what is computed are refused. On a CPU the same functions are PyTorch's for CPUs.

# B sequences, S queries, L keys, H heads, D head dim
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType

import torch
from torch import Tensor

ops = torch.ops.aten
NOTHING = (0.0, -1, -1, 0.0, None)  # dropout, window to the left and right, softcap, ALiBi


def install() -> None:
    """Makes `flash_attn` importable where it is not. To be called before a peer is imported."""
    if importlib.util.find_spec("flash_attn") is not None:
        return
    package, interface = (ModuleType(name) for name in ("flash_attn", "flash_attn.flash_attn_interface"))
    package.__version__, package.__path__, package.flash_attn_interface = "2.8.3", [], interface
    for module in (package, interface):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    for function in (
        _flash_attn_forward,
        _flash_attn_backward,
        _flash_attn_varlen_forward,
        _flash_attn_varlen_backward,
    ):
        setattr(interface, function.__name__, function)


def _flash_attn_forward(
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    dropout: float,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    alibi: None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, None, None]:  # [B, S, H, D], the log of each row's sum of exponentials [B, H, S], no more
    assert (dropout, left, right, softcap, alibi) == NOTHING and not return_softmax
    on_cpu = q.device.type == "cpu"
    forward = ops._scaled_dot_product_flash_attention_for_cpu if on_cpu else ops._scaled_dot_product_flash_attention
    out, lse, *_ = forward(*(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=scale)
    return out.transpose(1, 2), lse, None, None


def _flash_attn_backward(
    dout: Tensor,  # [B, S, H, D]
    q: Tensor,  # [B, S, H, D]
    k: Tensor,  # [B, L, H, D]
    v: Tensor,  # [B, L, H, D]
    out: Tensor,  # [B, S, H, D]
    lse: Tensor,  # [B, H, S]
    dq: Tensor,  # [B, S, H, D], written
    dk: Tensor,  # [B, L, H, D], written
    dv: Tensor,  # [B, L, H, D], written
    dropout: float,
    scale: float,
    causal: bool,
    left: int,
    right: int,
    softcap: float,
    alibi: None,
    deterministic: bool,
    rng_state: None,
) -> None:
    assert (dropout, left, right, softcap, alibi) == NOTHING and not deterministic
    rows = [x.transpose(1, 2) for x in (dout, q, k, v, out)]
    if q.device.type == "cpu":
        found = ops._scaled_dot_product_flash_attention_for_cpu_backward(*rows, lse, 0.0, causal, scale=scale)
    else:
        seed, offset = (torch.zeros(n, dtype=torch.uint64, device=q.device) for n in (2, 1))  # nothing is dropped
        found = ops._scaled_dot_product_flash_attention_backward(
            *rows, lse, None, None, q.shape[1], k.shape[1], 0.0, causal, seed, offset, scale=scale
        )
    for written, gradient in zip((dq, dk, dv), found, strict=True):
        written.copy_(gradient.transpose(1, 2))


def _flash_attn_varlen_forward(
    q: Tensor,  # [S, H, D]
    k: Tensor,  # [L, H, D]
    v: Tensor,  # [L, H, D]
    cu_q: Tensor,  # [2]
    cu_k: Tensor,  # [2]
    max_q: int,
    max_k: int,
    *args: object,
) -> tuple[Tensor, Tensor, None, None]:  # [S, H, D], [H, S]
    assert len(cu_q) == len(cu_k) == 2
    out, lse, *rest = _flash_attn_forward(q[None], k[None], v[None], *args)
    return out[0], lse[0], *rest


def _flash_attn_varlen_backward(
    dout: Tensor,  # [S, H, D]
    q: Tensor,  # [S, H, D]
    k: Tensor,  # [L, H, D]
    v: Tensor,  # [L, H, D]
    out: Tensor,  # [S, H, D]
    lse: Tensor,  # [H, S]
    dq: Tensor,  # [S, H, D], written
    dk: Tensor,  # [L, H, D], written
    dv: Tensor,  # [L, H, D], written
    cu_q: Tensor,  # [2]
    cu_k: Tensor,  # [2]
    max_q: int,
    max_k: int,
    *args: object,
) -> None:
    assert len(cu_q) == len(cu_k) == 2
    before, _zero_tensors = args[:-1], args[-1]
    _flash_attn_backward(*(x[None] for x in (dout, q, k, v, out, lse, dq, dk, dv)), *before)
