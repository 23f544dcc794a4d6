"""A conversation to samples: tokens of the rendered chat template, and a mask of what the assistant generates.

The mask is made on the TEXT of one rendering and carried to tokens by the offsets of one tokenisation of that whole text,
so the tokens are those serving sees. A trained span is what the model must produce: from the end of the generation prompt
to the end-of-turn token, without white space that the template sets after it. Nothing is known here about any particular
template: `{% generation %}` spans say where the assistant speaks, and where a template has none, rendering messages[:k]
with the generation prompt and messages[:k+1] does.

A template that renders a turn differently once later turns follow (reasoning dropped, another closing token) never shows
the model the whole conversation as one text. Such a conversation becomes one sample per trained turn, each as it is then.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fastdraft.data.config import TEMPLATE_DATE, with_date, writes_date
from fastdraft.data.conversations import BadLine, Conversation, with_textual_arguments
from fastdraft.data.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]  # character positions in a rendered text, end exclusive


@dataclass(frozen=True)
class Tokenized:
    samples: list[Sample]  # each trains something and is at most max_length long
    rewritten: bool = False  # split, because the template rewrites earlier turns
    too_long: int = 0  # samples that max_length split or truncated
    untrained: int = 0  # samples or pieces left out because nothing in them is trained
    lost_reasoning: int = 0  # trained turns whose reasoning the template does not render


class ChatTokenizer:
    """Tokenises conversations with the tokenizer's own chat template, or with `chat_template` (Jinja text) instead of it.

    ValueError, when the first conversation needs it: no chat template, a template that is not Jinja, a tokenizer without
    offsets. Picklable, and without transformers' tokenizer: a worker process that unpickles that imports torch, 2 s.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int = 4096,
        on_too_long: str = "split",  # "split" | "truncate"
        train_on: str = "all",  # "all" | "last_turn"
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        template_date: str = TEMPLATE_DATE,
        vocab_size: int | None = None,  # the target's; every token id must be below it
    ) -> None:
        self.max_length, self.on_too_long, self.train_on, self.vocab_size = max_length, on_too_long, train_on, vocab_size
        self.kwargs = {**tokenizer.special_tokens_map, **(chat_template_kwargs or {})}
        self.templates: list[str | None] = [chat_template] * 2  # without tools, with them
        if chat_template is None:
            for i, tools in enumerate((None, [])):
                with suppress(ValueError):  # it has none
                    self.templates[i] = tokenizer.get_chat_template(tools=tools)
        dated = any(writes_date(template) for template in self.templates if template)
        self.template_date = template_date if dated else None  # None: no template asks for it
        self.templates = [template and with_date(template, template_date) for template in self.templates]
        self.name = f"{type(tokenizer).__name__} {tokenizer.name_or_path!r}"
        self.backend = _plain(tokenizer.backend_tokenizer) if tokenizer.is_fast else None

    def __call__(self, conversation: Conversation) -> Tokenized:
        """Samples of one conversation. BadLine when the template refuses it or a token id is out of range."""
        if conversation.input_ids is not None:
            samples, lost = [self._pretokenized(conversation)], 0
        else:
            texts, lost = self._texts_of(conversation)
            samples = [self._sample(text, spans, conversation.key) for text, spans in texts]
        largest = max((int(sample.input_ids.max(initial=0)) for sample in samples), default=0)
        if self.vocab_size is not None and largest >= self.vocab_size:
            raise BadLine(conversation.where, f"token id {largest} is not in the vocabulary of {self.vocab_size}")
        pieces, n = [], self.max_length
        for sample in samples:
            starts = range(0, len(sample.input_ids), n) if self.on_too_long == "split" else [0]
            cuts = (slice(a, a + n) for a in starts)
            pieces += [Sample(sample.input_ids[cut], sample.loss_mask[cut], sample.conversation) for cut in cuts]
        kept = [piece for piece in pieces if piece.trains]
        return Tokenized(
            kept,
            rewritten=len(samples) > 1,
            too_long=sum(len(sample.input_ids) > n for sample in samples),
            untrained=len(pieces) - len(kept) if samples else 1,
            lost_reasoning=lost,
        )

    def _pretokenized(self, conversation: Conversation) -> Sample:
        ids, mask = conversation.input_ids, conversation.loss_mask
        if self.train_on == "last_turn" and mask.any():  # the last run of trained tokens
            end = int(np.flatnonzero(mask)[-1])
            before = np.flatnonzero(~mask[:end])
            mask = mask & (np.arange(len(mask)) > (before[-1] if len(before) else -1))
        return Sample(ids, mask, conversation.key)

    def _sample(
        self,
        text: str,
        spans: list[Span],  # ascending, disjoint
        key: int,
    ) -> Sample:
        encoding = self._encode(text)
        offsets = itertools.chain.from_iterable(encoding.offsets)  # np.array of the pairs takes twice as long
        start, end = np.fromiter(offsets, np.int64, 2 * len(encoding)).reshape(-1, 2).T
        mask = np.zeros(len(start), dtype=bool)
        for a, b in spans:  # a token across a span's edge is partly given, so not the model's to predict
            mask |= (start >= a) & (end <= b) & (end > start)
        return Sample(np.array(encoding.ids, dtype=np.int32), mask, key)

    def _texts_of(self, conversation: Conversation) -> tuple[list[tuple[str, list[Span]]], int]:
        messages = [_with_reasoning(message) for message in conversation.messages]
        try:
            return self._texts(conversation.where, messages, conversation.tools)
        except BadLine:
            # Most templates write a tool call's arguments from the object, some (DeepSeek) join them on as text.
            textual = [with_textual_arguments(message) for message in messages]
            if textual != messages:
                with suppress(BadLine):
                    return self._texts(conversation.where, textual, conversation.tools)
            raise

    def _texts(
        self, where: str, messages: list[dict], tools: list[dict] | None
    ) -> tuple[list[tuple[str, list[Span]]], int]:
        """Texts to train on with their trained spans, more than one if the template rewrites turns; and the number of turns
        with lost reasoning."""
        turns = [k for k, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last_turn":
            turns = turns[-1:]
        texts, lost = [], 0
        for k in turns:
            try:
                text, spans = self._render(messages[: k + 1], tools)
                if _marks(self._template(tools)):
                    spans = self._marked(messages, tools, k, spans)
                else:
                    text, spans = self._span(messages, tools, k, text)
            except _Refused as error:
                raise BadLine(where, f"up to message {k + 1}: {error}") from error
            texts.append((text, spans))
            reasoning = _reasoning(messages[k])
            lost += bool(reasoning) and reasoning not in text
        whole = texts[-1][0] if texts else ""
        if texts and all(whole.startswith(text[: self._turn_end(text)]) for text, _ in texts):
            texts = [(whole, [span for _, spans in texts for span in spans])]
        return texts, lost

    def _marked(self, messages: list[dict], tools: list[dict] | None, k: int, spans: list[Span]) -> list[Span]:
        """Turn k's own {% generation %} spans: of those in the rendering of messages[:k+1], what earlier turns leave."""
        earlier = [m for m in messages[:k] if m["role"] == "assistant"]
        return spans[len(self._render(messages[:k], tools)[1]) if earlier else 0 :]

    def _span(self, messages: list[dict], tools: list[dict] | None, k: int, text: str) -> tuple[str, list[Span]]:
        """The text of turn k and where in it the turn lies: after the generation prompt, to the end-of-turn token. `text`
        is the rendering of messages[:k+1], and is returned unless its beginning is not what the model is prompted with."""
        end = self._turn_end(text)
        if self._header and all(message["role"] in ("system", "developer") for message in messages[:k]):
            # Nothing to answer before it: templates refuse to render that, or set their default system prompt only later.
            return text, [(self._after_header(text), end)]
        if k == 0:
            raise _Refused("an assistant turn with nothing before it, and the template shows no place where it starts")
        prompt, _ = self._render(messages[:k], tools, add_generation_prompt=True)
        start = len(prompt)
        if not text.startswith(prompt):
            before, _ = self._render(messages[:k], tools)
            if prompt.startswith(before) and text.startswith(before):
                # The prompt has more than the turn begins with (an opened <think>): start where they part.
                opened, turn = (self._encode(x[len(before) :]) for x in (prompt, text))
                common = _common(opened.ids, turn.ids)
                start = len(before) + (turn.offsets[common - 1][1] if common else 0)
            elif self._prompt_end and text.count(self._prompt_end) == prompt.count(self._prompt_end) > 0:
                # The turn changes the text before it (Mistral Nemo moves the system prompt): what is served is the prompt.
                # As many prompt ends as there: the last is this turn's, neither an earlier turn's nor part of the answer.
                generated = text.rpartition(self._prompt_end)[2]
                end += start + len(generated) - len(text)
                text = prompt + generated
            else:
                raise _Refused(
                    "the template's text before this turn changes with the turn, so its start cannot be found; "
                    "a template with {% generation %} around the assistant's text would show it"
                )
        return text, [(start, end)] if start < end else []

    def _after_header(self, text: str) -> int:
        """Where the first assistant turn starts: after the generation prompt, or as much of it as the text has (it may open
        a <think> that the rendered turn has not)."""
        ends = [end for _, end in self._encode(self._header).offsets]
        for end in reversed(ends):
            at = text.find(self._header[:end])
            if at >= 0:
                return at + end
        raise _Refused("the template's generation prompt does not occur before the assistant's first turn")

    def _turn_end(self, text: str) -> int:
        """End of the last turn of a rendering: after its end-of-turn token, before what the template adds to close up."""
        return len(text.rstrip().removesuffix(self._closing).rstrip())

    def _render(
        self, messages: list[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The template's text and its {% generation %} spans. _Refused with the template's own words."""
        template = self._template(tools)
        marks = _marks(template)
        try:
            texts, spans = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=add_generation_prompt,
                **self.kwargs,
            )
        except jinja2.TemplateSyntaxError as error:
            line = error.lineno - (self.template_date is not None)  # with_date adds one
            raise ValueError(f"the chat template is not valid Jinja, line {line}: {error.message}") from error
        except Exception as error:  # a template runs any expression: TypeError, KeyError, its own raise_exception ...
            raise _Refused(f"the chat template refuses it: {type(error).__name__}: {error}") from error
        return texts[0], [tuple(span) for span in spans[0]] if marks else []

    def _template(self, tools: list[dict] | None) -> str:
        template = self.templates[tools is not None]
        if template is None:
            raise ValueError(
                f"the tokenizer {self.name} has no chat template to use for conversations; "
                f"set data.chat_template to a Jinja file, or give pre-tokenised input_ids and loss_mask"
            )
        return template

    def _encode(self, text: str) -> Encoding:
        if self.backend is None:
            raise ValueError(
                f"{self.name} is a slow tokenizer: it gives no character offsets, which the loss mask "
                f"needs; use the fast one (a tokenizer.json), or give pre-tokenised input_ids and loss_mask"
            )
        return self.backend.encode(text, add_special_tokens=False)

    def _probe(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """A rendering that is only looked at to learn the template; with a tool where it wants one (Hermes)."""
        try:
            return self._render(messages, None, add_generation_prompt)[0]
        except _Refused:
            function = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}, "required": []}}
            return self._render(messages, [{"type": "function", "function": function}], add_generation_prompt)[0]

    @cached_property
    def _header(self) -> str:
        """The generation prompt alone; empty where the template has none or it cannot be told."""
        user = [{"role": "user", "content": "u"}]
        try:
            before, prompt = self._probe(user), self._probe(user, add_generation_prompt=True)
        except _Refused:
            return ""
        before = before.removesuffix(self._closing)
        return prompt[len(before) :] if prompt.startswith(before) else ""

    @cached_property
    def _prompt_end(self) -> str:
        """What stands right before an answer: the generation prompt, or without one the end of the user's turn. Empty when
        that stands after an answer, too."""
        question, answer = "fastdraft-question", "fastdraft-answer"
        chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        try:
            prompt, text = self._probe(chat[:1], add_generation_prompt=True), self._probe(chat)
        except _Refused:
            return ""
        end = self._header or prompt.partition(question)[2].strip()
        return "" if end in text.partition(answer)[2] else end

    @cached_property
    def _closing(self) -> str:
        """What the template sets at the very end of a conversation after the end-of-turn token (Phi-3: <|endoftext|>).

        Found by rendering one exchange with and without a further turn: after the answer both begin with the end of the
        turn, what the former has beyond that closes the conversation, if it begins with a special token. Empty when they
        begin with nothing common: then the closing IS the end of the turn.
        """
        answer = "fastdraft-answer"
        chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": answer}]
        try:
            last, followed = self._probe(chat), self._probe([*chat, {"role": "user", "content": "u"}])
        except _Refused:
            return ""
        last, followed = (text.partition(answer)[2] for text in (last, followed))
        encodings = [self._encode(text) for text in (last, followed)]
        common = _common(encodings[0].ids, encodings[1].ids)
        end = encodings[0].offsets[common - 1][1] if common else 0
        special = {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        rest = last[end:].strip()
        return rest if rest and self._encode(rest).ids[0] in special and last[:end].strip() else ""


def _plain(backend: Tokenizer) -> Tokenizer:
    """A copy without its post-processor, which adds special tokens and may trim the offsets."""
    backend = copy.deepcopy(backend)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend


class _Refused(Exception):
    """The template cannot render these messages, or shows no span for a turn."""


def _common(a: Sequence, b: Sequence) -> int:
    """Length of the common beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _marks(template: str) -> bool:
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def _with_reasoning(message: dict) -> dict:
    """Reasoning under each of the names that templates know it by (gpt-oss: thinking)."""
    reasoning = message.get("reasoning_content")
    return {"thinking": reasoning, "reasoning": reasoning, **message} if reasoning else message


def _reasoning(message: dict) -> str:
    inline = re.search(r"<think>(.*?)</think>", message["content"], re.DOTALL)
    return (message.get("reasoning_content") or (inline.group(1) if inline else "")).strip()
