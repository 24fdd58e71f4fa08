"""The `glm4moe` program: its commands, the signals that stop it, and how every exception becomes an exit code."""

import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType

import click
from click.shell_completion import shell_complete

from glm4moe_cli import __version__
from glm4moe_cli._errors import EXIT_READER_GONE, Stopped, bug, describe
from glm4moe_cli._output import Output

PROGRAM = "glm4moe"
COMPLETE_VARIABLE = "_GLM4MOE_COMPLETE"
GC_THRESHOLDS = (50_000, 20, 20)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

# name -> (where the command is, what --help says about it); --help reads this table and imports none of them
COMMANDS: dict[str, tuple[str, str]] = {
    "download": (
        "glm4moe_cli.commands.download:command",
        "Fetch a checkpoint from the hub and prove every byte of it.",
    ),
    "inspect": ("glm4moe_cli.commands.inspect:command", "Say what a checkpoint is, and what is wrong with it."),
    "convert": ("glm4moe_cli.commands.convert:command", "Repack a checkpoint into another layout or dtype."),
    "quantize": ("glm4moe_cli.commands.quantize:command", "Quantize the weights of a checkpoint for serving engines."),
    "calibrate": (
        "glm4moe_cli.commands.calibrate:command",
        "Run a checkpoint over text and keep what static scales need.",
    ),
    "shard": ("glm4moe_cli.commands.shard:command", "Cut a checkpoint into files for each rank, and put it together."),
    "verify": ("glm4moe_cli.commands.verify:command", "Prove that a converted checkpoint is as good as its source."),
    "generate": ("glm4moe_cli.commands.generate:command", "Smoke test: a prompt in, text out."),
    "doctor": ("glm4moe_cli.commands.doctor:command", "Say what this machine has, and what it can run."),
}


class LazyGroup(click.Group):
    """A group that imports a command's module only when that command runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table, which is the order of use."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """Return the command of this name."""
        if cmd_name not in COMMANDS:
            raise click.exceptions.NoSuchCommand(cmd_name, possibilities=COMMANDS, ctx=ctx)
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table; click's own would import them all for their help."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, help_text) for name, (_, help_text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Convert, quantize, verify and run GLM-4.5, 4.6 and 4.7 MoE checkpoints."""


class _Boundary:
    """Turns what ends a command into an exit code and a message; a bug of ours passes through with its traceback."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.exit_code = 0

    def __enter__(self) -> None:
        """Nothing to prepare."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if isinstance(error, click.exceptions.Exit):  # --help and --version have printed what they have to say
            self.exit_code = error.exit_code
        elif isinstance(error, click.exceptions.NoArgsIsHelpError):
            error.show()
            self.exit_code = error.exit_code
        elif isinstance(error, BrokenPipeError) and self.output.reader_gone():
            self.exit_code = EXIT_READER_GONE
        elif error is None:
            self.exit_code = self.output.finish()
        else:
            failure = describe(error)
            self.exit_code = self.output.finish(failure or bug(error))
            return failure is not None
        return True


@contextmanager
def _stop_signals(*, is_program: bool) -> Iterator[None]:
    """Let SIGTERM and SIGUSR1 raise Stopped in the main thread; a second one may not disturb the clean-up.

    Nor may it change the exit code of a program that is about to end: afterwards, that ignores them.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        for name in STOP_SIGNALS:
            signal.signal(name, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if is_program else handler)


def run(args: Sequence[str], *, is_program: bool = False) -> int:
    """Run one command line in this process and return its exit code; a bug of ours raises.

    Args:
        args: the words after the program's name.
        is_program: the process ends with the command.
    """
    # a command line that cannot be parsed must still be answered in JSON where that was asked for
    command = args[0] if args and args[0] in COMMANDS else None
    output = Output(command, as_json="--json" in args[1:])
    boundary = _Boundary(output)
    with boundary, _stop_signals(is_program=is_program), cli.make_context(PROGRAM, list(args), obj=output) as ctx:
        cli.invoke(ctx)
    return boundary.exit_code


def main() -> None:
    """Run the program on the command line of this process."""
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        sys.exit(shell_complete(cli, {}, PROGRAM, COMPLETE_VARIABLE, instruction))
    # plans are hundreds of thousands of objects that all stay: up to a third of planning went into looking for garbage
    gc.set_threshold(*GC_THRESHOLDS)
    exit_code = run(sys.argv[1:], is_program=True)
    if exit_code == EXIT_READER_GONE:
        # keep the interpreter from complaining about what it can no longer flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    # nor is there any at the end, among all that torch has made
    gc.freeze()
    sys.exit(exit_code)
