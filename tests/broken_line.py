"""TCP relay in front of a server that breaks given connections in the middle of a transfer.

    line = Line(server_port)
    line.cut("GET .*000001.tar", after=5000, times=2)   # 5,000 bytes of the answer, then the connection is reset

A request is recognised by its first line; a PUT is cut after so many bytes of the request, any other of the answer.
"""

import contextlib
import re
import socket
import struct
import threading
from dataclasses import dataclass

RESET = struct.pack("ii", 1, 0)


@dataclass
class Cut:
    pattern: re.Pattern[str]
    after: int
    left: int


class Line:
    """Server that listens on `port` of 127.0.0.1 until it is closed."""

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._cuts: list[Cut] = []
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.requests: list[str] = []
        """First lines, without the protocol."""
        self.broken = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, pattern: str, *, after: int, times: int) -> None:
        self._cuts.append(Cut(re.compile(pattern), after, times))

    def close(self) -> None:
        """Refuse new connections and breaks all that are open."""
        self._end(self._listener)
        self._end(*tuple(self._open))

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._server_port))
                self._open |= {client, server}
                Relay(self, client, server).start()

    def _cut_of(self, request: str) -> Cut | None:
        """The cut that this request uses up, if any."""
        with self._lock:
            self.requests.append(request)
            for cut in self._cuts:
                if cut.left and cut.pattern.search(request):
                    cut.left -= 1
                    return cut
        return None

    def _end(self, *sockets: socket.socket) -> None:
        for one in sockets:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                one.shutdown(socket.SHUT_RDWR)
            one.close()
            self._open.discard(one)


class Relay:
    """One connection, both ways."""

    def __init__(self, line: Line, client: socket.socket, server: socket.socket) -> None:
        self._line, self._client, self._server = line, client, server
        self._cut: Cut | None = None
        self._is_put = False
        self._passed = 0  # bytes of the request or answer that is to be cut

    def start(self) -> None:
        threading.Thread(target=self._pass, args=(self._client, self._server, True), daemon=True).start()
        threading.Thread(target=self._pass, args=(self._server, self._client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if up and (found := re.match(rb"([A-Z]+ \S+) HTTP/1\.1\r\n", data)):
                    request = found[1].decode()
                    self._cut, self._is_put, self._passed = self._line._cut_of(request), request.startswith("PUT"), 0
                if self._cut and self._is_put == up:
                    self._passed += len(data)
                    if self._passed > self._cut.after:
                        self._line.broken += 1
                        break
                target.sendall(data)
        self._line._end(source, target)
