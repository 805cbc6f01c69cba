"""The tree of errors: the picture in the docstring is the code's."""

import inspect
import re

import pytest

from umbel import errors
from umbel.errors import UmbelError

TREE = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, UmbelError)]


def test_the_picture_of_the_tree_has_every_error_with_its_parent() -> None:
    drawn = dict(re.findall(r"[├└]── (\w+) +(?:\((\w+)\))?", errors.__doc__ or ""))
    assert set(drawn) == {kind.__name__ for kind in TREE} - {"UmbelError"}
    for name, builtin in drawn.items():
        assert builtin in ("", *(parent.__name__ for parent in getattr(errors, name).__mro__)), name


@pytest.mark.parametrize("kind", TREE)
def test_every_error_is_caught_as_umbels_and_says_what_it_means(kind: type[UmbelError]) -> None:
    assert kind.__doc__
    with pytest.raises(UmbelError, match=r"^why$"):
        raise kind("why")
