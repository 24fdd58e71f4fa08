"""What quantized formats hang on a weight, in every layout; a shared expert that lies in more than one slot."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import random_tensors, small_config, write_checkpoint
from quantized import DIALECTS, quantized_checkpoint

from converters.config import Glm4MoeConfig
from converters.convert import ConvertOptions, plan_convert
from converters.errors import UsageError
from converters.inspect.report import InspectReport, inspect_folder, scan_content
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.schema import expand
from converters.source import open_source
from tests.converters.inspect.layouts import Tensors

CONFIG = small_config(n_shared_experts=2)
WIDTH = CONFIG["moe_intermediate_size"]
FIRST_SLOT = CONFIG["n_routed_experts"]
SLOT = f"model.layers.1.mlp.experts.{FIRST_SLOT + 1}."


def scan(folder: Path) -> InspectReport:
    return scan_content(inspect_folder(folder, "CKPT"), want_hash=True, want_values=True, on_bytes=lambda _: None)


def findings(report: InspectReport) -> set[tuple[int, str]]:
    return {(finding.check.number, finding.found) for finding in report.findings}


# blocks of 32 x 48 that a layout would have to cut up
REFUSED = {
    ("ct-fp8-block", Layout.FUSED),
    ("ct-fp8-block", Layout.FUSED_SHARED),
    ("deepseek-fp8-block", Layout.FUSED),
    ("deepseek-fp8-block", Layout.FUSED_SHARED),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_no_layout_changes_digest_or_findings_of_a_quantized_checkpoint(tmp_path: Path, name: str) -> None:
    """Shapes that packed and fused weights state were taken for wrong ones, and of two slots the last for the whole."""
    src, _ = quantized_checkpoint(tmp_path / "src", DIALECTS[name], n_shared_experts=2)
    expected = scan(src)
    refused = set()
    for layout in (Layout.PACKED, Layout.FUSED_SHARED, Layout.FUSED):
        with open_source(src) as source:
            try:
                run(
                    plan_convert(source, ConvertOptions(layout=layout)),
                    tmp_path / layout,
                    RunOptions(1),
                    lambda _: None,
                )
            except UsageError:
                refused.add((name, layout))
                continue
        found = scan(tmp_path / layout)
        assert (found.digest, found.view.layout) == (expected.digest, layout)
        assert {number for number, _ in findings(found)} <= {number for number, _ in findings(expected)}
    assert refused == {pair for pair in REFUSED if pair[0] == name}
    assert expected.digest is not None


def two_slots(tensors: Tensors) -> Tensors:
    """Give the shared expert two slots: rows of gate and up, columns of down."""
    result = {name: value for name, value in tensors.items() if "shared_experts" not in name}
    for name in tensors.keys() - result.keys():
        halves = tensors[name].split(WIDTH, dim=1 if "down_proj" in name else 0)
        for slot, half in enumerate(halves, FIRST_SLOT):
            result[name.replace("shared_experts", f"experts.{slot}")] = half.contiguous()
    return result


def test_two_slots_hold_what_the_shared_expert_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(CONFIG)))
    split = scan(write_checkpoint(tmp_path / "split", tensors, CONFIG))
    slots = scan(write_checkpoint(tmp_path / "slots", two_slots(tensors), CONFIG))
    assert (slots.view.layout, slots.findings) == (Layout.FUSED_SHARED, ())
    assert slots.digest == split.digest
    # rows of a piece that end in the middle of a block
    monkeypatch.setattr("converters.inspect.content.BLOCK_BYTES", 40)
    assert scan(tmp_path / "slots").digest == split.digest


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            lambda t: t.pop(f"{SLOT}down_proj.weight"),
            (201, "model.layers.1.mlp.shared_experts.down_proj.weight missing"),
        ),
        (
            lambda t: t.update({f"{SLOT}up_proj.weight": t[f"{SLOT}up_proj.weight"].float()}),
            (206, f"F32 [{WIDTH}, {CONFIG['hidden_size']}]"),
        ),
        (lambda t: t.update({f"{SLOT}up_proj.weight": torch.zeros(2, 2, dtype=torch.bfloat16)}), (206, "[2, 2]")),
    ],
    ids=["missing", "dtype", "shape"],
)
def test_a_damaged_slot_is_found(
    tmp_path: Path, damage: Callable[[Tensors], object], expected: tuple[int, str]
) -> None:
    tensors = two_slots(random_tensors(expand(Glm4MoeConfig.from_hf(CONFIG))))
    damage(tensors)
    report = scan(write_checkpoint(tmp_path / "slots", tensors, CONFIG))
    assert expected in findings(report)
    assert report.fatal


def test_down_of_two_slots_is_put_together_row_by_row(tmp_path: Path) -> None:
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(CONFIG)))
    name = "model.layers.1.mlp.shared_experts.down_proj.weight"
    report = inspect_folder(write_checkpoint(tmp_path / "slots", two_slots(tensors), CONFIG), "CKPT")
    joined = report.view.tensors[name]
    assert joined.shape == tuple(tensors[name].shape)
    spans = list(joined.spans())
    assert [span.end - span.begin for span in spans] == [2 * WIDTH] * (2 * CONFIG["hidden_size"])
    assert len({(span.stored, span.begin) for span in spans}) == len(spans)
