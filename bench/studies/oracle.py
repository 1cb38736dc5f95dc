"""The true reward of the study: a sentiment classifier, trained on the labelled reviews.

A logistic regression on the words and pairs of neighbouring words of a text, each counted once. The
reward of a text is `6 (p - 0.5)`, p its probability of being positive: in [-3, 3], as in MADPO's
experiment, whose classifier is a RoBERTa model.

It learns from sentences and from pieces of the reviews, since a continuation of a few tokens is as
short. What it is trained on and what it is tested on are different reviews.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studies.reviews import Texts

WORDS_A_PIECE = 30
LEAST_COUNT, FEATURES = 3, 60_000
EPOCHS, TEXTS_A_STEP, LEARNING_RATE, DECAY = 4, 256, 1e-2, 0.1
HELD_OUT = 0.1  # share of the texts of each label and source
SCALE = 6.0


def features(text: str) -> list[str]:
    words = re.findall(r"[a-z']+|[!?]", text.lower())
    return list(dict.fromkeys([*words, *map(" ".join, pairwise(words))]))


@dataclass(frozen=True)
class Oracle:
    """A trained classifier."""

    vocabulary: dict[str, int]
    weights: Tensor  # (features + 1,), the last one the bias

    def rewards(self, texts: list[str]) -> Tensor:  # (texts,)
        """`6 (p - 0.5)` of each text."""
        scores = [
            self.weights[self._known(text)].sum() / scale_of(text) + self.weights[-1]
            for text in texts
        ]
        return SCALE * (torch.stack(scores).sigmoid() - 0.5)

    def _known(self, text: str) -> list[int]:
        return [self.vocabulary[f] for f in features(text) if f in self.vocabulary]


def scale_of(text: str) -> float:
    """What a sum over a text's features is divided by, so that long texts are not more extreme."""
    return max(len(features(text)), 1) ** 0.5


def pieces(reviews: list[str], draw: random.Random) -> list[str]:
    """The end of each review, which mostly has its judgment, and one other piece."""
    found = []
    for review in reviews:
        words = review.split()
        start = draw.randrange(max(len(words) - WORDS_A_PIECE, 1))
        found.append(" ".join(words[-WORDS_A_PIECE:]))
        found.append(" ".join(words[start : start + WORDS_A_PIECE]))
    return found


def train(texts: Texts) -> tuple[Oracle, dict[str, Any]]:
    """A classifier, and its accuracy on held-out sentences and pieces of held-out reviews."""
    draw = random.Random(0)
    torch.manual_seed(0)
    known: list[tuple[str, int]] = []
    held_out: dict[str, list[tuple[str, int]]] = {"sentences": [], "pieces of reviews": []}
    for name, by_label in zip(held_out, (texts.sentences, texts.reviews), strict=True):
        for label, given in by_label.items():
            shuffled = draw.sample(given, len(given))
            count = int(HELD_OUT * len(shuffled))
            parts = shuffled[count:], shuffled[:count]
            if name == "pieces of reviews":
                parts = tuple(pieces(part, draw) for part in parts)
            known += [(text, label) for text in parts[0]]
            held_out[name] += [(text, label) for text in parts[1]]
    counts = Counter(feature for text, _ in known for feature in features(text))
    frequent = [f for f, count in counts.most_common(FEATURES) if count >= LEAST_COUNT]
    vocabulary = {feature: number for number, feature in enumerate(frequent)}
    oracle = Oracle(vocabulary, _fit(vocabulary, known))
    accuracy = {}
    for name, cases in held_out.items():
        rewards = oracle.rewards([text for text, _ in cases])
        labels = torch.tensor([label for _, label in cases])
        accuracy[name] = ((rewards > 0).long() == labels).double().mean().item()
    report = {
        "texts": len(known),
        "features": len(vocabulary),
        "held_out": {name: len(cases) for name, cases in held_out.items()},
        "accuracy": accuracy,
    }
    return oracle, report


def _fit(vocabulary: dict[str, int], known: list[tuple[str, int]]) -> Tensor:
    """Weights of the features and a bias."""
    bag = nn.EmbeddingBag(len(vocabulary), 1, mode="sum")
    nn.init.zeros_(bag.weight)
    bias = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.AdamW([bag.weight, bias], lr=LEARNING_RATE, weight_decay=DECAY)
    rows = [[vocabulary[f] for f in features(text) if f in vocabulary] for text, _ in known]
    scales = torch.tensor([scale_of(text) for text, _ in known])
    labels = torch.tensor([float(label) for _, label in known])
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(rows)).split(TEXTS_A_STEP):
            numbers = [rows[row] for row in chosen.tolist()]
            offsets = torch.tensor([0, *map(len, numbers)]).cumsum(0)[:-1]
            flat = torch.tensor([n for row in numbers for n in row], dtype=torch.long)
            scores = bag(flat, offsets).squeeze(-1) / scales[chosen] + bias
            loss = F.binary_cross_entropy_with_logits(scores, labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return torch.cat([bag.weight.detach().squeeze(-1), bias.detach().view(1)])
