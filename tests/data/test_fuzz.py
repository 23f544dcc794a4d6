"""Whatever a file and a template hold: samples whose trained tokens are the assistant's, or an error naming the line."""

import json
import re

import jinja2
import numpy as np
from chats import CHATML, TOOL, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdraft.data.conversations import BadLine, Line, parse
from fastdraft.data.tokenize import ChatTokenizer

# --- templates: a turn's beginning, its text, its end, what closes the conversation, how a prompt ends -------------------

TAGS = ["<|im_start|>{}\n", "<|{}|>", "\n\n{}: ", " [{}] ", "<{}>"]
ENDS = ["<|im_end|>\n", "</s>", "\n", "", "<|eot_id|>", " ;"]
CONTENT = ["m.content", "m.content | trim", "m['content'] + ''", "(m.reasoning_content or '') + m.content"]
ONLY_LAST = "((m.reasoning_content or '') if loop.last else '') + m.content"  # reasoning that later turns make it drop
CALLS = "(m.tool_calls | tojson if m.tool_calls else '') + m.content"


@st.composite
def templates(draw):  # Jinja, what must not be trained, and whether a turn begins where the generation prompt ends
    tag, end = draw(st.sampled_from(TAGS)), draw(st.sampled_from(ENDS))
    content = draw(st.sampled_from([*CONTENT, ONLY_LAST, CALLS]))
    last = draw(st.sampled_from([end, end, "<|return|>"]))  # of a conversation's last turn
    opened = draw(
        st.sampled_from(["", "", "", "<|user|>\n", "<think>\n"])
    )  # by the generation prompt, and perhaps by the turn
    system = draw(st.sampled_from(["", "{{ 'SYSTEM' if messages[0].role != 'system' }}", "{{ bos_token }}"]))
    closing = draw(st.sampled_from(["", "", "<|endoftext|>"]))
    name = "m.role" if draw(st.booleans()) else "('MODEL' if m.role == 'assistant' else m.role | upper)"
    before, after = tag.split("{}")
    ended = f"{{{{ {last!r} if loop.last else {end!r} }}}}"
    text = f"{{{{ {content} }}}}{ended}"
    if draw(st.booleans()):
        text = (
            f"{{% if m.role == 'assistant' %}}{{% generation %}}{text}{{% endgeneration %}}{{% else %}}{text}{{% endif %}}"
        )
    prompt = before + ("assistant" if name == "m.role" else "MODEL") + after + opened
    if draw(st.integers(0, 5)) == 0:
        prompt = ""
    template = f"{system}{{% for m in messages %}}{{{{ {before!r} + {name} + {after!r} }}}}{text}{{% endfor %}}"
    never = ["[0-9]", "SYSTEM", "USER", "TOOL", "user", "system", "tool"]
    never += ["MODEL", "assistant"] if prompt else []  # without a prompt, the turn begins with its tag
    never += ["<.endoftext.>"] if end.strip() and last == end else []  # else what closes the conversation ends the turn
    return template + f"{{{{ {prompt!r} if add_generation_prompt else {closing!r} }}}}", "|".join(never), not opened


# What is not the assistant's is written in digits alone, and templates have none.
GIVEN = st.text("0123456789 \n", max_size=8)
SAID = st.text("abcé日🎉 \n<>|", max_size=12) | st.sampled_from(
    ["<|im_end|>", "<|assistant|>a", " </s> b", "<think>c</think>d"]
)
CALL = st.fixed_dictionaries(
    {"function": st.fixed_dictionaries({"name": st.just("f"), "arguments": st.just('{"a": "é"}')})}
)
ASSISTANT = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": SAID},
    optional={"reasoning_content": SAID, "tool_calls": st.lists(CALL, min_size=1, max_size=2)},
)
OTHER = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "user", "tool"]), "content": GIVEN})
CHAT = st.lists(st.one_of(OTHER, ASSISTANT, ASSISTANT), min_size=1, max_size=6)


