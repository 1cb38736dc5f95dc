"""Tuning: only when asked, timed by a stand-in clock, kept in a file that may be broken."""

from __future__ import annotations

import json

import pytest
import torch

kernels = pytest.importorskip("prefkern_kernels")

from prefkern_kernels import autotune, tiles

CANDIDATES = (
    tiles.ProductConfig(16, 32, 32, 4, 2),
    tiles.ProductConfig(32, 32, 32, 4, 2),
    tiles.ProductConfig(16, 64, 32, 4, 2, tiles=2),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("PREFKERN_AUTOTUNE", raising=False)
    monkeypatch.setattr(autotune, "_read", {})
    return autotune.cache_path()


@pytest.fixture
def table(monkeypatch):
    choice = tiles.Choice(CANDIDATES)
    monkeypatch.setattr(product_fold_module(), "product_choice_of", lambda *_: choice)


def product_fold_module():
    import sys

    return sys.modules["prefkern_kernels.product_fold"]


def a_key(**changes) -> autotune.Key:
    key = autotune.key_of(
        "product_fold", torch.device("cpu"), torch.bfloat16, "half", 64, 1000, True
    )
    return key._replace(**changes)


def clock(*times: float):
    """A timer that runs the call once and returns the next of these times."""
    remaining = list(times)

    def timer(call) -> float:
        call()
        return remaining.pop(0)

    return timer


def call(monkeypatch, device, **options) -> list[tiles.ProductConfig]:
    """The configurations whose strips one call of product_fold launches."""
    used = []
    module = product_fold_module()
    launch = module._launch_strips
    monkeypatch.setattr(
        module, "_launch_strips", lambda *a, **k: (used.append(a[9].config), launch(*a, **k))
    )
    hidden = torch.randn(5, 32, device=device)
    weight = torch.randn(64, 32, device=device)
    labels = torch.zeros(5, dtype=torch.int64, device=device)
    state = [torch.zeros(5, device=device) for _ in range(4)]
    kernels.product_fold(
        hidden, weight, None, labels, *state,
        logit_scale=1.0, softcap=None, temperature=1.0, **options,
    )  # fmt: skip
    monkeypatch.setattr(module, "_launch_strips", launch)
    return used


def test_the_fastest_is_kept_and_read_again(cache, monkeypatch):
    ran = []
    assert autotune.recall(a_key()) is None and not cache.exists()
    best = autotune.tune(a_key(), CANDIDATES, ran.append, clock(3.0, 1.0, 2.0))
    assert best == CANDIDATES[1] and tuple(ran) == CANDIDATES
    assert autotune.recall(a_key()) == best
    # As another process reads it.
    monkeypatch.setattr(autotune, "_read", {})
    assert autotune.recall(a_key()) == best
    entry = json.loads(cache.read_text())["entries"][str(a_key())]
    assert [time["milliseconds"] for time in entry["milliseconds"]] == [3.0, 1.0, 2.0]
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "another"},
        {"triton": "3.0.0"},
        {"operands": "float16"},
        {"hidden_size": 128},
        {"vocab_class": 2048},
        {"plain": False},
    ],
)
def test_a_measurement_holds_for_its_key_alone(changes):
    autotune.tune(a_key(), CANDIDATES, lambda config: None, clock(1.0, 2.0, 3.0))
    assert a_key().vocab_class == 1024
    assert autotune.recall(a_key(**changes)) is None


def test_entries_of_other_processes_are_kept(monkeypatch):
    autotune.tune(a_key(), CANDIDATES, lambda config: None, clock(1.0, 2.0, 3.0))
    monkeypatch.setattr(autotune, "_read", {})
    other = a_key(hidden_size=8)
    autotune.tune(other, CANDIDATES, lambda config: None, clock(2.0, 1.0, 3.0))
    assert autotune.recall(a_key()) == CANDIDATES[0]
    assert autotune.recall(other) == CANDIDATES[1]


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": 0, "entries": {}}',
        '{"format": 1, "entries": {"x": {}}}',
        '{"format": 1, "entries": {"x": {"config": {"block_n": 16}}}}',
        '{"format": 1, "entries": []}',
    ],
)
def test_a_broken_file_is_reported_and_replaced(content, cache, monkeypatch):
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    with pytest.warns(UserWarning, match="is not a file of tile configurations"):
        assert autotune.recall(a_key()) is None
    with pytest.warns(UserWarning, match="is not a file of tile configurations"):
        autotune.tune(a_key(), CANDIDATES, lambda config: None, clock(1.0, 2.0, 3.0))
    monkeypatch.setattr(autotune, "_read", {})
    assert autotune.recall(a_key()) == CANDIDATES[0]


