"""Loads a model, its config and its tokenizer by name or path; errors name the unusable file.

transformers draws weights at random if no file holds them. It writes one line to its log, and the
run trains them. For a folder that holds only an adapter it says that the model type is unknown, and
for a damaged file it says where its parser stopped. Here each case is an error that names the
folder, the fault and the remedy.

A revision, a subfolder, a cache folder or an access token for a model also applies to its tokenizer,
because another revision may have another vocabulary and chat template. Where the subfolder has no
tokenizer, it is the one above. Code among the files runs only if
the user trusts it. `trust_remote_code` is always passed: without a value transformers asks on
stdin.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils.hub import has_file
from transformers.utils.peft_utils import find_adapter_config_file

from prefkern.keywords import current_names

logger = logging.getLogger(__name__)

# Keywords of `from_pretrained` that say where the files are.
_WHENCE = (
    "revision",
    "code_revision",
    "subfolder",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
)


def load_model(name: str, init_kwargs: Mapping[str, Any] | None = None, what: str = "model") -> Any:
    """Loads a causal LM, in float32 unless `init_kwargs` name another dtype.

    A model that also takes images is accepted.

    Args:
        name: a folder or hub name.
        init_kwargs: keywords of `from_pretrained`.
        what: the model's name in errors.

    Raises OSError if there is no such model. Raises ValueError for an adapter, and for files that
    are damaged, have wrong shapes or lack some of the weights.
    """
    kwargs = {"dtype": torch.float32, **current_names(init_kwargs or {})}
    remote = is_trusted(kwargs)
    kwargs.pop("trust_remote_code", None)
    # return_unused_kwargs: the config ignores keywords that only the model reads.
    config, _ = read_config(
        name, what, trust_remote_code=remote, return_unused_kwargs=True, **kwargs
    )
    kind = type(config)
    takes_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    loader: Any = AutoModelForCausalLM
    if takes_images and kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        loader = AutoModelForImageTextToText
    try:
        model, missing = from_files(loader, name, what, trust_remote_code=remote, **kwargs)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"{what} {name!r}: weights have other shapes than its config.json says (experts are "
            "stacked, so a missing expert is also a wrong shape); the log above names them"
        ) from error
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{what} {name!r} has no weights for {', '.join(missing[:3])}{more} of "
            f"{type(model).__name__}; they would be drawn at random. Download its files again, or "
            "save the whole model"
        )
    return model


def load_adapted(name: str, adapter: str, init_kwargs: Mapping[str, Any] | None = None) -> Any:
    """Loads a causal LM with a trained adapter, to train that on.

    Args:
        name: folder or hub name of the base model.
        adapter: folder or hub name of the adapter.
        init_kwargs: keywords of `from_pretrained` for the base model.

    Raises OSError if one of them does not exist. Raises ValueError if the adapter does not fit the
    model or is of another kind, and as `load_model`. Warns if it names another base model.
    """
    from peft import PeftConfig, PeftModel

    try:
        found = find_adapter_config_file(adapter)
    except (OSError, ValueError) as error:
        # Neither a folder nor a name that the hub could have.
        raise ValueError(f"adapter must be a folder or a hub name, got {adapter!r}") from error
    if found is None:
        raise ValueError(f"adapter {adapter!r} holds no adapter: it has no adapter_config.json")
    config = PeftConfig.from_pretrained(adapter)
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"adapter {adapter!r} has task type {config.task_type}; that of a language model is "
            "CAUSAL_LM"
        )
    trained_on = config.base_model_name_or_path
    model = load_model(name, init_kwargs)
    try:
        model = PeftModel.from_pretrained(model, adapter, is_trainable=True)
        # Once more, since the first time does not return what does not fit.
        loaded = model.load_adapter(adapter, "default", is_trainable=True)
    except (RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"adapter {adapter!r}, trained on {trained_on!r}, cannot be used on {name!r}: {reason}"
        ) from error
    for what, keys in (("no", loaded.missing_keys), ("unused", loaded.unexpected_keys)):
        if keys:
            raise ValueError(
                f"adapter {adapter!r}, trained on {trained_on!r}, does not fit {name!r}: it has "
                f"{what} weights for {keys[0]}"
            )
    if trained_on and Path(trained_on).name != Path(name).name:
        logger.warning("adapter %r was trained on %r, and is used on %r", adapter, trained_on, name)
    return model


def load_own_tokenizer(adapter: str, name: str, kwargs: Mapping[str, Any]) -> Any:
    """The tokenizer beside an adapter, with the chat template that it was trained with; else the
    tokenizer of its base model `name`, loaded with `kwargs`.
    """
    if Path(adapter).is_dir() and not (Path(adapter) / "tokenizer_config.json").exists():
        return load_tokenizer(name, kwargs)
    try:
        return load_tokenizer(adapter, of_another(kwargs))
    except OSError:
        return load_tokenizer(name, kwargs)


def load_own_processor(adapter: str, name: str, kwargs: Mapping[str, Any]) -> Any:
    """The processor beside an adapter, as `load_own_tokenizer` finds a tokenizer."""
    if (Path(adapter) / "processor_config.json").exists():
        return load_processor(adapter, {key: x for key, x in kwargs.items() if key != "revision"})
    return load_processor(name, kwargs)


def from_files(
    loader: Any, name: str, what: str, *, trust_remote_code: bool, **kwargs: Any
) -> tuple[Any, list[str]]:
    """Loads a model by an Auto class; also returns the names of the weights that the files lack.

    Raises ValueError for a damaged file, and names it.
    """
    try:
        model, info = loader.from_pretrained(
            name, output_loading_info=True, trust_remote_code=trust_remote_code, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(
            f"{what} {name!r}: {_unreadable(name)} is damaged or incomplete ({error}); download it "
            "again"
        ) from error
    # Buffers are computed, so they may be missing; of tied weights the file holds one.
    own = {each for each, _ in model.named_parameters(remove_duplicate=False)}
    return model, sorted(own & set(info["missing_keys"]))


def read_config(
    name: str, what: str = "model", *, trust_remote_code: bool = False, **kwargs: Any
) -> Any:
    """A model's config, as AutoConfig reads it.

    Raises OSError if there is none, and ValueError for an adapter and for a config that no model
    can be built from.
    """
    if not name.strip():
        raise ValueError(f"{what} must be a folder or a hub name, got {name!r}")
    if Path(name).is_dir():
        _refuse_adapter(name, what)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError):
        # Only after a failure: for a hub name this sends one more request.
        with suppress(OSError):
            _refuse_adapter(name, what)
        raise
    except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:
        raise unusable_config(name, what, error) from error


def unusable_config(name: str, what: str, error: Exception) -> ValueError:
    """The error for a config from which transformers cannot build a model."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{what} {name!r}: no model can be built from its config.json "
        f"({type(error).__name__}: {reason})"
    )


