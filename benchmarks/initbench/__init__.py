"""InitBench: init bugs of public trackers, rebuilt as pairs, and correct inits of published
recipes.
"""
