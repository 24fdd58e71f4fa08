"""What convert and quantize have in common: show the plan, carry it out, report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.budget import StagingPlan
from converters.conversion import Conversion
from converters.forecast import Forecast, forecast
from converters.job import JobOptions, Outcome, run
from converters.job_options import check_job
from converters.pipeline import RunOptions
from converters.update import result_bytes
from glm4moe_cli._output import Output
from glm4moe_cli._progress import Progress
from glm4moe_cli._text import format_bytes, format_seconds
from glm4moe_cli.commands._quality import TITLE, quality_facts, quality_json, written_quality

if TYPE_CHECKING:
    from converters.feed import Feed


def plan_and_run(
    output: Output, conversion: Conversion, dst: Path, run_options: tuple[RunOptions, JobOptions], *, dry_run: bool
) -> None:
    """Print the plan; unless dry_run, write DST, or finish it, and say what was written.

    What can be refused is, before the plan is printed; a dry run refuses what the run would.
    """
    options, how = run_options
    feed, source = how.feed, conversion.source
    check_job(conversion, dst, options, how)
    staging = feed.plan(conversion.plan.shards) if feed else None
    summary = conversion.summary(options)
    for note in summary["notes"]:
        output.warning(note)
    output.facts("Plan", plan_facts(conversion, summary))
    replaced_bytes = result_bytes(dst) if how.update else 0
    expected = forecast(conversion, options, can_measure=feed is None, replaced_bytes=replaced_bytes)
    facts = forecast_facts(expected)
    if conversion.limits:
        facts["fits TP"] = conversion.limits["tensor parallel"]
    output.facts("Forecast", facts)
    if conversion.limits:
        output.facts("Parallel sizes that fit, by width", conversion.limits)
    name = feed.source if feed else str(source.folder)
    result = {"source": name, "destination": str(dst), "dry_run": dry_run, "plan": summary, "forecast": expected}
    if feed and staging:
        output.facts("Disk budget", staging_facts(feed, staging))
        result["staging"] = {
            "disk_budget": feed.budget,
            "fetch_bytes": staging.fetch_bytes,
            "files": staging.files,
            "least_bytes": staging.least_bytes,
            "peak_bytes": staging.held_bytes(feed.budget),
        }
    if not dry_run:
        with output.progress(conversion.command, conversion.plan.total_bytes) as progress:
            describe = show_fetching(feed, staging, progress) if feed and staging else progress.describe
            outcome = run(conversion, dst, options, progress.advance, how, describe)
        output.facts("Result", outcome_facts(dst, outcome))
        result["outcome"] = outcome
        quality = {} if outcome.is_part else written_quality(dst)
        if quality:
            output.facts(TITLE, quality_facts(quality))
            result["quality"] = quality_json(quality)
        if feed:
            result["fetched_bytes"] = feed.fetched_bytes
    output.result(result)


def show_fetching(feed: "Feed", plan: StagingPlan, progress: Progress) -> Callable[[str], None]:
    """Let progress also tell what came in; return what describes the work beside it."""
    unit = ""
    total_bytes = plan.fetch_bytes + sum(file.size for file in feed.staging.side)

    def show(fetched_bytes: int) -> None:
        fetched = f"fetched {format_bytes(fetched_bytes)} of {format_bytes(total_bytes)}"
        progress.describe(f"{unit}, {fetched}" if unit else fetched)

    def describe(text: str) -> None:
        nonlocal unit
        unit = text
        show(feed.fetched_bytes)

    feed.on_fetched = show
    return describe


def staging_facts(feed: "Feed", plan: StagingPlan) -> dict[str, object]:
    """Return what is held of a streamed source as names and values for people."""
    return {
        "fetches": f"{format_bytes(plan.fetch_bytes)} of weights in {len(plan.files)} files",
        "holds": f"at most {format_bytes(plan.held_bytes(feed.budget))} of the source; the output comes on top",
        "least budget": f"{plan.least_bytes} bytes",
    }


def forecast_facts(expected: Forecast) -> dict[str, object]:
    """Return what a run will take as names and values for people."""
    sizes = ", ".join(map(str, expected.tensor_parallel_sizes))
    writes, peak = format_bytes(expected.write_bytes), format_bytes(expected.peak_disk_bytes)
    is_update = expected.peak_disk_bytes > expected.write_bytes
    return {
        "reads": format_bytes(expected.read_bytes),
        "writes": f"{writes}; with the old result, which stays until the new one is whole, at most {peak} of disk"
        if is_update
        else f"{writes}, which is also the disk it needs",
        "time": "not known: the network decides, and no weights are here to measure the rest on"
        if expected.seconds is None
        else f"{format_seconds(expected.seconds)} at the measured rate, if the disk keeps up",
        "fits TP": sizes or "see glm4moe inspect",
        "loads in": ", ".join(expected.engines) or expected.engines_note,
    }


def outcome_facts(dst: Path, outcome: Outcome) -> dict[str, object]:
    """Return what a run did as names and values for people."""
    facts: dict[str, object] = {"folder": dst}
    if outcome.already_finished:
        return {**facts, "written": "nothing; this very job is finished"}
    facts["written"] = f"{len(outcome.written)} shards"
    if outcome.kept:
        facts["kept"] = f"{len(outcome.kept)} shards of an earlier run, proved by content"
    if outcome.redone:
        facts["redone"] = f"{len(outcome.redone)} shards that were not what the journal says"
    if outcome.is_part:
        left = f"{outcome.waiting_for} shards are left to other parts" if outcome.waiting_for else "others are at work"
        facts["unfinished"] = f"{left}; the last one to finish, or --finalize, writes the rest"
    return facts


def plan_facts(conversion: Conversion, summary: Mapping[str, object]) -> dict[str, object]:
    """Return the plan as names and values for people."""
    schema, plan = conversion.source.schema, conversion.plan
    mtp = "none" if schema.mtp_layer is None else f"layer {schema.mtp_layer}"
    if schema.has_mtp_copies:
        mtp += ", with its own embedding and head"
    made = ", ".join(f"{name} {format_bytes(size)}" for name, size in plan.bytes_by_transform.items())
    facts: dict[str, object] = {
        "source": f"{format_bytes(conversion.source_bytes)} in {len(conversion.source.reader.names)} tensors",
        "MTP layer": mtp,
        "output": f"{format_bytes(plan.file_bytes)} in {plan.num_tensors} tensors, {len(plan.shards)} shards",
        "made by": made,
        "memory": f"{format_bytes(int(str(summary['peak_block_bytes'])))} in flight, {summary['workers']} workers",
    }
    if plan.dropped:
        reasons = ", ".join(sorted(set(plan.dropped.values())))
        facts["dropped"] = f"{len(plan.dropped)} tensors ({reasons})"
    return facts
