"""The digest that statistics are bound to: the same in all layouts, another one for another model."""

from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint, write_checkpoint
from quantizing import checkpoint, quantize, statistics

from converters.convert import ConvertOptions, plan_convert
from converters.errors import UsageError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quant.identity import SAMPLE_BYTES, described, model_digest
from converters.source import open_source
from tests.builders import small_config

OTHER_LAYOUTS = [layout for layout in Layout if layout is not Layout.SPLIT]
NORM = "model.layers.1.post_attention_layernorm.weight"
O_PROJ = "model.layers.1.self_attn.o_proj.weight"


def digest(folder: Path) -> str:
    with open_source(folder) as source:
        return model_digest(source)


def relaid(src: Path, dst: Path, layout: Layout) -> Path:
    with open_source(src) as source:
        run(plan_convert(source, ConvertOptions(layout=layout)), dst, RunOptions(workers=1), float)
    return dst


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_layouts_and_shards_do_not_matter(tmp_path: Path, layout: Layout) -> None:
    src = small_checkpoint(tmp_path / "src")
    packed = relaid(src, tmp_path / "other", layout)
    assert digest(packed) == digest(src) == digest(small_checkpoint(tmp_path / "one", num_shards=1))
    # and back
    assert digest(relaid(packed, tmp_path / "split", Layout.SPLIT)) == digest(src)


@pytest.mark.parametrize("layout", OTHER_LAYOUTS)
def test_quantized_layouts_do_not_matter(tmp_path: Path, layout: Layout) -> None:
    src = checkpoint(tmp_path / "src")
    quantize(src, tmp_path / "int8", "int8-weight-only")
    assert digest(relaid(tmp_path / "int8", tmp_path / "other", layout)) == digest(tmp_path / "int8") != digest(src)


def test_values_sizes_and_config_matter(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src")
    made = {"seed": {"seed": 1}, "mtp": {"mtp": False}, "eps": {"rms_norm_eps": 1e-6}}
    changed = {name: small_checkpoint(tmp_path / name, **how) for name, how in made.items()}
    for name in (NORM, O_PROJ):
        tensors = read_tensors(src)
        tensors[name].view(torch.int16).view(-1)[SAMPLE_BYTES // 2 - 1 if name == O_PROJ else -1] ^= 1
        changed[name] = write_checkpoint(tmp_path / name, tensors, small_config())
    assert len({digest(folder) for folder in (src, *changed.values())}) == len(changed) + 1
    # what ends a text, and how long one may be, changes no statistic
    assert digest(small_checkpoint(tmp_path / "eos", eos_token_id=[1, 2])) == digest(src)


def test_no_expert_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = small_checkpoint(tmp_path / "src")
    with open_source(src) as source:
        read, read_into = [], source.reader.read_into

        def watched(name: str, offset: int, buffer: memoryview) -> None:
            read.append((name, len(buffer)))
            read_into(name, offset, buffer)

        monkeypatch.setattr(source.reader, "read_into", watched)
        model_digest(source)
    assert {NORM, O_PROJ} <= {name for name, _ in read}
    assert not [name for name, _ in read if "experts" in name or "embed" in name or name.endswith("head.weight")]
    assert max(size for _, size in read) <= SAMPLE_BYTES


def test_statistics_serve_every_layout_and_no_other_model(tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "src")
    stats = statistics(src)
    packed = relaid(src, tmp_path / "packed", Layout.PACKED)
    quantize(src, tmp_path / "a", "nvfp4", stats=stats)
    quantize(packed, tmp_path / "b", "nvfp4", stats=stats)
    same, other = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    scales = [name for name in same if name.endswith("input_global_scale")]
    assert len(scales) > 10
    assert all(torch.equal(same[name], other[name]) for name in scales)
    with pytest.raises(UsageError, match="--stats: expected statistics of the model in .*, in any layout, found those"):
        quantize(checkpoint(tmp_path / "other", seed=1), tmp_path / "c", "nvfp4", stats=stats)


def test_statistics_without_a_digest_are_said_to_be_old() -> None:
    assert described(None, "ab") == "those of an earlier version, which do not say of which model they are"
    assert "digest cd; this one has ab" in described("cd", "ab")
