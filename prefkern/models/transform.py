"""What a model does to its raw logits: read from its config, then checked against the model itself.

After the head, some models scale the logits (Cohere, Granite, Falcon-H1, ...) or apply a tanh
softcap (Gemma 2, ...). The names in a config do not say which. Granite divides by `logits_scaling`,
HyperCLOVA X multiplies by it, and MiniCPM3 applies it before the head. So each candidate is checked
once per model by a forward of four tokens. In it the head returns a known ramp of float32 logits up
to +-100, and the model's output must be the transformed ramp. If no candidate explains the output,
that is an error, never a wrong number.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefkern.models import heads
from prefkern.models.calls import replaced_forward, uncalled, undisturbed, without_cache
from prefkern.models.heads import find_head
from prefkern.ops import shards

# Name in the config -> the factors by which some family multiplies its raw logits for its value s.
_SCALES: dict[str, Callable[[float], tuple[float, ...]]] = {
    "logit_scale": lambda s: (s, 1.0),
    "lm_head_multiplier": lambda s: (s, 1.0),
    "output_multiplier": lambda s: (s, 1.0),
    "logits_scaling": lambda s: (1 / s, s, 1.0),
}
_VOCAB_SIZE = "unpadded_vocab_size"
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")

# The inputs of an encoder-decoder that its head's logits are of.
DECODER_IDS = "decoder_input_ids"
# The attribute of a model that keeps what probes found.
_PROBED = "_prefkern_head_transform"
# Each of the probe's four tokens gets a ramp of logits from -p to p; for negative p it falls.
_PROBE_PEAKS = (100.0, -100.0, 10.0, 1.0)


@dataclass(frozen=True)
class HeadTransform:
    """What a model does to its raw logits z: `z * logit_scale`, then `softcap * tanh(z / softcap)`.

    The model keeps the logits of the first `vocab_size` vocabulary entries; None: of all entries.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        scaled = raw[..., : self.vocab_size] * self.logit_scale
        if self.softcap is None:
            return scaled
        return self.softcap * torch.tanh(scaled / self.softcap)


def head_transform(model: nn.Module, with_encoder: bool = False) -> HeadTransform:
    """The model's logits transform: read from its config, checked once against the model itself.

    Raises ValueError if no reading of the config explains what the model does to its logits, and
    for an encoder-decoder unless `with_encoder`.
    """
    base, head = find_head(model, with_encoder)
    candidates = candidate_transforms(base.config)
    probed = base.__dict__.setdefault(_PROBED, {})
    # After an edit of the config, or with other adapters on the head, the model is probed again.
    key = (candidates, heads.reading(head))
    if key not in probed:
        probed[key] = _probe(model, base, head, candidates)
    return probed[key]


def forget_transform(model: nn.Module) -> None:
    """Have the model probed again, as where other ranks have not probed it and probes are collective."""
    find_head(model)[0].__dict__.pop(_PROBED, None)


def candidate_transforms(config: Any) -> tuple[HeadTransform, ...]:
    """Every transform that the names in this config mean in some family, the likeliest first."""
    text_config = config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(text_config, name, None)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if is_number and value else None

    scales = [
        readings(value) for name, readings in _SCALES.items() if (value := number(name)) is not None
    ]
    softcaps = [value for name in _SOFTCAPS if (value := number(name)) is not None]
    unpadded = number(_VOCAB_SIZE)
    sizes = () if unpadded is None else (int(unpadded),)
    transforms = []
    for factors, softcap, vocab_size in itertools.product(
        itertools.product(*scales), (*softcaps, None), (*sizes, None)
    ):
        transforms.append(HeadTransform(math.prod(factors), softcap, vocab_size))
    return tuple(dict.fromkeys(transforms))


def _plain_tokens(config: Any, count: int) -> list[int]:
    """Token ids without a special meaning in the config (an image placeholder, for example)."""
    text_config = config.get_text_config()
    values = [*vars(config).values(), *vars(text_config).values()]
    named = {value for value in values if isinstance(value, int)}
    ids = range(min(count + len(named), text_config.vocab_size))
    plain = [token for token in ids if token not in named] or [0]
    return [plain[i % len(plain)] for i in range(count)]


def _is_finite(weight: Tensor) -> bool:
    return not weight.is_floating_point() or bool(weight.isfinite().all())


def _virtual_tokens(model: nn.Module) -> int:
    """The number of virtual tokens that a prompt-learning adapter may put before the real ones."""
    configs = [
        config
        for module in model.modules()
        for config in getattr(module, "peft_config", {}).values()
    ]
    return max((getattr(config, "num_virtual_tokens", None) or 0 for config in configs), default=0)


