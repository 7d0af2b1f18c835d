"""The three forms: well-formed, complete, self-contained, and with every foreign text escaped."""

from __future__ import annotations

import json
import re

import pytest

from privet.accounting import GaussianEvent, Ledger, PoissonEvent
from privet.errors import ConfigurationError
from privet.report import Report, schema
from privet.report.plots import Curve, Plot
from privet.report.schema import check_report
from tests.report.reports import AUDIT, Elements, quick_ledger

SECTIONS = [
    "In plain words",
    "Who is protected",
    "What ran",
    "Accounting",
    "What an attack can do",
    "What is covered, and what is not",
    "Threat model",
    "The record",
    "Audits",
    "Hazards",
    "How to check this report",
]
EVIL = "<script>alert('x')</script> | *b* `c` [d](e) # \"q\" & ' \n## heading"


@pytest.fixture(scope="module")
def report():
    declarations = {"tuning": "on public data", "clip_norm": "1.0"}
    return Report.of(quick_ledger(), delta=1e-5, declarations=declarations, audits=[AUDIT], note="a first run")


@pytest.fixture(scope="module")
def evil():
    return Report.of(
        quick_ledger([EVIL]),
        delta=1e-5,
        declarations={"tuning": EVIL},
        audits=[{**AUDIT, "kind": EVIL, "version": EVIL}],
        note=EVIL,
    )


def test_both_texts_have_every_section_in_order(report):
    assert re.findall(r"^## (.*)$", report.to_markdown(), re.MULTILINE) == SECTIONS
    assert [text for tag, text in Elements(report.to_html()).texts if tag == "h2"] == SECTIONS


def test_every_cell_of_every_table_is_in_both_texts(report):
    page = "\n".join(text for _, text in Elements(report.to_html()).texts)
    plain = report.to_markdown().replace("\\", "")
    cells = [
        cell
        for section in report.document.sections
        for block in section.blocks
        for row in getattr(block, "rows", ())
        for cell in row
    ]
    assert len(cells) > 100
    for cell in cells:
        assert cell in page, cell
        assert " ".join(cell.split()) in plain, cell


def test_the_page_is_one_file_that_loads_nothing(report):
    page = report.to_html()
    read = Elements(page)
    assert "http" not in page
    assert "url(" not in page
    assert "@import" not in page
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(read.names)
    assert not {"src", "href"} & {name for name, _ in read.attributes}
    assert ("name", "viewport") in read.attributes
    assert "prefers-color-scheme: dark" in page
    assert "@media print" in page
    assert read.names.count("svg") == 3  # the curve, the attacks, and the noise, which changes


def test_the_reading_of_pages_would_see_an_element_that_is_not_closed():
    with pytest.raises(AssertionError):
        Elements("<p><b>never</p>")
    with pytest.raises(AssertionError):
        Elements("<p>")


def test_no_foreign_text_becomes_markup(evil, report):
    page, plain = evil.to_html(), evil.to_markdown()
    read = Elements(page)
    assert "script" not in read.names
    assert read.names.count("h2") == len(SECTIONS)
    assert any(EVIL in text for _, text in read.texts)
    assert re.findall(r"^## (.*)$", plain, re.MULTILINE) == SECTIONS
    assert not re.search(r"(?<!\\)<script", plain)
    rows = [line for line in plain.splitlines() if line.startswith("|") and "alert" in line]
    assert len(rows) == 2  # the audit and the hazard
    for row, columns in zip(rows, (9, 3), strict=True):
        assert len(re.findall(r"(?<!\\)\|", row)) == columns + 1
    assert json.loads(evil.to_json())["note"] == EVIL
    assert EVIL not in report.to_html()


def test_points_lie_inside_of_their_picture():
    plot = Plot("c", "x", "y", (Curve(((1e-12, 3.0), (1e-6, 2.0), (1e-3, 1.0)), label="one"),), log_x=True)
    numbers = re.findall(r'class="line0" d="(M[^"]*L[^"]*)"', plot.to_svg())
    places = [tuple(map(float, pair)) for pair in re.findall(r"([\d.]+) ([\d.]+)", numbers[0])]
    assert len(places) == 3
    assert all(58.0 <= x <= 396.0 and 14.0 <= y <= 214.0 for x, y in places)
    for along in zip(*places, strict=True):
        assert list(along) == sorted(along)  # to the right, and downwards as the values fall
    assert "1e-12" in plot.to_svg()


@pytest.mark.parametrize("values", [(5.0, 5.0), (0.0, 0.0), (1e-9, 2e-9), (0.0, 1e9)])
def test_any_range_has_marks_on_its_axes(values):
    plot = Plot("c", "x", "y", (Curve(((0.0, values[0]), (1.0, values[1])), steps=True),))
    picture = plot.to_svg()
    assert 2 <= picture.count('text-anchor="end"') <= 12
    Elements(picture)


def test_a_schedule_is_drawn_where_it_changes_and_long_ones_are_cut_in_the_table():
    ledger = Ledger()
    for index in range(30):
        ledger.begin(GaussianEvent(50.0 + index), 2)
    report = Report.of(ledger, delta=1e-5)
    text, data = report.to_markdown(), json.loads(report.to_json())
    assert "The noise multiplier over the steps" in text.replace("\\", "")
    assert "The sampling rate over the steps" not in text
    assert "The other 18 phases are in the JSON form" in text
    assert [phase["noise_multiplier"] for phase in data["phases"]] == [50.0 + index for index in range(30)]


def test_the_json_form_fits_its_schema(report, evil):
    empty = Ledger()
    empty.begin(PoissonEvent(0.1, GaussianEvent(0.0)), 2)
    for each in (report, evil, Report.of(empty, delta=1e-5)):
        document = json.loads(each.to_json())
        assert check_report(document) == document
        assert set(document) == set(schema()["required"])


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda d: d.update(report="another"), r"report\.report"),
        (lambda d: d.update(extra=1), "unknown keys: extra"),
        (lambda d: d.pop("mu"), "lacks mu"),
        (lambda d: d["guarantee"].update(epsilon=-1.0), r"guarantee\.epsilon"),
        (lambda d: d["guarantee"].update(epsilon="-inf"), r"guarantee\.epsilon"),
        (lambda d: d["guarantee"].update(epsilon=True), r"guarantee\.epsilon"),
        (lambda d: d["ledger"].update(digest="abc"), r"ledger\.digest"),
        (lambda d: d["ledger"].update(unit="planet"), r"ledger\.unit"),
        (lambda d: d["ledger"].update(steps=1.5), r"ledger\.steps"),
        (lambda d: d["attacks"][1].update(true_positive_rate=1.5), r"attacks\[1\]\.true_positive_rate"),
        (lambda d: d["hazards"][0].update(status="fine"), r"hazards\[0\]\.status"),
        (lambda d: d["declarations"].update(tuning=1), r"declarations\.tuning"),
    ],
)
def test_what_does_not_fit_the_schema_is_refused_with_its_place(report, change, place):
    document = json.loads(report.to_json())
    change(document)
    with pytest.raises(ConfigurationError, match=place):
        check_report(document)
    with pytest.raises(ConfigurationError, match="the report must be"):
        check_report([document])


def test_the_schema_is_checked_by_a_library_of_the_field_too(report):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(schema())
    jsonschema.validate(json.loads(report.to_json()), schema())
