"""provenance.json: what manifest.json says, in the words that supply-chain tools read.

An in-toto Statement v1 (https://in-toto.io/Statement/v1) with SLSA's provenance v1 as its predicate
(https://slsa.dev/provenance/v1): the artifact's files are its subjects, the checkpoint's files, the recipe, the profile
and the texts what it was made of. It follows from manifest.json alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

BUILD_TYPE = "urn:exporter:quantize:1"


def statement(manifest: str) -> str:
    """The text of provenance.json that belongs to a manifest.json. Raises as a damaged one makes it."""
    body = json.loads(manifest)
    subjects = {name: each["sha256"] for name, each in body["files"].items()}
    subjects["manifest.json"] = sha256(manifest.encode()).hexdigest()
    value = {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(subjects.items())],
        "predicateType": "https://slsa.dev/provenance/v1",
        "predicate": {"buildDefinition": _definition(body), "runDetails": _details(body)},
    }
    return json.dumps(value, indent=1) + "\n"


def _definition(body: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "buildType": BUILD_TYPE,
        "externalParameters": {
            "command": body.get("command", ""),
            **{key: body[key] for key in ("model", "format", "target")},
            "recipe": body["recipe"]["name"],
        },
        "internalParameters": {"digest": {body["digest_algorithm"]: body["digest"]}, "layout": body["layout"]},
        "resolvedDependencies": _materials(body),
    }


def _materials(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything that the artifact was made of and proved with, by hash."""
    source, proof, calibration = body["source"], body.get("proof"), body.get("calibration")
    # https://github.com/package-url/purl-spec: a repository of the Hub at a commit.
    at = f"@{source['revision']}" if source["revision"] else ""
    uri = f"pkg:huggingface/{source['repo']}{at}" if source["repo"] else ""
    made = [
        {"name": name, **({"uri": f"{uri}#{name}"} if uri else {}), "digest": {"sha256": digest}}
        for name, digest in source["files"].items()
    ]
    made.append({"name": f"recipe {body['recipe']['name']}", "digest": {"sha256": body["recipe"]["sha256"]}})
    if calibration:
        made.append(_text("calibration text", calibration["text"], calibration["sha256"]))
    if proof:
        profile, text = proof["profile"], proof["text"]
        made.append({"name": f"profile {profile['name']}", "digest": {"sha256": profile["sha256"]}})
        made.append(_text("text that it was measured on", text["source"], text["sha256"]))
    return made


def _text(name: str, source: str, digest: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}, "annotations": {"source": source}}


def _details(body: Mapping[str, Any]) -> dict[str, Any]:
    versions = body.get("versions", {"exporter": body["exporter"]})
    details: dict[str, Any] = {"builder": {"id": f"urn:exporter:{body['exporter']}", "version": versions}}
    if proof := body.get("proof"):
        details["byproducts"] = [{"name": "proof", "uri": "manifest.json#/proof", "annotations": dict(proof)}]
    return details
