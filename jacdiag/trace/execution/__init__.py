"""Run a model, or a part of it, again without changing it."""
