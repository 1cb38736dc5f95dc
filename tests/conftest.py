"""Shared by all tests: where they run, and memory that cannot be read before it is written."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from support.machine import BACKENDS, DEVICE

# Operators this small gain nothing from a second thread, and lose much where a core is busy.
torch.set_num_threads(1)


# A property is drawn the same way at every run, so that a change alone can break it; --long draws
# more, anew each time, and prints what reproduces a failure.
hypothesis.settings.register_profile("quick", max_examples=12, deadline=None, derandomize=True)
hypothesis.settings.register_profile("long", max_examples=400, deadline=None, print_blob=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the long versions as well")


def pytest_configure(config: pytest.Config) -> None:
    hypothesis.settings.load_profile("long" if config.getoption("--long") else "quick")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--long"):
        return
    kept, long = [], []
    for item in items:
        (long if _is_long(item) else kept).append(item)
    config.hook.pytest_deselected(items=long)
    items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """Trainers collect garbage after every run; keep modules and tests out of it."""
    gc.collect()
    gc.freeze()


def _is_long(item: pytest.Item) -> bool:
    """Whether a mark is for this case: it names no values, or only values of this case."""
    given = getattr(getattr(item, "callspec", None), "params", {})
    for mark in item.iter_markers("long"):
        if unknown := set(mark.kwargs) - set(given):
            raise pytest.UsageError(f"{item.nodeid}: long names {sorted(unknown)}, not a parameter")
        wanted = {n: v if isinstance(v, list) else [v] for n, v in mark.kwargs.items()}
        if all(given[name] in values for name, values in wanted.items()):
            return True
    return False


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory with NaN, so that reading it before writing shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def device() -> str:
    return DEVICE
