"""One run: an objective trains an adapter on a task's pairs, and its curves are measured.

The loop is the shortest one around `FusedPreferenceLoss`: hidden states in, loss out. The reference
is the policy before the first step, so its sums are computed once for all runs of a task.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import prefkern
from prefkern.objectives import Objective
from studies.measures import measure
from studies.oracle import Oracle
from studies.policy import Policy
from studies.tasks import Sizes, Task

WARM_UP = 0.1
LARGEST_NORM = 1.0
# Draws of continuations are the same in every run, as far as the policies agree.
GENERATION_SEED = 1234

Curves = dict[str, list[float]]


def train(
    policy: Policy,
    task: Task,
    objective: Objective,
    learning_rate: float,
    steps: int,
    sizes: Sizes,
    seed: int,
) -> dict[str, Any]:
    """Train from the seed's adapter; returns the steps measured, and the curves of both sets.

    Held-out pairs are scored at the step. Of a training pair the log-probs are those of the latest
    step that used it, which costs nothing: before that step's update.
    """
    policy.reset(seed)
    loss_fn = prefkern.FusedPreferenceLoss(objective)
    optimizer = torch.optim.AdamW(policy.trained(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    order = torch.Generator().manual_seed(seed)
    seen = task.train.reference.clone()
    measured = [0]
    curves: dict[str, Curves] = {"held_out": {}, "train": {}}
    _add(curves["held_out"], measure(objective, task.held_out.pairs(task.held_out.reference)))
    _add(curves["train"], measure(objective, task.train.pairs(seen)))
    batches: list[torch.Tensor] = []
    for step in range(1, steps + 1):
        if not batches:
            batches = [*torch.randperm(len(task.train), generator=order).split(sizes.pairs_a_step)]
        numbers = batches.pop().to(policy.device)
        chosen = task.train.of(numbers)
        rows = task.train.rows.take(chosen)
        margins = task.train.margins
        out = loss_fn(
            policy.hidden(rows),
            policy.head.weight,
            rows.labels,
            ref_logps=task.train.reference[chosen],
            reward_margins=None if margins is None else margins[numbers],
        )
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.trained(), LARGEST_NORM)
        optimizer.step()
        schedule.step()
        seen[chosen] = torch.cat([out.chosen_logps, out.rejected_logps]).detach()
        if step % math.ceil(steps / sizes.evaluations) == 0 or step == steps:
            measured.append(step)
            sums = policy.sums(task.held_out.rows)
            _add(curves["held_out"], measure(objective, task.held_out.pairs(sums)))
            _add(curves["train"], measure(objective, task.train.pairs(seen)))
    return {"steps": measured, "curves": curves}


def judge(policy: Policy, task: Task, oracle: Oracle, sizes: Sizes) -> dict[str, Any]:
    """The true reward of the policy's continuations of the task's prompts, and their lengths."""
    judged = {}
    greedy_prompts = list(dict.fromkeys(task.prompts))
    for name, prompts, seed in (
        ("greedy", greedy_prompts, None),
        ("sampled", task.prompts, GENERATION_SEED),
    ):
        texts, lengths = policy.generate(prompts, sizes.new_tokens, seed, task.ends)
        rewards = oracle.rewards(texts)
        judged[name] = {
            "reward": rewards.mean().item(),
            "length": sum(lengths) / len(lengths),
            "texts": texts[:2],
        }
    return judged


def _rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0 (SimPO's and AdaDPO's schedule)."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(steps - warm_up, 1)))


def _add(curves: Curves, point: dict[str, float]) -> None:
    for name, value in point.items():
        curves.setdefault(name, []).append(value)
