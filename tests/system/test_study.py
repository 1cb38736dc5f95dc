"""The study of the papers' claims, end to end on a tiny model: runs, JSON, pictures, page."""

from __future__ import annotations

import csv
import json
import math
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console

from support import tiny

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")

ROOT = Path(__file__).parent.parent.parent

import study
from prefkern.objectives import Pairs, build
from studies import claims, page
from studies import oracle as oracles
from studies import study as studies
from studies.measures import measure
from studies.oracle import Oracle
from studies.parts import CELLS, PARTS, adadpo, dpo
from studies.policy import IGNORED, Policy
from studies.reviews import GAP, Texts, draw_pairs, load
from studies.tasks import LONGER_CHOSEN, QUALITIES, Sizes, qualities, sentences

SEEDS = 2
SIZES = {
    "layers": 1,
    "pairs": 8,
    "held_out": 4,
    "steps": 2,
    "quality_pairs": 4,
    "quality_prompts": 2,
    "pairs_a_step": 4,
    "evaluations": 2,
    "samples": 2,
    "new_tokens": 3,
    "sft_steps": 1,
    "sft_rows": 2,
    "reward_epochs": 1,
}
ADJECTIVES = {1: ["good", "fine"], 0: ["bad", "poor"]}
NEUTRAL = ["film", "plot", "actor", "is", "was", "the", "a", "very"]


def text(label: int, words: int, draw: random.Random) -> str:
    chosen = [draw.choice(ADJECTIVES[label] if n % 3 == 0 else NEUTRAL) for n in range(words)]
    return " ".join(chosen)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    """A file of sentences and reviews whose sentiment shows in two adjectives each."""
    draw = random.Random(0)
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label", "source"])
        for label in (0, 1):
            for _ in range(120):
                rows.writerow([text(label, draw.randint(5, 16), draw), label, "rotten_tomatoes"])
            for _ in range(60):
                rows.writerow([text(label, draw.randint(30, 50), draw), label, "imdb"])
    return path


@pytest.fixture(scope="module")
def texts(reviews) -> Texts:
    return load(reviews)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def policy(model) -> Policy:
    return Policy(str(model), 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def oracle(texts) -> Oracle:
    return oracles.train(texts)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, reviews) -> Path:
    """A study of every part."""
    folder = tmp_path_factory.mktemp("study")
    study.main(arguments(folder, model, reviews))
    return folder


def arguments(folder: Path, model: Path, reviews: Path) -> list[str]:
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    given = ["--model", str(model), "--reviews", str(reviews), "--seeds", str(SEEDS)]
    return [*given, "--output", str(folder), *sizes]


@pytest.fixture
def made(folder, model, reviews):
    """The same study once more, or one with other sizes."""

    def make(**sizes: int) -> studies.Study:
        given = Sizes(**{**SIZES, **sizes})
        return studies.Study(str(model), reviews, given, folder, "a test", Console(quiet=True))

    return make


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "study.json").read_text())


def test_pairs_differ_in_length_as_often_as_wanted(texts):
    for share in (0.5, 0.75):
        pairs = draw_pairs(texts, 24, share, random.Random(1))
        gaps = [len(chosen.split()) - len(rejected.split()) for chosen, rejected in pairs]
        assert sum(gap > 0 for gap in gaps) == 24 * share
        assert all(abs(gap) >= GAP for gap in gaps)
        assert all(c in texts.sentences[1] and r in texts.sentences[0] for c, r in pairs)
        assert len({each for pair in pairs for each in pair}) == 48
    with pytest.raises(SystemExit, match="only sentences for"):
        draw_pairs(texts, 1000, 0.5, random.Random(1))


def test_the_oracle_tells_texts_that_it_was_not_trained_on(texts, monkeypatch):
    monkeypatch.setattr(oracles, "EPOCHS", 60)
    oracle, told = oracles.train(texts)
    assert min(told["accuracy"].values()) > 0.9
    good, bad = oracle.rewards(["the film is very good fine", "the film is very bad poor"]).tolist()
    assert -3 < bad < -0.5 and 0.5 < good < 3
    assert oracle.rewards(["unheard of"]).abs().item() < 1


