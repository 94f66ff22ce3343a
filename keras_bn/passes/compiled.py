"""A pass over data: a model on batches, with recorders in its normalizations, compiled.

The model is traced once, with the recorders in it, and what they note leaves the graph
in few vectors. A model that cannot be traced, because its Python looks at values, runs
eagerly, with the same code and so the same numbers.
"""

import contextlib
import functools
from collections import Counter
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_bn.backends import backend
from keras_bn.moments import Moments, at_least_float32, merged
from keras_bn.passes.data import NoDataError, batches, finite_samples
from keras_bn.passes.recorder import double_of, intercepted, redirected, state_kept
from keras_bn.surgery.calls import as_declared
from keras_bn.surgery.graph import variables_of, walk


class Pass:
    """Runs a model on batches, and collects what recorders note of each.

    A subclass has the methods `step`, `record` and `take`.

    Args:
        model: the model; nothing in it changes.
        layers: its normalizations that recorders stand in for, by path.

    Attributes:
        doubles: by path, a `keras_bn` layer with the same weights as each of them.
        compiled: whether batches run compiled.
        samples, batches: how many the pass has used.
        invalid: how many samples it has left out because they are not finite.
        first_invalid: the first of them, counted from 0; None if there is none.
        partial: by path, in how many batches a layer had inputs that are not finite,
            though the data is.
        labels: the `Labels` of the data.
    """

    # Whether a step needs the labels and weights of a batch.
    labelled = False

    def __init__(self, model, layers):
        self.model, self._layers = model, layers
        self.doubles = {path: double_of(layer) for path, layer in layers.items()}
        recorded = {id(layer) for layer in layers.values()}
        self._holders = [
            layer
            for _, layer in walk(model)
            if hasattr(layer, "call_unfolded") and id(layer.normalization) in recorded
        ]
        self._recorders = {
            id(layer): functools.partial(self._called, path, self.doubles[path])
            for path, layer in layers.items()
        }
        # A layer that computes a normalization together with others calls it here.
        for layer in self._holders:
            self._recorders[id(layer)] = layer.call_unfolded
        # What is called at each time step has to show its values.
        self._loops = any(isinstance(e, keras.layers.RNN) for _, e in walk(model))
        self._variables = variables_of(model)
        for double in self.doubles.values():
            self._variables += double.variables
        # What each step has been compiled to.
        self._traced: dict = {}
        self.compiled = not getattr(model, "run_eagerly", False)
        self._tracing = False
        self._trace: object = None
        self._notes: list = []
        # What the notes of each trace are.
        self._layouts: list = []
        self._fresh = self._finite = True
        self._reset()

    def _reset(self):
        self.samples = self.batches = self.invalid = 0
        self.first_invalid: int | None = None
        self.partial: Counter = Counter()
        self.labels = Labels(self.model)

    def step(self, batch, given):
        """What to do with a batch: calls `forward` and `note`.

        Args:
            batch: `(x, y, sample_weight)`, in which parts may be None.
            given: further tensors, as given to `run`.
        """
        raise NotImplementedError

    def record(self, path, double, inputs, training=None, mask=None):
        """The output of a layer that is called.

        Args:
            path: of the layer.
            double: its double.
            inputs, training, mask: the arguments of the call.
        """
        raise NotImplementedError

    def take(self, notes, batch, samples):
        """Take in what was noted of a batch.

        Args:
            notes: a list of `(kind, path, arrays)`, as noted.
            batch: `(x, y, sample_weight)`.
            samples: how many of its samples are finite.
        """
        raise NotImplementedError

    def __enter__(self):
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(state_kept(self.model))
        for layer in [*self._layers.values(), *self._holders]:
            self._stack.enter_context(intercepted(layer))
        if not self._fresh:
            self._refresh()
        self._fresh = False
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _refresh(self):
        """Give the doubles the present weights of their layers."""
        for path, layer in self._layers.items():
            present = {variable.name: variable for variable in layer.variables}
            for variable in self.doubles[path].variables:
                if variable.name in present:
                    variable.assign(present[variable.name])

    def forward(self, x, training=False):
        """The outputs of the model; for `step`."""
        return self.model(as_declared(self.model, x), training=training)

    def _called(self, path, double, *args, **kwargs):
        # A function that the user has compiled would keep the recorder in it.
        if backend.current_trace() != self._trace:
            raise ValueError(
                f"'{path}' is called inside a compiled function, where its statistics "
                "cannot be had. Call the layers of the model directly in it."
            )
        return self.record(path, double, *args, **kwargs)

    def note(self, kind, path, *values: Any):
        """Keep values of the present batch for `take`; for `step` and `record`.

        Args:
            kind: what they are, for `take`.
            path: whose they are: the path of a layer, or anything else.
            *values: tensors of static shape, or numbers.
        """
        if not self._tracing:
            values = tuple(ops.convert_to_numpy(value) for value in values)
        self._notes.append((kind, path, values))

    def over(self, data, label, given=(), **options):
        """Go through data.

        Args:
            data: `x`, or a tuple `(x, y, sample_weight)`, as in `fit`.
            label: for the progress bar.
            given: tensors for every step.
            **options: as in `passes.data.batches`.
        """
        self._reset()
        data = data if isinstance(data, tuple) else (data,)
        for batch in batches(*data, label=label, **options):
            if _samples(batch):
                self._use(batch, given)

    def check_any(self):
        """Refuse data of which nothing could be used.

        Raises:
            ValueError: if there is no data, or none that is finite.
        """
        if self.invalid and not self.samples:
            raise ValueError(
                f"None of the {self.invalid} samples in the data is finite."
            )
        if not self.samples:
            raise NoDataError

    def left_out(self):
        """What to say of samples and batches that were left out, a dict by reason."""
        messages = {}
        if self.invalid:
            messages["samples"] = (
                f"{self.invalid} of {self.invalid + self.samples} samples in the data "
                "are not finite and were left out; the first is sample "
                f"{self.first_invalid}."
            )
        if self.partial:
            path, count = self.partial.most_common(1)[0]
            messages["batches"] = (
                f"The input of '{path}' was not finite in {count} of {self.batches} "
                "batches, though the data was. Those channels were left out there."
            )
        return messages

    def _use(self, batch, given):
        notes, samples = self.run(batch, given), _samples(batch)
        if not self._finite:
            valid = finite_samples(batch if self.labelled else batch[0])
            known = bool(valid.all())
            if not known:
                if self.first_invalid is None:
                    before = self.samples + self.invalid
                    self.first_invalid = before + int(valid.argmin())
                self.invalid += int((~valid).sum())
                samples = int(valid.sum())
                if not samples:
                    return
                if known := self._takes_any_size():
                    chosen = np.flatnonzero(valid)
                    batch = keras.tree.map_structure(
                        # Not as arrays: those of ragged tensors have padding.
                        lambda v: v if v is None else ops.take(v, chosen, axis=0),
                        batch,
                    )
                    notes = self.run(batch, given)
            self.partial.update(
                path
                for path, moments in moments_of(notes)
                if known and not np.isfinite(moments.mean + moments.variance).all()
            )
        self.samples += samples
        self.batches += 1
        self.labels.add(batch[1])
        self.take(notes, batch, samples)

    def _takes_any_size(self):
        inputs = getattr(self.model, "inputs", None) or ()
        return all(tensor.shape[0] is None for tensor in inputs)

    def run(self, batch, given=(), step=None):
        """What is noted of a batch, as a list of `(kind, path, arrays)`.

        Args:
            batch, given: as of `step`.
            step: another method to run in its place.
        """
        step = step or self.step
        if step not in self._traced:
            packed = functools.partial(self._packed, step)
            self._traced[step] = backend.traced(packed, self._variables)
        tensors = self.tensors(batch, given)
        with redirected(self._recorders):
            if self.compiled:
                try:
                    self._tracing = True
                    *vectors, number = map(
                        ops.convert_to_numpy, self._traced[step](*tensors)
                    )
                    self._finite = _are_finite(vectors)
                    return _unpacked(vectors, self._layouts[int(number)])
                except Exception:  # whatever a model does that cannot be traced
                    self.compiled = False
                finally:
                    self._tracing = False
            notes = self.eagerly(step, *tensors)
        self._finite = _are_finite(value for *_, values in notes for value in values)
        return notes

    def tensors(self, batch, given=()):
        """The arguments of `step`."""
        batch = tuple(batch) if self.labelled else (batch[0], None, None)
        return keras.tree.map_structure(_tensor, (batch, given))

    def eagerly(self, function, *arguments):
        """What a function of tensors notes, with values at hand."""
        self._notes = []
        with redirected(self._recorders), backend.recording(self._loops):
            self._trace = backend.current_trace()
            function(*arguments)
        return self._notes

    def _packed(self, step, batch, given):
        """The notes of a step: a vector for each dtype, and the number of the layout.

        Few tensors leave a graph sooner than many.
        """
        self._notes, self._trace = [], backend.current_trace()
        step(batch, given)
        layout: list = []
        tensors: dict = {}
        for kind, path, values in self._notes:
            parts = []
            for value in values:
                if not ops.is_tensor(value):
                    parts.append(value)
                    continue
                dtype = _packed_dtype(value)
                parts.append((dtype, tuple(value.shape)))
                tensors.setdefault(dtype, []).append(
                    ops.reshape(ops.cast(value, dtype), (-1,))
                )
            layout.append((kind, path, parts))
        entry = list(tensors), layout
        if entry not in self._layouts:
            self._layouts.append(entry)
        number = ops.convert_to_tensor(self._layouts.index(entry), "int32")
        return [*(ops.concatenate(parts) for parts in tensors.values()), number]


