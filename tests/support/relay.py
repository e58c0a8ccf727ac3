"""A line to a store, which lets requests through or spoils those that a test names.

with relay(server.endpoint_url, seed=7) as line:
    line.spoil("PUT", "commit_then_reset")                       # the next PUT
    line.spoil("GET", "500", times=None, path=r"/raw/7\\.tar")    # every GET of one file
    line.spoil(".*", "reset", times=None, rate=0.1)              # one request in ten
    line.spoil("PUT", "hook", nth=3, hook=server.kill)           # just before the third PUT

Bytes are passed on as they are, since requests are signed; each connection carries one request.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from socketserver import BaseRequestHandler, ThreadingTCPServer
from urllib.parse import urlsplit

from tests.support.web import serving

HANG_S = 120.0
SLOW_STEP_S = 0.05
END = b"\r\n\r\n"
# Answers that never reach the store: status, S3's code, and what it says.
CANNED = {
    "200": (200, "", ""),
    "304": (304, "", ""),
    "500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "503": (503, "ServiceUnavailable", "Service is unable to handle the request."),
    "slowdown": (503, "SlowDown", "Please reduce your request rate."),
    "expired": (400, "ExpiredToken", "The provided token has expired."),
    "denied": (403, "AccessDenied", "Access Denied."),
    "no_bucket": (404, "NoSuchBucket", "The specified bucket does not exist"),
    "409": (409, "ConditionalRequestConflict", "A conflicting conditional operation is under way."),
}
# What else can happen to a request. Before the store sees it:
#   reset: the connection is reset   hang: silence, also before `100 Continue`   hook: a function is called first
# After the store has done it:
#   commit_then_reset: the answer is lost   slow: its body takes `seconds`   flip: one bit of its body is another
#   truncate, midreset, midhang: half of its body comes, then the end, a reset, or silence
KINDS = {*CANNED, "reset", "hang", "hook", "commit_then_reset", "slow", "flip", "truncate", "midreset", "midhang"}


@dataclass
class Rule:
    """Which requests are spoiled, and how. `times` None: without end."""

    method: str  # a regular expression, as `path` is
    kind: str
    times: int | None = 1
    path: str = ""
    rate: float = 1.0
    nth: int = 1  # of the requests that match, the first to be spoiled
    seconds: float = 0.5  # of a slow body
    hook: Callable[[], object] | None = None
    matched: int = 0

    def takes(self, method: str, path: str, chance: random.Random) -> bool:
        if self.times == 0 or not re.fullmatch(self.method, method) or not re.search(self.path, path):
            return False
        self.matched += 1
        if self.matched < self.nth or chance.random() >= self.rate:
            return False
        self.times = None if self.times is None else self.times - 1
        return True


@dataclass
class Relay:
    url: str
    chance: random.Random
    rules: list[Rule] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)  # the method and path of each request
    spoiled: list[str] = field(default_factory=list)  # the same and what happened to it, of those that were spoiled
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def spoil(
        self,
        method: str,
        kind: str,
        times: int | None = 1,
        *,
        path: str = "",
        rate: float = 1.0,
        nth: int = 1,
        seconds: float = 0.5,
        hook: Callable[[], object] | None = None,
    ) -> Rule:
        """Spoil requests from now on; the first rule that takes a request decides."""
        assert kind in KINDS, kind
        self.rules.append(Rule(method, kind, times, path, rate, nth, seconds, hook))
        return self.rules[-1]

    def heal(self) -> None:
        """Let everything through from now on."""
        self.rules.clear()

    def decide(self, method: str, path: str) -> Rule | None:
        with self._lock:
            self.asked.append(f"{method} {path}")
            for rule in list(self.rules):
                if rule.takes(method, path, self.chance):
                    self.spoiled.append(f"{method} {path} {rule.kind}")
                    return rule
        return None


class _Server(ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 128


@contextmanager
def relay(target_url: str, seed: int = 0) -> Iterator[Relay]:
    """A relay to the store at `target_url`, in threads of this process."""
    target = urlsplit(target_url)
    over = threading.Event()

    class Handler(BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError):  # either side may hang up
                _handle(self.request, found, (str(target.hostname), target.port or 80), over)

    server = _Server(("127.0.0.1", 0), Handler)
    found = Relay(f"http://127.0.0.1:{server.server_address[1]}", random.Random(seed))
    with serving(server):
        yield found
        over.set()


def _handle(client: socket.socket, relay: Relay, target: tuple[str, int], over: threading.Event) -> None:
    head, _, begun = _read_head(client).partition(END)
    if not head:
        return
    method, path = head.decode("latin-1").split(" ")[:2]
    rule = relay.decide(method, path)
    kind = rule.kind if rule else None
    if kind == "hang":
        over.wait(HANG_S)
    elif kind == "reset":
        _reset(client)
    elif kind in CANNED:
        _answer_canned(client, str(kind), method, head, begun)
    else:
        if rule is not None and rule.hook is not None:
            rule.hook()
        head = re.sub(rb"(?i)\r\nconnection:[^\r]*", b"", head) + b"\r\nConnection: close" + END
        with socket.create_connection(target) as store:
            store.sendall(head + begun)
            threading.Thread(target=_copy, args=(client, store), daemon=True).start()
            _answer(store, client, rule if kind != "hook" else None, over)


def _answer_canned(client: socket.socket, kind: str, method: str, head: bytes, begun: bytes) -> None:
    status, code, message = CANNED[kind]
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode() if code else b""
    if b"100-continue" not in head.lower():  # else the body is not sent before we say so
        _drain(client, _length(head) - len(begun))
    tag = b'ETag: "d41d8cd98f00b204e9800998ecf8427e"\r\n' if status == 200 else b""
    first = f"HTTP/1.1 {status} {code or 'OK'}\r\nContent-Type: application/xml\r\n".encode() + tag
    client.sendall(first + f"Content-Length: {len(body)}\r\nConnection: close".encode() + END)
    if method != "HEAD":
        client.sendall(body)
    client.shutdown(socket.SHUT_WR)
    client.settimeout(1.0)
    while client.recv(2**16):  # closing earlier would take the answer away from a client that still sends
        pass


def _answer(store: socket.socket, client: socket.socket, rule: Rule | None, over: threading.Event) -> None:
    if rule is None:
        return _copy(store, client)
    head, _, body = _read_answer(store, client).partition(END)
    half = len(body) // 2
    match rule.kind:
        case "commit_then_reset":
            _reset(client)
        case "flip":
            client.sendall(
                head + END + body[:half] + bytes([body[half] ^ 4]) + body[half + 1 :] if body else head + END
            )
        case "slow":
            client.sendall(head + END)
            step = int(len(body) * SLOW_STEP_S / rule.seconds) + 1
            for start in range(0, len(body), step):
                time.sleep(SLOW_STEP_S)
                client.sendall(body[start : start + step])
        case _:
            client.sendall(head + END + body[:half])
            if rule.kind == "midreset":
                time.sleep(0.05)  # else what was sent would be thrown away, too
                _reset(client)
            elif rule.kind == "midhang":
                over.wait(HANG_S)
    return None


def _read_answer(store: socket.socket, client: socket.socket) -> bytes:
    """The whole answer; `100 Continue` is passed on, since the client waits for it before it sends its body."""
    answer = b""
    while block := store.recv(2**16):
        answer += block
        while answer.startswith(b"HTTP/1.1 100") and END in answer:
            first, _, answer = answer.partition(END)
            client.sendall(first + END)
    return answer


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with suppress(OSError):
        client.shutdown(socket.SHUT_RD)  # wakes the thread that reads from it, without which nothing is closed
    client.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while block := source.recv(2**16):
            target.sendall(block)


def _read_head(client: socket.socket) -> bytes:
    data = b""
    while END not in data and (block := client.recv(2**16)):
        data += block
    return data


def _length(head: bytes) -> int:
    found = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
    return int(found[1]) if found else 0


def _drain(client: socket.socket, left: int) -> None:
    while left > 0 and (block := client.recv(2**16)):
        left -= len(block)
