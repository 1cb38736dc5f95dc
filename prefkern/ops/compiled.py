"""The operator and the loss under `torch.compile`: opaque operators around the same passes.

Inside a compiled region `linear_logprobs`, `linear_kl` and `FusedPreferenceLoss` call this file.
Two operators of torch's library, `prefkern::logprobs` and its backward, hide the passes from the
compiler, so the graph is whole (`fullgraph=True`). Sequence sums and the objective are traced, and
the compiler fuses them. The number of scored tokens is known only when the operator runs. So its
outputs have room for all M tokens, of which it uses the first N, and nothing in the graph depends
on N.

Differences from an eager call: a label out of range is found when the compiled function runs; an
output has no `plan` (`prefkern.last_plan()` has it) and no gradients of its pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from prefkern.ops import call, memory, passes, plan, sequences
from prefkern.ops.autograd import without_autocast
from prefkern.ops.backward import backward
from prefkern.ops.operands import Head, LowRank, Operands, Transform, operands_for
from prefkern.ops.passes import Gathered

T = TypeVar("T")

# The arguments of both operators that are tensors: of a head and of a reference.
_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? lora_hidden, Tensor? lora_weight, "
    "Tensor? ref_hidden, Tensor? ref_weight, Tensor? ref_bias"
)
# The arguments of both operators that are not tensors.
_OPTIONS = (
    "int ignore_index, float logit_scale, float? softcap, float temperature, "
    "float workspace_mb, str backend, ScalarType compute_dtype, ScalarType ref_compute_dtype, "
    "bool of_hidden, bool of_weight, bool of_bias, bool of_lora_hidden, bool of_lora_weight"
)
# What forward gathers; an empty tensor if the call does not need it.
_GATHERED = tuple(vars(Gathered()))
# The outputs of forward before those: log-probs, the reference's, the divergence, four statistics.
_VALUES = 7
# The share of the workspace that kept probabilities may take. The rest is for the tiles: 8 MiB are
# enough for them at any shape.
_KEPT_SHARE = 0.75
_LEAST_MB_TO_KEEP = 32


@dataclass(frozen=True)
class Options:
    """The arguments that are not tensors."""

    ignore_index: int
    logit_scale: float
    softcap: float | None
    temperature: float
    workspace_mb: float
    backend: str
    compute_dtype: torch.dtype
    ref_compute_dtype: torch.dtype
    # Which gradients are asked for.
    of_hidden: bool
    of_weight: bool
    of_bias: bool
    of_lora_hidden: bool
    of_lora_weight: bool

    @property
    def gradients(self) -> plan.Gradients:
        return plan.Gradients(
            self.of_hidden, self.of_weight, self.of_bias, self.of_lora_hidden, self.of_lora_weight
        )

    @property
    def transform(self) -> Transform:
        return Transform(self.logit_scale, self.softcap, self.temperature)


_OPTION_COUNT = len(fields(Options))


class _Inputs(NamedTuple):
    """The tensors of a head and of a reference; states are of all M tokens."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_hidden: Tensor | None
    lora_weight: Tensor | None
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_bias: Tensor | None

    @property
    def has_divergence(self) -> bool:
        return self.ref_hidden is not None

    def heads(self, options: Options) -> tuple[Head, Head | None]:
        adapter = LowRank.of(self.lora_hidden, self.lora_weight)
        head = Head.of(self.hidden, self.weight, self.bias, adapter)
        head = replace(head, operands=self.operands(options.compute_dtype))
        if self.ref_hidden is None or self.ref_weight is None:
            return head, None
        reference = Head.of(self.ref_hidden, self.ref_weight, self.ref_bias)
        return head, replace(reference, operands=self.operands(options.ref_compute_dtype))

    def operands(self, compute_dtype: torch.dtype) -> Operands:
        """Operands of a dtype that came with the options: autocast is off when an operator runs."""
        operands = operands_for(compute_dtype, self.hidden.device.type)
        return operands.unrounded() if self.has_divergence else operands

    def room(self, tokens: int, options: Options) -> Gathered:
        """Room for what forward gathers for so many tokens; the number may be a symbol."""
        rank = 0 if self.lora_weight is None else self.lora_weight.shape[1]
        operands, gradients = self.operands(options.compute_dtype), options.gradients
        vocab_size, hidden_size = self.weight.shape
        columns = plan.columns_of(hidden_size, rank, gradients.hidden, gradients.lora_hidden)
        kept = 0
        if gradients.head and options.workspace_mb >= _LEAST_MB_TO_KEEP:
            budget = int(options.workspace_mb * plan.MIB * _KEPT_SHARE)
            row = (
                plan.kept_row(vocab_size)
                * operands.of_gradients.itemsize
                * (1 + self.has_divergence)
            )
            kept = torch.sym_min(tokens, budget // row)
        return Gathered.empty(
            tokens,
            kept,  # pyright: ignore[reportArgumentType]
            vocab_size,
            0 if self.has_divergence and gradients.head else columns.width,
            gradients.head,
            self.has_divergence,
            operands,
            self.hidden.device,
        )

    def outputs(self, with_stats: bool, options: Options) -> tuple[Tensor, ...]:
        """Empty outputs of forward."""
        M, wide = self.hidden.shape[0], self.operands(options.compute_dtype).wide
        kinds = [(True, wide), (self.has_divergence, wide), (self.has_divergence, wide)]
        kinds += [(with_stats, dtype) for dtype in (wide, wide, torch.bool, wide)]
        values = [
            self.hidden.new_empty((M,) if wanted else (0,), dtype=dtype) for wanted, dtype in kinds
        ]
        gathered = self.room(M, options).tensors()
        return *values, *(self.hidden.new_empty(0) if x is None else x for x in gathered)


class _Run:
    """The arguments of the passes, from an operator's arguments, and the memory budget."""

    def __init__(
        self,
        inputs: _Inputs,
        scored: sequences.Scored,
        options: Options,
        tensors: Sequence[Tensor],  # those of `Gathered`
        with_stats: bool = False,
    ) -> None:
        head, reference = inputs.heads(options)
        self.head = head.through(scored.cleared)
        self.reference = None if reference is None else reference.through(scored.cleared)
        self.ops = call.tile_operations(options.backend)
        wanted = inputs.room(0, options).tensors()
        room = Gathered(*(None if w is None else x for w, x in zip(wanted, tensors, strict=True)))
        plan_of = functools.partial(
            plan.make_plan,
            tokens=scored.count,
            vocab_size=inputs.weight.shape[0],
            head=self.head.size,
            gradients=options.gradients,
            backend=options.backend,
            has_softcap=options.softcap is not None,
            with_stats=with_stats,
            reference=None if self.reference is None else self.reference.size,
            with_divergence=inputs.has_divergence,
            kept=0 if room.kept is None else min(scored.count, room.kept.shape[0]),
        )
        # Room for kept rows is there whether they are used or not: the tiles have what it leaves.
        workspace_mb = options.workspace_mb
        for x in (room.kept, room.ref_kept):
            if x is not None:
                unused = max(x.shape[0] - scored.count, 0)
                workspace_mb -= unused * x.shape[1] * x.itemsize / plan.MIB
        self.plan = plan_of(workspace_mb=workspace_mb)
        self.scored = scored
        if self.head.operands.rounds and passes.splits_tokens(self.plan):
            self.scored, _ = scored.mixed()
        self.gathered = room.first(scored.count, self.plan.kept_tokens)
        retries = not sequences.is_capturing(inputs.hidden)
        self.budget = memory.Budget(workspace_mb, plan_of, plan.record, retries)

    def attempt(self, run: Callable[[plan.Plan], T], phase: memory.Phase) -> T:
        with torch.no_grad(), without_autocast(self.head.hidden):
            # Kept probabilities are an output, or an input: a second attempt cannot free them.
            held_bytes = self.plan.kept_bytes
            return self.budget.attempt(run, self.plan, phase, held_bytes=held_bytes)[0]


def _logprobs(*arguments) -> tuple[Tensor, ...]:
    """The forward operator, with the arguments of its schema."""
    inputs, (labels, bounds, with_stats, *values) = _Inputs(*arguments[:8]), arguments[8:]
    options = Options(*values)
    outputs = inputs.outputs(with_stats, options)
    scored = sequences.select(labels, options.ignore_index, inputs.weight.shape[0], bounds)
    run = _Run(inputs, scored, options, outputs[_VALUES:], with_stats)
    plan.record(run.plan)

    def attempt(made: plan.Plan) -> passes.Passed:
        return passes.forward(
            run.head,
            run.reference,
            run.scored.rows,
            run.scored.labels,
            options.transform,
            made,
            run.ops,
            with_stats,
            run.gathered,
        )

    passed = run.attempt(attempt, "forward")
    found = (passed.logps, passed.ref_logps, passed.kl, *(passed.stats or ()))
    for out, value in zip(outputs, found, strict=False):
        if value is not None:
            out.copy_(call.place(scored.masked(value), run.scored.rows, labels.shape))
    # Fill what is not used, too: an operator's outputs must depend on its inputs alone.
    for name, out in zip(_GATHERED, outputs[_VALUES:], strict=True):
        used = run.plan.kept_tokens if name.endswith("kept") else scored.count
        out[used:].zero_()
        if name.endswith("kept"):
            out[..., inputs.weight.shape[0] :].zero_()
    return outputs


def _logprobs_backward(*arguments) -> tuple[Tensor, ...]:
    """The backward operator, with the arguments of its schema."""
    dlogps, dkl, *rest = arguments
    inputs, labels, rest = _Inputs(*rest[:8]), rest[8], rest[9:]
    tensors, needs = rest[: len(_GATHERED)], rest[len(_GATHERED) : -_OPTION_COUNT]
    options = Options(*rest[-_OPTION_COUNT:])
    scored = sequences.select(labels, options.ignore_index, inputs.weight.shape[0])
    run = _Run(inputs, scored, options, tensors)

    def of_scored(grad: Tensor) -> Tensor:  # (M,) -> (N,)
        grad = grad.to(run.head.operands.wide)
        rows = run.scored.rows
        return scored.masked(grad if rows is None else grad.index_select(0, rows))

    def attempt(made: plan.Plan) -> tuple[Tensor | None, ...]:
        return backward(
            [of_scored(grad) for grad in (dlogps, dkl) if grad is not None],
            run.head,
            run.reference,
            run.scored.rows,
            run.scored.labels,
            run.gathered,
            [(x.shape, x.dtype) for x in (inputs.hidden, inputs.lora_hidden) if x is not None],
            options.transform,
            made,
            run.ops,
            plan.Gradients(*needs),
        )

    found = run.attempt(attempt, "backward")
    return tuple(inputs.hidden.new_empty(0) if x is None else x for x in found)


_forward_op = torch.library.custom_op(
    "prefkern::logprobs",
    _logprobs,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor labels, Tensor? bounds, bool with_stats, {_OPTIONS}) -> "
    f"({', '.join(['Tensor'] * (_VALUES + len(_GATHERED)))})",
)
_backward_op = torch.library.custom_op(
    "prefkern::logprobs_backward",
    _logprobs_backward,
    mutates_args=(),
    schema=f"(Tensor dlogps, Tensor? dkl, {_INPUTS}, Tensor labels, "
    f"{', '.join(f'Tensor {name}' for name in _GATHERED)}, bool needs_hidden, bool needs_weight, "
    f"bool needs_bias, bool needs_lora_hidden, bool needs_lora_weight, {_OPTIONS}) -> "
    f"({', '.join(['Tensor'] * 5)})",
)


