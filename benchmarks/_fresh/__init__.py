"""Models at the default init of other people's code, for `benchmarks/fresh.py` and its tests."""
