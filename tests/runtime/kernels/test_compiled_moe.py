"""Every kernel that is shipped compiles for Hopper and Blackwell, without either, to what its tiles promise."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.kernels.conftest import ROOT

TABLE = Path(__file__).parent / "compiled_moe.json"
# of one program, of sm_90 and sm_100 alike
SHARED_MEMORY_BYTES = 227 * 1024
# what multiplies, by the scheme's part of a name; triton 3.7.1 has no instruction of Blackwell for int8 but the old one
HOPPER_CLASSES = {
    "bf16 a16": "HGMMA", "fp16 a16": "HGMMA", "fp8-channel a16": "HGMMA", "fp8-block a16": "HGMMA",
    "int8-channel a16": "HGMMA", "nvfp4 a16": "HGMMA", "fp8-channel a8": "QGMMA", "fp8-block a8": "QGMMA",
    "int8-w8a8 a8": "IGMMA",
}  # fmt: skip
BLACKWELL_CLASSES = {
    "bf16 a16": "tcgen05 f16", "fp16 a16": "tcgen05 f16", "fp8-channel a16": "tcgen05 f16",
    "fp8-block a16": "tcgen05 f16", "int8-channel a16": "tcgen05 f16", "nvfp4 a16": "tcgen05 f16",
    "fp8-channel a8": "tcgen05 f8f6f4", "fp8-block a8": "tcgen05 f8f6f4", "int8-w8a8 a8": "mma s8",
    "nvfp4 a4": "tcgen05 mxf4nvf4",
}  # fmt: skip
PRODUCT = re.compile(
    r"(?:GLM-4.5-Air (?:masked I=176 )?)?(?:up|down) (\S+ a\d+) (?:swap|wide) \d+x\d+x\d+(?: to codes)? sm_(90|100)"
)
# rows of 88 bytes: they begin where no descriptor can
_UNDESCRIBED = re.compile(r".* I=176 down nvfp4 .*")
# all in the subroutine of SwiGLU's division for quotients that are no normal numbers; contiguous rows have none of it
SPILLED_BYTES = {"GLM-4.5-Air masked I=176 up int8-channel a16 swap 128x128x64 sm_100": 16}

Kernels = dict[str, dict[str, Any]]


def breaches(name: str, made: dict[str, Any]) -> list[str]:
    """Return what a kernel does not keep of what is promised."""
    found = []
    if made["spilled_bytes"] > SPILLED_BYTES.get(name, 0):
        found.append(f"{name}: {made['spilled_bytes']} bytes spilled")
    if made["shared_bytes"] > SHARED_MEMORY_BYTES:
        found.append(f"{name}: {made['shared_bytes']} bytes of shared memory")
    if made["fused"]:
        found.append(f"{name}: {', '.join(made['fused'])}")
    if match := PRODUCT.fullmatch(name):
        expected = (HOPPER_CLASSES if match[2] == "90" else BLACKWELL_CLASSES)[match[1]]
        if made["instructions"] != expected:
            found.append(f"{name}: {made['instructions'] or 'no matrix instruction'} instead of {expected}")
        if made["bulk_copies"] == bool(_UNDESCRIBED.fullmatch(name)):
            found.append(f"{name}: weights are {'' if made['bulk_copies'] else 'not '}read by descriptors")
    return found


def differences(found: Kernels, expected: Kernels) -> list[str]:
    """Return where two tables differ, with the new value."""
    names = [*expected, *(name for name in found if name not in expected)]
    return [
        f"{name}: now {json.dumps(found.get(name))}, was {json.dumps(expected.get(name))}"
        for name in names
        if found.get(name) != expected.get(name)
    ]


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    """What came out when the table was made."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def compiled(child: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """What comes out now; machine code of unchanged sources is kept from run to run."""
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return child("compiled_moe", TRITON_CACHE_DIR=str(caches / "glm4moe" / "triton"))


def test_every_kernel_keeps_what_is_promised(compiled: dict[str, Any], tally: Callable[[str], None]) -> None:
    kernels: Kernels = compiled["kernels"]
    assert [line for name, made in kernels.items() for line in breaches(name, made)] == []
    products = [name for name in kernels if PRODUCT.fullmatch(name)]
    further = [name for name in products if name.startswith("GLM-4.5-Air")]
    assert len(products) - len(further) > 100
    assert len(further) >= 80
    assert {name.partition(" sm_")[2] for name in further if "masked I=176" in name} == {"90", "100"}
    assert SPILLED_BYTES.keys() <= kernels.keys()
    tally(
        f"compiled ahead of time: {len(kernels)} kernels for sm_90 and sm_100, {len(products)} of them products, "
        f"{len(further)} at GLM-4.5-Air's sizes"
    )


def test_resources_are_those_of_the_table(compiled: dict[str, Any], table: dict[str, Any]) -> None:
    if compiled["triton"] != table["triton"]:
        pytest.skip(f"the table is of triton {table['triton']}, this is {compiled['triton']}")
    assert differences(compiled["kernels"], table["kernels"]) == [], (
        "if the change is meant: python -m tests.runtime.kernels.compiled_moe --write"
    )


def test_the_table_is_of_the_pinned_triton(table: dict[str, Any]) -> None:
    assert f"\ntriton=={table['triton']}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


GOOD = {"registers": 126, "spilled_bytes": 0, "shared_bytes": 196640, "instructions": "HGMMA", "bulk_copies": True, "fused": []}  # fmt: skip  # noqa: E501
NAME = "up bf16 a16 swap 64x128x128 sm_90"


def test_what_is_as_promised_passes() -> None:
    assert breaches(NAME, GOOD) == []
    assert breaches(NAME.replace("sm_90", "sm_100"), GOOD | {"instructions": "tcgen05 f16"}) == []


@pytest.mark.parametrize(
    "change",
    [
        {"spilled_bytes": 8},
        {"shared_bytes": SHARED_MEMORY_BYTES + 1},
        {"instructions": "mma bf16"},
        {"instructions": "HGMMA + mma bf16"},
        {"instructions": ""},
        {"bulk_copies": False},
        {"fused": ["fma.rn.f32"]},
    ],
)
def test_what_is_not_is_seen(change: dict[str, Any]) -> None:
    assert len(breaches(NAME, GOOD | change)) == 1
    assert differences({NAME: GOOD | change}, {NAME: GOOD}) != []


def test_a_kernel_that_comes_or_goes_is_seen() -> None:
    assert differences({}, {NAME: GOOD}) != []
    assert differences({NAME: GOOD}, {}) != []
    assert differences({NAME: GOOD}, {NAME: GOOD}) == []
