"""shard and --merge killed at any instant: the same command finishes them to the same bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from converters.checkpoint.manifest import MANIFEST_FILE
from converters.errors import Glm4MoeError
from converters.shard.source import open_sharded
from glm4moe_cli import main
from tests.faults.harness import KILLED, Job, Runner, accepted, accepted_by_transformers, digests, make_job

SHARD = ("shard", "--tp", "2", "--ep", "2", "--pp", "1", "--max-shard-size", "30kB", "--workers", "1")
MERGE = ("shard", "--merge", "--max-shard-size", "60kB", "--workers", "1")


@dataclass(frozen=True)
class ShardJob(Job):
    """A job whose result is cut for ranks: whole is what our own reader of shards takes, with its manifest."""

    def check_unfinished(self) -> bool:
        found = digests(self.dst) if self.dst.exists() else {}
        final = {name: digest for name, digest in found.items() if not name.startswith(".")}
        assert final.items() <= self.expected.items()
        assert not accepted(self.dst)
        assert not accepted_by_transformers(self.dst)
        is_whole = final.keys() == self.expected.keys()
        assert taken(self.dst) == is_whole, sorted(final)
        assert is_whole == (MANIFEST_FILE in final)
        return is_whole


def taken(folder: Path) -> bool:
    """Tell whether a folder is taken for a whole sharded checkpoint."""
    try:
        open_sharded(folder).reader.close()
    except Glm4MoeError:
        return False
    return True


@pytest.fixture(params=["shard", "merge"])
def shard_job(request: pytest.FixtureRequest, runner: Runner, src: Path, work: Path) -> Job:
    if request.param == "merge":
        assert main.run(["shard", str(src), str(work / "cut"), *SHARD[1:], "-q"]) == 0
        return make_job(runner, MERGE, work / "cut", work)
    job = make_job(runner, SHARD, src, work)
    return ShardJob(job.runner, job.command, job.src, job.dst, job.expected)


def test_kill_at_every_point(shard_job: Job, tally: Callable[[str], None]) -> None:
    """Each call that changes the folder is cut in the middle by kill -9, then the command is run again."""
    at = whole = 0
    while True:
        at += 1
        ended = shard_job.run(points={"at": at, "action": "kill"})
        if ended.code != KILLED:
            break
        whole += shard_job.check_unfinished()
        shard_job.finish()
    shard_job.check_finished(ended)
    assert at > 50
    assert 0 < whole < 20
    kind = "shard --merge" if "--merge" in shard_job.command else "shard"
    tally(f"crash: {kind} killed -9 at each of {at - 1} points, {at - 1} resumed to the same bytes, 0 wrong")


def test_power_loss(shard_job: Job, tally: Callable[[str], None]) -> None:
    """At every third point, data without fsync is lost, and names after a random moment without one."""
    at = tried = 0
    while True:
        at += 3
        ended = shard_job.run(points={"at": at, "action": "power", "seed": at})
        shard_job.check_unfinished()
        if ended.points < at:
            break
        tried += 1
        shard_job.finish()
    shard_job.finish()
    assert tried > 15
    kind = "shard --merge" if "--merge" in shard_job.command else "shard"
    tally(f"crash: {kind} lost power at {tried} points, {tried} resumed to the same bytes, 0 wrong")


def test_a_resume_keeps_the_ranks_that_are_done(shard_job: Job) -> None:
    """Killed shortly before the end, nothing but what comes last is written again."""
    last = shard_job.run().points
    shard_job.clear()
    assert shard_job.run(points={"at": last - 8, "action": "kill"}).code == KILLED
    kept = {path.name: path.stat().st_mtime_ns for path in shard_job.dst.glob("*.safetensors")}
    assert kept
    shard_job.check_finished(shard_job.run())
    assert kept.items() <= {path.name: path.stat().st_mtime_ns for path in shard_job.dst.iterdir()}.items()
