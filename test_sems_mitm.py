"""Tests of sems_mitm: tables first, then real sockets on free ports of the loopback interface.

make test                          all of it
python3 -m unittest -k Framer      what matches
python3 test_sems_mitm.py bench    figures beside the goals (make bench)
python3 test_sems_mitm.py soak 20  twenty minutes of trouble (make soak)
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import http.client
import io
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import urllib.error
import urllib.request
from datetime import datetime, timedelta, timezone
from unittest import mock

import sems_mitm as sems

HERE = os.path.dirname(os.path.abspath(__file__))
METER, INVERTER, HYBRID = "91000HKU00000042", "53000DSC00000042", "9010KETU00000042"  # made-up serial numbers
NOON = datetime(2026, 3, 21, 12, 0, 0)
METER_RANGES = [(2048, (0, 0, 1, 0, 0, 2, *[0] * 6, 0, 0, 3, *[0] * 9)), (2096, (2400, 2401, 0, *[0] * 6, 0, 1500, 0, 2600, 0, 0, 0, 4100))]
INVERTER_RANGES = [(30103, (3347, 31)), (30127, (0, 1051, 1)), (30144, (209, 0, 20642, 0, 1667))]


def frame(
    function: int = sems.LIVE, cls: int = sems.METER, serial: str = METER, when: datetime = NOON, ranges=None, clear: bytes | None = None
) -> bytes:
    """A device's frame; ranges are (first register, words), clear text beats them."""
    stamp = sems.time_stamp(when)
    if function == sems.CONFIRMATION:
        clear = clear or struct.pack(">HHB11s", 0x1216, 0x1218, 0, b"\xff" * 11)
        stamp, iv = b"", sems.device_iv(stamp)
    else:
        iv = sems.device_iv(stamp)
        clear = sems.payload(METER_RANGES if ranges is None else ranges) if clear is None else clear
    return sems.encode(sems.Packet(sems.OUTBOUND, f"{cls:02x}{function:02x}", serial, iv, stamp, clear))


def portal_frame(kind: str, clear: bytes, serial: str = METER, when: datetime = NOON) -> bytes:
    """A portal's frame with any clear text."""
    return sems.encode(sems.Packet(sems.INBOUND, kind, serial, sems.device_iv(sems.time_stamp(when)[::-1]), b"", clear))


def until(condition, seconds: float = 10):
    """The condition's first true value; fails when it does not come in time."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {condition}")
        time.sleep(0.005)


# Frames made with OpenSSL's AES, independently of this project, and the metrics that they must become.
VECTORS = json.loads(r"""[
{"name": "HomeKit 1000, importing at night", "direction": "outbound", "hex": "504f5354475700000099030400003931303030484b5530303030303034321a03150d0e0f000000000000000000001a03150d0e0f68936522af3387af67864290c79bcffec8fb93d30c42a54e0fbd4d7dddaa8dc4be43c60fb4b3bd5756fdb6ffb40022e4c57e4ff114d5e2321f45f2cceff9e36d33b5f0d7c7ec2a41e263d4d83802266520f5cf47f7995bfa8a01e401be5c62e0a8c2bb48d2ad8f9381dc0e4c5470040baa8e", "metrics": [{"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"1\"", "value": 1234560.0}, {"metric": "meter_energy_export_decawatt_hours_total", "labels": "", "value": 123456.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"2\"", "value": 2345670.0}, {"metric": "meter_energy_generation_decawatt_hours_total", "labels": "", "value": 234567.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_sum_of_energy_generation_and_export_decawatt_hours_total", "labels": "", "value": 300000.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"1\"", "value": 655370.0}, {"metric": "meter_energy_import_decawatt_hours_total", "labels": "", "value": 65537.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"2\"", "value": 120.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_sum_of_energy_import_less_generation_decawatt_hours_total", "labels": "", "value": 70000.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"1\"", "value": 239.8}, {"metric": "meter_voltage_volts", "labels": "channel=\"2\"", "value": 240.1}, {"metric": "meter_voltage_volts", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_current_amperes", "labels": "channel=\"1\"", "value": 5.12}, {"metric": "meter_current_amperes", "labels": "channel=\"2\"", "value": 10.33}, {"metric": "meter_current_amperes", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"1\"", "value": -1234.0}, {"metric": "meter_power_export_watts", "labels": "", "value": -1234.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"2\"", "value": -7.0}, {"metric": "meter_power_generation_watts", "labels": "", "value": -7.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_sum_of_power_generation_and_export_watts", "labels": "", "value": -1241.0}]},
{"name": "HomeKit 3000", "direction": "outbound", "hex": "504f5354475700000099030400003933303030484b5530303030303034321a03150d0e0f000000000000000000001a03150d0e0f68936522af3387af67864290c79bcffec8fb93d30c42a54e0fbd4d7dddaa8dc4be43c60fb4b3bd5756fdb6ffb40022e4c57e4ff114d5e2321f45f2cceff9e36de96e32f70ec944c6bbecc6d97c19bdec3af5594a2b9d2318d1ddd871324b566ab55688c83e7e219d1aeb87e4e8664cefecba", "metrics": [{"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"1\"", "value": 1234560.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"2\"", "value": 2345670.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_energy_export_decawatt_hours_total", "labels": "", "value": 300000.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"1\"", "value": 655370.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"2\"", "value": 120.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_energy_import_decawatt_hours_total", "labels": "", "value": 70000.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"1\"", "value": 239.8}, {"metric": "meter_voltage_volts", "labels": "channel=\"2\"", "value": 240.1}, {"metric": "meter_voltage_volts", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_current_amperes", "labels": "channel=\"1\"", "value": 5.12}, {"metric": "meter_current_amperes", "labels": "channel=\"2\"", "value": 10.33}, {"metric": "meter_current_amperes", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"1\"", "value": 150.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"2\"", "value": -400.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"3\"", "value": 90.0}, {"metric": "meter_power_export_watts", "labels": "", "value": -160.0}]},
{"name": "HomeKit 1000, buffered", "direction": "outbound", "hex": "504f5354475700000099034500003931303030484b5530303030303034321a03150d0e0f000000000000000000001a03150d0e0f68936522af3387af67864290c79bcffec8fb93d30c42a54e0fbd4d7dddaa8dc4be43c60fb4b3bd5756fdb6ffb40022e4c57e4ff114d5e2321f45f2cceff9e36d7c4ad3a1c0fe8f3e00f91c12f6339c554a0a8d61f069c59c20d3d49f2b34207484acae8d84ce79cc81aa9b0b4f5afa319421", "metrics": null},
{"name": "DNS G3", "direction": "outbound", "hex": "504f53544757000000c901040000353330303044534330303030303034321a03150d0e0f000000000000000000001a03150d0e0fd442c78639fa14ed47a9991d29d86e79bbc7ce3692c259750d3f7ccb891a0f22587df0d91be86fb8b25c83f82fbeb98b503364428cc985bf5d7854780752220b40424a413c3d3c08a98944d3f10a1661547940a63692cb8afcbc40b5857f985d585c7465f8e11bd45d0dbc7866f5b2795facc1996b83521237837d8a8f6dd1613aa282d9917b8807c7082c75df08675532c9de452c730f7d6289e02e20ac25d27d00", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 3120.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 312.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 52.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 5.2}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 305.5}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 4.7}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2361.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 236.1}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 132.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 13.2}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5003.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.03}, {"metric": "inverter_power_output_watts", "labels": "", "value": 3071.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 3119.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": -544.0}, {"metric": "inverter_power_factor_ratio", "labels": "", "value": 0.985}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 512.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 183.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 67881.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 4321.0}, {"metric": "inverter_grid_code", "labels": "", "value": 85.0}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 390.5}, {"metric": "inverter_rssi_percent", "labels": "", "value": 63.0}]},
{"name": "DNS G3, blocks in another order", "direction": "outbound", "hex": "504f53544757000000c901040000353330303044534330303030303034321a03150d0e0f000000000000000000001a03150d0e0f2d308355b10a404a32bff3b88619f1340b8c3c0c393c84954d4fd6851ca2af4f3d7227363a0c7e8f3f94b23518db517e6fd76fb8e41127a1f0253921b613ebbb13d83dc2d5500751b0a7e1574bc1c812cc11caf362450f105af19fecab60622f442b528f95ca0d66df337e634d5606c7d8fc7763ada8be1b2425636b4a66ee639353b8e0b6e3febfd51c760ff63c775aedcf5bc05685f261b3c563e6cd50ae611f9c", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 3120.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 312.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 52.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 5.2}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 305.5}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 4.7}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2361.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 236.1}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 132.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 13.2}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5003.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.03}, {"metric": "inverter_power_output_watts", "labels": "", "value": 3071.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 3119.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": -544.0}, {"metric": "inverter_power_factor_ratio", "labels": "", "value": 0.985}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 512.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 183.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 67881.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 4321.0}, {"metric": "inverter_grid_code", "labels": "", "value": 85.0}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 390.5}, {"metric": "inverter_rssi_percent", "labels": "", "value": 63.0}]},
{"name": "D-NS, high word of power FFFF", "direction": "outbound", "hex": "504f535447570000009901040000393330303044534e30303030303034321a03150d0e0f000000000000000000001a03150d0e0f9b09f7ce869067da00d671e14a98bcee3e36e903e75546ae5daab8e708726f9314dbf2313daba8dc568188b5471cc739e167a4fe7c31beb4abcb53a10960eac8b4e7da566d8c2e606753a52e49c9f1db1eea4c229d791406ea304977aa67a45ef86f9f20bbdfd5f2103763eb901f8305ad0b", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 1684.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 168.4}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 2.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 0.2}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 202.6}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 0.1}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2360.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 236.0}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 5.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 0.5}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 4998.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 49.98}, {"metric": "inverter_power_output_watts", "labels": "", "value": 70.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 2048.0}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 265.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 119.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 185841.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 29746.0}, {"metric": "inverter_grid_code", "labels": "", "value": 20.0}]},
{"name": "MT, three phases, three strings", "direction": "outbound", "hex": "504f53544757000000b901040000393032354b4d545530303030303034321a03150d0e0f000000000000000000001a03150d0e0ffff3b0043fa06ef176a7fd825ccbed5b1df9588bb1be8fe8dc9e8e903a644b886cb0f4adaf20f011627531fd3a53d89c0cb61167c2b87376352377161e8597a59c18dc1bd48edf011f15a12fe93fc30bf55c76170789950e13e54b9dacc6aab38cdc88c8e5b5b57b497bb8bdb5a9dc03de777586d7b2a00720fcd225d45219c3202f4795054e8a76ff973764f87f16916c79", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 6500.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 650.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 85.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 8.5}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 640.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 8.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"3\"", "value": 630.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"3\"", "value": 7.5}, {"metric": "inverter_line_voltage_volts", "labels": "line=\"12\"", "value": 400.1}, {"metric": "inverter_line_voltage_volts", "labels": "line=\"23\"", "value": 400.2}, {"metric": "inverter_line_voltage_volts", "labels": "line=\"31\"", "value": 400.3}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2311.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 231.1}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"2\"", "value": 231.2}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"3\"", "value": 231.3}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 210.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 21.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"2\"", "value": 21.1}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"3\"", "value": 21.2}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5001.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.01}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"2\"", "value": 50.01}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"3\"", "value": 50.01}, {"metric": "inverter_power_output_watts", "labels": "", "value": 14500.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 14600.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": -100.0}, {"metric": "inverter_input_power_watts", "labels": "", "value": 15000.0}, {"metric": "inverter_power_factor_ratio", "labels": "", "value": 0.993}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 481.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 523.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 74565.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 4321.0}, {"metric": "inverter_grid_code", "labels": "", "value": 9.0}, {"metric": "inverter_leakage_current_amperes", "labels": "", "value": 0.0}]},
{"name": "ET hybrid with battery", "direction": "outbound", "hex": "504f535447570000028902040001393031304b45545530303030303034321a03150d0e0f000000000000000000001a03150d0e0fc203f9f84c6ea2257b42ee8172436a6fe3c6dee95516b11d8069e935a788ff70c101cae5e53e1f2088a81caa70552d66956d07202dbfb8c45470800912e11a43d34dc5a4f34b7cadd1dbf024844982d1fdad0b1312e3425210d1a43dad7025df05754d8ea7ba2451afe4824cb68f1317a491fc0b2c5ade263a59b4f2fcc5ea9f220c9a819a8fdbbc93db0991d2b7fb1a44e9e103c1bcdd2275e9072f3b2646b092a826e77e98ef1ce5651ff431e0e6ea87799c128a735f298217ee2c70b8020df94e9795f24aa9e9dfa8319f606dacfb7b1d6834d526d3324f4d78a2df941856f3dd99e257d0fc7fd480948538addc61318fa137b5a5b557d6563974bff30d1c6c193afcf0385c7661c0cc23efa9145d72216eea110485a31deca935f5ed5107925dca82c87e0a7c56e331344616788f606025848ccbb5fddbe5af610f6dcdd3f21f59facddc01310df25d43ff01d9f434784b9065ceda1b89ac6f177758e93b90a9c661012b34a48095c29401e2316d10f1c4d387ed22e734059ebddf8723699f61b8e37ccfd850052f9c5fde193f582ab341e1de5c8af4dbd0bbe2884308a6db6c90c77b1b5169ca3fd40e5f234eb246e9dcd44c0b60a3299befb1ceb6be708dd7841e5b70d76e4ff3a5b710ace8a3b2b9054fd72bf2041323ea22a2bb2060bd988cb16df9bd6b849e9ee82b3756608e07f861215d5ffea3a498416ccfa0e36375f93bd072fcafc4eec15947281d3c20208efa94dce906b5153c9101b959c1296773330f2c26928a110149ee97716f668259bedbabaab61cc328fca9c32cc7fe46292d41450347b998210362206137f2e9a902d8ecaa7a4b45b8bad16b307c3609", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 5620.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 562.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 10.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 1.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"1\"", "value": 560.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 300.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 1.3}, {"metric": "inverter_string_power_watts", "labels": "string=\"2\"", "value": 389.0}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2322.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 232.2}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 16.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 1.6}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 4996.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 49.96}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"1\"", "value": 320.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"2\"", "value": 232.7}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"2\"", "value": 1.6}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"2\"", "value": 49.93}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"2\"", "value": 310.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"3\"", "value": 232.7}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"3\"", "value": 1.6}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"3\"", "value": 49.96}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"3\"", "value": 307.0}, {"metric": "inverter_power_output_watts", "labels": "", "value": 937.0}, {"metric": "inverter_active_power_watts", "labels": "", "value": -736.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"1\"", "value": 229.6}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"1\"", "value": 0.1}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"1\"", "value": 49.96}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"1\"", "value": 12.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_load_watts", "labels": "", "value": 180.0}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 449.0}, {"metric": "inverter_module_temperature_celsius", "labels": "", "value": 0.0}, {"metric": "inverter_heatsink_temperature_celsius", "labels": "", "value": 39.9}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 653.9}, {"metric": "battery_voltage_volts", "labels": "battery=\"1\"", "value": 406.8}, {"metric": "battery_current_amperes", "labels": "battery=\"1\"", "value": -0.1}, {"metric": "battery_power_watts", "labels": "battery=\"1\"", "value": -1.0}, {"metric": "battery_mode", "labels": "battery=\"1\"", "value": 3.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_grid_code", "labels": "", "value": 2.0}, {"metric": "inverter_hybrid_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 13534.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 488.0}, {"metric": "inverter_energy_export_watthours_total", "labels": "", "value": 1350100.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 1322.0}, {"metric": "inverter_energy_import_watthours_total", "labels": "", "value": 77700.0}, {"metric": "inverter_energy_load_watthours_total", "labels": "", "value": 1587700.0}, {"metric": "battery_energy_charge_watthours_total", "labels": "", "value": 780600.0}, {"metric": "battery_energy_discharge_watthours_total", "labels": "", "value": 633100.0}, {"metric": "inverter_rssi_percent", "labels": "", "value": 100.0}, {"metric": "meter_frequency_hertz", "labels": "", "value": 49.96}, {"metric": "meter_energy_export_decawatt_hours_total", "labels": "", "value": 112247.0}, {"metric": "meter_energy_import_decawatt_hours_total", "labels": "", "value": 647297.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"1\"", "value": 254.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"2\"", "value": -111.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"3\"", "value": 367.0}, {"metric": "meter_power_export_watts", "labels": "", "value": 510.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"1\"", "value": 232.5}, {"metric": "meter_voltage_volts", "labels": "channel=\"2\"", "value": 232.6}, {"metric": "meter_voltage_volts", "labels": "channel=\"3\"", "value": 232.1}, {"metric": "meter_current_amperes", "labels": "channel=\"1\"", "value": 1.7}, {"metric": "meter_current_amperes", "labels": "channel=\"2\"", "value": 1.2}, {"metric": "meter_current_amperes", "labels": "channel=\"3\"", "value": 2.0}, {"metric": "battery_temperature_celsius", "labels": "battery=\"1\"", "value": 35.5}, {"metric": "battery_charge_limit_amperes", "labels": "battery=\"1\"", "value": 25.0}, {"metric": "battery_discharge_limit_amperes", "labels": "battery=\"1\"", "value": 30.0}, {"metric": "battery_state_of_charge_ratio", "labels": "battery=\"1\"", "value": 0.97}, {"metric": "battery_state_of_health_ratio", "labels": "battery=\"1\"", "value": 0.99}, {"metric": "battery_modules", "labels": "battery=\"1\"", "value": 8.0}]},
{"name": "XS settings with a model name", "direction": "outbound", "hex": "504f535447570000009901030000393530303053535830303030303034321a03150d0e0f000000000000000000001a03150d0e0fb9a4d8cbaf5a9970dc1dcf261156d9ae8143a8a187cd28c61a885dcdcec05df52018410db238ac317a5ffeb34b109e64a1f661bc61f8202102e455f5a6c7199b0c751177c7ad9637056a80cc9d6d3b8dec18b8123c20ff0e449c37b9e15a8e44ebf66fef3fee0d65aeb9c6f130c58e9c3314", "metrics": null},
{"name": "portal ACK 0304", "direction": "inbound", "hex": "47570000003103043931303030484b5530303030303034321a0e0d15031a00000000000000000000461a68966008586b9e9bbbd95586f2e0c5a1"},
{"name": "portal NACK 0304", "direction": "inbound", "hex": "47570000003103043931303030484b5530303030303034320f0e0d15031a00000000000000000000dd8d8e819f160cded287cd2c16e0ae8dcc96"},
{"name": "portal ACK 0245 for a hybrid", "direction": "inbound", "hex": "4757000000310245393031304b45545530303030303034320f0e0d15031a00000000000000000000b9009c9077365dd9051812abf42a60a9959e"},
{"name": "portal sets a HomeKit's clock", "direction": "inbound", "hex": "47570000003101163931303030484b5530303030303034321a0e0d15031a000000000000000000006661d72f84a652238dd629c92dea9f75abf8"},
{"name": "portal sets an inverter's clock", "direction": "inbound", "hex": "4757000000310116353330303044534330303030303034320f0e0d15031a000000000000000000001ed0b82bb98600d8cacb098bf1c59ac2ac9b"},
{"name": "a write that is not the clock: to be dropped", "direction": "inbound", "hex": "4757000000310116353330303044534330303030303034320f0e0d15031a0000000000000000000094dbadb726b5936eecb420b23e680c34dd0d"},
{"name": "DNS confirms a clock write", "direction": "outbound", "hex": "504f53544757000000310110353330303044534330303030303034321a03150d0e0f00000000000000000000ba73ff557bd0508bd59c5793fe63e381311a", "metrics": null}
]""")


OUT, IN = sems.OUTBOUND, sems.INBOUND
OTHER = "91000HKU00000043"
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"


def address_of(data: bytes, wire=OUT) -> sems.Address:
    return sems.address(data[: wire.head], len(data), wire)


def with_crc(data: bytes, wire=OUT) -> bytes:
    """data with its length field and CRC made right."""
    size = len(data) - len(wire.prefix) - 7
    data = wire.prefix + size.to_bytes(4, "big") + data[len(wire.prefix) + 4 : -2]
    return data + sems.crc16(data).to_bytes(2, wire.order)


def broken(data: bytes) -> bytes:
    """A frame with a bad CRC."""
    return data[:-1] + bytes([data[-1] ^ 0x55])


def claim(body: bytes, size: int = 0) -> bytes:
    """A device's header that claims size bytes in all (or just the body), and the body."""
    return OUT.prefix + ((size or len(body) + 10) - 13).to_bytes(4, "big") + body


def plain_pieces(pieces) -> list:
    """[kind, bytes, packets], frames one by one, neighbours of another kind as one: what does not depend on the cut of reads."""
    found: list = []
    for piece in pieces:
        kind, data, count = piece[:3]
        if kind == "frame":
            size = len(data) // count
            found += [["frame", data[at : at + size], 1] for at in range(0, len(data), size)]
        elif found and found[-1][0] == kind:
            found[-1][1:] = [found[-1][1] + data, found[-1][2] + count]
        else:
            found.append([kind, data, count])
    return found


def cuts(data: bytes, rng: random.Random, most: int = 4) -> list:
    """data in up to `most` parts, cut at random."""
    at = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(most)))
    return [part for part in (data[a:b] for a, b in zip([0, *at], [*at, len(data)])) if part]


@contextlib.contextmanager
def time_zone(zone: str):
    """The process in a time zone."""
    try:
        with mock.patch.dict(os.environ, TZ=zone):
            time.tzset()
            yield
    finally:
        time.tzset()


def scraped(store: sems.Store, now: float = 0.0, wall: float = 0.0) -> str:
    """The text of a scrape."""
    return "".join(sems.exposition(store.collect(now, wall)))


def shown(store: sems.Store, now: float = 0.0, wall: float = 0.0) -> dict:
    """Series to value, as a scrape reads them."""
    lines = scraped(store, now, wall).splitlines()
    return {series: float(value) for series, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))}


def new_session(mode: str = sems.FORWARD, up: bool = True, **options) -> sems.Session:
    session = sems.Session(sems.Exporter(sems.Store(**options), mode), "192.0.2.1:5", 0.0)
    if up:
        session.portal_came()
    return session


def pumped(session: sems.Session, now: float = 0.0, most: int = 1 << 30) -> bytes:
    """What the portal's socket takes, `most` bytes of it."""
    sent = b""
    while len(sent) < most:
        data = session.outgoing(now)[: most - len(sent)]
        if not data:
            break
        session.portal_took(len(data), now)
        sent += data
    return sent


def answers(session: sems.Session) -> list:
    """(type, clear text) of what the device is sent."""
    data = session.to_device.ready()
    session.to_device.took(len(data))
    return [(p.type, p.clear) for p in (sems.decode(piece.data, IN) for _, piece in sems.pieces_of("inbound", data))]


def minute(count: int) -> datetime:
    return NOON + timedelta(minutes=count)


@contextlib.contextmanager
def quiet():
    """No log lines on the terminal; what is logged as a list of messages."""
    with mock.patch.object(sems.log, "_log") as logged:
        lines: list = []
        logged.side_effect = lambda level, text, args, **more: lines.append(text % args if args else text)
        yield lines


