"""Several runs at once: the second is refused, and without locks nothing wrong comes out of it either."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.faults.conftest import COMMANDS
from tests.faults.harness import KILLED, Ended, Job, Runner, accepted, digests, make_job

Tally = Callable[[str], None]
SECOND_RUNS = 8
NO_LOCKS = "import fcntl; fcntl.flock = lambda *args: None"


@pytest.fixture
def beside(job: Job, second_runner: Runner) -> Job:
    """The same job, run by the other server."""
    return Job(second_runner, job.command, job.src, job.dst, job.expected)


def in_thread(job: Job, **request: object) -> tuple[threading.Thread, list[Ended]]:
    ended: list[Ended] = []
    thread = threading.Thread(target=lambda: ended.append(job.run(**request)))
    thread.start()
    return thread, ended


def test_second_run_is_refused_and_the_first_unharmed(job: Job, beside: Job, work: Path, tally: Tally) -> None:
    """The first goes on through its calls, and does not finish before the others were refused."""
    thread, first = in_thread(job, points={"delay": 0.01, "hold": ".config.json.", "until": str(work / "go")})
    while not (job.dst / ".glm4moe" / "job.json").exists():
        assert thread.is_alive()
    for _ in range(SECOND_RUNS):
        # a reader during a writer sees that something is missing
        assert not accepted(job.dst)
        ended = beside.run()
        assert ended.code == 6, ended.text
        assert "expected no other run in it, found process" in ended.text
    (work / "go").touch()
    thread.join()
    job.check_finished(first[0])
    job.check_finished(beside.run())
    tally(f"concurrency: {SECOND_RUNS} second runs beside one of {job.command[0]}: exit 6, 0 wrong")


def test_lock_of_a_dead_run_is_no_obstacle(job: Job) -> None:
    assert job.run(points={"at": 50, "action": "kill"}).code == KILLED
    assert "process" in (job.dst / ".glm4moe" / "lock").read_text()
    job.finish()


def test_two_runs_without_working_locks_do_no_harm(job: Job, beside: Job, tally: Tally) -> None:
    """As on a cluster's file system that only pretends to lock: at worst the work is done twice."""
    moments, pairs, unfinished = random.Random(4), 12, 0
    for _ in range(pairs):
        delays = [moments.uniform(0, 0.004) for _ in range(2)]
        thread, first = in_thread(job, prepare=[NO_LOCKS], points={"delay": delays[0]})
        # one of them may be killed in between
        fault = {"delay": delays[1], "at": moments.randint(1, 400), "action": "kill"}
        second = beside.run(prepare=[NO_LOCKS], points=fault)
        thread.join()
        for ended in (first[0], second):
            assert ended.code in (0, 6, KILLED), ended.text
            assert "Traceback" not in ended.text
        final = {name: digest for name, digest in digests(job.dst).items() if not name.startswith(".")}
        assert final.items() <= job.expected.items()
        unfinished += final != job.expected
        job.run()
        job.finish()
    tally(f"concurrency: {pairs} pairs of {job.command[0]} without locks: {unfinished} unfinished, 0 wrong")


def test_parts_killed_at_random_are_done_by_the_same_commands(runner: Runner, src: Path, work: Path) -> None:
    job = make_job(runner, COMMANDS["quantize"], src, work)
    moments = random.Random(5)
    for _ in range(6):
        for _ in range(2):
            for part in ("1/3", "2/3", "3/3"):
                job.run("--part", part, points={"at": moments.randint(1, 120), "action": "power", "seed": 1})
                job.check_unfinished()
        for part in ("3/3", "1/3", "2/3"):
            assert job.run("--part", part).code == 0
        job.finish()


def test_parts_that_end_at_the_same_time_leave_a_finished_folder(job: Job, beside: Job) -> None:
    """The last one must see what the others did, whoever looks first."""
    for _ in range(10):
        with ThreadPoolExecutor(2) as pool:
            parts = [pool.submit(job.run, "--part", "1/2"), pool.submit(beside.run, "--part", "2/2")]
        for part in parts:
            assert part.result().code in (0, 6), part.result().text
        if all(part.result().code == 0 for part in parts):
            assert digests(job.dst) == job.expected
        job.clear()
