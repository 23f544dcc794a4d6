"""One conversation on its way to being answered anew, turn by turn, whoever answers.

What the user, the system and the tools said is kept; each assistant turn is answered again, and the answer stands in the
context of the next. A conversation that ends with a user's or a tool's turn gets its answer too. Three cases need a rule:

- A tool's turn answers calls. It is kept while the new answer calls the same functions in the same order (arguments may
  differ; the tool's turn then names the new calls' ids). If not, the conversation ends with the new answer, and says so.
- A new answer that calls a tool where the conversation goes on without a tool's turn ends it in the same way.
- An assistant turn before the first user's answers nothing; it is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdraft.data.conversations import BadLine, Conversation, Line, parse, with_textual_arguments

TOOL_ROLES = ("tool", "function")
ASKING_ROLES = ("user", *TOOL_ROLES)
ANSWER_KEYS = ("content", "reasoning_content", "reasoning", "tool_calls")  # what is kept of an answer


@dataclass
class Dialogue:
    index: int  # of the line, over all files
    conversation: Conversation
    messages: list[dict] = field(default_factory=list)  # so far: given turns and new answers
    finish_reasons: list[str] = field(default_factory=list)  # one for each answer
    completion_tokens: int = 0
    stopped: str | None = None  # why turns that were given are missing
    _place: int = 0  # in the given messages

    @property
    def id(self) -> str:
        """Content hash and index."""
        return f"{self.conversation.key:016x}-{self.index}"

    @property
    def tools(self) -> list[dict] | None:
        return self.conversation.tools

    def wants_answer(self) -> bool:
        """Takes over given turns up to the next that needs an answer. False: there is none, `row` is complete."""
        given = self.conversation.messages
        while self.stopped is None and self._place < len(given):
            turn = given[self._place]
            if turn["role"] == "assistant":
                if any(m["role"] in ASKING_ROLES for m in self.messages):
                    return True
            else:
                self.messages.append(turn)
            self._place += 1
        return self.stopped is None and bool(self.messages) and self.messages[-1]["role"] in ASKING_ROLES

    def take(
        self,
        message: dict[str, Any],  # of answer_message
        finish_reason: str,
        completion_tokens: int,
    ) -> None:
        """The answer to what was said so far."""
        self.messages.append(message)
        self.finish_reasons.append(finish_reason)
        self.completion_tokens += completion_tokens
        given = self.conversation.messages
        if self._place < len(given):
            original, follow = given[self._place], list(given[self._place + 1 :])
            if "weight" in original:  # a turn that is not to be trained on stays one
                self.messages[-1] = message | {"weight": original["weight"]}
            self._place += 1
            self.stopped = _why_stop(original, message, follow)
            if self.stopped is None and follow and follow[0]["role"] in TOOL_ROLES:
                tool_turns = _pointed_at(message["tool_calls"], original.get("tool_calls", []), _leading_tools(follow))
                self.messages += tool_turns
                self._place += len(tool_turns)

    def row(self) -> dict[str, Any]:
        """The line of the output."""
        row: dict[str, Any] = {"id": self.id, "messages": self.messages}
        if self.tools:
            row["tools"] = self.tools
        row |= {
            "finish_reasons": self.finish_reasons,
            "length_cut": "length" in self.finish_reasons,
            "completion_tokens": self.completion_tokens,
        }
        return row if self.stopped is None else row | {"stopped": self.stopped}


def answer_message(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer's message as it is kept. ValueError if it is none that training could read."""
    message = {"role": "assistant"} | {k: answer[k] for k in ANSWER_KEYS if answer.get(k) not in (None, [])}
    message.setdefault("content", "")
    try:
        parse(Line("the answer", {"messages": [message]}))
    except BadLine as error:
        raise ValueError(error.reason) from error
    return message


def for_request(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> dict[str, Any]:
    """Messages and tools as OpenAI's API has them: keys of our own data left out, a call's arguments as JSON text."""
    keys = ("role", "name", "tool_call_id", *ANSWER_KEYS)
    said = [with_textual_arguments({k: message[k] for k in keys if k in message}) for message in messages]
    return {"messages": said, "tools": tools} if tools else {"messages": said}


def _why_stop(original: dict, message: dict, follow: list[dict]) -> str | None:
    calls, before = (_names(m) for m in (message, original))
    if not follow:
        return None
    if follow[0]["role"] in TOOL_ROLES:
        # data that has its calls in the text of the turn shows their number only
        fits = calls == before if before else len(calls) == len(_leading_tools(follow))
        if calls and fits:
            return None
        now = f"calls {', '.join(calls)}" if calls else "calls no tool"
        return f"a tool's turn follows that answered {', '.join(before) or 'a call'}, the new answer {now}"
    return f"the new answer calls {', '.join(calls)}, and no tool's turn follows" if calls else None


def _names(message: dict) -> list[str]:
    return [call.get("function", call)["name"] for call in message.get("tool_calls", [])]


def _leading_tools(follow: list[dict]) -> list[dict]:
    return follow[: next((i for i, m in enumerate(follow) if m["role"] not in TOOL_ROLES), len(follow))]


def _pointed_at(calls: list[dict], before: list[dict], tool_turns: list[dict]) -> list[dict]:
    """Tool turns that name the new calls' ids in place of those of the calls they were made for."""
    places = {call["id"]: i for i, call in enumerate(before) if "id" in call}
    pointed = []
    for order, turn in enumerate(tool_turns):
        place = places.get(turn.get("tool_call_id"), order)
        new = calls[place].get("id") if place < len(calls) else None
        pointed.append(turn if new is None else turn | {"tool_call_id": new})
    return pointed
