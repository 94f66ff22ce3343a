"""Statistics of a model as a value: by path, in a file, pooled over machines."""

import os
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from keras_bn.moments import Moments, merged
from keras_bn.pages.files import write_whole


class Statistics(Mapping[str, Moments]):
    """The statistics of a model's normalizations: `Moments` by the path of the layer.

    They are plain arrays: a process can send them to another, or write them to a file.

    Args:
        moments: `Moments` by path, in arrays or numbers; the shape of the mean is that
            of the layer's statistics. A count of NaN is unknown. A channel whose mean
            or variance is not finite, or whose variance is negative, gets a count of 0.
        samples: how many samples they rest on; None if that is not known.

    Example:

    >>> import numpy as np
    >>> from keras_bn import Moments, Statistics
    >>> moments = Moments(np.array([2.0]), np.array([1.0]), np.array([0.5]))
    >>> statistics = Statistics({"bn": moments}, samples=2)
    >>> list(statistics), statistics["bn"].mean
    (['bn'], array([1.]))
    """

    def __init__(
        self, moments: Mapping[str, Moments], samples: float | None = None
    ) -> None:
        if not isinstance(moments, Mapping):
            raise TypeError(
                "Statistics must be a mapping of paths to `keras_bn.Moments`. "
                f"Received: {moments!r} ({type(moments).__name__})"
            )
        self._moments = {path: _arrays(path, part) for path, part in moments.items()}
        self.samples = samples

    def __getitem__(self, path: str) -> Moments:
        return self._moments[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def __repr__(self) -> str:
        of = "unknown" if self.samples is None else f"{self.samples:,g}"
        return f"<Statistics of {len(self)} layers, samples: {of}>"

    @property
    def has_counts(self) -> bool:
        """Whether it is known how many elements they rest on."""
        return all(not np.isnan(part.count).any() for part in self.values())

    def counted(self, samples: float) -> "Statistics":
        """The same statistics, to be pooled as those of this many samples.

        Moving statistics do not say how many samples they rest on. In `pooled`, each
        sample then counts for as many elements as in the other parts.

        Args:
            samples: 0 or greater.

        Returns:
            `Statistics` without counts of elements.

        Raises:
            ValueError: for a negative number.
        """
        if not samples >= 0:
            raise ValueError(
                f"`samples` must be 0 or greater. Received: samples={samples}"
            )
        unknown = {
            path: part._replace(count=np.full_like(part.mean, np.nan))
            for path, part in self.items()
        }
        return Statistics(unknown, samples)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them to a file of NumPy, completely or not at all.

        Args:
            path: of the file, usually ending in `.npz`. It may exist.

        Raises:
            OSError: if it cannot be written. What was there is there still.
        """
        arrays = {
            f"{i}/{name}": value
            for i, part in enumerate(self.values())
            for name, value in part._asdict().items()
        }
        samples = np.nan if self.samples is None else self.samples
        paths = np.array(list(self), "str")

        def write(part):
            # To an open file: NumPy would add `.npz` to another name.
            with part.open("wb") as file:
                np.savez(file, paths=paths, samples=samples, **arrays)

        write_whole(path, write, force=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Statistics":
        """Read what `save` has written.

        Args:
            path: of the file.

        Returns:
            `Statistics`.

        Raises:
            ValueError: for a file that holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                paths, samples = file["paths"].tolist(), float(file["samples"])
                moments = {
                    name: Moments(*(file[f"{i}/{part}"] for part in Moments._fields))
                    for i, name in enumerate(paths)
                }
        except FileNotFoundError:
            raise
        except Exception as error:  # NumPy raises anything for a file that is damaged
            raise ValueError(
                "`path` must be a file that `Statistics.save` has written. "
                f"Received: {os.fspath(path)!r}"
            ) from error
        return cls(moments, None if np.isnan(samples) else samples)


def pooled(parts: Iterable[Statistics]) -> Statistics:
    """The statistics of several parts of the data together.

    They are merged by their counts, so the variance includes the distance of the parts'
    means. An average of variances does not, as in federated averaging: for two equal
    parts, it is too small by a quarter of the squared distance.

    Args:
        parts: `Statistics` of the same layers. A channel that is not finite, or rests
            on no element, does not count.

    Returns:
        `Statistics`.

    Raises:
        TypeError: for parts that are no mappings.
        ValueError: for no parts, for parts of different layers or shapes, and for a
            part that does not say how many samples it rests on.

    Example:

    >>> import numpy as np
    >>> import keras_bn
    >>> from keras_bn import Moments, Statistics
    >>> day = Statistics({"bn": Moments(3.0, np.array([0.0]), np.array([1.0]))}, 3)
    >>> night = Statistics({"bn": Moments(1.0, np.array([4.0]), np.array([1.0]))}, 1)
    >>> whole = keras_bn.pooled([day, night])
    >>> print(whole["bn"].mean, whole["bn"].variance, whole.samples)
    [1.] [4.] 4
    """
    parts = [p if isinstance(p, Statistics) else Statistics(p) for p in parts]
    if not parts:
        raise ValueError("`parts` must not be empty. Received: parts=[]")
    for part in parts[1:]:
        check_fit(part, parts[0], "The parts have different layers or shapes")
    for number, part in enumerate(parts, 1):
        if part.samples is None and not part.has_counts:
            raise ValueError(
                f"Part {number} of {len(parts)} does not say how many samples it rests "
                "on, as moving statistics do not. Say how many it shall count for: "
                "`statistics.counted(1000)`."
            )
    moments = {path: _pooled(path, parts) for path in parts[0]}
    samples = [part.samples for part in parts if part.samples is not None]
    return Statistics(moments, sum(samples) if len(samples) == len(parts) else None)


def _pooled(path, parts):
    """The `Moments` of a layer in all parts together."""
    known = [part for part in parts if part.has_counts and part.samples]
    elements = 1.0
    if known:
        total = sum(part[path].count for part in known)
        elements = total / sum(part.samples for part in known)
    zero = np.zeros_like(parts[0][path].mean)
    whole = Moments(zero, zero, zero)
    for part in parts:
        moments = part[path]
        if not part.has_counts:
            counts = np.where(moments.count == 0, 0.0, part.samples * elements)
            moments = moments._replace(count=counts)
        whole = merged(whole, moments, np)
    return whole


def check_fit(statistics, others, saying):
    """Refuse statistics of other layers or shapes, with both lists.

    Args:
        statistics: `Moments` by path.
        others: `Moments` by path that they have to fit.
        saying: what is wrong if they do not.

    Raises:
        ValueError: if they do not.
    """
    lists = [
        {path: part.mean.shape for path, part in each.items()}
        for each in (statistics, others)
    ]
    if lists[0] != lists[1]:
        first, second = (
            ", ".join(f"{path} {shape}" for path, shape in one.items() - two.items())
            for one, two in (lists, lists[::-1])
        )
        raise ValueError(
            f"{saying}. Only in the one: {first or 'nothing'}. Only in the other: "
            f"{second or 'nothing'}."
        )


def _arrays(path, moments):
    """The moments as arrays of float64, with a count for each channel."""
    count, mean, variance = (np.asarray(part, "float64") for part in moments)
    shapes = count.shape, mean.shape, variance.shape
    try:
        count = np.broadcast_to(count, mean.shape)
        fits = variance.shape == mean.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"The Moments of '{path}' must have one shape, that of the layer's "
            "statistics. Received: count, mean and variance of the shapes "
            f"{', '.join(map(str, shapes))}"
        )
    usable = np.isfinite(mean) & np.isfinite(variance) & ~(variance < 0)
    return Moments(np.where(usable & ~(count < 0), count, 0.0), mean, variance)
