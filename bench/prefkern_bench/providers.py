"""The ways to compute log-probs and a DPO loss that `prefkern bench` compares.

| name | what |
|---|---|
| prefkern | `linear_logprobs`, `FusedPreferenceLoss` |
| prefkern-fold | log-probs alone, by the kernel that has the product in it |
| eager | logits in memory, log-softmax in float32, autograd |
| compile | the same through `torch.compile` |
| torch-lce | `torch.nn.functional.linear_cross_entropy`, chunked, torch >= 2.13 |
| liger | `LigerFusedLinearDPOLoss`, compiled on a GPU and not on a CPU |
| trl | TRL's `ChunkedLogProbFunction` at TRL's chunk size, with a loss in torch |
| cce | Apple's `cut_cross_entropy`, which by default drops small entries of the gradient |

A provider is one per-token function, with a DPO loss on top: gather the scored tokens, sum over
sequences, compute the loss in torch. A provider whose package has its own loss overrides this. A
provider raises an error for what it cannot do, and the benchmark shows the error in its row. A peer
is imported when its provider is created. So a missing peer, or a version with another interface,
also becomes such a row.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

import prefkern
from prefkern.objectives import DPO
from prefkern_bench.problem import BETA, IGNORE_INDEX, Problem, dpo_loss

# The provider with a workspace large enough for one pass; it differs only for a trained head.
IN_ONE_PASS = "prefkern-roomy"
# The provider with product and fold in one kernel, which has no backward.
IN_ONE_KERNEL = "prefkern-fold"
# The one task that such a provider is for; in suite "step" it has none.
ONLY = {IN_ONE_PASS: "trainable", IN_ONE_KERNEL: "forward"}
_SWITCH = "PREFKERN_PRODUCT_FOLD"


class Scores(NamedTuple):
    """Log-probs of sequences, and of scored tokens if the provider returns them."""

    sums: Tensor  # (2B,)
    logps: Tensor | None  # (N,)


class Provider:
    """One way to compute log-probs of labels and a DPO loss from hidden states and a head."""

    # Whether all its work is in torch's operators, so that it can be counted.
    is_visible = True

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:  # (N, H), (V, H), (N,) -> (N,), differentiable
        raise NotImplementedError

    def score(self, problem: Problem) -> Scores:
        """Log-probs of all tokens of a problem in which every token is scored."""
        rows = problem.labels.shape[0]
        logps = self.token_logps(
            problem.hidden.flatten(0, 1), problem.weight, problem.labels.flatten(), problem.softcap
        )
        return Scores(logps.view(rows, -1).float().sum(-1), logps)

    def loss(self, problem: Problem) -> tuple[Tensor, Tensor]:  # (), (2B,)
        """The DPO loss and the policy's sums; computes the reference's sums if they are missing."""
        sums = self._sums(problem.hidden, problem.weight, problem)
        ref_sums = problem.ref_sums
        if ref_sums is None:
            assert problem.ref_hidden is not None and problem.ref_weight is not None
            with torch.no_grad():
                ref_sums = self._sums(problem.ref_hidden, problem.ref_weight, problem)
        return dpo_loss(sums, ref_sums), sums

    def _sums(self, hidden: Tensor, weight: Tensor, problem: Problem) -> Tensor:  # (2B,)
        scored = problem.labels != IGNORE_INDEX
        logps = self.token_logps(hidden[scored], weight, problem.labels[scored], problem.softcap)
        zeros = torch.zeros(scored.shape, device=logps.device)
        return zeros.masked_scatter(scored, logps.float()).sum(-1)

    def uncompiled(self) -> Provider:
        """The same provider without compilation, so that its operators can be counted."""
        return self

    def plan(self) -> dict[str, Any] | None:
        """The plan of the latest call, for the record; None if the provider has none."""
        return None


class Prefkern(Provider):
    def __init__(self, workspace_mb: float | None = None) -> None:
        self.workspace_mb = workspace_mb
        self.loss_fn = prefkern.FusedPreferenceLoss(DPO(BETA), workspace_mb=workspace_mb)

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        logps = prefkern.linear_logprobs(
            hidden, weight, labels, softcap=softcap, workspace_mb=self.workspace_mb
        )
        assert isinstance(logps, Tensor)
        return logps

    def loss(self, problem: Problem) -> tuple[Tensor, Tensor]:
        reference: dict[str, Any] = {"ref_logps": problem.ref_sums}
        if problem.ref_sums is None:
            reference = {"ref_hidden": problem.ref_hidden, "ref_weight": problem.ref_weight}
        out = self.loss_fn(
            problem.hidden, problem.weight, problem.labels, softcap=problem.softcap, **reference
        )
        return out.loss, torch.cat([out.chosen_logps, out.rejected_logps])

    def plan(self) -> dict[str, Any] | None:
        made = prefkern.last_plan()
        if made is None:
            return None
        totals = {"operations": made.operations, "workspace_bytes": made.workspace_bytes}
        return asdict(made) | totals


class PrefkernInOnePass(Prefkern):
    """prefkern with room for a trained head's probabilities, so that nothing is recomputed."""

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        self.workspace_mb = enough_for_one_pass(hidden, weight, labels.numel(), softcap)
        return super().token_logps(hidden, weight, labels, softcap)

    def loss(self, problem: Problem) -> tuple[Tensor, Tensor]:
        scored = int((problem.labels != IGNORE_INDEX).sum())
        self.loss_fn.workspace_mb = enough_for_one_pass(
            problem.hidden, problem.weight, scored, problem.softcap
        )
        return super().loss(problem)


