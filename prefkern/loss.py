"""FusedPreferenceLoss: hidden states, head and labels in; a pairwise loss out; no logits between.

Per-token log-probs come from the operator's passes over tiles; their sequence sums, the objective
and each sequence's gradient coefficient are a matter of `[2B]` numbers. Two ways lead through the
latter: the objective's own torch code, differentiated by autograd, on any device; or, where the
objective has that form and the backend is triton, one launch of the pair kernel, which returns the
coefficient `d loss / d logps` of each sequence along with the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from prefkern import api, checks, sequences
from prefkern.objectives import Objective, PairLoss, Pairs
from prefkern.once import differentiable_once
from prefkern.outputs import PreferenceOutput, TokenStats
from prefkern.passes import Transform


class FusedPreferenceLoss(nn.Module):
    """A pairwise objective on log-probs that are computed in tiles.

    Args:
        objective: an objective of `prefkern.objectives`.
        ignore_index: label of tokens that are not scored.
        workspace_mb: bound on temporary memory in MiB; None: chosen for the device.
        backend: None, "triton" or "torch"; see `prefkern.linear_logprobs`.
    """

    def __init__(
        self,
        objective: Objective,
        ignore_index: int = -100,
        workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(
                f"objective must be an objective of prefkern.objectives, got {objective!r}; "
                'prefkern.objectives.build("adadpo") makes one by name'
            )
        checks.ignore_index(ignore_index)
        if workspace_mb is not None:
            checks.positive("workspace_mb", workspace_mb)
        if backend is not None and backend not in api.BACKENDS:
            raise ValueError(f"backend must be None or one of {api.BACKENDS}, got {backend!r}")
        self.objective = objective
        self.ignore_index = ignore_index
        self.workspace_mb = workspace_mb
        self.backend = backend

    def forward(
        self,
        hidden: Tensor,  # (2B, T, H), or (M, H) with cu_seqlens
        weight: Tensor,  # (V, H)
        labels: Tensor,  # (2B, T), or (M,)
        bias: Tensor | None = None,  # (V,)
        ref_hidden: Tensor | None = None,  # as hidden; its H may differ
        ref_weight: Tensor | None = None,  # (V, H) of the reference
        ref_bias: Tensor | None = None,  # (V,)
        ref_logps: Tensor | None = None,  # (2B,)
        reward_margins: Tensor | None = None,  # (B,)
        cu_seqlens: Tensor | None = None,  # (2B + 1,)
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        *,
        return_stats: bool = False,
    ) -> PreferenceOutput:
        """The loss of B pairs: B chosen sequences, then their B rejected ones.

        Args:
            hidden, weight, labels, bias, logit_scale, softcap, temperature: as in
                `prefkern.linear_logprobs`; labels[t] is the token that hidden[t] predicts.
            ref_hidden, ref_weight, ref_bias: the reference's, through its own head; no gradient
                reaches them. The labels and the transform are the policy's.
            ref_logps: instead, sums computed earlier, [2B], chosen first.
            reward_margins: [B], for objectives that use them.
            cu_seqlens: [2B + 1] int32 or int64, where each sequence of a packed batch begins.
            return_stats: also return per-token statistics, of the labels' shape.

        Raises TypeError and ValueError as `prefkern.linear_logprobs` does, for an odd number of
        sequences, and for a reference that is missing, given twice, or given in part.
        """
        checks.head(hidden, weight, bias)
        checks.labels(labels, hidden.shape[:-1], hidden.device)
        checks.transform(logit_scale, softcap, temperature)
        bounds = _bounds(labels, cu_seqlens)
        n_sequences = bounds.shape[0] - 1
        _check_reference(
            self.objective, hidden, weight, ref_hidden, ref_weight, ref_bias, ref_logps, n_sequences
        )
        if reward_margins is not None:
            if not self.objective.uses_reward_margins:
                name = type(self.objective).__name__
                raise ValueError(f"reward_margins was given, which {name} does not use")
            checks.vector("reward_margins", reward_margins, n_sequences // 2, hidden.device)
        workspace_mb = api.resolve_workspace(self.workspace_mb, hidden.device)
        backend = api.resolve_backend(self.backend, hidden.device)
        transform = Transform(float(logit_scale), softcap, float(temperature))

        scored = sequences.select(labels.reshape(-1), self.ignore_index, weight.shape[0], bounds)
        assert scored.offsets is not None
        if ref_hidden is not None and ref_weight is not None:
            with torch.no_grad():
                logps, _, _ = api.run(
                    ref_hidden,
                    ref_weight,
                    ref_bias,
                    scored,
                    transform,
                    workspace_mb,
                    backend,
                    False,
                )
                ref_logps = sequences.sequence_sums(logps, scored.offsets)
        elif ref_logps is not None:
            ref_logps = ref_logps.detach().float()
        logps, stats, plan = api.run(
            hidden, weight, bias, scored, transform, workspace_mb, backend, return_stats
        )
        result, sums, lengths = self._pair_loss(
            logps, scored.offsets, ref_logps, reward_margins, backend
        )
        chosen_logps, rejected_logps = sums.chunk(2)
        ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.chunk(2)
        return PreferenceOutput(
            loss=result.losses.mean(),
            losses=result.losses,
            chosen_logps=chosen_logps,
            rejected_logps=rejected_logps,
            ref_chosen_logps=ref_chosen,
            ref_rejected_logps=ref_rejected,
            chosen_rewards=result.chosen_rewards,
            rejected_rewards=result.rejected_rewards,
            chosen_lengths=lengths.chunk(2)[0],
            rejected_lengths=lengths.chunk(2)[1],
            beta_chosen=result.beta_chosen,
            beta_rejected=result.beta_rejected,
            token_stats=None
            if stats is None
            else TokenStats(
                *(api.place(x, scored.rows, labels.shape) for x in (logps.detach(), *stats))
            ),
            plan=plan,
        )

    def _pair_loss(
        self,
        logps: Tensor,  # (N,)
        offsets: Tensor,  # (2B + 1,)
        ref_logps: Tensor | None,  # (2B,)
        reward_margins: Tensor | None,  # (B,)
        backend: str,
    ) -> tuple[PairLoss, Tensor, Tensor]:
        """The pairs' losses, and the sums and lengths of their sequences, (2B,) each."""
        options = self.objective.pair_kernel_options()
        if backend == "triton" and options is not None and ref_logps is not None:
            losses, sums, lengths, *rest = _PairLoss.apply(logps, offsets, ref_logps, options)
            return PairLoss(losses, *rest), sums, lengths
        sums = sequences.sequence_sums(logps, offsets)
        lengths = offsets.diff()
        chosen, rejected = sums.chunk(2)
        ref_chosen, ref_rejected = (None, None) if ref_logps is None else ref_logps.chunk(2)
        chosen_lengths, rejected_lengths = lengths.chunk(2)
        pairs = Pairs(
            chosen,
            rejected,
            ref_chosen,
            ref_rejected,
            chosen_lengths,
            rejected_lengths,
            reward_margins,
        )
        return self.objective(pairs), sums, lengths


