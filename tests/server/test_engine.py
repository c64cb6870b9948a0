"""Images of an engine are those of the pipeline, whatever else it makes meanwhile; jobs fail, stop and wait alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import adapter_files
import controls
import image_prompts
import pytest
import tiny
import torch
from images import image
from PIL import Image
from rounding import RUN, near

from ldm.errors import LdmError
from ldm.models.unet import UNet
from ldm.sampling.noise import Noise
from ldm.server import engine as engine_module
from ldm.server.engine import Engine, NotTakenError, Piece
from ldm.server.jobs import CANCELLED, DONE, FAILED, Event, ServerJob
from pipelines import Pipeline

SMALL: dict[str, Any] = {"width": 64, "height": 64, "steps": 3}
MIXED = 1e-4  # of the largest number: rounding through runs of some steps, with guidance, on random weights
LONG = ", ".join(f"thing {number}" for number in range(60))


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Pipeline]:
    return {name: Pipeline(tiny.model(name, shallow=True), dtype=torch.float32) for name in ("sd15", "sdxl")}


@pytest.fixture
def engines() -> Iterator[list[Engine]]:
    """Engines that are closed at the end."""
    made: list[Engine] = []
    yield made
    for engine in made:
        engine.close(0)


def mask() -> Image.Image:
    made = Image.new("L", (64, 64))
    made.paste(255, (16, 16, 48, 48))
    return made


def settings(draw: random.Random) -> dict[str, Any]:
    """The settings of a random job."""
    found: dict[str, Any] = {
        "prompt": draw.choice(["a fox", "a dog", LONG]),
        "seed": draw.randrange(1000),
        "n": draw.choice([1, 1, 2]),
        "steps": draw.randint(2, 5),
        "scheduler": draw.choice(["euler", "ddim", "dpm++2m", "heun", "unipc", "euler-a"]),
        "spacing": draw.choice(["default", "trailing"]),
        "guidance": draw.choice([1, 3, 7.5]),
        "width": draw.choice([64, 64, 96]),
        "height": 64,
    }
    found |= draw.choice([{}, {}, {"rescale": 0.7}, {"interval": (0.2, 0.9)}, {"threshold": 0.9}, {"negative": "red"}])
    found |= draw.choice([{}, {}, {}, {"perturbed": 2.0}, {"reuse": 2}, {"merge": 0.5}, {"clip_skip": 1}])
    image = {"image": Image.effect_noise((64, 64), 90).convert("RGB"), "strength": 0.8}
    found |= draw.choice([{}, {}, image, image | {"mask": mask()}, {"hires": 1.5, "hires_strength": 0.6}])
    return found


@pytest.mark.parametrize(("name", "seed"), [("sd15", 0), ("sd15", 1), ("sdxl", 2)])
def test_random_jobs_have_the_images_of_the_pipeline(
    name: str, seed: int, pipelines: dict[str, Pipeline], engines: list[Engine]
) -> None:
    draw, pipeline = random.Random(seed), pipelines[name]
    engines.append(engine := Engine(pipeline))
    wanted = [settings(draw) for _ in range(10)]
    jobs = [ServerJob(engine.request(**one)) for one in wanted]
    follow(engine, jobs, [draw.randint(0, 3) for _ in jobs])
    dropped = draw.sample(range(len(jobs)), 2)
    for number in dropped:  # at a step of its own
        jobs[number].listeners.append(stopping(jobs[number], draw.randint(1, 2)))
    for number, (job, one) in enumerate(zip(jobs, wanted, strict=True)):
        if number in dropped:
            assert job.over.wait(60) and job.state == CANCELLED
            continue
        made = job.result(60)
        alone = pipeline(**one, batch=1, output="latents")
        for a, b in zip(made.latents, alone.latents, strict=True):
            near(a, b, MIXED)
        assert [record["seed"] for record in made.settings] == [record["seed"] for record in alone.settings]
        assert all("batch" not in record for record in made.settings)
    assert engine.counts.steps > 1.2 * engine.counts.calls


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pipeline]:
    """Pipelines with two IP-Adapters, a ControlNet, and a T2I-Adapter or, for SDXL, another ControlNet."""
    root, made = tmp_path_factory.mktemp("steered"), {}
    for name in ("sd15", "sdxl", "sd15-inpaint"):
        family = tiny.family(name, shallow=True)
        files = [root / f"{name}-{kind}.safetensors" for kind in ("base", "plus")]
        for file, kind in zip(files, ("base", "plus"), strict=True):
            image_prompts.saved(file, family, kind)
        other = controls.controlnet(family, 1) if family.xl else controls.t2i_adapter("full_adapter", family)
        networks = {"image": controls.controlnet(family), "gray": other}
        image_prompts.encoder().save_pretrained(root / "image_encoder")
        made[name] = Pipeline(
            tiny.model(name, shallow=True), dtype=torch.float32, control_models=networks, ip_adapter=files
        )
    return made


def steering(draw: random.Random) -> dict[str, Any]:
    """Random condition images and image prompts of a job, or none."""
    part = draw.choice([{}, {}, {"control_begin": 0.5}, {"control_end": 0.5}])
    scale = {"control_scale": draw.choice([0.3, 1.0])} | part
    found: dict[str, Any] = draw.choice([
        {}, {"control": {"image": image(draw.randrange(99))}, "guess": draw.random() < 0.3} | scale,
        {"control": {"gray": image(draw.randrange(99))}} | scale,
        {"control": [{"image": image(draw.randrange(99))}, {"gray": image(draw.randrange(99))}]} | scale,
    ])  # fmt: skip
    prompts = [image(draw.randrange(99)), image(draw.randrange(99))]
    read = {"image_prompt": prompts, "image_prompt_weight": (draw.choice([0.3, 1.0]), 0.7)}
    return found | draw.choice([{}, read, read | {"image_prompt_end": 0.7}, read | {"image_prompt_mask": [mask()] * 2}])


@pytest.mark.parametrize(("name", "seed"), [("sd15", 0), ("sd15", 1), ("sdxl", 2), ("sd15-inpaint", 3)])
def test_steered_jobs_have_the_images_of_the_pipeline(
    name: str, seed: int, steered: dict[str, Pipeline], engines: list[Engine]
) -> None:
    """Whichever condition images and image prompts those beside them have, or none."""
    draw, pipeline = random.Random(seed), steered[name]
    engines.append(engine := Engine(pipeline))
    own = {"width": 64, "n": 1}
    wanted = [settings(draw) | own | {"steps": draw.randint(4, 6)} | steering(draw) for _ in range(8)]
    if name == "sd15-inpaint":
        hidden = {"image": image(5), "mask": mask()}
        wanted = [{key: one[key] for key in one if not key.startswith("hires")} | hidden for one in wanted]
    jobs = [ServerJob(engine.request(**one)) for one in wanted]
    follow(engine, jobs, [draw.randint(0, 2) for _ in jobs])
    for job, one in zip(jobs, wanted, strict=True):
        near(job.result(60).latents[0], pipeline(**one, batch=1, output="latents").latents[0], MIXED)


def test_steered_calls_are_made_together(steered: dict[str, Pipeline], engines: list[Engine]) -> None:
    """Of the same networks, with images, scales and guidance of their own; and none of them sees another's image."""
    for name in ("sd15", "sdxl"):
        engines.append(engine := Engine(steered[name]))
        plain, step = SMALL | {"scheduler": "euler"}, 4
        kinds: list[list[dict[str, Any]]] = [
            [{"control": {"image": image(number)}, "control_scale": 0.5 + number / 4} for number in range(3)],
            [{"control": {"gray": image(number)}, "steps": 3 + number} for number in range(3)],
            [{"image_prompt": [image(number), image(9)], "guidance": 2 + number} for number in range(3)],
            [{"control": {"image": image(1)}, "image_prompt": [image(number), image(2)]} for number in range(3)],
        ]
        for alike in kinds:
            assert fullest(engine, [plain | one for one in alike]) == 3
            assert fullest(engine, [plain | one for one in (*alike, {}, {})]) == 3  # plain ones beside them
        wanted = [plain | {"seed": step, "prompt": "a fox"} | one for alike in kinds for one in (*alike, {})]
        with engine._changed:
            jobs = [engine.submit(ServerJob(engine.request(**one))) for one in wanted]
        made = [job.result(60).latents[0] for job in jobs]
        for found, one in zip(made, wanted, strict=True):
            near(found, steered[name](**one, batch=1, output="latents").latents[0], RUN)
        for a, b in pairwise(made[:3]):
            assert (a - b).abs().max() > 100 * RUN * a.abs().max()  # the images mean something


