"""Rules on a stream: compare the figures of a running training, step by step."""
