"""What PreferenceTrainer refuses before the first step, since it would train something else, or fail then."""

from __future__ import annotations

import math

import pytest
import tiny

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from test_trainer import trainer

LN2 = math.log(2)


def with_sums(count: int = 4) -> datasets.Dataset:
    """Pairs with reference sums of some other model."""
    rows = tiny.dataset(count).add_column("ref_chosen_logps", [-5.0] * count)
    return rows.add_column("ref_rejected_logps", [-50.0] * count)


@pytest.mark.parametrize("place", ["train", "eval", "eval_one"])
@pytest.mark.parametrize(
    "argument",
    ["ref_model", "ref_model_name_or_path", "ref_adapter_name", "precompute_ref_log_probs"],
)
def test_sums_in_a_dataset_are_not_used_in_place_of_what_was_asked_for(tmp_path, argument, place):
    value = {"ref_model": tiny.model(seed=1), "precompute_ref_log_probs": True}
    given = {argument: value.get(argument, "some/name")}
    evaluated = {"eval": with_sums(), "eval_one": {"two": tiny.dataset(4), "one": with_sums()}}
    if place == "train":
        given["train_dataset"] = with_sums()
    with pytest.raises(ValueError, match=f"dataset '{place}' carries reference sums") as caught:
        trainer(tmp_path, objective="dpo", eval_dataset=evaluated.get(place), **given)
    message = str(caught.value)
    assert f"beside which {argument} (" in message and f"leave {argument} out" in message
    assert "dataset.remove_columns(['ref_chosen_logps', 'ref_rejected_logps'])" in message


def test_nor_in_a_later_evaluation(tmp_path):
    """Sums that the trainer computed itself are its own, whichever way they come back."""
    options = {"objective": "dpo", "precompute_ref_log_probs": True}
    run = trainer(tmp_path, eval_dataset={"one": tiny.dataset(4)}, **options)
    for dataset in (run.eval_dataset, run.eval_dataset["one"], {"one": tiny.dataset(4)}):
        metrics = run.evaluate(dataset)
        (loss,) = [value for name, value in metrics.items() if name.endswith("_loss")]
        assert loss == pytest.approx(LN2, abs=1e-6)
    for dataset, name in ((with_sums(), "eval"), ({"one": with_sums()}, "eval_one")):
        with pytest.raises(ValueError, match=f"dataset '{name}' carries reference sums"):
            run.evaluate(dataset)
    with pytest.raises(ValueError, match="dataset 'test' carries reference sums"):
        run.predict(with_sums())
    # Alone they are the reference, and an objective that has none of its own leaves them.
    run = trainer(tmp_path, objective="dpo", train_dataset=with_sums(), eval_dataset=with_sums())
    assert run.ref_model is None and run.evaluate()["eval_loss"] > 2
    trainer(tmp_path, objective="simpo", train_dataset=with_sums())
