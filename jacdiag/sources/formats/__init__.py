"""One reader per file format; each returns plain containers with tensors, and runs no code."""
