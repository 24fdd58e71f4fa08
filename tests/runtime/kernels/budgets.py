"""How far a result may be from the exact one, derived from how often it is rounded; and what exceeds that.

With n roundings of unit u, a sum or product is off by at most gamma(n) = n u / (1 - n u) times the sum of the sizes of
its terms, in whatever order these are added. References are fp64, whose own roundings are 2^-29 of fp32's.
"""

import torch

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# half of the smallest number
LEAST = {torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def gamma(roundings: int, dtype: torch.dtype = torch.float32) -> float:
    share = roundings * UNIT[dtype]
    return share / (1 - share)


def narrowed(exact: torch.Tensor, error: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the error of a value that is off by at most `error` and is then rounded to a dtype."""
    return error + UNIT[dtype] * (exact.abs() + error) + LEAST[dtype]


def beyond(name: str, found: torch.Tensor, exact: torch.Tensor, error: torch.Tensor) -> list[str]:
    """Return what is wrong with a result, as text; NaN is."""
    off = (found.to(torch.float64) - exact).abs()
    wrong = ~(off <= error)
    if not bool(wrong.any()):
        return []
    worst = (off / error).nan_to_num(nan=float("inf")).max()
    return [f"{name}: {int(wrong.sum())} of {wrong.numel()} values off by up to {float(worst):.3g} budgets"]


def unequal(name: str, found: torch.Tensor, expected: torch.Tensor) -> list[str]:
    """Return where two tensors differ in a bit, as text."""
    if (found.dtype, found.shape) != (expected.dtype, expected.shape):
        return [f"{name}: {found.dtype} {tuple(found.shape)}, not {expected.dtype} {tuple(expected.shape)}"]
    # a copy: strides of dims of one value are not looked at by contiguous
    plain = (value.flatten().clone(memory_format=torch.contiguous_format) for value in (found, expected))
    found, expected = (value.view(torch.uint8) for value in plain)
    wrong = (found != expected).nonzero().flatten().tolist()
    return [f"{name}: {len(wrong)} bytes differ, first {wrong[:5]}"] if wrong else []
