"""TRL's names under `prefkern train`: files and flags that were written for `trl dpo`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("accelerate")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
yaml = pytest.importorskip("yaml")

from prefkern.cli import __main__ as cli
from prefkern.cli import arguments, train, trl_options
from prefkern.objectives import AOT, BCO, DPO, EXO, IPO, SFT, DiscoPOP, Hinge, Mixture, RobustDPO
from prefkern.training import names
from support import tiny, versions
from support.command_line import error, flags

# Whose default here is another than TRL's; docs/commands.md lists them.
OTHERWISE = {
    "logging_nan_inf_filter",
    "lora_dropout",
    "lora_r",
    "pad_to_multiple_of",
    "truncation_mode",
}
# None: not given, which here leaves the choice to an objective or a model.
UNSET = {"beta", "loss_type", "use_peft", "model_revision"}


def parser() -> arguments.Parser:
    own = (train.TrainedModelArguments, train.DataArguments, train.LoraArguments)
    config = ("prefkern.training.config", "PreferenceConfig")
    return arguments.Parser((*own, trl_options.LossArguments), config, "train", "")


def test_every_option_of_trl_is_taken_or_named() -> None:
    """Of `trl dpo`'s four classes, with the same default unless the list above has it."""
    trl = pytest.importorskip("trl")
    options, otherwise = parser().options, set()
    for kind in (trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig, trl.DatasetMixtureConfig):
        for each in dataclasses.fields(kind):
            make = each.default_factory
            default: Any = each.default if make is dataclasses.MISSING else make()
            option = options.get(each.name)
            if option is None:
                assert names.asks_nothing(each.name, default), each.name
                assert names.hint(each.name, options, "{}"), each.name
            elif each.name in UNSET:
                assert option.default is None
            elif option.default != default and each.name not in ("optim",):
                otherwise.add(each.name)
    expected = OTHERWISE - (set() if versions.TRL_PADS.is_here else {"pad_to_multiple_of"})
    if not versions.TRL_ROUTER_DEFAULT.is_here:
        expected |= {"router_aux_loss_coef"}
    assert otherwise == expected
    page = (Path(__file__).parent.parent.parent / "docs/commands.md").read_text()
    assert all(f"`{name}`" in page for name in OTHERWISE - {"logging_nan_inf_filter"})


@pytest.fixture
def hub(tmp_path, monkeypatch, files) -> dict[str, list[str]]:
    """A working directory with a model under a hub's name, and a hub whose datasets have splits."""
    (tmp_path / "Qwen").mkdir()
    Path(files["model_name_or_path"]).rename(tmp_path / "Qwen/Qwen2.5-0.5B")
    asked: dict[str, list[str]] = {"datasets": []}
    load = datasets.load_dataset

    def load_dataset(name: str, *args: Any, **keywords: Any) -> Any:
        if name in datasets.__dict__ or Path(name).exists() or name == "json":
            return load(name, *args, **keywords)
        split = keywords.get("split", "train")
        asked["datasets"].append(f"{name} {split}")
        return tiny.dataset(8 if split == "train" else 4)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    return asked


FEW = "--max_steps 1 --use_cpu --per_device_train_batch_size 4 --disable_tqdm true --output_dir out"
# The keys and the layout of examples/cli_configs/example_config.yaml in TRL's repository, and of
# dpo_config.yaml in its page on the command line.
EXAMPLE = """# This file is for `trl ... --config`.

model_name_or_path:
  Qwen/Qwen2.5-0.5B
dataset_name:
  stanfordnlp/imdb
report_to:
  none
learning_rate:
  0.0001
lr_scheduler_type:
  cosine
"""
OF_THE_PAGE = "model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_name: anthropic/hh-rlhf\n"


