"""Numerical operators, each with a reference that it is tested against."""
