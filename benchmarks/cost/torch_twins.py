"""The models of two experiments in plain PyTorch, with the filters of the packages on PyPI. Needs the extra "bench"."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from grokfast_pytorch import GrokFastAdamW
from pytorch_optimizer.optimizer.grokfast import gradfilter_ema, gradfilter_ma
from torch import nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from examples.harness.experiment import Run
from examples.harness.train import Program, keys
from examples.mnist import CLASSES
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


class MLP(nn.Sequential):
    """Linear layers with ReLU between them."""

    def __init__(self, weights: Weights):
        layers: list[nn.Module] = []
        for values in weights["layers"].values():
            layers += [nn.Linear(*values["kernel"].shape), nn.ReLU()]
            put_layer(layers[-2], values)
        super().__init__(*layers[:-1])


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error against one-hot targets."""
    return functional.mse_loss(output, functional.one_hot(target, CLASSES).to(output.dtype))


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
    """A run in PyTorch with the weights and batches of ours: Adam with coupled decay and a warm-up, MNIST AdamW."""

    def __init__(
        self,
        compiled: Program,
        run: Run,
        seed: int,
        *,
        torch_compile: bool = False,
        frugal: bool = False,
        grokfast_pytorch: bool = False,
    ):
        numbers, task, key = run.hyperparams, compiled.task, jax.random.key(seed)
        shared, own = compiled.draw(key)
        weights = jax.device_get(compiled.init(run.traced, key).params)
        options = {"lr": numbers["lr"], "weight_decay": numbers["weight_decay"]}
        if isinstance(task, Modular):
            pairs = jnp.arange(task.pairs)
            model, examples = Decoder(task, weights), (task.tokens(pairs), task.answer(pairs))
            make_optimizer, self.loss = torch.optim.Adam, functional.cross_entropy
            options["betas"], warmup = (0.9, 0.98), lambda step: min(step / 10, 1.0)
        else:
            model, examples = MLP(weights), (shared["images"], shared["labels"])
            make_optimizer, self.loss, warmup = torch.optim.AdamW, squared_error, lambda step: 1.0
        if grokfast_pytorch:  # an AdamW with the EMA inside
            make_optimizer = GrokFastAdamW
            options |= {"grokfast_alpha": numbers["alpha"], "grokfast_lamb": numbers["lamb"]}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = model.to(self.device)
        self.forward: Callable[[torch.Tensor], torch.Tensor] = model.frugal if frugal else model
        if torch_compile:
            self.forward = torch.compile(self.forward)
        self.optimizer: torch.optim.Optimizer = make_optimizer(model.parameters(), **options)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup)
        # Arguments of the filter, by its function: an EMA has an alpha, an MA a window.
        self.filter = gradfilter_ema if "alpha" in numbers else gradfilter_ma
        names = () if grokfast_pytorch else ("alpha", "lamb", "window_size")
        self.filter_options = {name: numbers[name] for name in names if name in numbers}
        self.memory: Any = None
        self.inputs, self.targets = map(self.tensor, jax.device_get(examples))
        self.batches = jax.jit(lambda chunk: task.batches(own, jax.random.fold_in(keys(key).batch, chunk)))
        self.validation = self.examples(task.validation(own))
        self.chunks = 0
        self.losses: list[float] = []  # of the last chunk

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """An array on the device, integers as PyTorch wants them for indices."""
        tensor = torch.from_numpy(np.array(values)).to(self.device)
        return tensor if tensor.is_floating_point() else tensor.long()

    def examples(self, batches: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Inputs and targets of each batch, without its padding."""
        numbers = zip(*jax.device_get((batches["index"], batches["weight"])), strict=True)
        rows = [self.tensor(index[weight > 0]) for index, weight in numbers]
        return [(self.inputs[row], self.targets[row]) for row in rows]

    def chunk(self) -> float:
        """Train one chunk; the validation accuracy after it."""
        losses = [self.step(*batch) for batch in self.examples(self.batches(self.chunks))]
        self.chunks += 1
        accuracy = self.accuracy()
        self.losses = [float(loss) for loss in losses]
        return accuracy

    def step(self, inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One update; returns the loss before it."""
        loss = self.loss(self.forward(inputs), target)
        self.optimizer.zero_grad()
        loss.backward()
        if self.filter_options:
            self.memory = self.filter(self.model, self.memory, **self.filter_options)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Part of the validation examples that are classified right."""
        right = sum((self.forward(inputs).argmax(-1) == target).sum() for inputs, target in self.validation)
        return float(right) / sum(len(target) for _, target in self.validation)

    def forward_gflop(self) -> float:
        """Operations of the matrix products of a forward pass of one batch, by PyTorch's count."""
        with FlopCounterMode(display=False) as counter:
            self.forward(self.validation[0][0])
        return counter.get_total_flops() / 1e9
