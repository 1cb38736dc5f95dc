"""Training on a stream: what is refused beside one, and whether a run can resume on it.

    stream.json    a hash of the stream's first rows, in a checkpoint

A run that resumes reads the stream again and skips as many batches as the checkpoint has seen. That
is right only if the stream has the same rows in the same order, so a run whose first rows differ
says that it cannot.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefkern.data.streams import TokenStream, is_stream
from prefkern.training.files import write_json

_FILE = "stream.json"


def check_stream(args: Any, train_dataset: Any, eval_dataset: Any) -> None:
    """Raise for an evaluation on a stream, and for arguments that need the whole of one."""
    parts = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if any(map(is_stream, parts)):
        raise TypeError(
            "eval_dataset must be a datasets.Dataset, got a stream, which has no end; take rows of "
            "it: datasets.Dataset.from_list(list(stream.take(1000)))"
        )
    if not is_stream(train_dataset):
        return
    if args.max_steps <= 0:
        raise ValueError(
            f"max_steps is {args.max_steps}, and train_dataset is a stream, whose length is not "
            "known; set max_steps"
        )
    for name in ("precompute_ref_log_probs", "max_tokens_per_batch"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is {getattr(args, name)!r}, which needs all rows, and train_dataset is a "
                "stream; leave it out, or give a datasets.Dataset"
            )
    # accelerate would choose True for streams, and cut a batch by its rows.
    args.accelerator_config.dispatch_batches = False


def save_stream(dataset: Any, folder: str) -> None:
    """Write into a checkpoint what tells the stream that it was trained on."""
    if isinstance(dataset, TokenStream):
        write_json(Path(folder) / _FILE, dataset.description)


def check_resumed_stream(dataset: Any, checkpoint: str, skips: bool) -> None:
    """Raise ValueError if a stream is another one than that of a checkpoint.

    `skips` is whether training goes on after the rows that the checkpoint has seen.
    """
    if not (isinstance(dataset, TokenStream) and skips):
        return
    file = Path(checkpoint) / _FILE
    theirs = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if theirs != dataset.description:
        raise ValueError(
            f"the stream's first rows are not those that {checkpoint} was trained on, so it cannot "
            "resume where it stopped: give the same stream in the same order, or set "
            "ignore_data_skip to go on at the stream's beginning"
        )
