"""What every objective is: `Pairs` in, `PairLoss` out, and what it declares that it needs.

An objective never sees logits. It sees a few numbers for each sequence: its log-prob, its length,
the reference's log-prob. It returns each pair's loss and the coefficients that it used, so that the
log shows what was trained.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prefkern.devices import of_doubles
from prefkern.objectives.adaptive import Adaptive
from prefkern.objectives.checks import require_vectors
from prefkern.objectives.citations import ADADPO, Paper, without_repeats


@dataclass(frozen=True)
class Pairs:
    """B pairs, as an objective sees them.

    Args:
        chosen_logps, rejected_logps: (B,) summed log-probs under the policy, nats.
        ref_chosen_logps, ref_rejected_logps: (B,) the same under the reference.
        chosen_lengths, rejected_lengths: (B,) scored tokens of each response.
        reward_margins: (B,) margins of a reward model.
        chosen_alignments, rejected_alignments: (B,) mean over a response's tokens of
            `log p(token) - log sum_v p(v)^2`, nats (WPO); constants.
        chosen_kls, rejected_kls: (B,) sums over a response's tokens of KL(reference || policy),
            nats (TDPO); differentiable.
        chosen_whole_logps, rejected_whole_logps: (B,) sums of all tokens, where the log-probs above
            weigh some of them less (`ld_alpha`); None: the same. NLL terms read them.
        gold_logps, gold_lengths: (B,) summed log-probs and scored tokens of a third, gold response
            to each prompt (TPO).

    Half-precision inputs are raised to float32; margins and lengths may be integers. Raises
    TypeError for anything but a tensor of such numbers, and ValueError for shapes other than (B,).
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
    chosen_whole_logps: Tensor | None = None
    rejected_whole_logps: Tensor | None = None
    gold_logps: Tensor | None = None
    gold_lengths: Tensor | None = None

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self)]
        require_vectors(self, names, required=("chosen_logps", "rejected_logps"), size="B")

    @classmethod
    def of_sequences(
        cls,
        logps: Tensor,  # (S,), B chosen sequences and then their B rejected ones
        ref_logps: Tensor | None = None,  # (2B,) or (S,), as are alignments and kls
        lengths: Tensor | None = None,  # (S,)
        reward_margins: Tensor | None = None,  # (B,)
        alignments: Tensor | None = None,
        kls: Tensor | None = None,
        whole_logps: Tensor | None = None,  # (S,)
        responses: int = 2,
    ) -> Pairs:
        """The pairs of a batch, whose chosen sequences come first.

        With three `responses` the B gold ones come last.
        """

        def halves(value: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            if value is None:
                return None, None
            chosen, rejected, *_ = value.chunk(responses if len(value) == len(logps) else 2)
            return chosen, rejected

        def gold(value: Tensor | None) -> Tensor | None:
            return None if value is None or responses == 2 else value.chunk(responses)[2]

        chosen, rejected, *_ = logps.chunk(responses)
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
            *halves(whole_logps),
            gold(logps),
            gold(lengths),
        )

    def reference(self, who: str) -> tuple[Tensor, Tensor]:
        """The reference's log-probs. Raises ValueError if there are none."""
        return self._both("ref_chosen_logps", "ref_rejected_logps", who)

    def lengths(self, who: str) -> tuple[Tensor, Tensor]:
        """The lengths to divide sums by, at least 1: the sum of an empty response is 0."""
        chosen, rejected = self._both("chosen_lengths", "rejected_lengths", who)
        return chosen.clamp(min=1), rejected.clamp(min=1)

    def kls(self, who: str) -> tuple[Tensor, Tensor]:
        return self._both("chosen_kls", "rejected_kls", who)

    def gold(self, who: str) -> tuple[Tensor, Tensor]:
        """The gold responses' log-probs and lengths."""
        return self._both("gold_logps", "gold_lengths", who)

    def alignments(self, who: str) -> tuple[Tensor, Tensor]:
        return self._both("chosen_alignments", "rejected_alignments", who)

    def whole(self) -> tuple[Tensor, Tensor]:
        """The log-probs of all tokens, with a weight of 1 each."""
        chosen, rejected = self.chosen_whole_logps, self.rejected_whole_logps
        return (
            self.chosen_logps if chosen is None else chosen,
            self.rejected_logps if rejected is None else rejected,
        )

    def margins(self, who: str) -> Tensor:
        if self.reward_margins is None:
            raise ValueError(f"{who} needs reward_margins, got None")
        return self.reward_margins

    def _both(self, first: str, second: str, who: str) -> tuple[Tensor, Tensor]:
        values = getattr(self, first), getattr(self, second)
        if values[0] is None or values[1] is None:
            raise ValueError(f"{who} needs {first} and {second}, got None")
        return values


