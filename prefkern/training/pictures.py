"""Pictures in PreferenceTrainer: what they need, what is refused beside them, what sums depend on.

Everything here is checked before a model is loaded, but for what only the model can tell.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import xxhash

from prefkern.data.collate import ExampleCollator, PreferenceCollator
from prefkern.data.columns import picture_column
from prefkern.data.picture_batches import PictureCollator
from prefkern.data.pictures import check_processor, refuse_marks
from prefkern.data.streams import is_stream, refuse_streamed_pictures, whole
from prefkern.models.loading import load_processor
from prefkern.training.checks import named
from prefkern.training.config import PreferenceConfig
from prefkern.training.context_parallel import size_of_launch


def shows_pictures(parts: Iterable[tuple[str, Any]]) -> str | None:
    """The name of the first dataset that has pictures."""
    for name, dataset in parts:
        if picture_column(getattr(dataset, "column_names", None) or ()) is not None:
            return name
    return None


def picture_processor(
    processing_class: Any, model: Any, init_kwargs: Any, args: PreferenceConfig, name: str
) -> Any:
    """The processor for a dataset with pictures: the one that was given, or the model's own.

    Args:
        name: the dataset's.

    Raises ValueError for options that do not go together with pictures, for a tokenizer, and for a
    processor without placeholders.
    """
    where = f"dataset {name!r}"
    refused = {
        "padding_free": "a packed row cannot have them; leave it out",
        "generate_samples": "samples are of text alone; leave it out",
    }
    for option, why in refused.items():
        if getattr(args, option):
            raise ValueError(
                f"{option} is {getattr(args, option)!r} and {where} has pictures: {why}"
            )
    refuse_marks(args.assistant_only_loss, where)
    size = size_of_launch(args)
    if size > 1:
        raise ValueError(
            f"context parallelism (cp_size={size}) does not cut pictures, which {where} has: leave "
            "cp_size out, and use FSDP2 alone, or remove the column to train on the text alone"
        )
    if processing_class is None:
        path = model if isinstance(model, str) else model.config._name_or_path
        processing_class = load_processor(path, init_kwargs)
    check_processor(processing_class, where)
    return processing_class


def refuse_picture_stream(stream: Any, name: str) -> None:
    """Raise ValueError for a stream that says that it has pictures."""
    refuse_streamed_pictures(stream.column_names, name)


def read_whole(dataset: Any, name: str) -> Any:
    """`whole` of a dataset, or of several. Raises ValueError for streams with pictures."""
    streams = [(each, part) for each, part in named(dataset, name) if is_stream(part)]
    for each, part in streams:
        refuse_picture_stream(part, each)
    dataset = whole(dataset)
    read = dict(named(dataset, name))
    for each, _ in streams:
        refuse_streamed_pictures(read[each].column_names, each)
    return dataset


def picture_collator(
    tokens: PreferenceCollator | ExampleCollator, processor: Any, base: Any
) -> PictureCollator:
    """A collator for a model, the unwrapped `base`. Raises ValueError if the model takes no pictures."""
    accepted = frozenset(inspect.signature(base.forward).parameters)
    if "pixel_values" not in accepted:
        raise ValueError(
            f"the dataset has pictures, and {type(base).__name__} takes none (no pixel_values in its "
            "forward); load a model that sees, or remove the column to train on the text alone"
        )
    return PictureCollator(tokens, processor, accepted)


def check_sees(collator: Any, dataset: Any, name: str) -> None:
    """Raise ValueError for pictures beside a collator of text: they would be left out."""
    if picture_column(dataset.column_names) is not None and not isinstance(
        collator, PictureCollator
    ):
        raise ValueError(
            f"dataset {name!r} has pictures, and those given to the constructor have none; give one "
            "with pictures there (eval_dataset), or remove the column"
        )


def hash_pictures(dataset: Any, processor: Any) -> str:
    """A hash of the pictures of all rows, as files, and of how they are read and made into pixels."""
    column: Any = picture_column(dataset.column_names)
    settings = processor.image_processor.to_dict()
    digest = xxhash.xxh3_128(json.dumps(settings, sort_keys=True, default=str).encode())
    # The mode that files are read in, such as "L", is the column's.
    digest.update(str(dataset.features[column]).encode())
    feature: Any = datasets.Image(decode=False)
    kept = dataset.select_columns([column])
    kept = kept.cast_column(column, feature if column == "image" else datasets.List(feature))
    for row in kept:
        value = row[column]
        pictures = [value] if column == "image" else value
        found = [each for each in pictures or [] if each is not None]
        digest.update(f"{len(found)}\n".encode())
        for each in found:
            content = each["bytes"]
            digest.update(Path(each["path"]).read_bytes() if content is None else content)
    return digest.hexdigest()
