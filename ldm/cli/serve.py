"""`ldm serve`: makes images for others over HTTP."""

from __future__ import annotations

import ipaddress
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.errors import LdmError
from ldm.server.guard import KEY
from ldm.server.limits import Limits

if TYPE_CHECKING:
    from ldm.server.history import History
    from ldm.server.runs import Runs
    from ldm.server.service import Service
    from ldm.server.trainings import Trainer, TrainingOrder

NEEDED = ("fastapi", "greenlet", "prometheus_client", "psutil", "python_multipart", "uvicorn")
NOT_TRAINED = ("components", "variant", "allow_pickle")  # settings of loading that `ldm train-adapter` does not take


@dataclass(frozen=True)
class ServeOptions:
    """The options of `ldm serve`."""

    loading: dict[str, Any]  # settings of loading that were given
    host: str
    port: int
    api_key: str | None
    hostnames: tuple[str, ...]
    log_prompts: bool
    drain_seconds: float
    most: int | None  # as for `Engine`
    limits: Limits
    history: str | None  # the folder; None: there is none
    history_most: int | None  # images that it keeps; None: all
    runs: str | None  # the folder of runs that are shown; None: there are none
    train: bool  # whether visitors can train adapters
    replicas: str | None = None  # their number, or the least and the largest; None: one engine, in this process
    replica_jobs: int = 8  # of each, above which another one is started
    ray_address: str | None = None  # of a cluster; None: one on this machine


def check_packages() -> None:
    """Raise unless the packages of the extra `serve` are there.

    Raises:
        LdmError: one is missing.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise LdmError(f"ldm serve needs {', '.join(missing)}: pip install 'ldm[serve]'")


def key_of(options: ServeOptions) -> str:
    """The API key; "" for none, which only this machine's own address allows.

    Raises:
        LdmError: others could use the server without a key, or the key is too short.
    """
    key = options.api_key or os.environ.get(KEY, "")
    if not key and not is_local(options.host):
        raise LdmError(
            f"--host {options.host} opens the server to others: set a key, which they need (--api-key, or {KEY})"
        )
    if key and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise LdmError("--api-key: at least 8 letters, digits and signs without spaces are needed")
    return key


def is_local(host: str) -> bool:
    """Whether only this machine reaches a host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def replicas_of(options: ServeOptions) -> tuple[int, int] | None:
    """The least and the largest number of replicas ("4", or "1-8"); None: there are none.

    Raises:
        LdmError: the option stands for no number, is needed and not given, or Ray is missing.
    """
    text = options.replicas
    if text is None:
        if options.ray_address is not None:
            raise LdmError("--ray-address needs --replicas, the number of engines there")
        return None
    low, dash, high = text.partition("-")
    least, most = (int(one) if one.isascii() and one.isdecimal() else 0 for one in (low, high if dash else low))
    if not 1 <= least <= most:
        raise LdmError(f"--replicas {text!r}: a number is needed, such as 4, or the least and the largest, such as 1-8")
    if find_spec("ray") is None:
        raise LdmError("--replicas needs ray: pip install 'ldm[cluster]'")
    return least, most


def history_of(options: ServeOptions) -> History | None:
    """The history, if there shall be one.

    Raises:
        LdmError: a number of images is given for none, or as `History`.
    """
    from ldm.server.history import History

    if options.history is not None:
        return History(Path(options.history), options.history_most)
    if options.history_most is not None:
        raise LdmError("--history-most is for a history: name its folder, too (--history)")
    return None


def trainer_of(options: ServeOptions, runs: Runs | None) -> Trainer | None:
    """What trains adapters of the served model for visitors, if that is wanted.

    Raises:
        LdmError: there is no folder for their runs, or the model is not one that `ldm train-adapter` takes.
    """
    from ldm.server.trainings import Trainer

    if not options.train:
        return None
    if runs is None:
        raise LdmError("--train writes runs: name the folder for them, too (--runs)")
    own = {name: value for name, value in options.loading.items() if value}
    if other := [name for name in own if name in NOT_TRAINED]:
        raise LdmError(f"--train adapts a model as it is; serve it without {other[0]}")
    folder = own.get("lora_dir")
    return Trainer(runs, partial(training_command, own), None if folder is None else Path(folder))


def training_command(loading: Mapping[str, Any], order: TrainingOrder, images: Path, output: Path) -> list[str]:
    """The program that trains an adapter of a model, by the settings that the model was loaded with.

    Raises:
        LdmError: the order is none that `ldm train-adapter` takes.
    """
    from ldm.cli.train_adapter import AdapterJob
    from ldm.weights.builtin import DEFAULT

    model = str(loading.get("source", DEFAULT))
    job = AdapterJob(str(images), model, str(output), order.kind, order.trigger, order.class_prompt)
    job.check(())
    if order.rank is not None and order.kind != "lora":
        raise LdmError("rank is for a LoRA; leave it out")
    given = {f"{job.stage}.steps": order.steps, f"{job.stage}.rank": order.rank, "model.family": loading.get("family")}
    settings = ["trackers=[]", *(f"{name}={value}" for name, value in given.items() if value is not None)]
    options = {"model": model, "output": output, "kind": order.kind, "trigger": order.trigger,
               "class-prompt": order.class_prompt}  # fmt: skip
    named = [f"--{name}={value}" for name, value in options.items() if value]
    return [sys.executable, "-m", "ldm", "train-adapter", *named, "--", str(images), *settings]


def serve_images(options: ServeOptions) -> None:
    """Load the model, and serve until a signal comes."""
    check_packages()
    key, replicas = key_of(options), replicas_of(options)
    from ldm.server.runs import Runs
    from ldm.server.service import log_to_stderr
    from ldm.server.serving import Listening, serve

    log_to_stderr()
    history = history_of(options)  # before a model is loaded
    runs = None if options.runs is None else Runs.at(Path(options.runs))
    trainer = trainer_of(options, runs)
    with _service(options, replicas, history=history, runs=runs, trainer=trainer) as service:
        if not is_local(options.host):
            print(
                f"ldm: everybody who reaches {options.host}, port {options.port}, and has the key can make images; "
                "traffic is not encrypted: let a proxy with TLS stand before it",
                file=sys.stderr,
            )
        serve(
            service,
            Listening(options.host, options.port, key, options.hostnames, options.drain_seconds, options.log_prompts),
        )


def _service(
    options: ServeOptions,
    replicas: tuple[int, int] | None,
    **beside: Any,
) -> AbstractContextManager[Service]:
    """The service that is asked for, within this process or with replicas; `beside` is what it has beside its model."""
    if replicas is not None:
        from ldm.server.cluster import ClusterOptions, clustered

        cluster = ClusterOptions(*replicas, options.replica_jobs, options.ray_address)
        return clustered(options.loading, options.limits, options.most, cluster, **beside)
    from ldm.server.engine import loaded
    from ldm.server.service import Service

    return nullcontext(Service(loaded(options.loading), options.loading, options.limits, options.most, **beside))
