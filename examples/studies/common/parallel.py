"""Many small networks that learn the digits side by side, as one model.

A layer has one kernel per network, and with axis=[1, 2] a normalization has statistics
per network and unit: no network sees another. Every seed's networks start from the same
draw, whatever their learning rate.
"""

import itertools

import keras
import numpy as np
import tensorflow as tf

import keras_bn

HIDDEN, UNITS, CLASSES, BATCH = 6, 64, 10, 48
STEPS = 1440 // BATCH


def normalization():
    """Batch normalization for the networks of a `Trainer`."""
    return keras_bn.BatchNormalization(axis=[1, 2], momentum=0.9)


class Runs:
    """A network for every seed, every scale of the initial weights and every rate.

    Attributes:
        shape: (seeds, scales, rates).
        rates: learning rate of each network, float32 of shape (runs,).
        kernels: initial kernels, for each layer an array of (runs, inputs, units).
    """

    def __init__(self, seeds, scales, rates):
        """Draw the initial weights.

        Args:
            seeds: range of the seeds.
            scales: list of factors on He's initialization.
            rates: list of learning rates.
        """
        self.shape = (len(seeds), len(scales), len(rates))
        self.rates = np.broadcast_to(rates, self.shape).reshape(-1).astype("float32")
        draws = [np.random.default_rng(seed) for seed in seeds]
        sizes = [UNITS] * (HIDDEN + 1) + [CLASSES]  # The images have 64 pixels too.
        self.kernels = [
            self._kernels([draw.normal(size=shape) for draw in draws], scales)
            for shape in itertools.pairwise(sizes)
        ]

    def _kernels(self, normals, scales):
        factors = np.reshape(scales, (1, -1, 1, 1, 1)) * np.sqrt(2 / UNITS)
        kernels = np.array(normals)[:, None, None] * factors
        kernels = np.broadcast_to(kernels, (*self.shape, *kernels.shape[-2:]))
        return kernels.reshape(-1, *kernels.shape[-2:])

    def of(self, seed, history):
        """What one seed's networks did.

        Args:
            seed: the seed.
            history: list of what `Trainer.epoch` returned.

        Returns:
            `(accuracies, norms)` of shape (scales, rates, epochs) and (scales, rates,
            steps, layers).
        """
        accuracies, norms = zip(*history, strict=True)
        accuracies = np.stack(accuracies, axis=1)
        norms = np.concatenate(norms).swapaxes(0, 1)
        return (x.reshape(*self.shape, *x.shape[1:])[seed] for x in (accuracies, norms))


class Trainer:
    """Networks of one kind, by stochastic gradient descent, each at its own rate."""

    def __init__(self, runs, after_dense):
        """Build the model.

        Args:
            runs: `Runs`.
            after_dense: function that makes the layers between one dense layer and the
                next, as a list.
        """
        self._rates = runs.rates
        layers = [keras.Input((UNITS,))]
        for number, kernels in enumerate(runs.kernels):
            dense = keras.layers.EinsumDense(
                "brc,rcd->brd" if number else "bc,rcd->brd",
                output_shape=(len(runs.rates), kernels.shape[-1]),
                bias_axes="rd",
                kernel_initializer=keras.initializers.Constant(kernels),
            )
            layers.append(dense)
            if number < HIDDEN:
                layers.extend(after_dense())
        self._model = keras.Sequential(layers)
        self._step = tf.function(self._one_step)

    def epoch(self, digits, seed):
        """Go through the training images once.

        Args:
            digits: what `data.small_digits` returns.
            seed: of the order of the images.

        Returns:
            `(accuracies, norms)`: validation accuracy of each network, shape (runs,),
            and the norm of each kernel's gradient, shape (steps, runs, layers).
        """
        order = np.random.default_rng(seed).permutation(len(digits.x_train))
        norms = [
            self._step(digits.x_train[rows].reshape(-1, UNITS), digits.y_train[rows])
            for rows in order.reshape(STEPS, BATCH)
        ]
        scores = self._model.predict_on_batch(digits.x_val.reshape(-1, UNITS))
        right = np.argmax(scores, axis=-1) == digits.y_val[:, None]
        right &= np.isfinite(scores).all(axis=-1)
        return right.mean(axis=0), np.stack(norms)

    def _one_step(self, images, classes):
        with tf.GradientTape() as tape:
            scores = self._model(images, training=True)
            loss = keras.losses.sparse_categorical_crossentropy(
                tf.repeat(classes[:, None], len(self._rates), axis=1),
                scores,
                from_logits=True,
            )
            # Mean over the batch, sum over networks: each gets the gradient it would
            # have alone.
            loss = tf.reduce_sum(tf.reduce_mean(loss, axis=0))
        variables = self._model.trainable_variables
        gradients = tape.gradient(loss, variables)
        for variable, gradient in zip(variables, gradients, strict=True):
            # Biases, gamma and beta have shape (runs, units), kernels one axis more.
            rates = tf.reshape(self._rates, [-1] + [1] * (len(variable.shape) - 1))
            variable.assign_sub(rates * gradient)
        kernels = [g for g in gradients if len(g.shape) == 3]
        return tf.stack([tf.norm(g, axis=(1, 2)) for g in kernels], axis=1)
