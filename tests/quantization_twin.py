"""The quantizers as one would write them down: no buffers, no bit tricks. The real ones must give these bytes."""

import torch

from converters.quant.scheme import Arithmetic, ScaleSearch

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
OFFSETS = (0, 4, 5, -1, 1, 3, 6, -2)


def scales(amax: torch.Tensor, full: float, arithmetic: Arithmetic) -> torch.Tensor:
    if arithmetic is Arithmetic.MODELOPT:
        return torch.where(amax == 0, full, amax).clamp(min=torch.finfo(amax.dtype).tiny).float() / full
    if arithmetic is Arithmetic.FLOAT32 and amax.dtype is torch.float16:
        amax = amax.float()
    scale = amax / torch.tensor(full, dtype=amax.dtype)
    return torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)


def quotient(weight: torch.Tensor, scale: torch.Tensor, arithmetic: Arithmetic) -> torch.Tensor:
    """Divide (R, C) by scales (R, G)."""
    groups = weight.unflatten(1, (scale.shape[1], -1))
    if arithmetic is Arithmetic.COMPRESSED_TENSORS:
        return (groups / scale.unsqueeze(2) + 0.0).flatten(1)
    return (groups.float() / scale.float().unsqueeze(2)).flatten(1)


def e4m3(scaled: torch.Tensor) -> torch.Tensor:
    return scaled.clamp(-448, 448).to(torch.float8_e4m3fn)


def amax(weight: torch.Tensor, group: int = 0) -> torch.Tensor:
    return weight.unflatten(1, (-1, group or weight.shape[1])).abs().amax(2)


def fp8_channel(weight: torch.Tensor, arithmetic: Arithmetic) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scales(amax(weight), 448.0, arithmetic)
    return e4m3(quotient(weight, scale, arithmetic)), scale


def fp8_tensor(
    weight: torch.Tensor, largest: torch.Tensor, arithmetic: Arithmetic
) -> tuple[torch.Tensor, torch.Tensor]:
    if arithmetic is Arithmetic.MODELOPT:
        scale = torch.where(largest == 0, 1.0, largest / 448.0)
        return e4m3((weight.float() / scale).to(weight.dtype)), scale
    scale = scales(largest.to(weight.dtype), 448.0, arithmetic)
    return e4m3(quotient(weight, scale.expand(len(weight), 1), arithmetic)), scale


def fp8_block(
    weight: torch.Tensor, arithmetic: Arithmetic, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks one by one."""
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    rows = []
    for top in range(0, len(weight), 128):
        row = []
        for left in range(0, weight.shape[1], 128):
            block = weight[top : top + 128, left : left + 128]
            largest = block.abs().max().view(1, 1)
            if inverse:
                factor = torch.where(largest > 0, 448.0 * (1.0 / largest.float()), 1.0)
                scale, scaled = 1.0 / factor, block.float() * factor
            else:
                scale = scales(largest, 448.0, arithmetic)
                scaled = quotient(block, scale.expand(len(block), 1), arithmetic)
            codes[top : top + 128, left : left + 128] = e4m3(scaled)
            row.append(scale)
        rows.append(torch.cat(row, 1))
    return codes, torch.cat(rows)


def int8(weight: torch.Tensor, arithmetic: Arithmetic, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    scale = scales(amax(weight, group), 127.0 if arithmetic is Arithmetic.MODELOPT else 127.5, arithmetic)
    return quotient(weight, scale, arithmetic).clamp(-128, 127).round().to(torch.int8), scale


def e2m1_codes(scaled: torch.Tensor) -> torch.Tensor:
    """Return E2M1 codes as uint8; ties go to the even code."""
    size = scaled.abs()
    codes = (scaled < 0).to(torch.uint8) << 3
    for is_above in (size > 0.25, size >= 0.75, size > 1.25, size >= 1.75, size > 2.5, size >= 3.5, size > 5.0):
        codes += is_above
    return codes


def nvfp4(
    weight: torch.Tensor, largest: torch.Tensor, arithmetic: Arithmetic, search: ScaleSearch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    largest = largest.float()
    if arithmetic is Arithmetic.MODELOPT:
        overall = torch.where(largest == 0, 1.0, largest / 2688.0)
        local = amax(weight, 16).float() / (overall * 6.0)
        local = torch.where(local == 0, 1.0, local).clamp(2.0**-9, 448.0)
        divisor = 1.0 / overall
    else:
        precision = weight.dtype if arithmetic is Arithmetic.COMPRESSED_TENSORS else torch.float32
        if arithmetic is Arithmetic.COMPRESSED_TENSORS:
            overall = ((1.0 / largest.to(precision).clamp(min=torch.finfo(precision).tiny)) * 2688.0).float()
        else:
            overall = torch.tensor(2688.0) / largest
        overall = divisor = torch.where(overall.isfinite(), overall, 1.0)
        local = (overall * (amax(weight, 16).to(precision) / torch.tensor(6.0, dtype=precision)).float()).clamp(
            max=448.0
        )
        local = torch.where(local.to(torch.float8_e4m3fn).float() == 0, 0.125, local)
    local = local.to(torch.float8_e4m3fn)
    if search is ScaleSearch.MSE:
        local = searched(weight, local, divisor)
    step = local.float() * overall if arithmetic is Arithmetic.MODELOPT else local.float() / overall
    codes = e2m1_codes(quotient(weight, step, Arithmetic.FLOAT32))
    return codes[:, 0::2] | codes[:, 1::2] << 4, local, overall


def searched(weight: torch.Tensor, local: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Return the candidates with the least error; what differs by less than 2^-19 counts as equal."""
    start = local.view(torch.uint8).int()
    size = weight.float().abs().unflatten(1, (-1, 16)) * divisor
    best, least = start, torch.full(start.shape, torch.iinfo(torch.int32).max, dtype=torch.int32)
    for offset in sorted(OFFSETS, key=lambda offset: offset & 15):
        code = (start + offset).clamp(1, 0x7E)
        scale = code.to(torch.uint8).view(torch.float8_e4m3fn).float()
        scaled = size * (1.0 / scale).unsqueeze(2)
        errors = (E2M1[(e2m1_codes(scaled) & 7).int()] - scaled).square()
        for half in (8, 4, 2, 1):
            errors = errors[..., :half] + errors[..., half:]
        error = errors[..., 0] if offset == 0 else errors[..., 0] * (1 + 2.0**-8) + 2.0**-16
        key = (error * scale * scale).view(torch.int32) >> 4
        best, least = torch.where(key < least, code, best), torch.minimum(key, least)
    return best.to(torch.uint8).view(torch.float8_e4m3fn)
