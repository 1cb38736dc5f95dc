"""Every kernel, every tile configuration and whole operator calls between guards (`guarded`).

The interpreter cuts rows into blocks of 65,536. Here, as on a GPU, blocks have at most 2,048, and
a fold holds rows of at most 1,024, so that all configurations run, at sizes next to those of their
blocks.
"""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch

import prefkern
from prefkern.objectives import build
from prefkern.ops import fold_state, torch_tiles
from support.machine import HAS_GPU

pytest.importorskip("triton")

import triton
import triton.language as tl

import prefkern_kernels as kernels
from prefkern_kernels import tiles
from support import guarded, launch_cases
from support.product import ACCURACY, PLAIN, TRANSFORMS, assert_right, truth

# One size of row for each block, the largest one of two blocks; and, with --long, all around them.
SIZES = [127, 129, 511, 1023, 2049]
MORE_SIZES = [1, 2, 128, 255, 256, 257, 512, 513, 1024, 1025, 2047, 2048, 4096, 6145]


def long(values: list) -> list:
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


@pytest.fixture
def blocks_of_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(tiles, "_LARGEST_BLOCK", 2048)
    monkeypatch.setattr(tiles, "FOLD_BLOCK", 1024)
    # Where blocks are of the interpreter's size, those of pairs are as well.
    monkeypatch.setattr(tiles, "INTERPRET", False)


def test_sizes_make_every_configuration(blocks_of_a_gpu):
    def configs(size: int) -> tuple[tiles.RowConfig, ...]:
        return tiles.row_config(size), tiles.pair_config(size), tiles.fold_config(size)

    assert {configs(size) for size in SIZES} == {configs(size) for size in range(1, 9000)}


@pytest.mark.parametrize("size", SIZES + long(MORE_SIZES))
@pytest.mark.parametrize("name", launch_cases.CASES)
def test_rows(name, size, blocks_of_a_gpu, device):
    """In every block size, between guards: the numbers are those of the twin in torch."""
    with guarded.launches() as launched:
        ours = launch_cases.CASES[name](kernels, size, device)
    assert launched == {f"_{launch_cases.launcher_of(name)}_kernel": 1}
    twins = launch_cases.CASES[name](torch_tiles, size, device)
    assert ours.keys() == twins.keys()
    for key, mine in ours.items():
        tolerance = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}[mine.dtype]
        # A sum of logits of both signs. Each is at most softcap / temperature = 13.3, so that its
        # last place is 1e-6; errors of either sign add up like a random walk, and four times that
        # is allowed (measured: at most 2.7). A logit left out or counted twice is 8.6 on average.
        atol = 4e-6 * size**0.5 + 5e-6 if key == "logit_sum" else 5e-6
        torch.testing.assert_close(
            mine, twins[key], rtol=tolerance, atol=atol, msg=lambda m, key=key: f"{key}: {m}"
        )


def product_configs() -> list[Any]:
    """Operands and configuration of every product that some device may use, each once."""
    found: dict[tuple[str, tiles.ProductConfig], None] = {}
    for table in tiles.PRODUCTS.values():
        for product, choice in table.items():
            found |= dict.fromkeys((product.operands, config) for config in choice.candidates)
    found |= {("half", config): None for config in tiles.FALLBACK.candidates}
    found |= {("float32", config): None for config in tiles._FALLBACK_FLOAT32.candidates}
    found |= {("half", config): None for config in tiles._INTERPRETED.candidates}
    return list(found)


def config_name(value: Any) -> str | None:
    if not isinstance(value, tiles.ProductConfig):
        return None
    flags = {"d": value.by_descriptor, "f": value.flatten, "s": value.specialize}
    sizes = (value.block_n, value.block_v, value.block_h, value.num_warps, value.num_stages)
    return (
        "x".join(map(str, sizes))
        + f"t{value.tiles}"
        + "".join(letter for letter, has in flags.items() if has)
    )


