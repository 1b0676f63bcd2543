"""The rules for which calls share a batch, in any order of events."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from higen.backends.batching import Batch, Batcher, Call
from higen.errors import BackendError, RetryLater

ROWS = {"spatial_unet": 3, "temporal_unet": 2, "vae_decoder": 4}


def tensors(value: float = 0.0, rows: int = 1, width: int = 2) -> dict[str, np.ndarray]:
    """A call's tensors, all of one value."""
    return {"latents": np.full((rows, width), value, np.float32), "t": np.full(rows, int(value))}


def batcher(slots: int = 8, line: int = 8, active: Sequence[str] = ()) -> Batcher:
    made = Batcher(slots, ROWS, line)
    for request in active:
        made.enter(request)
    return made


def members(batch: Batch | None) -> list[object]:
    return [] if batch is None else [call.request for call in batch.calls]


def test_calls_of_one_stage_and_shape_share_a_batch_up_to_its_limit() -> None:
    made = batcher(active="abcde")
    for request in "abcde":
        made.submit(request, "spatial_unet", tensors(ord(request)))
    assert members(made.next_batch()) == ["a", "b", "c"]
    assert members(made.next_batch()) == ["d", "e"]
    assert made.next_batch() is None


@pytest.mark.parametrize(
    ("stage", "other"),
    [
        ("temporal_unet", tensors()),
        ("spatial_unet", tensors(width=3)),
        ("spatial_unet", {**tensors(), "t": np.zeros(1, np.int32)}),
        ("spatial_unet", {"latents": tensors()["latents"]}),
    ],
    ids=["stage", "shape", "dtype", "names"],
)
def test_what_differs_does_not_share(stage: str, other: dict[str, np.ndarray]) -> None:
    made = batcher(active="abc")
    made.submit("a", "spatial_unet", tensors())
    made.submit("b", stage, other)
    made.submit("c", "spatial_unet", tensors())
    assert members(made.next_batch()) == ["a", "c"]
    assert members(made.next_batch()) == ["b"]


def test_a_call_of_several_rows_counts_as_several() -> None:
    made = batcher(active="abc")
    made.submit("a", "vae_decoder", tensors(rows=2))
    made.submit("b", "vae_decoder", tensors(rows=3))
    made.submit("c", "vae_decoder", tensors(rows=2))
    assert members(made.next_batch()) == ["a", "c"]  # b does not fit into a's batch, so it leads the next one
    assert members(made.next_batch()) == ["b"]


def test_rows_go_in_and_come_out_in_order() -> None:
    batch = Batch(tuple(Call(name, "vae_decoder", tensors(value, rows)) for name, value, rows in
                        (("a", 1, 2), ("b", 2, 1), ("c", 3, 3))))  # fmt: skip
    together = batch.tensors()
    assert together["t"].tolist() == [1, 1, 2, 3, 3, 3]
    parts = batch.split({"pixels": together["latents"] * 10})
    assert [part["pixels"][:, 0].tolist() for part in parts] == [[10, 10], [20], [30, 30, 30]]
    with pytest.raises(BackendError, match="5 output rows, but 6 input rows"):
        batch.split({"pixels": np.zeros((5, 2))})


def test_a_call_that_holds_one_sample_is_a_batch_of_its_own() -> None:
    """The first axis may have any length, because the row limit does not apply. The outputs may have any shape."""
    made = batcher(active="abcd")
    for request in "abc":
        made.submit(request, "unlimited", tensors(rows=9), joins=False)
    made.submit("d", "spatial_unet", tensors())
    assert [members(made.next_batch()) for _ in range(4)] == [["a"], ["b"], ["c"], ["d"]]
    call = Call("a", "unlimited", {"latents": np.zeros((9, 2), np.float32)}, joins=False)
    assert call.rows == 1
    batch = Batch((call,))
    assert batch.tensors()["latents"].shape == (9, 2)
    (part,) = batch.split({"pixels": np.zeros((1, 3, 5))})
    assert part["pixels"].shape == (1, 3, 5)


def test_a_new_request_joins_at_the_next_step() -> None:
    made = batcher(active="a")
    for _ in range(3):
        made.submit("a", "spatial_unet", tensors())
        batch = made.next_batch()
        assert members(batch) == ["a"]
        made.done(batch.calls[0])
    made.enter("b")
    made.submit("a", "spatial_unet", tensors(3))
    made.submit("b", "spatial_unet", tensors(0))
    assert members(made.next_batch()) == ["a", "b"]


def test_slots_and_the_queue() -> None:
    made = batcher(slots=2, line=1, active="abc")
    assert [made.active(request) for request in "abc"] == [True, True, False]
    assert made.load == (2, 1)
    with pytest.raises(RetryLater, match="2 requests are running and 1 are waiting"):
        made.enter("d")
    made.leave("b")
    assert made.active("c")
    made.enter("d")
    made.leave("d")  # d leaves the queue
    made.leave("a")
    assert made.load == (1, 0)


