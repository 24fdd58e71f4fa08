"""--update: a finished folder under another policy. Only what changes is made anew; the bytes are a fresh run's."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
from builders import read_tensors, small_checkpoint, small_config, write_checkpoint

from converters.transforms.rows import QuantizeFp8Channel
from glm4moe_cli.main import run

ARGS = ("--max-shard-size", "40kB", "-q")
FP8 = ("quantize", "SRC", "DST", "--scheme", "fp8", *ARGS)
EXACT = (*FP8, "--arithmetic", "compressed-tensors")


def call(src: Path, dst: Path, args: tuple[str, ...], *more: str) -> int:
    return run([{"SRC": str(src), "DST": str(dst)}.get(arg, arg) for arg in (*args, *more)])


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


@pytest.fixture
def quantized_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the rows that go through the quantizer."""
    rows: list[int] = []
    original = QuantizeFp8Channel.__call__

    def counted(self: QuantizeFp8Channel, rows_RC: Any, *beside: Any) -> Any:
        rows.append(len(rows_RC))
        return original(self, rows_RC, *beside)

    monkeypatch.setattr(QuantizeFp8Channel, "__call__", counted)
    return rows


@pytest.mark.parametrize(
    ("before", "after", "is_recomputed"),
    [
        (FP8, (*FP8[:-3], "--max-shard-size", "90kB", "-q"), False),
        (FP8, EXACT, True),
        (("convert", "SRC", "DST", *ARGS), ("convert", "SRC", "DST", *ARGS, "--mtp", "drop"), False),
        (("convert", "SRC", "DST", *ARGS), ("convert", "SRC", "DST", *ARGS, "--digest", "xxh3"), False),
        (("convert", "SRC", "DST", *ARGS), FP8, True),
    ],
)
def test_result_equals_a_fresh_run(
    small: Path, tmp_path: Path, quantized_rows: list[int], before: Any, after: Any, is_recomputed: bool
) -> None:
    dst, fresh = tmp_path / "dst", tmp_path / "fresh"
    assert call(small, dst, before) == 0
    assert call(small, fresh, after) == 0
    quantized_rows.clear()
    assert call(small, dst, after, "--update") == 0
    assert digests(dst) == digests(fresh)
    # the forecast quantizes one block as a sample
    assert (len(quantized_rows) > 1) == is_recomputed


