"""`prefkern plan --data`: its table against training steps on the same file, which are measured."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest
import torch

from support import chats, tiny, versions

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from prefkern.cli import __main__ as cli
from prefkern.cli import plan, plan_options, plan_pairs
from prefkern.data import load_preference_dataset, tokenize_preferences
from prefkern.data.collate import PreferenceCollator
from prefkern_bench.measure import Meter
from support.training import trainer

LAYOUTS = {
    "padded": {},
    "packed": {"padding_free": True},
    "prompt shared": {"padding_free": True, "share_prompt": True},
}
LORA = peft.LoraConfig(target_modules="all-linear", r=1, task_type="CAUSAL_LM")
# The head is small beside the body, and the adapter beside the weights.
SIZES = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32}
LONG = " good" * 40


@pytest.fixture
def folder(tmp_path):
    """A model's configuration and tokenizer, without weights, and a file of pairs."""
    tiny.model(**SIZES).config.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = tiny.pairs(9)
    rows[2]["prompt"] += LONG
    rows[5]["rejected"] += LONG
    write(tmp_path, rows)
    return tmp_path


def write(folder, rows) -> None:
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def arguments(folder, *options: str) -> list[str]:
    data = str(folder / "pairs.jsonl")
    head = ["--dtype", "float32", "--device", "cpu", "--workspace-mb", "8"]
    return [str(folder / "model"), "--data", data, "--batch", "4", *head, *options]


def planned(folder, *options: str):
    args = plan_options.parse(arguments(folder, *options))
    model = plan.empty_model(args.model)
    batch, found = plan._planned_pairs(args, model, plan.head_of(model), torch.float32, 8.0)
    return args, batch, found


