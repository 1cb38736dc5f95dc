"""`prefkern plan`: predicts the memory and the operations of a model's head, before training.

    prefkern plan meta-llama/Meta-Llama-3-8B-Instruct --seq-len 2048 --batch 4

A batch of B pairs is 2B sequences of T tokens, of which N are scored. `prefkern.plan_for` says what
prefkern runs for that shape. The table also shows the cost of logits in memory. TDPO's KL is not
counted. Only the model's config is read (and downloaded, for a hub name). The model is built on the
meta device, where weights have shapes but no bytes. An error is one line on stderr and exit
status 2.

The cost of logits in memory is that of the shortest differentiable code,
`model(...).logits.float().log_softmax(-1).gather(...)`, on all 2BT positions. At the peak, the
policy's backward holds the logits in the model's dtype, their float32 log-softmax, and two float32
gradients of the same size. The reference's pass ends before that. At its own peak it holds the
logits, their float32 copy and the log-softmax.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from prefkern.cli.arguments import check_model_folder, fail, spelled

if TYPE_CHECKING:
    import torch

    from prefkern.ops.plan import Plan

_DTYPES = ("bfloat16", "float16", "float32")
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
    """B pairs of 2T tokens that go through forward and backward together."""

    pairs: int
    length: int
    prompt_length: int

    @property
    def positions(self) -> int:
        return 2 * self.pairs * self.length

    @property
    def scored(self) -> int:
        """N: the largest number of response tokens; sequences shorter than T have fewer."""
        return 2 * self.pairs * (self.length - self.prompt_length)


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def main(argv: list[str]) -> int:
    """Run `prefkern plan`; returns the exit status."""
    try:
        args = _parse(argv)
        import torch

        dtype = getattr(torch, args.dtype)
        head = read_head(args.model, args.trust_remote_code)
        batch = Batch(args.batch, args.seq_len, args.prompt_len)
        trained = {"frozen head": not args.trains_head, "trained head": not args.lora}
        fused = fused_costs(
            head, batch, dtype, args.device, args.workspace_mb or _WORKSPACES_MB, args.backend
        )
        costs = [
            cost
            for cost in [*fused, *eager_costs(head, batch, dtype)]
            if trained.get(cost.task, True)
        ]
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        return fail("plan", str(error))
    _show(args.model, head, batch, dtype, args.device, costs)
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="prefkern plan",
        description="Predicts what a model's head costs in a step, compared with logits in memory.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", help="folder or hub name; for a hub name only the config is downloaded"
    )
    parser.add_argument("--seq-len", type=int, required=True, help="tokens of prompt and response")
    parser.add_argument(
        "--batch", type=int, required=True, help="pairs in one forward and backward"
    )
    parser.add_argument(
        "--prompt-len",
        type=int,
        default=0,
        help="how many of these tokens are prompt, which is not scored (default: 0)",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="bfloat16",
        help="dtype of hidden states and head (default: bfloat16)",
    )
    parser.add_argument(
        "--device",
        default="cuda",
        help="device of the later run; this machine need not have it (default: cuda)",
    )
    parser.add_argument("--backend", choices=("triton", "torch"), help="default: the device's own")
    parser.add_argument(
        "--workspace-mb",
        type=float,
        nargs="+",
        metavar="MIB",
        help="bounds on temporary memory to plan for (default: 256 1024 4096)",
    )
    head = parser.add_mutually_exclusive_group()
    head.add_argument(
        "--lora", action="store_true", help="show only a frozen head, as with LoRA on the body"
    )
    head.add_argument("--trains-head", action="store_true", help="show only a trained head")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run model code from the hub"
    )
    args = parser.parse_args(spelled(argv, "-"))
    for name, least in (("seq_len", 2), ("batch", 1), ("prompt_len", 0)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least {least}, got {getattr(args, name)}")
    if args.prompt_len >= args.seq_len:
        raise ValueError(
            f"--prompt-len must be below --seq-len ({args.seq_len}), got {args.prompt_len}"
        )
    check_model_folder("model", args.model)
    return args


def read_head(name: str, trust_remote_code: bool = False) -> ModelHead:
    """The head of a model, given by name or path, without loading weights.

    Raises OSError if there is no such model, and ValueError if it is not a causal LM with a linear
    head, or if no model can be built from its config.
    """
    import torch
    import transformers

    from prefkern.models.heads import find_head
    from prefkern.models.loading import read_config, unusable_config
    from prefkern.models.transform import candidate_transforms

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
            model = loader.from_config(config, trust_remote_code=trust_remote_code)
    except (ImportError, OSError):
        raise
    except Exception as error:
        # For impossible sizes each kind of layer raises its own error.
        raise unusable_config(name, "model", error) from error
    base, head = find_head(model)
    vocab_size, hidden_size = head.weight.shape
    # The likeliest of several readings; only training checks it against the model itself.
    transform = candidate_transforms(config)[0]
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
    from prefkern import plan_for

    def plan(workspace_mb: float, trains_hidden: bool, trains_head: bool) -> Plan:
        return plan_for(
            batch.scored,
            head.hidden_size,
            head.vocab_size,
            dtype=dtype,
            device=device,
            trains_hidden=trains_hidden,
            trains_head=trains_head,
            softcap=head.softcap is not None,
            # The trainer logs statistics for the policy.
            return_stats=trains_hidden,
            workspace_mb=workspace_mb,
            backend=backend,
        )

    workspaces_mb = sorted(set(workspaces_mb))
    roomy = workspaces_mb[0]
    while plan(roomy, True, True).structure != "one_pass":
        roomy = 2.0 ** (math.floor(math.log2(roomy)) + 1)
    smallest = workspaces_mb[0]
    plans = [
        ("reference", smallest, plan(smallest, False, False)),
        ("frozen head", smallest, plan(smallest, True, False)),
        *(
            ("trained head", workspace_mb, plan(workspace_mb, True, True))
            for workspace_mb in sorted({*workspaces_mb, roomy})
        ),
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
        for task, workspace_mb, each in plans
    ]


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
    name: str, head: ModelHead, batch: Batch, dtype: torch.dtype, device: str, costs: list[Cost]
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
        f"[bold]{escape(name)}[/bold] ({head.model}): H = {head.hidden_size:,}, V = {head.vocab_size:,}, "
        f"{'head tied to the embeddings' if head.is_tied else 'head not tied'}, {size} in "
        f"{str(dtype).removeprefix('torch.')}{transform}",
        soft_wrap=not is_terminal,
    )
    console.print(
        f"{batch.pairs:,} {'pair' if batch.pairs == 1 else 'pairs'} on {device}, 2 x "
        f"{batch.length:,} tokens each: N = {batch.scored:,} scored of {batch.positions:,}",
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


def _bytes(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        # A value that would print as 1,024 prints as 1 of the next unit.
        if count >= 0.9995 * size:
            value = round(count / size, 0 if count >= 100 * size else 1)
            return f"{value:,g} {unit}" if value < 1e6 else f"{value:,.0f} {unit}"
    return f"{count:,.0f} B" if count else "-"
