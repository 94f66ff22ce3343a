"""Passes over data that show the moments at every normalization."""
