"""`glm4moe download`: a repository of the hub into a folder, every byte proved, resumable at any byte."""

from pathlib import Path

import click

from converters.download import Hub
from converters.errors import UsageError
from converters.hub.job import DEFAULT_WORKERS
from converters.hub.plan import Request
from glm4moe_cli._options import TextName, dry_run_option, dst_argument, output_options
from glm4moe_cli._output import Output
from glm4moe_cli.commands._download import fetch, verify

EXAMPLE = """\b
Examples:
  glm4moe download zai-org/GLM-4.5-Air GLM-4.5-Air
  glm4moe download zai-org/GLM-4.5-Air GLM-4.5-Air --verify-only
"""


@click.command(epilog=EXAMPLE)
@click.argument("repo", metavar="REPO", type=TextName())
@dst_argument
@click.option("--revision", metavar="R", show_default="main", help="Branch, tag or commit.")
@click.option("--include", multiple=True, metavar="GLOB", help="Fetch only files that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="Leave out files that match; may be repeated.")
@click.option("--verify-only", is_flag=True, help="Hash all files again and compare; needs no network.")
@dry_run_option
@click.option(
    "--workers",
    type=click.IntRange(1, 64),
    metavar="N",
    default=DEFAULT_WORKERS,
    show_default=True,
    help="Files fetched at once.",
)
@output_options
def command(
    output: Output,
    repo: str,
    dst: Path,
    revision: str | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    verify_only: bool,
    dry_run: bool,
    workers: int,
) -> None:
    """Fetch the repository REPO of the hub into the folder DST and check the digest of every file.

    The commit is pinned at the start. Stopped in any way, the same command goes on where it was; what is there
    already is hashed again, so exit code 0 means that every file is right. HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE
    and their kin mean what they mean to `hf`.
    """
    request = Request(repo, dst, revision, include, exclude)
    if not verify_only:
        fetch(output, Hub(), request, workers, dry_run=dry_run)
        return
    if dry_run:
        raise UsageError("--dry-run", expected="a download", found="--verify-only, which writes nothing")
    verify(output, request, workers)
