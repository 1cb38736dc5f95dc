"""The papers' recipes: each is started on a tiny stand-in for its model and data."""

from __future__ import annotations

import json
import os
import random
import runpy
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")

import prefkern
from prefkern.cli import __main__ as cli
from prefkern.cli import train
from prefkern.objectives import DPO, MADPO, AlphaDPO

RECIPES = Path(__file__).parent.parent.parent / "examples" / "recipes"
MADPO_RECIPE = RECIPES / "madpo-gemma-3-270m"
# A step or two, wherever the tests run.
SHORT = ["--max_steps", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]
SHORT += ["--save_strategy", "no", "--logging_steps", "1"]


def _save_model(folder: Path, family: str, **options) -> str:
    tiny.model(family, **options).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def _write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def _conversations(count: int) -> list[dict]:
    """Rows as in the hub's UltraFeedback: the question as text, and both whole conversations."""

    def answered(row: dict, side: str) -> list[dict]:
        question = {"role": "user", "content": row["prompt"]}
        return [question, {"role": "assistant", "content": row[side].strip()}]

    return [
        {
            "prompt": row["prompt"],
            **{side: answered(row, side) for side in ("chosen", "rejected")},
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        }
        for row in tiny.pairs(count)
    ]


LLAMA = {
    "adadpo-llama-3-8b.yaml": (DPO, {"beta": 0.01}, 5e-7),
    "alphadpo-llama-3-8b.yaml": (AlphaDPO, {"beta": 10.0, "gamma": 4.0, "alpha": 0.05}, 1e-6),
}


