"""`prefkern plan`: predicts the memory and the operations of a step, before training.

    prefkern plan meta-llama/Meta-Llama-3-8B-Instruct --seq-len 2048 --batch 4
    prefkern plan meta-llama/Meta-Llama-3-8B-Instruct --data pairs.jsonl --batch 4

The first command plans the output head. The second one takes the lengths from a file of pairs: it
plans the head for the step with the most scored tokens, and adds a table of what packing and
sharing save in the whole model (`prefkern.cli.plan_pairs`).

A batch of B pairs is 2B sequences of T tokens, of which N are scored. `prefkern.plan_for` says what
prefkern runs for that shape. The table also shows the cost of logits in memory. TDPO's KL is not
counted. Only the model's config is read (and downloaded, for a hub name); with --data its tokenizer
too. The model is built on the meta device, where weights have shapes but no bytes. An error is one
line on stderr and exit status 2.

The cost of logits in memory is that of the shortest differentiable code,
`model(...).logits.float().log_softmax(-1).gather(...)`, on all 2BT positions. At the peak, the
policy's backward holds the logits in the model's dtype, their float32 log-softmax, and two float32
gradients of the same size. The reference's pass ends before that. At its own peak it holds the
logits, their float32 copy and the log-softmax.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefkern.cli.arguments import fail
from prefkern.cli.plan_options import parse

if TYPE_CHECKING:
    from argparse import Namespace

    import torch

    from prefkern.cli.plan_pairs import Epoch
    from prefkern.ops.plan import Plan

_WORKSPACES_MB = (256.0, 1024.0, 4096.0)


@dataclass(frozen=True)
class ModelHead:
    """A model's head and its logits transform, from the config."""

    model: str  # name of the class
    hidden_size: int
    vocab_size: int
    is_tied: bool
    logit_scale: float
    softcap: float | None


@dataclass(frozen=True)
class Batch:
    """B pairs of 2T tokens (TPO: 3T) that go through forward and backward together."""

    pairs: int
    length: int
    scored: int  # N
    responses: int = 2

    @classmethod
    def of_lengths(cls, pairs: int, length: int, prompt_length: int) -> Batch:
        """With the largest number of response tokens; sequences shorter than T have fewer."""
        return cls(pairs, length, 2 * pairs * (length - prompt_length))

    @property
    def positions(self) -> int:
        return self.responses * self.pairs * self.length


@dataclass(frozen=True)
class _PairsPlan:
    """What --data adds."""

    summaries: list[str]  # of each file
    steps: int
    pairs: int  # of each step but the last
    workspace_mb: float  # of the head whose operations are counted
    epochs: list[Epoch]


@dataclass(frozen=True)
class Cost:
    """The cost of one way to compute a step's log-probs and gradients.

    Bytes do not include weights, hidden states and the gradients of both, which every way needs.
    """

    task: str  # "reference", "frozen head", "trained head"
    way: str  # the plan's structure, or "logits"
    workspace_mb: float | None
    temporary_bytes: int
    saved_bytes: int  # between forward and backward
    operations: int  # of the matrix products

    @property
    def bytes(self) -> int:
        return self.temporary_bytes + self.saved_bytes


def main(argv: list[str]) -> int:
    """Run `prefkern plan`; returns the exit status."""
    try:
        args = parse(argv)
        import torch

        dtype = getattr(torch, args.dtype)
        model = empty_model(args.model, args.trust_remote_code)
        head = head_of(model)
        workspaces_mb = args.workspace_mb or _WORKSPACES_MB
        on_pairs = None
        if args.data is None:
            batch = Batch.of_lengths(args.batch, args.seq_len, args.prompt_len)
        else:
            batch, on_pairs = _planned_pairs(args, model, head, dtype, min(workspaces_mb))
        trained = {"frozen head": not args.trains_head, "trained head": not args.lora}
        fused = fused_costs(head, batch, dtype, args.device, workspaces_mb, args.backend)
        costs = [
            cost
            for cost in [*fused, *eager_costs(head, batch, dtype)]
            if trained.get(cost.task, True)
        ]
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        return fail("plan", str(error))
    _show(args, head, batch, dtype, costs)
    if on_pairs is not None:
        _show_pairs(args, on_pairs)
    return 0


def _planned_pairs(
    args: Namespace, model: Any, head: ModelHead, dtype: torch.dtype, workspace_mb: float
) -> tuple[Batch, _PairsPlan]:
    """The step with the most scored tokens, and the plan of all pairs."""
    from prefkern.cli.plan_pairs import epochs, read_pairs
    from prefkern.models.body_cost import body_cost

    body = body_cost(model, dtype, trains_weights=not args.lora)
    pairs, reports = read_pairs(args)
    steps = [*pairs.batches(args.batch, args.seed)]
    trained = "frozen head" if args.lora else "trained head"

    @functools.cache
    def operations(scored: int) -> int:
        plans = _plans(head, scored, dtype, args.device, args.backend)
        tasks = (trained,) if args.gold else ("reference", trained)
        return sum(plans(task, workspace_mb).operations for task in tasks)

    largest = max(steps, key=lambda step: step.scored)
    batch = Batch(len(largest), largest.padded_length, largest.scored, len(largest.responses))
    found = epochs(steps, body, operations, reference=not args.gold)
    summaries = [report.summary for report in reports]
    return batch, _PairsPlan(summaries, len(steps), len(steps[0]), workspace_mb, found)


