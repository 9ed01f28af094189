"""From a PyTorch module to a clean graph, and graphs to and from files."""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import onnx_ir
import onnxscript.optimizer
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from tlexport import origin
from tlexport.errors import ExportError
from tlexport.graph import einsum, inspect
from tlexport.run import replacing, versions

if TYPE_CHECKING:
    import torch

BATCH = "batch"
LAST_WITHOUT_ATTENTION = 22  # from opset 23 on the exporter fuses attention into one operator
LIMIT = 2**31 - 2**20  # protobuf's limit of one message, less what the nodes take
INPUTS = ("uint8", "int32", "float32")  # element types that every backend reads
NO_TERM = 1e-8  # onnxscript's rewrite rules take a scalar this near to 0 for 0
METADATA = ("class_names", "preprocessing", "task")
# Notes of the exporter on a node: the operation it was made from; the modules around it, outermost first, and its name.
SOURCE, SCOPES = "pkg.torch.onnx.fx_node", "pkg.torch.onnx.name_scopes"

_log = logging.getLogger(__name__)


def trace(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    *,
    opset: int,
    input_names: tuple[str, ...],
    output_name: str,
    metadata: dict[str, str],
) -> onnx.ModelProto:
    """Export a module that takes tensors [N, ...], one for each of `input_names`, and returns float32 [N, K]; N is symbolic.

    `example` holds uint8, int32 or float32 tensors with N = 2 (a batch of 1 would be taken for a constant); all other
    dimensions stay as they are there. `metadata` needs `class_names` and `preprocessing` (both JSON) and `task`;
    `opset` and `tlexport_version` are added. The module is put into eval mode. The same module gives the same bytes;
    BatchNorm after Conv is folded, every node has a unique name and says which module it comes from (tlexport.origin),
    and nothing of the machine is left in the graph.
    Attention is spelt out in MatMuls whatever the opset: they can be quantised, and TensorRT-RTX refuses the fused
    operator in FP32.

    Raises ExportError if the module cannot be exported or the result breaks one of these promises.
    """
    if missing := [key for key in METADATA if key not in metadata]:
        raise ExportError(
            f"the graph's metadata lacks {', '.join(missing)} (it has: {', '.join(metadata) or 'nothing'})"
        )
    _require_size(sum(tensor.nbytes for tensor in module.state_dict().values()))
    _require_example(example, input_names)
    model = _export(module, example, min(opset, LAST_WITHOUT_ATTENTION), input_names, output_name)
    _strip(model, {name for name, _ in module.named_modules(remove_duplicate=False)})
    if opset > LAST_WITHOUT_ATTENTION:
        model = _converted(model, opset)
    model = einsum.to_matmul(model)
    _name_nodes(model.graph)
    stamp = {**metadata, "opset": str(opset), "tlexport_version": versions().get("tlexport", "unknown")}
    onnx.helper.set_model_props(model, dict(sorted(stamp.items())))
    _ensure_clean(model, input_names, output_name)
    return model


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write the graph to `path`, whole or not at all. Raises ExportError past 2 GB, StorageError if it cannot be written."""
    _require_size(model.ByteSize())
    with replacing(path) as partial:
        partial.write_bytes(model.SerializeToString(deterministic=True))


def load(path: Path) -> onnx.ModelProto:
    """Read and check a graph. Raises ExportError if the file is missing, damaged or not a valid ONNX model."""
    try:
        model = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(model)
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise ExportError(
            f"{path} is not a readable ONNX graph ({_first_line(error)}); export the run again"
        ) from error
    if any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in model.graph.initializer):
        raise ExportError(
            f"{path} keeps weights in other files; only graphs in one file (up to 2 GB) are read"
        )
    return model


def _require_example(example: tuple[torch.Tensor, ...], names: tuple[str, ...]) -> None:
    if len(example) != len(names):
        raise ExportError(f"{len(example)} example tensors for {len(names)} inputs ({', '.join(names)})")
    dtypes = {
        name: str(tensor.dtype).removeprefix("torch.") for name, tensor in zip(names, example, strict=True)
    }
    if strange := [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in INPUTS]:
        raise ExportError(f"{', '.join(strange)}; every backend takes inputs of {', '.join(INPUTS)}")


def _export(
    module: torch.nn.Module,
    example: tuple[torch.Tensor, ...],
    opset: int,
    input_names: tuple[str, ...],
    output_name: str,
) -> onnx.ModelProto:
    import torch

    with _quiet(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                module.eval(),
                example,
                dynamo=True,
                opset_version=opset,
                optimize=False,
                input_names=list(input_names),
                output_names=[output_name],
                dynamic_shapes=_free_batch(module, len(example)),
                verbose=False,
            )
            _keep_small_terms(program.model)
            program.optimize()
            model: onnx.ModelProto = program.model_proto
        except Exception as error:  # the exporter raises whatever the module's own code raises
            raise ExportError(f"the model cannot be exported to ONNX: {_root_cause(error)}") from error
    return model


def _keep_small_terms(model: onnx_ir.Model) -> None:
    """Hide the terms that the exporter's optimiser would drop: it takes `x + c` for `x + 0` up to |c| = 1e-8.

    Such a term keeps a division by a deviation of zero finite. Only scalars are recognised, so it becomes a vector of one.
    """
    onnxscript.optimizer.inline(model)
    onnxscript.optimizer.fold_constants(model)
    for node in list(model.graph):
        for index, value in enumerate(node.inputs if node.op_type in ("Add", "Sub") else ()):
            constant = None if value is None else value.const_value
            if constant is None or constant.shape.rank() or not 0 < abs(constant.numpy()) <= NO_TERM:
                continue
            kept = onnx_ir.tensor(constant.numpy().reshape(1), name=f"{value.name}_kept")
            initializer = onnx_ir.Value(
                name=kept.name, type=onnx_ir.TensorType(kept.dtype), shape=kept.shape, const_value=kept
            )
            model.graph.initializers[initializer.name] = initializer
            node.replace_input_with(index, initializer)


def _free_batch(module: torch.nn.Module, count: int) -> tuple[Any, ...]:
    """`dynamic_shapes` of torch.export: the first dimension, one and the same for all; starred arguments are one entry."""
    import torch

    batch = torch.export.Dim(BATCH)
    shapes: tuple[Any, ...] = tuple({0: batch} for _ in range(count))
    kinds = [parameter.kind for parameter in signature(module.forward).parameters.values()]
    if Parameter.VAR_POSITIONAL not in kinds:
        return shapes
    named = kinds.index(Parameter.VAR_POSITIONAL)
    return (*shapes[:named], shapes[named:])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's prints, warnings and log lines off the terminal; what it printed goes to our debug log."""
    printed = io.StringIO()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if printed.getvalue():
            _log.debug("the exporter printed:\n%s", printed.getvalue())


