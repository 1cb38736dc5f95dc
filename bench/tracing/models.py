"""Calls on a transformer: `token_logprobs` and `preference_outputs`, padded, packed, shared, adapted.

A model is built and called once on the CPU, where its probes run: they compare numbers, which a
fake tensor has not. Then its weights become fake tensors of the GPU, and the call is watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

import prefkern
from prefkern.data.collate import PreferenceCollator
from prefkern.models import varlen
from prefkern.objectives import build
from tracing.cases import SELECT, Case
from tracing.machine import DEVICE

# What the model's docstrings promise to read of a batch: the range of ids and mask, and of a packed
# row its bounds and prefixes, which transformers and the paths need as Python numbers.
CHECKED = {"prefkern/models/text_inputs.py:_check_values (tolist)": 1}
PACKED = {**CHECKED, "prefkern/models/packing.py:_inputs (tolist)": 1}
SHARED = {**PACKED, "prefkern/models/packing.py:_checked_prefixes (tolist)": 1}
# Pairs, and scored tokens of a pair.
B, SCORED = 2, 19
SIZES = {
    "vocab_size": 32000,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def _model(family: str, adapts_head: bool = False, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    if adapts_head:
        from peft import LoraConfig, get_peft_model

        names = ["q_proj", "lm_head"]
        model = get_peft_model(model, LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    return model.to(torch.bfloat16)


def _batch(layout: str, device: torch.device) -> dict[str, Tensor]:
    """A batch on a device: of numbers on the CPU, of nothing but shapes on the GPU."""
    collate = PreferenceCollator(
        0, padding_free=layout != "padded", share_prompt=layout == "shared"
    )
    rows = [{"prompt_ids": [1] * 9, "chosen_ids": [1] * 12, "rejected_ids": [1] * 7}] * B
    with unset_fake_temporarily():
        batch = collate(rows)
    if device.type == "cpu":
        return batch
    return {name: torch.empty(x.shape, dtype=x.dtype, device=device) for name, x in batch.items()}


def _reads(name: str) -> dict[str, list[Any]]:
    """What a packed row's inputs read: bounds and prefixes."""
    if "packed" not in name and "shared" not in name:
        return {}
    batch = _batch("packed" if "packed" in name else "shared", torch.device("cpu"))
    reads = {"prefkern/models/packing.py:_inputs": batch["cu_seqlens"].tolist()}
    if "prefixes" in batch:
        reads["prefkern/models/packing.py:_checked_prefixes"] = batch["prefixes"].tolist()
    return reads


def _total(name: str) -> int:
    """Tokens of the batch's rows."""
    if "shared" in name:
        return B * (SCORED + 10)
    return B * (SCORED + 18) if "packed" in name else 2 * B * 21


def _preference(layout: str, **options: Any) -> Callable[[nn.Module, torch.device], None]:
    def call(model: nn.Module, device: torch.device) -> None:
        fused = prefkern.FusedPreferenceLoss(build("adadpo"), **options)
        sums = torch.zeros(2 * B, device=device)
        out = prefkern.preference_outputs(model, _batch(layout, device), fused, ref_logps=sums)
        out.loss.backward()

    return call


def _tokens(model: nn.Module, device: torch.device) -> None:
    batch = _batch("padded", device)
    logps = prefkern.token_logprobs(model, batch["input_ids"], batch["attention_mask"])
    logps.sum().backward()


@contextlib.contextmanager
def _kernels_of_attention() -> Iterator[None]:
    """Packed rows take torch's kernel: its probe compares numbers."""
    varlen._kernel_for.cache_clear()
    with mock.patch.object(varlen, "_problem", lambda *_: None):
        yield
    varlen._kernel_for.cache_clear()


def _as_fake(model: nn.Module) -> None:
    """Weights and buffers of the same shapes on the GPU."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device=DEVICE))
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


def model_cases() -> Iterator[Case]:
    for name, family, options, call, waits in (
        ("token_logprobs", "Llama", {}, _tokens, CHECKED),
        ("token_logprobs, tied head, softcap", "Gemma2", {"head_dim": 64}, _tokens, CHECKED),
        ("preference_outputs, padded", "Llama", {}, _preference("padded"), CHECKED),
        ("preference_outputs, packed", "Llama", {}, _preference("packed"), PACKED),
        ("preference_outputs, shared prompts", "Llama", {}, _preference("shared"), SHARED),
        ("preference_outputs, tied head", "Llama", {"tie_word_embeddings": True},
         _preference("padded"), CHECKED),
        ("preference_outputs, LoRA on the head", "Llama", {"adapts_head": True},
         _preference("padded"), CHECKED),
    ):  # fmt: skip
        made: list[nn.Module] = []

        def prepare(
            made: list[nn.Module] = made, family: str = family, options: dict = options,
            call: Callable = call,
        ) -> None:  # fmt: skip
            made[:] = [_model(family, **options)]
            call(made[0], torch.device("cpu"))
            made[0].zero_grad(set_to_none=True)

        def run(made: list[nn.Module] = made, call: Callable = call) -> None:
            if next(made[0].parameters()).device != DEVICE:
                _as_fake(made[0])
            call(made[0], DEVICE)

        yield Case(
            "models", name, run, scored=B * SCORED, total=_total(name), vocab_size=SIZES["vocab_size"],
            reads=_reads(name), context=_kernels_of_attention, waits={SELECT: 1, **waits}, prepare=prepare, pair_losses=int("preference" in name),
        )  # fmt: skip
