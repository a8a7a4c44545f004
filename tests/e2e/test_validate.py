"""exporter validate: a finished artifact proved from its files, and what is not proved; graphs of other tools."""

import hashlib
import json
import os
import shutil

import pytest

from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline.graphs import find_graphs, judge
from exporter.pipeline.profiles import source_text
from exporter.pipeline.progress import Progress
from exporter.pipeline.validate import Ask, read_made, validate
from tests.conftest import DEMO, make_artifact, run_exporter
from tests.hub_demo import FILES
from tests.loopback_hub import LoopbackHub
from tests.tensorrt_cases import CASES, TWINS

NAME = "mxfp4-mxfp4-bf16"


@pytest.fixture(scope="module")
def proved(tmp_path_factory):
    """(root, folder) of an artifact that `exporter quantize` proved; its profile is root/one-.toml."""
    root = tmp_path_factory.mktemp("proved")
    return root, make_artifact(root, "mxfp4", "mxfp4-bf16", until="validate")


@pytest.fixture
def folder(proved, tmp_path):
    """A copy, moved elsewhere."""
    return shutil.copytree(proved[1], tmp_path / "moved")


@pytest.fixture
def ask(proved, folder):
    def asked(**more):
        return validate(
            Ask(folder, **{"model": str(DEMO), "profile": str(proved[0] / "one-.toml"), **more}), Progress()
        )

    return asked


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def edit(folder, change):
    """Another manifest.json, and the hashes that go with it: as if it had been made so and not yet proved."""
    path = folder / "manifest.json"
    body = json.loads(path.read_text())
    body.pop("proof")
    (folder / "provenance.json").unlink()
    change(body)
    for name, each in body["files"].items():
        if (folder / name).is_file():
            each.update(sha256=sha256(folder / name), bytes=(folder / name).stat().st_size)
    path.write_text(json.dumps(body, indent=1) + "\n")
    names = sorted([*body["files"], "manifest.json"])
    hashes = {name: sha256(path) if name == path.name else body["files"][name]["sha256"] for name in names}
    (folder / "SHA256SUMS").write_text("".join(f"{digest}  {name}\n" for name, digest in hashes.items()))


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_the_same_is_found_from_the_files_alone(proved, tmp_path):
    """In a tree like the one that it was made in, without the store."""
    root, made = proved
    out = tmp_path / "out"
    place = shutil.copytree(made, out / "tiny-gpt-oss" / "one-" / NAME)
    before = json.loads((place / "report.json").read_text())
    (place / "report.json").write_text("{}")
    done = run_exporter("validate", place, "--model", DEMO, "-p", root / "one-.toml", "--json")
    assert done.code == 0, done.err
    (row,) = done.json["artifacts"]
    assert (row["status"], row["path"], row["format"], row["recipe"]) == ("passed", str(place), "mxfp4", "mxfp4-bf16")
    assert row["digests"] == {"tensors": 79, "equal": 79, "different": []}
    assert row["bytes"] == sum(p.stat().st_size for p in (place / name for name in read_made(place).files))
    after = json.loads((place / "report.json").read_text())
    for report in (before, after):  # when it was made, and how busy the machine was
        del report["made"], report["hardware"]
    assert after == before
    assert {p.name for p in (out / "tiny-gpt-oss").iterdir()} == {".lock", "one-", "source-hashes.json"}
    assert "<html" in (place / "report.html").read_text()


