"""Trained models that packages of the registry ship, and independent references for their norms."""