class Checksum(unittest.TestCase):
    def test_known(self):
        """CRC-16/MODBUS of 123456789 is 4B37; a frame ends with it, big endian outward and little inward."""
        self.assertEqual(sems.crc16(b"123456789"), 0x4B37)
        self.assertEqual(sems.crc16(b""), 0xFFFF)
        data = frame()
        self.assertEqual(sems.crc16(data[:-2]), int.from_bytes(data[-2:], "big"))
        data = portal_frame("0304", bytes(16))
        self.assertEqual(sems.crc16(data[:-2]), int.from_bytes(data[-2:], "little"))

    def test_lanes(self):
        """Lanes carry the same CRCs as frames one by one."""
        rng = random.Random(1)
        for size in (3, 4, 13, 58, 166, 700):
            for count in (1, 2, 7, 24, 100):
                with self.subTest(size=size, count=count):
                    data = rng.getrandbits(8 * size * count).to_bytes(size * count, "big")
                    low, high = sems.crc16_lanes(data, size)
                    one_by_one = [sems.crc16(data[at : at + size - 2]) for at in range(0, len(data), size)]
                    self.assertEqual([h << 8 | l for l, h in zip(low, high)], one_by_one)

    def test_first_bad(self):
        """The first bad frame of a run is found, in either byte order, in short runs and in long ones."""
        for order, good in (("big", frame()), ("little", portal_frame("0304", bytes(16)))):
            for count in (1, sems.LANES_FROM - 1, sems.LANES_FROM, 60):
                for bad in {-1, 0, count // 2, count - 1}:
                    with self.subTest(order=order, count=count, bad=bad):
                        run = [good] * count
                        if bad >= 0:
                            run[bad:] = [broken(good)] * (count - bad)
                        self.assertEqual(sems.first_bad(b"".join(run), len(good), order), bad)


class Cipher(unittest.TestCase):
    NIST_KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    NIST_CLEAR = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    NIST_CIPHER = bytes.fromhex(
        "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b273bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7"
    )

    def test_nist(self):
        """NIST SP 800-38A F.2.1 and F.2.2, CBC-AES128, one to four blocks."""
        iv = bytes(range(16))
        for size in (16, 32, 48, 64):
            self.assertEqual(sems.encrypt(self.NIST_CLEAR[:size], iv, self.NIST_KEY), self.NIST_CIPHER[:size])
            self.assertEqual(sems.decrypt(self.NIST_CIPHER[:size], iv, self.NIST_KEY), self.NIST_CLEAR[:size])

    def test_fips(self):
        """FIPS 197 appendices B and C.1: single blocks."""
        for key, clear, cipher in (
            ("2b7e151628aed2a6abf7158809cf4f3c", "3243f6a8885a308d313198a2e0370734", "3925841d02dc09fbdc118597196a0b32"),
            ("000102030405060708090a0b0c0d0e0f", "00112233445566778899aabbccddeeff", "69c4e0d86a7b0430d8cdb78070b4c55a"),
        ):
            key, clear, cipher = map(bytes.fromhex, (key, clear, cipher))
            self.assertEqual(sems.encrypt(clear, bytes(16), key), cipher)
            self.assertEqual(sems.decrypt(cipher, bytes(16), key), clear)

    def test_round_trip(self):
        """decrypt is the inverse of encrypt for any number of blocks, more than a chunk too."""
        rng, iv = random.Random(2), bytes(range(16, 32))
        for size in (16, 112, sems.CHUNK - 16, sems.CHUNK, sems.CHUNK + 16, 3 * sems.CHUNK + 160):
            clear = rng.getrandbits(8 * size).to_bytes(size, "big")
            self.assertEqual(sems.decrypt(sems.encrypt(clear, iv), iv), clear, size)


class Registers(unittest.TestCase):
    def test_mistakes(self):
        """A table that contradicts itself fails at import."""
        row = (1, "u16", 1, "meter_new_volts", "", "New.", sems.MAP)
        for name, tables in {
            "a series twice": {"HK1000": (row, row)},
            "two helps": {"HK1000": (row,), "GRID": (row[:5] + ("Other.",) + row[6:],)},
            "another help than an internal": {"HK1000": (row[:3] + ("meter_unknown_register",) + row[4:],)},
        }.items():
            with self.subTest(name), mock.patch.dict(sems.FAMILIES, tables), self.assertRaises(ValueError):
                sems._families()
        with mock.patch.dict(sems.FAMILIES, HK1000=(row,)):
            self.assertEqual(sems._families()["meter_new_volts"], ("gauge", "New."))

    def test_rows(self):
        """Every row can be read: all its registers set to 1 give its scale or its float, a counter ends with _total."""
        for family, rows in sems.FAMILIES.items():
            for row in rows:
                register, kind, scale, metric, labels = row[:5]
                with self.subTest(family, register=register, metric=metric):
                    words = {register + i: 0 for i in range(sems.KINDS[kind].words)}
                    words[max(words)] = 1
                    if kind == "f32":
                        words = {register: 0x3F80, register + 1: 0}
                    words.update([row[7]] if len(row) > 7 else [])
                    value = sems.reading(family, words).values[metric, labels]
                    self.assertAlmostEqual(value, scale, 9)
                    self.assertEqual(sems.METRICS[metric][0], "counter" if metric.endswith("_total") else "gauge")
                    self.assertLessEqual(set(words) - {row[7][0] if len(row) > 7 else 0}, sems.KNOWN[family])


FRAME, SHORT, EMPTY = frame(), frame(sems.CONFIRMATION), frame(clear=b"\0" + b"\xff" * 15)
ACK, CLOCK = sems.ack("0304", METER, sems.time_stamp(NOON)), sems.clock_write(3, METER, sems.time_stamp(NOON))
TINY = with_crc(claim(b"\x03\x04\0"))  # 13 bytes: the length field is 0
LARGEST = with_crc(claim(b"\x09\x09" + bytes((64 << 10) + 1)))  # the length field is 64 KiB
BEAT = b"\x01\x02"

# name, direction, the pieces that come, those that the end of the stream gives; together they are the stream
STREAMS = (
    ("a frame", OUT, [("frame", FRAME, 1)], []),
    ("three frames", OUT, [("frame", FRAME, 1)] * 3, []),
    ("frames of several sizes", OUT, [("frame", data, 1) for data in (FRAME, SHORT, EMPTY, SHORT)], []),
    ("13 bytes", OUT, [("frame", TINY, 1)], []),
    ("a length of 64 KiB", OUT, [("frame", LARGEST, 1)], []),
    ("a length of one more", OUT, [("junk", claim(b"x" * 40, (64 << 10) + 14), 1), ("frame", FRAME, 1)], []),
    ("a bad CRC", OUT, [("malformed", broken(FRAME), 1)], []),
    ("two bad CRCs", OUT, [("malformed", broken(FRAME) * 2, 2)], []),
    ("bad between good", OUT, [("frame", FRAME, 1), ("malformed", broken(FRAME), 1), ("frame", FRAME, 1)], []),
    ("bad between good of other sizes", OUT, [("frame", EMPTY, 1), ("malformed", broken(SHORT), 1), ("frame", FRAME, 1)], []),
    ("junk before", OUT, [("junk", b"\0GET / HTTP/1.1\r\n", 1), ("frame", FRAME, 1)], []),
    ("junk between", OUT, [("frame", FRAME, 1), ("junk", b"zz", 1), ("frame", FRAME, 1)], []),
    ("junk alone", OUT, [("junk", b"hello", 1)], []),
    ("junk behind a bad one", OUT, [("malformed", broken(SHORT), 1), ("junk", b"hello", 1), ("frame", SHORT, 1)], []),
    ("a prefix within a prefix", OUT, [("junk", b"POSTPOST", 1), ("frame", FRAME, 1)], []),
    ("a good one in a bad one", OUT, [("malformed", claim(b"x" * 9, 300), 1), ("frame", FRAME, 1), ("junk", b"y" * (300 - 19 - len(FRAME)), 1)], []),
    ("a good one in two bad ones", OUT, [("malformed", claim(claim(b"x", 200), 300), 2), ("frame", SHORT, 1), ("junk", b"y" * (300 - 21 - len(SHORT)), 1)], []),
    ("a bad one in a bad one", OUT, [("malformed", claim(claim(b"x" * 50)), 2), ("frame", SHORT, 1)], []),
    ("a good one across the end of a bad one", OUT, [("malformed", claim(b"x" * 9, 100), 1), ("frame", FRAME, 1)], []),
    ("a cut prefix", OUT, [("frame", SHORT, 1)], [("junk", b"POSTG", 1)]),
    ("a cut header", OUT, [("frame", SHORT, 1)], [("junk", b"POSTGW\0\0", 1)]),
    ("a cut frame", OUT, [("frame", SHORT, 1)], [("malformed", FRAME[:-1], 1)]),
    ("a good one in a cut one", OUT, [], [("malformed", claim(b"x" * 9, 5000), 1), ("frame", FRAME, 1), ("junk", b"end", 1)]),
    ("an inward frame", OUT, [("junk", ACK, 1)], []),
    ("answers", IN, [("frame", ACK, 1), ("frame", CLOCK, 1), ("frame", ACK, 1)], []),
    ("keep-alives", IN, [("keepalive", BEAT * 3, 3)], []),
    ("keep-alives between", IN, [("keepalive", BEAT, 1), ("frame", ACK, 1), ("keepalive", BEAT * 2, 2), ("frame", CLOCK, 1)], []),
    ("a keep-alive behind junk", IN, [("junk", b"\0" + BEAT, 1), ("frame", ACK, 1), ("keepalive", BEAT, 1)], []),
    ("a keep-alive behind a bad one", IN, [("malformed", broken(ACK), 1), ("junk", BEAT, 1), ("frame", ACK, 1)], []),
    ("half a keep-alive", IN, [("frame", ACK, 1)], [("junk", b"\x01", 1)]),
    ("half a keep-alive before a frame", IN, [("junk", b"\x01", 1), ("frame", ACK, 1)], []),
    ("an inward length of 4 KiB", IN, [("frame", with_crc(b"GW....\x03\x04" + bytes((4 << 10) + 1), IN), 1)], []),
    ("an inward length of one more", IN, [("junk", b"GW" + (4097).to_bytes(4, "big") + b"z" * 9, 1), ("frame", ACK, 1)], []),
    ("a good answer in a bad one", IN, [("malformed", b"GW\0\0\0\x50" + b"z" * 9, 1), ("frame", ACK, 1), ("junk", b"z" * (0x50 + 9 - 15 - len(ACK)), 1)], []),
    ("no keep-alive outward", OUT, [("junk", BEAT, 1), ("frame", SHORT, 1)], []),
)  # fmt: skip


class Framing(unittest.TestCase):
    def check(self, wire, reads, came, closed):
        """Feed the reads; what comes and what the end gives, and that nothing is lost."""
        framer = sems.Framer(wire)
        pieces = [piece for data in reads for piece in framer.feed(data, 0.0)]
        rest = bytes(framer.rest)
        ends = framer.close(1.0)
        self.assertEqual(b"".join(piece.data for piece in pieces + ends), b"".join(reads))
        self.assertEqual((rest, bytes(framer.rest)), (b"".join(data for _, data, _ in closed), b""))
        self.assertEqual(plain_pieces(pieces), plain_pieces(came))
        self.assertEqual(plain_pieces(ends), plain_pieces(closed))

    def test_streams(self):
        """Each stream whole, byte by byte, doubled, and behind junk."""
        for name, wire, came, closed in STREAMS:
            data = b"".join(part for _, part, _ in came + closed)
            begins_with_beat = bool(came) and came[0][0] == "keepalive"
            with self.subTest(name, cut="whole"):
                self.check(wire, [data], came, closed)
            with self.subTest(name, cut="byte by byte"):
                step = 1 if len(data) < 9000 else 997
                self.check(wire, [data[i : i + step] for i in range(0, len(data), step)], came, closed)
            with self.subTest(name, cut="in two"):
                for at in range(1, min(len(data), 400), 3):
                    self.check(wire, [data[:at], data[at:]], came, closed)
            if not closed and (not begins_with_beat or came[-1][0] in ("frame", "keepalive")):
                twice = came + (
                    [
                        ("junk", part, 0) if kind == "junk" and i == 0 and came[-1][0] == "junk" else (kind, part, n)
                        for i, (kind, part, n) in enumerate(came)
                    ]
                )
                with self.subTest(name, cut="doubled"):
                    self.check(wire, [data, data], twice, [])
                    self.check(wire, [data + data], twice, [])
            if not begins_with_beat and came:
                first = [("junk", b"\0\0", 1)] + [
                    (kind, part, 0 if kind == "junk" and i == 0 else n) for i, (kind, part, n) in enumerate(came)
                ]
                with self.subTest(name, cut="behind junk"):
                    self.check(wire, [b"\0\0" + data], first, closed)

    def test_since(self):
        """since is when the unfinished frame began; behind a whole one it is the read that brought its first byte."""
        framer = sems.Framer(OUT)
        for now, data, since in (
            (1.0, FRAME[:9], 1.0),
            (2.0, FRAME[9:20], 1.0),
            (3.0, FRAME[20:] + SHORT[:5], 3.0),
            (4.0, SHORT[5:], None),
            (5.0, b"POS", 5.0),
        ):
            framer.feed(data, now)
            self.assertEqual(framer.since if framer.rest else None, since, now)

    def test_expire_nested(self):
        """A frame unfinished for its patience after its first byte is given up, also one nested in another that was."""
        framer = sems.Framer(OUT)
        data = claim(b"", 60000) * 3 + b"x" * 20
        framer.feed(data, 0.0)
        pieces, now = [], 30.0
        while framer.rest and now >= framer.since + OUT.patience:
            pieces += framer.expire(now)
        self.assertEqual(plain_pieces(pieces), [["malformed", data, 3]])

    def test_malice(self):
        """A megabyte of prefixes or nested claims costs little time, CRC work of 8 bytes a byte, and little memory."""
        size, worked = 1 << 20, [0]
        crc16, lanes = sems.crc16, sems.crc16_lanes

        def counted(function):
            def call(data, *rest):
                worked[0] += len(data)
                return function(data, *rest)

            return call

        streams = {"P": b"P" * size, "POSTGW": (OUT.prefix * size)[:size], "bad frames": (broken(FRAME) * size)[:size]}
        streams.update({f"claims of {n}": (claim(b"", n) * (size // 10)) for n in (100, 1000, 65000)})
        streams["good, then bad"] = ((FRAME * 200 + broken(FRAME) * 200) * 20)[:size]
        for name, data in streams.items():
            good = data.count(FRAME) * len(FRAME)
            for step in (size, 1460)[: 1 + (name == "claims of 1000")]:
                with self.subTest(name, step=step), mock.patch.multiple(sems, crc16=counted(crc16), crc16_lanes=counted(lanes)):
                    framer, worked[0], count, began = sems.Framer(OUT), 0, 0, time.process_time()
                    for at in range(0, len(data), step):
                        count += sum(len(piece.data) for piece in framer.feed(data[at : at + step], 0.0))
                    self.assertLess(time.process_time() - began, 5)
                    self.assertEqual(count + len(framer.rest), len(data))
                    self.assertLessEqual(len(framer.rest), (64 << 10) + 13)
                    self.assertLessEqual(worked[0] - 2 * good, 8 * len(data))
            left = framer.close(0.0)
            self.assertEqual(count + sum(len(piece.data) for piece in left), len(data), name)


class Packets(unittest.TestCase):
    def test_vectors(self):
        """Each vector decodes to exactly its metrics, encodes back to its bytes, and passes to a device or not, as its name says."""
        meanings = {"ACK": "ack", "NACK": "nack", "clock": "clock", "dropped": ""}
        for vector in VECTORS:
            data, wire = bytes.fromhex(vector["hex"]), IN if vector["direction"] == "inbound" else OUT
            with self.subTest(vector["name"]):
                self.assertEqual([(found, piece.kind) for found, piece in sems.pieces_of("", data)], [(wire, "frame")])
                where, packet = address_of(data, wire), sems.decode(data, wire)
                self.assertEqual(sems.encode(packet), data)
                if wire is IN:
                    meaning = next(meanings[word] for word in reversed(re.findall(r"\w+", vector["name"])) if word in meanings)
                    self.assertEqual(sems.allowed(where, packet.clear, {1, 2, 3}), meaning)
                    continue
                session = new_session()
                session.from_device(data, 0.0, 0.0)
                session.digest(0.0, 0.0)
                device = next(iter(session.store.devices.values()))
                wanted = {(m["metric"], m["labels"]): m["value"] for m in vector["metrics"] or ()}
                self.assertEqual({**device.gauges, **device.counters}, wanted)

    def test_portal_answers(self):
        """From type, serial and time the real portal's frames follow byte for byte; these are the digests of four of them."""
        for serial, kind, stamp, digest in (
            ("53000DSC01234567", "0103", (23, 12, 22, 12, 7, 56), "de8128292722cdcfdaf92441dfb6c454d18e30cbc92bcc5ff92473fd8128f4bf"),
            ("91000HKU01234567", "0304", (23, 11, 3, 13, 52, 8), "d57430cf261763e7571e63aefd4f3c4aedea37aad37955680d9feb9e756f1794"),
            ("91000HKU01234567", "0303", (23, 10, 30, 14, 20, 28), "8740ce7e8ae5c2d48b96bebabc94de3c40646ec81e709106fe77f69c7f028782"),
            ("91000HKU01234567", "0116", (23, 10, 30, 14, 20, 28), "bdec5d6a2a2a732b3f73686759651b8bb1bb277d39b607c7ac56f1cddc111a77"),
        ):
            with self.subTest(kind, serial=serial):
                made = sems.clock_write(sems.METER, serial, bytes(stamp)) if kind == "0116" else sems.ack(kind, serial, bytes(stamp))
                self.assertEqual(hashlib.sha256(made).hexdigest(), digest)
        for vector in VECTORS:
            data = bytes.fromhex(vector["hex"])
            packet = sems.decode(data, IN) if vector["direction"] == "inbound" else None
            stamp = packet and packet.iv[5::-1]
            if packet and "ACK" in vector["name"].split():
                self.assertEqual(sems.ack(packet.type, packet.serial, stamp), data)
            elif packet and "clock" in vector["name"] and "not" not in vector["name"]:
                self.assertEqual(sems.clock_write(3 if "HomeKit" in vector["name"] else 1, packet.serial, stamp), data)

    def test_answer(self):
        """Answers by class and function: ACK to 03, 04 and 45 of any class, the clock behind 03 of a meter or a grid-tied inverter."""
        clocks = {3: 0x1216, 1: 0x9D79}
        for cls in (0, 1, 2, 3, 9):
            for function in (0x03, 0x04, 0x45, 0x10, 0x16, 0x99):
                for clock in (True, False):
                    with self.subTest(cls=cls, function=function, clock=clock):
                        where = address_of(frame(function, cls))
                        pieces = sems.pieces_of("inbound", sems.answer(where, minute(5), clock))
                        packets = [sems.decode(piece.data, IN) for _, piece in pieces]
                        wanted = [(f"{cls:02x}{function:02x}", bytes(16))] if function in (0x03, 0x04, 0x45) else []
                        if clock and function == 0x03 and cls in clocks:
                            wanted.append(("0116", struct.pack(">HH6B6x", clocks[cls], clocks[cls] + 2, 26, 3, 21, 12, 5, 0)))
                        self.assertEqual([(packet.type, packet.clear) for packet in packets], wanted)
                        self.assertLessEqual({packet.iv for packet in packets}, {bytes([0, 5, 12, 21, 3, 26]) + bytes(10)})
                        self.assertLessEqual({packet.serial for packet in packets}, {METER})

    def test_envelopes(self):
        """The function tells the envelope, for an unknown one the length; whatever does not fit is malformed."""
        body = METER.encode() + bytes(16)
        for name, data, form in (
            ("long", b"\3\4\0\0" + body + bytes(6 + 32), "long"),
            ("short", b"\3\x10" + body + bytes(16), "short"),
            ("unknown, long", b"\3\x77\0\0" + body + bytes(6 + 16), "long"),
            ("unknown, short", b"\3\x77" + body + bytes(48), "short"),
            ("unknown, neither", b"\3\x77" + body + bytes(50), None),
            ("no cipher text", b"\3\4\0\0" + body + bytes(6), None),
            ("cipher text cut", b"\3\4\0\0" + body + bytes(6 + 17), None),
            ("a short one for data", b"\3\4" + body + bytes(16), None),
            ("a long one for a confirmation", b"\3\x10\0\0" + body + bytes(6 + 16), None),
            ("too short for a serial", b"\3\x10" + body[:10], None),
            ("no type", b"\3", None),
            ("a NUL in the serial", b"\3\x10" + b"\0" + body[1:] + bytes(16), None),
            ("a byte above 7E", b"\3\x10" + b"\x7f" + body[1:] + bytes(16), None),
        ):
            with self.subTest(name):
                data = with_crc(claim(data + b"\0\0"))
                if form:
                    where = address_of(data)
                    self.assertEqual((where.serial, where.form is sems.LONG), (METER, form == "long"))
                else:
                    with self.assertRaises(sems.ProtocolError):
                        sems.decode(data, OUT)
        with self.assertRaises(sems.ProtocolError) as caught:
            sems.decode(with_crc(claim(b"\3\4" + bytes(20))), OUT)
        self.assertTrue(caught.exception.data)

    def test_payload_grammar(self):
        """What a payload is: a list of ranges that parses to its end, with 0 to 15 bytes FF behind it."""
        for name, clear, wanted in (
            ("empty", b"\0" + b"\xff" * 15, {}),
            ("one block", bytes.fromhex("01 0800 0801 0001 0002") + b"\xff" * 7, {2048: 1, 2049: 2}),
            ("a range cut", bytes.fromhex("01 0800 0806 0000 0001 0002 0003 0004 00"), None),
            (
                "not a byte of padding",
                bytes.fromhex("03 0001 0001 0007 0003 0004 0008 0009 0005 000a") + bytes(11) + b"\7",
                {1: 7, 3: 8, 4: 9, **dict.fromkeys(range(5, 10), 0), 10: 7},
            ),
            ("16 bytes of padding", bytes.fromhex("01 0800 0800 0001") + b"\xff" * 25, None),
            ("padding of zeros", bytes.fromhex("01 0800 0800 0001") + bytes(9), None),
            ("padding with another byte", bytes.fromhex("01 0800 0800 0001") + b"\xff" * 8 + b"\0", None),
            ("last before first", bytes.fromhex("01 0801 0800 0001") + b"\xff" * 9, None),
            ("last right before first", bytes.fromhex("01 0801 0800") + b"\xff" * 11, None),
            ("a range past the end", bytes.fromhex("01 0800 0810 0001") + b"\xff" * 9, None),
            ("a header past the end", b"\x03" + bytes.fromhex("0800 0800 0001") * 2 + b"\xff" * 3, None),
            ("more blocks than there are", b"\xff" * 16, None),
            ("in any order", bytes.fromhex("02 0900 0900 0001 0800 0800 0002") + b"\xff" * 3, {2304: 1, 2048: 2}),
            ("a register twice: the later", bytes.fromhex("02 0800 0800 0001 0800 0800 0002") + b"\xff" * 3, {2048: 2}),
            ("the last register of all", bytes.fromhex("01 ffff ffff 0001") + b"\xff" * 9, {65535: 1}),
            ("nothing at all", b"", None),
        ):
            with self.subTest(name):
                if wanted is None:
                    with self.assertRaises(sems.ProtocolError):
                        sems.registers(clear)
                else:
                    self.assertEqual(sems.registers(clear), wanted)
        ranges = [(30103, (1, 2, 3)), (2048, (65535,))]
        self.assertEqual(sems.blocks(sems.payload(ranges)), ranges)

    def test_fuzz(self):
        """Any bytes give pieces or a ProtocolError, never another exception, and nothing is lost."""
        rng, done, began = random.Random(20260321), 0, time.process_time()
        small = [(2048, (0, 1, 2)), (2105, (0xFFFF, 0xFFF0, 0, 5)), (36004, (1,))]
        seeds = [
            (OUT, data) for data in (FRAME, SHORT, EMPTY, TINY, frame(sems.BUFFERED, 2, HYBRID, ranges=small), frame(0x77, 9, ranges=small))
        ]
        seeds += [(IN, data) for data in (ACK, CLOCK, BEAT + ACK + BEAT, portal_frame("0304", b"\2" + bytes(31)))]
        clears = [sems.payload(small), sems.payload(INVERTER_RANGES), sems.payload([(35011, (0x4757,) * 5), (40173, (0x2041,) * 16)])]

        def mutated(data: bytearray) -> bytes:
            for _ in range(rng.randrange(4)):
                at, kind = rng.randrange(len(data)), rng.randrange(5)
                if kind == 0:
                    data[at] ^= 1 << rng.randrange(8)
                elif kind == 1:
                    del data[at : at + rng.randrange(1, 20)]
                elif kind == 2:
                    data[at:at] = rng.choice((b"POSTGW", b"GW", BEAT, b"\xff\xff", bytes(16), bytes([rng.randrange(256)])))
                elif kind == 3:
                    data[at:at] = data[max(at - 20, 0) : at]
                else:
                    data[at : at + 2] = rng.choice((b"\0\0", b"\xff\xff", b"\0\x10"))
                data = data or bytearray(b"\0")
            return bytes(data)

        for case in range(20_000):
            wire, data = seeds[case % len(seeds)]
            data = mutated(bytearray(data))
            if case % 3 == 0 and len(data) > 12:
                data = with_crc(data, wire)
            if case % 5 == 0:
                data += rng.choice(seeds)[1]
            framer, pieces = sems.Framer(wire), []
            for part in cuts(data, rng):
                pieces += framer.feed(part, 0.0)
            pieces += framer.close(0.0)
            self.assertEqual(b"".join(piece.data for piece in pieces), data, data.hex())
            for kind, part, _ in plain_pieces(pieces):
                done += kind == "frame"
                with contextlib.suppress(sems.ProtocolError):
                    self.contents(wire, part, kind == "frame")
            if case % 2:
                with contextlib.suppress(sems.ProtocolError):
                    words = sems.registers(mutated(bytearray(rng.choice(clears))))
                    sems.reading(rng.choice(list(sems.FAMILIES)), words)
        self.assertGreater(done, 8000)
        self.assertLess(time.process_time() - began, 30)

    def contents(self, wire, data, good):
        where, packet = address_of(data, wire), sems.decode(data, wire)
        if good:
            self.assertEqual(sems.encode(packet).hex(), data.hex())
        if wire is IN:
            self.assertIn(sems.allowed(where, packet.clear, {where.cls}), ("ack", "nack", "clock", ""))
        else:
            sems.with_bat(data)
            found = sems.reading(sems.family(where.cls, where.serial), sems.registers(packet.clear))
            sems.Device("meter", where.serial, 0.0).take(found, sems.device_time(packet.time), 0.0, NOON)


class Readings(unittest.TestCase):
    def test_kinds(self):
        """How words become a number, in each family; None is no sample, "bad" is one that is counted as not finite."""
        grid, hybrid, meter = "GRID", "HYBRID", "HK1000"
        for name, family, words, metric, labels, wanted in (
            ("u16", grid, {30163: 3801}, "inverter_bus_voltage_volts", "", 380.1),
            ("an exact decimal", grid, {30105: 66}, "inverter_string_voltage_volts", 'string="2"', 6.6),
            ("u16 none", grid, {30163: 0xFFFF}, "inverter_bus_voltage_volts", "", None),
            ("s16", grid, {30139: 0xFC18}, "inverter_power_factor_ratio", "", -1.0),
            ("s16 none in a grid-tied one", grid, {30141: 0xFFFF}, "inverter_internal_temperature_decidegrees_celsius", "", None),
            ("s16 -1 in a hybrid", hybrid, {35181: 0xFFFF}, "battery_current_amperes", 'battery="1"', -0.1),
            ("u16 none in a hybrid", hybrid, {35180: 0xFFFF}, "battery_voltage_volts", 'battery="1"', None),
            ("u32", grid, {30145: 1, 30146: 2}, "inverter_energy_output_hectowatt_hours_total", "", 65538),
            ("u32 none", grid, {30145: 0xFFFF, 30146: 0xFFFF}, "inverter_energy_output_hectowatt_hours_total", "", None),
            ("u32 half none is a number", grid, {30145: 0, 30146: 0xFFFF}, "inverter_energy_output_hectowatt_hours_total", "", 65535),
            ("s32 none in a grid-tied one", grid, {30135: 0xFFFF, 30136: 0xFFFF}, "inverter_reactive_power_vars", "", None),
            ("s32", grid, {30135: 0xFFFF, 30136: 0xFFFE}, "inverter_reactive_power_vars", "", -2),
            ("s32 -1 of a meter", meter, {2107: 0xFFFF, 2108: 0xFFFF}, "meter_power_generation_watts", "", -1),
            ("u32 none of a meter", meter, {2099: 0xFFFF, 2100: 0xFFFF}, "meter_current_amperes", 'channel="1"', None),
            ("u48", meter, {2048: 1, 2049: 2, 2050: 3}, "meter_energy_export_decawatt_hours_total", "", 2**32 + 2 * 65536 + 3),
            ("u48 none", meter, {2048: 0xFFFF, 2049: 0xFFFF, 2050: 0xFFFF}, "meter_energy_export_decawatt_hours_total", "", None),
            ("a missing word", meter, {2048: 0, 2050: 3}, "meter_energy_export_decawatt_hours_total", "", None),
            ("a missing first word", meter, {2049: 0, 2050: 3}, "meter_energy_export_decawatt_hours_total", "", None),
            ("D-NS: the low word", grid, {30127: 0xFFFF, 30128: 1500}, "inverter_power_output_watts", "", 1500),
            ("D-NS: a whole number", grid, {30127: 1, 30128: 0}, "inverter_power_output_watts", "", 65536),
            ("D-NS: none", grid, {30127: 0xFFFF, 30128: 0xFFFF}, "inverter_power_output_watts", "", None),
            ("30137: 0000 FFFF", grid, {30137: 0, 30138: 0xFFFF}, "inverter_input_power_watts", "", None),
            ("30137: none", grid, {30137: 0xFFFF, 30138: 0xFFFF}, "inverter_input_power_watts", "", None),
            ("30137: a number", grid, {30137: 0, 30138: 0xFFFE}, "inverter_input_power_watts", "", 65534),
            ("f32", hybrid, {36004: 1, 36015: 0x447A, 36016: 0}, "meter_energy_export_decawatt_hours_total", "", 100.0),
            ("f32 NaN", hybrid, {36004: 1, 36015: 0x7FC0, 36016: 0}, "meter_energy_export_decawatt_hours_total", "", "bad"),
            ("f32 infinite", hybrid, {36004: 1, 36015: 0x7F80, 36016: 0}, "meter_energy_export_decawatt_hours_total", "", "bad"),
            (
                "f32 below 0 in a counter",
                hybrid,
                {36004: 1, 36015: 0xC47A, 36016: 0},
                "meter_energy_export_decawatt_hours_total",
                "",
                "bad",
            ),
            ("when: another word", hybrid, {36004: 0, 36025: 0, 36026: 5}, "meter_power_export_watts", "", None),
            ("when: no word", hybrid, {36025: 0, 36026: 5}, "meter_power_export_watts", "", None),
            ("when", hybrid, {36004: 1, 36025: 0, 36026: 5}, "meter_power_export_watts", "", 5),
            ("when, grid-tied", grid, {30209: 1, 30195: 0, 30196: 9}, "inverter_meter_power_watts", "", 9),
            ("not when, grid-tied", grid, {30209: 2, 30195: 0, 30196: 9}, "inverter_meter_power_watts", "", None),
        ):
            with self.subTest(name):
                found = sems.reading(family, words)
                self.assertEqual(found.values.get((metric, labels)), None if wanted == "bad" else wanted)
                self.assertEqual(found.not_finite, int(wanted == "bad"))
        across = sems.registers(sems.payload([(2049, (2, 3)), (2048, (1,))]))
        self.assertEqual(sems.reading("HK1000", across).values["meter_energy_export_decawatt_hours_total", ""], 2**32 + 2 * 65536 + 3)

    def test_text(self):
        """Values are written as exact decimals."""
        page = sems.page(
            "", [(str(i), "", sems.reading("GRID", {30105: i}).values["inverter_string_voltage_volts", 'string="2"']) for i in range(5000)]
        )
        for i in range(5000):
            self.assertEqual(page[str(i)], f"{i} {i // 10}.{i % 10}\n")

    def test_unknown(self):
        """Registers in no table are unknown, but for 0 and FFFF; at most 128 are shown, the lowest first."""
        for family, words, wanted in (
            ("GRID", {30175: 7, 30176: 0, 30177: 0xFFFF, 30103: 1, 30100: 1, 30101: 1, 30034: 1, 30221: 1, 40075: 1, 40173: 1}, {30175: 7}),
            ("HYBRID", {35000: 1, 35032: 1, 35100: 1, 35102: 1, 35119: 3}, {35119: 3}),
            ("HK1000", {4891: 1, 4871: 1, 4622: 1, 2072: 5, 5000: 4}, {2072: 5, 5000: 4}),
        ):
            self.assertEqual(sems.reading(family, words).unknown, wanted, family)
        session = new_session()
        session.from_device(frame(ranges=[(10000, tuple(range(200, 400))), (9000, (5,))]), 0.0, 0.0)
        session.digest(0.0, 0.0)
        numbers = [
            re.search(r'register="(\d+)"', series)[1] for series in shown(session.store) if series.startswith("meter_unknown_register")
        ]
        self.assertEqual(sorted(numbers, key=int), ["9000", *map(str, range(10000, 10127))])

    def test_info(self):
        """Texts of a device: ASCII in registers, NUL, blank and FF trimmed; whole or not at all."""
        text = lambda s, n: sems.text_words(s, n)
        for name, first, words, wanted in (
            ("a model", 40173, text("GW3000-XS", 16), {"model": "GW3000-XS"}),
            ("a hybrid's model", 35011, text("GW10K-ET", 5), {"model": "GW10K-ET"}),
            ("trimmed", 35011, (0x2047, 0x5720, 0xFFFF, 0xFFFF, 0), {"model": "GW"}),
            ("all FF", 35011, (0xFFFF,) * 5, {}),
            ("a word short", 35011, text("GW10K-ET", 4), {}),
            ("firmware of a grid-tied one", 30221, text("410-02065-04", 6), {"firmware": "410-02065-04"}),
            ("firmware of a hybrid", 35021, text("04029-02-S1104029-02-S00", 12), {"firmware": "04029-02-S11 04029-02-S00"}),
            ("of a HomeKit", 4864, text("02053-05-000Me05", 8), {"firmware": "02053-05-000Me05"}),
            ("of a module", 4891, (0x5631, 0x380D, 0x0A56, 0x340D, 0x0A00), {"module_firmware": "V18 V4"}),
            ("a module of an inverter", 30054, text("V1.2", 8), {"module_firmware": "V1.2"}),
            ("the portal of a HomeKit", 4609, text("20001,tcp.goodwe-power.com", 14), {"portal": "tcp.goodwe-power.com:20001"}),
            ("the portal of an inverter", 40075, text("tcp.goodwe-power.com", 26), {"portal": "tcp.goodwe-power.com"}),
        ):
            with self.subTest(name):
                self.assertEqual(sems.info({first + i: word for i, word in enumerate(words)}), wanted)


class Identity(unittest.TestCase):
    def test_models(self):
        """The model from what the device tells, or from its serial; the original's two names are fixed."""
        for serial, told, wanted in (
            ("91000HKU00000042", "", "HomeKit 1000 Smart Meter"),
            ("91000HKU00000042", "SDM", "HomeKit 1000 Smart Meter"),
            ("53000DSC00000042", "GW3000D", "GW3000-DNS-30"),
            ("93000HKU00000042", "", "HomeKit 3000 Smart Meter"),
            ("81000HKU00000042", "", "HomeKit 1000 Smart Meter"),
            ("92000HKU00000042", "", "GoodWe HKU 2000 W"),
            ("93000DSN00000042", "", "GoodWe DSN 3000 W"),
            ("93000DSN00000042", "GW3000D-NS", "GW3000D-NS"),
            ("9010KETU00000042", "", "GoodWe ETU 10 kW"),
            ("9025KMTU00000042", "", "GoodWe MTU 25 kW"),
            ("9100KMTU00000042", "", "GoodWe MTU 100 kW"),
            ("9X00KDSN00000042", "", "GoodWe DSN"),
            ("9ABCDDSN00000042", "", "GoodWe DSN"),
            ("912.5DSN00000042", "", "GoodWe DSN"),
            ("912 5DSN00000042", "", "GoodWe DSN"),
        ):
            self.assertEqual(sems.model(serial, told), wanted, (serial, told))

    def test_families(self):
        """The register family from class and rating; an unknown class is read as grid-tied."""
        for cls, serial, wanted in (
            (3, METER, "HK1000"), (3, "93000HKU00000042", "HK3000"), (3, "92000XXX00000042", "HK1000"), (1, INVERTER, "GRID"),
            (2, HYBRID, "HYBRID"), (2, "93000HKU00000042", "HYBRID"), (9, METER, "GRID"), (0, INVERTER, "GRID"),
        ):  # fmt: skip
            self.assertEqual(sems.family(cls, serial), wanted, (cls, serial))

    def test_labels(self):
        """Device texts in labels: printable ASCII, anything else a blank, blanks collapsed, ends trimmed, 64 characters."""
        for text, wanted in (
            (b"GW3000", "GW3000"), (b"  a\0\0b \xff c\x7f", "a b c"), ("\u00e9t\u00e9", "t"), (b"\r\n", ""), (b"~ !", "~ !"),
            ("x" * 70, "x" * 64), ("x" * 63 + " y", "x" * 63), (b'a"\\', 'a"\\'),
        ):  # fmt: skip
            self.assertEqual(sems.label_text(text), wanted, text)
        self.assertEqual(sems.label("a", 'b"c\\d\ne'), 'a="b\\"c\\\\d\\ne"')

    def test_time(self):
        """Six bytes are a calendar date or none."""
        for stamp, wanted in (
            ((26, 3, 21, 12, 0, 0), NOON), ((24, 2, 29, 23, 59, 59), datetime(2024, 2, 29, 23, 59, 59)), ((23, 2, 29, 0, 0, 0), None), ((26, 13, 1, 0, 0, 0), None),
            ((26, 0, 1, 0, 0, 0), None), ((26, 1, 1, 24, 0, 0), None), ((26, 1, 1, 0, 60, 0), None), ((26, 1, 1, 0, 0, 60), None), ((0,) * 6, None), ((26, 1), None), ((), None),
        ):  # fmt: skip
            self.assertEqual(sems.device_time(bytes(stamp)), wanted, stamp)
        self.assertEqual(sems.time_stamp(NOON), bytes((26, 3, 21, 12, 0, 0)))


class Bat(unittest.TestCase):
    @staticmethod
    def curve(minutes: int) -> tuple:
        """The formulas of the bat, written down a second time: (top, bottom) at a minute of the day."""
        x = minutes / 60 - 12
        a, r10, r33 = abs(x), 10**0.5, 33**0.5
        tops = (
            (a <= 0.5, lambda: 2.25),
            (a <= 0.75, lambda: 3 * a + 0.75),
            (a <= 1, lambda: 9 - 8 * a),
            (a <= 3, lambda: 6 * r10 / 7 + 1.5 - 0.5 * a - 3 * r10 / 7 * (4 - (a - 1) ** 2) ** 0.5),
            (a < 7, lambda: 3 * (1 - (x / 7) ** 2) ** 0.5),
            (True, lambda: 0.0),
        )
        bottoms = (
            (a <= 4, lambda: a / 2 - (3 * r33 - 7) / 112 * x * x - 3 + (1 - (abs(a - 2) - 1) ** 2) ** 0.5),
            (a < 7, lambda: -3 * (1 - (x / 7) ** 2) ** 0.5),
            (True, lambda: 0.0),
        )
        return tuple(next(value() for fits, value in rows if fits) for rows in (tops, bottoms))

    def test_curve(self):
        """Every minute of the day: each branch and boundary."""
        for minutes in range(24 * 60):
            for got, wanted in zip(sems.bat(datetime(2026, 3, 21, minutes // 60, minutes % 60, 59)), self.curve(minutes)):
                self.assertAlmostEqual(got, wanted, 9, msg=minutes)
        self.assertEqual((sems.bat(NOON)[0], sems.bat(NOON.replace(hour=5))), (2.25, (0, 0)))

    def test_frames(self):
        """Generation and export become the bat, cut to whole watts; nothing else changes but cipher and CRC."""
        for function in (sems.LIVE, sems.BUFFERED):
            for hours in (5, 6, 9, 12, 15, 20):
                for ranges in (METER_RANGES, [(2105, (1, 2)), (2107, (3, 4)), (9, (1,))], [(2107, (0, 0)), (2048, (1,)), (2107, (0, 9))]):
                    with self.subTest(hours=hours, ranges=ranges):
                        before = frame(function, ranges=ranges, when=NOON.replace(hour=hours))
                        after = sems.with_bat(before)
                        self.assertEqual(
                            (len(after), after[:52], plain_pieces(sems.Framer(OUT).feed(after, 0))[0][0]),
                            (len(before), before[:52], "frame"),
                        )
                        wanted = sems.registers(sems.decode(before, OUT).clear)
                        for first, watts in zip((2107, 2105), sems.bat(NOON.replace(hour=hours))):
                            raw = struct.unpack(">2H", struct.pack(">i", int(1000 * watts)))
                            wanted.update({first + i: word for i, word in enumerate(raw) if first + i in wanted})
                        self.assertEqual(sems.registers(sems.decode(after, OUT).clear), wanted)
                        self.assertEqual(
                            [(first, len(words)) for first, words in sems.blocks(sems.decode(after, OUT).clear)],
                            [(first, len(words)) for first, words in ranges],
                        )
        not_a_date = bytearray(FRAME)
        not_a_date[46:52] = b"\0" * 6
        for data in (frame(clear=b"\x09" * 16), frame(ranges=[(2048, (1,))]), with_crc(bytes(not_a_date))):
            self.assertIn(sems.with_bat(data), (None, data))


class Order(unittest.TestCase):
    def test_order(self):
        """Live packets: older ones do not count, but for the third in a row with rising times; no date takes no part."""
        for name, minutes, wanted in (
            ("rising", (0, 1, 2), "yyy"),
            ("equal is new", (0, 0, 0), "yyy"),
            ("older", (9, 5), "yn"),
            ("the third older, rising", (9, 1, 2, 3, 4), "ynnyy"),
            ("not rising", (9, 3, 2, 1), "ynnn"),
            ("equal is not rising", (9, 1, 1, 1, 1), "ynnnn"),
            ("rising after a fall", (9, 5, 1, 2, 3), "ynnny"),
            ("a newer one between", (9, 1, 2, 9, 3), "ynnyn"),
            ("the set-back clock stays", (9, 1, 2, 3, 2), "ynnyn"),
            ("no date is used", (9, None, 9), "yyy"),
            ("no date does not end a row", (9, 1, None, 2, 3), "ynyny"),
            ("no date first", (None, 5, 1), "yyn"),
        ):
            with self.subTest(name):
                session, got = new_session(), ""
                for count, m in enumerate(minutes):
                    data = bytearray(frame(when=minute(m or 0), ranges=[(2107, (0, count))]))
                    data[46:52] = data[46:52] if m is not None else b"\0" * 6
                    session.from_device(with_crc(bytes(data)), 0.0, 0.0)
                    session.digest(0.0, 0.0)
                    got += "ny"[count in next(iter(session.store.devices.values())).gauges.values()]
                self.assertEqual(got, wanted)

    def test_old_packets(self):
        """A buffered packet, and a live one older than the newest, change nothing but packet counters."""
        session = new_session()
        self.live(session, minute(9), 100)
        before = shown(session.store)
        for function, when in ((sems.LIVE, minute(1)), (sems.BUFFERED, minute(20))):
            self.live(session, when, 7, function)
        changed = {series.partition("{")[0] for series, value in shown(session.store).items() if before.get(series) != value}
        counted = {"meter_metrics_packets_total", "sems_mitm_buffered_packets_total", "sems_mitm_packets_total", "sems_mitm_bytes_total"}
        self.assertEqual({name for name in changed if not name.startswith("process_")}, counted)

    def live(self, session, when, number, function=sems.LIVE, now=0.0):
        session.from_device(frame(function, when=when, ranges=[(2048, (0, 0, number)), (2107, (0, number))]), now, 0.0)
        session.digest(now, 0.0)

    def test_dips(self):
        """A counter below its held value is held until the third in a row below it, none below the one before, which is taken."""
        for name, values, wanted, dips in (
            ("rising", (5, 6, 6, 9), (5, 6, 6, 9), 0),
            ("one dip", (9, 0, 9, 10), (9, 9, 9, 10), 1),
            ("two dips", (9, 0, 1, 10), (9, 9, 9, 10), 2),
            ("a new start", (9, 1, 2, 3, 4), (9, 9, 9, 3, 4), 2),
            ("a new start that stands still", (9, 1, 1, 1), (9, 9, 9, 1), 2),
            ("falling", (9, 3, 2, 1, 0), (9, 9, 9, 9, 9), 4),
            ("falling, then rising", (9, 5, 1, 2, 3), (9, 9, 9, 9, 3), 3),
            ("a good one between", (9, 1, 2, 9, 1, 2), (9, 9, 9, 9, 9, 9), 4),
            ("equal to the held one", (9, 1, 2, 9, 3), (9, 9, 9, 9, 9), 3),
        ):
            with self.subTest(name):
                session, got = new_session(), []
                for count, number in enumerate(values):
                    self.live(session, minute(count), number)
                    got.append(
                        next(value for series, value in shown(session.store).items() if series.startswith("meter_energy_export_decawatt"))
                    )
                self.assertEqual(tuple(got), wanted)
                self.assertEqual(
                    shown(session.store)['sems_mitm_rejected_values_total{reason="dip"}'], 2 * dips
                )  # one register is two counters

    def test_silence(self):
        """Gauges go when the last new live packet is too old, device_up is 0 when the last good frame is; the rest stays."""
        for stale_after, at, gauges, up in ((300, 300, True, 1), (300, 301, False, 1), (300, 401, False, 0), (0, 1e9, True, 1)):
            with self.subTest(stale_after=stale_after, at=at):
                session = new_session(stale_after=stale_after)
                self.live(session, NOON, 5)
                self.live(session, minute(-1), 5, now=50.0)  # an old one
                self.live(session, NOON, 5, sems.BUFFERED, now=100.0)
                found = {series.partition("{")[0]: value for series, value in shown(session.store, at, 1000.0 + at).items()}
                self.assertEqual("meter_power_generation_watts" in found, gauges)
                self.assertEqual("sems_mitm_device_clock_offset_seconds" in found, gauges)
                self.assertEqual(found["sems_mitm_device_up"], up)
                self.assertEqual(found["sems_mitm_device_last_packet_timestamp_seconds"], 1100)
                self.assertLessEqual(
                    {"meter_energy_export_decawatt_hours_total", "sems_mitm_device_info", "meter_metrics_packets_total"}, set(found)
                )

    def test_offset(self):
        """The device's clock less this machine's, from new live packets that have a date."""
        session = new_session()
        wall = NOON.timestamp()
        for when, wanted in ((minute(2), 120), (minute(1), 120), (minute(3), 180)):
            session.from_device(frame(when=when), 0.0, wall)
            session.digest(0.0, wall)
            self.assertIn(wanted, [value for series, value in shown(session.store).items() if "clock_offset" in series])


class TroublesTest(unittest.TestCase):
    def test_once_a_minute(self):
        """The same trouble is one log line a minute with a count; another kind has its own."""
        troubles = sems.Troubles()
        with quiet() as lines:
            for now, kind in ((0, "a"), (1, "a"), (1, "b"), (59.9, "a"), (60, "a"), (61, "a"), (200, "a"), (300, "a")):
                troubles.say(kind, kind, now)
        self.assertEqual([re.findall(r"\w+", line)[:3:2] for line in lines], [["a"], ["b"], ["a", "2"], ["a", "1"], ["a"]])
        self.assertEqual(troubles.suppressed, 3)


class StoreTest(unittest.TestCase):
    def feed(self, store, serial, cls=sems.METER, now=0.0, function=sems.LIVE, ranges=None, count=1):
        session = sems.Session(sems.Exporter(store), "peer", now)
        for i in range(count):
            session.from_device(frame(function, cls, serial, minute(i), ranges), now, 0.0)
        session.digest(now, 0.0)

    def serials(self, store, now=0.0):
        return sorted({re.search(r'full_serial="([^"]*)"', series)[1] for series in shown(store, now) if "device_info" in series})

    def test_max_devices(self):
        """When full, the stale device silent longest gives way with all its series; while none is stale the newcomer gets none."""
        store = sems.Store(stale_after=100, max_devices=2)
        with quiet() as lines:
            self.feed(store, "91000HKU0000000A", now=0.0)
            self.feed(store, "91000HKU0000000B", now=10.0)
            self.feed(store, "91000HKU0000000C", now=100.0, count=3)
            self.assertEqual(self.serials(store, 100.0), ["91000HKU0000000A", "91000HKU0000000B"])
            self.assertEqual(shown(store)["sems_mitm_unlisted_device_packets_total"], 3)
            self.assertEqual(len(lines), 1)
            self.feed(store, "91000HKU0000000C", now=111.0)
            self.assertEqual(self.serials(store, 111.0), ["91000HKU0000000B", "91000HKU0000000C"])
            self.assertFalse([series for series in shown(store, 111.0) if "0000000A" in series])
            self.feed(store, "91000HKU0000000A", now=111.0)
            self.assertEqual(self.serials(store, 111.0), ["91000HKU0000000A", "91000HKU0000000C"])
        never = sems.Store(stale_after=0, max_devices=1)
        with quiet():
            self.feed(never, "91000HKU0000000A", now=0.0)
            self.feed(never, "91000HKU0000000B", now=1e9)
        self.assertEqual(self.serials(never, 1e9), ["91000HKU0000000A"])

    def test_same_name(self):
        """A device with the device, model and last eight characters of another gets no series, and a warning."""
        store = sems.Store()
        with quiet() as lines:
            self.feed(store, "91000HKU00000042")
            self.feed(store, "81000HKU00000042", count=2)
        self.assertEqual(self.serials(store), ["91000HKU00000042"])
        self.assertEqual(len(lines), 1)
        self.assertEqual(shown(store)["sems_mitm_unlisted_device_packets_total"], 2)
        self.feed(store, "91000HKU00000043")
        self.feed(store, "91000HKU00000042", sems.GRID_TIED, ranges=INVERTER_RANGES)  # another `device` label
        self.assertEqual(self.serials(store), ["91000HKU00000042", "91000HKU00000043"])

    def test_model(self):
        """When the model becomes known all series move in one step, counters with their values; a nameless packet clears nothing."""
        store, serial = sems.Store(), "93000DSN00000042"
        self.feed(store, serial, sems.GRID_TIED, ranges=INVERTER_RANGES, count=3)
        old = {series: value for series, value in shown(store).items() if 'model="GoodWe DSN 3000 W"' in series}
        for ranges in ([(40173, sems.text_words("GW3000D-NS", 16))], [(40173, (0xFFFF,) * 16)], [(40075, (0,) * 26)]):
            self.feed(store, serial, sems.GRID_TIED, function=sems.SETTINGS, ranges=ranges)
            new = shown(store)
            self.assertFalse([series for series in new if "GoodWe DSN" in series])
            for series, value in old.items():
                if "device_info" not in series and "time_sync" not in series:
                    self.assertEqual(new[series.replace("GoodWe DSN 3000 W", "GW3000D-NS")], value, series)
        self.assertEqual(len(set(old)), len({series for series in new if 'model="GW3000D-NS"' in series}))

    def test_model_leaves_its_name(self):
        """The labels that a device has left are free for another."""
        store = sems.Store()
        self.feed(store, "93000DSN00000042", sems.GRID_TIED, function=sems.SETTINGS, ranges=[(40173, sems.text_words("GW-X", 16))])
        self.feed(store, "83000DSN00000042", sems.GRID_TIED, ranges=INVERTER_RANGES)
        self.assertEqual(self.serials(store), ["83000DSN00000042", "93000DSN00000042"])

    def test_model_collision(self):
        """Two devices that turn out to have the same labels never give a series twice."""
        store = sems.Store()
        name = [(40173, sems.text_words("GW-X", 16))]
        with quiet() as lines:
            for serial in ("93000DSN00000042", "94000DSN00000042"):
                self.feed(store, serial, sems.GRID_TIED, ranges=INVERTER_RANGES)
                self.feed(store, serial, sems.GRID_TIED, function=sems.SETTINGS, ranges=name)
        text = scraped(store)
        series = [line.rpartition(" ")[0] for line in text.splitlines() if not line.startswith("#")]
        self.assertEqual(len(series), len(set(series)))
        self.assertEqual((self.serials(store), len(lines)), (["93000DSN00000042"], 1))

    def test_types(self):
        """packets_total has the known types, 32 others, then `other`; malformed, junk and keep-alives have their own names."""
        store = sems.Store()
        session = sems.Session(sems.Exporter(store), "peer", 0.0)
        for function in range(0x50, 0x50 + 40):
            session.from_device(frame(function), 0.0, 0.0)
        session.from_device(FRAME + broken(FRAME) + b"junk", 0.0, 0.0)
        session.from_device(b"more junk", 0.0, 0.0)
        session.from_device(with_crc(FRAME[:14] + b"\0" * 16 + FRAME[30:]), 0.0, 0.0)
        found = {
            tuple(re.findall(r'"(\w+)"', series)): value for series, value in shown(store).items() if "sems_mitm_packets_total" in series
        }
        self.assertEqual(sum(len(kind) == 4 and kind not in sems.TYPES and kind != "junk" for _, kind, _ in found), 32)
        self.assertEqual(found["outbound", "other", "forwarded"], 8)
        self.assertEqual(found["outbound", "malformed", "forwarded"], 2)
        self.assertEqual(found["outbound", "junk", "forwarded"], 1)
        self.assertEqual(found["outbound", "0304", "forwarded"], 1)
        self.assertEqual(shown(store)["outbound_unknown_packets_total"], 40)

    def test_counters(self):
        """The original's counters by class and function, whether or not the payload parses; nothing for bad CRC and junk."""
        meter, inverter = "meter_metrics_packets_total", "inverter_metrics_packets_total"
        for cls, function, wanted in (
            (3, 0x03, "meter_time_sync_packets_total"), (1, 0x03, "inverter_time_sync_packets_total"), (2, 0x03, "inverter_time_sync_packets_total"),
            (3, 0x04, meter), (3, 0x45, meter), (1, 0x04, inverter), (2, 0x45, inverter), (9, 0x04, inverter),
            (3, 0x10, "meter_time_sync_ack_packets_total"), (1, 0x10, "meter_time_sync_ack_packets_total"), (3, 0x16, "outbound_unknown_packets_total"),
        ):  # fmt: skip
            with self.subTest(cls=cls, function=function), quiet():
                session = new_session()
                for data in (frame(function, cls), frame(function, cls, clear=b"\x05" * 16), broken(frame(function, cls)), b"junk"):
                    session.from_device(data, 0.0, 0.0)
                session.digest(0.0, 0.0)
                found = {series.partition("{")[0]: value for series, value in shown(session.store).items()}
                names = {name for name in found if re.search("(sync|metrics|ack|outbound_unknown)_packets_total", name) and found[name]}
                self.assertEqual((names, found[wanted]), ({wanted}, 2))

    def test_exposition(self):
        """HELP and TYPE once a name, families together and sorted, label values escaped, counters with fixed labels from 0."""
        store = sems.Store(batsignal=True)
        empty = shown(store)
        for name, key, values in sems.FIXED:
            for value in values:
                self.assertEqual(empty[f'{name}{{{key}="{value}"}}' if key else name], 0)
        self.assertEqual({"batsignal_top", "batsignal_bottom"} - set(empty), set())
        self.assertFalse([name for name in shown(sems.Store()) if name.startswith("batsignal")])
        self.feed(store, '9\\"00HKU0000"\\42')
        self.feed(store, INVERTER, sems.GRID_TIED, ranges=INVERTER_RANGES)
        text = scraped(store)
        self.assertTrue(text.endswith("\n"))
        self.assertIn('serial="0000\\"\\\\42"', text)
        self.assertIn('full_serial="9\\\\\\"00HKU0000\\"\\\\42"', text)
        names: list = []
        for block in re.split(r"(?m)^(?=# HELP)", text)[1:]:
            helped, typed, *lines = block.splitlines()
            name = helped.split()[2]
            names.append(name)
            self.assertEqual(typed.split()[:3], ["#", "TYPE", name])
            self.assertEqual((typed.split()[3], helped.split(None, 3)[3]), sems.METRICS[name])
            self.assertTrue(lines)
            for line in lines:
                self.assertRegex(line, re.escape(name) + r'(\{\w+="([^"\\]|\\.)*"(,\w+="([^"\\]|\\.)*")*\})? -?[\d.e+-]+$')
        self.assertEqual(names, sorted(set(names)))

    def test_refreshed(self):
        """A device's cached page follows each change: a packet, silence, a new model, an ACK."""
        session = new_session(stale_after=100)
        ask = lambda name, now=0.0: [v for s, v in shown(session.store, now).items() if s.startswith(name + "{")]
        for step in range(3):
            session.from_device(frame(when=minute(step), ranges=[(2107, (0, step))]), 0.0, 0.0)
            session.digest(0.0, 0.0)
            self.assertEqual(ask("meter_power_generation_watts"), [step])
            self.assertEqual(ask("meter_metrics_packets_total"), [step + 1])
            session.from_portal(ACK, 0.0, 0.0)
            self.assertEqual(ask("sems_mitm_acks_total"), [step + 1])
        with quiet():
            session.from_portal(portal_frame("0304", b"\2" + bytes(15)), 0.0, 0.0)
        self.assertEqual(ask("sems_mitm_nacks_total"), [1])
        self.assertEqual((ask("meter_power_generation_watts", 100.0), ask("meter_power_generation_watts", 101.0)), ([2], []))


class Rules(unittest.TestCase):
    def test_allowed(self):
        """What may pass to a device: ACK, NACK and the clock, each with its hostile neighbours."""
        zeros, write = bytes(16), lambda first, last, rest: struct.pack(">HH", first, last) + rest
        date, no_date = bytes((26, 3, 21, 12, 0, 0)), bytes((26, 2, 30, 12, 0, 0))
        meter, grid, hybrid = 0x1216, 0x9D79, 0xB090
        for name, kind, clear, classes, wanted in (
            ("ACK", "0304", zeros, {3}, "ack"),
            ("ACK of settings", "0303", zeros, {3}, "ack"),
            ("ACK of buffered data", "0245", zeros, {2}, "ack"),
            ("ACK of an unknown class", "0904", zeros, {9}, "ack"),
            ("NACK", "0304", b"\2" + bytes(15), {3}, "nack"),
            ("neither", "0304", b"\1" + bytes(15), {3}, ""),
            ("a NACK with more", "0304", b"\2" + bytes(14) + b"\1", {3}, ""),
            ("an ACK with more", "0304", bytes(15) + b"\1", {3}, ""),
            ("an ACK with a second byte", "0304", b"\0\1" + bytes(14), {3}, ""),
            ("an ACK of two blocks", "0304", bytes(32), {3}, ""),
            ("an ACK of a class not sent", "0104", zeros, {3}, ""),
            ("an ACK before anything", "0304", zeros, set(), ""),
            ("an ACK of a confirmation", "0310", zeros, {3}, ""),
            ("an ACK of another function", "0316", zeros, {3}, ""),
            ("a meter's clock", "0116", write(meter, meter + 2, date + bytes(6)), {3}, "clock"),
            ("a grid-tied one's clock", "0116", write(grid, grid + 2, date + bytes(6)), {1}, "clock"),
            ("a hybrid's clock", "0116", write(hybrid, hybrid + 2, date + bytes(6)), {2}, "clock"),
            ("two classes", "0116", write(grid, grid + 2, date + bytes(6)), {3, 1}, "clock"),
            ("the clock of a class not sent", "0116", write(grid, grid + 2, date + bytes(6)), {3}, ""),
            ("the clock of an unknown class", "0116", write(grid, grid + 2, date + bytes(6)), {9}, ""),
            ("the clock in another type", "0316", write(meter, meter + 2, date + bytes(6)), {3}, ""),
            ("the clock in an ACK's type", "0304", write(meter, meter + 2, date + bytes(6)), {3}, ""),
            ("a register more", "0116", write(meter, meter + 3, date + bytes(6)), {3}, ""),
            ("a register less", "0116", write(meter, meter + 1, date + bytes(6)), {3}, ""),
            ("from a register before", "0116", write(meter - 1, meter + 2, date + bytes(6)), {3}, ""),
            ("last before first", "0116", write(meter + 2, meter, date + bytes(6)), {3}, ""),
            ("another register", "0116", write(meter + 1, meter + 3, date + bytes(6)), {3}, ""),
            ("from one class's to another's", "0116", write(meter, grid + 2, date + bytes(6)), {3, 1}, ""),
            ("no date", "0116", write(meter, meter + 2, no_date + bytes(6)), {3}, ""),
            ("zeros for a date", "0116", write(meter, meter + 2, bytes(12)), {3}, ""),
            ("more behind the date", "0116", write(meter, meter + 2, date + bytes(5) + b"\1"), {3}, ""),
            ("more at once behind the date", "0116", write(meter, meter + 2, date + b"\1" + bytes(5)), {3}, ""),
            ("two blocks", "0116", write(meter, meter + 2, date + bytes(22)), {3}, ""),
            ("all zeros", "0116", zeros, {1, 2, 3}, ""),
            ("an ACK in the clock's type, that class and function", "0116", b"\2" + bytes(15), {1}, ""),
            ("a firmware upgrade", "0120", bytes(range(16)), {1, 2, 3}, ""),
        ):
            with self.subTest(name):
                where = address_of(portal_frame(kind, clear), IN)
                self.assertEqual(sems.allowed(where, clear, classes), wanted)

    def test_zones(self):
        """Local time can be told if TZ is unset, a zone that the system has, or a POSIX rule."""
        there = {"/usr/share/zoneinfo/Europe/Berlin", "/usr/share/zoneinfo/UTC"}
        for zone, wanted in (
            (None, True), ("Europe/Berlin", True), (":Europe/Berlin", True), ("UTC", True), ("CET-1CEST,M3.5.0,M10.5.0/3", True), ("UTC0", True), ("EST5EDT", True),
            ("<+03>-3", True), ("<-03>3<-02>,M3.5.0/-2,M10.5.0/-1", True), ("IST-5:30", True), ("Europe/Berlim", False), ("Berlin", False), ("CET", False), ("+2", False), ("Europe", False),
        ):  # fmt: skip
            self.assertEqual(sems.zone_is_known(zone, there.__contains__), wanted, zone)
        self.assertFalse([f for f in sems.clock_findings(sems.RELEASED + 1, "Europe") if f.state == sems.OK and "local time" in f.text])


class OutboxTest(unittest.TestCase):
    A, B, C = b"aaaa", b"bbbb", b"cccc"

    def test_steps(self):
        """What waits, what a lost connection brings back, what answers end: steps, each with what it gives."""
        a, b, c, k = self.A, self.B, self.C, ("0304", METER)
        other = ("0304", OTHER)
        for name, steps in {
            "in order": [("put", a), ("put", b), ("ready", a + b), ("took", 4), ("ready", b), ("took", 4), ("ready", b"")],
            "half sent goes again whole": [("put", a), ("put", b), ("took", 6), ("ready", b[2:]), ("lost",), ("ready", b)],
            "nothing sent": [("put", a), ("lost",), ("ready", a)],
            "a run half sent": [("put", a + b + c), ("took", 6), ("ready", (b + c)[2:]), ("lost",), ("ready", b + c)],
            "kept until answered": [("put", a, k), ("put", b, k), ("took", 8), ("ready", b""), ("lost",), ("ready", a + b), ("took", 8), ("answered", k, True), ("lost",), ("ready", b)],
            "an answer of another serial": [("put", a, k), ("put", b, other), ("took", 8), ("answered", other, True), ("lost",), ("ready", a)],
            "an answer too much": [("put", a, k), ("took", 4), ("answered", k, True), ("answered", k, False), ("lost",), ("ready", b"")],
            "an answer too early": [("put", a, k), ("answered", k, False), ("took", 3), ("answered", k, False), ("took", 1), ("answered", k, True)],
            "unanswered before unsent": [("put", a, k), ("put", b), ("put", c, k), ("took", 5), ("lost",), ("ready", a + b + c)],
            "the oldest is shed": [("put", a), ("put", b), ("put", c), ("shed", 5, 2), ("ready", c)],
            "shed of a run": [("put", a + b + c), ("shed", 8, 1), ("ready", b + c), ("shed", 0, 2), ("ready", b"")],
            "half sent is not shed": [("put", a), ("put", b), ("took", 2), ("shed", 4, 1), ("ready", a[2:]), ("shed", 0, 0)],
            "half sent of a run is not shed": [("put", a + b + c), ("took", 6), ("shed", 0, 1), ("ready", b[2:]), ("lost",), ("ready", b)],
            "in flight is shed first, its answer is not another's": [("put", a, k), ("put", b, k), ("took", 4), ("shed", 4, 1), ("took", 4), ("answered", k, False), ("answered", k, True)],
            "a new connection owes nothing": [("put", a, k), ("put", b, k), ("took", 4), ("shed", 4, 1), ("lost",), ("took", 4), ("answered", k, True)],
            "the unfinished frame": [("took", 3), ("put", a), ("ready", a[3:]), ("took", 1), ("ready", b"")],
            "the unfinished frame, sent to its end": [("took", 4), ("put", a), ("ready", b""), ("put", b), ("ready", b)],
            "the unfinished frame, cut into two": [("took", 6), ("put", a), ("put", b), ("ready", b[2:]), ("lost",), ("ready", b)],
            "the unfinished frame, lost": [("took", 3), ("lost",), ("put", a), ("ready", a)],
        }.items():  # fmt: skip
            with self.subTest(name):
                pool = sems.Pool()
                box = sems.Outbox(pool, True)
                for step, *rest in steps:
                    if step == "put":
                        box.put(rest[0], 4, *rest[1:])
                    elif step == "ready":
                        self.assertEqual(box.ready(), rest[0])
                    elif step in ("answered", "shed"):
                        self.assertEqual(getattr(box, step)(rest[0]), rest[1], (step, rest))
                    else:
                        getattr(box, step)(*rest)
                    entries = len(box.unsent) + len(box.flying)
                    self.assertEqual((pool.size, pool.outward), (box.size + sems.ENTRY_COST * entries, box.size))
                    self.assertEqual(box.backlog, sum(len(entry.data) for entry in box.unsent))
                box.close()
                self.assertEqual((pool.size, pool.outward, pool.outboxes), (0, 0, set()))

    def test_model(self):
        """At random: each connection gets whole frames in order, all that is not answered or sent; what is dropped is counted."""
        for seed in range(400):
            rng, box = random.Random(seed), sems.Outbox(sems.Pool(), True)
            waiting: list = []  # (number, key) that the next connection must bring, in order
            flying: list = []  # sent on this connection, not answered
            number, sent, taken, dropped = 0, b"", 0, 0

            def arrived():
                """Account for the whole frames that this connection has brought since the last time."""
                nonlocal taken
                while len(sent) >= 4 * taken + 4:
                    self.assertEqual(sent[4 * taken : 4 * taken + 4], struct.pack(">I", waiting[0][0]), seed)
                    flying.append(waiting.pop(0))
                    taken += 1

            for _ in range(60):
                step = rng.choice(["put", "put", "took", "took", "answered", "lost"] + ["shed"] * (seed % 2))
                if step == "put":
                    key, count = (("0304", rng.choice("AB")), 1) if rng.random() < 0.6 else (None, rng.randrange(1, 4))
                    box.put(b"".join(struct.pack(">I", number + i) for i in range(count)), 4, key)
                    waiting += [(number + i, key) for i in range(count)]
                    number += count
                elif step == "took":
                    data = box.ready(rng.randrange(1, 30))
                    data = data[: rng.randrange(len(data) + 1)]
                    box.took(len(data))
                    sent += data
                    arrived()
                elif step == "answered":
                    keyed = [entry for entry in flying if entry[1]]
                    if keyed:
                        done = rng.choice(keyed)
                        done = next(entry for entry in keyed if entry[1] == done[1])
                        flying.remove(done)
                        self.assertEqual(box.answered(done[1]), "dropped" not in done)
                elif step == "lost":
                    box.lost()
                    waiting = [entry for entry in flying if entry[1] and "dropped" not in entry] + waiting
                    flying, sent, taken = [], b"", 0
                else:
                    count = box.shed(rng.randrange(box.size + 5))
                    dropped += count
                    for entry in [entry for entry in flying if entry[1] and "dropped" not in entry][:count]:
                        flying[flying.index(entry)] = (*entry, "dropped")
                        count -= 1
                    begun = int(len(sent) % 4 > 0)
                    self.assertLessEqual(count, len(waiting) - begun)
                    del waiting[begun : begun + count]
                left = sum(1 for entry in flying if entry[1] and "dropped" not in entry)
                self.assertIn(box.size - 4 * (left + len(waiting)), (0, 4, 8), seed)  # a run counts until all of it is sent
            sent += box.ready()
            box.took(len(box.ready()))
            arrived()
            self.assertEqual((waiting, box.ready()), ([], b""))

    @mock.patch.object(sems, "ENTRY_COST", 0)
    def test_pool(self):
        """Above the limit the longest loses its oldest frames first, then the next; what is half sent stays."""
        for name, sizes, taken, limit, left in (
            ("fits", (3, 2), 0, 500, (3, 2)),
            ("the longest", (6, 2), 0, 500, (3, 2)),
            ("both", (6, 5), 0, 400, None),
            ("none is left", (2, 2), 0, 0, (0, 0)),
            ("half sent", (6, 2), 150, 0, (1, 0)),
        ):
            with self.subTest(name):
                pool = sems.Pool(limit)
                boxes = [sems.Outbox(pool, True) for _ in sizes]
                for box, count in zip(boxes, sizes):
                    for i in range(count):
                        box.put(bytes([i]) * 100, 100)
                count = sum(sizes) - taken // 100
                boxes[0].took(taken)
                dropped = pool.shed()
                self.assertLessEqual(pool.size, max(limit, 100 * bool(taken)))
                self.assertEqual(dropped, count - sum(box.size for box in boxes) // 100)
                if left:
                    self.assertEqual((boxes[0].size, boxes[1].size), (100 * left[0], 100 * left[1]))
                if boxes[1].unsent:
                    self.assertEqual(boxes[1].unsent[-1].data[-1:], bytes([sizes[1] - 1]))
        pool = sems.Pool(1000)
        long, short = sems.Outbox(pool, True), sems.Outbox(pool, True)
        long.put(b"j" * 900, 900)
        long.took(1)
        for _ in range(8):
            short.put(b"x" * 100, 100)
        self.assertEqual((pool.shed(), pool.size), (7, 1000))


class Sessions(unittest.TestCase):
    RELEASE = float(sems.RELEASED + 1)

    def verdicts(self, session, direction="outbound") -> dict:
        return {(kind, verdict): count for (wire, kind, verdict), count in session.store.packets.items() if count and wire == direction}

    def test_spool_moves(self):
        """What a device left goes to its new connection as it was: junk in front is not sent first there either."""
        old = new_session(mode=sems.SPOOL, up=False)
        old.from_device(b"junk" + frame(), 0, self.RELEASE)
        heir = sems.Session(old.exporter, "192.0.2.20:6", 1)
        old.device_gone = True
        heir.portal_failed()
        heir.from_device(frame(when=minute(1)), 1, self.RELEASE)
        heir.portal_came()
        self.assertEqual(heir.outgoing(1), frame() + frame(when=minute(1)))
        self.assertEqual(old.exporter.done, [old])

    def test_long_packets_in_the_log(self):
        """Of what is blocked, the log shows 256 bytes at most."""
        session = sems.Session(sems.Exporter(sems.Store()), "192.0.2.20:5", 0)
        with quiet() as lines:
            session.from_portal(b"x" * 4000, 0, self.RELEASE)
        self.assertEqual([len(line.rsplit(" ", 1)[1]) for line in lines], [2 * 256])

    def test_unchanged(self):
        """Forward: every byte goes on in order, as it arrives, decoded or not, whatever the cut of reads and writes."""
        stream = FRAME + SHORT + broken(FRAME) + b"junk" + frame(0x77) + frame(clear=b"\x09" * 16) + claim(SHORT, 200) + FRAME[:70]
        for at in range(1, len(stream)):
            session = new_session()
            for part in (stream[:at], stream[at:]):
                session.from_device(part, 0.0, 0.0)
                self.assertEqual(pumped(session), part, at)
        rng = random.Random(3)
        for seed in range(50):
            session, sent = new_session(), b""
            for part in cuts(stream * 2, rng, 20):
                session.from_device(part, 0.0, 0.0)
                sent += pumped(session, 0.0, rng.randrange(100))
            with self.subTest(seed=seed):
                self.assertEqual(sent + pumped(session), stream * 2)
                self.assertEqual((session.to_portal.size, session.to_device.size), (0, 0))

    def test_portal_lost(self):
        """Forward: lost at any byte, the next connection begins with the first byte of the frame that was not sent whole."""
        frames = [FRAME, SHORT, frame(when=minute(1)), frame(when=minute(2)), EMPTY]
        stream, rng = b"".join(frames), random.Random(4)
        bounds = [sum(map(len, frames[:i])) for i in range(len(frames) + 1)]
        for came in range(len(stream) + 1):
            for taken in {came, rng.randrange(came + 1)}:
                session = new_session()
                for part in cuts(stream[:came], rng):
                    session.from_device(part, 0.0, 0.0)
                self.assertEqual(pumped(session, 0.0, taken), stream[:taken])
                session.portal_lost(1.0, 0.0)
                later = rng.randrange(came, len(stream) + 1)
                for part in (stream[came:later], stream[later:]):
                    session.from_device(part, 1.0, 0.0) if part else None
                    if part == stream[came:later]:
                        session.portal_came()
                self.assertEqual(pumped(session, 2.0), stream[max(at for at in bounds if at <= taken) :], (came, taken, later))

    def test_away(self):
        """Forward, the portal away: nothing is answered; 1 MiB waits, the oldest is dropped first, and counted."""
        session, one = new_session(up=False), len(FRAME)
        total = (1 << 20) // one + 100
        for i in range(total):
            session.from_device(frame(when=minute(i)) if i in (0, total - 1) else FRAME, 0.0, 0.0)
        self.assertEqual(session.to_device.ready(), b"")
        self.assertEqual(shown(session.store)["sems_mitm_queue_dropped_packets_total"], 100)
        session.portal_came()
        sent = pumped(session)
        self.assertEqual((len(sent), sent[:one], sent[-one:]), ((total - 100) * one, FRAME, frame(when=minute(total - 1))))

    def test_away_junk(self):
        """Forward: what the portal gets first when it is back begins with a frame, whatever came while it was away."""
        for junk in (b"junk", broken(FRAME), FRAME[20:]):
            session = new_session()
            session.from_device(SHORT, 0.0, 0.0)
            self.assertEqual(pumped(session), SHORT)
            session.portal_lost(1.0, 0.0)
            session.from_device(junk + FRAME, 1.0, 0.0)
            session.portal_came()
            self.assertEqual(pumped(session), FRAME)

    def test_spool(self):
        """Spool, at random: every frame is ACKed once at once, and delivered in order, again until the portal has answered it."""
        frames = [frame(sems.BUFFERED if i % 3 else sems.LIVE, when=minute(i), ranges=[(2107, (0, i))]) for i in range(12)]
        for seed in range(150):
            rng, session = random.Random(seed), new_session(sems.SPOOL, up=False)
            session.store.troubles.say = mock.Mock()
            left, waiting, brought, sent = frames[:], [], [], b""
            for _ in range(80):
                step = rng.choice(("device", "took", "took", "answer", "answer", "turn"))
                if step == "device" and left:
                    waiting.append(left.pop(0))
                    for part in cuts(waiting[-1], rng):
                        session.from_device(part, 0.0, 0.0)
                    kind = sems.address(waiting[-1][:30], len(waiting[-1]), OUT).type
                    self.assertEqual(answers(session), [(kind, bytes(16))])
                elif step == "turn":
                    if session.portal_up:
                        session.portal_lost(0.0, 0.0)
                        waiting, brought, sent = brought + waiting, [], b""
                    else:
                        session.portal_came()
                elif step == "took" and session.portal_up:
                    sent += pumped(session, 0.0, rng.randrange(300))
                elif step == "answer" and brought:
                    kind = address_of(brought.pop(0)).type
                    session.from_portal(portal_frame(kind, bytes([rng.choice((0, 2))]) + bytes(15)), 0.0, 0.0)
                while waiting and len(sent) >= len(waiting[0]):
                    self.assertEqual(sent[: len(waiting[0])], waiting[0], seed)
                    sent = sent[len(waiting[0]) :]
                    brought.append(waiting.pop(0))
                self.assertEqual(session.to_portal.size, sum(map(len, brought + waiting)), seed)
                self.assertEqual(answers(session), [])
            session.portal_came()
            self.assertEqual(sent + pumped(session), b"".join(waiting))
            for data in brought + waiting:
                session.from_portal(portal_frame(address_of(data).type, bytes(16)), 0.0, 0.0)
            self.assertEqual(session.to_portal.size, 0)

    def test_spool_moves_begin_whole(self):
        """Spool: the device is back on another connection: what is undelivered goes there, before its own."""
        old = new_session(sems.SPOOL)
        for i in range(4):
            old.from_device(frame(when=minute(i)), 0.0, 0.0)
        pumped(old)
        old.from_portal(ACK, 0.0, 0.0)
        old.device_gone = True
        new = sems.Session(old.exporter, "again", 5.0)
        new.from_device(frame(when=minute(4)), 5.0, 0.0)
        new.portal_came()
        self.assertEqual(pumped(new), b"".join(frame(when=minute(i)) for i in (1, 2, 3, 4)))
        self.assertEqual((old.to_portal.size, old.exporter.done), (0, [old]))

    def test_local(self):
        """Local: ACKs by the envelope alone, nothing to what has no answer; the clock only where this machine's is good."""
        settings, junk = frame(sems.SETTINGS), b"junk"
        clock = [("0303", bytes(16)), ("0116", None)]
        for name, data, wall, zone_ok, wanted, verdict in (
            ("live", FRAME, self.RELEASE, True, [("0304", bytes(16))], "answered"),
            ("buffered", frame(sems.BUFFERED, 2, HYBRID), self.RELEASE, True, [("0245", bytes(16))], "answered"),
            ("unreadable", frame(clear=b"\x09" * 16), self.RELEASE, True, [("0304", bytes(16))], "answered"),
            ("a burst", FRAME * 3, self.RELEASE, True, [("0304", bytes(16))] * 3, "answered"),
            ("settings", settings, self.RELEASE, True, clock, "answered"),
            ("an early clock", settings, self.RELEASE - 2, True, clock[:1], "answered"),
            ("an unknown zone", settings, self.RELEASE, False, clock[:1], "answered"),
            ("a confirmation", SHORT, self.RELEASE, True, [], "dropped"),
            ("another function", frame(0x77), self.RELEASE, True, [], "dropped"),
            ("a bad CRC", broken(FRAME), self.RELEASE, True, [], "dropped"),
            ("a bad serial", with_crc(FRAME[:14] + b"\0" * 16 + FRAME[30:]), self.RELEASE, True, [], "dropped"),
            ("junk", junk, self.RELEASE, True, [], "dropped"),
        ):
            with self.subTest(name), quiet() as lines:
                session = new_session(sems.LOCAL, up=False)
                session.exporter.zone_ok = zone_ok
                session.from_device(data, 0.0, wall)
                got = answers(session)
                self.assertEqual([kind for kind, _ in got], [kind for kind, _ in wanted])
                self.assertTrue(all(clear in (want, want or clear) for (_, clear), (_, want) in zip(got, wanted)))
                self.assertEqual({verdict for _, verdict in self.verdicts(session)}, {verdict})
                self.assertEqual((session.outgoing(0.0), len(lines)), (b"", int(wanted == clock[:1])))
                acks = sum(value for series, value in shown(session.store).items() if series.startswith("sems_mitm_acks_total"))
                self.assertEqual(acks, sum(kind != "0116" for kind, _ in wanted))

    def test_clock_said_once(self):
        """That no clock is set is said once an hour."""
        session = new_session(sems.LOCAL, up=False)
        with quiet() as lines:
            for now in (0.0, 60.0, 3599.0, 3600.0):
                session.from_device(frame(sems.SETTINGS), now, 0.0)
        self.assertEqual(len(lines), 2)

    def test_bat(self):
        """The bat: a HomeKit 1000's live and buffered frames wait to be whole, a second at most; metrics keep the true values."""
        for name, data, waits, drawn in (
            ("live", FRAME, True, True),
            ("buffered", frame(sems.BUFFERED), True, True),
            ("settings", frame(sems.SETTINGS), False, False),
            ("a HomeKit 3000", frame(serial="93000HKU00000042"), False, False),
            ("an inverter", frame(cls=1, serial=INVERTER), False, False),
            ("unreadable", frame(clear=b"\x09" * 16), True, False),
            ("a bad CRC", broken(FRAME), True, False),
        ):
            with self.subTest(name), quiet():
                session = new_session(batsignal=True)
                session.from_device(data[:40], 0.0, 0.0)
                early = pumped(session, 0.9)
                self.assertEqual(early, b"" if waits else data[:40])
                session.from_device(data[40:], 0.9, 0.0)
                session.digest(0.9, 0.0)
                self.assertEqual(early + pumped(session, 0.9), sems.with_bat(data) if drawn else data)
                self.assertEqual({verdict for _, verdict in self.verdicts(session)}, {"rewritten" if drawn else "forwarded"})
                if name == "live":
                    self.assertIn(
                        1500, [value for series, value in shown(session.store).items() if series.startswith("meter_power_export_watts")]
                    )

    def test_bat_late(self):
        """A frame unfinished for a second goes on as it is; those behind it are drawn again."""
        session = new_session(batsignal=True)
        rows = [frame(when=minute(i)) for i in range(5)]
        drawn = [sems.with_bat(data) for data in rows]
        session.from_device(rows[0] + rows[1], 0.0, 0.0)
        self.assertEqual(pumped(session), drawn[0] + drawn[1])
        session.from_device(rows[2][:60], 1.0, 0.0)
        self.assertEqual((pumped(session, 1.9), session.due(1.9), pumped(session, 2.0)), (b"", 2.0, rows[2][:60]))
        session.from_device(rows[2][60:] + rows[3], 2.1, 0.0)
        self.assertEqual(pumped(session, 2.1), rows[2][60:] + drawn[3])

    def test_inward(self):
        """Inward at every cut: answers pass, what may not pass is dropped, counted and logged, and the next good frame is found."""
        write = portal_frame("0116", struct.pack(">HH", 45222, 45222) + bytes(12))
        hidden = portal_frame("0304", bytes(16) + b"\1" * 16)  # an ACK with a second block
        inner = b"GW" + (49 + len(ACK)).to_bytes(4, "big") + b"\3\4" + METER.encode() + ACK + bytes(33)
        other_class = sems.ack("0104", INVERTER, sems.time_stamp(NOON))
        for name, data, passed, unknown in (
            ("answers", ACK + CLOCK, ACK + CLOCK, 0),
            ("a write", ACK + write, ACK, 1),
            ("a write first", write + ACK, ACK, 1),
            ("two blocks", hidden + ACK, ACK, 1),
            ("another class", other_class + ACK, ACK, 1),
            ("a frame around an ACK, bad", inner + ACK, ACK + ACK, 0),
            ("a frame around an ACK, good", with_crc(inner, IN) + ACK, ACK, 1),
            ("keep-alives", BEAT + ACK + BEAT + BEAT, BEAT + ACK + BEAT + BEAT, 0),
            ("a keep-alive behind a write", write + BEAT + ACK, BEAT + ACK, 1),
            ("a keep-alive in junk", b"\0" + BEAT + ACK, ACK, 0),
            ("junk", b"HTTP/1.1 400" + ACK, ACK, 0),
        ):
            with self.subTest(name), quiet() as lines:
                for at in range(len(data) + 1):
                    session = new_session()
                    session.from_device(FRAME, 0.0, 0.0)
                    for part in (data[:at], data[at:]):
                        session.from_portal(part, 0.0, 0.0) if part else None
                    self.assertEqual(session.to_device.ready(), passed, at)
                    self.assertEqual(session.store.totals["inbound_unknown_packets_total", ""], unknown)
                self.assertEqual(bool(lines), passed != data)
        session = new_session()
        with quiet():
            session.from_portal(ACK, 0.0, 0.0)
            self.assertEqual((session.to_device.ready(), self.verdicts(session, "inbound")), (b"", {("0304", "dropped"): 1}))
            session.from_portal(b"junk G", 0.0, 0.0)
            session.portal_lost(0.0, 0.0)
            session.portal_came()
            session.from_portal(BEAT, 0.0, 0.0)  # at the start of a connection
        self.assertEqual(session.to_device.ready(), BEAT)

    def test_patience(self):
        """An unfinished frame is given up 30 s after its first byte, inward 5 s, and what is behind it is found."""
        session = new_session()
        session.from_device(FRAME, 0.0, 0.0)
        session.from_device(claim(b"x" * 9, 5000), 1.0, 0.0)
        session.from_device(frame(when=minute(1)), 2.0, 0.0)
        with quiet():
            session.from_portal(b"GW\0\0\x0f\0" + b"x" * 9 + ACK, 3.0, 0.0)
            for now, passed in ((7.9, b""), (8.0, ACK), (30.9, ACK)):
                session.tick(now, 0.0)
                self.assertEqual((session.to_device.ready(), self.verdicts(session)), (passed, {("0304", "forwarded"): 1}))
            self.assertEqual(session.due(8.0), 31.0)
            session.tick(31.0, 0.0)
        self.assertEqual(self.verdicts(session), {("0304", "forwarded"): 2, ("malformed", "forwarded"): 1})

    def test_loop(self):
        """A first frame that another connection, still open, sent to the portal within the last second is our own, come back."""
        rows = [frame(when=minute(i)) for i in range(50)]
        for name, first, later, lost, wanted in (
            ("the same", rows[:1], 1.0, False, True),
            ("later", rows[:1], 1.1, False, False),
            ("closed", rows[:1], 0.5, True, False),
            ("another", [SHORT], 0.5, False, False),
            ("the first of many that waited", rows, 0.5, False, True),
        ):
            with self.subTest(name):
                session = new_session(up=False)
                for data in first:
                    session.from_device(data, 0.0, 0.0)
                session.portal_came()
                pumped(session)
                if lost:
                    session.portal_lost(0.1, 0.0)
                come_back = sems.Session(session.exporter, "192.0.2.9:9", later)
                come_back.from_device(rows[0] + rows[1], later, 0.0)
                self.assertEqual((come_back.refused, come_back.outgoing(later) == b""), (wanted, wanted))
        for name, accepted, ended, wanted in (
            ("came after our attempt", 5.0, False, True),
            ("was there before it", 4.9, False, False),
            ("the first device has gone", 5.0, True, False),
        ):
            with self.subTest(name):
                session = new_session(up=False)
                other = sems.Session(session.exporter, "192.0.2.9:9", accepted)
                session.attempted = 5.0
                session.from_device(rows[0], 5.0, 0.0)
                session.portal_came()
                session.portal_took(len(session.outgoing(5.0)), 5.0)
                if ended:
                    session.device_closed(5.1, 0.0)
                other.from_device(rows[0], 5.2, 0.0)
                self.assertEqual(other.refused, wanted)
        session = new_session()
        session.from_device(rows[0], 0.0, 0.0)
        pumped(session)
        second = sems.Session(session.exporter, "192.0.2.9:9", 0.1)
        second.from_device(rows[1] + rows[0], 0.1, 0.0)  # not its first
        self.assertFalse(second.refused)

    def test_bursts(self):
        """A burst of 1 to 200 live packets leaves the same metrics as the packets one by one, old and unreadable ones among them."""
        rng, rows, when, total = random.Random(5), [], 0, 1000
        for i in range(200):
            total += rng.randrange(5)
            step = rng.random()
            when += 1 if step > 0.1 else 0 if step > 0.05 else -50
            ranges = [(2048, (0, 0, total)), (2096, (2300 + i,)), (2107, (0, i)), (5000 + i % 3, (i + 1,))]
            rows.append(frame(when=minute(when), ranges=ranges, clear=b"\x09" * 16 if i % 37 == 5 else None))
        self.compare(rows)

    def test_dips_in_bursts(self):
        """A burst of up to three packets holds dips and counts them as one by one does."""
        rng = random.Random(6)
        for _ in range(30):
            held = [frame(when=minute(0), ranges=[(2048, (0, 0, 9))])]
            self.compare(held + [frame(when=minute(i), ranges=[(2048, (0, 0, rng.randrange(12)))]) for i in (1, 2, 3)], 1)

    def compare(self, rows, held=0):
        """Each number of rows behind the first `held`, as a burst, against one by one."""
        single = new_session()
        state = lambda s: [(d.gauges, d.counters, d.unknown, d.info, d.offset, d.counts) for d in s.store.devices.values()]
        with quiet():
            for count, data in enumerate(rows, 1):
                single.from_device(data, 0.0, 0.0)
                single.digest(0.0, 0.0)
                burst = new_session()
                for part in (b"".join(rows[:held]), b"".join(rows[held:count])):
                    burst.from_device(part, 0.0, 0.0) if part else None
                    burst.digest(0.0, 0.0)
                self.assertEqual(state(burst), state(single), count)
                if held or count in (1, 2, 3, 50, len(rows)):
                    pages = [
                        {k: v for k, v in shown(s.store).items() if 'device="' in k or "rejected" in k and held} for s in (burst, single)
                    ]
                    self.assertEqual(*pages, count)


class FilesTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.folder)
        self.path, self.store = os.path.join(self.folder, "capture"), sems.Store()

    def errors(self):
        return {name: self.store.totals["sems_mitm_file_errors_total", f'file="{name}"'] for name in ("capture", "backfill")}

    def test_line(self):
        """A frame in the capture: one JSON object, the time in UTC."""
        line = sems.capture_line(1795305600.25, "192.0.2.1:5", "outbound", "forwarded", b"\1\xff")
        self.assertTrue(line.endswith("}\n") and line.count("\n") == 1)
        found = json.loads(line)
        self.assertEqual(
            datetime.fromisoformat(found.pop("time").replace("Z", "+00:00")), datetime(2026, 11, 22, 0, 0, 0, 250000, timezone.utc)
        )
        self.assertEqual(found, {"peer": "192.0.2.1:5", "direction": "outbound", "verdict": "forwarded", "hex": "01ff"})

    def test_append(self):
        """Lines are appended; behind a torn last line the next begins on a line of its own."""
        for before, after in ((b"", b"a\nb\n"), (b"old\n", b"old\na\nb\n"), (b"torn", b"torn\na\nb\n")):
            with open(self.path, "wb") as file:
                file.write(before)
            record = sems.RecordFile(self.path, "capture", self.store)
            record.write("a\n")
            record.write("b\n")
            os.close(record._file)
            with open(self.path, "rb") as file:
                self.assertEqual(file.read(), after)
        self.assertEqual(self.errors(), {"capture": 0, "backfill": 0})

    def test_trouble(self):
        """What cannot be written is counted and said once a minute, and nothing else happens."""
        for path in ("/dev/full", self.folder, os.path.join(self.folder, "none", "file")):
            if path != "/dev/full" or os.path.exists(path):
                with self.subTest(path), quiet() as lines:
                    self.store = sems.Store()
                    files = sems.Files(self.store, backfill=path)
                    for _ in range(3):
                        files.record(0.0, "p", "outbound", "0345", "forwarded", FRAME)
                    self.assertIn(self.errors()["backfill"], (3, 4))  # 4 if opening it fails
                    self.assertEqual(len(lines), 1)
                    if files.backfill._file is not None:
                        os.close(files.backfill._file)

    def test_both(self):
        """Every frame goes to the capture with its verdict, buffered readings alone to the backfill file; together they are the stream."""
        files = sems.Files(self.store, self.path, self.path + "2")
        session = sems.Session(sems.Exporter(self.store, record=files.record), "192.0.2.1:5", 0.0)
        stream = [FRAME, FRAME, frame(sems.BUFFERED), broken(FRAME), b"junk", SHORT]
        with quiet():
            session.from_device(b"".join(stream), 0.0, 0.0)
            session.from_portal(ACK + portal_frame("0345", b"\1" * 16) + BEAT, 0.0, 0.0)
        lines = []
        for file, record in ((self.path, files.capture), (self.path + "2", files.backfill)):
            os.close(record._file)
            with open(file, encoding="ascii") as text:
                lines.append([(entry["direction"], entry["verdict"], entry["hex"]) for entry in map(json.loads, text)])
        wanted = [("outbound", "forwarded", data.hex()) for data in stream]
        wanted += [
            ("inbound", "forwarded", ACK.hex()),
            ("inbound", "dropped", portal_frame("0345", b"\1" * 16).hex()),
            ("inbound", "forwarded", BEAT.hex()),
        ]
        self.assertEqual(lines, [wanted, wanted[2:3]])


class Dns(unittest.TestCase):
    QUERY = sems.dns_query("portal.example.", 0x1234)
    NAME, ALIAS, POINTER = b"\6portal\7example\0", b"\1a\7example\0", b"\xc0\x0c"

    def reply(self, *records, code=0, head=b"\x12\x34", flags=0x81, question=None, count=None):
        """An answer; a record is (owner, type, class, data)."""
        data = head + bytes((flags, code)) + struct.pack(">4H", 1, len(records) if count is None else count, 0, 0)
        data += (question or self.NAME) + b"\0\1\0\1"
        return data + b"".join(owner + struct.pack(">HHIH", kind, cls, 60, len(rest)) + rest for owner, kind, cls, rest in records)

    def test_query(self):
        """A query for A records, recursion desired; a name that is none is an error."""
        self.assertEqual(self.QUERY, b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + self.NAME + b"\0\1\0\1")
        for name in ("a..b", "x" * 64 + ".example"):
            with self.assertRaises(UnicodeError):
                sems.dns_query(name, 1)

    def test_answers(self):
        """What an answer tells: addresses, that there is no such name ([]), or nothing (None); "bad" is no answer to this query."""
        a, cname = (self.POINTER, 1, 1, b"\xcb\0\x71\7"), (self.POINTER, 5, 1, self.ALIAS)
        for name, data, wanted in (
            ("an address", self.reply(a), ["203.0.113.7"]),
            ("two", self.reply(a, (self.NAME, 1, 1, b"\1\2\3\4")), ["203.0.113.7", "1.2.3.4"]),
            ("in capitals", self.reply(a, question=self.NAME.upper()), ["203.0.113.7"]),
            ("an alias", self.reply(cname, (self.ALIAS, 1, 1, b"\1\2\3\4")), ["1.2.3.4"]),
            (
                "an alias of an alias",
                self.reply(cname, (self.ALIAS, 5, 1, b"\1b\xc0\x13"), (b"\1B\7exAmple\0", 1, 1, b"\1\2\3\4")),
                ["1.2.3.4"],
            ),
            ("another's address", self.reply((self.ALIAS, 1, 1, b"\1\2\3\4")), None),
            ("an address of 16 bytes", self.reply((self.POINTER, 28, 1, bytes(16)), a), ["203.0.113.7"]),
            ("another class", self.reply((self.POINTER, 1, 3, b"\1\2\3\4")), None),
            ("no such name", self.reply(code=3), []),
            ("no address", self.reply(), None),
            ("a failure", self.reply(code=2), None),
            ("refused", self.reply(a, code=5), None),
            ("a pointer to itself", self.reply((b"\xc0\x20", 1, 1, b"\1\2\3\4")), "bad"),
            ("a pointer forward", self.reply((b"\xc0\x40", 1, 1, b"\1\2\3\4")), "bad"),
            ("a loop in an alias", self.reply((self.POINTER, 5, 1, b"\1a\xc0\x2c"), a), "bad"),
            ("a label of 64", self.reply((b"\x40" + b"x" * 64 + b"\0", 1, 1, b"\1\2\3\4")), "bad"),
            ("a record cut", self.reply(a)[:-1], "bad"),
            ("a header cut", self.reply(a)[:40], "bad"),
            ("fewer records than it says", self.reply(a, count=2), "bad"),
            ("another number", self.reply(a, head=b"\x12\x35"), "bad"),
            ("another question", self.reply(a, question=self.ALIAS), "bad"),
            ("a query", self.reply(a, flags=1), "bad"),
            ("nothing", b"", "bad"),
            ("the query come back", self.QUERY, "bad"),
        ):
            with self.subTest(name):
                if wanted == "bad":
                    with self.assertRaises(sems.ProtocolError):
                        sems.dns_answer(data, self.QUERY)
                else:
                    self.assertEqual(sems.dns_answer(data, self.QUERY), wanted)
        rng, data = random.Random(7), self.reply(cname, (self.ALIAS, 1, 1, b"\1\2\3\4"))
        for _ in range(3000):
            forged = bytearray(data[: rng.randrange(12, len(data) + 1)])
            for _ in range(rng.randrange(3)):
                forged[rng.randrange(len(forged))] = rng.randrange(256)
            with contextlib.suppress(sems.ProtocolError):
                sems.dns_answer(bytes(forged), self.QUERY)

    def test_resolve(self):
        """Who is asked for the portal: the system, if it is routable, else the servers; an override must not lead here."""
        good, inside = "8.8.4.4", "192.168.1.2"
        for name, host, system, servers, wanted in (
            ("routable", "portal.example", [good], ["never asked"], [good]),
            ("overridden", "portal.example", [inside], [[good]], [good]),
            ("both kinds", "portal.example", [inside, good], [["8.8.8.8"]], ["8.8.8.8", good]),
            ("both kinds, nothing there", "portal.example", [inside, good], [None], [good]),
            ("no system", "portal.example", [], [[good]], [good]),
            ("the second server", "portal.example", [inside], [None, OSError(), [good]], [good]),
            ("no such name there", "portal.example", [inside], [[]], [inside]),
            ("overridden there too", "portal.example", [inside], [[inside], None], "loop"),
            ("nothing", "portal.example", [], [None, None], "dns"),
            ("no server", "portal.example", [inside], [], [inside]),
            ("an address", inside, [inside], ["never asked"], [inside]),
            ("localhost", "localhost", ["127.0.0.1"], ["never asked"], ["127.0.0.1"]),
        ):
            endpoints = [sems.Endpoint(socket.AF_INET, (address, 20001)) for address in system]
            asked = mock.Mock(side_effect=servers)
            with self.subTest(name), mock.patch.multiple(sems, system_addresses=lambda *_, found=endpoints: found, ask_dns=asked):
                try:
                    found = [endpoint.sockaddr[0] for endpoint in sems.resolve(host, 20001, [("192.0.2.53", 53)] * len(servers))]
                except sems.Unresolved as error:
                    found = error.reason
                self.assertEqual(found, wanted)
                self.assertEqual(asked.called, "never asked" not in servers and bool(servers))

    def test_global(self):
        """Which addresses are the internet's, and how a peer's address is compared."""
        for host, wanted in (("8.8.8.8", True), ("10.0.0.1", False), ("127.0.0.1", False), ("100.64.0.1", False), ("224.0.0.1", False), ("::1", False), ("fe80::1%eth0", False), ("2606:4700::1", True), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True)):  # fmt: skip
            self.assertEqual(sems.is_global(host), wanted, host)
        self.assertEqual([sems.plain(host) for host in ("::ffff:192.0.2.1", "::1", "fe80::1%eth0")], ["192.0.2.1", "::1", "fe80::1"])


class Backfill(unittest.TestCase):
    # the nights of both clock changes in Berlin, every half hour: seconds since midnight UTC, local hour and minute
    SPRING = [(datetime(2026, 3, 29), i * 1800, i // 2 + (1 if i < 2 else 2), i % 2 * 30) for i in range(8)]
    AUTUMN = [(datetime(2026, 10, 25), i * 1800, i // 2 + (2 if i < 2 else 1), i % 2 * 30) for i in range(8)]

    def test_clock_changes(self):
        """Local times become the right UTC, oldest first or newest first, and for a packet that comes twice."""
        with time_zone(BERLIN):
            for name, night in (("spring", self.SPRING), ("autumn", self.AUTUMN)):
                rows = [
                    ((day + timedelta(hours=hour, minutes=minutes)), day.replace(tzinfo=timezone.utc).timestamp() + utc)
                    for day, utc, hour, minutes in night
                ]
                for order, taken in (
                    ("rising", rows),
                    ("falling", rows[::-1]),
                    ("twice", [row for row in rows for _ in range(2)]),
                    ("falling, twice", [row for row in rows[::-1] for _ in range(2)]),
                ):
                    with self.subTest(name, order=order):
                        calendar = sems.Calendar()
                        self.assertEqual([calendar.utc(when, struct.pack(">d", utc)) for when, utc in taken], [utc for _, utc in taken])

    def test_history(self):
        """Captures as OpenMetrics text: names without _total in HELP and TYPE, each series by time, each time once, # EOF at the end."""
        when = datetime(2026, 6, 1, 12, 0)
        rows = [frame(sems.BUFFERED, when=when + timedelta(minutes=i), ranges=[(2048, (0, 0, i)), (2107, (0, i))]) for i in (2, 0, 1, 1)]
        rows += [frame(sems.SETTINGS), broken(rows[0]), frame(sems.BUFFERED, clear=b"\x09" * 16)]
        text = "".join(sems.capture_line(0.0, "p", "outbound", "forwarded", data) for data in rows)
        with time_zone(BERLIN):
            for name, data in (
                ("whole", text),
                ("the last line cut", text + text[:200]),
                ("inward lines", text + sems.capture_line(0.0, "p", "inbound", "forwarded", ACK)),
            ):
                with self.subTest(name):
                    lines = "".join(sems.openmetrics(sems.history(sems.file_stretches(data.encode()), 'job="x"'))).splitlines()
                    self.assertEqual((lines[-1], lines.count("# EOF")), ("# EOF", 1))
                    self.assertIn("# TYPE meter_energy_export_decawatt_hours counter", lines)
                    self.assertIn("# TYPE meter_power_generation_watts gauge", lines)
                    found = [line.rpartition("} ")[2] for line in lines if line.startswith("meter_power_generation_watts{")]
                    begin = int(when.replace(tzinfo=timezone.utc).timestamp()) - 7200
                    self.assertEqual(found, [f"{i} {begin + 60 * i}" for i in range(3)])
                    self.assertTrue(all('job="x"' in line for line in lines if not line.startswith("#")))
                    names = [line.split()[2] for line in lines if line.startswith("# TYPE")]
                    self.assertEqual(len(names), len(set(names)))


class Decode(unittest.TestCase):
    def test_reader_fuzz(self):
        """Whatever a capture file holds: what is read comes out, or it is a wrong use, or it is left out."""
        chance = random.Random(11)
        lines = [sems.capture_line(i, "p", "outbound" if i % 3 else "inbound", "forwarded", (FRAME, SHORT, ACK)[i % 3]) for i in range(6)]
        for _ in range(400):
            data = bytearray("".join(chance.sample(lines, 4)).encode())
            for _ in range(chance.randrange(8)):
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(3)] = bytes(chance.choice(b'{}[]",:x0f\n\x00\xff') for _ in range(chance.randrange(3)))
            with contextlib.suppress(sems.UsageError):
                stretches = list(sems.file_stretches(bytes(data)))
                for direction, part in stretches:
                    for wire, piece in sems.pieces_of(direction, part):
                        json.dumps(sems.described(wire, piece, {}))
                text = "".join(sems.openmetrics(sems.history(stretches, "")))
                self.assertTrue(text.endswith("# EOF\n"))

    def test_hex(self):
        """Hex in any spacing, capture lines and raw bytes are read alike; anything else is an error."""
        lines = sems.capture_line(0.0, "p", "outbound", "forwarded", FRAME) + sems.capture_line(0.0, "p", "inbound", "forwarded", ACK)
        spaced = " ".join(f"0x{byte:02X}," for byte in FRAME)
        for name, data in (
            ("raw", FRAME),
            ("hex", FRAME.hex().encode()),
            ("spaced", spaced.encode()),
            ("colons", FRAME.hex(":").encode()),
            ("a capture", lines.encode()),
        ):
            with self.subTest(name):
                pieces = [found for direction, part in sems.file_stretches(data) for found in sems.pieces_of(direction, part)]
                wanted = [(OUT, FRAME), (IN, ACK)][: 1 + (name == "a capture")]
                self.assertEqual([(wire, piece.data) for wire, piece in pieces], wanted)
        self.assertEqual([wire for wire, _ in sems.pieces_of("", FRAME + ACK + CLOCK + SHORT)], [OUT, IN, IN, OUT])
        for bad in ("zz", "abc"):
            with self.assertRaises(sems.UsageError):
                sems.from_hex(bad)

    def test_described(self):
        """What decode prints of a piece."""
        for data, wanted in (
            (
                FRAME,
                {
                    "direction": "outbound",
                    "type": "0304",
                    "serial": METER,
                    "model": "HomeKit 1000 Smart Meter",
                    "time": "2026-03-21T12:00:00",
                    "crc_ok": True,
                    "envelope": "long",
                    "error": None,
                },
            ),
            (SHORT, {"type": "0310", "envelope": "short", "crc_ok": True}),
            (broken(FRAME), {"type": "0304", "serial": METER, "crc_ok": False}),
            (frame(clear=b"\x09" * 16), {"type": "0304", "crc_ok": True, "blocks": None}),
            (b"hello", {"type": "junk", "serial": None, "crc_ok": None}),
            (ACK, {"direction": "inbound", "type": "0304", "serial": METER, "time": "2026-03-21T12:00:00", "envelope": "answer"}),
            (CLOCK, {"direction": "inbound", "type": "0116"}),
        ):
            with self.subTest(wanted["type"], data=data[:20]):
                ((wire, piece),) = sems.pieces_of("", data)
                found = json.loads(json.dumps(sems.described(wire, piece, {})))
                self.assertEqual({key: found[key] for key in wanted}, wanted)
                self.assertEqual(found["hex"], data.hex())
        found = sems.described(OUT, sems.pieces_of("", FRAME)[0][1], {})
        self.assertEqual(found["values"]["meter_power_export_watts"], 1500)
        self.assertEqual(found["values"]['meter_voltage_volts{channel="1"}'], 240.0)
        self.assertEqual(found["blocks"][0], {"first": 2048, "last": 2071, "words": [0, 0, 1, 0, 0, 2] + [0] * 8 + [3] + [0] * 9})

    def test_redacted(self):
        """Redacted pieces hold no serial number, in clear or in cipher, and are good or bad as they were."""
        inside = frame(ranges=[(5000, struct.unpack(">8H", METER.encode()))])
        for data in (FRAME, inside, broken(inside), ACK, CLOCK):
            ((wire, piece),) = sems.pieces_of("", data)
            alias = b"91000HKU00000001"
            other = sems.redacted(wire, piece, {METER.encode(): alias})
            packet = sems.decode(other.data, wire)
            self.assertNotIn(METER.encode(), other.data + packet.clear)
            self.assertEqual((packet.serial, len(other.data)), (alias.decode(), len(data)))
            self.assertEqual(plain_pieces(sems.Framer(wire).feed(other.data, 0.0))[0][0], piece.kind)
            self.assertEqual(packet.clear, sems.decode(data, wire).clear.replace(METER.encode(), alias))


class CommandLine(unittest.TestCase):
    def test_defaults(self):
        """The defaults, and that an empty variable is unset."""
        for environment in ({}, {sems.variable(name): "" for name, *_ in sems.FLAGS}):
            found = sems.serve_settings([], environment)
            self.assertEqual(
                (found.listen_address, found.web_address, found.upstream), (("", 20001), ("", 14028), ("tcp.goodwe-power.com", 20001))
            )
            self.assertEqual((found.upstream_dns, found.mode, found.allow_from), ([("1.1.1.1", 53), ("8.8.8.8", 53)], "forward", []))
            self.assertEqual((found.max_connections, found.max_devices, found.capture, found.backfill), (256, 256, "", ""))
            self.assertEqual((found.telemetry_path, found.stale_after, found.batsignal, found.log_level), ("/metrics", 300, False, "info"))

    def test_settings(self):
        """A flag, or its variable, gives a setting; the command line beats the environment."""
        for line, environment, name, wanted in (
            ("--sems.listen-address=[::1]:5", {}, "listen_address", ("::1", 5)),
            ("--sems.listen-address 192.0.2.1:5", {}, "listen_address", ("192.0.2.1", 5)),
            ("", {"SEMS_LISTEN_ADDRESS": ":7"}, "listen_address", ("", 7)),
            ("--sems.listen-address=:8", {"SEMS_LISTEN_ADDRESS": ":7"}, "listen_address", ("", 8)),
            ("--sems.upstream-dns=none", {}, "upstream_dns", []),
            (
                "--sems.upstream-dns=9.9.9.9:5353,2620:fe::fe,[::1]:54",
                {},
                "upstream_dns",
                [("9.9.9.9", 5353), ("2620:fe::fe", 53), ("::1", 54)],
            ),
            ("", {"SEMS_MODE": "spool"}, "mode", "spool"),
            ("--sems-passthrough", {}, "mode", "forward"),
            ("--no-sems-passthrough", {}, "mode", "local"),
            ("--sems-passthrough=no", {}, "mode", "local"),
            ("--no-sems-passthrough --sems.mode=local", {}, "mode", "local"),
            ("--sems-passthrough --sems.mode=spool", {}, "mode", "spool"),
            ("", {"SEMS_PASSTHROUGH": "0"}, "mode", "local"),
            ("--sems.mode=spool", {"SEMS_PASSTHROUGH": "false"}, "mode", "spool"),
            ("--no-sems-passthrough", {"SEMS_MODE": "spool"}, "mode", "local"),
            ("--sems-passthrough", {"SEMS_MODE": "local"}, "mode", "forward"),
            ("--sems-passthrough", {"SEMS_MODE": "spool"}, "mode", "spool"),
            ("--sems.max-devices=7", {}, "max_devices", 7),
            ("--metrics.stale-after=1h30m", {}, "stale_after", 5400),
            ("", {"METRICS_STALE_AFTER": "0"}, "stale_after", 0),
            ("--web.telemetry-path=/m", {}, "telemetry_path", "/m"),
            ("--batsignal", {}, "batsignal", True),
            ("--no-batsignal", {"BATSIGNAL": "1"}, "batsignal", False),
            ("", {"BATSIGNAL": "YES"}, "batsignal", True),
            ("--debug", {}, "log_level", "debug"),
            ("", {"DEBUG": "true"}, "log_level", "debug"),
            ("", {"DEBUG": "release:*"}, "log_level", "info"),
            ("--log.level=error", {"DEBUG": "1"}, "log_level", "error"),
            ("--no-debug", {"DEBUG": "1"}, "log_level", "info"),
            ("", {"LOG_LEVEL": "warning"}, "log_level", "warning"),
            ("--sems.capture=", {"SEMS_CAPTURE": "/tmp/x"}, "capture", ""),
        ):
            with self.subTest(line, **environment), quiet() as lines:
                self.assertEqual(getattr(sems.serve_settings(line.split(), environment), name), wanted)
                self.assertEqual(len(lines), int(environment.get("DEBUG") == "release:*"))
        networks = sems.serve_settings(["--sems.allow-from=192.0.2.0/24, ::1/128,10.1.2.3"], {}).allow_from
        self.assertEqual(list(map(str, networks)), ["192.0.2.0/24", "::1/128", "10.1.2.3/32"])

    def test_errors(self):
        """A bad value: exit code 2, and one line that names the flag or the variable and the value."""
        for line, environment, names in (
            ("--sems.listen-address=20001", {}, ("--sems.listen-address", "20001")),
            ("--sems.listen-address=::1:20001", {}, ("::1:20001",)),
            ("--sems.listen-address=:65536", {}, (":65536",)),
            ("--sems.upstream=:20001", {}, ("--sems.upstream", ":20001")),
            ("--sems.upstream=host:0", {}, ("host:0",)),
            ("--sems.upstream=", {}, ("--sems.upstream",)),
            ("--sems.upstream-dns=1.1.1.1,", {}, ("--sems.upstream-dns", "1.1.1.1,")),
            ("--sems.mode=Forward", {}, ("--sems.mode", "Forward")),
            ("", {"SEMS_MODE": "none"}, ("SEMS_MODE", "none")),
            ("--sems-passthrough=maybe", {}, ("--sems-passthrough", "maybe")),
            ("", {"SEMS_PASSTHROUGH": "on"}, ("SEMS_PASSTHROUGH", "on")),
            ("--no-sems-passthrough --sems.mode=spool", {}, ("--sems-passthrough", "--sems.mode", "spool")),
            ("--sems-passthrough --sems.mode=local", {}, ("--sems-passthrough", "--sems.mode", "local")),
            ("", {"SEMS_PASSTHROUGH": "no", "SEMS_MODE": "forward"}, ("SEMS_PASSTHROUGH", "SEMS_MODE", "forward")),
            ("--sems.allow-from=192.0.2.0/33", {}, ("--sems.allow-from", "192.0.2.0/33")),
            ("--sems.max-connections=0", {}, ("--sems.max-connections", "0")),
            ("--sems.max-devices=-1", {}, ("--sems.max-devices", "-1")),
            ("", {"SEMS_MAX_DEVICES": "many"}, ("SEMS_MAX_DEVICES", "many")),
            ("--metrics.stale-after=5", {}, ("--metrics.stale-after", "5")),
            ("--metrics.stale-after=m5", {}, ("--metrics.stale-after", "m5")),
            ("--web.telemetry-path=metrics", {}, ("--web.telemetry-path", "metrics")),
            ("--debug=perhaps", {}, ("--debug", "perhaps")),
            ("", {"BATSIGNAL": "perhaps"}, ("BATSIGNAL", "perhaps")),
            ("--log.level=trace", {}, ("--log.level", "trace")),
            ("--sems.mod=local", {}, ("--sems.mod",)),
            ("--nonsense\nx", {}, ("--nonsense",)),
            ("extra", {}, ("extra",)),
            ("--sems.mode", {}, ("--sems.mode",)),
        ):
            with (
                self.subTest(line, **environment),
                mock.patch.dict(os.environ, environment),
                contextlib.redirect_stderr(io.StringIO()) as said,
            ):
                with mock.patch.object(logging, "basicConfig"):
                    self.assertEqual(sems.main(["serve", *line.split(" ")] if line else ["serve"]), 2)
                self.assertEqual(said.getvalue().count("\n"), 1, said.getvalue())
                for name in names:
                    self.assertIn(name, said.getvalue())

    def test_readers(self):
        """Durations, booleans and endpoints; None is an error."""
        for reader, rows in {
            sems.duration: {"0": 0, "90s": 90, "5m": 300, "1h30m": 5400, "1d": 86400, "1h1m1s": 3661, "": None, "5": None, "1.5h": None, "-5m": None, "m": None, "5m1h": None, "\uff15m": None},
            sems.boolean: {"true": True, "1": True, "yes": True, "No": False, "0": False, "false": False, "": None, "on": None, "2": None, "truely": None},
            sems.endpoint: {"h:1": ("h", 1), ":65535": ("", 65535), "[::1]:9": ("::1", 9), "[fe80::1%eth0]:9": ("fe80::1%eth0", 9), "h": None, "h:": None, "h:x": None, "[::1]": None, "::1:9": None, "h:0": None, "h:65536": None, "[h]:1": None, "a/b:1": None, "u@h:1": None, "h:\uff11": None, "h :1": None},
            sems.count: {"1": 1, "256": 256, "0": None, "-1": None, "1.0": None, "": None, " 1": None},
        }.items():  # fmt: skip
            for text, wanted in rows.items():
                with self.subTest(reader.__name__, text=text):
                    try:
                        found = reader(text)
                    except ValueError:
                        found = None
                    self.assertEqual(found, wanted)

    def test_commands(self):
        """version is JSON; an unknown command is an error in one line."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            self.assertEqual(sems.main(["version"]), 0)
        self.assertEqual(json.loads(said.getvalue())["version"], sems.VERSION)
        with contextlib.redirect_stderr(io.StringIO()) as said:
            self.assertEqual(sems.main(["explode"]), 2)
        self.assertEqual(said.getvalue().count("\n"), 1)


# ------------------------------------------------------------------------------------------------- sockets: helpers

ACK_SIZE = 58
SMALL = 16 << 10  # socket buffers of tests that fill them


class Peer:
    """One end of a connection, in the test's hand: a device, or the portal's end."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(10)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def fill(self, block: bytes, patience: float = 0.2) -> int:
        """Send block again and again until nothing more is taken; how many bytes were."""
        sent, end = 0, time.monotonic() + 10
        self.sock.settimeout(patience)
        with contextlib.suppress(socket.timeout):
            while time.monotonic() < end:
                sent += self.sock.send(block[sent % len(block) :])
        self.sock.settimeout(10)
        return sent

    def read(self, count: int) -> bytes:
        """Exactly so many bytes."""
        data = bytearray()
        while len(data) < count:
            part = self.sock.recv(min(count - len(data), 1 << 20))
            if not part:
                raise EOFError(f"{len(data)} of {count} bytes: {bytes(data[-64:]).hex()}")
            data += part
        return bytes(data)

    def rest(self) -> bytes:
        """What comes until the end, which may be a reset."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := self.sock.recv(1 << 20):
                data += part
        return data

    def packets(self, count: int) -> list:
        """So many answers of 58 bytes, decoded."""
        return [sems.decode(self.read(ACK_SIZE), sems.INBOUND) for _ in range(count)]

    def silent(self, seconds: float = 0.05) -> bool:
        """Whether nothing comes for so long, not even the end."""
        return not select.select([self.sock], [], [], seconds)[0]

    def reset(self) -> None:
        """Close at once, with what the peer has not read lost."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


class Portal:
    """A portal on a port of its own. While it does not listen, connections are refused."""

    def __init__(self, listening: bool = True, buffer: int = 0) -> None:
        self.buffer, self.port, self.peers = buffer, 0, []
        self._bind()
        if listening:
            self.listen()

    def _bind(self) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.buffer:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.buffer)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.buffer)
        self.sock.bind(("127.0.0.1", self.port))
        self.port = self.sock.getsockname()[1]
        self.sock.settimeout(10)

    def listen(self, backlog: int = 128) -> None:
        self.sock.listen(backlog)

    def black_hole(self) -> None:
        """From now on connections are neither accepted nor refused."""
        self.listen(0)
        for _ in range(3):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", self.port))
            self.peers.append(Peer(sock))

    def accept(self) -> Peer:
        peer = Peer(self.sock.accept()[0])
        self.peers.append(peer)
        return peer

    def unasked(self, seconds: float = 0.08) -> bool:
        return not select.select([self.sock], [], [], seconds)[0]

    def die(self) -> None:
        """Lose all connections at once, and refuse new ones."""
        while self.peers:
            self.peers.pop().reset()
        self.sock.close()
        self._bind()

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.sock.close()


def metrics_of(text: str) -> dict:
    """Series to value of an exposition."""
    return {series: float(value) for series, value in (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))}


class Running:
    """An exporter of this process on free ports, its loop in a thread; flags as on the command line."""

    def __init__(self, portal, *flags: str) -> None:
        upstream = [f"--sems.upstream=127.0.0.1:{portal.port}"] if portal else []
        ports = ["--sems.listen-address=127.0.0.1:0", "--web.listen-address=127.0.0.1:0"]
        self.settings = sems.serve_settings([*upstream, *ports, *flags], {})
        self.store, self.network, self.web = sems.started(self.settings)
        self.port, self.error, self.devices = self.network.port, None, []
        self.thread = threading.Thread(target=self._run, name="exporter")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.network.run()
        except BaseException as error:  # nothing may end the loop: the test that sees it fails
            self.error = error
            raise

    def device(self, data: bytes = b"", buffer: int = 0) -> Peer:
        """A device that has connected, and sent data."""
        sock = socket.socket()
        if buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer)
        sock.settimeout(10)
        self.devices.append(Peer(sock))
        sock.connect(("127.0.0.1", self.port))
        sock.sendall(data)
        return self.devices[-1]

    def metrics(self) -> dict:
        return metrics_of("".join(sems.exposition(self.store.collect(time.monotonic(), time.time()))))

    def value(self, series: str, **labels: str) -> float:
        """Sum of a metric's samples that have these labels."""
        wanted = [f'{name}="{text}"' for name, text in labels.items()]
        return sum(
            value for name, value in self.metrics().items() if name.partition("{")[0] == series and all(one in name for one in wanted)
        )

    def queued(self) -> float:
        return self.value("sems_mitm_queue_bytes")

    def get(self, path: str, **headers: str):
        """(status, headers, body) of a request."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.web.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers, error.read()

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.network.stop()
        self.thread.join(10)
        self.web.close()
        if self.error or self.thread.is_alive():
            raise AssertionError(f"the exporter's loop: {self.error!r}")


class Lines(logging.Handler):
    """Log lines, kept."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.lines.append(entry.getMessage())


class SocketCase(unittest.TestCase):
    """Exporters, portals and processes that end with the test; log lines in self.lines; short times between attempts."""

    def setUp(self) -> None:
        handler = Lines()
        self.lines = handler.lines
        self.patch(sems.log, "propagate", False)
        sems.log.addHandler(handler)
        self.addCleanup(sems.log.removeHandler, handler)
        self.limits(BACKOFF=(0.03, 0.1), SHUTDOWN=0.05)

    def patch(self, *arguments, **more):
        patcher = mock.patch.object(*arguments, **more)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def limits(self, **constants) -> None:
        for name, value in constants.items():
            self.patch(sems, name, value)

    def small_buffers(self) -> None:
        """The exporter's sockets hold little, so that its own queues fill."""
        tuned = sems.tuned

        def small(sock):
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                sock.setsockopt(socket.SOL_SOCKET, option, SMALL)
            return tuned(sock)

        self.patch(sems, "tuned", small)

    def portal(self, *arguments, **more) -> Portal:
        portal = Portal(*arguments, **more)
        self.addCleanup(lambda: portal.close())
        return portal

    def exporter(self, portal=None, *flags: str) -> Running:
        running = Running(portal, *flags)
        self.addCleanup(running.close)
        return running

    def process(self, *arguments: str, **more) -> Process:
        process = Process(*arguments, **more)
        self.addCleanup(process.close)
        return process

    def directory(self) -> str:
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
        return path


def frames_of(count: int, **more) -> list:
    """Frames of a device, a minute apart; no two are the same."""
    return [frame(when=NOON + timedelta(minutes=i), **more) for i in range(count)]


def cheap_frames(count: int, size: int = 1024) -> list:
    """Buffered readings that nobody can read, made fast; no two are the same."""
    head = frame(sems.BUFFERED, clear=bytes(16))[:52]
    bodies = (head[:6] + struct.pack(">I", 41 + size) + head[10:] + i.to_bytes(4, "big") * (size // 4) for i in range(count))
    return [body + sems.crc16(body).to_bytes(2, "big") for body in bodies]


def ack_of(data: bytes, status: int = 0) -> bytes:
    """The portal's ACK (2: NACK) of a device's frame."""
    return portal_frame(data[10:12].hex(), bytes([status]) + bytes(15), data[14:30].decode())


def spoilt(data: bytes) -> bytes:
    """A frame with a bad CRC."""
    return data[:-1] + bytes([data[-1] ^ 0x55])


def random_cuts(data: bytes, seed: int, most: int = 300):
    """Data in pieces of random sizes."""
    chance, pos = random.Random(seed), 0
    while pos < len(data):
        size = chance.randint(1, most)
        yield data[pos : pos + size]
        pos += size


class Process:
    """The program as a process, its stderr in a file."""

    def __init__(self, *arguments: str, before: str = "") -> None:
        self.log = tempfile.TemporaryFile()
        start = [sems.__file__]
        if before:  # what it does to itself, as `sems`, before it starts
            path = os.path.dirname(os.path.abspath(sems.__file__))
            start = ["-c", f"import sys; sys.path.insert(0, {path!r}); import sems_mitm as sems; {before}; sys.exit(sems.main())"]
        self.popen = subprocess.Popen(
            [sys.executable, "-W", "error", *start, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log
        )
        self.peers: list = []

    def ports(self) -> tuple:
        """Where devices connect, and of HTTP, when the exporter has said so."""
        found = until(
            lambda: (
                re.search(r"devices connect to port (\d+), metrics at http://HOST:(\d+)", self.stderr()) or self.popen.poll() is not None
            )
        )
        if found is True:
            raise AssertionError(self.stderr())
        return int(found[1]), int(found[2])

    def device(self, data: bytes = b"") -> Peer:
        self.peers.append(Peer(socket.create_connection(("127.0.0.1", self.ports()[0]), timeout=10)))
        self.peers[-1].send(data)
        return self.peers[-1]

    def stderr(self) -> str:
        return os.pread(self.log.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def metrics(self) -> dict:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports()[1]}/metrics", timeout=10) as answer:
            return metrics_of(answer.read().decode())

    def cpu(self) -> float:
        """Seconds of CPU time so far."""
        with open(f"/proc/{self.popen.pid}/stat") as file:
            return sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")

    def stop(self, number: int) -> tuple:
        """(exit code, seconds) after a signal."""
        begin = time.monotonic()
        self.popen.send_signal(number)
        return self.popen.wait(10), time.monotonic() - begin

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()
        self.log.close()


def called(*arguments: str, stdin: bytes = b"", env: dict | None = None) -> tuple:
    """(exit code, stdout, stderr) of the command line, in this process. No exporter is started."""
    out, err = io.StringIO(), io.StringIO()
    fake = mock.Mock(buffer=io.BytesIO(stdin))
    clean = {name: value for name, value in os.environ.items() if name not in map(sems.variable, (row[0] for row in sems.FLAGS))}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {**clean, **(env or {})}, clear=True))
        stack.enter_context(mock.patch.object(sems, "started", side_effect=AssertionError("these settings were accepted")))
        stack.enter_context(mock.patch.object(logging, "basicConfig"))
        stack.enter_context(mock.patch.object(sys, "stdin", fake))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            code = sems.main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------------------------------- sockets: relaying


class RelayTest(SocketCase):
    """Bytes between device and portal while both are there."""

    def test_every_byte_in_order(self) -> None:
        """Whatever a device sends arrives unchanged, decoded or not, however it is cut."""
        chance = random.Random(7)
        good = frames_of(3)
        nested = b"".join(b"POSTGW" + struct.pack(">I", 400 - 20 * i) + bytes(10) for i in range(12))
        streams = {
            "frames": b"".join(good),
            "junk before, between, behind": b"\0junk" + good[0] + b"POSTG" + good[1] + b"GW\r\n" + good[2] + b"POST",
            "bad CRC": spoilt(good[0]) + good[1] + spoilt(good[2]) + good[0],
            "unknown function and class": frame(function=0x77, clear=bytes(16)) + frame(cls=9) + good[0],
            "length field too long, then a frame": b"POSTGW\xff\xff\xff\xff" + good[0],
            "nested claims": nested + good[0],
            "an unfinished frame": good[0] + good[1][:70],
            "noise": bytes(chance.randrange(256) for _ in range(20000)) + good[0],
            "prefixes": b"".join(chance.choice((b"POSTGW", b"POST", b"GW", b"\0\0\0\x60", good[0], b"\x01\x02")) for _ in range(600)),
        }
        self.limits(LOOP_WINDOW=-1)  # the streams begin alike
        portal = self.portal()
        running = self.exporter(portal)
        for name, stream in streams.items():
            for seed in (None, 1, 2):
                with self.subTest(name, cut=seed):
                    device = running.device()
                    for part in [stream] if seed is None else random_cuts(stream, seed):
                        device.send(part)
                    leg = portal.accept()
                    self.assertEqual(leg.read(len(stream)), stream)
                    device.close()
                    self.assertEqual(leg.rest(), b"")
                    leg.close()

    def test_opened_by_the_first_byte(self) -> None:
        """The portal's connection is opened when the device's first byte has come, and that byte goes on alone."""
        portal = self.portal()
        running = self.exporter(portal)
        device = running.device()
        self.assertTrue(portal.unasked())
        self.assertNotIn("sems_mitm_upstream_up", running.metrics())
        device.send(b"P")
        leg = portal.accept()
        self.assertEqual(leg.read(1), b"P")
        until(lambda: running.value("sems_mitm_upstream_connections") == 1)
        self.assertEqual(running.value("sems_mitm_upstream_up"), 1)

    def test_many_devices(self) -> None:
        """Each device has a portal connection of its own, with its own bytes in order."""
        portal = self.portal()
        running = self.exporter(portal)
        streams = {f"91000HKU{i:08d}": b"".join(frames_of(12, serial=f"91000HKU{i:08d}")) for i in range(40)}
        devices = {serial: running.device() for serial in streams}
        parts = {serial: list(random_cuts(stream, i, 700)) for i, (serial, stream) in enumerate(streams.items())}
        while any(parts.values()):
            for serial, waiting in parts.items():
                if waiting:
                    devices[serial].send(waiting.pop(0))
        while streams:
            leg = portal.accept()
            start = leg.read(30)
            stream = streams.pop(start[14:].decode())
            self.assertEqual(start + leg.read(len(stream) - 30), stream)
        until(lambda: running.value("meter_metrics_packets_total") == 40 * 12)
        self.assertEqual(running.value("sems_mitm_device_up"), 40)

    def test_inbound_filter(self) -> None:
        """Only keep-alives, answers and clock writes pass; all else is dropped and counted, and the next good frame found."""
        clock = lambda first=0x1216, last=0x1218, stamp=sems.time_stamp(NOON), end=bytes(6): struct.pack(">HH6s6s", first, last, stamp, end)
        rows = (  # name, bytes, passes
            ("keep-alive behind a frame", b"\x01\x02", True),
            ("two of them", b"\x01\x02\x01\x02", True),
            ("ACK of live data", portal_frame("0304", bytes(16)), True),
            ("ACK of buffered data", portal_frame("0345", bytes(16)), True),
            ("ACK of settings", portal_frame("0303", bytes(16)), True),
            ("ACK for another serial number", portal_frame("0304", bytes(16), INVERTER), True),
            ("NACK", portal_frame("0304", b"\x02" + bytes(15)), True),
            ("clock", portal_frame("0116", clock()), True),
            ("ACK of a class that the device has not sent", portal_frame("0104", bytes(16)), False),
            ("ACK of a confirmation", portal_frame("0310", bytes(16)), False),
            ("ACK of another function", portal_frame("0305", bytes(16)), False),
            ("status 01", portal_frame("0304", b"\x01" + bytes(15)), False),
            ("a byte behind the status", portal_frame("0304", bytes(15) + b"\x01"), False),
            ("32 bytes", portal_frame("0304", bytes(32)), False),
            ("clock type 0316", portal_frame("0316", clock()), False),
            ("clock with a register more", portal_frame("0116", clock(last=0x1219)), False),
            ("clock with another first register", portal_frame("0116", clock(first=0x1215)), False),
            ("an inverter's clock", portal_frame("0116", clock(0x9D79, 0x9D7B)), False),
            ("no calendar date", portal_frame("0116", clock(stamp=bytes([26, 2, 30, 1, 1, 1]))), False),
            ("more behind the clock", portal_frame("0116", clock(end=bytes(5) + b"\x01")), False),
            ("a write elsewhere", portal_frame("0116", clock(40313, 40330)), False),
            ("bad CRC", spoilt(portal_frame("0304", bytes(16))), False),
            ("junk", b"HTTP/1.1 200 OK\r\n\r\n", False),
            ("keep-alive behind junk", b"\0\x01\x02", False),
            ("a prefix", b"GW", False),
            ("a claim that is too long", b"GW\x00\x00\x10\x01" + bytes(20), False),
        )
        capture = os.path.join(self.directory(), "capture")
        portal = self.portal()
        running = self.exporter(portal, f"--sems.capture={capture}")
        data = frame()
        device = running.device(data)
        leg = portal.accept()
        leg.read(len(data))
        end = ack_of(data)
        for name, row, passes in rows:
            with self.subTest(name):
                leg.send(row + end)
                self.assertEqual(device.read(len(row) * passes + len(end)), row * passes + end)
        dropped = running.value("sems_mitm_packets_total", direction="inbound", verdict="dropped")
        self.assertEqual(dropped, sum(not passes for _, _, passes in rows))
        strangers = sum(not passes and sems.crc16(row[:-2]) == int.from_bytes(row[-2:], "little") for _, row, passes in rows)
        self.assertEqual(running.value("inbound_unknown_packets_total"), strangers)
        self.assertEqual(json.loads(running.get("/api/devices")[2])["blocked"], strangers)
        kept = [json.loads(line) for line in open_lines(capture)]
        self.assertEqual(
            [bytes.fromhex(entry["hex"]) for entry in kept if entry["verdict"] == "dropped"], [row for _, row, passes in rows if not passes]
        )
        self.assertEqual(running.value("sems_mitm_nacks_total"), 1)

    def test_inbound_claim_is_given_up(self) -> None:
        """An inbound frame that stays unfinished is given up, and what stood behind it goes through."""
        self.patch(sems.INBOUND, "patience", 0.2)
        portal = self.portal()
        running = self.exporter(portal)
        data = frame()
        device = running.device(data)
        leg = portal.accept()
        leg.read(len(data))
        leg.send(b"GW\0\0\x08\0" + ack_of(data))
        self.assertEqual(device.read(ACK_SIZE), ack_of(data))

    def test_portal_drops_the_connection(self) -> None:
        """A portal's connection that is lost is opened again, and the device's stays; a cut frame is sent from its first byte."""
        portal = self.portal()
        running = self.exporter(portal)
        first, second, third = frames_of(3)
        device = running.device(first + second[:50])
        for drop in ("close", "reset"):
            with self.subTest(drop):
                leg = portal.accept()
                self.assertEqual(leg.read(50), (first if drop == "close" else second)[:50])
                until(lambda: not running.queued())
                if drop == "close":
                    self.assertEqual(leg.read(len(first)), first[50:] + second[:50])
                getattr(leg, drop)()
        device.send(second[50:] + third)
        leg = portal.accept()
        self.assertEqual(leg.read(len(second + third)), second + third)
        leg.send(ack_of(third))
        leg.close()
        self.assertEqual(device.read(ACK_SIZE), ack_of(third))

    def test_bat_signal(self) -> None:
        """The portal gets the bat; metrics and capture keep what the device said; nothing else is touched or waits for ever."""
        capture = os.path.join(self.directory(), "capture")
        self.limits(HOLD=0.2)
        portal = self.portal()
        running = self.exporter(portal, "--batsignal", f"--sems.capture={capture}")
        when = NOON + timedelta(hours=2)
        live, other = frame(when=when), frame(cls=sems.GRID_TIED, serial=INVERTER, ranges=INVERTER_RANGES)
        device = running.device(live[:40])
        leg = portal.accept()
        self.assertTrue(leg.silent(0.05))
        device.send(live[40:] + other + spoilt(live))
        drawn = leg.read(len(live))
        top, bottom = sems.bat(when)
        words = sems.registers(sems.decode(drawn, sems.OUTBOUND).clear)
        signed = lambda register: struct.unpack(">i", struct.pack(">HH", words[register], words[register + 1]))[0]
        self.assertEqual((signed(2107), signed(2105)), (int(1000 * top), int(1000 * bottom)))
        self.assertEqual(drawn[:52], live[:52])
        self.assertEqual(leg.read(len(other + live)), other + spoilt(live))
        device.send(live[:-4])
        self.assertEqual(leg.read(len(live) - 4), live[:-4])
        self.assertEqual(running.value("meter_power_generation_watts"), 2600)
        self.assertEqual(json.loads(open_lines(capture)[0])["hex"], live.hex())
        self.assertEqual(running.value("sems_mitm_packets_total", type="0304", verdict="rewritten"), 1)


def open_lines(path: str) -> list:
    with open(path, encoding="ascii") as file:
        return file.read().splitlines()


class BackPressureTest(SocketCase):
    """A peer that does not take its bytes: the other side is not read, and nothing is lost."""

    def setUp(self) -> None:
        super().setUp()
        self.small_buffers()

    def test_slow_portal(self) -> None:
        """While 256 KiB wait for a connected portal the device is not read; later all arrives in order."""
        portal = self.portal(buffer=SMALL)
        running = self.exporter(portal)
        block = b"".join(frames_of(400))
        device = running.device(block[:10], buffer=SMALL)
        leg = portal.accept()
        sent = 10 + device.fill(block[10:] + block[:10])
        self.assertLessEqual(running.queued(), sems.BACKLOG + sems.RECV_SIZE)
        self.assertGreaterEqual(running.queued(), sems.BACKLOG - sems.RECV_SIZE)
        self.assertLess(sent, sems.BACKLOG + sems.RECV_SIZE + 20 * SMALL)
        self.assertEqual(running.value("sems_mitm_queue_dropped_packets_total"), 0)
        device.sock.shutdown(socket.SHUT_WR)
        expected = (block * (sent // len(block) + 1))[:sent]
        self.assertEqual(leg.read(sent), expected)
        until(lambda: running.queued() == 0)

    def test_slow_device(self) -> None:
        """While 256 KiB wait for a device its portal is not read; later all arrives in order."""
        portal = self.portal(buffer=SMALL)
        running = self.exporter(portal)
        data = frame()
        device = running.device(data, buffer=SMALL)
        leg = portal.accept()
        leg.read(len(data))
        block = b"".join(portal_frame("0304", bytes(16), when=NOON + timedelta(seconds=i)) for i in range(30))
        sent = leg.fill(block)
        session = next(iter(running.network.exporter.sessions))
        self.assertLessEqual(session.to_device.size, sems.BACKLOG + sems.RECV_SIZE)
        self.assertLess(sent, sems.BACKLOG + sems.RECV_SIZE + 20 * SMALL)
        whole = sent // ACK_SIZE * ACK_SIZE
        self.assertEqual(device.read(whole), (block * (sent // len(block) + 1))[:whole])

    def test_slow_portal_of_a_spool(self) -> None:
        """Spool: the same, while the device takes its answers."""
        portal = self.portal(buffer=SMALL)
        running = self.exporter(portal, "--sems.mode=spool")
        frames = cheap_frames(700)
        device = running.device(buffer=SMALL)
        reader = threading.Thread(target=device.packets, args=(len(frames),), daemon=True)
        reader.start()
        sender = threading.Thread(target=device.send, args=(b"".join(frames),), daemon=True)
        sender.start()
        leg = portal.accept()
        until(lambda: running.queued() >= sems.BACKLOG - sems.RECV_SIZE)
        sender.join(0.2)
        self.assertTrue(sender.is_alive())
        self.assertLessEqual(running.queued(), sems.BACKLOG + sems.RECV_SIZE)
        self.assertEqual(leg.read(len(frames) * len(frames[0])), b"".join(frames))
        reader.join(10)
        self.assertEqual(running.value("sems_mitm_queue_dropped_packets_total"), 0)

    def test_nothing_spins(self) -> None:
        """Whatever waits, the loop sleeps."""
        self.limits(LINGER=20, BACKOFF=(0.5, 1))
        data = frame()

        def answers(leg):
            leg.read(len(data))
            leg.fill(ack_of(data) * 100, 0.05)

        half_closed = lambda device: device.sock.shutdown(socket.SHUT_WR)
        rows = (  # name, mode, what the portal does, what the device does when it has sent its frame
            ("idle", "forward", "reads", lambda device: None),
            ("slow portal", "forward", "waits", lambda device: device.fill(data * 100, 0.05)),
            ("slow portal of a spool", "spool", "waits", lambda device: device.fill(data * 100, 0.05)),
            ("slow device", "forward", "answers", lambda device: None),
            ("slow device, half closed", "forward", "answers", half_closed),
            ("half closed", "forward", "reads", half_closed),
            ("gone", "forward", "reads", Peer.close),
            ("no portal", "forward", "refuses", lambda device: None),
            ("no portal, gone", "spool", "refuses", Peer.close),
            ("no answer, gone", "spool", "reads", Peer.close),
            ("black hole, half closed", "forward", "is a black hole", half_closed),
            ("black hole, gone", "forward", "is a black hole", Peer.reset),
            ("slow device", "local", "refuses", lambda device: device.fill(data * 100, 0.05)),
        )
        started = []
        for name, mode, habit, then in rows:
            portal = self.portal(listening=habit not in ("refuses", "is a black hole"), buffer=SMALL)
            if habit == "is a black hole":
                portal.black_hole()
            running = self.exporter(portal, f"--sems.mode={mode}")
            device = running.device(data, buffer=SMALL)
            until(lambda: running.value("meter_metrics_packets_total"))
            leg = portal.accept() if habit not in ("refuses", "is a black hole") else None
            if leg and habit != "waits":
                leg.read(len(data)) if habit == "reads" else answers(leg)
            then(device)
            turn = mock.Mock(wraps=running.network._turn)
            self.patch(running.network, "_turn", turn)
            started.append((f"{name} ({mode})", turn))
        time.sleep(0.1)
        before = [turn.call_count for _, turn in started]
        time.sleep(0.2)
        for count, (name, turn) in zip(before, started):
            with self.subTest(name):
                self.assertLess(turn.call_count - count, 10)

    def test_stop_while_attempts_fall_due(self) -> None:
        """Stopping takes its time and no more while one portal takes nothing and another is to be tried again."""
        self.limits(SHUTDOWN=0.3)
        self.small_buffers()
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                portal = self.portal(buffer=SMALL)
                running = self.exporter(portal, f"--sems.mode={mode}")
                running.device(b"".join(cheap_frames(300)))
                portal.accept()
                until(lambda: running.network.exporter.pool.outward > 50_000)
                portal.sock.close()  # whoever comes now is refused
                other = running.device(frame(serial="91000HKU00000043"))
                until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="refused"))
                running.network.stop()
                until(lambda: not running.thread.is_alive(), 5)
                other.close()

    def test_stop_sends_what_is_queued(self) -> None:
        """What is queued for a portal that takes its time goes out before the end."""
        self.limits(SHUTDOWN=5)
        portal = self.portal(buffer=SMALL)
        running = self.exporter(portal)
        stream = b"".join(cheap_frames(150))
        device = running.device(stream[:10])
        leg = portal.accept()
        device.send(stream[10:])
        until(lambda: running.value("sems_mitm_bytes_total", direction="outbound") == len(stream))
        running.network.stop()
        time.sleep(0.05)
        self.assertEqual(leg.rest(), stream)
        running.thread.join(5)
        self.assertFalse(running.thread.is_alive())

    def test_no_progress(self) -> None:
        """A portal that takes nothing for long counts as lost; the device's connection stays, and whole frames go to the next."""
        self.limits(STALL=0.3)
        portal = self.portal(buffer=SMALL)
        running = self.exporter(portal)
        frames = frames_of(1500)
        device = running.device(frames[0], buffer=SMALL)
        portal.accept()
        threading.Thread(target=device.send, args=(b"".join(frames[1:]),), daemon=True).start()
        leg = portal.accept()
        size, last = len(frames[0]), b"".join(frames[-40:])
        start = frames.index(leg.read(size))
        self.assertEqual(leg.read((len(frames) - start - 1) * size)[-len(last) :], last)
        leg.send(ack_of(frames[-1]))
        self.assertEqual(device.read(ACK_SIZE), ack_of(frames[-1]))

    def test_device_that_reads_no_answers(self) -> None:
        """A device that sends and never reads its answers is not read either, and is lost in the end."""
        self.limits(STALL=0.3)
        running = self.exporter(None, "--sems.mode=local")
        device = running.device(buffer=SMALL)
        block = b"".join(frames_of(100, clear=b"\0" + b"\xff" * 15))
        with contextlib.suppress(ConnectionError):
            device.fill(block)
        self.assertLessEqual(running.network.exporter.pool.size, 2 * (sems.BACKLOG + sems.RECV_SIZE))
        until(lambda: running.value("sems_mitm_device_connections") == 0)
        self.assertEqual(running.network.exporter.pool.size, 0)


class PortalAwayTest(SocketCase):
    """A portal that cannot be reached."""

    def test_away_and_back(self) -> None:
        """Forward: frames wait whole and in order, nothing is answered, and the device is decoded meanwhile."""
        portal = self.portal(listening=False)
        running = self.exporter(portal)
        frames = frames_of(20)
        stream = b"".join(frames)
        device = running.device(stream[:-30])
        until(lambda: running.queued() >= 19 * len(frames[0]))
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="refused") >= 2)
        self.assertEqual(running.value("meter_power_generation_watts"), 2600)
        self.assertEqual(running.value("sems_mitm_upstream_up"), 0)
        self.assertTrue(device.silent())
        portal.listen()
        leg = portal.accept()
        self.assertEqual(leg.read(len(stream) - 30), stream[:-30])
        device.send(stream[-30:])
        self.assertEqual(leg.read(30), stream[-30:])
        self.assertEqual(running.value("sems_mitm_acks_total"), 0)
        until(lambda: running.value("sems_mitm_packets_total", type="0304", verdict="forwarded") == 20)
        until(lambda: running.queued() == 0)

    def test_queue_is_bounded(self) -> None:
        """1 MiB a device waits, in both modes that have a queue; the oldest whole frames are dropped first, and counted."""
        frames = cheap_frames(1200)
        size = len(frames[0])
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                portal = self.portal(listening=False)
                running = self.exporter(portal, f"--sems.mode={mode}")
                device = running.device(b"".join(frames))
                device.packets(len(frames) if mode == "spool" else 0)
                until(lambda: running.value("meter_metrics_packets_total") == len(frames))
                kept = int(running.queued() // size)
                self.assertLessEqual(running.queued(), 1 << 20)
                self.assertGreater(running.queued(), (1 << 20) - 10 * size)
                self.assertEqual(running.value("sems_mitm_queue_dropped_packets_total"), len(frames) - kept)
                portal.listen()
                leg = portal.accept()
                self.assertEqual(leg.read(kept * size), b"".join(frames[-kept:]))

    def test_unanswered_is_bounded(self) -> None:
        """Spool: what a portal takes and never answers is bounded too; late answers to what was dropped end nothing else."""
        portal = self.portal()
        running = self.exporter(portal, "--sems.mode=spool")
        frames = cheap_frames(1200)
        size = len(frames[0])
        device = running.device(b"".join(frames[:10]))
        leg = portal.accept()
        leg.read(10 * size)
        threading.Thread(target=device.send, args=(b"".join(frames[10:]),), daemon=True).start()
        self.assertEqual(leg.read(1190 * size), b"".join(frames[10:]))
        device.packets(1200)
        until(lambda: running.value("sems_mitm_packets_total", verdict="answered") == 1200)
        dropped = int(running.value("sems_mitm_queue_dropped_packets_total"))
        self.assertEqual(running.queued(), (1200 - dropped) * size)
        self.assertLessEqual(running.queued(), 1 << 20)
        leg.send(ack_of(frames[0]) * dropped)
        until(lambda: running.value("sems_mitm_packets_total", direction="inbound") == dropped)
        self.assertEqual(running.queued(), (1200 - dropped) * size)
        leg.send(ack_of(frames[0]) * (1200 - dropped - 1))
        until(lambda: running.queued() == size)
        leg.reset()
        self.assertEqual(portal.accept().read(size), frames[-1])

    def test_all_queues_are_bounded(self) -> None:
        """All that waits together stays under a limit; above it the longest queue loses its oldest frames."""
        portal = self.portal(listening=False)
        running = self.exporter(portal)
        running.network.exporter.pool.limit = 200_000
        frames = frames_of(600)
        device, other = running.device(b"".join(frames)), running.device(b"".join(frames_of(600, serial=METER[:-1] + "3")))
        small = running.device(frame(serial=METER[:-1] + "4"))
        until(lambda: running.value("meter_metrics_packets_total") == 1201)
        until(lambda: running.queued() <= 200_000)
        portal.listen()
        received = [portal.accept() for _ in (device, other, small)]
        for peer in (device, other, small):
            peer.sock.shutdown(socket.SHUT_WR)
        streams = sorted((leg.rest() for leg in received), key=len)
        self.assertEqual(streams[0], frame(serial=METER[:-1] + "4"))
        for stream in streams[1:]:
            self.assertEqual(len(stream) % len(frames[0]), 0)
            self.assertEqual(stream[:6], b"POSTGW")
        dropped = running.value("sems_mitm_queue_dropped_packets_total")
        self.assertEqual(dropped, 1201 - sum(map(len, streams)) / len(frames[0]))

    def test_device_goes_meanwhile(self) -> None:
        """Forward: the queue ends with the device's connection, for its frames are its own to send again."""
        portal = self.portal(listening=False)
        running = self.exporter(portal)
        device = running.device(frame())
        until(running.queued)
        device.close()
        until(lambda: running.value("sems_mitm_device_connections") == 0)
        self.assertEqual(running.queued(), 0)

    def test_black_hole(self) -> None:
        """A portal that answers no connection is a timeout, tried again; one alone does not hold up a device's frames."""
        self.limits(CONNECT_TIMEOUT=0.1)
        portal = self.portal(listening=False)
        portal.black_hole()
        running = self.exporter(portal)
        running.device(frame())
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="timeout") >= 2)
        self.assertEqual(running.value("meter_metrics_packets_total"), 1)

    def test_backoff(self) -> None:
        """Attempts back off, and a portal that accepts and hangs up at once does not start them again."""
        self.limits(BACKOFF=(0.06, 60))
        portal = self.portal()
        running = self.exporter(portal)
        running.device(frame())
        begin = time.monotonic()
        for _ in range(3):
            portal.accept().close()
        self.assertGreater(time.monotonic() - begin, 0.7 * (0.06 + 0.12))
        self.assertEqual(running.value("sems_mitm_device_connections"), 1)
        link = next(iter(running.network.links))
        portal.accept().send(b"\x01\x02")  # it has sent something
        until(lambda: link.backoff == 0.06)

    def test_addresses_that_cannot_be(self) -> None:
        """No address ends the process: what cannot be connected to is counted, and tried again."""
        for upstream in ("[fe80::1%nosuch]:20001", "[fe80::1]:20001", "[::1]:1", "0.0.0.0:1", "a..b:1", "x" * 70 + ".test:1"):
            with self.subTest(upstream):
                running = self.exporter(None, f"--sems.upstream={upstream}", "--sems.upstream-dns=none")
                device = running.device(frame())
                until(lambda: running.value("sems_mitm_upstream_connect_failures_total") >= 2, 3)
                self.assertEqual(running.value("meter_metrics_packets_total"), 1)
                self.assertTrue(device.silent(0.01))


class KilledPortalTest(SocketCase):
    """The portal dies at the worst time. What the device was ACKed is at the portal or still queued."""

    def setUp(self) -> None:
        super().setUp()
        self.small_buffers()
        self.limits(CONNECT_TIMEOUT=0.1)

    def killed(self, mode: str, phase: str) -> None:
        portal = self.portal(listening=False, buffer=SMALL if phase == "half a frame sent" else 0)
        running = self.exporter(portal, f"--sems.mode={mode}")
        clear = bytes([1]) + struct.pack(">HH", 1, 9000) + bytes(18000)
        frames = frames_of(6, clear=clear + b"\xff" * (-len(clear) % 16)) if phase == "half a frame sent" else frames_of(6)
        size, stream = len(frames[0]), b"".join(frames)
        answered = {"waiting for an ACK": 2}.get(phase, 0)  # by the portal
        if phase == "connecting":
            portal.black_hole()
        elif phase != "queued":
            portal.listen()
        device = running.device(stream)
        seen = b""
        if phase in ("half a frame sent", "waiting for an ACK"):
            leg = portal.accept()
            seen = leg.read(len(stream) if answered else size + size // 2)
            leg.send(b"".join(map(ack_of, frames[:answered])))
        acked = answered if mode == "forward" else len(frames)
        self.assertEqual([packet.clear for packet in device.packets(acked)], [bytes(16)] * acked)
        until(lambda: answered == 0 or running.value("sems_mitm_queue_bytes") == (len(frames) - answered) * size * (mode == "spool"))
        if phase in ("connecting", "queued"):
            until(lambda: running.queued() == len(stream))
        portal.die()
        delivered = sum(one in seen for one in frames)
        until(lambda: running.value("sems_mitm_upstream_connections") == 0)
        self.assertGreaterEqual(running.queued() + delivered * size, acked * size)
        portal.listen()
        if mode == "spool":
            again = portal.accept().read((len(frames) - answered) * size)
            self.assertEqual(again, b"".join(frames[answered:]))
            self.assertTrue(device.silent(0.02))
        elif phase == "waiting for an ACK":
            until(lambda: running.queued() == 0)
        else:
            leg = portal.accept()
            device.sock.shutdown(socket.SHUT_WR)
            again = leg.rest()
            self.assertTrue(again and stream.endswith(again) and len(again) % size == 0, (len(again), size))
            self.assertTrue(phase == "half a frame sent" or again == stream)

    def test_every_phase(self) -> None:
        """In each phase and mode."""
        for mode in ("forward", "spool"):
            for phase in ("connecting", "queued", "half a frame sent", "waiting for an ACK"):
                with self.subTest(mode=mode, phase=phase):
                    self.killed(mode, phase)

    def test_killed_again_and_again(self) -> None:
        """Spool: a portal that dies at random gets every frame at least once, first in order, and the device one ACK a frame."""
        chance, portal = random.Random(3), self.portal()
        running = self.exporter(portal, "--sems.mode=spool")
        frames = frames_of(60)
        size, first, sent = len(frames[0]), [], 0
        device = running.device()
        while len(first) < len(frames) or running.queued():
            count = chance.randint(1, 12)
            device.send(b"".join(frames[sent : sent + count]))
            sent = min(sent + count, len(frames))
            leg = portal.accept()
            leg.sock.settimeout(0.02)
            stop = chance.randint(0, 20) if sent < len(frames) else len(frames)
            with contextlib.suppress(socket.timeout):
                for _ in range(stop):
                    one = leg.read(size)
                    if one not in first:
                        first.append(one)
                    if chance.random() < 0.8 or sent == len(frames):
                        leg.send(ack_of(one))
                leg.read(chance.randint(0, size))
            if sent == len(frames) and not running.queued():
                break
            portal.die()
            portal.listen()
        self.assertEqual(first, frames)
        self.assertEqual(len(device.packets(len(frames))), len(frames))
        self.assertTrue(device.silent())


class SpoolTest(SocketCase):
    """Mode spool: we answer, and the portal gets everything, however late."""

    def started(self):
        portal = self.portal()
        return portal, self.exporter(portal, "--sems.mode=spool")

    def test_one_answer_a_frame(self) -> None:
        """Exactly one ACK a frame; none of the portal's answers reaches the device; its keep-alive may."""
        portal, running = self.started()
        frames = [frame(sems.SETTINGS, ranges=[])] + frames_of(4) + [frame(sems.BUFFERED), frame(sems.CONFIRMATION)]
        stream = b"".join(frames)
        device = running.device(stream)
        kinds = [packet.type for packet in device.packets(7)]
        self.assertEqual(kinds, ["0303", "0116", *["0304"] * 4, "0345"])
        leg = portal.accept()
        self.assertEqual(leg.read(len(stream)), stream)
        until(lambda: running.queued() == len(stream) - len(frames[-1]))
        leg.send(b"".join(map(ack_of, frames[:-1])) + portal_frame("0116", struct.pack(">HH6s6x", 0x1216, 0x1218, sems.time_stamp(NOON))))
        until(lambda: running.queued() == 0)
        self.assertTrue(device.silent())
        self.assertEqual(running.value("sems_mitm_acks_total"), 6)
        self.assertEqual(running.value("sems_mitm_packets_total", direction="outbound", verdict="answered"), 6)

    def test_answers_match_by_order(self) -> None:
        """An answer ends the oldest unanswered frame of its type and serial number; the others go again."""
        portal, running = self.started()
        frames = [
            frame(serial=serial, function=function, when=NOON + timedelta(minutes=i))
            for i, (serial, function) in enumerate([(METER, 4), (METER, 0x45), ("91000HKU00000043", 4), (METER, 4)])
        ]
        stream = b"".join(frames)
        device = running.device(stream)
        device.packets(4)
        leg = portal.accept()
        leg.read(len(stream))
        leg.send(ack_of(frames[2]) + ack_of(frames[0]) + portal_frame("0303", bytes(16)))
        until(lambda: running.queued() == len(frames[0]) * 2)
        leg.reset()
        self.assertEqual(portal.accept().read(len(frames[0]) * 2), frames[1] + frames[3])

    def test_nack_ends_the_matter(self) -> None:
        """A NACK is counted and logged, and its frame is not sent again."""
        portal, running = self.started()
        data = frame()
        device = running.device(data)
        device.packets(1)
        leg = portal.accept()
        leg.read(len(data))
        leg.send(ack_of(data, 2))
        until(lambda: running.queued() == 0)
        self.assertEqual((running.value("sems_mitm_nacks_total"), running.value("sems_mitm_acks_total")), (1, 1))
        self.assertTrue(any("NACK" in line for line in self.lines), self.lines)
        self.assertTrue(device.silent())

    def test_device_goes(self) -> None:
        """Its portal leg stays, and counts as a connection, until all is answered."""
        portal, running = self.started()
        frames = frames_of(3)
        device = running.device(b"".join(frames))
        device.packets(3)
        device.close()
        leg = portal.accept()
        self.assertEqual(leg.read(3 * len(frames[0])), b"".join(frames))
        leg.send(ack_of(frames[0]))
        until(lambda: running.queued() == 2 * len(frames[0]))
        self.assertTrue(leg.silent())
        self.assertEqual(running.value("sems_mitm_device_connections"), 1)
        leg.send(ack_of(frames[1]) + ack_of(frames[2]))
        self.assertEqual(leg.rest(), b"")
        until(lambda: running.value("sems_mitm_device_connections") == 0)

    def test_no_answer(self) -> None:
        """With the device gone, a portal that answers nothing for long is tried again on a new connection."""
        self.limits(ANSWER_TIMEOUT=0.3)
        portal, running = self.started()
        data = frame()
        device = running.device(data)
        device.packets(1)
        device.close()
        for _ in range(2):
            leg = portal.accept()
            self.assertEqual(leg.read(len(data)), data)
        self.assertEqual(running.queued(), len(data))

    def test_keepalives_are_no_answer(self) -> None:
        """Nor does a portal that sends but keep-alives answer anything."""
        self.limits(ANSWER_TIMEOUT=0.3)
        portal, running = self.started()
        device = running.device(frame())
        device.packets(1)
        device.close()
        leg = portal.accept()

        def tried_again() -> bool:
            with contextlib.suppress(OSError):
                leg.send(b"\1\2")
            return not portal.unasked(0.02)

        until(tried_again)

    def test_junk_alone_goes_with_its_device(self) -> None:
        """What is no frame holds no place while the portal is away and its device has gone."""
        running = self.exporter(self.portal(listening=False), "--sems.mode=spool")
        device = running.device(b"GET / HTTP/1.0\r\n\r\n")
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="refused"))
        device.close()
        until(lambda: running.value("sems_mitm_device_connections") == 0)

    def test_memory_of_small_pieces(self) -> None:
        """Frames, junk and keep-alives that come one by one take little more memory than their bytes."""
        pool = sems.Pool()
        for whole, key in ((True, ("0304", METER)), (True, None), (False, None)):
            outbox = sems.Outbox(pool, True)
            for _ in range(5000):
                outbox.put(b"12", 2, key, whole)
            outbox.took(5000)
            self.assertLess(pool.size, 1.5 * outbox.size)
            outbox.close()
        self.assertEqual(pool.size, 0)

    def test_device_is_back(self) -> None:
        """A device that comes back finds the order kept: what it left goes first, once the portal is there."""
        for away in (True, False):
            with self.subTest(portal_away=away):
                portal = self.portal(listening=not away)
                running = self.exporter(portal, "--sems.mode=spool")
                frames = frames_of(6)
                for start in (0, 3):
                    device = running.device(b"".join(frames[start : start + 3]))
                    device.packets(3)
                    device.close()
                    until(lambda: {session.device_gone for session in running.network.exporter.sessions} == {True})
                    self.assertEqual(running.value("sems_mitm_device_connections"), 1)
                self.assertEqual(running.queued(), 6 * len(frames[0]))
                if away:
                    portal.listen()
                else:
                    portal.accept()
                self.assertEqual(portal.accept().read(6 * len(frames[0])), b"".join(frames))

    def test_without_an_answer(self) -> None:
        """A frame that gets no answer is kept until it is sent, in its place, and not beyond."""
        portal = self.portal(listening=False)
        running = self.exporter(portal, "--sems.mode=spool")
        stream = frame() + frame(sems.CONFIRMATION) + spoilt(frame()) + b"junk"
        device = running.device(stream)
        device.packets(1)
        until(lambda: running.queued() >= len(stream) - 4)
        portal.listen()
        leg = portal.accept()
        self.assertEqual(leg.read(len(stream)), stream)
        leg.send(ack_of(frame()))
        until(lambda: running.queued() == 0)
        self.assertTrue(device.silent())


class LocalTest(SocketCase):
    """Mode local: no portal, the exporter answers."""

    def test_answers(self) -> None:
        """ACK and clock byte for byte, with this machine's local time; only for good frames; a hybrid's clock is not set."""
        clock = lambda first: struct.pack(">HH", first, first + 2)
        rows = (  # name, frame, type of the ACK, registers of the clock write
            ("meter's settings", frame(sems.SETTINGS), "0303", clock(0x1216)),
            ("inverter's settings", frame(sems.SETTINGS, 1, INVERTER, ranges=[]), "0103", clock(0x9D79)),
            ("hybrid's settings", frame(sems.SETTINGS, 2, HYBRID, ranges=[]), "0203", b""),
            ("live data", frame(), "0304", b""),
            ("buffered data", frame(sems.BUFFERED), "0345", b""),
            ("another class", frame(cls=7), "0704", b""),
            ("another class's settings", frame(sems.SETTINGS, cls=7), "0703", b""),
            ("unreadable payload", frame(clear=b"\x05" + bytes(15)), "0304", b""),
            ("confirmation", frame(sems.CONFIRMATION), "", b""),
            ("another function", frame(0x05), "", b""),
            ("bad CRC", spoilt(frame()), "", b""),
            ("junk", b"\0\1\2", "", b""),
            ("no serial number", frame(serial="91000HKU\n0000042"), "", b""),
        )
        running = self.exporter(None, "--sems.mode=local")
        device = running.device()
        end = frame(sems.BUFFERED, serial="91000HKU00000099")
        for name, data, kind, registers in rows:
            with self.subTest(name):
                device.send(data)
                if kind:
                    got = device.read(ACK_SIZE * (2 if registers else 1))
                    stamp = datetime(*(got[24 + i] + (2000 if i == 5 else 0) for i in range(5, -1, -1)))
                    self.assertLess(abs((stamp - datetime.now()).total_seconds()), 5)
                    serial = data[14:30].decode()
                    expected = portal_frame(kind, bytes(16), serial, stamp)
                    expected += portal_frame("0116", registers + sems.time_stamp(stamp) + bytes(6), serial, stamp) if registers else b""
                    self.assertEqual(got, expected)
                device.send(end)
                self.assertEqual(device.packets(1)[0].serial, "91000HKU00000099")
        self.assertNotIn("sems_mitm_upstream_up", running.metrics())
        self.assertEqual(running.value("sems_mitm_upstream_connections"), 0)
        self.assertEqual(running.value("sems_mitm_packets_total", type="0310", verdict="dropped"), 1)
        self.assertEqual(running.value("sems_mitm_packets_total", type="0304", verdict="answered"), 2)

    def test_clock_is_not_set(self) -> None:
        """With a wrong clock or an unknown TZ settings get their ACK alone, and that is said once."""
        rows = (  # TZ, whether this machine's time is plausible, whether the clock is set
            (None, True, True),
            ("Europe/Berlin", True, True),
            ("CET-1CEST,M3.5.0,M10.5.0/3", True, True),
            ("Nowhere/Town", True, False),
            ("Berlin", True, False),
            ("", True, False),
            (None, False, False),
        )
        for zone, plausible, sets in rows:
            with self.subTest(TZ=zone, plausible=plausible), contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.dict(os.environ, {} if zone is None else {"TZ": zone}))
                if zone is None:
                    os.environ.pop("TZ", None)
                if not plausible:
                    stack.enter_context(mock.patch.object(sems, "RELEASED", time.time() + 86400))
                if zone == "":
                    self.lines.clear()
                    continue  # an empty variable is unset to the C library of some systems only
                running = self.exporter(None, "--sems.mode=local")
                self.lines.clear()
                device = running.device(frame(sems.SETTINGS) + frame(sems.SETTINGS) + frame())
                kinds = [packet.type for packet in device.packets(5 if sets else 3)]
                self.assertEqual(kinds, ["0303", "0116"] * 2 + ["0304"] if sets else ["0303"] * 2 + ["0304"])
                self.assertTrue(device.silent(0.02))
                self.assertEqual(sum("clock" in line for line in self.lines), 0 if sets else 1)

    def test_original_switch(self) -> None:
        """--no-sems-passthrough is mode local."""
        running = self.exporter(None, "--no-sems-passthrough")
        self.assertEqual([packet.type for packet in running.device(frame()).packets(1)], ["0304"])


# --------------------------------------------------------------------------------------------- sockets: connections


class ConnectionsTest(SocketCase):
    """How connections end, and which are refused."""

    def test_half_close(self) -> None:
        """A device that has sent its last byte still gets what the portal says within the time for it."""
        self.limits(LINGER=0.2)
        for portal_closes in (True, False):
            with self.subTest(portal_closes=portal_closes):
                portal = self.portal()
                running = self.exporter(portal)
                data = frame()
                device = running.device(data)
                device.sock.shutdown(socket.SHUT_WR)
                leg = portal.accept()
                self.assertEqual(leg.rest(), data)
                leg.send(ack_of(data))
                self.assertEqual(device.read(ACK_SIZE), ack_of(data))
                if portal_closes:
                    leg.close()
                begin = time.monotonic()
                self.assertEqual(device.rest(), b"")
                self.assertLess(time.monotonic() - begin, 5)
                until(lambda: running.value("sems_mitm_device_connections") == 0)

    def test_last_words(self) -> None:
        """A device that says its word and goes at once has said it: to the portal, or to us for an answer."""
        data = frame()
        portal = self.portal()
        running = self.exporter(portal)
        running.device(data).close()
        self.assertEqual(portal.accept().rest(), data)
        for mode in ("local", "spool"):
            with self.subTest(mode):
                portal = self.portal()
                running = self.exporter(portal, f"--sems.mode={mode}")
                device = running.device(data * 200)
                device.sock.shutdown(socket.SHUT_WR)
                self.assertEqual(len(device.rest()), 200 * ACK_SIZE)
                if mode == "spool":
                    leg = portal.accept()
                    self.assertEqual(leg.read(200 * len(data)), data * 200)
                    leg.send(ack_of(data) * 200)
                until(lambda: running.value("sems_mitm_device_connections") == 0)

    def test_at_once_if_nothing_was_sent(self) -> None:
        """A device that goes without a word leaves nothing behind."""
        self.limits(LINGER=30)
        portal = self.portal()
        for mode in ("forward", "local", "spool"):
            with self.subTest(mode):
                running = self.exporter(portal, f"--sems.mode={mode}")
                device = running.device()
                until(lambda: running.value("sems_mitm_device_connections") == 1)
                device.close()
                until(lambda: running.value("sems_mitm_device_connections") == 0, 5)

    def test_idle_device(self) -> None:
        """A device silent for long is closed, and its portal's connection with it; one that speaks is not."""
        self.limits(SILENCE=0.5, LINGER=0.1)
        portal = self.portal()
        running = self.exporter(portal)
        data = frame()
        idle, talker = running.device(data), running.device(frame(serial=METER[:-1] + "3"))
        legs = [portal.accept(), portal.accept()]
        for leg in legs:
            leg.read(len(data))
        end = time.monotonic() + 10
        while not select.select([idle.sock], [], [], 0.03)[0] and time.monotonic() < end:
            talker.send(b"x")
        self.assertEqual(idle.rest(), b"")
        self.assertTrue(talker.silent(0.01))
        until(lambda: running.value("sems_mitm_upstream_connections") == 1)

    def test_limit(self) -> None:
        """One connection more than the limit is closed at once, counted and logged; when one goes there is room again."""
        running = self.exporter(None, "--sems.mode=local", "--sems.max-connections=2")
        first, second = running.device(frame()), running.device(frame())
        first.packets(1), second.packets(1)
        self.assertEqual([running.device().rest() for _ in range(3)], [b""] * 3)
        until(lambda: running.value("sems_mitm_refused_connections_total", reason="limit") == 3)
        self.assertEqual(sum("max-connections" in line for line in self.lines), 1)
        self.assertEqual(running.value("sems_mitm_suppressed_log_lines_total"), 2)
        first.close()
        until(lambda: running.value("sems_mitm_device_connections") == 1)
        self.assertEqual(len(running.device(frame()).packets(1)), 1)

    def test_allow_from(self) -> None:
        """Only the networks of --sems.allow-from may connect."""
        for networks, allowed in (("10.0.0.0/8,192.168.1.0/24", False), ("10.0.0.0/8,127.0.0.0/8", True), ("::1/128", False)):
            with self.subTest(networks):
                running = self.exporter(None, "--sems.mode=local", f"--sems.allow-from={networks}")
                device = running.device()
                if allowed:
                    device.send(frame())
                    device.packets(1)
                else:
                    self.assertEqual(device.rest(), b"")
                until(lambda: running.value("sems_mitm_refused_connections_total", reason="not_allowed") == (not allowed))

    def test_loop_by_our_own_end(self) -> None:
        """An accepted connection that is the other end of our own portal connection is refused, and it does not spiral."""
        self.limits(BACKOFF=(0.5, 1))
        self.patch(sems.Network, "is_own", return_value=False)
        running = self.exporter(None)
        running.settings.upstream = ("127.0.0.1", running.port)
        device = running.device(frame())
        until(lambda: running.value("sems_mitm_refused_connections_total", reason="loop"))
        time.sleep(0.2)
        self.assertEqual(running.value("sems_mitm_refused_connections_total", reason="loop"), 1)
        self.assertEqual(running.value("sems_mitm_device_connections"), 1)
        self.assertEqual(sum("upstream" in line for line in self.lines), 1)
        self.assertTrue(device.silent(0.01))

    def test_loop_by_our_own_listener(self) -> None:
        """A portal that is one of our listening sockets is not tried: reason loop, and the log says what to change."""
        running = self.exporter(None)
        running.settings.upstream = ("127.0.0.1", running.port)
        running.device(frame())
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="loop") >= 2)
        self.assertEqual(running.value("sems_mitm_device_connections"), 1)
        self.assertEqual(running.value("sems_mitm_upstream_connections"), 0)
        self.assertEqual(running.value("sems_mitm_refused_connections_total"), 0)
        self.assertEqual(sum("--sems.upstream" in line for line in self.lines), 1, self.lines)
        self.assertEqual(running.value("meter_metrics_packets_total"), 1)

    def test_loop_by_its_first_frame(self) -> None:
        """Where NAT hides both, a first frame that we sent just now and that comes back is a loop."""
        portal = self.portal()
        running = self.exporter(portal)
        data = frame()
        device = running.device(data)
        leg = portal.accept()
        echo = running.device(leg.read(len(data)))
        self.assertEqual(echo.rest(), b"")
        self.assertEqual(running.value("sems_mitm_refused_connections_total", reason="loop"), 1)
        self.assertTrue(portal.unasked())
        leg.send(ack_of(data))
        self.assertEqual(device.read(ACK_SIZE), ack_of(data))
        self.assertEqual(running.value("meter_metrics_packets_total"), 1)

    def test_no_loop(self) -> None:
        """A device that comes back at once with its last frame, and the same frame later, are no loop."""
        self.limits(LOOP_WINDOW=0.1)
        portal = self.portal()
        running = self.exporter(portal)
        data = frame()
        device = running.device(data)
        leg = portal.accept()
        leg.read(len(data))
        time.sleep(0.15)
        again = running.device(data)
        leg = portal.accept()
        self.assertEqual(leg.read(len(data)), data)
        device.close(), again.close()
        for one in portal.peers:
            one.close()
        until(lambda: running.value("sems_mitm_device_connections") == 0)
        running.device(data)
        self.assertEqual(portal.accept().read(len(data)), data)
        self.assertEqual(running.value("sems_mitm_refused_connections_total"), 0)

    def test_ipv6_and_every_family(self) -> None:
        """:PORT is a socket for each family there is, and peers are told as plain addresses."""
        capture = os.path.join(self.directory(), "capture")
        running = self.exporter(None, "--sems.mode=local", "--sems.listen-address=:0", f"--sems.capture={capture}")
        hosts = ["127.0.0.1", "::1"] if len(running.network.listening) > 1 else ["127.0.0.1"]
        for host in hosts:
            with self.subTest(host), socket.create_connection((host, running.port), timeout=10) as sock:
                peer = Peer(sock)
                peer.send(frame())
                peer.packets(1)
        peers = [json.loads(line)["peer"].rpartition(":")[0] for line in open_lines(capture)]
        self.assertEqual(peers, ["127.0.0.1", "[::1]"][: len(hosts)])


class NameServer(threading.Thread):
    """A name server on a free UDP port; answers(query) is the datagrams it sends."""

    def __init__(self, answers) -> None:
        super().__init__(daemon=True)
        self.answers, self.asked = answers, 0
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind(("127.0.0.1", 0))
        self.text = "127.0.0.1:%d" % self.sock.getsockname()[1]
        self.start()

    def run(self) -> None:
        while True:
            query, peer = self.sock.recvfrom(4096)
            if not query:
                return
            self.asked += 1
            for data in self.answers(query):
                self.sock.sendto(data, peer)

    def close(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", self.sock.getsockname())
        self.join()
        self.sock.close()


def told(query: bytes, *addresses: str, number: int | None = None, code: int = 0, question: bytes = b"") -> bytes:
    """A name server's answer to a query."""
    head = struct.pack(">6H", int.from_bytes(query[:2], "big") if number is None else number, 0x8180 | code, 1, len(addresses), 0, 0)
    return (
        head + (question or query[12:]) + b"".join(b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(address) for address in addresses)
    )


class NameTest(SocketCase):
    """How the portal's name becomes an address. Here 127.0.0.1 counts as routable, and nothing else does."""

    def setUp(self) -> None:
        super().setUp()
        self.system = ["10.0.0.1"]
        self.patch(sems, "is_global", lambda host: host == "127.0.0.1")
        self.asked = self.patch(
            sems,
            "system_addresses",
            side_effect=lambda host, port: [sems.Endpoint(socket.AF_INET, (address, port)) for address in self.system],
        )
        self.patch(sems.ask_dns, "__defaults__", (0.2,))

    def server(self, answers) -> NameServer:
        server = NameServer(answers)
        self.addCleanup(server.close)
        return server

    def named(self, portal: Portal, *servers, host: str = "portal.test") -> Running:
        running = self.exporter(
            None, f"--sems.upstream={host}:{portal.port}", "--sems.upstream-dns=" + (",".join(server.text for server in servers) or "none")
        )
        running.device(frame())
        return running

    def test_override(self) -> None:
        """Where the system's answer is not routable the servers are asked, anew for each attempt."""
        server = self.server(lambda query: [told(query, "10.0.0.9", "127.0.0.1")])
        portal = self.portal()
        running = self.named(portal, server)
        for attempt in range(1, 4):
            leg = portal.accept()
            self.assertEqual((server.asked, self.asked.call_count), (attempt, attempt))
            leg.close()
        self.assertEqual(running.value("sems_mitm_upstream_connect_failures_total"), 0)

    def test_bad_answers(self) -> None:
        """A server that forges, cuts, fails or keeps silent is passed over for the next; the true answer behind a forged one counts."""
        other = b"\5other\4test\0\0\1\0\1"
        forged = lambda query: [
            told(query, "127.0.0.9", number=int.from_bytes(query[:2], "big") ^ 1),
            told(query, "127.0.0.9", question=b"\5other\4test\0\0\1\0\1"),
            query,
            b"",
            told(query, "127.0.0.1")[:-3],
            told(query, "127.0.0.1")[:7],
            query[:2] + bytes(range(128, 228)),
            told(query)[:6] + b"\0\1\0\0\0\0" + query[12:] + b"\xc0" + bytes([len(query)]) + b"\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1",
        ]
        rows = (
            ("silence", lambda query: []),
            ("forged and cut", forged),
            ("server failure", lambda query: [told(query, code=2)]),
            ("refused", lambda query: [told(query, code=5)]),
            ("no records", lambda query: [told(query)]),
            ("unroutable", lambda query: [told(query, "10.0.0.1")]),
        )
        good = self.server(lambda query: [*forged(query), told(query, "127.0.0.1")])
        expected = [sems.Endpoint(socket.AF_INET, ("127.0.0.1", 1))]
        for name, answers in rows:
            with self.subTest(name):
                bad = self.server(answers)
                servers = sems.name_servers(f"{bad.text},{good.text}")
                self.assertEqual(sems.resolve("portal.test", 1, servers), expected)
                self.assertEqual(bad.asked, 1)
        closed = self.portal(listening=False)  # nothing is there: the kernel says so
        self.assertEqual(sems.resolve("portal.test", 1, [("127.0.0.1", closed.port), *sems.name_servers(good.text)]), expected)

    def test_no_such_name(self) -> None:
        """Where a server says that the name does not exist, the system's answer is used: a name of one's own."""
        self.system = ["127.0.0.2"]
        server = self.server(lambda query: [told(query, code=3)])
        self.assertEqual(sems.resolve("portal.test", 5, sems.name_servers(server.text)), [sems.Endpoint(socket.AF_INET, ("127.0.0.2", 5))])

    def test_only_unroutable(self) -> None:
        """Where the servers are overridden too nothing is tried: reason loop, and the log says what to change."""
        self.system = []
        portal = self.portal()
        running = self.named(portal, self.server(lambda query: [told(query, "192.168.1.2")]))
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="loop") >= 2)
        self.assertTrue(portal.unasked(0.02))
        self.assertEqual(sum("--sems.upstream-dns" in line for line in self.lines), 1)
        self.assertEqual(running.value("sems_mitm_upstream_up"), 0)

    def test_no_address(self) -> None:
        """A name that nobody knows is reason dns, and is tried again."""
        self.system = []
        portal = self.portal()
        running = self.named(portal)
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="dns") >= 2)
        self.system = ["127.0.0.1"]
        self.assertEqual(portal.accept().read(6), b"POSTGW")

    def test_used_as_they_are(self) -> None:
        """An address or localhost is not looked up elsewhere; nor is a routable answer; nor is anything with none."""
        server = self.server(lambda query: [told(query, "127.0.0.9")])
        self.patch(sems, "is_global", lambda host: host == "127.0.0.3")
        for host, system, servers in (
            ("127.0.0.1", [], [server]),
            ("localhost", ["127.0.0.1"], [server]),
            ("portal.test", ["127.0.0.1"], []),
        ):
            with self.subTest(host):
                self.system = system
                portal = self.portal()
                self.named(portal, *servers, host=host)
                self.assertEqual(portal.accept().read(6), b"POSTGW")
        self.system = ["127.0.0.3", "127.0.0.3"]
        self.assertEqual(
            sems.resolve("portal.test", 5, sems.name_servers(server.text)), [sems.Endpoint(socket.AF_INET, ("127.0.0.3", 5))] * 2
        )
        self.assertEqual(server.asked, 0)

    def test_next_address(self) -> None:
        """Of several addresses the next is tried when one refuses."""
        self.system = ["127.0.0.1"]
        portal = self.portal()
        self.asked.side_effect = lambda host, port: [sems.Endpoint(socket.AF_INET, ("127.0.0.1", one)) for one in (self.closed.port, port)]
        self.closed = self.portal(listening=False)
        self.named(portal)
        self.assertEqual(portal.accept().read(6), b"POSTGW")

    def test_slow_look_up(self) -> None:
        """A look-up that takes long holds up nothing but its own attempt."""
        go = threading.Event()
        self.addCleanup(go.set)
        self.asked.side_effect = lambda host, port: go.wait(10) and [sems.Endpoint(socket.AF_INET, ("127.0.0.1", port))]
        portal = self.portal()
        running = self.named(portal)
        until(lambda: self.asked.called)
        for i in range(3):
            running.device(frame(serial=f"91000HKU0000000{i}"))
        until(lambda: running.value("meter_metrics_packets_total") == 4)
        self.assertEqual(running.get("/-/ready")[0], 200)
        go.set()
        for _ in range(4):
            self.assertEqual(portal.accept().read(6), b"POSTGW")

    def test_device_goes_during_look_up(self) -> None:
        """A device that goes while its portal is looked up is forgotten, whatever the answer is."""
        go = threading.Event()
        self.addCleanup(go.set)
        self.asked.side_effect = lambda host, port: go.wait(10) and []
        running = self.named(self.portal())
        until(lambda: self.asked.called)
        running.devices[0].reset()
        go.set()
        until(lambda: running.value("sems_mitm_device_connections") == 0)


