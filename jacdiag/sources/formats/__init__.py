"""One reader per file format; each gives back plain containers with tensors, and runs no code of
the file.
"""
