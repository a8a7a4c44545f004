"""report.md and report.html: the same words in both, and a stranger's name is only shown."""

from __future__ import annotations

import copy
import json
import math
import random
import re

import pytest

from exporter.cli.report import show_report
from exporter.pipeline.report import remove_pages, write_pages
from exporter.types.gates import GATES
from exporter.validate.report import document, figures, html, markdown, sentence
from exporter.validate.report.blocks import ROWS, Table, Text, make_table
from exporter.validate.report.reading import number, words
from tests import report_sample as sample
from tests.report_reading import markdown_tables, pictures, read_html, read_markdown

REPORTS = {"full": sample.full, "failed": sample.failed, "first schema": sample.first_schema, "empty": dict}
HOSTILE = [
    "<script>alert(1)</script>",
    "a | b || c \\| d",
    "\"><img src=x onerror='alert(1)'>",
    "`` ` ``` `code",
    "[a](https://evil.example) ![b](https://evil.example/x.png) <https://evil.example>",
    "https://evil.example www.evil.example",
    "</style></svg></table><iframe src=//evil.example>",
    "line\nbreak\r\n# heading\n\n---\n| x |",
    "&lt;b&gt; &amp; &#x3c;script&#x3e;",
    "\x1b[31mred\x07 \u202egpj.exe \ud800 \x00",
    "*bold* _em_ ~~gone~~ $x$ <!-- comment -->",
]


def cells_of(page):
    """The tables of a document, as the pages should say them."""
    tables = [block for each in page.sections for block in each.blocks if isinstance(block, Table)]
    return [[[*t.columns], *([cell.text for cell in row] for row in t.rows)] for t in tables]


def plain(tables):
    """Without signs, and with one space where there are several."""
    return [[[" ".join(re.sub("[✓✗]", "", cell).split()) for cell in row] for row in table] for table in tables]


def paths(value, path=()):
    """Every place in a report; of a list the first two."""
    if path:
        yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from paths(each, (*path, key))


def changed(report, path, value):
    report = copy.deepcopy(report)
    where = report
    for key in path[:-1]:
        where = where[key]
        if not isinstance(where, dict | list):
            return report
    where[path[-1]] = value
    return report


# What they say


@pytest.mark.parametrize("name", ["full", "failed"])
def test_both_pages_name_every_gate_with_its_meaning(name):
    report = REPORTS[name]()
    page, text = read_html(html(report)), markdown(report)
    (gates,) = [table for table in markdown_tables(text) if table[0][-1] == "name"]
    for gate in report["gates"]:
        row = next(row for row in gates if row[-1] == gate["name"])
        assert GATES[gate["name"]].meaning in row[1]
        assert ("passed" in row[0]) == gate["passed"]
        assert gate["name"] in page.text
    assert len(gates) == 1 + len(report["gates"])
    assert ("FAILED" in gates[1][0]) == (name == "failed")  # failed ones come first


@pytest.mark.parametrize("name", REPORTS)
def test_the_same_words_in_both(name):
    report = REPORTS[name]()
    expected = plain(cells_of(document(report)))
    page = read_html(html(report))
    in_html = plain(page.tables)
    assert [[row for row in table if any(row)] for table in in_html] == [
        [row for row in table if any(row)] for table in expected
    ]
    assert plain(markdown_tables(markdown(report))) == expected
    for each in document(report).sections:
        assert each.title in page.text
        for block in each.blocks:
            if isinstance(block, Text):
                assert block.text in page.text


def test_every_section_of_a_full_report():
    keys = [each.key for each in document(sample.full()).sections]
    assert keys == [
        "gates", "accuracy", "twins", "generation", "router", "weights", "controls", "tasks", "speed", "memory",
        "hardware", "texts", "files", "again", "not-run",
    ]  # fmt: skip
    text = markdown(sample.full())
    for told in (
        "tool call", "past 4,096", "window of 127", "Noise floor: a mean KL of 0.00011", "24 prompts", "1.20%",
        "MXFP4 x 72", "no integers with zero points", "143 ± 5.7", "13.9 GB", "AMD EPYC 9354", "would take 310 s",
        "not validated on the target".capitalize(), "0.00215 to 0.00287", "openai/gpt-oss-20b", "no NVIDIA GPU here",
    ):  # fmt: skip
        assert told in text, told


