"""What a config.pbtxt declares, held against the graph: Triton's python backend does not, and others only when they load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tlexport.bundle.layouts import pbtxt
from tlexport.bundle.layouts.triton import TYPES
from tlexport.tensors import TensorSpec


def differences(
    config: bytes, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[str, ...]:
    """In words, one each: names that the graph has not or that are missing, other datatypes, other dims.

    The graph's first dimension is the batch: with max_batch_size it is left out of dims, and must be free or 1 in the graph.
    Raises ValueError for what is not text format.
    """
    document = pbtxt.read(config.decode())
    batch = int((document.get("max_batch_size") or [0])[0])
    found: list[str] = []
    for kind, specs in (("input", inputs), ("output", outputs)):
        told = {str(one["name"][0]): one for one in document.get(kind, []) if one.get("name")}
        if lost := len(document.get(kind, [])) - len(told):
            found.append(f"{lost} {kind} without a name of its own")
        graph = {spec.name: spec for spec in specs}
        found += [
            f"{kind} {name!r}: the graph has none ({', '.join(graph)})" for name in told if name not in graph
        ]
        found += [f"{kind} {name!r} is not declared" for name in graph if name not in told]
        for name in told.keys() & graph.keys():
            found += [f"{kind} {name!r}: {why}" for why in _tensor(told[name], graph[name], batch)]
    return tuple(found)


def _tensor(told: dict[str, list[Any]], spec: TensorSpec, batch: int) -> list[str]:
    wrong = []
    expected = f"TYPE_{TYPES.get(spec.dtype, '?')}"
    dtype = (told.get("data_type") or ["nothing"])[0]
    if dtype != expected:
        wrong.append(f"declared {dtype}, the graph has {expected}")
    dims = tuple(told.get("dims", []))
    shape = tuple(-1 if isinstance(d, str) else d for d in spec.shape)
    if batch:
        first = shape[0] if shape else None
        if first is None or (first != -1 and first != batch):
            wrong.append(f"max_batch_size is {batch}, the graph's first dimension {first}")
        shape = shape[1:]
    if dims != shape:
        wrong.append(f"declared dims {list(dims)}, the graph has {list(shape)}")
    return wrong
