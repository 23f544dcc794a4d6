"""Targets whose files are other than usual: what is missing or strange in them is a sentence before anything long."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from rich.console import Console
from tiny import TINY, WORDS, make_tokenizer, refusal, save_target, write_chats
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig

from fastdraft.data.prepare import prepare
from fastdraft.features.store import Store
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.target_config import language_config, longest_context
from fastdraft.run.draft import draft_shape, new_draft
from fastdraft.run.features import capture_features
from fastdraft.run.inputs import load_data, open_target
from fastdraft.run.plan import own_dtype, predict, print_plan
from fastdraft.target.hf import load_target, load_tokenizer
from fastdraft.train import train


def edit(folder: Path, out: Path, **changes) -> Path:
    """A copy of a target with other fields in its config.json; None takes one out."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text()) | changes
    (out / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return out


@pytest.fixture
def told(tree, tmp_path, fastdraft):
    """told(target, *more) -> what init, train --plan and train refuse it with."""

    def call(target, *overrides) -> list[str]:
        file = tmp_path / "told.yaml"
        file.write_text(yaml.safe_dump(tree | {"target": {"path": str(target), "dtype": "fp32"}}))
        commands = [("train", file, "--plan", *overrides), ("train", file, *overrides)]
        return [refusal(fastdraft(*command)) for command in [*([] if overrides else [("init", target)]), *commands]]

    return call


# --- config.json -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{"dtype": "float7"}, {"torch_dtype": "bf16"}, {"dtype": "nn"}, {"dtype": ["bfloat16"]}]
)
def test_a_dtype_that_pytorch_has_not_is_a_sentence(changes, target_dir, told, tmp_path):
    target = edit(target_dir, tmp_path / "t", **{"dtype": None} | changes)
    (key, value), *_ = changes.items()
    for said in told(target):
        assert f"{key} is {value!r} in its config.json, which is no dtype of PyTorch; write" in said
    for load in (lambda: load_target(str(target), torch.float32, "cpu"), lambda: load_tokenizer(str(target))):
        with pytest.raises(ValueError, match="which is no dtype of PyTorch"):
            load()


def test_a_dtype_that_no_draft_is_served_in_is_a_sentence(target_dir, told, tmp_path):
    said = told(edit(target_dir, tmp_path / "t", dtype="float8_e4m3fn"), "data.max_length=50")
    assert all("names the dtype float8_e4m3fn, in which no draft is served; write" in line for line in said)
    assert own_dtype({"dtype": "half"}) == torch.float16
    quantized = {"dtype": "bfloat16", "quantization_config": {"dtype": "int4"}}
    assert own_dtype(quantized) == torch.bfloat16


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("value", [None, "32", 0])
def test_a_config_without_its_usual_sizes_is_a_sentence(key, value, target_dir):
    config = json.loads((target_dir / "config.json").read_text()) | {"model_type": "of_its_own", key: value}
    reason = (
        f"does not say {key}; of a target" if value is None else f"{key} is {value!r} in the target's config.json; it must"
    )
    with pytest.raises(ValueError, match=reason):
        DraftConfig.from_target(config)


def test_a_target_that_is_no_causal_lm_is_a_sentence(target_dir, told, tmp_path):
    target = edit(target_dir, tmp_path / "t", model_type="clip_vision_model", architectures=None)
    for said in told(target, "data.max_length=50"):
        assert "does not say" in said or "has no causal LM" in said, said


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """Sizes under names of its own, learned positions, LayerNorm."""
    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    shape = GPT2Config(n_embd=32, n_layer=8, n_head=4, n_positions=48, vocab_size=192, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(shape).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


GPT2 = {
    "target.dtype": "fp32",
    "draft.overrides": {
        "draft_vocab_size": 64,
        "intermediate_size": 48,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 1e4},
    },
    "draft.init": "random",
}


def test_a_target_without_rope_says_what_the_draft_may_have(gpt2, told):
    for said in told(gpt2, "data.max_length=48"):
        assert "(gpt2) does not say intermediate_size, rms_norm_eps, rope_theta" in said
        assert "draft.overrides.rms_norm_eps=1.0e-5 draft.overrides.rope_parameters='{rope_theta: 10000.0}'" in said


