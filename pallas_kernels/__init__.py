"""Pallas kernels, one folder per op; imports jax only and stands without attnx. `table.py` lists them."""
