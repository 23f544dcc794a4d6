"""A chat template: what it renders, and what a few short renderings show about it.

Nothing is known here about any particular template. Everything that is learned comes from rendering chats of one question
and one answer, whose own texts are told apart from the template's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import jinja2
from tokenizers import Encoding, Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from fastdraft.data.config import DATE_MACRO
from fastdraft.data.marking import REASONING_KEYS

Span = tuple[int, int]  # character positions in a rendered text, end exclusive

QUESTION, ANSWER, THOUGHT, FUNCTION = "fastdraft-question", "fastdraft-answer", "fastdraft-thought", "fastdraft_function"
EXCHANGE = ({"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER})
_FUNCTION = {"name": FUNCTION, "description": "d", "parameters": {"type": "object", "properties": {}, "required": []}}
PROBE_TOOLS = [{"type": "function", "function": _FUNCTION}]
_CALL = {"id": "fastdraft", "type": "function", "function": {"name": FUNCTION, "arguments": {"x": ANSWER}}}
CALLED = (EXCHANGE[0], {"role": "assistant", "content": "", "tool_calls": [_CALL]})
TOOL_RESULT = {"role": "tool", "name": FUNCTION, "tool_call_id": "fastdraft", "content": QUESTION}


class Refused(Exception):
    """The template cannot render these messages, or does not show where a turn lies."""


class Unproven(Refused):
    """The template renders these messages and does not show where a turn lies."""


class ChatTemplate:
    """One Jinja text with what is always passed to it. Picklable."""

    def __init__(
        self,
        jinja: str,
        kwargs: dict[str, Any],
        backend: Tokenizer | None,  # None where the template is only rendered
        stops: frozenset[int] = frozenset(),  # tokens at which a served answer ends
    ) -> None:
        self.jinja, self.kwargs, self.backend, self.stops = jinja, kwargs, backend, stops
        self.marks = re.search(r"\{%-?\s*generation\s*-?%\}", jinja) is not None

    def render(self, messages: Sequence[dict], tools: list[dict] | None = None, add_generation_prompt: bool = False) -> str:
        """The template's text. Refused with the template's own words."""
        try:
            return self._render(messages, tools, add_generation_prompt, self._wants_parts, False)[0]
        except Refused as error:
            if tools is None:
                with suppress(Refused):
                    self._render(messages, [], add_generation_prompt, self._wants_parts, False)
                    error = Refused(f"{error}; it needs tools, which the line has not")
            raise error

    def spans(self, messages: Sequence[dict], tools: list[dict] | None) -> list[Span]:
        """The {% generation %} spans of the rendering."""
        return self._render(messages, tools, False, self._wants_parts, self.marks)[1] if self.marks else []

    def encode(self, text: str) -> Encoding:
        return self.backend.encode(text, add_special_tokens=False)

    def _render(
        self, messages: Sequence[dict], tools: list[dict] | None, add_generation_prompt: bool, parts: bool, spans: bool
    ) -> tuple[str, list[Span]]:
        try:
            texts = render_jinja_template(
                [[_in_parts(message) for message in messages] if parts else list(messages)],
                tools=tools,
                chat_template=self.jinja,
                return_assistant_tokens_mask=spans,
                add_generation_prompt=add_generation_prompt,
                **self.kwargs,
            )
        except jinja2.TemplateSyntaxError as error:
            line = error.lineno - self.jinja.startswith(DATE_MACRO)  # which is a line of its own
            raise ValueError(f"the chat template is not valid Jinja, line {line}: {error.message}") from error
        except Exception as error:  # a template runs any expression: TypeError, KeyError, its own raise_exception ...
            raise Refused(f"the chat template refuses it: {type(error).__name__}: {error}") from error
        return texts[0][0], [tuple(span) for span in texts[1][0]] if spans else []

    def _probe(
        self, messages: Sequence[dict], add_generation_prompt: bool = False, parts: bool | None = None
    ) -> str | None:
        """A rendering that is only looked at to learn the template; with a tool if it wants one (Hermes). None: refused."""
        parts = self._wants_parts if parts is None else parts
        for tools in (None, PROBE_TOOLS):
            with suppress(Refused):
                return self._render(messages, tools, add_generation_prompt, parts, False)[0]
        return None

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether content must be a list of parts: the text of a string does not show, that of a part does."""
        shown = []
        for parts in (False, True):
            text = self._probe(EXCHANGE, parts=parts) or ""
            shown.append(QUESTION in text and ANSWER in text)
        return shown == [False, True]

    @cached_property
    def between_parts(self) -> str | None:
        """The white space that the template itself writes between two text parts of a user's content, mostly none. None: it
        does not go over parts, and servers join them before it is asked."""
        parts = [{"type": "text", "text": text} for text in (QUESTION, ANSWER)]
        text = self._probe([{"role": "user", "content": parts}], add_generation_prompt=True) or ""
        found = re.search(rf"{QUESTION}(\s*){ANSWER}", text)
        return found[1] if found else None

    @cached_property
    def tags(self) -> re.Pattern[str]:
        """The tags that the template's text names, which it may look for in a content and cut there; and <think>."""
        tags = {"<think>", "</think>", *re.findall(r"<[^<>\s'\"{}%]+>|\[/?[A-Z_]+\]", self.jinja)}
        return re.compile("|".join(re.escape(tag) for tag in sorted(tags, key=len, reverse=True)))

    @cached_property
    def header(self) -> str:
        """The generation prompt alone; empty where the template has none or it cannot be told."""
        before, prompt = self._probe(EXCHANGE[:1]), self._probe(EXCHANGE[:1], add_generation_prompt=True)
        if before is None or prompt is None:
            return ""
        shown = (prompt[len(text) :] for text in (before, before.removesuffix(self.closing)) if prompt.startswith(text))
        return next(filter(None, shown), "")

    @cached_property
    def words(self) -> str:
        """Words without tags that a prompt ends with and no turn has, though answers begin where they do (Apriel 1.6, whose
        prompt begins the reasoning). Empty where there are none."""
        prompt, text = self._probe(EXCHANGE[:1], add_generation_prompt=True), self._probe(EXCHANGE)
        if prompt is None or text is None or ANSWER not in text:
            return ""
        before = text.partition(ANSWER)[0]
        words = prompt[len(before) :] if prompt.startswith(before) else ""
        return words if words.strip() and not self.tags.search(words) else ""

    @cached_property
    def opens_block(self) -> bool:
        """Whether the generation prompt is one opening tag, and no answer has it: a block for reasoning, by whatever name
        (LongCat: <longcat_think>)."""
        text = self._probe(EXCHANGE)
        tag = re.fullmatch(r"\s*(<[^<>/]+>|\[[A-Z_]+\])\s*", self.header)
        return tag is not None and text is not None and not text.partition(ANSWER)[0].rstrip().endswith(tag[1])

    @cached_property
    def lead(self) -> str:
        """Words that an answer begins with behind the generation prompt (gpt-oss: the name of a channel), without tags."""
        prompt, text = self._probe(EXCHANGE[:1], add_generation_prompt=True), self._probe(EXCHANGE)
        if prompt is None or text is None:
            return ""
        before = text.partition(ANSWER)[0]
        within = before.removeprefix(prompt) if self.header and before.startswith(prompt) else ""
        return self.tags.sub("", within).strip()

    @cached_property
    def call_lead(self) -> str:
        """What a call has before its name, where an answer has its first word; empty where that cannot be told."""
        for tools in (PROBE_TOOLS, None):
            with suppress(Refused):
                said, called = (
                    self._render(messages, tools, False, self._wants_parts, False)[0] for messages in (EXCHANGE, CALLED)
                )
                before = said.rpartition(ANSWER)[0]
                if before and called.startswith(before):
                    return called[len(before) :].partition(FUNCTION)[0].strip()
        return ""

    @cached_property
    def shows_ids(self) -> bool:
        """Whether a call's rendering has its id, which some templates write in place of its name (Kimi K2)."""
        other = {**CALLED[1], "tool_calls": [{**_CALL, "id": "fastdraft-other"}]}
        return self._probe(CALLED) != self._probe([CALLED[0], other])

    def thought_block(self, tag: str) -> tuple[str, str] | None:
        """What the template writes before an answer's reasoning and behind it, with white space inside the tags alone; None
        if it shows that nowhere: in an answer, a call, or an answer behind another."""
        thought = dict.fromkeys(REASONING_KEYS, THOUGHT)
        for before, said in (
            (EXCHANGE[:1], EXCHANGE[1]),
            (EXCHANGE[:1], CALLED[1]),
            ((*EXCHANGE, EXCHANGE[0]), EXCHANGE[1]),
        ):
            text = self._probe([*before, {**said, **thought}]) or ""
            if found := re.search(rf"(<{re.escape(tag)}>\s*){THOUGHT}(\s*</{re.escape(tag)}>)", text):
                return found[1], found[2]
        return None

    @cached_property
    def headers(self) -> list[tuple[str, str]]:
        """The generation prompt, and what is left of it without the tags that it may open at its end (<think>): pairs of
        the beginning that a rendered turn may share, and the opened rest that it then lacks."""
        cuts = [match.start() for match in re.finditer(r"<[^<>]+>|\[/?[A-Z_]+\]", self.header)]
        pairs = [(self.header, "")] + [(self.header[:at], self.header[at:]) for at in reversed(cuts)]
        return [(base, opened) for base, opened in pairs if base.strip()]

    @cached_property
    def closing(self) -> str:
        """What the template sets at the very end of a conversation after the end-of-turn token (Phi-3: <|endoftext|>).

        Found by rendering one exchange with and without a further turn: after the answer both begin with the end of the
        turn, what the former has beyond that closes the conversation, if it begins with a special token. A token that stops
        the model ends the turn there. Empty when they begin with nothing common: then the closing IS the end of the turn.
        """
        last, followed = self._probe(EXCHANGE), self._probe([*EXCHANGE, EXCHANGE[0]])
        if last is None or followed is None:
            return ""
        last, followed = (text.partition(ANSWER)[2] for text in (last, followed))
        encodings = [self.encode(text) for text in (last, followed)]
        common = next(
            (i for i, (x, y) in enumerate(zip(encodings[0].ids, encodings[1].ids, strict=False)) if x != y),
            min(len(encodings[0]), len(encodings[1])),
        )
        stop = next((i for i in range(common) if encodings[0].ids[i] in self.stops), common - 1)
        end = self._token_end(last, encodings[0], stop) if common else 0
        rest = last[end:].strip()
        return rest if rest and self.encode(rest).ids[0] in self._special and last[:end].strip() else ""

    @cached_property
    def openers(self) -> set[int]:
        """Added tokens that begin a turn: those of the generation prompt, and the last one before a user's text. Not one
        that also stands between the generation prompt and an answer (gpt-oss: <|message|>)."""
        prompt, text = self._probe(EXCHANGE[:1], add_generation_prompt=True), self._probe(EXCHANGE)
        if prompt is None or text is None:
            return set()
        within = text.partition(ANSWER)[0].removeprefix(prompt) if text.startswith(prompt) else ""
        header, before, within = (
            [i for i in self.encode(part).ids if i in self.added]
            for part in (self.header, text.partition(QUESTION)[0], within)
        )
        return {*header, *before[-1:]} - set(within)

    @cached_property
    def added(self) -> dict[int, str]:
        """Texts of the tokens that stand beside the vocabulary; they are found in a text before anything else."""
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    def without_added(self, text: str) -> str:
        """The text with the added tokens in it blotted out, letter by letter."""
        return self._added_pattern.sub(lambda match: "\0" * len(match.group()), text)

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        contents = sorted(filter(None, self.added.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or r"(?!)")

    @cached_property
    def _special(self) -> set[int]:
        return {i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def _token_end(self, text: str, encoding: Encoding, i: int) -> int:
        """Where token i ends in the text, without white space that an added token takes along (rstrip)."""
        start, end = encoding.offsets[i]
        if (content := self.added.get(encoding.ids[i])) and content in text[start:end]:
            return text.index(content, start) + len(content)
        return end

    def turn_end(
        self,
        text: str,
        said: int,  # where the answer's own text ends
    ) -> int:
        """End of the last turn of a rendering: after the token that stops the model, or where the template writes none
        after its end-of-turn token; before what the template sets after that."""
        end = max(len(text.rstrip().removesuffix(self.closing).rstrip()), said)
        tail = text[said:end]
        encoding = self.encode(tail)
        if (stop := self._first_stop(tail, encoding)) is not None:
            return said + stop
        added = [i for i, token in enumerate(encoding.ids) if token in self.added]
        opener = next((i for i in added[1:] if encoding.ids[i] in self.openers), None)
        ending = [i for i in added if opener is None or i < opener]
        return said + self._token_end(tail, encoding, ending[-1]) if ending else end

    def stop_after(self, calls: bool) -> str:
        """What a turn that nothing follows lacks at its end: white space and the token that stops the model, where that
        token is the beginning of the next turn (GLM: <|user|> after an answer, <|observation|> after calls). Empty where
        the template itself ends turns with a token that stops the model, or no such token begins the next turn."""
        return self._stop_after_calls if calls else self._stop_after_text

    @cached_property
    def _stop_after_text(self) -> str:
        return self._stop_before(EXCHANGE, EXCHANGE[0])

    @cached_property
    def _stop_after_calls(self) -> str:
        return self._stop_before(CALLED, TOOL_RESULT)

    def stops_at(self, text: str, end: int) -> bool:
        """Whether a token that stops the model ends there in a text."""
        return any(text.endswith(content, 0, end) for content in self._stop_texts)

    @cached_property
    def _stop_texts(self) -> list[str]:
        texts = (self.added.get(i) or self.backend.decode([i], skip_special_tokens=False) for i in self.stops)
        return [text for text in texts if text]  # an id beyond the tokenizer has none

    def stop_within(self, turn: str) -> str | None:
        """A token that stops the model and stands before the end of a turn's text; None if there is none."""
        found = [self.added[i] for i in self.stops if i in self.added and self.added[i] in turn]
        if all(turn.find(content) + len(content) == len(turn) for content in found):
            return None  # nearly every turn: there is nothing to tokenise
        return next((self.added[i] for i in self.encode(turn).ids[:-1] if i in self.stops), None)

    def _stop_before(self, messages: Sequence[dict], following: dict) -> str:
        """`stop_after` of these messages: what the rendering with a following turn has at once behind their rendering."""
        if not self.stops:
            return ""
        last, followed = self._probe(messages), self._probe([*messages, following])
        if last is None or followed is None:
            return ""
        last, followed = (text.rpartition(ANSWER)[2] for text in (last, followed))
        stop = self._first_stop(followed, self.encode(followed))
        if stop is None or self._first_stop(last, self.encode(last)) is not None:
            return ""
        turn = last.rstrip()
        lacking = followed[len(turn) : stop]
        at_once = followed.startswith(turn) and len(self.encode(lacking.lstrip()).ids) == 1
        return lacking if at_once else ""

    def _first_stop(self, text: str, encoding: Encoding) -> int | None:
        """Where the first token that stops the model ends in a text."""
        stop = next((i for i, token in enumerate(encoding.ids) if token in self.stops), None)
        return None if stop is None else self._token_end(text, encoding, stop)


def _in_parts(message: dict) -> dict:
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message
