"""Scalars in event files, as TensorBoard reads them."""

import tensorflow as tf

# What tf.summary.scalar says of its values; it needs the tensorboard package to say it.
_SCALAR = tf.compat.v1.SummaryMetadata(
    plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"),
    data_class="DATA_CLASS_SCALAR",
)


class Events:
    """An event file in the folder where TensorBoard looks, written as it comes."""

    def __init__(self, folder):
        self._writer = tf.summary.create_file_writer(str(folder))

    def write(self, step, values):
        """Write the scalars of a step, a dict of numbers by tag, and flush."""
        # Keras's TensorBoard callback has TensorFlow record at its own steps only.
        with self._writer.as_default(), tf.summary.record_if(True):
            for tag, value in values.items():
                scalar = tf.constant(value, tf.float32)
                tf.summary.write(tag, scalar, step=step, metadata=_SCALAR)
        self._writer.flush()

    def close(self):
        """Close the file."""
        self._writer.close()
