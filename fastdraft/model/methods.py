"""The draft methods there are, by the name that `draft.method` in a config gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from fastdraft.model import dflash, dflash2, dspark, eagle3
from fastdraft.model.method import Method

if TYPE_CHECKING:
    from pydantic import BaseModel

METHODS: dict[str, Method] = {
    "eagle3": eagle3.METHOD,
    "dflash": dflash.METHOD,
    "dflash2": dflash2.METHOD,
    "dspark": dspark.METHOD,
}


def named_method(name: str) -> Method:
    """Raises ValueError naming the methods there are when this is none of them."""
    if name not in METHODS:
        raise ValueError(f"draft.method {name!r} is not one of {', '.join(METHODS)}")
    return METHODS[name]


def method_of(draft: nn.Module | BaseModel) -> Method:
    """The method of a draft or of a draft's shape, by their very types: those of one method may be another's with more."""
    return next(method for method in METHODS.values() if type(draft) in (method.draft, method.shape))
