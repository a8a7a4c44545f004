"""Keys and signatures that are not what they should be: one clear line each, and no network."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from exporter.cli.sign import command
from exporter.errors import ExporterError, Refused, UsageError
from exporter.pipeline.progress import Progress
from exporter.pipeline.sign import check_signature, private_key, sign, signed_files
from tests.sealed import make_key, sealed, sha256

Bundle = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sealed(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_key(tmp_path_factory.mktemp("keys"), "maker")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "artifact")


@pytest.fixture
def signed(folder: Path, keys: tuple[Path, Path]) -> Path:
    sign(folder, keys[0], Progress())
    return folder


def test_it_names_every_file(signed: Path, keys: tuple[Path, Path]) -> None:
    here = {path.name: sha256(path) for path in signed.iterdir() if path.name != "model.sig"}
    assert signed_files(signed) == here
    assert check_signature(signed, keys[1]) == here
    assert {"manifest.json", "SHA256SUMS", "report.json", "report.html"} < here.keys()


def test_without_a_signature(folder: Path, keys: tuple[Path, Path]) -> None:
    assert signed_files(folder) is None
    with pytest.raises(Refused, match="is not signed"):
        check_signature(folder, keys[1])


def test_the_key_of_someone_else(signed: Path, tmp_path: Path) -> None:
    _, other = make_key(tmp_path, "other")
    with pytest.raises(Refused, match="was made with another key than"):
        check_signature(signed, other)


def test_a_file_that_was_added_later(signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "more.txt").touch()
    with pytest.raises(ExporterError, match=r"more.txt was not signed"):
        check_signature(signed, keys[1])


def test_the_signature_of_another_artifact(signed: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    other = shutil.copytree(signed, tmp_path / "other")
    (other / "report.md").write_text("another proof")
    sign(other, keys[0], Progress())
    shutil.copy(other / "model.sig", signed)
    with pytest.raises(ExporterError, match=r"report.md is not the file that was signed"):
        check_signature(signed, keys[1])


def test_what_is_not_as_it_was_sealed_is_not_signed(folder: Path, keys: tuple[Path, Path]) -> None:
    (folder / "report.json").unlink()
    with pytest.raises(Refused, match=r"is not signed: .*report.json is missing") as caught:
        sign(folder, keys[0], Progress())
    assert caught.value.exit_code == 4
    assert not (folder / "model.sig").exists()


def test_signing_anew_takes_the_place_of_the_last_signature(
    signed: Path, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    private, public = make_key(tmp_path, "other", "secp384r1")
    sign(signed, private, Progress())
    assert check_signature(signed, public)
    with pytest.raises(Refused, match="another key"):
        check_signature(signed, keys[1])


# Signatures that are none


def payload(bundle: Bundle, change: Callable[[Any], object]) -> None:
    envelope = bundle["dsseEnvelope"]
    statement = json.loads(base64.b64decode(envelope["payload"]))
    change(statement)
    envelope["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()


def resources(statement: Any) -> list[Any]:
    named: list[Any] = statement["predicate"]["resources"]
    return named


def resource(key: str, value: object) -> Callable[[Bundle], None]:
    return lambda bundle: payload(bundle, lambda s: resources(s)[0].__setitem__(key, value))


def forged(bundle: Bundle) -> None:
    """The files of the statement as somebody else would want them, under the old signature."""
    payload(bundle, lambda s: resources(s).pop())


def in_shards(statement: Any) -> None:
    statement["predicate"]["serialization"]["method"] = "shards"


EDITS: dict[str, tuple[Callable[[Bundle], object], str]] = {
    "another media type": (lambda b: b.__setitem__("mediaType", "text/plain"), "is damaged"),
    "no envelope": (lambda b: b.pop("dsseEnvelope"), "is damaged"),
    "a payload that is no base64": (lambda b: b["dsseEnvelope"].__setitem__("payload", "*"), "is damaged"),
    "no signature": (lambda b: b["dsseEnvelope"].__setitem__("signatures", []), "is damaged"),
    "a signature that is none": (
        lambda b: b["dsseEnvelope"]["signatures"][0].__setitem__("sig", "AAAA"),
        "is not a",
    ),
    "a changed list": (forged, "is not a signature of"),
    "no files": (lambda b: payload(b, lambda s: resources(s).clear()), "can be no file"),
    "a path out of the folder": (resource("name", "../../secret"), "can be no file"),
    "an absolute path": (resource("name", "/etc/hostname"), "can be no file"),
    "a name of two lines": (resource("name", "a\nb"), "can be no file"),
    "a name twice": (
        lambda b: payload(b, lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0])),
        "no file",
    ),
    "a hash that is none": (resource("digest", "00"), "can be no file"),
    "another hash function": (resource("algorithm", "blake3"), "over other hashes"),
    "parts of files": (
        lambda b: payload(b, lambda s: s["predicate"]["serialization"].__setitem__("method", "shards")),
        "over parts",
    ),
    "another statement": (lambda b: payload(b, lambda s: s.__setitem__("predicateType", "x\n")), "was made of x"),
    "a certificate": (
        lambda b: b.__setitem__("verificationMaterial", {"x509CertificateChain": {"certificates": []}}),
        "with a certificate or an account",
    ),
    "no key named": (lambda b: b["verificationMaterial"]["publicKey"].pop("hint"), ""),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_signature(
    case: str, signed: Path, keys: tuple[Path, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    edit, says = EDITS[case]
    bundle = json.loads((signed / "model.sig").read_text())
    edit(bundle)
    (signed / "model.sig").write_text(json.dumps(bundle))
    if says:
        with pytest.raises(ExporterError, match=says) as caught:
            check_signature(signed, keys[1])
        assert caught.value.hint
    else:  # as the library's first releases wrote it
        assert check_signature(signed, keys[1])
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("raw", [b"", b"{", b"\x00" * 99, b"[" * 200_000, b"null", b'{"mediaType": []}'])
def test_a_file_that_is_no_signature(raw: bytes, signed: Path, keys: tuple[Path, Path]) -> None:
    (signed / "model.sig").write_bytes(raw)
    for read in (lambda: signed_files(signed), lambda: check_signature(signed, keys[1])):
        with pytest.raises(ExporterError, match=r"model.sig is damaged: no signature of a model"):
            read()


def test_a_signature_cut_off_anywhere(signed: Path, keys: tuple[Path, Path]) -> None:
    raw = (signed / "model.sig").read_bytes()
    for stop in range(0, len(raw), 97):
        (signed / "model.sig").write_bytes(raw[:stop])
        with pytest.raises(ExporterError, match="is damaged"):
            check_signature(signed, keys[1])


# Keys that are none


@pytest.mark.parametrize(
    "raw", [b"", b"hello", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", b"\xff" * 99]
)
def test_files_that_are_no_keys(raw: bytes, signed: Path, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(raw)
    with pytest.raises(UsageError, match="is no public key in PEM"):
        check_signature(signed, path)
    with pytest.raises(UsageError, match=r"is (no private key in PEM|a public key)"):
        private_key(path)


def test_keys_in_each_others_place(signed: Path, keys: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="is a private key") as caught:
        check_signature(signed, keys[0])
    assert "-pubout" in str(caught.value.hint)
    with pytest.raises(UsageError, match="is a public key"):
        sign(signed, keys[1], Progress())


def test_keys_of_other_kinds(signed: Path, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric import ed25519

    edwards = ed25519.Ed25519PrivateKey.generate()
    (tmp_path / "ed.pem").write_bytes(edwards.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public = edwards.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "ed.pub").write_bytes(public)
    bitcoin, bitcoin_public = make_key(tmp_path, "k1", "secp256k1")
    for private, public_key, says in (
        (tmp_path / "ed.pem", tmp_path / "ed.pub", "is no EC key"),
        (bitcoin, bitcoin_public, "is a key on secp256k1"),
        (tmp_path / "absent", tmp_path / "absent", "no key file"),
    ):
        with pytest.raises(UsageError, match=says):
            private_key(private)
        with pytest.raises(UsageError, match=says):
            check_signature(signed, public_key)


def test_passwords(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    hidden, _ = make_key(tmp_path, "hidden", password="right")
    with pytest.raises(UsageError, match="needs its password"):
        private_key(hidden)
    with pytest.raises(UsageError, match="not its password"):
        private_key(hidden, "wrong")
    assert len(private_key(hidden, "right")) == 64
    with pytest.raises(UsageError, match="has no password"):
        private_key(keys[0], "any")


def test_the_command_takes_the_password_from_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden, public = make_key(tmp_path, "hidden", password="right")
    monkeypatch.setenv("EXPORTER_KEY_PASSWORD", "right")
    command.main([str(folder), "--key", str(hidden), "--json"], standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert told["artifacts"][0]["files"] == 7
    assert told["key_sha256"] == sign_hint(folder)
    assert check_signature(folder, public)
    assert "right" not in (folder / "model.sig").read_text()


def sign_hint(folder: Path) -> str:
    return str(json.loads((folder / "model.sig").read_text())["verificationMaterial"]["publicKey"]["hint"])


def test_an_artifact_that_was_never_proved_is_signed_with_a_warning(
    folder: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from exporter.pipeline.seal import seal

    body = json.loads((folder / "manifest.json").read_text())
    del body["proof"]
    (folder / "manifest.json").write_text(json.dumps(body))
    seal(folder, body["source"]["files"], {name: sha256(folder / name) for name in body["files"]})
    (folder / "provenance.json").unlink()
    command.main([str(folder), "--key", str(keys[0])], standalone_mode=False)
    assert "is signed, and it was never proved" in capsys.readouterr().err


# No network


def test_nothing_is_asked_of_any_network(folder: Path, keys: tuple[Path, Path]) -> None:
    """Signing and checking in a process that dies at the first name that is looked up and the first connection."""
    code = """
import sys
def watch(event, arguments):
    # A library binds a socket when it is imported, to see whether there is IPv6; nothing leaves the machine by that.
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"the network was used: {event}")
sys.addaudithook(watch)
from pathlib import Path
from exporter.pipeline.progress import Progress
from exporter.pipeline.sign import check_signature, sign
folder, key, public = map(Path, sys.argv[1:4])
sign(folder, key, Progress())
print(len(check_signature(folder, public)))
try:
    __import__("socket").create_connection(("127.0.0.1", 9), 1)
except SystemExit as stopped:
    print(stopped)
"""
    done = subprocess.run([sys.executable, "-c", code, folder, *keys], capture_output=True, text=True, check=False)
    # The last line shows that it would have been seen.
    assert done.stdout.splitlines() == ["7", "the network was used: socket.getaddrinfo"], done.stderr
