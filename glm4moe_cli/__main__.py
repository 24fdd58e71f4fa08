"""Entry of `python -m glm4moe_cli`."""

from glm4moe_cli.main import main

if __name__ == "__main__":
    main()
