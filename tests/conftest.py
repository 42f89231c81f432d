"""Shared test settings: one thread per worker, no network, no hub."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; spinning threads would fight over them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

from hypothesis import settings

settings.register_profile("gorgon", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("gorgon")
