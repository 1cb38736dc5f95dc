"""Hugging Face causal LMs: from a model to hidden states, head and logits transform.

The model's own forward runs, wrapped as it is (DDP, PEFT, FSDP, autocast hooks all fire), with the
`forward` of its output head replaced for the length of the call. The replacement receives what the
head would have received, scores it without logits, and hands the model a `[B, T, 1]` tensor of
zeros in place of logits. Whatever a family does before its head is therefore untouched.

What a family does after its head is read off the config: a scale (Cohere, Granite, Falcon-H1, ...)
and a tanh softcap (Gemma 2, ...). Names do not settle it, since Granite divides by `logits_scaling`,
HyperCLOVA X multiplies by it and MiniCPM3 applies it before the head. So each reading is held once
per model against the model itself: a forward of four tokens in which the head returns a known ramp
of float32 logits up to +-100, and the model's output has to be that ramp transformed. If no reading
explains it, that is an error, never a wrong number.

The zeros carry the autograd graph. Added to the loss they change nothing, but the loss then depends
on the wrapper's output, which is where DDP and FSDP hang their backward hooks.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prefkern import heads, text_inputs
from prefkern.api import linear_logprobs
from prefkern.heads import HeadInputs

IGNORE_INDEX = -100

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


# Of `token_logprobs`: a name that is nearly one of these is no argument of a model.
_OWN_OPTIONS = ("labels", "cu_seqlens", "temperature", "workspace_mb", "backend", "attention_mask")

Score = Callable[[HeadInputs], tuple[Any, Tensor]]


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


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    workspace_mb: float | None = None,
    backend: str | None = None,
    **model_kwargs: Any,
) -> Tensor:
    """Log-probability of each token under a causal LM, without logits.

    Args:
        model: a Hugging Face causal LM, bare or wrapped (DDP, PEFT, FSDP).
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 for tokens and 0 for padding.
        labels: [B, T] as the model takes them, not shifted, -100 where not scored. None scores
            every token of `input_ids` that is not masked out and follows one that is not.
        cu_seqlens: [S + 1] int32 or int64, where each sequence of a packed row begins: input_ids is
            then [1, M], without attention_mask, positions restart with each sequence, and the
            first token of each is not scored.
        temperature: divides the logits, > 0.
        workspace_mb, backend: as in `prefkern.linear_logprobs`.
        model_kwargs: passed to the model's forward (position_ids, pixel_values, ...).

    Returns:
        [B, T-1] float32; column t holds log p(labels[:, t + 1]), 0 where not scored.
        Differentiable in the model's parameters.

    Raises TypeError and ValueError for tensors that do not fit the model or one another, for a model whose head or logits transform is not
    understood, and for one that cannot keep packed sequences apart.
    """
    base, _ = find_head(model)
    text_inputs.check(base, input_ids, attention_mask, labels)
    text_inputs.check_names(base, model_kwargs, _OWN_OPTIONS)
    if labels is None:
        labels = input_ids
        if attention_mask is not None:
            # A token after padding has no context: its log-prob would come from a pad's state.
            kept = attention_mask.bool()
            kept = kept & F.pad(kept[:, :-1], (1, 0), value=True)
            labels = labels.masked_fill(~kept, IGNORE_INDEX)
    inputs = {"input_ids": input_ids, **model_kwargs}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask
    if cu_seqlens is not None:
        # It stands on this module.
        from prefkern.packing import packed_inputs

        if len(inputs) > 1:
            given = ", ".join(name for name in inputs if name != "input_ids")
            raise ValueError(f"a packed row is input_ids and cu_seqlens alone, got {given} as well")
        inputs = packed_inputs(model, input_ids, cu_seqlens)
    aligned = align_labels(labels, cu_seqlens)
    transform = head_transform(model)

    def score(head: HeadInputs) -> tuple[Tensor, Tensor]:
        head = head.of_tokens(aligned)
        logps = linear_logprobs(
            head.hidden,
            head.weight,
            aligned,
            head.bias,
            ignore_index=IGNORE_INDEX,
            logit_scale=transform.logit_scale,
            softcap=transform.softcap,
            temperature=temperature,
            workspace_mb=workspace_mb,
            backend=backend,
            **head.adapter(),
        )
        assert isinstance(logps, Tensor)
        return logps, logps

    logps, zero = forward_with_head(model, inputs, score)
    return logps[:, :-1] + zero


def align_labels(
    labels: Tensor,  # (B, T), or (1, M) with cu_seqlens
    cu_seqlens: Tensor | None = None,  # (S + 1,)
) -> Tensor:  # as labels
    """Labels as a model takes them -> labels aligned with hidden states: the only shift there is.

    The last token of a sequence predicts nothing, least of all the first of the next in its row.
    """
    aligned = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if cu_seqlens is None:
        return aligned
    return aligned.index_fill(1, cu_seqlens[1:].to(labels.device, torch.int64) - 1, IGNORE_INDEX)


def forward_with_head(model: nn.Module, inputs: Mapping[str, Any], fn: Score) -> tuple[Any, Tensor]:
    """Run a model's forward with its output head replaced by `fn`.

    Args:
        model: a Hugging Face causal LM, bare or wrapped.
        inputs: keyword arguments of its forward, without labels.
        fn: `fn(head) -> (result, anchor)`, called where the head would have been. `anchor` is a
            tensor of the result that carries its autograd graph.

    Returns:
        The result, and a scalar that is exactly 0 and depends on `anchor` through the wrapped
        model's output. Add it to what is differentiated, so that the wrapper's hooks fire.

    Raises RuntimeError if the forward does not call its head once.
    """
    result, output = head_forward(model, inputs, fn)
    return result, output.logits.sum()


def head_forward(model: nn.Module, inputs: Mapping[str, Any], fn: Score) -> tuple[Any, Any]:
    """As `forward_with_head`, returning what the model returned, in which logits are [B, T, 1].

    Their sum is the scalar that `forward_with_head` speaks of.
    """
    base, head = find_head(model)
    words = head_transform(model).words
    results: list[Any] = []

    def replacement(hidden: Tensor) -> Tensor:
        if results:
            raise RuntimeError(f"{type(base).__name__} calls its output head more than once")
        result, anchor = fn(heads.read(head, hidden).of_words(words))
        results.append(result)
        zeros = torch.zeros(*hidden.shape[:-1], 1, dtype=torch.float32, device=hidden.device)
        return zeros + 0.0 * anchor.float().sum()

    with _replaced_forward(head, replacement):
        output = model(**_without_cache(base, inputs))
    if not results:
        raise _uncalled(base, head)
    return results[0], output


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside DDP, FSDP, DeepSpeed, torch.compile and PEFT wrappers.

    Raises TypeError for nn.DataParallel.
    """
    while True:
        if isinstance(model, nn.DataParallel):
            raise TypeError(
                "nn.DataParallel is not supported: its replicas share one Python head. Start one "
                "process per GPU with `accelerate launch` or `torchrun`, or make a single GPU "
                "visible with CUDA_VISIBLE_DEVICES"
            )
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
            model = model.module
        else:
            return model


