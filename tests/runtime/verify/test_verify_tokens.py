"""Token ids from files, and the texts that come with the package."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from converters.errors import Glm4MoeError, InputError, UsageError
from runtime.engine.tokenizer import Tokenizer
from runtime.verify.corpus import KINDS, default_corpus, encode_corpus
from runtime.verify.tokens import encode_text, encode_texts, encode_tokens, load_tokens


@dataclass(frozen=True)
class Sizes:
    context_length: int = 8
    stride: int | None = None
    num_tokens: int | None = None
    seed: int = 0


def write(folder: Path, name: str, value: object) -> Path:
    path = folder / name
    match path.suffix:
        case ".json":
            path.write_text(json.dumps(value))
        case ".npy":
            np.save(path, np.asarray(value))
        case _:
            save_file({"token_ids": torch.as_tensor(np.asarray(value))}, path)
    return path


@pytest.mark.parametrize("name", ["t.json", "t.npy", "t.safetensors"])
def test_every_kind_of_file_gives_the_same_ids(tmp_path: Path, name: str) -> None:
    assert load_tokens(write(tmp_path, name, [3, 1, 2])) == ((3, 1, 2),)
    assert load_tokens(write(tmp_path, name, [[3, 1, 2], [4, 5, 6]])) == ((3, 1, 2), (4, 5, 6))


def test_lists_of_json_may_differ_in_length(tmp_path: Path) -> None:
    assert load_tokens(write(tmp_path, "t.json", [[1], [2, 3]])) == ((1,), (2, 3))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("t.json", {"ids": [1]}),
        ("t.json", []),
        ("t.json", [1, 2.0]),
        ("t.json", [1, True]),
        ("t.json", [[1], 2]),
        ("t.json", [[1], []]),
        ("t.json", [1, -1]),
        ("t.npy", [1.0, 2.0]),
        ("t.npy", [[[1]]]),
        ("t.npy", [-5, 2]),
        ("t.safetensors", [1.0, 2.0]),
    ],
)
def test_other_contents_are_refused_by_the_option_and_file(tmp_path: Path, name: str, value: object) -> None:
    path = write(tmp_path, name, value)
    with pytest.raises(UsageError) as caught:
        load_tokens(path)
    assert caught.value.subject == f"--tokens {path}"


@pytest.mark.parametrize(("name", "data"), [("t.json", b"[1,"), ("t.npy", b"no array"), ("t.safetensors", b"\x01")])
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(Glm4MoeError, match=name):
        load_tokens(path)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="allow_pickle"):
        load_tokens(path)


@pytest.mark.parametrize("name", ["t.txt", "missing.json"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "t.txt").write_text("1 2")
    with pytest.raises(UsageError) as caught:
        load_tokens(tmp_path / name)
    assert name in caught.value.subject


def test_each_list_has_windows_of_its_own(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "t.json", [[1, 2, 3], [4, 5], list(range(10))])
    text = encode_tokens(tiny, path, Sizes())
    assert text.token_ids == (1, 2, 3, 4, 5, *range(10))
    assert [(window.begin, window.end) for window in text.plan.windows] == [(0, 3), (3, 5), (5, 13), (13, 15)]
    assert "(token ids of t.json)" in text.plan.protocol


def test_drawn_tokens_are_those_of_the_windows(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "t.npy", np.arange(400).reshape(4, 100))
    text = encode_tokens(tiny, path, Sizes(num_tokens=20, seed=5))
    assert len(text.token_ids) == text.plan.num_tokens == 20
    for window in text.plan.windows:
        ids = text.token_ids[window.begin : window.end]
        assert list(ids) == list(range(ids[0], ids[0] + len(ids)))
        assert ids[0] % 100 % 8 == 0


def test_ids_beyond_the_vocabulary_are_refused(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="below vocab_size 1024, found 1024"):
        encode_tokens(tiny, write(tmp_path, "t.json", [1, 1024]), Sizes())


def test_a_single_token_is_refused_by_its_option(tiny: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "t.json", [[1], [2]])
    with pytest.raises(UsageError) as caught:
        encode_tokens(tiny, path, Sizes())
    assert caught.value.subject == f"--tokens {path}"


def test_windows_beyond_the_models_context_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="--context-length: expected at most 2048"):
        encode_text(tiny, "some text", Sizes(context_length=2049))


def test_another_models_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "config.json"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 50}))
    with pytest.raises(InputError, match="another model's tokenizer"):
        encode_texts(tmp_path, ["import os", "def f(self):"], Sizes())


def test_one_text_is_taken_from_its_begin(tiny: Path) -> None:
    text = encode_text(tiny, "def f(self):\n    return 1\n" * 9, Sizes(num_tokens=12, seed=7))
    assert text.token_ids == tuple(Tokenizer.open(tiny).encode("def f(self):\n    return 1\n" * 9))[:12]
    assert text.plan.protocol.startswith("first 12 of ")


def test_the_corpus_has_five_kinds_without_special_tokens(tiny: Path) -> None:
    corpus = default_corpus()
    assert tuple(corpus.texts) == KINDS
    assert 15_000 < sum(len(text.encode()) for text in corpus.texts.values()) < 60_000
    tokenizer = Tokenizer.open(tiny)
    ids = {token for text in corpus.texts.values() for token in tokenizer.encode(text)}
    assert not ids & tokenizer.special_ids
    for text in corpus.texts.values():
        assert "<|" not in text
        assert "think>" not in text
    assert sum("\u4e00" <= character <= "\u9fff" for character in corpus.texts["chinese"]) > 500


def test_few_tokens_of_the_corpus_come_from_every_kind(tiny: Path) -> None:
    text = encode_corpus(tiny, Sizes(context_length=64, num_tokens=512))
    lists = [Tokenizer.open(tiny).encode(one) for one in default_corpus().texts.values()]
    met = set()
    for window in text.plan.windows:
        ids = list(text.token_ids[window.begin : window.end])
        met |= {
            kind
            for kind, whole in zip(KINDS, lists, strict=True)
            if any(whole[begin : begin + len(ids)] == ids for begin in range(0, len(whole), 64))
        }
    assert met == set(KINDS)
    assert (
        "5 texts (built-in corpus 1: prose, code, mathematics, chinese, dialogue), windows drawn" in text.plan.protocol
    )
