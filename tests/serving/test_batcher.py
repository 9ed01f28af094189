"""Every answer goes to who asked, once; batches never exceed their limit; what is too much or too late is refused."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from tlexport.serving.batcher import Batcher, Limits, Outcome
from tlexport.serving.datatypes import ProtocolError
from tlexport.serving.protocol import Request


class Seen:
    def __init__(self) -> None:
        self.batches: list[int] = []
        self.errors: list[Exception] = []

    def ran(self, samples: int, waits: object, seconds: float) -> None:
        self.batches.append(samples)

    def failed(self, error: Exception) -> None:
        self.errors.append(error)


class Gate:
    """A run that waits until it is let through, so that a test decides what waits meanwhile."""

    def __init__(self, *, open: bool = True) -> None:
        self.opened = threading.Event()
        self.sizes: list[int] = []
        if open:
            self.opened.set()

    def __call__(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.opened.wait(20)
        self.sizes.append(len(inputs["x"]))
        if (inputs["x"] == -1).any():
            raise RuntimeError("poison")
        return {"y": inputs["x"] * 2}


def request(value: float, samples: int = 1) -> Request:
    return Request("", {"x": np.full((samples, 2), value, np.float32)}, samples, (("y", True),))


def played(scene: Callable[[asyncio.AbstractEventLoop], object]) -> None:
    async def main() -> None:
        await asyncio.wait_for(scene(asyncio.get_running_loop()), 30)  # type: ignore[arg-type]

    asyncio.run(main())


def asked(batcher: Batcher, of: Request, seconds: float = 60.0) -> asyncio.Future[Outcome]:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Outcome] = loop.create_future()
    now = time.monotonic()
    batcher.submit(of, future.set_result, now, now + seconds)  # a second answer would raise InvalidStateError
    return future


@pytest.mark.parametrize(("inline", "workers"), [(True, 1), (False, 1), (False, 3)])
def test_every_answer_belongs_to_its_request(inline: bool, workers: int) -> None:
    seen, gates = Seen(), [Gate() for _ in range(workers)]

    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher(gates, Limits(8, 10_000, inline=inline), seen, loop)
        chance = random.Random(0)
        futures = []
        for value in range(2000):
            futures.append((value, size := chance.randint(1, 8), asked(batcher, request(value, size))))
            if chance.random() < 0.05:
                await asyncio.sleep(0)
        for value, size, future in futures:
            outcome = await future
            assert not isinstance(outcome, ProtocolError)
            np.testing.assert_array_equal(outcome["y"], np.full((size, 2), 2 * value, np.float32))
        await batcher.drain()

    played(scene)
    assert max(seen.batches) <= 8
    assert len(seen.batches) < 2000, "requests were batched"
    assert seen.errors == []


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    seen, gate = Seen(), Gate(open=False)

    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([gate], Limits(4, 100), seen, loop)
        first = asked(batcher, request(0))
        await asyncio.sleep(0.01)
        rest = [asked(batcher, request(i, size)) for i, size in enumerate((2, 2, 3, 9, 1))]
        gate.opened.set()
        await asyncio.gather(first, *rest)
        await batcher.drain()

    played(scene)
    assert gate.sizes == [1, 4, 3, 9, 1]


def test_a_poisonous_request_fails_alone() -> None:
    seen, gate = Seen(), Gate(open=False)

    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([gate], Limits(8, 100), seen, loop)
        futures = [asked(batcher, request(value)) for value in (9, 1, 2, -1, 4)]
        await asyncio.sleep(0.01)
        gate.opened.set()
        _, one, two, poison, four = await asyncio.gather(*futures)
        assert isinstance(poison, ProtocolError)
        assert poison.status == 500
        assert "poison" not in str(poison), "what the model says stays in the log"
        for outcome, value in ((one, 2), (two, 4), (four, 8)):
            assert not isinstance(outcome, ProtocolError)
            assert (outcome["y"] == value).all()
        await batcher.drain()

    played(scene)
    assert [str(error) for error in seen.errors] == ["poison"]
    assert gate.sizes in ([1, 4, 1, 1, 1, 1], [5, 1, 1, 1, 1, 1])


def test_a_full_queue_refuses_and_an_empty_one_takes_any() -> None:
    seen, gate = Seen(), Gate(open=False)

    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([gate], Limits(4, 6), seen, loop)
        running = asked(batcher, request(0))
        await asyncio.sleep(0.01)
        large = asked(batcher, request(1, 8))
        assert batcher.full
        with pytest.raises(ProtocolError, match="overloaded") as refused:
            asked(batcher, request(2))
        assert refused.value.status == 429
        assert refused.value.retry_after
        gate.opened.set()
        await asyncio.gather(running, large)
        assert not batcher.full
        await asked(batcher, request(3))
        await batcher.drain()

    played(scene)


def test_what_is_too_late_is_told_in_time_and_not_run() -> None:
    seen, gate = Seen(), Gate(open=False)

    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([gate], Limits(4, 100), seen, loop)
        running = asked(batcher, request(0))
        await asyncio.sleep(0.01)
        patient, late, later = (asked(batcher, request(i), s) for i, s in ((1, 60.0), (2, 0.05), (3, 0.1)))
        for future in (late, later):
            outcome = await future  # while the worker is still busy
            assert isinstance(outcome, ProtocolError)
            assert outcome.status == 504
        with pytest.raises(ProtocolError) as expired:
            asked(batcher, request(4), 0.0)
        assert expired.value.status == 504
        gate.opened.set()
        await asyncio.gather(running, patient)
        await batcher.drain()

    played(scene)
    assert gate.sizes == [1, 1]


def test_what_was_withdrawn_is_neither_run_nor_answered() -> None:
    seen, gate = Seen(), Gate(open=False)

    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([gate], Limits(4, 100), seen, loop)
        now = time.monotonic()

        def unwanted(outcome: Outcome) -> None:
            raise AssertionError("answered")

        running = batcher.submit(request(0), unwanted, now, now + 60)
        await asyncio.sleep(0.01)
        waiting = batcher.submit(request(1), unwanted, now, now + 60)
        assert batcher.samples == 1
        batcher.withdraw(waiting)
        batcher.withdraw(running)
        assert batcher.samples == 0
        gate.opened.set()
        await batcher.drain()

    played(scene)
    assert gate.sizes == [1]
    assert seen.errors == []


def test_a_delay_waits_for_others_and_not_beyond_a_full_batch() -> None:
    seen, gate = Seen(), Gate()

    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([gate], Limits(4, 100, max_delay=1.0), seen, loop)
        one = asked(batcher, request(1))
        for _ in range(5):
            await asyncio.sleep(0)
        two = asked(batcher, request(2))
        await asyncio.gather(one, two)
        await asyncio.gather(*(asked(batcher, request(i)) for i in range(4)))
        await batcher.drain()

    played(scene)
    assert gate.sizes == [2, 4]


def test_an_output_of_another_length_is_an_error_not_a_shift() -> None:
    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([lambda inputs: {"y": inputs["x"][:-1]}], Limits(4, 100), seen, loop)
        outcome = await asked(batcher, request(1, 2))
        assert isinstance(outcome, ProtocolError)
        await batcher.drain()

    seen = Seen()
    played(scene)
    assert "shape" in str(seen.errors[0])


def test_one_failing_delivery_does_not_keep_the_others() -> None:
    async def scene(loop: asyncio.AbstractEventLoop) -> None:
        batcher = Batcher([Gate()], Limits(4, 100), seen, loop)

        def broken(outcome: Outcome) -> None:
            raise OSError("the connection broke")

        now = time.monotonic()
        batcher.submit(request(1), broken, now, now + 60)
        outcome = await asked(batcher, request(2))
        assert not isinstance(outcome, ProtocolError)
        await batcher.drain()

    seen = Seen()
    played(scene)
    assert "the connection broke" in str(seen.errors[0])
