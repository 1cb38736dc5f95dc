"""Pictures on the command line: a parquet file of rows, and a folder with a model and its processor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("PIL")

import transformers

from prefkern.cli import __main__ as cli
from support import pictures
from support.command_line import error, flags
from support.pictures import IDEFICS


@pytest.fixture
def seen(tmp_path: Path) -> dict[str, object]:
    model, processor = IDEFICS.make()
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    pictures.dataset(IDEFICS, 12, chats=True).to_parquet(tmp_path / "rows.parquet")
    return {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "rows.parquet"),
        "output_dir": str(tmp_path / "out"),
        "objective": "dpo",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
    }


def test_a_run_on_pictures(seen, tmp_path: Path, capsys) -> None:
    pictures.skip_unless_idefics_loads()
    given = {**seen, "lora_r": 4, "lora_target_modules": "q_proj", "eval_fraction": 0.25}
    assert cli.main(["train", *flags(given)]) == 0
    out = capsys.readouterr().out
    assert "train: 9 pairs" in out and "pictures, whose tokens are the prompts'" in out
    assert "eval_rewards/accuracies" in out
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    assert type(processor).__name__ == "Idefics3Processor" and processor.chat_template
    # The adapter is trained on, with the processor beside it.
    again = {**seen, "adapter": str(tmp_path / "out"), "output_dir": str(tmp_path / "more")}
    assert cli.main(["train", *flags(again)]) == 0
    (tmp_path / "out/processor_config.json").unlink()
    assert cli.main(["train", *flags({**again, "output_dir": str(tmp_path / "base")})]) == 0
    metrics = json.loads((tmp_path / "more/all_results.json").read_text())
    assert metrics["train_loss"] > 0


def test_rows_with_pictures_are_shown(seen, capsys) -> None:
    pictures.skip_unless_idefics_loads()
    argv = ["data", str(seen["dataset"]), "--model", str(seen["model_name_or_path"]), "--rows", "1"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "pictures, whose tokens are the prompts'" in out
    assert "<global-img> <image> <fake_token_around_image>" in out.split("chosen: ")[1]


def test_other_commands_refuse_pictures(seen, tmp_path: Path, capsys) -> None:
    file, model = str(seen["dataset"]), str(seen["model_name_or_path"])
    for argv in (
        ["margins", "--dataset", file, "--model_name_or_path", model, "--output", "x.jsonl"],
        ["plan", model, "--data", file, "--batch", "2"],
    ):
        assert cli.main(argv) == 2
        said = capsys.readouterr().err
        assert "a column 'images', and pictures are not read here" in said, argv
    message = error(flags({**seen, "streaming": True}), capsys)
    assert (
        "is a stream with pictures, which is not supported yet; give a datasets.Dataset" in message
    )
    assert "(no --streaming)" in message
    message = error(flags({**seen, "padding_free": True}), capsys)
    assert "padding_free is True and dataset 'train' has pictures" in message
