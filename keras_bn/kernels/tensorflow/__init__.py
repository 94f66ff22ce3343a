"""The kernels on TensorFlow: the only place that names it."""
