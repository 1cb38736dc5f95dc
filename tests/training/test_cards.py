"""Model cards of PreferenceTrainer: what they say, whether their code runs, when they are written."""

from __future__ import annotations

import copy
import re
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from transformers import trainer as transformers_trainer

from prefkern import objectives
from prefkern.objectives import citations
from prefkern.training import cards
from support import tiny
from support.cards import card, generated, options, run_quick_start
from support.training import datasets, lora, made, rows_of, single_rows, trainer


@pytest.fixture
def base(tmp_path, monkeypatch) -> str:
    """A model's folder, named as a user would name it, from the working directory."""
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    return "base"


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_a_trained_folder_has_a_card_whose_code_runs(base, tmp_path, adapted):
    given = {"peft_config": lora()} if adapted else {}
    trained = trainer(Path("out"), model=base, objective="adadpo", learning_rate=0.05, **given)
    trained.train()
    trained.save_model()
    written = card(tmp_path / "out")
    text = written.content
    assert written.data.library_name == ("peft" if adapted else "transformers")
    assert written.data.pipeline_tag == "text-generation"
    tags = {"generated_from_trainer", "prefkern", "dpo", "adadpo"} | (
        {"lora"} if adapted else set()
    )
    assert {*written.data.tags} == tags
    # A folder is not a name of the hub, which refuses such metadata.
    assert written.data.base_model is None and written.data.datasets is None
    kind = "a LoRA adapter of" if adapted else "a fine-tuned version of"
    assert f"This model is {kind} `base`, a `llama` model, trained on 12 pairs." in text
    assert "This model was trained with AdaDPO, a method introduced in [AdaDPO:" in text
    assert "on the loss of [Direct Preference Optimization:" in text
    entries = re.findall(r"```bibtex\n@\w+\{(\w+),", text)
    assert entries == ["chen2026adadpo", "rafailov2023direct", "prefkern"]
    listed = options(text)
    expected = {"objective": "AdaDPO", "beta": "0.1", "clip": "2", "space": "ratio", "seed": "42"}
    expected |= {"learning_rate": "0.05", "num_train_epochs": "1", "total_train_batch_size": "4"}
    expected |= {"r": "4", "lora_alpha": "8", "target_modules": "q_proj, v_proj"} if adapted else {}
    assert expected.items() <= listed.items()
    assert "max_steps" not in listed and ("r" in listed) == adapted
    for name, package in (("prefkern", "prefkern"), ("Transformers", "transformers")):
        assert f"- {name}: {metadata.version(package)}\n" in text
    assert (f"- PEFT: {metadata.version('peft')}\n" in text) == adapted
    assert "[More Information Needed]" not in text and "None" not in text
    # As it is written it draws tokens: the first may end the text.
    run_quick_start(text, tmp_path)
    printed = run_quick_start(text, tmp_path, samples=False)
    tokenizer = trained.processing_class
    assert printed == generated(trained.model, tokenizer, text) != ""
    assert printed != generated(tiny.model(), tokenizer, text)


def test_an_adapter_of_a_model_in_memory_says_what_to_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trained = trainer(Path("out"), peft_config=lora(), learning_rate=0.05)
    trained.train()
    trained.save_model()
    text = card(tmp_path / "out").content
    assert "a LoRA adapter of a `llama` model that was made in memory" in text
    assert 'from_pretrained("...")  # the model before training' in text
    tiny.model().save_pretrained(tmp_path / "mine")
    printed = run_quick_start(text.replace('"..."', '"mine"'), tmp_path, samples=False)
    assert printed == generated(trained.model, trained.processing_class, text)


def test_a_tokenizer_without_a_chat_template(base, tmp_path):
    trained = trainer(Path("out"), model=base)
    trained.processing_class.chat_template = None
    trained.save_model()
    text = card(tmp_path / "out").content
    assert "generator(question, " in text
    run_quick_start(text, tmp_path)


