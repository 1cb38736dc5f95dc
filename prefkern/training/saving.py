"""Saves models and adapters that `from_pretrained` loads on one process, whatever holds their weights.

A model is written into a folder beside its place and moved from there, file by file; files of an
earlier model that would be loaded in its place are deleted or renamed.

A sharded model is gathered on rank 0. There are two exceptions:

- checkpoints under FSDP stay as the state dict type says;
- ZeRO-3 gathers a whole model if its configuration says so
  (`stage3_gather_16bit_weights_on_model_save`). Otherwise DeepSpeed's shards are written, and the
  script that joins them, and `joining_command` is its call. An adapter is always gathered.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from transformers import Trainer

from prefkern.models.adapters import base_parameters, is_peft_model
from prefkern.training import zero
from prefkern.training.files import remove, sync

logger = logging.getLogger(__name__)

UNFINISHED = ".unfinished"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
INDICES = tuple(f"{name}.index.json" for name in WEIGHTS)
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
README = "README.md"
# What generated cards have: transformers' and TRL's tag, and text of PEFT's blank one.
GENERATED = "generated_from_trainer"
_BLANK = "[More Information Needed]"


class SavingTrainer(Trainer):
    """transformers' Trainer, whose models are complete or absent."""

    # Where a checkpoint is written before it is put in place; None: none is being written.
    _staging: Path | None = None
    # The command that makes a model of what was saved last; None: it is a model.
    joining_command: str | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A model, or adapter, that from_pretrained loads; every rank of a sharded run calls it.

        Under ZeRO-3 without `stage3_gather_16bit_weights_on_model_save` a whole model stays in
        shards, and `joining_command` says how to join them.
        """
        folder = Path(output_dir or self.args.output_dir or ".")
        self.joining_command = None
        engine = getattr(self, "deepspeed", None)
        if engine is not None and zero.is_partitioned(engine.module):
            self._save_partitioned(engine, folder, _internal_call)
            return
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or self._staging is not None:
            super().save_model(output_dir, _internal_call)
            return
        # With sharded checkpoints Trainer would write nothing.
        from torch.distributed.fsdp import StateDictType

        kind, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = kind

    def _save_partitioned(self, engine: Any, folder: Path, is_internal: bool) -> None:
        model: Any = self.accelerator.unwrap_model(self.model)
        if is_peft_model(model):
            base = {id(parameter) for _, parameter in base_parameters(model)}
            # Frozen weights of the adapter too, which DeepSpeed would leave out.
            self._save(str(folder), zero.gathered(model, without=base))
        elif engine.zero_gather_16bit_weights_on_model_save():
            self._save(str(folder), self.accelerator.get_state_dict(engine))
        else:
            self._save_shards(engine, folder)
        if self.args.push_to_hub and not is_internal:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_shards(self, engine: Any, folder: Path) -> None:
        self._save(str(folder), state_dict={})
        if self.args.should_save:
            # What was just written has no weights inside.
            for name in WEIGHTS:
                (folder / name).unlink(missing_ok=True)
        if self._staging is not None and not self.args.save_only_model:
            # The checkpoint's state has them.
            return
        engine.save_checkpoint(str(folder))
        if self._staging is None:
            self.joining_command = zero.joining_command(folder)
            if self.args.should_save:
                logger.warning(
                    "%s holds the model in ZeRO-3's shards, which from_pretrained does not load. "
                    "This joins them: %s (or set stage3_gather_16bit_weights_on_model_save)",
                    folder,
                    self.joining_command,
                )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir or ".")
        if self._staging is not None or not self.args.should_save:
            self._save_into(str(folder), state_dict)
            return
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{UNFINISHED}-model"
        remove(temporary)
        temporary.mkdir()
        # PEFT extends a card that is there already, and replaces its tags.
        card = folder / README
        if card.exists() and not is_generated(card):
            (temporary / card.name).write_bytes(card.read_bytes())
        self._save_into(str(temporary), state_dict)
        sync(temporary)
        written = [path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file()]
        _remove_other_weights(folder, written)
        _set_other_base_aside(folder, temporary, written)
        for path in written:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (temporary / path).replace(folder / path)
        remove(temporary)

    def _save_into(self, folder: str, state_dict: Any) -> None:
        """Write all files of a model into a folder that no one reads yet."""
        super()._save(folder, state_dict)


def is_generated(path: Path) -> bool:
    """Whether a card is a trainer's, or PEFT's blank one: such a card may be replaced."""
    text = path.read_text("utf-8", errors="replace")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    if head is not None and GENERATED in head.group(1):
        return True
    # Someone who fills PEFT's card in leaves fewer of these.
    blank = ModelCard.from_template(ModelCardData()).text
    return text.count(_BLANK) >= blank.count(_BLANK)


def _remove_other_weights(folder: Path, written: Iterable[Path]) -> None:
    """Delete files of an earlier save that would be read first: other parts, another adapter."""
    new = {path.name for path in written if path.parent == Path()}
    for stems in ("model|pytorch_model", "adapter_model"):
        weights = re.compile(rf"({stems})(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
        is_new = any(weights.fullmatch(name) for name in new)
        is_behind = stems == "adapter_model" and _is_behind_an_adapter(folder, written)
        if not (is_new or is_behind):
            continue
        if is_behind:
            logger.warning("%s held an adapter, which would be loaded: it is deleted", folder)
            (folder / ADAPTER_CONFIG).unlink()
        for path in folder.iterdir():
            if weights.fullmatch(path.name) and path.name not in new:
                path.unlink()


def _is_behind_an_adapter(folder: Path, written: Iterable[Path]) -> bool:
    """Whether an adapter of an earlier save would be loaded in place of the new files."""
    weights = {*WEIGHTS, *ADAPTERS, *INDICES}
    is_model = any(path.name in weights for path in written)
    has_adapter = (folder / ADAPTER_CONFIG).exists()
    return is_model and has_adapter and Path(ADAPTER_CONFIG) not in written


def _set_other_base_aside(folder: Path, temporary: Path, written: Iterable[Path]) -> None:
    """Rename an earlier model's config when an adapter of another base is saved in its folder.

    transformers takes a model next to an adapter for its base, whatever base the adapter names. The
    model's weights stay: they may be the result of a training.
    """
    config = folder / CONFIG
    adapters = [path for path in written if path.name == ADAPTER_CONFIG]
    if not adapters or not config.exists() or Path(CONFIG) in written:
        return
    base = json.loads((temporary / adapters[0]).read_text()).get("base_model_name_or_path")
    if base and Path(base).resolve() != folder.resolve():
        aside = folder / f"{CONFIG}.earlier"
        config.replace(aside)
        logger.warning(
            "%s holds a model that is not %s, the base of the adapter that is saved there: its "
            "config.json is renamed to %s, so that it is not loaded in its place",
            folder,
            base,
            aside.name,
        )
