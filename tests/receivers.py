"""Receivers of alerts that run for one test: an HTTP service, and a real MQTT broker where it is installed."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")


class HttpReceiver:
    """Takes POSTs. ``answer`` says with which status, by the key of the request; what got 2xx is in ``taken``."""

    def __init__(self, answer=lambda key: 200, port=0):
        self.answer, self.requests, self.taken = answer, [], []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if len(body) < length:  # the client was killed in the middle: no request
                    self.close_connection = True
                    return
                key = self.headers["Idempotency-Key"]
                receiver.requests.append((key, dict(self.headers), body))
                status = receiver.answer(key)
                if 200 <= status < 300:
                    receiver.taken.append(key)
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that was killed
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/alerts"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def features(self):
        return [json.loads(body) for _, _, body in self.requests]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def broker(folder, port, *settings):
    """A mosquitto of its own, ready to take connections; skips with the reason where there is none."""
    if MOSQUITTO is None:
        pytest.skip("needs mosquitto: not installed")
    lines = [f"listener {port} 127.0.0.1", "persistence false", "user root", *settings]
    config = folder / f"mosquitto-{port}.conf"
    config.write_text("\n".join(lines) + "\n")
    log = (folder / f"mosquitto-{port}.log").open("ab")
    process = subprocess.Popen([MOSQUITTO, "-c", str(config), "-v"], stdout=log, stderr=log)
    try:
        _until_listening(port, process)
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def _until_listening(port, process):
    while True:
        assert process.poll() is None, "mosquitto ended"
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        threading.Event().wait(0.01)