def _root_cause(error: BaseException) -> str:
    """The exporter wraps errors in pages of advice; the innermost one says what is wrong."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _require_size(size: int) -> None:
    if size > LIMIT:
        raise ExportError(
            f"the model takes {size / 2**30:.1f} GiB and one ONNX file holds at most 2; choose a smaller backbone"
        )


def _strip(model: onnx.ModelProto, modules: Collection[str]) -> None:
    """Drop stack traces (they hold paths of this machine), inferred shapes and doc strings; a node keeps its module's path."""
    graph = model.graph
    del graph.value_info[:]
    for entry in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        entry.ClearField("doc_string")
    for entry in (model, graph, *graph.input, *graph.output, *graph.initializer):
        entry.ClearField("metadata_props")
    weights = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        origin.set_module(node, _scope(node, modules, _owner(node, weights)))


def _scope(node: onnx.NodeProto, modules: Collection[str], owner: str) -> str:
    """The innermost of `modules` around a node that the exporter made: it writes names of its own between them.

    A layer that a BatchNorm was folded into carries the BatchNorm's notes; it goes by the `owner` of its weight.
    """
    notes = {entry.key: entry.value for entry in node.metadata_props}
    if owner in modules and "batch_norm" in notes.get(SOURCE, ""):
        return owner
    scopes: list[str] = ast.literal_eval(notes.get(SCOPES, "[]"))[:-1]
    return next((name for name in reversed(scopes) if name in modules), "")


def _owner(node: onnx.NodeProto, weights: Collection[str]) -> str:
    """Path of the layer whose weight a compute node reads; empty if it reads none."""
    if node.op_type not in inspect.COMPUTE:
        return ""
    owned = (name for name in node.input if name in weights and name.endswith(".weight"))
    return next(owned, "").removesuffix(".weight")


def _converted(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The graph in another opset. ONNX's converter drops the nodes' metadata, which comes back by what they make."""
    places = {node.output[0]: origin.module(node) for node in model.graph.node}
    converted = onnx.version_converter.convert_version(model, opset)
    for node in converted.graph.node:
        origin.set_module(node, places.get(node.output[0], ""))
    return converted


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Name a node that owns a weight after the layer (`net.layer1.0.conv1`), any other by operator and order."""
    weights = {tensor.name for tensor in graph.initializer}
    seen: Counter[str] = Counter()
    for node in graph.node:
        base = _owner(node, weights) or node.op_type
        node.name = f"{base}_{seen[base]}" if seen[base] or base == node.op_type else base
        seen[base] += 1


def _ensure_clean(model: onnx.ModelProto, input_names: tuple[str, ...], output_name: str) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exporter made an invalid graph: {_first_line(error)}") from error
    inputs, outputs = inspect.io(model)
    if tuple(spec.name for spec in inputs) != input_names or [spec.name for spec in outputs] != [output_name]:
        found = (", ".join(spec.name for spec in specs) or "none" for specs in (inputs, outputs))
        raise ExportError(
            f"the graph must have the inputs {', '.join(input_names)} and the output {output_name}; "
            f"it has the inputs {next(found)} and the outputs {next(found)}"
        )
    for spec in (*inputs, *outputs):
        if spec.shape[:1] != (BATCH,) or any(isinstance(d, str) for d in spec.shape[1:]):
            raise ExportError(
                f"{spec.name!r} has shape {list(spec.shape)}; the first dimension must be free ({BATCH!r}) and no other. "
                "Does the model fix its batch size?"
            )
    if unfolded := _unfolded(model.graph):
        raise ExportError(f"BatchNorm was not folded into {', '.join(unfolded[:5])}; quantisation needs that")
    names = Counter(node.name for node in model.graph.node)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ExportError(f"node names are not unique: {', '.join(twice[:5])}")


def _unfolded(graph: onnx.GraphProto) -> list[str]:
    """Convolutions whose only consumer is a BatchNormalization."""
    uses = Counter(name for node in graph.node for name in node.input)
    convolutions = {node.output[0]: node.name for node in graph.node if node.op_type == "Conv"}
    return [
        convolutions[node.input[0]]
        for node in graph.node
        if node.op_type == "BatchNormalization" and node.input[0] in convolutions and uses[node.input[0]] == 1
    ]