@pytest.mark.parametrize("text", [EXAMPLE, OF_THE_PAGE], ids=["example", "page"])
def test_trls_own_files_run_unchanged(text: str, hub, tmp_path, capsys) -> None:
    (tmp_path / "trl.yaml").write_text(text)
    argv = ["train", "--objective", "dpo", "--config", "trl.yaml", *FEW.split()]
    assert cli.main([*argv, "--report_to", "none"]) == 0
    assert "saved to out" in capsys.readouterr().out
    given = yaml.safe_load(text)
    assert hub["datasets"] == [f"{given['dataset_name']} train"]
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["global_step"] == 1
    config = train.parse(argv[1:])[3]
    assert config.learning_rate == given.get("learning_rate", 1e-6)
    assert config.lr_scheduler_type == given.get("lr_scheduler_type", "linear")
    assert repr(config.build_objective()) == repr(DPO(beta=0.1))


def test_trls_lines_of_a_shell_run_unchanged(hub, tmp_path, capsys) -> None:
    """Of the docstring of trl/scripts/dpo.py: LoRA, and an evaluation on the split `test`."""
    line = (
        "--dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen2.5-0.5B "
        "--learning_rate 5.0e-6 --num_train_epochs 1 --gradient_accumulation_steps 1 "
        "--eval_strategy steps --eval_steps 1 --no_remove_unused_columns --use_peft --lora_r 32 "
        "--lora_alpha 16 --report_to none"
    )
    assert cli.main(["train", "--objective", "dpo", *line.split(), *FEW.split()]) == 0
    assert hub["datasets"] == [f"trl-lib/ultrafeedback_binarized {x}" for x in ("train", "test")]
    assert "eval_rewards/accuracies" in capsys.readouterr().out
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"]) == (32, 16)


def test_values_are_read_as_trls_parser_reads_them(tmp_path) -> None:
    trl = pytest.importorskip("trl")
    text = """
        learning_rate: 0.0001
        per_device_train_batch_size: 2
        gradient_accumulation_steps: 8
        num_train_epochs: 1
        warmup_steps: 0.1
        max_length: 512
        precompute_ref_log_probs: true
        gradient_checkpointing_kwargs: {use_reentrant: false}
        eval_strategy: steps
        logging_steps: 25
        lr_scheduler_type: cosine
        lora_target_modules: [q_proj, v_proj]
        lora_alpha: 16
        dtype: bfloat16
        dataset_config: null
        report_to: none
        use_cpu: true
    """
    (tmp_path / "trl.yaml").write_text(textwrap.dedent(text))
    argv = ["--config", str(tmp_path / "trl.yaml")]
    kinds = (trl.ScriptArguments, trl.DPOConfig, trl.ModelConfig)
    theirs = {}
    for each in trl.TrlParser(kinds).parse_args_and_config(argv):
        theirs |= vars(each)
    parsed = parser().parse(argv)
    ours = {**parsed.config}
    for group in parsed.groups:
        ours |= {name: value for name, value in vars(group).items() if name in parsed.given}
    assert ours.keys() == yaml.safe_load(textwrap.dedent(text)).keys()
    # transformers makes a list and an enum of these afterwards.
    ours["report_to"] = []
    assert all(value == theirs[name] for name, value in ours.items())


def test_names_of_data_and_adapters(hub, tmp_path) -> None:
    """A file that says everything that `trl dpo` takes, also what asks for nothing."""
    file = {
        "model_name_or_path": "Qwen/Qwen2.5-0.5B",
        "model_revision": "main",
        "dataset_name": "some/pairs",
        "dataset_train_split": "train[:4]",
        "dataset_test_split": "held_out",
        "dataset_streaming": False,
        "ignore_bias_buffers": False,
        "activation_offloading": False,
        "lora_task_type": "CAUSAL_LM",
        "datasets": None,
        "use_peft": True,
        "lora_modules_to_save": ["norm"],
        "lora_target_modules": ["q_proj"],
        "use_rslora": True,
        "loss_type": "hinge",
        "beta": 0.3,
        "report_to": "none",
    }
    (tmp_path / "trl.yaml").write_text(yaml.safe_dump(file))
    assert cli.main(["train", "trl.yaml", *FEW.split()]) == 0
    assert hub["datasets"] == ["some/pairs train[:4]", "some/pairs held_out"]
    adapter = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert adapter["r"] == 16 and adapter["use_rslora"] and adapter["target_modules"] == ["q_proj"]
    assert adapter["modules_to_save"] == ["norm"]
    model, _, _, config = train.parse(["trl.yaml"])
    assert model.init_kwargs()["revision"] == config.model_init_kwargs["revision"] == "main"
    assert repr(config.build_objective()) == repr(Hinge(beta=0.3))


