"""Which column plays which part, by the names that people use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateurs.errors import unknown

EMBEDDING = ("embedding", "embeddings", "emb", "vector", "vectors", "features", "x")
ID = ("id", "ids", "uid", "key")
LABEL = ("label", "labels", "class", "y")


@dataclass(frozen=True)
class Names:
    """Columns by the part they play; those not given are found by the usual names."""

    embedding: str | None = None
    id: str | None = None
    label: str | None = None

    def find(
        self,
        role: str,
        usual: Sequence[str],
        present: Sequence[str],
        file: str,
        suited: Sequence[str] | None = None,
    ) -> str | None:
        """The column of a role, or None.

        Args:
            suited: columns that a usual name may mean; all that are present by default.

        Raises:
            InputError: it was given, and is not there.
        """
        given: str | None = getattr(self, role)
        if given is not None and given not in present:
            raise unknown(f"{role} of {file}", given, present)
        fit = present if suited is None else suited
        return given or next((name for name in usual if name in fit), None)
