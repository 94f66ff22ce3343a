"""What the studies share. Imported before Keras, it sets TensorFlow's logging."""

import logging
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# TensorFlow warns of retracing where each of several models has its own function.
logging.getLogger("tensorflow").setLevel(logging.ERROR)

# The digits of 28x28 and MNIST come from examples/digits.py.
sys.path.append(str(pathlib.Path(__file__).parents[2]))
