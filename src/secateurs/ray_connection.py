"""A connection to a Ray cluster, for as long as it is needed."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from secateurs.errors import InputError

ANSWERS_WITHIN = 5.0
"""Seconds; Ray itself would wait for minutes."""


def check_address(address: str) -> None:
    """Refuse an address at which nobody listens.

    Raises:
        InputError: there is no connection to ``HOST:PORT`` or ``ray://HOST:PORT``.
    """
    found = re.fullmatch(r"(?:ray://)?\[?([^/\]]+)\]?:(\d+)", address)
    if found is None:
        return
    try:
        socket.create_connection((found[1], int(found[2])), ANSWERS_WITHIN).close()
    except (OSError, OverflowError) as error:  # the latter of a port above 65,535
        accepted = f"the address of a cluster that answers, or local ({error})"
        raise InputError("ray", address, accepted) from None


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """The module ray, connected.

    Args:
        address: of a cluster, ``auto``, or ``local`` for one that lives as long as the context.

    Raises:
        InputError: Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise InputError(
            "ray", address, "an installed ray: pip install secateurs[distributed]"
        ) from None
    check_address(address)
    try:
        ray.init(
            address=None if address == "local" else address,
            log_to_driver=False,
            include_dashboard=False if address == "local" else None,
            logging_level="error",
        )
    except (ConnectionError, ValueError) as error:
        raise InputError("ray", address, f"the address of a cluster, or local ({error})") from None
    try:
        yield ray
    finally:
        ray.shutdown()
