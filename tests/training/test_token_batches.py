"""Batches by tokens: what is in them, and that a run on them is one on padded batches of the same pairs."""

from __future__ import annotations

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from prefkern import PreferenceConfig, PreferenceTrainer
from prefkern.data.collate import PreferenceCollator
from prefkern.training import reference_cache, token_batches
from prefkern.training.rewards import RewardConfig
from prefkern.training.token_batches import TokenBatches, pair_tokens
from support.packed import rows_of_lengths, uneven_rows
from support.reference_sums import shards, sums, sums_from_logits
from support.resumed import logs_of
from support.training import (
    Record,
    assert_same_weights,
    made,
    single_rows,
    step_logs,
    trainer,
    weights,
)

BUDGET = 90
BY_TOKENS = {
    "padding_free": True,
    "max_tokens_per_batch": BUDGET,
    "per_device_train_batch_size": 8,
}


def drawn_sizes(count: int, seed: int = 0) -> np.ndarray:
    """As lengths of pairs are: a few are many times as long as most."""
    draws = np.random.default_rng(seed).standard_normal(count)
    return np.clip(np.round(400 * np.exp(0.8 * draws)), 10, 4000).astype(np.int64)


def by_tokens(path, rows, shares: bool = False, **options):
    """A trainer on these rows, and the batches that its collator has made: pairs of token ids."""
    run = trainer(path, train_dataset=made(rows), share_prompt=shares, **{**BY_TOKENS, **options})
    seen: list[list[dict]] = []
    collate = run.data_collator

    def spy(examples):
        seen.append(examples)
        return collate(examples)

    run.data_collator = spy
    return run, seen


