"""Prototype contrastive learning with feature dictionaries, L_cl.

Similarity-based prototypes (Ye, Ju, Ma and Zhang, arXiv 2510.20596).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunet_uda.collectives import gather_rows, global_mean
from nnunet_uda.errors import UDAError


class PrototypeDictionary(nn.Module):
    """The latest prototypes of one domain: for each class a first-in-first-out queue.

    Attributes:
        entries: ``(K, S, D)`` float32, in the state; slots that were never written are 0.
        count: ``(K,)`` int64, in the state, how many slots of a class are filled; these are the first ones.
        position: ``(K,)`` int64, in the state, the slot of a class that is written next.

    Args:
        num_classes: K, background included.
        capacity: S, entries for each class, 400 in the paper.
        dim: D, length of a prototype.
    """

    entries: Tensor
    count: Tensor
    position: Tensor

    def __init__(self, num_classes: int, capacity: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("entries", torch.zeros(num_classes, capacity, dim))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))
        self.register_buffer("position", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def enqueue(self, prototypes: Tensor, classes: Tensor) -> None:
        """Store prototypes, without a graph, in the given order; the oldest of a full class give way.

        Of more than S of one class the last S stay. Under ``torch.distributed`` this is a collective call: every rank
        stores the prototypes of all ranks in rank order, so that dictionaries that were equal remain so. Ranks may
        bring different numbers of prototypes, also none.

        Args:
            prototypes: ``(N, D)`` float.
            classes: ``(N,)`` integer, from 0 to K - 1.
        """
        num_classes, capacity, _ = self.entries.shape
        prototypes, classes = prototypes.to(self.entries), classes.to(self.count)
        prototypes, classes = gather_rows(prototypes), gather_rows(classes)
        belongs = classes[:, None] == torch.arange(num_classes, device=classes.device)
        new = belongs.sum(dim=0)
        earlier = belongs.cumsum(dim=0).gather(1, classes[:, None])[:, 0] - 1  # of the same class in this call
        slots = (self.position[classes] + earlier) % capacity
        stays = earlier >= new[classes] - capacity
        self.entries[classes[stays], slots[stays]] = prototypes[stays]
        self.position.copy_((self.position + new) % capacity)
        self.count.copy_((self.count + new).clamp(max=capacity))

    def mean_top_k(self, prototypes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Mean of the k largest cosines between each prototype and the entries of each class.

        Where a class has fewer than k entries, the mean of all of them. No gradient reaches the entries, and
        :meth:`enqueue` may be called before the backward pass.

        Args:
            prototypes: ``(N, D)`` float.
            k: from 1 to S; 20 in the paper.

        Returns:
            Similarity ``(N, K)`` float32, also under autocast, 0 for a class without entries; and ``(K,)`` bool, which
            classes have entries.
        """
        capacity = self.entries.shape[1]
        if not 1 <= k <= capacity:
            raise ValueError(f"mean top-k needs k between 1 and the dictionary's capacity {capacity}, not {k}")
        with torch.autocast(prototypes.device.type, enabled=False):
            cosines = torch.einsum(
                "nd,ksd->nks", F.normalize(prototypes.float(), dim=1), F.normalize(self.entries, dim=2)
            )
            slots = torch.arange(capacity, device=self.count.device)
            empty = slots >= self.count[:, None]
            best = cosines.masked_fill(empty, float("-inf")).topk(k, dim=2).values
            best = best.masked_fill(empty[:, :k], 0)  # a class with c < k entries has c finite values, which lead
            return best.sum(dim=2) / self.count.clamp(1, k), self.count > 0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        found = state_dict.get(f"{prefix}entries", self.entries).shape
        if found != self.entries.shape:
            sizes = "{} classes x {} entries x {} numbers"
            raise UDAError(
                f"Prototype dictionary '{prefix.removesuffix('.')}' of the checkpoint has {sizes.format(*found)}, but "
                f"the plans and dataset.json ask for {sizes.format(*self.entries.shape)}. Continue with the classes, "
                "'dictionary_size' and 'embedding_dim' that the training began with, or start a new one without --c"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def prototype_contrastive_loss(
    prototypes: Tensor, classes: Tensor, dictionaries: Sequence[PrototypeDictionary], k: int, temperature: float = 1.0
) -> Tensor:
    r"""L_cl: each prototype is to be more similar to its own class's entries than to those of the other classes.

    .. math:: L_{cl}(c, d) = -\log \frac{\exp(s_d(c, own) / \tau)}{\sum_j \exp(s_d(c, j) / \tau)}

    s_d(c, j) is the mean of the top-k cosines between prototype c and the entries of class j in dictionary d; j runs
    over the classes with entries there. A pair (c, d) counts where d has entries of c's own class and of another one;
    the loss is the mean over the pairs that count, of all processes. The gradient reaches the prototypes only.

    Args:
        prototypes: ``(N, D)`` float.
        classes: ``(N,)`` integer, from 0 to K - 1.
        dictionaries: at least one; of both domains in the paper.
        k: from 1 to the dictionaries' capacity S; 20 in the paper.
        temperature: tau, above 0; 1 in the paper.

    Returns:
        Scalar, float32, also under autocast; 0 with a graph where no pair counts.
    """
    losses = []
    with torch.autocast(prototypes.device.type, enabled=False):
        for dictionary in dictionaries:
            similarity, filled = dictionary.mean_top_k(prototypes, k)
            logits = (similarity / temperature).masked_fill(~filled, float("-inf"))
            counts = filled[classes] & (filled.sum() >= 2)
            losses.append(F.cross_entropy(logits[counts], classes[counts].long(), reduction="none"))
        pairs = torch.cat(losses)
        return global_mean(pairs.sum(), torch.tensor(len(pairs), device=pairs.device))