class PrefkernInOneKernel(Prefkern):
    """The other way of a forward: its product is in the kernel, and no logit is written."""

    is_visible = False

    def __init__(self, workspace_mb: float | None, device: torch.device) -> None:
        super().__init__(workspace_mb)
        if device.type != "cuda":
            raise NotImplementedError("has its product in a Triton kernel, which needs a GPU")

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        before = os.environ.get(_SWITCH)
        os.environ[_SWITCH] = "1"
        try:
            logps = super().token_logps(hidden, weight, labels, softcap)
        finally:
            del os.environ[_SWITCH]
            if before is not None:
                os.environ[_SWITCH] = before
        made = prefkern.last_plan()
        if made is None or not made.product_in_kernel:
            raise RuntimeError("ran another kernel than the one with the product in it")
        return logps


def enough_for_one_pass(
    hidden: Tensor, weight: Tensor, tokens: int, softcap: float | None
) -> float:
    """The smallest workspace in MiB, in steps of 10%, with which a trained head needs one pass."""
    workspace_mb = 16.0
    while True:
        made = prefkern.plan_for(
            tokens,
            weight.shape[1],
            weight.shape[0],
            dtype=hidden.dtype,
            device=hidden.device,
            trains_head=True,
            softcap=softcap is not None,
            workspace_mb=workspace_mb,
        )
        if made.structure == "one_pass":
            return workspace_mb
        workspace_mb *= 1.1