class Pool:
    """The moments of many layers, merged batch by batch in float64.

    Those of one batch are merged as one long vector, which costs as much as one layer.
    """

    def __init__(self):
        self._pooled: dict = {}

    def add(self, notes):
        """Add moments of a batch.

        Args:
            notes: a list of `(path, Moments)`, one for each call of a layer. What is
                not finite does not count.
        """
        if not notes:
            return
        layout = tuple((path, part.mean.shape) for path, part in notes)
        count, mean, variance = (
            np.concatenate(
                [
                    np.broadcast_to(values, part.mean.shape).ravel()
                    for _, part in notes
                    for values in [part[i]]
                ]
            ).astype("float64")
            for i in range(3)
        )
        finite = np.isfinite(mean) & np.isfinite(variance)
        moments = Moments(np.where(finite, count, 0.0), mean, variance)
        if layout in self._pooled:
            # Not by `keras.ops`: JAX has no float64.
            moments = merged(self._pooled[layout], moments, np)
        self._pooled[layout] = moments

    def moments(self):
        """The `Moments` by path, in the order of the calls."""
        pooled: dict[str, Moments] = {}
        for layout, whole in self._pooled.items():
            start = 0
            for path, shape in layout:
                stop = start + int(np.prod(shape))
                part = Moments(*(v[start:stop].reshape(shape) for v in whole))
                known = pooled.get(path)
                pooled[path] = part if known is None else merged(known, part, np)
                start = stop
        return pooled


