"""Files of one model, from one place: its tokenizer and configuration are loaded as the model is.

A revision, a cache or a token that is given for a model belongs to its tokenizer as well, whose words
and chat template may be another revision's. Code that comes with the files runs only where it is
trusted, and that is always said: where it is not, transformers asks on stdin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer

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


def whence(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Of a model's keywords of `from_pretrained`, those that say where its files are."""
    return {name: kwargs[name] for name in _WHENCE if name in kwargs}


def is_trusted(kwargs: Mapping[str, Any]) -> bool:
    """Whether a model's keywords of `from_pretrained` let the code that comes with it run."""
    return bool(kwargs.get("trust_remote_code", False))


def load_tokenizer(name: str, kwargs: Mapping[str, Any]) -> Any:
    """The tokenizer of a model by name or path, which is loaded with `kwargs`.

    Raises OSError where there is none, and ValueError for one that is code which is not trusted.
    """
    return AutoTokenizer.from_pretrained(
        name, trust_remote_code=is_trusted(kwargs), **whence(kwargs)
    )
