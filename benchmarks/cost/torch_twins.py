"""The models of two experiments in plain PyTorch, with the filters of the packages on PyPI. Needs the extra "bench"."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from grokfast_pytorch import GrokFastAdamW
from pytorch_optimizer.optimizer.grokfast import gradfilter_ema, gradfilter_ma
from torch import nn
from torch.nn import functional

from examples.harness.config import Config
from examples.mnist import CLASSES, Mnist
from examples.modular import Modular

Weights = Mapping[Any, Any]


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

    def __init__(self, task: Modular, weights: Weights):
        super().__init__()
        self.p = task.p
        self.token, self.position = nn.Embedding(task.p + 2, task.dim), nn.Embedding(5, task.dim)
        self.blocks = nn.ModuleList([Block(task.dim, task.heads) for _ in range(task.depth)])
        self.ln = nn.LayerNorm(task.dim)
        self.head = nn.Linear(task.dim, task.p + 2, bias=False)
        put(self.token.weight, weights["token"])
        put(self.position.weight, weights["position"])
        for i, block in enumerate(self.blocks):
            values = {**weights["blocks"][i], **weights["blocks"][i]["attention"]}
            for name, layer in block.named_children():
                put_layer(layer, values[name])
        put_layer(self.ln, weights["ln"])
        put_layer(self.head, weights["head"])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the token after the last of (batch, length) tokens."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln(x[:, -1]))

    def frugal(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same with the arithmetic of our model: `x op` once for each x, the last block at the last position."""
        every_x = torch.arange(self.p, device=tokens.device)
        past = self.go_on(torch.stack([every_x, torch.full_like(every_x, self.p + 1)], dim=1), None)[1]
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


class MLP(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, weights: Weights):
        layers: list[nn.Module] = []
        for values in weights["layers"].values():
            layers += [nn.Linear(*values["kernel"].shape), nn.ReLU()]
            put_layer(layers[-2], values)
        super().__init__(*layers[:-1])


def put(target: torch.Tensor, value: np.ndarray) -> None:
    """Copy an array into a tensor."""
    with torch.no_grad():
        target.copy_(torch.from_numpy(np.array(value)))


def put_layer(layer: Any, values: Weights) -> None:
    """Copy the parameters of a layer of Flax, linear or LayerNorm, into that of PyTorch."""
    put(layer.weight, values["kernel"].T if "kernel" in values else values["scale"])
    if "bias" in values:
        put(layer.bias, values["bias"])


class Trainer:
    """One run: the model, its optimizer and its filter."""

    def __init__(
        self,
        config: Config,
        weights: Weights,
        *,
        torch_compile: bool = False,
        frugal: bool = False,
        grokfast_pytorch: bool = False,
    ):
        self.filtering, optimization = config.hyper
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = MLP(weights) if isinstance(config.task, Mnist) else Decoder(config.task, weights)
        self.model = model.to(self.device)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = model.frugal if frugal else model
        if torch_compile:
            self.forward = torch.compile(self.forward)
        self.squared = isinstance(config.task, Mnist)
        self.filter = self.filtering.filter
        numbers = {
            "lr": optimization.lr,
            "betas": (optimization.beta1, optimization.beta2),
            "weight_decay": optimization.weight_decay,
        }
        if grokfast_pytorch:  # its own AdamW with the EMA inside; decoupled decay
            self.filter = "none"
            inside = {"grokfast_alpha": self.filtering.alpha, "grokfast_lamb": self.filtering.lamb}
            self.optimizer: torch.optim.Optimizer = GrokFastAdamW(model.parameters(), **numbers, **inside)
        else:
            kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[optimization.optimizer]
            self.optimizer = kind(model.parameters(), **numbers)
        warmup = optimization.lr_warmup
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(step / warmup, 1.0) if warmup else 1.0
        )
        self.memory: Any = None

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """An array on the device, integers as PyTorch wants them for indices."""
        tensor = torch.from_numpy(np.array(values)).to(self.device)
        return tensor if tensor.is_floating_point() else tensor.long()

    def step(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One update; returns the loss before it."""
        output = self.forward(inputs)
        if self.squared:
            loss = functional.mse_loss(output, functional.one_hot(target, CLASSES).to(output.dtype))
        else:
            loss = functional.cross_entropy(output, target)
        self.optimizer.zero_grad()
        loss.backward()
        f = self.filtering
        if self.filter == "ema":
            self.memory = gradfilter_ema(self.model, self.memory, alpha=f.alpha, lamb=f.lamb)
        elif self.filter == "ma":
            self.memory = gradfilter_ma(self.model, self.memory, window_size=f.window_size, lamb=f.lamb)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
        """Part of the examples that are classified right."""
        right = sum((self.forward(inputs).argmax(-1) == target).sum() for inputs, target in batches)
        return float(right) / sum(len(target) for _, target in batches)
