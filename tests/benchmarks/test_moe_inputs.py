"""What a benchmark of MoE layers times was held against the reference before: each input, each copy, each graph."""

import multiprocessing
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import moe, moe_inductor, moe_run, moe_timing
from benchmarks.moe_cold import copies_of, num_layers
from benchmarks.moe_compile import blank_layer
from benchmarks.moe_counts import count
from benchmarks.moe_extras import apart, part_of, routed_only, shared_only
from benchmarks.moe_inductor import NAME
from benchmarks.moe_layers import Batch, make_batch, make_experts, make_layer
from benchmarks.moe_peers import Candidate, in_turn, ours
from benchmarks.moe_run import Run
from benchmarks.moe_timing import Deadline, Prepared, Timing
from runtime.moe import cost
from runtime.moe.cost import SHAPES
from runtime.moe.weights import ExpertScheme

CPU, SHAPE = torch.device("cpu"), moe.TINY
ENDED = "the process ended before it had said anything more"


def right_on_the_first_batch() -> Any:
    weights = make_layer(SHAPE, ExpertScheme.BF16, CPU)
    one, first = next(ours(make_experts(weights, is_quantized=False), CPU)), list[torch.Tensor]()

    def run(batch: Batch) -> torch.Tensor:
        first.append(batch.hidden_TH)
        return one.run(batch) * (1 if torch.equal(first[0], batch.hidden_TH) else 1.5)

    return run


def test_a_result_that_is_wrong_for_another_input_gets_no_time() -> None:
    experts = make_experts(make_layer(SHAPE, ExpertScheme.BF16, CPU), is_quantized=False)
    for num_batches, is_right in ((1, True), (3, False)):
        run = Run(SHAPE, (3,), CPU, Deadline(60), num_batches=num_batches)
        (row,) = run.point(experts, [Candidate("wrong", right_on_the_first_batch())], "uniform", 3)
        assert row["is_right"] == ("time" in row) == is_right


def test_what_a_graph_leaves_behind_is_looked_at_for_each_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph is stood in for by what it would leave behind."""
    left: dict[str, tuple[object, ...]] = {"good": (1, 2), "bad": (1, 3), "no graph": ()}
    monkeypatch.setattr(
        moe_timing, "prepared", lambda work, num, *, is_graphable: Prepared(work, 10, True, 4.0, left[work(0)])
    )
    monkeypatch.setattr(moe_timing, "round_us", lambda one, replays: 5.0)
    works: dict[str, Any] = {name: ((lambda _, name=name: name), True) for name in left}
    found = moe_timing.time_in_turn(works, 2, torch.device("cuda"), lambda number, result: result == number + 1)
    assert {name: (time.median_us, time.is_wrong) for name, time in found.items()} == {
        "good": (5.0, False), "bad": (None, True), "no graph": (5.0, False),
    }  # fmt: skip
    assert found["bad"].failure == "wrong in the graph: inputs [1]"


def test_a_wrong_graph_makes_the_result_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_run, "time_in_turn", lambda works, *_: {name: Timing(is_wrong=True) for name in works})
    experts = make_experts(make_layer(SHAPE, ExpertScheme.BF16, CPU), is_quantized=False)
    run = Run(SHAPE, (3,), CPU, Deadline(60), num_batches=1)
    assert [row["is_right"] for row in run.point(experts, [next(ours(experts, CPU))], "uniform", 3)] == [False]


def test_shared_experts_of_layers_in_turn_do_not_fit_into_caches() -> None:
    cache, shape = 50 << 20, SHAPES["GLM-4.6"]
    expected = {ExpertScheme.BF16: 4, ExpertScheme.FP8_BLOCK: 7, ExpertScheme.INT8_CHANNEL: 7, ExpertScheme.NVFP4: 12}
    for scheme, num in expected.items():
        experts = make_experts(blank_layer(shape, scheme), is_quantized=False)
        assert num_layers(experts, shape, cache) == num
        assert num * cost.bytes_per_weight(scheme) * shape.expert_weights > 3 * cache
    weights = make_layer(SHAPE, ExpertScheme.NVFP4, CPU)
    # an expert of the tiny layer has 13,824 bytes
    layers = copies_of(make_experts(weights, is_quantized=False), SHAPE, 13000)
    assert len(layers) == 3
    parts = [(one.weights.up.codes, one.weights.up.scales, one.weights.down.global_scale) for one in layers]
    for copy in parts[1:]:
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(copy, parts[0], strict=True))
    assert len({part.data_ptr() for copy in parts for part in copy}) == 9


@pytest.mark.parametrize("scheme", [ExpertScheme.BF16, ExpertScheme.FP8_BLOCK])
def test_a_shared_expert_apart_has_its_slots_before_it_is_timed(scheme: ExpertScheme) -> None:
    """They were made in each call, as up to four launches more that no model has."""
    experts = make_experts(make_layer(SHAPE, scheme, CPU), is_quantized=scheme is ExpertScheme.FP8_BLOCK)
    batch = make_batch(SHAPE, 3, "uniform", CPU, seed=0)
    weights, given = experts.weights, (routed_only(batch), shared_only(batch))
    halves = (slice(weights.num_routed), slice(weights.num_routed, None))
    parts = [next(ours(replace(experts, weights=part_of(weights, half)), CPU)) for half in halves]
    launches = [
        count(lambda one=one, some=some: one.run(some)).launches for one, some in zip(parts, given, strict=True)
    ]
    if scheme.is_plain:
        # by torch: two products, and SwiGLU in two
        launches[1] = 4
    run = apart(experts, [batch])
    assert count(lambda: run(batch)).launches == sum(launches) + 1


def test_inputs_go_round_batches_and_copies() -> None:
    made = in_turn([[Candidate("a", lambda batch, copy=copy: (copy, batch))] for copy in range(3)])
    (candidate,) = made
    assert candidate.num_inputs(["x", "y"]) == 3
    assert [candidate.on(["x", "y"])(number) for number in range(4)] == [(0, "x"), (1, "y"), (2, "x"), (0, "y")]


class SaysAndEnds:
    """Stands for a process: what it would do is done when it starts."""

    def __init__(self, target: Any, args: tuple[Any, ...], daemon: bool) -> None:
        self.start = lambda: target(*args)

    def kill(self) -> None: ...

    def join(self) -> None: ...


@pytest.mark.parametrize("answers", [["rows", "rows", "rows"], ["rows"], ["RuntimeError: cannot"]])
def test_a_layer_that_torch_compiles_is_measured_elsewhere(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    row = {"candidate": NAME, "tokens": 16, "is_right": True, "relative_error": 0.001}
    found = [[row] if answer == "rows" else answer for answer in answers]
    monkeypatch.setattr(moe_inductor, "_measured", lambda *_: iter(found))
    pipe = multiprocessing.Pipe
    context = SimpleNamespace(Pipe=pipe, Process=SaysAndEnds)
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: context)
    run = Run(SHAPE, (3,), torch.device("cuda"), Deadline(600), num_batches=1)
    moe_inductor.measure_compiled(run)
    assert run.points == [row | {"beside_peers": True}] * answers.count("rows")
    # nobody waits for what never comes
    assert run.absent.get(NAME, "") == {3: "", 1: answers[0] if " " in answers[0] else ENDED}[len(answers)]
