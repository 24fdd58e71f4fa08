"""The HTML report: one well-formed file without requests, everything escaped, and the report's own numbers in it."""

import math
import re
import tomllib
import unicodedata
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import verify_reports as made

from converters.compare import Outcome, StructureReport
from converters.diagnosis.cause import Cause, CauseCode
from converters.findings import Finding, Severity, fail
from runtime.verify.engine_logprobs import EngineComparison
from runtime.verify.limits import Overrides, choose_limits
from runtime.verify.report import Levels, VerifyReport, build_report
from runtime.verify.report_html import colours, curves, heat
from runtime.verify.report_html.bars import log_bins
from runtime.verify.report_html.page import render_page
from runtime.verify.report_html.svg import LinearScale, LogScale, nice_step
from runtime.verify.report_html.tokens import worst_tokens
from runtime.verify.report_html.words import duration, figure, percent, visible, visible_token, with_error
from runtime.verify.results import ModelComparison
from runtime.verify.routing import LayerRouting
from runtime.verify.summary import Estimate
from runtime.verify.text_answers import Answer
from runtime.verify.text_results import TextProblem, TextReport, TextResult

HOSTILE = "</script></title></style><img src=x onerror=\"alert('1')\">\u202e\x1b[31m&amp;"
ROOT = Path(__file__).parents[3]
SHOWN = "</script></title></style><img src=x onerror=\"alert('1')\">[U+202E][U+001B][31m&amp;"
STYLE = Path(colours.__file__).with_name("style.css").read_text()
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """A parsed page that insists on balanced tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] == "title":
            self.titles[-1] += data

    @property
    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag != "style")

    def table(self, *head: str) -> list[list[str]]:
        """The rows of the table whose columns begin with these names."""
        (found,) = (table for table in self.tables if tuple(table[0][: len(head)]) == head)
        return found[1:]


def structure(*findings: Finding) -> StructureReport:
    return StructureReport("source", "candidate", findings, {Outcome.SAME: 3, Outcome.QUANTIZED: 7}, "present", ())


def report(models: ModelComparison | None = None, **levels) -> VerifyReport:
    limits = choose_limits("fp8", Overrides()) if models else None
    folders = Path("models/source"), Path("models/candidate")
    return build_report(folders, "fp8", Levels(layers=models, **levels), limits)


def full_report() -> VerifyReport:
    found = report(
        made.comparison(), structure=structure(fail("a", "b", "c")), weights=made.certificate(outside=2, first="at 0")
    )
    causes = (Cause(CauseCode.EXCHANGED, "layer 1", "experts 0 and 1 are exchanged", "64 of 64 equal", "Do it again."),)
    return replace(found, causes=causes, provenance={"versions": {"glm4moe": "0.1.0"}})


def numbers(cell: str) -> list[float]:
    return [float(word) for word in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", cell.replace("\u2212", "-"))]


def test_page_is_one_well_formed_file_without_any_reference() -> None:
    html = render_page(full_report(), lambda ids: "".join(f" t{token}" for token in ids))
    page = Page(html)
    assert html.startswith("<!DOCTYPE html>")
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 5
    for tag, attrs in page.tags:
        assert tag not in {"script", "img", "link", "iframe", "object", "embed", "form", "base", "use", "image"}
        assert not {name for name in attrs if name.startswith("on") or name in {"src", "xlink:href", "style"}}
        if "href" in attrs:
            assert attrs["href"].removeprefix("#") in ids
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert "@LIGHT@" not in html


def test_drawings_and_tables_are_named_for_those_who_do_not_see_them() -> None:
    page = Page(render_page(full_report()))
    drawings = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    # histogram, confidence, three errors, routing, three maps of experts, weights
    assert len(drawings) == 10
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert ("html", {"lang": "en"}) in page.tags
    assert all(attrs.get("scope") == "col" for tag, attrs in page.tags if tag == "th")


def test_text_from_elsewhere_is_escaped_everywhere() -> None:
    plain = Page(render_page(full_report(), lambda ids: "word "))
    found = full_report()
    models = made.comparison()
    layers = (*models.layers[:-1], replace(models.layers[-1], first_non_finite=HOSTILE))
    models = replace(models, notes=(HOSTILE,), protocol=HOSTILE, layers=layers, device=HOSTILE)
    weights = made.certificate(tensor=HOSTILE, outside=1, first=HOSTILE, scheme=HOSTILE)
    cause = Cause(CauseCode.GAIN, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    found = report(models, structure=structure(fail(HOSTILE, HOSTILE, HOSTILE)), weights=weights)
    found = replace(
        found,
        source=HOSTILE,
        candidate=HOSTILE,
        scheme=HOSTILE,
        reasons=(HOSTILE,),
        causes=(cause,),
        not_checked=(HOSTILE,),
        provenance={HOSTILE: {HOSTILE: HOSTILE}},
    )
    html = render_page(found, lambda ids: HOSTILE)
    page = Page(html)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in plain.tags}
    assert {name for _, attrs in page.tags for name in attrs} == {name for _, attrs in plain.tags for name in attrs}
    assert page.text.count(SHOWN) > 60
    assert [
        character for character in html if unicodedata.category(character) in ("Cc", "Cf") and character != "\n"
    ] == []


def test_checks_hold_the_numbers_of_the_report() -> None:
    found = full_report()
    rows = Page(render_page(found)).table("verdict", "metric", "value")
    assert len(rows) == len(found.checks) > 8
    for row, check in zip(rows, found.checks, strict=True):
        assert row[0].endswith(check.verdict.upper())
        assert row[1].startswith(check.metric)
        assert check.place in row[1]
        value, *error = numbers(row[2])
        assert value == pytest.approx(check.value, rel=1e-3)
        assert error[:1] == ([] if check.se is None else [pytest.approx(check.se, rel=0.05)])
        interval = () if check.ci95 is None else check.ci95
        assert numbers(row[3]) == [pytest.approx(end, rel=1e-3) for end in interval]
        bars = [] if check.bound is None else list(dict.fromkeys((check.bound.warn, check.bound.fail)))
        assert numbers(row[5]) == ([0.0] if check.bound is None else [pytest.approx(bar, rel=1e-3) for bar in bars])


def test_layers_experts_and_tokens_hold_the_numbers_of_the_report() -> None:
    models = made.comparison(3, 6)
    assert models.tokens is not None
    models = replace(models, layers=tuple(replace(one, mlp_norm=made.output_error(0.003)) for one in models.layers))
    page = Page(render_page(report(models)))
    assert "Norm before the MLP" in page.text
    rows = page.table("layer", "attention error")
    assert [row[0] for row in rows] == ["0", "1", "2", "3 (MTP)"]
    for row, layer in zip(rows, models.layers, strict=True):
        assert layer.mlp_norm is not None
        errors = layer.attention, layer.mlp_norm, layer.mlp, layer.residual
        for cell, error in zip(row[1::5], errors, strict=True):
            assert numbers(cell) == [pytest.approx(error.relative, rel=5e-3)]
    for layer in models.layers[1:]:
        name = f"MTP layer {layer.layer}" if layer.is_mtp else f"layer {layer.layer}"
        for expert in layer.experts:
            words = f"{name} expert {expert.expert}: {figure(expert.relative)}; {expert.num_tokens} tokens"
            assert sum(title.startswith(words) for title in page.titles) == 3
    histogram = page.table("from, nats", "to, nats")
    assert sum(int(row[2]) for row in histogram) == len(models.tokens.scores)
    worst = models.tokens.scores.kl_nats.max().item()
    assert f"KL {figure(worst)}" in page.text


def test_verdict_and_sentence_come_first_and_causes_next() -> None:
    found = full_report()
    page = Page(render_page(found))
    sentence = found.headline.removeprefix("FAIL: ")
    places = [page.text.index(words) for words in ("FAIL", sentence, "experts 0 and 1 are exchanged", "Reasons")]
    assert places == sorted(places)
    order = [attrs["id"] for tag, attrs in page.tags if tag == "section"]
    assert order == "causes reasons checks logits layers experts mtp weights findings provenance".split()


def test_findings_do_not_crowd_out_other_reasons() -> None:
    findings = [fail("tensor", "a", str(number)) for number in range(30)]
    found = report(made.comparison(), structure=structure(*findings))
    page = Page(render_page(found))
    others = [reason for reason in found.reasons if not reason.startswith("tensor: expected a")]
    assert [reason for reason in others if reason in page.text] == others[:9]
    section = page.text[page.text.index("Reasons") : page.text.index("Not checked")]
    assert section.count("tensor: expected a") == 3
    assert f"and {len(found.reasons) - 3 - len(others[:9])} more" in section


def test_template_and_style_are_part_of_the_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = Path(colours.__file__).parent
    others = {path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(listed["runtime.verify.report_html"]) == others


def test_on_paper_tables_may_end_on_the_next_page_and_headings_stay_with_what_follows() -> None:
    """A table was moved to the next page as a whole, and half a page before it stayed empty."""
    printed = STYLE.split("@media print{", 1)[1]
    rules = dict(re.findall(r"^([^@{}]+)\{([^}]*)\}", printed, re.M))
    whole = {name for names, rule in rules.items() if rule == "break-inside:avoid" for name in names.split(",")}
    assert {"figure", "tr"} <= whole
    assert whole.isdisjoint({".scroll", "table", "tbody", "section", "ul", "ol", "dl"})
    followed = {name for names, rule in rules.items() if rule == "break-after:avoid" for name in names.split(",")}
    assert {"h2", "h3", "figcaption", "caption", "thead", "tr:nth-child(-n+3)"} <= followed


def test_levels_that_were_not_run_have_no_section() -> None:
    page = Page(render_page(report(structure=structure())))
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"] == ["checks", "provenance"]
    assert "weights element by element" in page.text
    assert "PASS" in page.text


def test_routing_against_a_stored_reference_has_a_table() -> None:
    page = Page(render_page(report(structure=structure(), routing=(LayerRouting(3, 400, 0.975, 0.1),))))
    assert page.table("layer", "tokens") == [["3", "400", "97.50%", "10.00%"]]


def test_equal_reports_give_equal_pages() -> None:
    assert render_page(full_report()) == render_page(full_report())


def test_a_page_of_the_largest_model_stays_small_and_names_every_expert() -> None:
    models = made.comparison(92, 160, num_tokens=500, dense=3)
    html = render_page(report(models, weights=made.certificate(92, 160, error=0.5)))
    assert len(html.encode()) < 3_000_000
    page = Page(html)
    assert sum(bool(re.match(r"(MTP )?layer \d+ expert \d+: ", title)) for title in page.titles) == 90 * 160


def test_equal_models_are_said_to_be_equal() -> None:
    models = made.comparison()
    same = replace(made.output_error(0.0), floor_relative=None)
    layers = tuple(
        replace(
            layer,
            attention=same,
            mlp=same,
            residual=same,
            router=layer.router and made.router(0.0),
            router_own=layer.router_own and made.router(0.0),
            experts=tuple(replace(expert, relative=0.0, slope=1.0) for expert in layer.experts),
        )
        for layer in models.layers
    )
    page = Page(render_page(report(replace(models, layers=layers))))
    assert "all layers equal" in page.text
    assert page.text.count("equal in every layer") == 3
    assert page.text.count("no token is sent to other experts") == 1
    assert page.text.count("0 for every expert") == 1
    assert {row[1] for row in page.table("layer", "attention error")} == {"0"}


def test_nan_and_infinity_are_shown() -> None:
    models = made.comparison()
    bad = made.output_error(math.nan)
    first = replace(models.layers[1], attention=bad, residual=made.output_error(math.inf))
    experts = (replace(first.experts[0], relative=math.nan), *first.experts[1:])
    layers = (models.layers[0], replace(first, experts=experts), *models.layers[2:])
    page = Page(render_page(report(replace(models, layers=layers))))
    assert page.table("layer", "attention error")[1][1] == "NaN"
    assert page.table("layer", "attention error")[1][16] == "\u221e"
    assert page.table("layer", "expert", "error")[0][:3] == ["1", "0", "NaN"]
    assert ("path", "cell off") in {(tag, attrs.get("class")) for tag, attrs in page.tags}


def test_tokens_without_finite_logits_are_counted_and_left_out() -> None:
    models = made.comparison()
    assert models.tokens is not None
    scores = models.tokens.scores
    bad = torch.zeros(len(scores), dtype=torch.bool)
    bad[5] = True
    half = replace(scores, finite_candidate=~bad, kl_nats=scores.kl_nats.masked_fill(bad, math.nan))
    text = Page(render_page(report(replace(models, tokens=replace(models.tokens, scores=half))))).text
    assert "NaN or Inf logits: 1 token; no figure" in text
    none = replace(scores, finite_candidate=torch.zeros_like(bad))
    page = Page(render_page(report(replace(models, summary=None, tokens=replace(models.tokens, scores=none)))))
    assert f"NaN or Inf logits: {len(scores)} tokens; no figure" in page.text
    assert "Tokens that changed most" not in page.text


def test_answers_and_engine_are_shown_escaped() -> None:
    answers = [
        Answer((1, 2), f"{HOSTILE}\n{name}", "stop", name == "theirs", ("get_weather",)) for name in ("ours", "theirs")
    ]
    results = (TextResult("greeting", 9, answers[0], answers[1], 1, 0.25), TextResult("other", 9, *answers, None, None))
    text = TextReport(HOSTILE, results, (TextProblem(Severity.FAIL, "greeting", HOSTILE),))
    change = Estimate(0.0123, 0.004, 0.003)
    engine = EngineComparison(
        HOSTILE, "p", "float32", 1234, 1000, change, 0.02, 0.3, 7, 5.0, 5.1, 0.004, None, 0.97, 20, 10, 0.2,
        {1: 0.97}, (HOSTILE,),
    )  # fmt: skip
    page = Page(render_page(report(structure=structure(), text=text, runtime=engine)))
    assert page.text.count(SHOWN) >= 2 + 4 + 2
    assert f"{SHOWN}\u21b5theirs" in page.text
    assert "first difference at token 1, 0.25 nats less likely" in page.text
    assert "runs in circles" in page.text
    values = dict(page.table("figure", "value"))
    assert values["NLL, engine less ours, mean"] == "0.0123 \u00b1\u00a00.004 nats"
    assert values["the engine's first choice is among our first 1"] == "97.00%"
    assert [attrs["id"] for tag, attrs in page.tags if tag == "section"][-3:] == ["text", "engine", "provenance"]


def test_worst_tokens_stand_in_their_context() -> None:
    tokens = made.token_table(200, torch.Generator().manual_seed(1))
    found = worst_tokens(tokens, lambda ids: " ".join(f"<{token}>" for token in ids), most=4)
    kl = tokens.scores.kl_nats
    assert [token.kl_nats for token in found] == kl.sort(descending=True).values[:4].tolist()
    for token in found:
        row = int((tokens.positions_T == token.index).nonzero())
        window = tokens.windows[int(tokens.windows_T[row])]
        assert token.window == window.index
        before = tokens.token_ids[max(window.begin, token.index - 16) : token.index]
        after = tokens.token_ids[token.index + 1 : min(window.end, token.index + 7)]
        assert token.before == " ".join(f"<{one}>" for one in before)
        assert token.token == f"<{token.token_id}>" == f"<{tokens.token_ids[token.index]}>"
        assert token.after == " ".join(f"<{one}>" for one in after)
        assert token.p_candidate - token.p_reference == pytest.approx(float(tokens.scores.delta_p[row]), abs=1e-12)


def test_worst_tokens_without_a_tokenizer_are_ids() -> None:
    tokens = made.token_table(60, torch.Generator().manual_seed(1))
    (found,) = worst_tokens(tokens, None, most=1)
    assert found.token == str(tokens.token_ids[found.index])


def test_histogram_bins_hold_every_token_once() -> None:
    bins = log_bins([-1e-12, 0.0, 2e-9, 1.0e-3, 1.5e-3, 0.5, 1.0])
    assert [item.count for item in bins if item.count] == [2, 1, 2, 1, 1]
    assert bins[0].low == 0.0
    (milli,) = (item for item in bins if item.low <= 1e-3 < item.high)
    assert (milli.low, milli.high, milli.count) == (pytest.approx(1e-3), pytest.approx(10**-2.75), 2)
    assert bins[-1].high > 1.0
    assert sum(item.count for item in log_bins([0.0] * 3)) == 3


def test_scales_place_values() -> None:
    scale = LogScale.around([0.002, 0.3, None, 0.0, math.nan, math.inf], 100.0, 0.0)
    assert (scale.low, scale.high) == (0.001, 1.0)
    assert [scale.at(value) for value in (0.001, 0.01, 0.1, 1.0)] == pytest.approx([100.0, 200 / 3, 100 / 3, 0.0])
    assert (scale.at(1e-9), scale.at(50.0)) == (100.0, 0.0)
    linear = LinearScale.up_to(7.3, 10.0, 90.0)
    assert (linear.high, linear.at(4.0), linear.at(-1.0)) == (8.0, 50.0, 10.0)
    assert [text for _, text in linear.ticks()] == ["0", "2", "4", "6", "8"]
    assert [nice_step(span, 5) for span in (1, 7, 10, 26, 0)] == [0.2, 2.0, 2.0, 10.0, 1.0]


def test_curves_put_points_where_their_values_are() -> None:
    values = (0.01, 0.1, None, 0.0, math.nan, 0.05)
    curve = curves.Curve("error", "s-error", values, has_points=True)
    svg = curves.draw(curves.Panel("title", tuple(range(6)), 1, (curve,), tuple("abcdef"), marked=1))
    page = Page(svg)
    points = [(float(attrs["cx"]), float(attrs["cy"])) for tag, attrs in page.tags if tag == "circle"]
    scale = LogScale.around(values, curves.HEIGHT - 40.0, 14.0)
    assert [y for _, y in points] == [pytest.approx(scale.at(value), abs=0.01) for value in (0.01, 0.1, 0.05)]
    assert [text for tag, text in page.texts if tag == "text" and text in ("0", "\u00d7", "MTP", "layer 1")] == [
        "0", "MTP", "0", "\u00d7", "layer 1",
    ]  # fmt: skip
    assert page.titles == list("abcdef")


def test_heat_map_cells_have_the_colours_of_their_values() -> None:
    ramp = heat.Ramp("s", 0.01, 1.0, is_log=True, words=figure)
    values = (0.001, 0.01, 0.0999, 0.101, 1.0, 5.0, 0.0, None, math.nan)
    classes = ["s0", "s0", "s7", "s8", "s15", "s15", "zero", "none", "off"]
    assert [ramp.class_of(value) for value in values] == classes
    drawn = heat.Map("title", (4,), 0, (values,), ramp, lambda row, column: f"{row} {column}", ("row",))
    page = Page(heat.draw(drawn))
    paths = {attrs["class"]: attrs["d"] for tag, attrs in page.tags if tag == "path" and "class" in attrs}
    # neighbours of one colour are one rectangle
    assert paths["cell s0"] == "M0 0h2v1H0z"
    assert paths["cell s15"] == "M4 0h2v1H4z"
    widths = [int(width) for d in paths.values() for width in re.findall(r"h(\d+)v1", d)]
    assert sum(widths) == len(values)
    assert [title for title in page.titles if " to " not in title] == [f"0 {column}" for column in range(9)]


def test_ramps_leave_one_extreme_value_aside() -> None:
    ramp = heat.log_ramp([0.03] * 500 + [50.0, 0.0, None, math.nan])
    assert (ramp.low, ramp.high) == (0.015, 0.06)
    shares = heat.share_ramp([0.02, -0.2] * 300 + [9.0])
    assert (shares.low, shares.high) == (-0.2, 0.2)
    assert [shares.class_of(value) for value in (0.0001, 0.0, -0.0001)] == ["d8", "dm", "d7"]


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2, of #rgb or #rrggbb."""
    digits = colour.lstrip("#")
    digits = "".join(digit * 2 for digit in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_keep_their_order_without_hue() -> None:
    for dark in (False, True):
        named = dict(re.findall(r"--([sd]\d+):(#\w+)", colours.variables(dark=dark)))
        sequential = [luminance(named[f"s{step}"]) for step in range(colours.NUM_STEPS)]
        assert sequential == sorted(sequential, reverse=not dark)
        low, high = ([luminance(named[f"d{step}"]) for step in half] for half in (range(7, -1, -1), range(8, 16)))
        assert low == sorted(low, reverse=not dark)
        assert high == sorted(high, reverse=not dark)


def test_text_can_be_read_on_both_pages() -> None:
    """WCAG 2 asks for a contrast of 4.5 for text and 3 for lines."""
    light, dark = (dict(re.findall(r"--([\w-]+):(#\w+)", block)) for block in STYLE.split("@media screen")[:2])
    for named in (light, dark):
        for name, page, least in [
            *((text, page, 4.5) for text in ("text", "muted") for page in ("page", "card")),
            *((verdict, f"{verdict}-soft", 4.5) for verdict in ("pass", "warn", "fail")),
            ("mark-text", "mark", 4.5),
            *((line, "page", 3.0) for line in ("error", "own", "floor", "warn", "fail", "outline", "bar")),
        ]:
            bright, dim = sorted((luminance(named[name]), luminance(named[page])), reverse=True)
            assert (bright + 0.05) / (dim + 0.05) >= least, (name, page)


def test_what_cannot_be_seen_is_spelled() -> None:
    assert visible("a\u202eb\x00\ud800\u4e2d\u00e9") == "a[U+202E]b[U+0000][U+D800]\u4e2d\u00e9"
    assert visible_token("a\n\tb\r") == "a\u21b5\u21e5b[U+000D]"


def test_numbers_are_written_for_readers() -> None:
    assert [figure(value) for value in (None, math.nan, math.inf, -math.inf)] == [
        "\u2013",
        "NaN",
        "\u221e",
        "\u2212\u221e",
    ]
    assert [figure(value) for value in (0.0, 0.012345, 1.2e-7, -3.0, 15360, 2e12)] == [
        "0", "0.0123", "1.2e\u22127", "\u22123", "15360", "2e12",
    ]  # fmt: skip
    assert percent(-0.0123) == "\u22121.23%"
    assert with_error(0.5, 0.01) == "0.5 \u00b1\u00a00.01"
    assert [duration(seconds) for seconds in (0.84, 59.6, 232, 7500)] == [
        "0.84 s",
        "1 min 00 s",
        "3 min 52 s",
        "2 h 05 min",
    ]
