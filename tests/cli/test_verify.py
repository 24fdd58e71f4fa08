"""`glm4moe verify`: exit codes, exact words, one JSON document; and the real thing on the trained fixture."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_tensors, read_tensors, small_config, write_checkpoint
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from converters.config import Glm4MoeConfig
from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import Role, expand
from converters.source import open_source
from tests.cli.conftest import Ended

ROOT = Path(__file__).parents[2]
Program = Callable[..., Ended]
CONFIG = small_config(vocab_size=256)
SCHEMA = expand(Glm4MoeConfig.from_hf(CONFIG))
UP = SCHEMA.tensor(Role.EXPERT, "up_proj.weight", 1, 2).name
COUNT = len(SCHEMA.tensors)


def write(folder: Path, change: Callable[[dict[str, torch.Tensor]], object] = len) -> Path:
    tensors = random_tensors(SCHEMA)
    change(tensors)
    write_checkpoint(folder, tensors, CONFIG)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: rank for rank, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return write(tmp_path / "copy")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    return path


def double(tensors: dict[str, torch.Tensor]) -> None:
    for tensor in SCHEMA.tensors.values():
        if tensor.spec.role is Role.HEAD:
            tensors[tensor.name] = tensors[tensor.name] * 2


def test_structure_of_a_copy_passes(program: Program, source: Path, copy: Path) -> None:
    assert program("verify", str(copy), "--against", str(source), "--level", "structure") == Ended(
        0,
        f"PASS: identity: {COUNT} source tensors: {COUNT} same; MTP layer present; "
        "not checked: bytes of the files, weights element by element, layers and routers, logits, outputs of the MTP "
        "layer, generated text, serving engines\n"
        "metric\treference\tcandidate\tvalue\t95 % interval\tfloor\tthreshold\tverdict\n"
        "structure\t\t\t0 findings\t\t\t0\tpass\n",
        "",
    )


def test_missing_tensor_fails_with_exit_code_3(program: Program, source: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", lambda tensors: tensors.pop(UP))
    finding = f"candidate: tensor {UP}: expected BF16 or F16 or F32 [24, 48], found nothing"
    ended = program("verify", str(broken), "--against", str(source), "--level", "structure")
    assert ended.exit_code == 3
    assert ended.stdout.splitlines()[0].startswith(f"FAIL: identity: {UP}: ")
    assert f"; {finding}; {COUNT} source tensors" in ended.stdout.splitlines()[0]
    assert "fail\tcandidate: tensor " + UP in ended.stdout
    assert ended.stderr == f"Error: {broken} is not what {source} was: found {finding}\n"


def test_json_is_one_document_that_says_why(program: Program, source: Path, tmp_path: Path) -> None:
    broken = write(tmp_path / "broken", lambda tensors: tensors.pop(UP))
    ended = program("verify", str(broken), "--against", str(source), "--json")
    document = json.loads(ended.stdout)
    assert (ended.exit_code, document["exit_code"], document["ok"]) == (3, 3, False)
    assert document["errors"][0]["code"] == "verification-failed"
    result = document["result"]
    assert (result["verdict"], result["scheme"], result["logits"]) == ("fail", "identity", None)
    assert result["structure"]["outcomes"] == {"same": COUNT - 1, "missing": 1}
    (finding,) = result["structure"]["findings"]
    assert finding["subject"] == f"candidate: tensor {UP}"


def test_logits_of_a_copy_are_equal(program: Program, source: Path, copy: Path, text: Path) -> None:
    call = ("verify", str(copy), "--against", str(source), "--text", str(text))
    ended = program(*call, "--context-length", "64", "--json")
    assert ended.exit_code == 0
    document = json.loads(ended.stdout)
    result = document["result"]
    logits = result["logits"]["summary"]
    assert result["verdict"] == "pass"
    assert logits["kl_nats"]["max"] == 0.0
    assert (logits["num_tokens"], logits["num_windows"]) == (177, 3)
    assert result["limits"]["max_kl"] == {"warn": 0.0, "fail": 0.0, "floors": None}
    assert [row["attention"]["relative"] for row in result["layers"]] == [0.0] * 4
    assert [row["router"] and row["router"]["overlap"] for row in result["layers"]] == [None, 1.0, 1.0, 1.0]
    assert result["layers"][3]["is_mtp"]
    assert result["floor"]["kl_mean"] > 0
    assert result["provenance"]["plan"]["peak_bytes"] > 0
    assert document["bytes"].keys() == {"weights", "models"}
    assert document["bytes"]["models"] == result["provenance"]["plan"]["read_bytes"]


def test_tables_for_people_hold_metrics_routing_and_protocol(
    program: Program, source: Path, copy: Path, text: Path
) -> None:
    ended = program(
        "verify",
        str(copy),
        "--against",
        str(source),
        "--level",
        "logits",
        "--text",
        str(text),
        "--context-length",
        "64",
        "--num-tokens",
        "100",
        "--stride",
        "32",
    )
    lines = ended.stdout.splitlines()
    assert ended.exit_code == 0
    protocol = "first 100 of 180 tokens, no prefix tokens, 3 windows of at most 64, stride 32; "
    plan = ended.stderr.splitlines()
    assert plan[0].startswith(f"tokens: {protocol}")
    assert plan[2].startswith("memory: ")
    assert lines[0].startswith("PASS: identity: KL 0 +- 0 nats (floor ")
    assert "top-1 100.00%, PPL ratio 1.00000 +- 0 over 99 tokens; MTP KL 0, acceptance " in lines[0]
    (row,) = (line.split("\t") for line in lines if line.startswith("KL mean"))
    assert (row[3], row[4], row[6], row[7]) == ("0 +- 0 (naive 0) nats", "0 to 0", "<= 0", "pass")
    assert lines[-2].startswith(f"tokens\t{protocol}")


def test_other_logits_fail_and_name_the_limits(program: Program, source: Path, tmp_path: Path, text: Path) -> None:
    changed = write(tmp_path / "changed", double)
    ended = program("verify", str(changed), "--against", str(source), "--level", "logits", "--text", str(text))
    assert ended.exit_code == 3
    assert ended.stdout.startswith("FAIL: identity: KL mean ")
    assert ended.stderr.splitlines()[-1].startswith(f"Error: {changed} is not what {source} was: found KL mean ")


def test_overrides_move_the_bar_both_ways(program: Program, source: Path, tmp_path: Path, text: Path) -> None:
    changed = write(tmp_path / "changed", double)
    call = ("verify", str(changed), "--against", str(source), "--level", "logits", "--text", str(text), "--quiet")
    lenient = ("--max-kl", "100", "--min-top1", "0", "--max-ppl-ratio", "100")
    assert program(*call, *lenient).exit_code == 0
    assert program(*call, *lenient, "--max-kl", "0").exit_code == 3


def test_warning_passes_unless_strict(program: Program, source: Path, copy: Path) -> None:
    (copy / "LICENSE").unlink()
    call = ("verify", str(copy), "--against", str(source), "--level", "structure")
    ended = program(*call)
    assert ended.exit_code == 0
    reason = "candidate: LICENSE: expected as in the source, found no such file"
    assert ended.stdout.startswith(f"WARN: identity: {reason}; ")
    assert ended.stderr == f"Warning: {reason}\n"
    assert program(*call, "--strict").exit_code == 3


def test_wrong_structure_keeps_the_models_from_being_loaded(
    program: Program, source: Path, tmp_path: Path, text: Path
) -> None:
    broken = write(tmp_path / "broken", lambda tensors: tensors.pop(UP))
    ended = program("verify", str(broken), "--against", str(source), "--text", str(text), "--json")
    document = json.loads(ended.stdout)
    assert ended.exit_code == 3
    assert document["warnings"] == ["The structure is wrong; bytes, weights, layers, logits were not compared."]
    assert "logits" in document["result"]["not_checked"]


def test_wrong_structure_keeps_weights_from_being_compared(program: Program, source: Path, tmp_path: Path) -> None:
    other = small_config(vocab_size=256, moe_intermediate_size=32)
    broken = write_checkpoint(tmp_path / "b", random_tensors(expand(Glm4MoeConfig.from_hf(other))), other)
    ended = program("verify", str(broken), "--against", str(source), "--level", "weights")
    assert ended.exit_code == 3
    assert "Warning: The structure is wrong; weights were not compared.\n" in ended.stderr


def test_notes_of_loaded_models_are_warnings(program: Program, source: Path, copy: Path, text: Path) -> None:
    (copy / "modeling.py").write_text("raise SystemExit\n")
    call = ("verify", str(copy), "--against", str(source), "--level", "logits", "--text", str(text))
    ended = program(*call)
    assert ended.exit_code == 0
    note = "candidate: The checkpoint brings code (modeling.py); it is neither run nor copied."
    assert f"Warning: {note}\n" in ended.stderr


def test_quiet_leaves_the_verdict(program: Program, source: Path, copy: Path) -> None:
    ended = program("verify", str(copy), "--against", str(source), "--quiet")
    assert ended.stdout.startswith("PASS: ")
    assert len(ended.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    "option",
    [
        ("--num-tokens", "10"),
        ("--context-length", "512"),
        ("--stride", "2"),
        ("--seed", "0"),
        ("--max-kl", "1"),
        ("--min-top1", "0.5"),
        ("--max-ppl-ratio", "2"),
        ("--max-layer-error", "2"),
        ("--no-floor",),
        ("--deterministic",),
        ("--device", "cpu"),
    ],
)
def test_option_of_levels_that_run_models_is_refused_without_them(
    program: Program, source: Path, copy: Path, option: tuple[str, ...]
) -> None:
    for level in ((), ("--level", "weights")):
        ended = program("verify", str(copy), "--against", str(source), *level, *option)
        assert (ended.exit_code, ended.stdout) == (2, "")
        name = option[0]
        assert ended.stderr.startswith(f"Error: {name}: expected --level ")
        found = "--level weights" if level else "no --text, and so no logits"
        assert ended.stderr.endswith(f" or all, found {found}. It would be ignored.\n")


def test_text_is_refused_at_the_structure_level(program: Program, source: Path, copy: Path, text: Path) -> None:
    ended = program("verify", str(copy), "--against", str(source), "--level", "structure", "--text", str(text))
    assert ended.exit_code == 2
    assert ended.stderr.startswith(
        "Error: --text: expected --level layers or logits or runtime or all, found --level structure."
    )


def test_models_without_a_text_run_on_the_built_in_corpus(program: Program, source: Path, copy: Path) -> None:
    call = ("verify", str(copy), "--against", str(source), "--level", "layers", "--num-tokens", "40", "--json")
    result = json.loads(program(*call).stdout)["result"]
    assert result["verdict"] == "pass"
    assert "built-in corpus" in result["run"]["protocol"]
    assert (len(result["layers"]), result["logits"]) == (4, None)


def test_two_kinds_of_tokens_are_refused(program: Program, source: Path, copy: Path, text: Path) -> None:
    call = ("verify", str(copy), "--against", str(source), "--text", str(text), "--tokens", str(text))
    assert program(*call) == Ended(2, "", "Error: --tokens: expected no --text beside it, found both\n")


def test_tokens_are_run_as_they_are(program: Program, source: Path, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[[1, 2, 3, 4], [5, 6, 7]]")
    call = ("verify", str(copy), "--against", str(source), "--tokens", str(tmp_path / "ids.json"), "--json")
    result = json.loads(program(*call).stdout)["result"]
    assert (result["verdict"], result["logits"]["num_scored"]) == ("pass", 5)


def test_layer_limit_is_the_users(program: Program, source: Path, tmp_path: Path, text: Path) -> None:
    changed = write(tmp_path / "changed", lambda tensors: tensors.update({f"{UP}": tensors[UP] * 1.5}))
    call = ("verify", str(changed), "--against", str(source), "--level", "layers", "--text", str(text), "--json")
    ended = program(*call, "--num-tokens", "64")
    result = json.loads(ended.stdout)["result"]
    assert (ended.exit_code, result["first_divergence"]["layer"]) == (3, 1)
    assert any(reason.startswith("layer 1 expert 2: relative error ") for reason in result["reasons"])
    lenient = json.loads(program(*call, "--num-tokens", "64", "--max-layer-error", "10").stdout)["result"]
    checks = {check["metric"]: check["verdict"] for check in lenient["checks"]}
    assert checks["MLP and MoE error, worst layer"] == "pass"


@pytest.mark.parametrize(
    ("level", "levels"),
    [
        ("quick", ["structure"]),
        ("standard", ["structure", "weights"]),
        ("full", ["structure", "weights", "layers", "logits"]),
    ],
)
def test_groups_run_their_levels(program: Program, source: Path, copy: Path, level: str, levels: list[str]) -> None:
    models = ("--num-tokens", "40") if level == "full" else ()
    call = ("verify", str(copy), "--against", str(source), "--level", level, *models, "--json")
    result = json.loads(program(*call).stdout)["result"]
    assert [name for name in ("structure", "weights", "layers", "logits") if result[name] is not None] == levels
    assert result["bytes"]["record"] == ""


@pytest.mark.parametrize("level", ["release", "runtime"])
def test_an_engine_is_asked_for_where_there_must_be_one(program: Program, source: Path, copy: Path, level: str) -> None:
    ended = program("verify", str(copy), "--against", str(source), "--level", level)
    assert ended.exit_code == 2
    assert ended.stderr.startswith(f"Error: --level {level}: expected --engine-logprobs FILE|URL beside it")


def test_text_that_is_not_utf8_is_refused(program: Program, source: Path, copy: Path, text: Path) -> None:
    text.write_bytes(b"abc\xff")
    assert program("verify", str(copy), "--against", str(source), "--text", str(text)) == Ended(
        2, "", f"Error: --text {text}: expected valid UTF-8, found invalid start byte at byte 3\n"
    )


def test_empty_text_is_refused(program: Program, source: Path, copy: Path, text: Path) -> None:
    text.write_text("")
    assert program("verify", str(copy), "--against", str(source), "--text", str(text)) == Ended(
        2,
        "",
        "Error: --text: expected at least 2 tokens, found 0. "
        "Give a longer text; a few thousand tokens make a useful measurement.\n",
    )


@pytest.mark.parametrize("level", [(), ("--level", "weights")])
def test_a_source_is_required(program: Program, copy: Path, level: tuple[str, ...]) -> None:
    ended = program("verify", str(copy), *level)
    assert ended.exit_code == 2
    assert ended.stderr.startswith("Error: --against: expected SRC, ")


def test_reference_stands_for_the_source(
    program: Program, source: Path, copy: Path, tmp_path: Path, text: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    saved = program("verify", str(source), "--save-reference", str(kept), "--text", str(text), "--num-tokens", "64")
    assert (saved.exit_code, kept.is_file()) == (0, True)
    ended = program("verify", str(copy), "--reference", str(kept), "--json")
    result = json.loads(ended.stdout)["result"]
    assert (ended.exit_code, result["verdict"], result["source"]) == (0, "pass", str(kept))
    assert result["logits"]["summary"]["num_tokens"] == 63
    assert [row["overlap"] for row in result["routing"]] == [1.0, 1.0]
    assert result["structure"] is None
    changed = write(tmp_path / "changed", lambda tensors: tensors.update({UP: tensors[UP] * 9}))
    assert program("verify", str(changed), "--reference", str(kept)).exit_code == 3


@pytest.mark.parametrize("kind", ["save", "reference"])
def test_one_model_is_planned_with_its_head_before_it_is_run(
    program: Program, source: Path, copy: Path, tmp_path: Path, text: Path, kind: str
) -> None:
    """Heads and logits, and with few tokens nearly all, were left out: nothing was told, and any memory was enough."""
    kept, tokens = tmp_path / "kept.safetensors", ("--text", str(text), "--num-tokens", "64")
    call = ("verify", str(source), "--save-reference", str(kept), *tokens)
    if kind == "reference":
        assert program(*call).exit_code == 0
        call = ("verify", str(copy), "--reference", str(kept), "--json")
    told = program(*call).stderr
    memory = next(line for line in told.splitlines() if line.startswith("memory: "))
    assert "head and logits" in memory
    if kind == "save":
        kept.unlink()
    refused = program(*call, "--max-memory", "340MB")
    assert (refused.exit_code, kept.exists()) == (5, kind == "reference")
    assert "bytes: heads, and a block of logits with its scores, found 340000000. Raise it.\n" in refused.stderr


def test_layers_are_judged_without_the_source_where_they_were_kept(
    program: Program, source: Path, copy: Path, tmp_path: Path, text: Path
) -> None:
    kept, tokens = tmp_path / "kept.safetensors", ("--text", str(text), "--num-tokens", "64")
    assert program("verify", str(source), "--save-reference", str(kept), "--save-inputs", *tokens).exit_code == 0
    ended = program("verify", str(copy), "--reference", str(kept), "--level", "layers", "--json")
    result = json.loads(ended.stdout)["result"]
    assert (ended.exit_code, result["verdict"], result["logits"]) == (0, "pass", None)
    assert [row["mlp"]["relative"] for row in result["layers"]] == [0.0] * 3
    assert {"single experts", "logits", "outputs of the MTP layer"} <= set(result["not_checked"])
    assert result["provenance"]["plan"]["peak_bytes"] > 0
    changed = write(tmp_path / "changed", lambda tensors: tensors.update({UP: tensors[UP] * 9}))
    call = ("verify", str(changed), "--level", "layers", "--no-floor", "--against", str(source), *tokens)
    beside = ("verify", str(changed), "--level", "layers", "--reference", str(kept))
    direct, stored = (json.loads(program(*one, "--json").stdout)["result"] for one in (call, beside))
    assert direct["verdict"] == stored["verdict"] == "fail"
    assert stored["reasons"][0].startswith("layer 1 MoE: relative error ")
    for ours, theirs in zip(direct["layers"], stored["layers"], strict=False):
        assert {**ours, "experts": []} == theirs
    assert (len(direct["layers"]), len(stored["layers"])) == (4, 3)
    lenient = program(*beside, "--max-layer-error", "1000", "--json")
    assert {check["metric"]: check["verdict"] for check in json.loads(lenient.stdout)["result"]["checks"]}[
        "MLP and MoE error, worst layer"
    ] == "pass"


def test_layers_that_a_reference_does_not_keep_are_refused_by_name(
    program: Program, source: Path, copy: Path, tmp_path: Path, text: Path
) -> None:
    kept = tmp_path / "kept.safetensors"
    assert program("verify", str(source), "--save-reference", str(kept), "--text", str(text)).exit_code == 0
    assert program("verify", str(copy), "--reference", str(kept), "--level", "layers", "--quiet") == Ended(
        2,
        "",
        f"Error: --reference {kept}: expected one with its layers, to compare layers with, found one without. "
        "Save it again with --save-inputs, or take --level logits.\n",
    )


def test_layers_alone_find_a_head_that_is_off(program: Program, source: Path, tmp_path: Path, text: Path) -> None:
    changed = write(tmp_path / "changed", double)
    call = ("verify", str(changed), "--against", str(source), "--level", "layers", "--text", str(text), "--json")
    result = json.loads(program(*call).stdout)["result"]
    assert result["verdict"] == "fail"
    assert result["reasons"] == ["head: relative error 1, 1 at token 0, expected <= 0"]
    assert result["ends"]["final_norm"]["relative"] == result["ends"]["embedding"]["relative"] == 0


@pytest.mark.parametrize("option", [("--text", "f"), ("--num-tokens", "9"), ("--stride", "9")])
def test_reference_has_its_own_tokens(
    program: Program, source: Path, copy: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    kept = tmp_path / "f"
    kept.write_text("no reference; the options are looked at first")
    given = (option[0], str(kept)) if option[0] == "--text" else option
    ended = program("verify", str(copy), "--reference", str(kept), *given)
    assert ended.exit_code == 2
    assert "expected no --reference beside it, which has its own, found both" in ended.stderr


def test_reference_has_no_floor(program: Program, copy: Path, tmp_path: Path) -> None:
    kept = tmp_path / "f"
    kept.write_text("no reference; the options are looked at first")
    for option in ("--floor", "--no-floor"):
        ended = program("verify", str(copy), "--reference", str(kept), option)
        expected = f"Error: {option}: expected no --reference beside it, which has no floor, found both\n"
        assert (ended.exit_code, ended.stderr) == (2, expected)


def test_limit_of_layers_beside_a_reference_alone_is_refused(program: Program, copy: Path, tmp_path: Path) -> None:
    """It was told that there was no text, and so no logits, which are what would be compared."""
    (tmp_path / "f").write_text("no reference; the options are looked at first")
    ended = program("verify", str(copy), "--reference", str(tmp_path / "f"), "--max-layer-error", "1")
    expected = "Error: --max-layer-error: expected --level layers or all, found --reference alone: logits. "
    assert (ended.exit_code, ended.stderr) == (2, expected + "It would be ignored.\n")


def test_saving_alone_refuses_what_compares(program: Program, source: Path, tmp_path: Path) -> None:
    call = ("verify", str(source), "--save-reference", str(tmp_path / "kept.safetensors"))
    ended = program(*call, "--max-kl", "1")
    assert (ended.exit_code, "--max-kl: expected --against SRC" in ended.stderr) == (2, True)


def test_structure_level_imports_no_torch(source: Path, copy: Path) -> None:
    code = (
        "import sys; from glm4moe_cli.main import run; "
        f"code = run(['verify', {str(copy)!r}, '--against', {str(source)!r}, '--level', 'structure']); "
        "sys.exit(code or 9 * ('torch' in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained fixture in FP8."""
    folder = tmp_path_factory.mktemp("verify") / "fp8"
    with open_source(tiny) as opened:
        run(plan_quantize(opened, QuantizeOptions(scheme="fp8")), folder, RunOptions(workers=1), lambda _: None)
    return folder


