"""Cores, memory, limits and devices."""

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_PROC, _CGROUP, _SHARED = Path("/proc"), Path("/sys/fs/cgroup"), Path("/dev/shm")
# above this a cgroup limit means "none"
_UNLIMITED = 1 << 60
# compute capability from which a GPU multiplies in a format by itself
_NATIVE = {"bfloat16": (8, 0), "fp8": (8, 9), "nvfp4": (10, 0)}


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of main memory. `limit_bytes` is the smaller of the machine's and the control group's."""

    total_bytes: int
    available_bytes: int
    cgroup_bytes: int | None
    shared_memory_bytes: int

    @property
    def limit_bytes(self) -> int:
        """What a process here can have at most."""
        return min(self.total_bytes, self.cgroup_bytes or self.total_bytes)


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU."""

    name: str
    total_bytes: int
    free_bytes: int
    capability: tuple[int, int]

    @property
    def native_dtypes(self) -> tuple[str, ...]:
        """Formats that its tensor cores multiply in."""
        return tuple(name for name, needed in _NATIVE.items() if self.capability >= needed)


@dataclass(frozen=True, slots=True)
class Devices:
    """What torch finds. `problem`: torch itself does not work; `driver_problem`: it does, but its GPUs do not."""

    gpus: tuple[Device, ...] = ()
    problem: str = ""
    driver_problem: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Soft limits of this process; None = unlimited."""

    open_files: int | None
    address_space_bytes: int | None
    file_size_bytes: int | None
    locked_memory_bytes: int | None


def memory(proc: Path = _PROC, cgroup: Path = _CGROUP, shared: Path = _SHARED) -> Memory:
    """Return the memory of this machine and of the control group that this process is in."""
    fields = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) << 10 if value.strip().endswith("kB") else 0
    return Memory(
        fields["MemTotal"],
        fields.get("MemAvailable", 0),
        _cgroup_limit(proc, cgroup),
        _free_bytes(shared) if shared.is_dir() else 0,
    )


def _cgroup_limit(proc: Path, cgroup: Path) -> int | None:
    """Return the smallest limit on the way from the root to this process's group, in version 2 or 1."""
    own = proc / "self" / "cgroup"
    paths = [line.split(":", 2) for line in own.read_text().splitlines()] if own.exists() else []
    found = []
    for parts in paths:
        controllers, path = parts[1], parts[2].lstrip("/")
        if not controllers:
            group = cgroup / path
            found += [place / "memory.max" for place in (group, *group.parents) if place.is_relative_to(cgroup)]
        elif "memory" in controllers.split(","):
            found += [cgroup / "memory" / path / "memory.limit_in_bytes", cgroup / "memory" / "memory.limit_in_bytes"]
    words = [place.read_text().strip() for place in found if place.is_file()]
    limits = [int(word) for word in words if word.isdecimal() and int(word) < _UNLIMITED]
    return min(limits, default=None)


def _free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def limits() -> Limits:
    """Return the limits that a conversion can run into."""
    kinds = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_MEMLOCK)
    soft = [resource.getrlimit(kind)[0] for kind in kinds]
    return Limits(*(None if value == resource.RLIM_INFINITY else value for value in soft))


def devices() -> Devices:
    """Return the GPUs that torch can use; imports torch."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return Devices(problem=f"torch: expected to be importable, found {error}")
    if not torch.cuda.is_available():
        return Devices()
    gpus = []
    try:
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            gpus.append(Device(torch.cuda.get_device_name(index), total, free, torch.cuda.get_device_capability(index)))
    except RuntimeError as error:
        # a GPU that another process fills, or a driver that does not fit
        return Devices(tuple(gpus), driver_problem=str(error).splitlines()[0])
    return Devices(tuple(gpus))
