"""Pairwise preference objectives: small functions of `[B]` tensors, differentiated by autograd.

An objective sees a pair only through its sequence log-probs, lengths and reference log-probs, never
through logits. It returns each pair's loss and the coefficients that it used, so that what is
logged is what was trained.

The adaptive coefficient is AdaDPO's (Eq. 7, Table 3 and Listing 1): with x the log-ratio (or the
log-prob) of a response, `beta_chosen = beta k min(exp(alpha_w x_w - alpha_l x_l), clip)` and
`beta_rejected = beta`, both constants to autograd.

Adding an objective: one class here, one line in `REGISTRY`, one row in the tests.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# exp() of a log-ratio is held below e^64 = 6e27: times beta and a log-ratio of 1e5 it stays finite
# in float32, while no coefficient that could train anything is ever touched.
MAX_LOG_RATIO = 64.0


@dataclass(frozen=True)
class Pairs:
    """What an objective sees of B pairs.

    Args:
        chosen_logps, rejected_logps: (B,) summed log-probs under the policy, nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference.
        chosen_lengths, rejected_lengths: (B,) scored tokens of each response.
        reward_margins: (B,) margins of a reward model.

    Half-precision inputs are raised to float32. Raises TypeError for what is not a tensor and
    ValueError for shapes other than (B,).
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None
    reward_margins: Tensor | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            required = field.name in ("chosen_logps", "rejected_logps")
            if value is None and not required:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(f"{field.name} must be a tensor of shape [B], got {value!r}")
            if value.ndim != 1 or value.shape != self.chosen_logps.shape:
                raise ValueError(
                    f"{field.name} must have the shape [B] of chosen_logps, "
                    f"{list(self.chosen_logps.shape)}, got {list(value.shape)}"
                )
            if value.dtype in (torch.float16, torch.bfloat16):
                object.__setattr__(self, field.name, value.float())


class PairLoss(NamedTuple):
    """Loss and coefficients of each pair, all (B,); only `losses` carries a gradient."""

    losses: Tensor
    beta_chosen: Tensor
    beta_rejected: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


@dataclass(frozen=True)
class Adaptive:
    """AdaDPO's per-pair coefficient (Eq. 7): `ratio = exp(alpha_w x_w - alpha_l x_l)`.

    Args:
        space: "ratio", x = log P/R (Listing 1), or "policy", x = log P (Eq. 5).
        exponent: "length", 1/|y| for each side (Stable AdaDPO); a number for both sides; or a
            pair (alpha_w, alpha_l).
        clip: upper bound C of the ratio (2.0 in the paper); None for none.
        k: scale of the balance (A.5): k > 1 favours promotion of chosen responses.
    """

    space: Literal["ratio", "policy"] = "ratio"
    exponent: Literal["length"] | float | tuple[float, float] = "length"
    clip: float | None = 2.0
    k: float = 1.0

    def __post_init__(self) -> None:
        if self.space not in ("ratio", "policy"):
            raise ValueError(f'space must be "ratio" or "policy", got {self.space!r}')
        if isinstance(self.exponent, list):
            object.__setattr__(self, "exponent", tuple(self.exponent))
        if self.exponent != "length":
            numbers = self.exponent if isinstance(self.exponent, tuple) else (self.exponent,) * 2
            if len(numbers) != 2 or not all(_is_finite(x) for x in numbers):
                raise ValueError(
                    'exponent must be "length", a number, or a pair of numbers '
                    f"(alpha_w, alpha_l), got {self.exponent!r}"
                )
        if self.clip is not None:
            _require_positive("clip", self.clip)
        _require_positive("k", self.k)
        if self.k > 1e6:
            raise ValueError(
                f"k must be at most 1e6, for coefficients to stay finite, got {self.k}"
            )

    @property
    def exponents(self) -> tuple[float, float] | None:
        """(alpha_w, alpha_l), or None where each is the reciprocal of its response's length."""
        if self.exponent == "length":
            return None
        if isinstance(self.exponent, tuple):
            return float(self.exponent[0]), float(self.exponent[1])
        return float(self.exponent), float(self.exponent)

    @torch.no_grad()
    def coefficient(self, pairs: Pairs) -> Tensor:  # (B,)
        """`beta_chosen / beta`, a constant to autograd."""
        chosen, rejected = pairs.chosen_logps, pairs.rejected_logps
        if self.space == "ratio":
            ref_chosen, ref_rejected = _reference(pairs, "an adaptive coefficient in ratio space")
            chosen, rejected = chosen - ref_chosen, rejected - ref_rejected
        if self.exponents is None:
            chosen_lengths, rejected_lengths = _lengths(pairs, 'exponent="length"')
            # An empty response has a log-prob of 0, whatever it is divided by.
            log_ratio = chosen / chosen_lengths.clamp(min=1) - rejected / rejected_lengths.clamp(
                min=1
            )
        else:
            log_ratio = self.exponents[0] * chosen - self.exponents[1] * rejected
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        if self.clip is not None:
            ratio = ratio.clamp(max=self.clip)
        return self.k * ratio


class Objective(nn.Module):
    """A pairwise objective: `forward(Pairs) -> PairLoss`.

    A module, so that statistics that an objective carries live in the state_dict of the model's
    loss. `needs_reference` says whether reference log-probs must be given, `uses_reward_margins`
    whether margins may.
    """

    needs_reference: ClassVar[bool] = True
    uses_reward_margins: ClassVar[bool] = False
    adaptive: Adaptive | None = None

    def forward(self, pairs: Pairs) -> PairLoss:
        raise NotImplementedError(f"{type(self).__name__} does not define forward(pairs)")

    def pair_kernel_options(self) -> dict[str, Any] | None:
        """Keyword arguments of `prefkern_kernels.pair_loss`, or None where it has no such form."""
        return None


