"""Settings that hold for every test: no telemetry, no network, one thread."""

import os

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # the variables above are read at import

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before TRL imports triton

torch.set_num_threads(1)
