"""Killed at any instant, a run is finished by the same command to the same bytes, and is never taken for finished."""

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.harness import KILLED, Job, Runner, each_point

Tally = Callable[[str], None]
Lanes = tuple[Runner, ...]
RANDOM_KILLS = 105
CHAINS = 20


def test_kill_at_every_point(job: Job, lanes: Lanes, tally: Tally) -> None:
    """Each call that changes the folder is cut in the middle by kill -9, then the command is run again."""

    def kill(own: Job, at: int) -> bool | None:
        ended = own.run(points={"at": at, "action": "kill"})
        if ended.code != KILLED:
            own.check_finished(ended)
            own.clear()
            return None
        is_whole = own.check_unfinished()
        own.finish_apart()
        return is_whole

    results = each_point(job, lanes, kill)
    assert len(results) > 100
    # the manifest comes last: before it a folder may be whole, never after a kill that lost something else
    assert 0 < sum(results) < 20
    words = f"killed -9 at each of {len(results)} points, {len(results)} resumed to the same bytes, 0 wrong"
    tally(f"crash: {job.command[0]} {words}")


def test_power_loss_at_every_point(job: Job, lanes: Lanes, tally: Tally) -> None:
    """At each point, data without fsync is lost, and in each folder the names after a random moment without one."""

    def cut(own: Job, at: int) -> bool | None:
        ended = own.run(points={"at": at, "action": "power", "seed": at})
        # a run that came to its end loses power after its last call: what it said is done has to stay
        assert ended.code == KILLED
        is_whole = own.check_unfinished()
        assert is_whole or ended.points >= at
        own.finish_apart()
        return is_whole if ended.points >= at else None

    tried = len(each_point(job, lanes, cut))
    assert tried > 100
    tally(f"crash: {job.command[0]} lost power at {tried} points, {tried} resumed to the same bytes, 0 wrong")


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_power_loss_after_the_end_takes_nothing_away(job: Job, seed: int | None) -> None:
    ended = job.run(points={"action": "power", "seed": seed, "at": 0})
    assert ended.code == KILLED
    assert job.check_unfinished()
    assert (job.dst / "glm4moe-manifest.json").exists()


def test_kill_at_random_moments(job: Job, lanes: Lanes, tally: Tally) -> None:
    """A clock, not a call, decides: kills also hit computation, reads and the gaps between calls."""
    usual = min(job.run().seconds for _ in range(3) if not job.clear())
    job.clear()

    def kill(own: Job, number: int) -> bool | None:
        moments = random.Random(number)
        for attempt in itertools.count(1):
            # two workers: their calls interleave as they like; a few kills come before the first call. A run that was
            # faster than usual is over: sooner, then
            moment = (number % 10 != 0, moments.uniform(0, usual / attempt), "SIGKILL")
            ended = own.run("--workers", "2", signals=[moment])
            own.check_unfinished() if ended.code == KILLED else own.check_finished(ended)
            own.finish_apart()
            if ended.code == KILLED:
                return True if number < RANDOM_KILLS else None
        return None

    live = len(each_point(job, lanes, kill))
    assert live >= RANDOM_KILLS - 1
    tally(f"crash: {job.command[0]} killed -9 at {live} random moments, {live} resumed to the same bytes, 0 wrong")


def test_kill_during_the_resume_of_a_resume(job: Job, tally: Tally) -> None:
    moments = random.Random(2)
    last = job.run().points
    job.clear()
    kills = 0
    for chain in range(CHAINS):
        for _ in range(4):
            action = "power" if chain % 2 else "kill"
            fault = {"at": moments.randint(1, last), "action": action, "seed": chain}
            kills += job.run(points=fault).code == KILLED
            job.check_unfinished()
        job.finish()
    assert kills > 2 * CHAINS
    tally(f"crash: {job.command[0]} killed {kills} times in {CHAINS} chains of resumed runs, 0 wrong")


def test_power_loss_during_a_restart_leaves_nothing_of_the_other_job(job: Job, work: Path, tally: Tally) -> None:
    """A restart removes another job's files; whichever of its removals are lost, no old byte may end up in the result.

    The other job differs only in arithmetic or in the number of shards, so that its files could pass for ours.
    """
    other = ("--max-shard-size", "20kB") if job.command[0] == "convert" else ("--arithmetic", "compressed-tensors")
    last = job.run(*other).points
    job.clear()
    assert job.run(*other, points={"at": last - 14, "action": "kill"}).code == KILLED
    shutil.copytree(job.dst, work / "unfinished")
    at, step = -4, 5
    while True:
        at += step
        job.clear()
        shutil.copytree(work / "unfinished", job.dst)
        ended = job.run("--restart", points={"at": at, "action": "power", "seed": at})
        again = job.run()
        job.check_finished(again if again.code == 0 else job.run("--restart"))
        if ended.points < at:
            break
    assert at > 100
    tally(f"crash: {job.command[0]} --restart lost power at {at // step} points, 0 wrong")


def test_a_second_run_into_a_finished_folder_changes_nothing(job: Job) -> None:
    job.check_finished(job.run())
    before = {path: path.stat().st_mtime_ns for path in job.dst.iterdir()}
    job.check_finished(job.run())
    assert before == {path: path.stat().st_mtime_ns for path in job.dst.iterdir()}
