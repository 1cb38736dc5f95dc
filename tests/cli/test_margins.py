"""Reward models and `prefkern margins`: the loss, padding, training, the file, and its errors."""

from __future__ import annotations

import functools
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from support import tiny
from support.ranks import run_on_two_ranks

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")

from prefkern import PreferenceConfig, data
from prefkern.cli import __main__ as cli
from prefkern.cli import margins
from prefkern.data.collate import PreferenceCollator
from prefkern.training import rewards

PAIRS = 48


@pytest.fixture
def files(tmp_path):
    """A model folder, a file of pairs, and flags that make a short run of them."""
    save_model(tmp_path / "model", tiny.model(), tiny.tokenizer())
    write(tmp_path / "pairs.jsonl", [{**row, "id": i} for i, row in enumerate(tiny.pairs(PAIRS))])
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "pairs.jsonl"),
        "output": str(tmp_path / "margins.jsonl"),
        "output_dir": str(tmp_path / "reward"),
        "use_cpu": True,
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "num_train_epochs": 1,
    }


def save_model(folder: Path, model, tokenizer) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def flags(options: dict) -> list[str]:
    return [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name}", str(value))
    ]


def run(options: dict) -> list[float]:
    """A run that succeeds: its margins."""
    assert cli.main(["margins", *flags(options)]) == 0
    return [row["margin"] for row in read(options["output"])]


def scoring(files: dict, reward_model: str, **changes) -> dict:
    """The flags of a run that scores with an existing model."""
    unused = ("model_name_or_path", "output_dir", "learning_rate", "num_train_epochs")
    kept = {name: value for name, value in files.items() if name not in unused}
    output = str(Path(files["output"]).with_name("again.jsonl"))
    return {**kept, "reward_model": reward_model, "output": output, **changes}


def error(argv: list[str], capsys) -> str:
    """The one line that a failing run prints on stderr."""
    capsys.readouterr()
    assert cli.main(["margins", *argv]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in lines if line.startswith("prefkern margins: ")]
    assert len(lines) == 1
    assert lines[0].startswith("prefkern margins: error: ")
    return lines[0]


def classifier(family: str = "Llama", **options):
    """A random reward model."""
    config = tiny.model(family).config
    config.num_labels = 1
    config.update(options)
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config).eval()


def sequences(tokenizer, rows: list[dict], **options) -> list[tuple[list[int], list[int]]]:
    """Token ids of chosen and rejected with their prompts, as the trainer has them."""
    tokens, _ = data.tokenize_preferences(datasets.Dataset.from_list(rows), tokenizer, **options)
    return [
        (t["prompt_ids"] + t["chosen_ids"], t["prompt_ids"] + t["rejected_ids"]) for t in tokens
    ]


@torch.no_grad()
def plain_margins(model, pairs: list[tuple[list[int], list[int]]]) -> list[float]:
    """By transformers alone, one sequence at a time, without padding."""
    model.eval()
    scores = [[model(torch.tensor([ids])).logits.item() for ids in pair] for pair in pairs]
    return [chosen - rejected for chosen, rejected in scores]


def test_loss_and_gradient_are_bradley_terrys():
    chosen, rejected = torch.randn(2, 64, dtype=torch.float64) * 10
    expected = torch.log1p(torch.exp(rejected - chosen))
    dexpected = -1 / (1 + torch.exp(chosen - rejected))
    for dtype, atol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        r_w, r_l = (r.to(dtype, copy=True).requires_grad_() for r in (chosen, rejected))
        losses = rewards.bradley_terry_loss(r_w, r_l)
        losses.sum().backward()
        torch.testing.assert_close(losses.double(), expected, atol=atol, rtol=1e-5)
        torch.testing.assert_close(r_w.grad.double(), dexpected, atol=atol, rtol=1e-5)
        torch.testing.assert_close(r_l.grad.double(), -dexpected, atol=atol, rtol=1e-5)
    extreme = rewards.bradley_terry_loss(torch.tensor([-500.0, 500.0]), torch.zeros(2))
    assert extreme.tolist() == [500.0, 0.0]


