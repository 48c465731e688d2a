"""Slots for posts: how many, in which order, and what is kept for receivers that answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from poc_kernels.service.slots import Slots


class Posts:
    """Posts that take slots, and end when they are told to."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots
        self.under_way: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def begin(self, *names: str) -> list[str]:
        """Begin posts, each to the receiver before the name's last character; the names of those under way."""
        for name in names:
            self._ends[name] = asyncio.Event()
            self._tasks[name] = asyncio.create_task(self._post(name))
        return await self.now()

    async def now(self) -> list[str]:
        for _ in range(5):
            await asyncio.sleep(0)
        return self.under_way

    async def end(self, *names: str) -> list[str]:
        for name in names:
            self._ends[name].set()
        return await self.now()

    async def cancel(self, *names: str) -> list[str]:
        for name in names:
            self._tasks[name].cancel()
        return await self.now()

    async def _post(self, name: str) -> None:
        async with self.slots.one(name[:-1]):
            self.under_way.append(name)
            await self._ends[name].wait()
            self.under_way.remove(name)


@pytest.fixture
def played() -> Callable[[Callable[[Posts], Awaitable[None]], int], None]:
    """Plays something with posts on so many slots."""

    def play(game: Callable[[Posts], Awaitable[None]], slots: int) -> None:
        async def begin() -> None:
            await game(Posts(Slots(slots)))

        asyncio.run(begin())

    return play


Played = Callable[[Callable[[Posts], Awaitable[None]], int], None]


def test_posts_begin_in_order_and_one_receiver_has_a_quarter(played: Played) -> None:
    async def game(posts: Posts) -> None:
        assert await posts.begin("a1", "a2", "a3", "a4", "b1", "b2", "b3") == ["a1", "a2", "b1", "b2"]
        assert await posts.end("a2", "b1") == ["a1", "b2", "a3", "b3"]
        assert await posts.end("a1") == ["b2", "a3", "b3", "a4"]

    played(game, 8)


def test_silent_and_unknown_receivers_leave_room_for_those_that_answer(played: Played) -> None:
    async def game(posts: Posts) -> None:
        for number in range(40):
            posts.slots.note(f"silent {number} ", False)
        posts.slots.note("good ", True)
        await posts.begin(*(f"silent {number} 1" for number in range(40)))
        assert len(posts.under_way) == 4
        await posts.begin(*(f"new {number} 1" for number in range(40)))
        assert len(posts.under_way) == 6
        assert (await posts.begin("good 1", "good 2", "good 3"))[6:] == ["good 1", "good 2"]
        assert (await posts.end("good 1"))[7:] == ["good 3"]
        assert (await posts.end("silent 0 1"))[-1] == "silent 4 1"  # in its order, before those that are new

    played(game, 8)


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_with_few_slots_each_kind_has_one(played: Played, slots: int) -> None:
    async def game(posts: Posts) -> None:
        posts.slots.note("silent ", False)
        posts.slots.note("good ", True)
        names = ["silent 1", "new 1", "good 1"]
        begun = []
        await posts.begin(*names)
        while posts.under_way:
            begun += posts.under_way
            await posts.end(*posts.under_way)
        assert sorted(begun) == sorted(names)

    played(game, slots)


def test_a_post_that_is_given_up_frees_its_place(played: Played) -> None:
    async def game(posts: Posts) -> None:
        assert await posts.begin("a1", "a2", "a3") == ["a1"]
        await posts.cancel("a2")
        assert await posts.end("a1") == ["a3"]
        posts._ends["a3"].set()
        await posts.begin("a4")
        await posts.cancel("a4")  # whether it waits or was given a slot
        assert "a5" in await posts.begin("a5")

    played(game, 4)


def test_receivers_are_remembered_up_to_a_bound(played: Played) -> None:
    async def game(posts: Posts) -> None:
        for number in range(3000):
            posts.slots.note(f"r{number}", True)
        assert len(posts.slots._answered) == 1024
        assert "r2999" in posts.slots._answered

    played(game, 4)