def with_swapped_experts(folder: Path, copy: Path, layer: int) -> Path:
    """Copy an FP8 checkpoint with experts 0 and 1 of a layer exchanged, scales and all."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    schema = expand(Glm4MoeConfig.from_hf(config))
    tensors = read_tensors(folder)
    for part in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        first, second = (schema.tensor(Role.EXPERT, part, layer, expert).module for expert in (0, 1))
        for suffix in ("weight", "weight_scale"):
            names = f"{first}.{suffix}", f"{second}.{suffix}"
            tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    copy.mkdir()
    for path in folder.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json"):
            (copy / path.name).write_bytes(path.read_bytes())
    save_file(tensors, copy / "model.safetensors")
    return copy


def test_fp8_copy_of_a_trained_model_passes(program: Program, tiny: Path, held_out: Path, quantized: Path) -> None:
    call = ("verify", str(quantized), "--against", str(tiny), "--text", str(held_out))
    ended = program(*call, "--num-tokens", "4096", "--context-length", "256", "--json")
    result = json.loads(ended.stdout)["result"]
    assert ended.exit_code == 0, result["headline"]
    assert result["scheme"] == "fp8"
    kl = result["logits"]["summary"]["kl_nats"]["estimate"]
    assert 0 < kl["mean"] < 0.02
    assert kl["se_block"] < kl["mean"]


@pytest.mark.parametrize("layer", [3, 4, 5, 6])
def test_two_experts_swapped_fail(
    program: Program, tiny: Path, held_out: Path, quantized: Path, tmp_path: Path, layer: int
) -> None:
    """Names, shapes and dtypes are all right; running the model shows it, in whichever MoE layer it is."""
    swapped = with_swapped_experts(quantized, tmp_path / "swapped", layer)
    call = ("verify", str(swapped), "--against", str(tiny))
    assert program(*call, "--level", "structure").exit_code == 0
    text = ("--level", "logits", "--text", str(held_out), "--num-tokens", "4096", "--context-length", "256")
    ended = program(*call, *text)
    assert ended.exit_code == 3
    assert ended.stdout.startswith("FAIL: fp8: KL mean 0.0")
    assert ended.stderr.splitlines()[-1].startswith(f"Error: {swapped} is not what {tiny} was: found KL mean 0.0")


def test_trained_model_against_itself_is_exactly_equal(program: Program, tiny: Path, held_out: Path) -> None:
    call = ("verify", str(tiny), "--against", str(tiny), "--text", str(held_out), "--num-tokens", "600", "--json")
    result = json.loads(program(*call).stdout)["result"]
    assert result["verdict"] == "pass"
    assert result["logits"]["summary"]["kl_nats"]["max"] == 0.0


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED_SHARED, Layout.FUSED])
def test_trained_model_in_another_layout_is_exactly_equal(
    program: Program, tiny: Path, held_out: Path, tmp_path: Path, layout: Layout
) -> None:
    with open_source(tiny) as opened:
        conversion = plan_convert(opened, ConvertOptions(layout=layout))
        run(conversion, tmp_path / "other", RunOptions(workers=1), lambda _: None)
    text = ("--text", str(held_out), "--num-tokens", "600", "--json")
    result = json.loads(program("verify", str(tmp_path / "other"), "--against", str(tiny), *text).stdout)["result"]
    assert (result["verdict"], result["scheme"]) == ("pass", "identity")
    assert result["logits"]["summary"]["kl_nats"]["max"] == 0.0
    assert result["structure"]["outcomes"]["repacked"] > 0


def test_dequantized_copy_is_held_against_its_codes(
    program: Program, quantized: Path, held_out: Path, tmp_path: Path
) -> None:
    with open_source(quantized) as opened:
        conversion = plan_convert(opened, ConvertOptions(dequantize=True, layout=Layout.PACKED))
        run(conversion, tmp_path / "plain", RunOptions(workers=1), lambda _: None)
    text = ("--text", str(held_out), "--num-tokens", "600", "--json")
    result = json.loads(program("verify", str(tmp_path / "plain"), "--against", str(quantized), *text).stdout)["result"]
    assert (result["verdict"], result["scheme"]) == ("pass", "dequantized")
