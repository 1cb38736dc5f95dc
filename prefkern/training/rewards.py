"""Reward models on preference pairs: step 1 of MADPO, whose margins step 2 reads.

A reward model r(x, y) is a transformer with one output, fitted to the Bradley-Terry likelihood of
the pairs, P(y_w > y_l | x) = sigmoid(r(x, y_w) - r(x, y_l)) (MADPO, Eq. 1 and 2):

    loss = -log sigmoid(m),  m = r(x, y_w) - r(x, y_l)
    d loss / d r_w = -d loss / d r_l = -sigmoid(-m)

`prefkern.data` tokenises, truncates and batches the pairs, so that a margin m belongs to exactly
the tokens that the policy trains on. The head's weights and its product are float32 whatever the
dtype of the body (except under autocast), since a margin is a difference of two scores.

transformers' decoders score the last token that is not the pad token. In many base models the pad
token also ends every text, and then that is not the last token. So a model that is trained here
pads with a token that ends none of its sequences.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    EarlyStoppingCallback,
)
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments
from transformers.utils.peft_utils import find_adapter_config_file

from prefkern.data import check_columns, tokenize_preferences
from prefkern.data.collate import PreferenceCollator
from prefkern.data.columns import (
    COLUMNS,
    COLUMNS_HELP,
    MARGIN_SOURCES,
    read_renaming,
    renamed,
)
from prefkern.data.truncation import TRUNCATION_HELP, TRUNCATION_MODES
from prefkern.devices import as_double
from prefkern.keywords import current_names
from prefkern.models import score_head
from prefkern.models.adapters import check_no_native_adapter
from prefkern.models.calls import without_cache
from prefkern.models.heads import unwrap
from prefkern.models.liger import apply_liger, check_liger
from prefkern.models.loading import (
    from_files,
    is_trusted,
    load_tokenizer,
    of_another,
    whence,
)
from prefkern.models.packing import WHOLE_ROW, reads_whole_row
from prefkern.models.positions import check_positions
from prefkern.models.scores import packed_scores, require_packed_scores
from prefkern.training import options
from prefkern.training.config import (
    read_json,
    refuse_dispatched_rows,
    refuse_split_sequences,
    training_defaults,
)
from prefkern.training.item_trainer import ItemTrainer
from prefkern.training.names import NamedArguments
from prefkern.training.tensor_parallel import refuse_tensor_parallel
from prefkern.training.zero import check_zero

logger = logging.getLogger(__name__)

# What the policy's trainer reads beside text. A margin here belongs to the text.
_OTHERS = {*COLUMNS, *(column for sources in MARGIN_SOURCES for column in sources)}


@dataclass
class RewardConfig(NamedArguments, TrainingArguments):
    """Training arguments of `RewardTrainer`; the rest are transformers' TrainingArguments.

    Evaluates ten times a run, saves at each evaluation, stops when the held-out loss no longer
    falls, and ends with the best checkpoint. Raises ValueError for arguments without effect.
    """

    output_dir: str | None = field(
        default="reward_model", metadata={"help": "Folder that the reward model is saved to."}
    )
    learning_rate: float = field(
        default=1e-4, metadata={"help": "Initial learning rate. Default: 1e-4 for LoRA, else 1e-5."}
    )
    eval_strategy: str = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default="steps", metadata={"help": "When to evaluate and save: steps or epoch."}
    )
    eval_steps: float | None = field(
        default=0.1, metadata={"help": "Every so many steps; below 1, a share of all steps."}
    )
    save_total_limit: int | None = field(
        default=1, metadata={"help": "Checkpoints to keep besides the last."}
    )
    load_best_model_at_end: bool = field(
        default=True, metadata={"help": "End with the best checkpoint; cannot be turned off."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Log every so many steps."})
    warmup_ratio: float | None = field(
        default=None, metadata={"help": "warmup_steps as a share of all steps, in [0, 1)."}
    )
    early_stopping_patience: int = field(
        default=3, metadata={"help": "Stop after so many evaluations without a better one."}
    )
    columns: dict[str, str] | str | list[str] | None = field(
        default=None, metadata={"help": COLUMNS_HELP}
    )
    max_length: int | None = field(
        default=1024, metadata={"help": "Bound on prompt plus response, as in training."}
    )
    max_prompt_length: int | None = field(
        default=None, metadata={"help": "Bound on the prompt, in tokens."}
    )
    truncation_mode: str = field(
        default="keep_end", metadata={"help": TRUNCATION_HELP, "choices": TRUNCATION_MODES}
    )
    padding_free: bool = field(
        default=False,
        metadata={"help": "Pack a batch into one row without padding, where the model allows it."},
    )
    share_prompt: bool = field(
        default=False,
        metadata={"help": "Compute a pair's prompt once, where the model allows it."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the dataset."}
    )

    def __post_init__(self) -> None:
        read_json(self)
        options.check_rewards(self, training_defaults())
        if self.warmup_ratio is not None:
            self.warmup_steps = self.warmup_ratio
        # The best model must be a saved one.
        self.save_strategy = self.eval_strategy
        self.save_steps = self.eval_steps or self.logging_steps
        refuse_split_sequences(self, "cp_size", "sp_size")
        refuse_tensor_parallel(self)
        super().__post_init__()
        refuse_dispatched_rows(self)


def bradley_terry_loss(chosen: Tensor, rejected: Tensor) -> Tensor:  # (B,), (B,) -> (B,)
    """-log sigmoid(r_w - r_l) of each pair, from its two rewards."""
    return -F.logsigmoid(chosen - rejected)


def pair_rewards(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:  # (B, 2)
    """Rewards r_w and r_l, in float32, of a batch of `PreferenceCollator`, padded or packed."""
    if "cu_seqlens" in batch:
        scores = packed_scores(
            model, batch["input_ids"], batch["cu_seqlens"], batch.get("prefixes")
        )
    else:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        scores = model(**without_cache(unwrap(model), inputs)).logits
    return scores.float().view(2, -1).T


def pair_metrics(rewards: Tensor) -> dict[str, float]:  # (pairs, 2)
    """Mean Bradley-Terry loss, share of pairs with r_w > r_l, and mean margin."""
    chosen, rejected = as_double(rewards).T
    return {
        "loss": bradley_terry_loss(chosen, rejected).mean().item(),
        "accuracy": (chosen > rejected).double().mean().item(),
        "margin": (chosen - rejected).mean().item(),
    }


class RewardTrainer(ItemTrainer):
    """Trains a reward model on tokenised pairs, with early stopping where some are held out.

    The loss is the mean over the pairs of an optimiser step, over accumulated batches and ranks.

    Args:
        model: a sequence classifier with one output, or a PEFT model of one.
        args: a `RewardConfig`.
        tokenizer: saved with the model; the saved model pads with its pad token, if it has one.
        pad_token_id: the padding of batches here, from `set_pad_token`.
        train_dataset, eval_dataset: from `tokenize_for_rewards`; None to score only.

    Raises ValueError under nn.DataParallel, for pairs beyond the model's table of positions, and for
    packed rows or shared prompts that the model cannot take.
    """

    args: RewardConfig

    def __init__(
        self,
        model: Any,
        args: RewardConfig,
        tokenizer: Any,
        pad_token_id: int,
        train_dataset: Any = None,
        eval_dataset: Any = None,
    ) -> None:
        for name, pairs in (("train", train_dataset), ("eval", eval_dataset)):
            if pairs is not None:
                check_positions(pairs, unwrap(model), name, max_length=args.max_length)
        callbacks: list[Any] = []
        if eval_dataset is None:
            args.eval_strategy = IntervalStrategy.NO
        else:
            callbacks.append(EarlyStoppingCallback(args.early_stopping_patience))
        check_zero(args)
        refuse_tensor_parallel(args, model)
        check_liger(args, args.device)
        apply_liger(args, model)
        # Not given to Trainer, which would replace the model's pad token by the tokenizer's.
        super().__init__(
            model=model,
            args=args,
            data_collator=PreferenceCollator(
                pad_token_id, padding_free=args.padding_free, share_prompt=args.share_prompt
            ),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
        )
        self._tokenizer = tokenizer
        # A sharded model has its weights only once it is wrapped: the first batch checks it.
        if args.padding_free and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            with self.accelerator.autocast():
                require_packed_scores(self.model, shares=args.share_prompt)  # pyright: ignore[reportArgumentType]
                if reads_whole_row(self.model, shares=args.share_prompt):  # pyright: ignore[reportArgumentType]
                    logger.warning(WHOLE_ROW)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the mean over `num_items_in_batch` pairs; None: its own mean."""
        rewards = pair_rewards(model, inputs)
        losses = bradley_terry_loss(*rewards.unbind(1))
        if model.training:
            self._refuse_nonfinite(rewards)
        loss = self._share(losses.mean(), len(losses), num_items_in_batch)
        return (loss, rewards) if return_outputs else loss

    def _refuse_nonfinite(self, rewards: Tensor) -> None:  # (B, 2)
        bad = ~rewards.detach().isfinite()
        # A gradient scaler skips such a step and lowers its scale.
        if not self.args.fp16 and bad.any():
            pairs = bad.any(1).nonzero().flatten().tolist()
            raise FloatingPointError(
                f"the reward model gave NaN or inf for {len(pairs)} of the batch's {len(bad)} pairs, "
                f"the first of them pair {pairs[0]}: an earlier step has spoilt its parameters (a "
                "lower learning_rate, max_grad_norm), or activations left their dtype's range"
            )

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor, None]:
        """Loss and rewards of a batch."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, rewards = self.compute_loss(model, inputs, return_outputs=True)
        return loss, rewards.contiguous(), None

    def _evaluated(self, predictions: Any) -> dict[str, float]:
        return pair_metrics(torch.as_tensor(predictions))

    def rewards(self, tokens: Any) -> Tensor:  # (pairs, 2)
        """Rewards r_w and r_l of every pair, in order; the same on every rank."""
        return torch.as_tensor(self.predict(tokens).predictions)

    def _save_into(self, folder: str, state_dict: Any) -> None:
        # A model that found no token for padding is saved without one: transformers then scores the
        # last token, of one sequence at a time.
        config = self.accelerator.unwrap_model(self.model).config.get_text_config()  # pyright: ignore[reportCallIssue]
        used, config.pad_token_id = config.pad_token_id, self._tokenizer.pad_token_id
        try:
            super()._save_into(folder, state_dict)
        finally:
            config.pad_token_id = used
        self._tokenizer.save_pretrained(folder)


def tokenize_for_rewards(
    dataset: Any, tokenizer: Any, config: RewardConfig, name: str = "pairs"
) -> tuple[Any, Any]:
    """Tokens of every pair, in order, as the policy's trainer makes them, and their report.

    Raises ValueError for a row that cannot be used, and for one that the trainer would drop.
    """
    check_columns(renamed(dataset, read_renaming(config.columns), name), name)
    text = dataset.remove_columns([c for c in dataset.column_names if c in _OTHERS])
    text = renamed(text, read_renaming(config.columns), name)
    options = {
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
        "truncation_mode": config.truncation_mode,
        "num_proc": config.dataset_num_proc,
        "name": name,
    }
    tokens, report = tokenize_preferences(text, tokenizer, **options)
    if report.dropped:
        # Tokenise again, with each row's number in a column that is kept.
        numbered = text.add_column("reward_margin", [*range(len(text))])
        kept = set(tokenize_preferences(numbered, tokenizer, **options)[0]["reward_margin"])
        rows = [row for row in range(len(text)) if row not in kept]
        what = "an empty response" if report.empty else "a pair that is too long"
        if report.empty and report.too_long:
            what += ", or a pair that is too long"
        raise ValueError(
            f"dataset {name!r}, row {rows[0]}: {what}, which cannot be scored "
            f"({len(rows)} such {'row' if len(rows) == 1 else 'rows'}); leave it out"
        )
    return tokens, report


def new_reward_model(name: str, adapter: Any = None, **kwargs: Any) -> tuple[Any, Any]:
    """A reward model to train, with a fresh head, and its tokenizer.

    Args:
        name: folder or hub name of a model that transformers can load as a sequence classifier.
        adapter: a peft configuration with task type SEQ_CLS; None trains all weights.
        kwargs: keywords of `from_pretrained`.

    Raises ValueError or OSError for a model that cannot be loaded or adapted.
    """
    tokenizer = load_tokenizer(name, kwargs)
    model = _load_classifier(name, num_labels=1, **kwargs)[0]
    check_no_native_adapter(model)
    head = _with_float_head(model)
    if adapter is not None:
        if head is None:
            raise ValueError(
                f"{name!r} has no head called {' or '.join(score_head.NAMES)}, so peft would not train it; "
                "--lora_r 0 trains all weights"
            )
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    return model, tokenizer


def load_reward_model(name: str, **kwargs: Any) -> tuple[Any, Any]:
    """A trained reward model and its tokenizer.

    Args:
        name: folder or hub name of a sequence classifier with one output, or of a PEFT adapter of
            one.
        kwargs: keywords of `from_pretrained`.

    Raises ValueError or OSError for anything else.
    """
    if find_adapter_config_file(name) is None:
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=is_trusted(kwargs), **whence(kwargs)
        )
        _check_outputs(name, config)
        model, missing = _load_classifier(name, **kwargs)
        if missing:
            raise ValueError(f"{name!r} is no reward model: it has no weights {missing[0]}")
        _with_float_head(model)
        return model, load_tokenizer(name, kwargs)

    from peft import PeftConfig, PeftModel

    adapter = PeftConfig.from_pretrained(name)
    if adapter.task_type != "SEQ_CLS":
        raise ValueError(
            f"{name!r} is an adapter with task type {adapter.task_type}; that of a reward model "
            "is SEQ_CLS"
        )
    base = adapter.base_model_name_or_path
    if base is None:
        raise ValueError(f"the adapter {name!r} does not name its base model")
    model, missing = _load_classifier(base, num_labels=1, **kwargs)
    saved = getattr(adapter, "modules_to_save", None) or ()
    untrained = [key for key in missing if not any(part in saved for part in key.split("."))]
    if untrained:
        raise ValueError(f"{name!r} and its base have no weights {untrained[0]}")
    _with_float_head(model)
    try:
        model = PeftModel.from_pretrained(model, name)
    except RuntimeError as error:
        raise ValueError(
            f"the adapter {name!r} does not fit {base!r} with one output: {error}"
        ) from error
    try:
        tokenizer = load_tokenizer(name, of_another(kwargs))
    except (OSError, ValueError):
        return model, load_tokenizer(base, kwargs)
    # An adapter is saved without its model's configuration: take the tokenizer's pad token.
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def set_pad_token(model: Any, tokenizer: Any, tokens: Any, is_new: bool) -> int:
    """Choose the pad token, set it in the model's config, and return its id.

    A trained model keeps its own, which tells it the token to score. A new model and its tokenizer
    get a special token that ends none of the sequences. If there is no such token, batches are
    padded with any token that ends no sequence, and the tokenizer has no pad token.

    Args:
        model: the reward model.
        tokenizer: its tokenizer.
        tokens: every pair that will be scored, from `tokenize_for_rewards`.
        is_new: whether the model is to be trained.

    Raises ValueError if every token ends a sequence.
    """
    config = model.config.get_text_config()
    rows: int = model.get_input_embeddings().num_embeddings
    own: int | None = config.pad_token_id
    # Some old configurations write None as -1.
    if not is_new and own is not None and 0 <= own < rows:
        return own
    ends = {ids[-1] for column in ("chosen_ids", "rejected_ids") for ids in tokens[column]}
    added = tokenizer.added_tokens_decoder
    special = [tokenizer.pad_token_id, *sorted(i for i in added if added[i].special)]
    free = [i for i in special if i is not None and i not in ends | {tokenizer.eos_token_id}]
    pad = next((i for i in (*free, *range(rows)) if i < rows and i not in ends), None)
    if pad is None:
        raise ValueError("sequences end with every token of the vocabulary; none is left to pad")
    config.pad_token_id = pad
    if is_new:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad) if pad in free else None
    return pad


def _load_classifier(name: str, **kwargs: Any) -> tuple[Any, list[str]]:
    """The model, and the names of weights that are missing in its files."""
    kwargs = current_names(kwargs)
    remote = is_trusted(kwargs)
    kwargs.pop("trust_remote_code", None)
    try:
        model, missing = from_files(
            AutoModelForSequenceClassification, name, "model", trust_remote_code=remote, **kwargs
        )
    except RuntimeError as error:
        # Weights of other shapes, such as the head of a classifier with several labels.
        raise ValueError(f"{name!r} cannot be loaded as a reward model: {error}") from error
    _check_outputs(name, model.config)
    return model, missing


def _check_outputs(name: str, config: Any) -> None:
    if config.num_labels != 1:
        kind = ", ".join(config.architectures or ["of unknown architecture"])
        raise ValueError(
            f"{name!r} has {config.num_labels} outputs ({kind}); a reward model is a sequence "
            "classifier with one"
        )


def _with_float_head(model: Any) -> nn.Module | None:
    """The head, cast to float32 with its inputs; None if it has another name."""
    head = next((getattr(model, name) for name in score_head.NAMES if hasattr(model, name)), None)
    if head is not None:
        head.float().register_forward_pre_hook(_to_own_dtype)
    return head


def _to_own_dtype(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].to(next(head.parameters()).dtype), *inputs[1:])
