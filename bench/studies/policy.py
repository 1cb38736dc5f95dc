"""A causal LM of which LoRA trains the last layers; what the layers below give is computed once.

Frozen layers give the same hidden states for a text in every step and in every run. So `Rows`
carries the states that enter the first trained layer, and a step runs the trained layers, the last
norm and prefkern's loss. With 4 of SmolLM2's 30 layers a step takes about half the
time of one through all of them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import prefkern

IGNORED = -100
RANK, ALPHA = 16, 32
ROWS_AT_A_TIME = 32  # of rows that are only scored


@dataclass(frozen=True)
class Rows:
    """Texts as tokens, padded on the right, and the states that enter the first trained layer."""

    states: Tensor  # (S, T, H)
    labels: Tensor  # (S, T), aligned: labels[t] follows token t; IGNORED where not scored

    @property
    def lengths(self) -> Tensor:  # (S,) scored tokens
        return (self.labels != IGNORED).sum(-1)

    def take(self, rows: Tensor, more: int = 0) -> Rows:
        """Some rows, up to the last column that one of them scores, and `more` columns."""
        labels = self.labels[rows]
        scored = (labels != IGNORED).any(0).nonzero()
        # At least one: a response may be empty.
        width = (int(scored.max()) if len(scored) else 0) + 1 + more
        return Rows(self.states[rows, :width], labels[:, :width])


class Policy:
    """A model with an adapter on its last layers."""

    def __init__(self, path: str, layers: int, device: torch.device) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.tokenizer.padding_side = "left"  # for generation
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.device = device
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device)
        self.first = model.config.num_hidden_layers - layers
        self._adapt(model)

    def _adapt(self, model: Any) -> None:
        trained = {id(m) for layer in model.model.layers[self.first :] for m in layer.modules()}
        linear = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and id(module) in trained
        ]
        lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=linear, task_type="CAUSAL_LM")
        self.model = get_peft_model(model, lora).eval()
        base: Any = self.model.get_base_model()
        self.head: nn.Linear = base.lm_head
        self._decoder: Any = base.model
        # The same modules, with fewer layers in the list.
        self._tail = copy.copy(self._decoder)
        self._tail._modules = {
            **self._decoder._modules,
            "layers": nn.ModuleList(self._decoder.layers[self.first :]),
        }

    def trained(self) -> list[nn.Parameter]:
        return [each for each in self.model.parameters() if each.requires_grad]

    def reset(self, seed: int) -> None:
        """A new adapter, drawn from the seed; it changes nothing until it is trained."""
        torch.manual_seed(seed)
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module.reset_lora_parameters("default", True)

    def merge(self) -> None:
        """Make what the adapter has learned part of the model, and begin with a new adapter."""
        self._adapt(self.model.merge_and_unload())

    def adapter(self) -> dict[str, Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters() if p.requires_grad}

    def load_adapter(self, adapter: dict[str, Tensor]) -> None:
        self.model.load_state_dict(adapter, strict=False)

    @torch.no_grad()
    def rows(self, texts: list[tuple[str, str]], end: bool) -> Rows:
        """Rows of prompts and responses, of which the responses are scored.

        Args:
            texts: prompt and response of each row.
            end: whether a response ends with the end-of-sequence token, which is scored too.
        """
        ids, scored = [], []
        for prompt, response in texts:
            # Apart, so that the response's first token does not depend on the prompt's last one.
            parts = [
                self.tokenizer(t, add_special_tokens=False).input_ids for t in (prompt, response)
            ]
            ids.append(parts[0] + parts[1] + [self.tokenizer.eos_token_id] * end)
            scored.append(len(parts[0]))
        width = max(map(len, ids))
        tokens = torch.full((len(ids), width), self.tokenizer.pad_token_id)
        labels = torch.full((len(ids), width), IGNORED)
        for row, (numbers, start) in enumerate(zip(ids, scored, strict=True)):
            tokens[row, : len(numbers)] = torch.tensor(numbers)
            labels[row, start - 1 : len(numbers) - 1] = torch.tensor(numbers[start:])
        states = [
            # No mask: padding is on the right, and attention is causal.
            self._decoder(part, output_hidden_states=True, use_cache=False).hidden_states[
                self.first
            ]
            for part in tokens.to(self.device).split(ROWS_AT_A_TIME)
        ]
        return Rows(torch.cat(states), labels.to(self.device))

    def cut(self, texts: list[str], tokens: int) -> list[str]:
        """The first tokens of each text, as text."""
        numbers = [self.tokenizer(t, add_special_tokens=False).input_ids[:tokens] for t in texts]
        return [self.tokenizer.decode(row) for row in numbers]

    def hidden(self, rows: Rows) -> Tensor:  # (S, T, H)
        """The last layer's output, normed: what the head reads."""
        return self._tail(inputs_embeds=rows.states, use_cache=False).last_hidden_state

    @torch.no_grad()
    def sums(self, rows: Rows) -> Tensor:  # (S,)
        """Summed log-probs of the responses."""
        found = []
        for chosen in torch.arange(len(rows.labels), device=self.device).split(ROWS_AT_A_TIME):
            some = rows.take(chosen)
            logps = prefkern.linear_logprobs(self.hidden(some), self.head.weight, some.labels)
            found.append(logps.sum(-1))
        return torch.cat(found)

    @torch.no_grad()
    def generate(
        self, prompts: list[str], tokens: int, seed: int | None = None, end: bool = True
    ) -> tuple[list[str], list[int]]:
        """Continuations by the model's own `generate`, and their lengths in tokens.

        Args:
            prompts: one for each continuation.
            tokens: their greatest length.
            seed: of the draws; None: greedy.
            end: whether a continuation may end before.
        """
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, add_special_tokens=False
        )
        if seed is not None:
            torch.manual_seed(seed)
        output: Any = self.model.generate(
            **inputs.to(self.device),
            do_sample=seed is not None,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            max_new_tokens=tokens,
            min_new_tokens=None if end else tokens,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = output[:, inputs.input_ids.shape[1] :]
        ended = (new == self.tokenizer.eos_token_id).long().cumsum(-1) > 0
        lengths = (~ended).sum(-1)
        texts = [
            self.tokenizer.decode(row[:length], skip_special_tokens=True)
            for row, length in zip(new, lengths.tolist(), strict=True)
        ]
        return texts, lengths.tolist()
