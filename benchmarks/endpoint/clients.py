"""Clients that mean no good, until they are ended: python -m benchmarks.endpoint.clients PORT COUNT.

Of ten, eight send a request byte by byte, one sends garbage, one a line without end. Whoever is shut out comes back.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import sys

PAUSE_SECONDS = 0.5
LINE = b"GET /" + b"x" * (1 << 18)


async def misuse(port: int, number: int) -> None:
    """One client."""
    for turn in itertools.count():
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            if number % 10 == 0:
                writer.write(os.urandom(512) + b"\r\n\r\n")
            elif number % 10 == 1:
                writer.write(LINE)
            else:
                writer.write(b"GET /metrics HTTP/1.1\r\n")
            while not reader.at_eof() and not writer.is_closing():
                await asyncio.wait_for(asyncio.shield(writer.drain()), 5)
                try:
                    await asyncio.wait_for(reader.read(4096), PAUSE_SECONDS)
                except asyncio.TimeoutError:
                    writer.write(b"x")
            writer.close()
        except (OSError, asyncio.TimeoutError):
            pass
        await asyncio.sleep(PAUSE_SECONDS * (1 + (turn + number) % 3))


async def main() -> None:
    """All of them."""
    port, count = int(sys.argv[1]), int(sys.argv[2])
    await asyncio.gather(*(misuse(port, number) for number in range(count)))


if __name__ == "__main__":
    os.nice(19)  # they stand for other machines
    asyncio.run(main())