def steps(pairs, args) -> list[list[int]]:
    """The rows of each step."""
    row = torch.arange(len(pairs)).numpy()
    numbers = plan_pairs.Pairs(row, row[None], row)
    return [step.prompts.tolist() for step in numbers.batches(args.batch, args.seed)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lora", [False, True])
def test_the_table_is_what_training_costs(folder, layout, lora):
    """Tokens and operations of every step, through the trainer: policy, reference and both heads."""
    args, _, found = planned(folder, "--max-length", "30", *["--lora"] * lora)
    run = trainer(
        folder / "run",
        model=tiny.model(**SIZES),
        peft_config=LORA if lora else None,
        train_dataset=load_preference_dataset(args.data[0]),
        max_length=30,
        workspace_mb=8,
        backend="torch",
        **LAYOUTS[layout],
    )
    tokens = operations = checkpointed = of_positions = 0
    for rows in steps(run.train_dataset, args):
        batch = run.data_collator([run.train_dataset[row] for row in rows])
        tokens += batch["input_ids"].numel()
        operations += step(run, batch)
        # In policy and reference.
        of_positions += 2 * saved(run, batch, layout)
    run.model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        run.model.enable_input_require_grads()
    for rows in steps(run.train_dataset, args):
        batch = run.data_collator([run.train_dataset[row] for row in rows])
        checkpointed += step(run, batch)
    (epoch,) = [each for each in found.epochs if each.layout == layout]
    assert tokens == epoch.tokens
    assert operations == pytest.approx(epoch.operations, rel=0.03)
    assert checkpointed == pytest.approx(epoch.operations_checkpointed, rel=0.03)
    if not lora:
        # Nothing is left out: full training is counted to the last product.
        assert operations == epoch.operations - of_positions
        assert checkpointed == epoch.operations_checkpointed - of_positions


def step(run, batch) -> int:
    run.model.train()
    run.current_gradient_accumulation_steps = 1
    # The first step of a model probes it.
    run.training_step(run.model, dict(batch))
    with Meter() as meter:
        run.training_step(run.model, dict(batch))
    return meter.operations


def test_activations_are_those_of_the_largest_step(folder):
    """Held to bytes in tests/models/test_body_cost.py; here it is one step alone or all of them."""
    args, _, found = planned(folder)
    pairs, _ = plan_pairs.read_pairs(args)
    of_steps = []
    for rows in steps(pairs.prompts, args):
        lines = (folder / "pairs.jsonl").read_text().splitlines()
        one = folder / f"step-{len(of_steps)}"
        one.mkdir()
        write(one, [json.loads(lines[row]) for row in rows])
        (one / "model").symlink_to(folder / "model")
        of_steps.append(planned(one)[2].epochs)
    for whole, *parts in zip(found.epochs, *of_steps, strict=True):
        assert whole.activations == max(part.activations for part in parts)
        assert whole.activations_checkpointed == max(p.activations_checkpointed for p in parts)
        assert whole.operations == sum(part.operations for part in parts)
    padded, packed, shared = (epoch.activations for epoch in found.epochs)
    assert padded > packed > shared


def test_what_is_printed(folder, capsys):
    options = arguments(folder, "--max-length", "30")
    assert cli.main(["plan", *options]) == 0
    out = capsys.readouterr().out
    _, batch, found = planned(folder, "--max-length", "30")
    assert f"N = {batch.scored:,} scored of {batch.positions:,}" in out
    # The counts of the report that `prefkern train` prints.
    assert "9 pairs (0 dropped for an empty response" in out
    assert "2 with a truncated prompt, 1 with a truncated response" in out
    assert "an epoch: 3 steps of 4 pairs, in a random order (seed 42), with all weights" in out
    assert f"the step with the most scored tokens: {batch.pairs} pairs on cpu" in out
    first = found.epochs[0]
    for epoch in found.epochs:
        (line,) = [line for line in out.splitlines() if line.startswith(f" {epoch.layout} ")]
        assert f"{epoch.tokens:,} ({epoch.tokens / first.tokens:.2f})" in line
        assert f" {epoch.operations:.2e} ".replace("e+0", "e") in line
        shares = [epoch.operations / first.operations, epoch.activations / first.activations]
        assert re.findall(r"\((.*?)\)", line)[1:3] == [f"{share:.2f}" for share in shares]
    # A batch that no step fills, since the file has fewer pairs.
    assert cli.main(["plan", *options, "--batch", "1000"]) == 0
    assert "an epoch: 1 step of 9 pairs, in a random order" in capsys.readouterr().out
    # `prefkern train` and its names; another order has other batches.
    same = [{"--data": "--dataset_name"}.get(each, each) for each in options]
    assert cli.main(["plan", *same]) == 0
    assert capsys.readouterr().out == out
    assert cli.main(["plan", *options, "--seed", "1"]) == 0
    assert capsys.readouterr().out != out


def test_it_reads_what_train_reads(folder):
    """Columns of other names, a slice of the file, and the bounds that training has by default."""
    rows = [
        {"question": r["prompt"], "good": r["chosen"], "bad": r["rejected"]} for r in tiny.pairs(9)
    ]
    write(folder, rows)
    names = ["--columns", "prompt=question", "chosen=good", "--columns", "rejected=bad"]
    args, _, _ = planned(folder, *names, "--dataset_split", "train[:6]")
    assert args.columns == {"prompt": "question", "chosen": "good", "rejected": "bad"}
    assert (args.max_length, args.truncation_mode, args.seed) == (1024, "keep_end", 42)
    pairs, (report,) = plan_pairs.read_pairs(args)
    assert len(pairs) == report.pairs == 6
    run = trainer(
        folder / "run",
        model=tiny.model(),
        columns=args.columns,
        train_dataset=load_preference_dataset(args.data[0], "train[:6]", columns=args.columns),
    )
    lengths = (pairs.prompts, *pairs.responses)
    for column, found in zip(("prompt_ids", "chosen_ids", "rejected_ids"), lengths, strict=True):
        assert found.tolist() == [len(ids) for ids in run.train_dataset[column]]


def saved(run, batch, layout: str) -> int:
    """Operations of a forward that older versions save: one table of rotations for all rows."""
    if layout != "padded" or versions.ROTATIONS_WITHOUT_PRODUCTS.is_here:
        return 0
    rows, length = batch["input_ids"].shape
    return 2 * (rows - 1) * length * (run.model.config.head_dim // 2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gold_responses_are_a_third_sequence_and_have_no_reference(folder, layout):
    """Every product of a step of TPO, as it is measured."""
    rows = tiny.triples(7)
    rows[3]["reference"] += LONG
    write(folder, rows)
    args, batch, found = planned(folder, "--gold")
    run = trainer(
        folder / "run",
        model=tiny.model(**SIZES),
        objective="tpo",
        train_dataset=load_preference_dataset(args.data[0]),
        workspace_mb=8,
        backend="torch",
        **LAYOUTS[layout],
    )
    batches = [
        run.data_collator([run.train_dataset[row] for row in rows])
        for rows in steps(run.train_dataset, args)
    ]
    (epoch,) = [each for each in found.epochs if each.layout == layout]
    assert sum(each["input_ids"].numel() for each in batches) == epoch.tokens
    of_positions = sum(saved(run, each, layout) for each in batches)
    assert sum(step(run, each) for each in batches) == epoch.operations - of_positions
    if layout == "padded":
        assert batch.positions == max(each["input_ids"].numel() for each in batches)


def test_what_is_scored_of_turns(folder, capsys):
    """The masks of training, and of several files a mix by weights."""
    rows = [chats.pair(number) for number in range(9)]
    chats.tokenizer().save_pretrained(folder / "model")
    write(folder, rows)
    whole = planned(folder)[1].scored
    for options in (["--assistant-only-loss"], ["--last-turn-only"]):
        args, batch, _ = planned(folder, *options)
        name = options[0].strip("-").replace("-", "_")
        given = datasets.Dataset.from_list(rows)
        tokens, _ = tokenize_preferences(given, chats.tokenizer(), **{name: True})
        collate = PreferenceCollator(pad_token_id=0)
        labels = [collate([tokens[row] for row in rows])["labels"] for rows in steps(tokens, args)]
        assert batch.scored == max(int((each != -100).sum()) for each in labels) < whole
    other = folder / "other.jsonl"
    other.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    assert (
        planned(folder, "--data", str(other))[2].epochs[0].tokens
        > planned(folder)[2].epochs[0].tokens
    )
    args = plan_options.parse(arguments(folder, "--data", str(other)))
    assert len(plan_pairs.read_pairs(args)[0]) == 12
    options = arguments(folder, "--data", str(other), "--dataset-weights", "1", "9")
    pairs, reports = plan_pairs.read_pairs(plan_options.parse(options))
    assert [report.drawn for report in reports] == [len(pairs) - 3, 3]
    assert cli.main(["plan", *options]) == 0
    assert "3 of them are in the mix" in capsys.readouterr().out


def test_pairs_without_a_prompt_share_nothing():
    ids = {"prompt_ids": [[], [1] * 3], "chosen_ids": [[1] * 4, [1] * 2]}
    ids |= {"rejected_ids": [[1] * 5, [1]]}
    pairs = plan_pairs.pairs_of(datasets.Dataset.from_dict(ids))
    shared = pairs.sequences("prompt shared")
    assert shared.lengths.tolist() == [4, 5, 5, 2]
    assert shared.prefixes.tolist() == [0, 0, 0, 2]
    assert pairs.scored == 4 + 2 + 5 + 1 - 2
    ids |= {
        "chosen_mask": [[True] * 4, [True, False]],
        "rejected_mask": [[False, True] * 2 + [True], [True]],
    }
    pairs = plan_pairs.pairs_of(datasets.Dataset.from_dict(ids))
    assert pairs.scored_tokens.tolist() == [3 + 3, 1 + 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seq-len", "8"], "--seq-len has no effect with --data, which has the lengths"),
        (["--prompt-len", "8"], "--prompt-len has no effect with --data, which has the lengths"),
        (["--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["--max-prompt-length", "0"], "--max-prompt-length must be at least 1, got 0"),
        (["--dataset-num-proc", "0"], "--dataset-num-proc must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--seed", str(2**64)], f"--seed must be below 2**32, got {2**64}"),
        (["--truncation-mode", "none"], "--truncation-mode: invalid choice: 'none'"),
        (["--columns", "question"], "columns must be a mapping"),
        (["--dataset-split", "test[1"], "cannot be loaded"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--dataset-weights", "1"], "--dataset_weights has no effect on one dataset"),
        (["--gold"], "has no column 'reference', the third response"),
        (
            ["--last-turn-only"],
            "last_turn_only scores turns of a conversation, and the row is text",
        ),
    ],
)
def test_errors_are_one_line(folder, capsys, options, message):
    assert cli.main(["plan", *arguments(folder, *options)]) == 2
    captured = capsys.readouterr()
    (line,) = [each for each in captured.err.splitlines() if each.startswith("prefkern plan")]
    assert line.startswith("prefkern plan: error: ") and message in line
    assert not captured.out


def test_single_responses_and_models_without_sdpa_are_refused(folder, capsys):
    write(folder, [{"prompt": "a", "completion": " good", "label": True}] * 4)
    assert cli.main(["plan", *arguments(folder)]) == 2
    assert "single responses are for the objective 'kto'" in capsys.readouterr().err
    write(folder, tiny.pairs(4))
    tiny.model("Mamba", state_size=8).config.save_pretrained(folder / "model")
    assert cli.main(["plan", *arguments(folder)]) == 2
    assert "the body of MambaForCausalLM cannot be counted" in capsys.readouterr().err


def test_data_needs_datasets(folder, capsys, monkeypatch):
    found = SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(plan_options.importlib, "util", found)
    assert cli.main(["plan", *arguments(folder)]) == 2
    assert "--data needs datasets, which is not installed: pip install" in capsys.readouterr().err
