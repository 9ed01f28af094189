"""Modalities: where samples come from, how they are split and prepared, and which metrics judge them."""

from __future__ import annotations
