"""Attention numerics; Triton's kernels run in its interpreter where there is no GPU (conftest)."""