def test_a_moved_artifact_leaves_nothing_beside_it(folder, ask, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    (result,) = ask().artifacts
    assert result.status == "passed"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moved", "scratch"]
    assert not list((tmp_path / "scratch").iterdir())


def test_controls_are_asked_for(folder, ask, monkeypatch):
    """Of all of them two here; tests/e2e/test_controls.py has the others. What fails are copies, not the artifact."""
    from exporter.pipeline import controls

    few = [control for control in controls.CONTROLS if control.name in ("scale off by one", "window off by one")]
    monkeypatch.setattr(controls, "CONTROLS", few)
    before = {name: sha256(folder / name) for name in read_made(folder).files}
    (result,) = ask(controls=True).artifacts
    assert result.status == "passed"
    report = json.loads((folder / "report.json").read_text())
    assert report["status"] == "passed"
    assert [(each["name"], each["caught"]) for each in report["controls"]] == [(each.name, True) for each in few]
    assert [each["gates_failed"] for each in report["controls"]] == [
        ["head_equal", "behaves_as_released"],
        ["digests_equal"],
    ]
    for control in few:
        assert control.name in (folder / "report.md").read_text()
        assert control.name in (folder / "report.html").read_text()
    assert {name: sha256(folder / name) for name in before} == before


@pytest.mark.slow
def test_the_profile_is_the_one_that_it_was_made_for(demo_run, tmp_path):
    place = tmp_path / "tiny-gpt-oss" / "16gb" / demo_run.folder.name
    shutil.copytree(demo_run.folder, place)
    (place / "report.json").unlink()
    # Its name is in the file, and another one here.
    model = shutil.copytree(DEMO, tmp_path / "here")
    done = run_exporter("validate", place, "--model", model)
    assert done.code == 0, done.err
    assert "tiny-gpt-oss for 16gb" in done.out
    assert "79 of 79" in done.out
    assert json.loads((place / "report.json").read_text())["runtime"]["name"] == "llama.cpp"


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_is_found_by_itself(proved, tmp_path):
    env = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
        "HF_HUB_OFFLINE": "0",
    }
    profile = proved[0] / "one-.toml"
    with LoopbackHub() as hub:
        hub.repo("demo/tiny", FILES)
        env["HF_ENDPOINT"] = hub.url
        made = run_exporter("quantize", "-p", profile, "demo/tiny", "--out", tmp_path / "out", "--json", env=env)
        assert made.code == 0, made.err
        place = made.json["artifacts"][0]["path"]
        done = run_exporter("validate", place, "-p", profile, env=env)
    assert done.code == 0, done.err
    assert "ok, all" in done.out


def test_a_flipped_bit_that_the_hashes_cover_fails_a_gate(proved, folder):
    """Sealed anew, as by a tool that makes hashes of whatever is there."""
    flip(folder / "model.safetensors", -5_000)
    edit(folder, lambda body: None)
    done = run_exporter("validate", folder, "--model", DEMO, "-p", proved[0] / "one-.toml", "--json")
    assert done.code == 3, done.err
    (row,) = done.json["artifacts"]
    assert row["status"] == "gate failed"
    assert [gate["name"] for gate in row["gates"] if not gate["passed"]] == ["digests_equal"]
    assert len(row["digests"]["different"]) == 1
    assert json.loads((folder / "report.json").read_text())["status"] == "gate failed"


def tensor(body):
    return next(iter(body["tensors"].values()))