def key(row: dict) -> tuple:
    return tuple(tuple(row[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected"))


def counted(batches: list[list[dict]]) -> Counter:
    return Counter(key(row) for batch in batches for row in batch)


# The number of pairs, their sizes, and the ranks.
PLANS = {
    "many": (drawn_sizes(3000), 8192, 1),
    "many, 3 ranks": (drawn_sizes(3000), 8192, 3),
    "two a batch": (drawn_sizes(300), 4000, 2),
    "fewer than fit in one batch": (drawn_sizes(5), 10**6, 4),
    "one a batch": (np.full(7, 90), 100, 4),
    "one pair": (np.array([90]), 100, 3),
    "as large as the budget": (np.array([100, 1, 100, 99, 1]), 100, 2),
    "none": (np.zeros(0, dtype=np.int64), 100, 2),
}


@pytest.mark.parametrize("seed", [None, 0, 7])
@pytest.mark.parametrize("name", PLANS)
def test_every_pair_once_within_the_budget_in_the_same_number_of_batches(name, seed):
    sizes, budget, ranks = PLANS[name]
    lengths = set()
    for epoch in range(6):
        of_ranks = []
        for rank in range(ranks):
            batches = TokenBatches(sizes, budget, seed=seed, rank=rank, ranks=ranks)
            batches.set_epoch(epoch)
            mine = list(batches)
            assert mine == list(batches)
            assert len(mine) == len(batches)
            of_ranks.append(mine)
            lengths.add(len(mine))
        together = [batch for at in zip(*of_ranks, strict=True) for batch in at]
        assert all(batch and sizes[batch].sum() <= budget for batch in together)
        whole = len(together) - batches.repeats
        rows = Counter(row for batch in together[:whole] for row in batch)
        assert rows == Counter(range(len(sizes)))
        # Without communication, ranks with nothing left repeat the first batches.
        assert together[whole:] == (together[:whole] * ranks)[: batches.repeats]
        assert batches.repeats == 0 or all(len(batch) == 1 for batch in together)
        assert [batch for at in batches.rounds() for batch in at] == together[:whole]
        if seed is None:
            assert [row for batch in together[:whole] for row in batch] == [*range(len(sizes))]
    assert len(lengths) == 1


def test_a_batch_that_takes_all_pairs_is_not_packed_again_by_each_window():
    """The work of a window is bounded, however many pairs the batch before has already."""

    class Sizes:
        reads = 0

        def __getitem__(self, rows):
            self.reads += 1
            return values[rows]

    values, read = drawn_sizes(20_000), Sizes()
    order = np.random.default_rng(0).permutation(len(values))
    assert token_batches.first_fit(order, read, 10**9) == [order.tolist()]  # pyright: ignore[reportArgumentType]
    assert read.reads < 3 * len(values)


def test_epochs_and_seeds_are_shuffled_differently():
    plans = []
    for seed, epoch in ((0, 0), (0, 1), (9, 0)):
        batches = TokenBatches(drawn_sizes(500), 8192, seed=seed)
        batches.set_epoch(epoch)
        plans.append({frozenset(batch) for batch in batches})
    for first, second in ((0, 1), (0, 2)):
        assert len(plans[first] & plans[second]) < 0.1 * len(plans[first])


def test_an_epoch_that_needs_more_batches_is_drawn_again(monkeypatch):
    """Every epoch has the number that the first epochs' draws gave, whatever later ones give."""
    true, ends, draws = token_batches.first_fit, set(), []

    def first_fit(*args):
        draws.append(true(*args))
        return draws[-1]

    monkeypatch.setattr(token_batches, "first_fit", first_fit)
    for seed in (0, 4):
        batches = TokenBatches(drawn_sizes(200), 4000, seed=seed)
        for epoch in range(40):
            batches.set_epoch(epoch)
            del draws[:]
            plan = list(batches)
            assert len(plan) == len(batches)
            assert Counter(row for batch in plan for row in batch) == Counter(range(200))
            assert all(len(each) > len(batches) for each in draws[:-1])
            ends.add((len(draws) > 1, len(draws[-1]) < len(batches)))
    # Some were drawn again, some were cut to give more batches, and some were as they should be.
    assert {(True, False), (False, True), (False, False)} <= ends


def test_batches_are_full_and_short_pairs_weigh_as_much():
    """A pair's weight in an epoch is 1 / pairs of its step; sorted by length, short pairs lose."""
    sizes = drawn_sizes(4000)
    batches = list(TokenBatches(sizes, 8192, seed=0))
    tokens = [sizes[batch].sum() for batch in batches]
    assert np.mean(tokens) > 0.97 * 8192
    assert sum(each < 8192 / 2 for each in tokens) <= 1
    weight = np.zeros(len(sizes))
    for batch in batches:
        weight[batch] = len(sizes) / len(batches) / len(batch)
    shortest, longest = np.quantile(sizes, [0.1, 0.9])
    assert 0.9 < weight[sizes <= shortest].mean() < 1.0
    assert weight[sizes >= longest].mean() < 1.35


def test_batches_that_are_less_full_are_spread_over_the_epoch():
    sizes = drawn_sizes(1000)
    tokens = np.array([sizes[batch].sum() for batch in TokenBatches(sizes, 4000, seed=0)])
    least_full = np.argsort(tokens)[: len(tokens) // 10]
    assert 0.3 < least_full.mean() / len(tokens) < 0.7


@pytest.mark.parametrize("shares", [False, True])
def test_sizes_are_those_of_the_collator(shares):
    rows = [*uneven_rows(30), *rows_of_lengths((0, 3, 4))]
    collate = PreferenceCollator(0, padding_free=True, share_prompt=shares)
    sizes = pair_tokens(made(rows), shares)
    assert sizes.tolist() == [collate([row])["input_ids"].numel() for row in rows]
    assert sizes[[4, 11, 30]].sum() == collate([rows[i] for i in (4, 11, 30)])["input_ids"].numel()
    # Of rows that are chosen from a dataset, too.
    assert pair_tokens(made(rows).select([7, 2]), shares).tolist() == sizes[[7, 2]].tolist()


def sums_of(model, rows: list[dict]) -> torch.Tensor:  # (2, B)
    """Log-probs of the responses from the logits of padded rows."""
    batch = PreferenceCollator(0)(rows)
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    labels = batch["labels"][:, 1:]
    logps = output.logits[:, :-1].log_softmax(-1)
    picked = logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return (picked * (labels != -100)).sum(1).view(2, -1)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("accumulated", [1, 3])
def test_a_run_is_one_on_padded_batches_of_the_same_pairs(tmp_path, accumulated, shares):
    """Each step's gradient is that of the mean over its pairs, from logits; two epochs."""
    rows, record = uneven_rows(29), Record()
    run, seen = by_tokens(
        tmp_path,
        rows,
        shares,
        ref_model=tiny.model(seed=1),
        objective="dpo",
        gradient_accumulation_steps=accumulated,
        num_train_epochs=2,
        callbacks=[record],
        optim="sgd",
        learning_rate=0.05,
        max_grad_norm=0.0,
    )
    policy, reference = copy.deepcopy(run.model), tiny.model(seed=1)
    run.train()
    batches = len(seen) // 2
    epochs = [seen[:batches], seen[batches:]]
    assert [counted(epoch) for epoch in epochs] == [Counter(map(key, rows))] * 2
    assert epochs[0] != epochs[1]
    numbers = {len(batch) for batch in seen}
    assert len(numbers) > 2
    steps = [
        epoch[start : start + accumulated]
        for epoch in epochs
        for start in range(0, batches, accumulated)
    ]
    assert accumulated == 1 or batches % accumulated
    logs = step_logs(run)
    for step, mine, log in zip(steps, record.gradients, logs, strict=True):
        pairs = [row for batch in step for row in batch]
        chosen, rejected = sums_of(policy, pairs) - sums_of(reference, pairs).detach()
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        policy.zero_grad()
        loss.backward()
        true = {name: p.grad for name, p in policy.named_parameters()}
        size = torch.cat([each.flatten() for each in true.values()]).norm()
        assert size > 1e-3
        for name, gradient in true.items():
            assert (mine[name] - gradient).norm() <= 5e-6 * size, name
        assert log["loss"] == pytest.approx(loss.item(), rel=2e-5)
        assert log["rewards/margins"] == pytest.approx(
            0.1 * (chosen - rejected).mean().item(), rel=1e-4, abs=1e-5
        )
        tokens = [pair_tokens(made(batch), shares).sum() for batch in step]
        assert log["batch/tokens"] == pytest.approx(np.mean(tokens)) and max(tokens) <= BUDGET
        assert log["batch/pairs"] == pytest.approx(len(pairs) / len(step))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter -= 0.05 * parameter.grad


def test_the_row_that_is_computed_is_bounded(tmp_path):
    """Positions that the model computes, after rows were cut to max_length, with a shared prompt."""
    rows = [
        {"prompt": "film " * n, "chosen": "good " * (n % 7 + 1), "rejected": "bad " * (n % 5 + 1)}
        for n in range(1, 25)
    ]
    run, _ = by_tokens(
        tmp_path, rows, True, max_length=12, max_tokens_per_batch=40, objective="simpo"
    )
    assert run.dataset_reports["train"].prompts_truncated > 0
    widths = []
    run.model.get_input_embeddings().register_forward_hook(
        lambda m, inputs, out: widths.append(inputs[0].shape)
    )
    run.train()
    assert all(shape[0] == 1 and shape[1] <= 40 for shape in widths)
    assert np.mean([shape[1] for shape in widths]) > 0.7 * 40


def test_sequential_batches_keep_the_dataset_s_order(tmp_path):
    rows = uneven_rows(20)
    run, seen = by_tokens(tmp_path, rows, train_sampling_strategy="sequential")
    run.train()
    assert [key(row) for batch in seen for row in batch] == [key(row) for row in rows]
    sizes = [pair_tokens(made(batch), False).sum() for batch in seen]
    following = [pair_tokens(made(batch[:1]), False).sum() for batch in seen[1:]]
    assert max(sizes) <= BUDGET
    # Each batch is full: the next pair has no room in it.
    assert all(size + next_ > BUDGET for size, next_ in zip(sizes, following, strict=False))


@pytest.mark.parametrize("name", ["data_seed", "seed"])
def test_the_order_is_the_seed_s(tmp_path, name):
    rows, orders = uneven_rows(20), []
    for value in (5, 5, 6):
        run, seen = by_tokens(tmp_path, rows, **{name: value})
        # What else draws has no part in it.
        torch.manual_seed(len(orders))
        list(run.get_train_dataloader())
        orders.append([[key(row) for row in batch] for batch in seen])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("shares", [False, True])
def test_evaluation_is_that_of_padded_batches(tmp_path, shares):
    rows = uneven_rows(23, seed=2)
    options = {"objective_options": {"clip": 1.1}, "objective": "adadpo"}
    padded = trainer(
        tmp_path,
        model=tiny.model(),
        ref_model=tiny.model(seed=1),
        per_device_eval_batch_size=3,
        **options,
    )
    run, seen = by_tokens(tmp_path, rows, shares, ref_model=tiny.model(seed=1), **options)
    evaluated = [each.evaluate(made(rows)) for each in (padded, run)]
    assert [key(row) for batch in seen for row in batch] == [key(row) for row in rows]
    assert max(pair_tokens(made(batch), shares).sum() for batch in seen) <= BUDGET
    predicted = run.predict(made(rows)).metrics
    own = ("runtime", "per_second", "preparation_time", "epoch")
    names = {each for each in evaluated[0] if not each.endswith(own)}
    assert len(names) > 8
    for each in names:
        expected = pytest.approx(evaluated[0][each], rel=2e-5, abs=2e-6)
        assert evaluated[1][each] == expected, each
        assert predicted[each.replace("eval_", "test_")] == expected, each


@pytest.mark.parametrize("shares", [False, True])
def test_the_reference_s_sums_are_put_back_by_row(tmp_path, shares, monkeypatch):
    """Also if the pass dies and goes on: the missing rows are batched by tokens again."""
    monkeypatch.setattr(reference_cache, "_SHARD_PAIRS", 4)
    rows, tokens, dies = uneven_rows(18), [], [99]
    true = PreferenceTrainer._reference_logps

    def reference_logps(self, inputs):
        tokens.append(inputs["input_ids"].numel())
        if len(tokens) == dies[0]:
            raise KeyboardInterrupt
        return true(self, inputs)

    monkeypatch.setattr(PreferenceTrainer, "_reference_logps", reference_logps)

    def precomputed():
        del tokens[:]
        options = {"ref_model": tiny.model(seed=1), "precompute_ref_log_probs": True}
        return by_tokens(tmp_path, rows, shares, **options)[0]

    run = precomputed()
    batches = len(tokens)
    assert sum(tokens) == pair_tokens(made(rows), shares).sum() and max(tokens) <= BUDGET
    torch.testing.assert_close(
        sums(run.train_dataset).double(),
        sums_from_logits(tiny.model(seed=1), run.train_dataset),
        atol=1e-4,
        rtol=1e-6,
    )
    precomputed()
    assert not tokens
    for file in shards(tmp_path).values():
        file.unlink()
    dies[0] = batches - 1
    with pytest.raises(KeyboardInterrupt):
        precomputed()
    assert 0 < len(shards(tmp_path)) < 5
    dies[0] = 99
    again = precomputed()
    assert 0 < len(tokens) < batches and max(tokens) <= BUDGET
    torch.testing.assert_close(sums(again.train_dataset), sums(run.train_dataset))


RESUMED = {
    "plain": {},
    "accumulated, in workers": {"gradient_accumulation_steps": 2, "dataloader_num_workers": 1},
    "max_steps, lora": {"max_steps": 14, "num_train_epochs": 1},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, name):
    """In the first epoch, at its end, in the second epoch; with dropout and shuffled batches."""

    def started(**options):
        given = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1, **RESUMED[name]}
        if "lora" in name:
            given["peft_config"] = peft.LoraConfig(r=4, lora_dropout=0.3)
        run, _ = by_tokens(
            tmp_path,
            uneven_rows(29),
            True,
            model=tiny.model(attention_dropout=0.3),
            disable_dropout=False,
            lr_scheduler_type="linear",
            logging_steps=2,
            **{**given, **options},
        )
        return run

    whole = started()
    whole.train()
    an_epoch = math.ceil(len(whole.get_train_dataloader()) / whole.args.gradient_accumulation_steps)
    steps = whole.state.global_step
    assert steps == (14 if "max_steps" in name else 2 * an_epoch) and an_epoch > 3
    for step in (2, an_epoch, an_epoch + 2):
        torch.manual_seed(step)
        resumed = started(save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == steps
        assert_same_weights(weights(resumed.model), weights(whole.model), atol=0, rtol=0)
        assert logs_of(resumed) == logs_of(whole)


def test_resumed_with_other_batches_warns(tmp_path, caplog):
    """As transformers does for another number of pairs: what is skipped is counted in batches."""
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 3}
    by_tokens(tmp_path, uneven_rows(12), **saving)[0].train()
    checkpoint = str(tmp_path / "checkpoint-2")
    pairs = {"max_tokens_per_batch": None, "per_device_train_batch_size": 4}
    for options, others in (({}, 0), ({"max_tokens_per_batch": 70}, 1), (pairs, 1)):
        caplog.clear()
        run, _ = by_tokens(
            tmp_path, uneven_rows(12), **{**saving, "save_strategy": "no", **options}
        )
        run.train(resume_from_checkpoint=checkpoint)
        found = [r.getMessage() for r in caplog.records if "with other batches" in r.getMessage()]
        assert len(found) == others
    assert "checkpoint-2 was trained with other batches ({'max_tokens_per_batch': 90" in found[0]
    assert "than this run has (not by tokens): the epoch goes on after as many batches" in found[0]


def test_max_steps_over_several_epochs(tmp_path):
    """And the speed that is logged counts pairs, of which a batch has no fixed number."""
    rows = uneven_rows(20)
    run, seen = by_tokens(tmp_path, rows, max_steps=25)
    metrics = run.train().metrics
    assert run.state.global_step == 25
    batches = len(run.get_train_dataloader())
    assert 2 * batches < 25
    for epoch in range(2):
        assert counted(seen[epoch * batches :][:batches]) == Counter(map(key, rows))
    pairs = metrics["train_samples_per_second"] * metrics["train_runtime"]
    assert pairs == pytest.approx(25 * round(20 / batches), rel=0.02)


def test_what_an_epoch_has_is_logged(tmp_path, caplog):
    run, seen = by_tokens(tmp_path, uneven_rows(20), train_sampling_strategy="sequential")
    with caplog.at_level("INFO", logger="prefkern"):
        batches = list(run.get_train_dataloader())
    numbers = [len(batch) for batch in seen]
    tokens = [batch["input_ids"].numel() for batch in batches]
    assert (
        f"an epoch has {len(seen)} batches of {min(numbers)} to {max(numbers)} pairs, "
        f"{np.mean(tokens):.0f} tokens on average and {max(tokens)} at most "
        f"(max_tokens_per_batch is {BUDGET})" in caplog.text
    )


def test_repeated_pairs_are_announced(tmp_path, caplog, monkeypatch):
    run, _ = by_tokens(tmp_path, rows_of_lengths(*[(20, 9, 7)] * 3))
    monkeypatch.setattr(PreferenceConfig, "world_size", 2)
    with caplog.at_level("WARNING", logger="prefkern"):
        run.get_train_dataloader()
    assert "1 of 3 pairs are trained on twice in each epoch, so that each of 2" in caplog.text


TOO_LONG = [
    *uneven_rows(3),
    *rows_of_lengths((30, 25, 9), (1, 1, 1), (30, 25, 40)),
]


def test_a_pair_above_the_budget_is_an_error_before_training(tmp_path):
    message = (
        r"row 3 after tokenisation: the pair has {} tokens, and a batch has room for 90 "
        r"\(max_tokens_per_batch\); {}, the longest of {}: raise max_tokens_per_batch, or lower "
    )
    whole = message.format(94, "2 such rows", 125)
    with pytest.raises(ValueError, match=f"dataset 'train', {whole}max_length"):
        by_tokens(tmp_path, TOO_LONG)
    one = {"one": made(TOO_LONG)}
    with pytest.raises(ValueError, match=f"dataset 'eval_one', {whole}"):
        by_tokens(tmp_path, uneven_rows(3), eval_dataset=one)
    run, _ = by_tokens(tmp_path, uneven_rows(3))
    with pytest.raises(ValueError, match=f"dataset 'eval', {whole}"):
        run.evaluate(made(TOO_LONG))
    with pytest.raises(ValueError, match=f"dataset 'test', {whole}"):
        run.predict(made(TOO_LONG))
    # A shared prompt counts once.
    run, _ = by_tokens(tmp_path, TOO_LONG[:5], True)
    with pytest.raises(ValueError, match="row 5 .* has 96 tokens, .*; 1 such row, the longest of"):
        run.evaluate(made(TOO_LONG))


REFUSED = {
    "padding": ({"padding_free": False}, r"max_tokens_per_batch \(90\) needs padding_free: "),
    "none": ({"max_tokens_per_batch": 0}, "max_tokens_per_batch must be None or an int >= 1"),
    "half": ({"max_tokens_per_batch": 90.5}, "max_tokens_per_batch must be None or an int >= 1"),
    **{
        name: ({name: value}, f"{name} is {value!r}, which has no effect under max_tokens_per_ba")
        for name, value in {
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "auto_find_batch_size": True,
            "dataloader_drop_last": True,
        }.items()
    },
    "precompute_ref_batch_size": (
        {"precompute_ref_batch_size": 4, "precompute_ref_log_probs": True},
        "precompute_ref_batch_size is 4, which has no effect under max_tokens_per_batch",
    ),
    "even_batches": (
        {"accelerator_config": {"even_batches": False}},
        "accelerator_config's even_batches is False, which has no effect under max_tokens_per_",
    ),
    "split_batches": (
        {"accelerator_config": {"split_batches": True}},
        "accelerator_config's split_batches is True, which has no effect under max_tokens_per_b",
    ),
    "dispatch_batches": (
        {"accelerator_config": {"dispatch_batches": True}},
        "dispatch_batches cuts a batch by its rows",
    ),
    "by length": (
        {"train_sampling_strategy": "group_by_length"},
        "batches by length are not supported on preference pairs",
    ),
    "collator": (
        {"data_collator": PreferenceCollator(0)},
        "padding_free has no effect on a data_collator that is given",
    ),
    "kto": (
        {"objective": "kto", "train_dataset": made(single_rows(8))},
        "max_tokens_per_batch is for pairs: this objective takes its reference point from",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{**BY_TOKENS, **options})


def test_reward_models_have_batches_of_a_number_of_pairs(tmp_path):
    with pytest.raises(TypeError, match="RewardConfig has no argument 'max_tokens_per_batch'"):
        RewardConfig(output_dir=str(tmp_path), max_tokens_per_batch=BUDGET)
