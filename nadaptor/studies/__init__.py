"""Comparisons over methods, levels, seeds and corrections."""
