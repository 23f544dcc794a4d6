import datetime
import decimal
import gzip
import json
import math
import re

import pyarrow
import pyarrow.parquet
import pytest
from chats import TOOL, chat
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft.data.conversations import BadLine, Conversation, Line, expand, parse, read_lines
from fastdraft.data.prompts import Prompt, read_prompts


def parsed(row) -> Conversation:
    return parse(Line("f:1", row if isinstance(row, bytes) else json.dumps(row).encode()))


def test_openai_messages():
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    done = parsed(
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Rain "}, {"type": "text", "text": "today?"}]},
                {"role": "assistant", "content": None, "reasoning_content": "look", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
                {"role": "assistant", "content": "No."},
            ],
            "tools": [TOOL],
        }
    )
    assert done.messages == (
        {"role": "user", "content": "Rain \ntoday?"},  # as vLLM joins them
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "look",
            "tool_calls": [{**call, "function": {"name": "weather", "arguments": {"city": "Paris"}}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
        {"role": "assistant", "content": "No."},
    )
    assert done.tools == [TOOL]


def test_the_text_parts_of_an_answer_are_the_one_text_that_the_model_wrote():
    parts = [{"type": "text", "text": "No"}, {"type": "text", "text": ", dry."}]
    (message,) = parsed({"messages": [{"role": "assistant", "content": parts}]}).messages
    assert message["content"] == "No, dry."


def test_reasoning_by_any_name():
    for name in ("reasoning_content", "reasoning", "thinking"):
        (message,) = parsed({"messages": [{"role": "assistant", "content": "a", name: "because"}]}).messages
        assert message == {"role": "assistant", "content": "a", "reasoning_content": "because"}


@pytest.mark.parametrize(
    "given",
    [
        {"reasoning_text": "because"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "because"}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": t, "index": 0} for t in ("be", "cause")]},
        {"thinking_blocks": [{"type": "thinking", "thinking": "because", "signature": "s"}]},
        {"reasoning": "because", "reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        {"reasoning": "because", "thought": "because"},
    ],
)
def test_reasoning_by_the_names_of_other_servers(given):
    (message,) = parsed({"messages": [{"role": "assistant", "content": "a"} | given]}).messages
    message.pop("thought", None)
    assert message == {"role": "assistant", "content": "a", "reasoning_content": "because"}


@pytest.mark.parametrize(
    "given",
    [
        {"reasoning_details": [{"type": "reasoning.encrypted", "data": "x"}]},
        {"reasoning_details": [{"type": "reasoning.text", "text": "be"}, {"type": "reasoning.text", "text": "cause"}]},
        {"thinking_blocks": "because"},
        {"thinking_blocks": [{"type": "thinking", "thinking": "because"}, {"type": "redacted_thinking", "data": "x"}]},
        {"thought": "because"},
    ],
)
def test_reasoning_that_cannot_be_read_is_not_dropped_without_a_word(given):
    with pytest.raises(BadLine, match=f"{next(iter(given))}.*'reasoning_content'"):
        parsed({"messages": [{"role": "assistant", "content": "a"} | given]})


def test_a_thought_that_is_a_part_of_the_text_is_no_reasoning():
    message = {"role": "assistant", "content": "I look.\n\nls", "thought": "I look.\n", "action": "ls"}
    assert parsed({"messages": [message]}).messages == (message,)


@pytest.mark.parametrize(
    "tags", ["<think>\n{}\n</think>", "<think>{}</think>\n", "[THINK]{}[/THINK]", "<a:think>{}</a:think>"]
)
def test_reasoning_with_the_tags_of_its_block_has_them_once(tags):
    message = {"role": "assistant", "content": "a", "reasoning_content": tags.format("because")}
    assert parsed({"messages": [message]}).messages == (message | {"reasoning_content": "because"},)


def test_reasoning_needs_no_content_beside_it():
    message = {"role": "assistant", "content": None, "reasoning_content": "because", "finish_reason": "length"}
    assert parsed({"messages": [message]}).messages == (message | {"content": ""},)
    with pytest.raises(BadLine, match="content must be a string"):
        parsed({"messages": [message | {"reasoning_content": ""}]})


@pytest.mark.parametrize(
    "others", [{"reasoning_content": ""}, {"thinking": ""}, {"thinking": math.nan, "reasoning": "because"}]
)
def test_reasoning_is_not_lost_beside_another_name_that_says_nothing(others):
    for name in {"reasoning_content", "reasoning", "thinking"} - others.keys():
        (message,) = parsed({"messages": [{"role": "assistant", "content": "a", name: "because"} | others]}).messages
        assert message == {"role": "assistant", "content": "a", "reasoning_content": "because"}


def test_reasoning_that_is_beside_the_content_and_in_it_is_there_once():
    for content in ("<think>\nbecause\n</think>\n\na", "\n<think>because</think>a"):
        (message,) = parsed(
            {"messages": [{"role": "assistant", "content": content, "reasoning_content": " because\n"}]}
        ).messages
        assert message == {"role": "assistant", "content": content}
    beside = {"role": "assistant", "content": "It ends with </think>.", "reasoning_content": "because"}
    assert parsed({"messages": [beside]}).messages == (beside,)


def test_sharegpt():
    done = parsed(
        {
            "system": "Be brief",
            "tools": json.dumps([TOOL]),
            "conversations": [
                {"from": "human", "value": "Rain?"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Paris"}}'},
                {"from": "observation", "value": "sunny"},
                {"from": "gpt", "value": "No."},
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "Yes."},
            ],
        }
    )
    assert [(m["role"], m["content"]) for m in done.messages] == [
        ("system", "Be brief"),
        ("user", "Rain?"),
        ("assistant", ""),
        ("tool", "sunny"),
        ("assistant", "No."),
        ("user", "Sure?"),
        ("assistant", "Yes."),
    ]
    assert done.messages[2]["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}
    assert done.tools == [TOOL]


def test_null_is_as_good_as_not_there():
    turns = [
        {"from": None, "value": None, "role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "from": None},
    ]
    assert parsed({"conversations": turns, "messages": None, "tools": "[]"}) == parsed({"messages": chat("q", "a")})


def test_functions_and_a_function_call_are_openais_first_names_of_tools_and_calls():
    """Left as they are the call would be lost, and the answer trained as if it ended without it."""
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    turns = [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "I look.", "function_call": function},
        {"role": "function", "name": "weather", "content": "dry"},
    ]
    done = parsed({"messages": turns, "functions": [TOOL["function"]]})
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    assert done.messages[1] == {"role": "assistant", "content": "I look.", "tool_calls": [call]}
    assert done.tools == [TOOL]
    turns[1]["content"] = None
    assert parsed({"messages": turns}).messages[1]["tool_calls"] == [call]
    assert parsed({"messages": turns, "functions": [TOOL]}).tools == [TOOL]  # the new form by the old name


def test_a_users_turn_may_say_that_it_is_not_trained():
    turns = [{"role": "user", "content": "a", "train": False}, {"role": "assistant", "content": "b", "train": True}]
    assert [message["content"] for message in parsed({"messages": turns}).messages] == ["a", "b"]


def test_a_prompt_is_one_users_message_where_prompts_are_read(tmp_path):
    with pytest.raises(BadLine, match=r"input_ids or prompt \(text\); has none \(keys: prompt\)"):
        parse(Line("f:1", {"prompt": ["x"]}), prompts=True)
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "a\u2028b\x85"},
        {"messages": chat("q", "a", "r"), "tools": [TOOL]},
        {"conversations": [{"from": "human", "value": "c"}]},
    ]
    path.write_text("\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert read_prompts(path) == [Prompt(chat("a\u2028b\x85")), Prompt(chat("q", "a", "r"), [TOOL]), Prompt(chat("c"))]
    path.write_text(json.dumps({"messages": chat("q", "a")}))
    assert read_prompts(path) == [Prompt(chat("q"))]
    for row in ({"messages": chat("q", "a")[1:]}, {"input_ids": [1], "loss_mask": [1]}):
        path.write_text(json.dumps(row))
        with pytest.raises(BadLine, match=r"p\.jsonl:1: nothing to answer"):
            read_prompts(path)


def test_key_is_the_content():
    messages = chat("a", "b")
    same = (
        parsed({"messages": messages, "id": 1}),
        parsed({"id": 2, "messages": [dict(reversed(m.items())) for m in messages]}),
    )
    assert same[0].key == same[1].key != parsed({"messages": chat("a", "c")}).key


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'{"messages": [', "not JSON"),
        (b'{"messages": "\xff"}', "not UTF-8: byte 0xff at position 14"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1, 2]", "expected a JSON object, got a list"),
        (b"{\n", r"not JSON: .* goes over several lines, write it on one: jq -c \. FILE"),
        ('{"messages": []}'.encode("utf-16"), "UTF-16 by its first bytes; iconv -f UTF-16"),
        (b"\x1f\x8b\x08\x00", r"gzip by its first bytes; end the file's name in \.gz"),
        (
            {"messages": [*chat("a"), {"role": "assistant", "content": "b", "train": False}]},
            "'train': false.*\"weight\": 0",
        ),
        ({"conversations": [{"from": "gpt", "value": "b", "loss": False}]}, "message 1 has 'loss': false"),
        ({"conversations": [{"from": "gpt", "value": "b", "loss": 0}]}, "message 1 has 'loss': 0, which is not read"),
        ({"conversations": [{"from": "gpt", "value": "b", "train": "false"}]}, "message 1 has 'train': \"false\""),
        ({"conversations": [{"from": "gpt", "value": "b", "loss_weight": 0.0}]}, "message 1 has 'loss_weight': 0.0"),
        (
            {"messages": [*chat("a"), {"role": "assistant", "content": "b", "prefix": True}]},
            "message 2 has 'prefix': true, so its text was given to the model.*\"weight\": 0",
        ),
        ({"messages": [{"role": "assistant", "content": "b", "partial": 1}]}, "message 1 has 'partial': 1, so its text"),
        (
            {"messages": [{"role": "assistant", "content": "b", "train_detail": [{"begin_offset": 0}]}]},
            "message 1 has 'train_detail'",
        ),
        ({"conversations": [{"from": "human", "role": "assistant", "value": "a"}]}, "'from' and 'role', which differ"),
        ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, "'value' and 'content', which differ"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "parameters": {"x": 1}}]}]},
            "message 1: the call of f has 'parameters'; call them 'arguments'",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "input": {"x": 1}}}]}]},
            "the call of f has 'input'",
        ),
        (
            {"messages": chat("a", "b"), "chat_template_kwargs": {"enable_thinking": False}},
            "the line has 'chat_template_kwargs' .*, which is not read; say it for all lines, in data.chat_template_kwargs",
        ),
        (
            {"messages": chat("a", "b"), "documents": [{"text": "x"}]},
            "the line has 'documents' .* write them into a message",
        ),
        ({"messages": chat("a", "b"), "continue_final_message": True}, "the line has 'continue_final_message'"),
        ({"messages": chat("a", "b"), "system_prompt": "x"}, "the line has 'system_prompt' and no system turn"),
        ({"messages": chat("a", "b"), "instructions": "x"}, "the line has 'instructions' and no system turn"),
        (
            {"messages": chat("a", "b"), "reasoning_effort": "high"},
            "the line has 'reasoning_effort' .* say it for all lines",
        ),
        ({"messages": chat("a", "b"), "enable_thinking": False}, "the line has 'enable_thinking' .* say it for all lines"),
        ({"messages": chat("a", "b"), "functions": {"name": "f"}}, "functions must be a list of objects, got an object"),
        ({"messages": chat("a", "b"), "functions": ["f"]}, "functions must be a list of objects, got a list"),
        ({"messages": chat("a", "b"), "finish_reasons": ["stop"] * 2}, "a reason for each of the 1 answers, got 2 of them"),
        ({"messages": chat("a", "b"), "finish_reasons": "stop"}, "finish_reasons must be a list .* got a string: stop"),
        (b'[{"messages": []}]', "expected a JSON object, got a list: .* one JSON array, write a conversation a line"),
        (b"[", "not JSON: .* one JSON array"),
        ({"prompt": "x"}, r"expected exactly one of messages, conversations or input_ids; has none \(keys: prompt\)"),
        ({"messages": chat("a"), "input_ids": [1]}, "has messages and input_ids"),
        ({"messages": []}, "messages must be a non-empty list"),
        ({"messages": "hello"}, "messages is a string that is not JSON"),
        ({"messages": ["hello"]}, "message 1 must be an object, got a string: hello"),
        ({"messages": [{"content": "x"}]}, "message 1 needs a role, got nothing"),
        (
            {"messages": [{"from": "human", "value": "x"}]},
            "needs a role, got nothing; 'from' and 'value' are read in 'conv",
        ),
        (
            {"messages": [{"role": "assistant", "content": "<think>a</think>b", "reasoning_content": "c"}]},
            "message 1 has reasoning_content and a content that begins with other reasoning in <think>",
        ),
        ({"messages": [{"role": "robot", "content": "x"}]}, "message 1 has role 'robot'; known roles: system"),
        ({"messages": [{"role": "assistant", "content": "", "reasoning": ["x"]}]}, "message 1: reasoning must be a string"),
        (
            {"messages": [{"role": "assistant", "content": "", "reasoning_content": "a", "thinking": "b"}]},
            "message 1 has 'thinking' and the same by another name, which differ",
        ),
        ({"messages": [{"role": "human", "content": "x"}]}, "message 1 has role 'human'"),
        ({"messages": [{"role": "user"}]}, "message 1: content must be a string or a list of text parts, got nothing"),
        ({"messages": [{"role": "user", "content": 3}]}, "got a number: 3"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "content part 'image_url' is not text"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "half of a surrogate pair"),
        (
            {"messages": [{"role": "assistant", "reasoning_content": 1, "content": ""}]},
            "reasoning_content must be a string",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "arguments of f is a string",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[]"}]}]}, "must be an object"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a tool call must be an object with a function name"),
        ({"messages": [{"role": "assistant", "tool_calls": 1}]}, "tool_calls must be a list"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": True, "function": {"name": "f"}}]}]},
            "the id of a tool call",
        ),
        ({"messages": chat("a", "b"), "tools": {"name": "f"}}, "tools must be a list of objects"),
        ({"messages": chat("a", "b"), "system": ["Be brief."]}, "system must be a string, got a list"),
        ({"input_ids": [1, 2]}, "input_ids without loss_mask"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "2 input_ids but 1 loss_mask entries"),
        ({"input_ids": [], "loss_mask": []}, "input_ids is empty"),
        ({"input_ids": [1, -2], "loss_mask": [1, 1]}, "token id -2 is outside"),
        ({"input_ids": [1, 2**31], "loss_mask": [1, 1]}, "token id 2147483648 is outside"),
        ({"input_ids": [1, 2.5], "loss_mask": [1, 1]}, "input_ids must be a list of whole numbers"),
        ({"input_ids": [1, True], "loss_mask": [1, 1]}, "true or false where a token id belongs"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, "loss_mask must be 0 or 1, got 2"),
        ({"input_ids": "12", "loss_mask": [1, 1]}, "input_ids must be a list of whole numbers, got a string: 12"),
    ],
)
def test_malformed_line_is_named(row, reason):
    with pytest.raises(BadLine, match=f"^f:1: .*{reason}"):
        parsed(row)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ('"role": "assistant", "content": "a", "content": "b"', "an object has the key 'content' twice"),
        ('"role": "user", "role": "assistant", "content": "a"', "an object has the key 'role' twice"),
        (
            r""""role": "assistant", "tool_calls": [{"name": "f", "arguments": "{\"x\": 1, \"x\": 2}"}]""",
            "message 1: arguments of f: an object has the key 'x' twice",
        ),
        (
            '"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": 1, "x": true}}]',
            "an object has the key 'x' twice",
        ),
        ('"role": "assistant", "content": "a", "content": "a"', None),  # which says the same whoever reads it
    ],
)
def test_a_key_with_two_values_is_refused(message, reason):
    line = Line("f:1", f'{{"messages": [{{{message}}}]}}'.encode())
    if reason is None:
        assert parse(line).messages[0]["content"] == "a"
    else:
        with pytest.raises(BadLine, match=f"^f:1: {reason}"):
            parse(line)


