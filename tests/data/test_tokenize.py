import numpy as np
import pytest
from chats import CHATML, TOOL, chat, make_tokenizer
from tokenizers import Regex, pre_tokenizers

from fastdraft.data.conversations import BadLine, Conversation
from fastdraft.data.prompts import Prompt, prompt_ids
from fastdraft.data.tokenize import ChatTokenizer

LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GENERATION = (
    "{%- for message in messages %}{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant\n' }}"
    "{% generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As Qwen3's: reasoning is rendered only after the last user message.
REASONING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last %}"
    "{{- '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' }}{%- endif %}{{- m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MARKED_REASONING = (
    "{%- set ns = namespace(last=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}"
    "{%- endif %}{%- endfor %}{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' %}{% generation %}{%- if loop.index0 > ns.last %}"
    "{{- '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{%- endif %}"
    "{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}{%- else %}{{- m.content + '<|im_end|>\n' }}{%- endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] | trim + '</s>' }}{% endif %}{% endfor %}"
)
# As Phi-3's: the conversation is closed by a token that no turn ends with.
CLOSING = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"
)
# As gpt-oss's: the last answer ends with <|return|>, earlier ones with <|end|>.
RETURN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{{ '<|return|>' if loop.last and message['role'] == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# As DeepSeek-R1's: the generation prompt opens the reasoning, which the rendered turn does not have.
OPENS_THINK = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] }}{% else %}"
    "{{ '<|assistant|>' + message['content'].split('</think>')[-1] + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
# As Mistral Nemo's: the system prompt goes into the user's turn, when that is the last.
SYSTEM_LAST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (messages[0].content + '\n\n' if loop.last and messages[0].role == 'system' else '') }}"
    "{{ m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
# As Hermes's: a tool's answer ends otherwise when it is the last message.
TOOL_LAST = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{{ m.tool_calls | tojson if m.tool_calls }}"
    "{{ '\n' if m.role == 'tool' and not loop.last }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWO = chat("Hello there", "How are you?", "The capital?", " Paris. \n")


def tokenize(template, messages, **kwargs):
    tools = kwargs.pop("tools", None)
    tokenizer = make_tokenizer(template)
    if template == LLAMA3:  # whose tokenizer takes line breaks together, whatever follows
        lines = pre_tokenizers.Split(Regex(r"[\r\n]+"), "isolated")
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [lines, tokenizer.backend_tokenizer.pre_tokenizer]
        )
    return tokenizer, ChatTokenizer(tokenizer, **kwargs)(Conversation("f:1", 7, tuple(messages), tools))


