"""The libraries that reach object storage (extra `cloud`), who we are there, and their errors in one line."""

import contextlib
import functools
import logging
import os
import re
import socket
from collections.abc import Iterator
from typing import Any, Literal, assert_never

from armd_jax import files
from armd_jax.errors import UserError, shown

Scheme = Literal["gs", "s3"]

_GOOGLE = ("storage.googleapis.com", 443)
_SECONDS = 5.0  # for a connection
_GOOGLE_FILE = "GOOGLE_APPLICATION_CREDENTIALS"
_NEED_EXTRA = {"gs": "gcsfs", "s3": "s3fs"}
_LOG_IN = {
    "gs": f"log in with `gcloud auth application-default login`, or name a key file in {_GOOGLE_FILE}",
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run `aws configure`",
}


def file_system(scheme: Scheme, address: str, writes: bool) -> Any:
    """The file system of fsspec for an address.

    writes: whether something is to be written there, which nobody may without credentials; to read, a public bucket of
        Google needs none.
    Raises UserError if the library for it is not installed, or if there are no credentials.
    """
    try:
        # Its class for buckets with real folders asks each bucket of what kind it is, in lines of warnings.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        import fsspec

        protocol = {"gs": "gcs", "s3": "s3"}[scheme]
        fsspec.get_filesystem_class(protocol)
        # Others write there too: an answer from a cache would be wrong.
        fsspec.config.conf.setdefault(protocol, {})["use_listings_cache"] = False
    except ImportError as error:
        need = _NEED_EXTRA[scheme]
        raise UserError(f"{address}: needs {need}, of the extra cloud: pip install -e '.[cloud]'") from error
    match scheme:
        case "s3":
            return fsspec.filesystem(protocol)
        case "gs":
            # It prints the traceback of what it gives up, which is told in one line.
            logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
            return fsspec.filesystem(protocol, token=_google_token(address, writes))
        case _:
            assert_never(scheme)


def _google_token(address: str, writes: bool) -> str:
    """How gcsfs is to log in. Left to itself, it looks for a metadata server twice, and then tries without a word."""
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return "anon"
    missing = _missing_google_credentials()
    if missing is None:
        return "google_default"
    if writes or os.environ.get(_GOOGLE_FILE):
        raise _no_credentials("gs", address, missing)
    try:
        socket.create_connection(_GOOGLE, _SECONDS).close()
    except OSError as error:
        raise UserError(
            f"{address}: no credentials for it, and {_GOOGLE[0]} cannot be reached ({error.strerror or error})"
        ) from error
    return "anon"


@functools.cache
def _missing_google_credentials() -> str | None:
    """Why there are no credentials for Google; None if there are. Without them, takes up to some ten seconds."""
    import google.auth
    from google.auth.exceptions import GoogleAuthError

    logging.getLogger("google.auth").setLevel(logging.ERROR)
    try:
        google.auth.default()
    except GoogleAuthError as error:
        return str(error)
    return None


def _no_credentials(scheme: Scheme, address: str, detail: str) -> UserError:
    return UserError(f"{address}: no credentials for it; {_LOG_IN[scheme]} ({_first_line(detail)})")


@contextlib.contextmanager
def told(scheme: Scheme, address: str) -> Iterator[None]:
    """Raises UserError, in one line, for whatever a library raises about the bucket.

    A full disk on this machine stays the OSError that it is.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # each library has exceptions of its own for the same few things
        if isinstance(error, OSError) and error.errno in files.FULL:
            raise
        raise _in_one_line(scheme, address, error) from error


def _in_one_line(scheme: Scheme, address: str, error: Exception) -> UserError:
    detail = _first_line(str(error) or type(error).__name__)
    text = f"{type(error).__name__} {error}".lower()
    if "credential" in text or "anonymous caller" in text:
        return _no_credentials(scheme, address, str(error))
    if isinstance(error, PermissionError) or re.search(r"forbidden|access denied|\b40[13]\b", text):
        reason = "access is denied"
    elif isinstance(error, FileNotFoundError) or re.search(r"nosuchbucket|\b404\b", text):
        reason = "there is no such bucket or object"
    else:
        reason, detail = "cannot be reached", f"{type(error).__name__}: {detail}"
    return UserError(f"{address}: {reason} ({detail})")


def _first_line(text: str) -> str:
    return shown(text.split("\n")[0])
