"""A graph of bytes that is asked real numbers: the same answers to whole ones, and others in between."""

from __future__ import annotations

import networks
import numpy as np
import planted
import pytest

from tlexport.graph import retype


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_whole_numbers_are_answered_as_bytes_are(name: str) -> None:
    samples = networks.photographs(4)
    graph = networks.image(name, samples)
    floats = retype.taking_floats(graph)
    assert floats is not None
    right = planted.outputs(graph, samples)
    assert (planted.outputs(floats, samples.astype(np.float32)) == right).all()
    assert not np.allclose(planted.outputs(floats, samples.astype(np.float32) / 255), right)


def test_where_nothing_is_cast_there_is_no_such_graph() -> None:
    assert retype.taking_floats(networks.table()[0]) is None, "it takes real numbers as it is"
    samples = networks.photographs(4)
    inverted = planted.images(networks.SIZE)["inverted grey levels"]
    assert retype.taking_floats(planted.planted(networks.image("test_resnet", samples), inverted)) is None
