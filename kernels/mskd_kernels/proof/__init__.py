"""The proof of the Triton kernels on the GPU at hand: asked for in `first_use`, listed in `cases`, made by `trial`."""
