"""Faults are caught and the right layer is named where only the level `layers` looks."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from converters.layout import Layout
from converters.shard.mapping import ParallelMapping
from runtime.verify.tokens import EncodedText
from tests.faults.planted.at_layers import CASES, Case, Seen, judge, section, text
from tests.faults.planted.clean import convert, cut, quantize
from tests.faults.planted.copies import BF16, TINY, Copies
from tests.faults.planted.table import DOCUMENT, at_layers, new_room

# what these do in FP8 is less than its own rounding
_BELOW_ROUNDING = {"one expert times 1.01", "lowest bit of one element flipped"}
CLEAN: dict[str, Callable[[Path], Path]] = {
    "fused": lambda to: convert(TINY, to, layout=Layout.FUSED),
    "fp16": lambda to: convert(TINY, to, dtype="float16"),
    "fp8": lambda to: quantize(TINY, to, scheme="fp8"),
    "int8": lambda to: quantize(TINY, to, scheme="int8"),
    "nvfp4": lambda to: quantize(TINY, to, scheme="nvfp4-weight-only"),
    "cut for ranks": lambda to: cut(TINY, to, ParallelMapping(tp=2, ep=2)),
}


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    folder = new_room()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def copies(room: Path) -> Copies:
    return Copies(room)


@pytest.fixture(scope="module")
def read() -> EncodedText:
    return text()


@pytest.fixture(scope="module")
def seen() -> list[Seen]:
    """What came out so far."""
    return []


@pytest.mark.parametrize("case", CASES, ids=[f"{case.number}-{case.form}" for case in CASES])
def test_layers_name_the_fault(room: Path, copies: Copies, read: EncodedText, seen: list[Seen], case: Case) -> None:
    found = at_layers(copies, case, room, read)
    seen.append(found)
    if case.form == BF16 or case.title not in _BELOW_ROUNDING:
        assert found.is_named, found.report.reasons
        assert found.report.first_off == case.expected[0]


@pytest.mark.parametrize("kind", CLEAN)
def test_clean_conversion_does_not_fail(room: Path, read: EncodedText, kind: str) -> None:
    report = judge(TINY, CLEAN[kind](room / kind), read)
    assert (report.verdict, report.reasons) == ("pass", ())


def test_section_of_the_page(seen: list[Seen], tally: Callable[[str], None]) -> None:
    """`python -m tests.faults.planted.table` writes it anew."""
    if len(seen) < len(CASES):
        pytest.skip("some were deselected")
    caught, named = sum(one.is_caught for one in seen), sum(one.is_named for one in seen)
    tally(f"planted, layers alone: {len(seen)} copies: {caught} caught, {named} named right")
    assert DOCUMENT.read_text().endswith(section(seen))
