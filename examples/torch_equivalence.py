"""Train two classifiers in PyTorch, and in Keras with this batch normalization.

784-64-BN-ReLU-10-softmax and 784-256-BN-ReLU-128-BN-ReLU-10, Adam at 0.001. Both
sides get the same initial weights and the same batches in the same order, in float32
and again in float64. Shows how far apart they are after every epoch, and ends with a
verdict; the exit status is 0 if they are equivalent.
"""

import contextlib

with contextlib.suppress(ImportError):
    # PyTorch may bring triton, whose import after TensorFlow ends the process.
    import triton  # noqa: F401

import digits  # isort: skip (before Keras: it sets TensorFlow's logging)

import itertools
import sys
import warnings

import equivalence
import keras
import numpy as np
import report

import keras_bn

try:
    import torch
except ImportError:
    print("To compare with PyTorch, install it: pip install torch", file=sys.stderr)
    sys.exit(2)

# A CUDA build on a machine without CUDA says so; the example runs on the CPU.
warnings.filterwarnings("ignore", message="CUDA initialization")

# Batches this small lose more by waiting for a second thread than it helps.
torch.set_num_threads(1)

# Adam's, on both sides. Keras rounds its betas to float32 where it corrects the bias,
# in float64 too, so they are the usual ones as float32 has them.
BETAS = float(np.float32(0.9)), float(np.float32(0.999))
ADAM_EPSILON = 1e-7
LEARNING_RATE = 0.001

# The layers'.
EPSILON = 1e-5
# Keras's momentum is the weight of the old value, PyTorch's that of the new one.
KERAS_MOMENTUM, TORCH_MOMENTUM = 0.9, 0.1

# Title: the widths of the normalized layers, and whether softmax ends the model.
MODELS = {
    "784-64-BN-ReLU-10-softmax": ([64], True),
    "784-256-BN-ReLU-128-BN-ReLU-10": ([256, 128], False),
}


def keras_model(widths, softmax, normalization):
    """The model in Keras, with layers made by `normalization`."""
    layers = [keras.Input((784,))]
    for number, width in enumerate(widths, start=1):
        layers += [
            keras.layers.Dense(width, name=f"dense_{number}"),
            normalization(
                momentum=KERAS_MOMENTUM,
                epsilon=EPSILON,
                unbiased=True,
                name=f"norm_{number}",
            ),
            keras.layers.ReLU(),
        ]
    last = "softmax" if softmax else None
    layers.append(keras.layers.Dense(10, activation=last, name="classes"))
    model = keras.Sequential(layers)
    model.compile(
        keras.optimizers.Adam(LEARNING_RATE, *BETAS, ADAM_EPSILON),
        keras.losses.SparseCategoricalCrossentropy(from_logits=not softmax),
        metrics=["accuracy"],
    )
    return model


class KerasSide(equivalence.KerasSide):
    """The model in Keras, in training."""

    def train(self, x, y, batch_size, tick):
        watch = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: tick()
        )
        fitted = self.model.fit(
            x, y, batch_size=batch_size, shuffle=False, verbose=0, callbacks=[watch]
        )
        return fitted.history["loss"][0], fitted.history["accuracy"][0]


def torch_model(widths, softmax):
    """The model in PyTorch, in the dtype of `keras.config.floatx()`."""
    modules = []
    for before, width in itertools.pairwise([784, *widths]):
        modules += [
            torch.nn.Linear(before, width),
            torch.nn.BatchNorm1d(width, eps=EPSILON, momentum=TORCH_MOMENTUM),
            torch.nn.ReLU(),
        ]
    modules.append(torch.nn.Linear(widths[-1], 10))
    if softmax:
        modules.append(torch.nn.Softmax(dim=1))
    return torch.nn.Sequential(*modules).to(getattr(torch, keras.config.floatx()))


