"""The shape of a DFlash2 draft: DFlash's, with the convolutions along a block and the candidate selector.

# L draft layers, H hidden, T taps, G groups of channels, V vocabulary, K candidates, R rank of the selector
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator

from fastdraft.kernels.block_conv import PROGRAMS
from fastdraft.model.buffers import Table
from fastdraft.model.dflash.config import COMMENTS, DFlashConfig

NESTED = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")  # in the engines' dflash_config


class DFlash2Config(DFlashConfig):
    """Field names of the convolutions and the selector follow the engines' `dflash_config`."""

    title: ClassVar[str] = "DFlash2"
    architecture: ClassVar[str] = "DFlash2DraftModel"
    mixes: ClassVar[bool] = True
    comments: ClassVar[dict[str, str]] = COMMENTS | {
        "conv_kernel_size": "rows of its block that a row is made of around attention and MLP: its own and those before",
        "conv_group_size": "channels that share what a row itself says of its convolution, a power of two",
        "selector_rank": "numbers of a token's vector in each of the selector's two tables",
        "selector_top_k": "tokens of each slot that the selector chooses among",
    }

    conv_kernel_size: int = Field(2, ge=1, le=8)
    conv_group_size: int = Field(16, ge=1, le=1024)
    selector_rank: int = Field(256, ge=1, le=1024)
    selector_top_k: int = Field(16, ge=2, le=63)

    @model_validator(mode="after")
    def _convolutions_and_selector_fit(self) -> Self:
        if self.conv_group_size & (self.conv_group_size - 1):
            raise ValueError(f"conv_group_size {self.conv_group_size} is no power of two; the kernels need one, such as 16")
        if self.hidden_size % self.conv_group_size:
            raise ValueError(
                f"conv_group_size {self.conv_group_size} does not divide hidden_size {self.hidden_size}; choose a power of "
                "two that does"
            )
        if self.conv_kernel_size > self.block_size:
            raise ValueError(
                f"conv_kernel_size {self.conv_kernel_size} is more than the {self.block_size} rows of a block; lower it"
            )
        if self.selector_top_k > self.vocab_size:
            raise ValueError(f"selector_top_k {self.selector_top_k} is more than the vocabulary of {self.vocab_size}")
        return self

    @property
    def conv_groups(self) -> int:  # G
        return self.hidden_size // self.conv_group_size

    @property
    def own_head_weights(self) -> int:
        return (self.hidden_size + self.selector_top_k + 1) * self.selector_rank

    @property
    def own_layer_weights(self) -> int:
        return 2 * 2 * self.conv_kernel_size * self.conv_groups * self.hidden_size

    def num_parameters(self) -> dict[str, int]:
        found, h, taps = super().num_parameters(), self.hidden_size, self.conv_kernel_size
        convolution = 2 * taps * h + 2 * taps * self.conv_groups * h
        selector = (2 * self.vocab_size + h) * self.selector_rank
        return found | {"trainable": found["trainable"] + 2 * self.num_hidden_layers * convolution + selector}

    def extra_buffers(self, rows: int, room: int, dtype: torch.dtype) -> Table:
        """The coefficients that each convolution's rows give themselves, and the selector's rows of a chunk, which wait for
        their weights until all losses of the chunk are known."""
        del room
        stats = torch.promote_types(dtype, torch.float32)
        of_rows, places, rank = (2, self.conv_kernel_size, self.conv_groups), self.selector_top_k + 1, self.selector_rank
        branches = [f"{layer}.{branch}" for layer in range(self.num_hidden_layers) for branch in ("attention", "mlp")]
        table: Table = {f"{branch}.delta": (rows, of_rows, dtype) for branch in branches}
        table |= {"conv.ddelta": (rows, of_rows, dtype)}
        table |= {"conv.partial": (PROGRAMS, (self.conv_kernel_size, self.hidden_size), stats)}
        table |= {"selector.ids": (rows, (places,), torch.int64)}
        table |= {f"selector.{name}": (rows, (places,), stats) for name in ("logits", "place")}
        table |= {f"selector.{name}": (rows, (rank,), stats) for name in ("query", "pull")}
        table |= {"selector.loss": (rows, (), stats)}
        return table | {f"selector.{name}": (rows, (rank,), dtype) for name in ("h", "state")}

    def block_fields(self) -> dict[str, Any]:
        nested = super().block_fields()["dflash_config"]
        return {"dflash_config": nested | {name: getattr(self, name) for name in NESTED}}
