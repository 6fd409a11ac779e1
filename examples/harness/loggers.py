"""Records sent to TensorBoard, for those who ask for it; Weights & Biases can follow its files."""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UserError
from .records import Row


@contextlib.contextmanager
def tensorboard(folder: Path, first_step: int) -> Iterator[Callable[[Row], None]]:
    """Log to FOLDER/tensorboard, in place of what an earlier run logged from `first_step` on."""
    try:
        module = importlib.import_module("tensorboardX")
    except ImportError as error:
        raise UserError("--tensorboard needs a package; pip install 'grokfast_jax[tensorboard]'") from error

    def log(row: Row) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name.replace("_", "/", 1), value, int(row["step"]))

    with contextlib.closing(module.SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)) as writer:
        yield log
