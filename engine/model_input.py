# Hot path: free @njit functions.
"""From raw features to the model's input, checked: INT8 would hide what is no number.

``x = clip((feature - mean) * inv_scale, -clip, clip)`` as float32, in the float64 operations that
training used. What is not finite, far out of range before the clip, or has not moved for longer
than it ever did in training is told by a bit; see `engine.trust.CHECK_NAMES`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from engine.trust import CHECK_INPUT, CHECK_RANGE, CHECK_STUCK_INPUT
from feeds.inner import inner

if TYPE_CHECKING:
    from engine.bundle import Bundle

# Rows of `norm`, float64 of shape (NORM_ROWS, n_features).
MEAN: Final = 0
INV_SCALE: Final = 1
BOUND: Final = 2  # greatest absolute value before the clip
MAX_CONSTANT: Final = 3  # inputs in a row of one value; 0 = not checked
NORM_ROWS: Final = 4

# Rows of an instrument's `seen`, float32 of shape (SEEN_ROWS, n_features).
LAST: Final = 0
RUN: Final = 1  # inputs before the last one that had its value
SEEN_ROWS: Final = 2


def new_norm(n_features: int, bundle: Bundle | None) -> np.ndarray:
    """`norm` of a bundle; without one features pass as they are."""
    norm = np.zeros((NORM_ROWS, n_features))
    norm[INV_SCALE] = 1.0
    norm[BOUND] = np.inf
    if bundle is not None:
        set_norm(norm, bundle)
    return norm


def set_norm(norm: np.ndarray, bundle: Bundle) -> None:
    """Take over a bundle's normalisation and bounds, in place."""
    norm[MEAN] = bundle.mean
    norm[INV_SCALE] = bundle.inv_scale
    norm[BOUND] = bundle.input_bound
    norm[MAX_CONSTANT] = bundle.max_constant


def normalised(vectors: np.ndarray, bundle: Bundle) -> np.ndarray:
    """The model's inputs of raw feature vectors, the same bits as `normalise`.

    Parameters
    ----------
    vectors : ndarray of float64, shape (n, n_features)

    Returns
    -------
    ndarray of float32, shape (n, n_features)
    """
    values = (vectors - bundle.mean) * bundle.inv_scale
    return np.clip(values, -bundle.clip, bundle.clip).astype(np.float32)


@inner("int64(float64[::1], float64[:,::1], float64, float32[:,::1], float32[:,::1])")
def normalise(vector, norm, clip, seen, x):  # type: ignore[no-untyped-def]
    """Write the model's input ``x[0]`` of a raw feature vector.

    Returns
    -------
    int
        0, or what the value check has against it.
    """
    bad = beyond = stuck = 0
    one, zero = np.float32(1.0), np.float32(0.0)
    # Every input takes the same way, whatever it is, so that four of them can take it at a time.
    for i in range(len(vector)):
        value = (vector[i] - norm[MEAN, i]) * norm[INV_SCALE, i]
        size = abs(value)
        finite = size < np.inf
        clipped = value if value > -clip else -clip
        clipped = clipped if clipped < clip else clip
        x[0, i] = np.float32(clipped) if finite else zero
        # Before the clip: a value that stays beyond it may well move.
        whole = np.float32(value)
        inside = finite & (size <= norm[BOUND, i])
        last, run = seen[LAST, i], seen[RUN, i]
        same = whole == last
        longer = run + one  # exact up to 2^24, then it stays
        seen[RUN, i] = (longer if same else zero) if inside else run
        seen[LAST, i] = whole if inside & (not same) else last
        most = norm[MAX_CONSTANT, i]
        bad |= 0 if finite else 1
        beyond |= 1 if finite & (not inside) else 0
        stuck |= 1 if inside & same & (most > 0.0) & (np.float64(longer) >= most) else 0
    return bad * CHECK_INPUT + beyond * CHECK_RANGE + stuck * CHECK_STUCK_INPUT
