"""A conversation to samples: tokens of the rendered chat template, and a mask of what the assistant generates.

The mask is made on the TEXT of a rendering (`turns.py`) and carried to tokens by the offsets of one tokenisation of that
whole text. A trained span is what the model must produce: from the end of the generation prompt to the end-of-turn token,
without white space that the template sets after it. Nothing is known about any particular template.

A server tokenises the prompt alone. Where the whole text has other tokens before a turn than that (a prompt that ends in a
space, which the answer's first word takes along), the turn becomes a sample of its own, prompt and answer tokenised apart.

A template that renders a turn differently once later turns follow (reasoning dropped, another closing token) never shows
the model the whole conversation as one text. Such a conversation becomes one sample per trained turn, each as it is then.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from fastdraft.data.config import TEMPLATE_DATE, with_date, writes_date
from fastdraft.data.conversations import BadLine, Conversation, spellings, together
from fastdraft.data.history import long_renderings
from fastdraft.data.samples import Sample
from fastdraft.data.template import ChatTemplate, Refused, Span, Unproven
from fastdraft.data.turns import LeftOut, Turn, Turns
from fastdraft.data.unread import unrendered

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HEADER, HEADERS_KEPT = 200, 10_000  # characters of the end of a prompt, and how many of those have their tokens kept


@dataclass(frozen=True)
class Tokenized:
    samples: list[Sample]  # each trains something and is at most max_length long
    rewritten: bool = False  # split, because the template rewrites earlier turns
    too_long: int = 0  # samples that max_length split or truncated
    untrained: int = 0  # samples or pieces left out because nothing in them is trained
    turns: int = 0  # trained
    lost_reasoning: int = 0  # trained turns whose reasoning the template does not render
    raw_reasoning: int = 0  # trained turns as the model produced them, with reasoning that the template cuts
    apart: int = 0  # trained turns that are tokenised apart from their prompt, which the tokenizer would join them with
    joined: int = 0  # and those that cannot be: what their first token has of the prompt, and so that token, is not trained
    endless: int = 0  # trained turns whose last token is none that stops the target
    cut: int = 0  # trained turns that a limit of tokens ended
    cut_reasoning: int = 0  # of these, without the end of the block for reasoning that the generation prompt opens
    empty_block: int = 0  # trained turns that begin with an empty block for reasoning
    unopened: int = 0  # trained turns without the block that the generation prompt opens
    left_out: list[tuple[str, str]] = field(default_factory=list)  # of turns that are not trained: where, and why
    unread: list[tuple[str, str]] = field(default_factory=list)  # what the template does not render: where, and its kind


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
        stop_ids: Collection[int] = (),  # at which the served target stops, besides the tokenizer's own eos token
    ) -> None:
        self.max_length, self.on_too_long, self.train_on, self.vocab_size = max_length, on_too_long, train_on, vocab_size
        self.stops = frozenset(stop_ids) | ({tokenizer.eos_token_id} - {None})
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
        beside = Path(tokenizer.name_or_path or "", "chat_template.json")  # a processor's, which no tokenizer reads
        self._beside = beside if self.templates[0] is None and tokenizer.name_or_path and beside.is_file() else None
        self.backend = _plain(tokenizer.backend_tokenizer) if tokenizer.is_fast else None
        self._prompts: dict[str, list[int]] = {}
        self._turns: dict[bool, Turns] = {}  # by whether there are tools

    def __call__(self, conversation: Conversation) -> Tokenized:
        """Samples of one conversation. BadLine when the template refuses it or a token id is out of range."""
        turns: list[Turn] = []
        left_out: list[tuple[str, str]] = []
        unread: list[tuple[str, str]] = []
        apart = joined = 0
        rewritten = False
        if conversation.input_ids is not None:
            samples = [self._pretokenized(conversation)]
            count = int(np.count_nonzero(np.diff(samples[0].loss_mask, prepend=False) & samples[0].loss_mask))
        else:
            turns, left_out, unread = self._turns_of(conversation)
            count = len(turns)
            texts = _texts(turns)
            rewritten = len(texts) > 1
            samples, apart, joined = self._samples(texts, conversation.key)
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
            rewritten=rewritten,
            too_long=sum(len(sample.input_ids) > n for sample in samples),
            untrained=len(pieces) - len(kept) if samples else 1,
            turns=count,
            lost_reasoning=sum(turn.lost_reasoning for turn in turns),
            raw_reasoning=sum(turn.raw_reasoning for turn in turns),
            apart=apart,
            joined=joined,
            endless=sum(turn.endless for turn in turns),
            cut=sum(turn.cut for turn in turns),
            cut_reasoning=sum(turn.cut_reasoning for turn in turns),
            empty_block=sum(turn.empty_block for turn in turns),
            unopened=sum(turn.unopened for turn in turns),
            left_out=left_out,
            unread=unread,
        )

    def _pretokenized(self, conversation: Conversation) -> Sample:
        ids, mask = conversation.input_ids, conversation.loss_mask
        if self.train_on == "last_turn" and mask.any():  # the last run of trained tokens
            end = int(np.flatnonzero(mask)[-1])
            before = np.flatnonzero(~mask[:end])
            mask = mask & (np.arange(len(mask)) > (before[-1] if len(before) else -1))
        return Sample(ids, mask, conversation.key)

    def _samples(
        self, texts: list[tuple[str, list[Span]]], key: int
    ) -> tuple[list[Sample], int, int]:  # the samples; how many turns are `apart` and `joined`
        """A sample of each text, and one of each turn whose prompt has other tokens where it is served."""
        if not texts:
            return [], 0, 0
        whole, (ids, offsets) = texts[-1][0], self._tokens(texts[-1][0])
        # Added tokens are found before anything else, so what is before one does not depend on what follows, and the many
        # turns of a conversation need not be tokenised from its beginning.
        cuts = self._cuts(whole, ids, offsets) if len(texts) > 1 else np.zeros(0, np.int64)
        samples, apart, joined = [], 0, 0
        for text, spans in texts:
            all_ids, all_offsets = ids, offsets
            if text is not whole:
                before = cuts[offsets[cuts, 0] + self._longest_added <= _common_length(text, whole)]
                first = int(before[-1]) if len(before) else 0
                at = int(offsets[first, 0]) if first else 0
                more, more_offsets = self._tokens(text[at:])
                all_ids = np.concatenate([ids[:first], more])
                all_offsets = np.concatenate([offsets[:first], more_offsets + at])
            kept = []
            found = np.flatnonzero(self._firm[all_ids])
            for span in spans:
                first, at = self._cut_before(text, all_ids, all_offsets, found, span[0])
                prompt = self._prompt_tokens(text[at : span[0]])
                if _begins_with(all_ids[first:], all_offsets[first:], prompt, span[0]):
                    kept.append(span)
                elif (said := self._apart(text, at, prompt, span)) is None:
                    joined += 1
                    kept.append(span)
                else:
                    apart += 1
                    served = np.concatenate([all_ids[:first], np.array(prompt + said, dtype=np.int32)])
                    samples.append(Sample(served, np.arange(len(served)) >= len(served) - len(said), key))
            if kept:
                samples.append(Sample(all_ids, self._mask(text, all_ids, all_offsets, kept), key))
        return samples, apart, joined

    def _cut_before(
        self,
        text: str,
        ids: np.ndarray,  # [L]
        offsets: np.ndarray,  # [L, 2]
        found: np.ndarray,  # those of the tokens that are `_firm`
        end: int,
    ) -> tuple[int, int]:
        """The last token before a place that is found wherever it stands, and where that is; 0, 0 without one."""
        for i in reversed(found[: np.searchsorted(offsets[found, 0], end)].tolist()):
            begin, content = int(offsets[i, 0]), self._added[int(ids[i])].content
            if begin + len(content) <= end and text.startswith(content, begin):
                return i, begin
        return 0, 0

    def _prompt_tokens(self, text: str) -> list[int]:
        """Tokens of a prompt's end, which is mostly one of a few headers."""
        if (tokens := self._prompts.get(text)) is None:
            tokens = self.backend.encode(text, add_special_tokens=False).ids
            if len(text) <= HEADER and len(self._prompts) < HEADERS_KEPT:
                self._prompts[text] = tokens
        return tokens

    def _apart(self, text: str, at: int, prompt: list[int], span: Span) -> list[int] | None:
        """The tokens of a turn that goes on behind its prompt's, which begin at `at`. None if both together are read as
        another text than the tokens of the whole, and than the prompt and the turn's characters."""
        begin, end = span
        said = self._continuing.encode(text[begin:end], add_special_tokens=False).ids
        whole = self.backend.encode(text[at:end], add_special_tokens=False).ids
        together, before, otherwise = (
            self.backend.decode(tokens, skip_special_tokens=False) for tokens in (prompt + said, prompt, whole)
        )
        return said if said and together in (otherwise, before + text[begin:end]) else None

    def _tokens(self, text: str) -> tuple[np.ndarray, np.ndarray]:  # [L] int32, [L, 2] begin and end of each
        encoding = self.backend.encode(text, add_special_tokens=False)
        pairs = itertools.chain.from_iterable(encoding.offsets)  # np.array of the pairs takes twice as long
        offsets = np.fromiter(pairs, np.int64, 2 * len(encoding)).reshape(-1, 2)
        return np.array(encoding.ids, dtype=np.int32), offsets

    def _mask(
        self,
        text: str,
        ids: np.ndarray,  # [L]
        offsets: np.ndarray,  # [L, 2]
        spans: list[Span],  # ascending, disjoint
    ) -> np.ndarray:  # [L] bool
        start, end = offsets.T
        mask = np.zeros(len(start), dtype=bool)
        for a, b in spans:  # a token across a span's edge is partly given, so not the model's to predict
            mask |= (start >= a) & (end <= b) & (end > start)
            # An added token with rstrip covers white space after it, here what the template sets after the turn's end.
            for i in np.flatnonzero((start >= a) & (start < b) & (end > b)):
                token = self._added.get(int(ids[i]))
                mask[i] |= token is not None and text.find(token.content, start[i]) + len(token.content) == b
        return mask

    def _cuts(self, text: str, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Tokens that are found wherever they stand, and stand where their offsets begin."""
        found = np.flatnonzero(self._firm[ids])
        return found[[text.startswith(self._added[int(ids[i])].content, offsets[i, 0]) for i in found]]

    def _turns_of(self, conversation: Conversation) -> tuple[list[Turn], list[tuple[str, str]], list[tuple[str, str]]]:
        where, tools = conversation.where, conversation.tools
        given = self._served_parts(conversation) if conversation.parts else conversation.messages
        stuck: list[_Stuck] = []
        for whole in (True, False):
            for messages in spellings(given):
                try:
                    return self._place(where, messages, tools, whole)
                except _Stuck as error:
                    stuck.append(error)
        # The true reason is that of the attempt that came further, or else of one that the template rendered.
        furthest = max(stuck, key=lambda error: (error.message, isinstance(error.__cause__, Unproven)))
        raise BadLine(where, f"up to message {furthest.message}: {furthest.reason}") from furthest.__cause__

    def _place(
        self,
        where: str,
        messages: list[dict],
        tools: list[dict] | None,
        whole: bool,  # all turns must be proven; else only one, and the others are left out
    ) -> tuple[list[Turn], list[tuple[str, str]], list[tuple[str, str]]]:
        """The trained turns, where and why others are not, and what is in no prompt. _Stuck: a turn whose place cannot be
        proven."""
        ends = [k + 1 for k, message in enumerate(messages) if message["role"] == "assistant"]
        if self.train_on == "last_turn":
            ends = ends[-1:]
        placing, turns, left_out, unproven = self._placing(tools), {}, [], []  # turns by their ends
        at_hand = long_renderings(placing.template, messages, tools, ends)
        for end in ends:
            weight = messages[end - 1].get("weight", 1)
            if weight not in (0, 1):
                raise BadLine(where, f"message {end}: weight must be 0 or 1, got {weight!r}")
            if weight == 0:
                left_out.append((f"{where}, message {end}", "their weight is 0"))
                continue
            try:
                turns[end] = placing.turn(messages[:end], tools, *at_hand.get(end, ()))
            except LeftOut as error:
                left_out.append((f"{where}, message {end}", str(error)))
            except Unproven as error:
                if whole:
                    raise _Stuck(end, str(error)) from error
                unproven.append((f"{where}, message {end}", str(error)))
            except Refused as error:
                raise _Stuck(end, str(error)) from error
        if unproven and not turns:
            raise _Stuck(0, unproven[0][1])
        unread = unrendered(placing.template, messages, tools, turns)
        unread = [(f"{where}, message {i + 1}" if i >= 0 else where, kind) for i, kind in unread]
        return list(turns.values()), left_out + unproven, unread

    def _served_parts(self, conversation: Conversation) -> list[dict]:
        """The messages with contents of several text parts as the template renders them, or as vLLM joins them for it.

        BadLine where no text is rendered so: a part in the middle that the template trims. Also where an answer stands in a
        later prompt otherwise than the model wrote it.
        """
        template, messages = self._placing(conversation.tools).template, list(conversation.messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        for i, texts in conversation.parts.items():
            if i >= len(messages) or messages[i]["content"] != together(texts, role := messages[i]["role"]):
                continue  # another message than when it was read
            number = f"message {i + 1}"
            between = None if role in ("tool", "function") else template.between_parts  # vLLM joins a tool's always
            if role == "assistant":
                if any(texts) and i < answers[-1] and ("\n" if between is None else between):
                    raise BadLine(
                        conversation.where,
                        f"{number}: the text parts of an answer would have white space between them in later prompts, "
                        "which the model did not write; give the answer as one text",
                    )
                continue
            if between is None:
                continue
            forms = [between.join(texts), between.join(map(str.strip, texts)), "\n".join(texts)]
            asked = [{**messages[i], "content": [{"type": "text", "text": text} for text in texts]}]
            asked += [{**messages[i], "content": form} for form in forms]
            others = [{"role": "user", "content": "q"}] if role != "user" else []  # which a template may ask for
            shown = [_rendered(template, [message, *others], conversation.tools) for message in asked]
            if shown[0] is None or shown[0] not in shown[1:]:
                raise BadLine(
                    conversation.where, f"{number}: its text parts are rendered as no text is; give it as one text"
                )
            messages[i] = asked[shown.index(shown[0], 1)]
        return messages

    def _placing(self, tools: list[dict] | None) -> Turns:
        if (turns := self._turns.get(tools is not None)) is None:
            template = self.templates[tools is not None]
            if template is None:
                raise ValueError(
                    f"the tokenizer {self.name} has no chat template to use for conversations; "
                    f"set data.chat_template to {self._beside or 'a Jinja file'}, or give pre-tokenised input_ids and "
                    "loss_mask"
                )
            if self.backend is None:
                raise ValueError(
                    f"{self.name} is a slow tokenizer: it gives no character offsets, which the loss mask "
                    f"needs; use the fast one (a tokenizer.json), or give pre-tokenised input_ids and loss_mask"
                )
            turns = self._turns[tools is not None] = Turns(ChatTemplate(template, self.kwargs, self.backend, self.stops))
        return turns

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _firm(self) -> np.ndarray:  # [V] bool, of all tokens: whether one is found wherever it stands
        firm = np.zeros(max([self.backend.get_vocab_size(), *(i + 1 for i in self._added)]), dtype=bool)
        firm[[i for i, t in self._added.items() if not (t.normalized or t.lstrip or t.single_word)]] = True
        return firm

    @cached_property
    def _continuing(self) -> Tokenizer:
        """The tokenizer for a text that goes on: SentencePiece's and others put a space before a text that begins."""
        parts = json.loads(self.backend.to_str())
        for name in ("normalizer", "pre_tokenizer"):
            part = parts[name] or {}
            steps = part.get("normalizers") or part.get("pretokenizers") or [part]
            for step in steps:
                step.update(
                    {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}.get(
                        step.get("type"), {}
                    )
                )
                if step.get("type") == "Prepend":
                    step["prepend"] = ""
        return Tokenizer.from_str(json.dumps(parts))

    @cached_property
    def _longest_added(self) -> int:
        return max((len(token.content) for token in self._added.values()), default=0)


class _Stuck(Exception):
    def __init__(self, message: int, reason: str) -> None:
        super().__init__(message, reason)
        self.message, self.reason = message, reason


def _rendered(template: ChatTemplate, messages: list[dict], tools: list[dict] | None) -> str | None:
    try:
        return template.render(messages, tools, add_generation_prompt=True)
    except Refused:
        return None


def _texts(turns: list[Turn]) -> list[tuple[str, list[Span]]]:
    """The texts to train on with their trained spans: the last turn's alone if it holds all others as they were."""
    if not turns:
        return []
    whole = turns[-1].text
    if all(whole.startswith(turn.text[: turn.span[1]]) for turn in turns):
        return [(whole, [turn.span for turn in turns])]
    return [(turn.text, [turn.span]) for turn in turns]


def _begins_with(ids: np.ndarray, offsets: np.ndarray, prompt: list[int], end: int) -> bool:  # [L], [L, 2]
    """Whether tokens begin with those of a prompt, and no token lies across the place where its text ends."""
    n = len(prompt)
    if ids[:n].tolist() != prompt or (n and offsets[n - 1, 1] > end):
        return False
    return n == len(ids) or offsets[n, 0] >= end


def _common_length(a: str, b: str) -> int:
    """Length of the common beginning, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _plain(backend: Tokenizer) -> Tokenizer:
    """A copy without its post-processor, which adds special tokens and may trim the offsets."""
    backend = copy.deepcopy(backend)
    backend.post_processor = None
    backend.no_truncation()
    backend.no_padding()
    return backend
