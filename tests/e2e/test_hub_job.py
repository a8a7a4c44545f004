"""The main job on a Hub id: the real command and the real client against a Hub on loopback."""

import json

import pytest

from tests.conftest import DEMO, run_exporter
from tests.hub_demo import DECOYS, FILES, SHARDS
from tests.loopback_hub import Flip, LoopbackHub


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as running:
        running.repo("demo/tiny", {**FILES, **DECOYS})
        yield running


@pytest.fixture
def quantize(hub, tmp_path):
    """`exporter quantize demo/tiny` with a cache of its own."""
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_OFFLINE": "0",
    }

    def run(model="demo/tiny", until="export"):
        return run_exporter(
            "quantize", "-p", "16gb", model, "--out", tmp_path / "out", "--until", until, "--json", env=env
        )

    return run


def test_a_hub_id_goes_the_same_way_as_a_folder(hub, quantize, demo_run, tmp_path):
    done = quantize()
    assert done.code == 0, done.err
    manifest = json.loads(next((tmp_path / "out").rglob("manifest.json")).read_text())
    local = json.loads((demo_run.folder / "manifest.json").read_text())
    assert {n: t["digest"] for n, t in manifest["tensors"].items()} == {
        n: t["digest"] for n, t in local["tensors"].items()
    }
    assert manifest["source"]["repo"] == "demo/tiny"
    assert len(manifest["source"]["revision"]) == 40
    asked = " ".join(r.path for r in hub.requests)
    for decoy in ("original/", "metal/", "pytorch_model.bin", "extra.safetensors"):
        assert f"/{decoy}" not in asked.replace("/tree/", "/")


def test_a_wrong_byte_of_the_right_length_is_caught_and_cured(hub, quantize, tmp_path):
    # The plan reads the headers first, one request a shard.
    hub.inject("GET", "/_cdn/", *(Flip(300_000) for _ in range(len(SHARDS) + 1)))
    done = quantize()
    assert done.code == 1
    assert any(shard in done.json["message"] for shard in SHARDS)
    assert not list((tmp_path / "out").rglob("*.gguf"))
    assert quantize().code == 0


def test_a_finished_artifact_is_not_made_again(hub, quantize, tmp_path):
    assert quantize().code == 0
    before = next((tmp_path / "out").rglob("*.gguf")).stat().st_mtime_ns
    asked = len(hub.requests)
    assert quantize().code == 0
    assert next((tmp_path / "out").rglob("*.gguf")).stat().st_mtime_ns == before
    assert len(hub.requests) - asked < 5  # the revision, not the files


def test_a_repository_that_is_not_there(quantize):
    done = quantize("demo/absent")
    assert done.code == 2
    assert "demo/absent" in done.json["message"]


def test_a_plan_reads_headers_only(hub, tmp_path):
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    planned = run_exporter("plan", "-p", "16gb", "demo/tiny", "--json", env=env)
    assert planned.code == 0, planned.err
    local = run_exporter("plan", "-p", "16gb", DEMO, "--json")
    assert planned.json["artifacts"] == local.json["artifacts"]
    assert not list((tmp_path / "home").rglob("*.safetensors"))


REFUSED = {
    "context": ["-c", "999999"],
    "format": ["-f", "compressed-tensors"],
    "memory": ["--max-memory", "1M"],
    "device": ["--device", "gpu", "--until", "validate"],
    "recipe": ["--recipe", "nothing-like-it"],
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_before_the_download(case, hub, tmp_path):
    env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    arguments = ["quantize", "-p", "16gb", "demo/tiny", "--out", tmp_path / "out", *REFUSED[case]]
    done = run_exporter(*arguments, env=env)
    assert done.code in (2, 4), done.err
    assert not list((tmp_path / "home").rglob("*.safetensors"))
