"""Model cards of the TRL integration: in TRL's form, of the objective that was trained."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import trainer as transformers_trainer

pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from trl import DPOTrainer as PlainDPOTrainer

from prefkern.integrations.trl import TPOTrainer
from prefkern.objectives import Adaptive, citations
from support import tiny
from support.cards import card, generated, options, run_quick_start
from support.trl_runs import build


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_adadpo_is_not_dpo_in_its_card_and_the_cards_code_runs(tmp_path, monkeypatch, adapted):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("base")
    tiny.tokenizer().save_pretrained("base")
    given = {"peft_config": peft.LoraConfig(r=4, task_type="CAUSAL_LM")} if adapted else {}
    saves = {"save_strategy": "steps", "save_steps": 1}
    trained = build(
        Path("out"), model="base", objective="adadpo", optim="adamw_torch",
        learning_rate=0.05, **saves, **given,
    )  # fmt: skip
    trained.train()
    for folder in ("out", "out/checkpoint-1"):
        assert "trained with AdaDPO" in card(tmp_path / folder).text
    trained.save_model()
    written = card(tmp_path / "out")
    text = written.content
    tags = {"generated_from_trainer", "trl", "prefkern", "dpo", "adadpo"}
    assert {*written.data.tags} == tags | ({"lora"} if adapted else set())
    assert written.data.library_name == ("peft" if adapted else "transformers")
    assert "trained with DPO" not in text and "[More Information Needed]" not in text
    assert "trained using prefkern with [TRL](https://github.com/huggingface/trl)" in text
    entries = re.findall(r"```bibtex\n@\w+\{(\w+),", text)
    assert entries == ["chen2026adadpo", "rafailov2023direct", "vonwerra2020trl", "prefkern"]
    assert re.search(r"^- TRL: 1\.\d+", text, re.MULTILINE)
    rows = {"objective": "AdaDPO", "beta": "0.1", "clip": "2", "total_train_batch_size": "4"}
    assert {**rows, "learning_rate": "0.05"}.items() <= options(text).items()
    printed = run_quick_start(text, tmp_path, samples=False)
    assert printed == generated(trained.model, trained.processing_class, text) != ""
    assert printed != generated(tiny.model(), trained.processing_class, text)


@pytest.mark.parametrize(
    "given, title, paper",
    [
        ({"loss_type": "sigmoid"}, "DPO", citations.DPO),
        ({"loss_type": "ipo"}, "IPO", citations.IPO),
        ({"objective": "simpo", "beta": 2.0}, "SimPO", citations.SIMPO),
    ],
    ids=["sigmoid", "ipo", "simpo"],
)
def test_trls_own_losses_are_named_and_cited(tmp_path, given, title, paper):
    reference = {} if title == "SimPO" else {"ref_model": tiny.model(seed=1)}
    trained = build(tmp_path, **given, **reference)
    trained.create_model_card(model_name="A name", dataset_name="org/pairs", tags="mine")
    written = card(tmp_path)
    assert f"trained with {title}, a method introduced in [{paper.title}]" in written.text
    assert {title.lower(), "trl", "prefkern", "mine"} <= {*written.data.tags}
    assert written.data.datasets == "org/pairs" and "# Model Card for A name\n" in written.text
    # The card has the sections of TRL's own, in its order, and the options besides.
    plain = build(tmp_path / "trl", PlainDPOTrainer, ref_model=tiny.model())
    plain.create_model_card(model_name="A name")
    headings = re.findall(r"^#+ .*$", card(tmp_path / "trl").text, re.MULTILINE)
    found = re.findall(r"^#+ .*$", written.text, re.MULTILINE)
    assert [each for each in found if each != "### Hyper-parameters"] == headings


def test_tpo_is_named_and_cited(tmp_path):
    tpo = pytest.importorskip("trl.experimental.tpo")
    trained = TPOTrainer(
        tiny.model(),
        tpo.TPOConfig(str(tmp_path), use_cpu=True, report_to="none"),
        train_dataset=tiny.triple_dataset(4),
        processing_class=tiny.tokenizer(),
        adaptive=Adaptive("policy"),
    )
    trained.create_model_card()
    written = card(tmp_path)
    assert f"trained with AdaTPO, a method introduced in [{citations.ADADPO.title}]" in written.text
    assert citations.TPO.bibtex in written.text
    assert {"tpo", "trl", "prefkern"} <= {*written.data.tags}


def test_push_to_hub_uploads_it(tmp_path, monkeypatch):
    uploads = []

    class Hub:
        def create_repo(self, name, **_):
            return type("Url", (), {"repo_id": f"org/{name}"})()

        def upload_folder(self, *, folder_path, **_):
            uploads.append((Path(folder_path) / "README.md").read_text())

    monkeypatch.setattr(transformers_trainer, "hf_api", Hub)
    trained = build(tmp_path / "out", objective="adadpo", ref_model=tiny.model(seed=1))
    trained.push_to_hub(dataset_name="org/pairs")
    (text,) = uploads
    assert "trained with AdaDPO" in text and 'model="org/out"' in text and "[org/pairs]" in text


def test_links_to_the_run_in_trackers(tmp_path, monkeypatch):
    from prefkern.integrations.trl import batches

    monkeypatch.setattr(batches, "get_comet_experiment_url", lambda: "https://comet.example/run")
    monkeypatch.setattr(batches, "get_trackio_space_url", lambda: None)
    trained = build(tmp_path, ref_model=tiny.model(seed=1))
    trained.create_model_card()
    assert "[The run in Comet](https://comet.example/run)" in card(tmp_path).text
    assert "Trackio" not in card(tmp_path).text
