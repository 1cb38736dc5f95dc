"""Runs under FSDP on two ranks, started by torchrun; each rank saves what it saw.

The ranks are gloo processes on a CPU, which torch shards like GPUs and Accelerate refuses by one
test: `fsdp_on_cpus` makes that test pass, and nothing else of Accelerate is changed. The settings
are environment variables, as `accelerate launch` sets them. One process gets the same pairs in the
same order, as joint batches (`outcome_of` with one rank).
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate.state
import datasets
import peft
import pytest
import torch
from accelerate.utils import DistributedType

from prefkern import PreferenceTrainer
from prefkern.cli import __main__ as cli
from prefkern.models import transform
from prefkern.models.heads import unwrap
from prefkern.training.checkpoint_files import CheckpointError
from support import tiny
from support.adapters import lora as adapter
from support.adapters import trained
from support.command_line import flags
from support.ddp import MismatchedByRank, single_rows_by_rank, torchrun
from support.reference_sums import sums
from support.resumed import logs_of, run_of
from support.training import made, step_logs, trainer
from support.versions import WHOLE_ADAPTERS

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_SYNC_MODULE_STATES": "false",
    "FSDP_USE_ORIG_PARAMS": "true",
}
VERSIONS = {
    1: {"FSDP_VERSION": "1", "FSDP_RESHARD_AFTER_FORWARD": "FULL_SHARD"},
    2: {"FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"},
}


def taken_for_gpus() -> None:
    """Let Accelerate spread a model over gloo ranks on a CPU; it does that on GPUs alone."""
    plain = accelerate.state.AcceleratorState.__init__

    def init(self, *args: Any, **kwargs: Any) -> None:
        if not accelerate.state.PartialState._shared_state:
            accelerate.state.PartialState(True)
        shared = accelerate.state.PartialState._shared_state
        if shared.get("distributed_type") == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU
        plain(self, *args, **kwargs)

    accelerate.state.AcceleratorState.__init__ = init


def fsdp_on_cpus() -> None:
    """Let Accelerate shard over gloo ranks on a CPU."""
    taken_for_gpus()
    if os.environ["FSDP_VERSION"] == "1":
        # Accelerate hands over the device "cpu:0", which FSDP1 does not know.
        from torch.distributed.fsdp import FullyShardedDataParallel

        wrap = FullyShardedDataParallel.__init__

        def wrapped(self, module, *args: Any, **kwargs: Any) -> None:
            wrap(self, module, *args, **{**kwargs, "device_id": torch.device("cpu")})

        FullyShardedDataParallel.__init__ = wrapped


def lora(**options) -> peft.LoraConfig:
    options = {"target_modules": ["q_proj", "v_proj", "up_proj"], **options}
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)


def carried() -> datasets.Dataset:
    """Pairs with sums of some reference."""
    rows = [
        {**row, "ref_chosen_logps": -10.0 - i, "ref_rejected_logps": -12.0 + i}
        for i, row in enumerate(tiny.pairs(8))
    ]
    return made(rows)


def tied(seed: int = 0):
    return tiny.model(seed=seed, tie_word_embeddings=True)


def adapted(**options):
    """A model with a second, frozen adapter, whose name the reference goes by."""
    model = peft.get_peft_model(tiny.model(), lora(**options))
    model.add_adapter("reference", lora(init_lora_weights=False, **options))
    return model


def half_frozen():
    """A model with an adapter whose first factors stay as they are."""
    model = peft.get_peft_model(tiny.model(), lora(target_modules=["q_proj", "lm_head"]))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
    return model


TDPO = {"objective": "tdpo2"}
SUMS = {"precompute_ref_log_probs": True}
# Evaluated before training as well; the ranks' last batch is uneven.
FIRST = {
    "eval_dataset": tiny.dataset(5, seed=3),
    "per_device_eval_batch_size": 2,
    "first": True,
}
# Beside these options each run has 8 pairs and a joint batch of 4.
CASES = {
    "full, none": lambda: {"objective": "simpo"},
    "full, carried": lambda: {"train_dataset": carried()},
    "lora, none": lambda: {"objective": "simpo", "peft_config": lora()},
    "lora, carried": lambda: {"train_dataset": carried(), "peft_config": lora()},
    "lora, adapter off": lambda: {"peft_config": lora()},
    "lora, adapter off, bf16": lambda: {"peft_config": lora(), "bf16": True},
    "lora, tied head": lambda: {"model": tied(), "peft_config": lora()},
    "lora on the head": lambda: {"peft_config": lora(target_modules=["q_proj", "lm_head"])},
    "lora, whole head": lambda: {"peft_config": lora(modules_to_save=["lm_head"])},
    "lora, whole head, bf16": lambda: {
        "peft_config": lora(modules_to_save=["lm_head"]),
        "bf16": True,
    },
    "another adapter": lambda: {
        "model": adapted(modules_to_save=["lm_head"]),
        "ref_adapter_name": "reference",
    },
    "half frozen": lambda: {"model": half_frozen()},
    "full, precomputed": lambda: {**SUMS, "eval_dataset": {"one": tiny.dataset(5, seed=3)}},
    "full, precomputed, bf16": lambda: {**SUMS, "bf16": True},
    "full, tied head, precomputed": lambda: {**SUMS, "model": tied()},
    "lora, precomputed": lambda: {**SUMS, "peft_config": lora()},
    "lora, precomputed, bf16": lambda: {**SUMS, "peft_config": lora(), "bf16": True},
    "trained adapter, precomputed": lambda: {**SUMS, "model": trained()},
    "full, reference": lambda: {"ref_model": tiny.model(seed=1)},
    "full, copy, bf16": lambda: {"bf16": True},
    "full, reference, precomputed": lambda: {**SUMS, "ref_model": tiny.model(seed=1)},
    "full, reference, evaluated first": lambda: {
        **FIRST,
        "ref_model": tiny.model(seed=1),
        "learning_rate": 0.02,
    },
    "lora, none, bf16, evaluated first": lambda: {
        **FIRST,
        "objective": "simpo",
        "peft_config": lora(),
        "bf16": True,
    },
    "trained adapter, evaluated first": lambda: {**FIRST, "model": trained()},
    "lora, precomputed, evaluated first": lambda: {**FIRST, **SUMS, "peft_config": lora()},
    # A reference of another family is sharded by layers of its own.
    "lora, reference, evaluated": lambda: {
        "ref_model": tiny.model("Gemma2", seed=1),
        "peft_config": lora(),
        "eval_dataset": tiny.dataset(5, seed=2),
        "per_device_eval_batch_size": 1,
    },
    "lora, reference, bf16": lambda: {
        "model": tiny.model().bfloat16(),
        "ref_model": tiny.model().bfloat16(),
        "peft_config": lora(),
        "bf16": True,
    },
    "trained adapter": lambda: {"model": trained()},
    "trained adapter, whole head, checkpointed, bf16": lambda: {
        "model": trained(adapter(modules_to_save=["lm_head"])),
        "bf16": True,
        "gradient_checkpointing": True,
    },
    "tdpo, adapter off": lambda: {**TDPO, "peft_config": lora()},
    "tdpo, adapter off, tied head": lambda: {**TDPO, "model": tied(), "peft_config": lora()},
    "tdpo, adapter off, lora on the head": lambda: {
        **TDPO,
        "peft_config": lora(target_modules=["q_proj", "lm_head"]),
    },
    "tdpo, adapter off, whole head, bf16": lambda: {
        **TDPO,
        "peft_config": lora(modules_to_save=["lm_head"]),
        "bf16": True,
    },
    "tdpo, trained adapter, whole head": lambda: {
        **TDPO,
        "model": trained(adapter(modules_to_save=["lm_head"])),
    },
    "tdpo, reference": lambda: {**TDPO, "ref_model": tiny.model(seed=1)},
    "tdpo, reference, packed, checkpointed": lambda: {
        **TDPO,
        "ref_model": tiny.model(seed=1),
        "peft_config": lora(),
        "padding_free": True,
        "gradient_checkpointing": True,
    },
    "tdpo, copy, bf16": lambda: {**TDPO, "bf16": True},
    # Between this policy and this reference KTO's reference point is above 0.
    "kto": lambda: {
        "objective": "kto",
        "model": tiny.model(seed=1),
        "ref_model": tiny.model(),
        "train_dataset": single_rows_by_rank(),
        "train_sampling_strategy": "sequential",
        "joint": {"data_collator": MismatchedByRank(0)},
    },
    "statistics": lambda: {"objective": "alphadpo", "objective_options": {"alpha": 0.5}},
    "draws": lambda: {
        "objective": "betadpo",
        "objective_options": {"keep": 0.5},
        "ref_model": tiny.model(seed=1),
    },
    "lora, checkpointed, packed, accumulated, clipped": lambda: {
        "peft_config": lora(),
        "gradient_checkpointing": True,
        "padding_free": True,
        "accumulated": 2,
        "max_grad_norm": 0.05,
    },
    "full, copy, checkpointed, packed, accumulated, clipped": lambda: {
        "gradient_checkpointing": True,
        "padding_free": True,
        "accumulated": 2,
        "max_grad_norm": 0.05,
    },
}
EFFICIENT = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
# A tied head inside of an adapter, which Accelerate and transformers do not see, and settings of the
# launch that change what is gathered and who loads.
SETTINGS_CASES = {
    "whole tied head": lambda: {"model": tied(), "peft_config": lora(modules_to_save=["lm_head"])},
    "tdpo, whole tied embedding": lambda: {
        **TDPO,
        "model": tied(),
        "peft_config": lora(modules_to_save=["embed_tokens"]),
        "settings": EFFICIENT,
    },
    "trained adapter, whole tied head, one rank loads": lambda: {
        **FIRST,
        "model": trained(adapter(modules_to_save=["lm_head"]), tied()),
        "settings": EFFICIENT,
    },
    "lora on a tied head, reference with a whole one, one rank loads": lambda: {
        "model": tied(),
        "ref_model": trained(adapter(modules_to_save=["lm_head"]), tied()),
        "peft_config": lora(target_modules=["q_proj", "lm_head"]),
        "settings": EFFICIENT,
    },
    "tdpo, reference, layers stay gathered": lambda: {
        **TDPO,
        "ref_model": tiny.model(seed=1),
        "accumulated": 2,
        "settings": {"FSDP_RESHARD_AFTER_FORWARD": "false"},
    },
}
# What these go through others go through as well.
LONG = (
    "full, none",
    "lora, none",
    "lora, carried",
    "lora, tied head",
    "lora, precomputed",
    "full, reference",
    "lora, reference, bf16",
    "statistics",
    "draws",
)


def weights_and_gradients(model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Of every trained parameter, whole, by its name in one process."""
    from contextlib import nullcontext

    from torch.distributed.fsdp import FullyShardedDataParallel

    whole: Any = nullcontext()
    if isinstance(model, FullyShardedDataParallel):
        whole = FullyShardedDataParallel.summon_full_params(model, with_grads=True, writeback=False)
    found: dict[str, dict[str, torch.Tensor]] = {"weights": {}, "gradients": {}}
    with whole:
        for name, parameter in model.named_parameters():
            for prefix in ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module."):
                name = name.replace(prefix, "")
            if parameter.requires_grad:
                values = {"weights": parameter.detach(), "gradients": parameter.grad}
                for kind, value in values.items():
                    if value is not None:
                        value = value.full_tensor() if hasattr(value, "full_tensor") else value
                        found[kind][name] = value.clone()
    return found


