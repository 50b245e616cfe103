"""Hostile peers over raw sockets: each attack must end in bounded time and cost no legitimate client its service."""

import select
import socket
import struct
import time
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings

# A silent connection must be closed by then; the services' own limits are shorter.
CLOSED_WITHIN_S = 30
HALF_OPEN_STREAMS = 2000
IDLE_CONNECTIONS = 300
MEMORY_GROWTH_MAX = 256 << 20


def connect(node):
    host, port = node.address.rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=10)


def closed_by_peer(sock, patience_s, while_waiting=lambda: None):
    """Reads and drops until the peer closes; raises after `patience_s`."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        while_waiting()
        if not select.select([sock], [], [], 0.2)[0]:
            continue
        try:
            if not sock.recv(65536):
                return
        except ConnectionError:
            return
    raise AssertionError(f"still open after {patience_s} s")


def resident_bytes(node):
    status = Path(f"/proc/{node.ready['pid']}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))


class H2:
    """A client that speaks HTTP/2 frame by frame and keeps no rule it does not want to keep."""

    def __init__(self, node):
        self.node = node
        self.sock = connect(node)
        config = h2.config.H2Configuration(validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        self.flush()

    def flush(self):
        self.sock.sendall(self.h2.data_to_send())

    def request(self, end_stream=False):
        stream = self.h2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/understudy.v1.BlockService/WriteBlock"),
            (":authority", self.node.address),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
        self.h2.send_headers(stream, headers, end_stream=end_stream)
        return stream

    def events(self, patience_s):
        """What the server sends, until it is quiet for `patience_s` or closes."""
        while select.select([self.sock], [], [], patience_s)[0]:
            try:
                data = self.sock.recv(65536)
            except ConnectionError:
                return
            if not data:
                return
            yield from self.h2.receive_data(data)
            try:
                self.flush()
            except OSError:
                return


def attack(checks, node, serve_a_client):
    """Runs every attack on `node`; `serve_a_client` must work during and after each."""

    def run(name, check):
        def with_service():
            check()
            serve_a_client()

        checks.run(f"{node.role}: {name}", with_service)

    def silent_connection():
        with connect(node) as sock:
            closed_by_peer(sock, CLOSED_WITHIN_S, serve_a_client)

    run("a connection that says nothing is closed", silent_connection)

    def silent_after_preface():
        # Answers nothing, not even the keepalive PING.
        with connect(node) as sock:
            sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
            closed_by_peer(sock, 2 * CLOSED_WITHIN_S, serve_a_client)

    run("a connection that answers no PING is closed", silent_after_preface)

    def garbage():
        with connect(node) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(range(256)) * 64)
            closed_by_peer(sock, CLOSED_WITHIN_S)

    run("a peer that does not speak HTTP/2 is closed", garbage)

    def half_open_streams():
        before = resident_bytes(node)
        client = H2(node)
        list(client.events(0.5))
        announced = client.h2.remote_settings.max_concurrent_streams
        assert announced <= 1024, f"the server announces {announced} concurrent streams"
        # Keep no rule: open far more than were announced, each with the first bytes of a message that never ends.
        client.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1 << 31
        client.h2.remote_settings.acknowledge()
        opened, events, closed = 0, [], False
        try:
            for opened in range(1, HALF_OPEN_STREAMS + 1):
                stream = client.request()
                client.h2.send_data(stream, struct.pack(">BI", 0, 4096) + b"x" * 16)
                client.flush()
            serve_a_client()
            events = list(client.events(1))
            closed = any(isinstance(e, h2.events.ConnectionTerminated) for e in events)
        except (OSError, h2.exceptions.ProtocolError):
            closed = True
        held = opened - sum(isinstance(e, h2.events.StreamReset) for e in events)
        assert closed or held <= announced, f"{held} of {opened} streams are held, {announced} were announced"
        growth = resident_bytes(node) - before
        assert growth < MEMORY_GROWTH_MAX, f"memory grew by {growth} bytes"
        client.sock.close()

    run(f"{HALF_OPEN_STREAMS} half-open streams are bounded", half_open_streams)

    def huge_length_prefix():
        before = resident_bytes(node)
        client = H2(node)
        stream = client.request()
        client.h2.send_data(stream, struct.pack(">BI", 0, 0xFFFFFFFF) + b"x" * 1024)
        client.flush()
        status = None
        for event in client.events(5):
            if isinstance(event, (h2.events.ResponseReceived, h2.events.TrailersReceived)):
                headers = {bytes(k): bytes(v) for k, v in ((_b(k), _b(v)) for k, v in event.headers)}
                status = headers.get(b"grpc-status", status)
            if isinstance(event, (h2.events.StreamEnded, h2.events.StreamReset)):
                break
        # 8 RESOURCE_EXHAUSTED, 11 OUT_OF_RANGE, 12 UNIMPLEMENTED (the backup has no such service).
        assert status in (b"8", b"11", b"12"), f"grpc-status {status}"
        assert resident_bytes(node) - before < MEMORY_GROWTH_MAX, "memory was taken for a message never sent"
        client.sock.close()

    run("a message that claims 4 GiB is refused", huge_length_prefix)

    def large_header():
        client = H2(node)
        stream = client.h2.get_next_available_stream_id()
        pairs = [(":method", "POST"), (":scheme", "http"), (":path", "/x"), (":authority", "x")]
        try:
            client.h2.send_headers(stream, pairs + [(f"x-{i}", "y" * 8000) for i in range(32)])
            client.flush()
            list(client.events(1))
        except (OSError, h2.exceptions.ProtocolError):
            pass
        client.sock.close()

    run("256 KiB of headers do no harm", large_header)

    def idle_connections():
        sockets = []
        try:
            for _ in range(IDLE_CONNECTIONS):
                try:
                    sockets.append(connect(node))
                except OSError:
                    break
            serve_a_client()
        finally:
            for sock in sockets:
                sock.close()

    run(f"{IDLE_CONNECTIONS} idle connections do not shut out a client", idle_connections)


def _b(value):
    return value if isinstance(value, bytes) else value.encode()
