"""Bad inputs of every public call, with the errors that they must raise: one table.

A row is a right call with one change, and its error: the type, and parts of the message. The
message must have the argument's name (the test adds that itself), the given value, and what is
expected or what to do. `test_errors` runs all rows. It also checks that every parameter of every
call here has a row, and that a row or another test reaches every `raise` in the package.

Cases that need a dataset on disk, a checkpoint or a trained model are in test_corrupt.py,
test_data.py, test_cli_train.py, test_margins.py, test_trainer*.py and test_trl_refusals.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import prefkern
from prefkern import objectives, reference
from prefkern.loss import diagnostics
from prefkern.objectives import Examples, Pairs, aot
from support import tiny

nan = math.nan
V, H, B, T = 50, 8, 2, 3
LABELS_OUT_OF_RANGE = [50, -7, 2**40]


@dataclass(frozen=True)
class Call:
    """A public call, with right arguments."""

    function: Callable[..., Any]
    good: Callable[[], dict[str, Any]]
    # Parameters that accept every value.
    any_value: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Row:
    call: str
    change: dict[str, Any]
    error: type[Exception]
    says: tuple[str, ...]

    @property
    def argument(self) -> str:
        return next(iter(self.change))

    def __str__(self) -> str:
        values = ",".join(f"{name}={_short(value)}" for name, value in self.change.items())
        return f"{self.call}({values})"


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor) and value.is_nested:
        return "nested"
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{value.device.type[0]}"
    return repr(value)[:24]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


def nested(*rows: int, width: int = 1, layout: torch.layout = torch.strided) -> torch.Tensor:
    return torch.nested.nested_tensor([randn(n, width) for n in rows], layout=layout)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(V, shape)


def operator() -> dict[str, Any]:
    return {"hidden": randn(B, T, H), "weight": randn(V, H), "labels": ids(B, T)}


def batch() -> dict[str, Any]:
    return {
        "hidden": randn(2 * B, T, H),
        "weight": randn(V, H),
        "labels": ids(2 * B, T),
        "ref_logps": -torch.rand(2 * B),
    }


def packed(cu_seqlens: Any) -> dict[str, Any]:
    rows = 2 * B * T
    return {"cu_seqlens": cu_seqlens, "hidden": randn(rows, H), "labels": ids(rows)}


def examples() -> dict[str, Any]:
    return {
        **batch(),
        "desirable": torch.tensor([True, False] * B),
        "mismatched_log_ratios": torch.zeros(3),
    }


def shape() -> dict[str, Any]:
    return {"tokens": 4, "hidden_size": H, "vocab_size": V, "device": "cpu"}


def pairs() -> dict[str, Any]:
    names = ("chosen_logps", "rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    return {name: -torch.rand(B) for name in names}


def lengths() -> dict[str, Any]:
    return {"chosen_lengths": torch.ones(B), "rejected_lengths": torch.ones(B)}


MODEL = tiny.model()
TEXT = torch.randint(5, tiny.VOCAB_SIZE, (2 * B, T))


# A shard of it can be made and checked; a call with one needs a group that was started.
GROUP = dist.ProcessGroup(dist.HashStore(), 0, 1)


def loss_of(name: str) -> Callable[..., Any]:
    return prefkern.FusedPreferenceLoss(objectives.build(name))


def oracle_of(name: str) -> Callable[..., Any]:
    def preference_loss(*args: Any, **kwargs: Any) -> Any:
        return reference.preference_loss(objectives.build(name), *args, **kwargs)

    return preference_loss


def text() -> dict[str, Any]:
    return {"model": MODEL, "input_ids": TEXT}


def text_batch(**change: Any) -> dict[str, Any]:
    return {"input_ids": TEXT, "labels": TEXT, **change}


def step() -> dict[str, Any]:
    return {
        "model": MODEL,
        "batch": text_batch(),
        "loss_fn": loss_of("dpo"),
        "ref_logps": -torch.rand(2 * B),
    }


def two_heads() -> dict[str, Any]:
    return {**operator(), "ref_hidden": randn(B, T, H), "ref_weight": randn(V, H)}


CALLS: dict[str, Call] = {
    "linear_logprobs": Call(prefkern.linear_logprobs, operator),
    "reference.linear_logprobs": Call(reference.linear_logprobs, operator),
    "linear_kl": Call(prefkern.linear_kl, two_heads),
    "reference.linear_kl": Call(reference.linear_kl, two_heads),
    "plan_for": Call(prefkern.plan_for, shape),
    "VocabShard": Call(prefkern.VocabShard, lambda: {"group": GROUP, "start": 0, "size": V}),
    "FusedPreferenceLoss": Call(
        prefkern.FusedPreferenceLoss, lambda: {"objective": objectives.DPO()}
    ),
    "loss": Call(prefkern.FusedPreferenceLoss(objectives.DPO()), batch),
    "loss of madpo": Call(loss_of("madpo"), batch),
    "loss of kto": Call(loss_of("kto"), examples),
    "loss of tdpo1": Call(loss_of("tdpo1"), batch),
    "reference.preference_loss": Call(
        reference.preference_loss, lambda: {"objective": objectives.DPO(), **batch()}
    ),
    "oracle of madpo": Call(oracle_of("madpo"), batch),
    "oracle of kto": Call(oracle_of("kto"), examples),
    "Pairs": Call(Pairs, pairs),
    "Examples": Call(
        Examples,
        lambda: {
            "logps": -torch.rand(B),
            "desirable": torch.ones(B).bool(),
            "ref_logps": -torch.rand(B),
            "mismatched_log_ratios": torch.zeros(3),
        },
    ),
    "Adaptive": Call(objectives.Adaptive, dict),
    **{name: Call(cls, dict) for name, cls in objectives.REGISTRY.items()},
    "WPO": Call(objectives.WPO, lambda: {"objective": objectives.DPO()}),
    "WithNLL": Call(objectives.WithNLL, lambda: {"objective": objectives.DPO()}),
    "build": Call(objectives.build, lambda: {"name": "adadpo"}, any_value=("given",)),
    "options": Call(objectives.options, lambda: {"name": "adadpo"}),
    "an objective": Call(objectives.DPO(), lambda: {"pairs": Pairs(**pairs())}),
    "rdpo's forward": Call(objectives.RDPO(), lambda: {"pairs": Pairs(**pairs(), **lengths())}),
    "an objective without a formula": Call(objectives.Objective(), dict),
    "one of responses without a formula": Call(objectives.UnpairedObjective(), dict),
    "a sorted one without a formula": Call(aot._Sorted(), dict),
    "token_logprobs": Call(prefkern.token_logprobs, text),
    "preference_outputs": Call(prefkern.preference_outputs, step),
    "gradient_balance": Call(diagnostics.gradient_balance, dict),
    "explain_nonfinite": Call(
        diagnostics.explain_nonfinite, lambda: {**batch(), "reward_margins": torch.zeros(B)}
    ),
    "objective_balance": Call(
        diagnostics.objective_balance,
        lambda: {"objective": objectives.DPO(), "pairs": Pairs(**pairs())},
    ),
}

# (change, error, parts of the message); a tuple of calls takes the same rows.
_OPERATOR = [
    ({"hidden": None}, TypeError, "tensor [..., H]", "None"),
    ({"hidden": [[1.0] * 8]}, TypeError, "must be a tensor", "list"),
    ({"hidden": torch.zeros(B, T, H).long()}, TypeError, "must be float32", "int64"),
    ({"hidden": torch.zeros(B, T, H).bool()}, TypeError, "must be float32", "bool"),
    ({"hidden": randn(B, T, H).to(torch.complex64)}, TypeError, "must be float32", "complex64"),
    ({"hidden": randn(B, T, 7)}, ValueError, "H = 8", "[2, 3, 7]"),
    ({"hidden": randn()}, ValueError, "must have shape [..., H]", "[]"),
    ({"hidden": randn(B, T, H).bfloat16()}, TypeError, "one dtype", "bfloat16", "autocast"),
    ({"hidden": randn(B, T, H).to("meta")}, ValueError, "on meta", "plan_for"),
    ({"weight": None}, TypeError, "tensor [V, H]", "None"),
    ({"weight": randn(V)}, ValueError, "[V, H]", "[50]"),
    ({"weight": randn(0, H)}, ValueError, "[V, H]", "[0, 8]"),
    ({"weight": randn(V, H).to_sparse()}, TypeError, "dense", "sparse"),
    ({"weight": randn(V, H).to("meta")}, ValueError, "on meta"),
    ({"bias": randn(H)}, ValueError, "[V] = [50]", "[8]"),
    ({"bias": randn(1)}, ValueError, "[V] = [50]", "[1]"),
    ({"bias": randn(V, 1)}, ValueError, "[V] = [50]", "[50, 1]"),
    ({"bias": randn(V).bfloat16()}, TypeError, "must be torch.float32", "bfloat16"),
    ({"bias": 0.0}, TypeError, "tensor [V] or None", "0.0"),
    ({"bias": randn(V).to("meta")}, ValueError, "on meta", "weight on cpu"),
    ({"labels": None}, TypeError, "int64 tensor", "None"),
    ({"labels": ids(B, T).int()}, TypeError, "must be int64", "int32"),
    ({"labels": ids(B, T).float()}, TypeError, "must be int64", "float32"),
    ({"labels": ids(B, T) > 0}, TypeError, "must be int64", "bool"),
    ({"labels": [[0, 0, 0]] * 2}, TypeError, "int64 tensor", "list"),
    ({"labels": ids(T, B)}, ValueError, "[2, 3]", "[3, 2]"),
    ({"labels": ids(B, 1)}, ValueError, "[2, 3]", "[2, 1]"),
    ({"labels": ids(B, T).to("meta")}, ValueError, "on meta", "hidden on cpu"),
    *(
        ({"labels": torch.tensor([[0, 1, bad], [2, 3, -100]])}, ValueError, "[0, 50)", "-100")
        for bad in LABELS_OUT_OF_RANGE
    ),
    ({"ignore_index": "pad"}, TypeError, "int", "'pad'"),
    ({"ignore_index": None}, TypeError, "int", "None"),
    ({"ignore_index": True}, TypeError, "int", "True"),
    ({"ignore_index": 2**64}, ValueError, "an int64", "18446744073709551616"),
    ({"ignore_index": -(10**400)}, ValueError, "an int64", "-1000"),
    ({"hidden": nested(T, 2, width=H)}, TypeError, "dense", "nested"),
    ({"hidden": nested(T, 2, width=H, layout=torch.jagged)}, TypeError, "dense", "nested"),
    ({"bias": randn(V).to_sparse()}, TypeError, "dense", "sparse"),
    ({"labels": ids(B, T).to_sparse()}, TypeError, "dense", "sparse"),
    ({"labels": nested(T, 2).long()}, TypeError, "dense", "nested"),
    ({"logit_scale": nan}, ValueError, "finite", "nan"),
    ({"logit_scale": None}, TypeError, "a number", "None"),
    ({"logit_scale": "2"}, TypeError, "a number", "'2'"),
    ({"logit_scale": 10**400}, ValueError, "finite"),
    ({"logit_scale": -1e7}, ValueError, "1e+06", "-10000000.0"),
    ({"softcap": 0.0}, ValueError, "> 0", "0.0"),
    ({"softcap": -30.0}, ValueError, "> 0", "-30.0"),
    ({"softcap": True}, TypeError, "a number", "True"),
    ({"softcap": 1e30}, ValueError, "None for no cap", "1e+30"),
    ({"temperature": 0.0}, ValueError, "> 0", "0.0"),
    ({"temperature": -1}, ValueError, "> 0", "-1"),
    ({"temperature": math.inf}, ValueError, "finite", "inf"),
    ({"temperature": 1e-300}, ValueError, "[1e-06, 1e+06]", "1e-300"),
    ({"temperature": torch.ones(1)}, TypeError, "a number", "Tensor"),
    ({"workspace_mb": 0}, ValueError, "> 0", "0"),
    ({"workspace_mb": -5}, ValueError, "> 0", "-5"),
    ({"workspace_mb": "64"}, TypeError, "a number", "'64'"),
    ({"workspace_mb": nan}, ValueError, "finite", "nan"),
    ({"backend": "cuda"}, ValueError, "'triton', 'torch'", "'cuda'"),
    ({"backend": 3}, ValueError, "'triton', 'torch'", "3"),
]
_STATS = [({"return_stats": "no"}, TypeError, "True or False", "'no'")]
_ADAPTER = [
    (
        {"lora_weight": randn(V, 4).double(), "lora_hidden": randn(B, T, 4)},
        TypeError,
        "is float64",
        "cast one to the dtype of the other",
    ),
    ({"lora_hidden": randn(B, T, 4)}, TypeError, "lora_weight must be a tensor [V, R]", "None"),
    ({"lora_weight": randn(V, 4)}, TypeError, "lora_hidden must be a tensor [..., R]", "None"),
    (
        {"lora_hidden": randn(B, T, 3), "lora_weight": randn(V, 4)},
        ValueError,
        "[2, 3, 4]",
        "[2, 3, 3]",
    ),
    ({"lora_weight": randn(V, 0), "lora_hidden": randn(B, T, 0)}, ValueError, "[V, R]", "[50, 0]"),
    (
        {"lora_weight": randn(V, 4).long(), "lora_hidden": randn(B, T, 4)},
        TypeError,
        "must be float32",
        "int64",
    ),
    (
        {"lora_weight": randn(V, 4).to("meta"), "lora_hidden": randn(B, T, 4)},
        ValueError,
        "on meta",
        "hidden on cpu",
    ),
]
_SPARSE_ADAPTER = [
    ({"lora_weight": randn(V, 4).to_sparse(), "lora_hidden": randn(B, T, 4)}, TypeError, "dense"),
    ({"lora_hidden": nested(T, 2, width=4), "lora_weight": randn(V, 4)}, TypeError, "nested"),
]
_SHARD = [
    ({"vocab": 0}, TypeError, "prefkern.VocabShard or None", "0"),
    ({"vocab": (None, 0, V)}, TypeError, "prefkern.VocabShard or None", "tuple"),
]
_VOCAB_SHARD = [
    ({"group": None}, TypeError, "torch.distributed.ProcessGroup", "None"),
    ({"group": "world"}, TypeError, "torch.distributed.ProcessGroup", "'world'"),
    ({"start": 0.0}, TypeError, "an int", "0.0"),
    ({"start": -1}, ValueError, ">= 0", "-1"),
    ({"start": V + 1}, ValueError, "[0, 50]", "51"),
    ({"size": True}, TypeError, "an int", "True"),
    ({"size": 0}, ValueError, ">= 1", "0"),
]
_DOUBLE = [
    ({"hidden": randn(B, T, H).double()}, TypeError, "hidden is torch.float64", "one dtype"),
    ({"weight": randn(V, H).double()}, TypeError, "weight torch.float64", "one dtype"),
]
_REFERENCE_HEAD = [
    ({"ref_hidden": None}, TypeError, "tensor [..., H]", "None"),
    ({"ref_hidden": randn(1, T, H)}, ValueError, "[2, 3, 8]", "[1, 3, 8]"),
    ({"ref_weight": None}, TypeError, "tensor [V, H]", "None"),
    ({"ref_weight": randn(51, H)}, ValueError, "51 vocabulary", "50", "the same entries"),
    ({"ref_bias": randn(1)}, ValueError, "[V] = [50]", "[1]"),
    ({"ref_bias": 3}, TypeError, "tensor [V] or None", "3"),
]
_LOSS = [
    ({"hidden": randn(2 * B, T, 7)}, ValueError, "H = 8", "[4, 3, 7]"),
    ({"weight": None}, TypeError, "tensor [V, H]", "None"),
    ({"bias": randn(1)}, ValueError, "[V] = [50]", "[1]"),
    ({"labels": ids(2 * B, T).float()}, TypeError, "must be int64", "float32"),
    ({"labels": ids(3, T), "hidden": randn(3, T, H)}, ValueError, "[2B, T]", "[3, 3]"),
    ({"labels": ids(0, T), "hidden": randn(0, T, H)}, ValueError, "[2B, T]", "[0, 3]"),
    ({"ref_logps": None}, ValueError, "DPO needs a reference", "ref_hidden"),
    ({"ref_logps": torch.zeros(1)}, ValueError, "[4]", "[1]"),
    ({"ref_logps": torch.zeros(B)}, ValueError, "[4]", "[2]"),
    ({"ref_logps": torch.zeros(2 * B, 1)}, ValueError, "[4]", "[4, 1]"),
    ({"ref_logps": [0.0] * 4}, TypeError, "tensor of shape [4]", "list"),
    ({"ref_logps": torch.zeros(2 * B).bool()}, TypeError, "numbers", "bool"),
    ({"ref_logps": torch.zeros(2 * B) + 0j}, TypeError, "real numbers", "complex64"),
    ({"ref_logps": torch.zeros(2 * B).to_sparse()}, TypeError, "dense", "sparse"),
    ({"reward_margins": torch.zeros(B) + 0j}, TypeError, "real numbers", "complex64"),
    (packed(torch.tensor([0, 3, 6, 9, 12], device="meta")), ValueError, "on meta", "numbers"),
    (packed(torch.tensor([0, 3, 6, 9, 12]).to_sparse()), TypeError, "dense", "sparse"),
    ({"ref_logps": torch.zeros(2 * B, device="meta")}, ValueError, "on meta", "hidden on cpu"),
    ({"ref_hidden": randn(2 * B, T, H), "ref_logps": None}, ValueError, "without ref_weight"),
    ({"ref_weight": randn(V, H), "ref_logps": None}, ValueError, "without ref_hidden"),
    (
        {"ref_hidden": randn(2 * B, T, H), "ref_weight": randn(V, H)},
        ValueError,
        "ref_logps, not both",
    ),
    (
        {"ref_hidden": randn(2 * B, T - 1, H), "ref_weight": randn(V, H), "ref_logps": None},
        ValueError,
        "[4, 3, 8]",
        "[4, 2, 8]",
    ),
    (
        {"ref_weight": randn(V - 1, H), "ref_hidden": randn(2 * B, T, H), "ref_logps": None},
        ValueError,
        "49 rows",
        "every vocabulary entry",
    ),
    ({"ref_bias": randn(V)}, ValueError, "without ref_weight"),
    ({"reward_margins": torch.zeros(2 * B)}, ValueError, "[2]", "[4]"),
    ({"reward_margins": torch.zeros(1)}, ValueError, "[2]", "[1]"),
    ({"reward_margins": [1.0, 2.0]}, TypeError, "tensor of shape [2]", "list"),
    (packed(torch.tensor([0, 3, 2, 6, 12])), ValueError, "rise", "[0, 3, 2"),
    (packed(torch.tensor([0, 3, 6, 9, 11])), ValueError, "rise", "11]"),
    (packed(torch.tensor([1, 3, 6, 9, 12])), ValueError, "rise", "[1, 3"),
    (packed(torch.tensor([0, 6, 9, 12])), ValueError, "[2B + 1]", "[4]"),
    (packed(torch.tensor([0.0, 3, 6, 9, 12])), TypeError, "int32 or int64"),
    (packed([0, 3, 6, 9, 12]), TypeError, "int32 or int64", "[0, 3"),
    ({"cu_seqlens": torch.arange(0, 13, 3)}, ValueError, "labels [M]", "[4, 3]"),
    ({"logit_scale": nan}, ValueError, "finite", "nan"),
    ({"softcap": 0}, ValueError, "> 0", "0"),
    ({"temperature": 0}, ValueError, "> 0", "0"),
    ({"return_stats": 1}, TypeError, "True or False", "1"),
    ({"desirable": torch.ones(4).bool()}, ValueError, "DPO trains on pairs"),
    ({"mismatched_log_ratios": torch.zeros(3)}, ValueError, "DPO trains on pairs"),
]
# Arguments that can be checked only with an objective and a transform.
_OF_A_LOSS = (
    "logit_scale",
    "softcap",
    "temperature",
    "return_stats",
    "desirable",
    "mismatched_log_ratios",
)
_LOSS_ADAPTER = [
    ({"lora_hidden": randn(2 * B, T, 4)}, TypeError, "an adapter has both", "None"),
    ({"lora_weight": randn(V, 4)}, TypeError, "an adapter has both", "None"),
]
_KTO = [
    ({"desirable": None}, ValueError, "KTO needs desirable", "None"),
    ({"desirable": torch.ones(4)}, TypeError, "bool tensor", "float32"),
    ({"desirable": torch.ones(2).bool()}, ValueError, "[4]", "[2]"),
    ({"mismatched_log_ratios": None}, ValueError, "KTO needs mismatched_log_ratios", "None"),
    ({"mismatched_log_ratios": [0.0]}, TypeError, "tensor of shape [M]", "[0.0]"),
    ({"mismatched_log_ratios": torch.zeros(2, 2)}, ValueError, "[M]", "[2, 2]"),
    ({"mismatched_log_ratios": torch.zeros(2).bool()}, TypeError, "numbers", "bool"),
    ({"mismatched_log_ratios": torch.zeros(2) + 0j}, TypeError, "real numbers", "complex64"),
    ({"mismatched_log_ratios": torch.zeros(2).to_sparse()}, TypeError, "dense", "sparse"),
]
_MARGINS = [({"reward_margins": None}, ValueError, "MADPO needs reward_margins", "None")]


def _positive(name: str) -> list[Any]:
    """Bad values of a hyper-parameter that is a positive number."""
    return [
        ({name: value}, ValueError, "finite number > 0", repr(value))
        for value in (True, "0.1", None, nan, math.inf, 0, -0.1, 1e7, 1e-45)
    ] + [({name: 10**400}, ValueError, "finite number > 0", "1000")]


def _not_negative(name: str) -> list[Any]:
    return [
        ({name: value}, ValueError, "finite number >= 0", repr(value))
        for value in (True, "0.1", None, nan, -0.1)
    ]


def _below(name: str, end: str) -> list[Any]:
    return [
        ({name: value}, ValueError, f"[0, {end})", repr(value))
        for value in (True, "0.1", None, nan, -0.1, 1.0)
    ]


def _number(name: str) -> list[Any]:
    return [
        ({name: value}, ValueError, "finite number", repr(value))
        for value in (True, "0.1", None, nan)
    ]


def _bool(name: str) -> list[Any]:
    return [({name: value}, TypeError, "True or False", repr(value)) for value in (1, "yes", None)]


_ADAPTIVE = [
    ({"adaptive": True}, TypeError, "Adaptive or None", "True"),
    ({"adaptive": {"clip": 2.0}}, TypeError, "Adaptive or None", "'clip'"),
]
_DIVERGENCE = [
    ({"f_divergence_type": "kl"}, ValueError, "'reverse_kl', 'forward_kl'", "'kl'"),
    ({"f_alpha_divergence_coef": 0.5}, ValueError, "f_divergence_type='alpha_divergence'", "0.5"),
    *(
        (
            {"f_alpha_divergence_coef": value, "f_divergence_type": "alpha_divergence"},
            ValueError,
            "finite number",
            repr(value),
        )
        for value in (True, "0.1", nan)
    ),
]
_INNER = [
    ({"objective": None}, TypeError, "pairwise objective", "None"),
    ({"objective": objectives.KTO()}, TypeError, "pairwise objective", "KTO"),
]
_OBJECTIVES: dict[str, list[Any]] = {
    "dpo": [*_positive("beta"), *_below("label_smoothing", "0.5"), *_ADAPTIVE, *_DIVERGENCE],
    "lndpo": [*_positive("beta"), *_ADAPTIVE, *_DIVERGENCE],
    "robust": [*_positive("beta"), *_below("label_smoothing", "0.5"), *_ADAPTIVE, *_DIVERGENCE],
    "hinge": [*_positive("beta"), *_ADAPTIVE, *_DIVERGENCE],
    "ipo": [*_positive("tau"), *_bool("length_normalized"), *_ADAPTIVE, *_DIVERGENCE],
    "rdpo": [*_positive("beta"), *_number("alpha"), *_ADAPTIVE],
    "exo": [
        *_positive("beta"),
        *(
            ({"label_smoothing": value}, ValueError, "(0, 0.5)", repr(value))
            for value in (True, "0.1", None, nan, 0, 0.5)
        ),
        *_ADAPTIVE,
        *_DIVERGENCE,
    ],
    "discopop": [*_positive("beta"), *_positive("tau"), *_ADAPTIVE, *_DIVERGENCE],
    **{name: [*_positive("beta"), *_ADAPTIVE] for name in ("nca", "sppo", "apozero", "apodown")},
    "cpo": [
        *_positive("beta"),
        *_not_negative("nll_weight"),
        *_below("label_smoothing", "0.5"),
        *_ADAPTIVE,
    ],
    "orpo": [*_positive("beta"), *_not_negative("nll_weight"), *_ADAPTIVE],
    "simpo": [
        *_positive("beta"),
        *_number("gamma"),
        *_below("label_smoothing", "0.5"),
        *_ADAPTIVE,
    ],
    "sft": _bool("token_mean"),
    "tpo": [
        *_positive("beta"),
        ({"loss_type": "simpo"}, ValueError, "'sigmoid', 'hinge', 'ipo', 'tpo-l'", "'simpo'"),
        ({"loss_type": None}, ValueError, "'sigmoid', 'hinge', 'ipo', 'tpo-l'", "None"),
        *_below("label_smoothing", "0.5"),
        *_not_negative("tpo_alpha"),
        ({"tpo_l_gamma": 0.5}, ValueError, "loss_type='tpo-l'", "0.5 with 'sigmoid'"),
        ({"tpo_l_gamma": nan, "loss_type": "tpo-l"}, ValueError, "finite number", "nan"),
        *_bool("token_mean"),
        *_ADAPTIVE,
    ],
    "alphadpo": [
        *_positive("beta"),
        *_number("gamma"),
        *_not_negative("alpha"),
        *_bool("length_normalized"),
        ({"implicit_reference": "both"}, ValueError, "'ratio', 'policy'", "'both'"),
        *_below("momentum", "1"),
        *_bool("scale_by_beta"),
        *_bool("normalize"),
        *_bool("stop_gradient"),
    ],
    "madpo": [
        *_positive("beta"),
        *_positive("tau"),
        *(({"c_max": value}, ValueError, "number > 1", repr(value)) for value in (1.0, nan, True)),
        *(
            ({"c_min": value}, ValueError, "None or in [0, 1)", repr(value))
            for value in (1, -1, "0")
        ),
        *_positive("lam"),
        ({"mode": "half"}, ValueError, "'full', 'amplify', 'regularize'", "'half'"),
    ],
    "omnidpo": [
        *_positive("beta"),
        *_not_negative("eta"),
        *_number("tau"),
        *_not_negative("gamma"),
        *_not_negative("nll_weight"),
        *_ADAPTIVE,
    ],
    "betadpo": [
        *_positive("beta"),
        *_not_negative("m"),
        *(({"keep": value}, ValueError, "(0, 1]", repr(value)) for value in (0, 1.1, True, nan)),
        *_below("momentum", "1"),
        *_positive("beta_min"),
    ],
    "bco": [
        *_positive("beta"),
        *_bool("reward_shift"),
        *(
            ({"momentum": value}, ValueError, "in [0, 1]", repr(value))
            for value in (-0.1, 1.5, True, nan)
        ),
        *_ADAPTIVE,
    ],
    "aot": [*_positive("beta"), *_below("label_smoothing", "0.5"), *_ADAPTIVE],
    "aotunpaired": [*_positive("beta"), *_below("label_smoothing", "0.5"), *_ADAPTIVE],
    "tdpo1": _positive("beta"),
    "tdpo2": [*_positive("beta"), *_not_negative("alpha")],
    "kto": [
        *_positive("beta"),
        *_not_negative("desirable_weight"),
        *_not_negative("undesirable_weight"),
        ({"desirable_weight": 0, "undesirable_weight": 0}, ValueError, "both 0"),
    ],
    "WPO": [*_INNER, *_bool("alignment")],
    "WithNLL": [*_INNER, *_positive("rpo_alpha")],
    "Adaptive": [
        ({"space": "log"}, ValueError, '"ratio" or "policy"', "'log'"),
        *(
            ({"exponent": value}, ValueError, '"length", a number, or a pair', repr(value))
            for value in ("len", True, None, (1.0,), (1.0, "2"), nan, np.array([1.0, 2.0]))
        ),
        *(
            ({"exponent": value}, ValueError, "within +-1e+06", "1000")
            for value in (10**400, (1.0, -(10**400)))
        ),
        *_positive("clip")[:2],
        *_positive("k"),
    ],
    "build": [
        ({"name": 3}, TypeError, "must be a string", "3"),
        ({"name": "adadpoo"}, ValueError, "did you mean 'adadpo'?", "known: dpo"),
        ({"bta": 0.1}, TypeError, "did you mean 'beta'?", "it takes beta"),
        ({"gamma": 0.1}, TypeError, "'adadpo' has no option", "it takes beta"),
        ({"use_weighting": "yes"}, TypeError, "True or False", "'yes'"),
        ({"rpo_alpha": 0}, ValueError, "> 0", "0"),
        ({"adaptive": {"clp": 2}, "name": "dpo"}, TypeError, "'clp' (did you mean 'clip'?)"),
    ],
    "options": [({"name": "adadpoo"}, ValueError, "did you mean 'adadpo'?")],
}


def _vectors(names: tuple[str, ...], size: str, first: str) -> list[Any]:
    rows: list[Any] = []
    for name in names:
        may_be_integers = name.endswith("lengths") or name == "reward_margins"
        rows += [
            ({name: [1.0, 2.0]}, TypeError, f"tensor of shape [{size}]", "[1.0, 2.0]"),
            ({name: torch.zeros(B).bool()}, TypeError, "floating-point", "bool"),
            ({name: torch.zeros(B) + 0j}, TypeError, "floating-point", "complex64"),
            ({name: torch.zeros(B).to_sparse()}, TypeError, "dense", f"[{size}]"),
        ]
        if not may_be_integers:
            rows += [({name: torch.zeros(B).long()}, TypeError, "floating-point", "int64")]
        if name != first:
            rows += [
                ({name: torch.zeros(1)}, ValueError, f"[{size}] of {first}", "[2], got [1]"),
                ({name: torch.zeros(B, 1)}, ValueError, f"[{size}] of {first}", "[2, 1]"),
                ({name: torch.zeros(B, device="meta")}, ValueError, "on meta", first),
            ]
    return rows


_PAIRS = _vectors(tuple(Pairs.__dataclass_fields__), "B", "chosen_logps")
_EXAMPLES = [
    *_vectors(("logps", "ref_logps"), "S", "logps"),
    ({"desirable": torch.ones(B)}, TypeError, "bool tensor", "float32"),
    ({"desirable": torch.ones(1).bool()}, ValueError, "[S] of logps", "[1]"),
    ({"mismatched_log_ratios": torch.zeros(2, 2)}, TypeError, "[M]"),
    ({"mismatched_log_ratios": torch.zeros(2).bool()}, TypeError, "[M]"),
    ({"mismatched_log_ratios": None}, TypeError, "[M]", "None"),
    ({"mismatched_log_ratios": torch.zeros(2) + 0j}, TypeError, "[M]", "j"),
    ({"mismatched_log_ratios": torch.zeros(2).to_sparse()}, TypeError, "[M]", "sparse"),
]
_PLAN = [
    *(
        ({name: value}, error, says, repr(value))
        for name in ("tokens", "hidden_size", "vocab_size")
        for value, error, says in (
            (0, ValueError, "> 0"),
            (-1, ValueError, "> 0"),
            (1.5, TypeError, "an int"),
            (True, TypeError, "an int"),
            (None, TypeError, "an int"),
        )
    ),
    ({"dtype": torch.int64}, TypeError, "float32, bfloat16, float16 or float64", "int64"),
    ({"dtype": "bfloat16"}, TypeError, "float32, bfloat16, float16 or float64", "'bfloat16'"),
    ({"dtype": torch.float64, "backend": "triton"}, TypeError, "is float64", "backend='torch'"),
    ({"device": "gpu"}, ValueError, "a torch.device or its name", "'gpu'"),
    ({"device": 3}, TypeError, "a torch.device or its name", "3"),
    *(
        ({name: value}, TypeError, "True or False", repr(value))
        for name in ("trains_hidden", "trains_head", "softcap", "return_stats")
        for value in ("no", None, 30.0)
    ),
    *(({"lora_rank": v}, ValueError, "an int >= 0", repr(v)) for v in (-1, 1.0, True, None)),
    *(row for row in _OPERATOR if next(iter(row[0])) in ("workspace_mb", "backend")),
]
_TEXT = [
    ({"model": None}, ValueError, "NoneType has no output head", "causal LM"),
    ({"model": "gpt2"}, ValueError, "str has no output head", "causal LM"),
    ({"model": torch.nn.Linear(2, 2)}, ValueError, "Linear has no output head"),
    ({"input_ids": None}, TypeError, "tensor [B, T]", "None"),
    ({"input_ids": [[1, 2]]}, TypeError, "tensor [B, T]", "[[1, 2]]"),
    ({"input_ids": TEXT.float()}, TypeError, "int64 or int32", "float32"),
    ({"input_ids": TEXT[0]}, ValueError, "[B, T]", "[3]"),
    ({"input_ids": TEXT[:, :0]}, ValueError, "at least 1", "[4, 0]"),
    ({"input_ids": TEXT + 97}, ValueError, "[0, 97)", "tokenizer"),
    ({"input_ids": TEXT - 97}, ValueError, "[0, 97)", "got -"),
    ({"attention_mask": [[1] * T]}, TypeError, "tensor [B, T]", "[[1, 1, 1]]"),
    ({"attention_mask": torch.ones(1, T).long()}, ValueError, "[4, 3]", "[1, 3]"),
    ({"attention_mask": torch.zeros(2 * B, T)}, TypeError, "bool or integers", "float32"),
    ({"attention_mask": torch.full((2 * B, T), 2)}, ValueError, "1 for tokens", "2"),
    ({"attention_mask": torch.full((2 * B, T), -1)}, ValueError, "1 for tokens", "-1"),
    ({"labels": [[1] * T]}, TypeError, "tensor [B, T]"),
    ({"labels": TEXT[:, 1:]}, ValueError, "[4, 3]", "[4, 2]"),
    ({"labels": TEXT.float()}, TypeError, "int64", "float32"),
    ({"labels": TEXT > 0}, TypeError, "int64", "bool"),
    ({"labels": TEXT + 97}, ValueError, "[0, 97)"),
    ({"cu_seqlens": torch.tensor([0, 3]), "input_ids": TEXT}, ValueError, "one row [1, M]"),
    *(
        ({"cu_seqlens": torch.tensor(bad), "input_ids": TEXT[:1]}, ValueError, "rise", str(bad))
        for bad in ([0, 2, 1, 3], [0, 2], [1, 3], [0, 0, 3])
    ),
    ({"cu_seqlens": torch.tensor([0.0, 3.0]), "input_ids": TEXT[:1]}, TypeError, "int32 or int64"),
    ({"cu_seqlens": [0, 3], "input_ids": TEXT[:1]}, TypeError, "int32 or int64", "[0, 3]"),
    ({"cu_seqlens": torch.tensor([[0, 3]]), "input_ids": TEXT[:1]}, ValueError, "[S + 1]"),
    (
        {"attention_mask": torch.ones(1, T).long(), "cu_seqlens": torch.tensor([0, 3]),
         "input_ids": TEXT[:1]},
        ValueError,
        "takes only input_ids and cu_seqlens",
    ),
    ({"temperature": -1}, ValueError, "> 0", "-1"),
    ({"temperature": True}, TypeError, "a number", "True"),
    ({"workspace_mb": -1}, ValueError, "> 0", "-1"),
    ({"backend": "cuda"}, ValueError, "'triton', 'torch'", "'cuda'"),
    ({"temprature": 2.0}, TypeError, "LlamaForCausalLM.forward", "did you mean 'temperature'?"),
    ({"logits_to_keep": 1}, ValueError, "1 positions for 3 tokens"),
]  # fmt: skip
_STEP = [
    ({"model": None}, ValueError, "NoneType has no output head"),
    ({"batch": None}, TypeError, "a mapping", "None"),
    ({"batch": {"input_ids": TEXT}}, ValueError, "must have labels", "input_ids"),
    ({"batch": text_batch(labels=TEXT[:, 1:])}, ValueError, "labels", "[4, 3]", "[4, 2]"),
    ({"batch": text_batch(labels=TEXT.float())}, TypeError, "labels", "int64", "float32"),
    ({"batch": text_batch(input_ids=TEXT + 97)}, ValueError, "input_ids", "[0, 97)"),
    (
        {"batch": text_batch(attention_mask=torch.ones(2 * B, 1).long())},
        ValueError,
        "attention_mask",
        "[4, 1]",
    ),
    ({"loss_fn": None}, TypeError, "FusedPreferenceLoss", "None"),
    ({"loss_fn": objectives.DPO()}, TypeError, "FusedPreferenceLoss", "DPO"),
    (
        {"loss_fn": prefkern.FusedPreferenceLoss(objectives.DPO(), ignore_index=-1)},
        ValueError,
        "ignore_index=-100",
        "got -1",
    ),
    ({"router_loss": 3}, TypeError, "a RouterLoss or None", "3"),
    ({"ref_logps": None}, ValueError, "DPO needs a reference"),
    ({"ref_logps": torch.zeros(1)}, ValueError, "[4]", "[1]"),
    ({"bogus": 1}, TypeError, "unexpected keyword"),
]
_TABLE: list[tuple[tuple[str, ...], list[Any]]] = [
    (
        ("linear_logprobs", "reference.linear_logprobs"),
        [*_OPERATOR, *_STATS, *_ADAPTER, *_SPARSE_ADAPTER],
    ),
    (
        ("linear_kl", "reference.linear_kl"),
        [*_OPERATOR, *_REFERENCE_HEAD, *_ADAPTER, *_SPARSE_ADAPTER],
    ),
    (("linear_logprobs", "linear_kl"), _DOUBLE),
    (("linear_logprobs", "linear_kl", "loss"), _SHARD),
    (("VocabShard",), _VOCAB_SHARD),
    (("plan_for",), _PLAN),
    (
        ("FusedPreferenceLoss",),
        [
            ({"objective": None}, TypeError, "prefkern.objectives", "None"),
            ({"objective": "dpo"}, TypeError, "build(", "'dpo'"),
            ({"objective": objectives.DPO}, TypeError, "prefkern.objectives", "class"),
            *(row for row in _OPERATOR if next(iter(row[0])) in ("ignore_index", "workspace_mb")),
            ({"backend": "cuda"}, ValueError, "'triton', 'torch'", "'cuda'"),
            ({"on_nonfinite": "stop"}, ValueError, "'raise', 'warn'", "'stop'"),
            ({"sequence_group": 2}, TypeError, "torch.distributed.ProcessGroup", "2"),
        ],
    ),
    (
        ("FusedPreferenceLoss", "reference.preference_loss"),
        [
            ({"ld_alpha": 1.5}, ValueError, "in [0, 1]", "1.5"),
            ({"ld_alpha": nan}, ValueError, "finite", "nan"),
            ({"ld_alpha": True}, TypeError, "a number", "True"),
            ({"ld_alpha": 0.5, "objective": objectives.KTO()}, ValueError, "KTO has no pairs"),
            ({"ld_alpha": 0.5, "objective": objectives.TDPO1()}, ValueError, "TDPO1's divergences"),
        ],
    ),
    (("loss", "reference.preference_loss"), [*_LOSS, *_LOSS_ADAPTER]),
    (
        ("reference.preference_loss",),
        [
            ({"objective": None}, TypeError, "prefkern.objectives", "None"),
            ({"ignore_index": "pad"}, TypeError, "int", "'pad'"),
        ],
    ),
    (("loss of madpo", "oracle of madpo"), _MARGINS),
    (("loss of kto", "oracle of kto"), _KTO),
    (
        ("loss of kto",),
        [
            ({"labels": ids(4), "hidden": randn(4, H)}, ValueError, "[S, T]", "[4]"),
            (
                {**packed(torch.tensor([12])), "desirable": torch.ones(0).bool()},
                ValueError,
                "[S + 1]",
            ),
        ],
    ),
    (
        ("loss of tdpo1",),
        [
            (
                {"ref_logps": torch.zeros(4)},
                ValueError,
                "TDPO1 needs the reference's distributions",
            ),
            (
                {"ref_weight": randn(V + 1, H), "ref_hidden": randn(4, T, H), "ref_logps": None},
                ValueError,
                "the same entries",
            ),
        ],
    ),
    (("Pairs",), _PAIRS),
    (("Examples",), _EXAMPLES),
    *(((name,), rows) for name, rows in _OBJECTIVES.items()),
    (
        ("an objective",),
        [
            ({"pairs": None}, TypeError, "must be Pairs", "None"),
            ({"pairs": (1, 2)}, TypeError, "must be Pairs", "(1, 2)"),
            (
                {"pairs": Pairs(torch.zeros(2), torch.zeros(2))},
                ValueError,
                "needs ref_chosen_logps",
            ),
        ],
    ),
    (
        ("rdpo's forward",),
        [({"pairs": Pairs(**pairs())}, ValueError, "needs chosen_lengths and rejected_lengths")],
    ),
    (
        ("an objective without a formula",),
        [({"pairs": None}, NotImplementedError, "Objective does not define forward(pairs)")],
    ),
    (
        ("one of responses without a formula",),
        [({"examples": None}, NotImplementedError, "does not define forward(examples)")],
    ),
    (
        ("a sorted one without a formula",),
        [
            (
                {"pairs": Pairs(**pairs())},
                NotImplementedError,
                "_Sorted does not define _terms(pairs)",
            )
        ],
    ),
    (("token_logprobs",), _TEXT),
    (("preference_outputs",), _STEP),
    (("gradient_balance",), [({"out": None}, TypeError, "PreferenceOutput", "NoneType")]),
    (
        ("explain_nonfinite",),
        [
            *(
                row
                for row in _LOSS
                if next(iter(row[0])) not in _OF_A_LOSS
                and not {"DPO needs a reference", "ref_logps, not both"} & {*row[2:]}
            ),
            *_LOSS_ADAPTER,
            ({"labels": torch.full((2 * B, T), V), "bias": randn(V)}, ValueError, "[0, 50)", "50"),
            (packed(torch.tensor([0, 3])), ValueError, "[2B + 1]", "[2]"),
            ({"mismatched_log_ratios": [0.0]}, TypeError, "tensor of shape [M]", "[0.0]"),
            ({"mismatched_log_ratios": torch.zeros(2, 2)}, ValueError, "[M]", "[2, 2]"),
            ({"ignore_index": "pad"}, TypeError, "int", "'pad'"),
            ({"paired": 1}, TypeError, "True or False", "1"),
            ({"gold": 1}, TypeError, "True or False", "1"),
            ({"gold": True, "paired": False}, ValueError, "of pairs", "paired=False"),
        ],
    ),
    (
        ("objective_balance",),
        [
            ({"objective": None}, TypeError, "pairwise objective", "None"),
            ({"pairs": None}, TypeError, "must be Pairs", "None"),
        ],
    ),
]

# Arguments that their error messages call by another name.
SAID_OTHERWISE = {
    ("token_logprobs", "model"),  # the class of what was given
    ("preference_outputs", "model"),
    ("preference_outputs", "batch"),  # the tensor in it
    ("build", "name"),  # "the name of an objective", "unknown objective"
    ("options", "name"),
    ("an objective", "pairs"),
    ("rdpo's forward", "pairs"),
}

ROWS = [
    Row(call, change, error, tuple(says))
    for calls, rows in _TABLE
    for call in calls
    for change, error, *says in rows
]
