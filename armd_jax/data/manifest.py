"""The manifest of a prepared folder, and whether its shards are what it says.

A prepared folder may come from anywhere: every field is checked before it is used, a shard's name cannot lead out of
the folder, and bytes that are not those that were written are an error that names the file.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from armd_jax.data.reading import LeftOut, hash_file
from armd_jax.errors import UserError, shown

FORMAT = 2
MANIFEST_FILE = "manifest.json"
SHARD_NAME = re.compile(r"(train|valid|test)-\d{5,}\.array_record")  # so that no name leads out of the folder


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one split holds."""

    documents: int
    bytes: int  # UTF-8 of the original text
    words: int  # and line ends
    tokens: int  # end-of-text included, padding not
    rows: int  # the last, partly filled one included


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`, every field of it there and sound. Raises UserError where it is not."""
    file = folder / MANIFEST_FILE
    if not file.is_file():
        raise UserError(f"{folder}: no prepared data there ({MANIFEST_FILE} is missing)")
    try:
        manifest = json.loads(file.read_bytes())
        known = manifest["format"] == FORMAT
        fault = _fault(manifest) if known else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else "damaged manifest"
        raise UserError(f"{file}: {what}; delete the folder and prepare the data again") from error
    if not known:
        raise UserError(
            f"{file}: format {shown(manifest['format'])} is not the {FORMAT} of this version; prepare again"
        )
    if fault:
        raise UserError(f"{file}: {fault}; delete the folder and prepare the data again")
    return manifest


def _fault(manifest: dict[str, Any]) -> str:
    """What packing would never have written, or nothing; raises a plain error where fields or types are missing."""
    length, shard_rows, dtype = (manifest[name] for name in ("row_length", "shard_rows", "dtype"))
    tokenizer, source, left_out = (manifest[name] for name in ("tokenizer", "source", "left_out"))
    numbers = [length - 1, shard_rows - 1, tokenizer["vocab_size"], tokenizer["end_of_text"]]
    texts = [manifest["split_rule"], source["description"], source["fingerprint"]]
    texts += [tokenizer[name] for name in ("request", "kind", "hash")]
    if dtype not in ("<u2", "<u4"):
        return f"dtype {shown(dtype)} is none of row data"
    for counts in left_out.values():
        numbers += [LeftOut(**counts).empty, LeftOut(**counts).damaged]
    for split in manifest["splits"].values():
        shards = split["shards"]
        numbers += [split[field.name] for field in dataclasses.fields(Counts)]
        numbers += [shard[name] for shard in shards for name in ("rows", "bytes")]
        texts += [shard["sha256"] for shard in shards]
        for shard in shards:
            if not SHARD_NAME.fullmatch(shard["file"]):
                return f"{shown(shard['file'])} is not the name of a shard"
        rows = [shard["rows"] for shard in shards]
        full = len(rows) <= 1 or set(rows[:-1]) == {shard_rows}
        if not full or sum(rows) != split["rows"] or split["rows"] != -(-split["tokens"] // length):
            return "its counts contradict one another"
    if not all(type(number) is int and number >= 0 for number in numbers):
        return "its counts are not whole numbers"
    named = all(isinstance(text, str) for text in texts) and type(tokenizer["lossless"]) is bool
    return "" if named else "its names are not text"


def check_shard(folder: Path, shard: dict[str, Any], hashed: bool) -> None:
    """Raises UserError where a shard's place, size, number of rows or, if `hashed`, content is not the manifest's.

    The library itself opens damaged files without a word.
    """
    file = folder / shard["file"]
    if not file.is_file():
        raise UserError(f"{file}: this shard is missing; delete the folder and prepare the data again")
    if file.resolve().parent != folder.resolve():
        raise UserError(f"{file}: this shard is a link out of its folder; copy the file itself there")
    if file.stat().st_size != shard["bytes"] or (hashed and hash_file(file) != shard["sha256"]):
        raise damaged(file)
    try:
        rows = open_reader(file).num_records()
    except RuntimeError as error:
        raise damaged(file) from error
    if rows != shard["rows"]:
        raise damaged(file)


def damaged(file: Path) -> UserError:
    """The error for a shard that cannot be used."""
    return UserError(f"{file}: this shard is damaged or was changed; delete the folder and prepare the data again")


def open_reader(file: Path) -> ArrayRecordReader:
    """A reader for single records: no more is read ahead than a record needs."""
    return ArrayRecordReader(str(file), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15)
