"""Pairs with pictures: every family held to its own logits, row by row, and whole runs to TRL."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
pytest.importorskip("PIL")

from datasets import Dataset

import prefkern
from prefkern import PreferenceTrainer
from support import pictures
from support.pictures import FAMILIES, IDEFICS, QWEN, Family
from support.training import config


def run(path: Path, model, processor, data, **options) -> PreferenceTrainer:
    names = ("ref_model", "peft_config", "eval_dataset", "data_collator")
    given = {name: options.pop(name) for name in names if name in options}
    options = {"objective": "dpo", "beta": pictures.BETA, **options}
    return PreferenceTrainer(
        model, config(path, **options), data, processing_class=processor, **given
    )


@pytest.mark.parametrize("chats", [False, True], ids=["texts", "chats"])
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_step_is_that_of_the_models_own_logits(
    tmp_path: Path, family: Family, chats: bool
) -> None:
    """In float64: a padded batch against its rows one by one, each from its own processor."""
    model, processor = family.make()
    reference = family.make(1)[0].double()
    model.double()
    rows = pictures.rows(family, 6, chats=chats)
    data = pictures.dataset(family, 6, chats=chats)
    options = {"per_device_train_batch_size": 6, "train_sampling_strategy": "sequential"}
    trained = run(tmp_path, model, processor, data, ref_model=reference, **options)
    batch = next(iter(trained.get_train_dataloader()))
    assert {"pixel_values", *family.inputs} <= batch.keys()
    assert len({int(each.sum()) for each in batch["attention_mask"]}) > 2, "nothing is padded"

    with torch.no_grad():
        found = prefkern.token_logprobs(model, **batch).sum(1)
        of_reference = pictures.sums(reference, processor, rows)
    expected = pictures.sums(model, processor, rows)
    torch.testing.assert_close(found, expected.detach(), atol=1e-10, rtol=0)
    loss = trained.compute_loss(model, batch)
    loss.backward()
    ours = pictures.gradients(model)
    pictures.dpo(expected, of_reference).backward()
    theirs = pictures.gradients(model)
    for part in family.parts:
        assert any(part in name and g.abs().max() > 0 for name, g in theirs.items()), part
    assert pictures.worst(ours, theirs) < 1e-5


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_an_adapter_with_itself_switched_off_as_the_reference(
    tmp_path: Path, family: Family
) -> None:
    model, processor = family.make()
    rows, data = pictures.rows(family, 4), pictures.dataset(family, 4)
    options = {"train_sampling_strategy": "sequential", "gradient_checkpointing": True}
    trained = run(tmp_path, model.double(), processor, data, peft_config=pictures.lora(), **options)
    policy = trained.model
    policy.double()
    batch = next(iter(trained.get_train_dataloader()))
    trained.compute_loss(policy, batch).backward()
    ours = pictures.gradients(policy)
    with torch.no_grad(), policy.disable_adapter():
        of_reference = pictures.sums(policy, processor, rows)
    pictures.dpo(pictures.sums(policy, processor, rows), of_reference).backward()
    theirs = pictures.gradients(policy)
    assert all("lora" in name for name in theirs) and len(theirs) == 12
    assert pictures.worst(ours, theirs) < 1e-5


FORMS = ["copy", "model", "beforehand", "carried"]


@pytest.mark.parametrize("family", [QWEN, IDEFICS], ids=str)
def test_the_forms_of_the_reference_train_alike(tmp_path: Path, family: Family) -> None:
    model, processor = family.make()
    data = pictures.dataset(family, 8)
    with torch.no_grad():
        found = pictures.sums(copy.deepcopy(model).double(), processor, pictures.rows(family, 8))
    chosen, rejected = found.chunk(2)
    carried = data.add_column("ref_chosen_logps", chosen.tolist())
    carried = carried.add_column("ref_rejected_logps", rejected.tolist())
    ends = {}
    for form in FORMS:
        given = {"ref_model": copy.deepcopy(model)} if form == "model" else {}
        policy = copy.deepcopy(model)
        trained = run(
            tmp_path / form,
            policy,
            processor,
            carried if form == "carried" else data,
            precompute_ref_log_probs=form == "beforehand",
            optim="sgd",
            num_train_epochs=2,
            **given,
        )
        trained.train()
        first, *_, last = [log for log in trained.state.log_history if "loss" in log]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        assert last["loss"] < first["loss"]
        ends[form] = {n: p.detach() for n, p in policy.named_parameters()}
    for form in FORMS[1:]:
        for name, weight in ends["copy"].items():
            torch.testing.assert_close(ends[form][name], weight, atol=2e-6, rtol=1e-4)


def test_a_reference_that_moves(tmp_path: Path) -> None:
    model, processor = QWEN.make()
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    trained = run(tmp_path, model, processor, pictures.dataset(QWEN, 8), **options)
    trained.train()
    # After each step it is the policy, so that every step begins at ln 2.
    losses = [log["loss"] for log in trained.state.log_history if "loss" in log]
    assert losses == pytest.approx([0.693147] * 2, abs=1e-5)


@pytest.mark.parametrize("chats", [False, True], ids=["texts", "chats"])
@pytest.mark.parametrize("family", FAMILIES[:5], ids=str)
def test_rows_of_text_among_rows_with_pictures(tmp_path: Path, family: Family, chats: bool) -> None:
    model, processor = family.make()
    rows = pictures.rows(family, 4, chats=chats)
    for row in rows[1:3]:
        row["images"] = []
        if not chats:
            row["prompt"] = row["prompt"].replace(family.placeholder, "").strip()
    trained = run(
        tmp_path,
        model.double(),
        processor,
        Dataset.from_list(rows),
        train_sampling_strategy="sequential",
    )
    expected = pictures.sums(model, processor, rows)
    batch = next(iter(trained.get_train_dataloader()))
    found = prefkern.token_logprobs(model, **batch).sum(1)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    trained.compute_loss(model, batch).backward()
    ours = pictures.gradients(model)
    pictures.dpo(expected, expected.detach()).backward()
    assert pictures.worst(ours, pictures.gradients(model)) < 1e-5
    without = trained.data_collator([trained.train_dataset[row] for row in (1, 2)])
    assert "pixel_values" not in without
    found = prefkern.token_logprobs(model, **without).sum(1)
    torch.testing.assert_close(found, expected[[1, 2, 5, 6]], atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FAMILIES[:5], ids=str)
def test_three_responses_to_a_picture(tmp_path: Path, family: Family) -> None:
    """TPO's gold response: its row has the pictures, too."""
    model, processor = family.make()
    rows = pictures.rows(family, 4)
    for row in rows:
        row["reference"] = f" this is{row['chosen']}"
    options = {"objective": "tpo", "train_sampling_strategy": "sequential"}
    data = Dataset.from_list(rows)
    trained = run(tmp_path, model.double(), processor, data, **options)
    batch = next(iter(trained.get_train_dataloader()))
    found = prefkern.token_logprobs(model, **batch).sum(1)
    gold = [pictures.seen_alone(model, processor, row, "reference") for row in rows]
    expected = torch.cat([pictures.sums(model, processor, rows), torch.stack(gold)])
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    trained.train()


