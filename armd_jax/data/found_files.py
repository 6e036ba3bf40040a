"""Which files a path names: one file, a folder with everything below it, or those that a glob matches.

No file disappears without a word. What is left out is listed with the reason, and a link that leads nowhere is an
error, because it usually stands for a disk that is not mounted. Links are followed. Every folder and file is read once,
so that links in a circle end, and what two paths lead to is not trained on twice.
"""

import collections
import dataclasses
import fnmatch
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from armd_jax.errors import UserError

_ANY_DEPTH = "**"  # the part of a glob that stands for any number of folders


@dataclasses.dataclass(frozen=True)
class FoundFiles:
    """The files that a path names. Names are relative to the folder that all of them are in.

    Attributes:
      files: by name, sorted.
      left_out: the reason, by the name of what was passed over.
      by_name: whether the path itself spells names or endings, so that whoever wrote it has chosen among the files.
    """

    files: dict[str, Path]
    left_out: dict[str, str]
    by_name: bool


@dataclasses.dataclass(frozen=True)
class _Walk:
    """Everything below a folder, by name."""

    files: dict[str, Path] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    dangling: dict[str, Path] = dataclasses.field(default_factory=dict)  # links that lead nowhere


def find(path: str) -> FoundFiles:
    """The files that `path` names. They may be of any kind.

    Raises UserError if there is no such file or folder, if a link leads nowhere, or if a folder cannot be read.
    """
    root = Path(path)
    if root.is_file():
        return FoundFiles({root.name: root}, {}, by_name=True)
    if root.is_dir():
        walk = _walk(root)
        for link in walk.dangling.values():
            raise _leads_nowhere(link)
        return _each_once(walk.files, walk.left_out, root, by_name=False)
    if root.is_symlink():
        raise _leads_nowhere(root)
    if glob.has_magic(path):
        return _match(path)
    raise UserError(f"data.path={path!r}: there is no such file or folder")


def _leads_nowhere(link: Path) -> UserError:
    return UserError(
        f"{link}: this link leads nowhere ({os.readlink(link)!r} is not there; is a disk not mounted?);"
        " mend it, remove it, or give a glob that leaves it out"
    )


def _each_once(files: dict[str, Path], left_out: dict[str, str], base: Path, by_name: bool) -> FoundFiles:
    """What was found, sorted, without links to files that are read under their own name or by another link."""
    real = {name: os.path.realpath(file) for name, file in files.items()}
    real_base = os.path.realpath(base)
    read: set[str] = set()
    kept = {}
    # Own names come first: no link lies between the base and the file.
    for name in sorted(files, key=lambda name: (real[name] != os.path.join(real_base, name), name)):
        if real[name] in read:
            left_out = left_out | {name: "leads to a file that is read already"}
        else:
            kept[name] = files[name]
            read.add(real[name])
    return FoundFiles(dict(sorted(kept.items())), dict(sorted(left_out.items())), by_name)


# Folders


def _walk(root: Path, hidden: bool = False) -> _Walk:
    """Everything below `root`. hidden: whether files and folders whose names start with a dot are taken too."""
    walk, real_root = _Walk(), Path(os.path.realpath(root))
    read: set[str] = set()  # the real paths of the folders that were read
    # Links come after all real folders, so that a folder that a link leads to as well is known by its own name.
    tops = collections.deque([root])
    while tops:
        top = tops.popleft()
        if reason := _why_not_entered(top, read, real_root):
            walk.left_out[_name(top, root)] = reason
            continue
        for folder, folders, names in os.walk(top, onerror=_cannot_be_read):
            read.add(os.path.realpath(folder))
            entered = []
            for child in sorted(folders):
                path = Path(folder, child)
                if child.startswith(".") and not hidden:
                    walk.left_out[_name(path, root)] = "hidden: its name starts with a dot"
                elif path.is_symlink():
                    tops.append(path)
                elif reason := _why_not_entered(path, read, real_root):
                    walk.left_out[_name(path, root)] = reason
                else:
                    entered.append(child)
            folders[:] = entered  # these are the ones that os.walk goes on to
            for child in names:
                _add(walk, Path(folder, child), _name(Path(folder, child), root), hidden)
    return walk


def _cannot_be_read(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error


def _why_not_entered(folder: Path, read: set[str], real_root: Path) -> str:
    """Why a folder is left out; empty if it is not."""
    real = os.path.realpath(folder)
    if real in read:
        return "leads to a folder that is read already"
    if Path(real) in real_root.parents:
        return "leads back to a folder that data.path itself is in"
    return ""


def _add(walk: _Walk, path: Path, name: str, hidden: bool) -> None:
    if path.name.startswith(".") and not hidden:
        walk.left_out[name] = "hidden: its name starts with a dot"
    elif path.is_file():
        walk.files[name] = path
    elif path.is_symlink() and not path.exists():
        walk.dangling[name] = path
    else:
        walk.left_out[name] = "neither a file nor a folder"


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


# Globs


def _match(path: str) -> FoundFiles:
    parts = [part for index, part in enumerate(path.split("/")) if part or not index]
    start = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    base = Path("/".join(parts[:start]) or ("/" if path.startswith("/") else "."))
    pattern = parts[start:]
    by_name = bool(re.search("[A-Za-z]", re.sub(r"\[[^]]*\]", "", pattern[-1])))
    if _ANY_DEPTH in pattern:
        # Python's own glob goes round a circle of links up to forty times, and with two circles it never ends.
        walk = _walk(base, any(part.startswith(".") for part in pattern)) if base.is_dir() else _Walk()
        files = {name: file for name, file in walk.files.items() if _fits(name.split("/"), pattern)}
        left_out = {name: why for name, why in walk.left_out.items() if not _is_hidden(name)}
        for name, link in walk.dangling.items():
            # A name without an ending is likely to be that of a folder, whose files the glob may ask for.
            if _fits(name.split("/"), pattern) or not link.suffix:
                raise _leads_nowhere(link)
    else:
        files, left_out = _match_level_by_level(parts, start, base)
    return _each_once(files, left_out, base, by_name)


def _match_level_by_level(parts: list[str], start: int, base: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """The files and the left-out things that a glob without `**` matches."""
    files: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for end in range(start + 1, len(parts) + 1):
        last = end == len(parts)
        for match in map(Path, glob.glob("/".join(parts[:end]))):
            if match.is_symlink() and not match.exists():
                if last or not match.suffix:
                    raise _leads_nowhere(match)
            elif last and match.is_file():
                files[_name(match, base)] = match
            elif last:
                what = "a folder, and the glob ends at its name; /** after it takes what it holds"
                left_out[_name(match, base)] = what if match.is_dir() else "neither a file nor a folder"
    return files, left_out


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a name fit those of a glob. As in a shell, a leading dot has to be spelled out."""
    if not pattern:
        return not parts
    if pattern[0] == _ANY_DEPTH:
        deeper = bool(parts) and not parts[0].startswith(".") and _fits(parts[1:], pattern)
        return deeper or _fits(parts, pattern[1:])
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
