"""Command line of glm4moe; here only the version, so that asking for it imports nothing else."""

__version__ = "0.1.0"
