"""Out of memory in a call: half the workspace, once, with a warning; then an error that says what fits.

The plan decides how much a pass holds at its peak, and smaller tiles give the same numbers. So a
step need not be lost when memory runs out. `Budget.attempt` runs a pass. If the allocator refuses,
it plans the pass again for half of what the first attempt took, and runs that; after a trained
head's default on a GPU for no more than the default of other calls. By then no tensor of
the first attempt is alive: they hang on the frames of the exception's traceback, which is dropped
first.

A second refusal raises `torch.OutOfMemoryError`. The error has both attempts, the smallest
workspace that is enough for these tokens, and the allocator's message. accelerate's search for a
batch size recognises an out-of-memory error by that message.

A pass returns its results when it ends, all gradients of a call together. So an attempt that fails
leaves nothing in any `.grad`. A pass over the whole vocabulary has no collective, so a rank can try
again by itself. With a shard of the vocabulary it does not: the other ranks wait for its part of a
sum.
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
    """Whether an allocator refused. A GPU's error has its own class, a CPU's only its message."""
    return isinstance(error, torch.OutOfMemoryError) or _CPU_REFUSAL in str(error)


@dataclass(frozen=True)
class Budget:
    """How much memory a call may hold, and how to plan it for less. It holds no tensor."""

    workspace_mb: float
    plan_of: Callable[..., Plan]  # plans the whole call for a `workspace_mb`
    record: Callable[[Plan], None]  # makes the plan of a second attempt `last_plan`'s
    # A CUDA graph that is being captured would replay the failed attempt as well; and the other
    # ranks of a head in shards would wait.
    retries: bool = True
    # Of a second attempt, where the first had a default that is larger than others.
    most_again_mb: float = math.inf

    def attempt(
        self,
        run: Callable[[Plan], T],
        first: Plan,
        phase: Phase,
        again: Callable[[float], Plan] | None = None,
        held_bytes: int = 0,
    ) -> tuple[T, Plan]:
        """Run the plan `first`; if memory runs out, one for half of it. Returns the plan that ran.

        Args:
            again: makes the second plan for a workspace in MiB, and may free memory for it; None:
                the whole call's plan for that workspace.
            held_bytes: the part of the plan's bytes that a smaller plan cannot give back.

        Raises torch.OutOfMemoryError if both are refused, or if no plan is smaller.
        """
        result = _run(run, first)
        if not isinstance(result, _Refusal):
            return result, first
        took = _took(first, phase)
        tried = [(self.workspace_mb, first)]
        if self.retries:
            most = max(min(self.workspace_mb * MIB, took), held_bytes)
            half_mb = min((most - held_bytes) / 2 / MIB, self.most_again_mb) + held_bytes / MIB
            second = (again or self._plan)(half_mb)
            if _took(second, phase) < took:
                warnings.warn(
                    f"out of memory in the {phase} pass of {_shape(first)}, with "
                    f"{_described(self.workspace_mb, first, phase)}: trying once more with "
                    f"{_described(half_mb, second, phase)}. To begin there, pass a smaller "
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
            f"The least that these tokens need is {_mib(least.workspace_bytes)}: pass "
            f"workspace_mb={least_mb:g}."
        )
        if least.workspace_bytes >= min(_took(each, phase) for _, each in tried):
            advice = "No workspace_mb makes it smaller: score fewer tokens in a call."
        return (
            f"out of memory in the {phase} pass of {_shape(plan)}. Tried: "
            + ", then ".join(_described(mb, each, phase) for mb, each in tried)
            + f". {advice} Beside its workspace a call holds its results and, for backward, "
            f"{_mib(plan.saved_bytes)}, which do not depend on workspace_mb. {said}"
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
    """An allocator's message, without the exception, which keeps the attempt's frames alive."""

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


def _described(workspace_mb: float, plan: Plan, phase: Phase) -> str:
    tiles = plan.forward_tiles
    if phase == "backward" and plan.backward_tiles is not None:
        tiles = plan.backward_tiles
    return (
        f"workspace_mb={workspace_mb:.4g} ({plan.structure}, {_mib(_took(plan, phase))} in tiles of "
        f"{tiles.token_tile} tokens by {tiles.vocab_tile} vocabulary entries)"
    )


def _shape(plan: Plan) -> str:
    return f"{plan.tokens} scored tokens (H = {plan.hidden_size}, V = {plan.vocab_size})"


def _mib(count: int) -> str:
    return f"{count / MIB:.3g} MiB"