def eager_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
) -> Tensor:  # (N, H), (V, H), (N,) -> (N,)
    logits = torch.nn.functional.linear(hidden, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return label_logps(logits, labels)


def label_logps(logits: Tensor, labels: Tensor) -> Tensor:  # (N, V), (N,) -> (N,)
    return logits.float().log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class ScoredLogits(Provider):
    """Logits of the scored tokens only, from hidden states; `Compiled` compiles this."""

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        return eager_logps(hidden, weight, labels, softcap)


class Eager(ScoredLogits):
    """Logits of the scored tokens only, which favours eager; suite "step" computes all logits."""


class Compiled(Provider):
    """Static shapes on a GPU, where they are fastest; dynamic on a CPU, where compiling is slow."""

    def __init__(self, device: torch.device) -> None:
        self.compiled = torch.compile(eager_logps, dynamic=device.type != "cuda")

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        return self.compiled(hidden, weight, labels, softcap)

    def uncompiled(self) -> Provider:
        return ScoredLogits()


class TorchLinearCrossEntropy(Provider):
    def __init__(self) -> None:
        function = getattr(torch.nn.functional, "linear_cross_entropy", None)
        options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
        if function is None or options is None:
            raise NotImplementedError(f"torch {torch.__version__} has none; needs 2.13")
        self.function, self.options = function, options()

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        _refuse_softcap(softcap)
        with warnings.catch_warnings():
            # It warns when it falls back to logits in memory. That is an error here: the row would
            # measure something else.
            warnings.filterwarnings("error", message=".*linear_cross_entropy.*")
            return -self.function(hidden, weight, labels, reduction="none", options=self.options)


class Liger(Provider):
    """Liger cannot take precomputed log-probs, so it always computes the reference's product."""

    def __init__(self, compiled: bool) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

        self.loss_class, self.compiled = LigerFusedLinearDPOLoss, compiled

    def score(self, problem: Problem) -> Scores:
        if torch.is_grad_enabled():
            raise NotImplementedError("differentiates its own losses only, see suite loss")
        return Scores(self._call(problem._replace(ref_hidden=None, ref_weight=None))[1], None)

    def loss(self, problem: Problem) -> tuple[Tensor, Tensor]:
        assert problem.ref_hidden is not None
        return self._call(problem)

    def _call(self, problem: Problem) -> tuple[Tensor, Tensor]:
        _refuse_softcap(problem.softcap)
        loss_fn = self.loss_class(
            ignore_index=IGNORE_INDEX,
            beta=BETA,
            compiled=self.compiled,
            use_ref_model=problem.ref_hidden is not None,
        )
        loss, (chosen_logps, rejected_logps, *_) = loss_fn(
            problem.weight,
            problem.hidden,
            problem.labels,
            ref_input=problem.ref_hidden,
            ref_weight=problem.ref_weight,
        )
        return loss, torch.cat([chosen_logps, rejected_logps])

    def uncompiled(self) -> Provider:
        return Liger(compiled=False) if self.compiled else self


class Trl(Provider):
    CHUNK_SIZE = 32768  # vocabulary entries, the value that TRL's trainers pass

    def __init__(self) -> None:
        import trl

        if importlib.util.find_spec("trl.kernels") is None:
            raise NotImplementedError(f"TRL {trl.__version__} holds logits; its tiles need 1.14")
        kernels = importlib.import_module("trl.kernels")
        self.function = kernels.ChunkedLogProbFunction
        known = inspect.signature(self.function.forward).parameters
        # Later versions compute entropy and similar outputs only on request.
        self.options = [()] if "outputs" in known else []

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        arguments = (hidden, weight, None, labels, 1.0, self.CHUNK_SIZE, softcap, 1.0)
        return self.function.apply(*arguments, *self.options)[0]


class CutCrossEntropy(Provider):
    is_visible = False  # its products are inside Triton kernels

    def __init__(self) -> None:
        peer = importlib.import_module("cut_cross_entropy")

        if os.environ.get("TRITON_INTERPRET") == "1":
            raise NotImplementedError("bf16 products are wrong under Triton's interpreter")
        self.function = peer.linear_cross_entropy

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        return -self.function(hidden, weight, labels, softcap=softcap, reduction="none")


def _refuse_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise NotImplementedError("has no softcap")


# Name -> a function that makes the provider from prefkern's workspace_mb and the device.
PROVIDERS: dict[str, Callable[[float | None, torch.device], Provider]] = {
    "prefkern": lambda workspace_mb, device: Prefkern(workspace_mb),
    IN_ONE_PASS: lambda workspace_mb, device: PrefkernInOnePass(),
    IN_ONE_KERNEL: PrefkernInOneKernel,
    "eager": lambda workspace_mb, device: Eager(),
    "compile": lambda workspace_mb, device: Compiled(device),
    "torch-lce": lambda workspace_mb, device: TorchLinearCrossEntropy(),
    "liger": lambda workspace_mb, device: Liger(compiled=device.type == "cuda"),
    "trl": lambda workspace_mb, device: Trl(),
    "cce": lambda workspace_mb, device: CutCrossEntropy(),
}
