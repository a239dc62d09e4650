"""The extra that the commands of ``octick model`` need, asked for before anything is begun."""

from __future__ import annotations

from feeds.errors import InputError


def need_models_extra(command: str) -> None:
    """Refuse in one line where the extra is not installed.

    Raises
    ------
    InputError
        Naming what is missing.
    """
    try:
        import matplotlib  # noqa: F401
        import optuna  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise InputError(
            'the extra "models" is not installed',
            where=command,
            expected="torch, matplotlib, optuna",
            found=str(error),
            fix="pip install 'octick[models]'",
        ) from None
