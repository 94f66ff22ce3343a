"""Side-by-side timings: `python -m benchmarks`, or one module alone."""
