"""Every kernel on awkward weights, held against the torch twin; run as a program, it says what differs as JSON.

The interpreter has to be chosen before triton is imported: TRITON_INTERPRET=1 python -m tests.runtime.kernels.grid
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)
from converters.transforms.rows import RowTransform

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
E2M1_TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


@dataclass(frozen=True)
class Case:
    """A transform, its weights by a function of their dtype, and how far weights elsewhere exceed these."""

    transform: RowTransform
    weights: Callable[[torch.dtype], torch.Tensor]
    factor: float = 1.0

    def beside(self, weight_RC: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what the pipeline hands over with the rows."""
        if not isinstance(self.transform, QuantizeFp8Tensor | QuantizeNvfp4):
            return ()
        limit = torch.finfo(weight_RC.dtype).max
        # as the pipeline finds it: a value that the weight's dtype has
        return ((weight_RC.abs().max().float() * self.factor).clamp(max=limit).to(weight_RC.dtype).float().view(1, 1),)

    def differences(self, device: str) -> list[str]:
        """Return which outputs of the kernel are not those of the twin, by dtype of the weights."""
        from runtime.kernels.quantize import is_sound, prepare

        found = []
        for name, dtype in DTYPES.items():
            weight_RC = self.weights(dtype)
            beside = self.beside(weight_RC)
            launch = prepare(self.transform, weight_RC.to(device), *beside)
            assert launch is not None, self
            poison(launch.outputs)
            outputs = tuple(output.cpu() for output in launch.run())
            expected = self.transform(weight_RC, *beside)
            assert is_sound(expected), self
            for number, (ours, theirs) in enumerate(zip(outputs, expected, strict=True)):
                if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
                    found.append(f"{name}, output {number}: {ours.dtype} {tuple(ours.shape)}")
                elif not torch.equal(as_bytes(ours), as_bytes(theirs)):
                    wrong = (as_bytes(ours) != as_bytes(theirs)).nonzero().flatten().tolist()
                    found.append(f"{name}, output {number}: {len(wrong)} bytes, first {wrong[:5]}")
        return found


def poison(outputs: tuple[torch.Tensor, ...]) -> None:
    """Fill what a kernel is to write, so that a value it leaves out does not pass by chance; known scales stay."""
    for output in outputs[:2]:
        if output.numel() > 1:
            as_bytes(output).fill_(0xAB)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.uint8)


