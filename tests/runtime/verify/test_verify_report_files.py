"""Reports as files: which of them are written, and that they hold the report's figures."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import verify_reports as made
from safetensors.torch import load_file

from converters.compare import Outcome, StructureReport
from converters.errors import ResourceError, UsageError
from converters.findings import fail
from runtime.verify import report_files
from runtime.verify.limits import Overrides, choose_limits
from runtime.verify.report import Levels, VerifyReport, build_report
from runtime.verify.report_files import FOLDER_FILES, as_plain, check_report_path, tokens_file, write_reports
from runtime.verify.report_markdown import render_markdown

FOLDERS = Path("models/source"), Path("models/can|didate_1")


def structure() -> StructureReport:
    finding = fail("tensor a|b", "<b>", "*c*\nd")
    return StructureReport("source", "candidate", (finding,), {Outcome.SAME: 3}, "present", ())


def report() -> VerifyReport:
    levels = Levels(structure=structure(), weights=made.certificate(outside=1, first="at 0"), layers=made.comparison())
    return build_report(FOLDERS, "fp8", levels, choose_limits("fp8", Overrides()), {"versions": {"glm4moe": "0.1.0"}})


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def strict(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_a_folder_gets_every_file_and_json_names_them(tmp_path: Path) -> None:
    written = write_reports(tmp_path / "new" / "folder.6", report())
    assert [path.name for path in written] == list(FOLDER_FILES)
    assert {path.name for path in (tmp_path / "new" / "folder.6").iterdir()} == set(FOLDER_FILES)
    assert strict(written[-1])["files"] == list(FOLDER_FILES)


def test_a_folder_gets_no_table_of_a_level_that_was_not_run(tmp_path: Path) -> None:
    found = build_report(FOLDERS, "fp8", Levels(structure=structure()))
    assert [path.name for path in write_reports(tmp_path, found)] == ["report.html", "report.md", "report.json"]
    models = replace(made.comparison(), layers=())
    found = build_report(FOLDERS, "fp8", Levels(layers=models), choose_limits("fp8", Overrides()))
    names = {path.name for path in write_reports(tmp_path / "logits", found)}
    assert names == {"tokens.safetensors", "report.html", "report.md", "report.json"}


@pytest.mark.parametrize(
    ("name", "begin"), [("a.json", b"{\n"), ("a.html", b"<!DOCTYPE html>\n"), ("a.md", b"# FAIL: ")]
)
def test_a_file_is_what_its_name_says(tmp_path: Path, name: str, begin: bytes) -> None:
    assert write_reports(tmp_path / name, report()) == (tmp_path / name,)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(begin)


def test_a_folder_may_be_called_like_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    assert len(write_reports(tmp_path / "a.json", report())) == len(FOLDER_FILES)


@pytest.mark.parametrize("name", ["a.pdf", "a.csv", "a.txt", "there"])
def test_another_kind_of_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").write_text("mine")
    with pytest.raises(UsageError) as caught:
        check_report_path(tmp_path / name)
    assert caught.value.subject == f"--report {tmp_path / name}"
    assert caught.value.expected == "FILE.json, FILE.html, FILE.md or a folder"
    with pytest.raises(UsageError):
        write_reports(tmp_path / name, report())
    assert (tmp_path / "there").read_text() == "mine"


def test_equal_reports_give_equal_bytes(tmp_path: Path) -> None:
    first, second = (write_reports(tmp_path / name, report()) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_full_disk_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise ResourceError(str(path), expected="room to write", found="none")

    path = tmp_path / "a.json"
    path.write_text("old")
    monkeypatch.setattr(report_files, "write_file", full)
    with pytest.raises(ResourceError):
        write_reports(path, report())
    assert path.read_text() == "old"


def test_json_holds_everything_but_single_tokens(tmp_path: Path) -> None:
    found = report()
    (path,) = write_reports(tmp_path / "a.json", found)
    document = strict(path)
    assert document["schema"] == "glm4moe.verify/1"
    assert document["files"] == []
    assert document["verdict"] == "fail"
    assert document["headline"] == found.headline
    assert document["provenance"] == {"versions": {"glm4moe": "0.1.0"}}
    models, weights = found.levels.layers, found.levels.weights
    assert models is not None
    assert weights is not None
    assert len(document["layers"]) == len(models.layers)
    assert document["layers"][1]["mlp"]["relative"] == models.layers[1].mlp.relative
    assert document["layers"][1]["experts"][2]["relative"] == models.layers[1].experts[2].relative
    assert [entry["tensor"] for entry in document["weights"]["tensors"]] == [one.tensor for one in weights.tensors]
    assert len(document["checks"]) == len(found.checks)


def test_tensors_stand_in_json_or_beside_it(tmp_path: Path) -> None:
    document = strict(write_reports(tmp_path, report())[-1])
    assert "tensors" not in document["weights"]
    table = rows(tmp_path / "tensors.csv")
    weights = report().levels.weights
    assert weights is not None
    assert [row["tensor"] for row in table] == [one.tensor for one in weights.tensors]
    assert [float(row["relative_error"]) for row in table] == [one.relative_error for one in weights.tensors]
    assert [float(row["sqnr_db"]) for row in table] == [one.sqnr_db for one in weights.tensors]
    assert table[0]["outside"] == "1"


def test_layers_and_experts_are_whole_in_their_tables(tmp_path: Path) -> None:
    models = made.comparison()
    first = replace(models.layers[1], attention=made.output_error(math.nan), mlp=made.output_error(0.0))
    models = replace(models, layers=(models.layers[0], first, *models.layers[2:]))
    found = build_report(FOLDERS, "fp8", Levels(layers=models), choose_limits("fp8", Overrides()))
    write_reports(tmp_path, found)
    table = rows(tmp_path / "layers.csv")
    assert [(row["layer"], row["is_mtp"]) for row in table] == [
        ("0", "0"), ("1", "0"), ("2", "0"), ("3", "0"), ("4", "1"),
    ]  # fmt: skip
    assert (table[1]["attention_relative"], table[1]["mlp_sqnr_db"]) == ("NaN", "Infinity")
    assert (table[0]["router_changed"], table[0]["router_own_changed"]) == ("", "")
    for row, layer in zip(table[2:], models.layers[2:], strict=True):
        assert float(row["residual_relative"]) == layer.residual.relative
        assert layer.router is not None
        assert float(row["router_changed"]) == layer.router.changed
    experts = [(layer.layer, expert) for layer in models.layers for expert in layer.experts]
    table = rows(tmp_path / "experts.csv")
    assert [(int(row["layer"]), int(row["expert"])) for row in table] == [(at, one.expert) for at, one in experts]
    assert [int(row["num_tokens"]) for row in table] == [one.num_tokens for _, one in experts]


def test_no_cell_of_a_table_is_a_formula(tmp_path: Path) -> None:
    weights = made.certificate(tensor="=1+1", first="@\u202e")
    write_reports(tmp_path, build_report(FOLDERS, "fp8", Levels(weights=weights)))
    first = rows(tmp_path / "tensors.csv")[0]
    assert (first["tensor"], first["first"]) == ("'=1+1", "'@[U+202E]")


def test_tokens_are_read_by_safetensors(tmp_path: Path) -> None:
    tokens = made.token_table(120, torch.Generator().manual_seed(3))
    path = tmp_path / "tokens.safetensors"
    path.write_bytes(tokens_file(tokens))
    found = load_file(path)
    for name in ("kl_nats", "nll_reference", "nll_candidate", "delta_p"):
        assert torch.equal(found[name], getattr(tokens.scores, name).float())
    assert torch.equal(found["positions"], tokens.positions_T)
    assert torch.equal(found["windows"], tokens.windows_T)
    assert tuple(found["token_ids"].tolist()) == tokens.token_ids
    assert len(found) == 7


def test_plain_values_are_those_of_json() -> None:
    assert as_plain({1: (math.inf, -math.inf, math.nan, None, True), "p": Path("a/b"), "s": {2, 1}}) == {
        "1": ["Infinity", "-Infinity", "NaN", None, True],
        "p": "a/b",
        "s": [1, 2],
    }


def test_markdown_shows_text_as_it_is() -> None:
    text = render_markdown(report())
    lines = text.splitlines()
    assert lines[0] == "# FAIL: can\\|didate\\_1 against source"
    assert "- tensor a\\|b: expected \\<b\\>, found \\*c\\*[U+000A]d".replace("[", "\\[").replace("]", "\\]") in lines
    table = [line for line in lines if line.startswith("| ")]
    assert {line.replace("\\|", "").count("|") for line in table} == {7}
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert len(lines) < 110


def test_statistics_block_has_the_figures_that_numpy_has() -> None:
    found = report()
    models = found.levels.layers
    assert models is not None
    assert models.tokens is not None
    scores = models.tokens.scores
    block = render_markdown(found).split("```text\n")[1].split("```")[0]
    shown = {
        line[: line.rindex(":")].strip(): line[line.rindex(":") + 1 :] for line in block.splitlines() if ":" in line
    }
    values = {
        name: [float(part.rstrip("%")) for part in text.replace("%", "").split("\u00b1")]
        for name, text in shown.items()
    }
    ours, theirs, kl = (getattr(scores, name).numpy() for name in ("nll_reference", "nll_candidate", "kl_nats"))
    change = 100 * scores.delta_p.numpy()
    count = len(kl)

    def error(array: np.ndarray) -> float:
        return array.std(ddof=1) / math.sqrt(count)

    expected = {
        "Mean PPL(Q)": [np.exp(theirs.mean()), np.exp(theirs.mean()) * error(theirs)],
        "Mean PPL(base)": [np.exp(ours.mean()), np.exp(ours.mean()) * error(ours)],
        "Cor(ln(PPL(Q)), ln(PPL(base)))": [100 * np.corrcoef(ours, theirs)[0, 1]],
        "Mean ln(PPL(Q)/PPL(base))": [(theirs - ours).mean(), error(theirs - ours)],
        "Mean    KLD": [kl.mean(), error(kl)],
        "99.9%   KLD": [np.quantile(kl, 0.999)],
        "10.0%   KLD": [np.quantile(kl, 0.1)],
        "Median  KLD": [np.median(kl)],
        "Maximum KLD": [kl.max()],
        "0.1%   KLD": [np.quantile(kl, 0.001)],
        "Mean    \u0394p": [change.mean(), error(change)],
        "75.0%   \u0394p": [np.quantile(change, 0.75)],
        "25.0%   \u0394p": [np.quantile(change, 0.25)],
        "RMS \u0394p": [np.sqrt((change**2).mean()), error(change**2) / (2 * np.sqrt((change**2).mean()))],
        "Same top p": [100 * float(scores.top1_same.mean()), 100 * error(scores.top1_same.numpy())],
    }
    for name, wanted in expected.items():
        digits = 2 if name.startswith("Cor") else 3 if "p" in name[-2:] else 6
        for value, exact in zip(values[name], wanted, strict=True):
            assert value == pytest.approx(exact, abs=0.51 * 10**-digits), name
    assert len(shown) == 6 + 12 + 16


def test_statistics_block_is_left_out_without_tokens() -> None:
    models = replace(made.comparison(), tokens=None, summary=None)
    found = build_report(FOLDERS, "fp8", Levels(layers=models), choose_limits("fp8", Overrides()))
    assert "```" not in render_markdown(found)


@pytest.mark.parametrize("name", ["gone/a.json", "file/a.json", "file/folder"])
def test_a_folder_that_cannot_be_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="a folder that can be made"):
        check_report_path(tmp_path / name)