def test_sizes_under_other_names_are_read(gpt2, make_config):
    config = make_config(**GPT2 | {"target.path": str(gpt2), "data.max_length": 48, "max_steps": 2})
    assert train(config).steps == 2


# --- positions ---------------------------------------------------------------------------------------------------------


def test_documents_longer_than_the_targets_positions_are_refused(gpt2, target_dir, make_config, tmp_path, monkeypatch):
    monkeypatch.setattr("fastdraft.run.inputs.load_target", None)  # nothing is loaded before
    tokens, chats = tmp_path / "tokens.jsonl", tmp_path / "chats.jsonl"
    tokens.write_text((json.dumps({"input_ids": [7] * 60, "loss_mask": [1] * 60}) + "\n") * 8)
    long = [{"role": "user", "content": WORDS[0]}, {"role": "assistant", "content": " ".join(WORDS[:42])}]
    chats.write_text((json.dumps({"messages": long}) + "\n") * 8)
    short = edit(target_dir, tmp_path / "short", max_position_embeddings=48)
    few = "a stream may bring documents as long as that"
    for name, (reason, changes) in {
        "learned": (r"a document has \d+ tokens", GPT2 | {"target.path": str(gpt2), "data.paths": [str(chats)]}),
        "rope": (r"a document has \d+ tokens", {"target.path": str(short), "data.paths": [str(chats)]}),
        "pre-tokenised": ("a document has 60 tokens", {"target.path": str(short), "data.paths": [str(tokens)]}),
        "streaming": (few, {"target.path": str(short), "data.streaming": True}),
    }.items():
        config = make_config(**changes, run_dir=str(tmp_path / name))
        acts = [train, lambda c: capture_features(c, tmp_path / "s")]
        for act in (train, lambda c: predict(c, torch.device("cpu"))) if config.data.streaming else acts:
            with pytest.raises(
                ValueError,
                match=rf"data\.max_length is 64, and the target has 48 positions \(max_position.* while {reason}",
            ):
                act(config)
        assert not (tmp_path / name / "checkpoints").exists()


def test_short_documents_train_whatever_max_length_allows(target_dir, make_config, tmp_path, told_by_plan):
    """max_length is what may come, and the documents here are no longer than the target's positions."""
    tokens = tmp_path / "tokens.jsonl"
    tokens.write_text("".join(json.dumps({"input_ids": [3 + i] * 48, "loss_mask": [1] * 48}) + "\n" for i in range(8)))
    short = edit(target_dir, tmp_path / "short", max_position_embeddings=48)
    config = make_config(**{"target.path": str(short), "data.paths": [str(tokens)], "max_steps": 1})
    assert train(config).steps == 1
    said = " ".join(told_by_plan(config).split())
    assert "# data.max_length is 64, and the target has 48 positions" in said and "training refuses documents" in said
    config.data.max_length = 48
    assert "positions" not in told_by_plan(config)


@pytest.fixture
def told_by_plan():
    def told(config):
        out = io.StringIO()
        print_plan(config, Console(file=out, width=100))
        return out.getvalue()

    return told


def test_as_many_tokens_as_positions_train(gpt2, make_config, tmp_path):
    """The longest documents fill learned positions to the last."""
    tokens = tmp_path / "tokens.jsonl"
    rows = [{"input_ids": [3 + i] * 60, "loss_mask": [1] * 60} for i in range(8)]
    tokens.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = {"target.path": str(gpt2), "data.paths": [str(tokens)], "data.max_length": 48}
    config = make_config(**GPT2 | path | {"max_steps": 1})
    assert max(len(row["input_ids"]) for row in load_data(config, draft_shape(config)).train) == 48
    capture_features(config, tmp_path / "store")
    assert train(config).steps == 1 and Store(tmp_path / "store").is_complete


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"max_position_embeddings": 1024, "rope_parameters": YARN}, 4096),
        ({"max_position_embeddings": 1024, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 4.0}}, 4096),
        ({"max_position_embeddings": 131072, "rope_parameters": YARN | {"rope_type": "llama3"}}, 131072),
        ({"max_position_embeddings": 4096, "rope_parameters": YARN | {"factor": 2.0}}, 4096),
        ({"model_type": "gpt2", "n_positions": 1024}, 1024),
        ({"model_type": "mamba", "hidden_size": 8}, None),
    ],
)
def test_how_many_positions_a_config_names(fields, most):
    assert longest_context(language_config(fields)) == most


