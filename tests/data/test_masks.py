"""A trained token is one that the served model would itself have produced after the prompt as served."""

import functools
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from chats import TOOL, chat, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import ADDED, ENDS, TEMPLATES
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdraft.data import tokenize
from fastdraft.data.conversations import BadLine, Conversation, Line, parse
from fastdraft.data.history import long_renderings
from fastdraft.data.prompts import Prompt, prompt_ids
from fastdraft.data.template import ChatTemplate
from fastdraft.data.tokenize import ChatTokenizer

CASES = Path(__file__).parent / "cases"


def byte_tokenizer(specials, template):
    """Every byte is a token, and each of these: [{content, special, lstrip, rstrip}], the first of which is eos."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    bos = next((s["content"] for s in specials if s.get("bos")), None)
    for s in specials:
        strips = {side: s.get(side, False) for side in ("lstrip", "rstrip")}
        backend.add_tokens([AddedToken(s["content"], special=s.get("special", True), normalized=False, **strips)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=specials[0]["content"], bos_token=bos, chat_template=template
    )


def tokenized_case(name):
    folder = CASES / name
    tokenizer = byte_tokenizer(json.loads((folder / "specials.json").read_text()), (folder / "template.jinja").read_text())
    rows = (folder / "data.jsonl").read_bytes().splitlines()
    chat_tokenizer = ChatTokenizer(tokenizer)
    return tokenizer, [chat_tokenizer(parse(Line(f"f:{i}", row))) for i, row in enumerate(rows, 1)]


def runs(tokenizer, sample):
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask.astype(np.int8), [0]])))
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


def runs_in_order(tokenizer, done):
    """The trained runs of all samples, as the turns were said. Turns that are tokenised apart have samples of their own;
    prompts grow from turn to turn, so a run's place tells which is first."""
    found = []
    for sample in done.samples:
        begins = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask.astype(np.int8)])) == 1)
        found += zip(begins.tolist(), runs(tokenizer, sample), strict=True)
    return [run for _, run in (sorted(found, key=lambda each: each[0]) if done.apart else found)]


CALL = (
    "<|channel|>analysis<|message|>{}<|end|><|start|>assistant to=functions.weather"
    '<|channel|>commentary json<|message|>{{"city": "{}"}}<|call|>'
)
FINAL = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>{}<|return|>"


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("01_phi3_rstrip_end_token", [["How are you?<|end|>", "Paris.<|end|>"]]),
        ("02_gptoss_tool_reasoning", [[CALL.format("look", "Paris"), FINAL.format("it is dry", "No.")]]),
        (
            "02b_gptoss_tool_reasoning_refused",
            [
                [CALL.format("look", "Paris"), "<|channel|>final<|message|>No.<|return|>"],
                [CALL.format("look", "Paris"), CALL.format("again", "Rome"), FINAL.format("done", "Rome.")],
            ],
        ),
        ("03_tool_calls_not_in_template", [[]]),
        ("04_template_wants_content_parts", [[" Paris.<end_of_utterance>"]]),
        ("05_greeting_first_header_in_system", [[" Ahoy!<eos>", " A pirate.<eos>"]]),
        (
            "07_r1_reasoning_dropped",
            [
                ["two and two\n</think>\n\n4.<｜end▁of▁sentence｜>"],
                ["France\n</think>\n\nParis.<｜end▁of▁sentence｜>"],
            ],
        ),
        ("09_marks_hold_generation_prompt", [["How are you?<|im_end|>", "Paris.<|im_end|>"]]),
        ("13_marks_around_closing_token", [["How are you?<|end|>", "Paris.<|end|>"]]),
    ],
)
def test_cases_from_bug_reports(case, expected):
    tokenizer, done = tokenized_case(case)
    assert [[run for sample in each.samples for run in runs(tokenizer, sample)] for each in done] == expected
    if not expected[0]:
        assert done[0].left_out == [("f:1, message 2", "the chat template does not render their tool calls")]


def test_dirty_sharegpt_stays_right():
    """Each broken line is refused or trains its answers alone."""
    outcomes = []
    for row in (CASES / "dirty_sharegpt_ok.jsonl").read_bytes().splitlines():
        tokenizer = make_tokenizer()
        try:
            done = ChatTokenizer(tokenizer)(parse(Line("f:1", row)))
        except BadLine:
            outcomes.append("refused")
        else:
            outcomes.append([run for sample in done.samples for run in runs(tokenizer, sample)])
    assert outcomes[-1] == ["Hello.<|im_end|>"]
    assert all(outcome in ("refused", [], ["Hello.<|im_end|>"]) for outcome in outcomes) and outcomes[3] == []


# --- any conversation through the structure of any template -------------------------------------------------------------

HEADERS = ["<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<start_of_turn>model\n"]
HEADERS += ["[/INST]", "<|assistant|>\n", "<|Assistant|>", "<|CHATBOT|>", "Assistant:", "\n\nAssistant: ", "</think>"]
HEADERS += ["<|im_end|>", "<tool_response>", "</s>", "<think>\n"]
# What is not the assistant's is written in digits and quotes headers; what is, in letters.
GIVEN = st.lists(st.text("0123456789", min_size=1, max_size=4) | st.sampled_from(HEADERS), min_size=1, max_size=3)
OTHER = st.builds(lambda parts, end: "7" + "".join(parts) + end, GIVEN, st.sampled_from(["", " ", "\n"]))
SAID = st.builds(
    lambda a, b, c: a + b + c, *(st.sampled_from(x) for x in (["", "\n"], ["ab", "é b", "日🎉", "c"], ["", " \n"]))
)
THOUGHT = st.sampled_from(["xy", "x\n\ny"])
ARGUMENTS = st.sampled_from([{"q": "zz"}, {"q": 'z"z', "r": "zx"}, {}])


@st.composite
def assistants(draw):
    message = {"role": "assistant", "content": draw(SAID)}
    kind = draw(st.sampled_from(["plain", "plain", "plain", "inline", "reasoning", "call", "call only", "empty"]))
    if kind == "inline":
        message["content"] = f"<think>\n{draw(THOUGHT)}\n</think>\n\n{message['content'].strip()}"
    if kind == "reasoning":
        message["reasoning_content"] = draw(THOUGHT)
    if kind in ("call only", "empty"):
        message["content"] = draw(st.sampled_from(["", "\n"]))
    if kind.startswith("call"):
        calls = draw(st.lists(ARGUMENTS, min_size=1, max_size=2))
        message["tool_calls"] = [{"type": "function", "function": {"name": "fetch", "arguments": a}} for a in calls]
    return message


@st.composite
def conversations(draw):
    messages = [{"role": "system", "content": draw(OTHER)}] if draw(st.booleans()) else []
    if draw(st.integers(0, 4)) == 0:
        messages.append(draw(assistants()))
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(OTHER)})
        messages.append(draw(assistants()))
        while messages[-1].get("tool_calls") and draw(st.booleans()):
            messages += [{"role": "tool", "content": draw(OTHER)} for _ in range(draw(st.integers(1, 2)))]
            messages.append(draw(assistants()))
        if draw(st.integers(0, 5)) == 0:
            messages.append(draw(assistants()))
    function = {"name": "f", "description": draw(OTHER), "parameters": {"type": "object", "properties": {}}}
    return messages, draw(st.sampled_from([None, None, [{"type": "function", "function": function}]]))


NEVER = re.compile(
    r"[0-9]|user|system|ipython|<\|USER|<\|SYSTEM|observation|INST\]|outputs\|>|tool_response|header_id|\|>$^"
)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(made=conversations())
def test_no_other_role_is_trained_and_each_trained_turn_is_whole(name, made):
    messages, tools = made
    tokenizer = _tokenizers[name]
    where = "f:1"
    try:
        done = _chats[name](parse(Line(where, json.dumps({"messages": messages, "tools": tools}).encode())))
    except BadLine as error:
        assert str(error).startswith("f:1: up to message ")
        return
    trained = runs_in_order(tokenizer, done)
    ends = (ENDS[name], "<|call|>")
    if ENDS[name]:  # turns in a row are one run where the template sets nothing between them
        trained = [
            turn for run in trained for turn in re.findall(rf".*?(?:{'|'.join(map(re.escape, ends))})", run, re.DOTALL)
        ]
    for run in trained:
        assert not NEVER.search(run), (run, messages)
        assert run.endswith(ends) and run not in ends, (run, messages)
    left_out = {int(place.rpartition(" ")[2]) for place, _ in done.left_out}
    turns = [m for i, m in enumerate(messages, 1) if m["role"] == "assistant" and i not in left_out]
    assert len(trained) == len(turns), (trained, done.left_out)
    lost = 0
    for run, turn in zip(trained, turns, strict=True):
        thought, _, said = turn["content"].rpartition("</think>")
        thought = thought.removeprefix("<think>").strip() or turn.get("reasoning_content", "")
        assert said.strip() in run
        lost += thought not in run
        for call in turn.get("tool_calls", []):
            for value in call["function"]["arguments"].values():
                assert value in run or json.dumps(value)[1:-1] in run
    assert lost == done.lost_reasoning


_tokenizers = {}
_chats = {}
for _name, _template in TEMPLATES.items():
    _tokenizers[_name] = make_tokenizer(_template)
    _tokenizers[_name].add_tokens([AddedToken(token, special=True, normalized=False) for token in ADDED])
    _chats[_name] = ChatTokenizer(_tokenizers[_name])


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_chats_are_trained_through_each_template(name):
    """Refusing all would pass the test above; an answer that is the question's text too is told apart by its place."""
    messages = [*chat("same", "same", "a\n", "same"), *chat("Assistant: same", "b", "c", "same")]
    tokenizer = _tokenizers[name]
    done = _chats[name](Conversation("f:1", 0, tuple(messages)))
    found = [run.strip() for sample in done.samples for run in runs(tokenizer, sample)]
    said = [
        re.sub(r"<\|(START|END)_RESPONSE\|>|<think>\n\n</think>\n\n|<\|channel.*message\|>", "", run).strip()
        for run in found
    ]
    assert said == [text + ENDS[name] for text in ("same", "same", "b", "same")] and not done.left_out


CALL_OF_WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED = [{"role": "assistant", "content": "", "reasoning_content": "look", "tool_calls": [CALL_OF_WEATHER]}]
CALLED += [{"role": "tool", "name": "weather", "content": "dry"}, {"role": "assistant", "content": "It is dry."}]


