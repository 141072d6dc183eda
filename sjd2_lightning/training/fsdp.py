"""FSDP2: weights, gradients and optimizer states spread over the ranks, and checkpoints in as many parts.

Around Lightning's `ModelParallelStrategy` and torch's distributed checkpoints.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from sjd2_lightning.models.backbone import Backbone
from sjd2_lightning.run.files import TEMPORARY, fsync_below, remove
from sjd2_lightning.training.batch import NoisyCodes
from sjd2_lightning.training.checkpoints import check_sharded, only_plain_values, write_sums
from sjd2_lightning.training.module import CodeBatch, SJD2Module
from sjd2_lightning.training.noise import TrainingNoise
from sjd2_lightning.training.objective import TokenLoss
from sjd2_lightning.training.redrafting import Corrections
from sjd2_lightning.training.states import TeacherForced

log = logging.getLogger(__name__)

_OLD = f".old{TEMPORARY}"
_GIB = 2**30
_USABLE = 0.8  # share of what a device has left for gathered weights, beside the cache of decoding
Found = TypeVar("Found")


class ShardedModule(SJD2Module):
    """`SJD2Module` whose trunk is gathered a layer at a time, and whose other weights for a whole step.

    With `bf16-mixed` weights are gathered in bfloat16, half of the traffic, and gradients are summed over the
    ranks in float32; what each rank keeps, and the optimizer steps on, has the type that it was loaded with.
    """

    IN_STEP = True

    def configure_model(self) -> None:
        """Shards over the data-parallel ranks; Lightning calls it once these exist, and again before use."""
        from torch.distributed.fsdp import (
            FSDPModule,
            MixedPrecisionPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        mesh = self.device_mesh
        if mesh is None or isinstance(self, FSDPModule):
            return
        # in a list, since a module would be sharded, trained and saved
        self._hollow = [hollow_copy(self.backbone)]
        trunk, strategy = self.backbone.trunk, self.trainer.strategy
        assert isinstance(strategy, ShardedStrategy)
        assert isinstance(trunk, nn.Module)
        policy = MixedPrecisionPolicy()
        if self.trainer.precision == "bf16-mixed":
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        plain = {p for p in self.parameters() if not p.requires_grad and not _within(p, trunk)}
        settings: dict[str, Any] = {"mesh": mesh["data_parallel"], "mp_policy": policy}
        for layer in trunk.get_submodule("layers").children():
            fully_shard(layer, reshard_after_forward=strategy.reshard, **settings)
        fully_shard(self, reshard_after_forward=strategy.reshard, ignored_params=plain, **settings)
        # embeddings and head are used outside a forward: everything a step does with weights is in here
        register_fsdp_forward_method(self, "gathered")

    @contextmanager
    def whole_backbone(self) -> Iterator[Backbone | None]:
        """A copy of the backbone with gathered weights, in the type that they are kept in.

        What decoding has made of the copy is kept for the next time, its weights are not. All ranks must come
        here.
        """
        from torch.distributed.tensor import DTensor

        prefix = "backbone."
        state = {name.removeprefix(prefix): value for name, value in self.state_dict().items()}
        sizes = [v.numel() * v.element_size() for v in state.values() if isinstance(v, DTensor)]
        needed, free = sum(sizes), room_on(self.device)
        if not self.trainer.strategy.reduce_boolean_decision(needed < _USABLE * free):
            log.warning(
                "no samples of this validation: trainer.strategy=fsdp gathers all weights on each device "
                "to decode, which takes %.1f GiB, and %.1f are left here; evaluate the exported weights "
                "instead, or set callbacks.sampling=null",
                needed / _GIB,
                free / _GIB,
            )
            yield None
            return
        (whole,) = self._hollow
        # Lightning may validate in inference mode, which tensors of several ranks do not know
        with torch.inference_mode(False), torch.no_grad():
            found = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in state.items()}
        whole.load_state_dict(found, assign=True)
        del found
        try:
            yield whole.to(self.device)
        finally:
            empty = {n: torch.empty_like(v, device="meta") for n, v in whole.state_dict().items()}
            whole.load_state_dict(empty, assign=True)

    def gathered(self, call: Callable[[], Found]) -> Found:
        """What a call finds that needs whole weights.

        Its arguments stay out of FSDP's sight, which would move levels of noise to the device.
        """
        return call()

    def losses(
        self, batch: CodeBatch, prompts: Sequence[Sequence[int]], noise: NoisyCodes | None
    ) -> TokenLoss:
        whole = super().losses
        return self.gathered(lambda: whole(batch, prompts, noise))

    def noise_of(
        self, sample: TeacherForced, levels: Tensor, grid: Tensor, noise: TrainingNoise, rng: torch.Generator
    ) -> NoisyCodes:
        whole = super().noise_of
        return self.gathered(lambda: whole(sample, levels, grid, noise, rng))

    def corrections(self, sample: TeacherForced, rng: torch.Generator) -> Corrections:
        whole = super().corrections
        return self.gathered(lambda: whole(sample, rng))


def hollow_copy(backbone: Backbone) -> Backbone:
    """A copy of a backbone in eval mode, whose weights take no memory: they are yet to be put in."""
    empty = {
        id(weight): nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        for weight in backbone.parameters()
    }
    return copy.deepcopy(backbone, cast(dict[int, Any], empty)).eval()


def room_on(device: torch.device) -> float:
    """Bytes that this process could still take on a GPU; of main memory nobody knows."""
    if device.type != "cuda":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _within(parameter: nn.Parameter, module: nn.Module) -> bool:
    return any(parameter is own for own in module.parameters())


class ShardedStrategy(ModelParallelStrategy):
    """Data-parallel FSDP2 over all ranks, whose checkpoints are folders that are whole or absent.

    Only plain values and tensors are read back: torch's own index is a pickle, whose names are compared with
    a list before it is opened.

    Args:
        reshard: whether a layer's gathered weights are dropped behind its forward pass and gathered again for
            the backward pass; otherwise they stay, which saves a third of the traffic and holds all weights.
    """

    def __init__(self, reshard: bool = True) -> None:
        super().__init__()
        self.reshard = reshard

    def setup_environment(self) -> None:
        """The mesh: all ranks hold parts of one copy."""
        self._tensor_parallel_size = 1
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Writes into a folder beside the old one, then puts it in its place.

        Raises:
            OSError: it cannot be written; the message names the path.
        """
        path = Path(self.broadcast(str(filepath)))
        temporary, old = path.with_name(f".{path.name}{TEMPORARY}"), path.with_name(f".{path.name}{_OLD}")
        if self.global_rank == 0:
            remove(temporary)
        self.barrier()
        try:
            super().save_checkpoint(checkpoint, temporary, storage_options)
            self.barrier()
            if self.global_rank == 0:
                write_sums(temporary)
                fsync_below(temporary)
                if path.exists():  # a folder cannot take the place of one that is not empty
                    path.rename(old)
                temporary.rename(path)
                remove(old)
        except (OSError, RuntimeError, CheckpointException) as error:
            raise OSError(
                f"checkpoint {path} cannot be written: {error}; make room or give another run_dir. "
                "The checkpoint that stood there is intact"
            ) from error
        self.barrier()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads plain values and tensors, whatever `weights_only` says.

        Raises:
            ValueError: a part is missing, or the checkpoint holds anything else.
        """
        check_sharded(Path(checkpoint_path))
        try:
            with only_plain_values():
                return super().load_checkpoint(checkpoint_path, weights_only=True)
        except (Exception, CheckpointException) as error:  # a damaged index makes torch raise anything
            raise ValueError(
                f"checkpoint {checkpoint_path} cannot be read: {(str(error).splitlines() or [''])[0]}; "
                "go on from another one in its folder"
            ) from error


def gathered_state(module: nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole state of a sharded module, on the CPU of rank 0 ({} elsewhere); None if it is not sharded.

    All ranks must come here.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.tensor import DTensor

    if not any(isinstance(parameter, DTensor) for parameter in module.parameters()):
        return None
    return get_model_state_dict(  # type: ignore[return-value]
        module, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
