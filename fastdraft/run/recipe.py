"""The recipe of a run in sentences: what it would train with, and why. `fastdraft train --plan` prints them."""

from __future__ import annotations

from pydantic import BaseModel

from fastdraft.config import Config
from fastdraft.model.methods import method_of
from fastdraft.run.draft import muon_matrices


def recipe_lines(config: Config, shape: BaseModel) -> list[str]:
    """Of a draft of this shape. ValueError where the config's optimizer cannot have it."""
    optim, tokens = config.optim, config.optim.packs_per_step * config.data.pack_tokens
    packs = "one pack" if optim.packs_per_step == 1 else f"{optim.packs_per_step} packs"
    batch = (
        f"An optimizer step takes {packs} of up to {config.data.pack_tokens:,} tokens, {tokens:,} in all, however many "
        "GPUs share them. The gradient is a sum over all of them, which is divided once."
    )
    return [batch, _optimizer(config, shape), _schedule(config), *method_of(shape).recipe(config, shape)]


def _optimizer(config: Config, shape: BaseModel) -> str:
    optim, stepped = config.optim, muon_matrices(config, shape)
    clipped = f"Gradients are clipped to a norm of {optim.clip:g}, so that one odd batch moves the weights little."
    if not stepped:
        return f"AdamW steps all weights at a rate of {optim.lr:.2g}. {clipped}"
    share = sum(m.end - m.start for m in stepped) / shape.num_parameters()["trainable"]
    return (
        f"Muon steps {len(stepped)} matrices, {share:.0%} of the trained weights, at a rate of "
        f"{optim.muon_lr or optim.lr:.2g}: such a step is as large along every direction of a matrix, and on the whole as "
        f"large as AdamW's usually is. AdamW steps the rest at {optim.lr:.2g}. {clipped}"
    )


def _schedule(config: Config) -> str:
    optim = config.optim
    last = f"{optim.min_lr_ratio:g} of that" if optim.min_lr_ratio else "0"
    begin = f"The rate rises over the first {optim.warmup_ratio:.1%} of the steps"
    if optim.schedule == "wsd":
        return f"{begin}, stays, and falls to {last} over the last {optim.decay_share:.0%}: it is high for most of the run."
    return f"{begin}, then falls to {last} by a cosine. Its end is the run's: half of a long run is no short run."
