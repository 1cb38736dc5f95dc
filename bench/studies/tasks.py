"""The pairs of the study's parts: sentences of reviews, and MADPO's three qualities of data.

A seed draws the pairs, the order of training and the initial adapter, so that what differs between
seeds is also what other data would change.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prefkern
from prefkern.objectives import Pairs
from studies.oracle import Oracle
from studies.policy import IGNORED, Policy, Rows
from studies.reviews import Texts, draw_pairs

PROMPT = "Movie review:"
QUALITIES = ("high", "medium", "low")
# The share of training pairs whose chosen sentence is the longer one; held-out pairs have 1/2. A
# policy that learns length from the training pairs is wrong on held-out ones.
LONGER_CHOSEN = 0.75
# Words of a review's end: so many are the prompt, and the rest what the review says.
PROMPT_WORDS, REVIEW_WORDS = 8, 24


@dataclass(frozen=True)
class Sizes:
    """The sizes of the study; the defaults fit a CPU."""

    layers: int = 4  # that are trained
    pairs: int = 48  # to train on: sentences, in three epochs
    held_out: int = 48
    steps: int = 36
    quality_pairs: int = 64  # to train on: each quality of data, in two epochs
    quality_prompts: int = 24  # held out
    pairs_a_step: int = 4
    evaluations: int = 3  # in a run
    samples: int = 16  # continuations of the prompt, after a run on sentences
    new_tokens: int = 16  # of a continuation
    sft_steps: int = 40
    sft_rows: int = 8  # in a step
    reward_epochs: int = 4  # at most


@dataclass(frozen=True)
class PairSet:
    """B pairs: their rows, chosen ones first, and the reference's sums."""

    rows: Rows  # 2B
    reference: Tensor  # (2B,)
    margins: Tensor | None = None  # (B,)

    def __len__(self) -> int:
        return len(self.reference) // 2

    def of(self, numbers: Tensor) -> Tensor:
        """The rows of some pairs."""
        return torch.cat([numbers, numbers + len(self)])

    def pairs(self, sums: Tensor) -> Pairs:  # (2B,)
        return Pairs.of_sequences(sums, self.reference, self.rows.lengths, self.margins)


@dataclass(frozen=True)
class Task:
    """What a run trains on, is measured on, and is asked to continue."""

    train: PairSet
    held_out: PairSet
    prompts: list[str]
    ends: bool  # whether a response ends with the end-of-sequence token
    report: dict[str, Any]  # statistics of the data


def pair_set(
    policy: Policy, prompts: list[str], pairs: list[tuple[str, str]], ends: bool
) -> PairSet:
    texts = [
        (prompt, pair[side]) for side in (0, 1) for prompt, pair in zip(prompts, pairs, strict=True)
    ]
    rows = policy.rows(texts, ends)
    # The reference is the policy with a new adapter, and not with what an earlier run has trained.
    policy.reset(0)
    return PairSet(rows, policy.sums(rows))


def sentences(policy: Policy, texts: Texts, sizes: Sizes, seed: int) -> Task:
    """Pairs of a positive sentence, which is chosen, and a negative one."""
    draw = random.Random(seed)
    parts = []
    # Held-out pairs first, so that their number of sentences is there; no sentence is in both.
    held_out = draw_pairs(texts, sizes.held_out, 0.5, draw)
    used = {text for pair in held_out for text in pair}
    rest = {
        label: [text for text in given if text not in used]
        for label, given in texts.sentences.items()
    }
    train = draw_pairs(Texts(rest, {}), sizes.pairs, LONGER_CHOSEN, draw)
    for pairs in (train, held_out):
        spaced = [(" " + chosen, " " + rejected) for chosen, rejected in pairs]
        parts.append(pair_set(policy, [PROMPT] * len(pairs), spaced, ends=True))
    return Task(parts[0], parts[1], [PROMPT] * sizes.samples, True, {})


def fine_tune(policy: Policy, texts: Texts, sizes: Sizes) -> None:
    """MADPO's first stage: supervised training on positive reviews; the adapter stays unmerged."""
    draw = random.Random(0)
    chosen = draw.sample(texts.reviews[1], sizes.sft_steps * sizes.sft_rows)
    policy.reset(0)
    optimizer = torch.optim.AdamW(policy.trained(), lr=5e-4, weight_decay=0.0)
    for step in range(sizes.sft_steps):
        some = chosen[step * sizes.sft_rows : (step + 1) * sizes.sft_rows]
        rows = policy.rows([split(review, draw) for review in some], end=False)
        logps = prefkern.linear_logprobs(policy.hidden(rows), policy.head.weight, rows.labels)
        loss = -logps.sum() / rows.lengths.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def split(review: str, draw: random.Random) -> tuple[str, str]:
    """A prompt and what the review says next, from its end, where the judgment mostly is."""
    words = review.split()
    start = max(len(words) - REVIEW_WORDS - draw.randrange(3), 0)
    prompt = " ".join(words[start : start + PROMPT_WORDS])
    return prompt, " " + " ".join(words[start + PROMPT_WORDS : start + REVIEW_WORDS])


