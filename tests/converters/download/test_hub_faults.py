"""Everything a network and a server can do wrong to one file: survived, or refused with the bytes kept aside."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_hub import REPO, FakeHub, Fault, read_folder

from converters.errors import InputError, NetworkError, ResourceError
from converters.hub.fetch import RetryPolicy

SHARD = "model-00001-of-00002.safetensors"
SMALL = "LICENSE"
HALF = 70_000
POLICY = RetryPolicy(progress_bytes=10_000)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
Download = Callable[..., object]

SURVIVED = {
    "cut before the first byte": [Fault(cut=0)],
    "cut after one byte": [Fault(cut=1)],
    "cut half way": [Fault(cut=HALF)],
    "cut again and again": [Fault(cut=30_000)] * 4,
    "cut more often than tries, with progress between": [Fault(cut=15_000)] * 9,
    "cut before the last byte": [Fault(cut=-1)],
    "408": [Fault(status=408)],
    "429 with Retry-After": [Fault(status=429, headers={"Retry-After": "1"})],
    "429 with a rate limit": [Fault(status=429, headers={"RateLimit": '"api";r=0;t=55'})],
    "500": [Fault(status=500)],
    "502, 503, 504": [Fault(status=502), Fault(status=503, headers={"Retry-After": "Wed, 21 Oct"}), Fault(status=504)],
    "cut, then 503": [Fault(cut=HALF), Fault(status=503)],
    "a link that ran out": [Fault(status=403)],
    "range ignored": [Fault(cut=HALF), Fault(ignore_range=True)],
    "range ignored, cut, range served": [Fault(cut=HALF), Fault(ignore_range=True, cut=HALF)],
    "another range": [Fault(cut=HALF), Fault(headers={"Content-Range": "bytes 5-9/10"})],
    "an unreadable range": [Fault(cut=HALF), Fault(headers={"Content-Range": "bytes */*"})],
    "416": [Fault(cut=HALF), Fault(status=416)],
    "no length": [Fault(chunked=True)],
    "no length, cut": [Fault(chunked=True, cut=HALF)],
    "no length, too short": [Fault(chunked=True, body=b"x" * 100)],
    "wrong bytes, then cut": [Fault(body=bytes(150_000), chunked=True, cut=HALF)],
    "wrong bytes of the right size after a cut": [Fault(cut=HALF), Fault(body=b"", chunked=True)],
}


@pytest.mark.parametrize("faults", SURVIVED.values(), ids=SURVIVED.keys())
def test_fault_is_survived_and_every_byte_is_counted_once(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes], faults: list[Fault]
) -> None:
    size = len(checkpoint_files[SHARD])
    for fault in faults:
        fault = Fault(**{**vars(fault), "cut": size - 1}) if fault.cut == -1 else fault
        hub.fail(SHARD, fault)
    done = download(POLICY)
    assert read_folder(dst) == checkpoint_files
    assert done.num_bytes == sum(map(len, checkpoint_files.values()))
    assert not hub.faults[SHARD]
    assert not list((dst / ".glm4moe").glob("quarantine/*"))


@pytest.mark.parametrize("header", ["X-Repo-Commit", "X-Linked-Etag"])
def test_another_version_after_a_cut_starts_the_file_over(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes], header: str
) -> None:
    hub.fail(SHARD, Fault(cut=HALF))
    hub.fail(f"redirect {SHARD}", Fault(), Fault(headers={header: "f" * 40}))
    assert download(POLICY).num_bytes == sum(map(len, checkpoint_files.values()))
    assert read_folder(dst) == checkpoint_files
    assert hub.asked(SHARD)[0] == hub.asked(SHARD)[-1] == ""


def test_a_cut_is_taken_up_where_it_was(hub: FakeHub, download: Download, checkpoint_files: dict[str, bytes]) -> None:
    hub.fail(SHARD, Fault(cut=HALF), Fault(cut=20_000))
    download(POLICY)
    assert hub.asked(SHARD) == ["", f"bytes={HALF}-", f"bytes={HALF + 20_000}-"]
    assert hub.served[SHARD] == len(checkpoint_files[SHARD])


def test_silent_server_is_asked_again(
    hub: FakeHub,
    download: Download,
    dst: Path,
    checkpoint_files: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 1.0)
    hub.fail(SHARD, Fault(hold=-1), Fault(hold=40_000, piece=40_000))
    download(POLICY)
    assert read_folder(dst) == checkpoint_files


def test_slow_drip_is_dropped_and_taken_up(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]
) -> None:
    """A byte now and then keeps a read timeout from ever firing."""
    hub.fail(SHARD, Fault(pause=0.02, piece=1))
    download(RetryPolicy(stall_seconds=0.5, stall_bytes=1000))
    assert read_folder(dst) == checkpoint_files
    assert hub.asked(SHARD)[1].startswith("bytes=")


HTML = b"<!DOCTYPE html><title>Sign in</title>"
REFUSED = {
    "one bit": (lambda data: Fault(body=data[:99] + bytes([data[99] ^ 1]) + data[100:]), "expected ", True),
    "HTML of the right size": (lambda data: Fault(body=HTML.ljust(len(data))), ", an HTML page", True),
    "HTML": (lambda data: Fault(body=HTML), "37 bytes, an HTML page", False),
    "LFS pointer": (lambda data: Fault(body=POINTER), f"{len(POINTER)} bytes, a git LFS pointer", False),
    "gzip": (lambda data: Fault(gzip=True), "gzip data, although none was asked for", False),
    "one byte more": (lambda data: Fault(body=data + b"!", chunked=True), "more than ", True),
}


@pytest.mark.parametrize("path", [SHARD, SMALL])
@pytest.mark.parametrize(("fault", "found", "whole"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_bytes_are_refused_and_kept_while_the_other_files_are_fetched(
    hub: FakeHub,
    download: Download,
    dst: Path,
    checkpoint_files: dict[str, bytes],
    path: str,
    fault: Callable[[bytes], Fault],
    found: str,
    whole: bool,
) -> None:
    data = checkpoint_files[path].ljust(150)
    checkpoint_files = {**checkpoint_files, path: data}
    hub.push("main", checkpoint_files)
    wrong = fault(data)
    hub.fail(path, wrong)
    with pytest.raises(InputError) as raised:
        download(POLICY)
    assert raised.value.subject == f"{REPO}: {path}"
    assert found in str(raised.value)
    (kept,) = (dst / ".glm4moe" / "quarantine").iterdir()
    assert kept.name.startswith(f"{path}.")
    assert str(kept) in raised.value.next_step
    if whole:
        assert kept.read_bytes()[:100] == (wrong.body or b"")[:100]
    unpublished = {path, "config.json", "model.safetensors.index.json"}
    assert set(read_folder(dst)) == set(checkpoint_files) - unpublished
    download(POLICY)
    assert read_folder(dst) == checkpoint_files
    assert kept.exists()


def test_a_body_that_cannot_be_the_file_does_not_cost_the_bytes_that_are_there(
    hub: FakeHub, download: Download, checkpoint_files: dict[str, bytes]
) -> None:
    hub.fail(SHARD, Fault(cut=HALF), Fault(body=HTML, ignore_range=True))
    with pytest.raises(InputError, match="an HTML page"):
        download(POLICY)
    download(POLICY)
    assert hub.asked(SHARD)[-1] == f"bytes={HALF}-"
    assert hub.served[SHARD] == len(checkpoint_files[SHARD]) + len(HTML)


def test_several_wrong_files_are_named_together(hub: FakeHub, download: Download) -> None:
    hub.fail(SHARD, Fault(gzip=True))
    hub.fail("LICENSE", Fault(gzip=True))
    with pytest.raises(InputError) as raised:
        download(POLICY)
    assert {SHARD, "LICENSE"} == {name for name in (SHARD, "LICENSE") if name in str(raised.value)}
    assert "The same holds for acme/GLM-small: " in raised.value.next_step


@pytest.mark.parametrize(
    ("faults", "found"),
    [
        ([Fault(cut=0)] * 9, "6 times in a row, at byte 0"),
        ([Fault(status=503)] * 9, "HTTP 503, 6 times in a row, at byte 0"),
        (
            [Fault(cut=HALF), *[Fault(cut=HALF, ignore_range=True)] * 9],
            "a server that does not serve ranges, 4 times, at byte 70000",
        ),
        ([Fault(pause=0.02, piece=1)] * 9, "bytes in 0.2 s, 6 times in a row, at byte "),
    ],
)
def test_endless_failure_ends_with_one_sentence(
    hub: FakeHub, download: Download, dst: Path, faults: list[Fault], found: str
) -> None:
    hub.fail(SHARD, *faults)
    with pytest.raises(NetworkError) as raised:
        # only what drips is slower than this
        download(RetryPolicy(stall_seconds=0.2, stall_bytes=1000) if faults[0].pause else RetryPolicy())
    assert found in raised.value.found
    assert raised.value.next_step == "Run the same command again; it goes on from there."
    assert not (dst / SHARD).exists()
    assert not (dst / "config.json").exists()


def test_disk_that_is_full_is_a_resource_error(
    hub: FakeHub, download: Download, dst: Path, checkpoint_files: dict[str, bytes]
) -> None:
    """A real limit of the kernel, met where the file's space is reserved."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ResourceError, match="expected room to write"):
            download(POLICY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert hub.served[SHARD] < 150_000
    download(POLICY)
    assert read_folder(dst) == checkpoint_files
