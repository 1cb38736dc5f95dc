"""Runs under DeepSpeed's ZeRO on two ranks, started by torchrun; each rank saves what it saw.

The ranks are gloo processes on a CPU. DeepSpeed runs there once it is kept from compiling an
extension for the ranks of one machine, which gloo does without.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from prefkern import PreferenceTrainer
from prefkern.cli import __main__ as cli
from support import tiny
from support.adapters import trained
from support.command_line import flags
from support.ddp import torchrun
from support.fsdp import CASES as FSDP_CASES
from support.fsdp import COMMANDS, SUMS, command, half_frozen, lora, outcome_of, tied
from support.reference_sums import sums
from support.resumed import logs_of, run_of
from support.training import step_logs, trainer


def on_cpus() -> None:
    """Let DeepSpeed run over gloo ranks on a CPU."""
    import deepspeed  # noqa: F401

    # Not by import: of its name `deepspeed.comm` makes torch itself.
    backend: Any = sys.modules["deepspeed.comm.torch"]
    backend.build_shm_op = lambda: None


def configuration(stage: int, **options: Any) -> dict[str, Any]:
    zero = {"stage": stage, "overlap_comm": False, **options}
    if stage == 3:
        # Small weights would be kept whole on every rank, which tiny models have alone.
        zero = {"stage3_param_persistence_threshold": 0, **zero}
        zero.setdefault("stage3_gather_16bit_weights_on_model_save", True)
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
    }


def only(trained: Callable[[str], bool]):
    """A model some of whose weights are trained."""
    model = tiny.model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained(name))
    return model


CASES = {
    **FSDP_CASES,
    "head alone": lambda: {"objective": "simpo", "model": only(lambda name: "lm_head" in name)},
    "all but the head": lambda: {
        "objective": "simpo",
        "model": only(lambda name: "lm_head" not in name),
    },
    "lora on a tied head": lambda: {
        "model": tied(),
        "peft_config": lora(target_modules=["q_proj", "lm_head"]),
    },
    "lora, whole tied head": lambda: {
        "model": tied(),
        "peft_config": lora(modules_to_save=["lm_head"]),
    },
    "lora, shared prompts": lambda: {
        "peft_config": lora(),
        "padding_free": True,
        "share_prompt": True,
    },
    "trained adapter": lambda: {"model": trained(), "accumulated": 2},
}
# ZeRO-3 cannot put the first values of an adapter in the place of the trained ones.
REFUSED = {
    3: [
        "trained adapter",
        "trained adapter, whole head, checkpointed, bf16",
        "trained adapter, evaluated first",
        "tdpo, trained adapter, whole head",
    ]
}


def cases_of(stage: int) -> list[str]:
    return [case for case in CASES if case not in REFUSED.get(stage, ())]


def weights(model: Any) -> dict[str, torch.Tensor]:
    """Of every trained parameter, whole."""
    import deepspeed

    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    with deepspeed.zero.GatheredParameters([each for _, each in trained]):
        return {name: each.detach().float().clone() for name, each in trained}


def record(run: Any) -> list[dict]:
    """A list that gets weights and gradients before every optimiser step, whole."""
    import transformers
    from deepspeed.utils import safe_get_full_grad

    steps = []

    class Record(transformers.TrainerCallback):
        def on_train_begin(self, *args, **_):
            plain = run.deepspeed.step

            def step():
                for name, parameter in run.model.named_parameters():
                    gradient = safe_get_full_grad(parameter) if parameter.requires_grad else None
                    if gradient is not None:
                        steps[-1]["gradients"][name] = gradient.float().clone()
                plain()

            run.deepspeed.step = step

        def on_step_begin(self, *args, **_):
            steps.append({"weights": weights(run.model), "gradients": {}})

    run.add_callback(Record())
    return steps


def outcome(path: Path, case: str, ranks: int, stage: int = 0) -> dict:
    # Else transformers would make the case's models in the shards of the last case's ZeRO-3.
    unset_hf_deepspeed_config()
    if ranks == 1:
        return outcome_of(path, case, ranks, cases=CASES)
    settings = {"deepspeed": configuration(stage)}
    return outcome_of(path, case, ranks, cases=CASES, record=record, **settings)


def errors(case: str, found: dict, expected: dict) -> dict[str, float]:
    """The worst differences of a run from that of one process.

    Of gradients relative to each one's norm, of logged numbers relative where they are above 1.
    `still` is the share of gradients that are too small to tell anything.
    """
    assert len(found["steps"]) == len(expected["steps"]) == 2
    worst = {"gradients": 0.0, "weights": 0.0, "logs": 0.0, "still": 0.0}
    for mine, joint in zip(found["steps"], expected["steps"], strict=True):
        assert mine["gradients"].keys() == joint["gradients"].keys()
        assert mine["weights"].keys() == joint["weights"].keys()
        # DeepSpeed clips later than its gradients can be read; the next weights show that it did.
        scale = _norm(joint["gradients"]) / _norm(mine["gradients"]) if "clipped" in case else 1.0
        small = 0
        for name, gradient in joint["gradients"].items():
            norm = gradient.norm()
            difference = (mine["gradients"][name] * scale - gradient).norm()
            error = (difference / norm.clamp(min=1e-4)).item()
            worst["gradients"] = max(worst["gradients"], error)
            small += bool(norm <= (1e-6 if "clipped" in case else 1e-3))
            moved = (mine["weights"][name] - joint["weights"][name]).abs().max().item()
            worst["weights"] = max(worst["weights"], moved)
        worst["still"] = max(worst["still"], small / len(joint["gradients"]))
    for mine, joint in zip(found["logs"], expected["logs"], strict=True):
        # A count of margins above 0, which rounding decides for a pair in bfloat16.
        counts = {name for name in joint if "bf16" in case and name.endswith("accuracies")}
        times = {name for name in joint if name.endswith(("epoch", "time", "per_second"))}
        for name in joint.keys() - counts - times:
            error = abs(mine[name] - joint[name]) / max(1.0, abs(joint[name]))
            worst["logs"] = max(worst["logs"], error)
    return worst


def _norm(tensors: dict[str, torch.Tensor]) -> float:
    return torch.stack([each.norm() for each in tensors.values()]).norm().item()


def _run(path: Path, stage: int, **options: Any) -> PreferenceTrainer:
    unset_hf_deepspeed_config()
    model = options.pop("model", tiny.model)()
    settings = {"deepspeed": configuration(stage), "per_device_train_batch_size": 2}
    return trainer(path, model=model, **{**settings, **options})


def _found_again(path: Path, stage: int) -> dict:
    """Two runs of one cache: how many batches each computed, the sums and the first losses."""
    made: dict[str, list] = {"batches": [], "sums": [], "losses": []}
    for _ in range(2):
        computed = []
        with pytest.MonkeyPatch.context() as patch:
            plain = PreferenceTrainer._reference_logps

            def counting(self, inputs, computed=computed, plain=plain):
                computed.append(1)
                return plain(self, inputs)

            patch.setattr(PreferenceTrainer, "_reference_logps", counting)
            run = _run(path, stage, count=8, peft_config=lora(), bf16=True, **SUMS)
        made["batches"].append(len(computed))
        run.train()
        made["sums"].append(sums(run.train_dataset))
        made["losses"].append(step_logs(run)[0]["loss"])
    return made


def _later(path: Path, stage: int) -> dict:
    """Evaluation of datasets that come after the constructor, before training and after it."""
    first, losses = [], []
    for options in ({}, {"peft_config": lora()}, {"model": trained}):
        run = _run(path, stage, **SUMS, **options)
        first.append(run.evaluate(tiny.dataset(4, seed=3))["eval_loss"])
        run.train()
        try:
            losses.append(run.evaluate(tiny.dataset(4, seed=4))["eval_loss"])
        except ValueError as error:
            losses.append(str(error))
    copied = ""
    try:
        _run(path, stage, model=trained)
    except ValueError as error:
        copied = str(error)
    return {"first": first, "losses": losses, "copied": copied}


def _resumed(path: Path, stage: int) -> dict:
    """Runs that save after each step, and others that go on from the third."""
    made = {}
    for case in ("alphadpo", "betadpo"):
        found = []
        for resumes in (False, True):
            unset_hf_deepspeed_config()
            options = {"save_strategy": "no"} if resumes else {}
            options |= {"deepspeed": configuration(stage), "eval_strategy": "no"}
            folder = path / case
            run = run_of(folder, case, **options)
            run.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resumes else None)
            steps = run.state.global_step
            found.append({"steps": steps, "weights": weights(run.model), "logs": logs_of(run)})
        made[case] = found
    return made


def commands_of(stage: int) -> list[str]:
    return [*COMMANDS, *(["shards", "half frozen"] if stage == 3 else [])]


def _commands(path: Path, stage: int) -> dict:
    """`prefkern train` on models that it loads by name, which ZeRO-3 shards as they are loaded."""
    path, made = path.parent, {}
    for name in commands_of(stage):
        if name == "half frozen":
            run = _run(path / name, stage, model=half_frozen, count=4)
            run.train()
            run.save_model()
            continue
        unset_hf_deepspeed_config()
        gathers = {"stage3_gather_16bit_weights_on_model_save": name != "shards"}
        file = path / f"{name}-{os.environ['RANK']}.json"
        file.write_text(json.dumps(configuration(stage, **(gathers if stage == 3 else {}))))
        same = "full" if name == "shards" else name
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            options = {"output_dir": path / name, "deepspeed": file}
            status = cli.main(["train", *command(path, same, **options)])
        made[name] = (status, out.getvalue())
    return made


def _added(path: Path, stage: int) -> dict:
    """An adapter and a whole head on a model that is given, and on one that is loaded by name."""
    made = {}
    for kind, model in (("given", tiny.model), ("named", lambda: str(path.parent / "model"))):
        options = {"count": 4, "bf16": True, "peft_config": lora(modules_to_save=["lm_head"])}
        run = _run(path, stage, model=model, **options)
        run.train()
        dtypes = {each.dtype for each in run.model.parameters()}
        made[kind] = {"weights": weights(run.model), "logs": step_logs(run), "dtypes": dtypes}
    return made


MARGINS = {"lora": {"lora_r": 4}, "lora, bf16": {"lora_r": 4, "bf16": True}, "full": {"lora_r": 0}}


def margins(path: Path, name: str, **options: Any) -> list[str]:
    """The arguments of a reward model's training on the model and the pairs in `path`."""
    return flags(
        {
            "model_name_or_path": path / "model",
            "dataset": path / "pairs.jsonl",
            "use_cpu": True,
            "max_steps": 4,
            "eval_steps": 2,
            # Ranks would repeat a pair of an odd number.
            "eval_fraction": 0.25,
            "per_device_train_batch_size": 1,
            "learning_rate": 0.1,
            "optim": "sgd",
            "report_to": "none",
            **MARGINS[name],
            **options,
        }
    )


