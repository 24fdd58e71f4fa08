"""Render a chat template under limits; run as a script in a process of its own, never imported for rendering.

A checkpoint's template is a program by strangers. This one reads {"template", "variables"} as JSON from stdin, writes
the rendered text to stdout, and ends with 0; if the template fails, it writes the reason and ends with 3. It imports
nothing of the project, so that `python -I` can run it wherever the project is installed.
"""

import json
import resource
import sys
from typing import Any, NoReturn

MAX_OUTPUT_BYTES = 1_000_000
MAX_SECONDS = 5
_ADDRESS_SPACE_BYTES = 512 << 20
# not 1, with which an uncaught exception ends: only after this one does stdout hold a reason
FAILED = 3


def limit_resources() -> None:
    """Bound address space, CPU seconds and the size of what is written; forbid core dumps."""
    limits = {
        resource.RLIMIT_AS: _ADDRESS_SPACE_BYTES,
        resource.RLIMIT_CPU: MAX_SECONDS,
        resource.RLIMIT_FSIZE: MAX_OUTPUT_BYTES,
        resource.RLIMIT_CORE: 0,
    }
    for kind, limit in limits.items():
        resource.setrlimit(kind, (limit, limit))


def render(template: str, variables: dict[str, Any]) -> str:
    """Return the text that the template makes, with the environment that transformers gives to chat templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template).render(**variables)


def main() -> int:
    """Render what stdin holds; return the exit status."""
    limit_resources()
    from jinja2.exceptions import TemplateError

    request = json.load(sys.stdin.buffer)
    try:
        output = render(request["template"], request["variables"]).encode()
        if len(output) > MAX_OUTPUT_BYTES:
            raise OverflowError(f"{len(output)} bytes of text")
    # what expressions of a template can raise
    except (
        TemplateError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        sys.stdout.buffer.write(f"{type(error).__name__}: {error}"[:1000].encode("utf-8", "replace"))
        return FAILED
    sys.stdout.buffer.write(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
