"""One model for many seeds: compiled once, put back to a start for each."""

import keras


class Restart:
    """Puts models and their optimizers back to where a seed starts.

    A new model would be traced anew for every seed, which takes longer than a small
    one trains.
    """

    def __init__(self, *models):
        """Remember the optimizers.

        Args:
            models: compiled models that have not been trained.
        """
        self._models = models
        self._optimizers = []
        for model in models:
            model.optimizer.build(model.trainable_variables)
            self._optimizers.append([v.numpy() for v in model.optimizer.variables])

    def __call__(self, seed):
        """Draw the initial weights of this seed."""
        keras.utils.set_random_seed(seed)
        for model, values in zip(self._models, self._optimizers, strict=True):
            model.set_weights(keras.models.clone_model(model).get_weights())
            variables = model.optimizer.variables
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)