def record(run: Any) -> list[dict]:
    """A list that gets what `weights_and_gradients` finds before every optimiser step."""
    import transformers

    steps = []

    class Record(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **_):
            steps.append(weights_and_gradients(run.model))

    run.add_callback(Record())
    return steps


def outcome_of(path: Path, case: str, ranks: int, cases=None, record=record, **sharding) -> dict:
    """A run of two steps; `sharding` are options of the run if there are several ranks."""
    cases = {**CASES, **SETTINGS_CASES} if cases is None else cases
    options = {**cases[case](), **(sharding if ranks > 1 else {})}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.pop("settings", {}).items():
            patch.setenv(name, value)
        return _outcome_with(path, case, ranks, options, record)


def _outcome_with(path: Path, case: str, ranks: int, options: dict, record: Callable) -> dict:
    accumulated, joint = options.pop("accumulated", 1), options.pop("joint", {})
    is_evaluated_first = options.pop("first", False)
    sizes = {"per_device_train_batch_size": 4 // ranks // accumulated}
    sizes["gradient_accumulation_steps"] = accumulated
    if ranks == 1:
        sizes = {"per_device_train_batch_size": 4, **joint}
    run = trainer(
        path,
        **{
            "count": 8,
            "save_strategy": "no",
            "optim": "sgd",
            # Large enough for the second step's gradients to depend on the first's.
            "learning_rate": 0.1,
            "max_grad_norm": 0.0,
            "model": None,
            **sizes,
            **options,
        },
    )
    steps = record(run)
    first = [run.evaluate()] if is_evaluated_first else []
    run.train()
    assert run.args.world_size == ranks
    assert (run.is_fsdp_enabled or run.is_deepspeed_enabled) == (ranks > 1)
    evaluated = [run.evaluate()] if "eval_dataset" in options else []
    own = ("adapter off", "precomputed", "copy", "reference, bf16", "trained adapter")
    is_own = any(name in case for name in own) and "reference, precomputed" not in case
    reference = () if run.ref_model is None or ranks == 1 else run.ref_model.named_parameters()
    meshes = {p.device_mesh for p in run.model.parameters() if hasattr(p, "device_mesh")}
    return {
        "steps": steps,
        "logs": [*step_logs(run), *evaluated, *first],
        "is_own_reference": is_own,
        "gathered": [name for name, p in reference if not hasattr(p, "device_mesh")],
        "mesh": next((tuple(mesh.shape) for mesh in meshes), None),
    }


def _found_again(path: Path) -> dict:
    """Two runs of one cache: how often each computed sums, and the sums."""
    made = {"batches": [], "probed": [], "sums": [], "losses": []}
    for _ in range(2):
        computed = []
        with pytest.MonkeyPatch.context() as patch:
            plain = PreferenceTrainer._reference_logps

            def counting(self, inputs, computed=computed, plain=plain):
                computed.append(1)
                return plain(self, inputs)

            patch.setattr(PreferenceTrainer, "_reference_logps", counting)
            run = trainer(path, peft_config=lora(), padding_free=True, bf16=True, **SUMS)
        made["batches"].append(len(computed))
        made["probed"].append(transform._PROBED in vars(unwrap(run.model)))
        run.train()
        made["sums"].append(sums(run.train_dataset))
        made["losses"].append(step_logs(run)[0]["loss"])
    return made


def _later(path: Path) -> list[float | str]:
    """Evaluation of datasets that come after training."""
    return [later(path, case) for case in LATER]


LATER = {
    "full": dict,
    "lora": lambda: {"peft_config": lora()},
    "trained adapter": lambda: {"model": trained()},
}


def later(path: Path, case: str, **sizes: int) -> float | str:
    """The loss, or why there is none."""
    run = trainer(path, **{"per_device_train_batch_size": 2, **SUMS, **LATER[case](), **sizes})
    run.train()
    try:
        return run.evaluate(tiny.dataset(4, seed=4))["eval_loss"]
    except ValueError as error:
        return str(error)


COMMANDS = {
    "full": {"objective": "dpo"},
    "lora": {"objective": "dpo", "lora_r": 4},
    "precomputed": {"objective": "dpo", "precompute_ref_log_probs": True, "bf16": True},
}


def command(path: Path, name: str, **given) -> list[str]:
    """The arguments of a run on the model and the pairs in `path`, with checkpoints."""
    options = {
        "model_name_or_path": path / "model",
        "dataset": path / "pairs.jsonl",
        "output_dir": path / name,
        "ref_cache_dir": path / "sums",
        "use_cpu": True,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "report_to": "none",
        **COMMANDS[name],
        **given,
    }
    if name != "precomputed":
        options.pop("ref_cache_dir")
    return flags(options)


def _commands(path: Path) -> dict:
    """`prefkern train` as `accelerate launch` sets it up: sharded checkpoints, loaded by one rank."""
    path = path.parent
    made = {}
    defaults = {
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in defaults.items():
            patch.setenv(name, value)
        for name in COMMANDS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                status = cli.main(["train", *command(path, name)])
            made[name] = (status, out.getvalue())
    return made


def _resumed(path: Path) -> dict:
    """Runs that save after each step, and others that go on from the third, by kind of checkpoint."""
    made = {}
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        for case in ("alphadpo", "betadpo"):
            found = []
            for resumes in (False, True):
                options = {"save_strategy": "no"} if resumes else {}
                folder = path / kind / case
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("FSDP_STATE_DICT_TYPE", kind)
                    run = run_of(folder, case, eval_strategy="no", **options)
                run.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumes else None)
                steps = run.state.global_step
                whole = weights_and_gradients(run.model)["weights"]
                found.append({"steps": steps, "weights": whole, "logs": logs_of(run)})
            made[kind, case] = found
    return made


def _other_kind(path: Path) -> list[str]:
    """Why checkpoints are refused that were saved otherwise than this run saves them."""
    saves = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    if not WHOLE_ADAPTERS.is_too_old:
        saves["peft_config"] = lora()
    made = []
    kinds = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]
    for kind, other in (kinds, kinds[::-1]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("FSDP_STATE_DICT_TYPE", kind)
            trainer(path / kind, **saves).train()
            patch.setenv("FSDP_STATE_DICT_TYPE", other)
            run = trainer(path / kind, **saves)
            with pytest.raises(CheckpointError) as raised:
                run.train(resume_from_checkpoint=True)
        made.append(str(raised.value))
    return made


def _refused(path: Path) -> str:
    with pytest.raises(ValueError) as raised:
        trainer(path, model="no/model", peft_config=lora())
    return str(raised.value)


# By name; each is a run of its own on both ranks. The first are of FSDP2, the last is of FSDP1.
OTHERS = {
    "found again": _found_again,
    "later": _later,
    "commands": _commands,
    "other kind": _other_kind,
    "resumed": _resumed,
    "refused": _refused,
}


def launch(
    folder: Path, version: int, *names: str, module: str = "fsdp", count: int = 2, **settings: str
) -> None:
    """Run these cases on ranks; each leaves what it saw in `folder`/rank0.pt, rank1.pt, ...

    Args:
        folder: of the runs.
        version: of FSDP.
        names: of the cases.
        module: of this folder; it calls `run_cases`.
        count: how many ranks.
        settings: environment variables.
    """
    given = {**SETTINGS, **VERSIONS[version], **settings}
    torchrun(f"support.{module}", str(folder), *names, count=count, **given)


def run_cases(outcome: Callable[[Path, str, int], Any]) -> None:
    """What a rank does: `outcome(folder, case, ranks)` of each case, saved."""
    torch.set_num_threads(1)
    fsdp_on_cpus()
    folder, ranks = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
    outcomes = {}
    for case in sys.argv[2:]:
        outcomes[case] = outcome(folder, case, ranks)
        # A case may read what rank 0 has written in the one before.
        torch.distributed.barrier()
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()


def _outcome(folder: Path, case: str, ranks: int) -> Any:
    if case in OTHERS:
        return OTHERS[case](folder / case)
    return outcome_of(folder / case, case, ranks)


if __name__ == "__main__":
    run_cases(_outcome)
