"""The tuner, dry: every variant is held against the twin, what has no room is not compiled, and nothing is timed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import moe_tune
from benchmarks.moe_compile import Case
from benchmarks.moe_layers import make_experts, make_layer
from benchmarks.moe_run import KINDS
from benchmarks.moe_timing import Deadline, Timing
from benchmarks.moe_tune import Tuning, fastest, suggestion
from benchmarks.moe_variants import BOTH, DOWN, UP, Variant, changes, least_shared_bytes, refusal, tiles_of, variants
from runtime.kernels.moe.configs import HOPPER, SHARED_MEMORY_BYTES, SHIPPED
from runtime.moe.cost import SHAPES
from runtime.moe.fused_ops import FusedOps
from runtime.moe.weights import ExpertScheme

ROOT = Path(__file__).parents[2]
COMPILED = ROOT / "tests" / "runtime" / "kernels" / "compiled_moe.json"
CPU, SHAPE = torch.device("cpu"), SHAPES["GLM-4.6"]
BF16, FP8_BLOCK = ExpertScheme.BF16, ExpertScheme.FP8_BLOCK


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a dry run of two schemes writes; the interpreter takes a process of its own."""
    out = tmp_path_factory.mktemp("tune")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(out / "triton"), "PYTHONPATH": str(ROOT)}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/moe_tune.py", "--dry-run", "--out", str(out)]
    command += ["--kind", "bf16", "--kind", "fp8-block, codes", "--tokens", "4", "--tokens", "512"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads((out / "moe_tune.json").read_text(encoding="utf-8"))


def test_a_dry_run_checks_all_variants_and_times_none(dry: dict[str, Any]) -> None:
    assert not dry["is_measured"]
    assert dry["left_out"] == []
    assert [(point["scheme"], point["tokens"]) for point in dry["points"]] == [
        (str(scheme), tokens) for scheme in (BF16, FP8_BLOCK) for tokens in (4, 512)
    ]
    rows = [row for point in dry["points"] for row in point["variants"]]
    run = [row for row in rows if "refused" not in row]
    assert all(row["is_right"] and row["time"]["median_us"] is None for row in run)
    # kernels, and not the twin beside itself
    assert max(row["relative_error"] for row in run) > 0
    assert not any("suggested" in point for point in dry["points"])
    refused = {(row["op"], row["change"]) for row in rows if "refused" in row}
    assert (UP, "up.num_stages 4 -> 5") in refused
    assert (DOWN, "down.block_n 128 -> 256") in refused
    assert not any("time" in row for row in rows if "refused" in row)


def test_a_dry_run_asks_for_the_interpreter() -> None:
    with pytest.raises(SystemExit, match="TRITON_INTERPRET"):
        moe_tune.main(["--dry-run"])


def test_all_that_is_chosen_is_varied_and_forms_on_both_sides_are_tried() -> None:
    def varied(scheme: ExpertScheme, num_tokens: int, *, is_quantized: bool = False) -> set[str]:
        found = variants(SHAPE, scheme, num_tokens, is_quantized=is_quantized)
        assert found[0].tiles == tiles_of(SHAPE, scheme, num_tokens, is_quantized=is_quantized)
        assert len({one.tiles for one in found}) == len(found)
        # rows are laid out once, for both products
        assert all(one.tiles.up.block_m == one.tiles.down.block_m for one in found)
        return {one.split()[0] for variant in found for one in variant.change.split(", ") if one}

    fields = {f"{op}.{name}" for op in (UP, DOWN) for name in ("block_n", "num_warps", "num_stages", "persistent")}
    # up to 5 tokens rows by themselves, from 960 on tokens on the wide side
    assert varied(BF16, 4) == {"is_gemv"}
    assert fields | {"is_gemv", "up.block_m"} <= varied(BF16, 8)
    assert fields | {"up.swap_ab", "down.swap_ab"} <= varied(BF16, 512) & varied(BF16, 1024)
    for scheme, is_quantized in KINDS:
        for num_tokens in moe_tune.TOKENS:
            names = varied(scheme, num_tokens, is_quantized=is_quantized)
            assert names == {"is_gemv"} or fields <= names
            # weights that are widened stay on the wide side
            assert "up.swap_ab" not in names or is_quantized or scheme is BF16


def test_what_is_refused_has_no_room_by_what_compilers_take() -> None:
    """Never more than what tiles that were compiled have, and hardly less: the rest is scales."""
    kernels = json.loads(COMPILED.read_text(encoding="utf-8"))["kernels"]
    shipped = [one for one in SHIPPED if one.capability == HOPPER]
    assert len(shipped) > 40
    for one in shipped:
        least = least_shared_bytes(one.scheme, one.config, is_quantized=one.is_quantized)
        found = kernels[one.name]["shared_bytes"]
        assert least <= found < 1.1 * least, one.name


def test_room_is_known_before_anything_is_compiled() -> None:
    tiles = tiles_of(SHAPE, BF16, 512, is_quantized=False)
    assert refusal(BF16, tiles, is_quantized=False) == ""
    deep = replace(tiles, down=replace(tiles.down, num_stages=5))
    assert refusal(BF16, deep, is_quantized=False) == f"down: 245760 bytes of shared memory, of {SHARED_MEMORY_BYTES}"
    assert refusal(FP8_BLOCK, deep, is_quantized=True) == ""


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)


