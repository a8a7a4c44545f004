"""An environment that no client of the Hub can use: one line each, before and while the Hub is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from exporter.errors import UsageError
from exporter.hub.settings import require_endpoint
from tests.conftest import run_exporter
from tests.loopback_hub import LoopbackHub


@pytest.mark.parametrize("told", ["", "nonsense", "http://[::", "ftp://x", "http://x:99999", "http://"])
def test_an_endpoint_that_is_no_address(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", told)
    with pytest.raises(UsageError, match=r"HF_ENDPOINT is .* which is no address"):
        require_endpoint()


@pytest.mark.parametrize("told", ["https://huggingface.co", "http://127.0.0.1:8080/", "http://[::1]:80"])
def test_an_endpoint_that_is_one(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", told)
    require_endpoint()


SETTINGS = {
    "no address": ({"HF_ENDPOINT": "http://[::"}, 2, "HF_ENDPOINT is"),
    "no proxy": ({"ALL_PROXY": "http://[::"}, 2, "the address of a proxy is none"),
    "another kind of proxy": ({"ALL_PROXY": "foo://x"}, 2, "the address of a proxy is none"),
    "no token": ({"HF_TOKEN": "hf_\u00fc"}, 2, "your token has characters that no token has"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_what_the_environment_says(case: str, tmp_path: Path) -> None:
    more, code, says = SETTINGS[case]
    with LoopbackHub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "NO_PROXY": "", "no_proxy": "", **more}
        done = run_exporter("verify", "me/tiny", env=env)
    assert (done.code, len(done.err.splitlines())) == (code, 2), done.err
    assert says in done.err
    assert "hf_" not in done.err
