"""`--help` answers at once: no command pays for libraries that only its work needs."""

import resource
import subprocess
import sys

import pytest

from glm4moe_cli.main import COMMANDS
from tests.architecture.sources import ROOT

HEAVY = {"huggingface_hub", "rich", "safetensors", "tokenizers", "torch", "transformers", "triton"}
MAX_CPU_SECONDS = 0.5


# what `python -m glm4moe_cli` does, with the imported modules on stderr at the end
PROGRAM = """
import atexit, runpy, sys
atexit.register(lambda: print(*sys.modules, file=sys.stderr))
runpy.run_module("glm4moe_cli", run_name="__main__", alter_sys=True)
"""


def imported_by(*args: str) -> set[str]:
    """Run the program and return the modules it imported."""
    ended = subprocess.run([sys.executable, "-c", PROGRAM, *args], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.startswith("Usage: ")
    return set(ended.stderr.split())


def test_help_imports_no_heavy_library_and_no_command() -> None:
    imported = imported_by("--help")
    assert "click" in imported
    assert imported & HEAVY == set()
    assert {name for name in imported if name.startswith("glm4moe_cli.commands.")} == set()


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_imports_no_heavy_library(command: str) -> None:
    imported = imported_by(command, "--help")
    assert f"glm4moe_cli.commands.{command}" in imported
    assert imported & HEAVY == set()


def test_help_takes_under_half_a_second() -> None:
    """CPU time, so that a busy machine does not fail it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "glm4moe_cli", "--help"], cwd=ROOT, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < MAX_CPU_SECONDS
