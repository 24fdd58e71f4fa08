"""Conversions: bits unchanged, nothing lost, plans that equal what is written, nothing published before it is whole."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_tensors, read_tensors, small_checkpoint, small_config, write_checkpoint

from converters.conversion import Conversion
from converters.convert import ConvertOptions, MtpChoice, plan_convert
from converters.errors import ConfigError, InputError, ResourceError, SecurityError, UsageError
from converters.job import run
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.source import open_source


def convert(src: Path, dst: Path, workers: int = 2, max_memory: int = 64 << 20, **options: Any) -> Conversion:
    with open_source(src) as source:
        conversion = plan_convert(source, ConvertOptions(**options))
        run(conversion, dst, RunOptions(workers, max_memory), lambda _: None)
    return conversion


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("max_shard_bytes", [1, 70_000, 10**9])
def test_resharding_changes_no_bit(tmp_path: Path, num_shards: int, max_shard_bytes: int) -> None:
    src = small_checkpoint(tmp_path / "src", num_shards=num_shards)
    conversion = convert(src, tmp_path / "dst", max_shard_bytes=max_shard_bytes)
    assert_same_tensors(read_tensors(src), read_tensors(tmp_path / "dst"))
    files = {shard.file: shard.file_bytes for shard in conversion.plan.shards}
    assert files == {path.name: path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors")}
    assert (len(files) == 1) == (max_shard_bytes == 10**9)
    assert (tmp_path / "dst" / "config.json").read_bytes() == (src / "config.json").read_bytes()
    assert (tmp_path / "dst" / "LICENSE").read_text() == "a licence\n"


def test_index_is_exact(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "dst", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    tensors = read_tensors(small)
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    assert set(index["weight_map"].values()) == {path.name for path in (tmp_path / "dst").glob("*.safetensors")}


def test_result_loads_in_transformers_with_the_same_logits(small: Path, tmp_path: Path) -> None:
    from transformers import Glm4MoeForCausalLM

    convert(small, tmp_path / "dst", max_shard_bytes=50_000)
    ids = torch.arange(24).view(2, 12)
    logits = [Glm4MoeForCausalLM.from_pretrained(p, dtype=torch.float32)(ids).logits for p in (small, tmp_path / "dst")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_dtype_casts_everything_but_the_correction_bias(small: Path, tmp_path: Path, dtype: str) -> None:
    convert(small, tmp_path / "dst", dtype=dtype)
    source, result = read_tensors(small), read_tensors(tmp_path / "dst")
    assert source.keys() == result.keys()
    biases = [name for name, value in source.items() if value.dtype == torch.float32]
    assert len(biases) == 3
    for name, value in source.items():
        target = torch.float32 if name in biases else getattr(torch, dtype)
        assert result[name].dtype == target
        assert torch.equal(result[name], value.to(target)), name
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["torch_dtype"] == dtype


def test_cast_to_bfloat16_rounds_to_nearest_even(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src", num_shards=1)
    tensors = read_tensors(src)
    wide = {n: v.float() for n, v in tensors.items()}
    patterns = torch.arange(64 * 48, dtype=torch.int32) * 0x0511 + 0x3F00_0000
    wide["lm_head.weight"] = patterns.view(torch.float32).view(64, 48)
    write_checkpoint(tmp_path / "wide", wide, small_config(torch_dtype="float32"), 1)
    convert(tmp_path / "wide", tmp_path / "dst", dtype="bfloat16")
    bits = patterns.long()
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    result = read_tensors(tmp_path / "dst")["lm_head.weight"].view(torch.int16).flatten().long()
    assert torch.equal(result, rounded)


def test_cast_that_overflows_is_refused(small: Path, tmp_path: Path) -> None:
    tensors = read_tensors(small)
    tensors["lm_head.weight"][3, 5] = 1e6
    write_checkpoint(tmp_path / "big", tensors, small_config(), 2)
    with pytest.raises(InputError, match=r"lm_head.weight.*cast to F16: expected values that fit, found 99\d+"):
        convert(tmp_path / "big", tmp_path / "dst", dtype="float16")
    assert not (tmp_path / "dst" / "config.json").exists()


def test_mtp_separate_puts_the_layer_into_its_own_file(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "dst", mtp=MtpChoice.SEPARATE)
    assert {path.name for path in (tmp_path / "dst").glob("*.safetensors")} == {"model.safetensors", "mtp.safetensors"}
    weight_map = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())["weight_map"]
    in_mtp = {name for name, file in weight_map.items() if file == "mtp.safetensors"}
    assert in_mtp == {name for name in read_tensors(small) if name.startswith("model.layers.3.")}
    convert(tmp_path / "dst", tmp_path / "back")
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(small))


def test_mtp_drop_leaves_the_layer_out_and_the_config_says_so(small: Path, tmp_path: Path) -> None:
    conversion = convert(small, tmp_path / "dst", mtp=MtpChoice.DROP)
    body = {name: value for name, value in read_tensors(small).items() if not name.startswith("model.layers.3.")}
    assert_same_tensors(read_tensors(tmp_path / "dst"), body)
    assert set(conversion.plan.dropped.values()) == {"--mtp drop"}
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    with open_source(tmp_path / "dst") as source:
        assert source.schema.mtp_layer is None
        with pytest.raises(UsageError, match="--mtp drop: expected a source with an MTP layer"):
            plan_convert(source, ConvertOptions(mtp=MtpChoice.DROP))


def test_mtp_without_copies_is_carried(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src", mtp_copies=False)
    convert(src, tmp_path / "dst")
    assert_same_tensors(read_tensors(src), read_tensors(tmp_path / "dst"))


def test_bytes_do_not_depend_on_workers_or_memory(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "a", workers=1, max_memory=1 << 30, max_shard_bytes=60_000)
    convert(small, tmp_path / "b", workers=5, max_memory=4096, max_shard_bytes=60_000)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_memory_too_small_for_a_row_is_refused_with_the_figure(small: Path) -> None:
    with open_source(small) as source, pytest.raises(ResourceError) as caught:
        plan_convert(source, ConvertOptions()).summary(RunOptions(1, 191))
    assert str(caught.value) == (
        "--max-memory: expected at least 192 bytes, for model.layers.0.self_attn.o_proj.weight, found 191. "
        "Raise it or use fewer workers."
    )
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weight_is_named_by_row_and_column(small: Path, tmp_path: Path, value: float) -> None:
    tensors = read_tensors(small)
    tensors["model.layers.2.mlp.experts.3.up_proj.weight"][7, 11] = value
    write_checkpoint(tmp_path / "bad", tensors, small_config(), 2)
    with pytest.raises(
        InputError, match=r"experts.3.up_proj.weight: expected finite values, found NaN or Inf at row 7, column 11"
    ):
        convert(tmp_path / "bad", tmp_path / "dst")
    assert not list((tmp_path / "dst").glob("*.safetensors.index.json"))
    assert not (tmp_path / "dst" / "config.json").exists()


def damaged(src: Path, dst: Path, change: dict[str, torch.Tensor | None], **config: Any) -> Path:
    tensors = read_tensors(src)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return write_checkpoint(dst, tensors, small_config(**config), 2)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            {"model.layers.2.mlp.experts.1.down_proj.weight": None},
            {},
            "experts.1.down_proj.weight: expected in the checkpoint",
        ),
        ({"model.layers.2.self_attn.q_norm.weight": None}, {}, "q_norm.weight: expected in the checkpoint"),
        ({"model.norm.weight": torch.zeros(47)}, {}, r"shape \[48\], from config.json, found \[47\]"),
        ({"lm_head.weight": torch.zeros(48, 64, dtype=torch.bfloat16)}, {}, r"shape \[64, 48\].*found \[48, 64\]"),
        ({"lm_head.weight": torch.zeros(64, 48, dtype=torch.int8)}, {}, "one of BF16, F16, F32, found I8"),
        ({"lm_head.weight": torch.zeros(64, 48).to(torch.float8_e4m3fn)}, {}, "one of BF16, F16, F32, found F8_E4M3"),
        ({"model.visual.weight": torch.zeros(2)}, {}, "not in the table of tensors"),
        ({"model.layers.7.input_layernorm.weight": torch.zeros(48)}, {}, "none in its config"),
        ({"lm_head.weight_scale": torch.zeros(64, 1)}, {}, "no scale, for its weight is not quantized"),
        ({}, {"num_hidden_layers": 4, "num_nextn_predict_layers": 0}, "layers.3"),
        ({}, {"n_routed_experts": 5}, "expected"),
    ],
)
def test_checkpoint_that_contradicts_its_config_is_refused(
    small: Path, tmp_path: Path, change: dict[str, torch.Tensor | None], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_source(damaged(small, tmp_path / "bad", change, **config))


def test_destinations_that_would_do_harm_are_refused(small: Path, tmp_path: Path) -> None:
    for dst, message in (
        (small, "outside SRC"),
        (small / "sub", "outside SRC"),
        (small.parent, "an empty or new folder"),
        (small / "config.json", "outside SRC"),
    ):
        with pytest.raises(UsageError, match=message):
            convert(small, dst)
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="a folder, found a file"):
        convert(small, tmp_path / "file")
    link = tmp_path / "link"
    link.symlink_to(small)
    with pytest.raises(UsageError, match="outside SRC"):
        convert(small, link)


def test_code_pickles_and_hidden_files_are_not_carried_along(small: Path, tmp_path: Path) -> None:
    for name in ("modeling_glm.py", "optimizer.pt", ".secret", "pytorch_model.bin"):
        (small / name).write_text("x")
    (small / "tokenizer.json").write_text("{}")
    convert(small, tmp_path / "dst", max_shard_bytes=10**9)
    assert {path.name for path in (tmp_path / "dst").iterdir()} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "LICENSE",
        "tokenizer.json",
        "glm4moe-manifest.json",
    }


def test_side_file_that_links_out_of_the_folder_is_refused(small: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("key")
    (small / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(SecurityError, match="notes.txt"):
        convert(small, tmp_path / "dst")


def test_file_mode_follows_the_umask(small: Path, tmp_path: Path) -> None:
    """safetensors 0.8 writes 0600 whatever the umask, which locks a cluster's other users out."""
    before = os.umask(0o027)
    try:
        convert(small, tmp_path / "dst")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "dst").iterdir()} == {0o640}


