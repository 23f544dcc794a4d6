"""Where an assistant's turn lies in a rendered conversation, proven or refused.

What is trained is what the served model would itself have produced: it begins where the prompt as served ends (the messages
before the turn, rendered with the generation prompt) and goes on to the token that stops the turn. The proof:

- The rendering that includes the turn begins with the prompt as served; or else the template's own text right before the
  turn's first word shows where the prompt ends. That text holds no word of any message, so a header that is quoted in one
  is not taken for a header. Where a word lies is shown by marks (`marking.py`).
- The turn's text and calls lie whole between beginning and end, and no text of another message or of the tools does.

What the template sets around the words of a proven turn is remembered. A later turn with the very same text around its own
words is proven by that, without marks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from fastdraft.data.conversations import CUT, with_reasoning
from fastdraft.data.marking import (
    HOWS,
    REASONING_KEYS,
    How,
    Leaf,
    Marks,
    Occurrence,
    mark_all,
    own_leaves,
    pieces,
    strings,
    thought_end,
)
from fastdraft.data.template import ChatTemplate, Refused, Span, Unproven

NOT_SHOWN = (
    "the template's text before this turn changes with the turn, so its start cannot be found; "
    "a template with {% generation %} around the assistant's text would show it"
)
OTHERWISE_CALLED = "the template begins these calls otherwise than those behind a user's turn, and no prompt shows how"
NOTHING_BEFORE = "an assistant turn with nothing before it, and the template shows no place where it starts"
EMPTY = "they are empty"
NO_TEXT = "the chat template does not render all of their text"
CHANGED = "the chat template changes their text"
NO_CALLS = "the chat template does not render their tool calls"
FRAMES_KEPT = 1000
TAIL = 200  # characters of a prompt in which a tag at its end is looked for; to look through all takes 3 % of the time
CLOSED = (
    "they have reasoning, but the generation prompt closes it, so the served model would give none; "
    "data.chat_template_kwargs turns it on (most templates read enable_thinking: true)"
)
OTHER_TAG = "they have <think> in their text, but the generation prompt opens reasoning with another tag"
EMPTY_BLOCK = (
    "the chat template writes an empty block where they have reasoning, and nowhere shows how it writes one that is full"
)
CLOSED_TWICE = "the chat template closes reasoning before their text, which the generation prompt has closed already"
BEFORE_THOUGHT = "the chat template writes an empty block before their reasoning"
WORDS_TWICE = "they begin with the words that the generation prompt ends with, which the served model does not write again"
UNCLOSED = (
    "they open a block for reasoning and do not close it, and the generation prompt opens it, too; if a limit of tokens "
    'cut them, say so in the message ("finish_reason": "length")'
)
HEADERLESS = "the generation prompt behind a tool's result lacks the header that the chat template writes before their text"
_THINK = r"(?:\w+:)?think(?::\w+)?"  # the name of a tag for reasoning: think, seed:think, think:opensource
_OPENED = re.compile(rf"<(?P<tag>{_THINK})>(?P<white>\s*)$")  # what a prompt ends with that opens the reasoning
_EMPTY = re.compile(rf"\s*<(?P<tag>{_THINK})>\s*</(?P=tag)>\s*")
_CLOSES = re.compile(rf"\s*</{_THINK}>")
_BLOCK = re.compile(rf"<(?P<tag>{_THINK})>\s*(?:</(?P=tag)>\s*)?$")  # either
_CLOSED = re.compile(rf"</{_THINK}>\s*$")  # and that closes it
_CUT_AT = re.compile(r"\s*(?P<tag></[^<>]+>|\[/[A-Z_]+\])\s*")  # where a parser cuts reasoning from an answer
_TAG = re.compile(r"\s*(?P<tag><[^<>/|]+>|\[[A-Z_]+\])(?P<white>\s*)")  # a block's beginning by any name


class LeftOut(Exception):
    """A turn that is not trained on, and why."""


@dataclass(frozen=True)
class Turn:
    text: str  # the conversation up to the turn as it is served, and the turn
    span: Span  # what the model produces
    lost_reasoning: bool = False  # the turn has reasoning that is not in the text
    raw_reasoning: bool = False  # it is in the text as the model produced it, though the template cuts it
    endless: bool = False  # its last token is none that stops the model
    cut: bool = False  # a limit of tokens ended it, so what the template writes behind its words is not the model's
    cut_reasoning: bool = False  # and it did not close the block for reasoning that the generation prompt opens
    empty_block: bool = False  # it begins with a block for reasoning that is empty, because the answer has none
    unopened: bool = False  # the text lacks or closes what the generation prompt opens, because the answer has no reasoning


@dataclass(frozen=True)
class _Located:
    start: int
    end: int
    reasoning: bool  # all of the turn's reasoning lies within
    lacks: str = ""  # what the generation prompt opens at its end and the turn does not have


@dataclass(frozen=True)
class _Frame:
    """What stands around a turn's words."""

    order: tuple[int, ...]  # of the turn's texts, as rendered
    segments: tuple[str, ...]  # before each of them, and from the last to the turn's end
    after: str  # what is no longer the turn's
    reasoning: bool
    lacks: str  # as in _Located

    def end(self, leaves: list[Leaf], full: str, start: int) -> int | None:
        """The end of a turn that begins at `start`, None if the rendering is another than this frame with its words."""
        at = start
        for i, place in enumerate(self.order):
            if not full.startswith(self.segments[i], at):
                return None
            at += len(self.segments[i])
            whole, core = leaves[place].whole, leaves[place].text
            for form in (whole, core, whole.lstrip(), whole.rstrip()):
                if full.startswith(form, at) and full.startswith(self.segments[i + 1], at + len(form)):
                    at += len(form)
                    break
            else:
                return None
        end = at + len(self.segments[-1])
        return end if full[end:] == self.after else None


