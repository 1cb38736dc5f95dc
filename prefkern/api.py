"""The operator: log-probs of labels from hidden states and a head, without logits in memory.

`linear_logprobs` checks its arguments, finds the scored tokens (`sequences`), makes a plan (`plan`)
and runs it (`autograd` over `passes`) on one of two backends, which share everything but what is
done to a tile: Triton kernels (`prefkern_kernels`) or their twins in torch (`torch_tiles`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from prefkern import checks, memory, plan, sequences
from prefkern.autograd import Call, Result, scored_logprobs
from prefkern.operands import LowRank, Operands, Transform, as_stored
from prefkern.outputs import TokenStats

BACKENDS = ("triton", "torch")


def linear_logprobs(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    labels: Tensor,  # (...)
    bias: Tensor | None = None,  # (V,)
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
    backend: str | None = None,
    return_stats: bool = False,
    lora_hidden: Tensor | None = None,  # (..., R)
    lora_weight: Tensor | None = None,  # (V, R)
) -> Tensor | TokenStats:
    """Log-probs of labels under `softmax(transform(hidden @ weight.T + bias))`, in tiles.

    The transform is `softcap tanh(logit_scale z / softcap) / temperature`, without the tanh where
    softcap is None. Labels are aligned already: `labels[t]` is the token that `hidden[t]` predicts.
    Tokens whose label is ignore_index are never computed.

    Args:
        hidden: [..., H] float32, bfloat16 or float16; or float64, on the torch backend, which is
            then computed in throughout: for gradcheck and the like.
        weight: [V, H], of hidden's dtype (of any of the first three under autocast).
        labels: [...] int64.
        bias: [V] or None.
        workspace_mb: bound on temporary memory in MiB; None: chosen for the device.
        backend: "triton" (GPUs; CPU under TRITON_INTERPRET=1), "torch" (any device), or None:
            triton on a GPU that has it, else torch.
        return_stats: return TokenStats, with entropy, mean logit and top-1 beside the log-probs.
        lora_hidden, lora_weight: a LoRA adapter on the head, which adds `lora_hidden @
            lora_weight.T` to the raw logits: scaling * lora_A(hidden) [..., R] and lora_B's weight
            [V, R], in float32, bfloat16 or float16, whatever hidden has, or both float64.

    Returns:
        [...] float32 (float64 of float64), in nats; 0 where not scored. Differentiable once in hidden, weight, bias and
        the adapter's two; each gradient has its argument's dtype. `prefkern.last_plan()` tells what ran.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or value. All
            but one are found without a device synchronisation: the labels' range, which shares the
            one synchronisation that counting the scored tokens takes.
        RuntimeError: the backend asked for cannot run here.
        torch.OutOfMemoryError: memory ran out twice, the second time with half the workspace; with
            what was tried and what would fit. The first time is a RuntimeWarning (`memory`).
    """
    checks.head(hidden, weight, bias)
    checks.low_rank(hidden, weight, lora_hidden, lora_weight)
    checks.labels(labels, hidden.shape[:-1], hidden.device)
    checks.ignore_index(ignore_index)
    checks.transform(logit_scale, softcap, temperature)
    checks.boolean("return_stats", return_stats)
    transform = Transform(float(logit_scale), softcap, float(temperature))
    if torch.compiler.is_compiling():
        from prefkern import compiled

        if lora_hidden is not None:
            raise NotImplementedError(compiled.NO_ADAPTER)
        logps, stats = compiled.token_logprobs(
            hidden, weight, labels, bias, ignore_index, transform, workspace_mb, backend,
            return_stats,
        )  # fmt: skip
        return logps if stats is None else TokenStats(logps, *stats[:3])
    workspace_mb = resolve_workspace(workspace_mb, hidden.device)
    backend = resolve_backend(backend, hidden.device, hidden.dtype)
    scored = sequences.select(labels.reshape(-1), ignore_index, weight.shape[0])
    result, _ = run(
        hidden,
        weight,
        bias,
        scored,
        transform,
        workspace_mb,
        backend,
        return_stats,
        low_rank=low_rank_of(lora_hidden, lora_weight),
    )
    logps = place(result.logps, scored.rows, labels.shape)
    if result.stats is None:
        return logps
    stats = result.stats[:3]
    return TokenStats(logps, *(place(value, scored.rows, labels.shape) for value in stats))


def run(
    hidden: Tensor,  # (..., H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    scored: sequences.Scored,
    transform: Transform,
    workspace_mb: float,
    backend: str,
    with_stats: bool,
    ref_hidden: Tensor | None = None,  # (..., H), a reference's, through the same head
    low_rank: LowRank | None = None,
) -> tuple[Result, plan.Plan]:
    """Plan and run checked arguments, again where memory runs out; and the plan that ran."""
    hidden, weight = hidden.resolve_neg(), weight.resolve_neg()
    bias, ref_hidden = as_stored(bias), as_stored(ref_hidden)
    if low_rank is not None:
        low_rank = LowRank(low_rank.hidden.resolve_neg(), low_rank.weight.resolve_neg())
    operands = operands_of(hidden)
    gradients = wanted_gradients(hidden, weight, bias, low_rank)
    product_row = None
    if backend == "triton" and not (gradients.states or gradients.head or with_stats):
        is_plain = operands.dtype == hidden.dtype == weight.dtype
        is_plain = is_plain and ref_hidden is None and low_rank is None
        kernels = _kernels()
        assert kernels is not None
        if is_plain:
            plain = bias is None and transform.softcap is None
            product_row = kernels.product_fold_row(hidden, weight, plain)
    plan_of = functools.partial(
        plan.make_plan,
        tokens=scored.count,
        vocab_size=weight.shape[0],
        head=planned_head(hidden, weight, operands, low_rank),
        gradients=gradients,
        backend=backend,
        has_softcap=transform.softcap is not None,
        with_stats=with_stats,
        with_reference=ref_hidden is not None,
        product_row=product_row,
    )
    made = plan_of(workspace_mb=workspace_mb)
    plan.record(made)
    if low_rank is not None:
        flat = low_rank.hidden.reshape(-1, low_rank.hidden.shape[-1])
        low_rank = LowRank(scored.cleared(flat), low_rank.weight)
    budget = memory.Budget(
        workspace_mb, plan_of, plan.recorder(), retries=not sequences.is_capturing(hidden)
    )
    tensors = (
        scored.cleared(hidden.reshape(-1, hidden.shape[-1])),
        weight,
        # Kernels walk the bias word by word: no strides, no expanded views. (V,): a small copy.
        None if bias is None else bias.contiguous(),
        low_rank,
        None if ref_hidden is None else ref_hidden.detach().reshape(-1, ref_hidden.shape[-1]),
        scored.rows,
        scored.labels,
    )
    ops = tile_operations(backend)

    def attempt(made: plan.Plan) -> Result:
        call = Call(transform, operands, made, ops, with_stats, budget)
        return scored_logprobs(*tensors, call)

    result, made = budget.attempt(attempt, made, "forward")
    if scored.live is not None:
        result = result.masked(scored.masked)
    return result, made


def low_rank_of(hidden: Tensor | None, weight: Tensor | None) -> LowRank | None:
    return None if hidden is None or weight is None else LowRank(hidden, weight)


def planned_head(
    hidden: Tensor, weight: Tensor, operands: Operands, low_rank: LowRank | None = None
) -> plan.Head:
    """What the plan must know of a head."""
    return plan.Head(
        weight.shape[1],
        operands.compute_dtype,
        operands.upcasts,
        hidden.dtype,
        weight.dtype,
        0 if low_rank is None else low_rank.weight.shape[1],
    )


def wanted_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, low_rank: LowRank | None = None
) -> plan.Gradients:
    if not torch.is_grad_enabled():
        return plan.Gradients(False, False, False)
    return plan.Gradients(
        hidden.requires_grad,
        weight.requires_grad,
        bias is not None and bias.requires_grad,
        low_rank is not None and low_rank.hidden.requires_grad,
        low_rank is not None and low_rank.weight.requires_grad,
    )


def plan_for(
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | None = None,
    trains_hidden: bool = True,
    trains_head: bool = False,
    lora_rank: int = 0,
    softcap: bool = False,
    return_stats: bool = False,
    workspace_mb: float | None = None,
    backend: str | None = None,
) -> plan.Plan:
    """What a call of that shape runs and costs, without running it; nothing is allocated.

    Args:
        tokens: N, scored tokens; hidden_size: H; vocab_size: V.
        dtype: of hidden and weight.
        device: where the call would run, which need not be here; None: a GPU if there is one.
        trains_hidden, trains_head: what needs a gradient; neither: log-probs alone.
        lora_rank: of an adapter that is trained on the head; 0: none.
        softcap: whether the model caps its logits; return_stats: as in `linear_logprobs`.
        workspace_mb, backend: as in `linear_logprobs`.

    Returns:
        A Plan: structure, tiles, `operations` (`operations_nhv`), `workspace_bytes`, `saved_bytes`.

    Raises TypeError and ValueError for what is not a shape, dtype or device, and for a GPU's default
    workspace where there is no GPU to ask.
    """
    for name, size in (
        ("tokens", tokens),
        ("hidden_size", hidden_size),
        ("vocab_size", vocab_size),
    ):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r}")
        checks.positive(name, size)
    if not isinstance(lora_rank, int) or isinstance(lora_rank, bool) or lora_rank < 0:
        raise ValueError(f"lora_rank must be an int >= 0, got {lora_rank!r}")
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype!r}")
    for name, value in (
        ("trains_hidden", trains_hidden),
        ("trains_head", trains_head),
        ("softcap", softcap),
        ("return_stats", return_stats),
    ):
        checks.boolean(name, value)
    device = _device(device)
    if workspace_mb is None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "workspace_mb must be given: its default depends on a GPU, and none is here"
        )
    operands = operands_for(dtype, device.type)
    return plan.make_plan(
        tokens=tokens,
        vocab_size=vocab_size,
        head=plan.Head(hidden_size, dtype, operands.upcasts, dtype, dtype, lora_rank),
        gradients=plan.Gradients(
            trains_hidden, trains_head, False, trains_hidden and lora_rank > 0, lora_rank > 0
        ),
        backend=resolve_backend(backend, device, dtype, name="dtype"),
        workspace_mb=resolve_workspace(workspace_mb, device),
        has_softcap=softcap,
        with_stats=return_stats,
    )


def _device(device: torch.device | str | None) -> torch.device:
    """A device that may not be here; None: a GPU if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or its name, got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch.device or its name, got {device!r}") from error


