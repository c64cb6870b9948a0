"""The command with its weights spread over processes on the CPU: accelerate lets that be configured for GPUs alone."""

from __future__ import annotations

from typing import Any

from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState

from ldm.cli.main import main

initialise = AcceleratorState.__init__


def spread(self: AcceleratorState, *arguments: Any, **options: Any) -> None:
    """As accelerate does where it finds `distributed_type: FSDP`, see configs/accelerate/fsdp2.yaml."""
    initialise(self, *arguments, **options)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    self.__dict__["distributed_type"] = DistributedType.FSDP
    self.__dict__["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["ResnetBlock", "TransformerBlock"],
        state_dict_type="SHARDED_STATE_DICT",
        reshard_after_forward=True,
    )


if __name__ == "__main__":
    AcceleratorState.__init__ = spread  # type: ignore[method-assign]
    main()
