"""From a name or path to a model, its configuration and its tokenizer; what cannot be used is named.

transformers fills in what a folder lacks: weights that no file holds are drawn at random, with a line
in its log, and the run trains them. Of a folder that holds an adapter alone it says that the model type
is unknown, and of a damaged file where its parser stopped. Here each is an error that names the folder,
what is wrong with it and what to do.

A revision, a cache or a token that is given for a model belongs to its tokenizer as well, whose words
and chat template may be another revision's. Code that comes with the files runs only where it is
trusted, and that is always said: where it is not, transformers asks on stdin.
"""

from __future__ import annotations

import json
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
    AutoTokenizer,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)
from transformers.utils.peft_utils import find_adapter_config_file

# Keywords of `from_pretrained` that say where files are taken from, and not what is made of them.
_WHENCE = (
    "revision",
    "code_revision",
    "token",
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
)


def load_model(name: str, init_kwargs: Mapping[str, Any] | None = None, what: str = "model") -> Any:
    """A causal LM by name or path, with keywords of `from_pretrained`; in float32 unless they say otherwise.

    It may be one that takes images as well, of which the text is trained. Raises OSError for one
    that is not there, and ValueError for an adapter, and for files that are damaged, of other
    shapes, or lack some of the weights; `what` is what the error calls the model.
    """
    kwargs = {"dtype": torch.float32, **(init_kwargs or {})}
    remote = is_trusted(kwargs)
    kwargs.pop("trust_remote_code", None)
    # Keywords that are the model's and not the config's are of no matter to its kind.
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
            "stacked, so that one too few is such a shape); the log above names them"
        ) from error
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{what} {name!r} has no weights for {', '.join(missing[:3])}{more} of "
            f"{type(model).__name__}, which would be drawn at random; fetch its files anew, or save "
            "the model whole"
        )
    return model


def from_files(
    loader: Any, name: str, what: str, *, trust_remote_code: bool, **kwargs: Any
) -> tuple[Any, list[str]]:
    """A model by an Auto class, and the names of its weights that the files lack.

    Raises ValueError, naming the file, for one that is damaged.
    """
    try:
        model, info = loader.from_pretrained(
            name, output_loading_info=True, trust_remote_code=trust_remote_code, **kwargs
        )
    except SafetensorError as error:
        raise ValueError(
            f"{what} {name!r}: {_unreadable(name)} is damaged or was not written to its end "
            f"({error}); fetch it anew"
        ) from error
    # A buffer is computed, and of tied weights one is in the file.
    own = {each for each, _ in model.named_parameters(remove_duplicate=False)}
    return model, sorted(own & set(info["missing_keys"]))


def read_config(
    name: str, what: str = "model", *, trust_remote_code: bool = False, **kwargs: Any
) -> Any:
    """A model's configuration, as AutoConfig has it.

    Raises OSError for one that is not there, and ValueError for an adapter, and for a configuration
    of which there is no model.
    """
    if not name.strip():
        raise ValueError(f"{what} must be a folder or a hub name, got {name!r}")
    if Path(name).is_dir():
        _refuse_adapter(name, what)
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except (OSError, ValueError):
        # A hub name is asked for once more only now.
        with suppress(OSError):
            _refuse_adapter(name, what)
        raise
    except (StrictDataclassError, AttributeError, KeyError, TypeError) as error:
        raise unusable_config(name, what, error) from error


def unusable_config(name: str, what: str, error: Exception) -> ValueError:
    """What to raise for a configuration that transformers cannot make a model of."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{what} {name!r}: no model can be made of its config.json ({type(error).__name__}: {reason})"
    )


def load_tokenizer(name: str, kwargs: Mapping[str, Any]) -> Any:
    """The tokenizer of a model by name or path, which is loaded with `kwargs`.

    Raises OSError where there is none, and ValueError, naming the file where one is broken, for one
    that cannot be read and for one that is code which is not trusted.
    """
    if not name:
        raise ValueError(
            "the model does not say where it was loaded from (its config's _name_or_path is empty), "
            "so that its tokenizer is not known: pass processing_class"
        )
    try:
        return AutoTokenizer.from_pretrained(
            name, trust_remote_code=is_trusted(kwargs), **whence(kwargs)
        )
    except Exception as error:
        # The Rust library raises plain Exceptions; what transformers says of a folder is clear.
        broken = _broken_json(name)
        if broken is None and isinstance(error, (OSError, ValueError)):
            raise
        where = name if broken is None else str(broken)
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the tokenizer of {name!r} cannot be loaded: {where}: {reason}. Mend its files, or "
            "pass processing_class"
        ) from error


def whence(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's keywords of `from_pretrained`, those that say where its files are."""
    return {name: kwargs[name] for name in _WHENCE if name in kwargs}


def is_trusted(kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's keywords of `from_pretrained` let the code that comes with it run."""
    return bool(kwargs.get("trust_remote_code", False))


def _refuse_adapter(name: str, what: str) -> None:
    path = find_adapter_config_file(name)
    if path is None:
        return
    try:
        base = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        base = None
    base = repr(base) if base else "a base model that it does not name"
    raise ValueError(
        f"{what} {name!r} is an adapter of {base}, and no model: name the base model, and give it a "
        "new adapter; or merge this one first, with PeftModel.from_pretrained(base, "
        f"{name!r}).merge_and_unload(), and save the result. In Python, a PeftModel can be passed "
        "as the model"
    )


def _unreadable(name: str) -> str:
    """The first safetensors file of a folder that cannot be opened."""
    for path in sorted(Path(name).glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except SafetensorError:
            return str(path)
    return "a file of weights"


def _broken_json(name: str) -> Path | None:
    """The first file of a folder that should be JSON and is not."""
    for path in sorted(Path(name).glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return path
    return None
