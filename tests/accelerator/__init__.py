"""An accelerator in pure Python, and what jacdiag does on it.

It is a regular package, so that `benchmarks/host_waits.py` can import it under its own name.
"""
