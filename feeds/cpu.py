"""What the CPU that kernels are compiled for can do."""

from __future__ import annotations


def cpu_features() -> frozenset[str]:
    """Features as LLVM names them: this CPU's, or those that Numba was told to assume."""
    from numba.core.registry import cpu_target

    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return frozenset(name[1:] for name in features.split(",") if name.startswith("+"))
