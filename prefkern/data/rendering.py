"""Conversations through the tokenizer's chat template, and what the template leaves out.

A template is free to ignore what it does not know: tools, calls of tools, thoughts, a system
message. Then the row would be trained on as another row, so the texts are compared:

- The contents must stand in the rendered text, in order, white space aside. If not, the row is
  rendered again with a mark at both ends of each content: a template that escapes or moves a
  content shows both of its marks, one that leaves out a part of it does not.
- Rows with `tool_calls` or thoughts are rendered once more with a mark in each; rows with `tools`
  once more without them.

Arguments of a call may be a mapping or JSON in text; where a template would print that text as JSON
again, it gets the mapping.

What is missing is an error, with one exception. Many templates leave out thoughts of an assistant
before a later question, in training as in use, so there a missing text is only counted.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, NoReturn

from jinja2 import TemplateError

from prefkern.data.messages import ASSISTANT, THOUGHTS, content_of, present

_MARK = "zqxmark"
_THOUGHT = re.compile(r"\A\s*(<think>)?")
# Templates raise, for example, for roles or an order of turns that they do not support.
_REFUSALS = (TemplateError, TypeError)


class Rendering(NamedTuple):
    """A conversation under the chat template."""

    messages: list[dict[str, Any]]
    text: str
    ids: list[int]


def render(
    tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any], **kwargs: Any
) -> Rendering:
    """Text and token ids of messages under the tokenizer's chat template.

    Raises ValueError for messages that the template does not take.
    """
    messages, given = present(messages), {**options, **kwargs}
    try:
        text, refusal = _text(tokenizer, messages, given), None
    except _REFUSALS as error:
        text, refusal = "", error
    written = [json.dumps(each, ensure_ascii=False) for each in _written_arguments(messages)]
    if written and (refusal is not None or any(each in text for each in written)):
        read = _with_read_arguments(messages)
        again = text_or_none(tokenizer, read, given)
        if again is not None:
            messages, text, refusal = read, again, None
    if refusal is not None:
        raise ValueError(f"the chat template does not take these messages: {refusal}") from refusal
    _check_blocks(messages, text)
    # The template writes the special tokens itself.
    return Rendering(messages, text, tokenizer(text, add_special_tokens=False)["input_ids"])


def check_tools(tokenizer: Any, prompt: Rendering, options: dict[str, Any]) -> None:
    """Raise ValueError if the template leaves out the row's tools."""
    if not options.get("tools"):
        return
    without = {**options, "tools": None, "add_generation_prompt": True}
    if text_or_none(tokenizer, prompt.messages, without) == prompt.text:
        _refuse("'tools'")


def leaves_out(tokenizer: Any, rendering: Rendering, options: dict[str, Any]) -> bool:
    """Whether the template leaves out something of an assistant's turn before a later question.

    Raises ValueError if it leaves out anything else.
    """
    messages = rendering.messages
    asked = max((at for at, each in enumerate(messages) if each["role"] == "user"), default=-1)
    missing = [
        *_missing_contents(tokenizer, rendering, options),
        *_missing_fields(tokenizer, messages, options),
    ]
    for at, what in missing:
        role = messages[at]["role"]
        is_earlier = role in ASSISTANT and at < asked and what != "tool_calls"
        if not is_earlier:
            _refuse(f"{what!r} of a message of role {role!r}")
    return bool(missing)


def _missing_contents(
    tokenizer: Any, rendering: Rendering, options: dict[str, Any]
) -> list[tuple[int, str]]:
    """The messages whose content the text does not have, or has only in part."""
    messages = rendering.messages
    contents = [content_of(message) for message in messages]
    if _in_order(contents, rendering.text):
        return []
    marked = [_marked_content(at, message) for at, message in enumerate(messages)]
    text = text_or_none(tokenizer, marked, options)
    if text is None:
        return []
    return [
        (at, "content")
        for at, content in enumerate(contents)
        if content.strip() and not all(mark in text for mark in _ends(at))
    ]


def _in_order(contents: list[str], text: str) -> bool:
    """Whether a text has all contents one after another, white space aside."""
    text, found = _squeezed(text), 0
    for content in map(_squeezed, contents):
        place = text.find(content, found)
        if place < 0:
            return False
        found = place + len(content)
    return True


def _ends(at: int) -> tuple[str, str]:
    """The marks of a content's beginning and end."""
    return f"{_MARK}{at}b", f"{_MARK}{at}e"


