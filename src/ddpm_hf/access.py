"""Access to the Hub: what went wrong there in one line with what to do, and never a token in it.

`explained_hub` is for loading and for pushing. It imports huggingface_hub only when something was
raised.
"""

import ipaddress
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from .errors import InputError

logger = logging.getLogger(__name__)

LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
MAX_QUOTED = 300  # characters of a text of the server or a name in our line


@contextmanager
def explained_hub(
    repo: str,
    action: str = "load",
    *,
    repo_type: str = "model",
    token: str | bool | None = None,
    or_folder: bool = False,
) -> Iterator[None]:
    """Turn what the Hub's client raises inside the block into one line; the rest passes.

    diffusers wraps some of these errors in OSError: causes are looked through.

    Args:
        repo: The repo's name, for the line.
        action: What was being done, before the name: "load", "push to".
        repo_type: model, dataset or space.
        token: The token that was passed, if one was; else the one that is logged in counts.
        or_folder: The name could have been a folder's too; say that there is none.

    Raises:
        InputError: no such repo, revision or file, no or no sufficient token, a name that cannot
            be, two pushes at once, a server without Xet, no connection, nothing in the cache.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        pushes = action.startswith("push")
        problem = _problem(error, repo, repo_type, token, pushes=pushes)
        if problem is None:
            raise
        folder = "there is no such folder, and " if or_folder and _is_absent(error) else ""
        line = scrubbed(f"cannot {action} {repo[:MAX_QUOTED]!r}: {folder}{problem}", token)
        # A traceback shows the cause too, and a server may repeat what it was sent.
        shown = error if all(scrubbed(str(e), token) == str(e) for e in _chain(error)) else None
        raise InputError(line) from shown


def one_line(text: object) -> str:
    """What another says, an error or a text, in one line of bounded length."""
    text = " ".join(str(text).split())
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "..."


def scrubbed(text: str, token: str | bool | None = None) -> str:
    """`text` with what looks like a token, and the tokens in use, made unreadable."""
    for secret in (token, *_stored_tokens()):
        if isinstance(secret, str) and secret:
            text = text.replace(secret, "***")
    # Not the middle of a name: ddpm_hf_cats is one.
    return re.sub(r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{20,}", "***", text)


def endpoint() -> str:
    """Scheme and host of the Hub in use, without a password that the address may hold."""
    from huggingface_hub import constants

    url = urlsplit(constants.ENDPOINT)
    return f"{url.scheme}://{url.netloc.rpartition('@')[2]}"


@cache  # the endpoint is read once, when huggingface_hub is imported
def warn_insecure_endpoint() -> None:
    """Warn, once, if HF_ENDPOINT is plain http to another machine."""
    url = urlsplit(endpoint())
    if url.scheme == "http" and not _is_loopback(url.hostname or ""):
        logger.warning(
            f"HF_ENDPOINT is {endpoint()}, plain http: whoever is on the way can read your token "
            "and change what you load. Use https; HF_HUB_DISABLE_IMPLICIT_TOKEN=1 keeps the token."
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost" or host.endswith(".localhost")


def _stored_tokens() -> list[str]:
    """The tokens that the client may send: never refreshed or asked for, unlike `get_token`."""
    from huggingface_hub import constants

    stored = [os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")]
    with suppress(OSError):  # no file, or that of another user
        stored.append(Path(constants.HF_TOKEN_PATH).read_text())
    return [token.strip() for token in stored if token and token.strip()]


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _is_absent(error: BaseException) -> bool:
    """Whether the Hub did not say that it has the repo."""
    from huggingface_hub import errors

    answer = next((e for e in _chain(error) if isinstance(e, errors.HfHubHTTPError)), None)
    not_found = isinstance(answer, errors.RepositoryNotFoundError)
    return answer is None or (not_found and not isinstance(answer, errors.GatedRepoError))


def _problem(
    error: Exception, repo: str, repo_type: str, token: str | bool | None, *, pushes: bool
) -> str | None:
    """What is wrong and what to do about it; None for what the Hub has no part in.

    An answer of the server says more than what a library made of it, so it is looked for first.
    """
    from huggingface_hub import errors

    chain = list(_chain(error))
    cache = "" if pushes else ", and the cache is not enough for that"
    cached = "" if pushes else "; what was loaded once loads without it"

    def found(*kinds: type[BaseException]) -> BaseException | None:
        return next((e for e in chain if isinstance(e, kinds)), None)

    if answer := found(errors.HfHubHTTPError):
        return _explain_answer(answer, repo, repo_type, token)
    if any(isinstance(e, ConnectionError) and "xet-write-token" in str(e) for e in chain):
        return f"{endpoint()} has no Xet: set HF_HUB_DISABLE_XET=1"
    if invalid := found(errors.HFValidationError):
        return f"no name of a repo is like this. {one_line(invalid)}"
    if found(errors.LocalTokenNotFoundError):
        return f"that needs a token: {LOG_IN}"
    if found(errors.OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set{cache}: unset it"
    # httpx's: all that is no answer. Its name depends on the version of the client.
    if found(errors.HTTPError, ConnectionError, TimeoutError):
        return (
            f"no connection to {endpoint()}{cache}: check the network, HF_ENDPOINT and "
            f"proxies{cached}"
        )
    if found(
        errors.LocalEntryNotFoundError,
        errors.RevisionResolutionError,
        errors.CachedRepoTreeNotFoundError,
    ):
        return (
            "the cache is not enough for that: load it once without local_files_only and "
            "HF_HUB_OFFLINE"
        )
    return None


def _explain_answer(error: Exception, repo: str, repo_type: str, token: str | bool | None) -> str:
    """What an answer of the Hub means and what to do about it."""
    from huggingface_hub import errors

    said = error.response.headers.get("X-Error-Message") or error.server_message or ""
    said = f" ({one_line(said)})" if said else ""
    page = f"{endpoint()}/{'' if repo_type == 'model' else repo_type + 's/'}{repo}"
    has_token = token is not False and bool(token or _stored_tokens())
    status = error.response.status_code
    match error:
        case errors.GatedRepoError():
            also = "" if has_token else f", then {LOG_IN}"
            return f"its authors let in who asks: ask on {page}{also}"
        case errors.RepositoryNotFoundError():
            if other := _other_type(repo, repo_type, token):
                return f"it is a {other}, not a {repo_type}: check the name"
            private = (
                "the token in use may not see it: check `hf auth whoami`"
                if has_token
                else f"for a private one {LOG_IN}"
            )
            return f"{endpoint()} has no such {repo_type}: check the name; {private}"
        case errors.RevisionNotFoundError():
            return f"it has no such revision: its branches and tags are on {page}/tree/main"
        case errors.EntryNotFoundError():
            return f"it has no file {_path_in_repo(error)!r}: look at {page}/tree/main"
    match status:
        case 401:
            return f"the token is not valid{said}: {LOG_IN} anew"
        case 403:
            return (
                f"you may not{said}: use a token that may write to or read this {repo_type} "
                f"({endpoint()}/settings/tokens), and {LOG_IN}"
            )
        case 409:
            return (
                f"it exists already, or changed meanwhile{said}: choose another name or try again"
            )
        case 412:
            return f"somebody else pushed meanwhile{said}: try again"
        case 429:
            return f"too many requests{said}: wait a few minutes"
    if status >= 500:
        return f"{endpoint()} fails with {status}{said}: try again later"
    return f"{endpoint()} refuses with {status}{said}"


def _other_type(repo: str, repo_type: str, token: str | bool | None) -> str | None:
    """The type of a repo of this name, if it is another than `repo_type`: two requests."""
    from huggingface_hub import errors, repo_exists

    for other in ("model", "dataset", "space"):
        try:
            if other != repo_type and repo_exists(repo, repo_type=other, token=token):
                return other
        except (errors.HTTPError, OSError, ValueError, KeyError):  # KeyError: not a Hub's answer
            return None  # the first error is the one to tell
    return None


def _path_in_repo(error: Exception) -> str:
    """The file that was asked for: what follows /resolve/<revision>/ in the address."""
    return re.sub(r".*/resolve/[^/]*/", "", error.response.url.path)[:MAX_QUOTED]
