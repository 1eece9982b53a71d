"""Where tables are saved to: names, links, folders, forks. What happens when a call fails is in benches/faults."""

import os
import stat
import subprocess
import sys

import numpy as np
import pytest

import vqrs
from vqrs import _core

ROWS = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
TABLE = vqrs.compress(ROWS, method="scalar")

posix = pytest.mark.skipif(os.name != "posix", reason="links, modes and names of bytes are those of POSIX")


def same(path) -> bool:
    with vqrs.open(path, verify="full") as table:
        return np.array_equal(table.to_numpy(), TABLE.to_numpy())


@pytest.mark.parametrize("name", ["x" * 255, "ü" * 127, "x" * 99 + "ü" * 78])
def test_a_name_may_be_as_long_as_the_system_allows(name, tmp_path):
    for _ in range(2):
        TABLE.save(tmp_path / name)
    assert same(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


def test_stale_files_of_long_names_are_swept(tmp_path):
    name = "y" * 200
    (tmp_path / f".{name[:100]}.vqrs-tmp.1.stale").write_bytes(b"x")
    TABLE.save(tmp_path / name)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_need_not_be_text(tmp_path):
    path = os.path.join(os.fsencode(tmp_path), b"\xff\xfe.safetensors")
    TABLE.save(path)
    assert same(path)
    assert os.listdir(os.fsencode(tmp_path)) == [b"\xff\xfe.safetensors"]
    assert os.fsencode(vqrs.open(path).path) == path
    with pytest.raises(NotADirectoryError) as missing:
        TABLE.save(path + b"/below")
    assert os.fsencode(missing.value.filename) == path + b"/below"


@posix
@pytest.mark.parametrize("there", [True, False], ids=["to a file", "dangling"])
def test_links_are_followed(there, tmp_path):
    (tmp_path / "far").mkdir()
    target, first, second = tmp_path / "far" / "table", tmp_path / "first", tmp_path / "far" / "second"
    second.symlink_to("table")
    first.symlink_to(os.path.join("far", "second"))
    if there:
        target.write_bytes(b"old")
    TABLE.save(first)
    assert first.is_symlink()
    assert second.is_symlink()
    assert same(target)
    assert sorted(os.listdir(tmp_path / "far")) == ["second", "table"]


@posix
def test_what_is_no_file_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "circle").symlink_to("circle")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    quantizer = vqrs.ScalarQuantizer().fit(ROWS)

    def blocks():
        raise AssertionError("a block was asked for")
        yield

    for name, error in [
        ("folder", IsADirectoryError),
        ("new/", IsADirectoryError),
        ("circle", OSError),
        ("pipe", OSError),
        ("nowhere/table", FileNotFoundError),
        ("pipe/table", NotADirectoryError),
        ("", OSError),
    ]:
        path = os.path.join(tmp_path, name) if name else ""
        with pytest.raises(error, match=name.split("/")[0] or "path"):
            TABLE.save(path)
        with pytest.raises(error):
            quantizer.compress(blocks(), path=path)
    if os.path.exists("/dev/full"):
        with pytest.raises(OSError, match="/dev/full"):
            TABLE.save("/dev/full")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_relative_path_stays_where_it_was(tmp_path, monkeypatch):
    """Also if the working folder changes while rows are still coming."""
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def blocks():
        yield ROWS[:30]
        os.chdir("other")
        yield ROWS[30:]

    writer = _core.TableWriter("table", vqrs.ScalarQuantizer().fit(ROWS)._codec)
    for block in blocks():
        writer.write(block)
    writer.finish()
    assert sorted(os.listdir(tmp_path)) == ["other", "table"]
    assert os.listdir(tmp_path / "other") == []


@posix
def test_a_pipe_among_the_temporary_files_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / ".table.vqrs-tmp.1.pipe")
    TABLE.save(tmp_path / "table")
    assert same(tmp_path / "table")


@posix
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_the_new_file_is_open_to_the_same_users(mode, tmp_path):
    path = tmp_path / "table"
    for _ in range(2):
        TABLE.save(path)
        path.chmod(mode)
    writer = _core.TableWriter(str(path), vqrs.ScalarQuantizer().fit(ROWS)._codec)
    [temporary] = tmp_path.glob(".table.*")
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o600
    writer.write(ROWS)
    writer.finish()
    assert stat.S_IMODE(path.stat().st_mode) == mode


FORKED = """
import os, sys
import numpy as np
import vqrs
from vqrs import _core

x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
writer = _core.TableWriter(sys.argv[1], vqrs.ScalarQuantizer(n_jobs=1).fit(x)._codec)
writer.write(x[:30], n_jobs=1)
for act in ("write", "finish", "drop"):
    child = os.fork()
    if child == 0:
        try:
            if act == "write":
                writer.write(x[30:], n_jobs=1)
            if act == "finish":
                writer.finish()
        except OSError as error:
            assert "forked" in str(error), error
        else:
            assert act == "drop"
        del writer
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, act
writer.write(x[30:], n_jobs=1)
writer.finish()
assert len(vqrs.open(sys.argv[1], verify="full")) == 60
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_leaves_the_writer_of_its_parent_alone(tmp_path):
    subprocess.run([sys.executable, "-c", FORKED, str(tmp_path / "table")], check=True)
    assert os.listdir(tmp_path) == ["table"]
