"""The DJL container, as far as a handler sees it: what it installs, how it calls `handle`, what it does with Outputs.

`djl_python` is not on PyPI; the two classes a handler uses stand in `djl_python/` beside this file. Runs as the
container's process: python djl_front.py PORT.
"""

import asyncio
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

MODEL = Path(os.environ.get("DJL_MODEL_DIR", "/opt/ml/model"))


def read_properties(path):
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def load_handler():
    properties = read_properties(MODEL / "serving.properties")
    assert properties["engine"] == "Python" and properties["option.async_mode"] == "true", properties
    if (MODEL / "requirements.txt").is_file():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", "requirements.txt"]
        subprocess.run(pip, cwd=MODEL, check=True)
    spec = importlib.util.spec_from_file_location("model", MODEL / properties.get("option.entryPoint", "model.py"))
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

    def pieces(self, body):
        """Yields (content type, decoded body) of each Output, as it comes."""
        from djl_python.inputs import Input

        answer = asyncio.run_coroutine_threadsafe(self.handle(Input(body)), self.loop).result()
        if not inspect.isasyncgen(answer):
            yield answer.properties["Content-Type"], answer.decoded()
            return
        while True:
            try:
                piece = asyncio.run_coroutine_threadsafe(anext(answer), self.loop).result()
            except StopAsyncIteration:
                return
            yield piece.properties["Content-Type"], piece.decoded()


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
            for kind, piece in front.pieces(body):
                if not begun:
                    self.send_response(int(piece.get("code", 200)))
                    self.send_header("Content-Type", kind)
                    self.send_header("Transfer-Encoding", "chunked")
                    self.end_headers()
                    begun = True
                data = piece["data"].encode()
                if data:
                    self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
                    self.wfile.flush()
                if piece["last"]:
                    break
            self.wfile.write(b"0\r\n\r\n")

    return Handler


if __name__ == "__main__":
    front = Front(load_handler())
    front.start()
    print(json.dumps({"model": "loaded"}), flush=True)
    ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), make_handler(front)).serve_forever()
