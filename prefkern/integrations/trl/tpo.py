"""TRL's experimental TPOTrainer without logits, and with AdaDPO's coefficients.

TRL still makes the batch (chosen, rejected and gold rows) and does everything around a step. The
step itself is `prefkern.training.objective_trainer`'s, as in `prefkern.integrations.trl.dpo`: the
loss is the mean over the pairs of an optimiser step, and metrics have TRL's names and values.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from trl.experimental.tpo import TPOConfig
from trl.experimental.tpo import TPOTrainer as PlainTPOTrainer

from prefkern.integrations.trl.batches import OnTRL, scored, tag_names
from prefkern.keywords import current_names
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.models.adapters import check_unmerged
from prefkern.models.heads import find_head
from prefkern.objectives import TPO, Adaptive
from prefkern.training.config import refuse_dispatched_rows, refuse_split_sequences
from prefkern.training.metrics import per_item
from prefkern.training.options import refuse_batches_by_length

# The losses that take an argument of TRL.
_OF_LOSSES = {"label_smoothing": ("sigmoid", "tpo-l"), "tpo_l_gamma": ("tpo-l",)}


class TPOTrainer(OnTRL, PlainTPOTrainer):
    """`trl.experimental.tpo.TPOTrainer`, with the log-probs in tiles.

    Args:
        model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_metrics,
            callbacks, optimizers, peft_config: as in TRL. The loss is the one that `args` describe.
        adaptive: AdaDPO's coefficients, in policy space; None: TRL's loss. With them rewards are
            the coefficients in force times what they multiply.
        workspace_mb, backend: as in `prefkern.linear_logprobs`.

    Raises ValueError for an argument of TRL that would have no effect, and names it; also for a
    model whose head cannot be read. Raises TypeError if `args` is not a TPOConfig.
    """

    args: TPOConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    # compute_loss counts the pairs of a step itself: Trainer must not divide by its batches too.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: TPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        *,
        adaptive: Adaptive | None = None,
        workspace_mb: float | None = None,
        backend: str | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = TPOConfig(f"{name.split('/')[-1]}-TPO")
        if not isinstance(args, TPOConfig):
            raise TypeError(f"args must be a trl TPOConfig, got {type(args).__name__}")
        if isinstance(args.model_init_kwargs, dict):
            args.model_init_kwargs = current_names(args.model_init_kwargs)
        objective = _objective(args, adaptive)
        self._tag_names = tag_names(objective)
        self._name = objective.title
        self._make_losses(objective, workspace_mb, backend, args.seed)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        self._sequences_an_item = objective.responses
        find_head(self.model)  # pyright: ignore[reportArgumentType]
        check_unmerged(self.model)  # pyright: ignore[reportArgumentType]

    @property
    def _has_means(self) -> bool:
        """Whether TRL's log-probs of a response are per token."""
        return self.loss_fn.objective.score == "mean_log_prob"  # pyright: ignore[reportAttributeAccessIssue]

    def _preference_outputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[PreferenceOutput, Tensor]:
        self.loss_fn.train(model.training)
        outputs, zero, _ = scored(model, inputs, self.loss_fn, with_router=False, return_stats=True)
        objective: Any = self.loss_fn.objective
        if objective.adaptive is None:
            chosen, rejected = self._trls_logps(outputs)
            beta = self.args.beta
            outputs = replace(
                outputs, chosen_rewards=beta * chosen, rejected_rewards=beta * rejected
            )
        self._count_tokens(model, inputs)
        return outputs, outputs.loss + zero

    def _trls_logps(self, outputs: PreferenceOutput) -> tuple[Tensor, Tensor]:  # (B,) each
        chosen, rejected = outputs.chosen_logps.detach(), outputs.rejected_logps.detach()
        if not self._has_means:
            return chosen, rejected
        lengths = outputs.chosen_lengths.clamp(min=1), outputs.rejected_lengths.clamp(min=1)
        return chosen / lengths[0], rejected / lengths[1]

    def _item_values(
        self, outputs: PreferenceOutput | UnpairedOutput, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        assert isinstance(outputs, PreferenceOutput)
        values = super()._item_values(outputs, inputs)
        chosen, rejected = self._trls_logps(outputs)
        return {**values, "logps/chosen": per_item(chosen), "logps/rejected": per_item(rejected)}

    def _set_signature_columns_if_needed(self) -> None:
        PlainTPOTrainer._set_signature_columns_if_needed(self)


def _objective(args: TPOConfig, adaptive: Adaptive | None) -> TPO:
    """The objective that TRL's arguments describe. Raises ValueError for one without effect."""
    defaults = {name: field.default for name, field in TPOConfig.__dataclass_fields__.items()}
    for name, why in {
        "torch_compile": "is not supported yet",
        "label_smoothing_factor": "has no effect on preference pairs",
    }.items():
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"args.{name} is {getattr(args, name)!r}, which {why}; leave it out")
    refuse_batches_by_length(args)
    refuse_split_sequences(args, "cp_size", "sp_size")
    refuse_dispatched_rows(args)
    for name, losses in _OF_LOSSES.items():
        value = getattr(args, name)
        if value != defaults[name] and args.loss_type not in losses:
            raise ValueError(
                f"args.{name} is {value!r}, but args.loss_type is {args.loss_type!r}; it is an "
                f"option of {', '.join(losses)}"
            )
    gamma = {"tpo_l_gamma": args.tpo_l_gamma} if args.loss_type == "tpo-l" else {}
    return TPO(
        args.beta,
        args.loss_type,  # pyright: ignore[reportArgumentType]
        label_smoothing=args.label_smoothing,
        tpo_alpha=args.tpo_alpha,
        token_mean=True,
        adaptive=adaptive,
        **gamma,
    )
