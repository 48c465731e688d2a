"""Proof rows and user rows in one batch of a serving stack: the projections change the proof rows alone.

Run it with ``python examples/mixed_batch.py``. A stack that packs the tokens of all its sequences into one tensor
[tokens, hidden size] needs one more tensor, a bool for each token, and two calls: before its first layer and before its
head. The mask is data, so a compiled or captured forward takes any mix of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from poc_kernels import RandomProjection
from poc_kernels.protocol import nonce_inputs

BLOCK_HASH = "5f" * 32
HIDDEN_SIZE, VOCABULARY = 256, 1000


class PackedModel(nn.Module):
    """Stands for the stack's model: causal attention over packed sequences, as varlen kernels compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN_SIZE)
        self.qkv = nn.Linear(HIDDEN_SIZE, 3 * HIDDEN_SIZE)
        self.norm = nn.RMSNorm(HIDDEN_SIZE)
        self.head = nn.Linear(HIDDEN_SIZE, VOCABULARY, bias=False)

    def layers(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Compute hidden states [tokens, hidden size] of embeddings of that shape."""
        attended = []
        for sequence in self.qkv(self.norm(x)).split(lengths):
            q, k, v = (part.unsqueeze(0) for part in sequence.chunk(3, dim=-1))
            attended.append(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[0])
        return x + torch.cat(attended)


def forward(
    model: PackedModel, projection: RandomProjection | None, x: Tensor, is_proof: Tensor, lengths: list[int]
) -> Tensor:
    """Compute logits [sequences, vocabulary] of embeddings [tokens, hidden size]; is_proof: bool [tokens]."""
    if projection is not None:
        x = projection.pre(x, row_mask=is_proof)
    hidden = model.layers(x, lengths)
    last = torch.tensor(lengths).cumsum(0) - 1
    hidden, is_proof = hidden[last], is_proof[last]
    if projection is not None:
        hidden = projection.post(hidden, row_mask=is_proof)
    logits: Tensor = model.head(hidden)
    return logits


@torch.inference_mode()
def main() -> None:
    """Show two users' prompts and one nonce in a batch, with and without the round's projections."""
    torch.manual_seed(0)
    model = PackedModel().eval()
    projection = RandomProjection.from_block_hash(BLOCK_HASH, HIDDEN_SIZE)

    prompts = [torch.randint(VOCABULARY, (12,)), torch.randint(VOCABULARY, (5,))]
    nonce = nonce_inputs(BLOCK_HASH, "public key", [7], 16, HIDDEN_SIZE)[0]
    x = torch.cat([*(model.embedding(prompt) for prompt in prompts), nonce])
    lengths = [12, 5, 16]
    is_proof = torch.tensor([False, False, True]).repeat_interleave(torch.tensor(lengths))

    plain = forward(model, None, x, is_proof, lengths)
    mixed = forward(model, projection, x, is_proof, lengths)
    alone = forward(model, projection, nonce, torch.ones(16, dtype=torch.bool), [16])

    print("users' logits, bit for bit those of a batch without a round:", torch.equal(mixed[:2], plain[:2]))
    print("the proof's logits are projected:", not torch.equal(mixed[2], plain[2]))
    # The projections give a row the same bits in any batch. The model's own products may not: they choose their kernels
    # by the number of rows, which is why rounds run with one fixed shape.
    difference = (mixed[2] - alone[0]).abs().max() / alone.abs().max()
    print(f"the proof's logits against those of the proof alone: {difference:.1e} of the largest")


if __name__ == "__main__":
    main()
