"""Domain distillation loss of UUDS (equations 1 and 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def domain_discrepancy_loss(
    near: Tensor, far: Tensor, prompt: Tensor, temperature: float = 0.07, form: str = "similarity"
) -> Tensor:
    r"""L_DD: bring ``near`` to the domain prompt and ``far`` away from it.

    The printed equation is the logarithm of a softmax over distances (1 - sim) / tau, so it is negative and its
    gradient grows as it succeeds; with a minus in front it would do the opposite of what the text asks. The default is
    the cross-entropy over similarities that the text describes:

    .. math:: L_{DD} = -\log \frac{e^{sim(near, T)/\tau}}{e^{sim(near, T)/\tau} + e^{sim(far, T)/\tau}}
        = \mathrm{softplus}((sim(far, T) - sim(near, T)) / \tau)

    Args:
        near: ``(B, E)`` float, x_g^s (eq. 1) or x_g^{t->s} (eq. 2).
        far: ``(B, E)`` float, x_g^t. Row i is compared with row i of ``near``.
        prompt: ``(E,)`` float, T^d.
        temperature: tau, above 0; the paper gives none.
        form: ``"similarity"``, or ``"printed"`` for the equation as it stands, -softplus((sim(near, T) - sim(far, T)) /
            tau).

    Returns:
        Scalar, float32, also under autocast.
    """
    with torch.autocast(near.device.type, enabled=False):
        near, far = (F.cosine_similarity(x.float(), prompt.float()[None], dim=1) / temperature for x in (near, far))
        if form == "printed":
            return F.logsigmoid(far - near).mean()  # eqs 1 and 2
        return F.softplus(far - near).mean()