@pytest.mark.parametrize("family", FAMILIES[:5], ids=str)
def test_single_responses_to_pictures(tmp_path: Path, family: Family) -> None:
    """KTO: the rows, and prompts beside responses to other pictures, though the question is one."""
    model, processor = family.make()
    rows = pictures.rows(family, 4)
    for row in rows:
        row["prompt"] = f"{' '.join([family.placeholder] * len(row['images']))} what is this"
    options = {"objective": "kto", "train_sampling_strategy": "sequential"}
    data = Dataset.from_list(rows)
    trained = run(tmp_path, model.double(), processor, data, eval_dataset=data, **options)
    first, second = trained.get_train_dataloader()
    expected = pictures.sums(model, processor, rows)
    names = [name for name in first if not name.startswith("mismatched_")]
    for batch, sides in ((first, expected[:4]), (second, expected[4:])):
        given = {name: batch[name] for name in names if name != "desirable"}
        found = prefkern.token_logprobs(model, **given).sum(1)
        torch.testing.assert_close(found, sides, atol=1e-10, rtol=0)
    assert len(first["mismatched_input_ids"]) == 4, "pictures tell prompts apart"
    others = {name: first[f"mismatched_{name}"] for name in names if name != "desirable"}
    found = prefkern.token_logprobs(model, **others).sum(1)
    mixed = [{**row, "chosen": rows[(at + 1) % 4]["chosen"]} for at, row in enumerate(rows)]
    alone = [pictures.seen_alone(model, processor, row, "chosen") for row in mixed]
    torch.testing.assert_close(found, torch.stack(alone), atol=1e-10, rtol=0)
    trained.train()
    # A batch of one question and one picture has no mismatched rows.
    same = Dataset.from_list([rows[0]] * 2)
    assert trained.evaluate(same)["eval_loss"] > 0


@pytest.mark.parametrize("family", [QWEN, IDEFICS], ids=str)
def test_distributions_over_the_next_token(tmp_path: Path, family: Family) -> None:
    """TDPO1 compares policy and reference at every token: both see the pictures."""
    model, processor = family.make()
    reference = family.make(1)[0]
    options = {"objective": "tdpo1", "ref_model": reference}
    trained = run(tmp_path, model, processor, pictures.dataset(family, 4), **options)
    batch = next(iter(trained.get_train_dataloader()))
    given = {name: value for name, value in batch.items() if name != "labels"}
    targets = batch["labels"][:, 1:]
    scored = targets != -100
    with torch.no_grad():
        ours, theirs = (
            each(**given).logits[:, :-1].double().log_softmax(-1) for each in (model, reference)
        )
    picked = (ours - theirs).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = ((picked * scored).sum(1)).chunk(2)
    kl_chosen, kl_rejected = (((theirs.exp() * (theirs - ours)).sum(-1) * scored).sum(1)).chunk(2)
    logits = pictures.BETA * ((chosen - rejected) - (kl_rejected - kl_chosen))
    expected = -torch.nn.functional.logsigmoid(logits).mean()
    assert trained.compute_loss(model, batch).item() == pytest.approx(expected.item(), abs=2e-6)
