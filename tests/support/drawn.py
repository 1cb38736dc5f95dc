"""Problems drawn by hypothesis: the tensors of a call, their memory layouts, masks and options.

Sizes go from 1 to some thousands, odd and even, on both sides of every tile size. Dtypes, masks,
transforms, workspaces and the set of trained tensors also vary. Memory layouts have NaN around the
elements, so that a read outside of them shows in the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import prefkern
from prefkern.ops.operands import operands_of
from support.error_bounds import TokenBounds, token_bounds

# Interpreted programs are slow, so the triton backend gets smaller problems.
MOST = {"torch": 2**22, "triton": 2**16}  # N H V
LARGEST = {"torch": (3000, 300, 3000), "triton": (34, 33, 300)}  # N, H, V
LAYOUTS = ("contiguous", "transposed", "sliced", "stepped", "expanded")
MASKS = ("all", "some", "rows", "one", "none")
HALVES = (torch.bfloat16, torch.float16)
LEAVES = ("hidden", "weight", "bias", "lora_hidden", "lora_weight")


@dataclass
class Problem:
    """The tensors and the options of a call."""

    tensors: dict[str, Tensor]
    labels: Tensor
    options: dict[str, Any]
    workspace_mb: float
    backend: str
    trains: tuple[str, ...]
    grad: Tensor  # of the log-probs, as labels

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The text that hypothesis prints for a failure: shapes and options, not the numbers."""
        shapes = {k: (tuple(x.shape), x.stride(), x.dtype) for k, x in self.tensors.items()}
        scored = f"{int(self.scored.sum())} of {self.labels.numel()} tokens"
        setup = f"{self.workspace_mb} MiB, {self.backend}, trains {self.trains}"
        printer.text(f"{scored}, {shapes}, {self.options}, {setup}")

    @property
    def scored(self) -> Tensor:
        return self.labels != self.options["ignore_index"]

    def transform(self) -> dict[str, Any]:
        return {k: v for k, v in self.options.items() if k != "ignore_index"}

    def doubled(self) -> dict[str, Tensor]:
        """Float64 leaves with the same numbers as the call's tensors."""
        return {
            name: x.detach().double().contiguous().requires_grad_(name in self.trains)
            for name, x in self.tensors.items()
        }

    def bounds(
        self, tensors: dict[str, Tensor] | None = None, unit: float = 2.0**-24
    ) -> TokenBounds:
        """The error bounds of the scored tokens."""
        x = {k: v.detach() for k, v in (tensors or self.tensors).items()}
        scored = self.scored.reshape(-1)
        lora = {}
        if "lora_hidden" in x:
            lora = {"lora_hidden": flat(x["lora_hidden"])[scored], "lora_weight": x["lora_weight"]}
        return token_bounds(
            flat(x["hidden"])[scored],
            x["weight"],
            self.labels.reshape(-1)[scored],
            x.get("bias"),
            **lora,
            **self.transform(),
            unit=unit,
        )


@st.composite
def sizes(draw, largest: int) -> int:
    """A size from 1 to `largest`, most often a power of two or next to one."""
    near = st.integers(0, int(math.log2(largest))).flatmap(
        lambda e: st.integers(max(2**e - 1, 1), min(2**e + 1, largest))
    )
    return draw(st.one_of(near, st.integers(1, largest)))


