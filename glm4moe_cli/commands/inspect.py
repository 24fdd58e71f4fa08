"""`glm4moe inspect`: what a checkpoint is, and what is wrong with it."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from converters.errors import UsageError
from converters.inspect.report import InspectReport, inspect_folder, scan_content
from converters.remote import HubId, fetch_headers
from glm4moe_cli._options import output_options
from glm4moe_cli._output import Output
from glm4moe_cli.commands._inspection import raise_fatal, show

EXAMPLE = """\b
Example:
  glm4moe inspect zai-org/GLM-4.5-Air
  glm4moe inspect GLM-4.5-Air-FP8 --check
"""


@click.command(epilog=EXAMPLE)
@click.argument("checkpoint", metavar="CKPT")
@click.option("--tensors", is_flag=True, help="List every tensor: dtype, shape, bytes, file.")
@click.option("--missing", is_flag=True, help="List every tensor that is missing or unexpected.")
@click.option("--hash", "want_hash", is_flag=True, help="Digest of the content: equal for equal weights in any files.")
@click.option("--check", is_flag=True, help="Read all weights and look for NaN, Inf, constant tensors and bad scales.")
@output_options
def command(output: Output, checkpoint: str, tensors: bool, missing: bool, want_hash: bool, check: bool) -> None:
    """Describe CKPT: a folder, or a hub id such as org/name or org/name@revision.

    Reads headers and config alone, of a hub id too, unless --hash or --check ask for the weights. Exit code 4: it is
    corrupt or incomplete.
    """
    if Path(checkpoint).is_dir():
        report = inspect_folder(Path(checkpoint), checkpoint)
        if want_hash or check:
            report = _scan(output, report, want_hash=want_hash, check=check)
    else:
        report = _inspect_remote(output, checkpoint, "--check" if check else "--hash" if want_hash else None)
    show(output, report, tensors=tensors, missing=missing)
    output.result(report.to_json(tensors=tensors))
    raise_fatal(report)


def _scan(output: Output, report: InspectReport, *, want_hash: bool, check: bool) -> InspectReport:
    total_bytes = sum(tensor.nbytes for tensor in report.view.tensors.values())
    with output.progress("read", total_bytes) as progress:
        return scan_content(report, want_hash=want_hash, want_values=check, on_bytes=progress.advance)


def _inspect_remote(output: Output, checkpoint: str, needs_weights: str | None) -> InspectReport:
    """Fetch the headers of a hub id into a folder of holes, and inspect that."""
    hub_id = HubId.parse(checkpoint)
    if hub_id is None:
        raise UsageError(f"CKPT {checkpoint}", expected="a folder, org/name or org/name@revision", found="none of them")
    if needs_weights:
        raise UsageError(
            needs_weights,
            expected="a folder, for it reads all weights",
            found=f"the hub id {checkpoint}",
            next_step=f"glm4moe download {hub_id.repo} DST fetches it.",
        )
    from converters.download import Hub

    with TemporaryDirectory(prefix="glm4moe-headers-") as folder:
        listing = fetch_headers(Hub(), hub_id, Path(folder))
        output.note(f"{listing.repo} at commit {listing.commit}")
        return inspect_folder(Path(folder), checkpoint)
