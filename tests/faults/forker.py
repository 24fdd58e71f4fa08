"""A server that imports the program once and runs each command line asked for in a fork of itself, with a fault.

One JSON request a line on stdin, one JSON answer a line on stdout. See `harness.Runner` for both.
"""

import contextlib
import gc
import importlib
import json
import mmap
import os
import resource
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from builders import small_checkpoint
from huggingface_hub import constants

from converters.hub.fetch import RetryPolicy
from glm4moe_cli import main
from tests.faults import reading
from tests.faults.points import PATIENCE_SECONDS, Points

POLL_SECONDS = 0.0005


def program(request: dict[str, Any], counter: mmap.mmap) -> int:
    """Run the command line as the installed program would; return its exit code."""
    os.chdir(request.get("cwd", "/"))
    os.umask(request.get("umask", 0o022))
    points = Points(request["folder"], counter, **request.get("points", {}))
    points.install()
    if "reading" in request:
        reading.install(points, **request["reading"])
    for name, value in request.get("limits", {}).items():
        if name == "RLIMIT_AS":
            value += int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(getattr(resource, name), (value, value))
    for source in request.get("prepare", []):
        exec(source, {"__name__": "prepare"})
    sys.argv = ["glm4moe", *request["args"]]
    try:
        main.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:  # noqa: BLE001 - what the interpreter itself does at the top
        traceback.print_exc()
        code = 1
    # what the interpreter does at its end: wait for the threads of the pools
    threading._shutdown()
    if code == 0 and points.disk is not None:
        points.die()
    return code


def child(request: dict[str, Any], counter: mmap.mmap, output: int) -> None:
    """Be the program, with both its streams in a file."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        code = program(request, counter)
        sys.stdout.flush()
    finally:
        os._exit(code)


def serve_one(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, disturb the child as asked, and report how it ended."""
    # what a command needs beyond those that `warm_up` runs, once for all forks
    for name in request.get("imports", []):
        importlib.import_module(name)
    counter = mmap.mmap(-1, 16)
    with tempfile.TemporaryFile() as output:
        pid = os.fork()
        if pid == 0:
            child(request, counter, output.fileno())
        status, seconds = wait(pid, request, counter, time.monotonic())
        output.seek(0)
        text = output.read().decode(errors="replace")
    return {
        "code": os.waitstatus_to_exitcode(status),
        "seconds": seconds,
        "points": int.from_bytes(counter[:8], "little"),
        "reads": int.from_bytes(counter[8:16], "little"),
        "text": text,
    }


def wait(pid: int, request: dict[str, Any], counter: mmap.mmap, start: float) -> tuple[int, float]:
    """Send the signals when they are due: so many seconds after so many points were reached.

    Returns:
        The wait status, and the seconds from the first point to the end.
    """
    signals = list(request.get("signals", []))
    due = first_point = 0.0
    while True:
        now = time.monotonic()
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status, first_point and now - first_point
        points = int.from_bytes(counter[:8], "little")
        if points and not first_point:
            first_point = now
        if now - start > PATIENCE_SECONDS:
            signals = [[0, 0, "SIGKILL"]]
        if signals and points >= signals[0][0]:
            due = due or now + signals[0][1]
            if now >= due:
                os.kill(pid, signal.Signals[signals.pop(0)[2]])
                due = 0.0
        time.sleep(POLL_SECONDS)


def answer(line: str) -> None:
    """Write a line to the client."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def serve() -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        answer(json.dumps(serve_one(json.loads(line))))


def warm_up() -> None:
    """Run both commands once, so that a fork finds everything imported."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        src = str(small_checkpoint(Path(folder) / "src"))
        assert main.run(["convert", src, f"{folder}/a", "--json", "--workers", "1"]) == 0
        assert main.run(["quantize", src, f"{folder}/b", "--json", "--workers", "1", "--scheme", "fp8"]) == 0
        with socket.socket() as nobody:
            # nobody listens: what matters is what the library imports on its way there
            nobody.bind(("127.0.0.1", 0))
            constants.ENDPOINT = f"http://127.0.0.1:{nobody.getsockname()[1]}"
            RetryPolicy.delay = lambda self, failures, retry_after: 0.0
            assert main.run(["download", "org/name", f"{folder}/c", "--json"]) == 7
    # a collection in a fork would touch, and so copy, every page
    gc.collect()
    gc.freeze()
    # a fork of a process with threads would inherit their locks
    assert len(os.listdir("/proc/self/task")) == 1, os.listdir("/proc/self/task")


if __name__ == "__main__":
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warm_up()
    answer("ready")
    serve()
