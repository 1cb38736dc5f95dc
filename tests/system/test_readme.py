"""The blocks of the README and the pages run as printed, on tiny stand-ins for what they download.

A test claims each block by its page, heading and language; the last test asserts that none is left.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import socket
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import peft
import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser
from torch.utils.data import DataLoader

import prefkern
from prefkern.cli import __main__ as cli
from prefkern.data import load_preference_dataset, tokenize_preferences
from prefkern.data.collate import PreferenceCollator
from prefkern.objectives import REGISTRY
from prefkern.training import zero
from prefkern.training.sharding import mode_of
from support import chatml, chats, pictures, tiny
from support.versions import TRL_ASKS

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CHECKPOINT = "Qwen/Qwen3-0.6B"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
    "vocab_size": 128256,
}


def blocks_of(page: Path) -> dict[tuple[str, str, str], str]:
    """(page, heading, language) -> code."""
    found: dict[tuple[str, str, str], str] = {}
    name, heading = page.relative_to(ROOT).as_posix(), ""
    pattern = re.compile(r"^#+ ([^\n]*)$|^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    for title, language, code in pattern.findall(page.read_text()):
        if title:
            heading = title
            continue
        key = (name, heading, language)
        assert key not in found, f"two blocks of one language under one heading: {key}"
        found[key] = code
    return found


BLOCKS = {key: code for page in PAGES for key, code in blocks_of(page).items()}
CLAIMED: set[tuple[str, str, str]] = set()


def block(page: str, heading: str, language: str = "python") -> str:
    return BLOCKS[page, heading, language]


def runs(*keys: tuple[str, str, str]) -> Callable:
    """Claim blocks, and run the test on each."""
    CLAIMED.update(keys)
    return pytest.mark.parametrize("key", keys, ids=[f"{page}: {what}" for page, what, _ in keys])


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory, with pairs and a tiny model under the name of the pages'."""
    model = tmp_path / CHECKPOINT
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    tiny.dataset(6).to_json(tmp_path / "pairs.jsonl")
    adapted = peft.get_peft_model(tiny.model(), peft.LoraConfig(init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "sft")
    load = datasets.load_dataset

    def load_dataset(name, *args, **keywords):
        is_on_the_hub = name == "trl-lib/ultrafeedback_binarized"
        return tiny.dataset(6) if is_on_the_hub else load(name, *args, **keywords)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    # So that TRL sends nothing over the network.
    monkeypatch.setenv("CI", "1")
    return tmp_path


OPERATOR = ("docs/operator.md", "The operator", "python")
LOSS = ("docs/operator.md", "The loss on it", "python")
RANKS = ("docs/operator.md", "A head over several ranks", "python")
PARTS = ("docs/operator.md", "A sequence over several ranks", "python")
ROWS = ("docs/operator.md", "Rows of a model over several ranks", "python")
COMPILE = ("docs/operator.md", "torch.compile and CUDA graphs", "python")


@runs(OPERATOR)
def test_operator(key):
    names: dict[str, Any] = {}
    exec(BLOCKS[key], names)
    plan = prefkern.last_plan()
    assert plan is not None and plan.structure == "one_pass" and plan.tokens == 4 * 100
    assert plan.workspace_bytes <= 64 * 2**20
    assert names["logps"].shape == (4, 128) and names["hidden"].grad.abs().max() > 0


@runs(LOSS)
def test_the_loss_on_hidden_states(key):
    ids = torch.randint(3, 17, (4, 8))
    prompt = torch.zeros(4, 8, dtype=torch.bool)
    prompt[:, :2] = True
    model = tiny.model()
    names = {
        "torch": torch,
        "prefkern": prefkern,
        "model": model,
        "ref_model": tiny.model(),
        "input_ids": ids,
        "prompt_mask": prompt,
    }
    exec(BLOCKS[key], names)
    assert names["out"].loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert all(p.grad is not None for p in model.parameters())


@pytest.fixture
def as_one_rank(monkeypatch) -> Iterator[None]:
    """The environment of torchrun with one rank; its group ends with the test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in shared.items():
        monkeypatch.setenv(name, str(value))
    yield
    torch.distributed.destroy_process_group()


@runs(RANKS)
def test_a_head_over_several_ranks(key, as_one_rank):
    names: dict[str, Any] = {}
    exec(BLOCKS[key], names)
    whole = [names["hidden"].detach(), names["weight"].detach(), names["labels"]]
    assert torch.allclose(names["logps"], prefkern.linear_logprobs(*whole))
    assert names["weight"].grad.shape == (50257, 512) and names["hidden"].grad.abs().max() > 0


@runs(PARTS)
def test_a_sequence_over_several_ranks(key, as_one_rank):
    names: dict[str, Any] = {}
    exec(BLOCKS[key], names)
    hidden, weight = (names[name].detach().requires_grad_() for name in ("hidden", "weight"))
    loss_fn = prefkern.FusedPreferenceLoss(prefkern.objectives.build("dpo"))
    out = loss_fn(hidden, weight, names["labels"], ref_logps=torch.full((4,), -700.0))
    out.loss.backward()
    assert torch.allclose(names["out"].loss, out.loss) and out.loss > 0
    for name, leaf in (("hidden", hidden), ("weight", weight)):
        assert torch.allclose(names[name].grad, leaf.grad) and leaf.grad.abs().max() > 0


@runs(ROWS)
def test_rows_of_a_model_over_several_ranks(key, as_one_rank):
    """With one rank, and plain attention: that of context_parallel needs a GPU."""
    torch.distributed.init_process_group("gloo")
    models = [tiny.model(attn_implementation="eager") for _ in range(2)]
    input_ids = torch.randint(5, tiny.VOCAB_SIZE, (4, 8))
    names: dict[str, Any] = {"torch": torch, "dist": torch.distributed, "prefkern": prefkern}
    names |= {"model": models[0], "ref_model": models[1]}
    names |= {"input_ids": input_ids, "labels": input_ids.clone()}
    exec(BLOCKS[key].replace('"cuda"', '"cpu"'), names)
    # Equal models.
    assert names["out"].loss.item() == pytest.approx(0.6931472, abs=1e-6)
    assert names["ref_logps"].max() < -1
    assert all(p.grad is not None for p in models[0].parameters())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@runs(COMPILE)
def test_compiled(key):
    torch._dynamo.reset()
    names = {"torch": torch, "prefkern": prefkern}
    exec(BLOCKS[key], names)
    assert names["hidden"].grad.abs().max() > 0


@runs(("docs/memory.md", "Memory and operations", "python"))
def test_plans(key, capsys):
    exec(BLOCKS[key], {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["two_pass", "two_pass", "one_pass"]
    assert [float(line.split()[1]) for line in lines] == [8, 7.25, 6]
    page = (ROOT / "docs/memory.md").read_text()
    assert "It prints 8, 7.25 and 6 NHV." in page
    # One kept token saves 2 x H x V: from none to all of N they are the 2 NHV between 8 and 6.
    none, some, _ = (int(line.split()[2]) for line in lines)
    assert none == 0 and pytest.approx(2 * some) == (8 - 7.25) * 16384


@runs(("docs/trainer.md", "A pair's prompt once", "sh"))
def test_plan_of_pairs(key, folder, capsys):
    assert run(BLOCKS[key]) == 0
    assert "6 pairs (0 dropped" in (out := capsys.readouterr().out)
    assert "prompt shared" in out and "checkpointed: operations" in out


@runs(("docs/memory.md", "Memory and operations", "sh"))
def test_plan_of_a_model(key, folder, capsys):
    write_llama(folder / "meta-llama/Meta-Llama-3-8B-Instruct")
    (line,) = BLOCKS[key].splitlines()
    assert run(line) == 0
    assert "H = 4,096, V = 128,256" in capsys.readouterr().out


def test_the_readmes_plan_is_the_commands(folder, capsys):
    """The command in the README prints each cell of the table of memory and operations."""
    readme = (ROOT / "README.md").read_text()
    (line,) = re.findall(r"`(prefkern plan [^`]*)`", readme)
    write_llama(folder / "meta-llama/Meta-Llama-3-8B")
    assert run(line) == 0
    printed = capsys.readouterr().out
    table = readme.split("prefkern, by `workspace_mb` |")[1].split("\n\n")[0]
    for label, task in (
        ("frozen head (LoRA)", "frozen head"),
        ("trained head", "trained head"),
        ("reference", "reference"),
    ):
        (row,) = (line for line in table.splitlines() if line.startswith(f"| {label} |"))
        cells = re.findall(r"([\d.]+) (?:GiB|MiB), ([\d.]+) NHV(?: at ([\d,]+))?", row)
        rows = [line.split() for line in printed.splitlines() if line.strip().startswith(task)]
        shown = {(row[-3], row[-1]) for row in rows}
        assert len(cells) >= 2
        for gib, nhv, _ in cells:
            assert (f"{float(gib):g}", f"{float(nhv):.2f}") in shown, (row, rows)


def write_llama(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(LLAMA))


@runs(
    ("README.md", "In TRL", "python"),
    ("README.md", "With the trainer", "python"),
    ("docs/quickstart.md", "In TRL", "python"),
    ("docs/quickstart.md", "With the trainer", "python"),
    ("docs/trl.md", "TRL", "python"),
    ("docs/trainer.md", "The trainer", "python"),
    ("docs/models.md", "An adapter that is trained already", "python"),
)
def test_trainer(key, folder):
    code = BLOCKS[key]
    in_trl = "trl import" in code
    if in_trl:
        pytest.importorskip("trl")
    # Where it runs and for how long is not the pages' matter.
    options = 'use_cpu=True, bf16=False, report_to="none", max_steps=1'
    arguments = 'args=DPOConfig("out"' if in_trl else "learning_rate=1e-5"
    assert code.count(arguments) == 1
    names: dict[str, Any] = {}
    exec(code.replace(arguments, f"{arguments}, {options}"), names)
    assert names["trainer"].state.global_step == 1
    expected = prefkern.objectives.build("adadpo", beta=0.1)
    assert repr(names["trainer"].loss_fn.objective) == repr(expected)


@runs(("docs/trl.md", "TPO", "python"))
def test_tpo(key, folder):
    pytest.importorskip("trl")
    tiny.triple_dataset(6).to_json(folder / "triples.jsonl")
    arguments = 'TPOConfig("out"'
    assert BLOCKS[key].count(arguments) == 1
    options = 'use_cpu=True, bf16=False, report_to="none", max_steps=1'
    names: dict[str, Any] = {}
    exec(BLOCKS[key].replace(arguments, f"{arguments}, {options}"), names)
    assert names["trainer"].state.global_step == 1
    expected = prefkern.objectives.build("adatpo", beta=2.0, loss_type="tpo-l", token_mean=True)
    assert repr(names["trainer"].loss_fn.objective) == repr(expected)


@pytest.mark.parametrize("name", ["CPO", "DPO"])
@runs(("docs/trl.md", "TRL's own trainers", "python"))
def test_fuse_head(key, name, folder):
    pytest.importorskip("trl")
    import trl
    from trl.experimental import cpo

    package = cpo if name == "CPO" else trl
    options = {"use_cpu": True, "bf16": False, "report_to": "none", "max_steps": 1}
    trainer = getattr(package, f"{name}Trainer")(
        CHECKPOINT,
        args=getattr(package, f"{name}Config")("out", **options),
        train_dataset=tiny.dataset(6),
        processing_class=tiny.tokenizer(),
    )
    if name == "DPO" and TRL_ASKS.is_too_old:
        with pytest.raises(ImportError, match="supports this trainer in TRL <1.17,>=1.16, but 1."):
            exec(BLOCKS[key], {"trainer": trainer})
        return
    exec(BLOCKS[key], {"trainer": trainer})
    before = prefkern.last_plan()
    trainer.train()
    plan = prefkern.last_plan()
    assert plan is not None and plan is not before
    # DPO's last call of a step is the reference's.
    assert plan.trains_head == (name == "CPO")


@runs(("docs/trl.md", "LoRA on the head", "python"))
def test_lora_on_the_head_in_trl(key, folder):
    pytest.importorskip("trl")
    code = BLOCKS[key]
    assert code.count('SFTConfig("out")') == 1
    options = '"out", use_cpu=True, bf16=False, report_to="none", max_steps=1'
    names: dict[str, Any] = {
        "model": tiny.model(),
        "dataset": tiny.dataset(6)
        .select_columns(["prompt", "chosen"])
        .rename_columns({"chosen": "completion"}),
        "tokenizer": tiny.tokenizer(),
    }
    code = code.replace('SFTConfig("out")', f"SFTConfig({options})")
    if TRL_ASKS.is_too_old:
        with pytest.raises(ImportError, match="supports this trainer in TRL <1.17,>=1.16, but 1."):
            exec(code, names)
        return
    exec(code, names)
    assert names["trainer"].state.global_step == 1
    plan = prefkern.last_plan()
    assert plan is not None and plan.rank > 0


@pytest.mark.parametrize("objective", ["alphadpo", "betadpo", "adadpo"])
@runs(
    ("README.md", "In a loop of your own", "python"),
    ("docs/quickstart.md", "In a loop of your own", "python"),
)
def test_loop(key, objective, folder, capsys):
    """With and without running statistics; the checkpoint has their state."""
    code = BLOCKS[key]
    assert code.count('build("alphadpo")') == 1
    code = code.replace("alphadpo", objective)
    names: dict[str, Any] = {}
    if key[0] == "README.md":
        model = tiny.model()
        pairs = load_preference_dataset("pairs.jsonl")
        rows, _ = tokenize_preferences(pairs, tiny.tokenizer(), max_length=64)
        names = {
            "device": "cpu",
            "model": model,
            "ref_model": tiny.model(),
            "loader": DataLoader(rows, 2, collate_fn=PreferenceCollator(0)),
            "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        }
    exec(code, names)
    model, loss_fn = names["model"], names["loss_fn"]
    initial = tiny.model().state_dict()
    assert any(not value.equal(initial[name]) for name, value in model.state_dict().items())
    saved = torch.load("checkpoint.pt")
    assert saved["loss"].keys() == loss_fn.state_dict().keys()
    assert bool(saved["loss"]) == (objective != "adadpo")
    if objective != "adadpo":
        batches = [value for name, value in saved["loss"].items() if name.endswith("batches")]
        assert batches and all(value == len(names["loader"]) for value in batches)
    fresh = prefkern.FusedPreferenceLoss(prefkern.objectives.build(objective))
    fresh.load_state_dict(saved["loss"])


@runs(
    ("README.md", "With the trainer", "sh"),
    ("docs/quickstart.md", "With the trainer", "sh"),
    ("docs/trainer.md", "From a shell", "sh"),
    ("docs/trainer.md", "MADPO's two steps", "sh"),
    ("docs/objectives.md", "Objectives", "sh"),
    ("docs/models.md", "An adapter that is trained already", "sh"),
)
def test_shell_lines(key, folder):
    code = BLOCKS[key]
    if key[0] == "docs/objectives.md":
        code = code.replace(" ...", f" --model {CHECKPOINT} --dataset pairs.jsonl --output_dir out")
    for line in code.splitlines():
        few = "--max_steps 1 --use_cpu true --report_to none"
        assert run(f"{line} {few}") == 0
    last = line.split("--output_dir ")[1].split()[0]
    saved = (
        "adapter_config.json" if "--lora_r" in line or "--adapter" in line else "model.safetensors"
    )
    assert (folder / last / saved).exists()


@runs(
    ("docs/commands.md", "A file of options", "yaml"),
    ("docs/commands.md", "A file of options", "text"),
)
def test_a_file_of_options(key, folder, capsys):
    """The file trains as printed; the printed error is the command's."""
    few = "--max_steps 1 --use_cpu --report_to none --output_dir out"
    if key[2] == "yaml":
        (folder / "run.yaml").write_text(BLOCKS[key])
        assert run(f"prefkern train {few} run.yaml") == 0
        config = json.loads((folder / "out" / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
    else:
        (folder / "run.yaml").write_text("\n\n\nlora_rank: 8\n")
        assert run(f"prefkern train {few} run.yaml") == 2
        assert capsys.readouterr().err == BLOCKS[key]


@runs(("docs/commands.md", "A file of `trl dpo`", "sh"))
def test_a_file_of_trl(key, folder):
    lines = f"model_name_or_path: {CHECKPOINT}\ndataset_name: pairs.jsonl\nuse_peft: true\n"
    (folder / "trl.yaml").write_text(f"{lines}loss_type: hinge\noutput_dir: out\n")
    (line,) = BLOCKS[key].splitlines()
    assert run(f"{line} --max_steps 1 --use_cpu --report_to none") == 0
    assert json.loads((folder / "out/adapter_config.json").read_text())["r"] == 16


def run(line: str) -> int:
    """A line of shell that calls prefkern, in this process."""
    command, *argv = shlex.split(line, comments=True)
    assert command == "prefkern"
    return cli.main(argv)


@runs(("docs/objectives.md", "Your own", "python"))
def test_an_objective_of_one_s_own(key, monkeypatch):
    """Its formula, its adaptive form by name, and the pair kernel's form without another line."""
    monkeypatch.setattr(prefkern.objectives.registry, "REGISTRY", registry := dict(REGISTRY))
    monkeypatch.setattr(prefkern.objectives, "REGISTRY", registry)
    names: dict[str, Any] = {"PreferenceConfig": prefkern.PreferenceConfig}
    exec(BLOCKS[key], names)
    built = names["config"].build_objective()
    assert type(built).__name__ == "HingedSimPO" and built.adaptive.clip == 1.5
    logps = torch.tensor([[-6.0, -9.0], [-8.0, -4.0]]).requires_grad_()
    lengths = torch.tensor([[3, 4], [2, 5]])
    pairs = prefkern.Pairs(*logps, None, None, *lengths)
    result = built(pairs)
    means = (logps / lengths).detach()
    ratio = (lengths[0] / lengths[1] * (means[0] - means[1]).exp()).clamp(max=1.5)
    torch.testing.assert_close(result.beta_chosen, 2.0 * ratio)
    delta = 2.0 * (ratio * means[0] - means[1]) - 0.3
    torch.testing.assert_close(result.losses.detach(), (1 - delta).clamp(min=0))
    assert (result.losses > 0).any()
    plain = prefkern.objectives.build("hinged-simpo", beta=1.0)
    torch.testing.assert_close(
        plain(pairs).losses.detach(), (1 - (means[0] - means[1] - 0.5)).clamp(min=0)
    )
    assert built.pair_kernel_options()["link"] == "hinge"
    data = {"hidden": torch.randn(4, 5, 8), "weight": torch.randn(32, 8).requires_grad_()}
    loss_fn = prefkern.FusedPreferenceLoss(built)
    loss_fn(**data, labels=torch.randint(32, (4, 5))).loss.backward()
    assert data["weight"].grad.isfinite().all()


@runs(("docs/objectives.md", "Several at once", "python"))
def test_several_objectives_by_name(key):
    names: dict[str, Any] = {"PreferenceConfig": prefkern.PreferenceConfig}
    exec(f"config = {BLOCKS[key]}", names)
    mixture = names["config"].build_objective()
    assert [type(part).__name__ for part in mixture.objectives] == ["DPO", "SimPO"]
    assert [part.beta for part in mixture.objectives] == [0.2, 0.2]
    assert mixture.loss_weights == [1.0, 0.5]


@runs(("docs/objectives.md", "Objectives", "python"))
def test_objectives(key, folder):
    assert "PreferenceConfig(" in BLOCKS[key]
    code = BLOCKS[key].replace("PreferenceConfig(", "config = PreferenceConfig(use_cpu=True, ")
    names = {"prefkern": prefkern, "PreferenceConfig": prefkern.PreferenceConfig}
    exec(code, names)
    built = names["config"].build_objective()
    assert repr(built) == repr(names["objective"]) == repr(prefkern.objectives.SimPO(2.0, 1.0))


@runs(("docs/data.md", "Data", "json"))
def test_a_line_of_data(key, folder):
    (folder / "one.jsonl").write_text(BLOCKS[key])
    pairs = load_preference_dataset("one.jsonl")
    assert len(pairs) == 1 and set(pairs.column_names) == {"prompt", "chosen", "rejected"}


@runs(("docs/data.md", "Pictures", "json"))
def test_a_row_with_a_picture(key, folder):
    """The printed row, under a family whose placeholder is the printed one."""
    family = next(each for each in pictures.FAMILIES if each.placeholder == "<image>")
    _, processor = family.make()
    pictures.picture("red", "circle").save(folder / "circle.png")
    (folder / "one.jsonl").write_text(BLOCKS[key])
    rows = load_preference_dataset("one.jsonl", pictures=True)
    (pair,), report = tokenize_preferences(rows, processor)
    assert report.pictures == 1 and pair["images"][0].size == (16, 16)


COLUMNS = ("docs/data.md", "Columns of other names", "python")
COLUMNS_OF_A_RUN = ("docs/data.md", "Columns of other names", "sh")


@runs(COLUMNS)
def test_columns_of_other_names(key, folder, capsys):
    names: dict[str, Any] = {}
    exec(BLOCKS[key], names)
    (row,) = names["rows"]
    messages = [
        {"role": "system", "content": row["system"]},
        {"role": "user", "content": row["question"]},
    ]
    prompt = tiny.tokenizer().apply_chat_template(messages, add_generation_prompt=True)
    assert names["pairs"][0]["prompt_ids"] == prompt["input_ids"]
    assert capsys.readouterr().out.startswith("train: 1 pairs (0 dropped")


@runs(("docs/data.md", "Which turns are scored", "python"))
def test_turns_that_are_scored(key, folder, capsys):
    names: dict[str, Any] = {}
    exec(BLOCKS[key], names)
    (pair,) = names["pairs"]
    tokens = zip(pair["chosen_ids"], pair["chosen_mask"], strict=True)
    scored = [token for token, kept in tokens if kept]
    assert tiny.tokenizer().decode(scored) == "<unk> <eos>"
    assert capsys.readouterr().out.startswith("4 tokens scored, 9 not: [False,")


@runs(("docs/data.md", "Which turns are scored", "json"))
def test_a_call_of_tools(key, folder):
    tokenizer = chats.tokenizer(chats.training_template("qwen3_instruct_2507"))
    rows = datasets.Dataset.from_list([json.loads(BLOCKS[key])])
    (pair,), _ = tokenize_preferences(rows, tokenizer, assistant_only_loss=True)
    scored = [t for t, kept in zip(pair["chosen_ids"], pair["chosen_mask"], strict=True) if kept]
    call = '{"name": "rate", "arguments": {"film": "Alien"}}'
    text = f"<tool_call>\n{call}\n</tool_call><|im_end|>\nYes, 9.<|im_end|>\n"
    assert tokenizer.decode(scored) == text


@runs(("docs/data.md", "Streams", "sh"))
def test_a_stream(key, folder, capsys):
    datasets.Dataset.from_list(tiny.pairs(6)).to_json("pairs.jsonl")
    line = BLOCKS[key].strip().replace("--max_steps 1000", "--max_steps 2")
    assert run(f"{line} --use_cpu true --report_to none") == 0
    assert "train, first rows: 6 pairs" in capsys.readouterr().out


@runs(("docs/data.md", "Several datasets", "sh"))
def test_several_datasets(key, folder, capsys):
    datasets.Dataset.from_list(tiny.pairs(6)).to_json("pairs.jsonl")
    datasets.Dataset.from_list(tiny.pairs(4, seed=1)).to_parquet("chats.parquet")
    (line,) = BLOCKS[key].splitlines()
    assert run(f"{line} --max_steps 1 --use_cpu true --report_to none") == 0
    out = capsys.readouterr().out
    assert "train_pairs: 6 pairs" in out and "train_chats: 4 pairs" in out


@runs(COLUMNS_OF_A_RUN)
def test_columns_of_a_run(key, folder):
    rows = [
        {"system": "was", "question": row["prompt"], **{s: row[s] for s in ("chosen", "rejected")}}
        for row in tiny.pairs(6)
    ]
    datasets.Dataset.from_list(rows).to_json("orca.jsonl")
    (line,) = BLOCKS[key].splitlines()
    assert run(f"{line} --max_steps 1 --use_cpu true --report_to none") == 0
    assert (folder / "out/model.safetensors").exists()


SCREEN = ("docs/data.md", "Looking at the data", "text")


@runs(("docs/data.md", "Looking at the data", "sh"))
def test_the_screen_of_data(key, folder, capsys):
    """The page's screen is what the command prints of the page's rows, redirected."""
    rows = block(key[0], key[1], "json")
    chatml.tokenizer(chatml.texts_of(rows)).save_pretrained(folder / CHECKPOINT)
    (folder / "orca.jsonl").write_text(rows)
    assert run(BLOCKS[key]) == 0
    assert capsys.readouterr().out.strip() == BLOCKS[SCREEN].strip()


CLAIMED |= {SCREEN, (*SCREEN[:2], "json")}


@runs(
    ("README.md", "Install", "sh"),
    ("docs/quickstart.md", "Install", "sh"),
    ("docs/quickstart.md", "The two commands", "sh"),
)
def test_installation(key, monkeypatch):
    """Extras and targets are there, and the check is the one that tests/cli runs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    checked = []
    monkeypatch.setattr("prefkern.cli.check.main", lambda argv: checked.append(argv) or 0)
    for line in BLOCKS[key].splitlines():
        command, *argv = shlex.split(line, comments=True)
        if command == "pip":
            (extras,) = re.fullmatch(r"install \.\[([\w,]+)\]", " ".join(argv)).groups()
            assert set(extras.split(",")) <= project["optional-dependencies"].keys()
        elif command == "make":
            dry = subprocess.run(["make", "-n", *argv], cwd=ROOT, capture_output=True, check=True)
            assert dry.stdout
        else:
            assert run(line) == 0 and checked.pop() in ([], ["--quick"])


@runs(
    ("docs/distributed.md", "One machine", "sh"),
    ("docs/distributed.md", "Without a file", "sh"),
    ("docs/distributed.md", "Several machines", "sh"),
    ("docs/distributed.md", "What each machine runs", "sh"),
)
def test_launches(key):
    """Their launchers take them; test_distributed.py starts each."""
    given = "SLURM_JOB_NUM_NODES=2 GPUS=8 SLURM_NODEID=1 MAIN=here PORT=29500"
    for line in BLOCKS[key].splitlines():
        words = f"{given}; set -- {line}; printf '%s\\n' \"$@\""
        done = subprocess.run(["bash", "-c", words], capture_output=True, text=True, check=True)
        launcher, *argv = done.stdout.splitlines()
        if launcher == "sbatch":
            assert argv[0::3] == ["--nodes", "run.yaml"] and (ROOT / argv[2]).is_file()
            continue
        is_torchrun = launcher == "torchrun"
        parsed = (torchrun_parser() if is_torchrun else launch_command_parser()).parse_args(
            argv if is_torchrun else argv[1:]
        )
        assert parsed.module and parsed.training_script == "prefkern.cli"
        assert parsed.training_script_args[0] == "train"
        if is_torchrun:
            assert "full_shard auto_wrap" in parsed.training_script_args
        else:
            assert load_config_from_file(str(ROOT / parsed.config_file)).num_processes in (8, 16)


@runs(("docs/trainer.md", "DeepSpeed", "json"))
def test_deepspeeds_configuration(key, tmp_path):
    """What prefkern reads of it; `make test-zero` trains with one like it."""
    config = json.loads(BLOCKS[key])
    args = prefkern.PreferenceConfig(str(tmp_path), use_cpu=True)
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config=config)
    zero.check_zero(args)
    assert mode_of(args) == "ZeRO-3"


@runs(("docs/axolotl.md", "axolotl", "sh"))
def test_axolotls_installation(key):
    """The version is the supported one, and `make test-axolotl` installs in the same way."""
    (line,) = BLOCKS[key].splitlines()
    source = (ROOT / "prefkern/integrations/axolotl/__init__.py").read_text()
    (supported,) = re.findall(r'^SUPPORTED = SpecifierSet\("(.*)"\)', source, re.MULTILINE)
    assert shlex.split(line) == ["pip", "install", f"axolotl{supported}", ".[train,trl]"]
    dry = ["make", "-n", "test-axolotl"]
    made = subprocess.run(dry, cwd=ROOT, capture_output=True, check=True, text=True).stdout
    assert '-e ".[train,trl]"' in made and "--no-deps" not in made


@runs(("docs/axolotl.md", "axolotl", "yaml"))
def test_axolotls_recipe(key):
    """Its plugin is there and its objective can be built; test_axolotl.py gives it to axolotl."""
    recipe = yaml.safe_load(BLOCKS[key])
    (plugin,) = recipe["plugins"]
    module, name = plugin.rsplit(".", 1)
    file = ROOT / module.replace(".", "/") / "__init__.py"
    assert f"class {name}(" in file.read_text() and recipe["rl"] == "dpo"
    built = prefkern.objectives.build(recipe["prefkern"].pop("objective"), **recipe["prefkern"])
    assert built.beta == 0.1 and built.adaptive is not None


def test_every_block_is_run():
    assert BLOCKS.keys() == CLAIMED