@pytest.mark.parametrize("name", LLAMA)
def test_llama(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    kind, options, learning_rate = LLAMA[name]
    argv = [
        str(RECIPES / name),
        *("--model", _save_model(tmp_path / "model", "Llama")),
        *("--dataset", _write(tmp_path / "pairs.jsonl", _conversations(32))),
        *SHORT,
    ]
    _, _, _, config = train.parse(argv)
    objective = config.build_objective()
    assert type(objective) is kind
    assert {option: getattr(objective, option) for option in options} == options
    if kind is DPO:
        assert (objective.adaptive.clip, objective.adaptive.exponent) == (2.0, "length")
    assert config.learning_rate == learning_rate
    # The recipes' eight GPUs.
    assert 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps == 128
    assert (config.lr_scheduler_type, config.get_warmup_steps(480)) == ("cosine", 48)
    assert (config.max_length, config.num_train_epochs, config.bf16) == (2048, 1, True)

    assert cli.main(["train", *argv]) == 0
    state = json.loads((tmp_path / name.removesuffix(".yaml") / "trainer_state.json").read_text())
    logs = [log for log in state["log_history"] if "rewards/margins" in log]
    assert len(logs) == 2 and all(log["grad_norm"] > 0 for log in logs)
    assert prefkern.last_plan().trains_head


@pytest.fixture
def imdb(tmp_path, monkeypatch):
    """A folder to work in: a tiny Gemma, an oracle and reviews, negative ones first as in IMDB."""
    monkeypatch.chdir(tmp_path)
    # Of the tokenizer's words alone: any other that it sampled would be a response without text.
    _save_model(tmp_path / "gemma", "Gemma3Text", vocab_size=len(tiny.tokenizer()))
    torch.manual_seed(0)
    oracle = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            vocab_size=tiny.VOCAB_SIZE,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=600,
            pad_token_id=0,
            initializer_range=1.0,
            id2label={0: "negative", 1: "neutral", 2: "positive"},
        )
    )
    oracle.save_pretrained(tmp_path / "oracle")
    tiny.tokenizer().save_pretrained(tmp_path / "oracle")
    draw = random.Random(0)
    reviews = [
        {"text": " ".join(draw.choices(tiny.WORDS, k=draw.randint(8, 20))), "label": row // 20}
        for row in range(40)
    ]
    _write(tmp_path / "reviews.jsonl", reviews)
    return tmp_path


def _pairs(quality: str, output: str, model: str = "madpo/sft", **options) -> None:
    given = {
        "model": model,
        "oracle": "oracle",
        "reviews": "reviews.jsonl",
        "split": "train[:20]",
        "quality": quality,
        "held_out": 4,
        "prompt_words": 4,
        "new_tokens": 5,
        "output": output,
        **options,
    }
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    runpy.run_path(str(MADPO_RECIPE / "2-pairs.py"))["main"](argv)


def _read(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_madpos_four_stages(imdb, capsys):
    """In order, in one folder; each reads what the one before has written."""
    sft = pytest.importorskip("trl.scripts.sft")
    # `trl sft --config`: its data cannot be replaced by flags.
    recipe = yaml.safe_load((MADPO_RECIPE / "1-sft.yaml").read_text())
    assert recipe["datasets"][0]["path"] == "stanfordnlp/imdb"
    recipe["datasets"][0] |= {"path": "json", "data_files": "reviews.jsonl", "split": "train[-20:]"}
    (imdb / "sft.yaml").write_text(yaml.safe_dump(recipe))
    flags = ["--config", "sft.yaml", "--model_name_or_path", "gemma", *SHORT, "--bf16", "false"]
    sft.main(*sft.make_parser().parse_args_and_config(flags, fail_with_unknown_args=True))
    runpy.run_path(str(MADPO_RECIPE / "merge.py"))["main"]("madpo/sft-adapter", "madpo/sft")
    before = transformers.AutoModelForCausalLM.from_pretrained("gemma").state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained("madpo/sft").state_dict()
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    _pairs("high", "madpo")
    margins = [str(MADPO_RECIPE / "3-margins.yaml"), "--model_name_or_path", "gemma"]
    short = [word for word in SHORT if word not in ("--save_strategy", "no")]
    assert cli.main(["margins", *margins, *short]) == 0
    assert [row["prompt"] for row in _read("madpo/margins.jsonl")] == [
        row["prompt"] for row in _read("madpo/train.jsonl")
    ]

    argv = [str(MADPO_RECIPE / "4-train.yaml"), *SHORT]
    _, _, lora, config = train.parse(argv)
    objective = config.build_objective()
    assert isinstance(objective, MADPO) and lora.lora_r
    assert (objective.beta, objective.tau, objective.c_max, objective.lam) == (0.1, 7.0, 4.0, 1.0)
    assert objective.c_min == pytest.approx(1 / 4)
    assert config.num_train_epochs == 2
    capsys.readouterr()
    assert cli.main(["train", *argv]) == 0
    assert "train: 16 pairs" in capsys.readouterr().out
    assert prefkern.last_plan().structure in ("forward", "one_pass")
    state = json.loads(Path("madpo/policy/trainer_state.json").read_text())
    assert all("madpo/weight" in log for log in state["log_history"] if "loss" in log)


def test_pairs_of_each_quality(imdb):
    reviews = _read("reviews.jsonl")[:20]
    # A prompt is the beginning of a review, of which the rest is the real, negative response.
    ends = {
        " ".join(words[:at]): " " + " ".join(words[at:])
        for words in (review["text"].split() for review in reviews)
        for at in [min(4, len(words) // 2)]
    }
    prompts = []
    for quality, share in (("high", 0), ("medium", 10), ("low", 20)):
        _pairs(quality, quality, model="gemma")
        held_out, rows = _read(f"{quality}/eval.jsonl"), _read(f"{quality}/train.jsonl")
        assert (len(rows), len(held_out)) == (16, 4)
        rows += held_out
        prompts.append([row["prompt"] for row in rows])
        real = [ends[row["prompt"]] in (row["chosen"], row["rejected"]) for row in rows]
        assert sum(real) == share
        assert all(abs(row["true_margin"]) <= 6 for row in rows)
        # Choices are noisy, and not at random.
        assert 10 < sum(row["true_margin"] > 0 for row in rows) <= 20
        if quality == "medium":
            first_half = {" ".join(review["text"].split()[:4]) for review in reviews[:10]}
            kept = {row["prompt"] for row, is_real in zip(rows, real, strict=True) if is_real}
            assert kept <= {p for p in ends if any(f.startswith(p) for f in first_half)}
    # The same order, and so the same prompts to train on, whatever the quality.
    assert prompts[0] == prompts[1] == prompts[2]
    assert prompts[0] != [*ends]


def test_rewards_are_the_oracles(imdb):
    script = runpy.run_path(str(MADPO_RECIPE / "2-pairs.py"))
    args = type("Args", (), {"oracle": "oracle", "batch": 3})()
    texts = [" very good", " bad film bad plot", " the actor is fine", " a"]
    rewards = script["oracle"](texts, args)
    model = transformers.AutoModelForSequenceClassification.from_pretrained("oracle").eval()
    for text, reward in rewards.items():
        ids = torch.tensor([tiny.tokenizer()(text)["input_ids"]])
        positive = model(ids).logits.softmax(-1)[0, 2].item()
        assert reward == pytest.approx(6 * (positive - 0.5), abs=1e-5)
    assert [*rewards] == texts


def test_stages_are_run_in_order(tmp_path):
    """The calls of `run.sh`; stand-ins for the programs record their arguments."""
    for name in ("trl", "python", "prefkern"):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> "$CALLS"\n')
        program.chmod(0o755)
    calls = tmp_path / "calls"
    subprocess.run(
        ["bash", str(MADPO_RECIPE / "run.sh"), "--quality", "low"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)},
        check=True,
    )
    here = MADPO_RECIPE
    assert calls.read_text().splitlines() == [
        f"trl sft --config {here}/1-sft.yaml",
        f"python {here}/merge.py madpo/sft-adapter madpo/sft",
        f"python {here}/2-pairs.py --model madpo/sft --output madpo --quality low",
        f"prefkern margins {here}/3-margins.yaml",
        f"prefkern train {here}/4-train.yaml",
    ]
    stages = {
        stage: yaml.safe_load(next(here.glob(f"{stage}-*.yaml")).read_text()) for stage in "134"
    }
    assert stages["1"]["output_dir"] == "madpo/sft-adapter"
    assert stages["3"]["dataset"] == "madpo/train.jsonl"
    assert stages["3"]["eval_dataset"] == "madpo/eval.jsonl"
    assert stages["4"]["dataset"] == stages["3"]["output"]
    assert stages["4"]["model_name_or_path"] == "madpo/sft"
