"""Turns a row's text into token ids, for each of TRL's formats.

The prompt alone and prompt + response are both tokenised whole. The response starts where the two
differ, as in TRL, so no artificial token boundary appears. A text response gets an end-of-sequence
token if it has no end token. Text that already begins with the tokenizer's first token gets no
second one.

Without a prompt, the common beginning of the two texts is the prompt. Where one text ends there and
the other goes on, the end token is all of the first response: it is what the two differ in. A third,
gold response must have the same beginning.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from prefkern.data.columns import GOLD
from prefkern.data.foreign import NEXT_TURN, SYSTEM
from prefkern.data.messages import (
    check_message,
    check_response,
    has_other_turns,
    present,
    read_cell,
)
from prefkern.data.pictures import PictureTokenizer
from prefkern.data.rendering import check_tools, leaves_out, render
from prefkern.data.turns import Turns, common_length


class TokenizedPair(NamedTuple):
    """Token ids of a row, and what the report should know about them."""

    prompt: list[int]
    responses: list[list[int]]  # chosen, rejected and, where it was asked for, the gold one
    empty: bool = False  # a response has no content, whatever tokens a template adds
    merged: bool = False  # the last token of the prompt merged with a response
    repeated: bool = False  # all responses, as text, begin with the whole prompt
    begun: bool = False  # the text already has the token that the tokenizer puts in front
    unasked: bool = False  # nothing stands before the responses
    stops: bool = False  # a response is only its end token, and the other goes on
    unsaid: bool = False  # the template leaves out text or thoughts of an earlier answer
    turns: bool = False  # a response has turns of other roles, and they are scored
    masks: list[list[bool]] | None = None  # which tokens of responses are scored


@dataclass(frozen=True)
class Reading:
    """What holds for all rows of a dataset.

    `written` are the columns in which every row is a conversation as text, `names` the responses'
    columns in errors: the third is there if gold responses are read. `turns` says what is scored of
    them. `end_ids` and `end_texts` are the tokens that may end a text. The tokenizer looks its
    special tokens up anew at every call, so they are read once.
    """

    end_ids: tuple[int, ...]
    end_texts: tuple[str, ...]
    eos: int | None
    bos: int | None
    written: tuple[str, ...]
    names: tuple[str, ...]
    turns: Turns
    kinds: tuple[str, ...] = ("text",)

    @classmethod
    def of(
        cls,
        tokenizer: Any,
        written: tuple[str, ...],
        names: tuple[str, ...],
        turns: Turns,
        kinds: tuple[str, ...] = ("text",),
    ) -> Reading:
        """The reading of a tokenizer: its special tokens, such as ChatML's, end a text."""
        added = getattr(tokenizer, "added_tokens_decoder", {})
        ends = {number: str(token) for number, token in added.items() if token.special}
        for name in ("unk_token_id", "bos_token_id", "mask_token_id", "cls_token_id"):
            ends.pop(getattr(tokenizer, name, None), None)  # pyright: ignore[reportArgumentType]
        eos, bos = tokenizer.eos_token_id, getattr(tokenizer, "bos_token_id", None)
        if eos is not None:
            ends[eos] = str(tokenizer.eos_token)
        return cls(tuple(ends), tuple(ends.values()), eos, bos, written, names, turns, kinds)

    def has_end(self, text: str, ids: list[int]) -> bool:
        """Whether a text ends with an end token; ChatML has a line break after it."""
        if ids and ids[-1] in self.end_ids:
            return True
        return text[-1:].isspace() and text.rstrip().endswith(self.end_texts)

    def is_blank(self, text: str) -> bool:
        """Whether a response is only white space, or only an end token."""
        text = text.strip()
        return not text or text in self.end_texts


def tokenize_pair(example: dict[str, Any], tokenizer: Any, reading: Reading) -> TokenizedPair:
    """Token ids of prompt and responses.

    Raises ValueError for a row that has none of the formats.
    """
    parts = read_row(example, reading.names, reading.written, reading.kinds)
    if isinstance(tokenizer, PictureTokenizer):
        parts = tokenizer.placed(parts, reading.names)
    if isinstance(parts[-1], list):
        return _conversation(example, parts, tokenizer, reading)
    if reading.turns.name is not None:
        raise ValueError(
            f"{reading.turns.name} scores turns of a conversation, and the row is text, which has "
            f"none; make it lists of messages, or leave {reading.turns.name} out"
        )
    return _texts(parts, example.get("prompt") is None, tokenizer, reading)


