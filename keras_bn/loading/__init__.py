"""Reading files of Keras 3 and 2, their configs and their compilation."""
