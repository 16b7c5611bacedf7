#!/usr/bin/env bash
# PyModbus: its CRC is not the number that the catalogues give, but that number with its bytes exchanged.
#
# One expects: FramerRTU.compute_CRC(b"123456789") is 0x4B37, the published check value of CRC-16/MODBUS.
# What happens: it is 0x374B, exchanged for a framer that packs it big endian; the documentation of the function does not say
# so. Others (crcmod) return 0x4B37.
# Seen with PyModbus 3.16.1 and crcmod 1.7, 2026-11-30. Who meets it: whoever has the library already and borrows its CRC for
# one of the many serial protocols that share the polynomial and not the byte order: every frame looks corrupt, or,
# packed twice, right on the bench and wrong on the wire.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'pymodbus==3.16.1' 'crcmod==1.7'
"$folder/venv/bin/python" - <<'EOF'
import sys

import crcmod.predefined
import pymodbus
from pymodbus.framer.rtu import FramerRTU

ours, others = FramerRTU.compute_CRC(b"123456789"), crcmod.predefined.mkCrcFun("modbus")(b"123456789")
print(f"PyModbus {pymodbus.__version__}: {ours:04X}; crcmod: {others:04X}; the catalogue: 4B37")
sys.exit(0 if (ours, others) == (0x374B, 0x4B37) else 1)
EOF
