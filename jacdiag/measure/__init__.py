"""Measure sub-layers and their Jacobians, the network, its bounds, and weights alone."""
