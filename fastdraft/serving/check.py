"""`fastdraft check --engine`: a user's own draft in the user's own engine, compared token for token, and faults named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from fastdraft.data.prompts import Prompt, prompt_ids, read_prompts
from fastdraft.model.methods import method_of
from fastdraft.model.precision import dtype_name
from fastdraft.model.target_config import language_config, named_dtype, read_target_config
from fastdraft.serving.engines import EnginePlace, Run, Served, note_on_newer, refuse_old_engine, run_engine
from fastdraft.serving.export import load_draft, told_target
from fastdraft.serving.parity import Diagnosis, Evidence, Parity, TargetEvidence, diagnose
from fastdraft.target.hf import Target, load_target, load_tokenizer
from fastdraft.target.identity import stop_ids

PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "What are the differences between a frog and a toad?",
    "Translate into French: The train leaves at nine, and I have lost my ticket.",
    "A shop sells pens at 3 for 2 dollars. What do 12 pens cost? Show your steps.",
    "List five things to check before a long drive.",
    "Summarise the story of Romeo and Juliet for a child.",
    "What does the HTTP status code 404 mean, and what should a server send with it?",
)
DTYPES = ("bfloat16", "float16", "float32")
LOW = 1.15  # tokens a verifying forward, below which a draft is hardly worth its time


@dataclass(frozen=True)
class Report:
    """Sentences for the user: what was measured, what to look at, what is wrong."""

    facts: list[str]
    warnings: list[str]
    errors: list[str]
    compared: bool = True  # with fastdraft's own reading

    def lines(self) -> list[str]:
        good = ["what the engine drafts is what fastdraft drafts"] if self.compared and not self.errors else []
        return [*self.facts, *(f"warning: {x}" for x in self.warnings), *(f"error: {x}" for x in self.errors), *good]


def check_engine(
    place: EnginePlace,
    checkpoint: Path,
    target_dir: Path,
    prompts: Path | None = None,  # JSONL; None: eight of our own
    max_prompts: int = 16,
    max_new_tokens: int = 64,
    num_steps: int | None = None,  # None: the method's own
    dtype: str | None = None,  # None: the one the target's config.json names
    timeout_s: float = 1800,  # for a serving with the draft, and for one without
    trust_remote_code: bool = False,
    alone: bool = False,  # the target is not loaded here, so nothing is compared but the engine with itself
) -> Report:
    """Serves the checkpoint in the engine and compares what it drafted with fastdraft's own reading.

    Raises ValueError when the checkpoint cannot be read as a draft of this target, or says that it is another's, when the
    engine is missing, too old, fails or runs out of time, and when a prompt leaves no room in the target's context.
    """
    facts = language_config(read_target_config(target_dir))
    dtype = dtype or named_dtype(facts) or "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype} is none that engines serve; choose one of {', '.join(DTYPES)}")
    newer = note_on_newer(place.name, refuse_old_engine(place))
    draft = load_draft(checkpoint, facts)
    if others := told_target(checkpoint, target_dir).errors:
        raise ValueError(f"{others[0]} It is not served: give the target that it was trained for")
    method = method_of(draft)
    num_steps = method.served_steps(draft.config, num_steps)
    tokenizer = load_tokenizer(str(target_dir), trust_remote_code)
    asked = [Prompt([{"role": "user", "content": text}]) for text in PROMPTS] if prompts is None else read_prompts(prompts)
    ids, context = _prompt_ids(asked[:max_prompts], tokenizer), facts["max_position_embeddings"]
    if (longest := max(map(len, ids))) > context - max_new_tokens - num_steps - 1:
        raise ValueError(
            f"a prompt has {longest} tokens; with {max_new_tokens} new and {num_steps} drafted ones it does not fit the "
            f"target's context of {context}: shorten it, or lower --max-new-tokens"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if alone:
        ends_at = sorted(stop_ids(str(target_dir), trust_remote_code))
    else:
        target = load_target(str(target_dir), getattr(torch, dtype), "cpu", trust_remote_code=trust_remote_code)
        ends_at = sorted(target.eos_ids)
    run = Run(
        str(target_dir.resolve()),
        str(checkpoint.resolve()),
        ids,
        max_new_tokens,
        ends_at,
        dtype,
        num_steps,
        trust_remote_code=trust_remote_code,
        algorithm=method.engine_names[place.name],
    )
    # a process each, before the target takes the GPU
    (served,), (plain,) = (run_engine(place, [r], timeout_s) for r in (run, replace(run, checkpoint=None)))
    if alone:
        report = report_alone(served, plain)
    else:
        target = Target(target.model.to(device), draft.config.layers)
        report = compare(target, draft, ids, served, plain, num_steps)
    if newer is not None:
        report.warnings.insert(0, newer)
    return report


def report_alone(served: Served, plain: Served) -> Report:
    """What an engine says by itself, with a draft and without: for a target that only an engine can hold."""
    prompts, tokens = len(served.outputs), sum(len(o.tokens) for o in served.outputs)
    same = sum(o.tokens == p.tokens for o, p in zip(served.outputs, plain.outputs, strict=True))
    report = Report(
        [
            f"{served.engine} {served.version}, {served.dtype}: {prompts} prompts, {tokens} tokens",
            f"greedy output with and without the draft: equal for {same} of {prompts} prompts",
        ],
        ["the target was not loaded here, so neither its tokens nor the drafted ones were compared with fastdraft's"],
        [],
        compared=False,
    )
    if not served.num_rounds:
        report.errors.append(f"{served.engine} drafted nothing: every output ended at its first token; give other prompts")
        return report
    length = (tokens - prompts) / served.num_rounds  # a prompt's first token comes before any draft
    own = f" (which itself says {served.accepted_length:.3f})" if served.accepted_length is not None else ""
    report.facts.append(f"accepted length, chain: {length:.3f} in {served.engine}{own}")
    if length < LOW:
        report.warnings.append(
            f"the accepted length of {length:.3f} is low: the draft is young, the prompts are unlike "
            "its training data, or the engine reads the checkpoint otherwise, which this check cannot tell apart"
        )
    return report


def compare(
    target: Target, draft: nn.Module, prompts: list[list[int]], served: Served, plain: Served, num_steps: int
) -> Report:
    """`draft` as `load_draft` gave it, in the checkpoint's dtype; the target in the dtype the engine ran in. `plain` is the
    same engine without a draft."""
    checkpoint_dtype = dtype_name(draft.fc.weight.dtype)
    draft = draft.to(target.device, target.dtype)
    draft.take_from_target(target.embedding)
    parity = Parity(target, draft, prompts, served.outputs, num_steps)
    tokens = sum(len(o.tokens) for o in served.outputs)
    report = Report([f"{served.engine} {served.version}, {served.dtype}: {len(prompts)} prompts, {tokens} tokens"], [], [])
    if served.dtype != checkpoint_dtype:
        report.warnings.append(
            f"dtype: {served.engine} ran in {served.dtype}, the checkpoint's weights are {checkpoint_dtype}; "
            "serve in that dtype, or export in the one served"
        )
    if not _target_agrees(parity, prompts, served, plain, report):
        return report
    if tokens == len(prompts):
        report.errors.append("every output ended at its first token, so nothing was drafted; give other prompts")
        return report
    told = diagnose(parity)
    _say_drafts(told, served, report)
    _say_causes(told, served, report)
    return report


def _prompt_ids(asked: list[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if tokenizer.chat_template is None:  # a base model's target completes the last message's text
        prompts = [tokenizer(p.messages[-1]["content"])["input_ids"] for p in asked]
    else:
        prompts = prompt_ids(asked, tokenizer)
    if not all(prompts):
        raise ValueError(f"prompt {prompts.index([]) + 1} has no token; give it some text")
    return prompts


def _target_agrees(parity: Parity, prompts: list[list[int]], served: Served, plain: Served, report: Report) -> bool:
    alone = Parity(parity.target, parity.draft, prompts, plain.outputs, parity.num_steps)
    same = sum(o.tokens == p.tokens for o, p in zip(served.outputs, plain.outputs, strict=True))
    report.facts.append(f"greedy output with and without the draft: equal for {same} of {len(prompts)} prompts")
    for how, evidence in {"with the draft": parity.target_evidence(), "without": alone.target_evidence()}.items():
        report.facts.append(f"output {how}: {_of_target(evidence)}")
        if evidence.agreement < 0.99:
            report.errors.append(
                f"{served.engine} does not say what this target says: {_of_target(evidence)}. It serves another target, or "
                "another precision of it; the drafts were not compared"
            )
    return not report.errors


def _of_target(e: TargetEvidence) -> str:
    return f"{e.num_equal} of {e.num_tokens} tokens are the target's first choice{_near(e)}"


def _near(e: Evidence | TargetEvidence) -> str:
    return f", {e.num_near} more at near-ties" if e.num_near else ""


def _say_drafts(told: Diagnosis, served: Served, report: Report) -> None:
    ours = told.reference
    if ours.num_proposed:
        report.facts.append(f"drafted tokens: {ours.num_equal} of {ours.num_proposed} are fastdraft's{_near(ours)}")
        rounds = sum(len(o.rounds) for o in served.outputs)
    else:
        report.facts.append(f"{served.engine} does not show what it drafted; verifying rounds are compared")
        rounds = served.num_rounds or 1
    engine = f"{ours.num_tokens / rounds:.3f} in {served.engine}"
    if ours.num_proposed and served.accepted_length is not None:  # SGLang's counts otherwise: docs/serving.md
        engine += f" (which itself says {served.accepted_length:.3f})"
    report.facts.append(f"accepted length, chain: {engine}, {ours.accepted_length:.3f} by fastdraft")


def _say_causes(told: Diagnosis, served: Served, report: Report) -> None:
    ours = told.reference
    if not told.agrees:
        for e in told.served_as:
            report.errors.append(f"{e.reading.fault}: {served.engine} drafts as with {e.reading.says}{_fit(e, ours)}")
        if not told.served_as:
            report.errors.append(
                f"{served.engine}'s drafts are not this checkpoint's{_fit(ours, None)}, and no single fault known here "
                "explains them: not layer ids, position, vocabulary map, norm, dtype, RoPE or epsilon; is it the same "
                "checkpoint?"
            )
    for e in told.trained_as:
        report.errors.append(
            f"{e.reading.fault}: with {e.reading.says} the accepted length would be {e.accepted_length:.3f} instead of "
            f"{ours.accepted_length:.3f}; the draft was trained so, and its config.json or d2t says otherwise"
        )
    if told.agrees and not told.trained_as and ours.accepted_length < LOW:
        report.warnings.append(
            f"the accepted length of {ours.accepted_length:.3f} is low, and no other reading of the checkpoint does "
            "better: it is served as trained. Train longer, or on the target's own answers to prompts like these"
        )


def _fit(evidence: Evidence, ours: Evidence | None) -> str:
    if not evidence.num_proposed:
        return f" (accepted length {evidence.accepted_length:.3f})"
    share = f"{evidence.num_equal} of {evidence.num_proposed} drafted tokens"
    return f" ({share})" if ours is None else f" ({share} are those, {ours.num_equal} the checkpoint's)"
