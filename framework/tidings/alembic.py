"""For Alembic's autogenerate, which would drop every table that the application's `MetaData` does not have: ours, too.

It needs no Alembic itself, and touches no database.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["include_object"]

_OURS: Final = "tidings_"


def include_object(object: Any, name: str | None, type_: str, reflected: bool, compare_to: Any) -> bool:
    """For `context.configure(..., include_object=include_object)`: leave out what is Tidings' own.

    Left out are tables that are in the database and in no `MetaData`, and whose names begin with `tidings_`: a newer
    Tidings may have more of them than this one knows. A table in the application's `MetaData` is compared, whatever its
    name; one that was called so, and was taken out of it, is not dropped.
    Where there is such a function already, it asks this one first.
    """
    return not (type_ == "table" and reflected and compare_to is None and (name or "").startswith(_OURS))
