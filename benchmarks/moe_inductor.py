"""A grouped layer as torch.compile makes it, with the grouped template of Inductor in triton, in a process of its own.

Nobody knows beforehand how long it is tuned, and it cannot be stopped from within. So a process does it, with a layer
of its own and our kernels beside, and is ended when its time is over. What it had measured by then counts.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.moe_layers import Batch, make_experts, make_layer
from benchmarks.moe_peers import Candidate, Halves, ours
from benchmarks.moe_run import POINT_S, Run
from benchmarks.moe_timing import FAILURES, Deadline, reason
from runtime.moe.cost import LayerShape
from runtime.moe.grouped import grouped_mm
from runtime.moe.weights import ExpertScheme

NAME = "torch.compile, grouped template"
COMPILED_END = 0.81
# each is compiled and tuned by itself; the first is the least that says anything
SIZES, DRY_SIZES = (256, 16, 4096), (3,)
# without ATen's product, which is `cutlass` here, only the template is left to choose
_OPTIONS = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}
# until a process has torch and a layer
_START_S = 20.0


def grouped_layer(
    hidden_TH: torch.Tensor, ids_TK: torch.Tensor, weights_TK: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Return the experts (T, H) by two grouped products of torch; gate above up (E, 2I, H), and down (E, H, I)."""
    num_tokens, top_k = ids_TK.shape
    sorted_S, order_S = ids_TK.flatten().sort(stable=True)
    ids_E = torch.arange(len(down), dtype=sorted_S.dtype, device=sorted_S.device)
    ends_E = torch.searchsorted(sorted_S, ids_E, right=True, out_int32=True)
    gate, up = grouped_mm(hidden_TH[order_S // top_k], gate_up, ends_E).chunk(2, 1)
    rows_SH = grouped_mm(F.silu(gate) * up, down, ends_E)
    slots_SH = rows_SH[order_S.argsort()].view(num_tokens, top_k, -1)
    return (slots_SH.float() * weights_TK[:, :, None]).sum(1).to(hidden_TH.dtype)


def compiled_layer(experts: Any, device: torch.device) -> Candidate:
    """Return the compiled layer; without a GPU it is traced, and run as it is."""
    halves = Halves.of(experts.weights)
    how: dict[str, Any] = {"options": _OPTIONS} if device.type == "cuda" else {"backend": "eager"}
    made: Callable[..., torch.Tensor] = torch.compile(grouped_layer, fullgraph=True, dynamic=False, **how)

    def run(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            return made(batch.hidden_TH, batch.slots.ids_TK, batch.slots.weights_TK, halves.gate_up, halves.down)

    note = f"{torch.__version__}, tuned by itself" if device.type == "cuda" else "traced, not compiled"
    return Candidate(NAME, run, version=note, is_compiled=True)


def measure_compiled(run: Run) -> None:
    """Add points of the compiled layer and of ours beside it, or say why there are none."""
    until = run.deadline.part(COMPILED_END)
    if not until.has(_START_S + POINT_S):
        run.absent[NAME] = "no time left"
        return
    if run.device.type != "cuda":
        for found in _measured(run.shape, DRY_SIZES, run.device):
            _take(run, found)
        return
    context = multiprocessing.get_context("spawn")
    ours_end, theirs_end = context.Pipe(duplex=False)
    process = context.Process(target=_send_measured, args=(theirs_end, run.shape, SIZES, run.device), daemon=False)
    process.start()
    # if it dies, nobody else holds this end, and waiting ends too
    theirs_end.close()
    try:
        for num_tokens in SIZES:
            left_s = until.seconds - until.elapsed_s
            if left_s <= 0 or not ours_end.poll(left_s):
                run.left_out.append(f"{NAME}, {num_tokens} tokens and what comes after: not compiled in time")
                break
            found = ours_end.recv()
            _take(run, found)
            if isinstance(found, str):
                break
    except EOFError:
        run.absent[NAME] = "the process ended before it had said anything more"
    finally:
        process.kill()
        process.join()


def _take(run: Run, found: list[dict[str, Any]] | str) -> None:
    if isinstance(found, str):
        run.absent[NAME] = found
        return
    for row in found:
        if row["candidate"] == NAME and not row["is_right"]:
            run.absent[NAME] = f"{row['tokens']} tokens: {row['relative_error']}"
    run.points += [row | {"beside_peers": True} for row in found]


def _measured(shape: LayerShape, sizes: tuple[int, ...], device: torch.device) -> Any:
    """Yield rows for each number of tokens, or why there are none."""
    try:
        experts = make_experts(make_layer(shape, ExpertScheme.BF16, device), is_quantized=False)
        candidates = [next(ours(experts, device)), compiled_layer(experts, device)]
        run = Run(shape, sizes, device, Deadline(float("inf")))
        for num_tokens in sizes:
            yield run.point(experts, candidates, "uniform", num_tokens)
    except FAILURES as error:
        yield reason(error)


def _send_measured(end: Connection, shape: LayerShape, sizes: tuple[int, ...], device: torch.device) -> None:
    for found in _measured(shape, sizes, device):
        end.send(found)
