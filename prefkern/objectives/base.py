"""What every objective is: `Pairs` in, `PairLoss` out, and what it needs said before it is called.

An objective sees a pair only through numbers a sequence (log-probs, lengths, the reference's
log-probs, ...), never through logits. It returns each pair's loss and the coefficients that it
used, so that what is logged is what was trained.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from prefkern.objectives.adaptive import Adaptive


@dataclass(frozen=True)
class Pairs:
    """What an objective sees of B pairs.

    Args:
        chosen_logps, rejected_logps: (B,) summed log-probs under the policy, nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference.
        chosen_lengths, rejected_lengths: (B,) scored tokens of each response.
        reward_margins: (B,) margins of a reward model.
        chosen_alignments, rejected_alignments: (B,) mean over a response's tokens of
            `log p(token) - log sum_v p(v)^2`, nats (WPO); constants.
        chosen_kls, rejected_kls: (B,) sums over a response's tokens of KL(reference || policy),
            nats (TDPO); differentiable.

    Half-precision inputs are raised to float32, and margins and lengths may be integers. Raises
    TypeError for what is not a tensor of numbers of that kind and ValueError for shapes other than
    (B,).
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    reward_margins: Tensor | None = None
    chosen_alignments: Tensor | None = None
    rejected_alignments: Tensor | None = None
    chosen_kls: Tensor | None = None
    rejected_kls: Tensor | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        check_vectors(self, names, required=("chosen_logps", "rejected_logps"), size="B")

    @classmethod
    def of_sequences(
        cls,
        logps: Tensor,  # (2B,), B chosen sequences and then their B rejected ones
        ref_logps: Tensor | None = None,  # (2B,), as are the next ones
        lengths: Tensor | None = None,
        reward_margins: Tensor | None = None,  # (B,)
        alignments: Tensor | None = None,  # (2B,)
        kls: Tensor | None = None,
    ) -> Pairs:
        """The pairs of a batch in the order in which the loss takes it."""

        def halves(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if value is None:
                return None, None
            chosen, rejected = value.chunk(2)
            return chosen, rejected

        chosen, rejected = logps.chunk(2)
        ref_chosen, ref_rejected = halves(ref_logps)
        chosen_lengths, rejected_lengths = halves(lengths)
        return cls(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_lengths,
            rejected_lengths,
            reward_margins,
            *halves(alignments),
            *halves(kls),
        )

    def reference(self, who: str) -> tuple[Tensor, Tensor]:
        """The reference's log-probs. Raises ValueError if there are none."""
        return self._both("ref_chosen_logps", "ref_rejected_logps", who)

    def lengths(self, who: str) -> tuple[Tensor, Tensor]:
        """What sums are divided by: an empty response has a sum of 0, whatever divides it."""
        chosen, rejected = self._both("chosen_lengths", "rejected_lengths", who)
        return chosen.clamp(min=1), rejected.clamp(min=1)

    def kls(self, who: str) -> tuple[Tensor, Tensor]:
        return self._both("chosen_kls", "rejected_kls", who)

    def alignments(self, who: str) -> tuple[Tensor, Tensor]:
        return self._both("chosen_alignments", "rejected_alignments", who)

    def margins(self, who: str) -> Tensor:
        if self.reward_margins is None:
            raise ValueError(f"{who} needs reward_margins, got None")
        return self.reward_margins

    def _both(self, chosen: str, rejected: str, who: str) -> tuple[Tensor, Tensor]:
        values = getattr(self, chosen), getattr(self, rejected)
        if values[0] is None or values[1] is None:
            raise ValueError(f"{who} needs {chosen} and {rejected}, got None")
        return values


class PairLoss(NamedTuple):
    """Loss and coefficients of each pair, all (B,); only `losses` carries a gradient.

    Where nothing is adaptive, `beta_chosen` and `beta_rejected` may be one tensor: clone what is
    to be changed in place.
    """

    losses: Tensor
    beta_chosen: Tensor
    beta_rejected: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class Objective(nn.Module):
    """A pairwise objective: `forward(Pairs) -> PairLoss`.

    A module, so that statistics that an objective carries live in the state_dict of the model's
    loss. What an objective needs is asked of it before anything is computed:

    - `needs_reference`: log-probs of a reference;
    - `needs_reward_margins`: a reward model's margins;
    - `needs_alignments`: `chosen_alignments` and `rejected_alignments`;
    - `needs_kls`: `chosen_kls` and `rejected_kls`, so hidden states and head of the reference.

    `observes` says that `observe` must see a batch before the pair kernel does: there are
    statistics, and the module that has them is training. `forward` sees to it by itself.
    """

    needs_reference: bool = True
    needs_reward_margins: bool = False
    needs_alignments: bool = False
    needs_kls: bool = False
    observes: bool = False
    adaptive: Adaptive | None = None
    beta: float

    def forward(self, pairs: Pairs) -> PairLoss:
        raise NotImplementedError(f"{type(self).__name__} does not define forward(pairs)")

    def observe(self, pairs: Pairs) -> None:
        """Move running statistics by a batch."""

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        """Numbers of this objective's own to log, (B,) each."""
        return {}

    def pair_kernel_options(self) -> dict[str, Any] | None:
        """Keyword arguments of `prefkern_kernels.pair_loss`, or None where it has no such form."""
        return None


def check_vectors(values: Any, names: list[str], required: tuple[str, ...], size: str) -> None:
    """Hold fields of a frozen dataclass to one shape, and raise half precision to float32.

    Lengths and margins may be integers; a field called `desirable` is bool.
    """
    first = getattr(values, names[0])
    for name in names:
        value = getattr(values, name)
        if value is None and name not in required:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor of shape [{size}], got {value!r}")
        if value.is_nested or value.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor of shape [{size}]")
        if value.ndim != 1 or value.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape [{size}] of {names[0]}, "
                f"{list(first.shape)}, got {list(value.shape)}"
            )
        if value.device != first.device:
            raise ValueError(f"{name} is on {value.device} and {names[0]} on {first.device}")
        if name == "desirable":
            if value.dtype != torch.bool:
                raise TypeError(f"desirable must be a bool tensor, got {value.dtype}")
            continue
        may_be_integers = name.endswith("_lengths") or name == "reward_margins"
        is_integer = not (value.is_floating_point() or value.is_complex())
        is_integer = is_integer and value.dtype != torch.bool
        if not value.is_floating_point() and not (may_be_integers and is_integer):
            raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
        if value.dtype in (torch.float16, torch.bfloat16):
            object.__setattr__(values, name, value.float())
        elif is_integer:
            # Of small unsigned types a difference would wrap.
            object.__setattr__(values, name, value.long())