def spans(tokenizer, sample):
    """Texts of the runs of trained tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], sample.loss_mask.astype(np.int8), [0]])))
    return [tokenizer.decode(sample.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["How are you?<|im_end|>", " Paris. \n<|im_end|>"]),
        (LLAMA3, ["How are you?<|eot_id|>", "Paris.<|eot_id|>"]),
        (GENERATION, ["How are you?<|im_end|>", " Paris. \n<|im_end|>"]),
        (MISTRAL, [" How are you?</s>", " Paris.</s>"]),
        (CLOSING, ["How are you?<|end|>", " Paris. \n<|end|>"]),
        (OPENS_THINK, ["How are you?</s>", " Paris. \n</s>"]),
    ],
    ids=["chatml", "llama3", "generation", "mistral", "closing", "opens_think"],
)
def test_trained_spans(template, expected):
    tokenizer, done = tokenize(template, TWO)
    assert not done.rewritten
    (sample,) = done.samples
    assert spans(tokenizer, sample) == expected
    whole = tokenizer.apply_chat_template(TWO, return_dict=True)["input_ids"]
    assert sample.input_ids.tolist() == whole
    _, last = tokenize(template, TWO, train_on="last_turn")
    assert spans(tokenizer, last.samples[0]) == expected[-1:]
    assert last.samples[0].input_ids.tolist() == whole


def test_one_bos_and_no_text_after_the_last_answer():
    tokenizer, done = tokenize(LLAMA3, [*TWO, {"role": "user", "content": "unanswered"}])
    (sample,) = done.samples
    assert sample.input_ids.tolist().count(tokenizer.bos_token_id) == 1
    assert "unanswered" not in tokenizer.decode(sample.input_ids)


def test_generation_spans_are_transformers_own():
    messages = chat(
        "Hello there", "How are you?", "The capital?", "Paris. \n"
    )  # theirs loses a span that starts with a space
    tokenizer, done = tokenize(GENERATION, messages)
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    assert done.samples[0].loss_mask.tolist() == [bool(m) for m in theirs["assistant_masks"]]


@pytest.mark.parametrize("template", [REASONING, MARKED_REASONING], ids=["prefixes", "generation"])
def test_dropped_reasoning_splits_the_conversation(template):
    messages = chat("Hello", "Hi", "And?", "So", "Then?", "End")
    for message, thought in zip(messages[1::2], ("one", "two", "three"), strict=True):
        message["reasoning_content"] = thought
    tokenizer, done = tokenize(template, messages)
    assert done.rewritten
    assert [spans(tokenizer, sample) for sample in done.samples] == [
        ["<think>\none\n</think>\n\nHi<|im_end|>"],
        ["<think>\ntwo\n</think>\n\nSo<|im_end|>"],
        ["<think>\nthree\n</think>\n\nEnd<|im_end|>"],
    ]
    for k, sample in zip((2, 4, 6), done.samples, strict=True):
        assert sample.input_ids.tolist() == tokenizer.apply_chat_template(messages[:k], return_dict=True)["input_ids"]
    _, once = tokenize(template, messages[:2])
    assert not once.rewritten and len(once.samples) == 1
    _, last = tokenize(template, messages, train_on="last_turn")
    assert [spans(tokenizer, s) for s in last.samples] == [["<think>\nthree\n</think>\n\nEnd<|im_end|>"]]


def test_another_end_token_for_the_last_turn_splits():
    tokenizer, done = tokenize(RETURN, TWO)
    assert done.rewritten
    assert [spans(tokenizer, s) for s in done.samples] == [["How are you?<|return|>"], [" Paris. \n<|return|>"]]


def test_a_prompt_that_the_answer_changes_is_kept_as_served():
    tokenizer, done = tokenize(SYSTEM_LAST, [{"role": "system", "content": "Be"}, *chat("a", "b", "c", "d")])
    assert done.rewritten
    assert [tokenizer.decode(s.input_ids) for s in done.samples] == [
        "<|begin_of_text|>[INST] Be\n\na[/INST] b</s>",
        "<|begin_of_text|>[INST] a[/INST] b</s>[INST] Be\n\nc[/INST] d</s>",
    ]
    assert [spans(tokenizer, s) for s in done.samples] == [[" b</s>"], [" d</s>"]]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    tool = {"role": "tool", "content": "1"}
    tokenizer, done = tokenize(TOOL_LAST, [TWO[0], call, tool, TWO[1]])
    (sample,) = done.samples
    assert spans(tokenizer, sample)[-1] == "How are you?<|im_end|>"
    assert "tool\n1<|im_end|>\n<|im_start|>assistant\nHow" in tokenizer.decode(sample.input_ids)
    wants_tools = "{{ tools | map(attribute='type') | first }}" + TOOL_LAST
    tokenizer, done = tokenize(wants_tools, [TWO[0], call, tool, TWO[1]], tools=[TOOL])
    assert spans(tokenizer, done.samples[0])[-1] == "How are you?<|im_end|>"


def test_an_opened_prompt_is_not_looked_for_in_earlier_turns():
    """The generation prompt ends with '<', which the first turn happens to begin with and the last does not."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '</s>' if loop.last else '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n<' if add_generation_prompt }}"
    )
    messages = [{"role": "assistant", "content": ""}, {"role": "system", "content": "Be"}, *chat("a", "b")[1:]]
    with pytest.raises(BadLine, match="its start cannot be found"):
        tokenize(template, messages)


def test_templates_without_a_generation_prompt():
    """What closes the conversation is found behind white space; what ends the last turn is not taken for a prompt."""
    messages = [{"role": "system", "content": ""}, *chat("", "a")[1:]]
    template = (
        "{% for m in messages %}{{ '\n\n' + m.role + ': ' + m.content + END }}{% endfor %}"
        "{{ '' if add_generation_prompt else '<|endoftext|>' }}"
    )
    tokenizer, done = tokenize(template.replace("END", "'<|im_end|>\n'"), messages)
    assert spans(tokenizer, done.samples[0])[0].endswith("a<|im_end|>")
    with pytest.raises(BadLine, match="its start cannot be found"):
        tokenize(template.replace("END", "('<|return|>' if loop.last else '<|im_end|>')"), messages)