@pytest.mark.parametrize(
    ("name", "messages", "tools", "shown"),
    [
        ("parts", chat("Is it dry?", "Yes.", "Why?", "So."), None, "Why?"),
        ("v3", [*chat("Is it dry?"), *CALLED], [TOOL], '{"city": "Rome"}'),
        ("harmony", [*chat("Is it dry?"), *CALLED], [TOOL], "look"),
    ],
)
def test_prompts_are_rendered_as_training_data_is(name, messages, tools, shown):
    """Contents as parts, arguments as text, and reasoning under another name reach the prompt that is decoded, too."""
    sample = _chats[name](Conversation("f:1", 0, tuple(messages), tools)).samples[-1]
    answered = int(np.flatnonzero(np.diff(sample.loss_mask.astype(int)) == 1)[-1]) + 1
    (ids,) = prompt_ids([Prompt(messages[:-1], tools)], _tokenizers[name])
    assert ids == sample.input_ids[:answered].tolist() and shown in _tokenizers[name].decode(ids)


@pytest.mark.parametrize("kind", ["marks", "marks_without_end", "marks_with_header", "marks_of_all"])
def test_marks_beside_transformers_own(kind):
    """The masks agree where the marks are around what the model produces; other marks differ as their names say."""
    messages = chat("Hello there", "How are you?", "The capital?", "Paris.")
    tokenizer = _tokenizers[kind]
    (sample,) = _chats[kind](Conversation("f:1", 0, tuple(messages))).samples
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert sample.input_ids.tolist() == theirs["input_ids"]
    assert runs(tokenizer, sample) == ["How are you?<|im_end|>", "Paris.<|im_end|>"]
    ours, theirs = sample.loss_mask, np.array(theirs["assistant_masks"], dtype=bool)
    differs = [tokenizer.decode(i) for i in sample.input_ids[ours & ~theirs]]
    assert differs == (["<|im_end|>"] * 2 if kind == "marks_without_end" else [])
    assert (theirs & ~ours).any() == (kind in ("marks_with_header", "marks_of_all"))


def test_a_template_without_a_prompt_but_with_marks():
    template = "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    template += "{{ '</s>' }}{% endgeneration %}{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    tokenizer = make_tokenizer(template)
    (sample,) = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(chat("a", "b", "c", "d")))).samples
    assert runs(tokenizer, sample) == ["b</s>", "d</s>"]


def glm_tokenizer():
    tokenizer = make_tokenizer(TEMPLATES["glm"])
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<|user|>", *ADDED)])
    stops = tokenizer.convert_tokens_to_ids(["<|user|>", "<|observation|>"])
    return tokenizer, ChatTokenizer(tokenizer, stop_ids=stops)


def test_the_next_turns_first_token_is_trained_where_it_stops_the_model():
    """GLM's answers end with the header of the turn to come, which generation_config.json names as an eos id."""
    tokenizer, chats = glm_tokenizer()
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
    messages = [*chat("a", "b", "c", "look"), {"role": "tool", "content": "dry"}, {"role": "assistant", "content": "d"}]
    messages[3]["tool_calls"] = [call]
    done = chats(Conversation("f:1", 0, tuple(messages)))
    called = "look\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>"
    expected = ["b<|user|>", called + "<|observation|>", "d<|user|>"]
    assert [runs(tokenizer, sample) for sample in done.samples] == [expected] and not done.left_out
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(done.samples[0].input_ids) == rendered + "<|user|>"
    # Behind an answer to which the data gives another answer the model would have stopped, so each is a text of its own.
    done = chats(Conversation("f:1", 0, (*chat("a", "b"), {"role": "assistant", "content": "c"})))
    assert [runs(tokenizer, sample) for sample in done.samples] == [["b<|user|>"], ["c<|user|>"]]


@given(made=conversations())
@settings(max_examples=60, deadline=None)
def test_a_stop_that_is_the_next_turns_first_token_ends_every_turn(made):
    messages, tools = made
    tokenizer, chats = _glm
    try:
        done = chats(parse(Line("f:1", json.dumps({"messages": messages, "tools": tools}).encode())))
    except BadLine as error:
        assert str(error).startswith("f:1: up to message ")
        return
    left_out = {int(place.rpartition(" ")[2]) for place, _ in done.left_out}
    calls = [bool(m.get("tool_calls")) for i, m in enumerate(messages, 1) if m["role"] == "assistant" and i not in left_out]
    trained = runs_in_order(tokenizer, done)
    assert [run.endswith("<|observation|>") for run in trained] == calls
    for run in trained:
        said = run.removesuffix("<|observation|>").removesuffix("<|user|>")
        assert said != run and not re.search(r"<\|(user|observation|assistant|system)\|>|[0-9]", said), (run, messages)


_glm = glm_tokenizer()


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_ends_its_turns_itself_gets_nothing_more(name):
    """The target's eos ids change no sample where the template writes them, and none where no turn begins with one."""
    tokenizer = _tokenizers[name]
    stops = tokenizer.convert_tokens_to_ids([ENDS[name] or "<|im_end|>", "<|call|>"])
    messages = chat("a", "b", "c", "d \n")
    assert outcome(ChatTokenizer(tokenizer, stop_ids=stops), messages) == outcome(_chats[name], messages)


def test_weight_zero_and_empty_turns_are_not_trained():
    messages = chat("a", "b", "c", "d", "e", " \n", "f", "g")
    messages[1]["weight"] = 0
    messages[3]["weight"] = 1
    tokenizer = make_tokenizer()
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(messages)))
    assert [runs(tokenizer, sample) for sample in done.samples] == [["d<|im_end|>", "g<|im_end|>"]]
    assert done.left_out == [("f:1, message 2", "their weight is 0"), ("f:1, message 6", "they are empty")]
    messages[1]["weight"] = 0.5
    with pytest.raises(BadLine, match=r"f:1: message 2: weight must be 0 or 1, got 0\.5"):
        ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(messages)))


def test_what_the_template_cuts_or_changes_is_left_out():
    call = {"role": "assistant", "content": "look", "tool_calls": [TOOL | {"function": {"name": "g", "arguments": {}}}]}
    for name, message, reason in (
        ("llama31", call, "does not render all of their text"),
        ("phi3", call, "does not render their tool calls"),
    ):
        done = _chats[name](Conversation("f:1", 0, (*chat("a"), message)))
        assert done.samples == [] and [reason in why for _, why in done.left_out] == [True]
    template = TEMPLATES["phi3"].replace("m.content", "(m.content | upper)")
    done = ChatTokenizer(make_tokenizer(template))(Conversation("f:1", 0, tuple(chat("a", "b"))))
    assert done.samples == [] and done.left_out == [("f:1, message 2", "the chat template changes their text")]


def test_a_prompt_that_opens_what_the_answer_lacks_is_counted():
    done = _chats["r1"](Conversation("f:1", 0, tuple(chat("a", "b", "c", "<think>\nx\n</think>\n\nd"))))
    assert (done.unopened, done.raw_reasoning) == (1, 1)
    prompt = "'<|im_start|>assistant\n' }}{%- endif"
    closed = prompt.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
    tokenizer = make_tokenizer(TEMPLATES["chatml"].replace(prompt, closed))
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(chat("a", "b"))))
    assert tokenizer.decode(done.samples[0].input_ids).endswith("assistant\n<think>\n\n</think>\n\nb<|im_end|>")
    assert done.apart == 1  # this tokenizer writes a last line break before a word as a token of its own
    assert runs(tokenizer, done.samples[0]) == ["b<|im_end|>"] and done.unopened == 0


def test_a_template_that_looks_at_a_texts_beginning_or_length():
    """Marks would change its rendering; in a text too short for marks inside, the text itself is looked for."""
    for added in ("('!' if m.content.startswith('b') else '')", "(m.content | length | string)"):
        template = TEMPLATES["phi3"].replace("m.content", f"{added} + m.content")
        tokenizer = make_tokenizer(template)
        done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(chat("bbb", "bxb", "b", "bu"))))
        before = "!!" if "!" in added else "32"
        expected = [f"{sign}{text}<|end|>" for sign, text in zip(before, ("bxb", "bu"), strict=True)]
        assert [runs(tokenizer, sample) for sample in done.samples] == [expected] and not done.left_out


# A call is a message of its own behind what is thought, as in gpt-oss; OPTIONAL and TEST look at texts of tools and calls.
CALLS_BESIDE = (
    "{% for tool in tools or [] %}{% set f = tool.function %}{{ f.name }}(OPTIONAL){% endfor %}"
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}"
    "{% elif m.tool_calls %}{% if m.content %}{{ '<|start|>assistant<|message|>' + m.content + '<|end|>' }}{% endif %}"
    "{% for call in m.tool_calls %}{% set f = call.function %}{{ '<|start|>assistant to=' + f.name TEST }}"
    "{{ '<|message|>' + f.arguments | tojson + '<|call|>' }}{% endfor %}"
    "{% else %}{{ '<|start|>assistant<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, {"n": 3}, {"n": "l"}])
@pytest.mark.parametrize(
    ("optional", "test"),
    [
        ("{{ 'city' in f.parameters.required }}", ""),
        ("{{ f.name == 'weather' }}", ""),
        ("", "+ ('!' if f.name == 'weather' else '')"),
    ],
)
def test_a_call_is_trained_whole_where_the_template_compares_texts_of_tools_and_calls(optional, test, arguments):
    template = CALLS_BESIDE.replace("OPTIONAL", optional).replace("TEST", test)
    tags = [{"content": f"<|{name}|>"} for name in ("call", "start", "message", "end")]
    tokenizer = byte_tokenizer(tags, template)
    function = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}, "required": ["city"]}}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages = [*chat("Rain?", "look"), {"role": "tool", "content": "dry"}, {"role": "assistant", "content": "No."}]
    messages[1]["tool_calls"] = [call]
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(messages), [{"type": "function", "function": function}]))
    sign = "!" if test else ""
    first = f"<|message|>look<|end|><|start|>assistant to=weather{sign}<|message|>{json.dumps(arguments)}<|call|>"
    assert [runs(tokenizer, sample) for sample in done.samples] == [[first, "<|message|>No.<|end|>"]]
    assert done.left_out == []


# Turns of users and assistants, and a block that the generation prompt may have behind its header.
BLOCKS = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + m.content + '<|stop|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant:BLOCK' }}{% endif %}"
)


def block_tokenizer(template, *added):
    return byte_tokenizer([{"content": tag} for tag in ("<|stop|>", "<|turn|>", "<think>", "</think>", *added)], template)


