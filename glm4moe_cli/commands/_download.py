"""What download does once its options are known: plan, prove what is there, fetch the rest, or only prove."""

from collections.abc import Sequence

from converters.errors import InputError
from converters.findings import Finding
from converters.hub.fetch import HubClient
from converters.hub.job import begun, check_present, check_whole, fetch_files
from converters.hub.plan import DownloadPlan, Request, plan_download, total_bytes
from converters.hub.verify import check_files, open_kept
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes

COLUMNS = ("file", "expected", "found")
# more of them say no more; --json has all
MAX_NAMES = 5


def fetch(output: Output, hub: HubClient, request: Request, workers: int, *, dry_run: bool) -> None:
    """Print the plan; unless dry_run, carry it out and say what was done."""
    plan = plan_download(hub, request)
    _show_plan(output, plan)
    document = {**_identity(plan), "dry_run": dry_run, "plan": _plan_document(plan)}
    output.result(document)
    plan.check_space()
    if dry_run:
        return
    output.result({**document, **_run(output, hub, plan, workers)})
    if plan.listing.is_whole:
        output.hint(f"glm4moe quantize {plan.dst} {plan.dst}-FP8 --scheme fp8")


def _run(output: Output, hub: HubClient, plan: DownloadPlan, workers: int) -> dict[str, object]:
    with begun(plan):
        with output.progress("check", total_bytes(plan.present)) as progress:
            damaged, files = check_present(plan, workers, progress.advance)
        for finding in damaged:
            output.warning(f"{finding}. It is in quarantine now and will be fetched again.")
        partial_bytes = plan.partial_bytes
        there_bytes = plan.total_bytes - total_bytes(files) + partial_bytes
        with output.progress("download", plan.total_bytes, there_bytes) as progress:
            fetch_files(hub, plan, files, workers, progress.advance)
        for note in check_whole(plan):
            output.warning(note)
    fetched_bytes = total_bytes(files) - partial_bytes
    facts = {"folder": plan.dst, "commit": plan.listing.commit, "files": len(plan.selection.files)}
    output.facts(
        "Complete", {**facts, "fetched": format_bytes(fetched_bytes), "proved": format_bytes(plan.total_bytes)}
    )
    return {"fetched_bytes": fetched_bytes, "refetched": [finding.subject for finding in damaged]}


def _show_plan(output: Output, plan: DownloadPlan) -> None:
    listing, skipped = plan.listing, plan.selection.skipped
    if plan.is_resumed:
        output.note(f"Going on with commit {listing.commit}, which {plan.dst} was begun with.")
    if skipped:
        output.warning(f"Not fetched, because pickled files can run code: {_shorten(skipped)}.")
    output.facts(
        "Plan",
        {
            "repository": listing.repo,
            "commit": f"{listing.commit} ({listing.revision})",
            "files": f"{format_bytes(plan.total_bytes)} in {len(plan.selection.files)} files",
            "there": f"{format_bytes(total_bytes(plan.present) + plan.partial_bytes)}, to be hashed again",
            "to fetch": format_bytes(plan.fetch_bytes),
            "disk": f"{format_bytes(plan.needed_bytes)} needed, {format_bytes(plan.free_bytes)} free",
        },
    )


def _identity(plan: DownloadPlan) -> dict[str, object]:
    listing = plan.listing
    names = {"repo": listing.repo, "revision": listing.revision, "commit": listing.commit}
    return {**names, "destination": str(plan.dst)}


def _plan_document(plan: DownloadPlan) -> dict[str, object]:
    return {
        "files": plan.selection.files,
        "skipped": plan.selection.skipped,
        "resumed": plan.is_resumed,
        "total_bytes": plan.total_bytes,
        "present_bytes": total_bytes(plan.present) + plan.partial_bytes,
        "fetch_bytes": plan.fetch_bytes,
        "needed_bytes": plan.needed_bytes,
        "free_bytes": plan.free_bytes,
    }


def verify(output: Output, request: Request, workers: int) -> None:
    """Hash everything that a download left and hold it against the listing kept beside it.

    Raises:
        InputError: something is missing or damaged.
    """
    patterns = (request.include, request.exclude) if request.include or request.exclude else None
    kept = open_kept(request.dst, request.repo, request.revision, patterns)
    num_bytes = total_bytes(kept.files)
    with output.progress("verify", num_bytes) as progress:
        findings = check_files(kept.dst, kept.files, workers, progress.advance)
    if kept.extra:
        output.note(f"Not in the listing: {_shorten(kept.extra)}.")
    names = {"repo": kept.listing.repo, "revision": kept.listing.revision, "commit": kept.listing.commit}
    counts = {"files": len(kept.files), "bytes": num_bytes, "extra": kept.extra, "findings": findings}
    output.result({**names, "destination": str(kept.dst), **counts})
    if findings:
        output.table("Damaged", COLUMNS, [(item.subject, item.expected, item.found) for item in findings])
        raise _failure(request, findings, len(kept.files))
    commit = f"{kept.listing.commit} ({kept.listing.revision})"
    output.facts("Proved", {"folder": kept.dst, "commit": commit, "files": len(kept.files), "bytes": num_bytes})


def _failure(request: Request, findings: Sequence[Finding], num_files: int) -> InputError:
    return InputError(
        f"{request.dst}",
        expected=f"{num_files} files as listed",
        found=f"{len(findings)} missing or damaged: {_shorten([finding.subject for finding in findings])}",
        next_step=f"Run 'glm4moe download {request.repo} {request.dst}' to fetch them again.",
    )


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES])
    return f"{shown} and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else shown
