"""The DJL container, as far as a handler sees it: what it installs, how it calls `handle`, what it does with Outputs.

`djl_python` is not on PyPI; the two classes a handler uses stand in `djl_python/` beside this file. Runs as the
container's process: python djl_front.py PORT.
"""

import asyncio
import fcntl
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

MODEL = Path(os.environ.get("MODEL_DIR", "/opt/ml/model"))


def read_properties(path):
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def install():
    """The container's pip, not run in the model's directory, so that relative paths would not be found."""
    requirements = MODEL / "requirements.txt"
    if not requirements.is_file():
        return
    text = requirements.read_text().replace("/opt/ml/model", str(MODEL))  # where it is, if there is no real /opt/ml
    own = MODEL.parent / "requirements.txt"
    own.write_text(text)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(own)]
    with (Path(sys.prefix) / "pip.lock").open("w") as lock:  # one directory stands for the images of all containers
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(pip, cwd="/", check=True)


def load_handler(folder=MODEL):
    properties = read_properties(folder / "serving.properties")
    assert properties["engine"] == "Python" and properties["option.async_mode"] == "true", properties
    spec = importlib.util.spec_from_file_location("model", folder / properties.get("option.entryPoint", "model.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.handle


class Front:
    """One event loop for all requests, as in the container's Python process."""

    def __init__(self, handle):
        self.handle, self.loop = handle, asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def start(self):
        from djl_python.inputs import Input

        assert asyncio.run_coroutine_threadsafe(self.handle(Input(b"")), self.loop).result() is None

    def close(self):
        self.loop.call_soon_threadsafe(self.loop.stop)

    def pieces(self, body):
        """Yields what the container makes of each Output, as it comes: status, content type, bytes, whether the last.

        The status counts for the first piece only; a piece with a code becomes the container's own error body. A
        handler that raises within a stream is never answered there, so it raises here.
        """
        from djl_python.inputs import Input

        answer = asyncio.run_coroutine_threadsafe(self.handle(Input(body)), self.loop).result()
        if not inspect.isasyncgen(answer):
            yield self._piece(answer)
            return
        while True:
            try:
                piece = self._piece(asyncio.run_coroutine_threadsafe(anext(answer), self.loop).result())
            except StopAsyncIteration:
                raise AssertionError("the last piece was not marked as the last") from None
            if piece[2] or piece[3]:  # an empty piece that is not the last is dropped
                yield piece
            if piece[3]:
                return

    def _piece(self, output):
        assert output.code == 200, "an error is told within the answer"
        piece = output.decoded()
        kind, data = output.properties["Content-Type"], piece["data"].encode()
        if "code" in piece:
            return piece["code"], kind, json.dumps({"code": piece["code"], "error": piece["error"]}).encode(), True
        return 200, kind, data, piece["last"]


def make_handler(front):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_arguments):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            begun = False
            for status, kind, data, _ in front.pieces(body):
                if not begun:
                    self.send_response(status)
                    self.send_header("Content-Type", kind)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    begun = True
                if data:
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    self.wfile.flush()
            self.wfile.write(b"0\r\n\r\n")

    return Handler


if __name__ == "__main__":
    install()
    front = Front(load_handler())
    front.start()
    print(json.dumps({"model": "loaded"}), flush=True)
    ThreadingHTTPServer(("", int(sys.argv[1])), make_handler(front)).serve_forever()
