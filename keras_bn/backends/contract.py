"""The contract of a backend: what each folder here gives, method by method.

In all of it,

- `x` is the input, `(batch, ..., channels)` or with the channels elsewhere;
- `axes` are the channel axes, non-negative and ascending: usually one;
- a statistic or parameter has one value per channel: the shape of `x` along `axes`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import keras

from keras_bn.backends.plan import Plan
from keras_bn.moments import Moments, Tensor

# Shape and dtype of an argument; None for a size that is unknown while compiling.
Signature = Sequence[tuple[Sequence[int | None], str]]


class Normalizing(Protocol):
    """What a plan is made from: a part of the layer's settings."""

    @property
    def axes(self) -> tuple[int, ...]: ...

    @property
    def epsilon(self) -> float: ...

    @property
    def group_size(self) -> int | None: ...

    @property
    def synchronized(self) -> bool: ...


class Backend(Protocol):
    """How a batch is normalized, how functions run, how replicas communicate."""

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        gamma: Tensor | None,
        beta: Tensor | None,
        *,
        epsilon: float,
        plan: Plan,
    ) -> tuple[Tensor, Moments]:
        """Normalize a batch with its own statistics.

        Args:
            x: input of a float dtype.
            mask: bools that broadcast to `x`, true where an element counts; or None.
            gamma, beta: scale and offset, or None.
            epsilon: added to the variance, non-negative.
            plan: the `Plan` for `x`.

        Returns:
            `(y, moments)`. `y` has the shape and dtype of `x`, and its gradients are
            right, second ones included. The `Moments` are float32 at least, and
            constants to differentiation; of a batch that is cut into groups, they have
            one more leading axis.
        """
        ...

    def moments(
        self, x: Tensor, mask: Tensor | None, *, epsilon: float, plan: Plan
    ) -> Moments:
        """The `Moments` of a batch, as from `forward`, but without its output."""
        ...

    def standardize(
        self,
        x: Tensor,
        mean: Tensor,
        scale: Tensor,
        beta: Tensor,
        plan: Plan | None = None,
    ) -> Tensor:
        """Normalize with given statistics, with the rounding of Keras's layer.

        On TensorFlow and JAX, this is `x * scale + (beta - mean * scale)`; on PyTorch,
        it is `scale * (x - mean) + beta`. All arguments broadcast. With a `Plan` for
        `x` it may round in another way if that is faster; the mean is a constant then.
        """
        ...

    def make_plan(self, x: Tensor, mask: Tensor | None, settings: Normalizing) -> Plan:
        """The plan for an input, here and now.

        Args:
            x: the input; its static shape and dtype are what counts.
            mask: None, or anything else if the batch is masked.
            settings: `axes`, `epsilon`, `group_size` and `synchronized`.
        """
        ...

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function(x, *tensors, **fixed)`, as fast as the backend runs it.

        Args:
            function: a function without effects. `x` is the input. Each of `tensors` is
                a mask that broadcasts to `x`, a value per channel, a named tuple of
                such, or None. The values in `fixed` are hashable; `settings.axes`, one
                of them, names the channel axes.

        Returns:
            A function with the same signature. It may be called eagerly or inside of
            what the backend compiles.
        """
        ...

    def cond(
        self, condition: Tensor, first: Callable[[], Any], second: Callable[[], Any]
    ) -> Any:
        """`first()` if a bool scalar is true, else `second()`.

        The scalar is equal on every replica. The functions return structures that are
        alike in shape and dtype; None may stand for a tensor in both.
        """
        ...

    def dense(
        self, x: Tensor, mask: Tensor | None, axes: tuple[int, ...]
    ) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
        """A ragged input and its mask as tensors; what is not ragged, as it is.

        Args:
            x: the input.
            mask: its mask, or None.
            axes: the channel axes, which they are in the tensors too.

        Returns:
            `(x, mask, restored)`: `restored(y)` has the rows of the input and the
            values of a tensor `y` like `x`.
        """
        ...

    def assert_mask_shape(
        self, mask: Tensor, x: Tensor, along: Sequence[int]
    ) -> Tensor:
        """The mask, after a check at run time that its sizes are those of `x`.

        Args:
            mask: of sizes that are partly unknown until it runs.
            x: the input.
            along: the axes of `x` that the axes of the mask stand for.
        """
        ...

    def replicated(self) -> bool:
        """Whether this code runs as one of several replicas with own statistics."""
        ...

    def average_updates(
        self,
        old: Sequence[Tensor | None],
        new: Sequence[Tensor | None],
        updated: Sequence[Tensor],
    ) -> Sequence[Tensor | None]:
        """Average the replicas' updates, so that all end with the same state.

        Only called if `replicated()`; see `averages.average_updates`.
        """
        ...

    def blend(
        self, old: Tensor, new: Tensor, usable: Tensor, momentum: float
    ) -> Tensor:
        """`old * momentum + new * (1 - momentum)` where `usable`, else `old`.

        The three have one shape; `old` and `new` have one dtype.
        """
        ...

    def add_offset(self, x: Tensor, offset: Tensor, axis: int) -> Tensor:
        """`x + offset`, with one value per channel along `axis`.

        As fast as the backend does it after a convolution, forward and backward.
        """
        ...

    def prunes(self, x: Tensor) -> bool:
        """Whether unused results of computing with `x` cost nothing.

        They do not where `x` belongs to a graph that is compiled before it runs.
        """
        ...

    def traced(
        self, function: Callable[..., Any], variables: Sequence[keras.Variable]
    ) -> Callable[..., Any]:
        """`function(batch, given)`, compiled when it is first called.

        One compilation serves batches of all sizes, if the backend can.

        Args:
            function: of `batch` and `given`, nests of tensors in which None may stand
                for one. It gives a list of tensors.
            variables: all that it reads or assigns.

        Returns:
            The compiled function; it raises for what cannot be compiled.
        """
        ...

    def current_trace(self) -> object:
        """What is being traced here and now, as a value to compare.

        It is equal within one graph, and to nothing outside of it.
        """
        ...

    def recording(self, loops: bool) -> AbstractContextManager[Any]:
        """A context to run a model in for its values, without gradients.

        Args:
            loops: whether loops over time steps run step by step, with values in hand.
        """
        ...


class Modes(Protocol):
    """The ways to run a function, for `verify`, `bench` and the benchmarks.

    `MODES` are their names, of "eager", "graph" and "xla"; `USUAL` is the one that
    `fit` uses; `VERSION` is that of the backend. `SUMS_IN_ORDER` says whether an op
    that the layer uses adds up one row after another the very values of the input, and
    so loses digits in long sums: then `verify` allows for that.
    """

    @property
    def MODES(self) -> tuple[str, ...]: ...

    @property
    def USUAL(self) -> str: ...

    @property
    def VERSION(self) -> str: ...

    @property
    def SUMS_IN_ORDER(self) -> bool: ...

    def in_mode(
        self,
        function: Callable[..., Any],
        variables: Sequence[Any],
        mode: str,
        signature: Signature | None = None,
    ) -> Callable[..., Any]:
        """A function of tensors, run in one of the modes.

        Args:
            function: the function.
            variables: all Keras variables that it reads or assigns.
            mode: one of `MODES`.
            signature: shapes and dtypes of its arguments; by default, all sizes are
                known while it is compiled.
        """
        ...

    def with_gradients(
        self,
        function: Callable[..., Any],
        variables: Sequence[Any],
        mode: str,
        signature: Signature | None = None,
    ) -> Callable[..., Any]:
        """A function of `x` and an upstream gradient, run in one of the modes.

        It gives `function(x)` and a list: the gradients of `sum(upstream *
        function(x))` with respect to `x` and to each trainable variable. The arguments
        are those of `in_mode`.
        """
        ...

    def wait(self, result: Any) -> Any:
        """The result, when the device has computed it."""
        ...

    def device(self) -> str:
        """Where ops run by default: "CPU:0", or "GPU:0 (its name)"."""
        ...
