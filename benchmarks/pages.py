"""Pages of the docs of which a part is generated."""

from __future__ import annotations

from pituning.errors import PituningError


def fill(page: str, name: str, text: str) -> str:
    """A page with the block of a name replaced.

    Raises:
        PituningError: if the page does not have the block's two marks.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(begin) > page.index(end):
        raise PituningError(f"the page needs the marks {begin!r} and {end!r}, once and in this order")
    return page[: page.index(begin) + len(begin)] + f"\n{text}\n" + page[page.index(end) :]