def follow(engine: Engine, jobs: list[ServerJob], steps: list[int]) -> None:
    """Submit the first job, and each further one when the one before it has made so many steps."""

    def after(number: int) -> Any:
        taken: list[int] = []

        def listen(event: Event) -> None:
            taken.extend([1] * (event.kind == "step" or jobs[number].over.is_set()))
            if len(taken) == max(steps[number], 1) and number + 1 < len(jobs):
                taken.append(1)
                engine.submit(jobs[number + 1])

        return listen

    for number, job in enumerate(jobs):
        job.listeners.append(after(number))
    engine.submit(jobs[0])


def stopping(job: ServerJob, step: int) -> Any:
    """A listener that cancels a job after a step."""
    return lambda event: job.cancel() if event.step == step else None


def test_calls_are_made_together(pipelines: dict[str, Pipeline], engines: list[Engine]) -> None:
    """Of different schedulers, steps, guidance scales and tasks; not those of patches with a state of their own."""
    engines.append(engine := Engine(pipelines["sdxl"]))
    image = Image.effect_noise((64, 64), 90).convert("RGB")
    more: list[dict[str, Any]] = [
        {}, {"guidance": 1}, {"scheduler": "heun"}, {"steps": 5}, {"image": image}, {"rescale": 0.5},
        {"image": image, "mask": mask()}, {"size": (64, 64), "clip_skip": 1},
    ]  # fmt: skip
    assert fullest(engine, [SMALL | one for one in more]) == len(more)
    assert fullest(engine, [SMALL | {"merge": 0.5}] * 3) == 3  # the same patch
    assert fullest(engine, [SMALL | {"reuse": 2}] * 2) == 1
    assert fullest(engine, [SMALL | {"perturbed": 2.0}] * 2) == 1


