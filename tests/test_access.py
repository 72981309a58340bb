"""What the Hub answers, through its own client, as one line that says what to do."""

import traceback

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, hf_hub_download, model_info, snapshot_download
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import get_session, hf_raise_for_status
from huggingface_hub.utils._http import default_client_factory

from ddpm_hf import access
from ddpm_hf.access import endpoint, explained_hub, scrubbed, warn_insecure_endpoint
from ddpm_hf.errors import InputError

from .hub_server import READ_TOKEN, run_client

TOKEN = "hf_" + "Ab1" * 11


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that gives the answers in `hub`: the real client, whose requests go nowhere else."""
    answers = {}

    def answer(request):
        found = answers.get(request.url.path, answers.get("*", 404))
        if isinstance(found, Exception):
            raise found
        status, headers = found if isinstance(found, tuple) else (found, {})
        return httpx2.Response(status, headers=headers, json={}, request=request)

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.test")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(transport=httpx2.MockTransport(answer), base_url="https://hub.test")
    )
    yield answers
    huggingface_hub.set_client_factory(default_client_factory)


def get(path="/api/models/a/b"):
    """A request and the client's own reading of the answer."""
    hf_raise_for_status(get_session().get(f"https://hub.test{path}"))


def not_found(what):
    return 404, {"X-Error-Code": what}


def told(call, repo="a/b", action="load", **options) -> InputError:
    """What a user is told about what `call` raises."""
    with pytest.raises(InputError) as caught, explained_hub(repo, action, **options):
        call()
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return caught.value


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (
            not_found("RepoNotFound"),
            "https://hub.test has no such model: check the name; for a private one log in with "
            "`hf auth login` or set HF_TOKEN",
        ),
        (401, "https://hub.test has no such model: check the name; for a private one log in"),
        (
            (401, {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "the token is not valid (Invalid credentials in Authorization header): log in with",
        ),
        (
            (403, {"X-Error-Code": "GatedRepo"}),
            "its authors let in who asks: ask on https://hub.test/a/b, then log in with `hf auth",
        ),
        (
            not_found("RevisionNotFound"),
            "it has no such revision: its branches and tags are on https://hub.test/a/b/tree/main",
        ),
        (
            (403, {"X-Error-Message": "token has no write access"}),
            "you may not (token has no write access): use a token that may write to or read this "
            "model (https://hub.test/settings/tokens), and log in with `hf auth login` or set",
        ),
        (
            (409, {"X-Error-Message": "You already created this model repo"}),
            "it exists already, or changed meanwhile (You already created this model repo): choose",
        ),
        (412, "somebody else pushed meanwhile: try again"),
        (429, "too many requests: wait a few minutes"),
        (503, "https://hub.test fails with 503: try again later"),
        ((400, {"X-Error-Message": "x\n y"}), "https://hub.test refuses with 400 (x y)"),
        (402, "https://hub.test refuses with 402"),
        (
            (413, {"X-Error-Message": "far too long " * 1000}),
            "https://hub.test refuses with 413 (far too long",
        ),
    ],
)
def test_an_answer_becomes_one_line(hub, answer, line):
    hub["/api/models/a/b"] = answer
    hub["*"] = not_found("RepoNotFound")
    assert str(told(get, action="push to")).startswith(f"cannot push to 'a/b': {line}")


def test_a_missing_file_is_named(hub):
    hub["*"] = not_found("EntryNotFound")
    error = told(lambda: get("/a/b/resolve/main/unet/config.json"))
    assert str(error).startswith("cannot load 'a/b': it has no file 'unet/config.json': look")


def test_a_repo_of_another_type_is_said(hub):
    hub["*"] = not_found("RepoNotFound")
    hub["/api/datasets/a/b"] = (403, {"X-Error-Code": "GatedRepo"})  # so it exists
    assert "'a/b': it is a dataset, not a model: check the name" in str(told(get))
    for nonsense in (200, 403):  # the first error is the one to tell
        hub["/api/datasets/a/b"] = nonsense
        assert "has no such model" in str(told(get))


def test_what_is_said_depends_on_who_asks(hub, monkeypatch):
    hub["*"] = not_found("RepoNotFound")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "the token in use may not see it: check `hf auth whoami`" in str(told(get))
    assert "for a private one log in" in str(told(get, token=False))
    hub["*"] = (403, {"X-Error-Code": "GatedRepo"})
    assert str(told(get)).endswith("ask on https://hub.test/a/b")
    page = str(told(get, repo_type="dataset"))
    assert page.endswith("ask on https://hub.test/datasets/a/b")


def test_without_a_connection(hub):
    hub["*"] = httpx2.ConnectError("[Errno 111] Connection refused")
    line = "no connection to https://hub.test, and the cache is not enough for that"
    assert line in str(told(get))
    # The client wraps it in one that says: look into the cache.
    assert line in str(told(lambda: snapshot_download("a/b")))
    # A push has no use for a cache.
    pushed = "cannot push to 'a/b': no connection to https://hub.test: check the network, "
    assert str(told(get, action="push to")) == pushed + "HF_ENDPOINT and proxies"


def test_without_cache_or_token(hub):
    error = told(lambda: hf_hub_download("a/b", "x.json", local_files_only=True))
    assert "load it once without local_files_only" in str(error)
    error = told(lambda: model_info("a/b", token=True))
    assert "that needs a token: log in with `hf auth login` or set HF_TOKEN" in str(error)