def test_metrics():
    metrics = rewards.pair_metrics(torch.tensor([[2.0, 1.0], [0.0, 0.0], [1.0, 3.0]]))
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["margin"] == pytest.approx(-1 / 3)
    assert metrics["loss"] == pytest.approx((0.313262 + 0.693147 + 2.126928) / 3, abs=1e-6)


def only_eos():
    """A tokenizer such as GPT-2's, with no special token besides the one that ends a text."""
    backend = Tokenizer(models.WordLevel(tiny.tokenizer().get_vocab(), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Roberta"])
@pytest.mark.parametrize("case", ["own pad", "pad is eos", "no pad", "only eos"])
def test_padding_changes_no_reward(family, case):
    """In batches, each sequence scores what transformers gives it alone, at its last token."""
    tokenizer = only_eos() if case == "only eos" else tiny.tokenizer()
    if case in ("pad is eos", "only eos"):
        tokenizer.pad_token = tokenizer.eos_token
    if case == "no pad":
        tokenizer.pad_token = None
    if family == "Roberta":
        config = transformers.RobertaConfig(
            vocab_size=tiny.VOCAB_SIZE,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.2,
            num_labels=1,
        )
        model = AutoModelForSequenceClassification.from_config(config).eval()
    else:
        model = classifier(family)
    rows = tiny.pairs(7)
    tokens, _ = rewards.tokenize_for_rewards(
        datasets.Dataset.from_list(rows), tokenizer, rewards.RewardConfig(use_cpu=True)
    )
    pad = rewards.set_pad_token(model, tokenizer, tokens, is_new=True)
    assert pad != tokenizer.eos_token_id
    assert model.config.pad_token_id == pad
    assert tokenizer.pad_token_id == (None if case == "only eos" else pad)
    with torch.no_grad():
        batch = PreferenceCollator(pad)(list(tokens))
        assert not batch["attention_mask"].all()
        padded = rewards.pair_rewards(model, batch)
    pairs = sequences(tokenizer, rows)
    assert all(ids[-1] == tokenizer.eos_token_id for pair in pairs for ids in pair)
    if family != "Roberta":
        # transformers then takes the last token, whichever it is.
        model.config.pad_token_id = None
    with torch.no_grad():
        alone = [[model(torch.tensor([ids])).logits.item() for ids in pair] for pair in pairs]
    torch.testing.assert_close(padded, torch.tensor(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pad", [None, "<pad>", "<eos>"])
def test_a_given_model_keeps_its_own_padding(files, tmp_path, pad):
    """Its padding token decides which token it scores: with <eos>, the one before."""
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = pad
    model = classifier(pad_token_id=tokenizer.pad_token_id)
    folder = save_model(tmp_path / "given", model, tokenizer)
    found = run(scoring(files, str(folder)))
    rows = read(files["dataset"])
    assert found == pytest.approx(plain_margins(model, sequences(tokenizer, rows)), abs=1e-5)


def test_lora_learns_an_easy_preference(files, tmp_path, capsys):
    options = {**files, "num_train_epochs": 3, "eval_on_start": True, "eval_fraction": 0.5}
    found = run(options)
    out = capsys.readouterr().out
    assert "48 pairs (0 dropped" in out
    assert "held out" in out and "median" in out
    assert f"48 margins written to {files['output']}" in out
    assert f"reward model saved to {files['output_dir']}" in out
    history = json.loads((tmp_path / "reward" / "trainer_state.json").read_text())["log_history"]
    accuracies = [log["eval_accuracy"] for log in history if "eval_accuracy" in log]
    assert accuracies[0] < 0.8
    assert accuracies[-1] > 0.99
    assert sum(margin > 0 for margin in found) >= 47
    report = json.loads((tmp_path / "reward" / "all_results.json").read_text())
    assert report["eval_accuracy"] == 1.0


def test_margins_are_those_of_the_saved_model(files, tmp_path):
    """Order, columns, and r_w - r_l by transformers and peft alone; and again by --reward_model."""
    rows = read(files["dataset"])
    found = run(files)
    written = read(files["output"])
    assert [list(row) for row in written] == [[*rows[0], "margin"]] * PAIRS
    assert [{k: v for k, v in row.items() if k != "margin"} for row in written] == rows

    tokenizer = AutoTokenizer.from_pretrained(files["output_dir"])
    base = AutoModelForSequenceClassification.from_pretrained(
        files["model_name_or_path"], num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model = peft.PeftModel.from_pretrained(base, files["output_dir"])
    assert any("lora_B" in n and p.any() for n, p in model.named_parameters())
    expected = plain_margins(model, sequences(tokenizer, rows))
    assert found == pytest.approx(expected, abs=1e-5)
    assert max(map(abs, found)) > 0.1

    # What the policy's trainer reads.
    tokens, _ = data.tokenize_preferences(data.load_preference_dataset(files["output"]), tokenizer)
    assert tokens["reward_margin"] == found

    assert run(scoring(files, files["output_dir"])) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("case", ["pad is eos", "only eos"])
@pytest.mark.parametrize("lora_r", [0, 4])
@pytest.mark.long(case="only eos", lora_r=0)
def test_saved_models_say_how_they_pad(files, tmp_path, case, lora_r):
    tokenizer = only_eos() if case == "only eos" else tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    save_model(Path(files["model_name_or_path"]), tiny.model(pad_token_id=1), tokenizer)
    found = run({**files, "lora_r": lora_r, "eval_steps": 1})
    assert run(scoring(files, files["output_dir"])) == pytest.approx(found, abs=1e-6)
    saved = AutoTokenizer.from_pretrained(files["output_dir"])
    assert saved.pad_token in ([None] if case == "only eos" else ["<pad>", "<unk>"])
    if lora_r:
        base = AutoModelForSequenceClassification.from_pretrained(
            files["model_name_or_path"], num_labels=1
        )
        base.config.pad_token_id = saved.pad_token_id
        model = peft.PeftModel.from_pretrained(base, files["output_dir"])
    else:
        model = AutoModelForSequenceClassification.from_pretrained(files["output_dir"])
        assert model.config.pad_token_id == saved.pad_token_id
    expected = plain_margins(model, sequences(saved, read(files["dataset"])))
    assert found == pytest.approx(expected, abs=1e-5)


def test_early_stopping_ends_with_the_best_checkpoint(files, tmp_path, capsys):
    # Which of the two is chosen is a coin's choice, so there is nothing to learn but by heart.
    draw = random.Random(0)
    rows = [
        row
        if draw.random() < 0.5
        else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        for row in tiny.pairs(PAIRS)
    ]
    write(Path(files["dataset"]), rows)
    options = {
        **files,
        "num_train_epochs": 20,
        "eval_steps": 3,
        "early_stopping_patience": 2,
        "eval_fraction": 0.25,
    }
    found = run(options)
    printed = capsys.readouterr()
    assert "training stopped early at step" in printed.out
    assert "is no better than chance" in printed.err
    state = json.loads((tmp_path / "reward" / "trainer_state.json").read_text())
    assert state["global_step"] < state["max_steps"]
    losses = {log["step"]: log["eval_loss"] for log in state["log_history"] if "eval_loss" in log}
    best = min(losses, key=lambda step: losses[step])
    assert state["global_step"] == best + 6
    assert f"the saved model is from step {best}" in printed.out
    report = json.loads((tmp_path / "reward" / "all_results.json").read_text())
    assert report["eval_loss"] == pytest.approx(losses[best], rel=1e-5)
    checkpoint = str(tmp_path / "reward" / f"checkpoint-{best}")
    assert run(scoring(files, checkpoint)) == pytest.approx(found, abs=1e-6)


def test_the_saved_reward_model_has_the_caches_own_setting(files, monkeypatch):
    calls = []
    forward = transformers.LlamaForSequenceClassification.forward
    monkeypatch.setattr(
        transformers.LlamaForSequenceClassification,
        "forward",
        # Its signature says that it takes use_cache.
        functools.wraps(forward)(lambda *args, **kw: calls.append(kw) or forward(*args, **kw)),
    )
    run({**files, "lora_r": 0})
    assert calls and all(call["use_cache"] is False for call in calls)
    saved = json.loads((Path(files["output_dir"]) / "config.json").read_text())
    assert saved["use_cache"] is True


def test_held_out_pairs_are_not_trained_on(files, monkeypatch):
    seen = {}

    def train(trainer):
        for name in ("train", "eval"):
            rows = getattr(trainer, f"{name}_dataset")
            seen[name] = {(*r["prompt_ids"], *r["chosen_ids"], *r["rejected_ids"]) for r in rows}

    monkeypatch.setattr(margins, "_train", train)
    run(files)
    assert (len(seen["train"]), len(seen["eval"])) == (40, 8)
    assert not seen["train"] & seen["eval"]
    first = dict(seen)
    run({**files, "overwrite": True})
    assert seen == first
    run({**files, "overwrite": True, "seed": 7})
    assert seen["eval"] != first["eval"]


def test_pairs_of_another_split_stop_it_and_get_no_margins(files, tmp_path, capsys, monkeypatch):
    seen = {}
    train = margins._train

    def watched(trainer):
        for name in ("train", "eval"):
            tokens = getattr(trainer, f"{name}_dataset")
            seen[name] = [[*t["prompt_ids"], *t["chosen_ids"], *t["rejected_ids"]] for t in tokens]
        train(trainer)

    monkeypatch.setattr(margins, "_train", watched)
    slices = {"dataset_split": "train[:30]", "eval_dataset": files["dataset"]}
    found = run({**files, **slices, "eval_split": "test[30:]"})
    rows = read(files["dataset"])
    assert [row["id"] for row in read(files["output"])] == [*range(30)]
    tokens, _ = data.tokenize_preferences(
        datasets.Dataset.from_list(rows), tiny.tokenizer(), max_length=1024
    )
    every = [[*t["prompt_ids"], *t["chosen_ids"], *t["rejected_ids"]] for t in tokens]
    assert (seen["train"], seen["eval"]) == (every[:30], every[30:])
    # The held-out loss decides which checkpoint is best; scoring them gives the same.
    saved = str(tmp_path / "reward")
    held_out = run(
        scoring(files, saved, dataset=str(write(tmp_path / "held_out.jsonl", rows[30:])))
    )
    loss = torch.nn.functional.softplus(-torch.tensor(held_out)).mean().item()
    metrics = json.loads((tmp_path / "reward" / "all_results.json").read_text())
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    out = capsys.readouterr().out
    assert "30 margins written to" in out and f"({'test[30:]'}): 18 pairs" in out
    again = run(scoring(files, saved, dataset_split="train[:30]", overwrite=True))
    assert again == pytest.approx(found, abs=1e-6)


def test_truncation_is_the_trainers(files, tmp_path):
    """Margins belong to the tokens that training will see, in every mode."""
    options = {"max_length": 8, "truncation_mode": "keep_start"}
    found = run({**files, **options})
    saved = tmp_path / "reward"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    model = peft.PeftModel.from_pretrained(model, saved)
    tokenizer = AutoTokenizer.from_pretrained(saved)
    model.config.pad_token_id = tokenizer.pad_token_id
    pairs = sequences(tokenizer, tiny.pairs(PAIRS), **options)
    assert found == pytest.approx(plain_margins(model, pairs), abs=1e-5)
    assert found != pytest.approx(run({**files, "max_length": 8, "overwrite": True}), abs=1e-4)


def test_runs_repeat(files, tmp_path):
    options = {**files, "num_train_epochs": 2}
    first = run(options)
    other = {"output": str(tmp_path / "second.jsonl"), "output_dir": str(tmp_path / "second")}
    assert run({**options, **other}) == first
    assert run({**options, **other, "seed": 1, "overwrite": True}) != first


def test_head_is_float32_on_a_bfloat16_body(files):
    options = {**files, "dtype": "bfloat16"}
    found = run(options)
    saved = Path(files["output_dir"]) / "adapter_model.safetensors"
    from safetensors.torch import load_file

    weights = load_file(saved)
    assert {w.dtype for name, w in weights.items() if "score" in name} == {torch.float32}
    again = scoring(files, files["output_dir"], dtype="bfloat16")
    assert run(again) == pytest.approx(found, abs=1e-6)


def test_accumulated_batches_are_one_batch(files, tmp_path):
    """2 x 3 pairs train as 6 do, the last partial step included."""
    options = {**files, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0, "max_steps": 7}
    whole = run({**options, "per_device_train_batch_size": 6})
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    assert run({**options, **parts, "overwrite": True}) == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_gradient_checkpointing_changes_nothing(files):
    expected = run(files)
    options = {**files, "gradient_checkpointing": True, "overwrite": True}
    assert run(options) == pytest.approx(expected, abs=1e-4)


def test_yaml(files, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**files, "lora_target_modules": ["q_proj", "v_proj"]}))
    assert cli.main(["margins", str(path), "--max_steps", "2"]) == 0
    config = json.loads((tmp_path / "reward" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["modules_to_save"] == ["classifier", "score"]
    assert len(read(files["output"])) == PAIRS


def test_defaults():
    words = ["--model", "m", "--dataset", "d", "--output", "o"]
    *_, lora, config = margins.parse(words)
    assert (lora.lora_r, config.learning_rate) == (16, 1e-4)
    assert margins.parse([*words, "--lora_r", "0"])[3].learning_rate == 1e-5
    given = [*words, "--lora_r", "0", "--learning_rate", "1e-4"]
    assert margins.parse(given)[3].learning_rate == 1e-4
    assert (config.save_strategy, config.save_steps) == (config.eval_strategy, config.eval_steps)
    assert config.metric_for_best_model == "loss"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv", ""])
def test_files_and_folders(files, tmp_path, suffix):
    """Each kind is read back as it was, with the margins; and is replaced only when asked to."""
    # datasets reads a .json array's numbers by pandas, to some ten digits.
    tick = 0.25 if suffix == ".json" else 1e-13
    rows = [
        {**row, "weight": 0.5 + tick * i, "note": None if i % 2 else "\u00fc\u2028"}
        for i, row in enumerate(tiny.pairs(5))
    ]
    write(Path(files["dataset"]), rows)
    model = save_model(tmp_path / "given", classifier(), tiny.tokenizer())
    output = tmp_path / f"out{suffix}"
    options = scoring(files, str(model), output=str(output))
    assert cli.main(["margins", *flags(options)]) == 0
    loaded = data.load_preference_dataset(str(output))
    assert loaded.remove_columns("margin").to_list() == rows
    assert loaded.features["margin"] == datasets.Value("float64")
    assert all(isinstance(margin, float) for margin in loaded["margin"])
    assert cli.main(["margins", *flags(options)]) == 2
    assert cli.main(["margins", *flags({**options, "overwrite": True})]) == 0
    assert data.load_preference_dataset(str(output)).to_list() == loaded.to_list()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_other_columns_become(files, tmp_path):
    """Columns are written as `datasets` reads them; in JSON only dates change."""
    extras = [{"on": "2024-01-01T00:00:00Z", "of": {"a": 1}}, {"on": None, "of": {"b": "é"}}]
    extras = [{**each, "text": "2024", "n": 2**53 + 1, "x": 0.1, "none": None} for each in extras]
    rows = [{**row, **extra} for row, extra in zip(tiny.pairs(2), extras, strict=True)]
    dataset = write(tmp_path / "extra.jsonl", rows)
    folder = save_model(tmp_path / "rewards", classifier(pad_token_id=0), tiny.tokenizer())
    options = scoring(files, str(folder), dataset=str(dataset))
    run(options)
    found = read(options["output"])
    assert [row.pop("on") for row in found] == ["2024-01-01 00:00:00", None]
    kept = [{key: row[key] for key in row if key != "on"} for row in rows]
    assert [{key: row[key] for key in row if key != "margin"} for row in found] == kept


def test_conversations(files, tmp_path):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"].strip()}],
            "rejected": [{"role": "assistant", "content": row["rejected"].strip()}],
            "score_chosen": None,
            "score_rejected": 1.0,
        }
        for row in tiny.pairs(6)
    ]
    write(Path(files["dataset"]), rows)
    model = classifier()
    folder = save_model(tmp_path / "given", model, tiny.tokenizer())
    options = scoring(files, str(folder), max_length=12)
    found = run(options)
    texts = [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows]
    expected = plain_margins(model, sequences(tiny.tokenizer(), texts, max_length=12))
    assert found == pytest.approx(expected, abs=1e-5)
    # Margins come before scores in what training reads.
    tokens, _ = data.tokenize_preferences(
        data.load_preference_dataset(options["output"]), tiny.tokenizer()
    )
    assert tokens["reward_margin"] == found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": None}, "--dataset is required"),
        ({"output": None}, "--output is required"),
        ({"model_name_or_path": None}, "give either --model_name_or_path, to train"),
        ({"reward_model": "x"}, "give either --model_name_or_path, to train"),
        ({"dataset": "missing.jsonl"}, "no such file"),
        ({"output": "no-such-folder/out.jsonl"}, "--output: no such folder: no-such-folder"),
        ({"output": "out.txt"}, "--output: unknown file type '.txt'; known: .jsonl, .json"),
        ({"eval_fraction": 0}, "--eval_fraction must be in (0, 1), got 0.0"),
        ({"eval_fraction": 1}, "--eval_fraction must be in (0, 1), got 1.0"),
        ({"eval_fraction": 0.001}, "48 pairs are too few: with --eval_fraction 0.001, 0 would be"),
        (
            {"eval_fraction": 0.1, "eval_dataset": "x"},
            "give either --eval_dataset or --eval_fraction",
        ),
        ({"eval_split": "dev"}, "--eval_split has no effect without --eval_dataset"),
        ({"eval_dataset": "gone.jsonl"}, "'gone.jsonl': no such file"),
        ({"truncation_mode": "middle"}, "--truncation_mode: invalid choice"),
        ({"lora_r": -1}, "--lora_r must be >= 0"),
        ({"lora_alpha": 0}, "--lora_alpha must be > 0"),
        ({"lora_r": 0, "lora_alpha": 16}, "--lora_alpha has no effect with --lora_r 0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience must be at least 1"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"eval_strategy": "no"}, "early stopping needs evaluation"),
        ({"load_best_model_at_end": False}, "load_best_model_at_end must be true"),
        ({"save_steps": 5}, "--save_steps has no effect"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect"),
        ({"label_names": ["labels"]}, "label_names has no effect on a reward model"),
        ({"average_tokens_across_devices": "false"}, "average_tokens_across_devices has no effect"),
        ({"train_sampling_strategy": "group_by_length"}, "batches by length are not supported"),
        ({"dataloader_drop_last": True, "per_device_train_batch_size": 64}, "fewer than a batch"),
        ({"betta": 0.1}, "unknown argument '--betta'"),
        ({"dtype": "int4"}, "--dtype/--torch_dtype: invalid choice: 'int4'"),
    ],
)
def test_errors_come_before_the_model_is_loaded(files, capsys, monkeypatch, change, message):
    def load(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", load)
    assert message in error(flags({**files, **change}), capsys)


@pytest.mark.parametrize("kind", [PreferenceConfig, rewards.RewardConfig])
def test_batches_by_length_are_refused_by_both_trainers(tmp_path, kind):
    with pytest.raises(ValueError, match="batches by length are not supported"):
        kind(str(tmp_path), use_cpu=True, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"margin": 1.0}, "has a column 'margin', from which training reads"),
        ({"reward_margin": 1.0}, "has a column 'reward_margin'"),
        ({"chosen_ids": [1]}, "has a column 'chosen_ids', but a reward model needs text"),
        ({"rejected": None}, "row 0: 'rejected' must be text"),
    ],
)
def test_errors_of_datasets(files, capsys, extra, message):
    write(Path(files["dataset"]), [{**row, **extra} for row in tiny.pairs(8)])
    assert message in error(flags(files), capsys)


