"""The one exception that reaches the user: a single line that says what to do."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: a file, message, config, bundle or endpoint that cannot be used.

    The front door prints it as one line and exits with code 2.

    Parameters
    ----------
    what : str
        What is wrong, in a few words.
    where : str
        File and byte offset or line, config key, endpoint, or instrument.
    expected, found : str, optional
        What the format or the config asks for, and what stands there.
    fix : str, optional
        What the user can do about it.
    """

    def __init__(
        self, what: str, *, where: str, expected: str = "", found: str = "", fix: str = ""
    ) -> None:
        self.what, self.where = what, where
        self.expected, self.found, self.fix = expected, found, fix
        parts = [f"{where}: {what}"]
        if expected:
            parts.append(f"expected {expected}")
        if found:
            parts.append(f"found {found}")
        if fix:
            parts.append(fix)
        super().__init__("; ".join(" ".join(part.split()) for part in parts))
