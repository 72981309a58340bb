"""A Hub on the loopback interface, to test with the real clients: huggingface_hub, the `hf`
command, datasets and diffusers.

    with HubServer() as hub:
        hub.add("org/photos", {"a.png": content}, kind="dataset")
        run_client(hub, home, "from huggingface_hub import HfApi; ...")  # a process of its own
        hub.repos["model", "org/name"].tree("main")  # {path: content}

By hand: `python -m tests.hub_server`, then any command with the environment that it prints.

All is kept in memory. One lock is held while a request is answered, so any number of clients may
call. Tokens belong to one user, who may write to repos of its own name and of `orgs`; what is
private is not found by others. There are no gated repos and no Xet, which clients must turn off;
a listing is one page.
"""

import argparse
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

from .hub_routes import (
    FOLDERS,
    LFS_NAMES,
    ROUTES,
    Answer,
    Call,
    HubError,
    Repo,
    is_lfs,
    sha256,
)

WRITE_TOKEN, READ_TOKEN = "hf_write", "hf_read"


class Request(NamedTuple):
    """A request as it is logged. `path` includes the query; `token`: whether there was an
    Authorization; `status` is 0 where the connection was cut.
    """

    method: str
    path: str
    host: str
    token: bool
    status: int


@dataclass
class Fault:
    """What goes wrong with the next `times` (None: all) requests whose path has `pattern`."""

    method: str
    pattern: str
    times: int | None
    error: HubError | None = None
    cut_after: int | None = None
    seconds: float = 0.0