class Labels:
    """How often each class comes in the labels of the data.

    Args:
        model: the model that tells the classes apart.

    Attributes:
        alone: in how many batches all labels are of one class.
    """

    def __init__(self, model):
        shape: Any = getattr(model, "output_shape", None)
        plain = isinstance(shape, tuple) and len(shape) == 2
        self.classes = shape[-1] if plain else None
        self._counts: Counter = Counter()
        self.alone = 0

    def add(self, y):
        """Add the labels of a batch; None for none."""
        if self.classes is None or y is None or isinstance(y, list | tuple | dict):
            return
        y = np.asarray(keras.ops.convert_to_numpy(y))
        if y.ndim == 2 and y.shape[-1] == self.classes > 1:
            y = y.argmax(-1)
        if y.ndim > 2 or not np.issubdtype(y.dtype, np.integer):
            self.classes = None
            return
        labels, counts = np.unique(y, return_counts=True)
        self.alone += len(labels) == 1 < self.classes and y.size > 1
        self._counts.update(dict(zip(labels.tolist(), counts.tolist(), strict=True)))

    @property
    def effective(self):
        """The effective number of classes: that of a uniform one of this entropy."""
        counts = np.array(list(self._counts.values()), "float64")
        share = counts / counts.sum()
        return float(np.exp(-(share * np.log(share)).sum())) if counts.size else None


def moments_of(notes, kind="moments"):
    """Pairs of path and `Moments` among the notes of a batch."""
    return [(path, Moments(*values)) for of, path, values in notes if of == kind]


def _unpacked(vectors, layout):
    """The notes of a batch from their vectors."""
    dtypes, parts = layout
    arrays = dict(zip(dtypes, vectors, strict=True))
    start = dict.fromkeys(dtypes, 0)
    notes = []
    for kind, path, values in parts:
        unpacked = []
        for value in values:
            if isinstance(value, tuple):
                dtype, shape = value
                first = start[dtype]
                start[dtype] = first + int(np.prod(shape))
                value = arrays[dtype][first : start[dtype]].reshape(shape)
            unpacked.append(value)
        notes.append((kind, path, unpacked))
    return notes


def _packed_dtype(tensor):
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    return at_least_float32(dtype) if "float" in dtype else "int32"


def _tensor(value):
    """A number, array or foreign tensor as a tensor; what is none stays."""
    if value is None or ops.is_tensor(value):
        return value
    # Sparse and ragged tensors, and objects, which the model converts itself.
    special = hasattr(value, "dense_shape") or hasattr(value, "row_splits")
    special = special or getattr(getattr(value, "dtype", None), "kind", "") == "O"
    return value if special else ops.convert_to_tensor(value)


def _samples(batch):
    return int(keras.tree.flatten(batch[0])[0].shape[0])


def _are_finite(arrays):
    # A sum is finite if all are, and needs no array of bools.
    return all(np.isfinite(np.sum(array, dtype="float64")) for array in arrays)
