"""Which tokens of a conversation are scored: all of a response, the assistant's, or the last turn's.

A response may have turns of users and of tools. `assistant_only_loss` leaves them out, by the marks
in the chat template: what stands between `{% generation %}` and `{% endgeneration %}` is the
assistant's. `last_turn_only` scores the last message, which begins where the rendering of the
messages before it ends, generation prompt included; it needs no marks. With both, a token must meet
both.

    <user> how was it? <assistant> a call <eos> <tool> 7 <assistant> fine <eos>
    assistant_only_loss            ^^^^^^ ^^^^^                      ^^^^ ^^^^^
    last_turn_only                                                   ^^^^ ^^^^^
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefkern.data.columns import REFERENCE_COLUMNS, TOKEN_COLUMNS
from prefkern.data.foreign import schemas
from prefkern.data.messages import (
    ASSISTANT,
    check_message,
    content_of,
    read_cell,
    says_something,
    short,
)
from prefkern.data.rendering import Rendering, check_tools, leaves_out, render, text_or_none
from prefkern.models.scoring import IGNORE_INDEX
from prefkern.ops import plain

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Turns:
    """Which turns of a response are scored. Raises TypeError for what is not a bool."""

    assistant_only_loss: bool = False
    last_turn_only: bool = False

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            plain.boolean(name, value)

    @property
    def name(self) -> str | None:
        """The option that leaves tokens out; None if every token is scored."""
        return next((name for name, value in vars(self).items() if value), None)

    def say_something(self, response: Sequence[dict[str, Any]]) -> bool:
        """Whether a turn that is scored has more than its role to render."""
        if self.last_turn_only:
            response = response[-1:]
        if self.assistant_only_loss:
            response = [each for each in response if each["role"] in ASSISTANT]
        return any(map(says_something, response))

    def scored(
        self, tokenizer: Any, rendering: Rendering, options: dict[str, Any], start: int
    ) -> list[bool]:
        """Which tokens of a conversation are scored: those from `start` on that the options leave.

        Raises ValueError for a template that does not show its turns.
        """
        mask = [place >= start for place in range(len(rendering.ids))]
        if self.assistant_only_loss:
            marks = _assistants(tokenizer, rendering, options)
            mask = [kept and bool(mark) for kept, mark in zip(mask, marks, strict=True)]
        if self.last_turn_only:
            begin = last_turn(tokenizer, rendering, options)
            mask = [kept and place >= begin for place, kept in enumerate(mask)]
        return mask


def conversation_labels(
    tokenizer: Any,
    messages: list[dict[str, Any]],
    *,
    assistant_only_loss: bool = True,
    last_turn_only: bool = False,
    tools: list[Any] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> dict[str, list[int]]:
    """Token ids of a conversation, and labels that score its turns, as a model takes them.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        messages: the conversation, `{"role": ..., "content": ...}` each, or ShareGPT's messages.
        assistant_only_loss: score what stands between the template's `{% generation %}` marks.
        last_turn_only: score the last message; without marks if `assistant_only_loss` is False.
        tools, chat_template_kwargs: passed to the chat template.

    Returns:
        `input_ids` and `labels`, of one length; a label is -100 where the token is not scored.
        Put them into tensors [1, T] for `prefkern.token_logprobs`.

    Raises TypeError and ValueError for messages that the template does not take or leaves out, and
    for a template without marks.
    """
    turns = Turns(assistant_only_loss, last_turn_only)
    if not (isinstance(messages, list) and messages):
        raise ValueError(f"messages must be a list of messages, got {messages!r}")
    if any(isinstance(each, dict) and "from" in each for each in messages):
        tools = json.loads(schemas(tools or []))
    messages = read_cell("messages", messages, is_written=False)
    for message in messages:
        check_message("messages", message)
    options = {"tools": tools or None, **(chat_template_kwargs or {})}
    rendering = render(tokenizer, messages, options)
    leaves_out(tokenizer, rendering, options)
    check_tools(
        tokenizer, render(tokenizer, messages, options, add_generation_prompt=True), options
    )
    scored = turns.scored(tokenizer, rendering, options, 0)
    return {"input_ids": rendering.ids, "labels": labels_of(rendering.ids, scored)}


def labels_of(ids: Sequence[int], mask: Sequence[bool]) -> list[int]:
    """The ids, with -100 where the mask is false."""
    return [token if kept else IGNORE_INDEX for token, kept in zip(ids, mask, strict=True)]


def brings_masks_of(
    columns: list[str],
    turns: Turns,
    name: str,
    names: tuple[str, ...],
    mask_columns: tuple[str, ...],
) -> bool:
    """Whether rows are tokens with masks.

    Raises ValueError for tokens that need masks, and for reference sums beside masks to be made.
    """
    if not set(TOKEN_COLUMNS) <= set(columns):
        if turns.name is not None and set(REFERENCE_COLUMNS) <= set(columns):
            raise ValueError(
                f"dataset {name!r} carries reference sums ({' and '.join(REFERENCE_COLUMNS)}), which "
                f"do not tell the turns that they are of, and {turns.name} leaves turns out: remove "
                "the columns, or give token ids and masks beside sums of what the masks score"
            )
        return False
    found = [column in columns for column in mask_columns]
    written = dict.fromkeys(f"{side}_mask" for side in names)
    if any(found) and not all(found):
        raise ValueError(f"dataset {name!r} has only some of {' and '.join(mask_columns)}")
    if turns.name is not None and not any(found):
        raise ValueError(
            f"{turns.name} reads turns, and dataset {name!r} is token ids, which do not show them; "
            f"give {' and '.join(written)} beside them, lists of bools (True: scored), or leave "
            f"{turns.name} out"
        )
    return any(found)


def mask_of(mask: Any, ids: list[int], where: str, side: str) -> list[bool]:
    """The mask of a row of tokens. Raises ValueError unless it says yes or no to every token."""
    if not (
        isinstance(mask, list)
        and len(mask) == len(ids)
        and all(isinstance(kept, bool) or kept in (0, 1) for kept in mask)
    ):
        raise ValueError(
            f"{where}: '{side}_mask' must have True or False for each of the {len(ids)} tokens of "
            f"'{side}_ids', got {short(mask)}"
        )
    return [bool(kept) for kept in mask]


def last_turn(tokenizer: Any, rendering: Rendering, options: dict[str, Any]) -> int:
    """Where the last message of a conversation begins among its tokens."""
    before = rendering.messages[:-1]
    if not before:
        return 0
    asked = render(tokenizer, before, options, add_generation_prompt=True)
    ended = text_or_none(tokenizer, before, options)
    if ended is None or not rendering.text.startswith(ended):
        raise ValueError(
            "last_turn_only finds no beginning of the last turn: the chat template renders the "
            "messages before it otherwise where it follows; use assistant_only_loss, or leave "
            "last_turn_only out"
        )
    return common_length(asked.ids, rendering.ids)


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two sequences have in common at their beginning."""
    limit = min(len(first), len(second))
    # The usual case: one comparison is far quicker than a loop over tokens.
    if first[:limit] == second[:limit]:
        return limit
    return next(i for i in range(limit) if first[i] != second[i])


