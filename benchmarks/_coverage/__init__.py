"""Every model family that transformers registers, built tiny from its default config, traced and
checked strictly.
"""
