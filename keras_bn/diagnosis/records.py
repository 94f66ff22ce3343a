"""Plain records of a model's batch normalizations, with data or without."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import keras
import numpy as np

from keras_bn.moments import Moments
from keras_bn.pages.plain import escaped
from keras_bn.passes.data import Verbose


class Drift(NamedTuple):
    """How far moving statistics are from the data's: median and worst channel.

    Args:
        mean, worst_mean: of |moving mean − mean|, in standard deviations of the data.
        ratio, worst_ratio: of moving standard deviation / standard deviation, both
            including epsilon; the worst is the furthest from 1 as a factor.
    """

    mean: float
    worst_mean: float
    ratio: float
    worst_ratio: float


@dataclass
class LayerRecord:
    """One batch normalization. Arrays have the shape of its statistics, in float64.

    Args:
        layer: its path in the model.
        keras: whether it is Keras's own layer.
        epsilon, momentum: of the layer.
        debias: whether its statistics are free of their initial values.
        frozen: whether training does not change its statistics.
        moving_mean, moving_variance: its moving statistics.
        initial: whether these are still the initial values.
        gamma, beta: its scale and offset, or None.
        bias_of: the name of a layer before it whose bias has no effect, or None.
        inference_mode: whether the model always calls it with `training=False`, as far
            as data has shown it, or was itself trained so.
        adapts: whether its inference follows the inputs: see `keras_bn.adapt`.
    """

    layer: str
    keras: bool
    epsilon: float
    momentum: float | None
    debias: bool
    frozen: bool
    moving_mean: np.ndarray
    moving_variance: np.ndarray
    initial: bool
    gamma: np.ndarray | None
    beta: np.ndarray | None
    bias_of: str | None
    inference_mode: bool = False
    adapts: bool = False


@dataclass(kw_only=True)
class MeasuredLayer(LayerRecord):
    """A batch normalization through which data went.

    Args:
        data: `Moments` of its inputs, pooled over the data.
        elements: number of elements behind a batch's statistics, median of batches.
        gap: root mean square of output in training − output in inference, relative to
            the standard deviation of the output in training.
        **others: of a `LayerRecord`.
    """

    data: Moments
    elements: float
    gap: float

    @property
    def mean_drift(self) -> np.ndarray:
        """Moving mean − mean of the data, in standard deviations of the data."""
        return (self.moving_mean - self.data.mean) / self._stddev(self.data.variance)

    @property
    def stddev_ratio(self) -> np.ndarray:
        """Moving standard deviation / that of the data, both including epsilon."""
        moving, data = map(self._stddev, (self.moving_variance, self.data.variance))
        return moving / data

    @property
    def drift(self) -> Drift:
        """The `Drift` over the channels."""
        mean, ratio = np.abs(self.mean_drift), self.stddev_ratio
        with np.errstate(divide="ignore"):
            worst = ratio.flat[np.argmax(np.abs(np.log(ratio)))]
        return Drift(
            *map(float, (np.median(mean), mean.max(), np.median(ratio), worst))
        )

    def _stddev(self, variance):
        with np.errstate(invalid="ignore"):
            return np.sqrt(variance + self.epsilon)


@dataclass(repr=False)
class ModelRecord:
    """A model, on data or without.

    Args:
        model: its name.
        steps: number of steps its optimizer has taken; None if not known.
        layers: a `LayerRecord` of each normalization, in calling order; with data, a
            `MeasuredLayer` of each that the data reaches.
        samples, batches: of the data; 0 without data.
        invalid: how many further samples were left out because they are not finite.
        first_invalid: the first of them, counted from 0; None if there is none.
        of_one_class: in how many batches all labels are of one class.
        not_called: the paths of those that the data never reaches.
        gap: as of a layer, for the outputs of the model; None without data.
        loss, accuracy: pairs of the value in inference and in training; None if the
            data has no labels, or the model no single loss or no classes.
        trains: whether its steps of training, if any, were with `training=True`.
    """

    model: str
    steps: int | None
    layers: Sequence[LayerRecord]
    samples: int = 0
    batches: int = 0
    invalid: int = 0
    first_invalid: int | None = None
    of_one_class: int = 0
    not_called: tuple[str, ...] = ()
    gap: float | None = None
    loss: tuple[float, float] | None = None
    accuracy: tuple[float, float] | None = None
    trains: bool = True

    def __repr__(self) -> str:
        layers, name = len(self.layers), escaped(self.model)
        return f"<ModelRecord {name}: layers: {layers}, samples: {self.samples:,}>"

    @property
    def measured(self) -> list[MeasuredLayer]:
        """The layers through which data went."""
        return [layer for layer in self.layers if isinstance(layer, MeasuredLayer)]

    @property
    def has_data(self) -> bool:
        """Whether data went through the model."""
        return self.samples > 0


class Source(NamedTuple):
    """What was diagnosed, and how; the arguments are those of `keras_bn.diagnose`."""

    model: keras.Model
    data: Any
    steps: int | None
    batch_size: int | None
    ignore: tuple[str, ...]
    verbose: Verbose
