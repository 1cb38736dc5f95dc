"""Calls with a head over several ranks: the cases, each as one rank of several or as one process.

`python -m support.vocab_ranks FOLDER NAME...`, started as a rank of several (`launch`), runs the
named cases and leaves what it saw in FOLDER/rank0.pt and so on. Without a rank `outcome` has the
whole head, for a test to compare with.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import prefkern
from prefkern import objectives
from support.machine import BACKENDS, DEVICE
from support.ranks import outcomes

V, H, R, TOKENS = 83, 16, 5, 24
TRANSFORM = {"logit_scale": 1.3, "softcap": 6.0, "temperature": 0.7}
SMALL = 0.005  # MiB: several tiles of tokens and of vocabulary entries
# Where each rank's entries end. Uneven; with an empty shard; one that has no label.
CUTS = {
    "uneven": {2: (50, V), 4: (11, 50, 51, V)},
    "empty": {2: (V, V), 4: (0, 40, 40, V)},
    "first empty": {2: (0, V), 4: (0, 0, 1, V)},
}


def drawing() -> objectives.Objective:
    """beta-DPO that draws about every second pair, whatever its margin."""
    objective = objectives.BetaDPO(m=0.05, keep=0.7)
    objective.statistics.variance.fill_(1e6)
    objective.manual_seed(1)
    return objective


# Objectives that have no name of their own.
MADE = {
    "wpo": lambda: objectives.WPO(objectives.DPO(), alignment=True),
    "betadpo, drawn": drawing,
}
PARTS = ("weight", "bias", "lora_weight", "ref_weight", "ref_bias")


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


def not_finite(tensors: dict[str, Tensor]) -> None:
    """A token with a NaN; a label with a logit of +inf, another of -inf; the rest is finite."""
    tensors["hidden"].view(-1, H)[8] = torch.nan
    tensors["labels"].view(-1)[9:12] = torch.tensor([2, 70, 60], device=DEVICE)
    tensors["bias"][70], tensors["bias"][60] = torch.inf, -torch.inf


def nan_row(tensors: dict[str, Tensor]) -> None:
    tensors["weight"][60] = torch.nan


def unscored(tensors: dict[str, Tensor]) -> None:
    tensors["labels"].fill_(-100)


def ties(tensors: dict[str, Tensor]) -> None:
    """Equal entries on both sides of a cut: top-1 is the first of them."""
    tensors["weight"][60] = tensors["weight"][20]
    tensors["labels"].view(-1)[:] = torch.tensor([20, 60] * (TOKENS // 2), device=DEVICE)
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
        trains=(*TRAINED, *ADAPTER), given=("bias", *ADAPTER), options=TRANSFORM | STATS | SOME,
        cut="empty",
    ),
    "an empty shard, frozen": Case(cut="first empty", options=STATS),
    "entries ruled out": Case(trains=TRAINED, given=("bias",), spoil=ruled_out, cut="uneven"),
    "not finite": Case(given=("bias",), spoil=not_finite, options=STATS),
    "a row of NaN": Case(trains=("hidden", "weight"), spoil=nan_row, options=STATS),
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
    # A draw from the pairs of all ranks, which have the same ones.
    "betadpo, drawn": Case("betadpo, drawn", TRAINED, (*REFERENCE, "bias")),
    "wpo": Case("wpo", given=("ref_hidden",), options=TRANSFORM),
    # With a third, gold row of each pair.
    "dpo+tpo": Case("dpo+tpo", TRAINED, (*REFERENCE, "bias"), STATS),
    "dpo+tpo, one head, an empty shard": Case("dpo+tpo", given=("ref_hidden",), cut="empty"),
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
TRITON = {
    f"{name}, triton": Case(
        **{
            **vars(CASES[name]),
            "dtype": torch.float32,
            "options": CASES[name].options | {"backend": "triton"},
        }
    )
    for name in (
        "frozen, transform, statistics", "trained, kept", "trained, recomputed", "an empty shard",
        "kl, trained, kept",
    )
    if "triton" in BACKENDS
}  # fmt: skip
ALL = CASES | ROUNDED | TRITON


def drawn(case: Case) -> dict[str, Tensor]:
    """The tensors of a case, whole, in float64; rounded if its dtype rounds."""
    generator = torch.Generator().manual_seed(len(case.call))

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = (6, TOKENS // 6) if "tpo" in case.call else (4, TOKENS // 4)
    labels = torch.randint(V, rows, generator=generator)
    labels[0, :2] = -100
    labels[3, -1] = -100
    tensors = {
        "hidden": randn(*rows, H) * case.spread / H**0.5,
        "weight": randn(V, H),
        "labels": labels,
        "bias": randn(V),
        "lora_hidden": randn(*rows, R),
        "lora_weight": randn(V, R) * 0.5,
        "ref_hidden": randn(*rows, H) * case.spread / H**0.5,
        "ref_weight": randn(V, H),
        "ref_bias": randn(V),
        "grad": randn(3, *rows),
    }
    tensors = {name: x.to(DEVICE) for name, x in tensors.items()}
    if case.spoil is not None:
        case.spoil(tensors)
    return cast(tensors, case.dtype)


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in tensors.items()}


@dataclass
class Seen:
    """What a rank, or one process, got of a call."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]
    plan: Any = None
    calls: list[tuple[str, int]] = field(default_factory=list)  # collectives, and their bytes


