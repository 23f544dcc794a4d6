"""The shape of a DFlash draft: derived from a target's config.json, written to and read from the engines' config.json.

Layers of the target are counted as outputs from 0, and the engines' `target_layer_ids` count them so too; both add 1 where
they hook the model. A draft has the target's width, because it has no embedding and no head of its own: it reads the
target's embedding and writes through the target's lm_head.

# L draft layers, K captured target layers, B rows of a block, n target layers, V vocabulary
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from fastdraft.model import shape
from fastdraft.model.buffers import Table
from fastdraft.model.shape import DraftShape
from fastdraft.model.target_config import first_line, language_config, read_target_config

MASK_TOKEN = "<|MASK|>"  # SGLang refuses another id where a tokenizer has this token
LayerType = Literal["full_attention", "sliding_attention"]
Labels = Literal["fill_in", "shifted"]
DRAFTS: dict[Labels, str] = {"fill_in": "x_{a+k}", "shifted": "x_{a+k+1}"}  # what slot k of a block at anchor a drafts

COMMENTS = {  # of `fastdraft init`, setting by setting
    "num_hidden_layers": "draft layers",
    **shape.COMMENTS,
    "layers": "target layers whose outputs the draft reads, from 0, ascending; any number of them",
    "block_size": "rows of a block, the anchor's included: it drafts one token less",
    "mask_token_id": "stands where a token is to be drafted; no text may have it",
    "labels": "fill_in: slot k predicts x_{a+k}, as the engines serve DFlash; shifted: x_{a+k+1}",
    "layer_types": "full_attention or sliding_attention, one for each layer",
    "sliding_window": "of the sliding layers, at least a block; null without any",
    "max_position_embeddings": "longest context served",
}


class DFlashConfig(DraftShape):
    """The shape of a DFlash draft. num_hidden_layers is 5 and block_size 16, as published drafts have them, and `layers`
    are the engines' default for the number of draft layers.

    labels: "fill_in", slot k of a block at anchor a predicts x_{a+k} and slot 0 nothing, as the engines serve DFlash;
    "shifted", slot k predicts x_{a+k+1}.
    """

    # What a method with this backbone and another head says of itself.
    title: ClassVar[str] = "DFlash"
    architecture: ClassVar[str] = "DFlashDraftModel"
    served_type: ClassVar[str] = "qwen3"
    facts: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden_size",
        "vocab_size": "vocab_size",
        "num_target_layers": "num_hidden_layers",
    }
    fewest_layers: ClassVar[int] = 4
    served_labels: ClassVar[Labels] = "fill_in"  # as the engines read a block
    live_prefix: ClassVar[bool] = False  # whether a block's live rows end at the first that has no label
    mixes: ClassVar[bool] = False  # whether the engine is given a mixer (`mixer.py`)
    comments: ClassVar[dict[str, str]] = COMMENTS

    num_hidden_layers: int = Field(5, gt=0, le=64)
    block_size: int = Field(16, ge=2, le=32)
    mask_token_id: int = Field(ge=0)
    labels: Labels = "fill_in"
    layer_types: tuple[LayerType, ...]
    sliding_window: int | None = Field(None, gt=0)
    pad_token_id: int | None = None

    @model_validator(mode="after")
    def _block_fits(self) -> Self:
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries for num_hidden_layers {self.num_hidden_layers}; "
                "give one for each layer"
            )
        if ("sliding_attention" in self.layer_types) != (self.sliding_window is not None):
            raise ValueError(
                f"sliding_window is {self.sliding_window} and layer_types is {list(self.layer_types)}; a window needs a "
                "sliding_attention layer, and such a layer a window"
            )
        if self.sliding_window is not None and self.sliding_window < self.block_size:
            raise ValueError(
                f"sliding_window {self.sliding_window} is less than block_size {self.block_size}, where the engines differ "
                "in what a row sees of its own block; choose a window of at least a block"
            )
        self._check_mask_token()
        return self

    def _check_mask_token(self) -> None:
        mask = self.mask_token_id
        if mask >= self.vocab_size:
            raise ValueError(
                f"mask_token_id {mask} lies outside the target's vocabulary of {self.vocab_size}, whose embedding has no "
                "row for it; choose an id that no text has"
            )
        ends = self.eos_token_id if isinstance(self.eos_token_id, list) else [self.eos_token_id]
        used = {"eos": ends, "bos": [self.bos_token_id], "pad": [self.pad_token_id]}
        if names := [name for name, ids in used.items() if mask in ids]:
            raise ValueError(
                f"mask_token_id {mask} is the target's {' and '.join(names)} token, which texts have, so a block could not "
                "be told from them; choose an id that no text has"
            )

    @property
    def target_hidden_size(self) -> int:
        return self.hidden_size

    @property
    def draft_vocab_size(self) -> int:
        return self.vocab_size

    @property
    def own_head_weights(self) -> int:
        """Numbers of trained matrices behind the layers that each live row is multiplied with."""
        return 0

    @property
    def own_layer_weights(self) -> int:
        """The same of each block row in a layer."""
        return 0

    @property
    def first_slot(self) -> int:
        """The first slot of a block that predicts a token."""
        return 1 if self.labels == "fill_in" else 0

    @property
    def num_drafted(self) -> int:
        """T, the tokens that a block predicts."""
        return self.block_size - self.first_slot

    def num_parameters(self) -> dict[str, int]:
        """How many are trained, and how many the frozen embedding has."""
        h = self.hidden_size
        q, kv = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        layer = h * (2 * q + 2 * kv) + 3 * h * self.intermediate_size + 2 * h + 2 * self.head_dim
        trained = len(self.layers) * h * h + 2 * h + self.num_hidden_layers * layer
        return {"trainable": trained, "embedding": self.vocab_size * h}

    def extra_buffers(
        self,
        rows: int,  # of a chunk
        room: int,  # live rows that the head takes at a time
        dtype: torch.dtype,  # of the draft
    ) -> Table:
        """Buffers of a chunk that a method's own head and mixer take beside those of `memory.py`."""
        del rows, room, dtype
        return {}

    not_trained: ClassVar[str] = "; embedding and head are the target's"

    @classmethod
    def init_config(cls, target_dir: Path | str, **chosen: Any) -> str:
        vocab_size = language_config(read_target_config(target_dir)).get("vocab_size") or 0
        try:
            tokenizer = AutoTokenizer.from_pretrained(str(target_dir), local_files_only=True)
        except Exception as error:  # of transformers, tokenizers, or the tokenizer's own code, which may raise anything
            said = f"a mask token is chosen by the tokenizer, and that of {str(target_dir)!r} is not readable"
            raise ValueError(f"{said}: {first_line(error)}") from error
        mask = choose_mask_token(tokenizer, vocab_size)
        if not mask:
            raise ValueError(no_mask_token(tokenizer, vocab_size))
        return super().init_config(target_dir, **mask, **chosen)

    @classmethod
    def refuse_unknown(cls, overrides: dict[str, Any]) -> None:
        if "draft_vocab_size" in overrides:
            raise ValueError(
                f"a {cls.title} draft has no draft_vocab_size: it speaks through the target's own lm_head, so its "
                "vocabulary is the target's (SGLang serves no other); take it out"
            )
        if "target_hidden_size" in overrides:
            raise ValueError(f"a {cls.title} draft has no target_hidden_size: it is as wide as its target; take it out")
        super().refuse_unknown(overrides)

    @classmethod
    def own_defaults(cls, target: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
        if overrides.get("mask_token_id") is None:
            raise ValueError(
                "the draft has no mask_token_id, the id that stands in a block where a token is to be drafted; set "
                "draft.overrides.mask_token_id to an id below the target's vocabulary size "
                f"({target.get('vocab_size')}) that no text has"
            )
        num_layers, num_target = overrides.get("num_hidden_layers", 5), target.get("num_hidden_layers")
        spread = isinstance(num_layers, int) and num_layers > 0 and num_target
        return {
            "layers": tuple(dict.fromkeys(evenly_spread_layers(num_layers, num_target))) if spread else (),
            "layer_types": ("full_attention",) * num_layers if spread else (),
            "pad_token_id": target.get("pad_token_id"),
        }

    def block_fields(self) -> dict[str, Any]:
        """What the engines' config.json says of the block, where they look for it."""
        block = {
            "target_layer_ids": list(self.layers),
            "mask_token_id": self.mask_token_id,
            "block_size": self.block_size,
        }
        return {"dflash_config": block}

    def to_serving(self, dtype: torch.dtype) -> dict[str, Any]:
        """The config.json both engines read, for weights of `dtype`. Raises ValueError for what no engine serves."""
        if self.labels != self.served_labels:
            raise ValueError(
                f"labels: {self.labels} is a training of slot k on {DRAFTS[self.labels]}; the engines read a {self.title} "
                f"block as {self.served_labels} (slot k drafts {DRAFTS[self.served_labels]}), so this draft cannot be "
                f"exported: train with draft.overrides.labels={self.served_labels}"
            )
        config = self.serving_fields(dtype) | self.block_fields()
        config |= {"layer_types": list(self.layer_types), "pad_token_id": self.pad_token_id}
        config |= {key: getattr(self, key) for key in ("num_hidden_layers", "block_size", "num_target_layers")}
        if self.sliding_window is not None:
            config |= {"sliding_window": self.sliding_window, "use_sliding_window": True}
        return config


def evenly_spread_layers(num_draft_layers: int, num_target_layers: int) -> tuple[int, ...]:
    """The engines' default layers (outputs, from 0): one for each draft layer, from 1 to n - 3; n // 2 for a single one."""
    if num_draft_layers == 1:
        return (num_target_layers // 2,)
    return tuple(round(1 + i * (num_target_layers - 4) / (num_draft_layers - 1)) for i in range(num_draft_layers))


def choose_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, int]:
    """{"mask_token_id": id} where the tokenizer tells an id that no text can have, else nothing.

    That is the token <|MASK|>, which SGLang asks for where it exists, or the first id behind the tokenizer's last, which a
    target has whose embedding is padded.
    """
    vocabulary = tokenizer.get_vocab()
    if MASK_TOKEN in vocabulary:
        return {"mask_token_id": vocabulary[MASK_TOKEN]}
    behind = max(vocabulary.values(), default=-1) + 1
    return {"mask_token_id": behind} if behind < vocab_size else {}


def reserved_tokens(vocabulary: dict[str, int], vocab_size: int) -> list[int]:
    """Ids inside the vocabulary that texts hardly have, ascending: tokens whose names say that they are kept for later."""
    kept = ("reserved", "unused", "<|extra_", "<extra_id", "<|dummy")
    return sorted(id for name, id in vocabulary.items() if id < vocab_size and any(word in name.lower() for word in kept))


def no_mask_token(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """A sentence on a tokenizer that leaves no id free, with the reserved ones among its tokens."""
    reserved = reserved_tokens(tokenizer.get_vocab(), vocab_size)
    shown = ", ".join(map(str, reserved[:8])) + (f" and {len(reserved) - 8} more" if len(reserved) > 8 else "")
    choose = f"reserved by their names are {shown}" if reserved else "none of its tokens is reserved by its name"
    return (
        f"the target's tokenizer has a token for each of the {vocab_size} ids, so none is free for the mask by itself; set "
        f"draft.overrides.mask_token_id to a token that your data never has ({choose})"
    )
