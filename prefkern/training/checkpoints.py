"""Checkpoints that are either complete or absent, and are checked before a run resumes from one.

transformers writes a checkpoint file by file into the folder with its name, and resumes from the
folder with the largest number, complete or not. A run that is killed while it saves then cannot
resume, or resumes with a new optimiser. Here a checkpoint is written to

    <output_dir>/.unfinished/checkpoint-N      and renamed to
    <output_dir>/checkpoint-N                  once every rank has written its part.

Only then are older ones deleted. If an earlier run left a folder of that name, the finished one
waits under `.finished` until the old one is deleted; after a kill in between, the next run
completes that.

Before a run resumes, it opens every file of the checkpoint that it will read (without executing
anything, and without reading the numbers). `resume_from_checkpoint=True` skips folders with a
damaged file, with a warning that names it; a folder given by name is refused. The names and shapes
of its weights are compared with the model's: transformers would load those that fit, and only log
the rest. For mixtures of experts that left out the experts, whose weights are saved under other
names.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from prefkern.models.adapters import is_peft_model
from prefkern.models.own_reference import switches_put_back
from prefkern.training import fsdp_files, zero
from prefkern.training.checkpoint_files import (
    STATE,
    CheckpointError,
    checkpoints_of,
    delete_oldest,
    keeps_state_in_folders,
    last_complete,
    put_in_place,
    read_tensors,
    require_complete,
    take_places,
)
from prefkern.training.files import remove, replacing, write_json
from prefkern.training.finished import OF_STEPS, Progress
from prefkern.training.saving import (
    ADAPTER_CONFIG,
    ADAPTERS,
    UNFINISHED,
    WEIGHTS,
    SavingTrainer,
)
from prefkern.training.tensor_parallel import size_of
from prefkern.training.unsaved import Fingerprints, save_fingerprints, warn_of_others

logger = logging.getLogger(__name__)

# Settings that scale a LoRA adapter and are not among its weights.
_ADAPTER_SETTINGS = ("r", "lora_alpha", "use_rslora", "alpha_pattern")


class CheckpointTrainer(SavingTrainer):
    """transformers' Trainer, with checkpoints and models that are complete or absent."""

    _to_push: Path | None = None
    _resumed_from: Path | None = None
    # That of the checkpoint that the run was resumed from.
    _progress: Progress | None = None
    # Of weights that checkpoints do not hold.
    _unsaved: Fingerprints | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any):
        """As Trainer's; True resumes from the last checkpoint that is complete.

        A finished run that is resumed takes no step. Its result has the loss NaN, and no metrics of
        steps.

        Raises CheckpointError for a checkpoint that is incomplete, damaged or of another model, and
        if checkpoints would not hold the adapter.
        """
        if resume_from_checkpoint and size_of(self.model) > 1:
            raise ValueError(
                "resuming is not supported under tensor parallelism, whose checkpoints are of weights "
                "alone: give the checkpoint's folder as the model to train its weights on"
            )
        self._check_adapters_are_kept(bool(resume_from_checkpoint))
        folder = Path(self.args.output_dir or ".")
        if self.args.should_save:
            take_places(folder)
        self.accelerator.wait_for_everyone()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete(folder))
        elif resume_from_checkpoint:
            require_complete(Path(resume_from_checkpoint))
        elif self.args.should_save and self.args.save_strategy != "no" and checkpoints_of(folder):
            logger.warning(
                "%s holds checkpoints of an earlier run (%s), and this one starts anew: resuming "
                "would take the largest number of either. Give it another output_dir, or delete "
                "them",
                folder,
                ", ".join(each.name for each in checkpoints_of(folder)),
            )
        self._resumed_from = Path(resume_from_checkpoint) if resume_from_checkpoint else None
        self._progress = None
        if self._resumed_from is not None:
            _check_ranks(self._resumed_from, self.args)
            _warn_of_weights_alone(self._resumed_from)
            warn_of_others(self._unsaved or {}, self._resumed_from)
            self._progress = Progress.of(self._resumed_from / STATE)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        if not self._is_over():
            return output
        logger.warning(
            "%s is the end of a finished run (step %d of %d): nothing was trained. To train on, raise "
            "max_steps or num_train_epochs, or the patience of early stopping",
            self._resumed_from,
            self.state.global_step,
            self.state.max_steps,
        )
        return output._replace(training_loss=math.nan)

    def _check_adapters_are_kept(self, resumes: bool) -> None:
        """Raise CheckpointError if FSDP2 would write or read checkpoints without the adapter."""
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        keeps = resumes or self.args.save_strategy != "no"
        if plugin is None or plugin.fsdp_version != 2 or self.args.world_size == 1:
            return
        if not keeps or not is_peft_model(self.model):
            return
        problem = fsdp_files.adapter_problem(plugin.state_dict_type.name)
        if problem is not None:
            raise CheckpointError(problem)

    def _is_over(self) -> bool:
        """Whether the run was resumed where it had finished."""
        progress = self._progress
        if progress is None or self.state.global_step > progress.steps:
            return False
        return progress.is_over(self.state, self.callback_handler.callbacks)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Trainer takes a step before it looks whether one is left.
        if self._is_over():
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, but no loss and no speed of a run that took no step."""
        if "train_loss" in logs and self._is_over():
            for name in OF_STEPS:
                logs.pop(name, None)
        super().log(logs, start_time)

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(super()._get_output_dir(trial))
        writes = self.args.should_save
        if writes:
            take_places(folder)
            remove(folder / UNFINISHED)
            # Every rank looks whether it is there, and takes it for the best checkpoint; of a
            # sharded model nothing is in it by then.
            (folder / UNFINISHED / f"checkpoint-{self.state.global_step}").mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self._staging, self._to_push = folder / UNFINISHED, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            staging, self._staging = self._staging, None
        self.accelerator.wait_for_everyone()
        name = f"checkpoint-{self.state.global_step}"
        best = self.state.best_model_checkpoint
        if best is not None and Path(best) == staging / name:
            self.state.best_model_checkpoint = str(folder / name)
            if writes:
                self.state.save_to_json(str(staging / name / STATE))
        if writes:
            put_in_place(staging / name, folder)
        self.accelerator.wait_for_everyone()
        if self._to_push is not None:
            super()._push_from_checkpoint(str(folder / name))
        if writes:
            kept = [folder / name, Path(self.state.best_model_checkpoint or folder / name)]
            delete_oldest(folder, self.args.save_total_limit, kept)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # With a limit of 1 Trainer would delete the last checkpoint and keep the best alone: the
        # run, resumed, would take the steps after that once more.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.args.save_total_limit = limit

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs in the background: start it at the checkpoint's final place.
        self._to_push = Path(checkpoint_folder)

    def save_state(self) -> None:
        """Trainer's state in the output folder."""
        if self.is_world_process_zero():
            with replacing(Path(self.args.output_dir or ".") / STATE) as temporary:
                self.state.save_to_json(str(temporary))

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Metrics as `<split>_results.json`, and, combined, added to `all_results.json`."""
        if not self.is_world_process_zero():
            return
        folder = Path(self.args.output_dir or ".")
        write_json(folder / f"{split}_results.json", metrics, indent=4, sort_keys=True)
        if combined:
            path = folder / "all_results.json"
            earlier = json.loads(path.read_text()) if path.exists() else {}
            write_json(path, {**earlier, **metrics}, indent=4, sort_keys=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save and self._unsaved:
            save_fingerprints(self._unsaved, output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        kind = "" if plugin is None else plugin.state_dict_type.name
        wrong = fsdp_files.other_kind(Path(resume_from_checkpoint), kind)
        if wrong is not None:
            raise CheckpointError(wrong)
        # Loading an adapter would make its frozen weights trainable.
        with switches_put_back(self.model):  # pyright: ignore[reportArgumentType]
            if not self._load_converted(Path(resume_from_checkpoint), model):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
                self._load_default(Path(resume_from_checkpoint))

    def _load_callback_state(self) -> None:
        # Trainer has just read its state, and dropped a best checkpoint whose path does not exist
        # here: the folder may be spelt differently, or have been moved.
        super()._load_callback_state()
        if self._resumed_from is not None:
            state = json.loads((self._resumed_from / STATE).read_text(encoding="utf-8"))
            best = state["best_model_checkpoint"]
            if best is not None and not Path(best).is_dir():
                beside = self._resumed_from.parent / Path(best).name
                if beside.is_dir():
                    self.state.best_model_checkpoint = str(beside)
                    logger.warning("%s is taken for the best checkpoint, %s", beside, best)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        folder = Path(self.state.best_model_checkpoint)
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder}, the best checkpoint, is gone, so that load_best_model_at_end cannot load "
                "it: the model is that of the last step"
            )
        with switches_put_back(self.model):  # pyright: ignore[reportArgumentType]
            if not (self._load_converted(folder) or self._load_adapters(folder)):
                super()._load_best_model()

    def _load_adapters(self, folder: Path) -> bool:
        """Load the active adapters if one has its own folder, where Trainer does not look."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        model = self.accelerator.unwrap_model(self.model)
        if not hasattr(model, "peft_config"):
            return False
        folders = [_of_adapter(name, folder) for name in model.active_adapters]
        if all(each == folder for each in folders):
            return False
        for name, each in zip(model.active_adapters, folders, strict=True):
            model.load_adapter(str(each), name, is_trainable=True)
        return True

    def _load_default(self, folder: Path) -> None:
        """Load the adapter "default" where others lie beside it, of which Trainer loads those alone
        in transformers before 5.23.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return
        model = self.accelerator.unwrap_model(self.model)
        names = getattr(model, "peft_config", {}).keys()
        if "default" in names and any((folder / name).is_dir() for name in names):
            model.load_adapter(
                str(folder), "default", is_trainable="default" in model.active_adapters
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            _warn_of_other_ranks(Path(checkpoint), self.args.world_size)
        super()._load_rng_state(checkpoint)

    def _load_converted(self, folder: Path, model: Any = None) -> bool:
        """Compare a checkpoint's weights with the model's, and load them if Trainer cannot.

        Raises CheckpointError for weights of another model.
        """
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        model = self.accelerator.unwrap_model(self.model if model is None else model)
        if hasattr(model, "peft_config"):
            for name in model.active_adapters:
                _check_adapter(folder, model, name)
            return False
        expected = {name: list(value.shape) for name, value in model.state_dict().items()}
        found = _shapes(folder, WEIGHTS)
        if not found:
            what = "an adapter" if _shapes(folder, ADAPTERS) else "no weights"
            raise CheckpointError(
                f"{folder} holds {what}, and the model is a {type(model).__name__} without an "
                "adapter: resume with the peft_config (--lora_r) that it was trained with"
            )
        if _is_same(model, expected, found):
            return False
        # Saved under other names, as experts are: from_pretrained can read them. Float32 holds
        # every value of a narrower dtype.
        load = type(model).from_pretrained
        try:
            loaded, info = load(folder, dtype=torch.float32, output_loading_info=True)
            wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
            shapes = {name: list(value.shape) for name, value in loaded.state_dict().items()}
        except (RuntimeError, OSError, ValueError) as error:
            raise _of_another_model(folder, model, expected, found) from error
        if wrong or shapes != expected:
            raise _of_another_model(folder, model, expected, found)
        model.load_state_dict(loaded.state_dict())
        return True


def _shapes(folder: Path, files: Iterable[str]) -> dict[str, list[int]]:
    """The shapes of a checkpoint's weights, by name, from the first of these files that it has."""
    for name in files:
        index = folder / f"{name}.index.json"
        if (folder / name).exists():
            paths = [folder / name]
        elif index.exists():
            paths = [
                folder / part for part in {*json.loads(index.read_text())["weight_map"].values()}
            ]
        else:
            continue
        shapes: dict[str, list[int]] = {}
        for path in paths:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as opened:
                    names: list[str] = list(opened.keys())
                    shapes |= {name: opened.get_slice(name).get_shape() for name in names}
            else:
                shapes |= {key: list(value.shape) for key, value in read_tensors(path).items()}
        return shapes
    return {}