def _margins(path: Path, stage: int) -> dict:
    """`prefkern margins`, which ends with the best checkpoint; the file is in `path`'s folder."""
    path, made = path.parent, {}
    for name in MARGINS:
        unset_hf_deepspeed_config()
        file = path / f"margins-{os.environ['RANK']}.json"
        file.write_text(json.dumps(configuration(stage)))
        place = {"output_dir": path / f"{name}, rewards", "output": path / f"{name}.jsonl"}
        made[name] = cli.main(["margins", *margins(path, name, deepspeed=file, **place)])
    return made


# By name; each is a run of its own on both ranks.
OTHERS = {
    "added": _added,
    "margins": _margins,
    "found again": _found_again,
    "later": _later,
    "resumed": _resumed,
    "commands": _commands,
}


def launch(folder: Path, stage: int, *names: str, count: int = 2, **settings: str) -> None:
    """Run these cases on so many ranks; each leaves what it saw in `folder`/rank0.pt, rank1.pt, ..."""
    given = {"DS_ACCELERATOR": "cpu", "ZERO_STAGE": str(stage), **settings}
    torchrun("support.zero", str(folder), *names, count=count, **given)


if __name__ == "__main__":
    torch.set_num_threads(1)
    on_cpus()
    folder, stage = Path(sys.argv[1]), int(os.environ["ZERO_STAGE"])
    outcomes = {
        case: OTHERS[case](folder / case, stage)
        if case in OTHERS
        else outcome(folder / case, case, int(os.environ["WORLD_SIZE"]), stage)
        for case in sys.argv[2:]
    }
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
