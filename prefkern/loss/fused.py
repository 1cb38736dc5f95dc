"""FusedPreferenceLoss: hidden states, head and labels in; a preference loss out; no logits between.

The operator's passes over tiles give per-token log-probs (and, for TDPO, divergences from the
reference); `pairwise` forms their sequence sums and asks the objective. KTO has no pairs: it takes
single responses through the same call.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefkern.loss import checks as loss_checks
from prefkern.loss import nonfinite, pairwise
from prefkern.loss.arguments import Given, local
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.objectives import Examples, Objective, PairLoss, Pairs, UnpairedObjective
from prefkern.objectives.running import counted_once
from prefkern.ops import call, checks, compiled, parts, plain, sequences, shards
from prefkern.ops.agreement import Agreement
from prefkern.ops.autograd import Result
from prefkern.ops.operands import Head, Transform, same_head
from prefkern.ops.outputs import TokenStats
from prefkern.ops.plan import Plan
from prefkern.ops.shards import VocabShard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class FusedPreferenceLoss(nn.Module):
    """A preference objective on log-probs that are computed in tiles.

    Args:
        objective: an objective of `prefkern.objectives`.
        ignore_index: label of tokens that are not scored.
        workspace_mb: bound on temporary memory in MiB; None: chosen for the device, and larger on a
            GPU if the head is trained.
        backend: None, "triton" or "torch"; see `prefkern.linear_logprobs`.
        on_nonfinite: "raise" (FloatingPointError) or "warn" if the loss, a log-prob, the
            reference's sums or the margins are NaN or infinite. The message names the cause and its
            place (`prefkern.diagnostics.explain_nonfinite`). Takes one device synchronisation a
            call, so it is refused under torch.compile and in a CUDA graph. None: no check.
        ld_alpha: weight of the tokens beyond the length of a pair's shorter response, in [0, 1], in
            the sums of policy and reference (LD-DPO); None: 1. Lengths stay whole, and so do NLL
            terms and WPO's weights. Not for KTO, which has no pairs, TDPO, and sequence_group.
        sequence_group: the torch.distributed process group whose ranks each hold some tokens of
            every sequence (context or sequence parallelism); None: this rank has all of them.

    Running statistics (alpha-DPO, beta-DPO) move at each forward in training mode. Checkpoint the
    model, not the loss: a recomputation would move them again, and raises RuntimeError. Statistics
    follow the batch to its device, so the loss need not be moved there.
    """

    def __init__(
        self,
        objective: Objective | UnpairedObjective,
        ignore_index: int = -100,
        workspace_mb: float | None = None,
        backend: str | None = None,
        on_nonfinite: nonfinite.OnNonfinite | None = None,
        sequence_group: ProcessGroup | None = None,
        ld_alpha: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(objective, Objective | UnpairedObjective):
            raise TypeError(
                f"objective must be an objective of prefkern.objectives, got {objective!r}; "
                'prefkern.objectives.build("adadpo") makes one by name'
            )
        checks.ignore_index(ignore_index)
        if workspace_mb is not None:
            plain.positive("workspace_mb", workspace_mb)
        if backend is not None and backend not in plain.BACKENDS:
            raise ValueError(f"backend must be None or one of {plain.BACKENDS}, got {backend!r}")
        if on_nonfinite is not None and on_nonfinite not in nonfinite.MODES:
            raise ValueError(
                f"on_nonfinite must be None or one of {nonfinite.MODES}, got {on_nonfinite!r}"
            )
        parts.check_group(sequence_group)
        loss_checks.ld_alpha(ld_alpha, objective, sequence_group is not None)
        self.objective = objective
        self.ignore_index = ignore_index
        self.workspace_mb = workspace_mb
        self.backend = backend
        self.on_nonfinite: nonfinite.OnNonfinite | None = on_nonfinite
        self.sequence_group = sequence_group
        self.ld_alpha = ld_alpha

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
        desirable: Tensor | None = None,  # (S,), KTO
        mismatched_log_ratios: Tensor | None = None,  # (M,), KTO
        lora_hidden: Tensor | None = None,  # (2B, T, R), or (M, R) with cu_seqlens
        lora_weight: Tensor | None = None,  # (V, R)
        vocab: VocabShard | None = None,
    ) -> PreferenceOutput | UnpairedOutput:
        """The loss of B pairs: B chosen sequences, then their B rejected ones.

        For an objective with a third, gold response (TPO) the B gold sequences come last: the shapes
        that are 2B below are then 3B, but for `ref_logps`, which is of pairs.

        Args:
            hidden, weight, labels, bias, logit_scale, softcap, temperature: as in
                `prefkern.linear_logprobs`; labels[t] is the token that hidden[t] predicts.
            ref_hidden, ref_weight, ref_bias: the reference's hidden states and head; no gradient
                reaches them. Labels and transform are the policy's.
            ref_logps: instead, sums computed earlier, [2B], chosen first, with the same ld_alpha.
                Not for TDPO, which needs the reference's distributions.
            reward_margins: [B], for objectives that need them; others ignore them.
            cu_seqlens: [2B + 1] int32 or int64, where each sequence of a packed batch begins.
            return_stats: also return per-token statistics, in the labels' shape.
            desirable: for an unpaired objective (KTO), [S] bool: the batch is then S single
                responses, hidden [S, T, H] (or packed, cu_seqlens [S + 1]), and the result an
                `UnpairedOutput`.
            mismatched_log_ratios: KTO, [M]: summed log policy / reference of mismatched pairs; see
                `prefkern.objectives.Examples`.
            lora_hidden, lora_weight: a LoRA adapter on the policy's head, as in
                `prefkern.linear_logprobs`.
            vocab: the part of the vocabulary that this rank holds, as in
                `prefkern.linear_logprobs`; ref_weight and ref_bias then have the same rows as
                weight. Every rank gets the same loss.

        With a `sequence_group` hidden, labels, ref_hidden, lora_hidden and cu_seqlens are of this
        rank's tokens: any of them, in any order, aligned before they were split. The number of
        sequences is the same on all ranks; a rank may have no token of some. ref_logps and all else
        are of whole sequences. Every rank gets the same loss, and the gradients of its own tokens:
        those of a weight are to be summed over the group.

        Raises TypeError and ValueError as `prefkern.linear_logprobs` does. Also for an odd number
        of sequences, and for a reference or margins that are missing, incomplete or given twice.
        """
        given = Given(
            hidden,
            weight,
            labels,
            bias,
            ref_hidden,
            ref_weight,
            ref_bias,
            ref_logps,
            reward_margins,
            cu_seqlens,
            logit_scale,
            softcap,
            temperature,
            return_stats,
            desirable,
            mismatched_log_ratios,
            lora_hidden,
            lora_weight,
            vocab,
        )
        shards.refuse_graphs(vocab, weight, labels)
        parts.refuse_graphs(self.sequence_group, labels)
        # Which head is the reference's must not depend on the rows, of which a rank may have none.
        is_one_head = ref_weight is weight and ref_bias is bias and lora_weight is None
        ranks = Agreement(parts.party(self.sequence_group))
        with ranks as (facts_of_parts,):
            given, facts = local(given, ranks, self.sequence_group)
            bounds = self._check(given)
            if torch.compiler.is_compiling():
                return self._compiled(given, bounds)
            backend = call.resolve_backend(self.backend, given.hidden.device, given.hidden.dtype)
            scored = sequences.select(
                given.labels.reshape(-1),
                self.ignore_index,
                given.vocab_size,
                bounds,
                given.is_packed,
            )
            head, reference = given.head(), given.reference()
            if given.vocab is None:
                is_one_head = reference is not None and same_head(head, reference)
            else:
                is_one_head &= ref_hidden is not None and ref_hidden.dtype == hidden.dtype
            n_sequences = bounds.shape[0] - 1
            self._note_facts(given, head, n_sequences, is_one_head, facts, facts_of_parts)
        tokens, plan = _score_tokens(
            self.objective,
            head,
            reference,
            is_one_head,
            scored,
            given.transform(),
            self.workspace_mb,
            backend,
            return_stats,
            given.vocab,
        )
        out, ref_logps = self._output(given, scored, tokens, plan, backend)
        if self.on_nonfinite is not None:
            self._report_nonfinite(given, out, ref_logps)
        return out

    def _check(self, given: Given) -> Tensor:  # -> (S + 1,)
        """Check a call's arguments; returns where each sequence begins among the flat tokens."""
        objective, hidden, weight, labels = self.objective, given.hidden, given.weight, given.labels
        checks.head(hidden, weight, given.bias, shard=given.vocab)
        checks.low_rank(hidden, weight, given.lora_hidden, given.lora_weight)
        checks.labels(labels, hidden.shape[:-1], hidden.device)
        checks.transform(given.logit_scale, given.softcap, given.temperature)
        bounds = loss_checks.bounds(labels, given.cu_seqlens, objective.responses)
        n_sequences = bounds.shape[0] - 1
        loss_checks.reference(
            objective,
            hidden,
            weight,
            given.ref_hidden,
            given.ref_weight,
            given.ref_bias,
            given.ref_logps,
            n_sequences,
            given.vocab,
        )
        loss_checks.unpaired(
            objective, given.desirable, given.mismatched_log_ratios, n_sequences, hidden
        )
        loss_checks.margins(objective, given.reward_margins, n_sequences, hidden.device)
        plain.boolean("return_stats", given.return_stats)
        if self.on_nonfinite is not None and (
            torch.compiler.is_compiling() or sequences.is_capturing(labels)
        ):
            raise NotImplementedError(
                f"on_nonfinite={self.on_nonfinite!r} reads a number from the device, which "
                "torch.compile and CUDA graphs cannot; leave it None, and check the loss outside"
            )
        return bounds

    def _note_facts(
        self,
        given: Given,
        head: Head,
        n_sequences: int,
        is_one_head: bool,
        facts: dict[str, object],
        facts_of_parts: dict[str, object],
    ) -> None:
        """What the ranks of a call must have in common, for them to compare."""
        vocab = given.vocab
        common = {
            "objective": " ".join(repr(self.objective).split()),
            "ignore_index": self.ignore_index,
            "ld_alpha": self.ld_alpha,
            "ref_hidden": given.ref_hidden is not None,
            **given.transform().keywords(),
        }
        if self.sequence_group is not None:
            facts_of_parts |= parts.facts_of(
                head,
                n_sequences,
                given.vocab_size,
                {
                    "ref_logps": given.ref_logps,
                    "reward_margins": given.reward_margins,
                    "desirable": given.desirable,
                    "mismatched_log_ratios": given.mismatched_log_ratios,
                },
                vocab=None if vocab is None else vocab.size,
                training=self.objective.training,
                on_nonfinite=self.on_nonfinite,
                **common,
            )
        if vocab is not None:
            facts |= shards.facts_of(
                vocab,
                head,
                given.labels,
                return_stats=given.return_stats,
                on_nonfinite=self.on_nonfinite,
                ref_weight="weight itself" if is_one_head else "a head of its own",
                **common,
            )

    def _output(
        self,
        given: Given,
        scored: sequences.Scored,
        tokens: Result,
        plan: Plan,
        backend: str,
    ) -> tuple[PreferenceOutput | UnpairedOutput, Tensor | None]:
        """The output from the numbers of tokens, and the reference's sums."""
        objective, group, vocab = self.objective, self.sequence_group, given.vocab
        assert scored.offsets is not None
        scores = pairwise.scores_of(
            tokens,
            scored.offsets,
            objective.responses,
            given.ref_logps,
            given.reward_margins,
            isinstance(objective, Objective) and objective.needs_alignments,
            group,
            self.ld_alpha,
        )
        token_stats = None
        if given.return_stats and tokens.stats is not None:
            token_stats = TokenStats(
                *(
                    call.place(x, scored.rows, given.labels.shape)
                    for x in (tokens.logps.detach(), *tokens.stats[:3])
                )
            )
        # Running statistics are of all ranks' pairs; ranks with the same pairs count them once.
        with counted_once(group, None if vocab is None else vocab.group):
            if isinstance(objective, Objective):
                paired = pairwise.pair_loss(objective, scores, backend)
                out = _output_of(
                    objective, paired.pairs, paired.result, token_stats, paired.gradients, plan
                )
            else:
                out = _unpaired_output(
                    objective,
                    scores.sums(),
                    scores.lengths,
                    scores.ref_logps,
                    given.desirable,
                    given.mismatched_log_ratios,
                    token_stats,
                    plan,
                )
        return out, scores.ref_logps

    def _report_nonfinite(
        self, given: Given, out: PreferenceOutput | UnpairedOutput, ref_logps: Tensor | None
    ) -> None:
        objective = self.objective
        is_paired = isinstance(objective, Objective)
        ref_logps = ref_logps if objective.needs_reference else None
        needs_margins = is_paired and objective.needs_reward_margins
        reward_margins = given.reward_margins if needs_margins else None
        groups = {"sequence_group": self.sequence_group, "vocab's group": given.vocab}
        others = " or ".join(name for name, group in groups.items() if group is not None) or None
        assert self.on_nonfinite is not None
        nonfinite.report(
            self.on_nonfinite,
            out,
            lambda: nonfinite.causes(
                given.hidden,
                given.weight,
                given.labels,
                given.bias,
                ref_hidden=given.ref_hidden,
                ref_weight=given.ref_weight,
                ref_bias=given.ref_bias,
                ref_logps=ref_logps,
                reward_margins=reward_margins,
                mismatched_log_ratios=given.mismatched_log_ratios,
                lora_hidden=given.lora_hidden,
                lora_weight=given.lora_weight,
                cu_seqlens=given.cu_seqlens,
                ignore_index=self.ignore_index,
                responses=objective.responses,
                start=0 if given.vocab is None else given.vocab.start,
            ),
            (ref_logps, reward_margins, given.mismatched_log_ratios),
            others=others,
        )

    def _compiled(
        self,
        given: Given,
        bounds: Tensor,  # (S + 1,)
    ) -> PreferenceOutput | UnpairedOutput:
        """The same under torch.compile: the passes are opaque to it, all else is traced."""
        objective, labels, ref_logps = self.objective, given.labels, given.ref_logps
        responses = objective.responses
        reference = given.reference()
        is_paired = isinstance(objective, Objective)
        needs_kls = is_paired and objective.needs_kls
        # Each call checks them: the sums of what it returns must not be formed before.
        unchecked = bounds if given.is_packed else None
        token_logprobs = functools.partial(
            compiled.token_logprobs,
            labels=labels,
            ignore_index=self.ignore_index,
            transform=given.transform(),
            workspace_mb=self.workspace_mb,
            backend=self.backend,
            bounds=unchecked,
        )
        mask = labels != self.ignore_index

        def sums_of(logps: Tensor) -> tuple[Tensor, Tensor | None]:  # labels' shape -> (S,)
            if self.ld_alpha is None:
                return compiled.sequence_sums(logps, bounds), None
            two = compiled.pair_parts(mask, bounds, responses)
            return sequences.part_sums(logps.reshape(-1), two, self.ld_alpha)

        if reference is not None and not needs_kls:
            with torch.no_grad():
                ref_logps, _ = sums_of(token_logprobs(reference).logps)
        needs_alignments = is_paired and objective.needs_alignments
        tokens = token_logprobs(
            given.head(),
            reference=reference if needs_kls else None,
            with_stats=given.return_stats or needs_alignments,
        )
        logps, stats = tokens.logps, tokens.stats
        kls = None
        if tokens.kl is not None and tokens.ref_logps is not None:
            ref_logps = compiled.sequence_sums(tokens.ref_logps, bounds)
            kls = compiled.sequence_sums(tokens.kl, bounds)
        if ref_logps is not None:
            ref_logps = ref_logps.detach().to(logps.dtype)
        lengths = compiled.sequence_sums(mask, bounds)
        sums, whole = sums_of(logps)
        token_stats = None
        if given.return_stats and stats is not None:
            token_stats = TokenStats(logps.detach(), *stats[:3])
        if not isinstance(objective, Objective):
            return _unpaired_output(
                objective,
                sums,
                lengths,
                ref_logps,
                given.desirable,
                given.mismatched_log_ratios,
                token_stats,
            )
        alignments = None
        if needs_alignments and stats is not None:
            per_token = (logps.detach() - stats[3]) * mask
            alignments = compiled.sequence_sums(per_token, bounds) / lengths.clamp(min=1)
        margins = given.reward_margins
        margins = None if margins is None else margins.detach().to(logps.dtype)
        pairs = Pairs.of_sequences(
            sums, ref_logps, lengths, margins, alignments, kls, whole, responses
        )
        return _output_of(objective, pairs, objective(pairs), token_stats)