def test_the_trained_layers_give_what_the_whole_model_gives(policy):
    texts = [("the film", " was very good"), ("a", " bad"), ("the actor is", " fine the plot")]
    rows = policy.rows(texts, end=True)
    assert rows.lengths.tolist() == [4, 2, 4]

    def whole() -> list[float]:
        found = []
        for prompt, response in texts:
            ids = policy.tokenizer(prompt + response).input_ids + [policy.tokenizer.eos_token_id]
            start = len(policy.tokenizer(prompt).input_ids)
            with torch.no_grad():
                logps = policy.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            found.append(sum(logps[t - 1, ids[t]].item() for t in range(start, len(ids))))
        return found

    policy.reset(0)
    first = policy.sums(rows)
    assert first.tolist() == pytest.approx(whole(), abs=0.15)  # bfloat16
    # A trained adapter changes both alike, and another one starts where the first did.
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    assert policy.sums(rows).tolist() == pytest.approx(whole(), abs=0.15)
    assert (policy.sums(rows) - first).abs().max() > 1
    policy.reset(1)
    assert torch.equal(policy.sums(rows), first)


def test_rows_are_cut_where_nothing_is_scored(policy):
    rows = policy.rows([("a", " good film"), ("a", " bad")], end=False)
    short = rows.take(torch.tensor([1]))
    assert short.labels.shape == (1, 1) and short.states.shape[:2] == (1, 1)
    assert rows.take(torch.tensor([1]), more=1).labels.tolist()[0][1] == IGNORED
    assert torch.equal(policy.sums(rows)[1], policy.sums(short)[0])


def test_sentences_share_none_and_training_pairs_carry_the_length(policy, texts):
    sizes = Sizes(**{**SIZES, "pairs": 16})
    task = sentences(policy, texts, sizes, 0)
    chosen, rejected = task.train.rows.lengths.view(2, -1)
    assert (chosen > rejected).double().mean().item() == LONGER_CHOSEN
    chosen, rejected = task.held_out.rows.lengths.view(2, -1)
    assert (chosen > rejected).double().mean().item() == 0.5
    other = sentences(policy, texts, sizes, 1)
    assert not torch.equal(task.train.reference, other.train.reference)
    # The reference has no part in what a run has trained.
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    again = sentences(policy, texts, sizes, 0)
    assert torch.equal(task.train.reference, again.train.reference)