@_forward_op.register_fake
def _(*arguments):
    inputs, (_, _, with_stats, *values) = _Inputs(*arguments[:8]), arguments[8:]
    return inputs.outputs(with_stats, Options(*values))


@_backward_op.register_fake
def _(*arguments):
    # Behind the gradients of log-probs and divergence; the last one needed is before the options.
    needs = arguments[-_OPTION_COUNT - 5 : -_OPTION_COUNT]
    inputs = _Inputs(*arguments[2:10])

    def like(name: str, is_needed: bool) -> Tensor:
        x = getattr(inputs, name)
        if not is_needed:
            return inputs.hidden.new_empty(0)
        # Gradients of states are made row by row, whatever the strides of the states.
        return x.new_empty(x.shape) if name.endswith("hidden") else torch.empty_like(x)

    return tuple(like(name, need) for name, need in zip(_Inputs._fields, needs, strict=False))


def _setup_context(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    # The eight tensors and labels; then bounds and with_stats, which backward does not need.
    ctx.options = inputs[11:]
    ctx.save_for_backward(*inputs[:9], *output[_VALUES:])
    # Log-probs have a gradient; so has a divergence, if there is a reference.
    has_divergence = inputs[5] is not None
    ctx.mark_non_differentiable(*output[1 : 2 if has_divergence else 3], *output[3:])


def _backward(ctx, dlogps, _, dkl, *__):
    nothing = (None,) * (6 + len(ctx.options))
    given = dkl if dlogps is None else dlogps
    if given is None:
        return *(None,) * 5, *nothing
    *inputs, labels = ctx.saved_tensors[:9]
    dlogps = torch.zeros_like(given) if dlogps is None else dlogps
    if inputs[5] is not None and dkl is None:
        # A divergence needs both gradients: the one that is not given is 0.
        dkl = torch.zeros_like(given)
    needs = ctx.needs_input_grad[:5]
    gradients = _backward_op(
        dlogps, dkl, *inputs, labels, *ctx.saved_tensors[9:], *needs, *ctx.options
    )
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), *nothing


