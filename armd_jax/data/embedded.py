"""The embedded corpus: English prose that every Python installation carries, so that nothing needs a download.

It is made of the help topics of `pydoc` and the docstrings of the standard library. Sources are parsed, never imported.
"""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from armd_jax.errors import UserError

# Left out: tests, what other programs install, what differs from machine to machine, and
# folders whose docstrings are few or not prose.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "turtledemo", "ensurepip"}
LEFT_OUT |= {"encodings", "pydoc_data", "lib-dynload", "__pycache__"}
MIN_CHARACTERS = 200  # of a document
LONG_PARAGRAPH = 200  # characters, white space not counted twice


@functools.cache
def embedded_documents() -> tuple[str, ...]:
    """The documents: one a topic, then one a module, the same on every machine with the same Python.

    Docstrings and documents that occur twice are kept once, and so are long paragraphs, which topics quote from one
    another: nothing held out was trained on. Raises UserError where this Python carries no documentation.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = _without_repeats([*_topics(library), *_module_docstrings(library)])
    kept = tuple(dict.fromkeys(text for text in documents if len(text) >= MIN_CHARACTERS))
    if not kept:
        raise UserError(f"this Python carries no documentation in {library}; give data.path")
    return kept


def _without_repeats(documents: list[str]) -> Iterator[str]:
    """The documents, every long paragraph only where it stands first, however it is indented or wrapped elsewhere."""
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
    except (OSError, SyntaxError, ValueError):  # a Python without its sources, or a template that is no Python
        return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings at and below `node`, in source order. Only statements can hold one, so only they are walked."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=True)
        if text and text.strip():
            yield text.strip()
    for field in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, field, ()) if not isinstance(node, ast.expr) else ():
            yield from _docstrings(child)