@pytest.mark.parametrize(
    ("key", "section"),
    [("twins", None), ("generation", "generation"), ("router", "router"), ("weights", None), ("controls", "controls")],
)
def test_what_was_not_measured_is_left_out_and_its_reason_said(key, section):
    report = sample.without(sample.full(), key)
    report["not_run"][key] = "the reason | for <that>"
    page = document(report)
    assert section not in [each.key for each in page.sections]
    assert "the reason | for <that>" in read_html(html(report)).text
    assert ["the reason | for <that>"] in [row[1:] for table in markdown_tables(markdown(report)) for row in table]


def test_an_interval_without_width_is_none():
    report = sample.full()
    report["accuracy"]["conversations"]["channels"]["tool call"]["kl_ci95"] = [0.00158, 0.00158]
    rows = [row for table in markdown_tables(markdown(report)) for row in table if row[0].strip().endswith("tool call")]
    assert rows[0][1:4] == ["201", "0.0044", figures.NONE]


def test_a_terminal_says_the_same(capsys):
    show_report(sample.failed())
    out = capsys.readouterr().out
    assert out.startswith(sentence(sample.failed()) + "\n")
    for told in ("FAILED", "at most 0.01", "what the file says of the model", "window of 127", "no NVIDIA GPU here"):
        assert told in out
    assert "processor" not in out
    show_report(sample.full(), ["hardware"])
    assert "AMD EPYC 9354, 16 cores" in capsys.readouterr().out


# The verdict


def test_a_pass_says_how_near_and_which_gate_is_nearest():
    told = sentence(sample.full())
    assert told.startswith("gpt-oss-20b gguf-mxfp4-q8 (GGUF) passed as a near-exact artifact: on conversations its ")
    assert "a mean KL of 0.0025 nats from openai/gpt-oss-20b at 6cee5e81ee83" in told
    assert "all 11 gates hold; nearest to its limit is release_top1, 98.12% where at least 97.00% is allowed" in told


def test_a_failure_names_the_worst_gate_and_the_others():
    report = sample.failed()
    told = sentence(report)
    assert "failed as a near-exact artifact: 4 of 11 gates do not hold" in told
    assert "The worst: it is not so that \"the runtime's token ids equal the tokenizer's\" (tokenizer_equal)." in told
    assert "Also: release_kl_mean, release_top1, long_kl_mean." in told
    report["gates"] = [each for each in report["gates"] if each["name"] in ("release_kl_mean", "release_top1")]
    assert "The worst: release_kl_mean (mean KL against the released arithmetic, nats) is 0.31" in sentence(report)
    report["gates"] = [sample.gate("long_kl_mean", None, 0.02, False)]
    assert "long_kl_mean is not measured, and has to be at most 0.02" in sentence(report)


@pytest.mark.parametrize("status", ["passed", "gate failed", None, "PASSED", 1])
def test_nothing_bad_is_said_to_pass(status):
    """Whatever the status says, a gate that failed or that does not say so is a failure."""
    for gate in (sample.gate("release_kl_mean", 0.3, 0.01, False), {"name": "release_kl_mean"}, {"passed": "yes"}):
        report = sample.full() | {"status": status}
        report["gates"].append(gate)
        assert document(report).passed is False
        assert "✗ failed" in html(report)
        assert "✗ FAILED" in markdown(report)
    if status != "passed":
        assert document(sample.full() | {"status": status}).passed is False


def test_without_gates_there_is_no_verdict():
    assert document({}).passed is None
    assert "not judged" in html({})
    assert "was not judged" in sentence({"subject": {"name": "x.gguf"}})


