"""Rules on a stream: what the figures of a running training are compared with, step by step."""
