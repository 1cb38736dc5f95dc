"""A device without float64, as Apple's MPS: what runs there, and that sums are as exact as elsewhere.

Two stand-ins. A CPU that is said to lack float64 shows that the numbers do not change. The meta
device is another device than the CPU, and shows that no tensor of float64 is made there, and that
each operator of torch that runs there is one that torch has for MPS.
"""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from unittest import mock

import pytest
import torch
import torchgen
import yaml
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import prefkern
from prefkern import devices
from prefkern.objectives import Mixture, Objective, build, names
from prefkern.ops import autograd, checks, operands, parts, sequences

B, T, H, V = 3, 8, 16, 40
META = torch.device("meta")
# Ten times faster, where it is built in.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Objectives with a step of their own in float64, and a way of summing each.
OBJECTIVES = {name: lambda name=name: build(name) for name in names()} | {
    "betadpo, a draw": lambda: build("betadpo", keep=0.5),
    "dpo, WPO's weights": lambda: build("dpo", use_weighting=True),
    "mixture": lambda: Mixture([build("dpo"), build("bco")], [0.5, 0.5]),
}


def inputs(objective, device):
    """The arguments of a loss, with a reference's head or without one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    is_paired = isinstance(objective, Objective)
    labels = torch.randint(V, (2 * B, T), generator=generator)
    labels[:, :2] = -100
    given = {
        "hidden": normal(2 * B, T, H).requires_grad_(),
        "weight": normal(V, H).requires_grad_(),
        "labels": labels.to(device),
    }
    if objective.needs_reference:
        given |= {"ref_hidden": normal(2 * B, T, H), "ref_weight": normal(V, H)}
    if is_paired and objective.needs_reward_margins:
        given["reward_margins"] = normal(B)
    if not is_paired:
        desirable = torch.arange(2 * B) % 2 == 0
        given |= {"desirable": desirable.to(device), "mismatched_log_ratios": normal(4)}
    return given


def run(make, device, steps=2, **options):
    """Losses and gradients of some steps in training, so that statistics have moved."""
    torch.manual_seed(0)
    objective = make()
    loss_fn = prefkern.FusedPreferenceLoss(objective, backend="torch", **options)
    found = []
    for _ in range(steps):
        given = inputs(objective, device)
        out = loss_fn(**given)
        leaves = (given["hidden"], given["weight"])
        found += [out.losses, *torch.autograd.grad(out.loss, leaves)]
        found += (getattr(out, "metrics", None) or {}).values()
    return loss_fn, found


@pytest.fixture
def without_float64(monkeypatch):
    def lacks(kind: str) -> None:
        monkeypatch.setattr(devices, "_WITHOUT_FLOAT64", (kind,))

    return lacks


@pytest.mark.parametrize("name", OBJECTIVES)
def test_numbers_do_not_change(name, without_float64):
    _, there = run(OBJECTIVES[name], "cpu")
    without_float64("cpu")
    _, here = run(OBJECTIVES[name], "cpu")
    assert len(there) >= 6
    for mine, true in zip(here, there, strict=True):
        assert torch.equal(mine, true) and mine.dtype == true.dtype


class Seen(TorchDispatchMode):
    """Tensors of float64 on a device, and the operators that run there."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.operators = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        name = func.overloadpacket.__name__
        if name == "_to_copy" and given[0].device == META and "device" in kwargs:
            kind = torch.device(kwargs["device"]).type
            if kind == "cpu":
                # There is nothing to copy.
                return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if any(x.device == META for x in [*given, *made]):
            self.operators.add(func.name())
            self.wide += [
                func.name() for x in made if x.device == META and x.dtype == torch.float64
            ]
        return out


@contextlib.contextmanager
def pretended(scored: int):
    """Meta tensors in place of MPS: what reads their numbers gets some."""

    def select(labels, ignore_index, vocab_size, bounds=None, checks_bounds=True):
        facts = [scored, 0, V - 1, 0, 0, labels.shape[0]]
        with mock.patch.object(Tensor, "tolist", lambda x: facts[: len(x)]):
            return original(labels, ignore_index, vocab_size, bounds, checks_bounds)

    original = sequences.select
    with (
        # It refuses tensors without numbers.
        mock.patch.object(checks, "head", lambda *_, **__: None),
        mock.patch.object(sequences, "select", select),
        # It knows no autocast either.
        mock.patch.object(operands, "operands_of", lambda x: operands.operands_for(x.dtype, "mps")),
        mock.patch.object(autograd, "without_autocast", lambda _: contextlib.nullcontext()),
        Seen() as seen,
    ):
        yield seen