def test_unchanged_shards_are_linked_back(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    convert = ("convert", "SRC", "DST", *ARGS, "--mtp", "separate")
    assert call(small, dst, convert) == 0
    inodes = {path.name: path.stat().st_ino for path in dst.glob("*.safetensors")}
    assert call(small, dst, convert[:-2], "--mtp", "drop", "--update") == 0
    kept = {path.name: path.stat().st_ino for path in dst.glob("*.safetensors")}
    assert kept == {name: inode for name, inode in inodes.items() if name != "mtp.safetensors"}


def test_interrupted_update_is_finished_by_the_same_command(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies at every rename in turn, half of the old result moved or half of the new one written."""
    dst, fresh = tmp_path / "dst", tmp_path / "fresh"
    assert call(small, fresh, EXACT) == 0
    replace, fallen = os.replace, 0
    while True:
        assert call(small, dst, FP8) == 0
        left = fallen

        def falling(source: Any, target: Any) -> None:
            nonlocal left
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
            replace(source, target)

        monkeypatch.setattr(os, "replace", falling)
        code = call(small, dst, EXACT, "--update")
        monkeypatch.setattr(os, "replace", replace)
        if code == 0:
            break
        assert code == 130
        assert call(small, dst, EXACT, "--update") == 0
        assert digests(dst) == digests(fresh)
        for path in dst.iterdir():
            path.unlink()
        fallen += 3
    assert fallen > 10


def test_changed_source_is_refused(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "dst"
    assert call(small, dst, FP8) == 0
    tensors = read_tensors(small)
    tensors["model.layers.2.mlp.experts.1.up_proj.weight"][3, 3] += 1
    write_checkpoint(small, tensors, small_config(), 2)
    assert call(small, dst, (*FP8[:-3], "--max-shard-size", "90kB", "-q"), "--update") == 4
    assert "experts.1.up_proj.weight: expected the bytes that the old result was made of" in capsys.readouterr().err


def test_damaged_old_result_is_not_taken_over(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dst = tmp_path / "dst"
    assert call(small, dst, FP8) == 0
    path = next(iter(sorted(dst.glob("*.safetensors"))))
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    assert call(small, dst, (*FP8[:-3], "--max-shard-size", "90kB", "-q"), "--update") == 4
    assert "of the old result: expected the bytes that its manifest records" in capsys.readouterr().err


def test_update_of_nothing_and_of_another_source_is_refused(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from builders import small_checkpoint

    assert call(small, tmp_path / "new", FP8, "--update") == 2
    assert "expected a finished result, found none. Run without --update." in capsys.readouterr().err
    assert call(small, tmp_path / "dst", FP8) == 0
    before = digests(tmp_path / "dst")
    other = small_checkpoint(tmp_path / "other", vocab_size=80)
    assert call(other, tmp_path / "dst", FP8, "--update") == 2
    assert digests(tmp_path / "dst") == before
    first = json.loads((tmp_path / "dst" / "glm4moe-manifest.json").read_text())["job"]
    assert first["command"] == "quantize"
    assert call(small, tmp_path / "dst", FP8, "--update") == 0
    assert digests(tmp_path / "dst") == before


def die_at_rename(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the n-th os.replace from now interrupt the run."""
    replace, left = os.replace, number

    def falling(source: Any, target: Any) -> None:
        nonlocal left
        left -= 1
        if left == -1:
            monkeypatch.setattr(os, "replace", replace)
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", falling)


def test_old_result_stays_whole_until_the_new_one_is(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update moved the old shards aside first; killed there, the old command deleted them and reported success."""
    dst = tmp_path / "dst"
    assert call(small, dst, FP8) == 0
    before = digests(dst)
    for number in range(1, 40, 2):
        die_at_rename(monkeypatch, number)
        code = call(small, dst, EXACT, "--update")
        monkeypatch.undo()
        if (dst / ".glm4moe" / "swap.json").exists() or code == 0:
            break
        assert {path.name: path for path in dst.iterdir()}.keys() == {*before, ".glm4moe"}
        assert call(small, dst, FP8) == 0
        assert digests(dst) == before
    assert number > 5


def test_failing_update_leaves_the_old_result(small: Path, tmp_path: Path) -> None:
    tensors = read_tensors(small)
    tensors["lm_head.weight"][3, 5] = 1e30
    write_checkpoint(small, tensors, small_config(), 2)
    dst, plain = tmp_path / "dst", ("convert", "SRC", "DST", *ARGS)
    assert call(small, dst, plain) == 0
    before = digests(dst)
    assert call(small, dst, plain, "--dtype", "float16", "--update") == 4
    assert call(small, dst, plain) == 0
    assert digests(dst) == before


@pytest.mark.parametrize("lost", ["model-00002-of-00004.safetensors", "config.json", "LICENSE"])
def test_finished_result_that_lost_a_file_is_repaired_by_its_command(small: Path, tmp_path: Path, lost: str) -> None:
    dst = tmp_path / "dst"
    assert call(small, dst, FP8) == 0
    before = digests(dst)
    (dst / lost).unlink()
    assert call(small, dst, FP8) == 0
    assert digests(dst) == before


@pytest.mark.parametrize("name", ["../victim", "/etc/victim", ".glm4moe", "a/b"])
@pytest.mark.parametrize("kind", ["files", "shards"])
def test_manifest_that_names_files_elsewhere_is_refused(small: Path, tmp_path: Path, name: str, kind: str) -> None:
    dst = tmp_path / "dst"
    (tmp_path / "victim").write_text("mine")
    assert call(small, dst, FP8) == 0
    path = dst / "glm4moe-manifest.json"
    manifest = json.loads(path.read_text())
    manifest[kind][name] = {"bytes": 4} if kind == "shards" else "0" * 64
    path.write_text(json.dumps(manifest))
    assert call(small, dst, EXACT, "--update") == 8
    assert (tmp_path / "victim").read_text() == "mine"


@pytest.mark.parametrize("text", ["{}", '{"job": {}}', "[]", '{"schema": "glm4moe.manifest/2", "job": {}}'])
def test_file_that_is_no_manifest_is_refused(small: Path, tmp_path: Path, text: str) -> None:
    dst = tmp_path / "dst"
    dst.mkdir()
    (dst / "glm4moe-manifest.json").write_text(text)
    assert call(small, dst, FP8) == 4
    assert call(small, dst, FP8, "--update") == 4


def test_bytes_of_another_version_are_not_taken_over(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantized_rows: list[int]
) -> None:
    dst, fresh = tmp_path / "dst", tmp_path / "fresh"
    after = (*FP8[:-3], "--max-shard-size", "90kB", "-q")
    monkeypatch.setattr("converters.__version__", "0.0.9")
    assert call(small, dst, FP8) == 0
    monkeypatch.setattr("converters.__version__", "0.1.0")
    assert call(small, fresh, after) == 0
    quantized_rows.clear()
    assert call(small, dst, after, "--update") == 0
    assert len(quantized_rows) > 1
    assert digests(dst) == digests(fresh)


def test_file_system_without_hard_links_copies(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(95, "not supported")

    dst, fresh = tmp_path / "dst", tmp_path / "fresh"
    assert call(small, dst, ("convert", "SRC", "DST", *ARGS, "--mtp", "separate")) == 0
    after = ("convert", "SRC", "DST", *ARGS, "--mtp", "drop")
    assert call(small, fresh, after) == 0
    monkeypatch.setattr(os, "link", refused)
    assert call(small, dst, after, "--update") == 0
    assert digests(dst) == digests(fresh)


def test_files_of_the_old_result_are_closed(small: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    assert call(small, dst, FP8) == 0
    before = len(os.listdir("/proc/self/fd"))
    for size in ("90kB", "40kB", "70kB"):
        assert call(small, dst, (*FP8[:-3], "--max-shard-size", size, "-q"), "--update") == 0
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the buffers that are filled from files."""
    sizes: list[int] = []
    preadv = os.preadv

    def noted(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    return sizes


def test_max_memory_bounds_what_is_copied_and_proved(tmp_path: Path, reads: list[int]) -> None:
    """Both once went through 8 MiB for each worker, whatever was allowed."""
    src, dst = small_checkpoint(tmp_path / "src", vocab_size=3000), tmp_path / "dst"
    limited = ("--max-memory", "128KiB", "--workers", "2")
    before, after = (("convert", "SRC", "DST", "-q", "--max-shard-size", size) for size in ("300kB", "400kB"))
    assert call(src, dst, before, *limited) == 0
    reads.clear()
    assert call(src, dst, after, "--update", *limited) == 0
    assert 40_000 < max(reads) <= 64 << 10
    # opened again, the result is proved, and what it was made of is read again
    (dst / "LICENSE").unlink()
    for path in src.iterdir():
        os.utime(path, (1, 1))
    reads.clear()
    assert call(src, dst, after, *limited) == 0
    assert 40_000 < max(reads) <= 64 << 10
    assert sum(reads) > 2 * sum(path.stat().st_size for path in src.glob("*.safetensors"))


def test_forecast_of_an_update_counts_the_old_result_too(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    assert call(small, dst, FP8) == 0
    held = sum(path.stat().st_size for path in dst.glob("*.safetensors"))
    assert call(small, dst, EXACT[:-3], "--arithmetic", "compressed-tensors", "--update", "--dry-run", "--json") == 0
    forecast = json.loads(capsys.readouterr().out)["result"]["forecast"]
    assert forecast["peak_disk_bytes"] == forecast["write_bytes"] + held
    args = [arg for arg in EXACT if arg != "-q"]
    assert call(small, dst, tuple(args), "--update", "--dry-run") == 0
    assert "; with the old result, which stays until the new one is whole, at most " in capsys.readouterr().out
