"""What a step of a DFlash2 draft takes beside DFlash's: its buffers are in the shape's `extra_buffers`, here are the FLOPs."""

from __future__ import annotations

from fastdraft.model.dflash import cost
from fastdraft.model.dflash.cost import num_blocks
from fastdraft.model.dflash2.config import DFlash2Config
from fastdraft.model.method import Row


def step_cost(c: DFlash2Config, **options) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """`model/dflash/cost.py`'s, with the products that make coefficients of rows and project states for the selector."""
    memory, flops = cost.step_cost(c, **options)
    n = options["pack_tokens"]
    blocks = num_blocks(n, options["document_tokens"], options["anchors"])
    return memory, (*flops, Row("coefficients of the convolutions and the selector", _more(c, blocks) // n))


def pair_cost(c: DFlash2Config, target_params: int, anchors: int) -> float:
    """As DFlash's: what is left out is 2 % of a row, and nothing of it grows with a document's square."""
    return cost.pair_cost(c, target_params, anchors)


def _more(c: DFlash2Config, blocks: int) -> int:
    """2 FLOPs per multiply-add; the backward costs twice the forward."""
    coefficients = 2 * c.num_hidden_layers * c.block_size * c.hidden_size * 2 * c.conv_kernel_size * c.conv_groups
    selector = c.num_drafted * c.selector_rank * (c.hidden_size + c.selector_top_k + 1)
    return 3 * 2 * blocks * (coefficients + selector)