@functools.cache
def operators_of_mps() -> set[str]:
    """The operators that torch has for MPS, by its own list of kernels."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {each["func"].partition("(")[0]: each for each in yaml.load(path.read_text(), LOADER)}

    def runs(entry: dict) -> bool:
        if "structured_delegate" in entry:
            return runs(entries[entry["structured_delegate"]])
        kernels = entry.get("dispatch")
        # Without a list of kernels an operator is made of others.
        keys = {key.strip() for keys in kernels or () for key in keys.split(",")}
        general = {key for key in keys if key.startswith("Composite")}
        return kernels is None or "MPS" in keys or bool(general)

    return {f"aten::{name}" for name, entry in entries.items() if runs(entry)}


@pytest.mark.parametrize(
    ("name", "options"),
    # A coefficient that adapts is the same code in each of them.
    [(name, {}) for name in OBJECTIVES if not name.startswith("ada") or name == "adadpo"]
    + [("adadpo", {"ld_alpha": 0.5})],
    ids=str,
)
def test_no_float64_on_the_device(name, options, without_float64):
    without_float64("meta")
    with pretended(2 * B * (T - 2)) as seen:
        loss_fn, found = run(OBJECTIVES[name], META, **options)
    assert not seen.wide
    assert all(x.device == META for x in found)
    assert all(buffer.device.type == "cpu" for buffer in loss_fn.buffers())
    assert {"aten::mm", "aten::index_select"} <= {x.partition(".")[0] for x in seen.operators}
    assert not seen.operators - operators_of_mps() - {"aten::lift_fresh"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["plain", "all", "adapter", "frozen"])
def test_the_operator_s_operators(given, dtype, without_float64):
    """Bias, softcap, statistics and an adapter, in little memory: all that MPS has, by torch's list."""
    without_float64("meta")
    n, v = 96, 600

    def empty(*shape: int, grad: bool = True) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=META, requires_grad=grad)

    hidden, weight = empty(n, H), empty(v, H, grad=given != "frozen")
    options = {"backend": "torch", "workspace_mb": 0.2}
    if given == "all":
        options |= {"bias": empty(v), "softcap": 9.0, "temperature": 2.0, "return_stats": True}
    if given == "adapter":
        options |= {"lora_hidden": empty(n, 3), "lora_weight": empty(v, 3)}
    labels = torch.empty(n, dtype=torch.int64, device=META)
    with pretended(n - 5) as seen:
        out = prefkern.linear_logprobs(hidden, weight, labels, **options)
        logps = out.logps if given == "all" else out
        logps.sum().backward()
    tiles = prefkern.last_plan().forward_tiles
    assert tiles.token_tile < n - 5 or tiles.vocab_tile < v
    assert hidden.grad.dtype == dtype and not seen.wide
    assert not seen.operators - operators_of_mps() - {"aten::lift_fresh"}


def test_the_stand_in_sees_float64():
    with pretended(1) as seen:
        torch.ones(2, device=META).double()
    assert seen.wide == ["aten::_to_copy"]
    known = operators_of_mps()
    assert "aten::mm" in known and "aten::segment_reduce" not in known


@pytest.mark.parametrize("move", ["to", "half", "cuda's"])
def test_statistics_stay_where_float64_is(move, without_float64):
    """A module that is moved as a whole leaves them on the CPU, in float64."""
    without_float64("meta")
    objective = build("alphadpo")
    objective.statistics.mean.fill_(0.1)
    {"to": lambda: objective.to("meta"), "half": objective.half, "cuda's": objective.cpu}[move]()
    assert objective.statistics.mean.dtype == torch.float64
    assert objective.statistics.mean.device.type == "cpu"
    assert objective.statistics.mean.item() == 0.1


def test_sums_over_ranks(without_float64, monkeypatch):
    """Parts of sequences are added on the CPU, and come back to the device."""
    sent = []
    monkeypatch.setattr(parts.dist, "all_reduce", lambda x, group: sent.append(x))
    without_float64("meta")
    values = torch.zeros(6, device=META, requires_grad=True)
    offsets = torch.tensor([0, 2, 6])
    with pretended(6):
        sums, lengths = parts.whole_sums({"logps": values}, offsets.to(META), object())
        (gradient,) = torch.autograd.grad(sums["logps"].sum(), values)
    assert [(x.dtype, x.device.type) for x in sent] == [(torch.float64, "cpu")]
    assert (sums["logps"].device, sums["logps"].dtype) == (META, torch.float32)
    assert (lengths.device, lengths.dtype) == (META, torch.int64)
    assert (gradient.device, gradient.shape) == (META, (6,))


def test_only_a_gpu_gets_numbers_from_pinned_memory():
    """The host does not wait then; `make trace-cuda` counts where it does."""
    for kind in ("cuda:1", "mps", "cpu"):
        x, device = mock.Mock(spec=Tensor), torch.device(kind)
        devices.sent(x, device)
        if device.type == "cuda":
            x.pin_memory.return_value.to.assert_called_once_with(device, non_blocking=True)
        else:
            x.to.assert_called_once_with(device)
            x.pin_memory.assert_not_called()
