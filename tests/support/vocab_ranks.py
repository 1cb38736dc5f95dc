"""Calls with a head over several ranks: the cases, each as one rank of several or as one process.

`python -m support.vocab_ranks FOLDER NAME...`, started as a rank of several, runs the named cases
and leaves what it saw in FOLDER/rank0.pt and so on. Without ranks the same functions see the whole
head (`whole`), for the test to compare with.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import prefkern
from prefkern import objectives

V, H, R, TOKENS = 83, 16, 5, 24
TRANSFORM = {"logit_scale": 1.3, "softcap": 6.0, "temperature": 0.7}
SMALL = 0.005  # MiB: several tiles of tokens and of vocabulary entries
# Where each rank's entries end. Uneven; with an empty shard; one that has no label.
CUTS = {
    "uneven": {2: (50, V), 4: (11, 50, 51, V)},
    "empty": {2: (V, V), 4: (0, 40, 40, V)},
    "first empty": {2: (0, V), 4: (0, 0, 1, V)},
}
PARTS = ("weight", "bias", "lora_weight", "ref_weight", "ref_bias")
OF_HEAD = ("weight", "bias", "lora_weight")
OF_STATES = ("hidden", "lora_hidden")


@dataclass(frozen=True)
class Case:
    call: str = "logprobs"  # "logprobs", "kl" or an objective of a loss
    trains: tuple[str, ...] = ("hidden",)
    given: tuple[str, ...] = ()  # beside hidden, weight and labels
    options: dict[str, Any] = field(default_factory=dict)
    cut: str = "uneven"
    dtype: torch.dtype = torch.float64
    spread: float = 4.0
    spoil: Callable[[dict[str, Tensor]], None] | None = None  # changes the drawn tensors
    structure: str | None = None  # of the plan of each rank that has entries
    autocast: bool = False


def ruled_out(tensors: dict[str, Tensor]) -> None:
    """All entries of some shards, and others; no label."""
    tensors["bias"][45:] = -torch.inf
    tensors["labels"].clamp_(max=44)


def confident(tensors: dict[str, Tensor]) -> None:
    """Half of the labels lead by far, so that 1 - p is far below float64's epsilon."""
    flat = tensors["labels"].view(-1)
    rows = tensors["weight"][flat.clamp(min=0)]
    tensors["hidden"].view(-1, H)[::2] = rows[::2] * 30


def unscored(tensors: dict[str, Tensor]) -> None:
    tensors["labels"].fill_(-100)


