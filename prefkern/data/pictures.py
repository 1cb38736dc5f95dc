"""Pictures of a row: where they stand, how many tokens they are, and what may not be cut.

A row has its pictures in the column `images` (a list) or `image` (one), TRL's names. They belong to
its prompt. In a text each stands where the processor's placeholder is (`<image>`). In a conversation
a block `{"type": "image"}` or the placeholder says where; messages that are all text, without either,
get the pictures before the text of the first user message, as in TRL.

    images  [a circle]            prompt  <image> What is this?
    tokens  <image> x n What is this?     n: by the processor, of this picture

Rows are tokenised before training, by the processor, so that the report counts the tokens of
pictures and errors come first. The pictures themselves stay where they are: their pixels are made
anew for each batch (`prefkern.data.picture_batches`). A placeholder without its pixels, or part of
one, is another prompt, so a prompt with pictures is never cut.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import datasets
from datasets.exceptions import DatasetsError

from prefkern.data.columns import PICTURE_COLUMNS, TYPE_COLUMNS, picture_column, pictures_of
from prefkern.data.messages import present
from prefkern.data.rendering import text_or_none
from prefkern.data.truncation import Bounds

_BLOCK = "image"
_PROBE = "Is this text left out?"


def with_pictures(dataset: datasets.Dataset, name: str, processor: Any) -> datasets.Dataset:
    """The dataset with its pictures under `datasets`' own type: paths and bytes are read as files.

    Raises ValueError for a column of another kind, for two columns, under a transform, and as
    `check_processor`.
    """
    column = picture_column(dataset.column_names)
    if column is None:
        return dataset
    check_processor(processor, f"dataset {name!r}")
    if {*PICTURE_COLUMNS} <= {*dataset.column_names}:
        raise ValueError(f"dataset {name!r} has both 'images' and 'image'; remove one of them")
    if dataset.format["type"] == "custom":
        raise ValueError(
            f"dataset {name!r} has a transform and a column {column!r}, whose pictures are read "
            "past the transform; apply it with dataset.map, and reset_format()"
        )
    feature: Any = dataset.features[column]
    inner = getattr(feature, "feature", feature) if column == "images" else feature
    if isinstance(inner, datasets.Image) and inner.decode:
        return dataset
    wanted: Any = datasets.Image(mode=getattr(inner, "mode", None))
    if column == "images":
        wanted = datasets.List(wanted)
    try:
        return dataset.cast_column(column, wanted)
    except (TypeError, ValueError, NotImplementedError, DatasetsError) as error:
        one = "a list of pictures" if column == "images" else "a picture"
        raise ValueError(
            f"dataset {name!r}: {column!r} must be {one} (datasets.Image, paths or bytes), got "
            f"{feature}"
        ) from error


def read_pictures(example: Mapping[str, Any]) -> list[Any]:
    """The pictures of a row of a dataset, which may be none. Raises ValueError for a broken file."""
    try:
        pictures = pictures_of(example)
    except (OSError, ValueError) as error:
        raise ValueError(f"a picture cannot be read: {error}") from error
    if None in pictures:
        raise ValueError("one of its pictures is null; leave it out of 'images'")
    return pictures


def beside(tokens: datasets.Dataset, dataset: datasets.Dataset) -> datasets.Dataset:
    """Rows of tokens with the pictures of a dataset of as many rows.

    Pictures are copied, as files, only where the dataset is a selection of rows.
    """
    column: Any = picture_column(dataset.column_names)
    return datasets.concatenate_datasets([tokens, dataset.select_columns([column])], axis=1)


def check_processor(processor: Any, where: str) -> None:
    """Raise ValueError unless a processor can put pictures into a text."""
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(
            f"{where} has pictures, which need the model's processor, and "
            f"{type(processor).__name__} is none: pass processing_class="
            "transformers.AutoProcessor.from_pretrained(...), or remove the column to train on the "
            "text alone"
        )
    has_placeholder = isinstance(getattr(processor, "image_token", None), str)
    if not has_placeholder:
        raise ValueError(
            f"{where} has pictures, and {type(processor).__name__} has no image_token, the text "
            "that stands for one; this family is not supported"
        )


def refuse_marks(assistant_only_loss: bool, where: str) -> None:
    """Raise ValueError for marks in the template, which are read off a text without pictures."""
    if assistant_only_loss:
        raise ValueError(
            f"assistant_only_loss is not supported beside pictures, which {where} has; set "
            "last_turn_only, or leave it out"
        )


def text_needs_blocks(processor: Any, tokenizer: Any) -> bool:
    """Whether conversations without pictures need the processor's template too.

    Its tokenizer may have no template, or one that reads blocks and leaves out a content of text.
    """
    has_template = getattr(processor, "chat_template", None) is not None
    if not (has_template and isinstance(getattr(processor, "image_token", None), str)):
        return False
    probe = [{"role": "user", "content": _PROBE}]
    has_own = tokenizer.chat_template is not None
    return not has_own or _PROBE not in (text_or_none(tokenizer, probe, {}) or "")


def type_names(processor: Any) -> tuple[str, ...]:
    """The inputs by which a processor says what each token is: text, or part of a picture."""
    return tuple(name for name in TYPE_COLUMNS if name in processor.model_input_names)


class PictureTokenizer:
    """A processor as the tokenizer of one row: placeholders become the tokens of its pictures.

    All else is that of the processor's tokenizer; the chat template is the processor's, if it has
    one. Pictures are processed once, however many texts are tokenised.

    Args:
        processor: a Hugging Face processor, for which `check_processor` has passed.
        pictures: the row's.
    """

    def __init__(self, processor: Any, pictures: list[Any]) -> None:
        self._tokenizer = processor.tokenizer
        self._pictures = pictures
        self._placeholder: str = processor.image_token
        template = getattr(processor, "chat_template", None)
        self.chat_template = self._tokenizer.chat_template if template is None else template
        self._names = type_names(processor)
        self._processor = copy.copy(processor)
        self._processor.image_processor = _Once(processor.image_processor)
        # Of each text: its ids, and the types of its tokens by the names of the inputs.
        self._seen: list[tuple[list[int], dict[str, list[int]]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return self._tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, **options
        )

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        """The token ids of a text.

        Raises ValueError unless it has a placeholder for each picture; an empty text needs none.
        """
        found = text.count(self._placeholder)
        if found != len(self._pictures) and text:
            raise ValueError(
                f"the row has {_count(len(self._pictures), 'picture')}, and its text has "
                f"{_count(found, 'placeholder')} {self._placeholder!r}: each picture needs one in "
                "the prompt, and the responses have none"
            )
        if not found:
            ids: list[int] = self._tokenizer(text, **options)["input_ids"]
            self._seen.append((ids, {name: [0] * len(ids) for name in self._names}))
            return {"input_ids": ids}
        made = self._processor(text=[text], images=[self._pictures], return_tensors="pt", **options)
        ids = made["input_ids"][0].tolist()
        types = {name: made[name][0].tolist() for name in self._names}
        self._seen.append((ids, types))
        return {"input_ids": ids}

    def placed(self, parts: tuple[Any, ...], names: tuple[str, ...]) -> tuple[Any, ...]:
        """Prompt and responses with a block where each picture stands; texts as they are.

        Raises ValueError for blocks in responses, and for blocks that hold a picture.
        """
        prompt, *responses = parts
        if isinstance(prompt, str):
            return parts
        for name, response in zip(names, responses, strict=True):
            if _blocks_in(response):
                raise ValueError(f"{name!r} has a picture, and only a prompt can have pictures")
        blocks = _blocks_in(prompt)
        for block in blocks:
            given = {key for key, value in block.items() if value not in (None, "")} - {"type"}
            if given:
                raise ValueError(
                    f"a picture in 'prompt' holds {', '.join(map(repr, sorted(given)))}; put the "
                    "picture into the row's 'images', and {'type': 'image'} where it stands"
                )
        count = len(self._pictures)
        users = [message for message in prompt if message["role"] == "user"]
        are_texts = users and all(isinstance(each.get("content"), str) for each in users)
        texts = (message.get("content") for message in prompt)
        # A text that became a message keeps its placeholders; they are counted once it is rendered.
        written = any(isinstance(text, str) and self._placeholder in text for text in texts)
        if count and are_texts and not (blocks or written):
            first = users[0]
            placed = [{"type": _BLOCK}] * count + _as_blocks(first)["content"]
            prompt = [
                {**first, "content": placed} if message is first else message for message in prompt
            ]
        elif count != len(blocks) and not written:
            raise ValueError(
                f"the row has {_count(count, 'picture')}, and its prompt has "
                f"{_count(len(blocks), 'block')} {{'type': 'image'}}; expected one for each picture"
            )
        return tuple([*map(_as_blocks, part)] for part in (prompt, *responses))

    def types_of(self, prompt: list[int]) -> dict[str, list[int]]:
        """The types of a prompt's tokens, by the names of their columns.

        Raises ValueError if the tokens of a picture go on after the prompt.
        """
        if not self._names:
            return {}
        for ids, types in self._seen:
            # Of two tokens that begin a text, the first is left out.
            for start in (0, 1):
                if ids[start : start + len(prompt)] != prompt:
                    continue
                end = start + len(prompt)
                if any(any(each[end:]) for each in types.values()):
                    raise ValueError("the tokens of a picture go on after the prompt")
                return {TYPE_COLUMNS[name]: types[name][start:end] for name in self._names}
        raise AssertionError("a prompt is the beginning of a text that was tokenised")


class _Once:
    """An image processor that keeps its answer: it is asked for the same pictures each time."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._answer: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        if self._answer is None:
            self._answer = self._processor(*args, **options)
        # Some processors take entries out.
        return copy.copy(self._answer)