def test_a_gate_that_this_version_does_not_know():
    report = sample.full()
    report["gates"] += [sample.gate("new_kl_mean", 0.5, 0.1, False), sample.gate("new_top1", 0.99, 0.9)]
    (table, *_) = markdown_tables(markdown(report))
    rows = {row[-1]: row for row in table}
    assert rows["new_kl_mean"][1:4] == ["new KL mean", "0.5", "at most 0.1"]
    assert rows["new_top1"][1:4] == ["new top1", "99.00%", "at least 90.00%"]


def test_a_control_that_was_missed_is_seen():
    page = document(sample.failed())
    (controls,) = [each for each in page.sections if each.key == "controls"]
    assert controls.blocks[0].text == "4 of 5 known-bad variants made a gate fail."
    assert (controls.blocks[1].rows[0][1].text, controls.blocks[1].rows[0][1].mood) == ("MISSED", "bad")


def test_how_to_run_it_again():
    report = sample.full()
    assert "exporter validate artifacts/gpt-oss-20b/16gb/gguf-mxfp4-q8 --profile 16gb" in markdown(report)
    report["subject"] |= {"recipe": "", "name": "their model; rm -rf ~.gguf"}
    command = "exporter verify 'their model; rm -rf ~.gguf' --against openai/gpt-oss-20b@6cee5e81ee83"
    assert command in markdown(report)
    assert command in read_html(html(report)).text


def test_what_is_wrong_stands_in_one_place():
    assert "findings" not in [each.key for each in document(sample.full()).sections]
    page = document(sample.failed())
    (found,) = [each for each in page.sections if each.key == "findings"]
    rows = [tuple(cell.text for cell in row) for row in found.blocks[0].rows]
    assert rows == [
        ("what the file says of the model", "sliding_window 127, not 128"),
        ("weights", f"{sample.TENSOR}: 1 block of 16,384 is 412% off, more than MXFP4 can be"),
        ("behaviour", "it behaves like the model with this mistake: window of 127"),
        ("tokenizer", 'of "café" its ids are 3 where they should be 1, 2'),
        ("a gate that is too wide", "it let this mistake through: gate and up swapped"),
    ]
    assert sentence(sample.failed()).endswith("It behaves like the model with this mistake: window of 127.")


def test_a_gate_without_hope_says_why():
    report = sample.full()
    note = "the limit is below the noise floor: 0.0006 nats"
    report["gates"].append(sample.gate("release_kl_mean", 0.00001, 0.0001, False) | {"note": note})
    assert f"release_kl_mean: {note}" in sentence(report)
    assert note in markdown(report)


@pytest.mark.parametrize(
    ("change", "told", "mood"),
    [
        ({}, "told apart", "good"),
        ({"ci95": [0.45, 0.8]}, "not told apart", "none"),
        ({"share": 0.3, "ci95": [0.2, 0.4]}, "nearer to the twin", "bad"),
        ({"share": None, "ci95": [0.001, 0.002], "nearer_by": 0.0015}, "told apart", "good"),
        ({"share": None, "nearer_by": None, "ci95": None}, "not run", "none"),
    ],
)
def test_a_twin_is_told_apart_or_not(change, told, mood):
    report = sample.full()
    report["twins"]["each"][0] |= change
    (twins,) = [each for each in document(report).sections if each.key == "twins"]
    (table,) = [block for block in twins.blocks if isinstance(block, Table)]
    assert (table.rows[0][-1].text, table.rows[0][-1].mood) == (told, mood)


# The pages themselves


@pytest.mark.parametrize("name", REPORTS)
def test_the_page_is_whole_and_asks_for_nothing(name):
    text = html(REPORTS[name]())
    page = read_html(text)
    assert page.wrong == []
    assert not re.search(r"https?:|//|url\(|@import|javascript:|data:(?!;)", text.replace("img-src data:", ""))
    policy = next(given["content"] for tag, given in page.elements if "http-equiv" in given)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")
    identities = [given["id"] for _, given in page.elements if "id" in given]
    assert len(identities) == len(set(identities))
    links = [given["href"] for tag, given in page.elements if tag == "a"]
    assert {link[1:] for link in links} <= set(identities)
    assert all(link.startswith("#") for link in links)
    for tag in ("h1", "main"):
        assert [each for each, _ in page.elements].count(tag) == 1


