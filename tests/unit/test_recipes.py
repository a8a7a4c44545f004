"""Recipes and profiles: what is read, what is refused, and how it is said."""

import pytest

from exporter.errors import Refused, UsageError
from exporter.pipeline.profiles import load_profile, load_recipe, profile_names, recipe_names, source_text
from exporter.types import Scheme, TensorSpec
from exporter.types.profile import Profile
from exporter.types.recipe import CalibrationSpec, GptqSpec, Recipe
from exporter.types.sizes import format_size, parse_size

EXPERT = TensorSpec("model.layers.0.mlp.experts.up_proj.weight", (4, 64, 64), "expert", 0)
LINEAR = TensorSpec("model.layers.0.self_attn.q_proj.weight", (64, 64), "linear", 0)
ROUTER = TensorSpec("model.layers.0.mlp.router.weight", (4, 64), "router", 0)
EMBEDDING = TensorSpec("model.embed_tokens.weight", (64, 64), "embedding")
HEAD = TensorSpec("lm_head.weight", (64, 64), "head")
BF16, MXFP4 = Scheme.parse("bf16"), Scheme.parse("mxfp4")


def recipe(*rules):
    text = 'title = "t"\n' + "\n".join(f"[[rule]]\n{rule}" for rule in rules)
    return Recipe.from_toml(text, "r", "recipe r.toml")


def test_the_first_match_wins():
    r = recipe('match = "*q_proj*"\nmethod = "rtn"\nscheme = "int8-g32"', 'match = "*"\nmethod = "keep"')
    assert r.step(LINEAR, BF16).scheme.name == "int8-g32"
    assert r.step(ROUTER, BF16).method == "keep"


def test_released_codes_pass_and_floats_are_repacked():
    r = recipe('match = "*"\nmethod = "pass"\nscheme = "mxfp4"\notherwise = "mse"')
    passed, repacked = r.step(EXPERT, MXFP4), r.step(EXPERT, BF16)
    assert (passed.method, passed.scheme.scale_rule) == ("pass", "released")
    assert (repacked.method, repacked.scheme.scale_rule) == ("repack", "mse")


@pytest.mark.parametrize(
    ("scheme", "rule"),
    [
        ("int4-g32", "signed-mse"),
        ("int4-g64", "signed-mse"),
        ("int8-g32", "absmax"),
        ("mxfp4", "mse"),
        ('int4-g32"\nscale_rule = "mse', "mse"),
        ('int4-g32"\nscale_rule = "absmax', "absmax"),
        ('int8-g32"\nscale_rule = "signed-mse', "signed-mse"),
        ('mxfp4"\nscale_rule = "floor', "floor"),
    ],
)
def test_gptq_chooses_scales_as_the_rule_says(scheme, rule):
    r = recipe(f'match = "*"\nmethod = "gptq"\nscheme = "{scheme}"')
    for spec, source in ((LINEAR, BF16), (HEAD, BF16), (EXPERT, BF16), *([(EXPERT, MXFP4)] * ("int" in scheme))):
        step = r.step(spec, source)
        assert (step.method, step.scheme.name) == ("gptq", scheme.split('"')[0])
        assert (step.scheme.scale_rule, step.otherwise, step.by_reference) == (rule, None, False)
        assert step.scheme.signed_scales == rule.startswith("signed")


def test_gptq_moves_what_is_mxfp4_already():
    step = recipe('match = "*"\nmethod = "gptq"\nscheme = "mxfp4"').step(EXPERT, MXFP4)
    assert (step.method, step.scheme.scale_rule, step.by_reference) == ("pass", "released", True)


def test_exact_takes_mxfp4_and_says_what_becomes_of_the_rest():
    strict = recipe('match = "*"\nmethod = "exact"\nscheme = "int8-g32"')
    step = strict.step(EXPERT, MXFP4)
    assert (step.method, step.scheme.name, step.scheme.scale_rule) == ("exact", "int8-g32", "pow2")
    assert (step.otherwise, step.by_reference) == (None, True)
    tuned = recipe('match = "*"\nmethod = "exact"\nscheme = "int8-g64"\notherwise = "absmax"')
    assert (tuned.step(EXPERT, BF16).method, tuned.step(EXPERT, BF16).otherwise) == ("exact", "absmax")
    assert tuned.step(EXPERT, MXFP4).scheme.group == 64


def settings(text):
    """A recipe with other tables."""
    return Recipe.from_toml(f'title = "t"\n{text}\n[[rule]]\nmatch = "*"\nmethod = "keep"', "r", "recipe r.toml")


def test_settings_of_calibration():
    default = settings("")
    assert default.calibration == CalibrationSpec("standard-library", 128, 512)
    assert default.gptq == GptqSpec(damp=0.01, hessian="routed")
    assert (default.formats, default.gates) == ((), {})
    own = settings(
        'formats = ["gguf", "gptq"]\n[calibration]\ntext = "self"\nwindows = 1\nlength = 2\n'
        '[gptq]\ndamp = 1\nhessian = "shared"\n[gates]\nexport_kl_mean = 0.5\ndigests_equal = true'
    )
    assert own.calibration == CalibrationSpec("self", 1, 2)
    assert own.gptq == GptqSpec(damp=1.0, hessian="shared")
    assert own.formats == ("gguf", "gptq")
    assert own.gates == {"export_kl_mean": 0.5, "digests_equal": True}
    assert default.sha256 != own.sha256


