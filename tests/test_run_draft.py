"""What a run's draft is trained by, as `fastdraft/run/draft.py` has it from the config and the method."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from fastdraft.config import Config, parse_config
from fastdraft.model.methods import METHODS
from fastdraft.run.draft import muon_matrices, named_optim

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
def test_what_a_user_names_and_adamw_stay_as_they_are(method):
    draft = METHODS[method].draft(shape_of(method))
    for optim in ({}, {"optimizer": "muon", "muon_weights": ["fc.weight"]}):
        config = config_of(method, **optim)
        assert named_optim(config, draft) is config.optim