def _is_same(model: nn.Module, expected: dict[str, list[int]], found: dict[str, list[int]]) -> bool:
    if any(expected.get(name) != shape for name, shape in found.items()):
        return False
    state = model.state_dict()
    held = {state[name].data_ptr() for name in found}
    # Only one of two tied weights is saved.
    return all(name in found or state[name].data_ptr() in held for name in expected)


def _of_another_model(
    folder: Path, model: nn.Module, expected: dict[str, list[int]], found: dict[str, list[int]]
) -> CheckpointError:
    differing = [name for name in found if expected.get(name) != found[name]]
    name = next(iter(differing or [name for name in expected if name not in found]))
    return CheckpointError(
        f"{folder} is of another model than this {type(model).__name__}: {name} has shape "
        f"{found.get(name, 'none')} there and {expected.get(name, 'none')} here; resume with the "
        "model that the run began with"
    )


def _of_adapter(name: str, folder: Path) -> Path:
    """The folder of an adapter in a checkpoint: its own, unless the adapter is called "default"."""
    return folder / name if (folder / name).is_dir() else folder


def _check_adapter(folder: Path, model: Any, active: str) -> None:
    """Raise CheckpointError if there is no adapter, or one that does not fit the model's."""
    from peft import get_peft_model_state_dict

    own = _of_adapter(active, folder)
    found = _shapes(own, ADAPTERS)
    if not found:
        what = "a whole model" if _shapes(folder, WEIGHTS) else "no adapter"
        raise CheckpointError(
            f"{own} holds {what}, and the model has an adapter ({active!r}): resume without "
            "peft_config (--lora_r 0), as it was trained"
        )
    weights = get_peft_model_state_dict(model, adapter_name=active, save_embedding_layers=False)
    expected = {name: list(value.shape) for name, value in weights.items()}
    prefix = getattr(model.base_model, "prefix", "")
    wrong = [name for name, shape in expected.items() if found.get(name) != shape]
    wrong += [name for name in found if name not in expected and prefix and prefix in name]
    if wrong:
        raise CheckpointError(
            f"{own} holds another adapter than {active!r} of this model: {wrong[0]} has shape "
            f"{found.get(wrong[0], 'none')} there and {expected.get(wrong[0], 'none')} here; resume "
            "with the peft_config and the model that the run began with"
        )
    config = own / ADAPTER_CONFIG
    saved = json.loads(config.read_text()) if config.exists() else {}
    for name in _ADAPTER_SETTINGS:
        ours = getattr(model.peft_config[active], name, None)
        if name in saved and ours is not None and saved[name] != ours:
            raise CheckpointError(
                f"{config}: {name} is {saved[name]!r} there and {ours!r} here; resume with the "
                "peft_config that the run began with"
            )


