"""What trainers on an objective share: its metrics, and its statistics in checkpoints.

Metrics are sums over items (`prefkern.training.metrics`), so that a log holds means over pairs (or
tokens) since the last log, over all ranks. Evaluation gathers values per pair, so that neither a
partial batch nor a repeated pair shifts a mean. If a training step's loss is NaN or infinite, it
raises before the backward and names the cause (`prefkern.loss.nonfinite`). A subclass turns a batch
into a loss; it has its own model, data and reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from prefkern.loss.checks import reference_sums
from prefkern.loss.fused import FusedPreferenceLoss
from prefkern.loss.outputs import PreferenceOutput, UnpairedOutput
from prefkern.models.head_forward import forward_with_head
from prefkern.models.heads import HeadInputs
from prefkern.models.scoring import IGNORE_INDEX
from prefkern.models.transform import head_transform
from prefkern.objectives import KTO, TPO, Objective, UnpairedObjective
from prefkern.training.cards import CardTrainer
from prefkern.training.metrics import NUM_TOKENS, item_values, means, per_item
from prefkern.training.run_state import SinceLastLog, load_objective, save_objective
from prefkern.training.sharing import gathered_once, ranks_a_batch, shares_batches


class ObjectiveTrainer(CardTrainer):
    """CardTrainer with a `loss_fn`; a subclass defines `_preference_outputs`."""

    loss_fn: FusedPreferenceLoss
    # Metrics that are logged as 0 if nothing was scored; others are left out.
    _zero_metrics: tuple[str, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._refuse_unsupported_setups()
        self._train_sums: dict[str, Tensor] = {}
        self._eval_sums: dict[str, Tensor] = {}
        self._resumed: SinceLastLog | None = None
        self._num_tokens = 0
        self.add_callback(_BeginLogs(self))

    def _make_losses(
        self,
        objective: Objective | UnpairedObjective,
        workspace_mb: float | None,
        backend: str | None,
        seed: int | None,
        ld_alpha: float | None = None,
    ) -> None:
        """Make `loss_fn`, and `_sum_fn` for log-prob sums alone; call it before Trainer's __init__.

        `seed` starts the draws of an objective. None for one that was given: it may have drawn
        before.
        """
        given = (IGNORE_INDEX, workspace_mb, backend)
        self.loss_fn = FusedPreferenceLoss(objective, *given, ld_alpha=ld_alpha)
        # The reference's sums go through the policy's own code. KTO takes any number of responses,
        # and in evaluation it does not wait for other ranks. Weights of tokens need pairs.
        sums: Objective | UnpairedObjective = KTO()
        if ld_alpha is not None:
            # No reference, and as many responses as the objective has.
            sums = TPO(tpo_alpha=float(objective.responses == 3))
        self._sum_fn = FusedPreferenceLoss(sums, *given, ld_alpha=ld_alpha).eval()
        for module in self.loss_fn.modules():
            if seed is not None and hasattr(module, "manual_seed"):
                module.manual_seed(seed)  # pyright: ignore[reportCallIssue]

    def _refuse_unsupported_setups(self) -> None:
        needs_kls = getattr(self.loss_fn.objective, "needs_kls", False)
        if needs_kls and self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            # The reference's head is freed when its forward ends.
            raise ValueError("TDPO is not supported under FSDP1: use FSDP2")

    def _preference_outputs(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[PreferenceOutput | UnpairedOutput, Tensor]:
        """The batch's outputs, and the mean over its items to differentiate."""
        raise NotImplementedError(f"{type(self).__name__} does not define _preference_outputs")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The batch's share of the mean over `num_items_in_batch` pairs; None: its own mean."""
        # A gradient scaler skips such a step and lowers its scale.
        self.loss_fn.on_nonfinite = "warn" if self.args.fp16 else "raise"
        outputs, loss = self._preference_outputs(model, inputs)
        for name, values in self._item_values(outputs, inputs).items():
            add_to(self._train_sums, name, values.sum(0))
        loss = self._share(loss, len(outputs.losses), num_items_in_batch)
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
        self.loss_fn.on_nonfinite = "warn"
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs, loss = self._preference_outputs(model, inputs)
        values = {"loss": per_item(outputs.losses), **self._item_values(outputs, inputs)}
        gathered = self._gathered(torch.stack([*values.values()], dim=1))
        for name, total in zip(values, gathered.sum(0), strict=True):
            add_to(self._eval_sums, name, total)
        return loss, None, None

    def _item_values(
        self, outputs: PreferenceOutput | UnpairedOutput, inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Each metric of a batch, as `prefkern.training.metrics` returns them."""
        return item_values(outputs, self.loss_fn.objective, inputs.get("cu_seqlens"))

    def _gathered(self, values: Tensor) -> Tensor:  # (B, metrics, 2)
        """Values of all ranks' pairs, without the pairs that pad the ranks' last batch."""
        return gathered_once(values, self.accelerator)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop, with means over pairs in place of its mean over batches."""
        self._eval_sums = {}
        return super().evaluation_loop(*args, **kwargs)

    def _evaluated(self, predictions: Any) -> dict[str, float]:
        return means(self._eval_sums, self._zero_metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; a training log gets the metrics since the last one. Called on every rank."""
        if self._train_sums and ("loss" in logs or "train_loss" in logs):
            tokens = self._train_sums.pop(NUM_TOKENS, None)
            names = list(self._train_sums)
            sums = torch.stack([*self._train_sums.values()])
            if not shares_batches(self.accelerator):
                # The weights of means have a pair as often as their numerators.
                sums = self.accelerator.reduce(sums, "sum")
                # Not with the others: a sum in float32 is not exact beyond 2**24 tokens.
                if tokens is not None:
                    tokens = self.accelerator.reduce(tokens, "sum") // ranks_a_batch(
                        self.accelerator
                    )  # pyright: ignore[reportOperatorIssue]
            totals = dict(zip(names, sums, strict=True))
            logs.update(means(totals, self._zero_metrics))
            if tokens is not None:
                self._num_tokens += int(tokens[0].item())
                logs[NUM_TOKENS] = self._num_tokens
            self._train_sums = {}
        super().log(logs, start_time)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        writes = self.args.should_save
        if writes:
            save_objective(self.loss_fn.objective, output_dir)
        steps = self.state.global_step - self._globalstep_last_logged
        unlogged = SinceLastLog(steps, self._tr_loss, self._train_sums)
        unlogged.save(output_dir, self.accelerator, self.loss_fn.objective, writes)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_objective(self.loss_fn.objective, checkpoint)
            self._resumed = SinceLastLog.load(checkpoint, self.accelerator)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None:
            load_objective(self.loss_fn.objective, best, otherwise="stay those of the last step")

    def _begin_logs(self) -> None:
        """Start with what the checkpoint had not logged yet, or with nothing."""
        resumed, self._resumed = self._resumed, None
        self._train_sums = {} if resumed is None else resumed.sums
        logged = (log[NUM_TOKENS] for log in reversed(self.state.log_history) if NUM_TOKENS in log)
        self._num_tokens = int(next(logged, 0))
        if resumed is not None:
            self._globalstep_last_logged -= resumed.steps
            self._tr_loss += resumed.loss
            # The run's mean loss is over this run's steps only.
            self._total_loss_scalar -= resumed.loss.item()


class _BeginLogs(TrainerCallback):
    """Calls `_begin_logs` once Trainer has reset its logged loss."""

    def __init__(self, trainer: ObjectiveTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._begin_logs()


def add_to(sums: dict[str, Tensor], name: str, total: Tensor) -> None:  # (2,)
    """Add to a metric's numerator and weight."""
    sums[name] = sums[name] + total if name in sums else total


def sums_alone(sum_fn: FusedPreferenceLoss, count: int, device: torch.device) -> dict[str, Tensor]:
    """The keywords of `_sum_fn` for the log-prob sums of S responses alone."""
    if isinstance(sum_fn.objective, Objective):
        return {}
    zeros = torch.zeros(count, device=device)
    return {"ref_logps": zeros, "desirable": zeros.bool(), "mismatched_log_ratios": zeros}


def sums_of(outputs: PreferenceOutput | UnpairedOutput, responses: int = 2) -> Tensor:
    """The log-prob sums of what `_sum_fn` returned, of pairs without their gold responses."""
    if isinstance(outputs, UnpairedOutput):
        return outputs.logps[: reference_sums(len(outputs.logps), responses)]
    return torch.cat([outputs.chosen_logps, outputs.rejected_logps])


def reference_states(
    reference: nn.Module,
    policy: nn.Module,
    inputs: dict[str, Any],
    labels: Tensor,  # (2B, T), aligned
    is_packed: bool = False,
    copies_head: bool = False,
) -> dict[str, Any]:
    """The reference's hidden states and head, for objectives that compare distributions (TDPO).

    Call it without gradients. `copies_head`: the head's memory is freed, or gets other values, when
    the reference's forward ends. Raises ValueError if the two models transform their logits
    differently.
    """

    def kept(values: Tensor) -> Tensor:
        return values.detach().clone() if copies_head else values.detach()

    if head_transform(reference) != head_transform(policy):
        raise ValueError(
            "policy and reference transform their logits differently "
            f"({head_transform(policy)} and {head_transform(reference)}): their distributions "
            "cannot be compared in one pass"
        )

    def keep(head: HeadInputs) -> tuple[dict[str, Any], Tensor]:
        if head.adapter():
            raise ValueError("LoRA on the output head of the reference is not supported for TDPO")
        states = {
            "ref_hidden": head.of_tokens(labels, is_packed).hidden.detach(),
            "ref_weight": kept(head.weight),
            "ref_bias": None if head.bias is None else kept(head.bias),
        }
        return states, head.hidden

    states, _ = forward_with_head(reference, inputs, keep)
    return states