def read_row(
    example: dict[str, Any],
    names: tuple[str, ...],
    written: tuple[str, ...],
    kinds: tuple[str, ...] = ("text",),
) -> tuple[Any, ...]:
    """Prompt and responses of a row: texts, or lists of messages.

    Args:
        names, written, kinds: as in `Reading`.

    Raises ValueError for a row that has none of the formats.
    """
    prompt, *responses = _cells(example, names, written, kinds)
    is_implicit = prompt is None
    are_messages = isinstance(responses[0], list)
    if is_implicit:
        prompt, *responses = _common_prompt(responses)
    elif are_messages and isinstance(prompt, str):
        prompt, *responses = _text_prompt(prompt, responses)
    elif isinstance(prompt, list) != are_messages:
        raise ValueError(
            "'prompt' is a conversation, and 'chosen' and 'rejected' are text; make them messages "
            "of role 'assistant'"
        )
    elif are_messages:
        responses = _without_prompt(prompt, responses, names)
    if are_messages and example.get(SYSTEM):
        prompt = _with_system(example[SYSTEM], prompt)
    return prompt, *responses


def _cells(
    example: dict[str, Any],
    names: tuple[str, ...],
    written: tuple[str, ...],
    kinds: tuple[str, ...],
) -> list[Any]:
    """Prompt and responses: texts, or lists of messages; the prompt may be None.

    A row with a `system` column is a conversation, so its texts become messages.
    """
    prompt: Any = read_cell("prompt", example.get("prompt"), "prompt" in written)
    responses: list[Any] = [
        read_cell(name, example.get(column), column in written)
        for name, column in zip(names, ("chosen", "rejected", GOLD), strict=False)
    ]
    for name, cell in zip(names, responses, strict=True):
        if not (isinstance(cell, str) or _are_messages(cell)):
            raise ValueError(f"{name!r} must be text or a list of messages, got {cell!r}")
    for name, cell in zip(names[1:], responses[1:], strict=True):
        if isinstance(cell, list) != isinstance(responses[0], list):
            raise ValueError(f"one of 'chosen' and {name!r} is text and the other a conversation")
    _check_prompt(example, prompt)
    for name, cell in zip(("prompt", *names), (prompt, *responses), strict=True):
        if isinstance(cell, list):
            for message in cell:
                check_message(name, message, kinds)
    if SYSTEM not in example:
        return [prompt, *responses]
    system = example[SYSTEM]
    if not (system is None or isinstance(system, str)):
        raise ValueError(f"'system' must be text, got {system!r}")
    are_texts = isinstance(responses[0], str)
    if prompt is None and are_texts:
        raise ValueError("'system' needs a 'prompt' beside it; columns={'prompt': ...} names one")
    if isinstance(prompt, str) and are_texts:
        prompt = [{"role": "user", "content": prompt}]
    if are_texts:
        responses = [[{"role": "assistant", "content": text}] for text in responses]
    return [prompt, *responses]


def _with_system(system: str, prompt: list[Any]) -> list[Any]:
    """A prompt after its system message."""
    if prompt and prompt[0]["role"] == "system":
        if prompt[0].get("content") == system:
            return prompt
        raise ValueError("'prompt' begins with another system message than that of 'system'")
    return [{"role": "system", "content": system}, *prompt] if system.strip() else prompt


def _conversation(
    example: dict[str, Any], parts: tuple[Any, ...], tokenizer: Any, reading: Reading
) -> TokenizedPair:
    prompt, *responses = parts
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError("the dataset is conversational and the tokenizer has no chat template")
    if not prompt:
        raise ValueError(
            "'chosen' and 'rejected' begin with different messages and there is no 'prompt'"
        )
    for name, response in zip(reading.names, responses, strict=True):
        check_response(name, response)
    options = _template_options(example)
    asked = render(tokenizer, prompt, options, add_generation_prompt=True)
    check_tools(tokenizer, asked, options)
    answered = [render(tokenizer, prompt + rest, options) for rest in responses]
    is_unsaid = [leaves_out(tokenizer, each, options) for each in answered]
    # A template adds tokens even to an empty message, so lengths do not show an empty response.
    is_empty = not all(map(reading.turns.say_something, responses))
    ids = [each.ids for each in answered]
    start = min(common_length(asked.ids, each) for each in ids)
    masks, scores_all = None, reading.turns.name is None
    if not scores_all:
        masks = [reading.turns.scored(tokenizer, each, options, start)[start:] for each in answered]
    return TokenizedPair(
        asked.ids[:start],
        [each[start:] for each in ids],
        is_empty,
        merged=start < len(asked.ids),
        unsaid=any(is_unsaid),
        turns=scores_all and any(map(has_other_turns, responses)),
        masks=masks,
    )


