"""The ways to compute log-probs and a DPO loss that `prefkern bench` measures beside one another.

| name | what |
|---|---|
| prefkern | `linear_logprobs`, `FusedPreferenceLoss` |
| eager | logits in memory, log-softmax in float32, autograd |
| compile | the same through `torch.compile` |
| torch-lce | `torch.nn.functional.linear_cross_entropy`, chunked, torch >= 2.13 |
| liger | `LigerFusedLinearDPOLoss`, compiled on a GPU and not on a CPU |
| trl | TRL's `ChunkedLogProbFunction` at TRL's chunk size, with a loss in torch |
| cce | Apple's `cut_cross_entropy`, which by default drops small entries of the gradient |

A provider is one per-token function, and the DPO loss over it: gather the scored tokens, sum over
sequences, the loss in torch. Those whose package brings its own loss override that. What a provider
cannot do it raises, and the benchmark makes a row of it; a peer is imported when its provider is
made, so that one that is missing, or has another interface in another version, is such a row, too.
"""

from __future__ import annotations

import importlib
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

# The provider with room enough, which only a trained head makes use of.
IN_ONE_PASS = "prefkern-roomy"


class Scores(NamedTuple):
    """Log-probs of sequences, and of the scored tokens where the provider returns them."""

    sums: Tensor  # (2B,)
    logps: Tensor | None  # (N,)


class Provider:
    """One way to compute log-probs of labels and a DPO loss from hidden states and a head."""

    # Whether torch's operators are all there is to see of it, for counting.
    is_visible = True

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:  # (N, H), (V, H), (N,) -> (N,), differentiable
        raise NotImplementedError

    def score(self, problem: Problem) -> Scores:
        """Log-probs of all tokens of the problem, every one of which is scored."""
        rows = problem.labels.shape[0]
        logps = self.token_logps(
            problem.hidden.flatten(0, 1), problem.weight, problem.labels.flatten(), problem.softcap
        )
        return Scores(logps.view(rows, -1).float().sum(-1), logps)

    def loss(self, problem: Problem) -> tuple[Tensor, Tensor]:  # (), (2B,)
        """The DPO loss and the policy's sums; the reference's are computed if they are not given."""
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
        """The same without compilation, whose operators can be counted."""
        return self

    def plan(self) -> dict[str, Any] | None:
        """What the latest call planned, for the record."""
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
    """With a workspace that holds a trained head's probabilities, so that nothing is recomputed."""

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


def enough_for_one_pass(
    hidden: Tensor, weight: Tensor, tokens: int, softcap: float | None
) -> float:
    """The least workspace in MiB, in steps of a tenth, with which a trained head takes one pass."""
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
    """Logits of the scored tokens only, from hidden states: what `Compiled` compiles."""

    def token_logps(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, softcap: float | None
    ) -> Tensor:
        return eager_logps(hidden, weight, labels, softcap)


class Eager(ScoredLogits):
    """The same, which is kind to it; suite "step" gives it the logits of the model's own forward."""


class Compiled(Provider):
    """Static shapes on a GPU, as the fastest; dynamic ones on a CPU, whose compiler is slow."""

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
            # It warns where it goes back to logits in memory, which is not what is asked for.
            warnings.filterwarnings("error", message=".*linear_cross_entropy.*")
            return -self.function(hidden, weight, labels, reduction="none", options=self.options)


class Liger(Provider):
    """It takes no log-probs that were computed earlier: the reference's product is always in it."""

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
    CHUNK_SIZE = 32768  # words, as TRL's trainers pass

    def __init__(self) -> None:
        import trl.kernels

        self.function = trl.kernels.ChunkedLogProbFunction
        known = inspect.signature(self.function.forward).parameters
        # Later versions compute entropy and the like only when asked.
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


# Name -> its maker, from prefkern's workspace_mb and the device.
PROVIDERS: dict[str, Callable[[float | None, torch.device], Provider]] = {
    "prefkern": lambda workspace_mb, device: Prefkern(workspace_mb),
    IN_ONE_PASS: lambda workspace_mb, device: PrefkernInOnePass(),
    "eager": lambda workspace_mb, device: Eager(),
    "compile": lambda workspace_mb, device: Compiled(device),
    "torch-lce": lambda workspace_mb, device: TorchLinearCrossEntropy(),
    "liger": lambda workspace_mb, device: Liger(compiled=device.type == "cuda"),
    "trl": lambda workspace_mb, device: Trl(),
    "cce": lambda workspace_mb, device: CutCrossEntropy(),
}
