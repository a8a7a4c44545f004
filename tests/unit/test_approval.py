"""The gate before publishing: what it passes, what it names, and that no file makes it fail itself."""

import copy
import json
import math
import os
import random
import shutil

import pytest

from exporter.errors import Refused
from exporter.pipeline.approval import approved, check, row_of, summary
from exporter.pipeline.cells import planned
from tests.approving import edited, judged, prove, reseal, resealed, uploaded, write
from tests.conftest import DEMO

GGUF, MXFP4 = "tiny-gpt-oss/16gb/gguf-mxfp4-q8", "tiny-gpt-oss/16gb/mxfp4-mxfp4-bf16"


@pytest.fixture(scope="module")
def cells():
    return planned([str(DEMO)], ["16gb"], ["gguf", "mxfp4"])


@pytest.fixture(scope="module")
def made(cells, tmp_path_factory):
    root = tmp_path_factory.mktemp("made")
    return [prove(each, root) for each in cells]


@pytest.fixture
def proofs(made, tmp_path):
    return uploaded(made, tmp_path / "proofs")


def looked_at(cells, folder):
    """Verdicts by cell, also as they are shown."""
    found = check(cells, folder)
    assert summary(found).count("\n") == 3 + 1 + len(found)
    assert all(len(row_of(each)) == 6 for each in found)
    return {each.cell.name: each for each in found}


def test_what_passed_passes(cells, proofs):
    found = looked_at(cells, proofs)
    assert {name: (each.verdict, each.problems) for name, each in found.items()} == {
        GGUF: ("passed", ()),
        MXFP4: ("passed", ()),
    }
    assert [cell.name for cell in approved(cells, proofs)] == [GGUF, MXFP4]


def test_a_gate_that_failed_is_named_with_its_value(cells, made, tmp_path):
    text = {"tokenizer_equal": False}
    folder = uploaded([prove(cells[0], tmp_path / "made", **text), made[1]], tmp_path / "proofs")
    found = looked_at(cells, folder)[GGUF]
    assert (found.verdict, found.problems) == ("gate failed", ("tokenizer_equal False (limit True)",))
    with pytest.raises(Refused, match="gguf-mxfp4-q8 is not approved: gate failed, tokenizer_equal"):
        approved(cells, folder)


def gone(name):
    return lambda folder: (folder / "proof-0" / name).unlink()


def instead(name, text):
    return lambda folder: (folder / "proof-0" / name).write_text(text)


def pipe(folder):
    (folder / "proof-0" / "report.json").unlink()
    os.mkfifo(folder / "proof-0" / "report.json")


def fail_one(report):
    report["status"] = "gate failed"
    report["gates"][0]["passed"] = False


def lenient(report):
    gate = next(each for each in report["gates"] if each["name"] == "release_kl_mean")
    report["release"]["kl_mean"] = gate["value"] = 0.5
    gate["limit"] = 1.0


