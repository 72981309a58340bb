"""Pushing in the background: order, retries, what is said, and copies that do not change."""

import threading
import time

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

from ddpm_hf import uploads
from ddpm_hf.errors import InputError
from ddpm_hf.uploads import BackgroundPush, freeze, may_pass


class Answer:
    def __init__(self, status_code):
        self.status_code = status_code


class AnswerError(Exception):
    """An error of the Hub's client, as far as `may_pass` looks at one."""

    def __init__(self, status_code):
        super().__init__(f"status {status_code}")
        self.response = Answer(status_code)


def explained(cause):
    """The InputError that `explained_hub` makes of an error."""
    try:
        raise InputError("one line") from cause
    except InputError as error:
        return error


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (explained(AnswerError(503)), True),
        (explained(AnswerError(429)), True),
        (explained(AnswerError(412)), True),
        (explained(AnswerError(403)), False),
        (explained(ConnectionError("no route")), True),
        (explained(ConnectionError("404 xet-write-token")), False),
        (explained(OfflineModeIsEnabled("offline")), False),
        (explained(ValueError("no name")), False),
        (ConnectionError("no route"), True),
        (InputError("no pipeline"), False),
    ],
)
def test_what_may_go_right_later(error, passes):
    assert may_pass(error) is passes


def nothing():
    pass


def test_while_one_is_in_flight_the_newest_of_a_kind_waits():
    said, order, cleaned = [], [], []
    started, go_on = threading.Event(), threading.Event()

    def first():
        started.set()
        assert go_on.wait(10)
        order.append("first")

    pushes = BackgroundPush(said.append)
    pushes.submit("model", "first", first, lambda: cleaned.append("first"))
    assert started.wait(10)
    for name in ("second", "third"):
        pushes.submit(
            "model", name, lambda n=name: order.append(n), lambda n=name: cleaned.append(n)
        )
    pushes.submit("checkpoint", "c", lambda: order.append("c") or "its answer", nothing)
    assert pushes.busy
    assert cleaned == ["second"]  # replaced, never pushed
    go_on.set()
    assert pushes.close(10)
    assert order == ["first", "third", "c"]
    assert cleaned == ["second", "first", "third"]
    assert pushes.done["checkpoint"] == "its answer"
    assert not pushes.busy
    assert said == []


def test_what_may_pass_is_tried_again(monkeypatch):
    monkeypatch.setattr(uploads, "RETRY_SECONDS", (0.0, 0.0))
    answers = [explained(AnswerError(503)), ConnectionError("no route"), None]
    over = threading.Event()

    def push():
        if error := answers.pop(0):
            raise error
        return "there"

    pushes = BackgroundPush(print)
    pushes.submit("model", "it", push, over.set)
    assert over.wait(10)
    assert pushes.close(10)
    assert pushes.done == {"model": "there"}
    assert answers == []


def test_what_cannot_pass_is_given_up_at_once_and_said(monkeypatch):
    monkeypatch.setattr(uploads, "RETRY_SECONDS", (60.0,))
    said, tries = [], []

    def push():
        tries.append(1)
        raise InputError("you may not, hf_SECRETsecretSECRETsecret")

    pushes = BackgroundPush(said.append)
    pushes.submit("model", "the model of step 3", push, nothing)
    assert not pushes.close(10)
    assert len(tries) == 1
    assert pushes.failed == {"model": "the model of step 3: you may not, ***"}
    (line,) = said
    assert "the model of step 3 could not be pushed, training goes on (you may not, ***)" in line


def test_an_older_push_is_not_told_for_one_that_failed():
    over = threading.Event()

    def push():
        raise InputError("you may not")

    pushes = BackgroundPush(lambda line: None)
    pushes.submit("model", "old", lambda: "old answer", over.set)
    assert over.wait(10)
    pushes.submit("model", "new", push, nothing)
    assert not pushes.close(10)
    assert pushes.done == {}


def test_the_end_does_not_wait_for_a_pause_but_tries_once_more(monkeypatch):
    monkeypatch.setattr(uploads, "RETRY_SECONDS", (600.0, 600.0))
    tries, failed = [], threading.Event()

    def push():
        tries.append(1)
        failed.set()
        raise ConnectionError("no route")

    pushes = BackgroundPush(lambda line: None)
    pushes.submit("model", "it", push, nothing)
    assert failed.wait(10)
    assert not pushes.close(30)
    assert len(tries) == 2


def test_a_newer_one_ends_the_pauses_of_an_older_one(monkeypatch):
    monkeypatch.setattr(uploads, "RETRY_SECONDS", (600.0,))
    failed = threading.Event()

    def push():
        failed.set()
        raise ConnectionError("no route")

    pushes = BackgroundPush(lambda line: None)
    pushes.submit("model", "old", push, nothing)
    assert failed.wait(10)
    pushes.submit("model", "new", lambda: "there", nothing)
    assert pushes.close(30)  # what failed before is mended
    assert pushes.done == {"model": "there"}


def test_a_push_that_hangs_is_left_and_said():
    hang = threading.Event()
    pushes = BackgroundPush(lambda line: None)
    pushes.submit("model", "it", lambda: hang.wait(30), nothing)
    assert not pushes.close(0.1)
    assert pushes.failed == {"model": "it: not over after 0 seconds"}
    hang.set()


def test_the_wait_is_short_once_the_machine_is_about_to_go(monkeypatch):
    """A signal that comes while the end of a run waits for the Hub."""
    monkeypatch.setattr(uploads, "STOP_WAIT", 0.1)
    hang, asked = threading.Event(), []
    pushes = BackgroundPush(lambda line: None)
    pushes.submit("model", "it", lambda: hang.wait(60), nothing)
    began = time.monotonic()
    assert not pushes.close(50, lambda: bool(asked.append(0)) or len(asked) > 2)
    hang.set()
    assert time.monotonic() - began < 25  # and not 50
    assert len(asked) > 2


def test_a_frozen_copy_does_not_change(tmp_path):
    folder = tmp_path / "run"
    (folder / "unet").mkdir(parents=True)
    weights, picture = folder / "unet" / "w.safetensors", folder / "grid.png"
    weights.write_text("old")
    picture.write_text("old")
    (tmp_path / "frozen").mkdir()
    (tmp_path / "frozen" / "leftover").touch()
    frozen = freeze(folder, [weights, picture], tmp_path / "frozen")
    (folder / "new").write_text("new")
    (folder / "new").replace(weights)  # as a run replaces its weights
    picture.write_text("new")  # as pictures are written
    assert (frozen / "unet" / "w.safetensors").read_text() == "old"
    assert (frozen / "grid.png").read_text() == "old"
    assert not (frozen / "leftover").exists()


def test_weights_are_linked_and_copied_where_a_disk_has_no_links(tmp_path, monkeypatch):
    weights = tmp_path / "run" / "w.safetensors"
    weights.parent.mkdir()
    weights.write_text("x")
    freeze(weights.parent, [weights], tmp_path / "linked")
    assert (tmp_path / "linked" / "w.safetensors").stat().st_ino == weights.stat().st_ino

    def no_links(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(uploads.os, "link", no_links)
    copied = freeze(weights.parent, [weights], tmp_path / "copied") / "w.safetensors"
    assert copied.read_text() == "x"
    assert copied.stat().st_ino != weights.stat().st_ino
