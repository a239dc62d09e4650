"""Any venue or file → the canonical message: wire schema, sequencing, tape, simulators."""

from feeds.compile_cache import use_compile_cache

use_compile_cache()