LLAVA = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "coco/1.jpg", "conversations": LLAVA}, r"the line has 'image' \(a string: coco/1\.jpg\), and only text"),
        ({"images": [{"bytes": "x"}], "messages": chat("a", "b")}, "the line has 'images'"),
        ({"image_url": "u", "prompt": "q"}, "the line has 'image_url'"),
        ({"videoPath": "v.mp4", "messages": chat("a", "b")}, "the line has 'videoPath'"),
        ({"audios": ["a.wav"], "input_ids": [1, 2, 3], "loss_mask": [0, 0, 1]}, "the line has 'audios'"),
        ({"messages": [{"role": "user", "content": "q", "images": ["x"]}]}, "message 1 has 'images'"),
        ({"messages": [{"role": "assistant", "content": "", "audio": {"id": "a1"}}]}, "message 1 has 'audio'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "q", "image": "x"}]}]},
            "a content part of message 1 has 'image'",
        ),
    ],
)
def test_what_is_more_than_text_is_refused(row, reason):
    with pytest.raises(BadLine, match=f"^f:1: {reason}.*leave such lines out, or take the key out"):
        parse(Line("f:1", row), prompts=True)


def test_keys_that_change_nothing_are_passed_over():
    """What says nothing, a prefix that is not trained, and a system prompt beside the system turn that was served."""
    said = chat("a", "b")
    row = {"chat_template_kwargs": {"enable_thinking": None}, "documents": [], "continue_final_message": False}
    assert parsed(row | {"messages": said, "system_prompt": ""}).messages == tuple(said)
    told = [{"role": "system", "content": "Be brief."}, *said]
    assert parsed({"messages": told, "system_prompt": "Be brief."}).messages == tuple(told)
    prefix = {"role": "assistant", "content": "b", "prefix": True, "weight": 0}
    assert parsed({"messages": [*chat("a"), prefix]}).messages[1] == prefix
    assert parsed({"conversations": [{"from": "human", "value": "a", "content": "a"}]}).messages[0]["content"] == "a"