class TorchSide:
    """The model in PyTorch, in training.

    Args:
        model: a `torch.nn.Sequential` of Linear, BatchNorm1d and others.
        weights: initial weights, as Keras's `get_weights` gives them.
    """

    name = "PyTorch"

    def __init__(self, model, weights):
        self.model, self._steps = model, 0
        with torch.no_grad():
            for (_, tensor), array in zip(_tensors(model), weights, strict=True):
                tensor.copy_(torch.from_numpy(array))
        self._adam = torch.optim.Adam(model.parameters(), LEARNING_RATE, BETAS)

    def train(self, x, y, batch_size, tick):
        softmax = isinstance(self.model[-1], torch.nn.Softmax)
        logits = self.model[:-1] if softmax else self.model
        x, y = torch.from_numpy(x), torch.from_numpy(y)
        losses, right = [], 0
        self.model.train()
        for x_batch, y_batch in zip(
            x.split(batch_size), y.split(batch_size), strict=True
        ):
            output = logits(x_batch)
            loss = torch.nn.functional.cross_entropy(output, y_batch)
            self._adam.zero_grad()
            loss.backward()
            self._step()
            losses.append(loss.item())
            right += (output.argmax(dim=1) == y_batch).sum().item()
            tick()
        return float(np.mean(losses)), right / len(x)

    def _step(self):
        r"""One step of Adam with Keras's epsilon.

        Keras adds $\epsilon$ to $\sqrt v$, PyTorch to
        $\sqrt{v / (1 - \beta_2^t)}$, so the same step takes
        $\epsilon / \sqrt{1 - \beta_2^t}$ here.
        """
        self._steps += 1
        for group in self._adam.param_groups:
            group["eps"] = ADAM_EPSILON / (1 - BETAS[1] ** self._steps) ** 0.5
        self._adam.step()

    def outputs(self, x):
        self.model.eval()
        with torch.no_grad():
            return self.model(torch.from_numpy(x)).numpy()

    def weights(self):
        return self._arrays(trainable=True)

    def moving_statistics(self):
        return self._arrays(trainable=False)

    def _arrays(self, trainable):
        return {
            name: tensor.detach().numpy().copy()
            for name, tensor in _tensors(self.model)
            if tensor.requires_grad == trainable
        }


def _tensors(model):
    """`(name, tensor)` of all weights, in Keras's order and shapes."""
    for index, module in enumerate(model):
        if isinstance(module, torch.nn.Linear):
            yield f"{index}.weight", module.weight.T
            yield f"{index}.bias", module.bias
        elif isinstance(module, torch.nn.BatchNorm1d):
            for name in ("weight", "bias", "running_mean", "running_var"):
                yield f"{index}.{name}", getattr(module, name)


def main(argv=None, ours=keras_bn.BatchNormalization):
    """Run the example.

    Args:
        argv: list of arguments; None for those of the command line.
        ours: makes the layer that is compared with PyTorch's.

    Returns:
        The exit status.
    """
    given, data = digits.parse(__doc__, "out/torch_equivalence", argv)
    keras.utils.set_random_seed(given.seed)
    everything = []
    with report.Report() as shown:
        for number, (title, (widths, softmax)) in enumerate(MODELS.items(), start=1):
            runs = compare(title, widths, softmax, ours, data, given, shown)
            report.save_curves(given.out / f"curves_{number}.png", runs)
            shown.judgement(runs)
            everything += runs
        report.save_table(given.out / "table.json", everything, given)
        shown.say("Both sides take the unbiased variance into their moving one.")
        return shown.verdict(
            all(run.equivalent() for run in everything), "Table and curves", given.out
        )


def compare(title, widths, softmax, ours, data, given, shown):
    """Train one of the models on both sides; returns its two `Run`."""
    weights = keras_model(widths, softmax, ours).get_weights()

    def torch_side():
        return TorchSide(torch_model(widths, softmax), weights)

    def keras_side():
        model = keras_model(widths, softmax, ours)
        model.set_weights(weights)
        return KerasSide(equivalence.OURS, model)

    runs = []
    for dtype in ("float32", "float64"):
        with equivalence.precision(dtype):
            run, *_ = equivalence.side_by_side(
                title, dtype, torch_side, keras_side, data, given, shown
            )
            runs.append(run)
    return runs


if __name__ == "__main__":
    sys.exit(main())
