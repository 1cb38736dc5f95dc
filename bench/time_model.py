"""A model of a call's time on a GPU: from bytes, operations and launches, without a GPU.

    launch = max(products, HBM, L2, instructions, special functions, latency) + the gap to the next
    call   = max(sum of its launches, what the host needs to launch them)

The figures of a device are public. What no data sheet says is a constant below, the same for every
device and for what prefkern is compared with.

L2 cache: a launch's reading of a region is served by L2 if all launches from the region's last use
to this one touch fewer bytes than the cache holds. A region that is written costs HBM when it is
evicted, or at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from launch_trace import Launch
from prefkern.ops.workspace import workspace_of_gpu

# What a large product reaches of its peak, a kernel that streams of HBM's and of L2's.
PRODUCT_SHARE, HBM_SHARE, L2_SHARE = 0.8, 0.9, 0.6
# What of L2 holds a kernel's data: Hopper's has two parts, and a part may hold the other's lines.
L2_FILL = 0.6
# From a load to its value on a busy device.
LATENCY = 0.8e-6
# Between two launches on the device, and the host's time for one.
GAP, HOST = 2e-6, 10e-6
# Output tiles of the library's products, and what a product of such tiles reaches.
PRODUCT_TILES = {(256, 128): 1.0, (128, 256): 1.0, (128, 128): 0.9, (64, 128): 0.7}
SPLITS_OF_A_PRODUCT = (1, 2, 4, 8)


@dataclass(frozen=True)
class Device:
    """Public figures of a device, dense and without sparsity."""

    name: str
    target: str
    source: str
    memory: float  # bytes
    half: float  # operations a second of bf16 products
    single: float  # of float32 products, as torch multiplies float32 by default
    hbm: float  # bytes a second
    l2: float  # bytes of the last cache before HBM
    l2_speed: float  # bytes a second
    processors: int
    clock: float
    # Of a processor:
    threads: int
    registers: int  # of 32 bits
    shared: int  # bytes
    lanes: int  # ordinary instructions of a thread in a clock
    special: int  # exponentials, logarithms and reciprocals in a clock
    granule: int = 8  # registers of a thread are handed out in so many
    warp: int = 32
    upcasts: bool = False  # no products of half-precision operands with a float32 result

    def workspace_mb(self, trains_head: bool) -> float:
        """The operator's default."""
        return workspace_of_gpu(self.memory, trains_head)