def test_those_who_do_not_see_it_are_told():
    text = html(sample.full())
    page = read_html(text)
    boxes = [given for tag, given in page.elements if given.get("class") == "scroll"]
    assert len(boxes) == len(page.tables) > 10
    assert all(box["aria-label"] and box["tabindex"] == "0" and box["role"] == "region" for box in boxes)
    drawn = pictures(text)
    assert len(drawn) == 6
    for svg in drawn:
        assert svg.get("role") == "img"
        assert svg.get("aria-label") == svg.find("title").text != ""


def test_the_same_report_gives_the_same_bytes():
    report = sample.full()
    again = json.loads(json.dumps(report))
    assert (html(report), markdown(report)) == (html(again), markdown(again))
    assert report == again  # and it is not changed


def test_ten_thousand_findings_are_counted_and_not_listed():
    report = sample.full()
    names = [f"model.layers.{n}.<b>.weight" for n in range(10_000)]
    report["digests"] = {"tensors": 10_000, "equal": 0, "different": names}
    report["rules"] = {"kept": False, "findings": [{"where": name, "problem": "x"} for name in names]}
    report["not_run"] = {name: "no" for name in names}
    report["gates"] = [sample.gate(name, 1.0, 0.5, False) for name in names]
    report["hardware"]["versions"] = dict.fromkeys(names, "1")
    for text in (html(report), markdown(report)):
        assert len(text) < 200_000
        assert "and 9,980 more, in report.json" in text
        assert f"and {10_000 - ROWS:,} more, in report.json" in text