def test_bare_tools_are_wrapped_as_servers_take_them():
    function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
    wrapped, search = {"type": "function", "function": function}, {"type": "web_search", "name": "s"}
    for bare in (function, {"type": "function"} | function, wrapped):
        assert parsed({"messages": chat("a", "b"), "tools": [bare, search]}).tools == [wrapped, search]
        assert parsed({"messages": chat("a", "b"), "tools": json.dumps([bare])}).tools == [wrapped]


def test_calls_and_responses_by_other_names():
    turns = [("human", "q"), ("tool_call", '{"name": "f", "arguments": {"x": 1}}'), ("tool_response", "2")]
    _, call, response = parsed({"conversations": [{"from": role, "value": text} for role, text in turns]}).messages
    assert call["role"] == "assistant" and call["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert response == {"role": "tool", "content": "2"}


def test_keys_that_say_there_is_no_picture_are_passed_over():
    none = {"image": None, "images": [], "video": "", "num_images": 0, "audio": {"path": None}, "has_image": False}
    row = none | {"image_score": float("nan"), "imagination": "x", "messages": chat("a", "b")}
    assert parse(Line("f:1", row)).messages == tuple(chat("a", "b"))


BEYOND_JSON = (
    datetime.datetime(2024, 5, 1),
    datetime.time(3),
    decimal.Decimal("1.5"),
    b"x",
    float("nan"),
    float("inf"),
    {"a": [b"x"]},
)


@pytest.mark.parametrize("value", BEYOND_JSON, ids=repr)
def test_what_json_cannot_write_is_left_out_beside_a_message_and_refused_in_it(value):
    """A regenerated row and a request are JSON; what nobody reads of a message is no reason to lose it."""
    done = parse(Line("f:1", {"messages": [{"role": "user", "content": "q", "timestamp": value, "n": [1, 2.5, None]}]}))
    assert done.messages == ({"role": "user", "content": "q", "n": [1, 2.5, None]},)
    call = {"name": "f", "arguments": {"when": value}}
    for row, place in (
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}, "message 1: tool_calls holds"),
        ({"messages": chat("q", "a"), "tools": [TOOL | {"since": value}]}, "tools holds"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": value}]}, "message 1: tool_call_id holds"),
        ({"messages": [{"role": "assistant", "content": "x", "weight": value}]}, "message 1: weight holds"),
    ):
        with pytest.raises(BadLine, match=f"^f:1: {place} what JSON cannot write, a "):
            parse(Line("f:1", row))
    if not isinstance(value, (dict, float)):
        with pytest.raises(BadLine, match=f"a list of text parts, got a {type(value).__name__}"):
            parse(Line("f:1", {"messages": [{"role": "user", "content": value}]}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
KEYS = ["role", "content", "from", "value", "tool_calls", "reasoning_content", "function", "name", "arguments"]
MESSAGE = st.dictionaries(st.sampled_from(KEYS), JSON | st.sampled_from(["user", "assistant", "gpt", "function_call"]))
ROW = st.dictionaries(
    st.sampled_from(["messages", "conversations", "input_ids", "loss_mask", "tools", "system"]),
    JSON | st.lists(MESSAGE | JSON, max_size=4) | st.lists(st.integers(-1, 9), max_size=4),
)
TEXTS = st.binary(max_size=40) | (ROW | JSON).map(lambda row: json.dumps(row).encode())


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.integers(0, 200), st.integers(0, 255))
def test_any_line_parses_or_is_a_bad_line(text, place, byte):
    """Whole lines, and the same with one byte overwritten."""
    for content in (text, text[:place] + bytes([byte]) + text[place + 1 :]):
        try:
            done = parse(Line("f:1", content))
        except BadLine as error:
            assert str(error).startswith("f:1: ") and error.reason
        else:
            assert done.messages or len(done.input_ids) == len(done.loss_mask) > 0


def test_lines_are_counted_from_one_and_blank_ones_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\n\n  \n\xef\xbb\xbf[]")  # of two files
    assert [(line.where, line.content) for line in read_lines(str(path))] == [(f"{path}:1", b"{}\n"), (f"{path}:4", b"[]")]
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(b"{}\n"))
    assert [line.content for line in read_lines(str(packed))] == [b"{}\n"]
    packed.write_bytes(gzip.compress(b"{}\n" * 1000)[:-9])
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: cannot be read"):
        list(read_lines(str(packed)))
    broken = bytearray(gzip.compress(b"{}\n"))
    broken[10] = 0xFF
    packed.write_bytes(broken)
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: cannot be read: .*invalid block"):
        list(read_lines(str(packed)))