def find_head(model: nn.Module) -> tuple[Any, Any]:
    """The unwrapped model and its output head, a linear layer or one that PEFT adapts.

    Raises ValueError where there is no head, or one that `prefkern.heads` cannot read.
    """
    base = unwrap(model)
    get_head = getattr(base, "get_output_embeddings", None)
    head = get_head() if get_head is not None else None
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no output head (get_output_embeddings() gives none); "
            "a Hugging Face causal LM is needed"
        )
    if getattr(base.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(base).__name__} is an encoder-decoder; a causal LM is needed")
    problem = heads.problem(head)
    if problem:
        raise ValueError(f"the output head of {type(base).__name__} is {problem}")
    return base, head


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


def _uncalled(base: Any, head: nn.Module) -> RuntimeError:
    return RuntimeError(
        f"{type(base).__name__} did not call its output head ({type(head).__name__}) as a module, "
        "so its log-probs cannot be computed without logits"
    )


def _without_cache(base: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(base.forward).parameters
    return {"use_cache": False, **inputs} if "use_cache" in parameters else dict(inputs)


@contextmanager
def _replaced_forward(
    module: nn.Module, replacement: Callable[[Tensor], Tensor]
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Replace a module's forward within the context; yields the original. Its hooks still fire."""
    # accelerate's device hooks sit in `forward` and call `_old_forward`: keep them in place.
    attribute = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
    original = getattr(module, attribute)
    is_own = attribute in vars(module)
    setattr(module, attribute, replacement)
    try:
        yield original
    finally:
        if is_own:
            setattr(module, attribute, original)
        else:
            delattr(module, attribute)


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; modes and random state are put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


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

        with _replaced_forward(head, probing_head) as original:
            logits = model(**_without_cache(base, inputs)).logits
    if not seen:
        raise _uncalled(base, head)

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
