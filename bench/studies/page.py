"""The figures of the study's page, written from its JSON between two markers."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studies.claims import NOT_SEEN, SEEN, UNDECIDED, Verdict, judged
from studies.parts import (
    BETAS,
    CELLS,
    CLIP_BETA,
    CLIPS,
    LEARNING_RATES,
    METHODS,
    PARTS,
    QUALITY_BETA,
    QUALITY_LEARNING_RATE,
    Run,
    adadpo,
    dpo,
    method,
)
from studies.readings import (
    CLIP,
    GRID,
    QUALITY,
    SPACE,
    Seed,
    Take,
    best_of_rates,
    last,
    over_seeds,
    seeds_of,
)
from studies.tasks import LONGER_CHOSEN, QUALITIES

START, END = "<!-- study -->\n", "<!-- /study -->\n"


def write(report: dict[str, Any], pictures: dict[str, Path], page: Path) -> None:
    """Replace the text between the page's markers."""
    text = page.read_text(encoding="utf-8") if page.exists() else START + END
    if START not in text or END not in text.split(START, 1)[1]:
        raise SystemExit(f"study: {page} has no {START.strip()} ... {END.strip()}")
    before, rest = text.split(START, 1)
    links = {
        name: Path(os.path.relpath(path, page.parent)).as_posix() for name, path in pictures.items()
    }
    page.write_text(before + section(report, links) + rest.split(END, 1)[1], encoding="utf-8")


def section(report: dict[str, Any], pictures: dict[str, str]) -> str:
    """The text between the markers; `pictures` are links, by part."""
    lines = [*_setting(report), "", *_verdicts(report)]
    for part, make in (("grid", _grid), ("clip", _clip), ("space", _space), ("quality", _quality)):
        if part in report["parts"]:
            lines += ["", *make(report, pictures)]
    return START + "\n" + "\n".join(lines) + "\n\n" + END


def _setting(report: dict[str, Any]) -> list[str]:
    settings, oracle, sizes = report["settings"], report["oracle"], report["settings"]["sizes"]
    versions = ", ".join(
        f"{name} {version}" for name, version in report["versions"].items() if version
    )
    accuracy = ", ".join(
        f"{value:.3f} on {oracle['held_out'][name]:,} held-out {name}"
        for name, value in oracle["accuracy"].items()
    )
    seeds = ", ".join(f"{part} {len(seeds_of(runs))}" for part, runs in report["parts"].items())
    missing = [part for part in PARTS if part not in report["parts"]]
    return [
        (
            f"`{report['command']}` on {report['device']}; {versions}; {report['date'][:10]}; "
            f"{report['runs']} runs took {report['processor_seconds'] / 60:.0f} minutes of processor "
            f"time. Seeds of each part: {seeds}."
            + (f" Not finished, and so not here: {', '.join(missing)}." if missing else "")
        ),
        "",
        (
            f"{settings['model']} in bfloat16. LoRA of rank {settings['lora']['r']} (alpha "
            f"{settings['lora']['alpha']}) on every linear layer of the last {sizes['layers']} "
            f"layers. AdamW, cosine decay after 10% of warm-up, {sizes['pairs_a_step']} pairs a "
            f"step. Sentences: {sizes['pairs']} pairs to train on, {sizes['held_out']} held out, "
            f"{sizes['steps']} steps. A seed draws the pairs, their order and the initial adapter."
        ),
        "",
        (
            f"True reward: a logistic regression on the {oracle['features']:,} most frequent features (a "
            f"word, or two in a row), trained on {oracle['texts']:,} texts; accuracy {accuracy}. The reward is "
            "6 (p - 0.5), p the probability of a positive text."
        ),
    ]


