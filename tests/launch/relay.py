"""A bad network in user space, for kernels without netem: a cable between two TAP devices, late and with loss.

Run as a program in the switch's namespace, with a near and a far device: what enters the far one leaves the near one
later, or never; what enters the near one leaves the far one at once, as with netem on a host's own device. Unlike
netem's, its jitter never reorders: TCP would take the late frames for lost ones, far more of them than it is told.
"""

import argparse
import fcntl
import json
import os
import random
import select
import signal
import struct
import sys
import time
from collections import deque

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
MAX_FRAME = 65536


def open_tap(name):
    """A new TAP device in this namespace; it lasts as long as the descriptor, wherever it is moved."""
    descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    return descriptor


def write(descriptor, frame):
    try:
        os.write(descriptor, frame)
    except OSError:
        return  # a device that is down, or full: a cable has no memory


class Cable:
    """Frames under way: each as late as `delay` +- `jitter` seconds say, none before an earlier one."""

    def __init__(self, delay, jitter, loss, seed):
        self.delay, self.jitter, self.loss = delay, jitter, loss
        self.random = random.Random(seed)
        self.under_way = deque()
        self.carried = self.dropped = 0

    def enter(self, frame, now):
        if self.random.random() < self.loss:
            self.dropped += 1
            return
        due = now + self.delay + self.random.uniform(-self.jitter, self.jitter)
        self.under_way.append((max(due, self.under_way[-1][0] if self.under_way else due), frame))

    def leave(self, now):
        while self.under_way and self.under_way[0][0] <= now:
            self.carried += 1
            yield self.under_way.popleft()[1]

    def wait_seconds(self, now):
        return max(0.0, self.under_way[0][0] - now) if self.under_way else None


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("near")
    parser.add_argument("far")
    for name in ("delay", "jitter", "loss"):
        parser.add_argument(name, type=float)
    args = parser.parse_args()
    near, far = open_tap(args.near), open_tap(args.far)
    cable = Cable(args.delay, args.jitter, args.loss, seed=0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        while True:
            readable, _, _ = select.select([near, far], [], [], cable.wait_seconds(time.monotonic()))
            if near in readable:
                write(far, os.read(near, MAX_FRAME))
            if far in readable:
                cable.enter(os.read(far, MAX_FRAME), time.monotonic())
            for frame in cable.leave(time.monotonic()):
                write(near, frame)
    finally:
        sys.stdout.write(json.dumps({"carried": cable.carried, "dropped": cable.dropped}))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