def _check_ranks(checkpoint: Path, args: Any) -> None:
    """Raise CheckpointError for DeepSpeed's parts of another number of processes."""
    saved = zero.saved_by(checkpoint) if zero.configuration(args) is not None else None
    if saved not in (None, args.world_size):
        raise CheckpointError(
            f"{checkpoint} was saved by {saved} processes and is resumed by {args.world_size}, and "
            f"DeepSpeed does not share out its optimizer's state anew: resume with {saved}"
        )


def _warn_of_other_ranks(checkpoint: Path, world_size: int) -> None:
    """Warn if the number of ranks has changed: each rank has its own random state."""
    saved = len(list(checkpoint.glob("rng_state*.pth")))
    if saved and saved != world_size:
        logger.warning(
            "%s was saved by %d processes and is resumed by %d: random states start over, so the "
            "run goes on, but not bit for bit",
            checkpoint,
            saved,
            world_size,
        )


def _warn_of_weights_alone(checkpoint: Path) -> None:
    """Warn that a resumed run starts over what save_only_model left out."""
    has_optimizer = any(path.name.startswith("optimizer") for path in checkpoint.iterdir())
    if not (has_optimizer or keeps_state_in_folders(checkpoint)):
        logger.warning(
            "%s holds weights alone (save_only_model): optimiser, learning rate schedule, random "
            "states and statistics of the objective start over, so the run goes on, but not as it "
            "would have without the interruption",
            checkpoint,
        )
