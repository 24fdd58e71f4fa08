"""The triton backend with its kernels, in the interpreter: which takes a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtime.moe.interpreted_rows import KINDS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """What the program says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    # threads that wait for each other make small products slow
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.moe.interpreted"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_kernels_stay_within_budget_of_fp64(found):
    others = ("rounded", "rank", "norm", "bits")
    shares = {
        name: share for name, share in found.items() if name != "block" and not any(other in name for other in others)
    }
    assert len(shares) == 11
    assert max(shares.values()) <= 1, shares
    # a budget that nothing comes near would allow anything
    assert max(shares.values()) > 0.01, shares


def test_codes_are_multiplied_as_their_values(found):
    """Sums between the two roundings differ in last places, which seldom take a code to its neighbour."""
    shares = {name: share for name, share in found.items() if "rounded" in name}
    assert len(shares) == 5
    assert max(shares.values()) < 0.05, shares


def test_block_of_kernels_equals_the_loop_over_experts(found):
    """fp32 both: some hundred additions in another order."""
    assert found["block"] < 1e-5


def test_ranks_of_kernels_add_up_to_one_rank_bit_for_bit(found):
    """Tiles are the same for any number of rows, so that it does not matter with which others a row is."""
    differences = {name: value for name, value in found.items() if "rank" in name}
    assert len(differences) == 8
    assert set(differences.values()) == {0.0}, differences


def test_residual_and_norm_of_the_last_launch_are_those_behind_the_block(found):
    differences = {name: value for name, value in found.items() if name.startswith("norm, ")}
    assert len(differences) == 4
    assert max(differences.values()) < 1e-5, differences


def test_row_is_the_same_alone_in_any_batch_and_in_any_place(found):
    """1, 3 and 17 of 40 tokens, the last in another order, through router, experts and sum."""
    counts = {name: count for name, count in found.items() if name.startswith("bits, ")}
    # where tiles follow the number of tokens, a row is not: the comparison can fail
    assert counts.pop("bits, tiles by tokens") > 0
    assert set(counts) == {f"bits, {name}" for name in KINDS}
    assert set(counts.values()) == {0}, counts


def test_codes_that_up_writes_are_those_of_a_launch_of_their_own(found):
    assert found["bits of codes"] == 0
