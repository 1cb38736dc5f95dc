"""Turns a row's text into token ids, for each of TRL's formats.

The prompt alone and prompt + response are both tokenised whole. The response starts where the two
differ, as in TRL, so no artificial token boundary appears. A text response gets an end-of-sequence
token if it has none. Text that already begins with the tokenizer's first token gets no second one.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from jinja2 import TemplateError

# Keys of a message, in chat templates, that hold what an assistant says outside of its content.
_SAID_OTHERWISE = ("tool_calls", "reasoning_content", "reasoning", "thinking")


class TokenizedPair(NamedTuple):
    """Token ids of a row, and what the report should know about them."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    empty: bool = False  # a response has no content, whatever tokens a template adds
    merged: bool = False  # the last token of the prompt merged with a response
    repeated: bool = False  # both responses, as text, begin with the whole prompt
    begun: bool = False  # the text already has the token that the tokenizer puts in front


def tokenize_pair(example: dict[str, Any], tokenizer: Any) -> TokenizedPair:
    """Token ids of prompt, chosen and rejected.

    Raises ValueError for a row that has none of the formats.
    """
    prompt: Any = example.get("prompt")
    chosen: Any = example.get("chosen")
    rejected: Any = example.get("rejected")
    for key, value in (("chosen", chosen), ("rejected", rejected)):
        if not (isinstance(value, str) or _are_messages(value)):
            raise ValueError(f"{key!r} must be text or a list of messages, got {value!r}")
    is_conversation = isinstance(chosen, list)
    if isinstance(rejected, list) != is_conversation:
        raise ValueError("one of 'chosen' and 'rejected' is text and the other a conversation")
    _check_prompt(example)
    for key, value in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if isinstance(value, list):
            for message in value:
                check_message(key, message)
    if prompt is None:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    elif is_conversation and isinstance(prompt, str):
        prompt, chosen, rejected = _text_prompt(prompt, chosen, rejected)
    elif isinstance(prompt, list) != is_conversation:
        raise ValueError("'prompt' is a conversation, and 'chosen' and 'rejected' are text")
    elif is_conversation:
        chosen, rejected = _without_prompt(prompt, chosen, rejected)

    if is_conversation:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the dataset is conversational and the tokenizer has no chat template")
        options = _template_options(example)
        prompt_ids = _render(tokenizer, prompt, options, add_generation_prompt=True)
        sequences = [_render(tokenizer, prompt + rest, options) for rest in (chosen, rejected)]
        # A template adds tokens even to an empty message, so lengths do not show an empty response.
        is_empty = not all(any(map(_says_something, rest)) for rest in (chosen, rejected))
        is_repeated = is_begun = False
    else:
        texts = (prompt, prompt + chosen, prompt + rejected)
        (prompt_ids, *sequences), is_begun = _text_ids(tokenizer, texts)
        eos = tokenizer.eos_token_id
        sequences = [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in sequences]
        is_empty = "" in (chosen, rejected)
        is_repeated = all(_begins_with(prompt, text) for text in (chosen, rejected))
    start = min(_common_length(prompt_ids, ids) for ids in sequences)
    chosen_ids, rejected_ids = (ids[start:] for ids in sequences)
    return TokenizedPair(
        prompt_ids[:start],
        chosen_ids,
        rejected_ids,
        is_empty,
        merged=start < len(prompt_ids),
        repeated=is_repeated,
        begun=is_begun,
    )


def extract_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The common beginning of two texts, or of two conversations, and the rest of each.

    The last message of a conversation always stays a response.
    """
    limit = min(len(chosen), len(rejected))
    if not isinstance(chosen, str):
        limit -= 1
    length = 0
    while length < limit and chosen[length] == rejected[length]:
        length += 1
    # In most vocabularies a space belongs to the token after it.
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _text_prompt(prompt: str, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and responses of a row with a text `prompt` and conversations as responses."""
    common, chosen, rejected = extract_prompt(chosen, rejected)
    if not prompt:
        return common, chosen, rejected
    if common:
        # Some conversational datasets repeat the text of the first question in `prompt`.
        asked = [m.get("content") for m in common if m.get("role") == "user"]
        if prompt.strip() not in (text.strip() for text in asked if isinstance(text, str)):
            raise ValueError(
                f"'prompt' is {prompt[:60]!r}, but no user message at the common beginning of "
                "'chosen' and 'rejected' has that text; correct 'prompt', or leave it out"
            )
        return common, chosen, rejected
    if any(messages[0].get("role") == "user" for messages in (chosen, rejected)):
        raise ValueError("'chosen' and 'rejected' begin with different questions")
    return [{"role": "user", "content": prompt}], chosen, rejected


