#!/usr/bin/env bash
# scapy: the packets of a pcapng file's Simple Packet Blocks are of now, of the moment in which the file is read.
#
# One expects: a Simple Packet Block has no time, so the packet has none, or 0, or the reader says so.
# What happens: each packet gets the time at which scapy made its object. Read twice, the same file has other times; a
# capture of last year looks like traffic of this minute.
# Seen with scapy 2.8.0, 2026-11-30. Who meets it: readers of captures from small devices and loggers, which write Simple
# Packet Blocks because they have no clock; the rest of such files is as usual.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'scapy==2.8.0'
"$folder/venv/bin/python" - <<'EOF'
import io
import struct
import sys
import time

import scapy
from scapy.utils import PcapNgReader


def block(kind: int, body: bytes) -> bytes:
    """A block of a pcapng file, little endian."""
    size = 12 + len(body)
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


packet = bytes(12) + b"\x08\x00" + bytes(46)
header = block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
interface = block(1, struct.pack("<HHI", 1, 0, 65535))
file = header + interface + 2 * block(3, struct.pack("<I", len(packet)) + packet)
times = []
for _ in range(2):
    before = time.time()
    times.append([float(one.time) for one in PcapNgReader(io.BytesIO(file))])
    are_now = len(times[-1]) == 2 and all(before - 1 <= when <= time.time() + 1 for when in times[-1])
    time.sleep(1.1)
print(f"scapy {scapy.__version__}: read once {times[0]}, read again {times[1]}")
sys.exit(0 if are_now and times[0] != times[1] else 1)
EOF
