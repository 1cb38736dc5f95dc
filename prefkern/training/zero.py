"""DeepSpeed's ZeRO: its stage, what is refused of its configuration, and engines for forwards alone.

ZeRO-1 and 2 keep all weights on every rank and shard the optimizer; ZeRO-3 shards the weights too.
DeepSpeed casts the parameters of a model to bf16 or fp16 and leaves its buffers. A reference that
was cast otherwise, or not, would round at other places than the policy. So whatever computes a
reference is an engine of DeepSpeed too:

- a reference model has one for the whole run;
- sums that are computed before training come from one around the policy, which is destroyed before
  DeepSpeed makes the one that trains. The policy keeps its cast and its shards: training would make
  the same.

ZeRO-3 gathers the weights of a module when that module is called. A head is not called as a module
inside of its adapter: prefkern reads the weights of its layers. `gather_whole` has ZeRO-3 gather
all weights of a module at once.

ZeRO-3 casts a model as it loads it, and not what is added to it later. `cast_added` casts an
adapter as ZeRO-2 does.
"""

from __future__ import annotations

import copy
import zipfile
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

# Parts of a configuration that are of training alone.
_OF_TRAINING = (
    "optimizer",
    "scheduler",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "train_batch_size",
)
# In a checkpoint: the script that joins the shards, and the name of the folder that has them.
_SCRIPT, _LATEST = "zero_to_fp32.py", "latest"


def configuration(args: Any) -> dict[str, Any] | None:
    """DeepSpeed's configuration of a run, by its arguments or its launcher; None without DeepSpeed."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else plugin.deepspeed_config


def stage_of(config: dict[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def check_zero(args: Any) -> None:
    """Raise ValueError for settings of DeepSpeed that prefkern does not support."""
    config = configuration(args)
    if config is None:
        return
    for name in ("bf16_full_eval", "fp16_full_eval"):
        if getattr(args, name):
            raise ValueError(
                f"{name} is not supported under DeepSpeed, whose weights it would cast: leave it "
                "out, and set bf16"
            )
    zero = config.get("zero_optimization", {})
    for name in ("offload_param", "offload_optimizer"):
        device = (zero.get(name) or {}).get("device", "none")
        if device not in ("none", None):
            raise ValueError(
                f"DeepSpeed's {name} (here to {device!r}) is not supported yet: leave it out, and "
                "use ZeRO-3 over more processes, or LoRA"
            )
    if (config.get("torch_autocast") or {}).get("enabled"):
        raise ValueError(
            "DeepSpeed's torch_autocast is not supported, since a reference would be computed "
            "without it: leave it out, and set bf16"
        )
    if (config.get("tensor_parallel") or {}).get("autotp_size", 0) > 1:
        raise ValueError(
            "DeepSpeed's tensor_parallel is not supported: leave it out, and use ZeRO-3"
        )


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 holds a model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def cast_added(model: nn.Module, config: dict[str, Any]) -> None:
    """Cast what was added to a model that ZeRO-3 loaded in shards: adapters, copies of modules.

    DeepSpeed's optimizer takes parameters of one dtype alone: a copy of a module has the model's, a
    new adapter float32.
    """
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if (config.get(name) or {}).get("enabled") is True and is_partitioned(model):
            for parameter in model.parameters():
                if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
                    parameter.data = parameter.data.to(dtype)


def gather_whole(module: nn.Module) -> None:
    """Have ZeRO-3 gather all weights of a module, and of what is inside, when it is called.

    Call it before DeepSpeed has made an engine of the model.
    """
    from deepspeed.utils import set_z3_leaf_module  # pyright: ignore[reportMissingImports]

    set_z3_leaf_module(module, any(True for _ in module.children()))


def forward_engine(model: nn.Module, accelerator: Accelerator) -> Any:
    """An engine around a model for forwards alone, in the precision of the policy's.

    Under ZeRO-3 the model's weights are then sharded, for good; below they are whole on each rank.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]

    plugin: Any = accelerator.state.deepspeed_plugin
    config = _without_auto(copy.deepcopy(plugin.deepspeed_config))
    cast_added(model, config)
    for name in _OF_TRAINING:
        config.pop(name, None)
    zero = config["zero_optimization"]
    if zero["stage"] != 3:
        # There is nothing to shard: no gradients and no optimizer.
        config["zero_optimization"] = {"stage": 0}
    config["train_micro_batch_size_per_gpu"] = 1
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def destroy(engine: Any) -> None:
    """Take an engine for forwards off its model, which training can give another one then."""
    # What ZeRO-3 gathered last it would keep, as in use by hooks that are gone.
    engine.empty_partition_cache()
    engine.destroy()


def _without_auto(config: Any) -> Any:
    """A configuration without the entries that Trainer fills in when training begins."""
    if not isinstance(config, dict):
        return config
    return {name: _without_auto(value) for name, value in config.items() if value != "auto"}


def gathered(model: nn.Module, without: AbstractSet[int]) -> dict[str, Tensor]:
    """A model's parameters on rank 0, whole and on the CPU, but for those with these ids.

    Every rank calls it; the others get nothing.
    """
    import deepspeed  # pyright: ignore[reportMissingImports]

    state = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in without:
            continue
        with deepspeed.zero.GatheredParameters([parameter]):
            if torch.distributed.get_rank() == 0:
                state[name] = parameter.detach().cpu().clone()
    return state


def joining_command(folder: Path) -> str:
    """The command that makes a model of the shards in a folder."""
    return f"python {folder / _SCRIPT} {folder} {folder} --safe_serialization"


def saved_by(checkpoint: Path) -> int | None:
    """The processes whose parts of the optimizer's state a checkpoint has; None without DeepSpeed."""
    latest = checkpoint / _LATEST
    if not latest.exists():
        return None
    folder = checkpoint / latest.read_text(encoding="utf-8").strip()
    return len([*folder.glob("*_optim_states.pt")]) or None


def problem(checkpoint: Path) -> str | None:
    """What is missing or damaged of DeepSpeed's state in a checkpoint; None if nothing is.

    DeepSpeed's files are pickles of more than tensors. Nothing in them is read here.
    """
    if not [*checkpoint.glob("global_step*")]:
        return None
    # DeepSpeed writes it last.
    latest = checkpoint / _LATEST
    if not latest.exists():
        return f"{checkpoint} is incomplete: it has no {_LATEST}, which DeepSpeed writes last"
    folder = checkpoint / latest.read_text(encoding="utf-8").strip()
    files = [*folder.glob("*.pt")]
    if not files:
        return f"{checkpoint} is incomplete: {folder}, which {_LATEST} names, has no files"
    for file in sorted(files):
        try:
            with zipfile.ZipFile(file):
                pass
        except (zipfile.BadZipFile, OSError) as error:
            return f"{file} is damaged or was not written to its end ({error})"
    return None
