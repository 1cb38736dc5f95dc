"""Find the cause of a loss that is NaN or infinite.

A NaN in one hidden state makes a log-prob NaN, then the loss, and a step later the whole model. The
loss does not show which input caused it. `explain_nonfinite` looks at all inputs in the order in
which they depend on one another: the head, the hidden states of scored tokens, the reference's
numbers, the reward margins. It names each input that is not finite, how much of it, the first
place, and what to do.

In a healthy call, `FusedPreferenceLoss(on_nonfinite="raise")` reads one bit from the device, and
looks no further.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from prefkern.loss import checks as loss_checks
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.ops import checks, plain, sequences

OnNonfinite = Literal["raise", "warn"]
MODES = ("raise", "warn")

_OF_THE_MODEL = (
    "the model's forward made it. If every token has it, an earlier step has spoilt the parameters:"
    " lower learning_rate, or set max_grad_norm. If a few have it, look at those sequences. Under "
    "float16, look for activations beyond 65504 (bfloat16 has the range of float32)"
)
_OF_A_WEIGHT = (
    "an earlier optimiser step has spoilt it, or it was loaded like this: go back to a checkpoint, "
    "with a lower learning_rate"
)
_OF_A_REFERENCE = "the reference made it, or the dataset carried it: check its model or column"
_REMEDIES = {
    "weight": _OF_A_WEIGHT,
    "bias": _OF_A_WEIGHT,
    "lora_weight": _OF_A_WEIGHT,
    "hidden": _OF_THE_MODEL,
    "lora_hidden": _OF_THE_MODEL,
    "ref_hidden": _OF_A_REFERENCE,
    "ref_weight": _OF_A_REFERENCE,
    "ref_bias": _OF_A_REFERENCE,
    "ref_logps": _OF_A_REFERENCE,
    "reward_margins": "the dataset carried it: check the reward model's margins of that pair",
    "mismatched_log_ratios": "policy or reference made it, from a mismatched prompt and response",
}
# Values to check at a time.
_PIECE = 2**24


def explain_nonfinite(
    hidden: Tensor,  # (2B, T, H), or (M, H) with cu_seqlens
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (2B, T), or (M,)
    bias: Tensor | None = None,  # (V,)
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    ref_logps: Tensor | None = None,  # (2B,)
    reward_margins: Tensor | None = None,  # (B,)
    mismatched_log_ratios: Tensor | None = None,  # (M,)
    lora_hidden: Tensor | None = None,
    lora_weight: Tensor | None = None,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    ignore_index: int = -100,
    paired: bool = True,
    gold: bool = False,
) -> str | None:
    """The arguments of a preference loss that are not finite, one a line; None if all are finite.

    Args:
        hidden, weight, labels, bias and the rest: as `prefkern.FusedPreferenceLoss` was called.
            Hidden states of tokens that are not scored do not count. Nor does a bias of -inf, which
            rules out a vocabulary entry, unless that entry is a label.
        paired: B chosen sequences, then their B rejected ones; False: single responses (KTO).
        gold: of pairs, B gold sequences come last (TPO).

    Raises TypeError and ValueError as the loss does. Synchronises with the device. Checks 16
    million values at a time, with a bool of memory for each.
    """
    plain.boolean("paired", paired)
    plain.boolean("gold", gold)
    if gold and not paired:
        raise ValueError("gold responses are of pairs, got gold=True with paired=False")
    responses = 1 + paired + gold
    checks.head(hidden, weight, bias)
    checks.low_rank(hidden, weight, lora_hidden, lora_weight)
    checks.labels(labels, hidden.shape[:-1], hidden.device)
    checks.ignore_index(ignore_index)
    bounds = loss_checks.bounds(labels, cu_seqlens, responses)
    count = bounds.shape[0] - 1
    loss_checks.reference_head(hidden, weight, ref_hidden, ref_weight, ref_bias)
    for name, value, size in (
        ("ref_logps", ref_logps, loss_checks.reference_sums(count, responses)),
        ("reward_margins", reward_margins, count // max(responses, 2)),
    ):
        if value is not None:
            checks.vector(name, value, size, hidden.device)
    if mismatched_log_ratios is not None:
        loss_checks.mismatched(mismatched_log_ratios, hidden.device)
    is_packed = cu_seqlens is not None
    sequences.select(labels.reshape(-1), ignore_index, weight.shape[0], bounds, is_packed)
    return causes(
        hidden,
        weight,
        labels,
        bias,
        ref_hidden=ref_hidden,
        ref_weight=ref_weight,
        ref_bias=ref_bias,
        ref_logps=ref_logps,
        reward_margins=reward_margins,
        mismatched_log_ratios=mismatched_log_ratios,
        lora_hidden=lora_hidden,
        lora_weight=lora_weight,
        cu_seqlens=cu_seqlens,
        ignore_index=ignore_index,
        responses=responses,
    )


def causes(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    *,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    ref_bias: Tensor | None,
    ref_logps: Tensor | None,
    reward_margins: Tensor | None,
    mismatched_log_ratios: Tensor | None,
    lora_hidden: Tensor | None,
    lora_weight: Tensor | None,
    cu_seqlens: Tensor | None,
    ignore_index: int,
    responses: int,
    start: int = 0,
) -> str | None:
    """`explain_nonfinite` of arguments that were checked. The head's first entry is `start`."""
    scored = labels.reshape(-1) != ignore_index
    count = labels.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1

    def of_rows(value: Tensor | None) -> Tensor | None:
        return None if value is None else _bad_rows(value.reshape(-1, value.shape[-1]))

    def of_tokens(value: Tensor | None) -> Tensor | None:
        return None if value is None else _bad_rows(value.reshape(-1, value.shape[-1])) & scored

    def of_bias(value: Tensor | None) -> Tensor | None:
        return None if value is None else _bad_entries(value, labels.reshape(-1)[scored] - start)

    def of_numbers(value: Tensor | None) -> Tensor | None:
        return None if value is None else ~value.isfinite()

    # (how many there are, 0 for all that were looked at; what they are; the name of the first)
    entries = (0, "vocabulary entries", lambda row: str(row + start))
    tokens = (int(scored.sum()), "scored tokens", partial(_token, labels, cu_seqlens, responses))
    rows = (0, "sequences", partial(_sequence, count, responses))
    pairs = (0, "pairs", "pair {}".format)
    numbers = (0, "numbers", "number {}".format)
    inputs = (
        ("weight", of_rows(weight), entries),
        ("bias", of_bias(bias), entries),
        ("lora_weight", of_rows(lora_weight), entries),
        ("hidden", of_tokens(hidden), tokens),
        ("lora_hidden", of_tokens(lora_hidden), tokens),
        ("ref_weight", of_rows(ref_weight), entries),
        ("ref_bias", of_bias(ref_bias), entries),
        ("ref_hidden", of_tokens(ref_hidden), tokens),
        ("ref_logps", of_numbers(ref_logps), rows),
        ("reward_margins", of_numbers(reward_margins), pairs),
        ("mismatched_log_ratios", of_numbers(mismatched_log_ratios), numbers),
    )
    lines = []
    for name, bad, (total, things, place) in inputs:
        if bad is not None and bad.any():
            first = place(int(bad.to(torch.uint8).argmax()))
            found = f"{int(bad.sum())} of {total or len(bad)} {things}, the first is {first}"
            lines.append(f"{name}: {found}; {_REMEDIES[name]}")
    return "\n".join(lines) or None


