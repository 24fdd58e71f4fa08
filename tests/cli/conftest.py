"""Run command lines, or a command made for one test, through the real entry point in this process."""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple, Protocol

import click
import pytest

from glm4moe_cli import main
from glm4moe_cli._options import output_options
from glm4moe_cli._output import Output


class Ended(NamedTuple):
    """How a command line ended."""

    exit_code: int
    stdout: str
    stderr: str


class Probe(Protocol):
    def __call__(self, action: Callable[[Output], object], *args: str) -> Ended: ...


@pytest.fixture
def program(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Run `glm4moe` with these words."""

    def run(*args: str) -> Ended:
        exit_code = main.run(args)
        return Ended(exit_code, *capsys.readouterr())

    return run


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch, program: Callable[..., Ended]) -> Probe:
    """Run `glm4moe probe`, a command that does what the test wants with its Output."""

    def run(action: Callable[[Output], object], *args: str) -> Ended:
        @click.command("probe")
        @click.option("--choice", type=click.Choice(["one", "two"]))
        @output_options
        def command(output: Output, choice: str | None) -> None:
            action(output)

        module = ModuleType("probe_module")
        module.command = command
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(main.COMMANDS, "probe", ("probe_module:command", "For a test."))
        return program("probe", *args)

    return run
