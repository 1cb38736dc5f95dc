"""TRL's trainers that ask their models for log-probs: what each asks for, and how it is fused.

TRL's constructors give the policy and the reference a forward that takes `fused_lm_head=True`, with
the fields and the temperature below (`trl.trainer.utils.add_fused_lm_head`). `fuse` gives them
`prefkern.integrations.trl.fused_forward` on top, with the same fields.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet

from prefkern.integrations.trl.fused_forward import Served, serve
from prefkern.models import heads
from prefkern.models.heads import find_head

# The versions of TRL whose models take `fused_lm_head=True`.
ASKED_FROM = SpecifierSet(">=1.16,<1.17")
# The attribute of a trainer that keeps what `fuse` did.
_SERVED = "_prefkern_served"
# TRL's name for the class of PEFT's layers.
_ADAPTED_LAYER = "BaseTunerLayer"


@dataclass(frozen=True)
class AsksForLogProbs:
    """A trainer of TRL whose models are asked for log-probs."""

    module: str
    outputs: tuple[str, ...]  # of the policy; the reference gives log-probs alone
    has_temperature: bool = False

    def fuse(self, trainer: Any, options: dict[str, Any]) -> None:
        """Have prefkern answer for a trainer's models, in place of what an earlier call did."""
        _check_options(trainer)
        restore(trainer)
        outputs = self.outputs
        if getattr(trainer, "use_weighting", False):
            outputs = (*outputs, "log_sum_sq_probs")
        if self.has_temperature:
            options = {**options, "temperature": trainer.temperature}
        served = [serve(trainer.model, outputs, **options)]
        reference = getattr(trainer, "ref_model", None)
        if reference is not None:
            served.append(serve(reference, ("log_probs",), **options))
        setattr(trainer, _SERVED, served)

    @staticmethod
    def check_adapted_head(trainer: Any) -> None:
        """Raise ValueError if TRL's constructor has computed log-probs without the head's adapter."""
        _, head = find_head(trainer.model)
        if heads.has_low_rank_term(head) and getattr(trainer, "precompute_ref_logps", False):
            raise ValueError(
                "args.precompute_ref_log_probs is True, but TRL computes these sums while the trainer "
                "is made, without the adapter on the output head: set it to False"
            )


@contextmanager
def accepting_adapted_heads(module: str) -> Iterator[None]:
    """Within the context the constructor of a module's trainer takes an adapter on the head.

    TRL refuses one, since its own operator would ignore it.
    """
    trls = sys.modules[module]
    # TRL asks whether the head is one of these. Without PEFT it has none of them.
    layer: Any = vars(trls).get(_ADAPTED_LAYER)
    setattr(trls, _ADAPTED_LAYER, _NoLayer)
    try:
        yield
    finally:
        setattr(trls, _ADAPTED_LAYER, layer)


class _NoLayer:
    """A class of which nothing is an instance."""


# By the classes' full names, so that none is imported: GRPO's takes seconds.
ASKING = {
    f"{module}.{name}": AsksForLogProbs(module, outputs, has_temperature)
    for module, name, outputs, has_temperature in (
        (
            "trl.trainer.dpo_trainer",
            "DPOTrainer",
            ("log_probs", "entropy", "mean_logits", "is_top1"),
            False,
        ),
        (
            "trl.trainer.kto_trainer",
            "KTOTrainer",
            ("log_probs", "entropy", "mean_logits"),
            False,
        ),
        ("trl.trainer.sft_trainer", "SFTTrainer", ("log_probs", "entropy", "is_top1"), False),
        ("trl.trainer.grpo_trainer", "GRPOTrainer", ("log_probs", "entropy"), True),
        ("trl.trainer.rloo_trainer", "RLOOTrainer", ("log_probs", "entropy"), True),
    )
}


def check_version() -> None:
    """Raise ImportError for a TRL whose trainers ask for logits, or for log-probs in another way."""
    installed = metadata.version("trl")
    if not ASKED_FROM.contains(installed, prereleases=True):
        raise ImportError(
            f"fuse_head supports this trainer in TRL {ASKED_FROM}, but {installed} is installed: "
            f'pip install "trl{ASKED_FROM}"'
        )


def restore(trainer: Any) -> None:
    """Undo `AsksForLogProbs.fuse`."""
    served: list[Served] = vars(trainer).pop(_SERVED, [])
    for each in reversed(served):
        each.undo()


def _check_options(trainer: Any) -> None:
    """Raise ValueError for options of TRL that need more than the operator gives."""
    args = trainer.args
    if getattr(trainer, "_entropy_bonus_enabled", False):
        raise ValueError(
            f"args.entropy_coef is {args.entropy_coef} and args.use_adaptive_entropy "
            f"{args.use_adaptive_entropy}: the bonus needs the entropy's gradient, which prefkern's "
            "operator does not give"
        )
    if getattr(args, "cast_lm_head_to_fp32", False):
        raise ValueError(
            "args.cast_lm_head_to_fp32 is True, but fuse_head computes logits in float32 in any "
            "case: leave it out, and the weights keep their dtype"
        )