class DescriptorsTest(SocketCase):
    """Out of file descriptors."""

    def test_out_of_descriptors(self) -> None:
        """Existing connections go on, nothing spins, and accepting resumes."""
        portal = self.portal()
        process = self.process(
            f"--sems.upstream=127.0.0.1:{portal.port}",
            "--sems.listen-address=127.0.0.1:0",
            "--web.listen-address=127.0.0.1:0",
            before="sems.resource.setrlimit(sems.resource.RLIMIT_NOFILE, (32, 32))",
        )
        data = frame()
        device = process.device(data)
        leg = portal.accept()
        leg.read(len(data))
        idle = [process.device() for _ in range(40)]
        until(lambda: "cannot accept" in process.stderr())
        before = process.cpu() if os.path.exists("/proc/self/stat") else 0
        begin = time.monotonic()
        while time.monotonic() < begin + 0.4:
            device.send(data)
            self.assertEqual(leg.read(len(data)), data)
            time.sleep(0.1)
        if before:
            self.assertLess(process.cpu() - before, 0.25)
        for peer in idle:
            peer.reset()
        data = frame(serial=METER[:-1] + "3")
        process.device(data)
        self.assertEqual(portal.accept().read(len(data)), data)
        self.assertNotIn("Traceback", process.stderr())
        self.assertEqual(process.metrics()["process_max_fds"], 32)
        self.assertEqual(process.stop(signal.SIGTERM)[0], 0)


