"""Short convolution with SiLU. README.md has the design and what was measured."""