def test_an_opened_think_that_the_turn_has_not():
    """The prompt and the turn part within '<': the token of the turn that begins there is still trained."""
    template = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<|user|>\n'")
    for messages in (chat("Hello", "<|assistant|>1"), chat("", "<|assistant|>1")[1:]):
        tokenizer, done = tokenize(template, messages)
        assert spans(tokenizer, done.samples[0]) == ["<|assistant|>1<|im_end|>"]


def test_tool_call_arguments_as_the_template_wants_them():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": "é"}}}]}
    for how in ("arguments | tojson", "arguments"):
        content = f"(message.tool_calls[0].function.{how} if message.tool_calls else message['content'])"
        template = CHATML.replace("message['content']", content)
        tokenizer, done = tokenize(template, [TWO[0], call])
        assert spans(tokenizer, done.samples[0]) == ['{"a": "é"}<|im_end|>']


def test_reasoning_goes_by_the_templates_name():
    template = CHATML.replace("+ message['content'] +", "+ (message.thinking or '') + message['content'] +")
    tokenizer, done = tokenize(template, [TWO[0], {**TWO[1], "reasoning_content": "because "}])
    assert spans(tokenizer, done.samples[0]) == ["because How are you?<|im_end|>"] and done.lost_reasoning == 0


def test_reasoning_the_template_leaves_out_is_counted():
    _, done = tokenize(CHATML, [TWO[0], {**TWO[1], "reasoning_content": "because"}])
    assert done.lost_reasoning == 1
    _, done = tokenize(
        CHATML.replace("['content']", "['content'].split('</think>')[-1]"),
        [TWO[0], {**TWO[1], "reasoning_content": "because"}],
    )
    assert done.lost_reasoning == 1
    _, done = tokenize(REASONING, [TWO[0], {**TWO[1], "reasoning_content": "because"}])
    assert done.lost_reasoning == 0