def marked(tokenizer, messages, **options):
    """Each sample's text with its trained tokens in brackets, and what came of the conversation."""
    done = ChatTokenizer(tokenizer, **options)(Conversation("f:1", 0, tuple(messages)))
    texts = []
    for sample in done.samples:
        ids, mask = sample.input_ids, sample.loss_mask
        edges = [0, *(np.flatnonzero(np.diff(mask.astype(np.int8))) + 1), len(ids)]
        pieces = [(tokenizer.decode(ids[a:b]), mask[a]) for a, b in itertools.pairwise(edges)]
        texts.append("".join(f"[[{text}]]" if trained else text for text, trained in pieces))
    return texts, done


@pytest.mark.parametrize(
    "block",
    [
        "<|channel>thought\n<channel|>",  # as Gemma 4's where it does not think
        "<|START_THINKING|><|END_THINKING|>",  # as Command's
        "<|begin_thought|>\n<|end_thought|>\n",
        "<think>\n\n</think>\n\n",
    ],
)
def test_a_block_that_the_prompt_opens_and_closes_is_part_of_the_prompt(block):
    """The template renders it in no turn, and yet the model answers behind it."""
    template = BLOCKS.replace("BLOCK", block.replace("\n", "\\n"))
    tokenizer = block_tokenizer(template, *re.findall(r"<[^<>]+>", block))
    texts, done = marked(tokenizer, chat("q", "yes", "r", "no"))
    first = f"<|turn|>user:q<|stop|><|turn|>assistant:{block}[[yes<|stop|>]]<|turn|>user"
    assert texts == [
        first.removesuffix("<|turn|>user"),
        f"<|turn|>user:q<|stop|><|turn|>assistant:yes<|stop|><|turn|>user:r<|stop|><|turn|>assistant:{block}[[no<|stop|>]]",
    ]
    assert done.unopened == 0


@pytest.mark.parametrize("block", ["<think>\n", "<|channel>thought\n", "<|channel|>analysis<|message|>"])
def test_a_block_that_the_prompt_opens_only_is_left_out_and_counted(block):
    template = BLOCKS.replace("BLOCK", block.replace("\n", "\\n"))
    texts, done = marked(block_tokenizer(template, *re.findall(r"<[^<>]+>", block)), chat("q", "yes"))
    assert texts == ["<|turn|>user:q<|stop|><|turn|>assistant:[[yes<|stop|>]]"] and done.unopened == 1


def test_white_space_that_only_the_prompt_has_is_the_prompts():
    """Else the last tag of the header, which the turn has too, would be taken for a block that the turn lacks."""
    template = (
        "{% for m in messages %}{{ '<|head|>' + m.role + '<|text|>\n' + m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant<|text|>\n\n' }}{% endif %}"
    )
    texts, done = marked(block_tokenizer(template, "<|head|>", "<|text|>"), chat("q", "yes"))
    assert texts == ["<|head|>user<|text|>\nq<|stop|><|head|>assistant<|text|>\n\n[[yes<|stop|>]]"]
    assert done.unopened == 0


def test_a_header_is_never_trained_where_the_template_asks_for_no_answer_after_an_answer():
    """Two assistant's turns in a row: the prompt of the second has no header (Reka), which comes with the turn."""
    template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'assistant' %}{{ 'assistant:' }}{% endif %}"
    )
    messages = [*chat("q", "yes"), {"role": "assistant", "content": "no"}]
    texts, _ = marked(block_tokenizer(template), messages)
    assert texts == ["user: q<|stop|>assistant:[[ yes<|stop|>]]assistant:[[ no<|stop|>]]"]


def test_a_turn_that_goes_on_behind_a_token_that_stops_the_model_is_left_out():
    """The served model would have ended there, so what follows is not its own."""
    tokenizer = block_tokenizer(BLOCKS.replace("BLOCK", ""), "<|eos|>")
    texts, done = marked(tokenizer, chat("q", "yes<|stop|>more", "r", "no"))
    before = "<|turn|>user:q<|stop|><|turn|>assistant:yes<|stop|>more<|stop|>"
    assert texts == [f"{before}<|turn|>user:r<|stop|><|turn|>assistant:[[no<|stop|>]]"]
    assert done.left_out == [("f:1, message 2", "they hold '<|stop|>', which stops the served model, before their end")]
    stops = [tokenizer.convert_tokens_to_ids("<|eos|>")]
    texts, done = marked(tokenizer, chat("q", "a<|eos|>b"), stop_ids=stops)
    assert texts == [] and "'<|eos|>'" in done.left_out[0][1]
    texts, done = marked(tokenizer, chat("<|stop|>?", "a <|eos|> b"))  # a user's may, and this one stops no model here
    assert texts == ["<|turn|>user:<|stop|>?<|stop|><|turn|>assistant:[[a <|eos|> b<|stop|>]]"] and not done.left_out


def test_an_answer_that_a_limit_of_tokens_ended_is_trained_up_to_its_last_word():
    """The token behind it is the template's: the model had more to say. `data regenerate` writes such rows."""
    tokenizer, before = block_tokenizer(BLOCKS.replace("BLOCK", "")), "<|turn|>user:q<|stop|><|turn|>assistant:"
    row = {"messages": chat("q", "yes", "r", "no and"), "finish_reasons": ["stop", "length"], "length_cut": True}
    conversation = parse(Line("f:1", row))
    texts, done = marked(tokenizer, conversation.messages)
    assert texts == [f"{before}[[yes<|stop|>]]<|turn|>user:r<|stop|><|turn|>assistant:[[no and]]<|stop|>"]
    assert done.cut == 1 and not done.left_out
    for reason in ("max_tokens", "content_filter"):  # other servers' words, and others than the model that ended it
        assert parse(Line("f:1", row | {"finish_reasons": ["stop", reason]})).messages[3]["finish_reason"] == reason
        said = {"role": "assistant", "content": "no", "finish_reason": reason}
        assert marked(tokenizer, [chat("q")[0], said])[0] == [f"{before}[[no]]<|stop|>"]
    uncut = parse(Line("f:1", row | {"finish_reasons": ["stop", "stop"]}))
    assert uncut == parse(Line("f:1", {"messages": row["messages"]}))
    word = {"role": "assistant", "content": "|>", "finish_reason": "length"}  # with which the token behind it ends, too
    texts, _ = marked(tokenizer, [chat("q")[0], word])
    assert texts == [f"{before}[[|>]]<|stop|>"]
    thought = {"role": "assistant", "content": "<think>\nsince it", "finish_reason": "length"}
    texts, _ = marked(block_tokenizer(BLOCKS.replace("BLOCK", "<think>\\n")), [chat("q")[0], thought])
    assert texts == [f"{before}<think>\n[[since it]]<|stop|>"]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "yes"}}}
    calls = "m.content + (m.tool_calls | tojson if m.tool_calls else '')"
    template = BLOCKS.replace("BLOCK", "").replace("m.content", calls)
    _, done = marked(block_tokenizer(template), [chat("q")[0], thought | {"content": "", "tool_calls": [call]}])
    assert done.left_out == [("f:1, message 2", "a limit of tokens cut them, and their last word cannot be found")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"finish_reason": "length"}, {}),
        ({"stop_reason": "max_tokens"}, {}),
        ({"finish_reason": {"type": "length", "length": 2}}, {}),
        ({}, {"stop_reason": "max_tokens"}),
        ({}, {"done_reason": "length"}),
        ({}, {"finish_reason": "MAX_TOKENS"}),
        ({}, {"finish_reason": "stop", "stop_reason": "length"}),
        ({"finish_reasons": ["stop", "LENGTH"]}, {}),
    ],
)
def test_that_a_limit_of_tokens_ended_an_answer_is_read_by_any_servers_key(row, message):
    tokenizer, before = block_tokenizer(BLOCKS.replace("BLOCK", "")), "<|turn|>user:q<|stop|><|turn|>assistant:"
    messages = chat("q", "yes", "r", "no and")
    line = Line("f:1", {"messages": [*messages[:3], messages[3] | message], **row})
    texts, done = marked(tokenizer, parse(line).messages)
    assert texts == [f"{before}[[yes<|stop|>]]<|turn|>user:r<|stop|><|turn|>assistant:[[no and]]<|stop|>"] and done.cut == 1
    ended = {"finish_reason": "stop", "stop_reason": 2}  # vLLM's, the number of a token
    assert marked(tokenizer, parse(Line("f:1", {"messages": messages, **ended})).messages)[1].cut == 0


OVER_PARTS = BLOCKS.replace("BLOCK", "").replace(
    " + m.content + '<|stop|>' }}",
    " + (m.content if m.content is string else '') }}{% if m.content is not string %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{{ '<|stop|>' }}",
)
TEXTS = [{"type": "text", "text": "<file>a.py</file>"}, {"type": "text", "text": "Fix it."}]


@pytest.mark.parametrize(
    ("template", "between"),
    [
        (BLOCKS.replace("BLOCK", ""), "\n"),  # vLLM joins the parts with a line break
        (OVER_PARTS, ""),
        (OVER_PARTS.replace("{{ part.text }}", "{{ part.text + ('' if loop.last else ' ') }}"), " "),
    ],
)
def test_text_parts_of_a_given_content_are_joined_as_they_are_served(template, between):
    tokenizer, chats = block_tokenizer(template), []
    for system in ("", "s"):
        row = {"messages": [{"role": "user", "content": TEXTS}, chat("q", "yes")[1]], "system": system}
        (sample,) = ChatTokenizer(tokenizer)(parse(Line("f:1", row))).samples
        chats.append(tokenizer.decode(sample.input_ids))
    said = f"<|turn|>user:<file>a.py</file>{between}Fix it.<|stop|><|turn|>assistant:yes<|stop|>"
    assert chats == [said, f"<|turn|>system:s<|stop|>{said}"]
    row = {"messages": [*chat("q", "look"), {"role": "tool", "content": TEXTS}, chat("q", "yes")[1]]}
    (sample,) = ChatTokenizer(tokenizer)(parse(Line("f:1", row))).samples
    assert "<|turn|>tool:<file>a.py</file>\nFix it.<|stop|>" in tokenizer.decode(sample.input_ids)
    row = {"messages": [*chat("q"), {"role": "assistant", "content": TEXTS}]}
    (sample,) = ChatTokenizer(tokenizer)(parse(Line("f:1", row))).samples
    assert runs(tokenizer, sample) == ["<file>a.py</file>Fix it.<|stop|>"]
    row["messages"] += chat("r", "no")  # whose prompt has white space in the answer that the model did not write
    if between:
        with pytest.raises(BadLine, match="message 2: the text parts of an answer would have white space between them"):
            ChatTokenizer(tokenizer)(parse(Line("f:1", row)))
    else:
        assert len(ChatTokenizer(tokenizer)(parse(Line("f:1", row))).samples) == 1


