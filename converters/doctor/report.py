"""All facts about this machine, what follows from them for each command, and what stands in the way."""

import os
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.doctor.hardware import Devices, Limits, Memory, devices, limits, memory
from converters.doctor.settings import HubAnswer, ask_hub, hub_cache, hub_variables
from converters.doctor.storage import VOLATILE, Disk, disk
from converters.doctor.versions import Package, packages, python_problem

# commands that hold a few blocks of a few tensors, whatever the checkpoint
_STREAMING = frozenset({"download", "convert", "quantize", "shard"})
_HEADERS = frozenset({"inspect", "doctor"})
# Triton's kernels, see runtime
_KERNEL_CAPABILITY = (8, 0)
_FEW_FILES = 1024
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Ability:
    """What one command can do here."""

    command: str
    runs: str
    needs: str


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts. `disks` has the working folder first, then the hub cache where it is on another disk."""

    python: str
    system: str
    cores: int
    packages: tuple[Package, ...]
    memory: Memory
    limits: Limits
    devices: Devices
    disks: tuple[Disk, ...]
    hub_variables: dict[str, str]
    hub: HubAnswer

    @property
    def triton_kernels(self) -> str:
        """Whether the GPU kernels run, in words."""
        has_triton = any(package.name == "triton" and package.version for package in self.packages)
        if not self.devices.gpus:
            return "no: torch finds no GPU; the reference in torch is used"
        if not has_triton:
            return "no: triton is not installed"
        if not any(gpu.capability >= _KERNEL_CAPABILITY for gpu in self.devices.gpus):
            return "no: no GPU has compute capability 8.0 or later"
        return "yes"

    def problems(self) -> tuple[str, ...]:
        """Return what makes the program unusable."""
        found = (python_problem(), *(package.problem for package in self.packages), self.devices.problem)
        return tuple(problem for problem in found if problem)

    def warnings(self) -> tuple[str, ...]:
        """Return what a user should know but can live with."""
        return tuple(_warnings(self))

    def abilities(self, commands: Iterable[str]) -> tuple[Ability, ...]:
        """Return what each of these commands can do here."""
        return tuple(_ability(self, command) for command in commands)

    def to_json(self) -> dict[str, Any]:
        """Return the facts as plain values."""
        return {**asdict(self), "triton_kernels": self.triton_kernels, "problems": self.problems()}


def examine(environment: Mapping[str, str], folder: Path) -> Machine:
    """Look at this machine from a working folder; takes a few seconds, writes 64 MiB to each disk and removes them."""
    cache = hub_cache(environment)
    disks = [disk(folder)]
    other = next(path for path in (cache.absolute(), *cache.absolute().parents) if path.is_dir())
    if os.stat(other).st_dev != os.stat(disks[0].folder).st_dev:
        disks.append(disk(cache))
    return Machine(
        python=sys.version.split()[0],
        system=f"{platform.system()} {platform.release()}, {platform.machine()}",
        cores=len(os.sched_getaffinity(0)),
        packages=packages(),
        memory=memory(),
        limits=limits(),
        devices=devices(),
        disks=tuple(disks),
        hub_variables=hub_variables(environment),
        hub=ask_hub(environment),
    )


def _warnings(machine: Machine) -> Iterator[str]:
    for package in machine.packages:
        for advisory in package.advisories:
            until = f"fixed in {advisory.fixed}" if advisory.fixed else "no fixed version was known"
            yield f"{package.name} {package.version}: known advisory {advisory.identifier}, {advisory.what}; {until}."
    if machine.devices.driver_problem:
        yield f"GPU: expected one that can be used, found {machine.devices.driver_problem}."
    for place in machine.disks:
        if place.problem:
            yield f"{place.problem}; its speed and locks were not tried."
        if place.locks_exclude is False:
            yield (
                f"{place.folder}: file locks ({place.file_system}) do not keep two processes apart; "
                "never run two commands on one folder there."
            )
        if place.file_system in VOLATILE:
            yield f"{place.folder} is on {place.file_system}: what is written there takes memory and does not last."
    if machine.limits.open_files is not None and machine.limits.open_files < _FEW_FILES:
        yield f"{machine.limits.open_files} files may be open at once; a large checkpoint has more. Try ulimit -n 4096."
    if machine.limits.file_size_bytes is not None:
        yield f"No file may be larger than {machine.limits.file_size_bytes} bytes; --max-shard-size must stay below."


def _ability(machine: Machine, command: str) -> Ability:
    if command in _HEADERS:
        return Ability(command, "yes", "headers only" if command == "inspect" else "nothing")
    if command in _STREAMING:
        free = machine.disks[0].free_bytes
        return Ability(command, "any checkpoint", f"room for the result: {free // _GIB} GiB free here")
    gpus = machine.devices.gpus
    room = sum(gpu.free_bytes for gpu in gpus) if gpus else min(machine.memory.available_bytes, _limit(machine))
    where = f"{len(gpus)} GPU{'s' if len(gpus) > 1 else ''}" if gpus else "CPU"
    dtypes = "bfloat16, float32" if not gpus else ", ".join((*_common_dtypes(machine), "float32"))
    return Ability(command, f"on {where}, in {dtypes}", f"room for the weights: {room // _GIB} GiB free here")


def _common_dtypes(machine: Machine) -> tuple[str, ...]:
    every = [set(gpu.native_dtypes) for gpu in machine.devices.gpus]
    return tuple(dtype for dtype in machine.devices.gpus[0].native_dtypes if all(dtype in other for other in every))


def _limit(machine: Machine) -> int:
    return machine.memory.limit_bytes
