"""`prefkern train`: a preference run from flags, from a YAML file, or from a file and flags.

    prefkern train --model_name_or_path M --dataset pairs.jsonl --objective adadpo --lora_r 16
    prefkern train --model_name_or_path M --dataset pairs.jsonl --adapter sft/
    prefkern train config.yaml --learning_rate 1e-5

A file of options is YAML or JSON, and stands anywhere among the arguments. One that was written for
`trl dpo` runs under `--objective dpo` (see `trl_options`). Inputs are checked
before training, the cheapest first: arguments and objective, then the dataset, then the model. An
error is one line on stderr and exit status 2.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefkern.cli.allocator import keep_freed_memory
from prefkern.cli.arguments import (
    DatasetArguments,
    ModelArguments,
    Parser,
    check_installed,
    check_lora,
    check_model_folder,
    check_output_dir,
    check_sources,
    fail,
    importing,
    lora_config,
    resume_from,
)
from prefkern.cli.closed import go_on
from prefkern.cli.trl_options import LossArguments, quantization, read_losses, read_peft
from prefkern.data.mixing import DatasetMix

if TYPE_CHECKING:
    from prefkern.training.config import PreferenceConfig
    from prefkern.training.trainer import PreferenceTrainer


@dataclass
class TrainedModelArguments(ModelArguments):
    """The model to train, and an adapter of it to train on."""

    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder or hub name of a trained adapter of the model, which is trained on. "
            "Its state before training is the reference."
        },
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the model and its tokenizer."}
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "Quantise the base of an adapter, with bitsandbytes."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "The same, with 8 bits."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "Type of 4 bits.", "choices": ("fp4", "nf4")}
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the constants of 4 bits too."}
    )

    def init_kwargs(self) -> dict[str, Any]:
        """Keywords of `from_pretrained`."""
        kwargs = super().init_kwargs()
        if self.model_revision is not None:
            kwargs["revision"] = self.model_revision
        return kwargs


@dataclass
class DataArguments(DatasetArguments):
    """The preference pairs to train on and to evaluate on."""

    dataset: list[str] | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={
            "help": ".jsonl, .json, .parquet or .csv files, folders, or hub names (required).",
            "aliases": ["--dataset_name"],
        },
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata={"help": "How often to draw from each of several datasets. Default: by size."},
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the rows of --dataset as training needs them; needs --max_steps.",
            "aliases": ["--dataset_streaming"],
        },
    )
    shuffle_buffer: int = field(
        default=10_000,
        metadata={"help": "Rows among which --streaming draws the next. 0: in their order."},
    )
    eval_dataset: list[str] | None = field(
        default=None,
        metadata={"help": "Files, folders or hub names to evaluate on; several one by one."},
    )
    eval_split: str = field(
        default="test",
        metadata={
            "help": "Split to evaluate on, of --eval_dataset or else of --dataset.",
            "aliases": ["--dataset_test_split"],
        },
    )
    eval_fraction: float = field(
        default=0.0,
        metadata={"help": "Instead of --eval_dataset: share of the pairs to hold out."},
    )


@dataclass
class LoraArguments:
    """The adapter, if any."""

    _argument_group_name = "LoRA"

    use_peft: bool | None = field(
        default=None, metadata={"help": "Train an adapter, of rank 16 if --lora_r is not given."}
    )
    lora_r: int = field(default=0, metadata={"help": "Rank. 0 trains all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale: alpha / r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout; needs --disable_dropout false."}
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of layers. Default: every linear layer except the head."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Names of layers to train whole, beside the adapter."}
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata={"help": "Names of parameters to adapt, such as those of experts."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Adapt the weights' lengths apart."})


def main(argv: list[str]) -> int:
    """Run `prefkern train`; returns the exit status."""
    config = None
    try:
        try:
            trainer, config = _prepare(argv)
        except (ValueError, TypeError, OSError, ImportError) as error:
            return fail("train", str(error))
        from prefkern.training.checkpoint_files import CheckpointError

        go_on()
        try:
            _run(trainer, config)
        except (CheckpointError, FloatingPointError) as error:
            return fail("train", str(error))
    except KeyboardInterrupt:
        from prefkern.cli.before_training import interrupted

        return interrupted("train", config)
    return 0


def _run(trainer: PreferenceTrainer, config: PreferenceConfig) -> None:
    """Train, evaluate, save, and print the metrics."""
    if config.process_index == 0:
        from prefkern.data import show

        show(trainer.dataset_reports.values())
    metrics = trainer.train(resume_from_checkpoint=resume_from(config)).metrics
    results = Path(config.output_dir or ".") / "all_results.json"
    if "train_loss" not in metrics and results.exists():
        # A finished run was resumed: it keeps the figures of the steps that it took.
        metrics = {**json.loads(results.read_text()), **metrics}
    if trainer.eval_dataset is not None:
        metrics = {**metrics, **trainer.evaluate()}
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("all", metrics, combined=False)
    if config.process_index == 0:
        width = max(map(len, metrics))
        for name, value in metrics.items():
            print(f"{name:<{width}}  {value:.6g}")
        if trainer.joining_command is None:
            print(f"saved to {config.output_dir}")
        else:
            print(f"saved in shards to {config.output_dir}; this makes a model of them:")
            print(trainer.joining_command)


def parse(
    argv: list[str],
) -> tuple[TrainedModelArguments, DataArguments, LoraArguments, PreferenceConfig]:
    """The arguments from flags and from a file.

    The checks that need no transformers come first, since its import takes seconds. Raises
    ValueError for unknown, missing, malformed or contradictory arguments, ImportError for a package
    that is not installed, and FileNotFoundError for a dataset or folder that does not exist.
    """
    parsed = Parser(
        (TrainedModelArguments, DataArguments, LoraArguments, LossArguments),
        ("prefkern.training.config", "PreferenceConfig"),
        "train",
        "Train a model on preference pairs.",
    ).parse(argv)
    check_installed()
    model, data, lora, loss = parsed.groups
    read_losses(loss, parsed.config)
    args = parsed.checkable()
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset", data.dataset),
    ):
        if not value:
            raise ValueError(f"--{name} is required")
    if not 0 <= data.eval_fraction < 1:
        raise ValueError(f"--eval_fraction must be in [0, 1), got {data.eval_fraction}")
    if data.eval_fraction and data.eval_dataset:
        raise ValueError("give either --eval_dataset or --eval_fraction, not both")
    sources = data.dataset = _listed(data.dataset)
    data.eval_dataset = _listed(data.eval_dataset) or None
    check_sources("--dataset", sources, data.dataset_weights)
    if "shuffle_buffer" in parsed.given and not data.streaming:
        raise ValueError("--shuffle_buffer has no effect without --streaming")
    if data.shuffle_buffer < 0:
        raise ValueError(f"--shuffle_buffer must be >= 0, got {data.shuffle_buffer}")
    if data.streaming and data.eval_fraction:
        raise ValueError(
            "--eval_fraction needs the number of rows, which --streaming does not know; give "
            "--eval_dataset"
        )
    is_file = all(Path(source).expanduser().is_file() for source in sources)
    if data.streaming and args.max_steps <= 0:
        raise ValueError(
            f"--streaming needs --max_steps above 0, got {args.max_steps}: a stream does not tell "
            "how many rows it has"
        )
    if data.streaming and len(sources) > 1 and data.dataset_weights is None:
        raise ValueError(
            "--streaming of several datasets needs --dataset_weights, since their sizes are not known"
        )
    if "eval_split" in parsed.given and data.eval_fraction:
        raise ValueError("--eval_split has no effect with --eval_fraction")
    if data.eval_dataset is None and not data.eval_fraction:
        if "eval_split" in parsed.given and is_file:
            raise ValueError(
                "--eval_split has no effect without --eval_dataset: a file is one split, and "
                f"{', '.join(sources)} is trained on"
            )
        if args.eval_strategy != "no" and is_file:
            raise ValueError("--eval_strategy needs --eval_dataset or --eval_fraction")
        if args.eval_strategy != "no" or "eval_split" in parsed.given:
            # As `trl dpo` has it: another split of the same dataset.
            if len(sources) > 1:
                raise ValueError("--eval_dataset is required beside several datasets")
            data.eval_dataset = sources
    if not 0 <= lora.lora_dropout < 1:
        raise ValueError(f"--lora_dropout must be in [0, 1), got {lora.lora_dropout}")
    read_peft(lora, parsed.given)
    if model.adapter is not None:
        for name in sorted(parsed.given & vars(lora).keys()):
            raise ValueError(f"--{name} has no effect on --adapter, which is a trained adapter")
    check_lora(lora, parsed.given - {"use_peft"}, without="without --lora_r")
    if data.dataset_config is not None and is_file:
        raise ValueError("--dataset_config has no effect on a file")
    if lora.lora_dropout and args.disable_dropout:
        raise ValueError("--lora_dropout has no effect without --disable_dropout false")
    check_sources("--eval_dataset", data.eval_dataset or [], None)
    check_output_dir(args.output_dir)
    check_model_folder("--model_name_or_path", model.model_name_or_path)
    check_model_folder("--adapter", model.adapter)
    check_model_folder("--ref_model_name_or_path", args.ref_model_name_or_path)

    from prefkern.training import options

    options.check_preference(args, parsed.training_defaults)
    with importing():
        options.build_objective(args)
    init_kwargs = model.init_kwargs()
    quantized = quantization(model, bool(lora.lora_r or model.adapter))
    if quantized is not None:
        if "quantization_config" in (args.model_init_kwargs or {}):
            raise ValueError(
                "model_init_kwargs has a quantization_config, and --load_in_4bit or --load_in_8bit "
                "makes one; give one"
            )
        init_kwargs["quantization_config"] = quantized
    for name, value in (args.model_init_kwargs or {}).items():
        if name in parsed.given and value != init_kwargs.get(name):
            raise ValueError(
                f"--{name} is {init_kwargs.get(name)!r}, and {value!r} in model_init_kwargs; give one"
            )
    parsed.config["model_init_kwargs"] = {**init_kwargs, **(args.model_init_kwargs or {})}

    with importing():
        from prefkern.training.config import PreferenceConfig

    return model, data, lora, PreferenceConfig(**parsed.config)


def _prepare(argv: list[str]) -> tuple[PreferenceTrainer, PreferenceConfig]:
    """Check and load everything, the cheapest checks first."""
    model, data, lora, config = parse(argv)

    from prefkern.cli.before_training import check_best_metric, check_optimizer, check_options

    keep_freed_memory(config.device.type)
    check_options(config)

    assert model.model_name_or_path is not None and data.dataset is not None
    parts = _loaded(data.dataset, data.dataset_split, data, config, data.streaming)
    evaluation = None
    if data.eval_dataset is not None:
        tested = _loaded(data.eval_dataset, data.eval_split, data, config)
        evaluation = tested if len(tested) > 1 else next(iter(tested.values()))
    elif data.eval_fraction:
        split = {
            name: part.train_test_split(test_size=data.eval_fraction, seed=config.seed)
            for name, part in parts.items()
        }
        parts = {name: part["train"] for name, part in split.items()}
        evaluation = _joined({name: part["test"] for name, part in split.items()})

    from prefkern.training.trainer import PreferenceTrainer

    policy: Any = model.model_name_or_path
    tokenizer = None
    if model.adapter is not None:
        from prefkern.data.columns import picture_column
        from prefkern.models.loading import (
            load_adapted,
            load_own_processor,
            load_own_tokenizer,
        )

        init_kwargs: Any = config.model_init_kwargs  # a mapping, since `parse`
        policy = load_adapted(policy, model.adapter, init_kwargs)
        sees = any(picture_column(part.column_names) for part in parts.values())
        load = load_own_processor if sees else load_own_tokenizer
        tokenizer = load(model.adapter, model.model_name_or_path, init_kwargs)
        if config.ref_model_name_or_path is None:
            config.model_init_kwargs = None
    trainer = PreferenceTrainer(
        policy,
        config,
        processing_class=tokenizer,
        train_dataset=_joined(parts, data.dataset_weights),
        eval_dataset=evaluation,
        peft_config=lora_config(
            lora,
            "CAUSAL_LM",
            lora_dropout=lora.lora_dropout,
            modules_to_save=lora.lora_modules_to_save,
            target_parameters=lora.lora_target_parameters,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
        ),
    )
    trainer.dataset_name = data.dataset[0]
    if len(data.dataset) > 1:
        # A name of several would be taken for a path.
        trainer.dataset_name = ", ".join(Path(source).name for source in data.dataset)
    check_optimizer(config, trainer.model)
    check_best_metric(trainer)
    return trainer, config


def _listed(given: list[str] | str | None) -> list[str]:
    """The datasets of an option: a file of options may give one as a text."""
    return [given] if isinstance(given, str) else given or []


def _loaded(
    sources: list[str],
    split: str,
    data: DataArguments,
    config: PreferenceConfig,
    streaming: bool = False,
) -> dict[str, Any]:
    """Datasets, or streams, by their names."""
    from prefkern.data import load_preference_dataset, load_preference_stream

    load: Any = load_preference_stream if streaming else load_preference_dataset
    seed = config.seed if config.data_seed is None else config.data_seed
    columns: Any = config.columns  # a mapping or None, since __post_init__
    parts = {}
    for name, source in _named(sources).items():
        is_file = Path(source).expanduser().is_file()
        given = (source, split, None if is_file else data.dataset_config, columns)
        part: Any = load(*given) if streaming else load(*given, pictures=True)
        if streaming and data.shuffle_buffer:
            part = part.shuffle(seed=seed, buffer_size=data.shuffle_buffer)
        parts[name] = part
    return parts


def _named(sources: list[str]) -> dict[str, str]:
    """Datasets by the short names that their reports have."""
    short = [Path(source).stem for source in sources]
    names = short if len({*short}) == len(short) else sources
    return dict(zip(names, sources, strict=True))


def _joined(parts: dict[str, Any], weights: list[float] | None = None) -> Any:
    """The one dataset, or a mix of several."""
    return next(iter(parts.values())) if len(parts) == 1 else DatasetMix(parts, weights)