def test_text_parts_that_the_template_trims():
    """As Gemma 3's does; what a template makes of parts is refused where it makes that of no text."""
    texts = [{"type": "text", "text": " a\n"}, {"type": "text", "text": "b"}]
    line = Line("f:1", {"messages": [{"role": "user", "content": texts}, chat("q", "yes")[1]]})
    tokenizer = block_tokenizer(OVER_PARTS.replace("part.text", "part.text | trim"))
    (sample,) = ChatTokenizer(tokenizer)(parse(line)).samples
    assert tokenizer.decode(sample.input_ids) == "<|turn|>user:ab<|stop|><|turn|>assistant:yes<|stop|>"
    tokenizer = block_tokenizer(OVER_PARTS.replace("part.text", "part.text | replace('\\n', '!')"))
    with pytest.raises(BadLine, match="message 1: its text parts are rendered as no text is"):
        ChatTokenizer(tokenizer)(parse(line))


SAID_BY_ROLE = (
    "{% for m in messages %}{{ m.role + 'HEAD' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistantHEAD' }}{% endif %}"
)


def sentencepiece_like(template):
    """Spaces are letters, one is put before every text, and line breaks are one piece with the word behind them."""
    words = [
        "user",
        "assistant",
        ":",
        "\n",
        "▁is",
        "▁two",
        "▁four",
        "two",
        "four",
        "\ntwo",
        "\nfour",
        "▁user",
        "▁assistant",
    ]
    letters = sorted({letter for word in words for letter in word} | {"▁"})
    vocab = {token: i for i, token in enumerate(["<|im_end|>", *letters, *(w for w in words if len(w) > 1)])}
    model = models.Unigram([(token, -float(len(vocab) - i)) for token, i in vocab.items()], unk_id=0)
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<|im_end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", chat_template=template)


@pytest.mark.parametrize("make", [make_tokenizer, sentencepiece_like])
@pytest.mark.parametrize(
    ("head", "messages", "apart"),
    [
        (": ", chat("is two", "two", "is four", "four"), 2),  # a space that the answer's first word would take
        (":\n\n", chat("is two", "two", "is four", "four"), 2),  # line breaks that are other tokens before a word
        (":", chat("is two", " two", "is four", " four"), 0),
        (":", chat("is two", "two", "is four", "four"), 0),
    ],
)
def test_a_turn_stands_behind_the_tokens_of_its_prompt_as_served(make, head, messages, apart):
    """The tokens before each turn are those of the prompt alone, whatever the turn would make of them."""
    tokenizer = make(SAID_BY_ROLE.replace("HEAD", head.replace("\n", "\\n")))
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(messages)))
    assert (done.apart, done.joined, done.rewritten) == (apart, 0, False) and len(done.samples) == max(apart, 1)
    said = [run.strip() for run in runs_in_order(tokenizer, done)]  # the decoder of the one takes a first space away
    assert said == [m["content"].strip() + "<|im_end|>" for m in messages[1::2]]
    prompts = [prompt_ids([Prompt(messages[:k])], tokenizer)[0] for k in (1, 3)]
    for sample in done.samples:
        edges = np.diff(np.concatenate([[0], sample.loss_mask.astype(np.int8)]))
        for begin in np.flatnonzero(edges == 1):
            assert sample.input_ids[:begin].tolist() in prompts


def test_only_the_turns_that_need_it_are_tokenised_apart():
    tokenizer = make_tokenizer(SAID_BY_ROLE.replace("HEAD", ":\\n"))
    messages = chat("is two", "two", "is four", "\n\nfour", "is two", "two")
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 5, tuple(messages)))
    assert [runs(tokenizer, sample) for sample in done.samples] == [["\n\nfour<|im_end|>"], ["two<|im_end|>"] * 2]
    assert done.apart == 1 and [sample.conversation for sample in done.samples] == [5, 5]
    before = prompt_ids([Prompt(messages[:3])], tokenizer)[0]
    assert done.samples[0].input_ids[: len(before)].tolist() == before
    whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert done.samples[1].input_ids.tolist() == whole


def test_turns_that_cannot_be_tokenised_apart_are_counted():
    """A token that takes the space before it along leaves no way to tell what the tokens of the turn alone are read as."""
    tokenizer = make_tokenizer(SAID_BY_ROLE.replace("HEAD", ": "))
    tokenizer.add_tokens([AddedToken("<note>", lstrip=True)])
    texts, done = marked(tokenizer, chat("is two", "<note> <note> four", "is four", "four"))
    assert (done.apart, done.joined) == (1, 1)
    assert any("assistant:<note>[[<note> four<|im_end|>]]" in text for text in texts)


def test_turns_that_nothing_ends_are_counted():
    """A template without an eos token, or one whose end of a turn the target's files do not name as eos."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    texts, done = marked(block_tokenizer(template), chat("q", "yes", "r", "no"))
    assert texts == ["user: q\nassistant:[[ yes]]\nuser: r\nassistant:[[ no]]\n"] and done.endless == 2
    tokenizer = block_tokenizer(BLOCKS.replace("BLOCK", "").replace("<|stop|>", "<|end|>"), "<|end|>")
    texts, done = marked(tokenizer, chat("q", "yes"))
    assert texts == ["<|turn|>user:q<|end|><|turn|>assistant:[[yes<|end|>]]"] and done.endless == 1
    for stop, endless in ((tokenizer.convert_tokens_to_ids("<|end|>"), 0), (len(tokenizer) + 1, 1)):
        _, done = marked(tokenizer, chat("q", "yes"), stop_ids=[stop])
        assert done.endless == endless


# The last answer has a block for its reasoning, also where there is none, and the prompt opens that block (Qwen 3.5).
EMPTY_BLOCK = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}{% if m.role == 'assistant' and loop.last %}"
    "{% set parts = m.content.split('</think>') %}"
    "{% set thought = m.reasoning_content or (parts[0] | replace('<think>', '') if parts | length > 1 else '') %}"
    "{{ '<think>\n' + thought.strip() + '\n</think>\n\n' + parts[-1].strip() }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant:<think>\n' }}{% endif %}"
)


def test_an_empty_block_for_reasoning_that_the_data_does_not_have_is_not_trained():
    """No model writes it behind a prompt that opens its reasoning; where reasoning is off it is part of the prompt."""
    tokenizer, before = block_tokenizer(EMPTY_BLOCK), "<|turn|>user:q<|stop|><|turn|>assistant:<think>\n"
    texts, done = marked(tokenizer, chat("q", "yes"))
    assert texts == [f"{before}\n</think>\n\n[[yes<|stop|>]]"] and done.unopened == 1
    reasoned = {"role": "assistant", "content": "yes", "reasoning_content": "since"}
    for answer in (reasoned, {"role": "assistant", "content": "<think>\nsince\n</think>\n\nyes"}):
        texts, done = marked(tokenizer, [chat("q")[0], answer])
        assert texts == [f"{before}[[since\n</think>\n\nyes<|stop|>]]"] and done.unopened == 0
    texts, done = marked(tokenizer, chat("q", "<think>\n\n</think>\n\nyes"))  # what the model said by itself
    assert texts == [f"{before}[[\n</think>\n\nyes<|stop|>]]"] and done.unopened == 0


def test_the_end_of_a_block_is_not_trained_behind_a_prompt_whose_earlier_answers_are_rendered_otherwise():
    """Of two answers in a row, the first is the last one in the prompt as served, and no longer in the rendering."""
    tokenizer, asked = block_tokenizer(EMPTY_BLOCK), "<|turn|>user:q<|stop|><|turn|>assistant:<think>\n"
    yes, no = ({"role": "assistant", "content": content} for content in ("yes", "no"))
    texts, done = marked(tokenizer, [*chat("q"), yes, no])
    assert texts == [f"{asked}\n</think>\n\n[[yes<|stop|>]]<|turn|>assistant:<think>\n\n</think>\n\n[[no<|stop|>]]"]
    assert done.unopened == 2
    texts, done = marked(tokenizer, [*chat("q"), yes, no | {"reasoning_content": "since"}])
    assert texts[-1].endswith("<|turn|>assistant:<think>\n[[since\n</think>\n\nno<|stop|>]]") and done.unopened == 1


def test_reasoning_inside_the_content_is_not_doubled_where_the_template_reads_it_beside_the_content_alone():
    """The template then writes an empty block before it, which closes what the prompt opened (Qwen 3.8)."""
    template = EMPTY_BLOCK.replace("m.content.split('</think>')", "[m.content]")
    tokenizer, before = block_tokenizer(template), "<|turn|>user:q<|stop|><|turn|>assistant:<think>\n"
    texts, done = marked(tokenizer, chat("q", "<think>\nsince\n</think>\n\nyes"))
    assert texts == [f"{before}[[since\n</think>\n\nyes<|stop|>]]"] and done.raw_reasoning == 1
    texts, done = marked(tokenizer, chat("q", "<think>\n\n</think>\n\nyes"))
    assert texts == [f"{before}[[</think>\n\nyes<|stop|>]]"] and done.raw_reasoning == 1


def test_a_block_that_the_template_closes_before_an_answer_gets_the_reasoning_and_is_closed_once():
    """DeepSeek V3.1 renders no reasoning, and ends its generation prompt with <think> where it is asked to think."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + ('<think></think>' if m.role == 'assistant' else '') }}"
        "{{ m.content + '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant:<think>' }}{% endif %}"
    )
    tokenizer, before = block_tokenizer(template), "<|turn|>user:q<|stop|><|turn|>assistant:<think>"
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "since"}
    texts, done = marked(tokenizer, [chat("q")[0], answer])
    assert texts == [f"{before}[[since</think>yes<|stop|>]]"] and done.raw_reasoning == 1
    texts, done = marked(tokenizer, chat("q", "yes"))
    assert texts == [f"{before}</think>[[yes<|stop|>]]"] and done.unopened == 1


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>"])
def test_reasoning_is_not_trained_behind_a_prompt_that_closes_it(block):
    """As with enable_thinking: false. What would stand behind the closed block is a second one, or the rest of its own."""
    tokenizer = block_tokenizer(EMPTY_BLOCK.replace("assistant:<think>\n'", f"assistant:{block}'"))
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "since"}
    for message in (answer, {"role": "assistant", "content": "<think>\nsince\n</think>\n\nyes"}):
        texts, done = marked(tokenizer, [chat("q")[0], message])
        assert texts == [] and len(done.left_out) == 1
        assert "the generation prompt closes it" in done.left_out[0][1]
    texts, done = marked(tokenizer, chat("q", "yes"))
    assert texts == [f"<|turn|>user:q<|stop|><|turn|>assistant:{block}[[yes<|stop|>]]"]
    assert not done.left_out and done.unopened == 0


