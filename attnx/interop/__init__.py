"""Models in and out: from one mechanism to another."""
