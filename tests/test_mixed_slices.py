"""Batches that hold slices with and without the object, seen through augmentation."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

from nnunet_uda.data.mixed_slices import MixedSliceLoader, empty_slices, is_mixed

LABELS = SimpleNamespace(all_labels=[1, 2], has_ignore_label=False, foreground_labels=[1, 2], ignore_label=None)
IGNORING = SimpleNamespace(all_labels=[0, 1], has_ignore_label=True, foreground_labels=[1], ignore_label=2)


class Cases:
    """A dataset of cases ``(1, 20, 24, 24)`` whose slices hold a block of label 1 or nothing."""

    def __init__(self, filled: dict[str, range], shape=(20, 24, 24), block=slice(8, 16)):
        self.identifiers = list(filled)
        self.filled, self.shape, self.block = filled, shape, block

    def load_case(self, identifier):
        seg = np.zeros((1, *self.shape), np.int16)
        seg[0, list(self.filled[identifier]), self.block, self.block] = 1
        seg[0, :, :2] = np.where(seg[0, :, :2] > 0, seg[0, :, :2], -1)  # outside the mask, as nnU-Net marks it
        places = np.argwhere(seg == 1)
        return np.zeros(seg.shape, np.float32), seg, None, {"class_locations": {1: places, 2: []}}


def loader(cases, batch_size=4, patch=(24, 24), oversample=0.0, transforms=None, log=lambda text: None):
    plain = nnUNetDataLoader(
        cases, batch_size, patch, patch, LABELS, oversample_foreground_percent=oversample, transforms=transforms
    )
    return MixedSliceLoader(plain, LABELS, log)


def kinds(batch):
    return (batch["target"] > 0).flatten(1).any(1).tolist()


@pytest.mark.parametrize("oversample", [0.0, 0.33, 1.0])
@pytest.mark.parametrize("filled", [range(1), range(19), range(5, 10)])
def test_every_batch_has_both_kinds_however_rare_one_is(filled, oversample):
    np.random.seed(0)
    cases = Cases({"a": filled, "b": filled})
    mixed = loader(cases, oversample=oversample)
    for _ in range(20):
        batch = next(mixed)
        assert len(batch["keys"]) == 4 and is_mixed(batch["target"])
        assert kinds(batch)[0] is False and kinds(batch)[-1] is True


def test_nnunets_own_loader_does_not_guarantee_it():
    np.random.seed(0)
    cases = Cases({"a": range(19)})
    plain = nnUNetDataLoader(cases, 4, (24, 24), (24, 24), LABELS, oversample_foreground_percent=0.33)
    assert not all(is_mixed(next(plain)["target"]) for _ in range(20))


def test_cases_without_the_object_or_without_empty_slices_are_known():
    empty, full = empty_slices(Cases({"none": range(0), "all": range(20), "some": range(3, 20)}))
    assert full == ["all", "some"] and list(empty) == ["none", "some"]
    assert empty["some"].tolist() == [0, 1, 2] and len(empty["none"]) == 20
    np.random.seed(0)
    mixed = loader(Cases({"none": range(0), "all": range(20)}))
    for _ in range(20):
        batch = next(mixed)
        assert batch["keys"][0] == "none" and batch["keys"][-1] == "all" and is_mixed(batch["target"])


def test_where_every_slice_has_it_patches_beside_it_serve():
    np.random.seed(0)
    said = []
    cases = Cases({"a": range(20)}, shape=(20, 64, 64), block=slice(4, 12))
    mixed = loader(cases, patch=(16, 16), log=said.append)
    assert sum(is_mixed(next(mixed)["target"]) for _ in range(20)) == 20
    assert "No slice" in said[0]
    whole = loader(Cases({"a": range(20)}))  # impossible: the patch is the slice
    assert kinds(next(whole)) == [True] * 4


def test_what_counts_is_the_patch_that_is_seen():
    """Augmentation that loses the object half of the time."""
    np.random.seed(0)

    def lose(image, segmentation):
        return {"image": image, "segmentation": segmentation * int(np.random.rand() < 0.5)}

    mixed = loader(Cases({"a": range(10, 20)}), transforms=lose)
    assert all(is_mixed(next(mixed)["target"]) for _ in range(30))


class PartlyLabelled(Cases):
    """In slices 10 to 15 a half is not labelled."""

    def load_case(self, identifier):
        data, seg, previous, _ = super().load_case(identifier)
        seg[0, 10:16, :12] = 2
        places, annotated = (np.insert(np.argwhere(where), 0, 0, 1) for where in (seg[0] == 1, seg[0] < 2))
        return data, seg, previous, {"class_locations": {1: places, (-1, 0, 1): annotated}}


def test_ignored_voxels_are_no_object_and_a_slice_with_them_is_not_empty():
    empty, full = empty_slices(PartlyLabelled({"a": range(3, 5), "b": range(0)}), 2)
    assert full == ["a"], "b has ignored voxels alone"
    assert empty["a"].tolist() == [0, 1, 2, *range(5, 10), *range(16, 20)]
    label = torch.zeros(2, 1, 4, 4, dtype=torch.int16)
    label[0, 0, 0, 0] = 2
    assert is_mixed(label) and not is_mixed(label, 2)
    label[1, 0, 0, 0] = 1
    assert not is_mixed(label, 2), "the other one may hold the object"
    np.random.seed(0)
    cases = PartlyLabelled({"a": range(3, 5), "b": range(0)})
    mixed = MixedSliceLoader(nnUNetDataLoader(cases, 4, (24, 24), (24, 24), IGNORING), IGNORING, lambda text: None)
    for _ in range(20):
        batch = next(mixed)
        assert is_mixed(batch["target"], 2) and not (batch["target"][0] > 0).any() and (batch["target"][-1] == 1).any()
    mixed.empty = {}  # where no slice lacks the object: places beside it, among what is labelled
    upper = np.array([11, 24, 24])
    assert not mixed._holds_location([10, 0, 0], upper, cases.load_case("b")[-1]["class_locations"])
    assert mixed._holds_location([3, 0, 0], [4, 24, 24], cases.load_case("a")[-1]["class_locations"])


def test_a_seed_decides_the_batches():
    def drawn(seed):
        np.random.seed(seed)
        mixed = loader(Cases({"a": range(3, 9), "b": range(5)}))
        return [torch.cat([next(mixed)["target"] for _ in range(3)]), list(next(mixed)["keys"])]

    first, again, other = drawn(3), drawn(3), drawn(4)
    assert torch.equal(first[0], again[0]) and first[1] == again[1]
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_small_batches_are_warned_of(batch_size):
    said = []
    mixed = loader(Cases({"a": range(10)}), batch_size, log=said.append)
    assert next(mixed)["target"].shape == (batch_size, 1, 24, 24)
    assert any("batch of 3" in text for text in said)


def test_only_positive_labels_are_objects():
    label = torch.zeros(3, 1, 4, 4, dtype=torch.int16)
    assert not is_mixed(label)
    label[0, 0, 0, 0] = -1
    assert not is_mixed(label), "outside the mask is no object"
    label[1, 0, 2, 2] = 2
    assert is_mixed(label)
    assert not is_mixed(torch.ones(2, 1, 3, 3))
