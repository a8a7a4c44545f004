"""Texts of a stranger on a card: they stay texts. Read back by a YAML and a Markdown parser that know nothing of it."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from exporter.pipeline.card import Entry, make_card
from exporter.publish.card import markup
from tests.card_sample import REPO, manifest, report

HOSTILE = [
    "<script>alert(1)</script>",
    "a | b | c",
    "a \\| b",
    "a\\",
    "`` ` ``",
    "x\n---\nlicense: mit\n",
    "](javascript:alert(1)) [x",
    "[x](evil) [y][z] ![w](evil)",
    "![x](http://evil.example/p.png)",
    "http://evil.example www.evil.example me@evil.example",
    "</summary></details><img src=x onerror=alert(1)>",
    "# h\n\n- l\n1. n",
    "```\nsh\n```",
    "&lt;b&gt; &#124; &amp;",
    "\u202etxt.exe\u2066 \x1b[31m \0",
    "'; rm -rf ~ #",
    "$(id) `id` %s %n",
    "*a* _b_ ~c~ **d** $e$",
    ": yes\nno: &a [*a]",
    "",
]
texts = st.one_of(st.sampled_from(HOSTILE), st.text(max_size=60), st.text("<>|`\\*_[]()!#&;:/.@\n -", max_size=40))
renderer = MarkdownIt("commonmark", {"html": True, "linkify": False}).enable(["table", "strikethrough"])
ELEMENTS = {"details", "summary", "br"}


def elements(text):
    """Names of the HTML elements that pass through, and where links and pictures lead."""
    tags, targets = set(), set()
    for token in renderer.parse(text):
        for each in [token, *(token.children or [])]:
            if each.type in ("html_block", "html_inline"):
                tags |= set(re.findall(r"<\s*/?\s*([A-Za-z!][^\s>/]*)", each.content))
            if each.type == "link_open":
                targets.add(each.attrs["href"])
            if each.type == "image":
                targets.add(each.attrs["src"])
    return tags, targets


@given(texts)
@example("a\\|b")
@example("`|`\\")
def test_a_cell_is_one_cell_and_says_what_it_is(raw):
    for write, said in ((markup.text, markup.cleaned(raw)), (markup.code, markup.cleaned(raw).replace("|", "¦"))):
        html = renderer.render(markup.table(["a", "b"], [[f"{write(raw)}x", "end"]]))
        found = re.findall(r"<td>(.*?)</td>", html, re.DOTALL)
        assert len(found) == 2
        assert found[1] == "end"
        shown = re.sub(r"</?code>", "", found[0]).removesuffix("x")
        assert unescaped(shown) in (said, said.replace("|", "¦"))


def unescaped(html):
    import html as library

    return library.unescape(html)


@given(texts)
def test_a_text_opens_no_block(raw):
    html = renderer.render(markup.text(raw) or "x")
    assert re.fullmatch(r"<p>.*</p>\n", html, re.DOTALL)
    assert not re.search(r"<(?!/?(p|code)>)", html)


@given(texts)
def test_a_summary_is_text(raw):
    html = renderer.render(markup.folded(raw, "body"))
    assert re.findall(r"<(/?\w+)", html) == ["details", "summary", "/summary", "p", "/p", "/details"]


@st.composite
def strange_entries(draw):
    made = manifest(
        draw(st.sampled_from(["gguf", "onnx", "mxfp4", "gptq", "compressed-tensors"])),
        target=draw(texts),
        model=draw(texts),
        exporter=draw(texts),
        command=draw(texts),
        calibration={"text": draw(texts), "sha256": draw(texts)},
        digest=draw(texts),
        digest_algorithm=draw(texts),
        versions={draw(texts): draw(texts)},
    )
    made["recipe"] = {"name": draw(texts), "title": draw(texts), "sha256": draw(texts)}
    made["source"] = {"repo": draw(texts), "revision": draw(texts), "files": {draw(texts): draw(texts)}}
    made["files"] = {f"{draw(texts)}.gguf": {"bytes": 10}, draw(texts): {"bytes": draw(st.integers(0, 10**12))}}
    made["tensors"] = {draw(texts): {"scheme": draw(texts), "method": draw(texts)}}
    found = report(made) if draw(st.booleans()) else None
    if found is not None:
        found["subject"]["name"] = draw(texts)
        found["runtime"] = {"name": draw(texts), "version": draw(texts)}
        found["target"] = {"statement": draw(texts), "device": draw(texts), "memory_bytes": 10**10}
        found["not_run"] = {draw(texts): draw(texts)}
        found["hardware"] = {"cpu": draw(texts), "cores": 2, "gpus": [{"name": draw(texts)}]}
        found["gates"] = [{"name": draw(texts), "value": 1.0, "limit": 2.0, "passed": draw(st.booleans())}]
        found["against"] = {"repo": draw(texts), "revision": draw(texts)}
        found["twins"] = {"nearest": draw(texts)}
        found["tasks"] = [{"task": draw(texts), "score": 0.5, "n": 10}]
        found["profile"] = {"name": draw(texts), "sha256": draw(texts)}
        found["accuracy"]["plain"]["source"] = draw(texts)
    return Entry(draw(st.sampled_from(["", "one"])), made, found)


@given(strange_entries())
@settings(max_examples=30, deadline=None)
def test_a_card_of_strange_files(each):
    made = make_card(REPO, [each])
    _, head, body = made.text.split("---\n", 2)
    keys = {"license", "base_model", "base_model_relation", "library_name", "pipeline_tag", "quantized_by", "tags"}
    found = yaml.safe_load(head)
    assert found.keys() <= keys
    for value in found.values():
        assert isinstance(value, str) or all(isinstance(item, str) for item in value)
    assert body.startswith("<!-- exporter card -->\n")
    tags, targets = elements(body)
    assert tags <= {*ELEMENTS, "!--"}
    ours = ("https://huggingface.co/", "#the-proof", "plots/")
    files = {
        markup.quote(name, safe="/:#") for name in (*each.manifest["files"], "report.md", "report.html", "report.json")
    }
    for target in targets:
        plain = target.removeprefix("one/")
        assert target.startswith(ours) or plain in files or plain.startswith("report."), target
    headings = re.findall(r"^<h[12]>(.*)</h[12]>$", renderer.render(body), re.MULTILINE)
    assert len(headings) == 7  # the title, and the sections


@pytest.mark.parametrize("raw", HOSTILE)
def test_two_of_them_keep_their_folds(raw):
    entries = []
    for prefix in ("a", "b"):
        made = manifest(model=raw, recipe=raw)
        made["recipe"] = {"name": raw, "title": raw, "sha256": raw}
        entries.append(Entry(prefix, made, report(made)))
    body = make_card(REPO, entries).text.split("---\n", 2)[2]
    tags, _ = elements(body)
    assert tags <= {*ELEMENTS, "!--"}
    lines = body.splitlines()
    assert lines.count("<details>") == lines.count("</details>") == 2
