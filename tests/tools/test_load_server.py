"""`tools/load_server.py`: an overload finds what breaks a bound, and nothing else; nobody waits for a lost client."""

from __future__ import annotations

import asyncio
import io
import os
import random
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from fastapi.testclient import TestClient
from PIL import Image

from ldm.server.limits import Limits
from ldm.server.service import Service
from ldm.server.serving import in_thread
from pipelines import Pipeline

sys.path.append(str(Path(__file__).parents[2] / "tools"))
import diffusers_server
import load_server
import overload


def ordinary(draw: random.Random) -> dict[str, Any]:
    return overload.usual(draw, ("a fox", "a dog"), ("euler", "ddim"), 2)


def test_an_overload(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two canaries, one has the image of another seed: that one alone is found."""
    for name in ("CANCELLED_AFTER", "SILENCE"):  # waiting shows nothing
        monkeypatch.setattr(overload, name, getattr(overload, name) / 10)
    pipeline = Pipeline(tiny.model("sd15", shallow=True), dtype=torch.float32)
    settings = {"prompt": "a fox", "seed": 5, "steps": 2, "cfg_scale": 3}
    image = np.asarray(pipeline(**settings).images[0].convert("RGB"), np.int32)
    known = [overload.Canary(settings | {"seed": seed}, image) for seed in (5, 6)]
    service = Service(pipeline, {}, Limits(queue=2, steps=50))
    with in_thread(service) as address:
        for _ in range(10):  # on a busy machine, a few seconds may have no image of one of them
            run = overload.Overload(address.removeprefix("http://"), os.getpid(), known, ordinary)
            tally = asyncio.run(run.run(60, 3))
            figures = overload.figures_of(tally, 3, 60) | {"left": 0, "exit_status": 0, "tracebacks": 0}
            if 0 < len(tally.wrong) < figures["canaries"]:
                break
    assert figures["images"] and not figures["no_answer"] and not figures["server_errors"], figures
    assert any(text.startswith("hostile 4") for text in figures["statuses"])
    assert tally.wrong and all("'seed': 6" in text for text in tally.wrong)
    assert figures["canaries"] > figures["wrong_images"] == len(tally.wrong)
    assert "canaries with another image" in overload.broken(figures)[0]
    assert "| canaries with another image |" in overload.table(figures)
    assert not any("canaries" in text for text in overload.broken(figures | {"wrong_images": 0}))


def test_bounds() -> None:
    tally = overload.OverloadTally()
    tally.statuses.update({"usual 200": 5, "usual 500": 1, "usual 503 refused": 101})
    tally.refusals = [(float(number), number + 0.01) for number in range(99)] + [(200, 201.0), (300, 300.5)]
    tally.delays = [(199.9, 0.0), (200.8, 1.5)]  # this process was stopped then
    tally.lost = [(200.0, 201.0, "lost then")]
    tally.memory = [(minute / 10, 500 + minute / 5) for minute in range(100)]
    figures = overload.figures_of(tally, 600, 4) | {"left": 0, "exit_status": 0, "tracebacks": 0}
    assert (figures["refusals"], figures["refusals_while_stopped"]) == (101, 1)
    assert (figures["no_answer"], figures["no_answer_while_stopped"]) == (0, 1)
    assert figures["refusal_p99_ms"] == pytest.approx(500) and figures["refusal_p50_ms"] == pytest.approx(10)
    assert figures["memory_mb_per_minute"] == pytest.approx(2)
    assert [text.partition(":")[0] for text in overload.broken(figures)] == [
        "answers of 500 and more, but 503", "99th percentile of refusals (503), ms",
        "growth of resident memory after warm-up, MB/min",
    ]  # fmt: skip


def test_a_client_that_gets_no_answer_keeps_nobody_waiting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as opened:

        def close_all() -> None:
            for _ in range(3):
                opened.accept()[0].close()

        threading.Thread(target=close_all, daemon=True).start()
        with pytest.raises(OSError, match="of 3 clients got no answer"):
            load_server.load(f"127.0.0.1:{opened.getsockname()[1]}", 3, 1, mixed=False)


def test_a_server_of_diffusers_pipeline(models: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(models / "sd15", safety_checker=None)
    wanted = {"prompt": "a fox", "seed": 5, "steps": 2}
    with ThreadPoolExecutor(1) as worker, TestClient(diffusers_server.app_of(pipeline, worker)) as client:
        answer = client.post("/v1/jobs", json=wanted)
    generator = torch.Generator().manual_seed(5)
    expected = pipeline("a fox", num_inference_steps=2, generator=generator).images[0]
    assert Image.open(io.BytesIO(answer.content)).tobytes() == expected.tobytes()
