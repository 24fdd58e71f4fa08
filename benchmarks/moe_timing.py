"""Time on a GPU: CUDA graphs of several calls where they can be, events around replays, everyone in turn.

Without a GPU nothing is timed, and every figure is None.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from triton.errors import TritonError

# calls in one graph, each with inputs of its own
CALLS = 10
ROUNDS = 5
# a round is as many replays as fit; of what takes longer there are fewer rounds
ROUND_MS = 10.0
_LONG_ROUND_MS, _LONG_ROUNDS = 50.0, 3
LIMITS = ("read_bytes_per_s", "copy_bytes_per_s", "bf16_flop_per_s", "fp8_flop_per_s")
# what a candidate that cannot do something may raise; triton's errors are no RuntimeError
FAILURES = (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError, TritonError)

Work = Callable[[int], object]
# whether the result for the input of a number is right
Check = Callable[[int, Any], bool]


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one call, over rounds; all None where nothing was measured.

    Args:
        median_us: of the rounds.
        min_us: the fastest.
        max_us: the slowest.
        is_graph: replays of a CUDA graph, in which nothing waits for the host.
        launches: kernels, copies and fills of one call; None where no graph holds them.
        failure: why there is no time, although the result was right before.
        is_wrong: what the graph left behind is not.
    """

    median_us: float | None = None
    min_us: float | None = None
    max_us: float | None = None
    is_graph: bool = False
    launches: float | None = None
    failure: str = ""
    is_wrong: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what a result file holds."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Deadline:
    """What is left of the time that a run may take; what does not fit is left out and said."""

    seconds: float
    start: float = field(default_factory=time.monotonic)

    @property
    def elapsed_s(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    def has(self, seconds: float) -> bool:
        """Whether so much is left."""
        return self.elapsed_s + seconds < self.seconds

    def part(self, share: float) -> "Deadline":
        """Return the end of a part of the run, which begins where the run did."""
        return Deadline(self.seconds * share, self.start)


@dataclass(frozen=True, slots=True)
class Prepared:
    """What runs a number of calls.

    Args:
        run: all of them.
        calls: how many.
        is_graph: they are one.
        launches: of one call.
        results: what a graph leaves behind for each input.
    """

    run: Callable[[], object]
    calls: int
    is_graph: bool = False
    launches: float | None = None
    results: tuple[object, ...] = ()


def prepared(work: Work, num_inputs: int, *, is_graphable: bool) -> Prepared:
    """Return CALLS calls or more, each input as often as the others: a graph if one can hold them, else as they are."""
    num_calls = -(-CALLS // num_inputs) * num_inputs

    def calls() -> list[object]:
        results: list[object] = [None] * num_inputs
        for number in range(num_calls):
            results[number % num_inputs] = work(number % num_inputs)
        return results

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for number in range(num_inputs):
            work(number)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    if not is_graphable:
        return Prepared(calls, num_calls)
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    try:
        with torch.cuda.graph(graph):
            results = calls()
        graph.instantiate()
    except RuntimeError:
        # who waits for the device, or takes memory from it, cannot be captured
        torch.cuda.synchronize()
        return Prepared(calls, num_calls)
    nodes = num_nodes(graph)
    launches = None if nodes is None else nodes / num_calls
    return Prepared(graph.replay, num_calls, True, launches, tuple(results))


def num_nodes(graph: torch.cuda.CUDAGraph) -> int | None:
    """Return the kernels, copies and fills of a graph that was kept: what a replay launches; None: not known."""
    count = ctypes.c_size_t()
    driver = ctypes.CDLL("libcuda.so.1")
    status = driver.cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    return count.value if status == 0 else None


def round_us(one: Prepared, replays: int) -> float:
    """Return microseconds of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(replays):
        one.run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000 / (replays * one.calls)


def time_in_turn(
    works: dict[str, tuple[Work, bool]], num_inputs: int, device: torch.device, is_right: Check | None = None
) -> dict[str, Timing]:
    """Return timings by name, a round of each in turn, so that the clocks' ups and downs fall on all alike.

    Args:
        works: by name, what takes the number of an input, and whether a graph can hold it.
        num_inputs: how many there are.
        device: on the CPU nothing is timed.
        is_right: asked of what each graph has left behind for each input after a replay; if it says no, the graph is
            not timed.
    """
    if device.type != "cuda":
        return dict.fromkeys(works, Timing())
    runs: dict[str, Prepared] = {}
    replays: dict[str, int] = {}
    timings: dict[str, Timing] = {}
    num_rounds: dict[str, int] = {}
    for name, (work, is_graphable) in works.items():
        try:
            one = prepared(work, num_inputs, is_graphable=is_graphable)
            calls_ms = round_us(one, 1) * one.calls / 1000
        except FAILURES as error:
            timings[name] = Timing(failure=reason(error))
            continue
        wrong = [number for number, result in enumerate(one.results) if is_right and not is_right(number, result)]
        if wrong:
            timings[name] = Timing(failure=f"wrong in the graph: inputs {wrong}", is_wrong=True)
            continue
        # what it left behind has been seen
        runs[name] = replace(one, results=())
        replays[name] = max(1, int(ROUND_MS / calls_ms))
        num_rounds[name] = _LONG_ROUNDS if calls_ms > _LONG_ROUND_MS else ROUNDS
    rounds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(ROUNDS):
        for name, one in runs.items():
            if number < num_rounds[name]:
                rounds[name].append(round_us(one, replays[name]))
    return timings | {name: _summary(rounds[name], one) for name, one in runs.items()}


def _summary(times: Sequence[float], one: Prepared) -> Timing:
    return Timing(statistics.median(times), min(times), max(times), one.is_graph, one.launches)


def reason(error: Exception) -> str:
    """Return why something failed, in a line."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def profiled_launches(work: Work) -> int:
    """Return how many kernels, copies and fills one call launches on a GPU, by the profiler.

    What it leaves behind slows launches down: for when all else has been timed.
    """
    from torch.profiler import ProfilerActivity, profile

    work(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work(0)
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in found.events())


def floors(device: torch.device) -> dict[str, float | None]:
    """Return what the GPU can do, by LIMITS: bytes read and copied, and operations of a product, a second."""
    if device.type != "cuda":
        return dict.fromkeys(LIMITS)
    source = torch.randn(1 << 30, device=device)
    target, size = torch.empty_like(source), 8192
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    works: dict[str, tuple[Work, bool]] = {
        "read": (reading(source), True),
        "copy": (lambda _: target.copy_(source), True),
        "product": (lambda _: left @ right, True),
        "product of codes": (product_of_codes(left, right), True),
    }
    amounts = (source.nbytes, 2 * source.nbytes, 2 * size**3, 2 * size**3)
    timings = time_in_turn(works, 1, device)
    # those that fail come first
    found = [timings[name].median_us for name in works]
    # who has no product of codes does without
    assert all(found[:3]), found
    limits = zip(LIMITS, amounts, found, strict=True)
    return {name: None if time_us is None else 1e6 * amount / time_us for name, amount, time_us in limits}


def product_of_codes(left_MK: torch.Tensor, right_KN: torch.Tensor) -> Work:
    """Return what multiplies two matrices as E4M3 codes by torch's own kernel, with a scale of 1 each."""
    codes_MK, codes_NK = (matrix.to(torch.float8_e4m3fn) for matrix in (left_MK, right_KN.T.contiguous()))
    one = torch.ones((), device=left_MK.device)
    return lambda _: torch._scaled_mm(codes_MK, codes_NK.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)


def reading(source: torch.Tensor) -> Work:
    """Return what reads all of fp32 numbers and writes next to nothing."""
    from benchmarks.moe_read import sum_rows

    num_programs = 4 * torch.cuda.get_device_properties(source.device).multi_processor_count
    sums = torch.empty(num_programs, device=source.device)
    return lambda _: sum_rows[(num_programs,)](source, sums, source.numel(), TILE=4096, num_warps=8)
