"""Tools for models: convert, fold, recalibrate, freeze, load, PyTorch."""