@pytest.mark.parametrize(
    "name, tags",
    [
        ("dpo", ["dpo"]),
        ("adasimpo", ["simpo", "adasimpo", "adadpo"]),
        ("dpo+sft", ["dpo", "sft"]),
        ("kto", ["kto"]),
        ("alphadpo", ["alphadpo"]),
    ],
)
def test_the_objective_by_its_name(name, tags, tmp_path):
    rows = single_rows(8) if name == "kto" else rows_of(name)
    made_by = trainer(tmp_path, objective=name, train_dataset=made(rows))
    made_by.create_model_card()
    written = card(tmp_path)
    objective = made_by.loss_fn.objective
    assert written.data.tags == ["generated_from_trainer", "prefkern", *tags]
    assert f"This model was trained with {objective.title}, a method introduced in" in written.text
    for paper in objective.citations():
        assert paper.bibtex in written.text and f"]({paper.link})" in written.text
    others = {value for value in vars(citations).values() if isinstance(value, citations.Paper)}
    for paper in others - {*objective.citations()}:
        assert paper.title not in written.text
    assert f"8 {'responses' if name == 'kto' else 'pairs'}" in written.text


@pytest.mark.parametrize("name", objectives.names())
def test_the_options_of_every_objective_are_listed(name):
    """With the values that it trains with: those of `repr`."""
    objective = objectives.build(name)
    listed = dict(cards.objective_options(objective))
    shown = objective.extra_repr()
    for option, value in listed.items():
        assert f"{option}={value!r}" in shown
    adaptive = getattr(objective, "adaptive", None)
    assert shown.count("=") - shown.count("=None") == len(listed) + (adaptive is not None)


def test_options_that_wrap_an_objective_and_are_the_losss(tmp_path):
    given = {"objective": "dpo+simpo", "use_weighting": True, "rpo_alpha": 0.5, "ld_alpha": 0.25}
    made_by = trainer(tmp_path, objective_options={"loss_weights": [1.0, 0.5]}, **given)
    made_by.create_model_card()
    text = card(tmp_path).text
    rows = {"loss_weights": "1, 0.5", "DPO.beta": "0.1", "SimPO.gamma": "1", "rpo_alpha": "0.5"}
    assert {**rows, "ld_alpha": "0.25", "alignment": "True"}.items() <= options(text).items()
    assert card(tmp_path).data.tags[2:] == ["dpo", "simpo", "wpo", "rpo"]
    for paper in (citations.WPO, citations.RPO, citations.MPO, citations.LD_DPO):
        assert paper.bibtex in text


def test_a_reference_that_moves(tmp_path):
    moves = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.5}
    made_by = trainer(tmp_path, ref_model=tiny.model(seed=1), max_steps=3, **moves)
    made_by.create_model_card()
    text = card(tmp_path).text
    rows = {"sync_ref_model": "True", "ref_model_sync_steps": "2", "ref_model_mixup_alpha": "0.5"}
    # Epochs do not count beside steps.
    assert {**rows, "max_steps": "3"}.items() <= options(text).items()
    assert "num_train_epochs" not in options(text)
    assert citations.TR_DPO.bibtex in text


def test_names_of_the_hub_are_linked_and_in_the_metadata(tmp_path):
    model = tiny.model()
    model.config._name_or_path = "org/base-1B"
    rows = datasets.Dataset.from_list(tiny.pairs(8))
    folder = tmp_path / "cache" / "org___pairs" / "default" / "0.0.0"
    rows.save_to_disk(folder)
    loaded = datasets.load_from_disk(folder)
    made_by = trainer(tmp_path / "out", model=model, train_dataset=loaded, peft_config=lora())
    made_by.create_model_card(tags="mine", language="en", license="mit")
    written = card(tmp_path / "out")
    assert written.data.base_model == "org/base-1B" and written.data.datasets == "org/pairs"
    assert (written.data.language, written.data.license) == ("en", "mit")
    assert {"mine", "base_model:adapter:org/base-1B"} <= {*written.data.tags}
    assert "[org/base-1B](https://huggingface.co/org/base-1B)" in written.text
    assert "8 pairs of [org/pairs](https://huggingface.co/datasets/org/pairs)" in written.text
    # A name that is given goes before the one that was found.
    made_by.dataset_name = "org/other"
    made_by.create_model_card()
    assert card(tmp_path / "out").data.datasets == "org/other"
    made_by.create_model_card(dataset_name="org/third", model_name="A name")
    assert card(tmp_path / "out").data.datasets == "org/third"
    assert "# Model Card for A name\n" in card(tmp_path / "out").text


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_checkpoints_and_the_output_folder_have_one(tmp_path, adapted):
    given = {"peft_config": lora()} if adapted else {}
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    seen = []

    class Look(transformers_trainer.TrainerCallback):
        def on_save(self, args, state, control, **_):
            seen.append((tmp_path / "out" / "README.md").exists())

    trained = trainer(tmp_path / "out", callbacks=[Look()], **saves, **given)
    trained.train()
    assert seen == [True, True]
    for name in ("checkpoint-1", "checkpoint-2"):
        text = card(tmp_path / "out" / name).content
        assert "prefkern" in text and "[More Information Needed]" not in text
        assert str(tmp_path) not in text and f'model="{name}"' in text or adapted
    assert str(tmp_path) not in card(tmp_path / "out").content
    trained.save_model(str(tmp_path / "elsewhere"))
    assert "# Model Card for elsewhere\n" in card(tmp_path / "elsewhere").text


