"""The card of a quantized result, carried along: its commands are true of the folder it lies in, there and back."""

from pathlib import Path

import pytest
from builders import small_checkpoint

from converters.convert import ConvertOptions, MtpChoice, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import ShardLayout
from converters.source import open_source
from tests.converters.shard.models import merge, shard

CARD = "README.md"
LICENCE = "---\nlicense: mit\n---\n# The base\n\n## Serving\n\nvllm serve zai-org/GLM-4.6\n"


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    src = small_checkpoint(tmp_path / "src", num_attention_heads=8, num_key_value_heads=2, head_dim=4)
    (src / CARD).write_text(LICENCE)
    with open_source(src) as source:
        run(plan_quantize(source, QuantizeOptions(scheme="fp8")), tmp_path / "fp8", RunOptions(1), lambda _: None)
    return tmp_path / "fp8"


def convert(src: Path, dst: Path, **options: object) -> Path:
    with open_source(src) as source:
        run(plan_convert(source, ConvertOptions(**options)), dst, RunOptions(1), lambda _: None)
    return dst


def serving(folder: Path) -> str:
    return (folder / CARD).read_text().partition("## Serving\n\n")[2]


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED, Layout.FUSED_SHARED])
def test_another_layout_is_said_above_the_commands_and_taken_out_again(
    quantized: Path, tmp_path: Path, layout: Layout
) -> None:
    """The commands were copied as if engines took every layout."""
    before = (quantized / CARD).read_bytes()
    there = convert(quantized, tmp_path / "there", layout=layout)
    assert serving(there).startswith(
        f"**Not as it is: the weights here are in the `{layout}` layout. "
        "First `glm4moe convert . DST --layout split`.**\n\nTensor-parallel sizes that fit"
    )
    cut = shard(there, tmp_path / "cut", ParallelMapping(tp=2), ShardLayout.RANK)
    assert serving(cut).startswith(
        "**Not as it is: the weights here are cut for ranks. First `glm4moe shard . DST --merge`.**\n\nTensor-par"
    )
    merged = merge(cut, tmp_path / "merged")
    assert (merged / CARD).read_bytes() == (there / CARD).read_bytes()
    assert (convert(merged, tmp_path / "back", layout=Layout.SPLIT) / CARD).read_bytes() == before


def test_a_conversion_that_leaves_the_layout_leaves_the_card(quantized: Path, tmp_path: Path) -> None:
    before = (quantized / CARD).read_bytes()
    assert (convert(quantized, tmp_path / "a", max_shard_bytes=50_000) / CARD).read_bytes() == before
    assert (convert(quantized, tmp_path / "b", layout=Layout.SPLIT) / CARD).read_bytes() == before
    cut = shard(quantized, tmp_path / "cut", ParallelMapping(tp=2), ShardLayout.RANK)
    assert (merge(cut, tmp_path / "merged") / CARD).read_bytes() == before


def test_without_the_mtp_layer_no_command_speaks_of_it(quantized: Path, tmp_path: Path) -> None:
    assert serving(quantized).count("--speculative-") > 2
    dropped = convert(quantized, tmp_path / "dropped", mtp=MtpChoice.DROP)
    assert serving(dropped).startswith("The MTP layer that this card lists is not here.\n\nTensor-parallel sizes")
    assert "--speculative-" not in serving(dropped)
    assert "--enable-auto-tool-choice\n```" in serving(dropped)
    packed = convert(dropped, tmp_path / "packed", layout=Layout.PACKED)
    assert "**Not as it is" in serving(packed)
    back = convert(packed, tmp_path / "back", layout=Layout.SPLIT)
    assert (back / CARD).read_bytes() == (dropped / CARD).read_bytes()


@pytest.mark.parametrize("card", [LICENCE.encode(), b"\xff no text", b"", b"---\nquantized_by: glm4moe\n---\n"])
def test_a_card_of_somebody_else_is_copied(quantized: Path, tmp_path: Path, card: bytes) -> None:
    (quantized / CARD).write_bytes(card)
    there = convert(quantized, tmp_path / "there", layout=Layout.PACKED, mtp=MtpChoice.DROP)
    assert (there / CARD).read_bytes() == card
