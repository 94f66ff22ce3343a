"""What ails the batch normalizations of a model: records, findings, a figure."""
