"""Measuring models, and saying what was measured."""