_MI300X = Device(
    "MI300X", "gfx942", "AMD Instinct MI300X data sheet and CDNA 3 whitepaper",
    192 * 2**30, 1307e12, 163e12, 5.3e12, 256 * 2**20, 17.2e12, 304, 2.1e9,
    threads=2048, registers=131_072, lanes=64, special=16, shared=65_536, warp=64,
)  # fmt: skip
_NVIDIA = {"threads": 2048, "registers": 65536, "lanes": 128, "special": 16}
DEVICES = [
    Device(
        "A100 80 GB", "sm_80", "NVIDIA A100 data sheet and GA100 whitepaper",
        80 * 2**30, 312e12, 19.5e12, 2.039e12, 40 * 2**20, 5120 * 1.41e9, 108, 1.41e9,
        **(_NVIDIA | {"lanes": 64}), shared=167_936,
    ),
    Device(
        "H100 SXM", "sm_90", "NVIDIA H100 data sheet and GH100 whitepaper",
        80 * 2**30, 989e12, 67e12, 3.35e12, 50 * 2**20, 5120 * 1.83e9, 132, 1.83e9,
        **_NVIDIA, shared=233_472,
    ),
    Device(
        "H200 SXM", "sm_90", "NVIDIA H200 data sheet and GH100 whitepaper",
        141e9, 989e12, 67e12, 4.8e12, 50 * 2**20, 5120 * 1.83e9, 132, 1.83e9,
        **_NVIDIA, shared=233_472,
    ),
    Device(
        "B200", "sm_100", "NVIDIA HGX B200 data sheet",
        180e9, 2250e12, 75e12, 8e12, 126 * 2**20, 2 * 5120 * 1.85e9, 148, 1.85e9,
        **_NVIDIA, shared=233_472,
    ),
    _MI300X,
    replace(_MI300X, name="MI300X, float32 operands", upcasts=True),
]  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What a model needs of a compiled kernel; `support.compile_ahead` reads it."""

    registers: int
    shared: int
    num_warps: int
    block: int
    instructions: float  # of a thread, for each element of a row
    special: float

    def resident(self, device: Device) -> tuple[int, str]:
        """Programs that a processor holds at once, and what bounds them."""
        threads = self.num_warps * device.warp
        registers = -(-max(self.registers, 1) // device.granule) * device.granule
        # NVIDIA reserves one KiB of shared memory for each program.
        shared = self.shared + (1024 if device.warp == 32 else 0)
        bounds = {
            "threads": device.threads // threads,
            "registers": device.registers // (registers * threads),
            "shared memory": device.shared // max(shared, 1),
            "programs": 32 if device.warp == 32 else 16,
        }
        bound = min(bounds, key=lambda name: bounds[name])
        return bounds[bound], bound


@dataclass
class Cost:
    """Of one launch or of several."""

    launches: int = 0
    operations: float = 0.0  # of products
    hbm: float = 0.0  # bytes
    l2: float = 0.0  # bytes that kernels ask for, each operand once for each reading
    seconds: float = 0.0
    bounds: dict[str, float] = field(default_factory=dict)  # seconds by what bounds them

    def add(self, other: Cost) -> None:
        self.launches += other.launches
        self.operations += other.operations
        self.hbm += other.hbm
        self.l2 += other.l2
        self.seconds += other.seconds
        for bound, seconds in other.bounds.items():
            self.bounds[bound] = self.bounds.get(bound, 0.0) + seconds

    @property
    def bound(self) -> str:
        """What bounds most of the time."""
        return max(self.bounds, key=lambda name: self.bounds[name]) if self.bounds else ""


@dataclass
class _Line:
    """The last use of a region."""

    at: float  # bytes that had been touched before it
    writer: int | None  # the launch that wrote it, if HBM does not have it yet
    bytes: float


def memory_bytes(launches: Sequence[Launch], device: Device) -> list[float]:
    """HBM's bytes of each launch, by the model of L2 in the module's docstring."""
    capacity, touched = L2_FILL * device.l2, 0.0
    lines: dict[tuple, _Line] = {}
    moved = [0.0] * len(launches)
    for number, launch in enumerate(launches):
        reads = {region.key: region for region in launch.reads}
        writes = {region.key: region for region in launch.writes}
        for key, region in (reads | writes).items():
            line = lines.get(key)
            is_held = line is not None and touched - line.at + region.bytes <= capacity
            writer = line.writer if line is not None and is_held else None
            if line is not None and line.writer is not None and not is_held:
                moved[line.writer] += line.bytes
            if key in reads and not is_held:
                moved[number] += region.bytes
            if key in writes:
                writer = number
            lines[key] = _Line(touched, writer, region.bytes)
        touched += sum(region.bytes for region in (reads | writes).values())
    for line in lines.values():
        if line.writer is not None:
            moved[line.writer] += line.bytes
    return moved


def product_seconds(rows: int, columns: int, inner: int, dtype: str, device: Device) -> float:
    """The best of the library's tiles and splits of the inner size, by whole waves of tiles."""
    peak = device.single if dtype == "float32" else device.half
    a_processor = PRODUCT_SHARE * peak / device.processors
    best = math.inf
    for (block_m, block_n), reached in PRODUCT_TILES.items():
        for splits in SPLITS_OF_A_PRODUCT:
            tiles = -(-rows // block_m) * -(-columns // block_n) * splits
            waves = -(-tiles // device.processors)
            operations = 2 * block_m * block_n * inner / splits
            seconds = waves * operations / (a_processor * reached)
            if splits > 1:
                # Partial results are written and read once more.
                seconds += 8 * splits * rows * columns / (L2_SHARE * device.l2_speed)
            best = min(best, seconds)
    return best


def launch_cost(launch: Launch, hbm_bytes: float, device: Device) -> Cost:
    """What one launch takes."""
    l2_bytes = sum(region.bytes for region in (*launch.reads, *launch.writes))
    times: dict[str, float] = {}
    operations = 0.0
    if launch.product is not None:
        rows, columns, inner, dtype = launch.product
        operations = 2.0 * rows * columns * inner
        times["products"] = product_seconds(rows, columns, inner, dtype, device)
    compiled: Compiled | None = launch.compiled
    if compiled is not None:
        slots = compiled.resident(device)[0] * device.processors
        if launch.readings > 1:
            again = 4.0 * launch.tiles * launch.rows * launch.row_size * (launch.readings - 1)
            l2_bytes += again
            in_flight = min(slots, launch.rows) * launch.row_bytes
            hbm_bytes += 0.0 if in_flight <= L2_FILL * device.l2 else again
        elements = launch.rows * launch.row_size * launch.share
        speed = device.processors * device.clock
        times["instructions"] = elements * compiled.instructions / (device.lanes * speed)
        times["special functions"] = elements * compiled.special / (device.special * speed)
        # A program waits for each block of its row, and moves its bytes at its processor's share.
        blocks = launch.share * launch.readings * -(-launch.row_size // compiled.block)
        steps = blocks + launch.serial
        streams = hbm_bytes / launch.rows / (HBM_SHARE * device.hbm / device.processors)
        times["latency"] = -(-launch.rows // slots) * (steps * LATENCY + streams)
    times["HBM"] = hbm_bytes / (HBM_SHARE * device.hbm)
    times["L2"] = l2_bytes / (L2_SHARE * device.l2_speed)
    if launch.product is not None:
        # A product's tiles are multicast and held in shared memory: its rate says what they cost.
        del times["L2"]
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound] + GAP
    return Cost(1, operations, hbm_bytes, l2_bytes, seconds, {bound: seconds})


def call_cost(launches: Sequence[Launch], device: Device) -> dict[str, Cost]:
    """The cost of each kernel of a call; "products" are apart for each dtype."""
    costs: dict[str, Cost] = {}
    for launch, hbm_bytes in zip(launches, memory_bytes(launches, device), strict=True):
        costs.setdefault(launch.kernel, Cost()).add(launch_cost(launch, hbm_bytes, device))
    return costs


def total(costs: dict[str, Cost]) -> Cost:
    """All kernels together, at least as long as the host launches them."""
    whole = Cost()
    for cost in costs.values():
        whole.add(cost)
    whole.seconds = max(whole.seconds, whole.launches * HOST)
    return whole


def plain_seconds(tokens: int, hidden: int, vocab: int, nhv: float, device: Device) -> float:
    """Plain bf16 products of the same size and as many operations: the denominator of targets."""
    logit = Launch("product", [], [], product=(tokens, vocab, hidden, "bfloat16"))
    moved = 2.0 * (tokens * vocab + tokens * hidden + vocab * hidden)
    return nhv / 2 * launch_cost(logit, moved, device).seconds


def as_record(costs: dict[str, Cost]) -> dict[str, dict[str, Any]]:
    """For JSON: rounded, since more digits say nothing."""

    def rounded(value: float) -> float:
        return float(f"{value:.4g}")

    return {
        name: {
            "launches": cost.launches,
            "operations": rounded(cost.operations),
            "hbm_bytes": rounded(cost.hbm),
            "l2_bytes": rounded(cost.l2),
            "ms": rounded(1e3 * cost.seconds),
            "bound": cost.bound,
        }
        for name, cost in costs.items()
    }