def run_product(operands, config, n, v, h, transform, bias, device) -> None:
    dtype = torch.bfloat16 if operands == "half" else torch.float32
    case = launch_cases.product(n, v, h, dtype, device)
    if bias:
        case["bias"] = torch.randn(v, device=device)
    with guarded.launches() as launched:
        kernels.product_fold(**case, config=config, **transform)
    assert launched["_product_fold_kernel"] == len(config.parts(v))
    assert launched["_merge_splits_kernel"] == 1
    state = fold_state.FoldState(
        *(case[name] for name in ("maximum", "total", "label_logit", "label_slope"))
    )
    arguments = (case[name] for name in ("hidden", "weight", "bias", "labels"))
    expected = truth(*arguments, **transform)
    assert_right(state, expected, ACCURACY[dtype], transform["softcap"])


@pytest.mark.parametrize(("operands", "config"), product_configs(), ids=config_name)
def test_products(operands, config, device):
    """One token past a block; entries for a whole tile and a cut one; columns past a block."""
    if HAS_GPU and config not in {
        c
        for product, choice in tiles.PRODUCTS.get(
            tiles.device_names(torch.device("cuda"))[1], {}
        ).items()
        for c in choice.candidates
        if product.operands == operands
    }:
        pytest.skip("a configuration of another device")
    n, v, h = config.block_n + 1, config.block_v + 65, config.block_h + 8
    run_product(operands, config, n, v, h, PLAIN, False, device)


@pytest.mark.long
@pytest.mark.parametrize(
    "sizes", [(1, 1, 8), (0, 0, 0), (-1, -1, -8), (2, 1, 9)], ids=lambda s: "_".join(map(str, s))
)
@pytest.mark.parametrize("transform", ["plain", "softcap"])
@pytest.mark.parametrize(("operands", "config"), product_configs(), ids=config_name)
def test_products_of_more_shapes(operands, config, transform, sizes, device):
    """Exactly a block, a little less, a little more, across splits, with bias and softcap."""
    if HAS_GPU:
        pytest.skip("configurations of other devices need not compile here")
    n, v, h = (
        block + more
        for block, more in zip(
            (config.block_n, config.block_v * (config.tiles % 5 + 1), config.block_h),
            sizes,
            strict=True,
        )
    )
    run_product(operands, config, n, v, h, TRANSFORMS[transform], True, device)


@pytest.mark.parametrize("ld_alpha", [None, 0.4])
@pytest.mark.parametrize("name", ["adadpo", "ipo", "hinge", "orpo", "alphadpo", "madpo"])
def test_pairs(name, ld_alpha, device):
    """Empty responses, and lengths around a block of 1,024."""
    lengths = torch.tensor([0, 1, 1023, 1024, 1025, 3], device=device)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    logps = -torch.rand(int(lengths.sum()), device=device)
    objective = build(name).to(device)
    options = objective.pair_kernel_options()
    assert options is not None
    options = {**options, "ld_alpha": ld_alpha}
    vectors = (-torch.rand(6, device=device), torch.randn(3, device=device))
    with guarded.launches() as launched:
        out = kernels.pair_loss(logps, offsets, *vectors, **options)
    assert launched == {"_pair_loss_kernel": 1}
    plain = kernels.pair_loss(logps, offsets, *vectors, **options)
    for mine, theirs in zip(out, plain, strict=True):
        if ld_alpha is None and mine is theirs is None:
            continue  # `whole`, which ld_alpha alone needs
        assert torch.equal(mine, theirs) and mine.isfinite().all()


# With the least workspace: a tile of tokens that is not full, and two tiles of entries, the second
# cut.
N, H, V = 9, 24, 200
LEAST = 1e-6
# Whole calls: name -> (what the head is, dtype, options).
CALLS: dict[str, tuple[bool, torch.dtype, dict[str, Any]]] = {
    "frozen": (False, torch.bfloat16, {"workspace_mb": LEAST}),
    "trained, recomputed": (True, torch.float16, {"workspace_mb": LEAST, "softcap": 5.0}),
    "trained, kept": (True, torch.float32, {"workspace_mb": 4}),
    "statistics": (False, torch.float32, {"workspace_mb": LEAST, "return_stats": True}),
}