# ------------------------------------------------------------------------------------------------- sockets: files


class RecordedFilesTest(SocketCase):
    """--sems.capture and --sems.backfill."""

    def test_written_at_once(self) -> None:
        """Every frame is in the capture before the device can know of it, buffered readings in the other file; decode reads both."""
        capture, backfill = (os.path.join(self.directory(), name) for name in ("capture", "backfill"))
        running = self.exporter(None, "--sems.mode=local", f"--sems.capture={capture}", f"--sems.backfill={backfill}")
        rows = [
            frame(sems.SETTINGS),
            frame(),
            frame(sems.BUFFERED),
            frame(sems.BUFFERED, 1, INVERTER, ranges=INVERTER_RANGES),
            frame(0x09, clear=bytes(16)),
        ]
        device = running.device(spoilt(frame()) + b"".join(rows))
        device.packets(5)
        lines = [json.loads(line) for line in open_lines(capture)]
        self.assertEqual(
            [line["hex"] for line in lines if line["direction"] == "outbound"][:4], [data.hex() for data in (spoilt(frame()), *rows[:3])]
        )
        until(lambda: len(open_lines(capture)) >= 6)
        line = lines[1]
        self.assertEqual((line["verdict"], line["peer"]), ("answered", "127.0.0.1:%d" % device.sock.getsockname()[1]))
        stamp = datetime.fromisoformat(line["time"].replace("Z", "+00:00"))
        self.assertLess(abs((stamp - datetime.now(timezone.utc)).total_seconds()), 20)
        self.assertEqual([json.loads(line)["hex"] for line in open_lines(backfill)], [data.hex() for data in rows[2:4]])
        code, out, _ = called("decode", capture)
        decoded = [json.loads(line) for line in out.splitlines()]
        self.assertEqual((code, [entry["hex"] for entry in decoded if entry["crc_ok"]][:5]), (0, [data.hex() for data in rows]))

    def test_appended(self) -> None:
        """A file that is there is appended to, even if its last line is torn."""
        path = os.path.join(self.directory(), "capture")
        whole = sems.capture_line(0, "127.0.0.1:1", "outbound", "forwarded", frame())
        with open(path, "w") as file:
            file.write(whole + whole[:50])
        running = self.exporter(None, "--sems.mode=local", f"--sems.capture={path}")
        running.device(frame()).packets(1)
        code, out, _ = called("decode", path)
        self.assertEqual((code, len(out.splitlines())), (0, 2))

    def test_file_comes_back(self) -> None:
        """What could not be written is lost, and writing goes on when it can."""
        path = os.path.join(self.directory(), "later", "capture")
        running = self.exporter(None, "--sems.mode=local", f"--sems.capture={path}")
        device = running.device(frame())
        device.packets(1)
        os.mkdir(os.path.dirname(path))
        device.send(frame(when=NOON + timedelta(minutes=1)))
        device.packets(1)
        self.assertEqual([json.loads(line)["hex"] for line in open_lines(path)], [frame(when=NOON + timedelta(minutes=1)).hex()])
        self.assertEqual(running.value("sems_mitm_file_errors_total", file="capture"), 2)

    @unittest.skipUnless(hasattr(os, "mkfifo"), "no FIFOs")
    def test_nobody_reads(self) -> None:
        """A capture into a FIFO that nobody empties is counted trouble, and holds nothing up."""
        path = os.path.join(self.directory(), "fifo")
        os.mkfifo(path)
        portal = self.portal()
        running = self.exporter(portal, f"--sems.capture={path}")
        stream = b"".join(frames_of(300))
        device = running.device(stream)
        self.assertEqual(portal.accept().read(len(stream)), stream)
        until(lambda: running.value("sems_mitm_file_errors_total", file="capture"))
        device.close()

    @unittest.skipUnless(os.path.exists("/dev/full"), "no /dev/full")
    def test_disk_full(self) -> None:
        """A full disk or a bad path is counted, a log line a minute; nothing else changes."""
        for path in ("/dev/full", "/nonexistent/capture", HERE):
            with self.subTest(path):
                self.lines.clear()
                portal = self.portal()
                running = self.exporter(portal, f"--sems.capture={path}", f"--sems.backfill={path}")
                stream = b"".join(frames_of(5, function=sems.BUFFERED))
                device = running.device(stream)
                leg = portal.accept()
                self.assertEqual(leg.read(len(stream)), stream)
                leg.send(ack_of(stream))
                self.assertEqual(device.read(ACK_SIZE), ack_of(stream))
                until(lambda: running.value("sems_mitm_file_errors_total", file="backfill") >= 5)
                self.assertGreaterEqual(running.value("sems_mitm_file_errors_total", file="capture"), 6)
                self.assertEqual(running.value("sems_mitm_buffered_packets_total"), 5)
                self.assertEqual(sum("--sems.capture" in line for line in self.lines), 1)


