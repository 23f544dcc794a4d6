"""What is told of a target from its files alone."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import save_target

from fastdraft.data.prepare import prepare
from fastdraft.run.draft import draft_shape
from fastdraft.run.inputs import load_data
from fastdraft.target.hf import load_target, load_tokenizer
from fastdraft.target.identity import origin, stop_ids

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


def changed(folder, **weights) -> str:
    """The target with some of its weights replaced."""
    file = folder / "model.safetensors"
    save_file(load_file(file) | weights, file, {"format": "pt"})
    return str(folder)


def test_an_origin_tells_other_weights_and_an_embedding_that_stayed(target_dir, tmp_path):
    """Embedding and head are those of a copy with other layers, in another dtype, with padded rows or in several files."""
    ours = origin(str(target_dir))
    assert ours.name == target_dir.name and origin(str(shutil.copytree(target_dir, tmp_path / "t"))) == replace(
        ours, name="t"
    )
    own = load_file(target_dir / "model.safetensors")
    name = "model.layers.3.mlp.up_proj.weight"
    tuned = origin(changed(shutil.copytree(target_dir, tmp_path / "tuned"), **{name: own[name] + 1}))
    assert tuned.ends == ours.ends and tuned.weights != ours.weights
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows = own[name].clone()
        rows[96, :8] += 1  # far from the first
        other = origin(changed(shutil.copytree(target_dir, tmp_path / name), **{name: rows}))
        assert other.ends != ours.ends
    model = load_target(str(target_dir), torch.float32, "cpu").model
    model.resize_token_embeddings(pad_to_multiple_of=128)
    model.config.vocab_size = model.config.get_text_config().vocab_size = 192
    model.to(torch.bfloat16).save_pretrained(tmp_path / "padded", max_shard_size="20KB")
    assert len(list((tmp_path / "padded").glob("*.safetensors"))) > 2
    padded = origin(str(tmp_path / "padded"))
    assert padded.ends == ours.ends and padded.weights != ours.weights


def test_a_tied_head_is_the_embedding_whether_it_is_written_or_not(tmp_path):
    folder = save_target(tmp_path / "tied", tie_word_embeddings=True)
    tied, own = origin(str(folder)), load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in own
    assert origin(changed(folder, **{"lm_head.weight": own["model.embed_tokens.weight"].clone()})).ends == tied.ends


def test_what_is_no_safetensors_tells_nothing(target_dir, tmp_path):
    folder = shutil.copytree(target_dir, tmp_path / "t")
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="has weights that cannot be read"):
        origin(str(folder))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no \*\.safetensors files to tell its weights by"):
        origin(str(folder))
