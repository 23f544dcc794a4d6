"""How a checkpoint's weights are read, whatever its method."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from fastdraft.model.serving import load_weights

WHOLE = {"model.a": torch.arange(3.0), "b": torch.ones(2)}
PARTS = ({"model.a": WHOLE["model.a"]}, {"b": WHOLE["b"]})


def own_name(name):
    return name.removeprefix("model.")


@pytest.mark.parametrize("form", ["one file", "shards", "shards without an index", "bin"])
def test_every_form_of_a_checkpoint_is_read(form, tmp_path):
    if form == "one file":
        save_file(WHOLE, tmp_path / "model.safetensors")
    elif form == "bin":
        torch.save(WHOLE, tmp_path / "pytorch_model.bin")
    else:
        for number, part in enumerate(PARTS):
            save_file(part, tmp_path / f"model-{number}.safetensors")
    if form == "shards":
        index = {"weight_map": {"model.a": "model-0.safetensors", "b": "model-1.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    found = load_weights(tmp_path, own_name)
    assert found.keys() == {"a", "b"} and torch.equal(found["a"], WHOLE["model.a"])


def test_what_is_missing_or_there_twice_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no model.safetensors, .* give a checkpoint directory"):
        load_weights(tmp_path, own_name)
    save_file(WHOLE | {"a": torch.zeros(3)}, tmp_path / "model-0.safetensors")
    with pytest.raises(ValueError, match=r"a is there twice \(again in model-0.safetensors as"):
        load_weights(tmp_path, own_name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    with pytest.raises(ValueError, match=r"names lost.safetensors, which the directory lacks"):
        load_weights(tmp_path, own_name)
