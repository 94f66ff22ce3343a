"""What touches the inside of Keras: its graphs, its trackers, its live objects."""
