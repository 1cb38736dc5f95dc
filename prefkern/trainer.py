"""PreferenceTrainer: transformers' Trainer on preference pairs, with no logits in memory.

A step: the reference's log-prob sums of the batch, unless the dataset carries them; the policy's
wrapped forward, in which `FusedPreferenceLoss` stands where the output head was; one backward.
Policy and reference go through the same code, dtype and summation, so that equal models give a DPO
loss of ln 2.

The loss is the mean over the pairs of an optimiser step: pairs are counted over accumulated batches
and over ranks, so 1 x 8 pairs trains like 4 x 2, the last partial batch included. Metrics have
TRL's names and are means over pairs (or tokens) since the last log, over all ranks. Evaluation
gathers values per pair, so that neither a partial batch nor a repeated pair shifts a mean.

The reference is one of: `ref_model`; the adapter switched off, for PEFT; sums computed once before
training (`precompute_ref_log_probs`) or found in the dataset; else a copy of the initial model.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from transformers.utils.import_utils import is_peft_available

from prefkern import objectives
from prefkern.config import PreferenceConfig
from prefkern.data import (
    COLUMNS,
    DatasetReport,
    PreferenceCollator,
    check_columns,
    tokenize_preferences,
)
from prefkern.loss import FusedPreferenceLoss
from prefkern.models import (
    IGNORE_INDEX,
    align_labels,
    find_head,
    forward_with_head,
    head_transform,
    token_states,
    unwrap,
)
from prefkern.objectives import Objective
from prefkern.outputs import PreferenceOutput

logger = logging.getLogger(__name__)

# In the names of rates: attention_dropout, attn_pdrop, layerdrop.
_DROPOUTS = ("dropout", "pdrop", "layerdrop")


class PreferenceTrainer(Trainer):
    """Trains a causal LM on preference pairs.

    Args:
        model: a Hugging Face causal LM, a PEFT model of one, or a name or path to load.
        args: a `PreferenceConfig`.
        train_dataset, eval_dataset: `datasets.Dataset` in one of the formats of `prefkern.data`;
            the latter may be a dict of them.
        processing_class: the tokenizer; None loads the model's own.
        objective: overrides `args.objective`.
        ref_model: the reference, a model, name or path. None: the adapter switched off for PEFT
            (so the reference is the base model), else a copy of the initial model, which costs its
            memory unless `precompute_ref_log_probs` is set.
        peft_config: adapts `model` with PEFT.
        callbacks, optimizers, data_collator: as in transformers' Trainer.

    Attributes:
        dataset_reports: `DatasetReport` of each dataset by name ("train", "eval", ...).

    Raises ValueError for what cannot be trained as asked: unusable datasets, heads and arguments.
    Raises TypeError for a model, arguments or a dataset of another kind.
    """

    args: PreferenceConfig

    def __init__(
        self,
        model: Any,
        args: PreferenceConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        objective: Objective | None = None,
        ref_model: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        data_collator: Any = None,
    ) -> None:
        args = args if args is not None else PreferenceConfig()
        if not isinstance(args, PreferenceConfig):
            raise TypeError(f"args must be a PreferenceConfig, got {type(args).__name__}")
        if not isinstance(model, str | nn.Module):
            raise TypeError(
                f"model must be a causal LM, or a name or path to load, got {type(model).__name__}"
            )
        if isinstance(ref_model, nn.Module) and unwrap(ref_model) is unwrap(model):
            raise ValueError(
                "ref_model is the model that is trained; pass None to have a copy made, or a copy"
            )
        objective = objective if objective is not None else args.build_objective()
        for name, dataset in _named(train_dataset, "train") + _named(eval_dataset, "eval"):
            check_columns(dataset, name)
        # Trainer seeds, too, but an adapter's initial weights are drawn before it can.
        set_seed(args.seed)
        model = _load_model(model, args) if isinstance(model, str) else model
        processing_class = processing_class or AutoTokenizer.from_pretrained(
            model.config._name_or_path
        )
        tokenizer: Any = getattr(processing_class, "tokenizer", processing_class)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        pad_token_id: int | None = tokenizer.pad_token_id
        if pad_token_id is None:
            raise ValueError("the tokenizer has neither a pad nor an eos token; set pad_token")
        model = _adapt(model, peft_config, args)
        find_head(model)

        self._tokenizer = tokenizer
        self._needs_reference = objective.needs_reference
        self.dataset_reports: dict[str, DatasetReport] = {}
        with args.main_process_first(desc="tokenisation", local=False):
            train_dataset = self._tokenized(train_dataset, args, "train")
            eval_dataset = self._tokenized(eval_dataset, args, "eval")
        _check_batches(train_dataset, args.train_batch_size, args, "train")
        _check_batches(eval_dataset, args.eval_batch_size, args, "eval")
        if args.disable_dropout:
            _disable_dropout(model)
        carried = all(
            "ref_chosen_logps" in dataset.column_names
            for _, dataset in _named(train_dataset, "train") + _named(eval_dataset, "eval")
        )
        ref_model = ref_model if ref_model is not None else args.ref_model_name_or_path
        if isinstance(ref_model, str):
            ref_model = _load_model(ref_model, args, dtype=model.dtype)
        if ref_model is not None and objective.needs_reference:
            find_head(ref_model)
        is_adapted = _is_peft_model(model)
        if is_adapted and peft_config is None and ref_model is None and _is_trained_adapter(model):
            logger.warning("the reference is the base model, without the adapter that was given")
        has_reference = ref_model is not None or carried or is_adapted
        if self._needs_reference and not has_reference and not args.precompute_ref_log_probs:
            ref_model = copy.deepcopy(model)
        self.ref_model = ref_model if self._needs_reference else None

        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or PreferenceCollator(pad_token_id, args.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._refuse_unsupported_setups()
        # compute_loss scales by the number of pairs itself; Trainer must not divide once more.
        self.model_accepts_loss_kwargs = True
        options = {"ignore_index": IGNORE_INDEX, "workspace_mb": args.workspace_mb}
        self.loss_fn = FusedPreferenceLoss(objective, backend=args.backend, **options)
        self.loss_fn.to(args.device)
        # The reference's sums are formed by the policy's own code; the objective does not matter.
        self._sum_fn = FusedPreferenceLoss(objectives.DPO(), backend=args.backend, **options)
        self._train_sums: dict[str, Tensor] = {}
        self._eval_sums: dict[str, Tensor] = {}

        if self.ref_model is not None:
            if args.disable_dropout:
                _disable_dropout(self.ref_model)
            self.ref_model.requires_grad_(False).eval()
            if not hasattr(self.ref_model, "hf_device_map"):
                self.ref_model.to(args.device)  # pyright: ignore[reportCallIssue]
        if self._needs_reference and args.precompute_ref_log_probs:
            self.train_dataset = self._with_reference(self.train_dataset)
            self.eval_dataset = self._with_reference(self.eval_dataset)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the mean over `num_items_in_batch` pairs; None: its own mean."""
        outputs, loss = self._preference_outputs(model, inputs)
        for name, values in _pair_values(outputs, self.loss_fn.objective).items():
            total = values.sum(0)
            previous = self._train_sums.get(name)
            self._train_sums[name] = total if previous is None else previous + total
        if num_items_in_batch is not None:
            # Ranks' gradients are averaged, and the mean is over the pairs of all ranks.
            pairs = len(outputs.losses)
            loss = loss * (pairs * self.accelerator.num_processes / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, None, None]:
        """Loss and metrics of an evaluation batch; there are no logits to return."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs, loss = self._preference_outputs(model, inputs)
        values = {
            "loss": _per_pair(outputs.losses),
            **_pair_values(outputs, self.loss_fn.objective),
        }
        # Pair by pair, so that what pads the last batch of the ranks is left out.
        stacked = torch.stack([*values.values()], dim=1)  # (B, metrics, 2)
        gathered: Any = self.accelerator.gather_for_metrics(stacked)
        for name, total in zip(values, gathered.sum(0), strict=True):
            previous = self._eval_sums.get(name)
            self._eval_sums[name] = total if previous is None else previous + total
        return loss, None, None

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Loss and metrics on a dataset, which may be raw pairs; see transformers' Trainer."""
        # A string names one of the datasets given to the constructor.
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, metric_key_prefix)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)  # pyright: ignore[reportArgumentType]

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
    ) -> PredictionOutput:
        """As `evaluate`, in the form of Trainer's `predict`: metrics alone, without predictions."""
        test_dataset = self._prepared(test_dataset, metric_key_prefix)
        return super().predict(test_dataset, ignore_keys, metric_key_prefix)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Trainer's loop, with means over pairs in place of its mean over batches."""
        self._eval_sums = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = _means(self._eval_sums)
        assert output.metrics is not None
        output.metrics.update({f"{metric_key_prefix}_{k}": v for k, v in metrics.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, adding to a training log the metrics since the last; called on every rank."""
        if self._train_sums and ("loss" in logs or "train_loss" in logs):
            names = list(self._train_sums)
            sums = self.accelerator.reduce(torch.stack([*self._train_sums.values()]), "sum")
            logs.update(_means(dict(zip(names, sums, strict=True))))
            self._train_sums = {}
        super().log(logs, start_time)

    def _preference_outputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[PreferenceOutput, Tensor]:
        """The loss, computed inside the policy's forward, and the scalar to differentiate."""
        ref_logps = inputs.get("ref_logps")
        if self._needs_reference and ref_logps is None:
            ref_logps = self._reference_logps(inputs)
        self.loss_fn.train(model.training)
        # A dataset may carry margins that this objective has no use for.
        uses_margins = self.loss_fn.objective.uses_reward_margins
        return _fused_forward(
            model,
            inputs,
            self.loss_fn,
            ref_logps=ref_logps,
            reward_margins=inputs.get("reward_margins") if uses_margins else None,
            return_stats=self.args.token_metrics,
        )

    def _reference_logps(self, inputs: dict[str, Any]) -> Tensor:  # (2B,)
        zeros = torch.zeros(len(inputs["input_ids"]), device=inputs["input_ids"].device)
        # Models are wrapped in autocast only once training starts; sums computed before count too.
        with torch.no_grad(), self._reference() as model, self.accelerator.autocast():
            outputs, _ = _fused_forward(model, inputs, self._sum_fn, ref_logps=zeros)
        return torch.cat([outputs.chosen_logps, outputs.rejected_logps])

    @contextmanager
    def _reference(self) -> Iterator[nn.Module]:
        """The reference model, in evaluation mode."""
        if self.ref_model is not None:
            yield self.ref_model
            return
        model = self.accelerator.unwrap_model(self.model)
        is_adapted = _is_peft_model(model)
        if not is_adapted and self.state.global_step > 0:
            raise ValueError(
                "the reference is the initial model, which training has changed: pass this "
                "dataset to the constructor, or pass ref_model"
            )
        was_training = model.training
        model.eval()
        try:
            if is_adapted:
                with model.disable_adapter():
                    yield model
            else:
                yield model
        finally:
            model.train(was_training)

    def _tokenized(self, dataset: Any, args: PreferenceConfig, name: str) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {
                key: self._tokenized(value, args, f"{name}_{key}") for key, value in dataset.items()
            }
        is_prepared = {"prompt_ids", "chosen_ids", "rejected_ids"} <= set(dataset.column_names)
        dataset, report = tokenize_preferences(
            dataset,
            self._tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            num_proc=args.dataset_num_proc,
            name=name,
        )
        if not is_prepared or report.dropped:
            self.dataset_reports[name] = report
            logger.info("%s", report)
        return dataset

    def _prepared(self, dataset: Any, name: str) -> Any:
        """Raw pairs as a dataset to evaluate on."""
        dataset = self._tokenized(dataset, self.args, name)
        _check_batches(dataset, self.args.eval_batch_size, self.args, name)
        if self._needs_reference and self.args.precompute_ref_log_probs:
            dataset = self._with_reference(dataset)
        return dataset

    def _with_reference(self, dataset: Any) -> Any:
        """The dataset with the reference's sums as columns, computed unless it carries them."""
        if isinstance(dataset, dict):
            return {key: self._with_reference(value) for key, value in dataset.items()}
        if dataset is None or "ref_chosen_logps" in dataset.column_names:
            return dataset
        from tqdm.auto import tqdm

        batch_size = self.args.precompute_ref_batch_size or self.args.per_device_eval_batch_size
        loader = self.accelerator.prepare(
            DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator)  # pyright: ignore[reportArgumentType]
        )
        sums = []
        for batch in tqdm(
            loader,
            desc="Reference log-probs",
            disable=self.args.disable_tqdm or not self.is_local_process_zero(),
        ):
            logps = self._reference_logps(self._prepare_inputs(batch))
            by_pair: Any = self.accelerator.gather_for_metrics(logps.view(2, -1).T.contiguous())
            sums.append(by_pair.cpu())
        chosen, rejected = torch.cat(sums).T.tolist()
        return dataset.add_column("ref_chosen_logps", chosen).add_column(
            "ref_rejected_logps", rejected
        )

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Pairs of an optimiser step, over its accumulated batches and over ranks."""
        pairs = sum(len(batch["input_ids"]) // 2 for batch in batch_samples)
        return self.accelerator.reduce(torch.tensor(float(pairs), device=device), "sum")

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(COLUMNS)

    def _refuse_unsupported_setups(self) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                "nn.DataParallel is not supported: start one process per GPU with `accelerate "
                "launch` or `torchrun`, or make a single GPU visible with CUDA_VISIBLE_DEVICES"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise ValueError("tensor, context and sequence parallelism are not supported yet")
        if self.ref_model is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                "a separate reference model is not supported yet under DeepSpeed or FSDP; use "
                "LoRA or precomputed sums (ref_chosen_logps and ref_rejected_logps columns)"
            )


def _fused_forward(
    model: nn.Module, inputs: dict[str, Any], loss_fn: FusedPreferenceLoss, **options: Any
) -> tuple[PreferenceOutput, Tensor]:
    """Run `loss_fn` inside the model's forward: its output, and the loss to differentiate."""
    transform = head_transform(model)
    labels = align_labels(inputs["labels"])

    def score(
        hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[PreferenceOutput, Tensor]:
        outputs = loss_fn(
            token_states(hidden, labels),
            weight,
            labels,
            bias,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            **options,
        )
        return outputs, outputs.loss

    ours = ("labels", "ref_logps", "reward_margins")
    model_inputs = {name: value for name, value in inputs.items() if name not in ours}
    outputs, zero = forward_with_head(model, model_inputs, score)
    return outputs, outputs.loss + zero


@torch.no_grad()
def _pair_values(outputs: PreferenceOutput, objective: Objective) -> dict[str, Tensor]:
    """Each metric as [B, 2]: a pair's numerator and its weight."""
    chosen, rejected = outputs.chosen_rewards, outputs.rejected_rewards
    values = {
        "rewards/chosen": _per_pair(chosen),
        "rewards/rejected": _per_pair(rejected),
        "rewards/accuracies": _per_pair(chosen > rejected),
        "rewards/margins": _per_pair(chosen - rejected),
        "logps/chosen": _per_pair(outputs.chosen_logps),
        "logps/rejected": _per_pair(outputs.rejected_logps),
    }
    adaptive = objective.adaptive
    if adaptive is not None:
        ratio = outputs.beta_chosen / outputs.beta_rejected
        values["adaptive/beta_ratio"] = _per_pair(ratio)
        if adaptive.clip is not None:
            # beta cancels up to the rounding of a product and a quotient.
            at_clip = ratio >= adaptive.k * adaptive.clip * (1 - 1e-6)
            values["adaptive/clip_fraction"] = _per_pair(at_clip)
        if outputs.ref_chosen_logps is not None and outputs.ref_rejected_logps is not None:
            # Rewards above use the coefficients in force; these compare with plain DPO's.
            base = (outputs.chosen_logps - outputs.ref_chosen_logps) - (
                outputs.rejected_logps - outputs.ref_rejected_logps
            )
            values["rewards/base_margins"] = _per_pair(outputs.beta_rejected * base)
            values["rewards/base_accuracies"] = _per_pair(base > 0)
    stats = outputs.token_stats
    if stats is not None:
        lengths = torch.stack([outputs.chosen_lengths, outputs.rejected_lengths])  # (2, B)

        def token_sums(per_token: Tensor) -> Tensor:  # (2B, T) -> (2, B)
            return per_token.float().sum(1).view(2, -1)

        entropies, logits = token_sums(stats.entropy), token_sums(stats.mean_logit)
        values["entropy"] = _per_pair(entropies.sum(0), lengths.sum(0))
        values["logits/chosen"] = _per_pair(logits[0], lengths[0])
        values["logits/rejected"] = _per_pair(logits[1], lengths[1])
        values["mean_token_accuracy"] = _per_pair(token_sums(stats.is_top1)[0], lengths[0])
    return values


def _per_pair(numerators: Tensor, weights: Tensor | None = None) -> Tensor:  # (B,) -> (B, 2)
    numerators = numerators.detach().float()
    weights = torch.ones_like(numerators) if weights is None else weights.float()
    return torch.stack([numerators, weights], dim=1)


def _means(sums: dict[str, Tensor]) -> dict[str, float]:
    return {name: (total[0] / total[1].clamp(min=1)).item() for name, total in sums.items()}


def _named(dataset: Any, name: str) -> list[tuple[str, Any]]:
    if dataset is None:
        return []
    if isinstance(dataset, dict):
        return [(f"{name}_{key}", value) for key, value in dataset.items()]
    return [(name, dataset)]


def _check_batches(dataset: Any, batch_size: int, args: PreferenceConfig, name: str) -> None:
    """Raise where dropping the last partial batch leaves none."""
    if not args.dataloader_drop_last:
        return
    across_ranks = batch_size * args.world_size
    for each, part in _named(dataset, name):
        if len(part) < across_ranks:
            raise ValueError(
                f"dataset {each!r} has {len(part)} pairs, fewer than a batch of {across_ranks} "
                "over all processes, and dataloader_drop_last drops partial batches"
            )


def _load_model(name: str, args: PreferenceConfig, **defaults: Any) -> Any:
    kwargs = {"dtype": torch.float32, **defaults, **(args.model_init_kwargs or {})}  # pyright: ignore[reportGeneralTypeIssues]
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def _is_peft_model(model: Any) -> bool:
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def _is_trained_adapter(model: nn.Module) -> bool:
    """Whether a LoRA adapter changes its base model; a fresh one has B = 0."""
    return any("lora_B" in name and bool(weight.any()) for name, weight in model.named_parameters())


def _adapt(model: Any, peft_config: Any, args: PreferenceConfig) -> Any:
    """The model with its adapter, if one is asked for."""
    if peft_config is not None:
        if _is_peft_model(model):
            raise ValueError("model is a PEFT model already; pass no peft_config with it")
        rates = _dropout_rates(peft_config)
        if rates and args.disable_dropout:
            raise ValueError(
                f"peft_config's {next(iter(rates))} has no effect under disable_dropout; set "
                "disable_dropout=False, or the adapter's dropout to 0"
            )
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    if _is_peft_model(model) and args.gradient_checkpointing:
        # Without this the checkpointed blocks of a frozen model have no input to differentiate.
        model.enable_input_require_grads()
    return model


def _dropout_rates(owner: Any) -> dict[str, float]:
    """The attributes of a module or config that are dropout rates above 0."""
    return {
        name: value
        for name, value in vars(owner).items()
        if isinstance(value, float) and value > 0 and any(part in name for part in _DROPOUTS)
    }


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        # Llama's attention keeps its rate as a number, and Falcon reads it off the config each time.
        config = getattr(module, "config", None)
        for owner in (module, config) if isinstance(config, PreTrainedConfig) else (module,):
            for name in _dropout_rates(owner):
                setattr(owner, name, 0.0)
