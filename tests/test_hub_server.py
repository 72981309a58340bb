"""The loopback Hub, driven by the real clients, each in a process of its own: they read where the
Hub is when they are imported. Several calls share a process, since importing takes seconds.
"""

import base64
import io
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from .conftest import REPOSITORY
from .hub_routes import Repo
from .hub_server import READ_TOKEN, WRITE_TOKEN, HubServer, run_client

HF = str(Path(sys.executable).with_name("hf"))

# What the client code below starts with.
START = """
import io, os, pathlib
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import *

api, home = HfApi(), pathlib.Path(os.environ["HF_HOME"])

def raised(call, *arguments, **more):
    try:
        call(*arguments, **more)
    except Exception as error:
        cause = error.__cause__ or ""
        return f"{type(error).__name__} {error} {type(cause).__name__} {cause}"

def upload(repo, path, content, **more):
    return api.upload_file(repo_id=repo, path_in_repo=path, path_or_fileobj=content, **more)
"""


def client(hub, home, code):
    return run_client(hub, home, START + code)


def statuses(hub, method, pattern):
    return [request.status for request in hub.asked(method, pattern)]


def png(value):
    file = io.BytesIO()
    Image.fromarray(np.full((6, 8, 3), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def test_a_folder_goes_up_and_comes_down(hub_server, tmp_path):
    client(
        hub_server,
        tmp_path,
        """
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

assert api.whoami()["name"] == "tester"
url = api.create_repo("org/model", private=False)
assert url.repo_id == "org/model"
assert api.create_repo("org/model", exist_ok=True) == url
assert "409" in raised(api.create_repo, "org/model")
assert api.create_repo("own").repo_id == "tester/own"
assert api.repo_exists("org/model") and not api.repo_exists("org/other")

folder = home / "folder"
(folder / "unet").mkdir(parents=True)
(folder / "README.md").write_text("---\\nlibrary_name: diffusers\\ntags: [ddpm]\\n---\\n# Text")
(folder / "unet/model.safetensors").write_bytes(b"weights" * 1000)
(folder / "unet/config.json").write_text("{}")
(folder / "unet/config.json.txt").write_text("")
(folder / "empty.bin").write_bytes(b"")
first = api.upload_folder(repo_id="org/model", folder_path=folder, commit_message="All of it")
again = api.upload_folder(repo_id="org/model", folder_path=folder, commit_message="The same")
assert first.oid == again.oid
assert [c.title for c in api.list_repo_commits("org/model")] == ["All of it", "initial commit"]

info = api.model_info("org/model", files_metadata=True)
assert info.sha == first.oid and info.library_name == "diffusers" and info.tags == ["ddpm"]
lfs = {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}
assert list(lfs) == ["unet/model.safetensors"]
got = pathlib.Path(hf_hub_download("org/model", "unet/model.safetensors"))
assert got.read_bytes() == b"weights" * 1000
assert got.resolve().name == lfs["unet/model.safetensors"]
snapshot = pathlib.Path(snapshot_download("org/model"))
names = {str(p.relative_to(snapshot)) for p in snapshot.rglob("*") if p.is_file()}
assert names == {s.rfilename for s in info.siblings}

api.upload_folder(repo_id="org/model", folder_path=folder / "unet", delete_patterns="*.bin")
assert "empty.bin" not in api.list_repo_files("org/model")
api.delete_file("unet/config.json", "org/model")
tree = [f.path for f in api.list_repo_tree("org/model", "unet")]
assert tree == ["unet/config.json.txt", "unet/model.safetensors"]
top = [f.path for f in api.list_repo_tree("org/model")]
assert top == [".gitattributes", "README.md", "config.json", "config.json.txt",
               "model.safetensors", "unet"]
upload("org/model", "unet2/a.txt", b"1")
api.delete_folder("unet", "org/model")
left = {".gitattributes", "README.md", "config.json", "config.json.txt", "model.safetensors",
        "unet2/a.txt"}
assert set(api.list_repo_files("org/model")) == left
assert "EntryNotFound" in raised(api.delete_file, "unet/config.json", "org/model")
assert "EntryNotFound" in raised(hf_hub_download, "org/model", "unet/config.json")
assert try_to_load_from_cache("org/model", "unet/config.json") is _CACHED_NO_EXIST
assert "RevisionNotFound" in raised(hf_hub_download, "org/model", "x", revision="v9")
paths = api.get_paths_info("org/model", ["README.md", "nothing"], expand=True)
assert [(p.path, p.last_commit.title.split()[0]) for p in paths] == [("README.md", "Delete")]

api.delete_repo("org/model")
api.delete_repo("org/model", missing_ok=True)
assert raised(api.delete_repo, "org/model").startswith("RepositoryNotFoundError")
""",
    )
    assert list(hub_server.repos) == [("model", "tester/own")]
    assert statuses(hub_server, "PUT", "/lfs/") == [200]
    assert not hub_server.asked("PUT", "/lfs/")[0].token
    assert statuses(hub_server, "POST", "/lfs/objects/verify") == [200]


def test_the_history_stays_and_is_squashed(hub_server, tmp_path):
    client(
        hub_server,
        tmp_path,
        """
api.create_repo("org/m")
one = upload("org/m", "a.txt", b"1")
two = upload("org/m", "a.txt", b"2", parent_commit=one.oid)
assert "412" in raised(upload, "org/m", "a.txt", b"3", parent_commit=one.oid)
api.create_tag("org/m", tag="v1", revision=one.oid)
api.create_branch("org/m", branch="dev/x", revision="v1")
assert "409" in raised(api.create_tag, "org/m", tag="v1")
api.create_tag("org/m", tag="v1", exist_ok=True)
api.create_branch("org/m", branch="dev/x", exist_ok=True)
upload("org/m", "b.txt", b"4", revision="dev/x")
assert "v1 is not a branch" in raised(upload, "org/m", "b.txt", b"4", revision="v1")
assert "RevisionNotFound" in raised(api.super_squash_history, "org/m", branch="v1")

def text(revision, name="a.txt"):
    return pathlib.Path(hf_hub_download("org/m", name, revision=revision)).read_text()

assert [text(r) for r in ("v1", "main", one.oid, "dev/x")] == ["1", "2", "1", "1"]
assert "EntryNotFound" in raised(text, "main", "b.txt")
refs = api.list_repo_refs("org/m")
assert [b.name for b in refs.branches] == ["main", "dev/x"]
assert [(t.ref, t.target_commit) for t in refs.tags] == [("refs/tags/v1", one.oid)]

api.super_squash_history("org/m", commit_message="All")
assert [c.title for c in api.list_repo_commits("org/m")] == ["All"]
assert text("main") == "2" and text("v1") == "1"
assert "RevisionNotFound" in raised(api.model_info, "org/m", revision=two.oid)
api.delete_branch("org/m", branch="dev/x")
api.delete_tag("org/m", tag="v1")
assert "RevisionNotFound" in raised(api.delete_tag, "org/m", tag="v1")
""",
    )
    repo = hub_server.repos["model", "org/m"]
    assert [c.title for c in repo.history()] == ["All"]
    assert repo.tree()["a.txt"] == b"2"


def test_a_pull_request_may_come_from_another(hub_server, tmp_path):
    hub_server.add("other/m", {"a.txt": b"1"})
    out = client(
        hub_server,
        tmp_path,
        """
assert "403" in raised(upload, "other/m", "a.txt", b"2")
info = upload("other/m", "a.bin", b"2", create_pr=True)
print(info.pr_url, info.pr_revision, info.pr_num)
upload("other/m", "b.txt", b"3", revision="refs/pr/1")
refs = api.list_repo_refs("other/m", include_pull_requests=True)
assert [r.ref for r in refs.pull_requests] == ["refs/pr/1"]
path = hf_hub_download("other/m", "b.txt", revision="refs/pr/1")
assert pathlib.Path(path).read_text() == "3"
assert "EntryNotFound" in raised(hf_hub_download, "other/m", "b.txt")
""",
    )
    assert out.split() == [f"{hub_server.endpoint}/other/m/discussions/1", "refs/pr/1", "1"]
    repo = hub_server.repos["model", "other/m"]
    assert "a.bin" not in repo.tree()
    assert [len(repo.history(r)) for r in ("main", "refs/pr/1")] == [1, 3]


def test_tokens_and_private_repos(hub_server, tmp_path):
    hub_server.add("org/secret", {"a.txt": b"1"}, private=True)
    hub_server.add("org/open", {"a.txt": b"1"})
    hub_server.add("other/secret", private=True)
    client(
        hub_server,
        tmp_path,
        """
def asked(token, call, *arguments, **more):
    return (raised(call, *arguments, token=token, **more) or "fine").split()[0]

def message(token, call, *arguments, **more):
    return raised(call, *arguments, token=token, **more)

missing = "RepositoryNotFoundError"
for token, secret, foreign in ((None, "fine", missing), ("hf_read", "fine", missing),
                               (False, missing, missing)):
    assert asked(token, api.model_info, "org/open") == "fine"
    assert asked(token, api.model_info, "org/secret") == secret
    cache = home / str(token)
    assert asked(token, hf_hub_download, "org/secret", "a.txt", cache_dir=cache) == secret
    assert asked(token, snapshot_download, "org/secret", cache_dir=cache) == secret
    assert asked(token, api.model_info, "other/secret") == foreign
assert "401" in message("hf_wrong", api.model_info, "org/open")
assert "Invalid credentials" in message("hf_wrong", upload, "org/open", "b.txt", b"2")
assert "Invalid user token" in message("hf_wrong", api.whoami)

assert asked(False, upload, "org/open", "b.txt", b"2") == missing
assert "403 Forbidden: this token may not write to org/open" in message(
    "hf_read", upload, "org/open", "b.txt", b"2")
assert "401" in message(False, api.create_repo, "org/new")
assert "403" in message("hf_read", api.create_repo, "org/new")
rights = 'You don\\'t have the rights to create a model under the namespace "other"'
assert rights in raised(api.create_repo, "other/new")
assert asked("hf_read", api.create_repo, "org/open", exist_ok=True) == "fine"
assert asked("hf_read", api.auth_check, "org/secret") == "fine"
assert "403" in message("hf_read", api.auth_check, "org/secret", write=True)
assert api.auth_check("org/secret", write=True) is None
assert "403" in message("hf_read", api.delete_repo, "org/open")

api.update_repo_settings("org/secret", private=False)
assert asked(False, api.model_info, "org/secret") == "fine"
api.create_repo("org/new", private=True)
assert api.model_info("org/new").private
api.create_repo("org/new2", visibility="private")
assert asked(False, api.model_info, "org/new2") == missing
""",
    )
    assert {i: r.private for (_, i), r in hub_server.repos.items()} == {
        "org/secret": False,
        "org/open": False,
        "other/secret": True,
        "org/new": True,
        "org/new2": True,
    }


def test_large_files_in_parts_and_from_another_origin(tmp_path):
    with HubServer(lfs_redirect=True, multipart_chunk=1000) as hub:
        client(
            hub,
            tmp_path,
            """
api.create_repo("org/m", private=True)
content = os.urandom(3500)
(home / "m.safetensors").write_bytes(content)
upload("org/m", "m.safetensors", home / "m.safetensors")
upload("org/m", "small.pt", b"x" * 1000)
upload("org/m", "copy.safetensors", content)  # is there already
assert pathlib.Path(hf_hub_download("org/m", "m.safetensors")).read_bytes() == content
assert pathlib.Path(hf_hub_download("org/m", "small.pt")).read_bytes() == b"x" * 1000
from huggingface_hub import HfFileSystem
with HfFileSystem().open("org/m/m.safetensors", block_size=512) as file:
    file.seek(-100, 2)
    assert file.read() == content[-100:]
""",
        )
        puts = [r.path.rsplit("/", 1)[-1] for r in hub.asked("PUT", "/lfs/")]
        assert puts[:4] == ["1", "2", "3", "4"]
        assert len(puts) == 5
        assert statuses(hub, "POST", "/complete$") == [200]
        cdn = [r for r in hub.requests if r.host.startswith("localhost:")]
        assert {(r.method, r.token) for r in cdn} == {("GET", False)}
        assert {r.status for r in cdn} == {200, 206}
        assert set(statuses(hub, "HEAD", "/resolve/")) == {302}


def test_what_goes_wrong(hub_server, tmp_path):
    content = bytes(range(256)) * 50_000  # clients write what they get by 10 MiB
    hub_server.add("org/m", {"m.bin": content})
    hub_server.cut("PUT", "/lfs/", after=100_000)
    hub_server.cut("GET", "/resolve/", after=12_000_000)
    hub_server.fail("POST", "/preupload/", status=503)
    hub_server.fail("POST", "/commit/", status=500, message="no space left")
    hub_server.fail("PUT", "/lfs/0a", status=403, message="expired", times=None)
    hub_server.delay("GET", "/api/whoami-v2", seconds=0.3)
    client(
        hub_server,
        tmp_path,
        """
import hashlib, time
big = b"x" * 10_000_001  # LFS for its size
error = raised(upload, "org/m", "big.txt", big)
assert "HfHubHTTPError" in error and "no space left" in error  # after two that it got over
upload("org/m", "big.txt", big)
number = next(n for n in range(10_000) if hashlib.sha256(b"%d" % n).hexdigest().startswith("0a"))
for _ in range(2):
    assert "403 Forbidden: expired" in raised(upload, "org/m", "n.bin", b"%d" % number)
got = pathlib.Path(hf_hub_download("org/m", "m.bin")).read_bytes()
assert got == bytes(range(256)) * 50_000
start = time.monotonic()
api.whoami()
assert time.monotonic() - start >= 0.3
""",
    )
    assert hub_server.repos["model", "org/m"].tree()["big.txt"] == b"x" * 10_000_001
    assert statuses(hub_server, "POST", "/preupload/")[:2] == [503, 200]
    assert statuses(hub_server, "PUT", "/lfs/") == [0, 200, 403, 403]
    assert statuses(hub_server, "POST", "/commit/") == [500, 200]
    assert statuses(hub_server, "GET", "/resolve/main/m.bin") == [0, 206]
    assert [fault.times for fault in hub_server.faults] == [None]


def test_metadata_of_a_card_is_checked(hub_server, tmp_path):
    client(
        hub_server,
        tmp_path,
        """
import warnings
from huggingface_hub import ModelCard
api.create_repo("org/m")
card = ModelCard("---\\nlicense: mit\\npipeline_tag: unconditional-image-generation\\n---\\n# M")
card.push_to_hub("org/m")
assert ModelCard.load("org/m").data.license == "mit"
assert api.model_info("org/m").pipeline_tag == "unconditional-image-generation"
bad = "---\\nvalue: !!python/object/apply:numpy.dtype [f4]\\n---\\n", "---\\nfid: .nan\\n---\\n"
for text in bad:
    assert "Invalid metadata in README.md" in raised(upload, "org/m", "README.md", text.encode())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    upload("org/m", "README.md", b"# No metadata")
assert "empty or missing yaml metadata" in str(caught[0].message)
""",
    )
    assert hub_server.repos["model", "org/m"].tree()["README.md"] == b"# No metadata"


def test_datasets_and_spaces(hub_server, tmp_path):
    photos = {f"train/{label}/{i}.png": png(i * 20) for i in range(4) for label in ("cat", "dog")}
    hub_server.add("org/photos", photos, kind="dataset")
    table = pa.table({"image": [{"bytes": png(i), "path": None} for i in range(5)]})
    file = io.BytesIO()
    pq.write_table(table, file)
    hub_server.add(
        "org/rows", {"data/train.parquet": file.getvalue()}, kind="dataset", private=True
    )
    client(
        hub_server,
        tmp_path,
        """
from datasets import Image, load_dataset, Dataset
photos = load_dataset("org/photos", split="train")
assert photos.features["label"].names == ["cat", "dog"]
assert len(photos) == 8 and photos[0]["image"].size == (8, 6)
rows = load_dataset("org/rows", split="train")
assert [r["image"]["bytes"][:4] for r in rows] == [b"\\x89PNG"] * 5
stream = load_dataset("org/rows", split="train", streaming=True).cast_column("image", Image())
assert [r["image"].getpixel((0, 0))[0] for r in stream] == [0, 1, 2, 3, 4]
stream = load_dataset("org/photos", split="train", streaming=True)
assert sorted(r["image"].getpixel((0, 0))[0] for r in stream) == [0, 0, 20, 20, 40, 40, 60, 60]
Dataset.from_dict({"a": [1, 2, 3]}).push_to_hub("org/made")
assert load_dataset("org/made", split="train")["a"][:] == [1, 2, 3]
api.create_repo("org/app", repo_type="space", space_sdk="gradio")
assert api.space_info("org/app").id == "org/app"
upload("org/app", "app.py", b"print()", repo_type="space")
path = hf_hub_download("org/app", "app.py", repo_type="space")
assert pathlib.Path(path).read_text() == "print()"
""",
    )
    assert 206 in statuses(hub_server, "GET", "/datasets/org/rows/resolve/")
    assert list(hub_server.repos["dataset", "org/made"].tree()) == [
        ".gitattributes",
        "data/train-00000-of-00001.parquet",
        "README.md",
    ]


@pytest.mark.slow  # importing diffusers
def test_diffusers_pushes_and_loads(hub_server, tmp_path):
    client(
        hub_server,
        tmp_path,
        """
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                   down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",))
DDPMPipeline(unet, DDPMScheduler()).push_to_hub("org/ddpm", private=True)
loaded = DDPMPipeline.from_pretrained("org/ddpm")
for name, weight in unet.state_dict().items():
    assert torch.equal(weight, loaded.unet.state_dict()[name])
DDPMPipeline(unet, DDPMScheduler(beta_end=0.5)).push_to_hub("org/ddpm", commit_message="Again")
assert DDPMScheduler.from_pretrained("org/ddpm", subfolder="scheduler").config.beta_end == 0.5
UNet2DModel.from_pretrained("org/ddpm", subfolder="unet")
assert "RevisionNotFound" in raised(DDPMPipeline.from_pretrained, "org/ddpm", revision="v9")
""",
    )
    repo = hub_server.repos["model", "org/ddpm"]
    assert repo.private
    assert [c.title for c in repo.history()][0] == "Again"
    assert statuses(hub_server, "PUT", "/lfs/") == [200]  # the weights were there the second time


def test_the_hf_command(hub_server, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("1")
    (folder / "m.safetensors").write_bytes(b"weights")
    run_client(hub_server, tmp_path, [HF, "upload", "org/m", str(folder), ".", "--private"])
    assert hub_server.repos["model", "org/m"].private
    to = tmp_path / "got"
    run_client(
        hub_server, tmp_path, [HF, "download", "org/m", "--local-dir", str(to)], token=READ_TOKEN
    )
    assert (to / "m.safetensors").read_bytes() == b"weights"
    error = run_client(hub_server, tmp_path, [HF, "download", "org/m"], token=None, expect=1)
    assert "not found" in error.lower()


def test_many_clients_at_once(hub_server, tmp_path):
    hub_server.add("org/m")
    many = """
import sys
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(4) as pool:
    names = [f"{sys.argv[1]}-{i}.bin" for i in range(12)]
    list(pool.map(lambda name: upload("org/m", name, name.encode()), names))
"""
    clients = [
        subprocess.Popen([sys.executable, "-c", START + many, n], env=hub_server.env(tmp_path))
        for n in "ab"
    ]
    assert [client.wait(60) for client in clients] == [0, 0]
    repo = hub_server.repos["model", "org/m"]
    names = {f"{n}-{i}.bin" for n in "ab" for i in range(12)}
    assert {name: repo.tree().get(name) for name in names} == {n: n.encode() for n in names}
    assert len(repo.history()) == 1 + len(names)


def test_no_commit_is_lost_to_another(hub_server, monkeypatch):
    hub_server.add("org/m")
    header = {"Authorization": f"Bearer {WRITE_TOKEN}"}
    store = Repo.commit

    def slow(*arguments):  # without the lock, all would have read the same head by then
        time.sleep(0.01)
        return store(*arguments)

    def commit(number):
        added = {"key": "file", "value": {"path": f"{number}.txt", "content": ""}}
        lines = {"key": "header", "value": {"summary": "", "description": ""}}, added
        body = "\n".join(map(json.dumps, lines)).encode()
        return hub_server.answer("POST", "/api/models/org/m/commit/main", header, body).status

    monkeypatch.setattr(Repo, "commit", slow)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(commit, range(8))) == [200] * 8
    assert len(hub_server.repos["model", "org/m"].tree()) == 1 + 8


def test_what_no_good_client_sends_is_refused(hub_server):
    """A client that does wrong must not pass."""
    hub_server.add("org/m", {"a.txt": b"0123456789"})
    oid, api = "0" * 64, "/api/models/org/m"
    token = {"Authorization": f"Bearer {WRITE_TOKEN}"}

    def asked(method, path, body=b"", **headers):
        request = urllib.request.Request(hub_server.endpoint + path, body or None, headers)
        request.method = method
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.headers["X-Error-Message"]

    def committed(key, **value):
        lines = {"key": "header", "value": {"summary": "", "description": ""}}
        body = "\n".join(map(json.dumps, (lines, {"key": key, "value": value})))
        return asked("POST", f"{api}/commit/main", body.encode(), **token)

    content = base64.b64encode(b"weights").decode()
    assert asked("GET", "/org/m/resolve/main/a.txt", Range="bytes=-3") == (206, "789")
    assert asked("GET", "/org/m/resolve/main/a.txt", Range="bytes=2-4") == (206, "234")
    assert asked("GET", "/org/m/resolve/main/a.txt", Range="bytes=10-") == (
        416,
        "the file is shorter",
    )
    assert asked("GET", "/nothing") == (404, "tests/hub_routes.py has no route GET /nothing")
    assert asked("PUT", f"/lfs/{oid}", b"x") == (400, f"this is not {oid}")
    assert asked("PUT", f"/lfs/{oid}", b"x", **token) == (400, "Only one auth mechanism allowed")
    parts = json.dumps({"parts": [{"partNumber": 1, "etag": "x"}]}).encode()
    assert asked("POST", f"/lfs/{oid}/complete", parts) == (400, "a part is missing or another one")
    verify = json.dumps({"oid": oid, "size": 1}).encode()
    path = "/org/m.git/info/lfs/objects/verify"
    assert asked("POST", path, verify, **token) == (404, f"{oid} was not uploaded")
    refused = (400, "m.pt must be uploaded with LFS")
    assert committed("file", path="m.pt", content=content) == refused
    refused = (400, "m.pt is a pointer to a file that was not uploaded")
    assert committed("lfsFile", path="m.pt", oid=oid, size=1) == refused
    body = asked("GET", f"{api}/tree/main/nothing")
    assert body[0] == 404


def test_by_hand(tmp_path):
    command = [sys.executable, "-m", "tests.hub_server", "--private"]
    code = START + "api.create_repo('org/m'); print(api.model_info('org/m').private)"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as server:
        printed = dict(word.split("=", 1) for word in server.stdout.readline().split())
        environment = os.environ | {"HF_HOME": str(tmp_path)} | printed
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
        server.kill()
    assert done.stdout == b"True\n", done.stderr.decode()
