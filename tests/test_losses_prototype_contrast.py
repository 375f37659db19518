"""Feature dictionaries against Python queues, mean top-k and L_cl against loops."""

from __future__ import annotations

import math
from collections import deque
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.nn import functional as F

from nnunet_uda.errors import UDAError
from nnunet_uda.losses.prototype_contrast import PrototypeDictionary, prototype_contrastive_loss

CLASSES, CAPACITY, DIM = 4, 5, 3


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def dictionary_of(*calls: list[int], seed: int = 0) -> PrototypeDictionary:
    """A dictionary after one ``enqueue`` for each list of classes."""
    dictionary = PrototypeDictionary(CLASSES, CAPACITY, DIM)
    for number, classes in enumerate(calls):
        dictionary.enqueue(unit(len(classes), DIM, seed=100 * seed + number), torch.tensor(classes))
    return dictionary


def contents(dictionary: PrototypeDictionary) -> list[list[list[float]]]:
    """The entries of each class, oldest first."""
    classes = []
    for k in range(len(dictionary.count)):
        count, position = dictionary.count[k].item(), dictionary.position[k].item()
        capacity = dictionary.entries.shape[1]
        order = [(position - count + i) % capacity for i in range(count)]
        classes.append([dictionary.entries[k, slot].tolist() for slot in order])
    return classes


def reference_top_k(prototype, entries, k) -> float:
    cosines = []
    for entry in entries:
        dot = sum(a * b for a, b in zip(prototype, entry, strict=True))
        lengths = math.sqrt(sum(a * a for a in prototype)) * math.sqrt(sum(b * b for b in entry))
        cosines.append(dot / lengths)
    best = sorted(cosines, reverse=True)[:k]
    return sum(best) / len(best)


def reference_loss(prototypes, classes, dictionaries, k, tau) -> float:
    terms = []
    for dictionary in dictionaries:
        queues = contents(dictionary)
        for prototype, own in zip(prototypes.tolist(), classes.tolist(), strict=True):
            filled = [j for j in range(len(queues)) if queues[j]]
            if len(filled) < 2 or own not in filled:
                continue
            powers = {j: math.exp(reference_top_k(prototype, queues[j], k) / tau) for j in filled}
            terms.append(-math.log(powers[own] / sum(powers.values())))
    return sum(terms) / len(terms) if terms else 0.0


FILLINGS = {
    "nothing yet": [],
    "no rows": [[]],
    "one class": [[1, 1]],
    "not full": [[0, 2, 2], [2, 0, 1]],
    "exactly full": [[0, 0, 0], [0, 0]],
    "wrapped": [[0, 1, 0], [0, 1, 0, 0], [], [0, 2, 0, 0, 0], [1, 1, 1, 1]],
    "more than S at once": [[1, 0, 0], [0, 1, 0, 0, 2, 0, 0, 0, 1, 0, 0], [0, 2]],
    "many times S at once": [[2], [2] * 23, [2, 2]],
}


@pytest.mark.parametrize("calls", FILLINGS.values(), ids=FILLINGS.keys())
def test_enqueue_equals_python_queues(calls: list[list[int]]) -> None:
    dictionary = PrototypeDictionary(CLASSES, CAPACITY, DIM)
    queues = [deque(maxlen=CAPACITY) for _ in range(CLASSES)]
    written = [0] * CLASSES
    for number, classes in enumerate(calls):
        rows = unit(len(classes), DIM, seed=number)
        dictionary.enqueue(rows, torch.tensor(classes, dtype=torch.int64))
        for row, k in zip(rows.tolist(), classes, strict=True):
            queues[k].append(row)
            written[k] += 1
        assert contents(dictionary) == [list(queue) for queue in queues]
        assert dictionary.count.tolist() == [min(n, CAPACITY) for n in written]
        assert dictionary.position.tolist() == [n % CAPACITY for n in written]
    for k in range(CLASSES):
        assert not dictionary.entries[k, dictionary.count[k] :].any()


