"""Compile every kernel for GPUs that need not be there and say, as JSON, what came out; run as a program.

As the interpreter is not chosen here, it takes a process of its own.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)
from runtime.kernels.launch import Launch
from runtime.kernels.quantize import prepare

CAPABILITIES = (90, 100)
POINTERS = {torch.int16: "*i16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}
FLOAT32, COMPRESSED_TENSORS, MODELOPT = Arithmetic
TRANSFORMS = {
    "fp8": (QuantizeFp8Channel(FLOAT32), torch.bfloat16),
    "fp8 fp16": (QuantizeFp8Channel(COMPRESSED_TENSORS), torch.float16),
    "fp8 tensor": (QuantizeFp8Tensor(MODELOPT), torch.bfloat16),
    "fp8 block": (QuantizeFp8Block(FLOAT32), torch.bfloat16),
    "fp8 inverse block": (QuantizeFp8Block(FLOAT32, inverse=True), torch.float32),
    "int8": (QuantizeInt8(COMPRESSED_TENSORS), torch.bfloat16),
    "packed": (QuantizeInt8Packed(FLOAT32, 128), torch.bfloat16),
    "nvfp4": (QuantizeNvfp4(COMPRESSED_TENSORS), torch.bfloat16),
    "nvfp4 mse": (QuantizeNvfp4(MODELOPT, ScaleSearch.MSE), torch.bfloat16),
}
COLUMNS = 5120


def signature(launch: Launch) -> tuple[dict[str, str], dict[tuple[int], Any]]:
    """Return the types of a kernel's parameters, and that its pointers are aligned, as the launcher would find them."""
    types, aligned = {}, {}
    for number, (name, value) in enumerate(zip(launch.kernel.arg_names, launch.arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            types[name] = POINTERS[value.dtype]
            aligned[number,] = [["tt.divisibility", 16]]
        else:
            types[name] = "fp32" if isinstance(value, float) else "i32"
    return types | dict.fromkeys(launch.constants, "constexpr"), aligned


def stack_bytes(cubin: bytes) -> int:
    """Return what a thread keeps outside of its registers."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))


def facts(compiled: CompiledKernel) -> dict[str, Any]:
    """Return what is tested: size of the machine code, fp32 instructions, what spills."""
    operations = set(re.findall(r"^\s*(?:@\S+ )?(\w+\.[\w.]*f32\S*)", compiled.asm["ptx"], re.MULTILINE))
    cubin = compiled.asm["cubin"]
    return {"cubin_bytes": len(cubin), "operations": sorted(operations), "stack_bytes": stack_bytes(cubin)}


def compile_all() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what came out, by transform and compute capability."""
    for name, (transform, dtype) in TRANSFORMS.items():
        launch = prepare(transform, torch.zeros(128, COLUMNS, dtype=dtype), torch.ones(1, 1))
        assert launch is not None, name
        types, aligned = signature(launch)
        source = ASTSource(launch.kernel, types, launch.constants, aligned)
        for capability in CAPABILITIES:
            target = GPUTarget("cuda", capability, 32)
            yield f"{name} sm_{capability}", facts(triton.compile(source, target=target, options=launch.options))


if __name__ == "__main__":
    json.dump(dict(compile_all()), sys.stdout)
