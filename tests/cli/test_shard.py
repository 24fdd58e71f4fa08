"""shard on the command line: round trips, plans, and what is refused in which words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from builders import assert_same_tensors, read_tensors, small_checkpoint

from converters.checkpoint.manifest import MANIFEST_FILE
from converters.shard.naming import VLLM_VERSION
from tests.cli.conftest import Ended

Program = Callable[..., Ended]


def document(ended: Ended) -> dict[str, Any]:
    return json.loads(ended.stdout)


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "src", num_attention_heads=8, num_key_value_heads=2, head_dim=4)


def test_sharded_cut_anew_and_merged(program: Program, src: Path, tmp_path: Path) -> None:
    first, second, back = (str(tmp_path / name) for name in ("first", "second", "back"))
    assert program("shard", str(src), first, "--tp", "4", "--ep", "2", "--pp", "2").exit_code == 0
    assert program("shard", first, second, "--reshard", "--tp", "2", "--layout", "tensorrt-llm").exit_code == 0
    assert program("shard", second, back, "--merge").exit_code == 0
    assert_same_tensors(read_tensors(Path(back)), read_tensors(src))
    hashes = [
        document(program("inspect", folder, "--hash", "--json"))["result"]["content_sha256"]
        for folder in (str(src), back)
    ]
    assert hashes[0] == hashes[1]


def test_convert_repacks_and_cuts_in_one_pass(program: Program, src: Path, tmp_path: Path) -> None:
    cut, merged, packed = (str(tmp_path / name) for name in ("cut", "merged", "packed"))
    ended = program("convert", str(src), cut, "--layout", "packed", "--tp", "2", "--ep", "2")
    assert ended.exit_code == 0
    assert program("shard", cut, merged, "--merge").exit_code == 0
    assert program("convert", str(src), packed, "--layout", "packed").exit_code == 0
    assert_same_tensors(read_tensors(Path(merged)), read_tensors(Path(packed)))


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("convert",), "sha256"),
        (("convert", "--digest", "xxh3"), "xxh3"),
        (("convert", "--tp", "2"), "xxh3"),
        (("convert", "--tp", "2", "--digest", "sha256"), "sha256"),
        (("shard", "--tp", "2"), "xxh3"),
        (("shard", "--tp", "2", "--digest", "sha256"), "sha256"),
    ],
)
def test_manifest_knows_tensors_by_the_digest_that_is_asked_for(
    program: Program, src: Path, tmp_path: Path, command: tuple[str, ...], expected: str
) -> None:
    name, *options = command
    dst = tmp_path / "dst"
    assert program(name, str(src), str(dst), *options).exit_code == 0
    assert algorithms(dst) == {expected}
    assert program("verify", str(dst), "--level", "bytes").exit_code == 0
    path = sorted(dst.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = program("verify", str(dst), "--level", "bytes")
    assert found.exit_code == 3
    assert f"expected {expected} " in " ".join(found.stdout.split())


@pytest.mark.parametrize("expected", ["sha256", "xxh3"])
def test_merged_and_cut_anew_by_the_digest_that_is_asked_for(
    program: Program, src: Path, tmp_path: Path, expected: str
) -> None:
    cut, back, anew = (tmp_path / name for name in ("cut", "back", "anew"))
    assert program("shard", str(src), str(cut), "--tp", "2").exit_code == 0
    assert program("shard", str(cut), str(back), "--merge", "--digest", expected).exit_code == 0
    assert program("shard", str(cut), str(anew), "--reshard", "--tp", "4", "--digest", expected).exit_code == 0
    assert algorithms(back) == algorithms(anew) == {expected}
    assert_same_tensors(read_tensors(back), read_tensors(src))


def test_a_digest_beside_a_format_is_refused(program: Program, src: Path, tmp_path: Path) -> None:
    ended = program("convert", str(src), str(tmp_path / "dst"), "--format", "modelopt", "--digest", "xxh3")
    assert ended.exit_code == 2
    refused = "Error: --format modelopt: expected no --layout, --dtype, --dequantize, --mtp, --digest"
    assert ended.stderr.startswith(refused)
    assert not (tmp_path / "dst").exists()


def algorithms(folder: Path) -> set[str]:
    """Return the algorithms by which a manifest knows tensors."""
    tensors = json.loads((folder / MANIFEST_FILE).read_text())["tensors"].values()
    parts = [part for facts in tensors for part in facts.get("slices", [facts])]
    return {key for part in parts for key in part if key in ("sha256", "xxh3")}


def test_dry_run_states_what_the_run_writes(program: Program, src: Path, tmp_path: Path) -> None:
    command = ("shard", str(src), str(tmp_path / "dst"), "--tp", "2", "--pp", "2", "--json")
    planned = document(program(*command, "--dry-run"))["result"]
    assert not (tmp_path / "dst").exists()
    written = document(program(*command))["result"]
    assert planned["plan"] == written["plan"]
    files = {shard["file"]: shard["bytes"] for shard in planned["plan"]["shards"]}
    assert files == {path.name: path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors")}
    assert {shard["rank"] for shard in planned["plan"]["shards"]} == {0, 1, 2, 3}
    assert planned["plan"]["distribution"]["mapping"]["layers_of_stages"] == [2, 1]


def test_text_shows_a_row_a_rank(program: Program, src: Path, tmp_path: Path) -> None:
    lines = program("shard", str(src), str(tmp_path / "dst"), "--tp", "2", "--ep", "2", "--dry-run").stdout.splitlines()
    assert lines[0].split("\t") == ["rank", "stage", "layers", "tp", "moe tp", "moe ep", "bytes"]
    assert lines[1].split("\t")[:6] == ["0", "0", "0 to 2", "0", "0", "0"]
    assert lines[2].split("\t")[:6] == ["1", "0", "0 to 2", "1", "0", "1"]


def test_sizes_that_do_not_fit_are_a_table_and_an_error(program: Program, src: Path, tmp_path: Path) -> None:
    ended = program("shard", str(src), str(tmp_path / "dst"), "--tp", "3")
    assert ended.exit_code == 2
    rows = [line.split("\t") for line in ended.stdout.splitlines()]
    assert rows[0] == ["part", "size", "in groups of", "asked for", "result", "sizes that fit", "way round"]
    assert rows[1] == ["attention heads", "8", "", "--tp 3", "8 does not divide by 3", "1 2 4 8", "choose another --tp"]
    fitting = ["experts", "shared expert", "expert slots", "layers"]
    assert [row[0] for row in rows if row[4] == "fits"] == fitting
    assert ended.stderr == (
        "Error: --tp 3: attention heads: expected a size that fits: 1, 2, 4, 8, found 8 does not divide by 3, "
        "and 3 more. Choose another --tp.\n"
    )
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--tp, --ep, --pp: expected one of them, or --merge, found none"),
        (
            ("--merge",),
            "expected a sharded checkpoint, with its glm4moe-manifest.json, found none, or one that is still",
        ),
        (
            ("--reshard", "--tp", "2"),
            "expected a sharded checkpoint, with its glm4moe-manifest.json, found none, or one",
        ),
        (("--merge", "--reshard"), "--merge: expected no --reshard beside it, found both"),
        (
            ("--tp", "4", "--ep", "3"),
            "--ep 3: expected one of 1, 2, 4: experts are dealt to the 4 ranks of --tp, found 4",
        ),
        (("--tp", "2", "--redundant-experts", "2"), "--redundant-experts: expected --ep above 1"),
        (("--tp", "2", "--layout", "vllm", "--vllm-version", "0.31.0"), "--vllm-version 0.31.0: expected 0.32.0"),
        (("--tp", "2", "--vllm-version", "0.31.0"), "--vllm-version 0.31.0: expected --layout vllm beside it"),
        (
            ("--tp", "2", "--vllm-version", VLLM_VERSION),
            f"--vllm-version {VLLM_VERSION}: expected --layout vllm beside it",
        ),
        (("--merge", "--layout", "vllm"), "--layout vllm: expected no --merge beside it"),
        (("--tp", "2", "--part", "1/2", "--restart"), "--part: expected no --restart beside it"),
    ],
)
def test_what_makes_no_sense_is_refused(
    program: Program, src: Path, tmp_path: Path, args: tuple[str, ...], message: str
) -> None:
    ended = program("shard", str(src), str(tmp_path / "dst"), *args)
    assert ended.exit_code == 2
    assert message in ended.stderr
    assert not (tmp_path / "dst").exists()


def test_shards_as_a_source_need_merge_or_reshard(program: Program, src: Path, tmp_path: Path) -> None:
    cut = str(tmp_path / "cut")
    assert program("shard", str(src), cut, "--tp", "2", "-q").exit_code == 0
    ended = program("shard", cut, str(tmp_path / "dst"), "--tp", "4")
    message = "expected a whole checkpoint, or --merge or --reshard, found shards"
    assert (ended.exit_code, message in ended.stderr) == (2, True)
    ended = program("shard", cut, str(tmp_path / "dst"), "--merge", "--tp", "4")
    assert (ended.exit_code, "--merge: expected no --tp, --ep or --pp beside it" in ended.stderr) == (2, True)
    ended = program("convert", cut, str(tmp_path / "dst"))
    assert (ended.exit_code, "cut for ranks: --merge of shard joins it" in ended.stderr) == (4, True)


def test_shards_are_verified_as_they_are(program: Program, src: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    assert program("shard", str(src), str(cut), "--tp", "2", "--ep", "2", "-q").exit_code == 0
    found = document(program("verify", str(cut), "--against", str(src), "--json"))["result"]
    assert (found["verdict"], found["scheme"]) == ("pass", "identity")
    assert found["bytes"]["record"] == "glm4moe-manifest.json"
    file = next(cut.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    ended = program("verify", str(cut), "--against", str(src), "--json")
    assert (ended.exit_code, document(ended)["result"]["verdict"]) == (3, "fail")


@pytest.mark.parametrize(
    "args", [("--update",), ("--disk-budget", "1GB"), ("--mtp", "separate"), ("--format", "modelopt")]
)
def test_convert_refuses_what_does_not_go_with_ranks(
    program: Program, src: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    ended = program("convert", str(src), str(tmp_path / "dst"), "--tp", "2", *args)
    assert ended.exit_code == 2
    assert "--tp, --ep" in ended.stderr
    assert not (tmp_path / "dst").exists()


@pytest.mark.parametrize("args", [("--shared-experts", "replicate"), ("--expert-placement", "round-robin")])
@pytest.mark.parametrize("command", ["convert", "shard", "inspect"])
def test_a_choice_without_sizes_is_refused(
    program: Program, src: Path, tmp_path: Path, command: str, args: tuple[str, ...]
) -> None:
    folders = [str(src)] if command == "inspect" else [str(src), str(tmp_path / "dst")]
    ended = program(command, *folders, *args)
    assert ended.exit_code == 2
    assert f"{' '.join(args)}: expected --tp, --ep or --pp beside it" in ended.stderr


def test_a_finished_result_is_left_alone(program: Program, src: Path, tmp_path: Path) -> None:
    command = ("shard", str(src), str(tmp_path / "dst"), "--tp", "2", "--json")
    assert document(program(*command))["result"]["outcome"]["already_finished"] is False
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    assert document(program(*command))["result"]["outcome"]["already_finished"] is True
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    other = program("shard", str(src), str(tmp_path / "dst"), "--tp", "4")
    assert other.exit_code == 2
    assert "the finished result of another job (mapping: " in other.stderr
    assert other.stderr.endswith("). Choose another folder.\n"), "shard has no --update"


def test_inspect_says_how_shards_are_cut(program: Program, src: Path, tmp_path: Path) -> None:
    cut = str(tmp_path / "cut")
    assert program("shard", str(src), cut, "--tp", "2", "--ep", "2", "-q").exit_code == 0
    ended = program("inspect", cut)
    assert ended.exit_code == 0
    assert ended.stdout.startswith(f"{cut}: rank shards of a split layout, ")
    found = document(program("inspect", cut, "--json"))["result"]["sharded"]
    assert (found["mapping"]["tp"], found["mapping"]["ep"], set(found["bytes_of_ranks"])) == (2, 2, {"0", "1"})


@pytest.mark.parametrize("args", [("--hash",), ("--check",), ("--tensors",), ("--missing",), ("--gpu-memory", "80GB")])
def test_inspect_refuses_what_it_does_not_do_of_shards(
    program: Program, src: Path, tmp_path: Path, args: tuple[str, ...]
) -> None:
    """They were taken and forgotten: --check of shards read nothing and ended with 0."""
    cut = str(tmp_path / "cut")
    assert program("shard", str(src), cut, "--tp", "2", "-q").exit_code == 0
    ended = program("inspect", cut, *args)
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert f"{args[0]}: expected a whole checkpoint, found shards. 'glm4moe shard --merge' restores it" in ended.stderr


def test_inspect_plans_ranks(program: Program, src: Path) -> None:
    ended = program("inspect", str(src), "--tp", "2", "--pp", "3", "--gpu-memory", "1MB")
    assert ended.exit_code == 0
    rows = [line.split("\t") for line in ended.stdout.splitlines()]
    assert rows[0][:4] == ["rank", "stage", "layers", "weights"]
    assert [row[:3] for row in rows[1:7]] == [[str(n), str(n // 2), f"{n // 2} to {n // 2}"] for n in range(6)]
    facts = {row[0]: row[1] for row in rows[7:]}
    assert facts["SGLang"] == "SGLANG_PP_LAYER_PARTITION=1,1,1 --tp-size 2 --pp-size 3"
    assert facts["vLLM"] == "VLLM_PP_LAYER_PARTITION=1,1,1 --tensor-parallel-size 2 --pipeline-parallel-size 3"
    assert facts["TensorRT-LLM"] == "--tp_size 2 --pp_size 3"
    plan = document(program("inspect", str(src), "--tp", "2", "--json"))["result"]["parallel_plan"]
    # one key-value head of 4 dims, keys and values, 2 bytes, 3 layers
    assert plan["kv_bytes_per_1k_tokens"] == [1000 * 4 * 2 * 2 * 3] * 2
    assert plan["balance"] == 1.0


def test_inspect_refuses_what_does_not_go_with_a_plan(program: Program, src: Path) -> None:
    ended = program("inspect", str(src), "--tp", "2", "--check")
    assert (ended.exit_code, "--check: expected no --tp, --ep or --pp beside it" in ended.stderr) == (2, True)
    ended = program("inspect", str(src), "--gpu-memory", "80GB")
    assert (ended.exit_code, "--gpu-memory: expected --tp, --ep or --pp beside it" in ended.stderr) == (2, True)
    ended = program("inspect", str(src), "--tp", "3")
    assert ended.exit_code == 2
    assert ended.stdout.startswith("part\tsize\tin groups of")
