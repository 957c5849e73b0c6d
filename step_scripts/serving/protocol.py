"""HTTP as the inference server speaks it: uvicorn's protocol on httptools, with what that lacks.

A client may offer to change to another protocol (`Upgrade: h2c`, as Java's client and `curl --http2` do), and gets its
answer in HTTP/1.1; and the head of a request is bounded in time and size.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_SECONDS = 20.0
_HEAD_BYTES = 64 << 10
# These frame the body.
_FRAMING = (b"content-length", b"transfer-encoding")


class RequestProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._in_head = False
        self._muted = False
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A connection on which no request comes is closed like one on which no further one comes."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the head that was waited for."""
        self._stop_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read, also on where httptools stops at an offer to change to another protocol."""
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._in_head or self.cycle is None or self.cycle.response_complete:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._refuse, b"408 Request Timeout")

    def on_message_begin(self) -> None:
        """A head begins."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head is complete."""
        if not self._muted:
            self._in_head, self._head_bytes = False, 0
            self._stop_timer()
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Not so where httptools only stops at an offer: the body follows."""
        if not self._muted and not self.parser.should_upgrade():
            super().on_message_complete()

    def _feed(self, data: bytes) -> None:
        while data:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                self._go_on_without_upgrade()
                data = data[offer.args[0] :]

    def _go_on_without_upgrade(self) -> None:
        """Another parser, which has read the same head without the offer. The request is under way already."""
        scope, headers = self.scope, self.headers
        framing = [name + b": " + value + b"\r\n" for name, value in headers if name in _FRAMING]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._muted = True
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
        finally:
            self._muted = self._in_head = False
            self.scope, self.headers = scope, headers
        if not framing or self._body_is_empty():
            super().on_message_complete()

    def _body_is_empty(self) -> bool:
        lengths = [value for name, value in self.scope["headers"] if name == b"content-length"]
        return bool(lengths) and lengths[0].strip().strip(b"0") == b""

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, status: bytes) -> None:
        self._stop_timer()
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 " + status + b"\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
            self.transport.close()
