"""The operator and the loss as `torch.compile` sees them: opaque operators around the same passes.

Inside a compiled region `linear_logprobs` and `FusedPreferenceLoss` come here. What happens to a
tile is behind two operators of torch's library, `prefkern::logprobs` and its backward, so that the
graph is whole (`fullgraph=True`); sequence sums and the objective are traced, and the compiler
fuses them. How many tokens are scored is known only when the operator runs: its outputs have room
for all M tokens, of which the first N are used, so nothing in the graph depends on N.

What differs from an eager call: a label out of range is found when the compiled function runs; an
output has no `plan` (`prefkern.last_plan()` has it) and no gradients of its pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from prefkern.ops import call, memory, passes, plan, sequences
from prefkern.ops.autograd import without_autocast
from prefkern.ops.operands import Head, Operands, Transform

# What both operators are told beside their tensors.
_OPTIONS = (
    "int ignore_index, float logit_scale, float? softcap, float temperature, "
    "float workspace_mb, str backend, ScalarType compute_dtype, bool upcasts"
)
# The share of the workspace that kept probabilities may take: the rest is for the tiles, for which
# 8 MiB are enough at any shape.
_KEPT_SHARE = 0.75
_LEAST_MB_TO_KEEP = 32

NO_ADAPTER = "a LoRA adapter on the head (lora_hidden) is not supported under torch.compile yet"


@dataclass(frozen=True)
class Options:
    """The arguments that are not tensors, as an operator takes them."""

    ignore_index: int
    logit_scale: float
    softcap: float | None
    temperature: float
    workspace_mb: float
    backend: str
    compute_dtype: torch.dtype
    upcasts: bool

    @property
    def operands(self) -> Operands:
        return Operands(self.compute_dtype, self.upcasts)

    @property
    def transform(self) -> Transform:
        return Transform(self.logit_scale, self.softcap, self.temperature)

    def values(self) -> tuple:
        return (
            self.ignore_index,
            self.logit_scale,
            self.softcap,
            self.temperature,
            self.workspace_mb,
            self.backend,
            self.compute_dtype,
            self.upcasts,
        )


def kept_rows(tokens: int, vocab_size: int, options: Options) -> int:
    """For how many tokens probabilities may be kept; `tokens` may be a symbol."""
    if options.workspace_mb < _LEAST_MB_TO_KEEP:
        return 0
    budget = int(options.workspace_mb * plan.MIB * _KEPT_SHARE)
    most = budget // (plan.kept_row(vocab_size) * options.operands.dtype.itemsize)
    return torch.sym_min(tokens, most)  # pyright: ignore[reportReturnType]


def _planner(
    scored: sequences.Scored,
    weight: Tensor,
    hidden: Tensor,
    gradients: plan.Gradients,
    options: Options,
    with_stats: bool,
    room: int,
) -> functools.partial[plan.Plan]:
    """Plans by workspace, of a call that has room to keep the probabilities of so many tokens."""
    return functools.partial(
        plan.make_plan,
        tokens=scored.count,
        vocab_size=weight.shape[0],
        head=call.planned_head(hidden, weight, options.operands),
        gradients=gradients,
        backend=options.backend,
        has_softcap=options.softcap is not None,
        with_stats=with_stats,
        kept=min(scored.count, room),
    )


def _logprobs(
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,)
    bounds: Tensor | None,  # (S + 1,) to be checked, if they are not known to be right
    trains_hidden: bool,
    trains_head: bool,
    with_stats: bool,
    *options,
) -> tuple[Tensor, ...]:
    given = Options(*options)
    gradients = plan.Gradients(trains_hidden, trains_head, False)
    outputs = _room(hidden, weight, labels, trains_hidden, trains_head, with_stats, given)
    logps, *stats, derivative, unit, share, label_value, kept = outputs
    scored = sequences.select(labels, given.ignore_index, weight.shape[0], bounds)
    plan_of = _planner(scored, weight, hidden, gradients, given, with_stats, kept.shape[0])
    made = plan_of(workspace_mb=given.workspace_mb)
    plan.record(made)
    N = scored.count
    terms = None
    if trains_head:
        terms = passes.HeadTerms(unit[:N], share[:N], label_value[:N], kept[: made.kept_tokens])

    def attempt(made: plan.Plan) -> passes.Passed:
        return passes.forward(
            _head(scored, hidden, weight, bias, given),
            scored.rows,
            scored.labels,
            given.transform,
            made,
            call.tile_operations(given.backend),
            with_stats,
            derivative=derivative[:N] if trains_hidden else None,
            terms=terms,
        )

    with torch.no_grad(), without_autocast(hidden):
        passed, made = _budget(plan_of, given, hidden).attempt(
            attempt, made, "forward", held_bytes=made.kept_bytes
        )
    for out, values in zip((logps, *stats), (passed.logps, *(passed.stats or ())), strict=False):
        out.copy_(call.place(scored.masked(values), scored.rows, labels.shape))
    # What is not used is not left to chance either: an operator's outputs are its inputs' doing.
    for out in (derivative, unit, share, label_value):
        out[N:].zero_()
    kept[made.kept_tokens :].zero_()
    kept[:, weight.shape[0] :].zero_()
    return outputs


def _budget(
    plan_of: functools.partial[plan.Plan], options: Options, hidden: Tensor
) -> memory.Budget:
    retries = not sequences.is_capturing(hidden)
    return memory.Budget(options.workspace_mb, plan_of, plan.record, retries)


def _head(
    scored: sequences.Scored, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: Options
) -> Head:
    bias = None if bias is None else bias.contiguous()
    return Head(scored.cleared(hidden), weight, bias, options.operands)


def _room(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    trains_hidden: bool,
    trains_head: bool,
    with_stats: bool,
    options: Options,
) -> tuple[Tensor, ...]:
    """Empty outputs: log-probs, four statistics, D, the head's terms; of no size if not wanted."""
    M, (V, H) = labels.shape[0], weight.shape

    def empty(wanted: bool, *shape: int, dtype: torch.dtype = options.operands.wide) -> Tensor:
        return hidden.new_empty(shape if wanted else (0,), dtype=dtype)

    rows = kept_rows(M, V, options) if trains_head else 0
    return (
        empty(True, M),
        empty(with_stats, M),
        empty(with_stats, M),
        empty(with_stats, M, dtype=torch.bool),
        empty(with_stats, M),
        empty(trains_hidden, M, H),
        empty(trains_head, M),
        empty(trains_head, M),
        empty(trains_head, M),
        empty(True, rows, plan.kept_row(V), dtype=options.operands.dtype),
    )