class Turns:
    """Finds assistants' turns in the renderings of one template. Picklable."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._frames: dict[tuple[str, ...], dict[_Frame, None]] = {}

    def turn(
        self,
        messages: Sequence[dict],
        tools: list[dict] | None,
        full: str | None = None,  # the rendering, if it is at hand
        prompt: str | None = None,  # and that of all messages but the last, with the generation prompt
    ) -> Turn:
        """The turn that ends the conversation.

        Refused: the template cannot render it. Unproven: its place cannot be proven. LeftOut: there is nothing in it to
        train on, or the template does not render all that the model said.
        """
        turn = self._turn(messages, tools, full, prompt)
        bare = _without_parsers_white(messages[-1])
        if bare is not None and _as_parsed(messages[-1], turn) is False:
            with suppress(LeftOut, Refused):
                other = self._turn([*messages[:-1], bare], tools, None, prompt)
                if _as_parsed(messages[-1], other):
                    return other
        return turn

    def _turn(self, messages: Sequence[dict], tools: list[dict] | None, full: str | None, prompt: str | None) -> Turn:
        message = messages[-1]
        if not (message["content"].strip() or message.get("tool_calls") or _reasoning(message)):
            raise LeftOut(EMPTY)
        full = self.template.render(messages, tools) if full is None else full
        prompt = self._prompt(messages[:-1], tools) if prompt is None else prompt
        located = self._by_frame(messages, full, prompt) or self._by_marks(messages, tools, full, prompt)
        turn = _as_served(message, full, prompt, located, self.template)
        start, end = turn.span
        quotes = "</think>" in message["content"] and not thought_end(message)  # at which some templates cut all the same
        if quotes and message["content"].strip() not in turn.text[start:end]:
            raise LeftOut(CHANGED)
        if message.get("finish_reason") in CUT:
            return self._cut(message, turn, own_leaves(message, len(messages) - 1, self.template.tags))
        if (stop := self.template.stop_within(turn.text[start:end])) is not None:
            raise LeftOut(f"they hold {stop!r}, which stops the served model, before their end")
        stop = self.template.stop_after(bool(message.get("tool_calls")))
        if stop and not turn.text[end:].strip():
            return replace(turn, text=turn.text[:end] + stop, span=(start, end + len(stop)))
        return replace(turn, endless=not self.template.stops_at(turn.text, end))

    def _cut(self, message: dict, turn: Turn, leaves: list[Leaf]) -> Turn:
        """The turn up to its last word, behind which the model had more to say. LeftOut where that place is not known."""
        start, end = turn.span
        last = leaves[-1].text if leaves else ""
        # An answer may be "|>", with which <|im_end|> ends, too.
        places = [text.rfind(last, start, end) for text in (self.template.without_added(turn.text), turn.text)]
        at = next((place for place in places if place >= 0), -1)
        if message.get("tool_calls") or not last or at < 0:
            raise LeftOut("a limit of tokens cut them, and their last word cannot be found")
        return replace(turn, span=(start, at + len(last)), cut=True)

    def _prompt(self, before: Sequence[dict], tools: list[dict] | None) -> str | None:
        """What is served before the turn. None where nothing asks for it yet: templates refuse to render that."""
        if not before:
            return None
        try:
            return self.template.render(before, tools, add_generation_prompt=True)
        except Refused:
            if all(message["role"] in ("system", "developer") for message in before):
                return None
            raise

    def _by_frame(self, messages: Sequence[dict], full: str, prompt: str | None) -> _Located | None:
        """The turn by what a proven turn had around its words."""
        message = messages[-1]
        if prompt is None or message.get("tool_calls"):
            return None
        leaves = own_leaves(message, len(messages) - 1, self.template.tags)
        for frame in self._frames.get(tuple(leaf.kind for leaf in leaves), ()):
            start = len(prompt) - len(frame.lacks)
            if not prompt.endswith(frame.lacks) or not full.startswith(prompt[:start]):
                continue
            if (end := frame.end(leaves, full, start)) is not None:
                return _Located(start, end, frame.reasoning, frame.lacks)
        return None

    def _by_marks(self, messages: Sequence[dict], tools: list[dict] | None, full: str, prompt: str | None) -> _Located:
        """The turn by marks in its words and in those of all others."""
        message, last = messages[-1], len(messages) - 1
        how, marks, places = self._marked(messages, tools, full)
        prefix = prompt is not None and full.startswith(prompt)
        own = [place for place in places if place.leaf.message == last and not (prefix and place.start < len(prompt))]
        given = [place for place in places if place.leaf.message != last]
        words = len(self.template.words) if prefix and prompt.endswith(self.template.words) else 0
        if words and any(place.leaf.message == last and 0 < len(prompt) - place.start <= words for place in places):
            raise LeftOut(WORDS_TWICE)
        begin = len(prompt) if prefix else own[0].start if own else 0
        calls = message.get("tool_calls", ())
        if how is None or (not own and calls and (not how.calls or all(_identified(call, full[begin:]) for call in calls))):
            return self._by_search(message, full, prompt)
        _refuse_cut(message, full, own, marks.pairs(last), how, begin, self.template)
        if prefix:
            start, lacks = len(prompt), ""
            # After an assistant's turn some templates write no generation prompt. The header then comes with the turn.
            header, gap = self.template.header, full[start : own[0].start]
            if header.strip() and not prompt.endswith(header) and header in gap:
                if messages[-2]["role"] in ("tool", "function"):  # which is served, and who writes the header is not shown
                    raise LeftOut(HEADERLESS)
                start += gap.index(header) + len(header)
            if not header and self.template.marks:
                start = self._marked_start(messages, tools, given, full, own[0].start) or start
        else:
            start, lacks = self._after_prompt(messages, tools, how, given, full, prompt, own[0])
        if own[0].start < start:
            raise Unproven(NOT_SHOWN)
        said = _said(message, full, own[-1].end)
        if not how.calls:
            said = max([said, *self._call_ends(message, full, start)])
        end = self.template.turn_end(full, said)
        if any(place.end > start and place.start < end for place in given):
            raise Unproven("the template sets the text of another message into this turn")
        leaves, shown = own_leaves(message, last, self.template.tags), {place.leaf for place in own}
        reasoning = all(leaf in shown for leaf in leaves if leaf.kind == "reasoning")
        located = _Located(start, end, reasoning, lacks)
        if not message.get("tool_calls") and prompt == full[:start] + lacks:
            self._remember(leaves, own, full, located)
        return located

    def _marked(
        self, messages: Sequence[dict], tools: list[dict] | None, full: str
    ) -> tuple[How | None, Marks | None, list[Occurrence]]:
        """Where all texts lie, by the first way of marking that changes nothing in the rendering."""
        for how in HOWS:
            marks, marked, marked_tools = mark_all(messages, tools, how, self.template.tags)
            try:
                plain, places = marks.find(self.template.render(marked, marked_tools))
            except Refused:
                continue
            if plain == full and len(messages) - 1 not in marks.unmarked:
                return how, marks, places
        return None, None, []

    def _by_search(self, message: dict, full: str, prompt: str | None) -> _Located:
        """The turn where no marks can be set: what follows the prompt, if each of its texts is in there."""
        if prompt is None or not full.startswith(prompt):
            raise Unproven(NOT_SHOWN)
        leaves, start = own_leaves(message, 0, self.template.tags), len(prompt)
        needed = [leaf.text for leaf in leaves if leaf.kind == "content"]
        if any(text not in full[start:] for text in needed):
            raise LeftOut(NO_TEXT)
        calls = message.get("tool_calls", [])
        if not all(_shows_call(full[start:], call, self.template.shows_ids) for call in calls):
            raise LeftOut(NO_CALLS)
        if any(full.count(text, start) > 1 for text in needed):
            raise Unproven("the turn's text cannot be told from the template's")
        thoughts = [leaf.text for leaf in leaves if leaf.kind == "reasoning"]
        reasoning = all(text in full[start:] for text in thoughts)
        ends = [full.rfind(text, start) + len(text) for text in needed] + self._call_ends(message, full, start)
        if not ends:
            raise LeftOut(NO_TEXT)
        return _Located(start, self.template.turn_end(full, _said(message, full, max(ends))), reasoning)

    def _call_ends(self, message: dict, full: str, start: int) -> list[int]:
        """Where the texts of calls without marks end in the turn, not those letters of an end-of-turn token."""
        words = self.template.without_added(full)
        ends = []
        for forms in (
            forms for call in message.get("tool_calls", ()) for forms in _call_texts(call, self.template.shows_ids)
        ):
            shown = [(text.rfind(form, start), len(form)) for text in (words, full) for form in forms]
            ends.append(next((at + length for at, length in shown if at >= 0), start))
        return ends

    def _after_prompt(
        self,
        messages: Sequence[dict],
        tools: list[dict] | None,
        how: How,
        given: list[Occurrence],
        full: str,
        prompt: str | None,
        word: Occurrence,  # the turn's first
    ) -> tuple[int, str]:
        """Where the turn begins in a rendering that does not begin with the prompt, and what the prompt opens that it
        lacks: by the template's text between the last word before the turn and its first."""
        if not how.given:
            raise Unproven(NOT_SHOWN)
        first = word.start
        nearest = max((place for place in given if place.end <= first), key=lambda place: place.end, default=None)
        before, all_marked = self._words_end(messages, nearest, full, first)
        gap = full[before:first]
        bases: list[tuple[int, str]] = []  # where the turn may begin, and what the prompt opens there
        asked = ""  # the template's text behind the last word of the prompt, if the gap is behind that word, too
        if prompt is not None:
            marks, marked, marked_tools = mark_all(messages[:-1], tools, how, self.template.tags)
            try:
                plain, places = marks.find(self.template.render(marked, marked_tools, add_generation_prompt=True))
            except Refused:
                plain, places = "", []
            last = max(places, key=lambda place: place.end, default=None)
            tail = prompt[self._words_end(messages, last, prompt, len(prompt))[0] :] if all_marked else ""
            # The prompt may end with words that the rendering with the turn has dropped. Then the gap is another one.
            same = (last and last.leaf) == (nearest and nearest.leaf)
            if plain == prompt and tail and same:
                asked = tail if tail.strip() else ""
                if gap.startswith(tail):
                    return before + len(tail), ""
                # Behind a tool's result a block may stand without a header (DeepSeek V3.2).
                block = _BLOCK.search(tail)
                if block and block.start() and gap.startswith(tail[: block.start()]):
                    bases.append((before + block.start(), block.group()))
        bases[:0] = [
            (before + gap.index(base) + len(base), opened)
            for base, opened in self.template.headers
            if gap.count(base) == 1
            and (self._leads(gap.partition(base)[2]) if prompt is None else prompt.endswith(base + opened))
        ]
        for start, opened in bases[:1]:
            # What differs from the prompt in white space alone is the prompt's, and no block that the turn lacks. So is
            # the end of a block, where the template writes no more of it in a turn (DeepSeek V3.2: </think>).
            shown = full[start:first]
            if shown.strip() and (shown.strip() == opened.strip() or opened.endswith(shown)):
                return first, ""
            if shown.strip() and opened.strip().endswith(shown.strip()):
                return start + len(shown.rstrip()), ""
            closing = _CLOSED.search(opened) if not messages[-1]["content"].strip() else None
            if closing and shown.lstrip().startswith(tag := closing.group().rstrip()):  # and behind it the syntax of a call
                return start + shown.index(tag) + len(tag), ""
            return start, opened
        # The turn begins where the messages before it end, where the template writes in a turn nothing of the generation
        # prompt, be it a block (Hunyuan A13B) or a header (Apertus, behind a tool's result), or not its last words.
        # The generation prompt behind a tool's result may be its last block alone (Gemma 4).
        header, words = self.template.header, self.template.words
        blocks = [(opened, True) for _, opened in self.template.headers[1:]]
        lead = self.template.call_lead if word.leaf.kind == "name" else ""  # what stands before a call's name
        for lacks, blank in ((header, not self.template.opens_block), *blocks, (words, False)):
            start = len(prompt) - len(lacks) if prompt is not None and lacks.strip() and prompt.endswith(lacks) else -1
            shown = full[start:first].strip()
            if before <= start <= first and full.startswith(prompt[:start]) and (not blank or shown in ("", lead)):
                return start, lacks
        if (start := self._marked_start(messages, tools, given, full, first)) is not None:
            # A template may begin a further call otherwise than its model does (DeepSeek V3).
            if prompt is not None and lead and full[start:first].strip() != lead:
                raise Unproven(OTHERWISE_CALLED)
            return start, ""
        # Prompt and rendering may differ in white space alone, where a template is written over many lines. Then the
        # prompt is as it is, and white space of the answer's own could not be told from the template's.
        lead = lead if gap.rstrip().endswith(lead) else ""
        shown = gap[: gap.rindex(lead)] if lead else gap
        asks = asked and "".join(asked.split()) == "".join(shown.split())
        if asks and not word.leaf.whole[:1].isspace():
            white, end = (text[len(text.rstrip()) :] for text in (shown, asked))
            return before + len(shown) - (len(white) - len(end) if white.startswith(end) else 0), ""
        raise Unproven(NOTHING_BEFORE if len(messages) == 1 else NOT_SHOWN)

    def _leads(self, text: str) -> bool:
        """Whether text between a header and an answer is all that the template sets there, none of its system prompt."""
        return self.template.tags.sub("", text).strip() in ("", self.template.lead)

    def _words_end(
        self, messages: Sequence[dict], nearest: Occurrence | None, text: str, first: int
    ) -> tuple[int, bool]:  # the place; whether marks show all messages behind those words
        """Where the last words before a turn end, with the tags of their message behind them: tags have no marks, and one
        that is quoted there is no header. Refused where that place is not certain."""
        end, index = (nearest.end, nearest.leaf.message) if nearest else (0, -1)
        if nearest and index >= 0:
            parts = pieces(messages[index], index, self.template.tags)
            at = max((i for i, part in enumerate(parts) if part == nearest.leaf), default=None)
            behind = [] if at is None else parts[at + 1 :]
            if behind and not any(isinstance(part, Leaf) for part in behind):
                whole, core = nearest.leaf.whole, nearest.leaf.text
                tags = whole[whole.index(core) + len(core) :] + "".join(behind)
                form = next((form for form in (tags, tags.rstrip()) if text.startswith(form, end)), None)
                if form is None:
                    raise Unproven(NOT_SHOWN)
                end += len(form)
        all_marked = True
        for i in range(index + 1, len(messages) - 1):
            content = messages[i]["content"].strip()
            if not content or any(isinstance(part, Leaf) for part in pieces(messages[i], i, self.template.tags)):
                continue
            all_marked = False  # a message of tags alone
            if text.count(content, end, first) > 1:
                raise Unproven(NOT_SHOWN)
            end = max(end, text.find(content, end, first) + len(content)) if content in text[end:first] else end
        return end, all_marked

    def _marked_start(
        self, messages: Sequence[dict], tools: list[dict] | None, given: list[Occurrence], full: str, first: int
    ) -> int | None:
        """Where the {% generation %} marks around the turn's first word begin, if they hold no other message's."""
        for start, end in self.template.spans(messages, tools):
            if start <= first < end and not any(place.end > start and place.start < end for place in given):
                return start
        return None

    def _remember(self, leaves: list[Leaf], own: list[Occurrence], full: str, located: _Located) -> None:
        """The text around these words, unless white space at their edges leaves open whose it is."""
        if len(set(leaves)) < len(leaves) or any(leaf.text != leaf.whole for leaf in leaves):
            return
        edges = [located.start, *(at for place in own for at in (place.start, place.end)), located.end]
        segments = tuple(full[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
        order = tuple(leaves.index(place.leaf) for place in own)
        frames = self._frames.setdefault(tuple(leaf.kind for leaf in leaves), {})
        if len(frames) < FRAMES_KEPT:
            frames[_Frame(order, segments, full[located.end :], located.reasoning, located.lacks)] = None


def _refuse_cut(
    message: dict,
    full: str,
    own: list[Occurrence],
    pairs: dict[str, Leaf],
    how: How,
    start: int,  # where the turn begins, or a place in it
    template: ChatTemplate,
) -> None:
    """LeftOut if a text or a call of the turn is not in its rendering, or not as it is."""
    shown = {place.pair for place in own}
    missing = [leaf for pair, leaf in pairs.items() if pair not in shown]
    for i, call in enumerate(message.get("tool_calls", ())):
        if how.calls:
            lost = {leaf.kind for leaf in missing if leaf.kind in ("name", "arguments") and leaf.call == i}
            named = "name" not in lost or _identified(call, full[start:])
            has_arguments = any(leaf.kind == "arguments" and leaf.call == i for leaf in pairs.values())
            if "arguments" in lost or not (named or (has_arguments and not template.shows_ids)):
                raise LeftOut(NO_CALLS)
        elif not own or not _shows_call(full[start:], call, template.shows_ids):
            raise LeftOut(NO_CALLS)
    if not own or any(leaf.kind == "content" for leaf in missing):
        raise LeftOut(NO_TEXT)
    if any(full[p.start : p.end] != p.leaf.text for p in own if p.leaf.kind in ("content", "reasoning")):
        raise LeftOut(CHANGED)


def _call_texts(call: dict, ids: bool) -> list[tuple[str, ...]]:
    """What must be rendered of a call: its arguments' texts, each as it is and as JSON has it; and where it has none or the
    template writes `ids`, its name or an id with the name in it."""
    function = call.get("function", call)
    texts = list(strings(function.get("arguments")))
    named = (function["name"], call["id"]) if _names(call) else (function["name"],)
    forms = [(text, json.dumps(text, ensure_ascii=False)[1:-1]) for text in texts]
    return [named, *forms] if ids or not texts else forms


def _names(call: dict) -> bool:
    """Whether a call's id has its name in it, as Kimi K2's: functions.get_weather:0."""
    name = re.escape(call.get("function", call)["name"])
    return re.search(rf"(?<![\w-]){name}(?![\w-])", call.get("id") or "") is not None


def _identified(call: dict, text: str) -> bool:
    """Whether the text has a call's id, which a template may render instead of its name, and this has the name in it."""
    return _names(call) and call["id"] in text


def _shows_call(text: str, call: dict, ids: bool) -> bool:
    return all(any(form in text for form in forms) for forms in _call_texts(call, ids))


def _without_parsers_white(message: dict) -> dict | None:
    """A message without the white space at whose place its text was cut into reasoning and answer; None if it has none.

    Some servers keep it (vLLM), and templates that write their own around a closing tag then write it twice.
    """
    reasoning, content = message.get("reasoning_content") or "", message["content"]
    if not reasoning.strip() or (reasoning == reasoning.strip() and content == content.lstrip()):
        return None
    return with_reasoning({**message, **dict.fromkeys(REASONING_KEYS, reasoning.strip()), "content": content.lstrip()})


def _as_parsed(message: dict, turn: Turn) -> bool | None:
    """Whether the turn has the text that a parser cut where reasoning ends: the reasoning's end, a tag, and the beginning
    of the answer, white space included. None where the turn shows no such place."""
    reasoning, content = message["reasoning_content"], message["content"]
    said, thought = turn.text[turn.span[0] : turn.span[1]], reasoning.strip()
    at = said.find(thought)
    cut = _CUT_AT.match(said, at + len(thought)) if at >= 0 else None
    if cut is None:
        return None
    ends = reasoning[len(reasoning.rstrip()) :] + cut["tag"] + content[: len(content) - len(content.lstrip())]
    begins = reasoning[: len(reasoning) - len(reasoning.lstrip())]
    before_call = bool(message.get("tool_calls")) and not content  # whose parser took white space before it along
    same = cut.group().startswith(ends) if before_call else cut.group() == ends
    return same and turn.text[: turn.span[0] + at].endswith(begins)


def _said(message: dict, full: str, end: int) -> int:
    """Where a turn's own text ends: its last word and, where the template keeps it, the white space after that."""
    white = message["content"][len(message["content"].rstrip()) :]
    return end + len(white) if full.startswith(white, end) else end


def _as_served(message: dict, full: str, prompt: str | None, located: _Located, template: ChatTemplate) -> Turn:
    """The turn behind the prompt that is served, where the rendering with the turn has another text before it.

    Reasoning that is cut is not put back where answers have a lead: the model would not begin with the reasoning.
    """
    start, end = located.start, located.end
    if block := _never_closed(message, prompt, located, template):
        tag, white = block
        if message.get("finish_reason") in CUT:
            turn = _opened_once(message["content"].rstrip(), tag, white, prompt, "")
            said = turn.text[len(prompt) :].lstrip()
            # What the template writes behind the words, which is not trained.
            behind = full[start:].rpartition(said)[2] if said in full[start:] else ""
            return replace(turn, text=turn.text + behind, raw_reasoning=False, cut_reasoning=True)
        if message["content"].lstrip().startswith(tag):
            raise LeftOut(UNCLOSED)
    thinks, answer = bool(_reasoning(message)), full[start:end]
    opened = _OPENED.search(prompt, len(prompt) - TAIL) if prompt is not None and not located.lacks else None
    opened = opened if opened and full.endswith(opened.group(), 0, start) else None  # by the rendering as by the prompt
    # by which the template closes what the prompt opens
    block = re.match(rf"\s*</{re.escape(opened['tag'])}>\s*", answer) if opened else None
    if block and thought_end(message) and opened["tag"] != "think":
        raise LeftOut(OTHER_TAG)
    if opened and answer.lstrip().startswith(f"<{opened['tag']}>"):
        return _opened_once(answer, f"<{opened['tag']}>", opened["white"], prompt, full[end:])
    twice = block and thought_end(message) and "</think>" in answer[block.end() :]
    raw = None
    if prompt is not None and not template.lead and (twice or (thinks and (block or not located.reasoning))):
        raw = _raw(message, prompt, answer)
    if raw is not None:
        return Turn(prompt + raw + full[end:], (len(prompt), len(prompt) + len(raw)), raw_reasoning=True)
    closes = prompt is not None and (_CLOSED.search(prompt, len(prompt) - TAIL) or (located.lacks and _closed(prompt)))
    if closes and ((thinks and located.reasoning) or answer.lstrip().startswith("<think>")):
        raise LeftOut(CLOSED)
    content = message["content"].strip()
    if closes and _CLOSES.match(answer) and not (content and answer.lstrip().startswith(content)):
        raise LeftOut(CLOSED_TWICE)
    lost = thinks and not located.reasoning
    if (empty := _EMPTY.match(answer)) and not located.lacks and not closes:
        filled = _filled(message, answer, empty, lost, template)
        if filled is not None:
            before = full[:start] if prompt is None else prompt
            return Turn(before + filled + full[end:], (len(before), len(before) + len(filled)), raw_reasoning=True)
    # A block for reasoning that the message does not have is the template's or the prompt's, and not what the model said.
    if prompt is None or full.startswith(prompt):
        if block and not thought_end(message):
            return Turn(full, (start + _without_own_white(message, block), end), lost, unopened=True)
        if opened and not thinks and not thought_end(message):
            before = prompt[: opened.start()]  # the template writes the answer into the block, and closes it nowhere
            return Turn(before + full[start:], (len(before), len(before) + end - start), unopened=True)
        return Turn(full, (start, end), lost, empty_block=not thinks and bool(empty))
    opens = _OPENED.search(located.lacks) or (template.opens_block and located.lacks == template.header)
    whole = located.lacks in (template.header, template.words) and not opens
    unopened = bool(located.lacks) and not whole and not _closed(located.lacks)
    before = prompt.removesuffix(located.lacks) if unopened else prompt
    first = len(before)
    if other := _TAG.fullmatch(located.lacks) if unopened and not _OPENED.search(located.lacks) else None:
        if _closes_tag(message["content"], other["tag"]):
            return _opened_once(answer, other["tag"], other["white"], prompt, full[end:])
        if template.opens_block and thought_end(message):
            raise LeftOut(OTHER_TAG)
    if lacked := _OPENED.search(located.lacks) if unopened else None:
        tag = re.escape(lacked["tag"])
        own = re.match(rf"\s*(?:<{tag}>\s*)?</{tag}>\s*", answer)
        at = own.end() if own else 0
        # The content opens the block itself, or leaves the opening to the prompt, as the model does (regenerate --target).
        closes_only = thought_end(message) and "<think>" not in message["content"][: thought_end(message)]
        whole = answer.startswith(message["content"].strip(), at)
        if (answer.startswith("<think>", at) or (closes_only and whole)) if own else closes_only:
            if lacked["tag"] != "think":
                raise LeftOut(OTHER_TAG)
            return _opened_once(answer[at:], f"<{lacked['tag']}>", lacked["white"], prompt, full[end:])
        if own and not thinks:
            first += _without_own_white(message, own)
    if block and not thought_end(message):
        first, unopened = first + _without_own_white(message, block), True
    return Turn(before + full[start:], (first, len(before) + end - start), lost, unopened=unopened)


def _never_closed(
    message: dict, prompt: str | None, located: _Located, template: ChatTemplate
) -> tuple[str, str] | None:  # the tag, and white space behind it
    """The block for reasoning that a prompt opens at its end, if the message's text has no end of it."""
    if prompt is None or message.get("reasoning_content") or message.get("tool_calls") or thought_end(message):
        return None
    if opened := _OPENED.search(prompt, len(prompt) - TAIL):
        tag, white = f"<{opened['tag']}>", opened["white"]
    elif other := _TAG.fullmatch(located.lacks) or (_TAG.fullmatch(template.header) if template.opens_block else None):
        tag, white = other["tag"], other["white"]  # by any name
    else:
        return None
    return None if _closes_tag(message["content"], tag) else (tag, white)


def _closes_tag(content: str, tag: str) -> bool:
    """Whether a text has a tag's closing one, and not only in quotation marks."""
    closing = re.escape(f"{tag[0]}/{tag[1:]}")
    return re.search(rf"(?<![`'\"“‘]){closing}", content) is not None


def _opened_once(said: str, tag: str, white: str, prompt: str, after: str) -> Turn:
    """A turn whose content has the reasoning in it, behind a prompt that ends with the block's tag and white space. Where
    the content opens the block, too, the model did not do that again."""
    if said.lstrip().startswith(tag):
        said = said.lstrip().removeprefix(tag)
        said = said.lstrip() if white else said
    return Turn(prompt + said + after, (len(prompt), len(prompt) + len(said)), raw_reasoning=True)


def _without_own_white(message: dict, block: re.Match[str]) -> int:
    """Where a block of the template's before an answer ends, without white space that the answer itself begins with."""
    content = message["content"]
    white = content[: len(content) - len(content.lstrip())]
    return block.end() - len(white) if white and block.group().endswith(white) else block.end()


def _filled(message: dict, answer: str, empty: re.Match[str], lost: bool, template: ChatTemplate) -> str | None:
    """An answer whose reasoning the model gave where the template writes an empty block of its own before it (Kimi K2
    Thinking). None: the answer has none. LeftOut where the template shows no block that is full, to write it alike."""
    rest = answer[empty.end() :]
    if message["content"].lstrip().startswith("<think>") and rest.startswith("<think>"):
        return rest  # the content has a block, which the template takes for text
    if not lost and thought_end(message) and "</think>" in rest:
        raise LeftOut(BEFORE_THOUGHT)
    if not lost:
        return None
    block = template.thought_block(empty["tag"])
    if block is None:
        raise LeftOut(EMPTY_BLOCK)
    white = empty.group()[len(empty.group().rstrip()) :]
    return f"{block[0]}{_reasoning(message)}{block[1]}{white}{rest}"


def _closed(block: str) -> bool:
    """Whether what a prompt opens at its end is closed there: with a closing tag (</think>), or with the second of a pair
    (Gemma 4: <|channel>thought, <channel|>; Command: <|START_THINKING|><|END_THINKING|>)."""
    if re.search(r"(</[^<>]+>|\[/[A-Z_]+\])\s*$", block):
        return True
    pair = re.search(r"<\|?(?P<begin>[^<>|]+)\|?>[^<>]*<\|?(?P<end>[^<>|]+)\|?>\s*$", block)
    if not pair:
        return False
    begin, end = pair["begin"], pair["end"]
    mirrored = begin == end and pair.group().startswith(f"<|{begin}>") and f"<{begin}|>" in pair.group()
    return mirrored or (begin != end and begin.upper().replace("START", "END").replace("BEGIN", "END") == end.upper())


def _raw(message: dict, prompt: str, answer: str) -> str | None:
    """What the model said to this prompt, reasoning included, whose answer the template renders alone; None if that cannot
    be told. `answer` ends with the token that stops the turn."""
    opened = _OPENED.search(prompt, len(prompt) - TAIL)
    if _CLOSED.search(prompt, len(prompt) - TAIL):
        return None
    content, reasoning = message["content"], message.get("reasoning_content")
    if at := thought_end(message):
        said = content[at:].strip()
        before = answer[: answer.rfind(said)] if said else answer
        if "</think>" in before:  # the template renders part of the reasoning, or closes it before
            answer = answer[before.rindex("</think>") + len("</think>") :]
        white = content[at:][: len(content[at:]) - len(content[at:].lstrip())]
        thought = content[:at] + white
        if opened and thought.lstrip().startswith("<think>"):
            thought = thought.lstrip().removeprefix("<think>")
            thought = thought.lstrip() if opened["white"] else thought
        return thought + answer.lstrip()
    if reasoning and opened:
        if answer.lstrip().startswith(f"</{opened['tag']}>"):  # the template closes it itself (DeepSeek V3.1)
            return reasoning.strip() + answer
        return f"{'' if opened['white'] else chr(10)}{reasoning.strip()}\n</{opened['tag']}>\n\n{answer.lstrip()}"
    return None


def _reasoning(message: dict) -> str:
    inline = message["content"][: thought_end(message)].removesuffix("</think>").replace("<think>", "")
    return (message.get("reasoning_content") or inline).strip()
