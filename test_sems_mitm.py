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
import gc
import gzip
import hashlib
import html
import http.client
import io
import ipaddress
import itertools
import json
import logging
import os
import pathlib
import py_compile
import random
import re
import select
import selectors
import shlex
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
import warnings
import zlib
from datetime import datetime, timedelta, timezone
from unittest import mock

import sems_mitm as sems

# --------------------------------------------------------------------------------------------------------- frames

OUT, IN = sems.OUTBOUND, sems.INBOUND
METER, OTHER, INVERTER, HYBRID = "91000HKU00000042", "91000HKU00000043", "53000DSC00000042", "9010KETU00000042"
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
FAILURES = "sems_mitm_upstream_connect_failures_total"
FAMILIES = [LOCAL, *(["::1"] if os.path.exists("/proc/net/if_inet6") and socket.has_ipv6 else [])]
PATIENCE = float(os.environ.get("TEST_PATIENCE", "30"))  # how long a test waits for a state


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


def metrics_of(text: str) -> dict:
    """Series to value of an exposition."""
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    return {series: float(value) for series, value in samples}


def summed(metrics: dict, series: str, **labels: str) -> float:
    """Sum of a metric's samples that have these labels."""
    wanted = [f'{name}="{text}"' for name, text in labels.items()]
    names = (name for name in metrics if name.partition("{")[0] == series)
    return sum(metrics[name] for name in names if all(one in name for one in wanted))


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

    def expect(self, data: bytes) -> None:
        """Just these bytes come next."""
        if (got := self.read(len(data))) != data:
            raise AssertionError(f"{got.hex()} and not {data.hex()}")

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


# Habits of a portal, what it does with a frame: it gives what is sent back, or what is done with the connection.
nack, silence = (lambda data: ack_of(data, 2)), (lambda data: b"")
closes, resets = (lambda data: Peer.close), (lambda data: Peer.reset)


def but_for(one: bytes, habit):
    """A portal's habit for one frame; to all others it says ACK."""
    return lambda data: habit(data) if data == one else ack_of(data)


class Portal:
    """A portal on a port of its own, in the test's hand (`accept`), or served by a thread according to its habit.

    While it does not listen, connections are refused. `got` has all frames in the order in which they came, `legs` says
    how many connections there were. While a test holds the lock, the thread does nothing.
    """

    def __init__(self, listening: bool = True, host: str = LOCAL, habit=None) -> None:
        self.host, self.port, self.peers, self.listens, self.over = host, 0, [], False, False
        self.habit, self.got, self.legs, self.lock = habit, [], 0, threading.RLock()
        self._bind()
        if listening:
            self.listen()
        self.thread = threading.Thread(target=self._serve, name="portal", daemon=True)
        if habit:
            self.thread.start()

    def _bind(self) -> None:
        self.sock, self.listens = socket.socket(), False
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.sock.bind((self.host, self.port))
        self.port = self.sock.getsockname()[1]
        self.sock.settimeout(PATIENCE)

    def listen(self, backlog: int = 128) -> None:
        with self.lock:
            self.sock.listen(backlog)
            self.listens = True

    def black_hole(self) -> None:
        """From now on connections are neither accepted nor refused."""
        self.listen(0)
        for _ in range(3):
            self.peers.append(Peer(socket.socket()))
            self.peers[-1].sock.setblocking(False)
            self.peers[-1].sock.connect_ex((self.host, self.port))

    def accept(self) -> Peer:
        self.peers.append(Peer(self.sock.accept()[0]))
        self.legs += 1
        return self.peers[-1]

    def receives(self, data: bytes) -> Peer:
        """The next connection, which begins with these bytes."""
        leg = self.accept()
        leg.expect(data)
        return leg

    def unasked(self, seconds: float = 0.08) -> bool:
        """Whether nobody connects for so long."""
        return Peer(self.sock).silent(seconds)

    def die(self) -> None:
        """Lose all connections at once, and refuse new ones."""
        with self.lock:
            while self.peers:
                self.peers.pop().reset()
            with contextlib.suppress(OSError):  # the thread can still wait for it
                self.sock.shutdown(socket.SHUT_RDWR)
            self.sock.close()
            self._bind()

    def _serve(self) -> None:
        buffers: dict = collections.defaultdict(bytearray)
        while not self.over:
            waiting = select.poll()
            with self.lock:
                listening = self.sock if self.listens else None
                for sock in [*([listening] if listening else []), *(peer.sock for peer in self.peers)]:
                    waiting.register(sock, select.POLLIN)
            ready = {number for number, _ in waiting.poll(10)}
            with self.lock:
                for peer in self.peers[:]:
                    if peer.sock.fileno() in ready and not self._hear(peer, buffers[peer]):
                        peer.close()
                        self.peers.remove(peer)
                if self.sock is listening and listening.fileno() in ready:
                    self.accept()

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
        self.over = True
        if self.habit:
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

    def emptied(self) -> None:
        """Wait until nothing waits for the portal."""
        until(lambda: not self.queued(), pause=0.01)

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
        code = f"import sys; sys.path[0] = {compiled()!r}; import sems_mitm as sems; {before}\nsys.exit(sems.main())"
        start = [*under, sys.executable, "-W", "error", "-c", code, *arguments]
        files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": self.log}
        self.popen = subprocess.Popen(start, env={**os.environ, **environment}, **files)
        self.devices: list = []
        self._ports: tuple = ()

    def ports(self) -> tuple:
        """Where devices connect, and of HTTP, when the exporter has said so."""
        pattern = r"devices connect to port (\d+), metrics at http://[^:]*:(\d+)"
        if not self._ports:
            until(lambda: re.search(pattern, self.stderr()) or self.popen.poll() is not None)
            self._ports = re.search(pattern, self.stderr()).groups()
        return self._ports

    port = property(lambda self: int(self.ports()[0]))
    web_port = property(lambda self: int(self.ports()[1]))

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
        for one in (
            mock.patch.dict(os.environ, {**clean, **(env or {})}, clear=True),
            mock.patch.object(sems, "started", side_effect=AssertionError("these settings were accepted")),
            mock.patch.object(logging, "basicConfig"),
            mock.patch.object(sys, "stdin", mock.Mock(buffer=io.BytesIO(stdin))),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            stack.enter_context(one)
        try:
            code = sems.main(list(arguments))
        except SystemExit as end:
            code = end.code or 0
    return code, out.getvalue(), err.getvalue()


class SocketCase(unittest.TestCase):
    """Exporters, portals and processes that end with the test; log lines in self.lines; short times between attempts."""

    def setUp(self) -> None:
        self.lines, handler = [], logging.Handler()
        handler.emit = lambda entry: self.lines.append(handler.format(entry))
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

    def unused_port(self) -> int:
        with contextlib.closing(Portal(listening=False)) as unused:
            return unused.port

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
        device, leg = running.device(frame()), portal.receives(frame())
        return portal, running, device, leg

    def serving(self, portal=None, *flags: str, **more) -> Process:
        """The exporter as a process on free ports."""
        upstream = [f"--sems.upstream={portal.host}:{portal.port}"] if portal else []
        return self.process(*upstream, *PORTS, *flags, **more)

    def again_and_again(self, work):
        """Have a thread do work until the test ends, or calls what is returned."""
        over = threading.Event()

        def run() -> None:
            while not over.is_set():
                work()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        stop = lambda: over.set() or thread.join(PATIENCE)
        self.addCleanup(stop)
        return stop

    def directory(self) -> str:
        path = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, path, ignore_errors=True)
        return path


# ---------------------------------------------------------------------------------------------- registers, metrics


