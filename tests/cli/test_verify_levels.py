"""`glm4moe verify` on bytes and weights: real results, then files that are really damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import read_tensors, small_checkpoint
from quantized import SIZES
from quantized_from import MAKERS, SCHEMA, write_pair
from safetensors.torch import save_file

from converters.job import run
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import Role
from converters.source import open_source
from tests.cli.conftest import Ended

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
Program = Callable[..., Ended]
UP = SCHEMA.tensor(Role.EXPERT, "up_proj.weight", 1, 2).module
COUNT = len(SCHEMA.tensors)


def quantize(source: Path, to: Path, **options: Any) -> Path:
    with open_source(source) as opened:
        run(plan_quantize(opened, QuantizeOptions(**options)), to, RunOptions(2), lambda _: None)
    return to


@pytest.fixture
def result(tmp_path: Path) -> tuple[Path, Path]:
    """A source and its NVFP4 copy, as `quantize` writes it."""
    source = small_checkpoint(tmp_path / "plain", **SIZES, num_hidden_layers=2)
    return source, quantize(source, tmp_path / "result", scheme="nvfp4-weight-only")


def verify(program: Program, result: tuple[Path, Path], *options: str) -> tuple[Ended, dict[str, Any]]:
    ended = program("verify", str(result[1]), "--against", str(result[0]), *options, "--json")
    return ended, json.loads(ended.stdout)


def test_levels_up_to_weights_are_the_default(program: Program, result: tuple[Path, Path]) -> None:
    ended, document = verify(program, result)
    found = document["result"]
    assert (ended.exit_code, found["verdict"], found["scheme"]) == (0, "pass", "nvfp4-weight-only")
    assert [check["metric"] for check in found["checks"]] == ["structure", "bytes", "weights"]
    assert found["bytes"]["record"] == "glm4moe-manifest.json"
    assert found["weights"]["tensors_compared"] == COUNT
    schemes = {row["scheme"]: row for row in found["weights"]["schemes"]}
    assert 0.08 < schemes["nvfp4"]["mean_relative_error"] < 0.11
    assert len(found["weights"]["worst"]) == 10
    assert found["not_checked"] == [
        "layers and routers",
        "logits",
        "outputs of the MTP layer",
        "generated text",
        "serving engines",
    ]


def flip(path: Path, name: str, byte: int, bit: int = 1) -> None:
    """Change one byte of a tensor in a safetensors file."""
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little")
    begin, _ = json.loads(data[8 : 8 + header])[name]["data_offsets"]
    data[8 + header + begin + byte] ^= bit
    path.write_bytes(data)


@pytest.mark.parametrize(("suffix", "byte"), [("weight_packed", 40), ("weight_scale", 3), ("weight_global_scale", 2)])
@pytest.mark.parametrize("level", ["bytes", "weights"])
def test_one_flipped_bit_fails(program: Program, result: tuple[Path, Path], level: str, suffix: str, byte: int) -> None:
    flip(result[1] / "model.safetensors", f"{UP}.{suffix}", byte)
    ended, document = verify(program, result, "--level", level)
    assert (ended.exit_code, document["result"]["verdict"]) == (3, "fail")
    subject = f"{UP}.{suffix}" if level == "bytes" else f"{UP}.weight"
    first, *others = [finding["subject"] for finding in document["result"][level]["findings"]]
    assert first == f"candidate: tensor {subject}"
    # the global scale is that of the fused group as well
    is_shared = level == "weights" and suffix == "weight_global_scale"
    assert all(f"{UP}.{suffix}" in other or other == first for other in others)
    assert any(f"{UP}.{suffix}" in other for other in others) is is_shared


def test_file_without_its_old_digest_is_caught_by_its_weights(program: Program, result: tuple[Path, Path]) -> None:
    """Written anew with correct headers and no manifest: nothing is wrong but two values."""
    source, copy = result
    tensors = read_tensors(copy)
    codes = tensors[f"{UP}.weight_packed"]
    codes[0, :2] = codes[0, :2].flip(0)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "glm4moe-manifest.json").unlink()
    ended, document = verify(program, (source, copy))
    assert ended.exit_code == 3
    assert document["result"]["bytes"]["record"] == ""
    assert "bytes of the files" in document["result"]["not_checked"]
    (finding,) = document["result"]["weights"]["findings"]
    assert finding["expected"] == "every element within half a step of its source"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
        (lambda folder: (folder / "LICENSE").unlink(), "LICENSE"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: shutil.copy(folder / "model.safetensors", folder / "old.safetensors"), "old.safetensors"),
    ],
)
def test_bytes_level_names_the_file(result: tuple[Path, Path], damage: Callable[[Path], object], expected: str) -> None:
    from converters.contents import check_contents

    damage(result[1])
    found = check_contents(result[1], 2, lambda total: lambda done: None)
    assert [finding.subject for finding in found.findings] == [f"candidate: {expected}"]


def test_bytes_level_without_digests_is_refused(program: Program, tmp_path: Path) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-fp8-channel"])
    assert program("verify", str(copy), "--against", str(source), "--level", "bytes") == Ended(
        2,
        "",
        "Error: --level bytes: expected a manifest or the listing of a download in CKPT, with digests, found none. "
        "Compare the weights with those of the source: --level weights.\n",
    )


def test_tables_show_formats_and_the_worst_tensors(program: Program, result: tuple[Path, Path]) -> None:
    ended = program("verify", str(result[1]), "--against", str(result[0]), "--level", "weights")
    lines = ended.stdout.splitlines()
    assert lines[0].startswith(f"PASS: nvfp4-weight-only: {COUNT} tensors compared element by element, relative error ")
    assert "stored as\tmust be\ttensors\tmean relative error\tlargest\tclipped" in lines
    assert any(line.startswith("nvfp4\trounded\t") for line in lines)
    start = lines.index("tensor\tstored as\trelative error\tSQNR dB\tslope\tclipped")
    errors = [float(line.split("\t")[2]) for line in lines[start + 1 : start + 11]]
    assert errors == sorted(errors, reverse=True)


def test_report_lists_every_tensor_and_is_the_same_every_time(
    program: Program, result: tuple[Path, Path], tmp_path: Path
) -> None:
    path, folder = tmp_path / "kept.json", tmp_path / "folder"
    call = ("verify", str(result[1]), "--against", str(result[0]), "--level", "weights", "--report")
    assert program(*call, str(path), "--workers", "1").exit_code == 0
    first = path.read_bytes()
    assert program(*call, str(path), "--workers", "3").exit_code == 0
    assert path.read_bytes() == first
    report = json.loads(first)
    figures = {row["tensor"]: row for row in report["weights"]["tensors"]}
    assert set(figures) == set(SCHEMA.tensors)
    row = figures[f"{UP}.weight"]
    assert row["outside"] == row["wrong_scales"] == 0
    assert row["sqnr_db"] == pytest.approx(21.7, abs=0.5)
    assert 0.01 < row["clipped"] < 0.06
    assert (report["source"], report["candidate"]) == (str(result[0]), str(result[1]))
    assert len(report["provenance"]["digests"]["source"]) == 64
    assert program(*call, str(folder)).exit_code == 0
    assert len((folder / "tensors.csv").read_text().splitlines()) == 1 + COUNT
    assert {"report.html", "report.json", "report.md"} <= {file.name for file in folder.iterdir()}


def test_candidate_that_headers_refuse_is_explained_before_the_error(program: Program, tmp_path: Path) -> None:
    source, copy = (small_checkpoint(tmp_path / name, **SIZES, num_hidden_layers=2) for name in ("source", "copy"))
    path = copy / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    gone = {name for name in index["weight_map"] if name.startswith("model.layers.1.mlp.experts.2.")}
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if name not in gone}
    path.write_text(json.dumps(index))
    ended = program("verify", str(copy), "--against", str(source))
    assert (ended.exit_code, ended.stdout, len(gone)) == (4, "", 3)
    warning, error = ended.stderr.splitlines()
    assert warning.startswith(
        "Warning: expert 2 of layer 1: it is in the files, but model.safetensors.index.json does not"
    )
    assert error.startswith("Error: ")


def test_checkpoint_cut_for_ranks_is_run_like_any_other(program: Program, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    assert program("shard", str(TINY), str(cut), "--tp", "2", "--ep", "2").exit_code == 0
    few = ("--num-tokens", "32", "--context-length", "32")
    ended, document = verify(program, (TINY, cut), "--level", "full", *few)
    found = document["result"]
    assert (ended.exit_code, found["verdict"], found["scheme"]) == (0, "pass", "identity")
    assert found["logits"]["summary"]["kl_nats"]["max"] == 0.0
    assert [layer["mlp"]["relative"] for layer in found["layers"]] == [0.0] * 8


@pytest.mark.parametrize("name", ["report.pdf", "report.csv"])
def test_report_of_another_kind_is_refused_before_anything_is_read(
    program: Program, result: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    call = ("verify", str(result[1]), "--against", str(result[0]), "--report", str(tmp_path / name))
    ended = program(*call)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert ended.stderr.startswith(f"Error: --report {tmp_path / name}: expected FILE.json, FILE.html, FILE.md")