def place(values: Tensor, rows: Tensor | None, shape: torch.Size) -> Tensor:  # (N,) -> (...)
    """Values of scored tokens at their places, 0 elsewhere."""
    if rows is not None:
        values = values.new_zeros(shape.numel()).index_copy(0, rows, values)
    return values.view(shape)


def resolve_workspace(workspace_mb: float | None, device: torch.device) -> float:
    if workspace_mb is None:
        return plan.default_workspace_mb(device)
    checks.positive("workspace_mb", workspace_mb)
    return float(workspace_mb)


def resolve_backend(
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    name: str = "hidden",
) -> str:
    """The backend to run: the one asked for, if it can run on the device, or the device's own.

    `name` is of the argument that has the dtype.
    """
    if backend is None:
        has_kernels = device.type == "cuda" and dtype != torch.float64 and _kernels() is not None
        return "triton" if has_kernels else "torch"
    if backend not in BACKENDS:
        known = ", ".join(map(repr, BACKENDS))
        raise ValueError(f"backend must be None or one of {known}, got {backend!r}")
    if backend == "triton":
        if dtype == torch.float64:
            raise TypeError(
                f"{name} is float64, which backend='torch' computes in, and backend='triton' not; "
                "give backend='torch' or None, or float32, bfloat16 or float16"
            )
        kernels = _kernels()
        if kernels is None:
            raise RuntimeError("backend='triton' was asked for, but triton is not installed")
        if device.type != "cuda" and not kernels.INTERPRET:
            place = "hidden is on" if name == "hidden" else "device is"
            raise RuntimeError(
                f"backend='triton' needs a GPU, and {place} {device.type}; "
                "set TRITON_INTERPRET=1 before importing to run its kernels on a CPU"
            )
    return backend


@functools.cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, or None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("prefkern_kernels")


def tile_operations(backend: str, twin: str = "prefkern.torch_tiles") -> ModuleType:
    """The backend's functions on tiles; `twin` names the module that has them in torch."""
    if backend == "triton":
        kernels = _kernels()
        assert kernels is not None
        return kernels
    return importlib.import_module(twin)


def operands_of(hidden: Tensor) -> Operands:
    """How a call with these hidden states multiplies, autocast included."""
    device = hidden.device.type
    # Autocast leaves float64 as it is.
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return operands_for(torch.get_autocast_dtype(device), device)
    return operands_for(hidden.dtype, device)


def operands_for(dtype: torch.dtype, device_type: str) -> Operands:
    # Only CUDA's libraries have products of half-precision operands with a float32 result.
    has_wide_product = device_type == "cuda" and torch.version.hip is None
    is_half = dtype in (torch.bfloat16, torch.float16)
    return Operands(dtype, upcasts=is_half and not has_wide_product)
