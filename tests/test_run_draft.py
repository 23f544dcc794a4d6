"""What a run's draft is trained by, as `fastdraft/run/draft.py` has it from the config and the method."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import LLAMA_8B, make_tokenizer
from transformers import LlamaConfig

from fastdraft.config import Config, parse_config
from fastdraft.model.methods import METHODS
from fastdraft.run.draft import draft_shape, muon_matrices, named_optim
from fastdraft.run.plan import recipe_lines

VOCAB = 311  # no other size of the target


def shape_of(method: str):
    target = LlamaConfig(hidden_size=64, num_hidden_layers=8, num_attention_heads=4, vocab_size=VOCAB)
    return METHODS[method].shape.from_target(target, **({} if method == "eagle3" else {"mask_token_id": 5}))


def config_of(method: str, **optim) -> Config:
    tree = {"target": {"path": "t"}, "data": {"paths": ["d"]}, "draft": {"method": method}, "optim": optim}
    return parse_config(tree, Config)


@pytest.mark.parametrize("method", METHODS)
def test_muon_steps_every_matrix_between_states_and_no_table(method):
    """A table has a row for each token, or for each number that is asked for: DSpark's confidence is one."""
    shape = shape_of(method)
    with torch.device("meta"):
        trained = METHODS[method].draft(shape).trainable()
    stepped = {m.name for m in muon_matrices(config_of(method, optimizer="muon"), shape)}
    matrices = {name: p.shape for name, p in trained.items() if p.ndim == 2}
    assert stepped == {name for name, size in matrices.items() if VOCAB not in size and 1 not in size}
    assert {"fc.weight"} < stepped


@pytest.mark.parametrize("method", METHODS)
def test_a_target_whose_rope_is_scaled_is_planned_for(tmp_path, method):
    """Its draft is made for the shapes of its weights alone, without memory; RoPE's frequencies are numbers there, too."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    make_tokenizer().save_pretrained(tmp_path)
    draft = {"method": method, "overrides": {} if method == "eagle3" else {"mask_token_id": 5}}
    tree = {"target": {"path": str(tmp_path)}, "data": {"paths": ["d"]}, "draft": draft, "optim": {"optimizer": "muon"}}
    config = parse_config(tree, Config)
    shape = draft_shape(config)
    assert shape.rope_parameters["rope_type"] == "llama3" and muon_matrices(config, shape)
    start = recipe_lines(config, shape)[-1]
    assert method == "eagle3" or "the target's files have no layer" in start


@pytest.mark.parametrize("method", METHODS)
def test_what_a_user_names_and_adamw_stay_as_they_are(method):
    draft = METHODS[method].draft(shape_of(method))
    for optim in ({"optimizer": "adamw"}, {"optimizer": "muon", "muon_weights": ["fc.weight"]}):
        config = config_of(method, **optim)
        assert named_optim(config, draft) is config.optim
