"""The door to files: whole lines or none, cuts that need no space, and the errors of libraries by their number."""

import errno
import os
import pathlib

import pytest

from armd_jax import files


def test_lines_are_appended_whole_or_not_at_all(tmp_path, full_disk):
    """What a full disk takes of a line is removed again, and the next line follows the last whole one."""
    path = tmp_path / "rows.jsonl"
    files.append_json_line(path, {"row": 1})
    before = path.read_bytes()
    with full_disk(len(before) + 5), pytest.raises(OSError) as error:
        files.append(path, '{"row": 2}\n')
    assert error.value.errno in files.FULL and path.read_bytes() == before
    files.append(path, '{"row": 3}\n{"row": 4}\n')
    assert [row["row"] for row in files.read_json_lines(path)] == [1, 3, 4]


@pytest.mark.parametrize("left", [b'{"row": 1}\n{"ro', b'{"row": 1}\n', b'{"row": 1}\n{"row": 9}'])
def test_a_partial_line_is_removed_before_the_next(tmp_path, left):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(left)
    files.append_json_line(path, {"row": 2})
    assert path.read_text() == '{"row": 1}\n{"row": 2}\n'


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        (b"", b""),
        (b'{"step": 1}\n{"step": 2}\n{"step": 3}\n', b'{"step": 1}\n{"step": 2}\n'),
        (b'{"step": 1}\n{"step": 2}', b'{"step": 1}\n'),
        (b'{"step": 1}\nno row\n{"step": 2}\n', b'{"step": 1}\n'),
        (b'{"step": 4}\n{"step": 1}\n', b""),
    ],
)
def test_rows_of_lost_work_are_cut_off(tmp_path, full_disk, content, kept):
    """Cutting works on a full disk, and a file with nothing to cut is not touched."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with full_disk(0):
        for _ in range(2):
            files.keep_first_rows(path, lambda row: row["step"] <= 2)
            assert path.read_bytes() == kept
    files.keep_first_rows(tmp_path / "missing", lambda row: True)
    assert not (tmp_path / "missing").exists()


def test_what_is_there_already_needs_no_space(tmp_path, full_disk):
    """A file with the same content stays; another content is an error, and leaves the old one and nothing beside it."""
    path = tmp_path / "config.json"
    files.write(path, "content")
    with full_disk(3):
        files.write(path, "content")
        with pytest.raises(OSError):
            files.write(path, "another content")
    assert path.read_text() == "content" and list(tmp_path.iterdir()) == [path]
    link = tmp_path / "link"
    link.symlink_to(path)
    files.write(link, "content")
    assert not link.is_symlink() and link.read_text() == "content"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_errors_of_libraries_get_their_number(tmp_path, full_disk, number):
    """C++ and Rust libraries tell a full disk in words, or not at all: then it is found out."""
    found = files.os_error(
        RuntimeError(f"DATA_LOSS: write() failed: {os.strerror(number)} (os error)"), pathlib.Path("a")
    )
    assert (found.errno, found.strerror, found.filename) == (number, os.strerror(number), "a")
    unknown = files.os_error(RuntimeError("the writer is broken\nmore"), pathlib.Path("a"))
    assert (unknown.errno, unknown.strerror) == (errno.EIO, "the writer is broken")
    (tmp_path / "part").write_bytes(b"part")
    assert files.os_error(RuntimeError("broken"), tmp_path / "part").errno == errno.EIO
    with full_disk(100):
        assert files.os_error(RuntimeError("broken"), tmp_path / "part").errno == errno.EFBIG


def test_the_last_object_is_found_from_the_end(tmp_path):
    """Whole lines alone count, and what is far from the end is not read."""
    path = tmp_path / "rows.jsonl"
    assert files.last_json_line(path) is None
    for text, last in (
        ("", None),
        ('{"step": 1}', None),
        ('{"step": 1}\n{"step": 2}\n', {"step": 2}),
        ('{"step": 1}\n{"step": 2}\n{"st', {"step": 2}),
        ("[1]\n", None),
        ("{\n", None),
        ('{"step": 1}\n' + "x" * 2**17, None),
        ('{"a": "' + "x" * 2**17 + '"}\n{"step": 3}\n', {"step": 3}),
    ):
        path.write_text(text)
        assert files.last_json_line(path) == last, text[:50]
