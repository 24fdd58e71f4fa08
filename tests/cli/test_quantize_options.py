"""`glm4moe quantize` with statistics, and what it says of the result."""

import json
from pathlib import Path

import pytest
from builders import read_tensors
from quantizing import checkpoint, statistics

from glm4moe_cli.main import run

CALIBRATION = ["--num-tokens", "64", "--context-length", "32"]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("options") / "src")


def test_statistics_of_a_file_give_input_scales(src: Path, tmp_path: Path) -> None:
    stats = statistics(src)
    stats.save(tmp_path / "stats.json")
    command = [
        "quantize",
        str(src),
        str(tmp_path / "dst"),
        "--scheme",
        "nvfp4",
        "--stats",
        str(tmp_path / "stats.json"),
    ]
    assert run([*command, "-q"]) == 0
    tensors = read_tensors(tmp_path / "dst")
    module = "model.layers.1.mlp.experts.1.down_proj"
    assert float(tensors[f"{module}.input_global_scale"]) == pytest.approx(2688 / stats.input_amax[module], rel=1e-7)
    manifest = json.loads((tmp_path / "dst" / "glm4moe-manifest.json").read_text())
    assert manifest["job"]["options"]["stats_sha256"] == stats.sha256


def test_calibration_on_the_way_is_kept_and_used_again(
    tiny: Path, held_out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny), str(tmp_path / "dst"), "--scheme", "fp8-static"]
    command += ["--calibrate", str(held_out), *CALIBRATION]
    assert run([*command, "--dry-run"]) == 2
    assert "--calibrate: expected --stats FILE for a dry run" in capsys.readouterr().err
    assert not (tmp_path / "dst.stats.json").exists()
    assert run([*command, "-q"]) == 0
    assert (tmp_path / "dst.stats.json").is_file()
    # the same command is the same job, and measures nothing anew
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["outcome"]["already_finished"] is True
    assert run([*command, "--num-tokens", "32", "-q"]) == 2
    assert "dst.stats.json: expected no file, or the statistics of these texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--scheme", "nvfp4"],
            "--scheme nvfp4: expected statistics of calibration, found none. Run 'glm4moe calibrate",
        ),
        (["--scheme", "fp8", "--stats", "STATS"], "--stats: expected a scheme with calibrated scales"),
        (["--scheme", "nvfp4", "--stats", "STATS", "--calibrate", "STATS"], "--calibrate: expected no --stats beside"),
        (["--scheme", "nvfp4", "--num-tokens", "8"], "--num-tokens: expected --calibrate TEXT beside it, found none"),
        (["--scheme", "nvfp4", "--format", "deepseek"], "--format deepseek: expected one of its schemes: fp8-block"),
        (["--scheme", "fp8", "--preset", "heads"], "'heads' is not one of 'all-linear', 'mlp-only', 'experts-only'"),
    ],
)
def test_refusals_name_the_option(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    statistics(src).save(tmp_path / "stats.json")
    given = [str(tmp_path / "stats.json") if option == "STATS" else option for option in options]
    assert run(["quantize", str(src), str(tmp_path / "dst"), *given]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "dst").exists()


def test_plan_tells_engines_limits_and_warnings(src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(src), str(tmp_path / "dst"), "--scheme", "int8-weight-only", "--group-size", "64"]
    assert run([*command, "--dry-run"]) == 0
    printed = capsys.readouterr()
    lines = dict(line.split("\t", 1) for line in printed.out.splitlines())
    assert lines["loads in"] == "vLLM, SGLang, transformers"
    assert lines["experts"] == "1, 2 of 128 in groups of 64; 128 / 4 = 32 is 0.5 groups of 64"
    assert lines["dense"] == "1, 2, 4 of 256 in groups of 64; 256 / 8 = 32 is 0.5 groups of 64"
    assert lines["tensor parallel"] == lines["fits TP"] == "1, 2"
    assert lines["with expert parallel"] == "1, 2"
    note = "int8-weight-only as compressed-tensors: TensorRT-LLM does not read packed int8."
    assert printed.err.splitlines() == [f"Warning: {note}"]
    assert run([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["result"]["plan"]
    assert plan["notes"] == [note]
    assert plan["limits"]["tensor parallel"] == "1, 2"


def test_modelopt_result_has_its_file_in_plan_and_manifest(
    src: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(src), str(tmp_path / "dst"), "--scheme", "nvfp4-weight-only", "--format", "modelopt"]
    assert run([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["outcome"]["written"] == ["model.safetensors"]
    file = json.loads((tmp_path / "dst" / "hf_quant_config.json").read_text())
    assert file["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert run(["inspect", str(tmp_path / "dst"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["result"]
    assert "nvfp4-weight-only" in json.dumps(found)
    # without dequantizing, the file goes along with the codes; with it, it does not
    convert = ["convert", str(tmp_path / "dst")]
    assert run([*convert, str(tmp_path / "same"), "-q"]) == 0
    assert run([*convert, str(tmp_path / "plain"), "--dequantize", "-q"]) == 0
    assert (tmp_path / "same" / "hf_quant_config.json").exists()
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