class HubServer:
    """A context manager that serves while it is entered.

    Args:
        tokens: {token: "read" or "write"}.
        user: Whose tokens they are.
        orgs: Other namespaces that the user may write to.
        private: Whether repos are private where a client does not say.
        lfs_redirect: Send downloads of LFS files to another origin, as the Hub does, where a
            request with a token is refused (400).
        multipart_chunk: Have LFS files of more bytes uploaded in parts of so many.
        port: 0: any that is free.
    """

    def __init__(
        self,
        *,
        tokens: Mapping[str, str] | None = None,
        user: str = "tester",
        orgs: Sequence[str] = ("org",),
        private: bool = False,
        lfs_redirect: bool = False,
        multipart_chunk: int | None = None,
        port: int = 0,
    ):
        self.tokens = dict(tokens or {WRITE_TOKEN: "write", READ_TOKEN: "read"})
        self.user, self.orgs, self.private = user, tuple(orgs), private
        self.lfs_redirect, self.multipart_chunk = lfs_redirect, multipart_chunk
        self.repos: dict[tuple[str, str], Repo] = {}  # by kind ("model", ...) and id
        self.lfs: dict[str, bytes] = {}  # by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.listener = Listener(("127.0.0.1", port), partial(Handler, self))
        self.endpoint = f"http://127.0.0.1:{self.listener.server_port}"
        self.cdn = f"http://localhost:{self.listener.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.listener.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.listener.shutdown()
        self.listener.server_close()

    def env(self, home: Path, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """The environment of a client: this process's, without its settings for the Hub."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        for switch in ("XET", "TELEMETRY", "PROGRESS_BARS", "UPDATE_CHECK"):
            ours[f"HF_HUB_DISABLE_{switch}"] = "1"
        ours |= {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home)}
        ours |= dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,localhost")
        ours["OMP_NUM_THREADS"] = "1"  # clients are many, and threads that spin slow them all
        return ours | ({} if token is None else {"HF_TOKEN": token})

    def add(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | None = None,
        *,
        kind: str = "model",
        private: bool = False,
    ) -> Repo:
        """Make a repo in any namespace; its first commit is `files` and `.gitattributes`."""
        rules = "".join(f"*{name} filter=lfs diff=lfs merge=lfs -text\n" for name in LFS_NAMES)
        tree = {".gitattributes": rules.encode(), **(files or {})}
        repo = Repo(kind, repo_id, private)
        repo.branches["main"] = repo.commit(tree, "initial commit", "", None)
        with self.lock:
            self.lfs |= {sha256(c): c for path, c in tree.items() if is_lfs(path, len(c))}
            self.repos[kind, repo_id] = repo
        return repo

    def fail(
        self,
        method: str,
        pattern: str,
        *,
        status: int,
        message: str = "made to fail",
        code: str | None = None,
        times: int | None = 1,
    ) -> None:
        """Answer such requests with an error. After 408, 429 and 5xx clients try five times
        more, within 23 s; not so for commits.
        """
        self.faults.append(Fault(method, pattern, times, error=HubError(status, message, code)))

    def cut(self, method: str, pattern: str, *, after: int, times: int | None = 1) -> None:
        """Close the connection after so many bytes: of the request's content where it has any,
        of the answer's where not.
        """
        self.faults.append(Fault(method, pattern, times, cut_after=after))

    def delay(self, method: str, pattern: str, *, seconds: float, times: int | None = 1) -> None:
        """Wait before such requests are read."""
        self.faults.append(Fault(method, pattern, times, seconds=seconds))

    def asked(self, method: str, pattern: str) -> list[Request]:
        """The requests of a method so far whose path has `pattern`."""
        return [r for r in self.requests if r.method == method and re.search(pattern, r.path)]

    def next_fault(self, method: str, path: str) -> Fault:
        with self.lock:
            for fault in self.faults:
                if fault.method == method and re.search(fault.pattern, path):
                    fault.times = fault.times and fault.times - 1
                    if fault.times == 0:
                        self.faults.remove(fault)
                    return fault
        return Fault(method, path, None)

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """What the route of a request answers."""
        url, verb = urlsplit(target), "GET" if method == "HEAD" else method
        for route_verb, pattern, route in ROUTES:
            found = re.fullmatch(pattern, url.path)
            if found and verb == route_verb:
                names = {name: part and unquote(part) for name, part in found.groupdict().items()}
                token, part = headers.get("Authorization"), headers.get("Range")
                call = Call(names, parse_qs(url.query), token, part, body)
                try:
                    with self.lock:
                        return route(self, call)
                except HubError as error:
                    return error.answer
        return HubError(404, f"tests/hub_routes.py has no route {method} {url.path}").answer

    def url(self, repo: Repo) -> str:
        return f"{self.endpoint}/{FOLDERS[repo.kind]}{repo.id}"

    def role(self, call: Call) -> str | None:
        """What the token may do; None where there is none; 401 where it is not known."""
        if call.authorization is None:
            return None
        token = call.authorization.removeprefix("Bearer ")
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def owns(self, repo_id: str) -> bool:
        return repo_id.split("/")[0] in (self.user, *self.orgs)

    def readable(self, call: Call) -> Repo:
        """The repo that a call is about; 404 where the caller may not know of it, too."""
        role, repo_id = self.role(call), call.names["id"]
        repo = self.repos.get((call.names.get("kind") or "model", repo_id))
        if repo is None or (repo.private and not (role and self.owns(repo_id))):
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, call: Call, *, anyone: bool = False) -> Repo:
        """The repo that a call changes; `anyone`: it may be another user's. A bare 401 would be
        RepositoryNotFoundError for the Hub's https addresses only, hence the code.
        """
        repo, role = self.readable(call), self.role(call)
        if role is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        if role != "write" or not (anyone or self.owns(repo.id)):
            raise HubError(403, f"this token may not write to {repo.id}")
        return repo


class Listener(ThreadingHTTPServer):
    """One daemon thread for each connection."""

    request_queue_size = 128


class Handler(BaseHTTPRequestHandler):
    """One connection: requests are read, spoilt, answered and logged."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and content are two writes

    def __init__(self, hub: HubServer, *arguments: object):
        self.hub = hub
        super().__init__(*arguments)

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True  # the client is gone

    def respond(self) -> None:
        fault = self.hub.next_fault(self.command, self.path)
        length, cut = int(self.headers.get("Content-Length") or 0), fault.cut_after
        time.sleep(fault.seconds)
        if length and cut is not None:
            self.rfile.read(min(cut, length))
            self.log(0)
            self.close_connection = True
            return
        body = self.rfile.read(length)
        if fault.error:
            answer = fault.error.answer
        else:
            answer = self.hub.answer(self.command, self.path, self.headers, body)
        self.log(answer.status if cut is None else 0)
        self.send(answer, cut)

    def log(self, status: int) -> None:
        token, host = "Authorization" in self.headers, self.headers.get("Host", "")
        self.hub.requests.append(Request(self.command, self.path, host, token, status))

    def send(self, answer: Answer, cut: int | None) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:cut])
        self.close_connection = self.close_connection or cut is not None

    def log_message(self, *arguments: object) -> None:
        """Nothing on stderr."""

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = respond  # noqa: N815


def run_client(
    hub: HubServer,
    home: Path,
    code: str | Sequence[str],
    *,
    token: str | None = WRITE_TOKEN,
    expect: int = 0,
) -> str:
    """Run Python code, or a command (its words), as a client of the Hub; its exit code must be
    `expect`. Returns what it printed, and what went to stderr where it was to fail.
    """
    command = [sys.executable, "-c", code] if isinstance(code, str) else list(code)
    done = subprocess.run(
        command, env=hub.env(home, token), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + (done.stderr if expect else "")


def main() -> None:
    parser = argparse.ArgumentParser(description="A Hub to try commands on.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--private", action="store_true", help="new repos are private")
    options = parser.parse_args()
    with HubServer(port=options.port, private=options.private) as hub:
        print(f"HF_ENDPOINT={hub.endpoint} HF_TOKEN={WRITE_TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
