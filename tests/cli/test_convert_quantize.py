"""The two writing commands through their real entry: exact text, exit codes, files on disk."""

import json
from pathlib import Path

import pytest
from builders import assert_same_tensors, read_tensors, small_checkpoint, small_config

from glm4moe_cli.main import run


def test_convert_prints_plan_and_result_and_writes_the_same_tensors(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dst = tmp_path / "dst"
    assert (
        run(["convert", str(small), str(dst), "--max-shard-size", "100kB", "--workers", "1", "--max-memory", "1MiB"])
        == 0
    )
    assert capsys.readouterr().out.splitlines() == [
        "source\t262.7kB in 107 tensors",
        "MTP layer\tlayer 3, with its own embedding and head",
        "output\t273.9kB in 107 tensors, 3 shards",
        "made by\tcopy 262.7kB",
        "memory\t9.2kB in flight, 1 workers",
        "reads\t262.7kB",
        "writes\t273.9kB, which is also the disk it needs",
        "time\t0s at the measured rate, if the disk keeps up",
        "fits TP\t1, 2",
        "loads in\tvLLM, SGLang, TensorRT-LLM, transformers",
        f"folder\t{dst}",
        "written\t3 shards",
    ]
    assert_same_tensors(read_tensors(small), read_tensors(dst))


def test_quantize_hints_at_verify(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(small), str(tmp_path / "q"), "--scheme", "fp8"]) == 0
    printed = capsys.readouterr()
    assert "made by\tcopy 37.7kB, fp8 per channel 117.5kB\n" in printed.out
    assert printed.err.splitlines()[-1] == f"Hint: glm4moe verify {tmp_path / 'q'} --against {small} --text FILE"


@pytest.mark.parametrize("command", [["convert"], ["quantize", "--scheme", "fp8"]])
def test_dry_run_plans_the_bytes_later_written_and_writes_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    dst = tmp_path / "dst"
    args = [command[0], str(small), str(dst), *command[1:], "--max-shard-size", "60kB", "--json"]
    assert run([*args, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert not dst.exists()
    assert planned["result"]["dry_run"] is True
    assert run(args) == 0
    written = json.loads(capsys.readouterr().out)
    assert written["result"]["plan"] == planned["result"]["plan"]
    shards = {shard["file"]: shard["bytes"] for shard in planned["result"]["plan"]["shards"]}
    assert shards == {path.name: path.stat().st_size for path in dst.glob("*.safetensors")}
    assert len(shards) > 2


def test_arithmetic_reaches_the_bytes(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src", hidden_size=96)
    for name in ("float32", "compressed-tensors"):
        assert run(["quantize", str(src), str(tmp_path / name), "--scheme", "fp8", "--arithmetic", name, "-q"]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("float32", "compressed-tensors")]
    assert len(files[0]) == len(files[1])
    assert files[0] != files[1]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["convert", "SMALL", "SMALL"], 2, "DST SMALL: expected a folder outside SRC, found one inside SMALL"),
        (["convert", "SMALL", "NEW", "--mtp", "move"], 2, "'move' is not one of 'keep', 'drop', 'separate'"),
        (["convert", "SMALL", "NEW", "--max-shard-size", "5G"], 2, "'5G' is not a size such as 5GB"),
        (["convert", "ABSENT", "NEW"], 2, "ABSENT"),
        (
            ["convert", "SMALL", "NEW", "--max-memory", "10B", "--workers", "1"],
            5,
            "--max-memory: expected at least 192",
        ),
        (["quantize", "SMALL", "NEW"], 2, "Missing option '--scheme'"),
        (["quantize", "SMALL", "NEW", "--scheme", "fp4"], 2, "--scheme: expected one of fp8, fp8-block,"),
    ],
)
def test_request_that_cannot_work_is_refused_and_writes_nothing(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, message: str
) -> None:
    names = {"SMALL": str(small), "NEW": str(tmp_path / "new"), "ABSENT": str(tmp_path / "absent")}
    for name, value in names.items():
        message = message.replace(name, value)
    assert run([names.get(arg, arg) for arg in args]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "new").exists()


def test_broken_input_exits_with_4_and_an_unsafe_one_with_8(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small / "config.json").write_text(json.dumps(small_config(head_dim=None)))
    assert run(["convert", str(small), str(tmp_path / "dst")]) == 4
    assert capsys.readouterr().err == (
        "Error: config.json: head_dim: expected an integer from 1 to 1048576, found nothing. "
        "It is never guessed; add it as the original model has it.\n"
    )
    (small / "config.json").write_text(json.dumps(small_config()))
    for path in small.glob("*.safetensors*"):
        path.unlink()
    (small / "pytorch_model.bin").write_bytes(b"\x80\x04")
    assert run(["convert", str(small), str(tmp_path / "dst")]) == 8
    assert "Pickled weights can run code and are never opened." in capsys.readouterr().err


def test_unlisted_mtp_file_is_taken_in_with_a_warning(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["convert", str(small), str(tmp_path / "a"), "--mtp", "separate", "-q"]) == 0
    (tmp_path / "a" / "model.safetensors.index.json").unlink()
    assert run(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "-q"]) == 0
    assert capsys.readouterr().err == "Warning: mtp.safetensors is not in the index; its tensors were taken in.\n"
    assert_same_tensors(read_tensors(tmp_path / "b"), read_tensors(small))


def test_layout_and_dequantize_in_one_pass_and_back(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(small), str(tmp_path / "fp8"), "--scheme", "fp8", "-q"]) == 0
    args = ["convert", str(tmp_path / "fp8"), str(tmp_path / "packed"), "--layout", "packed", "--dequantize"]
    capsys.readouterr()
    assert run([*args, "--workers", "1"]) == 0
    printed = capsys.readouterr().out
    assert "made by\tcopy 37.7kB, dequantize to BF16 225.0kB\n" in printed
    assert "in 77 tensors, 1 shards\n" in printed
    assert run(["convert", str(tmp_path / "packed"), str(tmp_path / "split"), "--layout", "split", "-q"]) == 0
    assert run(["convert", str(tmp_path / "fp8"), str(tmp_path / "plain"), "--dequantize", "-q"]) == 0
    assert_same_tensors(read_tensors(tmp_path / "split"), read_tensors(tmp_path / "plain"))


def test_checkpoint_without_the_announced_mtp_layer_gives_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    src = small_checkpoint(tmp_path / "src", mtp=False)
    assert run(["convert", str(src), str(tmp_path / "dst"), "--json"]) == 0
    printed = capsys.readouterr()
    note = "config.json announces an MTP layer, but the checkpoint has no tensor of it."
    assert printed.err.splitlines()[0] == f"Warning: {note}"
    document = json.loads(printed.out)
    assert document["warnings"] == document["result"]["plan"]["notes"] == [note]


@pytest.mark.parametrize(
    ("options", "loads_in"),
    [
        ([], "what loads this quantization format; its codes are copied as they are"),
        (["--layout", "packed"], "not known for quantized weights in this layout; --layout split is what engines load"),
        (["--layout", "packed", "--dequantize"], "transformers, vLLM"),
        (["--layout", "fused", "--dequantize"], "this tool only; convert it back with --layout split"),
    ],
)
def test_forecast_names_engines_only_where_they_are_known(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], loads_in: str
) -> None:
    assert run(["quantize", str(small), str(tmp_path / "fp8"), "--scheme", "fp8", "-q"]) == 0
    assert run(["convert", str(tmp_path / "fp8"), str(tmp_path / "dst"), *options, "--dry-run"]) == 0
    assert f"loads in\t{loads_in}\n" in capsys.readouterr().out
