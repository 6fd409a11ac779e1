"""The mod-97 model in plain PyTorch, with the filters of the packages on PyPI. Needs the extra "bench"."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from grokfast_pytorch import GrokFastAdamW
from pytorch_optimizer.optimizer.grokfast import gradfilter_ema, gradfilter_ma
from torch import nn
from torch.nn import functional

from examples.modular import Config

Weights = Mapping[str, Any]


class Block(nn.Module):
    """A Transformer block whose residual stream is the normalised one."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after the block: (batch, length, dim)."""
        x = self.ln1(x)
        batch, length, dim = x.shape
        split = lambda y: y.view(batch, length, self.heads, -1).transpose(1, 2)
        key, value = self.key_value(x).chunk(2, dim=-1)
        y = functional.scaled_dot_product_attention(split(self.query(x)), split(key), split(value), is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return x + self.down(functional.gelu(self.up(self.ln2(x))))


class Decoder(nn.Module):
    """Decoder-only Transformer with learned positions; the head is applied at the last position."""

    def __init__(self, tokens: int, dim: int = 128, depth: int = 2, heads: int = 4, positions: int = 5):
        super().__init__()
        self.token, self.position = nn.Embedding(tokens, dim), nn.Embedding(positions, dim)
        self.blocks = nn.ModuleList([Block(dim, heads) for _ in range(depth)])
        self.ln = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, tokens, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the token after the last of (batch, length) tokens."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x[:, -1]))


def load(model: Decoder, weights: Weights) -> None:
    """Copy the parameters of the Flax model into `model`."""

    def put(target: torch.Tensor, value: Any) -> None:
        with torch.no_grad():
            target.copy_(torch.from_numpy(np.array(value)))

    def linear(layer: nn.Linear, values: Weights) -> None:
        put(layer.weight, np.asarray(values["kernel"]).T)
        if "bias" in values:
            put(layer.bias, values["bias"])

    def norm(layer: nn.LayerNorm, values: Weights) -> None:
        put(layer.weight, values["scale"])
        put(layer.bias, values["bias"])

    put(model.token.weight, weights["token"])
    put(model.position.weight, weights["position"])
    for i, block in enumerate(model.blocks):
        values = weights["blocks"][i]
        for name in ("ln1", "ln2"):
            norm(getattr(block, name), values[name])
        for name in ("query", "key_value", "out"):
            linear(getattr(block, name), values["attention"][name])
        for name in ("up", "down"):
            linear(getattr(block, name), values[name])
    norm(model.ln, weights["ln"])
    linear(model.head, weights["head"])


class Trainer:
    """One run: the model, its optimizer and its filter."""

    def __init__(self, config: Config, weights: Weights, *, compiled: bool = False, grokfast_pytorch: bool = False):
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Decoder(config.p + 2)
        load(model, weights)
        self.model = model.to(self.device)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = torch.compile(self.model) if compiled else self.model
        betas = (config.beta1, config.beta2)
        self.filter = config.filter
        if grokfast_pytorch:  # its own AdamW with the EMA inside; decoupled decay
            self.filter = "none"
            self.optimizer: torch.optim.Optimizer = GrokFastAdamW(
                self.model.parameters(),
                lr=config.lr,
                betas=betas,
                weight_decay=config.weight_decay,
                grokfast_alpha=config.alpha,
                grokfast_lamb=config.lamb,
            )
        else:
            self.optimizer = torch.optim.Adam(
                self.model.parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay
            )
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(step / config.lr_warmup, 1.0) if config.lr_warmup else 1.0
        )
        self.memory: Any = None

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """Integers on the device."""
        return torch.from_numpy(values.astype(np.int64)).to(self.device)

    def step(self, tokens: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
        """One update; returns the loss before it."""
        loss = functional.cross_entropy(self.forward(tokens), answer)
        self.optimizer.zero_grad()
        loss.backward()
        if self.filter == "ema":
            self.memory = gradfilter_ema(self.model, self.memory, alpha=self.config.alpha, lamb=self.config.lamb)
        elif self.filter == "ma":
            self.memory = gradfilter_ma(
                self.model, self.memory, window_size=self.config.window_size, lamb=self.config.lamb
            )
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Part of the answers that are right."""
        right = sum((self.forward(tokens).argmax(-1) == answer).sum() for tokens, answer in batches)
        return float(right) / sum(len(answer) for _, answer in batches)
