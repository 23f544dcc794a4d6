"""Each way an engine can misread a draft, or a draft's files can misstate it, is named; and engines that fail say so."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from test_decode import prompts, tiny_draft, tiny_target, train_on_own_output
from tiny import make_tokenizer, random_draft, refusal

from fastdraft.data.prompts import Prompt
from fastdraft.decode import generate
from fastdraft.evaluate import evaluate_decode
from fastdraft.model.eagle3.config import DraftConfig
from fastdraft.model.eagle3.draft import Draft
from fastdraft.model.eagle3.parity import chain_readings, run_chains
from fastdraft.model.proposal import DecodeSettings
from fastdraft.model.reading import Reading, read_as
from fastdraft.model.target_config import read_target_config
from fastdraft.serving import check as checks
from fastdraft.serving.engines import (
    EnginePlace,
    Output,
    Round,
    Run,
    Served,
    engine_version,
    note_on_newer,
    refuse_old_engine,
    run_engine,
)
from fastdraft.serving.export import export_draft, load_draft
from fastdraft.serving.parity import Parity, _best_of_each_fault, _gain, diagnose
from fastdraft.target.hf import Target

NEW_TOKENS, STEPS = 30, 3


@pytest.fixture(scope="module")
def target():
    return tiny_target(torch.float32)


@pytest.fixture(scope="module")
def draft(target):
    draft = tiny_draft(target, fc_norm=True)
    train_on_own_output(target, draft, NEW_TOKENS, steps=60)
    return draft


def serve(target, draft, reading=None, shows=True) -> Served:
    """What an engine that reads the draft so would answer, and draft on the way."""
    reading = reading or Reading()
    wrong = read_as(draft, reading)
    outputs = []
    for prompt in prompts():
        tokens = generate(target, None, prompt, NEW_TOKENS).tokens
        ids = torch.tensor(prompt + tokens)
        (g,) = Parity(target, draft, [prompt], [Output(tokens)], STEPS).states(reading.layers or draft.config.layers)
        chain = torch.zeros(len(ids) - 1, STEPS, dtype=torch.int64)
        for i in range(STEPS):
            chain[:, i] = run_chains(wrong, reading, target.head, ids, g, chain)[0][:, i]
        rounds, after = [], 1
        while after < len(tokens):
            drafted = chain[len(prompt) + after - 2].tolist()
            rounds.append(Round(after, drafted))
            kept = 0
            while kept < STEPS and after + kept < len(tokens) and drafted[kept] == tokens[after + kept]:
                kept += 1
            after += kept + 1
        outputs.append(Output(tokens, rounds if shows else [], len(rounds)))
    rounds = sum(o.num_rounds for o in outputs)
    return Served("vllm" if shows else "sglang", "0.0", "float32", outputs, None, rounds)


def compare(target, draft, served):
    """The report, from an engine that says the same without a draft."""
    return checks.compare(target, draft, prompts(), served, served, STEPS)


def diagnosis(target, draft, served):
    return diagnose(Parity(target, draft, prompts(), served.outputs, STEPS))


def test_the_documented_reading_is_what_decode_does(target, draft):
    """Rounds and accepted length from teacher-forced chains are the decoder's own."""
    told = diagnosis(target, draft, serve(target, draft))
    report = evaluate_decode(target, draft, prompts(), DecodeSettings(STEPS), NEW_TOKENS)
    assert told.agrees and not told.served_as and not told.trained_as
    assert told.reference.accepted_length == report.accepted_length
    ours = [generate(target, draft, p, NEW_TOKENS, DecodeSettings(STEPS)).num_rounds for p in prompts()]
    assert list(told.reference.rounds) == ours
    assert 1.3 < report.accepted_length < 3.9  # or the faults below would change nothing


FAULTS = {
    "position": "every step at the position of the first",
    "token": "step 0 reads the token at its own position",
    "vocabulary map": "d2t read as target ids",
    "norm": "(norm_output)",
    "config field": "RoPE without its scaling",
}


OTHER_LAYERS = Reading("layer ids", layers=(0, 1, 2))


def reading(target, draft, fault: str, words: str) -> Reading:
    (found,) = [r for r in chain_readings(draft, target.num_layers) if r.fault == fault and words in r.says]
    return found


