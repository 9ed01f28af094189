"""Documents as `tlexport report` makes them, with invented numbers: one of images in classes, one of forecasts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from tlexport.evidence.report.document import Answers, Document, Source
from tlexport.results import Decision

PASSING = {
    "name": "openvino-int8-cpu", "backend": "openvino", "target": "cpu", "precision": "int8", "metric": 0.9571,
    "drop": 0.0012, "drop_low": -0.0008, "drop_high": 0.0031, "max_abs_error": 0.0211, "flips": 4, "flips_upper": 0.02,
    "p50_ms": 2.413, "p90_ms": 3.0, "p99_ms": 3.9, "speedup": 3.214, "size_bytes": 3_600_000, "receipt": "int8 x 50, fp32 x 3",
    "count": 300, "threads": 1, "calls_per_sample": 1, "throughput": {"1": 410.0, "8": 1900.0}, "dropped": "",
    "verdict": "pass", "reason": "", "file": "variants/openvino-int8-cpu/model.xml",
}  # fmt: skip
FAILING = PASSING | {
    "name": "onnxruntime-int8-cpu", "drop": 0.021, "drop_low": 0.012, "drop_high": 0.03, "verdict": "fail",
    "reason": "drop up to 0.0300, the gate is 0.0050", "p99_ms": None, "count": None, "throughput": None,
}  # fmt: skip
COMPILED = dict.fromkeys(PASSING) | {
    "name": "rtx-fp16-sm89", "target": "sm89", "precision": "fp16", "verdict": "compiled, not run here",
}  # fmt: skip
REFERENCE = dict.fromkeys(PASSING) | {
    "name": "torch-eager", "metric": 0.9583, "p50_ms": 7.8, "count": 300, "verdict": "reference",
}  # fmt: skip
SEARCH = {
    "graph": "int8-cpu", "budget": 0.005, "samples": 470, "evaluations": 7.5, "cost_model": "roofline of two cores",
    "trials": [
        {"step": "plain", "kept": [], "drop_high": 0.02, "low_macs": 1.0, "size_bytes": 9, "cost_ms": 0.5, "within": False},
        {"step": "layers left in FP32", "kept": ["conv<1>"], "drop_high": 0.004, "low_macs": 0.9, "size_bytes": 9,
         "cost_ms": 0.6, "within": True},
    ],
    "layers": [{"layers": ["conv<1>"], "noise": 0.25, "macs": 0.1, "kept": True}],
    "kept": ["conv<1>"],
    "note": "undecided: more samples would tell",
}  # fmt: skip
EVIDENCE = {
    "variant": "openvino-int8-cpu", "p": 0.00002, "p_adjusted": 0.0311, "needed": 1900,
    "flips": {"count": 4, "harmful": 3, "harmless": 1, "share": 0.02, "upper": 0.05, "mcnemar_p": 0.62},
    "auc": {"reference": 0.9583, "variant": 0.9571, "drop": 0.0012, "low": -0.0007, "high": 0.0029, "p": 0.21},
    "calibration": {
        "ece": 0.031, "ece_reference": 0.028, "ece_drift": 0.003, "ece_drift_low": -0.001, "ece_drift_high": 0.007,
        "brier": 0.09, "brier_reference": 0.088, "brier_drift": 0.002, "brier_drift_low": 0.001, "brier_drift_high": 0.003,
    },
    "slices": [
        {"slice": "class=pneumonia", "samples": 390, "reference": 0.97, "drop": 0.01, "drop_low": 0.0, "drop_high": 0.02,
         "p": 0.04, "note": "recall of the class"},
        {"slice": "group=7", "samples": 12, "reference": None, "drop": None, "drop_low": None, "drop_high": None, "p": None,
         "note": "too few samples"},
    ],
    "worst_slice": "class=pneumonia",
}  # fmt: skip
FILES = (
    "bench.json", "verify.json", "recipe.yaml", "manifest.json", "reference/labels.npy", "reference/outputs.npy",
    "reference/inputs.npy", "predictions/openvino-int8-cpu.npy", "bench-samples.npz", "checkpoint/history.jsonl",
    "variants/openvino-int8-cpu/receipt.json",
)  # fmt: skip


def document(classes: tuple[str, ...] = ("normal", "pneumonia"), **changes: Any) -> Document:
    """A binary or multiclass image run whose INT8 variant was chosen and whose decisions partly flip."""
    rng = np.random.default_rng(0)
    task = "binary" if len(classes) == 2 else "multiclass"
    slow, fast = rng.gamma(50, 0.16, 300), np.append(rng.gamma(50, 0.05, 299), 31.0)
    made = Document(
        recipe={
            "name": "chest-xray",
            "description": "pneumonia or not",
            "data": {"path": "pneumoniamnist.npz", "split": {"val": 0.15}},
            "gates": {"max_drop": 0.01, "max_p99_ms": None},
            "targets": ["cpu"],
        },
        finetune={
            "run": "/home/somebody/runs/cxr",
            "task": task,
            "metric": "auc",
            "classes": list(classes),
            "samples": {"train": 4708, "test": 200},
            "metrics": {"val": {"auc": 0.99}, "test": {"auc": 0.9583, "accuracy": 0.88}},
        },
        verify={
            "reference": 0.9583,
            "samples": 200,
            "confidence": 0.95,
            "gates": {"max_drop": 0.005, "max_p99_ms": None},
            "variants": [PASSING, FAILING],
            "decision": {"rule": "most probable class", "thresholds": None, "samples": 0},
            "evidence": [EVIDENCE],
        },
        bench={
            "reference": REFERENCE,
            "variants": [PASSING, FAILING, COMPILED],
            "front": ["openvino-int8-cpu"],
            "threads": 2,
            "machine": {
                "cpu": "AMD EPYC",
                "usable_cores": 2,
                "gpus": [{"name": "NVIDIA L4", "memory_mib": 23034}],
            },
            "withheld": ["onnxruntime-int8-cpu p99: 24 calls; p99 needs 299"],
            "notes": [],
            "raw": "bench-samples.npz",
            "watch": {"steal_percent": 0.2, "throttled": False},
        },
        quantize={"searches": [SEARCH], "refused": {"fp8": "no GPU for it"}},
        history=[{"epoch": e, "train_loss": 1 / e, "val": {"auc": 1 - 0.2 / e}} for e in range(1, 7)],
        receipts={
            "openvino-int8-cpu": {
                "source": "OpenVINO runtime model",
                "expected": {"conv1": "int8", "fc": "int8"},
                "layers": [
                    {"name": "conv1/fused", "kind": "Convolution", "dtype": "int8", "nodes": ["conv1"]},
                    {"name": "fc/fused", "kind": "MatMul", "dtype": "fp32", "nodes": ["fc"]},
                ],
                "disagreements": ["fc: asked int8, built fp32"],
            }
        },
        latency_ms={"torch-eager": slow.tolist(), "openvino-int8-cpu": fast.tolist()},
        started_s={
            "torch-eager": np.arange(300.0).tolist(),
            "openvino-int8-cpu": (np.arange(300) + 0.5).tolist(),
        },
        chosen={"cpu": ("openvino-int8-cpu", "fastest of 1 passing: p50 2.41 ms")},
        losers={"onnxruntime-int8-cpu": "fail: drop up to 0.0300, the gate is 0.0050"},
        answers=answers(classes, task),
        inputs_shown="samples whose decision changed (report.images: auto)",
        versions={"torch": "2.14.1"},
        sources={
            name: Source(name, f"{index:064x}", "as verify recorded it")
            for index, name in enumerate(FILES, start=1)
        },
    )
    return dataclasses.replace(made, **changes)


def answers(classes: tuple[str, ...], task: str, n: int = 200) -> Answers:
    """Outputs of a reference that is mostly right, and of a variant that is noisier; grey images."""
    rng = np.random.default_rng(1)
    labels = rng.integers(len(classes), size=n)
    scores = rng.normal(size=(n, len(classes))) + 1.5 * np.eye(len(classes))[labels]
    return Answers(
        task=task,
        classes=classes,
        labels=labels,
        reference=_softmax(scores),
        variants={"openvino-int8-cpu": _softmax(scores + 0.2 * rng.normal(size=scores.shape))},
        decision=Decision(rule="the most probable class", thresholds=None),
        inputs=rng.integers(256, size=(n, 1, 16, 16)).astype(np.uint8),
    )


def forecasts(times: bool = True) -> Document:
    """A regression of positive values over time."""
    rng = np.random.default_rng(2)
    actual = rng.lognormal(-9, 1, size=(400, 1)).astype(np.float32)
    made = actual * rng.lognormal(0, 0.3, size=actual.shape).astype(np.float32)
    days = np.datetime64("2019-01-01") + np.sort(rng.integers(900, size=400))
    found = Answers(
        task="regression",
        classes=("variance",),
        labels=actual,
        reference=made,
        variants={"openvino-int8-cpu": made * np.float32(1.01)},
        times=days if times else None,
    )
    base = document()
    evidence = {
        "variant": "openvino-int8-cpu",
        "forecast": {
            "loss": "qlike",
            "mean_difference": 0.0012,
            "statistic": 1.91,
            "p": 0.057,
            "periods": 400,
            "lags": 7,
        },
        "tails": {
            f"{key}{side}": 0.25 + 0.05 * bool(side)
            for key in ("rmse", "rmse_low_decile", "rmse_high_decile", "p99_error")
            for side in ("", "_reference")
        },
    }
    return dataclasses.replace(
        base,
        finetune={**base.finetune, "task": "regression", "metric": "qlike", "classes": ["variance"]},
        verify={**base.verify, "evidence": [evidence], "decision": None},
        answers=found,
    )


def _softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max(axis=1, keepdims=True))
    return (raised / raised.sum(axis=1, keepdims=True)).astype(np.float32)
