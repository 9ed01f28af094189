"""What AOTInductor's generated code says of each product's real type: its library calls, and the types of their tensors.

The C++ that it wrote is compiled into the artifact as it stands, so that this is what runs, not what was asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tlexport.backends import receipt

_DTYPES = {
    **dict.fromkeys(("float32", "float"), "fp32"),
    **dict.fromkeys(("float16", "half", "at::Half", "c10::Half"), "fp16"),
    **dict.fromkeys(("bfloat16", "at::BFloat16", "c10::BFloat16"), "bf16"),
    **dict.fromkeys(("float64", "double"), "fp64"),
}
_BUFFER = re.compile(r"aoti_torch_empty_strided\(.*?cached_torch_dtype_(\w+),.*?&(\w+)_handle\)")
_CHECKED = re.compile(r"assert_size_stride\((\w+), .*?cached_torch_dtype_(\w+)")
_CONSTANT = re.compile(
    r'constants_info_\[(\d+)\]\.name = "(\w+)";\s*constants_info_\[\1\]\.dtype = .*?cached_torch_dtype_(\w+)'
)
_POINTER = re.compile(r"\((?:const )?([\w:]+)\*\)\((\w+)\.data_ptr\(\)\)")
_ALIAS = re.compile(
    r"auto (\w+) = (?:std::move|wrap_with_raii_handle_if_needed)\((?:reinterpret_tensor_wrapper\()?(\w+)"
)
_SOURCES = re.compile(r"// Topologically Sorted Source Nodes: \[(.*?)\]")
_CALL = re.compile(r"aoti_torch_[a-z]+_(\w+)\((.*)\)")
_NARROW = re.compile(r"\b(?:at|c10)::(?:Half|BFloat16)\b|\bbfloat16\b|\bhalf\b")
_KINDS = (
    ("convolution", re.compile("convolution")),
    ("attention", re.compile("scaled_dot_product")),
    ("product", re.compile(r"mm_|mm\b|linear")),
)
_STANDS_FOR = {"convolution": ["convolution"], "product": ["product"], "attention": ["product", "product"]}


@dataclass(frozen=True)
class Product:
    """A node of the exported program that multiplies, and the graph's nodes that stand for it."""

    name: str
    kind: str  # convolution, attention or product
    nodes: tuple[str, ...]


def kind(operator: str) -> str:
    """`convolution`, `attention` or `product` for an operator's or a library call's name; empty for any other."""
    return next((name for name, pattern in _KINDS if pattern.search(operator)), "")


def read_layers(wrapper: str, kernels: str, products: Sequence[Product]) -> list[receipt.Layer]:
    """The layers that `wrapper` (the C++ that runs the model) computes `products` in; `kernels` are its own loops.

    A call belongs to the last product among the nodes that it says it comes from. Fused ones name only what follows them
    (a ReLU): as many calls of a kind as products are left of that kind stand in the same order, and where all of them
    have one type, which is which does not matter. Any other product can only be in the generated loops.
    """
    calls = _calls(wrapper)
    owners = _named(calls, products)
    for sort in dict.fromkeys(call.kind for call in calls):
        left = [p for p in products if p.kind == sort and p not in owners.values()]
        unowned = [index for index, call in enumerate(calls) if call.kind == sort and index not in owners]
        if len(left) == len(unowned):
            owners |= dict(zip(unowned, left, strict=True))
    layers = [
        receipt.Layer(name=call.name, kind=call.operator, dtype=call.dtype, nodes=_nodes(owners.get(index)))
        for index, call in enumerate(calls)
    ]
    inside = [product for product in products if product not in owners.values()]
    unexplained = {call.kind for index, call in enumerate(calls) if index not in owners}
    nodes = tuple(node for product in inside if product.kind not in unexplained for node in product.nodes)
    if nodes:
        layers.append(
            receipt.Layer(name="generated loops", kind="C++", dtype=_loops(wrapper, kernels), nodes=nodes)
        )
    return layers


@dataclass(frozen=True)
class _Call:
    name: str
    operator: str
    kind: str
    dtype: str
    sources: tuple[str, ...]


def _calls(wrapper: str) -> list[_Call]:
    """The calls of library products, in order. A comment above a call names the program's nodes that it comes from."""
    types = _types(wrapper)
    found: list[_Call] = []
    sources: tuple[str, ...] = ()
    for line in wrapper.splitlines():
        if comment := _SOURCES.search(line):
            sources = tuple(comment[1].split(", "))
        elif (match := _CALL.search(line)) and (sort := kind(match[1])):
            dtype = _together(types[name] for name in re.findall(r"\w+", match[2]) if name in types)
            found.append(_Call(f"call {len(found)}", match[1], sort, dtype, sources))
            sources = ()
    return found


def _types(wrapper: str) -> dict[str, str]:
    """Floating-point tensor of the generated code -> dtype."""
    found = {name: dtype for dtype, name in _BUFFER.findall(wrapper)}
    found |= dict(_CHECKED.findall(wrapper))
    found |= {name: dtype for _, name, dtype in _CONSTANT.findall(wrapper)}
    found |= {name: dtype for dtype, name in _POINTER.findall(wrapper)}
    for alias, name in _ALIAS.findall(wrapper):
        if name in found:
            found.setdefault(alias, found[name])
    return {name: _DTYPES[dtype] for name, dtype in found.items() if dtype in _DTYPES}


def _named(calls: Sequence[_Call], products: Sequence[Product]) -> dict[int, Product]:
    """Call -> its product, where its comment names one of its kind."""
    by_name = {product.name: product for product in products}
    owners: dict[int, Product] = {}
    for index, call in enumerate(calls):
        named = [by_name[name] for name in call.sources if name in by_name]
        if named and named[-1].kind == call.kind and named[-1] not in owners.values():
            owners[index] = named[-1]
    return owners


def _nodes(product: Product | None) -> tuple[str, ...]:
    return product.nodes if product else ()


def _loops(wrapper: str, kernels: str) -> str:
    """The dtype of loops that are known only as a whole: `fp32` if no narrower one occurs anywhere in them."""
    found = set(_types(wrapper).values()) | {"narrow" for _ in _NARROW.finditer(kernels)}
    return "fp32" if found == {"fp32"} else _together(found)


def _together(dtypes: Iterable[str]) -> str:
    """One dtype, or all of them where they differ, which is none of the dtypes that can be asked for."""
    return "+".join(sorted(set(dtypes))) or "unknown"


def matched(
    program: Mapping[str, Sequence[tuple[str, str]]], graph: Mapping[str, Sequence[tuple[str, str]]]
) -> list[Product]:
    """The program's products with the graph's nodes that stand for them, module by module.

    Both map a module's path to its products in order, each (name, kind), the graph's attention being two of kind `product`.
    Where a module has as many of a kind on both sides, they stand in order; where it has not, its products stay without
    a node, and the receipt says that those were not found.
    """
    found = []
    for module, products in program.items():
        nodes = {
            sort: [name for name, of in graph.get(module, ()) if of == sort]
            for sort in ("convolution", "product")
        }
        needed = Counter(node for _, sort in products for node in _STANDS_FOR[sort])
        for sort, names in nodes.items():
            if len(names) != needed[sort]:
                names.clear()
        for name, sort in products:
            found.append(
                Product(name, sort, tuple(nodes[of].pop(0) for of in _STANDS_FOR[sort] if nodes[of]))
            )
    return found
