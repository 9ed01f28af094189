"""Splits: disjoint, complete, stratified, repeatable, and never through a group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tlexport.errors import DataError, LeakageError
from tlexport.modalities.splits import (
    check_groups,
    content_hashes,
    divide,
    shared_with,
    stratified,
    subset,
)


@given(st.integers(0, 999), st.lists(st.integers(4, 60), min_size=2, max_size=6))
@settings(max_examples=60, deadline=None)
def test_every_class_keeps_its_share(seed: int, sizes: list[int]) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(sizes)), sizes))
    parts = stratified(labels, (0.2, 0.1), seed)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    for part, share in zip(parts, (0.7, 0.2, 0.1), strict=True):
        counts = np.bincount(labels[part], minlength=len(sizes))
        assert (counts >= 1).all()
        assert (np.abs(counts - share * np.array(sizes)) <= 2).all()


def test_the_seed_decides_and_repeats() -> None:
    labels = np.arange(200) % 3
    one, again, other = (stratified(labels, (0.3,), seed)[1] for seed in (5, 5, 6))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_a_single_sample_of_a_class_goes_to_the_rest() -> None:
    labels = np.r_[np.zeros(30, int), 1]
    assert 30 in stratified(labels, (0.2, 0.2), 0)[0]
    assert 30 in stratified(labels, (0.6,), 0)[0]


@given(st.integers(0, 999), st.integers(5, 40))
@settings(max_examples=60, deadline=None)
def test_groups_never_cross(seed: int, count: int) -> None:
    random = np.random.default_rng(seed)
    groups = np.repeat([f"patient{i}" for i in range(count)], random.integers(1, 12, count))
    labels = random.integers(0, 3, len(groups))
    parts = stratified(labels, (0.15, 0.15), seed, groups)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(labels)))
    check_groups({str(i): groups[part] for i, part in enumerate(parts)})
    assert all(len(part) for part in parts)


def test_groups_are_balanced_over_classes() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(120), 8)
    labels = np.repeat(random.integers(0, 4, 120), 8)  # a whole group is of one class, the hard case
    for part, share in zip(stratified(labels, (0.2, 0.2), 1, groups), (0.6, 0.2, 0.2), strict=True):
        got = np.bincount(labels[part], minlength=4) / np.bincount(labels, minlength=4)
        assert np.abs(got - share).max() < 0.08


def test_multilabel_keeps_every_label_in_the_rest() -> None:
    random = np.random.default_rng(1)
    labels = (random.random((300, 6)) < [0.5, 0.3, 0.2, 0.1, 0.03, 0.0]).astype(np.uint8)
    labels[7, 5] = 1
    rest, test = stratified(labels, (0.25,), 3)
    assert (labels[rest].sum(axis=0) >= 1).all()
    assert abs(len(test) - 75) <= 2
    assert np.abs(labels[test].mean(axis=0) - labels.mean(axis=0)).max() < 0.05


def test_too_few_units_is_an_error() -> None:
    with pytest.raises(DataError, match="2 samples cannot be split into 3"):
        stratified(np.array([0, 1]), (0.2, 0.2), 0)
    with pytest.raises(DataError, match="2 groups"):
        stratified(np.zeros(9, int), (0.2, 0.2), 0, np.repeat(["a", "b"], [4, 5]))


def test_subset_is_stratified_and_no_larger() -> None:
    labels = np.repeat([0, 1, 2], [80, 15, 5])
    chosen = subset(labels, 20, 0)
    assert len(chosen) == 20
    assert np.bincount(labels[chosen]).tolist() == [16, 3, 1]
    assert len(subset(labels, 2, 0)) == 2


def test_check_groups_names_the_splits_the_groups_and_the_way_out() -> None:
    with pytest.raises(LeakageError, match=r"2 groups in both train and test: b, c.*data\.resplit=true"):
        check_groups({"train": np.array(["a", "b", "c"]), "val": None, "test": np.array(["c", "b", "x"])})
    check_groups({"train": np.array(["a"]), "test": np.array(["b"])})


def test_divide_by_what_is_stated() -> None:
    labels = np.arange(100) % 2
    everything = np.repeat(["train", "val", "test"], [60, 20, 20])
    rows, origin = divide(labels, everything, None, (0.15, 0.15), 0)
    assert [len(rows[n]) for n in ("train", "val", "test")] == [60, 20, 20] and set(origin.values()) == {
        "given"
    }

    rows, origin = divide(labels, np.repeat(["train", "val"], [80, 20]), None, (0.15, 0.15), 0)
    assert np.array_equal(rows["test"], np.arange(80, 100)) and origin["test"] == "the given val"
    assert len(rows["val"]) == 12 and set(rows["val"]) < set(range(80)) and "drawn" in origin["val"]

    rows, origin = divide(labels, np.repeat(["train", "test"], [80, 20]), None, (0.15, 0.15), 0)
    assert np.array_equal(rows["test"], np.arange(80, 100)) and origin["test"] == "given"

    for stated in (None, np.repeat("train", 100)):
        rows, origin = divide(labels, stated, None, (0.1, 0.2), 0)
        assert [len(rows[n]) for n in ("train", "val", "test")] == [70, 10, 20]
    with pytest.raises(DataError, match="no train"):
        divide(labels, np.repeat(["val", "test"], 50), None, (0.1, 0.2), 0)
    with pytest.raises(LeakageError):
        divide(labels, everything, np.arange(100) % 7, (0.1, 0.1), 0)


def test_duplicates_are_found_by_pixels_and_shape() -> None:
    random = np.random.default_rng(0)
    train = random.integers(0, 256, (5, 4, 6, 1), np.uint8)
    test = random.integers(0, 256, (3, 4, 6, 1), np.uint8)
    test[1] = train[4]
    assert shared_with(content_hashes(test), content_hashes(train)) == [(1, 4)]
    other_shape = train.reshape(5, 6, 4, 1)
    assert shared_with(content_hashes(other_shape), content_hashes(train)) == []
