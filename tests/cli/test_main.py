"""The program itself: help, version, unknown commands, signals, completion."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from glm4moe_cli import __version__
from glm4moe_cli.main import COMMANDS
from tests.cli.conftest import Ended

ROOT = Path(__file__).parents[2]
Program = Callable[..., Ended]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_lists_every_command_with_its_line(program: Program, option: str) -> None:
    ended = program(option)
    assert (ended.exit_code, ended.stderr) == (0, "")
    listed = re.findall(r"^  ([a-z]+) {2,}(\S.*)$", ended.stdout.split("Commands:\n")[1], re.MULTILINE)
    assert listed == [(name, text) for name, (_, text) in COMMANDS.items()]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_help_has_an_example(program: Program, command: str) -> None:
    ended = program(command, "--help")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"Usage: glm4moe {command} ")
    assert re.search(rf"^ *Examples?:\n(?: *#.*\n)* *glm4moe {command} ", ended.stdout, re.MULTILINE)
    assert " --json " in ended.stdout
    assert " --quiet " in ended.stdout


def test_version(program: Program) -> None:
    assert program("--version") == (0, f"glm4moe {__version__}\n", "")


def test_version_is_the_project_s() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert re.findall(r'^version = "(.*)"$', project, re.MULTILINE) == [__version__]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convrt"], "No such command 'convrt'. Did you mean 'convert'? Try 'glm4moe --help'."),
        (["teleport"], "No such command 'teleport'. Try 'glm4moe --help'."),
        (["--verbose"], "No such option '--verbose'. Did you mean '--version'? Try 'glm4moe --help'."),
    ],
)
def test_what_does_not_exist_is_a_usage_error(program: Program, args: list[str], message: str) -> None:
    assert program(*args) == (2, "", f"Error: {message}\n")


def test_unknown_command_answers_in_json(program: Program) -> None:
    ended = program("convrt", "--json")
    document = json.loads(ended.stdout)
    assert (ended.exit_code, document["exit_code"], document["command"]) == (2, 2, None)


def test_no_command_shows_help_on_stderr_and_is_a_usage_error(program: Program) -> None:
    exit_code, stdout, stderr = program()
    assert (exit_code, stdout) == (2, "")
    assert stderr.startswith("Usage: glm4moe ")


# a command that works until it is stopped; its clean-up must run, undisturbed by a second signal
WAITING = """
import signal, sys, time, types
import click
from glm4moe_cli import main
from glm4moe_cli._options import output_options

@click.command()
@output_options
def command(output):
    try:
        # inside: the signal may arrive before print has returned
        print("working", file=sys.stderr, flush=True)
        time.sleep(60)
    finally:
        if sys.exc_info()[0].__name__ == "Stopped":
            signal.raise_signal(signal.SIGTERM)
        print("cleaned", file=sys.stderr, flush=True)

module = types.ModuleType("probe_module")
module.command = command
sys.modules["probe_module"] = module
main.COMMANDS["probe"] = ("probe_module:command", "")
main.main()
"""


@pytest.mark.parametrize(
    ("number", "exit_code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 75, "stopped by SIGTERM"),
        (signal.SIGUSR1, 75, "stopped by SIGUSR1"),
    ],
)
def test_signal_ends_the_command_with_its_code_after_cleaning_up(
    number: signal.Signals, exit_code: int, word: str
) -> None:
    command = [sys.executable, "-c", WAITING, "probe", "--json"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "working\n"
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=30)
    again = "Run the same command again to go on from here."
    assert (process.returncode, stderr) == (exit_code, f"cleaned\nError: {word}. {again}\n")
    document = json.loads(stdout)
    assert (document["ok"], document["exit_code"], document["errors"][0]["retryable"]) == (False, exit_code, True)


def test_signal_handlers_are_put_back(program: Program) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    program("convrt")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_shell_completion_offers_the_commands() -> None:
    environment = {**os.environ, "_GLM4MOE_COMPLETE": "bash_complete", "COMP_WORDS": "glm4moe ", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "glm4moe_cli"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert set(ended.stdout.split()) == {f"plain,{name}" for name in COMMANDS}