WRONG_SETTINGS = {
    "no windows": ("[calibration]\nwindows = 0", "[calibration]: 0 windows of 512 tokens"),
    "windows of one": ("[calibration]\nlength = 1", "[calibration]: 128 windows of 1 tokens"),
    "negative windows": ("[calibration]\nwindows = -4", "-4 windows"),
    "windows in words": ('[calibration]\nwindows = "many"', '"windows" must be int'),
    "text as number": ("[calibration]\ntext = 4", '"text" must be str'),
    "unknown calibration": ("[calibration]\nwindow = 4", 'unknown key "window". Did you mean "windows"'),
    "no damp": ("[gptq]\ndamp = 0", "[gptq]: damp 0 is not in (0, 1]"),
    "negative damp": ("[gptq]\ndamp = -0.01", "damp -0.01"),
    "damp beyond 1": ("[gptq]\ndamp = 1.5", "damp 1.5"),
    "damp not a number": ("[gptq]\ndamp = nan", "damp nan"),
    "unknown hessian": ('[gptq]\nhessian = "route"', "hessian 'route' does not fit GPTQ. Did you mean \"routed\""),
    "unknown gptq": ("[gptq]\nact_order = true", 'unknown key "act_order"'),
    "unknown gate": ("[gates]\nexport_top = 0.9", 'unknown key "export_top". Did you mean "export_top1"'),
    "gate in words": ('[gates]\nexport_kl_mean = "small"', '"export_kl_mean" must be'),
    "gate without end": ("[gates]\nexport_kl_mean = inf", "finite"),
    "formats in words": ('formats = "gguf"', '"formats" must be list'),
    "unknown table": ("[calibrate]\nwindows = 4", 'unknown key "calibrate". Did you mean "calibration"'),
}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_say_where_and_what(case):
    text, words = WRONG_SETTINGS[case]
    with pytest.raises(UsageError) as e:
        settings(text)
    assert words in e.value.message
    assert e.value.message.startswith("recipe r.toml")
    assert e.value.hint


