"""Files whole or not there, whoever is killed; JSON with its hash; one process a folder."""

import errno
import math
import os
import subprocess
import sys
import textwrap

import pytest

from pycompress import _files
from pycompress._files import alone, folder_of, locked, read_json, sweep_parts, write_json, write_whole

# The module alone: pycompress takes seconds to import.
LOADED = f"""
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {_files.__file__!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
folder = Path(sys.argv[1])
"""
KILLED = """
write = os.write
def half(descriptor, data):
    write(descriptor, data[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)
os.write = half
files.write_whole(folder / "weights", b"new" * 100_000)
"""
WAITS = """
def waits(descriptor, data):
    print("writing", flush=True)
    time.sleep(600)
os.write = waits
files.write_whole(folder / "weights", b"new")
"""
HOLDS = """
with files.alone(folder, "run"):
    # A worker that lives on does not hold the folder.
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        os.close(1)
    time.sleep(600)
"""


def python(script, folder, **settings):
    return subprocess.Popen([sys.executable, "-c", LOADED + textwrap.dedent(script), folder], **settings)


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path):
    write_whole(tmp_path / "weights", b"old")
    for _ in range(3):
        assert python(KILLED, tmp_path).wait() < 0
    assert (tmp_path / "weights").read_bytes() == b"old"
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 2 * 300_000
    write_whole(tmp_path / "weights", b"newer")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("weights", b"newer")]


def test_only_what_nobody_writes_is_swept(tmp_path):
    assert python(KILLED, tmp_path).wait() < 0
    writer = python(WAITS, tmp_path, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    (tmp_path / ".weights.mine.part").write_text("")
    sweep_parts(tmp_path)
    left = {file.name for file in tmp_path.iterdir()}
    assert len(left) == 2
    writer.kill()
    writer.wait()
    sweep_parts(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {".weights.mine.part"}


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_an_error_leaves_the_old_file_and_nothing_else(call, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_whole(tmp_path / "weights", b"old")
    monkeypatch.setattr(os, call, full)
    with pytest.raises(ValueError, match=r"cannot write .*weights: No space left on device"):
        write_whole(tmp_path / "weights", b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("weights", b"old")]


def test_json_comes_back_and_any_change_is_refused(tmp_path):
    file = tmp_path / "state.json"
    content = {"b": [1, 2.5, None], "a": {"ü": 1e-300}, "n": 10**30, "loss": math.nan, "best": [math.inf]}
    write_json(file, content)
    assert read_json(file) == content | {"loss": None, "best": [None]}
    assert "NaN" not in file.read_text()
    data = file.read_bytes()
    for place in [i for i, byte in enumerate(data) if chr(byte).isalnum()]:
        file.write_bytes(data[:place] + (b"2" if data[place : place + 1] != b"2" else b"3") + data[place + 1 :])
        with pytest.raises(ValueError, match=r"state\.json is damaged; delete .* to start over"):
            read_json(file)
    for other in (b"", b"[]", b"{}", data[:-1], b"\xff", b"[" * 100_000):
        file.write_bytes(other)
        with pytest.raises(ValueError, match=r"state\.json is damaged; do without"):
            read_json(file, "do without")


def test_a_folder_is_held_until_its_holder_ends(tmp_path):
    holder = python(HOLDS, tmp_path, stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    message = rf"another run \(process {holder.pid}\) is writing to .*; wait until it ends"
    with pytest.raises(ValueError, match=message), alone(tmp_path, "run"):
        pass
    holder.kill()
    holder.wait()
    try:
        with alone(tmp_path, "run"):
            os.kill(worker, 0)
    finally:
        os.kill(worker, 9)


def test_a_folder_is_free_after_an_error_in_it(tmp_path):
    with pytest.raises(KeyError), alone(tmp_path, "run"):
        raise KeyError
    with alone(tmp_path, "run"):
        assert locked(tmp_path) is None


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe"])
def test_a_lock_that_is_no_file_is_refused(kind, tmp_path):
    target, lock = tmp_path / "target", tmp_path / "run" / "lock"
    lock.parent.mkdir()
    if kind == "link":
        target.write_text("mine")
    if kind in ("link", "dangling"):
        lock.symlink_to(target)
    elif kind == "folder":
        lock.mkdir()
    else:
        os.mkfifo(lock)
    with (
        pytest.raises(
            ValueError, match=r"lock is a symbolic link; delete it|lock is not a file; delete it|cannot write"
        ),
        alone(lock.parent, "run"),
    ):
        pass
    assert not target.exists() or target.read_text() == "mine"


def test_letters_in_a_lock_are_not_overwritten(tmp_path):
    (tmp_path / "lock").write_text("my letters")
    with alone(tmp_path, "run"):
        pass
    assert (tmp_path / "lock").read_text() == "my letters"


def test_a_folder_has_a_name():
    assert str(folder_of(".", "folder")) == "."
    for empty in ("", " "):
        with pytest.raises(ValueError, match=r"checkpoint is an empty name; give a directory, '\.' for this one"):
            folder_of(empty, "checkpoint")
    with pytest.raises(TypeError, match="checkpoint must be a directory, got bool"):
        folder_of(True, "checkpoint")
