"""How a run is spread over devices."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from sjd2_lightning.config_groups import TrainConfig

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.strategies import Strategy


def build_strategy(config: TrainConfig, module: L.LightningModule) -> str | Strategy:
    """The strategy by name: `fsdp` is FSDP2, `deepspeed` its stage 2; other names are Lightning's.

    Raises:
        ValueError: deepspeed is not installed; or the model cannot be sharded.
    """
    name = config.trainer.strategy
    if name == "fsdp":
        from sjd2_lightning.sharding import ShardedModule, ShardedStrategy

        if not isinstance(module, ShardedModule):
            raise ValueError(f"trainer.strategy=fsdp: task={config.task} is small; use trainer.strategy=ddp")
        return ShardedStrategy()
    if name.startswith("deepspeed"):
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                f"trainer.strategy={name}: the package deepspeed is not installed; "
                "`pip install 'sjd2-lightning[deepspeed]'`, or use trainer=fsdp, which needs nothing more"
            )
        return "deepspeed_stage_2" if name == "deepspeed" else name
    return name


def build_plugins() -> list[Any]:
    """Verified checkpoints; under Slurm its processes, but not Lightning's way of queueing a job again."""
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    from sjd2_lightning.checkpoints import VerifiedCheckpointIO

    # ours saves at the end of a step and under our names, see `SaveOnTermination`
    environment = [SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []
    return [VerifiedCheckpointIO(), *environment]
