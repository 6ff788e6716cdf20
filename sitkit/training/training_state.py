"""The training state (weights, averages, optimizer, schedule), saved to one file and restored from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sitkit.runs.checkpoint import (
    checkpoint_file,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    read_checkpoint,
)
from sitkit.runs.config.schema import Config
from sitkit.runs.run_folder import RunFolder, check_settings_of_checkpoint
from sitkit.runtime.distributed import ProcessGroup
from sitkit.runtime.errors import UserError
from sitkit.runtime.tensors import OLDER_FILE, save_tensors
from sitkit.training.ema import EMA
from sitkit.training.objective import Objective
from sitkit.training.optimizer import Optimization
from sitkit.training.parallel import gathered, shard_like


class TrainingState:
    """An objective, the averages of its network and its optimizer, on one device or sharded."""

    def __init__(self, objective: Objective, averages: EMA, optimization: Optimization, group: ProcessGroup) -> None:
        self.objective, self.averages, self.optimization, self.group = objective, averages, optimization, group

    def _modules(self) -> dict[str, nn.Module]:
        parts = self.objective.parts
        return {"model.": self.objective.network} | ({} if parts is None else {"parts.": parts})

    def save(self, folder: Path, config: Config, step: int) -> None:
        """Write the checkpoint of a step to a run's folder.  Every process calls it; the lead writes."""
        tensors: dict[str, Tensor] = {}
        for prefix, module in self._modules().items():
            tensors |= {f"{prefix}{name}": tensor for name, tensor in module.state_dict().items()}
        tensors |= self.averages.tensors() | optimizer_tensors(self.optimization.optimizer)
        whole = gathered(tensors, self.group)
        if self.group.lead:
            schedule = self.optimization.schedule.state_dict()
            header = {"format": 1, "step": step, "config": config.plain(), "schedule": schedule}
            save_tensors(checkpoint_file(RunFolder(folder).checkpoints, step), whole, header)
            prune_checkpoints(RunFolder(folder).checkpoints, config.run.keep)

    def resume(self, folder: Path, config: Config) -> int:
        """Restore the newest undamaged checkpoint of a run and return its step, or 0 if there is none.

        The checkpoint may be from any number of processes, replicated or sharded.  Raises UserError if it is damaged, or was
        trained with other settings.
        """
        newest = self.group.broadcast(latest_checkpoint(RunFolder(folder).checkpoints) if self.group.lead else None)
        if newest is None:
            return 0
        header, tensors = read_checkpoint(newest)
        check_settings_of_checkpoint(config, newest, header)
        try:
            self._restore(header, tensors)
        except UserError:
            raise
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"{newest} does not fit the training of its run: {reason}. {OLDER_FILE}") from None
        return int(header["step"])

    def _restore(self, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        for prefix, module in self._modules().items():
            own = module.state_dict()
            saved = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            module.load_state_dict({name: shard_like(t, own[name]) if name in own else t for name, t in saved.items()})
        self.averages.load(tensors)
        load_optimizer(self.optimization.optimizer, tensors)
        for parameter, moments in self.optimization.optimizer.state.items():
            # The moments were read whole.  The count of steps stays a plain number.
            moments.update({name: shard_like(m, parameter) for name, m in moments.items() if name != "step"})
        if "schedule" in header:
            self.optimization.schedule.load_state_dict(header["schedule"])
