"""What each scheme and format costs in quality: the trained fixture, quantized and held against itself.

    PYTHONPATH=. python benchmarks/quality.py SCRATCH [--num-tokens N] [--only NAME...] [--resume]

Everything goes through the command line: `calibrate` on text of the training (the standard library of this
interpreter, without the held-out modules), `quantize`, and `verify --json` on the held-out text twice: with activations
as they are, so that weights alone count, and with activations rounded as serving engines do it. The KV cache is that of
the model in both. The fixture's experts are 64 wide, half a block: `fp8-block` of all weights is measured on the same
model with experts that zeros bring to 128, which changes neither what it computes nor a code or scale of a block.

Writes benchmarks/results/quality.json, of which benchmarks/tables.py makes the table of README.md.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.measure import environment, write_result
from converters.checkpoint.dtypes import torch_dtype
from converters.checkpoint.writer import write_file
from converters.config import CONFIG_FILE, Glm4MoeConfig, read_json
from converters.formats.inputs import AS_SERVED, FULL
from converters.quant.engines import engines_of
from converters.quant.policy import parse_schemes
from converters.quant.scheme import Format, Recipe
from converters.schema import expand
from converters.source import open_source
from fixtures.recipe.corpus import read_modules
from runtime.model.activations import input_quantizers
from runtime.verify.check import judge, worst
from runtime.verify.limits import Overrides, choose_limits

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "quality.json"
TINY = ROOT / "fixtures" / "tiny"
HELD_OUT = ROOT / "fixtures" / "tiny_heldout.txt"
GLM4MOE = (sys.executable, "-m", "glm4moe_cli")
BLOCK_COLUMNS = 128
BLOCK = "attention=fp8-block,dense=fp8-block"
DONE = "rows.json"
PADDED = "fp8-block, experts padded"
MIXED = "experts=nvfp4-weight-only,attention=fp8"
MIXED_ALL = "experts=nvfp4,shared-experts=fp8,dense=fp8,attention=fp8"


@dataclass(frozen=True)
class Row:
    """A quantization: its name in the table, its options, and which statistics it takes: none, of rtn, of gptq.

    `is_padded`: of the fixture with experts that are a block wide.
    """

    name: str
    options: tuple[str, ...]
    stats: str | None = None
    format: str = "compressed-tensors"
    is_padded: bool = False


def rows() -> list[Row]:
    """Return what is measured, in the order of the table."""
    plain, mse, experts = ("--scale-search", "none"), ("--scale-search", "mse"), ("--preset", "experts-only")
    gptq = ("--method", "gptq")
    found = [
        Row("fp8", ("--scheme", "fp8")),
        Row("fp8, experts only", ("--scheme", "fp8", *experts)),
        Row("fp8-block, attention and dense only", ("--scheme", BLOCK)),
        Row(PADDED, ("--scheme", "fp8-block"), is_padded=True),
        Row("fp8-static", ("--scheme", "fp8-static"), "rtn"),
        Row("int8", ("--scheme", "int8")),
        *(
            Row(f"int8-weight-only, {group}", ("--scheme", "int8-weight-only", "--group-size", group))
            for group in ("channel", "64", "32")
        ),
        Row("int8-weight-only, gptq", ("--scheme", "int8-weight-only", *gptq), "gptq"),
        *(
            Row(f"{scheme}, {how}", ("--scheme", scheme, *options), "rtn" if scheme == "nvfp4" else None)
            for scheme in ("nvfp4", "nvfp4-weight-only")
            for how, options in (("min-max", plain), ("mse", mse))
        ),
        *(
            Row(f"{scheme}, {how}, gptq", ("--scheme", scheme, *options, *gptq), "gptq")
            for scheme in ("nvfp4", "nvfp4-weight-only")
            for how, options in (("min-max", plain), ("mse", mse))
        ),
        Row("nvfp4, experts only, mse", ("--scheme", "nvfp4", *experts, *mse), "rtn"),
        Row("nvfp4-weight-only, experts only, mse", ("--scheme", "nvfp4-weight-only", *experts, *mse)),
        Row(f"{MIXED}, mse", ("--scheme", MIXED, *mse)),
        Row(f"{MIXED_ALL}, mse", ("--scheme", MIXED_ALL, *mse), "rtn"),
        Row("fp8-block, attention and dense only", ("--scheme", BLOCK), None, "deepseek"),
    ]
    found += [
        Row(PADDED, ("--scheme", "fp8-block"), None, "deepseek", is_padded=True),
        Row(PADDED, ("--scheme", "fp8-block"), None, "modelopt", is_padded=True),
        Row("fp8-block, attention and dense only", ("--scheme", BLOCK), None, "modelopt"),
        Row("fp8", ("--scheme", "fp8"), None, "modelopt"),
        Row("fp8-static", ("--scheme", "fp8-static"), "rtn", "modelopt"),
        Row("nvfp4, min-max", ("--scheme", "nvfp4", *plain), "rtn", "modelopt"),
        Row("nvfp4, mse", ("--scheme", "nvfp4", *mse), "rtn", "modelopt"),
        Row("nvfp4-weight-only, min-max", ("--scheme", "nvfp4-weight-only", *plain), None, "modelopt"),
    ]
    return found


def run(*arguments: str | Path, accept: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run a command of ours with --json and return its document."""
    done = subprocess.run([*GLM4MOE, *map(str, arguments), "--json"], capture_output=True, text=True, check=False)
    if done.returncode not in accept:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def statistics(scratch: Path) -> dict[str, tuple[str, ...]]:
    """Return the options that hand over each kind of statistics, made on text of the training."""
    text = scratch / "train.txt"
    text.write_text("\n".join(read_modules()[0].values()), encoding="utf-8")
    run("calibrate", TINY, scratch / "rtn.stats.json", "--text", text)
    return {"rtn": ("--stats", str(scratch / "rtn.stats.json")), "gptq": ("--calibrate", str(text))}