def _verdicts(report: dict[str, Any]) -> list[str]:
    verdicts = judged(report)
    lines = [
        "## The claims",
        "",
        (
            f"Of {len(verdicts)} comparisons, "
            + ", ".join(
                f"{sum(v.word == word for v in verdicts)} are {word}"
                for word in (SEEN, NOT_SEEN, UNDECIDED)
            )
            + ". AdaDPO is compared with DPO at the same learning rate and beta; MADPO's methods on the "
            "same data. A difference is positive where the claim holds. *Holds in* counts cells (of the "
            "grid, or qualities of data) and seeds. True reward without a word beside it is the mean of "
            "greedy and sampled continuations."
        ),
        "",
        "| claim | where | compared here | mean ± std over seeds | verdict |",
        "|---|---|---|---|---|",
    ]
    return lines + [_verdict(verdict) for verdict in verdicts]


def _verdict(verdict: Verdict) -> str:
    claim = verdict.claim
    return (
        f"| {claim.text} | {claim.source} | {claim.compared} | {verdict.numbers} "
        f"| **{verdict.word}** |"
    )


def _cell(report: dict[str, Any], part: str, take: Callable[[Seed, Any], float], of: Any) -> str:
    return _spread(over_seeds(report["parts"][part], take, of))


def _before(data: dict[str, Any], how: str) -> str:
    """The true reward of the fine-tuned policy."""
    return _spread([each["before"][how]["reward"] for each in data.values()])


def _spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    mean = statistics.fmean(values)
    digits = 3 if abs(mean) < 1 else 2
    text = f"{mean:.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):.{digits}f}"


def _header(first: list[str], columns: list[tuple[str, Take]]) -> list[str]:
    names = [*first, *(name for name, _ in columns)]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _picture(pictures: dict[str, str], name: str, text: str) -> list[str]:
    return ["", f"![{text}]({pictures[name]})"]


def _grid(report: dict[str, Any], pictures: dict[str, str]) -> list[str]:
    sizes = report["settings"]["sizes"]
    lines = [
        "## AdaDPO against DPO",
        "",
        (
            f"Of the training pairs {LONGER_CHOSEN:.0%} have the longer sentence as the chosen one, "
            "of the held-out pairs one half. A training pair's numbers are those of its latest step, "
            "before the update. Changes of log-probs are in nats, sums over a response. *Length* is the "
            "correlation of rho_w - rho_l with n_w - n_l. "
            f'{sizes["samples"]} continuations of "Movie review:" are judged, of at most '
            f"{sizes['new_tokens']} tokens."
        ),
        *_picture(pictures, "grid", "AdaDPO and DPO over beta"),
        *_picture(pictures, "curves", "Curves of AdaDPO and DPO over steps"),
        "",
        *_header(["learning rate", "beta", "objective"], GRID),
    ]
    for rate, beta in CELLS:
        for label, make in (("DPO", dpo), ("AdaDPO", adadpo)):
            cells = [_cell(report, "grid", take, make(beta, rate)) for _, take in GRID]
            lines.append(f"| {rate:g} | {beta:g} | {label} | {' | '.join(cells)} |")
    return [*lines, "", *_in_words(report)]


def _in_words(report: dict[str, Any]) -> list[str]:
    """What the table says, in ranges."""

    def span(take: Take, of: list[Run], form: str = "+.1f") -> str:
        means = [statistics.fmean(over_seeds(report["parts"]["grid"], take, run)) for run in of]
        return " to ".join(dict.fromkeys(f"{end:{form}}" for end in (min(means), max(means))))

    chosen, rejected = last("chosen_change", "train"), last("rejected_change", "train")
    coefficient = last("coefficient", "train")
    runs = [make(beta, rate) for rate, beta in CELLS for make in (dpo, adadpo)]
    lines = [
        "In ranges over the rows, each a mean over seeds:",
        "",
        (
            f"- Reward accuracy ends at {span(last('reward_accuracy', 'train'), runs, '.3f')} on "
            f"training pairs and at {span(last('reward_accuracy'), runs, '.3f')} on held-out pairs."
        ),
    ]
    for rate in LEARNING_RATES:
        plain, adaptive = ([make(beta, rate) for beta in BETAS] for make in (dpo, adadpo))
        lines.append(
            f"- At learning rate {rate:g} DPO changes the log-probs of training responses by "
            f"{span(chosen, plain)} nats (chosen) and {span(rejected, plain)} (rejected), AdaDPO by "
            f"{span(chosen, adaptive)} and {span(rejected, adaptive)}. AdaDPO's coefficient of chosen "
            f"responses ends at {span(coefficient, adaptive, '.2f')} times beta; the clip is 2."
        )
    return lines


