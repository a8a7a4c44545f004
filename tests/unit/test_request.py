"""What a request makes of a profile: formats, targets, contexts, and what must be installed for them."""

import sys

import pytest

from exporter.errors import MissingExtra, Refused, UsageError
from exporter.formats.base import FileLayout
from exporter.model.memory import fit
from exporter.model.released import RELEASED
from exporter.pipeline.export import require_names
from exporter.pipeline.plan import make_plan, misfit, released_scheme, wanted
from exporter.pipeline.profiles import load_profile, profile_names, source_text
from exporter.pipeline.request import RunRequest
from exporter.pipeline.runtimes import require_runtimes, require_writers
from exporter.types.profile import Profile

B20 = RELEASED["openai/gpt-oss-20b"]
PROFILE = load_profile("16gb")


def folders(profile, formats=(), targets=(), recipe=None):
    return [a.folder for a in wanted(profile, formats, targets, recipe)]


def edited(old, new, profile="16gb"):
    text = source_text(profile)
    assert old in text
    return Profile.from_toml(text.replace(old, new), "mine", "profile mine")


# Chosen


def test_what_is_made_on_request_waits_for_its_format():
    assert folders(PROFILE) == ["gguf-mxfp4-q8"]
    every = ["onnx-gptq-int4-g64-cpu", "onnx-gptq-int4-g64-webgpu"]
    assert folders(PROFILE, ("onnx",)) == every
    assert folders(PROFILE, ("onnx", "gguf")) == ["gguf-mxfp4-q8", *every]
    assert folders(PROFILE, ("onnx",), ("webgpu",)) == every[1:]


def test_a_recipe_replaces_that_of_what_is_made_by_default():
    assert folders(PROFILE, recipe="exact-q8") == ["gguf-exact-q8"]
    assert folders(PROFILE, recipe="gptq-int4") == [f"{f}-gptq-int4" for f in ("gguf", "gptq", "compressed-tensors")]
    assert folders(PROFILE, ("onnx",), ("cpu",), "exact-q8") == ["onnx-exact-q8-cpu"]


@pytest.mark.parametrize(
    ("formats", "targets", "words", "hint"),
    [
        ((), ("cpu",), "is not asked for", "--format onnx --target cpu"),
        (("onnx",), ("webgup",), 'Did you mean "webgpu"?', "targets: cpu, webgpu"),
        (("gguf",), ("npu",), 'nothing for target "npu"', "targets: cpu, sm120, sm80, webgpu"),
        (("onnx",), ("cuda",), 'nothing for target "cuda"', "--profile 24gb makes it"),
        (("tensorrt",), ("sm75",), 'nothing for target "sm75"', "--profile 48gb makes it"),
        (("gptq",), (), "makes no gptq; it makes gguf, mxfp4, onnx", "[[artifact]]"),
    ],
)
def test_what_a_profile_does_not_make_is_said(formats, targets, words, hint):
    with pytest.raises(UsageError) as caught:
        wanted(PROFILE, formats, targets, None)
    assert words in caught.value.message
    assert hint in caught.value.hint


def test_a_profile_may_make_nothing_by_default():
    profile = edited(
        'recipe = "mxfp4-q8"\nsplit_size = "45G" ', 'recipe = "mxfp4-q8"\ndefault = false\nsplit_size = "45G" '
    )
    with pytest.raises(UsageError, match="makes nothing that is not asked for; it makes gguf, mxfp4, onnx"):
        wanted(profile, (), (), None)
    assert folders(profile, ("gguf",)) == ["gguf-mxfp4-q8"]


def test_the_command_that_fills_the_store_can_be_pasted():
    request = RunRequest("my model", "16gb", ("onnx",), "r.toml", targets=("cpu",), context=4096)
    wanted_command = "exporter quantize 'my model' --profile 16gb --format onnx --target cpu --recipe r.toml"
    assert request.quantize_command() == f"{wanted_command} --context 4096 --until quantize"


# Contexts


@pytest.mark.parametrize("name", profile_names())
def test_everything_that_a_profile_makes_fits_its_own_model(name):
    profile = load_profile(name)
    formats = sorted({a.format for a in profile.artifacts})
    plan = make_plan("m", RELEASED[profile.model], released_scheme, profile, formats=formats)
    assert len(plan.artifacts) == len(profile.artifacts)
    assert misfit(plan) is None
    assert not plan.on_request


def test_an_artifact_may_have_a_context_of_its_own():
    profile = load_profile("16gb")
    (artifact,) = make_plan("m", B20, released_scheme, profile, formats=("onnx",), targets=("cpu",)).artifacts
    assert artifact.fit.context == 8192 < artifact.largest_context < profile.hardware.context
    (asked,) = make_plan(
        "m", B20, released_scheme, profile, formats=("onnx",), targets=("cpu",), context=4096
    ).artifacts
    assert asked.fit.context == 4096
    long = edited("context = 8192", "context = 262144")
    with pytest.raises(Refused, match="262,144 is beyond the model's 131,072"):
        make_plan("m", B20, released_scheme, long, formats=("onnx",), targets=("cpu",))


def test_a_cache_in_float32_takes_twice_the_memory():
    two, four = (fit(B20, 0, PROFILE.hardware, 8192, kv_item=item) for item in (2, 4))
    assert (four.kv_full, four.kv_sliding) == (2 * two.kv_full, 2 * two.kv_sliding)
    (artifact,) = make_plan("m", B20, released_scheme, PROFILE, formats=("onnx",), targets=("cpu",)).artifacts
    assert artifact.fit.kv_full == four.kv_full


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("context = 8192", "context = 0", "at least 1"),
        ("default = false", 'default = "no"', "must be bool"),
        ("default = false", "defualt = false", 'Did you mean "default"?'),
    ],
)
def test_bad_keys_of_an_artifact_are_said(old, new, words):
    with pytest.raises(UsageError) as caught:
        edited(old, new)
    assert words in caught.value.message


# Names of files


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../up", "a/../b", "a//b", "./a", "a\\b", "", "manifest.json", "SHA256SUMS", "export.jsonl"]
)
def test_a_file_stays_in_its_folder(name):
    with pytest.raises(ValueError, match="cannot be the name"):
        require_names([FileLayout("onnx/model.onnx", b"", 0), FileLayout(name, b"", 0)])


def test_a_name_is_given_once():
    require_names([FileLayout("onnx/a", b"", 0), FileLayout("a", b"", 0)])
    with pytest.raises(ValueError, match="cannot be the name"):
        require_names([FileLayout("a", b"", 0), FileLayout("a", b"", 0)])


# Installed


@pytest.mark.parametrize(
    ("module", "formats", "extra"),
    [
        ("xllamacpp", ("gguf",), "validate"),
        ("onnxruntime_genai", ("onnx",), "onnx"),
        ("onnxruntime", ("gguf", "onnx"), "onnx"),
        ("torch", ("gptq",), "validate"),
    ],
)
def test_a_proof_asks_for_what_its_formats_need(module, formats, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtra, match=module.replace("_", "-")) as caught:
        require_runtimes("cpu", formats)
    assert f"exporter[{extra}]" in caught.value.hint


def test_nobody_needs_what_another_format_is_run_in(monkeypatch):
    for module in ("xllamacpp", "onnxruntime_genai"):
        monkeypatch.setitem(sys.modules, module, None)
    require_runtimes("cpu", ("gptq", "compressed-tensors"))
    require_writers(("gguf", "onnx"))


def test_writing_onnx_needs_its_libraries(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx_ir", None)
    require_writers(("gguf",))
    with pytest.raises(MissingExtra, match="onnx-ir"):
        require_writers(("onnx",))
