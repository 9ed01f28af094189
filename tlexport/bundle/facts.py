"""What is known of a model where it is packaged: all that its bill of materials and its card may say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tlexport.bundle.manifest import Manifest
from tlexport.recipe import Recipe
from tlexport.results import AccuracyEvidence, BenchResult, FinetuneResult, Variant, VerifyResult


@dataclass(frozen=True)
class Facts:
    document: Manifest  # without `files`
    recipe: Recipe
    tuned: FinetuneResult
    verified: VerifyResult
    measured: BenchResult
    data: dict[
        str, Any
    ]  # what finetune found of the data: source, counts, where the splits come from, sha256 ...
    checkpoint_sha256: str
    hashes: dict[str, str]  # file of the bundle -> SHA-256, of graphs, engines, receipts and golden samples
    finished: str  # when the last measurement ended: 2026-01-01T00:00:00Z
    images_in_report: bool  # the report shows test samples

    @property
    def chosen(self) -> dict[str, Variant]:
        """Target -> what it runs."""
        return {target: entry.variant for target, entry in self.document.targets.items()}

    def evidence(self, variant: Variant) -> AccuracyEvidence | None:
        return next((of for of in self.verified.evidence if of.variant == variant.name), None)
