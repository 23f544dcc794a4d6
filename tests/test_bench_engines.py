"""bench.engines with an SGLang that is played: settings reach it, its counts become the row, and a difference fails."""

import json
import shutil
import sys

import pytest
import torch
from small_blocks import train_briefly
from test_decode import train_on_own_output
from tiny import make_tokenizer, random_draft, save_target, tiny_llama

from bench import engines as bench
from fastdraft.data.prompts import prompt_ids, read_prompts
from fastdraft.decode import generate
from fastdraft.model.dflash.loss import BlockLoss
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.proposal import DecodeSettings
from fastdraft.serving.export import export_draft, load_draft
from fastdraft.target.hf import Target, load_tokenizer

# An Engine that answers as told for its topk, and refuses what SGLang's would not know.
PLAYED = """
import json, os
__version__ = "0.5.21"
class Engine:
    def __init__(self, model_path, trust_remote_code, dtype, skip_tokenizer_init, attention_backend, sampling_backend,
                 grammar_backend, disable_cuda_graph, disable_radix_cache, max_running_requests, max_total_tokens,
                 mem_fraction_static, random_seed, log_level, speculative_algorithm, speculative_draft_model_path,
                 speculative_num_steps, speculative_eagle_topk, speculative_num_draft_tokens):
        self.asked = [dtype, speculative_algorithm, speculative_num_steps, speculative_eagle_topk,
                      speculative_num_draft_tokens]
    def generate(self, input_ids, sampling_params):
        assert sampling_params == {"temperature": 0, "max_new_tokens": 24, "stop_token_ids": [2]}
        answers = json.load(open(os.path.dirname(__file__) + "/answers.json"))[json.dumps(self.asked)]
        assert [ids for ids, _, _ in answers] == input_ids
        return [{"output_ids": out, "meta_info": {"spec_verify_ct": n, "spec_accept_length": len(out) / n}}
                for _, out, n in answers]
    def shutdown(self):
        pass
"""
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A target, its draft, prompts and the played SGLang, whose answers are our own decoder's."""
    folder = tmp_path_factory.mktemp("engines")
    save_target(folder / "target")
    target = Target(tiny_llama())
    draft = random_draft(DraftConfig.from_target(target.config.to_dict(), draft_vocab_size=120), target.embedding)
    train_on_own_output(target, draft, NEW_TOKENS, 30)
    export_draft(draft, folder / "draft", torch.float32)
    (folder / "prompts.jsonl").write_text('{"prompt": "ba be bi"}\n{"prompt": "do du dan ka"}\n')
    prompts = prompt_ids(read_prompts(folder / "prompts.jsonl"), load_tokenizer(str(folder / "target")))
    draft = load_draft(folder / "draft", target.config)
    draft.set_embedding(target.embedding)
    answers = {}
    for s in bench.SETTINGS.values():
        done = [(p, generate(target, draft, p, NEW_TOKENS, s)) for p in prompts]
        asked = ["float32", "EAGLE3", s.num_steps, s.eagle_topk, s.num_draft_tokens]
        answers[json.dumps(asked)] = [(p, d.tokens, d.num_rounds) for p, d in done]
    play(folder, answers)
    return folder


def play(folder, answers):
    """An installed SGLang that knows these answers."""
    package = folder / "site" / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(PLAYED)
    (package / "answers.json").write_text(json.dumps(answers))
    info = folder / "site" / "sglang-0.5.21.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.21\n")
    (info / "top_level.txt").write_text("sglang\n")


def run(there, monkeypatch, results, *more):
    args = ["--target", there / "target", "--draft", there / "draft", "--prompts", there / "prompts.jsonl"]
    args += ["--engine-pythonpath", there / "site", "--dtype", "fp32", "--max-new-tokens", NEW_TOKENS, "--commit", "abc"]
    monkeypatch.setattr(sys, "argv", ["engines.py", *map(str, [*args, "--results", results, *more])])
    bench.main()
    return [json.loads(line) for line in (results / "engines.jsonl").read_text().splitlines()]


def test_a_row_for_each_setting(there, monkeypatch, tmp_path):
    chain, tree = run(there, monkeypatch, tmp_path)
    assert (chain["setting"], tree["setting"]) == ("chain", "tree")
    for row in (chain, tree):
        assert row["relative_difference"] == row["followed_relative_difference"] == 0
        assert row["num_equal_to_plain"] == row["num_prompts"] == 2
        assert row["spec_accept_length"] == row["fastdraft_spec_accept_length"] > row["accepted_length"] > 1
        assert row["engine_version"] == "0.5.21" and row["command"].startswith("python -m bench.engines --target")
    assert tree["num_rounds"] < chain["num_rounds"]


