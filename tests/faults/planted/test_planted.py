"""Faults that converters and quantizers are known for are caught, named and explained; clean conversions pass."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.faults.planted.clean import Clean, clean_runs
from tests.faults.planted.copies import Copies
from tests.faults.planted.faults import Fault
from tests.faults.planted.outcome import Outcome
from tests.faults.planted.table import CASES, DOCUMENT, FIRST_BEYOND, alarms, counts, document, new_room, plant

CLEAN = clean_runs()
NAMED_SHARE = 0.9


@pytest.fixture(scope="module")
def room() -> Iterator[Path]:
    """A folder for all of them."""
    folder = new_room()
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def copies(room: Path) -> Copies:
    return Copies(room)


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    """What came out so far."""
    return []


@pytest.fixture(scope="module")
def false_alarms() -> dict[str, list[str]]:
    """What was said of clean runs so far."""
    return {}


@pytest.mark.parametrize(("fault", "form"), CASES, ids=[f"{fault.number}-{form}" for fault, form in CASES])
def test_fault_is_caught(copies: Copies, room: Path, outcomes: list[Outcome], fault: Fault, form: str) -> None:
    found = plant(copies, fault, form, room)
    outcomes.append(found)
    assert found.is_caught
    if found.cause is not None:
        assert found.cause.evidence
        assert found.cause.remedy.endswith(".")


@pytest.mark.parametrize("run", CLEAN, ids=[run.label for run in CLEAN])
def test_clean_conversion_passes(room: Path, false_alarms: dict[str, list[str]], run: Clean) -> None:
    false_alarms[run.label] = alarms(run, room)
    assert false_alarms[run.label] == []


def test_counts_and_table(
    outcomes: list[Outcome], false_alarms: dict[str, list[str]], tally: Callable[[str], None]
) -> None:
    """The page in docs says what this run says; `python -m tests.faults.planted.table` writes it anew."""
    if len(outcomes) < len(CASES) or len(false_alarms) < len(CLEAN):
        pytest.skip("some were deselected")
    wrong = sum(bool(found) for found in false_alarms.values())
    tally(f"planted: {counts(outcomes)}; {len(false_alarms)} clean runs: {wrong} false alarms")
    first = [one for one in outcomes if one.fault.number < FIRST_BEYOND]
    for group in (first, outcomes):
        assert sum(one.is_named for one in group) >= NAMED_SHARE * len(group)
        assert sum(one.cause is not None for one in group) >= NAMED_SHARE * len(group)
    assert {one.fault.number for one in first} == set(range(1, FIRST_BEYOND))
    assert DOCUMENT.read_text().startswith(document(outcomes, len(false_alarms), wrong))
