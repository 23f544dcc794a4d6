"""What the shapes of all methods share, asked of each: a target that says too little, and settings that are no numbers."""

from __future__ import annotations

import pytest
from tiny import LLAMA_8B

from fastdraft.model.methods import METHODS

CHOSEN = {name: {} if name == "eagle3" else {"mask_token_id": 9} for name in METHODS}


@pytest.fixture(params=METHODS)
def derive(request):
    """Of changes to a target's config.json, and overrides."""
    shape = METHODS[request.param].shape
    return lambda changes, **more: shape.from_target(LLAMA_8B | changes, **CHOSEN[request.param] | more)


def test_all_that_a_target_does_not_say_is_named_together(derive):
    missing = dict.fromkeys(("hidden_size", "rms_norm_eps", "rope_theta", "rope_scaling"))
    with pytest.raises(
        ValueError, match=r"\(llama\) does not say hidden_size, rms_norm_eps, rope_theta; of a target hidden_s"
    ):
        derive(missing)
    with pytest.raises(ValueError, match=r"does not say rms_norm_eps; complete it, .* draft.overrides.rms_norm_eps=1.0e-5"):
        derive({"rms_norm_eps": None})
    assert derive({"rms_norm_eps": None}, rms_norm_eps=1e-6).rms_norm_eps == 1e-6


@pytest.mark.parametrize("heads", ["x", 2.5, 0, [4]])
def test_heads_that_are_no_number_are_named(heads, derive):
    with pytest.raises(ValueError, match="num_attention_heads"):
        derive({"head_dim": None, "num_key_value_heads": None}, num_attention_heads=heads)
    with pytest.raises(
        ValueError, match=r"num_attention_heads is .* in the target's config.json; it must be a whole number"
    ):
        derive({"num_attention_heads": heads})


def test_a_target_with_too_few_layers_for_the_defaults_says_so(derive):
    with pytest.raises(ValueError, match=r"must ascend and lie in 0\.\.1, .* at least \d layers for the defaults"):
        derive({"num_hidden_layers": 3})