@pytest.mark.usefixtures("twins")
def test_the_fastest_of_each_product_are_tried_together_and_suggested(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = variants(SHAPE, BF16, 8, is_quantized=False)
    place = {variant.change: str(number) for number, variant in enumerate(tried)}
    fast = {place["up.num_stages 4 -> 3"]: 80.0, place["down.block_n 128 -> 64"]: 90.0}
    asked: list[int] = []

    def timed(works: dict[str, Any], *_: Any) -> dict[str, Timing]:
        asked.append(len(works))
        us = fast if len(asked) == 1 else {"1": 75.0}
        return {name: Timing(us.get(name, 100.0), us.get(name, 100.0), us.get(name, 100.0)) for name in works}

    monkeypatch.setattr(moe_tune, "time_in_turn", timed)
    experts = make_experts(make_layer(moe_tune.TINY, BF16, CPU), is_quantized=False)
    found = Tuning(SHAPE, CPU, Deadline(60)).point(experts, 8)
    assert asked == [len(tried) - len([row for row in found["variants"] if "refused" in row]), 2]
    assert found["suggested"] == ["up.num_stages 4 -> 3", "down.block_n 128 -> 64"]
    assert found["rows_per_expert"] == pytest.approx(0.4)


@pytest.mark.usefixtures("twins")
def test_a_form_is_suggested_where_up_and_down_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The chosen tiles were taken for a variant when they were timed again, and no boundary was ever suggested."""

    def timed(works: dict[str, Any], *_: Any) -> dict[str, Timing]:
        return {name: Timing(us, us, us) for name, us in zip(works, (100.0, 50.0), strict=True)}

    monkeypatch.setattr(moe_tune, "time_in_turn", timed)
    experts = make_experts(make_layer(moe_tune.TINY, BF16, CPU), is_quantized=False)
    found = Tuning(SHAPE, CPU, Deadline(60)).point(experts, 4)
    assert [row["change"] for row in found["again"]] == ["", "is_gemv True -> False"]
    assert found["suggested"] == ["is_gemv True -> False", "GEMV_ROWS 0.3 -> at most 0.2"]


@pytest.mark.usefixtures("twins")
def test_wrong_tiles_get_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedOps.of_twins()

    def wrong_down(*args: Any, **kwargs: Any) -> torch.Tensor:
        return right.down(*args, **kwargs).mul_(1.02)

    monkeypatch.setattr(FusedOps, "of_kernels", lambda: replace(right, down=wrong_down))
    # of_twins is what those are held against
    experts = make_experts(make_layer(moe_tune.TINY, BF16, CPU), is_quantized=False)
    found = Tuning(SHAPE, CPU, Deadline(60)).point(experts, 8)
    # a GEMV has another down
    rows = [row for row in found["variants"] if "refused" not in row and "is_gemv" not in row["change"]]
    assert len(rows) > 5
    assert not any(row["is_right"] or "time" in row for row in rows)


def test_only_what_is_clearly_faster_is_better() -> None:
    tiles = tiles_of(SHAPE, BF16, 8, is_quantized=False)
    base, other = Variant("", "", tiles), Variant(UP, "x", replace(tiles, is_gemv=True))

    def row(low: float, median: float, high: float, *, is_right: bool = True) -> dict[str, Any]:
        return {"is_right": is_right, "time": Timing(median, low, high).as_dict()}

    ours = row(99, 100, 101)
    assert fastest(base, [(base, ours), (other, row(89, 90, 91))]) is other
    assert fastest(base, [(base, ours), (other, row(98.2, 98.5, 98.8))]) is base
    assert fastest(base, [(base, ours), (other, row(80, 90, 100))]) is base
    assert fastest(base, [(base, ours), (other, row(89, 90, 91, is_right=False))]) is base
    assert fastest(base, [(base, {"is_right": False}), (other, row(89, 90, 91))]) is base


def test_a_form_on_the_other_side_moves_its_boundary() -> None:
    tiles = tiles_of(SHAPE, BF16, 8, is_quantized=False)
    gemv = replace(tiles, is_gemv=True)
    base, other = Variant("", "", tiles), Variant(BOTH, "", gemv)
    assert suggestion(base, other, 0.4) == ["is_gemv False -> True", "GEMV_ROWS 0.3 -> more than 0.4"]
    assert suggestion(other, base, 0.2) == ["is_gemv True -> False", "GEMV_ROWS 0.3 -> at most 0.2"]
    small, wide = (tiles_of(SHAPE, BF16, size, is_quantized=False) for size in (512, 1024))
    moved = suggestion(Variant("", "", wide), Variant(BOTH, "", small), 51.2)
    assert moved == [*changes(wide, small), "WIDE_ROWS 48.0 -> more than 51.2"]


def test_all_that_has_room_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Case] = []
    monkeypatch.setattr(moe_tune, "capability_of", lambda _: HOPPER)
    monkeypatch.setattr(moe_tune, "compile_all", lambda cases, seconds: found.extend(cases))
    tuning = Tuning(SHAPE, torch.device("cuda"), Deadline(540), (8, 512))
    moe_tune.compile_ahead(tuning, [(BF16, False)])
    expected = {one.tiles for size in (8, 512) for one in variants(SHAPE, BF16, size, is_quantized=False)}
    expected = {tiles for tiles in expected if not refusal(BF16, tiles, is_quantized=False)}
    assert len(found) == len(expected) > 10
    assert {case.tiles for case in found} == expected
