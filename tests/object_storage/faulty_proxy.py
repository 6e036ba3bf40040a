"""A proxy on loopback in front of a store, for tests: it fails as stores and networks do, at every Nth request.

One that is `unavailable` is refused with 503. A `slow` one is answered late. Of requests that bring content, one that
is `torn` is cut in the middle: the store gets half of the content, and both sides lose the connection. A `silent` one
reaches the store, but its answer is lost. A `denied` one would write, and is refused with 403. Run it as a program:
`python faulty_proxy.py PORT STORE_PORT [--unavailable=N] [--slow=N] [--torn=N] [--silent=N] [--denied=N]`. GET of
`/faults` tells how many of each kind there were, as JSON.
"""

import argparse
import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("unavailable", "slow", "torn", "silent", "denied")
SLOW = 1.0  # seconds


class Handler(BaseHTTPRequestHandler):
    """Passes requests on, or fails."""

    protocol_version = "HTTP/1.1"
    store = 0
    every = dict.fromkeys(KINDS, 0)  # 0: never
    requests = dict.fromkeys(KINDS, 0)  # which might fail so
    faults = dict.fromkeys(KINDS, 0)
    lock = threading.Lock()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # whoever was killed does not wait for its answer
            self.close_connection = True

    def _pass(self) -> None:
        if self.path == "/faults":
            self._answer(200, json.dumps(self.faults).encode())
            return
        content = self._content()
        fails = {kind: self._fails(kind) for kind in ("unavailable", "slow")}
        fails |= {kind: bool(content) and self._fails(kind) for kind in ("torn", "silent")}
        fails["denied"] = self.command not in ("GET", "HEAD") and self._fails("denied")
        if fails["slow"]:
            time.sleep(SLOW)
        if fails["unavailable"]:
            self._answer(503, b"")
        elif fails["denied"]:
            self._answer(403, b"")
        elif fails["torn"]:
            self._tear(content)
        else:
            store = http.client.HTTPConnection("127.0.0.1", self.store, timeout=60)
            store.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection", "expect"):
                    store.putheader(name, value)
            if content or self.command in ("POST", "PUT"):
                store.putheader("Content-Length", str(len(content)))
            store.endheaders(content)
            answer = store.getresponse()
            if fails["silent"]:
                self._hang_up()
            else:
                self._answer(answer.status, answer.read(), list(answer.headers.items()))
            store.close()

    def _fails(self, kind: str) -> bool:
        with self.lock:
            self.requests[kind] += 1
            fails = bool(self.every[kind]) and self.requests[kind] % self.every[kind] == 0
            self.faults[kind] += fails
        return fails

    def _content(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _tear(self, content: bytes) -> None:
        """Sends the store half of the content, as of a sender that is cut off."""
        lines = [f"{self.command} {self.path} HTTP/1.1", f"Content-Length: {len(content)}", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in self.headers.items() if _is_about_content(name)]
        with socket.create_connection(("127.0.0.1", self.store)) as store:
            store.sendall("\r\n".join([*lines, "", ""]).encode() + content[: len(content) // 2])
        self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: bytes, headers: list[tuple[str, str]] | None = None) -> None:
        self.send_response_only(status)
        left_out = {"content-length", "transfer-encoding", "connection"}
        is_head = self.command == "HEAD"
        for name, value in headers or []:
            if name.lower() not in left_out or (is_head and name.lower() == "content-length"):
                self.send_header(name, value)
        if not is_head and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _pass

    def log_message(self, format: str, *args: object) -> None:
        pass


def _is_about_content(name: str) -> bool:
    return name.lower() in ("host", "content-type", "content-encoding", "authorization") or name.lower().startswith(
        "x-"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("store", type=int)
    for kind in KINDS:
        parser.add_argument(f"--{kind}", type=int, default=0)
    args = parser.parse_args()
    Handler.store, Handler.every = args.store, {kind: getattr(args, kind) for kind in KINDS}
    server = ThreadingHTTPServer(("127.0.0.1", args.port), Handler)
    server.daemon_threads = True
    server.serve_forever()
