"""A virtual switch whose every frame takes a given time, for hosts.sh: where the kernel has no netem.

    python tools/delay_line.py PORTS DELAY_S

Makes the interfaces port1, port2, ... (TAP) in its own network namespace, from where they can be moved to those of the
hosts; a frame that comes from one goes to all others. Ends when its standard input is closed.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import struct
import sys
import time

_TUNSETIFF, _TAP_WITHOUT_HEADER = 0x400454CA, 0x0002 | 0x1000
_LARGEST_FRAME = 1 << 16


def main() -> None:
    ports, delay = int(sys.argv[1]), float(sys.argv[2])
    taps = []
    for number in range(1, ports + 1):
        tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH14x", f"port{number}".encode(), _TAP_WITHOUT_HEADER))
        taps.append(tap)
    print("ready", flush=True)
    poll = select.poll()
    for descriptor in (*taps, sys.stdin.fileno()):
        poll.register(descriptor, select.POLLIN)
    # All frames take the same time: first in, first out.
    under_way: collections.deque[tuple[float, int, bytes]] = collections.deque()
    while True:
        wait_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        # Milliseconds are too coarse: look again at once where less is left.
        for descriptor, _ in poll.poll(None if wait_s is None else int(1e3 * wait_s)):
            if descriptor not in taps:
                return
            for _ in range(64):
                try:
                    frame = os.read(descriptor, _LARGEST_FRAME)
                except OSError:
                    break  # no more, or an interface that is down
                under_way.append((time.monotonic() + delay, descriptor, frame))
        while under_way and under_way[0][0] <= time.monotonic():
            _, source, frame = under_way.popleft()
            for tap in taps:
                if tap != source:
                    # Its host is gone, or its queue is full: lost, as on any network.
                    with contextlib.suppress(OSError):
                        os.write(tap, frame)


if __name__ == "__main__":
    main()
