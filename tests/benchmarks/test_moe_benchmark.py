"""The benchmark of MoE layers, dry: it goes through all of its steps, times nothing, and never a wrong result."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from benchmarks import moe
from benchmarks.moe_chart import roofline_svg, y_of
from benchmarks.moe_compile import blank_layer, cases
from benchmarks.moe_counts import count
from benchmarks.moe_inductor import DRY_SIZES, NAME
from benchmarks.moe_layers import ROUTINGS, Batch, make_batch, make_experts, make_layer
from benchmarks.moe_peers import Candidate, loop, ours
from benchmarks.moe_run import KINDS, Run
from benchmarks.moe_timing import LIMITS, Deadline, product_of_codes
from runtime.moe import cost
from runtime.moe.cost import H200, SHAPES, LayerShape
from runtime.moe.plan import BATCHED
from runtime.moe.weights import ExpertScheme

CPU = torch.device("cpu")
SHAPE = moe.TINY


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a dry run writes."""
    out = tmp_path_factory.mktemp("dry")
    assert moe.main(["--dry-run", "--out", str(out)]) == 0
    result = json.loads((out / "moe.json").read_text(encoding="utf-8"))
    return result | {"svg": (out / "moe.svg").read_text(encoding="utf-8")}


def test_a_dry_run_checks_everything_and_measures_nothing(dry: dict[str, Any]) -> None:
    assert not dry["is_measured"]
    assert dry["wrong"] == dry["left_out"] == []
    assert set(dry["limits"].values()) == {None}
    points = dry["points"]
    assert all(row["is_right"] and row["time"]["median_us"] is None for row in points)
    assert all("share_of_floor" not in row and row["time"]["launches"] is None for row in points)
    assert {(row["scheme"], row["inputs_as_codes"]) for row in points} == {(str(a), b) for a, b in KINDS}
    assert {row["routing"] for row in points} == set(ROUTINGS)
    assert {"triton", "cutlass", "batched", "an expert after the other", "transformers grouped_mm"} <= {
        row["candidate"] for row in points
    }
    assert "Liger-Kernel" in dry["absent"]
    fused = {(row["scheme"], row["inputs_as_codes"], row["fused"]) for row in dry["shared_expert_fused"]}
    assert fused == {(str(a), b, way) for a, b in KINDS for way in ("on", "off")}
    assert all("time" in row for row in dry["shared_expert_fused"])
    # few tokens go round copies of the layer, and all inputs were held against the reference
    layers = {(row["tokens"], row["scheme"]): row["layers_in_turn"] for row in points}
    assert (layers[1, "bf16"], layers[17, "bf16"], layers[1, "nvfp4"]) == (2, 1, 6)
    assert all(
        row["checked_inputs"] == max(2, row["layers_in_turn"]) for row in points if row["tokens"] in moe.TINY_TOKENS
    )
    assert {row["tokens"] for row in points if row["candidate"] == NAME} == set(DRY_SIZES)
    invariant = [row for row in dry["determinism"] if row["candidate"] == "triton, batch-invariant"]
    assert len(invariant) == 2
    assert all(row["other_bits"] == 0 for row in dry["determinism"])


def test_the_chart_of_a_dry_run_says_that_nothing_was_measured(dry: dict[str, Any]) -> None:
    ElementTree.fromstring(dry["svg"])
    assert "nothing here is measured" in dry["svg"]
    assert "<circle" not in dry["svg"]


def test_the_chart_has_a_dot_for_each_measured_size() -> None:
    row = {"candidate": "triton", "scheme": "bf16", "inputs_as_codes": False, "routing": "uniform", "tokens": 16}
    svg = roofline_svg(SHAPES["GLM-4.6"], H200, [row | {"time": {"median_us": 1100.0}}])
    assert svg.count("<circle") == 1
    assert "nothing here is measured" not in svg
    others = [row | {"beside_peers": True, "candidate": name, "is_ours": False, "time": {"median_us": time_us}}
              for name, time_us in (("a", 1300.0), ("b", 1200.0), ("c", None))]  # fmt: skip
    svg = roofline_svg(SHAPES["GLM-4.6"], H200, others)
    assert svg.count("<circle") == svg.count('fill="none" stroke="#1f77b4"/>') == 1
    assert f'cy="{y_of(1200.0):.1f}"' in svg