REFUSED = {
    "no rule matches": (['match = "x"\nmethod = "keep"'], LINEAR, BF16, "no rule matches"),
    "router below bf16": (['match = "*"\nmethod = "rtn"\nscheme = "int8-g32"'], ROUTER, BF16, "never quantized"),
    "keep codes": (['match = "*"\nmethod = "keep"'], EXPERT, MXFP4, "stored as mxfp4"),
    "pass floats": (['match = "*"\nmethod = "pass"\nscheme = "mxfp4"'], EXPERT, BF16, "stored as bf16"),
    "group": (['match = "*"\nmethod = "rtn"\nscheme = "int4-g48"'], LINEAR, BF16, "48 does not divide"),
    "gptq group": (['match = "*"\nmethod = "gptq"\nscheme = "int4-g48"'], EXPERT, MXFP4, "48 does not divide"),
    "gptq on embeddings": (['match = "*"\nmethod = "gptq"\nscheme = "int8-g32"'], EMBEDDING, BF16, "no inputs"),
    "gptq on routers": (['match = "*"\nmethod = "gptq"\nscheme = "int8-g32"'], ROUTER, BF16, "never quantized"),
    "exact routers": (
        ['match = "*"\nmethod = "exact"\nscheme = "int8-g32"\notherwise = "absmax"'],
        ROUTER,
        BF16,
        "never quantized",
    ),
    "exact floats": (['match = "*"\nmethod = "exact"\nscheme = "int8-g32"'], EXPERT, BF16, "is stored as bf16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_recipe_cannot_do_is_refused(case):
    rules, spec, source, words = REFUSED[case]
    with pytest.raises(Refused, match=words) as e:
        recipe(*rules).step(spec, source)
    assert spec.name in e.value.message
    assert e.value.hint


WRONG_RECIPES = {
    "unknown key": ('match = "*"\nmethod = "keep"\nschem = "bf16"', 'unknown key "schem". Did you mean "scheme"'),
    "unknown method": ('match = "*"\nmethod = "keeep"', 'Did you mean "keep"'),
    "unknown scheme": ('match = "*"\nmethod = "rtn"\nscheme = "int8-32"', 'Did you mean "int8-g32"'),
    "keep with scheme": ('match = "*"\nmethod = "keep"\nscheme = "bf16"', "keep takes no scheme"),
    "rtn without scheme": ('match = "*"\nmethod = "rtn"', "needs a scheme"),
    "mxfp4 without rule": ('match = "*"\nmethod = "rtn"\nscheme = "mxfp4"', "needs a scale_rule"),
    "unknown rule": ('match = "*"\nmethod = "pass"\nscheme = "mxfp4"\notherwise = "msee"', 'Did you mean "mse"'),
    "no match": ('method = "keep"', '"match" is missing'),
    "exact int4": ('match = "*"\nmethod = "exact"\nscheme = "int4-g32"', '"exact" makes int8, not int4-g32'),
    "exact mxfp4": ('match = "*"\nmethod = "exact"\nscheme = "mxfp4"', '"exact" makes int8, not mxfp4'),
    "exact rule": ('match = "*"\nmethod = "exact"\nscheme = "int8-g32"\nscale_rule = "mse"', "'mse' does not fit"),
    "exact otherwise": ('match = "*"\nmethod = "exact"\nscheme = "int8-g32"\notherwise = "mse"', "'mse' does not fit"),
    "gptq floats": ('match = "*"\nmethod = "gptq"\nscheme = "bf16"', "makes int4, int8 and mxfp4, not bf16"),
    "gptq without scheme": ('match = "*"\nmethod = "gptq"', "needs a scheme"),
    "gptq otherwise": ('match = "*"\nmethod = "gptq"\nscheme = "mxfp4"\notherwise = "mse"', "'mse' does not fit"),
    "gptq rule": ('match = "*"\nmethod = "gptq"\nscheme = "int4-g32"\nscale_rule = "floor"', "'floor' does not fit"),
    "gptq mxfp4 rule": ('match = "*"\nmethod = "gptq"\nscheme = "mxfp4"\nscale_rule = "absmax"', "does not fit"),
    "gptq typo": (
        'match = "*"\nmethod = "gptq"\nscheme = "int4-g32"\nscale_rule = "signed"',
        'Did you mean "signed-mse"',
    ),
    "rtn signed": ('match = "*"\nmethod = "rtn"\nscheme = "int4-g32"\nscale_rule = "signed-mse"', "does not fit"),
    "rtn otherwise": ('match = "*"\nmethod = "rtn"\nscheme = "int8-g32"\notherwise = "mse"', "does not fit"),
    "pass int": ('match = "*"\nmethod = "pass"\nscheme = "int8-g32"', '"pass" makes mxfp4, not int8-g32'),
    "keep with a rule": ('match = "*"\nmethod = "keep"\nscale_rule = "mse"', "keep takes no scale_rule"),
    "not TOML": ("match = ", "not valid TOML"),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_wrong_recipes_say_where_and_what(case):
    rule, words = WRONG_RECIPES[case]
    with pytest.raises(UsageError) as e:
        recipe(rule)
    assert words in e.value.message
    assert e.value.message.startswith("recipe r.toml")


def edited(old, new):
    text = source_text("16gb")
    assert old in text
    return text.replace(old, new, 1)


WRONG_PROFILES = {
    "unknown key": (edited("reserve =", "reserved ="), 'Did you mean "reserve"'),
    "unknown gate": (edited("export_top1 =", "export_top ="), 'Did you mean "export_top1"'),
    "gate of another type": (edited("digests_equal = true", "digests_equal = 1"), "must be bool"),
    "size": (edited('memory = "15.9GiB"', 'memory = "16 gigs"'), "is not a size"),
    "device": (edited('device = "gpu"', 'device = "tpu"'), 'unknown device "tpu"'),
    "number": (edited("context = 32768", 'context = "32k"'), "must be int"),
    "zero": (edited("windows = 4", "windows = 0"), "at least 1"),
}


@pytest.mark.parametrize("case", WRONG_PROFILES)
def test_wrong_profiles_say_where_and_what(case):
    text, words = WRONG_PROFILES[case]
    with pytest.raises(UsageError) as e:
        Profile.from_toml(text, "p", "profile p.toml")
    assert words in e.value.message


def test_everything_shipped_loads():
    assert profile_names() == ["16gb", "24gb", "48gb", "80gb", "cpu"]
    for name in profile_names():
        for artifact in load_profile(name).artifacts:
            assert artifact.recipe in recipe_names()
    for name in recipe_names():
        assert load_recipe(name).title


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("12G", 12 * 10**9),
        ("12GB", 12 * 10**9),
        ("1.5GiB", 3 << 29),
        ("600 MB", 6 * 10**8),
        ("4096", 4096),
        ("2k", 2000),
    ],
)
def test_sizes(text, n):
    assert parse_size(text) == n


@pytest.mark.parametrize("text", ["", "G", "-1G", "1 gig", "1iB", "1e9"])
def test_not_sizes(text):
    with pytest.raises(UsageError):
        parse_size(text)


def test_sizes_are_printed_short():
    assert [format_size(n) for n in (0, 999, 1000, 13_761_264_768, 65_248_815_744)] == [
        "0 B", "999 B", "1 kB", "13.8 GB", "65.2 GB",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["mxfp4", "bf16", "f16", "f32", "int4-g32", "int8-g64", "int4-g64-asym"])
def test_scheme_names_parse_and_print(name):
    assert Scheme.parse(name).name == name


def test_scheme_bytes():
    assert Scheme.parse("mxfp4").row_bytes(2880) == 90 * 17
    assert Scheme.parse("int8-g32").row_bytes(2880) == 90 * 34
    assert Scheme.parse("int4-g64").row_bytes(2880) == 45 * 34
    assert Scheme.parse("bf16").row_bytes(2880) == 5760