DAMAGES = {
    "a flipped bit": (lambda f: flip(f / "model.safetensors", -5_000), "its bytes changed"),
    "a file that is cut off": (lambda f: os.truncate(f / "model.safetensors", 100), "has 100 bytes, not the 7,4"),
    "a file that is gone": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "an edited small file": (lambda f: flip(f / "config.json", 3), "config.json is not the file"),
    "a manifest that was edited": (lambda f: flip(f / "manifest.json", 20), "manifest.json is not the one in SHA256S"),
    "a provenance that was edited": (lambda f: flip(f / "provenance.json", -50), "not the one in SHA256S"),
    "a manifest that is cut off": (
        lambda f: os.truncate(f / "manifest.json", 900),
        "manifest.json is damaged: no JSON",
    ),
    "brackets": (lambda f: (f / "manifest.json").write_text("[" * 200_000), "manifest.json is damaged: no JSON"),
    "a huge manifest": (lambda f: os.truncate(f / "manifest.json", 1 << 40), "damaged: 1,099,511,627,776 bytes"),
    "a huge list": (lambda f: os.truncate(f / "SHA256SUMS", 1 << 40), "damaged: 1,099,511,627,776 bytes"),
    "no recipe": (lambda f: edit(f, lambda body: body.pop("recipe")), "manifest.json is damaged: no 'recipe'"),
    "a number for a name": (lambda f: edit(f, lambda body: body.update(format=3)), "not as exporter writes it"),
    "a file elsewhere": (
        lambda f: edit(f, lambda body: body["files"].update({"../x": {"sha256": "0", "bytes": 1}})),
        "'../x' is no name",
    ),
    "a model elsewhere": (lambda f: edit(f, lambda body: body.update(model="..")), "'..' is no name"),
    "another digest": (lambda f: edit(f, lambda body: tensor(body).update(digest="0" * 64)), "not that of its tensors"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_not_as_it_was_sealed_is_not_proved(damage, folder, ask):
    change, told = DAMAGES[damage]
    change(folder)
    before = (folder / "report.json").read_bytes()
    with pytest.raises(ExporterError, match=told.replace("(", r"\(")) as caught:
        ask()
    assert (caught.value.exit_code, caught.value.hint is None) == (1, False)
    assert "\n" not in caught.value.message
    assert (folder / "report.json").read_bytes() == before


def test_a_pipe_in_the_place_of_a_file_does_not_hang(folder, ask):
    for name in ("manifest.json", "SHA256SUMS", "config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ExporterError, match=f"{name} is (no file|missing)"):
            ask()
        (folder / name).unlink()
        (folder / name).write_bytes(kept)


def test_an_artifact_that_was_exported_only_is_refused(folder, ask):
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(Refused, match="was exported and never proved"):
        ask()


@pytest.mark.parametrize("file", ["generation_config.json", "model-00001-of-00002.safetensors"])
def test_another_checkpoint_is_refused(file, ask, tmp_path):
    other = shutil.copytree(DEMO, tmp_path / "other")
    flip(other / file, -2_000 if file.endswith("safetensors") else 5)
    if file.endswith("json"):
        shutil.copy(DEMO / file, other / file)
        (other / file).write_text((other / file).read_text() + "\n")
    with pytest.raises(Refused, match=f"is not the checkpoint that .* was made of: {file} differs"):
        ask(model=str(other))


def test_a_tensor_that_the_plan_does_not_know_is_refused(folder, ask):
    from exporter.pipeline.manifest import total_digest

    def more(body):
        body["tensors"]["more"] = {"digest": "0" * 64}
        body["digest"] = total_digest({name: each["digest"] for name, each in body["tensors"].items()})

    edit(folder, more)
    with pytest.raises(Refused, match="not laid out as profile one- plans it"):
        ask()


def test_another_split_is_refused(proved, ask, tmp_path):
    text = (proved[0] / "one-.toml").read_text()
    (tmp_path / "split.toml").write_text(text.replace('target = ""', 'target = ""\nsplit_size = "1500K"'))
    with pytest.raises(Refused, match="not laid out as profile split plans it"):
        ask(profile=str(tmp_path / "split.toml"))


def test_an_artifact_of_another_version_is_refused(folder, ask):
    """Its files say by what they were made: this one is not laid out as that version would have done it."""
    edit(folder, lambda body: body.update(exporter="0.0.1"))
    with pytest.raises(Refused, match=r"split size, or exporter \(0.0.1 made it\)"):
        ask()


def test_another_recipe_is_refused(ask, tmp_path):
    recipe = tmp_path / "mxfp4-bf16.toml"
    recipe.write_text(source_text("mxfp4-bf16") + "# as it is now\n")
    with pytest.raises(Refused, match="was made by another recipe mxfp4-bf16 than ") as caught:
        ask(recipe=str(recipe))
    assert hashlib.sha256(source_text("mxfp4-bf16").encode()).hexdigest() in caught.value.hint


def test_a_recipe_that_has_another_name_now_is_the_same(proved, ask, tmp_path):
    (tmp_path / "mine.toml").write_text(source_text("mxfp4-bf16"))
    assert ask(recipe=str(tmp_path / "mine.toml")).artifacts[0].status == "passed"


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"model": None}, "was made of a folder, tiny-gpt-oss, and does not say where that is"),
        ({"profile": None}, 'was made for profile "one-", which is not one of ours'),
        ({"profile": "cpu"}, "profile cpu makes no mxfp4"),
        ({"profile": "16bg"}, 'unknown profile "16bg"'),
        ({"device": "tpu"}, 'unknown device "tpu"'),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
    ],
)
def test_what_is_not_said_is_asked_for(ask, more, told):
    with pytest.raises(ExporterError, match=told) as caught:
        ask(**more)
    assert (caught.value.exit_code, caught.value.hint is None) == (2, False)


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ('{"profile": {"name": "16gb", "sha256": "0"}}', 'was made for another profile "16gb" than the one'),
        ("not JSON", "does not say for which profile it was made"),
        (None, "does not say for which profile it was made"),
    ],
)
def test_a_profile_that_cannot_be_told_is_asked_for(folder, ask, report, told):
    (folder / "report.json").unlink()
    if report:
        (folder / "report.json").write_text(report)
    with pytest.raises(UsageError, match=told):
        ask(profile=None)


# Graphs of other tools


INT4, FP8, ANY = CASES["INT4"].model, CASES["FP8"].model, next(iter(TWINS.values()))


