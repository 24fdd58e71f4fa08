"""The live commands: what the program offers, read from the click objects themselves."""

import importlib.util

import click

from glm4moe_cli.main import COMMANDS, cli


def live_commands() -> dict[str, click.Command]:
    """Return every listed command whose module exists."""
    context = click.Context(cli)
    modules = {name: target.split(":")[0] for name, (target, _) in COMMANDS.items()}
    return {
        name: cli.get_command(context, name) for name, module in modules.items() if importlib.util.find_spec(module)
    }


def long_options(command: click.Command) -> set[str]:
    """Return the options of a command that start with two dashes, --help not among them."""
    options = (param for param in command.params if isinstance(param, click.Option))
    return {name for option in options for name in (*option.opts, *option.secondary_opts) if name.startswith("--")}
