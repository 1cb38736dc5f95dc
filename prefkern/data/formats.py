"""A row's text to token ids, in each of TRL's formats.

Prompt and prompt + response are tokenised whole, and the response starts where the two diverge, as
in TRL: no token boundary is invented. An end-of-sequence token closes text responses that lack it,
and text that begins with the token that the tokenizer puts in front gets no second one.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from jinja2 import TemplateError

# What an assistant says beside its content, as templates call it.
_SAID_OTHERWISE = ("tool_calls", "reasoning_content", "reasoning", "thinking")


class TokenizedPair(NamedTuple):
    """Token ids of a row, and what is worth telling of how they came about."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    empty: bool = False  # a response that says nothing, whatever tokens it has
    merged: bool = False  # the prompt's end merged with a response
    repeated: bool = False  # both responses, as text, begin with the whole prompt
    begun: bool = False  # the text brought the token that the tokenizer puts in front


def tokenize_pair(example: dict[str, Any], tokenizer: Any) -> TokenizedPair:
    """Token ids of prompt, chosen and rejected.

    Raises ValueError for a row that is in none of the formats.
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
        # What a template makes of nothing is more than an end of sequence.
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

    Of a conversation, the last message stays a response.
    """
    limit = min(len(chosen), len(rejected))
    if not isinstance(chosen, str):
        limit -= 1
    length = 0
    while length < limit and chosen[length] == rejected[length]:
        length += 1
    # The space before a word belongs to the word, as in most vocabularies.
    if isinstance(chosen, str) and length and chosen[length - 1] == " ":
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _text_prompt(prompt: str, chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """Prompt and responses of conversations that carry the question as text."""
    common, chosen, rejected = extract_prompt(chosen, rejected)
    if not prompt:
        return common, chosen, rejected
    if common:
        # Some conversational datasets keep the first question's text in `prompt`, too.
        asked = [m.get("content") for m in common if m.get("role") == "user"]
        if prompt.strip() not in (text.strip() for text in asked if isinstance(text, str)):
            raise ValueError(
                f"'prompt' is {prompt[:60]!r}, and no message that 'chosen' and 'rejected' both "
                "begin with is a user's of that text; correct 'prompt', or leave it out"
            )
        return common, chosen, rejected
    if any(messages[0].get("role") == "user" for messages in (chosen, rejected)):
        raise ValueError("'chosen' and 'rejected' begin with different questions")
    return [{"role": "user", "content": prompt}], chosen, rejected


def _without_prompt(prompt: list[Any], chosen: list[Any], rejected: list[Any]) -> tuple[Any, Any]:
    """Two conversations without the prompt that they begin with, if both do."""
    if not prompt:
        return chosen, rejected
    # Arrow fills the messages of each column with other keys.
    asked = _present(prompt)
    repeats = [_present(each[: len(prompt)]) == asked for each in (chosen, rejected)]
    if repeats[0] != repeats[1]:
        whole, other = ("'chosen'", "'rejected'") if repeats[0] else ("'rejected'", "'chosen'")
        raise ValueError(
            f"{whole} begins with the messages of 'prompt', and {other} does not; expected both to "
            "be the response alone, or both the whole conversation"
        )
    return (chosen[len(prompt) :], rejected[len(prompt) :]) if all(repeats) else (chosen, rejected)


def _begins_with(prompt: str, text: str) -> bool:
    """Whether a text begins with the prompt, and not only with its letters."""
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
        # The beginning that the responses share would be taken for it.
        raise ValueError(
            "'prompt' must be text or a list of messages, got None; leave the column out if the "
            "responses begin with their prompts, and note that a reader of tables may have taken "
            "an empty cell, 'NA' or 'null' for None"
        )


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def check_message(column: str, message: Any) -> None:
    """Raise for messages that a chat template would render wrong without saying so."""
    is_mapping = isinstance(message, dict)
    if not is_mapping:
        raise ValueError(
            f"{column!r} must be text or a list of messages {{'role': ..., 'content': ...}}, and "
            f"one of its messages is {_short(message)}"
        )
    role = message.get("role")
    if role is None:
        raise ValueError(
            f"a message has no 'role', but {', '.join(map(repr, message))}; messages are "
            "{'role': ..., 'content': ...}"
        )
    is_name = isinstance(role, str)
    if not is_name:
        raise ValueError(f"the 'role' of a message in {column!r} must be text, got {role!r}")
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise ValueError(
                f"a message of role {role!r} in {column!r} has neither 'content' nor 'tool_calls', "
                f"but {_short(_present(message))}; messages are {{'role': ..., 'content': ...}}"
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
                f"a message of role {role!r} has content of type {kind!r}, which is not "
                "supported yet: only text is"
            )


def _says_something(message: dict[str, Any]) -> bool:
    """Whether a message has more to be rendered than its role."""
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(block.get("text") or "" for block in content)
    # Templates strip what they are given.
    return bool(content and content.strip()) or any(message.get(key) for key in _SAID_OTHERWISE)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _template_options(example: dict[str, Any]) -> dict[str, Any]:
    """What of a row is the chat template's: `tools`, and `chat_template_kwargs`."""
    tools, kwargs = example.get("tools"), example.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is text and not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"'tools' must be a list of schemas, or one as JSON, got {tools!r}")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"'chat_template_kwargs' must be a mapping, got {kwargs!r}")
    # Llama's template announces tools where the list of them is empty.
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
        # What a template says of roles and turns that it does not know, among others.
        raise ValueError(f"the chat template does not take these messages: {error}") from error
    return rendered["input_ids"]


def _check_blocks(tokenizer: Any, messages: list[dict[str, Any]], options: dict[str, Any]) -> None:
    """Raise where a template that expects text has printed a list of blocks, as Python would."""
    blocks = [
        message["content"] for message in messages if isinstance(message.get("content"), list)
    ]
    if not blocks:
        return
    text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
    for content in blocks:
        if str(content) in text:
            raise ValueError(
                "the chat template expects text as content, and would print a list of blocks as "
                f"it is: {str(content)[:60]}"
            )


def _present(value: Any) -> Any:
    """Without None in mappings: Arrow gives every one the keys of all others of its column."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_present(item) for item in value]
    return value


def _text_ids(tokenizer: Any, texts: tuple[str, ...]) -> tuple[list[list[int]], bool]:
    """Token ids of texts, and whether any brought the token that the tokenizer puts in front.

    Rendered text often does, and a model has seen one such token, never two.
    """
    ids = [tokenizer(text)["input_ids"] for text in texts]
    bos = getattr(tokenizer, "bos_token_id", None)
    doubled = [bos is not None and each[:2] == [bos, bos] for each in ids]
    # Where the tokenizer adds none, both are the text's own.
    if not any(doubled) or tokenizer("")["input_ids"][:1] != [bos]:
        return ids, False
    return [each[is_double:] for each, is_double in zip(ids, doubled, strict=True)], True


def _common_length(first: list[int], second: list[int]) -> int:
    limit = min(len(first), len(second))
    # The usual case, and far quicker than token by token.
    if first[:limit] == second[:limit]:
        return limit
    return next(i for i in range(limit) if first[i] != second[i])
