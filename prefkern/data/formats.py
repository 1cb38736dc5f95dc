"""A row's text to token ids, in each of TRL's formats.

Prompt and prompt + response are tokenised whole, and the response starts where the two diverge, as
in TRL: no token boundary is invented. An end-of-sequence token closes text responses that lack it.
"""

from __future__ import annotations

import json
from typing import Any

from jinja2 import TemplateError


def tokenize_pair(
    example: dict[str, Any], tokenizer: Any
) -> tuple[list[int], list[int], list[int], bool]:
    """Token ids of prompt, chosen and rejected, and whether the prompt's end merged with them.

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
    _check_prompt(prompt)
    if prompt is None:
        prompt, chosen, rejected = extract_prompt(chosen, rejected)
    elif is_conversation and isinstance(prompt, str):
        prompt, chosen, rejected = _text_prompt(prompt, chosen, rejected)
    elif isinstance(prompt, list) != is_conversation:
        raise ValueError("'prompt' is a conversation, and 'chosen' and 'rejected' are text")

    if is_conversation:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ValueError("the dataset is conversational and the tokenizer has no chat template")
        options = _template_options(example)
        for message in (*prompt, *chosen, *rejected):
            _check_message(message)
        prompt_ids = _render(tokenizer, prompt, options, add_generation_prompt=True)
        sequences = [_render(tokenizer, prompt + rest, options) for rest in (chosen, rejected)]
    else:
        prompt_ids = tokenizer(prompt)["input_ids"]
        sequences = [tokenizer(prompt + text)["input_ids"] for text in (chosen, rejected)]
        eos = tokenizer.eos_token_id
        sequences = [ids if eos is None or ids[-1:] == [eos] else [*ids, eos] for ids in sequences]
    start = min(_common_length(prompt_ids, ids) for ids in sequences)
    chosen_ids, rejected_ids = (ids[start:] for ids in sequences)
    return prompt_ids[:start], chosen_ids, rejected_ids, start < len(prompt_ids)


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


def _check_prompt(prompt: Any) -> None:
    if not (prompt is None or isinstance(prompt, str | list)):
        raise ValueError(f"'prompt' must be text or a list of messages, got {prompt!r}")


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _check_message(message: dict[str, Any]) -> None:
    """Raise for messages that a chat template would render wrong without saying so."""
    if message.get("role") is None:
        raise ValueError(
            f"a message has no 'role', but {', '.join(map(repr, message))}; messages are "
            "{'role': ..., 'content': ...}"
        )
    content = message.get("content")
    if not isinstance(content, list):
        return
    for block in content:
        kind = block.get("type") if isinstance(block, dict) else type(block).__name__
        if kind != "text":
            raise ValueError(
                f"a message of role {message['role']!r} has content of type {kind!r}, which is not "
                "supported yet: only text is"
            )


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


def _common_length(first: list[int], second: list[int]) -> int:
    limit = min(len(first), len(second))
    # The usual case, and far quicker than token by token.
    if first[:limit] == second[:limit]:
        return limit
    return next(i for i in range(limit) if first[i] != second[i])
