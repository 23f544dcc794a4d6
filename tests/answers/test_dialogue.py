"""A conversation's turns answered anew: what is kept, what goes into the next context, where it must end."""

from __future__ import annotations

import json

import pytest
from chats import TOOL

from fastdraft.answers.dialogue import Dialogue, answer_message, for_request
from fastdraft.data.conversations import Line, parse


def say(role, content="", **more):
    return {"role": role, "content": content, **more}


def call(name, id=None, **arguments):
    made = {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
    return made if id is None else made | {"id": id}


def answered(messages, answers, **row):
    """The dialogue after these answers, and the contexts they were asked for in."""
    dialogue, contexts = Dialogue(4, parse(Line("f:1", {"messages": messages, **row}))), []
    answers = iter(answers)
    while dialogue.wants_answer():
        contexts.append(for_request(dialogue.messages, None)["messages"])
        dialogue.take(answer_message(next(answers)), "stop", 3)
    assert next(answers, None) is None
    return dialogue, contexts


def test_each_turn_is_answered_in_the_context_of_new_answers():
    given = [say("system", "s"), say("user", "a"), say("assistant", "old"), say("user", "b"), say("assistant", "old")]
    dialogue, contexts = answered(given, [{"content": "1"}, {"content": "2"}])
    assert contexts == [given[:2], [*given[:2], say("assistant", "1"), given[3]]]
    assert dialogue.row()["messages"] == [*contexts[1], say("assistant", "2")]
    assert dialogue.row()["finish_reasons"] == ["stop", "stop"] and dialogue.row()["completion_tokens"] == 6
    assert dialogue.row()["id"] == f"{dialogue.conversation.key:016x}-4" and "stopped" not in dialogue.row()


def test_a_question_at_the_end_is_answered_too():
    dialogue, _ = answered(
        [say("user", "a"), say("assistant", "old"), say("user", "b")], [{"content": "1"}, {"content": "2"}]
    )
    assert [m["content"] for m in dialogue.messages] == ["a", "1", "b", "2"]


def test_a_turn_that_is_not_to_be_trained_on_stays_one():
    given = [say("user", "a"), say("assistant", "old", weight=0), say("user", "b"), say("assistant", "old")]
    dialogue, contexts = answered(given, [{"content": "1"}, {"content": "2"}])
    assert [m.get("weight") for m in dialogue.row()["messages"]] == [None, 0, None, None]
    assert contexts[1][1] == say("assistant", "1")


def test_a_greeting_answers_nothing_and_is_left_out():
    dialogue, contexts = answered([say("assistant", "hello"), say("user", "a"), say("assistant", "x")], [{"content": "1"}])
    assert contexts == [[say("user", "a")]] and len(dialogue.messages) == 2


def test_nothing_to_answer():
    assert not Dialogue(0, parse(Line("f:1", {"messages": [say("system", "s")]}))).wants_answer()


OLD = [say("user", "?"), say("assistant", tool_calls=[call("weather", "old-1", city="Paris"), call("time", "old-2")])]
TOOLS = [say("tool", "noon", tool_call_id="old-2"), say("tool", "rain", tool_call_id="old-1")]


def test_tool_turns_follow_the_same_calls_under_their_new_ids():
    calls = [call("weather", "new-1", city="Paris, France"), call("time", "new-2")]
    dialogue, contexts = answered(
        [*OLD, *TOOLS, say("assistant", "x")], [{"content": None, "tool_calls": calls}, {"content": "wet"}], tools=[TOOL]
    )
    assert contexts[1][1]["tool_calls"] == calls  # arguments as JSON text, as the server gave them
    assert [m["tool_call_id"] for m in contexts[1][2:]] == ["new-2", "new-1"]
    assert dialogue.stopped is None and dialogue.messages[-1]["content"] == "wet" and dialogue.row()["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"content": "no idea"}, "answered weather, time, the new answer calls no tool"),
        ({"tool_calls": [call("weather", "n")]}, "answered weather, time, the new answer calls weather"),
    ],
)
def test_a_tools_turn_without_its_call_ends_the_conversation(answer, said):
    dialogue, _ = answered([*OLD, *TOOLS, say("assistant", "x"), say("user", "b")], [answer])
    assert len(dialogue.messages) == 2 and said in dialogue.row()["stopped"]


def test_a_call_that_no_tools_turn_follows_ends_the_conversation():
    given = [say("user", "?"), say("assistant", "old"), say("user", "b"), say("assistant", "old")]
    dialogue, _ = answered(given, [{"content": "", "tool_calls": [call("time", "n")]}])
    assert len(dialogue.messages) == 2 and "calls time" in dialogue.stopped


def test_calls_in_the_old_turns_text_are_counted_by_their_tool_turns():
    given = [say("user", "?"), say("assistant", "<tool_call>..."), say("tool", "rain"), say("assistant", "x")]
    dialogue, _ = answered(given, [{"tool_calls": [call("weather", "n")]}, {"content": "wet"}])
    assert dialogue.messages[2] == say("tool", "rain", tool_call_id="n") and dialogue.stopped is None
    dialogue, _ = answered(given, [{"tool_calls": [call("weather", "n"), call("time", "m")]}])
    assert dialogue.stopped


def test_arguments_of_given_calls_are_sent_as_text():
    message = parse(Line("f:1", {"messages": [OLD[1]]})).messages[0]
    assert message["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert for_request([message], None)["messages"][0]["tool_calls"] == OLD[1]["tool_calls"]


def test_reasoning_is_kept_under_its_name():
    for name in ("reasoning", "reasoning_content"):
        message = answer_message({"role": "assistant", "content": None, name: "hm", "tool_calls": [], "refusal": None})
        assert message == {"role": "assistant", "content": "", name: "hm"}


@pytest.mark.parametrize("broken", ["{", "[1]"])
def test_an_answer_that_training_could_not_read_is_refused(broken):
    tool_call = {"type": "function", "function": {"name": "f", "arguments": broken}}
    with pytest.raises(ValueError, match="arguments"):
        answer_message({"content": "", "tool_calls": [tool_call]})
    with pytest.raises(ValueError, match="surrogate"):
        answer_message({"content": "\ud83d"})