def test_the_halves_may_run_apart(there, monkeypatch, tmp_path):
    kept, empty = tmp_path / "served", there / "no engine here"
    with pytest.raises(FileNotFoundError):  # the engine's half writes no row
        run(there, monkeypatch, tmp_path, "--served", kept, "--serve-only")
    assert sorted(p.name for p in kept.iterdir()) == ["sglang-fp32-chain.json", "sglang-fp32-tree.json"]
    rows = run(there, monkeypatch, tmp_path, "--served", kept, "--engine-pythonpath", empty, "--engine-python", empty)
    assert [row["relative_difference"] for row in rows] == [0, 0]
    with pytest.raises(ValueError, match="answers other max_new_tokens; give --served another folder"):
        run(there, monkeypatch, tmp_path, "--served", kept, "--max-new-tokens", "20")
    with pytest.raises(ValueError, match="--serve-only keeps nothing"):
        run(there, monkeypatch, tmp_path, "--serve-only")


def test_kept_answers_are_those_of_one_draft(there, monkeypatch, tmp_path):
    """The same draft may lie elsewhere; another one's length would be compared with what the first was served with."""
    kept, moved, other = tmp_path / "served", tmp_path / "moved", tmp_path / "other"
    with pytest.raises(FileNotFoundError):
        run(there, monkeypatch, tmp_path, "--served", kept, "--serve-only", "--settings", "chain")
    shutil.copytree(there / "draft", moved)
    again = ("--served", kept, "--settings", "chain", "--draft")
    assert run(there, monkeypatch, tmp_path, *again, moved)[0]["relative_difference"] == 0
    target = Target(tiny_llama())
    config = DraftConfig.from_target(target.config.to_dict(), draft_vocab_size=120)
    export_draft(random_draft(config, target.embedding, seed=9), other, torch.float32)
    with pytest.raises(ValueError, match=r"has answers with another draft than .*other, or does not say with which"):
        run(there, monkeypatch, tmp_path, *again, other)
    (file,) = kept.iterdir()
    file.write_text(json.dumps({k: x for k, x in json.loads(file.read_text()).items() if k != "draft"}))
    with pytest.raises(ValueError, match="or does not say with which"):
        run(there, monkeypatch, tmp_path, *again, moved)


def test_too_great_a_difference_fails(there, monkeypatch, tmp_path, capsys):
    file = there / "site" / "sglang" / "answers.json"
    answers = file.read_text()
    more = {asked: [(p, out, n + 1) for p, out, n in rows] for asked, rows in json.loads(answers).items()}
    file.write_text(json.dumps(more))
    try:
        with pytest.raises(SystemExit, match="more than 3% apart: chain"):
            run(there, monkeypatch, tmp_path, "--settings", "chain")
    finally:
        file.write_text(answers)
    (row,) = [json.loads(line) for line in (tmp_path / "engines.jsonl").read_text().splitlines()]
    assert row["num_rounds"] == row["fastdraft_num_rounds"] + 2 == row["followed_num_rounds"] + 2
    assert row["relative_difference"] < -0.03


@pytest.mark.parametrize(
    ("method", "fields"), [("dflash", {"block_size": 6}), ("dspark", {"block_size": 5, "markov_rank": 16})]
)
def test_a_draft_of_blocks_is_asked_for_a_whole_block(method, fields, monkeypatch, tmp_path):
    made = train_briefly(method, fields | {"layers": (2, 4)}, BlockLoss(gamma=4.0), 0)
    made.target.model.save_pretrained(tmp_path / "target")
    make_tokenizer().save_pretrained(tmp_path / "target")
    export_draft(made.draft, tmp_path / "draft", torch.float32)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ba be bi"}\n{"prompt": "do du dan ka"}\n')
    asked = prompt_ids(read_prompts(tmp_path / "prompts.jsonl"), load_tokenizer(str(tmp_path / "target")))
    settings = DecodeSettings(num_steps=5)
    done = [(p, generate(made.target, made.draft, p, NEW_TOKENS, settings)) for p in asked]
    play(tmp_path, {json.dumps(["float32", method.upper(), 5, 1, 6]): [(p, d.tokens, d.num_rounds) for p, d in done]})
    (row,) = run(tmp_path, monkeypatch, tmp_path, "--settings", "chain")
    assert (row["algorithm"], row["num_steps"]) == (method.upper(), 5)
    assert row["relative_difference"] == row["followed_relative_difference"] == 0 and row["num_equal_to_plain"] == 2
    with pytest.raises(ValueError, match="proposes a chain, not a tree of eagle_topk 4"):
        run(tmp_path, monkeypatch, tmp_path)
