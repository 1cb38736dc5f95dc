"""What a model does to its raw logits: read off its config, and held once against the model itself.

A scale (Cohere, Granite, Falcon-H1, ...) and a tanh softcap (Gemma 2, ...) follow the head. Names do
not settle which: Granite divides by `logits_scaling`, HyperCLOVA X multiplies by it and MiniCPM3
applies it before the head. So each reading is held once per model against the model: a forward of
four tokens in which the head returns a known ramp of float32 logits up to +-100, and the model's
output has to be that ramp transformed. If no reading explains it, that is an error, never a wrong
number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefkern.models import heads
from prefkern.models.calls import replaced_forward, uncalled, undisturbed, without_cache
from prefkern.models.heads import find_head

# config name -> the factors that some family applies to its raw logits for a value s of it
_SCALES: dict[str, Callable[[float], tuple[float, ...]]] = {
    "logit_scale": lambda s: (s, 1.0),
    "lm_head_multiplier": lambda s: (s, 1.0),
    "output_multiplier": lambda s: (s, 1.0),
    "logits_scaling": lambda s: (1 / s, s, 1.0),
}
_WORDS = "unpadded_vocab_size"
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# Each of the probe's four tokens gets a ramp of logits from -p to p, backwards for negative p.
_PROBE_PEAKS = (100.0, -100.0, 10.0, 1.0)


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to its raw logits z: `z * logit_scale`, then `softcap * tanh(z / softcap)`.

    `words` is how many of the head's words it does that to and keeps; None: all of them.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    words: int | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        scaled = raw[..., : self.words] * self.logit_scale
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


def head_transform(model: nn.Module) -> HeadTransform:
    """The model's logits transform: read off its config, held once against the model itself.

    Raises ValueError if no reading of the config explains what the model does to its logits.
    """
    base, head = find_head(model)
    candidates = candidate_transforms(base.config)
    probed = base.__dict__.setdefault("_prefkern_head_transform", {})
    # A config edited since is probed again, and so is a head whose adapters were switched.
    key = (candidates, heads.reading(head))
    if key not in probed:
        probed[key] = _probe(model, base, head, candidates)
    return probed[key]


def candidate_transforms(config: Any) -> tuple[HeadTransform, ...]:
    """Every transform that some family means by this config's names, the likeliest first."""
    text_config = config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(text_config, name, None)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and value else None

    scales = [
        readings(value) for name, readings in _SCALES.items() if (value := number(name)) is not None
    ]
    softcaps = [value for name in _SOFTCAPS if (value := number(name)) is not None]
    unpadded = number(_WORDS)
    words = () if unpadded is None else (int(unpadded),)
    transforms = []
    for factors, softcap, count in itertools.product(
        itertools.product(*scales), (*softcaps, None), (*words, None)
    ):
        transforms.append(HeadTransform(math.prod(factors), softcap, count))
    return tuple(dict.fromkeys(transforms))


def _plain_tokens(config: Any, count: int) -> list[int]:
    """Words to which a config gives no meaning of their own, such as to stand for an image."""
    text_config = config.get_text_config()
    values = [*vars(config).values(), *vars(text_config).values()]
    named = {value for value in values if isinstance(value, int)}
    words = range(min(count + len(named), text_config.vocab_size))
    plain = [word for word in words if word not in named] or [0]
    return [plain[i % len(plain)] for i in range(count)]


def _is_finite(weight: Tensor) -> bool:
    return not weight.is_floating_point() or bool(weight.isfinite().all())


def _virtual_tokens(model: nn.Module) -> int:
    """How many positions a prompt-learning adapter may put before the tokens."""
    configs = [
        config
        for module in model.modules()
        for config in getattr(module, "peft_config", {}).values()
    ]
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs), default=0)