def _unpaired_output(
    objective: UnpairedObjective,
    sums: Tensor,  # (S,)
    lengths: Tensor,  # (S,)
    ref_logps: Tensor | None,  # (S,)
    desirable: Tensor | None,  # (S,)
    mismatched_log_ratios: Tensor | None,  # (M,)
    token_stats: TokenStats | None,
    plan: Plan | None = None,
) -> UnpairedOutput:
    assert ref_logps is not None and desirable is not None
    assert mismatched_log_ratios is not None
    result = objective(Examples(sums, desirable, ref_logps, mismatched_log_ratios))
    return UnpairedOutput(
        loss=result.losses.mean(),
        losses=result.losses,
        logps=sums,
        ref_logps=ref_logps,
        rewards=result.rewards,
        lengths=lengths,
        desirable=desirable,
        reference_point=result.reference_point,
        token_stats=token_stats,
        plan=plan,
    )


def _score_tokens(
    objective: Objective | UnpairedObjective,
    head: Head,
    reference: Head | None,
    is_one_head: bool,  # the reference's is the policy's
    scored: sequences.Scored,
    transform: Transform,
    workspace_mb: float | None,
    backend: str,
    return_stats: bool,
    shard: VocabShard | None,
) -> tuple[Result, Plan]:
    """Log-probs of policy and reference, and what else the objective needs of a token."""
    is_paired = isinstance(objective, Objective)
    needs_kls = is_paired and objective.needs_kls
    given = (scored, transform, workspace_mb, backend)
    ref_logps = ref_plan = None
    if reference is not None and not needs_kls and not is_one_head:
        with torch.no_grad():
            result, ref_plan = call.run(reference, *given, shard=shard)
        ref_logps, reference = result.logps, None
    result, plan = call.run(
        head,
        *given,
        reference=reference,
        with_stats=return_stats or (is_paired and objective.needs_alignments),
        with_divergence=needs_kls,
        shard=shard,
    )
    if ref_plan is not None:
        result, plan = replace(result, ref_logps=ref_logps), plan.after(ref_plan)
    return result, plan


def _output_of(
    objective: Objective,
    pairs: Pairs,
    result: PairLoss,
    token_stats: TokenStats | None,
    gradients: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
    plan: Plan | None = None,
) -> PreferenceOutput:
    assert pairs.chosen_lengths is not None and pairs.rejected_lengths is not None
    with torch.no_grad():
        metrics = objective.metrics(pairs, result)
    return PreferenceOutput(
        loss=result.losses.mean(),
        losses=result.losses,
        chosen_logps=pairs.chosen_logps,
        rejected_logps=pairs.rejected_logps,
        ref_chosen_logps=pairs.ref_chosen_logps,
        ref_rejected_logps=pairs.ref_rejected_logps,
        chosen_rewards=result.chosen_rewards,
        rejected_rewards=result.rejected_rewards,
        chosen_lengths=pairs.chosen_lengths,
        rejected_lengths=pairs.rejected_lengths,
        beta_chosen=result.beta_chosen,
        beta_rejected=result.beta_rejected,
        chosen_gradients=gradients[0],
        rejected_gradients=gradients[1],
        gold_logps=pairs.gold_logps,
        gold_lengths=pairs.gold_lengths,
        metrics=metrics,
        token_stats=token_stats,
        plan=plan,
    )
