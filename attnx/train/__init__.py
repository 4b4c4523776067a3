"""Training: `loop.run(config)` and its parts."""
