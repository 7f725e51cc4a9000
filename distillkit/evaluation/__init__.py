"""Scores of a set on held-out text, and real examples of its size to compare with."""