def check_uncut(found: list[list[int]], kept: list[list[int]], count: int, bounds: Bounds) -> None:
    """Raise ValueError if truncation has cut the prompt of a row with pictures.

    Args:
        found, kept: the tokens of prompt and responses, before and after.
        count: the number of pictures.
        bounds: what the row was cut to.
    """
    if not count or len(kept[0]) == len(found[0]) or not any(kept[1:]):
        return
    longest = len(found[0]) + max(map(len, found[1:]))
    raise ValueError(
        f"truncation would cut its prompt, which has {_count(count, 'picture')}: the row has "
        f"{longest} tokens, {len(found[0])} of them the prompt's, and max_length is "
        f"{bounds.max_length} (max_prompt_length {bounds.max_prompt_length}); raise it, have the "
        "processor make smaller pictures, or set truncation_mode to 'drop' (leaves such rows out) "
        "or 'keep_start' (cuts the responses)"
    )


def _blocks_in(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    contents = [message.get("content") for message in messages]
    return [
        block
        for content in contents
        if isinstance(content, list)
        for block in content
        if block.get("type") == _BLOCK
    ]


def _as_blocks(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose text is a block, as templates of models that see expect it."""
    content = message.get("content")
    if not isinstance(content, str):
        return present(message)
    return {**message, "content": [{"type": "text", "text": content}]}


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
