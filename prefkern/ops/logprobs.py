"""The operator: log-probs of labels from hidden states and a head, without logits in memory.

`linear_logprobs` checks its arguments and finds the scored tokens (`sequences`). Then `call` makes
a plan (`plan`) and runs it (`autograd` over `passes`) on one of two backends. The backends differ
only in their functions on a tile: Triton kernels (`prefkern_kernels`) or their twins in torch
(`torch_tiles`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefkern.ops import call, checks, compiled, plain, plan, sequences, shards
from prefkern.ops.agreement import Agreement
from prefkern.ops.operands import Head, LowRank, Transform, operands_for
from prefkern.ops.outputs import TokenStats
from prefkern.ops.shards import VocabShard
from prefkern.ops.workspace import workspace_of_call


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
    vocab: VocabShard | None = None,
) -> Tensor | TokenStats:
    """Log-probs of labels under `softmax(transform(hidden @ weight.T + bias))`, in tiles.

    The transform is `softcap tanh(logit_scale z / softcap) / temperature`; without a softcap it is
    `logit_scale z / temperature`. Labels must be aligned: `labels[t]` is the token that `hidden[t]`
    predicts. Tokens with the label ignore_index are never computed.

    Args:
        hidden: [..., H] float32, bfloat16 or float16; on the torch backend also float64, for
            gradcheck and the like. Then everything is computed in float64.
        weight: [V, H] in hidden's dtype; under autocast in float32, bfloat16 or float16.
        labels: [...] int64.
        bias: [V] or None.
        workspace_mb: bound on temporary memory in MiB; None: chosen for the device, and larger on a
            GPU if the head is trained.
        backend: "triton" (GPUs; CPU under TRITON_INTERPRET=1), "torch" (any device), or None:
            triton on a GPU that has it, else torch.
        return_stats: return TokenStats, with entropy, mean logit and top-1 beside the log-probs.
        lora_hidden, lora_weight: a LoRA adapter on the head. It adds `lora_hidden @
            lora_weight.T` to the raw logits. lora_hidden is scaling * lora_A(hidden) [..., R], and
            lora_weight is lora_B's weight [V, R]. They may have another dtype than hidden, but
            float64 only if hidden is float64.
        vocab: the part of the vocabulary that this rank holds, if several ranks hold the head:
            weight, bias and lora_weight have its rows, in place of V. All ranks of its group must
            make the call, with the same other arguments, and the same backward; all get the same
            log-probs and gradients of hidden and lora_hidden. A weight that is a DTensor with
            placement Shard(0) has its own, and gets its gradient as such a DTensor.

    Returns:
        [...] float32 (float64 for float64 inputs), in nats; 0 where not scored. Differentiable once
        in hidden, weight, bias, lora_hidden and lora_weight; each gradient has the dtype of its
        argument. `prefkern.last_plan()` says what ran.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or value. Only
            the check of the labels' range needs a device synchronisation, and it shares the one
            that counts the scored tokens.
        RuntimeError: the backend asked for cannot run here; or another rank raised an error, and so
            no rank computes.
        NotImplementedError: vocab under torch.compile or in a CUDA graph.
        torch.OutOfMemoryError: memory ran out twice, the second time with half the workspace. The
            message says what was tried and what would fit. The first time gives a RuntimeWarning.
            With vocab the first time is an error: the other ranks wait for this one.
    """
    shards.refuse_graphs(vocab, weight, labels)
    with Agreement(shards.party(vocab, weight)) as (facts,):
        vocab, (weight, bias, lora_weight) = shards.local_head(
            vocab, weight=weight, bias=bias, lora_weight=lora_weight
        )
        hidden, labels, lora_hidden = shards.local_states(
            hidden=hidden, labels=labels, lora_hidden=lora_hidden
        )
        checks.head(hidden, weight, bias, shard=vocab)
        checks.low_rank(hidden, weight, lora_hidden, lora_weight)
        checks.labels(labels, hidden.shape[:-1], hidden.device)
        checks.ignore_index(ignore_index)
        checks.transform(logit_scale, softcap, temperature)
        plain.boolean("return_stats", return_stats)
        transform = Transform(float(logit_scale), softcap, float(temperature))
        head = Head.of(hidden, weight, bias, LowRank.of(lora_hidden, lora_weight))
        if torch.compiler.is_compiling():
            values = compiled.token_logprobs(
                head,
                labels,
                ignore_index,
                transform,
                workspace_mb,
                backend,
                with_stats=return_stats,
            )
            stats = values.stats
            return values.logps if stats is None else TokenStats(values.logps, *stats[:3])
        call.check_workspace(workspace_mb)
        backend = call.resolve_backend(backend, hidden.device, hidden.dtype)
        scored = sequences.select(labels.reshape(-1), ignore_index, shards.size_of(vocab, weight))
        if vocab is not None:
            options = {"ignore_index": ignore_index, "return_stats": return_stats}
            facts |= shards.facts_of(vocab, head, labels, **options, **transform.keywords())
    result, _ = call.run(
        head, scored, transform, workspace_mb, backend, with_stats=return_stats, shard=vocab
    )
    logps = call.place(result.logps, scored.rows, labels.shape)
    if result.stats is None:
        return logps
    stats = result.stats[:3]
    return TokenStats(logps, *(call.place(value, scored.rows, labels.shape) for value in stats))


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
    """The plan and the cost of a `linear_logprobs` call of that shape. Nothing is run or allocated.

    Args:
        tokens: N, scored tokens; hidden_size: H; vocab_size: V.
        dtype: that of hidden and weight.
        device: where the call would run; this machine need not have it. None: a GPU if there is
            one.
        trains_hidden, trains_head: what needs a gradient; neither: log-probs alone.
        lora_rank: the rank of an adapter that is trained on the head; 0: none.
        softcap: whether the model caps its logits; return_stats: as in `linear_logprobs`.
        workspace_mb, backend: as in `linear_logprobs`.

    Returns:
        A Plan: structure, tiles, `operations` (`operations_nhv`), `workspace_bytes`, `saved_bytes`.

    Raises TypeError and ValueError for a wrong shape, dtype or device. workspace_mb must be given
    for a GPU that this machine does not have, since its default depends on the GPU's memory.
    """
    for name, size in (
        ("tokens", tokens),
        ("hidden_size", hidden_size),
        ("vocab_size", vocab_size),
    ):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{name} must be an int, got {size!r}")
        plain.positive(name, size)
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
        plain.boolean(name, value)
    device = _device(device)
    if workspace_mb is None and device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "workspace_mb must be given: its default depends on a GPU, and none is here"
        )
    operands = operands_for(dtype, device.type)
    head = plan.HeadSize(
        hidden_size, dtype, operands.upcasts, dtype, dtype, lora_rank, operands.rounds
    )
    gradients = plan.Gradients(
        trains_hidden, trains_head, False, trains_hidden and lora_rank > 0, lora_rank > 0
    )
    call.check_workspace(workspace_mb)
    if workspace_mb is None:
        workspace_mb = workspace_of_call(device, tokens, vocab_size, head, gradients)
    return plan.make_plan(
        tokens=tokens,
        vocab_size=vocab_size,
        head=head,
        gradients=gradients,
        backend=call.resolve_backend(backend, device, dtype, name="dtype"),
        workspace_mb=workspace_mb,
        has_softcap=softcap,
        with_stats=return_stats,
    )


def _device(device: torch.device | str | None) -> torch.device:
    """The device, which this machine need not have; None: a GPU if there is one."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not isinstance(device, str | torch.device):
        raise TypeError(f"device must be a torch.device or its name, got {device!r}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be a torch.device or its name, got {device!r}") from error