class PairLoss(NamedTuple):
    """Loss and coefficients of each pair, all (B,); only `losses` carries a gradient.

    `beta_chosen` and `beta_rejected` may be one tensor: clone before changing one in place.
    """

    losses: Tensor
    beta_chosen: Tensor
    beta_rejected: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor

    def with_losses(self, losses: Tensor) -> PairLoss:
        # Not `_replace`, whose result torch 2.11 cannot return from a compiled function.
        return PairLoss(losses, *self[1:])


class Objective(nn.Module):
    """A pairwise objective: `forward(Pairs) -> PairLoss`.

    A module, so that running statistics are part of the loss's state_dict. A class declares what
    it needs, and the loss checks it before anything is computed:

    - `needs_reference`: log-probs of a reference;
    - `needs_reward_margins`: a reward model's margins;
    - `needs_alignments`: `chosen_alignments` and `rejected_alignments`;
    - `needs_kls`: `chosen_kls` and `rejected_kls`, so hidden states and head of the reference;
    - `needs_gold`: a third response to each prompt, `gold_logps` and `gold_lengths`.

    `observes` means that the module trains and keeps statistics. The pair kernel then needs a call
    of `observe` before it; `forward` makes that call itself. `weighs_pairs` is False where terms of
    a loss are of two pairs, so that no weight is a pair's (WPO). `papers` are what a model card
    cites.
    """

    papers: tuple[Paper, ...] = ()
    needs_reference: bool = True
    needs_reward_margins: bool = False
    needs_alignments: bool = False
    needs_kls: bool = False
    needs_gold: bool = False
    observes: bool = False
    weighs_pairs: bool = True
    adaptive: Adaptive | None = None
    beta: float

    def forward(self, pairs: Pairs) -> PairLoss:
        raise NotImplementedError(f"{type(self).__name__} does not define forward(pairs)")

    @property
    def moves_beta(self) -> bool:
        """Whether pairs train with other coefficients than the `beta` that was given."""
        return self.adaptive is not None

    @property
    def title(self) -> str:
        """Its name in text: "DPO", and "AdaDPO" with adaptive coefficients."""
        return ("" if self.adaptive is None else "Ada") + type(self).__name__

    def citations(self) -> tuple[Paper, ...]:
        """The papers that it is from; an adaptive objective names AdaDPO first."""
        return without_repeats([*([] if self.adaptive is None else [ADADPO]), *self.papers])

    @property
    def responses(self) -> int:
        """How many sequences of a batch are one item."""
        return 3 if self.needs_gold else 2

    def observe(self, pairs: Pairs) -> None:
        """Update running statistics with a batch."""

    def follow(self, device: torch.device) -> None:
        """Move running statistics to the device of a batch.

        A loss has no weights, so nobody thinks of moving it, and its few numbers cost one copy.
        They are float64: a device without it leaves them on the CPU.
        """
        device = of_doubles(device)
        if any(buffer.device != device for buffer in self.buffers()):
            # A buffer made in inference mode could not be updated outside of it.
            with torch.inference_mode(False):
                self.to(device)

    def metrics(self, pairs: Pairs, result: PairLoss) -> dict[str, Tensor]:
        """The objective's own metrics, (B,) each."""
        return {}

    def gold_terms(self, pairs: Pairs) -> Tensor | None:  # (B,)
        """What gold responses add to each pair's loss, as `forward` does and the kernel does not."""
        return None

    def pair_kernel_options(self) -> dict[str, Any] | None:
        """Keywords of `prefkern_kernels.pair_loss`; None if it cannot compute this loss."""
        return None

    def pair_kernel_terms(self) -> list[dict[str, Any]] | None:
        """Keywords of each launch of the pair kernel: one, or one for each part of a `Mixture`."""
        options = self.pair_kernel_options()
        return None if options is None else [options]


def weighed(factor: Tensor, value: Tensor) -> Tensor:
    """`factor value`, but 0 where a factor of 0 meets an infinite value, and not NaN.

    The factor is the exponential of a log-prob: it vanishes faster than the log-prob grows.
    """
    return torch.where((factor == 0) & value.isinf(), 0.0, factor * value)
