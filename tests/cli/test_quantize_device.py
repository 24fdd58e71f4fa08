"""quantize --device: where it computes, and what it says where that is not possible."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantizing import checkpoint

from runtime.kernels import accelerator
from tests.cli.conftest import Ended
from tests.converters.test_accelerator import Fake, contents

Program = Callable[..., Ended]
EXPECTED = "expected an NVIDIA GPU of compute capability 8.0 or newer, and triton, found "
NEXT = "Use --device cpu: the result has the same bytes."


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return checkpoint(tmp_path / "src")


def has_gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] | None) -> None:
    """Let the machine have a GPU, or none."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)


def test_cuda_is_refused_where_there_is_no_gpu(
    program: Program, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_gpu(monkeypatch, None)
    ended = program("quantize", str(src), str(tmp_path / "dst"), "--scheme", "fp8", "--device", "cuda")
    assert ended.exit_code == 2
    assert ended.stderr == f"Error: --device cuda: {EXPECTED}no GPU that torch can use. {NEXT}\n"
    assert not (tmp_path / "dst").exists()


def test_cuda_is_refused_on_an_old_gpu_and_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    has_gpu(monkeypatch, (7, 5))
    assert accelerator.missing_for_cuda() == "one of capability 7.5"
    has_gpu(monkeypatch, (9, 0))
    assert accelerator.missing_for_cuda() == ""
    monkeypatch.setattr(accelerator.importlib.util, "find_spec", lambda name: None)
    assert accelerator.missing_for_cuda() == "no triton"
    assert accelerator.open_accelerator("auto") is None


@pytest.mark.parametrize("device", [[], ["--device", "auto"], ["--device", "cpu"]])
def test_without_a_gpu_the_cpu_computes(
    program: Program, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: list[str]
) -> None:
    has_gpu(monkeypatch, None)
    ended = program("quantize", str(src), str(tmp_path / "dst"), "--scheme", "fp8", *device)
    assert ended.exit_code == 0
    assert "quantizing on" not in ended.stderr


def test_an_accelerator_is_named_and_changes_no_byte(
    program: Program, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake()
    assert program("quantize", str(src), str(tmp_path / "cpu"), "--scheme", "int8", "--device", "cpu").exit_code == 0
    monkeypatch.setattr(accelerator, "open_accelerator", lambda device: fake if device == "cuda" else None)
    ended = program("quantize", str(src), str(tmp_path / "fake"), "--scheme", "int8", "--device", "cuda")
    assert ended.exit_code == 0
    assert "quantizing on fake\n" in ended.stderr
    assert fake.calls
    assert contents(tmp_path / "fake") == contents(tmp_path / "cpu")