def _probe(
    model: nn.Module,
    base: Any,
    head: Any,
    candidates: tuple[HeadTransform, ...],
) -> HeadTransform:
    """The candidate that explains the model's logits best, if it explains them."""
    embeddings = base.get_input_embeddings()
    device = embeddings.weight.device
    ids = torch.tensor([_plain_tokens(base.config, len(_PROBE_PEAKS))], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    seen: dict[str, Tensor] = {}

    with undisturbed(model, device):

        def probing_head(hidden: Tensor) -> Tensor:
            raw = original(hidden)
            # Whatever the head's class, it has to compute what we take it to compute.
            seen["raw"] = raw
            read = heads.read(head, hidden)
            seen["linear"] = F.linear(hidden, read.weight, read.bias)
            if read.lora_hidden is not None and read.lora_weight is not None:
                term = F.linear(read.lora_hidden, read.lora_weight.to(read.lora_hidden.dtype))
                seen["linear"] = seen["linear"] + term
            # Prompt-learning adapters add positions, hence the modulo.
            peaks = torch.tensor(_PROBE_PEAKS, device=raw.device)
            peaks = peaks[torch.arange(raw.shape[-2], device=raw.device) % len(peaks)]
            ramp = peaks[:, None] * torch.linspace(-1, 1, raw.shape[-1], device=raw.device)
            # In float32 whatever the model's dtype: in bf16 a factor of 1.05 would pass as rounding.
            seen["ramp"] = ramp.expand_as(raw)
            # A copy, since some models transform their logits in place.
            return seen["ramp"].clone()

        with replaced_forward(head, probing_head) as original:
            logits = model(**without_cache(base, inputs)).logits
    if not seen:
        raise uncalled(base, head)

    raw, linear, ramp = seen["raw"].float(), seen["linear"].float(), seen["ramp"]
    if not raw.isfinite().all():
        weights = (name for name, weight in model.named_parameters() if not _is_finite(weight))
        found = next(weights, None)
        raise ValueError(
            f"the logits of {type(base).__name__} on a short input are not finite"
            + (", though its weights are" if found is None else f": {found} holds nan or inf")
        )
    # Two ways to one product, each rounded in the head's dtype.
    rounding = max(8 * torch.finfo(seen["raw"].dtype).eps, 1e-5)
    if not (raw - linear).abs().max() <= rounding * raw.abs().max():
        raise ValueError(
            f"the output head of {type(base).__name__} ({type(head).__name__}) does not compute "
            "hidden @ weight.T + bias (and a LoRA term): largest difference "
            f"{(raw - linear).abs().max().item():.3g} at logits up to {raw.abs().max().item():.3g}"
        )
    positions, virtual = ramp.shape[-2], _virtual_tokens(model)
    if positions not in (len(_PROBE_PEAKS), len(_PROBE_PEAKS) + virtual):
        raise ValueError(
            f"{type(base).__name__} calls its output head on {positions} positions for "
            f"{len(_PROBE_PEAKS)} tokens; one a token is needed, as in a causal LM"
        )
    fitting = [each for each in candidates if each(ramp).shape == logits.shape]
    if not fitting:
        raise ValueError(
            f"{type(base).__name__} returns logits of shape {list(logits.shape)} where its head "
            f"gives {list(ramp.shape)}"
        )
    # The model rounds at each of its few steps, in the dtype of its logits.
    tolerance = max(8 * torch.finfo(logits.dtype).eps, 1e-5)
    logits = logits.float()

    def error(candidate: HeadTransform) -> float:
        expected = candidate(ramp)
        return ((logits - expected).abs() / (expected.abs() + 1e-4)).max().item()

    # The closest, not the first that passes: in bf16 a scale of 1.02 and its inverse both might.
    closest = min(fitting, key=error)
    if error(closest) <= tolerance:
        return closest
    expected = fitting[0](ramp)
    worst = int((logits - expected).abs().argmax())
    raw_logit = ramp[..., : expected.shape[-1]].flatten()[worst].item()
    raise ValueError(
        f"the logits of {type(base).__name__} are not explained by its config: "
        f"{fitting[0]} was read (and {len(candidates) - 1} other readings tried), which turns a "
        f"raw logit of {raw_logit:.4g} into {expected.flatten()[worst].item():.4g}, and the model "
        f"turns it into {logits.flatten()[worst].item():.4g}"
    )
