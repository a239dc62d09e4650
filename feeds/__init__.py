"""Any venue or file → the canonical message: wire schema, sequencing, tape, simulators."""
