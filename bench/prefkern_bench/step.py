"""The suite "step": forward, DPO loss, backward and AdamW of a whole model.

The models are real configs with random weights, so nothing is downloaded. Task "lora" trains
adapters on all linear layers of a frozen model. Task "full" trains every parameter, the head
included. Half of each row is prompt. The reference's log-probs are computed beforehand, and each
provider takes them. Liger cannot, so it gets the reference's hidden states and pays for their
product. "eager" is the model's own forward: logits of every token, prompts included.

The learning rate is 0, so every provider sees the same weights. Errors are those of the sequences'
log-probs against float64, computed from the model's hidden states. Operations count all matrix
products of the step except those inside the attention operator. Memory is the peak beyond weights,
optimiser state and batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prefkern_bench.group import Group, Settings
from prefkern_bench.models import Model
from prefkern_bench.problem import IGNORE_INDEX, Problem, dpo_loss, token_logps
from prefkern_bench.providers import Eager, Provider, label_logps
from prefkern_bench.report import Row

TASKS = ("lora", "full")


def step_groups(model: Model, settings: Settings) -> Iterator[Group]:
    """A group for each task."""
    for task in TASKS:
        if task not in settings.tasks:
            continue
        trained = TrainedModel(model, task, settings)
        yield Group(
            blank=lambda provider, task=task: Row("step", model.name, task, provider, model.tokens),
            run=trained.step,
            errors=trained.record_errors,
        )
        del trained


class TrainedModel:
    """A model with its optimiser, a batch, and the batch's reference."""

    def __init__(self, model: Model, task: str, settings: Settings) -> None:
        device = settings.device
        self.model = build(model, task, settings.dtype, device)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=0.0)
        # A first step, so that the optimiser's state exists before any measurement.
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

        generator = torch.Generator(device).manual_seed(0)
        size = (2 * model.pairs, model.length)
        vocab_size = model.config["vocab_size"]
        self.ids = torch.randint(vocab_size, size, generator=generator, device=device)
        labels = self.ids.roll(-1, 1)
        labels[:, : model.length // 2 - 1] = IGNORE_INDEX
        labels[:, -1] = IGNORE_INDEX
        with torch.no_grad():
            hidden = self.hidden()
        weight = self.head().detach()
        scored = labels != IGNORE_INDEX
        logps = token_logps(hidden[scored], weight, labels[scored])
        self.true_sums = logps.view(len(labels), -1).sum(-1)
        self.problem = Problem(hidden, weight, labels, None, hidden, weight, self.true_sums.float())

    def hidden(self) -> Tensor:  # (2B, T, H)
        return self.plain_model().get_decoder()(self.ids, use_cache=False).last_hidden_state

    def head(self) -> Tensor:  # (V, H)
        return self.plain_model().get_output_embeddings().weight

    def plain_model(self) -> Any:
        """The transformers model, with its adapters inside if there are any."""
        unwrap = getattr(self.model, "get_base_model", None)
        return self.model if unwrap is None else unwrap()

    def step(self, provider: Provider) -> Tensor:  # (2B,)
        if isinstance(provider, Eager):
            loss, sums = self.logits_loss()
        else:
            # A tied head is the embedding itself, whose gradient is the sum of both uses.
            loss, sums = provider.loss(
                self.problem._replace(hidden=self.hidden(), weight=self.head())
            )
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return sums.detach()

    def logits_loss(self) -> tuple[Tensor, Tensor]:
        """The model's own forward: logits of all tokens; only the scored ones go on to the loss."""
        problem = self.problem
        scored = problem.labels != IGNORE_INDEX
        logits = self.plain_model()(self.ids, use_cache=False).logits[scored]
        logps = label_logps(logits, problem.labels[scored])
        sums = logps.view(len(problem.labels), -1).sum(-1)
        assert problem.ref_sums is not None
        return dpo_loss(sums, problem.ref_sums), sums

    def record_errors(self, row: Row, sums: Tensor) -> None:
        error = (sums.double() - self.true_sums).abs()
        row.sum_logp_error, row.sum_logp_mean_error = error.max().item(), error.mean().item()


def build(model: Model, task: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with random weights; for "lora" it is frozen and has adapters that are not zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model.kind, **model.config)
    with device:  # a GPU draws a billion random numbers quickly
        built = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if task == "full":
        return built.train()
    from peft import LoraConfig, get_peft_model

    lora = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(built, lora).train()