def weighed(factor: Tensor, value: Tensor) -> Tensor:
    """`factor value`, and 0 where a factor of 0 meets an infinite value, which would be NaN.

    Factors that are exponentials of a log-prob vanish where it is -inf, faster than it grows.
    """
    return torch.where((factor == 0) & value.isinf(), 0.0, factor * value)


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise TypeError for what is not the dataclass that an objective reads."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {kind.__name__}, got {value!r}"[:200])


# Hyper-parameters beyond these have no use, and their products and reciprocals would leave float32.
LARGEST = 1e6
LEAST = 1e-12


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def shown(value: object) -> str:
    """A value as a message has it, in a line."""
    return f"{value!r}"[:80]


def require_number(name: str, value: Any) -> float:
    if not is_number(value) or abs(value) > LARGEST:
        raise ValueError(
            f"{name} must be a finite number, within +-{LARGEST:g}, got {shown(value)}"
        )
    return float(value)


def require_positive(name: str, value: Any) -> float:
    if not is_number(value) or not LEAST <= value <= LARGEST:
        raise ValueError(
            f"{name} must be a finite number > 0, from {LEAST:g} to {LARGEST:g}, got {shown(value)}"
        )
    return float(value)


def require_not_negative(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value <= LARGEST:
        raise ValueError(
            f"{name} must be a finite number >= 0, at most {LARGEST:g}, got {shown(value)}"
        )
    return float(value)


def require_below(name: str, value: Any, end: float) -> float:
    """A number in [0, end)."""
    if not (is_number(value) and 0 <= value < end):
        raise ValueError(f"{name} must be in [0, {end:g}), got {shown(value)}")
    return float(value)


def require_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def require_one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return str(value)