def _logprobs_backward(
    grad: Tensor,  # (M,)
    hidden: Tensor,  # (M, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    labels: Tensor,  # (M,)
    derivative: Tensor,
    unit: Tensor,
    share: Tensor,
    label_value: Tensor,
    kept: Tensor,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    trains_hidden: bool,
    *options,
) -> tuple[Tensor, Tensor, Tensor]:
    given = Options(*options)
    gradients = plan.Gradients(trains_hidden, needs_weight, needs_bias)
    scored = sequences.select(labels, given.ignore_index, weight.shape[0])
    plan_of = _planner(scored, weight, hidden, gradients, given, False, kept.shape[0])
    made = plan_of(workspace_mb=given.workspace_mb)
    N = scored.count
    grad = grad.to(given.operands.wide)
    grad = grad if scored.rows is None else grad.index_select(0, scored.rows)
    grad = scored.masked(grad)

    def attempt(made: plan.Plan) -> tuple[Tensor, Tensor, Tensor]:
        dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
        if needs_hidden:
            dhidden = passes.hidden_gradient(
                grad,
                derivative[:N],
                scored.rows,
                hidden.shape,
                hidden.dtype,
                call.tile_operations(given.backend),
            )
        if needs_weight or needs_bias:
            of_weight, of_bias, _ = passes.head_gradient(
                grad,
                _head(scored, hidden, weight, bias, given),
                scored.rows,
                scored.labels,
                passes.HeadTerms(unit[:N], share[:N], label_value[:N], kept[: made.kept_tokens]),
                given.transform,
                made,
                call.tile_operations(given.backend),
                gradients,
            )
            dweight = dweight if of_weight is None else of_weight
            dbias = dbias if of_bias is None else of_bias
        return dhidden, dweight, dbias

    with torch.no_grad(), without_autocast(grad):
        # What is kept is an input here, which a second attempt cannot give back.
        found, _ = _budget(plan_of, given, hidden).attempt(
            attempt, made, "backward", held_bytes=made.kept_bytes
        )
    return found