def written(path, model):
    path.write_bytes(model.SerializeToString())
    return path


def test_a_graph_is_judged_for_each_gpu(tmp_path):
    graph = written(tmp_path / "model.onnx", INT4)
    done = run_exporter("validate", graph)
    assert done.code == 3, done.err
    assert "SM75" in done.out
    assert "FAIL" in done.out
    assert "no engine was built" in done.out
    done = run_exporter("validate", graph, "--sm", 80, "--sm", 89, "--json")
    assert done.code == 0, done.err
    assert (done.json["status"], done.json["sms"]) == ("passed", [80, 89])
    assert done.json["graphs"][0]["findings"] == []
    assert "no engine was built" in done.json["not_run"]["engines"]
    done = run_exporter("validate", graph, "--sm", 75, "--json")
    assert done.code == 3
    ((each,),) = (graph["sms"] for graph in done.json["graphs"])
    assert not each["builds"]
    assert "INT4 is not there" in each["reason"]


def test_a_warning_is_no_refusal(tmp_path):
    graph = written(tmp_path / "model.onnx", CASES["DOUBLE"].model)
    report = judge(graph, [graph], (), False, Progress())
    assert report["status"] == "passed"
    assert [found["fatal"] for found in report["graphs"][0]["findings"]] == [False]


def test_a_folder_of_graphs(tmp_path):
    written(tmp_path / "a.onnx", ANY)
    (tmp_path / "onnx").mkdir()
    written(tmp_path / "onnx" / "b.onnx", FP8)
    report = judge(tmp_path, find_graphs(tmp_path), (), False, Progress())
    assert [graph["graph"] for graph in report["graphs"]] == ["a.onnx", "onnx/b.onnx"]
    builds = [[each["sm"] for each in graph["sms"] if each["builds"]] for graph in report["graphs"]]
    assert builds == [report["sms"], [sm for sm in report["sms"] if sm >= 89]]
    assert report["status"] == "gate failed"


def test_a_folder_for_tensorrt_is_judged_for_its_own_gpus(tmp_path):
    folder = make_artifact(tmp_path, "tensorrt", "mxfp4-embed8", "sm120")
    (folder / "manifest.json").unlink()
    done = run_exporter("validate", folder, "--json")
    assert done.code == 0, done.err
    assert done.json["sms"] == [120, 121]
    assert [graph["graph"] for graph in done.json["graphs"]] == ["decode.onnx", "prefill.onnx"]
    assert run_exporter("validate", folder / "prefill.onnx", "--sm", 75).code == 3


def test_what_is_no_graph_is_said_in_one_line(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"junk")
    done = run_exporter("validate", tmp_path, "--json")
    assert done.code == 1
    assert "not an ONNX model, or cut off" in done.json["message"]
    assert "exporter" not in done.json["hint"]  # another tool wrote it


@pytest.mark.parametrize(
    ("sms", "engines", "told"), [((90,), False, "SM90 are not known"), ((), True, "no profiles.json")]
)
def test_what_cannot_be_judged_is_refused(tmp_path, sms, engines, told):
    graph = written(tmp_path / "model.onnx", ANY)
    with pytest.raises(UsageError, match=told):
        judge(tmp_path, [graph], sms, engines, Progress())


# Neither


def test_paths_that_lead_nowhere(proved, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    told = {
        "loop": "leads nowhere",
        "loop/x": "does not exist",
        "absent": "does not exist",
        "empty": "has no manifest.json and no .onnx file",
        "notes.txt": "is no .onnx file",
    }
    for name, what in told.items():
        with pytest.raises(UsageError, match=what):
            find_graphs(tmp_path / name)
    with pytest.raises(UsageError) as caught:
        find_graphs(proved[1].parent)
    assert caught.value.hint == f"exporter validate {proved[1]}"
    done = run_exporter("validate", tmp_path / "loop")
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 2


def test_the_manifest_of_another_tool(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    done = run_exporter("validate", tmp_path)
    assert done.code == 2
    assert "manifest.json is not one that exporter wrote" in done.err


def test_options_of_the_other_kind_are_refused(proved, tmp_path):
    graph = written(tmp_path / "model.onnx", INT4)
    for words, told in (((graph, "--model", DEMO), "--model"), ((proved[1], "--sm", 89), "--sm")):
        done = run_exporter("validate", *words)
        assert done.code == 2
        assert f"which {told} is not for" in done.err