def test_an_empty_block_that_the_template_writes_as_the_models_is_counted():
    """As Qwen 3's does where its prompt opens nothing; the served model may have had the block in its prompt."""
    messages = [*chat("q", "b", "r"), {"role": "assistant", "content": "c", "reasoning_content": "hm"}]
    done = _chats["qwen3"](Conversation("f:1", 0, tuple(messages)))
    said = [run for sample in done.samples for run in runs(_tokenizers["qwen3"], sample)]
    assert said == ["<think>\n\n</think>\n\nb<|im_end|>", "<think>\nhm\n</think>\n\nc<|im_end|>"]
    assert done.empty_block == 1 and done.unopened == 0


# As Kimi K2 Thinking's: an answer that no call follows belongs to the past at once, where every block is empty.
PAST_EMPTY = (
    "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}{% if m.role == 'assistant' %}<think>"
    "{{ m.reasoning_content if m.tool_calls and m.reasoning_content else '' }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '[' + c.function.name + c.function.arguments | tojson + ']' }}{% endfor %}<|stop|>"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant:' }}{% endif %}"
)


def test_an_empty_block_in_the_place_of_reasoning_is_filled_as_the_template_fills_others():
    """The served model gives its reasoning first, and not an empty block."""
    tokenizer, before = block_tokenizer(PAST_EMPTY), "<|turn|>user:q<|stop|><|turn|>assistant:"
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "since"}
    texts, done = marked(tokenizer, [chat("q")[0], answer, *chat("r", "no")])
    assert texts == [
        f"{before}[[<think>since</think>yes<|stop|>]]",
        f"{before}<think></think>yes<|stop|><|turn|>user:r<|stop|><|turn|>assistant:[[<think></think>no<|stop|>]]",
    ]
    assert (done.raw_reasoning, done.lost_reasoning, done.empty_block) == (1, 0, 1)


def test_an_empty_block_in_the_place_of_reasoning_is_left_out_where_the_template_fills_none():
    tokenizer = block_tokenizer(
        PAST_EMPTY.replace("m.reasoning_content if m.tool_calls and m.reasoning_content else ''", "''")
    )
    answer = {"role": "assistant", "content": "yes", "reasoning_content": "since"}
    texts, done = marked(tokenizer, [chat("q")[0], answer, *chat("r", "no")])
    assert [text.count("[[") for text in texts] == [1] and texts[0].endswith("assistant:[[<think></think>no<|stop|>]]")
    assert done.left_out[0][0] == "f:1, message 2" and "writes an empty block where they have" in done.left_out[0][1]


@pytest.mark.parametrize("thought", ["since", ""])
def test_reasoning_inside_the_content_has_no_empty_block_of_the_templates_before_it(thought):
    content = f"<think>\n{thought}\n</think>\n\nyes"
    texts, done = marked(block_tokenizer(PAST_EMPTY), chat("q", content))
    assert texts == [f"<|turn|>user:q<|stop|><|turn|>assistant:[[{content}<|stop|>]]"]
    assert done.raw_reasoning == 1 and done.empty_block == 0


@pytest.mark.parametrize(("said", "kept"), [("yes", "yes"), ("\n yes", "\n yes")])
def test_the_end_of_a_block_that_the_prompt_opens_and_closes_is_not_the_models(said, kept):
    """DeepSeek V3.2 asks with <think></think> and writes </think> alone in a turn."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + ('</think>' if m.role == 'assistant' else '') }}"
        "{{ m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:<think></think>' }}{% endif %}"
    )
    texts, done = marked(block_tokenizer(template), chat("q", said))
    assert texts == [f"<|turn|>user:q<|stop|><|turn|>assistant:<think></think>[[{kept}<|stop|>]]"]
    assert done.unopened == 0 and not done.left_out


def test_a_block_for_reasoning_by_a_longer_name():
    """Hunyuan 3 opens <think:opensource> where it is asked to think; its empty block is the template's own."""
    tag = "think:opensource"
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}{% if m.role == 'assistant' %}{{ '<TAG>' }}"
        "{{ m.reasoning_content or '' }}{{ '</TAG>' }}{% endif %}{{ m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:<TAG>' }}{% endif %}"
    ).replace("TAG", tag)
    tokenizer = block_tokenizer(template, f"<{tag}>", f"</{tag}>")
    before = f"<|turn|>user:q<|stop|><|turn|>assistant:<{tag}>"
    texts, done = marked(tokenizer, chat("q", "yes"))
    assert texts == [f"{before}</{tag}>[[yes<|stop|>]]"] and done.unopened == 1
    texts, done = marked(tokenizer, [chat("q")[0], {"role": "assistant", "content": "yes", "reasoning_content": "since"}])
    assert texts == [f"{before}[[since</{tag}>yes<|stop|>]]"] and done.unopened == 0
    texts, done = marked(tokenizer, chat("q", "<think>since</think>yes"))
    assert texts == [] and "opens reasoning with another tag" in done.left_out[0][1]


def test_an_answer_to_a_tool_whose_prompt_has_no_header_is_left_out():
    """The template writes the header before the answer, and nothing shows whether the served model would."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn|>assistant:' }}{% endif %}"
    )
    messages = [*chat("q", "look"), {"role": "tool", "content": "dry"}, {"role": "assistant", "content": "no"}]
    texts, done = marked(block_tokenizer(template), messages)
    assert texts == ["<|turn|>user:q<|stop|><|turn|>assistant:[[look<|stop|>]]"]
    assert done.left_out[0][0] == "f:1, message 4" and "behind a tool's result lacks the header" in done.left_out[0][1]


def test_an_answer_that_the_template_writes_into_the_block_that_the_prompt_opens():
    """As Nemotron Nano 2's, which closes the block nowhere: without reasoning the block is the prompt's, and a content that
    opens it opens it once. What a limit of tokens cut may be reasoning, and stays in the block."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}{{ '<think>\\n' if loop.last and m.role == 'assistant' }}"
        "{{ m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:<think>\\n' }}{% endif %}"
    )
    tokenizer, before = block_tokenizer(template), "<|turn|>user:q<|stop|><|turn|>assistant:"
    texts, done = marked(tokenizer, chat("q", "yes"))
    assert texts == [f"{before}[[yes<|stop|>]]"] and done.unopened == 1
    texts, done = marked(tokenizer, chat("q", "<think>\nsince\n</think>\n\nyes"))
    assert texts == [f"{before}<think>\n[[since\n</think>\n\nyes<|stop|>]]"]
    assert (done.raw_reasoning, done.unopened) == (1, 0)
    for content in ("since we", "<think>\nsince we"):
        texts, done = marked(
            tokenizer, [chat("q")[0], {"role": "assistant", "content": content, "finish_reason": "length"}]
        )
        assert texts == [f"{before}<think>\n[[since we]]<|stop|>"] and done.cut == 1


