"""The input gate and range reads."""

import json
import os
from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint
from safetensors.torch import save_file

from converters.checkpoint.index import INDEX_FILE, scan_checkpoint
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError, SecurityError


def edit_index(folder: Path, change: dict[str, str | None]) -> None:
    index = json.loads((folder / INDEX_FILE).read_text())
    for name, file in change.items():
        if file is None:
            del index["weight_map"][name]
        else:
            index["weight_map"][name] = file
    (folder / INDEX_FILE).write_text(json.dumps(index))


def test_reads_equal_the_library(small: Path) -> None:
    expected = read_tensors(small)
    with CheckpointReader.open(small) as reader:
        assert set(reader.names) == set(expected)
        for name, tensor in expected.items():
            assert torch.equal(reader.read(name).view(torch.uint8), tensor.view(torch.uint8))
            rows = tensor.shape[0]
            assert torch.equal(reader.read_rows(name, rows // 3, rows - 1), tensor[rows // 3 : rows - 1])


def test_unknown_tensor_is_refused(small: Path) -> None:
    with CheckpointReader.open(small) as reader, pytest.raises(InputError, match="no such tensor"):
        reader.read("lm_head.bias")


def test_file_cut_off_after_opening_is_an_error_and_not_a_signal(small: Path) -> None:
    with CheckpointReader.open(small) as reader:
        file, entry = reader.index.entries["lm_head.weight"]
        reader.read("lm_head.weight")
        os.truncate(small / file, entry.end - 1)
        with pytest.raises(InputError, match="the end of the file"):
            reader.read("lm_head.weight")


@pytest.mark.parametrize(
    "value",
    [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "C:\\x.safetensors",
        "a\\b.safetensors",
        "x\0.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "model.pt",
    ],
)
def test_index_entry_that_is_no_plain_file_name_is_refused(small: Path, value: str) -> None:
    edit_index(small, {"lm_head.weight": value})
    with pytest.raises(SecurityError, match=r"a plain \*\.safetensors file name"):
        scan_checkpoint(small)


def test_link_out_of_the_folder_is_refused(small: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    file = "model-00001-of-00002.safetensors"
    (small / file).rename(outside)
    (small / file).symlink_to(outside)
    with pytest.raises(SecurityError, match="a link to"):
        scan_checkpoint(small)


def test_hub_cache_layout_is_followed(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = small_checkpoint(repo / "snapshots" / "abc")
    (repo / "blobs").mkdir()
    for path in list(snapshot.iterdir()):
        path.rename(repo / "blobs" / path.name)
        path.symlink_to(Path("../../blobs") / path.name)
    with CheckpointReader.open(snapshot) as reader:
        assert reader.read("lm_head.weight").shape == (64, 48)


@pytest.mark.parametrize("kind", ["fifo", "folder"])
def test_file_that_is_no_regular_file_is_refused_without_opening_it(small: Path, kind: str) -> None:
    path = small / "model-00001-of-00002.safetensors"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(SecurityError, match="a regular file"):
        scan_checkpoint(small)


def test_missing_shard_is_named(small: Path) -> None:
    (small / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="model-00002-of-00002.safetensors: expected a file that the index or"):
        scan_checkpoint(small)


def test_index_that_points_at_the_wrong_shard_is_refused(small: Path) -> None:
    edit_index(small, {"lm_head.weight": "model-00001-of-00002.safetensors"})
    with pytest.raises(InputError, match="lm_head.weight: expected in model-00001.* found it in model-00002"):
        scan_checkpoint(small)


def test_tensor_that_the_index_lacks_is_refused(small: Path) -> None:
    edit_index(small, {"lm_head.weight": None})
    with pytest.raises(InputError, match=r"lm_head.weight: expected listed in"):
        scan_checkpoint(small)


def test_tensor_that_no_file_has_is_refused(small: Path) -> None:
    edit_index(small, {"lm_head.extra": "model-00001-of-00002.safetensors"})
    with pytest.raises(InputError, match="lm_head.extra: .* found it in no file"):
        scan_checkpoint(small)


def test_tensor_in_two_files_is_refused(small: Path) -> None:
    save_file({"lm_head.weight": torch.zeros(64, 48)}, small / "mtp.safetensors")
    with pytest.raises(InputError, match="lm_head.weight: expected one file, found both"):
        scan_checkpoint(small)


def test_mtp_file_that_the_index_forgot_is_taken_in_and_noted(tmp_path: Path) -> None:
    folder = small_checkpoint(tmp_path / "c")
    tensors = read_tensors(folder)
    mtp = {name: value for name, value in tensors.items() if name.startswith("model.layers.3.")}
    body = {name: value for name, value in tensors.items() if name not in mtp}
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file(body, folder / "model.safetensors")
    save_file(mtp, folder / "mtp.safetensors")
    index = scan_checkpoint(folder)
    assert set(index.entries) == set(tensors)
    assert index.notes == ("mtp.safetensors is not in the index; its tensors were taken in.",)


def test_several_shards_without_an_index_are_refused(small: Path) -> None:
    (small / INDEX_FILE).unlink()
    with pytest.raises(InputError, match="an index for the 2 safetensors files"):
        scan_checkpoint(small)


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pytorch_model.bin")  # opening it would block for ever
    with pytest.raises(SecurityError, match="never opened"):
        scan_checkpoint(tmp_path)


@pytest.mark.parametrize("content", ['{"weight_map": {}}', '{"weight_map": []}', "{}", '{"weight_map": {"a": 1}}'])
def test_index_without_a_weight_map_is_refused(small: Path, content: str) -> None:
    (small / INDEX_FILE).write_text(content)
    with pytest.raises(InputError, match="weight_map from tensor names to file names"):
        scan_checkpoint(small)


def test_empty_and_absent_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected safetensors files, found none"):
        scan_checkpoint(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        scan_checkpoint(tmp_path / "absent")
