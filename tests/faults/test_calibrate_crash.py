"""calibrate killed at any instant: the same command ends in the same bytes, and nothing wrong has a final name."""

import io
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from builders import small_checkpoint, write_byte_tokenizer

from glm4moe_cli import main
from tests.faults.conftest import TINY
from tests.faults.harness import KILLED, Ended, Job, Runner, digests

OPTIONS = ("--num-tokens", "40", "--context-length", "20", "--min-expert-tokens", "6", "--device", "cpu")
METHODS = {"minmax": (), "gptq": ("--method", "gptq", "--scheme", "int8-weight-only")}
# GPTQ writes codes and scales of every weight one by one: of points that are so much alike, every third
STEPS = {"minmax": 1, "gptq": 3}
STATS = "s.json"
# what a fork would import anew
IMPORTS = ["runtime.calibrate.kept", "runtime.engine.tokenizer", "transformers", "tokenizers"]


@dataclass(frozen=True)
class Calibration(Job):
    """A calibration into a folder that is there before; what it works with is hidden."""

    step: int
    method: str

    def run(self, *more: str, **request: Any) -> Ended:
        self.dst.mkdir(exist_ok=True)
        return self.runner(self._words(more), self.dst, imports=IMPORTS, **request)

    def _run_here(self) -> Ended:
        with io.StringIO() as text, redirect_stdout(text), redirect_stderr(text):
            return Ended(main.run(self._words(())), 0.0, 0, 0, text.getvalue())

    def _words(self, more: tuple[str, ...]) -> list[str]:
        command, *options = self.command
        return [command, str(self.src), str(self.dst / STATS), *options, *more]

    def check_unfinished(self) -> bool:
        final = {name: digest for name, digest in digests(self.dst).items() if "/." not in f"/{name}"}
        assert final.items() <= self.expected.items()
        assert STATS not in final or final == self.expected
        return STATS in final

    def check_finished(self, ended: Ended) -> None:
        super().check_finished(ended)
        assert {path.name for path in self.dst.iterdir()} == {name.split("/")[0] for name in self.expected}


@pytest.fixture
def src(work: Path) -> Path:
    """A checkpoint with a tokenizer of bytes, three layers with the MTP layer's, and a text beside it."""
    folder = small_checkpoint(work / "src", **{**TINY, "num_hidden_layers": 2, "vocab_size": 256})
    write_byte_tokenizer(folder)
    (work / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 2)
    return folder


@pytest.fixture(params=METHODS)
def calibration(request: pytest.FixtureRequest, runner: Runner, src: Path, work: Path) -> Calibration:
    command = ("calibrate", "--text", str(work / "text.txt"), *OPTIONS, *METHODS[request.param])
    method = f"calibrate, {request.param}"
    job = Calibration(runner, command, src, work / "out", {}, STEPS[request.param], method)
    ended = job.run()
    assert ended.code == 0, ended.text
    job.expected.update(digests(job.dst))
    job.clear()
    return job


def test_kill_at_every_point(calibration: Calibration, tally: Callable[[str], None]) -> None:
    """Calls that change the folder are cut in the middle by kill -9, then the command is run again."""
    at = tried = whole = resumed = 0
    while True:
        at += calibration.step
        ended = calibration.run(points={"at": at, "action": "kill"})
        if ended.code != KILLED:
            break
        tried += 1
        whole += calibration.check_unfinished()
        resumed += any(calibration.dst.rglob("point.json"))
        calibration.finish()
    calibration.check_finished(ended)
    assert tried > 40
    assert 0 < whole < 12
    assert resumed > 15
    tally(f"crash: {calibration.method} killed -9 at {tried} points, {tried} ended in the same bytes, 0 wrong")


def test_power_loss(calibration: Calibration, tally: Callable[[str], None]) -> None:
    """At some of the points, data without fsync is lost, and names after a random moment without one."""
    at = tried = 0
    while True:
        at += 3 * calibration.step
        ended = calibration.run(points={"at": at, "action": "power", "seed": at})
        calibration.check_unfinished()
        if ended.points < at:
            break
        tried += 1
        calibration.finish()
    assert tried > 10
    tally(f"crash: {calibration.method} lost power at {tried} points, {tried} ended in the same bytes, 0 wrong")


def test_killed_twice(calibration: Calibration) -> None:
    """A run that goes on is killed as well."""
    points = calibration.run().points
    calibration.clear()
    for first in range(points // 3, points, points // 6):
        assert calibration.run(points={"at": first, "action": "kill"}).code == KILLED
        ended = calibration.run(points={"at": 12, "action": "kill"})
        calibration.check_unfinished()
        assert ended.code in (KILLED, 0)
        calibration.finish()


@pytest.mark.parametrize("action", ["full", "EIO"])
def test_a_disk_that_takes_no_more(calibration: Calibration, action: str) -> None:
    """Exit 5 with what is finished kept; the same command goes on when there is room."""
    points = calibration.run().points
    calibration.clear()
    for at in range(3, points, points // 8):
        ended = calibration.run(points={"at": at, "action": action})
        assert ended.code in (0, 5), ended.text
        assert "Traceback" not in ended.text
        calibration.check_unfinished()
        calibration.finish()


@dataclass(frozen=True)
class Quantization(Calibration):
    """The same within quantize, whose statistics lie beside the result."""

    def _words(self, more: tuple[str, ...]) -> list[str]:
        command, *options = self.command
        return [command, str(self.src), str(self.dst / "dst"), *options, *more]


def test_quantize_killed_while_it_calibrates_and_after(runner: Runner, src: Path, work: Path) -> None:
    calibrated = ("--calibrate", str(work / "text.txt"), "--num-tokens", "40", "--context-length", "20")
    job = Quantization(runner, ("quantize", *METHODS["gptq"], *calibrated), src, work / "out", {}, 13, "quantize")
    ended = job.run()
    assert ended.code == 0, ended.text
    job.expected.update(digests(job.dst))
    job.clear()
    for at in range(job.step, ended.points, job.step):
        assert job.run(points={"at": at, "action": "kill"}).code == KILLED
        job.finish()