def test_qualities_are_made_as_madpo_makes_them(policy, texts, oracle, monkeypatch):
    sizes = Sizes(**{**SIZES, "quality_pairs": 40, "quality_prompts": 8, "new_tokens": 4})
    count = 48
    made = [f"{'good' if (n + n // count) % 2 else 'very'} film {n}" for n in range(2 * count)]
    monkeypatch.setattr(policy, "generate", lambda *args, **options: (made, [4] * len(made)))
    seen = {}
    from studies import tasks

    original = tasks.pair_set

    def watched(policy, prompts, pairs, ends):
        seen.setdefault("pairs", []).append(pairs)
        return original(policy, prompts, pairs, ends)

    monkeypatch.setattr(tasks, "pair_set", watched)
    # Rewards near the ends of their range, so that noise seldom turns a choice.
    oracle = Oracle(oracle.vocabulary, 20 * oracle.weights)
    found = qualities(policy, texts, oracle, sizes, 0)
    assert [*found] == [*QUALITIES]
    generated = set(made)
    by_quality = [seen["pairs"][n] + seen["pairs"][n + 1] for n in (0, 2, 4)]
    shares = [
        sum(any(each not in generated for each in pair) for pair in pairs) for pairs in by_quality
    ]
    assert shares == [0, count // 2, count]
    # Of the two generated responses a mixed pair has the better one.
    for pair in by_quality[2]:
        (kept,) = [each for each in pair if each in generated]
        number = made.index(kept)
        rewards = oracle.rewards([kept, made[(number + count) % (2 * count)]])
        assert rewards[0] >= rewards[1]
    for quality in QUALITIES:
        task = found[quality]
        assert len(task.train) == 40 and len(task.held_out) == 8 == len(task.prompts)
        assert task.train.margins.isfinite().all() and task.train.margins.std() > 0
    assert 0.8 < found["low"].report["agrees_with_oracle"] <= 1
    assert found["low"].prompts == found["high"].prompts


def test_measures_are_those_of_their_names():
    pairs = Pairs(
        torch.tensor([-10.0, -12.0, -9.0, -20.0]),
        torch.tensor([-14.0, -11.0, -12.0, -22.0]),
        torch.tensor([-12.0, -12.0, -12.0, -12.0]),
        torch.tensor([-12.0, -12.0, -12.0, -12.0]),
        torch.tensor([5, 4, 9, 6]),
        torch.tensor([3, 8, 4, 9]),
    )
    found = measure(build("dpo", beta=0.5), pairs)
    margins = torch.tensor([4.0, -1.0, 3.0, 2.0])
    assert found["log_ratio_margin"] == 2 and found["kl_margin"] == 1 == found["reward_margin"]
    assert found["reward_accuracy"] == found["log_ratio_accuracy"] == 0.75
    assert found["chosen_change"] == -0.75 and found["rejected_change"] == -2.75
    assert found["shorter_accuracy"] == 0.5 and found["length_bias"] == 0.5
    longer = torch.tensor([2.0, -4.0, 5.0, -3.0])
    expected = torch.corrcoef(torch.stack([margins, longer]))[0, 1].item()
    assert found["length_correlation"] == pytest.approx(expected, abs=1e-6)
    assert found["chosen_share"] == 0.5 and found["coefficient"] == 1
    assert found["log_balance"] == pytest.approx(-2.5)  # median of L_l - L_w: -4, 1, -3, -2
    assert found["loss"] == pytest.approx(
        -torch.nn.functional.logsigmoid(margins / 2).mean().item()
    )
    ada = measure(build("adadpo", beta=0.5, clip=None), pairs)
    assert ada["coefficient"] > 1 and ada["chosen_share"] > 0.5
    # Equal models: every pair ties.
    tied = Pairs(*[torch.tensor([-3.0, -4.0])] * 4, torch.tensor([2, 3]), torch.tensor([3, 2]))
    found = measure(build("dpo"), tied)
    assert found["reward_accuracy"] == 0 and found["shorter_accuracy"] == 0.5
    assert found["length_correlation"] == found["length_bias"] == 0


@pytest.mark.parametrize(
    ("cells", "word"),
    [
        ([[0.3]], claims.UNDECIDED),
        ([[0.3], [0.31]], claims.SEEN),
        ([[-0.3], [-0.31]], claims.NOT_SEEN),
        ([[0.3], [-0.01]], claims.UNDECIDED),
        ([[0.1], [0.9]], claims.UNDECIDED),
        ([[0.3], [0.3], [0.3]], claims.SEEN),
        ([[0.0], [0.0]], claims.UNDECIDED),
        ([[0.9, 0.1, -0.1], [0.9, 0.1, -0.1]], claims.SEEN),
        # One cell outweighs the others.
        ([[0.9, -0.1, -0.1], [0.9, -0.1, -0.1]], claims.UNDECIDED),
        ([[-0.9, 0.1, 0.1], [-0.9, 0.1, 0.1]], claims.UNDECIDED),
    ],
)
def test_a_claim_needs_every_seed_more_than_the_spread_and_most_cells(cells, word):
    assert claims.word_of(cells) == word


def test_less_than_the_best_of_several_decides_nothing():
    """Of equal things each is below the best of the others, by their noise."""
    assert claims.word_of([[-0.3], [-0.31]], with_extreme=True) == claims.UNDECIDED
    assert claims.word_of([[0.3], [0.31]], with_extreme=True) == claims.SEEN
    several = {claim.text for claim in claims.CLAIMS if claim.with_extreme}
    assert several == {
        "C = 2 is the best clip",
        "MADPO has the highest reward of the four methods",
        "IPO is the worst of the four methods",
    }


@pytest.mark.parametrize(
    ("numbers", "word"),
    [
        ([0.01, -0.02], claims.SEEN),
        ([0.05, 0.051], claims.NOT_SEEN),
        ([0.05, -0.05], claims.UNDECIDED),
        ([0.01, 0.05], claims.UNDECIDED),
        ([0.01], claims.UNDECIDED),
    ],
)
def test_a_claim_of_equality_needs_every_seed_within_its_bound(numbers, word):
    assert claims.word_of([[number] for number in numbers], equal_within=0.02) == word


@pytest.mark.long
def test_every_run_of_every_part_is_there_and_finite(report):
    assert {*report["parts"]} == {*PARTS}
    for part, runs in PARTS.items():
        assert {*report["parts"][part]} == {run.key for run in runs}
        for seeds in report["parts"][part].values():
            assert [*seeds] == [str(seed) for seed in range(SEEDS)]
            for run in seeds.values():
                for curves in run["curves"].values():
                    for values in curves.values():
                        assert len(values) == len(run["steps"]) == SIZES["evaluations"] + 1
                        assert all(map(math.isfinite, values))
    shared = {run.key for run in PARTS["grid"]} & {run.key for run in PARTS["clip"]}
    assert len(shared) == 2
    keys = {run.key for runs in PARTS.values() for run in runs}
    assert report["runs"] == SEEDS * len(keys) == SEEDS * 54
    # The policy before training writes the same for each quality of data.
    assert {*report["data"]} == {*QUALITIES}
    for seed in ("0", "1"):
        before = [report["data"][quality][seed]["before"] for quality in QUALITIES]
        assert before[0] == before[1] == before[2] and {*before[0]} == {"greedy", "sampled"}


@pytest.mark.long
def test_runs_begin_at_the_reference_and_move(report):
    for run in (make(beta, rate) for rate, beta in CELLS for make in (dpo, adadpo)):
        finals = set()
        for each in report["parts"]["grid"][run.key].values():
            for curves in each["curves"].values():
                assert curves["loss"][0] == pytest.approx(math.log(2), abs=1e-5)
                assert curves["log_ratio_margin"][0] == 0
            finals.add(each["curves"]["held_out"]["chosen_change"][-1])
        assert len(finals) == SEEDS and 0 not in finals


@pytest.mark.long
def test_the_claims_are_judged_on_the_runs_numbers(report):
    verdicts = claims.judged(report)
    assert len(verdicts) == len(claims.CLAIMS)
    for verdict in verdicts:
        seeds = [claims.Seed(report["parts"][verdict.claim.part], str(s)) for s in range(SEEDS)]
        cells = [*map(verdict.claim.differences, seeds)]
        assert verdict.word == claims.word_of(cells, verdict.claim.equal_within)
        assert verdict.of == sum(map(len, cells))
    (figure,) = [v for v in verdicts if v.claim.source == "AdaDPO, Figure 3a"]
    for seed in range(SEEDS):
        by_hand = [
            report["parts"]["grid"][run.key][str(seed)]["curves"]["held_out"]["loss"][-1]
            for rate, beta in CELLS
            for run in (dpo(beta, rate), adadpo(beta, rate))
        ]
        expected = sum(by_hand[::2]) / 8 - sum(by_hand[1::2]) / 8
        assert figure.by_seed[seed] == pytest.approx(expected)
    assert figure.of == 8 * SEEDS
    # A part without runs has no verdicts.
    alone = {**report, "parts": {"clip": report["parts"]["clip"]}}
    assert {v.claim.part for v in claims.judged(alone)} == {"clip"}


@pytest.mark.long
def test_nothing_is_done_twice(made, report, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a finished run was repeated")

    monkeypatch.setattr(studies.training, "train", refuse)
    monkeypatch.setattr(studies.Study, "_task", refuse)
    again = made()
    again.conduct([*PARTS], SEEDS)
    assert again.report(SEEDS)["parts"] == report["parts"]
    # Other settings are other runs, of which none is there.
    other = made(steps=3)
    assert other.report(SEEDS)["parts"] == {}
    with pytest.raises(AssertionError, match="repeated"):
        other.conduct(["grid"], 1)


@pytest.mark.long
def test_a_run_is_determined_by_its_seed_and_a_part_needs_all_its_runs(folder, made, report):
    run = PARTS["space"][1]
    (folder / f"runs/{run.key}-seed1.json").unlink()
    partial = made().report(SEEDS)
    assert [*partial["parts"]["space"][run.key]] == ["0"]
    assert [*partial["parts"]["clip"][PARTS["clip"][0].key]] == ["0", "1"]
    again = made()
    again.conduct(["space"], SEEDS)
    assert again.report(SEEDS)["parts"] == report["parts"]


@pytest.mark.long
def test_pictures_and_page(folder, report):
    source, written = folder / "study.json", folder / "page.md"
    names = ("grid", "curves", "clip", "space", "quality")
    pictures = [folder / f"study-{name}.png" for name in names]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    pictures[0].unlink()
    written.write_text(f"above\n\n{page.START}stale\n{page.END}\nbelow\n")
    study.main(["--draw-only", str(source), "--page", str(written)])
    assert pictures[0].stat().st_size > 10_000
    found = written.read_text()
    assert found.startswith("above\n") and found.endswith("\nbelow\n") and "stale" not in found
    assert all(f"](study-{name}.png)" in found for name in names)
    assert all(verdict.numbers in found for verdict in claims.judged(report))
    # A part without runs is not on the page.
    alone = {**report, "parts": {"clip": report["parts"]["clip"]}}
    text = page.section(alone, {"clip": "clip.png"})
    assert "## The clip C" in text and "## MADPO" not in text and "Figure 3" not in text


def test_the_page_has_the_figures_of_its_file():
    report = json.loads((ROOT / "bench/results/study-cpu.json").read_text())
    drawn = {
        name: f"results/study-cpu-{name}.png"
        for name, part in (("grid", "grid"), ("curves", "grid"), *((p, p) for p in [*PARTS][1:]))
        if part in report["parts"]
    }
    assert all((ROOT / "bench" / link).exists() for link in drawn.values())
    assert page.section(report, drawn) in (ROOT / "bench/STUDY.md").read_text()