# --- layers that are left out ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mllama(tmp_path_factory) -> Path:
    """As Llama 3.2 Vision's decoder: two layers that attend to pictures, 8 more rows of embedding than tokens."""
    folder = tmp_path_factory.mktemp("mllama")
    torch.manual_seed(0)
    shape = {k: v for k, v in TINY.items() if k not in ("head_dim", "bos_token_id")}
    rope = {"rope_theta": 1e4, "rope_type": "default"}
    config = MllamaConfig(text_config=MllamaTextConfig(**shape, cross_attention_layers=[3, 6], rope_parameters=rope))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_layers_that_attend_to_pictures_are_refused_with_others(mllama, told):
    for said in told(mllama):
        assert "the layers [3] of this target (mllama_text_model) give no state for a text" in said
        assert "draft.overrides.layers='[1, 2, 4]'" in said
    with pytest.raises(ValueError, match=r"the layers \[3, 6\] of MllamaForCausalLM give no state for a text"):
        load_target(str(mllama), torch.float32, "cpu", (1, 3, 6))


def test_rows_of_the_embedding_that_no_text_has_are_left_out(mllama, make_config):
    config = make_config(**{"target.path": str(mllama), "draft.overrides.layers": [1, 2, 4], "max_steps": 2})
    target = open_target(config, (1, 2, 4), torch.device("cpu"))
    assert target.model.get_input_embeddings().weight.shape[0] == 200 and target.embedding.shape == (192, 32)
    assert train(config).steps == 2
    assert new_draft(config).config.vocab_size == 192


# --- the tokenizer -----------------------------------------------------------------------------------------------------


def test_mistral_commons_tokenizer_is_not_taken(target_dir, monkeypatch):
    """What transformers does where mistral-common is installed and there is a tekken.json: unless told not to, it gives a
    tokenizer without chat template and offsets. The real package is in the next test, where it is installed."""
    asked = AutoTokenizer.from_pretrained

    class MistralCommonBackend:
        pass

    def chosen(path, mistral_format=None, **options):
        return asked(path, **options) if mistral_format is False else MistralCommonBackend()

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", chosen)
    assert load_tokenizer(str(target_dir)).is_fast
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda path, **options: MistralCommonBackend())
    with pytest.raises(
        ValueError, match=r"was loaded as MistralCommonBackend, which has no chat template .* tokenizer\.json"
    ):
        load_tokenizer(str(target_dir))


def test_tokenizer_json_comes_before_tekken_json(tmp_path, make_config):
    common = pytest.importorskip("mistral_common")
    target = save_target(tmp_path / "t")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(
        json.dumps(config | {"model_type": "mistral", "architectures": ["MistralForCausalLM"]})
    )
    shutil.copy(Path(common.__file__).parent / "data" / "tekken_240911.json", target / "tekken.json")
    tokenizer = load_tokenizer(str(target))
    assert tokenizer.is_fast and len(tokenizer) == 187
    data = make_config(**{"data.paths": [str(write_chats(tmp_path / "c.jsonl", 4))]}).data
    assert len(prepare(data, tokenizer).train)
    (target / "tokenizer.json").unlink()
    converted = load_tokenizer(str(target))
    theirs = AutoTokenizer.from_pretrained(target)
    assert type(theirs).__name__ == "MistralCommonBackend" and converted.is_fast
    text = "Hello there! Où est\n\n  la gare 12345?"
    assert converted(text, add_special_tokens=False)["input_ids"] == theirs.encode(text, add_special_tokens=False)


def test_tekken_json_alone_needs_a_package(target_dir, monkeypatch):
    def lacking(path, **options):
        raise ImportError(
            "\nMistralConverter requires the mistral-common library but it was not found in your environment."
        )

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lacking)
    with pytest.raises(ValueError, match=r"has a tekken\.json and no tokenizer\.json, .* pip install mistral-common"):
        load_tokenizer(str(target_dir))
