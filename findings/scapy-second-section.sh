#!/usr/bin/env bash
# scapy: in a pcapng file of two sections the second section's packets are read with the first one's interfaces.
#
# One expects: a Section Header Block begins anew, as the format says: interface 0 of a second section is the first that
# this section describes. Two pcapng files joined with cat are one valid file.
# What happens: the interfaces of all sections are counted through. A section whose interface counts nanoseconds, behind one
# of microseconds, gets times a thousand times too late (the year 58,000), without a word.
# Seen with scapy 2.8.0, 2026-11-30. Who meets it: whoever joins captures of two machines or tools, one of which writes
# nanoseconds, or rotates into one file.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'scapy==2.8.0'
"$folder/venv/bin/python" - <<'EOF'
import io
import struct
import sys

import scapy
from scapy.utils import PcapNgReader


def block(kind: int, body: bytes) -> bytes:
    """A block of a pcapng file, little endian."""
    size = 12 + len(body)
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


def section(digits: int) -> bytes:
    """A capture of one packet at WHEN; its interface counts in tenths to the power of so many."""
    resolution = struct.pack("<HHB3xHH", 9, 1, digits, 0, 0)
    when = WHEN * 10**digits
    packet = bytes(12) + b"\x08\x00" + bytes(46)
    return (
        block(0x0A0D0D0A, struct.pack("<IHHq", 0x1A2B3C4D, 1, 0, -1))
        + block(1, struct.pack("<HHI", 1, 0, 65535) + resolution)
        + block(6, struct.pack("<IIIII", 0, when >> 32, when & 0xFFFFFFFF, len(packet), len(packet)) + packet)
    )


WHEN = 1_774_094_400
alone = [float(one.time) for one in PcapNgReader(io.BytesIO(section(9)))]
joined = [float(one.time) for one in PcapNgReader(io.BytesIO(section(6) + section(9)))]
print(f"scapy {scapy.__version__}: the second section alone {alone}; behind another {joined}")
sys.exit(0 if alone == [WHEN] and joined == [WHEN, 1000 * WHEN] else 1)
EOF
