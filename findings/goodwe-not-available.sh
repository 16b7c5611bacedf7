#!/usr/bin/env bash
# goodwe: the one word FFFF, which an inverter sends for what it does not have, is nothing, 0 or a measurement, by the sensor.
#
# One expects: the library that Home Assistant uses turns "not available" into None for every sensor, as it does for
# temperatures and energies.
# What happens: a temperature and an energy are None; a voltage and an unsigned current are 0, as if the phase were dead; a
# frequency is -0.01 Hz, a signed current -0.1 A, a signed power -1 W. 7FFF is None for a temperature, 3276.7 V for a voltage.
# Seen with goodwe 0.4.10, 2026-11-30. Who meets it: owners of one-phase inverters of a three-phase family, whose averages and
# minimum alarms are pulled down by phases that are not there.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'goodwe==0.4.10'
"$folder/venv/bin/python" - <<'EOF'
import io
import sys
from importlib.metadata import version

from goodwe import sensor

KINDS = "Temp", "Energy", "Voltage", "Current", "Frequency", "CurrentS", "PowerS", "Power"


def decoded(kind: str, word: int):
    """What a sensor of this kind makes of a word."""
    return getattr(sensor, kind)("x", 0, "x", None).read_value(io.BytesIO(word.to_bytes(2, "big")))


absent = {kind: decoded(kind, 0xFFFF) for kind in KINDS}
most = {kind: decoded(kind, 0x7FFF) for kind in ("Temp", "Voltage")}
print(f"goodwe {version('goodwe')}: FFFF is {absent}, 7FFF is {most}")
wanted = dict(Temp=None, Energy=None, Voltage=0, Current=0, Frequency=-0.01, CurrentS=-0.1, PowerS=-1)
same = all(absent[kind] == value for kind, value in wanted.items())
sys.exit(0 if same and most == {"Temp": None, "Voltage": 3276.7} else 1)
EOF
