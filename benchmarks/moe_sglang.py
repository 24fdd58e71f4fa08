"""SGLang's grouped kernel, which comes from vLLM's, by its kernel file alone: the rest of the package stays outside.

What the file imports and its bf16 path never calls is stood in for. Rows are laid out by our kernel for that, which
favors it; activation and sum are its own kernels. Tiles are those that public tuning for an H200 converged to.
"""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FILE = "srt/layers/moe/fused_moe_triton/fused_moe_triton_kernels.py"
STOOD_IN = (
    "sglang", "sglang.srt", "sglang.srt.batch_invariant_ops", "sglang.srt.layers", "sglang.srt.layers.quantization",
    "sglang.srt.layers.quantization.fp8_kernel", "sglang.srt.layers.quantization.int8_kernel", "sglang.srt.utils",
)  # fmt: skip
# what the file asks for while it is loaded
_ANSWERS = {"is_cuda": True}


class _StandIn(ModuleType):
    """A module that has any function, which answers no."""

    __path__: list[str] = []  # noqa: RUF012 - so that submodules may be looked for

    def __getattr__(self, name: str) -> Callable[..., bool]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: _ANSWERS.get(name, False)


@contextmanager
def _stood_in() -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in STOOD_IN}
    sys.modules.update({name: _StandIn(name) for name in STOOD_IN})
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@cache
def kernels() -> ModuleType:
    """Return the kernel file as a module.

    Raises:
        ImportError: it is not installed.
    """
    found = importlib.util.find_spec("sglang")
    places = found.submodule_search_locations if found else None
    if not places:
        raise ImportError("no sglang on PYTHONPATH")
    spec = importlib.util.spec_from_file_location("sglang_fused_moe_kernels", Path(places[0]) / FILE)
    assert spec is not None, places
    assert spec.loader is not None, places
    module = importlib.util.module_from_spec(spec)
    with _stood_in():
        spec.loader.exec_module(module)
    return module


def tiles(num_tokens: int) -> dict[str, int]:
    """Return a configuration by the number of tokens."""
    block_m = 16 if num_tokens <= 256 else 32 if num_tokens <= 512 else 64 if num_tokens <= 1024 else 128
    block_n, num_warps = (64, 4) if block_m <= 32 else (128, 8)
    return {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 8,
            "num_warps": num_warps, "num_stages": 3}  # fmt: skip


def run_sglang(
    hidden_TH: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_ids_TK: torch.Tensor,
    topk_weights_TK: torch.Tensor,
    build_rows: Callable[..., Any],
    config: dict[str, int] | None = None,
) -> torch.Tensor:
    """Return (T, H): weights as (E, 2I, H), gate above up, and (E, H, I).

    Args:
        hidden_TH: bf16, fp16, or fp32.
        gate_up: of the same dtype.
        down: the same.
        topk_ids_TK: int32.
        topk_weights_TK: fp32.
        build_rows: see `runtime.kernels.moe.build_rows`.
        config: tiles; None: by the number of tokens.
    """
    import triton.language as tl

    module, (num_tokens, top_k) = kernels(), topk_ids_TK.shape
    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    config = config or tiles(num_tokens)
    num_slots, block_m = num_tokens * top_k, config["BLOCK_SIZE_M"]
    rows = build_rows(topk_ids_TK, len(gate_up), block_m)
    # its mark of padding is the number of slots
    places = (torch.where(rows.slots_P < 0, num_slots, rows.slots_P), rows.expert_of_block, rows.num_blocks * block_m)

    def multiply(rows_RK: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, each: int) -> None:
        weighted = each == 1
        module.invoke_fused_moe_kernel(
            rows_RK, weight, None, out, None, None, None, topk_weights_TK, topk_ids_TK, *places, weighted, each,
            config, types[hidden_TH.dtype], False, False, False, False, False,
        )  # fmt: skip

    wide = hidden_TH.new_empty(num_slots, gate_up.shape[1])
    multiply(hidden_TH, gate_up, wide, top_k)
    active = hidden_TH.new_empty(num_slots, down.shape[2])
    module.act_and_mul_triton(wide, active, config, topk_ids_TK)
    results = hidden_TH.new_empty(num_tokens, top_k, hidden_TH.shape[1])
    multiply(active, down, results, 1)
    out = torch.empty_like(hidden_TH)
    module.moe_sum_reduce_triton(results, out, 1.0)
    return out
