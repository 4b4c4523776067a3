"""Delta rule on Hopper. See README.md."""
