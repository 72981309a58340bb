"""What the Hub of hub_server.py keeps, and what it answers: a function for each route, their table
at the end. The protocol is that which huggingface_hub 2.4 speaks.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs

import yaml

if TYPE_CHECKING:
    from .hub_server import HubServer

LFS_NAMES = (".safetensors", ".bin", ".pt", ".png", ".parquet")
LFS_BYTES = 10_000_000
FOLDERS = {"model": "", "dataset": "datasets/", "space": "spaces/"}


class Answer(NamedTuple):
    """What is sent back."""

    body: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = {}


class HubError(Exception):
    """An answer that is an error. Clients choose their exception by `code`, and show `message`."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        named = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(json.dumps({"error": message}).encode(), status, named | headers)


@dataclass
class Call:
    """A request as a route gets it; `names` are the parts of its path."""

    names: dict[str, str | None]
    query: dict[str, list[str]]
    authorization: str | None
    range: str | None
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


@dataclass(frozen=True)
class Commit:
    """A whole tree, {path: content}, and the id of the commit before it."""

    oid: str
    title: str
    message: str
    tree: dict[str, bytes]
    parent: str | None
    date: str


@dataclass
class Repo:
    """Branches, tags and pull requests (by number: 1, 2, ...) are ids of commits."""

    kind: str
    id: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        """The commit of a branch, a tag, `refs/pr/<number>` or an id; RevisionNotFound."""
        pulls = {f"refs/pr/{number}": oid for number, oid in self.pulls.items()}
        oid = (self.branches | self.tags | pulls).get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def tree(self, revision: str = "main") -> dict[str, bytes]:
        """{path: content} at a revision."""
        return self.at(revision).tree

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits that led to a revision, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def commit(self, tree: dict[str, bytes], title: str, message: str, parent: str | None) -> str:
        """Store a commit and return its id; no branch has it yet."""
        named = f"{self.kind} {self.id} {len(self.commits)} {time.time_ns()} {title}"
        oid = hashlib.sha1(named.encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        self.commits[oid] = Commit(oid, title, message, tree, parent, date)
        return oid


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub wants a file through LFS; an empty one it never does."""
    return size > LFS_BYTES or (size > 0 and path.endswith(LFS_NAMES))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def blob_id(content: bytes) -> str:
    """git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def file_id(path: str, content: bytes) -> str:
    return sha256(content) if is_lfs(path, len(content)) else blob_id(content)


def listed(path: str, content: bytes) -> dict:
    """A file as it stands in a tree; git has but a pointer to one in LFS."""
    item = {"type": "file", "path": path, "oid": blob_id(content), "size": len(content)}
    if is_lfs(path, len(content)):
        oid, spec = sha256(content), "https://git-lfs.github.com/spec/v1"
        pointer = f"version {spec}\noid sha256:{oid}\nsize {len(content)}\n".encode()
        lfs = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
        item |= {"oid": blob_id(pointer), "lfs": lfs}
    return item


def card_data(readme: bytes) -> dict:
    """The metadata at the top of a README.md; 400 where it is not valid."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", readme.decode(), re.DOTALL)
    try:
        data = (yaml.safe_load(found[1]) if found else None) or {}
        json.dumps(data, allow_nan=False, default=str)
    except (yaml.YAMLError, ValueError) as error:
        raise HubError(400, f"Invalid metadata: {' '.join(str(error).split())}") from error
    return data


def reply(data: object, status: int = 200) -> Answer:
    content = json.dumps(data, default=str).encode()  # str: YAML has dates
    return Answer(content, status, {"Content-Type": "application/json"})


def ranged(content: bytes, asked: str | None, headers: dict[str, str]) -> Answer:
    """A file, or what a Range header asks of it (206; 416 where there is nothing)."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"} | headers
    found, size = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or ""), len(content)
    if found is None:
        return Answer(content, 200, headers)
    first, last = found.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size:
        raise HubError(416, "the file is shorter", **{"Content-Range": f"bytes */{size}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Answer(content[start:stop], 206, headers)


def create_repo(hub: "HubServer", call: Call) -> Answer:
    asked, role = call.json(), hub.role(call)
    kind, namespace = asked.get("type") or "model", asked.get("organization") or hub.user
    repo_id = f"{namespace}/{asked['name']}"
    if role is None:
        raise HubError(401, "Invalid username or password.")
    if role != "write" or not hub.owns(repo_id):
        what = f'create a {kind} under the namespace "{namespace}"'
        raise HubError(403, f"You don't have the rights to {what}")
    old = hub.repos.get((kind, repo_id))
    if old:
        return reply({"error": f"You already created this {kind} repo", "url": hub.url(old)}, 409)
    repo = hub.add(repo_id, kind=kind, private=asked_private(asked, hub.private))
    return reply({"url": hub.url(repo)})


def asked_private(asked: dict, default: bool) -> bool:
    """Older clients send `private`."""
    default = asked.get("private", default)
    return asked.get("visibility", "private" if default else "public") == "private"


def delete_repo(hub: "HubServer", call: Call) -> Answer:
    asked = call.json()
    repo_id = f"{asked.get('organization') or hub.user}/{asked['name']}"
    call.names.update(kind=asked.get("type"), id=repo_id)
    repo = hub.writable(call)
    del hub.repos[repo.kind, repo.id]
    return reply({})


def change_settings(hub: "HubServer", call: Call) -> Answer:
    repo = hub.writable(call)
    repo.private = asked_private(call.json(), repo.private)
    return reply({"private": repo.private})


def whoami(hub: "HubServer", call: Call) -> Answer:
    role = hub.role(call)
    if role is None:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name in hub.orgs]
    token = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
    return reply({"type": "user", "name": hub.user, "orgs": orgs, "auth": token})


def check_access(hub: "HubServer", call: Call) -> Answer:
    repo = hub.writable(call) if call.names["write"] else hub.readable(call)
    return reply({"id": repo.id})


def validate_yaml(hub: "HubServer", call: Call) -> Answer:
    try:
        data = card_data(call.json()["content"].encode())
    except HubError as error:
        return reply({"errors": [{"message": str(error)}], "warnings": []}, 400)
    empty = {"message": "empty or missing yaml metadata in repo card"}
    return reply({"errors": [], "warnings": [] if data else [empty]})


def proposes(call: Call) -> bool:
    """Whether a call makes or extends a pull request, which others than the owner may do."""
    return "create_pr" in call.query or call.names["revision"].startswith("refs/pr/")


def preupload(hub: "HubServer", call: Call) -> Answer:
    repo = hub.writable(call, anyone=proposes(call))
    tree, files = repo.tree(call.names["revision"]), []
    for asked in call.json()["files"]:
        path = asked["path"]
        mode = "lfs" if is_lfs(path, asked["size"]) else "regular"
        oid = file_id(path, tree[path]) if path in tree else None
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return reply({"files": files})


def lfs_batch(hub: "HubServer", call: Call) -> Answer:
    repo, objects = hub.writable(call, anyone=True), call.json()["objects"]
    for item in objects:
        if item["oid"] not in hub.lfs:
            verify = {"href": f"{hub.url(repo)}.git/info/lfs/objects/verify"}
            item["actions"] = {"upload": upload_action(hub, **item), "verify": verify}
    return reply({"transfer": "multipart" if hub.multipart_chunk else "basic", "objects": objects})


def upload_action(hub: "HubServer", oid: str, size: int) -> dict:
    """Where the content goes: to one address, or in parts and then a word to `complete`."""
    href, chunk = f"{hub.endpoint}/lfs/{oid}", hub.multipart_chunk
    if not chunk or size <= chunk:
        return {"href": href}
    parts = {f"{n:05}": f"{href}/{n}" for n in range(1, -(-size // chunk) + 1)}
    return {"href": f"{href}/complete", "header": {"chunk_size": str(chunk)} | parts}


def refuse_token(call: Call) -> None:
    """The address is the permission: a storage refuses a token beside it."""
    if call.authorization is not None:
        raise HubError(400, "Only one auth mechanism allowed")


def store(hub: "HubServer", oid: str, content: bytes) -> Answer:
    if sha256(content) != oid:
        raise HubError(400, f"this is not {oid}")
    hub.lfs[oid] = content
    return reply({})


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


def put_object(hub: "HubServer", call: Call) -> Answer:
    refuse_token(call)
    return store(hub, call.names["oid"], call.body)


def put_part(hub: "HubServer", call: Call) -> Answer:
    refuse_token(call)
    hub.parts[call.names["oid"], int(call.names["number"])] = call.body
    return Answer(headers={"ETag": etag(call.body)})


def complete(hub: "HubServer", call: Call) -> Answer:
    oid, asked = call.names["oid"], call.json()["parts"]
    parts = [hub.parts.get((oid, part["partNumber"]), b"") for part in asked]
    if [etag(part) for part in parts] != [part["etag"] for part in asked]:
        raise HubError(400, "a part is missing or another one")
    return store(hub, oid, b"".join(parts))


def verify_object(hub: "HubServer", call: Call) -> Answer:
    hub.writable(call, anyone=True)
    asked = call.json()
    if len(hub.lfs.get(asked["oid"], b"")) != asked["size"]:
        raise HubError(404, f"{asked['oid']} was not uploaded")
    return reply({})


def get_object(hub: "HubServer", call: Call) -> Answer:
    refuse_token(call)
    oid = call.names["oid"]
    return ranged(hub.lfs[oid], call.range, {"ETag": f'"{oid}"'})


def changed(hub: "HubServer", tree: dict[str, bytes], key: str, value: dict) -> dict[str, bytes]:
    """A tree after one line of a commit."""
    path = value["path"]
    if key == "file":
        content = base64.b64decode(value["content"])
        if is_lfs(path, len(content)):
            raise HubError(400, f"{path} must be uploaded with LFS")
        return tree | {path: content}
    if key == "lfsFile":
        if value["oid"] not in hub.lfs:
            raise HubError(400, f"{path} is a pointer to a file that was not uploaded")
        return tree | {path: hub.lfs[value["oid"]]}
    inside = f"{path.rstrip('/')}/" if key == "deletedFolder" else None
    kept = {p: c for p, c in tree.items() if p != path and not (inside and p.startswith(inside))}
    if len(kept) == len(tree):
        raise HubError(404, f"{path} does not exist", "EntryNotFound")
    return kept


def commit(hub: "HubServer", call: Call) -> Answer:
    repo, revision = hub.writable(call, anyone=proposes(call)), call.names["revision"]
    header, *lines = map(json.loads, call.body.splitlines())
    header, base, new_pull = header["value"], repo.at(revision), "create_pr" in call.query
    parent = header.get("parentCommit") or base.oid
    if parent != base.oid and not new_pull:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    tree = repo.tree(parent)
    for line in lines:
        tree = changed(hub, tree, line["key"], line["value"])
    card_data(tree.get("README.md", b""))
    pull = re.fullmatch(r"refs/pr/(\d+)", revision)
    number = len(repo.pulls) + 1 if new_pull else pull and int(pull[1])
    if not number and revision not in repo.branches:
        raise HubError(400, f"{revision} is not a branch")
    oid = repo.commit(tree, header["summary"], header["description"], parent)
    answer = {"commitOid": oid, "commitUrl": f"{hub.url(repo)}/commit/{oid}"}
    if number:
        repo.pulls[number] = oid
        answer["pullRequestUrl"] = f"{hub.url(repo)}/discussions/{number}"
    else:
        repo.branches[revision] = oid
    return reply(answer)


def create_branch(hub: "HubServer", call: Call) -> Answer:
    repo, name = hub.writable(call), call.names["name"]
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: {name}")
    repo.branches[name] = repo.at(call.json().get("startingPoint", "main")).oid
    return reply({})


def create_tag(hub: "HubServer", call: Call) -> Answer:
    repo, name = hub.writable(call), call.json()["tag"]
    if name in repo.tags:
        raise HubError(409, f"Tag already exists: {name}")
    repo.tags[name] = repo.at(call.names["name"]).oid
    return reply({})


def delete_ref(hub: "HubServer", call: Call) -> Answer:
    repo, name = hub.writable(call), call.names["name"]
    refs = repo.branches if call.names["what"] == "branch" else repo.tags
    if refs.pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return reply({})


def list_refs(hub: "HubServer", call: Call) -> Answer:
    repo, refs = hub.readable(call), {"converts": []}
    lists = ("branches", "heads", repo.branches), ("tags", "tags", repo.tags)
    for title, folder, oids in (*lists, ("pullRequests", "pr", repo.pulls)):
        refs[title] = [
            {"name": str(name), "ref": f"refs/{folder}/{name}", "targetCommit": oid}
            for name, oid in oids.items()
        ]
    return reply(refs)


def list_commits(hub: "HubServer", call: Call) -> Answer:
    found, by = [], [{"user": hub.user}]
    for c in hub.readable(call).history(call.names["revision"]):
        item = {"id": c.oid, "title": c.title, "message": c.message, "date": c.date}
        found.append(item | {"authors": by})
    return reply(found)


def super_squash(hub: "HubServer", call: Call) -> Answer:
    """One commit instead of a branch's history; commits that nothing leads to are forgotten."""
    repo, branch = hub.writable(call), call.names["revision"]
    if branch not in repo.branches:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    repo.branches[branch] = repo.commit(repo.tree(branch), call.json()["message"], "", None)
    ends = {*repo.branches.values(), *repo.tags.values(), *repo.pulls.values()}
    repo.commits = {c.oid: c for end in ends for c in repo.history(end)}
    return reply({})


def repo_info(hub: "HubServer", call: Call) -> Answer:
    repo = hub.readable(call)
    head = repo.at(call.names["revision"] or "main")
    siblings = [{"rfilename": path} for path in sorted(head.tree)]
    for item in siblings if "blobs" in call.query else ():
        file = listed(item["rfilename"], head.tree[item["rfilename"]])
        lfs = file.get("lfs")
        item |= {"size": file["size"], "blobId": file["oid"]}
        item |= {"lfs": lfs | {"sha256": lfs["oid"]}} if lfs else {}
    card = card_data(head.tree.get("README.md", b""))
    info = {name: card.get(name) for name in ("pipeline_tag", "library_name", "model-index")}
    info |= {"id": repo.id, "author": repo.id.split("/")[0], "private": repo.private}
    info |= {"sha": head.oid, "siblings": siblings, "cardData": card, "gated": False}
    info |= {"tags": card.get("tags") or [], "downloads": 0, "likes": 0, "disabled": False}
    first = repo.history(head.oid)[-1]
    return reply(info | {"createdAt": first.date, "lastModified": head.date})


def entries(head: Commit, expand: bool) -> dict[str, dict]:
    """{path: what a listing has of it}, files and folders."""
    folders = {str(f) for path in head.tree for f in PurePosixPath(path).parents} - {"."}
    found = {f: {"type": "directory", "path": f, "oid": blob_id(f.encode())} for f in folders}
    found |= {path: listed(path, content) for path, content in head.tree.items()}
    last = {"lastCommit": {"id": head.oid, "title": head.title, "date": head.date}}
    return {path: item | (last if expand else {}) for path, item in sorted(found.items())}


def list_tree(hub: "HubServer", call: Call) -> Answer:
    head, root = hub.readable(call).at(call.names["revision"]), call.names["path"] or "."
    found = entries(head, is_set(call.query, "expand"))
    if root not in found and root != ".":
        raise HubError(404, f"{root} does not exist on {head.oid}", "EntryNotFound")
    deep = is_set(call.query, "recursive")
    parents = {path: [str(p) for p in PurePosixPath(path).parents] for path in found}
    return reply([found[p] for p, up in parents.items() if root in (up if deep else up[:1])])


def is_set(query: Mapping[str, list[str]], name: str) -> bool:
    return query.get(name, [""])[0].lower() in ("true", "1")


def paths_info(hub: "HubServer", call: Call) -> Answer:
    form = parse_qs(call.body.decode())
    found = entries(hub.readable(call).at(call.names["revision"]), is_set(form, "expand"))
    return reply([found[path] for path in form.get("paths", ()) if path in found])


def resolve(hub: "HubServer", call: Call) -> Answer:
    head, path = hub.readable(call).at(call.names["revision"]), call.names["path"]
    headers = {"X-Repo-Commit": head.oid}
    if path not in head.tree:  # with the commit, clients remember that there is none
        raise HubError(404, f"{path} does not exist", "EntryNotFound", **headers)
    content = head.tree[path]
    oid = file_id(path, content)
    if hub.lfs_redirect and is_lfs(path, len(content)):
        linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        return Answer(b"", 302, headers | linked | {"Location": f"{hub.cdn}/lfs/{oid}"})
    return ranged(content, call.range, headers | {"ETag": f'"{oid}"'})


API = r"/api/(?P<kind>model|dataset|space)s/(?P<id>[^/]+/[^/]+)"
FILES = r"/(?:(?P<kind>dataset|space)s/)?(?P<id>[^/]+/[^/]+)"
OBJECT, REVISION = r"/lfs/(?P<oid>\w{64})", r"/(?P<revision>[^/]+)"
ROUTES = [
    ("POST", r"/api/repos/create", create_repo),
    ("DELETE", r"/api/repos/delete", delete_repo),
    ("GET", r"/api/whoami-v2", whoami),
    ("POST", r"/api/validate-yaml", validate_yaml),
    ("PUT", rf"{API}/settings", change_settings),
    ("GET", rf"{API}/auth-check(?P<write>/write)?", check_access),
    ("POST", rf"{API}/preupload{REVISION}", preupload),
    ("POST", rf"{API}/commit{REVISION}", commit),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", lfs_batch),
    ("POST", rf"{FILES}\.git/info/lfs/objects/verify", verify_object),
    ("PUT", OBJECT, put_object),
    ("PUT", rf"{OBJECT}/(?P<number>\d+)", put_part),
    ("POST", rf"{OBJECT}/complete", complete),
    ("GET", OBJECT, get_object),
    ("POST", rf"{API}/branch/(?P<name>.+)", create_branch),
    ("POST", rf"{API}/tag/(?P<name>.+)", create_tag),
    ("DELETE", rf"{API}/(?P<what>branch|tag)/(?P<name>.+)", delete_ref),
    ("GET", rf"{API}/refs", list_refs),
    ("GET", rf"{API}/commits{REVISION}", list_commits),
    ("POST", rf"{API}/super-squash{REVISION}", super_squash),
    ("GET", rf"{API}(?:/revision{REVISION})?", repo_info),
    ("GET", rf"{API}/tree{REVISION}(?:/(?P<path>.*))?", list_tree),
    ("POST", rf"{API}/paths-info{REVISION}", paths_info),
    ("GET", rf"{FILES}/resolve{REVISION}/(?P<path>.+)", resolve),
]
