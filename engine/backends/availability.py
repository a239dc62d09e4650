"""Which backends are here: every registered one, its devices, and whether they open a bundle."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from engine.backends.registry import backend_names, default_device, find_backend
from engine.bundle import Bundle
from feeds.errors import InputError


class Availability(msgspec.Struct, frozen=True):
    """One device of one backend.

    Attributes
    ----------
    backend, device : str
        As in the config.
    opens : bool
        Whether it opens the bundle here.
    isa, library : str
        What computes, where it opens.
    reason : str
        Why it does not, in one line.
    """

    backend: str
    device: str
    opens: bool
    isa: str = ""
    library: str = ""
    reason: str = ""


def devices_of(name: str) -> tuple[str, ...]:
    """Devices that a backend says it has, whether they are here or not.

    A backend may say so by a class method ``devices()`` that gives their names; of one that does
    not, the device that the config takes without a word.

    Raises
    ------
    InputError
        If the backend cannot be imported.
    """
    said: Callable[[], tuple[str, ...]] | None = getattr(find_backend(name), "devices", None)
    return tuple(said()) if callable(said) else (default_device(name),)


def list_backends(
    bundle: Bundle, on_device: Callable[[str, float], None] = lambda _what, _share: None
) -> list[Availability]:
    """Open a bundle on every device of every registered backend, one after the other.

    Parameters
    ----------
    bundle : Bundle
    on_device : callable
        Takes what is being opened, and the share that is done, 0 to 1.
    """
    found: list[Availability] = []
    names = backend_names()
    for i, name in enumerate(names):
        on_device(name, i / len(names))
        try:
            devices = devices_of(name)
        except InputError as error:
            found.append(Availability(name, default_device(name), False, reason=str(error)))
            continue
        for device in devices:
            on_device(f"{name} {device}", i / len(names))
            found.append(_try(name, bundle, device))
    return found


def _try(name: str, bundle: Bundle, device: str) -> Availability:
    try:
        backend = find_backend(name).open(bundle, device)
        info = backend.info()
        backend.close()
    except InputError as error:
        return Availability(name, device, False, reason=str(error))
    except Exception as error:  # of third parties: one that breaks is not to hide the others
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Availability(name, device, False, reason=reason)
    return Availability(name, device, True, info.isa, info.library)
