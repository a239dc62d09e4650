"""The compiled backend: one native function a step, made from the integer graph by Numba."""
