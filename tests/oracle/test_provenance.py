"""provenance.json and model.sig as the tools of others read them: in-toto's own messages, sha256sum, model-signing."""

import json
import shutil
import subprocess
import sys

import pytest
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement, statement_pb2

from exporter.errors import ExporterError
from exporter.pipeline.delivered import look
from exporter.pipeline.progress import Progress
from exporter.pipeline.sign import check_signature, sign
from tests.conftest import DEMO
from tests.sealed import make_key, sealed, sha256


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return sealed(tmp_path_factory.mktemp("made"), "mxfp4", "mxfp4-bf16")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "artifact")


# in-toto and SLSA


def test_it_is_a_statement_of_in_toto(made):
    parsed = json_format.Parse((made / "provenance.json").read_text(), statement_pb2.Statement())
    statement.Statement.copy_from_pb(parsed).validate()
    assert parsed.predicate_type == "https://slsa.dev/provenance/v1"
    subjects = {each.name: dict(each.digest) for each in parsed.subject}
    names = sorted([*json.loads((made / "manifest.json").read_text())["files"], "manifest.json"])
    listing = subprocess.run(["sha256sum", *names], cwd=made, capture_output=True, text=True, check=True).stdout
    assert subjects == {line.split("  ")[1]: {"sha256": line.split("  ")[0]} for line in listing.splitlines()}


def test_its_predicate_is_provenance_of_slsa(made):
    body = json.loads((made / "provenance.json").read_text())
    # A key that SLSA does not know would be an error here.
    parsed = json_format.ParseDict(body["predicate"], provenance_pb2.Provenance())
    build = parsed.build_definition
    assert build.build_type
    assert build.external_parameters["command"].startswith("exporter quantize ")
    materials = {each.name: dict(each.digest) for each in build.resolved_dependencies}
    for path in DEMO.iterdir():
        assert materials[path.name] == {"sha256": sha256(path)}
    assert parsed.run_details.builder.id
    assert dict(parsed.run_details.builder.version)["exporter"]
    (proof,) = parsed.run_details.byproducts
    assert proof.annotations["status"] == "passed"


def test_sha256sum_checks_the_lists(made):
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert {"manifest.json", "provenance.json", "config.json"} < checked


# model-signing's own command


def model_signing(*arguments, before=()):
    command = [*before, sys.executable, "-m", "model_signing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def alone():
    """What starts a command in a network of its own, with nothing in it; none where that is not allowed here."""
    command = ("unshare", "--map-root-user", "--net")
    try:
        done = subprocess.run([*command, "true"], capture_output=True, check=False)
    except FileNotFoundError:
        return ()
    return command if done.returncode == 0 else ()


def accepts(folder, public, *options, before=()):
    arguments = ("verify", "key", folder, "--signature", folder / "model.sig", "--public_key", public)
    return model_signing(*arguments, *options, before=before)


@pytest.mark.parametrize("curve", ["secp256r1", "secp384r1", "secp521r1"])
def test_it_accepts_what_we_sign(curve, folder, tmp_path):
    private, public = make_key(tmp_path, "maker", curve)
    sign(folder, private, Progress())
    for name in ("README.md", ".gitattributes", "plots/kl.svg"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("beside it")
    done = accepts(folder, public, before=alone())
    assert done.returncode == 0, done.stderr


def test_it_sees_what_changed_since_we_signed(folder, tmp_path):
    private, public = make_key(tmp_path, "maker")
    sign(folder, private, Progress())
    (folder / "more.txt").touch()
    assert "Extra files found" in accepts(folder, public).stderr
    (folder / "config.json").write_text("{}")
    assert "config.json" in accepts(folder, public, "--ignore_unsigned_files").stderr


def test_we_accept_what_it_signs(folder, tmp_path):
    private, public = make_key(tmp_path, "maker")
    (folder / "README.md").write_text("# signed as well")
    done = model_signing("sign", "key", folder, "--signature", folder / "model.sig", "--private_key", private)
    assert done.returncode == 0, done.stderr
    assert "README.md" in check_signature(folder, public)
    (artifact,) = look(folder, Progress(), public_key=public).artifacts
    assert (artifact.signature, artifact.problems) == ("good", ())
    (folder / "README.md").write_text("# changed")
    with pytest.raises(ExporterError, match=r"README.md is not the file that was signed"):
        check_signature(folder, public)


def test_both_refuse_the_key_of_another(folder, tmp_path):
    private, _ = make_key(tmp_path, "maker")
    _, other = make_key(tmp_path, "other")
    sign(folder, private, Progress())
    assert accepts(folder, other).returncode != 0
    with pytest.raises(ExporterError, match="another key"):
        check_signature(folder, other)


def test_a_signature_of_parts_of_files_is_told_apart(folder, tmp_path):
    """The library can sign files in shards too; that is not read here, and said so."""
    from model_signing import hashing, signing

    private, public = make_key(tmp_path, "maker")
    config = signing.Config().use_elliptic_key_signer(private_key=private)
    config.set_hashing_config(hashing.Config().use_shard_serialization()).sign(folder, folder / "model.sig")
    with pytest.raises(ExporterError, match="over parts of files"):
        check_signature(folder, public)
