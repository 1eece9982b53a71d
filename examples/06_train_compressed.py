"""Train a recommender whose table never exists in full: clustered compositional embeddings in an ordinary torch loop.

50,000 users and items get 32 values each, in a twentieth of the bytes of the full table. Some ids are popular, as
everywhere; the model learns who likes what. Then the trained table is written to a file and looked up without torch.

Run it:  python examples/06_train_compressed.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import vqrs
import vqrs.torch

N_USERS, N_ITEMS, DIM, PAIRS, EPOCHS, BATCH = 20_000, 30_000, 32, 400_000, 4, 4096


def made_pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a user and an item, and whether the user liked it: who shares one of 20 tastes mostly does."""
    user_tastes = torch.randint(20, (N_USERS,), generator=generator)
    item_tastes = torch.arange(N_ITEMS) % 20
    # Popular ids come often: squares of uniform numbers.
    user = (torch.rand(PAIRS, generator=generator) ** 2 * N_USERS).long()
    item = (torch.rand(PAIRS, generator=generator) ** 2 * N_ITEMS).long()
    # Half of the items are shown because they suit.
    suits = item // 20 * 20 + user_tastes[user]
    item = torch.where(torch.rand(PAIRS, generator=generator) < 0.5, suits, item)
    chance = torch.where(user_tastes[user] == item_tastes[item], 0.9, 0.1)
    return torch.stack([user, N_USERS + item], 1), torch.bernoulli(chance, generator=generator)


class Recommender(nn.Module):
    """The inner product of a user's and an item's row; users and items lie in one table, one after the other."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, pairs: torch.Tensor) -> torch.Tensor:
        rows = self.embedding(pairs)
        return (rows[:, 0] * rows[:, 1]).sum(1)


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    pairs, likes = made_pairs(generator)
    train, test = slice(0, PAIRS * 9 // 10), slice(PAIRS * 9 // 10, PAIRS)

    # The one line that differs from nn.Embedding.
    embedding = vqrs.torch.methods()["cce"](N_USERS + N_ITEMS, DIM, ratio=20, random_state=0)
    model = Recommender(embedding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    steps = -(-len(pairs[train]) // BATCH)
    hooks = vqrs.torch.TrainingHooks(model, optimizer, epochs=EPOCHS, steps_per_epoch=steps)

    for epoch in range(EPOCHS):
        order = torch.randperm(len(pairs[train]), generator=generator)
        for batch in order.split(BATCH):
            loss = F.binary_cross_entropy_with_logits(model(pairs[train][batch]), likes[train][batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hooks.after_step()
        hooks.after_epoch()  # ids are clustered here
        with torch.no_grad():
            right = ((model(pairs[test]) > 0) == (likes[test] > 0.5)).float().mean()
        print(f"epoch {epoch + 1}: {right:.1%} of the test pairs right")

    print(f"table in full   {embedding.full_nbytes:>10,} bytes")
    print(f"while training  {embedding.training_nbytes():>10,} bytes, with gradients and Adam's state")
    print(f"for inference   {embedding.inference_nbytes():>10,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recommender.safetensors"
        embedding.to_table().save(path)
        table = vqrs.open(path)
        print(f"its file        {path.stat().st_size:>10,} bytes, ratio {table.ratio:.1f}")
        model.eval()
        with torch.no_grad():
            assert torch.equal(torch.from_numpy(table[pairs[:100].numpy()]), embedding(pairs[:100]))


if __name__ == "__main__":
    main()
