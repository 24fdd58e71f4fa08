"""One MoE layer of GLM-4.6 by every backend and whoever else is here, in one run on one GPU of less than ten minutes.

    PYTHONPATH=. python benchmarks/moe.py [--out FOLDER] [--seconds 540] [--shape GLM-4.6]
    PYTHONPATH=. python benchmarks/moe.py --dry-run --out FOLDER

Needs a CUDA GPU, and no network: wheels of others that were brought along, installed into a folder, go to PYTHONPATH:

    pip install --no-deps --target FOLDER liger-kernel==0.8.5 sglang==0.5.10

Each result is first held against an fp32 reference on all batches that are timed, and what a graph leaves behind once
more: of one that is wrong the error is reported, and no time. One and two tokens go round copies of the layer, so that
what all of them read comes from memory. Every stage ends in time, and what did not fit is named. `--dry-run` goes
through all of it on the CPU with a tiny layer: what is checked is checked, what is timed is marked as not measured.
Writes moe.json and moe.svg, after each stage anew.
"""

import argparse
import platform
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import write_result
from benchmarks.moe_chart import roofline_svg
from benchmarks.moe_compile import cases, compile_all
from benchmarks.moe_extras import determinism, shared_expert
from benchmarks.moe_inductor import measure_compiled
from benchmarks.moe_run import KINDS, Run
from benchmarks.moe_timing import FAILURES, LIMITS, Deadline, floors, reason
from runtime.kernels.moe.configs import HOPPER
from runtime.moe.cost import H200, SHAPES, LayerShape
from runtime.moe.fused_inputs import capability_of

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = tuple(1 << power for power in range(15))
TINY, TINY_TOKENS = LayerShape(64, 128, 6, 2), (1, 17)
DRY_BATCHES = 2
# for what compiles ahead of everything; the rest of the time is shared out by what comes after
COMPILE_S = 60.0
PACKAGES = ("triton", "transformers", "numpy")


def facts(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge the figures: machine and versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "cuda": torch.version.cuda}
        found["processors"], found["memory_bytes"] = properties.multi_processor_count, properties.total_memory
    return found


def compiled(run: Run) -> dict[str, Any]:
    """Compile ahead what the run will launch, and return what came of it."""
    if run.device.type != "cuda" or capability_of(run.device) != HOPPER:
        return {"left_out": "cases are those of Hopper"}
    return compile_all(list(cases(run.shape, KINDS, tuple(run.tokens))), COMPILE_S)


def with_shares(points: list[dict[str, Any]], limits: dict[str, float | None]) -> None:
    """Add to each timed row what part of the measured floor it reaches, and how much it computes a second."""
    read, flop = limits["read_bytes_per_s"], limits["bf16_flop_per_s"]
    for row in points:
        time_us = row.get("time", {}).get("median_us")
        if time_us is None or read is None or flop is None:
            continue
        is_fp8 = row["flop_speedup"] > 1 and row["scheme"].startswith("fp8")
        rate = (limits.get("fp8_flop_per_s") if is_fp8 else None) or flop * row["flop_speedup"]
        least_s = max(row["least_bytes"] / read, row["flop"] / rate)
        row["share_of_floor"], row["tflop_per_s"] = least_s * 1e6 / time_us, row["flop"] / time_us / 1e6


def stages(run: Run) -> dict[str, Callable[[], Any]]:
    """Return the stages in order, by the name under which what they return is written; see `Run` for the others'."""
    return {
        "limits": lambda: floors(run.device),
        "compiled": lambda: compiled(run),
        "own": run.measure_own,
        "peers": run.measure_peers,
        "compiled_peer": lambda: measure_compiled(run),
        "shared_expert_fused": lambda: shared_expert(run),
        "determinism": lambda: determinism(run),
        "routings": run.measure_routings,
        "launches_without_graph": run.count_launches,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and write; 1 if one of our results was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="GLM-4.6")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU: use --dry-run")
    device = torch.device("cpu" if args.dry_run else "cuda")
    shape, tokens = (TINY, TINY_TOKENS) if args.dry_run else (SHAPES[args.shape], TOKENS)
    run = Run(shape, tokens, device, Deadline(args.seconds))
    if args.dry_run:
        run.num_batches = DRY_BATCHES
        # less than an expert: several layers in turn
        run.l2_bytes = shape.expert_weights
    result: dict[str, Any] = {"is_measured": not args.dry_run, "environment": facts(device)}
    result |= {"limits": dict.fromkeys(LIMITS), "stages": {}, "failed": {}}
    result["shape"] = {"name": "tiny" if args.dry_run else args.shape, "experts": shape.num_experts}
    for name, stage in stages(run).items():
        perform(run, name, stage, result, args.out)
    wrong, failed = result["wrong"], result["failed"]
    print(
        f"{len(run.points)} points, {len(run.left_out)} left out, wrong: {wrong or 'none'}, failed: {failed or 'none'}"
    )
    return 1 if wrong or failed else 0


def perform(run: Run, name: str, stage: Callable[[], Any], result: dict[str, Any], out: Path) -> None:
    """Go through one stage and write all that is known: a GPU that fails takes with it only what comes after."""
    try:
        found = stage()
        result |= {} if found is None else {name: found}
    except FAILURES as error:
        traceback.print_exc()
        result["failed"][name] = reason(error)
    finally:
        result["stages"][name] = run.deadline.elapsed_s
        finish(run, result, out)


def finish(run: Run, result: dict[str, Any], out: Path) -> list[str]:
    """Write what was found so far, and return which of our backends were wrong."""
    with_shares(run.points, result["limits"])
    wrong = sorted({row["candidate"] for row in run.points if row["is_ours"] and not row["is_right"]})
    result |= {"points": run.points, "absent": run.absent, "left_out": run.left_out, "wrong": wrong}
    result["seconds"] = run.deadline.elapsed_s
    out.mkdir(parents=True, exist_ok=True)
    write_result(out / "moe.json", result)
    (out / "moe.svg").write_text(roofline_svg(run.shape, H200, run.points), encoding="utf-8")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
