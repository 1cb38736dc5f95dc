"""From per-token log-probs to a pairwise loss: sums of sequences, objective, gradient coefficients.

`scores_of` forms the sums, over ranks if each has a part of the tokens. All that follows works on
`[2B]` numbers, in one of two ways. On the triton backend, an objective of the pair kernel's form
takes one launch, which returns the losses and `d loss / d logps` of each sequence; a mixture takes
one for each of its objectives; what gold responses add is torch code. Otherwise the objective's own
torch code runs, and autograd differentiates it. Both ways return those gradients: they are the push
on each response, and `prefkern.diagnostics` reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prefkern.loss import checks as loss_checks
from prefkern.objectives import Mixture, Objective, PairLoss, Pairs
from prefkern.ops import parts, sequences
from prefkern.ops.autograd import Result
from prefkern.ops.once import anchors, differentiable_once
from prefkern.ops.operands import as_stored

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from prefkern_kernels.pair import PairLossOutput


@dataclass(frozen=True)
class Scores:
    """The numbers of S sequences that an objective may need.

    Of pairs B chosen ones come first, then their rejected ones, and gold ones last, if there are.
    """

    logps: Tensor  # (N,) per scored token, differentiable; of sequences over several ranks, sums
    offsets: Tensor  # (S + 1,)
    ref_logps: Tensor | None = None  # (S,) sums, of pairs (2B,)
    reward_margins: Tensor | None = None  # (B,)
    alignments: Tensor | None = None  # (S,) means over tokens (WPO)
    kls: Tensor | None = None  # (S,) sums, differentiable (TDPO)
    # (S,) int64 scored tokens, of sequences over several ranks; None: those of offsets
    lengths_over_ranks: Tensor | None = None
    # The weight of tokens beyond the length of a pair's shorter response (LD-DPO); None: 1.
    ld_alpha: float | None = None
    responses: int = 2  # how many sequences are one item

    @property
    def lengths(self) -> Tensor:  # (S,) int64
        return self.offsets.diff() if self.lengths_over_ranks is None else self.lengths_over_ranks

    def sums(self) -> Tensor:  # (S,), differentiable
        return sequences.sequence_sums(self.logps, self.offsets)


def scores_of(
    tokens: Result,
    offsets: Tensor,  # (S + 1,)
    responses: int,
    ref_logps: Tensor | None,  # (S,) sums that were given; those of tokens come first
    reward_margins: Tensor | None,  # (B,)
    needs_alignments: bool,
    group: ProcessGroup | None,
    ld_alpha: float | None = None,
) -> Scores:
    """The numbers of sequences from those of tokens; over the ranks of a group, if there is one."""
    dtype = tokens.logps.dtype
    values = {"ref_logps": tokens.ref_logps, "kls": tokens.kl}
    if needs_alignments:
        assert tokens.stats is not None
        values["alignments"] = tokens.logps.detach() - tokens.stats[3]
    values = {name: x for name, x in values.items() if x is not None}
    logps, lengths = tokens.logps, None
    if group is None:
        sums = {name: sequences.sequence_sums(x, offsets) for name, x in values.items()}
        if "ref_logps" in values:
            sums["ref_logps"], _ = sums_of(values["ref_logps"], offsets, responses, ld_alpha)
    else:
        # From here on a sequence is one token, which has the sum.
        sums, lengths = parts.whole_sums({"logps": logps, **values}, offsets, group)
        logps, offsets = sums.pop("logps"), torch.arange(len(offsets), device=offsets.device)
    ref_logps = sums.get("ref_logps", ref_logps)
    if ref_logps is not None:
        ref_logps = ref_logps[: loss_checks.reference_sums(len(offsets) - 1, responses)]
    scores = Scores(
        logps,
        offsets,
        None if ref_logps is None else ref_logps.detach().to(dtype),
        None if reward_margins is None else reward_margins.detach().to(dtype),
        kls=sums.get("kls"),
        lengths_over_ranks=lengths,
        ld_alpha=ld_alpha,
        responses=responses,
    )
    if needs_alignments:
        means = sums["alignments"] / scores.lengths.clamp(min=1)
        scores = replace(scores, alignments=means)
    return scores


@dataclass(frozen=True)
class Paired:
    """What the objective returned, and for which pairs."""

    result: PairLoss
    pairs: Pairs
    gradients: tuple[Tensor, Tensor]  # d losses / d logps, chosen and rejected, (B,) each


def pair_loss(objective: Objective, scores: Scores, backend: str) -> Paired:
    """The losses of B pairs, the pairs themselves, and the gradients of the log-probs."""
    objective.follow(scores.logps.device)
    # The kernel counts the tokens that it sums.
    by_kernel = backend == "triton" and scores.lengths_over_ranks is None
    terms = objective.pair_kernel_terms() if by_kernel else None
    if terms is not None:
        return _by_kernel(objective, scores, terms)
    return _by_objective(objective, scores)


def _by_objective(objective: Objective, scores: Scores) -> Paired:
    sums, whole = _sums_and_whole(scores.logps, scores)
    trains = sums.requires_grad
    if torch.is_inference_mode_enabled():
        # Autograd cannot differentiate tensors made in inference mode: copy them outside of it.
        with torch.inference_mode(False):
            values: dict[str, Any] = {
                name: value.detach().clone() if isinstance(value, Tensor) else value
                for name, value in vars(scores).items()
            }
            return _by_objective(objective, Scores(**values))
    with torch.enable_grad():
        # Evaluation has no graph, but wants these gradients as well.
        if not trains:
            sums, whole = (
                None if x is None else x.detach().requires_grad_() for x in (sums, whole)
            )
            assert sums is not None
        pairs = _pairs(sums, whole, scores)
        result = objective(pairs)
        gradients = torch.zeros_like(sums)
        if result.losses.requires_grad:
            # With `ld_alpha`, those of tokens of weight 1: they are in both sums.
            read = [sums] if whole is None else [sums, whole]
            gradients, *others = torch.autograd.grad(
                result.losses.sum(), read, retain_graph=trains, materialize_grads=True
            )
            gradients = sum(others, gradients)
    if not trains:
        result = PairLoss(*(value.detach() for value in result))
        gold = pairs.gold_logps
        pairs = replace(
            pairs,
            chosen_logps=pairs.chosen_logps.detach(),
            rejected_logps=pairs.rejected_logps.detach(),
            gold_logps=None if gold is None else gold.detach(),
        )
    chosen, rejected, *_ = gradients.detach().chunk(scores.responses)
    return Paired(result, pairs, (chosen, rejected))


def _by_kernel(objective: Objective, scores: Scores, terms: list[dict[str, Any]]) -> Paired:
    # The kernel would read a missing reference as one of probability 1.
    name = type(objective).__name__
    if objective.needs_reference and scores.ref_logps is None:
        raise ValueError(f"{name} needs ref_logps, got None")
    if objective.needs_reward_margins and scores.reward_margins is None:
        raise ValueError(f"{name} needs reward_margins, got None")
    logps, offsets, responses = scores.logps.detach(), scores.offsets, scores.responses
    if objective.observes:
        sums, whole = _sums_and_whole(logps, scores)
        objective.observe(_pairs(sums, whole, scores))
    from prefkern_kernels import pair_loss as launch

    n_of_pairs = loss_checks.reference_sums(len(offsets) - 1, responses)
    given = (
        logps,
        offsets[: n_of_pairs + 1],
        as_stored(scores.ref_logps),
        as_stored(scores.reward_margins),
    )
    launched: list[PairLossOutput] = [
        launch(*given, **options, ld_alpha=scores.ld_alpha) for options in terms
    ]
    out = launched[0]
    if isinstance(objective, Mixture):
        objective.combined([_result_of(each, each.losses) for each in launched])
        out = out._replace(
            losses=objective.weighted(each.losses for each in launched),
            coefficients=objective.weighted(each.coefficients for each in launched),
        )
        if out.whole is not None:
            slopes = (each.whole_coefficients for each in launched)
            out = out._replace(whole_coefficients=objective.weighted(slopes))  # pyright: ignore[reportArgumentType]
    gold = sequences.sequence_sums(logps, offsets[n_of_pairs:]) if responses == 3 else None
    sums, whole = _Sums.apply(scores.logps, scores, out, gold)
    pairs = _pairs(sums, whole, scores)
    read = [pairs.chosen_logps, pairs.rejected_logps]
    slopes, push = out.coefficients, out.coefficients
    if out.whole is not None and out.whole_coefficients is not None:
        read += pairs.whole()
        slopes = torch.cat([out.coefficients, out.whole_coefficients])
        push = out.coefficients + out.whole_coefficients
    losses = _Losses.apply(out, slopes, anchors(*read), *read)
    of_gold = objective.gold_terms(pairs)
    if of_gold is not None:
        losses = losses + of_gold
    chosen, rejected = push.chunk(2)
    return Paired(_result_of(out, losses), pairs, (chosen, rejected))


def _result_of(launched: PairLossOutput, losses: Tensor) -> PairLoss:
    return PairLoss(
        losses, launched.beta_chosen, launched.beta_rejected, *launched.rewards.chunk(2)
    )


class _Sums(torch.autograd.Function):
    """Puts the pair kernel's sums into the graph, between log-probs and losses.

    With `ld_alpha` there are two of each sequence, as `sequences.part_sums` returns them.
    """

    @staticmethod
    def forward(
        ctx,
        logps: Tensor,  # (N,)
        scores: Scores,
        launched: PairLossOutput,
        gold: Tensor | None,  # (B,)
    ) -> tuple[Tensor, Tensor | None]:  # (S,) each
        ctx.save_for_backward(scores.offsets)
        ctx.count, ctx.responses, ctx.alpha = logps.shape[0], scores.responses, scores.ld_alpha

        def with_gold(sums: Tensor | None) -> Tensor | None:
            return sums if sums is None or gold is None else torch.cat([sums, gold])

        return with_gold(launched.sums), with_gold(launched.whole)  # pyright: ignore[reportReturnType]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (offsets,) = ctx.saved_tensors
        if ctx.alpha is None:
            # d loss_b / d logp_t is the same for every token of a sequence.
            return sequences.spread(grads[0], offsets, ctx.count), None, None, None
        parts = sequences.pair_parts(offsets, ctx.responses)
        weighed, whole = grads
        gradient = sequences.spread_parts(weighed, whole, ctx.alpha, parts, ctx.count)
        return gradient, None, None, None


class _Losses(torch.autograd.Function):
    """Puts the pair kernel's losses into the graph, with its gradient of each sum."""

    @staticmethod
    def forward(
        ctx,
        launched: PairLossOutput,
        slopes: Tensor,  # (2B,), with ld_alpha (4B,): d losses / d each of `sums`
        once: tuple[Tensor, ...],
        *sums: Tensor,  # (B,) each
    ) -> Tensor:  # (B,)
        ctx.save_for_backward(slopes)
        ctx.anchors = once
        return launched.losses

    @staticmethod
    @differentiable_once
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return None, None, None, *(slopes.view(-1, len(grads[0])) * grads[0])


def _sums_and_whole(logps: Tensor, scores: Scores) -> tuple[Tensor, Tensor | None]:
    return sums_of(logps, scores.offsets, scores.responses, scores.ld_alpha)


def sums_of(
    logps: Tensor,  # (N,)
    offsets: Tensor,  # (S + 1,)
    responses: int,
    ld_alpha: float | None,
) -> tuple[Tensor, Tensor | None]:  # (S,)
    """The log-prob of each response; if `ld_alpha` weighs tokens less, also with a weight of 1."""
    if ld_alpha is None:
        return sequences.sequence_sums(logps, offsets), None
    return sequences.part_sums(logps, sequences.pair_parts(offsets, responses), ld_alpha)


def _pairs(sums: Tensor, whole: Tensor | None, scores: Scores) -> Pairs:  # (S,) each
    return Pairs.of_sequences(
        sums,
        scores.ref_logps,
        scores.lengths,
        scores.reward_margins,
        scores.alignments,
        scores.kls,
        whole,
        scores.responses,
    )
