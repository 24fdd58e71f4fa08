"""`glm4moe doctor` through its real entry."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from converters.doctor import report, storage
from converters.doctor.hardware import Devices
from glm4moe_cli.commands import doctor
from glm4moe_cli.main import COMMANDS
from tests.cli.conftest import Ended
from tests.converters.doctor.test_machine import MACHINE

Program = Callable[..., Ended]


@pytest.fixture(autouse=True)
def small_probe_and_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(report, "disk", lambda folder: storage.disk(folder, probe_bytes=1 << 20))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_never_shown")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.chdir(tmp_path)


def test_this_machine_can_run_glm4moe(program: Program, tmp_path: Path) -> None:
    ended = program("doctor")
    assert ended.exit_code == 0
    lines = ended.stdout.splitlines()
    assert lines[0] == "glm4moe can work here"
    assert "hub\thttps://huggingface.co: not asked: offline mode is set" in lines
    assert "HF_TOKEN\tset, not shown" in lines
    assert f"locks of {tmp_path}\texclude" in lines
    start = lines.index("command\truns\tneeds")
    assert [line.split("\t")[0] for line in lines[start + 1 :]] == list(COMMANDS)
    assert "hf_never_shown" not in ended.stdout + ended.stderr
    assert list(tmp_path.iterdir()) == []


def test_json_has_everything_but_the_token(program: Program) -> None:
    ended = program("doctor", "--json")
    assert "hf_never_shown" not in ended.stdout
    result = json.loads(ended.stdout)["result"]
    assert result["problems"] == []
    assert result["memory"]["total_bytes"] > 0
    assert result["disks"][0]["locks_exclude"] is True
    assert result["hub"]["reachable"] is None
    assert {package["name"] for package in result["packages"]} >= {"torch", "transformers", "safetensors", "triton"}
    assert [item["command"] for item in result["abilities"]] == list(COMMANDS)


def test_a_gpu_machine_in_full(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_: MACHINE)
    lines = program("doctor").stdout.splitlines()
    assert lines[:16] == [
        "glm4moe can work here",
        "system\tLinux",
        "cores\t16",
        "memory\t107.4GB free of 137.4GB, group: 96.6GB",
        "shared memory\t1.1GB free",
        "GPU 0\tNVIDIA H200, 149.3GB free of 151.4GB, compute capability 9.0, native: bfloat16, fp8",
        "GPU kernels\tyes",
        "disk of /data\t536.9GB free on ext4, writes 1.0GB/s, reads 2.0GB/s",
        "locks of /data\texclude",
        "open files\t4096",
        "hub\thttps://huggingface.co: answered in 0.1 s",
        "package\tversion\tneeded",
        "python\t3.11.7\t3.11",
        "torch\t2.13.0\t2.10",
        "triton\t3.9.0\t-",
        "command\truns\tneeds",
    ]
    assert "convert\tany checkpoint\troom for the result: 500 GiB free here" in lines


def test_a_machine_without_torch_is_unusable(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(MACHINE, devices=Devices(problem="torch: expected to be importable, found No module named torch"))
    monkeypatch.setattr(doctor, "examine", lambda *_: machine)
    ended = program("doctor", "--quiet")
    assert ended.exit_code == 5
    assert ended.stdout == "unusable: torch: expected to be importable, found No module named torch\n"
    assert ended.stderr == (
        "Error: this machine: expected what glm4moe needs, found torch: expected to be importable, found No module "
        "named torch. Install glm4moe into a new environment of a current Python.\n"
    )