def _marked_content(at: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message with a mark at the beginning of its content and one at the end."""
    begin, end = _ends(at)
    if not content_of(message).strip():
        return message
    content: Any = message["content"]
    if isinstance(content, list):
        blocks = [{"type": "text", "text": f" {mark} "} for mark in (begin, end)]
        return {**message, "content": [blocks[0], *content, blocks[1]]}
    # Templates that know thoughts in the content look for their tag, so it stays in front.
    marked = _THOUGHT.sub(lambda tag: f"{tag[0]}{begin} ", content, count=1)
    return {**message, "content": f"{marked} {end}"}


def _missing_fields(
    tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> list[tuple[int, str]]:
    """The messages whose calls of tools, or thoughts, change nothing in the text."""
    marked, marks = [], []
    for at, message in enumerate(messages):
        changed = dict(message)
        if message.get("tool_calls"):
            changed["tool_calls"], found = _marked_calls(message["tool_calls"], f"{_MARK}{at}c")
            marks += [(at, "tool_calls", (mark,)) for mark in found]
        thoughts = [key for key in THOUGHTS if isinstance(message.get(key), str) and message[key]]
        for key in thoughts:
            changed[key] = f"{message[key]} {_MARK}{at}{key}z"
        if thoughts:
            # Some rows have the same thoughts under several keys; a template reads one of them.
            marks.append((at, thoughts[0], tuple(f"{_MARK}{at}{key}z" for key in thoughts)))
        marked.append(changed)
    if not marks:
        return []
    text = text_or_none(tokenizer, marked, options)
    if text is None:
        return []
    return [(at, what) for at, what, names in marks if not any(name in text for name in names)]


def _marked_calls(calls: Any, mark: str) -> tuple[Any, list[str]]:
    """Calls of tools with marks in their names and arguments, and the marks."""
    if not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        return calls, []
    marked, marks = [], []
    for number, call in enumerate(calls):
        function = call.get("function", call)
        if not isinstance(function, dict):
            return calls, []
        name, value = f"{mark}{number}n", f"{mark}{number}a"
        changed = {**function, "name": f"{function.get('name', '')}{name}"}
        marks.append(name)
        arguments = _with_argument(function.get("arguments"), value)
        if arguments is not None:
            changed["arguments"] = arguments
            marks.append(value)
        marked.append({**call, "function": changed} if "function" in call else changed)
    return marked, marks


def _with_argument(arguments: Any, value: str) -> Any:
    """Arguments of a call, a mapping or JSON, with one more; None for others."""
    if isinstance(arguments, dict):
        return {**arguments, _MARK: value}
    try:
        read = json.loads(arguments)
    except (TypeError, ValueError):
        return None
    return json.dumps({**read, _MARK: value}) if isinstance(read, dict) else None


def _written_arguments(messages: list[dict[str, Any]]) -> list[str]:
    """The arguments of calls that are JSON in text, as OpenAI's API writes them."""
    return [
        call["function"]["arguments"]
        for message in messages
        for call in _calls_of(message)
        if _reads_arguments(call)
    ]


def _with_read_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with such arguments as mappings.

    Templates that print arguments as JSON would print JSON in JSON, and some take mappings alone.
    """

    def read(call: Any) -> Any:
        if not _reads_arguments(call):
            return call
        function = call["function"]
        return {**call, "function": {**function, "arguments": json.loads(function["arguments"])}}

    return [
        {**message, "tool_calls": [read(call) for call in _calls_of(message)]}
        if _calls_of(message)
        else message
        for message in messages
    ]


def _calls_of(message: dict[str, Any]) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _reads_arguments(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    arguments = function.get("arguments") if isinstance(function, dict) else None
    try:
        return isinstance(arguments, str) and isinstance(json.loads(arguments), dict)
    except ValueError:
        return False


def _check_blocks(messages: list[dict[str, Any]], text: str) -> None:
    """Raise ValueError if a template expects text but printed the repr of a list of blocks."""
    for message in messages:
        content = message.get("content")
        if isinstance(content, list) and str(content) in text:
            raise ValueError(
                "the chat template expects text as content and would print the list of blocks "
                f"itself: {str(content)[:60]}"
            )


def _text(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, **options)


def text_or_none(
    tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]
) -> str | None:
    """The text of changed messages; None if the template does not take them."""
    try:
        return _text(tokenizer, messages, options)
    except _REFUSALS:
        return None


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _refuse(what: str) -> NoReturn:
    raise ValueError(
        f"the chat template leaves out {what}, so the model would train on another conversation; "
        "remove it from the rows, or set a tokenizer.chat_template that renders it"
    )
