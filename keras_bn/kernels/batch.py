"""Normalizing with the statistics of the batch, by whichever kernel suits it."""

from keras_bn.kernels import dispatch, fused, plain, synced


def normalize_batch(
    x, mask, gamma, beta, *, axes, epsilon, synchronized=False, group_size=None
):
    """`plain.normalize_batch`, or another kernel that gives the same where it pays.

    Args, returns and formulas: as there. `dispatch.choose` says which kernel it is.
    """
    shared = synchronized and synced.active()
    special = mask is not None or group_size is not None or shared
    if dispatch.choose(dispatch.known(x, axes, epsilon, special)) == "fused":
        return fused.normalize_batch(x, gamma, beta, axes=axes, epsilon=epsilon)
    return plain.normalize_batch(
        x,
        mask,
        gamma,
        beta,
        axes=axes,
        epsilon=epsilon,
        synchronized=synchronized,
        group_size=group_size,
    )