def qualities(
    policy: Policy, texts: Texts, oracle: Oracle, sizes: Sizes, seed: int
) -> dict[str, Task]:
    """MADPO's data: responses of the fine-tuned policy, or one of them and a real negative review.

    High: both responses are the policy's. Low: one is the better of the policy's two, one is what
    the negative review says. Medium: one half of the prompts is like each. The same prompts are
    held out in all three. Which response is chosen is drawn from the true rewards, by Gumbel noise
    (Bradley-Terry). The margins are those of a reward model that learns from the pairs of its
    quality, as an adapter of the same policy.
    """
    draw = random.Random(seed)
    count = sizes.quality_pairs + sizes.quality_prompts
    given = [split(review, draw) for review in draw.sample(texts.reviews[0], count)]
    prompts = [prompt for prompt, _ in given]
    policy.reset(seed)
    generated, _ = policy.generate(prompts * 2, sizes.new_tokens, seed=seed, end=False)
    both = [*zip(generated[:count], generated[count:], strict=True)]
    reals = policy.cut([real for _, real in given], sizes.new_tokens)
    rewards = {
        text: r
        for text, r in zip(
            [*generated, *reals], oracle.rewards([*generated, *reals]).tolist(), strict=True
        )
    }
    better = [max(pair, key=rewards.__getitem__) for pair in both]
    mixed = [*zip(better, reals, strict=True)]
    tasks = {}
    for quality in QUALITIES:
        # Prompts were drawn at random, so every second one is one half of them.
        pairs = [
            mixed[n] if quality == "low" or (quality == "medium" and n % 2) else both[n]
            for n in range(count)
        ]
        tasks[quality] = _quality(policy, prompts, pairs, rewards, sizes, seed)
    return tasks


def _quality(
    policy: Policy,
    prompts: list[str],
    pairs: list[tuple[str, str]],
    rewards: dict[str, float],
    sizes: Sizes,
    seed: int,
) -> Task:
    """The task of one quality: choices, a reward model, and its margins."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([[rewards[text] for text in pair] for pair in pairs])
    uniform = torch.rand(values.shape, generator=generator).clamp(min=1e-9)
    swapped = (values - torch.log(-torch.log(uniform))).argmax(-1) == 1
    chosen = [pair[::-1] if swap else pair for pair, swap in zip(pairs, swapped, strict=True)]
    true = torch.where(swapped, values[:, 1] - values[:, 0], values[:, 0] - values[:, 1])
    cut = sizes.quality_pairs
    train, held_out = (
        pair_set(policy, prompts[part], chosen[part], ends=False)
        for part in (slice(0, cut), slice(cut, None))
    )
    margins, epochs = reward_margins(policy, train, held_out, sizes, seed)
    report = {
        "true_margin": _spread(true[:cut]),
        "margin": _spread(margins[:cut]),
        "agrees_with_oracle": (true[:cut] > 0).double().mean().item(),
        "reward_accuracy": (margins[cut:] > 0).double().mean().item(),
        "reward_epochs": epochs,
    }
    margins = margins.to(policy.device)
    return Task(
        PairSet(train.rows, train.reference, margins[:cut]),
        PairSet(held_out.rows, held_out.reference, margins[cut:]),
        prompts[cut:],
        False,
        report,
    )


def reward_margins(
    policy: Policy, train: PairSet, held_out: PairSet, sizes: Sizes, seed: int
) -> tuple[Tensor, int]:  # (B of both,)
    """Margins of a reward model (Bradley-Terry), stopped where the held-out loss is lowest."""
    policy.reset(seed)
    score = nn.Linear(policy.head.weight.shape[1], 1, bias=False).to(policy.device)
    nn.init.zeros_(score.weight)
    optimizer = torch.optim.AdamW(
        [*policy.trained(), *score.parameters()], lr=5e-4, weight_decay=0.0
    )

    def margins(pairs: PairSet, numbers: Tensor) -> Tensor:
        rows = pairs.rows.take(pairs.of(numbers), more=1)
        # The score is read where the response's last token goes in: after its last label.
        last = (rows.labels != IGNORED).long().cumsum(-1).argmax(-1) + 1
        hidden = policy.hidden(rows)[torch.arange(len(last)), last]
        chosen, rejected = score(hidden.float()).view(2, -1)
        return chosen - rejected

    @torch.no_grad()
    def all_margins() -> list[Tensor]:
        return [
            torch.cat([margins(pairs, some) for some in torch.arange(len(pairs)).split(16)])
            for pairs in (train, held_out)
        ]

    best, kept, epochs = float("inf"), [torch.empty(0)], 0
    for epoch in range(1, sizes.reward_epochs + 1):
        for numbers in torch.randperm(len(train)).split(sizes.pairs_a_step):
            loss = -F.logsigmoid(margins(train, numbers)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = all_margins()
        held_out_loss = -F.logsigmoid(found[1]).mean().item()
        if held_out_loss >= best:
            break
        best, kept, epochs = held_out_loss, found, epoch
    return torch.cat(kept).cpu(), epochs


def _spread(values: Tensor) -> dict[str, float]:
    quantiles = values.double().quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    return {
        "mean": values.mean().item(),
        "std": values.std().item(),
        **dict(zip(("q05", "q50", "q95"), quantiles.tolist(), strict=True)),
    }
