"""Text format: what is written is read back the same, whatever stands in a string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tlexport.bundle.layouts import pbtxt
from tlexport.bundle.layouts.pbtxt import Enum

SCALARS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.integers(-(2**63), 2**63 - 1), st.booleans()
)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.lists(SCALARS, min_size=1, max_size=3), max_size=4
    )
)
def test_every_string_comes_back(message: dict) -> None:
    assert pbtxt.read(pbtxt.write(message)) == message
    assert pbtxt.read(pbtxt.write({"outer": {"inner": message}})) == ({"outer": [{"inner": [message]}]})


def test_hostile_names_stay_inside_their_string() -> None:
    hostile = 'a"\n} backend: "python" #\\'
    text = pbtxt.write({"name": hostile, "kind": Enum("KIND_CPU")})
    assert text.count("\n") == 2
    assert pbtxt.read(text) == {"name": [hostile], "kind": ["KIND_CPU"]}


def test_what_people_write_by_hand_is_read() -> None:
    text = "name: 'x'"
    with pytest.raises(ValueError, match="not understood"):
        pbtxt.read(text)
    assert pbtxt.read('# c\ndims: [ 1, -1 ]\ndims: 3; input [ { name: "a" }, { name: "b" } ] on: true') == {
        "dims": [1, -1, 3],
        "input": [{"name": ["a"]}, {"name": ["b"]}],
        "on": [True],
    }


@pytest.mark.parametrize("text", ['a: "', "a {", "a: }", "a:", "}", 'a: "\\q"', "{" * 30, "a { " * 40])
def test_what_is_not_text_format_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        pbtxt.read(text)
