"""`Adaptive`: AdaDPO's per-pair coefficient (Eq. 7, Table 3, Listing 1).

With x the log of a response's probability under the policy, or of its ratio to the reference's,

    ratio        = exp(alpha_w x_w - alpha_l x_l)
    beta_chosen  = beta k min(ratio, clip),   beta_rejected = beta

both constants to autograd. Exponents of 1 in policy space balance the gradients on the two
probabilities exactly (Proposition 1); 1/|y| on each side is Stable AdaDPO; 0 is the plain
objective. Each objective says what its x is: see `contrastive`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from prefkern.objectives.checks import LARGEST, is_number, require_positive, shown

# A ratio is at most e^60 = 1e26: times the largest beta and k it is finite in float32, and no
# coefficient of that size could train anything.
MAX_LOG_RATIO = 60.0


@dataclass(frozen=True)
class Adaptive:
    """AdaDPO's per-pair coefficient (Eq. 7): `ratio = exp(alpha_w x_w - alpha_l x_l)`.

    Args:
        space: "ratio", x = log P/R (Listing 1), or "policy", x = log P (Eq. 5). Objectives
            without a reference always use "policy".
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
        if not (isinstance(self.exponent, str) and self.exponent == "length"):
            numbers = self.exponent if isinstance(self.exponent, tuple) else (self.exponent,) * 2
            bounded = [is_number(x) and -LARGEST <= x <= LARGEST for x in numbers]  # pyright: ignore[reportOperatorIssue]
            if len(bounded) != 2 or not all(bounded):
                raise ValueError(
                    'exponent must be "length", a number, or a pair of numbers (alpha_w, alpha_l), '
                    f"within +-{LARGEST:g}, got {shown(self.exponent)}"
                )
        if self.clip is not None:
            require_positive("clip", self.clip)
        require_positive("k", self.k)

    @property
    def exponents(self) -> tuple[float, float] | None:
        """(alpha_w, alpha_l), or None where each is the reciprocal of its response's length."""
        if self.exponent == "length":
            return None
        if isinstance(self.exponent, tuple):
            return float(self.exponent[0]), float(self.exponent[1])
        return float(self.exponent), float(self.exponent)

    def coefficient(self, log_ratio: Tensor) -> Tensor:  # (B,) -> (B,)
        """`beta_chosen / beta`, from the logarithm of the ratio."""
        ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
        if self.clip is not None:
            ratio = ratio.clamp(max=self.clip)
        return self.k * ratio