@pytest.mark.parametrize("opened", ["<think>\n", "<think>", ""])
def test_reasoning_that_the_template_cuts_is_trained_as_the_model_produced_it(opened):
    """Behind the prompt as it is served, which may open the reasoning; later turns see the template's shorter text."""
    template = OPENS_THINK.replace("<think>\n", opened)
    messages = chat("Hello", "<think>\none\n</think>\n\nHi", "And?", "<think>\ntwo\n</think>\n\nSo")
    tokenizer, done = tokenize(template, messages)
    assert (done.raw_reasoning, done.lost_reasoning, done.rewritten) == (2, 0, True)
    begins = {"<think>\n": "", "<think>": "\n", "": "<think>\n"}[opened]
    trained = [spans(tokenizer, sample) for sample in done.samples]
    assert trained == [[begins + "one\n</think>\n\nHi</s>"], [begins + "two\n</think>\n\nSo</s>"]]
    for k, sample in zip((1, 3), done.samples, strict=True):
        prompt = tokenizer.apply_chat_template(messages[:k], add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(sample.input_ids).startswith(prompt)
    if opened:
        keyed = [messages[0], {"role": "assistant", "content": "Hi", "reasoning_content": "one"}]
        tokenizer, done = tokenize(template, keyed)
        assert [spans(tokenizer, sample) for sample in done.samples] == trained[:1] and done.raw_reasoning == 1


@pytest.mark.parametrize("template", [CHATML, LLAMA3])
def test_conversation_that_begins_with_the_assistant(template):
    tokenizer, done = tokenize(template, TWO[1:])
    end = "<|im_end|>" if template is CHATML else "<|eot_id|>"
    assert spans(tokenizer, done.samples[0])[0] == "How are you?" + end
    tokenizer, done = tokenize(template, [{"role": "system", "content": "Be"}, *TWO[1:]])
    assert spans(tokenizer, done.samples[0])[0] == "How are you?" + end


def test_tools_and_kwargs_reach_the_template():
    template = "{{ tools[0].name }}{{ flavour }}" + CHATML
    chat_tokenizer = ChatTokenizer(make_tokenizer(template), chat_template_kwargs={"flavour": "sour"})
    done = chat_tokenizer(Conversation("f:1", 0, tuple(TWO), [{"name": "weather"}]))
    assert make_tokenizer().decode(done.samples[0].input_ids).startswith("weathersour<|im_start|>")


def test_several_byte_characters_are_trained_whole():
    messages = chat("é", "naïve 🎉 日本")
    tokenizer, done = tokenize(CHATML, messages)
    assert spans(tokenizer, done.samples[0]) == ["naïve 🎉 日本<|im_end|>"]


def test_pad_token_is_trained_where_it_ends_a_turn():
    tokenizer, done = tokenize(CHATML, TWO)
    sample = done.samples[0]
    ends = sample.input_ids == tokenizer.pad_token_id
    assert sample.loss_mask[ends].tolist() == [False, False, True, False, True]  # system, user, assistant, user, assistant


def test_a_token_that_the_target_has_not_is_a_bad_line():
    """A tokenizer may have more tokens than its model; they are no row of the embedding, in a prompt either."""
    _, done = tokenize(CHATML, TWO)
    size = int(max(sample.input_ids.max() for sample in done.samples)) + 1
    tokenize(CHATML, TWO, vocab_size=size)
    with pytest.raises(BadLine, match=f"^f:1: token id {size - 1} is not in the vocabulary of {size - 1}"):
        tokenize(CHATML, TWO, vocab_size=size - 1)


def test_what_a_template_refuses_is_a_bad_line():
    with pytest.raises(BadLine, match=r"^f:1: up to message 3: .*roles must alternate"):
        tokenize(MISTRAL, [TWO[0], TWO[0], TWO[1]])
    with pytest.raises(BadLine, match="TypeError"):
        tokenize("{{ 1 + 'a' }}", TWO)
    template = "{{ tools[0].function.name if tools else '' }}" + CHATML
    ids = prompt_ids([Prompt(TWO[:1]), Prompt(TWO[:1], [TOOL])], tokenizer := make_tokenizer(template))
    assert tokenizer.decode(ids[1]) == "weather" + tokenizer.decode(ids[0])
    with pytest.raises(ValueError, match="the chat template refuses a prompt: TypeError"):
        prompt_ids([Prompt(TWO)], make_tokenizer("{{ 1 + 'a' }}"))
    with pytest.raises(BadLine, match="its start cannot be found"):
        tokenize("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", TWO[:2])


def test_settings_that_no_line_can_mend_are_value_errors():
    for template, message in ((None, "no chat template"), ("{% for %}", "not valid Jinja")):
        with pytest.raises(ValueError, match=message) as caught:
            tokenize(template, TWO)
        assert not isinstance(caught.value, BadLine)

    class Slow:
        is_fast, special_tokens_map, eos_token_id, name_or_path = False, {}, None, "slow"

        def get_chat_template(self, tools=None):
            return CHATML

    with pytest.raises(ValueError, match="slow tokenizer"):
        ChatTokenizer(Slow())(Conversation("f:1", 0, tuple(TWO)))


def test_too_long_is_split_or_truncated():
    _, done = tokenize(CHATML, TWO)
    (whole,) = done.samples
    _, split = tokenize(CHATML, TWO, max_length=16)
    assert split.too_long == 1 and split.untrained > 0
    pieces = [whole.loss_mask[a : a + 16] for a in range(0, len(whole.loss_mask), 16)]
    assert [s.loss_mask.tolist() for s in split.samples] == [p.tolist() for p in pieces if p[2:].any()]
    n = int(np.flatnonzero(whole.loss_mask)[0]) + 2
    _, cut = tokenize(CHATML, TWO, max_length=n, on_too_long="truncate")
    assert cut.too_long == 1
    assert cut.samples[0].input_ids.tolist() == whole.input_ids[:n].tolist()


def pretokenized(ids, mask, **kwargs):
    arrays = np.array(ids, dtype=np.int32), np.array(mask, dtype=bool)
    return ChatTokenizer(make_tokenizer(None), **kwargs)(Conversation("f:3", 0, input_ids=arrays[0], loss_mask=arrays[1]))


def test_pretokenized():
    (sample,) = pretokenized([5, 6, 7, 8], [0, 0, 1, 1]).samples
    assert (sample.input_ids.tolist(), sample.loss_mask.tolist()) == ([5, 6, 7, 8], [False, False, True, True])
    (last,) = pretokenized([5, 6, 7, 8, 9, 10], [0, 1, 1, 0, 1, 1], train_on="last_turn").samples
    assert last.loss_mask.tolist() == [False, False, False, False, True, True]
    done = pretokenized([5, 6, 7], [1, 1, 0])  # tokens 0 and 1 are never predicted
    assert done.samples == [] and done.untrained == 1
    with pytest.raises(BadLine, match="f:3: token id 50 is not in the vocabulary of 50"):
        pretokenized([5, 50, 6], [1, 1, 1], vocab_size=50)


def test_no_assistant_turn_makes_no_sample():
    _, done = tokenize(CHATML, TWO[:1])
    assert done.samples == [] and done.untrained == 1