def padded(folder: Path) -> Path:
    """Write the fixture with experts of BLOCK_COLUMNS, what is new being zeros, and return the folder."""
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    raw = read_json(TINY / CONFIG_FILE) | {"moe_intermediate_size": BLOCK_COLUMNS}
    (folder / CONFIG_FILE).write_text(json.dumps(raw))
    with open_source(TINY) as source:
        wide = expand(Glm4MoeConfig.from_hf(raw), mtp=source.schema.has_mtp, mtp_copies=source.schema.has_mtp_copies)
        tensors = {}
        for name, tensor in wide.tensors.items():
            tensors[name] = torch.zeros(tensor.shape, dtype=torch_dtype(source.reader.entry(name).dtype))
            value = source.reader.read(name)
            tensors[name][tuple(map(slice, value.shape))] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def stored_bits(folder: Path) -> float:
    """Return the bits that a quantized weight takes, its scales included."""
    with open_source(folder) as source:
        modules = {
            name.rpartition(".")[0]: source.schema.tensors[name].numel
            for name, stored in source.weights.items()
            if not stored.format.is_plain
        }
        entries = (source.reader.entry(name) for name in source.reader.names if not name.endswith("bias"))
        num_bytes = sum(entry.nbytes for entry in entries if entry.name.rpartition(".")[0] in modules)
    return 8 * num_bytes / sum(modules.values())


