"""DSpark drafts in the serving engines' format: DFlash's, with what is DSpark's at the root of config.json.

Tensors beside DFlash's: `markov_head.markov_w1.weight` [V, r], `markov_head.markov_w2.weight` [V, r],
`confidence_head.proj.weight` [1, H + r], `confidence_head.proj.bias` [1]. Both engines take these names without a prefix.

# H hidden, V vocabulary, r rank of the Markov head
"""

from __future__ import annotations

from typing import Any

from fastdraft.model.dflash.serving import Format
from fastdraft.model.dspark.config import DSparkConfig
from fastdraft.model.dspark.draft import DSparkDraft

AT_ROOT = ("target_layer_ids", "mask_token_id", "block_size", "markov_rank", "markov_head_type")
# What engines take for granted in different ways where it is missing, and the only value that a draft here is trained for.
WRITTEN = {"confidence_head_with_markov": True, "enable_confidence_head": True, "sample_from_anchor": True}


def root_section(config: dict[str, Any]) -> dict[str, Any]:
    return config


def dspark_problems(config: dict[str, Any], _block: dict[str, Any]) -> list[str]:
    """What stands elsewhere than at the root, the heads, and labels that are not shifted."""
    said, rank = [], config.get("markov_rank")
    for section in ("dflash_config", "dspark_config"):
        for key, value in (config.get(section) or {}).items():
            if key in AT_ROOT and value != config.get(key):
                said.append(
                    f"{section}.{key} is {value!r} and {key} {config.get(key)!r}; engines differ in which they read, and "
                    "SGLang builds the head from the root: write it there alone."
                )
    said += [
        f"{key} is there, which SGLang reads before {key.removeprefix('dspark_')}: leave it out."
        for key in ("dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id", "dspark_target_layer_ids")
        if key in config
    ]
    if type(rank) is not int or rank < 1:
        said.append(f"markov_rank is {rank!r}; it must be a whole number above 0, at the root of config.json.")
    if config.get("markov_head_type") != "vanilla":
        said.append(
            f"markov_head_type is {config.get('markov_head_type')!r}; it must be 'vanilla', which vLLM builds whatever it "
            "says and SGLang must be told."
        )
    for key, law in WRITTEN.items():
        if config.get(key) is not law:
            said.append(
                f"{key} is {config.get(key)!r}; a DSpark draft here is trained with {law}, and engines differ in what they "
                "take where it is missing: write it."
            )
    return said


def head_fields(config: dict[str, Any]) -> dict[str, Any]:
    return {key: config.get(key) for key in ("markov_rank", "markov_head_type")}


DSPARK = Format(DSparkConfig, DSparkDraft, "", root_section, dspark_problems, head_fields)