_forward_op.register_autograd(_backward, setup_context=_setup_context)


class TokenValues(NamedTuple):
    """Values of all tokens, in the labels' shape; 0 where not scored."""

    logps: Tensor
    ref_logps: Tensor | None
    kl: Tensor | None
    stats: tuple[Tensor, Tensor, Tensor, Tensor] | None  # as `fold_state.statistics`


def token_logprobs(
    head: Head,
    labels: Tensor,  # (...)
    ignore_index: int,
    transform: Transform,
    workspace_mb: float | None,
    backend: str | None,
    *,
    reference: Head | None = None,  # of a divergence
    with_stats: bool = False,
    bounds: Tensor | None = None,  # (S + 1,) to be checked
) -> TokenValues:
    """Log-probs of all tokens; with a reference, its log-probs and the divergence from it."""
    hidden, low_rank = head.hidden, head.low_rank
    wanted = call.wanted_gradients(head)
    # The fields of `Options`, in their order: torch 2.11 does not trace those of an object.
    options = (
        ignore_index,
        transform.logit_scale,
        transform.softcap,
        transform.temperature,
        call.resolve_workspace(workspace_mb, hidden.device, wanted.head),
        call.resolve_backend(backend, hidden.device, hidden.dtype),
        head.operands.compute_dtype,
        (reference or head).operands.compute_dtype,
        wanted.hidden,
        wanted.weight,
        wanted.bias,
        wanted.lora_hidden,
        wanted.lora_weight,
    )
    adapter = (None, None) if low_rank is None else (low_rank.hidden, low_rank.weight)
    of_reference = (None, None, None)
    if reference is not None:
        reference = reference.detach()
        of_reference = (reference.hidden, reference.weight, reference.bias)
    logps, ref_logps, kl, *stats = _forward_op(
        hidden,
        head.weight,
        head.bias,
        *adapter,
        *of_reference,
        labels.reshape(-1),
        bounds,
        with_stats,
        *options,
    )[:_VALUES]
    shape = labels.shape
    of_stats = None
    if with_stats:
        entropy, mean_logit, is_top1, collision = (x.view(shape) for x in stats)
        of_stats = (entropy, mean_logit, is_top1, collision)
    return TokenValues(
        logps.view(shape),
        None if reference is None else ref_logps.view(shape),
        None if reference is None else kl.view(shape),
        of_stats,
    )