def outcome(
    case: Case, dtype: torch.dtype | None = None, at: tuple[int, int] | None = None
) -> Seen:
    """Run a case: one rank's part of it, at = (start, stop) of its entries, or None: the whole."""
    tensors = drawn(case)
    options = dict(case.options)
    if dtype is not None:
        tensors = cast(tensors, dtype)
        options.pop("backend", None)
    shard = None
    if at is not None:
        tensors |= {name: tensors[name][slice(*at)].clone() for name in PARTS}
        shard = prefkern.VocabShard(dist.group.WORLD, at[0], V)
    leaves = {name: tensors[name].requires_grad_() for name in case.trains}
    given = {name: tensors[name] for name in ("hidden", "weight", "labels", *case.given)}
    if case.call not in ("logprobs", "kl") and "ref_weight" not in given:
        given["ref_weight"] = given["weight"]
    options["vocab"] = shard
    with torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast and dtype is None):
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
    objective = MADE[case.call]() if case.call in MADE else objectives.build(case.call)
    workspace_mb = options.pop("workspace_mb", None)
    out = prefkern.FusedPreferenceLoss(objective, workspace_mb=workspace_mb)(**given, **options)
    names = ("losses", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    values = {name: getattr(out, name) for name in names}
    if out.gold_logps is not None:
        values["gold_logps"] = out.gold_logps
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
    # Fresh memory holds NaN, as in the tests.
    torch.use_deterministic_algorithms(True, warn_only=True)
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


def shard_of(start: int, size: int = V) -> prefkern.VocabShard:
    return prefkern.VocabShard(dist.group.WORLD, start, size)


def _retained() -> dict[str, Any]:
    """Twice the same backward, and one without the other's gradients."""
    case = CASES["lora, trained, kept"]
    tensors = drawn(case)
    start, stop = entries_of("uneven", dist.get_rank(), dist.get_world_size())
    tensors |= {name: tensors[name][start:stop].clone() for name in PARTS}
    leaves = [tensors[name].requires_grad_() for name in case.trains]
    given = {name: tensors[name] for name in ("hidden", "weight", "labels", *case.given)}
    logps = prefkern.linear_logprobs(**given, vocab=shard_of(start))
    return {
        "gradients": [
            torch.autograd.grad(logps, leaves, tensors["grad"][0], retain_graph=True)
            for _ in range(2)
        ]
    }


def _two_groups() -> dict[str, Any]:
    """Four ranks in two pairs, each with tokens of its own; both have the head."""
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    tensors = drawn(CASES["frozen"])
    start, stop = entries_of("uneven", rank % 2, 2)
    hidden = tensors["hidden"].roll(rank // 2, 0).requires_grad_()
    logps = prefkern.linear_logprobs(
        hidden, tensors["weight"][start:stop], tensors["labels"].roll(rank // 2, 0),
        vocab=prefkern.VocabShard(groups[rank // 2], start, V),
    )  # fmt: skip
    logps.backward(tensors["grad"][0].roll(rank // 2, 0))
    return {"rolled": rank // 2, "values": logps.detach(), "gradient": hidden.grad}


def _messages(calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """The error of each call. A right call between them shows that the ranks are still in step."""
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # noqa: BLE001
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "nothing"
        start, stop = entries_of("uneven", dist.get_rank(), dist.get_world_size())
        tensors = drawn(CASES["frozen"])
        logps = prefkern.linear_logprobs(
            tensors["hidden"], tensors["weight"][start:stop], tensors["labels"],
            vocab=shard_of(start),
        )  # fmt: skip
        assert logps.sum().item() < -1
    return found


def _disagreements() -> dict[str, str]:
    """What differs between ranks, or is wrong on one of them. Two ranks."""
    rank, tensors = dist.get_rank(), drawn(CASES["frozen"])
    hidden, weight, labels = (tensors[name] for name in ("hidden", "weight", "labels"))
    start, stop = entries_of("uneven", rank, 2)
    far = labels.clone()
    far[1, 1] = V
    mesh = init_device_mesh(DEVICE, (2,))
    in_parts = DTensor.from_local(hidden, mesh, [Shard(0)], run_check=False)
    rows, columns = (distribute_tensor(weight, mesh, [Shard(dim)]) for dim in (0, 1))
    biases = [
        distribute_tensor(tensors["bias"], mesh, [place]) for place in (Shard(0), Replicate())
    ]

    def call(labels: Tensor = labels, part: slice = slice(start, stop), **change: Any) -> Any:
        given = {"hidden": hidden, "weight": weight[part], "vocab": shard_of(start)} | change
        return prefkern.linear_logprobs(labels=labels, **given)

    def kl(**change: Any) -> Any:
        given = {"weight": weight[start:stop], "vocab": shard_of(start)} | change
        given["ref_weight"] = given["weight"]
        return prefkern.linear_kl(hidden, labels=labels, ref_hidden=hidden, **given)

    return _messages(
        {
            "labels out of range on one rank": lambda: call(far if rank else labels),
            "other labels": lambda: call(labels.flip(0) if rank else labels),
            "another shape": lambda: call(labels if rank else labels[:, :-1]),
            "other calls": lambda: call() if rank else kl(),
            "other options": lambda: call(temperature=2.0 if rank else 1.0),
            "a gradient on one rank": lambda: call(
                hidden=hidden.clone().requires_grad_(rank == 0)
            ),
            "other sizes": lambda: call(vocab=shard_of(start, V + rank)),
            "a gap": lambda: call(part=slice(start, stop - 1) if rank == 0 else slice(start, stop)),
            "an overlap": lambda: call(
                part=slice(start, stop) if rank else slice(0, stop + 3)
            ),
            "too many rows": lambda: call(part=slice(0, V)),
            "a state in parts on one rank": lambda: call(hidden=in_parts if rank else hidden),
            "a DTensor and vocab on one rank": lambda: call(
                weight=rows if rank else weight[start:stop]
            ),
            "a bias everywhere on one rank": lambda: call(
                weight=rows, vocab=None, bias=biases[rank]
            ),
            "columns on one rank": lambda: call(weight=columns if rank else rows, vocab=None),
            "a bias of a kl": lambda: kl(weight=rows, vocab=None, bias=biases[rank]),
        }
    )  # fmt: skip


def _losses() -> dict[str, str]:
    """The same of a loss."""
    rank, tensors = dist.get_rank(), drawn(CASES["frozen"])
    hidden, weight, labels = (tensors[name] for name in ("hidden", "weight", "labels"))
    start, stop = entries_of("uneven", rank, 2)
    rows = distribute_tensor(weight, init_device_mesh(DEVICE, (2,)), [Shard(0)])
    spoilt = weight[start:stop].clone()
    spoilt[3] = torch.nan if rank else 0.0

    def loss(objective: str = "dpo", on_nonfinite: Any = None, **change: Any) -> Any:
        made = prefkern.FusedPreferenceLoss(objectives.build(objective), on_nonfinite=on_nonfinite)
        given = {"weight": weight[start:stop], "vocab": shard_of(start)}
        if "ref_weight" not in change:
            given["ref_logps"] = torch.zeros(4, device=DEVICE)
        return made(hidden=hidden, labels=labels, **(given | change))

    return _messages(
        {
            "other objectives": lambda: loss("ipo" if rank else "dpo"),
            "a wrong argument on one rank": lambda: loss(softcap=-1.0 if rank else None),
            "a whole reference": lambda: loss(ref_hidden=hidden, ref_weight=weight[:V - start]),
            "nonfinite on one rank": lambda: loss(on_nonfinite="raise" if rank else None),
            "a row that is not finite": lambda: loss(on_nonfinite="raise", weight=spoilt),
            "a DTensor and vocab on one rank": lambda: loss(
                weight=rows if rank else weight[start:stop]
            ),
        }
    )  # fmt: skip


def _dtensors() -> dict[str, Any]:
    """Heads and states as DTensors, with 83 entries and with fewer than torch.chunk's parts."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    found = {}
    for name, entries, placement in (
        ("83 entries", V, Shard(0)), ("5 entries", 5, Shard(0)), ("whole", V, Replicate()),
    ):  # fmt: skip
        tensors = drawn(CASES["lora, trained, kept"])
        tensors["labels"] = tensors["labels"].where(
            tensors["labels"] < 0, tensors["labels"] % entries
        )
        leaves = {
            part: distribute_tensor(tensors[part][:entries], mesh, [placement]).requires_grad_()
            for part in ("weight", "bias", "lora_weight")
        }
        leaves["hidden"] = distribute_tensor(tensors["hidden"], mesh, [Replicate()])
        leaves["lora_hidden"] = tensors["lora_hidden"]
        for part in ("hidden", "lora_hidden"):
            leaves[part].requires_grad_()
        logps = prefkern.linear_logprobs(labels=tensors["labels"], **leaves)
        logps.backward(tensors["grad"][0])
        gradients = {part: x.grad for part, x in leaves.items()}
        placed = {
            part: str(x.placements) for part, x in gradients.items() if isinstance(x, DTensor)
        }
        found[name] = {
            "logps": logps.detach(),
            "placed": placed,
            "gradients": {
                part: x.full_tensor() if isinstance(x, DTensor) else x
                for part, x in gradients.items()
            },
        }
    return found


def _reference_dtensors() -> list[Tensor]:
    """Losses with a reference through the policy's head, and through one of its own."""
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    tensors = drawn(CASES["dpo, one head"])
    weight, ref_weight = (
        distribute_tensor(tensors[name], mesh, [Shard(0)]) for name in ("weight", "ref_weight")
    )
    loss = prefkern.FusedPreferenceLoss(objectives.build("dpo"))
    given = {name: tensors[name] for name in ("hidden", "labels", "ref_hidden")}
    return [
        loss(**given, weight=weight, ref_weight=of_reference).losses
        for of_reference in (weight, ref_weight)
    ]


def _placements() -> dict[str, str]:
    """DTensors that are refused."""
    ranks = dist.get_world_size()
    mesh, two = init_device_mesh(DEVICE, (ranks,)), init_device_mesh(DEVICE, (ranks, 1))
    tensors = drawn(CASES["frozen"])
    hidden, weight, labels = (tensors[name] for name in ("hidden", "weight", "labels"))
    bias, start = tensors["bias"], entries_of("uneven", dist.get_rank(), ranks)[0]
    rows = distribute_tensor(weight, mesh, [Shard(0)])

    def call(**change: Any) -> Any:
        return prefkern.linear_logprobs(**{"hidden": hidden, "labels": labels} | change)

    def kl(**change: Any) -> Any:
        return prefkern.linear_kl(hidden, labels=labels, ref_hidden=hidden, **change)

    def spread(x: Tensor, *placements: Any) -> DTensor:
        return distribute_tensor(x, two if len(placements) > 1 else mesh, placements)

    return _messages(
        {
            "columns": lambda: call(weight=spread(weight, Shard(1))),
            "two dimensions": lambda: call(weight=spread(weight, Shard(0), Replicate())),
            "twice": lambda: call(weight=rows, vocab=shard_of(start)),
            "tokens": lambda: call(weight=rows, hidden=spread(hidden, Shard(0))),
            "bias": lambda: call(weight=rows, bias=spread(bias, Replicate())),
            "a plain weight's bias": lambda: call(weight=weight, bias=spread(bias, Shard(0))),
            "a reference alone": lambda: kl(weight=weight, ref_weight=rows),
            "a whole reference": lambda: kl(weight=rows, ref_weight=weight),
        }
    )


OTHERS: dict[str, Callable[[], Any]] = {
    "retained": _retained,
    "disagreements": _disagreements,
    "losses": _losses,
    "two groups": _two_groups,
    "dtensors": _dtensors,
    "reference dtensors": _reference_dtensors,
    "placements": _placements,
}


def launch(folder: Path, ranks: int, names: list[str]) -> list[dict[str, Any]]:
    """Run these cases on so many ranks; returns what each saw, by case."""
    return [
        {name: Seen(**seen) if name in ALL else seen for name, seen in each.items()}
        for each in outcomes("vocab_ranks", folder, ranks, names)
    ]


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