def hard_rows(columns: int) -> torch.Tensor:
    """Return fp32 rows (R, columns), each hard in its own way."""
    g = torch.Generator().manual_seed(5)
    normal_KC = torch.randn(12, columns, generator=g)
    ramp = torch.linspace(-1, 1, columns) if columns > 1 else torch.ones(1)
    half_steps = (torch.arange(columns) % 256 - 128) + 0.5
    # middles of E4M3 under a scale of 1, and of E2M1 under one of 448
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    e4m3_ties = torch.cat([e4m3[126:], (e4m3[1:] + e4m3[:-1]) / 2])
    e2m1_ties = torch.tensor([6.0, *E2M1_TIES, *(-tie for tie in E2M1_TIES), -0.25]) * 448
    rows = [
        normal_KC[0],
        normal_KC[1] * 0.02,
        normal_KC[2] / torch.rand(columns, generator=g).clamp_min(1e-3),
        torch.zeros(columns),
        torch.full((columns,), -0.0),
        torch.where(torch.arange(columns) % 2 == 0, normal_KC[3], -0.0),
        -normal_KC[4].abs(),
        normal_KC[5] * torch.logspace(-8, 3, columns),
        torch.exp2(torch.randint(-20, 5, (columns,), generator=g).float()),
        normal_KC[6] * (ramp > 0.98),
        # scaled by 448 or 127.5 these are ties, up to the largest code of either sign
        half_steps.clamp(-127.5, 127.5),
        -half_steps.clamp(-127.0, 127.0),
        e4m3_ties.repeat(columns // len(e4m3_ties) + 1)[:columns],
        e2m1_ties.repeat(columns // 16 + 1)[:columns],
    ]
    return torch.stack(rows)


def extreme_rows(columns: int) -> torch.Tensor:
    """Return fp32 rows near the ends of the range: subnormal in each dtype, tiny, huge."""
    g = torch.Generator().manual_seed(6)
    sizes = (1e-44, 1e-40, 1e-38, 1e-30, 1e-8, 1e-6, 1e-4, 1e30, 1e38)
    rows = [torch.randn(columns, generator=g).clamp(-3, 3) * size for size in sizes]
    # 448 times the middle of two subnormal bf16 scales, below and above the even one
    rows += [torch.full((columns,), largest * 2.0**-128) for largest in (7 * 3, 7 * 5)]
    return torch.stack(rows)


def even_rows(columns: int) -> torch.Tensor:
    """Return fp32 rows of ninths: the scales of their groups are near the largest one, which some should have."""
    # in 112 columns, of 168 groups four are searched beyond the largest scale and end there
    return torch.randint(-9, 10, (24, columns), generator=torch.Generator().manual_seed(23)) / 9


def within(weight_RC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return weights in a dtype, cut to its range."""
    limit = torch.finfo(dtype).max
    return weight_RC.clamp(-limit, limit).to(dtype)


def rows(columns: int) -> Callable[[torch.dtype], torch.Tensor]:
    """Return what makes hard and extreme rows."""
    return lambda dtype: torch.cat([within(make(columns), dtype) for make in (hard_rows, extreme_rows)])


def only(make: Callable[[int], torch.Tensor], columns: int, size: float = 1.0) -> Callable[[torch.dtype], torch.Tensor]:
    """Return what makes rows of one kind, times a number."""
    return lambda dtype: within(make(columns) * size, dtype)


def one_row(columns: int) -> Callable[[torch.dtype], torch.Tensor]:
    """Return what makes a single row."""
    return lambda dtype: within(hard_rows(columns)[2:3], dtype)


def blocks(height: int, columns: int, *, extreme: bool) -> Callable[[torch.dtype], torch.Tensor]:
    """Return what makes so many rows of each kind, and half as many of the last."""

    def make(dtype: torch.dtype) -> torch.Tensor:
        kinds = [hard_rows(columns), extreme_rows(columns)[0 if extreme else 3 : None if extreme else 9]]
        return within(torch.cat(kinds).repeat_interleave(height, 0)[: -(height // 2)], dtype)

    return make


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    return {name: case for arithmetic in Arithmetic for name, case in _cases(arithmetic)}


def _cases(arithmetic: Arithmetic) -> Iterator[tuple[str, Case]]:
    for columns in (16, 200):
        yield f"fp8 {columns} {arithmetic}", Case(QuantizeFp8Channel(arithmetic), rows(columns))
        yield f"int8 {columns} {arithmetic}", Case(QuantizeInt8(arithmetic), rows(columns))
    # wider than a tile, and one row
    yield f"fp8 one row {arithmetic}", Case(QuantizeFp8Channel(arithmetic), one_row(4100))
    yield f"int8 one column {arithmetic}", Case(QuantizeInt8(arithmetic), rows(1))
    for factor in (1.0, 1.75):
        case = Case(QuantizeFp8Tensor(arithmetic), only(hard_rows, 90), factor)
        yield f"fp8 tensor x{factor} {arithmetic}", case
    for size in (1e-40, 1e-6):
        yield f"fp8 tensor {size} {arithmetic}", Case(QuantizeFp8Tensor(arithmetic), only(hard_rows, 90, size))
    block = QuantizeFp8Block(arithmetic, rows=3, columns=12)
    yield f"fp8 small blocks {arithmetic}", Case(block, blocks(3, 20, extreme=True))
    yield f"fp8 blocks {arithmetic}", Case(QuantizeFp8Block(arithmetic), blocks(8, 130, extreme=False))
    if arithmetic is Arithmetic.FLOAT32:
        inverse = QuantizeFp8Block(arithmetic, rows=3, columns=12, inverse=True)
        yield "fp8 inverse blocks", Case(inverse, blocks(3, 20, extreme=False))
    if arithmetic is not Arithmetic.MODELOPT:
        for group, columns in ((0, 96), (0, 95), (0, 1), (32, 96), (64, 192), (128, 256)):
            packed = QuantizeInt8Packed(arithmetic, group)
            yield f"packed {group} {columns} {arithmetic}", Case(packed, rows(columns))
    for search in ScaleSearch:
        nvfp4 = QuantizeNvfp4(arithmetic, search)
        for factor in (1.0, 1.75):
            yield f"nvfp4 {search} x{factor} {arithmetic}", Case(nvfp4, only(hard_rows, 208), factor)
        yield f"nvfp4 {search} even {arithmetic}", Case(nvfp4, only(even_rows, 112))
        yield f"nvfp4 {search} one row {arithmetic}", Case(nvfp4, one_row(2064))
        # modelopt's factor has a smaller range; beyond it rows are left to the twin
        for size in (1e-24, 1e-6, 1e26) if arithmetic is Arithmetic.MODELOPT else (1e-40, 1e-36, 1e-6, 1e34):
            yield f"nvfp4 {search} {size} {arithmetic}", Case(nvfp4, only(hard_rows, 48, size))


def not_refused(device: str) -> list[str]:
    """Return the transforms whose kernels let a NaN or an infinity in the last row pass."""
    from runtime.kernels.quantize import is_sound, prepare

    found = []
    named = {case.transform.name: case.transform for case in cases().values() if not case.factor > 1}
    for name, transform in named.items():
        if isinstance(transform, QuantizeFp8Tensor):
            # its scale is known before: the reader has seen every weight
            continue
        for dtype in DTYPES.values():
            for bad in (float("nan"), float("-inf")):
                weight_RC = hard_rows(128).to(dtype)
                weight_RC[-1, 77] = bad
                launch = prepare(transform, weight_RC.to(device), torch.ones(1, 1))
                assert launch is not None, name
                if is_sound(launch.run()):
                    found.append(f"{name}, {dtype}, {bad}")
    return found


def main() -> None:
    """Run all on the CPU."""
    torch.set_num_threads(1)
    different = {name: case.differences("cpu") for name, case in cases().items()}
    from tests.runtime.kernels import sums

    found = {"different": different, "not refused": not_refused("cpu"), "sums": sums.differences("cpu")}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