@pytest.mark.parametrize("block", ["</think>", "<think></think>"])
def test_what_the_template_writes_for_a_block_that_an_answer_lacks_is_not_the_models(block):
    """GLM 4.7 writes </think>, Nemotron 3 <think></think> before an answer without reasoning, where the prompt opens the
    block otherwise: no mode of the served model produces either."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}{% if m.role == 'assistant' %}{% if m.reasoning_content %}"
        "{{ '<think>\\n' + m.reasoning_content + '</think>' }}{% else %}BLOCK{% endif %}{% endif %}"
        "{{ m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:<think>\\n' }}{% endif %}"
    ).replace("BLOCK", block)
    tokenizer, before = block_tokenizer(template), "<|turn|>user:q<|stop|><|turn|>assistant:"
    for content in ("yes", "\n yes"):
        texts, done = marked(tokenizer, chat("q", content))
        assert texts == [f"{before}{block}[[{content}<|stop|>]]"] and done.unopened == 1
    texts, done = marked(tokenizer, chat("q", "<think>\nsince\n</think>\n\nyes"))
    assert texts == [f"{before}<think>\n[[since\n</think>\n\nyes<|stop|>]]"] and done.raw_reasoning == 1
    texts, done = marked(tokenizer, [chat("q")[0], {"role": "assistant", "content": "yes", "reasoning_content": "since"}])
    assert texts == [f"{before}<think>\n[[since</think>yes<|stop|>]]"] and done.unopened == 0


@pytest.mark.parametrize(("block", "shown"), [("<think>\n\n</think>\n", True), ("<think>\n", False)])
def test_a_block_that_is_all_of_the_generation_prompt(block, shown):
    """Hunyuan A13B's answers begin behind the user's last token; with reasoning off the prompt has an empty block there."""
    template = (
        "{% for m in messages %}{{ m.content + ('<|stop|>' if m.role == 'assistant' else '<|turn|>') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'BLOCK' }}{% endif %}"
    ).replace("BLOCK", block.replace("\n", "\\n"))
    texts, done = marked(block_tokenizer(template), chat("q", "yes", "r", "no"))
    served = block if shown else ""
    second = f"q<|turn|>yes<|stop|>r<|turn|>{served}[[no<|stop|>]]"
    expected = (
        [f"q<|turn|>{served}[[yes<|stop|>]]", second] if shown else ["q<|turn|>[[yes<|stop|>]]r<|turn|>[[no<|stop|>]]"]
    )
    assert texts == expected and done.unopened == (0 if shown else 2)


@pytest.mark.parametrize("tag", ["<longcat_think>", "[THINK]", "<thought>"])
@pytest.mark.parametrize("header", ["", "<|turn|>assistant:"])
def test_a_block_by_any_name_that_the_prompt_opens_is_not_left_open_before_an_answer(tag, header):
    """As LongCat's <longcat_think>, which is all of its generation prompt: the user's turn ends with the header."""
    closing = f"{tag[0]}/{tag[1:]}"
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '<|turn|>user:' + m.content + 'USER' }}{% else %}{{ 'HEADER' }}"
        "{% if m.reasoning_content %}{{ 'TAG\\n' + m.reasoning_content + '\\nCLOSING\\n' }}{% endif %}"
        "{{ m.content }}SYNTAX{{ '<|stop|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'HEADERTAG\\n' }}{% endif %}"
    ).replace("SYNTAX", SYNTAX)
    template = template.replace("CLOSING", closing).replace("TAG", tag).replace("HEADER", header)
    tokenizer = block_tokenizer(template.replace("USER", "" if header else "<|turn|>assistant:"), tag, closing)
    before = "<|turn|>user:q<|turn|>assistant:"
    texts, done = marked(tokenizer, chat("q", "yes"))
    assert texts == [f"{before}[[yes<|stop|>]]"] and done.unopened == 1
    texts, done = marked(tokenizer, [chat("q")[0], WEATHER[0]])
    assert texts == [f"{before}[[<call>weatherRome<|stop|>]]"] and done.unopened == 1
    texts, done = marked(tokenizer, [chat("q")[0], {"role": "assistant", "content": "yes", "reasoning_content": "since"}])
    assert texts == [f"{before}{tag}\n[[since\n{closing}\nyes<|stop|>]]"] and done.unopened == 0
    for opens in ("", f"{tag}\n"):
        texts, done = marked(tokenizer, chat("q", f"{opens}since\n{closing}\nyes"))
        assert texts == [f"{before}{tag}\n[[since\n{closing}\nyes<|stop|>]]"] and done.unopened == 0
    texts, done = marked(tokenizer, chat("q", f"It ends with `{closing}`."))
    assert texts == [f"{before}[[It ends with `{closing}`.<|stop|>]]"] and done.unopened == 1


def test_the_generation_prompts_tag_in_the_templates_own_system_prompt_is_not_the_place_of_a_greeting():
    template = (
        "{{ 'Write [THINK]your thoughts[/THINK] first.<|turn|>' }}{% for m in messages %}"
        "{{ m.content + ('<|stop|>' if m.role == 'assistant' else '<|turn|>') }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[THINK]' }}{% endif %}"
    )
    tokenizer = block_tokenizer(template, "[THINK]", "[/THINK]")
    texts, done = marked(tokenizer, [{"role": "assistant", "content": "hello"}, *chat("q", "yes")])
    assert texts == ["Write [THINK]your thoughts[/THINK] first.<|turn|>hello<|stop|>q<|turn|>[[yes<|stop|>]]"]
    assert [where for where, _ in done.left_out] == ["f:1, message 1"]


def test_white_space_that_a_servers_parser_kept_is_not_there_twice():
    """vLLM cuts a model's text at </think> and keeps the white space around it, which the template writes, too. What was
    said before stands in a later prompt as it was given."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}{% if m.reasoning_content %}"
        "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}{% endif %}{{ m.content }}SYNTAX{{ '<|stop|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant:<think>\\n' }}{% endif %}"
    ).replace("SYNTAX", SYNTAX)
    tokenizer, asked = block_tokenizer(template), "<|turn|>user:q<|stop|><|turn|>assistant:<think>\n"
    said = {"role": "assistant", "content": "\n\nyes", "reasoning_content": "since\n"}
    texts, _ = marked(tokenizer, [*chat("q"), said, *chat("r"), said])
    assert texts == [
        f"{asked}[[since\n</think>\n\nyes<|stop|>]]",
        f"{asked}since\n\n</think>\n\n\n\nyes<|stop|><|turn|>user:r<|stop|><|turn|>assistant:<think>\n"
        "[[since\n</think>\n\nyes<|stop|>]]",
    ]
    texts, _ = marked(tokenizer, [*chat("q"), WEATHER[0] | {"reasoning_content": "since\n"}])
    assert texts == [f"{asked}[[since\n</think>\n\n<call>weatherRome<|stop|>]]"]
    for other in ({"content": "\nyes"}, {"reasoning_content": "\n\nsince\n"}, {"reasoning_content": "since\n\n"}):
        texts, _ = marked(tokenizer, [*chat("q"), said | other])
        thought, answer = (said | other)["reasoning_content"], (said | other)["content"]
        assert texts == [f"{asked}[[{thought}\n</think>\n\n{answer}<|stop|>]]"]


# A header that is a tag alone, as DeepSeek's.
TAG_HEADER = (
    "{% for m in messages %}{{ ('<|ask|>' if m.role == 'user' else '<|head|>') + m.content }}"
    "{{ '<|stop|>' if m.role == 'assistant' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|head|><think>\\n' }}{% endif %}"
)


@pytest.mark.parametrize("said", ["x<|head|><think>\n ", "<|head|><think>\n", "x<|head|>", "<|head|>y<think>\n"])
def test_a_header_of_tags_that_a_user_quotes_is_no_header(said):
    """Tags have no marks, so the words before a turn end behind the tags of their message."""
    texts, done = marked(block_tokenizer(TAG_HEADER, "<|ask|>", "<|head|>"), chat(said, "yes"))
    assert texts == [f"<|ask|>{said}<|head|>[[yes<|stop|>]]"] and done.unopened == 1


def test_a_message_of_the_headers_tag_alone_is_refused_where_the_header_cannot_be_told_from_it():
    with pytest.raises(BadLine, match="its start cannot be found"):
        marked(block_tokenizer(TAG_HEADER, "<|ask|>", "<|head|>"), chat("<|head|>", "yes"))


def test_reasoning_that_a_content_only_closes_is_left_out_behind_an_empty_block():
    texts, done = marked(block_tokenizer(PAST_EMPTY), chat("q", "since\n</think>\n\nyes"))
    assert texts == [] and "writes an empty block before their reasoning" in done.left_out[0][1]


def test_reasoning_that_a_content_only_closes_stands_behind_the_prompt_that_opens_it():
    """As `data regenerate --target` writes it, of a template that looks for the opening tag (Nemotron 3, OLMo 3)."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:<think>\\n' }}{% endif %}"
    )
    texts, done = marked(block_tokenizer(template), chat("q", "since\n</think>\n\nyes"))
    assert texts == ["<|turn|>user:q<|stop|><|turn|>assistant:<think>\n[[since\n</think>\n\nyes<|stop|>]]"]
    assert (done.raw_reasoning, done.unopened) == (1, 0)


def test_reasoning_that_a_limit_of_tokens_cut_stands_in_the_block_that_the_prompt_opens():
    """GLM 4.7's template takes it for an answer without reasoning, and closes the block before it."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + ('</think>' if m.role == 'assistant' else '') }}"
        "{{ m.content + '<|stop|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn|>assistant:OPENED' }}{% endif %}"
    )
    messages = [chat("q")[0], {"role": "assistant", "content": "<think>\nsince we", "finish_reason": "length"}]
    texts, done = marked(block_tokenizer(template.replace("OPENED", "<think>")), messages)
    assert texts == ["<|turn|>user:q<|stop|><|turn|>assistant:<think>[[\nsince we]]<|stop|>"] and done.cut == 1
    texts, done = marked(block_tokenizer(template.replace("OPENED", "<think></think>")), messages)
    assert texts == [] and "closes reasoning before their text" in done.left_out[0][1]