def report(
    mode: OnNonfinite,
    out: PreferenceOutput | UnpairedOutput,
    explain: Callable[[], str | None],
    given: tuple[Tensor | None, ...] = (),
    others: str | None = None,
) -> None:
    """Raise FloatingPointError, or warn, if a loss, a log-prob or a given vector is not finite.

    Takes one synchronisation. `others`: the group or groups whose other ranks hold tokens of the
    same sequences, or rows of the same head.
    """
    if isinstance(out, PreferenceOutput):
        sums = {"chosen": out.chosen_logps, "rejected": out.rejected_logps}
        if out.gold_logps is not None:
            sums["gold"] = out.gold_logps
    else:
        sums = {"summed": out.logps}
        given = (*given, out.reference_point.reshape(1))
    with torch.no_grad():
        vectors = (out.loss.reshape(1), *sums.values(), *given)
        # cat promotes to the widest dtype: a float64 beyond float32's range is finite.
        values = torch.cat([v.detach() for v in vectors if v is not None])
        if values.isfinite().all():
            return
        losses = _vector("losses", out.losses)
        parts = [losses, *(_vector(f"{name} log-probs", value) for name, value in sums.items())]
        found = explain()
        # A rank of a sequence's tokens counts them from its own first one.
        part = "" if others is None else " in this rank's part"
        cause = f"These are not finite{part}:\n{found}"
        if found is None and others is not None:
            cause = (
                f"Every input of this rank is finite: another rank of {others} names what is not "
                "finite in its part, or a logit or a sum overflowed"
            )
        elif found is None:
            dtype = str(out.loss.dtype).removeprefix("torch.")
            cause = (
                f"Every input is finite, so a logit or a sum overflowed {dtype}, or a label has a "
                "probability of 0: look at the magnitudes of hidden and weight"
            )
    message = (
        f"the loss is {out.loss.item():g}{''.join(f'; {part}' for part in parts if part)}. {cause}"
    )
    if mode == "raise":
        raise FloatingPointError(message)
    warnings.warn(message, RuntimeWarning, stacklevel=3)


def _vector(name: str, values: Tensor) -> str:
    bad = (~values.isfinite()).nonzero().flatten().tolist()
    if not bad:
        return ""
    return f"{len(bad)} of {len(values)} {name} are not finite, the first at {bad[0]}"


def _bad_rows(matrix: Tensor) -> Tensor:  # (n, k) -> (n,)
    """Whether each row has a value that is not finite."""
    pieces = matrix.detach().split(max(_PIECE // max(matrix.shape[1], 1), 1))
    return torch.cat([~piece.isfinite().all(1) for piece in pieces])


def _bad_entries(bias: Tensor, entries: Tensor) -> Tensor:  # (V,), (N,) -> (V,)
    bad = bias.isnan() | (bias == float("inf"))
    entries = entries[(entries >= 0) & (entries < len(bias))]
    bad[entries] |= ~bias[entries].isfinite()
    return bad


def _token(labels: Tensor, cu_seqlens: Tensor | None, responses: int, first: int) -> str:
    """The sequence of a flat token, and its position there."""
    if cu_seqlens is None:
        count, (row, column) = labels.shape[0], divmod(first, labels.shape[1])
    else:
        count = len(cu_seqlens) - 1
        row = int((cu_seqlens[1:] <= first).sum())
        column = first - int(cu_seqlens[row])
    return f"token {column} of {_sequence(count, responses, row)}"


def _sequence(count: int, responses: int, row: int) -> str:
    side = f"response {row}"
    if responses > 1:
        which, pair = divmod(row, count // responses)
        side = f"the {('chosen', 'rejected', 'gold')[which]} response of pair {pair}"
    return f"sequence {row} ({side})"
