"""Diagnosing a model's batch normalizations: records, findings, a figure."""
