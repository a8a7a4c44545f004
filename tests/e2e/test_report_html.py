"""report.html in a browser: it is drawn, it differs where it should, and it asks for nothing."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib

import pytest

from exporter.validate.report import html
from tests import report_sample as sample

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-default-browser-check",
    "--disable-extensions", "--disable-dev-shm-usage", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
PAGES = {"passed": sample.full, "failed": sample.failed, "first schema": sample.first_schema, "empty": dict}


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Open a page; what the browser wrote on its two streams."""

    def run(page, *arguments):
        profile = tmp_path_factory.mktemp("profile")
        command = [BROWSER, *QUIET, f"--user-data-dir={profile}", *arguments, page.as_uri()]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=90, check=False, stdin=subprocess.DEVNULL, cwd=profile
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in PAGES.items():
        (folder / f"{name}.html").write_text(html(make()), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def shots(browse, pages, tmp_path_factory):
    """(width, height, rows of RGB bytes) by (page, width of the window, scheme), each taken once."""
    folder = tmp_path_factory.mktemp("shots")
    taken = {}

    def shot(name, width=1200, dark=False):
        if (name, width, dark) not in taken:
            path = folder / f"{name}-{width}-{dark}.png"
            scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
            browse(pages / f"{name}.html", f"--screenshot={path}", f"--window-size={width},900", scheme)
            taken[name, width, dark] = read_png(path.read_bytes())
        return taken[name, width, dark]

    return shot


def read_png(raw):
    """Width, height and the pixels' rows, 3 bytes each, of a PNG of 8 bits with or without alpha (W3C PNG, 9.2)."""
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    at, data, width, height, channels = 8, b"", 0, 0, 3
    while at < len(raw):
        size, kind = struct.unpack(">I4s", raw[at : at + 8])
        body = raw[at + 8 : at + 8 + size]
        if kind == b"IHDR":
            width, height, bits, colour, _, _, interlace = struct.unpack(">IIBBBBB", body)
            assert (bits, interlace) == (8, 0)
            channels = {2: 3, 6: 4}[colour]
        data += body if kind == b"IDAT" else b""
        at += 12 + size
    flat, stride = zlib.decompress(data), width * channels
    above, rows = bytes(stride), []
    for y in range(height):
        start = y * (stride + 1)
        above = unfiltered(flat[start], bytearray(flat[start + 1 : start + 1 + stride]), above, channels)
        rows.append(b"".join(above[i : i + 3] for i in range(0, stride, channels)) if channels == 4 else bytes(above))
    return width, height, rows


def unfiltered(kind, row, above, step):
    for i in range(len(row)):
        left, up = row[i - step] if i >= step else 0, above[i]
        corner = above[i - step] if i >= step else 0
        if kind == 4:
            near = (abs(up - corner), abs(left - corner), abs(left + up - 2 * corner))
            guess = left if near[0] <= near[1] and near[0] <= near[2] else up if near[1] <= near[2] else corner
        else:
            guess = (0, left, up, (left + up) // 2)[kind]
        row[i] = (row[i] + guess) & 255
    return bytes(row)


def paper(shot):
    """The colour of a corner."""
    return shot[2][2][:3]


def ink(shot):
    """Share of pixels that are not paper."""
    width, height, rows = shot
    back = paper(shot) * width
    return sum(a != b for row in rows for a, b in zip(row, back, strict=True)) / (3 * width * height)


def bright(colour):
    return sum(colour) / 3


def count_near(shot, colour, off=28):
    """How many pixels are about of a colour."""
    return sum(
        all(abs(row[i + c] - colour[c]) <= off for c in range(3)) for row in shot[2] for i in range(0, len(row), 3)
    )


RED, GREEN = (0xB3, 0x26, 0x1E), (0x1B, 0x73, 0x46)


def test_a_page_is_drawn(shots):
    shot = shots("passed")
    assert shot[:2] == (1200, 900)
    assert 0.02 < ink(shot) < 0.4
    assert bright(paper(shot)) > 245


def test_passed_and_failed_differ_in_colour_too(shots):
    passed, failed = shots("passed"), shots("failed")
    assert passed[2] != failed[2]
    assert count_near(passed, GREEN) > 300 > count_near(passed, RED)
    assert count_near(failed, RED) > 300


def test_dark_is_dark(shots):
    shot = shots("passed", dark=True)
    assert bright(paper(shot)) < 40
    assert 0.02 < ink(shot) < 0.4
    assert max(bright(row[i : i + 3]) for row in shot[2][:200] for i in range(0, len(row), 3)) > 200  # its letters


@pytest.mark.parametrize("name", PAGES)
def test_a_phone_shows_all_of_the_page(shots, name):
    """Nothing but tables that scroll is wider than the screen: the right edge stays paper."""
    shot = shots(name, width=390)
    assert shot[0] == 390
    assert {row[-12:] for row in shot[2]} == {paper(shot) * 4}
    assert ink(shot) > 0.005


@pytest.mark.parametrize("name", PAGES)
def test_the_browser_has_nothing_to_say(browse, pages, name):
    dom, err = browse(pages / f"{name}.html", "--dump-dom", "--enable-logging=stderr", "--v=0")
    assert "CONSOLE" not in err
    assert "<h1>" in dom
    assert dom.count("<section") == html(PAGES[name]()).count("<section")


def test_what_the_policy_forbids_is_told(browse, tmp_path):
    """The test above can fail: a script and a picture from elsewhere are each refused, and it is said."""
    planted = '<script>document.title = "ran"</script><img src="https://evil.example/x.png"></main>'
    page = tmp_path / "planted.html"
    page.write_text(html(sample.full()).replace("</main>", planted), encoding="utf-8")
    dom, err = browse(page, "--dump-dom", "--enable-logging=stderr", "--v=0")
    assert err.count("CONSOLE") >= 2
    assert "Content Security Policy" in err
    assert "<title>ran" not in dom


def test_a_hostile_name_does_not_run(browse, tmp_path):
    report = sample.full()
    report["subject"]["name"] = "</title><script>document.title='ran'</script><svg onload=\"document.title='ran'\">"
    report["weights"]["worst"][0]["name"] = "<img src=x onerror=\"document.title='ran'\">"
    page = tmp_path / "hostile.html"
    page.write_text(html(report), encoding="utf-8")
    dom, err = browse(page, "--dump-dom", "--enable-logging=stderr", "--v=0")
    assert "CONSOLE" not in err
    assert "<title>ran" not in dom
    assert "<img" not in dom
