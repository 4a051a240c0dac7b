"""A small language model for a demo: text that Python ships, a transformer, and its training.

A text documents a function of the standard library: the prompt is its signature, the answer its
docstring. The model reads and writes characters.
"""

import ast
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional

from bench.report import console

LENGTH = 160  # characters of a text: a longer one is cut, a shorter one padded
PADDING, CHARACTERS = 0, 96  # of these 96 the others are the characters of ASCII that print
HIDDEN, HEADS, LAYERS = 128, 4, 2
BATCH = 16  # texts
LEARNING_RATE = 3e-3  # the highest of the schedule
SEED = 20_150_604
Texts = tuple[Tensor, Tensor]  # characters (N, LENGTH), and which of them are an answer's


class Layer(nn.TransformerEncoderLayer):
    """A layer of a transformer, in which no character sees the ones after it."""

    def __init__(self) -> None:
        options: Any = {"batch_first": True, "norm_first": True}
        super().__init__(HIDDEN, HEADS, 4 * HIDDEN, 0.0, "gelu", **options)

    def forward(self, states: Tensor) -> Tensor:  # type: ignore[override]
        """Return the next layer's states (B, T, HIDDEN)."""
        mask = nn.Transformer.generate_square_subsequent_mask(states.shape[1], states.device)
        return super().forward(states, mask, is_causal=True)


class LanguageModel(nn.Module):
    """Embeddings of characters and positions, the layers, and a head for the next character."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, HIDDEN)
        self.position = nn.Embedding(LENGTH, HIDDEN)
        for table in (self.embedding, self.position):
            nn.init.normal_(table.weight, std=0.02)  # as in GPT-2; it learns faster so
        layers = [Layer() for _ in range(LAYERS)]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(HIDDEN))
        self.head = nn.Linear(HIDDEN, CHARACTERS)

    def forward(self, texts: Tensor) -> Tensor:
        """Return the hidden states (B, T, HIDDEN), of which the head makes next characters."""
        states: Tensor = self.layers(self.embedding(texts) + self.position.weight[: texts.shape[1]])
        return states

    def losses(self, texts: Texts) -> tuple[Tensor]:
        """Return the cross-entropy of a next character, prompts included, as what `fit` takes."""
        logits, following = self.head(self(texts[0][:, :-1])), texts[0][:, 1:]
        return (functional.cross_entropy(logits.mT, following, ignore_index=PADDING),)


def documented_functions() -> list[tuple[str, str]]:
    """Return the signatures and docstrings, each pair on a line."""
    found = {}
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                prompt = f'def {node.name}({ast.unparse(node.args)}): """'
                found[prompt] = " ".join(text.split()) + '"""'
    pairs, encoded = found.items(), range(ord(" "), ord("~") + 1)
    return [pair for pair in pairs if all(ord(letter) in encoded for letter in "".join(pair))]


def encode(pairs: Sequence[tuple[str, str]], device: torch.device) -> Texts:
    """Return the characters of prompts and answers as numbers, and which are the answers'."""
    texts = torch.full((len(pairs), LENGTH), PADDING)
    is_answer = torch.zeros(texts.shape, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(pairs):
        numbers = [1 + ord(letter) - ord(" ") for letter in prompt + answer][:LENGTH]
        texts[row, : len(numbers)] = torch.tensor(numbers)
        is_answer[row, len(prompt) : len(numbers)] = True
    return texts.to(device), is_answer.to(device)


def fit(
    network: nn.Module,
    losses_of: Callable[[Texts], tuple[Tensor, ...]],
    train: Texts,
    steps: int,
    name: str,
) -> list[float]:
    """Train the network in place on the sum of its losses; return the first one of each step."""
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    order = torch.Generator().manual_seed(SEED)
    first, out = [], console()
    for _ in track(range(steps), name, console=out, disable=not out.is_terminal):
        index = torch.randint(len(train[0]), (BATCH,), generator=order).to(train[0].device)
        losses = losses_of((train[0][index], train[1][index]))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        schedule.step()
        first.append(losses[0].item())  # reading it waits for a GPU
    return first
