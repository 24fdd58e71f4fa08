"""`glm4moe doctor`: what this machine has, and what it can run."""

import os
from collections.abc import Iterator
from pathlib import Path

import click

from converters.doctor.report import Machine, examine
from converters.doctor.storage import Disk
from converters.errors import ResourceError
from glm4moe_cli._options import output_options
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes

EXAMPLE = """\b
Example:
  glm4moe doctor --json
"""


@click.command(epilog=EXAMPLE)
@output_options
def command(output: Output) -> None:
    """Examine this machine from the current folder: versions, memory, disks, devices, settings, hub.

    Writes 64 MiB to the disk and removes them. Exit code 5: something that glm4moe needs is missing.
    """
    machine = examine(os.environ, Path.cwd())
    # the table is asked at run time: importing it above would import main from one of its own commands
    from glm4moe_cli.main import COMMANDS

    abilities = machine.abilities(COMMANDS)
    problems = machine.problems()
    output.line("unusable: " + "; ".join(problems) if problems else "glm4moe can work here")
    output.facts("Machine", dict(_machine_facts(machine)))
    rows = [(package.name, package.version or "none", package.minimum or "-") for package in machine.packages]
    output.table("Packages", ("package", "version", "needed"), [("python", machine.python, "3.11"), *rows])
    if machine.hub_variables:
        output.facts("Variables", machine.hub_variables)
    output.table(
        "What can run here", ("command", "runs", "needs"), [(item.command, item.runs, item.needs) for item in abilities]
    )
    for text in machine.warnings():
        output.warning(text)
    output.result({**machine.to_json(), "abilities": abilities})
    if problems:
        raise ResourceError(
            "this machine",
            expected="what glm4moe needs",
            found=problems[0],
            next_step="Install glm4moe into a new environment of a current Python.",
        )


def _machine_facts(machine: Machine) -> Iterator[tuple[str, object]]:
    memory, limits = machine.memory, machine.limits
    yield "system", machine.system
    yield "cores", machine.cores
    group = "no limit" if memory.cgroup_bytes is None else format_bytes(memory.cgroup_bytes)
    yield "memory", f"{format_bytes(memory.available_bytes)} free of {format_bytes(memory.total_bytes)}, group: {group}"
    yield "shared memory", f"{format_bytes(memory.shared_memory_bytes)} free"
    for number, gpu in enumerate(machine.devices.gpus):
        free = f"{format_bytes(gpu.free_bytes)} free of {format_bytes(gpu.total_bytes)}"
        native = ", ".join(gpu.native_dtypes) or "none"
        capability = ".".join(map(str, gpu.capability))
        yield f"GPU {number}", f"{gpu.name}, {free}, compute capability {capability}, native: {native}"
    if not machine.devices.gpus:
        yield "GPU", "none"
    yield "GPU kernels", machine.triton_kernels
    for disk in machine.disks:
        yield f"disk of {disk.folder}", f"{format_bytes(disk.free_bytes)} free on {disk.file_system}, {_rates(disk)}"
        yield (
            f"locks of {disk.folder}",
            {True: "exclude", False: "do not exclude", None: "not tried"}[disk.locks_exclude],
        )
    yield "open files", "no limit" if limits.open_files is None else limits.open_files
    yield "hub", f"{machine.hub.endpoint}: {machine.hub.detail}"


def _rates(disk: Disk) -> str:
    if disk.write_rate is None or disk.read_rate is None:
        return "speed not measured"
    return f"writes {format_bytes(disk.write_rate)}/s, reads {format_bytes(disk.read_rate)}/s"
