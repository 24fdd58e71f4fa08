"""Children: triton takes its mode from the environment when it is first imported, and keeps it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def child(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run a module of this folder as a program, with changes to the environment, and return its JSON."""

    def run(module: str, **changes: str) -> dict[str, Any]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
        environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), **changes}
        command = [sys.executable, "-m", f"tests.runtime.kernels.{module}"]
        ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return run
