"""Quantized folders, each made once, and the vLLM that GLM4MOE_VLLM_PYTHON names."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from converters.quant.stats import CalibrationStats
from tests.consumers.cases import CASES, quantized, random_source, random_stats

VLLM_TIMEOUT_S = 600


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantized random model."""
    return random_source(tmp_path_factory.mktemp("consumers") / "source")


@pytest.fixture(scope="session")
def stats(source: Path) -> CalibrationStats:
    return random_stats(source)


@pytest.fixture(scope="session")
def result(source: Path, stats: CalibrationStats) -> Callable[[str], Path]:
    """Return the folder of a case."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = quantized(source, source.parent / name, CASES[name], stats)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def vllm_run() -> Callable[..., None]:
    """Run a script beside this file with the interpreter that has vLLM; skip where there is none."""
    python = os.environ.get("GLM4MOE_VLLM_PYTHON")
    if not python:
        pytest.skip("GLM4MOE_VLLM_PYTHON names no interpreter with vLLM")

    def run(script: str, *arguments: str | Path) -> None:
        command = (python, Path(__file__).with_name(script), *arguments)
        done = subprocess.run(command, capture_output=True, text=True, timeout=VLLM_TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    return run