def _assistants(tokenizer: Any, rendering: Rendering, options: dict[str, Any]) -> list[int]:
    """1 for each token that the template marks as the assistant's, as transformers reads it."""
    template = tokenizer.get_chat_template(tools=options.get("tools"))
    if not _MARKED.search(template):
        raise ValueError(
            "assistant_only_loss reads the assistant's tokens off {% generation %} marks, and the "
            "chat template has none: put what the assistant writes between {% generation %} and "
            "{% endgeneration %} (trl.chat_template_utils.get_training_chat_template has such "
            "templates of many models), or set last_turn_only, which needs no marks"
        )
    if not getattr(tokenizer, "is_fast", True):
        raise ValueError(
            "assistant_only_loss needs a fast tokenizer, which tells where its tokens stand in the "
            f"text; got {type(tokenizer).__name__}"
        )
    encoded = tokenizer.apply_chat_template(
        rendering.messages,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **options,
    )
    mask: list[int] = encoded["assistant_masks"]
    if list(encoded["input_ids"]) != rendering.ids:
        raise ValueError(
            "assistant_only_loss: the chat template renders other tokens each time, so that its "
            "marks are of another text; leave out of it what changes, such as the time of day"
        )
    _check_others(encoded, mask, rendering)
    return mask


def _check_others(encoded: Any, mask: list[int], rendering: Rendering) -> None:
    """Raise ValueError if the marks cover a message that is not the assistant's.

    Some templates have their marks in the wrong place. And where a mark stands beside white space
    that the tokenizer drops, transformers' mask goes on to the end of the text.
    """
    for message in rendering.messages:
        content = content_of(message).strip()
        # Elsewhere the text may be the assistant's too.
        if message["role"] in ASSISTANT or not content or rendering.text.count(content) != 1:
            continue
        begin = rendering.text.index(content)
        token = encoded.char_to_token(begin)
        if token is not None and mask[token]:
            raise ValueError(
                "assistant_only_loss: the chat template's {% generation %} marks cover a message of "
                f"role {message['role']!r}; put them around what the assistant writes alone, white "
                "space at their edges left out"
            )