def scaled(draft) -> Draft:
    """The draft with a RoPE far from plain, so that reading it as plain shows."""
    c = draft.config.model_copy(update={"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 16.0}})
    made = Draft(c)
    made.load_state_dict(draft.state_dict())
    return made


@pytest.mark.parametrize("fault", ["layer ids", *FAULTS])
def test_an_engine_that_reads_otherwise_is_told_how(target, draft, fault):
    mine = scaled(draft) if fault == "config field" else draft
    wrong = OTHER_LAYERS if fault == "layer ids" else reading(target, mine, fault, FAULTS[fault])
    served = serve(target, mine, wrong)
    proposed = sum(len(r.drafted) for o in served.outputs for r in o.rounds)
    first = compare(target, mine, served).errors[0]
    assert first.startswith(f"{fault}: vllm drafts as with")
    assert f"({proposed} of {proposed} drafted tokens are those" in first


def test_a_draft_run_in_another_dtype_is_told(target):
    """An untrained draft has near-ties everywhere, so that rounding shows."""
    draft = tiny_draft(target)
    draft.lm_head.weight.data *= 1e-3
    draft.lm_head.weight.data += 1.0
    draft.norm.weight.data.fill_(1.0)
    told = diagnosis(target, draft, serve(target, draft, reading(target, draft, "dtype", "bfloat16")))
    assert not told.agrees and told.served_as[0].reading.fault == "dtype"


@pytest.mark.parametrize(("below", "near"), [(5e-5, True), (1e-2, False)])
def test_another_token_is_excused_where_its_logit_is_a_near_tie_alone(target, draft, below, near):
    """An engine that drafts one token of another logit than the best, less by a share that fp32 may round away or not."""
    mine = Draft(draft.config)
    mine.load_state_dict(draft.state_dict())
    served = serve(target, mine)
    drafted = served.outputs[0].rounds[0].drafted  # its last token: nothing of the chain follows from it
    best = int((mine.draft_ids == drafted[-1]).nonzero())
    shown = {token for output in served.outputs for r in output.rounds for token in r.drafted}
    other = next(i for i, token in enumerate(mine.draft_ids.tolist()) if token not in shown)
    mine.lm_head.weight.data[other] = (1 - below) * mine.lm_head.weight.data[best]
    served = serve(target, mine)
    drafted = served.outputs[0].rounds[0].drafted
    assert drafted[-1] == int(mine.draft_ids[best])
    drafted[-1] = int(mine.draft_ids[other])
    told = diagnosis(target, mine, served)
    assert told.reference.num_missed == 1 and told.reference.num_near == near and told.agrees == near


def test_layer_ids_other_than_trained_are_told(target, draft):
    """The engine does what config.json says; the layers the draft was trained on would be accepted more often."""
    wrong = Draft(draft.config.model_copy(update={"layers": (2, 3, 4)}))
    wrong.load_state_dict(draft.state_dict())
    other = Target(target.model, (2, 3, 4))
    served = serve(other, wrong)
    told = diagnosis(other, wrong, served)
    assert told.agrees and not told.served_as
    assert told.trained_as[0].reading.layers == draft.config.layers
    assert told.trained_as[0].accepted_length > told.reference.accepted_length + 0.2
    report = compare(other, wrong, served)
    assert any(line.startswith("layer ids: with outputs of layers [1, 2, 3] (the default)") for line in report.errors)


def test_a_draft_trained_with_another_recurrence_than_its_files_say_is_told(target, tmp_path):
    """norm_output lost on the way to the engine, or added: the files alone cannot show it, decoding does."""
    for trained in (True, False):
        draft = tiny_draft(target, norm_output=trained, fc_norm=True)
        train_on_own_output(target, draft, NEW_TOKENS, steps=60)
        folder = export_draft(draft, tmp_path / f"trained {trained}", torch.float32)
        sound = load_with_embedding(folder, target)
        assert not compare(target, sound, serve(target, sound)).errors
        config = json.loads((folder / "config.json").read_text()) | {"norm_output": not trained}
        (folder / "config.json").write_text(json.dumps(config))
        wrong = load_with_embedding(folder, target)
        assert wrong.config.norm_output is not trained
        told = diagnosis(target, wrong, serve(target, wrong))
        assert told.agrees and not told.served_as  # the engine does what the files say
        assert read_as(wrong, told.trained_as[0].reading).config.norm_output is trained
        (error,) = compare(target, wrong, serve(target, wrong)).errors
        state = "after the final norm goes to the next step (norm_output)"
        if not trained:
            state = "before the final norm goes to the next step (no norm_output)"
        assert error.startswith(f"norm: with the state {state} the accepted length would be")


def test_an_engine_that_does_not_know_norm_output_is_told(target):
    draft = tiny_draft(target, norm_output=True, norm_before_fc=True)
    train_on_own_output(target, draft, NEW_TOKENS, steps=60)
    assert not compare(target, draft, serve(target, draft)).errors
    for words in ("no norm_output", "norm_before_fc left out"):
        first = compare(target, draft, serve(target, draft, reading(target, draft, "norm", words))).errors[0]
        assert first.startswith("norm: vllm drafts as with") and words in first


def load_with_embedding(folder, target) -> Draft:
    draft = load_draft(folder, target.config)
    if draft.config.hidden_size == target.hidden_size:
        draft.set_embedding(target.embedding)
    return draft


def test_an_engine_without_proposals_is_judged_by_its_rounds(target, draft):
    assert diagnosis(target, draft, serve(target, draft, shows=False)).agrees
    told = diagnosis(target, draft, serve(target, draft, OTHER_LAYERS, shows=False))
    assert not told.agrees and "layer ids" in [e.reading.fault for e in told.served_as]


def test_a_low_acceptance_that_nothing_explains_is_the_drafts_own(target):
    untrained = tiny_draft(target)
    report = compare(target, untrained, serve(target, untrained))
    assert not report.errors and "served as trained" in report.warnings[0]


def test_another_target_is_told_and_nothing_else(target, draft):
    served = serve(target, draft)
    wrong = [replace(o, tokens=[(t + 1) % 96 for t in o.tokens]) for o in served.outputs]
    report = compare(target, draft, replace(served, outputs=wrong))
    assert len(report.errors) == 2 and "does not say what this target says" in report.errors[0]


def test_outputs_of_one_token_say_nothing_about_a_draft(target, draft):
    served = serve(target, draft)
    short = [Output(o.tokens[:1], [], 0) for o in served.outputs]
    report = compare(target, draft, replace(served, outputs=short))
    assert report.errors == ["every output ended at its first token, so nothing was drafted; give other prompts"]


def test_the_best_reading_comes_first(target, draft):
    told = diagnosis(target, draft, serve(target, draft)).reference
    best_first = [("layer ids", "a"), ("position", "b"), ("layer ids", "c")]
    found = _best_of_each_fault([replace(told, reading=Reading(*reading)) for reading in best_first])
    assert [e.reading.says for e in found] == ["a", "b"]


def test_one_place_is_no_evidence_of_other_training(target, draft):
    """The single round of an output of two tokens: whatever another reading would have won there may be chance."""
    told = diagnosis(target, draft, serve(target, draft)).reference
    once = [replace(told, lengths=torch.tensor([length], dtype=torch.float64)) for length in (1.0, 4.0)]
    assert _gain(once[1], once[0]) == 0
    often = [replace(e, lengths=e.lengths + torch.tensor([0.0, 0.0, 0.1, 0.0])) for e in once]
    assert _gain(often[1], often[0]) == pytest.approx(3)


def test_the_engines_dtype_is_compared_with_the_checkpoints(target, draft):
    half = tiny_draft(target).to(torch.bfloat16)
    report = compare(target, half, serve(target, tiny_draft(target)))
    assert "dtype: vllm ran in float32, the checkpoint's weights are bfloat16" in report.warnings[0]


# --- engines that are missing, old, slow or dying ------------------------------------------------------------------------

RUN = Run("/nowhere/target", "/nowhere/draft", [[1, 2]], 4, [2], "float32", algorithm="eagle3")


@pytest.fixture
def fake(tmp_path):
    """A `vllm` package with some code, installed in some version."""

    def install(version, code="") -> EnginePlace:
        (tmp_path / "vllm").mkdir()
        (tmp_path / "vllm" / "__init__.py").write_text(code)
        info = tmp_path / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
        (info / "top_level.txt").write_text("vllm\n")
        (info / "RECORD").write_text("vllm/__init__.py,,\n")
        return EnginePlace("vllm", sys.executable, str(tmp_path))

    return install


def test_a_missing_engine(tmp_path):
    with pytest.raises(ValueError, match=r"sglang is not installed for .*--engine-python PATH"):
        engine_version(EnginePlace("sglang"))
    with pytest.raises(ValueError, match="no interpreter that can run; give --engine-python"):
        engine_version(EnginePlace("vllm", str(tmp_path / "python")))


def test_an_old_engine(fake):
    with pytest.raises(ValueError, match=r"vllm 0\.10\.2 is too old .* 0\.26\.0 and newer"):
        refuse_old_engine(fake("0.10.2"))


def test_an_engine_whose_version_takes_too_long(tmp_path):
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nsleep 60\n")
    slow.chmod(0o755)
    with pytest.raises(ValueError, match=r"python did not say its version of vllm within 0\.2 s"):
        engine_version(EnginePlace("vllm", str(slow)), timeout_s=0.2)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("#!/bin/sh\n", "cannot say its version of vllm: nothing was said"),
        ("#!/bin/sh\necho hello 5\n", "cannot say its version of vllm: hello 5"),
        ("no program", "cannot be run: Exec format error; is it a Python"),
        ("#!/nonexistent/python\n", "cannot be run: No such file or directory; is it a Python"),
    ],
)
def test_an_engine_python_that_is_none(tmp_path, content, said):
    other = tmp_path / "python"
    other.write_text(content)
    other.chmod(0o755)
    with pytest.raises(ValueError, match=said):
        engine_version(EnginePlace("vllm", str(other)))