def test_pages_are_written_whole_and_taken_away(tmp_path):
    (tmp_path / "report.html").write_text("old")
    written = write_pages(tmp_path, sample.full())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.md"]
    assert [path.read_text() for path in written] == [markdown(sample.full()), html(sample.full())]
    remove_pages(tmp_path)
    remove_pages(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Strangers


def poisoned(value, text):
    """Every text of a report, and every name, made hostile."""
    if isinstance(value, dict):
        return {f"{key}": poisoned(each, text) for key, each in value.items()} | {f"{text} {len(value)}": text}
    if isinstance(value, list):
        return [poisoned(each, text) for each in value] + [text]
    return text if isinstance(value, str) else value


def misread(report):
    """What a hostile report would do to a reader of its pages."""
    page = read_html(html(report).encode().decode())  # what is no text cannot be written either
    tokens = read_markdown(markdown(report).encode().decode())
    found = [f"HTML {each}" for each in page.wrong]
    found += [f"link {g['href']}" for tag, g in page.elements if tag == "a" and not re.fullmatch("#[a-z-]+", g["href"])]
    found += [f"Markdown {t.type}" for t in tokens if t.type in ("link_open", "image", "html_inline", "html_block")]
    expected = plain(cells_of(document(report)))
    if plain(markdown_tables(markdown(report))) != expected:
        found.append("Markdown tables")
    return found


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_name_is_only_shown(text):
    for report in (sample.full(), sample.first_schema()):
        assert misread(poisoned(report, text)) == []
    report = sample.full()
    report["subject"]["name"] = report["gates"][0]["name"] = text
    report["weights"]["worst"][0]["name"] = text
    assert misread(report) == []
    assert words(text) in read_html(html(report)).text.replace("\u200b", "")


def test_nothing_of_a_name_reaches_a_terminal():
    assert words("\x1b[31mred\x07\n\u202eabc\ud800") == "?[31mred? ?abc?"
    assert sentence(poisoned(sample.full(), "\x1b[2J")).isprintable()


@pytest.mark.parametrize(
    ("module", "function"), [("html", "escape"), ("axes", "escape"), ("markdown", "escaped"), ("markdown", "code")]
)
def test_a_page_that_does_not_escape_is_found(monkeypatch, module, function):
    """The check above can fail: each place that escapes, made to let everything through."""
    import sys

    monkeypatch.setattr(sys.modules[f"exporter.validate.report.{module}"], function, lambda text: text)
    found = [problem for text in HOSTILE for problem in misread(poisoned(named_gates(text), text))]
    assert found != []


def named_gates(text):
    """A report whose gates' names reach the pictures."""
    report = sample.full()
    for gate in report["gates"]:
        gate["name"] = text
    return report


@pytest.mark.parametrize("name", ["full", "first schema"])
def test_any_part_may_be_missing_or_odd(name):
    report = REPORTS[name]()
    odd = [None, True, -1, 0, 1e300, 10**400, math.nan, math.inf, "", "x", [], {}, [[]], {"": None}, [None, {}]]
    draw = random.Random(0)
    # Deepest first, a few at once: a place that is gone would hide those below it.
    every = sorted(paths(report), key=len, reverse=True)
    for start in range(0, len(every), 8):
        other = report
        for path in every[start : start + 8]:
            other = changed(other, path, draw.choice(odd))
        assert read_html(html(other)).wrong == [], every[start : start + 8]
        assert markdown(other)


@pytest.mark.parametrize("value", [None, [], {}, [[]], "x", 0, {"passed": True}])
def test_a_damaged_gate_did_not_pass(value):
    for key in (None, "value", "limit", "passed"):
        report = sample.full()
        if key is None:
            report["gates"][4] = value
        elif value != 0 or key != "value":
            report["gates"][4][key] = value
        else:
            continue
        assert document(report).passed is False, key


@pytest.mark.parametrize(("name", "value", "limit"), [("release_kl_mean", 2.0, 0.1), ("head_equal", False, True)])
def test_a_gate_that_says_it_passed_and_did_not(name, value, limit):
    report = sample.full()
    report["gates"].append(sample.gate(name, value, limit, True))
    assert document(report).passed is False


@pytest.mark.parametrize("value", [[], "x", 3, None])
def test_any_branch_may_be_odd(value):
    for key in sample.full():
        other = sample.full() | {key: value}
        assert read_html(html(other)).wrong == []
        assert sentence(other)


# Figures


@pytest.mark.parametrize(
    ("write", "value", "said"),
    [
        (figures.plain, 0.0025119, "0.00251"),
        (figures.plain, 2.511e-7, "2.51e-07"),
        (figures.plain, 0.0, "0"),
        (figures.plain, 12345.6, "12,346"),
        (figures.plain, None, figures.NONE),
        (figures.share, 0.97705, "97.70%"),
        (figures.share, 1.0, "100.00%"),
        (figures.share, 0.999999, "99.9999%"),
        (figures.share, 0.000004, "0.0004%"),
        (figures.share, 0.0, "0.00%"),
        (figures.ratio, 1.00004, "1.0000"),
        (figures.rate, 17.44, "17.4"),
        (figures.rate, 5605.9, "5,606"),
        (figures.deviation, 5.728, " ± 5.7"),
        (figures.deviation, 0.00009, " ± 0.00009"),
        (figures.interval, [0.001, 0.002], "0.001 to 0.002"),
        (figures.interval, [None, 0.002], ""),
        (figures.size, 12_110_000_000, "12.1 GB"),
    ],
)
def test_how_figures_are_written(write, value, said):
    assert write(value) == said


@pytest.mark.parametrize("value", [True, math.nan, math.inf, "1", None, 10**400, [1]])
def test_what_is_no_number(value):
    assert number({"a": value}, "a") is None


def test_a_column_in_which_nothing_was_measured_is_left_out():
    table = make_table("", ("a", "b", "c"), [("1", figures.NONE, "3"), ("4", figures.NONE, figures.NONE)], (1, 2))
    assert table.columns == ("a", "c")
    assert table.right == {1}
