"""What a template does not render is in no prompt, and is counted and named."""

import pytest
from chats import CHATML, TOOL, chat, make_tokenizer
from templates import TEMPLATES

from fastdraft.data.conversations import Conversation
from fastdraft.data.prepare import Stats
from fastdraft.data.tokenize import ChatTokenizer

RESULT = {"role": "function", "name": "weather", "content": "3"}
YES = {"role": "assistant", "content": "yes"}
IGNORING = CHATML.replace("{% for message in messages %}", "{% for message in messages if message.role != 'function' %}")


def done(template, messages, tools=None):
    return ChatTokenizer(make_tokenizer(template))(Conversation("f:1", 0, tuple(messages), tools))


@pytest.mark.parametrize("content", ["3", "Two and two make four, as I think of it today."])
def test_messages_that_no_prompt_has_are_counted_by_role_with_the_first_one(content):
    messages = [*chat("Is it 3?", "yes", "r"), RESULT | {"content": content}, YES, RESULT | {"content": content}, YES]
    found = done(IGNORING, messages)
    assert found.unread == [(f"f:1, message {i}", "messages with the role 'function'") for i in (4, 6)]
    assert found.turns == 3 and found.left_out == []
    stats, other = Stats(), Stats()
    stats.count(found)
    other.count(done(IGNORING, messages))
    stats.add(other)
    said = "4 messages with the role 'function' are in no prompt: the chat template does not render them; the first: f:1,"
    assert any(line.startswith(said) for line in stats.remarks()) and "in 6 turns" in stats.lines()[0]


@pytest.mark.parametrize("name", ["chatml", "llama31", "mistral", "cohere", "glm", "harmony"])
def test_messages_that_the_template_renders_are_not_counted(name):
    messages = [{"role": "system", "content": "0"}, *chat("1", "yes"), {"role": "user", "content": "1"}, YES]
    assert done(TEMPLATES[name], messages).unread == []


def test_a_template_that_writes_a_result_in_other_words_renders_it():
    template = CHATML.replace("message['content'] +", "(message['content'] | upper) +")
    assert done(template, [*chat("r"), RESULT | {"content": "dry"}, YES]).unread == []


def test_a_message_behind_the_last_trained_turn_is_in_no_prompt_of_any_template():
    assert done(IGNORING, [*chat("q", "yes"), RESULT]).unread == []


def test_tools_that_no_prompt_has_are_counted():
    assert done(CHATML, chat("q", "yes"), [TOOL]).unread == [("f:1", "lists of tools")]
    assert done(TEMPLATES["chatml"], chat("q", "yes"), [TOOL]).unread == []
    assert done(CHATML, chat("q", "weather"), [TOOL]).unread == [("f:1", "lists of tools")]