def test_a_prompt_without_a_token_is_named():
    """A base model's tokenizer has no template, and an empty prompt then nothing at all."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    asked = [Prompt([{"role": "user", "content": text}]) for text in ("ba", "")]
    with pytest.raises(ValueError, match="prompt 2 has no token"):
        checks._prompt_ids(asked, tokenizer)


@pytest.mark.parametrize("rounds", [4, 0])
def test_an_engine_alone_is_reported_without_loading_the_target(tmp_path, target_dir, monkeypatch, fastdraft, rounds):
    """For a target that only an engine can hold: the engine with the draft and without, and the numbers it counted."""
    shape = DraftConfig.from_target(read_target_config(target_dir), draft_vocab_size=64)
    export_draft(random_draft(shape, torch.zeros(192, 32)), tmp_path / "draft", torch.float32)
    started = []

    def run(place, runs, timeout_s):
        started.extend(runs)
        drafts = runs[0].checkpoint is not None
        outputs = [Output([5, 6, 7, 8], num_rounds=2)] * 2
        return [Served("vllm", "0.32.0", "float32", outputs, 1.45 if drafts else None, rounds if drafts else None)]

    monkeypatch.setattr(checks, "run_engine", run)
    monkeypatch.setattr(checks, "refuse_old_engine", lambda place: "0.32.0")
    monkeypatch.setattr(checks, "load_target", lambda *_, **__: pytest.fail("the target was loaded"))
    (tmp_path / "p.jsonl").write_text('{"prompt": "ba be"}\n{"prompt": "bi"}\n')
    call = ["check", "--checkpoint", tmp_path / "draft", "--target", target_dir, "--engine", "vllm", "--engine-alone"]
    code, out, _ = fastdraft(*call, "--prompts", tmp_path / "p.jsonl")
    assert [run.stop_ids for run in started] == [[2], [2]]
    assert "equal for 2 of 2 prompts" in out and "the target was not loaded here" in out
    assert "newer than" not in out
    assert "what the engine drafts is what fastdraft drafts" not in out
    if rounds:
        assert code == 0 and "accepted length, chain: 1.500 in vllm (which itself says 1.450)" in out
    else:
        assert code == 1 and "vllm drafted nothing" in out


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0.post1"])
def test_a_version_that_will_do(fake, version):
    assert refuse_old_engine(fake(version)) == version


@pytest.mark.parametrize("version", ["0.33.0", "0.33.1rc1.dev5+g1", "1.0"])
def test_a_newer_engine_is_tried_with_a_warning(tmp_path, target_dir, monkeypatch, fastdraft, fake, version):
    shape = DraftConfig.from_target(read_target_config(target_dir), draft_vocab_size=64)
    export_draft(random_draft(shape, torch.zeros(192, 32)), tmp_path / "draft", torch.float32)
    place = fake(version)
    outputs = [Output([5, 6, 7, 8], num_rounds=2)]
    monkeypatch.setattr(checks, "run_engine", lambda *_: [Served("vllm", version, "float32", outputs, 1.5, 2)])
    (tmp_path / "p.jsonl").write_text('{"prompt": "ba be"}\n')
    call = ["check", "--checkpoint", tmp_path / "draft", "--target", target_dir, "--engine", "vllm", "--engine-alone"]
    more = ["--engine-python", place.python, "--engine-pythonpath", place.pythonpath]
    code, out, _ = fastdraft(*call, *more, "--prompts", tmp_path / "p.jsonl")
    assert code == 0 and f"warning: vllm {version} is newer than 0.32, the newest that fastdraft was run with" in out


@pytest.mark.parametrize("version", ["0.32.0", "0.32.5", "0.32.1rc2"])
def test_a_patch_is_not_newer(version):
    assert note_on_newer("vllm", version) is None


def test_an_engine_that_fails_says_why(fake):
    with pytest.raises(ValueError, match="vllm failed with exit code 1: RuntimeError: no room for the KV cache"):
        run_engine(fake("0.32.0", "raise RuntimeError('no room for the KV cache')"), [RUN], 30)


def test_an_engine_that_dies(fake):
    with pytest.raises(ValueError, match="vllm was killed by SIGKILL"):
        run_engine(fake("0.32.0", "import os; os.kill(os.getpid(), 9)"), [RUN], 30)


@pytest.mark.slow
def test_an_engine_that_hangs_is_stopped_with_all_it_started(fake, tmp_path):
    code = """
