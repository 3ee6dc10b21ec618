"""Judging: scores, intervals, pictures, comparisons."""