@st.composite
def problems(
    draw, backend: str, dtypes=(torch.float32, *HALVES), layouts=LAYOUTS, largest=None
) -> Problem:
    most, largest = MOST[backend], largest or LARGEST[backend]
    V = draw(sizes(largest[2]))
    N = draw(sizes(min(largest[0], most // V)))
    H = draw(sizes(min(largest[1], most // (N * V))))
    rows = draw(st.sampled_from([r for r in (1, 2, 3, 6) if N % r == 0]))
    rank = draw(st.sampled_from([0, 0, 1, 5]))
    spread = draw(st.sampled_from([0.3, 4.0, 25.0]))
    dtype = draw(st.sampled_from(dtypes))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shape = (rows, N // rows)
    tensors = {"hidden": torch.randn(*shape, H) * spread / H**0.5, "weight": torch.randn(V, H)}
    if draw(st.booleans()):
        tensors["bias"] = torch.randn(V) * draw(st.sampled_from([0.5, 5.0]))
    if rank:
        tensors["lora_hidden"] = torch.randn(*shape, rank)
        tensors["lora_weight"] = torch.randn(V, rank)
    tensors = {
        name: laid_out(x.to(dtype), draw(st.sampled_from(layouts)), -1 if "weight" in name else 0)
        for name, x in tensors.items()
    }
    options = {
        "ignore_index": draw(st.sampled_from([-100, -1, V, 0])),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, -0.25, 1.3])),
        "softcap": draw(st.sampled_from([None, None, 2.0, 30.0])),
        "temperature": draw(st.sampled_from([1.0, 1.0, 0.7, 3.0])),
    }
    labels = _labels(draw, tensors, V, options["ignore_index"])
    labels = laid_out(labels, draw(st.sampled_from(layouts)))
    names = [name for name in LEAVES if name in tensors]
    trains = draw(
        st.one_of(st.just({"hidden"}), st.just(set(names)), st.sets(st.sampled_from(names)))
    )
    for name, x in tensors.items():
        x.requires_grad_(name in trains)
    # From a small part of the logits to more than all of them.
    workspace_mb = 4 * N * V / 2**20 * 2.0 ** draw(st.integers(-6, 3))
    return Problem(
        tensors, labels, options, workspace_mb, backend, tuple(sorted(trains)), torch.randn(shape)
    )


def _labels(draw, tensors: dict[str, Tensor], V: int, ignore_index: int) -> Tensor:
    """Labels, about half of them the likeliest entry; masked in one of several ways."""
    hidden = tensors["hidden"]
    labels = torch.randint(V, hidden.shape[:-1])
    likely = (hidden.float() @ tensors["weight"].float().T).argmax(-1)
    labels = torch.where(torch.rand(labels.shape) < 0.5, likely, labels)
    mask = draw(st.sampled_from([*MASKS, "some", "some", "rows"]))
    scored = torch.ones_like(labels, dtype=torch.bool)
    if mask == "some":
        scored = torch.rand(labels.shape) < 0.6
    elif mask in ("one", "none"):
        scored &= False
        if mask == "one":
            scored.view(-1)[torch.randint(labels.numel(), ())] = True
    elif mask == "rows":
        scored[0] = False
    return torch.where(scored, labels, ignore_index)


def laid_out(x: Tensor, layout: str, dim: int = 0) -> Tensor:
    """The same numbers in another memory layout, with values around them that must not be read.

    The layout "expanded" repeats the first slice along a dimension. For a weight that dimension is
    not the vocabulary: a sum of V equal numbers has an error of V u, not sqrt(V) u.
    """
    if layout == "expanded":
        return x.narrow(dim, 0, 1).clone().expand(x.shape)
    wrong = -7 if x.dtype == torch.int64 else math.nan
    if layout == "sliced":
        room = x.new_full([n + 3 for n in x.shape], wrong)
        view = room[tuple(slice(1, n + 1) for n in x.shape)]
    elif layout == "stepped":
        room = x.new_full([*x.shape[:-1], 2 * x.shape[-1]], wrong)
        view = room[..., ::2]
    elif layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    else:
        return x.contiguous()
    return view.copy_(x)


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def run(problem: Problem, **changes: Any) -> tuple[Any, dict[str, Tensor]]:
    """Log-probs (or statistics) and gradients of the call, with `changes` to its arguments."""
    tensors = changes.pop("tensors", problem.tensors)
    labels = changes.pop("labels", problem.labels)
    grad = changes.pop("grad", problem.grad)
    options = {
        "workspace_mb": problem.workspace_mb,
        "backend": problem.backend,
        **problem.options,
        **changes,
    }
    out = prefkern.linear_logprobs(labels=labels, **tensors, **options)
    logps = out if isinstance(out, Tensor) else out.logps
    leaves = {name: tensors[name] for name in problem.trains}
    if not leaves:
        return out, {}
    found = torch.autograd.grad((logps * grad).sum(), list(leaves.values()))
    return out, dict(zip(leaves, found, strict=True))


def gradient_bounds(problem: Problem, bounds: TokenBounds, grad: Tensor) -> dict[str, Tensor]:
    """Bounds for the gradients of the trained tensors; for states, at the scored tokens.

    Where products have operands in a half dtype, four of their roundings are relative to the sum of
    absolute values: u when it is kept and when it gets its unit, a scaled row of hidden, and on a
    CPU the product's result.
    """
    operand = operands_of(problem.tensors["hidden"]).of_gradients
    if operand in HALVES:
        bounds = replace(bounds, relative=bounds.relative + 2 * torch.finfo(operand).eps)
    grad = grad.reshape(-1)[problem.scored.reshape(-1)]

    def states(name: str) -> Tensor:
        return flat(problem.tensors[name].detach())[problem.scored.reshape(-1)]

    makes = {
        "hidden": lambda: bounds.of_states(grad, problem.tensors["weight"].detach()),
        "weight": lambda: bounds.of_entries(grad, states("hidden")),
        "bias": lambda: bounds.of_entries(grad, torch.ones(len(grad), 1))[:, 0],
        "lora_hidden": lambda: bounds.of_states(grad, problem.tensors["lora_weight"].detach()),
        "lora_weight": lambda: bounds.of_entries(grad, states("lora_hidden")),
    }
    return {name: makes[name]() for name in problem.trains}


def assert_within(mine: Tensor, true: Tensor, bound: Tensor, name: str) -> None:
    """Assert the bound for each element, plus half an ulp for a gradient stored in a half dtype.

    What is beyond the largest float16 number is inf, with its sign.
    """
    if mine.dtype in HALVES:
        info = torch.finfo(mine.dtype)
        bound = bound * (1 + info.eps) + info.eps / 2 * true.abs() + info.tiny * info.eps
        bound = bound.expand_as(true)
        is_beyond, may_be = (true.abs() + sign * bound > info.max for sign in (-1, 1))
        assert torch.equal(mine[is_beyond].double(), true[is_beyond].sign() * torch.inf), name
        mine, true, bound = (x[~may_be] for x in (mine, true, bound))
    assert mine.isfinite().all(), name
    error = (mine.double() - true).abs()
    worst = (error / bound).max().item() if error.numel() else 0.0
    assert worst <= 1, f"{name}: {worst:.2f} of the bound"
