#!/usr/bin/env bash
# PyModbus: of a register as BITS, bit 0 of the word is element 8 of the list.
#
# One expects: convert_from_registers([0x0001], BITS) is a list whose element 0 is the word's bit 0, as bitmaps of alarms and
# states are documented ("bit 0: grid lost"); or, the other way round, whose last element is.
# What happens: the list begins with the bits of the high byte, lowest first, then those of the low byte: word bit n is
# element (n + 8) mod 16. Two registers as UINT32 have yet another order.
# Seen with PyModbus 3.16.1, 2026-11-30. Who meets it: whoever shows an inverter's error words with the library's own decoder
# instead of shifting the integer: the wrong alarm, and never an error.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'pymodbus==3.16.1'
"$folder/venv/bin/python" - <<'EOF'
import sys

import pymodbus
from pymodbus.client.mixin import ModbusClientMixin

decoded = ModbusClientMixin.convert_from_registers
bits = ModbusClientMixin.DATATYPE.BITS
places = [decoded([1 << bit], bits).index(True) for bit in range(16)]
print(f"PyModbus {pymodbus.__version__}: bits 0 to 15 of a register are the elements {places}")
sys.exit(0 if places == [(bit + 8) % 16 for bit in range(16)] else 1)
EOF
