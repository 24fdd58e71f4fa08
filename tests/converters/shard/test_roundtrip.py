"""Shards of random models under random mappings: merged they are the original, cut anew they are what a cut gives."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from builders import assert_same_tensors, read_tensors
from quantized import DIALECTS

from converters.errors import InputError
from converters.layout import Layout
from tests.converters.shard.models import PLAIN, Case, make, merge, random_case, rank_tensors, shard

FORMATS = [PLAIN, *DIALECTS]
PAIRS = [(dialect, layout) for dialect in FORMATS for layout in Layout]
NUM_CASES = len(PAIRS) + 12
SEED = 5


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def check(folder: Path, case: Case) -> None:
    src = make(folder, case)
    first = shard(src, folder / "first", case.first, case.files, max_shard_bytes=4000)
    merged = merge(first, folder / "merged")
    assert_same_tensors(read_tensors(merged), read_tensors(src))
    assert config_of(merged) == config_of(src)
    second = shard(first, folder / "second", case.second, case.files)
    expected = shard(src, folder / "expected", case.second, case.files)
    assert_same_tensors(rank_tensors(second), rank_tensors(expected))
    assert_same_tensors(read_tensors(merge(second, folder / "back")), read_tensors(src))


@pytest.fixture(scope="module")
def seen() -> Counter[str]:
    return Counter()


@pytest.mark.parametrize("number", range(NUM_CASES))
def test_merged_shards_are_the_original_bit_for_bit(work: Path, seen: Counter[str], number: int) -> None:
    """Sharded and merged; cut anew from the shards, which equals a cut of the original; and merged from there."""
    dialect, layout = PAIRS[number % len(PAIRS)]
    case = random_case(Random(SEED + number), dialect, layout)
    check(work, case)
    for mapping in (case.first, case.second):
        seen["mappings"] += 1
        seen["ep"] += mapping.ep > 1
        seen["experts cut inside an ep rank"] += 1 < mapping.ep < mapping.tp
        seen["pp"] += mapping.pp > 1
        seen["redundant experts"] += mapping.redundant_experts > 0
        seen["round-robin"] += mapping.ep > 1 and mapping.placement == "round-robin"
        seen["shared expert replicated"] += mapping.shared_experts == "replicate"
        seen["key-value heads repeated"] += mapping.tp > case.model["num_key_value_heads"]


def test_the_cases_were_various(seen: Counter[str], tally: Callable[[str], None]) -> None:
    """Looks at what the test above has seen, if all of it ran."""
    if seen["mappings"] < 2 * NUM_CASES:
        pytest.skip("not all of the cases ran")
    assert all(count >= 5 for count in seen.values()), seen
    facts = ", ".join(f"{count} {kind}" for kind, count in seen.items())
    tally(
        f"shard: {NUM_CASES} random models in {len(FORMATS)} formats and {len(Layout)} layouts sharded, merged, "
        f"cut anew and merged again, bit for bit: {facts}"
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_slice_is_seen(work: Path, seed: int) -> None:
    """One bit of one rank's file: what would be merged from it is not the original."""
    case = random_case(Random(seed), PLAIN, Layout.SPLIT)
    first = shard(make(work, case), work / "first", case.first, case.files)
    path = sorted(first.glob("rank*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="of rank 0: expected xxh3"):
        merge(first, work / "merged")
