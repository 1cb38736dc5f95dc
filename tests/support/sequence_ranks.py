"""Losses of sequences over several ranks: the cases, each as one rank of several or as one process.

`python -m support.sequence_ranks FOLDER NAME...`, started as a rank of several (`launch`), runs the
named cases and leaves what it saw in FOLDER/rank0.pt and so on. `truth` is the same batch in one
process, whole, with its logits in memory (`prefkern.reference`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import prefkern
from prefkern import objectives, reference
from prefkern.objectives import DPO, WPO, Objective, WithNLL
from prefkern.objectives.running import all_sum, counted_once, gather
from support.machine import BACKENDS, DEVICE
from support.ranks import outcomes
from support.vocab_ranks import counted, drawing

V, H, R, T, S = 83, 16, 5, 24, 6
TRANSFORM = {"logit_scale": 1.3, "softcap": 6.0, "temperature": 0.7}
# The scored tokens of each padded row; the first three are the prompt.
ENDS = (24, 9, 17, 4, 24, 3)
LENGTHS = tuple(end - 3 for end in ENDS)
# Where each sequence of a packed row ends; the last one is empty.
PACKED_ENDS = (20, 29, 46, 50, 74, 74)
STATES, WEIGHTS = ("hidden", "lora_hidden"), ("weight", "bias", "lora_weight")
OF_TOKENS = ("hidden", "labels", "lora_hidden", "ref_hidden")
REFERENCE = ("ref_hidden", "ref_weight", "ref_bias")


@dataclass(frozen=True)
class Case:
    make: Callable[[], Any] = DPO
    given: tuple[str, ...] = ("ref_logps",)  # beside hidden, weight and labels
    trains: tuple[str, ...] = ("hidden", "weight")
    split: str = "uneven"
    packed: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    settings: dict[str, Any] = field(default_factory=dict)  # of FusedPreferenceLoss
    calls: int = 1
    spoil: tuple[int, ...] = ()  # tokens that become NaN


def named(name: str) -> Callable[[], Any]:
    return lambda: objectives.build(name)


def needs(make: Callable[[], Any]) -> tuple[str, ...]:
    """What an objective of the registry is given, with a reference's head where it must be."""
    objective = make()
    given = ("ref_logps",) if objective.needs_reference else ()
    if getattr(objective, "needs_kls", False):
        given = REFERENCE
    if not isinstance(objective, Objective):
        given += ("desirable", "mismatched_log_ratios")
    elif objective.needs_reward_margins:
        given += ("reward_margins",)
    return given


EVERY = {
    **{name: named(name) for name in objectives.names()},
    "betadpo, drawn": drawing,
    "wpo": lambda: WPO(DPO()),
    "wpo of alphadpo": lambda: WPO(named("alphadpo")()),
    "a mixture": named("alphadpo+tdpo2"),
    "nll of simpo": lambda: WithNLL(named("simpo")(), 0.7),
}
# Twice, so that a second batch meets the statistics of the first.
OBJECTIVES = {
    **{name: Case(make, needs(make), calls=2) for name, make in EVERY.items()},
    **{
        f"{name}, packed": Case(EVERY[name], needs(EVERY[name]), packed=True, calls=2)
        for name in ("simpo", "alphadpo", "tdpo2", "wpo", "kto")
    },
}
ADAPTED = ("hidden", "weight", "bias", "lora_hidden", "lora_weight")
KINDS = {
    "even": Case(split="even"),
    "head and tail": Case(split="head-tail"),
    "any order": Case(split="any"),
    "nothing scored on a rank": Case(split="prompt"),
    "nothing on a rank": Case(split="empty"),
    "nothing on a rank, packed": Case(split="empty", packed=True, make=named("simpo"), given=()),
    "frozen head": Case(trains=("hidden",), options={"return_stats": True}),
    "head alone": Case(trains=("weight",)),
    "no gradient": Case(trains=(), options={"return_stats": True}),
    "transform, bias, adapter, statistics": Case(
        given=("ref_logps", "bias", "lora_hidden", "lora_weight"),
        trains=ADAPTED,
        options=TRANSFORM | {"return_stats": True},
        settings={"workspace_mb": 0.005},
    ),
    "adapter, nothing on a rank, packed": Case(
        given=("ref_logps", "lora_hidden", "lora_weight"),
        trains=("hidden", "lora_hidden", "lora_weight"),
        split="empty",
        packed=True,
        options={"return_stats": True},
    ),
    "a reference with its own head": Case(given=REFERENCE, options=TRANSFORM),
    "a reference through the same head": Case(given=("ref_hidden",), split="empty"),
    "tdpo, nothing on a rank": Case(named("tdpo2"), REFERENCE, split="empty", options=TRANSFORM),
    "gold rows, a reference of the pairs": Case(named("dpo+tpo"), REFERENCE, options=TRANSFORM),
    "gold rows, packed, nothing on a rank": Case(
        named("dpo+tpo"), ("ref_hidden",), split="empty", packed=True
    ),
    "finite": Case(settings={"on_nonfinite": "raise"}),
}
ROUNDED = {
    f"{name}, {str(dtype).removeprefix('torch.')}": replace((OBJECTIVES | KINDS)[name], dtype=dtype)
    for name in ("adadpo", "tdpo1", "wpo, packed", "transform, bias, adapter, statistics")
    for dtype in (torch.float32, torch.bfloat16)
}
TRITON = {
    f"{name}, triton": replace(
        case, dtype=torch.float32, settings={"backend": "triton"}, calls=1, packed=packed
    )
    for name, case, packed in (
        ("simpo", OBJECTIVES["simpo"], True),
        ("alphadpo", OBJECTIVES["alphadpo"], False),
    )
    if "triton" in BACKENDS
}
CASES = OBJECTIVES | KINDS | ROUNDED | TRITON