def fullest(engine: Engine, wanted: list[dict[str, Any]]) -> int:
    """The largest number of steps that one call of the U-Net made for jobs that begin together."""
    most, before = 0, (engine.counts.calls, engine.counts.steps)

    def listen(_: Event) -> None:
        nonlocal most, before
        now = (engine.counts.calls, engine.counts.steps)
        if now[0] == before[0] + 1:
            most = max(most, now[1] - before[1])
        before = now

    with engine._changed:  # so that the first one waits for the others
        jobs = [engine.submit(ServerJob(engine.request("a fox", **one), listener=listen)) for one in wanted]
    for job in jobs:
        job.result(60)
    return most


def test_bf16_differs_as_much_as_between_batch_sizes(engines: list[Engine]) -> None:
    model = tiny.model("sdxl", shallow=True)
    for module in model.modules().values():
        module.bfloat16()
    pipeline = Pipeline(model)
    engines.append(engine := Engine(pipeline))
    with engine._changed:
        jobs = [engine.submit(ServerJob(engine.request("a fox", seed=seed, **SMALL))) for seed in range(5)]
    made = torch.stack([job.result(60).latents[0].float() for job in jobs])
    one, four = (
        torch.stack(pipeline("a fox", n=5, seed=0, batch=batch, output="latents", **SMALL).latents).float()
        for batch in (1, 4)
    )
    assert (made - one).abs().max() <= 2 * max((four - one).abs().max(), one.abs().max() * 2**-9)


def test_adapters_are_grouped(tmp_path: Any, engines: list[Engine]) -> None:
    model = tiny.model("sdxl", shallow=True)
    files = [adapter_files.saved(adapter_files.adapter(model, "kohya-sgm"), tmp_path / f"{n}.safetensors")
             for n in range(3)]  # fmt: skip
    pipeline = Pipeline(model)
    engines.append(engine := Engine(pipeline))
    wanted = [SMALL | {"adapters": {str(files[number % 3]): 1.0}, "seed": number} for number in range(6)] + [SMALL]
    with engine._changed:
        jobs = [engine.submit(ServerJob(engine.request("a fox", **one))) for one in wanted]
    for job, one in zip(jobs[:-1], wanted, strict=False):
        near(job.result(60).latents[0], pipeline("a fox", output="latents", **one).latents[0], RUN)
    jobs[-1].result(60)
    assert engine.counts.steps > 1.5 * engine.counts.calls


def test_cancelled_within_a_step(pipelines: dict[str, Pipeline], engines: list[Engine]) -> None:
    engines.append(engine := Engine(pipelines["sd15"]))
    job = ServerJob(engine.request("a fox", **SMALL | {"steps": 50}))
    steps: list[int] = []

    def listen(event: Event) -> None:
        if event.kind == "step":
            steps.append(event.step)
            if event.step == 3:
                threading.Thread(target=job.cancel).start()
                assert job.over.wait(10)

    job.listeners.append(listen)
    engine.submit(job)
    with pytest.raises(LdmError, match="cancelled"):
        job.result(60)
    engine.submit(ServerJob(engine.request("a fox", **SMALL))).result(60)
    assert steps == [1, 2, 3]
    assert not engine.running