def test_errors_of_columns_and_rows(files, tmp_path, capsys):
    path = write(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b"}])
    assert "no column 'rejected'" in error(flags({**files, "dataset": str(path)}), capsys)
    # Without a prompt, the one token of an empty response has nothing before it.
    rows = tiny.pairs(8)
    rows[5] = {"prompt": "", "chosen": "", "rejected": "bad"}
    path = write(tmp_path / "empty.jsonl", rows)
    message = error(flags({**files, "dataset": str(path)}), capsys)
    assert "empty.jsonl', row 5: an empty response, which cannot be scored (1 such row)" in message
    assert not Path(files["output"]).exists()
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(tmp_path / "chat.jsonl", [{"chosen": turns, "rejected": turns}] * 8)
    change = {"dataset": str(path), "output": str(tmp_path / "out.csv")}
    assert "cannot hold column 'chosen'" in error(flags({**files, **change}), capsys)


def test_outputs_that_are_not_replaced(files, tmp_path, capsys):
    Path(files["output"]).write_text("mine")
    message = error(flags(files), capsys)
    assert "margins.jsonl exists; --overwrite replaces it" in message
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine").write_text("mine")
    change = {"output": str(folder), "overwrite": True}
    assert "is not a dataset, and is not replaced" in error(flags({**files, **change}), capsys)
    assert (folder / "mine").read_text() == "mine"
    change = {"output": str(tmp_path / "same"), "output_dir": str(tmp_path / "same")}
    assert "are the same folder" in error(flags({**files, **change}), capsys)


def test_errors_of_models(files, tmp_path, capsys):
    missing = str(tmp_path / "no-model")
    assert "no-model" in error(flags({**files, "model_name_or_path": missing}), capsys)
    assert "no-model" in error(flags(scoring(files, missing)), capsys)
    causal = files["model_name_or_path"]
    message = error(flags(scoring(files, causal)), capsys)
    assert "has 2 outputs (LlamaForCausalLM); a reward model is a sequence classifier" in message
    three = save_model(tmp_path / "three", classifier(num_labels=3), tiny.tokenizer())
    assert "has 3 outputs" in error(flags(scoring(files, str(three))), capsys)
    message = error(flags({**files, "model_name_or_path": str(three)}), capsys)
    assert "cannot be loaded as a reward model" in message
    headless = tiny.model()
    headless.config.num_labels = 1
    headless = save_model(tmp_path / "headless", headless, tiny.tokenizer())
    message = error(flags(scoring(files, str(headless))), capsys)
    assert "is no reward model: it has no weights score.weight" in message


def test_errors_of_adapters(files, tmp_path, capsys):
    def adapter(model, task: str, base: str) -> str:
        built = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type=task))
        built.peft_config["default"].base_model_name_or_path = base
        built.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter")

    base = files["model_name_or_path"]
    folder = adapter(tiny.model(), "CAUSAL_LM", base)
    message = error(flags(scoring(files, folder)), capsys)
    assert "task type CAUSAL_LM; that of a reward model is SEQ_CLS" in message
    folder = adapter(classifier(num_labels=3), "SEQ_CLS", base)
    assert "does not fit" in error(flags(scoring(files, folder)), capsys)
    folder = adapter(classifier(), "SEQ_CLS", str(tmp_path / "gone"))
    assert "gone" in error(flags(scoring(files, folder)), capsys)


