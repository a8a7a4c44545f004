"""exporter compare: what is beside what, what cannot be, and reports that are none."""

from __future__ import annotations

import json
import os
import shutil
import xml.etree.ElementTree as ET

import pytest

from exporter.pipeline.compare import find_reports, read_report
from exporter.validate.report.comparison import Entry, compare
from tests import report_sample as sample
from tests.conftest import run_exporter
from tests.report_reading import read_html

SIZES = {"q8": (12_110_000_000, 0.0025), "bf16": (13_800_000_000, 0.0009), "int4": (12_500_000_000, 0.0244)}


def put(folder, report):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report))
    return folder


@pytest.fixture
def top(tmp_path):
    """Three artifacts of one profile: "int4" is larger and farther than "q8"."""
    for name, (nbytes, kl) in SIZES.items():
        put(tmp_path / "gpt-oss-20b" / "16gb" / name, sample.small(name, nbytes, kl))
    return tmp_path


def laid(*reports):
    return compare([Entry(report["subject"]["name"], "", report) for report in reports])


def small(name, nbytes=10**10, kl=0.01, **more):
    return sample.small(name, nbytes, kl, **more)


# What is shown


def test_a_folder_of_artifacts(top):
    done = run_exporter("compare", top)
    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines() if "passed" in line and "nothing" not in line]
    assert [row[0] for row in rows] == ["q8", "int4", "bf16"]  # by size
    assert ["◆" in row for row in rows] == [True, False, True]
    assert "12.1 GB" in done.out
    assert "0.0025 ± 0.00025" in done.out
    assert "not compared" not in done.out


def test_the_answer_as_json(top):
    done = run_exporter("compare", top / "gpt-oss-20b" / "16gb" / "q8", top / "gpt-oss-20b", "--json")
    assert done.code == 0, done.err
    assert [each["label"] for each in done.json["artifacts"]] == ["q8", "int4", "bf16"]  # "q8" was named twice
    first = done.json["artifacts"][0]
    assert first == {
        "label": "q8",
        "path": str(top / "gpt-oss-20b" / "16gb" / "q8"),
        "bytes": 12_110_000_000,
        "bits_per_weight": pytest.approx(4.632, abs=0.001),
        "kl_mean": {"conversations": 0.0025, "plain": 0.0025},
        "kl_ci95": dict.fromkeys(("conversations", "plain"), pytest.approx([0.00225, 0.00275])),
        "top1": 0.9812,
        "flips": pytest.approx(61 / 4096),
        "decode_tokens_per_second": 17.4,
        "prefill_tokens_per_second": 143.2,
        "peak_rss_bytes": 13_020_000_000,
        "status": "passed",
        "not_comparable": [],
        "best": True,
    }
    assert (done.json["ranked_by"], done.json["warnings"]) == ("conversations", [])


def test_pages_and_pictures(top, tmp_path):
    html, svg = tmp_path / "c.html", tmp_path / "c.svg"
    done = run_exporter("compare", top, "--html", html, "--svg", svg)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-2:] == [str(html), str(svg)]
    page = read_html(html.read_text())
    assert page.wrong == []
    assert page.tables[0][1][0] == "q8\N{NO-BREAK SPACE}◆"
    assert "3 artifacts compared" in page.text
    assert "nothing comes nearer to the reference on conversations than q8, bf16" in page.text
    assert [tag for tag, _ in page.elements].count("svg") == 4  # size against KL, two speeds, memory
    assert "q8" in "".join(ET.parse(svg).getroot().itertext())
    again = tmp_path / "again.html"
    assert run_exporter("compare", top, "--html", again).code == 0
    assert again.read_bytes() == html.read_bytes()


def test_one_report_by_its_file(top):
    done = run_exporter("compare", top / "gpt-oss-20b" / "16gb" / "q8" / "report.json", "--json")
    assert [each["label"] for each in done.json["artifacts"]] == ["q8"]