def test_candidates_that_fail_are_left_out():
    def run(config):
        if config is not CANDIDATES[2]:
            raise RuntimeError("out of shared memory")

    assert autotune.tune(a_key(), CANDIDATES, run, clock(1.0)) == CANDIDATES[2]
    with pytest.raises(RuntimeError, match="no configuration of product_fold runs on cpu"):
        autotune.tune(a_key(), CANDIDATES[:2], run, clock())


def test_never_by_itself(cache, table, monkeypatch, device):
    assert call(monkeypatch, device) == [CANDIDATES[0]]
    assert not cache.exists()


def test_by_environment(cache, table, monkeypatch, device):
    """The first call tunes, the next one reads, and a process that does not tune reads as well."""
    monkeypatch.setenv("PREFKERN_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "_median", clock(3.0, 2.0, 1.0))
    assert call(monkeypatch, device)[-1] == CANDIDATES[2]
    assert call(monkeypatch, device) == [CANDIDATES[2]]
    monkeypatch.delenv("PREFKERN_AUTOTUNE")
    monkeypatch.setattr(autotune, "_read", {})
    assert call(monkeypatch, device) == [CANDIDATES[2]]
    monkeypatch.setenv("PREFKERN_AUTOTUNE", "0")
    assert call(monkeypatch, device) == [CANDIDATES[0]]


def test_by_function(table, monkeypatch, device):
    hidden, weight = torch.randn(5, 32, device=device), torch.randn(64, 32, device=device)
    best = kernels.tune_product_fold(hidden, weight, timer=clock(2.0, 1.0, 3.0))
    assert best == CANDIDATES[1]
    assert call(monkeypatch, device) == [CANDIDATES[1]]
    # What is given goes before what was measured.
    assert call(monkeypatch, device, config=CANDIDATES[0]) == [CANDIDATES[0]]


def test_table_is_whole():
    """Every architecture has every class, each candidate once, and says what was measured."""
    for arch, choices in tiles.PRODUCTS.items():
        for product, choice in choices.items():
            assert choice.candidates and len(set(choice.candidates)) == len(choice.candidates)
            assert not choice.beats_library or choice.measured
            for config in choice.candidates:
                assert not config.by_descriptor or arch in ("sm_90", "sm_100")
                assert not config.specialize or arch == "sm_100"
            assert tiles.product_choice("?", arch, product) is choice
    half = tiles.product_class(torch.bfloat16, True, 4096, plain=True)
    assert half == ("half", True, True)
    assert tiles.product_class(torch.float32, True, 640, plain=False) == ("tf32", False, False)
    assert tiles.product_class(torch.float32, False, 640, plain=False).operands == "float32"
    assert tiles.product_choice("?", "sm_75", half) is tiles.FALLBACK


def test_device_s_own_entry_goes_first(monkeypatch):
    half = tiles.product_class(torch.bfloat16, True, 4096, plain=True)
    own = tiles.Choice(CANDIDATES, measured="NVIDIA H200, triton 3.7.1")
    monkeypatch.setitem(tiles.PRODUCTS, "NVIDIA H200", {half: own})
    assert tiles.product_choice("NVIDIA H200", "sm_90", half) is own
    other = half._replace(plain=False)
    assert tiles.product_choice("NVIDIA H200", "sm_90", other) is tiles.PRODUCTS["sm_90"][other]


def test_splits_cover_the_vocabulary():
    config = tiles.ProductConfig(16, 128, 32, 4, 2, tiles=3)
    for vocab_size in (1, 63, 64, 127, 128, 129, 384, 385, 1000):
        parts = config.parts(vocab_size)
        assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
        assert parts[0].start == 0 and parts[-1].stop == vocab_size
        assert config.splits(vocab_size) == sum(part.splits for part in parts)
    assert config.splits(128 * 7) == 3 and config.splits(128 * 7 + 65) == 5
