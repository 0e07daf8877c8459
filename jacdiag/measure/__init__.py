"""From a sub-layer and its Jacobian to figures: norms with intervals, the network, bounds, the
weights alone.
"""