def test_unknown_lines_are_all_named(tmp_path, capsys) -> None:
    lines = ["env: {A: 1}", "num_processes: 4", "activation_offloading: true", "beta: 0.1"]
    lines += ["test_split_size: 0.1", "no_such_thing: 1"]
    path = tmp_path / "trl.yaml"
    path.write_text("\n".join(lines))
    said = error([str(path)], capsys)
    for part in (
        "line 1: unknown option 'env': set these variables in the shell, before the command; ",
        "line 2: unknown option 'num_processes': accelerate launch takes it: ",
        "line 3: unknown option 'activation_offloading'",
        "line 5: unknown option 'test_split_size': here it is 'eval_fraction'; ",
        "line 6: unknown option 'no_such_thing'",
    ):
        assert part in said, said
    assert "'beta'" not in said


def test_losses_are_trls(files) -> None:
    """As TRL's trainer builds them from the same arguments."""
    trl = pytest.importorskip("trl")
    from prefkern.integrations.trl.options import objective_of

    cases: list[tuple[dict[str, Any], Any]] = [
        ({"loss_type": "sigmoid"}, DPO(beta=0.1)),
        ({"loss_type": "ipo", "beta": 0.2}, IPO(0.2, True)),
        ({"loss_type": "robust"}, RobustDPO(0.1, 0.0)),
        ({"loss_type": "robust", "label_smoothing": 0.2}, RobustDPO(0.1, 0.2)),
        ({"loss_type": "exo_pair", "label_smoothing": 1e-2}, EXO(0.1, 1e-2)),
        ({"loss_type": "aot", "beta": 0.5}, AOT(0.5, 0.0)),
        ({"loss_type": "bco_pair"}, BCO(0.1, reward_shift=False)),
        ({"loss_type": "discopop", "discopop_tau": 0.1}, DiscoPOP(0.1, tau=0.1)),
        ({"loss_type": "hinge", "f_divergence_type": "js_divergence"}, None),
        ({"loss_type": "sppo_hard"}, None),
        ({"loss_type": "nca_pair"}, None),
        ({"loss_type": "apo_zero"}, None),
        ({"loss_type": "sigmoid_norm", "use_weighting": True}, None),
        ({"loss_type": "sft"}, SFT(token_mean=True)),
    ]
    own = {"loss_type": "hinge", "objective_options": '{"beta": 0.4}'}
    assert train.parse(flags({**files, **own}))[3].build_objective().beta == 0.4
    for given, expected in cases:
        built = train.parse(flags({**files, **given}))[3].build_objective()
        args = trl.DPOConfig(report_to="none", use_cpu=True, bf16=False, **given)
        if given["loss_type"] != "sft":
            assert repr(built) == repr(objective_of(args)), given
        assert expected is None or repr(built) == repr(expected), given


