"""NVFP4 codes multiplied as they are, in the interpreter; run as a program, it says what it found.

TRITON_INTERPRET=1 python -m tests.runtime.kernels.moe_native_fp4

No interpreter knows `tl.dot_scaled` with a scale for 16 columns. Here one does: what triton's documentation says of it,
done in numpy. So what kernels read, and how it is laid out for the instruction, is run; the instruction itself is not.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

from runtime.kernels.moe import grouped
from runtime.kernels.moe.configs import BLACKWELL, choose
from runtime.moe.weights import ExpertScheme
from tests.runtime.kernels.moe_grouped import LARGE, Case, run_case
from tests.runtime.kernels.moe_grouped_further import patched
from tests.runtime.kernels.moe_layers import NVFP4, NVFP4_EACH, Layer
from tests.runtime.kernels.older_interpreter import mend

# of four bits: sign, two of exponent, one of mantissa
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float64)
GROUP = 16
Array = np.ndarray[Any, Any]


@dataclass
class ScaledDot:
    """`dot_scaled` of E2M1 codes, packed along K, with E4M3 scales; counts how often it ran.

    Args:
        values: of an operand's bytes (R, B), as fp64 (R, 2 B).
        scales: of an operand's scales (R, G), as fp64 (R, 16 G).
    """

    values: Callable[[Array], Array]
    scales: Callable[[Array], Array]
    count: int = 0

    def __call__(self, lhs: Any, lhs_scale: Any, rhs: Any, rhs_scale: Any, acc: Any) -> Any:
        """Return acc (M, N) + lhs (M, K / 2) with scales (M, G) times rhs (K / 2, N) with scales (N, G)."""
        self.count += 1
        left_MK = self.values(lhs.data) * self.scales(lhs_scale.data)
        # faults are those of one side: both permuted alike would give the same sums
        right_NK = first_is_low(rhs.data.T) * of_16(rhs_scale.data)
        total_MN = (left_MK @ right_NK.T).astype(np.float32) + acc.data
        return interpreter.TensorHandle(total_MN, tl.float32)


def first_is_low(bytes_RB: Array) -> Array:
    """Return the values of two codes in a byte, the first in the lower bits."""
    assert bytes_RB.dtype == np.uint8, bytes_RB.dtype
    return E2M1[np.stack((bytes_RB & 15, bytes_RB >> 4), axis=-1).reshape(len(bytes_RB), -1)]


def first_is_high(bytes_RB: Array) -> Array:
    """A fault."""
    return first_is_low((bytes_RB << 4) | (bytes_RB >> 4))


def of_16(scales_RG: Array) -> Array:
    """Return E4M3 scales, each for 16 columns."""
    bits = torch.from_numpy(np.ascontiguousarray(scales_RG).view(np.uint8))
    return bits.view(torch.float8_e4m3fn).double().numpy().repeat(GROUP, axis=1)


def of_neighbours(scales_RG: Array) -> Array:
    """A fault: each scale belongs to the group beside its own."""
    return of_16(np.roll(scales_RG, 1, axis=1))


def of_other_rows(scales_RG: Array) -> Array:
    """A fault: each scale belongs to the row below its own."""
    return of_16(np.roll(scales_RG, 1, axis=0))


@contextmanager
def dots_by(dot: ScaledDot) -> Iterator[None]:
    """Have the interpreter multiply scaled codes, after triton has checked dtypes and shapes, and kernels use it."""
    check = TritonSemantic.dot_scaled

    def with_constants(self: Any, *given: Any) -> Any:
        # the interpreter hands formats over as strings, which its own front end does not take
        return check(self, *(tl.constexpr(one) if isinstance(one, str) else one for one in given))

    def multiply(*given: Any) -> Any:
        lhs, lhs_scale, lhs_format, rhs, rhs_scale, rhs_format, _, *is_packed_along_k, acc = given
        assert lhs_format == rhs_format == interpreter._ir.ScaleDotElemTypeTY.E2M1, (lhs_format, rhs_format)
        assert lhs_scale.dtype == rhs_scale.dtype == tl.float8e4nv, (lhs_scale.dtype, rhs_scale.dtype)
        assert is_packed_along_k == [True, True], is_packed_along_k
        return dot(lhs, lhs_scale, rhs, rhs_scale, acc)

    builder = interpreter.interpreter_semantic.builder
    # of the one builder, so that later versions keep what they have
    builder.create_dot_scaled = multiply
    try:
        with patched(TritonSemantic, "dot_scaled", with_constants), patched(grouped, "INTERPRET", tl.constexpr(False)):
            yield
    finally:
        del builder.create_dot_scaled


def layer_of(inputs: str, **changes: Any) -> Layer:
    """Return a layer whose last step along K is not full."""
    return replace(Layer(ExpertScheme.NVFP4, torch.bfloat16, inputs), **changes)


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    found = {}
    for inputs in (NVFP4, NVFP4_EACH):
        for number, (swap_ab, masked, tma) in enumerate(((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0))):
            config = replace(LARGE, swap_ab=bool(swap_ab), tma=bool(tma), persistent=number % 2 == 0)
            form = f"{'swap' if swap_ab else 'wide'} {'masked' if masked else 'contiguous'}{' tma' if tma else ''}"
            found[f"{inputs} {form}"] = Case(layer_of(inputs, exact=number in (0, 3)), config, bool(masked))
    for rows in (1.0, 16.0, 32.0, 128.0):
        layer = layer_of(NVFP4_EACH, tokens=70, experts=3, hidden=160, intermediate=96, exact=True)
        tiles = choose(
            layer.scheme, BLACKWELL, rows, hidden_size=layer.hidden, intermediate_size=layer.intermediate,
            is_quantized=True,
        )  # fmt: skip
        found[f"chosen for {rows:g}"] = Case(layer, tiles.up)
    for intermediate in (704, 352, 176):
        layer = layer_of(NVFP4_EACH, experts=3, hidden=32, intermediate=intermediate)
        # 88 bytes are no place for a descriptor
        found[f"{intermediate} of a shard"] = Case(layer, replace(LARGE, swap_ab=True, tma=intermediate != 176))
    tiny = layer_of(NVFP4_EACH, tokens=18, experts=5, hidden=64, intermediate=32, exact=True)
    for routing in ("one", "filtered", "none"):
        found[routing] = Case(replace(tiny, routing=routing), replace(LARGE, swap_ab=True, tma=True))
    return {name: replace(case, native_fp4=True) for name, case in found.items()}


def canaries() -> dict[str, dict[str, Any]]:
    """Return what is found where an operand is not laid out as the instruction takes it."""
    faults = {
        "nibbles": ScaledDot(first_is_high, of_16),
        "groups": ScaledDot(first_is_low, of_neighbours),
        "rows": ScaledDot(first_is_low, of_other_rows),
    }
    found = {}
    for name, dot in faults.items():
        with dots_by(dot):
            found[name] = run_case(cases()[f"{NVFP4_EACH} swap contiguous tma"])
    return found


def main() -> None:
    """Run all on the CPU."""
    torch.set_num_threads(1)
    mend()
    dot, found = ScaledDot(first_is_low, of_16), {}
    with dots_by(dot):
        for name, case in cases().items():
            before = dot.count
            found[name] = {**run_case(case), "dots": dot.count - before}
    json.dump({"cases": found, "canaries": canaries()}, sys.stdout)


if __name__ == "__main__":
    main()
