"""Compile every kernel of the runtime for GPUs that need not be there and say, as JSON, what came out.

    python -m tests.runtime.kernels.compiled_moe            prints it
    python -m tests.runtime.kernels.compiled_moe --write    writes it to compiled_moe.json, which tests compare with

A program, as the interpreter is not chosen here; two compile at a time. Machine code comes from triton's cache where it
was made before, from the same source.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import create_function_from_signature

from converters.config import Glm4MoeConfig, read_json
from runtime.kernels.launch import Launch
from runtime.kernels.moe.configs import BLACKWELL, HOPPER
from tests.runtime.kernels.moe_cases import product_launches
from tests.runtime.kernels.small_cases import small_launches

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WORKERS = 2
TABLE = Path(__file__).with_suffix(".json")
CONFIG = Path(__file__).parents[3] / "fixtures" / "configs" / "GLM-4.6.json"
# instructions of PTX by the class of machine instructions that they become
_WARP_GROUP = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\w+\.(\w+)")
_WARP_GROUP_CLASSES = {"bf16": "HGMMA", "f16": "HGMMA", "e4m3": "QGMMA", "s8": "IGMMA"}
_TENSOR_MEMORY = re.compile(r"tcgen05\.mma\.cta_group::\d\.kind::(\w+)")
_WARP = re.compile(r"mma\.sync\.aligned\.(?:row\.col\.)?m\d+n\d+k\d+\.(?:row\.col\.)?(?:satfinite\.)?\w+\.(\w+)")


def compiled(launch: Launch, capability: int) -> CompiledKernel:
    """Return what the launcher would compile for these arguments, on a GPU of a compute capability."""
    target = GPUTarget("cuda", capability, 32)
    backend, kernel = make_backend(target), launch.kernel
    options = {**launch.constants, **launch.options, "debug": False}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialized, chosen = bind(*launch.arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialized, chosen)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=parsed.__dict__)


def resources(cubin: bytes) -> dict[str, int]:
    """Return registers of a thread, and bytes that it keeps outside of them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (registers,) = map(int, re.findall(r"REG:(\d+)", usage))
    return {"registers": registers, "spilled_bytes": sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))}


def classes(ptx: str) -> list[str]:
    """Return the classes of matrix instructions in PTX; "" if there are none."""
    found = {_WARP_GROUP_CLASSES[kind] for kind in _WARP_GROUP.findall(ptx)}
    found |= {f"tcgen05 {kind}" for kind in _TENSOR_MEMORY.findall(ptx)}
    found |= {f"mma {kind}" for kind in _WARP.findall(ptx)}
    return sorted(found)


@cache
def launches(capability: int) -> dict[str, Callable[[], Launch]]:
    """Return what makes each launch, by name."""
    config = Glm4MoeConfig.from_hf(read_json(CONFIG))
    small = {name: lambda launch=launch: launch for name, launch in small_launches(config).items()}
    return product_launches(capability) | small


def facts(case: tuple[str, int]) -> dict[str, Any]:
    """Return what is tested of one launch on one compute capability."""
    name, capability = case
    made = compiled(launches(capability)[name](), capability)
    ptx = made.asm["ptx"]
    return {
        **resources(made.asm["cubin"]),
        "shared_bytes": made.metadata.shared,
        "instructions": " + ".join(classes(ptx)),
        "bulk_copies": "cp.async.bulk.tensor" in ptx,
        "fused": sorted(set(re.findall(r"\b(?:fma|mad)\.[\w.]*f32", ptx))),
    }


def compile_all() -> dict[str, Any]:
    """Return facts by launch and compute capability, and what made the machine code."""
    cases = [(name, capability) for capability in (HOPPER, BLACKWELL) for name in launches(capability)]
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as pool:
        found = pool.map(facts, cases)
        kernels = {f"{name} sm_{capability}": made for (name, capability), made in zip(cases, found, strict=True)}
    return {"triton": triton.__version__, "kernels": kernels}


def main() -> None:
    """Print what came out, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    is_written = parser.parse_args().write
    made = compile_all()
    if not is_written:
        json.dump(made, sys.stdout)
        return
    lines = [f"  {json.dumps(name)}: {json.dumps(kernel)}" for name, kernel in made["kernels"].items()]
    head = f'{{\n "triton": {json.dumps(made["triton"])},\n "kernels": {{\n'
    TABLE.write_text(head + ",\n".join(lines) + "\n }\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
