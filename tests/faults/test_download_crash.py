"""A download killed, cut from power or out of disk at every call that changes its folder ends with the same bytes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import small_checkpoint
from fake_hub import REPO, FakeHub, read_folder

from tests.faults.conftest import TINY
from tests.faults.harness import KILLED, Ended, Runner, accepted

Tally = Callable[[str], None]
# the forker has the library imported with another address; a record after every piece makes for more points
PREPARE = """
import os
from huggingface_hub import constants
from converters.hub import partial
constants.ENDPOINT = {endpoint!r}
constants.HUGGINGFACE_CO_URL_TEMPLATE = {endpoint!r} + "/{{repo_id}}/resolve/{{revision}}/{{filename}}"
constants.HF_TOKEN_PATH = "/nonexistent"
partial.SYNC_BYTES = 1
"""


class Download:
    """A download that can be disturbed."""

    def __init__(self, runner: Runner, hub: FakeHub, dst: Path) -> None:
        self.runner, self.hub, self.dst = runner, hub, dst
        self.expected = hub.commits[hub.commit]

    def run(self, **request: object) -> Ended:
        args = ["download", REPO, str(self.dst), "--workers", "1"]
        return self.runner(args, self.dst, prepare=[PREPARE.format(endpoint=self.hub.endpoint)], **request)

    def check_unfinished(self) -> None:
        """Check that what has a final name is right, and that a part is not taken for the whole."""
        found = read_folder(self.dst) if self.dst.exists() else {}
        assert found.items() <= self.expected.items()
        assert accepted(self.dst) == ("config.json" in found)
        assert "config.json" not in found or found == self.expected

    def check_finished(self, ended: Ended) -> None:
        assert ended.code == 0, ended.text
        assert read_folder(self.dst) == self.expected
        state = sorted(path.name for path in (self.dst / ".glm4moe").rglob("*"))
        assert state == ["listing.json", "lock"]


@pytest.fixture
def download(runner: Runner, work: Path) -> Iterator[Download]:
    src = small_checkpoint(work / "src", num_shards=2, mtp_copies=False, **TINY)
    hub = FakeHub({path.name: path.read_bytes() for path in src.iterdir() if path.name != "LICENSE"})
    yield Download(runner, hub, work / "dst")
    hub.close()


@pytest.mark.parametrize(
    ("action", "step", "code", "words"),
    [("kill", 1, KILLED, "killed -9"), ("power", 3, KILLED, "lost power"), ("full", 6, 5, "found the disk full")],
)
def test_disturbed_at_every_point(
    download: Download, tally: Tally, work: Path, action: str, step: int, code: int, words: str
) -> None:
    at = 1
    while True:
        download.dst = work / f"dst-{at}"
        points = {"at": at, "action": action, **({"seed": at} if action == "power" else {})}
        ended = download.run(points=points)
        download.check_unfinished()
        if ended.points < at:
            break
        # at the very end a full disk hinders nothing
        assert ended.code == code or (action == "full" and read_folder(download.dst) == download.expected), ended.text
        download.check_finished(download.run())
        at += step
    download.check_finished(ended if action != "power" else download.run())
    assert at > 80
    tried = at // step
    tally(f"crash: download {words} at {tried} points, {tried} resumed to the same bytes, 0 wrong")
