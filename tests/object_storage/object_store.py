"""Object storage on loopback, for tests: the emulator of GCS, with what it lacks of the real one.

`gcp-storage-emulator` ignores preconditions and leaves out the headers with an object's generation, both of which
TensorStore and leases need, and would keep an upload whose end is missing. It forgets an upload in parts that has
ended, so that whoever lost the answer and asks again is told that there is none. Faults are those of `faulty_proxy.py`.
Run it as a program: `python object_store.py PORT`.
"""

import contextlib
import io
import json
import re
import sys
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound

BUCKET = "bucket"
_OBJECT = re.compile(r"(?:/[a-z]+)?(?:/storage/v1)?/b/([^/]+)/o/?(.*)")


class Handler(server.RequestHandler):
    """A request handler of the emulator that knows generations and preconditions."""

    _generation = ""
    _ended: ClassVar[dict[str, bytes]] = {}  # uploads in parts, and what the store said of the object

    def _answer(self, method: str) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        found = _OBJECT.fullmatch(address.path)
        bucket, name = (found[1], unquote(found[2])) if found else (None, "")
        if method in ("POST", "PUT") and "content-length" in self.headers:
            body = self.rfile.read(int(self.headers["content-length"]))
            if len(body) < int(self.headers["content-length"]):
                self.close_connection = True
                return
            self.rfile = io.BytesIO(body)
            in_body = re.search(rb'"name": ?"([^"]+)"', body[:1000])
            name = query.get("name", [in_body[1].decode() if in_body else name])[0]
        upload = query.get("upload_id", [""])[0]
        if upload in self._ended:
            self._generation = ""
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(self._ended[upload])))
            self.end_headers()
            self.wfile.write(self._ended[upload])
            return
        self._generation = ""
        now = "0"
        if bucket and name:
            with contextlib.suppress(NotFound):
                now = self.storage.get_file_obj(bucket, name)["generation"]
            if query.get("ifGenerationMatch", [now])[0] != now:
                self._refuse(412)
                return
            if method == "GET" and query.get("ifGenerationNotMatch", [""])[0] == now and now != "0":
                self._refuse(304)
                return
            self._generation = now if method == "GET" and now != "0" else ""
        server.Router(self).handle(method)
        if bucket and upload and upload not in self.storage.resumable:
            with contextlib.suppress(NotFound):
                self._ended[upload] = json.dumps(self.storage.get_file_obj(bucket, name)).encode()

    def _refuse(self, status: int) -> None:
        if not isinstance(self.rfile, io.BytesIO):  # what is left unread would be cut off with an error
            self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self) -> None:
        if self._generation:
            self.send_header("x-goog-generation", self._generation)
        super().end_headers()

    def do_GET(self) -> None:
        self._answer("GET")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def do_DELETE(self) -> None:
        self._answer("DELETE")


if __name__ == "__main__":
    server.RequestHandler = Handler
    server.create_server("127.0.0.1", int(sys.argv[1]), True, BUCKET).run()