def test_a_job_that_is_over_does_not_begin(
    pipelines: dict[str, Pipeline], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines.append(engine := Engine(pipelines["sd15"]))
    second = ServerJob(engine.request("a fox", **SMALL))
    first = ServerJob(engine.request("a fox", **SMALL), listener=lambda event: second.cancel())
    making, begun = engine._making, []

    def begin(piece: Piece) -> Any:
        begun.append(piece.job)
        return making(piece)

    monkeypatch.setattr(engine, "_making", begin)
    with engine._changed:
        engine.submit(first)
        engine.submit(second)
    first.result(60)
    assert begun == [first] and second.state == CANCELLED


def noise_of(seed: int) -> torch.Tensor:
    return Noise([seed]).draw((1, 4, 8, 8), torch.float32, "cpu")


@pytest.mark.parametrize("fault", ["nan", "error", "memory"])
def test_a_job_fails_alone(
    fault: str, pipelines: dict[str, Pipeline], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = pipelines["sd15"]
    wanted = [SMALL | {"seed": seed, "scheduler": "ddim"} for seed in range(5)]
    plain = [pipeline("a fox", output="latents", **one).latents[0] for one in wanted]
    forward, bad = UNet.forward, noise_of(3)

    def faulty(self: UNet, x: torch.Tensor, *more: Any) -> torch.Tensor:
        found = torch.isclose(x, bad, atol=1e-6).flatten(1).all(dim=1)
        if found.any() and fault != "nan":
            raise RuntimeError("CUDA out of memory" if fault == "memory" else "something else")
        return torch.where(found[:, None, None, None], torch.nan, forward(self, x, *more))

    monkeypatch.setattr(UNet, "forward", faulty)
    engines.append(engine := Engine(pipeline))
    with engine._changed:
        jobs = [engine.submit(ServerJob(engine.request("a fox", **one))) for one in wanted]
    for number, job in enumerate(jobs):
        if number != 3:
            near(job.result(60).latents[0], plain[number], RUN)
    assert jobs[3].over.wait(60) and jobs[3].state == FAILED
    assert {"nan": "not finite", "memory": "out of memory", "error": "RuntimeError"}[fault] in jobs[3].error
    assert jobs[3].status == {"nan": 422, "memory": 503, "error": 500}[fault]
    assert not engine._fitting  # the others are made together as before


def test_less_memory_makes_smaller_calls(
    pipelines: dict[str, Pipeline], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, tried = UNet.forward, []

    def small(self: UNet, x: torch.Tensor, *more: Any) -> torch.Tensor:
        tried.append(len(x))
        if len(x) > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, x, *more)

    monkeypatch.setattr(UNet, "forward", small)
    engines.append(engine := Engine(pipelines["sd15"]))
    with engine._changed:
        jobs = [engine.submit(ServerJob(engine.request("a fox", **SMALL, seed=seed))) for seed in range(4)]
    for job in jobs:
        job.result(60)
    assert sum(rows > 4 for rows in tried) == 1


def test_nobody_is_overtaken_by_many(pipelines: dict[str, Pipeline], engines: list[Engine]) -> None:
    engines.append(engine := Engine(pipelines["sd15"], most=64, overtaken=3))  # one at a time
    with engine._changed:
        request = engine.request("a fox", width=64, height=64, steps=1)
        first = [engine.submit(ServerJob(request)) for _ in range(2)]
        later = [engine.submit(ServerJob(request, priority=1)) for _ in range(8)]
    for job in (*first, *later):
        job.result(60)
    order = sorted([*first, *later], key=lambda job: job.started or 0)
    assert [order.index(job) for job in first] == [3, 4]
    assert [job for job in order if job in later] == later


def test_limits(pipelines: dict[str, Pipeline], engines: list[Engine]) -> None:
    engines.append(engine := Engine(pipelines["sd15"], most=64, queue=3))
    request = engine.request("a fox", **SMALL | {"steps": 40}, n=3)
    job = ServerJob(request)
    with engine._changed:
        engine.submit(job)
        with pytest.raises(NotTakenError, match="3 images wait, and at most 3 may, with the 3 of this job"):
            engine.submit(ServerJob(request))
    late = ServerJob(engine.request("a fox", **SMALL), seconds=0.001)
    job.listeners.append(lambda event: late.over.is_set() and job.cancel())
    while len(engine.waiting) > 2:
        job.over.wait(0.001)
    engine.submit(late)
    with pytest.raises(LdmError, match="not done within 0.001 seconds"):
        late.result(60)
    assert job.over.wait(60)
    last = engine.submit(ServerJob(engine.request("a fox", **SMALL)))
    assert engine.close(60) and last.state == DONE
    with pytest.raises(NotTakenError, match="closing"):
        engine.submit(ServerJob(request))


def test_a_closed_engine_leaves_nobody_waiting(pipelines: dict[str, Pipeline]) -> None:
    engine = Engine(pipelines["sd15"])
    job = engine.submit(ServerJob(engine.request("a fox", **SMALL | {"steps": 900})))
    assert not engine.close(0)
    with pytest.raises(LdmError, match="closed"):
        job.result(0)
    assert not engine._thread.is_alive()


def test_a_closed_engine_leaves_a_call_that_hangs(
    pipelines: dict[str, Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    called, freed = threading.Event(), threading.Event()

    def hanging(*_: Any) -> torch.Tensor:
        called.set()
        freed.wait(60)
        raise RuntimeError("freed")

    monkeypatch.setattr(UNet, "forward", hanging)
    engine = Engine(pipelines["sd15"])
    job = engine.submit(ServerJob(engine.request("a fox", **SMALL)))
    assert called.wait(60)
    assert not engine.close(0, last=0.05) and engine.hangs
    assert (job.state, job.status, job.error) == (FAILED, 503, "the engine was closed")
    freed.set()
    engine.close(60)
    assert not engine.hangs


def test_settings_that_say_what_is_made_together(pipelines: dict[str, Pipeline], engines: list[Engine]) -> None:
    engines.append(engine := Engine(pipelines["sd15"]))
    one: dict[str, Any] = SMALL | {"n": 3, "batch": 2, "rng": "diffusers", "seed": 5}
    made = engine.submit(ServerJob(engine.request("a fox", **one))).result(60)
    alone = pipelines["sd15"]("a fox", output="latents", **one)
    assert [(row.get("batch"), row.get("place")) for row in made.settings] == [(2, 0), (2, 1), (None, None)]
    for a, b in zip(made.latents, alone.latents, strict=True):
        near(a, b, RUN)


def test_steps_have_previews(pipelines: dict[str, Pipeline], engines: list[Engine]) -> None:
    engines.append(engine := Engine(pipelines["sd15"]))
    events: list[Event] = []
    job = ServerJob(engine.request("a fox", scheduler="euler", **SMALL), previews=True, listener=events.append)
    engine.submit(job).result(60)
    assert [event.kind for event in events] == ["state", "step", "step", "step", "images", "state"]
    assert [event.last for event in events] == [False] * 5 + [True]
    assert all(event.previews[0].size == (8, 8) for event in events if event.kind == "step")
    assert [(event.step, event.steps) for event in events if event.kind == "step"] == [(1, 3), (2, 3), (3, 3)]


def test_a_listener_with_a_defect(pipelines: dict[str, Pipeline], engines: list[Engine]) -> None:
    engines.append(engine := Engine(pipelines["sd15"]))
    job = ServerJob(engine.request("a fox", **SMALL), listener=lambda event: 1 / 0)  # type: ignore[arg-type,return-value]
    engine.submit(job).result(60)
    assert job.state == DONE
    with pytest.raises(LdmError, match="name it"):
        engine.request("a fox", scheduler=type("Own", (), {"set_timesteps": None, "order": 1})())


def test_freed_memory_is_given_back_from_time_to_time(
    pipelines: dict[str, Pipeline], engines: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Event] = []
    busy, idle = threading.Event(), threading.Event()

    def give_back() -> None:
        (busy if engine.running else idle).set()

    monkeypatch.setattr(engine_module, "give_back", give_back)
    engines.append(engine := Engine(pipelines["sd15"]))
    engine.submit(ServerJob(engine.request("a fox", **SMALL), listener=steps.append)).result(60)
    assert steps and not busy.is_set() and not idle.is_set()  # half a minute is not over
    monkeypatch.setattr(engine_module, "GIVE_BACK_SECONDS", 0.01)
    running = engine.submit(ServerJob(engine.request("a fox", **{**SMALL, "steps": 400})))
    assert busy.wait(60)
    running.cancel()
    assert idle.wait(60)
