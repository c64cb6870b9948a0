"""Whole copies of networks whose weights are spread over the ranks by FSDP2 (Zhao et al. 2023, arXiv 2304.11277).

Such a network runs only where all ranks run it together. To validate, to make images and to write results, each rank
takes a whole copy, with the averages of the weights in it, in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn

from ldm.errors import LdmError
from ldm.latent_diffusion import LatentDiffusion
from ldm.training.parallel.spread import whole
from ldm.training.stages.stage import Player, Stage
from ldm.training.stages.table import KINDS, kind_named


def is_sharded(accelerator: Accelerator, stage: Stage) -> bool:
    """Whether the weights are spread over the ranks.

    Raises:
        LdmError: the launcher's way of spreading them is not supported, or not in this stage.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise LdmError("DeepSpeed is not supported; use FSDP2 in its place: configs/accelerate/fsdp2.yaml")
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise LdmError("only version 2 of FSDP is supported: fsdp_version: 2, see configs/accelerate/fsdp2.yaml")
    name, kind, section = stage.name, kind_named(stage.name), stage.section
    if not kind.spreads:
        others = " and ".join(other.name for other in KINDS if other.spreads)
        raise LdmError(
            f"stage {name}: its weights cannot be spread over processes (FSDP); launch it with "
            f"configs/accelerate/ddp.yaml, and {others} from its result"
        )
    if section.ema.widths:
        raise LdmError(f"{name}.ema.widths: averages of other widths need DDP; leave them out with FSDP")
    wanted = kind.evaluation(section)
    if wanted and wanted.choose:
        raise LdmError(f"{name}.evaluation.choose: the best weights can be kept with DDP alone; leave it out with FSDP")
    return True


class Skeleton:
    """A network without weights, copied before its weights are spread, and the places of a model's networks in it."""

    def __init__(self, module: nn.Module, model: LatentDiffusion) -> None:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in module.parameters()
        }
        memo |= {id(b): b.to("meta") for b in module.buffers()}
        self.module = copy.deepcopy(module, memo)
        paths = {id(part): path for path, part in module.named_modules()}
        self.places = {name: path for name, part in model.networks.items() if (path := paths.get(id(part))) is not None}

    @contextmanager
    def in_place(self, player: Player, model: LatentDiffusion, averages: Mapping[str, Tensor]) -> Iterator[None]:
        """Put a whole copy in the place of the player's network and of the model's, on every rank.

        Args:
            player: the player whose weights are spread.
            model: the model that holds the player's networks.
            averages: values for the trained parameters, by name.
        """
        network, own = copy.deepcopy(self.module), player.module
        for name, tensor in [*own.named_parameters(), *own.named_buffers()]:
            holder, _, leaf = name.rpartition(".")
            value = whole(averages.get(name, tensor).detach())
            part = network.get_submodule(holder)
            is_buffer = leaf in part._buffers
            setattr(part, leaf, value if is_buffer else nn.Parameter(value, requires_grad=False))
        before = dict(model.networks)
        player.module = network.train(own.training)
        for name, path in self.places.items():
            model.networks[name] = network.get_submodule(path)
        try:
            yield
        finally:
            player.module = own
            model.networks.update(before)


def save(averages: dict[str, Any], folder: Path) -> None:
    """Write spread averages, tensors by player and name: each rank writes its part; all ranks call it."""
    import torch.distributed.checkpoint as dcp  # few runs need it

    dcp.save(averages, checkpoint_id=str(folder))


def load(averages: dict[str, Any], folder: Path) -> None:
    """Read the files of `save` into the tensors of `averages`; the number of ranks may have changed."""
    import torch.distributed.checkpoint as dcp

    with torch.no_grad():
        dcp.load(averages, checkpoint_id=str(folder))