@contextmanager
def _without_mixed_dtypes(base: Any, device: torch.device) -> Iterator[None]:
    """Raise ValueError, not torch's RuntimeError, for weights that need autocast to be combined."""
    try:
        yield
    except RuntimeError as error:
        # Of each dtype the last weight: the head's, if the head is what differs.
        names = {p.dtype: name for name, p in base.named_parameters() if p.is_floating_point()}
        is_cast = torch.is_autocast_enabled(device.type)
        if len(names) < 2 or is_cast or "dtype" not in str(error):
            raise
        weights = " and ".join(f"{dtype} ({name})" for dtype, name in names.items())
        raise ValueError(
            f"the forward of {type(base).__name__} fails on weights of several dtypes, {weights}: "
            "give all of them one dtype, or run under autocast (bf16=True or fp16=True in a trainer)"
        ) from error


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits of all entries, also of a head over several ranks, which stays where it is."""
    if not shards.is_dtensor(weight):
        return F.linear(hidden, weight, bias)
    from torch.distributed.tensor import DTensor, Replicate

    mesh = weight.device_mesh
    replicated = DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim)
    logits: Any = F.linear(replicated, weight, bias)
    return logits.full_tensor()


def _probe(
    model: nn.Module,
    base: Any,
    head: Any,
    candidates: tuple[HeadTransform, ...],
) -> HeadTransform:
    """The candidate that explains the model's logits best; ValueError if none explains them."""
    embeddings = base.get_input_embeddings()
    device = embeddings.weight.device
    ids = torch.tensor([_plain_tokens(base.config, len(_PROBE_PEAKS))], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(base.config, "is_encoder_decoder", False):
        inputs[DECODER_IDS] = ids
    seen: dict[str, Tensor] = {}

    with undisturbed(model, device):

        def probing_head(hidden: Tensor) -> Tensor:
            raw = original(hidden)
            # Whatever its class, the head must compute the linear map that `heads.read` found.
            seen["raw"] = raw
            read = heads.read(head, hidden)
            seen["linear"] = _linear(hidden, read.weight, read.bias)
            if read.lora_hidden is not None and read.lora_weight is not None:
                term = F.linear(read.lora_hidden, read.lora_weight.to(read.lora_hidden.dtype))
                seen["linear"] = seen["linear"] + term
            # Prompt-learning adapters add positions, hence the modulo.
            peaks = torch.tensor(_PROBE_PEAKS, device=raw.device)
            peaks = peaks[torch.arange(raw.shape[-2], device=raw.device) % len(peaks)]
            ramp = peaks[:, None] * torch.linspace(-1, 1, raw.shape[-1], device=raw.device)
            # Always in float32: in bf16 a factor of 1.05 would pass as rounding.
            seen["ramp"] = ramp.expand_as(raw)
            # A copy, since some models transform their logits in place.
            return seen["ramp"].clone()

        mixed = _without_mixed_dtypes(base, device)
        with replaced_forward(head, probing_head) as original, mixed:
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
    # Two ways to compute one product; each rounds in the head's dtype.
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
            f"{len(_PROBE_PEAKS)} tokens; a causal LM calls it on one position per token"
        )
    fitting = [each for each in candidates if each(ramp).shape == logits.shape]
    if not fitting:
        raise ValueError(
            f"{type(base).__name__} returns logits of shape {list(logits.shape)}, but its head "
            f"returns {list(ramp.shape)}"
        )
    # The model rounds at each of its few steps to the dtype of its logits.
    tolerance = max(8 * torch.finfo(logits.dtype).eps, 1e-5)
    logits = logits.float()

    def error(candidate: HeadTransform) -> float:
        expected = candidate(ramp)
        return ((logits - expected).abs() / (expected.abs() + 1e-4)).max().item()

    # The closest, not the first that passes: in bf16 a scale of 1.02 and its inverse may both pass.
    closest = min(fitting, key=error)
    if error(closest) <= tolerance:
        return closest
    expected = fitting[0](ramp)
    worst = int((logits - expected).abs().argmax())
    raw_logit = ramp[..., : expected.shape[-1]].flatten()[worst].item()
    raise ValueError(
        f"the logits of {type(base).__name__} are not explained by its config: "
        f"{fitting[0]} was read (and {len(candidates) - 1} other readings tried). It turns a "
        f"raw logit of {raw_logit:.4g} into {expected.flatten()[worst].item():.4g}, but the model "
        f"turns it into {logits.flatten()[worst].item():.4g}"
    )