FAULTS = {
    "no job": (lambda folder: shutil.rmtree(folder / "proof-0"), "missing", "no manifest.json"),
    "no report": (gone("report.json"), "missing", "no manifest.json and report.json"),
    "no JSON": (instead("report.json", "{"), "missing", "no manifest.json"),
    "deep": (instead("report.json", "[" * 200_000), "missing", "no manifest.json"),
    "a pipe": (pipe, "missing", "no manifest.json"),
    "no source": (edited("manifest.json", lambda m: m.update(source=None)), "missing", "no manifest.json"),
    "no name": (edited("manifest.json", lambda m: m.update(model=["tiny-gpt-oss"])), "missing", "no manifest.json"),
    "no sums": (gone("SHA256SUMS"), "inconsistent", "do not belong together"),
    "no provenance": (gone("provenance.json"), "inconsistent", "do not belong together"),
    "twice": (lambda f: shutil.copytree(f / "proof-0", f / "again" / "deep"), "inconsistent", "it is there 2 times"),
    "two proofs": (edited("report.json", fail_one), "inconsistent", "of two proofs"),
    "other numbers": (edited("report.json", lambda r: r["subject"].update(digest="0" * 64)), "inconsistent", "numbers"),
    "other version": (edited("report.json", lambda r: r["made"].update(exporter="9.9")), "inconsistent", "9.9"),
    "damaged": (edited("report.json", lambda r: r.pop("gates")), "inconsistent", "damaged"),
    "too large": (edited("report.json", lambda r: r["release"].update(top1=10**400)), "inconsistent", "is damaged"),
    "other figures": (edited("report.json", lambda r: r["release"].update(kl_mean=1e-9)), "inconsistent", "_kl_mean"),
    "other profile": (judged(lambda r: r["profile"].update(sha256="0" * 64)), "inconsistent", "another profile"),
    "a weaker limit": (judged(lenient), "inconsistent", "its gate release_kl_mean is not judged as"),
    "a gate less": (judged(lambda r: r["gates"].pop()), "inconsistent", "its gate ppl_ratio is not judged"),
    "no gates": (judged(lambda r: r.update(gates=[])), "inconsistent", "its gate digests_equal is not judged"),
    "an unknown gate": (judged(lambda r: r["gates"][0].update(name="x")), "inconsistent", 'unknown gate "x"'),
    "a verdict of its own": (judged(lambda r: r.update(status="gate failed")), "gate failed", "no gate was judged"),
    "never proved": (resealed(lambda m: m.pop("proof")), "inconsistent", "holds no proof"),
    "other source": (
        resealed(lambda m: m["source"]["files"].update({"config.json": "0" * 64})),
        "inconsistent",
        "source files are not those of the other cells of tiny-gpt-oss",
    ),
    "other recipe": (resealed(lambda m: m["recipe"].update(sha256="0" * 64)), "inconsistent", "another recipe"),
    "edited": (edited("manifest.json", lambda m: m.update(digest="0" * 64)), "inconsistent", "do not belong together"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_named(cells, proofs, fault):
    change, verdict, said = FAULTS[fault]
    change(proofs)
    found = looked_at(cells, proofs)
    assert found[GGUF].verdict == verdict
    assert said in " ".join(found[GGUF].problems)
    # Of two that are made of different files, neither is the usual one.
    assert found[MXFP4].verdict == ("inconsistent" if fault == "other source" else "passed")


def leaves(value, path=()):
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for key, each in inner:
        yield from leaves(each, (*path, key))


def changed(body, path, value):
    if not path:
        return value
    body = copy.deepcopy(body)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


ODD = [None, "", [], {}, math.nan, math.inf, 10**400, -1, True, "a\n|\x1b[31m", [[[]]]]


@pytest.mark.parametrize("name", ["manifest.json", "report.json"])
def test_no_value_breaks_the_gate(cells, made, tmp_path, name):
    """Any value anywhere: a verdict on that cell, none on the other, and no change of the manifest passes unsealed."""
    proofs = uploaded(made, tmp_path / "proofs")
    path, odd = proofs / "proof-0" / name, random.Random(7)
    body = json.loads(path.read_text())
    places = list(leaves(body))
    for place in [*places[:40], *odd.sample(places, 40)]:
        other = changed(body, place, odd.choice(ODD))
        write(path, other)
        found = looked_at(cells, proofs)
        assert found[MXFP4].verdict in ("passed", "inconsistent")
        assert name == "report.json" or other == body or found[GGUF].verdict != "passed"


def test_links_in_a_circle_are_not_followed(cells, proofs):
    (proofs / "proof-0" / "round").symlink_to(proofs)
    assert looked_at(cells, proofs)[GGUF].verdict == "passed"
    (proofs / "proof-0" / "manifest.json").unlink()
    (proofs / "proof-0" / "manifest.json").symlink_to("manifest.json")
    assert looked_at(cells, proofs)[GGUF].verdict == "missing"


def test_a_folder_that_is_none_is_said(cells, tmp_path):
    with pytest.raises(Refused, match="is no folder"):
        check(cells, tmp_path / "nowhere")


def test_resealing_is_what_exporter_does(proofs):
    """Else the faults above would be found for another reason."""
    place = proofs / "proof-0"
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    reseal(place)
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
