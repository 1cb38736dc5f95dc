"""Packed rows and shared prompts in a reward model: padded batches' rewards, gradients and runs."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

from support import tiny
from support.ranks import run_on_two_ranks

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

from prefkern.cli import __main__ as cli
from prefkern.data.collate import PreferenceCollator
from prefkern.models import packing, scores
from prefkern.training import rewards

# Windows shorter than prompts and responses.
FAMILIES = {
    "Llama": {},
    "Qwen3": {},
    "GPT2": {},
    "Mistral": {"sliding_window": 5},
    "Gemma2": {"sliding_window": 5},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
LAYOUTS = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared": {"padding_free": True, "share_prompt": True},
}
PAD = 4


def classifier(family: str = "Llama", **options):
    config = tiny.model(family, **options).config
    config.update({"num_labels": 1, "pad_token_id": PAD})
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config)


def rows() -> list[dict]:
    """Unequal lengths, prompts and responses of one token, a prompt twice, the pad token in texts."""
    generator = torch.Generator().manual_seed(0)

    def ids(n: int) -> list[int]:
        return torch.randint(5, tiny.VOCAB_SIZE, (n,), generator=generator).tolist()

    shapes = [(13, 6, 9), (1, 8, 2), (7, 1, 12), (22, 5, 1), (4, 1, 1)]
    made = [
        dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(ids, shape), strict=True))
        for shape in shapes
    ]
    made[3]["prompt_ids"] = made[0]["prompt_ids"]
    made[0]["rejected_ids"][-2:] = [PAD, PAD]
    # Then the model scores a token of the prompt, which may be before its last one.
    made[2]["chosen_ids"] = [PAD]
    made[3]["rejected_ids"] = [PAD]
    made[4]["rejected_ids"], made[4]["prompt_ids"][-1] = [PAD], PAD
    return made


def step(model, layout: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rewards of a batch, and the gradients of all parameters."""
    batch = PreferenceCollator(PAD, **LAYOUTS[layout])(rows())
    found = rewards.pair_rewards(model, batch)
    model.zero_grad()
    rewards.bradley_terry_loss(*found.unbind(1)).sum().backward()
    zeros = torch.zeros(())
    return found.detach(), [zeros if p.grad is None else p.grad for p in model.parameters()]


@pytest.mark.parametrize("layout", ["packed", "shared"])
@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_and_gradients_are_those_of_padded_batches(family, layout):
    model = classifier(family, **FAMILIES[family]).eval()
    expected, gradients = step(model, "padded")
    found, same = step(model, layout)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    for gradient, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(other, gradient, atol=2e-5, rtol=1e-4)


def test_a_shared_prompt_is_computed_once():
    tokens = {
        layout: PreferenceCollator(PAD, **options)(rows())["input_ids"].numel()
        for layout, options in LAYOUTS.items()
    }
    seen = []
    model = classifier()
    model.score.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
    for layout in LAYOUTS:
        seen.clear()
        step(model, layout)
        expected = tokens[layout] // (10 if layout == "padded" else 1)
        assert seen[-1] == expected
    assert tokens["shared"] == sum(len(r["prompt_ids"]) + 1 for r in rows()) + sum(
        len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in rows()
    )


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_other_tokens_of_a_chosen_response_leave_the_rejected_bitwise_alone(layout):
    model = classifier().eval()
    changed = rows()
    for row in changed:
        row["chosen_ids"] = [5 + token % 90 for token in row["chosen_ids"]]
    collate = PreferenceCollator(PAD, **LAYOUTS[layout])
    with torch.no_grad():
        one, other = (rewards.pair_rewards(model, collate(each)) for each in (rows(), changed))
    assert (one[:, 0] != other[:, 0]).any() and one[:, 1].equal(other[:, 1])


@pytest.fixture
def files(tmp_path):
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    lines = "".join(json.dumps(row) + "\n" for row in tiny.pairs(31))
    (tmp_path / "pairs.jsonl").write_text(lines)
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "pairs.jsonl"),
        "output": str(tmp_path / "margins.jsonl"),
        "output_dir": str(tmp_path / "reward"),
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.05,
        "max_grad_norm": 0,
        "num_train_epochs": 1,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "overwrite": True,
    }


