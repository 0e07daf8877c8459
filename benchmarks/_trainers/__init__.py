"""Trainers of other people, each as one small function, and what is checked of a watch in all of
them.
"""
