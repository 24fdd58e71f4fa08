"""`python -m runtime.harness`: lm-evaluation-harness's own command line, with `--model glm4moe` among its models.

With `--where` alone it prints the file that, given among `--tasks`, has `lm_eval` itself find the model.
"""

import sys

from converters.errors import Glm4MoeError


def main() -> int:
    """Run lm_eval's command line; return the exit code."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from runtime.harness.registration import TASK_FILE
    except ImportError as error:
        sys.stderr.write(f"Error: lm_eval: {error}. Install it: pip install 'glm4moe[lm-eval]'.\n")
        return 2
    if sys.argv[1:] == ["--where"]:
        sys.stdout.write(f"{TASK_FILE}\n")
        return 0
    try:
        cli_evaluate()
    except Glm4MoeError as error:
        sys.stderr.write(f"Error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
