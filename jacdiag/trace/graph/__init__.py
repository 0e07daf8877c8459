"""The record of one forward: values, calls, modules, and what reaches what."""