class DPO(Objective):
    """DPO (Rafailov et al. 2023), and AdaDPO with `adaptive=Adaptive()` (Eq. 6, Listing 1).

    `-logsigmoid(beta_chosen rho_w - beta_rejected rho_l)`, rho = log P/R summed over a response.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: probability that a preference is flipped, in [0, 0.5) (cDPO).
        adaptive: per-pair coefficients; None is plain DPO.
    """

    def __init__(
        self, beta: float = 0.1, label_smoothing: float = 0.0, adaptive: Adaptive | None = None
    ) -> None:
        super().__init__()
        _require_positive("beta", beta)
        if not (_is_finite(label_smoothing) and 0 <= label_smoothing < 0.5):
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}")
        if not (adaptive is None or isinstance(adaptive, Adaptive)):
            raise TypeError(f"adaptive must be an Adaptive or None, got {adaptive!r}")
        self.beta = float(beta)
        self.label_smoothing = float(label_smoothing)
        self.adaptive = adaptive

    def forward(self, pairs: Pairs) -> PairLoss:
        ref_chosen, ref_rejected = _reference(pairs, type(self).__name__)
        rho_chosen = pairs.chosen_logps - ref_chosen
        rho_rejected = pairs.rejected_logps - ref_rejected
        beta_chosen, beta_rejected = _betas(self.beta, self.adaptive, pairs)
        delta = beta_chosen * rho_chosen - beta_rejected * rho_rejected
        losses = -F.logsigmoid(delta)
        if self.label_smoothing:
            losses = torch.lerp(losses, -F.logsigmoid(-delta), self.label_smoothing)
        return PairLoss(
            losses,
            beta_chosen,
            beta_rejected,
            (beta_chosen * rho_chosen).detach(),
            (beta_rejected * rho_rejected).detach(),
        )

    def pair_kernel_options(self) -> dict[str, Any]:
        return {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            **_adaptive_kernel_options(self.adaptive),
        }

    def extra_repr(self) -> str:
        return f"beta={self.beta}, label_smoothing={self.label_smoothing}, adaptive={self.adaptive}"


REGISTRY: dict[str, type[Objective]] = {
    "dpo": DPO,
}


def names() -> list[str]:
    """Every name that `build` takes: each objective, and `ada...` for its adaptive counterpart."""
    adaptive = [
        f"ada{name}"
        for name, cls in REGISTRY.items()
        if "adaptive" in inspect.signature(cls).parameters
    ]
    return [*REGISTRY, *adaptive]


def build(name: str, **options: Any) -> Objective:
    """An objective by name: "dpo", or "adadpo" for the adaptive one with the paper's defaults.

    An adaptive objective takes the options of `Adaptive` (space, exponent, clip, k) beside its own:
    `build("adadpo", beta=0.1, clip=3.0)` is `DPO(beta=0.1, adaptive=Adaptive(clip=3.0))`.

    Raises ValueError for an unknown name and TypeError for an unknown option, naming the known.
    """
    if name not in names():
        raise ValueError(f"unknown objective {name!r}; known: {', '.join(names())}")
    is_adaptive = name not in REGISTRY
    cls = REGISTRY[name.removeprefix("ada") if is_adaptive else name]
    own = [p for p in inspect.signature(cls).parameters if not (is_adaptive and p == "adaptive")]
    adaptive = [field.name for field in fields(Adaptive)] if is_adaptive else []
    unknown = [option for option in options if option not in own + adaptive]
    if unknown:
        raise TypeError(
            f"objective {name!r} has no option {', '.join(map(repr, unknown))}; "
            f"it takes {', '.join(own + adaptive)}"
        )
    if is_adaptive:
        chosen = {option: options.pop(option) for option in adaptive if option in options}
        options["adaptive"] = Adaptive(**chosen)
    return cls(**options)


def _betas(beta: float, adaptive: Adaptive | None, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """`beta_chosen` and `beta_rejected`, (B,) each, without gradient."""
    plain = torch.full_like(pairs.chosen_logps, beta)
    return (plain if adaptive is None else beta * adaptive.coefficient(pairs)), plain


def _adaptive_kernel_options(adaptive: Adaptive | None) -> dict[str, Any]:
    if adaptive is None:
        # Exponents of 0 and no clip: the plain objective.
        adaptive = Adaptive(space="policy", exponent=0.0, clip=None)
    return {
        "ratio_space": adaptive.space == "ratio",
        "exponents": adaptive.exponents,
        "clip": adaptive.clip,
        "k": adaptive.k,
        "max_log_ratio": MAX_LOG_RATIO,
    }


def _reference(pairs: Pairs, who: str) -> tuple[Tensor, Tensor]:
    if pairs.ref_chosen_logps is None or pairs.ref_rejected_logps is None:
        raise ValueError(f"{who} needs ref_chosen_logps and ref_rejected_logps, got None")
    return pairs.ref_chosen_logps, pairs.ref_rejected_logps


def _lengths(pairs: Pairs, who: str) -> tuple[Tensor, Tensor]:
    if pairs.chosen_lengths is None or pairs.rejected_lengths is None:
        raise ValueError(f"{who} needs chosen_lengths and rejected_lengths, got None")
    return pairs.chosen_lengths, pairs.rejected_lengths


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _require_positive(name: str, value: object) -> None:
    if not _is_finite(value) or value <= 0:  # pyright: ignore[reportOperatorIssue]
        raise ValueError(f"{name} must be a finite number > 0, got {value!r}")