@pytest.mark.parametrize("block", ["<think>\\n\\n</think>\\n\\n", "</think>", "<think></think>", ""])
@pytest.mark.parametrize("tag", ["think", "seed:think"])
def test_reasoning_that_a_limit_of_tokens_cut_stands_there_whatever_the_template_writes_before_an_answer(block, tag):
    """As `data regenerate` writes it: Qwen 3.5's template writes an empty block there, Qwen 3 Thinking's nothing."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + ('BLOCK' if m.role == 'assistant' else '') }}"
        "{{ m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:<think>\\n' }}{% endif %}"
    )
    template = template.replace("BLOCK", block).replace("think>", f"{tag}>")
    tokenizer = block_tokenizer(template, f"<{tag}>", f"</{tag}>")
    for content in ("since we", f"<{tag}>\nsince we"):
        row = {"messages": chat("q", content), "finish_reasons": ["length"]}
        texts, done = marked(tokenizer, parse(Line("f:1", row)).messages)
        assert texts == [f"<|turn|>user:q<|stop|><|turn|>assistant:<{tag}>\n[[since we]]<|stop|>"]
        assert (done.cut, done.cut_reasoning, done.unopened, done.raw_reasoning) == (1, 1, 0, 0)
    row = {"messages": chat("q", f"since\n</{tag}>\n\nyes"), "finish_reasons": ["length"]}
    texts, done = marked(tokenizer, parse(Line("f:1", row)).messages)
    assert done.cut_reasoning == 0 and all("[[since\n" in text and "yes]]" in text for text in texts)
    texts, done = marked(tokenizer, chat("q", f"<{tag}>\nsince we"))
    assert texts == [] and "open a block for reasoning and do not close it" in done.left_out[0][1]


@pytest.mark.parametrize("tag", ["<longcat_think>", "[THINK]"])
def test_reasoning_in_a_block_by_any_name_that_a_limit_of_tokens_cut(tag):
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + m.content + '<|stop|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:TAG\\n' }}{% endif %}"
    ).replace("TAG", tag)
    tokenizer = block_tokenizer(template, tag)
    for content in ("since we", f"{tag}\nsince we"):
        messages = [chat("q")[0], {"role": "assistant", "content": content, "finish_reason": "length"}]
        texts, done = marked(tokenizer, messages)
        assert texts == [f"<|turn|>user:q<|stop|><|turn|>assistant:{tag}\n[[since we]]<|stop|>"] and done.cut == 1


QUOTES = "Use the `</think>` tag."


@pytest.mark.parametrize(
    ("name", "said", "expected"),
    [
        ("chatml", {"content": QUOTES}, QUOTES),
        ("chatml", {"content": QUOTES, "reasoning_content": "hm"}, QUOTES),
        ("qwen3", {"content": QUOTES}, None),  # Qwen 3's template takes what is before the tag for reasoning
        ("qwen3", {"content": QUOTES, "reasoning_content": "hm"}, f"<think>\nhm\n</think>\n\n{QUOTES}"),
        ("qwen3", {"content": f"<think>\nhm\n</think>\n\n{QUOTES}"}, f"<think>\nhm\n</think>\n\n{QUOTES}"),
        ("r1", {"content": QUOTES, "reasoning_content": "hm"}, None),  # and R1's cuts it off
        ("r1", {"content": QUOTES}, None),
        ("r1", {"content": f"<think>\nhm\n</think>\n\n{QUOTES}"}, f"hm\n</think>\n\n{QUOTES}"),
        ("r1", {"content": "<think>\nhm\n</think>\n\nb", "reasoning_content": "hm"}, "hm\n</think>\n\nb"),
    ],
)
def test_an_answer_that_quotes_the_end_of_reasoning(name, said, expected):
    """It is trained as it was said, or left out where the template would cut it there: no half of it is made reasoning."""
    done = _chats[name](Conversation("f:1", 0, ({"role": "user", "content": "q"}, {"role": "assistant", **said})))
    trained = [run.removesuffix(ENDS[name]) for sample in done.samples for run in runs(_tokenizers[name], sample)]
    assert trained == ([] if expected is None else [expected]) and len(done.left_out) == (expected is None)
    assert done.lost_reasoning == (name == "chatml" and "reasoning_content" in said)


def test_a_call_that_stands_before_the_text_beside_it_is_rendered():
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% for call in m.tool_calls or [] %}"
        "{{ '[' + call.function.name + ('!' if call.function.name == 'g' else '') + ']' }}{% endfor %}"
        "{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    message = {"role": "assistant", "content": "look", "tool_calls": [TOOL | {"function": {"name": "g", "arguments": {}}}]}
    tokenizer = make_tokenizer(template)
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, (*chat("a"), message)))
    assert [runs(tokenizer, sample) for sample in done.samples] == [["[g!]look<|end|>"]] and done.left_out == []


@pytest.mark.parametrize("content", ["", "look"])
def test_a_call_that_the_template_renders_by_its_id(content):
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% for call in m.tool_calls or [] %}"
        "{{ '[' + call.id + ']' + call.function.arguments | tojson }}{% endfor %}"
        "{{ '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    call = {"id": "functions.weather:0", "type": "function", "function": {"name": "weather", "arguments": {}}}
    tokenizer = make_tokenizer(template)
    messages = (*chat("a"), {"role": "assistant", "content": content, "tool_calls": [call]})
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, messages))
    trained = [runs(tokenizer, sample) for sample in done.samples]
    assert trained == [[f"{content}[functions.weather:0]{{}}<|end|>"]] and done.left_out == []
    for arguments in ({}, {"city": "Rome"}):  # an id without the name: the model would have written another one
        other = call | {"id": "call_a1b2c3", "function": {"name": "weather", "arguments": arguments}}
        messages = (*chat("a"), {"role": "assistant", "content": content, "tool_calls": [other]})
        done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, messages))
        assert done.samples == [] and done.left_out[0][1] == "the chat template does not render their tool calls"


def test_reasoning_that_the_template_renders_in_part_is_not_there_twice():
    messages = chat("a", "I use <think> as a tag </think> here.")
    done = _chats["qwen3"](Conversation("f:1", 0, tuple(messages)))
    assert [runs(_tokenizers["qwen3"], sample) for sample in done.samples] == [[messages[1]["content"] + "<|im_end|>"]]
    assert done.raw_reasoning == 1


def test_reasoning_is_not_put_before_the_words_that_every_answer_begins_with():
    """The model begins with the name of a channel here, so the reasoning that the template cuts stood elsewhere."""
    template = TEMPLATES["phi3"].replace("m.content", "(' to=all ' if m.role == 'assistant' else '') + CUT")
    template = template.replace("CUT", "m.content.split('</think>')[-1]")
    tokenizer = make_tokenizer(template)
    done = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(chat("a", "<think>x</think>b"))))
    assert [runs(tokenizer, sample) for sample in done.samples] == [[" to=all b<|end|>"]]
    assert (done.lost_reasoning, done.raw_reasoning) == (1, 0)


def test_private_use_characters_of_the_data_are_no_marks():
    messages = chat("\U000f0000\U000f0001", "\U000f0000a\U000f0002", "b", "\U000f0001")
    tokenizer = make_tokenizer()
    (sample,) = ChatTokenizer(tokenizer)(Conversation("f:1", 0, tuple(messages))).samples
    assert runs(tokenizer, sample) == ["\U000f0000a\U000f0002<|im_end|>", "\U000f0001<|im_end|>"]


# --- long conversations ---------------------------------------------------------------------------------------------------


def long_chat(count):
    """Chats whose answers differ in kind: reasoning inside, markers quoted, some empty, a tool's turn in the middle."""
    messages = [{"role": "system", "content": "Be brief."}]
    for i in range(count):
        said = f"Answer {i}." if i % 7 else f"<think>\nthought {i}\n</think>\n\nAnswer {i}."
        asked = f"Question {i} <|im_start|>assistant\n" if i % 5 == 0 else f"Question {i}"
        messages += chat(asked, "" if i % 31 == 30 else said)
    return messages


def outcome(chat_tokenizer, messages):
    try:
        done = chat_tokenizer(Conversation("f:1", 0, tuple(messages)))
    except BadLine as error:
        return str(error)
    return [(s.input_ids.tolist(), s.loss_mask.tolist()) for s in done.samples], done.left_out, done.lost_reasoning


@pytest.mark.parametrize("name", TEMPLATES)
def test_long_conversations_are_as_if_each_turn_were_rendered_and_tokenised_alone(name, monkeypatch):
    messages = long_chat(40)
    quick = outcome(_chats[name], messages)
    monkeypatch.setattr(tokenize, "long_renderings", lambda *_: {})
    monkeypatch.setattr(ChatTokenizer, "_cuts", lambda *_: np.zeros(0, np.int64))
    assert quick == outcome(ChatTokenizer(_tokenizers[name]), messages)
    assert not isinstance(quick, str), quick


def test_a_template_that_looks_far_back_is_rendered_in_full():
    """The number of messages stands in every prompt; or one message far back is cut only when there are very many."""
    counted = TEMPLATES["chatml"] + "{{ messages | length if add_generation_prompt }}"
    late = TEMPLATES["chatml"].replace("m.role + '\n' }}", "m.role + ('!' if messages | length > 60 else '') + '\n' }}")
    assert late != TEMPLATES["chatml"]
    for template in (counted, late):
        template = ChatTemplate(template, {}, _tokenizers["chatml"].backend_tokenizer)
        messages = [*chat(*map(str, range(80)))]
        assert long_renderings(template, messages, None, list(range(2, 81, 2))) == {}
    template = ChatTemplate(TEMPLATES["qwen3"], {}, _tokenizers["qwen3"].backend_tokenizer)
    made = long_renderings(template, messages, None, list(range(2, 81, 2)))
    assert len(made) > 30 and all(made[end][0] == template.render(messages[:end]) for end in made)


@pytest.mark.parametrize("name", ["chatml", "qwen3", "r1"])
def test_a_thousand_turns_take_linear_time(name):
    """Counted in renderings, which no machine changes: messages rendered for each message of the conversation."""
    chat_tokenizer, rendered = ChatTokenizer(_tokenizers[name]), []
    placing = chat_tokenizer._placing(None)
    render = placing.template.render

    def counting(messages, *args, **kwargs):
        rendered.append(len(messages))
        return render(messages, *args, **kwargs)

    placing.template.render = counting
    messages = chat(*(f"text {i}" for i in range(1000)))
    done = chat_tokenizer(Conversation("f:1", 0, tuple(messages)))
    assert sum(len(runs(_tokenizers[name], sample)) for sample in done.samples) >= 500
    assert sum(rendered) < 20 * len(messages)


# --- prompts that end as no turn begins -----------------------------------------------------------------------------------

WEATHER = [{"role": "assistant", "content": "", "tool_calls": [CALL_OF_WEATHER]}, {"role": "tool", "content": "dry"}]
SYNTAX = "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments.city }}{% endfor %}"


def brute_force(tokenizer, messages, stop, before=""):
    """What is served and what is then said, of each answer: its prompt rendered alone, and what the rendering with it has
    behind `before`, which the template sets there, up to the first token that stops."""
    render = functools.partial(tokenizer.apply_chat_template, tokenize=False)
    for end in (i for i, m in enumerate(messages, 1) if m["role"] == "assistant"):
        prompt = render(messages[: end - 1], add_generation_prompt=True)
        said = render(messages[:end]).rpartition(before)[2]
        yield f"{prompt}[[{said.partition(stop)[0].rstrip()}{stop}]]"


def test_a_prompt_that_ends_in_words_that_no_turn_has():
    """As Apriel 1.6's, which asks with words and ends no last turn: behind them stands what the turn has in their place."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' }}{{ m.reasoning_content + '[END]' if m.reasoning_content }}"
        "{{ m.content + ('' if loop.last and m.role == 'assistant' else '<|stop|>') }}"
        "{% if loop.last and m.role != 'assistant' %}{{ '<|turn|>assistant:My thoughts:\n' }}{% endif %}{% endfor %}"
    )
    tokenizer = block_tokenizer(template)
    messages = chat("q", "yes", "My thoughts:", "no")
    messages[3]["reasoning_content"] = "since"
    texts, done = marked(tokenizer, messages)
    assert texts == list(brute_force(tokenizer, messages, "<|stop|>", before="<|turn|>assistant:"))
    assert texts[1].endswith("<|turn|>assistant:My thoughts:\n[[since[END]no<|stop|>]]") and done.endless == 0
    texts, done = marked(tokenizer, chat("q", "My thoughts:\nyes", "r", "no"))
    assert len(texts) == 1 and texts[0].endswith("<|turn|>assistant:My thoughts:\n[[no<|stop|>]]")
    assert done.left_out[0][0] == "f:1, message 2" and "begin with the words that the generation" in done.left_out[0][1]


def test_an_answer_to_a_tool_that_the_template_writes_without_the_header_of_its_prompt():
    """As Apertus's, for which a tool's result is part of the turn; what it sets before a further call is not told."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content + ']' }}{% else %}"
        "{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}{{ '<|turn|>' + m.role + ':' }}{% endif %}"
        "{{ m.content }}SYNTAX{{ '' if m.tool_calls else '<|stop|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|turn|>assistant:' }}{% endif %}"
    ).replace("SYNTAX", SYNTAX)
    tokenizer, asked = block_tokenizer(template), "<|turn|>user:q<|stop|><|turn|>assistant:"
    texts, done = marked(tokenizer, [*chat("q"), *WEATHER, *chat("", "no", "r", "yes")[1:]])
    assert texts == [
        f"{asked}[[<call>weatherRome]]",
        f"{asked}<call>weatherRome[dry]<|turn|>assistant:[[no<|stop|>]]",
        f"{asked}<call>weatherRome[dry]no<|stop|><|turn|>user:r<|stop|><|turn|>assistant:[[yes<|stop|>]]",
    ]
    texts, done = marked(tokenizer, [*chat("q"), *WEATHER, *WEATHER, {"role": "assistant", "content": "no"}])
    assert texts == [f"{asked}[[<call>weatherRome]][dry]<call>weatherRome[dry]<|turn|>assistant:[[no<|stop|>]]"]
    assert [where for where, _ in done.left_out] == ["f:1, message 4"]