def test_options_of_training_have_no_effect_on_scoring(files, capsys):
    options = scoring(files, "x", learning_rate=0.1, eval_fraction=0.5, lora_r=16)
    message = error(flags(options), capsys)
    assert "so --eval_fraction, --learning_rate, --lora_r has no effect" in message


def test_scoring_under_deepspeed_is_refused(files, capsys, monkeypatch):
    settings = {"zero_optimization": {"stage": 3}}
    monkeypatch.setattr("prefkern.training.zero.configuration", lambda args: settings)
    message = error(flags(scoring(files, "x")), capsys)
    assert "--reward_model is not supported under ZeRO-3, which shards a model when" in message


def test_rewards_that_are_not_finite_are_not_written(files, tmp_path, capsys):
    model = classifier()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    folder = save_model(tmp_path / "given", model, tiny.tokenizer())
    options = scoring(files, str(folder))
    assert "the rewards of row 0 are not finite; nothing was written" in error(
        flags(options), capsys
    )
    assert not Path(options["output"]).exists()


def test_scoring_leaves_nothing_but_the_file(files, tmp_path, monkeypatch):
    folder = save_model(tmp_path / "given", classifier(), tiny.tokenizer())
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    run(scoring(files, str(folder), output="out.jsonl"))
    assert [path.name for path in place.iterdir()] == ["out.jsonl"]


