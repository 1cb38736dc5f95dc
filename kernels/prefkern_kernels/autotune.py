"""Tile configurations measured on one's own device: opt-in, timed once, kept in a file.

Nothing here runs by itself. `PREFKERN_AUTOTUNE=1` in the environment, or a call of
`tune_product_fold`, times the candidates of `tiles.PRODUCTS` at a call's own sizes. The fastest is
stored with all times in `prefkern/tiles.json` under `XDG_CACHE_HOME` (or `~/.cache`). Later runs
read the file, with tuning on or off, and prefer it to the table. To use the table again, delete the
file or set `PREFKERN_AUTOTUNE=0`.

A measurement is valid for a device's name, a version of Triton, a dtype, an H, a class of V (V
rounded up to a power of 2), and with or without a bias or a softcap. The choice changes the order
of additions, and so the last bits of a result. Ranks that must agree bit for bit should share the
file, and tune before they start.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.errors import TritonError

from .tiles import ProductConfig, device_names

_FORMAT = 1
# The entries of each file, by path; a process reads each file once.
_read: dict[Path, dict[str, Any]] = {}


class Key(NamedTuple):
    """The calls that a measurement is valid for."""

    kernel: str
    device: str
    triton: str
    operands: str
    hidden_size: int
    vocab_class: int  # V rounded up to a power of 2
    plain: bool

    def __str__(self) -> str:
        return "; ".join(f"{name}={value}" for name, value in self._asdict().items())


def key_of(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    operands: str,
    hidden_size: int,
    vocab_size: int,
    plain: bool,
) -> Key:
    """The key of a call; `operands` as in `tiles.ProductClass`."""
    name = str(dtype).removeprefix("torch.") if operands == "half" else operands
    vocab_class = 1 << max(vocab_size - 1, 0).bit_length()
    device_name = device_names(device)[0]
    return Key(kernel, device_name, triton.__version__, name, hidden_size, vocab_class, plain)


def is_enabled() -> bool:
    """Whether the environment asks to tune at first calls."""
    return os.environ.get("PREFKERN_AUTOTUNE") == "1"


def cache_path() -> Path:
    """The file of measurements."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "prefkern" / "tiles.json"


def recall(key: Key) -> ProductConfig | None:
    """The fastest configuration by measurement; None without one."""
    if os.environ.get("PREFKERN_AUTOTUNE") == "0":
        return None
    path = cache_path()
    if path not in _read:
        _read[path] = _load(path)
    entry = _read[path].get(str(key))
    return None if entry is None else ProductConfig(**entry["config"])


def tune(
    key: Key,
    candidates: Sequence[ProductConfig],
    run: Callable[[ProductConfig], object],
    timer: Callable[[Callable[[], object]], float] | None = None,
) -> ProductConfig:
    """Time each candidate, store all times and the fastest, and return that.

    Args:
        run: makes the launch to time, with a configuration.
        timer: milliseconds of a call; None: Triton's own, which clears the cache between calls. A
            candidate that raises is left out.
    """
    time = timer or _median
    times: dict[ProductConfig, float] = {}
    errors: list[Exception] = []
    for config in candidates:
        try:
            times[config] = time(lambda config=config: run(config))
        except (TritonError, RuntimeError) as error:
            # It needs too much shared memory, or the compiler refuses it: not a candidate here.
            errors.append(error)
    if not times:
        raise RuntimeError(f"no configuration of {key.kernel} runs on {key.device}") from errors[0]
    best = min(times, key=lambda config: times[config])
    entry = {
        "config": best._asdict(),
        "date": date.today().isoformat(),
        "milliseconds": [
            {**config._asdict(), "milliseconds": time} for config, time in times.items()
        ],
    }
    _store(cache_path(), str(key), entry)
    return best


def _median(call: Callable[[], object]) -> float:
    time = triton.testing.do_bench(call, return_mode="median")
    assert isinstance(time, float)
    return time


def _store(path: Path, key: str, entry: dict[str, Any]) -> None:
    """Add an entry to the file, in one step: no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another process may have added its own entry after this one read the file.
    entries = {**_load(path), key: entry}
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
    ) as file:
        json.dump({"format": _FORMAT, "entries": entries}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)
    _read[path] = entries


def _load(path: Path) -> dict[str, Any]:
    """The file's entries; none, with a warning, if it does not hold any."""
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}, not {_FORMAT}")
        for entry in content["entries"].values():
            _check(entry["config"])
        return content["entries"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warnings.warn(
            f"{path} is not a file of tile configurations and is ignored: {error!r}. "
            "The next tuning replaces it.",
            stacklevel=2,
        )
        return {}


def _check(config: dict[str, Any]) -> None:
    defaults = ProductConfig(1, 1, 1, 1, 1)._asdict()
    if {name: type(value) for name, value in config.items()} != {
        name: type(value) for name, value in defaults.items()
    }:
        raise ValueError(f"{config} is no configuration")
