import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from mabert import files
from mabert.files import atomic_folder, atomic_write, remove_leftovers


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_and_stop(path):
    path.write_text("half")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("mode", "old", "new"), [("wb", b"old", b"new\r\n"), ("w", "old", "neu: ü")])
def test_atomic_write_replaces_the_file_at_the_end_of_the_block(tmp_path, mode, old, new):
    path = tmp_path / "file"
    read = path.read_bytes if mode == "wb" else lambda: path.read_text(encoding="utf-8")
    with atomic_write(path, mode) as file:
        file.write(old)
    with atomic_write(path, mode) as file:
        file.write(new)
        file.flush()
        assert read() == old
    assert read() == new
    assert names(tmp_path) == ["file"]


def test_atomic_write_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path, "w"):
        write_and_stop(next(tmp_path.glob(".tmp-*")))
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_atomic_write_follows_a_link(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with atomic_write(tmp_path / "link", "w") as file:
        file.write("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_atomic_folder_appears_when_it_is_complete(tmp_path):
    with atomic_folder(tmp_path / "made" / "here") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("text")
        assert folder.name.startswith(".tmp-here-")
        assert names(tmp_path / "made") == [folder.name]
    assert names(tmp_path / "made") == ["here"]
    assert (tmp_path / "made" / "here" / "deep" / "file").read_text() == "text"


def test_everything_is_synced_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "_fsync", lambda path: synced.append((path, (tmp_path / "target").exists())))
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").write_text("text")
    before = {path for path, renamed in synced if not renamed}
    assert before == {folder, folder / "deep", folder / "deep" / "file"}
    assert synced[-1] == (tmp_path, True)


def test_an_existing_folder_is_refused_unless_it_is_empty(tmp_path):
    (tmp_path / "target").mkdir()
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("old")
    with pytest.raises(FileExistsError, match="target exists already; choose another folder"):
        atomic_folder(tmp_path / "target").__enter__()
    (tmp_path / "file").write_text("a file")
    with pytest.raises(FileExistsError, match="file exists already"):
        atomic_folder(tmp_path / "file", replace=True).__enter__()
    assert names(tmp_path) == ["file", "target"]


def appear(path, kind):
    if kind == "folder":
        path.mkdir()
    (path / "file" if kind == "folder" else path).write_text("early")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_appeared_meanwhile_is_refused(tmp_path, kind):
    target = tmp_path / "target"
    with pytest.raises(FileExistsError, match="target exists already"), atomic_folder(target):
        appear(target, kind)
    assert names(tmp_path) == ["target"]
    assert (target / "file" if kind == "folder" else target).read_text() == "early"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_replace_exchanges_old_and_new(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: None)
    with atomic_folder(tmp_path / "target", replace=True) as folder:
        (folder / "old").write_text("old")
    with atomic_folder(tmp_path / "target", replace=True) as folder:
        (folder / "new").write_text("new")
        assert names(tmp_path / "target") == ["old"]
    assert names(tmp_path / "target") == ["new"]
    assert names(tmp_path) == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="folders are exchanged in one step on Linux")
def test_replace_leaves_no_moment_without_a_version(tmp_path):
    with atomic_folder(tmp_path / "target") as folder:
        (folder / "file").write_text("0")
    watch = (
        "import sys; from pathlib import Path; n = 0; print('ready', flush=True)\n"
        "while not Path(sys.argv[2]).exists(): Path(sys.argv[1]).stat(); n += 1\n"
        "assert n > 100"
    )
    command = [sys.executable, "-c", watch, tmp_path / "target", tmp_path / "stop"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as watcher:
        watcher.stdout.readline()
        for i in range(200):
            with atomic_folder(tmp_path / "target", replace=True) as folder:
                (folder / "file").write_text(str(i))
        (tmp_path / "stop").touch()
    assert watcher.returncode == 0


def test_atomic_folder_leaves_the_old_version_after_an_error(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "target", replace=True) as folder:
        write_and_stop(folder / "file")
    assert names(tmp_path) == ["target"]
    assert (tmp_path / "target" / "file").read_text() == "old"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("write", [atomic_write, lambda path: atomic_folder(path, replace=True)])
def test_a_full_disk_is_named(tmp_path, write, error):
    message = r"the disk is full: .*target could not be written \(nothing was left there\)"
    with pytest.raises(OSError, match=message) as caught, write(tmp_path / "target"):
        raise error
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []
    with write(tmp_path / "target"):
        pass
    with pytest.raises(OSError, match="the earlier version is intact"), write(tmp_path / "target"):
        raise error
    assert names(tmp_path) == ["target"]


def test_an_unclear_error_on_a_full_disk_is_named_too_and_other_errors_stay(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    for free, kind in ((0, OSError), (2**30, RuntimeError)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free))
        with pytest.raises(kind), atomic_write(tmp_path / "file"):
            raise RuntimeError("unexpected pos 576 vs 534")


def test_a_kill_leaves_the_old_version_and_a_leftover_that_can_be_removed(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "file").write_text("old")
    (tmp_path / ".tmp-target-of-another-0123abcd").mkdir()
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1]); from files import atomic_folder\n"  # without torch: quick
        "with atomic_folder(sys.argv[2], replace=True) as folder:\n"
        "    (folder / 'file').write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, Path(files.__file__).parent, tmp_path / "target"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
        writer.stdout.readline()
        os.kill(writer.pid, signal.SIGKILL)
    assert (tmp_path / "target" / "file").read_text() == "old"
    removed = remove_leftovers(tmp_path, "target")
    assert len(removed) == 1
    assert names(tmp_path) == [".tmp-target-of-another-0123abcd", "target"]
    (tmp_path / ".tmp-file-0123abcd").touch()
    assert len(remove_leftovers(tmp_path)) == 2
    assert names(tmp_path) == ["target"]
