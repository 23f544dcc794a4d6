"""A target's decoder layers as its checkpoint keeps them: what a draft may start from, whoever runs the target."""

from __future__ import annotations

import re
from collections import defaultdict
from contextlib import suppress

from safetensors import SafetensorError, safe_open

from fastdraft.batch import LayerWeights, TargetLayers
from fastdraft.model.target_config import language_config
from fastdraft.target.hf import load_target_config
from fastdraft.target.identity import local_folder

# Of a text model, or of the one in a model with pictures.
LAYER = re.compile(r"(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")


def target_layers(path: str, trust_remote_code: bool = False) -> TargetLayers:
    """The layers of a folder or a cached repository. ValueError as `load_target_config`."""
    decoder = language_config(load_target_config(path, trust_remote_code))
    activation = decoder.get("hidden_act") or decoder.get("hidden_activation")
    return TargetLayers(layer_weights(path), str(decoder.get("model_type")), str(activation))


def layer_weights(path: str) -> dict[int, LayerWeights]:
    """The weights of each layer that a folder or a cached repository has in safetensors, by their names in the layer. Only
    names and shapes are read before a weight is asked for. Nothing is known of files that cannot be opened, as pointers to
    what was never downloaded: a target that servers run may have no more here than its ends."""
    layers: defaultdict[int, LayerWeights] = defaultdict(dict)
    for file in sorted(local_folder(path).glob("*.safetensors")):
        with suppress(OSError, SafetensorError), safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                if found := LAYER.fullmatch(name):
                    layers[int(found[1])][found[2]] = opened.get_slice(name)
    return dict(layers)
