"""Every layout by the name that `--to` gives it."""

from __future__ import annotations

from tlexport.bundle.layouts import Layout, kserve, ort_server, ovms, ray_serve, triton

LAYOUTS: dict[str, Layout] = {
    "triton": triton, "kserve": kserve, "ort": ort_server, "ovms": ovms, "ray": ray_serve,
}  # fmt: skip
