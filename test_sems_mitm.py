"""Tests of sems_mitm, in the order of its file: tables for the pure rooms, then real sockets, processes and faults.

make test                          all of it
python3 -m unittest -k Framer      what matches

Sockets are on free ports of the loopback interface, or in network namespaces of the test's own. A state is waited for,
never slept for. TEST_PATIENCE=120 waits longer for it than 30 s; TEST_KILLS=100 kills the exporter so often in the test
of the spool's file; TEST_SLOW=1 tries with the real limits what takes minutes.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import ctypes
import functools
import gzip
import hashlib
import html
import http.client
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import py_compile
import random
import re
import select
import selectors
import shutil
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
import zlib
from datetime import datetime, timedelta, timezone
from unittest import mock

import sems_mitm as sems

# --------------------------------------------------------------------------------------------------------- frames

OUT, IN = sems.OUTBOUND, sems.INBOUND
METER, OTHER, INVERTER, HYBRID = (
    "91000HKU00000042",
    "91000HKU00000043",
    "53000DSC00000042",
    "9010KETU00000042",
)  # made up
NOON = datetime(2026, 3, 21, 12, 0, 0)
BERLIN = "CET-1CEST,M3.5.0,M10.5.0/3"
METER_RANGES = [
    (2048, (0, 0, 1, 0, 0, 2, *[0] * 6, 0, 0, 3, *[0] * 9)),
    (2096, (2400, 2401, 0, *[0] * 6, 0, 1500, 0, 2600, 0, 0, 0, 4100)),
]
INVERTER_RANGES = [(30103, (3347, 31)), (30127, (0, 1051, 1)), (30144, (209, 0, 20642, 0, 1667))]
ACK_SIZE = 58


def frame(
    function: int = sems.LIVE, cls: int = sems.METER, serial: str = METER, when=NOON, ranges=None, clear=None
) -> bytes:
    """A device's frame; ranges are (first register, words), clear text beats them."""
    stamp = sems.time_stamp(when)
    iv = sems.device_iv(stamp)
    if function == sems.CONFIRMATION:
        clear, stamp = clear or struct.pack(">HHB11s", 0x1216, 0x1218, 0, b"\xff" * 11), b""
    elif clear is None:
        clear = sems.payload(METER_RANGES if ranges is None else ranges)
    return sems.encode(sems.Packet(OUT, f"{cls:02x}{function:02x}", serial, iv, stamp, clear))


def portal_frame(kind: str, clear: bytes = bytes(16), serial: str = METER, when=NOON) -> bytes:
    """A portal's frame with any clear text; without one an ACK."""
    return sems.encode(sems.Packet(IN, kind, serial, sems.device_iv(sems.time_stamp(when)[::-1]), b"", clear))


def ack_of(data: bytes, status: int = 0) -> bytes:
    """The portal's ACK (2: NACK) of a device's frame."""
    return portal_frame(data[10:12].hex(), bytes([status]) + bytes(15), data[14:30].decode())


def minute(count: int) -> datetime:
    return NOON + timedelta(minutes=count)


def frames_of(count: int, **more) -> list:
    """Frames of a device, a minute apart; no two are the same."""
    return [frame(when=minute(i), **more) for i in range(count)]


def cheap_frames(count: int, size: int = 1024, serial: str = METER) -> list:
    """Buffered readings that nobody can read, made fast; no two are the same."""
    head = frame(sems.BUFFERED, serial=serial, clear=bytes(16))[:52]
    bodies = (with_length(head + i.to_bytes(4, "big") * (size // 4) + b"..") for i in range(count))
    return [with_crc(body) for body in bodies]


def with_length(data: bytes, wire=OUT) -> bytes:
    """data with its length field made right."""
    at = len(wire.prefix)
    return data[:at] + (len(data) - wire.overhead).to_bytes(4, "big") + data[at + 4 :]


def with_crc(data: bytes, wire=OUT) -> bytes:
    """data with its last two bytes the right CRC."""
    return data[:-2] + sems.crc16(data[:-2]).to_bytes(2, wire.order)


def spoilt(data: bytes) -> bytes:
    """A frame with a bad CRC."""
    return data[:-1] + bytes([data[-1] ^ 0x55])


def random_cuts(data: bytes, rng: random.Random, most: int = 300) -> list:
    """data in pieces of random sizes."""
    parts, at = [], 0
    while at < len(data):
        size = rng.randint(1, most)
        parts.append(data[at : at + size])
        at += size
    return parts


# Frames made with OpenSSL's AES, independently of this project, and the metrics that they must become.
VECTORS = json.loads(r"""[
{"name": "HomeKit 1000, importing at night", "direction": "outbound", "hex": "504f5354475700000099030400003931303030484b5530303030303034321a03150d0e0f000000000000000000001a03150d0e0f68936522af3387af67864290c79bcffec8fb93d30c42a54e0fbd4d7dddaa8dc4be43c60fb4b3bd5756fdb6ffb40022e4c57e4ff114d5e2321f45f2cceff9e36d33b5f0d7c7ec2a41e263d4d83802266520f5cf47f7995bfa8a01e401be5c62e0a8c2bb48d2ad8f9381dc0e4c5470040baa8e", "metrics": [{"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"1\"", "value": 1234560.0}, {"metric": "meter_energy_export_decawatt_hours_total", "labels": "", "value": 123456.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"2\"", "value": 2345670.0}, {"metric": "meter_energy_generation_decawatt_hours_total", "labels": "", "value": 234567.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_sum_of_energy_generation_and_export_decawatt_hours_total", "labels": "", "value": 300000.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"1\"", "value": 655370.0}, {"metric": "meter_energy_import_decawatt_hours_total", "labels": "", "value": 65537.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"2\"", "value": 120.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_sum_of_energy_import_less_generation_decawatt_hours_total", "labels": "", "value": 70000.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"1\"", "value": 239.8}, {"metric": "meter_voltage_volts", "labels": "channel=\"2\"", "value": 240.1}, {"metric": "meter_voltage_volts", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_current_amperes", "labels": "channel=\"1\"", "value": 5.12}, {"metric": "meter_current_amperes", "labels": "channel=\"2\"", "value": 10.33}, {"metric": "meter_current_amperes", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"1\"", "value": -1234.0}, {"metric": "meter_power_export_watts", "labels": "", "value": -1234.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"2\"", "value": -7.0}, {"metric": "meter_power_generation_watts", "labels": "", "value": -7.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_sum_of_power_generation_and_export_watts", "labels": "", "value": -1241.0}]},
{"name": "HomeKit 3000", "direction": "outbound", "hex": "504f5354475700000099030400003933303030484b5530303030303034321a03150d0e0f000000000000000000001a03150d0e0f68936522af3387af67864290c79bcffec8fb93d30c42a54e0fbd4d7dddaa8dc4be43c60fb4b3bd5756fdb6ffb40022e4c57e4ff114d5e2321f45f2cceff9e36de96e32f70ec944c6bbecc6d97c19bdec3af5594a2b9d2318d1ddd871324b566ab55688c83e7e219d1aeb87e4e8664cefecba", "metrics": [{"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"1\"", "value": 1234560.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"2\"", "value": 2345670.0}, {"metric": "meter_channel_energy_export_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_energy_export_decawatt_hours_total", "labels": "", "value": 300000.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"1\"", "value": 655370.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"2\"", "value": 120.0}, {"metric": "meter_channel_energy_import_watthours_total", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_energy_import_decawatt_hours_total", "labels": "", "value": 70000.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"1\"", "value": 239.8}, {"metric": "meter_voltage_volts", "labels": "channel=\"2\"", "value": 240.1}, {"metric": "meter_voltage_volts", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_current_amperes", "labels": "channel=\"1\"", "value": 5.12}, {"metric": "meter_current_amperes", "labels": "channel=\"2\"", "value": 10.33}, {"metric": "meter_current_amperes", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"1\"", "value": 150.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"2\"", "value": -400.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"3\"", "value": 90.0}, {"metric": "meter_power_export_watts", "labels": "", "value": -160.0}]},
{"name": "HomeKit 1000, buffered", "direction": "outbound", "hex": "504f5354475700000099034500003931303030484b5530303030303034321a03150d0e0f000000000000000000001a03150d0e0f68936522af3387af67864290c79bcffec8fb93d30c42a54e0fbd4d7dddaa8dc4be43c60fb4b3bd5756fdb6ffb40022e4c57e4ff114d5e2321f45f2cceff9e36d7c4ad3a1c0fe8f3e00f91c12f6339c554a0a8d61f069c59c20d3d49f2b34207484acae8d84ce79cc81aa9b0b4f5afa319421", "metrics": null},
{"name": "DNS G3", "direction": "outbound", "hex": "504f53544757000000c901040000353330303044534330303030303034321a03150d0e0f000000000000000000001a03150d0e0fd442c78639fa14ed47a9991d29d86e79bbc7ce3692c259750d3f7ccb891a0f22587df0d91be86fb8b25c83f82fbeb98b503364428cc985bf5d7854780752220b40424a413c3d3c08a98944d3f10a1661547940a63692cb8afcbc40b5857f985d585c7465f8e11bd45d0dbc7866f5b2795facc1996b83521237837d8a8f6dd1613aa282d9917b8807c7082c75df08675532c9de452c730f7d6289e02e20ac25d27d00", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 3120.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 312.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 52.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 5.2}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 305.5}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 4.7}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2361.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 236.1}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 132.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 13.2}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5003.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.03}, {"metric": "inverter_power_output_watts", "labels": "", "value": 3071.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 3119.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": -544.0}, {"metric": "inverter_power_factor_ratio", "labels": "", "value": 0.985}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 512.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 183.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 67881.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 4321.0}, {"metric": "inverter_grid_code", "labels": "", "value": 85.0}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 390.5}, {"metric": "inverter_rssi_percent", "labels": "", "value": 63.0}]},
{"name": "DNS G3, blocks in another order", "direction": "outbound", "hex": "504f53544757000000c901040000353330303044534330303030303034321a03150d0e0f000000000000000000001a03150d0e0f2d308355b10a404a32bff3b88619f1340b8c3c0c393c84954d4fd6851ca2af4f3d7227363a0c7e8f3f94b23518db517e6fd76fb8e41127a1f0253921b613ebbb13d83dc2d5500751b0a7e1574bc1c812cc11caf362450f105af19fecab60622f442b528f95ca0d66df337e634d5606c7d8fc7763ada8be1b2425636b4a66ee639353b8e0b6e3febfd51c760ff63c775aedcf5bc05685f261b3c563e6cd50ae611f9c", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 3120.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 312.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 52.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 5.2}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 305.5}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 4.7}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2361.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 236.1}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 132.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 13.2}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5003.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.03}, {"metric": "inverter_power_output_watts", "labels": "", "value": 3071.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 3119.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": -544.0}, {"metric": "inverter_power_factor_ratio", "labels": "", "value": 0.985}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 512.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 183.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 67881.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 4321.0}, {"metric": "inverter_grid_code", "labels": "", "value": 85.0}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 390.5}, {"metric": "inverter_rssi_percent", "labels": "", "value": 63.0}]},
{"name": "D-NS, high word of power FFFF", "direction": "outbound", "hex": "504f535447570000009901040000393330303044534e30303030303034321a03150d0e0f000000000000000000001a03150d0e0f9b09f7ce869067da00d671e14a98bcee3e36e903e75546ae5daab8e708726f9314dbf2313daba8dc568188b5471cc739e167a4fe7c31beb4abcb53a10960eac8b4e7da566d8c2e606753a52e49c9f1db1eea4c229d791406ea304977aa67a45ef86f9f20bbdfd5f2103763eb901f8305ad0b", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 1684.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 168.4}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 2.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 0.2}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 202.6}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 0.1}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2360.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 236.0}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 5.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 0.5}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 4998.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 49.98}, {"metric": "inverter_power_output_watts", "labels": "", "value": 70.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 2048.0}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 265.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 119.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 185841.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 29746.0}, {"metric": "inverter_grid_code", "labels": "", "value": 20.0}]},
{"name": "MT, three phases, three strings", "direction": "outbound", "hex": "504f53544757000000b901040000393032354b4d545530303030303034321a03150d0e0f000000000000000000001a03150d0e0ffff3b0043fa06ef176a7fd825ccbed5b1df9588bb1be8fe8dc9e8e903a644b886cb0f4adaf20f011627531fd3a53d89c0cb61167c2b87376352377161e8597a59c18dc1bd48edf011f15a12fe93fc30bf55c76170789950e13e54b9dacc6aab38cdc88c8e5b5b57b497bb8bdb5a9dc03de777586d7b2a00720fcd225d45219c3202f4795054e8a76ff973764f87f16916c79", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 6500.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 650.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 85.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 8.5}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 640.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 8.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"3\"", "value": 630.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"3\"", "value": 7.5}, {"metric": "inverter_line_voltage_volts", "labels": "line=\"12\"", "value": 400.1}, {"metric": "inverter_line_voltage_volts", "labels": "line=\"23\"", "value": 400.2}, {"metric": "inverter_line_voltage_volts", "labels": "line=\"31\"", "value": 400.3}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2311.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 231.1}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"2\"", "value": 231.2}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"3\"", "value": 231.3}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 210.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 21.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"2\"", "value": 21.1}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"3\"", "value": 21.2}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5001.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.01}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"2\"", "value": 50.01}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"3\"", "value": 50.01}, {"metric": "inverter_power_output_watts", "labels": "", "value": 14500.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 14600.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": -100.0}, {"metric": "inverter_input_power_watts", "labels": "", "value": 15000.0}, {"metric": "inverter_power_factor_ratio", "labels": "", "value": 0.993}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 481.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 523.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 74565.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 4321.0}, {"metric": "inverter_grid_code", "labels": "", "value": 9.0}, {"metric": "inverter_leakage_current_amperes", "labels": "", "value": 0.0}]},
{"name": "ET hybrid with battery", "direction": "outbound", "hex": "504f535447570000028902040001393031304b45545530303030303034321a03150d0e0f000000000000000000001a03150d0e0fc203f9f84c6ea2257b42ee8172436a6fe3c6dee95516b11d8069e935a788ff70c101cae5e53e1f2088a81caa70552d66956d07202dbfb8c45470800912e11a43d34dc5a4f34b7cadd1dbf024844982d1fdad0b1312e3425210d1a43dad7025df05754d8ea7ba2451afe4824cb68f1317a491fc0b2c5ade263a59b4f2fcc5ea9f220c9a819a8fdbbc93db0991d2b7fb1a44e9e103c1bcdd2275e9072f3b2646b092a826e77e98ef1ce5651ff431e0e6ea87799c128a735f298217ee2c70b8020df94e9795f24aa9e9dfa8319f606dacfb7b1d6834d526d3324f4d78a2df941856f3dd99e257d0fc7fd480948538addc61318fa137b5a5b557d6563974bff30d1c6c193afcf0385c7661c0cc23efa9145d72216eea110485a31deca935f5ed5107925dca82c87e0a7c56e331344616788f606025848ccbb5fddbe5af610f6dcdd3f21f59facddc01310df25d43ff01d9f434784b9065ceda1b89ac6f177758e93b90a9c661012b34a48095c29401e2316d10f1c4d387ed22e734059ebddf8723699f61b8e37ccfd850052f9c5fde193f582ab341e1de5c8af4dbd0bbe2884308a6db6c90c77b1b5169ca3fd40e5f234eb246e9dcd44c0b60a3299befb1ceb6be708dd7841e5b70d76e4ff3a5b710ace8a3b2b9054fd72bf2041323ea22a2bb2060bd988cb16df9bd6b849e9ee82b3756608e07f861215d5ffea3a498416ccfa0e36375f93bd072fcafc4eec15947281d3c20208efa94dce906b5153c9101b959c1296773330f2c26928a110149ee97716f668259bedbabaab61cc328fca9c32cc7fe46292d41450347b998210362206137f2e9a902d8ecaa7a4b45b8bad16b307c3609", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 5620.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 562.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 10.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 1.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"1\"", "value": 560.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 300.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 1.3}, {"metric": "inverter_string_power_watts", "labels": "string=\"2\"", "value": 389.0}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2322.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 232.2}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 16.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 1.6}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 4996.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 49.96}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"1\"", "value": 320.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"2\"", "value": 232.7}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"2\"", "value": 1.6}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"2\"", "value": 49.93}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"2\"", "value": 310.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"3\"", "value": 232.7}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"3\"", "value": 1.6}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"3\"", "value": 49.96}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"3\"", "value": 307.0}, {"metric": "inverter_power_output_watts", "labels": "", "value": 937.0}, {"metric": "inverter_active_power_watts", "labels": "", "value": -736.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"1\"", "value": 229.6}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"1\"", "value": 0.1}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"1\"", "value": 49.96}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"1\"", "value": 12.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_load_watts", "labels": "", "value": 0.0}, {"metric": "inverter_load_watts", "labels": "", "value": 180.0}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 449.0}, {"metric": "inverter_module_temperature_celsius", "labels": "", "value": 0.0}, {"metric": "inverter_heatsink_temperature_celsius", "labels": "", "value": 39.9}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 653.9}, {"metric": "battery_voltage_volts", "labels": "battery=\"1\"", "value": 406.8}, {"metric": "battery_current_amperes", "labels": "battery=\"1\"", "value": -0.1}, {"metric": "battery_power_watts", "labels": "battery=\"1\"", "value": -1.0}, {"metric": "battery_mode", "labels": "battery=\"1\"", "value": 3.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_grid_code", "labels": "", "value": 2.0}, {"metric": "inverter_hybrid_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 13534.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 488.0}, {"metric": "inverter_energy_export_watthours_total", "labels": "", "value": 1350100.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 1322.0}, {"metric": "inverter_energy_import_watthours_total", "labels": "", "value": 77700.0}, {"metric": "inverter_energy_load_watthours_total", "labels": "", "value": 1587700.0}, {"metric": "battery_energy_charge_watthours_total", "labels": "", "value": 780600.0}, {"metric": "battery_energy_discharge_watthours_total", "labels": "", "value": 633100.0}, {"metric": "inverter_rssi_percent", "labels": "", "value": 100.0}, {"metric": "meter_frequency_hertz", "labels": "", "value": 49.96}, {"metric": "meter_energy_export_decawatt_hours_total", "labels": "", "value": 112247.0}, {"metric": "meter_energy_import_decawatt_hours_total", "labels": "", "value": 647297.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"1\"", "value": 254.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"2\"", "value": -111.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"3\"", "value": 367.0}, {"metric": "meter_power_export_watts", "labels": "", "value": 510.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"1\"", "value": 232.5}, {"metric": "meter_voltage_volts", "labels": "channel=\"2\"", "value": 232.6}, {"metric": "meter_voltage_volts", "labels": "channel=\"3\"", "value": 232.1}, {"metric": "meter_current_amperes", "labels": "channel=\"1\"", "value": 1.7}, {"metric": "meter_current_amperes", "labels": "channel=\"2\"", "value": 1.2}, {"metric": "meter_current_amperes", "labels": "channel=\"3\"", "value": 2.0}, {"metric": "battery_temperature_celsius", "labels": "battery=\"1\"", "value": 35.5}, {"metric": "battery_charge_limit_amperes", "labels": "battery=\"1\"", "value": 25.0}, {"metric": "battery_discharge_limit_amperes", "labels": "battery=\"1\"", "value": 30.0}, {"metric": "battery_state_of_charge_ratio", "labels": "battery=\"1\"", "value": 0.97}, {"metric": "battery_state_of_health_ratio", "labels": "battery=\"1\"", "value": 0.99}, {"metric": "battery_modules", "labels": "battery=\"1\"", "value": 8.0}]},
{"name": "a newer hybrid: energies as u64, a temperature that is none", "direction": "outbound", "hex": "504f535447570000026902040001393032304b45545430303030303034321a03150d0e0f000000000000000000001a03150d0e0fdfc1b9ae33a12ae93e9872d551677740633ad140da55cd429b046d6284d84913a32ce3ca34901555732c028e31eff88daf0b981cf6d921882683cc8c976be31c50e1b152dadc9c4dd09d3ebdb6e914503cb76d913c257005db13e45eae827efe0fc3de9919ce1f4d0701ac2088bd95f4b0b0eda22e6dad1c47bf7314a17deb6f3c4a0a9df55506b8ebf561b0a845a88683e9abe4f6fca2267dff032335f43c4dc30e31fc44b5182fab41ccc076d055bf31b83eb9991eb25bcad07be49d9cc0a44f70c10991d3441efdb2c6c165093aeeb3e5258462e464afdada7c3760f4268140eaf611489e3a7b19cf5008a3a681dfcdffa4176d4563f8636628bee24d085b790bfec0ac1e54906aeae44a8ad2902e9e815fbbac0d88d476a47b11cf59d3e08f8db8e1d5f5fe346d145475c685a5b29a4073fabfecf3a3902994266fa495db58da0aa95bbd0f9aa46839e8cf5f6e5179f5b32ee874738555c5c8388a9dc6ee0c21add1aa0f1689b503b1e84b7a994bf805617b02f190cd53774bd8987c3928bffdff0c2bca60fc62acb36506a013a868bea4b7cd5424a97f7eadc8c1735e835a4e059bfc29ff6b670aac7f176fa9bfad613680741c89b03186affec136e5cfc31fee577e09b033532b2cc5a18f8a6a318c7238357c65984b4aa5974aef2aed0efc993890e1a48980d772dca455cd7c06fac2fa25601955ed464a7fa100297b41a9df8338b52dee7f47e87075d52355bf1eeeeb81f5ace006b4f2069663aad72fd0baf00d9879c55f3d86eef404938d1c612895f064ac8aa7f2362a43f0da6ffc48", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 5000.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 500.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 41.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 4.1}, {"metric": "inverter_string_power_watts", "labels": "string=\"1\"", "value": 2095.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 410.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 0.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"2\"", "value": 997.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"3\"", "value": 0.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"3\"", "value": 0.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"3\"", "value": 0.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"4\"", "value": 0.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"4\"", "value": 0.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"4\"", "value": 0.0}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2322.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 232.2}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 16.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 1.6}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 4996.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 49.96}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"1\"", "value": 520.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"2\"", "value": 232.7}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"2\"", "value": 1.6}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"2\"", "value": 49.93}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"2\"", "value": 710.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"3\"", "value": 232.7}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"3\"", "value": 1.6}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"3\"", "value": 49.96}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"3\"", "value": 736.0}, {"metric": "inverter_power_output_watts", "labels": "", "value": 1966.0}, {"metric": "inverter_active_power_watts", "labels": "", "value": 1556.0}, {"metric": "inverter_reactive_power_vars", "labels": "", "value": 0.0}, {"metric": "inverter_apparent_power_voltamperes", "labels": "", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_load_watts", "labels": "", "value": 484.0}, {"metric": "inverter_load_watts", "labels": "", "value": 0.0}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 449.0}, {"metric": "inverter_heatsink_temperature_celsius", "labels": "", "value": 39.9}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 0.0}, {"metric": "battery_voltage_volts", "labels": "battery=\"1\"", "value": 653.9}, {"metric": "battery_current_amperes", "labels": "battery=\"1\"", "value": -0.1}, {"metric": "battery_power_watts", "labels": "battery=\"1\"", "value": -153.0}, {"metric": "battery_mode", "labels": "battery=\"1\"", "value": 3.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_grid_code", "labels": "", "value": 0.0}, {"metric": "inverter_hybrid_work_mode", "labels": "", "value": 0.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 0.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 0.0}, {"metric": "inverter_energy_export_watthours_total", "labels": "", "value": 0.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 0.0}, {"metric": "inverter_energy_import_watthours_total", "labels": "", "value": 0.0}, {"metric": "inverter_energy_load_watthours_total", "labels": "", "value": 0.0}, {"metric": "battery_energy_charge_watthours_total", "labels": "", "value": 0.0}, {"metric": "battery_energy_discharge_watthours_total", "labels": "", "value": 0.0}, {"metric": "inverter_rssi_percent", "labels": "", "value": 0.0}, {"metric": "meter_frequency_hertz", "labels": "", "value": 50.01}, {"metric": "meter_channel_power_watts", "labels": "channel=\"1\"", "value": 500.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"2\"", "value": 500.0}, {"metric": "meter_channel_power_watts", "labels": "channel=\"3\"", "value": 556.0}, {"metric": "meter_power_export_watts", "labels": "", "value": 1556.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"1\"", "value": 0.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"2\"", "value": 0.0}, {"metric": "meter_voltage_volts", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_current_amperes", "labels": "channel=\"1\"", "value": 0.0}, {"metric": "meter_current_amperes", "labels": "channel=\"2\"", "value": 0.0}, {"metric": "meter_current_amperes", "labels": "channel=\"3\"", "value": 0.0}, {"metric": "meter_energy_export_decawatt_hours_total", "labels": "", "value": 3555.0}, {"metric": "meter_energy_import_decawatt_hours_total", "labels": "", "value": 15.0}, {"metric": "battery_temperature_celsius", "labels": "battery=\"1\"", "value": 35.5}, {"metric": "battery_charge_limit_amperes", "labels": "battery=\"1\"", "value": 25.0}, {"metric": "battery_discharge_limit_amperes", "labels": "battery=\"1\"", "value": 30.0}, {"metric": "battery_state_of_charge_ratio", "labels": "battery=\"1\"", "value": 0.97}, {"metric": "battery_state_of_health_ratio", "labels": "battery=\"1\"", "value": 0.99}, {"metric": "battery_modules", "labels": "battery=\"1\"", "value": 8.0}]},
{"name": "a one-phase hybrid without a battery and without a meter", "direction": "outbound", "hex": "504f535447570000013902040001393630303045485530303030303034321a03150d0e0f000000000000000000001a03150d0e0f793a4dde18d4128dedbf70360f7ae406574f92d3d556517bf977078fc457b194b8a911325d90c304111396cb1760c97cff69ce53ac259257f7fa3e0aeb9eab9261ecce896f0e669d447a7ec46642015a0c92bca768f778a185cf0423cf0037f2c37e814bfccc430f5c0b6f9e3139bc4fb55da430a145423e0cb411d0a3cc5243e8f919853217435a1ef8e5d8890fabcded4810867da775ca44cfe4b85e61234eb560c3c6d7e34ff3551111a6d259984bc115d6a0798d79c44d1a51a86c77ec096edec7f2dc76bf00e705194c279589360eb3da7a19ab88367c0a056100877f9d3565cd4b0b41555e16ef4054a78d0fa51ade4f23bc662657f5743625449f3df95e9053c74be4e951bd635282f4c92cdaff9f", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 0.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 0.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 0.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 0.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"1\"", "value": 0.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 0.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 0.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"2\"", "value": 0.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"3\"", "value": 0.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"3\"", "value": 0.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"3\"", "value": 0.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"4\"", "value": 0.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"4\"", "value": 0.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"4\"", "value": 0.0}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2400.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 240.0}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 65.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 6.5}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5000.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.0}, {"metric": "inverter_phase_power_watts", "labels": "phase=\"1\"", "value": 1561.0}, {"metric": "inverter_power_output_watts", "labels": "", "value": 1725.0}, {"metric": "inverter_active_power_watts", "labels": "", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"1\"", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"2\"", "value": 0.0}, {"metric": "inverter_backup_voltage_volts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_current_amperes", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_frequency_hertz", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_backup_power_watts", "labels": "phase=\"3\"", "value": 0.0}, {"metric": "inverter_phase_load_watts", "labels": "phase=\"1\"", "value": 1724.0}, {"metric": "inverter_backup_load_watts", "labels": "", "value": 0.0}, {"metric": "inverter_load_watts", "labels": "", "value": 1725.0}, {"metric": "inverter_internal_temperature_decidegrees_celsius", "labels": "", "value": 604.0}, {"metric": "inverter_heatsink_temperature_celsius", "labels": "", "value": 38.6}, {"metric": "inverter_bus_voltage_volts", "labels": "", "value": 0.0}, {"metric": "battery_mode", "labels": "battery=\"1\"", "value": 0.0}, {"metric": "inverter_warning_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_grid_code", "labels": "", "value": 0.0}, {"metric": "inverter_hybrid_work_mode", "labels": "", "value": 0.0}, {"metric": "inverter_error_bitmap", "labels": "", "value": 0.0}, {"metric": "inverter_energy_output_hectowatt_hours_total", "labels": "", "value": 0.0}, {"metric": "inverter_energy_output_hectowatt_hours_day", "labels": "", "value": 0.0}, {"metric": "inverter_energy_export_watthours_total", "labels": "", "value": 0.0}, {"metric": "inverter_uptime_hours_total", "labels": "", "value": 0.0}, {"metric": "inverter_energy_import_watthours_total", "labels": "", "value": 0.0}, {"metric": "inverter_energy_load_watthours_total", "labels": "", "value": 0.0}, {"metric": "battery_energy_charge_watthours_total", "labels": "", "value": 0.0}, {"metric": "battery_energy_discharge_watthours_total", "labels": "", "value": 0.0}]},
{"name": "D-NS with a CT meter of its own", "direction": "outbound", "hex": "504f535447570000009901040000393530303044534e30303030303034321a03150d0e0f000000000000000000001a03150d0e0fafca164b86db06af7745c5802a8fa28504d13ad24e8938e123c065df5e7bc6ae554d8067e0748d0d0ede503b3c7d8fb889c1a1c492bb3365354a00f4f461e582fd9fc53f9f8d48db22c45b026ad8aac6ed10b9c16ce164d4d0e3e016935a17c066033f3f3bca1bcf9f318aa01afa4f97b1f7", "metrics": [{"metric": "inverter_input_voltage_dc_decivolts", "labels": "", "value": 6500.0}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"1\"", "value": 650.0}, {"metric": "inverter_input_current_dc_deciamps", "labels": "", "value": 85.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"1\"", "value": 8.5}, {"metric": "inverter_string_voltage_volts", "labels": "string=\"2\"", "value": 640.0}, {"metric": "inverter_string_current_amperes", "labels": "string=\"2\"", "value": 8.0}, {"metric": "inverter_output_voltage_ac_decivolts", "labels": "", "value": 2311.0}, {"metric": "inverter_phase_voltage_volts", "labels": "phase=\"1\"", "value": 231.1}, {"metric": "inverter_output_current_ac_deciamps", "labels": "", "value": 210.0}, {"metric": "inverter_phase_current_amperes", "labels": "phase=\"1\"", "value": 21.0}, {"metric": "inverter_output_frequency_ac_centihertz", "labels": "", "value": 5001.0}, {"metric": "inverter_phase_frequency_hertz", "labels": "phase=\"1\"", "value": 50.01}, {"metric": "inverter_power_output_watts", "labels": "", "value": 4850.0}, {"metric": "inverter_work_mode", "labels": "", "value": 1.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"1\"", "value": 2480.0}, {"metric": "inverter_string_power_watts", "labels": "string=\"2\"", "value": 2470.0}, {"metric": "inverter_meter_power_watts", "labels": "", "value": -120.0}, {"metric": "inverter_meter_energy_export_watthours_total", "labels": "", "value": 54321.0}, {"metric": "inverter_meter_energy_import_watthours_total", "labels": "", "value": 12345.0}]},
{"name": "XS settings with a model name", "direction": "outbound", "hex": "504f535447570000009901030000393530303053535830303030303034321a03150d0e0f000000000000000000001a03150d0e0fb9a4d8cbaf5a9970dc1dcf261156d9ae8143a8a187cd28c61a885dcdcec05df52018410db238ac317a5ffeb34b109e64a1f661bc61f8202102e455f5a6c7199b0c751177c7ad9637056a80cc9d6d3b8dec18b8123c20ff0e449c37b9e15a8e44ebf66fef3fee0d65aeb9c6f130c58e9c3314", "metrics": null},
{"name": "portal ACK 0304", "direction": "inbound", "hex": "47570000003103043931303030484b5530303030303034321a0e0d15031a00000000000000000000461a68966008586b9e9bbbd95586f2e0c5a1"},
{"name": "portal NACK 0304", "direction": "inbound", "hex": "47570000003103043931303030484b5530303030303034320f0e0d15031a00000000000000000000dd8d8e819f160cded287cd2c16e0ae8dcc96"},
{"name": "portal ACK 0245 for a hybrid", "direction": "inbound", "hex": "4757000000310245393031304b45545530303030303034320f0e0d15031a00000000000000000000b9009c9077365dd9051812abf42a60a9959e"},
{"name": "portal sets a HomeKit's clock", "direction": "inbound", "hex": "47570000003101163931303030484b5530303030303034321a0e0d15031a000000000000000000006661d72f84a652238dd629c92dea9f75abf8"},
{"name": "portal sets an inverter's clock", "direction": "inbound", "hex": "4757000000310116353330303044534330303030303034320f0e0d15031a000000000000000000001ed0b82bb98600d8cacb098bf1c59ac2ac9b"},
{"name": "a write that is not the clock: to be dropped", "direction": "inbound", "hex": "4757000000310116353330303044534330303030303034320f0e0d15031a0000000000000000000094dbadb726b5936eecb420b23e680c34dd0d"},
{"name": "DNS confirms a clock write", "direction": "outbound", "hex": "504f53544757000000310110353330303044534330303030303034321a03150d0e0f00000000000000000000ba73ff557bd0508bd59c5793fe63e381311a", "metrics": null}
]""")

# -------------------------------------------------------------------------------------------------------- helpers

SMALL = 16 << 10  # socket buffers of tests that fill them
LOCAL = "127.0.0.1"
PORTS = ("--sems.listen-address=127.0.0.1:0", "--web.listen-address=127.0.0.1:0")
PATIENCE = float(os.environ.get("TEST_PATIENCE", "30"))  # how long a test waits for a state; nothing else depends on it


def until(condition, seconds: float = PATIENCE, pause: float = 0.005):
    """The condition's first true value; fails when it does not come in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {seconds} s: {condition}")
        time.sleep(pause)
    return value


@contextlib.contextmanager
def time_zone(zone: str | None):
    """The process in a time zone; None: TZ is not set."""
    try:
        with mock.patch.dict(os.environ, {"TZ": zone or ""}):
            if zone is None:
                del os.environ["TZ"]
            time.tzset()
            yield
    finally:
        time.tzset()


def open_lines(path: str) -> list:
    """The lines of a file, none while it is not there."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="ascii") as file:
        return file.read().splitlines()
    return []


def content_of(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def metrics_of(text: str) -> dict:
    """Series to value of an exposition."""
    return {
        series: float(value) for series, value in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }


def summed(metrics: dict, series: str, **labels: str) -> float:
    """Sum of a metric's samples that have these labels."""
    wanted = [f'{name}="{text}"' for name, text in labels.items()]
    return sum(
        n for name, n in metrics.items() if name.partition("{")[0] == series and all(one in name for one in wanted)
    )


class Peer:
    """One end of a connection, in the test's hand: a device, the portal's end, or an HTTP client."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(PATIENCE)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def fill(self, block: bytes, patience: float = 0.2) -> int:
        """Send block again and again until nothing more is taken; how many bytes were."""
        sent, end = 0, time.monotonic() + PATIENCE
        self.sock.settimeout(patience)
        with contextlib.suppress(socket.timeout):
            while time.monotonic() < end:
                sent += self.sock.send(block[sent % len(block) :])
        self.sock.settimeout(PATIENCE)
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
        """So many answers, decoded."""
        return [sems.decode(self.read(ACK_SIZE), IN) for _ in range(count)]

    def silent(self, seconds: float = 0.05) -> bool:
        """Whether nothing comes for so long, not even the end."""
        waiting = select.poll()
        waiting.register(self.sock, select.POLLIN)
        return not waiting.poll(seconds * 1000)

    def no_more(self) -> None:
        """Half-close: nothing more will be sent."""
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close at once, with what the peer has not read lost."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self) -> None:
        self.sock.close()


def connected(port: int, data: bytes = b"", buffer: int = 0, host: str = LOCAL) -> Peer:
    """A device that has connected, and sent data."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if buffer else ():
        sock.setsockopt(socket.SOL_SOCKET, option, buffer)
    peer = Peer(sock)
    try:
        sock.connect((host, port))
        sock.sendall(data)
    except OSError:
        sock.close()
        raise
    return peer


def nack(data: bytes) -> bytes:
    """The portal refuses a device's frame."""
    return ack_of(data, 2)


def silence(data: bytes) -> bytes:
    """The portal says nothing to a device's frame."""
    return b""


def closes(data: bytes):
    """The portal closes the connection at a frame."""
    return Peer.close


def resets(data: bytes):
    """The portal resets the connection at a frame."""
    return Peer.reset


def but_for(one: bytes, habit, other=None):
    """A portal's habit for one frame; to all others it says ACK, or has the other habit."""
    return lambda data: habit(data) if data == one else (other or ack_of)(data)


class Portal:
    """A portal on a port of its own, in the test's hand (`accept`), or served by a thread according to its habit.

    While it does not listen, connections are refused. A habit is what the portal does with a frame: it gives what is
    sent back, or what is done with the connection (Peer.close, Peer.reset). `got` has all frames in the order in which
    they came, `legs` says how many connections there were.
    """

    def __init__(self, listening: bool = True, buffer: int = 0, host: str = LOCAL, port: int = 0, habit=None) -> None:
        self.buffer, self.host, self.port, self.peers = buffer, host, port, []
        self.habit, self.got, self.legs, self.over = habit, [], 0, threading.Event()
        self._listens, self._work = listening, collections.deque()
        self._bind()
        if listening:
            self.listen()
        self.thread = threading.Thread(target=self._serve, name="portal", daemon=True)
        if habit:
            self.thread.start()

    def _bind(self) -> None:
        self.sock = socket.socket()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if self.buffer else ():
            self.sock.setsockopt(socket.SOL_SOCKET, option, self.buffer)
        self.sock.bind((self.host, self.port))
        self.port = self.sock.getsockname()[1]
        self.sock.settimeout(PATIENCE)

    def listen(self, backlog: int = 128) -> None:
        self.sock.listen(backlog)
        self._listens = True

    def black_hole(self) -> None:
        """From now on connections are neither accepted nor refused."""
        self.listen(0)
        for _ in range(3):
            sock = socket.socket()
            sock.setblocking(False)
            sock.connect_ex((self.host, self.port))
            self.peers.append(Peer(sock))

    def accept(self) -> Peer:
        self.peers.append(Peer(self.sock.accept()[0]))
        self.legs += 1
        return self.peers[-1]

    def unasked(self, seconds: float = 0.08) -> bool:
        """Whether nobody connects for so long."""
        return Peer(self.sock).silent(seconds)

    def die(self) -> None:
        """Lose all connections at once, and refuse new ones."""
        while self.peers:
            self.peers.pop().reset()
        self.sock.close()
        self._listens = False
        self._bind()

    def do(self, work) -> None:
        """Have the serving thread do it between two frames."""
        done = threading.Event()
        self._work.append((work, done))
        done.wait(PATIENCE)

    def _serve(self) -> None:
        buffers: dict = {}
        while not self.over.is_set():
            waiting = select.poll()
            for sock in [*([self.sock] if self._listens else []), *(peer.sock for peer in self.peers)]:
                waiting.register(sock, select.POLLIN)
            ready = {number for number, _ in waiting.poll(10)}
            for peer in self.peers[:]:
                if peer.sock.fileno() in ready and not self._hear(peer, buffers.setdefault(peer, bytearray())):
                    peer.close()
                    self.peers.remove(peer)
            if self._listens and self.sock.fileno() in ready:
                self.accept()
            while self._work:
                work, done = self._work.popleft()
                work()
                done.set()

    def _hear(self, peer: Peer, buffer: bytearray) -> bool:
        """Read what has come and react to each frame; whether the connection goes on."""
        try:
            data = peer.sock.recv(1 << 20)
            buffer += data
            while len(buffer) >= 10 and len(buffer) >= (size := int.from_bytes(buffer[6:10], "big") + 13):
                self.got.append(bytes(buffer[:size]))
                del buffer[:size]
                reaction = self.habit(self.got[-1])
                if not isinstance(reaction, bytes):
                    reaction(peer)
                    return False
                peer.sock.sendall(reaction)
        except OSError:
            return False
        return bool(data)

    def firsts(self, serial: str = "") -> list:
        """The frames that it got, of a serial number or of all, each once, in the order of their first coming."""
        return [data for data in dict.fromkeys(self.got) if not serial or data[14:30].decode() == serial]

    def close(self) -> None:
        self.over.set()
        if self.thread.ident:
            self.thread.join(PATIENCE)
        for peer in self.peers:
            peer.close()
        self.sock.close()


def http_get(port: int, path: str, **headers: str) -> tuple:
    """(status, headers, body) of a request."""
    with contextlib.closing(http.client.HTTPConnection(LOCAL, port, timeout=PATIENCE)) as client:
        client.request("GET", path, headers=headers)
        answer = client.getresponse()
        return answer.status, answer.headers, answer.read()


class Launched:
    """What tests ask of an exporter that runs, in this process or in one of its own; what it shows is read over HTTP."""

    devices: list
    port: int
    web_port: int

    def device(self, data: bytes = b"", buffer: int = 0, host: str = LOCAL) -> Peer:
        self.devices.append(connected(self.port, data, buffer, host))
        return self.devices[-1]

    def client(self, data: bytes = b"", buffer: int = 0) -> Peer:
        """An HTTP client that has sent data."""
        self.devices.append(connected(self.web_port, data, buffer))
        return self.devices[-1]

    def get(self, path: str, **headers: str) -> tuple:
        return http_get(self.web_port, path, **headers)

    def metrics(self) -> dict:
        return metrics_of(self.get("/metrics")[2].decode())

    def value(self, series: str, **labels: str) -> float:
        return summed(self.metrics(), series, **labels)

    def queued(self) -> float:
        return self.value("sems_mitm_queue_bytes")

    def becomes(self, count: float, series: str, **labels: str) -> None:
        """Wait until a metric has a value."""
        until(lambda: self.value(series, **labels) == count, pause=0.01)


class Running(Launched):
    """An exporter of this process on free ports, its loop in a thread; flags as on the command line."""

    def __init__(self, portal, *flags: str) -> None:
        upstream = [f"--sems.upstream={portal.host}:{portal.port}"] if portal else []
        self.settings = sems.serve_settings([*upstream, *PORTS, *flags], {})
        self.store, self.loop, self.web = sems.started(self.settings)
        self.port, self.web_port = self.loop.listeners[0].port, self.web.listener.port
        self.devices, self.error = [], None
        self.thread = threading.Thread(target=self._run, name="exporter")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except BaseException as error:  # nothing may end the loop: the test that sees it fails
            self.error = error
            raise

    def stop(self) -> None:
        self.loop.stop()
        self.thread.join(PATIENCE)

    def close(self) -> None:
        for device in self.devices:
            device.close()
        self.stop()
        if self.error or self.thread.is_alive():
            raise AssertionError(f"the exporter's loop: {self.error!r}")


@functools.lru_cache(maxsize=1)
def compiled() -> str:
    """A folder with the program and its bytecode: dozens of processes start, and each would compile it."""
    folder = tempfile.mkdtemp()
    unittest.addModuleCleanup(shutil.rmtree, folder)
    py_compile.compile(shutil.copy(sems.__file__, folder))
    return folder


class Process(Launched):
    """The program as a process, its stderr in a file; `before` is what it does to itself, as `sems`, before it starts.

    `under` is a command that starts it, such as one that gives it file systems of its own.
    """

    def __init__(self, *arguments: str, before: str = "", under: tuple = (), **environment: str) -> None:
        self.log = tempfile.TemporaryFile()
        code = (
            f"import sys; sys.path.insert(0, {compiled()!r}); import sems_mitm as sems; {before}\nsys.exit(sems.main())"
        )
        start = [*under, sys.executable, "-W", "error", "-c", code, *arguments]
        self.popen = subprocess.Popen(
            start, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **environment}
        )
        self.devices: list = []
        self._ports: tuple = ()

    def ports(self) -> tuple:
        """Where devices connect, and of HTTP, when the exporter has said so."""
        pattern = r"devices connect to port (\d+), metrics at http://[^:]*:(\d+)"
        while not self._ports:
            found = until(lambda: re.search(pattern, self.stderr()) or self.popen.poll() is not None)
            if found is True:
                raise AssertionError(self.stderr())
            self._ports = int(found[1]), int(found[2])
        return self._ports

    @property
    def port(self) -> int:  # type: ignore[override]
        return self.ports()[0]

    @property
    def web_port(self) -> int:  # type: ignore[override]
        return self.ports()[1]

    def stderr(self) -> str:
        return os.pread(self.log.fileno(), 1 << 20, 0).decode("utf-8", "replace")

    def status(self, name: str) -> int:
        """A number of /proc/PID/status: VmHWM, VmRSS (kB), Threads."""
        with open(f"/proc/{self.popen.pid}/status") as file:
            return int(re.search(rf"^{name}:\s+(\d+)", file.read(), re.MULTILINE)[1])

    def cpu(self) -> float:
        """Seconds of CPU time of its first thread so far, to the nanosecond."""
        with open(f"/proc/{self.popen.pid}/schedstat") as file:
            return int(file.read().split()[0]) / 1e9

    @contextlib.contextmanager
    def frozen(self):
        """It stands still; whatever comes meanwhile is there in one wake-up."""
        self.popen.send_signal(signal.SIGSTOP)
        os.waitpid(self.popen.pid, os.WUNTRACED)
        try:
            yield
        finally:
            self.popen.send_signal(signal.SIGCONT)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """The exit code after a signal."""
        self.popen.send_signal(number)
        return self.popen.wait(PATIENCE)

    def ended(self) -> tuple:
        """(exit code, stderr) of a process that ends by itself."""
        return self.popen.wait(PATIENCE), self.stderr()

    def close(self) -> None:
        for peer in self.devices:
            peer.close()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.popen.stdout.close()
        self.log.close()


def called(*arguments: str, stdin: bytes = b"", env: dict | None = None) -> tuple:
    """(exit code, stdout, stderr) of the command line, in this process. No exporter is started."""
    out, err = io.StringIO(), io.StringIO()
    ours = re.compile("(SEMS|WEB|METRICS|LOG)_[A-Z_]+|BATSIGNAL|DEBUG")
    clean = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {**clean, **(env or {})}, clear=True))
        stack.enter_context(
            mock.patch.object(sems, "started", side_effect=AssertionError("these settings were accepted"))
        )
        stack.enter_context(mock.patch.object(logging, "basicConfig"))
        stack.enter_context(mock.patch.object(sys, "stdin", mock.Mock(buffer=io.BytesIO(stdin))))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            code = sems.main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


class Lines(logging.Handler):
    """Log lines, kept; a traceback is part of its line."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list = []

    def emit(self, entry: logging.LogRecord) -> None:
        self.lines.append(self.format(entry))


class SocketCase(unittest.TestCase):
    """Exporters, portals and processes that end with the test; log lines in self.lines; short times between attempts."""

    def setUp(self) -> None:
        handler = Lines()
        self.lines = handler.lines
        self.faults = 0  # of the exporter's own code that a test makes; any other fails it
        self.addCleanup(lambda: self.assertEqual(len(found := self.tracebacks()), self.faults, "\n".join(found)))
        self.patch(sems.log, "propagate", False)
        sems.log.addHandler(handler)
        self.addCleanup(sems.log.removeHandler, handler)
        self.limits(BACKOFF=(0.02, 0.05), SHUTDOWN=0.05, TICK=0.02)

    def tracebacks(self) -> list:
        return [line for line in self.lines if "Traceback" in line]

    def patch(self, *arguments, **more):
        patcher = mock.patch.object(*arguments, **more)
        self.addCleanup(patcher.stop)
        return patcher.start()

    def limits(self, **constants) -> None:
        for name, value in constants.items():
            self.patch(sems, name, value)

    def small_buffers(self) -> None:
        """All sockets hold little, so that the exporter's own queues fill."""

        class Small(socket.socket):
            def __init__(self, *arguments, **more) -> None:
                super().__init__(*arguments, **more)
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    self.setsockopt(socket.SOL_SOCKET, option, SMALL)

        self.patch(socket, "socket", Small)

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

    def started(self, *flags: str, **more) -> tuple:
        """A portal, and an exporter for it."""
        portal = self.portal(**more)
        return portal, self.exporter(portal, *flags)

    def talking(self, *flags: str) -> tuple:
        """Those, a device that has sent a frame, and the portal's end of its connection, which has read it."""
        portal, running = self.started(*flags)
        device, leg = running.device(frame()), portal.accept()
        leg.read(len(frame()))
        return portal, running, device, leg

    def serving(self, portal=None, *flags: str, **more) -> Process:
        """The exporter as a process on free ports."""
        upstream = [f"--sems.upstream={portal.host}:{portal.port}"] if portal else []
        return self.process(*upstream, *PORTS, *flags, **more)

    def directory(self) -> str:
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
        return path


# ---------------------------------------------------------------------------------------------- registers, metrics


class Registers(unittest.TestCase):
    """The tables of what there is to know, and that a mistake in them is found at import."""

    def test_mistakes(self):
        """Rows that make no sense or contradict one another; the text says which, where and why."""
        row = sems.Quantity("meter_new_volts", "", "New.", {"GRID": "u16/10 1"})
        two = row._replace(labels="channel 1 2")
        for name, rows, wanted in (
            ("a series twice", [row, row], "meter_new_volts in GRID: the series '' stands twice"),
            ("a label twice", [row._replace(labels="a 1 1", read={"GRID": "u16 1 2"})], "'a=\"1\"' stands twice"),
            ("a kind there is not", [row._replace(read={"GRID": "u17 1"})], "in GRID: there is no kind u17"),
            ("a register too few", [two], "1 registers for 2 labels"),
            ("a register too many", [row._replace(read={"GRID": "u16 1 2"})], "2 registers for 1 labels"),
            (
                "a condition too few",
                [row._replace(labels="a 1 2 3", read={"GRID": "u16 1 2 3 if 4=1 5=1"})],
                "2 conditions for 3 registers",
            ),
            ("no condition", [row._replace(read={"GRID": "u16 1 if 4"})], "meter_new_volts in GRID: "),
            ("another place twice", [row._replace(read={"GRID": "u16 1, u16 2, u16 3"})], "stands twice"),
            ("no number", [row._replace(read={"GRID": "u16 1a"})], "meter_new_volts in GRID: "),
        ):
            with self.subTest(name), self.assertRaises(ValueError) as caught:
                sems.family_values("GRID", rows)
            self.assertIn(wanted, str(caught.exception))
        for name, found in (
            ("a column too few", lambda: sems.quantities([(("GRID", "HYBRID"), [("a", "", "u16 1", "Help.")])])),
            ("two helps", lambda: sems.all_metrics([row, row._replace(help="Old.")])),
            ("another help than an internal", lambda: sems.all_metrics([row._replace(metric="batsignal_top")])),
        ):
            with self.subTest(name), self.assertRaises(ValueError):
                found()

    def test_form(self):
        """What a row says is what its values hold."""
        row = sems.Quantity("a_total", "string 1 2 3", "A.", {"GRID": "u32*10 5 7? - if 9=1", "HK3000": "s16/10 1 2 3"})
        channels = [
            (5, (6,), 0xFFFFFFFF, int, 10, 1, ("a_total", 'string="1"'), True, (9, 1), False),
            (7, (8,), 0xFFFFFFFF, int, 10, 1, ("a_total", 'string="2"'), True, (9, 1), False),
        ]
        self.assertEqual([*sems.row_values(row, "GRID")], channels)
        self.assertEqual(sems.evidence(row, "GRID"), [sems.SEEN, sems.MAP])
        later = [(value.register, value.later, value.divide, value.when) for value in sems.row_values(row, "HK3000")]
        self.assertEqual(later, [(1, (), 10, None), (2, (), 10, None), (3, (), 10, None)])
        self.assertEqual(sems.evidence(row, "HK3000"), [sems.GUESS] * 3)
        row = sems.Quantity("a", "battery 1 2", "A.", {"HYBRID": "u16 1 2? if 8>0 9=4, u32 5? 7 if 8>0"})
        places = [(value.register, value.when, value.instead) for value in sems.row_values(row, "HYBRID")]
        self.assertEqual(
            places, [(1, (8, None), False), (2, (9, 4), False), (5, (8, None), True), (7, (8, None), True)]
        )
        self.assertEqual(sems.evidence(row, "HYBRID"), [sems.SEEN, sems.MAP, sems.MAP, sems.SEEN])

    def test_rows(self):
        """Each value of each family can be read: its registers, all of them known, set to 1 give one unit of it."""
        self.assertEqual({family for row in sems.QUANTITIES for family in row.read}, set(sems.FAMILIES))
        self.assertEqual(sum(map(len, sems.VALUES.values())), 200)
        for family, values in sems.VALUES.items():
            for value in values:
                words = dict.fromkeys((value.register, *value.later), 0)
                words[max(words)] = 1
                if value.number is sems.KINDS["f32"].number:
                    words.update({value.register: 0x3F80, max(words): 0})
                self.assertLessEqual(set(words), sems.KNOWN[family])
                register, word = value.when or (0, 0)
                words[register] = 1 if word is None else word
                with self.subTest(family, series=value.series):
                    self.assertEqual(sems.reading(family, words).values[value.series], value.multiply / value.divide)

    def test_readings(self):
        """How words become a number, in each family and kind; None is no sample, "bad" is one counted as not finite."""
        wh, hwh = "meter_energy_export_decawatt_hours_total", "inverter_energy_output_hectowatt_hours_total"
        none, minus, var = 0xFFFF, 0xFFFE, "inverter_reactive_power_vars"
        for family, words, metric, labels, wanted in (
            ("HK1000", {2048: 1, 2049: 2, 2050: 3}, wh, "", 2**32 + 2 * 65536 + 3),
            ("HK1000", {2048: 1, 2049: 2, 2050: 3}, "meter_channel_energy_export_watthours_total", 'channel="1"', 10 * (2**32 + 2 * 65536 + 3)),
            ("HK1000", {2048: none, 2049: none, 2050: none}, wh, "", None),
            ("HK1000", {2049: 0, 2050: 3}, wh, "", None),
            ("HK1000", {2107: none, 2108: none}, "meter_power_generation_watts", "", -1),
            ("HK1000", {2099: 0, 2100: 1050}, "meter_current_amperes", 'channel="1"', 10.5),
            ("HK3000", {2057: 0, 2058: 0, 2059: 7}, wh, "", 7),
            ("HK3000", {2111: none, 2112: minus}, "meter_power_export_watts", "", -2),
            ("GRID", {30105: 66}, "inverter_string_voltage_volts", 'string="2"', 6.6),
            ("GRID", {30139: 0xFC18}, "inverter_power_factor_ratio", "", -1),
            ("GRID", {30141: none}, "inverter_internal_temperature_decidegrees_celsius", "", None),
            ("GRID", {30145: 1, 30146: 2}, hwh, "", 65538),
            ("GRID", {30145: 0, 30146: none}, hwh, "", 65535),
            ("GRID", {30145: none, 30146: none}, hwh, "", None),
            ("GRID", {30135: none, 30136: none}, var, "", None),
            ("GRID", {30135: none, 30136: minus}, var, "", -2),
            ("GRID", {30127: none, 30128: 1500}, "inverter_power_output_watts", "", 1500),
            ("GRID", {30127: none, 30128: none}, "inverter_power_output_watts", "", None),
            ("GRID", {30137: 0, 30138: none}, "inverter_input_power_watts", "", None),
            ("GRID", {30137: 0, 30138: minus}, "inverter_input_power_watts", "", 65534),
            ("GRID", {30195: 0, 30196: 9, 30209: 1}, "inverter_meter_power_watts", "", 9),
            ("GRID", {30195: 0, 30196: 9, 30209: 2}, "inverter_meter_power_watts", "", None),
            ("GRID", {30141: 0x7FFF}, "inverter_internal_temperature_decidegrees_celsius", "", None),
            ("GRID", {30210: 0x7FFF}, "inverter_leakage_current_amperes", "", None),
            ("GRID", {30197: 1, 30198: 2, 30209: 1}, "inverter_meter_energy_export_watthours_total", "", 65538),
            ("GRID", {30197: 1, 30198: 2, 30209: 0}, "inverter_meter_energy_export_watthours_total", "", None),
            ("GRID", {30160: 0, 30161: 7}, "inverter_string_power_watts", 'string="6"', 7),
            ("HYBRID", {35175: 0x7FFF}, "inverter_module_temperature_celsius", "", None),
            ("HYBRID", {35175: 0xFFF6}, "inverter_module_temperature_celsius", "", -1),
            ("HYBRID", {35130: none}, "inverter_phase_power_watts", 'phase="2"', None),
            ("HYBRID", {35130: minus}, "inverter_phase_power_watts", 'phase="2"', -2),
            ("HYBRID", {35138: none}, "inverter_power_output_watts", "", -1),
            ("HYBRID", {35181: none, 35184: 1}, "battery_current_amperes", 'battery="1"', -0.1),
            ("HYBRID", {35181: none, 35184: 0}, "battery_current_amperes", 'battery="1"', None),
            ("HYBRID", {35181: none, 35184: none}, "battery_current_amperes", 'battery="1"', None),
            ("HYBRID", {35181: none, 35266: 1}, "battery_current_amperes", 'battery="1"', None),
            ("HYBRID", {39005: 50, 35266: 1}, "battery_state_of_charge_ratio", 'battery="2"', 0.5),
            ("HYBRID", {39005: 50, 35184: 1}, "battery_state_of_charge_ratio", 'battery="2"', None),
            ("HYBRID", {35180: none, 35184: 1}, "battery_voltage_volts", 'battery="1"', None),
            ("HYBRID", {36015: 0, 36016: 0, 36004: 1}, wh, "", None),
            ("HYBRID", {36015: 0x8000, 36016: 0, 36004: 1}, wh, "", None),
            ("HYBRID", {36104: 0, 36105: 1, 36106: 0, 36107: 5, 36004: 1}, wh, "", 2**32 + 5),
            ("HYBRID", {36104: 0, 36105: 1, 36106: 0, 36107: 5, 36004: 0}, wh, "", None),
            ("HYBRID", {36104: 0, 36105: 0, 36106: 0, 36107: 0, 36004: 1}, wh, "", None),
            ("HYBRID", {36104: 0, 36105: 0, 36106: 0, 36107: 0, 36015: 0x447A, 36016: 0, 36004: 1}, wh, "", 100),
            ("HYBRID", {36104: 0, 36105: 0, 36106: 0, 36107: 5, 36015: 0x447A, 36016: 0, 36004: 1}, wh, "", 5),
            ("HYBRID", {36104: none, 36105: none, 36106: none, 36107: none, 36015: 0x447A, 36016: 0, 36004: 1}, wh, "", 100),
            ("HYBRID", {36015: 0x447A, 36016: 0, 36004: 1}, wh, "", 100),
            ("HYBRID", {36015: 0x7FC0, 36016: 0, 36004: 1}, wh, "", "bad"),
            ("HYBRID", {36015: 0xC47A, 36016: 0, 36004: 1}, wh, "", "bad"),
            ("HYBRID", {36025: 0, 36026: 5}, "meter_power_export_watts", "", None),
            ("HYBRID", {36025: none, 36026: none, 36004: 1}, "meter_power_export_watts", "", -1),
        ):  # fmt: skip
            with self.subTest(family, words=words, metric=metric):
                found = sems.reading(family, words)
                self.assertEqual(found.values.get((metric, labels)), None if wanted == "bad" else wanted)
                self.assertEqual(found.not_finite, int(wanted == "bad"))


class MetricRows(unittest.TestCase):
    def test_rows(self):
        """The command's rows: every metric once, with its labels, unit, families and evidence."""
        rows = sems.metric_rows()
        self.assertEqual(sorted((row[0], (row[1], row[4])) for row in rows), sorted(sems.METRICS.items()))
        device, found = sems.DEVICE_LABELS, {row[0]: row[2:4] + row[5:] for row in rows}
        for name, wanted in (
            ("meter_voltage_volts", (f"{device}, channel (1 2 3)", "V", "HK1000, HK3000, HYBRID", "capture, inferred, capture")),
            ("inverter_phase_frequency_hertz", (f"{device}, phase (1 2 3)", "Hz", "GRID, HYBRID", "capture + map, capture")),
            ("inverter_energy_output_hectowatt_hours_day", (device, "100 Wh", "GRID, HYBRID", "capture, capture")),
            ("sems_mitm_file_errors_total", ("file (capture backfill spool)", "", "", "exporter")),
            ("process_cpu_seconds_total", ("", "s", "", "exporter")),
        ):  # fmt: skip
            self.assertEqual(found[name], wanted, name)

    def test_zeros(self):
        """What starts at 0 is a counter with at most one label."""
        for name, label, values in sems.FIXED:
            with self.subTest(name):
                self.assertEqual((sems.METRICS[name][0], "," in label), ("counter", False))
                self.assertEqual(values == sems.ALONE, not label)


# ------------------------------------------------------------------------------------------------ checksum, cipher


def bitwise(data: bytes) -> int:
    """CRC-16/MODBUS as its definition says."""
    crc = 0xFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc


class Checksum(unittest.TestCase):
    def test_vectors(self):
        """Published checksums."""
        for data, wanted in ((b"", 0xFFFF), (b"1", 0x947E), (b"123456789", 0x4B37), (b"\x02\x07", 0x1241), (b"\1\3\0\0\0\x0a", 0xCDC5)):  # fmt: skip
            self.assertEqual(sems.crc16(data), wanted, data)

    def test_definition(self):
        """Any bytes of any length, also zeros and ones in front, also as a memoryview."""
        rng = random.Random(1)
        for size in (*range(1, 130), 166, 717, 817, 1001, 4105, 8205):
            for data in (rng.getrandbits(8 * size).to_bytes(size, "big"), bytes(size), b"\xff" * size):
                self.assertEqual(sems.crc16(data), bitwise(data), data)
            self.assertEqual(sems.crc16(memoryview(data)), bitwise(data))


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
        for row in (
            ("2b7e151628aed2a6abf7158809cf4f3c", "3243f6a8885a308d313198a2e0370734", "3925841d02dc09fbdc118597196a0b32"),
            ("000102030405060708090a0b0c0d0e0f", "00112233445566778899aabbccddeeff", "69c4e0d86a7b0430d8cdb78070b4c55a"),
        ):  # fmt: skip
            key, clear, cipher = map(bytes.fromhex, row)
            self.assertEqual(sems.encrypt(clear, bytes(16), key), cipher)
            self.assertEqual(sems.decrypt(cipher, bytes(16), key), clear)

    def test_round_trip(self):
        """decrypt is the inverse of encrypt for any number of blocks, more than a chunk too, and of none."""
        rng, iv = random.Random(2), bytes(range(16, 32))
        for size in (0, 16, 32, 112, 704, sems.CHUNK - 16, sems.CHUNK, sems.CHUNK + 16, 3 * sems.CHUNK + 160):
            clear = rng.getrandbits(8 * size).to_bytes(size, "big")
            self.assertEqual(sems.decrypt(sems.encrypt(clear, iv), iv), clear, size)


# --------------------------------------------------------------------------------------------------------- frames


def claim(size: int, body: bytes = b"", wire=OUT) -> bytes:
    """The beginning of a frame that claims to have so many bytes."""
    return wire.prefix + (size - wire.overhead).to_bytes(4, "big") + body


def whole(size: int, body: bytes = b"", wire=OUT) -> bytes:
    """A frame of so many bytes with a good CRC, of zeros behind body."""
    return with_crc(claim(size, body, wire).ljust(size, b"\0"), wire)


FRAME, SHORT, EMPTY = frame(), frame(sems.CONFIRMATION), frame(clear=b"\0" + b"\xff" * 15)
ACK, CLOCK = sems.ack("0304", METER, sems.time_stamp(NOON)), sems.clock_write(3, METER, sems.time_stamp(NOON))
TINY = whole(13, b"\3\4")  # the length field is 0
BAD, BEAT = spoilt(FRAME), b"\x01\x02"

# name, direction, the pieces that come, those that the end of the stream gives; together they are the stream. Of a run of
# bad frames each second one is taken whole.
STREAMS = (
    ("a frame",                            OUT, [("frame", FRAME)], []),
    ("three frames",                       OUT, [("frame", FRAME)] * 3, []),
    ("frames of several sizes",            OUT, [("frame", FRAME), ("frame", SHORT), ("frame", EMPTY), ("frame", SHORT)], []),
    ("13 bytes",                           OUT, [("frame", TINY), ("frame", TINY)], []),
    ("a length of 8 KiB",                  OUT, [("frame", whole(8192 + 13))], []),
    ("a length of one more",               OUT, [("junk", claim(8193 + 13, b"x" * 40)), ("frame", FRAME)], []),
    ("a length of all ones",               OUT, [("junk", b"POSTGW" + b"\xff" * 4), ("frame", FRAME)], []),
    ("a bad CRC",                          OUT, [("malformed", BAD)], []),
    ("two bad CRCs",                       OUT, [("malformed", BAD), ("malformed", BAD)], []),
    ("bad between good",                   OUT, [("frame", FRAME), ("malformed", BAD), ("frame", FRAME)], []),
    ("a bad one of 13 bytes",              OUT, [("malformed", spoilt(TINY)), ("frame", SHORT)], []),
    ("junk before",                        OUT, [("junk", b"\0GET / HTTP/1.1\r\n"), ("frame", FRAME)], []),
    ("junk between",                       OUT, [("frame", FRAME), ("junk", b"zz"), ("frame", FRAME)], []),
    ("junk alone",                         OUT, [("junk", b"hello")], []),
    ("junk behind a bad one",              OUT, [("malformed", spoilt(SHORT)), ("junk", b"hello"), ("frame", SHORT)], []),
    ("a bad one behind junk",              OUT, [("junk", b"hello"), ("malformed", BAD), ("junk", b"hello"), ("malformed", BAD)], []),
    ("a prefix within a prefix",           OUT, [("junk", b"POSTPOST"), ("frame", FRAME)], []),
    ("a good one in a bad one",            OUT, [("malformed", claim(300, b"x" * 9)), ("frame", FRAME), ("junk", b"y" * (281 - len(FRAME)))], []),
    ("a good one in two bad ones",         OUT, [("malformed", claim(300)), ("malformed", claim(200, b"x") + SHORT + b"y" * (189 - len(SHORT))), ("junk", b"y" * 90)], []),
    ("a good one in the third bad one",    OUT, [("malformed", claim(300)), ("malformed", claim(50, b"x" * 40)), ("malformed", claim(200, b"x")), ("frame", SHORT), ("junk", b"y" * 179)], []),
    ("a good one behind two bad ones",     OUT, [("malformed", claim(90, b"x" * 9)), ("malformed", claim(40, b"x" * 30)), ("frame", SHORT)], []),
    ("a bad one in a bad one",             OUT, [("malformed", claim(70)), ("malformed", claim(60, b"x" * 50)), ("frame", SHORT)], []),
    ("a good one across the end of one",   OUT, [("malformed", claim(100, b"x" * 9)), ("frame", FRAME)], []),
    ("too long a claim in a bad one",      OUT, [("malformed", claim(60, claim(9000, b"x" * 40))), ("junk", b"zz"), ("frame", SHORT)], []),
    ("a cut prefix",                       OUT, [("frame", SHORT)], [("junk", b"POSTG")]),
    ("a cut header",                       OUT, [("frame", SHORT)], [("malformed", b"POSTGW\0\0")]),
    ("a cut frame",                        OUT, [("frame", SHORT)], [("malformed", FRAME[:-1])]),
    ("a good one in a cut one",            OUT, [], [("malformed", claim(5000, b"x" * 9)), ("frame", FRAME), ("junk", b"end")]),
    ("a cut one in a cut one",             OUT, [], [("malformed", claim(5000, b"x" * 9)), ("malformed", FRAME[:-1])]),
    ("an inward frame",                    OUT, [("junk", ACK)], []),
    ("no keep-alive outward",              OUT, [("junk", BEAT), ("frame", SHORT)], []),
    ("answers",                            IN,  [("frame", ACK), ("frame", CLOCK), ("frame", ACK)], []),
    ("keep-alives",                        IN,  [("keepalive", BEAT)] * 3, []),
    ("keep-alives between",                IN,  [("keepalive", BEAT), ("frame", ACK), ("keepalive", BEAT), ("keepalive", BEAT), ("frame", CLOCK)], []),
    ("a keep-alive behind junk",           IN,  [("junk", b"\0" + BEAT), ("frame", ACK), ("keepalive", BEAT)], []),
    ("a keep-alive behind a bad one",      IN,  [("malformed", spoilt(ACK)), ("junk", BEAT), ("frame", ACK)], []),
    ("junk behind a keep-alive",           IN,  [("frame", ACK), ("keepalive", BEAT), ("junk", b"\2" + BEAT), ("frame", ACK)], []),
    ("half a keep-alive",                  IN,  [("frame", ACK)], [("junk", b"\1")]),
    ("half a keep-alive before a frame",   IN,  [("junk", b"\1"), ("frame", ACK)], []),
    ("an inward length of 4 KiB",          IN,  [("frame", whole(4096 + 9, wire=IN))], []),
    ("an inward length of one more",       IN,  [("junk", claim(4097 + 9, b"z" * 9, IN)), ("frame", ACK)], []),
    ("a good answer in a bad one",         IN,  [("malformed", claim(90, b"z" * 9, IN)), ("frame", ACK), ("junk", b"z" * 17)], []),
)  # fmt: skip


def joined(pieces: list) -> list:
    """Pieces with runs of junk as one: what does not depend on the cut of the reads."""
    found: list = []
    for kind, data in pieces:
        if found and kind == found[-1][0] == sems.JUNK:
            found[-1] = (kind, found[-1][1] + data)
        else:
            found.append((kind, data))
    return found


class FramerTest(SocketCase):
    def check(self, wire, reads, came, closed):
        """Feed the reads; what comes and what the end gives, and that nothing is lost."""
        framer = sems.Framer(wire)
        pieces = [piece for data in reads for piece in framer.feed(data, 0.0)]
        rest, ends = framer.rest, framer.close()
        self.assertEqual(b"".join(data for _, data in pieces + ends), b"".join(reads))
        self.assertEqual((rest, framer.rest), (b"".join(data for _, data in closed), b""))
        self.assertEqual((joined(pieces), joined(ends)), (came, closed))

    def test_streams(self):
        """Each stream whole, byte by byte, in two, at random cuts, doubled, and behind junk: the pieces are the same."""
        rng = random.Random(3)
        for name, wire, came, closed in STREAMS:
            data = b"".join(part for _, part in came + closed)
            begins_with_beat = came[:1] and came[0][0] == "keepalive"
            cuts = {"whole": [data], "byte by byte": [data[i : i + 1] for i in range(len(data))]}
            cuts.update({f"at {at}": [data[:at], data[at:]] for at in range(1, min(len(data), 400), 3)})
            cuts.update({f"at random {i}": random_cuts(data, rng, 40) for i in range(5)})
            for cut, reads in cuts.items():
                with self.subTest(name, cut=cut):
                    self.check(wire, reads, came, closed)
            with self.subTest(name, cut="doubled"):
                if not closed and not (begins_with_beat and came[-1][0] in ("junk", "malformed")):
                    self.check(wire, [data, data], joined(came * 2), [])
                    self.check(wire, [data + data], joined(came * 2), [])
            with self.subTest(name, cut="behind junk"):
                if not begins_with_beat:
                    self.check(wire, [b"\0\0" + data], joined([("junk", b"\0\0"), *came]), closed)

    def test_any_cut(self):
        """At random: the pieces, also those that the end gives, depend on no cut."""
        words = {OUT: (FRAME, SHORT, TINY, BAD, b"POST"), IN: (ACK, CLOCK, BEAT, spoilt(ACK), b"GW", b"\1")}
        for seed in range(150):
            rng, wire, found = random.Random(seed), (OUT, IN)[seed % 2], []
            claims = [claim(size, wire=wire) for size in (13, 50, 300, 900, 4000, 9000)]
            data = b"".join(rng.choice((*words[wire], *claims, b"zz")) for _ in range(15))
            for reads in ([data], random_cuts(data, rng, 40), random_cuts(data, rng, 3)):
                framer = sems.Framer(wire)
                came = joined([piece for read in reads for piece in framer.feed(read, 0.0)])
                found.append((came, joined(framer.close())))
                self.assertEqual(b"".join(part for pieces in found[-1] for _, part in pieces), data)
            self.assertEqual(found, found[:1] * 3, data.hex())

    def test_any_good_frame(self):
        """A good frame behind a torn one, or behind junk, is a piece at once: of random bytes and cut frames."""
        for seed in range(300):
            rng = random.Random(seed)
            before = rng.choice((FRAME, SHORT, claim(8000), FRAME + SHORT))
            before = before[: rng.randrange(1, len(before))] + rng.getrandbits(80).to_bytes(10, "big")
            pieces = sems.Framer(OUT).feed(before + FRAME * 60, 0.0)
            self.assertIn(("frame", FRAME), pieces, before.hex())

    def test_patience(self):
        """The wait for an unfinished frame begins with its first byte, or with the read that ended the one before."""
        limit = sems.PATIENCE["outbound"]
        self.assertEqual(sems.PATIENCE, {"outbound": 30, "inbound": 5})
        reads = (FRAME[:9], FRAME[9:20], FRAME[20:] + SHORT[:5], SHORT[5:], b"POS")
        for count, begin in ((1, 0), (2, 0), (3, 2), (4, None), (5, 4)):
            framer = sems.Framer(OUT)
            for now, data in enumerate(reads[:count]):
                framer.feed(data, float(now))
            with self.subTest(reads=count):
                if begin is None:
                    self.assertEqual((framer.rest, framer.expire(1e9)), (b"", []))
                else:
                    rest = framer.rest
                    self.assertEqual(framer.expire(begin + limit - 0.1), [])
                    self.assertEqual(b"".join(data for _, data in framer.expire(begin + limit)), rest)

    def test_given_up(self):
        """What is given up is searched like a bad frame; one that it hid waits from then on."""
        framer = sems.Framer(OUT)
        data = claim(8000, b"x" * 9) + FRAME + claim(7000, b"y" * 9)
        self.assertEqual(framer.feed(data, 0.0), [])
        self.assertEqual((framer.expire(29.0), framer.rest), ([], data))
        self.assertEqual(framer.expire(30.0), [("malformed", data[:19]), ("frame", FRAME)])
        self.assertEqual((framer.rest, framer.expire(59.0)), (data[-19:], []))
        self.assertEqual(framer.expire(60.0), [("malformed", data[-19:])])
        self.assertEqual((framer.rest, framer.feed(SHORT, 61.0)), (b"", [("frame", SHORT)]))

    def test_malice(self):
        """Megabytes of prefixes and nested claims: a byte is checked about twice at most, and the rest is bounded."""
        size, worked, real = 1 << 17, [0], sems.crc16

        def counted(data):
            worked[0] += len(data)
            return real(data)

        streams = {"P": b"P" * size, "prefixes": (OUT.prefix * size)[:size], "bad frames": (BAD * size)[:size]}
        streams.update({f"claims of {n}": claim(n) * (size // 10) for n in (13, 100, 1000, 8000)})
        streams["good, then bad"] = ((FRAME * 200 + BAD * 200) * 20)[:size]
        streams["claims around good ones"] = claim(5000, claim(4000, TINY)) * (size // 33)
        streams["long claims, each with a good one"] = claim(8000, TINY) * (size // 23)
        streams["claims of all sizes"] = b"".join(claim(n) for n in range(8000, 13, -1))
        for name, data in streams.items():
            for step in (size, 1000, 100):
                with self.subTest(name, step=step), mock.patch.object(sems, "crc16", counted):
                    framer, worked[0], came = sems.Framer(OUT), 0, []
                    for at in range(0, len(data), step):
                        came += framer.feed(data[at : at + step], 0.0)
                        self.assertLessEqual(len(framer.rest), OUT.cap + OUT.overhead)
                    self.assertEqual(b"".join(part for _, part in came) + framer.rest, data)
                    good = sum(len(part) for kind, part in came if kind == "frame")
                    self.assertLessEqual(worked[0] - good, 2.5 * len(data) + OUT.cap)


# -------------------------------------------------------------------------------------------------------- packets


class Packets(unittest.TestCase):
    def test_vectors(self):
        """Each vector decodes to exactly its metrics, encodes back to its bytes, and may pass to a device as its name says."""
        meanings = {"ACK": "ack", "NACK": "nack", "sets": "clock", "dropped": ""}
        for vector in VECTORS:
            data, wire = bytes.fromhex(vector["hex"]), IN if vector["direction"] == "inbound" else OUT
            with self.subTest(vector["name"]):
                self.assertEqual(sems.Framer(wire).feed(data, 0.0), [("frame", data)])
                where, packet = sems.address_of(data, wire), sems.decode(data, wire)
                self.assertEqual((sems.encode(packet), packet.type, packet.serial), (data, where.type, where.serial))
                if wire is IN:
                    meaning = next(meanings[word] for word in re.findall(r"\w+", vector["name"]) if word in meanings)
                    self.assertEqual(sems.allowed(where, packet.clear, {1, 2, 3}), meaning)
                elif where.function in sems.DATA:
                    ranges = sems.blocks(packet.clear)
                    self.assertEqual(sems.payload(ranges), packet.clear)
                    found = sems.reading(sems.family(where.cls, where.serial), sems.registers(packet.clear)).values
                    wanted = {(row["metric"], row["labels"]): row["value"] for row in vector["metrics"] or ()}
                    self.assertEqual(found if wanted else {}, wanted)
                    self.assertEqual(packet.iv, sems.device_iv(packet.time))

    def test_portal_answers(self):
        """From type, serial and time the real portal's frames follow byte for byte; these are the digests of four of them."""
        for serial, kind, stamp, digest in (
            ("53000DSC01234567", "0103", (23, 12, 22, 12, 7, 56), "de8128292722cdcfdaf92441dfb6c454d18e30cbc92bcc5ff92473fd8128f4bf"),
            ("91000HKU01234567", "0304", (23, 11, 3, 13, 52, 8), "d57430cf261763e7571e63aefd4f3c4aedea37aad37955680d9feb9e756f1794"),
            ("91000HKU01234567", "0303", (23, 10, 30, 14, 20, 28), "8740ce7e8ae5c2d48b96bebabc94de3c40646ec81e709106fe77f69c7f028782"),
            ("91000HKU01234567", "0116", (23, 10, 30, 14, 20, 28), "bdec5d6a2a2a732b3f73686759651b8bb1bb277d39b607c7ac56f1cddc111a77"),
        ):  # fmt: skip
            make, what = (sems.clock_write, sems.METER) if kind == "0116" else (sems.ack, kind)
            self.assertEqual(hashlib.sha256(make(what, serial, bytes(stamp))).hexdigest(), digest, kind)

    def test_envelopes(self):
        """The function tells the envelope, for an unknown one the length; whatever does not fit is malformed."""
        body = METER.encode() + bytes(16)
        for name, rest, form in (
            ("long", b"\3\4\0\0" + body + bytes(6 + 32), sems.LONG), ("short", b"\3\x10" + body + bytes(16), sems.SHORT),
            ("unknown, long", b"\3\x77\0\0" + body + bytes(6 + 16), sems.LONG), ("unknown, short", b"\3\x77" + body + bytes(48), sems.SHORT),
            ("unknown, neither", b"\3\x77" + body + bytes(50), None), ("no cipher text", b"\3\4\0\0" + body + bytes(6), None),
            ("cipher text cut", b"\3\4\0\0" + body + bytes(6 + 17), None), ("a short one for data", b"\3\4" + body + bytes(16), None),
            ("a long one for a confirmation", b"\3\x10\0\0" + body + bytes(6 + 16), None), ("too short for a serial", b"\3\x10" + body[:10], None),
            ("no function", b"\3", None), ("a NUL in the serial", b"\3\x10" + b"\0" + body[1:] + bytes(16), None),
            ("a byte above 7E", b"\3\x10" + b"\x7f" + body[1:] + bytes(16), None),
        ):  # fmt: skip
            data = with_crc(with_length(OUT.prefix + bytes(4) + rest + b"\0\0"))
            with self.subTest(name):
                if form:
                    where = sems.address_of(data, OUT)
                    self.assertEqual((where.serial, where.form, where.owner), (METER, form, ("meter", METER)))
                    self.assertEqual(sems.encode(sems.decode(data, OUT)), data)
                else:
                    with self.assertRaises(sems.ProtocolError) as caught:
                        sems.address_of(data, OUT)
                    self.assertTrue(data.startswith(caught.exception.data) and caught.exception.data)
        for data in (TINY, whole(9, wire=IN), whole(20, b"\3\4", IN)):
            with self.assertRaises(sems.ProtocolError):
                sems.address_of(data, IN if data[:2] == b"GW" else OUT)

    def test_payload_grammar(self):
        """What a payload is: a list of ranges that parses to its end, with 0 to 15 bytes FF behind it."""
        for name, clear, wanted in (
            ("empty", b"\0" + b"\xff" * 15, {}), ("one block", bytes.fromhex("01 0800 0801 0001 0002") + b"\xff" * 7, {2048: 1, 2049: 2}),
            ("a range cut", bytes.fromhex("01 0800 0806 0000 0001 0002 0003 0004 00"), None),
            ("no padding", bytes.fromhex("01 0001 0005") + bytes(9) + b"\7\xff\xff", {1: 0, 2: 0, 3: 0, 4: 0, 5: 7}),
            ("none at all", bytes.fromhex("02 0001 0001 0007 0003 0004 0008 0009")[:7] + bytes.fromhex("0003 0004 0008 0009") + b"\xff", {1: 7, 3: 8, 4: 9}),
            ("16 bytes of padding", bytes.fromhex("01 0800 0800 0001") + b"\xff" * 16, None),
            ("padding of zeros", bytes.fromhex("01 0800 0800 0001") + bytes(9), None),
            ("padding with another byte", bytes.fromhex("01 0800 0800 0001") + b"\xff" * 8 + b"\0", None),
            ("last before first", bytes.fromhex("01 0801 0800 0001") + b"\xff" * 9, None),
            ("last right before first", bytes.fromhex("01 0801 0800") + b"\xff" * 11, None),
            ("a range past the end", bytes.fromhex("01 0800 0810 0001") + b"\xff" * 9, None),
            ("a header past the end", b"\x03" + bytes.fromhex("0800 0800 0001") * 2 + b"\xff" * 3, None),
            ("more blocks than there are", b"\xff" * 16, None),
            ("in any order", bytes.fromhex("02 0900 0900 0001 0800 0800 0002") + b"\xff" * 3, {2304: 1, 2048: 2}),
            ("a register twice: the later", bytes.fromhex("02 0800 0800 0001 0800 0800 0002") + b"\xff" * 3, {2048: 2}),
            ("the last register of all", bytes.fromhex("01 ffff ffff 0001") + b"\xff" * 9, {65535: 1}), ("nothing at all", b"", None),
        ):  # fmt: skip
            with self.subTest(name):
                if wanted is None:
                    with self.assertRaises(sems.ProtocolError):
                        sems.registers(clear)
                else:
                    self.assertEqual(sems.registers(clear), wanted)
        ranges = [(30103, (1, 2, 3)), (2048, (65535,))]
        self.assertEqual(sems.blocks(sems.payload(ranges)), ranges)


class Fuzz(unittest.TestCase):
    """Frames or ProtocolError, never another exception, never an unbounded buffer."""

    def setUp(self):
        self.rng = random.Random(20260321)
        ranges = [(2048, (0, 1, 2)), (2105, (0xFFFF, 0xFFF0, 0, 5)), (36004, (1,)), (36015, (0x7FC0, 0))]
        self.clears = [sems.payload(ranges), sems.payload(INVERTER_RANGES)]
        kinds = itertools.product((3, 4, 0x45, 0x77), (1, 2, 3, 9))
        self.seeds = [(OUT, frame(function, cls, ranges=ranges)) for function, cls in kinds]
        self.seeds += [(IN if v["direction"] == "inbound" else OUT, bytes.fromhex(v["hex"])) for v in VECTORS]
        self.seeds += [(OUT, EMPTY), (OUT, TINY), (IN, BEAT + ACK + BEAT), (IN, portal_frame("0304", bytes(32)))]

    def mutated(self, data: bytes) -> bytes:
        """data with up to three flips, cuts and inserts."""
        found, rng = bytearray(data), self.rng
        for _ in range(rng.randrange(4)):
            at, size = rng.randrange(len(found)), rng.choice((0, 0, 1, 2, rng.randrange(20)))
            inserts = (b"POSTGW", b"GW", BEAT, b"\xff\xff", b"\0\0", b"\0\x10", bytes(16), found[:at][-20:], b"", b"")
            found[at : at + size] = rng.choice(inserts)
            if found[at:] and rng.random() < 0.3:
                found[at] ^= 1 << rng.randrange(8)
            found = found or bytearray(1)
        return bytes(found)

    def test_frames(self):
        """20,000 frames, mutated, many with a good CRC again, in reads of any size, through all that reads them."""
        good, began, live = 0, time.process_time(), sems.Live()
        for case in range(20_000):
            wire, data = self.seeds[case % len(self.seeds)]
            data = self.mutated(data)
            if case % 3 == 0 and len(data) > 16:
                data = with_crc(with_length(data, wire) if case % 2 else data, wire)
            framer, pieces = sems.Framer(wire), []
            for part in random_cuts(data, self.rng):
                pieces += framer.feed(part, 0.0)
                self.assertLessEqual(len(framer.rest), wire.cap + wire.overhead)
            pieces += framer.close()
            self.assertEqual(b"".join(part for _, part in pieces), data, data.hex())
            for kind, part in pieces:
                good += kind == "frame"
                with contextlib.suppress(sems.ProtocolError):
                    self.contents(wire, part, live, kind == "frame" and case % 4 == 0)
            if case % 10 == 0:
                with contextlib.suppress(sems.ProtocolError):
                    words = sems.registers(self.mutated(self.rng.choice(self.clears)))
                    sems.reading(self.rng.choice(sems.FAMILIES), words)
        self.assertGreater(good, 7000)
        self.assertLess(time.process_time() - began, 30)

    def contents(self, wire, data, live, and_back):
        """All that a frame may come to."""
        where, packet = sems.address_of(data, wire), sems.decode(data, wire)
        if and_back:
            self.assertEqual(sems.encode(packet), data)
        if wire is IN:
            self.assertIn(sems.allowed(where, packet.clear, {where.cls}), ("ack", "nack", "clock", ""))
        else:
            if sems.draws_bat(where) and and_back:
                self.assertIn(len(sems.with_bat(data) or data), range(len(data) - 15, len(data) + 1))
            live.take(sems.reading(sems.family(where.cls, where.serial), sems.registers(packet.clear)), 0.0, 0.0)


# -------------------------------------------------------------------------------------- readings, identity, time, bat


class Readings(unittest.TestCase):
    def test_exact(self):
        """Values are written as exact decimals."""
        for i in range(0, 65535, 7):
            found = sems.reading("GRID", {30105: i}).values["inverter_string_voltage_volts", 'string="2"']
            self.assertEqual(sems.page("", {("a", ""): found})["a"], f"a {i // 10}.{i % 10}\n")
        words = sems.registers(sems.payload([(2049, (2, 3)), (2048, (1,))]))  # a number's registers in two ranges
        found = sems.reading("HK1000", words).values["meter_energy_export_decawatt_hours_total", ""]
        self.assertEqual(found, 2**32 + 2 * 65536 + 3)

    def test_unknown(self):
        """Registers in no table are unknown, but for 0 and FFFF; at most 128 are kept, the lowest first."""
        for family, words, wanted in (
            ("GRID", {30175: 7, 30176: 0, 30177: 0xFFFF, 30103: 1, 30100: 1, 30034: 1, 30221: 1, 40075: 1}, {30175: 7}),
            ("HYBRID", {35000: 1, 35032: 1, 35100: 1, 35102: 1, 35119: 3}, {35119: 3}),
            ("HK1000", {4891: 1, 4871: 1, 4622: 1, 5000: 4, 2072: 5}, {2072: 5, 5000: 4}),
        ):
            self.assertEqual([*sems.reading(family, words).unknown.items()], [*wanted.items()], family)
        live = sems.Live()
        live.take(sems.reading("GRID", {**dict.fromkeys(range(10000, 10200), 7), 9000: 5}), 0.0, 0.0)
        self.assertEqual([*live.unknown], [9000, *range(10000, 10127)])

    def test_info(self):
        """Texts of a device: ASCII in registers, NUL, blank and FF trimmed; whole or not at all."""
        text = sems.text_words
        for name, first, words, wanted in (
            ("a model", 40173, text("GW3000-XS", 16), {"model": "GW3000-XS"}),
            ("a hybrid's model", 35011, text("GW10K-ET", 5), {"model": "GW10K-ET"}),
            ("trimmed", 35011, (0x2047, 0x5720, 0xFFFF, 0xFFFF, 0), {"model": "GW"}), ("all FF", 35011, (0xFFFF,) * 5, {}),
            ("a word short", 35011, text("GW10K-ET", 4), {}),
            ("firmware of a grid-tied one", 30221, text("410-02065-04", 6), {"firmware": "410-02065-04"}),
            ("firmware of a hybrid", 35021, text("04029-02-S1104029-02-S00", 12), {"firmware": "04029-02-S11 04029-02-S00"}),
            ("of a HomeKit", 4864, text("02053-05-000Me05", 8), {"firmware": "02053-05-000Me05"}),
            ("of a module", 4891, (0x5631, 0x380D, 0x0A56, 0x340D, 0x0A00), {"module_firmware": "V18 V4"}),
            ("a module of an inverter", 30054, text("V1.2", 8), {"module_firmware": "V1.2"}),
            ("the portal of a HomeKit", 4609, text("20001,tcp.goodwe-power.com", 14), {"portal": "tcp.goodwe-power.com:20001"}),
            ("the portal of an inverter", 40075, text("tcp.goodwe-power.com", 26), {"portal": "tcp.goodwe-power.com"}),
            ("one with a comma", 40075, text("a.example,b.example", 26), {"portal": "a.example,b.example"}),
        ):  # fmt: skip
            with self.subTest(name):
                self.assertEqual(sems.info({first + i: word for i, word in enumerate(words)}), wanted)


class Identity(unittest.TestCase):
    def test_models(self):
        """The model from what the device tells, or from its serial; the original's two names are fixed."""
        for serial, told, wanted in (
            ("91000HKU00000042", "", "HomeKit 1000 Smart Meter"), ("91000HKU00000042", "SDM", "HomeKit 1000 Smart Meter"),
            ("53000DSC00000042", "GW3000D", "GW3000-DNS-30"), ("93000HKU00000042", "", "HomeKit 3000 Smart Meter"),
            ("81000HKU00000042", "", "HomeKit 1000 Smart Meter"), ("92000HKU00000042", "", "GoodWe HKU 2000 W"),
            ("93000DSN00000042", "", "GoodWe DSN 3000 W"), ("93000DSN00000042", "GW3000D-NS", "GW3000D-NS"),
            ("9010KETU00000042", "", "GoodWe ETU 10 kW"), ("9100KMTU00000042", "", "GoodWe MTU 100 kW"), ("9X00KDSN00000042", "", "GoodWe DSN"),
            ("9ABCDDSN00000042", "", "GoodWe DSN"), ("912.5DSN00000042", "", "GoodWe DSN"), ("90000DSN00000042", "", "GoodWe DSN"),
            ("912 5 S 00000042", "", "GoodWe S"),
        ):  # fmt: skip
            self.assertEqual(sems.model(serial, told), wanted, (serial, told))

    def test_families(self):
        """The register family from class and rating; an unknown class is read as grid-tied. The identity is three labels."""
        for cls, serial, wanted in (
            (3, METER, "HK1000"), (3, "93000HKU00000042", "HK3000"), (3, "92000XXX00000042", "HK1000"), (1, INVERTER, "GRID"),
            (2, HYBRID, "HYBRID"), (2, "93000HKU00000042", "HYBRID"), (9, METER, "GRID"), (0, INVERTER, "GRID"),
        ):  # fmt: skip
            self.assertEqual(sems.family(cls, serial), wanted, (cls, serial))
            self.assertEqual(sems.kind_of(cls), "meter" if cls == 3 else "inverter")
        name = sems.identity("inverter", '9\\00"DSN0000"\\ 2', "GW")
        self.assertEqual(name, ("inverter", "GW", '0000"\\ 2'))
        self.assertEqual(sems.device_labels(name), 'device="inverter",model="GW",serial="0000\\"\\\\ 2"')

    def test_texts(self):
        """Device texts in labels: printable ASCII, anything else a blank, blanks collapsed, ends trimmed, 64 characters."""
        for text, wanted in (
            (b"GW3000", "GW3000"), (b"  a\0\0b \xff c\x7f", "a b c"), ("\u00e9t\u00e9", "t"), (b"\r\n", ""), (b"~ !", "~ !"),
            ("x" * 70, "x" * 64), ("x" * 63 + " y", "x" * 63), (b'a"\\', 'a"\\'),
        ):  # fmt: skip
            self.assertEqual(sems.label_text(text), wanted, text)
        self.assertEqual(sems.label("a", 'b"c\\d\ne'), 'a="b\\"c\\\\d\\ne"')

    def test_times(self):
        """Six bytes are a calendar date or none."""
        for stamp, wanted in (
            ((26, 3, 21, 12, 0, 0), NOON), ((24, 2, 29, 23, 59, 59), datetime(2024, 2, 29, 23, 59, 59)), ((23, 2, 29, 0, 0, 0), None),
            ((26, 13, 1, 0, 0, 0), None), ((26, 0, 1, 0, 0, 0), None), ((26, 1, 1, 24, 0, 0), None), ((26, 1, 1, 0, 60, 0), None),
            ((26, 1, 1, 0, 0, 60), None), ((255, 1, 1, 0, 0, 0), datetime(2255, 1, 1)), ((0,) * 6, None), ((26, 1), None), ((), None),
        ):  # fmt: skip
            self.assertEqual(sems.device_time(bytes(stamp)), wanted, stamp)
        self.assertEqual(sems.time_stamp(NOON), bytes((26, 3, 21, 12, 0, 0)))


class Bat(unittest.TestCase):
    # minutes from noon, top and bottom: each branch of the formulas and its ends
    CURVE = (
        (0, 2.25, -3), (30, 2.25, -1.906818), (44, 2.95, -1.718682), (45, 3, -1.708151), (52, 2.066667, -1.644226), (60, 1, -1.591372), (90, 0.83607, -1.589562),
        (120, 0.863141, -2.365489), (180, 2.710524, -1.32235), (181, 2.707124, -1.323318), (240, 2.461955, -2.461955),
        (241, 2.456966, -2.456966), (300, 2.099563, -2.099563), (419, 0.206896, -0.206896), (420, 0, 0), (600, 0, 0),
    )  # fmt: skip

    def test_curve(self):
        """The bat, the same on both sides of noon."""
        for minutes, *wanted in self.CURVE:
            for when in (NOON - timedelta(minutes=minutes), NOON + timedelta(minutes=minutes)):
                self.assertEqual([round(kilowatts, 6) for kilowatts in sems.bat(when)], wanted, when)

    def test_frames(self):
        """Generation and export become the bat, cut to whole watts; nothing else changes but cipher and CRC."""
        twice = [(2107, (0, 0)), (2048, (1,)), (2107, (0, 9))]
        apart = [(2105, (1, 2)), (2107, (3, 4)), (9, (1,))]
        for ranges, hour in itertools.product((METER_RANGES, apart, twice), (5, 9, 12, 20)):
            with self.subTest(hour=hour, ranges=ranges):
                before = frame(sems.BUFFERED, ranges=ranges, when=NOON.replace(hour=hour))
                after = sems.with_bat(before)
                self.assertEqual((after[:52], sems.Framer(OUT).feed(after, 0)), (before[:52], [("frame", after)]))
                wanted = sems.registers(sems.decode(before, OUT).clear)
                for first, kilowatts in zip((2107, 2105), sems.bat(NOON.replace(hour=hour))):
                    raw = struct.unpack(">2H", struct.pack(">i", int(1000 * kilowatts)))
                    wanted.update({first + i: word for i, word in enumerate(raw) if first + i in wanted})
                found = sems.blocks(sems.decode(after, OUT).clear)
                self.assertEqual(sems.registers(sems.payload(found)), wanted)
                self.assertEqual([(at, len(words)) for at, words in found], [(at, len(words)) for at, words in ranges])
        no_date = with_crc(FRAME[:46] + bytes(6) + FRAME[52:])
        for data in (frame(clear=b"\x09" * 16), frame(ranges=[(2048, (1,))]), no_date):
            self.assertIn(sems.with_bat(data), (None, data))

    def test_who_draws(self):
        """Which frames get the bat."""
        for name, data, draws in (
            ("live", FRAME, True), ("buffered", frame(sems.BUFFERED), True), ("settings", frame(sems.SETTINGS), False),
            ("a confirmation", SHORT, False), ("a HomeKit 3000", frame(serial="93000HKU00000042"), False),
            ("a hybrid", frame(cls=2, serial=HYBRID), False), ("an inverter", frame(cls=1, serial=INVERTER), False),
        ):  # fmt: skip
            with self.subTest(name):
                self.assertEqual(sems.draws_bat(sems.address_of(data, OUT)), draws)


# -------------------------------------------------------------------------------------------------------- metrics


def clock(now: float) -> float:
    """A clock by which monotonic 0 is NOON."""
    return NOON.timestamp() + now


def meet(store, *frames: bytes, now: float = 0.0) -> None:
    """The store meets a device's frames."""
    for data in frames:
        store.meet(sems.address_of(data, OUT), data, now)


def shown(store, now: float = 0.0) -> dict:
    """What a scrape shows: series to value."""
    return metrics_of("".join(sems.exposition(store.collect(now))))


def value(store, series: str, now: float = 0.0, **labels: str) -> float:
    """The sum of a metric's samples that a scrape shows."""
    return summed(shown(store, now), series, **labels)


def only(store):
    """The one device there is."""
    (device,) = store.devices.values()
    return device


def serials(store, now: float = 0.0) -> list:
    """The last characters of the devices that are shown."""
    return sorted(re.findall(r'full_serial="[^"]*(.)"', "".join(sems.exposition(store.collect(now)))))


def named(name: str) -> bytes:
    """A grid-tied inverter's settings with a model name."""
    return sems.payload([(40173, sems.text_words(name, 16))])


HOUR, NIGHT, DAY, QUARTER = 3600, 14 * 3600, 86400, 90 * 86400
ENERGY = "meter_energy_export_decawatt_hours_total"  # one is 10 Wh


def increase(values) -> float:
    """What Prometheus's increase() makes of a counter's values: all that it rises, and after a fall all of the new value."""
    return sum(new - old if new >= old else new for old, new in zip(values, values[1:]))


def published(readings, metric: str = ENERGY) -> tuple:
    """The counter of a metric that has said (seconds, number), and the values that a scrape after each reading shows."""
    (start, first), *rest = readings
    counter, values = sems.HeldCounter(metric, first, start), [first]
    for at, number in rest:
        counter.take(number, at)
        values.append(counter.shown.number)
    return counter, values


def apart(seconds: float, *numbers: float, begin: float = 0.0) -> list:
    """Readings so many seconds apart."""
    return [(begin + i * seconds, number) for i, number in enumerate(numbers)]


def after(readings: list, seconds: float, more: list) -> list:
    """Readings, and more of them that begin so many seconds later."""
    return readings + [(readings[-1][0] + seconds + at, number) for at, number in more]


class HeldCountersTest(unittest.TestCase):
    """No kWh that was not there, and none lost."""

    def test_sequences(self):
        """What is shown of a sequence, and what increase() makes of it, beside the energy that was there."""
        minutes = lambda *numbers: apart(60, *numbers)
        known = minutes(58109, 58110)
        years = apart(60, 58109, 58110)
        reset = after(known, 60, [(0, 0), (60, 1), *apart(600, *range(2, 160), begin=600)])
        table = (
            # readings; the last values that are shown; the energy that increase() tells
            ("rising", minutes(5, 6, 6, 9), [5, 6, 6, 9], 4),
            ("a fall of one, for a while", minutes(58110, *[58109] * 5, 58111), [58110] * 6 + [58111], 1),
            ("a fall of one, for ever", minutes(58110, *[58109] * 3000), [58110], 0),
            ("a fall to half, for a while", after(known, 60, minutes(*[29055] * 900, 58111)), [58111], 2),
            ("a fall to half, for ever", after(known, 60, apart(HOUR, *range(29055, 29155))), [58110], 1),
            ("a fall to 40 %, for ever", after(known, 60, apart(HOUR, *range(23244, 23344))), [58110], 1),
            ("a fall to 80 %, until it has caught up", after(known, 60, apart(HOUR, *range(46010, 58211, 100))), [58110, 58210], 101),
            ("once ten times as much", minutes(58110, 581100, 58111), [58110, 58110, 58111], 1),
            ("a jump, once", minutes(58110, 999999, 58111), [58110, 58110, 58111], 1),
            ("a jump, twice", minutes(58110, 999999, 999999, 58111), [58110] * 3 + [58111], 1),
            ("jumps of their own", minutes(58110, 999999, 58111, 888888, 58111, 777777, 58112), [58111, 58111, 58112], 2),
            ("three jumps that fall", minutes(58110, 999999, 888888, 777777, 58111), [58110] * 4 + [58111], 1),
            ("three jumps that rise too much", minutes(58110, 600000, 700000, 800000, 58111), [58110] * 4 + [58111], 1),
            ("three jumps that agree", minutes(58110, 70000, 70001, 70003), [58110] * 3 + [70003], 70003 - 58110),
            ("a fall among jumps", minutes(58110, 70000, 70001, 5, 70003, 70003, 70004), [58110] * 6 + [70004], 70004 - 58110),
            ("a night", after(known, NIGHT, minutes(58600, 58601)), [58600, 58601], 492),
            ("a day of 101 kWh", after(known, DAY, minutes(68210, 68211)), [68210, 68211], 10102),
            ("three months of 101 kWh", after(known, QUARTER, minutes(68210)), [68210], 10101),
            ("three months of more", after(known, QUARTER, minutes(68211, 68212, 68214)), [58110, 58110, 68214], 10105),
            ("a minute's worth", minutes(1000, 1266, 1532), [1000, 1266, 1532], 532),
            ("more than a minute's worth", minutes(1000, 1267, 1268, 1268), [1000, 1000, 1268, 1268], 268),
            ("a real reset", reset, [58110, 159], 1 + 159),
            ("a reset, for not quite a day", after(known, 60, apart(HOUR, *range(24))), [58110], 1),
            ("a reset, for a day", after(known, 60, apart(HOUR, *range(25))), [58110, 24], 1 + 24),
            ("two wrong ones that could be", after(known, HOUR, apart(HOUR, 68200, 58111, 78200, 58112)), [68200] * 4, 10091),
            ("one, and the truth goes by", after(known, HOUR, apart(60, 68200, 68150, 68250, 68251, 68252)), [68200] * 4 + [68252], 10143),
            ("a confirmed jump, the last too high", after(known, HOUR, apart(HOUR, 80000, 80001, 90000, 80002, 99000, 80003)), [90000] * 4, 31891),
            ("one that stands still for a day", after(known, 60, apart(HOUR, *[0] * 40)), [58110], 1),
            ("and comes back", after(known, 60, apart(HOUR, *[7] * 40, 58111)), [58110, 58111], 2),
            ("a reset too high to be true", after(known, 60, apart(HOUR, *range(300, 340))), [58110], 1),
            ("one that is not below half", after(minutes(10, 11), 60, apart(HOUR, *[6] * 30, 7)), [11], 1),
            ("a first that was wrong", minutes(999999, 58110, 58111, 58112), [999999, 999999, 58111, 58112], 58112),
            ("a first that was right, and a dip", minutes(58110, 5, 58111), [58110, 58110, 58111], 1),
            ("a first that was right, and two other dips", minutes(58110, 6, 5, 58111), [58110] * 3 + [58111], 1),
            ("a first that was right, and two zeros", minutes(58110, 0, 0, 58111), [58110] * 3 + [58111], 1),
            ("a channel at 0 for years", apart(DAY, *[0] * 3000, 1, 2), [0, 1, 2], 2),
            ("u32 at its wrap", minutes(2**32 - 2, 2**32 - 1, 0, 1, 2), [2**32 - 1], 1),
            ("u48", minutes(2**48 - 3, 2**48 - 2), [2**48 - 2], 1),
            ("u64", minutes(2**64 - 3, 2**64 - 2), [2**64 - 2], 1),
            ("f32, whose steps are wide", minutes(1677721.6, 1677721.8, 1677721.6, 1677722.0), [1677721.8, 1677721.8, 1677722.0], 0.4),
            ("the same again and again", years + after(years, 60, minutes(*[58110] * 50)), [58110], 1),
        )  # fmt: skip
        for name, readings, last, told in table:
            with self.subTest(name):
                counter, values = published(readings)
                if len(last) == 1 or name in ("a fall to 80 %, until it has caught up", "a real reset"):
                    self.assertEqual(values[-1], last[-1])
                    self.assertLessEqual(set(last), set(values))
                else:
                    self.assertEqual(values[-len(last) :], last)
                self.assertAlmostEqual(increase(values), told, places=6)
                if name != "a first that was wrong":  # our own `today` is not taken in by that
                    self.assertAlmostEqual(counter.gained, told, places=6)
                else:
                    self.assertEqual(counter.gained, 1)

    def test_units(self):
        """How much a house can make counts in each counter's own unit."""
        for metric, most in (
            (ENERGY, 10100), ("meter_channel_energy_export_watthours_total", 101000), ("battery_energy_charge_watthours_total", 101000),
            ("inverter_energy_output_hectowatt_hours_total", 1010), ("inverter_uptime_hours_total", 3),
        ):  # fmt: skip
            with self.subTest(metric):
                for more, taken in ((most, True), (most + 1, False)):
                    _, values = published([(0, 7), (HOUR, 7 + more)], metric)
                    self.assertEqual(values[-1] != 7, taken)
        _, values = published([(0, 100), (QUARTER, 100 + QUARTER / HOUR)], "inverter_uptime_hours_total")
        self.assertEqual(values[-1], 2260)

    def test_groups(self):
        """Counters that are all 0 say nothing, each group by itself; one 0 among others is a value."""
        solar, hours, grid = (
            (name, "")
            for name in ("inverter_energy_output_hectowatt_hours_total", "inverter_uptime_hours_total", ENERGY)
        )
        for name, readings, wanted, falls in (
            ("at dawn", [(900, 7, 50), (0, 0, 51), (0, 0, 52), (901, 8, 53)], (901, 8, 53), 0),
            ("at the very start", [(0, 0, 0), (0, 0, 0), (900, 7, 50)], (900, 7, 50), 0),
            ("at the start, of the meter alone", [(900, 7, 0)], (900, 7, None), 0),
            ("at the start, but for the meter", [(0, 0, 50)], (None, None, 50), 0),
            ("for two days", [(900, 7, 50), *[(0, 0, 50)] * 60, (901, 7, 50)], (901, 7, 50), 0),
            ("the energy alone", [(900, 7, 50), (0, 7, 51), (901, 7, 51)], (901, 7, 51), 1),
            ("of the meter", [(900, 7, 50), (900, 7, 0), (901, 7, 50)], (901, 7, 50), 0),
        ):
            with self.subTest(name):
                held, said = sems.HeldCounters(), []
                for i, numbers in enumerate(readings):
                    said += held.take(dict(zip((solar, hours, grid), numbers)), i * HOUR).values()
                self.assertEqual([held.shown().get(series) for series in (solar, hours, grid)], [*wanted])
                self.assertEqual(said.count(sems.FALL), falls)
        for values in sems.VALUES.values():  # the name says the group
            for value in values:
                if value.counter and value.register >= 30000:
                    self.assertEqual(value.series[0].startswith("meter_"), value.register >= 36000, value.series)

    @staticmethod
    def history(chance: random.Random) -> list:
        """(seconds, true number, number as it was read) of some weeks; the first two are true, and no two wrong ones in a row."""
        gaps = chance.sample((1, 60, 60, 600, HOUR, NIGHT, DAY, QUARTER), chance.randint(1, 4))
        at, truth, found = 0, chance.choice((0, 3, 500, 5000, 9000, 58110, 10**7)), []
        for i in range(chance.randint(5, 60)):
            gap = chance.choice(gaps)
            at, truth = at + gap, truth + int(chance.random() * chance.choice((0, 1, 1000, 5000)) * gap / HOUR)
            wrong = (0, 1, truth // 2, truth // 3, truth * 10, max(truth - 1, 0), truth + 9000, chance.randrange(2**32))
            is_wrong = i >= 2 and found[-1][1] == found[-1][2] and chance.random() < 0.4
            found.append((at, truth, chance.choice(wrong) if is_wrong else truth))
        for _ in range(100):  # it catches up
            at, truth = at + 60, truth + 150
            found.append((at, truth, truth))
        return found

    def test_alternation(self):
        """A counter goes on through weeks in which every second reading is wrong."""
        truth = [58110 + i * 25 // 18 for i in range(1440 * 10 + 1)]  # 20 kWh a day
        for name, wrong in (
            ("0", lambda right: 0), ("one less", lambda right: right - 1), ("3 kWh less", lambda right: right - 300), ("half", lambda right: right // 2),
            ("a little more", lambda right: right + 300), ("ten times as much", lambda right: right * 10), ("50 kWh more", lambda right: right + 5000),
        ):  # fmt: skip
            with self.subTest(name):
                numbers = [wrong(right) if i % 2 and i > 2 else right for i, right in enumerate(truth)]
                counter, values = published(apart(60, *numbers))
                self.assertEqual((values[-1], counter.gained), (truth[-1], 20000))
                self.assertEqual(values, sorted(values))

    def test_any_history(self):
        """Whatever the truth, and whichever single readings are wrong: what is shown never falls, is never above the truth by more than the first rule allows, and ends at the truth."""
        for seed in range(1500):
            history = self.history(random.Random(seed))
            counter, values = published([(at, number) for at, _, number in history])
            above = max(number - truth for number, (_, truth, _) in zip(values, history))
            with self.subTest(seed=seed):
                self.assertEqual(values, sorted(values))
                self.assertLessEqual(above, 10100)
                self.assertEqual((values[-1], counter.gained), (history[-1][1], history[-1][1] - history[0][1]))


class DayTest(unittest.TestCase):
    """Days begin at midnight where that was seen."""

    def test_days(self):
        """When counting began, and what was gained since, of a HomeKit that is looked at every half minute but for gaps."""
        hour = 3600.0
        for name, steps, since, gained in (  # steps: hours since noon, what the clock is then set on by, the counter
            ("the first reading", [(0, 0, 7)], 0, 0),
            ("the same day goes on", [(0, 0, 7), (11.9, 0, 9)], 0, 2),
            ("over midnight", [(0, 0, 7), (11.9, 0, 9), (12.1, 0, 10)], None, 1),
            ("midnight, and nothing yet", [(0, 0, 7), (11.9, 0, 9), (12.1, 0, None)], None, 0),
            ("a silence over midnight", [(0, 0, 7), (11.1, 0, 9), (12.2, 0, 10)], 12.2, 0),
            ("a silence over midnight goes on", [(0, 0, 7), (11.1, 0, 9), (18, 0, None)], None, 0),
            ("a silence by day", [(0, 0, 7), (11.1, 0, 9)], 0, 2),
            ("a day without a reading", [(0, 0, 7), (11.9, 0, 9), (36.1, 0, 10)], 36.1, 0),
            ("two midnights", [(11.9, 0, 9), (12.1, 0, 10), (35.9, 0, 15), (36.1, 0, 16)], None, 1),
            (
                "a fall over midnight",
                [(0, 0, 7), (11, 0, 6), (11.5, 0, 6), (12.1, 0, 6), (12.5, 0, 6), (13, 0, 8)],
                None,
                1,
            ),
            ("a silence that ends in zeros", [(0, 0, 7), (11, 0, 9), (13, 0, 0), (13.1, 0, 50)], 13.1, 0),
            ("a fall that ends in much", [(0, 0, 7), (11, 0, 6), (11.5, 0, 6), (12.1, 0, 6), (13, 0, 800)], 13, 0),
            (
                "a jump that is taken",
                [(0, 0, 7), (0.1, 0, 90007), (0.2, 0, 90008), (0.3, 0, 90009), (0.4, 0, 90010)],
                0.3,
                1,
            ),
            ("a clock set on by a day", [(0, 0, 7), (0.1, 24, 9)], 24.1, 2),
            ("a clock set back by a day", [(0, 0, 7), (0.1, -24, 9)], -23.9, 2),
            ("a clock set on over midnight", [(11.8, 0, 7), (11.9, 0.2, 9)], 12.1, 2),
            ("a clock set on by day", [(0, 0, 7), (0.1, 3, 9)], 3.1, 2),
            ("one of a day from midnight on", [(11.9, 0, 7), (12.1, 0, 8), (13, 3, 9)], None, 2),
            ("a clock set on by half a minute", [(11.9, 0, 7), (11.99, 0.008, 8), (12.1, 0, 9)], None, 1),
        ):
            with self.subTest(name), time_zone("UTC0"):
                ahead, now = [0.0], -60.0
                store = sems.Store(clock=lambda now: clock(now) + ahead[0])
                for at, jump, count in steps:
                    while now + 30 < at * hour:
                        now += 30
                        store.look(now)
                    ahead[0] += jump * hour
                    store.look(at * hour)
                    if count is not None:
                        stamp = datetime.fromtimestamp(store.clock(at * hour))
                        meet(store, frame(when=stamp, ranges=[(2048, (0, count >> 16, count & 0xFFFF))]), now=at * hour)
                    store.look(at * hour)
                live, moment = only(store).live, datetime.fromtimestamp(store.clock(steps[-1][0] * hour))
                self.assertEqual(live.day.date, moment.date())
                self.assertEqual(
                    live.day.since, since if since is None else datetime.fromtimestamp(clock(since * hour))
                )
                self.assertEqual(live.gained()[ENERGY, ""], gained)

    def test_own_count_of_yesterday(self):
        """An inverter's own count of yesterday is not today's, though counting began anew without a reading."""
        ahead = [0.0]
        store = sems.Store(clock=lambda now: clock(now) + ahead[0])
        meet(store, frame(cls=1, serial=INVERTER, ranges=[(30144, (66, 0, 1000))]))
        for now, wanted in ((0.0, 6.6), (60.0, 0)):
            ahead[0] += now and 12.5 * 3600
            store.look(now)
            self.assertEqual(sems.member(only(store), store, now).figures["generated_today_kilowatt_hours"], wanted)

    def test_own_count(self):
        """What an inverter counted of the day before counting began is taken once: no packet makes it come and go."""
        clocks = {"wrong": -700, "ahead": 300}
        for name, begin, steps, wanted in (  # hours after noon; (minutes, total, own count, hours, clock), kWh of the day
            ("a boot packet", 0, [(0, 1000, 130, 9), (1, 0, 0, 0), (2, 1002, 132, 9)], [13, 13, 13.2]),
            ("no own count", 0, [(0, 1000, 130, 9), (1, 1001, 0xFFFF, 9)], [13, 13.1]),
            ("a wrong one", 0, [(0, 1000, 130, 9), (1, 1001, 65000, 9)], [13, 13.1]),
            ("a wrong one first", 0, [(0, 1000, 65000, 9), (1, 1001, 131, 9)], [0, 13.1]),
            ("its clock is off for a packet", 0, [(0, 1000, 130, 9), (1, 1001, 131, 9, "wrong")], [13, 13.1]),
            ("its clock is off at first", 0, [(0, 1000, 130, 9, "wrong"), (1, 1001, 131, 9)], [0, 13.1]),
            ("its clock is ahead at midnight", 11.9, [(0, 1000, 130, 9), (4, 1001, 0, 9, "ahead")], [13, 13.1]),
            ("a jump that is taken", 0, [(0, 1000, 130, 9), *((i, 9000 + i, 130 + i, 9) for i in (1, 2, 3))], [13, 13, 13, 13.3]),
        ):  # fmt: skip
            with self.subTest(name), time_zone("UTC0"):
                store, shown_today = sems.Store(clock=clock), []
                for at, total, own, hours, *off in steps:
                    now = begin * HOUR + at * 60
                    when = datetime.fromtimestamp(clock(now)) + timedelta(seconds=clocks[off[0]] if off else 0)
                    ranges = [(30144, (own, 0, total)), (30147, (0, hours))]
                    meet(store, frame(cls=1, serial=INVERTER, when=when, ranges=ranges), now=now)
                    store.look(now)
                    figures = sems.member(only(store), store, now).figures
                    shown_today.append(figures["generated_today_kilowatt_hours"])
                self.assertEqual(shown_today, wanted)

    def test_which_counters(self):
        """Only a counter that `today` shows makes the day begin anew when a jump of it is confirmed."""
        for register, since in (
            (35197, None),
            (35206, None),
            (35191, "00:03"),
        ):  # hours, a battery that is not there, its output
            with self.subTest(register), time_zone("UTC0"):
                store = sems.Store(clock=clock)
                for i in range(-20, 4):
                    words = {35191: (0, 5000), 35197: (0, 2000), 35206: (0, 7000)}
                    words[register] = (1, i) if i > 0 else words[register]
                    now = 12 * HOUR + i * 60
                    meet(store, frame(cls=2, serial=HYBRID, when=minute(720 + i), ranges=[*words.items()]), now=now)
                    store.look(now)
                day = only(store).live.day
                self.assertEqual(day.since and f"{day.since:%H:%M}", since)


class StoreTest(SocketCase):
    A, B, C = (frame(serial=f"91000HKU0000000{letter}") for letter in "ABC")

    def test_counters(self):
        """The original's counters by class and function, whether or not the payload parses."""
        meter, inverter = "meter_metrics_packets_total", "inverter_metrics_packets_total"
        for cls, function, wanted in (
            (3, 0x03, "meter_time_sync_packets_total"), (1, 0x03, "inverter_time_sync_packets_total"), (2, 0x03, "inverter_time_sync_packets_total"),
            (3, 0x04, meter), (3, 0x45, meter), (1, 0x04, inverter), (2, 0x45, inverter), (9, 0x04, inverter),
            (3, 0x10, "meter_time_sync_ack_packets_total"), (1, 0x10, "meter_time_sync_ack_packets_total"), (3, 0x16, None),
        ):  # fmt: skip
            with self.subTest(cls=cls, function=function):
                store = sems.Store()
                meet(store, frame(function, cls), frame(function, cls, clear=b"\x05" * 16))
                counts = {name: count for name, count in only(store).counts.items() if count}
                buffered = {"sems_mitm_buffered_packets_total": 2} if function == 0x45 else {}
                self.assertEqual(counts, {wanted: 2, **buffered} if wanted else {})
                self.assertLessEqual(only(store).counts.keys(), {series.partition("{")[0] for series in shown(store)})

    def test_buffered_packets(self):
        """A buffered packet changes nothing but packet counters; a live one of an older time counts as any other."""
        store = sems.Store(clock=clock)
        meet(store, frame(when=minute(9)))
        before = shown(store)
        other = [(2048, (0, 0, 9)), (2107, (0, 7))]
        for _ in range(5):
            meet(store, frame(sems.BUFFERED, when=minute(20), ranges=other))
        changed = {series.partition("{")[0] for series, number in shown(store).items() if before.get(series) != number}
        counters = {"meter_metrics_packets_total", "sems_mitm_buffered_packets_total"}
        self.assertEqual({name for name in changed if not name.startswith("process_")}, counters)
        meet(store, frame(when=minute(1), ranges=other))
        self.assertEqual(value(store, "meter_power_generation_watts"), 7)
        self.assertEqual(value(store, "meter_energy_export_decawatt_hours_total"), 9)

    def test_last_three(self):
        """Of the waiting live packets the last three are decoded, of the settings and buffered ones likewise, at the latest at a scrape."""
        store = sems.Store(clock=clock)
        kept, counts = sems.text_words("02053-05-000Me05", 8), (90000, 5, 5, 6, 4, 6)
        rows = [
            frame(when=minute(i), ranges=[(2048, (0, 0, n & 0xFFFF)), (2107, (0, i))]) for i, n in enumerate(counts)
        ]
        meet(store, *rows, frame(sems.SETTINGS, ranges=[(4864, kept)]))
        self.assertEqual((only(store).live.counters, len(store.undecoded)), ({}, 1))
        self.assertEqual(value(store, "meter_power_generation_watts"), 5)
        self.assertEqual(value(store, "meter_energy_export_decawatt_hours_total"), 6)
        self.assertEqual((len(store.undecoded), only(store).info["firmware"]), (0, "02053-05-000Me05"))
        self.assertEqual(
            value(store, "sems_mitm_rejected_values_total", reason="fall"), 2
        )  # one register, two counters
        meet(store, frame(when=minute(7), ranges=[(2048, (0, 1, 2))]))
        self.assertEqual(value(store, "sems_mitm_rejected_values_total", reason="jump"), 2)
        for i in range(100):
            meet(store, frame((sems.SETTINGS, sems.BUFFERED, sems.LIVE)[i % 3], when=minute(8 + i)))
        self.assertEqual([len(waiting) for waiting in only(store).waiting.values()], [sems.DECODED] * 3)

    def test_repeated(self):
        """A live frame that is the device's last one, byte for byte, is counted, and is no second reading; another is."""
        row = lambda i, count: frame(when=minute(i), ranges=[(2048, (0, count >> 16, count & 0xFFFF))])
        for name, jumps, wanted in (
            ("the same", [row(1, 90000)] * 3, 5),
            ("others", [row(1 + i, 90000) for i in range(3)], 90000),
        ):
            for together in (True, False):
                with self.subTest(name, together=together):
                    store = sems.Store(clock=clock)
                    meet(store, row(0, 5))
                    store.look(0.0)
                    for i, data in enumerate(jumps):
                        meet(store, data, now=60.0 + i)
                        if not together:
                            store.look(60.0 + i)
                    self.assertEqual(value(store, "meter_energy_export_decawatt_hours_total", 63.0), wanted)
                    self.assertEqual(value(store, "meter_metrics_packets_total", 63.0), 4)
        self.assertEqual(only(store).live.fresh, 62.0)

    def test_unreadable(self):
        """Payloads that do not parse are counted, of live, buffered and settings packets; no other function's."""
        store = sems.Store(clock=clock)
        for function, wanted in (
            (sems.LIVE, 1),
            (sems.BUFFERED, 2),
            (sems.SETTINGS, 3),
            (0x16, 3),
            (sems.CONFIRMATION, 3),
        ):
            meet(store, frame(function), frame(function, clear=b"\x05" * 16))
            self.assertEqual(value(store, "sems_mitm_unreadable_packets_total", serial="00000042"), wanted)

    def test_stuck(self):
        """A counter that has been held for a day is said once a day, with what to do."""
        store = sems.Store(clock=clock)
        for hour in range(80):
            count = 100 if hour else 900
            meet(store, frame(when=minute(60 * hour), ranges=[(2069, (0, 0, count))]), now=hour * 3600.0)
            store.look(hour * 3600.0)
        said = [line for line in self.lines if "stays at 900" in line]
        self.assertEqual(len(said), 3)
        self.assertIn(
            f"of {METER} stays at 900: the device has counted less for a day; if that is right, restart", said[0]
        )

    def test_rules_clock(self):
        """The counter rules go by the clock that is handed in."""
        for speed, wanted in ((1, 1000), (3600, 5000)):
            store = sems.Store(clock=clock, rules_clock=lambda now: now * speed)
            for now, count in ((0.0, 1000), (1.0, 5000)):
                meet(store, frame(ranges=[(2048, (0, 0, count))]), now=now)
            self.assertEqual(value(store, "meter_energy_export_decawatt_hours_total", 1.0), wanted)

    def test_left_out(self):
        """A payload that cannot be read, and a fault of our own in a reading, leave out that packet and nothing else."""
        store, self.faults = sems.Store(clock=clock), 1
        good = [frame(when=minute(2 + i), ranges=[(2107, (0, 7))]) for i in range(4)]
        meet(store, frame(clear=b"\x09" * 16), frame(when=minute(1), clear=b"\xff" * 16), good[0])
        self.assertEqual((store.look(0.0), only(store).live.gauges["meter_power_generation_watts", ""]), (None, 7))
        self.assertEqual(len(self.lines), 1)
        self.assertIn(f"a packet of {METER} cannot be read: ", self.lines[0])
        last = sems.reading("HK1000", {2107: 0, 2108: 9})
        with mock.patch.object(sems, "reading", side_effect=[KeyError("ours"), KeyError("ours"), last]):
            meet(store, *good[1:])
            store.look(0.0)
        self.assertEqual(only(store).live.gauges["meter_power_generation_watts", ""], 9)
        self.assertEqual((value(store, "sems_mitm_internal_errors_total"), len(self.lines)), (2, 2))
        self.assertRegex(self.lines[1], r"(?s)an error of our own in a reading.*Traceback.*KeyError: 'ours'$")
        meet(store, frame(cls=2, serial=HYBRID, ranges=[(36004, (1,)), (36015, (0x7FC0, 0, 0xC47A, 0))]))
        self.assertEqual(value(store, "sems_mitm_rejected_values_total", reason="not_finite"), 2)
        self.assertEqual(value(store, "sems_mitm_suppressed_log_lines_total"), 2)

    def test_silence(self):
        """Gauges go when the last live packet is too old, device_up is 0 when the last good frame is; the rest stays."""
        stay = {"meter_energy_export_decawatt_hours_total", "sems_mitm_device_info", "meter_metrics_packets_total"}
        go = {"meter_power_generation_watts", "meter_unknown_register", "sems_mitm_device_clock_offset_seconds"}
        ranges = [*METER_RANGES, (9000, (5,))]
        for stale_after, at, gauges, up in ((300, 300, True, 1), (300, 301, False, 1), (300, 401, False, 0), (0, 1e9, True, 1)):  # fmt: skip
            with self.subTest(stale_after=stale_after, at=at):
                store = sems.Store(stale_after=stale_after, clock=clock)
                meet(store, frame(ranges=ranges))
                meet(store, frame(sems.BUFFERED, ranges=ranges), now=100.0)
                with mock.patch.object(sems, "wall_clock", lambda now: 1000.0 + now):
                    found = {series.partition("{")[0]: number for series, number in shown(store, at).items()}
                self.assertEqual(go & set(found), go if gauges else set())
                self.assertLessEqual(stay, set(found))
                self.assertEqual(found["sems_mitm_device_up"], up)
                self.assertEqual(found["sems_mitm_device_last_packet_timestamp_seconds"], 1100)

    def test_offset(self):
        """The device's clock less this machine's, from live packets that have a date."""
        store = sems.Store(clock=clock)
        no_date = with_crc(FRAME[:46] + bytes(6) + FRAME[52:])
        for data, now, wanted in ((frame(when=minute(2)), 0, 120), (no_date, 0, 120), (frame(when=minute(1)), 0, 60), (frame(when=minute(3)), 60, 120), (frame(when=minute(3)), 90, 120), (frame(when=minute(4)), 240, 0)):  # fmt: skip
            meet(store, data, now=now)
            self.assertEqual(value(store, "sems_mitm_device_clock_offset_seconds", now), wanted)

    def test_max_devices(self):
        """When full, a newcomer gets no series, however long the others are silent."""
        store = sems.Store(stale_after=100, max_devices=2)
        meet(store, self.A, now=0.0)
        meet(store, self.B, now=10.0)
        meet(store, self.C, self.C, self.C, now=1e9)
        self.assertEqual((serials(store), len(self.lines)), (["A", "B"], 1))
        self.assertEqual(value(store, "sems_mitm_unlisted_device_packets_total"), 3)

    def test_same_name(self):
        """A device with the device, model and last eight characters of another gets no series, and a warning."""
        store = sems.Store()
        other = frame(serial="81000HKU00000042", clear=bytes(16))
        meet(store, FRAME, other, other)
        self.assertEqual((len(store.undecoded), serials(store), len(self.lines)), (1, ["2"], 1))
        self.assertEqual(value(store, "sems_mitm_unlisted_device_packets_total"), 2)
        meet(store, frame(serial=OTHER), frame(cls=1))  # another `device` label
        self.assertEqual(serials(store), ["2", "2", "3"])

    def test_model(self):
        """When the model becomes known all series move in one step, counters with their values; a nameless packet clears nothing."""
        store, inverter = sems.Store(), {"cls": 1, "serial": "93000DSN00000042"}
        meet(store, frame(ranges=INVERTER_RANGES, **inverter))
        old = {
            s: number for s, number in shown(store).items() if 'model="GoodWe DSN 3000 W"' in s and "time_sync" not in s
        }
        for clear in (named("GW3000D-NS"), sems.payload([(40173, (0xFFFF,) * 16)]), sems.payload([(40075, (0,) * 26)])):
            meet(store, frame(sems.SETTINGS, clear=clear, **inverter))
            new = shown(store)
            self.assertFalse([series for series in new if "GoodWe DSN" in series])
            moved = {series.replace("GoodWe DSN 3000 W", "GW3000D-NS"): number for series, number in old.items()}
            self.assertLessEqual(moved.items(), new.items())
        self.assertGreater(len(moved), 15)

    def test_names_change_hands(self):
        """The labels that a device has left are free for another, and no series is ever there twice."""
        store = sems.Store()
        first, second = ({"cls": 1, "serial": f"9{rating}DSN00000042"} for rating in ("3000", "4000"))
        meet(store, *(frame(sems.SETTINGS, clear=named("GW-X"), **each) for each in (first, second)))
        store.look(0.0)
        self.assertEqual((len(serials(store)), len(self.lines)), (1, 1))
        meet(store, frame(sems.SETTINGS, clear=named("GW-Y"), **first))
        store.look(0.0)
        meet(store, frame(**second))
        self.assertEqual([name for _, name, _ in store.names], ["GW-Y", "GW-X"])
        self.assertEqual(len(serials(store)), 2)

    def test_types(self):
        """packets_total has the known types, 32 others, then `other`; malformed, junk and keep-alives have their own names."""
        store = sems.Store()
        others = [f"03{function:02x}" for function in range(0x50, 0x50 + 40)]
        for kind in (*others, "0304", "malformed", "junk", "0350", "0377"):
            store.count(OUT, kind, "forwarded")
        store.count(IN, "0350", "dropped", 2)
        store.count(IN, "keepalive", "forwarded", 5)
        found = {key: value for key, value in store.packets.items() if key[1] not in sems.LABELLED}
        self.assertEqual({kind for _, kind, _ in found}, {*others[:32], "other"})
        for kind, direction, verdict, wanted in (
            ("other", "outbound", "forwarded", 9), ("0350", "outbound", "forwarded", 2), ("0350", "inbound", "dropped", 2), ("keepalive", "inbound", "forwarded", 5),
        ):  # fmt: skip
            self.assertEqual(
                value(store, "sems_mitm_packets_total", type=kind, direction=direction, verdict=verdict), wanted
            )

    def test_exposition(self):
        """HELP and TYPE once a name, families together and sorted, label values escaped, counters with fixed labels from 0."""
        store = sems.Store(batsignal=True, clock=clock)
        empty = shown(store)
        for name, key, values in sems.FIXED:
            for value in values:
                self.assertEqual(empty[f'{name}{{{key}="{value}"}}' if key else name], 0)
        self.assertEqual([empty["batsignal_top"], empty["batsignal_bottom"]], [*sems.bat(NOON)])
        self.assertFalse([name for name in shown(sems.Store()) if name.startswith("batsignal")])
        store.gauges.update(sems_mitm_upstream_up=lambda: None, sems_mitm_queue_bytes=lambda: 5)
        for serial in ('9\\"00HKU0000"\\42', *(f"91000HKU{i:08d}" for i in range(70))):
            meet(store, frame(serial=serial))
        text, names, label = "".join(sems.exposition(store.collect(0.0))), [], r'\w+="([^"\\]|\\.)*"'
        self.assertIn('serial="0000\\"\\\\42"', text)
        self.assertIn('full_serial="9\\\\\\"00HKU0000\\"\\\\42"', text)
        self.assertEqual((metrics_of(text)["sems_mitm_queue_bytes"], "sems_mitm_upstream_up" in text), (5, False))
        for block in re.split(r"(?m)^(?=# HELP)", text)[1:]:
            helped, typed, *lines = block.splitlines()
            names.append(helped.split()[2])
            self.assertEqual(typed.split()[:3], ["#", "TYPE", names[-1]])
            self.assertEqual((typed.split()[3], helped.split(None, 3)[3]), sems.METRICS[names[-1]])
            self.assertEqual(len(lines), len({line.rpartition(" ")[0] for line in lines}))
            for line in lines:
                self.assertRegex(line, rf"^{names[-1]}({{{label}(,{label})*}})? -?[\d.e+-]+$")
        self.assertEqual(names, sorted(set(names)))

    def test_answers(self):
        """A device's ACKs and NACKs are counted, and those of nobody are not."""
        store = sems.Store(clock=clock)
        meet(store, FRAME)
        for counter, serial in ((sems.ACKS, METER), (sems.NACKS, METER), (sems.NACKS, METER), (sems.NACKS, INVERTER)):
            store.answered(("meter", serial), counter)
        self.assertEqual([value(store, f"sems_mitm_{name}_total") for name in ("acks", "nacks")], [1, 2])

    def test_troubles(self):
        """The same trouble is one log line a minute with a count; another kind, and another period, have their own."""
        troubles = sems.Troubles()
        for now, kind, period in ((0, "a", 60), (1, "a", 60), (1, "b", 3600), (59.9, "a", 60), (60, "a", 60), (61, "a", 60), (61, "b", 3600), (200, "a", 60)):  # fmt: skip
            troubles.say(kind, kind, now, period)
        self.assertEqual(self.lines, ["a", "b", "a (and 2 more like it)", "a (and 1 more like it)"])
        self.assertEqual(troubles.suppressed, 4)


# ---------------------------------------------------------------------------------------------------------- rules


class Rules(unittest.TestCase):
    def test_allowed(self):
        """What may pass to a device: ACK, NACK and the clock, each with its hostile neighbours."""
        zeros, write = bytes(16), lambda first, last, rest: struct.pack(">HH", first, last) + rest
        day, no_date = bytes((26, 3, 21, 12, 0, 0)), bytes((26, 2, 30, 12, 0, 0))
        meter, grid, hybrid = 0x1216, 0x9D79, 0xB090
        for name, kind, clear, classes, wanted in (
            ("ACK", "0304", zeros, {3}, "ack"), ("ACK of settings", "0303", zeros, {3}, "ack"), ("ACK of buffered data", "0245", zeros, {2}, "ack"),
            ("ACK of an unknown class", "0904", zeros, {9}, "ack"), ("NACK", "0304", b"\2" + bytes(15), {3}, "nack"),
            ("neither", "0304", b"\1" + bytes(15), {3}, ""), ("a NACK with more", "0304", b"\2" + bytes(14) + b"\1", {3}, ""),
            ("an ACK with more", "0304", bytes(15) + b"\1", {3}, ""), ("an ACK with a second byte", "0304", b"\0\1" + bytes(14), {3}, ""),
            ("an ACK of two blocks", "0304", bytes(32), {3}, ""), ("an ACK of a class not sent", "0104", zeros, {3}, ""),
            ("an ACK before anything", "0304", zeros, set(), ""), ("an ACK of a confirmation", "0310", zeros, {3}, ""),
            ("an ACK of another function", "0316", zeros, {3}, ""),
            ("a meter's clock", "0116", write(meter, meter + 2, day + bytes(6)), {3}, "clock"),
            ("a grid-tied one's clock", "0116", write(grid, grid + 2, day + bytes(6)), {1}, "clock"),
            ("a hybrid's clock", "0116", write(hybrid, hybrid + 2, day + bytes(6)), {2}, "clock"),
            ("two classes", "0116", write(grid, grid + 2, day + bytes(6)), {3, 1}, "clock"),
            ("the clock of a class not sent", "0116", write(grid, grid + 2, day + bytes(6)), {3}, ""),
            ("the clock of an unknown class", "0116", write(grid, grid + 2, day + bytes(6)), {9}, ""),
            ("the clock in another type", "0316", write(meter, meter + 2, day + bytes(6)), {3}, ""),
            ("the clock in an ACK's type", "0304", write(meter, meter + 2, day + bytes(6)), {3}, ""),
            ("a register more", "0116", write(meter, meter + 3, day + bytes(6)), {3}, ""),
            ("a register less", "0116", write(meter, meter + 1, day + bytes(6)), {3}, ""),
            ("from a register before", "0116", write(meter - 1, meter + 2, day + bytes(6)), {3}, ""),
            ("last before first", "0116", write(meter + 2, meter, day + bytes(6)), {3}, ""),
            ("another register", "0116", write(meter + 1, meter + 3, day + bytes(6)), {3}, ""),
            ("from one class's to another's", "0116", write(meter, grid + 2, day + bytes(6)), {3, 1}, ""),
            ("no date", "0116", write(meter, meter + 2, no_date + bytes(6)), {3}, ""),
            ("zeros for a date", "0116", write(meter, meter + 2, bytes(12)), {3}, ""),
            ("more behind the date", "0116", write(meter, meter + 2, day + bytes(5) + b"\1"), {3}, ""),
            ("more at once behind the date", "0116", write(meter, meter + 2, day + b"\1" + bytes(5)), {3}, ""),
            ("two blocks", "0116", write(meter, meter + 2, day + bytes(22)), {3}, ""), ("all zeros", "0116", zeros, {1, 2, 3}, ""),
            ("an ACK in the clock's type", "0116", b"\2" + bytes(15), {1}, ""), ("a firmware upgrade", "0120", bytes(range(16)), {1, 2, 3}, ""),
        ):  # fmt: skip
            with self.subTest(name):
                where = sems.address_of(portal_frame(kind, clear), IN)
                self.assertEqual(sems.allowed(where, clear, classes), wanted)

    def test_answer(self):
        """Answers by class and function: ACK to 03, 04 and 45 of any class, the clock behind 03 of a meter or a grid-tied inverter."""
        clocks = {3: 0x1216, 1: 0x9D79}
        everything = itertools.product((0, 1, 2, 3, 9), (0x03, 0x04, 0x45, 0x10, 0x16, 0x99), (True, False))
        for cls, function, clock_ok in everything:
            with self.subTest(cls=cls, function=function, clock=clock_ok):
                found = sems.answer(sems.address_of(frame(function, cls), OUT), minute(5), clock_ok)
                packets = [sems.decode(data, IN) for _, data in sems.Framer(IN).feed(found, 0.0)]
                wanted = [(f"{cls:02x}{function:02x}", bytes(16))] if function in (0x03, 0x04, 0x45) else []
                if clock_ok and function == 0x03 and cls in clocks:
                    wanted.append(("0116", struct.pack(">HH6B6x", clocks[cls], clocks[cls] + 2, 26, 3, 21, 12, 5, 0)))
                self.assertEqual([(packet.type, packet.clear) for packet in packets], wanted)
                stamp = bytes([0, 5, 12, 21, 3, 26]) + bytes(10)
                self.assertLessEqual({(packet.iv, packet.serial) for packet in packets}, {(stamp, METER)})

    def test_zones(self):
        """The zone is known if TZ is unset and there is a local time, or TZ is a zone that the system has, or a whole POSIX rule."""
        files = dict.fromkeys(("Europe/Berlin", "UTC", "EST5EDT", "CET"), b"TZif")
        files.update({"zone.tab": b"# tz", "short": b"TZ", "empty": b""})
        there = {f"/usr/share/zoneinfo/{name}": begin for name, begin in files.items()}
        there.update({"/etc/localtime": b"TZif", "/etc/passwd": b"root"})
        for zone, wanted in (
            (None, True), ("Europe/Berlin", True), (":Europe/Berlin", True), ("UTC", True), ("CET", True), (BERLIN, True), ("UTC0", True),
            ("<+03>-3", True), ("<-03>3<-02>,M3.5.0/-2,M10.5.0/-1", True), ("IST-5:30", True), ("EST5EDT,J60/2,J300", True), ("EST5EDT4,M3.2.0,M11.1.0", True),
            ("EST5EDT", False), ("CET-1CEST", False), ("CET-1CEST-2", False), ("<+01>-1<+02>", False), (":EST5EDT", True),
            ("zone.tab", False), ("short", False), ("empty", False), ("/etc/passwd", False), (":/etc/passwd", False), ("../../../etc/passwd", False),
            ("Europe/Berlim", False), ("Berlin", False), ("+2", False), ("", False), (":", False), ("EST5EDT,M3.5", False), ("EST5EDT,M3.2.0", False),
        ):  # fmt: skip
            with self.subTest(zone):
                self.assertEqual(sems.zone_is_known(zone, lambda path: there.get(os.path.normpath(path), b"")), wanted)
        self.assertFalse(sems.zone_is_known(None, lambda path: b""))

    def test_good_frame(self):
        """What of a stream is worth to be kept: a whole frame with good CRC, envelope and serial number, and nothing else."""
        no_serial = with_crc(FRAME[:14] + bytes(16) + FRAME[30:])
        for piece in (FRAME, SHORT, frame(0x77)):
            self.assertTrue(sems.is_good_frame(piece))
        for piece in (FRAME[50:], BAD, b"junk", b"", no_serial, TINY, FRAME[:9], FRAME + SHORT, claim(200, FRAME)):
            self.assertFalse(sems.is_good_frame(piece), piece)


class OutboxTest(unittest.TestCase):
    def test_model(self):
        """At random: an outbox is a list of pieces, the first of which can be sent in part."""
        for seed in range(300):
            rng, box, waiting, offset = random.Random(seed), sems.Outbox(), [], 0
            for count in range(60):
                step = rng.choice(("put", "put", "took", "took", "shed", "restart"))
                if step == "put":
                    waiting.append(bytes([count]) * rng.choice((1, 4, 100, sems.SEND_SIZE)))
                    box.put(waiting[-1])
                elif step == "took" and waiting:
                    ready = bytes(box.ready())
                    self.assertTrue(ready and b"".join(waiting)[offset:].startswith(ready))
                    taken = rng.randrange(len(ready) + 1)
                    offset += taken
                    while waiting and offset >= len(waiting[0]):
                        offset -= len(waiting.pop(0))
                    box.took(taken)
                    self.assertEqual(box.first() if waiting else b"", b"" if offset or not waiting else waiting[0])
                elif step == "shed":
                    excess, dropped, first = rng.choice((-5, 0, 1, 150)), [], int(offset > 0)
                    while sum(map(len, dropped)) < excess and len(waiting) > first:
                        dropped.append(waiting.pop(first))
                    self.assertEqual(box.shed(excess), len(dropped))
                elif step == "restart" and count % 5 == 0:
                    box.restart(lambda piece: piece[0] % 2 == 0)
                    waiting, offset = [piece for piece in waiting if piece[0] % 2 == 0], 0
                self.assertEqual(box.size, len(b"".join(waiting)) - offset)

    def test_ready(self):
        """Small pieces go together, a large one alone: a send takes what a peer can take, and copies no more."""
        box = sems.Outbox()
        for _ in range(3 * sems.SEND_SIZE // 1000):
            box.put(bytes(1000))
        self.assertIn(len(box.ready()), range(sems.SEND_SIZE, sems.SEND_SIZE + 1000))
        box = sems.Outbox()
        box.put(bytes(1 << 20))
        self.assertEqual(len(box.ready()), sems.SEND_SIZE)


# ---------------------------------------------------------------------------------------------------------- files


class FilesTest(SocketCase):
    def setUp(self):
        super().setUp()
        self.path, self.store, self.open = os.path.join(self.directory(), "file"), sems.Store(), []
        self.addCleanup(lambda: [os.close(each._appender.file) for each in self.open if each._appender])

    def errors(self, name: str) -> int:
        return self.store.totals["sems_mitm_file_errors_total", f'file="{name}"']

    def content(self) -> str:
        with open(self.path, encoding="ascii") as file:
            return file.read()

    def record(self, path: str = ""):
        record = sems.RecordFile(path or self.path, "capture", self.store)
        self.open.append(record)
        return record

    def test_line(self):
        """A frame in the capture: one JSON object, the time in UTC."""
        line = sems.capture_line(1795305600.25, "192.0.2.1:5", "outbound", "forwarded", b"\1\xff")
        self.assertTrue(line.endswith("}\n") and line.count("\n") == 1)
        wanted = ["2026-11-22T00:00:00.250+00:00", "192.0.2.1:5", "outbound", "forwarded", "01ff"]
        self.assertEqual(json.loads(line), dict(zip(("time", "peer", "direction", "verdict", "hex"), wanted)))

    def test_append(self):
        """Lines are appended; behind a torn last line the next begins on a line of its own."""
        for before, after in (("", "a\nb\nc\n"), ("old\n", "old\na\nb\nc\n"), ("torn", "torn\na\nb\nc\n")):
            with open(self.path, "w") as file:
                file.write(before)
            record = self.record()
            record.put("a\n")
            record.put("b\n")
            record.flush()
            record.put("c\n")
            record.flush()
            self.assertEqual((self.content(), self.errors("capture")), (after, 0))

    def test_full_disk(self):
        """What cannot be written is counted and said once a minute; a line torn by it is ended by the next."""
        record, real = self.record(), os.write
        for write, count in ((OSError(28, "full"), 1), (lambda file, data: real(file, data[:3]), 2), (real, 2)):
            with mock.patch.object(os, "write", side_effect=write):
                record.put('{"a": 1}\n')
                record.flush()
            self.assertEqual(self.errors("capture"), count)
        self.assertEqual((self.content(), len(self.lines)), ('{"a\n{"a": 1}\n', 1))

    def test_no_file(self):
        """A file that cannot be had is tried again with each round's lines."""
        folder = os.path.join(self.directory(), "later")
        record = self.record(os.path.join(folder, "file"))
        record.put("a\n")
        record.flush()
        self.assertEqual((self.errors("capture"), len(self.lines)), (1, 1))
        os.mkdir(folder)
        with open(record.path, "w") as file:
            file.write("torn")
        record.put("b\n")
        record.flush()
        self.assertEqual((open_lines(record.path), self.errors("capture")), (["torn", "b"], 1))

    def test_both(self):
        """All goes to the capture, buffered readings alone to the backfill file, both opened anew when they are rotated."""
        files = sems.Files(self.store, self.path, self.path + "2")
        self.open += files.open
        for wire, kind in ((OUT, "0304"), (OUT, "0345"), (IN, "0345"), (OUT, "junk"), (OUT, "")):
            files.record("192.0.2.1:5", wire, kind, "forwarded", b"x")
        files.flush()
        os.rename(self.path, self.path + ".1")
        files.are_rotated = True
        files.record("192.0.2.1:5", OUT, "0245", "forwarded", b"y")
        files.flush()
        files.record("192.0.2.1:5", OUT, "0345", "forwarded", b"z")
        files.flush()
        for path, wanted in ((self.path + ".1", "78 78 78 78 78"), (self.path, "79 7a"), (self.path + "2", "78 79 7a")):
            self.assertEqual([json.loads(line)["hex"] for line in open_lines(path)], wanted.split())
        self.assertIsNone(sems.Files(self.store).record("p", OUT, "0304", "forwarded", b"x"))


class SpoolTableTest(SocketCase):
    def test_model(self):
        """At random, in a file and in memory: what is put and not delivered is there in its order, also after a reopening."""
        for seed in range(30):
            rng, path = random.Random(seed), os.path.join(self.directory(), "spool") if seed % 3 else ""
            table, model, number = sems.SpoolTable(path, sems.Store()), {"A": [], "B": []}, 0
            for _ in range(60):
                serial, kind = rng.choice("AB"), rng.choice(("0304", "0345", sems.NO_ANSWER))
                step, rows = rng.choice(("put", "put", "put", "deliver", "behind", "apply", "reopen")), model[serial]
                if step == "put":
                    number += 1
                    rows.append((kind, b"%d" % number, 0, 0))
                    table.put(serial, kind, rows[-1][1])
                    self.assertEqual(table.commit(), [])
                    self.assertTrue(table.is_stored)
                elif step in ("deliver", "behind") and any(row[0] == kind for row in rows):
                    row = table.next(serial, kind, 0)
                    at = next(i for i, one in enumerate(rows) if one[0] == kind)
                    self.assertEqual((row.type, row.frame, row.count, row.mark), rows.pop(at))
                    if step == "deliver":
                        table.deliver(serial, row, len(row.frame))
                    else:
                        rows.append((kind, row.frame, row.count + 1, number))
                        table.move_behind(serial, row, row.count + 1, number)
                    table.apply()
                elif step == "apply":
                    table.tend()
                elif step == "reopen" and path:
                    table.close()
                    table = sems.SpoolTable(path, sems.Store())
                for name, rows in model.items():
                    kinds = {row[0] for row in rows}
                    self.assertEqual(set(table.types(name)), kinds)
                    self.assertEqual([self.all_of(table, name, one) for one in kinds], [[row for row in rows if row[0] == one] for one in kinds])  # fmt: skip
                    self.assertEqual(table.newest(name, kinds), [row[1] for row in rows][-sems.NEWEST :])
                self.assertEqual(table.size, sum(len(row[1]) for rows in model.values() for row in rows))
            table.close()

    def test_error_of_our_own(self):
        """A write that breaks otherwise than by the disk stores nothing either, says so, and leaves nothing behind."""
        store = sems.Store()
        table = sems.SpoolTable("", store)
        self.addCleanup(table.close)
        self.faults = 1
        table.put("A", "0304", b"frame")
        broken = mock.Mock(wraps=table._db)
        broken.executemany.side_effect = MemoryError
        with mock.patch.object(table, "_db", broken):
            self.assertEqual([row[3] for row in table.commit()], [b"frame"])
        self.assertFalse(table.is_stored)
        self.assertEqual((table.size, table.totals["A"].bytes, table.types("A")), (0, 0, {}))
        self.assertEqual(store.totals["sems_mitm_internal_errors_total", ""], 1)
        table.put("A", "0304", b"frame")
        self.assertEqual((table.commit(), table.is_stored), ([], True))

    @staticmethod
    def all_of(table, serial: str, kind: str) -> list:
        """All rows of a serial number and a type, in order."""
        rows, after = [], 0
        while row := table.next(serial, kind, after):
            rows.append((row.type, row.frame, row.count, row.mark))
            after = row.id
        return rows

    def test_nothing_of_a_failed_round_counts(self):
        """An error in the middle of a commit: none of its frames is stored, what was there stays, the next round is tried."""
        table = sems.SpoolTable(os.path.join(self.directory(), "spool"), store := sems.Store())
        self.addCleanup(lambda: table.close())
        table.put("A", "0304", b"1")
        table.commit()
        real = table._db
        for failing in ("BEGIN IMMEDIATE", "INSERT", "COMMIT"):
            with self.subTest(failing):
                table._db = mock.Mock(wraps=real)
                fails = lambda name: (
                    lambda text, *more: self.raises(table, text, failing) or getattr(real, name)(text, *more)
                )
                table._db.execute.side_effect, table._db.executemany.side_effect = (
                    fails("execute"),
                    fails("executemany"),
                )
                table.put("A", "0304", b"2")
                table.put("B", "0304", b"3")
                self.assertEqual([frame for *_, frame in table.commit()], [b"2", b"3"])
                self.assertEqual((table.is_stored, table.size, table.types("B")), (False, 1, {}))
                table._db = real
        self.assertEqual(store.totals["sems_mitm_file_errors_total", 'file="spool"'], 6)
        table.put("B", "0304", b"4")
        self.assertEqual((table.commit(), table.is_stored, table.size), ([], True, 2))
        self.assertEqual(len(self.lines), 1)

    @staticmethod
    def raises(table, text: str, failing: str) -> None:
        if text.startswith(failing):
            raise table._sqlite.OperationalError("database or disk is full")


# ---------------------------------------------------------------------------------------------------------- names


class Dns(unittest.TestCase):
    QUERY = sems.dns_query("portal.example.", 0x1234)
    NAME, ALIAS, POINTER = b"\6portal\7example\0", b"\1a\7example\0", b"\xc0\x0c"

    def reply(self, *records, code=0, head=b"\x12\x34", flags=0x81, question=None, count=None):
        """An answer; a record is (owner, type, class, data)."""
        data = head + bytes((flags, code)) + struct.pack(">4H", 1, len(records) if count is None else count, 0, 0)
        data += (question or self.NAME) + b"\0\1\0\1"
        for owner, kind, cls, rest in records:
            data += owner + struct.pack(">HHIH", kind, cls, 60, len(rest)) + rest
        return data

    def test_query(self):
        """A query for A records, recursion desired; a name that is none is an error."""
        self.assertEqual(self.QUERY, b"\x12\x34\1\0\0\1\0\0\0\0\0\0" + self.NAME + b"\0\1\0\1")
        for name in ("a..b", "x" * 64 + ".example"):
            with self.assertRaises(UnicodeError):
                sems.dns_query(name, 1)

    def test_answers(self):
        """The addresses of an answer, whatever else it says; "bad" is no answer to this query."""
        a, cname = (self.POINTER, 1, 1, b"\xcb\0\x71\7"), (self.POINTER, 5, 1, self.ALIAS)
        for name, data, wanted in (
            ("an address", self.reply(a), ["203.0.113.7"]), ("two", self.reply(a, (self.NAME, 1, 1, b"\1\2\3\4")), ["203.0.113.7", "1.2.3.4"]),
            ("in capitals", self.reply(a, question=self.NAME.upper()), ["203.0.113.7"]),
            ("an alias", self.reply(cname, (self.ALIAS, 1, 1, b"\1\2\3\4")), ["1.2.3.4"]),
            ("an alias of an alias", self.reply(cname, (self.ALIAS, 5, 1, b"\1b\xc0\x13"), (b"\1B\7exAmple\0", 1, 1, b"\1\2\3\4")), ["1.2.3.4"]),
            ("an alias alone", self.reply(cname), []), ("an address of 16 bytes", self.reply((self.POINTER, 28, 1, bytes(16)), a), ["203.0.113.7"]),
            ("another class", self.reply((self.POINTER, 1, 3, b"\1\2\3\4")), []),
            ("of the root", self.reply((b"\0", 1, 1, b"\1\2\3\4")), ["1.2.3.4"]), ("no such name", self.reply(code=3), []),
            ("no address", self.reply(), []), ("a failure", self.reply(code=2), []), ("refused, with an address", self.reply(a, code=5), ["203.0.113.7"]),
            ("a record cut", self.reply(a)[:-1], "bad"), ("a header cut", self.reply(a)[:40], "bad"),
            ("fewer records than it says", self.reply(a, count=2), ["203.0.113.7"]), ("a name past the end", self.reply((b"\x3f", 1, 1, b"")), "bad"),
            ("another number", self.reply(a, head=b"\x12\x35"), "bad"), ("another question", self.reply(a, question=self.ALIAS), "bad"),
            ("a query", self.reply(a, flags=1), "bad"), ("nothing", b"", "bad"), ("the query come back", self.QUERY, "bad"),
        ):  # fmt: skip
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
        """Who is asked for the portal: the servers in their order, the first routable address counts; then the system, but for this machine."""
        there, inside, here = "8.8.4.4", "192.168.1.2", "127.0.0.1"
        for name, host, servers, system, wanted, asked in (
            ("the first server", "portal.example", [[there], [here]], [inside], [there], 1), ("what is routable", "portal.example", [[inside, there]], [inside], [there], 1),
            ("the second server", "portal.example", [None, OSError(), [there]], [], [there], 3), ("the second knows better", "portal.example", [[inside], [there]], [], [there], 2),
            ("no server answers", "portal.example", [None, None], [inside], [inside], 2), ("nothing routable there", "portal.example", [[inside]], [inside], [inside], 1),
            ("no such name there", "portal.example", [[]], [there], [there], 1), ("no server", "portal.example", [], [there], [there], 0),
            ("the system has both kinds", "portal.example", [None], [here, inside, there], [inside, there], 1), ("this machine", "portal.example", [[inside], None], [here], "loop", 2),
            ("no such name anywhere", "portal.example", [[], []], [], "dns", 2), ("no name", "portal..example", [UnicodeError()], [], "dns", 1),
        ):  # fmt: skip
            endpoints = [sems.Endpoint(socket.AF_INET, (address, 20001)) for address in system]
            ask, said = mock.Mock(side_effect=servers), mock.Mock(return_value=endpoints)
            with self.subTest(name), mock.patch.multiple(sems, system_addresses=said, ask_dns=ask):
                try:
                    found = [end.sockaddr[0] for end in sems.resolve(host, 20001, [("192.0.2.53", 53)] * len(servers))]
                except sems.Unresolved as error:
                    found = error.reason
                    self.assertIn(host, str(error))
                self.assertEqual((found, ask.call_count), (wanted, asked))

    def test_literals(self):
        """An address and localhost are used as they are; any other name is to be looked up."""
        for host, wanted in (("192.168.1.2", ["192.168.1.2"]), ("fe80::1%eth0", ["fe80::1%eth0"]), ("LocalHost", ["127.0.0.1", "::1"]), ("portal.example", []), ("1.2.3", [])):  # fmt: skip
            self.assertEqual([end.sockaddr[0] for end in sems.literal_addresses(host, 20001)], wanted)


class Addresses(unittest.TestCase):
    def test_text(self):
        """Which addresses are the internet's, and how one is written and compared: never as ::ffff:."""
        for host, wanted in (
            ("8.8.8.8", True), ("10.0.0.1", False), ("127.0.0.1", False), ("100.64.0.1", False), ("224.0.0.1", False), ("239.1.1.1", False),
            ("::1", False), ("fe80::1%eth0", False), ("2606:4700::1", True), ("ff0e::1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True),
        ):  # fmt: skip
            self.assertEqual(sems.is_global(host), wanted, host)
        for host, wanted, text in (
            ("192.0.2.1", "192.0.2.1", "192.0.2.1:5"), ("::FFFF:192.0.2.1", "192.0.2.1", "192.0.2.1:5"),
            ("::1", "::1", "[::1]:5"), ("fe80::1%eth0", "fe80::1", "[fe80::1]:5"),
        ):  # fmt: skip
            self.assertEqual((sems.plain(host), sems.endpoint_text((host, 5, 0, 0))), (wanted, text))

    def test_this_machine(self):
        """Loopback, no address, and those of the machine's own interfaces are this machine; documentation's are not."""
        for host, wanted in (("127.0.0.1", True), ("127.9.9.9", True), ("0.0.0.0", True), ("::1", True), ("::", True), ("::ffff:127.0.0.1", True), ("192.0.2.1", False), ("2001:db8::1", False), ("fe80::1", False)):  # fmt: skip
            self.assertEqual(sems.is_this_machine(host), wanted, host)
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.connect(("192.0.2.1", 9))
            self.assertTrue(sems.is_this_machine(sock.getsockname()[0]))


# ------------------------------------------------------------------------------------------------ sockets: relaying


class NamedCase(SocketCase):
    """The portal is portal.test, and here 127.0.0.1 is the one address of the internet.

    `system` is what the name service says: addresses, or (address, port); it waits for `go`.
    """

    def setUp(self) -> None:
        super().setUp()
        self.system, self.asked, self.go = [LOCAL], 0, threading.Event()
        self.go.set()
        self.addCleanup(self.go.set)
        self.patch(sems, "is_global", lambda host: host == LOCAL)
        self.patch(sems, "is_this_machine", lambda host: host == "127.0.0.2")
        self.numeric = self.patch(socket, "getaddrinfo", wraps=socket.getaddrinfo, side_effect=self.look_up)

    def look_up(self, host, port, *arguments, **more):
        if not str(host).endswith(".test"):
            return mock.DEFAULT
        self.asked += 1
        found = [one if isinstance(one, tuple) else (one, port) for one in self.system]
        self.go.wait(PATIENCE)
        if not found:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in found]

    def named(self, portal: Portal, *flags: str, host: str = "portal.test", servers=()) -> Running:
        dns = ",".join(server.text for server in servers) or "none"
        return self.exporter(None, f"--sems.upstream={host}:{portal.port}", f"--sems.upstream-dns={dns}", *flags)


def awkward_streams() -> dict:
    """What a device may send, by name."""
    chance, good = random.Random(7), frames_of(3)
    words = (b"POSTGW", b"POST", b"GW", b"\0\0\0\x60", good[0], BEAT)
    return {
        "frames": b"".join(good),
        "junk before, between, behind": b"\0junk" + good[0] + b"POSTG" + good[1] + b"GW\r\n" + good[2] + b"POST",
        "bad CRC": spoilt(good[0]) + good[1] + spoilt(good[2]) + good[0],
        "unknown function and class": frame(function=0x77, clear=bytes(16)) + frame(cls=9) + good[0],
        "length field too long, then a frame": b"POSTGW\xff\xff\xff\xff" + good[0],
        "nested claims": b"".join(b"POSTGW" + struct.pack(">I", 400 - 20 * i) + bytes(10) for i in range(12)) + good[0],
        "half a frame": good[1][:70],
        "noise": chance.getrandbits(160000).to_bytes(20000, "big") + good[0],
        "prefixes": b"".join(chance.choice(words) for _ in range(600)),
    }


class RelayTest(NamedCase):
    """Mode forward, the portal connected: a pipe with a filter."""

    def test_every_byte_in_order(self) -> None:
        """Whatever a device sends arrives unchanged, decoded or not, however it is cut, and also before the portal is there."""
        self.limits(LOOP_WINDOW=-1, PATIENCE={"outbound": 0.1, "inbound": 5})  # the streams begin alike
        streams = awkward_streams()
        for early in (False, True):
            portal = self.portal()
            self.go.clear() if early else None
            running = self.named(portal) if early else self.exporter(portal)
            devices = {(name, seed): running.device() for name in streams for seed in (None, 1, 2)}
            for (name, seed), device in devices.items():
                for part in [streams[name]] if seed is None else random_cuts(streams[name], random.Random(seed)):
                    device.send(part)
            total = 3 * sum(map(len, streams.values()))
            running.becomes(total, "sems_mitm_bytes_total", direction="outbound")
            self.go.set()
            running.becomes(len(devices), "sems_mitm_upstream_connections")
            for device in devices.values():
                device.no_more()
            got = sorted(portal.accept().rest() for _ in devices)
            for found, (name, seed) in zip(got, sorted(devices, key=lambda key: streams[key[0]])):
                with self.subTest(name, cut=seed, before_the_portal_is_there=early):
                    self.assertEqual(found, streams[name])

    def test_long_first_attempt(self) -> None:
        """More than the sockets hold while the first attempt is under way is not lost."""
        portal = self.portal()
        self.go.clear()
        running = self.named(portal)
        stream = b"".join(cheap_frames(300))
        threading.Thread(target=running.device().send, args=(stream,), daemon=True).start()
        until(lambda: running.value("sems_mitm_bytes_total", direction="outbound") >= 200_000)
        self.go.set()
        self.assertEqual(portal.accept().read(len(stream)), stream)

    def test_when_the_portal_is_called(self) -> None:
        """By the first good frame, or soon after other bytes; not by a connection alone. An unfinished frame waits for its end."""
        self.limits(PATIENCE={"outbound": 0.3, "inbound": 5})
        portal, running = self.started()
        silent = running.device()
        running.becomes(1, "sems_mitm_device_connections")
        self.assertTrue(portal.unasked())
        self.assertNotIn("sems_mitm_upstream_up", running.metrics())
        silent.send(b"junk")
        self.assertEqual(portal.accept().read(4), b"junk")
        running.device(frame())
        self.assertEqual(portal.accept().read(len(frame())), frame())
        half = running.device(frame(when=minute(1)) + frame()[:40])
        leg = portal.accept()
        self.assertEqual(leg.read(len(frame())), frame(when=minute(1)))
        self.assertEqual(leg.read(40), frame()[:40])
        self.assertTrue(half.silent(0.01))
        running.becomes(3, "sems_mitm_upstream_connections")
        self.assertEqual(running.value("sems_mitm_upstream_up"), 1)
        self.assertEqual(running.value("sems_mitm_packets_total", type="malformed", verdict="forwarded"), 1)

    def test_many_devices(self) -> None:
        """Each device has a portal connection of its own, with its own bytes in order."""
        portal, running = self.started()
        streams = {serial: b"".join(frames_of(4, serial=serial)) for serial in (f"91000HKU{i:08d}" for i in range(40))}
        devices = [(running.device(), random_cuts(stream, random.Random(3))) for stream in streams.values()]
        for parts in itertools.zip_longest(*(parts for _, parts in devices), fillvalue=b""):
            for (device, _), part in zip(devices, parts):
                device.send(part)
        while streams:
            leg = portal.accept()
            start = leg.read(30)
            stream = streams.pop(start[14:].decode())
            self.assertEqual(start + leg.read(len(stream) - 30), stream)
        running.becomes(40 * 4, "meter_metrics_packets_total")
        self.assertEqual(running.value("sems_mitm_device_up"), 40)

    def test_inbound_filter(self) -> None:
        """Only what `allowed` and keep-alives in their place pass; all else is dropped and counted, and the next good frame found."""
        clock = struct.pack(">HH6s6x", 0x1216, 0x1218, sems.time_stamp(NOON))
        rows = (  # name, bytes, passes
            ("keep-alives behind a frame", BEAT * 2, True),
            ("ACK for another serial number", portal_frame("0304", serial=INVERTER), True),
            ("NACK", portal_frame("0304", b"\x02" + bytes(15)), True),
            ("clock", portal_frame("0116", clock), True),
            ("ACK of a class that the device has not sent", portal_frame("0104"), False),
            ("a write elsewhere", portal_frame("0116", b"\x9d" + clock[1:]), False),
            ("bad CRC", spoilt(portal_frame("0304")), False),
            ("junk", b"HTTP/1.1 200 OK\r\n\r\n", False),
            ("keep-alive behind junk", b"\0" + BEAT, False),
            ("a prefix", b"GW", False),
            ("a claim that is too long", b"GW\x00\x00\x10\x01" + bytes(20), False),
        )
        capture = os.path.join(self.directory(), "capture")
        portal, data = self.portal(), frame()
        running = self.exporter(portal, f"--sems.capture={capture}")
        device = running.device(data)
        leg, end = portal.accept(), ack_of(data)
        leg.read(len(data))
        for name, row, passes in rows:
            for bytewise in (False, True):
                with self.subTest(name, bytewise=bytewise):
                    for part in [bytes([byte]) for byte in row + end] if bytewise else [row + end]:
                        leg.send(part)
                    self.assertEqual(device.read(len(row) * passes + len(end)), row * passes + end)
        stopped = [row for _, row, passes in rows if not passes]
        shown = running.metrics()
        self.assertEqual(summed(shown, "sems_mitm_packets_total", direction="inbound", verdict="dropped"), 2 * len(stopped))  # fmt: skip
        self.assertEqual(summed(shown, "inbound_unknown_packets_total"), 4)
        self.assertEqual(summed(shown, "sems_mitm_nacks_total"), 2)
        until(lambda: len(open_lines(capture)) >= 4 * len(rows))
        kept = [
            bytes.fromhex(one["hex"]) for one in map(json.loads, open_lines(capture)) if one["verdict"] == "dropped"
        ]
        self.assertEqual(b"".join(kept), b"".join(row * 2 for row in stopped))

    def test_inbound_claim_is_given_up(self) -> None:
        """An inbound frame that stays unfinished is given up, and what stood behind it goes through."""
        self.limits(PATIENCE={"outbound": 30, "inbound": 0.1})
        *_, device, leg = self.talking()
        leg.send(b"GW\0\0\x08\0" + ack_of(frame()))
        self.assertEqual(device.read(ACK_SIZE), ack_of(frame()))

    def test_portal_drops_the_connection(self) -> None:
        """A portal's connection that is lost is opened again when something waits, and the device's stays."""
        self.limits(BACKOFF=(0.001, 0.001))
        for how in ("close", "reset"):
            with self.subTest(how):
                portal, running = self.started()
                device, some = running.device(), frames_of(4)
                for data in some:
                    device.send(data)
                    leg = portal.accept()
                    self.assertEqual(leg.read(len(data)), data)
                    leg.send(ack_of(data))
                    self.assertEqual(device.read(ACK_SIZE), ack_of(data))
                    getattr(leg, how)()
                    running.becomes(0, "sems_mitm_upstream_connections")
                    self.assertTrue(portal.unasked(0.1), "there is nothing to send")
                    self.assertEqual(running.value("sems_mitm_upstream_up"), float(how == "close"))

    def test_idle_portal_of_a_spool_closes(self) -> None:
        """A spool's portal that closes is not called again while there is nothing to send either."""
        self.limits(BACKOFF=(0.001, 0.001))
        portal = self.portal()
        running = self.exporter(portal, "--sems.mode=spool")
        for data in frames_of(3):
            running.device(data).packets(1)
            leg = portal.accept()
            leg.read(len(data))
            leg.send(ack_of(data))
            until(lambda: running.queued() == 0)
            leg.close()
            running.becomes(0, "sems_mitm_upstream_connections")
            self.assertTrue(portal.unasked(0.1))

    def test_bat_signal(self) -> None:
        """The portal gets the bat; metrics and capture keep what the device said; nothing else is touched."""
        live, other = (
            frame(when=NOON + timedelta(hours=2)),
            frame(cls=sems.GRID_TIED, serial=INVERTER, ranges=INVERTER_RANGES),
        )
        drawn = sems.with_bat(live)
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                capture = os.path.join(self.directory(), "capture")
                portal, running = self.started("--batsignal", f"--sems.capture={capture}", f"--sems.mode={mode}")
                device = running.device(live + spoilt(live) * (mode == "forward") + live[:-4])
                device.no_more()
                expected = drawn + (spoilt(live) + live[:-4]) * (mode == "forward")
                self.assertEqual(portal.accept().read(len(expected)), expected)
                running.device(other)
                self.assertEqual(portal.accept().read(len(other)), other)
                self.assertEqual(running.value("meter_power_generation_watts"), 2600)
                self.assertEqual(json.loads(open_lines(capture)[0])["hex"], live.hex())
                verdict = {"forward": "rewritten", "spool": "answered"}[mode]
                self.assertEqual(running.value("sems_mitm_packets_total", type="0304", verdict=verdict), 1)

    def test_end_and_answer_in_one_wakeup(self) -> None:
        """The portal's answer and the device's last frame with its end or reset, seen at once: the frame is read and passed on."""
        for mode in ("forward", "spool", "local"):
            portal = self.portal()
            process = self.serving(portal, f"--sems.mode={mode}")
            for number, end in enumerate(("close", "reset", "close", "reset")):
                with self.subTest(mode, end=end, number=number):
                    first, last = frames_of(2, serial=f"91000HKU{number:08d}")
                    device = process.device(first)
                    leg = portal.accept() if mode != "local" else None
                    if leg:
                        self.assertEqual(leg.read(len(first)), first)
                    device.packets(mode != "forward")
                    with process.frozen():
                        if leg and number < 2:
                            leg.send(ack_of(first))
                        device.send(last)
                        getattr(device, end)()
                        if leg and number >= 2:
                            leg.send(ack_of(first))
                    if leg:
                        self.assertEqual(leg.read(len(last)), last)
                    process.becomes(2 * (number + 1), "meter_metrics_packets_total")

    def test_both_reset_in_one_wakeup(self) -> None:
        """Both peers reset in the middle of frames: nothing is left waiting."""
        portal = self.portal()
        process = self.serving(portal)
        for number in range(2):
            with self.subTest(number):
                data = frame(when=minute(number))
                device = process.device(data)
                leg = portal.accept()
                leg.read(len(data))
                with process.frozen():
                    for peer in (device, leg)[:: 1 if number else -1]:
                        peer.send((data if peer is device else ack_of(data))[:50])
                        peer.reset()
                process.becomes(0, "sems_mitm_device_connections")
                self.assertEqual(process.queued(), 0)
                self.assertEqual(process.value("sems_mitm_upstream_connections"), 0)


class BackPressureTest(SocketCase):
    """A peer that does not take its bytes: the other side is not read, and nothing is lost."""

    def setUp(self) -> None:
        super().setUp()
        self.small_buffers()
        self.limits(SOCKET_BUFFERS=SMALL)

    def test_slow_portal(self) -> None:
        """While 256 KiB wait for a connected portal the device is not read; later all arrives in order."""
        portal, running = self.started()
        block = b"".join(frames_of(400))
        device = running.device(block[:10])
        sent = 10 + device.fill(block[10:] + block[:10])
        leg = portal.accept()
        sent += device.fill(block[sent % len(block) :] + block[: sent % len(block)])
        self.assertLessEqual(running.queued(), sems.BACKLOG + (256 << 10))
        self.assertGreaterEqual(running.queued(), sems.BACKLOG - (64 << 10))
        self.assertLess(sent, sems.BACKLOG + (256 << 10) + 20 * SMALL)
        self.assertEqual(running.value("sems_mitm_queue_dropped_packets_total"), 0)
        device.no_more()
        self.assertEqual(leg.read(sent), (block * (sent // len(block) + 1))[:sent])
        until(lambda: running.queued() == 0)

    def test_slow_device(self) -> None:
        """While 256 KiB wait for a device its portal is not read; later all arrives in order."""
        *_, device, leg = self.talking()
        block = b"".join(portal_frame("0304", when=NOON + timedelta(seconds=i)) for i in range(30))
        sent = leg.fill(block)
        self.assertLess(sent, sems.BACKLOG + (256 << 10) + 20 * SMALL)
        self.assertGreater(sent, sems.BACKLOG - (64 << 10))
        whole = sent // ACK_SIZE * ACK_SIZE
        self.assertEqual(device.read(whole), (block * (sent // len(block) + 1))[:whole])

    def test_no_progress(self) -> None:
        """A portal that takes nothing for long counts as lost; the device's connection stays, and whole frames go to the next."""
        self.limits(STALL=0.3)
        portal, running = self.started()
        frames = cheap_frames(1000)
        device = running.device(frames[0])
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
        block = b"".join(frames_of(100, clear=b"\0" + b"\xff" * 15))
        with contextlib.suppress(ConnectionError):
            running.device().fill(block)
        running.becomes(0, "sems_mitm_device_connections")
        self.assertEqual(running.queued(), 0)

    def test_nothing_spins(self) -> None:
        """Whatever waits, the loop sleeps."""
        self.limits(LINGER=20, BACKOFF=(0.5, 1), TICK=1)
        data, turns, select_ = frame(), [], selectors.DefaultSelector.select
        counted = lambda *_: turns.append(threading.current_thread()) or select_(*_)
        self.patch(selectors.DefaultSelector, "select", counted)

        def answers(leg) -> None:
            leg.read(len(data))
            leg.fill(ack_of(data) * 100, 0.05)

        def floods(device) -> None:
            with contextlib.suppress(ConnectionError):  # a spool's frame that comes again is a loop
                device.fill(data * 100, 0.05)

        rows = (  # name, mode, what the portal does, what the device does when it has sent its frame
            ("idle", "forward", "reads", lambda device: None),
            ("slow portal", "forward", "waits", floods),
            ("slow portal of a spool", "spool", "waits", floods),
            ("slow device", "forward", "answers", lambda device: None),
            ("slow device, half closed", "forward", "answers", Peer.no_more),
            ("half closed", "forward", "reads", Peer.no_more),
            ("gone", "forward", "reads", Peer.close),
            ("no portal", "forward", "refuses", lambda device: None),
            ("no portal, gone", "spool", "refuses", Peer.close),
            ("no answer, gone", "spool", "reads", Peer.close),
            ("black hole, half closed", "forward", "is a black hole", Peer.no_more),
            ("black hole, gone", "forward", "is a black hole", Peer.reset),
            ("slow device", "local", "refuses", floods),
        )
        started = []
        for name, mode, habit, then in rows:
            portal = self.portal(listening=habit not in ("refuses", "is a black hole"))
            if habit == "is a black hole":
                portal.black_hole()
            running = self.exporter(portal, f"--sems.mode={mode}")
            device = running.device(data)
            running.becomes(1, "meter_metrics_packets_total")
            leg = portal.accept() if habit not in ("refuses", "is a black hole") else None
            if leg and habit != "waits":
                leg.read(len(data)) if habit == "reads" else answers(leg)
            then(device)
            started.append((f"{name} ({mode})", running.thread))
        time.sleep(0.05)
        turns.clear()
        time.sleep(0.2)
        for name, thread in started:
            with self.subTest(name):
                self.assertLess(turns.count(thread), 10)


# ---------------------------------------------------------------------------------------- sockets: the portal is away


class PortalAwayTest(NamedCase):
    """Mode forward, and a portal that cannot be reached."""

    def test_away_and_back(self) -> None:
        """Whole good frames wait in order and nothing else, nothing is answered, and the device is decoded meanwhile."""
        portal, running = self.started(listening=False)
        frames = frames_of(20)
        stream = b"".join(frames)
        device = running.device(frames[0])
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="refused") >= 2)
        device.send(b"junk" + spoilt(frames[3]) + stream[len(frames[0]) : -30])
        until(lambda: running.queued() >= 19 * len(frames[0]))
        self.assertEqual(running.value("meter_power_generation_watts"), 2600)
        self.assertEqual(running.value("sems_mitm_upstream_up"), 0)
        self.assertTrue(device.silent())
        portal.listen()
        leg = portal.accept()
        device.send(stream[-30:])
        self.assertEqual(leg.read(len(stream)), stream)
        self.assertEqual(running.value("sems_mitm_acks_total"), 0)
        running.becomes(20, "sems_mitm_packets_total", type="0304", verdict="forwarded")
        until(lambda: running.queued() == 0)

    def test_queue_is_bounded(self) -> None:
        """So much of a device waits; the oldest whole frames are dropped first, and counted."""
        self.limits(QUEUE=100_000)
        portal, running = self.started(listening=False)
        frames = cheap_frames(300)
        size = len(frames[0])
        device = running.device(frames[0])
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total") >= 1)
        device.send(b"".join(frames[1:]))
        running.becomes(len(frames), "meter_metrics_packets_total")
        self.assertLessEqual(running.queued(), 100_000)
        portal.listen()
        leg = portal.accept()
        device.no_more()
        got = leg.rest()
        kept = len(got) // size
        self.assertEqual(got, b"".join(frames[-kept:]))
        self.assertTrue(75_000 < len(got) <= 100_000, len(got))
        self.assertEqual(running.value("sems_mitm_queue_dropped_packets_total"), len(frames) - kept)

    def test_all_queues_are_bounded(self) -> None:
        """All that waits together stays under a limit; above it the longest queue loses its oldest frames."""
        self.limits(QUEUES=200_000)
        portal, running = self.started(listening=False)
        small, *large = (METER[:-1] + digit for digit in "456")
        frames = {serial: frames_of(600, serial=serial) for serial in large}
        devices = [running.device(frame(serial=small)), *(running.device(b"".join(frames[serial])) for serial in large)]
        running.becomes(1201, "meter_metrics_packets_total")
        self.assertLessEqual(running.queued(), 200_000)
        portal.listen()
        legs = [portal.accept() for _ in devices]
        for device in devices:
            device.no_more()
        size, streams = len(frame()), sorted((leg.rest() for leg in legs), key=len)
        self.assertEqual(streams[0], frame(serial=small))
        for stream in streams[1:]:
            count, serial = len(stream) // size, stream[14:30].decode()
            self.assertEqual(stream, b"".join(frames[serial][-count:]))
        dropped = running.value("sems_mitm_queue_dropped_packets_total")
        self.assertEqual(dropped, 1201 - sum(map(len, streams)) // size)

    def test_device_goes_meanwhile(self) -> None:
        """The queue ends with the device's connection; an attempt under way has two seconds more, and no longer."""
        portal, data = self.portal(), frame()
        for name, late in (("no attempt under way", None), ("it succeeds in time", True), ("it does not", False)):
            with self.subTest(name):
                self.limits(LAST_ATTEMPT=10 if late else 0.1, LINGER=0.05)
                self.go.clear()
                running = self.exporter(self.portal(listening=False)) if late is None else self.named(portal)
                device = running.device(data)
                until(running.queued)
                if late is None:
                    self.limits(BACKOFF=(5, 5))
                    until(lambda: running.value("sems_mitm_upstream_connect_failures_total"))
                device.close()
                if late:
                    self.go.set()
                    self.assertEqual(portal.accept().rest(), data)
                running.becomes(0, "sems_mitm_device_connections")
                self.assertEqual(running.queued(), 0)
        self.go.set()
        self.assertTrue(portal.unasked())

    def test_black_hole(self) -> None:
        """A portal that swallows SYNs delays no other device's attempt, is a timeout in the end, and is tried again."""
        hole, portal = self.portal(listening=False), self.portal()
        hole.black_hole()
        running = self.named(portal)
        self.system = [(LOCAL, hole.port)]
        running.device(frame())
        until(lambda: self.asked == 1)
        self.system = [LOCAL]
        running.device(frame(serial=OTHER))
        self.assertEqual(portal.accept().read(len(frame())), frame(serial=OTHER))
        self.limits(CONNECT_TIMEOUT=0.1)
        running = self.exporter(hole)
        running.device(frame())
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="timeout") >= 2)
        self.assertEqual(running.value("meter_metrics_packets_total"), 1)

    def test_backoff(self) -> None:
        """Attempts back off though the portal accepts and hangs up at once; once it has sent something they start again at the first."""
        self.limits(BACKOFF=(0.05, 60), TICK=0.005)
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                portal, running = self.started(f"--sems.mode={mode}")
                device = running.device(frame())
                device.packets(mode == "spool")
                begin = time.monotonic()
                for count, drop in enumerate((Peer.reset, Peer.close, Peer.reset, Peer.close)):
                    drop(portal.accept())  # with the frame unread: a reset
                    running.becomes(0, "sems_mitm_upstream_connections")
                    device.send(frame(when=minute(count)) if mode == "forward" else b"")
                leg = portal.accept()
                self.assertGreater(time.monotonic() - begin, 0.5 * (0.05 + 0.1 + 0.2 + 0.4))
                leg.send(ack_of(frame()))
                device.read(ACK_SIZE if mode == "forward" else 0)
                until(lambda: running.queued() == 0 or mode == "forward")
                leg.close()
                running.becomes(0, "sems_mitm_upstream_connections")
                begin = time.monotonic()
                device.send(frame(when=minute(1)))
                portal.accept()
                self.assertLess(time.monotonic() - begin, 0.35)
                self.assertEqual(running.value("sems_mitm_device_connections"), 1)

    def test_thousands_of_resets(self) -> None:
        """A portal that resets at once, a thousand times, 40 devices at a time: the process lives, and each frame gets there."""
        self.limits(BACKOFF=(0.002, 0.01), TICK=0.005)
        portal = self.portal(habit=resets)
        running = self.exporter(portal)
        devices = {f"91000HKU{i:08d}": running.device() for i in range(40)}
        sent = 0
        while portal.legs < 1000:
            for serial, device in devices.items():
                device.send(frame(serial=serial, when=minute(sent)))
            sent += 1
            time.sleep(0.005)
        portal.do(lambda: setattr(portal, "habit", ack_of) or portal.got.clear())

        def all_came() -> bool:  # what is lost with a connection is the device's to send again
            for serial in devices.keys() - {data[14:30].decode() for data in portal.got}:
                devices[serial].send(frame(serial=serial))
            return len({data[14:30] for data in portal.got}) == 40

        until(all_came, pause=0.05)
        self.assertEqual(running.value("sems_mitm_device_connections"), 40)

    def test_addresses_that_cannot_be(self) -> None:
        """No address ends the process: what cannot be connected to is counted, and tried again."""
        for upstream in "[fe80::1%nosuch]:1", "[fe80::1]:1", "[::1]:1", "0.0.0.0:1", "a..b:1", "x" * 70 + ".tld:1":
            with self.subTest(upstream):
                running = self.exporter(None, f"--sems.upstream={upstream}", "--sems.upstream-dns=none")
                device = running.device(frame())
                until(lambda: running.value("sems_mitm_upstream_connect_failures_total") >= 2)
                self.assertEqual(running.value("meter_metrics_packets_total"), 1)
                self.assertTrue(device.silent(0.01))


# --------------------------------------------------------------------------------------------- sockets: local, spool


class LocalTest(SocketCase):
    """Mode local: no portal, the exporter answers."""

    def test_answers(self) -> None:
        """One ACK for each good frame that is owed one, and the clock behind settings, at this machine's local time."""
        rows = (  # name, frame, types of the answers
            ("settings", frame(sems.SETTINGS), ["0303", "0116"]),
            ("buffered data of another class", frame(sems.BUFFERED, cls=7), ["0745"]),
            ("unreadable payload", frame(clear=b"\x05" + bytes(15)), ["0304"]),
            ("confirmation", frame(sems.CONFIRMATION), []),
            ("another function", frame(0x05), []),
            ("bad CRC", spoilt(frame()), []),
            ("junk", b"\0\1\2", []),
            ("no serial number", frame(serial="91000HKU\n0000042"), []),
        )
        running = self.exporter(None, "--sems.mode=local")
        device, end = running.device(), frame(sems.BUFFERED, serial=OTHER)
        for name, data, kinds in rows:
            with self.subTest(name):
                device.send(data + end)
                packets = device.packets(len(kinds) + 1)
                self.assertEqual([packet.type for packet in packets], [*kinds, "0345"])
                stamp = sems.device_time(packets[0].iv[5::-1])
                self.assertLess(abs((stamp - datetime.now()).total_seconds()), PATIENCE)
        shown = running.metrics()
        self.assertNotIn("sems_mitm_upstream_up", shown)
        self.assertEqual(summed(shown, "sems_mitm_upstream_connections"), 0)
        self.assertEqual(summed(shown, "sems_mitm_unreadable_packets_total"), 1)
        dropped = [summed(shown, "sems_mitm_packets_total", type=kind, verdict="dropped") for kind in ("0310", "malformed", "junk")]  # fmt: skip
        self.assertEqual(dropped, [1, 2, 1])

    def test_clock_is_not_set(self) -> None:
        """With a wrong clock or an unknown TZ settings get their ACK alone, and that is said once."""
        for zone, plausible, sets in ((BERLIN, True, 1), ("Nowhere/Town", True, 0), (BERLIN, False, 0)):
            with self.subTest(TZ=zone, plausible=plausible), time_zone(zone):
                self.limits(RELEASED=0 if plausible else time.time() + 86400)
                running = self.exporter(None, "--sems.mode=local")
                self.lines.clear()
                device = running.device(frame(sems.SETTINGS) * 2 + frame())
                kinds = [packet.type for packet in device.packets(3 + 2 * sets)]
                self.assertEqual(kinds, ["0303", "0116"] * 2 + ["0304"] if sets else ["0303"] * 2 + ["0304"])
                self.assertEqual(sum("clock" in line for line in self.lines), 1 - sets)


class SpoolCase(SocketCase):
    def spooling(self, portal, *flags: str) -> Running:
        return self.exporter(portal, "--sems.mode=spool", *flags)

    def emptied(self, running: Launched) -> None:
        """Wait until all is delivered."""
        until(lambda: running.queued() == 0, pause=0.01)

    def undelivered(self, running: Launched) -> float:
        """How many frames were given up."""
        return running.value("sems_mitm_undeliverable_packets_total")


class SpoolTest(SpoolCase):
    """Mode spool: we answer, and the portal gets everything, however late."""

    def test_one_answer_a_frame(self) -> None:
        """Exactly one ACK a good frame, all of which the portal gets; nothing that the portal says reaches the device."""
        portal = self.portal()
        running = self.spooling(portal)
        owed = [frame(sems.SETTINGS), *frames_of(4), frame(sems.BUFFERED)]
        frames = [*owed, frame(sems.CONFIRMATION), frame(0x21)]
        device = running.device(b"junk" + spoilt(frame()) + b"".join(frames))
        kinds = [packet.type for packet in device.packets(7)]
        self.assertEqual(kinds, ["0303", "0116", *["0304"] * 4, "0345"])
        leg = portal.accept()
        self.assertEqual(leg.read(sum(map(len, frames))), b"".join(frames))
        clock = portal_frame("0116", struct.pack(">HH6s6x", 0x1216, 0x1218, sems.time_stamp(NOON)))
        leg.send(b"".join(map(ack_of, owed)) + clock + BEAT)
        self.emptied(running)
        running.becomes(1, "sems_mitm_packets_total", type="keepalive")
        self.assertTrue(device.silent())
        shown = running.metrics()
        self.assertEqual(summed(shown, "sems_mitm_acks_total"), 6)
        self.assertEqual(summed(shown, "sems_mitm_packets_total", direction="outbound", verdict="answered"), 6)
        self.assertEqual(summed(shown, "sems_mitm_packets_total", direction="inbound", verdict="dropped"), 8)
        self.assertEqual(summed(shown, "inbound_unknown_packets_total"), 0)

    def test_a_connection_for_each_serial_number(self) -> None:
        """A spool belongs to its device: several behind one connection are several spools, and one waits for no other."""
        portal = self.portal()
        serials = [METER[:-1] + digit for digit in "123"]
        frames = {serial: b"".join(frames_of(3, serial=serial)) for serial in serials}
        self.spooling(portal).device(b"".join(frames.values())).packets(9)
        got = [portal.accept().read(len(frames[serials[0]])) for _ in serials]
        self.assertEqual({stream[14:30].decode(): stream for stream in got}, frames)

    def test_order_stays(self) -> None:
        """The device goes and comes back, is half open, is there twice: frames are delivered in the order in which they came."""
        for away in (True, False):
            with self.subTest(portal_away=away):
                portal = self.portal(listening=not away)
                running = self.spooling(portal)
                frames = [*frames_of(4), *cheap_frames(2), frame(sems.BUFFERED), frame(when=minute(9))]
                gone = running.device(frames[0] + frames[1])
                gone.packets(2)
                gone.close()
                old, new = running.device(frames[2][:40]), running.device()
                for data, peer in ((frames[3], new), (frames[4], new), (frames[2][40:] + frames[5], old), *((data, new) for data in frames[6:])):  # fmt: skip
                    peer.send(data)
                    peer.packets(2 if peer is old else 1)
                if away:
                    portal.listen()
                expected = b"".join(frames[i] for i in (0, 1, 3, 4, 2, 5, 6, 7))
                self.assertEqual(portal.accept().read(len(expected)), expected)
                self.assertEqual(running.value("sems_mitm_upstream_connections"), 1)

    def test_sent_again_until_answered(self) -> None:
        """A connection that is lost after each answer: the next one brings all that is not answered, in order."""
        portal, frames = self.portal(), [frame(sems.SETTINGS), *frames_of(3), *cheap_frames(2)]
        running = self.spooling(portal)
        running.device(b"".join(frames)).packets(7)
        while frames:
            leg = portal.accept()
            self.assertEqual(leg.read(sum(map(len, frames))), b"".join(frames))
            leg.send(ack_of(frames[0]))
            left = sum(map(len, frames[1:]))
            until(lambda: running.queued() == left)
            leg.reset()
            del frames[0]
        self.assertEqual(self.undelivered(running), 0)

    def test_window(self) -> None:
        """So many frames are under way unanswered, and of one type fewer; those that get no answer are done once sent."""
        kinds = [sems.SETTINGS, sems.LIVE, sems.BUFFERED, sems.CONFIRMATION]
        for name, some, sent in (
            ("of one type", frames_of(40), 16),
            ("of three", [frame(kinds[i % 3], when=minute(i)) for i in range(60)], 32),
            ("without an answer", [frame(sems.CONFIRMATION, serial=f"91000HKU{i:08d}"[:16]) for i in range(1)] * 1, 1),
        ):
            with self.subTest(name):
                portal = self.portal(habit=silence)
                running = self.spooling(portal)
                running.device(b"".join(some))
                running.becomes(len(some), "sems_mitm_packets_total", direction="outbound")
                until(lambda: len(portal.got) == sent)
                self.assertEqual(portal.got, some[:sent])
                portal.habit = ack_of
                portal.do(lambda: [peer.send(b"".join(map(ack_of, some[:sent]))) for peer in portal.peers])
                self.emptied(running)
                self.assertEqual(portal.firsts(), some)

    def test_answers_match_by_type_and_serial_number(self) -> None:
        """An answer of another type, or of another serial number, delivers nothing: the frame is sent again, and is in no count."""
        self.limits(ANSWER_TIMEOUT=0.2)
        data, scenes = frame(), []
        for name, habit in (
            ("serial number", lambda data: portal_frame("0304", serial=OTHER)),
            ("type", lambda data: portal_frame("0303")),
            ("class", lambda data: portal_frame("0104")),
            ("keep-alives", lambda data: BEAT),
            ("junk", lambda data: b"HTTP/1.1 200 OK\r\n\r\n"),
            ("a bad CRC", lambda data: spoilt(ack_of(data))),
        ):
            portal = self.portal(habit=habit)
            scenes.append((name, portal, self.spooling(portal)))
            scenes[-1][2].device(data).packets(1)
        for name, portal, running in scenes:
            with self.subTest(name):
                until(lambda: len(portal.got) >= 3)
                self.assertEqual((running.queued(), self.undelivered(running)), (len(data), 0))
                self.assertGreaterEqual(running.value("sems_mitm_upstream_connect_failures_total", reason="timeout"), 1)
                portal.habit = ack_of
                self.emptied(running)
                self.assertEqual(set(portal.got), {data})

    def test_answer_behind_an_unfinished_one(self) -> None:
        """The answer that is found in what the portal left unfinished counts."""
        self.limits(PATIENCE={"outbound": 30, "inbound": 0.1})
        portal = self.portal(habit=lambda data: b"GW" + struct.pack(">I", 2000) + b"x" * 10 + ack_of(data))
        running = self.spooling(portal)
        running.device(frame()).packets(1)
        self.emptied(running)
        self.assertEqual((portal.legs, len(portal.got)), (1, 1))

    def test_frame_that_the_portal_does_not_like(self) -> None:
        """A portal that closes, is silent or says NACK whenever it meets one frame gets all others, in order, also after a restart.

        The frame is given up at its third count, which is counted and said.
        """
        self.limits(ANSWER_TIMEOUT=0.3, BACKOFF=(0.01, 0.02))
        for name, habit, restarts in (("closes", closes, True), ("resets", resets, False), ("is silent", silence, False), ("says NACK", nack, True)):  # fmt: skip
            with self.subTest(name, restarts=restarts):
                disliked, frames = frame(sems.BUFFERED), frames_of(200)
                portal = self.portal(habit=but_for(disliked, habit))
                file = f"--sems.spool-file={self.directory()}/spool"
                running = self.spooling(portal, file)
                device, sent = running.device(b"".join([*frames[:3], disliked, *frames[3:20]])), 20
                device.packets(21)
                if restarts:
                    until(lambda: disliked in portal.got)
                    running.close()
                    running = self.spooling(portal, file)
                    device = running.device()
                while sent < 200 and not self.undelivered(running):
                    device.send(frames[sent])
                    device.packets(1)
                    sent += 1
                    until(lambda: len([data for data in portal.firsts() if data != disliked]) == sent)
                    until(lambda: running.queued() <= len(disliked))
                until(lambda: self.undelivered(running) == 1)
                self.emptied(running)
                self.assertEqual([data for data in portal.firsts() if data != disliked], frames[:sent])
                self.assertGreaterEqual(portal.got.count(disliked), 3)
                given_up = [line for line in self.lines if disliked[:12].hex() in line and "0345" in line]
                self.assertEqual(len(given_up), 1, self.lines)
                self.lines.clear()

    def test_outage_costs_nothing(self) -> None:
        """A portal that closes, is silent, refuses or answers too late with every frame, for long: not one is given up."""
        self.limits(ANSWER_TIMEOUT=0.1, BACKOFF=(0.005, 0.01))
        late = lambda data: time.sleep(0.15) or ack_of(data)
        frames, scenes = frames_of(20), {}
        for name, habit in {"closes": closes, "resets": resets, "silent": silence, "NACK": nack, "late": late}.items():
            portal = self.portal(habit=habit)
            running = self.spooling(portal)
            running.device(b"".join(frames[:19])).packets(19)
            scenes[name] = portal, running
        for name, (portal, running) in scenes.items():
            with self.subTest(name):
                until(lambda: portal.legs >= 8 or len(portal.got) >= 60)
                running.device(frames[19]).packets(1)
                until(lambda: portal.legs >= 12 or len(portal.got) >= 100)
                portal.habit = ack_of
                self.emptied(running)
                self.assertEqual((sorted(portal.firsts()), self.undelivered(running)), (sorted(frames), 0))

    def test_refusal_does_not_spin(self) -> None:
        """A portal that refuses everything is not asked again and again at full speed."""
        portal = self.portal(habit=nack)
        running = self.spooling(portal)
        running.device(b"".join(frames_of(3))).packets(3)
        until(lambda: running.value("sems_mitm_nacks_total") >= 3)
        before, pause = len(portal.got), time.monotonic() + 0.5
        until(lambda: time.monotonic() > pause)
        self.assertLess(len(portal.got) - before, 500)

    def test_lost_ack(self) -> None:
        """A device whose ACK was lost, while the portal is silent, is answered when the time of a loop's sign is over; the portal sees it once."""
        self.limits(RETURN_WINDOW=0.5)
        portal, data = self.portal(habit=silence), frame()
        running = self.spooling(portal)
        running.device(data).packets(1)
        until(lambda: portal.got)
        running.devices[0].reset()

        def is_answered() -> bool:
            with contextlib.suppress(EOFError, ConnectionError):
                return bool(running.device(data).packets(1))
            return False

        self.assertFalse(is_answered())
        until(is_answered, pause=0.1)
        self.assertEqual((portal.got, running.queued()), ([data], len(data)))
        self.assertGreaterEqual(running.value("sems_mitm_refused_connections_total", reason="loop"), 1)

    def test_repeats(self) -> None:
        """A device that repeats itself while its frames wait is answered each time, and each is delivered once."""
        portal, frames = self.portal(listening=False, habit=ack_of), frames_of(60)
        running = self.spooling(portal)
        for _ in range(3):
            device = running.device(b"".join(frames))
            device.packets(60)
            device.close()
        portal.do(portal.listen)
        self.emptied(running)
        self.assertEqual(portal.got, frames)

    def test_full_spool(self) -> None:
        """What finds no place is neither kept nor answered, counted, and said once; nothing that was ACKed is dropped."""
        frames = cheap_frames(60)
        for name, limits, flags in (
            ("the spool is full", {"SPOOL_MEMORY": (20_000, 1 << 20)}, ()),
            ("all spools together are", {"SPOOL_MEMORY": (1 << 20, 20_000)}, ()),
            ("the spool is full, in a file", {"SPOOL_FILE": (20_000, 1 << 20)}, (f"--sems.spool-file={self.directory()}/a",)),
            ("all together are, in a file", {"SPOOL_FILE": (1 << 20, 20_000)}, (f"--sems.spool-file={self.directory()}/a",)),
            ("no spool is free", {}, ("--sems.max-connections=1",)),
        ):  # fmt: skip
            with self.subTest(name), contextlib.ExitStack() as stack:
                for limit in limits.items():
                    stack.enter_context(mock.patch.object(sems, *limit, create=True))
                self.lines.clear()
                portal = self.portal(listening=False, habit=ack_of)
                running = self.spooling(portal, *flags)
                some = frames if limits else [frames[0], *(frame(serial=OTHER, when=minute(i)) for i in range(59))]
                device = running.device(b"".join(some))
                running.becomes(60, "sems_mitm_packets_total", direction="outbound")
                kept = int(running.value("sems_mitm_packets_total", verdict="answered"))
                self.assertTrue(10 < kept < 20 if limits else kept == 1, kept)
                self.assertEqual(running.value("sems_mitm_packets_total", verdict="dropped"), 60 - kept)
                self.assertEqual(sum("room" in line for line in self.lines), 1, self.lines)
                device.packets(kept)
                self.assertTrue(device.silent(0.02))
                portal.do(portal.listen)
                self.emptied(running)
                self.assertEqual(portal.got, frames[:kept])
                device.send(frames[-1])
                device.packets(1)
                self.emptied(running)
                self.assertEqual(portal.got[-1], frames[-1])

    def test_idle_spool(self) -> None:
        """A spool with nothing to deliver closes its connection long after its device's last frame; with something it does not."""
        self.limits(SILENCE=0.2)
        portal = self.portal()
        running = self.spooling(portal)
        running.device(frame()).packets(1)
        leg = portal.accept()
        leg.read(len(frame()))
        running.becomes(0, "sems_mitm_device_connections")
        self.assertTrue(leg.silent(0.25))
        leg.send(ack_of(frame()))
        self.assertEqual(leg.rest(), b"")
        running.becomes(0, "sems_mitm_upstream_connections")

    def test_portal_that_dies_at_random(self) -> None:
        """It gets every frame at least once, first in order, and the device one ACK a frame."""
        chance, frames = random.Random(3), frames_of(120)
        moody = lambda data: chance.choice([*[ack_of(data)] * 12, b"", Peer.reset, Peer.close])
        self.limits(ANSWER_TIMEOUT=0.2)
        portal = self.portal(habit=moody)
        running = self.spooling(portal)
        device, sent = running.device(), 0
        while sent < len(frames):
            some = frames[sent : sent + chance.randint(1, 12)]
            device.send(b"".join(some))
            device.packets(len(some))
            sent += len(some)
            if chance.random() < 0.3:
                portal.do(portal.die)
                portal.do(portal.listen)
        portal.habit = ack_of
        self.emptied(running)
        self.assertEqual((sorted(portal.firsts()), self.undelivered(running)), (sorted(frames), 0))
        self.assertTrue(device.silent(0.02))


# ------------------------------------------------------------------------------------------------ the file of a spool


class Insistent(threading.Thread):
    """A device that sends bursts, frame after frame, and again what was not answered; `acked` is how many were."""

    def __init__(self, serial: str, port: int, seed: int, count: int) -> None:
        super().__init__(daemon=True)
        self.chance, self.port, self.serial = random.Random(seed), port, serial
        self.frames = frames_of(count, serial=serial, clear=b"\0" + b"\xff" * 15)
        self.acked, self.over = 0, False
        self.start()

    def run(self) -> None:
        while not self.over:
            with contextlib.suppress(OSError, EOFError):
                self._speak(connected(self.port))
            time.sleep(0.005)

    def _speak(self, peer: Peer) -> None:
        with contextlib.closing(peer):
            peer.sock.settimeout(2)
            while self.acked < len(self.frames) and not self.over:
                burst = self.frames[self.acked : self.acked + self.chance.choice((1, 1, 3, 40))]
                peer.send(b"".join(burst))
                for _ in burst:
                    peer.read(ACK_SIZE)
                    self.acked += 1
                time.sleep(self.chance.random() * 0.02)

    def close(self) -> None:
        self.over = True
        self.join()


PHOENIX = """
import os
while (child := os.fork()):  # whoever is killed is there again at once
    os.waitpid(child, 0)
print("phoenix", os.getpid(), file=sys.stderr, flush=True)
"""
QUICK = "sems.BACKOFF = (0.02, 0.05); sems.TICK = 0.02; sems.RETURN_WINDOW = 0.05"


class SpoolFileTest(SpoolCase):
    """--sems.spool-file: what was acknowledged outlives the process."""

    def setUp(self) -> None:
        super().setUp()
        self.file = os.path.join(self.directory(), "spool")
        self.flags = ("--sems.mode=spool", f"--sems.spool-file={self.file}")

    def filed(self, portal, *flags: str, **more) -> Process:
        """An exporter as a process, with the file."""
        return self.serving(portal, *self.flags, *flags, **{"before": QUICK, **more})

    def delivered(self, frames: list, running: Launched | None = None, portal=None) -> None:
        """A new process delivers just these, in order, and keeps nothing."""
        portal = portal or self.portal(habit=ack_of)
        running = running or self.exporter(portal, *self.flags)
        until(lambda: len(portal.firsts()) >= len(frames))
        self.emptied(running)
        self.assertEqual(portal.got, frames)
        running.close()

    def test_killed_and_started(self) -> None:
        """All good frames that came are delivered by the next process, in order, also those that the portal owes nothing for."""
        frames = [frame(sems.SETTINGS), *frames_of(3), frame(sems.CONFIRMATION), *cheap_frames(2), frame(0x21)]
        process = self.filed(self.portal(listening=False))
        process.device(b"".join(frames)).packets(7)
        process.becomes(len(frames), "sems_mitm_packets_total")
        self.assertEqual(stat.S_IMODE(os.stat(self.file).st_mode), 0o600)
        process.stop(signal.SIGKILL)
        self.delivered(frames)
        self.delivered([])

    @unittest.skipUnless(shutil.which("strace"), "no strace here")
    def test_on_the_disk_before_the_ack(self) -> None:
        """The system calls of one frame, as strace shows them: the file is written and synced, then the ACK is sent."""
        process = self.filed(self.portal(listening=False))
        process.get("/-/healthy")
        log = os.path.join(self.directory(), "strace")
        command = ["strace", "-f", "-y", "-e", "trace=write,pwrite64,fdatasync,fsync,sendto,sendmsg", "-o", log]
        watcher = subprocess.Popen([*command, "-p", str(process.popen.pid)], stderr=subprocess.PIPE)
        try:
            line = watcher.stderr.readline()
            if b"attached" not in line:
                self.skipTest(f"strace may not attach: {line.decode().strip()}")
            process.device(frame()).packets(1)
        finally:
            watcher.terminate()
            watcher.communicate()
        calls = [call for line in open_lines(log) if (call := re.search(r"(\w+)\(\d+<([^>]*)>", line))]
        ours = [call[1] for call in calls if call[2].startswith(self.file) or call[1].startswith("send")]
        ours = ours[: next(i for i, name in enumerate(ours) if name.startswith("send")) + 1]
        self.assertRegex(" ".join(ours), r"^(.* )?p?write(64)? (.* )?f(data)?sync send(to|msg)$")

    def test_what_is_no_file_of_ours(self) -> None:
        """An empty file is taken; anything else that is none of ours ends the start in one line, and stays as it is."""
        folder = self.directory()
        with contextlib.closing(sqlite3.connect(f"{folder}/other")) as other:
            other.execute("CREATE TABLE spool (a, b)")
            other.commit()
        written(folder, frame(), name="journal")
        for name, content in (("empty", b""), ("text", b"hello\n"), ("zeros", bytes(8192)), ("begins well", b"SQLite format 3\0" + bytes(99))):  # fmt: skip
            with open(f"{folder}/{name}", "wb") as file:
                file.write(content)
        os.mkdir(f"{folder}/directory")
        os.mkfifo(f"{folder}/fifo")
        os.symlink(f"{folder}/text", f"{folder}/link")
        rows = (
            "text",
            "zeros",
            "begins well",
            "journal",
            "other",
            "directory",
            "fifo",
            "link",
            "none/file",
            "text/file",
        )
        path = lambda name: os.path.join(folder, name)
        content = lambda name: content_of(path(name)) if os.path.isfile(path(name)) else os.path.exists(path(name))
        before, names = {name: content(name) for name in rows}, sorted(os.listdir(folder))
        started = {name: self.process(*PORTS, "--sems.mode=spool", f"--sems.spool-file={path(name)}") for name in rows}
        for name, process in started.items():
            with self.subTest(name):
                code, err = process.ended()
                self.assertEqual((code, err.count("\n"), content(name)), (1, 1, before[name]), err)
                self.assertIn(path(name), err)
                self.assertNotIn("Traceback", err)
        self.assertIn("version 2", started["journal"].stderr())
        self.assertEqual(sorted(os.listdir(folder)), names)
        os.rename(path("empty"), self.file)
        running = self.exporter(self.portal(habit=ack_of), *self.flags)
        running.device(frame()).packets(1)
        self.emptied(running)

    def test_one_process(self) -> None:
        """A second exporter on the file ends in one line; the first goes on; after it the next one is let in."""
        first = self.filed(self.portal(listening=False))
        first.device(frame()).packets(1)
        code, err = self.filed(None, before=f"{QUICK}; sems.SPOOL_LOCKED = 0.1").ended()
        self.assertEqual((code, err.count("\n")), (1, 1), err)
        self.assertIn(self.file, err)
        first.device(frame(when=minute(1))).packets(1)
        first.stop()
        self.delivered(frames_of(2))

    def test_shrinks(self) -> None:
        """The file is small again when what it held is delivered, also while the exporter runs."""
        portal, frames = self.portal(listening=False, habit=ack_of), cheap_frames(1500)
        running = self.exporter(portal, *self.flags)
        size = lambda: sum(entry.stat().st_size for entry in os.scandir(os.path.dirname(self.file)))
        running.device(b"".join(frames)).packets(1500)
        until(lambda: size() > sum(map(len, frames)))
        portal.do(portal.listen)
        self.emptied(running)
        until(lambda: os.path.getsize(self.file) < sum(map(len, frames)))
        running.close()
        self.assertEqual(portal.firsts(), frames)
        self.assertLess(size(), 100_000)

    def test_bat_signal(self) -> None:
        """The file keeps the truth: a later start without the flag delivers it, one with the flag draws the bat."""
        frames = [frame(when=NOON + timedelta(hours=hours)) for hours in (2, 3)]
        running = self.exporter(self.portal(listening=False), *self.flags, "--batsignal")
        running.device(b"".join(frames)).packets(2)
        running.close()
        portal = self.portal(habit=silence)
        running = self.exporter(portal, *self.flags, "--batsignal")
        until(lambda: len(portal.got) == 2)
        self.assertEqual(portal.got, list(map(sems.with_bat, frames)))
        running.close()
        self.delivered(frames)

    def test_more_spools_than_can_be_active(self) -> None:
        """After a start with fewer connections than serial numbers in the file each has its turn."""
        serials = [f"91000HKU{i:08d}" for i in range(6)]
        running = self.exporter(self.portal(listening=False), *self.flags)
        running.device(b"".join(frame(serial=serial) for serial in serials)).packets(6)
        running.close()
        self.limits(SILENCE=0.1)
        portal = self.portal(habit=ack_of)
        running = self.exporter(portal, *self.flags, "--sems.max-connections=2")
        self.emptied(running)
        self.assertEqual(sorted(data[14:30].decode() for data in portal.got), serials)

    def test_killed_with_a_backlog(self) -> None:
        """What was delivered is not sent again, but for what was under way."""
        frames, portal = frames_of(3000, clear=b"\0" + b"\xff" * 15), self.portal(listening=False, habit=ack_of)
        process = self.filed(portal)
        process.device(b"".join(frames)).packets(3000)
        portal.do(portal.listen)
        until(lambda: len(portal.got) > 700)
        process.stop(signal.SIGKILL)
        portal.do(lambda: None)
        before = list(portal.got)
        process = self.filed(portal)
        until(lambda: len(portal.firsts()) == 3000)
        self.emptied(process)
        self.assertEqual(portal.firsts(), frames)
        self.assertLessEqual(len(portal.got) - 3000, 2 * 32)
        self.assertLess(len(before), 3000, "it was killed too late to show anything")

    def test_start_with_a_large_file(self) -> None:
        """A start needs no more memory for a file of 12 MB than for an empty one. TEST_SLOW=1: 250 MB, with the time."""
        portal, slow = self.portal(listening=False), os.environ.get("TEST_SLOW")
        serials, count = [f"91000HKU{number:08d}" for number in range(8 if slow else 1)], 4000 if slow else 1500
        process = self.filed(portal)
        process.get("/metrics")
        empty = process.status("VmHWM")
        for serial in serials:
            device, frames = process.device(), cheap_frames(count, 8000, serial)
            for i in range(0, count, 100):
                device.send(b"".join(frames[i : i + 100]))
                device.packets(100)
        process.stop()
        begin = time.monotonic()
        process = self.filed(portal)
        self.assertGreater(process.queued(), len(serials) * count * 7e3)
        took, filled = time.monotonic() - begin, process.status("VmHWM")
        self.assertLess(filled - empty, 6000)
        if slow:
            print(f"a start with {process.queued() / 1e6:.0f} MB: {took:.2f} s, {filled} kB, {empty} kB without a file")

    def test_killed_at_random(self) -> None:
        """kill -9 at random moments of bursts, deliveries, failures: every ACKed frame is delivered. TEST_KILLS=100: so often."""
        kills, seed = int(os.environ.get("TEST_KILLS", "10")), int(os.environ.get("TEST_SEED", "1"))
        chance, unused = random.Random(seed), self.portal(listening=False)
        moods = random.Random(seed)
        portal = self.portal(habit=lambda data: moods.choice([*[ack_of(data)] * 30, b"", Peer.reset, Peer.close]))
        unused.close()
        devices = [Insistent(f"91000HKU{i:08d}", unused.port, seed + i, 300 * kills) for i in range(4)]
        self.addCleanup(lambda: [device.close() for device in devices])
        before = QUICK + "; sems.ANSWER_TIMEOUT = 0.2" + PHOENIX
        process = self.filed(portal, f"--sems.listen-address={LOCAL}:{unused.port}", before=before)
        acked = lambda: sum(device.acked for device in devices)
        pids = lambda: re.findall(r"^phoenix (\d+)$", process.stderr(), re.MULTILINE)
        self.addCleanup(lambda: os.kill(int(pids()[-1]), signal.SIGKILL))
        self.addCleanup(process.popen.kill)
        for number in range(kills):
            was = acked()
            until(lambda: len(pids()) > number and acked() > was)
            time.sleep(chance.random() ** 2 * 0.2)
            os.kill(int(pids()[-1]), signal.SIGKILL)
            if chance.random() < 0.3:
                portal.do(portal.die)
                portal.do(portal.listen)
        for device in devices:
            device.close()
        portal.habit = ack_of
        for device in devices:
            until(lambda: set(portal.firsts(device.serial)) >= set(device.frames[: device.acked]), pause=0.05)
        self.assertEqual(re.findall("Traceback", process.stderr()), [])
        if kills > 20:
            print(f"{kills} kills, {acked()} ACKed frames, {len(portal.firsts())} delivered, none lost")


class DiskTest(SpoolCase):
    """The spool's disk has little room, or cannot be written: a small file system in a mount namespace of the process."""

    def setUp(self) -> None:
        super().setUp()
        self.disk = self.directory()
        if os.geteuid() or not shutil.which("unshare") or not shutil.which("nsenter"):
            self.skipTest("needs root, unshare and nsenter for file systems of its own")
        probe = subprocess.run([*self.mounted("true"), "true"], capture_output=True, text=True)
        if probe.returncode:
            self.skipTest(f"no mount namespaces here: {probe.stderr.strip()}")

    def mounted(self, then: str = "true", size: str = "8m") -> tuple:
        """The command that gives a process an empty file system, and does something there first."""
        script = f'mount -t tmpfs -o size={size} tmpfs "$0" && cd "$0" && {then} && cd / && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", script, self.disk)

    def filed(self, portal, then: str = "true", under: tuple = ()) -> Process:
        flags = ("--sems.mode=spool", f"--sems.spool-file={self.disk}/spool")
        process = self.serving(portal, *flags, before=QUICK + "; sems.PERIOD = 60", under=under or self.mounted(then))
        process.ports()
        return process

    def again(self, process: Process, portal) -> Process:
        """It is killed, and started anew in the same mount namespace, which a sleeper keeps alive."""
        where = ("nsenter", f"--mount=/proc/{process.popen.pid}/ns/mnt", "sleep", "600")
        sleeper = subprocess.Popen(where)
        self.addCleanup(lambda: (sleeper.kill(), sleeper.wait()))
        until(lambda: os.readlink(f"/proc/{sleeper.pid}/ns/mnt") == os.readlink(f"/proc/{process.popen.pid}/ns/mnt"))
        process.stop(signal.SIGKILL)
        return self.filed(portal, under=("nsenter", f"--mount=/proc/{sleeper.pid}/ns/mnt"))

    def inside(self, process: Process, *command: str) -> None:
        """Do something in its mount namespace."""
        pid = str(process.popen.pid)
        command = [*command, *[pid] * (command[-1] == "--pid")]
        subprocess.run(["nsenter", f"--mount=/proc/{pid}/ns/mnt", *command], check=True)

    def is_refused(self, process: Process, device: Peer, data: bytes) -> bool:
        """Whether the device gets no ACK for its frame, which is counted as dropped."""
        dropped = lambda: process.value("sems_mitm_packets_total", direction="outbound", verdict="dropped")
        before = dropped()
        device.send(data)
        until(lambda: dropped() > before or not device.silent(0))
        return device.silent(0.02)

    def answered_at_last(self, device: Peer, data: bytes) -> None:
        """The device sends its frame again and again, until it is answered."""
        until(lambda: device.send(data) or not device.silent(0.1))
        device.packets(1)
        while not device.silent(0.2):
            device.packets(1)

    def test_disk_trouble(self) -> None:
        """No ACK that is not on the disk; the exporter serves, delivers what it has, says so once, and recovers by itself."""
        filler = 'head -c 100m /dev/zero >"$0/filler" 2>/dev/null; true'
        for name, trouble, cure in (
            ("full to the last byte", ("sh", "-c", filler, self.disk), ("rm", f"{self.disk}/filler")),
            ("less room than others need", ("sh", "-c", f'head -c $(($(df --output=avail -B1 {self.disk} | tail -n 1) - 900000)) /dev/zero >{self.disk}/filler'), ("rm", f"{self.disk}/filler")),
            ("errors", ("prlimit", "--fsize=1:", "--pid"), ("prlimit", "--fsize=unlimited:", "--pid")),
        ):  # fmt: skip
            with self.subTest(name):
                portal, frames = self.portal(listening=False, habit=ack_of), frames_of(40)
                process = self.filed(portal)
                device, acked, refused = process.device(b"".join(frames[:10])), frames[:10], frames[10:14]
                device.packets(10)
                self.inside(process, *trouble)
                self.assertEqual([self.is_refused(process, device, data) for data in refused], [True] * 4)
                self.assertEqual(process.get("/-/healthy")[0], 200)
                self.assertGreaterEqual(process.value("sems_mitm_file_errors_total", file="spool"), 1)
                self.assertEqual(process.value("meter_metrics_packets_total"), 14)
                said = sum(self.disk in line for line in process.stderr().splitlines())
                self.assertEqual(said, 1 if name != "errors" else 0, process.stderr())  # its stderr is a file, too
                self.assertTrue(device.silent(0.05))
                if name == "full to the last byte":  # what is stored outlives a kill meanwhile
                    process = self.again(process, portal)
                    device = process.device()
                    self.assertTrue(self.is_refused(process, device, frames[14]))
                portal.do(portal.listen)
                until(lambda: len(portal.firsts()) == 10)
                self.assertEqual(portal.firsts(), acked)
                self.inside(process, *cure)
                portal.do(portal.die)
                self.answered_at_last(device, frames[20])
                device.send(b"".join(frames[21:25]))
                device.packets(4)
                process = self.again(process, portal)
                portal.do(portal.listen)
                until(lambda: set(portal.got) >= {*acked, *frames[20:25]})
                self.emptied(process)
                self.assertEqual([data for data in portal.firsts() if data not in refused], [*acked, *frames[20:25]])
                self.assertNotIn("Traceback", process.stderr())

    def test_start_without_room(self) -> None:
        """A start on a full or read-only disk serves and decodes, acknowledges nothing, and takes the file when it can."""
        for name, then, cure in (
            ("full", "head -c 100m /dev/zero >filler 2>/dev/null || true", ("rm", f"{self.disk}/filler")),
            ("read-only", f"cd / && mount -o remount,ro {self.disk}", ("mount", "-o", "remount,rw", self.disk)),
            ("read-only, with a file", f": >spool && cd / && mount -o remount,ro {self.disk}", ("mount", "-o", "remount,rw", self.disk)),
        ):  # fmt: skip
            with self.subTest(name):
                portal = self.portal(habit=ack_of)
                process = self.filed(portal, then)
                device = process.device()
                for data in frames_of(2):
                    self.assertTrue(self.is_refused(process, device, data))
                self.assertEqual(process.value("meter_power_generation_watts"), 2600)
                self.assertGreaterEqual(process.value("sems_mitm_file_errors_total", file="spool"), 1)
                self.inside(process, *cure)
                self.answered_at_last(device, frame(when=minute(2)))
                until(lambda: frame(when=minute(2)) in portal.got)
                self.emptied(process)
                self.assertNotIn("Traceback", process.stderr())


# ---------------------------------------------------------------------------------------------- sockets: connections


class ConnectionsTest(NamedCase):
    """How connections end, and which are refused."""

    def test_half_close(self) -> None:
        """A device that has sent its last byte still gets what the portal says within the time for it."""
        for portal_closes in (True, False):
            with self.subTest(portal_closes=portal_closes):
                self.limits(LINGER=30 if portal_closes else 0.5)
                portal, running = self.started()
                data = frame()
                device = running.device(data)
                device.no_more()
                leg = portal.accept()
                self.assertEqual(leg.rest(), data)
                leg.send(ack_of(data))
                self.assertEqual(device.read(ACK_SIZE), ack_of(data))
                if portal_closes:
                    leg.close()
                self.assertEqual(device.rest(), b"")
                running.becomes(0, "sems_mitm_device_connections")

    def test_at_once_if_nothing_was_sent(self) -> None:
        """A device that goes without a word leaves nothing behind."""
        self.limits(LINGER=3 * PATIENCE)
        portal = self.portal()
        for mode in ("forward", "local", "spool"):
            with self.subTest(mode):
                running = self.exporter(portal, f"--sems.mode={mode}")
                device = running.device()
                running.becomes(1, "sems_mitm_device_connections")
                device.close()
                running.becomes(0, "sems_mitm_device_connections")

    def test_silent_device(self) -> None:
        """A device silent for long is closed, and its portal's connection with it; one that speaks is not."""
        self.limits(SILENCE=0.6, LINGER=0.05)
        portal, data = self.portal(), frame()
        running = self.exporter(portal)
        idle, talker = running.device(data), running.device(frame(serial=OTHER))
        for _ in (idle, talker):
            portal.accept().read(len(data))
        until(lambda: talker.send(b"x") or not idle.silent(0.03))
        self.assertEqual(idle.rest(), b"")
        self.assertTrue(talker.silent(0.01))
        running.becomes(1, "sems_mitm_upstream_connections")

    def test_limit(self) -> None:
        """One connection more than the limit is closed at once, counted and logged; when one goes there is room again."""
        running = self.exporter(None, "--sems.mode=local", "--sems.max-connections=2")
        first, second = running.device(frame()), running.device(frame())
        first.packets(1), second.packets(1)
        self.assertEqual([running.device().rest() for _ in range(3)], [b""] * 3)
        running.becomes(3, "sems_mitm_refused_connections_total", reason="limit")
        self.assertEqual(sum("max-connections" in line for line in self.lines), 1)
        self.assertEqual(running.value("sems_mitm_suppressed_log_lines_total"), 2)
        first.close()
        running.becomes(1, "sems_mitm_device_connections")
        running.device(frame()).packets(1)

    def test_allow_from(self) -> None:
        """Only the networks of --sems.allow-from may connect."""
        for networks, allowed in (("10.0.0.0/8,192.168.1.0/24", 0), ("10.0.0.0/8,127.0.0.0/8", 1), ("::1/128", 0)):
            with self.subTest(networks):
                running = self.exporter(None, "--sems.mode=local", f"--sems.allow-from={networks}")
                device = running.device()
                if allowed:
                    device.send(frame())
                    device.packets(1)
                else:
                    self.assertEqual(device.rest(), b"")
                running.becomes(1 - allowed, "sems_mitm_refused_connections_total", reason="not_allowed")

    def test_every_family(self) -> None:
        """:PORT is a socket for each family there is, and peers are plain addresses."""
        capture = os.path.join(self.directory(), "capture")
        flags = ("--sems.listen-address=:0", "--web.listen-address=:0", f"--sems.capture={capture}")
        running = self.exporter(None, "--sems.mode=local", *flags)
        hosts = [LOCAL, *(["::1"] if os.path.exists("/proc/net/if_inet6") and socket.has_ipv6 else [])]
        for host in hosts:
            with self.subTest(host):
                running.device(frame(), host=host).packets(1)
                client = connected(running.web_port, b"GET /-/healthy HTTP/1.0\r\n\r\n", host=host)
                self.assertIn(b" 200 ", client.rest())
                client.close()
        peers = [json.loads(line)["peer"].rpartition(":")[0] for line in open_lines(capture)]
        self.assertEqual([peer for peer in peers if peer], [LOCAL, "[::1]"][: len(hosts)])


class Detour(threading.Thread):
    """A relay between the exporter and itself that hides both ends, as NAT does."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.sock, self.host, self.target, self.turns = socket.create_server((LOCAL, 0)), LOCAL, 0, 0
        self.port = self.sock.getsockname()[1]

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self.sock.accept()[0], socket.create_connection((LOCAL, self.target))
                self.turns += 1
                for one, other in ((near, far), (far, near)):
                    threading.Thread(target=self.pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def pass_on(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        for sock in (one, other):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class LoopTest(SpoolCase):
    """A portal's name that leads back here."""

    def itself(self, mode: str) -> Running:
        """An exporter whose portal is itself."""
        unused = self.portal(listening=False)
        unused.close()
        return self.exporter(unused, f"--sems.mode={mode}", f"--sems.listen-address={LOCAL}:{unused.port}")

    def detoured(self, mode: str) -> tuple:
        """An exporter whose portal is itself behind NAT, and the NAT."""
        detour = Detour()
        self.addCleanup(detour.close)
        running = self.exporter(detour, f"--sems.mode={mode}")
        detour.target = running.port
        detour.start()
        return detour, running

    def test_our_own_listener(self) -> None:
        """A portal that is one of our listening sockets is not tried: reason loop, and the log says what to change."""
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                self.lines.clear()
                running = self.itself(mode)
                running.device(frame())
                until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="loop") >= 2)
                shown = running.metrics()
                self.assertEqual(summed(shown, "sems_mitm_device_connections"), 1)
                self.assertEqual(summed(shown, "sems_mitm_upstream_connections"), 0)
                self.assertEqual(summed(shown, "sems_mitm_refused_connections_total"), 0)
                self.assertEqual(sum("--sems.upstream" in line for line in self.lines), 1, self.lines)
                self.assertEqual(running.value("meter_metrics_packets_total"), 1)

    def test_first_frame_comes_back(self) -> None:
        """Where NAT hides both ends, a first frame that we sent just now and that comes back is a loop; a device is let in the next time."""
        self.limits(RETURN_WINDOW=0.5)
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                portal, data = self.portal(), frame()
                running = self.exporter(portal, f"--sems.mode={mode}")
                device = running.device(data)
                leg = portal.accept()
                self.assertEqual(running.device(leg.read(len(data))).rest(), b"")
                running.becomes(1, "sems_mitm_refused_connections_total", reason="loop")
                self.assertTrue(portal.unasked(0.02))
                leg.send(ack_of(data))
                self.assertEqual(device.read(ACK_SIZE)[:24], ack_of(data)[:24])
                if mode == "forward":
                    running.device(data)
                    self.assertEqual(portal.accept().read(len(data)), data)

    def test_no_loop(self) -> None:
        """A device that comes back with its last frame later, or when its old connection has gone, is no loop."""
        for window, gone in ((0.05, False), (2 * PATIENCE, True)):
            with self.subTest(gone=gone):
                self.limits(LOOP_WINDOW=window, LINGER=0)
                portal, running, device, leg = self.talking()
                if gone:
                    device.close()
                    leg.close()
                    running.becomes(0, "sems_mitm_device_connections")
                else:
                    time.sleep(2 * window)
                running.device(frame())
                self.assertEqual(portal.accept().read(len(frame())), frame())
                self.assertEqual(running.value("sems_mitm_refused_connections_total"), 0)

    def test_never_spirals(self) -> None:
        """However the first bytes are cut, and whatever they are: our own bytes come back once an attempt, and go no further."""
        data, other = frame(), frame(when=minute(1))
        self.limits(BACKOFF=(30, 30), PATIENCE={"outbound": 0.2, "inbound": 0.2})
        for mode, name, parts in (
            ("forward", "a frame", [data]),
            ("forward", "cut at 10", [data[:10], data[10:]]),
            ("forward", "cut at 80", [data[:80], data[80:]]),
            ("forward", "a tail, a frame", [data[100:] + other]),
            ("forward", "a bad frame, a good one", [spoilt(data) + other]),
            ("forward", "junk", [b"junk" * 30]),
            ("forward", "junk, more junk", [b"\0", b"junk" * 30]),
            ("forward", "half a frame", [data[:50]]),
            ("spool", "a frame", [data]),
            ("spool", "frames", [data + other]),
        ):
            with self.subTest(name, mode=mode):
                detour, running = self.detoured(mode)
                device = running.device()
                for part in parts:
                    device.send(part)
                    time.sleep(0.02)
                until(lambda: detour.turns)
                running.becomes(1, "sems_mitm_refused_connections_total", reason="loop")
                more = name in ("junk, more junk", "half a frame")  # which are not cut the same way when they come back
                self.assertLessEqual(detour.turns, 1 + more)
                until(lambda: running.value("sems_mitm_device_connections") <= 1 + more)

    def test_frame_after_frame(self) -> None:
        """A loop takes no connection more with each packet, however long after the last."""
        self.limits(BACKOFF=(0.01, 0.01), LOOP_WINDOW=0.3, LINGER=0.05)
        running = self.detoured("forward")[1]
        device = running.device()
        for i in range(4):
            device.send(frame(when=minute(i)))
            until(lambda: running.value("sems_mitm_refused_connections_total", reason="loop") >= i + 1)
            pause = time.monotonic() + 0.35
            until(lambda: time.monotonic() > pause)  # the window is over
            self.assertLessEqual(running.value("sems_mitm_device_connections"), 2)

    def test_two_that_face_each_other(self) -> None:
        """Two exporters, each the other's portal, in all pairs of modes, the device there or gone: quiet soon.

        Once one of them has the true portal, what was ACKed is there.
        """
        self.limits(BACKOFF=(0.3, 60), RETURN_WINDOW=1.5, LOOP_WINDOW=0.5, LINGER=0.1)
        scenes = [
            self.faced(*row) for row in itertools.product(("forward", "spool"), ("forward", "spool"), (True, False))
        ]
        pause = time.monotonic() + 1
        until(lambda: time.monotonic() > pause)
        before = [sum(map(self.traffic, scene.exporters)) for scene in scenes]
        time.sleep(0.3)
        for number, (scene, was) in enumerate(zip(scenes, before)):
            with self.subTest(scene.name):
                self.assertLess(sum(map(self.traffic, scene.exporters)) - was, 60)
                acked = scene.acked or int(scene.exporters[0].value("sems_mitm_acks_total"))
                index = number // 2 % 2  # which one is put right
                scene.exporters[index].close()
                portal = self.portal(habit=ack_of)
                scene.start(index, portal)
                if acked:
                    until(lambda: set(portal.got) >= set(scene.frames[:acked]), pause=0.05)

    @staticmethod
    def traffic(running: Running) -> float:
        shown = running.metrics()
        return summed(shown, "sems_mitm_packets_total") + summed(shown, "sems_mitm_refused_connections_total")

    def faced(self, near: str, far: str, stays: bool):
        """Two exporters that face each other, and a device of the first one that has sent five frames."""
        ports = [self.portal(listening=False) for _ in range(2)]
        for port in ports:
            port.close()
        folder, scene = self.directory(), mock.Mock(frames=frames_of(5))
        scene.name = f"{near} and {far}, the device {'there' if stays else 'gone'}"

        def start(index: int, portal) -> Running:
            mode = (near, far)[index]
            flags = [f"--sems.mode={mode}", f"--sems.listen-address={LOCAL}:{ports[index].port}"]
            return self.exporter(portal, *flags, *[f"--sems.spool-file={folder}/{index}"] * (mode == "spool"))

        scene.start = start
        scene.exporters = [start(0, ports[1]), start(1, ports[0])]
        device = scene.exporters[0].device(b"".join(scene.frames))
        scene.acked = len(device.packets(5 if near == "spool" else 0))
        if not stays:
            device.close()
        return scene


# ---------------------------------------------------------------------------------------------------- sockets: names


class NameServer(threading.Thread):
    """A name server on a free UDP port; answers(query) is the datagrams it sends."""

    def __init__(self, answers) -> None:
        super().__init__(daemon=True)
        self.answers, self.asked = answers, 0
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.bind((LOCAL, 0))
        self.text = "%s:%d" % self.sock.getsockname()
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


def address_record(query: bytes, *addresses: str) -> bytes:
    """A name server's answer to a query."""
    head = query[:2] + struct.pack(">5H", 0x8180, 1, len(addresses), 0, 0)
    records = (b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + socket.inet_aton(address) for address in addresses)
    return head + query[12:] + b"".join(records)


class NameTest(NamedCase):
    """How the portal's name becomes an address."""

    def server(self, answers) -> NameServer:
        server = NameServer(answers)
        self.addCleanup(server.close)
        return server

    def test_servers_first(self) -> None:
        """The servers are asked first, anew for each attempt; while one gives a routable address the system is not asked."""
        self.system = ["10.0.0.1"]
        server = self.server(lambda query: [address_record(query, "10.0.0.9", LOCAL)])
        portal = self.portal()
        running = self.named(portal, servers=[server])
        device = running.device(frame())
        for attempt in range(1, 4):
            leg = portal.accept()
            leg.read(len(frame()))
            self.assertEqual((server.asked, self.asked), (attempt, 0))
            leg.close()
            running.becomes(0, "sems_mitm_upstream_connections")
            device.send(frame(when=minute(attempt)))
        self.assertEqual(running.value("sems_mitm_upstream_connect_failures_total"), 0)

    def test_servers_that_fail(self) -> None:
        """A server that keeps silent, lies or is not there is passed over for the next, then for the system; the true answer behind a forged one counts."""
        self.patch(sems.ask_dns, "__defaults__", (0.1,))
        wrong = lambda query: [bytes([query[0] ^ 1]) + address_record(query, "127.0.0.9")[1:], b"", query]
        true = self.server(lambda query: [*wrong(query), address_record(query, LOCAL)])
        nobody = mock.Mock(text="%s:%d" % self.portal(listening=False).sock.getsockname())
        unroutable = self.server(lambda query: [address_record(query, "10.0.0.9")])
        bad = {"silent": self.server(lambda query: []), "lies": self.server(wrong), "nobody": nobody, "no address of the internet": unroutable}  # fmt: skip
        for name, server in bad.items():
            for then in ([true], []):
                with self.subTest(name, then="another server" if then else "the system"):
                    self.system = [] if then else [LOCAL]
                    portal = self.portal()
                    self.named(portal, servers=[server, *then]).device(frame())
                    self.assertEqual(portal.accept().read(6), b"POSTGW")
        self.assertEqual(true.asked, 4)

    def test_no_address(self) -> None:
        """A name that nobody knows, and one that leads to this machine: a reason, a line that says what to change, no attempt."""
        self.patch(sems, "is_global", lambda host: False)
        for system, answer, reason in (
            ([], [], "dns"),
            (["127.0.0.2"], ["192.168.1.2"], "loop"),
            (["127.0.0.2"], [], "loop"),
        ):
            with self.subTest(system=system, answer=answer):
                self.system = system
                self.lines.clear()
                portal = self.portal()
                running = self.named(portal, servers=[self.server(lambda query: [address_record(query, *answer)])])
                running.device(frame())
                until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason=reason) >= 2)
                self.assertTrue(portal.unasked(0.02))
                (line,) = (line for line in self.lines if "portal.test" in line and "cannot reach" in line)
                self.assertIn("--sems.upstream-dns", line)
                self.assertEqual(running.value("sems_mitm_upstream_up"), 0)
                running.stop()

    def test_addresses(self) -> None:
        """Of a name's addresses the next is tried when one refuses, four at most in an attempt."""
        portal, closed = self.portal(), self.portal(listening=False)
        tried, connect = [], socket.socket.connect_ex
        self.patch(socket.socket, "connect_ex", lambda sock, address: tried.append(address) or connect(sock, address))
        for name, system, reached in (
            ("the second", [(LOCAL, closed.port), LOCAL], True),
            ("the fourth", [(LOCAL, closed.port)] * 3 + [LOCAL], True),
            ("the fifth", [(LOCAL, closed.port)] * 4 + [LOCAL], False),
            ("1,500", [(LOCAL, closed.port)] * 1500, False),
        ):
            with self.subTest(name):
                self.system, tried[:] = system, []
                running = self.named(portal)
                running.device(frame())
                if reached:
                    self.assertEqual(portal.accept().read(6), b"POSTGW")
                    self.assertEqual(running.value("sems_mitm_upstream_connect_failures_total"), 0)
                else:
                    until(lambda: running.value("sems_mitm_upstream_connect_failures_total") >= 3)
                    running.stop()
                    self.assertLessEqual(len(tried), 4 * self.asked)
                    self.assertTrue(portal.unasked(0.02))

    def test_slow_look_up(self) -> None:
        """A look-up that takes long holds up nothing but attempts; a device that goes meanwhile is forgotten."""
        self.go.clear()
        self.limits(LAST_ATTEMPT=0.02)
        portal = self.portal()
        running = self.named(portal)
        devices = [running.device(frame(serial=f"91000HKU0000000{i}")) for i in range(4)]
        until(lambda: self.asked and running.value("meter_metrics_packets_total") == 4)
        self.assertEqual(running.get("/-/ready")[0], 200)
        devices[0].reset()
        running.becomes(3, "sems_mitm_device_connections")
        self.go.set()
        self.assertEqual([portal.accept().read(6) for _ in range(3)], [b"POSTGW"] * 3)
        self.assertTrue(portal.unasked())

    def test_look_up_that_hangs(self) -> None:
        """An attempt ends in time although a name service says nothing; it costs one thread, ever; the devices are read on."""
        self.limits(CONNECT_TIMEOUT=0.05)
        self.go.clear()
        running, before = self.named(self.portal()), threading.active_count()
        devices = [running.device(frame(serial=f"91000HKU{i:08d}")) for i in range(10)]
        most = 0
        while running.value("sems_mitm_upstream_connect_failures_total", reason="dns") < 30:
            most = max(most, threading.active_count())
        devices[0].send(b"".join(frames_of(500)))
        running.becomes(510, "meter_metrics_packets_total")
        self.assertEqual((most - before, self.asked), (1, 1))
        self.assertEqual(running.value("sems_mitm_upstream_up"), 0)

    def test_look_up_that_comes_late(self) -> None:
        """A name service that answers each time after the attempt has ended still leads to the portal."""
        self.limits(CONNECT_TIMEOUT=0.1)
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                portal, system = self.portal(), self.look_up
                self.numeric.side_effect = lambda host, *rest, **more: (
                    time.sleep(0.3 if str(host).endswith(".test") else 0) or system(host, *rest, **more)
                )
                running = self.named(portal, f"--sems.mode={mode}")
                running.device(frame())
                self.assertEqual(portal.accept().read(len(frame())), frame())
                self.assertGreaterEqual(running.value("sems_mitm_upstream_connect_failures_total", reason="dns"), 1)

    def test_out_of_threads(self) -> None:
        """No thread to be had: no error, and it works when there are some again."""
        portal = self.portal()
        running = self.named(portal)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            device = running.device(frame())
            running.becomes(1, "meter_metrics_packets_total")
            until(lambda: running.value("sems_mitm_upstream_connect_failures_total") >= 2)
        self.assertEqual(portal.accept().read(len(frame())), frame())
        self.assertTrue(device.silent(0.01))
        self.assertEqual(running.value("sems_mitm_internal_errors_total"), 0)


# ---------------------------------------------------------------------------------------------------- sockets: limits


class LimitsTest(SocketCase):
    """Out of descriptors, much to do, much that waits."""

    def test_out_of_descriptors(self) -> None:
        """Connections wait on both families and on HTTP: those there are go on, nothing spins, and accepting resumes."""
        portal, data = self.portal(), frame()
        limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)); sems.TICK = 0.1"
        process = self.serving(portal, "--sems.listen-address=:0", before=limit)
        device = process.device(data)
        leg = portal.accept()
        leg.read(len(data))
        hosts = [LOCAL, "::1"] if socket.has_ipv6 and os.path.exists("/proc/net/if_inet6") else [LOCAL]
        idle = [process.device(host=host) for host in hosts for _ in range(20)]
        idle += [process.client() for _ in range(20)]
        until(lambda: len(os.listdir(f"/proc/{process.popen.pid}/fd")) >= 31)
        begin, before = time.monotonic(), process.cpu()
        while time.monotonic() < begin + 0.4:
            device.send(data)
            self.assertEqual(leg.read(len(data)), data)
            time.sleep(0.05)
        self.assertLess(process.cpu() - before, 0.2)
        for peer in idle:
            peer.reset()
        for i, host in enumerate(hosts):
            data = frame(serial=METER[:-1] + str(i))
            process.device(data, host=host)
            self.assertEqual(portal.accept().read(len(data)), data)
        self.assertEqual(process.value("process_max_fds"), 32)
        self.assertNotIn("Traceback", process.stderr())
        self.assertEqual(process.value("sems_mitm_internal_errors_total"), 0)
        self.assertEqual(process.stop(), 0)

    def test_hardly_a_descriptor(self) -> None:
        """With 5 to 12 descriptors it ends in one line, or serves."""
        path = os.path.join(self.directory(), "spool")
        started = {}
        for number, mode in itertools.product(range(5, 13), ("local", "spool")):
            limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({number}, {number}))"
            flags = [f"--sems.mode={mode}", *[f"--sems.spool-file={path}{number}"] * (mode == "spool"), *PORTS]
            started[number, mode] = self.process(*flags, before=limit)
        for (number, mode), process in started.items():
            with self.subTest(descriptors=number, mode=mode):
                until(lambda: process.popen.poll() is not None or "devices connect" in process.stderr())
                if process.popen.poll() is not None:
                    lines = [line for line in process.stderr().splitlines() if " WARNING " not in line]
                    self.assertEqual((process.popen.poll(), len(lines)), (1, 1), process.stderr())
                else:
                    process.device(frame())
                    self.assertEqual(process.stop(), 0)
                self.assertNotRegex(process.stderr(), "Traceback|Warning|Exception")

    def latencies(self, *works, times: int = 5) -> list:
        """Of each work the seconds of the best of several times: the machine has other things to do, too."""
        took = [math.inf] * len(works)
        for _ in range(times):
            for i, work in enumerate(works):
                begin = time.monotonic()
                work()
                took[i] = min(took[i], time.monotonic() - begin)
            if max(took) < 1:
                break
        return took

    def test_a_flood_delays_no_other(self) -> None:
        """While one peer floods and 100 are connected, another device's packet and a scrape take less than a second each."""
        empty = with_crc(with_length(b"POSTGW....\x03.."))
        several = b"".join(frame(serial=f"91000HKU{i:08d}", when=minute(1)) for i in range(200))
        capture = os.path.join(self.directory(), "capture")
        portal = self.portal()
        process = self.serving(portal, f"--sems.capture={capture}", "--sems.max-devices=512")
        for i in range(100, 200):
            process.device(frame(serial=f"91000HKU{i:08d}"))
            portal.accept()
        probe, flooded = process.device(frame(serial=OTHER)), process.device(frame(when=minute(-1)))
        legs = [portal.accept(), portal.accept()]
        leg, other = sorted(legs, key=lambda leg: leg.read(len(frame()))[14:30] != OTHER.encode())
        over = threading.Event()
        self.addCleanup(over.set)
        waiting = select.poll()
        for peer in portal.peers:
            if peer is not leg:
                waiting.register(peer.sock, select.POLLIN)
        waiting.register(flooded.sock, select.POLLIN)
        waiting.register(portal.sock, select.POLLIN)

        def take() -> None:
            """Take what comes on all other connections of the portal."""
            socks = {peer.sock.fileno(): peer.sock for peer in [*portal.peers, flooded]}
            while not over.is_set():
                for number, _ in waiting.poll(50):
                    if number == portal.sock.fileno():
                        peer = portal.accept()
                        socks[peer.sock.fileno()] = peer.sock
                        waiting.register(peer.sock, select.POLLIN)
                    elif not socks[number].recv(1 << 20):
                        waiting.unregister(number)

        taker = threading.Thread(target=take, daemon=True)
        taker.start()
        rows = (  # what, who floods, with what
            ("frames without a serial number", flooded, empty * 5000),
            ("200 serial numbers", process.device(), several * 2),
            ("keep-alives of a portal", other, BEAT * 30_000),
        )
        number = itertools.count()

        def packet() -> None:
            data = frame(serial=OTHER, when=NOON + timedelta(seconds=next(number)))
            probe.send(data)
            self.assertEqual(leg.read(len(data)), data)

        for name, peer, block in rows:
            with self.subTest(name):
                dry = threading.Event()
                flood = threading.Thread(target=self.flood, args=(peer, block, dry), daemon=True)
                flood.start()
                self.assertLess(max(self.latencies(packet, lambda: process.get("/metrics"))), 1)
                dry.set()
                flood.join(PATIENCE)
        over.set()
        taker.join(PATIENCE)

    @staticmethod
    def flood(peer: Peer, block: bytes, over: threading.Event) -> None:
        peer.sock.settimeout(0.1)
        while not over.is_set():
            with contextlib.suppress(socket.timeout):
                peer.sock.sendall(block)

    def test_long_frames_to_decode(self) -> None:
        """256 serial numbers with three live frames of 8 KiB each, then a scrape: nobody waits longer than a second."""
        process = self.serving(None, "--sems.mode=local")
        clear = sems.payload([(first, range(1, 1001)) for first in (0, 1000, 2000, 3000)])
        data = frame(clear=clear[: 8192 - 64])
        frames = [with_crc(data[:14] + b"91000HKU%08d" % i + data[30:]) for i in range(256)]
        probe = process.device(frame(serial=OTHER))
        probe.packets(1)
        crowd = [process.device() for _ in range(8)]

        def packet() -> None:
            probe.send(frame(serial=OTHER))
            probe.packets(1)

        def scrape() -> None:
            self.assertEqual(process.get("/metrics")[0], 200)

        for _ in range(3):  # each wave is to be decoded anew
            for i, data in enumerate(frames):
                crowd[i % 8].send(data * 3)
                crowd[i % 8].packets(3)
            took = self.latencies(scrape, packet, times=1)
            if max(took) < 1:
                break
        self.assertLess(max(took), 1)

    def test_crowd_of_http_clients(self) -> None:
        """200 silent clients, 200 that send a byte now and then, 100 that come back at once, 40 slow readers hold up nobody."""
        process = self.serving(None, "--sems.mode=local")
        device = process.device(frame())
        device.packets(1)
        for _ in range(200):
            process.client()
        dribblers = [process.client(b"G") for _ in range(200)]
        for _ in range(40):
            process.client(b"GET /metrics HTTP/1.0\r\n\r\n", 2048)
        over = threading.Event()
        self.addCleanup(over.set)

        def dribble() -> None:
            while not over.wait(0.5):
                for peer in dribblers:
                    with contextlib.suppress(OSError):
                        peer.send(b"E")

        def come_back() -> None:
            peers: list = []
            while not over.wait(0.01):
                for peer in [peer for peer in peers if not peer.silent(0)]:
                    peer.close()
                    peers.remove(peer)
                with contextlib.suppress(OSError):
                    peers += [connected(process.web_port) for _ in range(100 - len(peers))]
            for peer in peers:
                peer.close()

        threads = [threading.Thread(target=work, daemon=True) for work in (dribble, come_back)]
        for thread in threads:
            thread.start()

        def packet() -> None:
            device.send(frame())
            device.packets(1)

        def scrape() -> None:
            self.assertEqual(process.get("/metrics")[0], 200)

        for _ in range(3):
            self.assertLess(max(self.latencies(scrape, packet)), 1)
        over.set()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertGreater(process.value("sems_mitm_http_closed_connections_total"), 100)

    def test_idle_with_a_backlog(self) -> None:
        """Idle with much to deliver and the portal away, it does next to nothing. TEST_SLOW=1 measures a minute."""
        path = os.path.join(self.directory(), "spool")
        count, seconds = (2000, 60) if os.environ.get("TEST_SLOW") else (500, 1)
        process = self.serving(self.portal(listening=False), "--sems.mode=spool", f"--sems.spool-file={path}")
        frames = cheap_frames(count, 8000)
        for i in range(0, count, 100):
            process.device(b"".join(frames[i : i + 100])).packets(100)
        self.assertGreater(process.queued(), 7e3 * count)
        time.sleep(0.5)
        before = process.cpu()
        time.sleep(seconds)
        used = (process.cpu() - before) / seconds
        self.assertLess(used, 0.02)
        if seconds > 2:
            print(f"idle with a backlog: {100 * used:.3f} % of a core")

    def test_memory_at_worst(self) -> None:
        """256 connections, the portal away, queues full, an unfinished frame in each, 16 slow readers of the page: under 80 MB."""
        portal = self.portal(listening=False)
        process = self.serving(portal, before="sems.BACKOFF = (5, 60)", MALLOC_ARENA_MAX="2")
        data = next(bytes.fromhex(row["hex"]) for row in VECTORS if row["hex"][20:24] == "0204")
        clear, unfinished = sems.decode(data, OUT).clear, b"POSTGW\0\0\x1f\xf0\x03\x04" + bytes(8000)
        for i in range(256):
            process.device(frame(sems.LIVE, 2, f"9010KETU{i:08d}", clear=clear))
        until(lambda: process.value("sems_mitm_upstream_connect_failures_total") >= 256, pause=0.1)
        for i, device in enumerate(process.devices):
            device.send(cheap_frames(1, 1024, f"91000HKU{i:08d}")[0] * 64 + unfinished)
        for _ in range(16):
            process.client(b"GET / HTTP/1.0\r\n\r\n", SMALL)
        until(lambda: process.value("sems_mitm_packets_total", type="0345") == 256 * 64, 2 * PATIENCE, 0.2)
        self.assertGreater(process.queued(), sems.QUEUES - sems.HTTP_ANSWERS)
        self.assertLess(process.status("VmHWM"), 80 << 10)


# ---------------------------------------------------------------------------------------------- sockets: files, life


class RecordedFilesTest(SocketCase):
    """--sems.capture and --sems.backfill."""

    def test_written_at_once(self) -> None:
        """Every frame is in the capture before the device can know of it, buffered readings in the other file; decode reads both."""
        capture, backfill = (os.path.join(self.directory(), name) for name in ("capture", "backfill"))
        running = self.exporter(None, "--sems.mode=local", f"--sems.capture={capture}", f"--sems.backfill={backfill}")
        rows = [frame(sems.SETTINGS), frame(), frame(sems.BUFFERED)]
        device = running.device(spoilt(frame()) + b"".join(rows))
        device.packets(4)
        until(lambda: len(open_lines(capture)) == 4 and open_lines(backfill))
        outward = [line for line in map(json.loads, open_lines(capture)) if line["direction"] == "outbound"]
        self.assertEqual([line["hex"] for line in outward], [data.hex() for data in (spoilt(frame()), *rows)])
        self.assertEqual([line["verdict"] for line in outward], ["dropped", *["answered"] * 3])
        self.assertEqual({line["peer"] for line in outward}, {"%s:%d" % device.sock.getsockname()})
        self.assertEqual([json.loads(line)["hex"] for line in open_lines(backfill)], [rows[2].hex()])
        code, out, _ = called("decode", capture)
        good = [line["hex"] for line in map(json.loads, out.splitlines()) if line["crc_ok"]]
        self.assertEqual((code, good[:3]), (0, [data.hex() for data in rows]))

    def test_trouble_with_a_file(self) -> None:
        """A full disk, a bad path, a FIFO that nobody reads: counted, a log line a minute, and nothing else changes."""
        fifo = os.path.join(self.directory(), "fifo")
        os.mkfifo(fifo)
        rows = (("/dev/full", 5, 5), ("/nonexistent/capture", 5, 5), (self.directory(), 5, 5), (fifo, 300, 1))
        for path, count, errors in rows:
            with self.subTest(path):
                self.lines.clear()
                portal = self.portal()
                running = self.exporter(portal, f"--sems.capture={path}", f"--sems.backfill={path}")
                stream = b"".join(frames_of(count, function=sems.BUFFERED))
                device = running.device(stream)
                leg = portal.accept()
                self.assertEqual(leg.read(len(stream)), stream)
                leg.send(ack_of(stream))
                self.assertEqual(device.read(ACK_SIZE), ack_of(stream))
                for file in ("capture", "backfill"):
                    until(lambda: running.value("sems_mitm_file_errors_total", file=file) >= errors)
                self.assertEqual(running.value("sems_mitm_buffered_packets_total"), count)
                self.assertEqual(sum("--sems.capture" in line for line in self.lines), 1, self.lines)

    def test_opened_anew(self) -> None:
        """SIGHUP opens capture and backfill anew, for the rotation of logs, and ends nothing."""
        where = self.directory()
        names = ["capture", "backfill"]
        process = self.serving(None, "--sems.mode=local", *(f"--sems.{name}={where}/{name}" for name in names))
        device = process.device(frame(sems.BUFFERED))
        device.packets(1)
        until(lambda: all(open_lines(f"{where}/{name}") for name in names))
        for name in names:
            os.rename(f"{where}/{name}", f"{where}/{name}.1")
        process.popen.send_signal(signal.SIGHUP)
        data = frame(sems.BUFFERED, when=minute(1))

        def is_written() -> bool:
            device.send(data)
            device.packets(1)
            return all(data.hex() in "".join(open_lines(f"{where}/{name}")) for name in names)

        until(is_written)
        for name in names:
            self.assertEqual(json.loads(open_lines(f"{where}/{name}.1")[0])["hex"], frame(sems.BUFFERED).hex())
        self.assertEqual(process.stop(), 0)

    def test_slow_disk(self) -> None:
        """A disk that holds all up is named once."""
        self.limits(SLOW=0.02)
        capture = os.path.join(self.directory(), "capture")
        running = self.exporter(None, "--sems.mode=local", f"--sems.capture={capture}")
        write = os.write
        self.patch(os, "write", lambda file, data: time.sleep(0.05) or write(file, data))
        for data in frames_of(3):
            running.device(data).packets(1)
        until(lambda: len(open_lines(capture)) >= 3)
        (line,) = (line for line in self.lines if "disk" in line)
        self.assertIn("--sems.capture", line)


class LifeTest(SocketCase):
    """How the process begins and ends."""

    def test_signals(self) -> None:
        """SIGTERM and SIGINT end it with 0 and soon, whatever the portal does; what is queued for one that reads goes out."""
        rows = (  # state, mode, signal
            ("connected", "forward", signal.SIGINT),
            ("queue waiting", "spool", signal.SIGTERM),
            ("black hole", "forward", signal.SIGINT),
        )
        started = []
        for state, mode, number in rows:
            portal = self.portal(listening=state == "connected")
            if state == "black hole":
                portal.black_hole()
            process = self.serving(portal, f"--sems.mode={mode}", before="sems.SHUTDOWN = 0.3")
            started.append((state, portal, process, number))
        for state, portal, process, _ in started:
            process.client()  # one that says nothing
            process.device(frame())
            until(lambda: process.value("meter_metrics_packets_total"))
            portal.accept() if state == "connected" else None
        for _, _, process, number in started:
            process.popen.send_signal(number)
        for state, portal, process, _ in started:
            with self.subTest(state):
                self.assertEqual(process.popen.wait(PATIENCE), 0, process.stderr())
                self.assertNotRegex(process.stderr(), "Traceback|Warning")
                self.assertTrue(state != "connected" or portal.peers[0].rest() == frame())

    def test_stop_sends_what_is_queued(self) -> None:
        """What is queued for a portal that takes its time goes out before the end."""
        self.limits(SHUTDOWN=PATIENCE)
        self.small_buffers()
        portal, running = self.started()
        stream = b"".join(cheap_frames(150))
        running.device().send(stream)
        leg = portal.accept()
        until(lambda: running.value("sems_mitm_bytes_total", direction="outbound") == len(stream))
        running.loop.stop()
        self.assertEqual(leg.rest(), stream)
        running.thread.join(PATIENCE)
        self.assertFalse(running.thread.is_alive())

    def test_debug_line(self) -> None:
        """At level debug each packet is a line: direction, type, end of the serial number, length, verdict."""
        process = self.serving(None, "--sems.mode=local", "--log.level=debug")
        process.device(frame()).packets(1)
        line = until(lambda: [line for line in process.stderr().splitlines() if "DEBUG" in line and "0304" in line])[0]
        for text in ("outbound", METER[-8:], str(len(frame())), "answered"):
            self.assertIn(text, line)

    def test_without_sqlite(self) -> None:
        """A Python without sqlite3 ends mode spool in one line, and serves in all others."""
        for mode, code in (("spool", 1), ("local", 0)):
            process = self.process(f"--sems.mode={mode}", *PORTS, before="sys.modules['sqlite3'] = None")
            if code:
                self.assertEqual((process.popen.wait(PATIENCE), process.stderr().count("\n")), (1, 1), process.stderr())
                self.assertIn("sqlite3", process.stderr())
            else:
                process.device(frame()).packets(1)


# -------------------------------------------------------------------------------------------------------- containment


class ContainmentTest(NamedCase):
    """An error of our own ends what it happened in, is counted, is in the log once a minute, and nothing else changes."""

    def setUp(self) -> None:
        super().setUp()
        self.faults = 1  # said; twice it happens each time

    def fault(self, where, name: str) -> dict:
        """Let a function of the program raise as often as the dictionary's `left` says, which is 0."""
        real, state = getattr(where, name), {"left": 0}

        def faulty(*arguments, **more):
            if state["left"]:
                state["left"] -= 1
                raise ZeroDivisionError("a fault that a test makes")
            return real(*arguments, **more)

        self.patch(where, name, faulty)
        return state

    def test_every_callback(self) -> None:
        """Whatever the loop calls can fail, twice: it is counted, the process lives, and the next frame of another device is answered."""
        rows = (  # mode, class, method; for an owner: it alone is hit
            ("forward", sems.Relay, "ready"), ("forward", sems.Relay, "settle"), ("forward", sems.Relay, "look"),
            ("local", sems.Answerer, "ready"), ("local", sems.Answerer, "settle"), ("spool", sems.Answerer, "answer"), ("local", sems.Answerer, "look"),
            ("spool", sems.SpoolSender, "ready"), ("spool", sems.SpoolSender, "settle"), ("spool", sems.SpoolSender, "look"),
            ("local", sems.HttpClient, "ready"), ("local", sems.HttpClient, "settle"), ("local", sems.HttpClient, "look"),
            ("local", sems.Request, "do_GET"), ("forward", sems.PortalLink, "addressed"),
            ("local", sems.Listener, "ready"), ("local", sems.Listener, "open"), ("local", sems.Loop, "_admit"), ("local", sems.Web, "_admit"),
            ("local", sems.Files, "flush"), ("spool", sems.Spools, "commit"), ("spool", sems.Spools, "look"), ("spool", sems.SpoolTable, "tend"),
            ("spool", sems.Spools, "take"), ("local", sems.Loop, "_bound"), ("local", sems.Store, "look"), ("local", sems.History, "note"),
            ("local", sems.Store, "meet"), ("local", sems.Framer, "feed"), ("local", sems.Framer, "expire"), ("local", sems.Connection, "send"),
            ("local", sems.Connection, "watch"), ("local", sems.Connection, "close"), ("local", sems, "address"), ("local", sems, "answer"),
            ("forward", sems.Relay, "close"), ("local", sems.Answerer, "close"), ("local", sems.HttpClient, "close"),
            ("local", sems, "tuned"), ("forward", sems, "with_small_buffers"), ("forward", sems, "allowed"), ("local", sems, "reading"),
        )  # fmt: skip
        self.limits(BACKOFF=(0.01, 0.01), PATIENCE={"outbound": 0.1, "inbound": 0.1}, ANSWER_TIMEOUT=0.2, LINGER=0.05)
        self.faults = 0
        for mode, where, name in rows:
            with self.subTest(mode=mode, callback=f"{getattr(where, '__name__', 'sems')}.{name}"):
                self.fail_twice(mode, self.fault(where, name))
                self.assertTrue(self.tracebacks())
            self.lines.clear()

    def fail_twice(self, mode: str, state: dict) -> None:
        """Have a callback of a running exporter fail twice, and see that it lives."""
        running = self.named(self.portal(habit=ack_of), f"--sems.mode={mode}")
        with contextlib.closing(running.device(frame(serial=INVERTER, cls=sems.GRID_TIED))) as first:
            first.packets(1)
        serials = (f"91000HKU{number:08d}" for number in itertools.count(100))
        state["left"], visitors = 2, []

        def errors() -> float:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                return running.value("sems_mitm_internal_errors_total")
            return 0

        def provoke() -> bool:
            """All that can lead to a callback: devices that come, speak in parts, and go; a scrape."""
            with contextlib.suppress(OSError):
                visitors.append(running.device(frame(serial=next(serials)) + frame()[:20]))
                visitors.append(running.client(b"GET / "))
            for peer in visitors[:-10]:
                peer.close()
            return errors() >= 2 and not state["left"]

        def is_served() -> bool:
            with contextlib.suppress(OSError, EOFError), contextlib.closing(connected(running.port)) as device:
                device.send(frame(serial=next(serials)))
                return bool(device.packets(1))
            return False

        try:
            until(provoke, pause=0.02)
            self.assertEqual(errors(), 2)
            self.assertTrue(is_served())
            self.assertEqual(running.get("/-/healthy")[0], 200)
        finally:
            state["left"] = 0
            running.close()

    def test_what_was_spooled_stays(self) -> None:
        """An event of a spool's connection fails: the connection ends, and what was spooled is delivered later."""
        portal, frames = self.portal(habit=ack_of), frames_of(5)
        running = self.exporter(portal, "--sems.mode=spool")
        self.fault(sems, "allowed")["left"] = 2
        device = running.device(b"".join(frames))
        device.packets(5)
        until(lambda: running.queued() == 0)
        self.assertEqual(portal.firsts(), frames)
        running.becomes(2, "sems_mitm_internal_errors_total")
        self.assertTrue(device.silent(0.01))

    def test_a_reading(self) -> None:
        """A reading, also while a scrape decodes: it is left out; its packet is counted and goes on."""
        portal, frames = self.portal(habit=ack_of), frames_of(3)
        running = self.exporter(portal)
        self.fault(sems, "reading")["left"] = 2
        device = running.device()
        for count, data in enumerate(frames):
            device.send(data)
            device.packets(1)
            running.becomes(min(count + 1, 2), "sems_mitm_internal_errors_total")
        self.assertEqual(portal.got, frames)
        self.assertEqual(running.value("meter_power_generation_watts"), 2600)


# -------------------------------------------------------------------------------------------------- network namespaces


def inside(name: str, make):
    """What make() gives when called in a network namespace: a socket keeps the one that it was made in."""
    found: list = []

    def run() -> None:
        with open(f"/run/netns/{name}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")
        found.append(make())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


class NamespaceTest(SocketCase):
    """Two hosts with a cable between them: the exporter and its devices on one, the portal on the other."""

    HERE, THERE = "10.93.7.1", "10.93.7.2"

    def setUp(self) -> None:
        super().setUp()
        self.here, self.there = (f"sems{os.getpid()}{end}" for end in "ab")
        if not shutil.which("ip") or os.geteuid():
            self.skipTest("needs root and `ip` for network namespaces")
        made = self.ip("-batch", "-", text=f"netns add {self.here}\nnetns add {self.there}\n")
        self.addCleanup(self.ip, "-force", "-batch", "-", text=f"netns del {self.here}\nnetns del {self.there}\n")
        made = made or self.ip(
            "-n", self.here, "link", "add", "v0", "type", "veth", "peer", "name", "v0", "netns", self.there
        )
        for name, address in ((self.here, self.HERE), (self.there, self.THERE)):
            text = f"link set lo up\naddr add {address}/30 dev v0\nlink set v0 up\n"
            made = made or self.ip("-n", name, "-batch", "-", text=text)
        if made:
            self.skipTest(f"no network namespaces here: {made}")

    @staticmethod
    def ip(*arguments: str, text: str = "") -> str:
        """What `ip` has to complain about."""
        return subprocess.run(["ip", *arguments], input=text, capture_output=True, text=True).stderr.strip()

    def device(self, running: Running, data: bytes) -> Peer:
        running.devices.append(inside(self.here, lambda: connected(running.port, data)))
        return running.devices[-1]

    def exporter_here(self, portal: Portal, *flags: str) -> Running:
        running = inside(self.here, lambda: Running(portal, *flags))
        running.get = lambda path, **headers: inside(self.here, lambda: http_get(running.web_port, path, **headers))
        self.addCleanup(running.close)
        return running

    def test_nonlocal_bind(self) -> None:
        """On a host with net.ipv4.ip_nonlocal_bind=1 the real portal, on our own port, is not taken for ourselves; we are."""
        subprocess.run(
            ["ip", "netns", "exec", self.here, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind"], check=True
        )
        portal = inside(self.there, lambda: self.portal(host=self.THERE))
        running = self.exporter_here(portal, f"--sems.listen-address=:{portal.port}")
        self.device(running, frame())
        self.assertEqual(portal.accept().read(6), b"POSTGW")
        running.close()
        portal.host = self.HERE
        running = self.exporter_here(portal, f"--sems.listen-address=:{portal.port}")
        self.device(running, frame())
        until(lambda: running.value("sems_mitm_upstream_connect_failures_total", reason="loop"))

    def test_line_cut_without_a_word(self) -> None:
        """A line cut without a word is noticed, with traffic or without; then frames wait, and go out when it is back."""
        slow, asked, set_ = os.environ.get("TEST_SLOW"), {}, socket.socket.setsockopt
        names = {getattr(socket, name): name for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_USER_TIMEOUT")}

        def scaled(sock, level, option, value) -> None:
            """The same limits, sixty times as short."""
            if level == socket.IPPROTO_TCP and option in names:
                asked.setdefault(names[option], set()).add(value)
                value = value if slow else 600 if names[option] == "TCP_USER_TIMEOUT" else 1
            set_(sock, level, option, value)

        self.patch(socket.socket, "setsockopt", scaled)
        self.limits(CONNECT_TIMEOUT=10 if slow else 0.2, BACKOFF=(1, 60) if slow else (0.02, 0.05))
        started = []
        for mode, talks in (("forward", False), ("forward", True), ("spool", False), ("spool", True)):
            portal = inside(self.there, lambda: self.portal(host=self.THERE))
            running = self.exporter_here(portal, f"--sems.mode={mode}")
            device = self.device(running, frame())
            leg = portal.accept()
            leg.read(len(frame()))
            leg.send(ack_of(frame()))
            device.packets(1)
            until(lambda: running.queued() == 0)
            started.append((mode, talks, portal, running, device))
        self.ip("-n", self.there, "link", "set", "v0", "down")
        begin = time.monotonic()
        for mode, talks, *_, device in started:
            device.send(frame(when=minute(1)) * talks)
            device.packets(1) if mode == "spool" and talks else None
        for *_, running, _ in started:
            until(lambda: running.value("sems_mitm_upstream_up") == 0, 100, 0.05)
        took = time.monotonic() - begin
        self.assertLess(took, 90 if slow else PATIENCE)
        for mode, *_, running, device in started:
            device.send(frame(when=minute(2)))
            device.packets(1) if mode == "spool" else None
            until(running.queued)
        self.ip("-n", self.there, "link", "set", "v0", "up")
        for mode, talks, portal, *_ in started:
            with self.subTest(mode, talks=talks):
                portal.sock.settimeout(100)
                expected = frame(when=minute(1)) * (talks and mode == "spool") + frame(when=minute(2))
                self.assertEqual(portal.accept().read(len(expected)), expected)
        self.assertEqual({name: max(values) for name, values in asked.items()}["TCP_USER_TIMEOUT"], 60_000)
        self.assertTrue(asked["TCP_KEEPIDLE"] >= {20} and asked["TCP_KEEPINTVL"] >= {10}, asked)
        if slow:
            print(f"line cut: noticed by all four after {took:.0f} s")


# ------------------------------------------------------------------------------------------------------- household


def of_family(
    family: str, gauges: dict, counters: dict | None = None, fresh: float = 1000.0, day=None, serial: str = METER
):
    """A device that has said this at `fresh`; metrics have no labels, or one of battery or string."""
    device = sems.Device(sems.Address("0304", 3, 4, serial, "long", ("meter", serial)), fresh)
    device.family = family

    def series(metric: str) -> tuple:
        name, _, number = metric.partition("#")
        label = "battery" if name.startswith("battery") else "string"
        return name, f'{label}="{number}"' if number else ""

    device.live.gauges = {series(metric): number for metric, number in gauges.items()}
    device.live.counters = {series(metric): number for metric, number in (counters or {}).items()}
    for name, number in device.live.counters.items():
        device.live.held.counters[name] = sems.HeldCounter(name[0], number, fresh)
    device.live.fresh, device.live.day = fresh, day
    device.live.has_battery = any(metric.startswith("battery_power_watts") for metric in gauges)
    return device


def kit1000(solar: float, export: float, **more):
    return of_family("HK1000", {"meter_power_generation_watts": solar, "meter_power_export_watts": export}, **more)


def kit3000(export: float, **more):
    return of_family("HK3000", {"meter_power_export_watts": export}, **more)


def dns(power: float, **more):
    return of_family("GRID", {"inverter_power_output_watts": power}, **more)


def hybrid(solar: float, battery: float | None = None, export: float | None = None, load: float | None = None, **more):
    """Its load is on the grid side; what passes its terminals is what is left. Without one, what its meter leaves, or 7 W."""
    power = solar + (battery or 0)
    load = load if load is not None else 7 if export is None else power - export
    told = {"inverter_string_power_watts#1": solar / 4, "inverter_string_power_watts#2": solar * 3 / 4}
    told.update(inverter_power_output_watts=power, inverter_active_power_watts=power - load)
    told.update({} if battery is None else {"battery_power_watts#1": battery, "battery_state_of_charge_ratio#1": 0.5})
    told.update({} if export is None else {"meter_power_export_watts": export})
    return of_family("HYBRID", told, **more)


def a_store(clock=lambda now: now, **more):
    return sems.Store(300, 256, False, clock, **more)


SILENT = {"fresh": 600.0}
NOW = 1000.0


class HouseholdTest(unittest.TestCase):
    """What a device, and the house, makes and takes."""

    def house(self, devices: list, now: float = NOW) -> dict:
        store = a_store()
        return sems.house([sems.member(device, store, now) for device in devices])

    def test_flows(self) -> None:
        """Generation, house, export and battery where devices are silent, double or alone; None is not known."""
        u = None
        rows = (
            ("HomeKit 1000 with a silent inverter", [kit1000(2000, 500), dns(1990, **SILENT)], 2000, 1500, 500, u),
            ("silent beside a live inverter", [kit1000(2000, 500, **SILENT), dns(1990)], 1990, u, u, u),
            ("silent beside a hybrid with its own meter", [kit1000(1, 2, **SILENT), hybrid(900, -100, 300, 500)], 900, 500, 300, -100),
            ("HomeKit 3000 with a silent inverter", [kit3000(-700), dns(1000, **SILENT)], u, u, -700, u),
            ("two inverters", [dns(1000), dns(500)], 1500, u, u, u),
            ("two inverters, one silent", [dns(1000), dns(500, **SILENT)], u, u, u, u),
            ("two HomeKit 1000s", [kit1000(1000, 100), kit1000(500, -200)], 1500, 1600, -100, u),
            ("two HomeKit 1000s, one silent", [kit1000(1000, 100), kit1000(500, -200, **SILENT), dns(9)], u, u, u, u),
            ("a hybrid beside a HomeKit 1000", [kit1000(2000, 500), hybrid(900, -100, 300, 444)], 900, 1500, 500, -100),
            ("a silent hybrid beside a HomeKit 1000", [kit1000(500, 100), hybrid(1, 5, **SILENT)], u, 400, 100, u),
            ("a silent hybrid beside an inverter", [dns(1000), hybrid(1, 5, **SILENT)], u, u, u, u),
            ("a hybrid beside a silent inverter", [dns(1000, **SILENT), hybrid(800, 0, 50)], u, 750, 50, 0),
            ("two hybrids", [hybrid(800, 100, 50, 850), hybrid(200, -50, 25, 125)], 1000, 975, 75, 50),
            ("two hybrids, one meter", [hybrid(800, export=900, load=50), hybrid(200, load=50)], 1000, 100, 900, u),
            ("two hybrids, one silent", [hybrid(800, export=900), hybrid(200, **SILENT)], u, u, 900, u),
            ("a battery charged from the grid, by a HomeKit 1000", [kit1000(-3000, -3300)], 0, 300, -3300, u),
            ("at night", [kit1000(-7, -300), dns(5, **SILENT)], 0, 293, -300, u),
            ("all silent", [kit1000(2000, 500, **SILENT), dns(1990, **SILENT)], u, u, u, u),
            ("before a reading", [of_family("HK1000", {}, fresh=float("-inf"))], u, u, u, u),
            ("nobody", [], u, u, u, u),
        )  # fmt: skip
        for name, devices, *wanted in rows:
            for order in (devices, devices[::-1]):
                with self.subTest(name):
                    found = self.house(order)
                    self.assertEqual([found.get(key) for key in sems.FLOWS[:4]], wanted)
                    self.assertEqual(found.get("grid_watts"), None if wanted[2] is None else -wanted[2])

    # What each device of a house says, by true flows: grid-tied inverter, hybrid's PV, battery and the house's load, in W.

    @staticmethod
    def energy(metric: str, watts: float, hours: float) -> dict:
        """A counter that began at 100 kWh."""
        return {metric: (100_000 + max(watts, 0) * hours) / sems.watt_hours(metric)}

    def grid_says(self, out: float, hours: float) -> dict:
        return {
            "meter_power_export_watts": out,
            **self.energy("meter_energy_export_decawatt_hours_total", out, hours),
            **self.energy("meter_energy_import_decawatt_hours_total", -out, hours),
        }

    def kit_says(self, out: float, given: float, hours: float) -> dict:
        roof = self.energy("meter_energy_generation_decawatt_hours_total", given, hours)
        return {**self.grid_says(out, hours), "meter_power_generation_watts": given, **roof}

    def inverter_says(self, given: float, out: float | None, hours: float) -> dict:
        told = {"inverter_power_output_watts": given, "inverter_string_power_watts": (given * 2, 5)}
        told.update(self.energy("inverter_energy_output_hectowatt_hours_total", given, hours))
        if out is not None:
            told["inverter_meter_power_watts"] = out
            told.update(self.energy("inverter_meter_energy_export_watthours_total", out, hours))
            told.update(self.energy("inverter_meter_energy_import_watthours_total", -out, hours))
        return told

    def hybrid_says(self, solar: float, battery: float | None, load: float, out: float | None, hours: float) -> dict:
        power = solar + (battery or 0)
        told = {
            "inverter_string_power_watts": (solar, 0), "inverter_power_output_watts": power, "inverter_active_power_watts": power - load,
            "inverter_load_watts": 0, "battery_mode": 2 if battery is not None else 0, "battery_power_watts": battery or 0,
            **self.energy("inverter_energy_output_hectowatt_hours_total", solar, hours),
            **self.energy("battery_energy_charge_watthours_total", -(battery or 0), hours), **self.energy("battery_energy_discharge_watthours_total", battery or 0, hours),
        }  # fmt: skip
        return {**told, **(self.grid_says(out, hours) if out is not None else {})}

    def told_house(self, kits: tuple, inverter: str, battery: str, meter: bool, true: dict, store) -> dict:
        """The house's figures from devices that have spoken at midnight and two hours later."""
        made, solar, stored, load = true["made"], true["solar"], true["stored"], true["load"]
        out = made + solar + (stored or 0) - load
        for i in range(0, 121, 30):
            hours, says = i / 60, []
            if 1000 in kits:
                says.append((3, METER, "HK1000", self.kit_says(out, made + solar + (stored or 0), hours)))
            if 3000 in kits:
                says.append((3, "93000HKU00000042", "HK3000", self.grid_says(out, hours)))
            if inverter:
                says.append((1, INVERTER, "GRID", self.inverter_says(made, out if inverter == "CT" else None, hours)))
            if battery:
                told = self.hybrid_says(solar, stored, load, out if meter else None, hours)
                says.append((2, HYBRID, "HYBRID", told))
            for cls, serial, name, told in says:
                ranges = [(register, (word,)) for register, word in sems.register_words(name, told).items()]
                meet(store, frame(cls=cls, serial=serial, ranges=ranges), now=i * 60.0)
            store.look(i * 60.0)
        return sems.house([sems.member(device, store, 7200.0) for device in store.devices.values()])

    def test_every_house(self) -> None:
        """Each combination of devices, by day and by night: each flow and each energy of the house once."""
        kits = ((), (1000,), (3000,), (1000, 3000))
        hybrids = (("", False), ("none", False), ("none", True), ("there", False), ("there", True))
        weather = (
            {"made": 1500, "solar": 2000, "stored": -500, "load": 600},
            {"made": 0, "solar": 0, "stored": 300, "load": 800},
        )
        for kit, inverter, (battery, meter), now in itertools.product(kits, ("", "plain", "CT"), hybrids, weather):
            made = now["made"] if inverter or not battery else 0
            solar, stored = (now["solar"] if battery else 0), now["stored"] if battery == "there" else None
            load, store = now["load"], sems.Store(clock=clock)
            out = made + solar + (stored or 0) - load
            true = {"made": made, "solar": solar, "stored": stored, "load": load}
            found = self.told_house(kit, inverter, battery, meter, true, store)
            with self.subTest(kit=kit, inverter=inverter, battery=battery, meter=meter, now=now):
                grid = bool(kit) or meter or inverter == "CT"  # somebody measures at the grid
                roof = 1000 in kit or bool(inverter) or bool(battery)
                export = out if grid else out - made if battery else None
                wanted = {
                    "generation_watts": made + solar if roof else None,
                    "export_watts": export,
                    "grid_watts": None if export is None else -export,
                    "battery_watts": stored,
                    "house_watts": load if 1000 in kit or battery or roof and grid else None,
                }
                if 1000 in kit and not battery:
                    wanted["generation_watts"] = made
                energy = {
                    "generated": made + solar if roof else None,
                    "imported": max(-out, 0) if grid else None,
                    "exported": max(out, 0) if grid else None,
                    "battery_charged": None if stored is None else max(-stored, 0),
                    "battery_discharged": None if stored is None else max(stored, 0),
                    "used": load if roof and grid else None,
                }
                for word, watts in energy.items():
                    wanted[f"{word}_today_kilowatt_hours"] = watts if watts is None else watts * 2 / 1000
                self.assertEqual({key: found.get(key) for key in wanted}, wanted)
                for key, whole, other in (
                    ("self_sufficiency_percent", energy["used"], energy["imported"]),
                    ("self_consumption_percent", energy["generated"] if energy["used"] else None, energy["exported"]),
                ):
                    self.assertEqual(found.get(key), round(100 * (whole - other) / whole, 1) if whole else None, key)
                grown = {word for word in sems.COUNTED if energy[word] is not None}
                self.assertEqual({word for word in sems.COUNTED if f"{word}_kilowatt_hours" in found}, grown)

    def test_device(self) -> None:
        """A device's keys, whatever its model: those that it knows and no others."""
        energy = {
            "meter_energy_generation_decawatt_hours_total": 57941, "meter_energy_import_decawatt_hours_total": 80155,
            "meter_energy_export_decawatt_hours_total": 27078,
        }  # fmt: skip
        life = {"generated": 579.41, "imported": 801.55, "exported": 270.78}
        battery = {"battery_energy_charge_watthours_total": 780600, "battery_energy_discharge_watthours_total": 633100}
        own = {"inverter_energy_output_hectowatt_hours_total": 20642}
        ct = {
            "inverter_meter_energy_import_watthours_total": 801550,
            "inverter_meter_energy_export_watthours_total": 270780,
        }
        grid = {name: energy[name] for name in energy if "generation" not in name}
        metered = {
            "inverter_power_output_watts": 1051,
            "inverter_meter_power_watts": -40,
            "inverter_string_power_watts#1": 9,
        }
        loads = {"inverter_load_watts": 26, "inverter_string_power_watts#1": 800}
        rows = (
            (kit1000(-7, -300, counters=energy), {"generation_watts": -7, "house_watts": 293, "export_watts": -300, "grid_watts": 300}, life),
            (kit3000(40, counters=grid), {"export_watts": 40, "grid_watts": -40}, {"imported": 801.55, "exported": 270.78}),
            (dns(1051, counters=own), {"generation_watts": 1051}, {"generated": 2064.2}),
            (of_family("GRID", metered, {**own, **ct}), {"generation_watts": 1051, "export_watts": -40, "grid_watts": 40}, {**life, "generated": 2064.2}),
            (
                hybrid(800, 100, 50, 410, counters={**grid, **battery, **own}),
                {"generation_watts": 800, "house_watts": 410, "export_watts": 50, "grid_watts": -50, "battery_watts": 100, "battery_charge_percent": 50},
                {**life, "generated": 2064.2, "battery_charged": 780.6, "battery_discharged": 633.1},
            ),
            (hybrid(800, counters={**own, **battery}), {"generation_watts": 800, "house_watts": 7, "export_watts": 793, "grid_watts": -793}, {"generated": 2064.2}),
            (of_family("HYBRID", loads), {"generation_watts": 800, "house_watts": 26}, {}),
            (of_family("HYBRID", {**loads, "inverter_backup_load_watts": 408}), {"generation_watts": 800, "house_watts": 434}, {}),
        )  # fmt: skip
        for device, flows, lifetime in rows:
            with self.subTest(device.family, flows=flows):
                gained = {f"{word}_today_kilowatt_hours" for word in lifetime}
                lifetime = {f"{word}_kilowatt_hours": number for word, number in lifetime.items()}
                self.assertEqual(sems.member(device, a_store(), NOW).figures, {**flows, **lifetime})
                silent = sems.member(device, a_store(), NOW + 301)
                self.assertEqual(silent.figures, lifetime)
                self.assertEqual(silent.told, {*flows, *lifetime, *gained})

    def test_today(self) -> None:
        """Gains of the day; they stay through silence and go at midnight; an inverter's own count stands in for a day that we did not see begin, if its clock agrees."""
        key, since, seven = "generated_today_kilowatt_hours", "today_since", "2026-03-21T12:00:00"
        with time_zone("UTC0"):
            for name, cls, serial, begin, off, at, wanted, told in (
                # begin: hours after noon of the first reading; off: s of the device's clock; at: hours of the look
                ("a HomeKit", 3, METER, 0, 0, 2, 1.2, seven),
                ("silent", 3, METER, 0, 0, 3, 1.2, seven),
                ("from midnight on", 3, METER, 11.5, 0, 13.5, 1.0, None),
                ("after midnight, and nothing yet", 3, METER, 9, 0, 13, 0, None),
                ("an inverter", 1, INVERTER, 0, 0, 2, 7.8, None),
                ("its clock nearly agrees", 1, INVERTER, 0, 599, 2, 7.8, None),
                ("its clock is wrong", 1, INVERTER, 0, 601, 2, 1.2, seven),
                ("its clock is wrong the other way", 1, INVERTER, 0, -601, 2, 1.2, seven),
                ("from midnight on, the counters", 1, INVERTER, 11.5, 0, 13.5, 1.0, None),
                ("an inverter after midnight", 1, INVERTER, 9, 0, 13, 0, None),
            ):
                with self.subTest(name):
                    store = sems.Store(clock=clock)
                    first = int(begin * 60)
                    for i in range(first, int(at * 60) + 1):
                        if i <= first + 120:
                            count = (i - first) // 10
                            energy = (
                                [(2051, (0, 0, 1000 + 10 * count))]
                                if cls == 3
                                else [(30144, (66 + count, 0, 1000 + count))]
                            )
                            when = minute(i) + timedelta(seconds=off)
                            meet(store, frame(cls=cls, serial=serial, when=when, ranges=energy), now=i * 60.0)
                        store.look(i * 60.0)
                    member = sems.member(only(store), store, at * 3600)
                    self.assertEqual((member.figures.get(key), member.figures.get(since)), (wanted, told))
                    found = sems.house([member])
                    self.assertEqual((found.get(key), found.get(since)), (wanted, told))

    def test_one_window(self) -> None:
        """What is used counts from the time on which all that it is made of count; an inverter that sleeps over midnight counts from there."""
        exported, made = "meter_energy_export_decawatt_hours_total", "inverter_energy_output_hectowatt_hours_total"
        for name, wakes, total, day, off, ct, used, since in (
            # the HomeKit 3000 buys 6 kWh an hour from noon on; the inverter stops at 16:00 and wakes (hours after noon), with these counts
            ("it slept", 19, 102, 2, 0, False, 42.3, None),
            ("it was away, and made more than today", 19, 140, 2, 0, False, 0, "2026-03-22T07:00:00"),
            ("it was away for a jump", 19, 9000, 2, 0, False, 42.1, None),
            ("its CT meter slept too", 19, 102, 2, 0, True, 0, "2026-03-22T07:00:00"),
            ("its clock is wrong", 19, 102, 2, 700, False, 0, "2026-03-22T07:00:00"),
        ):
            with self.subTest(name), time_zone("UTC0"):
                store = sems.Store(clock=clock)
                for i in range(wakes * 60 + 1):
                    grid = [(2057, (0, 0, 500)), (2069, (0, 0, 1000 + 10 * i))]
                    meet(store, frame(serial="93000HKU00000042", when=minute(i), ranges=grid), now=i * 60.0)
                    if i <= 240 or i == wakes * 60:
                        count, today = (total, day) if i > 240 else (100, 9)
                        when = minute(i) + timedelta(seconds=off)
                        solar = [(30144, (today, 0, count)), *([(30197, (0, 5, 0, 6)), (30209, (1,))] if ct else [])]
                        meet(store, frame(cls=1, serial=INVERTER, when=when, ranges=solar), now=i * 60.0)
                    store.look(i * 60.0)
                members = [sems.member(device, store, wakes * HOUR) for device in store.devices.values()]
                found = sems.house_of(store, members, wakes * HOUR)
                self.assertEqual((found["used_today_kilowatt_hours"], found.get("today_since")), (used, since))
                self.assertEqual(found["imported_today_kilowatt_hours"], 42.1)

    def test_used_never_falls(self) -> None:
        """What is used does not fall within its window, though its parts are counted in steps; it begins anew with the window."""
        store, shown_used = sems.Store(clock=clock), []
        steps = (  # minutes after noon; the inverter's output in 100 Wh; export and import in 10 Wh; used and since when
            (0, 1000, 500, 700, 0, "12:00"), (1, 1001, 500, 700, 0.1, "12:00"), (2, 1001, 505, 700, 0.1, "12:00"),
            (3, 1001, 510, 701, 0.1, "12:00"), (4, 1002, 510, 712, 0.22, "12:00"), (719, 1002, 510, 800, 1.1, "12:00"),
            (721, 1002, 510, 801, 0.01, ""),
        )  # fmt: skip
        with time_zone("UTC0"):
            for i, total, exported, imported, used, since in steps:
                store.look(i * 60.0)
                grid = [(2057, (0, 0, exported)), (2069, (0, 0, imported))]
                meet(store, frame(serial="93000HKU00000042", when=minute(i), ranges=grid), now=i * 60.0)
                meet(store, frame(cls=1, serial=INVERTER, when=minute(i), ranges=[(30145, (0, total))]), now=i * 60.0)
                store.look(i * 60.0)
                found = sems.house_of(
                    store, [sems.member(one, store, i * 60.0) for one in store.devices.values()], i * 60.0
                )
                self.assertEqual(
                    (found["used_today_kilowatt_hours"], found.get("today_since", "")[11:16]), (used, since), i
                )

    def test_late_member(self) -> None:
        """The window of a house begins when the last of its devices is there, and with what they all count from then on."""
        store, found = sems.Store(clock=clock), {}
        with time_zone("UTC0"):
            for i in range(61):
                grid = [(2057, (0, 0, 500)), (2069, (0, 0, 700 + 10 * i))]
                meet(store, frame(serial="93000HKU00000042", when=minute(i), ranges=grid), now=i * 60.0)
                if i >= 30:
                    meet(
                        store,
                        frame(cls=1, serial=INVERTER, when=minute(i), ranges=[(30145, (0, 970 + i))]),
                        now=i * 60.0,
                    )
                store.look(i * 60.0)
                found = sems.house_of(
                    store, [sems.member(one, store, i * 60.0) for one in store.devices.values()], i * 60.0
                )
                self.assertEqual("used_today_kilowatt_hours" in found, i >= 30)
        self.assertEqual((found["used_today_kilowatt_hours"], found["today_since"]), (6, "2026-03-21T12:30:00"))
        self.assertEqual((found["imported_today_kilowatt_hours"], found["self_sufficiency_percent"]), (6, 50))

    def test_silent_battery(self) -> None:
        """A hybrid's energies do not change with a packet in which its battery, its meter or all of it is silent."""
        known = {
            35182: (0, 500),
            35184: (2,),
            35191: (0, 5000),
            35206: (0, 700),
            35209: (0, 800),
            36004: (1,),
            36015: (0x4240, 0, 0x4240, 0),
            36025: (0, 5),
        }
        silent = {register: (0,) * len(words) for register, words in known.items()}
        ct = [(30145, (0, 9)), (30195, (0, 5, 0, 600, 0, 700)), (30209, (1,))]
        keys = [key for key in sems.KEYS if key.endswith("hours")]
        for name, words in (("battery", {35182: (0, 0), 35184: (0,)}), ("meter", {36004: (0,)}), ("all", silent)):
            with self.subTest(name):
                store, figures = sems.Store(clock=clock), []
                for i, more in enumerate(({}, words, {})):
                    meet(store, frame(cls=2, serial=HYBRID, when=minute(i), ranges=[*{**known, **more}.items()]))
                    meet(store, frame(cls=1, serial=INVERTER, when=minute(i), ranges=ct))
                    store.look(0.0)
                    found = sems.house([sems.member(one, store, 0.0) for one in store.devices.values()])
                    figures.append({key: found.get(key) for key in keys})
                self.assertEqual(figures, [figures[0]] * 3)
                self.assertGreater(figures[0]["battery_charged_kilowatt_hours"], 0)

    def test_real_frames(self) -> None:
        """The hybrid of the vectors, through the store, at its own time."""
        store, now = a_store(clock=lambda now: datetime(2026, 3, 21, 13, 14, 15).timestamp()), NOW
        data = next(bytes.fromhex(vector["hex"]) for vector in VECTORS if vector["name"] == "ET hybrid with battery")
        store.meet(sems.address(data[: OUT.head], len(data), OUT), data, now)
        store.look(now)
        figures = sems.member(*store.devices.values(), store, now).figures
        wanted = {
            "generation_watts": 949,
            "house_watts": 937 + 736,
            "export_watts": 510,
            "battery_watts": -1,
            "battery_charge_percent": 97.0,
        }
        energies = {
            "generated_today": 48.8,
            "generated": 1353.4,
            "imported": 6472.97,
            "exported": 1122.47,
            "battery_charged": 780.6,
        }
        wanted.update({f"{word}_kilowatt_hours": number for word, number in energies.items()})
        self.assertEqual({key: figures[key] for key in wanted}, wanted)


class HistoryTest(unittest.TestCase):
    """The picture's data: a point a minute of the shown time."""

    def setUp(self, clock=lambda now: now) -> None:
        self.store = a_store(clock)
        self.history = sems.History(self.store)

    def reads(self, now: float, solar: float, export: float) -> None:
        """A HomeKit 1000's reading, and the look once a second."""
        self.store.names["meter"] = kit1000(solar, export, fresh=now)
        self.history.note(now)

    def seen(self, now: float) -> list:
        return [(point.time, *point.watts[:3]) for point in self.history.points(now)]

    def test_points(self) -> None:
        """The first as soon as anything is known, then one a minute, and one for now; sources are positive."""
        for now in (600, 601, 602):
            self.history.note(now)
        self.assertEqual(self.seen(602), [])
        for now in range(605, 730):
            self.reads(now, now, 100)
        wanted = [(605, 605, 505, -100), (660, 660, 560, -100), (720, 720, 620, -100), (729, 729, 629, -100)]
        self.assertEqual(self.seen(729), wanted)
        self.assertEqual(self.seen(729), wanted)

    def test_nobody_looks(self) -> None:
        """Without connections the loop sleeps, and nobody notes: the time in between is a gap, and no level line."""
        self.reads(600, 3000, 0)
        self.reads(8000, 100, 0)
        self.assertEqual(
            [(at, solar) for at, solar, *_ in self.seen(8000)], [(600, 3000), (660, None), (8000, 100), (8000, 100)]
        )

    def test_silence_is_a_gap(self) -> None:
        """Its minutes are there, and nothing is known of them."""
        self.reads(1000, 500, 0)
        for now in range(1000, 2000):
            self.history.note(now)
        self.reads(2000, 7, 7)
        found = self.seen(2010)
        self.assertEqual([row[1] for row in found], [500] * 6 + [None] * 12 + [7])
        self.assertEqual([row[0] for row in found[1:-2]], list(range(1020, 1980, 60)))

    def test_one_of_two_falls_silent(self) -> None:
        """Its flows end when it does, and what does not hang on it goes on."""
        self.store.names["roof"] = dns(1000, fresh=1000)
        self.store.names["grid"] = kit3000(200, fresh=1200)
        for now in range(1200, 1440):
            self.history.note(now)
        found = self.history.points(1440)
        self.assertEqual([point.watts[:3] for point in found], [[1000, 800, -200]] * 2 + [[None, None, -200]] * 4)

    def test_a_day(self) -> None:
        """Nothing older than 24 hours; after a day of silence nothing is left."""
        for minute in range(60 * 30):
            self.reads(60 * minute, minute, 0)
        found = self.seen(60 * minute + 30)
        self.assertEqual((len(found), found[0][0]), (1441, 60 * (minute - 1439)))
        for minute in range(60 * 30, 60 * 55):
            self.history.note(60 * minute)
        self.assertEqual(self.seen(60 * minute), [])

    def test_clock(self) -> None:
        """Points have the shown time; a clock that is set back takes those with it that have not come yet."""
        offset = [1_700_000_040]
        self.setUp(lambda now: now + offset[0])
        for now in range(0, 600, 60):
            self.reads(now, now, 0)
        self.assertEqual([row[0] - offset[0] for row in self.seen(599)], [*range(0, 600, 60), 599])
        offset[0] -= 300
        self.assertEqual([row[1] for row in self.seen(599)], [0, 60, 120, 180, 240, 540])
        offset[0] += sems.DAY + 600
        self.assertEqual([row[1] for row in self.seen(599)], [540, 540])


# ------------------------------------------------------------------------------------- page, picture, Home Assistant

WEB_SETTINGS = sems.serve_settings(["--sems.mode=local"], {})


def seen_of(*devices, now: float = NOW, **more) -> sems.Seen:
    store = a_store(**more)
    store.names.update({(device.kind, device.serial): device for device in devices})
    return sems.see(store, WEB_SETTINGS, now)


def page_of(seen: sems.Seen, points: list | None = None, settings=WEB_SETTINGS) -> str:
    return "".join(sems.html_page(seen, points or [], settings, "192.0.2.7"))


def day_of_points(count: int = 24, gap: tuple = (), battery: bool = True) -> list:
    """A point an hour from a whole one, of a sunny day, and one for now; None is not known."""
    found = []
    for i in range(count + 1):
        solar = max(3000 - 80 * (i - 12) ** 2, 0)
        watts = [None] * 4 if i in gap else [solar, 400, 400 - solar, -100 if battery else None]
        found.append(sems.Point(1.7e9 // 3600 * 3600 + 3600 * i, watts))
    return found


class PageTest(unittest.TestCase):
    """The page for people, as text."""

    def texts(self, page: str) -> str:
        return re.sub(r"\s+", " ", re.sub("<[^>]*>", " ", re.sub("<style>.*?</style>", "", page, flags=re.S)))

    def test_house(self) -> None:
        """The house's flows in words, without a sign; what is not known is not there."""
        rows = (
            (kit1000(2000, 500), "Solar 2,000 W House 1,500 W To the grid 500 W"),
            (kit1000(-7, -300), "Solar 0 W House 293 W From the grid 300 W"),
            (hybrid(800, -250, 300), "Solar 800 W House 250 W To the grid 300 W Into the battery 250 W Battery 50 %"),
            (hybrid(800, 250, 300), "From the battery 250 W"),
            (kit3000(-1), "The house From the grid 1 W"),
            (kit1000(1, 1, **SILENT), "Nothing is known now"),
        )  # fmt: skip
        for device, wanted in rows:
            with self.subTest(wanted):
                self.assertIn(wanted, self.texts(page_of(seen_of(device))))

    def test_order(self) -> None:
        """Portal, house, picture, today, meters, inverters; since when is said once."""
        inverter = of_family("GRID", {"inverter_power_output_watts": 5}, serial=INVERTER)
        inverter.kind, inverter.name = "inverter", ("inverter", "A model", "00000042")
        seen = seen_of(inverter, kit1000(1, 1))
        seen.house.update(imported_today_kilowatt_hours=2.5, today_since="1970-01-01T00:10:00")
        text = self.texts(page_of(seen, day_of_points()))
        parts = ("Local: no portal", "The house", "Power, last 24 hours", "Today since 00:10", "2.5 kWh")
        order = (*parts, "HomeKit 1000", METER, "A model", INVERTER)
        places = [text.find(word) for word in order]
        self.assertEqual(places, sorted(places))
        self.assertGreaterEqual(places[0], 0)
        self.assertEqual(text.count("since"), 1)

    def test_today(self) -> None:
        """What the house used, and how much of it was its own, in rows that are full; what is not known is not there."""
        seen, energies = seen_of(kit1000(1, 1)), {"generated": 12.04, "used": 8, "imported": 1.5, "exported": 5.54}
        battery = {"battery_charged": 3, "battery_discharged": 2.5}
        percent = {"self_sufficiency_percent": 81.25, "self_consumption_percent": 53.99}
        short = "Solar 12.0 kWh Used 8.0 kWh From the grid 1.5 kWh To the grid 5.5 kWh "
        between, ends = (
            "Into the battery 3.0 kWh From the battery 2.5 kWh ",
            "Self-sufficiency 81 % Self-consumption 54 %",
        )
        for words, more, since, wanted, columns in (
            (energies, {}, "2026-03-21T00:00:01", "Today " + short, 4),
            (energies, percent, "2026-03-21T20:43:09", "Today since 20:43 " + short + ends, 6),
            ({**energies, **battery}, percent, "", "Today " + short + between + ends, 4),
        ):
            with self.subTest(wanted):
                today = {f"{word}_today_kilowatt_hours": number for word, number in words.items()}
                page = page_of(seen._replace(house={**today, **more, "today_since": since}))
                self.assertIn(wanted.strip(), self.texts(page))
                self.assertIn(f'class="today" style="--columns:{columns}"', page)

    def test_values(self) -> None:
        """All current values in a table that folds: short names, units and words for people, a quantity once."""
        inverter = {
            "inverter_string_voltage_volts#1": 334.7, "inverter_input_voltage_dc_decivolts": 3347,
            "inverter_string_voltage_volts#2": 0, "inverter_string_current_amperes#2": 0,
            "inverter_power_factor_ratio": 0.985, "inverter_work_mode": 1, "inverter_error_bitmap": 0,
            "inverter_warning_bitmap": 18, "inverter_internal_temperature_decidegrees_celsius": -66,
        }  # fmt: skip
        hybrids = {
            "battery_power_watts#1": -1500, "battery_power_watts#2": 20, "battery_state_of_charge_ratio#1": 0.97,
            "battery_mode#1": 3, "battery_mode#2": 77, "inverter_hybrid_work_mode": 1,
        }  # fmt: skip
        counters = {"inverter_energy_output_hectowatt_hours_total": 20642, "inverter_uptime_hours_total": 1667}
        rows = (
            ("GRID", inverter, counters, {
                "String voltage": "334.7 V", "Power factor": "0.985", "Work mode": "normal", "Errors": "none",
                "Warnings": "0x12", "Internal temperature": "−6.6 °C", "Energy generated": "2,064.2 kWh",
                "Time of operation": "1,667 h",
            }),
            ("HYBRID", hybrids, {}, {
                "Battery power, 1": "−1,500 W", "Battery power, 2": "20 W", "Battery state of charge, 1": "97 %",
                "Battery mode, 1": "charging", "Battery mode, 2": "77", "Work mode": "on grid",
            }),
        )  # fmt: skip
        for family, gauges, counted, wanted in rows:
            with self.subTest(family):
                device = of_family(family, gauges, counted)
                page = page_of(seen_of(device))
                found = dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
                self.assertEqual(found, wanted)
                self.assertIn(f"All values ({len(wanted)})", page)
                self.assertNotIn("<details open", page)

    def test_quantities(self) -> None:
        """A name for every metric that says neither kind nor unit; of a family no two rows are alike."""
        for family in sems.FAMILIES:
            values = {value.series: 1 for value in sems.VALUES[family]}
            rows = sems.table_rows(family, values)
            names = [what for what, _ in rows]
            self.assertEqual(len(names), len(set(names)), family)
            for name in names:
                self.assertRegex(name, r"\A[A-Z][A-Za-z0-9, -]{2,40}\Z")
                self.assertNotRegex(name.lower(), r"deci|centi|_|total|hours|watt|inverter_|\bac\b|\bdc\b")
        kit = [what for what, _ in sems.table_rows("HK1000", dict.fromkeys(sems.one_a_quantity("HK1000"), 1))]
        self.assertIn("Power to the grid", kit)
        self.assertNotIn("Power, channel 1", kit)
        self.assertIn("Power, channel 3", kit)

    def test_states(self) -> None:
        """Reporting, silent, or asleep: an inverter while the roof gives nothing, by a meter or its own last packet."""
        sleeper = {"serial": INVERTER, "fresh": 600.0}
        rows = (
            ([kit1000(-7, -300), dns(1500, **sleeper)], 'class="asleep">asleep'),
            ([kit1000(2500, 300), dns(5, **sleeper)], 'class="bad">silent'),
            ([kit1000(2500, 300), dns(5, serial=INVERTER)], 'class="good">reporting'),
            ([dns(40, **sleeper)], 'class="asleep">asleep'),
            ([dns(1500, **sleeper)], 'class="bad">silent'),
            ([kit1000(0, 0, fresh=600.0)], 'class="bad">silent'),
        )
        for devices, wanted in rows:
            with self.subTest(wanted, first=devices[0].live.gauges):
                for device in devices:
                    device.kind = "meter" if device.family == "HK1000" else "inverter"
                    device.name = (device.kind, *device.name[1:])
                self.assertIn(f"<b {wanted}", page_of(seen_of(*devices)).rpartition("<section>")[2])

    def test_age(self) -> None:
        """How old a device's last packet is."""
        for now, wanted in ((1000.4, "just now"), (1001, "1 second ago"), (1119, "1 minute ago"), (90000, "1 day ago")):
            self.assertIn(f"last packet {wanted}", self.texts(page_of(seen_of(kit1000(1, 1), now=now))))

    def test_hostile_texts(self) -> None:
        """What devices say of themselves is text."""
        device = kit1000(1, 1)
        device.name, device.info["firmware"] = ("meter", "<img src=x onerror=alert(1)>", "x"), "<i>'\""
        device.serial = "<b>\"\\'&lt;</b>xy"
        page = page_of(seen_of(device))
        for bad in ("<img", "<b>", "<i>"):
            self.assertNotIn(bad, page)
        for good in ("&lt;img src=x onerror=alert(1)&gt;", "&lt;b&gt;&quot;\\&#x27;&amp;lt;", "&lt;i&gt;"):
            self.assertIn(good, page)

    def test_no_device(self) -> None:
        """What to do, with this machine's address; no script, nothing from elsewhere; fresh every 30 s, the demo's every 5."""
        page = page_of(seen_of())
        for wanted in ("No device has connected", "now 192.0.2.7", "tcp.goodwe-power.com", "20001", "docker exec"):
            self.assertIn(wanted, page)
        for bad in ("<script", "http:", "https:", "//", "@import"):
            self.assertNotIn(bad, page)
        self.assertEqual(set(re.findall(r"url\((.)", page)), {"#"})
        by_address = argparse.Namespace(**{**vars(WEB_SETTINGS), "upstream": ("198.51.100.7", 20001)})
        self.assertIn("<code>tcp.goodwe-power.com</code>", page_of(seen_of(), settings=by_address))
        settings = argparse.Namespace(**vars(WEB_SETTINGS), refresh=sems.DEMO_REFRESH)
        for seconds, text in ((30, page), (5, page_of(seen_of(), settings=settings))):
            self.assertIn(f'http-equiv="refresh" content="{seconds}"', text)

    def test_portal_state(self) -> None:
        """The portal's state in words, with what waits."""
        for mode, up, waiting, wanted in (
            ("local", None, 0, "Local: no portal"), ("forward", None, 0, "not tried yet"), ("spool", True, 0, "reachable"),
            ("forward", False, 12345, ", 12,345 bytes wait"), ("forward", False, 0, "sems_mitm.py doctor"),
        ):  # fmt: skip
            text = sems.portal_state({"mode": mode, "address": "<x>:1", "up": up, "queue_bytes": waiting})
            self.assertIn(wanted, text)
            self.assertNotIn("<x>", text)


class PictureTest(unittest.TestCase):
    """The picture, as a function of points."""

    def paths(self, points: list) -> dict:
        """Class to the path's subpaths, each a list of (minute, W)."""
        svg, found = sems.picture(points, {}), {}
        for css, path in re.findall(r'<path class="([\w ]+)" d="(M[^"]*)"/>', svg.partition("<figcaption>")[0]):
            if css not in ("rule", "zero", "midnight"):
                numbers = ([float(number) for number in part.rstrip("Z").split()] for part in path.split("M")[1:])
                found[css] = [[(x, -y + 0.0) for x, y in zip(part[::2], part[1::2])] for part in numbers]
        return found

    def test_points(self) -> None:
        """Each flow is drawn point for point in minutes and W, sources positive; a gap divides it."""
        points = day_of_points(gap=(3, 4, 20))
        paths = self.paths(points)
        for i, css in enumerate(("solar area", "house", "grid", "battery")):
            wanted = []
            for first, last in ((0, 3), (5, 20), (21, 25)):
                run = [(60.0 * at, float(points[at].watts[i])) for at in range(first, last)]
                run.append((min(60.0 * last, 1440), run[-1][1]))  # until the next point, of which nothing is known
                wanted.append([(run[0][0], 0.0), *run, (run[-1][0], 0.0)] if css == "solar area" else run)
            self.assertEqual(paths[css], wanted)

    def test_what_is_drawn(self) -> None:
        """Only what there is, in the legend too; nothing for a house of which nothing is known."""
        self.assertEqual(sems.picture([], {}), "")
        self.assertEqual(sems.picture([sems.Point(0, [None] * 4)], {"battery_charge_percent": 5}), "")
        svg = sems.picture(day_of_points(battery=False), {"generation_watts": 2000, "grid_watts": 5})
        self.assertIn("Now: Solar 2,000 W; From the grid 5 W.", svg)
        self.assertNotIn("attery", svg)
        self.assertEqual(svg.count("<li>"), 4)
        only_grid = [point._replace(watts=[None, None, -5.0, None]) for point in day_of_points()]
        self.assertEqual(set(self.paths(only_grid)), {"grid"})
        self.assertIn("grid", self.paths([sems.Point(7, [None, None, 5.0, None])]))

    def test_colours(self) -> None:
        """All have the contrast of AA for drawings and large text in both themes; the grid's changes at 0."""

        def brightness(colour: str) -> float:
            parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
            linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
            return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

        for theme in sems.STYLE.split(":root")[1:]:
            colours = dict(re.findall("--([a-z]+):(#[0-9a-f]{3,6})", theme))
            card = brightness(colours["card"].replace("#fff", "#ffffff"))
            for names, contrast in (("ink dim good bad", 4.5), ("solar house bought sold battery", 3)):
                for name in names.split():
                    low, high = sorted((card, brightness(colours[name])))
                    self.assertGreaterEqual((high + 0.05) / (low + 0.05), contrast, name)
        svg = sems.picture(day_of_points(), {})
        self.assertEqual(len(set(re.findall('<stop offset="([0-9.]+)"', svg))), 1)

    def test_power_axis(self) -> None:
        """Round steps, 0 among them, all powers within."""
        bounds = ((0, 0), (0, 1), (-7, 0), (0, 12_345), (-2500, 2999), (-0.5, 0.2), (-9e6, 3), (100, 200), (-200, -100))
        for low, high in bounds:
            with self.subTest(low=low, high=high):
                axes = sems.axes_of([sems.Point(0, [float(low), float(high), None, None])])
                self.assertTrue(axes.low <= low and high <= axes.high and axes.low <= 0 <= axes.high)
                self.assertIn(f"{axes.step:e}"[0], "125")
                self.assertTrue(1 <= round((axes.high - axes.low) / axes.step) <= 9)

    def test_time_axis(self) -> None:
        """From the first reading to now, nothing beyond; whole hours of local time, wherever that is; midnight by its date."""
        for zone in ("UTC", BERLIN, "ACST-9:30ACDT,M10.1.0,M4.1.0/3", "NPT-5:45", "PST8PDT,M3.2.0,M11.1.0"):
            with self.subTest(zone), time_zone(zone):
                for length in (1, 600, 3599, 7199, 20_000, 86_400):
                    for begin in range(1774_740_000, 1774_760_000, 1717):
                        axes = sems.axes_of([sems.Point(begin, [1.0] * 4), sems.Point(begin + length, [1.0] * 4)])
                        self.assertTrue(begin - 60 < axes.left <= begin and axes.right == begin + length)
                        hours = sems.whole_hours(axes)
                        self.assertTrue(all(hour.minute == hour.second == 0 for hour in hours))
                        self.assertTrue(all(axes.left <= hour.timestamp() <= axes.right for hour in hours))
                        self.assertTrue(length // 3600 // 4 - 1 <= len(hours) <= 9, (length, hours))
                        labels = "".join(sems.time_texts(axes, hours))
                        texts = re.findall('class="(.*?)" .*?>(.*?)<', labels)
                        self.assertGreaterEqual(len(texts), 2)
                        places = re.findall('x="([0-9.]+)%" y="100.0%" class="time(?: midnight)?"', labels)
                        gaps = [float(one) - float(other) for one, other in zip(places[1:], places)]
                        self.assertTrue(len(hours) < 2 or min(gaps) > 17, "labels would overlap on a phone")
                        dates = [text for css, text in texts if css == "time midnight"]
                        nights = [f"{hour.day} {hour:%b}" for hour in hours if not hour.hour]
                        self.assertTrue(dates == nights or len(hours) < 2 and not dates)
                        if length == 86_400:
                            self.assertGreaterEqual(len(dates), 1)

    def test_browser(self) -> None:
        """A browser draws it: there is ink in each quarter of the picture, and the page does not scroll sideways."""
        chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        if not chromium:
            self.skipTest("no chromium")
        for width in (375, 1280):
            with self.subTest(width), tempfile.TemporaryDirectory() as path:
                boxes = self.boxes(chromium, path, width)
                left, right, top, bottom = boxes["svg"][0]
                size = {name: (box[0][1] - box[0][0], box[0][3] - box[0][2]) for name, box in boxes.items()}
                self.assertLessEqual(boxes["wide"][0][0], width)
                self.assertGreater(min(size["area"][0], size["house"][0]), (right - left) * 0.95)
                self.assertGreater(size["area"][1], (bottom - top) * 0.4)
                self.assertGreater(size["grid"][1], size["area"][1] * 0.9)
                in_plot = [box for box in boxes["levels"] if box[1] > left or box[0] < 0]
                hours = sorted(box for box in boxes["times"] if box[1] > box[0])
                self.assertEqual(in_plot + [box for box in hours if box[2] < bottom], [], "labels within the plot")
                self.assertTrue(all(one[1] < other[0] for one, other in zip(hours, hours[1:])), f"overlap: {hours}")

    def boxes(self, chromium: str, path: str, width: int) -> dict:
        """The boxes (left, right, top, bottom) of the picture's parts on a page of this width, by a script in the frame's page."""
        parts = {
            "area": "path.area",
            "grid": "path.grid",
            "house": "path.house",
            "levels": "text.level",
            "times": "text.time",
        }
        wanted = {**{name: f"figure {css}" for name, css in parts.items()}, "svg": "figure>svg"}
        script = (
            "const d=f.contentDocument,b=s=>[...d.querySelectorAll(s)].map(e=>{const r=e.getBoundingClientRect();"
            "return [r.left,r.right,r.top,r.bottom].map(Math.round)});document.title=JSON.stringify("
            f"Object.assign({{wide:[[d.documentElement.scrollWidth,0,0,0]]}},...Object.entries({json.dumps(wanted)}).map(([n,s])=>({{[n]:b(s)}}))))"
        )
        page = page_of(seen_of(hybrid(800, -250, 300)), day_of_points())
        frame = f'<iframe id="f" src="page.html" width="{width}" height="900" onload="{html.escape(script)}"></iframe>'
        for name, text in (("page", page), ("frame", frame)):
            with open(os.path.join(path, f"{name}.html"), "w", encoding="utf-8") as file:
                file.write(text)
        flags = "headless no-sandbox disable-gpu dump-dom allow-file-access-from-files disable-background-networking"
        command = [chromium, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={path}/data"]
        answer = subprocess.run([*command, f"file://{path}/frame.html"], capture_output=True, timeout=90)
        return json.loads(html.unescape(re.search(rb"<title>(.*?)</title>", answer.stdout)[1].decode()))


class HomeAssistantTest(unittest.TestCase):
    """The package: every scalar a JSON string, and nothing in it that the network said, but cut text."""

    def sensors(self, text: str) -> dict:
        """The sensors of a package by unique_id, read strictly."""
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        head = r'rest:\n  - resource: "http://[^"\\]+/api/household"\n    scan_interval: 60\n    sensor:'
        self.assertRegex("\n".join(lines[:4]), rf"\A{head}\Z")
        found: list = []
        for row in lines[4:]:
            indent, name, value = re.fullmatch(r'(      - |        )(\w+): (".*"|\["today_since"\])', row).groups()
            found += [{}] if "-" in indent else []
            found[-1][name] = json.loads(value)
        self.assertEqual(len({sensor["unique_id"] for sensor in found}), len(found))
        return {sensor["unique_id"]: sensor for sensor in found}

    def a_roof(self) -> list:
        """A meter and a sleeping inverter."""
        energy = {"meter_energy_generation_decawatt_hours_total": 1, "meter_energy_import_decawatt_hours_total": 2}
        meter = kit1000(5, 5, counters=energy)
        roof = dns(5, counters={"inverter_energy_output_hectowatt_hours_total": 7}, serial=INVERTER, **SILENT)
        roof.kind, roof.name = "inverter", ("inverter", "GW3000-DNS-30", "00000042")
        return [meter, roof]

    def package(self, *devices) -> str:
        with time_zone("UTC"):
            return sems.home_assistant(seen_of(*devices), "192.0.2.7:14028")

    def test_package(self) -> None:
        """A sensor for each key that a device or the house knows when nobody sleeps, with what Home Assistant needs."""
        seen = seen_of(*self.a_roof())
        found, left_out = self.sensors(self.package(*self.a_roof())), {"export_watts", "today_since"}
        of_devices = {f"{device.serial}_{key}" for device in seen.devices for key in device.member.told - left_out}
        self.assertEqual({name for name in found if not name.startswith("house")}, of_devices)
        self.assertLessEqual({f"house_{key}" for key in seen.house.keys() - left_out}, set(found))
        self.assertIn("house_grid_watts", found)
        self.assertEqual(found[f"{METER}_generation_watts"]["name"], "HomeKit 1000 solar power")
        self.assertEqual(found["house_house_watts"]["name"], "House power")
        for key, sensor in found.items():
            owner, _, word = key.partition("_")
            counting = "total" if owner == "house" and "_today_" not in key else "total_increasing"
            wanted = {
                "watts": ("power", "measurement", "W"),
                "hours": ("energy", counting, "kWh"),
                "percent": (None, "measurement", "%"),
            }
            fields = ("device_class", "state_class", "unit_of_measurement")
            self.assertEqual(tuple(sensor.get(name) for name in fields), wanted[word.rpartition("_")[2]])
            self.assertRegex(sensor["icon"], r"\Amdi:[a-z-]+\Z")
            for name in ("value_template", "availability"):
                self.assertRegex(sensor[name], rf"\A\{{\{{ .*'{owner}'.*'{word}'.* \}}\}}\Z")
                self.assertIn("value_json is mapping", sensor[name])
            self.assertEqual("json_attributes" in sensor, "_today_" in key)
            path = f"$['{owner}']" if owner == "house" else f"$['devices']['{owner}']"
            self.assertEqual(sensor.get("json_attributes_path", path), path)

    def test_night(self) -> None:
        """A HomeKit 3000 beside a sleeping inverter: the house's power is not known now, and has its sensor for the day."""
        devices = kit3000(-250), dns(5, serial=INVERTER, **SILENT)
        self.assertEqual(seen_of(*devices).house, {"export_watts": -250, "grid_watts": 250})
        self.assertLessEqual({"house_house_watts", "house_generation_watts"}, set(self.sensors(self.package(*devices))))

    def test_restart(self) -> None:
        """Inverters that come back one by one after a restart add nothing that was not made to the house's energy."""
        counted = [{"inverter_energy_output_hectowatt_hours_total": number} for number in (50_000, 70_000)]
        both = [dns(9, counters=counters, serial=f"53000DSC0000004{i}") for i, counters in enumerate(counted)]
        key, added = "generated_kilowatt_hours", {"total": 0.0, "total_increasing": 0.0}
        states = [seen_of(*devices).house[key] for devices in (both, both[:1], both)]
        for before, after in zip(states, states[1:]):  # how Home Assistant's statistics add up the two classes
            added["total"] += after - before
            added["total_increasing"] += after if after < before else after - before
        self.assertEqual(added, {"total": 0, "total_increasing": 5000 + 7000})
        self.assertEqual(self.sensors(self.package(*both))[f"house_{key}"]["state_class"], "total")

    def test_comments(self) -> None:
        """Which devices are in it, known when, which sensor goes where in the Energy dashboard, what counts the same twice."""
        comments = [line for line in self.package(*self.a_roof()).splitlines() if line.startswith("#")]
        for wanted in (
            f"#     HomeKit 1000, {METER}",
            f"#     GW3000-DNS-30, {INVERTER}",
            "#     Grid, energy imported from the grid: HomeKit 1000 energy from the grid",
            "#     Grid, power (positive is bought: the standard direction): House grid power",
            "#     Solar panels, energy: HomeKit 1000 solar energy",
            "#     Solar panels, power: House solar power",
            "# HomeKit 1000 and GW3000-DNS-30 count the same roof: take only the energies of HomeKit 1000 there.",
        ):
            self.assertIn(wanted, comments)
        self.assertIn("known on 1970-01-01 at 00:16", comments[0])
        self.assertIn("rest.reload", "".join(comments))
        self.assertNotIn("Battery", "".join(comments))

    def test_names(self) -> None:
        """Models that are alike get the end of their serial numbers; hostile ones are cut or left out."""
        rows = (
            ((METER, "{{ states }}"), "states"), (("5300\"DSC00000042", "x"), None), (("53000dsc00000042", "x"), None),
            ((OTHER, "A'\n\\\"<b>{%x%}#: é"), "A b x"), (("91000HKU00000044", "{{}}"), "meter"),
            (("93000HKU00000045", "Alike (1.5/2+3-4)"), "Alike (1.5/2+3-4) 00000045"),
            (("93000HKU00000046", "Alike (1.5/2+3-4)"), "Alike (1.5/2+3-4) 00000046"),
        )  # fmt: skip
        devices = []
        for (serial, model), _ in rows:
            devices.append(kit3000(1, serial=serial))
            devices[-1].name = ("meter", model, serial[-8:])
        text = sems.home_assistant(seen_of(*devices), "h:1")
        found = [sensor["name"] for key, sensor in self.sensors(text).items() if not key.startswith("house")]
        self.assertEqual(found, [f"{name} grid power" for _, name in rows if name])
        self.assertNotRegex("".join(line for line in text.splitlines() if line.startswith("#")), '[{}<>"]')

    def test_nobody(self) -> None:
        """No device yet: no package, but a text that says so."""
        nobody = of_family("GRID", {}, fresh=float("-inf"))
        for devices in ((), (nobody,), (kit3000(1, serial="<b>45678901234567"[:16]),)):
            with self.assertRaisesRegex(LookupError, "No device is known yet"):
                sems.home_assistant(seen_of(*devices), "h:1")

    def test_templates(self) -> None:
        """Home Assistant's templates, by jinja2 where it is: no error, whatever the exporter answers."""
        try:
            import jinja2
        except ImportError:
            self.skipTest("no jinja2")
        found = self.sensors(self.package(*self.a_roof()))
        made = jinja2.Environment(undefined=jinja2.StrictUndefined)
        answer = {"house": {"house_watts": 0}, "devices": {METER: {"generation_watts": 5}}}
        for key, sensor in found.items():
            known = {"house_house_watts": "0", f"{METER}_generation_watts": "5"}.get(key)
            for given in ({}, {"value_json": None}, {"value_json": []}, {"value_json": {}}, {"value_json": answer}):
                value, there = (
                    made.from_string(sensor[name]).render(given) for name in ("value_template", "availability")
                )
                is_known = known is not None and given.get("value_json") is answer
                self.assertEqual((value, there), (known, "True") if is_known else ("None", "False"))


# ------------------------------------------------------------------------------------------------------------ HTTP


class HttpTest(SocketCase):
    """/metrics, the page, the API and their neighbours, over a socket."""

    def setUp(self) -> None:
        super().setUp()
        self.running = self.exporter(None, "--sems.mode=local")

    def raw(self, data: bytes, step: int = 0) -> bytes:
        """What comes back for bytes of our own, to the end; step: so many at a time."""
        client = self.running.client()
        for at in range(0, len(data), step or len(data)):
            client.send(data[at : at + (step or len(data))])
        return client.rest()

    def closed(self) -> float:
        return self.running.value("sems_mitm_http_closed_connections_total")

    def test_routes(self) -> None:
        """Each path has its type, HEAD its headers alone; else 404, 405; one request a connection, with its length."""
        text, data = "text/plain; charset=utf-8", "application/json"
        rows = (
            ("/metrics", 200, "text/plain; version=0.0.4; charset=utf-8", "# HELP"),
            ("/", 200, "text/html; charset=utf-8", "<!doctype html>"), ("/?x", 200, "text/html; charset=utf-8", "<!doctype html>"),
            ("/api/devices", 200, data, '{"devices": []'), ("/api/household", 200, data, '{"house": {}, "devices": {}}'),
            ("/home-assistant.yaml", 503, text, ""), ("/-/healthy", 200, text, ""), ("/-/ready", 200, text, ""),
            ("/nothing", 404, text, ""), ("/metrics/", 404, text, ""), ("//", 404, text, ""), ("/../etc/passwd", 404, text, ""),
            ("/api", 404, data, "{}"), ("/api/", 404, data, "{}"), ("/api/x", 404, data, "{}"), ("/apix", 404, text, ""),
        )  # fmt: skip
        for path, status, kind, start in rows:
            with self.subTest(path):
                got, headers, body = self.running.get(path)
                self.assertEqual((got, headers["Content-Type"], headers["Connection"]), (status, kind, "close"))
                self.assertTrue(body.decode().startswith(start), body[:99])
                self.assertEqual(len(body), int(headers["Content-Length"]))
                self.assertIn("default-src 'none'", headers["Content-Security-Policy"])
                self.assertIsNone(headers["Server"])
                if kind == data:
                    json.loads(body)
                head = self.raw(f"HEAD {path} HTTP/1.1\r\n\r\n".encode())
                self.assertTrue(head.endswith(b"\r\n\r\n") and head.startswith(b"HTTP/1.0 %d " % status), head)
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW", "get"):
            with self.subTest(method):
                answer = self.raw(f"{method} /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\nname=data".encode())
                self.assertTrue(answer.startswith(b"HTTP/1.0 405 "), answer[:60])
                self.assertIn(b"Allow: GET, HEAD", answer)

    def test_forms_of_a_request(self) -> None:
        """Whole and byte by byte: absolute targets, empty lines before, bare line feeds, HTTP/0.9, more than one request."""
        for name, request, status in (
            ("plain", b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n", 200), ("1.0", b"GET /-/healthy HTTP/1.0\r\n\r\n", 200),
            ("absolute", b"GET http://host:1/-/healthy HTTP/1.1\r\n\r\n", 200), ("absolute, in capitals", b"GET HTTP://host/-/healthy HTTP/1.1\r\n\r\n", 200),
            ("absolute, with a query", b"GET http://host/-/healthy?x HTTP/1.1\r\n\r\n", 200), ("absolute, the page", b"GET http://host HTTP/1.1\r\n\r\n", 200),
            ("absolute, elsewhere", b"GET ftp://host/-/healthy HTTP/1.1\r\n\r\n", 404), ("an empty line before", b"\r\nGET /-/healthy HTTP/1.1\r\n\r\n", 200),
            ("bare line feeds", b"GET /-/healthy HTTP/1.1\nHost: x\n\n", 200), ("0.9", b"GET /-/healthy\r\n", 200),
            ("three at once", b"GET /-/healthy HTTP/1.1\r\nConnection: keep-alive\r\n\r\n" * 3, 200), ("2.0", b"GET / HTTP/2.0\r\n\r\n", 505),
        ):  # fmt: skip
            for step in (0, 1):
                if not (step and name == "three at once"):
                    with self.subTest(name, step=step):
                        answer = self.raw(request, step)
                        self.assertEqual(answer.count(b"HTTP/1.0 %d " % status), 1, answer[:200])

    def test_ready(self) -> None:
        """Ready until the exporter stops; --web.telemetry-path moves the metrics."""
        running = self.exporter(None, "--sems.mode=local", "--web.telemetry-path=/solar")
        self.assertEqual([running.get(path)[0] for path in ("/solar", "/metrics", "/-/ready")], [200, 404, 200])
        self.assertIn(b'href="/solar"', running.get("/")[2])
        running.loop.is_stopping = True
        with contextlib.suppress(OSError, http.client.HTTPException):
            self.assertEqual(running.get("/-/ready")[0], 503)

    def test_api(self) -> None:
        """/api/devices and /api/household: names, places and figures."""
        self.running.device(frame()).packets(1)
        answer = json.loads(self.running.get("/api/devices")[2])
        self.assertLessEqual({"devices", "upstream", "blocked"}, set(answer))
        self.assertEqual(answer["upstream"], {"mode": "local", "address": "", "up": None, "queue_bytes": 0})
        (device,) = answer["devices"]
        name = {"device": "meter", "model": "HomeKit 1000 Smart Meter", "serial": METER[-8:], "full_serial": METER, "up": True}  # fmt: skip
        flows = {"generation_watts": 2600, "export_watts": 1500, "house_watts": 1100, "grid_watts": -1500}
        self.assertEqual({key: device[key] for key in (*name, *flows)}, {**name, **flows})
        self.assertEqual([device[key] for key in ("firmware", "module_firmware", "portal")], [""] * 3)
        self.assertEqual(device["values"]["meter_voltage_volts_channel_1"], 240.0)
        self.assertLess(device["age_seconds"], PATIENCE)
        small = json.loads(self.running.get("/api/household")[2])
        self.assertEqual({key: small["house"][key] for key in flows}, flows)
        figures = {key: number for key, number in device.items() if key in (*sems.KEYS, "today_since")}
        self.assertEqual(small["devices"], {METER: figures})
        brief = self.exporter(None, "--sems.mode=local", "--metrics.stale-after=1s")
        brief.device(frame()).packets(1)
        silent = until(lambda: [one for one in json.loads(brief.get("/api/devices")[2])["devices"] if not one["up"]])[0]
        self.assertFalse(set(flows) & set(silent))
        self.assertNotIn("meter_power_export_watts", silent["values"])

    def test_host(self) -> None:
        """The package names the address that the client used, if that is a plain one."""
        self.running.device(frame()).packets(1)
        own = f"{LOCAL}:{self.running.web_port}"
        rows = (
            ("raspberrypi.local:14028", "raspberrypi.local:14028"), ("192.0.2.7:1", "192.0.2.7:1"), ("[2001:db8::1]:2", "[2001:db8::1]:2"),
            ("sems_mitm:14028", "sems_mitm:14028"), ("a" * 300, own), ("", own), ('x"y', own), ("{{ states }}", own), ("x\ty", own),
            ("a:1:2", own), ("u@h:1", own), ("h:123456", own), ("x\r\n y", own), ("h/../", own), ("é", own),
        )  # fmt: skip
        for host, wanted in rows:
            with self.subTest(host):
                answer = self.raw(b"GET /home-assistant.yaml HTTP/1.1\r\nHost: %s\r\n\r\n" % host.encode("latin-1"))
                self.assertIn(f'resource: "http://{wanted}/api/household"'.encode(), answer)

    def test_gzip(self) -> None:
        """Packed where asked for, and only there."""
        rows = (
            ("gzip", True), ("deflate, gzip;q=0.5", True), ("*", True), ("GZIP ; q=1", True), ("gzip;q=0", False),
            ("gzip;q=0.000, *", False), ("identity", False), ("", False), ("*;q=0", False), ("gzip; q=0", False),
        )  # fmt: skip
        for accepted, packed in rows:
            with self.subTest(accepted):
                _, headers, body = self.running.get("/metrics", **{"Accept-Encoding": accepted})
                self.assertEqual(headers["Content-Encoding"] == "gzip", packed)
                self.assertIn("Accept-Encoding", headers["Vary"])
                plain = gzip.decompress(body) if packed else body
                self.assertTrue(plain.startswith(b"# HELP") and plain.endswith(b"\n"))

    def test_long_head(self) -> None:
        """A request's head is bounded as a whole, and read in no time."""
        for head in (b"X: %s\r\n" % (b"x" * 1000) * 20, b"X: " + b"x" * 20_000, b"A: b\r\n" * 300 + b"\r\n"):
            self.assertIn(b" 431 ", self.raw(b"GET / HTTP/1.1\r\n" + head))
        begin = time.thread_time()
        self.running.get("/metrics", **{"Accept-Encoding": f"gzip{' ' * 12_000}x"})
        self.assertLess(time.thread_time() - begin, 1)

    def test_time_outs(self) -> None:
        """A head that is not complete in time, also one that goes on byte by byte, and an answer that is not taken, end the connection."""
        self.limits(HTTP_HEAD_TIMEOUT=0.3, HTTP_ANSWER_TIMEOUT=0.3)
        self.patch(sems, "exposition", lambda pages: ["x" * (4 << 20)])
        silent, slow = self.running.client(b"GET / HTT"), self.running.client(b"GET / HTT")
        reader = self.running.client(b"GET /metrics HTTP/1.0\r\n\r\n", 2048)

        def is_closed() -> bool:
            with contextlib.suppress(OSError):
                slow.send(b"P")
                return not slow.silent(0.01)
            return True

        until(is_closed)
        self.assertEqual(silent.rest(), b"")
        until(lambda: not self.running.web.clients)
        self.assertLess(len(reader.rest()), 4 << 20)

    def test_one_connection_too_many(self) -> None:
        """The one that has gone longest without completing its request is closed, and counted; one that goes makes room."""
        self.limits(HTTP_CONNECTIONS=16)
        held = [self.running.client() for _ in range(16)]
        until(lambda: len(self.running.web.clients) == 16)
        self.assertEqual(self.running.get("/-/healthy")[0], 200)
        self.assertEqual(held.pop(0).rest(), b"")
        self.assertTrue(all(peer.silent(0) for peer in held))
        self.assertEqual(self.closed(), 1)
        held.pop().close()
        until(lambda: len(self.running.web.clients) == 14)
        self.assertEqual(self.closed(), 1)

    def test_answers_that_nobody_reads(self) -> None:
        """Slow readers hold up nobody, what waits for them is bounded, and the newest gets its answer whole."""
        text = "x" * (3 << 20)
        self.patch(sems, "exposition", side_effect=lambda pages: [text])
        slow = [self.running.client(b"GET /metrics HTTP/1.1\r\n\r\n", 2048) for _ in range(8)]
        until(lambda: not any(peer.silent(0) for peer in slow))
        self.assertEqual(self.running.get("/-/healthy")[0], 200)
        self.running.device(frame()).packets(1)
        self.assertLessEqual(sum(client.waiting for client in list(self.running.web.clients)), sems.HTTP_ANSWERS)
        head, _, body = slow[-1].rest().partition(b"\r\n\r\n")
        self.assertEqual(body, text.encode())
        self.assertIn(b"Content-Length: %d\r\n" % len(text), head)

    def test_error_of_our_own(self) -> None:
        """It ends the request with 500, is counted and logged; the next request is served."""
        self.faults = 1
        with mock.patch.object(sems, "see", side_effect=ZeroDivisionError("made")):
            self.assertEqual(self.running.get("/api/devices")[0], 500)
            self.assertEqual(self.running.get("/api/household")[0], 500)
        self.assertEqual(self.running.get("/api/devices")[0], 200)
        self.assertEqual(self.running.value("sems_mitm_internal_errors_total"), 2)
        self.assertIn("an HTTP request", self.tracebacks()[0])

    def test_no_name_service(self) -> None:
        """No name is looked up, neither at the start nor for a request."""
        for name in ("getfqdn", "gethostbyaddr", "getnameinfo", "gethostbyname"):
            self.patch(socket, name, side_effect=AssertionError("asked"))
        running = self.exporter(None, "--sems.mode=local", "--log.level=debug")
        self.assertEqual((running.get("/")[0], running.get("/nothing")[0]), (200, 404))

    def test_garbage(self) -> None:
        """Whatever is sent, the answer is an error or the end, nothing is a traceback, and the process serves on."""
        process = self.process("--sems.mode=local", *PORTS, "--log.level=debug")
        chance = random.Random(11)
        words = (
            b"GET", b"HEAD", b"POST", b" ", b"/", b"/metrics", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/9", b"HTTP/-1.1", b"\r\n", b"\n", b"\0",
            b"\xff\xfe", b"Host: x", b": ", b"%00", b"?a=b", b"\t", b"Content-Length: -1", b"Accept-Encoding: gzip;q=x", b"a" * 300,
            b"http://[::1/", b"Host: [::1",
        )  # fmt: skip
        rows = [
            b"\r\n\r\n", b"GET\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET / HTTP/1.1.1\r\n\r\n", b"GET / X\r\n\r\n",
            b"GET / HTTP/9999999999999.1\r\n\r\n", b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300,
            b"\0" * 1000 + b"\r\n\r\n", b"GET /\0 HTTP/1.1\r\nA\0: \0\r\n\r\n", b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(200),
            b"\xff" * 300 + b"\r\n\r\n", b"GET //// HTTP/1.1\r\n : x\r\n\r\n", b"GET / HTTP/1.1\r\nAccept-Encoding: \xff\xff\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nxx", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(),
            b"GET / HTTP/1.1\r\nExpect: 100-continue\r\n\r\n", b"GET /%ff%00 HTTP/1.1\r\n\r\n", b"\xc2\x85GET / HTTP/1.1\r\n\r\n",
            b"GET \xe2\x80\xa8 HTTP/1.1\r\n\r\n", b"GET  HTTP/1.1\r\n\r\n", b"GET http:// HTTP/1.1\r\n\r\n",
        ]  # fmt: skip
        rows += [b"".join(chance.choice(words) for _ in range(chance.randint(1, 12))) + b"\r\n\r\n" for _ in range(150)]
        for row in rows:
            client = connected(process.web_port)
            with contextlib.suppress(ConnectionError):
                client.send(row)
                client.no_more()
            answer = client.rest()
            client.close()
            self.assertTrue(not answer or re.match(rb"HTTP/1\.0 (200|4\d\d|505) ", answer), (row, answer[:80]))
        self.assertEqual(process.get("/-/healthy")[0], 200)
        self.assertEqual(process.value("sems_mitm_internal_errors_total"), 0)
        self.assertNotIn("Traceback", process.stderr())


# ---------------------------------------------------------------------------------------------------- command line


def written(directory: str, *frames: bytes, name: str = "capture") -> str:
    """A capture file of a device's frames."""
    path = os.path.join(directory, name)
    with open(path, "w") as file:
        file.writelines(sems.capture_line(0, "127.0.0.1:1", "outbound", "forwarded", data) for data in frames)
    return path


class SettingsTest(SocketCase):
    """Flags, their variables, and what the command line says of them."""

    GOOD = (  # arguments, environment, setting, value
        ("", {}, "mode", "forward"),
        ("", {}, "log_level", "info"),
        ("", {"SEMS_MODE": "spool"}, "mode", "spool"),
        ("", {"SEMS_MODE": ""}, "mode", "forward"),
        ("--sems.mode=local", {"SEMS_MODE": "spool"}, "mode", "local"),
        ("--sems.mode local --sems.mode spool", {}, "mode", "spool"),
        ("", {"SEMS_PASSTHROUGH": "no"}, "mode", "local"),
        ("--sems-passthrough", {"SEMS_PASSTHROUGH": "no"}, "mode", "forward"),
        ("--sems-passthrough=false", {}, "mode", "local"),
        ("--no-sems-passthrough", {}, "mode", "local"),
        ("--sems.mode=forward --no-sems-passthrough", {}, "mode", "forward"),
        ("", {"BATSIGNAL": "1"}, "batsignal", True),
        ("--no-batsignal", {"BATSIGNAL": "1"}, "batsignal", False),
        ("", {"DEBUG": "true"}, "log_level", "debug"),
        ("", {"DEBUG": "true", "LOG_LEVEL": "warning"}, "log_level", "warning"),
        ("--debug", {"LOG_LEVEL": "warning"}, "log_level", "debug"),
        ("--log.level=WARNING", {"DEBUG": "yes"}, "log_level", "warning"),
        ("--metrics.stale-after=1h30m", {"METRICS_STALE_AFTER": "5m"}, "stale_after", 5400),
        ("--sems.listen-address=[::1]:7", {}, "listen_address", ("::1", 7)),
        ("", {"WEB_LISTEN_ADDRESS": "127.0.0.1:0"}, "web_address", ("127.0.0.1", 0)),
        ("--sems.upstream-dns=9.9.9.9:54,::1", {}, "upstream_dns", [("9.9.9.9", 54), ("::1", 53)]),
        ("--sems.upstream-dns=none", {}, "upstream_dns", []),
        ("--sems.capture -x", {}, "capture", "-x"),
        ("--sems.capture=", {"SEMS_CAPTURE": "there"}, "capture", ""),
        ("", {"SEMS_MODE": "spool", "SEMS_SPOOL_FILE": "/s"}, "spool_file", "/s"),
    )

    def test_good(self) -> None:
        """The command line beats the environment, which beats the defaults; an empty variable is unset."""
        for line, environment, name, value in self.GOOD:
            with self.subTest(line, **environment):
                self.assertEqual(getattr(sems.serve_settings(line.split(), environment), name), value)
        allowed = sems.serve_settings(["--sems.allow-from=10.0.0.1/8,fd00::/8"], {}).allow_from
        self.assertEqual(list(map(str, allowed)), ["10.0.0.0/8", "fd00::/8"])

    def test_debug_of_nonsense(self) -> None:
        """Shells set DEBUG to all sorts of things: ignored with a warning."""
        self.assertEqual(sems.serve_settings([], {"DEBUG": "release*"}).log_level, "info")
        self.assertIn("release*", "".join(self.lines))

    def test_unknown_variables(self) -> None:
        """A SEMS_ variable that no flag has is named in one warning, with the nearest that exists."""
        sems.warn_of_unknown_variables({"SEMS_MODE": "local", "SEMS_MAX_DEVICE": "7", "SEMS_XYZZY": "1", "OTHER": "x"})
        (line,) = self.lines
        for text in ("SEMS_MAX_DEVICE", "SEMS_MAX_DEVICES", "SEMS_XYZZY"):
            self.assertIn(text, line)
        self.lines.clear()
        sems.warn_of_unknown_variables({"SEMS_MODE": "local", "PATH": "x"})
        self.assertEqual(self.lines, [])

    BAD = (  # arguments, environment, what the line on stderr names
        ("--sems.listen-address=nonsense", {}, "--sems.listen-address", "nonsense"),
        ("--sems.upstream=:20001", {}, "--sems.upstream", ":20001"),
        ("--sems.upstream=portal", {}, "--sems.upstream", "portal"),
        ("--sems.upstream-dns=1.1.1.1:x", {}, "--sems.upstream-dns", "1.1.1.1:x"),
        ("--sems.upstream-dns=1.1.1.1,,", {}, "--sems.upstream-dns", "1.1.1.1,,"),
        ("--sems.mode=both", {}, "--sems.mode", "both"),
        ("--sems-passthrough=maybe", {}, "--sems-passthrough", "maybe"),
        ("--sems.allow-from=10.0.0.0/99", {}, "--sems.allow-from", "10.0.0.0/99"),
        ("--sems.max-connections -1", {}, "--sems.max-connections", "-1"),
        ("--sems.spool-file=/s", {}, "--sems.spool-file", "/s", "spool"),
        ("", {"SEMS_SPOOL_FILE": "/s", "SEMS_MODE": "local"}, "--sems.spool-file", "local"),
        ("--web.telemetry-path=/api/household", {}, "--web.telemetry-path", "/api/household"),
        ("--metrics.stale-after -1s", {}, "--metrics.stale-after", "-1s"),
        ("--debug=loud", {}, "--debug", "loud"),
        ("serve --log.level=loud", {}, "--log.level", "loud"),
        ("", {"SEMS_MODE": "both"}, "SEMS_MODE", "both"),
        ("", {"SEMS_PASSTHROUGH": "on"}, "SEMS_PASSTHROUGH", "on"),
        ("", {"METRICS_STALE_AFTER": "soon"}, "METRICS_STALE_AFTER", "soon"),
        ("", {"SEMS_MAX_DEVICES": "\u0663"}, "SEMS_MAX_DEVICES", "u0663"),
        ("", {"WEB_TELEMETRY_PATH": "x\ny"}, "WEB_TELEMETRY_PATH", "x"),
        ("--nothing", {}, "--nothing"),
        ("--sems.mod=local", {}, "--sems.mod"),
        ("--sems.mode", {}, "--sems.mode"),
        ("serve more", {}, "more"),
        ("nothing", {}, "nothing", "doctor"),
        ("decode", {}, "FILE"),
        ("decode xyz", {}, "xyz"),
        ("decode 504", {}, "504"),
        ("backfill", {}, "FILE"),
        ("backfill /nonexistent", {}, "/nonexistent"),
        ("backfill x --label=serial=1", {}, "--label", "serial=1"),
        ("backfill x --label=__name__=1", {}, "--label", "__name__=1"),
        ("doctor --sems.mode=both", {}, "--sems.mode", "both"),
        ("doctor", {"SEMS_MODE": "both"}, "SEMS_MODE", "both"),
        ("metrics more", {}, "more"),
        ("version more", {}, "more"),
        ("--version more", {}, "more"),
        ("demo --nothing", {}, "--nothing"),
    )  # fmt: skip

    def test_bad(self) -> None:
        """Exit code 2 and one line on stderr that names flag or variable and value."""
        for line, environment, *names in self.BAD:
            with self.subTest(line, **environment):
                code, out, err = called(*line.split(), env=environment)
                self.assertEqual((code, out, err.count("\n"), err[-1:]), (2, "", 1, "\n"), err)
                for name in names:
                    self.assertIn(name, err)

    def test_readers(self) -> None:
        """Durations, booleans, endpoints and paths; None is an error."""
        for reader, rows in {
            sems.duration: {"0": 0, "90s": 90, "5m": 300, "1h30m": 5400, "1d": 86400, "1h1m1s": 3661, "": None, "5": None, "1.5h": None, "-5m": None, "m": None, "5m1h": None, "\uff15m": None},
            sems.boolean: {"true": True, "1": True, "yes": True, "No": False, "0": False, "false": False, "": None, "on": None, "2": None},
            sems.listen_endpoint: {"h:1": ("h", 1), ":0": ("", 0), ":65535": ("", 65535), "[::1]:9": ("::1", 9), "[fe80::1%eth0]:9": ("fe80::1%eth0", 9), "h": None, "h:": None, "h:x": None, "[::1]": None, "::1:9": None, "h:65536": None, "[h]:1": None, "a/b:1": None, "u@h:1": None, "h:\uff11": None, "h :1": None},
            sems.portal_endpoint: {"h:1": ("h", 1), "[::1]:9": ("::1", 9), ":1": None, "h:0": None, "h:00": None},
            sems.name_servers: {"none": [], "1.1.1.1, [::1]:54,::2,h": [("1.1.1.1", 53), ("::1", 54), ("::2", 53), ("h", 53)], "h:x": None, "h:0": None, "h,,": None, ",h": None},
            sems.whole_number: {"1": 1, "256": 256, "0": None, "-1": None, "1.0": None, "": None, " 1": None},
            sems.url_path: {"/m": "/m", "/": None, "/m?x": None, "/m#x": None, "/-/ready": None, "/api/devices": None, "/api": "/api", "m": None, "/a b": None},
        }.items():  # fmt: skip
            for text, wanted in rows.items():
                with self.subTest(reader.expected, text=text):
                    try:
                        found = reader(text)
                    except sems.argparse.ArgumentTypeError:
                        found = None
                    self.assertEqual(found, wanted)

    def test_help(self) -> None:
        """The first line says what the program is; each command's help fits a screen, or is in groups."""
        code, out, err = called("--help")
        self.assertEqual((code, err, out.splitlines()[0]), (0, "", sems.__doc__.splitlines()[0]))
        for name in sems.COMMANDS:
            with self.subTest(name):
                self.assertIn(f"\n  {name} ", out)
                code, text, err = called(name, "--help", env={"COLUMNS": "80"})
                self.assertEqual((code, err, text[:6]), (0, "", "usage:"))
                groups = re.split(r"\n\n(?=\w+:\n)", text)
                self.assertLess(max(group.count("\n") for group in groups), 25)
                self.assertLess(text.count("\n"), 80 if name in ("serve", "doctor") else 30)
                self.assertLess(max(map(len, text.splitlines())), 80)
        for command in ("serve", "doctor"):
            text = called(command, "--help")[1]
            for name, *_ in sems.FLAGS:
                self.assertIn(f"--{name}", text)
                self.assertIn(sems.variable(name), text)

    def test_version_and_metrics(self) -> None:
        """version is JSON, by either name; metrics is a table with every metric."""
        for arguments in ("version",), ("--version",):
            code, out, err = called(*arguments)
            self.assertEqual((code, err), (0, ""))
            told = json.loads(out)
            self.assertEqual((told["version"], told["python"]), (sems.VERSION, sys.version.split()[0]))
            self.assertIn("platform", told)
        code, out, err = called("metrics")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual([line.split()[0] for line in out.splitlines()[1:]], [row[0] for row in sems.metric_rows()])
        self.assertEqual(len({line.index(" gauge ") for line in out.splitlines() if " gauge " in line}), 1)

    def test_processes(self) -> None:
        """From outside: exit code and lines of what cannot start, and of a reader that has seen enough."""
        portal = self.portal()
        taken = f"127.0.0.1:{portal.port}"
        holder = self.serving(None, "--sems.mode=spool", TZ="Nowhere/Town")
        holder.ports()
        until(lambda: "TZ=Nowhere/Town is no time zone" in holder.stderr())
        rows = (
            (1, ["--sems.listen-address=" + taken, PORTS[1]], {}, ["--sems.listen-address", taken, "ss -ltnp"]),
            (1, ["--web.listen-address=" + taken, PORTS[0]], {}, ["--web.listen-address", taken, "ss -ltnp"]),
            (1, ["--sems.listen-address=no.such.host.invalid:1", PORTS[1]], {}, ["--sems.listen-address", "no.such"]),
            (1, ["--sems.mode=spool", "--sems.spool-file=/dev/null", *PORTS], {}, ["/dev/null"]),
            (2, ["--log.level=loud"], {}, ["--log.level", "loud"]),
            (2, [], {"SEMS_MODE": "both"}, ["SEMS_MODE", "both"]),
            (1, ["backfill", "/dev/null"], {}, ["/dev/null"]),
        )
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started = [
            subprocess.Popen([sys.executable, sems.__file__, *arguments], env={**os.environ, **environment}, **pipes)
            for _, arguments, environment, _ in rows
        ]
        for process, (code, _, _, names) in zip(started, rows):
            with self.subTest(names), process:
                out, err = process.communicate(timeout=PATIENCE)
                self.assertEqual((process.returncode, out, err.count("\n")), (code, "", 1), err)
                for name in names:
                    self.assertIn(name, err)
        capture = written(self.directory(), *[frame()] * 300)
        rows = (["decode", capture], ["backfill", capture], ["metrics"], ["version"], ["serve", "--help"])
        closed = [self.process(*arguments, TZ="UTC0") for arguments in rows]
        for process in closed:
            process.popen.stdout.close()
        for arguments, process in zip(rows, closed):
            with self.subTest(arguments[0]):
                process.popen.wait(PATIENCE)
                self.assertNotRegex(process.stderr(), "Traceback|Broken|ignored")


# ------------------------------------------------------------------------------------------------------ recordings

# Beginnings of real captures of made-up devices, deflated: name, the frames of each direction, a pcap file.
# middle: begins in a connection, small segments, late ones and doubles; counted by sequence number with a script of its own.
# vlan: tcpdump -i any, each packet with a tag and without; counted with tshark -z follow.
CAPTURES = (
    ("middle", "inbound 0204: 3, outbound 0204: 3",
        "c-pO$c~BE~7=|~SP{M}Gg9xY?kSbs##DWJJjM4~-1qvwAL8Fxf2!?2jHv$zz6pG>n#S0G*s;FG!fl(j{vC5(75C|z%P=c+t<rs{L*!?YIXky%Prp?S|Ab&i0-tYasJd~84f*}$#@*+V5^xd|}H0H%)0+fmV4"
        "W3fr)yWZKRxL`pIHQdWaUduuSHXtZpN-#H1;Jy{2a$UD+o!Q80gWfy{F5wUC?yMm2m~@xxl3~X46k`fk><P7`~^aF`OJfxeXXZlnBSu=ULI)dOK80|{h2MnbA{)=#2e@2-KUl5PeZ%-_NlDLmBOG)oSRcx)`"
        "p!r_|3OT0Xx$9xBOV7vI1Zi`U=;s8M8~)vm<`YE-)ZC#3vN}%mhY<F~^PR=En(H<~ICd+EVNYG-PB(!~eUQKOJ(R?P<7eE%+ty`}!)l;U+zQ2lpDV^L>qL*Miyopl5gVV|EwEBp4^|bNO>rd~;2*HQ|*<_yy"
        "MJkPP295&W6X0r!u4oD2GCTPIS{G-^d{(1p&<f|J3i8P{76RG%12m-J;R2D%SR=`=~iCfI2LuxlO#Lkm$e@C<tmJ7RY3(L7-H6&siVLw|dz7cc{cNtT3nDV$-uGd#sxU<in_9B_$zj5yx_QLRTDdQZIP4nzJ"
        "Z&EF7_9UXxYJq!?um%#+T))F<9yJ{E&f)N6?6J)@)$796zgMQp|l~_M_b^9^3(e}g9_H!FJ10pXBhT>3KoFO7Vw-qDi>NT#$h}I}^vzB-Z%vGV5%}g{oQBxo5Si{@;>agqXA?h1no3axorggzPiGtY<DUEX2"
        "!s70gSuOi=M43bya1dtVwh)QU%<IFMncC>K&_V?sfS4_Vp?H)QZ-^Kh9fc8z28ke5qLyd_h~UB?CQQ=5FN8+0qu7qzmx^}jd2+c`hv|wljLn_g2S^ui;nw1I)`m^^j)Bh7^g4S1d;rmji9kw}rZhyX%T-}Sr"
        "a>Y|_v?G2tQHXekKd5Dbf>Fp4ro}BV=J?cj^FC@FsJX?MOhEa$PCW2vv*%oJdWBbTj2Nmo=~4w2W1?!>fD2pp2D5Hklqp->B)Wz%M=&-{=(K2H;*~RRxwtI<xNK6AnDqr2vmiBYn7p-rMc}`(#3j7OSDNPx="
        "CFH?QuTg{i)SG-u2uZGH<<$rB}K-a)QUi1}Jbn6<J&+qQu4@Tc4Kj*^SWy^LD2fy38MBCky`aBm`|0i5x;TqSdtGgjtT_{x-p4U+Wz68TRK7tyX7j5<Xg!?%YTY&mXAxZN{68+bj1g_+6{R8faIGq$V#L3M1"
        "bg(SST1!3f@7#$bC1>Fs4&8q18KyO&CPkm<ke<)cUh@9G4Y%Upvl|JqB`WfE|~?)XOpZ_^)RZAo?8GGn0B8r@Bob%2C`xaB-9@exLpeF9Mhh~rV>lL8p;b~-TPG=oH)+mY7+;wRh=MelYfCEUyJBvYB*;?ED"
        "I97q{gbXGK%eX5VEB!`jnO7{vyGWc(^>ucBX6-yTFeTn1=*jWp|$U7!Ab|P`jrp8~X8%(gRRhX;^w##5Do$mkPA0N&xKRpyguRPe|zLM$XDLz!^2$CKv!~IoVhxI#0uiqLptz5TXl@&+}h`l{9-ZehKX6LOp"
        "JGpjt65ZL|t)3m>Mi%?kZ+z}B@yG+#<!<V-rh752%QL1&Squcpv$w=7KklAW@a1id(QEJaj(p=ZYA>VTaZ>o?s5^ao80(zdi!=B7m?mUjI-5F8Z1Y5UC!79rv~f-mDYHUFni%IPX524><>?EZCv523MkJ|d%"
        "0&-@S=EJCLN|~=9@RV|-ZjR8JWJnxI3aV6?lr2ML8gygBSr5T1AE1q8-q|(e!{Y_Mnz{?Vi9nu@FL=EdKWg^Te`C~=b%1=x|=TV13rM*y^4s}zYyzxw!w6|{ZDz{|H|#Sj%v*D<|jA~0>^&<-Rta0"
    ),
    ("vlan", "inbound 0103: 1, inbound 0104: 1, inbound 0116: 2, inbound 0303: 1, inbound 0304: 1, outbound 0103: 1, outbound 0104: 1, outbound 0303: 1, outbound 0304: 1",
        "c-rNcdrVVj7{<TTQ?P5H6Xt{gUbuLHi56sAhBpFo6T|{VgrR{+6vdJ(%Bo`#vd!X#I=m4IPQZ9!MG>$Q!Vodc8z{&`As{&B0t*C!Ahlyy_I;=HV$W$>vHmeUNt5=RzQ6B0&-;9RPn&DY3TS{1)CV2RzyQc=G"
        "E0msHU+`(40;JWh>J9U(M&h_r4_rk0}zYOO!pj@rzt99{L;qd@X9z1XdbkE;Il*M4TdQyb+GBiVh0MD6l}U_8Nb3Y{yj3ggkLc(hgZn#uD=v)MI~Yj_A@CwF%G*To~_L`F&5izEBlRkayNnfMm))f>^d_XaN"
        "#+wjtl}5VaH^%qU67c9O_`37=wKVvU3iz00*8!FNUeo7fkI7#sH>JiQ@B(rSUTqF!+wCqaJ^i`lDG?_3EBa)YBB7QI(p6>LpoJ_iuQ8Q8r7J3kFcu1J(We0<he7yBF{>&A)?c5FxW7#D3H*$QFG$pEf$klfW"
        "XniG)sLFm3AUjuRf^_%y^XC-ZS*^2<b2e6@bW2LSQAKSpe{Mu>f8g;Va_0Jw%-zNLJ>Cckk*s1&WC<X;t0`C~kOVlE2=Kxlw&|2=#Y34iWu`C|vy2uz!fNqOf{rU`FEh>y4eG8Z=nH=vpYsv)de_x*}}cM#k"
        "dO0G2~jc`zLPa!UMT{zD_5|XyzH~^ozaX6fSpa_oQaI;~}#%7zVx3S`L%9BgaLR-b$;Kf#Kzr8LidmN)S7yY;;!#TCB`-7YRc0SqVIn#BKqxa&`maC1f?ZSvvpPUF{Sg;P~^~7HA3H4gyj?`=-tHJ-jYJRJx"
        ">iJ7q_3*!k)SOJx%4#4~bOiSNg|g?38^Qomgt+&rsWSTd+>ja;=!CFN-C3&h<rD5N({lfa%6)H5_rrk7{qJ$Qq3(09#|>^_o;_9-yXU?m_xZE*f(yy(?^?KUUUa?lkTc!9KK%0Xthx13);VSIaY@H|6A~^LC"
        "E9Tv_$(LZ@r3II`EE^x+g88N`|81}xCM<h_A5(nc`WF{#Xr|BOKzLv++6qvQoEk47N5Fmvug~<ViS=WJ~=bN3t?u)s4`PfV?Y)s!4>rCpM(9|5Lc$2Q&l1MMJt4kRC6j+c*aL_PVMW}KL=lj&+MDj9IV>m>="
        "O#taMGSrtgIWv8cP1mzDdnNgZbuT`sZLj@th#LujP*uTq8_#ULh{xBd*n${y8`qZtyfS&;Vf#y6?BLpO~+*U`j69&F(7h8pKuY<~<mk93L%(dw6xY&%|zar{2v~17EC}%WJBYd@1EUT^o>>H*a6#qFVxXBHo"
        ")I6y3h;X}!CLHtbTF-Rdv<HP!Lbuxnr_mg*cm>-^4B74rtuoh`Dzu04?Q?fjU?`AvNfwjafix+t<beCnvngX;ACHd%EebqyP|vK$5#iZ$mMRAzw`BCeRsr5S^JiD3o?AZ$Q)*4p}srxe+TTHO$<x)G-8Mi64"
        "Fx*@{ohIYeNdhyDm74u3u8+TV0Z5#?}@k~zUwx8JgsAs?|y|^qR`QUQFjPEu+50cDcbNn`!zne3%>(sd2x&uc=hemnjDYM7MO@{h+q&bXye$8j3?Vq$C21-QbrIlH!88(7Dqq*~2B&}R;_p%k1?ia5OEjf2m"
        "g4ACjtH<9S^<4}Dvf4vrDw3S3bgt&SgUT(D1BlzpFd(aw;9iJg11W?_b>Huw{=XycPt}z3*%}**h*r&KF`Carr`&K{`}xKkwuNP*?$dC0F25tSeVKetSZ<sBO^4Fcib`yzzRFJ9$BfOkrH5NW9<Dl<DLI?4e"
        "PT`etFF289PzI_n&blQ?Q<bcz}ElYHi>xRz4!7HZ}39s#B-Rj5%qu2`nAXj#7!b|abs}#a{bx0`WtcY7E<mBjjq8x(Tw)Qg!j1iZ;U<%4@#9?(^q-Aw&SrAFDv}%H}QLA4YJJZw<jv;ue#>C5#+)za{bwz+A"
        "jPDp7f1q"
    ),
)  # fmt: skip
HOUSE, PORTAL_SIDE = "192.168.1.7", "203.0.113.9"  # addresses of the recordings that are made here
HOSTS = {4: (HOUSE, PORTAL_SIDE), 6: ("2001:db8::7", "2001:db8::9")}
MACS = bytes.fromhex("02aabbccdd01 02aabbccdd02")


address_bytes = lambda host: ipaddress.ip_address(host).packed
inflated = lambda text: zlib.decompress(base64.b85decode(text))
c_array = lambda data: "char packet[] = { /* Frame */\n" + ", ".join(f"0x{byte:02x}" for byte in data) + "};\n"
ADDRESSES = (MACS[:6], MACS[6:], *(address_bytes(host) for hosts in HOSTS.values() for host in hosts))


def tcp(data: bytes, seq: int, inward=False, flags=0x18, port=40001, portal=20001) -> bytes:
    """A TCP segment of a device, or to it."""
    ports = (portal, port) if inward else (port, portal)
    return struct.pack(">HHIIBBHHH", *ports, seq % (1 << 32), 0, 0x50, flags, 1000, 0, 0) + data


def ip(body: bytes, inward=False, version=4, size=None, options=b"", house="", protocol=6) -> bytes:
    """An IP packet; size is its length, as it says."""
    hosts = [address_bytes(house or HOSTS[version][0]), address_bytes(HOSTS[version][1])]
    size = len(body) + (20 + len(options) if version == 4 else 0) if size is None else size
    head = struct.pack(">IHBB", 6 << 28, size, protocol, 64)
    if version == 4:
        head = struct.pack(">BBHHHBBH", 0x45 + len(options) // 4, 0, size, 1, 0, 64, protocol, 0)
    return head + b"".join(reversed(hosts) if inward else hosts) + options + body


def ether(packet: bytes, tags: bytes = b"") -> bytes:
    return MACS + tags + (b"\x86\xdd" if packet[0] >> 4 == 6 else b"\x08\0") + packet


def pcap(packets, link: int = 1, order: str = "<", nano: bool = False, snap: int = 1 << 18) -> bytes:
    """A pcap file of packets, a tenth of a second apart."""
    made = struct.pack(order + "IHHiIII", 0xA1B23C4D if nano else 0xA1B2C3D4, 2, 4, 0, 0, snap, link)
    for i, data in enumerate(packets):
        fraction = i % 10 * (100_000_000 if nano else 100_000)
        made += struct.pack(order + "IIII", 1774094400 + i // 10, fraction, len(data[:snap]), len(data)) + data[:snap]
    return made


def block(kind: int, body: bytes, order: str = "<") -> bytes:
    body += bytes(-len(body) % 4)
    return struct.pack(order + "II", kind, len(body) + 12) + body + struct.pack(order + "I", len(body) + 12)


def pcapng(packets, link=1, order="<", unit=b"", per_second=10**6, kind=6, first=0) -> bytes:
    """A section of pcapng with the packets on its second interface (simple blocks: on its first, which is the same)."""
    options = struct.pack(order + "HHc3x", 9, 1, unit) if unit else b""
    options += struct.pack(order + "HHcccx", 2, 3, b"e", b"t", b"h") + bytes(4)
    interface = block(1, struct.pack(order + "HHI", link, 0, 0) + options, order)
    made = block(0x0A0D0D0A, struct.pack(order + "IHHq", 0x1A2B3C4D, 1, 0, -1), order) + interface + interface
    for i, data in enumerate(packets):
        ticks = 1774094400 * per_second + (first + i) * per_second // 10
        head = struct.pack(order + "5I", 1, ticks >> 32, ticks & 0xFFFFFFFF, len(data), len(data))
        made += block(kind, (head if kind == 6 else struct.pack(order + "I", len(data))) + data, order)
    return made


def printable(data: bytes) -> str:
    return "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in data)


DUMPS = {  # the line that a tool prints of an offset and 16 bytes
    "xxd": lambda at, part: f"{at:08x}: {part.hex(' ', -2):39}  {printable(part)}",
    "hexdump -C": lambda at, part: f"{at:08x}  {part[:8].hex(' ')}  {part[8:].hex(' '):23}  |{printable(part)}|",
    "od -tx1": lambda at, part: f"{at:07o} {part.hex(' ')}",
    "od -Ax -tx1z": lambda at, part: f"{at:06x} {part.hex(' '):47}  >{printable(part)}<",
    "tcpdump -X": lambda at, part: f"\t0x{at:04x}:  {part.hex(' ', -2):39}  {printable(part)}",
    "tcpdump -x": lambda at, part: f"\t0x{at:04x}:  {part.hex(' ', -2)}",
    "tshark -x": lambda at, part: f"{at:04x}  {part.hex(' '):47}   {printable(part)}",
    "follow": lambda at, part: f"{at:08X}  {part[:8].hex(' ')}  {part[8:].hex(' '):23}  {printable(part)}",
}


def dumped(data: bytes, tool: str, width: int = 16) -> str:
    """data as a tool of DUMPS prints it."""
    return "".join(DUMPS[tool](at, data[at : at + width]) + "\n" for at in range(0, len(data), width))


class RecordingTest(SocketCase):
    """Recordings of packets and pasted dumps: the frames in them, and nothing of the house's addresses."""

    ONE, TWO, THREE = (frame(when=minute(i)) for i in range(3))
    ACK = ack_of(ONE)
    SEGMENTS = ((tcp(ONE[:70], 1), False), (tcp(ONE[70:], 71), False), (tcp(ACK, 1, True), True), (tcp(TWO, 1 + len(ONE)), False))  # fmt: skip
    PACKETS = [ip(*each) for each in SEGMENTS]

    def decoded(self, data: bytes, *arguments: str) -> tuple:
        """Exit code, the objects that decode prints, and stderr; no address of the house is in either."""
        code, out, err = called("decode", *arguments, "-", stdin=data)
        for text in (HOUSE, PORTAL_SIDE, "2001:db8", *(address.hex() for address in ADDRESSES)):
            self.assertNotIn(text, out + err)
        return code, [json.loads(line) for line in out.splitlines()], err

    def check(self, data: bytes, good: list, others: list = (), words: tuple = ()) -> list:
        """decode prints these frames, in order, and other pieces; on stderr is a line with each word, and one if no frame is good."""
        code, found, err = self.decoded(data)
        frames = [entry["hex"] for entry in found if entry["crc_ok"]]
        self.assertEqual(frames, [each.hex() for each in good], err)
        self.assertEqual([entry["hex"] for entry in found if not entry["crc_ok"]], [each.hex() for each in others])
        self.assertEqual((code, err.count("\n")), (int(not good), len(words) if good else 1), err)
        for word in words:
            self.assertIn(word, err)
        return found

    def test_real_captures(self) -> None:
        """The counts that others have of the same files; in the order of time; gzipped too."""
        for name, wanted, text in CAPTURES:
            for kind, data in (("plain", inflated(text)), ("gzip", gzip.compress(inflated(text)))):
                with self.subTest(name, kind=kind):
                    code, found, err = self.decoded(data)
                    self.assertEqual((code, err, {entry["crc_ok"] for entry in found}), (0, "", {True}))
                    counts = collections.Counter(f"{entry['direction']} {entry['type']}" for entry in found)
                    self.assertEqual(", ".join(f"{kind}: {count}" for kind, count in sorted(counts.items())), wanted)
                    times = [entry["captured"] for entry in found]
                    self.assertEqual(times, sorted(times))
                    self.assertRegex(times[0], r"^2026-11-30T0\d:\d\d:\d\d\.\d{6}\+00:00$")

    def test_forms(self) -> None:
        """The same packets in every form of file, link and IP header."""
        plain, ethernet = self.PACKETS, [ether(packet) for packet in self.PACKETS]
        tag, outer, sll = b"\x81\0\0\7", b"\x88\xa8\0\5", b"\0\0\0\1\0\6\2\xaa\xbb\xcc\xdd\1\0\0"
        made = lambda **more: [ip(*each, **more) for each in self.SEGMENTS]
        headers = b"\x2b\0" + bytes(6) + b"\x3c\1" + bytes(6) + b"\xff" * 8 + b"\x2c\0" + bytes(6) + b"\6" + bytes(7)
        extended = [ip(headers + part, inward, version=6, protocol=0) for part, inward in self.SEGMENTS]
        for name, data in (
            ("pcap", pcap(ethernet)), ("big endian", pcap(ethernet, order=">")), ("nanoseconds", pcap(ethernet, nano=True)),
            ("both", pcap(ethernet, nano=True, order=">")), ("gzip", gzip.compress(pcap(ethernet))),
            ("pcapng", pcapng(ethernet)), ("pcapng, big endian", pcapng(ethernet, order=">")), ("simple blocks", pcapng(ethernet, kind=3)),
            ("nanoseconds in pcapng", pcapng(ethernet, unit=b"\x09", per_second=10**9)), ("a power of two", pcapng(ethernet, unit=b"\x8a", per_second=1024)),
            ("another block", pcapng(ethernet[:1]) + block(5, b"statistics..") + pcapng(ethernet[1:], first=1)),
            ("sections", pcapng(ethernet[:3]) + pcapng(plain[3:], link=101, order=">", first=3)),
            ("VLAN", pcap([ether(packet, tag) for packet in plain])), ("802.1ad", pcap([ether(packet, outer + tag) for packet in plain])),
            ("padding", pcap([packet + bytes(20) for packet in ethernet])), ("checksums behind", pcap([packet + b"FCS!" for packet in ethernet], link=1 | 0x24000000)),
            ("cooked", pcap([sll + b"\x08\0" + packet for packet in plain], link=113)), ("cooked, VLAN", pcap([sll + tag + b"\x08\0" + packet for packet in plain], link=113)),
            ("cooked 2", pcap([b"\x08\0" + bytes(18) + packet for packet in plain], link=276)), ("cooked 2, VLAN", pcap([tag[:2] + bytes(18) + tag[2:] + b"\x08\0" + packet for packet in plain], link=276)),
            *((f"link type {link}", pcap(plain, link=link)) for link in (12, 14, 101, 228)), ("null", pcap([b"\2\0\0\0" + packet for packet in plain], link=0)),
            ("loop", pcap([b"\0\0\0\2" + packet for packet in plain], link=108)), ("options", pcap(made(options=b"\7\x27" + bytes(38)), link=101)),
            ("total length 0", pcap(made(size=0), link=101)), ("extension headers", pcap(extended, link=229)),
            ("extension headers in dumps", "".join(dumped(ether(packet), "tshark -x") for packet in extended).encode()), ("IPv6", pcap(map(ether, made(version=6)))), ("IPv6 raw", pcap(made(version=6), link=229)), ("IPv6, length 0", pcap(made(version=6, size=0), link=229)),
        ):  # fmt: skip
            with self.subTest(name):
                found = self.check(data, [self.ONE, self.ACK, self.TWO])
                for entry, wanted in zip(found, (0.1, 0.2, 0.3)):
                    if name not in ("simple blocks", "extension headers in dumps"):  # which have no time
                        self.assertAlmostEqual(float(entry["captured"][17:26]), wanted, delta=0.002)

    def test_streams(self) -> None:
        """Segments as networks deliver them: (place in the stream, bytes, more), and the frames that come out."""
        one, two, three = self.ONE, self.TWO, self.THREE
        stream, n = one + two + three, len(one)
        whole = [(at, stream[at : at + 60]) for at in range(0, len(stream), 60)]
        syn = [(-1, b"", {"flags": 2})]
        many = [frame(sems.BUFFERED, when=minute(i)) for i in range(1170)]
        everything = [one, two, three]
        for name, segments, wanted, *words in (
            ("in order", syn + whole, everything), ("cut inside the prefix", [(0, one[:3]), (3, one[3:])], [one]), ("each twice", [part for part in syn + whole for _ in (1, 2)], everything),
            ("all twice", syn + whole + whole, everything), ("the last first", syn + whole[::-1], everything), ("start in the middle, late", whole[1:3] + whole[:1] + whole[3:], everything),
            ("overlaps", syn + [(at, stream[at : at + 100]) for at in range(0, len(stream), 60)], everything), ("one that holds others", syn + whole[:2] + [(0, stream)], everything),
            ("keep-alive probes", syn + [(-1, b"?"), *whole[:4], (239, b"?"), *whole[4:], (len(stream) - 1, b"?")], everything), ("a probe at the start", [(n - 1, b"?"), (n, two)], [two], "not whole"),
            ("start in a frame", whole[1:], [two, three], "not whole at gaps, or where the recording begins or ends, left out: 1\n"), ("a gap", syn + whole[:2] + whole[3:], [two, three] if n < 120 else [three], "gaps", "not whole"), ("the first is missing", syn + whole[1:], [two, three], "gaps", "not whole"),
            ("an end in a frame", syn + whole[:-1], [one, two], "not whole"), ("a port used again", [*syn, (0, one), (4999, b"", {"flags": 2}), (5000, two), (-90001, b"", {"flags": 2}), (-90000, three)], everything),
            ("used again, unseen", [(0, one), (1 << 30, two), (3 << 30, three)], everything, "gaps"), ("the portal's other port, by the prefix", [(at, data, {"portal": 443}) for at, data in ((0, one), (n, two), (2 * n, three))], everything),
            ("another port, in parts", [(at, data, {"portal": 443}) for at, data in whole], everything), ("used again below, unseen", [*syn, (0, one), (-90000, two)], [one, two], "gaps"),
            ("behind NAT, twice", [(at, data, {"house": house, "port": 40001 + len(house)}) for at, data in whole for house in (HOUSE, "198.51.100.77")], everything),
            ("merged on the way", [(0, b"".join(many), {"size": 0})], many),
            ("the end of a connection", [*syn, *whole, (len(stream), b"", {"flags": 0x11})], everything),
        ):  # fmt: skip
            for start in (1000, (1 << 32) - 100):
                with self.subTest(name, start=start):
                    packets = []
                    for at, data, *more in segments:
                        flags = dict(more[0]) if more else {}
                        of_ip = {key: flags.pop(key) for key in ("house", "size") if key in flags}
                        packets.append(ether(ip(tcp(data, start + at, **flags), **of_ip)))
                    self.check(pcap(packets), wanted, (), words)

    def test_other_traffic(self) -> None:
        """What is not GoodWe's is left out, whatever it is; what devices say that is no good frame is not."""
        web = ether(ip(tcp(b"GET / HTTP/1.1\r\nHost: 192.168.1.7\r\n", 1, portal=80)))
        tls = ether(ip(tcp(b"\x16\x03\1\2\0", 1, port=40002)))
        arp = MACS + b"\x08\6\0\1\x08\0\6\4\0\1" + MACS + address_bytes(HOUSE)
        udp = ether(ip(tcp(self.TWO, 1), protocol=17))
        ours = ether(ip(tcp(self.ONE, 1)))
        for name, packets, wanted, others in (
            ("other traffic", [web, arp, udp, ours, web], [self.ONE], []),
            ("a port that another uses", [tls, ours], [self.ONE], []),
            ("from its beginning", [ether(ip(tcp(b"", 0, flags=2, port=40002))), tls, ours], [self.ONE], []),
            ("nothing of ours", [web, arp, udp, tls], [], []),
            ("a bad CRC", [ether(ip(tcp(spoilt(self.ONE) + self.TWO, 1)))], [self.TWO], [spoilt(self.ONE)]),
            ("junk", [ours, ether(ip(tcp(b"junk", 1 + len(self.ONE))))], [self.ONE], [b"junk"]),
            ("by the port", [ether(ip(tcp(self.ACK + b"POST" + self.ACK, 1, True), True))], [self.ACK] * 2, [b"POST"]),
            ("answers alone", [ether(ip(tcp(b"\1\2" + self.ACK, 1, True), True))], [self.ACK], [b"\1\2"]),
            ("keep-alives alone", [ether(ip(tcp(b"\1\2", 1, True), True))], [], [b"\1\2"]),
        ):
            with self.subTest(name):
                self.check(pcap(packets), wanted, others)

    def test_what_is_missing(self) -> None:
        """One line on stderr for each thing that a recording lacks; exit code 1 without a good frame."""
        packets = [ether(ip(tcp(data, 1 + i * len(data)))) for i, data in enumerate((self.ONE, self.TWO))]
        one, answer, whole = packets[0], ether(ip(tcp(self.ACK, 1, True), True)), pcap(packets)
        mixed = gzip.compress(pcap([one])) + gzip.compress(whole)[:3] + b"xxxxxx"
        inside, snapped, damaged = "ends inside a record", "with -s 0", "damaged records: 1"
        for name, data, good, word in (
            ("snap length", pcap(packets, snap=96), [], snapped), ("headers cut", pcap(packets, snap=40), [], snapped),
            ("snap length, answers whole", pcap([answer, *packets], snap=120), [self.ACK], snapped),
            ("cut in a packet", whole[:-9], [self.ONE], inside), ("cut in a header", pcap([one]) + bytes(7), [self.ONE], inside),
            ("pcapng cut", pcapng(packets)[:-9], [self.ONE], inside), ("gzip cut", gzip.compress(whole, 0)[:-30], [self.ONE], inside),
            ("gzip damaged", mixed, [self.ONE], inside), ("the first header cut", whole[:20], [], inside),
            ("damaged", pcap([one]) + b"\xff" * 16, [self.ONE], damaged), ("pcapng damaged", pcapng([one]) + b"\xff" * 16, [self.ONE], damaged),
            ("no such interface", pcapng([one]) + block(6, b"\x99" * 40) + pcapng(packets), [self.ONE, self.TWO], damaged), ("a short block", pcapng([one]) + block(6, b"") + pcapng(packets), [self.ONE, self.TWO], damaged),
            ("an old block", pcapng([one]) + block(2, bytes(40)), [self.ONE], "old packet blocks (save the file as pcap) are not read; left out: 1"), ("modified pcap", b"\x34\xcd\xb2\xa1" + whole[4:], [], "a modified pcap file"),
            ("a fragment", pcap([one[:20] + b"\0\3" + one[22:], packets[1]]), [self.TWO], "fragments of IP packets are not read; left out: 1"),
            ("an IPv6 fragment", pcap([ether(ip(b"\6\0\0\x08" + bytes(4) + tcp(self.ONE, 1), version=6, protocol=44)), packets[1]]), [self.TWO], "fragments of IP packets are not read; left out: 1"),
            ("802.11", pcap(packets, link=105), [], "link type 105"), ("nothing", whole[:24], [], "not a single good frame"),
        ):  # fmt: skip
            with self.subTest(name):
                self.check(data, good, (), (word,))

    def test_dumps(self) -> None:
        """Text of every tool, of a frame and of packets, gives the frames; so do the tools of this machine."""
        pairs, packets = [f"{byte:02x}" for byte in self.ONE], self.PACKETS[:3]
        head = "12:00:00.1 IP 192.168.1.7.40001 > 203.0.113.9.20001: Flags [P.], length 70\n"
        arp = MACS + b"\x08\6" + address_bytes(HOUSE) * 4
        texts = {tool: dumped(self.ONE, tool) for tool in DUMPS}
        texts.update({
            "xxd -c 32": dumped(self.ONE, "xxd", 32), "xxd -c 8": dumped(self.ONE, "xxd", 8), "od, to its end": texts["od -tx1"] + f"{len(self.ONE):07o}\n", "CRLF": texts["xxd"].replace("\n", "\r\n"),
            "in a report": f"Hello,\n```\n{texts['hexdump -C']}```\nthanks", "xxd -i": c_array(self.ONE) + "unsigned int frame_len = 166;", "a hex stream of a packet": ether(ip(tcp(self.ONE, 1))).hex(),
            "plain": self.ONE.hex(), "upper case": self.ONE.hex().upper(), "quoted": f'"{self.ONE.hex()}"', "groups of four": re.sub("(....)", r"\1 ", self.ONE.hex()), "blanks": " ".join(pairs), "lines": "\r\n".join(pairs),
            "colons": ":".join(pairs), "0x": ", ".join("0x" + pair for pair in pairs), "0X": " ".join("0X" + pair for pair in pairs), "C string": '"' + "".join("\\x" + pair for pair in pairs) + '"',
            "Python": repr(self.ONE), "a list": f"sent = [{', '.join(map(hex, self.ONE))}]  # {{ab}}",
            "octal": '"' + "".join(f"\\x{byte:02x}" if 0 < byte < 80 else f"\\{byte:o}" for byte in self.ONE) + '"', "C array with text": c_array(self.ONE).replace("0x00, 0x00,", "0x00, /* GW.. */\n0x00,"),
        })  # fmt: skip
        rows = [(name, text, [self.ONE]) for name, text in texts.items()]
        of = lambda payload: with_crc(with_length(self.ONE[:52] + bytes(payload) + b".."))
        every, one_quote = of(range(256)), of(range(35, 243))  # all that has an escape; the other quote is around it
        pythons = (f"It's {every!r}", every), (f"print({every[:80]!r}\n  {every[80:]!r})", every), (repr(one_quote)[:-1], one_quote)  # fmt: skip
        rows += ((f"Python: {text[:12]}", text, [wanted]) for text, wanted in pythons)
        path = os.path.join(self.directory(), "frame")
        with open(path, "wb") as file:
            file.write(self.ONE)
        for name in ("xxd", "xxd -i", "hexdump -C", "od -tx1", "od -Ax -tx1z"):
            if shutil.which(name.split()[0]):
                text = subprocess.run([*name.split(), path], capture_output=True, check=True).stdout.decode()
                rows.append((f"{name}, the tool", text, [self.ONE]))
        tcpdump = lambda packet: dumped(packet, "tcpdump -X")
        tshark = lambda packet: dumped(packet, "tshark -x") + "\n"
        for name, before, form, link in (
            ("tcpdump -X", head, tcpdump, bytes), ("tcpdump -XX", head, tcpdump, ether), ("tshark -x", "Frame (124 bytes):\n", tshark, ether),
            ("tshark -x -i any", "", tshark, lambda packet: b"\x08\0" + bytes(18) + packet),
            ("tshark -x -i any, VLAN", "", tshark, lambda packet: b"\x81\0" + bytes(12) + b"\x6b" + bytes(6) + b"\7\x08\0" + packet), ("with ARP", tshark(arp), tshark, ether),
            ("C arrays", "", c_array, ether), ("C arrays, with ARP", c_array(arp), c_array, ether),
        ):  # fmt: skip
            rows.append((name, "".join(before + form(link(packet)) for packet in packets), [self.ONE, self.ACK]))
        parts = (ip(tcp(self.ONE[:7], 1)), ip(tcp(self.ONE[7:], 8)))
        rows.append(("cut inside the prefix", "".join(map(tcpdump, parts)), [self.ONE]))
        for name, text, wanted in rows:
            with self.subTest(name):
                self.check(text.encode(), wanted)

    def test_bytes_of_unknown_form(self) -> None:
        """Bytes that are no frames are shown if they are hex and look like no packet; of those that hold one, good frames alone."""
        behind = b"snoop\0\0\0" + bytes(8) + ether(ip(tcp(self.ONE + spoilt(self.TWO), 1))) + MACS
        for name, data in (("bytes", behind), ("hex", behind.hex().encode()), ("an array", c_array(behind).encode())):
            with self.subTest(name):
                self.check(data, [self.ONE], (), ("can hold anything, left out: 3",))
        self.check(self.ONE + spoilt(self.TWO) + self.ACK, [self.ONE, self.ACK], [spoilt(self.TWO)])
        hello = b"\x16\3\1\2\0" + b"hello, this is TLS" * 9
        arp = MACS + b"\x08\6\0\1\x08\0\6\4\0\1" + MACS + address_bytes(HOUSE)
        self.check(dumped(MACS * 3, "tcpdump -x").encode(), [], [], ("not a single good frame",))
        for shown in (b"junk", hello, b"\1\2", self.ONE[:60], spoilt(self.ONE)):
            with self.subTest(shown=shown):
                self.check(shown.hex().encode(), [], [shown], ("not a single good frame",))
        packets = [arp, *(ether(ip(tcp(data, 1))) for data in (b"", b"POST", spoilt(self.ONE))), ether(ip(tcp(hello, 1, portal=80), version=6))]  # fmt: skip
        for packet, at in itertools.product(packets, range(12, 38)):  # one byte of the headers is damaged
            damaged = packet[:at] + b"\xff" + packet[at + 1 :]
            for data in (damaged, damaged[14:]) if at > 13 and sems.PORTAL_PORT in packet else (damaged,):
                with self.subTest(data=data):
                    _, found, _ = self.decoded(data.hex().encode())
                    self.assertLessEqual({each["hex"] for each in found}, {spoilt(self.ONE).hex()})

    def test_foreign_files(self) -> None:
        """What is neither recording nor hex is called that, by its name; exit code 1, and nothing on stdout."""
        path = os.path.join(self.directory(), "file")
        line = sems.capture_line(0, "127.0.0.1:1", "outbound", "forwarded", self.ONE).encode()
        for data, word in (
            (b"The POSTGW frames of 2026-03-21 12:00, added 0x1f: see a decade of C0FFEE.", "text without bytes in hex"), (b"commit 06f6b7c4d5e6f708192a3b4c5d6e7f8091a2b3c4", "text without bytes in hex"),
            (b"\x7fELF\2\1\1\0\0\0", "neither a recording nor text"), (gzip.compress(b""), "nothing in it"), (b"E..<..@.@..POSTGW.....91000HKU", "text without"), (b"", "nothing in it"), (b"\n", "nothing in it"), (b"504", "text without"),
            (b'{"a": 1}', "passed over: 1"), (b'{"hex": 5}\n{"hex": "xy"}', "passed over: 2"), (line[:99], "passed over: 1"), (b"{" * 9999, "text without"),
        ):  # fmt: skip
            with open(path, "wb") as file:
                file.write(data)
            for command in ("decode", "backfill"):
                for source, name in (path, path), ("-", "standard input"):
                    with self.subTest(data[:20], command=command, source=source[-4:]):
                        code, out, err = called(command, source, stdin=data)
                        self.assertEqual((code, out, err.count("\n")), (1, "", 1), err)
                        self.assertIn(name, err)
                        self.assertIn(word, err)

    def test_capture_lines(self) -> None:
        """Lines of our own are read one by one; what is none of them is counted. The time is the one of the line."""
        line = lambda data, wall: sems.capture_line(wall, "192.168.1.7:1", "outbound", "forwarded", data).encode()
        first, second = line(self.ONE, 1774094400.5), line(self.TWO, 1774094460)
        for name, data, passed in (
            ("plain", first + second, 0), ("a byte-order mark", b"\xef\xbb\xbf" + first + second, 0), ("CRLF", (first + second).replace(b"\n", b"\r\n"), 0), ("blank lines", b"\n" + first + b"\n\n" + second, 0),
            ("NUL", first + bytes(4096) + second, 0), ("a NUL line", first + bytes(99) + b"\n" + second, 0), ("torn", first + second[:200] + b"\n" + second, 1), ("torn at the end", first + second + first[:99], 1),
            ("foreign", b"# a remark\n[]\n{}\n" + first + b'{"hex": 1}\n{"hex": "zz"}\n' + second, 5), ("deep", first + b"[" * 100000 + b"\n" + second, 1), ("gzip", gzip.compress(first + second), 0),
            ("no end for long", first + b"x" * (3 << 20) + b"\n" + second, 3), ("Z", (first + second).replace(b"+00:00", b"Z"), 0),
        ):  # fmt: skip
            with self.subTest(name):
                words = (f"lines that are no whole lines of a capture, passed over: {passed}\n",) * bool(passed)
                found = self.check(data, [self.ONE, self.TWO], (), words)
                times = [entry["captured"] for entry in found]
                self.assertEqual(times, ["2026-03-21T12:00:00.500000+00:00", "2026-03-21T12:01:00.000000+00:00"])
        self.check(line(self.ACK, 0), [], [self.ACK])  # the line says a direction: in that one it is junk

    def test_fuzz(self) -> None:
        """Cut, repeated, flipped and overwritten bytes raise nothing but ProtocolError; the latter two show no address.

        Where bytes are cut out or put in, one packet's addresses can come to stand where another's data was.
        """
        rng, packets = random.Random(17), [ether(packet) for packet in self.PACKETS]
        packets[1:1] = [ether(ip(tcp(b"GET / HTTP/1.1", 1, port=7, portal=80)))] * 2
        texts = [*(dumped(self.ONE, tool) for tool in DUMPS), "".join(map(c_array, packets)), packets[0].hex()]
        texts += [dumped(packets[0], name) for name in ("tshark -x", "tcpdump -x")]
        seeds = [pcap(packets), pcapng(packets), gzip.compress(pcap(packets)), *(text.encode() for text in texts)]
        for number in range(600):
            data, is_moved = bytearray(rng.choice(seeds)), rng.random() < 0.5
            for _ in range(rng.choice((1, 1, 3, 20))):
                at, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 16, 200))
                part = data[at : at + size]
                flipped = bytes(byte ^ 1 << rng.randrange(8) for byte in part)
                in_place = (bytes(len(part)), b"\xff" * len(part), flipped)
                data[at : at + size] = rng.choice((*in_place, b"", part * 5) if is_moved else in_place)
            with self.subTest(number), contextlib.suppress(sems.ProtocolError):
                for piece in sems.recording(io.BytesIO(bytes(data)), sems.Notes()):
                    said = json.dumps(sems.described(piece, {}))
                    self.assertFalse(not is_moved and any(each.hex() in said for each in ADDRESSES), said)

    def test_standard_output(self) -> None:
        """A full disk, a reader that goes, and an ASCII terminal: a line or silence, no traceback."""
        path = written(self.directory(), *frames_of(5), name="f\xe4hig")
        environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "TZ": "UTC0"}
        read, gone = os.pipe()
        self.addCleanup(os.close, gone)
        os.close(read)
        full = r"^sems_mitm.py: cannot write to standard output: .*\n$"
        for command, out, code, pattern in (
            (["decode", path], "/dev/full", 1, full), (["backfill", path], "/dev/full", 1, full.lstrip("^")), (["decode", path], None, 1, "^$"),
            (["decode", path], os.devnull, 0, "^$"), (["metrics"], os.devnull, 0, "^$"), (["decode", f"{path}xx"], os.devnull, 2, r"^sems_mitm.py: .*f.*hig.*\n$"),
        ):  # fmt: skip
            if out is None or os.path.exists(out):
                with (
                    self.subTest(command[0], out=out),
                    open(gone if out is None else out, "wb", closefd=bool(out)) as file,
                ):
                    run = [sys.executable, sems.__file__, *command]
                    ended = subprocess.run(run, stdout=file, stderr=subprocess.PIPE, env=environment)
                    self.assertEqual(ended.returncode, code, ended.stderr)
                    self.assertRegex(ended.stderr.decode("ascii"), pattern)


# ------------------------------------------------------------------------------------------------ decode, backfill


class DecodeTest(SocketCase):
    """sems_mitm.py decode."""

    def test_sources(self) -> None:
        """Hex, files and standard input say the same; hex can stand in several arguments, and beside files."""
        code, out, err = called("decode", b"junk".hex())
        self.assertEqual((code, json.loads(out)["hex"]), (1, b"junk".hex()))
        self.assertEqual(err, "sems_mitm.py: not a single good frame in the hex given\n")
        parts = (("outbound", frame()), ("inbound", portal_frame("0304")))
        lines = "".join(sems.capture_line(0, "127.0.0.1:1", direction, "forwarded", part) for direction, part in parts)
        data = frame() + portal_frame("0304")
        path, text = os.path.join(self.directory(), "file"), data.hex()
        _, expected, _ = called("decode", text)
        self.assertEqual([json.loads(line)["hex"] for line in expected.splitlines()], [part.hex() for _, part in parts])
        for content in (text.encode(), data, lines.encode()):
            with open(path, "wb") as file:
                file.write(content)
            for arguments in (path, "-", text, f"{text[:90]} {text[90:]}", f"{path} {text}", f"{text} -"):
                with self.subTest(content[:9], given=arguments):
                    code, out, err = called("decode", *arguments.split(), stdin=content)
                    times = 1 + (" " in arguments and text in arguments)
                    self.assertEqual((code, err), (0, ""))
                    self.assertCountEqual(out.splitlines(), expected.splitlines() * times)

    def test_what_it_says(self) -> None:
        """A row for each kind of piece: what the JSON object holds."""
        clock = struct.pack(">HH6s6x", 0x1216, 0x1218, sems.time_stamp(NOON))
        model = frame(sems.SETTINGS, 2, HYBRID, ranges=[(35011, sems.text_words("GW10K-ET", 5))])
        settings = frame(sems.SETTINGS, ranges=[(4864, sems.text_words("02053-05-000Me05", 8))])
        known = frame(ranges=[(2105, (0, 1500)), (7777, (9,))])
        rows = (
            (frame(), {"direction": "outbound", "type": "0304", "serial": METER, "crc_ok": True, "time": "2026-03-21T12:00:00", "envelope": "long", "error": None}),
            (known, {"values": {"meter_power_export_watts": 1500, 'meter_channel_power_watts{channel="1"}': 1500, 'meter_unknown_register{register="7777"}': 9}}), (settings, {"type": "0303", "values": {"firmware": "02053-05-000Me05"}}),
            (frame(sems.CONFIRMATION), {"type": "0310", "time": "2026-03-21T12:00:00", "envelope": "short", "values": {"first_register": 0x1216, "last_register": 0x1218, "status": 0}}),
            (frame(0x22, clear=bytes(16)), {"type": "0322", "values": {"clear": "00" * 16}}),
            (frame(clear=b"\xff" * 16), {"type": "0304", "crc_ok": True, "error": "a block runs past the end"}),
            (spoilt(frame()), {"type": "0304", "serial": METER, "crc_ok": False, "error": "bad checksum, or cut"}),
            (frame()[:60], {"type": "malformed", "crc_ok": False, "error": "bad checksum, or cut"}),
            (b"junk", {"type": "junk", "crc_ok": None, "error": "no frame", "hex": b"junk".hex()}),
            (b"\1\2" * 3, {"direction": "inbound", "type": "keepalive", "error": None, "hex": "0102"}),
            (portal_frame("0304"), {"direction": "inbound", "envelope": "answer", "values": {"meaning": "ack", "clear": "00" * 16}}),
            (portal_frame("0304", b"\2" + bytes(15)), {"values": {"meaning": "nack", "clear": "02" + "00" * 15}}),
            (portal_frame("0116", clock), {"values": {"meaning": "clock", "first_register": 0x1216, "last_register": 0x1218, "clock": "2026-03-21T12:00:00", "clear": clock.hex()}}),
            (portal_frame("0399"), {"values": {"meaning": "not let through", "clear": "00" * 16}}),
            (model + frame(2 + 2, 2, HYBRID, ranges=[]), {"type": "0204", "model": "GW10K-ET", "blocks": [], "values": {}}),
        )  # fmt: skip
        for data, wanted in rows:
            with self.subTest(**wanted):
                code, out, err = called("decode", "-", stdin=json.dumps({"hex": data.hex()}).encode())
                said = json.loads(out.splitlines()[-1])
                self.assertEqual((code, list(said)), (not said["crc_ok"], sems.SAID))
                self.assertRegex(err, "^$" if said["crc_ok"] else r"^sems_mitm.py: not a single good frame in .*\n$")
                self.assertEqual({key: said[key] for key in wanted}, wanted)

    def test_redact(self) -> None:
        """Good frames only, still good, otherwise the same, without a serial number in clear, in hex or in cipher; the rest is counted."""
        both = [(5000, sems.text_words(f"x{INVERTER} {METER}", 20))]
        inverter = frame(cls=1, serial=INVERTER, ranges=[])
        for name, data, good, others in (  # good frames in data, other pieces
            ("a recording", inflated(CAPTURES[1][2]), 10, 0),
            ("frames", frame() + inverter + frame(sems.CONFIRMATION), 3, 0),
            ("in a payload", frame(sems.SETTINGS, ranges=both) + inverter, 2, 0),
            ("bad CRC", spoilt(frame()) + inverter, 1, 1),
            ("cut", inverter + frame()[:40], 1, 1),
            ("in junk", frame() + b"junk " + METER.encode() + b" junk", 1, 1),
            ("a bad envelope", with_crc(frame()[:-20] + b"\0\0") + inverter, 1, 1),
            ("answers", portal_frame("0304") + b"\1\2" + spoilt(portal_frame("0304")), 1, 2),
        ):
            with self.subTest(name):
                plain = [json.loads(line) for line in called("decode", "-", stdin=data)[1].splitlines()]
                plain = [entry for entry in plain if entry["crc_ok"] and entry["serial"]]
                code, out, err = called("decode", "--redact", "-", stdin=data)
                self.assertEqual((code, err.count("\n"), out.count("\n")), (0, 1, good))
                self.assertIn(f"{good} good frames, {others} other pieces left out. XXXX0001, ", err)
                self.assertEqual(called("decode", "-", stdin=out.encode()), (0, out, ""))
                for entry, before in zip(map(json.loads, out.splitlines()), plain):
                    for key in ("time", "captured", "type", "model") + ("values", "blocks") * (name != "in a payload"):
                        self.assertEqual(entry[key], before[key])
                    self.assertRegex(entry["serial"], f"^{before['serial'][:8]}XXXX000[12]$")
                    raw, wire = bytes.fromhex(entry["hex"]), OUT if entry["direction"] == "outbound" else IN
                    for serial in {METER, INVERTER, *(each["serial"] for each in plain)}:
                        self.assertNotIn(serial.encode(), raw + sems.decode(raw, wire).clear)
                        self.assertFalse(serial in str(entry) or serial.encode().hex() in str(entry))


class BackfillTest(SocketCase):
    """sems_mitm.py backfill."""

    START = int(NOON.replace(tzinfo=timezone.utc).timestamp())

    @staticmethod
    def reading(when: datetime, watts: int, serial: str = METER) -> bytes:
        return frame(sems.BUFFERED, serial=serial, when=when, ranges=[(2105, (0, 1, 0, watts))])

    def run_over(self, *frames: bytes, flags: tuple = (), now: float | None = None, zone: str = "UTC0") -> tuple:
        """Exit code, OpenMetrics text, and stderr: of these frames, in two files, on a machine whose clock is real, or says now."""
        directory, halves = self.directory(), enumerate((frames[:13], frames[13:]))
        paths = [written(directory, *half, name=f"{i}") for i, half in halves if half]
        with time_zone(zone), mock.patch.object(sems.time, "time", lambda: now) if now else contextlib.nullcontext():
            return called("backfill", *paths, *flags, env={"TZ": zone})

    def test_every_sample_comes_back(self) -> None:
        """Whatever the order, and over both clock changes, each distinct reading is one sample at its own time."""
        count = 31
        orders = {  # of the numbers of readings
            "in order": [*range(count)],
            "newest first": [*reversed(range(count))],
            "each twice": [i for i in range(count) for _ in (1, 2)],
            "all twice": [*range(count)] * 2,
        }
        # Changes of the clock in Europe/Berlin, or none: in UTC, hours ahead of UTC before and after.
        changes = (datetime(2026, 2, 20, 5), 1, 1), (datetime(2026, 3, 29, 1), 1, 2), (datetime(2025, 10, 26, 1), 2, 1)
        for (change, before, after), (name, order) in itertools.product(changes, orders.items()):
            with self.subTest(change=str(change), order=name):
                utc = [change + timedelta(minutes=10 * (i - count // 2)) for i in range(count)]
                local = [when + timedelta(hours=before if when < change else after) for when in utc]
                wanted = [
                    (str(100 + i), f"{when.replace(tzinfo=timezone.utc).timestamp():.0f}") for i, when in enumerate(utc)
                ]
                code, text, err = self.run_over(*(self.reading(local[i], 100 + i) for i in order), zone=BERLIN)
                self.assertEqual((code, err[:8], text[-6:]), (0, "readings", "# EOF\n"))
                found = re.findall(r"(?m)^meter_power_generation_watts\{.*\} (\S+) (\S+)$", text)
                self.assertEqual(found, wanted)
        if shutil.which("promtool"):
            with open(os.path.join(self.directory(), "text"), "w") as file:
                file.write(text)
            command = ["promtool", "tsdb", "create-blocks-from", "openmetrics", file.name, self.directory()]
            made = subprocess.run(command, capture_output=True)
            self.assertEqual(made.returncode, 0, made.stderr)

    def test_labels(self) -> None:
        """Series have the labels of /metrics, and those of the scrape where asked for; settings are no readings."""
        inverter = frame(sems.BUFFERED, 1, INVERTER, ranges=INVERTER_RANGES)
        settings = frame(sems.SETTINGS, 2, HYBRID, when=minute(9), ranges=[(35011, sems.text_words("GW10K-ET", 5))])
        frames = (
            frame(),
            inverter,
            frame(cls=2, serial=HYBRID, ranges=[(35103, (3347,))]),
            settings,
            frame(sems.SETTINGS),
        )
        code, out, err = self.run_over(*frames, flags=("--job=sems", "--instance=pi:14028", "--label=house=1"))
        self.assertEqual((code, err), (0, "readings of 1 time, 2026-03-21 12:00 UTC to 2026-03-21 12:00 UTC\n"))
        device = 'device="meter",model="HomeKit 1000 Smart Meter",serial="00000042"'
        labels = f'{device},job="sems",instance="pi:14028",house="1"'
        self.assertIn(f"meter_power_generation_watts{{{labels}}} 2600 {self.START}\n", out)
        self.assertIn("# TYPE meter_energy_generation_decawatt_hours counter\n", out)
        for model in ("GW3000-DNS-30", "GW10K-ET"):
            self.assertIn(f'model="{model}"', out)

    def test_counters(self) -> None:
        """What the counter rules hold back is left out, in the order of the readings' own times, and counted; live and buffered together."""
        for name, counts, wanted, held in (
            ("rising", (5, 6, 6, 9), (5, 6, 6, 9), 0),
            ("a fall", (500, 499, 501), (500, None, 501), 1),
            ("a jump", (500, 9999, 501), (500, None, 501), 1),
            ("jumps that agree", (500, 9999, 10000, 10002), (500, None, None, 10002), 2),
            ("a first that was wrong", (9999, 500, 501), (None, None, 501), 2),
            ("zeros of a controller that boots", (500, 0, 0, 501), (500, None, None, 501), 0),
        ):
            with self.subTest(name):
                ranges = [[(30145, (0, count)), (30172, (59,))] for count in counts]
                kinds = itertools.cycle((sems.BUFFERED, sems.LIVE))
                frames = [frame(next(kinds), 1, INVERTER, minute(i), each) for i, each in enumerate(ranges)]
                random.Random(name).shuffle(frames)
                code, out, err = self.run_over(*frames)
                found = re.findall(r"(?m)^inverter_energy_output_hectowatt_hours_total\{.*\} (\S+) (\S+)$", out)
                by_time = {int(seconds): int(count) for count, seconds in found}
                self.assertEqual(tuple(by_time.get(self.START + 60 * i) for i in range(len(counts))), wanted)
                self.assertEqual(out.count("inverter_rssi_percent{"), len(counts))
                words = f"{INVERTER}: left out {held} values of counters" if held else ""
                self.assertEqual((code, words in err, "left out" in err), (0, True, bool(held)), err)

    def test_times(self) -> None:
        """What is later than now is left out and counted by device; of young readings, until when to wait before they are moved, and why."""
        now = NOON + timedelta(days=1)
        ago = lambda seconds: now - timedelta(seconds=seconds)
        for name, times, kept, left_out, wait in (
            ("old", (NOON,), 1, 0, ""),
            ("three hours and a second", (NOON, ago(10801)), 2, 0, ""),
            ("a second less", (NOON, ago(10799)), 2, 0, "12:01"),
            ("a minute", (NOON, ago(60)), 2, 0, "15:00"),
            ("this second", (NOON, now), 2, 0, "15:01"),
            ("a minute ahead", (NOON, ago(-60)), 1, 1, ""),
            ("two days, and a century", (NOON, ago(-2 * 86400), datetime(2099, 12, 31, 23, 59, 59)), 1, 2, ""),
            ("a clock that was never set", (NOON, datetime(2000, 1, 1), datetime(2009, 12, 31, 23, 59)), 1, 2, ""),
            ("the oldest", (NOON, datetime(2010, 1, 1)), 2, 0, ""),
            ("nothing left", (datetime(2098, 1, 1), datetime(2098, 1, 2)), 0, 2, ""),
        ):
            with self.subTest(name):
                code, out, err = self.run_over(*(self.reading(when, 1) for when in times), now=self.START + 86400)
                self.assertEqual((code, out.count("\nmeter_power_generation_watts{")), (int(not kept), kept), err)
                self.assertEqual(f"{METER}: left out {left_out} readings that are later" in err, bool(left_out), err)
                found = re.findall("Wait until 2026-03-22 (.*) UTC before you move the blocks", err)
                self.assertEqual(found, [wait] if wait else [])
                self.assertEqual("drops the live samples of all series" in err, bool(wait))

    def test_recording(self) -> None:
        """A recording of packets is taken as a capture is; its readings are of the day on which it was made."""
        with mock.patch.object(sems.time, "time", lambda: 2e9):
            code, out, err = called("backfill", "-", stdin=inflated(CAPTURES[1][2]), env={"TZ": "UTC0"})
        self.assertEqual((code, out.count("\nmeter_power_export_watts{"), out[-6:]), (0, 1, "# EOF\n"), err)

    def test_refused(self) -> None:
        """A zone that the system does not know, a file without a frame, no readings: exit code 1, one line, no text."""
        directory = self.directory()
        good = written(directory, frame(), name="good")
        settings = written(directory, frame(sems.SETTINGS), name="settings")
        junk = written(directory, spoilt(frame()), name="junk")
        for paths, zone, wanted in (
            ([good], "Nowhere/Town", "TZ=Nowhere/Town is no time zone"),
            ([good, junk], "UTC0", f"not a single good frame in {junk}"),
            ([settings], "UTC0", f"{settings}: no readings"),
            (["-"], "UTC0", "-: no readings"),
        ):
            with self.subTest(wanted):
                code, out, err = called("backfill", *paths, env={"TZ": zone}, stdin=ack_of(frame()))
                self.assertEqual((code, out, err.count("\n")), (1, "", 1), err)
                self.assertIn(wanted, err)


# -------------------------------------------------------------------------------------- simulator, demo and doctor


class SimulatorTest(SocketCase):
    """The simulated house, alone and as a program."""

    def readings(self, hybrid: bool, minutes: int = 5) -> list:
        """(time, house, family to its values) through a day."""
        devices, found = sems.simulated_house(4, hybrid), []
        for step in range(24 * 60 // minutes):
            when, house, values = datetime(2026, 6, 1) + timedelta(minutes=minutes * step), devices[0].house, {}
            house.move(when)
            for device in devices:
                data = device.frame(sems.LIVE, when)
                if data:
                    packet = sems.decode(data, sems.OUTBOUND)
                    name = sems.family(device.model.cls, device.serial)
                    values[name] = sems.reading(name, sems.registers(packet.clear)).values
            found.append((when, dict(house.flows(), stored=house.stored), values))
        return found

    def test_a_day_adds_up(self) -> None:
        """Energy is power over time, counters only rise, and a night has no sun."""
        words = ("export", "import", "generation")
        kit = {word: f"meter_energy_{word}_decawatt_hours_total" for word in words}
        battery = {word: f"battery_energy_{word}_watthours_total" for word in ("charge", "discharge")}
        inverter = {"generation": "inverter_energy_output_hectowatt_hours_total"}
        for name, counted in (("HK1000", kit), ("HYBRID", {**kit, **inverter, **battery})):
            with self.subTest(name):
                day, held = self.readings(name == "HYBRID"), {}
                for when, flows, values in day:
                    self.assertAlmostEqual(flows["export"], flows["generation"] - flows["load"] + flows["discharge"])
                    self.assertEqual("GRID" in values, name == "HK1000" and flows["generation"] > 0)
                    self.assertFalse(flows["generation"] > 0 and not 6 <= when.hour < 20)
                    for series, number in itertools.chain(*(several.items() for several in values.values())):
                        if series[0].endswith("_total"):
                            self.assertGreaterEqual(number, held.get(series, 0), series)
                            held[series] = number
                energy = {flow: sum(max(flows[flow], 0) / 12 for _, flows, _ in day[:-1]) for flow in counted}
                for flow, metric in counted.items():
                    gained = (day[-1][2][name][metric, ""] - day[0][2][name][metric, ""]) * sems.watt_hours(metric)
                    self.assertAlmostEqual(gained, energy[flow], delta=110, msg=flow)
                self.assertGreater(energy["generation"], 3000)
                if name == "HYBRID":
                    self.assertGreater(energy["discharge"], 1000)
                    stored = 4000 + energy["charge"] - energy["discharge"]
                    self.assertAlmostEqual(day[-1][1]["stored"], stored, delta=600)

    def test_serial_numbers(self) -> None:
        """No two devices of any houses end alike."""
        for hybrid in (False, True):
            houses = [sems.simulated_house(house, hybrid) for house in range(20)]
            serials = [device.serial for devices in houses for device in devices]
            self.assertEqual(len({serial[-4:] for serial in serials}), len(serials))
            self.assertTrue(all(re.fullmatch("[A-Z0-9]{16}", serial) for serial in serials))

    def test_demo(self) -> None:
        """Meter and inverter agree on today by the demo's clock; a port in use is passed over."""
        holder = socket.socket()
        self.addCleanup(holder.close)
        with contextlib.suppress(OSError):  # in use already
            holder.bind((LOCAL, 20001))
            holder.listen()
        process = self.process(
            "demo", before="sems.PACE = ((0, 10), (260, 24))"
        )  # the sun is high: energy comes sooner
        text = ""
        while "Ctrl-C" not in text:
            line = process.popen.stdout.readline().decode()
            self.assertTrue(line, process.stderr())
            text += line
        web = int(re.search(r"localhost:(\d+)/metrics", text)[1])
        self.assertNotIn(" 127.0.0.1:20001 ", text)
        self.assertRegex(text, r"Port 20001 is in use, the demo takes \d+\.")

        def told() -> dict:
            """The house and its devices, when both have generated something today."""
            found = json.loads(http_get(web, "/api/household")[2])
            today = [figures.get("generated_today_kilowatt_hours", 0) for figures in found["devices"].values()]
            return found if len(today) == 2 and min(today) >= 0.1 else {}

        found = until(told, 20)
        one, other = (figures["generated_today_kilowatt_hours"] for figures in found["devices"].values())
        self.assertAlmostEqual(one, other, delta=0.101)
        house = found["house"]
        self.assertAlmostEqual(house["generation_watts"], house["house_watts"] + house["export_watts"], places=3)
        self.assertEqual(len({serial[-8:] for serial in found["devices"]}), 2)
        metrics = metrics_of(http_get(web, "/metrics")[2].decode())
        self.assertGreater(summed(metrics, "sems_mitm_acks_total"), 2)
        for name in ("sems_mitm_rejected_values_total", "inbound_unknown_packets_total"):
            self.assertEqual(summed(metrics, name), 0)
        offsets = [number for series, number in metrics.items() if series.startswith("sems_mitm_device_clock_offset")]
        self.assertTrue(all(abs(offset) < 600 for offset in offsets), offsets)
        self.assertEqual((process.stop(signal.SIGINT), process.stderr()), (0, ""))

    def test_a_day_in_four_minutes(self) -> None:
        """The demo's clock begins at midnight; the sun is up within 20 s, the day whole after 4 minutes, and another follows."""
        for zone in ("UTC", BERLIN, "NPT-5:45"):
            with self.subTest(zone), time_zone(zone):
                now, clock = time.monotonic(), sems.day_clock()
                midnight = datetime.now().replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
                hour = lambda after: (clock(now + after) - midnight) / 3600
                self.assertAlmostEqual(hour(0), 0, delta=0.01)
                self.assertGreater(hour(20), 6.6)
                self.assertTrue(23.5 < hour(240) < 24, hour(240))
                self.assertTrue(24 < hour(280) < 48)
                self.assertAlmostEqual(hour(100 + sems.PACE[-1][0]) - hour(100), 24)
                hours = [hour(after / 4) for after in range(-8, 4 * 600)]
                self.assertEqual(hours, sorted(hours))
                self.assertEqual(clock(float("-inf")), float("-inf"))


class WebServer(threading.Thread):
    """A program that gives the same answer to everything, and hangs up."""

    def __init__(self, answer: bytes) -> None:
        super().__init__(daemon=True)
        self.answer, self.listening = answer, socket.create_server((LOCAL, 0))
        self.port = self.listening.getsockname()[1]
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self.listening.accept()
                with sock, contextlib.suppress(OSError):
                    sock.recv(4096)
                    sock.sendall(self.answer)

    def close(self) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.join()


class DoctorTest(SocketCase):
    """sems_mitm.py doctor."""

    def doctor(self, *arguments: str, env: dict | None = None) -> tuple:
        code, out, err = called("doctor", *arguments, env={"TZ": "UTC0", **(env or {})})
        self.assertEqual(err, "")
        for line in out.splitlines():
            self.assertRegex(line, r"^(ok|warn|fail) +\S|^ +-> \S|^$|^\d+ ok, warnings: \d+, errors: \d+$")
        return code, out

    def free(self) -> list:
        """Flags of ports that nothing uses."""
        with socket.socket() as one, socket.socket() as other:
            for sock in (one, other):
                sock.bind((LOCAL, 0))
            ports = [f"{LOCAL}:{sock.getsockname()[1]}" for sock in (one, other)]
        return [f"--sems.listen-address={ports[0]}", f"--web.listen-address={ports[1]}"]

    def test_running_exporter(self) -> None:
        """With exporter, device and portal there is no error, and the device is shown."""
        portal = self.portal()
        running = self.exporter(portal)
        running.device(frame())
        until(lambda: running.value("meter_metrics_packets_total") == 1)
        ports = f"--sems.listen-address={LOCAL}:{running.port}", f"--web.listen-address={LOCAL}:{running.web_port}"
        code, out = self.doctor(*ports)  # the portal's address is the exporter's to tell
        self.assertEqual((code, out.count("in use, and an exporter runs"), "fail" in out), (0, 2, False), out)
        self.assertIn(f"ok    HomeKit 1000 Smart Meter {METER}: last packet", out)
        self.assertIn(f"ok    the portal answers at 127.0.0.1:{portal.port}", out)
        code, out = self.doctor(self.free()[0], ports[1])
        self.assertIn("is free, though an exporter runs\n      -> start doctor with the exporter's --sems.listen", out)

    def test_findings(self) -> None:
        """What it says when something is missing: flags, environment, exit code, texts."""
        portal, away = self.portal(), self.portal(listening=False)
        server = NameServer(lambda query: [address_record(query, LOCAL)])
        self.addCleanup(server.close)
        for name, flags, environment, code, *wanted in (
            ("nothing runs", ["--sems.mode=local"], {}, 0, "warn  no exporter runs", "-> start it", "ok    mode local"),
            ("a port in use", ["--sems.mode=local", f"--sems.listen-address={LOCAL}:{portal.port}"], {}, 1, "fail  port", "is in use", "ss -ltnp"),
            ("no such address", ["--sems.mode=local", "--web.listen-address=192.0.2.1:1"], {}, 1, "fail  port 192.0.2.1:1 cannot be had", "--web.listen-address"),
            ("a portal that is there", [f"--sems.upstream={LOCAL}:{portal.port}"], {}, 0, "ok    the portal is given as", "ok    the portal answers"),
            ("a portal that refuses", [f"--sems.upstream={LOCAL}:{away.port}"], {}, 1, "fail  the portal at", "--sems.mode spool"),
            ("no such zone", ["--sems.mode=local"], {"TZ": "Nowhere/Town"}, 1, "fail  TZ=Nowhere/Town is no time zone", "CET-1CEST"),
            ("overridden everywhere", ["--sems.upstream=portal.test:1", f"--sems.upstream-dns={server.text}"], {}, 1, "leads a device nowhere", "overridden too", "--sems.upstream-dns"),
        ):  # fmt: skip
            with self.subTest(name):
                here = lambda host, port: [sems.Endpoint(socket.AF_INET, (LOCAL, port))]
                with mock.patch.object(sems, "system_addresses", here):
                    found, out = self.doctor(*self.free(), *flags, env=environment)
                self.assertEqual(found, code, out)
                for text in wanted:
                    self.assertIn(text, out)

    def test_names(self) -> None:
        """What the name service's answer for the portal means."""
        rows = (  # addresses, those of this machine, in a container, state and words of the findings
            ([], [], False, ("warn", "has no address")),
            (["127.0.0.1"], [], False, ("warn", "leads a device nowhere")),
            (["0.0.0.0"], [], False, ("warn", "leads a device nowhere")),
            (["192.168.1.2"], ["192.168.1.2"], False, ("ok", "an override that leads here")),
            (["192.168.1.2", "2606:4700::1"], ["192.168.1.2"], False, ("ok", "leads here"), ("warn", "IPv6")),
            (["8.8.8.8"], [], False, ("warn", "no override")),
            (["192.168.1.9"], [], False, ("warn", "not this machine")),
            (["192.168.1.9"], [], True, ("ok", "right if that is the host")),
        )
        for system, own, container, *wanted in rows:
            with self.subTest(system=system, container=container), contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(sems, "is_this_machine", own.__contains__))
                stack.enter_context(mock.patch.object(sems, "in_container", lambda answer=container: answer))
                found = list(sems.system_findings("portal.test", system))
                self.assertEqual([state for state, _, _ in found], [state for state, _ in wanted])
                for (_, said, _), (_, text) in zip(found, wanted):
                    self.assertIn(text, said)

    def test_what_a_running_exporter_tells(self) -> None:
        """A loop is a failure; an inverter may sleep, a meter does not; a container publishes its ports."""
        settings = sems.serve_settings([], {})
        device = {"device": "meter", "model": "m", "full_serial": METER, "age_seconds": 1, "up": True}
        silent = {**device, "up": False, "age_seconds": 7200}
        for loops, devices, *wanted in (
            (0, [device], ("ok", "last packet 1 second ago", "")),
            (3, [device], ("fail", "has met itself", "DNAT"), ("ok", METER, "")),
            (0, [silent], ("warn", "2 hours ago", "^look at its Wi-Fi")),
            (0, [{**silent, "device": "inverter"}], ("warn", "2 hours ago", "^an inverter sleeps at night")),
            (0, [], ("warn", "no device has connected yet", "power-cycle")),
        ):
            with self.subTest(wanted):
                page = f'sems_mitm_refused_connections_total{{reason="loop"}} {loops}\n'.encode()
                with mock.patch.object(sems, "local_get", return_value=page):
                    found = list(sems.device_findings(settings, {"devices": devices}))
                self.assertEqual([state for state, _, _ in found], [state for state, _, _ in wanted])
                for (_, said, next_step), (_, text, step) in zip(found, wanted):
                    self.assertIn(text, said)
                    self.assertRegex(next_step, step or "^$")
        with mock.patch.object(sems, "in_container", return_value=True):
            self.assertIn("-p 20001:20001 -p 14028:14028", next(sems.machine_findings(settings, None))[2])

    def test_another_program(self) -> None:
        """A web server on the exporter's port is no exporter, whatever it answers; nor is one that says nothing."""
        ours = {"devices": [], "upstream": {"mode": "local", "address": ""}}
        device = {"device": "meter", "model": "m", "full_serial": METER, "up": True, "age_seconds": 1}
        policy = "Content-Security-Policy: default-src 'self'\r\n"
        for name, body, is_ours in (
            ("an exporter", ours, True), ("with a device", {**ours, "devices": [device]}, True), ("a page", "<html>", False), ("nothing", None, False), ("other JSON", {"devices": []}, False),
            ("a list", [ours], False), ("a number", 5, False), ("other types", {"devices": 3, "upstream": {"mode": "local", "address": ""}}, False), ("an upstream that is a text", {**ours, "upstream": "mode address"}, False),
            ("an unknown mode", {**ours, "upstream": {"mode": "proxy", "address": ""}}, False), ("other devices", {**ours, "devices": [{"id": 1}]}, False), ("devices that are texts", {**ours, "devices": ["a"]}, False), ("deep", "[" * 100000, False),
        ):  # fmt: skip
            text = body if isinstance(body, str) else json.dumps(body)
            server = WebServer(b"" if body is None else f"HTTP/1.1 200 OK\r\n{policy}\r\n{text}".encode())
            self.addCleanup(server.close)
            settings = sems.serve_settings([f"--web.listen-address={LOCAL}:{server.port}"], {})
            with self.subTest(name):
                self.assertEqual(sems.running_exporter(settings), body if is_ours else None)
                if not is_ours:
                    code, out = self.doctor(
                        "--sems.mode=local", self.free()[0], f"--web.listen-address={LOCAL}:{server.port}"
                    )
                    self.assertEqual((code, "warn  no exporter runs" in out), (1, True), out)
                    self.assertIn("another program answers there" if body is not None else "is in use", out)

    def test_strangers(self) -> None:
        """Modules that speak something else are named, with what they said."""
        settings = sems.serve_settings([], {})
        for said, words in (
            ("tls", "begins TLS"),
            ("nothing", "sends nothing"),
            ("other", "sends no frame"),
            ("new", "sends no frame"),
        ):
            with self.subTest(said):
                running = {"devices": [], "strangers": [{"host": "192.168.1.7", "said": said}]}
                with mock.patch.object(sems, "local_get", return_value=b""):
                    found = list(sems.device_findings(settings, running))
                self.assertEqual([state for state, _, _ in found], ["warn"])
                self.assertIn(f"192.168.1.7 connects and {words}", found[0][1])
                self.assertIn("WLA", found[0][2])

    def test_redirected_dns(self) -> None:
        """A name that does not exist points to a firewall first."""
        with mock.patch.object(sems, "ask_dns", return_value=[]):
            state, text, step = sems.server_finding(("1.1.1.1", 53), "portal.test")
        self.assertEqual((state, text), ("warn", "1.1.1.1:53 says that portal.test does not exist"))
        self.assertRegex(step, "^most likely a firewall redirects port 53")

    def test_wrong_clock(self) -> None:
        """A clock before the version's release is wrong."""
        self.limits(RELEASED=time.time() + 86400)
        code, out = self.doctor("--sems.mode=local", *self.free())
        self.assertEqual(code, 1, out)
        self.assertIn("fail  this machine's clock is wrong", out)


# --------------------------------------------------------------------------------------------- the README's tables


def markdown(heads: tuple, rows) -> str:
    """A table in Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def flags_table() -> str:
    rows = []
    for name, default, reader, _, text in sems.FLAGS:
        spelled = f"`--{name}` / `--no-{name}`" if reader in sems.SWITCHES else f"`--{name}`"
        shown = f"`{default}`" if default else "(all)" if reader is sems.networks else "(off)"
        rows.append((spelled, f"`{sems.variable(name)}`", shown, text))
    return markdown(("flag", "variable", "default", "meaning"), rows)


# The metrics that the original exporter documents: what its users' dashboards name.
ORIGINAL = [
    "meter_energy_export_decawatt_hours_total",
    "meter_energy_import_decawatt_hours_total",
    "meter_power_export_watts",
    "meter_energy_generation_decawatt_hours_total",
    "meter_power_generation_watts",
    "inverter_input_voltage_dc_decivolts",
    "inverter_input_current_dc_deciamps",
    "inverter_output_voltage_ac_decivolts",
    "inverter_output_current_ac_deciamps",
    "inverter_output_frequency_ac_centihertz",
    "inverter_power_output_watts",
    "inverter_energy_output_hectowatt_hours_day",
    "inverter_energy_output_hectowatt_hours_total",
    "inverter_uptime_hours_total",
    "inverter_internal_temperature_decidegrees_celsius",
    "inverter_rssi_percent",
    "meter_time_sync_packets_total",
    "inverter_time_sync_packets_total",
    "meter_metrics_packets_total",
    "inverter_metrics_packets_total",
    "meter_time_sync_ack_packets_total",
    "outbound_unknown_packets_total",
    "inbound_unknown_packets_total",
]


def metrics_table() -> str:
    told = {row[0]: row for row in sems.metric_rows()}
    rows = [(f"`{name}`", *(told[name][column] for column in (1, 3, 4, 5))) for name in ORIGINAL]
    return markdown(("metric", "type", "unit", "meaning", "families"), rows)


def with_tables(text: str) -> str:
    """The README with its tables as the code has them."""
    for name, table in (("flags", flags_table), ("metrics", metrics_table)):
        text = re.sub(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", lambda _, table=table: table(), text)
    return text


class Readme(unittest.TestCase):
    """What the README says of the program is what the program says."""

    def test_tables(self) -> None:
        """Its tables are the code's, every flag and command stands in it, and it stays a read of an evening."""
        path = os.path.join(os.path.dirname(os.path.abspath(sems.__file__)), "README.md")
        if not os.path.exists(path):
            self.skipTest("the README is not here")
        with open(path, encoding="utf-8") as file:
            text = file.read()
        self.assertEqual(with_tables(text), text, "make tables writes them")
        self.assertLessEqual(text.count("\n"), 500)
        for word in (*(f"--{row[0]}" for row in sems.FLAGS), *sems.COMMANDS):
            self.assertIn(word, text)
        more = len(sems.METRICS) - len(ORIGINAL)
        self.assertIn(f"There are {more} more", text)


def write_tables() -> None:
    path = os.path.join(os.path.dirname(os.path.abspath(sems.__file__)), "README.md")
    with open(path, "r+", encoding="utf-8") as file:
        text = with_tables(file.read())
        file.seek(0)
        file.truncate()
        file.write(text)


if __name__ == "__main__":
    if sys.argv[1:] == ["tables"]:
        write_tables()
    else:
        unittest.main()
