"""A connection to a Ray cluster, for as long as it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from secateurs.errors import InputError


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