def test_a_card_that_someone_wrote_stays(tmp_path):
    out = tmp_path / "out"
    trained = trainer(out, peft_config=lora())
    out.mkdir(exist_ok=True)
    # PEFT's card, partly filled in: PEFT extends such a card, and its text stays.
    blank = tmp_path / "blank"
    trained.model.save_pretrained(blank)
    text = (blank / "README.md").read_text()
    own = text.replace("[More Information Needed]", "Ours.", 1)
    assert own != text
    for written, is_kept in (("# Ours\n", True), (own, True), (text, False)):
        (out / "README.md").write_text(written)
        trained.save_model()
        trained.create_model_card()
        now = (out / "README.md").read_text()
        body = written.split("---\n")[-1].strip()
        assert (body in now) == is_kept
        assert ("trained with AdaDPO" in now) != is_kept
    # A generated one is made anew.
    trained.create_model_card(tags="first")
    trained.save_model()
    assert "first" not in card(out).data.tags and "adadpo" in card(out).data.tags


def test_ranks_that_do_not_save_write_none(tmp_path, monkeypatch):
    trained = trainer(tmp_path / "out")
    monkeypatch.setattr(TrainingArguments, "should_save", property(lambda args: False))
    monkeypatch.setattr(trained, "is_world_process_zero", lambda: False)
    trained.save_model()
    trained.create_model_card()
    assert not list(tmp_path.rglob("README.md"))


class Hub:
    """Stands for huggingface_hub's HfApi, and keeps what was uploaded."""

    def __init__(self) -> None:
        self.uploads: list[dict] = []

    def create_repo(self, name, **_):
        return type("Url", (), {"repo_id": f"org/{name.split('/')[-1]}"})()

    def upload_folder(self, *, folder_path, ignore_patterns, **given):
        kept = [
            path
            for path in Path(folder_path).rglob("*")
            if path.is_file() and "checkpoint-" not in str(path)
        ]
        files = {str(path.relative_to(folder_path)): path.read_bytes() for path in kept}
        self.uploads.append({**given, "files": files})


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "lora"])
def test_push_to_hub_uploads_it(base, tmp_path, monkeypatch, adapted):
    hub = Hub()
    monkeypatch.setattr(transformers_trainer, "hf_api", lambda: hub)
    given = {"peft_config": lora()} if adapted else {}
    trained = trainer(Path("out"), model=base, objective="adadpo", **given)
    trained.train()
    trained.push_to_hub(dataset_name="org/pairs", tags=["mine"])
    (upload,) = hub.uploads
    assert upload["repo_id"] == "org/out"
    text = upload["files"]["README.md"].decode()
    weights = "adapter_model.safetensors" if adapted else "model.safetensors"
    assert weights in upload["files"]
    assert 'pipeline("text-generation", model="org/out")' in text
    assert "trained with AdaDPO" in text and "[org/pairs]" in text and "- mine\n" in text
    assert str(tmp_path) not in text
    # Saving once more, as with `push_to_hub=True`, uploads a card as well.
    trained.args.push_to_hub = True
    trained.save_model()
    assert "trained with AdaDPO" in hub.uploads[-1]["files"]["README.md"].decode()


def test_weights_are_what_they_were_without_a_card(tmp_path, monkeypatch):
    """Writing cards during training changes no number of it."""
    runs = []
    for writes in (True, False):
        if not writes:
            monkeypatch.setattr(cards.CardTrainer, "_write_card", lambda *args, **given: None)
        saves = {"save_strategy": "steps", "save_steps": 1}
        run = trainer(tmp_path / str(writes), objective="alphadpo", **saves)
        run.train()
        runs.append(copy.deepcopy(run.model.state_dict()))
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())
