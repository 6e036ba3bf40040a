"""The embedded corpus: English prose that every Python installation carries, so that nothing needs a download.

It is made of the help topics of `pydoc` and the docstrings of the standard library. Modules are parsed, never imported.
"""

import ast
import functools
import hashlib
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from armd_jax.data.reading import Source
from armd_jax.errors import UserError

# Left out: tests, what other programs install, what differs from machine to machine, and
# folders whose docstrings are few or not prose.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip"}
LEFT_OUT |= {"encodings", "pydoc_data", "lib-dynload", "__pycache__"}
MIN_CHARACTERS = 200  # of a document
LONG_PARAGRAPH = 200  # characters, with white space counted as one each


def open_source() -> Source:
    """The embedded corpus. Raises UserError if this Python carries no documentation."""
    documents = embedded_documents()
    version = platform.python_version()
    digest = hashlib.sha256(version.encode())
    for text in documents:
        digest.update(hashlib.sha256(text.encode()).digest())
    description = f"documentation embedded in Python {version}"
    return Source(description, digest.hexdigest(), "embedded corpus", {"train": lambda: documents})


@functools.cache
def embedded_documents() -> tuple[str, ...]:
    """One document per topic, then one per module; the same on every machine with the same Python.

    Docstrings and documents that occur twice are kept once. So are long paragraphs, because topics quote one another,
    and no held-out passage may also be trained on. Raises UserError if this Python carries no documentation.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = _without_repeats([*_topics(library), *_module_docstrings(library)])
    kept = tuple(dict.fromkeys(text for text in documents if len(text) >= MIN_CHARACTERS))
    if not kept:
        raise UserError(f"this Python carries no documentation in {library}; give data.path")
    return kept


def _without_repeats(documents: list[str]) -> Iterator[str]:
    """The documents, with every long paragraph kept only where it occurs first, however others indent or wrap it."""
    seen: set[str] = set()
    for text in documents:
        kept = []
        for paragraph in text.split("\n\n"):
            words = " ".join(paragraph.split())
            if len(words) >= LONG_PARAGRAPH and words in seen:
                continue
            seen.add(words)
            kept.append(paragraph)
        yield "\n\n".join(kept).strip() + "\n"


def _topics(library: Path) -> Iterator[str]:
    tree = _parse(library / "pydoc_data" / "topics.py")
    for node in tree.body if tree else ():
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for _, text in sorted(ast.literal_eval(node.value).items()):
                yield text


def _module_docstrings(library: Path) -> Iterator[str]:
    seen: set[str] = set()
    files = {file.relative_to(library).as_posix(): file for file in library.rglob("*.py")}
    for name, file in sorted(files.items()):
        parts = name.split("/")
        if LEFT_OUT.intersection(parts) or any(part.startswith(("config-", "_sysconfigdata")) for part in parts):
            continue
        tree = _parse(file)
        found = []
        for text in _docstrings(tree) if tree else ():
            if text not in seen:
                seen.add(text)
                found.append(text)
        if found:
            yield "\n\n".join(found)


def _parse(file: Path) -> ast.Module | None:
    try:
        return ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):  # a Python without its sources, or a template that is not Python
        return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    """The docstrings of `node` and of everything in it, in source order. Expressions hold none and are not walked."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=True)
        if text and text.strip():
            yield text.strip()
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()) if not isinstance(node, ast.expr) else ():
            yield from _docstrings(child)
