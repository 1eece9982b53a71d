"""Train a recommender whose table never exists in full: clustered compositional embeddings in an ordinary torch loop.

5,000 users and items get 32 values each, in a tenth of the bytes of the full table. Some ids are popular, as ever;
the model learns who likes what, beside one whose ids share rows by a hash. Nine pairs in ten could be told at best.
Then the trained table is written to a file and looked up without torch.

Run it:  python examples/06_train_compressed.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import vqrs
import vqrs.torch

N_USERS, N_ITEMS, N_TASTES, DIM = 2000, 3000, 5, 32
N_PAIRS, EPOCHS, BATCH = 400_000, 12, 2048


def made_pairs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs of a user and an item, and whether the user liked it: who shares its taste mostly does."""
    user_tastes = torch.randint(N_TASTES, (N_USERS,), generator=generator)
    item_tastes = torch.arange(N_ITEMS) % N_TASTES
    # Popular ids come often: squares of uniform numbers.
    user = (torch.rand(N_PAIRS, generator=generator) ** 2 * N_USERS).long()
    item = (torch.rand(N_PAIRS, generator=generator) ** 2 * N_ITEMS).long()
    # Half of the items are shown because they suit.
    suits = item // N_TASTES * N_TASTES + user_tastes[user]
    item = torch.where(torch.rand(N_PAIRS, generator=generator) < 0.5, suits, item)
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


def train(method: str, pairs: torch.Tensor, likes: torch.Tensor) -> Recommender:
    """A model whose embedding has a tenth of the bytes; the last tenth of the pairs tells how good it is."""
    torch.manual_seed(0)
    # The one line that differs from nn.Embedding.
    embedding = vqrs.torch.methods()[method](N_USERS + N_ITEMS, DIM, ratio=10, random_state=0)
    model = Recommender(embedding)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    n_train = N_PAIRS * 9 // 10
    hooks = vqrs.torch.TrainingHooks(model, optimizer, epochs=EPOCHS, steps_per_epoch=-(-n_train // BATCH))
    for epoch in range(EPOCHS):
        for batch in torch.randperm(n_train).split(BATCH):
            loss = F.binary_cross_entropy_with_logits(model(pairs[batch]), likes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            hooks.after_step()
        hooks.after_epoch()  # ids are clustered here
        if epoch % 3 == 2:
            with torch.no_grad():
                right = ((model(pairs[n_train:]) > 0) == (likes[n_train:] > 0.5)).float().mean()
            print(f"{method}, epoch {epoch + 1}: {right:.1%} of the test pairs right")
    return model.eval()


def main() -> None:
    pairs, likes = made_pairs(torch.Generator().manual_seed(0))
    train("hash", pairs, likes)
    model = train("cce", pairs, likes)
    embedding = model.embedding
    print(f"table in full   {embedding.full_nbytes:>8,} bytes")
    print(f"while training  {embedding.training_nbytes():>8,} bytes, with gradients and Adam's state")
    print(f"for inference   {embedding.inference_nbytes():>8,} bytes")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recommender.safetensors"
        embedding.to_table().save(path)
        table = vqrs.open(path)
        print(f"its file        {path.stat().st_size:>8,} bytes")
        with torch.no_grad():
            assert torch.equal(torch.from_numpy(table[pairs[:100].numpy()]), embedding(pairs[:100]))


if __name__ == "__main__":
    main()