def forgets_the_last_slot(batch: Batch) -> torch.Tensor:
    """As a router does that drops the shared expert."""
    weights = make_layer(SHAPE, ExpertScheme.BF16, CPU)
    slots = batch.slots
    ids = slots.ids_TK.clone()
    ids[:, -1] = -1
    one = next(ours(make_experts(weights, is_quantized=False), CPU))
    return one.run(Batch(batch.hidden_TH, type(slots)(ids, slots.weights_TK, slots.num_experts, slots.num_shared)))


def fails(batch: Batch) -> torch.Tensor:
    raise ValueError("cannot")


def gives_no_number(batch: Batch) -> torch.Tensor:
    return torch.full_like(batch.hidden_TH, float("nan"))


@pytest.mark.parametrize("wrong", [forgets_the_last_slot, fails, gives_no_number, lambda batch: 2.5 * batch.hidden_TH])
def test_a_wrong_result_gets_no_time(wrong: Any) -> None:
    experts = make_experts(make_layer(SHAPE, ExpertScheme.BF16, CPU), is_quantized=False)
    right = next(ours(experts, CPU))
    run = Run(SHAPE, (3,), CPU, Deadline(60), num_batches=1)
    rows = run.point(experts, [Candidate("wrong", wrong, is_ours=True), right], "uniform", 3)
    found = {row["candidate"]: row for row in rows}
    assert found["triton"]["is_right"]
    assert "time" in found["triton"]
    assert not found["wrong"]["is_right"]
    assert not {"time", "launches", "time_without_graph"} & set(found["wrong"])


def test_a_wrong_result_of_ours_fails_the_run(tmp_path: Path) -> None:
    run = Run(SHAPE, (3,), CPU, Deadline(60), num_batches=1)
    experts = make_experts(make_layer(SHAPE, ExpertScheme.BF16, CPU), is_quantized=False)
    run.points = run.point(experts, [Candidate("wrong", fails, is_ours=True)], "uniform", 3)
    assert moe.finish(run, {"limits": {"read_bytes_per_s": None, "bf16_flop_per_s": None}}, tmp_path) == ["wrong"]


def test_what_fails_is_written_with_what_was_known_before(tmp_path: Path) -> None:
    run = Run(SHAPE, (3,), CPU, Deadline(60), num_batches=1)
    result: dict[str, Any] = {"limits": dict.fromkeys(LIMITS), "stages": {}, "failed": {}}
    moe.perform(run, "good", lambda: 7, result, tmp_path)

    def bad() -> None:
        raise RuntimeError("CUDA error")

    moe.perform(run, "bad", bad, result, tmp_path)
    written = json.loads((tmp_path / "moe.json").read_text(encoding="utf-8"))
    assert (written["good"], written["failed"]) == (7, {"bad": "RuntimeError: CUDA error"})
    assert list(written["stages"]) == ["good", "bad"]


def test_a_layer_of_real_width_has_only_numbers() -> None:
    """Enough random numbers that some are beyond what 8 bits hold."""
    shape = LayerShape(1024, 1024, 1, 1, 0)
    for scheme in (ExpertScheme.FP8_CHANNEL, ExpertScheme.INT8_CHANNEL):
        codes = make_layer(shape, scheme, CPU).up.codes.float()
        assert torch.isfinite(codes).all()
        # one that wraps around is nowhere near the mean of those beside it
        assert codes.abs().max() == {ExpertScheme.FP8_CHANNEL: 448, ExpertScheme.INT8_CHANNEL: 127}[scheme]


def test_whatever_is_measured_is_compiled_before() -> None:
    made = list(cases(SHAPES["GLM-4.6"], KINDS, moe.TOKENS))
    tiles = {(case.scheme, case.is_quantized, case.tiles) for case in made}
    assert len(tiles) == len(made)
    some = replace(made[0], scheme=ExpertScheme.NVFP4, num_tokens=64, is_batch_invariant=True)
    assert (some.scheme, some.is_quantized, some.tiles) in tiles
    # sizes and dtypes are those of layers that are measured
    small = LayerShape(256, 128, 2, 1)
    for scheme, _ in KINDS:
        blank, real = blank_layer(small, scheme), make_layer(small, scheme, CPU)
        for name in ("up", "down"):
            found, expected = asdict(getattr(blank, name)), asdict(getattr(real, name))
            kinds = [{key: (x.shape, x.dtype) for key, x in one.items() if x is not None} for one in (found, expected)]
            assert kinds[0] == kinds[1]


