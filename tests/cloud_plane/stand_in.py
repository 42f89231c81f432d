"""A server with the engine's answers but no model: the prompt backwards, more slowly without drafts."""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PLAIN = os.environ.get("GORGON_DRAFTS") == "none"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_arguments):
        pass

    def do_GET(self):
        self.send_response(200)
        self.end_headers()

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(0.04 if PLAIN else 0.02)
        text = request["messages"][-1]["content"][::-1]
        speculation = {"steps": len(text), "tokens_per_step": 1.0 if PLAIN else 2.0}
        usage = {"completion_tokens": len(text), "speculation": speculation}
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        body = json.dumps({"choices": [choice], "usage": usage}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("", int(sys.argv[1])), Handler).serve_forever()
