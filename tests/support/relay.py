"""A relay in front of a store, which lets requests through or spoils those that a test names.

Bytes are passed on as they are, since requests are signed; each connection carries one request.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socketserver import BaseRequestHandler, ThreadingTCPServer
from urllib.parse import urlsplit

BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@dataclass
class Fault:
    """What happens to the next `times` requests of a method.

    `busy`: 503. `hang`: no answer. `cut`: the answer's body breaks off in the middle. `lose`: the request is carried
    out and its answer never comes.
    """

    method: str
    kind: str
    times: int


@dataclass
class Relay:
    url: str
    asked: list[str] = field(default_factory=list)  # the method and path of each request
    faults: list[Fault] = field(default_factory=list)

    def spoil(self, method: str, kind: str, times: int = 1) -> None:
        self.faults.append(Fault(method, kind, times))

    def fault_for(self, method: str) -> str | None:
        for fault in self.faults:
            if fault.method == method and fault.times:
                fault.times -= 1
                return fault.kind
        return None


@contextmanager
def relay(target_url: str) -> Iterator[Relay]:
    """A relay to the store at `target_url`."""
    target = urlsplit(target_url)
    over = threading.Event()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # either side may hang up
                _handle(self.request, found, (str(target.hostname), target.port or 80), over)

    with ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found = Relay(f"http://127.0.0.1:{server.server_address[1]}")
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield found
        over.set()
        server.shutdown()


def _handle(client: socket.socket, relay: Relay, target: tuple[str, int], over: threading.Event) -> None:
    head, _, begun = _read_head(client).partition(b"\r\n\r\n")
    if not head:
        return
    method, path = head.decode("latin-1").split(" ")[:2]
    relay.asked.append(f"{method} {path}")
    kind = relay.fault_for(method)
    if kind == "hang":
        over.wait(60)
    elif kind == "busy":
        client.sendall(BUSY)
    else:
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close\r\n\r\n"
        with socket.create_connection(target) as store:
            store.sendall(head + begun)
            threading.Thread(target=_copy, args=(client, store), daemon=True).start()
            _answer(store, client, kind)


def _answer(store: socket.socket, client: socket.socket, kind: str | None) -> None:
    if kind is None:
        return _copy(store, client)
    answer = b""
    while block := store.recv(2**16):
        if block.startswith(b"HTTP/1.1 100"):  # the client waits for it before it sends its body
            client.sendall(block)
        else:
            answer += block
    if kind == "cut":
        head, end, body = answer.partition(b"\r\n\r\n")
        client.sendall(head + end + body[: len(body) // 2])
    return None


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(2**16):
            target.sendall(block)


def _read_head(client: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and (block := client.recv(2**16)):
        data += block
    return data
