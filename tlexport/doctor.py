"""What this machine can build and run, and what to install for the rest."""

from __future__ import annotations

from tlexport.backends import registry
from tlexport.evidence import machine
from tlexport.results import BackendInfo, DoctorResult
from tlexport.run import versions
from tlexport.targets import KNOWN


def examine() -> DoctorResult:
    """Ask every backend what it can do here; nothing is installed, compiled or loaded."""
    backends = tuple(
        BackendInfo(
            name=name,
            installed=found.installed,
            version=found.version,
            builds=found.builds,
            runs=found.runs,
            note=found.note,
            options=found.options,
        )
        for name, found in ((name, backend.availability()) for name, backend in registry.BACKENDS.items())
    )
    return DoctorResult(
        versions=versions(),
        machine=machine.describe().model_dump(mode="json"),
        backends=backends,
        targets={target: _state(target, backends) for target in KNOWN},
    )


def _state(target: str, backends: tuple[BackendInfo, ...]) -> str:
    builds = [b.name for b in backends if target in b.builds]
    runs = [b.name for b in backends if target in b.runs]
    if not builds:
        return "cannot be built here; build on a machine with that GPU and tlexport[tensorrt]"
    return f"built by {', '.join(builds)}; " + (
        f"run by {', '.join(runs)}"
        if runs
        else "not run here: accuracy is judged on the same typed graph, latency is not measured"
    )