def empty_model(name: str, trust_remote_code: bool = False) -> Any:
    """A model on the meta device, given by name or path, without loading weights.

    Raises OSError if there is no such model, and ValueError if it is not a causal LM, or if no model
    can be built from its config.
    """
    import torch
    import transformers

    from prefkern.models.loading import read_config, unusable_config

    config: Any = read_config(name, trust_remote_code=trust_remote_code)
    # Some families register their vision-language model as a causal LM too, others do not.
    loader: Any = transformers.AutoModelForCausalLM
    is_own_code = bool(getattr(config, "auto_map", None))
    if not is_own_code and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        if type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ValueError(
                f"{name!r} is not a causal LM: its model type is {config.model_type!r}"
            )
        loader = transformers.AutoModelForImageTextToText
    try:
        with torch.device("meta"):
            return loader.from_config(config, trust_remote_code=trust_remote_code)
    except (ImportError, OSError):
        raise
    except Exception as error:
        # For impossible sizes each kind of layer raises its own error.
        raise unusable_config(name, "model", error) from error


def head_of(model: Any) -> ModelHead:
    """The head of a model. Raises ValueError unless it is linear."""
    from prefkern.models.heads import find_head
    from prefkern.models.transform import candidate_transforms

    base, head = find_head(model)
    vocab_size, hidden_size = head.weight.shape
    # The likeliest of several readings; only training checks it against the model itself.
    transform = candidate_transforms(base.config)[0]
    return ModelHead(
        model=type(base).__name__,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        is_tied=head.weight is base.get_input_embeddings().weight,
        logit_scale=transform.logit_scale,
        softcap=transform.softcap,
    )


def fused_costs(
    head: ModelHead,
    batch: Batch,
    dtype: torch.dtype,
    device: str,
    workspaces_mb: tuple[float, ...] | list[float],
    backend: str | None = None,
) -> list[Cost]:
    """Costs of prefkern: the reference's pass, a frozen head, and a trained head per workspace.

    A trained head gets one more row: the smallest power of two in MiB that holds the probabilities
    of all tokens, so that nothing is computed twice.
    """
    plan = _plans(head, batch.scored, dtype, device, backend)
    workspaces_mb = sorted(set(workspaces_mb))
    roomy = workspaces_mb[0]
    while plan("trained head", roomy).structure != "one_pass":
        roomy = 2.0 ** (math.floor(math.log2(roomy)) + 1)
    smallest = workspaces_mb[0]
    plans = [
        ("reference", smallest),
        ("frozen head", smallest),
        *(("trained head", workspace_mb) for workspace_mb in sorted({*workspaces_mb, roomy})),
    ]
    return [
        Cost(
            task,
            each.structure,
            workspace_mb,
            each.workspace_bytes,
            each.saved_bytes,
            each.operations,
        )
        for task, workspace_mb in plans
        for each in [plan(task, workspace_mb)]
    ]


def _plans(
    head: ModelHead, scored: int, dtype: torch.dtype, device: str, backend: str | None
) -> Callable[[str, float], Plan]:
    """The plan of a task in a workspace, for so many scored tokens."""
    from prefkern import plan_for

    def plan(task: str, workspace_mb: float) -> Plan:
        return plan_for(
            scored,
            head.hidden_size,
            head.vocab_size,
            dtype=dtype,
            device=device,
            trains_hidden=task != "reference",
            trains_head=task == "trained head",
            softcap=head.softcap is not None,
            # The trainer logs statistics for the policy.
            return_stats=task != "reference",
            workspace_mb=workspace_mb,
            backend=backend,
        )

    return plan


def eager_costs(head: ModelHead, batch: Batch, dtype: torch.dtype) -> list[Cost]:
    """Costs of logits in memory, counted as the module's docstring says."""
    logits = batch.positions * head.vocab_size
    product = 2 * logits * head.hidden_size
    rounded = dtype.itemsize
    copy = 4 if rounded != 4 else 0
    return [
        Cost("reference", "logits", None, logits * (rounded + copy + 4), 0, product),
        Cost("frozen head", "logits", None, logits * 8, logits * (rounded + 4), 2 * product),
        Cost("trained head", "logits", None, logits * 8, logits * (rounded + 4), 3 * product),
    ]


