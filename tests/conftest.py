"""Shared test settings: one thread per worker, no network, no hub."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; spinning threads would fight over them
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from hypothesis import settings

settings.register_profile("gorgon", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("gorgon")
