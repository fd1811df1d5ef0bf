"""Before anything imports Triton: without a GPU its kernels are interpreted, in every test of this process."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a function is decorated, not when it is called