def _show(
    args: Namespace, head: ModelHead, batch: Batch, dtype: torch.dtype, costs: list[Cost]
) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    # If stdout is not a terminal, its width is unknown, so lines are not folded.
    is_terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if is_terminal else 120)
    transform = "" if head.logit_scale == 1 else f", logits times {head.logit_scale:.6g}"
    transform += "" if head.softcap is None else f", softcap {head.softcap:g}"
    size = _bytes(head.hidden_size * head.vocab_size * dtype.itemsize)
    console.print(
        f"[bold]{escape(args.model)}[/bold] ({head.model}): H = {head.hidden_size:,}, V = {head.vocab_size:,}, "
        f"{'head tied to the embeddings' if head.is_tied else 'head not tied'}, {size} in "
        f"{str(dtype).removeprefix('torch.')}{transform}",
        soft_wrap=not is_terminal,
    )
    console.print(
        f"{'' if args.data is None else 'the step with the most scored tokens: '}"
        f"{_counted(batch.pairs, 'pair')} on {args.device}, {batch.responses} x {batch.length:,} tokens "
        f"each: "
        f"N = {batch.scored:,} scored of {batch.positions:,}",
        soft_wrap=not is_terminal,
    )
    table = Table(box=SIMPLE, pad_edge=False)
    for column in ("step", "way"):
        table.add_column(column, no_wrap=True)
    for column in ("workspace", "temporary", "kept", "total", "NHV"):
        table.add_column(column, justify="right")
    unit = batch.scored * head.hidden_size * head.vocab_size
    is_first_eager = True
    for cost in costs:
        if cost.way == "logits" and is_first_eager:
            table.add_section()
            is_first_eager = False
        table.add_row(
            cost.task,
            cost.way,
            "-" if cost.workspace_mb is None else _bytes(cost.workspace_mb * 2**20),
            _bytes(cost.temporary_bytes),
            _bytes(cost.saved_bytes),
            _bytes(cost.bytes),
            f"{cost.operations / unit:.2f}",
            style="dim" if cost.way == "logits" else None,
        )
    console.print(table)
    console.print(
        "Bytes do not include weights, hidden states and the gradients of both; kept: for "
        f"backward. Logits: on all {batch.positions:,} positions, with a float32 log-softmax and, "
        "in backward, two float32 gradients of that size. NHV: operations of the matrix products, per "
        "scored token, hidden unit and vocabulary entry. A step costs one of the head's rows, and "
        "the reference's row too unless its log-probs are precomputed. The largest workspace of a "
        "trained head is the smallest power of two in which nothing is computed twice.",
        style="dim",
        soft_wrap=not is_terminal,
    )


def _show_pairs(args: Namespace, plan: _PairsPlan) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    is_terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if is_terminal else 120)
    for summary in plan.summaries:
        console.print(f"[bold]{escape(summary)}[/bold]", soft_wrap=not is_terminal)
    console.print(
        f"an epoch: {_counted(plan.steps, 'step')} of {_counted(plan.pairs, 'pair')}, in a random "
        f"order (seed {args.seed}), with {'LoRA' if args.lora else 'all weights trained'}",
        soft_wrap=not is_terminal,
    )
    table = Table(box=SIMPLE, pad_edge=False)
    table.add_column("layout", no_wrap=True)
    columns = ("tokens", "operations", "activations", "checkpointed: operations", "activations")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    of_heads = "and its head" if args.gold else "the reference's forward and both heads"
    of_adapters = ", nor are the adapters' own products and states" if args.lora else ""
    first = plan.epochs[0]
    for epoch in plan.epochs:
        table.add_row(
            epoch.layout,
            f"{epoch.tokens:,} ({epoch.tokens / first.tokens:.2f})",
            *(
                f"{show(value)} ({value / base:.2f})"
                for show, value, base in (
                    (_count, epoch.operations, first.operations),
                    (_bytes, epoch.activations, first.activations),
                    (_count, epoch.operations_checkpointed, first.operations_checkpointed),
                    (_bytes, epoch.activations_checkpointed, first.activations_checkpointed),
                )
            ),
        )
    console.print(table)
    console.print(
        "In parentheses: to padded. Packed: padding_free; prompt shared: share_prompt as well, if "
        "the model can, which training finds out (known families: bench/FAMILIES.md). Operations: "
        "matrix products of an epoch, of the policy's forward and backward, "
        f"{of_heads} ({_bytes(plan.workspace_mb * 2**20)} of workspace), with sdpa "
        "attention. Activations: what the body keeps for backward in the largest step, in "
        f"{args.dtype}; checkpointed, also one layer that is computed again. Weights, gradients, "
        f"optimizer and head are not in it{of_adapters}.",
        style="dim",
        soft_wrap=not is_terminal,
    )


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def _count(count: float) -> str:
    """As 1.20e9: a small table has numbers of several sizes, which line up so."""
    digits, exponent = f"{count:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        # A value that would print as 1,024 prints as 1 of the next unit.
        if count >= 0.9995 * size:
            value = round(count / size, 0 if count >= 100 * size else 1)
            return f"{value:,g} {unit}" if value < 1e6 else f"{value:,.0f} {unit}"
    return f"{count:,.0f} B" if count else "-"