def flags(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def margins(options: dict) -> list[float]:
    assert cli.main(["margins", *flags(options)]) == 0
    return written(options)


def written(options: dict) -> list[float]:
    return [json.loads(line)["margin"] for line in Path(options["output"]).read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_r": 0},
        {"gradient_checkpointing": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=["lora", "all weights", "checkpointing", "accumulation"],
)
def test_whole_runs_are_those_of_padded_batches(files, options):
    """Training, early stopping, the saved model's margins; and scoring with that model."""
    log = Path(files["output_dir"], "trainer_state.json")
    kept = ("dataset", "output", "overwrite", "use_cpu", "disable_tqdm")
    scoring = {name: files[name] for name in kept} | {"reward_model": files["output_dir"]}
    found = {}
    for layout, packing_options in LAYOUTS.items():
        trained = margins({**files, **options, **packing_options})
        history = json.loads(log.read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
        assert len(losses) == 7
        found[layout] = (trained, losses)
        assert margins({**scoring, **packing_options}) == pytest.approx(trained, abs=2e-5)
    for layout in ("packed", "shared"):
        for values, expected in zip(found[layout], found["padded"], strict=True):
            assert values == pytest.approx(expected, abs=2e-4), layout


def test_a_float32_head_on_a_bfloat16_body(tmp_path):
    """The probe measures at the body's precision; no layout is further from float32 than padded."""
    classifier().save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    exact, _ = step(rewards.load_reward_model(str(tmp_path))[0].eval(), "padded")
    model, _ = rewards.load_reward_model(str(tmp_path), dtype="bfloat16")
    model.eval()
    errors = {layout: (step(model, layout)[0] - exact).norm().item() for layout in LAYOUTS}
    assert 0 < errors["padded"] < 0.1 * exact.norm()
    assert max(errors.values()) < 1.5 * errors["padded"]


def test_two_ranks_share_as_one_does(files, tmp_path):
    expected = margins({**files, "max_steps": 4})
    options = {**files, "max_steps": 4, "per_device_train_batch_size": 2, **LAYOUTS["shared"]}
    run_on_two_ranks("-m", "prefkern.cli", "margins", *flags(options))
    assert written(options) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_the_trainer_packs_and_says_where_attention_is_masked(tmp_path, caplog):
    config = functools.partial(rewards.RewardConfig, str(tmp_path), use_cpu=True)
    trainer = functools.partial(
        rewards.RewardTrainer, tokenizer=tiny.tokenizer(), pad_token_id=PAD, train_dataset=None
    )
    model = classifier("Gemma2")
    # Versions before 5.21 give it another one.
    model.set_attn_implementation("eager")
    run = trainer(model, config(padding_free=True, share_prompt=True))
    assert run.data_collator == PreferenceCollator(PAD, padding_free=True, share_prompt=True)
    assert packing.WHOLE_ROW in caplog.text
    caplog.clear()
    trainer(classifier(), config(padding_free=True, share_prompt=True))
    assert packing.WHOLE_ROW not in caplog.text


def bert():
    config = transformers.BertConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=1,
    )
    return AutoModelForSequenceClassification.from_config(config)


def test_models_that_cannot_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="BertForSequenceClassification pools the states of a row"):
        scores.require_packed_scores(bert())
    roberta = transformers.RobertaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_labels=1
    )
    with pytest.raises(ValueError, match="is a RobertaClassificationHead with modules inside"):
        scores.require_packed_scores(AutoModelForSequenceClassification.from_config(roberta))
    tuned = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="rows that share a prompt: prompt learning puts its vir"):
        scores.require_packed_scores(peft.get_peft_model(classifier(), tuned), shares=True)
    model = classifier()
    original = type(model).forward

    @functools.wraps(original)
    def early(self, input_ids, **kwargs):
        """Of a row of its own it scores the fourth token."""
        if input_ids.shape[1] == 8:
            input_ids = input_ids[:, :4]
        return original(self, input_ids, **kwargs)

    monkeypatch.setattr(type(model), "forward", early)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification does not score the last"):
        scores.require_packed_scores(model)

    @functools.wraps(original)
    def by_hand(self, input_ids, **kwargs):
        """Multiplies by the head's weight itself."""
        return self.model(input_ids, **kwargs).last_hidden_state @ self.score.weight.T

    monkeypatch.setattr(type(model), "forward", by_hand)
    with pytest.raises(RuntimeError, match="did not call its output head"):
        scores.require_packed_scores(classifier())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share_prompt": True}, "share_prompt needs padding_free: only a packed row can share"),
        ({"padding_free": "maybe"}, "padding_free must be True or False"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "dispatch_batches cuts a batch by its",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        rewards.RewardConfig(str(tmp_path), use_cpu=True, **options)
