"""Pushing in the background: training never waits for the Hub, and never fails with it."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

from .access import scrubbed

RETRY_SECONDS = (10.0, 60.0, 300.0)
"""How long to wait before each new attempt, after those of huggingface_hub itself."""

LAST_WAIT = 600.0
"""Seconds that the end of a run waits for its pushes: less than processes wait for each other."""

STOP_WAIT = 30.0
"""The same after a signal, when the machine is about to go."""


def may_pass(error: BaseException) -> bool:
    """Whether what went wrong may go right a while later: the network, or the Hub itself."""
    seen = []
    while error is not None and error not in seen:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status in (408, 409, 412, 429) or status >= 500
        if isinstance(error, OfflineModeIsEnabled):  # until it is unset, which is a new start
            return False
        if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
            return "xet-write-token" not in str(error)  # a server that will never have it
        seen.append(error)
        error = error.__cause__
    return False


class BackgroundPush:
    """One push at a time, in a thread; of those that wait, the newest of each kind.

    Args:
        say: Told a line when a push is given up.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.failed: dict[str, str] = {}
        self.done: dict[str, Any] = {}
        self._waiting: dict[str, tuple[str, Callable[[], Any], Callable[[], None]]] = {}
        self._change = threading.Condition()
        self._closing = False
        self._in_flight: tuple[str, str] | None = None  # kind and name
        self._thread: threading.Thread | None = None

    def submit(
        self, kind: str, name: str, push: Callable[[], Any], clean: Callable[[], None]
    ) -> None:
        """Push as soon as the push in flight is over; takes the place of one that waits.

        Args:
            kind: What is pushed: the newest of a kind is enough.
            name: For lines about it.
            push: Does it; its answer is kept in `done[kind]`.
            clean: Called once when it is done, given up, or replaced.
        """
        with self._change:
            replaced = self._waiting.pop(kind, None)
            self._waiting[kind] = name, push, clean
            if self._thread is None or not self._thread.is_alive():
                # A daemon: a process that has to go does not wait for the Hub.
                self._thread = threading.Thread(target=self._work, name="push", daemon=True)
                self._thread.start()
            self._change.notify_all()
        if replaced:
            replaced[2]()

    @property
    def busy(self) -> bool:
        """Whether a push is in flight or waits."""
        return bool(self._in_flight or self._waiting)

    def close(
        self, seconds: float = LAST_WAIT, hurried: Callable[[], bool] = lambda: False
    ) -> bool:
        """Wait for what is left, attempt at once what waits for a new attempt; whether all is done.

        Nothing can be submitted after.

        Args:
            seconds: At most; STOP_WAIT from when `hurried` is true.
            hurried: Whether the machine is about to go.
        """
        began = time.monotonic()
        end = began + seconds
        with self._change:
            self._closing = True
            self._change.notify_all()
            thread = self._thread
        if thread is not None:
            while thread.is_alive() and time.monotonic() < end:
                thread.join(min(0.2, max(0.0, end - time.monotonic())))
                if hurried():
                    end = min(end, time.monotonic() + STOP_WAIT)
            with self._change:
                late = dict([self._in_flight] if self._in_flight else [])
                late |= {kind: name for kind, (name, *_) in self._waiting.items()}
            waited = time.monotonic() - began
            for kind, name in late.items():
                self.done.pop(kind, None)
                self.failed[kind] = f"{name}: not over after {waited:.0f} seconds"
        return not self.failed

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._waiting:
                    if self._closing:
                        return
                    self._change.wait()
                kind = next(iter(self._waiting))
                name, push, clean = self._waiting.pop(kind)
                self._in_flight = kind, name
            try:
                self.done[kind] = self._attempt(kind, push)
                self.failed.pop(kind, None)
            except Exception as error:  # noqa: BLE001  whatever it is, training goes on
                self.done.pop(kind, None)  # what is there is older
                reason = scrubbed(" ".join(str(error).split()))
                self.failed[kind] = f"{name}: {reason}"
                self.say(f"Warning: {name} could not be pushed, training goes on ({reason})")
            finally:
                clean()
                self._in_flight = None

    def _attempt(self, kind: str, push: Callable[[], Any]) -> Any:
        """Push, again after a while where that may help, until something newer waits."""
        for pause in (*RETRY_SECONDS, None):
            try:
                return push()
            except Exception as error:
                with self._change:
                    if pause is None or not may_pass(error) or kind in self._waiting:
                        raise
                    closing = self._closing
                    if not closing:
                        self._change.wait_for(
                            lambda: self._closing or kind in self._waiting, timeout=pause
                        )
                if closing:
                    raise
        raise AssertionError("the last attempt returns or raises")


def freeze(folder: Path, files: Iterable[Path], frozen: Path) -> Path:
    """A copy of some files of a folder as they are now; weights are linked, not copied.

    Files of ours are replaced and never written in place, but for pictures, which are copied.

    Args:
        folder: Where the files are.
        files: Which, absolute or relative to where the program runs, all inside `folder`.
        frozen: The new folder; one that stands there is replaced.

    Raises:
        OSError: it could not be written.
    """
    shutil.rmtree(frozen, ignore_errors=True)
    for path in files:
        target = frozen / path.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            try:
                os.link(path, target)
                continue
            except OSError:  # a disk without links
                pass
        shutil.copyfile(path, target)
    return frozen