def ties(tensors: dict[str, Tensor]) -> None:
    """Equal entries on both sides of a cut: top-1 is the first of them."""
    tensors["weight"][60] = tensors["weight"][20]
    tensors["labels"].view(-1)[:] = torch.tensor([20, 60] * (TOKENS // 2))
    tensors["hidden"].view(-1, H)[:] = tensors["weight"][20] * 5


def equal(tensors: dict[str, Tensor]) -> None:
    for name in ("hidden", "weight", "bias"):
        tensors[f"ref_{name}"].copy_(tensors[name])


KEPT, SOME = {"workspace_mb": 8.0}, {"workspace_mb": SMALL}
TRAINED = ("hidden", "weight", "bias")
ADAPTER = ("lora_hidden", "lora_weight")
REFERENCE = ("ref_hidden", "ref_weight", "ref_bias")
STATS = {"return_stats": True}
CASES = {
    "forward": Case(trains=(), options=STATS, structure="forward"),
    "frozen": Case(options=SOME, structure="one_pass"),
    "frozen, transform, statistics": Case(given=("bias",), options=TRANSFORM | STATS | SOME),
    "frozen, confident": Case(spoil=confident, options=STATS),
    "trained, kept": Case(trains=TRAINED, given=("bias",), options=KEPT, structure="one_pass"),
    "trained, recomputed": Case(
        trains=TRAINED, given=("bias",), options=TRANSFORM | STATS | SOME, structure="two_pass"
    ),
    "trained, kept, transform": Case(trains=TRAINED, given=("bias",), options=TRANSFORM | KEPT),
    "trained, saturated": Case(trains=("hidden", "weight"), spread=200.0),
    "bias alone": Case(trains=("bias",), given=("bias",)),
    "an empty shard": Case(
        trains=(*TRAINED, *ADAPTER), given=("bias", *ADAPTER), options=TRANSFORM | STATS, cut="empty"
    ),
    "an empty shard, frozen": Case(cut="first empty", options=STATS),
    "entries ruled out": Case(trains=TRAINED, given=("bias",), spoil=ruled_out, cut="uneven"),
    "nothing scored": Case(trains=TRAINED, given=("bias",), spoil=unscored, options=STATS),
    "ties": Case(trains=(), options=STATS, spoil=ties),
    "lora, frozen": Case(
        trains=("hidden", *ADAPTER), given=ADAPTER, options=TRANSFORM | SOME, structure="two_pass"
    ),
    "lora, trained, kept": Case(
        trains=(*TRAINED, *ADAPTER), given=("bias", *ADAPTER), options=KEPT, structure="one_pass"
    ),
    "kl, frozen": Case("kl", given=(*REFERENCE, "bias"), options=TRANSFORM | SOME),
    "kl, trained, kept": Case("kl", TRAINED, (*REFERENCE, "bias"), TRANSFORM | KEPT),
    "kl, trained, recomputed": Case("kl", TRAINED, (*REFERENCE, "bias"), SOME),
    "kl, equal models": Case("kl", TRAINED, (*REFERENCE, "bias"), TRANSFORM, spoil=equal),
    "kl, lora, an empty shard": Case("kl", (*TRAINED, *ADAPTER), (*REFERENCE, "bias", *ADAPTER),
                                     cut="empty"),
    "dpo, own head": Case("dpo", TRAINED, (*REFERENCE, "bias"), TRANSFORM),
    "dpo, one head": Case("dpo", given=("ref_hidden",)),
    "dpo, one head, an empty shard": Case("dpo", given=("ref_hidden",), cut="empty"),
    "alphadpo": Case("alphadpo", TRAINED, (*REFERENCE, "bias"), STATS),
    "tdpo2": Case("tdpo2", TRAINED, (*REFERENCE, "bias"), SOME),
    "wpo": Case("wpo", given=("ref_hidden",), options=TRANSFORM),
}  # fmt: skip
# Of the same kinds, in dtypes that round.
ROUNDED = {
    f"{name}, {str(dtype).removeprefix('torch.')}": Case(
        **{**vars(CASES[name]), "dtype": dtype, "structure": None}
    )
    for name in (
        "frozen, transform, statistics", "frozen, confident", "trained, kept",
        "trained, recomputed", "an empty shard", "kl, trained, kept", "kl, trained, recomputed",
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}  # fmt: skip
ROUNDED["autocast"] = Case(
    trains=TRAINED, given=("bias",), dtype=torch.float32, autocast=True, options=TRANSFORM
)
ALL = CASES | ROUNDED


def drawn(case: Case) -> dict[str, Tensor]:
    """The tensors of a case, whole, in float64; rounded if its dtype rounds."""
    generator = torch.Generator().manual_seed(len(case.call))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(V, (4, TOKENS // 4), generator=generator)
    labels[0, :2] = -100
    labels[3, -1] = -100
    tensors = {
        "hidden": randn(4, TOKENS // 4, H) * case.spread / H**0.5,
        "weight": randn(V, H),
        "labels": labels,
        "bias": randn(V),
        "lora_hidden": randn(4, TOKENS // 4, R),
        "lora_weight": randn(V, R) * 0.5,
        "ref_hidden": randn(4, TOKENS // 4, H) * case.spread / H**0.5,
        "ref_weight": randn(V, H),
        "ref_bias": randn(V),
        "grad": randn(3, 4, TOKENS // 4),
    }
    if case.spoil is not None:
        case.spoil(tensors)
    return {
        name: x.to(case.dtype) if x.is_floating_point() else x for name, x in tensors.items()
    }


@dataclass
class Seen:
    """What a rank, or one process, got of a call."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    plan: Any = None
    calls: list[tuple[str, int]] = field(default_factory=list)  # collectives, and their bytes


def outcome(case: Case, dtype: torch.dtype | None = None, at: tuple[int, int] | None = None) -> Seen:
    """Run a case: one rank's part of it, at = (start, stop) of its entries, or None: the whole."""
    tensors = drawn(case)
    if dtype is not None:
        tensors = {k: x.to(dtype) if x.is_floating_point() else x for k, x in tensors.items()}
    shard = None
    if at is not None:
        tensors |= {name: tensors[name][slice(*at)].clone() for name in PARTS}
        shard = prefkern.VocabShard(dist.group.WORLD, at[0], V)
    leaves = {name: tensors[name].requires_grad_() for name in case.trains}
    given = {name: tensors[name] for name in ("hidden", "weight", "labels", *case.given)}
    if case.call not in ("logprobs", "kl") and "ref_weight" not in given:
        given["ref_weight"] = given["weight"]
    options = {"vocab": shard} | case.options
    with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast and dtype is None):
        values, total = _called(case, given, options, tensors["grad"])
    if case.trains:
        total.backward()
    gradients = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    assert gradients.keys() == leaves.keys()
    values = {name: x.detach() for name, x in values.items()}
    return Seen(values, gradients, prefkern.last_plan())


def _called(
    case: Case, given: dict[str, Any], options: dict[str, Any], grad: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """The values of a call, and the number to differentiate."""
    if case.call == "logprobs":
        result = prefkern.linear_logprobs(**given, **options)
        if isinstance(result, Tensor):
            return {"logps": result}, (result * grad[0]).sum()
        return result._asdict(), (result.logps * grad[0]).sum()
    if case.call == "kl":
        result = prefkern.linear_kl(**given, **options)
        return result._asdict(), (result.logps * grad[0] + result.kl * grad[1]).sum()
    objective = objectives.build("dpo" if case.call == "wpo" else case.call)
    if case.call == "wpo":
        objective = objectives.WPO(objective, alignment=True)
    workspace_mb = options.pop("workspace_mb", None)
    out = prefkern.FusedPreferenceLoss(objective, workspace_mb=workspace_mb)(**given, **options)
    names = ("losses", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    values = {name: getattr(out, name) for name in names}
    if out.token_stats is not None:
        values |= {f"token {name}": x for name, x in out.token_stats._asdict().items()}
    return values, out.loss


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives of a region: each one's name, and the bytes of its tensor (0 for objects)."""
    calls: list[tuple[str, int]] = []
    reduce, gather = dist.all_reduce, dist.all_gather_object

    def all_reduce(x: Tensor, op: Any = dist.ReduceOp.SUM, **options: Any) -> Any:
        calls.append((str(op).split(".")[-1], x.numel() * x.itemsize))
        return reduce(x, op, **options)

    def all_gather_object(*arguments: Any, **options: Any) -> Any:
        calls.append(("objects", 0))
        return gather(*arguments, **options)

    dist.all_reduce, dist.all_gather_object = all_reduce, all_gather_object
    try:
        yield calls
    finally:
        dist.all_reduce, dist.all_gather_object = reduce, gather


def entries_of(cut: str, rank: int, ranks: int) -> tuple[int, int]:
    ends = (0, *CUTS[cut][ranks])
    return ends[rank], ends[rank + 1]


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    outcomes: dict[str, Any] = {}
    for name in names:
        if name in OTHERS:
            outcomes[name] = OTHERS[name]()
            continue
        with counted() as calls:
            seen = outcome(ALL[name], at=entries_of(ALL[name].cut, rank, ranks))
        seen.calls = calls
        # Not the class, which another process has under another name.
        outcomes[name] = vars(seen)
    torch.save(outcomes, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


OTHERS: dict[str, Callable[[], Any]] = {}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
