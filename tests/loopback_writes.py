"""What a loopback Hub answers to a publisher, as huggingface_hub 2.4 asks it.

Making a repository, a branch, a tag, a pull request; the card's check; large files by the LFS protocol, in one or
several parts, or by hf_xet into a local store; and the commit, which must name the commit that it builds on.
"""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING, Any

import yaml

from tests.loopback_repos import LFS_SIZE, LFS_SUFFIXES, Blob, Fault, NoRoom, Pull, Repo, git_blob, large_blob

if TYPE_CHECKING:
    from tests.loopback_hub import LoopbackHub

_DATE = "2026-11-26T12:00:00.000Z"


class Writes(BaseHTTPRequestHandler):
    server: LoopbackHub
    fault: Fault | None = None

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while n := int(self.rfile.readline(), 16):
            body += self.rfile.read(n)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def write(self, parts: list[str], query: Mapping[str, list[str]], body: bytes, token: str) -> None:
        """Answer one request; `parts` of its path."""
        hub = self.server
        if parts[0] == "_objects":  # where large files are sent: without a token
            return self._object(parts[1], query, body)
        if parts == ["_id_token"]:  # what a GitHub job asks of GitHub
            return self._json({"value": f"job for {query['audience'][0]}"})
        if parts == ["oauth", "token"]:
            return self._exchange(json.loads(body))
        if token not in hub.tokens:
            return self._error(401, "", "Invalid credentials in Authorization header")
        if parts == ["api", "validate-yaml"]:
            return self._check_card(json.loads(body)["content"])
        if parts == ["api", "repos", "create"]:
            return self._create(json.loads(body))
        if parts[:2] == ["api", "models"] and len(parts) > 4:
            name, verb, rest = "/".join(parts[2:4]), parts[4], parts[5:]
        elif len(parts) > 4 and parts[1].endswith(".git"):
            name, verb, rest = f"{parts[0]}/{parts[1][:-4]}", "lfs", []
        else:
            return self._error(404, "", f"no route {'/'.join(parts)}")
        repo = hub.repos.get(name)
        if repo is None:
            return self._error(404, "RepoNotFound", "Repository not found")
        answer = getattr(self, f"_{verb.replace('-', '_')}", None)
        if answer is None:
            return self._error(404, "", f"no verb {verb}")
        if self.command == "POST" and (repo.read_only or name.split("/")[0] in hub.closed):
            allowed = verb in ("discussions", "preupload", "lfs") or (rest and rest[0].startswith("refs/pr/"))
            if not allowed:
                return self._error(403, "", f"you don't have the rights to write to {name}")
        return answer(repo, rest, body)

    def _exchange(self, asked: Mapping[str, str]) -> None:
        """A job that is trusted by a repository gets a token for it."""
        hub = self.server
        if asked["resource"] not in hub.trusting or asked["subject_token"] != f"job for {hub.url}":
            return self._json({"error": "invalid_grant", "error_description": "no trusted publisher"}, status=400)
        hub.tokens = (*hub.tokens, "hf_jwt_of_a_job")
        return self._json({"access_token": "hf_jwt_of_a_job", "token_type": "bearer", "expires_in": 3600})

    # Repositories, branches, tags

    def _create(self, asked: Mapping[str, Any]) -> None:
        hub, owner = self.server, asked["organization"] or "me"
        name = f"{owner}/{asked['name']}"
        if name in hub.repos:
            there = {"error": "You already created this model repo", "url": f"{hub.url}/{name}"}
            return self._json(there, status=409)
        if owner in hub.closed:
            return self._error(403, "", f"You don't have the rights to create a model under the namespace {owner!r}")
        repo = hub.repo(name, {".gitattributes": b"*.gguf filter=lfs\n"})
        repo.private = asked.get("visibility") == "private"
        return self._json({"url": f"{hub.url}/{name}", "name": name, "id": "0" * 24})

    def _branch(self, repo: Repo, rest: list[str], body: bytes) -> None:
        if rest[0] in repo.refs:
            return self._json({"error": "Reference already exists"}, status=409)
        repo.refs[rest[0]] = repo.find(json.loads(body).get("startingPoint", "main")) or ""
        return self._json({})

    def _tag(self, repo: Repo, rest: list[str], body: bytes) -> None:
        tag, commit = json.loads(body)["tag"], repo.find(rest[0])
        if tag in repo.tags:
            return self._json({"error": "Tag already exists"}, status=409)
        if commit is None:
            return self._error(404, "RevisionNotFound", "Invalid rev id")
        repo.tags[tag] = commit
        return self._json({})

    def _refs(self, repo: Repo, rest: list[str], body: bytes) -> None:
        branches = {n: c for n, c in repo.refs.items() if not n.startswith("refs/")}
        return self._json(
            {
                "branches": [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": c} for n, c in branches.items()],
                "tags": [{"name": n, "ref": f"refs/tags/{n}", "targetCommit": c} for n, c in repo.tags.items()],
                "converts": [],
            }
        )

    def _commits(self, repo: Repo, rest: list[str], body: bytes) -> None:
        sha, found = repo.find(rest[0]), []
        while sha:
            parent, title = repo.history[sha]
            found.append({"id": sha, "authors": [{"user": "me"}], "date": _DATE, "title": title, "message": ""})
            sha = parent
        return self._json(found)

    # Pull requests

    def _discussions(self, repo: Repo, rest: list[str], body: bytes) -> None:
        if self.command == "POST" and not rest:
            pull = Pull(len(repo.pulls) + 1, json.loads(body)["title"])
            repo.pulls.append(pull)
            repo.refs[f"refs/pr/{pull.number}"] = repo.refs["main"]
            return self._json({"num": pull.number})
        if not rest:
            # As the Hub: two a page, so that a client which reads one page misses some.
            start = 2 * int(self.path.partition("p=")[2].partition("&")[0] or 0)
            shown = [self._pull(repo, each) for each in repo.pulls[::-1][start : start + 2]]
            return self._json({"discussions": shown, "count": len(repo.pulls), "start": start})
        pull = repo.pulls[int(rest[0]) - 1]
        if self.command == "POST":
            pull.status = json.loads(body)["status"]
            event = {"id": "0", "type": "status-change", "createdAt": _DATE, "data": {"status": pull.status}}
            return self._json({"newStatus": event})
        more = {"changes": {"base": "refs/heads/main"}, "filesWithConflicts": [], "events": [], "diff": ""}
        return self._json({**self._pull(repo, pull), **more})

    def _pull(self, repo: Repo, pull: Pull) -> dict[str, Any]:
        return {
            "num": pull.number,
            "title": pull.title,
            "status": pull.status,
            "isPullRequest": True,
            "createdAt": _DATE,
            "author": {"name": "me"},
            "repo": {"name": repo.name, "type": "model"},
        }

    # The card

    def _check_card(self, text: str) -> None:
        try:
            head = yaml.safe_load(text.split("---\n", 2)[1]) if text.startswith("---\n") else None
        except (yaml.YAMLError, IndexError) as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        warnings = [] if head else [{"message": "empty or missing yaml metadata in repo card"}]
        bad = [k for k in ("license", "pipeline_tag", "library_name") if head and not isinstance(head.get(k, ""), str)]
        errors = [{"message": f'"{key}" must be a string'} for key in bad]
        return self._json({"errors": errors, "warnings": warnings}, status=400 if errors else 200)

    # Files

    def _preupload(self, repo: Repo, rest: list[str], body: bytes) -> None:
        tree, out = repo.tree(rest[0]), []
        for file in json.loads(body)["files"]:
            name, there = file["path"], tree.get(file["path"])
            large = name.endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE or b"\0" in base64.b64decode(file["sample"])
            ignored = name in (tree[".gitignore"].data.decode().split() if ".gitignore" in tree else [])
            entry = {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignored}
            out.append({**entry, **({"oid": there.etag} if there else {})})
        return self._json({"files": out, "commitOid": repo.find(rest[0])})

    def _lfs(self, repo: Repo, rest: list[str], body: bytes) -> None:
        hub, asked, out = self.server, json.loads(body), []
        for each in asked["objects"]:
            oid, size = each["oid"], each["size"]
            if isinstance(self.fault, NoRoom):
                out.append({**each, "error": {"code": 403, "message": self.fault.message}})
                continue
            if oid in hub.objects:
                out.append(each)
                continue
            upload: dict[str, Any] = {"href": f"{hub.url}/_objects/{oid}"}
            if hub.part_size and size > hub.part_size:
                count = -(-size // hub.part_size)
                urls = {f"{i:05d}": f"{upload['href']}?part={i}" for i in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(hub.part_size), **urls}
            verify = {"href": f"{hub.url}/_objects/{oid}?verify=1"}
            out.append({**each, "authenticated": True, "actions": {"upload": upload, "verify": verify}})
        return self._json({"transfer": "multipart" if hub.part_size else "basic", "objects": out})

    def _object(self, oid: str, query: Mapping[str, list[str]], body: bytes) -> None:
        hub = self.server
        if "verify" in query:
            there = len(hub.objects.get(oid, b"")) == json.loads(body)["size"]
            return self._json({}, status=200 if there else 404)
        if "part" in query:
            hub.parts.setdefault(oid, {})[int(query["part"][0])] = body
            return self._json({}, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        if self.command == "POST":
            got = hub.parts.pop(oid, {})
            body = b"".join(got[part["partNumber"]] for part in json.loads(body)["parts"])
        if hashlib.sha256(body).hexdigest() != oid:
            return self._error(400, "", "sha256 mismatch")
        hub.objects[oid] = body
        return self._json({})

    def _xet_write_token(self, repo: Repo, rest: list[str], body: bytes) -> None:
        end = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": f"local://{self.server.xet}",
            "X-Xet-Access-Token": "x",
            "X-Xet-Token-Expiration": str(end),
        }
        return self._json({"casUrl": headers["X-Xet-Cas-Url"], "exp": end, "accessToken": "x"}, headers)

    def _commit(self, repo: Repo, rest: list[str], body: bytes) -> None:
        hub, branch = self.server, rest[0]
        lines = [json.loads(line) for line in body.splitlines()]
        head, tree = lines[0]["value"], dict(repo.tree(branch))
        if head.get("parentCommit", repo.refs[branch]) != repo.refs[branch]:
            return self._error(412, "", "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                data = base64.b64decode(value["content"])
                tree[value["path"]] = Blob(data, git_blob(data), None, len(data))
            elif line["key"] == "lfsFile":
                if value["oid"] not in hub.objects and not hub.xet:
                    return self._error(400, "", f"LFS object {value['oid']} is missing")
                tree[value["path"]] = large_blob(hub.objects.get(value["oid"], b""), value["oid"], value["size"])
            elif tree.pop(value["path"], None) is None:
                return self._error(404, "EntryNotFound", "A file with this name doesn't exist")
        commit = repo.put(tree, branch, head["summary"])
        return self._json({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo.name}/commit/{commit}"})

    def _json(self, value: object, headers: Mapping[str, str] | None = None, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self._send(status, body, {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        raise NotImplementedError
