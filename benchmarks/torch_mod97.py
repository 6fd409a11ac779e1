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

    def split(self, y: torch.Tensor) -> torch.Tensor:
        """(batch, length, dim) to (batch, heads, length, dim / heads)."""
        return y.view(*y.shape[:2], self.heads, -1).transpose(1, 2)

    def feed(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The stream after the block, from that before and what attention reads."""
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.ln2(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream after the block: (batch, length, dim)."""
        x = self.ln1(x)
        key, value = self.key_value(x).chunk(2, dim=-1)
        query, key, value = map(self.split, (self.query(x), key, value))
        return self.feed(x, functional.scaled_dot_product_attention(query, key, value, is_causal=True))

    def go_on(self, x: torch.Tensor, past: torch.Tensor | None, readout: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream at the last `readout` positions, and keys and values of all so far: (batch, length, 2 dim)."""
        x = self.ln1(x)
        both = self.key_value(x) if past is None else torch.cat([past, self.key_value(x)], dim=1)
        x = x[:, -readout:]
        query, key, value = map(self.split, (self.query(x), *both.chunk(2, dim=-1)))
        visible = torch.ones(both.shape[1], both.shape[1], dtype=torch.bool, device=x.device).tril()[-readout:]
        return self.feed(x, functional.scaled_dot_product_attention(query, key, value, attn_mask=visible)), both


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

    def frugal(self, tokens: torch.Tensor, p: int) -> torch.Tensor:
        """The same with the arithmetic of our model: `x op` once for each x, the last block at the last position."""
        every_x = torch.arange(p, device=tokens.device)
        past = self.go_on(torch.stack([every_x, torch.full_like(every_x, p + 1)], dim=1), None)[1]
        x = self.go_on(tokens[:, 2:], [both[tokens[:, 0]] for both in past])[0]
        return self.head(self.ln(x[:, -1]))

    def go_on(self, tokens: torch.Tensor, past: list[torch.Tensor] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The stream at the last position, and the keys and values of all positions, block by block."""
        first = past[0].shape[1] if past else 0
        x = self.token(tokens) + self.position.weight[first : first + tokens.shape[1]]
        kept = []
        for i, block in enumerate(self.blocks):
            readout = 1 if i == len(self.blocks) - 1 else tokens.shape[1]
            x, both = block.go_on(x, past[i] if past else None, readout)
            kept.append(both)
        return x, kept


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

    def __init__(
        self,
        config: Config,
        weights: Weights,
        *,
        compiled: bool = False,
        frugal: bool = False,
        grokfast_pytorch: bool = False,
    ):
        self.config = config
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = Decoder(config.p + 2)
        load(model, weights)
        self.model = model.to(self.device)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = self.model
        if frugal:
            self.forward = lambda tokens: model.frugal(tokens, config.p)
        if compiled:
            self.forward = torch.compile(self.forward)
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