class Registers(unittest.TestCase):
    """The tables of what there is to know."""

    def test_tables(self):
        """A row has a column a head; a place of it a kind, a register a label, and a condition for all or a label."""
        form = r"(\w+?)(?:\*\d+)?(?:/\d+)?((?: (?:\d+\??|-))+)(?: if((?: \d+(?:=[1-9]|>0))+))?"
        for heads, rows in sems.TABLES:
            for metric, labels, *reads, _ in rows:
                with self.subTest(metric):
                    self.assertEqual(len(reads), len(heads))
                    count = max(len(labels.split()) - 1, 1)
                    for place in ", ".join(filter(None, reads)).split(", "):
                        kind, registers, conditions = re.fullmatch(form, place).groups("")
                        self.assertIn(kind, sems.KINDS)
                        self.assertEqual(len(registers.split()), count)
                        self.assertIn(len(conditions.split()), (0, 1, count))
        for family, values in sems.VALUES.items():
            series = collections.Counter((value.series, value.instead) for value in values)
            self.assertEqual({*series.values()}, {1}, family)

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
                register, allowed = value.when or (0, (0,))
                words[register] = allowed[0]
                with self.subTest(family, series=value.series):
                    self.assertEqual(sems.reading(family, words).values[value.series], value.multiply / value.divide)

    def test_readings(self):
        """How words become a number, in each family and kind; None is no sample, "bad" is one counted as not finite."""
        wh, hwh = "meter_energy_export_decawatt_hours_total", "inverter_energy_output_hectowatt_hours_total"
        none, minus, var = 0xFFFF, 0xFFFE, "inverter_reactive_power_vars"
        for family, words, metric, labels, wanted in (
            ("HK1000", {2048: 1, 2049: 2, 2050: 3}, wh, "", 2**32 + 2 * 65536 + 3),
            ("HK1000", {2048: none, 2049: none, 2050: none}, wh, "", None),
            ("HK1000", {2049: 0, 2050: 3}, wh, "", None),
            ("HK1000", {2107: none, 2108: none}, "meter_power_generation_watts", "", -1),
            ("GRID", {30105: 66}, "inverter_string_voltage_volts", 'string="2"', 6.6),
            ("GRID", {30141: none}, "inverter_internal_temperature_decidegrees_celsius", "", None),
            ("GRID", {30145: 0, 30146: none}, hwh, "", 65535),
            ("GRID", {30145: none, 30146: none}, hwh, "", None),
            ("GRID", {30135: none, 30136: none}, var, "", None),
            ("GRID", {30135: none, 30136: minus}, var, "", -2),
            ("GRID", {30127: none, 30128: none}, "inverter_power_output_watts", "", None),
            ("GRID", {30137: 0, 30138: none}, "inverter_input_power_watts", "", None),
            ("GRID", {30137: 0, 30138: minus}, "inverter_input_power_watts", "", 65534),
            ("GRID", {30195: 0, 30196: 9, 30209: 1}, "inverter_meter_power_watts", "", 9),
            ("GRID", {30195: 0, 30196: 9, 30209: 2}, "inverter_meter_power_watts", "", None),
            ("GRID", {30141: 0x7FFF}, "inverter_internal_temperature_decidegrees_celsius", "", None),
            ("HYBRID", {35175: 0xFFF6}, "inverter_module_temperature_celsius", "", -1),
            ("HYBRID", {35138: none}, "inverter_power_output_watts", "", -1),
            ("HYBRID", {35181: none, 35184: 1}, "battery_current_amperes", 'battery="1"', -0.1),
            ("HYBRID", {35181: none, 35184: 0}, "battery_current_amperes", 'battery="1"', None),
            ("HYBRID", {35181: none, 35184: none}, "battery_current_amperes", 'battery="1"', None),
            ("HYBRID", {35181: none, 35266: 1}, "battery_current_amperes", 'battery="1"', None),
            ("HYBRID", {39005: 50, 35266: 1}, "battery_state_of_charge_ratio", 'battery="2"', 0.5),
            ("HYBRID", {39005: 50, 35184: 1}, "battery_state_of_charge_ratio", 'battery="2"', None),
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
        for name, label, values in sems.FIXED:  # what starts at 0
            self.assertEqual((sems.METRICS[name][0], "," in label, values == sems.ALONE), ("counter", False, not label))


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
    PUBLISHED = (  # key, IV, clear text, cipher text: NIST SP 800-38A F.2.1 and F.2.2, FIPS 197 C.1
        ("2b7e151628aed2a6abf7158809cf4f3c", "000102030405060708090a0b0c0d0e0f",
         "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e5130c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710",
         "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b273bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7"),
        ("000102030405060708090a0b0c0d0e0f", "00" * 16, "00112233445566778899aabbccddeeff", "69c4e0d86a7b0430d8cdb78070b4c55a"),
    )  # fmt: skip

    def test_published(self):
        """Published vectors, one to four blocks."""
        for row in self.PUBLISHED:
            key, iv, clear, cipher = map(bytes.fromhex, row)
            for size in range(16, len(clear) + 1, 16):
                self.assertEqual(sems.encrypt(clear[:size], iv, key), cipher[:size])
                self.assertEqual(sems.decrypt(cipher[:size], iv, key), clear[:size])

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
    ("frames of several sizes",            OUT, [("frame", FRAME), ("frame", SHORT), ("frame", EMPTY), ("frame", SHORT)], []),
    ("13 bytes",                           OUT, [("frame", TINY), ("frame", TINY)], []),
    ("a length of 8 KiB",                  OUT, [("frame", whole(8192 + 13))], []),
    ("a length of one more",               OUT, [("junk", claim(8193 + 13, b"x" * 40)), ("frame", FRAME)], []),
    ("a length of all ones",               OUT, [("junk", b"POSTGW" + b"\xff" * 4), ("frame", FRAME)], []),
    ("a bad CRC",                          OUT, [("malformed", BAD)], []),
    ("bad between good",                   OUT, [("frame", FRAME), ("malformed", BAD), ("frame", FRAME)], []),
    ("a bad one of 13 bytes",              OUT, [("malformed", spoilt(TINY)), ("frame", SHORT)], []),
    ("junk before",                        OUT, [("junk", b"\0GET / HTTP/1.1\r\n"), ("frame", FRAME)], []),
    ("junk alone",                         OUT, [("junk", b"hello")], []),
    ("junk behind a bad one",              OUT, [("malformed", spoilt(SHORT)), ("junk", b"hello"), ("frame", SHORT)], []),
    ("a bad one behind junk",              OUT, [("junk", b"hello"), ("malformed", BAD), ("junk", b"hello"), ("malformed", BAD)], []),
    ("a prefix within a prefix",           OUT, [("junk", b"POSTPOST"), ("frame", FRAME)], []),
    ("a frame in a good one",              OUT, [("frame", whole(300, b"x" * 9 + SHORT))], []),
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
    ("a byte of junk",                     IN,  [("frame", ACK), ("junk", b"\0")], []),
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
        self.assertEqual(sems.PATIENCE, {"outbound": 30, "inbound": 5})
        reads = (FRAME[:9], FRAME[9:20], FRAME[20:] + SHORT[:5], SHORT[5:], b"POS")
        for count, begin in ((1, 0), (2, 0), (3, 2), (4, 3), (5, 4)):
            framer = sems.Framer(OUT)
            for now, data in enumerate(reads[:count]):
                framer.feed(data, float(now))
            with self.subTest(reads=count):
                rest = framer.rest
                self.assertEqual(framer.expire(begin + 29.9), [])
                self.assertEqual([data for _, data in framer.expire(begin + 30)], [rest] if rest else [])

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
                    with self.assertRaises(sems.ProtocolError):
                        sems.address_of(data, OUT)
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
            live.take(
                sems.reading(sems.family(where.cls, where.serial), sems.registers(packet.clear)), 0.0, 0.0, NOON, None
            )


# -------------------------------------------------------------------------------------- readings, identity, time, bat


class Readings(unittest.TestCase):
    def test_exact(self):
        """Values are written as exact decimals."""
        for i in range(0, 65535, 7):
            found = sems.reading("GRID", {30105: i}).values["inverter_string_voltage_volts", 'string="2"']
            self.assertEqual(f"{found}", f"{i // 10}.{i % 10}")
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
        live.take(sems.reading("GRID", {**dict.fromkeys(range(10000, 10200), 7), 9000: 5}), 0.0, 0.0, NOON, None)
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
            ("a port alone", 4609, text("20001", 14), {"portal": "20001"}),
            ("a comma elsewhere", 30221, text("410,02065-04", 6), {"firmware": "410,02065-04"}),
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
            ("9300ADSN00000042", "", "GoodWe DSN"), ("912.5DSN00000042", "", "GoodWe DSN"), ("90000DSN00000042", "", "GoodWe DSN"),
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
        name = sems.identity("inverter", '9\\00"DSN000"\\  2', "GW")
        self.assertEqual(name, ("inverter", "GW", '000"\\ 2'))
        self.assertEqual(sems.device_labels(name), 'device="inverter",model="GW",serial="000\\"\\\\ 2"')

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
                before = frame(sems.BUFFERED, ranges=ranges, when=NOON.replace(hour=hour, minute=44))
                after = sems.with_bat(before)
                self.assertEqual((after[:52], sems.Framer(OUT).feed(after, 0)), (before[:52], [("frame", after)]))
                wanted = sems.registers(sems.decode(before, OUT).clear)
                for first, kilowatts in zip((2107, 2105), sems.bat(NOON.replace(hour=hour, minute=44))):
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


def exposed(store, now: float = 0.0) -> str:
    """What a scrape shows."""
    return "".join(sems.exposition(store.collect(now)))


def shown(store, now: float = 0.0) -> dict:
    """The same: series to value."""
    return metrics_of(exposed(store, now))


def value(store, series: str, now: float = 0.0, **labels: str) -> float:
    """The sum of a metric's samples that a scrape shows."""
    return summed(shown(store, now), series, **labels)


def only(store):
    """The one device there is."""
    (device,) = store.devices.values()
    return device


def serials(store) -> list:
    """The last characters of the devices that are shown."""
    return sorted(re.findall(r'full_serial="[^"]*(.)"', exposed(store)))


def named(name: str) -> bytes:
    """A grid-tied inverter's settings with a model name."""
    return sems.payload([(40173, sems.text_words(name, 16))])


def exports(when, count: int, *more: tuple) -> bytes:
    """A HomeKit's live frame whose export counter, ENERGY, stands at count."""
    return frame(when=when, ranges=[(2048, struct.unpack(">3H", count.to_bytes(6, "big"))), *more])


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


def apart(seconds: float, *numbers: float) -> list:
    """Readings so many seconds apart."""
    return [(i * seconds, number) for i, number in enumerate(numbers)]


def after(readings: list, seconds: float, more: list) -> list:
    """Readings, and more of them that begin so many seconds later."""
    return readings + [(readings[-1][0] + seconds + at, number) for at, number in more]


class HeldCountersTest(unittest.TestCase):
    """No kWh that was not there, and none lost."""

    def test_sequences(self):
        """What is shown of a sequence, and what increase() makes of it, beside the energy that was there."""
        minutes = lambda *numbers: apart(60, *numbers)
        known = minutes(58109, 58110)
        reset = after(after(known, 60, minutes(0, 1)), 540, apart(600, *range(2, 160)))
        table = (
            # readings; the last values that are shown; the energy that increase() tells
            ("rising", minutes(5, 6, 6, 9), [5, 6, 6, 9], 4),
            ("a fall of one, for a while", minutes(58110, *[58109] * 5, 58111), [58110] * 6 + [58111], 1),
            ("a fall of one behind 100 kWh", apart(HOUR, *range(0, 10100, 100), 9999, 10150), [10000, 10000, 10150], 10150),
            ("a fall of one, for ever", minutes(58110, *[58109] * 3000), [58110], 0),
            ("a fall to half, for a while", after(known, 60, minutes(*[29055] * 900, 58111)), [58111], 2),
            ("a fall to half, for ever", after(known, 60, apart(HOUR, *range(29055, 29155))), [58110], 1),
            ("a fall to 40 %, for ever", after(known, 60, apart(HOUR, *range(23244, 23344))), [58110], 1),
            ("a fall to 80 %, until it has caught up", after(known, 60, apart(HOUR, *range(46010, 58211, 100))), [58110, 58110, 58210], 101),
            ("once ten times as much", minutes(58110, 581100, 58111), [58110, 58110, 58111], 1),
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
            ("for days every second one 0", apart(HOUR, *(0 if i % 2 else 58110 + 100 * i for i in range(401))), [98110], 40000),
            ("a real reset", reset, [159], 1 + 159),
            ("a reset, for not quite a day", after(known, 60, apart(HOUR, *range(24))), [58110], 1),
            ("a reset, for a day", after(known, 60, apart(HOUR, *range(25))), [58110, 24], 1 + 24),
            ("two wrong ones that could be", after(known, HOUR, apart(HOUR, 68200, 58111, 78200, 58112)), [68200] * 4, 10091),
            ("one, and the truth goes by", after(known, HOUR, minutes(68200, 68150, 68250, 68251, 68252)), [68200] * 4 + [68252], 10143),
            ("a confirmed jump, the last too high", after(known, HOUR, apart(HOUR, 80000, 80001, 90000, 80002, 99000, 80003)), [90000] * 4, 31891),
            ("a reset to 40 %", after(minutes(999, 1000), HOUR, apart(HOUR, *range(400, 425))), [1000, 424], 1 + 424),
            ("a reset that rises too much", after(known, 60, apart(HOUR, *range(0, 13000, 500))), [58110], 1),
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
            ("u64", minutes(2**64 - 3, 2**64 - 2), [2**64 - 2], 1),
            ("f32, whose steps are wide", minutes(1677721.6, 1677721.8, 1677721.6, 1677722.0), [1677721.8, 1677721.8, 1677722.0], 0.4),
        )  # fmt: skip
        for name, readings, last, told in table:
            with self.subTest(name):
                counter, values = published(readings)
                self.assertEqual(values[-len(last) :], last)
                self.assertAlmostEqual(increase(values), told, places=6)
                # our own `today` is not taken in by a wrong first value
                self.assertAlmostEqual(counter.gained, 1 if name == "a first that was wrong" else told, places=6)

    def test_units(self):
        """How much a house can make counts in each counter's own unit."""
        for metric, seconds, most in (
            (ENERGY, HOUR, 10100), ("meter_channel_energy_export_watthours_total", HOUR, 101000),
            ("inverter_energy_output_hectowatt_hours_total", HOUR, 1010), ("inverter_uptime_hours_total", HOUR, 3),
            ("inverter_uptime_hours_total", QUARTER, 2 * QUARTER // HOUR + 1),
        ):  # fmt: skip
            with self.subTest(metric):
                shown_last = [published([(0, 7), (seconds, 7 + more)], metric)[1][-1] for more in (most, most + 1)]
                self.assertEqual(shown_last, [7 + most, 7])

    def test_groups(self):
        """Counters that are all 0 say nothing, each group by itself; one 0 among others is a value."""
        names = "inverter_energy_output_hectowatt_hours_total", "inverter_uptime_hours_total", ENERGY
        counters = [(name, "") for name in names]
        for name, readings, wanted, falls in (
            ("at dawn", [(900, 7, 50), (0, 0, 51), (0, 0, 52), (901, 8, 53)], [901, 8, 53], 0),
            ("at the very start", [(0, 0, 0), (0, 0, 0), (900, 7, 50)], [900, 7, 50], 0),
            ("at the start, of the meter alone", [(900, 7, 0)], [900, 7, None], 0),
            ("at the start, but for the meter", [(0, 0, 50)], [None, None, 50], 0),
            ("for two days", [(900, 7, 50), *[(0, 0, 50)] * 60, (901, 7, 50)], [901, 7, 50], 0),
            ("the energy alone", [(900, 7, 50), (0, 7, 51), (901, 7, 51)], [901, 7, 51], 1),
            ("of the meter", [(900, 7, 50), (900, 7, 0), (901, 7, 50)], [901, 7, 50], 0),
        ):
            with self.subTest(name):
                held, said = {}, []
                for i, numbers in enumerate(readings):
                    said += sems.judged(held, dict(zip(counters, numbers)), i * HOUR).values()
                self.assertEqual([held[one].shown.number if one in held else None for one in counters], wanted)
                self.assertEqual(said.count(sems.FALL), falls)
        for one in itertools.chain(*sems.VALUES.values()):  # the name says the group
            if one.counter and one.register >= 30000:
                self.assertEqual(one.series[0].startswith("meter_"), one.register >= 36000, one.series)

    @staticmethod
    def history(chance: random.Random) -> list:
        """(seconds, true number, number as it was read) of some weeks; the first two are true, and no two wrong ones in a row."""
        gaps = chance.sample((1, 60, 60, 600, HOUR, NIGHT, DAY, QUARTER), chance.randint(1, 4))
        kinds, often = chance.choice((range(9), [chance.randrange(9)])), chance.choice((0.4, 1))
        at, truth, found = 0, chance.choice((0, 3, 500, 5000, 9000, 58110, 10**7)), []
        for i in range(chance.randint(5, 60)):
            gap = chance.choice(gaps)
            at, truth = at + gap, truth + int(chance.random() * chance.choice((0, 1, 1000, 5000)) * gap / HOUR)
            less, more = (truth // 2, truth // 3, max(truth - 1, 0)), (truth + 300, truth + 9000, truth * 10)
            is_wrong = i >= 2 and found[-1][1] == found[-1][2] and chance.random() < often
            wrong = (0, 1, *less, *more, chance.randrange(2**32))[chance.choice(kinds)]
            found.append((at, truth, wrong if is_wrong else truth))
        return found + [(at + 60 * i, truth + 150 * i, truth + 150 * i) for i in range(1, 101)]  # it catches up

    def test_any_history(self):
        """Whatever the truth, and whichever single readings are wrong, every second one too: what is shown never falls, is never above the truth by more than the first rule allows, and ends at the truth."""
        for seed in range(1500):
            history = self.history(random.Random(seed))
            counter, values = published([(at, number) for at, _, number in history])
            above = max(number - truth for number, (_, truth, _) in zip(values, history))
            with self.subTest(seed=seed):
                self.assertEqual(values, sorted(values))
                self.assertLessEqual(above, 10100)
                self.assertEqual((values[-1], counter.gained), (history[-1][1], history[-1][1] - history[0][1]))


class DayTest(SocketCase):
    """Days begin at midnight where that was seen."""

    def test_days(self):
        """When counting began, and what was gained since, of a HomeKit that is looked at every half minute but for gaps."""
        for name, steps, since, gained in (  # steps: hours since noon, what the clock is then set on by, the counter
            ("the first reading", [(0, 0, 7)], 0, 0),
            ("over midnight", [(0, 0, 7), (11.9, 0, 9), (12.1, 0, 10)], None, 1),
            ("midnight, and nothing yet", [(0, 0, 7), (11.9, 0, 9), (12.1, 0, None)], None, 0),
            ("a silence over midnight", [(0, 0, 7), (11.1, 0, 9), (12.2, 0, 10)], 12.2, 0),
            ("a silence over midnight goes on", [(0, 0, 7), (11.1, 0, 9), (18, 0, None)], None, 0),
            ("a silence by day", [(0, 0, 7), (11.1, 0, 9)], 0, 2),
            ("a day without a reading", [(0, 0, 7), (11.9, 0, 9), (36.1, 0, 10)], 36.1, 0),
            ("two midnights", [(11.9, 0, 9), (12.1, 0, 10), (35.9, 0, 15), (36.1, 0, 16)], None, 1),
            ("a fall over midnight", [(0, 0, 7), *((at, 0, 6) for at in (11, 11.5, 12.1, 12.5)), (13, 0, 8)], None, 1),
            ("a silence that ends in nothing but zeros", [(0, 0, 7), (11, 0, 9), (13, 0, 0)], None, 0),
            ("a silence that ends in zeros", [(0, 0, 7), (11, 0, 9), (13, 0, 0), (13.1, 0, 50)], 13.1, 0),
            ("a fall that ends in much", [(0, 0, 7), *((at, 0, 6) for at in (11, 11.5, 12.1)), (13, 0, 800)], 13, 0),
            ("a jump that is taken", [(0, 0, 7), *((i / 10, 0, 90006 + i) for i in (1, 2, 3, 4))], 0.3, 1),
            ("a clock set on by a day", [(0, 0, 7), (0.1, 24, 9)], 24.1, 2),
            ("a clock set back by a day", [(0, 0, 7), (0.1, -24, 9)], -23.9, 2),
            ("a clock set on over midnight", [(11.8, 0, 7), (11.9, 0.2, 9)], 12.1, 2),
            ("a clock set on by day", [(0, 0, 7), (0.1, 3, 9)], 3.1, 2),
            ("one of a day from midnight on", [(11.9, 0, 7), (12.1, 0, 8), (13, 3, 9)], None, 2),
            ("a clock set on by half a minute", [(11.9, 0, 7), (11.998, 0.008, 9)], None, 2),
        ):
            with self.subTest(name), time_zone("UTC0"):
                ahead, now = [0.0], -60.0
                store = sems.Store(clock=lambda now: clock(now) + ahead[0])
                for hours, jump, count in steps:
                    at = hours * HOUR
                    while now + 30 < at:
                        now += 30
                        store.look(now)
                    ahead[0] += jump * HOUR
                    store.look(at)
                    moment = datetime.fromtimestamp(store.clock(at))
                    meet(store, *([] if count is None else [exports(moment, count)]), now=at)
                    store.look(at)
                live = only(store).live
                begun = None if since is None else NOON + timedelta(hours=since)
                self.assertEqual((live.day.date, live.day.since), (moment.date(), begun))
                self.assertEqual(live.gained()[ENERGY, ""], gained)

    def test_own_count(self):
        """What an inverter counted of the day before counting began is taken once: no packet makes it come and go."""
        clocks = {"wrong": -700, "ahead": 300}
        for name, begin, steps, wanted in (  # hours after noon; (minutes, total, own count, hours, clock), kWh of the day
            ("a boot packet", 0, [(0, 1000, 130, 9), (1, 0, 0, 0), (2, 1002, 132, 9)], [13, 13, 13.2]),
            ("no own count", 0, [(0, 1000, 130, 9), (1, 1001, 0xFFFF, 9)], [13, 13.1]),
            ("another one", 0, [(0, 1000, 130, 9), (1, 1001, 60, 9)], [13, 13.1]),
            ("a wrong one first", 0, [(0, 1000, 65000, 9), (1, 1001, 131, 9)], [0, 13.1]),
            ("its clock is off for a packet", 0, [(0, 1000, 130, 9), (1, 1001, 131, 9, "wrong")], [13, 13.1]),
            ("its clock is off at first", 0, [(0, 1000, 130, 9, "wrong"), (1, 1001, 131, 9)], [0, 13.1]),
            ("less than was gained", 0, [(0, 1000, 130, 9, "wrong"), (1, 1002, 1, 9), (2, 1003, 133, 9)], [0, 0.2, 13.3]),
            ("with a total that fell", 0, [(0, 1000, 130, 9, "wrong"), (1, 5, 0, 9), (2, 1001, 131, 9)], [0, 0, 13.1]),
            ("its clock is ahead at midnight", 11.9, [(0, 1000, 130, 9, "wrong"), (4, 1001, 1, 9, "ahead"), (5, 1002, 132, 9)], [0, 0.1, 13.2]),
            ("a jump that is taken", 0, [(0, 1000, 130, 9), *((i, 9000 + i, 130 + i, 9) for i in (1, 2, 3))], [13, 13, 13, 13.3]),
            ("yesterday's", 11.9, [(0, 1000, 66, 9), (726, 1000, None, 9), (730, 1003, 3, 9)], [6.6, 0, 0.3]),
        ):  # fmt: skip
            with self.subTest(name), time_zone("UTC0"):
                store, shown_today = sems.Store(clock=clock), []
                for at, total, own, hours, *off in steps:
                    now = begin * HOUR + at * 60
                    when = datetime.fromtimestamp(clock(now)) + timedelta(seconds=clocks[off[0]] if off else 0)
                    ranges = [(30144, (own or 0, 0, total)), (30147, (0, hours))]
                    meet(
                        store,
                        *([] if own is None else [frame(cls=1, serial=INVERTER, when=when, ranges=ranges)]),
                        now=now,
                    )
                    store.look(now)
                    figures = sems.member(only(store), store, now).figures
                    shown_today.append(figures["generated_today_kilowatt_hours"])
                self.assertEqual(shown_today, wanted)

    def test_which_counters(self):
        """Only a counter that `today` shows makes the day begin anew when a jump of it is confirmed."""
        for name, register, since in (
            ("hours", 35197, None),
            ("no battery's", 35206, None),
            ("output", 35191, "00:03"),
        ):
            with self.subTest(name), time_zone("UTC0"):
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

    def setUp(self):
        super().setUp()
        self.store = sems.Store(clock=clock)

    def rejected(self, reason: str) -> float:
        return value(self.store, "sems_mitm_rejected_values_total", reason=reason)

    def test_counters(self):
        """The original's counters by class and function, whether or not the payload parses."""
        meter, inverter, ack = "meter_metrics", "inverter_metrics", "meter_time_sync_ack"
        for cls, function, wanted in (
            (3, 0x03, "meter_time_sync"), (1, 0x03, "inverter_time_sync"), (2, 0x03, "inverter_time_sync"), (3, 0x04, meter),
            (3, 0x45, meter), (1, 0x04, inverter), (2, 0x45, inverter), (9, 0x04, inverter), (3, 0x10, ack), (1, 0x10, ack), (3, 0x16, ""),
        ):  # fmt: skip
            with self.subTest(cls=cls, function=function):
                store, wanted = sems.Store(), [*filter(None, (wanted, function == 0x45 and "buffered"))]
                if function in sems.DATA:
                    wanted.append("unreadable")
                meet(store, frame(function, cls), frame(function, cls), frame(function, cls, clear=b"\x05" * 16))
                counts = re.findall(r"(?m)^(?:sems_mitm_)?(\w+)_packets_total{device=.* ([1-9])$", exposed(store))
                self.assertEqual(counts, [(name, "1" if name == "unreadable" else "3") for name in wanted])

    def test_buffered_packets(self):
        """A buffered packet changes nothing but packet counters; a live one of an older time counts as any other."""
        other = exports(minute(1), 9, (2107, (0, 7)), (4864, sems.text_words("02053-05-000Me05", 8)))
        meet(self.store, exports(minute(9), 1, (2107, (0, 2600))))
        before = shown(self.store)
        meet(self.store, *[with_crc(other[:11] + b"\x45" + other[12:])] * 5)
        changed = {name.partition("{")[0] for name, number in shown(self.store).items() if before.get(name) != number}
        counters = {"meter_metrics_packets_total", "sems_mitm_buffered_packets_total"}
        self.assertEqual({name for name in changed if not name.startswith("process_")}, counters)
        meet(self.store, other)
        self.assertEqual([value(self.store, name) for name in ("meter_power_generation_watts", ENERGY)], [7, 9])
        self.assertEqual(only(self.store).info["firmware"], "02053-05-000Me05")

    def test_last_three(self):
        """Of the waiting live packets the last three are decoded, of the settings and buffered ones likewise, at the latest at a scrape."""
        kept, counts = (
            frame(sems.SETTINGS, ranges=[(4864, sems.text_words("02053-05-000Me05", 8))]),
            (90000, 7, 7, 6, 4, 6),
        )
        meet(self.store, *(exports(minute(i), count, (2107, (0, i))) for i, count in enumerate(counts)), kept)
        with mock.patch.object(sems, "DECODING", 0):
            self.store.look(0.0)  # what there is no time for waits
        self.assertEqual((only(self.store).live.counters, len(self.store.undecoded)), ({}, 1))
        self.assertEqual([value(self.store, name) for name in ("meter_power_generation_watts", ENERGY)], [5, 6])
        self.assertEqual((len(self.store.undecoded), only(self.store).info["firmware"]), (0, "02053-05-000Me05"))
        self.assertEqual(self.rejected("fall"), 2)  # one register, two counters
        meet(self.store, exports(minute(7), 65538))
        self.assertEqual(self.rejected("jump"), 2)
        for i in range(100):
            meet(self.store, frame((sems.SETTINGS, sems.BUFFERED, sems.LIVE)[i % 3], when=minute(8 + i)))
        self.assertEqual([len(waiting) for waiting in only(self.store).waiting.values()], [sems.DECODED] * 3)

    def test_repeated(self):
        """A live frame that is the device's last one, byte for byte, is counted, and is no second reading; another is."""
        for same, together in itertools.product((True, False), repeat=2):
            with self.subTest(same=same, together=together):
                store = sems.Store(clock=clock)
                for i, count in enumerate((5, 90000, 90000, 90000)):
                    meet(store, frame(sems.SETTINGS), exports(minute(min(i, 1) if same else i), count), now=60.0 + i)
                    if i == 0 or not together:
                        store.look(60.0 + i)
                self.assertEqual(value(store, ENERGY, 63.0), 5 if same else 90000)
                self.assertEqual(value(store, "meter_metrics_packets_total", 63.0), 4)
                self.assertEqual(only(store).live.fresh, 63.0)

    def test_stuck(self):
        """A counter that is held for a day is said once a day, with what to do; a jump behind a silence is not."""
        for hour in (*range(80), 200):
            ranges = [(2048, (0, hour // 100, 5)), (2069, (0, 0, 100 if hour else 900))]
            meet(self.store, frame(when=minute(60 * hour), ranges=ranges[: 1 if hour == 200 else 2]), now=hour * 3600.0)
            self.store.look(hour * 3600.0)
        self.assertEqual(self.rejected("jump"), 2)
        said = [line for line in self.lines if "stays at" in line]
        self.assertEqual(len(said), 3)
        self.assertRegex(said[0], f"of {METER} stays at 900: .*restart the exporter")

    def test_rules_clock(self):
        """The counter rules go by the clock that is handed in."""
        for speed, wanted in ((1, 1000), (3600, 5000)):
            store = sems.Store(clock=clock, rules_clock=lambda now: now * speed)
            meet(store, exports(NOON, 1000))
            meet(store, exports(NOON, 5000), now=1.0)
            self.assertEqual(value(store, ENERGY, 1.0), wanted)

    def test_left_out(self):
        """A payload that cannot be read, and a fault of our own in a reading, leave out that packet and nothing else."""
        store, self.faults = self.store, 1
        good = [frame(when=minute(2 + i), ranges=[(2107, (0, 7))]) for i in range(4)]
        meet(store, frame(clear=b"\x09" * 16), frame(when=minute(1), clear=b"\xff" * 16), good[0])
        self.assertEqual(value(store, "meter_power_generation_watts"), 7)
        self.assertEqual(len(self.lines), 1)
        self.assertIn(f"a packet of {METER} cannot be read: ", self.lines[0])
        last = sems.reading("HK1000", {2107: 0, 2108: 9})
        with mock.patch.object(sems, "reading", side_effect=[KeyError("ours"), KeyError("ours"), last]):
            meet(store, *good[1:])
            self.assertEqual(value(store, "meter_power_generation_watts"), 9)
        self.assertEqual((value(store, "sems_mitm_internal_errors_total"), len(self.lines)), (2, 2))
        self.assertRegex(self.lines[1], r"(?s)an error of our own in a reading.*Traceback.*KeyError: 'ours'$")
        meet(store, frame(sems.CONFIRMATION, 1, HYBRID))  # of another class, whose family would not read the next one
        meet(store, frame(cls=2, serial=HYBRID, ranges=[(36004, (1,)), (36015, (0x7FC0, 0, 0xC47A, 0))]))
        self.assertEqual((self.rejected("not_finite"), value(store, "sems_mitm_suppressed_log_lines_total")), (2, 2))

    def test_silence(self):
        """Gauges go when the last live packet is too old, device_up is 0 when the last good frame is; the rest stays."""
        stay = {ENERGY, "sems_mitm_device_info", "meter_metrics_packets_total"}
        go = {"meter_power_generation_watts", "meter_unknown_register", "sems_mitm_device_clock_offset_seconds"}
        ranges = [*METER_RANGES, (9000, (5,))]
        for stale_after, at, gauges, up in ((300, 300, True, 1), (300, 301, False, 1), (300, 401, False, 0), (0, 1e9, True, 1)):  # fmt: skip
            with self.subTest(stale_after=stale_after, at=at):
                store = sems.Store(stale_after=stale_after, clock=clock)
                meet(store, frame(ranges=ranges))
                meet(store, frame(sems.BUFFERED, ranges=ranges), now=100.0)
                with mock.patch.object(sems, "wall_clock", lambda now: 1000.0 + now):
                    found = {series.partition("{")[0]: number for series, number in shown(store, at).items()}
                self.assertEqual((go & set(found), stay - set(found)), (go if gauges else set(), set()))
                wanted = {"sems_mitm_device_up": up, "sems_mitm_device_last_packet_timestamp_seconds": 1100}
                self.assertLessEqual(wanted.items(), found.items())

    def test_offset(self):
        """The device's clock less this machine's, from live packets that have a date."""
        no_date = with_crc(FRAME[:46] + bytes(6) + FRAME[52:])
        for data, now, wanted in ((no_date, 0, 0), (frame(when=minute(2)), 0, 120), (no_date, 0, 120), (frame(when=minute(1)), 0, 60), (frame(when=minute(3)), 60, 120), (frame(when=minute(3)), 90, 120), (frame(when=minute(4)), 240, 0)):  # fmt: skip
            meet(self.store, data, now=now)
            self.assertEqual(value(self.store, "sems_mitm_device_clock_offset_seconds", now), wanted)

    def test_max_devices(self):
        """When full, a newcomer gets no series, however long the others are silent."""
        store = sems.Store(stale_after=100, max_devices=2)
        meet(store, self.A, self.B)
        meet(store, self.C, self.C, self.C, now=1e9)
        self.assertEqual((serials(store), len(self.lines)), (["A", "B"], 1))
        self.assertEqual(value(store, "sems_mitm_unlisted_device_packets_total"), 3)

    def test_same_name(self):
        """A device with the device, model and last eight characters of another gets no series, and a warning."""
        other = frame(serial="81000HKU00000042", clear=bytes(16))
        meet(self.store, FRAME, other, other)
        self.assertEqual((len(self.store.devices), serials(self.store), len(self.lines)), (1, ["2"], 1))
        self.assertEqual(value(self.store, "sems_mitm_unlisted_device_packets_total"), 2)
        meet(self.store, frame(serial=OTHER), frame(cls=1))  # another `device` label
        self.assertEqual(serials(self.store), ["2", "2", "3"])

    def test_model(self):
        """When the model becomes known all series move in one step, counters with their values; a nameless packet clears nothing."""
        inverter = {"cls": 1, "serial": "93000DSN00000042"}
        meet(self.store, frame(ranges=INVERTER_RANGES, **inverter))
        old = {
            series: n for series, n in shown(self.store).items() if "GoodWe DSN" in series and "_sync_" not in series
        }
        moved = {series.replace("GoodWe DSN 3000 W", "GW3000D-NS"): number for series, number in old.items()}
        for clear in (named("GW3000D-NS"), sems.payload([(40173, (0xFFFF,) * 16)]), sems.payload([(40075, (0,) * 26)])):
            meet(self.store, frame(sems.SETTINGS, clear=clear, **inverter))
            new = shown(self.store)
            self.assertFalse([series for series in new if "GoodWe DSN" in series])
            self.assertLessEqual(moved.items(), new.items())
        self.assertGreater(len(moved), 15)

    def test_names_change_hands(self):
        """The labels that a device has left are free for another, and no series is ever there twice."""
        first, second = ({"cls": 1, "serial": f"9{rating}DSN00000042"} for rating in ("3000", "4000"))
        meet(self.store, *(frame(sems.SETTINGS, clear=named("GW-X"), **each) for each in (first, second)))
        self.assertEqual((len(serials(self.store)), len(self.lines)), (1, 1))
        meet(self.store, frame(sems.SETTINGS, clear=named("GW-Y"), **first))
        self.store.look(0.0)
        meet(self.store, frame(**second))
        self.assertEqual([name for _, name, _ in self.store.names], ["GW-Y", "GW-X"])
        meet(self.store, *(frame(sems.SETTINGS, clear=named(name), **first) for name in ("GW-X", "GW-Z")))
        self.assertEqual(len(serials(self.store)), 2)
        self.assertEqual([name for _, name, _ in self.store.names], ["GW-X", "GW-Z"])

    def test_types(self):
        """packets_total has the known types, 32 others, then `other`; malformed, junk and keep-alives have their own names."""
        others = [f"03{function:02x}" for function in range(0x50, 0x50 + 40)]
        for kind in (*others, "0304", "malformed", "junk", "0350", "0377"):
            self.store.count(OUT, kind, "forwarded")
        for kind, verdict in (("0350", "dropped"), ("0350", "dropped"), ("keepalive", "forwarded")):
            self.store.count(IN, kind, verdict)
        found = re.findall(
            r'sems_mitm_packets_total{direction="(\w+)",type="(\w+)",verdict="(\w+)"} (\d+)', exposed(self.store)
        )
        self.assertEqual({kind for _, kind, _, _ in found} - sems.LABELLED, {*others[:32], "other"})
        out = {kind: int(count) for direction, kind, _, count in found if direction == "outbound"}
        self.assertEqual([out[kind] for kind in ("other", "0350", "0304", "junk")], [9, 2, 1, 1])
        self.assertIn(("inbound", "0350", "dropped", "2"), found)
        self.assertIn(("inbound", "keepalive", "forwarded", "1"), found)

    def test_exposition(self):
        """HELP and TYPE once a name, families together and sorted, label values escaped, counters with fixed labels from 0."""
        store = sems.Store(batsignal=True, clock=clock)
        empty = shown(store)
        for name, key, values in sems.FIXED:
            for value in values:
                self.assertEqual(empty[f'{name}{{{key}="{value}"}}' if key else name], 0)
        self.assertEqual([empty["batsignal_top"], empty["batsignal_bottom"]], [*sems.bat(NOON)])
        self.assertNotIn("batsignal", exposed(self.store))
        store.gauges.update(sems_mitm_upstream_up=lambda: None, sems_mitm_queue_bytes=lambda: 5)
        meet(store, *(frame(serial=serial) for serial in ('9\\"00HKU0000"\\42', METER, OTHER)))
        text, names, label = exposed(store), [], r'\w+="([^"\\]|\\.)*"'
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
        self.assertEqual(names, sorted({series.partition("{")[0] for series in metrics_of(text)}))

    def test_answers(self):
        """A device's ACKs and NACKs are counted, and those of nobody are not."""
        meet(self.store, FRAME)
        for counter, serial in ((sems.ACKS, METER), (sems.NACKS, METER), (sems.NACKS, METER), (sems.NACKS, INVERTER)):
            self.store.answered(("meter", serial), counter)
        self.assertEqual([value(self.store, name) for name in (sems.ACKS, sems.NACKS)], [1, 2])

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
        zeros, meter, grid, hybrid = bytes(16), 0x1216, 0x9D79, 0xB090
        day, no_date = bytes((26, 3, 21, 12, 0, 0)), bytes((26, 2, 30, 12, 0, 0))
        clock, noon = struct.pack(">HH", meter, meter + 2) + day + bytes(6), day + bytes(6)
        answers = (  # name, type, clear text, classes that the device has sent, what it is
            ("ACK", "0304", zeros, {3}, "ack"), ("ACK of settings", "0303", zeros, {3}, "ack"),
            ("ACK of buffered data", "0245", zeros, {2}, "ack"), ("ACK of an unknown class", "0904", zeros, {9}, "ack"),
            ("NACK", "0304", b"\2" + bytes(15), {3}, "nack"), ("neither", "0304", b"\1" + bytes(15), {3}, ""),
            ("a NACK with more", "0304", b"\2" + bytes(14) + b"\1", {3}, ""), ("an ACK with more", "0304", bytes(15) + b"\1", {3}, ""),
            ("an ACK with a second byte", "0304", b"\0\1" + bytes(14), {3}, ""), ("an ACK of two blocks", "0304", bytes(32), {3}, ""),
            ("an ACK of a class not sent", "0104", zeros, {3}, ""), ("an ACK before anything", "0304", zeros, set(), ""),
            ("an ACK of a confirmation", "0310", zeros, {3}, ""), ("an ACK of another function", "0316", zeros, {3}, ""),
            ("the clock in another type", "0316", clock, {3}, ""), ("the clock in an ACK's type", "0304", clock, {3}, ""),
            ("all zeros in the clock's type", "0116", zeros, {1, 2, 3}, ""), ("a NACK there", "0116", b"\2" + bytes(15), {1}, ""),
            ("a firmware upgrade", "0120", bytes(range(16)), {1, 2, 3}, ""),
        )  # fmt: skip
        writes = (  # name, first and last register, what is written, classes, what it is
            ("a meter's clock", meter, meter + 2, noon, {3}, "clock"), ("a hybrid's", hybrid, hybrid + 2, noon, {2}, "clock"),
            ("a grid-tied one's", grid, grid + 2, noon, {1}, "clock"), ("one of two's", grid, grid + 2, noon, {3, 1}, "clock"),
            ("of a class not sent", grid, grid + 2, noon, {3}, ""), ("of an unknown class", grid, grid + 2, noon, {9}, ""),
            ("a register more", meter, meter + 3, noon, {3}, ""), ("a register less", meter, meter + 1, noon, {3}, ""),
            ("from a register before", meter - 1, meter + 2, noon, {3}, ""), ("last before first", meter + 2, meter, noon, {3}, ""),
            ("another register", meter + 1, meter + 3, noon, {3}, ""), ("to another class's", meter, grid + 2, noon, {3, 1}, ""),
            ("no date", meter, meter + 2, no_date + bytes(6), {3}, ""), ("zeros for a date", meter, meter + 2, bytes(12), {3}, ""),
            ("more behind the date", meter, meter + 2, day + bytes(5) + b"\1", {3}, ""),
            ("more at once behind it", meter, meter + 2, day + b"\1" + bytes(5), {3}, ""),
            ("two blocks", meter, meter + 2, day + bytes(22), {3}, ""),
        )  # fmt: skip
        packed = ((row[0], "0116", struct.pack(">HH", *row[1:3]) + row[3], *row[4:]) for row in writes)
        for name, kind, clear, classes, wanted in (*answers, *packed):
            with self.subTest(name):
                where = sems.address_of(portal_frame(kind, clear), IN)
                self.assertEqual(sems.allowed(where, clear, classes), wanted)

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


# ---------------------------------------------------------------------------------------------------------- names


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

    def test_servers(self):
        """A server that keeps silent, lies or is not there is passed over; the true answer behind a forged one counts."""
        wrong = lambda query: [bytes([query[0] ^ 1]) + address_record(query, "127.0.0.9")[1:], b"", query]
        for name, answers, wanted in (
            ("true", lambda query: [*wrong(query), address_record(query, LOCAL)], [LOCAL]),
            ("silent", lambda query: [], None),
            ("lies", wrong, None),
        ):
            with self.subTest(name), contextlib.closing(NameServer(answers)) as server:
                patience = PATIENCE if wanted else 0.1
                self.assertEqual(sems.ask_dns(server.sock.getsockname(), "portal.test", patience), wanted)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as unused:
            unused.bind((LOCAL, 0))
            nobody = unused.getsockname()
        with self.assertRaises(OSError):
            sems.ask_dns(nobody, "portal.test")

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

    def named(self, portal: Portal, *flags: str, servers=()) -> Running:
        dns = ",".join(server.text for server in servers) or "none"
        return self.exporter(None, f"--sems.upstream=portal.test:{portal.port}", f"--sems.upstream-dns={dns}", *flags)


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
        """What devices send arrives unchanged, of each on a connection of its own, however it is cut, also before the portal is there."""
        self.limits(LOOP_WINDOW=-1, PATIENCE={"outbound": 0.1, "inbound": 5})  # the streams begin alike
        names = {stream: name for name, stream in awkward_streams().items()}
        cuts = [[stream] if seed is None else random_cuts(stream, random.Random(seed)) for stream in names for seed in (None, 1, 2)]  # fmt: skip
        for early in (False, True):
            portal = self.portal()
            self.go.clear() if early else None
            flags = ("--sems.listen-address=:0",)
            running = self.named(portal, *flags) if early else self.exporter(portal, *flags)
            # From another family than the portal's: else a device can have the port of an end of ours, which is a loop.
            devices = [running.device(host=FAMILIES[-1]) for _ in cuts]
            for parts in itertools.zip_longest(*cuts, fillvalue=b""):
                for device, part in zip(devices, parts):
                    device.send(part)
            running.becomes(3 * sum(map(len, names)), "sems_mitm_bytes_total", direction="outbound")
            self.go.set()
            running.becomes(len(devices), "sems_mitm_upstream_connections")
            for device in devices:
                device.no_more()
            got = sorted(portal.accept().rest() for _ in devices)
            for found, wanted in zip(got, sorted(b"".join(parts) for parts in cuts)):
                with self.subTest(names[wanted], before_the_portal_is_there=early):
                    self.assertEqual(found, wanted)

    def test_when_the_portal_is_called(self) -> None:
        """By the first good frame, or soon after other bytes; not by a connection alone. An unfinished frame waits for its end."""
        self.limits(PATIENCE={"outbound": 0.3, "inbound": 5})
        portal, running = self.started()
        silent = running.device()
        running.becomes(1, "sems_mitm_device_connections")
        self.assertTrue(portal.unasked())
        self.assertNotIn("sems_mitm_upstream_up", running.metrics())
        silent.send(b"junk")
        portal.receives(b"junk")
        half = running.device(frame() + frame()[:40])
        portal.receives(frame() + frame()[:40])
        self.assertTrue(half.silent(0.01))
        running.becomes(2, "sems_mitm_upstream_connections")
        self.assertEqual(running.value("sems_mitm_upstream_up"), 1)
        self.assertEqual(running.value("sems_mitm_packets_total", type="malformed", verdict="forwarded"), 1)

    def test_inbound_filter(self) -> None:
        """Only what `allowed` and keep-alives in their place pass; all else is dropped and counted, and the next good frame found."""
        elsewhere = struct.pack(">HH6s6x", 0x9D16, 0x1218, sems.time_stamp(NOON))
        rows = (  # name, bytes, passes
            ("keep-alives behind a frame", BEAT * 2, True),
            ("NACK", portal_frame("0304", b"\x02" + bytes(15)), True),
            ("a write elsewhere", portal_frame("0116", elsewhere), False),
            ("bad CRC", spoilt(portal_frame("0304")), False),
            ("junk", b"HTTP/1.1 200 OK\r\n\r\n", False),
            ("keep-alive behind junk", b"\0" + BEAT, False),
            ("a prefix", b"GW", False),
            ("a claim that is too long", b"GW\x00\x00\x10\x01" + bytes(20), False),
        )
        capture, end = os.path.join(self.directory(), "capture"), ack_of(frame())
        _, running, device, leg = self.talking(f"--sems.capture={capture}")
        for name, row, passes in rows:
            for bytewise in (False, True):
                with self.subTest(name, bytewise=bytewise):
                    for part in [bytes([byte]) for byte in row + end] if bytewise else [row + end]:
                        leg.send(part)
                    device.expect(row * passes + end)
        stopped, shown = [row for _, row, passes in rows if not passes], running.metrics()
        self.assertEqual(summed(shown, "sems_mitm_packets_total", verdict="dropped"), 2 * len(stopped))
        self.assertEqual(summed(shown, "inbound_unknown_packets_total"), 2)
        self.assertEqual(summed(shown, "sems_mitm_nacks_total"), 2)
        until(lambda: len(open_lines(capture)) >= 4 * len(rows))
        lines = [line for line in map(json.loads, open_lines(capture)) if line["verdict"] == "dropped"]
        self.assertEqual("".join(line["hex"] for line in lines), "".join(row.hex() * 2 for row in stopped))

    def test_inbound_claim_is_given_up(self) -> None:
        """A frame of the portal's that stays unfinished is given up; the answer that stood in it passes, and counts."""
        self.limits(PATIENCE={"outbound": 30, "inbound": 0.1})
        portal = self.portal(habit=lambda data: b"GW" + struct.pack(">I", 2000) + b"x" * 10 + ack_of(data))
        self.exporter(portal).device(frame()).expect(ack_of(frame()))
        running = self.exporter(portal, "--sems.mode=spool")
        running.device(frame()).packets(1)
        running.emptied()
        self.assertEqual(portal.got, [frame()] * 2)

    def test_portal_drops_the_connection(self) -> None:
        """A portal that ends an idle connection is called again when something waits, not before; the device's connection stays."""
        self.limits(BACKOFF=(0.001, 0.001))
        for mode, drop in (("forward", Peer.close), ("forward", Peer.reset), ("spool", Peer.close)):
            with self.subTest(mode=mode, drop=drop.__name__):
                portal, running = self.started(f"--sems.mode={mode}")
                device = running.device()
                for data in frames_of(3):
                    device.send(data)
                    leg = portal.receives(data)
                    leg.send(ack_of(data))
                    device.packets(1)
                    running.emptied()
                    drop(leg)
                    running.becomes(0, "sems_mitm_upstream_connections")
                    self.assertTrue(portal.unasked(0.06), "there is nothing to send")
                    self.assertEqual(running.value("sems_mitm_upstream_up"), float(drop is Peer.close))

    def test_bat_signal(self) -> None:
        """The portal gets the bat; metrics and capture keep what the device said; nothing else is touched."""
        live, other = frame(when=minute(120)), frame(cls=sems.GRID_TIED, serial=INVERTER, ranges=INVERTER_RANGES)
        capture = os.path.join(self.directory(), "capture")
        portal, running = self.started("--batsignal", f"--sems.capture={capture}")
        running.device(live + spoilt(live) + live[:-4]).no_more()
        self.assertNotEqual(sems.with_bat(live), live)
        portal.receives(sems.with_bat(live) + spoilt(live) + live[:-4])
        running.device(other)
        portal.receives(other)
        self.assertEqual(running.value("meter_power_generation_watts"), 2600)
        self.assertEqual(json.loads(open_lines(capture)[0])["hex"], live.hex())
        self.assertEqual(running.value("sems_mitm_packets_total", type="0304", verdict="rewritten"), 1)

    def test_much_in_one_wakeup(self) -> None:
        """A device's last frame with its end or reset, and the portal's answer or reset, seen at once: the frame is read, and nothing stays."""
        answers = lambda leg, data: leg.send(ack_of(data))
        resets = lambda leg, data: leg.send(ack_of(data)[:50]) or leg.reset()
        for mode in ("forward", "spool", "local"):
            portal = self.portal()
            process = self.serving(portal, f"--sems.mode={mode}")
            habits = [answers, resets] if mode == "forward" else [answers]
            rows = itertools.product(habits, (Peer.close, Peer.reset), (True, False))
            for number, (habit, end, portal_first) in enumerate(rows):
                with self.subTest(mode, end=end.__name__, answers=habit is answers, portal_first=portal_first):
                    first, last = frames_of(2, serial=f"91000HKU{number:08d}")
                    device = process.device(first)
                    leg = portal.receives(first) if mode != "local" else mock.Mock()
                    device.packets(mode != "forward")
                    with process.frozen():
                        habit(leg, first) if portal_first else None
                        device.send(last)
                        end(device)
                        habit(leg, first) if not portal_first else None
                    leg.expect(last) if habit is answers else None
                    process.becomes(2 * (number + 1), "meter_metrics_packets_total")
                    leg.close()
                    process.becomes(0, "sems_mitm_device_connections")
            self.assertTrue(mode == "spool" or not process.queued())


class BackPressureTest(SocketCase):
    """A peer that does not take its bytes: the other side is not read, and nothing is lost."""

    def setUp(self) -> None:
        super().setUp()
        self.small_buffers()
        self.limits(SOCKET_BUFFERS=SMALL)

    def test_slow_portal(self) -> None:
        """While 256 KiB wait for a connected portal the device is not read; later all arrives in order.

        If the device resets meanwhile, what the kernel still has of it arrives, too.
        """
        block = b"".join(frames_of(400))
        for end in (Peer.no_more, Peer.reset):
            with self.subTest(end=end.__name__):
                portal, running = self.started()
                device = running.device(block[:10])
                sent = 10 + device.fill(block[10:] + block[:10])
                leg = portal.accept()
                sent += device.fill(block[sent % len(block) :] + block[: sent % len(block)])
                self.assertTrue(sems.BACKLOG - (64 << 10) <= running.queued() <= sems.BACKLOG + (256 << 10))
                self.assertLess(sent, sems.BACKLOG + (256 << 10) + 20 * SMALL)
                read = running.value("sems_mitm_bytes_total", direction="outbound")
                end(device)
                leg.send(ack_of(block))
                got = leg.rest()
                self.assertEqual(got, (block * (sent // len(block) + 1))[: len(got)])
                self.assertTrue(len(got) == sent if end is Peer.no_more else len(got) > read, (sent, read, len(got)))
                running.becomes(0, "sems_mitm_queue_bytes")
                self.assertEqual(running.value("sems_mitm_queue_dropped_packets_total"), 0)

    def test_slow_device(self) -> None:
        """While 256 KiB wait for a device its portal is not read; later all arrives in order.

        A portal that resets meanwhile takes nothing with it: the device stays, gets what was taken, and is served on.
        """
        block = b"".join(portal_frame("0304", when=NOON + timedelta(seconds=i)) for i in range(30))
        for is_reset in (False, True):
            with self.subTest(is_reset=is_reset):
                portal, running, device, leg = self.talking()
                sent = leg.fill(block)
                self.assertLess(sent, sems.BACKLOG + (256 << 10) + 20 * SMALL)
                self.assertGreater(sent, sems.BACKLOG - (64 << 10))
                if is_reset:
                    leg.reset()
                    device.send(frame(when=minute(1)))
                    leg = portal.receives(frame(when=minute(1)))
                taken = int(running.value("sems_mitm_acks_total")) if is_reset else sent // ACK_SIZE
                self.assertGreaterEqual(taken * ACK_SIZE, sems.BACKLOG - (64 << 10))
                device.expect((block * (sent // len(block) + 1))[: taken * ACK_SIZE])
                if is_reset:
                    leg.send(ack_of(frame(when=minute(1))))
                    device.expect(ack_of(frame(when=minute(1))))
                self.assertEqual(running.value("sems_mitm_device_connections"), 1)

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
        device.expect(ack_of(frames[-1]))

    def test_device_that_reads_no_answers(self) -> None:
        """A device that sends and never reads its answers is not read either, and is lost in the end."""
        self.limits(STALL=0.3)
        running = self.exporter(None, "--sems.mode=local")
        with contextlib.suppress(ConnectionError):
            running.device().fill(b"".join(frames_of(100, clear=b"\0" + b"\xff" * 15)))
        running.becomes(0, "sems_mitm_device_connections")
        self.assertLess(running.value("sems_mitm_bytes_total", direction="outbound"), 10 * sems.ANSWERS)

    def test_nothing_spins(self) -> None:
        """Whatever waits, and though the portal refuses everything, the loop sleeps."""
        self.limits(LINGER=20, BACKOFF=(0.5, 1), TICK=1)
        data, turns, select_ = frame(), [], selectors.DefaultSelector.select
        counted = lambda *_: turns.append(threading.current_thread()) or select_(*_)
        self.patch(selectors.DefaultSelector, "select", counted)
        stays = lambda device: None

        def floods(device) -> None:
            with contextlib.suppress(ConnectionError):  # a spool's frame that comes again is a loop
                device.fill(data * 100, 0.05)

        rows = (  # mode, what the portal does, what the device does when it has sent its frame
            ("forward", "reads", stays), ("forward", "reads", Peer.no_more), ("forward", "reads", Peer.close), ("spool", "reads", Peer.close),
            ("forward", "does not read", floods), ("spool", "does not read", floods), ("spool", "NACK", stays),
            ("forward", "floods", stays), ("forward", "floods", Peer.no_more), ("local", "is away", floods),
            ("forward", "is away", stays), ("spool", "is away", Peer.close),
            ("forward", "swallows SYNs", Peer.no_more), ("forward", "swallows SYNs", Peer.reset),
        )  # fmt: skip
        started = []
        for mode, habit, then in rows:
            is_there = habit not in ("is away", "swallows SYNs")
            portal = self.portal(listening=is_there, habit=nack if habit == "NACK" else None)
            portal.black_hole() if habit == "swallows SYNs" else None
            running = self.exporter(portal, f"--sems.mode={mode}")
            device = running.device(data)
            running.becomes(1, "meter_metrics_packets_total")
            leg = portal.accept() if is_there and habit != "NACK" else None
            leg.expect(data) if habit in ("reads", "floods") else None
            leg.fill(ack_of(data) * 100, 0.05) if habit == "floods" else None
            then(device)
            started.append((f"{mode}, the portal {habit}, the device {then.__name__}", running.thread))
        time.sleep(0.05)
        turns.clear()
        time.sleep(0.2)
        for name, thread in started:
            with self.subTest(name):
                self.assertLess(turns.count(thread), 10)


class PortalAwayTest(NamedCase):
    """Mode forward, and a portal that cannot be reached."""

    def test_away_and_back(self) -> None:
        """Whole good frames wait in order and nothing else, nothing is answered, and the device is decoded meanwhile."""
        self.limits(BACKOFF=(0.2, 0.2))
        portal, running = self.started(listening=False)
        frames, nameless = frames_of(20), with_crc(frame()[:14] + bytes(16) + frame()[30:])
        device = running.device(b"junk" + frames[0])
        until(lambda: running.value(FAILURES, reason="refused") >= 2)
        device.send(b"junk" + spoilt(frames[3]) + nameless + b"".join(frames[1:])[:-30])
        until(lambda: running.queued() >= 19 * len(frames[0]))
        self.assertEqual(running.value("meter_power_generation_watts"), 2600)
        self.assertEqual(running.value("sems_mitm_upstream_up"), 0)
        self.assertTrue(device.silent())
        portal.listen()
        leg = portal.accept()
        device.send(frames[-1][-30:])
        leg.expect(b"".join(frames))
        device.send(b"junk")
        leg.expect(b"junk")
        running.becomes(20, "sems_mitm_packets_total", type="0304", verdict="forwarded")

    def test_queues_are_bounded(self) -> None:
        """So much of a device, and of all, waits; above it the longest queue loses its oldest whole frames, which is counted."""
        self.limits(BACKOFF=(0.3, 0.3))
        frames, other = cheap_frames(100), frame(serial=OTHER)
        for limit in ("QUEUE", "QUEUES"):
            with self.subTest(limit), mock.patch.object(sems, limit, 50_000):
                portal, running = self.started(listening=False)
                devices = [running.device(other), running.device(frames[0])]
                until(lambda: running.value(FAILURES) >= 2)
                devices[1].send(b"".join(frames[1:]))
                running.becomes(101, "meter_metrics_packets_total")
                self.assertLessEqual(running.queued(), 50_000 + len(other))
                portal.listen()
                legs = [portal.accept() for _ in devices]
                for device in devices:
                    device.no_more()
                first, second = sorted((leg.rest() for leg in legs), key=len)
                kept = len(second) // len(frames[0])
                self.assertEqual((first, second), (other, b"".join(frames[-kept:])))
                self.assertGreater(len(second), 40_000)
                self.assertEqual(running.value("sems_mitm_queue_dropped_packets_total"), 100 - kept)

    def test_device_goes_meanwhile(self) -> None:
        """The queue ends with the device's connection; an attempt under way has two seconds more, and no longer."""
        portal = self.portal()
        for late in (True, False):
            with self.subTest(it_succeeds_in_time=late):
                self.limits(LAST_ATTEMPT=PATIENCE if late else 0.1, LINGER=0.05)
                self.go.clear()
                running = self.named(portal)
                device = running.device(frame())
                until(running.queued)
                device.close()
                if late:
                    self.go.set()
                    self.assertEqual(portal.accept().rest(), frame())
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
        portal.receives(frame(serial=OTHER))
        self.limits(CONNECT_TIMEOUT=0.1)
        running = self.exporter(hole)
        running.device(frame())
        until(lambda: running.value(FAILURES, reason="timeout") >= 2)
        self.assertEqual(running.value("meter_metrics_packets_total"), 1)

    def test_backoff(self) -> None:
        """Attempts back off though the portal accepts and hangs up at once; once it has sent something they start again at the first."""
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                self.limits(BACKOFF=(0.05, 60), TICK=0.005)
                portal, running = self.started(f"--sems.mode={mode}")
                device, begin = running.device(frame()), time.monotonic()
                device.packets(mode == "spool")
                for count, drop in enumerate((Peer.reset, Peer.close, Peer.reset)):
                    drop(portal.accept())  # with the frame unread: a reset
                    running.becomes(0, "sems_mitm_upstream_connections")
                    device.send(frame(when=minute(count)) if mode == "forward" else b"")
                portal.accept()
                self.assertGreater(time.monotonic() - begin, 0.7 * (0.05 + 0.1 + 0.2))
                self.assertEqual(running.value("sems_mitm_device_connections"), 1)
                self.limits(BACKOFF=(2 * PATIENCE, 2 * PATIENCE))
                portal, running = self.started(f"--sems.mode={mode}")
                device = running.device(frame())
                leg = portal.receives(frame())
                self.limits(BACKOFF=(0.01, 60))
                leg.send(ack_of(frame()))
                device.packets(1)
                running.emptied()
                leg.close()
                running.becomes(0, "sems_mitm_upstream_connections")
                device.send(frame(when=minute(1)))
                portal.receives(frame(when=minute(1)))

    def test_hundreds_of_resets(self) -> None:
        """A portal that resets at once, hundreds of times, 40 devices at a time: the process lives, and all are answered at last."""
        self.limits(BACKOFF=(0.002, 0.01), TICK=0.005)
        portal, number = self.portal(habit=resets), itertools.count()
        running = self.exporter(portal)
        devices = {f"91000HKU{i:08d}": running.device() for i in range(40)}

        def all_are_answered() -> bool:
            if portal.legs > 300:
                portal.habit = ack_of
            for serial, device in devices.items():
                device.send(frame(serial=serial, when=minute(next(number))))
            return not any(device.silent(0) for device in devices.values())

        until(all_are_answered)
        self.assertEqual(running.value("sems_mitm_device_connections"), 40)

    def test_addresses_that_cannot_be(self) -> None:
        """No address ends the process: what cannot be connected to is counted, and tried again."""
        for upstream in "[fe80::1%nosuch]:1", "[fe80::1]:1", "[::1]:1", "0.0.0.0:1", "a..b:1", "x" * 70 + ".tld:1":
            with self.subTest(upstream):
                running = self.exporter(None, f"--sems.upstream={upstream}", "--sems.upstream-dns=none")
                device = running.device(frame())
                until(lambda: running.value(FAILURES) >= 2)
                self.assertEqual(running.value("meter_metrics_packets_total"), 1)
                self.assertTrue(device.silent(0.01))


# --------------------------------------------------------------------------------------------- sockets: local, spool


class LocalTest(SocketCase):
    """Mode local: no portal, the exporter answers."""

    def test_answers(self) -> None:
        """One ACK for each good frame that is owed one, and the clock behind settings, at this machine's local time."""
        running = self.exporter(None, "--sems.mode=local")
        device, end = running.device(), frame(sems.BUFFERED, serial=OTHER)
        settings = {cls: frame(sems.SETTINGS, cls, f"91000HKU0000000{cls}") for cls in (1, 2, 3, 9)}
        for name, data, kinds in (  # the types of the answers, of a clock its registers
            ("settings of a meter", settings[3], ["0303", "12161218"]),
            ("settings of an inverter", settings[1], ["0103", "9d799d7b"]),
            ("settings of a hybrid", settings[2], ["0203"]),
            ("settings of an unknown class", settings[9], ["0903"]),
            ("buffered data of another class", frame(sems.BUFFERED, cls=7), ["0745"]),
            ("unreadable payload", frame(clear=b"\x05" + bytes(15)), ["0304"]),
            ("confirmation", frame(sems.CONFIRMATION), []),
            ("another function", frame(0x05), []),
            ("bad CRC", spoilt(frame()), []),
            ("junk", b"\0\1\2", []),
            ("no serial number", frame(serial="91000HKU\n0000042"), []),
        ):
            with self.subTest(name):
                device.send(data + end)
                packets = device.packets(len(kinds) + 1)
                is_clock = lambda packet: packet.type == "0116"
                found = [packet.clear[:4].hex() if is_clock(packet) else packet.type for packet in packets]
                self.assertEqual(found, [*kinds, "0345"])
                for packet in packets:
                    stamp = sems.device_time(packet.clear[4:10] if is_clock(packet) else packet.iv[5::-1])
                    self.assertLess(abs((stamp - datetime.now()).total_seconds()), PATIENCE)
        shown = running.metrics()
        self.assertNotIn("sems_mitm_upstream_up", shown)
        self.assertEqual(summed(shown, "sems_mitm_upstream_connections"), 0)
        self.assertEqual(summed(shown, "sems_mitm_unreadable_packets_total"), 1)
        for kind, count in (("0310", 1), ("malformed", 2), ("junk", 1)):
            self.assertEqual(summed(shown, "sems_mitm_packets_total", type=kind, verdict="dropped"), count)

    def test_clock_is_not_set(self) -> None:
        """With a wrong clock or an unknown TZ settings get their ACK alone, and that is said once."""
        for zone, plausible, sets in ((BERLIN, True, 1), ("Nowhere/Town", True, 0), (BERLIN, False, 0)):
            with self.subTest(TZ=zone, plausible=plausible), time_zone(zone):
                self.limits(RELEASED=0 if plausible else time.time() + 86400)
                self.lines.clear()
                device = self.exporter(None, "--sems.mode=local").device(frame(sems.SETTINGS) * 2 + frame())
                kinds = [packet.type for packet in device.packets(3 + 2 * sets)]
                self.assertEqual(kinds, ["0303", "0116"] * 2 + ["0304"] if sets else ["0303"] * 2 + ["0304"])
                self.assertEqual(sum("clock" in line for line in self.lines), 1 - sets)


class SpoolCase(SocketCase):
    """Mode spool, on demand with the file `self.file`."""

    def setUp(self) -> None:
        super().setUp()
        self.file = os.path.join(self.directory(), "spool")
        self.flags = ("--sems.mode=spool", f"--sems.spool-file={self.file}")

    def spooling(self, portal, *flags: str) -> Running:
        return self.exporter(portal, "--sems.mode=spool", *flags)

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
        leg = portal.receives(b"".join(frames))
        clock = portal_frame("0116", struct.pack(">HH6s6x", 0x1216, 0x1218, sems.time_stamp(NOON)))
        leg.send(b"".join(map(ack_of, owed)) + clock + BEAT)
        running.emptied()
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
        streams = [b"".join(frames_of(3, serial=METER[:-1] + digit)) for digit in "123"]
        self.spooling(portal).device(b"".join(streams)).packets(9)
        self.assertEqual(sorted(portal.accept().read(len(stream)) for stream in streams), streams)

    def test_order_stays(self) -> None:
        """The device goes and comes back, is half open, is there twice: frames are delivered in the order in which they came."""
        for away in (True, False):
            with self.subTest(portal_away=away):
                portal = self.portal(listening=not away)
                running = self.spooling(portal)
                frames = [*frames_of(4), *cheap_frames(2), frame(sems.BUFFERED), frame(when=minute(9))]
                with contextlib.closing(running.device(frames[0] + frames[1])) as gone:
                    gone.packets(2)
                old, new = running.device(frames[2][:40]), running.device()
                for data, peer, count in (
                    *((data, new, 1) for data in frames[3:5]),
                    (frames[2][40:] + frames[5], old, 2),
                    *((data, new, 1) for data in frames[6:]),
                ):
                    peer.send(data)
                    peer.packets(count)
                portal.listen()
                portal.receives(b"".join(frames[i] for i in (0, 1, 3, 4, 2, 5, 6, 7)))
                self.assertEqual(running.value("sems_mitm_upstream_connections"), 1)

    def test_window(self) -> None:
        """So many frames are under way unanswered, and of one type fewer; those that get no answer are done once sent."""
        kinds = [sems.SETTINGS, sems.LIVE, sems.BUFFERED]
        silent = [with_crc(frame(sems.CONFIRMATION)[:-3] + bytes([i]) + b"..") for i in range(40)]
        for name, some, sent in (
            ("of one type", frames_of(40), 16),
            ("of three", [frame(kinds[i % 3], when=minute(i)) for i in range(60)], 32),
            ("without an answer", silent, 40),
        ):
            with self.subTest(name):
                portal = self.portal(habit=silence)
                running = self.spooling(portal)
                running.device(b"".join(some))
                running.becomes(len(some), "sems_mitm_packets_total", direction="outbound")
                until(lambda: len(portal.got) == sent)
                self.assertEqual(portal.got, some[:sent])
                with portal.lock:
                    portal.habit = ack_of
                    portal.peers[0].send(b"".join(map(ack_of, some[:sent])))
                running.emptied()
                self.assertEqual(portal.firsts(), some)

    def test_answers_match_by_type_and_serial_number(self) -> None:
        """An answer of another type, or of another serial number, delivers nothing: the frame is sent again, and is in no count."""
        self.limits(ANSWER_TIMEOUT=0.1)
        data, scenes = frame(), []
        for name, reply in (
            ("serial number", portal_frame("0304", serial=OTHER)),
            ("type", portal_frame("0303")),
            ("class", portal_frame("0104")),
            ("keep-alives", BEAT),
            ("a bad CRC", spoilt(ack_of(data))),
        ):
            portal = self.portal(habit=lambda data, reply=reply: reply)
            scenes.append((name, portal, self.spooling(portal)))
            scenes[-1][2].device(data).packets(1)
        for name, portal, running in scenes:
            with self.subTest(name):
                until(lambda: len(portal.got) >= 3)
                self.assertEqual((running.queued(), self.undelivered(running)), (len(data), 0))
                self.assertGreaterEqual(running.value(FAILURES, reason="timeout"), 1)
                portal.habit = ack_of
        for _, portal, running in scenes:
            running.emptied()
            self.assertEqual(set(portal.got), {data})

    def test_portal_that_answers_once_a_connection(self) -> None:
        """A NACK is an answer, too: a connection that ends behind one counts against no other frame."""
        self.limits(BACKOFF=(0.01, 0.02))
        disliked, frames, acked = frame(sems.BUFFERED), frames_of(8), []

        def answer(data: bytes):
            acked.extend([data] if data != disliked else [])
            return lambda peer: peer.send(ack_of(data, 2 if data == disliked else 0))

        running = self.spooling(self.portal(habit=answer))
        device = running.device(disliked + b"".join(frames))
        device.packets(9)
        while not self.undelivered(running):
            until(lambda: set(acked) >= set(frames))
            frames.append(frame(when=minute(len(frames))))
            device.send(frames[-1])
            device.packets(1)
        running.emptied()
        self.assertEqual((self.undelivered(running), set(acked)), (1, set(frames)))

    def test_two_frames_without_an_answer(self) -> None:
        """A device whose ACK was lost sends that frame again, with a new one: both are answered in time, and come once more at most."""
        self.limits(RETURN_WINDOW=1, BACKOFF=(0.01, 0.02))
        portal = self.portal(habit=ack_of)
        running, old, new = self.spooling(portal), frame(), frame(when=minute(1))
        running.device(old).packets(1)
        until(lambda: portal.got)

        def is_answered() -> bool:
            with (
                contextlib.closing(running.device(old + new)) as device,
                contextlib.suppress(EOFError, ConnectionError),
            ):
                return len(device.packets(2)) == 2
            return False

        until(is_answered, pause=0.3)
        running.emptied()
        self.assertEqual((portal.got.count(old), portal.got.count(new)), (2, 1))

    def test_late_answer(self) -> None:
        """A connection that owes an old answer ends: when it came at last, it would be taken for that of the next frame."""
        self.limits(ANSWER_TIMEOUT=1, BACKOFF=(0.01, 0.02))
        portal = self.portal()
        running = self.spooling(portal)
        old, other, new = frame(sems.BUFFERED), frame(), frame(sems.BUFFERED, when=minute(1))
        device = running.device(old + other)
        leg = portal.receives(old + other)
        leg.send(ack_of(other))
        running.becomes(len(old), "sems_mitm_queue_bytes")
        device.send(new)
        leg.expect(new)
        self.assertEqual(leg.rest(), b"")
        portal.receives(new + old).send(ack_of(new) + ack_of(old))
        running.emptied()

    def test_frame_that_the_portal_does_not_like(self) -> None:
        """A portal that closes, is silent or says NACK whenever it meets one frame gets all others, in order, also after a restart.

        The frame is given up at its third count, which is counted and said.
        """
        self.limits(ANSWER_TIMEOUT=0.3, BACKOFF=(0.01, 0.02))
        disliked, scenes = frame(sems.BUFFERED), []
        for name, habit, restarts in (
            ("closes", closes, True), ("resets", resets, False), ("is silent", silence, False), ("says NACK", nack, True),
        ):  # fmt: skip
            portal, frames = self.portal(habit=but_for(disliked, habit)), frames_of(20)
            file = f"--sems.spool-file={self.file} {name}"
            running = self.spooling(portal, file)
            device = running.device(b"".join([*frames[:3], disliked, *frames[3:]]))
            device.packets(21)
            if restarts:
                until(lambda: disliked in portal.got)
                running.close()
                running = self.spooling(portal, file)
                device = running.device()
            scenes.append((name, portal, running, device, frames))

        def all_have_given_up() -> bool:
            waiting = [scene for scene in scenes if not self.undelivered(scene[2])]
            for *_, device, frames in waiting:
                frames.append(frame(when=minute(len(frames))))
                device.send(frames[-1])
                device.packets(1)
            until(lambda: all(frames[-1] in portal.got for _, portal, _, _, frames in waiting))
            return not waiting

        until(all_have_given_up)
        for name, portal, running, _, frames in scenes:
            with self.subTest(name):
                running.emptied()
                self.assertEqual([data for data in portal.firsts() if data != disliked], frames)
                self.assertEqual(self.undelivered(running), 1)
                self.assertGreaterEqual(portal.got.count(disliked), 3)
        given_up = [line for line in self.lines if disliked[:12].hex() in line and "0345" in line]
        self.assertEqual(len(given_up), len(scenes), self.lines)

    def test_outage_costs_nothing(self) -> None:
        """A portal that closes, is silent, refuses or answers too late with every frame, for long: not one is given up."""
        self.limits(ANSWER_TIMEOUT=0.06, BACKOFF=(0.005, 0.01))
        late = lambda data: time.sleep(0.1) or ack_of(data)
        frames, scenes = frames_of(2), {}
        for name, habit in {"closes": closes, "resets": resets, "silent": silence, "NACK": nack, "late": late}.items():
            portal = self.portal(habit=habit)
            scenes[name] = portal, self.spooling(portal)
            scenes[name][1].device(frames[0]).packets(1)
        for enough in (3, 6):  # connections, or refusals: three for each frame
            for portal, running in scenes.values():
                until(lambda: max(portal.legs, running.value("sems_mitm_nacks_total")) >= enough)
                running.device(frames[1]).packets(1) if enough == 3 else None
        self.limits(ANSWER_TIMEOUT=0.5)
        for name, (portal, running) in scenes.items():
            with self.subTest(name):
                portal.habit = ack_of
                running.emptied()
                self.assertEqual((sorted(portal.firsts()), self.undelivered(running)), (sorted(frames), 0))

    def test_lost_ack(self) -> None:
        """A device whose ACK was lost, while the portal is silent, is answered when the time of a loop's sign is over; the portal sees it once."""
        self.limits(RETURN_WINDOW=PATIENCE)
        portal, data = self.portal(habit=silence), frame()
        running = self.spooling(portal)
        running.device(data).packets(1)
        until(lambda: portal.got)
        running.devices[0].reset()
        self.assertEqual(running.device(data).rest(), b"")
        running.becomes(1, "sems_mitm_refused_connections_total", reason="loop")
        self.limits(RETURN_WINDOW=0.05, LOOP_WINDOW=0.05)

        def is_answered() -> bool:
            with contextlib.suppress(EOFError, ConnectionError):
                return bool(running.device(data).packets(1))
            return False

        until(is_answered, pause=0.1)
        self.assertEqual((portal.got, running.queued()), ([data], len(data)))

    def test_repeats(self) -> None:
        """A device that repeats itself while its frames wait is answered each time, and each is delivered once, also after a restart."""
        portal, frames = self.portal(listening=False, habit=ack_of), frames_of(60)
        for restarts in (False, True):
            running = self.exporter(portal, *self.flags)
            for _ in range(2):
                with contextlib.closing(running.device(b"".join(frames))) as device:
                    device.packets(60)
            running.close() if not restarts else portal.listen()
        running.emptied()
        self.assertEqual(portal.got, frames)

    def test_full_spool(self) -> None:
        """What finds no place is neither kept nor answered, counted, and said once; nothing that was ACKed is dropped."""
        frames = cheap_frames(60)
        for name, limits, flags in (
            ("all spools together are full", {"SPOOL_MEMORY": (1 << 20, 20_000)}, ()),
            ("the spool is full, in a file", {"SPOOL_FILE": (20_000, 1 << 20)}, self.flags),
            ("no spool is free", {}, ("--sems.max-connections=1",)),
        ):
            with self.subTest(name), mock.patch.multiple(sems, **limits or {"SPOOL_FILE": sems.SPOOL_FILE}):
                self.lines.clear()
                portal = self.portal(listening=False, habit=ack_of)
                running = self.spooling(portal, *flags)
                some = frames if limits else [frames[0], *frames_of(59, serial=OTHER)]
                device = running.device(b"".join(some))
                running.becomes(60, "sems_mitm_packets_total", direction="outbound")
                kept = int(running.value("sems_mitm_packets_total", verdict="answered"))
                self.assertTrue(10 < kept < 20 if limits else kept == 1, kept)
                self.assertEqual(running.value("sems_mitm_packets_total", verdict="dropped"), 60 - kept)
                self.assertEqual(sum("room" in line for line in self.lines), 1, self.lines)
                device.packets(kept)
                self.assertTrue(device.silent(0.02))
                portal.listen()
                running.emptied()
                device.send(frames[-1])
                device.packets(1)
                running.emptied()
                self.assertEqual(portal.got, [*frames[:kept], frames[-1]])

    def test_idle_spool(self) -> None:
        """A spool with nothing to deliver closes its connection long after its device's last frame; with something it does not."""
        self.limits(SILENCE=0.2)
        portal = self.portal()
        running = self.spooling(portal)
        running.device(frame()).packets(1)
        leg = portal.receives(frame())
        running.becomes(0, "sems_mitm_device_connections")
        self.assertTrue(leg.silent(0.25))
        leg.send(ack_of(frame()))
        self.assertEqual(leg.rest(), b"")
        running.becomes(0, "sems_mitm_upstream_connections")

    def test_commit_that_fails(self) -> None:
        """Whatever step of a commit fails, and why: nothing of its round is stored or answered, what was there stays, and the next is tried."""
        failing: list = []

        class Failing(sqlite3.Connection):
            def execute(self, text, *more, method=sqlite3.Connection.execute):
                if failing and text.startswith(failing[0]):
                    raise failing[1]
                return method(self, text, *more)

            executemany = functools.partialmethod(execute, method=sqlite3.Connection.executemany)

        self.patch(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Failing))
        portal, frames, self.faults = self.portal(listening=False, habit=ack_of), frames_of(8), 1
        running = self.exporter(portal, *self.flags)
        device = running.device()
        full = sqlite3.OperationalError("database or disk is full")
        rows = (("BEGIN", full), ("INSERT", full), ("COMMIT", full), ("INSERT", MemoryError()))
        for (step, error), kept, refused in zip(rows, frames[::2], frames[1::2]):
            with self.subTest(step, error=error):
                device.send(kept)
                device.packets(1)
                before = running.value("sems_mitm_packets_total", verdict="dropped")
                failing[:] = step, error
                device.send(refused)
                running.becomes(before + 1, "sems_mitm_packets_total", verdict="dropped")
                self.assertTrue(device.silent(0.01))
                failing.clear()
        self.assertGreaterEqual(running.value("sems_mitm_file_errors_total", file="spool"), 4)
        self.assertGreaterEqual(running.value("sems_mitm_internal_errors_total"), 1)
        self.assertEqual(sum("cannot use --sems.spool-file" in line for line in self.lines), 1, self.lines)
        portal.listen()
        running.emptied()
        self.assertEqual(portal.got, frames[::2])

    def test_portal_that_dies_at_random(self) -> None:
        """It gets every frame of every device and type at least once, and the device one ACK a frame."""
        self.limits(ANSWER_TIMEOUT=0.2)
        chance, kinds = random.Random(3), list(itertools.product((METER, OTHER), (sems.LIVE, sems.BUFFERED)))
        moody = lambda data: chance.choice([*[ack_of(data)] * 12, b"", Peer.reset, Peer.close])
        frames = [frame(kinds[i % 4][1], serial=kinds[i % 4][0], when=minute(i)) for i in range(120)]
        portal, sent = self.portal(habit=moody), 0
        running = self.spooling(portal)
        device = running.device()
        while sent < len(frames):
            some = frames[sent : sent + chance.randint(1, 12)]
            device.send(b"".join(some))
            device.packets(len(some))
            sent += len(some)
            if chance.random() < 0.3:
                portal.die()
                portal.listen()
        portal.habit = ack_of
        running.emptied()
        self.assertEqual((sorted(portal.firsts()), self.undelivered(running)), (sorted(frames), 0))
        self.assertTrue(device.silent(0.02))


class Insistent:
    """A device that sends bursts, frame after frame, and again what was not answered; `acked` is how many were."""

    def __init__(self, serial: str, port: int, chance: random.Random, count: int) -> None:
        self.serial, self.port, self.chance, self.acked = serial, port, chance, 0
        clear, kinds = b"\0" + b"\xff" * 15, (sems.LIVE, sems.BUFFERED)
        self.frames = [frame(kinds[i % 2], serial=serial, when=minute(i), clear=clear) for i in range(count)]

    def speak(self) -> None:
        """On one connection, until it is lost."""
        with contextlib.suppress(OSError, EOFError), contextlib.closing(connected(self.port)) as peer:
            peer.sock.settimeout(2)
            for _ in range(20):
                burst = self.frames[self.acked : self.acked + self.chance.choice((1, 1, 3, 40))]
                peer.send(b"".join(burst))
                for _ in burst:
                    peer.read(ACK_SIZE)
                    self.acked += 1
                time.sleep(self.chance.random() * 0.02)
        time.sleep(0.005)


QUICK = "sems.BACKOFF = (0.02, 0.05); sems.TICK = 0.02; sems.RETURN_WINDOW = 0.05"


class SpoolFileTest(SpoolCase):
    """--sems.spool-file: what was acknowledged outlives the process."""

    def filed(self, portal, *flags: str, **more) -> Process:
        """An exporter as a process, with the file."""
        return self.serving(portal, *self.flags, *flags, **{"before": QUICK, **more})

    def delivered(self, frames: list) -> None:
        """A new start delivers just these, in order, and keeps nothing."""
        portal = self.portal(habit=ack_of)
        running = self.exporter(portal, *self.flags)
        until(lambda: len(portal.firsts()) >= len(frames))
        running.emptied()
        self.assertEqual(portal.got, frames)
        running.close()

    def test_killed_and_started(self) -> None:
        """A second exporter on the file ends in one line. Of one that is killed the next delivers all, in order, also what is owed no answer."""
        frames = [frame(sems.SETTINGS), *frames_of(3), frame(sems.CONFIRMATION), *cheap_frames(2), frame(0x21)]
        process = self.filed(self.portal(listening=False))
        device = process.device(b"".join(frames[:-2]))
        device.packets(6)
        code, err = self.filed(None, before=f"{QUICK}; sems.SPOOL_LOCKED = 0.1").ended()
        self.assertEqual((code, err.count("\n"), self.file in err), (1, 1, True), err)
        device.send(b"".join(frames[-2:]))
        device.packets(1)
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
        ours = " ".join(call[1] for call in calls if call[2].startswith(self.file) or call[1].startswith("send"))
        self.assertRegex(ours, r"^((?!send)\w+ )*p?write(64)? ((?!send)\w+ )*f(data)?sync send(to|msg)")

    def test_what_is_no_file_of_ours(self) -> None:
        """An empty file is taken; anything else that is none of ours ends the start in one line, and stays as it is."""
        folder = pathlib.Path(self.directory())
        with contextlib.closing(sqlite3.connect(folder / "other")) as other:
            other.execute("CREATE TABLE spool (a, b)")
        written(str(folder), frame(), name="journal")
        (folder / "text").write_bytes(b"hello\n")
        (folder / "begins well").write_bytes(b"SQLite format 3\0" + bytes(99))
        (folder / "directory").mkdir()
        os.mkfifo(folder / "fifo")
        content = lambda: {path: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}
        before, start = content(), lambda path: self.process(*PORTS, "--sems.mode=spool", f"--sems.spool-file={path}")
        for path, process in [(path, start(path)) for path in (*before, folder / "none/file")]:
            with self.subTest(path.name):
                code, err = process.ended()
                self.assertEqual((code, err.count("\n"), str(path) in err), (1, 1, True), err)
                self.assertTrue(path.name != "journal" or "version 2" in err, err)
        self.assertEqual(content(), before)
        pathlib.Path(self.file).touch()
        running = self.exporter(self.portal(habit=ack_of), *self.flags)
        running.device(frame()).packets(1)
        running.emptied()

    def test_bat_signal(self) -> None:
        """The file and metrics keep the truth; a start with the flag draws the bat, a later one without it delivers the truth."""
        frames = [frame(when=minute(60 * hours)) for hours in (2, 3)]
        running = self.exporter(self.portal(listening=False), *self.flags, "--batsignal")
        running.device(b"".join(frames)).packets(2)
        self.assertEqual(running.value("meter_power_generation_watts"), 2600)
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
        self.exporter(portal, *self.flags, "--sems.max-connections=2").emptied()
        self.assertEqual(sorted(data[14:30].decode() for data in portal.got), serials)

    def test_long_backlog(self) -> None:
        """A start with 4 MB needs no more memory than without. What was delivered before a kill is not sent again, but for what was under way.

        Delivered, the file is small again. TEST_SLOW=1: a start with 250 MB, and its time.
        """
        portal, slow = self.portal(listening=False, habit=ack_of), os.environ.get("TEST_SLOW")
        serials, count = [f"91000HKU{number:08d}" for number in range(8 if slow else 1)], 4000 if slow else 500
        process = self.filed(portal)
        process.get("/metrics")
        empty, frames = process.status("VmHWM"), []
        for serial in serials:
            device, some = process.device(), cheap_frames(count, 8000, serial)
            frames += some
            for i in range(0, count, 100):
                device.send(b"".join(some[i : i + 100]))
                device.packets(100)
        process.stop(signal.SIGKILL)
        begin = time.monotonic()
        process = self.filed(portal)
        self.assertEqual(process.queued(), sum(map(len, frames)))
        took, filled = time.monotonic() - begin, process.status("VmHWM")
        self.assertLess(filled - empty, 2000)
        if slow:
            mb = process.queued() / 1e6
            return print(f"a start with {mb:.0f} MB: {took:.2f} s, {filled} kB, without a file {empty} kB")
        portal.listen()
        until(lambda: len(portal.got) > 100)
        process.stop(signal.SIGKILL)
        self.assertLess(len(portal.got), len(frames), "it was killed too late to show anything")
        process = self.filed(portal)
        process.emptied()
        self.assertEqual(sorted(portal.firsts()), sorted(frames))
        self.assertLessEqual(len(portal.got) - len(frames), 2 * 32 * len(serials))
        until(lambda: os.path.getsize(self.file) < count * 4000)  # the log, of 64 pages at most, holds the last of it
        process.stop()
        self.assertLess(os.path.getsize(self.file), 100_000)

    def test_killed_at_random(self) -> None:
        """kill -9 at random moments of bursts, deliveries, failures: every ACKed frame is delivered. TEST_KILLS=100: so often."""
        kills, seed = int(os.environ.get("TEST_KILLS", "5")), int(os.environ.get("TEST_SEED", "1"))
        chance, moods, port = random.Random(seed), random.Random(seed), self.unused_port()
        portal = self.portal(habit=lambda data: moods.choice([*[ack_of(data)] * 30, b"", Peer.reset, Peer.close]))
        devices = [Insistent(f"91000HKU{i:08d}", port, random.Random(seed + i), 300 * kills) for i in range(4)]
        stops = [self.again_and_again(device.speak) for device in devices]
        acked = lambda: sum(device.acked for device in devices)
        for number in range(kills + 1):
            before, was = f"{QUICK}; sems.ANSWER_TIMEOUT = 0.2", acked()
            process = self.filed(portal, f"--sems.listen-address={LOCAL}:{port}", before=before)
            until(lambda: acked() > was)
            if number < kills:
                time.sleep(chance.random() ** 2 * 0.2)
                process.stop(signal.SIGKILL)
            if chance.random() < 0.3:
                portal.die()
                portal.listen()
        for stop in stops:
            stop()
        portal.habit = ack_of
        for device in devices:
            until(lambda: set(portal.firsts(device.serial)) >= set(device.frames[: device.acked]), pause=0.05)
        self.assertNotIn("Traceback", process.stderr())
        if kills > 20:
            print(f"{kills} kills, {acked()} ACKed frames, {len(portal.firsts())} delivered, none lost")


class DiskTest(SocketCase):
    """The spool's disk has little room, or cannot be written: a small file system in a mount namespace of the process."""

    def setUp(self) -> None:
        super().setUp()
        self.disk = self.directory()
        if os.geteuid() or not shutil.which("unshare") or not shutil.which("nsenter"):
            self.skipTest("needs root, unshare and nsenter for file systems of its own")
        probe = subprocess.run([*self.mounted("true"), "true"], capture_output=True, text=True)
        if probe.returncode:
            self.skipTest(f"no mount namespaces here: {probe.stderr.strip()}")

    def mounted(self, then: str) -> tuple:
        """The command that gives a process an empty file system, and does something there first."""
        script = f'mount -t tmpfs -o size=8m tmpfs "$0" && cd "$0" && {then} && cd / && exec "$@"'
        return ("unshare", "--mount", "sh", "-c", script, self.disk)

    def filed(self, portal, under: tuple) -> Process:
        flags = ("--sems.mode=spool", f"--sems.spool-file={self.disk}/spool")
        process = self.serving(portal, *flags, before=QUICK + "; sems.PERIOD = 60", under=under)
        process.ports()
        return process

    def again(self, process: Process, portal) -> Process:
        """It is killed, and started anew in the same mount namespace, which a sleeper keeps alive."""
        where = ("nsenter", f"--mount=/proc/{process.popen.pid}/ns/mnt", "sleep", "600")
        sleeper = subprocess.Popen(where)
        self.addCleanup(lambda: (sleeper.kill(), sleeper.wait()))
        until(lambda: os.readlink(f"/proc/{sleeper.pid}/ns/mnt") == os.readlink(f"/proc/{process.popen.pid}/ns/mnt"))
        process.stop(signal.SIGKILL)
        return self.filed(portal, ("nsenter", f"--mount=/proc/{sleeper.pid}/ns/mnt"))

    def inside(self, process: Process, command: str) -> None:
        """Do something in its mount namespace."""
        namespace = f"--mount=/proc/{process.popen.pid}/ns/mnt"
        script = f"cd {self.disk}; {command.format(pid=process.popen.pid)}"
        subprocess.run(["nsenter", namespace, "sh", "-c", script], check=True)

    def is_refused(self, process: Process, device: Peer, data: bytes) -> bool:
        """Whether the device gets no ACK for its frame, which is counted as dropped."""
        dropped = lambda: process.value("sems_mitm_packets_total", direction="outbound", verdict="dropped")
        before = dropped()
        device.send(data)
        until(lambda: dropped() > before or not device.silent(0))
        return device.silent(0.02)

    def test_disk_trouble(self) -> None:
        """No ACK that is not on the disk; the exporter serves, delivers what it has, says so once, and recovers by itself."""
        free, limit = "$(df --output=avail -B1 . | tail -n 1)", "prlimit --pid {pid} --fsize="
        filled, read_only = (
            "head -c 100m /dev/zero >filler 2>/dev/null || true",
            f"cd / && mount -o remount,ro {self.disk}",
        )
        read_write = f"mount -o remount,rw {self.disk}"
        for name, before, trouble, cure in (  # what is done before the start, after it, and in the end
            ("full to the last byte", "true", filled, "rm filler"),
            ("less room than others need", "true", f"head -c $(({free} - 900000)) /dev/zero >filler", "rm filler"),
            ("errors", "true", f"{limit}1:", f"{limit}unlimited:"),
            ("full at the start", filled, "", "rm filler"),
            ("read-only at the start", read_only, "", read_write),
            ("read-only at the start, with a file", f": >spool && {read_only}", "", read_write),
        ):
            with self.subTest(name):
                portal, frames = self.portal(listening=False, habit=ack_of), frames_of(20)
                acked, refused, later = frames[: 10 if trouble else 0], frames[10:14], frames[15:]
                process = self.filed(portal, self.mounted(before))
                device = process.device(b"".join(acked))
                device.packets(len(acked))
                self.inside(process, trouble) if trouble else None
                self.assertTrue(all(self.is_refused(process, device, data) for data in refused))
                self.assertEqual(process.get("/-/healthy")[0], 200)
                self.assertGreaterEqual(process.value("sems_mitm_file_errors_total", file="spool"), 1)
                self.assertEqual(process.value("meter_metrics_packets_total"), len(acked) + 4)
                said = sum(self.disk in line for line in process.stderr().splitlines())
                self.assertEqual(said, 1 if name != "errors" else 0, process.stderr())  # its stderr is a file, too
                if name == "full to the last byte":  # what is stored outlives a kill meanwhile
                    process = self.again(process, portal)
                    device = process.device()
                    self.assertTrue(self.is_refused(process, device, frames[14]))
                portal.listen()
                until(lambda: len(portal.firsts()) == len(acked))
                self.assertEqual(portal.firsts(), acked)
                self.inside(process, cure)
                portal.die()
                until(lambda: device.send(later[0]) or not device.silent(0.1))  # again and again, until it is answered
                while not device.silent(0.15):
                    device.packets(1)
                device.send(b"".join(later[1:]))
                device.packets(4)
                process = self.again(process, portal) if trouble else process
                portal.listen()
                until(lambda: set(portal.got) >= {*acked, *later})
                process.emptied()
                self.assertEqual([data for data in portal.firsts() if data not in refused], [*acked, *later])
                self.assertNotIn("Traceback", process.stderr())


# ---------------------------------------------------------------------------------------------- sockets: connections


class ConnectionsTest(NamedCase):
    """How connections end, and which are refused."""

    def test_half_close(self) -> None:
        """A device that has sent its last byte still gets what the portal says within the time for it."""
        for portal_closes in (True, False):
            with self.subTest(portal_closes=portal_closes):
                self.limits(LINGER=PATIENCE if portal_closes else 0.5)
                portal, running = self.started()
                device = running.device(frame())
                device.no_more()
                leg = portal.accept()
                self.assertEqual(leg.rest(), frame())
                time.sleep(0.06 * portal_closes)
                leg.send(ack_of(frame()))
                device.expect(ack_of(frame()))
                leg.close() if portal_closes else None
                self.assertEqual(device.rest(), b"")
                running.becomes(0, "sems_mitm_device_connections")

    def test_at_once_if_nothing_was_sent(self) -> None:
        """A device that goes without a word leaves nothing behind."""
        self.limits(LINGER=3 * PATIENCE)
        for mode in ("forward", "local", "spool"):
            with self.subTest(mode):
                _, running = self.started(f"--sems.mode={mode}")
                device = running.device()
                running.becomes(1, "sems_mitm_device_connections")
                device.close()
                running.becomes(0, "sems_mitm_device_connections")

    def test_silent_device(self) -> None:
        """A device silent for long is closed, and its portal's connection with it; one that speaks is not."""
        self.limits(SILENCE=0.5, LINGER=0.05)
        portal, running, idle, _ = self.talking()
        talker = running.device(frame(serial=OTHER))
        portal.receives(frame(serial=OTHER))
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
        for networks, refused in (("10.0.0.0/8,192.168.1.0/24", 1), ("10.0.0.0/8,127.0.0.0/8", 0), ("::1/128", 1)):
            with self.subTest(networks):
                running = self.exporter(None, "--sems.mode=local", f"--sems.allow-from={networks}")
                device = running.device()
                running.becomes(refused, "sems_mitm_refused_connections_total", reason="not_allowed")
                self.assertEqual(device.rest(), b"") if refused else device.send(frame()) or device.packets(1)

    def test_every_family(self) -> None:
        """:PORT is a socket for each family there is, and peers are plain addresses."""
        capture = os.path.join(self.directory(), "capture")
        flags = ("--sems.listen-address=:0", "--web.listen-address=:0", f"--sems.capture={capture}")
        running = self.exporter(None, "--sems.mode=local", *flags)
        for host in FAMILIES:
            running.device(frame(), host=host).packets(1)
            with contextlib.closing(connected(running.web_port, b"GET /-/healthy HTTP/1.0\r\n\r\n", host=host)) as peer:
                self.assertIn(b" 200 ", peer.rest())
        peers = [json.loads(line)["peer"].rpartition(":")[0].strip("[]") for line in open_lines(capture)]
        self.assertEqual([peer for peer in peers if peer], FAMILIES)


class Detour(threading.Thread):
    """A relay between the exporter and itself that hides both ends, as NAT does; `turns` counts connections."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.sock, self.host, self.target, self.turns = socket.create_server((LOCAL, 0)), LOCAL, 0, 0
        self.delay = 0.0  # s on the way
        self.port = self.sock.getsockname()[1]

    def run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self.sock.accept()[0], socket.create_connection((LOCAL, self.target))
                self.turns += 1
                threading.Thread(target=self.pass_on, args=(near, far), daemon=True).start()

    def pass_on(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, contextlib.suppress(OSError):
            while True:
                for sock in select.select([near, far], [], [])[0]:
                    if not (data := sock.recv(1 << 16)):
                        return
                    time.sleep(self.delay)
                    (far if sock is near else near).sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class LoopTest(SocketCase):
    """A portal's name that leads back here."""

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
                itself = mock.Mock(host=LOCAL, port=self.unused_port())
                running = self.exporter(itself, f"--sems.mode={mode}", f"--sems.listen-address={LOCAL}:{itself.port}")
                running.device(frame())
                until(lambda: running.value(FAILURES, reason="loop") >= 2)
                shown = running.metrics()
                for series, count in (
                    ("sems_mitm_device_connections", 1), ("sems_mitm_upstream_connections", 0),
                    ("sems_mitm_refused_connections_total", 0), ("meter_metrics_packets_total", 1),
                ):  # fmt: skip
                    self.assertEqual(summed(shown, series), count)
                self.assertEqual(sum("--sems.upstream" in line for line in self.lines), 1, self.lines)

    def test_first_frame_comes_back(self) -> None:
        """Where NAT hides both ends, a first frame that we sent just now and that comes back is a loop, once.

        A device that comes with its last frame again is let in the next time, and after a while, or when its old
        connection has gone, at once.
        """
        for mode, later in (("forward", ""), ("spool", ""), ("forward", "after a while"), ("forward", "gone")):
            with self.subTest(mode, later=later):
                self.limits(LOOP_WINDOW=0.05 if later == "after a while" else 2 * PATIENCE, LINGER=0)
                portal, running, device, leg = self.talking(f"--sems.mode={mode}")
                if later == "gone":
                    device.close()
                    leg.close()
                    running.becomes(0, "sems_mitm_device_connections")
                elif later:
                    time.sleep(0.1)
                else:
                    self.assertEqual(running.device(frame()).rest(), b"")
                    running.becomes(1, "sems_mitm_packets_total", verdict="dropped")
                    self.assertTrue(portal.unasked(0.02))
                    leg.send(ack_of(frame()))
                    self.assertEqual(device.packets(1)[0].type, "0304")
                if mode == "forward":
                    running.device(frame())
                    portal.receives(frame())
                running.becomes(not later, "sems_mitm_refused_connections_total", reason="loop")

    def test_never_spirals(self) -> None:
        """However the first bytes are cut, and whatever they are: our own bytes come back once an attempt, and go no further."""
        data, other = frame(), frame(when=minute(1))
        self.limits(BACKOFF=(30, 30), PATIENCE={"outbound": 0.2, "inbound": 0.2})
        for mode, parts, more in (  # more: they are not cut the same way when they come back
            ("forward", [data], 0),
            ("forward", [data[:10], data[10:]], 0),
            ("forward", [data[100:] + other], 0),
            ("forward", [spoilt(data) + other], 0),
            ("forward", [b"junk" * 30], 0),
            ("forward", [b"\0", b"junk" * 30], 1),
            ("forward", [data[:50]], 1),
            ("spool", [data + other], 0),
        ):
            with self.subTest(mode, parts=parts):
                detour, running = self.detoured(mode)
                device = running.device()
                for part in parts:
                    device.send(part)
                    time.sleep(0.02)
                running.becomes(1, "sems_mitm_refused_connections_total", reason="loop")
                self.assertLessEqual(detour.turns, 1 + more)
                until(lambda: running.value("sems_mitm_device_connections") <= 1 + more)

    def test_frame_after_frame(self) -> None:
        """A loop takes no connection more with each packet, however long after the last."""
        self.limits(BACKOFF=(0.01, 0.01), LOOP_WINDOW=0.2, LINGER=0.05)
        running = self.detoured("forward")[1]
        device = running.device()
        for i in range(3):
            device.send(frame(when=minute(i)))
            until(lambda: running.value("sems_mitm_refused_connections_total", reason="loop") > i)
            time.sleep(0.25)  # the window is over
            self.assertLessEqual(running.value("sems_mitm_device_connections"), 2)

    def test_device_that_repeats_itself(self) -> None:
        """A loop does not grow when its device sends a frame again and again, nor when many leave before the first is back."""
        self.limits(BACKOFF=(0.01, 0.01))
        for name, delay, frames in (("one frame", 0.0, [frame()] * 6), ("many", 0.2, frames_of(20))):
            with self.subTest(name):
                detour, running = self.detoured("forward")
                detour.delay, device = delay, running.device()
                for data in frames:
                    device.send(data)
                    time.sleep(0.01 if delay else 0.1)
                running.becomes(len(frames), "sems_mitm_packets_total", direction="outbound", verdict="forwarded")
                until(lambda: running.value("sems_mitm_refused_connections_total", reason="loop") >= 1)
                time.sleep(2 * delay)
                self.assertEqual(running.value("sems_mitm_device_connections"), 1)

    def test_beginning_of_a_frame(self) -> None:
        """Bytes that are no more than the beginning of what left just now are no loop."""
        portal = self.portal()
        running = self.exporter(portal)
        for i, begin in enumerate((b"P", b"PO", frame()[:40])):
            with self.subTest(begin):
                running.device(frame(when=minute(i)))
                portal.receives(frame(when=minute(i)))
                running.device(begin + frame(serial=OTHER, when=minute(i)))
                portal.receives(begin + frame(serial=OTHER, when=minute(i)))

    def test_two_that_face_each_other(self) -> None:
        """Two exporters, each the other's portal, in all pairs of modes, the device there or gone: quiet soon.

        Once one of them has the true portal, what was ACKed is there.
        """
        self.limits(BACKOFF=(0.3, 60), RETURN_WINDOW=1.5, LOOP_WINDOW=0.5, LINGER=0.1)
        frames, scenes = frames_of(5), []
        for *modes, stays in itertools.product(("forward", "spool"), ("forward", "spool"), (True, False)):
            ports, folder = [self.unused_port(), self.unused_port()], self.directory()

            def start(one: int, portal_port: int, modes=modes, ports=ports, folder=folder) -> Running:
                flags = [f"--sems.mode={modes[one]}", f"--sems.listen-address={LOCAL}:{ports[one]}"]
                flags += [f"--sems.spool-file={folder}/{one}"] * (modes[one] == "spool")
                return self.exporter(mock.Mock(host=LOCAL, port=portal_port), *flags)

            both = [start(one, ports[1 - one]) for one in (0, 1)]
            device = both[0].device(b"".join(frames))
            acked = len(device.packets(5 if modes[0] == "spool" else 0))
            device.close() if not stays else None
            scenes.append((modes, stays, start, both, acked))

        def traffic() -> float:
            counters = ("sems_mitm_packets_total", "sems_mitm_refused_connections_total")
            return sum(running.value(series) for *_, both, _ in scenes for running in both for series in counters)

        until(lambda: -traffic() + (time.sleep(0.3) or traffic()) < 100)
        self.limits(RETURN_WINDOW=0.05, LOOP_WINDOW=-1, ANSWER_TIMEOUT=0.4)  # later what comes back is answered
        for modes, _, _, both, _ in scenes:
            until(lambda: modes != ["spool", "forward"] or both[0].value("sems_mitm_acks_total") > 5)
        for modes, stays, start, both, acked in scenes:
            with self.subTest(modes=modes, stays=stays):
                acked = acked or int(both[0].value("sems_mitm_acks_total"))
                one = int(modes[1] == "spool")  # is put right
                both[one].close()
                portal = self.portal(habit=ack_of)
                start(one, portal.port)
                until(lambda: set(portal.got) >= set(frames[:acked]), pause=0.05)


class NameTest(NamedCase):
    """How the portal's name becomes an address."""

    def server(self, *addresses: str) -> NameServer:
        server = NameServer(lambda query: [address_record(query, *addresses)])
        self.addCleanup(server.close)
        return server

    def test_servers_first(self) -> None:
        """The servers are asked first, anew for each attempt; while one gives a routable address the system is not asked."""
        self.system, server, portal = ["10.0.0.1"], self.server("10.0.0.9", LOCAL), self.portal()
        running = self.named(portal, servers=[server])
        device = running.device()
        for attempt in (1, 2, 3):
            device.send(frame(when=minute(attempt)))
            leg = portal.receives(frame(when=minute(attempt)))
            self.assertEqual((server.asked, self.asked), (attempt, 0))
            leg.close()
            running.becomes(0, "sems_mitm_upstream_connections")
        self.assertEqual(running.value(FAILURES), 0)

    def test_no_address(self) -> None:
        """A name that nobody knows, and one that leads to this machine: a reason, a line that says what to change, no attempt."""
        self.patch(sems, "is_global", lambda host: False)
        for self.system, answer, reason in (
            ([], [], "dns"),
            (["127.0.0.2"], ["192.168.1.2"], "loop"),
            (["127.0.0.2"], [], "loop"),
        ):
            with self.subTest(system=self.system, answer=answer):
                self.lines.clear()
                portal = self.portal()
                running = self.named(portal, servers=[self.server(*answer)])
                running.device(frame())
                until(lambda: running.value(FAILURES, reason=reason) >= 2)
                self.assertTrue(portal.unasked(0.02))
                (line,) = (line for line in self.lines if "portal.test" in line and "cannot reach" in line)
                self.assertIn("--sems.upstream-dns", line)
                self.assertEqual(running.value("sems_mitm_upstream_up"), 0)
                running.stop()

    def test_addresses(self) -> None:
        """Of a name's addresses the next is tried when one refuses, four at most in an attempt."""
        portal, closed = self.portal(), (LOCAL, self.unused_port())
        tried, connect = [], socket.socket.connect_ex
        self.patch(socket.socket, "connect_ex", lambda sock, address: tried.append(address) or connect(sock, address))
        for refusing, is_reached in ((3, True), (4, False), (1500, False)):
            with self.subTest(refusing=refusing):
                self.system, tried[:] = [closed] * refusing + [LOCAL], []
                running = self.named(portal)
                running.device(frame())
                if is_reached:
                    portal.receives(frame())
                    self.assertEqual(running.value(FAILURES), 0)
                else:
                    until(lambda: running.value(FAILURES) >= 3)
                    running.stop()
                    self.assertLessEqual(len(tried), 4 * self.asked)
                    self.assertTrue(portal.unasked(0.02))

    def test_look_up_that_hangs(self) -> None:
        """A name service that says nothing holds up nothing but attempts, which end in time, and costs one thread, ever.

        When it answers at last, all are connected but for a device that went meanwhile.
        """
        self.limits(CONNECT_TIMEOUT=0.05, LAST_ATTEMPT=0.02)
        self.go.clear()
        portal, most, before = self.portal(), 0, threading.active_count() + 1
        running = self.named(portal)
        devices = [running.device(frame(serial=f"91000HKU{i:08d}")) for i in range(10)]
        while running.value(FAILURES, reason="dns") < 30:
            most = max(most, threading.active_count())
        devices[0].send(b"".join(frames_of(500)))
        running.becomes(510, "meter_metrics_packets_total")
        self.assertEqual((most - before, self.asked), (1, 1))
        self.assertEqual(running.value("sems_mitm_upstream_up"), 0)
        self.assertEqual(running.get("/-/ready")[0], 200)
        devices[0].reset()
        running.becomes(9, "sems_mitm_device_connections")
        self.limits(CONNECT_TIMEOUT=PATIENCE)
        self.go.set()
        self.assertEqual([portal.accept().read(6) for _ in range(9)], [b"POSTGW"] * 9)
        self.assertTrue(portal.unasked())

    def test_look_up_that_comes_late(self) -> None:
        """A name service that answers each time after the attempt has ended still leads to the portal."""
        self.limits(CONNECT_TIMEOUT=0.05, BACKOFF=(0.3, 0.3))
        system = self.look_up
        self.numeric.side_effect = lambda host, *rest, **more: (
            time.sleep(0.15 if str(host).endswith(".test") else 0) or system(host, *rest, **more)
        )
        for mode in ("forward", "spool"):
            with self.subTest(mode):
                portal = self.portal()
                running = self.named(portal, f"--sems.mode={mode}")
                running.device(frame())
                portal.receives(frame())
                self.assertGreaterEqual(running.value(FAILURES, reason="dns"), 1)

    def test_out_of_threads(self) -> None:
        """No thread to be had: no error, and it works when there are some again."""
        portal = self.portal()
        running = self.named(portal)
        with mock.patch.object(threading.Thread, "start", side_effect=RuntimeError("can't start new thread")):
            device = running.device(frame())
            running.becomes(1, "meter_metrics_packets_total")
            until(lambda: running.value(FAILURES) >= 2)
        portal.receives(frame())
        self.assertTrue(device.silent(0.01))


# ---------------------------------------------------------------------------------------------------- sockets: limits


class LimitsTest(SocketCase):
    """Out of descriptors, much to do, much that waits."""

    def test_out_of_descriptors(self) -> None:
        """Connections wait on both families and on HTTP: those there are go on, nothing spins, and accepting resumes."""
        portal = self.portal()
        limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32)); sems.TICK = 0.1; sems.BACKOFF = (0.05, 0.1)"
        process = self.serving(portal, "--sems.listen-address=:0", before=limit)
        device, leg = process.device(frame()), portal.receives(frame())
        idle = [process.device(host=host) for host in FAMILIES for _ in range(15)]
        idle += [process.client() for _ in range(15)]
        until(lambda: len(os.listdir(f"/proc/{process.popen.pid}/fd")) >= 31)
        before = process.cpu()
        for _ in range(8):
            device.send(frame())
            leg.expect(frame())
            time.sleep(0.05)
        self.assertLess(process.cpu() - before, 0.2)
        for peer in idle:
            peer.reset()
        for serial, host in zip((OTHER, INVERTER), FAMILIES):
            process.device(frame(serial=serial), host=host)
            portal.receives(frame(serial=serial))
        self.assertEqual(process.value("process_max_fds"), 32)
        self.assertEqual(process.value("sems_mitm_internal_errors_total"), 0)
        self.assertEqual((process.stop(), "Traceback" in process.stderr()), (0, False))

    def test_hardly_a_descriptor(self) -> None:
        """With 5 to 12 descriptors it ends in one line, or serves."""
        path, started = os.path.join(self.directory(), "spool"), {}
        for number in range(5, 13):
            limit = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({number}, {number}))"
            flags = ("--sems.mode=spool", f"--sems.spool-file={path}{number}", *PORTS)
            started[number] = self.process(*flags, before=limit)
        for number, process in started.items():
            with self.subTest(descriptors=number):
                until(lambda: process.popen.poll() is not None or "devices connect" in process.stderr())
                if process.popen.poll() is None:
                    process.device(frame())
                    self.assertEqual(process.stop(), 0)
                else:
                    lines = [line for line in process.stderr().splitlines() if " WARNING " not in line]
                    self.assertEqual((process.popen.poll(), len(lines)), (1, 1), process.stderr())
                self.assertNotRegex(process.stderr(), "Traceback|Warning|Exception")

    def all_soon(self, *works, times: int = 5) -> None:
        """Each work takes less than a second at the best of several times: the machine has other things to do, too."""
        took = [float("inf")] * len(works)
        for _ in range(times):
            for i, work in enumerate(works):
                begin = time.monotonic()
                work()
                took[i] = min(took[i], time.monotonic() - begin)
            if max(took) < 1:
                return
        self.fail(f"{took} s")

    def test_a_flood_delays_no_other(self) -> None:
        """While one peer floods and 100 are connected, another device's packet and a scrape have their turn soon."""
        portal, pairs, number = self.portal(), [], itertools.count()
        process = self.serving(portal, f"--sems.capture={self.directory()}/capture", "--sems.max-devices=512")
        for i in range(102):
            data = frame(serial=f"91000HKU{i:08d}")
            pairs.append((process.device(data), portal.receives(data)))
        (probe, leg), (device, other) = pairs[:2]
        nameless = with_crc(with_length(b"POSTGW....\x03.."))
        several = b"".join(frame(serial=f"91000HKU{i:08d}", when=minute(1)) for i in range(200))

        def packet() -> None:
            data = frame(when=NOON + timedelta(seconds=next(number)))
            probe.send(data)
            leg.expect(data)

        for name, sender, receiver, block in (
            ("frames without a serial number", device, other, nameless * 5000),
            ("200 serial numbers", device, other, several),
            ("keep-alives of a portal", other, device, BEAT * 30_000),
        ):
            position = 0

            def flood() -> None:
                nonlocal position
                readable, writable, _ = select.select([receiver.sock], [sender.sock], [], 0.1)
                if readable:
                    receiver.sock.recv(1 << 20)
                if writable:
                    position = (position + sender.sock.send(block[position:])) % len(block)

            with self.subTest(name):
                stop = self.again_and_again(flood)
                self.all_soon(packet, lambda: process.get("/metrics"))
                stop()

    def local(self) -> tuple:
        """An exporter of mode local as a process, and what its users want: that a packet is answered, and a scrape."""
        process = self.serving(None, "--sems.mode=local")
        device = process.device()
        packet = lambda: device.send(frame(serial=OTHER)) or device.packets(1)
        return process, packet, lambda: self.assertEqual(process.get("/metrics")[0], 200)

    def test_long_frames_to_decode(self) -> None:
        """256 serial numbers with three live frames of 8 KiB each, then a scrape: nobody waits longer than a second."""
        process, packet, scrape = self.local()
        data = frame(clear=sems.payload([(first, range(1, 1001)) for first in (0, 1000, 2000, 3000)])[: 8192 - 64])
        crowd = [process.device() for _ in range(8)]

        def wave(number: int) -> None:
            """All send frames that they have not sent yet: the last byte of the IV changes a register alone."""
            ends = [bytes([data[45] ^ 3 * number + n]) + data[46:] for n in range(3)]
            for i in range(256):
                begin = data[:14] + b"91000HKU%08d" % i + data[30:45]
                crowd[i % 8].send(b"".join(with_crc(begin + end) for end in ends))
                crowd[i % 8].packets(3)

        packet()
        for number in range(3):
            wave(number)
            with contextlib.suppress(AssertionError if number < 2 else ()):
                return self.all_soon(scrape, packet, times=1)

    def test_crowd_of_http_clients(self) -> None:
        """200 silent clients, 200 that send a byte now and then, 100 that come back at once, 40 slow readers hold up nobody."""
        process, packet, scrape = self.local()
        packet()
        for _ in range(200):
            process.client()
        dribblers, returning = [process.client(b"G") for _ in range(200)], []
        for _ in range(40):
            process.client(b"GET /metrics HTTP/1.0\r\n\r\n", 2048)

        def crowd() -> None:
            for peer in [peer for peer in returning if not peer.silent(0)]:
                peer.close()
                returning.remove(peer)
            with contextlib.suppress(OSError):
                returning.extend(connected(process.web_port) for _ in range(100 - len(returning)))
            for peer in random.sample(dribblers, 5):
                with contextlib.suppress(OSError):
                    peer.send(b"E")
            time.sleep(0.01)

        stop = self.again_and_again(crowd)
        for _ in range(10):
            self.all_soon(scrape, packet)
        stop()
        for peer in returning:
            peer.close()
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
        """256 connections, the portal away, queues full, an unfinished frame in each, ten slow readers of the page: under 80 MB."""
        process = self.serving(self.portal(listening=False), before="sems.BACKOFF = (5, 60)", MALLOC_ARENA_MAX="2")
        data = next(bytes.fromhex(row["hex"]) for row in VECTORS if row["hex"][20:24] == "0204")
        clear, unfinished = sems.decode(data, OUT).clear, b"POSTGW\0\0\x1f\xf0\x03\x04" + bytes(8000)
        for i in range(256):
            process.device(frame(sems.LIVE, 2, f"9010KETU{i:08d}", clear=clear))
        for i, device in enumerate(process.devices):
            device.send(cheap_frames(1, 1024, f"91000HKU{i:08d}")[0] * 64 + unfinished)
        for _ in range(10):
            process.client(b"GET / HTTP/1.0\r\n\r\n", SMALL)
        until(lambda: process.value("sems_mitm_packets_total", type="0345") == 256 * 64, 2 * PATIENCE, 0.3)
        self.assertGreater(process.queued(), sems.QUEUES - sems.HTTP_ANSWERS)
        self.assertLess(process.status("VmHWM"), 80 << 10)


# ---------------------------------------------------------------------------------------------- sockets: files, life


class RecordedFilesTest(SocketCase):
    """--sems.capture and --sems.backfill."""

    def setUp(self) -> None:
        super().setUp()
        folder = self.directory()
        self.paths = self.capture, self.backfill = f"{folder}/capture", f"{folder}/backfill"
        self.flags = (f"--sems.capture={self.capture}", f"--sems.backfill={self.backfill}")

    def test_written_at_once(self) -> None:
        """Every frame is in the capture before its answer comes, a device's buffered readings in the other file; a torn line is ended."""
        frames = [frame(sems.SETTINGS), frame(), frame(sems.BUFFERED)]
        for before in ("", "old\n", "torn"):
            with self.subTest(before):
                for path in self.paths:
                    pathlib.Path(path).write_text(before)
                running = self.exporter(self.portal(habit=ack_of), *self.flags)
                device = running.device(spoilt(frame()) + b"".join(frames))
                device.packets(3)
                lines, buffered = (list(map(json.loads, open_lines(path)[bool(before) :])) for path in self.paths)
                outward = [line for line in lines if line["direction"] == "outbound"]
                self.assertEqual([line["hex"] for line in outward], [data.hex() for data in (spoilt(frame()), *frames)])
                self.assertEqual([line["hex"] for line in buffered], [frames[2].hex()])
                self.assertEqual({line["verdict"] for line in lines}, {"forwarded"})
                self.assertEqual({line["peer"] for line in outward}, {"%s:%d" % device.sock.getsockname()})
                when = datetime.fromisoformat(lines[0]["time"])
                self.assertEqual(when.utcoffset(), timedelta(0))
                self.assertLess(abs(when.timestamp() - time.time()), PATIENCE)

    def test_trouble_with_a_file(self) -> None:
        """A full disk, a bad path, a FIFO that nobody reads: counted, a log line a minute, nothing else changes, and tried again."""
        folder = self.directory()
        os.mkfifo(f"{folder}/fifo")
        rows = (("/dev/full", 5, 5), (f"{folder}/later/file", 5, 5), (folder, 5, 5), (f"{folder}/fifo", 300, 1))
        for path, count, errors in rows:
            with self.subTest(path):
                self.lines.clear()
                running = self.exporter(None, "--sems.mode=local", f"--sems.capture={path}", f"--sems.backfill={path}")
                device = running.device(b"".join(frames_of(count, function=sems.BUFFERED)))
                device.packets(count)
                for file in ("capture", "backfill"):
                    until(lambda: running.value("sems_mitm_file_errors_total", file=file) >= errors)
                self.assertEqual(running.value("sems_mitm_buffered_packets_total"), count)
                self.assertEqual(sum("--sems.capture" in line for line in self.lines), 1, self.lines)
                if "later" in path:
                    os.mkdir(f"{folder}/later")
                    device.send(frame(sems.BUFFERED, serial=OTHER))
                    device.packets(1)
                    self.assertEqual(len(open_lines(path)), 2)

    def test_torn_line(self) -> None:
        """A line that a full disk tears is counted, and the next begins on a line of its own."""
        running, write = self.exporter(None, "--sems.mode=local", self.flags[0]), os.write
        device = running.device()
        with mock.patch.object(os, "write", lambda file, data: write(file, data[:30])):
            device.send(frame())
            until(lambda: running.value("sems_mitm_file_errors_total", file="capture") == 1)
        device.send(frame())
        until(lambda: len(open_lines(self.capture)) == 2)
        torn, line = open_lines(self.capture)
        self.assertEqual((len(torn), json.loads(line)["hex"]), (30, frame().hex()))

    def test_opened_anew(self) -> None:
        """SIGHUP opens capture and backfill anew, for the rotation of logs, and ends nothing."""
        process = self.serving(None, "--sems.mode=local", *self.flags)
        device, data = process.device(frame(sems.BUFFERED)), frame(sems.BUFFERED, when=minute(1))
        device.packets(1)
        for path in self.paths:
            os.rename(path, f"{path}.1")
        process.popen.send_signal(signal.SIGHUP)

        def is_written() -> bool:
            device.send(data)
            device.packets(1)
            return all(data.hex() in "".join(open_lines(path)) for path in self.paths)

        until(is_written)
        for path in self.paths:
            self.assertEqual(json.loads(open_lines(f"{path}.1")[0])["hex"], frame(sems.BUFFERED).hex())
        self.assertEqual(process.stop(), 0)

    def test_slow_disk(self) -> None:
        """A disk that holds all up is named once."""
        self.limits(SLOW=0.02)
        device, write = self.exporter(None, "--sems.mode=local", *self.flags).device(), os.write
        self.patch(os, "write", lambda file, data: time.sleep(0.03) or write(file, data))
        for data in frames_of(3):
            device.send(data)
            device.packets(1)
        (line,) = (line for line in self.lines if "disk" in line)
        self.assertIn("--sems.capture", line)


class LifeTest(SocketCase):
    """How the process begins and ends."""

    def test_signals(self) -> None:
        """SIGTERM and SIGINT end it with 0 and soon, whatever the portal does; what is queued for one that reads goes out."""
        started = []
        for state, mode, number in (
            ("connected", "forward", signal.SIGINT),
            ("away", "spool", signal.SIGTERM),
            ("swallows SYNs", "forward", signal.SIGINT),
        ):
            portal = self.portal(listening=state == "connected")
            portal.black_hole() if state == "swallows SYNs" else None
            process = self.serving(portal, f"--sems.mode={mode}", before="sems.SHUTDOWN = 0.3")
            started.append((state, portal, process, number))
        for *_, process, number in started:
            process.client()  # one that says nothing
            process.device(frame())
            process.becomes(1, "meter_metrics_packets_total")
            process.popen.send_signal(number)
        for state, portal, process, _ in started:
            with self.subTest(state):
                self.assertEqual(process.popen.wait(PATIENCE), 0, process.stderr())
                self.assertNotRegex(process.stderr(), "Traceback|Warning")
                self.assertEqual(portal.accept().rest() if state == "connected" else frame(), frame())

    def test_stop_sends_what_is_queued(self) -> None:
        """What is queued for a portal that takes its time goes out before the end."""
        self.limits(SHUTDOWN=PATIENCE)
        self.small_buffers()
        portal, running = self.started()
        stream = b"".join(cheap_frames(150))
        running.device().send(stream)
        leg = portal.accept()
        running.becomes(len(stream), "sems_mitm_bytes_total", direction="outbound")
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
        before = "sys.modules['sqlite3'] = None"
        self.serving(None, "--sems.mode=local", before=before).device(frame()).packets(1)
        code, err = self.process("--sems.mode=spool", *PORTS, before=before).ended()
        self.assertEqual((code, err.count("\n"), "sqlite3" in err), (1, 1, True), err)


class ContainmentTest(NamedCase):
    """An error of our own ends what it happened in, is counted, is in the log once a minute, and nothing else changes."""

    CALLBACKS = (  # mode, class or module, functions
        ("forward", "Relay", "ready settle look close"), ("local", "Answerer", "ready settle look close answer"),
        ("spool", "SpoolSender", "ready settle look"), ("local", "HttpClient", "ready settle look close"),
        ("local", "Request", "do_GET"), ("forward", "PortalLink", "addressed"), ("local", "Listener", "ready open"),
        ("local", "Loop", "_admit _bound"), ("local", "Web", "_admit"), ("local", "Files", "flush"),
        ("spool", "Spools", "commit look take"), ("spool", "SpoolTable", "tend"), ("local", "Store", "look meet"),
        ("local", "History", "note"), ("local", "Framer", "feed expire"), ("local", "Connection", "send watch close"),
        ("local", "", "address answer tuned reading"), ("forward", "", "with_small_buffers allowed"), ("spool", "", "allowed"),
    )  # fmt: skip

    def setUp(self) -> None:
        super().setUp()
        ignoring = warnings.catch_warnings()
        ignoring.__enter__()
        warnings.simplefilter("ignore", ResourceWarning)  # a connection whose end fails is left to the collector
        self.addCleanup(lambda: (gc.collect(), ignoring.__exit__(None, None, None)))

    def test_every_callback(self) -> None:
        """Whatever the loop calls can fail, twice: it is counted, the process lives, and the next frame of another device is answered.

        What was spooled stays, and is delivered.
        """
        self.limits(BACKOFF=(0.01, 0.01), PATIENCE={"outbound": 0.1, "inbound": 0.1}, ANSWER_TIMEOUT=0.2, LINGER=0.05)
        for mode, where, names in self.CALLBACKS:
            for name in names.split():
                owner, left = getattr(sems, where) if where else sems, []  # left: faults that are still to happen
                real = getattr(owner, name)
                faulty = lambda *arguments, **more: 1 / left.pop() if left else real(*arguments, **more)
                with self.subTest(mode=mode, callback=f"{where}.{name}"), mock.patch.object(owner, name, faulty):
                    self.fail_twice(mode, left)
                    self.assertTrue(self.tracebacks())
                self.lines.clear()

    def fail_twice(self, mode: str, left: list) -> None:
        """Have a callback of a running exporter fail twice, and see that it lives."""
        portal = self.portal(habit=ack_of)
        running = self.named(portal, f"--sems.mode={mode}")
        frames = (frame(serial=f"91000HKU{number:08d}") for number in itertools.count())
        acked, visitors = [next(frames)], []
        with contextlib.closing(running.device(acked[0])) as first:
            first.packets(1)
        left += [0, 0]

        def errors() -> float:
            with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
                return running.value("sems_mitm_internal_errors_total")
            return 0

        def provoke() -> bool:
            """All that can lead to a callback: devices that come, speak in parts, and go; a scrape."""
            with contextlib.suppress(OSError):
                visitors.append(running.device(next(frames) + frame()[:20]))
                visitors.append(running.client(b"GET / "))
            for peer in visitors[:-10]:
                peer.close()
            return errors() >= 2 and not left

        def is_served() -> bool:
            data = next(frames)
            with contextlib.suppress(OSError, EOFError), contextlib.closing(connected(running.port, data)) as device:
                device.packets(1)
                acked.append(data)
            return acked[-1] == data

        try:
            until(provoke, pause=0.02)
            self.assertEqual(errors(), 2)
            until(is_served)
            self.assertEqual(running.get("/-/healthy")[0], 200)
            until(lambda: mode == "local" or set(portal.got) >= set(acked))
        finally:
            left.clear()
            running.close()


# -------------------------------------------------------------------------------------------------- network namespaces


def inside(name: str, make):
    """What make() gives when called in a network namespace: a socket keeps the one that it was made in."""
    made: list = []

    def run() -> None:
        with open(f"/run/netns/{name}") as file:
            if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
                raise OSError(ctypes.get_errno(), "setns")
        made.append(make())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return made[0]


class NamespaceTest(SocketCase):
    """Two hosts with a cable between them: the exporter and its devices on one, the portal on the other."""

    HERE, THERE = "10.93.7.1", "10.93.7.2"

    def setUp(self) -> None:
        super().setUp()
        if not shutil.which("ip") or os.geteuid():
            self.skipTest("needs root and `ip` for network namespaces")
        self.here, self.there = ends = [f"sems{os.getpid()}{end}" for end in "ab"]
        self.addCleanup(self.ip, *(f"netns del {name}" for name in ends))
        trouble = self.ip(*(f"netns add {name}" for name in ends))
        trouble += self.ip(f"link add v0 netns {self.here} type veth peer name v0 netns {self.there}")
        for name, address in ((self.here, self.HERE), (self.there, self.THERE)):
            trouble += self.ip("link set lo up", f"addr add {address}/30 dev v0", "link set v0 up", inside=name)
        if trouble:
            self.skipTest(f"no network namespaces here: {trouble}")

    @staticmethod
    def ip(*lines: str, inside: str = "") -> str:
        """What `ip` has to complain about, on this host or inside a namespace."""
        command = ["ip", *(["-n", inside] if inside else []), "-force", "-batch", "-"]
        return subprocess.run(command, input="\n".join(lines), capture_output=True, text=True).stderr.strip()

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
        setting = "echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind"
        subprocess.run(["ip", "netns", "exec", self.here, "sh", "-c", setting], check=True)
        portal = inside(self.there, lambda: self.portal(host=self.THERE))
        running = self.exporter_here(portal, f"--sems.listen-address=:{portal.port}")
        self.device(running, frame())
        portal.receives(frame())
        running.close()
        portal.host = self.HERE
        running = self.exporter_here(portal, f"--sems.listen-address=:{portal.port}")
        self.device(running, frame())
        until(lambda: running.value(FAILURES, reason="loop"))

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
        for mode, talks in itertools.product(("forward", "spool"), (False, True)):
            portal = inside(self.there, lambda: self.portal(host=self.THERE, habit=ack_of))
            running = self.exporter_here(portal, f"--sems.mode={mode}")
            device = self.device(running, frame())
            device.packets(1)
            running.emptied()
            started.append((mode, talks, portal, running, device))
        self.ip("link set v0 down", inside=self.there)
        begin = time.monotonic()
        for mode, talks, *_, device in started:
            device.send(frame(when=minute(1)) * talks)
            device.packets(mode == "spool" and talks)
        for *_, running, _ in started:
            until(lambda: running.value("sems_mitm_upstream_up") == 0, 100, 0.05)
        took = time.monotonic() - begin
        self.assertLess(took, 90 if slow else PATIENCE)
        for mode, *_, running, device in started:
            device.send(frame(when=minute(2)))
            device.packets(mode == "spool")
            until(running.queued)
        self.ip("link set v0 up", inside=self.there)
        for mode, talks, portal, *_ in started:
            with self.subTest(mode, talks=talks):
                until(lambda: portal.got[-1] == frame(when=minute(2)), 100)
                if talks and mode == "spool":  # in mode forward the kernel can still deliver it
                    self.assertIn(frame(when=minute(1)), portal.got)
        self.assertEqual(max(asked["TCP_USER_TIMEOUT"]), 60_000)
        self.assertTrue(asked["TCP_KEEPIDLE"] >= {20} and asked["TCP_KEEPINTVL"] >= {10}, asked)
        if slow:
            print(f"line cut: noticed by all four after {took:.0f} s")


# ------------------------------------------------------------------------------------------------------- household

NOW = 1000.0
SILENT = {"fresh": 600.0}
KIT_3000 = "93000HKU00000042"
FLOWS = ("generation_watts", "house_watts", "export_watts", "battery_watts", "battery_charge_percent")


def of_family(family: str, gauges: dict, counters: dict | None = None, fresh: float = NOW, serial: str = METER):
    """A device that has said this at `fresh`; metrics have no labels, or one of battery or string."""
    device = sems.Device(sems.Address("0304", 3, 4, serial, "long", ("meter", serial)), fresh)
    device.family, live = family, device.live

    def series(metric: str) -> tuple:
        name, _, number = metric.partition("#")
        label = "battery" if name.startswith("battery") else "string"
        return name, f'{label}="{number}"' if number else ""

    live.gauges = {series(metric): number for metric, number in gauges.items()}
    live.counters = {series(metric): number for metric, number in (counters or {}).items()}
    for name, number in live.counters.items():
        live.held[name] = sems.HeldCounter(name[0], number, fresh)
    live.fresh = fresh
    live.has_battery = any(metric.startswith("battery_power_watts") for metric in gauges)
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
    gauges = {"inverter_string_power_watts#1": solar / 4, "inverter_string_power_watts#2": solar * 3 / 4}
    gauges.update(inverter_power_output_watts=power, inverter_active_power_watts=power - load)
    gauges.update({} if battery is None else {"battery_power_watts#1": battery, "battery_state_of_charge_ratio#1": 0.5})
    gauges.update({} if export is None else {"meter_power_export_watts": export})
    return of_family("HYBRID", gauges, **more)


def counting(device, day=None, **watts: float):
    """The device, having counted energies from 100 kWh on, for two hours of its day at these W."""
    device.live.day = day
    for word, power in watts.items():
        read = {value.series for value in sems.VALUES[device.family]}
        name = next((metric, "") for metric in sems.COUNTED[word] if (metric, "") in read)
        held = sems.HeldCounter(name[0], 100_000 / sems.watt_hours(name[0]), NOW)
        held.gained = max(power, 0) * 2 / sems.watt_hours(name[0])
        device.live.held[name], device.live.counters[name] = held, held.shown.number + held.gained
    return device


def a_store(clock=lambda now: now, **more):
    return sems.Store(300, 256, False, clock, **more)


def house(*devices, now: float = NOW) -> dict:
    """The figures of a house of these devices."""
    store = a_store()
    return sems.house([sems.member(device, store, now) for device in devices])


class HouseholdTest(unittest.TestCase):
    """What a device, and the house, makes and takes."""

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
        )  # fmt: skip
        for name, devices, *wanted in rows:
            for order in (devices, devices[::-1]):
                with self.subTest(name):
                    found = house(*order)
                    self.assertEqual([found.get(key) for key in FLOWS[:4]], wanted)
                    self.assertIn(found.get("battery_charge_percent"), (None, 50))  # of two the mean
                    self.assertEqual(found.get("grid_watts"), None if wanted[2] is None else -wanted[2])

    def test_every_house(self) -> None:
        """Each combination of devices, by day and by night: each flow and each energy of the house once."""
        kits = ((), (1000,), (3000,), (1000, 3000))
        hybrids = (("", False), ("none", False), ("none", True), ("there", False), ("there", True))
        weather = ((1500, 2000, -500, 600), (0, 0, 300, 800))  # W: grid-tied inverter, hybrid's PV, battery, load
        day = sems.Day(datetime.fromtimestamp(NOW).date(), None, 0, {})
        for kit, inverter, (battery, meter), now in itertools.product(kits, ("", "plain", "CT"), hybrids, weather):
            made, solar, given, load = now
            made, solar = made if inverter or not battery else 0, solar if battery else 0
            given = given if battery == "there" else 0
            roof, out = made + solar + given, made + solar + given - load
            at_grid = {"imported": -out, "exported": out}
            plain = counting(dns(made, serial=INVERTER), day, generated=made)
            plain.live.gauges["inverter_string_power_watts", 'string="1"'] = 5 + 2 * made
            flows = solar, given if battery == "there" else None, out if meter else None, load
            mixed = counting(hybrid(*flows, serial=HYBRID), day, battery_charged=-given, battery_discharged=given)
            devices = [
                *([counting(kit1000(roof, out), day, generated=roof, **at_grid)] if 1000 in kit else []),
                *([counting(kit3000(out, serial=KIT_3000), day, **at_grid)] if 3000 in kit else []),
                *([plain] if inverter else []),
                *([counting(mixed, day, generated=solar, **(at_grid if meter else {}))] if battery else []),
            ]
            if inverter == "CT":
                counting(plain, day, **at_grid).live.gauges["inverter_meter_power_watts", ""] = out
            with self.subTest(kit=kit, inverter=inverter, battery=battery, meter=meter, now=now):
                found = house(*devices)
                grid = bool(kit) or meter or inverter == "CT"  # somebody measures at the grid
                roof = 1000 in kit or bool(inverter) or bool(battery)
                export = out if grid else out - made if battery else None
                wanted = {
                    "generation_watts": made + solar if roof else None,
                    "export_watts": export,
                    "grid_watts": None if export is None else -export,
                    "battery_watts": given if battery == "there" else None,
                    "house_watts": load if 1000 in kit or battery or roof and grid else None,
                }
                energy = {
                    "generated": made + solar if roof else None,
                    "imported": max(-out, 0) if grid else None,
                    "exported": max(out, 0) if grid else None,
                    "battery_charged": max(-given, 0) if battery == "there" else None,
                    "battery_discharged": max(given, 0) if battery == "there" else None,
                    "used": load if roof and grid else None,
                }
                for word, watts in energy.items():
                    wanted[f"{word}_today_kilowatt_hours"] = watts if watts is None else watts * 2 / 1000
                for key, whole, other in (
                    ("self_sufficiency_percent", energy["used"], energy["imported"]),
                    ("self_consumption_percent", energy["generated"] if energy["used"] else None, energy["exported"]),
                ):
                    wanted[key] = round(100 * (whole - other) / whole, 1) if whole else None
                self.assertEqual({key: found.get(key) for key in wanted}, wanted)
                grown = {word for word in sems.COUNTED if energy[word] is not None}
                self.assertEqual({word for word in sems.COUNTED if f"{word}_kilowatt_hours" in found}, grown)

    def test_device(self) -> None:
        """A device's keys, whatever its model: those that it knows and no others; flows go with silence, energies stay."""
        metered = {"inverter_power_output_watts": 1051, "inverter_meter_power_watts": -40}
        loads = {"inverter_load_watts": 26, "inverter_string_power_watts": 800}
        no_battery = counting(hybrid(800), battery_charged=9, battery_discharged=9)  # it counts one that is not there
        grid, u = "generated imported exported", None
        rows = (  # by FLOWS; energies that it knows
            (kit1000(-7, -300), (-7, 293, -300, u, u), grid),
            (kit3000(40), (u, u, 40, u, u), "imported exported"),
            (dns(1051), (1051, u, u, u, u), "generated"),
            (of_family("GRID", metered), (1051, u, -40, u, u), grid),
            (hybrid(800, 100, 50, 410), (800, 410, 50, 100, 50), f"{grid} battery_charged battery_discharged"),
            (no_battery, (800, 7, 793, u, u), "generated"),
            (of_family("HYBRID", loads), (800, 26, u, u, u), ""),
            (of_family("HYBRID", {**loads, "inverter_backup_load_watts": 408}), (800, 434, u, u, u), ""),
        )
        for device, numbers, words in rows:
            with self.subTest(device.family, numbers=numbers):
                counting(device, **dict.fromkeys(words.split(), 500))
                lifetime = {f"{word}_kilowatt_hours": 101 for word in words.split()}
                flows = {key: number for key, number in zip(FLOWS, numbers) if number is not None}
                flows.update({"grid_watts": -flows["export_watts"]} if "export_watts" in flows else {})
                self.assertEqual(sems.member(device, a_store(), NOW).figures, {**flows, **lifetime})
                silent = sems.member(device, a_store(), NOW + 301)
                self.assertEqual(silent.figures, lifetime)
                of_today = {f"{word}_today_kilowatt_hours" for word in words.split()}
                self.assertEqual(silent.knows, {*flows, *lifetime, *of_today})

    def test_today(self) -> None:
        """Gains of the day stay through silence and go at midnight; what an inverter counted before is added and needs no since."""
        with time_zone("UTC0"):
            since, text = datetime(1970, 1, 1, 0, 5), "1970-01-01T00:05:00"
            for name, device, begun, before, now, wanted, told in (
                ("from midnight on", kit1000(1, 1), None, None, NOW, 1.0, None),
                ("from later on", kit1000(1, 1), since, None, NOW, 1.0, text),
                ("silent", kit1000(1, 1), since, None, DAY - 1, 1.0, text),
                ("the next day", kit1000(1, 1), since, None, DAY, None, None),
                ("an inverter's own count", dns(1), since, 66, NOW, 7.6, None),
                ("that of one that counts at the grid, too", dns(1), since, 66, NOW, 7.6, text),
            ):
                with self.subTest(name):
                    day = sems.Day(since.date(), begun, 0, {}, before)
                    counting(device, day, generated=500, **({"imported": 5} if "grid" in name else {}))
                    for figures in (sems.member(device, a_store(), now).figures, house(device, now=now)):
                        found = figures.get("generated_today_kilowatt_hours"), figures.get("today_since")
                        self.assertEqual(found, (wanted, told))

    def test_own_clock(self) -> None:
        """An inverter's own count of the day counts if its clock is within ten minutes of ours."""
        for off, wanted in ((599, 6.6), (-599, 6.6), (601, 0), (-601, 0)):
            store, when = sems.Store(clock=clock), NOON + timedelta(seconds=off)
            meet(store, frame(cls=1, serial=INVERTER, when=when, ranges=[(30144, (66, 0, 1000))]))
            self.assertEqual(sems.household(store, 0.0)[1]["generated_today_kilowatt_hours"], wanted, off)

    def says(self, store, i: int, grid: tuple = (), solar: tuple = (), off: int = 0, more: tuple = ()) -> dict:
        """The house at minute i after noon, in which a HomeKit 3000 says what it has exported and imported in 10 Wh, and an
        inverter what it made today and in all in 100 Wh."""
        now, when = i * 60.0, minute(i) + timedelta(seconds=off)
        store.look(now)
        if grid:
            ranges = [(2057, (0, 0, grid[0])), (2069, (0, 0, grid[1]))]
            meet(store, frame(serial=KIT_3000, when=minute(i), ranges=ranges), now=now)
        if solar:
            ranges = [(30144, (solar[0], 0, solar[1])), *more]
            meet(store, frame(cls=1, serial=INVERTER, when=when, ranges=ranges), now=now)
        return sems.household(store, now)[1]

    def test_one_window(self) -> None:
        """What is used counts from the time on which all that it is made of count; an inverter that sleeps over midnight counts from there."""
        ct = ((30197, (0, 5, 0, 6)), (30209, (1,)))
        for name, total, day, off, more, used, since in (
            # the grid sells 6 kWh an hour from noon on; the inverter stops at 16:00 and wakes at 7:00 with these counts
            ("it slept", 102, 2, 0, (), 42.3, None),
            ("it was away, and made more than today", 140, 2, 0, (), 0, "2026-03-22T07:00:00"),
            ("it was away for a jump", 9000, 2, 0, (), 42.1, None),
            ("its CT meter slept too", 102, 2, 0, ct, 0, "2026-03-22T07:00:00"),
            ("its clock is wrong", 102, 2, 700, (), 0, "2026-03-22T07:00:00"),
        ):
            with self.subTest(name), time_zone("UTC0"):
                store = sems.Store(clock=clock)
                for i in range(19 * 60 + 1):
                    solar = (9, 100) if i <= 240 else (day, total) if i == 19 * 60 else ()
                    found = self.says(store, i, (500, 1000 + 10 * i), solar, off, more)
                self.assertEqual((found["used_today_kilowatt_hours"], found.get("today_since")), (used, since))
                self.assertEqual(found["imported_today_kilowatt_hours"], 42.1)

    def test_used(self) -> None:
        """What a house has used begins anew with its window, and does not fall within it, though its parts are counted in steps."""
        noon, later, no = "2026-03-21T12:00:00", "2026-03-21T12:30:00", ()
        for name, steps in (  # minutes after noon; exported, imported; made; used and since when
            ("a day", (
                (0, (500, 700), (0xFFFF, 1000), 0, noon), (1, (500, 700), (0xFFFF, 1001), 0.1, noon),
                (2, (505, 700), (0xFFFF, 1001), 0.1, noon), (3, (510, 701), (0xFFFF, 1001), 0.1, noon),
                (4, (510, 712), (0xFFFF, 1002), 0.22, noon), (719, (510, 800), (0xFFFF, 1002), 1.1, noon),
                (721, (510, 801), (0xFFFF, 1002), 0.01, None),
            )),
            ("the last one comes late, and all that counts is what they count from then on", (
                (0, (500, 700), no, None, noon), (29, (500, 990), no, None, noon),
                (30, (500, 1000), (0xFFFF, 1000), 0, later), (60, (500, 1300), (0xFFFF, 1030), 6, later),
            )),
        ):  # fmt: skip
            store = sems.Store(clock=clock)
            for i, grid, solar, used, since in steps:
                with self.subTest(name, minute=i), time_zone("UTC0"):
                    found = self.says(store, i, grid, solar)
                    self.assertEqual((found.get("used_today_kilowatt_hours"), found.get("today_since")), (used, since))
        self.assertEqual((found["imported_today_kilowatt_hours"], found["self_sufficiency_percent"]), (6, 50))

    def test_losses(self) -> None:
        """What a house with a HomeKit 1000 has used is by its counters alone: those of a hybrid are of the DC side."""
        day = sems.Day(datetime.fromtimestamp(NOW).date(), None, 0, {})
        kit = counting(kit1000(900, 400), day, generated=900, imported=0, exported=400)
        found = house(kit, counting(hybrid(1000, serial=HYBRID), day, generated=1000))
        self.assertEqual([found[f"{word}_today_kilowatt_hours"] for word in ("generated", "used")], [2, 1])

    def test_silent_battery(self) -> None:
        """A hybrid's energies do not change with a packet in which its battery, its meter or all of it is silent."""
        battery = {35182: (0, 500), 35184: (2,), 35191: (0, 5000), 35206: (0, 700), 35209: (0, 800)}
        known = {**battery, 36004: (1,), 36015: (0x4240, 0, 0x4240, 0), 36025: (0, 5)}
        silent = {register: (0,) * len(words) for register, words in known.items()}
        ct = [(30145, (0, 9)), (30195, (0, 5, 0, 600, 0, 700)), (30209, (1,))]
        for name, words in (("battery", {35182: (0, 0), 35184: (0,)}), ("meter", {36004: (0,)}), ("all", silent)):
            with self.subTest(name):
                store, figures = sems.Store(clock=clock), []
                for i, more in enumerate(({}, words, {})):
                    meet(store, frame(cls=2, serial=HYBRID, when=minute(i), ranges=[*{**known, **more}.items()]))
                    meet(store, frame(cls=1, serial=INVERTER, when=minute(i), ranges=ct))
                    found = sems.household(store, 0.0)[1]
                    figures.append({key: number for key, number in found.items() if key.endswith("hours")})
                self.assertEqual(figures, [figures[0]] * 3)
                self.assertGreater(figures[0]["battery_charged_kilowatt_hours"], 0)

    def test_real_frames(self) -> None:
        """The hybrid of the vectors, through the store, at its own time."""
        store = a_store(clock=lambda now: datetime(2026, 3, 21, 13, 14, 15).timestamp())
        (data,) = (bytes.fromhex(vector["hex"]) for vector in VECTORS if vector["name"] == "ET hybrid with battery")
        meet(store, data)
        (figures,) = (one.figures for one in sems.household(store, 0.0)[0].values())
        watts = {"generation": 949, "house": 937 + 736, "export": 510, "battery": -1}
        self.assertEqual({name: figures[f"{name}_watts"] for name in watts}, watts)
        energies = {"generated": 1353.4, "imported": 6472.97, "exported": 1122.47, "battery_charged": 780.6}
        self.assertEqual({word: figures[f"{word}_kilowatt_hours"] for word in energies}, energies)
        self.assertEqual((figures["battery_charge_percent"], figures["generated_today_kilowatt_hours"]), (97, 48.8))


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

    def solar(self, now: float) -> list:
        return [solar for _, solar, *_ in self.seen(now)]

    def test_points(self) -> None:
        """The first as soon as anything is known, then one a minute, and one for now; sources are positive."""
        self.history.note(600)
        self.assertEqual(self.seen(602), [])
        for now in range(605, 730):
            self.reads(now, now, 100)
        for _ in range(2):
            wanted = [(605, 605, 505, -100), (660, 660, 560, -100), (720, 720, 620, -100), (729, 729, 629, -100)]
            self.assertEqual(self.seen(729), wanted)

    def test_nobody_looks(self) -> None:
        """Without connections the loop sleeps, and nobody notes: the time in between is a gap, and no level line."""
        self.reads(600, 3000, 0)
        self.reads(8000, 100, 0)
        self.assertEqual([row[:2] for row in self.seen(8000)], [(600, 3000), (660, None), (8000, 100), (8000, 100)])

    def test_silence_is_a_gap(self) -> None:
        """Its minutes are there, and nothing is known of them; of one of two devices only what hangs on it ends."""
        self.reads(1000, 500, 0)
        for now in range(1000, 2000):
            self.history.note(now)
        self.reads(2000, 7, 7)
        self.assertEqual(self.solar(2010), [500] * 6 + [None] * 12 + [7])
        self.assertEqual([row[0] for row in self.seen(2010)[1:-2]], list(range(1020, 1980, 60)))
        self.setUp()
        self.store.names.update(roof=dns(1000, fresh=1000), grid=kit3000(200, fresh=1200))
        for now in range(1200, 1440):
            self.history.note(now)
        self.assertEqual([row[1:] for row in self.seen(1440)], [(1000, 800, -200)] * 2 + [(None, None, -200)] * 4)

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
        for step, wanted in ((-300, [0, 60, 120, 180, 240, 540]), (DAY + 600, [540, 540])):
            offset[0] += step
            self.assertEqual(self.solar(599), wanted)


# ------------------------------------------------------------------------------------- page, picture, Home Assistant

WEB_SETTINGS = sems.serve_settings(["--sems.mode=local"], {})


def seen_of(*devices, now: float = NOW, **more) -> sems.Seen:
    store = a_store(**more)
    store.names.update({(device.kind, device.serial): device for device in devices})
    return sems.see(store, WEB_SETTINGS, now)


def page_of(seen: sems.Seen, points: tuple | list = (), settings=WEB_SETTINGS) -> str:
    return "".join(sems.html_page(seen, points, settings, "192.0.2.7"))


def an_inverter(power: float, model: str = "GW3000-DNS-30", **more):
    """One that stands beside a meter."""
    device = dns(power, serial=INVERTER, **more)
    device.kind, device.name = "inverter", ("inverter", model, INVERTER[-8:])
    return device


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
        for device, wanted in (
            (kit1000(2000, 500), "Solar 2,000 W House 1,500 W To the grid 500 W"),
            (kit1000(-7, -300), "Solar 0 W House 293 W From the grid 300 W"),
            (hybrid(800, -250, 300), "Solar 800 W House 250 W To the grid 300 W Into the battery 250 W Battery 50 %"),
            (hybrid(800, 250, 300), "From the battery 250 W"),
            (kit3000(-1), "The house From the grid 1 W"),
            (kit1000(1, 1, **SILENT), "Nothing is known now"),
        ):
            with self.subTest(wanted):
                self.assertIn(wanted, self.texts(page_of(seen_of(device))))

    def test_order(self) -> None:
        """Portal, house, picture, today, meters, inverters; since when is said once."""
        seen = seen_of(an_inverter(5, "A model"), kit1000(1, 1))
        seen.house.update(imported_today_kilowatt_hours=2.5, today_since="1970-01-01T00:10:00")
        text = self.texts(page_of(seen, day_of_points()))
        parts = ("Local: no portal", "The house", "Power, last 24 hours", "Today since 00:10", "2.5 kWh")
        places = [text.find(word) for word in (*parts, "HomeKit 1000", METER, "A model", INVERTER)]
        self.assertEqual(places, sorted(places))
        self.assertGreaterEqual(places[0], 0)
        self.assertEqual(text.count("since"), 1)

    def test_today(self) -> None:
        """What the house used, and how much of it was its own, in rows that are full; what is not known is not there."""
        seen, energies = seen_of(kit1000(1, 1)), {"generated": 12.04, "used": 8, "imported": 1.5, "exported": 5.54}
        battery = {"battery_charged": 3, "battery_discharged": 2.5}
        percent = {"self_sufficiency_percent": 81.25, "self_consumption_percent": 53.99}
        short = "Solar 12.0 kWh Used 8.0 kWh From the grid 1.5 kWh To the grid 5.5 kWh"
        between = "Into the battery 3.0 kWh From the battery 2.5 kWh"
        ends = "Self-sufficiency 81 % Self-consumption 54 %"
        for words, more, since, wanted, columns in (
            (energies, {}, "2026-03-21T00:00:01", f"Today {short}", 4),
            (energies, percent, "2026-03-21T20:43:09", f"Today since 20:43 {short} {ends}", 6),
            ({**energies, **battery}, percent, "", f"Today {short} {between} {ends}", 4),
        ):
            with self.subTest(wanted):
                today = {f"{word}_today_kilowatt_hours": number for word, number in words.items()}
                page = page_of(seen._replace(house={**today, **more, "today_since": since}))
                self.assertIn(wanted, self.texts(page))
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
        for family, gauges, counted, wanted in (
            ("GRID", inverter, counters, {
                "String voltage": "334.7 V", "Power factor": "0.985", "Work mode": "normal", "Errors": "none",
                "Warnings": "0x12", "Internal temperature": "−6.6 °C", "Energy generated": "2,064.2 kWh",
                "Time of operation": "1,667 h",
            }),
            ("HYBRID", hybrids, {}, {
                "Battery power, 1": "−1,500 W", "Battery power, 2": "20 W", "Battery state of charge, 1": "97 %",
                "Battery mode, 1": "charging", "Battery mode, 2": "77", "Work mode": "on grid",
            }),
        ):  # fmt: skip
            with self.subTest(family):
                page = page_of(seen_of(of_family(family, gauges, counted)))
                self.assertEqual(dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", page)), wanted)
                self.assertIn(f"<details><summary>All values ({len(wanted)})", page)

    def test_quantities(self) -> None:
        """A name for every metric that says neither kind nor unit; of a family no two rows are alike."""
        for family in sems.FAMILIES:
            names = [what for what, _ in sems.table_rows(family, {value.series: 1 for value in sems.VALUES[family]})]
            self.assertEqual(len(names), len(set(names)), family)
            for name in names:
                self.assertRegex(name, r"\A[A-Z][A-Za-z0-9, -]{2,40}\Z")
                self.assertNotRegex(name.lower(), r"deci|centi|_|total|hours|watt|inverter_|\bac\b|\bdc\b")
            if family == "HK1000":  # its first two channels are the grid and the roof
                self.assertLessEqual({"Power to the grid", "Power, channel 3"}, set(names))
                self.assertNotIn("Power, channel 1", names)

    def test_states(self) -> None:
        """Reporting, silent, or asleep: an inverter while the roof gives nothing, by a meter or its own last packet."""
        for devices, wanted in (
            ([kit1000(-7, -300), an_inverter(1500, **SILENT)], 'class="asleep">asleep'),
            ([kit1000(2500, 300), an_inverter(5, **SILENT)], 'class="bad">silent'),
            ([kit1000(2500, 300), an_inverter(5)], 'class="good">reporting'),
            ([an_inverter(40, **SILENT)], 'class="asleep">asleep'),
            ([an_inverter(1500, **SILENT)], 'class="bad">silent'),
            ([kit1000(0, 0, **SILENT)], 'class="bad">silent'),
        ):
            with self.subTest(wanted, first=devices[0].live.gauges):
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
        self.assertNotRegex(page, "<img|<b>|<i>")
        for good in ("&lt;img src=x onerror=alert(1)&gt;", "&lt;b&gt;&quot;\\&#x27;&amp;lt;", "&lt;i&gt;"):
            self.assertIn(good, page)

    def test_no_device(self) -> None:
        """What to do, with this machine's address; no script, nothing from elsewhere."""
        page = page_of(seen_of())
        for wanted in ("No device has connected", "now 192.0.2.7", "tcp.goodwe-power.com", "20001", " doctor</code>"):
            self.assertIn(wanted, page)
        self.assertNotRegex(page, "<script|https?:|//|@import|url\\([^#]")
        for flag, wanted, is_there in (
            ("--sems.upstream=198.51.100.7:20001", "<code>tcp.goodwe-power.com</code>", True),  # an address is no name
            ("--sems.listen-address=:1", "no other machine reaches it", False),
            ("--sems.listen-address=192.0.2.7:1", "no other machine reaches it", False),
            ("--sems.listen-address=127.0.0.1:1", "no other machine reaches it", True),
            ("--sems.listen-address=localhost:1", "no other machine reaches it", True),
            ("--sems.listen-address=[::1]:1", "no other machine reaches it", True),
        ):
            with self.subTest(flag):
                settings = sems.serve_settings([flag], {})
                self.assertEqual(wanted in page_of(seen_of(), settings=settings), is_there)

    def test_doctor(self) -> None:
        """The command of doctor is that of this program, wherever it lies; in a container it is run from outside."""
        for container, file, wanted in (
            (False, "/opt/s.py", "python3 /opt/s.py doctor"),
            (False, "/my <b>/s.py", "python3 &#x27;/my &lt;b&gt;/s.py&#x27; doctor"),
            (True, "/s.py", "docker exec sems_mitm python3 -m sems_mitm doctor"),
        ):
            with mock.patch.multiple(sems, IN_CONTAINER=container, __file__=file):
                self.assertIn(f"<code>{wanted}</code>", page_of(seen_of()))

    def test_refresh(self) -> None:
        """The page is fresh every 30 s, the demo's every 5."""
        demo = argparse.Namespace(**vars(WEB_SETTINGS), refresh=sems.DEMO_REFRESH)
        for settings, seconds in ((WEB_SETTINGS, 30), (demo, 5)):
            self.assertIn(f'http-equiv="refresh" content="{seconds}"', page_of(seen_of(), settings=settings))

    def test_portal_state(self) -> None:
        """The portal's state in words, with what waits."""
        for mode, up, waiting, wanted in (
            ("local", None, 0, "Local: no portal"), ("forward", None, 0, "not tried yet"), ("spool", True, 0, "reachable"),
            ("forward", False, 12345, ", 12,345 bytes wait"), ("forward", False, 0, " doctor</code>"),
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
        """Only what there is, in the legend too; nothing for a house of which nothing is known; the grid's colour changes at 0."""
        self.assertEqual(sems.picture([], {}), "")
        self.assertEqual(sems.picture([sems.Point(0, [None] * 4)], {"battery_charge_percent": 5}), "")
        svg = sems.picture(day_of_points(battery=False), {"generation_watts": 2000, "grid_watts": 5})
        self.assertIn("Now: Solar 2,000 W; From the grid 5 W.", svg)
        self.assertNotIn("attery", svg)
        self.assertEqual(svg.count("<li>"), 4)
        self.assertEqual(len(set(re.findall('<stop offset="([0-9.]+)"', svg))), 1)
        self.assertEqual(set(self.paths([sems.Point(7, [None, None, 5.0, None])])), {"grid"})

    def test_colours(self) -> None:
        """All have the contrast of AA for drawings and large text in both themes."""

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

    def test_power_axis(self) -> None:
        """Round steps, 0 among them, all powers within."""
        bounds = ((0, 0), (0, 1), (-7, 0), (0, 12_345), (-2500, 2999), (-0.5, 0.2), (-9e6, 3), (100, 200), (-200, -100))
        for low, high in bounds:
            with self.subTest(low=low, high=high):
                axes = sems.axes_of([sems.Point(0, [float(low), float(high), None, None])])
                self.assertEqual((axes.levels[0], axes.levels[-1]), (axes.low, axes.high))
                self.assertTrue(axes.low <= low and high <= axes.high and 0 in axes.levels)
                self.assertIn(f"{axes.levels[1] - axes.levels[0]:e}"[0], "125")
                self.assertTrue(2 <= len(axes.levels) <= 10)

    def test_time_axis(self) -> None:
        """From the first reading to now, nothing beyond; whole hours of local time, wherever that is; midnight by its date."""
        zones = ("UTC", BERLIN, "ACST-9:30ACDT,M10.1.0,M4.1.0/3", "NPT-5:45", "PST8PDT,M3.2.0,M11.1.0")
        spans = itertools.product(zones, (1, 600, 3599, 7199, 20_000, 86_400), range(1774_740_000, 1774_760_000, 1717))
        for zone, length, begin in spans:
            with self.subTest(zone, length=length, begin=begin), time_zone(zone):
                axes = sems.axes_of([sems.Point(begin, [1.0] * 4), sems.Point(begin + length, [1.0] * 4)])
                self.assertTrue(begin - 60 < axes.left <= begin and axes.right == begin + length)
                self.assertTrue(all(hour.minute == hour.second == 0 for hour in axes.hours))
                self.assertTrue(all(axes.left <= hour.timestamp() <= axes.right for hour in axes.hours))
                self.assertTrue(length // 3600 // 4 - 1 <= len(axes.hours) <= 9, axes.hours)
                labels = "".join(sems.time_texts(axes))
                texts = re.findall('class="(.*?)" .*?>(.*?)<', labels)
                self.assertGreaterEqual(len(texts), 2)
                places = re.findall('x="([0-9.]+)%" y="100.0%" class="time(?: midnight)?"', labels)
                gaps = [float(one) - float(other) for one, other in zip(places[1:], places)]
                self.assertTrue(len(axes.hours) < 2 or min(gaps) > 17, "labels would overlap on a phone")
                dates = [text for css, text in texts if css == "time midnight"]
                nights = [f"{hour.day} {hour:%b}" for hour in axes.hours if not hour.hour]
                self.assertTrue(dates == nights or len(axes.hours) < 2 and not dates)
                self.assertTrue(dates or length < 86_400)

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
        parts = "area path.area, grid path.grid, house path.house, levels text.level, times text.time, svg >svg"
        wanted = {name: f"figure {css}" for name, css in (part.split() for part in parts.split(", "))}
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

    def setUp(self) -> None:
        """A meter and a sleeping inverter."""
        meter = counting(kit1000(5, 5), generated=1, imported=2)
        self.roof = [meter, counting(an_inverter(5, **SILENT), generated=7)]

    def package(self, *devices) -> str:
        with time_zone("UTC"):
            return sems.home_assistant(seen_of(*devices), "192.0.2.7:14028")

    def sensors(self, *devices) -> dict:
        """The sensors of a package by unique_id, read strictly."""
        lines = [line for line in self.package(*devices).splitlines() if line and not line.startswith("#")]
        head = r'rest:\n  - resource: "http://[^"\\]+/api/household"\n    scan_interval: 60\n    sensor:'
        self.assertRegex("\n".join(lines[:4]), rf"\A{head}\Z")
        found: list = []
        for row in lines[4:]:
            indent, name, value = re.fullmatch(r'(      - |        )(\w+): (".*"|\["today_since"\])', row).groups()
            found += [{}] if "-" in indent else []
            found[-1][name] = json.loads(value)
        self.assertEqual(len({sensor["unique_id"] for sensor in found}), len(found))
        return {sensor["unique_id"]: sensor for sensor in found}

    def test_package(self) -> None:
        """A sensor for each key that a device or the house knows when nobody sleeps, with what Home Assistant needs."""
        seen, found, left_out = seen_of(*self.roof), self.sensors(*self.roof), {"export_watts", "today_since"}
        of_devices = {f"{device.serial}_{key}" for device in seen.devices for key in device.member.knows - left_out}
        self.assertEqual({name for name in found if not name.startswith("house")}, of_devices)
        self.assertLessEqual({f"house_{key}" for key in seen.house.keys() - left_out}, set(found))
        self.assertIn("house_grid_watts", found)
        self.assertEqual(found[f"{METER}_generation_watts"]["name"], "HomeKit 1000 solar power")
        self.assertEqual(found["house_house_watts"]["name"], "House power")
        for key, sensor in found.items():
            owner, _, word = key.partition("_")
            counted = "total" if owner == "house" and "_today_" not in key else "total_increasing"
            wanted = {"watts": ("power", "measurement", "W"), "hours": ("energy", counted, "kWh")}
            fields = ("device_class", "state_class", "unit_of_measurement")
            of_a_share = (None, "measurement", "%")
            self.assertEqual(tuple(map(sensor.get, fields)), wanted.get(word.rpartition("_")[2], of_a_share))
            self.assertRegex(sensor["icon"], r"\Amdi:[a-z-]+\Z")
            for name in ("value_template", "availability"):
                self.assertRegex(sensor[name], rf"\A\{{\{{ .*'{owner}'.*'{word}'.* \}}\}}\Z")
                self.assertIn("value_json is mapping", sensor[name])
            path = f"$['{owner}']" if owner == "house" else f"$['devices']['{owner}']"
            attributes = [sensor.get(name) for name in ("json_attributes_path", "json_attributes")]
            self.assertEqual(attributes, [path, ["today_since"]] if "_today_" in key else [None, None])
        battery = self.sensors(hybrid(800, 100, 50))[f"{METER}_battery_charge_percent"]
        self.assertEqual((battery["device_class"], battery["unit_of_measurement"]), ("battery", "%"))

    def test_night(self) -> None:
        """A HomeKit 3000 beside a sleeping inverter: the house's power is not known now, and has its sensor for the day."""
        devices = kit3000(-250), dns(5, serial=INVERTER, **SILENT)
        self.assertEqual(seen_of(*devices).house, {"export_watts": -250, "grid_watts": 250})
        self.assertLessEqual({"house_house_watts", "house_generation_watts"}, set(self.sensors(*devices)))

    def test_comments(self) -> None:
        """Which devices are in it, known when, which sensor goes where in the Energy dashboard, what counts the same twice."""
        comments = [line for line in self.package(*self.roof).splitlines() if line.startswith("#")]
        wanted = (
            f"#     HomeKit 1000, {METER}",
            f"#     GW3000-DNS-30, {INVERTER}",
            "#     Grid, energy imported from the grid: HomeKit 1000 energy from the grid",
            "#     Grid, power (positive is bought: the standard direction): House grid power",
            "#     Solar panels, energy: HomeKit 1000 solar energy",
            "#     Solar panels, power: House solar power",
            "# HomeKit 1000 and GW3000-DNS-30 count the same roof: take only the energies of HomeKit 1000 there.",
        )
        self.assertLessEqual(set(wanted), set(comments))
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
        devices = [kit3000(1, serial=serial) for (serial, _), _ in rows]
        for device, ((serial, model), _) in zip(devices, rows):
            device.name = ("meter", model, serial[-8:])
        found = [sensor["name"] for key, sensor in self.sensors(*devices).items() if not key.startswith("house")]
        self.assertEqual(found, [f"{name} grid power" for _, name in rows if name])
        comments = "".join(line for line in self.package(*devices).splitlines() if line.startswith("#"))
        self.assertNotRegex(comments, '[{}<>"]')

    def test_nobody(self) -> None:
        """No device yet: no package."""
        nobody = of_family("GRID", {}, fresh=float("-inf"))
        for devices in ((), (nobody,), (kit3000(1, serial="<b>45678901234567"[:16]),)):
            self.assertEqual(self.package(*devices), "")

    def test_templates(self) -> None:
        """Home Assistant's templates, by jinja2 where it is: no error, whatever the exporter answers."""
        try:
            import jinja2
        except ImportError:
            self.skipTest("no jinja2")
        made = jinja2.Environment(undefined=jinja2.StrictUndefined)
        answer = {"house": {"house_watts": 0}, "devices": {METER: {"generation_watts": 5}}}
        for key, sensor in self.sensors(*self.roof).items():
            known = {"house_house_watts": "0", f"{METER}_generation_watts": "5"}.get(key)
            for given in ({}, {"value_json": None}, {"value_json": []}, {"value_json": {}}, {"value_json": answer}):
                found = [made.from_string(sensor[name]).render(given) for name in ("value_template", "availability")]
                is_known = known is not None and given.get("value_json") is answer
                self.assertEqual(found, [known, "True"] if is_known else ["None", "False"])


# ------------------------------------------------------------------------------------------------------------ HTTP


class HttpTest(SocketCase):
    """/metrics, the page, the API and their neighbours, over a socket."""

    def setUp(self) -> None:
        super().setUp()
        self.running = self.exporter(None, "--sems.mode=local")

    def raw(self, data: bytes, step: int = 0) -> bytes:
        """What comes back for bytes of our own, to the end; step: so many at a time."""
        with contextlib.closing(connected(self.running.web_port)) as client:
            with contextlib.suppress(OSError):  # it can be answered, and at its end, already
                for at in range(0, len(data), step or len(data)):
                    client.send(data[at : at + (step or len(data))])
                client.no_more()
            return client.rest()

    def json(self, path: str) -> dict:
        return json.loads(self.running.get(path)[2])

    def closed(self) -> float:
        return self.running.value("sems_mitm_http_closed_connections_total")

    def test_routes(self) -> None:
        """Each path has its type, HEAD its headers alone; else 404, 405; one request a connection, with its length."""
        text, data = "text/plain; charset=utf-8", "application/json"
        rows = (
            ("/metrics", 200, "text/plain; version=0.0.4; charset=utf-8", "# HELP"),
            ("/", 200, "text/html; charset=utf-8", "<!doctype html>"), ("/?x", 200, "text/html; charset=utf-8", "<!doctype html>"),
            ("/api/devices", 200, data, '{"devices": []'), ("/api/household", 200, data, '{"house": {}, "devices": {}}'),
            ("/home-assistant.yaml", 503, text, "No device"), ("/-/healthy", 200, text, ""), ("/-/ready", 200, text, ""),
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
                head = self.raw(f"HEAD {path} HTTP/1.1\r\n\r\n".encode())
                self.assertTrue(head.endswith(b"\r\n\r\n") and head.startswith(b"HTTP/1.0 %d " % status), head)
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW", "get"):
            with self.subTest(method):
                answer = self.raw(f"{method} /metrics HTTP/1.1\r\nContent-Length: 9\r\n\r\nname=data".encode())
                self.assertTrue(answer.startswith(b"HTTP/1.0 405 "), answer[:60])
                self.assertIn(b"Allow: GET, HEAD", answer)
        stopping = mock.Mock(loop=mock.Mock(listeners=[], settings=self.running.settings))
        request = sems.Request(stopping, b"GET /-/ready HTTP/1.1\r\n\r\n", "")
        request.handle_one_request()
        self.assertIn(b"HTTP/1.0 503 ", request.wfile.getvalue())
        self.limits(RECV_SIZE=64)  # bytes that nobody asked for, and an answer that waits in the kernel at the end
        client = self.running.client(b"GET / HTTP/1.1\r\n\r\n" + bytes(200), 2048)
        until(lambda: not self.running.web.clients)
        self.assertTrue(client.rest().endswith(b"</html>\n"))
        moved = self.exporter(None, "--sems.mode=local", "--web.telemetry-path=/solar")
        self.assertEqual([moved.get(path)[0] for path in ("/solar", "/metrics")], [200, 404])
        self.assertIn(b'href="/solar"', moved.get("/")[2])

    def test_forms_of_a_request(self) -> None:
        """Whole and byte by byte: absolute targets, empty lines before, bare line feeds, HTTP/0.9, several requests, long heads."""
        for name, request, status in (
            ("plain", b"GET /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n", 200), ("1.0", b"GET /-/healthy HTTP/1.0\r\n\r\n", 200),
            ("absolute", b"GET http://host:1/-/healthy HTTP/1.1\r\n\r\n", 200), ("absolute, in capitals", b"GET HTTP://host/-/healthy HTTP/1.1\r\n\r\n", 200),
            ("absolute, with a query", b"GET http://host/-/healthy?x HTTP/1.1\r\n\r\n", 200), ("absolute, the page", b"GET http://host HTTP/1.1\r\n\r\n", 200),
            ("absolute, elsewhere", b"GET ftp://host/-/healthy HTTP/1.1\r\n\r\n", 404), ("an empty line before", b"\r\nGET /-/healthy HTTP/1.1\r\n\r\n", 200),
            ("bare line feeds", b"GET /-/healthy HTTP/1.1\nHost: x\n\n", 200), ("0.9", b"GET /-/healthy\r\n", 200), ("2.0", b"GET / HTTP/2.0\r\n\r\n", 505),
            ("three at once", b"GET /-/healthy HTTP/1.1\r\nConnection: keep-alive\r\n\r\n" * 3, 200),
            ("a long body", b"GET /-/healthy HTTP/1.1\r\nContent-Length: 20000\r\n\r\n" + bytes(20000), 200),
            ("a long head", b"GET / HTTP/1.1\r\n" + b"X: %s\r\n" % (b"x" * 1000) * 20, 431),
            ("many headers", b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n", 431),
        ):  # fmt: skip
            for step in (0, 1) if len(request) < 100 else (0,):
                with self.subTest(name, step=step):
                    answer = self.raw(request, step)
                    self.assertEqual(answer.count(b"HTTP/1.0 %d " % status), 1, answer[:200])

    def test_api(self) -> None:
        """/api/devices and /api/household: names, places and figures; of a silent device no flows and no gauges."""
        self.limits(TICK=0.01)
        self.running.device(frame()).packets(1)
        answer = self.json("/api/devices")
        self.assertLessEqual({"devices", "upstream", "blocked"}, set(answer))
        self.assertEqual(answer["upstream"], {"mode": "local", "address": "", "up": None, "queue_bytes": 0})
        (device,) = answer["devices"]
        name = {"device": "meter", "model": "HomeKit 1000 Smart Meter", "serial": METER[-8:], "full_serial": METER, "up": True}  # fmt: skip
        flows = {"generation_watts": 2600, "export_watts": 1500, "house_watts": 1100, "grid_watts": -1500}
        wanted = {**name, **flows, "firmware": "", "module_firmware": "", "portal": ""}
        self.assertEqual({key: device[key] for key in wanted}, wanted)
        self.assertEqual(device["values"]["meter_voltage_volts_channel_1"], 240.0)
        self.assertLess(device["age_seconds"], PATIENCE)
        small = self.json("/api/household")
        self.assertEqual({key: small["house"][key] for key in flows}, flows)
        figures = {key: number for key, number in device.items() if key in (*sems.KEYS, "today_since")}
        self.assertEqual(small["devices"], {METER: figures})
        self.running.store.stale_after = 0.01
        silent = until(lambda: [one for one in self.json("/api/devices")["devices"] if not one["up"]])[0]
        self.assertFalse(set(flows) & set(silent))
        self.assertNotIn("meter_power_export_watts", silent["values"])

    def test_host(self) -> None:
        """The package names the address that the client used, if that is a plain one."""
        self.running.device(frame()).packets(1)
        own = f"{LOCAL}:{self.running.web_port}"
        plain = ("raspberrypi.local:14028", "192.0.2.7:1", "[2001:db8::1]:2", "sems_mitm:14028")
        others = ("a" * 300, "", 'x"y', "{{ states }}", "x\ty", "a:1:2", "u@h:1", "h:123456", "x\r\n y", "h/../", "é")
        for host, wanted in (*zip(plain, plain), *((host, own) for host in others)):
            with self.subTest(host):
                answer = self.raw(b"GET /home-assistant.yaml HTTP/1.1\r\nHost: %s\r\n\r\n" % host.encode("latin-1"))
                self.assertIn(f'resource: "http://{wanted}/api/household"'.encode(), answer)

    def test_gzip(self) -> None:
        """Packed where asked for, and only there."""
        rows = (
            ("gzip", True), ("deflate, gzip;q=0.5", True), ("*", True), ("GZIP ; q=1", True), ("gzip;q=0", False),
            ("gzip;q=0.000, *", False), ("identity", False), ("", False), ("*;q=0", False), ("gzip; q=0", False),
            (f"gzip{' ' * 12_000}x", False),
        )  # fmt: skip
        for accepted, packed in rows:
            with self.subTest(accepted):
                _, headers, body = self.running.get("/metrics", **{"Accept-Encoding": accepted})
                self.assertEqual(headers["Content-Encoding"] == "gzip", packed)
                self.assertIn("Accept-Encoding", headers["Vary"])
                plain = gzip.decompress(body) if packed else body
                self.assertTrue(plain.startswith(b"# HELP") and plain.endswith(b"\n"))

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
        self.limits(HTTP_ANSWERS=2 << 20)
        text, clients = "x" * (3 << 20), self.running.web.clients
        self.patch(sems, "exposition", side_effect=lambda pages: [text])
        slow = [self.running.client(b"GET /metrics HTTP/1.1\r\n\r\n", 2048) for _ in range(8)]
        until(lambda: not any(peer.silent(0) for peer in slow))
        self.assertEqual([client.waiting > 0 for client in list(clients)], [True])
        self.running.device(frame()).packets(1)
        answers = [peer.rest().partition(b"\r\n\r\n") for peer in slow]
        (head,) = [head for head, _, body in answers if body == text.encode()]
        self.assertIn(b"Content-Length: %d\r\n" % len(text), head)
        self.running.client(b"GET /metrics HTTP/1.1\r\n\r\n", 2048)
        until(lambda: [client.waiting > 0 for client in list(clients)] == [True])
        self.limits(HTTP_CONNECTIONS=1)
        self.assertEqual(self.running.get("/-/healthy")[0], 200)

    def test_error_of_our_own(self) -> None:
        """It ends the request with 500, is counted and logged; the next request is served."""
        self.faults = 1
        paths = ("/api/devices", "/api/household", "/home-assistant.yaml", "/")
        with mock.patch.object(sems, "see", side_effect=KeyError("made")):
            self.assertEqual([self.running.get(path)[0] for path in paths], [500] * 4)
        self.assertEqual(self.running.get("/api/devices")[0], 200)
        self.assertEqual(self.running.value("sems_mitm_internal_errors_total"), 4)
        self.assertIn("an HTTP request", self.tracebacks()[0])

    def test_garbage(self) -> None:
        """Whatever is sent, the answer is an error or the end, nothing is a traceback, and the exporter serves on."""
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
            answer = self.raw(row)
            self.assertTrue(not answer or re.match(rb"HTTP/1\.0 (200|4\d\d|505) ", answer), (row, answer[:80]))
        self.assertEqual(self.running.get("/-/healthy")[0], 200)
        self.assertEqual(self.running.value("sems_mitm_internal_errors_total"), 0)


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
        ("", {}, "mode", "forward"), ("", {"SEMS_MODE": "spool"}, "mode", "spool"),
        ("", {"SEMS_MODE": ""}, "mode", "forward"), ("--sems.mode=local", {"SEMS_MODE": "spool"}, "mode", "local"),
        ("--sems.mode local --sems.mode spool", {}, "mode", "spool"),
        ("", {"SEMS_PASSTHROUGH": "no"}, "mode", "local"),
        ("--sems-passthrough", {"SEMS_PASSTHROUGH": "no"}, "mode", "forward"),
        ("--no-sems-passthrough", {}, "mode", "local"),
        ("--sems.mode=forward --no-sems-passthrough", {}, "mode", "forward"),
        ("", {"BATSIGNAL": "1"}, "batsignal", True), ("--no-batsignal", {"BATSIGNAL": "1"}, "batsignal", False),
        ("", {"DEBUG": "true"}, "log_level", "debug"),
        ("", {"DEBUG": "true", "LOG_LEVEL": "warning"}, "log_level", "warning"),
        ("--debug", {"LOG_LEVEL": "warning"}, "log_level", "debug"),
        ("--log.level=WARNING", {"DEBUG": "yes"}, "log_level", "warning"),
        ("--metrics.stale-after=1h30m", {"METRICS_STALE_AFTER": "5m"}, "stale_after", 5400),
        ("", {"WEB_LISTEN_ADDRESS": "127.0.0.1:0"}, "web_address", ("127.0.0.1", 0)),
        ("--sems.capture -x", {}, "capture", "-x"), ("--sems.capture=", {"SEMS_CAPTURE": "there"}, "capture", ""),
        ("", {"SEMS_MODE": "spool", "SEMS_SPOOL_FILE": "/s"}, "spool_file", "/s"),
    )  # fmt: skip

    def test_good(self) -> None:
        """The command line beats the environment, which beats the defaults; an empty variable is unset."""
        for line, environment, name, value in self.GOOD:
            with self.subTest(line, **environment):
                self.assertEqual(getattr(sems.serve_settings(line.split(), environment), name), value)
        self.assertEqual(self.lines, [])
        # shells set DEBUG to all sorts of things
        self.assertEqual(sems.serve_settings([], {"DEBUG": "release*"}).log_level, "info")
        self.assertIn("release*", self.lines.pop())

    def test_unknown_variables(self) -> None:
        """A SEMS_ variable that no flag has is named, with the nearest that exists, if one is near."""
        for name, near in (
            ("SEMS_MAX_DEVICE", "SEMS_MAX_DEVICES"), ("SEMS_SPOOL", "SEMS_SPOOL_FILE"), ("SEMS_DEBUG", "DEBUG"),
            ("SEMS_WEB_LISTEN_ADDRESS", "WEB_LISTEN_ADDRESS"), ("SEMS_XYZZY", ""), ("SEMS_PORT", ""), ("SEMS_LISTEN", "SEMS_LISTEN_ADDRESS"),
        ):  # fmt: skip
            hint = f" (is {near} meant?)" if near else ""
            wanted = f"ignored variables that no flag has: 'SEMS_', {name!r}{hint}"
            with self.subTest(name):
                self.assertEqual(
                    sems.unknown_variables({"SEMS_MODE": "local", name: "7", "SEMS_": "", "X": ""}), wanted
                )
        self.assertEqual(sems.unknown_variables({"SEMS_MODE": "local", "PATH": "x"}), "")

    BAD = (  # arguments, environment, what the line on stderr names
        ("--sems.listen-address=nonsense", {}, "--sems.listen-address", "nonsense"),
        ("--metrics.stale-after -1s", {}, "--metrics.stale-after", "-1s"),
        ("", {"SEMS_SPOOL_FILE": "/s", "SEMS_MODE": "local"}, "--sems.spool-file", "/s", "local"),
        ("serve --log.level=loud", {}, "--log.level", "loud"),
        ("", {"METRICS_STALE_AFTER": "soon"}, "METRICS_STALE_AFTER", "soon"),
        ("", {"SEMS_MAX_DEVICES": "\u0663"}, "SEMS_MAX_DEVICES", "u0663"),
        ("", {"WEB_TELEMETRY_PATH": "x\ny"}, "WEB_TELEMETRY_PATH", "x"), ("--nothing", {}, "--nothing"),
        ("--sems.mod=local", {}, "--sems.mod"), ("--sems.mode", {}, "--sems.mode"), ("serve more", {}, "more"),
        ("nothing", {}, "nothing", "doctor"), ("decode", {}, "FILE"), ("decode xyz", {}, "xyz"),
        ("backfill", {}, "FILE"), ("backfill /nonexistent", {}, "/nonexistent"),
        ("backfill x --label=__name__=1", {}, "--label", "__name__=1"),
        ("doctor", {"SEMS_MODE": "both"}, "SEMS_MODE", "both"), ("metrics more", {}, "more"),
        ("--version more", {}, "more"), ("demo --nothing", {}, "--nothing"),
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
            sems.name_servers: {"none": [], "1.1.1.1, [::1]:54,::2,h,[::3]": [("1.1.1.1", 53), ("::1", 54), ("::2", 53), ("h", 53), ("::3", 53)], "h:x": None, "h:0": None, "h,,": None, ",h": None},
            sems.networks: {"": [], "10.0.0.1/8, fd00::/8": [ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8")], "10.0.0.0/99": None, "h": None},
            sems.debug_level: {"1": "debug", "no": "info", "loud": None},
            sems.mode_name: {"spool": "spool", "LOCAL": "local", "both": None},
            sems.whole_number: {"1": 1, "256": 256, "0": None, "-1": None, "1.0": None, "": None, " 1": None},
            sems.url_path: {"/m": "/m", "/": None, "/m?x": None, "/m#x": None, "/-/ready": None, "/api/devices": None, "/api": "/api", "m": None, "/a b": None},
        }.items():  # fmt: skip
            for text, wanted in rows.items():
                with self.subTest(reader.expected, text=text):
                    try:
                        found = reader(text)
                    except argparse.ArgumentTypeError:
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
                for _, flag, *_ in sems.FLAGS if name in ("serve", "doctor") else ():
                    self.assertRegex(text, rf"--{re.escape(flag)}\b(?s:.*)\b{sems.variable(flag)}\b")

    def test_version_and_metrics(self) -> None:
        """version is JSON, by either name; metrics is a table with every metric."""
        for argument in ("version", "--version"):
            code, out, err = called(argument)
            self.assertEqual((code, err), (0, ""))
            platform = json.loads(out)["platform"]
            wanted = {"version": sems.VERSION, "python": sys.version.split()[0], "platform": platform}
            self.assertEqual(json.loads(out), wanted)
        code, out, err = called("metrics")
        self.assertEqual((code, err), (0, ""))
        self.assertEqual([line.split()[0] for line in out.splitlines()[1:]], [row[0] for row in sems.metric_rows()])
        self.assertEqual(len({line.index(" gauge ") for line in out.splitlines() if " gauge " in line}), 1)

    def test_processes(self) -> None:
        """From outside: warnings, systemd's READY, what cannot start, and a reader that has seen enough."""
        taken = f"127.0.0.1:{self.portal().port}"
        systemd = Peer(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        self.addCleanup(systemd.close)
        systemd.sock.bind(f"\0sems_mitm {os.getpid()}")
        more = {
            "TZ": "Nowhere/Town",
            "SEMS_MODUS": "x",
            "JOURNAL_STREAM": "8:1",
            "NOTIFY_SOCKET": f"@sems_mitm {os.getpid()}",
        }
        warned = self.serving(None, "--sems.mode=spool", **more)
        self.assertEqual(systemd.read(7), b"READY=1")
        for text in ("ignored variables that no flag has: 'SEMS_MODUS'", "TZ=Nowhere/Town is no time zone"):
            self.assertIn(text, warned.stderr())
        self.assertEqual({line[:3] for line in warned.stderr().splitlines()}, {"<4>", "<6>"})  # and no time
        rows = (
            (1, ["--sems.listen-address=" + taken, PORTS[1]], {}, ["--sems.listen-address", taken, "ss -ltnp"]),
            (1, ["--web.listen-address=" + taken, PORTS[0]], {}, ["--web.listen-address", taken, "ss -ltnp"]),
            (1, ["--sems.listen-address=no.such.host.invalid:1", PORTS[1]], {}, ["--sems.listen-address", "no.such"]),
            (1, ["--sems.mode=spool", "--sems.spool-file=/dev/null", *PORTS], {}, ["/dev/null"]),
            (2, [], {"SEMS_MODE": "both"}, ["SEMS_MODE", "both"]),
            (1, ["backfill", "/dev/null"], {}, ["/dev/null"]),
        )
        started = [self.process(*arguments, **environment) for _, arguments, environment, _ in rows]
        for process, (wanted, _, _, names) in zip(started, rows):
            with self.subTest(names):
                code, err = process.ended()
                self.assertEqual((code, process.popen.stdout.read(), err.count("\n")), (wanted, b"", 1), err)
                for name in names:
                    self.assertIn(name, err)
        capture = written(self.directory(), *[frame()] * 300)
        rows = (["decode", capture], ["backfill", capture], ["metrics"], ["version"], ["serve", "--help"])
        closed = [self.process(*arguments, TZ="UTC0") for arguments in rows]
        for process in closed:
            process.popen.stdout.close()
        for arguments, process in zip(rows, closed):
            with self.subTest(arguments[0]):
                self.assertNotRegex(process.ended()[1], "Traceback|Broken|ignored")


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

    def test_two_devices_with_the_same_labels(self) -> None:
        """As in serve, the second one gets no series, and is named: its counters would make falls and jumps of the first's."""
        twin = "01000HKU" + METER[8:]
        code, text, err = self.run_over(self.reading(NOON, 1), self.reading(NOON + timedelta(minutes=1), 2, twin))
        self.assertEqual(re.findall(r"(?m)^meter_power_generation_watts.* (\d+) \d+$", text), ["1"])
        self.assertEqual((code, err.startswith(f"{twin}: left out")), (0, True), err)

    def test_closed_streams(self) -> None:
        """Without a standard output or error, as some start it, there is no traceback, and the other has what it is to have."""
        path = written(self.directory(), self.reading(NOON, 1))
        program = f"{shlex.quote(sys.executable)} {shlex.quote(sems.__file__)}"
        for command, out, err in (
            (f"decode {path} 2>&-", b"{", b""), (f"backfill {path} 2>&-", b"#", b""),
            (f"backfill {path} >&-", b"", b"readings"), ("version >&- 2>&-", b"", b""), ("nothing 2>&-", b"", b""),
        ):  # fmt: skip
            with self.subTest(command):
                done = subprocess.run(
                    f"exec {program} {command}", shell=True, capture_output=True, env={**os.environ, "TZ": "UTC0"}
                )
                self.assertEqual((done.stdout[: len(out) or 1], done.stderr[:8]), (out, err))
                self.assertEqual(done.returncode, 2 if command.startswith("nothing") else 0)

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

    def readings(self, hybrid: bool) -> list:
        """(time, house, family to its values) every five minutes of a day."""
        devices, found = sems.simulated_house(hybrid), []
        for step in range(24 * 12):
            when, house, values = datetime(2026, 6, 1) + timedelta(minutes=5 * step), devices[0].house, {}
            house.move(when)
            for device in devices:
                if data := device.frame(sems.LIVE, when):
                    name = sems.family(device.model.cls, device.serial)
                    values[name] = sems.reading(name, sems.registers(sems.decode(data, OUT).clear)).values
            found.append((when, dict(house.flows(), stored=house.stored), values))
        return found

    def test_a_day_adds_up(self) -> None:
        """Energy is power over time, counters only rise, and a night has no sun."""
        kit = {word: f"meter_energy_{word}_decawatt_hours_total" for word in ("export", "import", "generation")}
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
                sun = sum(flows["generation"] > 0 for _, flows, _ in day) / 12  # hours
                self.assertAlmostEqual(held["inverter_uptime_hours_total", ""] - 1667, sun, delta=1)
                if name == "HYBRID":
                    self.assertGreater(energy["discharge"], 1000)
                    stored = 4000 + energy["charge"] - energy["discharge"]
                    self.assertAlmostEqual(day[-1][1]["stored"], stored, delta=600)

    def test_demo(self) -> None:
        """Meter and inverter agree on today by the demo's clock; a port in use is passed over."""
        holder = socket.socket()
        self.addCleanup(holder.close)
        is_held = False
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # in use already, perhaps no longer when the demo starts
            holder.bind((LOCAL, 20001))
            holder.listen()
            is_held = True
        process = self.process("demo", before="sems.PACE = ((0, 10), (260, 24))")  # high sun: energy comes sooner
        text = ""
        while "Ctrl-C" not in text:
            line = process.popen.stdout.readline().decode()
            self.assertTrue(line, process.stderr())
            text += line
        web = int(re.search(r"localhost:(\d+)/metrics", text)[1])
        self.assertRegex(text, r"Port 20001 is in use, the demo takes \d+\." if is_held else "open")

        def generated() -> tuple:
            """The house, and what its devices have generated today, when that is something."""
            answer = json.loads(http_get(web, "/api/household")[2])
            today = [figures.get("generated_today_kilowatt_hours", 0) for figures in answer["devices"].values()]
            return (answer["house"], *today) if len(today) == 2 and min(today) >= 0.1 else ()

        house, one, other = until(generated, 20)
        self.assertAlmostEqual(one, other, delta=0.101)
        self.assertAlmostEqual(house["generation_watts"], house["house_watts"] + house["export_watts"], places=3)
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
                rows = (0.1, 0, 0.01), (20, 6.6, 12), (240, 23.5, 24), (280, 30.6, 36), (521, 48, 49)
                for after, least, most in rows:
                    self.assertTrue(least <= hour(after) < most, (after, hour(after)))
                hours = [hour(after / 4) for after in range(1, 4 * 600)]
                self.assertEqual(hours, sorted(hours))


class DoctorTest(SocketCase):
    """sems_mitm.py doctor."""

    DEVICE = {"device": "meter", "model": "m", "full_serial": METER, "age_seconds": 1, "up": True}

    def doctor(self, *arguments: str, env: dict | None = None) -> tuple:
        code, out, err = called("doctor", *arguments, env={"TZ": "UTC0", **(env or {})})
        self.assertEqual(err, "")
        for line in out.splitlines():
            self.assertRegex(line, r"^(ok|warn|fail) +\S|^ +-> \S|^$|^\d+ ok, warnings: \d+, errors: \d+$")
        return code, out

    def check(self, findings, wanted) -> None:
        """Findings are (state, part of what is so, pattern of what to do)."""
        findings = list(findings)
        self.assertEqual([state for state, _, _ in findings], [state for state, _, _ in wanted])
        for (_, said, to_do), (_, text, step) in zip(findings, wanted):
            self.assertIn(text, said)
            self.assertRegex(to_do, step)

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
        code, out = self.doctor(PORTS[0], ports[1])
        self.assertIn("is free, though an exporter runs\n      -> start doctor with the exporter's --sems.listen", out)

    def test_findings(self) -> None:
        """What it says when something is missing: flags, environment, exit code, texts."""
        portal, away = self.portal(), self.portal(listening=False)
        server = NameServer(lambda query: [address_record(query, LOCAL)])
        self.addCleanup(server.close)
        local = "--sems.mode=local"
        for name, flags, environment, code, *wanted in (
            ("nothing runs", [local], {}, 0, "warn  no exporter runs", "-> start it", "ok    mode local"),
            ("a misspelt variable", [local], {"SEMS_MODUS": "x"}, 0, "warn  ignored variables", "is SEMS_MODE meant?"),
            ("a port in use", [local, f"--sems.listen-address={LOCAL}:{portal.port}"], {}, 1, "fail  port", "is in use", "ss -ltnp"),
            ("no such address", [local, "--web.listen-address=192.0.2.1:1"], {}, 1, "fail  port 192.0.2.1:1 cannot be had", "--web.listen-address"),
            ("a portal that is there", [f"--sems.upstream={LOCAL}:{portal.port}"], {}, 0, "ok    the portal is given as", "ok    the portal answers"),
            ("a portal that refuses", [f"--sems.upstream={LOCAL}:{away.port}"], {}, 1, "fail  the portal at", "--sems.mode spool"),
            ("no such zone", [local], {"TZ": "Nowhere/Town"}, 1, "fail  TZ=Nowhere/Town is no time zone", "CET-1CEST"),
            ("overridden everywhere", ["--sems.upstream=portal.test:1", f"--sems.upstream-dns={server.text}"], {}, 1, "leads a device nowhere", "overridden too", "--sems.upstream-dns"),
        ):  # fmt: skip
            with self.subTest(name):
                here = lambda host, port: [sems.Endpoint(socket.AF_INET, (LOCAL, port))]
                with mock.patch.object(sems, "system_addresses", here):
                    found, out = self.doctor(*PORTS, *flags, env=environment)
                self.assertEqual(found, code, out)
                for text in wanted:
                    self.assertIn(text, out)
        self.limits(RELEASED=time.time() + 86400)
        code, out = self.doctor(local, *PORTS)
        self.assertEqual((code, "fail  this machine's clock is wrong" in out), (1, True), out)

    def test_names(self) -> None:
        """What the name service's answer for the portal means, and that of a server on a name that does not exist."""
        home, other = "192.168.1.2", "192.168.1.9"
        for system, container, *wanted in (  # addresses, in a container, findings
            ([], False, ("warn", "has no address", ".")),
            (["127.0.0.1"], False, ("warn", "leads a device nowhere", ".")),
            (["0.0.0.0"], False, ("warn", "leads a device nowhere", ".")),
            ([home], False, ("ok", "an override that leads here", "^$")),
            ([home, "2606:4700::1"], False, ("ok", "leads here", "^$"), ("warn", "IPv6", ".")),
            (["8.8.8.8"], False, ("warn", "no override", ".")),
            ([other], False, ("warn", "not this machine", ".")),
            ([other], True, ("ok", "right if that is the host", "^$")),
        ):
            with self.subTest(system=system, container=container), contextlib.ExitStack() as stack:
                stack.enter_context(mock.patch.object(sems, "is_this_machine", [home].__contains__))
                stack.enter_context(mock.patch.object(sems, "IN_CONTAINER", container))
                self.check(sems.system_findings("portal.test", system), wanted)
        with mock.patch.object(sems, "ask_dns", return_value=[]):
            says = (
                "warn",
                "1.1.1.1:53 says that portal.test does not exist",
                "^most likely a firewall redirects port 53",
            )
            self.check([sems.server_finding(("1.1.1.1", 53), "portal.test")], [says])

    def test_what_a_running_exporter_says(self) -> None:
        """A loop is a failure; an inverter can sleep, a meter does not; strangers are named; a container has ports."""
        settings, silent = sems.serve_settings([], {}), {**self.DEVICE, "up": False, "age_seconds": 7200}
        for loops, devices, stranger, *wanted in (
            (0, [self.DEVICE], "", ("ok", "last packet 1 second ago", "^$")),
            (3, [self.DEVICE], "", ("fail", "has met itself", "DNAT"), ("ok", METER, "^$")),
            (0, [silent], "", ("warn", "2 hours ago", "^look at its Wi-Fi")),
            (0, [{**silent, "device": "inverter"}], "", ("warn", "2 hours ago", "^an inverter sleeps at night")),
            (0, [], "", ("warn", "no device has connected yet", "power-cycle")),
            (0, [], "tls", ("warn", "192.0.2.7 connects and begins TLS", "WLA")),
            (0, [], "nothing", ("warn", "192.0.2.7 connects and sends nothing", "WLA")),
        ):
            with self.subTest(wanted):
                page = f'sems_mitm_refused_connections_total{{reason="loop"}} {loops}\n'.encode()
                strangers = [{"host": "192.0.2.7", "said": stranger}] if stranger else []
                with mock.patch.object(sems, "local_get", return_value=page):
                    found = sems.device_findings(settings, {"devices": devices, "strangers": strangers})
                    self.check(found, wanted)
        with mock.patch.object(sems, "IN_CONTAINER", True):
            self.assertIn("-p 20001:20001 -p 14028:14028", next(sems.machine_findings(settings, None))[2])

    def test_another_program(self) -> None:
        """A program on the exporter's port is no exporter, whatever it answers; nor is one that says nothing."""
        settings, ours = sems.serve_settings([], {}), {"devices": [], "upstream": {"mode": "local", "address": ""}}
        for body, is_ours in (
            (ours, True), ("<html>", False), ({"devices": []}, False), ([ours], False), (5, False), ("[" * 100000, False),
            ({**ours, "upstream": "mode address"}, False), ({**ours, "upstream": {"mode": "proxy", "address": ""}}, False),
        ):  # fmt: skip
            text = body if isinstance(body, str) else json.dumps(body)
            with self.subTest(text[:60]), mock.patch.object(sems, "local_get", return_value=text.encode()):
                self.assertEqual(sems.running_exporter(settings), body if is_ours else None)
        for answer, text in ((b"HTTP/1.0 404 No\r\n\r\n<html>", "another program answers there"), (b"", "is in use\n")):
            listening = socket.create_server((LOCAL, 0))
            self.addCleanup(listening.close)
            self.addCleanup(listening.shutdown, socket.SHUT_RDWR)

            def serve(listening=listening, answer=answer) -> None:
                with contextlib.suppress(OSError):
                    while True:
                        with listening.accept()[0] as sock:
                            sock.recv(4096)
                            sock.sendall(answer)

            threading.Thread(target=serve, daemon=True).start()
            web = f"--web.listen-address={LOCAL}:{listening.getsockname()[1]}"
            code, out = self.doctor("--sems.mode=local", PORTS[0], web)
            self.assertEqual((code, "warn  no exporter runs" in out, text in out), (1, True, True), out)


# --------------------------------------------------------------------------------------------- the README's tables

README = os.path.join(os.path.dirname(os.path.abspath(sems.__file__)), "README.md")

# The metrics that the original exporter documents: what its users' dashboards name.
ORIGINAL = re.findall(
    r"\w+",
    """
meter_energy_export_decawatt_hours_total meter_energy_import_decawatt_hours_total meter_power_export_watts
meter_energy_generation_decawatt_hours_total meter_power_generation_watts
inverter_input_voltage_dc_decivolts inverter_input_current_dc_deciamps
inverter_output_voltage_ac_decivolts inverter_output_current_ac_deciamps inverter_output_frequency_ac_centihertz
inverter_power_output_watts inverter_energy_output_hectowatt_hours_day inverter_energy_output_hectowatt_hours_total
inverter_uptime_hours_total inverter_internal_temperature_decidegrees_celsius inverter_rssi_percent
meter_time_sync_packets_total inverter_time_sync_packets_total meter_metrics_packets_total
inverter_metrics_packets_total meter_time_sync_ack_packets_total outbound_unknown_packets_total
inbound_unknown_packets_total
""",
)


def with_tables(text: str) -> str:
    """The README with its tables as the code has them."""
    flags, row_of = [("flag", "variable", "default", "meaning")], {row[0]: row for row in sems.metric_rows()}
    for _, name, default, reader, _, meaning in sems.FLAGS:
        spelled = f"`--{name}` / `--no-{name}`" if reader in sems.SWITCHES else f"`--{name}`"
        shown = f"`{default}`" if default else "(all)" if reader is sems.networks else "(off)"
        flags.append((spelled, f"`{sems.variable(name)}`", shown, meaning))
    metrics = [("metric", "type", "unit", "meaning", "families")]
    metrics += [(f"`{name}`", *(row_of[name][column] for column in (1, 3, 4, 5))) for name in ORIGINAL]
    for name, (heads, *rows) in (("flags", flags), ("metrics", metrics)):
        lines = [" | ".join(cell.replace("|", "\\|") for cell in row) for row in (heads, ["---"] * len(heads), *rows)]
        table = "".join(f"| {line} |\n" for line in lines)
        text = re.sub(rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name} -->)", lambda _, table=table: table, text)
    return text


class Readme(unittest.TestCase):
    """What the README says of the program is what the program says."""

    def test_tables(self) -> None:
        """Its tables are the code's, every flag and command stands in it, and it stays a read of an evening."""
        with open(README, encoding="utf-8") as file:
            text = file.read()
        self.assertEqual(with_tables(text), text, "make tables writes them")
        self.assertLessEqual(text.count("\n"), 500)
        for word in (*(f"--{row[1]}" for row in sems.FLAGS), *sems.COMMANDS):
            self.assertIn(word, text)
        self.assertIn(f"There are {len(sems.METRICS) - len(ORIGINAL)} more", text)


if __name__ == "__main__":
    if sys.argv[1:] != ["tables"]:
        unittest.main()
    with open(README, "r+", encoding="utf-8") as file:
        tables = with_tables(file.read())
        file.seek(0)
        file.truncate()
        file.write(tables)