class _PairLoss(torch.autograd.Function):
    """The pair kernel: sums, losses and each sequence's gradient coefficient in one launch."""

    @staticmethod
    def forward(
        ctx,
        logps: Tensor,  # (N,)
        offsets: Tensor,  # (2B + 1,)
        ref_logps: Tensor,  # (2B,)
        options: dict[str, Any],
    ) -> tuple[Tensor, ...]:
        from prefkern_kernels import pair_loss

        out = pair_loss(logps, offsets, ref_logps, **options)
        ctx.save_for_backward(out.coefficients, offsets)
        ctx.count = logps.shape[0]
        rewards = out.rewards.chunk(2)
        constant = (out.lengths, out.beta_chosen, out.beta_rejected, *rewards)
        ctx.mark_non_differentiable(*constant)
        return out.losses, out.sums, *constant

    @staticmethod
    @differentiable_once
    def backward(ctx, dlosses: Tensor, dsums: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        coefficients, offsets = ctx.saved_tensors
        # d loss_b / d logp_t is the same for every token of a sequence.
        dsequence = coefficients * dlosses.repeat(2) + dsums
        return sequences.spread(dsequence, offsets, ctx.count), None, None, None


def _bounds(labels: Tensor, cu_seqlens: Tensor | None) -> Tensor:  # (2B + 1,)
    """Where each sequence begins among the flat tokens; checks what shapes can tell."""
    if cu_seqlens is None:
        if labels.ndim != 2 or labels.shape[0] == 0 or labels.shape[0] % 2:
            raise ValueError(
                "labels must have shape [2B, T], B chosen rows and then their B rejected rows "
                f"(or [M] with cu_seqlens), got {list(labels.shape)}"
            )
        rows, length = labels.shape
        return torch.arange(rows + 1, device=labels.device) * length
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens must be an int32 or int64 tensor, got {cu_seqlens!r}")
    if labels.ndim != 1:
        raise ValueError(
            "with cu_seqlens the batch is packed: hidden must have shape [M, H] and labels [M], "
            f"got labels {list(labels.shape)}"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 3 or cu_seqlens.shape[0] % 2 == 0:
        raise ValueError(f"cu_seqlens must have shape [2B + 1], got {list(cu_seqlens.shape)}")
    return cu_seqlens.to(labels.device)


def _check_reference(
    objective: Objective,
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logps: Tensor | None,
    n_sequences: int,
) -> None:
    name = type(objective).__name__
    if (ref_hidden is None) != (ref_weight is None):
        given, missing = ("ref_hidden", "ref_weight")
        if ref_hidden is None:
            given, missing = missing, given
        raise ValueError(f"{given} was given without {missing}; a reference needs both")
    if ref_bias is not None and ref_weight is None:
        raise ValueError("ref_bias was given without ref_weight")
    if ref_hidden is not None and ref_logps is not None:
        raise ValueError("give either ref_hidden and ref_weight, or ref_logps, not both")
    if ref_hidden is not None and ref_weight is not None:
        checks.head(ref_hidden, ref_weight, ref_bias, prefix="ref_")
        if ref_weight.shape[0] < weight.shape[0]:
            raise ValueError(
                f"ref_weight has {ref_weight.shape[0]} words and weight {weight.shape[0]}: "
                "the reference must know every word that labels may name"
            )
        if ref_hidden.shape[:-1] != hidden.shape[:-1] or ref_hidden.device != hidden.device:
            raise ValueError(
                f"ref_hidden must have hidden's shape but for H and its device, "
                f"{list(hidden.shape)} on {hidden.device}; "
                f"got {list(ref_hidden.shape)} on {ref_hidden.device}"
            )
    if ref_logps is not None:
        checks.vector("ref_logps", ref_logps, n_sequences, hidden.device)
    if objective.needs_reference and ref_hidden is None and ref_logps is None:
        raise ValueError(
            f"{name} needs a reference: give ref_hidden and ref_weight, or ref_logps, "
            "sums computed earlier"
        )
