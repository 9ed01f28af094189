"""What bench/search_cost.py times `tlexport build` against: one network for the same targets, written by hand.

torch.onnx.export, ONNX Runtime's quantize_static in the CPU's form and in TensorRT's, and TensorRT-RTX's compiler ahead of time
for an NVIDIA L4. Nothing is searched, judged, timed or bundled. python bench/by_hand.py RUN OUT cpu sm89
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from quantize_rivals import ort_cpu, ort_trt

from tlexport.evidence import machine
from tlexport.models.checkpoint import load_checkpoint
from tlexport.models.network import ServingModel


def export(run: Path, out: Path) -> None:
    """The network of the run, which a user has at hand, with a free batch."""
    import torch

    model = ServingModel(load_checkpoint(run / "checkpoint")[0]).eval()
    example = torch.from_numpy(
        np.load(run / "reference/inputs.npy", mmap_mode="r", allow_pickle=False)[:2].copy()
    )
    torch.onnx.export(
        model,
        (example,),
        out,
        dynamo=True,
        opset_version=20,
        input_names=["images"],
        dynamic_shapes=(({0: torch.export.Dim("batch")},),),  # its forward takes *inputs
    )


def compile_for_gpu(graph: Path, out: Path) -> None:
    """An engine for compute capability 8.9, batch 1 to 64."""
    import tensorrt_rtx as trt

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(graph.read_bytes()):
        raise SystemExit(f"TensorRT-RTX refuses {graph.name}: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    images = network.get_input(0)
    one = tuple(images.shape)[1:]
    profile.set_shape(images.name, (1, *one), (8, *one), (64, *one))
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise SystemExit(f"TensorRT-RTX cannot compile {graph.name}")
    out.write_bytes(memoryview(engine))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("targets", nargs="+", choices=("cpu", "sm89"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    fp32 = options.out / "fp32.onnx"
    export(options.run, fp32)
    samples = np.load(options.run / "reference/calibration.npy", allow_pickle=False)

    def asked(name: str) -> argparse.Namespace:
        return argparse.Namespace(fp32=fp32, out=options.out / name, vnni=machine.has_vnni())

    if "cpu" in options.targets:
        ort_cpu(asked("int8-cpu.onnx"), samples)
    if "sm89" in options.targets:
        ort_trt(asked("int8-trt.onnx"), samples)
        compile_for_gpu(options.out / "int8-trt.onnx", options.out / "int8-sm89.engine")


if __name__ == "__main__":
    main()
