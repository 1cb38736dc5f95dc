"""TRL's DPOTrainer with an objective of prefkern, and without logits.

TRL still makes the batch, chooses the reference and does everything around a step: datasets and
chat templates, collators (also for vision-language models), PEFT, cached reference log-probs, a
reference that follows the policy, the router's loss, callbacks and model cards.
`prefkern.training.objective_trainer` does the step itself. The differences from TRL:

- The loss is the mean over the pairs of an optimiser step, counted over accumulated batches and
  ranks. TRL takes the mean of the batches' means. The two are equal if all batches are equally
  large; otherwise TRL gives a pair in a small last batch more weight.
- Metrics have TRL's names, and prefkern adds its own. They are means over pairs or tokens since the
  last log; TRL's are means of the batches' means. With several evaluation datasets, each metric is
  logged twice: with the name of the dataset, and without it, as in TRL (the last dataset's value
  stays).
- With an objective, rewards are the objective's own (`prefkern.PreferenceOutput`). For DPO they
  equal TRL's. With TRL's `loss_type` they are TRL's: beta times log-ratios, whatever the loss.
- A trained adapter that is passed in has its initial values as the reference, as in TRL, but of
  every kind of adapter and name, and no checkpoint holds them. TRL adds a second adapter, "ref",
  and leaves out what it cannot find by name (IA3, embeddings, single tokens). Under FSDP and ZeRO-3
  it is TRL's second adapter.

With `objective=DPO(beta)`, losses and gradients equal TRL's to float32 accuracy. Tests check this.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer as PlainDPOTrainer

from prefkern.data.columns import MARGIN_SOURCES, is_number, margin_columns, reward_margin
from prefkern.integrations.trl.asking import accepting_adapted_heads
from prefkern.integrations.trl.batches import (
    BOUNDS,
    MARGINS,
    OnTRL,
    aligned_labels,
    count_sequences,
    of_the_model,
    scored,
    tag_names,
)
from prefkern.integrations.trl.options import (
    check_carried_sums,
    check_padding_free,
    check_reference,
    objective_of,
)
from prefkern.keywords import current_names
from prefkern.loss.outputs import PreferenceOutput
from prefkern.models.adapters import (
    check_reference_adapter,
    check_unmerged,
    is_peft_model,
    is_trained_adapter,
)
from prefkern.models.calls import without_checkpointing
from prefkern.models.heads import find_head
from prefkern.models.own_reference import InitialAdapter, adapter_in_use
from prefkern.models.packing import require_packing
from prefkern.objectives import Objective
from prefkern.training.objective_trainer import (
    reference_states,
    sums_alone,
    sums_of,
)
from prefkern.training.tensor_parallel import counting_batches_once
from prefkern.version import VERSION

logger = logging.getLogger(__name__)


class DPOTrainer(OnTRL, PlainDPOTrainer):
    """`trl.DPOTrainer` that trains an objective of prefkern.

    Args:
        model, ref_model, args, data_collator, train_dataset, eval_dataset, processing_class,
            callbacks, optimizers, quantization_config, peft_config: as in TRL. Reward margins
            (MADPO) are columns of the datasets, as in `prefkern.data`.
        compute_metrics: as in TRL. It is given logits, so that each evaluation batch takes a second
            forward, whose logits are held in memory, as in TRL.
        objective: an objective of `prefkern.objectives`, or its name. None: the loss that
            `args.loss_type` and its options describe, any of TRL's. An objective by name also takes
            `args.beta` and `args.use_weighting`.
        objective_options: further options of an objective by name.
        workspace_mb, backend: as in `prefkern.linear_logprobs`.

    No reference is loaded for an objective without one (SimPO, CPO, ORPO). `args.padding_free` packs
    the batches of TRL's collator into one row; TRL itself ignores it. LoRA on the output head, which
    TRL refuses, is trained.

    Raises ValueError for an argument of TRL that would have no effect, and names it; also for a
    model whose head cannot be read. Raises TypeError if `objective` is not on pairs, or if `args`
    is not a DPOConfig.
    """

    args: DPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    # compute_loss counts the pairs of a step itself: Trainer must not divide by its batches too.
    loss_is_scaled_for_ga = True
    # TRL logs them as 0 where no response token is left.
    _zero_metrics = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        objective: Objective | str | None = None,
        objective_options: dict[str, Any] | None = None,
        workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = DPOConfig(f"{name.split('/')[-1]}-DPO")
        if not isinstance(args, DPOConfig):
            raise TypeError(f"args must be a trl.DPOConfig, got {type(args).__name__}")
        if isinstance(train_dataset, dict):
            # TRL 1.9 would take the names for rows.
            raise TypeError(
                f"train_dataset must be one dataset, got a {type(train_dataset).__name__} of "
                f"{', '.join(map(repr, train_dataset))}: choose one, as train_dataset[...]"
            )
        is_given = isinstance(objective, Objective)
        self._has_trls_losses = objective is None
        objective = objective_of(args, objective, objective_options)
        check_reference(args, objective, ref_model)
        check_padding_free(args, train_dataset)
        self._reference_given = ref_model is not None
        if isinstance(args.model_init_kwargs, dict):
            # TRL adds a default dtype, which would shadow `torch_dtype`.
            args.model_init_kwargs = current_names(args.model_init_kwargs)
        if objective.needs_reward_margins:
            for where, dataset in _named(train=train_dataset, eval=eval_dataset):
                _check_margins(dataset, where)
        self._tag_names = tag_names(objective)
        self._name = objective.title
        is_own_reference = is_peft_model(model) and ref_model is None and objective.needs_reference
        # Sharded weights cannot be exchanged for a pass: TRL's second adapter can be.
        is_own_reference = is_own_reference and not _will_shard(args)
        adapters: Any = getattr(model, "peft_config", ())
        self._initial_adapter: InitialAdapter | None = None
        if is_own_reference and "ref" not in adapters and is_trained_adapter(model):
            self._initial_adapter = InitialAdapter(model)
            logger.warning("the reference is a frozen copy of the adapter that was given")
        # TRL's constructor may compute the reference's log-probs already.
        seed = None if is_given else args.seed
        self._make_losses(objective, workspace_mb, backend, seed, args.ld_alpha)
        with _accepted_by_trl(args):
            super().__init__(
                model=model,
                ref_model=_NoReference()
                if is_own_reference or not objective.needs_reference
                else ref_model,
                args=args,
                data_collator=data_collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                compute_metrics=compute_metrics,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        find_head(self.model)  # pyright: ignore[reportArgumentType]
        check_unmerged(self.model)  # pyright: ignore[reportArgumentType]
        if objective.needs_reference and not args.precompute_ref_log_probs:
            self._check_reference()
        if args.padding_free and not _will_shard(args) and not self.is_deepspeed_enabled:
            with self.accelerator.autocast():
                for each in (self.model, self.ref_model):
                    if each is not None:
                        require_packing(each)
        self.beta = objective.beta
        if objective.needs_reward_margins:
            self.data_collator = _WithMargins(self.data_collator)

    @property
    def ref_model(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The reference model. None: the policy without its adapter, cached log-probs, or none."""
        return self._ref_model

    @ref_model.setter
    def ref_model(self, model: Any) -> None:
        self._ref_model = None if isinstance(model, _NoReference) else model

    def compute_ref_log_probs(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The reference's log-prob sums of the chosen and rejected responses, (B,) float32 each."""
        inputs = self._packed(inputs)
        options = sums_alone(self._sum_fn, count_sequences(inputs), inputs["input_ids"].device)
        with self._as_reference():
            outputs, _, _ = scored(model, inputs, self._sum_fn, with_router=False, **options)
        chosen, rejected = sums_of(outputs).chunk(2)
        return chosen, rejected

    def _preference_outputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[PreferenceOutput, Tensor]:
        try:
            return self._scored_pairs(model, inputs)
        except ValueError as error:
            length = self.args.max_length
            if length is None or "Image features and image tokens do not match" not in str(error):
                raise
            raise ValueError(
                f"max_length is {length}, which cuts placeholders of an image from a prompt; "
                "raise it, or set it to None"
            ) from error

    def _scored_pairs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[PreferenceOutput, Tensor]:
        objective: Any = self.loss_fn.objective
        options: dict[str, Any] = {"return_stats": True}
        reference: Any = self.ref_model or self.model
        if objective.needs_kls:
            with self._as_reference():
                options |= reference_states(
                    reference,
                    model,
                    of_the_model(reference, inputs),
                    aligned_labels(inputs),
                    is_packed=BOUNDS in inputs,
                )
        elif objective.needs_reference:
            if self.precompute_ref_logps:
                sums = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
            else:
                sums = self.compute_ref_log_probs(reference, inputs)
            options["ref_logps"] = torch.cat(sums)
        if objective.needs_reward_margins:
            options["reward_margins"] = inputs[MARGINS]
        self.loss_fn.train(model.training)
        with counting_batches_once(self.accelerator):
            outputs, zero, router_loss = scored(
                model, inputs, self.loss_fn, self.aux_loss_enabled, **options
            )
        if self._has_trls_losses:
            outputs = _with_trls_rewards(outputs, self.args.beta)
        if self.aux_loss_enabled:
            assert router_loss is not None
            added = self.router_aux_loss_coef * router_loss
            outputs = replace(outputs, loss=outputs.loss + added, losses=outputs.losses + added)
            mode = "train" if model.training else "eval"
            everyones: Any = self.accelerator.gather_for_metrics(router_loss.detach())
            self._metrics[mode]["aux_loss"].append(everyones.mean().item())
        self._count_tokens(model, inputs)
        return outputs, outputs.loss + zero

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As ObjectiveTrainer's; also with TRL's names, which never have that of a dataset."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None
        for name in self._eval_sums.keys() - {"loss"}:
            value = output.metrics.get(f"{metric_key_prefix}_{name}")
            if value is not None:
                output.metrics[f"eval_{name}"] = value
        return output

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Without gradients; a policy that is its own reference in its initial state."""
        adapter: Any = nullcontext()
        policy: Any = self.accelerator.unwrap_model(self.model)
        if self._initial_adapter is not None:
            adapter = self._initial_adapter.in_use(policy)
        elif self.ref_model is None and is_peft_model(policy):
            adapter = adapter_in_use(policy, "ref" if "ref" in policy.peft_config else None)
        with (
            torch.no_grad(),
            without_checkpointing(policy),
            adapter,
            self.accelerator.autocast(),
        ):
            yield

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if check_carried_sums(dataset, name, self._reference_given, self.args.ld_alpha):
            logger.warning(
                "dataset %r has ref_chosen_logps and ref_rejected_logps: they are used, and no "
                "reference log-probs are computed",
                name,
            )
            return dataset
        # TRL's cache key has only the data and the weights. But sums also depend on the code that
        # computes them (TRL's or ours), on the precision, on the weights of tokens, and on the
        # truncation, which TRL's collator does after the data is read. So the key must name these.
        self._check_reference()
        cut = self.args.max_length, self.args.truncation_mode, self.args.ld_alpha
        if isinstance(dataset, Dataset):
            dataset = copy.copy(dataset)
            how = (VERSION, self.accelerator.mixed_precision, cut)
            dataset._fingerprint = Hasher.hash((dataset._fingerprint, "prefkern", how))
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _check_reference(self) -> None:
        check_reference_adapter(self.model, None, self.ref_model, self._initial_adapter)

    def _set_signature_columns_if_needed(self) -> None:
        PlainDPOTrainer._set_signature_columns_if_needed(self)
        needs_margins: Any = self.loss_fn.objective.needs_reward_margins  # pyright: ignore[reportAttributeAccessIssue]
        if needs_margins:
            named = {name for sources in MARGIN_SOURCES for name in sources}
            self._signature_columns = [*{*(self._signature_columns or ()), *named}]


def _will_shard(args: DPOConfig) -> bool:
    """Whether FSDP or ZeRO-3 will shard the model."""
    return bool(args.fsdp) or is_fsdp_enabled() or is_deepspeed_zero3_enabled()


@contextmanager
def _accepted_by_trl(args: DPOConfig) -> Iterator[None]:
    """Within the context TRL's constructor lets through what this trainer does and TRL's does not.

    TRL refuses an adapter on the output head, and it warns that it has switched `padding_free` off.
    """
    padding_free, args.padding_free = args.padding_free, False
    try:
        with accepting_adapted_heads(PlainDPOTrainer.__module__):
            yield
    finally:
        args.padding_free = padding_free


class _NoReference:
    """A placeholder: without a reference model, TRL's constructor loads one, or adds an adapter."""


class _WithMargins:
    """A collator of TRL that also collates the reward margins of the pairs."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        # The first look at a stream, or at a dataset that is passed to evaluate() later.
        sources = _margin_sources(examples[0], "a dataset")
        for column in sources:
            for example in examples:
                _check_margin(example[column], column, "a pair")
        margins = [reward_margin(example, sources) for example in examples]
        batch = self.collator(examples)
        batch[MARGINS] = torch.tensor(margins, dtype=torch.float32)
        return batch


def _named(**given: Any) -> Iterator[tuple[str, Any]]:
    """Datasets with their names; a dict of datasets gives each under its own key."""
    for name, dataset in given.items():
        yield from dataset.items() if isinstance(dataset, dict) else [(name, dataset)]


def _check_margins(dataset: Any, name: str) -> None:
    """Raise ValueError for a pair without a reward margin; a stream is checked in the collator."""
    columns = getattr(dataset, "column_names", None)
    if not columns:
        return
    sources = _margin_sources(columns, f"dataset {name!r}")
    if isinstance(dataset, Dataset):
        for column in sources:
            for row, value in enumerate(dataset[column]):
                _check_margin(value, column, f"dataset {name!r}, row {row}")


def _margin_sources(columns: Iterable[str], what: str) -> tuple[str, ...]:
    sources = margin_columns(list(columns))
    if not sources:
        raise ValueError(
            f"the objective needs reward margins, but {what} has no column reward_margin or "
            f"margin, nor score_chosen and score_rejected; found {', '.join(columns)}; "
            "`prefkern margins` writes one"
        )
    return sources


def _check_margin(value: Any, column: str, what: str) -> None:
    if not is_number(value):
        raise ValueError(f"{what}: no margin ({column!r} is {value!r})")


def _with_trls_rewards(out: PreferenceOutput, beta: float) -> PreferenceOutput:
    assert out.ref_chosen_logps is not None and out.ref_rejected_logps is not None
    return replace(
        out,
        chosen_rewards=beta * (out.chosen_logps.detach() - out.ref_chosen_logps),
        rejected_rewards=beta * (out.rejected_logps.detach() - out.ref_rejected_logps),
    )