def test_entries_are_detached_copies() -> None:
    dictionary = PrototypeDictionary(CLASSES, CAPACITY, DIM)
    rows = unit(3, DIM).requires_grad_()
    dictionary.enqueue(rows * 1.0, torch.tensor([0, 1, 1]))
    assert not dictionary.entries.requires_grad
    before = dictionary.entries.clone()
    with torch.no_grad():
        rows.zero_()
    assert torch.equal(dictionary.entries, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_entries_are_float32(dtype: torch.dtype) -> None:
    dictionary = PrototypeDictionary(CLASSES, CAPACITY, DIM)
    rows = unit(2, DIM).to(dtype)
    dictionary.enqueue(rows, torch.tensor([0, 1], dtype=torch.int32))
    assert dictionary.entries.dtype == torch.float32
    assert torch.equal(dictionary.entries[:2, 0], rows.float())
    assert dictionary.mean_top_k(rows, 2)[0].dtype == torch.float32


@pytest.mark.parametrize("calls", FILLINGS.values(), ids=FILLINGS.keys())
@pytest.mark.parametrize("k", [1, 3, CAPACITY])
def test_mean_top_k_equals_the_loop(calls: list[list[int]], k: int) -> None:
    dictionary = dictionary_of(*calls)
    prototypes = 2.5 * unit(6, DIM, seed=50)  # cosines do not depend on the length
    similarity, filled = dictionary.mean_top_k(prototypes, k)
    queues = contents(dictionary)
    assert similarity.shape == (6, CLASSES)
    assert filled.tolist() == [bool(queue) for queue in queues]
    for n, prototype in enumerate(prototypes.tolist()):
        for j, queue in enumerate(queues):
            expected = reference_top_k(prototype, queue, k) if queue else 0.0
            assert similarity[n, j].item() == pytest.approx(expected, abs=1e-5)


def test_empty_slots_do_not_count_where_all_cosines_are_negative() -> None:
    dictionary = PrototypeDictionary(1, 4, 2)
    dictionary.enqueue(torch.tensor([[-1.0, 0], [-0.6, 0.8]]), torch.tensor([0, 0]))
    prototype = torch.tensor([[1.0, 0]])
    assert dictionary.mean_top_k(prototype, 1)[0].item() == pytest.approx(-0.6)
    for k in (2, 3, 4):
        assert dictionary.mean_top_k(prototype, k)[0].item() == pytest.approx(-0.8)


@pytest.mark.parametrize("k", [0, CAPACITY + 1])
def test_k_beyond_the_capacity_is_refused(k: int) -> None:
    dictionary = dictionary_of([0, 1])
    with pytest.raises(ValueError, match=f"capacity {CAPACITY}, not {k}"):
        dictionary.mean_top_k(unit(1, DIM), k)
    with pytest.raises(ValueError, match="capacity"):
        prototype_contrastive_loss(unit(1, DIM), torch.tensor([0]), [dictionary], k, 1.0)


@pytest.mark.parametrize("first", FILLINGS.values(), ids=FILLINGS.keys())
@pytest.mark.parametrize("second", [None, [[3, 3, 1], [0]]], ids=["alone", "with another"])
@pytest.mark.parametrize(("k", "tau"), [(1, 1.0), (3, 1.0), (CAPACITY, 0.2)])
def test_l_cl_equals_the_loop(first: list[list[int]], second: list[list[int]] | None, k: int, tau: float) -> None:
    dictionaries = [dictionary_of(*first)] + ([] if second is None else [dictionary_of(*second, seed=1)])
    prototypes, classes = unit(6, DIM, seed=50), torch.tensor([0, 1, 2, 3, 0, 2])
    loss = prototype_contrastive_loss(prototypes, classes, dictionaries, k, tau)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(reference_loss(prototypes, classes, dictionaries, k, tau), rel=1e-5)


def test_l_cl_by_hand() -> None:
    dictionary = PrototypeDictionary(3, 2, 2)
    dictionary.enqueue(torch.tensor([[1.0, 0], [0, 1], [1, 0]]), torch.tensor([0, 2, 0]))
    prototypes, classes = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([0, 2, 1])
    right, wrong = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))  # class 1 is empty: two choices, no third pair
    loss = prototype_contrastive_loss(prototypes, classes, [dictionary], 2, 1.0)
    assert loss.item() == pytest.approx((right + wrong) / 2, rel=1e-5)
    other = PrototypeDictionary(3, 2, 2)
    other.enqueue(torch.tensor([[0.0, 1], [1, 0]]), torch.tensor([1, 0]))
    loss = prototype_contrastive_loss(prototypes, classes, [dictionary, other], 1, 1.0)
    assert loss.item() == pytest.approx((right + wrong + right + right) / 4, rel=1e-5)  # pairs, not dictionaries


def test_gradient_reaches_the_prototypes_that_count_and_nothing_else() -> None:
    dictionary = dictionary_of([0, 1, 1], [1, 0])
    prototypes, classes = unit(4, DIM, seed=50).requires_grad_(), torch.tensor([0, 1, 3, 1])
    loss = prototype_contrastive_loss(prototypes, classes, [dictionary], 3, 1.0)
    before = dictionary.entries.clone()
    dictionary.enqueue(prototypes, classes)  # after the loss, before the backward pass
    loss.backward()
    assert torch.isfinite(prototypes.grad).all()
    assert (prototypes.grad.abs().sum(1) > 0).tolist() == [True, True, False, True]
    assert dictionary.entries.grad is None
    assert list(dictionary.parameters()) == []
    fresh = dictionary_of([0, 1, 1], [1, 0])
    assert torch.equal(fresh.entries, before)
    moved = prototypes.detach() - prototypes.grad
    assert prototype_contrastive_loss(moved, classes, [fresh], 3, 1.0) < loss


