"""Gated linear recurrence on Hopper. See README.md."""