def weight_bytes(folder: Path) -> int:
    """Return the size of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def inputs_of(folder: Path) -> str | None:
    """Return what engines do to the inputs of quantized layers; None: nothing."""
    with open_source(folder) as source:
        labels = dict.fromkeys(quantizer.scheme.label for quantizer in input_quantizers(source).values())
    return "; ".join(labels) or None


def engines(row: Row) -> list[str]:
    """Return the engines that load the result."""
    schemes = parse_schemes(dict(zip(row.options[::2], row.options[1::2], strict=True))["--scheme"], None)
    recipes = [Recipe(scheme, Format(row.format)) for scheme in dict.fromkeys(schemes.values())]
    return list(engines_of(recipes, schemes))


def judged(folder: Path, source: Path, activations: str, num_tokens: int | None) -> dict[str, Any]:
    """Return what verify finds beside the source; the levels that run no model are the same for all activations."""
    size = () if num_tokens is None else ("--num-tokens", str(num_tokens))
    how = ("--against", source, "--text", HELD_OUT, "--level", "logits", "--activations", activations, *size)
    report = run("verify", folder, *how, accept=(0, 3))["result"]
    summary = report["logits"]["summary"]
    kl, perplexity, top1 = summary["kl_nats"]["estimate"], summary["perplexity"], summary["top1"]
    found = {
        "protocol": report["run"]["protocol"],
        "profile": report["scheme"],
        "verdict": report["verdict"],
        "reasons": report["reasons"],
        "kl_nats": {"mean": kl["mean"], "se": kl["se_block"]},
        "perplexity_ratio": {"mean": perplexity["ratio"], "se": perplexity["ratio_se"]},
        "top1": {"mean": top1["mean"], "se": top1["se_block"]},
    }
    if activations == FULL:
        files = run("verify", folder, "--against", source, "--level", "standard", accept=(0, 3))["result"]
        if files["verdict"] != "pass":
            found |= {"verdict": files["verdict"], "reasons": [*files["reasons"], *found["reasons"]]}
        coded = [scheme for scheme in files["weights"]["schemes"] if scheme["scheme"] != "plain"]
        errors = sum(scheme["mean_relative_error"] * scheme["tensors"] for scheme in coded)
        found["relative_error"] = errors / sum(scheme["tensors"] for scheme in coded)
    return found


def measured(row: Row, scratch: Path, stats: dict[str, tuple[str, ...]], num_tokens: int | None) -> dict[str, Any]:
    """Quantize, verify, and return a row of the result."""
    folder = scratch / "out"
    shutil.rmtree(folder, ignore_errors=True)
    for path in scratch.glob("out.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    options = (*row.options, "--format", row.format)
    source = scratch / "padded" if row.is_padded else TINY
    run("quantize", source, folder, *options, *(stats[row.stats] if row.stats else ()))
    inputs = inputs_of(folder)
    return {
        "name": row.name,
        "format": row.format,
        "options": list(options),
        "calibrated": row.stats is not None,
        "bytes": weight_bytes(folder),
        "source_bytes": weight_bytes(source),
        "bits_per_quantized_weight": stored_bits(folder),
        "inputs": inputs,
        "engines": engines(row),
        "weights_alone": judged(folder, source, FULL, num_tokens),
        "as_served": judged(folder, source, AS_SERVED, num_tokens) if inputs else None,
    }


def begin(scratch: Path, *, resume: bool) -> list[dict[str, Any]]:
    """Lay down what is measured on and return the rows that an earlier run has finished; none unless it is resumed."""
    if not resume:
        shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(scratch / "padded", ignore_errors=True)
    padded(scratch / "padded")
    path = scratch / DONE
    return json.loads(path.read_text()) if path.exists() else []


def verdict_as_served(found: dict[str, Any]) -> str:
    """Return what the logits limits of today make of measured figures, the floor aside, which only widens them."""
    limits = choose_limits(found["profile"], Overrides(), activations=AS_SERVED)
    return worst(
        [
            judge(found["kl_nats"]["mean"], limits.max_kl, se=found["kl_nats"]["se"]),
            judge(found["top1"]["mean"], limits.min_top1, at_least=True, se=found["top1"]["se"]),
            judge(found["perplexity_ratio"]["mean"], limits.max_ppl_ratio, se=found["perplexity_ratio"]["se"]),
        ]
    )


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--num-tokens", type=int)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows with these names, the others as they were")
    parser.add_argument("--resume", action="store_true", help="go on with what a run that was cut off left in SCRATCH")
    args = parser.parse_args()
    done, before = begin(args.scratch, resume=args.resume), []
    if args.only:
        before = json.loads(RESULT.read_text())["rows"]
    known = {(row["name"], row["format"]): row for row in (*before, *done)}
    kept = {(row["name"], row["format"]) for row in done}
    stats, refused = statistics(args.scratch), {}
    for row in rows():
        key = (row.name, row.format)
        if key in kept or (args.only and row.name not in args.only):
            continue
        try:
            known[key] = measured(row, args.scratch, stats, args.num_tokens)
            done.append(known[key])
            write_file(args.scratch / DONE, json.dumps(done).encode())
            print(key, known[key]["weights_alone"]["kl_nats"], flush=True)
        except RuntimeError as error:
            refused[" as ".join(key)] = str(error)
            print(key, error, flush=True)
    write_result(
        RESULT,
        {
            "environment": environment(),
            "source": {"bytes": weight_bytes(TINY)},
            "held_out_sha256": hashlib.sha256(HELD_OUT.read_bytes()).hexdigest(),
            "calibration": "glm4moe calibrate with its defaults, on the training text",
            "rows": [known[row.name, row.format] for row in rows() if (row.name, row.format) in known],
            "refused": refused,
        },
    )


if __name__ == "__main__":
    main()