@pytest.mark.parametrize("calls", [[], [[1, 1]]], ids=["empty", "one class"])
@pytest.mark.parametrize("number", [0, 3])
def test_without_pairs_it_is_zero_with_a_graph(calls: list[list[int]], number: int) -> None:
    prototypes = unit(number, DIM).requires_grad_()
    classes = torch.ones(number, dtype=torch.int64)
    loss = prototype_contrastive_loss(prototypes, classes, [dictionary_of(*calls)] * 2, 3, 1.0)
    assert loss.item() == 0
    loss.backward()
    assert not prototypes.grad.any()


def test_float32_inside_autocast() -> None:
    dictionary = dictionary_of([0, 1, 2, 3], [2, 1])
    prototypes, classes = unit(6, DIM, seed=50), torch.tensor([0, 1, 2, 3, 0, 2])
    expected = prototype_contrastive_loss(prototypes, classes, [dictionary], 2, 1.0)
    expected_similarity = dictionary.mean_top_k(prototypes, 2)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prototype_contrastive_loss(prototypes, classes, [dictionary], 2, 1.0)
        similarity = dictionary.mean_top_k(prototypes, 2)[0]
    assert torch.equal(similarity, expected_similarity)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)


def test_state_goes_on_where_it_stopped(tmp_path: Path) -> None:
    dictionary = dictionary_of([0, 1, 0], [0, 0, 0, 0, 2])
    torch.save(dictionary.state_dict(), tmp_path / "state.pth")
    loaded = PrototypeDictionary(CLASSES, CAPACITY, DIM)
    loaded.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    for each in (dictionary, loaded):
        each.enqueue(unit(3, DIM, seed=9), torch.tensor([0, 1, 3]))
    assert set(dictionary.state_dict()) == {"entries", "count", "position"}
    for key, value in dictionary.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


@pytest.mark.parametrize("sizes", [(CLASSES + 1, CAPACITY, DIM), (CLASSES, 9, DIM), (CLASSES, CAPACITY, 7)])
def test_a_state_of_other_sizes_is_refused(sizes: tuple[int, int, int]) -> None:
    parts = torch.nn.ModuleDict({"dictionary": dictionary_of([0, 1])})
    before = parts["dictionary"].entries.clone()
    state = torch.nn.ModuleDict({"dictionary": PrototypeDictionary(*sizes)}).state_dict()
    with pytest.raises(UDAError) as caught:
        parts.load_state_dict(state)
    message = str(caught.value)
    assert "'dictionary'" in message
    assert "{} classes x {} entries x {} numbers".format(*sizes) in message
    assert f"{CLASSES} classes x {CAPACITY} entries x {DIM} numbers" in message
    assert "dictionary_size" in message
    assert torch.equal(parts["dictionary"].entries, before)


def test_a_state_without_the_dictionary_is_refused() -> None:
    with pytest.raises(RuntimeError, match="entries"):
        PrototypeDictionary(CLASSES, CAPACITY, DIM).load_state_dict({})


ROUNDS = [([0, 1, 0], [1]), ([], [2, 0, 0, 0, 1, 0, 0]), ([], []), ([3, 1, 1], [])]
"""Classes that rank 0 and rank 1 enqueue, call by call."""


def rows_of(rank: int, call: int) -> torch.Tensor:
    return unit(len(ROUNDS[call][rank]), DIM, seed=10 * call + rank)


def enqueue_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    dictionary = PrototypeDictionary(CLASSES, CAPACITY, DIM)
    for call, classes in enumerate(ROUNDS):
        dictionary.enqueue(rows_of(rank, call), torch.tensor(classes[rank], dtype=torch.int64))
    torch.save(dictionary.state_dict(), Path(folder, f"{rank}.pth"))
    distributed.destroy_process_group()


def test_two_processes_hold_equal_dictionaries(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(enqueue_on_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = PrototypeDictionary(CLASSES, CAPACITY, DIM)
    for call, (first, second) in enumerate(ROUNDS):
        rows = torch.cat((rows_of(0, call), rows_of(1, call)))
        expected.enqueue(rows, torch.tensor(first + second, dtype=torch.int64))
    for rank in range(2):
        state = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert all(torch.equal(state[key], value) for key, value in expected.state_dict().items())
