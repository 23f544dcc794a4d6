"""What is told of a target from its files alone."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import save_target

from fastdraft.data.prepare import prepare
from fastdraft.run.draft import draft_shape
from fastdraft.run.inputs import load_data
from fastdraft.target.hf import load_target, load_tokenizer
from fastdraft.target.identity import stop_ids

# The header of the next turn is what stops an answer, as in GLM's template; <|endoftext|> stands for <|user|>.
HEADERS = (
    "{% for m in messages %}{{ '<|endoftext|>' if m.role == 'user' else '<|im_start|>' }}{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def edit(folder, name, **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("eos", [2, [0, 2], None])
def test_the_tokens_that_stop_a_target_are_read_from_its_files(target_dir, tmp_path, eos):
    folder = shutil.copytree(target_dir, tmp_path / "t")
    edit(folder, "generation_config.json", eos_token_id=eos)
    edit(folder, "config.json", eos_token_id=1)
    assert stop_ids(str(folder)) == load_target(str(folder), torch.float32, "cpu").eos_ids
    (folder / "generation_config.json").unlink()
    assert stop_ids(str(folder)) == load_target(str(folder), torch.float32, "cpu").eos_ids == {1}
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"has no readable generation_config\.json"):
        stop_ids(str(folder))


def test_a_run_trains_the_token_that_its_targets_generation_config_says_stops(make_config, tmp_path):
    folder = save_target(tmp_path / "t")
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template, stop = HEADERS, tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.save_pretrained(folder)
    edit(folder, "generation_config.json", eos_token_id=[2, stop])
    changes = {"target.path": str(folder)}
    for streaming in (True, False):
        config = make_config(**changes | {"data.streaming": streaming})
        data = load_data(config, draft_shape(config)).train
        for row in data:
            ids, mask = (np.array(row[name]) for name in ("input_ids", "loss_mask"))
            # The first header is the user's own; the one behind the answer is the model's, and the sample ends with it.
            assert (ids == stop).sum() == 2 and ids[-1] == stop and mask[-1] and not mask[0]
    without = prepare(config.data, tokenizer, 192).train
    assert all(row["input_ids"][-1] != stop for row in without)