def test_offline(hub, monkeypatch):
    huggingface_hub.set_client_factory(default_client_factory)  # which refuses every request
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    line = "HF_HUB_OFFLINE is set, and the cache is not enough for that: unset it"
    assert line in str(told(lambda: model_info("a/b")))


def test_what_could_be_a_folder(hub):
    hub["*"] = not_found("RepoNotFound")
    assert "'a/b': there is no such folder, and https://hub" in str(told(get, or_folder=True))
    for answer in (not_found("RevisionNotFound"), (403, {"X-Error-Code": "GatedRepo"}), 403):
        hub["*"] = answer
        assert "folder" not in str(told(get, or_folder=True))


@pytest.mark.parametrize("name", ["a/b/c", "-a", "a..b", "näme", "a" * 1000])
def test_a_name_that_cannot_be(hub, name):
    line = str(told(lambda: model_info(name), name))
    assert "no name of a repo is like this. " in line


def test_what_a_library_wrapped_is_found(hub):
    """diffusers raises OSError from the client's error."""
    hub["*"] = not_found("RevisionNotFound")

    def load():
        try:
            get()
        except RevisionNotFoundError as error:
            raise OSError("cannot load") from error

    error = told(load)
    assert "it has no such revision" in str(error)
    assert isinstance(error.__cause__, OSError)


def test_what_is_not_of_the_hub_passes(hub):
    with pytest.raises(ZeroDivisionError), explained_hub("a/b"):
        _ = 1 / 0
    with pytest.raises(InputError, match="^mine$"), explained_hub("a/b"):
        raise InputError("mine")


@pytest.mark.parametrize("where", ["environment", "file", "argument", "another's"])
def test_a_token_is_never_told(hub, monkeypatch, tmp_path, where):
    secret = TOKEN if where == "another's" else "some-secret"
    if where == "environment":
        monkeypatch.setenv("HF_TOKEN", secret)
    elif where == "file":
        (tmp_path / "token").write_text(secret + "\n")
    hub["*"] = (403, {"X-Error-Message": f"{secret} is not on the list"})
    error = told(get, f"a/{secret}", token=secret if where == "argument" else None)
    shown = "".join(traceback.format_exception(error))
    assert "*** is not on the list" in shown
    assert secret not in shown


def test_scrubbing_leaves_names_alone():
    assert scrubbed(f"Bearer {TOKEN}, me/ddpm_hf_cats") == "Bearer ***, me/ddpm_hf_cats"


@pytest.mark.parametrize(
    ("address", "warned"),
    [
        ("http://hub.test", True),
        ("http://user:password@10.0.0.7:8080", True),
        ("http://127.0.0.1.evil.test", True),
        ("http://127.0.0.1:8080", False),
        ("http://127.9.9.9", False),
        ("http://[::1]:80", False),
        ("http://localhost:80", False),
        ("https://hub.test", False),
    ],
)
def test_plain_http_to_another_machine_is_warned_about_once(monkeypatch, caplog, address, warned):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    access.warn_insecure_endpoint.cache_clear()
    for _ in range(2):
        warn_insecure_endpoint()
    access.warn_insecure_endpoint.cache_clear()
    assert len(caplog.records) == warned
    assert not warned or f"HF_ENDPOINT is {endpoint()}, plain http" in caplog.text
    assert TOKEN not in caplog.text
    assert "password" not in caplog.text


def test_what_a_push_may_meet(hub_server, tmp_path):
    """All that the client raises on the way to a commit, in one process."""
    hub_server.add("org/m", {"a.txt": b"1"})
    hub_server.add("else/m")
    code = f"""
import os
os.environ["HF_HUB_DISABLE_XET"] = "0"
from huggingface_hub import HfApi
from ddpm_hf.access import explained_hub

def said(repo, call, token=None, **options):
    try:
        with explained_hub(repo, "push to", token=token):
            getattr(HfApi(token=token), call)(repo_id=repo, **options)
    except Exception as error:
        print(type(error).__name__, error)

text = dict(path_or_fileobj=b"2", path_in_repo="a.txt")
weights = dict(path_or_fileobj=b"2", path_in_repo="a.safetensors")
said("org/m", "upload_file", **weights)
said("org/m", "create_repo")
said("org/new", "create_repo", token="{READ_TOKEN}")
said("else/m", "upload_file", **text)
said("org/none", "upload_file", **text)
said("org/m", "upload_file", **text, parent_commit="0" * 40)
said("org/m", "upload_file", **text, revision="v9")
said("org/m/n", "create_repo")
"""
    lines = run_client(hub_server, tmp_path, code).splitlines()
    expected = [
        ("org/m", f"{hub_server.endpoint} has no Xet: set HF_HUB_DISABLE_XET=1"),
        ("org/m", "it exists already, or changed meanwhile ("),
        ("org/new", "you may not ("),
        ("else/m", "you may not (this token may not write to else/m): use a token that may write"),
        ("org/none", f"{hub_server.endpoint} has no such model: check the name; the token in use"),
        ("org/m", "somebody else pushed meanwhile"),
        ("org/m", "it has no such revision: its branches and tags are on"),
        ("org/m/n", "no name of a repo is like this."),
    ]
    for line, (repo, reason) in zip(lines, expected, strict=True):
        assert line.startswith(f"InputError cannot push to '{repo}': {reason}"), line


def test_a_stored_token_that_cannot_be_read_hides_no_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "x" * 300)  # no name of a file is so long
    assert scrubbed(f"Bearer {TOKEN}") == "Bearer ***"
