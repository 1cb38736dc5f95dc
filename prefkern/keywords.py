"""Keywords of `from_pretrained` by the names that transformers 5 has for them.

Without a dtype prefkern loads float32. That default must not shadow a dtype that the user gave, so
`torch_dtype`, as older scripts call it, is read as `dtype` before defaults are added. Other names
that transformers has dropped would reach the model's constructor; here the error says the new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The dtypes of torch that weights are loaded in.
_FLOATS = ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_SHORT = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "fp32": "float32",
    "half": "float16",
    "float": "float32",
    "double": "float64",
}
_DROPPED = {
    "use_auth_token": '"token"',
    "load_in_4bit": '"quantization_config" (a BitsAndBytesConfig)',
    "load_in_8bit": '"quantization_config" (a BitsAndBytesConfig)',
    "use_flash_attention_2": '"attn_implementation": "flash_attention_2"',
}


def current_names(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords with `torch_dtype` as `dtype`.

    A dtype may be a torch.dtype, "auto", or a name: "bfloat16", "torch.bfloat16", "bf16". Raises
    ValueError for another one, for two different dtypes, and for a keyword that was dropped.
    """
    for name, instead in _DROPPED.items():
        if name in kwargs:
            raise ValueError(
                f"model_init_kwargs has {name!r}, which transformers 5 does not take: give {instead}"
            )
    names = [name for name in ("dtype", "torch_dtype") if kwargs.get(name) is not None]
    dtypes = [_dtype(name, kwargs[name]) for name in names]
    if len(dtypes) == 2 and dtypes[0] != dtypes[1]:
        raise ValueError(
            f"dtype is {kwargs['dtype']!r} and torch_dtype, its older name, "
            f"{kwargs['torch_dtype']!r}; give one"
        )
    others = {name: value for name, value in kwargs.items() if name not in ("dtype", "torch_dtype")}
    return others | ({"dtype": dtypes[0]} if dtypes else {})


def full_dtype(name: str) -> str:
    """A dtype's own name, of "torch.bfloat16" and "bf16" too; another text is left as it is."""
    plain = name.removeprefix("torch.")
    return _SHORT.get(plain, plain)


def _dtype(name: str, value: Any) -> Any:
    """A dtype's own name, "bfloat16"; "auto" and a dict of a model's parts are left as they are."""
    if isinstance(value, dict) or value == "auto":
        return value
    plain = full_dtype(str(value))
    if plain not in _FLOATS:
        raise ValueError(
            f'{name} must be "auto" or a floating dtype such as "bfloat16", got {value!r}'
        )
    return plain
