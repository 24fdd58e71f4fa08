"""The tables of docs/moe-backends.md are what the code launches and moves now."""

import json

import pytest

from benchmarks import moe_model
from benchmarks.moe_backends import APART, SLOT
from benchmarks.moe_chart import roofline_svg
from runtime.moe.cost import H200, SHAPES
from runtime.moe.plan import BATCHED, CUTLASS, TRITON, VANILLA


def test_document_has_the_tables_that_are_made_now() -> None:
    text = moe_model.DOCUMENT.read_text(encoding="utf-8")
    assert moe_model.written(text) == text, "run: PYTHONPATH=. python benchmarks/moe_model.py --write"


def test_committed_results_are_those_that_are_made_now() -> None:
    committed = json.loads((moe_model.RESULTS / "moe_model.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(moe_model.model()))
    assert not committed["is_measured"]
    for part in ("backends", "crossover_tokens", "device"):
        assert committed[part] == now[part], "run: PYTHONPATH=. python benchmarks/moe_model.py --write"
    for part in ("padding", "expected_blocks_of_16"):
        assert committed[part].keys() == now[part].keys()
    for theirs, ours in zip(committed["floors"], now["floors"], strict=True):
        assert theirs == pytest.approx(ours)
    assert (moe_model.RESULTS / "moe_model.svg").read_text(encoding="utf-8") == roofline_svg(SHAPES["GLM-4.6"], H200)


def test_a_stale_table_is_seen() -> None:
    text = moe_model.DOCUMENT.read_text(encoding="utf-8")
    stale = text.replace("| 4096 | `vanilla` | apart |", "| 4096 | `vanilla` | apart | 1 |")
    assert stale != text
    assert moe_model.written(stale) == text
    with pytest.raises(ValueError, match="the marks of backends are there 0 times"):
        moe_model.written("no table")


def test_what_the_document_says_in_words() -> None:
    """Each sentence that the tables carry, by figures."""
    found = {(row["backend"], row["shared_expert"], row["tokens"]): row for row in moe_model.model()["backends"]}
    rows = {(name, tokens): row for (name, way, tokens), row in found.items() if way == SLOT or name == VANILLA}
    for tokens in moe_model.COUNTED_TOKENS:
        vanilla, batched, cutlass, triton = (rows[name, tokens] for name in (VANILLA, BATCHED, CUTLASS, TRITON))
        # an expert after the other: three products each, one of them shared
        assert vanilla["products"] == 3 * (vanilla["distinct_experts"] + 1)
        assert vanilla["launches"] == pytest.approx(5 * (vanilla["distinct_experts"] + 1), abs=60)
        assert vanilla["waits"] > 0
        assert [row["waits"] for row in (batched, cutlass, triton)] == [0, 0, 0]
        assert cutlass["products"] == triton["products"] == 2
        assert triton["launches"] <= 5
        assert triton["num_bytes"] < min(row["num_bytes"] for row in (vanilla, batched, cutlass))
        assert batched["num_bytes"] > 2.9 * batched["floor_bytes"]
        for backend, num_more in ((CUTLASS, 4), (TRITON, 6)):
            slot, apart = (found[backend, way, tokens] for way in (SLOT, APART))
            assert apart["launches"] - slot["launches"] == num_more
            assert apart["products"] - slot["products"] == 3
            # weights are read either way
            assert apart["num_bytes"] == pytest.approx(slot["num_bytes"], rel=0.03)
    assert rows[TRITON, 1]["launches"] == 2
    shape = SHAPES["GLM-4.6"]
    assert round(2 * 4096 * shape.num_slots * 2 * shape.intermediate_size * 2 / 1e6) == 453
    assert round(2 * 4096 * shape.num_slots * shape.hidden_size * 2 / 1e6) == 755
    assert moe_model.model()["crossover_tokens"]["GLM-4.6"]["bf16"] == pytest.approx(3400, abs=50)
