"""The examples run on tiny models and local files, and do what they say."""

from __future__ import annotations

import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from support import tiny
from support.ranks import run_on_two_ranks

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
peft = pytest.importorskip("peft")

import prefkern

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path.append(str(EXAMPLES))
PAIRS = 12


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Arguments that name a tiny model, pairs and an output folder."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    lines = (json.dumps(row) + "\n" for row in tiny.pairs(PAIRS))
    (tmp_path / "pairs.jsonl").write_text("".join(lines))
    return [
        *("--model", str(tmp_path / "model")),
        *("--dataset", str(tmp_path / "pairs.jsonl")),
        *("--output_dir", str(tmp_path / "out")),
    ]


def test_every_example_is_listed():
    page = (EXAMPLES / "README.md").read_text()
    linked = {name.rstrip("/") for name in re.findall(r"\]\(([^)]+)\)", page)}
    assert all((EXAMPLES / name).exists() for name in linked)
    recipes = {str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*.yaml")}
    helpers = {"movie_pairs.py", "smollm2.py"}  # of the demo
    scripts = {file.name for file in EXAMPLES.glob("*.py")} - helpers
    assert recipes | scripts <= linked


def test_the_demo_is_importable():
    assert callable(importlib.import_module("demo").main)


def test_trainer(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer = importlib.import_module("trainer").main([*files, "--max_steps", "2"])
    assert trainer.state.global_step == 2
    assert prefkern.last_plan().structure in ("forward", "one_pass")
    report = trainer.dataset_reports["train"]
    assert report.pairs == 10 and str(report) in capsys.readouterr().out
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluations and evaluations[-1]["eval_loss"] > 0
    model = peft.PeftModel.from_pretrained(tiny.model(), tmp_path / "out")
    assert any("lora_B" in name and value.any() for name, value in model.named_parameters())


@pytest.fixture
def plain_descent(monkeypatch):
    """Plain gradient descent: a loss of another scale takes another step."""
    accelerate = pytest.importorskip("accelerate")
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "AdamW", lambda parameters, lr, **_: sgd(parameters, lr))
    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", lambda *_: None)
    # What `accelerate launch --cpu` sets.
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


# The same in a process of its own, as one of several ranks.
RANK = """
import sys
import torch
from accelerate import Accelerator
torch.set_num_threads(1)
torch.optim.AdamW = lambda parameters, lr, **_: torch.optim.SGD(parameters, lr)
Accelerator.clip_grad_norm_ = lambda *_: None
sys.path.append(sys.argv.pop(1))
import accelerate_loop
accelerate_loop.main()
print("ranks", Accelerator().num_processes)
"""


def _arguments(files: list[str], folder: Path, **options) -> list[str]:
    flags = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    return [*files[:-1], str(folder), "--learning_rate", "1.0", "--max_steps", "2", *flags]


def _adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def whole(files, tmp_path, plain_descent) -> list[float]:
    """The losses of steps of one batch of 12 pairs, whose adapter is saved."""
    arguments = _arguments(files, tmp_path / "whole", batch=12, accumulate=1)
    _, losses = importlib.import_module("accelerate_loop").main(arguments)
    assert prefkern.last_plan().structure == "one_pass"
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[1] < losses[0] - 0.1
    return losses


def _assert_same_adapter(folder: Path, other: Path) -> None:
    expected = _adapter(folder)
    for key, value in _adapter(other).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


def test_accelerate_loop_weighs_pairs_alike(files, tmp_path, whole):
    """Batches of 5, 5 and 2, and one batch of 12: the same steps."""
    uneven = _arguments(files, tmp_path / "uneven", batch=5, accumulate=3)
    _, losses = importlib.import_module("accelerate_loop").main(uneven)
    assert losses == pytest.approx(whole, abs=1e-5)
    _assert_same_adapter(tmp_path / "whole", tmp_path / "uneven")


@pytest.mark.long
def test_accelerate_loop_on_two_ranks(files, tmp_path, whole):
    """Two ranks of two batches of 3, and one batch of 12: the same steps."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    ranks = _arguments(files, tmp_path / "ranks", batch=3, accumulate=2)
    outputs = run_on_two_ranks(str(script), str(EXAMPLES), *ranks)
    assert all("ranks 2" in output for output in outputs)
    printed = [float(line.split("loss ")[1]) for line in outputs[0].splitlines() if "loss " in line]
    assert printed == pytest.approx(whole, abs=1e-4)
    _assert_same_adapter(tmp_path / "whole", tmp_path / "ranks")


def test_accelerate_loop_has_no_dropout_in_its_reference(files, tmp_path, plain_descent):
    """Equal models give ln 2, and a reference has no dropout inside a model in training mode."""
    loop = importlib.import_module("accelerate_loop")
    rates = {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3}
    model = tiny.model("GPT2", **rates)
    model.save_pretrained(files[1])
    _, losses = loop.main(
        [*_arguments(files, tmp_path / "drop", batch=12, accumulate=1), "--objective", "dpo"]
    )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)

    ids = torch.randint(4, 97, (4, 9))
    with torch.no_grad():
        logps = model(ids).logits[:, :-1].log_softmax(-1)
    expected = logps.gather(-1, ids[:, 1:, None])[..., 0].sum(-1)
    adapter = peft.LoraConfig(target_modules=["c_attn"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, adapter).train()
    found = loop.reference_logps(adapted, {"input_ids": ids})
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert all(module.training for module in adapted.modules())


def test_preference_outputs_are_those_of_the_models_own_logits(files):
    """Values and every gradient, of the step that the loop and the trainer make."""
    from prefkern.data import load_preference_dataset, tokenize_preferences
    from prefkern.data.collate import PreferenceCollator

    tokens, _ = tokenize_preferences(load_preference_dataset(files[3]), tiny.tokenizer())
    batch = PreferenceCollator(pad_token_id=0)(tokens.to_list())
    model, eager = (AutoModelForCausalLM.from_pretrained(files[1]) for _ in range(2))
    loss_fn = prefkern.FusedPreferenceLoss(prefkern.objectives.build("adadpo"))
    ref_logps = -torch.rand(2 * PAIRS) * 20
    out = prefkern.preference_outputs(model, batch, loss_fn, ref_logps=ref_logps)
    assert out.plan.structure in ("one_pass", "two_pass") and out.plan.trains_head
    out.loss.backward()

    logits = eager(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * scored
    sums, lengths = logps.sum(1), scored.sum(1)
    pairs = prefkern.Pairs(*sums.chunk(2), *ref_logps.chunk(2), *lengths.chunk(2))
    loss = loss_fn.objective(pairs).losses.mean()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-5, atol=1e-6)
    for (name, mine), theirs in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=2e-4, atol=2e-6, msg=name)
    other = prefkern.FusedPreferenceLoss(loss_fn.objective, ignore_index=-1)
    with pytest.raises(ValueError, match="must have ignore_index=-100, .* got -1"):
        prefkern.preference_outputs(model, batch, other, ref_logps=ref_logps)
