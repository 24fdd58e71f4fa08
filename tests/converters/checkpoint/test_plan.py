"""The plan's own bookkeeping: rows of a matrix, what is read beside them, and that no row is lost or used twice."""

import pytest

from converters.checkpoint.coverage import check_complete, covered_rows
from converters.checkpoint.header import TensorEntry, num_rows
from converters.checkpoint.plan import (
    Beside,
    Columns,
    OutputPlan,
    OutputTensor,
    Shard,
    SourceRows,
    Unit,
)
from converters.errors import InputError
from converters.transforms.rows import Copy


@pytest.mark.parametrize(
    ("shape", "rows", "row_bytes"),
    [((), 1, 2), ((7,), 7, 2), ((1,), 1, 2), ((5, 3), 5, 6), ((4, 6, 3), 24, 6), ((4, 6, 1), 24, 2)],
)
def test_all_dims_but_the_last_are_rows(shape: tuple[int, ...], rows: int, row_bytes: int) -> None:
    output = OutputTensor("x", "BF16", shape)
    assert (num_rows(shape), output.rows, output.row_bytes) == (rows, rows, row_bytes)
    assert output.nbytes == rows * row_bytes


def test_beside_finds_the_row_of_a_block_from_any_offset() -> None:
    beside = Beside("scale", start=10, offset=5, span=4)
    assert [beside.row(index) for index in range(8)] == [11, 11, 11, 12, 12, 12, 12, 13]


def test_reads_lists_everything_in_order() -> None:
    right = SourceRows("b", 0, 6, beside=(Beside("scale b", 2, 0, 6),))
    rows = SourceRows("a", 3, 9, beside=(Beside("scale a", 0, 3, 4),), right=right)
    assert list(rows.reads()) == [("a", 3, 9), ("scale a", 0, 3), ("b", 0, 6), ("scale b", 2, 3)]


def half(start: int, stop: int) -> Columns:
    return Columns(start, stop, 8)


@pytest.mark.parametrize(
    ("sources", "is_tiled"),
    [
        ([SourceRows("x", 0, 4), SourceRows("x", 4, 10)], True),
        ([SourceRows("x", 4, 10), SourceRows("x", 0, 4)], True),
        ([SourceRows("x", 0, 4), SourceRows("x", 5, 10)], False),
        ([SourceRows("x", 0, 5), SourceRows("x", 4, 10)], False),
        ([SourceRows("x", 0, 9)], False),
        ([SourceRows("x", 0, 10), SourceRows("x", 0, 10)], False),
        ([SourceRows("x", 0, 10, half(0, 3)), SourceRows("x", 0, 10, half(3, 8))], True),
        ([SourceRows("x", 0, 10, half(0, 3)), SourceRows("x", 0, 10, half(4, 8))], False),
        ([SourceRows("x", 0, 10, half(0, 3)), SourceRows("x", 0, 10, half(2, 8))], False),
        ([SourceRows("x", 0, 10, half(0, 3))], False),
        ([SourceRows("x", 0, 10, half(0, 8)), SourceRows("x", 0, 10)], False),
        ([SourceRows("y", 0, 10, right=SourceRows("x", 0, 10))], True),
        ([SourceRows("x", 0, 10, is_shared=True), SourceRows("x", 0, 10, is_shared=True)], True),
        ([SourceRows("x", 0, 3, is_shared=True), SourceRows("x", 2, 10, is_shared=True)], True),
        ([SourceRows("x", 0, 3, is_shared=True), SourceRows("x", 4, 10, is_shared=True)], False),
    ],
)
def test_every_row_and_column_must_have_one_place(sources: list[SourceRows], is_tiled: bool) -> None:
    assert covered_rows(sources)["x"].is_tiled(10) is is_tiled


def plan(*sources: SourceRows, dropped: dict[str, str] | None = None) -> OutputPlan:
    unit = Unit((OutputTensor("out", "BF16", (10, 8)),), sources, Copy())
    return OutputPlan((Shard("model.safetensors", (unit,)),), dropped or {})


def test_source_tensor_or_row_without_a_place_is_refused() -> None:
    entries = [TensorEntry("x", "BF16", (10, 8), 0, 160), TensorEntry("y", "BF16", (2,), 160, 164)]
    with pytest.raises(InputError, match="tensor y: expected a place in the plan, found none"):
        check_complete(plan(SourceRows("x", 0, 10)), entries)
    with pytest.raises(InputError, match="tensor x: expected one place for each row"):
        check_complete(plan(SourceRows("x", 0, 9), dropped={"y": "why"}), entries)
    check_complete(plan(SourceRows("x", 0, 10), dropped={"y": "why"}), entries)
    check_complete(plan(SourceRows("x", 0, 10, beside=(Beside("y", 0, 0, 5),))), entries)
