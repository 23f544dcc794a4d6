"""Chats of the odd kinds that data sets have, through templates of many families: each trained turn is what a server would
have been asked and what the template then has up to the first token that stops, by rendering both anew."""

import json
import re
from contextlib import suppress

import numpy as np
import pytest
from chats import TOOL, make_tokenizer
from templates import ADDED, ENDS, TEMPLATES
from tokenizers import AddedToken

from fastdraft.data.conversations import BadLine, Line, parse, spellings
from fastdraft.data.template import Refused
from fastdraft.data.tokenize import ChatTokenizer

Q, R = {"role": "user", "content": "1?"}, {"role": "user", "content": "2?"}
YES, NO = {"role": "assistant", "content": "yes"}, {"role": "assistant", "content": "no"}
SYSTEM = {"role": "system", "content": "0"}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLS = {"role": "assistant", "content": None, "tool_calls": [CALL]}
DRY = {"role": "tool", "content": "3", "tool_call_id": "abcdefgh1", "name": "weather"}
SINCE = {"reasoning_content": "since"}
FIRST_NAMED = {"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": '{"city": "Rome"}'}}
ODD = {
    "an empty answer": [Q, YES | {"content": ""}, R, NO],
    "an empty question": [Q | {"content": ""}, YES],
    "text parts": [Q | {"content": [{"type": "text", "text": "1"}, {"type": "text", "text": "2"}]}, YES],
    "a call without text": [Q, CALLS, DRY, NO],
    "a call beside text": [Q, CALLS | {"content": "look"}, DRY, NO, R, YES],
    "two calls": [Q, CALLS | {"tool_calls": [CALL, CALL | {"id": "abcdefgh2"}]}, DRY, DRY | {"content": "4"}, NO],
    "a call at the end": [Q, CALLS],
    "a call without an id": [Q, CALLS | {"tool_calls": [{"function": CALL["function"]}]}, DRY, NO],
    "reasoning beside a call": [Q, CALLS | SINCE, DRY, NO | SINCE],
    "a function's role": [Q, FIRST_NAMED, DRY | {"role": "function"}, NO],
    "names": [Q | {"name": "zed"}, YES | {"name": "zoe"}],
    "reasoning": [Q, YES | SINCE, R, NO | SINCE],
    "reasoning in the text": [Q, YES | {"content": "<think>\nsince\n</think>\n\nyes"}],
    "reasoning that is only closed": [Q, YES | {"content": "since\n</think>\n\nyes"}],
    "a long turn": [Q | {"content": "1 " * 2000}, YES | {"content": "yes " * 2000}],
    "odd characters": [Q, YES | {"content": "👩\u200d👧 שלום \u200fa\x00b\u2028e\u0301"}, R, NO | {"content": "\ufeffno"}],
    "a developer": [SYSTEM | {"role": "developer"}, Q, YES],
    "two questions": [Q, R, YES],
    "two answers": [Q, YES, NO],
    "a question at the end": [SYSTEM, Q, YES, R],
    "no question": [SYSTEM, YES],
    "a greeting": [YES, Q, NO],
    "a system prompt in the middle": [Q, YES, SYSTEM, R, NO],
    "two system prompts": [SYSTEM, SYSTEM, Q, YES],
    "white space": [Q, YES | {"content": "\n yes \n"}, R, NO | {"content": "  no\n\n"}],
    "a quoted header": [Q | {"content": "<|im_start|>assistant\n"}, YES, Q | {"content": "[/INST]</s>"}, NO],
}
NAMES = ["chatml", "qwen3", "llama31", "gemma", "mistral", "phi3", "v3", "cohere", "harmony", "smollm3", "vicuna"]


def asked_and_said(template, messages, tools, stops):
    """(prompt, answer) of each assistant's turn, None where the rendering does not begin with the prompt."""
    for end in (i for i, m in enumerate(messages, 1) if m["role"] == "assistant"):
        pair = None
        with suppress(Refused):
            prompt = template.render(messages[: end - 1], tools, add_generation_prompt=True)
            full = template.render(messages[:end], tools)
            if end > 1 and full.startswith(prompt):
                said = full[len(prompt) :]
                ends = [said.index(stop) + len(stop) for stop in stops if stop in said]
                pair = prompt, said[: min(ends)]
        yield end, pair


def trained(tokenizer, done, stops):
    """What stands before each trained turn, and the turn. Turns that nothing parts are one run, cut here at their ends."""
    for sample in done.samples:
        edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask.astype(np.int8), [0]])))
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            before, run = tokenizer.decode(sample.input_ids[:start]), tokenizer.decode(sample.input_ids[start:end])
            for turn in re.findall(rf".+?(?:{'|'.join(map(re.escape, stops))}|$)", run, re.DOTALL):
                yield before, turn
                before += turn


@pytest.mark.parametrize("name", NAMES)
def test_odd_chats_are_trained_as_they_are_served_or_a_sentence_says_why_not(name):
    tokenizer = make_tokenizer(TEMPLATES[name])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    stops = [ENDS[name], "<|call|>"] if name == "harmony" else [ENDS[name]]
    chats = ChatTokenizer(tokenizer, stop_ids=tokenizer.convert_tokens_to_ids(stops), max_length=100_000)
    compared = 0
    for kind, messages in ODD.items():
        tools = [TOOL] if any("tool_calls" in m or "function_call" in m for m in messages) else None
        conversation = parse(Line("f:1", json.dumps({"messages": messages, "tools": tools}).encode()))
        try:
            done = chats(conversation)
        except BadLine as error:
            assert str(error).startswith("f:1: up to message "), kind
            continue
        found, left_out = list(trained(tokenizer, done, stops)), {where for where, _ in done.left_out}
        template = chats._placing(tools).template
        for spelled in spellings(conversation.messages):
            pairs = dict(asked_and_said(template, spelled, tools, stops))
            if any(pairs.values()):
                break
        for end, pair in pairs.items():
            if pair is None or f"f:1, message {end}" in left_out or done.raw_reasoning:
                continue
            compared += 1
            assert pair in found, (kind, pair, found)
        assert all(not set("01234?") & set(said) for _, said in found), (kind, found)
    assert compared >= 15
