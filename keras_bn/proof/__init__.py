"""The proof that the layer computes what Keras's computes, on this machine."""