def test_missing_extra_is_named(files, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "peft" else find(n))
    said = error(flags(files), capsys)
    assert said.endswith(": peft not installed: pip install 'prefkern[train]'")


@pytest.mark.long
def test_two_ranks_do_as_one(files, tmp_path):
    """Training of 2 ranks x 2 pairs against 4, an odd number of pairs scored; one rank writes."""
    write(Path(files["dataset"]), tiny.pairs(47))
    options = {**files, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": 0, "eval_steps": 2}
    expected = run({**options, "max_steps": 4, "per_device_train_batch_size": 4})
    options = {
        **options,
        "output": str(tmp_path / "two.jsonl"),
        "output_dir": str(tmp_path / "two"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 3,
    }
    outputs = run_on_two_ranks("-m", "prefkern.cli", "margins", *flags(options))
    assert ["margins written" in output for output in outputs] == [True, False]
    found = [row["margin"] for row in read(options["output"])]
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_columns_of_other_names(files, tmp_path):
    rows = [{"question": row.pop("prompt"), **row, "id": 3} for row in tiny.pairs(PAIRS)]
    write(tmp_path / "pairs.jsonl", rows)
    assert cli.main(["margins", *flags(files), "--columns", "prompt=question"]) == 0
    written = read(files["output"])
    assert [{k: v for k, v in row.items() if k != "margin"} for row in written] == rows
    # The rows keep their names, so scoring them again names the column again.
    again = {**files, "output": str(tmp_path / "again.jsonl")}
    again = {k: again[k] for k in ("dataset", "output", "use_cpu", "disable_tqdm")}
    argv = flags({**again, "reward_model": files["output_dir"]})
    assert cli.main(["margins", *argv, "--columns", "prompt=question"]) == 0
    for first, second in zip(written, read(again["output"]), strict=True):
        assert second["margin"] == pytest.approx(first["margin"], abs=1e-5)


def test_unread_texts_are_in_the_report(files, tmp_path, capsys):
    rows = [{**row, "source": "hub", "margins": 1.0} for row in tiny.pairs(PAIRS)]
    write(tmp_path / "pairs.jsonl", rows)
    assert cli.main(["margins", *flags(files)]) == 0
    assert "); text columns not read: source" in capsys.readouterr().out
