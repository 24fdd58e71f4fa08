"""Checkpoints made to do harm: what lies outside is never opened, code never run, terminals never driven."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
from builders import small_checkpoint, small_config

from converters.checkpoint.index import INDEX_FILE
from tests.faults.harness import Ended, Runner

FIRST = "model-00001-of-00002.safetensors"
# tells, in the run itself, of each file that is opened and each step of an unpickler or an import
WATCH = """
import os, sys
def watch(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        os.writev(2, [f"OPENED {os.path.realpath(os.fsdecode(args[0]))}\\n".encode()])
    elif event in ("pickle.find_class", "exec", "compile", "os.system", "subprocess.Popen"):
        os.writev(2, [f"RAN {event} {args!r}\\n".encode()])
sys.addaudithook(watch)
"""


class Bomb:
    """Runs a command when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo RAN",)


@pytest.fixture
def src(work: Path) -> Path:
    return small_checkpoint(work / "src")


@pytest.fixture
def secret(work: Path) -> Path:
    """A valid shard outside of the checkpoint."""
    return small_checkpoint(work / "secret") / FIRST


def convert(runner: Runner, src: Path) -> tuple[Ended, list[str]]:
    """Convert, and return also the files that were opened."""
    ended = runner(["convert", str(src), str(src.parent / "dst"), "--workers", "1"], src.parent, prepare=[WATCH])
    assert "RAN" not in ended.text
    opened = re.findall(r"OPENED (.*)", ended.text)
    assert ended.code or any(path.startswith(f"{src}/") for path in opened)
    return ended, opened


def point_index_at(src: Path, value: str) -> None:
    index = json.loads((src / INDEX_FILE).read_text())
    index["weight_map"] = {name: value if file == FIRST else file for name, file in index["weight_map"].items()}
    (src / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "value",
    [
        "../secret/" + FIRST,
        "/proc/self/environ",
        "/dev/zero",
        "SECRET",
        "..\\secret\\" + FIRST,
        "sub/../../secret/" + FIRST,
        "./" + FIRST,
        "C:" + FIRST,
        "//host/" + FIRST,
        "x\0.safetensors",
        "x\n.safetensors",
        "",
        ".",
        "..",
        "model.safetensors/",
        "~/x.safetensors",
    ],
)
def test_weight_map_that_leaves_the_folder(runner: Runner, src: Path, secret: Path, value: str) -> None:
    point_index_at(src, str(secret) if value == "SECRET" else value)
    ended, opened = convert(runner, src)
    assert ended.code == 8, ended.text
    assert "expected a plain *.safetensors file name" in ended.text
    assert not [path for path in opened if path.startswith((str(secret.parent), "/proc/self/environ", "/dev/zero"))]
    assert not (src.parent / "dst").exists()


@pytest.mark.parametrize("target", ["SECRET", "/proc/self/environ", "/dev/zero", "/etc/passwd", "../secret"])
@pytest.mark.parametrize("name", [FIRST, INDEX_FILE, "config.json", "tokenizer.json"])
def test_link_out_of_the_folder(runner: Runner, src: Path, secret: Path, name: str, target: str) -> None:
    """A configuration or an index that is one would also be copied into what gets published."""
    (src / name).unlink(missing_ok=True)
    (src / name).symlink_to(secret if target == "SECRET" else target)
    resolved = str((src / name).resolve())
    ended, opened = convert(runner, src)
    assert ended.code == 8, ended.text
    assert not [path for path in opened if path.startswith(resolved)]
    assert not (src.parent / "dst").exists()


@pytest.mark.parametrize("name", [FIRST, INDEX_FILE, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "device"])
def test_name_that_is_no_regular_file(runner: Runner, src: Path, name: str, kind: str) -> None:
    """Opening a FIFO would wait for ever."""
    (src / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(src / name)
    elif kind == "folder":
        (src / name).mkdir()
    elif os.geteuid() == 0:
        os.mknod(src / name, 0o600 | 0o020000, os.makedev(1, 5))
    else:
        (src / name).symlink_to("/dev/zero")
    ended, opened = convert(runner, src)
    # what is only carried along is left behind
    assert ended.code == (0 if name == "tokenizer.json" and kind != "device" else ended.code), ended.text
    assert ended.code in (0, 4, 8), ended.text
    assert ended.code or name == "tokenizer.json"
    assert str(src / name) not in opened
    assert not (src.parent / "dst" / "tokenizer.json").exists()


def test_pickle_under_a_safetensors_name(runner: Runner, src: Path) -> None:
    (src / FIRST).write_bytes(pickle.dumps(Bomb()))
    ended, _ = convert(runner, src)
    assert ended.code == 4, ended.text


@pytest.mark.parametrize("name", ["pytorch_model.bin", "m.pt", "m.pkl", "m.ckpt", "m.pth", "m.pickle", "m.h5"])
def test_pickle_beside_the_shards_is_neither_opened_nor_copied(runner: Runner, src: Path, name: str) -> None:
    (src / name).write_bytes(pickle.dumps(Bomb()))
    ended, opened = convert(runner, src)
    assert ended.code == 0, ended.text
    assert str(src / name) not in opened
    assert not (src.parent / "dst" / name).exists()


def test_pickle_instead_of_shards(runner: Runner, src: Path) -> None:
    for path in src.glob("*.safetensors*"):
        path.unlink()
    (src / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    ended, opened = convert(runner, src)
    assert ended.code == 8, ended.text
    assert str(src / "pytorch_model.bin") not in opened


def test_code_of_the_checkpoint_is_neither_run_nor_copied_and_named(runner: Runner, src: Path) -> None:
    code = {"auto_map": {"AutoModel": "modeling_evil.Evil"}, "trust_remote_code": True}
    (src / "config.json").write_text(json.dumps(small_config(**code)))
    (src / "modeling_evil.py").write_text("import os\nos.system('echo RAN')\n")
    (src / "__init__.py").write_text("import os\nos.system('echo RAN')\n")
    ended, opened = convert(runner, src)
    assert ended.code == 0, ended.text
    assert not [path for path in opened if path.startswith(str(src)) and path.endswith(".py")]
    assert not list((src.parent / "dst").glob("*.py"))
    assert "Warning: The checkpoint brings code (__init__.py, modeling_evil.py)" in ended.text


@pytest.mark.parametrize("text", ["\x1b[31mred", "\u202egnp", "a\nError: b", "\x9b2J", "\x07", "<script>"])
def test_text_of_the_checkpoint_does_not_drive_the_terminal(runner: Runner, src: Path, text: str) -> None:
    def check() -> None:
        ended = runner(["convert", str(src), str(src.parent / "dst"), "--workers", "1"], src.parent)
        assert ended.code in (4, 8), ended.text
        assert not set(ended.text) & set("\x1b\u202e\x9b\x07")
        assert "\nError: b" not in ended.text

    original = (src / INDEX_FILE).read_text()
    for where in ("name", "file"):
        index = json.loads(original)
        index["weight_map"] |= {text: FIRST} if where == "name" else {"lm_head.weight": text}
        (src / INDEX_FILE).write_text(json.dumps(index))
        check()
    (src / INDEX_FILE).write_text(original)
    for change in ({"model_type": text}, {"hidden_act": text}, {text: text, "vocab_size": text}):
        (src / "config.json").write_text(json.dumps(small_config(**change)))
        check()


def test_side_files_with_hostile_names_stay_file_names(runner: Runner, src: Path) -> None:
    names = ("a\x1b[31m.txt", "b\n.txt", "c\\d.txt", "-rf.txt", "$(touch x).txt")
    for name in names:
        (src / name).write_text("text")
    ended = runner(["convert", str(src), str(src.parent / "dst"), "--json"], src.parent)
    assert ended.code == 0, ended.text
    assert "\x1b" not in ended.text
    assert {(src.parent / "dst" / name).read_text() for name in names} == {"text"}


def test_side_file_whose_name_is_not_utf8_is_refused_before_anything_is_written(runner: Runner, src: Path) -> None:
    """It ended as a bug of ours: a journal in UTF-8 cannot hold such a name."""
    (src / os.fsdecode(b"notes-\xff.txt")).write_text("text")
    ended = runner(["convert", str(src), str(src.parent / "dst")], src.parent)
    assert (ended.code, "expected a name in UTF-8" in ended.text) == (4, True), ended.text
    assert not (src.parent / "dst").exists()


def test_output_that_is_or_lies_in_the_source(runner: Runner, src: Path) -> None:
    before = sorted(src.rglob("*"))
    (src.parent / "link").symlink_to(src)
    for dst in (src, src / "sub", src.parent / "link", src.parent / "link" / "sub", src.parent / "x" / ".." / "src"):
        ended = runner(["convert", str(src), str(dst)], src.parent)
        assert ended.code == 2, ended.text
        assert sorted(src.rglob("*")) == before
