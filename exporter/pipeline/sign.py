"""Signatures of artifacts: model.sig, a sigstore bundle as the model-signing library writes and checks it.

A plain EC key on this machine makes it, and nothing is asked of any network. Files are hashed here, once; the library
signs those hashes and says whether a key signed them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from exporter.errors import ExporterError, MissingExtra, Refused, UsageError
from exporter.pipeline.files import write_whole
from exporter.pipeline.integrity import BESIDE, Checked, check_artifact, names_in
from exporter.pipeline.manifest import hash_files
from exporter.pipeline.progress import Progress
from exporter.pipeline.seal import OWN_CAP, SIGNATURE

_MEDIA_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_PLAIN = {"method": "files", "hash_type": "sha256", "allow_symlinks": False}
# Not signed, and no reason for the library's own command to fail: what a repository has beside an artifact.
_IGNORED = (SIGNATURE, *sorted(BESIDE), ".cache", ".git", "plots")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CURVES = ("secp256r1", "secp384r1", "secp521r1")
_KEY_CAP = 1 << 20  # bytes of a key
_AGAIN = "download it again; without it, nothing says who made the artifact"


def sign(folder: Path, key: Path, progress: Progress, password: str = "") -> Path:
    """Sign every file of an artifact with a private key in PEM; where model.sig was written.

    Raises Refused for an artifact that is not as it was sealed, UsageError for a key that is none.
    """
    return sign_checked(check_artifact(folder, progress), key, password)


def sign_checked(checked: Checked, key: Path, password: str = "") -> Path:
    """`sign`, of an artifact whose files were hashed a moment ago."""
    folder = checked.folder
    if checked.problems:
        first = checked.problems[0]
        raise Refused(f"{folder} is not signed: {first.message}", hint=first.hint)
    private_key(key, password)
    library: Any = _library()
    hashes = {name: digest for name, digest in checked.hashes.items() if name != SIGNATURE}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch) / SIGNATURE
        secret: Any = password.encode() or None  # bytes, whatever the library's annotation says
        config = library.signing.Config().use_elliptic_key_signer(private_key=key, password=secret)
        config.set_hashing_config(_known(folder.resolve().name, hashes)).sign(folder, place)
        write_whole(folder / SIGNATURE, place.read_text(encoding="utf-8"))
    return folder / SIGNATURE


def signed_files(folder: Path) -> Mapping[str, str] | None:
    """SHA-256 by name that model.sig names, whoever made it; None where there is no signature.

    Raises ExporterError for a file that is no signature, or one of a kind that is not read here.
    """
    path = folder / SIGNATURE
    if not path.exists():
        return None
    return dict(_bundle(path)[1])


def check_signature(
    folder: Path, public_key: Path, hashes: Mapping[str, str] | None = None, progress: Progress | None = None
) -> Mapping[str, str]:
    """SHA-256 by name of what the owner of `public_key` signed, all of it as it is here.

    hashes: of the artifact's files, where they are known. Raises Refused where there is no signature or another key
    made it, ExporterError for a file that is not as it was signed: changed, missing, added.
    """
    path = folder / SIGNATURE
    if not path.exists():
        raise Refused(f"{folder} is not signed", hint="leave --public-key out to check its files alone")
    key = load_public_key(public_key)
    hint, signed = _bundle(path)
    if hint and hint != _fingerprint(key):
        raise Refused(f"{path} was made with another key than {public_key}", hint="ask its maker for the right key")
    _require_signed_by(path, public_key, signed)
    for problem in unlike_signed(folder, signed, hashes, progress):
        raise problem
    return signed


def unlike_signed(
    folder: Path, signed: Mapping[str, str], hashes: Mapping[str, str] | None = None, progress: Progress | None = None
) -> Iterator[ExporterError]:
    """Each file that is not as model.sig names it, or is of the artifact and not named."""
    here = dict(hashes) if hashes is not None else _hashes(folder, names_in(folder), progress)
    here.pop(SIGNATURE, None)
    here |= _hashes(folder, signed.keys() - here.keys(), progress)
    again = "download the artifact again, or let its maker sign it again"
    for name, digest in sorted(signed.items()):
        if name not in here:
            yield ExporterError(f"{folder / name} is missing: {SIGNATURE} names it", hint=again)
        elif here[name] != digest:
            yield ExporterError(f"{folder / name} is not the file that was signed: its bytes changed", hint=again)
    for name in sorted(here.keys() - signed.keys()):
        if not _ignored(name):
            yield ExporterError(f"{folder / name} was not signed", hint=again)


def private_key(path: Path, password: str = "") -> str:
    """SHA-256 of the public half of an EC key in PEM, as model.sig names it; what the file holds is not shown.

    Raises UsageError for a file that is no such key, or one that another password opens.
    """
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    raw = _key_bytes(path)
    try:
        key = load_pem_private_key(raw, password.encode() or None)
    except TypeError:
        if password:
            raise UsageError(f"{path} has no password, and one was given", hint="unset EXPORTER_KEY_PASSWORD") from None
        raise UsageError(
            f"{path} needs its password", hint="set EXPORTER_KEY_PASSWORD, or run it in a terminal, which asks"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        if password:
            raise UsageError(f"{path}: not its password, or no key", hint="check EXPORTER_KEY_PASSWORD") from None
        made = "openssl ecparam -name prime256v1 -genkey -noout -out KEY.pem"
        told = "a public key" if b"PUBLIC KEY" in raw else "no private key in PEM"
        raise UsageError(f"{path} is {told}", hint=f"{made} makes one") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UsageError(f"{path} is no EC key", hint=f"a key on one of {', '.join(_CURVES)}")
    return _fingerprint(_on_a_curve(path, key.public_key()))


def load_public_key(path: Path) -> Any:
    """An EC key in PEM. Raises UsageError for a file that is none."""
    _library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    raw = _key_bytes(path)
    if b"PRIVATE KEY" in raw:
        raise UsageError(f"{path} is a private key", hint=f"openssl ec -in {path} -pubout gives the public one")
    try:
        key = load_pem_public_key(raw)
    except (ValueError, UnsupportedAlgorithm):
        raise UsageError(f"{path} is no public key in PEM", hint="it begins with -----BEGIN PUBLIC KEY-----") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise UsageError(f"{path} is no EC key", hint=f"a key on one of {', '.join(_CURVES)}")
    return _on_a_curve(path, key)


def needs_password(path: Path) -> bool:
    """Whether a key file is encrypted, by its own words."""
    raw = _key_bytes(path)
    return b"BEGIN ENCRYPTED PRIVATE KEY" in raw or b"Proc-Type: 4,ENCRYPTED" in raw


# Keys


def _on_a_curve(path: Path, key: Any) -> Any:
    if key.curve.name not in _CURVES:
        raise UsageError(f"{path} is a key on {key.curve.name}", hint=f"a key on one of {', '.join(_CURVES)}")
    return key


def _key_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise UsageError(f"no key file {path}", hint="the path of a key in PEM")
    if path.stat().st_size > _KEY_CAP:
        raise UsageError(f"{path} is no key: {path.stat().st_size:,} bytes", hint="the path of a key in PEM")
    return path.read_bytes()


def _fingerprint(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return hashlib.sha256(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


# What model.sig says


def _bundle(path: Path) -> tuple[str, dict[str, str]]:
    """The hash of the key that it names, "" where it names none, and SHA-256 by name of the files."""
    if not path.is_file() or path.stat().st_size > OWN_CAP:
        raise ExporterError(f"{path} is no signature", hint=_AGAIN)
    try:
        bundle = json.loads(path.read_bytes())
        if bundle["mediaType"] != _MEDIA_TYPE:
            raise ValueError
        material = bundle["verificationMaterial"]
        if not isinstance(material.get("publicKey"), dict):
            raise _other_kind(path, "with a certificate or an account")
        hint = str(material["publicKey"].get("hint") or "")
        payload = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"], validate=True))
        if payload["predicateType"] != _PREDICATE_TYPE:
            raise _other_kind(path, f"of {str(payload['predicateType'])[:96]}")
        predicate = payload["predicate"]
        if predicate["serialization"]["method"] != "files":
            raise _other_kind(path, "over parts of files")
        resources = [(each["name"], each["algorithm"], each["digest"]) for each in predicate["resources"]]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ExporterError(f"{path} is damaged: no signature of a model", hint=_AGAIN) from None
    if any(algorithm != "sha256" for _, algorithm, _ in resources):
        raise _other_kind(path, "over other hashes than SHA-256")
    signed = {name: digest for name, _, digest in resources if is_file_name(name) and _is_sha256(digest)}
    if len(signed) != len(resources) or not signed:
        raise ExporterError(f"{path} is damaged: it names what can be no file", hint=_AGAIN)
    return hint, signed


def _other_kind(path: Path, how: str) -> ExporterError:
    return Refused(f"{path} was made {how}, which is not read here", hint="model_signing verify checks it")


def is_file_name(name: Any) -> bool:
    """Whether a name out of a list leads to a file below the folder of the list."""
    if not isinstance(name, str) or not name.isprintable():
        return False
    path = PurePosixPath(name)
    return name == str(path) != "." and not path.is_absolute() and ".." not in path.parts


def _is_sha256(digest: Any) -> bool:
    return isinstance(digest, str) and _SHA256.fullmatch(digest) is not None


def _ignored(name: str) -> bool:
    return name in _IGNORED or PurePosixPath(name).parts[0] in _IGNORED


def _hashes(folder: Path, names: Iterator[str] | set[str], progress: Progress | None) -> dict[str, str]:
    paths = {name: folder / name for name in names if (folder / name).is_file()}
    found = hash_files(list(paths.values()), 2, progress or Progress()) if paths else {}
    return {name: found[path] for name, path in paths.items()}


# The library


def _library() -> Any:
    try:
        import model_signing
    except ImportError:
        raise MissingExtra("model-signing", "sign", "a signature") from None
    return model_signing


def _require_signed_by(path: Path, public_key: Path, signed: Mapping[str, str]) -> None:
    """Raises Refused unless the owner of the key signed exactly these hashes, as the library reads them itself."""
    from cryptography.exceptions import InvalidSignature

    library = _library()
    try:
        # It prints a warning for signatures of its first releases.
        with contextlib.redirect_stdout(io.StringIO()):
            config = library.verifying.Config().use_elliptic_key_verifier(public_key=public_key)
            config.set_hashing_config(_known(path.parent.resolve().name, signed)).verify(path.parent, path)
    except InvalidSignature:
        raise Refused(f"{path} is not a signature of {public_key}", hint="ask its maker for the right key") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ExporterError(f"{path} is damaged: no signature of a model", hint=_AGAIN) from None


def _known(name: str, hashes: Mapping[str, str]) -> Any:
    """The library's hashing, but for that the hashes are known already."""
    from model_signing import hashing, manifest
    from model_signing._hashing.hashing import Digest

    class Known(hashing.Config):
        def hash(self, model_path: Any, *, files_to_hash: Any = None) -> manifest.Manifest:
            kind = manifest.SerializationType.from_args({**_PLAIN, "ignore_paths": _IGNORED})
            items = [kind.new_item(name, Digest("sha256", bytes.fromhex(digest))) for name, digest in hashes.items()]
            return manifest.Manifest(name, items, kind)

    made: Any = Known
    return made()