def _texts(
    parts: tuple[Any, ...], is_implicit: bool, tokenizer: Any, reading: Reading
) -> TokenizedPair:
    prompt, *responses = parts
    texts = (prompt, *(prompt + response for response in responses))
    (prompt_ids, *sequences), is_begun = _text_ids(tokenizer, texts, reading.bos)
    is_blank = [reading.is_blank(response) for response in responses]
    # Where the other text goes on, a response without text is the end of the common one.
    stops = is_implicit and is_blank[0] != is_blank[1] and not any(is_blank[2:])
    if reading.eos is not None:
        sequences = [
            ids if reading.has_end(text, ids) and response.strip() else [*ids, reading.eos]
            for text, response, ids in zip(texts[1:], responses, sequences, strict=True)
        ]
    start = min(common_length(prompt_ids, ids) for ids in sequences)
    return TokenizedPair(
        prompt_ids[:start],
        [ids[start:] for ids in sequences],
        any(is_blank),
        merged=start < len(prompt_ids),
        repeated=all(_begins_with(prompt, text) for text in responses),
        begun=is_begun,
        unasked=not prompt.strip(),
        stops=stops,
        turns=any(NEXT_TURN in response for response in responses),
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


def _common_prompt(responses: list[Any]) -> list[Any]:
    """The common beginning of chosen and rejected, and the rest of all responses."""
    common, chosen, rejected = extract_prompt(*responses[:2])
    golds = responses[2:]
    for gold in golds:
        # The last message stays a response; keys of Arrow's are left out, as below.
        begins = present(gold[: len(common)]) == present(common)
        if not begins or (isinstance(gold, list) and len(gold) == len(common)):
            raise ValueError(
                f"{GOLD!r} does not begin with the common beginning of 'chosen' and 'rejected', "
                "which is their prompt; give a column 'prompt', or let all three begin with it"
            )
    return [common, chosen, rejected, *(gold[len(common) :] for gold in golds)]


def _text_prompt(prompt: str, responses: list[Any]) -> list[Any]:
    """Prompt and responses of a row with a text `prompt` and conversations as responses."""
    common, *rest = _common_prompt(responses)
    if not prompt:
        return [common, *rest]
    if common:
        # Some conversational datasets repeat the text of the first question in `prompt`.
        asked = [m.get("content") for m in common if m.get("role") == "user"]
        if prompt.strip() not in (text.strip() for text in asked if isinstance(text, str)):
            raise ValueError(
                f"'prompt' is {prompt[:60]!r}, but no user message at the common beginning of "
                "'chosen' and 'rejected' has that text; correct 'prompt', or leave it out"
            )
        return [common, *rest]
    if any(messages[0].get("role") == "user" for messages in rest):
        raise ValueError("'chosen' and 'rejected' begin with different questions")
    return [[{"role": "user", "content": prompt}], *rest]


def _without_prompt(
    prompt: list[Any], responses: list[Any], names: tuple[str, ...]
) -> list[list[Any]]:
    """Conversations without the prompt, if all begin with it."""
    if not prompt:
        return responses
    # Arrow fills the messages of each column with different keys, so compare without None.
    asked = present(prompt)
    repeats = [present(each[: len(prompt)]) == asked for each in responses]
    if len(set(repeats)) > 1:
        whole, other = names[repeats.index(True)], names[repeats.index(False)]
        raise ValueError(
            f"{whole!r} begins with the messages of 'prompt', but {other!r} does not; expected both "
            "to be the response alone, or both the whole conversation"
        )
    return [each[len(prompt) :] for each in responses] if all(repeats) else responses


def _begins_with(prompt: str, text: str) -> bool:
    """Whether a text begins with the prompt, and the prompt does not end inside a word there."""
    rest = text[len(prompt) :]
    is_cut = prompt[-1:].isalnum() and rest[:1].isalnum()
    return bool(prompt.strip()) and text.startswith(prompt) and not is_cut


def _check_prompt(example: dict[str, Any], prompt: Any) -> None:
    if "prompt" not in example:
        return
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


def _template_options(example: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that the chat template gets: `tools` and `chat_template_kwargs`."""
    tools, kwargs = example.get("tools"), example.get("chat_template_kwargs")
    if isinstance(tools, str):
        try:
            # LLaMA-Factory's rows without tools have an empty text.
            tools = json.loads(tools) if tools.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"'tools' is text but not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise ValueError(
            f"'tools' must be a list of schemas, or such a list as JSON, got {tools!r}"
        )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise ValueError(f"'chat_template_kwargs' must be a mapping, got {kwargs!r}")
    # Llama's template announces tools even for an empty list, hence `or None`.
    return {"tools": present(tools) or None, **present(kwargs or {})}


def _text_ids(
    tokenizer: Any, texts: tuple[str, ...], bos: int | None
) -> tuple[list[list[int]], bool]:
    """Token ids of texts, and whether one already has the token that the tokenizer puts in front.

    Text from a chat template often has it. A model was trained with one such token, never two.
    """
    ids = [tokenizer(text)["input_ids"] for text in texts]
    doubled = [bos is not None and each[:2] == [bos, bos] for each in ids]
    # If the tokenizer adds none, both tokens are in the text itself and stay.
    if not any(doubled) or tokenizer("")["input_ids"][:1] != [bos]:
        return ids, False
    return [each[is_double:] for each, is_double in zip(ids, doubled, strict=True)], True