_forward_op = torch.library.custom_op(
    "prefkern::logprobs",
    _logprobs,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? bounds, "
    f"bool trains_hidden, bool trains_head, bool with_stats, {_OPTIONS}) -> ({', '.join(['Tensor'] * 10)})",
)
_backward_op = torch.library.custom_op(
    "prefkern::logprobs_backward",
    _logprobs_backward,
    mutates_args=(),
    schema="(Tensor grad, Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, "
    "Tensor derivative, Tensor unit, Tensor share, Tensor label_value, Tensor kept, "
    "bool needs_hidden, bool needs_weight, bool needs_bias, bool trains_hidden, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
)


@_forward_op.register_fake
def _(hidden, weight, bias, labels, bounds, trains_hidden, trains_head, with_stats, *options):
    return _room(hidden, weight, labels, trains_hidden, trains_head, with_stats, Options(*options))


@_backward_op.register_fake
def _(
    grad, hidden, weight, bias, labels, derivative, unit, share, label_value, kept,
    needs_hidden, needs_weight, needs_bias, trains_hidden, *options,
):  # fmt: skip
    return (
        hidden.new_empty(hidden.shape if needs_hidden else 0),
        torch.empty_like(weight) if needs_weight else hidden.new_empty(0),
        torch.empty_like(bias) if needs_bias else hidden.new_empty(0),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, bias, labels, _, trains_hidden, _, _, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.trains_hidden, ctx.options = trains_hidden, options
    ctx.save_for_backward(hidden, weight, bias, labels, *output[5:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * (8 + len(ctx.options))
    hidden, weight, bias, labels, *kept = ctx.saved_tensors
    needs = ctx.needs_input_grad[:3]
    gradients = _backward_op(
        grad, hidden, weight, bias, labels, *kept, *needs, ctx.trains_hidden, *ctx.options
    )
    wanted = (g if need else None for g, need in zip(gradients, needs, strict=True))
    return *wanted, *(None,) * (5 + len(ctx.options))


_forward_op.register_autograd(_backward, setup_context=_setup_context)


def token_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None,  # (V,)
    ignore_index: int,
    transform: Transform,
    workspace_mb: float | None,
    backend: str | None,
    with_stats: bool = False,
    bounds: Tensor | None = None,  # (S + 1,) to be checked
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
    """Log-probs of all tokens, 0 where not scored, and statistics if asked for; of labels' shape."""
    operands = call.operands_of(hidden)
    options = Options(
        ignore_index,
        transform.logit_scale,
        transform.softcap,
        transform.temperature,
        call.resolve_workspace(workspace_mb, hidden.device),
        call.resolve_backend(backend, hidden.device, hidden.dtype),
        operands.compute_dtype,
        operands.upcasts,
    )
    wanted = call.wanted_gradients(hidden, weight, bias)
    logps, *stats = _forward_op(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        bounds,
        wanted.hidden,
        wanted.head,
        with_stats,
        *options.values(),
    )[:5]
    if not with_stats:
        return logps.view(labels.shape), None
    entropy, mean_logit, is_top1, collision = (x.view(labels.shape) for x in stats)
    return logps.view(labels.shape), (entropy, mean_logit, is_top1, collision)


def sequence_sums(
    values: Tensor,  # of labels' shape
    bounds: Tensor,  # (S + 1,) int64, where each sequence begins among the M tokens
) -> Tensor:  # (S,)
    """The sum of each sequence's values, added in float64 (integers in int64) and rounded once."""
    if values.is_floating_point():
        # Sequence by sequence: in one running sum, what is not finite would reach all that follow.
        return sequences.sequence_sums(values.reshape(-1), bounds)
    running = torch.nn.functional.pad(values.long().reshape(-1).cumsum(0), (1, 0))
    return running.index_select(0, bounds).diff()
