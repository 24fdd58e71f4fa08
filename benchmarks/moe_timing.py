"""Time on a GPU: CUDA graphs of several calls where they can be, events around replays, everyone in turn.

Without a GPU nothing is timed, and every figure is None.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

# calls in one graph, each with inputs of its own
CALLS = 10
ROUNDS = 5
# a round is as many replays as fit
ROUND_MS = 10.0
_WARM_UP = 2

Work = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call, over rounds; all None where nothing was measured."""

    median_us: float | None = None
    min_us: float | None = None
    max_us: float | None = None
    is_graph: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what a result file holds."""
        return asdict(self)


@dataclass(slots=True)
class Deadline:
    """What is left of the time that a run may take; what does not fit is left out and said."""

    seconds: float
    start: float = 0.0

    def __post_init__(self) -> None:
        """Begin now."""
        self.start = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    def has(self, seconds: float) -> bool:
        """Whether so much is left."""
        return self.elapsed_s + seconds < self.seconds


def prepared(work: Work, num_inputs: int, *, is_graphable: bool) -> tuple[Callable[[], object], bool]:
    """Return what runs CALLS calls, going round the inputs, and whether it is a graph: else the calls themselves."""

    def calls() -> None:
        for number in range(CALLS):
            work(number % num_inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(_WARM_UP):
            calls()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if not is_graphable:
        return calls, False
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            calls()
    except RuntimeError:
        # who waits for the device, or takes memory from it, cannot be captured
        torch.cuda.synchronize()
        return calls, False
    return graph.replay, True


def round_us(run: Callable[[], object], replays: int) -> float:
    """Return microseconds of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (replays * CALLS)


def time_in_turn(works: dict[str, tuple[Work, bool]], num_inputs: int, device: torch.device) -> dict[str, Timing]:
    """Return timings by name, a round of each in turn, so that the clocks' ups and downs fall on all alike.

    Args:
        works: by name, what takes the number of an input, and whether a graph can hold it.
        num_inputs: how many there are.
        device: on the CPU nothing is timed.
    """
    if device.type != "cuda":
        return dict.fromkeys(works, Timing())
    runs = {name: prepared(work, num_inputs, is_graphable=graph) for name, (work, graph) in works.items()}
    replays = {name: max(1, int(ROUND_MS * 1000 / (round_us(run, 1) * CALLS))) for name, (run, _) in runs.items()}
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, (run, _) in runs.items():
            rounds[name].append(round_us(run, replays[name]))
    return {name: _summary(rounds[name], is_graph=is_graph) for name, (_, is_graph) in runs.items()}


def _summary(times: Sequence[float], *, is_graph: bool) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), is_graph)


def launches(work: Work) -> int | None:
    """Return how many kernels, copies and fills one call launches on a GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    work(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work(0)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def floors(device: torch.device) -> dict[str, float | None]:
    """Return what the GPU can do: bytes a second read and copied, operations a second of a bf16 product."""
    if device.type != "cuda":
        return {"read_bytes_per_s": None, "copy_bytes_per_s": None, "bf16_flop_per_s": None}
    source = torch.randn(1 << 30, device=device)
    target, size = torch.empty_like(source), 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    works: dict[str, tuple[Work, bool]] = {
        "read": (reading(source), True),
        "copy": (lambda _: target.copy_(source), True),
        "product": (lambda _: left @ right, True),
    }
    found = {name: timing.median_us for name, timing in time_in_turn(works, 1, device).items()}
    assert all(found.values()), found
    return {
        "read_bytes_per_s": source.nbytes / (found["read"] * 1e-6),
        "copy_bytes_per_s": 2 * source.nbytes / (found["copy"] * 1e-6),
        "bf16_flop_per_s": 2 * size**3 / (found["product"] * 1e-6),
    }


def reading(source: torch.Tensor) -> Work:
    """Return what reads all of fp32 numbers and writes next to nothing."""
    from benchmarks.moe_read import sum_rows

    num_programs = 4 * torch.cuda.get_device_properties(source.device).multi_processor_count
    sums = torch.empty(num_programs, device=source.device)
    return lambda _: sum_rows[(num_programs,)](source, sums, source.numel(), TILE=4096, num_warps=8)