def pair_parts(
    mask: Tensor,  # of labels' shape, which tokens are scored
    bounds: Tensor,  # (S + 1,) int64, where each sequence begins among the M tokens
    responses: int = 2,
) -> Tensor:  # (2S + 1,)
    """`sequences.pair_parts` among all M tokens."""
    before = torch.nn.functional.pad(mask.reshape(-1).long().cumsum(0), (1, 0))
    parts = sequences.pair_parts(before.index_select(0, bounds), responses)
    # A sequence's first part ends behind so many scored tokens, and not before it begins.
    cuts = torch.maximum(torch.searchsorted(before, parts[1::2].contiguous()), bounds[:-1])
    return torch.cat([torch.stack([bounds[:-1], cuts], dim=1).flatten(), bounds[-1:]])


def sequence_sums(
    values: Tensor,  # of labels' shape
    bounds: Tensor,  # (S + 1,) int64, where each sequence begins among the M tokens
) -> Tensor:  # (S,)
    """The sum of each sequence's values, added in float64 (integers in int64) and rounded once."""
    if values.is_floating_point():
        # Sequence by sequence: in one running sum, a NaN or inf would reach all later sequences.
        return sequences.sequence_sums(values.reshape(-1), bounds)
    running = torch.nn.functional.pad(values.long().reshape(-1).cumsum(0), (1, 0))
    return running.index_select(0, bounds).diff()
