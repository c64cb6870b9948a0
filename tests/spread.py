"""The command with its weights spread over processes on the CPU: accelerate lets that be configured for GPUs alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

from ldm.cli.main import main

initialise = AcceleratorState.__init__
LAYOUT = Path(__file__).parent.parent / "configs/accelerate" / os.environ.get("LAYOUT", "fsdp2.yaml")


def spread(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
    """As accelerate does where it finds `distributed_type: FSDP` in a configuration such as `LAYOUT`."""
    initialise(self, *arguments, **options)
    settings = yaml.safe_load(LAYOUT.read_text(encoding="utf-8"))["fsdp_config"]
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    self.__dict__["distributed_type"] = DistributedType.FSDP
    self.__dict__["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=settings["fsdp_version"],
        auto_wrap_policy=settings["fsdp_auto_wrap_policy"],
        transformer_cls_names_to_wrap=settings["fsdp_transformer_layer_cls_to_wrap"].split(","),
        state_dict_type=settings["fsdp_state_dict_type"],
        reshard_after_forward=settings["fsdp_reshard_after_forward"],
    )


if __name__ == "__main__":
    AcceleratorState.__init__ = spread  # type: ignore[method-assign]
    main()