def test_an_end_of_a_part_comes_before_that_of_the_whole() -> None:
    whole = Deadline(100.0)
    assert whole.part(0.5).has(40)
    assert not whole.part(0.5).has(60)
    assert whole.has(60)


def test_what_does_not_fit_into_the_time_is_said() -> None:
    run = Run(SHAPE, (1, 3), CPU, Deadline(0), num_batches=1)
    for stage in moe.stages(run).values():
        stage()
    assert run.points == []
    assert run.absent[NAME] == "no time left"
    # each scheme for both sizes, bf16 beside others as well, and for the smallest with each routing that is not uniform
    assert len([name for name in run.left_out if " tokens" in name and ", " in name]) >= 2 * len(KINDS) + 2
    assert {"determinism, bf16", "shared expert, nvfp4, 1 tokens", "bf16, uniform, 3 tokens, beside others"} <= set(
        run.left_out
    )


def test_shares_are_of_the_measured_floor() -> None:
    limits = {"read_bytes_per_s": 4e12, "bf16_flop_per_s": 8e14, "fp8_flop_per_s": 1.2e15}
    row: dict[str, Any] = {"scheme": "bf16", "least_bytes": 4e9, "flop": 1e9, "flop_speedup": 1.0}
    row["time"] = {"median_us": 2000.0}
    moe.with_shares([row], limits)
    assert row["share_of_floor"] == pytest.approx(0.5)
    assert row["tflop_per_s"] == pytest.approx(0.5)
    # codes as fast as torch multiplies them; where it does not, twice as fast as bf16
    for scheme, least_us in (("fp8-block", 1000.0), ("int8-w8a8", 750.0)):
        codes = row | {"scheme": scheme, "least_bytes": 1e6, "flop": 1.2e12, "flop_speedup": 2.0}
        moe.with_shares([codes], limits)
        assert codes["share_of_floor"] == pytest.approx(least_us / 2000)
    row |= {"scheme": "fp8-block", "least_bytes": 1e6, "flop": 1.2e12, "flop_speedup": 2.0}
    moe.with_shares([row], limits | {"fp8_flop_per_s": None})
    assert row["share_of_floor"] == pytest.approx(750 / 2000)


def test_the_product_of_codes_is_one() -> None:
    left, right = (torch.randint(-8, 9, size).bfloat16() for size in ((32, 48), (48, 16)))
    assert torch.equal(product_of_codes(left, right)(0), left @ right)


def test_views_are_no_launches() -> None:
    values = torch.ones(4, 6)
    assert count(lambda: values.view(6, 4).T.unsqueeze(0)).launches == 0
    found = count(lambda: (values + 1) @ values.T)
    assert (found.launches, found.products, found.waits) == (2, 1, 0)
    # a sum reads and writes 96 bytes; the product reads 96 twice and writes 64
    assert found.num_bytes == 96 * 2 + 96 * 2 + 64
    assert found.product_rows == 4


def test_products_are_launched_as_computed() -> None:
    shape = LayerShape(64, 32, 40, 4)
    weights = make_layer(shape, ExpertScheme.BF16, CPU)
    batch = make_batch(shape, 24, "uniform", CPU, seed=0)
    counts = {
        one.name: count(lambda one=one: one.run(batch)) for one in ours(make_experts(weights, is_quantized=False), CPU)
    }
    assert counts["cutlass"].products == 2
    # 24 tokens of 5 slots over 41 experts: blocks of 4 rows
    computed = cost.products(BATCHED, shape, ExpertScheme.BF16, 24, 4)
    assert counts["batched"].products == computed.launches == 2
    assert counts["batched"].product_rows == 2 * computed.rows
    assert [counts[name].waits for name in ("cutlass", "batched")] == [0, 0]
    # an expert after the other: the host waits for their ids, and launches two products for each
    one_by_one = count(lambda: loop(weights).run(batch))
    assert one_by_one.products == 2 * (batch.num_distinct + 1)
    assert one_by_one.waits > 0
    assert one_by_one.launches > 5 * counts["cutlass"].launches
