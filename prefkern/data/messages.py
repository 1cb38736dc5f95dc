"""Cells of a row to text or messages, and what is wrong with a message.

A conversation is a list of messages `{'role': ..., 'content': ...}`. Three other spellings are
read: one message alone; ShareGPT's `{'from': 'human', 'value': ...}`; and a conversation written as
text, in JSON or as Python prints it, which CSV files and pandas leave behind. The last is read only
if every row of the column is one, since a text may well begin with a bracket.

ShareGPT's calls of tools become `tool_calls`:

    {'from': 'function_call', 'value': '{"name": "rate", "arguments": {"film": "Alien"}}'}
    {'from': 'observation', 'value': '9 of ten'}        # role 'tool'
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

# How a conversation as text begins, surely or perhaps, and what it has somewhere.
_SURELY = re.compile(r"""\s*(array\(\s*)?\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_PERHAPS = re.compile(r"""\s*(array\(\s*)?["']?[\[{]""")
_NAMED = re.compile(r"""['"](role|from)\\?['"]\s*:""")
_WRAPPERS = {"messages", "conversations", "conversation"}
_SPEAKER = re.compile(r"""['"](role|from)['"]\s*:\s*['"]""")
# ShareGPT's name of a call of tools, whose value is JSON; LLaMA-Factory's too.
_CALL = "function_call"
# ShareGPT's names of roles.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", _CALL), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
# Gemma's templates render both of these as the model.
ASSISTANT = ("assistant", "model")
# Those who answer, under any name.
ANSWERS = (*ASSISTANT, *(name for name, role in _ROLES.items() if role == "assistant"))
_THINKING = re.compile(r"\s*(<think>.*?</think>)?(.*)\Z", re.DOTALL)
# Keys of a message, in chat templates, that hold what an assistant says outside of its content.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def read_cell(column: str, value: Any, is_written: bool) -> Any:
    """The text or the messages of a cell; anything else as it is.

    Args:
        column: the column's name in errors.
        value: the cell.
        is_written: whether every row of the column is a conversation as text.

    Raises ValueError for a conversation as text that cannot be read, or stands among other texts.
    """
    if isinstance(value, str):
        messages = _messages_in(column, value) if may_be_written(value) else None
        if messages is None:
            return value
        if not is_written:
            raise ValueError(
                f"{column!r} is a conversation as text, {short(value)}, and other rows of the "
                "column are not; make every row a list of messages, or every row text"
            )
        value = messages
    if isinstance(value, dict) and ("role" in value or "from" in value):
        value = [value]
    if isinstance(value, list):
        value = [_with_role(column, message) for message in value]
    return value


def may_be_written(text: str) -> bool:
    """Whether a text may be a conversation: it has brackets around it, and names a role."""
    return bool(_PERHAPS.match(text) and _NAMED.search(text))


def check_message(column: str, message: Any, kinds: tuple[str, ...] = ("text",)) -> None:
    """Raise ValueError for a message that a chat template would silently render wrong.

    `kinds` are the kinds of blocks that its content may have.
    """
    is_mapping = isinstance(message, dict)
    if not is_mapping:
        raise ValueError(
            f"{column!r} must be text or a list of messages {{'role': ..., 'content': ...}}, but "
            f"one of its messages is {short(message)}"
        )
    role = message.get("role")
    if role is None:
        raise ValueError(
            f"a message has no 'role', only {', '.join(map(repr, message))}; a message must be "
            "{'role': ..., 'content': ...}"
        )
    is_name = isinstance(role, str)
    if not is_name:
        raise ValueError(f"the 'role' of a message in {column!r} must be text, got {role!r}")
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise ValueError(
                f"a message of role {role!r} in {column!r} has neither 'content' nor 'tool_calls': "
                f"{short(present(message))}; a message must be {{'role': ..., 'content': ...}}"
            )
        return
    is_text_or_blocks = isinstance(content, str | list)
    if not is_text_or_blocks:
        raise ValueError(
            f"the 'content' of a message of role {role!r} in {column!r} must be text or a list of "
            f"blocks of text, got {short(content)}"
        )
    if isinstance(content, str):
        return
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        if kind not in kinds:
            hint = "; the pictures themselves belong into a column 'images'"
            raise ValueError(
                f"a message of role {role!r} has content of type {kind!r}, but only "
                f"{' and '.join(kinds)} is read here{hint if kind == 'image' else ''}"
            )


def check_response(column: str, messages: list[dict[str, Any]]) -> None:
    """Raise ValueError for a response that is not the assistant's: all of it would be scored.

    One without messages says nothing. Its pair is dropped later, and counted.
    """
    if not messages:
        return
    for place, message in (("begins", messages[0]), ("ends", messages[-1])):
        role = message["role"]
        if role not in ASSISTANT:
            raise ValueError(
                f"the response in {column!r} {place} with a message of role {role!r}, which would "
                "be scored as an answer; expected role 'assistant' at its beginning and end"
            )


def has_other_turns(messages: list[dict[str, Any]]) -> bool:
    """Whether a response has turns that are not the assistant's."""
    return any(message["role"] not in ASSISTANT for message in messages)


def says_something(message: dict[str, Any]) -> bool:
    """Whether a message has more than its role to render."""
    # Templates strip white space from the content.
    return bool(content_of(message).strip()) or any(
        message.get(key) for key in ("tool_calls", *THOUGHTS)
    )


def content_of(message: dict[str, Any]) -> str:
    """The content of a message as text; blocks end to end."""
    content = message.get("content")
    if isinstance(content, list):
        return "".join(block.get("text") or "" for block in content)
    return content or ""


def present(value: Any) -> Any:
    """The value without None in mappings: Arrow adds to each mapping the keys of all its column."""
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [present(item) for item in value]
    return value


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _messages_in(column: str, text: str) -> list[Any] | None:
    """The messages that a text holds; None if it holds other data, or is only a text."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        value = _unwrapped(value)
        messages = [value] if isinstance(value, dict) else value
        is_conversation = (
            isinstance(messages, list) and bool(messages) and all(map(_is_message, messages))
        )
        return messages if is_conversation else None
    # With prose after the bracket it is a text about a conversation.
    if _SURELY.match(text) and _SPEAKER.search(text) and text.rstrip().endswith(("]", "}", ")")):
        raise ValueError(
            f"{column!r} looks like a conversation as text, but is neither JSON nor a Python list: "
            f"{short(text)}; make it a list of messages {{'role': ..., 'content': ...}}"
        )
    return None


def _unwrapped(value: Any) -> Any:
    """Out of what stands around a conversation: JSON in JSON, a list, `{"messages": ...}`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    if isinstance(value, dict) and len(value) == 1 and value.keys() <= _WRAPPERS:
        (value,) = value.values()
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    return value


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return ("role" in value and bool({"content", "tool_calls"} & value.keys())) or (
        {"from", "value"} <= value.keys()
    )


def _with_role(column: str, message: Any) -> Any:
    """A message of ShareGPT's format in the usual one; any other as it is."""
    # Arrow gives every message the keys of all, with None.
    if not isinstance(message, dict) or message.get("role") is not None:
        return message
    speaker = message.get("from")
    if speaker is None or message.get("value") is None:
        return message
    if speaker not in _ROLES:
        raise ValueError(
            f"a message in {column!r} is from {speaker!r}; known are {', '.join(_ROLES)}: make it "
            "{'role': ..., 'content': ...}"
        )
    rest = {key: item for key, item in message.items() if key not in ("from", "value", "role")}
    said = {"content": message["value"]}
    if speaker == _CALL:
        said = _calls(column, message["value"])
    return {**rest, "role": _ROLES[speaker], **said}


def _calls(column: str, value: Any) -> dict[str, Any]:
    """Content and `tool_calls` of a message that calls tools: a call in JSON, or a list of them.

    Thoughts may stand before it.
    """
    try:
        thoughts, text = _THINKING.match(value).groups()  # pyright: ignore[reportOptionalMemberAccess]
        found = json.loads(text)
        calls = [
            {"type": "function", "function": {"name": each["name"], "arguments": each["arguments"]}}
            for each in (found if isinstance(found, list) else [found])
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"a message in {column!r} is from {_CALL!r}, and its value is not a call in JSON, such as "
            f'{{"name": "rate", "arguments": {{"film": "Alien"}}}}, nor a list of calls: {short(value)}'
        ) from error
    return {"content": thoughts or "", "tool_calls": calls}
