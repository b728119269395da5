"""Whole messages over a socket, sent and received within a time limit."""

import pickle
import socket
import struct
import time
from multiprocessing.connection import wait
from typing import Any

SIZE = struct.Struct("!Q")


class Channel:
    """One end of a connection between a process and the child that it started itself.

    The socket blocks: one thread may be held up sending while another waits for an answer.
    """

    def __init__(self, end: socket.socket) -> None:
        self.socket = end

    def send(self, message: Any) -> None:
        data = pickle.dumps(message)
        self.socket.sendall(SIZE.pack(len(data)) + data)

    def receive(self, timeout_s: float | None = None) -> Any:
        """Waits for one message.

        Raises:
            TimeoutError: if it is not there in time.
            EOFError: if the other end is gone.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        (size,) = SIZE.unpack(self._read(SIZE.size, deadline))
        return pickle.loads(self._read(size, deadline))

    def _read(self, count: int, deadline: float | None) -> bytes:
        data = bytearray()
        while len(data) < count:
            left_s = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            if not wait([self.socket], left_s):
                raise TimeoutError
            try:
                received = self.socket.recv(min(count - len(data), 1 << 20))
            except ConnectionError:
                raise EOFError from None
            if not received:
                raise EOFError
            data += received
        return bytes(data)

    def close(self) -> None:
        self.socket.close()