def operator_case(dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, H, generator=generator).to(device, dtype)
    weight = torch.randn(V, H, generator=generator).to(device, dtype)
    bias = torch.randn(V, generator=generator).to(device, dtype)
    labels = torch.randint(V, (N,), generator=generator).to(device)
    labels[0], labels[1], labels[6:8] = 0, V - 1, -100
    return hidden, weight, bias, labels


def gradients(values: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, values.numel(), device=values.device).view(values.shape)
    (values * weights).sum().backward()
    found = [values.detach(), *(leaf.grad.clone() for leaf in leaves if leaf.grad is not None)]
    for leaf in leaves:
        leaf.grad = None
    return found


def assert_guarded_is_plain(call: Any, expected: set[str], exactly: bool = False) -> None:
    """Between guards the numbers are the same, and the expected kernels run."""
    plain = call()
    for pads_rows in (True, False) if exactly or HAS_GPU else (True,):
        with guarded.launches(pads_rows) as launched:
            values = call()
        assert set(launched) == {f"_{name}_kernel" for name in expected}
        for mine, theirs in zip(values, plain, strict=True):
            if mine.dtype == torch.bool or not pads_rows or HAS_GPU:
                assert torch.equal(mine, theirs)
            else:
                # numpy's product of padded rows may add in another order.
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CALLS)
def test_operator(name, device):
    trains, dtype, options = CALLS[name]
    hidden, weight, bias, labels = operator_case(dtype, device)
    hidden.requires_grad_()
    for leaf in (weight, bias):
        leaf.requires_grad_(trains)

    def call() -> list[torch.Tensor]:
        out = prefkern.linear_logprobs(hidden, weight, labels, bias, backend="triton", **options)
        if isinstance(out, torch.Tensor):
            return gradients(out, [hidden, weight, bias])
        return [x.detach() for x in out]

    expected = {"fold", "finish", "rescale_rows", "scatter_scaled"}
    if name == "trained, recomputed":
        expected |= {"remake_weights"}
    if name == "trained, kept":
        expected = {"fold", "finish", "settle", "scatter_scaled"}
    if name == "statistics":
        expected -= {"scatter_scaled"}
    assert_guarded_is_plain(call, expected, exactly=name == "trained, kept")


def test_operator_without_gradient(device, monkeypatch):
    monkeypatch.setenv("PREFKERN_PRODUCT_FOLD", "1")
    hidden, weight, bias, labels = operator_case(torch.float32, device)

    def call() -> list[torch.Tensor]:
        return [prefkern.linear_logprobs(hidden, weight, labels, bias, backend="triton")]

    assert_guarded_is_plain(call, {"product_fold", "merge_splits", "finish"})


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trained"])
def test_divergence(trains, device):
    hidden, weight, bias, labels = operator_case(torch.bfloat16, device)
    ref_hidden, ref_weight = hidden + 0.1, weight - 0.1
    hidden.requires_grad_()
    weight.requires_grad_(trains)

    def call() -> list[torch.Tensor]:
        out = prefkern.linear_kl(
            hidden, weight, labels, ref_hidden, ref_weight, bias, bias, backend="triton",
            workspace_mb=LEAST, softcap=7.0,
        )  # fmt: skip
        return gradients(out.logps - 2 * out.kl, [hidden, weight])

    of_gradients = "remake_weights" if trains else "rescale_rows"
    assert_guarded_is_plain(call, {"fold", "finish", "scatter_scaled", of_gradients})


