"""Files are written whole, or not at all, and never over another by accident."""

import errno
import os
import stat
import sys
import threading

import pytest

from keras_bn.pages.files import check_writable, write_whole


def write_text(file, text, **options):
    write_whole(file, lambda path: path.write_text(text), **options)


def alone(folder, *names):
    """Whether a folder holds these files and nothing else, hidden or not."""
    return sorted(os.listdir(folder)) == sorted(names)


def contents(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_the_file_is_there_when_it_is_complete(tmp_path):
    file = tmp_path / "a.tar.gz"

    def write(path):
        assert path.name == file.name
        path.write_text("half")
        assert not file.exists()
        path.write_text("whole")

    write_whole(file, write)
    assert file.read_text() == "whole"
    assert alone(tmp_path, "a.tar.gz")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("present", [True, False])
def test_nothing_is_left_of_a_file_that_was_not_completed(tmp_path, present, error):
    file = tmp_path / "a.txt"
    if present:
        file.write_text("old")
    before = contents(tmp_path)

    def fail(path):
        path.write_text("half")
        raise error

    with pytest.raises(error):
        write_whole(file, fail, force=True)
    assert contents(tmp_path) == before


def test_a_file_that_appears_meanwhile_stays_without_force(tmp_path):
    file = tmp_path / "a.txt"

    def write(path):
        path.write_text("ours")
        file.write_text("theirs")

    with pytest.raises(OSError, match=r"a\.txt exists; --force overwrites it"):
        write_whole(file, write)
    assert file.read_text() == "theirs"
    write_whole(file, write, force=True)
    assert file.read_text() == "ours"
    assert alone(tmp_path, "a.txt")


def test_it_stays_where_a_file_system_has_no_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_a_file_that_appears_meanwhile_stays_without_force(tmp_path)
    write_text(tmp_path / "b.txt", "new")
    assert (tmp_path / "b.txt").read_text() == "new"
    assert alone(tmp_path, "a.txt", "b.txt")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such modes")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_the_mode_of_the_old_file_is_kept(tmp_path, mode):
    file = tmp_path / "a.txt"
    file.write_text("old")
    file.chmod(mode)
    write_text(file, "new", force=True)
    assert file.read_text() == "new"
    assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such modes")
def test_a_new_file_has_the_usual_mode(tmp_path):
    (tmp_path / "usual").write_text("")
    write_text(tmp_path / "a.txt", "new")
    usual = (tmp_path / "usual").stat().st_mode
    assert (tmp_path / "a.txt").stat().st_mode == usual


@pytest.mark.parametrize("name", ["a" * 251 + ".txt", "a." + "b" * 250, "é" * 125])
def test_long_names(tmp_path, name):
    write_text(tmp_path / name, "whole")
    assert alone(tmp_path, name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match=r"loop can't be written: Too many levels of sym"):
        check_writable(tmp_path / "loop", force=True)
    with pytest.raises(OSError, match=r"can't be written: File name too long") as error:
        check_writable(tmp_path / (name + "ccccccc"), force=True)
    assert "Errno" not in str(error.value)


def test_a_link_leads_to_the_file_that_is_written(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    write_text(tmp_path / "link.txt", "new", force=True)
    assert (tmp_path / "link.txt").is_symlink()
    assert (tmp_path / "real.txt").read_text() == "new"


@pytest.mark.parametrize("force", [True, False])
def test_threads_write_whole_files(tmp_path, force):
    file, contents = tmp_path / "a.txt", [str(n) * 200_000 for n in range(8)]
    refusals, start = [], threading.Barrier(8)

    def write(text):
        start.wait()
        try:
            write_text(file, text, force=force)
        except OSError as error:
            refusals.append(str(error))

    threads = [threading.Thread(target=write, args=(text,)) for text in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert file.read_text() in contents
    assert alone(tmp_path, "a.txt")
    assert len(refusals) == (0 if force else 7)
    assert all("exists" in refusal for refusal in refusals)


def test_messages_name_the_file_and_no_hidden_one(tmp_path):
    def fail(error):
        with pytest.raises(OSError, match=r"a\.txt can't be written: ") as caught:
            write_whole(tmp_path / "a.txt", error)
        message = str(caught.value)
        assert ".keras_bn-" not in message
        assert "Errno" not in message
        return message

    def no_space(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def of_a_library(path):
        raise OSError(f"Unable to create file (name = '{path}')")

    assert fail(no_space).endswith("No space left on device")
    assert f"name = '{tmp_path / 'a.txt'}'" in fail(of_a_library)
    with pytest.raises(OSError, match=r"^the user's own words$"):
        write_whole(tmp_path / "a.txt", _say)
    with pytest.raises(OSError, match="is not a regular file"):
        write_text(tmp_path, "new", force=True)
    with pytest.raises(OSError, match="there is no folder"):
        write_text(tmp_path / "no" / "a.txt", "new")


def _say(path):
    raise OSError("the user's own words")