def trained_runs(tokenizer, sample):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask.astype(np.int8), [0]])))
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@settings(max_examples=150, deadline=None)
@given(templates(), CHAT, st.sampled_from(["all", "last_turn"]), st.sampled_from([9, 4096]))
def test_only_what_the_assistant_says_is_trained(made, messages, train_on, max_length):
    template, never, plain = made
    tokenizer = make_tokenizer(template)
    chat = ChatTokenizer(tokenizer, max_length=max_length, train_on=train_on)
    try:
        done = chat(parse(Line("f:1", json.dumps({"messages": messages}).encode())))
    except BadLine as error:
        assert str(error).startswith("f:1: ")
        return
    for sample in done.samples:
        assert sample.trains and len(sample.input_ids) == len(sample.loss_mask) <= max_length
        for run in trained_runs(tokenizer, sample):
            assert not re.search(never, run.replace("<|user|>", "").replace("<|assistant|>", "")), (template, run)
    if plain and max_length > 9 and train_on == "all" and not done.rewritten and len(done.samples) == 1:
        runs = "".join(trained_runs(tokenizer, done.samples[0]))
        left_out = {where for where, _ in done.left_out}
        for number, message in enumerate(messages, 1):
            if message["role"] == "assistant" and "�" not in runs and f"f:1, message {number}" not in left_out:
                assert message["content"].strip() in runs, (template, runs)


# --- lines and templates that are wrong ---------------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=6) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
WHOLE = {
    "messages": [
        {"role": "system", "content": "0"},
        {"role": "user", "content": [{"type": "text", "text": "1"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "tool", "content": "2", "tool_call_id": "x"},
        {"role": "assistant", "content": "ab", "reasoning_content": "c"},
    ],
    "tools": [TOOL],
}
PATHS = [()]
for path in PATHS:  # of every value in WHOLE; it grows while it is read
    value = WHOLE
    for key in path:
        value = value[key]
    PATHS += [
        (*path, key) for key in (value if isinstance(value, dict) else range(len(value) if isinstance(value, list) else 0))
    ]
BROKEN = [
    "{% for m in messages %}{{ m.content }}",
    "{{ messages[9].content }}",
    "{{ 1 / (messages | length - 2) }}",
    "{{ messages[0].content.x.y }}",
    "{{ raise_exception('no') }}",
    "{% for m in messages %}{{ m.content | tojson | fromjson }}{% endfor %}",
    "{% for m in messages %}{{ m.tool_calls[0].function.arguments.items() }}{{ m.content }}{% endfor %}",
    "{{ ''.join(messages) }}",
    "{% generation %}{{ messages }}",
    "{{ range(10 ** 9) | list }}",
    "",
]
TOOLS = CHATML.replace("message['content']", "(message.tool_calls | tojson if message.tool_calls else message['content'])")


@settings(max_examples=200, deadline=None)
@given(st.data(), st.sampled_from([CHATML, TOOLS, *BROKEN]))
def test_what_is_wrong_is_named(data, template):
    """Values of a good line replaced or taken out, bytes overwritten, templates that fail: a sample or a sentence."""
    row = json.loads(json.dumps(WHOLE))
    for path in data.draw(st.lists(st.sampled_from(PATHS[1:]), max_size=2)):
        inner = row
        try:
            for key in path[:-1]:
                inner = inner[key]
            if data.draw(st.booleans()):
                inner[path[-1]] = data.draw(VALUES)
            else:
                del inner[path[-1]]
        except (KeyError, IndexError, TypeError):  # what it was in is gone already
            continue
    content = bytearray(json.dumps(row).encode())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        done = ChatTokenizer(make_tokenizer(template))(parse(Line("f:1", bytes(content))))
    except BadLine as error:
        assert str(error).startswith("f:1: ") and error.reason
    except ValueError as error:  # a setting that no line can mend
        assert "the chat template is not valid Jinja" in str(error) and isinstance(
            error.__cause__, jinja2.TemplateSyntaxError
        )
    else:
        assert all(sample.trains for sample in done.samples)


def test_a_turn_before_that_loses_its_words_is_no_place_to_start(tokenizer):
    """The prompt ends behind reasoning that the next rendering drops: what follows the prompt's end is not the answer."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + ('MODEL' if m.role == 'assistant' else m.role | upper) + '\\n' }}"
        "{{ ((m.reasoning_content or '') if loop.last else '') + m.content }}{{ '<|im_end|>\\n' }}{% endfor %}"
        "{{ '<|im_start|>MODEL\\n' if add_generation_prompt else '' }}"
    )
    call = {"function": {"name": "f", "arguments": '{"a": "b"}'}}
    messages = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "", "reasoning_content": "<", "tool_calls": [call]},
        {"role": "assistant", "content": "<"},
    ]
    chat = ChatTokenizer(tokenizer, chat_template=template)
    try:
        samples = chat(parse(Line("x", {"messages": messages}))).samples
    except BadLine:
        samples = []
    for sample in samples:
        assert "MODEL" not in tokenizer.decode(sample.input_ids[sample.loss_mask])