def test_loss_with_an_adapter(device):
    hidden, weight, bias, labels = operator_case(torch.float32, device)
    hidden, labels = hidden[:8].view(4, 2, H), labels[:8].view(4, 2)
    lora = [torch.randn(4, 2, 3, device=device), torch.randn(V, 3, device=device)]
    leaves = [leaf.requires_grad_() for leaf in (hidden.detach(), *lora)]
    loss_fn = prefkern.FusedPreferenceLoss(build("adadpo"), backend="triton", workspace_mb=LEAST)

    def call() -> list[torch.Tensor]:
        out = loss_fn(
            leaves[0], weight, labels, bias, ref_logps=torch.full((4,), -40.0, device=device),
            lora_hidden=leaves[1], lora_weight=leaves[2],
        )  # fmt: skip
        return gradients(out.losses, leaves)

    names = {"fold", "finish", "rescale_rows", "remake_weights", "scatter_scaled", "pair_loss"}
    assert_guarded_is_plain(call, names)


def test_calls_reach_every_kernel():
    """The tests above name every kernel, so a new kernel must be guarded too."""
    named = {f"_{launch_cases.launcher_of(name)}_kernel" for name in launch_cases.CASES}
    named |= {"_product_fold_kernel", "_merge_splits_kernel", "_pair_loss_kernel"}
    assert {name for _, name in guarded.kernels()} == named


# The guards themselves.


@triton.jit
def _stray_kernel(
    in_ptr,
    out_ptr,
    stride,
    first_read,
    first_write,
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    mask = offsets < size
    value = tl.load(in_ptr + row * stride + first_read + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + row * stride + first_write + offsets, value, mask=mask)


@pytest.mark.parametrize(
    ("read", "write", "size"),
    [(0, 0, 8), (-1, 0, 8), (1, 0, 8), (0, -1, 8), (0, 1, 8), (0, 0, 9), (3, 3, 6)],
)
@pytest.mark.parametrize("between", [0, 4], ids=["rows touch", "rows apart"])
def test_a_stray_access_is_found(read, write, size, between, device):
    """A stray access before, after or between rows is found; one inside is not reported."""
    source, target = (
        torch.randn(3, 8 + between, device=device)[:, :8] for _ in range(2)
    )  # fmt: skip
    launch = guarded.guard(_stray_kernel)[(3,)]
    arguments = (source, target, source.stride(0), read, write, size)
    if (read, write, size) == (0, 0, 8):
        launch(*arguments, BLOCK=16)
        assert torch.equal(target, source)
        return
    if HAS_GPU and write == 0 and size == 8:
        launch(*arguments, BLOCK=16)
        assert target.isnan().any()
        return
    with pytest.raises(guarded.StrayAccess):
        launch(*arguments, BLOCK=16)


def test_overlapping_arguments_are_refused(device):
    whole = torch.zeros(20, device=device)
    launch = guarded.guard(_stray_kernel)[(1,)]
    with pytest.raises(AssertionError, match="overlap"):
        launch(whole[:10], whole[5:15], 8, 0, 0, 8, BLOCK=16)


def test_what_is_sanitized_is_everything(device, capsys):
    """The driver of `make sanitize` launches every kernel. Without its tools it says so."""
    import sanitize

    assert sanitize.drive(device) == set(guarded.LAUNCHERS)
    if sanitize.missing() is not None:
        assert sanitize.main() == 2
        assert "nothing was checked" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("statuses", "expected"), [((0, 0), 0), ((86, 0), 1), ((0, 86), 1), ((1, 0), 3), ((255, 86), 1)]
)
def test_what_a_tool_s_end_means(statuses, expected, monkeypatch, capsys):
    """Nothing found, errors found, or a tool that did not get to its end."""
    import sanitize

    commands = []

    def ran(command, **keywords):
        commands.append(command)
        return types.SimpleNamespace(returncode=([0, *statuses])[len(commands) - 1])

    monkeypatch.setattr(sanitize, "missing", lambda: None)
    monkeypatch.setattr(sanitize, "sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(sanitize.subprocess, "run", ran)
    assert sanitize.main() == expected
    assert [command[2] for command in commands[1:]] == ["memcheck", "racecheck"]
    assert all(command[-1] == "--drive" for command in commands)
    commands.clear()
    assert sanitize.main(["memcheck"]) == {0: 0, 86: 1}.get(statuses[0], 3)
    assert len(commands) == 2
