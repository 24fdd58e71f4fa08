"""Shared parameter types: what they take, and that they name what they refuse."""

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converters.checkpoint.packing import DEFAULT_MAX_SHARD_BYTES
from converters.pipeline import DEFAULT_MAX_MEMORY
from glm4moe_cli import _options
from glm4moe_cli._options import ByteSize, spell_size


def parse(text: str) -> int:
    return ByteSize().convert(text, None, None)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("1", 1),
        ("1000000", 1_000_000),
        ("7b", 7),
        ("5GB", 5 * 10**9),
        ("5gb", 5 * 10**9),
        ("512MiB", 512 * 2**20),
        ("1.5 GiB", 3 * 2**29),
        ("0.5kB", 500),
        ("20MB", 20 * 10**6),
        ("1KiB", 1024),
        ("2TB", 2 * 10**12),
        ("2TiB", 2 * 2**40),
        (" 3GB ", 3 * 10**9),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_size_is_read_exactly(text: str, num_bytes: int) -> None:
    assert parse(text) == num_bytes


@pytest.mark.parametrize(
    "text",
    ["", "0", "0GB", "-5GB", "+5GB", "5G", "5 G B", "GB", "1e9", "0x10", "1.", ".5GB", "5PB", "1,5GB", "nan", "inf",
     "1.5", "0.3kiB", "9223372036854775808", "9" * 5000, "\u0665GB", "5GB\n5GB", "1_000"],
)  # fmt: skip
def test_nonsense_is_refused_by_name(text: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        parse(text)
    assert refused.value.message == f"{text!r} is not a size such as 5GB, 512MiB or 1000000 (bytes)"


@given(
    st.integers(1, 2**63 - 1) | st.integers(1, 9000).flatmap(lambda n: st.sampled_from([n << 20, n << 30, n * 10**9]))
)
def test_spelled_size_reads_back(num_bytes: int) -> None:
    assert parse(spell_size(num_bytes)) == num_bytes


def all_shared_options() -> click.Command:
    @click.command()
    @_options.src_argument
    @_options.dst_argument
    @_options.dry_run_option
    @_options.workers_option
    @_options.max_memory_option
    @_options.max_shard_size_option
    @_options.device_option
    def command(**options: object) -> None: ...

    return command


def test_defaults_are_the_library_s_and_help_shows_them() -> None:
    command = all_shared_options()
    with command.make_context("x", [".", "new"]) as context:
        assert context.params["max_memory"] == DEFAULT_MAX_MEMORY
        assert context.params["max_shard_size"] == DEFAULT_MAX_SHARD_BYTES
        assert context.params["workers"] >= 1
        shown = " ".join(command.get_help(context).split())
    assert "--max-memory SIZE Most memory that tensors in flight may take together. [default: 512MiB]" in shown
    assert "--max-shard-size SIZE Largest file to write. [default: 5GB]" in shown
    assert "--workers N Threads that work at once. [default: (one per core); x>=1]" in shown


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent", "new"], "Directory 'absent' does not exist."),
        ([__file__, "new"], f"Directory '{__file__}' is a file."),
        ([".", __file__], f"Directory '{__file__}' is a file."),
        ([".", "new", "--workers", "0"], "0 is not in the range x>=1."),
        ([".", "new", "--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda'."),
        ([".", "new", "--max-memory", "5G"], "'5G' is not a size such as 5GB, 512MiB or 1000000 (bytes)"),
    ],
)
def test_wrong_value_is_refused_by_name(args: list[str], message: str) -> None:
    with pytest.raises(click.BadParameter) as refused:
        all_shared_options().make_context("x", args)
    assert refused.value.message == message
