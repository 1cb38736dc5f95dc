"""Out of memory in a call: half the workspace, once, with a warning; then an error that says what fits.

What a pass holds at its peak is its plan's choice, so running out of memory is no reason to lose a
step: the same numbers come of smaller tiles. `Budget.attempt` runs a pass, and where the allocator
refuses, plans it again for half of what it took and runs it anew. Nothing of the failed attempt is
alive by then: its tensors hang on the frames of the exception's traceback, which is dropped first.
A second refusal raises `torch.OutOfMemoryError` with both attempts, the least workspace that these
tokens can do with, and the allocator's own words, by which accelerate's search for a batch size
knows what happened.

A pass hands over its results when it ends, all gradients of a call together: an attempt that fails
leaves nothing in any `.grad`. No pass has a collective, so that a rank retries by itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch

from prefkern.ops.plan import MIB, Plan

T = TypeVar("T")
Phase = Literal["forward", "backward"]

_CPU_REFUSAL = "DefaultCPUAllocator: can't allocate memory"
# No call's tiles get smaller below this workspace.
_LEAST_MB = 2.0**-10


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocator refused: a GPU's has a class of its own, a CPU's only its words."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_REFUSAL in str(error)


@dataclass(frozen=True)
class Budget:
    """What a call may hold, and how it is planned for less. It holds no tensor."""

    workspace_mb: float
    plan_of: Callable[..., Plan]  # of the whole call, by `workspace_mb`
    record: Callable[[Plan], None]  # where `last_plan` finds the plan of a second attempt
    # A CUDA graph that is being captured would replay the failed attempt as well.
    retries: bool = True

    def attempt(
        self,
        run: Callable[[Plan], T],
        first: Plan,
        phase: Phase,
        again: Callable[[float], Plan] | None = None,
        held_bytes: int = 0,
    ) -> tuple[T, Plan]:
        """`run(first)`, or in its place `run` of a plan for half the memory; and the plan that ran.

        Args:
            again: makes the second plan, of a workspace in MiB, and may free memory for it; None:
                the whole call's plan for that workspace.
            held_bytes: of those that the plan counts, what a smaller one cannot give back.

        Raises torch.OutOfMemoryError where both are refused, or where no plan is smaller.
        """
        result = _run(run, first)
        if not isinstance(result, _Refusal):
            return result, first
        took = _took(first, phase)
        tried = [(self.workspace_mb, first)]
        if self.retries:
            most = max(min(self.workspace_mb * MIB, took), held_bytes)
            half_mb = (held_bytes + (most - held_bytes) / 2) / MIB
            second = (again or self._plan)(half_mb)
            if _took(second, phase) < took:
                warnings.warn(
                    f"out of memory in the {phase} pass of {_shape(first)}, with "
                    f"{_told(self.workspace_mb, first, phase)}: trying once more with "
                    f"{_told(half_mb, second, phase)}. To begin there, pass a smaller "
                    f"workspace_mb. {result.said}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                self.record(second)
                result = _run(run, second)
                if not isinstance(result, _Refusal):
                    return result, second
                tried.append((half_mb, second))
        raise torch.OutOfMemoryError(self._report(tried, phase, result.said))

    def _plan(self, workspace_mb: float) -> Plan:
        return self.plan_of(workspace_mb=workspace_mb)

    def _report(self, tried: list[tuple[float, Plan]], phase: Phase, said: str) -> str:
        plan = tried[0][1]
        least_mb, least = self._least()
        advice = (
            f"The least that these tokens can do with is {_mib(least.workspace_bytes)}: pass "
            f"workspace_mb={least_mb:g}."
        )
        if least.workspace_bytes >= min(_took(each, phase) for _, each in tried):
            advice = "No workspace_mb makes it smaller: score fewer tokens in a call."
        return (
            f"out of memory in the {phase} pass of {_shape(plan)}. Tried: "
            + ", then ".join(_told(mb, each, phase) for mb, each in tried)
            + f". {advice} Beside its workspace a call holds its results and, for backward, "
            f"{_mib(plan.saved_bytes)}, whatever workspace_mb is. {said}"
        )

    def _least(self) -> tuple[float, Plan]:
        """The call's smallest plan, and the largest power of two MiB that has it."""
        workspace_mb = 2.0 ** math.floor(math.log2(self.workspace_mb))
        least_mb, least = workspace_mb, self._plan(workspace_mb)
        while workspace_mb > _LEAST_MB:
            workspace_mb /= 2
            made = self._plan(workspace_mb)
            if made.workspace_bytes < least.workspace_bytes:
                least_mb, least = workspace_mb, made
        return least_mb, least


@dataclass(frozen=True)
class _Refusal:
    """What is left of an allocator's exception: its words, and no frame of the attempt."""

    said: str


def _run(run: Callable[[Plan], T], plan: Plan) -> T | _Refusal:
    try:
        return run(plan)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return _Refusal(str(error))


def _took(plan: Plan, phase: Phase) -> int:
    tiles = plan.forward_tiles
    if phase == "backward" and plan.backward_tiles is not None:
        tiles = plan.backward_tiles
    return plan.kept_bytes + tiles.bytes


def _told(workspace_mb: float, plan: Plan, phase: Phase) -> str:
    tiles = plan.forward_tiles
    if phase == "backward" and plan.backward_tiles is not None:
        tiles = plan.backward_tiles
    return (
        f"workspace_mb={workspace_mb:.4g} ({plan.structure}, {_mib(_took(plan, phase))} in tiles of "
        f"{tiles.token_tile} tokens by {tiles.vocab_tile} words)"
    )


def _shape(plan: Plan) -> str:
    return f"{plan.tokens} scored tokens (H = {plan.hidden_size}, V = {plan.vocab_size})"


def _mib(count: int) -> str:
    return f"{count / MIB:.3g} MiB"