def test_parquet_rows_lose_the_nulls_arrow_gave_them(tmp_path):
    rows = [
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}]},
        {"messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "g", "arguments": {"b": "x"}}]}]},
        {"messages": chat("hi", "ho")},
    ]
    path = str(tmp_path / "a[1].parquet")
    Dataset.from_list(rows).to_parquet(path)
    lines = list(read_lines(path))
    assert [line.where for line in lines] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    calls = [parse(line).messages[0]["tool_calls"][0]["function"] for line in lines[:2]]
    assert calls == [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {"b": "x"}}]
    assert parse(lines[2]).messages == tuple(chat("hi", "ho"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"bad.parquet: not a readable Parquet file"):
        list(read_lines(str(tmp_path / "bad.parquet")))


def test_parquet_goes_on_behind_any_row(tmp_path):
    for rows in (0, 2100):
        path = str(tmp_path / f"{rows}.parquet")
        pyarrow.parquet.write_table(pyarrow.table({"input_ids": pyarrow.array([[i] for i in range(rows)])}), path)
    lines = list(read_lines(path))
    assert [line.content["input_ids"] for line in lines] == [[i] for i in range(2100)]
    for done in (1, 999, 1000, 1001, 2099, 2100):
        assert list(read_lines(path, lines[done - 1].place)) == lines[done:]
    with pytest.raises(ValueError, match=r"0\.parquet: empty"):
        list(read_lines(str(tmp_path / "0.parquet")))


def test_files(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "d.parquet.gz", "empty.jsonl"):
        (tmp_path / name).write_text("" if name.startswith("empty") else "{}\n")
    assert expand([f"{tmp_path}/[ab].jsonl"]) == [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    for path, reason in (
        ("none.jsonl", "no such file, and none that matches it$"),
        ("", "is a folder"),
        ("c.txt", "neither JSONL"),
        ("d.parquet.gz", "neither"),
    ):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path)) + ".*" + reason):
            expand([f"{tmp_path}/{path}"])
        with pytest.raises(ValueError, match="^data.eval_paths: " + re.escape(str(tmp_path)) + ".*" + reason):
            expand([f"{tmp_path}/{path}"], setting="data.eval_paths")
    with pytest.raises(ValueError, match=r"empty\.jsonl: empty"):
        list(read_lines(f"{tmp_path}/empty.jsonl"))