# -------------------------------------------------------------------------------------------------- sockets: HTTP

HOSTILE, HOSTILE_MODEL = "<b>\"\\'&lt;</b>xy", "<img src=x onerror=alert(1)>"


class HttpTest(SocketCase):
    """/metrics, the page, /api/devices and their neighbours."""

    def setUp(self) -> None:
        super().setUp()
        self.running = self.exporter(None, "--sems.mode=local")

    def raw(self, data: bytes) -> bytes:
        """What comes back for bytes of our own, to the end."""
        with socket.create_connection(("127.0.0.1", self.running.web.port), timeout=10) as sock:
            sock.sendall(data)
            return Peer(sock).rest()

    def test_routes(self) -> None:
        """Each path has its type, HEAD its headers alone; else 404 and 405."""
        text = "text/plain; charset=utf-8"
        rows = (
            ("/metrics", 200, "text/plain; version=0.0.4; charset=utf-8", "# HELP"),
            ("/", 200, "text/html; charset=utf-8", "<!doctype html>"),
            ("/api/devices", 200, "application/json", "{"),
            ("/-/healthy", 200, text, ""),
            ("/-/ready", 200, text, ""),
            ("/nothing", 404, text, ""),
            ("/metrics/", 404, text, ""),
            ("/../etc/passwd", 404, text, ""),
        )
        for path, status, kind, start in rows:
            with self.subTest(path):
                got, headers, body = self.running.get(path)
                self.assertEqual((got, headers["Content-Type"]), (status, kind))
                self.assertTrue(body.decode().startswith(start))
                self.assertEqual(len(body), int(headers["Content-Length"]))
                self.assertEqual(headers["X-Content-Type-Options"], "nosniff")
                self.assertIn("default-src 'none'", headers["Content-Security-Policy"])
                self.assertIsNone(headers["Server"])
                head = self.raw(f"HEAD {path} HTTP/1.0\r\n\r\n".encode())
                self.assertTrue(head.endswith(b"\r\n\r\n") and head.startswith(b"HTTP/1.1 %d " % status), head)
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW", "get"):
            with self.subTest(method):
                answer = self.raw(f"{method} /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode())
                self.assertTrue(answer.startswith(b"HTTP/1.1 405 "), answer[:60])
                self.assertIn(b"Allow: GET, HEAD", answer)

    def test_telemetry_path(self) -> None:
        """--web.telemetry-path moves the metrics, and the page links to it."""
        running = self.exporter(None, "--sems.mode=local", "--web.telemetry-path=/solar")
        self.assertEqual((running.get("/solar")[0], running.get("/metrics")[0]), (200, 404))
        self.assertIn(b'href="/solar"', running.get("/")[2])

    def test_long_head(self) -> None:
        """A request's head is bounded as a whole: one that never ends is refused, not kept."""
        with socket.create_connection(("127.0.0.1", self.running.web.port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 15)
            client.sendall(b"X: %s\r\n" % (b"x" * 1000) * 2)
            self.assertIn(b" 431 ", client.recv(4096))

    def test_answers_that_nobody_reads(self) -> None:
        """What all answers together take is bounded: the oldest that wait for their clients make room."""
        web, pairs = self.running.web, [socket.socketpair() for _ in range(3)]
        for ours, _ in pairs:
            web._open[ours] = 0
        before = self.running.value("sems_mitm_http_closed_connections_total")
        with mock.patch.object(sems, "HTTP_BYTES", 100):
            for (ours, _), size in zip(pairs, (60, 40, 70)):
                web.carries(ours, size)
        self.assertEqual([ours in web._open for ours, _ in pairs], [False, False, True])
        self.assertEqual(self.running.value("sems_mitm_http_closed_connections_total") - before, 2)
        for ours, theirs in pairs:
            web._open.pop(ours, None)
            ours.close()
            theirs.close()

    def test_long_header(self) -> None:
        """A header of 60,000 blanks is read in no time: nothing else runs meanwhile."""
        begin = time.process_time()
        self.running.get("/metrics", **{"Accept-Encoding": f"gzip{' ' * 60_000}x"})
        self.assertLess(time.process_time() - begin, 1)

    def test_gzip(self) -> None:
        """Packed where asked for, and only there."""
        for accepted, packed in (
            ("gzip", True),
            ("deflate, gzip;q=0.5", True),
            ("*", True),
            ("gzip;q=0", False),
            ("identity", False),
            ("", False),
        ):
            with self.subTest(accepted):
                _, headers, body = self.running.get("/metrics", **{"Accept-Encoding": accepted})
                self.assertEqual(headers["Content-Encoding"] == "gzip", packed)
                self.assertIn("Accept-Encoding", headers["Vary"])
                plain = gzip.decompress(body) if packed else body
                self.assertTrue(plain.startswith(b"# HELP") and plain.endswith(b"\n"))

    def test_keep_alive(self) -> None:
        """A connection serves many requests, also sent at once."""
        connection = http.client.HTTPConnection("127.0.0.1", self.running.web.port, timeout=10)
        self.addCleanup(connection.close)
        local = set()
        for path, method in (("/metrics", "GET"), ("/nothing", "GET"), ("/", "HEAD"), ("/-/healthy", "GET")):
            connection.request(method, path)
            local.add(connection.sock.getsockname())
            connection.getresponse().read()
        self.assertEqual(len(local), 1)
        answers = self.raw(b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n" * 3 + b"GET /-/ready HTTP/1.1\r\nConnection: close\r\n\r\n")
        self.assertEqual(answers.count(b"HTTP/1.1 200"), 4)

    def test_slow_clients(self) -> None:
        """Clients that send nothing, a byte now and then, or read nothing, hold up no other and no device."""
        with contextlib.ExitStack() as stack:
            slow = [stack.enter_context(socket.create_connection(("127.0.0.1", self.running.web.port), timeout=10)) for _ in range(20)]
            for i, sock in enumerate(slow):
                sock.sendall((b"", b"G", b"GET / HTTP/1.1\r\nA", b"GET /metrics HTTP/1.1\r\n\r\n" * 300)[i % 4])
            for i in range(5):
                begin = time.monotonic()
                self.assertEqual(self.running.get("/metrics")[0], 200)
                self.running.device(frame()).packets(1)
                self.assertLess(time.monotonic() - begin, 3)
                slow[1].sendall(b"ET / "[i : i + 1])

    def test_silent_client(self) -> None:
        """A client that says nothing for long is closed."""
        self.limits(HTTP_TIMEOUT=0.1)
        self.assertEqual(self.raw(b"GET / HTT"), b"")

    def test_one_connection_too_many(self) -> None:
        """The 65th closes the one that has been open longest, and is counted."""
        with contextlib.ExitStack() as stack:
            open_now = [stack.enter_context(socket.create_connection(("127.0.0.1", self.running.web.port), timeout=10)) for _ in range(64)]
            time.sleep(0.05)
            self.assertFalse(select.select(open_now, [], [], 0)[0])
            self.assertEqual(self.running.get("/-/healthy")[0], 200)
            self.assertEqual(open_now[0].recv(1), b"")
            self.assertFalse(select.select(open_now[1:], [], [], 0)[0])
            self.assertEqual(self.running.value("sems_mitm_http_closed_connections_total"), 1)

    def test_hostile_texts(self) -> None:
        """What devices say of themselves is text, on the page and in labels."""
        settings = frame(sems.SETTINGS, 1, HOSTILE, ranges=[(40173, sems.text_words(HOSTILE_MODEL, 16))])
        self.running.device(settings + frame(cls=1, serial=HOSTILE, ranges=INVERTER_RANGES)).packets(3)
        until(lambda: self.running.value("inverter_power_output_watts", device="inverter"))
        page = self.running.get("/")[2].decode()
        self.assertNotIn("<img", page)
        self.assertNotIn("<b>", page)
        self.assertIn("&lt;img src=x onerror=alert(1)&gt;", page)
        self.assertIn("&lt;b&gt;&quot;\\", page)
        told_of = json.loads(self.running.get("/api/devices")[2])["devices"][0]
        self.assertEqual((told_of["full_serial"], told_of["model"]), (HOSTILE, HOSTILE_MODEL))
        metrics = self.running.get("/metrics")[2].decode()
        self.assertIn('full_serial="<b>\\"\\\\\'&lt;</b>xy"', metrics)
        for line in metrics.splitlines():
            if not line.startswith("#"):
                self.assertRegex(line, r'^[a-z_]+(\{([a-z_]+="([^"\\\n]|\\[\\"n])*",?)+\})? -?[0-9.e+-]+$')

    def test_api(self) -> None:
        """/api/devices: devices, upstream and blocked, with units in the names."""
        self.running.device(frame()).packets(1)
        until(lambda: self.running.value("meter_power_generation_watts"))
        told_of = json.loads(self.running.get("/api/devices")[2])
        self.assertEqual(set(told_of), {"devices", "upstream", "blocked"})
        self.assertEqual((told_of["blocked"], told_of["upstream"]["mode"], told_of["upstream"]["queue_bytes"]), (0, "local", 0))
        (device,) = told_of["devices"]
        shown = {
            name: device[name]
            for name in ("device", "model", "serial", "full_serial", "up", "generation_watts", "export_watts", "house_watts")
        }
        self.assertEqual(
            shown,
            {
                "device": "meter",
                "model": "HomeKit 1000 Smart Meter",
                "serial": METER[-8:],
                "full_serial": METER,
                "up": True,
                "generation_watts": 2600,
                "export_watts": 1500,
                "house_watts": 1100,
            },
        )
        self.assertLess(device["age_seconds"], 20)

    def test_silence(self) -> None:
        """A silent device keeps its counters and loses its gauges, device_up is 0; its next packet brings them back."""
        self.running.store.stale_after = 0.4
        device = self.running.device(frame())
        gauges, counters = "meter_power_generation_watts", "meter_energy_generation_decawatt_hours_total"
        until(lambda: self.running.value(gauges) == 2600)
        until(lambda: not any(series.startswith(gauges) for series in self.running.metrics()))
        self.assertEqual((self.running.value(counters), self.running.value("sems_mitm_device_info")), (2, 1))
        until(lambda: self.running.value("sems_mitm_device_up") == 0)
        self.assertEqual(self.running.value("sems_mitm_stale_after_seconds"), 0.4)
        self.assertGreater(self.running.value("sems_mitm_device_last_packet_timestamp_seconds"), time.time() - 60)
        self.assertIn(b"silent", self.running.get("/")[2])
        device.send(frame(when=NOON + timedelta(minutes=1)))
        until(lambda: self.running.value(gauges) == 2600)
        self.assertEqual(self.running.value("sems_mitm_device_up"), 1)


class HttpFuzzTest(SocketCase):
    """Requests that are none."""

    def test_garbage(self) -> None:
        """Whatever is sent, the answer is an error or the end, nothing is a traceback, and the process serves on."""
        process = self.process(
            "--sems.mode=local", "--sems.listen-address=127.0.0.1:0", "--web.listen-address=127.0.0.1:0", "--log.level=debug"
        )
        chance = random.Random(11)
        words = [
            b"GET",
            b"HEAD",
            b"POST",
            b" ",
            b"/",
            b"/metrics",
            b"HTTP/1.1",
            b"HTTP/1.0",
            b"HTTP/9",
            b"HTTP/-1.1",
            b"\r\n",
            b"\n",
            b"\0",
            b"\xff\xfe",
            b"Host: x",
            b": ",
            b"%00",
            b"?a=b",
            b"\t",
            b"Content-Length: -1",
            b"Accept-Encoding: gzip;q=x",
            b"Connection: close",
            b"a" * 300,
            b"http://[::1/",
        ]
        rows = [
            b"\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET / HTTP/1.1.1\r\n\r\n", b"GET / HTTP/9999999999999.1\r\n\r\n", b"GET / X\r\n\r\n",
            b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n", b"GET / HTTP/1.1\r\nA: " + b"b" * 70000 + b"\r\n\r\n",
            b"\0" * 1000 + b"\r\n\r\n", b"GET /\0 HTTP/1.1\r\nA\0: \0\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200), b"\xff" * 300 + b"\r\n\r\n",
            b"GET //// HTTP/1.1\r\n : x\r\n\r\n", b"GET / HTTP/1.1\r\nAccept-Encoding: \xff\xff\r\n\r\n", b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nxx", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", frame(), b"GET /%ff%00 HTTP/1.1\r\n\r\n", b"\xc2\x85GET / HTTP/1.1\r\n\r\n", b"GET \xe2\x80\xa8 HTTP/1.1\r\n\r\n",
        ]  # fmt: skip
        rows += [b"".join(chance.choice(words) for _ in range(chance.randint(1, 12))) + b"\r\n\r\n" for _ in range(150)]
        port = process.ports()[1]
        for row in rows:
            with self.subTest(row[:60]), socket.create_connection(("127.0.0.1", port), timeout=10) as sock:
                with contextlib.suppress(ConnectionError, BrokenPipeError):
                    sock.sendall(row)
                    with contextlib.suppress(OSError):  # refused already
                        sock.shutdown(socket.SHUT_WR)
                answer = Peer(sock).rest()
                self.assertTrue(not answer.startswith(b"HTTP/") or re.match(rb"HTTP/1.1 (100|200|4\d\d|505) ", answer), answer[:80])
                self.assertNotIn(b"Server:", answer)
        self.assertGreater(process.metrics()["process_cpu_seconds_total"], 0)
        self.assertNotIn("Traceback", process.stderr())
        self.assertEqual(process.stop(signal.SIGTERM)[0], 0)
        self.assertNotIn("Traceback", process.stderr())


# ------------------------------------------------------------------------------------------------- the command line


class CommandLineTest(SocketCase):
    """Flags, exit codes and signals."""

    def test_version(self) -> None:
        """version tells version, Python and platform as JSON."""
        done = subprocess.run([sys.executable, "-W", "error", sems.__file__, "version"], capture_output=True, timeout=20)
        told_of = json.loads(done.stdout)
        self.assertEqual(
            (done.returncode, done.stderr, told_of["version"], told_of["python"]), (0, b"", sems.VERSION, sys.version.split()[0])
        )
        self.assertIn("platform", told_of)

    def test_help(self) -> None:
        """--help of each command ends with 0 and names every flag with its variable."""
        for command in ("serve", "demo", "simulate", "decode", "backfill", "doctor", "version"):
            with self.subTest(command):
                code, out, err = called(command, "--help")
                self.assertEqual((code, err), (0, ""))
                self.assertIn("usage", out)
        out = called("serve", "--help")[1]
        for name, *_ in sems.FLAGS:
            self.assertIn(f"--{name}", out)
            self.assertIn(sems.variable(name), out.replace("\n", " "))

    BAD = (  # arguments, environment, what the line on stderr names
        (["--sems.listen-address=nonsense"], {}, ("--sems.listen-address", "nonsense")),
        (["--sems.listen-address", ":99999"], {}, ("--sems.listen-address", ":99999")),
        (["--sems.listen-address=::1:20001"], {}, ("--sems.listen-address", "::1:20001")),
        (["--sems.upstream=:20001"], {}, ("--sems.upstream", ":20001")),
        (["--sems.upstream=portal"], {}, ("--sems.upstream", "portal")),
        (["--sems.upstream=portal:0"], {}, ("--sems.upstream", "portal:0")),
        (["--sems.upstream-dns=1.1.1.1:x"], {}, ("--sems.upstream-dns", "1.1.1.1:x")),
        (["--sems.upstream-dns=1.1.1.1,,"], {}, ("--sems.upstream-dns", "1.1.1.1,,")),
        (["--sems.mode=both"], {}, ("--sems.mode", "both")),
        (["--sems-passthrough=maybe"], {}, ("--sems-passthrough", "maybe")),
        (["--sems.allow-from=10.0.0.0/99"], {}, ("--sems.allow-from", "10.0.0.0/99")),
        (["--sems.max-connections=0"], {}, ("--sems.max-connections", "0")),
        (["--sems.max-connections=-1"], {}, ("--sems.max-connections", "-1")),
        (["--sems.max-devices=1.5"], {}, ("--sems.max-devices", "1.5")),
        (["--web.listen-address=:::"], {}, ("--web.listen-address", ":::")),
        (["--web.telemetry-path=metrics"], {}, ("--web.telemetry-path", "metrics")),
        (["--metrics.stale-after=5x"], {}, ("--metrics.stale-after", "5x")),
        (["--metrics.stale-after=-1s"], {}, ("--metrics.stale-after", "-1s")),
        (["--metrics.stale-after=5"], {}, ("--metrics.stale-after", "5")),
        (["--batsignal=2"], {}, ("--batsignal", "2")),
        (["--debug=loud"], {}, ("--debug", "loud")),
        (["--log.level=loud"], {}, ("--log.level", "loud")),
        (["serve", "--log.level=loud"], {}, ("--log.level", "loud")),
        ([], {"SEMS_LISTEN_ADDRESS": "nonsense"}, ("SEMS_LISTEN_ADDRESS", "nonsense")),
        ([], {"SEMS_MODE": "both"}, ("SEMS_MODE", "both")),
        ([], {"SEMS_PASSTHROUGH": "on"}, ("SEMS_PASSTHROUGH", "on")),
        ([], {"BATSIGNAL": "on"}, ("BATSIGNAL", "on")),
        ([], {"METRICS_STALE_AFTER": "soon"}, ("METRICS_STALE_AFTER", "soon")),
        ([], {"LOG_LEVEL": "loud"}, ("LOG_LEVEL", "loud")),
        ([], {"SEMS_MAX_DEVICES": "\u0663"}, ("SEMS_MAX_DEVICES",)),
        ([], {"WEB_TELEMETRY_PATH": "x\ny"}, ("WEB_TELEMETRY_PATH",)),
        (["--sems.mode=forward", "--no-sems-passthrough"], {}, ("--sems.mode", "--sems-passthrough")),
        (["--sems.mode=local", "--sems-passthrough"], {}, ("--sems.mode", "--sems-passthrough")),
        ([], {"SEMS_MODE": "spool", "SEMS_PASSTHROUGH": "0"}, ("SEMS_MODE", "SEMS_PASSTHROUGH")),
        (["--nothing"], {}, ("--nothing",)),
        (["--sems.mod=local"], {}, ("--sems.mod",)),
        (["--sems.mode"], {}, ("--sems.mode",)),
        (["serve", "more"], {}, ("more",)),
        (["nothing"], {}, ("nothing",)),
        (["simulate"], {}, ("simulate",)),
        (["simulate", "nowhere"], {}, ("nowhere",)),
        (["simulate", "x:1", "--interval=0"], {}, ("--interval", "0")),
        (["simulate", "x:1", "--interval=x"], {}, ("--interval",)),
        (["decode"], {}, ("file",)),
        (["decode", "xyz"], {}, ("xyz",)),
        (["decode", "504"], {}, ("504",)),
        (["backfill"], {}, ("file",)),
        (["backfill", "/nonexistent"], {}, ("/nonexistent",)),
        (["doctor", "--sems.mode=both"], {}, ("--sems.mode", "both")),
        (["version", "more"], {}, ("more",)),
        (["demo", "--nothing"], {}, ("--nothing",)),
    )  # fmt: skip

    def test_bad_usage(self) -> None:
        """Exit code 2 and one line on stderr that names flag or variable and value."""
        for arguments, env, names in self.BAD:
            with self.subTest(arguments or env):
                code, out, err = called(*arguments, env=env)
                self.assertEqual((code, out, err.count("\n"), err[-1:]), (2, "", 1, "\n"), err)
                for name in names:
                    self.assertIn(name.lower(), err.lower())

    def test_bad_usage_of_a_process(self) -> None:
        """The same, from outside."""
        for arguments, env, names in self.BAD[0], self.BAD[24], self.BAD[40]:
            with self.subTest(arguments or env):
                done = subprocess.run(
                    [sys.executable, "-W", "error", sems.__file__, *arguments], capture_output=True, timeout=20, env={**os.environ, **env}
                )
                self.assertEqual((done.returncode, done.stdout, done.stderr.count(b"\n")), (2, b"", 1))
                self.assertTrue(all(name.encode() in done.stderr for name in names), done.stderr)

    def test_good_usage(self) -> None:
        """The command line beats the environment, an empty variable is unset, and DEBUG may be anything."""
        rows = (  # arguments, environment, setting, value
            ([], {}, "mode", "forward"),
            ([], {"SEMS_MODE": "spool"}, "mode", "spool"),
            (["--sems.mode=local"], {"SEMS_MODE": "spool"}, "mode", "local"),
            ([], {"SEMS_MODE": ""}, "mode", "forward"),
            ([], {"SEMS_PASSTHROUGH": "no"}, "mode", "local"),
            (["--sems.mode=spool"], {"SEMS_PASSTHROUGH": "false"}, "mode", "spool"),
            (["--no-sems-passthrough"], {"SEMS_MODE": "spool"}, "mode", "local"),
            (["--sems-passthrough"], {"SEMS_MODE": "local"}, "mode", "forward"),
            (["--sems-passthrough=YES"], {}, "mode", "forward"),
            ([], {"BATSIGNAL": "1"}, "batsignal", True),
            (["--no-batsignal"], {"BATSIGNAL": "1"}, "batsignal", False),
            ([], {"DEBUG": "release*"}, "log_level", "info"),
            ([], {"DEBUG": "true"}, "log_level", "debug"),
            (["--metrics.stale-after=1h30m"], {}, "stale_after", 5400),
            (["--metrics.stale-after", "0"], {}, "stale_after", 0),
            (["--sems.listen-address=[::1]:7"], {}, "listen_address", ("::1", 7)),
            (["--sems.upstream-dns=9.9.9.9:54"], {}, "upstream_dns", [("9.9.9.9", 54)]),
            (["--sems.upstream-dns=none"], {}, "upstream_dns", []),
        )
        for arguments, env, name, value in rows:
            with self.subTest(arguments=arguments, env=env):
                self.assertEqual(getattr(sems.serve_settings(arguments, env), name), value)

    def test_port_in_use(self) -> None:
        """Exit code 1 and one line, for each of the two ports."""
        portal = self.portal()
        for flag, other in (("--sems.listen-address", "--web.listen-address"), ("--web.listen-address", "--sems.listen-address")):
            with self.subTest(flag):
                arguments = [f"{flag}=127.0.0.1:{portal.port}", f"{other}=127.0.0.1:0"]
                done = subprocess.run([sys.executable, sems.__file__, *arguments], capture_output=True, timeout=20)
                self.assertEqual((done.returncode, done.stderr.count(b"\n")), (1, 1), done.stderr)
                self.assertIn(f"{portal.port}".encode(), done.stderr)

    def test_signals(self) -> None:
        """SIGTERM and SIGINT end it with 0 and soon, whatever the portal does; what is queued for one that reads goes out."""
        states = ("idle", "connected", "queue waiting", "black hole")
        started = []
        for i, state in enumerate(states):
            portal = self.portal(listening=state == "connected")
            if state == "black hole":
                portal.black_hole()
            arguments = (
                f"--sems.upstream=127.0.0.1:{portal.port}",
                "--sems.listen-address=127.0.0.1:0",
                "--web.listen-address=127.0.0.1:0",
            )
            process = self.process(*arguments, before="sems.SHUTDOWN = 0.3")
            started.append((state, portal, process, (signal.SIGTERM, signal.SIGINT)[i % 2]))
            process.peers += [
                Peer(socket.create_connection(("127.0.0.1", process.ports()[1]), timeout=10))
            ]  # an HTTP client that says nothing
        for state, portal, process, _ in started:
            if state != "idle":
                process.device(frame())
                leg = portal.accept() if state == "connected" else None
                until(lambda: process.metrics().get("sems_mitm_queue_bytes", 0) == (0 if leg else len(frame())))
        begin = time.monotonic()
        for _, _, process, number in started:
            process.popen.send_signal(number)
        for state, portal, process, _ in started:
            with self.subTest(state):
                self.assertEqual(process.popen.wait(10), 0, process.stderr())
                self.assertLess(time.monotonic() - begin, 5)
                self.assertEqual(re.findall("Traceback|Warning", process.stderr()), [])
                self.assertTrue(state != "connected" or portal.peers[0].rest() == frame())


class DecodeTest(unittest.TestCase):
    """sems_mitm.py decode."""

    def test_sources(self) -> None:
        """Hex in any spacing, files of hex, bytes or captures, and standard input tell the same."""
        data = frame() + portal_frame("0304", bytes(16))
        text = data.hex()
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        line = sems.capture_line(0, "127.0.0.1:1", "outbound", "forwarded", frame()) + sems.capture_line(
            0, "127.0.0.1:1", "inbound", "forwarded", data[len(frame()) :]
        )
        spaced = {
            "plain": text, "upper case": text.upper(), "blanks": " ".join(pairs), "lines": "\n".join(pairs), "0x": ", ".join("0x" + pair for pair in pairs),
            "colons": ":".join(pairs), "\\x": "".join("\\x" + pair for pair in pairs), "quoted": f'"{text}"', "CRLF": "\r\n".join(pairs),
        }  # fmt: skip
        files = {
            **{name: value.encode() for name, value in spaced.items()},
            "bytes": data,
            "capture": line.encode(),
            "cut capture": (line + line[:100]).encode(),
            "array": b"[" + line.replace("\n", ",", 1).encode() + b"]",
        }
        expected = None
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "file")
            for name, content in files.items():
                with open(path, "wb") as file:
                    file.write(content)
                arguments = [((path,), b""), (("-",), content)] + (
                    [((spaced[name],), b""), (tuple(spaced[name].split()), b"")] if name in spaced else []
                )
                for given, stdin in arguments:
                    with self.subTest(name, given=given[0][:10]):
                        code, out, err = called("decode", *given, stdin=stdin)
                        self.assertEqual((code, err), (0, ""))
                        expected = expected or out
                        self.assertEqual(out, expected)
        first, second = map(json.loads, expected.splitlines())
        self.assertEqual((first["type"], first["serial"], first["crc_ok"], first["time"]), ("0304", METER, True, "2026-03-21T12:00:00"))
        self.assertEqual(first["values"]["meter_power_generation_watts"], 2600)
        self.assertEqual((second["direction"], second["values"]["meaning"]), ("inbound", "ack"))

    def test_a_process(self) -> None:
        """From outside: a pipe in, one JSON object a frame out."""
        done = subprocess.run([sys.executable, "-W", "error", sems.__file__, "decode", "-"], input=frame(), capture_output=True, timeout=20)
        self.assertEqual((done.returncode, done.stderr, json.loads(done.stdout)["hex"]), (0, b"", frame().hex()))

    def test_closed_pipe(self) -> None:
        """A reader that has seen enough is no trouble."""
        with tempfile.TemporaryDirectory() as directory:
            path = os.path.join(directory, "capture")
            with open(path, "w") as file:
                file.write(sems.capture_line(0, "127.0.0.1:1", "outbound", "forwarded", frame()) * 300)
            for command in ("decode", "backfill"):
                with (
                    self.subTest(command),
                    subprocess.Popen(
                        [sys.executable, sems.__file__, command, path], stdout=subprocess.PIPE, stderr=subprocess.PIPE
                    ) as process,
                ):
                    process.stdout.close()
                    self.assertNotIn(b"Traceback", process.stderr.read())

    def test_redact(self) -> None:
        """No serial number is left anywhere, in clear, in hex or in cipher, and good frames stay good."""
        inside = frame(
            sems.SETTINGS,
            ranges=[(4608, (12, *sems.text_words("20001,tcp.goodwe-power.com", 15))), (5000, sems.text_words(f"x{INVERTER} {METER}", 20))],
        )
        rows = {
            "frames": frame() + frame(cls=1, serial=INVERTER, ranges=INVERTER_RANGES) + frame(sems.CONFIRMATION),
            "in its own payload": inside + frame(cls=1, serial=INVERTER, ranges=[]),
            "bad CRC": spoilt(frame()),
            "cut": frame()[:60],
            "cut behind a good one": frame(cls=1, serial=INVERTER, ranges=[]) + frame()[:40],
            "in junk": b"junk " + METER.encode() + b" junk" + frame(),
            "an answer": portal_frame("0304", bytes(16)),
            "a bad answer": spoilt(portal_frame("0304", bytes(16))),
            "a cut answer": portal_frame("0304", bytes(16))[:30],
        }
        for name, data in rows.items():
            with self.subTest(name):
                code, out, _ = called("decode", "--redact", data.hex())
                self.assertEqual(code, 0)
                good = 0
                for line in out.splitlines():
                    entry = json.loads(line)
                    raw = bytes.fromhex(entry["hex"])
                    clear = b""
                    if entry["crc_ok"]:
                        wire = sems.OUTBOUND if entry["direction"] == "outbound" else sems.INBOUND
                        self.assertEqual(sems.crc16(raw[:-2]).to_bytes(2, wire.order), raw[-2:])
                        clear = sems.decode(raw, wire).clear
                        good += 1
                    for serial in (METER, INVERTER):
                        self.assertNotIn(serial, line)
                        self.assertNotIn(serial.encode().hex(), line)
                        self.assertNotIn(serial.encode(), raw + clear)
                self.assertEqual(good, sum(json.loads(line)["crc_ok"] is True for line in called("decode", data.hex())[1].splitlines()))
                if name == "frames":
                    self.assertIn("91000HKU", out)


class BackfillTest(SocketCase):
    """sems_mitm.py backfill."""

    START = int(NOON.replace(tzinfo=timezone.utc).timestamp())

    def text(self, *paths: str, zone: str = "UTC") -> str:
        """OpenMetrics text of files, on a machine of that time zone."""
        done = subprocess.run(
            [sys.executable, "-W", "error", sems.__file__, "backfill", *paths],
            capture_output=True,
            timeout=30,
            env={**os.environ, "TZ": zone},
        )
        self.assertEqual((done.returncode, done.stderr[:8]), (0, b"readings"))
        self.assertTrue(done.stdout.endswith(b"# EOF\n"))
        return done.stdout.decode()

    def imported(self, text: str) -> dict:
        """Serial label to the (seconds, generation in watts) that Prometheus has after importing the text."""
        directory = self.directory()
        path = os.path.join(directory, "text")
        with open(path, "w") as file:
            file.write(text)
        made = subprocess.run(["promtool", "tsdb", "create-blocks-from", "openmetrics", path, directory], capture_output=True, timeout=60)
        self.assertEqual(made.returncode, 0, made.stderr)
        os.makedirs(os.path.join(directory, "wal"), exist_ok=True)
        dump = subprocess.run(
            ["promtool", "tsdb", "dump", "--match", '{__name__="meter_power_generation_watts"}', directory], capture_output=True, timeout=60
        )
        return self.samples(dump.stdout.decode(), 1000)

    def samples(self, text: str, scale: int = 1) -> dict:
        """The same of OpenMetrics text, or of a dump in ms; no time comes twice."""
        found: dict = {}
        for serial, one, two in re.findall(r'power_generation_watts[{"].*?serial="(\w+)".*?\} (\S+) (\S+)\n', text):
            stamp = int(two) // scale
            self.assertNotIn(stamp, found.setdefault(serial, {}))
            found[serial][stamp] = float(one)
        return found

    def written(self, *frames: bytes) -> str:
        path = os.path.join(self.directory(), "readings")
        with open(path, "w") as file:
            file.writelines(sems.capture_line(0, "127.0.0.1:1", "outbound", "forwarded", data) for data in frames)
        return path

    @staticmethod
    def reading(when: datetime, watts: int, serial: str = METER) -> bytes:
        return frame(sems.BUFFERED, serial=serial, when=when, ranges=[(2105, (0, 1, 0, watts))])

    @unittest.skipUnless(shutil.which("promtool"), "no promtool")
    def test_every_sample_comes_back(self) -> None:
        """In any order, twice, and over both clock changes, each distinct reading is one sample at its own time."""
        changes = (  # in Europe/Berlin, in UTC; hours ahead of UTC before and after
            (datetime(2026, 2, 20, 5), 1, 1),
            (datetime(2026, 3, 29, 1), 1, 2),
            (datetime(2025, 10, 26, 1), 2, 1),
        )
        orders = (  # of the numbers of readings
            ("in order", lambda n: [*range(n)]),
            ("newest first", lambda n: [*reversed(range(n))]),
            ("each twice", lambda n: [i for i in range(n) for _ in (1, 2)]),
            ("newest first, each twice", lambda n: [i for i in reversed(range(n)) for _ in (1, 2)]),
            ("all twice", lambda n: [*range(n)] * 2),
            ("all twice, newest first", lambda n: [*reversed(range(n))] * 2),
        )
        paths, wanted = [], {}
        for change, before, after in changes:
            utc = [change + timedelta(minutes=10 * i) for i in range(-15, 16)]
            local = [when + timedelta(hours=before if when < change else after) for when in utc]
            for name, order in orders:
                serial = f"{len(wanted):08d}"
                frames = [self.reading(local[i], 100 + i, f"91000HKU{serial}") for i in order(len(utc))]
                paths += [self.written(*frames[:13]), self.written(*frames[13:])]
                wanted[serial] = (
                    change,
                    name,
                    {int(when.replace(tzinfo=timezone.utc).timestamp()): 100.0 + i for i, when in enumerate(utc)},
                )
        found = self.imported(self.text(*paths, zone="Europe/Berlin"))
        for serial, (change, name, expected) in wanted.items():
            with self.subTest(change=str(change), order=name):
                self.assertEqual(found[serial], expected)

    def test_random_order(self) -> None:
        """Where no hour is doubtful any order will do."""
        frames = [self.reading(NOON + timedelta(minutes=i), i) for i in range(200)]
        random.Random(5).shuffle(frames)
        self.assertEqual(self.samples(self.text(self.written(*frames))), {METER[-8:]: {self.START + 60 * i: float(i) for i in range(200)}})

    def test_after_kill_9(self) -> None:
        """Every reading that a killed exporter has ACKed is in its file, and a cut last line does no harm."""
        path = os.path.join(self.directory(), "readings")
        process = self.process(
            "--sems.mode=local", "--sems.listen-address=127.0.0.1:0", "--web.listen-address=127.0.0.1:0", f"--sems.backfill={path}"
        )
        frames = [self.reading(NOON + timedelta(minutes=i), i) for i in range(800)]
        device = process.device()
        for start in range(0, 800, 20):
            device.send(b"".join(frames[start : start + 20]))
        acked = len(device.packets(100))
        process.popen.kill()
        acked += len(device.rest()) // ACK_SIZE
        process.popen.wait()
        size = os.path.getsize(path)
        for cut in (0, 40):
            with self.subTest(cut=cut):
                os.truncate(path, size - cut)
                found = self.samples(self.text(path))[METER[-8:]]
                self.assertLessEqual({self.START + 60 * i: float(i) for i in range(acked - bool(cut))}.items(), found.items())

    def test_labels(self) -> None:
        """Series have the labels of /metrics, and those of the scrape where asked for; live readings count too, settings do not."""
        path = self.written(frame(), frame(sems.BUFFERED, 1, INVERTER, ranges=INVERTER_RANGES), frame(sems.SETTINGS))
        code, out, _ = called("backfill", path, "--job=sems", "--instance=pi:14028")
        self.assertEqual(code, 0)
        self.assertIn(
            'meter_power_generation_watts{device="meter",model="HomeKit 1000 Smart Meter",serial="00000042",job="sems",instance="pi:14028"} 2600',
            out,
        )
        self.assertIn("# TYPE meter_energy_generation_decawatt_hours counter\n", out)
        self.assertIn('model="GW3000-DNS-30"', out)


# --------------------------------------------------------------------------------------- simulator, demo and doctor


class SimulatorTest(SocketCase):
    """The simulated house, alone and as a program."""

    def test_a_day_adds_up(self) -> None:
        """Generation less load is export; energy is power over time; totals only rise; a night has no sun."""
        house = sems.House(4)
        start, energy, readings = datetime(2026, 6, 1), {"in": 0.0, "out": 0.0, "sun": 0.0}, []
        meter, inverter = sems.SimulatedMeter(house), sems.SimulatedInverter(house)
        first = None
        for step in range(24 * 12 + 1):
            when = start + timedelta(minutes=5 * step)
            if house.clock:
                for name, power in (("in", -house.export), ("out", house.export), ("sun", house.generation)):
                    energy[name] += max(power, 0) / 12
            house.move(when)
            first = first or dict(house.energy)
            self.assertEqual(house.export, house.generation - house.load)
            for device, family in ((meter, "HK1000"), (inverter, "GRID")):
                data = sems.simulated_frame(device, sems.LIVE, when)
                if data:
                    readings.append((family, sems.reading(family, sems.registers(sems.decode(data, sems.OUTBOUND).clear)).values))
            self.assertEqual(bool(inverter.live()), house.generation > 0)
            self.assertFalse(house.daylight and not 5 < when.hour < 20)
        gained = {name: house.energy[name] - first[name] for name in first}
        for name, flow in (("import", "in"), ("export", "out"), ("generation", "sun")):
            self.assertAlmostEqual(gained[name], energy[flow], places=3)
        self.assertGreater(gained["generation"], 3000)
        held: dict = {}
        for family, values in readings:
            self.assertTrue(values)
            for series, number in values.items():
                if series[0].endswith("_total"):
                    self.assertGreaterEqual(number, held.get((family, series), 0), series)
                    held[family, series] = number

    def test_simulate(self) -> None:
        """simulate HOST:PORT: devices of each house report to an exporter, and SIGINT ends it."""
        running = self.exporter(None, "--sems.mode=local")
        process = self.process("simulate", f"127.0.0.1:{running.port}", "--interval=0.05", "--houses=2")
        until(lambda: running.value("meter_metrics_packets_total") >= 4)
        until(lambda: running.value("sems_mitm_device_up", device="meter") == 2)
        self.assertGreaterEqual(running.value("sems_mitm_acks_total"), 4)
        self.assertEqual(running.value("sems_mitm_rejected_values_total"), 0)
        code, seconds = process.stop(signal.SIGINT)
        self.assertEqual((code, seconds < 5, process.stderr()), (0, True, ""))

    def test_simulated_capture(self) -> None:
        """simulate --capture writes a capture that backfill reads."""
        path = os.path.join(self.directory(), "capture")
        self.assertEqual(called("simulate", "--capture", path, "--days=1", "--interval=1800")[0], 0)
        self.assertGreater(len(open_lines(path)), 48)
        self.assertIn("meter_power_generation_watts{", called("backfill", path)[1])

    def test_demo(self) -> None:
        """demo shows a plausible house within seconds, on this machine's ports alone, and SIGINT ends it with 0."""
        process = self.process("demo")
        text = ""
        while "Ctrl-C" not in text:
            line = process.popen.stdout.readline().decode()
            self.assertTrue(line, process.stderr())
            text += line
        web = int(re.search(r"http://localhost:(\d+)/metrics", text)[1])

        def found() -> dict:
            """Metric to value, once there are those of both devices and the portal has answered."""
            with urllib.request.urlopen(f"http://127.0.0.1:{web}/metrics", timeout=10) as answer:
                got = {series.partition("{")[0]: value for series, value in metrics_of(answer.read().decode()).items()}
            return (
                got
                if got.get("inverter_power_output_watts") and "meter_power_export_watts" in got and got.get("sems_mitm_acks_total")
                else {}
            )

        got = until(found)
        self.assertTrue(0 < got["inverter_power_output_watts"] < 4000, got)
        self.assertLess(got["meter_power_export_watts"], got["meter_power_generation_watts"])
        devices = int(re.search(r"devices -> 127\.0\.0\.1:(\d+)", text)[1])
        self.assertGreater(devices, 0)
        code, seconds = process.stop(signal.SIGINT)
        self.assertEqual((code, seconds < 5, process.stderr()), (0, True, ""))


class DoctorTest(SocketCase):
    """sems_mitm.py doctor."""

    def doctor(self, *arguments: str) -> tuple:
        code, out, err = called("doctor", *arguments)
        self.assertEqual(err, "")
        for line in out.splitlines():
            self.assertRegex(line, r"^(ok|warn|fail) +\S|^ +-> \S|^$|^\d+ ok, \d+ to look at, \d+ to mend$")
        return code, out

    def free(self) -> str:
        """A port that nothing uses, given back."""
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return "127.0.0.1:%d" % sock.getsockname()[1]

    def ports(self, running: Running) -> list:
        return [f"--sems.listen-address=127.0.0.1:{running.port}", f"--web.listen-address=127.0.0.1:{running.web.port}"]

    def test_running_exporter(self) -> None:
        """With exporter, device and portal there is nothing to mend, and the device is told."""
        portal = self.portal()
        running = self.exporter(portal)
        running.device(frame())
        until(lambda: running.value("meter_metrics_packets_total") == 1)
        code, out = self.doctor(*self.ports(running), f"--sems.upstream=127.0.0.1:{portal.port}")
        self.assertEqual(code, 0, out)
        self.assertIn(METER, out)
        self.assertNotIn("fail", out)
        self.assertEqual(out.count("in use, and an exporter runs"), 2)
        self.assertIn("ok    the portal answers", out)

    def test_nothing_runs(self) -> None:
        """Without an exporter it says so, and how to start it; that is no failure."""
        code, out = self.doctor("--sems.mode=local", f"--sems.listen-address={self.free()}", f"--web.listen-address={self.free()}")
        self.assertEqual(code, 0, out)
        self.assertIn("warn  no exporter runs", out)
        self.assertIn("-> start it", out)

    def test_port_in_use(self) -> None:
        """A port that another program has is a failure."""
        portal = self.portal()
        code, out = self.doctor(
            "--sems.mode=local", f"--sems.listen-address=127.0.0.1:{portal.port}", f"--web.listen-address={self.free()}"
        )
        self.assertEqual(code, 1, out)
        self.assertIn("fail  port", out)

    def test_portal_away(self) -> None:
        """A portal that refuses is a failure."""
        portal = self.portal(listening=False)
        code, out = self.doctor(
            f"--sems.upstream=127.0.0.1:{portal.port}", f"--sems.listen-address={self.free()}", f"--web.listen-address={self.free()}"
        )
        self.assertEqual(code, 1, out)
        self.assertIn("fail  the portal at", out)

    def test_running_exporter_that_loops(self) -> None:
        """An exporter that has met itself is a failure, however well the portal seems to answer."""
        for count, wanted in ((0, []), (3, [sems.FAIL])):
            metrics = f'sems_mitm_refused_connections_total{{reason="loop"}} {count}\n'.encode()
            running = {"devices": [{"model": "m", "full_serial": METER, "age_seconds": 1, "up": True}]}
            with mock.patch.object(sems, "local_get", return_value=metrics):
                findings = list(sems.device_findings(sems.serve_settings([], {}), running))
            self.assertEqual([finding.state for finding in findings], [*wanted, sems.OK])

    def test_override_loops(self) -> None:
        """A name that is overridden everywhere is a failure, and the step says what to change."""
        server = NameServer(lambda query: [told(query, "127.0.0.1")])
        self.addCleanup(server.close)
        self.patch(sems, "system_addresses", lambda host, port: [sems.Endpoint(socket.AF_INET, ("127.0.0.1", port))])
        code, out = self.doctor(
            "--sems.upstream=portal.test:1",
            f"--sems.upstream-dns={server.text}",
            f"--sems.listen-address={self.free()}",
            f"--web.listen-address={self.free()}",
        )
        self.assertEqual(code, 1, out)
        self.assertIn("overridden too", out)
        self.assertIn("leads a device nowhere", out)
        self.assertIn("--sems.upstream-dns", out)

    def test_wrong_clock(self) -> None:
        """A clock that is wrong, or a TZ that the system does not know, is a failure."""
        arguments = ("--sems.mode=local", f"--sems.listen-address={self.free()}", f"--web.listen-address={self.free()}")
        self.assertEqual(called("doctor", *arguments, env={"TZ": "Nowhere/Town"})[0], 1)
        self.limits(RELEASED=time.time() + 86400)
        self.assertEqual(self.doctor(*arguments)[0], 1)


# ------------------------------------------------------------------------------------------------------ the browser


class Browser:
    """A headless Chromium, spoken to in the DevTools protocol over two pipes."""

    START = "import fcntl, os, sys\na, b = (fcntl.fcntl(int(x), fcntl.F_DUPFD, 10) for x in sys.argv[1:3])\nos.dup2(a, 3), os.dup2(b, 4)\nos.execvp(sys.argv[3], sys.argv[3:])"
    FLAGS = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--remote-debugging-pipe",
    )

    def __init__(self) -> None:
        self.directory = tempfile.mkdtemp()
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [
            sys.executable,
            "-c",
            self.START,
            str(theirs_in),
            str(theirs_out),
            "chromium",
            *self.FLAGS,
            f"--user-data-dir={self.directory}",
            "about:blank",
        ]
        self.popen = subprocess.Popen(command, pass_fds=(theirs_in, theirs_out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs_in), os.close(theirs_out)
        self._buffer, self._number, self.events, self._session = b"", 0, [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _message(self) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], 15)[0]:
                raise AssertionError("the browser says nothing")
            data = os.read(self._in, 1 << 16)
            if not data:
                raise AssertionError("the browser has gone")
            self._buffer += data
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def call(self, method: str, **parameters) -> dict:
        self._number += 1
        session = {"sessionId": self._session} if self._session else {}
        os.write(self._out, json.dumps({"id": self._number, "method": method, "params": parameters, **session}).encode() + b"\0")
        while True:
            message = self._message()
            if message.get("id") == self._number:
                return message.get("result", message)
            self.events.append(message)

    def show(self, url: str, width: int, height: int) -> None:
        """Load a page in a window of this size."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def value(self, expression: str):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def complaints(self) -> list:
        """What the console says."""
        return [
            event
            for event in self.events
            if event["method"]
            in (
                "Log.entryAdded",
                "Runtime.exceptionThrown",
                "Runtime.consoleAPICalled",
                "Network.loadingFailed",
                "Page.javascriptDialogOpening",
            )
        ]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.write(self._out, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        try:
            self.popen.wait(5)
        except subprocess.TimeoutExpired:
            self.popen.kill()
            self.popen.wait()
        os.close(self._in), os.close(self._out)
        shutil.rmtree(self.directory, ignore_errors=True)


@unittest.skipUnless(shutil.which("chromium"), "no chromium")
class BrowserTest(SocketCase):
    """The page in a browser."""

    def test_page(self) -> None:
        """Without devices and with some, of hostile names too: no scrolling sideways, no complaint, names as text."""
        running = self.exporter(None, "--sems.mode=local")
        browser = Browser()
        self.addCleanup(browser.close)
        serials = [METER, HOSTILE, "W" * 16, INVERTER]
        for devices in (False, True):
            if devices:
                device = running.device()
                for serial in serials[1:]:
                    device.send(
                        frame(
                            sems.SETTINGS,
                            1,
                            serial,
                            ranges=[(40173, sems.text_words(HOSTILE_MODEL + "WWWW", 16)), (30221, sems.text_words("M" * 12, 6))],
                        )
                    )
                    device.send(frame(cls=1, serial=serial, ranges=[*INVERTER_RANGES, (35180, (5000, 1))]))
                device.send(frame())
                until(lambda: running.value("sems_mitm_device_up") == 4 and running.value("inverter_power_output_watts") == 3 * 1051)
            for width, height in ((360, 800), (1280, 800)):
                with self.subTest(devices=devices, width=width):
                    browser.show(f"http://127.0.0.1:{running.web.port}/", width, height)
                    self.assertEqual(browser.complaints(), [])
                    self.assertLessEqual(browser.value("document.documentElement.scrollWidth"), width)
                    widest = browser.value(
                        "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
                    )
                    self.assertLessEqual(widest, width)
                    self.assertEqual(browser.value("document.images.length + document.scripts.length"), 0)
                    text = browser.value("document.body.innerText")
                    if devices:
                        for wanted in (*serials, HOSTILE_MODEL):
                            self.assertIn(wanted, text)
                        self.assertEqual(browser.value("document.querySelectorAll('section').length"), 4)
                    else:
                        self.assertIn("No device", text)


class DashboardTest(unittest.TestCase):
    """dashboard.json."""

    WORDS = {
        "by",
        "without",
        "on",
        "ignoring",
        "group_left",
        "group_right",
        "bool",
        "and",
        "or",
        "unless",
        "offset",
        "start",
        "end",
        "inf",
        "nan",
    }

    def expressions(self, node) -> list:
        """(place, text) of every query, also of variables and annotations."""
        if isinstance(node, dict):
            node = {
                key: value
                for key, value in node.items()
                if node.get("type") != "datasource" and node.get("type") not in ("custom", "constant", "textbox")
            }
            own = [node[key] for key in ("expr", "definition", "query") if isinstance(node.get(key), str)]
            return own + [text for value in node.values() for text in self.expressions(value)]
        return [text for value in node for text in self.expressions(value)] if isinstance(node, list) else []

    def test_metrics_exist(self) -> None:
        """Every metric that a panel or a variable asks for is one of the exporter's."""
        with open(os.path.join(os.path.dirname(os.path.abspath(sems.__file__)), "dashboard.json"), encoding="utf-8") as file:
            expressions = self.expressions(json.load(file))
        self.assertGreater(len(expressions), 20)
        asked = set()
        for text in expressions:
            bare = re.sub(r'"[^"]*"|\$?\{[^}]*\}|\[[^\]]*\]|\$\w+|\b\d+[smhdwy]\b', " ", text)
            bare = re.sub(r"\b(by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", bare)
            bare = re.sub(r"label_values\(\s*([a-z]\w*)\s*(,[^)]*)?\)", r" \1 ", bare)
            asked |= {
                word
                for word in re.findall(r"[a-zA-Z_:][\w:]*(?!\w|\s*\()", bare)
                if word.lower() not in self.WORDS and not re.fullmatch(r"\d.*", word)
            }
        self.assertGreater(len(asked), 20)
        self.assertEqual(asked - set(sems.METRICS), set())


# ------------------------------------------------------------------------------------------------- the project's files


def markdown(heads: tuple[str, ...], rows) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def flags_table() -> str:
    rows = []
    for name, default, reader, _, text in sems.FLAGS:
        spelled = f"`--{name}` / `--no-{name}`" if reader is sems.boolean else f"`--{name}`"
        rows.append(
            (spelled, f"`{sems.variable(name)}`", f"`{default}`" if default else "(all)" if reader is sems.networks else "(off)", text)
        )
    return markdown(("flag", "variable", "default", "meaning"), rows)


def metrics_table() -> str:
    """A row a metric: what it is, its labels, in which family and how well known its registers are."""
    found: dict[str, dict] = {}
    for family, rows in sems.FAMILIES.items():
        for register, _, _, metric, labels, text, evidence, *_ in rows:
            told = found.setdefault(metric, {"text": text, "labels": {}, "families": {}})
            if labels:
                name, value = labels.split("=")
                told["labels"].setdefault(name, []).append(value.strip('"'))
            told["families"].setdefault(family, set()).add(evidence)
            told.setdefault("register", register)
    rows = []
    for metric, told in sorted(found.items()):
        labels = "; ".join(f"{name} {', '.join(dict.fromkeys(values))}" for name, values in told["labels"].items())
        seen = "; ".join(f"{family}: {', '.join(sorted(evidence))}" for family, evidence in told["families"].items())
        rows.append((f"`{metric}`", sems.METRICS[metric][0], labels, told["text"], seen))
    return markdown(("metric", "type", "label", "meaning", "known from"), rows)


def internals_table() -> str:
    return markdown(
        ("metric", "type", "labels", "meaning"), [(f"`{name}`", kind, labels, text) for name, kind, labels, text in sems.INTERNALS]
    )


TABLES = {"flags": flags_table, "metrics": metrics_table, "internals": internals_table}


def with_tables(text: str) -> str:
    """The README with its tables as the code has them."""
    for name, table in TABLES.items():
        text = re.sub(rf"(?s)(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda match, table=table: match[1] + table() + match[2], text)
    return text


class Files(unittest.TestCase):
    def read(self, name: str) -> str:
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            return file.read()

    def test_readme_tables(self):
        """The README's flags and metrics are those of the code; `make tables` writes them."""
        text = self.read("README.md")
        for name in TABLES:
            self.assertEqual(text.count(f"<!-- {name} -->"), 1, name)
        self.assertEqual(with_tables(text), text)

    def test_readme_names(self):
        """Every metric, flag and file that the README's prose and snippets name exists."""
        text = self.read("README.md")
        for flag in set(re.findall(r"--((?:sems|web|metrics|log)[.-][a-z.-]+)", text)):
            self.assertIn(flag.rstrip(".").replace("no-", ""), [name for name, *_ in sems.FLAGS], flag)
        for metric in set(
            re.findall(r"\b(?:sems_mitm|meter|inverter|battery)_[a-z_]+_(?:total|watts|seconds|bytes|info|up|ratio|volts)\b", text)
        ):
            self.assertIn(metric, sems.METRICS)

    def test_alerts(self):
        """The README's alert rules are about metrics that there are."""
        rules = self.read("README.md").split("<!-- alerts -->")[1].split("<!-- /alerts -->")[0]
        self.assertGreaterEqual(rules.count("alert:"), 9)

    def test_layout(self):
        """The top level holds six files; everything else is hidden."""
        there = {name for name in os.listdir(HERE) if not name.startswith(".") and name != "__pycache__"}
        self.assertEqual(there, {"sems_mitm.py", "test_sems_mitm.py", "Makefile", "Dockerfile", "dashboard.json", "README.md"})

    def test_standard_library_alone(self):
        """The program imports nothing but the standard library, and neither simulator nor doctor is needed to serve."""
        source = self.read("sems_mitm.py")
        names = set(re.findall(r"^(?:import|from) (\w+)", source, re.M)) - {"__future__"}
        if sys.version_info >= (3, 10):
            self.assertLessEqual(names, sys.stdlib_module_names)
        self.assertNotIn("import *", source)


# ------------------------------------------------------------------------------------------------------ bench and soak


class Sink:
    """A portal that counts bytes and never answers."""

    def __init__(self) -> None:
        self.bytes, self.listening = 0, socket.create_server(("127.0.0.1", 0))
        self.port = self.listening.getsockname()[1]
        self.selector = sems.selectors.DefaultSelector()
        self.selector.register(self.listening, sems.selectors.EVENT_READ)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        buffer = bytearray(1 << 20)
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listening:
                    sock, _ = self.listening.accept()
                    self.selector.register(sock, sems.selectors.EVENT_READ)
                    continue
                count = 0
                with contextlib.suppress(OSError):
                    count = key.fileobj.recv_into(buffer)
                self.bytes += count
                if not count:
                    self.selector.unregister(key.fileobj)
                    key.fileobj.close()


PLAIN_RELAY = """
import selectors, socket, sys
listening, selector = socket.create_server(("127.0.0.1", 0)), selectors.DefaultSelector()
print(listening.getsockname()[1], flush=True)
selector.register(listening, 1, None)
while True:
    for key, _ in selector.select():
        if key.data is None:
            device, _ = listening.accept()
            portal = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
            for one, other in ((device, portal), (portal, device)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                selector.register(one, 1, other)
        elif data := key.fileobj.recv(262144):
            key.data.sendall(data)
        else:
            for one in (key.fileobj, key.data):
                selector.unregister(one)
                one.close()
            break
"""


class Program:
    """The exporter as a process of its own, on free ports."""

    def __init__(self, portal: int, *more: str) -> None:
        self.ports = [free_port(), free_port()]
        flags = [f"--sems.listen-address=127.0.0.1:{self.ports[0]}", f"--web.listen-address=127.0.0.1:{self.ports[1]}"]
        flags += [f"--sems.upstream=127.0.0.1:{portal}", "--log.level=error", *more]
        self.process = subprocess.Popen([sys.executable, "-I", os.path.join(HERE, "sems_mitm.py"), *flags])
        until(lambda: self.get("/-/ready"), 20)

    def get(self, path: str = "/metrics") -> str:
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.ports[1]}{path}", timeout=30) as answer:
                return answer.read().decode()
        return ""

    def value(self, metric: str) -> float:
        """The sum of a metric's samples, or of those with the labels given."""
        name, _, labels = metric.rstrip("}").partition("{")
        wanted = labels.split(",") if labels else []
        lines = (line for line in self.get().splitlines() if line.startswith((f"{name}{{", f"{name} ")))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if all(part in line for part in wanted))

    def memory(self) -> float:
        """Resident, in MB."""
        with open(f"/proc/{self.process.pid}/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    def cpu(self) -> float:
        """Seconds of processor time, of all threads."""
        total = 0
        for thread in os.listdir(f"/proc/{self.process.pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{self.process.pid}/task/{thread}/schedstat") as file:
                total += int(file.read().split()[0])
        return total / 1e9

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def device(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.ports[0]), timeout=30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def numbered(prefix: str, number: int) -> str:
    return f"{prefix}{number:08d}"


def load(number: int, mixed: bool) -> list[bytes]:
    """A stretch of a connection's frames: live packets of a HomeKit 1000, or of everything in any order."""
    meter, inverter = numbered("91000HKU", number), numbered("53000DSC", number)
    times = [NOON + timedelta(minutes=i) for i in range(40)]
    live = [
        frame(serial=meter, when=when, ranges=[*METER_RANGES, (5376, (25600, i, 0, 65)), (5632, (2,) * 12)]) for i, when in enumerate(times)
    ]
    if not mixed:
        return live
    frames = live[:16] + [frame(sems.BUFFERED, serial=meter, when=when) for when in times[:5]] + [frame(sems.SETTINGS, serial=meter)]
    frames += [frame(cls=1, serial=inverter, when=when, ranges=[*INVERTER_RANGES, (30163, (3806,) * 60)]) for when in times[:16]]
    frames += [frame(sems.CONFIRMATION, serial=meter)]
    random.Random(number).shuffle(frames)
    return frames


def burst(port: int, sink: Sink, connections: int, mixed: bool, total: int) -> float:
    """Packets a second through a relay that listens on port, sent as fast as it takes them."""
    streams, packets = [], 0
    for number in range(connections):
        frames = load(number, mixed)
        times = max(total // connections // len(frames), 1)
        streams.append(memoryview(b"".join(frames) * times))
        packets += times * len(frames)
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in streams]
    selector, goal = sems.selectors.DefaultSelector(), sink.bytes + sum(map(len, streams))
    for number, sock in enumerate(sockets):
        sock.setblocking(False)
        selector.register(sock, sems.selectors.EVENT_WRITE, number)
    begin = time.perf_counter()
    while selector.get_map():
        for key, _ in selector.select():
            with contextlib.suppress(BlockingIOError):
                streams[key.data] = streams[key.data][key.fileobj.send(streams[key.data][:262144]) :]
            if not streams[key.data]:
                selector.unregister(key.fileobj)
    until(lambda: sink.bytes >= goal, 60)
    seconds = time.perf_counter() - begin
    for sock in sockets:
        sock.close()
    return packets / seconds


def latencies(port: int, listening: socket.socket, count: int, pause: float) -> list[float]:
    """One-way times of single packets through a relay to a portal of ours, in s, sorted."""
    device = socket.create_connection(("127.0.0.1", port))
    device.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    frames, found = load(0, False), []
    device.sendall(frames[0])
    portal, _ = listening.accept()
    portal.recv(len(frames[0]), socket.MSG_WAITALL)
    for i in range(count):
        time.sleep(pause)
        begin = time.perf_counter()
        device.sendall(frames[i % len(frames)])
        portal.recv(len(frames[0]), socket.MSG_WAITALL)
        found.append(time.perf_counter() - begin)
    device.close()
    portal.close()
    return sorted(found)


def median(numbers) -> float:
    return sorted(numbers)[len(numbers) // 2]


def seconds_of(*command: str, times: int = 11) -> float:
    """The median time of a whole process."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found.append(time.perf_counter() - begin)
    return median(found)


def bench() -> int:
    """Print a table of figures beside their goals; ratios are of one run."""
    rows: list[tuple[str, str, str]] = []

    def row(figure: str, now: str, goal: str) -> None:
        rows.append((figure, now, goal))
        print(f"{figure:58} {now:>28}   goal {goal}", flush=True)

    frames = load(0, False) * 50
    rates = []
    for _ in range(5):
        begin = time.perf_counter()
        for one in frames:
            sems.crc16(one[:-2])
        rates.append(len(frames) / (time.perf_counter() - begin))
    yardstick = max(rates)
    row("Yardstick: CRC by byte table, packets/s", f"{yardstick:,.0f}", "-")
    sink = Sink()
    relay = subprocess.Popen([sys.executable, "-I", "-c", PLAIN_RELAY, str(sink.port)], stdout=subprocess.PIPE, text=True)
    relay_port = int(relay.stdout.readline())
    program = Program(sink.port)
    idle = program.memory()
    plain = burst(relay_port, sink, 1, False, 200_000)
    row("Plain relay without decoding, 1 connection, packets/s", f"{plain:,.0f}", "-")
    for mixed in False, True:
        for connections in 1, 4, 50:
            rate = max(burst(program.ports[0], sink, connections, mixed, 100_000) for _ in range(3))
            what = "every kind, mixed" if mixed else "equal frames"
            row(
                f"{what}, {connections} connection{'s' * (connections > 1)}, packets/s",
                f"{rate:,.0f} ({rate / yardstick:.1f} x)",
                f">= {1.3 if mixed else 3} x yardstick",
            )
            if connections == 1 and not mixed:
                row("Memory over idle after 300,000 packets, MB", f"{program.memory() - idle:.1f}", "<= 6")
    after = program.memory()
    burst(program.ports[0], sink, 50, True, 100_000)
    row("Memory that another 100,000 packets add, MB", f"{program.memory() - after:.1f}", "flat")
    program.stop()
    bench_latency(row, relay_port)
    relay.terminate()
    relay.wait()
    bench_memory(row, sink)
    bench_start(row, sink)
    bench_scrape(row, sink)
    bench_idle(row, sink)
    print("\n" + markdown(("figure", "now", "goal"), rows))
    return 0


def bench_latency(row, relay_port: int) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    relay = subprocess.Popen([sys.executable, "-I", "-c", PLAIN_RELAY, str(listening.getsockname()[1])], stdout=subprocess.PIPE, text=True)
    relay_port = int(relay.stdout.readline())
    program = Program(listening.getsockname()[1])
    added = [
        median(latencies(program.ports[0], listening, 400, 0.005)) - median(latencies(relay_port, listening, 400, 0.005)) for _ in range(3)
    ]
    row("Added one-way time over a plain relay at 200/s, p50, µs", f"{median(added) * 1e6:.0f}", "<= 30")
    relay.terminate()
    relay.wait()
    sink = Sink()
    other = Program(sink.port)
    for number in range(256):
        with other.device() as device:
            device.sendall(load(number, False)[0])
    other.stop()
    for number in range(255):
        with program.device() as device:
            device.sendall(load(number, False)[0])
            listening.accept()[0].close()
    stop = threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            program.get()

    calm = latencies(program.ports[0], listening, 400, 0.002)[-1]
    scraper = threading.Thread(target=scrape)
    scraper.start()
    busy = latencies(program.ports[0], listening, 400, 0.002)[-1]
    stop.set()
    scraper.join()
    row("Slowest packet while 256 devices are scraped all the time, ms more", f"{(busy - calm) * 1e3:.1f}", "< 20")
    program.stop()


def bench_memory(row, sink: Sink) -> None:
    code = 'import http.server, selectors, argparse, logging; compile(open("sems_mitm.py").read(), "x", "exec"); print(open("/proc/self/statm").read().split()[1])'
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=HERE, check=True, stdout=subprocess.PIPE, text=True)
    imports = int(done.stdout) * os.sysconf("SC_PAGE_SIZE") / 1e6
    program = Program(sink.port, "--sems.max-devices=1001", "--sems.max-connections=1001", "--sems.mode=local")
    idle, descriptors = program.memory(), program.descriptors()
    row("Resident idle, MB (over imports and compiling)", f"{idle:.1f} ({idle - imports:+.1f})", "<= +3")
    for number in range(1000):
        with program.device() as device:
            device.sendall(load(number, False)[0])
            device.recv(58)
    until(lambda: program.descriptors() <= descriptors)
    known = program.memory()
    program.get()
    row("A known device without connection, KB (once scraped)", f"{known - idle:.1f} ({program.memory() - idle:.1f})", "<= 8")
    known = program.memory()
    devices = [program.device() for _ in range(50)]
    for number, device in enumerate(devices):
        device.sendall(b"".join(load(number, False)))
        left = 58 * 40
        while left:
            left -= len(device.recv(left))
    row("A busy connection, KB", f"{max(program.memory() - known, 0) * 1e3 / 50:.1f}", "<= 64")
    for device in devices:
        device.close()
    program.stop()


def bench_start(row, sink: Sink) -> None:
    compiling = f"import http.server, argparse, selectors; compile(open({os.path.join(HERE, 'sems_mitm.py')!r}).read(), 'x', 'exec')"
    base = seconds_of(sys.executable, "-I", "-c", compiling)
    version = seconds_of(sys.executable, "-I", os.path.join(HERE, "sems_mitm.py"), "version")
    row("`version`, ms (over imports and compiling)", f"{version * 1e3:.0f} ({version / base:.2f} x)", "<= 1.4 x")
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        program = Program(sink.port)
        program.get()
        found.append(time.perf_counter() - begin)
        program.stop()
    row("First /metrics after the start, ms", f"{median(found) * 1e3:.0f}", "< 150")


def bench_scrape(row, sink: Sink) -> None:
    program = Program(sink.port, "--sems.max-devices=1001", "--sems.mode=local")
    changed, same = [], []
    for round_ in range(3):
        for number in range(1000):
            with program.device() as device:
                device.sendall(load(number, False)[round_])
                device.recv(58)
        for times in changed, same:
            begin = time.perf_counter()
            size = len(program.get())
            times.append(time.perf_counter() - begin)
    row(f"Scrape of 1000 devices, {size / 1e6:.1f} MB, all changed, ms", f"{min(changed) * 1e3:.0f}", "< 50")
    row("Scrape of 1000 devices, none changed, ms", f"{min(same) * 1e3:.0f}", "< 15")
    program.stop()


def bench_idle(row, sink: Sink, seconds: int = 30) -> None:
    program = Program(sink.port)
    devices = [program.device() for _ in range(10)]
    frames = [load(number, False)[0] for number in range(10)]
    for device, one in zip(devices, frames):
        device.sendall(one)
    until(lambda: program.value("sems_mitm_packets_total") == 10)
    before = program.cpu()
    for i in range(seconds // 6):
        devices[i].sendall(frames[i])
        time.sleep(6)
    row("Ten devices, a packet a minute each: % of a core", f"{(program.cpu() - before) / seconds * 100:.3f}", "< 0.05")
    program.stop()


class SoakPortal:
    """A portal that answers everything, until it is told to go away; it remembers every good frame."""

    def __init__(self) -> None:
        self.seen: dict[bytes, int] = {}
        self.port, self.listening, self.open = free_port(), None, set()
        self.lock = threading.Lock()

    def come(self) -> None:
        self.listening = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self.accept, args=(self.listening,), daemon=True).start()

    def go(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        with self.lock:
            for sock in self.open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listening.accept()
                threading.Thread(target=self.talk, args=(sock,), daemon=True).start()

    def talk(self, sock: socket.socket) -> None:
        framer = sems.Framer(sems.OUTBOUND)
        with self.lock:
            self.open.add(sock)
        with contextlib.suppress(OSError), sock:
            while data := sock.recv(65536):
                for piece in framer.feed(data, 0):
                    if piece.kind != "frame":
                        continue
                    for at in range(0, len(piece.data), piece.size):
                        one = piece.data[at : at + piece.size]
                        with self.lock:
                            self.seen[one] = self.seen.get(one, 0) + 1
                    where = sems.address(piece.data[: min(30, piece.size)], piece.size, sems.OUTBOUND)
                    sock.sendall(sems.answer(where, datetime.now(), True) * piece.count)
        with self.lock:
            self.open.discard(sock)


class SoakDevice(threading.Thread):
    """A device that connects, sends, stalls, dies and sends junk; it remembers what was acknowledged."""

    def __init__(self, number: int, port: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.random, self.serial, self.port, self.stop = random.Random(number), numbered("91000HKU", number), port, stop
        self.acked: list[bytes] = []
        self.sent = self.count = 0

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
                    self.live(sock)
            except OSError:
                self.stop.wait(0.2)

    def live(self, sock: socket.socket) -> None:
        back = sems.Framer(sems.INBOUND)
        for _ in range(self.random.randrange(1, 60)):
            if self.stop.is_set():
                return
            what, batch = self.random.random(), []
            for _ in range(self.random.choice((1, 1, 1, 5, 40))):
                self.count += 1
                batch.append(frame(serial=self.serial, when=NOON, ranges=[(2048, (0, self.count >> 16, self.count & 0xFFFF))]))
            data = b"".join(batch)
            if what < 0.05:
                sock.sendall(self.random.randbytes(500) if hasattr(self.random, "randbytes") else b"junk" * 100)
            if what > 0.97:
                sock.sendall(data[: len(data) // 2])  # and it dies
                return
            sock.sendall(data)
            self.sent += len(batch)
            sock.settimeout(5)
            left = list(batch)
            while left:
                got = sock.recv(65536)
                if not got:
                    return
                for piece in back.feed(got, 0):
                    if piece.kind == "frame":
                        self.acked += left[: piece.count]
                        del left[: piece.count]
            self.stop.wait(self.random.choice((0.01, 0.05, 0.5)))


def soak(minutes: float) -> int:
    """Trouble for some minutes in mode spool, then a verdict: memory, descriptors, nothing acknowledged is lost."""
    portal, stop = SoakPortal(), threading.Event()
    portal.come()
    program = Program(portal.port, "--sems.mode=spool")
    descriptors = program.descriptors()
    devices = [SoakDevice(number, program.ports[0], stop) for number in range(20)]
    for device in devices:
        device.start()
    chance, begin, memory, scrapes, there, worst = random.Random(0), time.monotonic(), [], 0, True, 0.0
    while time.monotonic() - begin < minutes * 60:
        time.sleep(1)
        started = time.monotonic()
        assert program.get(), "the exporter does not answer"
        worst = max(worst, time.monotonic() - started)
        scrapes += 1
        memory.append((time.monotonic() - begin, program.memory()))
        if chance.random() < (0.05 if there else 0.2):
            there = not there
            portal.come() if there else portal.go()
        if scrapes % 60 == 0:
            acked = sum(len(device.acked) for device in devices)
            print(
                f"{scrapes // 60:4} min, {memory[-1][1]:.1f} MB, {acked:,} packets acknowledged, {program.value('sems_mitm_queue_bytes'):,.0f} bytes waiting",
                flush=True,
            )
    stop.set()
    for device in devices:
        device.join(20)
    if not there:
        portal.come()
    until(lambda: program.value("sems_mitm_queue_bytes") == 0 and program.value("sems_mitm_device_connections") == 0, 150)
    until(lambda: program.descriptors() <= descriptors + 1, 30)
    acked = [one for device in devices for one in device.acked]
    dropped = program.value("sems_mitm_queue_dropped_packets_total")
    lost = sum(one not in portal.seen for one in acked)
    given = program.value("sems_mitm_acks_total")
    counted = program.value('sems_mitm_packets_total{direction="outbound",type="0304"}')
    tenth = next((size for when, size in memory if when >= min(600, minutes * 30)), memory[-1][1])
    growth = program.memory() - tenth
    print(
        f"{minutes:g} minutes, {scrapes} scrapes (slowest {worst * 1e3:.0f} ms), {len(acked):,} packets acknowledged, {counted:,.0f} counted, {given:,.0f} ACKs,"
    )
    print(
        f"{lost} lost, {dropped:.0f} dropped by the 1 MiB bound, descriptors {descriptors} -> {program.descriptors()}, memory {tenth:.1f} MB -> {program.memory():.1f} MB"
    )
    fine = lost <= dropped and growth <= 2 and given == counted >= len(acked)
    program.stop()
    print("soak:", "passed" if fine else "FAILED")
    return 0 if fine else 1


def main() -> None:
    command = sys.argv[1:2]
    if command == ["bench"]:
        sys.exit(bench())
    if command == ["soak"]:
        sys.exit(soak(float(sys.argv[2]) if len(sys.argv) > 2 else 20))
    if command == ["tables"]:
        path = os.path.join(HERE, "README.md")
        with open(path, encoding="utf-8") as file:
            text = with_tables(file.read())
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
        return
    unittest.main()


if __name__ == "__main__":
    main()
