"""`glm4moe inspect` through its real entry: exact text, exit codes, JSON, and no weights of a hub id."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import random_tensors, small_config, write_checkpoint
from fake_hub import REPO, serving

from converters.checkpoint.header import read_header
from converters.config import Glm4MoeConfig
from converters.inspect.parallel import SIZES
from converters.schema import expand
from tests.cli.conftest import Ended
from tests.converters.inspect.fakes import config_of, official

Program = Callable[..., Ended]
DIGEST = "705dad756641335a1b36bdeabfa14d3457e11e0f334e64875b9d2134c8645f31"


def test_the_trained_fixture_is_described(tiny: Path, program: Program) -> None:
    ended = program("inspect", str(tiny))
    assert ended.exit_code == 0
    assert ended.stderr == ""
    lines = ended.stdout.splitlines()
    assert lines[:17] == [
        f"{tiny}: custom, split layout, 3,498,064 parameters, 7.0MB in 369 tensors, 3 files",
        "model\tcustom",
        "recognised by\thidden_size 128, 7 layers, 16 experts: no released GLM-4 MoE model has these sizes",
        "architecture\t7 layers, 3 of them dense; 4 of 16 experts and 1 shared; 8 heads over 2 key-value heads; "
        "context of 2,048 tokens",
        "layout\tsplit",
        "format\tplain weights, not quantized",
        "MTP\tlayer 7, without embedding and head, in the main files",
        "MTP size\t68 tensors, 1.1MB",
        "parameters\t3,498,064, as the config expects",
        "tensors\t369, as the config expects",
        "bytes\t6,996,288, as the config expects",
        "main model, MTP\t2,962,432 and 535,632 parameters",
        "active per token\t1,782,784 (0.00 B) parameters, 1,651,712 (0.00 B) without the input embedding",
        "parameters by group\texpert 1,966,080, attention 655,360, dense_mlp 442,368, embedding 131,072, head 131,072, "
        "shared_expert 122,880, mtp_projection 32,768, router 10,240, attention_bias 3,072, norm 2,560, qk_norm 512, "
        "router_bias 80",
        "bits per weight\t16.00",
        "KV cache per token\t1,792 bytes in 16 bits, 896 in 8",
        "ranks\ttensor parallel\ttensor, experts whole\texpert parallel\tpipeline parallel",
    ]
    rows = lines[17 : 17 + len(SIZES)]
    assert rows[3] == "4\tfits\tfits\tfits (4 experts a rank)\tfits (1 to 2 layers a stage)"
    no_heads = "no: attention: 8 heads do not divide by 16"
    assert rows[7] == f"16\t{no_heads}\t{no_heads}\tfits (1 expert a rank)\tno: 7 layers are fewer than 16 stages"
    assert lines[17 + len(SIZES)] == "stored as\tdense layers\texperts\ttensor parallel\ttensor, experts whole"
    assert lines[-3:] == ["dtype\ttensors\telements\tbytes", "BF16\t364\t3497984\t6995968", "F32\t5\t80\t320"]


def test_hash_and_check_of_the_trained_fixture(tiny: Path, program: Program) -> None:
    ended = program("inspect", str(tiny), "--hash", "--check", "--quiet")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[1] == f"content sha256:{DIGEST}"
    assert len(ended.stdout.splitlines()) == 2


def test_json_has_everything(tiny: Path, program: Program) -> None:
    ended = program("inspect", str(tiny), "--json", "--tensors", "--hash")
    document = json.loads(ended.stdout)
    assert document["ok"] is True
    assert document["bytes"] == {"read": 6_996_288}
    result = document["result"]
    assert result["content_sha256"] == DIGEST
    assert result["layout"] == "split"
    assert result["variant"]["name"] == "custom"
    assert result["totals"]["parameters"] == result["totals"]["expected_parameters"] == 3_498_064
    assert result["quantization"]["scheme"] == "none"
    assert result["findings"] == []
    assert (result["missing"], result["unexpected"], result["finished"]) == ({}, [], True)
    assert len(result["tensors"]) == 369
    assert result["tensors"][0].keys() == {"name", "dtype", "shape", "bytes", "file"}
    assert {fit["size"] for fit in result["parallel"]["tensor"]} == set(SIZES)
    bad = next(fit for fit in result["parallel"]["tensor"] if fit["size"] == 16)
    assert bad["reasons"] == ["attention: 8 heads do not divide by 16"]


@pytest.mark.parametrize("layout", ["packed", "fused", "fused-shared"])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_converted_layout_has_the_digest_of_its_source(
    tiny: Path, tmp_path: Path, program: Program, layout: str, quantized: bool
) -> None:
    source = tmp_path / "fp8" if quantized else tiny
    if quantized:
        assert program("quantize", str(tiny), str(source), "--scheme", "fp8", "-q").exit_code == 0
    assert program("convert", str(source), str(tmp_path / layout), "--layout", layout, "-q").exit_code == 0
    digests = []
    for folder in (source, tmp_path / layout):
        document = json.loads(program("inspect", str(folder), "--hash", "--check", "--json").stdout)
        assert document["result"]["findings"] == []
        digests.append(document["result"]["content_sha256"])
    assert document["result"]["layout"] == layout
    assert digests[0] == digests[1]
    assert (digests[0] == DIGEST) is not quantized


def test_a_full_size_checkpoint_in_one_line(tmp_path: Path, program: Program) -> None:
    folder = official(tmp_path / "Air", config_of("GLM-4.5-Air"))
    ended = program("inspect", str(folder), "--quiet")
    assert ended == Ended(
        0,
        f"{folder}: GLM-4.5-Air, split layout, 110,468,824,832 parameters, 220.9GB in 18,329 tensors, 47 files\n",
        "",
    )


def test_tensors_table(small: Path, program: Program) -> None:
    lines = program("inspect", str(small), "--tensors").stdout.splitlines()
    header = lines.index("tensor\tdtype\tshape\tbytes\tfile")
    assert "model.embed_tokens.weight\tBF16\t[64, 48]\t6144\tmodel-00001-of-00002.safetensors" in lines[header:]
    assert len(lines) - header - 1 == 107


def damaged(folder: Path) -> Path:
    """Return a checkpoint that lacks its first norm, with one tensor that nobody asked for."""
    config = small_config()
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(config)))
    tensors["model.visual.weight"] = tensors.pop("model.layers.0.input_layernorm.weight")
    return write_checkpoint(folder, tensors, config, 1)


def test_findings_are_numbered_and_end_with_exit_code_4(tmp_path: Path, program: Program) -> None:
    folder = damaged(tmp_path / "a")
    ended = program("inspect", str(folder), "--missing")
    assert ended.exit_code == 4
    assert ended.stderr == (
        f"Error: {folder}: expected a whole checkpoint that fits its config, found 2 findings, the first: "
        "201 layer 0: expected all 14 tensors, found model.layers.0.input_layernorm.weight missing. "
        "Fetch the checkpoint again. `glm4moe inspect CKPT --missing` lists all of them.\n"
    )
    lines = ended.stdout.splitlines()
    assert "differences\t1 tensors missing, 1 unexpected" in lines
    start = lines.index("tensor\tis\twhere")
    assert lines[start:] == [
        "tensor\tis\twhere",
        "model.layers.0.input_layernorm.weight\tmissing\tabsent",
        "model.visual.weight\tunexpected\tmodel.safetensors",
        "finding\tseverity\twhat\twhere\texpected\tfound",
        "201\tfail\ttensors missing\tlayer 0\tall 14 tensors\tmodel.layers.0.input_layernorm.weight missing",
        "204\tfail\tunexpected tensors\tnames\tnames that GLM-4 MoE checkpoints have\tmodel.visual.weight",
        "201\tThe config asks for them; engines refuse to load or run with random values. Fetch the checkpoint again. "
        "`glm4moe inspect CKPT --missing` lists all of them.",
        "204\tThey are not part of the model that the config describes; some engines refuse, others ignore them. Find "
        "out which of the two is wrong: the checkpoint may be another model's, or was edited by hand.",
    ]


def test_findings_in_json(tmp_path: Path, program: Program) -> None:
    document = json.loads(program("inspect", str(damaged(tmp_path / "a")), "--json").stdout)
    assert (document["ok"], document["exit_code"]) == (False, 4)
    assert document["result"]["finished"] is False
    assert [finding["number"] for finding in document["result"]["findings"]] == [201, 204]
    assert document["result"]["findings"][0].keys() == {
        "number", "severity", "title", "subject", "expected", "found", "reason", "remedy",
    }  # fmt: skip
    assert document["result"]["missing"] == {"model.layers.0.input_layernorm.weight": "absent"}
    assert document["errors"][0]["code"] == "input"


def test_an_unfinished_folder_is_never_a_whole_checkpoint(small: Path, program: Program) -> None:
    (small / ".glm4moe").mkdir()
    ended = program("inspect", str(small), "--quiet")
    assert ended.exit_code == 4
    assert ended.stderr == (
        f"Error: {small}: expected a whole checkpoint that fits its config, found 101 folder: expected a finished "
        "checkpoint, found .glm4moe, the state of a run that has not ended. "
        "Run the command that was writing it again; it goes on from where it stopped.\n"
    )


def test_warnings_alone_are_no_failure(small: Path, program: Program) -> None:
    (small / "modeling.py").touch()
    ended = program("inspect", str(small))
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert "111\twarn\tbrings its own code\tmodeling.py\tno code\tmodeling.py" in ended.stdout.splitlines()


def test_a_config_that_cannot_be_used_still_leaves_the_dtypes(small: Path, program: Program) -> None:
    (small / "config.json").write_text("{}")
    ended = program("inspect", str(small))
    assert ended.exit_code == 4
    assert ended.stdout.splitlines()[0] == (
        f"{small}: not a checkpoint that can be described, 262.7kB in 107 tensors, 2 files"
    )
    assert "BF16\t104\t131" in ended.stdout
    assert "102 config.json: model_type: expected glm4_moe, found None" in ended.stderr


def test_a_link_out_of_the_folder_exits_with_8(small: Path, program: Program, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere.safetensors"
    (small / "model-00001-of-00002.safetensors").rename(target)
    (small / "model-00001-of-00002.safetensors").symlink_to(target)
    ended = program("inspect", str(small))
    assert ended.exit_code == 8
    assert "expected a file inside the checkpoint folder, found a link to" in ended.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["no-such-folder"],
            "CKPT no-such-folder: expected a folder, org/name or org/name@revision, found none of them",
        ),
        (["acme/model@../x"], "CKPT acme/model@../x: expected a folder, org/name"),
        (
            ["acme/model", "--check"],
            "--check acme/model: expected a folder, or a hub id that is whole in the hub's cache: it reads all "
            "weights, found neither. "
            "Run 'glm4moe download acme/model FOLDER' first, then 'glm4moe inspect FOLDER --check'.",
        ),
        (
            ["acme/model@v1", "--hash"],
            "Run 'glm4moe download acme/model FOLDER --revision v1' first, then 'glm4moe inspect FOLDER --hash'.",
        ),
    ],
)
def test_requests_that_make_no_sense(args: list[str], message: str, program: Program) -> None:
    ended = program("inspect", *args)
    assert ended.exit_code == 2
    assert message in ended.stderr


def test_headers_alone_need_no_heavy_library(tiny: Path) -> None:
    code = (
        "import sys; from glm4moe_cli.main import run; code = run(['inspect', sys.argv[1], '--quiet', '--check']); "
        "print(sorted({'torch', 'transformers', 'safetensors', 'huggingface_hub', 'rich'} & set(sys.modules)), code)"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tiny)], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[] 0"


def test_a_hub_id_is_described_without_its_weights(
    small: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in sorted(small.iterdir())}
    local = program("inspect", str(small))
    with serving(files, monkeypatch) as hub:
        ended = program("inspect", REPO)
        again = program("inspect", f"{REPO}@{hub.commit}", "--json")
    assert (ended.exit_code, ended.stderr) == (0, f"{REPO} at commit {hub.commit}\n")
    assert ended.stdout == local.stdout.replace(str(small), REPO)
    result = json.loads(again.stdout)["result"]
    assert (result["checkpoint"], result["content_sha256"]) == (f"{REPO}@{hub.commit}", None)
    header_bytes = sum(read_header(path)[0].begin for path in small.glob("*.safetensors"))
    asked = [span for name in files if name.endswith(".safetensors") for span in hub.asked(name)]
    spans = [span.removeprefix("bytes=").split("-") for span in asked]
    assert sum(int(end) - int(begin) + 1 for begin, end in spans) == 2 * header_bytes


def test_a_hub_that_is_not_there_exits_with_7(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({}, monkeypatch):
        ended = program("inspect", "acme/nothing")
    assert ended.exit_code == 7
    assert ended.stderr.startswith("Error: acme/nothing")
