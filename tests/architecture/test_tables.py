"""Measured figures in README.md: the tables are those that the script makes of the committed results."""

import copy
import re

import pytest

from benchmarks import tables
from tests.architecture.sources import ROOT


def test_readme_has_the_tables_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.written(text) == text, "run: PYTHONPATH=. python benchmarks/tables.py --write"


@pytest.mark.parametrize("name", tables.TABLES)
def test_a_stale_figure_is_seen(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    made = tables.marked(name)
    figure = re.search(r"\d\.\d", made)
    assert figure
    other = str((int(figure[0][0]) + 1) % 10)
    stale = text.replace(made, made[: figure.start()] + other + made[figure.start() + 1 :])
    assert stale != text
    assert tables.written(stale) == text


def test_a_text_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="the marks of quality are there 0 times"):
        tables.written("no table")


def cells(table: str) -> list[dict[str, str]]:
    head, _, *rows = [[cell.strip() for cell in line[1:-1].split(" | ")] for line in table.splitlines()]
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_every_measured_row_has_its_figures() -> None:
    """Each figure by hand from the JSON; what was not measured is empty, not guessed."""
    quality, speed = tables.load("quality"), tables.load("quantize")
    found = cells(tables.quality_table(quality, speed))
    assert len(found) == len(quality["rows"]) > 20
    assert len({(row["scheme"], row["format"]) for row in found}) == len(found)
    first, raw = found[0], quality["rows"][0]
    assert (first["scheme"], first["format"], raw["name"]) == ("`fp8`", "compressed-tensors", "fp8")
    assert first["size"] == f"{raw['bytes'] / 1e6:.2f} MB, {100 * raw['bytes'] / quality['source']['bytes']:.0f}%"
    assert first["loaded by"] == "vLLM, SGLang, TensorRT-LLM, transformers"
    seconds = speed["runs"]["fp8"]["wall_s"]["median"] * 1e9 / speed["source_bytes"]
    assert first["seconds per GB"] == f"{seconds:.1f}"
    assert first["times llm-compressor"] == f"{speed['ratios']['fp8']['times_faster']:.1f}"
    measured = [row for row in found if row["seconds per GB"]]
    assert len(measured) == len(speed["ratios"])
    assert all(row["format"] == tables.SPEED_FORMAT for row in measured)
    assert sum(bool(row["times llm-compressor"]) for row in found) == sum(
        "times_faster" in ratios for ratios in speed["ratios"].values()
    )


def test_blocks_say_what_stays_as_it_is() -> None:
    rows = [row for row in tables.load("quality")["rows"] if "fp8-block" in row["name"]]
    assert {row["format"] for row in rows} == {"compressed-tensors", "deepseek", "modelopt"}
    assert {tables.scheme_cell(row) for row in rows} == {
        "`attention=fp8-block,dense=fp8-block`; experts, 64 wide, stay bf16",
        "`fp8-block`; experts padded from 64 to 128 by zeros",
    }


def test_engines_of_the_committed_rows_are_those_that_quantize_names_now() -> None:
    from benchmarks import quality

    committed = {(row["name"], row["format"]): row["engines"] for row in tables.load("quality")["rows"]}
    assert committed == {(row.name, row.format): quality.engines(row) for row in quality.rows()}


def test_verdicts_of_the_committed_rows_are_those_of_the_limits_of_today() -> None:
    from benchmarks import quality

    rows = [row["as_served"] for row in tables.load("quality")["rows"] if row["as_served"]]
    assert [row["verdict"] for row in rows] == [quality.verdict_as_served(row) for row in rows]


def test_a_row_that_no_engine_loads_says_so() -> None:
    quality = copy.deepcopy(tables.load("quality"))
    quality["rows"] = quality["rows"][:1]
    quality["rows"][0]["engines"] = []
    (row,) = cells(tables.quality_table(quality, tables.load("quantize")))
    assert row["loaded by"] == "none known"