def _clip(report: dict[str, Any], pictures: dict[str, str]) -> list[str]:
    lines = [
        "## The clip C",
        "",
        (
            f"beta = {CLIP_BETA:g}; each number is the better of the learning rates "
            f"{' and '.join(f'{rate:g}' for rate in LEARNING_RATES)}, as in AdaDPO's Table 2."
        ),
        *_picture(pictures, "clip", "Results over the clip C"),
        "",
        *_header(["C"], CLIP),
    ]
    for clip in CLIPS:
        cells = [_cell(report, "clip", best_of_rates(take), clip) for _, take in CLIP]
        lines.append(f"| {clip:g} | {' | '.join(cells)} |")
    return lines


def _space(report: dict[str, Any], pictures: dict[str, str]) -> list[str]:
    lines = [
        "## Ratio space and policy space",
        *_picture(pictures, "space", "Ratio space and policy space over the grid"),
        "",
        *_header(["learning rate", "beta", "space"], SPACE),
    ]
    for rate, beta in CELLS:
        for space in ("ratio", "policy"):
            run = adadpo(beta, rate, space=space)
            cells = [_cell(report, "space", take, run) for _, take in SPACE]
            lines.append(f"| {rate:g} | {beta:g} | {space} | {' | '.join(cells)} |")
    return lines


def _quality(report: dict[str, Any], pictures: dict[str, str]) -> list[str]:
    sizes, data = report["settings"]["sizes"], report["data"]
    lines = [
        "## MADPO's pipeline",
        "",
        (
            "As in the paper, each thing far smaller: supervised fine-tuning on positive reviews, "
            f"{sizes['sft_steps']} steps of {sizes['sft_rows']}; two continuations of "
            f"{sizes['new_tokens']} tokens of each negative review; three qualities of data from these "
            "and the real reviews; a choice by the true reward with Gumbel noise; a reward model for "
            "each quality, stopped early; two epochs of each method on the same "
            f"{sizes['quality_pairs']} pairs; {sizes['quality_prompts']} prompts held out, which the "
            f"policies continue. beta = {QUALITY_BETA:g}, learning rate "
            f"{QUALITY_LEARNING_RATE:g}."
        ),
        "",
        "| method | hyper-parameters |",
        "|---|---|",
    ]
    for name in METHODS:
        objective = method(QUALITIES[0], name).build()
        lines.append(f"| {name} | `{type(objective).__name__}({objective.extra_repr()})` |")
    statistics_of = [
        ("true margin, mean", lambda d: d["true_margin"]["mean"]),
        ("std", lambda d: d["true_margin"]["std"]),
        ("choices the oracle agrees with", lambda d: d["agrees_with_oracle"]),
        ("reward model's held-out accuracy", lambda d: d["reward_accuracy"]),
        ("its margins: 5%", lambda d: d["margin"]["q05"]),
        ("median", lambda d: d["margin"]["q50"]),
        ("95%", lambda d: d["margin"]["q95"]),
    ]
    lines += [
        "",
        "| data, mean over seeds | " + " | ".join(name for name, _ in statistics_of) + " |",
        "|---" * (len(statistics_of) + 1) + "|",
    ]
    for quality in QUALITIES:
        cells = [
            f"{statistics.fmean(take(each) for each in data[quality].values()):.2f}"
            for _, take in statistics_of
        ]
        lines.append(f"| {quality} quality | {' | '.join(cells)} |")
    lines += [
        *_picture(pictures, "quality", "True reward of MADPO's methods by quality"),
        "",
        *_header(
            ["true reward"], [(f"{q}, {how}", take) for q in QUALITIES for how, take in QUALITY]
        ),
    ]
    for name in METHODS:
        cells = [
            _cell(report, "quality", take, method(quality, name))
            for quality in QUALITIES
            for _, take in QUALITY
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines
