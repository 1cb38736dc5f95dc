"""Options of the commands: as transformers has them, from flags and files, in other tools' names."""

from __future__ import annotations

import dataclasses
import importlib
import json
import subprocess
import sys
from typing import Any

import pytest
import transformers

pytest.importorskip("accelerate")
pytest.importorskip("datasets")
pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")

from prefkern.cli import __main__ as cli
from prefkern.cli import arguments, fields, margins, plan_options, train, trl_options
from prefkern.training import names
from prefkern.version import VERSION
from support.command_line import error, flags
from support.processes import environment

CONFIGS = [
    ("transformers.training_args", "TrainingArguments"),
    ("prefkern.training.config", "PreferenceConfig"),
    ("prefkern.training.rewards", "RewardConfig"),
]
# Choices that transformers computes; it checks them itself.
COMPUTED = {"log_level", "log_level_replica"}


def parser() -> arguments.Parser:
    own = (train.TrainedModelArguments, train.DataArguments, train.LoraArguments)
    return arguments.Parser((*own, trl_options.LossArguments), CONFIGS[1], "train", "")


def training_parser() -> arguments.Parser:
    return arguments.Parser((), CONFIGS[0], "train", "")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config[1])
def test_fields_are_read_as_the_class_has_them(config: tuple[str, str]) -> None:
    """The source is that of the installed version: names, order, defaults and choices."""
    kind: Any = getattr(importlib.import_module(config[0]), config[1])
    options = {option.name: option for option in fields.of_source(*config)}
    assert [*options] == [each.name for each in dataclasses.fields(kind) if each.init]
    unknown = set()
    for each in dataclasses.fields(kind):
        read, make = options[each.name].default, each.default_factory
        if read is fields.UNKNOWN:
            unknown.add(each.name)
            continue
        default = each.default if make is dataclasses.MISSING else make()
        assert read == default, each.name
    # Computed: the best fused optimiser that torch has.
    assert unknown <= {"optim"}
    theirs = transformers.HfArgumentParser(kind)
    for action in theirs._actions:
        option = options.get(action.dest)
        if option is not None and action.dest not in COMPUTED:
            assert [*(option.choices or ())] == [*(action.choices or ())], action.dest


def test_values_are_read_as_transformers_reads_them() -> None:
    ours, theirs = training_parser(), transformers.HfArgumentParser(transformers.TrainingArguments)
    read = 0
    for action in theirs._actions:
        # transformers' own flags for these fail, or take less than their fields do.
        unlike = ("debug", "liger_kernel_config", "parallelism_config", "report_to")
        unlike += ("include_num_input_tokens_seen", "optim_target_modules")
        if action.dest in unlike or action.nargs == 0:
            continue
        name = action.option_strings[0]
        samples = (
            [*map(str, action.choices)][:1]
            if action.choices
            else ["3", "0.5", "true", "no", "text"]
        )
        for sample in samples:
            try:
                expected = vars(theirs.parse_known_args([name, sample])[0])[action.dest]
            except SystemExit:
                with pytest.raises(ValueError, match="argument"):
                    ours.parse([name, sample])
                continue
            assert ours.parse([name, sample]).config[action.dest] == expected, (name, sample)
            read += 1
        if action.nargs == "?":
            assert ours.parse([name]).config[action.dest] is True
    assert read > 100


def test_lists_and_flags() -> None:
    def read(*argv: str) -> dict[str, Any]:
        return parser().parse([*argv]).config

    assert read("--report_to", "none") == {"report_to": "none"}
    assert read("--report_to", "wandb", "tensorboard") == {"report_to": ["wandb", "tensorboard"]}
    assert read("--optim_target_modules", "a", "b") == {"optim_target_modules": ["a", "b"]}
    seen = "include_num_input_tokens_seen"
    assert read(f"--{seen}", "all") == {seen: "all"} and read(f"--{seen}") == {seen: True}
    assert read("--liger_kernel_config", '{"rope": true}')["liger_kernel_config"] == {"rope": True}
    for argv in (["prompt=q a", "chosen=é=b"], ["prompt=q a", "--columns", "chosen=é=b"]):
        assert read("--columns", *argv) == {"columns": ["prompt=q a", "chosen=é=b"]}
    names = ["prompt=q.json", "chosen=a.yaml"]
    assert read("--columns", *names) == {"columns": names}
    assert read("--rpo_alpha", "-1e-5", "--beta=-.5e3") == {"rpo_alpha": -1e-5, "beta": -500.0}
    assert read("--bf16") == read("--bf16", "true") == {"bf16": True}
    assert read("--no_gradient_checkpointing") == {"gradient_checkpointing": False}
    assert read("--lr_scheduler_kwargs", '{"min_lr": 1e-6}') == {
        "lr_scheduler_kwargs": {"min_lr": 1e-6}
    }


def test_a_file_stands_anywhere(files, tmp_path) -> None:
    options = {**files, "bf16": False, "seed": 3}
    as_yaml, as_json = tmp_path / "run.yaml", tmp_path / "run.json"
    as_yaml.write_text(yaml.safe_dump(options))
    as_json.write_text(json.dumps(options, indent="\t"))
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "c"}]))
    for file in map(str, (as_yaml, as_json)):
        for argv in (
            [file, "--learning_rate", "1e-5"],
            ["--learning_rate", "1e-5", file],
            ["--learning_rate=1e-5", "--use_cpu", file],
            ["--learning_rate", "1e-5", "--lora_target_modules", "q_proj", file, "--lora_r", "2"],
            ["--config", file, "--learning-rate", "1e-5"],
            [f"--config={file}", "--learning_rate", "1e-5"],
        ):
            config = train.parse(argv)[3]
            assert (config.learning_rate, config.seed, config.max_steps) == (1e-5, 3, 2), argv
        # A dataset is a .json file as well, and is the value of its option.
        _, data, _, config = train.parse(["--dataset", str(pairs), file])
        assert data.dataset == [str(pairs)] and config.seed == 3


def test_errors_of_files(tmp_path, capsys) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"beta": 0.1,\n "lora_r" 4}')
    assert "run.json, line 2, column 11: Expecting ':' delimiter" in error([str(path)], capsys)
    path.write_text('{"beta": 0.1, "beta": 0.2}')
    assert "run.json: 'beta' occurs twice" in error([str(path)], capsys)
    path.write_text('{"eval_strategy": false}')
    message = error([str(path)], capsys)
    assert "run.json: 'eval_strategy' must be one of no, steps, epoch, got 'false'" in message
    path.write_text("[1]")
    assert "must be a mapping of options to values, got list" in error([str(path)], capsys)
    path.write_text('{"objective_options": "{bad", "max_length": {"a": 1}}')
    message = error([str(path)], capsys)
    assert "run.json: 'objective_options' is not JSON: " in message
    path.write_text('{"max_length": {"a": 1}}')
    assert "'max_length' takes one value, got the mapping {'a': 1}" in error([str(path)], capsys)
    assert "give one file of options, got a.yaml and b.json" in error(["a.yaml", "b.json"], capsys)
    assert "--config needs a file" in error(["--beta", "0.1", "--config"], capsys)
    assert "unknown argument 'pairs.csv'" in error(["pairs.csv"], capsys)


def test_numbers_of_yaml_are_numbers_at_every_depth(files, tmp_path, capsys) -> None:
    path = tmp_path / "run.yaml"
    head = yaml.safe_dump({**files, "learning_rate": None})
    path.write_text(
        head.replace("learning_rate: null", "learning_rate: 1e-6") + "objective: adadpo\n"
        "objective_options: {beta: 1e-1, exponent: [1E-1, .5e0]}\n"
        "lr_scheduler_type: cosine_with_min_lr\n"
        "lr_scheduler_kwargs:\n  min_lr: 1e-7\n"
    )
    config = train.parse([str(path)])[3]
    objective = config.build_objective()
    assert (config.learning_rate, objective.beta) == (1e-6, 0.1)
    assert objective.adaptive.exponent == (0.1, 0.5)
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-7}
    path.write_text(head + 'objective_options: {clip: "1e-1"}\n')
    assert "objective_options.clip must be a number, got the text '1e-1'" in error(
        [str(path)], capsys
    )


def test_a_file_may_say_null_for_report_to(files, tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**files, "report_to": None, "max_length": None}))
    config = train.parse([str(path)])[3]
    assert config.report_to == [] and config.max_length is None


@pytest.mark.parametrize("name", ["bf16", "torch.bfloat16", "bfloat16"])
def test_a_dtype_has_the_names_that_model_init_kwargs_take(name, files, tmp_path) -> None:
    assert train.parse(flags({**files, "dtype": name}))[3].model_init_kwargs["dtype"] == "bfloat16"
    given = {**files, "model_init_kwargs": json.dumps({"dtype": name})}
    assert train.parse(flags(given))[3].model_init_kwargs["dtype"] == "bfloat16"
    # In a file too, and where both are given in different words.
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**given, "torch_dtype": name}))
    assert train.parse([str(path)])[3].model_init_kwargs["dtype"] == "bfloat16"
    assert plan_options.parse(["m", "--seq-len", "8", "--batch", "1", "--dtype", name]).dtype == (
        "bfloat16"
    )


def test_a_dtype_of_a_file_is_not_shadowed_by_the_flags_default(files, capsys) -> None:
    given = {**files, "model_init_kwargs": '{"torch_dtype": "bfloat16"}'}
    assert train.parse(flags(given))[3].model_init_kwargs["dtype"] == "bfloat16"
    both = train.parse(flags({**given, "torch_dtype": "bfloat16"}))[3]
    assert both.model_init_kwargs["dtype"] == "bfloat16"
    assert "--dtype is 'float16', and 'bfloat16' in model_init_kwargs; give one" in error(
        flags({**given, "dtype": "float16"}), capsys
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("--use_lora", "here it is --lora_r"),
        ("--use-lora", "here it is --lora_r"),
        ("--lora_rank=8", "here it is --lora_r"),
        ("--quantization_bit", 'here it is --model_init_kwargs ({"quantization_config": ...}'),
        ("--max_completion_length", "here it is --max_length (it bounds prompt plus response)"),
        ("--cutoff_len", "here it is --max_length"),
        ("--num_epochs", "here it is --num_train_epochs"),
        ("--lr", "here it is --learning_rate"),
        ("--batch_size", "here it is --per_device_train_batch_size (pairs on a device)"),
        ("--output", "here it is --output_dir"),
        ("--ref_model", "here it is --ref_model_name_or_path"),
        ("--pref_loss", "here it is --objective (sigmoid is dpo)"),
        ("--evaluation_strategy", "here it is --eval_strategy"),
        ("--enable_liger_kernel", "here it is --use_liger_kernel"),
        ("--overwrite_output_dir", "transformers 5 removed it: leave it out"),
        ("--template", "the tokenizer's own chat template is used"),
        ("--beta1", "here it is --adam_beta1"),
        ("--max_samples", "here it is --dataset_split (train[:1000])"),
        ("--loraplus_lr_ratio", "in Python, give a LoraConfig to PreferenceTrainer as peft_config"),
        ("--padding_side", "it makes no difference here: leave it out"),
        ("--dataset_num_workers", "here it is --dataset_num_proc"),
        ("--betta", "did you mean --beta?"),
        ("--aftercare", "unknown argument '--aftercare'\n"),
    ],
)
def test_options_of_other_tools(name: str, said: str, capsys) -> None:
    assert said in error([name], capsys) + "\n"


def test_what_hints_name_exists() -> None:
    """Each option that the table proposes, and no name in it is an option of both already."""
    known = {*parser().options}
    for name, (ours, remark) in names.ELSEWHERE.items():
        assert ours or remark, name
        assert ours in {*known, "", "processing_class"}, name
    # Of `prefkern train` alone, in TRL's words: in Python, and to `prefkern margins`, they are not.
    of_train = {f"dataset_{which}_split" for which in ("train", "test")} | {"use_peft"}
    of_train |= {"streaming", "dataset_streaming"}
    for kind in (train.TrainedModelArguments, train.LoraArguments, trl_options.LossArguments):
        of_train |= {each.name for each in dataclasses.fields(kind)}
    # `activation_checkpointing` is newer than the oldest transformers.
    newer = {"torch_dtype", "activation_checkpointing"}
    assert names.ELSEWHERE.keys() & known <= newer | of_train


@pytest.mark.parametrize("command", ["plan", "check", "bench"])
def test_both_spellings(command: str, capsys) -> None:
    argv = {
        "plan": ["no/such-model", "--seq_len=8", "--batch", "1", "--prompt_len", "9"],
        "check": ["--dtype", "int4"],
        "bench": ["--warm_up", "-1", "--workspace_mb", "3"],
    }[command]
    expected = {
        "plan": "--prompt-len must be below --seq-len (8), got 9",
        "check": "argument --dtype: invalid choice: 'int4'",
        "bench": "--warm-up at least 0",
    }[command]
    try:
        assert cli.main([command, *argv]) == 2
    except SystemExit as exit_:
        assert exit_.code == 2
    assert expected in capsys.readouterr().err
    assert arguments.spelled(["--a-b_c=d-e", "-x-y", "a-b", "--no-f"], "_") == [
        *("--a_b_c=d-e", "-x-y", "a-b", "--no_f"),
    ]


def test_versions(capsys) -> None:
    for argv in (["--version"], ["train", "--version"], ["plan", "--version"]):
        assert cli.main(argv) == 0
        assert capsys.readouterr().out == f"prefkern {VERSION}\n"
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'; did you mean train?" in capsys.readouterr().err


# What a command must not import for its help or an error, and the exit status.
HEAVY = ("torch", "transformers", "datasets", "peft")
SLOW = ("transformers", "datasets", "peft")
STARTS = {
    "--help": (0, HEAVY),
    "--version": (0, HEAVY),
    "trian": (2, HEAVY),
    **{f"{name} --help": (0, HEAVY) for name in cli.COMMANDS},
    **{f"{name} --no_such_option": (2, HEAVY) for name in cli.COMMANDS},
    "train none.yaml": (2, HEAVY),
    "train --learning_rate fast": (2, HEAVY),
    "train --eval_strategy sometimes": (2, HEAVY),
    "train --model ./none --dataset none.jsonl": (2, HEAVY),
    "train --model ./none --dataset hub/name": (2, HEAVY),
    "train --model hub/name --dataset hub/name --objective sigmoyd": (2, SLOW),
    "train --model hub/name --dataset hub/name --max_length 1": (2, HEAVY),
    "margins --model ./none --dataset none.jsonl --output out.jsonl": (2, HEAVY),
    "margins --model hub/name --dataset hub/name --output none/out.jsonl": (2, HEAVY),
    "plan ./none --seq-len 8 --batch 1": (2, HEAVY),
    "bench --shapes none": (2, HEAVY),
}


@pytest.mark.parametrize("line", STARTS)
def test_a_command_imports_what_it_needs(line: str, tmp_path) -> None:
    """The cause of a quick start; `bench/startup.py` measures the time."""
    status, absent = STARTS[line]
    code = f"""if 1:
        import sys
        from prefkern.cli.__main__ import main
        try:
            status = main({line.split()!r})
        except SystemExit as exit_:
            status = exit_.code or 0
        loaded = [name for name in {absent!r} if name in sys.modules]
        assert not loaded, loaded
        sys.exit(status + 40)
    """
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(), cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == status + 40, found.stderr
    assert len(found.stdout if status == 0 else found.stderr) > 10


def test_help_shows_every_option(capsys) -> None:
    for command, module in (("train", train), ("margins", margins)):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        shown = capsys.readouterr().out
        kind = {"train": CONFIGS[1], "margins": CONFIGS[2]}[command]
        for option in fields.of_source(*kind):
            assert f"--{option.name}" in shown, (module, option.name)
