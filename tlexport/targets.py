"""What an artifact is for: the CPU or a CUDA compute capability, by its own name or by a product's."""

from __future__ import annotations

import difflib
import re

ALIASES: dict[str, str] = {
    "t4": "sm75",
    "rtx2080": "sm75",
    "a100": "sm80",
    "a30": "sm80",
    "a10": "sm86",
    "a10g": "sm86",
    "a40": "sm86",
    "rtx3080": "sm86",
    "rtx3090": "sm86",
    "orin": "sm87",
    "l4": "sm89",
    "l40": "sm89",
    "l40s": "sm89",
    "rtx4080": "sm89",
    "rtx4090": "sm89",
    "h100": "sm90",
    "h200": "sm90",
    "gh200": "sm90",
    "b100": "sm100",
    "b200": "sm100",
    "b300": "sm103",
    "rtx5080": "sm120",
    "rtx5090": "sm120",
    "rtxpro6000": "sm120",
    "dgxspark": "sm121",
}
CAPABILITIES = ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
KNOWN = ("cpu", *CAPABILITIES)


def resolve(name: str) -> str:
    """The canonical target (`cpu`, `sm89`) for what a person typed (`CPU`, `8.9`, `RTX 4090`).

    Raises ValueError that names the nearest valid spelling.
    """
    key = re.sub(r"[\s_-]", "", name.strip().lower())
    if re.fullmatch(r"\d+\.\d", key):
        key = "sm" + key.replace(".", "")
    key = ALIASES.get(key, key)
    if key in KNOWN:
        return key
    near = difflib.get_close_matches(key, [*KNOWN, *ALIASES], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(
        f"unknown target {name!r}{hint} (targets: {', '.join(KNOWN)}; or a name such as l4, rtx4090)"
    )


def graph(precision: str, target: str) -> str:
    """Name of the typed graph of a precision: INT8 and INT4 have a flavour for CPUs and one for TensorRT."""
    return (
        f"{precision}-{'cpu' if target == 'cpu' else 'trt'}" if precision in ("int8", "int4") else precision
    )


def compute_capability(target: str) -> tuple[int, int]:
    """`sm89` -> (8, 9), `sm120` -> (12, 0)."""
    digits = target.removeprefix("sm")
    return int(digits[:-1]), int(digits[-1])
