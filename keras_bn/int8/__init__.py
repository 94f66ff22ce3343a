"""Models for int8: training with quantization, and export to a file of integers.

On any backend a model trains; a file is made where TensorFlow is.

TensorFlow is imported here inside functions of one file only: `tflite.py`, with the
converter and the interpreter.
"""
