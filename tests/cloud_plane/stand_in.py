"""A server with the engine's answers but no model: the prompt backwards, more slowly without drafts.

In the place of vLLM or TGI it looks first for what they would load, where they would look for it.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def heads_of_vllm():
    """The backbone and heads that vLLM would load; False when it is told of none."""
    assert_weights(os.environ["SM_VLLM_MODEL"])
    told = json.loads(os.environ.get("SM_VLLM_SPECULATIVE_CONFIG", "null"))
    if told is None:
        return False
    heads = json.loads((Path(told["model"]) / "config.json").read_text())
    assert heads["architectures"] == ["MedusaModel"] and heads["num_heads"] == told["num_speculative_tokens"], heads
    assert (Path(told["model"]) / "model.safetensors").is_file()
    return True


def heads_of_tgi():
    """The same for TGI, which finds both by the directory's config.json."""
    model = os.environ["HF_MODEL_ID"]
    config = json.loads((Path(model) / "config.json").read_text()) if model.startswith("/") else {}
    if "medusa_num_heads" not in config:
        assert_weights(model)
        return False
    assert_weights(config["base_model_name_or_path"])
    assert (Path(model) / "medusa_lm_head.safetensors").is_file()
    return True


def assert_weights(model):
    """A directory with weights, or a hub id."""
    assert not model.startswith("/") or (Path(model) / "model.safetensors").is_file(), model


if "SM_VLLM_MODEL" in os.environ:
    PLAIN = not heads_of_vllm()
elif "HF_MODEL_ID" in os.environ:
    PLAIN = not heads_of_tgi()
else:
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
