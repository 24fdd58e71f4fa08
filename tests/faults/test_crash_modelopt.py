"""Killed while a result with a file of its own is written: hf_quant_config.json is as safe as config.json."""

from pathlib import Path

import pytest

from converters.formats.declared import MODELOPT_FILE
from tests.faults.harness import KILLED, Job, Runner, make_job

MODELOPT = ("quantize", "--scheme", "attention=nvfp4-weight-only", "--format", "modelopt", "--workers", "1")
# points of the first shards, which every job has, and the last ones, where the files around them are written
EVERY = 6
LAST = 30


@pytest.fixture
def modelopt(runner: Runner, src: Path, work: Path) -> Job:
    return make_job(runner, MODELOPT, src, work)


def test_kill_around_the_file_of_the_format(modelopt: Job) -> None:
    assert MODELOPT_FILE in modelopt.expected
    points = modelopt.run(points={"at": 0, "action": "kill"}).points
    modelopt.clear()
    tried = sorted({*range(1, points, EVERY), *range(max(1, points - LAST), points + 1)})
    with_file = 0
    for at in tried:
        assert modelopt.run(points={"at": at, "action": "kill"}).code == KILLED
        with_file += (modelopt.dst / MODELOPT_FILE).exists()
        modelopt.check_unfinished()
        modelopt.finish()
    # the file was there after some kills and missing after others
    assert 0 < with_file < len(tried)
