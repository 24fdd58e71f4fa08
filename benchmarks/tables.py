"""The tables of README.md that hold measured figures, made from benchmarks/results/*.json alone.

    PYTHONPATH=. python benchmarks/tables.py            prints them
    PYTHONPATH=. python benchmarks/tables.py --write    puts them into README.md, between their marks

A test holds README.md against them, so that a figure there is one that was measured.
"""

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
# rows of quality.json whose options quantize.json has the speed of, in the default format
SPEED_OF = {
    "fp8": "fp8",
    "fp8-block, attention and dense only": "fp8-block",
    "int8": "int8",
    "int8-weight-only, channel": "int8-weight-only",
    "nvfp4-weight-only, min-max": "nvfp4-weight-only",
    "nvfp4-weight-only, mse": "nvfp4-weight-only, mse",
}
SPEED_FORMAT = "compressed-tensors"
# what a row stands for where its options alone do not say it
REMARKS = {
    "fp8-block, attention and dense only": "experts, 64 wide, stay bf16",
    "fp8-block, experts padded": "experts padded from 64 to 128 by zeros",
}
SPEED_NAMES = {
    "fp8-block": "`fp8-block`, all but dense layers",
    "nvfp4-weight-only": "`nvfp4-weight-only --scale-search none`",
    "nvfp4-weight-only, mse": "`nvfp4-weight-only --scale-search mse`",
}
NO_PEER = {
    "fp8-block": "they stop at the dense layers",
    "int8-weight-only": "they stop at the dense layers",
    "nvfp4-weight-only, mse": "they have no such search here",
}
_MARKED = "<!-- {0}: begin, made by benchmarks/tables.py -->\n{1}\n<!-- {0}: end -->"


def load(name: str) -> dict[str, Any]:
    """Return a committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def with_error(found: dict[str, float]) -> str:
    """Return a mean with its standard error."""
    return f"{found['mean']:.4f} ± {found['se']:.4f}"


def scheme_cell(row: dict[str, Any]) -> str:
    """Return the options of a row as they are typed after --scheme, without the format."""
    pairs = dict(zip(row["options"][::2], row["options"][1::2], strict=True))
    typed = " ".join([pairs.pop("--scheme"), *(f"{key} {pairs[key]}" for key in pairs if key != "--format")])
    remark = REMARKS.get(row["name"])
    return f"`{typed}`" + (f"; {remark}" if remark else "")


def seconds_per_gb(speed: dict[str, Any], run: str) -> float:
    """Return the median seconds for a GB of bf16 source, start of the program included."""
    return speed["runs"][run]["wall_s"]["median"] / (speed["source_bytes"] / 1e9)


def speed_cells(speed: dict[str, Any], row: dict[str, Any]) -> tuple[str, str]:
    """Return seconds per GB and how many times faster than llm-compressor that is, as far as they were measured."""
    name = SPEED_OF.get(row["name"])
    if name is None or row["format"] != SPEED_FORMAT:
        return "", ""
    faster = speed["ratios"][name].get("times_faster")
    return f"{seconds_per_gb(speed, name):.1f}", "" if faster is None else f"{faster:.1f}"


def quality_table(quality: dict[str, Any], speed: dict[str, Any]) -> str:
    """Return scheme by format by what it takes, what it costs, who loads it and how long it takes to make."""
    head = (
        "scheme", "format", "size", "bits per weight", "weight error", "KL, weights alone", "KL as served",
        "perplexity ratio as served", "`verify`", "loaded by", "seconds per GB", "times llm-compressor",
    )  # fmt: skip
    rows = []
    for row in quality["rows"]:
        alone, served = row["weights_alone"], row["as_served"]
        share = row["bytes"] / row.get("source_bytes", quality["source"]["bytes"])
        rows.append(
            (
                scheme_cell(row),
                row["format"],
                f"{row['bytes'] / 1e6:.2f} MB, {share:.0%}",
                f"{row['bits_per_quantized_weight']:.2f}",
                f"{alone['relative_error']:.4f}",
                with_error(alone["kl_nats"]),
                with_error(served["kl_nats"]) if served else "the same",
                with_error((served or alone)["perplexity_ratio"]),
                alone["verdict"] + (f", {served['verdict']}" if served else ""),
                ", ".join(row["engines"]) or "none known",
                *speed_cells(speed, row),
            )
        )
    return table(head, rows)


def speed_table(speed: dict[str, Any]) -> str:
    """Return quantize beside llm-compressor."""
    head = (
        "scheme", "times faster", "times less CPU", "times less memory", "seconds per GB, ours and theirs",
        "over the floor", "source MB per CPU-second",
    )  # fmt: skip
    rows = []
    for name, ratios in speed["ratios"].items():
        has_peer = "times_faster" in ratios
        keys = ("times_faster", "times_less_cpu", "times_less_memory")
        beside = [f"{ratios[key]:.1f}" for key in keys] if has_peer else [NO_PEER[name], "", ""]
        theirs = f" and {seconds_per_gb(speed, f'{name}: llm-compressor'):.1f}" if has_peer else ""
        rows.append(
            (
                SPEED_NAMES.get(name, f"`{name}`"),
                *beside,
                f"{seconds_per_gb(speed, name):.1f}{theirs}",
                f"{ratios['wall_over_floor']:.1f}",
                f"{speed['runs'][name]['source_mb_per_cpu_s']:.0f}",
            )
        )
    return table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "quality": lambda: quality_table(load("quality"), load("quantize")),
    "speed": lambda: speed_table(load("quantize")),
}


def marked(name: str) -> str:
    """Return a table between its marks, as it stands in README.md."""
    return _MARKED.format(name, TABLES[name]())


def written(text: str) -> str:
    """Return a text with its tables made anew; it must have the marks of each once."""
    for name in TABLES:
        begin, end = _MARKED.format(name, "\n").split("\n\n\n")
        text, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _, n=name: marked(n), text, flags=re.S)
        if count != 1:
            raise ValueError(f"the marks of {name} are there {count} times")
    return text


def main() -> None:
    """Print the tables, or put them into README.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
        return
    print("\n\n".join(marked(name) for name in TABLES))


if __name__ == "__main__":
    main()
