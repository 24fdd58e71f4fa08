"""What one MoE layer launches, moves and pads, by backend: counted operation by operation at real sizes, and computed.

    PYTHONPATH=. python benchmarks/moe_model.py            prints the tables of docs/moe-backends.md
    PYTHONPATH=. python benchmarks/moe_model.py --write    puts them there, and writes moe_model.json and moe_model.svg

Needs no GPU: tensors are on the meta device, which has sizes and no memory; only routings are drawn. Nothing is timed.
A test holds the document against what this makes.
"""

import argparse
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.measure import write_result
from benchmarks.moe_backends import rows
from benchmarks.moe_chart import roofline_svg
from benchmarks.tables import table
from runtime.moe.cost import H200, SHAPES, crossover_tokens, expected_blocks, floor, padding_factor
from runtime.moe.weights import ExpertScheme

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT, RESULTS = ROOT / "docs" / "moe-backends.md", ROOT / "benchmarks" / "results"
COUNTED_TOKENS, FLOOR_TOKENS = (1, 16, 256, 4096), (1, 4, 16, 64, 256, 1024, 4096, 16384)
SCHEMES = (ExpertScheme.BF16, ExpertScheme.FP8_BLOCK, ExpertScheme.INT8_CHANNEL, ExpertScheme.NVFP4)
BLOCKS = (16, 32, 64, 128)
_MARKED = "<!-- {0}: begin, made by benchmarks/moe_model.py -->\n{1}\n<!-- {0}: end -->"


@cache
def model() -> dict[str, Any]:
    """Return everything that the document and the JSON have."""
    floors = [
        {"shape": name, "tokens": num_tokens, "scheme": str(scheme), **asdict(cost),
         "floor_us": cost.floor_s(H200) * 1e6, "is_memory_bound": cost.is_memory_bound(H200)}
        for name, shape in SHAPES.items()
        for num_tokens in FLOOR_TOKENS
        for scheme in SCHEMES
        for cost in (floor(shape, scheme, num_tokens),)
    ]  # fmt: skip
    shape = SHAPES["GLM-4.6"]
    return {
        "is_measured": False,
        "device": asdict(H200),
        "floors": floors,
        "crossover_tokens": {
            name: {str(scheme): crossover_tokens(sizes, scheme, H200) for scheme in SCHEMES}
            for name, sizes in SHAPES.items()
        },
        "padding": {
            str(block_m): {str(m): padding_factor(shape, m, block_m) for m in FLOOR_TOKENS} for block_m in BLOCKS
        },
        "expected_blocks_of_16": {str(m): expected_blocks(shape, m, 16) for m in FLOOR_TOKENS},
        "backends": [asdict(row) for num_tokens in COUNTED_TOKENS for row in rows(shape, num_tokens)],
    }


def backends_table(found: dict[str, Any]) -> str:
    """Return backends by tokens."""
    head = (
        "tokens", "backend", "shared expert", "launches", "of them products", "host waits", "MB moved",
        "times the floor", "rows computed per useful row",
    )  # fmt: skip
    made = []
    for row in found["backends"]:
        times = row["num_bytes"] / row["floor_bytes"]
        cells = (row["launches"], row["products"], row["waits"], f"{row['num_bytes'] / 1e6:,.0f}", f"{times:.2f}")
        names = (str(row["tokens"]), f"`{row['backend']}`", row["shared_expert"])
        made.append((*names, *map(str, cells), f"{row['padding']:.2f}"))
    return table(head, made)


def floors_table(found: dict[str, Any]) -> str:
    """Return floors by shape, tokens and scheme."""
    made, keyed = [], {(row["shape"], row["tokens"], row["scheme"]): row for row in found["floors"]}
    for name in SHAPES:
        for num_tokens in FLOOR_TOKENS:
            cells = [_floor_cell(keyed[name, num_tokens, str(scheme)]) for scheme in SCHEMES]
            made.append((name, str(num_tokens), *cells))
    return table(("layer of", "tokens", *(f"`{scheme}`: MB, us" for scheme in SCHEMES)), made)


def _floor_cell(row: dict[str, Any]) -> str:
    bound = "" if row["is_memory_bound"] else ", computing"
    return f"{row['num_bytes'] / 1e6:,.0f}, {row['floor_us']:,.0f}{bound}"


def padding_table(found: dict[str, Any]) -> str:
    """Return rows computed per useful row by block and tokens."""
    made = [(block, *(f"{found['padding'][block][str(m)]:.2f}" for m in FLOOR_TOKENS)) for block in found["padding"]]
    return table(("rows of a block", *(f"{m} tokens" for m in FLOOR_TOKENS)), made)


def written(text: str) -> str:
    """Return the document with its tables made anew; it must have the marks of each once."""
    found = model()
    made = {"backends": backends_table(found), "floors": floors_table(found), "padding": padding_table(found)}
    for name, lines in made.items():
        marked = _MARKED.format(name, lines)
        begin, end = _MARKED.format(name, "\n").split("\n\n\n")
        text, times = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, m=marked: m, text, flags=re.S)
        if times != 1:
            raise ValueError(f"the marks of {name} are there {times} times")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, or write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if not parser.parse_args(arguments).write:
        print("\n\n".join((backends_table(model()), floors_table(model()), padding_table(model()))))
        return
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    write_result(RESULTS / "moe_model.json", json.loads(json.dumps(model())))
    (RESULTS / "moe_model.svg").write_text(roofline_svg(SHAPES["GLM-4.6"], H200), encoding="utf-8")


if __name__ == "__main__":
    main()