def load_tokenizer(name: str, kwargs: Mapping[str, Any]) -> Any:
    """The tokenizer of a model.

    Args:
        name: the model's folder or hub name.
        kwargs: keywords of `from_pretrained` that the model is loaded with.

    Raises OSError if there is none. Raises ValueError if it cannot be read, and names a broken
    file; also if it is code that the user does not trust.
    """
    if not name:
        raise ValueError(
            "the model does not say where it was loaded from (its config's _name_or_path is empty), "
            "so its tokenizer is unknown: pass processing_class"
        )
    try:
        given = whence(kwargs)
        if "subfolder" in given and not _has_tokenizer(name, **given):
            del given["subfolder"]
        return AutoTokenizer.from_pretrained(name, trust_remote_code=is_trusted(kwargs), **given)
    except Exception as error:
        # The Rust library raises plain Exceptions. Errors of transformers itself are clear enough.
        broken = _broken_json(name)
        if broken is None and isinstance(error, (OSError, ValueError)):
            raise
        where = name if broken is None else str(broken)
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the tokenizer of {name!r} cannot be loaded: {where}: {reason}. Repair its files, or "
            "pass processing_class"
        ) from error


def load_processor(name: str, kwargs: Mapping[str, Any]) -> Any:
    """The processor of a model that sees, as `load_tokenizer` loads a tokenizer.

    Raises ValueError if it cannot be loaded.
    """
    try:
        return AutoProcessor.from_pretrained(
            name, trust_remote_code=is_trusted(kwargs), **whence(kwargs)
        )
    except Exception as error:
        # To its end: which package is missing is said last.
        reason = " ".join(str(error).split())[:600].rstrip(".")
        raise ValueError(
            f"the processor of {name!r}, which pictures need, cannot be loaded: {reason}. Pass "
            "processing_class, or remove the pictures to train on the text alone"
        ) from error


def whence(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model's keywords for `from_pretrained` that say where its files are."""
    return {name: kwargs[name] for name in _WHENCE if name in kwargs}


def of_another(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A model's keywords for `from_pretrained` as they are for its adapter.

    Its revision and subfolder are not those of the adapter.
    """
    return {name: x for name, x in kwargs.items() if name not in ("revision", "subfolder")}


def is_trusted(kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's keywords for `from_pretrained` allow code among its files to run."""
    return bool(kwargs.get("trust_remote_code", False))


def _has_tokenizer(name: str, subfolder: str, **given: Any) -> bool:
    """Whether a subfolder of a model's files has a tokenizer of its own."""
    asked = ("revision", "token", "cache_dir", "local_files_only")
    file = f"{subfolder}/tokenizer_config.json"
    return has_file(name, file, **{key: given[key] for key in asked if key in given})


def _refuse_adapter(name: str, what: str) -> None:
    path = find_adapter_config_file(name)
    if path is None:
        return
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    base = repr(base) if base else "a base model that it does not name"
    use = (
        f"name the base model, and train the adapter on with --adapter {name} (in Python, pass "
        "PeftModel.from_pretrained(base, folder, is_trainable=True) as the model)"
    )
    if what == "ref_model":
        use = (
            "in Python, load it beside the adapter that is trained (model.load_adapter(folder, "
            "adapter_name=...)) and name it in ref_adapter_name"
        )
    raise ValueError(
        f"{what} {name!r} is an adapter of {base}, not a model: {use}; or merge it first with "
        "merge_and_unload() and save the result"
    )


def _unreadable(name: str) -> str:
    """The first safetensors file in a folder that cannot be opened."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return str(path)
    return "a file of weights"


def _broken_json(name: str) -> Path | None:
    """The first .json file in a folder that is not JSON."""
    for path in sorted(Path(name).glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return path
    return None
