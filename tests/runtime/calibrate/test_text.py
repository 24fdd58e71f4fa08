"""Which tokens are used: windows of all texts, drawn by seed."""

import hashlib

import pytest

from converters.errors import InputError, UsageError
from runtime.calibrate.options import CalibrateOptions
from runtime.calibrate.text import read_texts
from runtime.engine.tokenizer import Tokenizer


@pytest.fixture
def texts(tmp_path, held_out):
    """Two stretches of the held-out text."""
    lines = held_out.read_text().splitlines(keepends=True)
    paths = tmp_path / "a.txt", tmp_path / "b.txt"
    for path, part in zip(paths, (lines[:40], lines[40:90]), strict=True):
        path.write_text("".join(part))
    return paths


def test_all_tokens_are_used_where_the_texts_have_no_more(tiny, texts):
    encode = Tokenizer.open(tiny).encode
    ids = [encode(path.read_text()) for path in texts]
    text = read_texts(tiny, texts, CalibrateOptions(num_tokens=10**6, context_length=100))
    assert text.windows == tuple(
        tuple(part[begin : begin + 100]) for part in ids for begin in range(0, len(part), 100) if len(part) - begin > 1
    )
    assert text.available == sum(map(len, ids))
    assert [entry["sha256"] for entry in text.texts] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in texts]
    assert text.bounds[-1][1] == text.num_tokens


def test_windows_are_drawn_by_seed_in_the_order_of_the_texts(tiny, texts):
    everything = read_texts(tiny, texts, CalibrateOptions(num_tokens=10**6, context_length=50)).windows
    options = [CalibrateOptions(num_tokens=310, context_length=50, seed=seed) for seed in (0, 0, 1)]
    drawn = [read_texts(tiny, texts, one) for one in options]
    assert drawn[0].windows == drawn[1].windows != drawn[2].windows
    for text in drawn:
        assert text.num_tokens == 310
        places = [next(i for i, whole in enumerate(everything) if whole[: len(w)] == w) for w in text.windows]
        assert places == sorted(set(places))
        cut = [w for place, w in zip(places, text.windows, strict=True) if w != everything[place]]
        assert len(cut) <= 1


@pytest.mark.parametrize(
    ("content", "options", "subject"),
    [
        (b"", {}, "--text"),
        (b"\xff\xfe", {}, "--text"),
        (b"some words", {"context_length": 4096}, "--context-length"),
    ],
)
def test_nothing_to_measure_is_refused(tiny, tmp_path, content, options, subject):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_texts(tiny, [path], CalibrateOptions(**options))
    assert caught.value.subject.startswith(subject)


@pytest.mark.parametrize(
    ("field", "value"), [("num_tokens", 1), ("context_length", 1), ("min_expert_tokens", -1), ("seed", -1)]
)
def test_options_refuse_sizes_that_measure_nothing(field, value):
    with pytest.raises(UsageError) as caught:
        CalibrateOptions(**{field: value})
    assert caught.value.subject == "--" + field.replace("_", "-")


def test_another_models_tokenizer_is_refused(small, tiny, tmp_path):
    (small / "tokenizer.json").write_bytes((tiny / "tokenizer.json").read_bytes())
    path = tmp_path / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 4)
    with pytest.raises(InputError, match="token ids below vocab_size 64"):
        read_texts(small, [path], CalibrateOptions())
