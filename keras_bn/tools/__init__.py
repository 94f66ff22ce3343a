"""Functions that take a model: convert, fold, recalibrate, freeze, PyTorch."""
