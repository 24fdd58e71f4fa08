"""A small checkpoint on a fake hub, and a download of it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from builders import small_checkpoint
from fake_hub import REPO, FakeHub, serving

from converters.download import Hub
from converters.findings import Finding
from converters.hub.fetch import RetryPolicy
from converters.hub.job import begun, check_present, check_whole, fetch_files
from converters.hub.plan import Request, plan_download


class Done(NamedTuple):
    """What a download reported: the sum of its progress, and the files it found damaged."""

    num_bytes: int
    damaged: list[Finding]


@pytest.fixture(scope="session")
def checkpoint_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A complete checkpoint in two shards of about 150 kB with the files around it, one of them in a folder."""
    folder = small_checkpoint(tmp_path_factory.mktemp("repo") / "small")
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    return {**files, "assets/chat template.txt": b"[gMASK]<sop>\n" * 100, "empty.txt": b""}


@pytest.fixture
def hub(checkpoint_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(checkpoint_files, monkeypatch) as fake:
        yield fake


@pytest.fixture
def dst(tmp_path: Path) -> Path:
    return tmp_path / "dst"


@pytest.fixture
def download(dst: Path) -> Callable[..., Done]:
    """Download REPO into dst through the library."""

    def run(policy: RetryPolicy | None = None, num_workers: int = 2, **request: object) -> Done:
        client = Hub()
        plan = plan_download(client, Request(REPO, dst, **request))
        counted: list[int] = []
        with begun(plan):
            damaged, files = check_present(plan, num_workers, lambda _: None)
            fetch_files(client, plan, files, num_workers, counted.append, policy)
            check_whole(plan)
        return Done(sum(counted), damaged)

    return run
