"""MADPO's stage 2 (Section 5.1): preference pairs with a known reward, from an SFT model.

    python 2-pairs.py --model madpo/sft --output madpo --quality high

The model continues the beginnings of 12,000 negative reviews, twice each. With quality `high`, both
responses of a pair are such generations. With `low`, one is the better generation and the other is
the review's own, negative, end. With `medium`, the first half of the reviews is as in `low` and the
rest as in `high`.

The oracle is a sentiment classifier. It gives each response a reward of 6 (p - 0.5), where p is its
probability of being positive. Gumbel noise is added to both rewards, and the higher one is chosen:
this is the Bradley-Terry model. Rows are shuffled, in the same order for all qualities. The first
10,000 are for training, the others are held out.

The paper does not say how long the beginning of a review is, how many tokens the model generates,
at what temperature, or which negative review is paired with a generation. The choices here are 32
words, up to 64 tokens, temperature 1, and the review that the prompt comes from.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

# The share of reviews whose pair has a generation against the review's own end.
REAL_SHARE = {"high": 0.0, "medium": 0.5, "low": 1.0}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Preference pairs with a known reward.")
    parser.add_argument("--model", required=True, help="the SFT model")
    parser.add_argument("--oracle", default="cardiffnlp/twitter-roberta-base-sentiment-latest")
    parser.add_argument("--reviews", default="stanfordnlp/imdb", help="hub name, or JSONL of text")
    # The training set has its 12,500 negative reviews first.
    parser.add_argument("--split", default="train[:12000]")
    parser.add_argument("--quality", choices=REAL_SHARE, default="high")
    parser.add_argument("--held_out", type=int, default=2000)
    parser.add_argument("--prompt_words", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", required=True, help="folder for train.jsonl and eval.jsonl")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    if Path(args.reviews).exists():
        files = {"train": args.reviews}
        reviews = datasets.load_dataset("json", data_files=files, split=args.split)
    else:
        reviews = datasets.load_dataset(args.reviews, split=args.split)
    if not 0 < args.held_out < len(reviews):
        parser.error(f"--held_out must be in (0, {len(reviews)}), got {args.held_out}")
    prompts, ends = [], []
    for review in reviews["text"]:
        words = review.split()
        # Short reviews also keep an end.
        at = min(args.prompt_words, len(words) // 2)
        prompts.append(" ".join(words[:at]))
        ends.append(" " + " ".join(words[at:]))

    first, second = continuations(prompts, args)
    with_real = round(REAL_SHARE[args.quality] * len(prompts))
    rewards = oracle([*first, *second, *ends[:with_real]], args)
    noise = torch.distributions.Gumbel(0.0, 1.0).sample((len(prompts), 2)).tolist()
    rows = []
    for row, prompt in enumerate(prompts):
        pair = [first[row], second[row]]
        if row < with_real:
            pair = [max(pair, key=rewards.__getitem__), ends[row]]
        noisy = [rewards[text] + noise[row][side] for side, text in enumerate(pair)]
        chosen, rejected = pair if noisy[0] > noisy[1] else pair[::-1]
        rows.append(
            {
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "true_margin": rewards[chosen] - rewards[rejected],
            }
        )
    random.Random(args.seed).shuffle(rows)
    # A response of white space only has nothing to train on.
    rows = [row for row in rows if row["chosen"].strip() and row["rejected"].strip()]
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    trained = len(rows) - args.held_out
    for name, part in (("train", rows[:trained]), ("eval", rows[trained:])):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    agreed = sum(row["true_margin"] > 0 for row in rows) / len(rows)
    print(f"{len(rows)} pairs in {folder}; in {agreed:.1%} the chosen response has a higher reward")


@torch.no_grad()
def continuations(prompts: list[str], args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Two samples from the model for each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model).to(DEVICE).eval()
    texts: list[str] = []
    for start in range(0, len(prompts), args.batch):
        batch = tokenizer(
            prompts[start : start + args.batch],
            padding=True,
            return_tensors="pt",
            return_token_type_ids=False,
        )
        output: Any = model.generate(
            **batch.to(DEVICE),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=args.new_tokens,
            num_return_sequences=2,
            # A response must not be empty.
            begin_suppress_tokens=tokenizer.all_special_ids,
            pad_token_id=tokenizer.pad_token_id,
        )
        new = output[:, batch["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    # A response begins with the space that separates it from its prompt.
    texts = [" " + text.strip() for text in texts]
    return texts[::2], texts[1::2]


@torch.no_grad()
def oracle(texts: list[str], args: argparse.Namespace) -> dict[str, float]:
    """The reward of each text, in [-3, 3]."""
    tokenizer = AutoTokenizer.from_pretrained(args.oracle)
    model = AutoModelForSequenceClassification.from_pretrained(args.oracle).to(DEVICE).eval()
    labels = {name.lower(): at for at, name in model.config.id2label.items()}
    rewards: list[float] = []
    for start in range(0, len(texts), args.batch):
        batch = tokenizer(
            texts[start : start + args.batch],
            padding=True,
            truncation=True,
            max_length=min(tokenizer.model_max_length, 512),
            return_tensors="pt",
        )
        positive = model(**batch.to(DEVICE)).logits.softmax(-1)[:, labels["positive"]]
        rewards += (6 * (positive - 0.5)).tolist()
    return dict(zip(texts, rewards, strict=True))


if __name__ == "__main__":
    main()
