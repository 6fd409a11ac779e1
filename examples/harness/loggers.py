"""Records sent to TensorBoard and to Weights & Biases, for those who ask for it."""

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import write_whole
from .records import Row

Logger = Callable[[Row], None]


@contextlib.contextmanager
def tensorboard(folder: Path, first_step: int) -> Iterator[Logger]:
    """Log to FOLDER/tensorboard, in place of what an earlier run logged from `first_step` on."""
    writer = _module("tensorboardX", "tensorboard").SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def log(row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name.replace("_", "/", 1), value, int(row["step"]))

    with contextlib.closing(writer):
        yield log


@contextlib.contextmanager
def wandb(folder: Path, config: dict[str, Any]) -> Iterator[Logger]:
    """Log to Weights & Biases, a resumed run to the run there that it began as."""
    module = _module("wandb", "wandb")
    id_file = folder / "wandb_id"
    if not id_file.exists():
        write_whole(id_file, uuid.uuid4().hex)
    try:
        run = module.init(
            project="grokfast_jax", dir=folder, id=id_file.read_text("ascii"), resume="allow", config=config
        )
    except Exception as error:  # without an account, or with an unknown mode
        raise UserError(f"--wandb: {error}; log in by `wandb login`, or set WANDB_MODE=offline") from error
    with run:
        yield lambda row: run.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"--{extra} needs the package {name}; pip install 'grokfast_jax[{extra}]'") from error
