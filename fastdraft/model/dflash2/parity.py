"""The ways in which a DFlash2 checkpoint could be read: DFlash's, and those of its convolutions and its selector."""

from __future__ import annotations

import torch
from torch import nn

from fastdraft.model.dflash.parity import block_readings
from fastdraft.model.dflash2.draft import DFlash2Draft
from fastdraft.model.reading import Reading


def _convolutions(draft: DFlash2Draft) -> list[nn.Module]:
    return [getattr(layer, name) for layer in draft.layers for name in ("attention_conv", "mlp_conv")]


def _leave_out_selector(draft: DFlash2Draft) -> None:
    nn.init.zeros_(draft.candidate_selector.successor_codebook)


def _leave_out_convolutions(draft: DFlash2Draft) -> None:
    for convolution in _convolutions(draft):
        convolution.be_identity()


def _leave_out_both(draft: DFlash2Draft) -> None:
    _leave_out_selector(draft)
    _leave_out_convolutions(draft)


def _swap_tables(draft: DFlash2Draft) -> None:
    s = draft.candidate_selector
    s.predecessor_codebook, s.successor_codebook = s.successor_codebook, s.predecessor_codebook


@torch.no_grad()
def _swap_sides(draft: DFlash2Draft) -> None:
    for convolution in _convolutions(draft):
        convolution.base_kernel.copy_(convolution.base_kernel.flip(0))
        both = convolution.kernel_projection.weight.unflatten(0, (2, -1))
        convolution.kernel_projection.weight.copy_(both.flip(0).flatten(0, 1))


OWN = [
    Reading("selector", "plain DFlash, convolutions and selector left out", _leave_out_both),
    Reading("selector", "the selector left out", _leave_out_selector),
    Reading("selector", "the selector's two tables swapped", _swap_tables),
    Reading("convolution", "the convolutions left out", _leave_out_convolutions),
    Reading("convolution", "the convolutions' two sides swapped", _swap_sides),
]


def selector_readings(draft: DFlash2Draft, num_target_layers: int) -> list[Reading]:
    """The documented reading first, then every single fault that would be another reading of this draft."""
    return [*block_readings(draft, num_target_layers), *OWN]
