"""Memory, disks, locks, settings: read from files of the kernel, tried with two processes, asked of a server."""

import fcntl
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from converters.doctor import storage
from converters.doctor.hardware import Device, Devices, Limits, Memory, limits, memory
from converters.doctor.report import Machine
from converters.doctor.settings import HubAnswer, ask_hub, hub_cache, hub_variables, is_offline
from converters.doctor.storage import Disk, disk, file_system, locks_exclude
from converters.doctor.versions import ADVISORIES, Package

GIB = 1 << 30


@pytest.fixture
def kernel(tmp_path: Path) -> Path:
    """A /proc and a /sys/fs/cgroup: 64 GiB, half of it free, no control group."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "cgroup").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal:       {64 * GIB >> 10} kB\nMemAvailable:   {32 * GIB >> 10} kB\nHugePages_Total:       0\n"
    )
    return tmp_path


def read(kernel: Path) -> Memory:
    return memory(kernel / "proc", kernel / "cgroup", kernel / "absent")


def test_memory_without_a_control_group(kernel: Path) -> None:
    found = read(kernel)
    assert found == Memory(64 * GIB, 32 * GIB, None, 0)
    assert found.limit_bytes == 64 * GIB


def test_memory_limit_of_a_parent_group_counts(kernel: Path) -> None:
    (kernel / "proc" / "self" / "cgroup").write_text("0::/job/task\n")
    (kernel / "cgroup" / "job" / "task").mkdir(parents=True)
    (kernel / "cgroup" / "job" / "memory.max").write_text(f"{8 * GIB}\n")
    (kernel / "cgroup" / "job" / "task" / "memory.max").write_text("max\n")
    found = read(kernel)
    assert found.cgroup_bytes == found.limit_bytes == 8 * GIB


def test_memory_limit_of_version_1(kernel: Path) -> None:
    (kernel / "proc" / "self" / "cgroup").write_text("7:cpu,memory:/job\n3:devices:/\n")
    (kernel / "cgroup" / "memory" / "job").mkdir(parents=True)
    (kernel / "cgroup" / "memory" / "job" / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (kernel / "cgroup" / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert read(kernel).cgroup_bytes == 4 * GIB


def test_this_machine_has_memory_and_limits() -> None:
    assert memory().total_bytes >= memory().available_bytes > 0
    assert limits().open_files is None or limits().open_files > 0


def test_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    found = disk(tmp_path, probe_bytes=1 << 20)
    assert list(tmp_path.iterdir()) == []
    assert found.write_rate is not None
    assert found.write_rate > 0
    assert found.read_rate is not None
    assert found.read_rate > 0
    assert 0 < found.free_bytes <= found.total_bytes
    assert found.locks_exclude is True
    assert found.problem == ""


def test_a_folder_that_is_not_there_yet_stands_for_its_parent(tmp_path: Path) -> None:
    assert disk(tmp_path / "a" / "b", probe_bytes=4096).folder == tmp_path


def test_a_folder_that_cannot_be_written_to_is_a_fact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(storage, "NamedTemporaryFile", refuse)
    found = disk(tmp_path)
    assert (found.write_rate, found.read_rate, found.locks_exclude) == (None, None, None)
    assert found.problem == f"{tmp_path}: Permission denied"


def test_locks_that_another_process_gets_too_do_not_exclude(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "lock").open("wb") as file:
        assert locks_exclude(file) is True
        # what a file system does that grants every lock
        monkeypatch.setattr(fcntl, "flock", lambda *_: None)
        assert locks_exclude(file) is False


def test_file_system_is_that_of_the_longest_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    (tmp_path / "a b").mkdir()
    escaped = str(tmp_path / "a b").replace(" ", "\\040")
    mounts.write_text(
        "22 1 0:1 / / rw - ext4 /dev/sda rw\n"
        f"23 22 0:2 / {tmp_path} rw shared:1 - nfs4 host:/x rw\n"
        f"24 23 0:3 / {escaped} rw - lustre x@tcp:/y rw\n"
    )
    assert file_system(Path("/usr"), mounts) == "ext4"
    assert file_system(tmp_path, mounts) == "nfs4"
    assert file_system(tmp_path / "a b", mounts) == "lustre"
    assert file_system(tmp_path, tmp_path / "none") == "unknown"


def test_tokens_and_credentials_are_never_shown() -> None:
    environment = {
        "HF_TOKEN": "hf_secret",
        "HF_HOME": "/data/hf",
        "HF_TOKEN_PATH": "/run/token",
        "HF_ENDPOINT": "https://me:secret@mirror.example",
        "HUGGING_FACE_HUB_TOKEN": "",
        "PATH": "/bin",
        "TRANSFORMERS_OFFLINE": "1",
    }
    shown = hub_variables(environment)
    assert shown == {
        "HF_ENDPOINT": "https://***@mirror.example",
        "HF_HOME": "/data/hf",
        "HF_TOKEN": "set, not shown",
        "HF_TOKEN_PATH": "/run/token",
        "HUGGING_FACE_HUB_TOKEN": "empty",
        "TRANSFORMERS_OFFLINE": "1",
    }


def test_hub_cache_is_where_the_library_has_it() -> None:
    assert hub_cache({"HF_HOME": "/data/hf"}) == Path("/data/hf")
    assert hub_cache({"XDG_CACHE_HOME": "/cache"}) == Path("/cache/huggingface")
    assert hub_cache({}) == Path("~/.cache/huggingface").expanduser()


@contextmanager
def server(status: int, silent: threading.Event | None = None) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            if silent:
                silent.wait()
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        http.handle_error = lambda *_: None
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_a_hub_that_answers_is_reachable_whatever_it_says() -> None:
    with server(200) as endpoint:
        found = ask_hub({"HF_ENDPOINT": f"{endpoint}/"})
        assert (found.endpoint, found.reachable) == (endpoint, True)
        assert found.detail.startswith("answered in 0.")
    with server(503) as endpoint:
        assert ask_hub({"HF_ENDPOINT": endpoint}) == HubAnswer(endpoint, True, "answered with HTTP 503")


def test_a_hub_that_does_not_answer_in_time_is_not_waited_for() -> None:
    over = threading.Event()
    with server(200, silent=over) as endpoint:
        # it says nothing before this is over
        assert ask_hub({"HF_ENDPOINT": endpoint}, seconds=0.2).reachable is False
        over.set()


def test_a_hub_that_is_not_there_is_no_error() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    found = ask_hub({"HF_ENDPOINT": f"http://127.0.0.1:{port}"})
    assert (found.reachable, found.detail) == (False, "[Errno 111] Connection refused")
    assert ask_hub({"HF_ENDPOINT": "mirror"}).detail == "not an address with http:// or https://"


def test_an_offline_machine_asks_nobody() -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        assert is_offline({name: "1"})
        assert ask_hub({name: "true", "HF_ENDPOINT": "http://127.0.0.1:1"}) == HubAnswer(
            "http://127.0.0.1:1", None, "not asked: offline mode is set"
        )
    assert not is_offline({"HF_HUB_OFFLINE": "0"})


H200 = Device("NVIDIA H200", 141 * GIB, 139 * GIB, (9, 0))
MACHINE = Machine(
    python="3.11.7",
    system="Linux",
    cores=16,
    packages=(Package("torch", "2.13.0", "2.10", ()), Package("triton", "3.9.0", "", ())),
    memory=Memory(128 * GIB, 100 * GIB, 90 * GIB, GIB),
    limits=Limits(4096, None, None, None),
    devices=Devices((H200,)),
    disks=(Disk(Path("/data"), "ext4", 500 * GIB, 900 * GIB, 1e9, 2e9, True),),
    hub_variables={},
    hub=HubAnswer("https://huggingface.co", True, "answered in 0.1 s"),
)


def test_what_a_gpu_machine_can_run() -> None:
    assert MACHINE.triton_kernels == "yes"
    assert MACHINE.problems() == MACHINE.warnings() == ()
    assert H200.native_dtypes == ("bfloat16", "fp8")
    rows = [(item.command, item.runs, item.needs) for item in MACHINE.abilities(["inspect", "convert", "generate"])]
    assert rows == [
        ("inspect", "yes", "headers only"),
        ("convert", "any checkpoint", "room for the result: 500 GiB free here"),
        ("generate", "on 1 GPU, in bfloat16, fp8, float32", "room for the weights: 139 GiB free here"),
    ]


def test_what_a_cpu_machine_can_run() -> None:
    machine = replace(MACHINE, devices=Devices())
    assert machine.triton_kernels == "no: torch finds no GPU; the reference in torch is used"
    (ability,) = machine.abilities(["generate"])
    assert (ability.runs, ability.needs) == ("on CPU, in bfloat16, float32", "room for the weights: 90 GiB free here")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"packages": (Package("triton", None, "", ()),)}, "no: triton is not installed"),
        ({"devices": Devices((replace(H200, capability=(7, 5)),))}, "no: no GPU has compute capability 8.0 or later"),
    ],
)
def test_what_keeps_gpu_kernels_from_running(changes: dict[str, object], expected: str) -> None:
    assert replace(MACHINE, **changes).triton_kernels == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"packages": (Package("torch", "2.9.1", "", (ADVISORIES[4],)),)},
            "torch 2.9.1: known advisory GHSA-63cw-57p8-fm3p, the weights_only unpickler corrupts memory; "
            "fixed in 2.10.0.",
        ),
        (
            {"packages": (Package("sglang", "0.5.11", "", (ADVISORIES[-1],)),)},
            "sglang 0.5.11: known advisory CVE-2026-5760, a model's chat template runs outside a sandbox; "
            "no fixed version was known.",
        ),
        (
            {"disks": (replace(MACHINE.disks[0], locks_exclude=False, file_system="lustre"),)},
            "/data: file locks (lustre) do not keep two processes apart; never run two commands on one folder there.",
        ),
        (
            {"disks": (replace(MACHINE.disks[0], file_system="tmpfs"),)},
            "/data is on tmpfs: what is written there takes memory and does not last.",
        ),
        (
            {"disks": (replace(MACHINE.disks[0], problem="/data: Permission denied", locks_exclude=None),)},
            "/data: Permission denied; its speed and locks were not tried.",
        ),
        (
            {"limits": Limits(256, None, None, None)},
            "256 files may be open at once; a large checkpoint has more. Try ulimit -n 4096.",
        ),
        (
            {"limits": Limits(None, None, 1000, None)},
            "No file may be larger than 1000 bytes; --max-shard-size must stay below.",
        ),
        (
            {"devices": Devices(driver_problem="CUDA error: out of memory")},
            "GPU: expected one that can be used, found CUDA error: out of memory.",
        ),
    ],
)
def test_what_a_user_is_warned_of(changes: dict[str, object], expected: str) -> None:
    assert replace(MACHINE, **changes).warnings() == (expected,)


def test_what_makes_the_program_unusable() -> None:
    machine = replace(
        MACHINE, packages=(Package("torch", None, "2.10", ()),), devices=Devices(problem="torch: cannot be imported")
    )
    assert machine.problems() == ("torch: expected 2.10 or later, found none", "torch: cannot be imported")
