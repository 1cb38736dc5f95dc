"""The reference's log-prob sums of a dataset: computed once, kept on disk, found again by content.

A sum depends on the reference and the tokens, and so does the cache's key: a hash of the
reference's weights, its configuration, adapter and logits transform; a hash of the token ids of all
pairs (after chat template and truncation), and of which of them are scored; and the arithmetic: autocast's dtype, attention,
backend, device, whether a CPU has bfloat16 units, and the versions of prefkern, of its sums, of
torch and of transformers. A run that differs in anything else (objective, learning rate, output
folder) finds the sums of an earlier run.

    <ref_cache_dir>/<key>/key.json                         what the key is made of, for people
    <ref_cache_dir>/<key>/000000000-000000512.safetensors  sums of these pairs, [pairs, 2] float32

Each shard is written as soon as it is computed, in one atomic step, so that an interrupted
computation resumes at its last shard. It carries its key and a checksum. A shard that is truncated,
altered or of another key is computed again, with a warning.

Only rank 0 hashes, reads and writes; it sends the others the list of what is missing, so that ranks
agree even if their nodes share no file system. Nothing here moves the random state: a run that
finds its sums trains bit for bit like the run that computed them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
import transformers
import xxhash
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from accelerate.utils import broadcast_object_list
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.data import DataLoader

from prefkern.data.columns import MASK_COLUMNS, REFERENCE_COLUMNS
from prefkern.models.adapters import is_peft_model
from prefkern.models.heads import unwrap
from prefkern.models.transform import head_transform
from prefkern.training.files import write_atomically
from prefkern.training.sharing import gathered_once, shares_batches
from prefkern.training.token_batches import TokenBatches, with_batches
from prefkern.version import VERSION

logger = logging.getLogger(__name__)

_TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
_SHARD_PAIRS = 512
# Weights are hashed in pieces, so that copies from a GPU need little memory.
_PIECE_BYTES = 2**26
# Raised when prefkern adds in another order, or rounds elsewhere. Kept sums would then differ from
# those of an equal policy in their last bits, and the first loss from ln 2.
_SUMS = 3
# Entries of a model's configuration without effect on log-probs, or in the key already.
_SILENT = ("_name_or_path", "transformers_version", "use_cache", "dtype", "architectures")
_SILENT_PARTS = ("dropout", "pdrop", "layerdrop", "_token_id")


def default_folder() -> str:
    """The folder of all caches where `ref_cache_dir` is not given."""
    return os.path.join(constants.HF_HOME, "prefkern", "reference-log-probs")


def open_cache(
    folder: str | Path, reference: Mapping[str, Any] | None, dataset: Any, **arithmetic: Any
) -> SumsOnDisk | None:
    """The cache of a tokenised dataset's sums under a reference. Without one, warns; returns None.

    Args:
        folder: the folder of all caches; it is made if it does not exist.
        reference: from `description`.
        dataset: with the columns `prompt_ids`, `chosen_ids` and `rejected_ids`.
        arithmetic: what else the numbers depend on: autocast, backend, device, ...
    """
    if reference is None:
        logger.warning(
            "reference sums are not kept: the reference's weights are sharded, offloaded or "
            "of a kind that cannot be told from others"
        )
        return None
    described = {**reference, "tokens": hash_tokens(dataset), "arithmetic": arithmetic}
    try:
        return SumsOnDisk(Path(folder).expanduser(), described, len(dataset))
    except OSError as error:
        logger.warning("reference sums are not kept: %s", error)
        return None


class SumsOnDisk:
    """The sums of one dataset under one reference that are on disk.

    Args:
        folder: the folder of all caches.
        ingredients: what the sums depend on, as values for JSON.
        pairs: how many pairs the dataset has.

    Raises OSError if the folder cannot be made.
    """

    def __init__(self, folder: Path, ingredients: Mapping[str, Any], pairs: int) -> None:
        description = json.dumps(ingredients, indent=1, sort_keys=True, default=_as_json)
        self.key = xxhash.xxh3_128_hexdigest(description.encode())
        self.pairs = pairs
        self.folder = folder / self.key
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "key.json", description.encode())

    def read(self) -> tuple[Tensor, list[range]]:  # (pairs, 2)
        """The sums, float32, and the missing rows, shard by shard."""
        sums = torch.zeros(self.pairs, 2)
        missing = []
        for rows in _shards(self.pairs):
            file = self._file(rows)
            try:
                sums[rows.start : rows.stop] = self._read_shard(file, rows)
            except FileNotFoundError:
                missing.append(rows)
            except (SafetensorError, OSError, ValueError) as error:
                logger.warning(
                    "%s cannot be used (%s): the reference's sums of its %d pairs are computed "
                    "again",
                    file,
                    error,
                    len(rows),
                )
                missing.append(rows)
        return sums, missing

    def write(self, rows: range, sums: Tensor) -> None:  # (len(rows), 2)
        """Write a shard. If the disk is full, the run loses its cache and goes on."""
        sums = sums.contiguous()
        metadata = {"key": self.key, "checksum": _checksum(sums)}
        try:
            write_atomically(self._file(rows), save({"sums": sums}, metadata))
        except OSError as error:
            logger.warning("reference sums are not kept: %s", error)

    def _file(self, rows: range) -> Path:
        return self.folder / f"{rows.start:09d}-{rows.stop:09d}.safetensors"

    def _read_shard(self, file: Path, rows: range) -> Tensor:
        with safe_open(file, "pt") as shard:
            metadata = shard.metadata() or {}
            if metadata.get("key") != self.key:
                raise ValueError("it belongs to another model or dataset")
            sums: Tensor = shard.get_tensor("sums")
        if sums.shape != (len(rows), 2) or sums.dtype != torch.float32:
            raise ValueError(f"it holds {list(sums.shape)} numbers of {sums.dtype}")
        if metadata.get("checksum") != _checksum(sums):
            raise ValueError("its checksum is wrong")
        return sums


def description(model: nn.Module) -> dict[str, Any] | None:
    """What sums depend on of a reference; None where the weights cannot be hashed.

    `model` is the reference as it will run: with its adapter switched off, the base model.
    """
    weights = hash_weights(model)
    if weights is None:
        return None
    base, transform = unwrap(model), head_transform(model)
    return {
        "versions": {
            "prefkern": VERSION,
            "sums": _SUMS,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": f"{type(base).__module__}.{type(base).__qualname__}",
        "config": _numeric(base.config.to_dict()),
        "attention": getattr(base.config, "_attn_implementation", None),
        "adapter": _adapter(model),
        "transform": [transform.logit_scale, transform.softcap],
        "weights": weights,
    }


def hash_weights(model: nn.Module) -> str | None:
    """A hash of a model's state_dict and buffers: names, dtypes, shapes and contents.

    It includes buffers that no checkpoint has: `model.to(bfloat16)` rounds the rotary frequencies,
    which loading the same weights in bfloat16 does not. It does not depend on the device, nor on an
    adapter that is switched off. None if some contents are not here: sharded, offloaded or opaque.
    """
    # Asking FSDP2 for a state_dict on one rank alone would reshard that rank's weights.
    # ZeRO-3's parameters are empty outside of a forward.
    parameters = [*model.parameters()]
    if any(is_traceable_wrapper_subclass(each) or hasattr(each, "ds_id") for each in parameters):
        return None
    skipped = _switched_off(model)
    digest = xxhash.xxh3_128()
    for name, value in sorted({**dict(model.named_buffers()), **model.state_dict()}.items()):
        if any(part.startswith(skipped) for part in name.split(".")):
            continue
        if not isinstance(value, Tensor) or value.is_meta:
            return None
        if is_traceable_wrapper_subclass(value):
            return None
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().reshape(-1)
        for piece in flat.split(max(_PIECE_BYTES // flat.element_size(), 1)):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_tokens(dataset: Any) -> str:
    """A hash of the token ids of all pairs, in their order, and of their masks."""
    digest = xxhash.xxh3_128()
    # Without masks, keys stay what they were.
    masks = [column for column in MASK_COLUMNS if column in dataset.column_names]
    columns = [*_TOKEN_COLUMNS, *masks]
    tokens = dataset.select_columns(columns).with_format("arrow")
    for table in tokens.iter(batch_size=4096):
        for column in columns:
            lengths = pc.list_value_length(table[column])  # pyright: ignore[reportAttributeAccessIssue]
            values = pc.list_flatten(table[column])  # pyright: ignore[reportAttributeAccessIssue]
            for numbers in (lengths, values):
                digest.update(numbers.cast(pa.int64()).to_numpy().tobytes())
    return digest.hexdigest()


def with_sums(
    dataset: Any,
    score: Callable[[Any], Tensor],
    collate: Callable[[Any], Any],
    accelerator: Accelerator,
    *,
    batch_size: int,
    batches_of: Callable[[Any], TokenBatches | None],
    on_disk: SumsOnDisk | None,
    shows_progress: bool,
) -> Any:
    """The dataset with the reference's sums as columns. Every rank calls it, and gets all sums.

    Args:
        dataset: tokenised pairs.
        score: the sums of a batch, [2B] float32, chosen first.
        collate: rows of the dataset -> batch.
        accelerator: spreads batches over ranks.
        batch_size: pairs in a batch, on each rank.
        batches_of: batches by tokens of some rows of the dataset; None for batches of that size.
        on_disk: the cache that rank 0 reads and writes; None keeps nothing.
        shows_progress: whether there is a progress bar.
    """
    from tqdm.auto import tqdm

    pairs = len(dataset)
    found = on_disk.read() if on_disk else (torch.zeros(pairs, 2), list(_shards(pairs)))
    sums, missing = broadcast_object_list([found])[0]
    rows = torch.tensor([row for shard in missing for row in shard], dtype=torch.int64)
    if on_disk:
        logger.info("%d of %d reference sums found in %s", pairs - len(rows), pairs, on_disk.folder)
    done = 0
    bar = tqdm(
        desc="Reference log-probs",
        total=pairs,
        initial=pairs - len(rows),
        unit="pairs",
        disable=not shows_progress,
    )
    # A loader draws a seed for its workers, which would shift the draws of training.
    with bar, torch.random.fork_rng(devices=[]):
        chosen = dataset if len(rows) == len(dataset) else dataset.select(rows.tolist())
        batches = batches_of(chosen) if len(rows) else None
        scored = (
            _scored(chosen, batch_size, score, collate, accelerator)
            if batches is None
            else _scored_by_tokens(chosen, batches, score, collate, accelerator)
        )
        for by_pair in scored:
            # Those of a float64 model are float64.
            sums[rows[done : done + len(by_pair)]] = by_pair.float().cpu()
            done += len(by_pair)
            bar.update(len(by_pair))
            # Missing rows are in order, so a shard is complete once its last row is there.
            while missing and (done == len(rows) or missing[0].stop <= rows[done]):
                shard = missing.pop(0)
                if on_disk:
                    on_disk.write(shard, sums[shard.start : shard.stop])
    for column, values in zip(REFERENCE_COLUMNS, sums.T.tolist(), strict=True):
        dataset = dataset.add_column(column, values)
    return dataset


def _scored(
    rows: Any,
    batch_size: int,
    score: Callable[[Any], Tensor],
    collate: Callable[[Any], Any],
    accelerator: Accelerator,
) -> Iterator[Tensor]:  # (pairs, 2) each
    """The sums of these rows in their order, from all ranks, in batches of a number of pairs."""
    if not len(rows):
        return
    loader = prepare_data_loader(
        DataLoader(rows, batch_size=batch_size, collate_fn=collate),
        accelerator.device,
        put_on_device=True,
        # Here every rank needs a last batch to gather, whatever training does with it.
        even_batches=True,
        torch_device_mesh=accelerator.torch_device_mesh,
    )
    for batch in loader:
        yield gathered_once(_by_pair(score(batch)), accelerator)


def _scored_by_tokens(
    rows: Any,
    batches: TokenBatches,
    score: Callable[[Any], Tensor],
    collate: Callable[[Any], Any],
    accelerator: Accelerator,
) -> Iterator[Tensor]:  # (pairs, 2) each
    """As `_scored`, in batches by tokens, in which ranks have different numbers of pairs."""
    loader = with_batches(DataLoader(rows, collate_fn=collate), batches, accelerator.device)
    for places, batch in zip(batches.rounds(), loader, strict=True):
        mine = _by_pair(score(batch))
        if shares_batches(accelerator):
            yield mine
            continue
        most = max(map(len, places))
        padded = torch.zeros(most, 2, device=mine.device)
        padded[: len(mine)] = mine[:most]
        gathered: Any = accelerator.gather(padded)
        by_rank = zip(gathered.view(-1, most, 2), places, strict=False)
        yield torch.cat([values[: len(each)] for values, each in by_rank])


def _by_pair(sums: Tensor) -> Tensor:  # (2B,) -> (B, 2)
    return sums.view(2, -1).T.contiguous()


def _shards(pairs: int) -> list[range]:
    return [
        range(start, min(start + _SHARD_PAIRS, pairs)) for start in range(0, pairs, _SHARD_PAIRS)
    ]


def _checksum(sums: Tensor) -> str:
    return xxhash.xxh3_128_hexdigest(sums.numpy().tobytes())


def _adapter(model: Any) -> Any:
    """The adapter of a reference: None, "switched off", or its configuration."""
    if not is_peft_model(model):
        return None
    if _switched_off(model):
        return "switched off"
    configs = {name: config.to_dict() for name, config in model.peft_config.items()}
    return {"active": model.active_adapters, "configs": configs}


def _switched_off(model: Any) -> tuple[str, ...]:
    """The prefixes of weights that have no part in the forward."""
    if not is_peft_model(model):
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if not layers or not all(layer.disable_adapters for layer in layers):
        return ()
    return (model.base_model.prefix, "modules_to_save")


def _numeric(config: Any) -> Any:
    """The part of a configuration that log-probs may depend on."""
    if not isinstance(config, dict):
        return config
    return {
        str(name): _numeric(value)
        for name, value in config.items()
        if name not in _SILENT and not any(part in str(name) for part in _SILENT_PARTS)
    }


def _as_json(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
