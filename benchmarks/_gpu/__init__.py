"""The parts of `benchmarks/gpu.py`: each measures one thing on an accelerator and returns rows."""
