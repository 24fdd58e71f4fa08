"""`python -m runtime.harness`: lm-evaluation-harness's own command line, with `--model glm4moe` among its models.

The harness finds models in a table of its own and has no entry points for those of others, so this program registers
ours and then is the harness.
"""

import sys

from converters.errors import Glm4MoeError

MODEL_NAME = "glm4moe"
_TARGET = "runtime.harness.model:Glm4Moe"


def register() -> None:
    """Make `--model glm4moe` known to lm_eval in this process.

    Raises:
        ImportError: lm_eval is not installed.
    """
    import lm_eval.models as models
    from lm_eval.api.registry import model_registry

    # the table of its own models is entered only where nothing else is
    assert models is not None
    if MODEL_NAME not in model_registry:
        model_registry.register(MODEL_NAME, target=_TARGET)


def main() -> int:
    """Run lm_eval's command line; return the exit code."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        sys.stderr.write(f"Error: lm_eval: {error}. Install it: pip install 'glm4moe[lm-eval]'.\n")
        return 2
    try:
        cli_evaluate()
    except Glm4MoeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