@pytest.mark.slow
def test_an_artifact_of_this_version(demo_run):
    """What `quantize` wrote: its size is in the manifest beside it, where the report does not say."""
    done = run_exporter("compare", demo_run.folder, "--json")
    assert done.code == 0, done.err
    (row,) = done.json["artifacts"]
    assert row["bytes"] == sum(path.stat().st_size for path in demo_run.folder.glob("*.gguf"))
    assert row["status"] == "passed"
    assert 0 < row["kl_mean"]["plain"] < 0.01
    assert row["label"]


def test_a_report_of_the_first_schema(top, tmp_path):
    put(tmp_path / "old", sample.first_schema())
    done = run_exporter("compare", top, tmp_path / "old")
    assert done.code == 0, done.err
    assert "not compared: old, conversations and plain text: its checkpoint is not said" in done.out
    (line,) = [line for line in done.out.splitlines() if line.startswith(" old")]
    assert "[0.00251 ± " in line


# What cannot be compared


def test_failed_ones_are_never_the_best():
    worse = small("a", 10**9, 0.0001, status="gate failed")
    rows = laid(worse, small("b", 2 * 10**9, 0.001), small("c", 3 * 10**9, 0.01)).rows
    assert [(row.label, row.best) for row in rows] == [("a", False), ("b", True), ("c", False)]


@pytest.mark.parametrize(
    ("path", "value", "apart", "told"),
    [
        ("against.revision", "f" * 40, {"conversations", "plain"}, "checkpoint was openai/gpt-oss-20b at ffffffffffff"),
        ("against.repo", "other/model", {"conversations", "plain"}, "its checkpoint was other/model"),
        (
            "accuracy.conversations.source",
            "mine",
            {"conversations"},
            "text of conversations was mine, 4,096 tokens",
        ),
        ("accuracy.conversations.sha256", "ab" * 32, {"conversations"}, "SHA-256 abababababab"),
        ("accuracy.plain.tokens", 512, {"plain"}, "512 tokens"),
        ("text.sha256", "cd" * 32, {"plain"}, "SHA-256 cdcdcdcdcdcd"),
        ("hardware.cpu", "Apple M4", {"speed"}, "its machine was Apple M4, 16 cores"),
        ("hardware.gpus", [{"name": "RTX 5090"}], {"speed"}, "RTX 5090"),
        ("speed.prefill_length", 64, {"speed"}, "64 of a prompt"),
    ],
)
def test_what_was_measured_otherwise_is_said_and_left_out(path, value, apart, told):
    odd = small("odd", 10**9, 0.00001)
    *keys, last = path.split(".")
    where = odd
    for key in keys:
        where = where[key]
    where[last] = value
    found = laid(small("a"), odd, small("b", 2 * 10**10, 0.001))
    rows = {row.label: row for row in found.rows}
    assert rows["odd"].apart == apart
    assert rows["a"].apart == rows["b"].apart == set()
    (warning,) = found.warnings
    assert warning.startswith("odd, ")
    assert told in warning
    # Ranked by what most have in common; there it would be the only best one if it could be compared.
    assert found.column == ("plain" if apart == {"conversations"} else "conversations")
    assert rows["odd"].best == (found.column not in apart)
    assert rows["b"].best == (found.column in apart)


def test_what_no_report_says_is_taken_as_the_same():
    reports = [sample.without(small(name), "hardware") for name in "ab"]
    found = laid(*reports)
    assert found.warnings == ["the machine is said by no report, and taken as the same"]
    assert all(row.apart == set() for row in found.rows)


def test_ranked_by_the_text_that_most_have():
    found = laid(*(sample.without(small(name, kl=0.01), "accuracy.conversations") for name in "ab"), small("c"))
    assert found.column == "plain"
    assert found.warnings == []


def test_names_that_are_the_same_get_their_folders(tmp_path):
    for profile in ("16gb", "80gb"):
        put(tmp_path / profile / "a", small("model.gguf"))
    done = run_exporter("compare", tmp_path, "--json")
    assert [each["label"] for each in done.json["artifacts"]] == ["16gb/a/model.gguf", "80gb/a/model.gguf"]


# Reports that are none


