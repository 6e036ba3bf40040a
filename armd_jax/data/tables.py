"""Tables of columns as sources of documents: Parquet, and Arrow as Hugging Face `datasets` saves it. One row at a time.

Of a file, one batch of rows of one column is in memory.
"""

import io
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from armd_jax.data.reading import Position, TextOrError, decode_utf8
from armd_jax.errors import UserError

_ROWS = 1024  # read at a time


def read_parquet(stream: io.BufferedIOBase, position: Position, text_field: str) -> Iterator[TextOrError]:
    """The rows of a Parquet file. Raises UserError if it is damaged or has no such column of text."""
    pyarrow = _library(position)
    import pyarrow.parquet as parquet

    try:
        file = parquet.ParquetFile(stream)
        _check(pyarrow, file.schema_arrow, position, text_field)
        yield from _rows(pyarrow, file.iter_batches(_ROWS, columns=[text_field]), position, text_field)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(position, "Parquet", error) from error


def read_arrow(stream: io.BufferedIOBase, position: Position, text_field: str) -> Iterator[TextOrError]:
    """The rows of an Arrow stream or file. Raises UserError if it is damaged or has no such column of text."""
    pyarrow = _library(position)
    is_file = stream.read(6) == b"ARROW1"  # how files begin, and streams do not
    stream.seek(0)
    try:
        if is_file:
            file = pyarrow.ipc.open_file(stream)
            schema, batches = file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            schema, batches = (reader := pyarrow.ipc.open_stream(stream)).schema, iter(reader)
        _check(pyarrow, schema, position, text_field)
        yield from _rows(pyarrow, batches, position, text_field)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(position, "Arrow", error) from error


def _rows(pyarrow: Any, batches: Iterator[Any], position: Position, text_field: str) -> Iterator[TextOrError]:
    position.unit, number = "row", 0
    for batch in batches:
        # As bytes: pyarrow would raise at the first row that is no UTF-8, for all of the batch.
        column = batch.column(batch.schema.get_field_index(text_field)).cast(pyarrow.large_binary())
        for scalar in column:
            number += 1
            position.line = number
            content = scalar.as_py()
            if content is None:
                yield UserError(f"{position}: no text in field {text_field!r} (data.text_field)")
            else:
                yield decode_utf8(content, str(position), one_line=True)


def _check(pyarrow: Any, schema: Any, position: Position, text_field: str) -> None:
    names = [name for name in schema.names if name == text_field]
    if len(names) != 1:
        raise UserError(f"{position}: has no column {text_field!r} (data.text_field); it has {', '.join(schema.names)}")
    kind = schema.field(text_field).type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise UserError(f"{position}: its column {text_field!r} (data.text_field) is {kind}, not text")


def _damaged(position: Position, what: str, error: Exception) -> UserError:
    place = f"{position.file}, after row {position.line}" if position.line else str(position.file)
    lines = str(error).splitlines() or [type(error).__name__]
    return UserError(f"{place}: damaged or truncated {what} file: {lines[0]}")


def _library(position: Position) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.ipc
    except ImportError as error:
        raise UserError(f'{position}: to read it, install the extra data: pip install "armd-jax[data]"') from error
    return pyarrow
