"""One module a command, each with an attribute `command`; listed in `glm4moe_cli.main.COMMANDS`."""
