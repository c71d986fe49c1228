"""Progress: the first report is shown at once, later ones when somebody may have looked at the last, in the loop's thread."""

import asyncio
import threading

from watcher.progress import EVERY, reporter


def test_it_is_told_from_a_thread_and_not_too_often():
    shown, moments = [], iter([0.0, EVERY / 2, EVERY, 1.5 * EVERY, 3 * EVERY])

    async def scenario():
        here = threading.get_ident()
        report = reporter(
            asyncio.get_running_loop(),
            lambda n: shown.append((n, threading.get_ident() == here)),
            lambda: next(moments),
        )
        await asyncio.to_thread(lambda: [report(number) for number in (1, 2, 3, 4, 5)])

    asyncio.run(scenario())
    assert shown == [(1, True), (3, True), (5, True)]
