"""The mod-97 experiment in plain PyTorch, with the filters of pytorch_optimizer. Needs the extra "bench"."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from pytorch_optimizer.optimizer.grokfast import gradfilter_ema, gradfilter_ma
from torch import nn
from torch.nn import functional

from examples.harness.experiment import Run
from examples.harness.train import Program, keys
from examples.modular import Modular


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

    def forward(
        self, x: torch.Tensor, past: torch.Tensor | None = None, readout: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream at the last `readout` positions (0: all), and keys and values so far: (batch, length, 2 dim)."""
        x = self.ln1(x)
        both = self.key_value(x) if past is None else torch.cat([past, self.key_value(x)], dim=1)
        x = x[:, -readout:]
        query, key, value = map(self.split, (self.query(x), *both.chunk(2, dim=-1)))
        square, end = x.shape[1] == both.shape[1], both.shape[1]
        visible = None if square else x.new_ones(end, end, dtype=torch.bool).tril()[-x.shape[1] :]
        y = functional.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=square)
        x = x + self.out(y.transpose(1, 2).reshape(x.shape))
        return x + self.down(functional.gelu(self.up(self.ln2(x)))), both


class Decoder(nn.Module):
    """Decoder-only Transformer with learned positions; the head is applied at the last position."""

    def __init__(self, task: Modular):
        super().__init__()
        self.p = task.p
        self.token, self.position = nn.Embedding(task.p + 2, task.dim), nn.Embedding(5, task.dim)
        self.blocks = nn.ModuleList([Block(task.dim, task.heads) for _ in range(task.depth)])
        self.ln = nn.LayerNorm(task.dim)
        self.head = nn.Linear(task.dim, task.p + 2, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the token after the last of (batch, length) tokens."""
        return self.head(self.stream(tokens)[0])

    def frugal(self, tokens: torch.Tensor) -> torch.Tensor:
        """The same with the arithmetic of our model: `x op` once for each x, the last block at the last position."""
        every_x = torch.arange(self.p, device=tokens.device)
        prefixes = torch.stack([every_x, torch.full_like(every_x, self.p + 1)], dim=1)
        past = self.stream(prefixes, readout=1)[1]
        return self.head(self.stream(tokens[:, 2:], [both[tokens[:, 0]] for both in past], readout=1)[0])

    def stream(
        self, tokens: torch.Tensor, past: Sequence[torch.Tensor] = (), readout: int = 0
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What the head reads at the last token, and keys and values of each block; `readout` is of the last block."""
        first = past[0].shape[1] if past else 0
        x = self.token(tokens) + self.position.weight[first : first + tokens.shape[1]]
        kept = []
        for block, before in zip(self.blocks, past or [None] * len(self.blocks), strict=True):
            x, both = block(x, before, readout if block is self.blocks[-1] else 0)
            kept.append(both)
        return self.ln(x[:, -1]), kept


def state_dict(params: Any) -> dict[str, torch.Tensor]:
    """The parameters of our model under PyTorch's names, matrices transposed."""
    renamed = {}
    for path, value in jax.tree.leaves_with_path(jax.device_get(params)):
        name = jax.tree_util.keystr(path, simple=True, separator=".").replace(".attention", "")
        layer, _, kind = name.rpartition(".")
        if kind in ("token", "position"):
            layer, kind = kind, "weight"
        tensor = torch.from_numpy(np.array(value))
        renamed[f"{layer}.{'bias' if kind == 'bias' else 'weight'}"] = tensor.T if kind == "kernel" else tensor
    return renamed


def evaluations(
    compiled: Program, run: Run, seed: int, *, frugal: bool = False, torch_compile: bool = False
) -> Iterator[tuple[float, list[float]]]:
    """Train indefinitely with the weights and batches of ours; yield the validation accuracy and losses of each chunk.

    The optimizer is Adam with coupled decay and a warm-up.
    """
    numbers, task, key = run.hyperparams, run.task, jax.random.key(seed)
    _, own = compiled.draw(key)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Decoder(task).to(device)
    model.load_state_dict(state_dict(compiled.init(run.traced, key).params))
    forward = model.frugal if frugal else model
    forward = torch.compile(forward) if torch_compile else forward
    optimizer = torch.optim.Adam(
        model.parameters(), lr=numbers["lr"], weight_decay=numbers["weight_decay"], betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 10, 1.0))
    # Arguments of the filter, by its function: an EMA has an alpha, an MA a window.
    gradfilter, memory = gradfilter_ema if "alpha" in numbers else gradfilter_ma, None
    options = {name: numbers[name] for name in ("alpha", "lamb", "window_size") if name in numbers}
    integers = lambda values: torch.from_numpy(np.array(values)).to(device).long()
    pairs = jnp.arange(task.pairs)
    inputs, targets = integers(task.tokens(pairs)), integers(task.answer(pairs))

    def examples(batches: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets of each batch, without its padding."""
        numbers = zip(*jax.device_get((batches["index"], batches["weight"])), strict=True)
        rows = [integers(index[weight > 0]) for index, weight in numbers]
        return [(inputs[row], targets[row]) for row in rows]

    batches = jax.jit(lambda chunk: task.batches(own, jax.random.fold_in(keys(key).batch, chunk)))
    validation = examples(task.validation(own))
    for chunk in itertools.count():
        losses = []
        for x, y in examples(batches(chunk)):
            loss = functional.cross_entropy(forward(x), y)
            optimizer.zero_grad()
            loss.backward()
            if options:
                memory = gradfilter(model, memory, **options)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        with torch.no_grad():
            right = sum((forward(x).argmax(-1) == y).sum() for x, y in validation)
        yield float(right) / sum(len(y) for _, y in validation), [float(loss) for loss in losses]
