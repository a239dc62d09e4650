"""Run the engine over tapes: digest, diff, verify, report."""