def test_full_disk_leaves_no_final_name_for_the_unfinished_shard(small: Path, tmp_path: Path) -> None:
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
from pathlib import Path
from converters.convert import *; from converters.job import run; from converters.job import run
from converters.pipeline import RunOptions
from converters.source import open_source; from converters.errors import ResourceError
with open_source(Path({str(small)!r})) as source:
    try:
        run(plan_convert(source, ConvertOptions()), Path({str(tmp_path / "dst")!r}), RunOptions(2), lambda n: None)
    except ResourceError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert "model.safetensors: expected room to write" in done.stdout
    assert [path.name for path in (tmp_path / "dst").iterdir()] == [".glm4moe"]


def test_peak_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    """A child casts and quantizes 40 MB, another one 160 MB in larger tensors: their peaks are alike."""
    peaks = {}
    for name, vocab in (("a", 20_000), ("b", 80_000)):
        src = small_checkpoint(tmp_path / name, vocab_size=vocab, hidden_size=480, num_shards=1)
        code = f"""
from pathlib import Path
from converters.convert import *; from converters.quantize import *; from converters.job import run
from converters.pipeline import RunOptions
from converters.source import open_source
options = RunOptions(2, 16 << 20)
with open_source(Path({str(src)!r})) as source:
    plans = plan_convert(source, ConvertOptions(dtype="float32")), plan_quantize(source, QuantizeOptions(scheme="fp8"))
    for number, plan in enumerate(plans):
        assert plan.summary(options)["peak_block_bytes"] <= 16 << 20
        run(plan, Path({str(tmp_path)!r}) / f"{name}{{number}}", options, lambda n: None)
# not ru_maxrss: that starts at the size of the process which forked this one
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        peaks[name] = int(done.stdout) * 1024
    assert (tmp_path / "b" / "model.safetensors").stat().st_size > 150e6
    # two jobs of 16 MiB of blocks each, and as much again that the allocator may keep; a leak would show 120 MB
    assert peaks["b"] - peaks["a"] < 64 << 20


def test_plan_quantize_and_convert_read_no_data(small: Path) -> None:
    for path in small.glob("*.safetensors"):
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        raw = path.read_bytes()
        path.write_bytes(raw[:header] + b"\xff" * (len(raw) - header))
    with open_source(small) as source:
        plan_convert(source, ConvertOptions()).summary(RunOptions())
        plan_quantize(source, QuantizeOptions(scheme="fp8")).summary(RunOptions())


def test_config_of_another_model_is_refused(small: Path) -> None:
    (small / "config.json").write_text(json.dumps(small_config(model_type="deepseek_v3")))
    with pytest.raises(ConfigError, match="GLM-4.5, 4.6 and 4.7"):
        open_source(small)


def test_downloaded_folder_is_no_destination(small: Path, tmp_path: Path) -> None:
    """A download keeps its listing in the same state folder; that does not make its shards ours to overwrite."""
    dst = small_checkpoint(tmp_path / "dst")
    (dst / ".glm4moe").mkdir()
    (dst / ".glm4moe" / "listing.json").write_text("{}")
    before = {path.name: path.read_bytes() for path in dst.iterdir() if path.is_file()}
    with pytest.raises(UsageError, match="a download, finished or not"):
        convert(small, dst)
    assert before == {path.name: path.read_bytes() for path in dst.iterdir() if path.is_file()}