def drawn(case: Case, call: int = 0) -> dict[str, Tensor]:
    """The tensors of a case, whole."""
    generator = torch.Generator().manual_seed(7 + call)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(V, (S, T), generator=generator)
    ids[:, :3] = -100
    for row, end in enumerate(ENDS):
        ids[row, end:] = -100
    tokens = (S, T)
    if case.packed:
        # Sequences of the same tokens without padding, but for an empty one.
        ids = torch.cat([row[:end] for row, end in zip(ids, (20, 9, 17, 4, 24, 0), strict=True)])
        tokens = (len(ids),)
    tensors = {
        "hidden": randn(*tokens, H) * 2 / H**0.5,
        "weight": randn(V, H),
        "labels": ids,
        "bias": randn(V),
        "lora_hidden": randn(*tokens, R),
        "lora_weight": randn(V, R) * 0.5,
        "ref_hidden": randn(*tokens, H) * 2 / H**0.5,
        "ref_weight": randn(V, H),
        "ref_bias": randn(V),
        # About the policy's, so that no loss is saturated.
        "ref_logps": randn(S) * 3 - 6.0 * torch.tensor(LENGTHS),
        "reward_margins": randn(S // 2),
        "desirable": torch.arange(S) % 3 != 1,
        "mismatched_log_ratios": randn(4) + 1,
    }
    if case.packed:
        tensors["cu_seqlens"] = torch.tensor([0, *PACKED_ENDS])
    for token in case.spoil:
        tensors["hidden"].view(-1, H)[token] = torch.nan
    return {
        name: x.to(DEVICE, case.dtype if x.is_floating_point() else x.dtype)
        for name, x in tensors.items()
    }


def tokens_of(split: str, count: int, rank: int, ranks: int) -> Tensor:
    """The tokens of a row that a rank holds."""
    row = torch.arange(count)
    if split == "even":
        return row.tensor_split(ranks)[rank]
    if split == "any":
        mixed = torch.randperm(count, generator=torch.Generator().manual_seed(count))
        return mixed.tensor_split(ranks)[rank]
    if split == "head-tail":
        # As torch's context_parallel balances a causal mask.
        parts = row.tensor_split(2 * ranks)
        return torch.cat([parts[rank], parts[2 * ranks - 1 - rank]])
    if split == "empty":
        return row[:0] if rank == 0 else row.tensor_split(ranks - 1)[rank - 1]
    if split == "prompt":
        return row[:3] if rank == 0 else row[3:].tensor_split(ranks - 1)[rank - 1]
    assert split == "uneven"
    cuts = {2: (5,), 4: (2, 8, 9)}[ranks]
    return row.tensor_split(cuts)[rank]


def part_of(case: Case, whole: dict[str, Tensor], rank: int, ranks: int) -> dict[str, Tensor]:
    """A rank's part of the tensors."""
    part = dict(whole)
    mine = tokens_of(case.split, whole["labels"].shape[-1], rank, ranks).to(DEVICE)
    at = 0 if case.packed else 1
    part |= {name: whole[name].index_select(at, mine) for name in OF_TOKENS}
    if case.packed:
        mine, order = mine.sort()
        part |= {name: part[name][order] for name in OF_TOKENS}
        # How many of this rank's tokens are before each sequence.
        part["cu_seqlens"] = torch.searchsorted(mine, whole["cu_seqlens"])
    return part


def arguments(case: Case, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The keywords of a call, and its leaves."""
    names = ["hidden", "weight", "labels", *case.given, *(["cu_seqlens"] if case.packed else [])]
    leaves = {name: tensors[name].requires_grad_() for name in case.trains}
    given: dict[str, Any] = {name: tensors[name] for name in names}
    if "ref_hidden" in given and "ref_weight" not in given:
        given["ref_weight"] = given["weight"]
    return given | case.options, leaves


VALUES = (
    *("loss", "losses", "chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps"),
    *("chosen_rewards", "rejected_rewards", "chosen_lengths", "rejected_lengths"),
    *("beta_chosen", "beta_rejected", "chosen_gradients", "rejected_gradients"),
    *("logps", "ref_logps", "rewards", "lengths", "reference_point"),
    *("gold_logps", "gold_lengths"),
)


def seen(out: Any, leaves: dict[str, Tensor], objective: nn.Module) -> dict[str, Any]:
    """What a call returned: of whole sequences, of tokens, and gradients."""
    if leaves:
        out.loss.backward()
    values = {name: getattr(out, name, None) for name in VALUES}
    values |= {f"metric {name}": x for name, x in out.metrics.items()}
    stats = {} if out.token_stats is None else out.token_stats._asdict()
    return {
        "values": {name: x.detach() for name, x in values.items() if x is not None},
        "stats": stats,
        "gradients": {name: x.grad for name, x in leaves.items()},
        "state": {
            name: x for name, x in objective.state_dict().items() if isinstance(x, Tensor)
        },
    }  # fmt: skip


def of_rank(case: Case, group: Any) -> list[dict[str, Any]]:
    """Each call of a case, as a rank of the group."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    loss_fn = prefkern.FusedPreferenceLoss(case.make(), sequence_group=group, **case.settings)
    found = []
    for call in range(case.calls):
        given, leaves = arguments(case, part_of(case, drawn(case, call), rank, ranks))
        with counted() as calls, _without_pair_kernel(case):
            out = loss_fn(**given)
        found.append(seen(out, leaves, loss_fn.objective) | {"calls": calls})
    return found


def _without_pair_kernel(case: Case) -> Any:
    """A region where the pair kernel raises: it would count one token a sequence."""
    if case.settings.get("backend") != "triton":
        return nullcontext()
    from unittest.mock import patch

    return patch("prefkern_kernels.pair_loss", side_effect=AssertionError("the kernel was called"))


def truth(case: Case, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """Each call of a case in one process, from plain logits."""
    objective = case.make()
    found = []
    for call in range(case.calls):
        tensors = drawn(case, call)
        tensors = {n: x.to(dtype) if x.is_floating_point() else x for n, x in tensors.items()}
        given, leaves = arguments(case, tensors)
        out = reference.preference_loss(objective, **given)
        found.append(seen(out, leaves, objective))
    return found


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    # Fresh memory holds NaN, as in the tests.
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group("gloo")
    outcomes: dict[str, Any] = {
        name: OTHERS[name]() if name in OTHERS else of_rank(CASES[name], dist.group.WORLD)
        for name in names
    }
    torch.save(outcomes, folder / f"rank{dist.get_rank()}.pt")
    dist.destroy_process_group()


def mesh() -> tuple[Any, Any, int, int]:
    """Of four ranks: the group of a rank's row and of its column, and its place in each."""
    rank = dist.get_rank()
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    return rows[rank // 2], columns[rank % 2], rank % 2, rank // 2


def _with_vocab() -> dict[str, Any]:
    """Sequences over the columns of four ranks, the head over their rows."""
    row, column, entries, _ = mesh()
    found = {}
    for name, case in WITH_VOCAB.items():
        tensors = part_of(case, drawn(case), dist.get_rank(column), 2)
        start, stop = (0, 50) if entries == 0 else (50, V)
        tensors |= {
            each: tensors[each][start:stop].clone() for each in (*WEIGHTS, "ref_weight", "ref_bias")
        }
        given, leaves = arguments(case, tensors)
        loss_fn = prefkern.FusedPreferenceLoss(case.make(), sequence_group=column, **case.settings)
        out = loss_fn(**given, vocab=prefkern.VocabShard(row, start, V))
        found[name] = seen(out, leaves, loss_fn.objective)
    return found


WITH_VOCAB = {
    "dpo": Case(given=("ref_logps", "bias"), trains=("hidden", "weight", "bias")),
    "betadpo, drawn": Case(EVERY["betadpo, drawn"], trains=("hidden", "weight")),
    "alphadpo": Case(EVERY["alphadpo"], given=("ref_hidden",), options={"return_stats": True}),
    "tdpo2": Case(EVERY["tdpo2"], given=REFERENCE, split="empty"),
    "wpo": Case(EVERY["wpo"], packed=True),
    "gold rows": Case(named("dpo+tpo"), REFERENCE, settings={"on_nonfinite": "raise"}),
}


def _averaged() -> dict[str, Any]:
    """DDP over four ranks, two batches over two ranks each: as one process on both batches."""
    found = {}
    rank = dist.get_rank()
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group, batch = groups[rank // 2], rank // 2
    for name, case in AVERAGED.items():
        torch.manual_seed(0)
        model = Model().to(DEVICE)
        wrapped = DistributedDataParallel(model)
        loss_fn = prefkern.FusedPreferenceLoss(case.make(), sequence_group=group)
        tensors = part_of(case, drawn(case, batch), rank % 2, 2)
        hidden = wrapped(tensors["hidden"])
        given = {each: tensors[each] for each in ("labels", *case.given)}
        out = loss_fn(hidden, model.head.weight, **given)
        # DDP takes the mean over all ranks, and the loss is one number of a group's ranks.
        (out.loss * dist.get_world_size(group)).backward()
        found[name] = {
            "losses": out.losses.detach(),
            "gradients": {each: p.grad for each, p in model.named_parameters()},
        }
    return found


AVERAGED = {
    "dpo": Case(),
    "alphadpo": Case(EVERY["alphadpo"]),
    "betadpo, drawn": Case(EVERY["betadpo, drawn"]),
    "kto": Case(EVERY["kto"], needs(EVERY["kto"])),
}


class Model(nn.Module):
    """A body of one layer, and a head that the loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(H, H, dtype=torch.float64)
        self.head = nn.Linear(H, V, bias=False, dtype=torch.float64)

    def forward(self, states: Tensor) -> Tensor:
        # The loss reads the head's weight outside: DDP must see it used.
        return self.body(states) + 0.0 * self.head.weight.sum()


def messages(group: Any, calls: dict[str, Callable[[], Any]]) -> dict[str, str]:
    """The error of each call. A right call between them shows that the ranks are still in step."""
    found = {}
    for name, call in calls.items():
        try:
            call()
        except Exception as error:  # noqa: BLE001
            found[name] = f"{type(error).__name__}: {error}"
        else:
            found[name] = "nothing"
        assert torch.isfinite(of_rank(KINDS["frozen head"], group)[0]["values"]["loss"])
    return found


def _disagreements() -> dict[str, str]:
    """What differs between two ranks, or is wrong on one of them."""
    rank, group = dist.get_rank(), dist.group.WORLD
    case = KINDS["even"]
    tensors = part_of(case, drawn(case), rank, 2)

    def call(objective: Any = None, *, settings: Any = (), keep: int = S, **change: Any) -> Any:
        given = {name: tensors[name] for name in ("hidden", "weight", "labels", "ref_logps")}
        given = {n: x if n == "weight" else x[:keep] for n, x in given.items()} | change
        objective = DPO() if objective is None else objective
        settings = {"sequence_group": group} | dict(settings)
        return prefkern.FusedPreferenceLoss(objective, **settings)(**given)

    far = tensors["labels"].clone()
    far[0, 4] = V
    return messages(
        group,
        {
            "other numbers of sequences": lambda: call(keep=S - 2 * rank),
            "other objectives": lambda: call(objectives.build("ipo") if rank else DPO()),
            "other options of an objective": lambda: call(DPO(0.2 if rank else 0.1)),
            "training": lambda: call(EVERY["alphadpo"]().train(rank == 0)),
            "other reference sums": lambda: call(ref_logps=tensors["ref_logps"] + rank),
            "other options": lambda: call(temperature=2.0 if rank else 1.0),
            "other dtypes": lambda: call(
                **{n: tensors[n].float() for n in ("hidden", "weight", "ref_logps") if rank}
            ),
            "ignore_index": lambda: call(
                labels=far % V, settings={"ignore_index": -100 - rank}
            ),
            "labels out of range on one rank": lambda: call(labels=far if rank else far % V),
            "a wrong argument on one rank": lambda: call(softcap=-1.0 if rank else None),
            "a reference on one rank": lambda: call(
                **({"ref_logps": None, "ref_hidden": tensors["hidden"],
                    "ref_weight": tensors["weight"]} if rank else {})
            ),
            "other entries": lambda: call(
                weight=torch.cat([tensors["weight"], tensors["weight"][:rank]])
            ),
            "a sign of a margin": lambda: call(
                objectives.build("madpo"), reward_margins=torch.tensor([1.0, 1.0 - 2 * rank, 3.0])
            ),
            "what no part is on one rank": lambda: call(vocab=3 if rank else None),
            "one group twice": lambda: call(vocab=prefkern.VocabShard(group, 0, V)),
        },
    )  # fmt: skip


def _disagreements_with_vocab() -> dict[str, str]:
    """On four ranks, of which one or two are wrong, all raise."""
    row, column, entries, _ = mesh()
    case = KINDS["even"]
    tensors = part_of(case, drawn(case), dist.get_rank(column), 2)
    start, stop = (0, 50) if entries == 0 else (50, V)
    rank = dist.get_rank()

    spoilt = tensors["weight"][start:stop].clone()
    spoilt[3] += torch.nan if rank == 3 else 0

    def call(objective: Any = None, *, settings: Any = (), **change: Any) -> Any:
        given = {name: tensors[name] for name in ("hidden", "labels", "ref_logps")}
        given |= {"weight": tensors["weight"][start:stop], **change}
        settings = {"sequence_group": column} | dict(settings)
        loss_fn = prefkern.FusedPreferenceLoss(objective or DPO(), **settings)
        return loss_fn(**given, vocab=prefkern.VocabShard(row, start, V))

    return messages(
        column,
        {
            "a wrong argument on one rank": lambda: call(softcap=-1.0 if rank == 3 else None),
            "a head's parts": lambda: call(
                weight=tensors["weight"][start : stop - (rank == 1)]
            ),
            "reference sums of one rank": lambda: call(
                ref_logps=tensors["ref_logps"] + (rank == 2)
            ),
            "a row of one rank's part": lambda: call(
                weight=spoilt, settings={"on_nonfinite": "raise"}
            ),
        },
    )  # fmt: skip


def _not_finite() -> dict[str, str]:
    """A token of rank 1 is NaN: both ranks raise, and rank 1 names it."""
    spoilt = {"settings": {"on_nonfinite": "raise"}, "spoil": (20,)}
    case = Case(**spoilt)
    return messages(dist.group.WORLD, {"a token": lambda: of_rank(case, dist.group.WORLD)})


def _counted_once() -> dict[str, Any]:
    """Two ranks with the same items, by the one group or the other, and with items of their own."""
    items = torch.tensor([1.0, 2.0, 4.0])
    found = {}
    for name, groups in (
        ("sequence", (dist.group.WORLD, None)),
        ("vocab", (None, dist.group.WORLD)),
        ("neither", (None, None)),
    ):
        with counted_once(*groups):
            everyone, mine = gather(items + (dist.get_rank() if name == "neither" else 0))
            found[name] = (all_sum(items.clone()), everyone, everyone[mine])
    return found


OTHERS: dict[str, Callable[[], Any]] = {
    "with vocab": _with_vocab,
    "averaged": _averaged,
    "disagreements": _disagreements,
    "disagreements with vocab": _disagreements_with_vocab,
    "not finite": _not_finite,
    "counted once": _counted_once,
}


def launch(folder: Path, ranks: int, names: list[str]) -> list[dict[str, Any]]:
    """Run these cases on so many ranks; returns what each saw, by case."""
    return outcomes("sequence_ranks", folder, ranks, names)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
