"""A torch model with a compressed embedding: compress in one line, tune the codebooks, save, map back.

A small text classifier is trained, its embedding table is compressed more than 24 times, and the codebooks are tuned
on the model's own loss. Here that ends better than it began: words that share codebook entries learn from each other's
texts, so that the model overfits less. Do not count on it for a table that was trained on plenty.

Run it:  python examples/03_torch.py
"""

import tempfile
from pathlib import Path

import torch
from torch import nn

import vqrs
import vqrs.torch

N_WORDS, DIM, N_CLASSES, WORDS = 5_000, 32, 10, 20


def make_texts(n_texts: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of 20 words. Every tenth word of the vocabulary belongs to a class, and so does a quarter of a text."""
    labels = torch.randint(N_CLASSES, (n_texts,), generator=generator)
    words = torch.randint(N_WORDS, (n_texts, WORDS), generator=generator)
    on_topic = words[:, : WORDS // 4] // N_CLASSES * N_CLASSES + labels[:, None]
    return torch.cat([on_topic, words[:, WORDS // 4 :]], 1), labels


def train(model: nn.Module, texts: torch.Tensor, labels: torch.Tensor, lr: float, epochs: int) -> None:
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=lr)
    for _ in range(epochs):
        for batch, target in zip(texts.split(256), labels.split(256), strict=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), target).backward()
            optimizer.step()


@torch.no_grad()
def report(step: str, model: nn.Module, texts: torch.Tensor, labels: torch.Tensor, nbytes: int) -> None:
    logits = model(texts)
    accuracy = (logits.argmax(1) == labels).float().mean()
    loss = nn.functional.cross_entropy(logits, labels)
    print(f"{step:28} table {nbytes / 1024:8.0f} KiB   test loss {loss:.3f}   accuracy {accuracy:.1%}")


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    texts, labels = make_texts(8_000, generator)
    test = make_texts(2_000, generator)

    model = nn.Sequential(nn.EmbeddingBag(N_WORDS, DIM, mode="mean"), nn.Linear(DIM, N_CLASSES))
    nn.init.normal_(model[0].weight, std=0.01)
    train(model, texts, labels, lr=0.01, epochs=5)
    report("torch.nn.EmbeddingBag", model, *test, nbytes=4 * N_WORDS * DIM)

    # The one line. trainable=True makes parameters of the codebooks; the codes stay as they are.
    model[0] = vqrs.torch.EmbeddingBag.from_pretrained(model[0], ratio=24, trainable=True, random_state=0)
    report("compressed", model, *test, nbytes=model[0].to_table().nbytes)

    train(model, texts, labels, lr=0.005, epochs=3)
    report("codebooks tuned", model, *test, nbytes=model[0].to_table().nbytes)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.safetensors"
        model[0].to_table().save(path)
        # Mapped: nothing is read but the header, and processes that open the same file share its pages.
        model[0] = vqrs.torch.EmbeddingBag.from_table(path, mode="mean")
        report("mapped back", model, *test, nbytes=path.stat().st_size)
    print(model)


if __name__ == "__main__":
    main()
