"""A server of diffusers' pipeline as people write one: FastAPI, an image at a time. `tools/load_server.py` loads it."""

from __future__ import annotations

import argparse
import io
import socket
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch
import uvicorn
from diffusers import DiffusionPipeline
from fastapi import FastAPI, Response
from pydantic import BaseModel

from pipelines.tuning import default_device, default_dtype


class WantedImage(BaseModel):
    """A request for an image."""

    prompt: str
    seed: int
    steps: int


def app_of(pipeline: Any, worker: Executor) -> FastAPI:
    """An application that answers with a PNG, at the address and with the names of `ldm serve`."""
    app = FastAPI()

    @app.post("/v1/jobs")
    def make(wanted: WantedImage) -> Response:
        generator, file = torch.Generator().manual_seed(wanted.seed), io.BytesIO()
        made = worker.submit(pipeline, wanted.prompt, num_inference_steps=wanted.steps, generator=generator).result()
        made.images[0].save(file, "PNG")
        return Response(file.getvalue(), media_type="image/png")

    return app


def main() -> None:
    """Load a model, on the device and in the dtype that `Pipeline` takes, print the address, and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="a model in diffusers' layout")
    folder, device = parser.parse_args().folder, torch.device(default_device())
    worker = ThreadPoolExecutor(1)  # makes images twice as fast on a CPU as threads that take turns, or did not load
    load = worker.submit(DiffusionPipeline.from_pretrained, folder, torch_dtype=default_dtype(device))
    pipeline = load.result().to(device)
    pipeline.set_progress_bar_config(disable=True)
    opened = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{opened.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(app_of(pipeline, worker), log_level="error"))
    server.run(sockets=[opened])


if __name__ == "__main__":
    main()
