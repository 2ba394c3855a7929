"""Lists that are read page by page, as OpenAI's are."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from starlette.requests import Request

from kvmesh.common.errors import invalid

_MOST = 100
# What `paging` reads, for the description of a route.
PAGING: dict[str, dict[str, Any]] = {
    "limit": {"type": "integer", "minimum": 1, "maximum": _MOST, "default": 20},
    "order": {"type": "string", "enum": ["asc", "desc"]},
    "after": {"type": "string"},
}


class Paging(NamedTuple):
    """What of a list is asked for."""

    limit: int
    newest_first: bool
    after: str
    """the id behind which the page begins; empty: at the beginning"""

    def cut(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """The page of `items`, which are the whole list, the oldest first. Raises KvmeshError."""
        if self.newest_first:
            items = items[::-1]
        if self.after:
            ids = [item["id"] for item in items]
            if self.after not in ids:
                raise invalid(f"after names {self.after!r}, which is not in the list", "after")
            items = items[ids.index(self.after) + 1 :]
        return listed(items[: self.limit], more=len(items) > self.limit)


def paging(request: Request, order: Literal["asc", "desc"]) -> Paging:
    """By a request's query; `order` is the default. Raises KvmeshError."""
    query = request.query_params
    limit, order_ = query.get("limit", "20"), query.get("order", order)
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 9 and 1 <= int(limit) <= _MOST):
        raise invalid(f"limit must be from 1 to {_MOST}", "limit")
    if order_ not in ("asc", "desc"):
        raise invalid("order must be asc or desc", "order")
    return Paging(int(limit), order_ == "desc", query.get("after", ""))


def listed(page: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """A page as a list object."""
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": more,
    }
