"""The two kinds of prompts of UUDS, through CLIP's text transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_uda.errors import UDAError


class DualPrompts(nn.Module):
    """The domain prompt and the segmentation prompts, through CLIP's text transformer (sections 3.1.1 and 3.1.2).

    The domain prompt is a sentence. A segmentation prompt is M learnable vectors, shared by all classes, and the class
    name (CoOp, Zhou et al. 2022): ``<start> v_1 .. v_M name . <end>``. Both end at the output of their own end token
    under the causal mask, projected into the space CLIP shares with images.

    Only the rows of the token embedding that the prompts use are kept (and trained): no other can receive a gradient.
    ``tokens`` point into these rows, ``vocabulary`` says which of CLIP's tokens they are; both are filled by
    :meth:`set_prompts` and travel with the weights. The tokens after the longest prompt's end are cut: nothing before
    them can see them.

    Args:
        clip: open_clip's CLIP, built with as many tokens as :meth:`rows` says.
        num_structures: number of segmentation prompts.
        context_vectors: M.
    """

    mask: Tensor
    tokens: Tensor
    ends: Tensor
    vocabulary: Tensor

    def __init__(self, clip: Any, num_structures: int, context_vectors: int = 16) -> None:
        super().__init__()
        self.transformer = clip.transformer
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.register_buffer("mask", clip.attn_mask, persistent=False)
        length, width = self.positional_embedding.shape
        self.context = nn.Parameter(torch.empty(context_vectors, width))
        nn.init.normal_(self.context, std=0.02)
        self.register_buffer("tokens", torch.zeros(1 + num_structures, length, dtype=torch.long))
        self.register_buffer("ends", torch.zeros(1 + num_structures, dtype=torch.long))
        self.register_buffer("vocabulary", torch.full((self.rows(num_structures, length),), -1, dtype=torch.long))

    @staticmethod
    def rows(num_structures: int, context_length: int) -> int:
        """Token embeddings kept: as many as the prompts can use at most."""
        return (1 + num_structures) * context_length

    def set_prompts(self, domain_prompt: str, class_names: Sequence[str]) -> None:
        """Tokenise the prompts.

        Raises:
            UDAError: a prompt has more tokens than CLIP's text encoder takes.
        """
        from open_clip.tokenizer import SimpleTokenizer

        tokenizer, length = SimpleTokenizer(), self.tokens.shape[1]
        context = " ".join(["X"] * len(self.context))  # the places that the learnable vectors take
        rows = []
        for text in (domain_prompt, *(f"{context} {name.replace('_', ' ')}." for name in class_names)):
            row = [tokenizer.sot_token_id, *tokenizer.encode(text), tokenizer.eot_token_id]
            if len(row) > length:
                raise UDAError(f"the prompt {text!r} has {len(row)} tokens, CLIP's text encoder takes {length}")
            rows.append(row)
        used = sorted({token for row in rows for token in row})
        self.vocabulary.fill_(-1)[: len(used)] = torch.tensor(used)
        self.tokens.zero_()
        for index, row in enumerate(rows):
            self.tokens[index, : len(row)] = torch.tensor([used.index(token) for token in row])
            self.ends[index] = len(row) - 1

    @torch.no_grad()
    def load_tokens(self, embedding: Tensor) -> None:
        """Take the rows in use from CLIP's whole token embedding, ``(49408, width)``."""
        used = self.vocabulary[self.vocabulary >= 0].to(embedding.device)
        self.token_embedding.weight[: len(used)] = embedding[used].to(self.token_embedding.weight)

    def embedded(self) -> Tensor:
        """The input of the transformer without positions, ``(1 + K, L, width)``, L the longest prompt's length."""
        length = int(self.ends.max()) + 1
        embedded = self.token_embedding(self.tokens[:, :length])
        classes, end = self.tokens.shape[0] - 1, 1 + len(self.context)
        prompts = torch.cat([embedded[1:, :1], self.context.expand(classes, -1, -1), embedded[1:, end:]], 1)
        return torch.cat([embedded[:1], prompts])

    def forward(self) -> tuple[Tensor, Tensor]:
        """T^d, ``(E,)``, and T^s of every class, ``(K, E)``; float32 also under autocast, not normalised."""
        hidden = self.embedded()
        length = hidden.shape[1]
        hidden = hidden + self.positional_embedding[:length]
        hidden = self.ln_final(self.transformer(hidden, attn_mask=self.mask[:length, :length]))
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), self.ends]
        out = (pooled @ self.text_projection).float()
        return out[0], out[1:]
