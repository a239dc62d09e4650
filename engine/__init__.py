"""Bytes in → signal out: book, features, triggers, backends, publisher, client."""

import feeds  # noqa: F401 - chooses the cache of compiled kernels before Numba is imported