def test_a_request_that_leaves_takes_its_waiting_call_along() -> None:
    made = batcher(active="ab")
    made.submit("a", "spatial_unet", tensors())
    made.submit("b", "spatial_unet", tensors())
    made.leave("a")
    made.leave("a")
    assert members(made.next_batch()) == ["b"]


def test_a_request_that_left_while_its_batch_ran_does_not_return() -> None:
    made = batcher(slots=1, active="ab")
    call = made.submit("a", "spatial_unet", tensors())
    made.next_batch()
    made.leave("a")
    made.done(call)
    assert made.load == (1, 0)
    assert made.active("b")


def test_thinking_counts_those_between_two_calls() -> None:
    made = batcher(slots=2, active="abc")
    assert made.thinking == 2
    call = made.submit("a", "spatial_unet", tensors())
    assert (made.thinking, made.waiting) == (1, 1)
    made.next_batch()
    assert (made.thinking, made.waiting) == (1, 0)
    made.done(call)
    assert made.thinking == 2


def test_what_can_never_run_is_refused() -> None:
    made = batcher(slots=1, active="ab")
    with pytest.raises(BackendError, match="temporal_unet: 3 rows, at most 2"):
        made.submit("a", "temporal_unet", tensors(rows=3))
    with pytest.raises(BackendError, match="conditioner: 1 rows, at most None"):
        made.submit("a", "conditioner", tensors())
    with pytest.raises(BackendError, match="'b' has no slot"):
        made.submit("b", "spatial_unet", tensors())
    made.submit("a", "spatial_unet", tensors())
    with pytest.raises(BackendError, match="already has a call"):
        made.submit("a", "spatial_unet", tensors())
    with pytest.raises(BackendError, match="already entered"):
        made.enter("a")


@pytest.mark.parametrize(("slots", "rows", "line"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_limits_are_checked(slots: int, rows: int, line: int) -> None:
    with pytest.raises(BackendError, match="at least one slot"):
        Batcher(slots, {"spatial_unet": rows}, line)


@st.composite
def traffic(draw: st.DrawFn) -> tuple[int, list[tuple[int, list[tuple[str, int, int]], int | None]]]:
    """The number of slots, and a tuple for each request: the tick at which it enters, its calls (stage, width, rows),
    and the index of the call before which it is cancelled (None: never).
    """
    call = st.sampled_from([("spatial_unet", 1, 1), ("spatial_unet", 2, 1), ("temporal_unet", 1, 1),
                            ("temporal_unet", 1, 2), ("vae_decoder", 1, 3)])  # fmt: skip
    requests = draw(
        st.lists(
            st.tuples(st.integers(0, 12), st.lists(call, min_size=1, max_size=6), st.none() | st.integers(0, 5)),
            min_size=1,
            max_size=10,
        )
    )
    return draw(st.integers(1, 6)), requests


@settings(max_examples=150, deadline=None)
@given(traffic())
def test_every_request_gets_its_rows_in_order_and_nobody_starves(
    case: tuple[int, list[tuple[int, list[tuple[str, int, int]], int | None]]],
) -> None:
    slots, requests = case
    made = Batcher(slots, ROWS, line=len(requests))
    came: dict[int, bool] = dict.fromkeys(range(len(requests)), False)
    received: dict[int, list[float]] = {i: [] for i in came}
    ended: set[int] = set()
    waited: dict[int, int] = {}  # batches since the request made its call
    for tick in range(1000):
        for i, (start, calls, cancel) in enumerate(requests):
            if not came[i] and tick >= start:
                made.enter(i)
                came[i] = True
            if i in ended or not came[i]:
                continue
            if len(received[i]) == (len(calls) if cancel is None else min(cancel, len(calls))):
                made.leave(i)  # the request is done, or is cancelled while a call waits
                ended.add(i)
                waited.pop(i, None)
            elif made.active(i) and i not in waited:
                stage, width, rows = calls[len(received[i])]
                made.submit(i, stage, tensors(100 * i + len(received[i]), rows, width))
                waited[i] = 0
        assert made.load[0] <= slots
        batch = made.next_batch()
        if batch is None:
            if len(ended) == len(requests):
                break
            continue
        together = batch.tensors()
        assert len(together["t"]) <= ROWS[batch.stage]
        assert len({call.kind for call in batch.calls}) == 1
        for call, part in zip(batch.calls, batch.split(together), strict=True):
            assert part["latents"].shape == call.tensors["latents"].shape
            assert set(part["t"].tolist()) == {100 * call.request + len(received[call.request])}
            received[call.request].append(float(part["t"][0]))
            del waited[call.request]
            made.done(call)
        for i in waited:
            waited[i] += 1
            # The oldest call leads every batch, so a call waits only for earlier calls.
            assert waited[i] < slots
    assert ended == set(came)
    for i, (_, calls, cancel) in enumerate(requests):
        assert received[i] == [100 * i + k for k in range(len(calls) if cancel is None else min(cancel, len(calls)))]
    assert made.load == (0, 0)
    assert made.waiting == 0
