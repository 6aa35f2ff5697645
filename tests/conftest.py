"""Without a GPU, Triton kernels run in Triton's interpreter, on the same tests."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before anything imports one
