import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from converters.errors import InputError, UsageError
from runtime.engine.tokenizer import TextStream, Tokenizer

TEXTS = (
    "plain\n\ttext",
    "\u00fcber \u4f60\u597d",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family",
    "a\ufffdb",
    "\x00\x7f\xa0\xad",
)


@pytest.fixture
def tokenizer(byte_tokenizer_folder) -> Tokenizer:
    return Tokenizer.open(byte_tokenizer_folder)


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip_and_transformers_agree(byte_tokenizer_folder, tokenizer, text):
    from transformers import PreTrainedTokenizerFast

    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    hf = PreTrainedTokenizerFast(tokenizer_file=str(byte_tokenizer_folder / "tokenizer.json"))
    assert hf.encode(text, add_special_tokens=False) == ids
    assert hf.decode(ids) == text


def test_tokenizer_names_of_special_tokens_become_them(tokenizer):
    assert tokenizer.encode("<|user|>a<think>")[::2] == [257, 259]


def test_tokenizer_decode_skips_special_tokens_but_not_tags(tokenizer):
    ids = [257, *tokenizer.encode("hi"), 259, 260, 256]
    assert tokenizer.decode(ids) == "hi<think></think>"
    assert tokenizer.decode(ids, skip_special=False) == "<|user|>hi<think></think><|endoftext|>"


def test_tokenizer_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(UsageError) as error:
        tokenizer.encode("caf\udce9")
    assert str(error.value) == "prompt: expected valid UTF-8, found surrogates not allowed"


def test_stream_holds_an_emoji_back_until_its_last_byte(tokenizer):
    stream = TextStream(tokenizer)
    pieces = [stream.push(token_id) for token_id in tokenizer.encode("a\U0001f600b")]
    assert pieces == ["a", "", "", "", "\U0001f600", "b"]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_never_shows_a_replacement_that_the_text_does_not_have(tokenizer, text):
    ids = tokenizer.encode(text)
    for stop in range(len(ids) + 1):
        shown = tokenizer.decode(ids[:stop])
        assert text.startswith(shown)
        assert len(text) > len(shown) or stop == len(ids)


def test_stream_bytes_that_can_never_be_text_become_a_replacement(tokenizer):
    """The stream must go on after them; windowed detokenizers wait for ever."""
    lead = tokenizer.encode("\u00e9")[0]
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in [lead, *tokenizer.encode("ab")]] == ["", "\ufffda", "b"]


def test_stream_special_token_inside_a_character_is_passed_over(tokenizer):
    first, second = tokenizer.encode("\u00e9")
    stream = TextStream(tokenizer)
    assert [stream.push(token_id) for token_id in (first, 256, second)] == ["", "", "\u00e9"]


def test_stream_padding_id_is_no_text(tokenizer):
    assert TextStream(tokenizer).push(300) == ""


def test_stream_equals_the_librarys_decoder_on_every_token(byte_tokenizer_folder, tokenizer):
    backend = Backend.from_file(str(byte_tokenizer_folder / "tokenizer.json"))
    for token_id in range(backend.get_vocab_size()):
        expected = backend.decode([token_id], skip_special_tokens=False)
        assert tokenizer.token_bytes(token_id).decode(errors="replace") == expected


def test_tokenizer_missing_malformed_or_foreign_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError) as error:
        Tokenizer.open(tmp_path)
    assert str(error.value) == f"{path}: expected a tokenizer file of at most 256 MiB, found none"
    path.write_text('{"version": "1.0"')
    with pytest.raises(InputError, match=r"tokenizer\.json: expected a tokenizer, found"):
        Tokenizer.open(tmp_path)
    foreign = Backend(models.WordLevel({"a": 0}, unk_token="a"))
    foreign.decoder = decoders.WordPiece()
    foreign.save(str(path))
    with pytest.raises(InputError, match="expected a byte-level tokenizer, found WordPiece"):
        Tokenizer.open(tmp_path)