def test_several_losses_are_a_sum(files) -> None:
    words = ["--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", "0.8", "0.2", "1"]
    built = train.parse([*flags(files), *words])[3].build_objective()
    parts = [DPO(beta=0.1), BCO(0.1, reward_shift=False), SFT(token_mean=True)]
    assert repr(built) == repr(Mixture(parts, [0.8, 0.2, 1.0]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"objective": "adadpo", "loss_type": "ipo"},
            "--loss_type is ipo and --objective adadpo; give one (beside --objective dpo, --loss_",
        ),
        ({"loss_type": "kto_pair"}, "unknown objective 'kto_pair': 'kto' also takes pairs"),
        (
            {"loss_type": "ipo", "objective_options": '{"tau": 0.5}'},
            "objective_options has tau 0.5, and TRL's options say 0.1; give one",
        ),
        (
            {"discopop_tau": 0.1},
            "--discopop_tau is 0.1, and has no effect without discopop",
        ),
        ({"loss_type": "exo_pair"}, "label_smoothing must be"),
        ({"use_peft": False, "lora_r": 4}, "--use_peft is false, and --lora_r 4; give one"),
        ({"use_peft": True, "lora_r": 0}, "--use_peft is true, and --lora_r 0; give one"),
        ({"use_peft": True, "lora_dropout": 0.05}, "--lora_dropout has no effect without"),
        ({"use_dora": True}, "--use_dora has no effect without --lora_r"),
        ({"load_in_4bit": True}, "--load_in_4bit needs an adapter, since quantised weights are"),
        (
            {"load_in_4bit": True, "load_in_8bit": True},
            "give either --load_in_4bit or --load_in_8bit, not both",
        ),
        ({"use_bnb_nested_quant": True}, "--use_bnb_nested_quant has no effect without --load_in"),
        ({"eval_split": "dev", "eval_fraction": 0.5}, "--eval_split has no effect with --eval_fr"),
        ({"eval_strategy": "epoch"}, "--eval_strategy needs --eval_dataset or --eval_fraction"),
    ],
)
def test_contradictions(given: dict[str, Any], said: str, files, capsys) -> None:
    assert said in error(flags({**files, **given}), capsys)


def test_two_losses_that_take_other_values_of_an_option(files, capsys) -> None:
    argv = [*flags(files), "--loss_type", "ipo", "discopop"]
    assert "two of them take 'tau' of other values, which a sum here does not" in error(
        argv, capsys
    )


def test_quantised_bases(files, monkeypatch, capsys) -> None:
    """The keywords of from_pretrained are those that TRL makes; without bitsandbytes an error."""
    find = importlib.util.find_spec
    missing = {"bitsandbytes"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in missing else find(name, *a)
    )
    given = {**files, "load_in_4bit": True, "use_peft": True, "dtype": "bfloat16"}
    said = error(flags(given), capsys)
    assert said.endswith("--load_in_4bit needs bitsandbytes: pip install bitsandbytes")
    missing.clear()
    there = {"bitsandbytes": "json"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: find(there.get(name, name), *a)
    )
    parsed = train.parse(flags({**given, "use_bnb_nested_quant": True}))[3]
    assert parsed.model_init_kwargs["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    del given["load_in_4bit"]
    eight = train.parse(flags({**given, "load_in_8bit": True}))[3].model_init_kwargs
    assert eight["quantization_config"] == {"quant_method": "bitsandbytes", "load_in_8bit": True}
    both = {"load_in_8bit": True, "model_init_kwargs": '{"quantization_config": {}}'}
    assert "has a quantization_config, and --load_in" in error(flags({**given, **both}), capsys)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_trained_with_an_adapter(bits: int, files, tmp_path) -> None:
    pytest.importorskip("bitsandbytes")
    # Its 4 bits take no matrix that is narrower than their blocks.
    tiny.model(hidden_size=128, intermediate_size=128, head_dim=64).save_pretrained(
        tmp_path / "model"
    )
    options = {**files, "objective": "dpo", "use_peft": True, f"load_in_{bits}bit": True}
    assert cli.main(["train", *flags(options)]) == 0
    assert (tmp_path / "out/adapter_config.json").exists()
    state = json.loads((tmp_path / "out/trainer_state.json").read_text())
    assert state["log_history"][-1]["train_loss"] > 0
