"""The run's configuration: unknown keys and their neighbours, overrides, types."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import yaml

from fastdraft.config import Config, load_config, parse_config, read_yaml
from fastdraft.run.draft import draft_shape
from fastdraft.run.dtypes import check_precision, compute_dtype
from fastdraft.run.finished import saved_config

LEAST = {"target": {"path": "models/t"}, "data": {"paths": ["a.jsonl"]}}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(LEAST))
    return path


def test_defaults(file):
    config = load_config(file)
    assert (config.ttt_length, config.loss.kind, config.loss.step_decay) == (7, "kl", 0.6)
    assert config.target.trust_remote_code is False
    assert config.optim.lr == 1e-4 and config.draft.init == "target"


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("ttt_lenght", "unknown key 'ttt_lenght'; did you mean 'ttt_length'?"),
        ("optim.learning_rate", "unknown key 'optim.learning_rate'; known keys: betas, clip, eps, lr, "),
        ("optim.weight_deca", "unknown key 'optim.weight_deca'; did you mean 'weight_decay'?"),
        ("data.pack_token", "unknown key 'data.pack_token'; did you mean 'pack_tokens'?"),
        ("metrics.logevery", "unknown key 'metrics.logevery'; did you mean 'log_every'?"),
        ("target.dtyp", "unknown key 'target.dtyp'; did you mean 'dtype'?"),
        ("steps", "unknown key 'steps'; did you mean 'max_steps'?"),
        ("data.seq_length", "unknown key 'data.seq_length'; known keys: "),
        ("optmi.lr", "unknown key 'optmi'; did you mean 'optim'?"),
    ],
)
def test_an_unknown_key_names_its_neighbour(file, key, said):
    with pytest.raises(ValueError) as error:
        load_config(file, [f"{key}=1"])
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("optim.lr=2e-4", lambda c: c.optim.lr == 2e-4),
        ("optim.betas=[0.8, 0.99]", lambda c: c.optim.betas == (0.8, 0.99)),
        ("max_steps=50", lambda c: c.max_steps == 50),
        ("max_steps=null", lambda c: c.max_steps is None),
        ("target.path=other=name", lambda c: c.target.path == "other=name"),
        ("draft.overrides.layers=[1, 2, 3]", lambda c: c.draft.overrides == {"layers": [1, 2, 3]}),
        ("draft={overrides: {fc_norm: true}}", lambda c: c.draft.overrides == {"fc_norm": True}),
        ("metrics.trackers=[trackio]", lambda c: c.metrics.trackers == ["trackio"]),
        ("metrics.tensorboard=false", lambda c: c.metrics.tensorboard is False),
    ],
)
def test_overrides_are_yaml(file, override, read):
    assert read(load_config(file, [override]))


def test_the_last_override_wins_and_empty_sections_are_filled(file):
    file.write_text(yaml.safe_dump(LEAST) + "optim:\n")
    assert load_config(file, ["optim.lr=1", "optim.lr=3"]).optim.lr == 3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optim.lr", r"override 'optim.lr' is not of the form key.subkey=value"),
        ("=3", r"override '=3' is not of the form"),
        ("optim.lr.x=3", r"lr is a value, not a section|optim.lr"),
        ("optim.betas=[0.9", r"override 'optim.betas=\[0.9': the value is not YAML"),
        ("optim.betas=[0.9, 1.0]", r"optim.betas.1: .*less than 1"),
        ("optim.lr=fast", r"optim.lr: .*number.* \(given: 'fast'\)"),
        ("optim.lr=-1", r"optim.lr: .*greater than 0 \(given: -1\)"),
        ("optim.lr=.inf", r"optim.lr: .*finite number \(given: inf\)"),
        ("loss.lk_scale=.inf", r"loss.lk_scale: .*finite number"),
        ("features={path: s, mode: cache, max_gib: .inf}", r"features.max_gib: .*"),
        ("seed=18446744073709551616", r"seed: .*less than 18446744073709551616"),
        ("max_steps=1000000001", r"max_steps: .*less than or equal to 1000000000"),
        ("ttt_length=13", r"ttt_length: .*less than or equal to 12 \(given: 13\)"),
        ("max_steps=0.5", r"max_steps: .*integer.*\(given: 0.5\)"),
        ("loss.kind=l2", r"loss.kind: .*'kl', 'lk_alpha' or 'lk_lambda' \(given: 'l2'\)"),
        ("precision=fp16", r"precision: .*\(given: 'fp16'\)"),
        ("optim.betas=[0.9]", r"optim.betas.1"),
        ("optim=3", r"optim: "),
        ("data.max_length=9999", r"max_length 9999 is more than pack_tokens 4096"),
        ("data.paths=[]", r"data.paths: .*at least 1"),
        ("optim.lr=true", r"^optim.lr: Input should be a number \(given: True\)$"),
        ("max_steps=yes", r"^max_steps: Input should be a number \(given: True\)$"),
        ("run_dir=''", r"^run_dir is empty; give it a value or leave it out$"),
        ("data.paths=['']", r"^data.paths is empty; give it"),
        ("data.paths=a.jsonl", r"^data.paths: this is a list, in brackets: \[a.jsonl\] \(given: 'a.jsonl'\)$"),
        ("target=t", r"^target: this is a section of settings, such as target.path, and no value \(given: 't'\)$"),
        ("optim={lr:1e-3}", r"^unknown key 'optim.lr:1e-3'; YAML wants a space behind the colon of 'lr'$"),
        ("epochs=0.5", r"^epochs: the data are read a whole number of times; for a shorter run set max_steps, in .*0.5\)$"),
    ],
)
def test_a_bad_override_is_a_sentence(file, override, said):
    with pytest.raises(ValueError, match=said):
        load_config(file, [override])


# Settings that nothing reads, what is said of each, and what makes it work.
IDLE = {
    "features.on_bad_shard=skip": (r"on_bad_shard is of a store .* name its folder as features.path", "features.path=x"),
    "metrics.project=p": (r"metrics.project is of metrics.trackers, which names none", "metrics.trackers=[wandb]"),
    "metrics.run_name=r": (r"metrics.run_name is of metrics.trackers, which names none", "metrics.trackers=[wandb]"),
}


@pytest.mark.parametrize("setting", IDLE)
def test_a_setting_that_nothing_reads_is_refused(file, setting):
    said, works_with = IDLE[setting]
    with pytest.raises(ValueError, match=rf"^\S*{said}[^\n]*, or take \w+ out$"):
        load_config(file, [setting, "step=reference"])
    load_config(file, [setting, "step=reference", works_with])


def test_a_store_that_is_filled_skips_no_shards(file):
    cache = ["features.path=x", "features.mode=cache", "features.max_gib=1"]
    with pytest.raises(ValueError, match=r"name its folder as features.path, with features.mode: read, or take it out$"):
        load_config(file, [*cache, "features.on_bad_shard=skip"])


def test_defaults_that_are_written_out_and_old_runs_are_no_fault(file):
    written = load_config(file, ["step=reference", "draft.method=dflash"]).model_dump(mode="json")
    assert written["features"]["on_bad_shard"] == "error" and written["metrics"]["project"] == "fastdraft"
    assert parse_config(written, Config).model_dump(mode="json") == written
    older = written | {"chunk_rows": 64, "metrics": written["metrics"] | {"run_name": "r"}}
    saved = SimpleNamespace(state={"config": older | {"features": {"on_bad_shard": "skip"}}})
    assert saved_config(saved).chunk_rows == 64


def test_a_removed_key_says_what_to_use_instead(file):
    said = r"key 'features.memory_gib' is no longer a setting; take it out; .*mode: cache.*tmpfs"
    for given in ("features.memory_gib=0", "features.memory_gib=2.5"):
        with pytest.raises(ValueError, match=said):
            load_config(file, [given])
    with pytest.raises(ValueError, match="key 'engine' is no longer a setting; it is called step now"):
        load_config(file, ["engine=reference"])


def test_every_fault_has_its_line(file):
    with pytest.raises(ValueError) as error:
        load_config(file, ["ttt_lenght=3", "optim.lr=x", "seed=a"])
    lines = str(error.value).splitlines()
    assert len(lines) == 3
    assert {line.split(":")[0].split(";")[0] for line in lines} == {"unknown key 'ttt_lenght'", "optim.lr", "seed"}


def test_fp8_is_the_fused_engines_on_new_gpus(file, monkeypatch):
    with pytest.raises(ValueError, match=r"precision: fp8 is the fused step's; set step=fused or precision=bf16"):
        load_config(file, ["precision=fp8", "step=reference"])
    config = load_config(file, ["precision=fp8"])
    with pytest.raises(ValueError, match=r"compute capability 8\.9 or newer, not the CPU; set precision=bf16"):
        check_precision(config, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "an A100")
    for capability, fits in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        with nullcontext() if fits else pytest.raises(ValueError, match=r"8\.9 or newer, not an A100"):
            check_precision(config, torch.device("cuda"))
    assert all(compute_dtype(config, torch.device(d)) == torch.bfloat16 for d in ("cpu", "cuda"))
    check_precision(load_config(file, ["precision=bf16"]), torch.device("cpu"))


def test_a_stream_needs_its_steps_and_no_whole_store(file):
    assert load_config(file, ["data.streaming=true", "max_steps=5"]).data.streaming
    for changes, said in (
        (["max_steps=null"], "data.streaming needs max_steps"),
        (["max_steps=5", "features.path=store"], "data.streaming cannot read a store"),
    ):
        with pytest.raises(ValueError, match=said):
            load_config(file, ["data.streaming=true", *changes])


def test_missing_keys_are_named(tmp_path):
    with pytest.raises(ValueError) as error:
        parse_config({"target": {}}, Config)
    assert str(error.value).splitlines() == ["missing key 'target.path'", "missing key 'data'"]


def test_unreadable_files(make_config, tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read: No such file or directory"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(ValueError, match=r"^draft.config: .*none.yaml cannot be read: No such file"):
        draft_shape(make_config(**{"draft.config": str(tmp_path / "none.yaml")}))
    for text, said in (
        ("- a\n- b\n", "must be a mapping of keys, it is list"),
        ("a: [", "is not YAML"),
        ("", "it has no key"),
        (
            "optim:\n\tlr: 1\n",
            "is not YAML: line 2, column 1: .*'\\\\t'.*; indent by spaces, since YAML takes no",
        ),
        ("a: 1\n b: 2\n", "yaml is not YAML: line 2, column 3: mapping values are not allowed here$"),
    ):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_yaml(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not YAML"):
        read_yaml(tmp_path / "bad.yaml")


def test_a_file_is_utf_8_whatever_the_locale_says(file):
    file.write_text(yaml.safe_dump(LEAST | {"run_dir": "Läufe"}, allow_unicode=True), encoding="utf-8")
    code = "import sys; from fastdraft.config import load_config; print(ascii(load_config(sys.argv[1]).run_dir))"
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, file]
    said = subprocess.run(command, env=os.environ | ascii_only, capture_output=True, text=True)
    assert said.stdout == "'L\\xe4ufe'\n", said.stderr


def test_a_key_with_two_values_is_refused(file):
    file.write_text(yaml.safe_dump(LEAST) + "seed: 1\noptim: {lr: 1.0e-3}\nseed: 2\n")
    with pytest.raises(ValueError, match=r"the key 'seed' has two values; leave one"):
        load_config(file)
    file.write_text(yaml.safe_dump(LEAST) + "optim: {lr: 1.0e-3, lr: 1.0e-4}\n")
    with pytest.raises(ValueError, match=r"the key 'lr' has two values"):
        load_config(file)
    file.write_text(yaml.safe_dump(LEAST))
    with pytest.raises(ValueError, match=r"override 'optim=.*the key 'lr' has two values"):
        load_config(file, ["optim={lr: 1, lr: 2}"])
    # what a merge brings may be set anew, also in a mapping that another one merges before it is read
    file.write_text("a: {b: &b {<<: &c {x: 1}, x: 2}}\nd: {<<: *b, x: 3}\n")
    assert read_yaml(file) == {"a": {"b": {"x": 2}}, "d": {"x": 3}}


def test_nothing_in_yaml_is_executed(tmp_path):
    (tmp_path / "evil.yaml").write_text("target: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_yaml(tmp_path / "evil.yaml")


def test_a_config_survives_the_run_folder(file):
    config = load_config(file, ["optim.betas=[0.8, 0.9]", "draft.overrides.layers=[1, 2, 3]"])
    assert parse_config(yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))), Config) == config