import os, subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.environ["PYTHONPATH"] + "/worker", "w").write(str(worker.pid))
print("waiting for a GPU", flush=True)
time.sleep(600)
"""
    start = time.monotonic()
    with pytest.raises(ValueError, match="did not finish within 5 s and was stopped; last words: waiting for a GPU"):
        run_engine(fake("0.32.0", code), [RUN], 5)
    assert time.monotonic() - start < 60
    worker = int((tmp_path / "worker").read_text())
    assert within(10, lambda: not alive(worker)), "the engine's worker goes on"


def test_stopping_fastdraft_stops_the_engine(fake, tmp_path):
    code = """
import os, time
open(os.environ["PYTHONPATH"] + "/pid.new", "w").write(str(os.getpid()))
os.rename(os.environ["PYTHONPATH"] + "/pid.new", os.environ["PYTHONPATH"] + "/pid")
time.sleep(600)
"""
    place = fake("0.32.0", code)
    script = f"from fastdraft.serving.engines import *; run_engine({place!r}, [{RUN!r}], 300)"
    parent = subprocess.Popen([sys.executable, "-c", script])
    try:
        assert within(30, (tmp_path / "pid").exists)
        parent.terminate()
        assert parent.wait(30) == 128 + signal.SIGTERM
        pid = int((tmp_path / "pid").read_text())
        assert within(10, lambda: not alive(pid)), "the engine goes on"
    finally:
        parent.kill()


def within(seconds: float, happens) -> bool:
    until = time.monotonic() + seconds
    while not (so := happens()) and time.monotonic() < until:
        time.sleep(0.05)
    return so


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_command_says_what_is_missing(fastdraft, target_dir, tmp_path):
    assert "--engine vllm needs --checkpoint and --target" in refusal(fastdraft("check", "--engine", "vllm"))
    draft = Draft(DraftConfig.from_target(read_target_config(target_dir), draft_vocab_size=64))
    draft.init_weights(0.1, torch.Generator().manual_seed(0))
    draft.set_vocab(torch.arange(64))
    export_draft(draft, tmp_path / "draft", torch.float32)
    there = ("check", "--checkpoint", tmp_path / "draft", "--target", target_dir)
    for idle in (
        *(("--prompts", "p.jsonl"), ("--max-prompts", 16), ("--max-new-tokens", 8), ("--num-steps", 2)),
        *(("--dtype", "auto"), ("--engine-python", "p"), ("--engine-pythonpath", ""), ("--timeout", 60)),
        ("--trust-remote-code",),
    ):
        for given in (there, ("check",)):
            assert f"{idle[0]} belongs to --engine vllm or sglang, which was not given" in refusal(fastdraft(*given, *idle))
    two = refusal(fastdraft("check", "--golden", tmp_path, "--timeout", 5, "--step", "fused", "--num-steps", 3))
    assert "--num-steps, --timeout belong to --engine vllm or sglang" in two
    said = refusal(fastdraft(*there, "--engine", "vlm"))
    assert "--engine 'vlm' is not one of vllm, sglang" in said and "golden" not in said
    said = refusal(fastdraft(*there, "--engine", "sglang"))
    assert "sglang is not installed" in said and "--engine-python" in said
    assert "--dtype int8 is none that engines serve" in refusal(
        fastdraft(*there, "--engine", "vllm", "--engine-python", sys.executable, "--dtype", "int8")
    )
