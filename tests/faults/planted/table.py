"""The table of planted faults. `python -m tests.faults.planted.table` in the repository's root writes it anew."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT / "tests")] * (str(ROOT / "tests") not in sys.path)

from converters.contents import check_contents  # noqa: E402
from converters.findings import Severity  # noqa: E402
from runtime.verify.tokens import EncodedText  # noqa: E402
from tests.faults.planted.at_layers import CASES as LAYER_CASES  # noqa: E402
from tests.faults.planted.at_layers import Case, Seen, section, see, text  # noqa: E402
from tests.faults.planted.clean import Clean, clean_runs  # noqa: E402
from tests.faults.planted.copies import Copies  # noqa: E402
from tests.faults.planted.faults import FAULTS, Fault  # noqa: E402
from tests.faults.planted.outcome import Outcome, outcome, verify  # noqa: E402

DOCUMENT = ROOT / "docs" / "planted-faults.md"
CASES = tuple((fault, form) for fault in FAULTS for form in fault.forms)
FIRST_BEYOND = 33
_HEAD = """# Planted faults

What `glm4moe verify` makes of faults that converters, quantizers and sharders are known for. Each is planted in copies
of `fixtures/tiny`: plain bf16, FP8 per channel, FP8 in blocks, INT8, NVFP4, and shards for `--tp 2 --ep 2`. The copies
have no manifest that tells of a changed byte, so that only the comparison with the source can find them; with one,
level `bytes` finds every changed tensor. No model is run: structure and weights are enough for all of them.

*Caught by*: the level with the first finding; `refused`: headers, index or config contradict each other; the command
warns of the cause and ends with exit code 4 and the first contradiction; `warn`: a warning, exit code 0 without
`--strict`. *Named*: findings or cause name the damaged tensors and
no other. *Cause*: what the diagnosis proved on the bytes, of the first copy. Faults and hypotheses come from one hand:
the counts say that these faults are known, not how many unknown ones would be.
"""


def new_room() -> Path:
    """Return an empty folder, in memory where possible."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="glm4moe-planted-", dir=shared if shared.is_dir() else None))


def plant(copies: Copies, fault: Fault, form: str, work: Path) -> Outcome:
    """Plant one fault in an empty folder, and remove it again."""
    folder = work / "planted"
    folder.mkdir()
    return outcome(copies, fault, form, folder)


def at_layers(copies: Copies, case: Case, work: Path, read: EncodedText) -> Seen:
    """Plant one fault in an empty folder, see what the layers make of it, and remove it again."""
    folder = work / "at-layers"
    folder.mkdir()
    return see(copies, case, folder, read)


def alarms(run: Clean, work: Path) -> list[str]:
    """Return what a verification says of a conversion with nothing wrong."""
    folder = work / "clean"
    folder.mkdir()
    try:
        source, made = run.make(folder)
        verified, contents = verify(source, made, run.workers), check_contents(made, 1, lambda _: lambda _: None)
    finally:
        shutil.rmtree(folder)
    return [str(one) for one in (*verified.findings, *verified.causes, *contents.findings)]


def counts(outcomes: Sequence[Outcome]) -> str:
    """Return the line of counts."""
    faults = len({one.fault.number for one in outcomes})
    caught, named = sum(one.is_caught for one in outcomes), sum(one.is_named for one in outcomes)
    proved = sum(one.cause is not None for one in outcomes)
    return f"{faults} faults in {len(outcomes)} copies: {caught} caught, {named} named right, {proved} causes proved"


def document(outcomes: Sequence[Outcome], num_clean: int, num_alarms: int) -> str:
    """Return the page."""
    first = [one for one in outcomes if one.fault.number < FIRST_BEYOND]
    lines = [
        _HEAD,
        f"Of the list of 32: {counts(first)}. ",
        f"With what a diagnosis should know besides: {counts(outcomes)}. ",
        f"{num_clean} conversions with nothing wrong: {num_alarms} false alarms.",
        "",
        "| # | fault | copies | caught by | named | cause |",
        "|---|---|---|---|---|---|",
        *(_row([one for one in outcomes if one.fault is fault]) for fault in FAULTS),
    ]
    return "\n".join(lines).replace(". \n", ".\n") + "\n"


def _row(outcomes: Sequence[Outcome]) -> str:
    fault = outcomes[0].fault
    levels = dict.fromkeys(_level(one) for one in outcomes)
    named, cause = sum(one.is_named for one in outcomes), outcomes[0].cause
    said = cause.sentence if cause else "none proved"
    proved = sum(one.cause is not None for one in outcomes)
    partly = "" if proved in (0, len(outcomes)) else f" ({proved} of {len(outcomes)})"
    cells = (
        str(fault.number),
        fault.title,
        ", ".join(one.form for one in outcomes),
        ", ".join(levels),
        f"{named} of {len(outcomes)}",
        said.replace("|", "\\|") + partly,
    )
    return f"| {' | '.join(cells)} |"


def _level(one: Outcome) -> str:
    level = one.verified.level or "nothing"
    return f"{level} (warn)" if one.verified.severity == Severity.WARN else level


def main() -> None:
    """Run everything and write the page."""
    work = new_room()
    try:
        copies = Copies(work)
        outcomes = [plant(copies, fault, form, work) for fault, form in CASES]
        read = text()
        seen = [at_layers(copies, case, work, read) for case in LAYER_CASES]
        runs = clean_runs()
        wrong = [run.label for run in runs if alarms(run, work)]
    finally:
        shutil.rmtree(work)
    DOCUMENT.write_text(document(outcomes, len(runs), len(wrong)) + section(seen))


if __name__ == "__main__":
    main()
