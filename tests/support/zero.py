"""Runs under DeepSpeed's ZeRO on two ranks, started by torchrun; each rank saves what it saw.

The ranks are gloo processes on a CPU. DeepSpeed runs there once it is kept from compiling an
extension for the ranks of one machine, which gloo does without.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from support import tiny
from support.ddp import torchrun
from support.fsdp import CASES as FSDP_CASES
from support.fsdp import lora, outcome_of
from support.training import trainer


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
        "model": tiny.model(tie_word_embeddings=True),
        "peft_config": lora(target_modules=["q_proj", "lm_head"]),
    },
    "dbg": lambda: {"bf16": True, "precompute_ref_log_probs": True, "precompute_ref_batch_size": 2},
    "shared prompts": lambda: {"padding_free": True, "share_prompt": True, "peft_config": lora()},
}


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


def outcome(path: Path, case: str, stage: int) -> dict:
    # Else transformers would make the case's models in the shards of the last case's ZeRO-3.
    unset_hf_deepspeed_config()
    settings = {"deepspeed": configuration(stage)}
    return outcome_of(path, case, ranks=2, cases=CASES, record=record, **settings)


def launch(folder: Path, stage: int, *names: str, **settings: str) -> None:
    """Run these cases on two ranks; each leaves what it saw in `folder`/rank0.pt or rank1.pt."""
    given = {"DS_ACCELERATOR": "cpu", "ZERO_STAGE": str(stage), **settings}
    torchrun("support.zero", str(folder), *names, **given)


if __name__ == "__main__":
    import traceback
    torch.set_num_threads(1)
    on_cpus()
    folder = Path(sys.argv[1])
    outcomes = {}
    for case in sys.argv[2:]:
        try:
            outcomes[case] = outcome(folder / case, case, int(os.environ["ZERO_STAGE"]))
        except Exception as e:
            traceback.print_exc()
            outcomes[case] = str(e)
            print("FAILED", case, flush=True)
    torch.save(outcomes, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