@pytest.mark.parametrize(
    ("content", "told", "code"),
    [
        ("", "is damaged: no JSON", 1),
        ("{", "is damaged: no JSON", 1),
        ("[" * 100_000, "is damaged: no JSON", 1),
        ("\udcff", "is damaged: no JSON", 1),
        ("[]", "is no report of exporter's", 2),
        ('{"a": 1}', "is no report of exporter's", 2),
        ('{"schema": 3, "status": "passed"}', "is of schema 3, and this exporter reads up to 2", 2),
        ('{"schema": "x", "status": "passed"}', "is damaged: schema x", 1),
        ('{"schema": true, "status": "passed"}', "is damaged: schema of no kind", 1),
    ],
)
def test_what_is_no_report(tmp_path, content, told, code):
    (tmp_path / "report.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    done = run_exporter("compare", tmp_path)
    assert done.code == code, done.err
    assert done.out == ""
    assert done.err.count("\n") == 2, done.err
    assert f"report.json {told}" in done.err


def test_a_report_of_a_hundred_megabytes_is_not_read(tmp_path):
    with open(tmp_path / "report.json", "wb") as f:
        f.truncate(100_000_000)
    done = run_exporter("compare", tmp_path)
    assert done.code == 1
    assert "report.json is no report: it has 100,000,000 bytes" in done.err


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "report.json")
    done = run_exporter("compare", tmp_path, timeout=20)
    assert (done.code, done.out) == (2, "")
    assert "report.json is no file" in done.err


def test_where_nothing_is(tmp_path):
    done = run_exporter("compare", tmp_path / "none")
    assert (done.code, "does not exist" in done.err) == (2, True)
    put(tmp_path / "a" / "b" / "c" / "d", small("too deep"))
    done = run_exporter("compare", tmp_path)
    assert (done.code, "no report.json there or at most three folders below" in done.err) == (2, True)
    assert len(find_reports(tmp_path / "a")) == 1
    (tmp_path / "loop").symlink_to(tmp_path)
    assert find_reports(tmp_path / "a" / "b") == [tmp_path / "a" / "b" / "c" / "d" / "report.json"]


def test_what_cannot_be_written(top, tmp_path):
    done = run_exporter("compare", top, "--html", tmp_path / "none" / "c.html")
    assert done.code == 2
    assert "none is no folder" in done.err
    report = top / "gpt-oss-20b" / "16gb" / "q8" / "report.json"
    before = report.read_bytes()
    assert run_exporter("compare", top, "--html", report).code == 2
    assert report.read_bytes() == before
    done = run_exporter("compare", top / "gpt-oss-20b" / "16gb" / "q8", "--svg", tmp_path / "c.svg")
    assert done.code == 1
    assert "nothing to draw" in done.err
    assert not (tmp_path / "c.svg").exists()


def test_names_of_strangers(tmp_path):
    """A folder, a model, a machine: what they are called neither runs nor moves the cursor."""
    name = "<img src=x onerror=alert(1)>\x1b[2J\n| x"
    report = small(name)
    report["hardware"]["cpu"] = name
    folder = put(tmp_path / "a\x1b[2Jb", report)
    put(tmp_path / "other", small("other"))
    put(tmp_path / "third", small("third"))
    done = run_exporter("compare", tmp_path, "--html", tmp_path / "c.html")
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    page = read_html((tmp_path / "c.html").read_text())
    assert page.wrong == []
    assert "<img src=x onerror=alert(1)>?[2J | x" in page.text
    (folder / "report.json").write_text("{")
    done = run_exporter("compare", tmp_path)
    assert (done.code, "\x1b" not in done.err) == (1, True)


def test_a_manifest_that_is_damaged_is_left_alone(tmp_path):
    put(tmp_path / "a", sample.first_schema())
    for content in ("{", "[]", '{"files": {"x": {"bytes": "many"}}}', '{"files": 3, "recipe": 4}'):
        (tmp_path / "a" / "manifest.json").write_text(content)
        assert read_report(tmp_path / "a" / "report.json")["subject"]["name"] == "a"
    shutil.rmtree(tmp_path / "a")