def test_a_block_that_the_prompt_opens_and_closes_behind_a_tools_result():
    """As DeepSeek V3.2's, which has no header there; and the block's end that it writes before a call is the prompt's."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content + ']' }}{% else %}"
        "{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}{{ '<|turn|>' + m.role + ':' }}{% endif %}"
        "{{ '</think>' if m.role == 'assistant' }}{{ m.content }}SYNTAX{{ '<|stop|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' if messages[-1].role == 'tool' else '<|turn|>assistant:' }}"
        "{{ '<think></think>' }}{% endif %}"
    ).replace("SYNTAX", SYNTAX)
    tokenizer, asked = block_tokenizer(template), "<|turn|>user:q<|stop|><|turn|>assistant:"
    messages = [*chat("q"), *WEATHER, *WEATHER, {"role": "assistant", "content": "no"}]
    texts, _ = marked(tokenizer, messages)
    called = "</think><call>weatherRome<|stop|>[dry]"
    assert texts == [
        f"{asked}<think></think>[[<call>weatherRome<|stop|>]]",
        f"{asked}{called}<think></think>[[<call>weatherRome<|stop|>]]",
        f"{asked}{called}{called}<think></think>[[no<|stop|>]]",
    ]
    assert texts == list(brute_force(tokenizer, messages, "<|stop|>", before="</think>"))


def test_a_block_that_is_all_of_the_prompt_behind_a_tools_result():
    """As Gemma 4's, which closes the block before an answer to a tool, too, and writes it in no turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content + ']' }}{% else %}"
        "{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}{{ '<|turn|>' + m.role + ':' }}{% endif %}"
        "{{ m.content }}SYNTAX{{ '' if m.tool_calls else '<|stop|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '' if messages[-1].role == 'tool' else '<|turn|>assistant:' }}"
        "{{ '<|channel>thought\n<channel|>' }}{% endif %}"
    ).replace("SYNTAX", SYNTAX)
    tokenizer = block_tokenizer(template, "<|channel>", "<channel|>")
    messages, closed = [*chat("q"), *WEATHER, {"role": "assistant", "content": "no"}], "<|channel>thought\n<channel|>"
    texts, done = marked(tokenizer, messages)
    asked = "<|turn|>user:q<|stop|><|turn|>assistant:"
    assert texts == [
        f"{asked}{closed}[[<call>weatherRome]]",
        f"{asked}<call>weatherRome[dry]{closed}[[no<|stop|>]]",
    ]
    assert (done.left_out, done.unopened) == ([], 0)
    thinking = [*messages[:-1], messages[-1] | {"reasoning_content": "since"}]
    _, done = marked(tokenizer, thinking)
    assert done.lost_reasoning == 1 and done.left_out == []


# A further call, behind a tool's result, by the syntax of a first one: what the prompt has more is not the call's.
JSON_SYNTAX = (
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + c.function.arguments | tojson }}{% endfor %}"
)


@pytest.mark.parametrize("asks", ["<|channel>thought\n<channel|>", "<|turn|>assistant:<|channel>thought\n<channel|>"])
def test_a_further_call_stands_behind_its_prompt_where_the_template_begins_it_as_a_first_one(asks):
    """As Gemma 4's, and Apertus's, whose prompts behind a tool's result end with what the template writes in no turn."""
    template = (
        "{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content + ']' }}{% else %}"
        "{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}{{ '<|turn|>' + m.role + ':' }}{% endif %}"
        "{{ m.content }}SYNTAX{{ '' if m.tool_calls else '<|stop|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'AGAIN' if messages[-1].role == 'tool' else '<|turn|>assistant:BLOCK' }}"
        "{% endif %}"
    )
    closed, called = "<|channel>thought\n<channel|>", '<call>weather{"city": "Rome"}'
    template = template.replace("SYNTAX", JSON_SYNTAX).replace("BLOCK", closed).replace("AGAIN", asks)
    tokenizer = block_tokenizer(template.replace("\n", "\\n"), "<|channel>", "<channel|>", "<call>")
    asked = "<|turn|>user:q<|stop|><|turn|>assistant:"
    texts, done = marked(tokenizer, [*chat("q"), *WEATHER, *WEATHER, {"role": "assistant", "content": "no"}])
    assert texts == [
        f"{asked}{closed}[[{called}]]",
        f"{asked}{called}[dry]{asks}[[{called}]]",
        f"{asked}{called}[dry]{called}[dry]{asks}[[no<|stop|>]]",
    ]
    assert done.left_out == [] and done.unopened == 0


def test_a_further_call_that_the_template_begins_otherwise_than_a_first_one_is_left_out_though_it_has_marks():
    """As DeepSeek V3's, which opens the list of calls once in a conversation, and closes it behind each."""
    template = (
        "{% set ns = namespace(calls=0) %}{% for m in messages %}{% if m.role == 'tool' %}{{ '[' + m.content }}"
        "{{ ']' if loop.last }}{% else %}{% if m.role == 'user' or messages[loop.index0 - 1].role != 'tool' %}"
        "{{ '<|turn|>' + m.role + ':' }}{% endif %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% if m.tool_calls and not ns.calls %}{{ '<calls>' }}{% endif %}SYNTAX"
        "{% if m.tool_calls %}{% set ns.calls = 1 %}{{ '</calls>' }}{% endif %}{{ '<|stop|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|stop|>' }}{% endif %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt and messages[-1].role != 'tool' %}{{ '<|turn|>assistant:' }}{% endif %}"
    ).replace("SYNTAX", JSON_SYNTAX)
    tokenizer = block_tokenizer(template, "<call>", "<calls>", "</calls>")
    texts, done = marked(tokenizer, [*chat("q"), *WEATHER, *WEATHER])
    first = '<calls><call>weather{"city": "Rome"}</calls><|stop|>'
    assert texts == [f"<|turn|>user:q<|stop|><|turn|>assistant:[[{first}]]"]
    assert [where for where, _ in done.left_out] == ["f:1, message 4"] and "otherwise than" in done.left_out[0][1]


@pytest.mark.parametrize(
    ("asks", "says", "white"),
    [
        ("<|turn|>assistant:\n", "<|turn|>assistant: ", ""),
        ("\n<|turn|>assistant:\n\n", "<|turn|>assistant:\n\n", ""),
        ("\n\n    <|turn|>assistant:\n\n", "\n<|turn|>assistant:\n", ""),
        ("\n<|turn|>assistant:", "<|turn|>assistant: ", " "),
        ("\n<|turn|>assistant:\n", "<|turn|>assistant:\n  ", "  "),
    ],
)
def test_a_prompt_that_differs_from_the_rendering_in_white_space_alone(asks, says, white):
    """As of vLLM's templates of DeepSeek V3 and Llama 4, and of many that are written over several lines: a turn stands
    behind the prompt as it is, and white space that the template sets behind that is the turn's."""
    template = (
        "{% for m in messages %}{{ SAYS if m.role == 'assistant' else '<|turn|>user:' }}{{ m.content + '<|stop|>' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ ASKS }}{% endif %}"
    )
    tokenizer = block_tokenizer(template.replace("SAYS", repr(says)).replace("ASKS", repr(asks)))
    texts, done = marked(tokenizer, chat("q\n ", "yes", " r", "no"))
    first = "<|turn|>user:q\n <|stop|>"
    assert texts == [
        f"{first}{asks}[[{white}yes<|stop|>]]",
        f"{first}{says}yes<|stop|><|turn|>user: r<|stop|>{asks}[[{white}no<|stop|>]]",
    ]
    assert done.left_out == [] and not done.endless
    texts, done = marked(tokenizer, chat("q", "\nyes", "r", "no"))
    assert [where for where, _ in done.left_out] == ["f:1, message 2"] and len(texts) == 1
    tools = block_tokenizer(
        tokenizer.chat_template.replace("{{ m.content +", "{{ m.content }}" + JSON_SYNTAX + "{{"), "<call>"
    )
    texts, done = marked(tools, [*chat("q"), *WEATHER])
    assert texts == [f'<|turn|>user:q<|stop|>{asks}[[{white}<call>weather{{"city": "Rome"}}<|stop|>]]']
    with pytest.raises(BadLine, match="changes with the turn"):
        marked(block_tokenizer(tokenizer.chat_template.replace(repr(says), repr(says.replace(":", "!")))), chat("q", "yes"))


def test_words_of_the_template_that_stand_last_whatever_comes_before():
    """As Command R+'s instruction, before the generation prompt and behind an answer: it ends neither an answer nor a call,
    for which the template writes no end."""
    template = (
        "{% for m in messages %}{{ '<|turn|>' + m.role + ':' + m.content }}SYNTAX"
        "{{ '' if m.tool_calls else '<|stop|>' }}{% endfor %}"
        "{{ '<|turn|>system:Act.<|stop|>' }}{% if add_generation_prompt %}{{ '<|turn|>assistant:' }}{% endif %}"
    ).replace("SYNTAX", SYNTAX)
    tokenizer, act = block_tokenizer(template), "<|turn|>system:Act.<|stop|>"
    texts, done = marked(tokenizer, chat("q", "yes", "r", "no"))
    assert texts == [
        f"<|turn|>user:q<|stop|>{act}<|turn|>assistant:[[yes<|stop|>]]{act}",
        f"<|turn|>user:q<|stop|><|turn|>assistant:yes<|stop|><|turn|>user:r<|stop|>{act}"
        f"<|turn|>assistant:[[no<|stop|>]]{act}",
    ]
    texts, done = marked(tokenizer, [*chat("q"), *WEATHER])
    assert texts == [f"<|turn|>user:q<|stop|>{act}<|turn|>assistant:[[<call>weatherRome]]{act}"] and done.endless == 1


def test_a_template_for_chats_with_tools_says_so():
    """As Hermes 3's and Command R+'s for tools, which count the tools of a chat that has none."""
    template = "{% for t in tools %}{{ t | tojson }}{% endfor %}" + TEMPLATES["chatml"]
    with pytest.raises(BadLine, match="'NoneType' object is not iterable; it needs tools, which the line has not"):
        marked(make_tokenizer(template), chat("q", "yes"))