def _without_prompt(prompt: list[Any], chosen: list[Any], rejected: list[Any]) -> tuple[Any, Any]:
    """Two conversations without the prompt, if both begin with it."""
    if not prompt:
        return chosen, rejected
    # Arrow fills the messages of each column with different keys, so compare without None.
    asked = _present(prompt)
    repeats = [_present(each[: len(prompt)]) == asked for each in (chosen, rejected)]
    if repeats[0] != repeats[1]:
        whole, other = ("'chosen'", "'rejected'") if repeats[0] else ("'rejected'", "'chosen'")
        raise ValueError(
            f"{whole} begins with the messages of 'prompt', but {other} does not; expected both to "
            "be the response alone, or both the whole conversation"
        )
    return (chosen[len(prompt) :], rejected[len(prompt) :]) if all(repeats) else (chosen, rejected)


def _begins_with(prompt: str, text: str) -> bool:
    """Whether a text begins with the prompt, and the prompt does not end inside a word there."""
    rest = text[len(prompt) :]
    is_cut = prompt[-1:].isalnum() and rest[:1].isalnum()
    return bool(prompt.strip()) and text.startswith(prompt) and not is_cut


def _check_prompt(example: dict[str, Any]) -> None:
    if "prompt" not in example:
        return
    prompt = example["prompt"]
    if not (prompt is None or isinstance(prompt, str | list)):
        raise ValueError(f"'prompt' must be text or a list of messages, got {prompt!r}")
    if prompt is None:
        # Otherwise the common beginning of the responses would become the prompt.
        raise ValueError(
            "'prompt' must be text or a list of messages, got None; leave the column out if the "
            "responses begin with their prompts, and note that a reader of tables may have taken "
            "an empty cell, 'NA' or 'null' for None"
        )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def check_message(column: str, message: Any) -> None:
    """Raise ValueError for a message that a chat template would silently render wrong."""
    is_mapping = isinstance(message, dict)
    if not is_mapping:
        raise ValueError(
            f"{column!r} must be text or a list of messages {{'role': ..., 'content': ...}}, but "
            f"one of its messages is {_short(message)}"
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
                f"{_short(_present(message))}; a message must be {{'role': ..., 'content': ...}}"
            )
        return
    is_text_or_blocks = isinstance(content, str | list)
    if not is_text_or_blocks:
        raise ValueError(
            f"the 'content' of a message of role {role!r} in {column!r} must be text or a list of "
            f"blocks of text, got {_short(content)}"
        )
    if isinstance(content, str):
        return
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        if kind != "text":
            raise ValueError(
                f"a message of role {role!r} has content of type {kind!r}, but only text is "
                "supported yet"
            )


def _says_something(message: dict[str, Any]) -> bool:
    """Whether a message has more than its role to render."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(block.get("text") or "" for block in content)
    # Templates strip white space from the content.
    return bool(content and content.strip()) or any(message.get(key) for key in _SAID_OTHERWISE)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _template_options(example: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that the chat template gets: `tools` and `chat_template_kwargs`."""
    tools, kwargs = example.get("tools"), example.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is text but not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(
            f"'tools' must be a list of schemas, or such a list as JSON, got {tools!r}"
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"'chat_template_kwargs' must be a mapping, got {kwargs!r}")
    # Llama's template announces tools even for an empty list, hence `or None`.
    return {"tools": _present(tools) or None, **_present(kwargs or {})}


def _render(
    tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any], **kwargs: Any
) -> list[int]:
    """Token ids of messages under the tokenizer's chat template."""
    messages = _present(messages)
    options = {**options, **kwargs}
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, **options
        )
        _check_blocks(tokenizer, messages, options)
    except (TemplateError, TypeError) as error:
        # Templates raise, for example, for roles or an order of turns that they do not support.
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return rendered["input_ids"]


def _check_blocks(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Raise ValueError if a template expects text but printed the repr of a list of blocks."""
    blocks = [
        message["content"] for message in messages if isinstance(message.get("content"), list)
    ]
    if not blocks:
        return
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    for content in blocks:
        if str(content) in text:
            raise ValueError(
                "the chat template expects text as content and would print the list of blocks "
                f"itself: {str(content)[:60]}"
            )


def _present(value: Any) -> Any:
    """The value without None in mappings: Arrow adds to each mapping the keys of all its column."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_present(item) for item in value]
    return value


def _text_ids(tokenizer: Any, texts: tuple[str, ...]) -> tuple[list[list[int]], bool]:
    """Token ids of texts, and whether one already has the token that the tokenizer puts in front.

    Text from a chat template often has it. A model was trained with one such token, never two.
    """
    ids = [tokenizer(text)["input_ids"] for text in texts]
    bos = getattr(tokenizer, "bos_token_id", None)
    doubled = [bos is not None and each[:2] == [bos, bos] for each in ids]
    # If the tokenizer adds none, both tokens are in the text itself and stay.
    if not any(doubled) or tokenizer("")["input_ids"][:1] != [bos]:
        return ids, False
    return [each[is_double:] for each, is_double in zip(ids, doubled, strict=True)], True


def _common_length(first: list[int], second: list[int]) -> int:
    limit = min(len(first), len(second))
    # The usual case: one comparison is far quicker than a loop over tokens.
    if first[:limit] == second[:limit]:
        return limit
    return next(i for i in range(limit) if first[i] != second[i])
