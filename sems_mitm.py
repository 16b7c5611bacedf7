#!/usr/bin/env python3
"""sems_mitm: GoodWe solar devices as Prometheus metrics, read on their way to the SEMS portal.

Devices connect here instead of to the portal. What they send is decoded, shown on /metrics (port 14028) and passed on
unchanged; what the portal should not send, firmware upgrades and remote control, is dropped. Pure standard library,
one file, Python 3.9 or later:  python3 sems_mitm.py --help

A frame from a device, here with live data, and one to it; numbers are big endian but for the second's CRC:

    0        6        10      11         12     14       30   46     52            -2
    | POSTGW | length | class | function | 0000 | serial | IV | time | AES-128-CBC | CRC |       total = length + 13

    0    2        6       7          8        24   40            -2
    | GW | length | class | function | serial | IV | AES-128-CBC | CRC |                         total = length + 9

The file reads as a packet travels:

    limits, errors, registers    what there is to know, as tables
    checksum, cipher             CRC-16/MODBUS and AES-128-CBC, whole bursts and whole packets at a time
    frames                       Framer: bytes in, pieces out, nothing lost
    packets                      addresses, envelopes, registers; encode is the inverse of decode
    readings                     registers to values, info texts, unknown registers
    identity and time            model, family, labels; device time and order
    metrics                      the store; a snapshot of it to exposition text
    rules                        what may pass, who answers, what waits: no socket and no clock, time is an argument
    session                      one device and its portal, bytes in and bytes out
    files                        what is recorded: capture and backfill
    network                      the devices' and the portal's sockets, name look-up, the loop: the only place that knows selectors
    HTTP                         /metrics, the page, /api/devices
    settings, serve              the flags; how the parts above are put together
    simulator, demo, decode, backfill, doctor, command line
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import errno
import functools
import gc
import heapq
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import resource
import selectors
import signal
import socket
import socketserver
import struct
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone

VERSION = "1.0.0"
RELEASED = 1795305600  # 2026-11-22: a machine whose clock is before this is wrong, and sets no device's clock

# ---------------------------------------------------------------------------------------------------------- limits

RECV_SIZE = 256 << 10  # one read: enough of a burst to check its CRCs together, small beside the memory of a Pi Zero
BACKLOG = 256 << 10  # waiting for a connected peer: above it the other side is not read
QUEUE = 1 << 20  # waiting for an absent portal, a device: four days of a HomeKit 1000, one packet of 166 bytes a minute
ENTRY = 8 << 10  # what comes in small pieces is kept in entries of about this size
ENTRY_COST = 800  # bytes of memory that an entry takes beside its data, measured in the worst case
QUEUES = 16 << 20  # all that waits, of all peers together: MemoryMax=64M leaves room for it
STALL = 60  # s without progress of a backlog before a peer counts as lost
CONNECT_TIMEOUT = 10  # s
BACKOFF = (1, 60)  # s between attempts to reach the portal, doubling
PROVEN = 30  # s that a portal's connection stood before the back-off starts again, if it sent nothing
SILENCE = 30 * 60  # s before a silent device's connection is closed
LINGER = 1  # s for the portal's last words after the device has gone
ANSWER_TIMEOUT = 30  # s for the portal to answer the spool of a device that has gone
HOLD = 1  # s that an unfinished frame waits for the bat
SHUTDOWN = 2  # s to send what is queued at the end
CRC_BUDGET = 8  # bytes of checksum on bad frames for each byte received: nested claims burn no core
CRC_CREDIT = 512 << 10  # of that at once, 20 ms on a fast machine: the other devices wait so long
EXACT = 8  # live packets of a device waiting at once that are all decoded
DECODED = 3  # of a longer run of live packets: what the dip rule and the order rule need to see
OTHER_TYPES = 32  # packet types beyond the known with a label of their own
UNKNOWN_REGISTERS = 128  # series of unknown registers a device
LOOP_WINDOW = 1  # s in which our own first frame coming back is a loop
ECHOES = 32  # frames remembered for that, a connection
MISPLACED = 1024  # kinds of answer a portal may owe for dropped frames before its connection starts anew
HTTP_CONNECTIONS = 64
HTTP_BYTES = 4 << 20  # of answers that clients have not read yet
HTTP_HEAD = 16 << 10  # of a request, headers and all
HTTP_TIMEOUT = 30  # s for a client's next bytes
LOG_HEX = 256  # bytes of a packet in a log line
PERIOD, CLOCK_PERIOD = 60, 3600  # s in which the same trouble is one line; a clock that is not good enough stays so

# ---------------------------------------------------------------------------------------------------------- errors


class ProtocolError(ValueError):
    """The peer sent nonsense; `data` is the bytes that failed. Any other exception on a peer's bytes is a bug."""

    def __init__(self, reason: str, data: bytes = b"") -> None:
        super().__init__(reason)
        self.data = data


class UsageError(ValueError):
    """A flag, variable or argument of the command line has a value that cannot be used."""


# ------------------------------------------------------------------------------------------------------- registers
#
# A new value is one row: (register, kind, scale, metric, labels, help, evidence[, when]).
# kind    how the words are read, see KINDS; words of a value follow one another, the high one first
# scale   what one unit of the device's number is in the metric's unit
# when    (register, word): the value exists only while that register of the same packet holds that word
# A metric is a counter if its name ends with _total. Names and units without a base unit are the original exporter's.

SEEN = "capture"  # in real traffic
MAP = "map"  # from public register maps
GUESS = "inferred"

# fmt: off
HK1000 = (
    (2048, "u48",  10, "meter_channel_energy_export_watthours_total", 'channel="1"', "Cumulative energy exported or generated on a meter channel.", SEEN),
    (2048, "u48",   1, "meter_energy_export_decawatt_hours_total", "", "Cumulative energy exported to the grid.", SEEN),
    (2051, "u48",  10, "meter_channel_energy_export_watthours_total", 'channel="2"', "Cumulative energy exported or generated on a meter channel.", SEEN),
    (2051, "u48",   1, "meter_energy_generation_decawatt_hours_total", "", "Cumulative energy generated by the PV array.", SEEN),
    (2054, "u48",  10, "meter_channel_energy_export_watthours_total", 'channel="3"', "Cumulative energy exported or generated on a meter channel.", SEEN),
    (2057, "u48",   1, "meter_sum_of_energy_generation_and_export_decawatt_hours_total", "", "Cumulative energy while the sum of all channels was positive.", SEEN),
    (2060, "u48",  10, "meter_channel_energy_import_watthours_total", 'channel="1"', "Cumulative energy imported on a meter channel.", SEEN),
    (2060, "u48",   1, "meter_energy_import_decawatt_hours_total", "", "Cumulative energy imported from the grid.", SEEN),
    (2063, "u48",  10, "meter_channel_energy_import_watthours_total", 'channel="2"', "Cumulative energy imported on a meter channel.", SEEN),
    (2066, "u48",  10, "meter_channel_energy_import_watthours_total", 'channel="3"', "Cumulative energy imported on a meter channel.", SEEN),
    (2069, "u48",   1, "meter_sum_of_energy_import_less_generation_decawatt_hours_total", "", "Cumulative energy while the sum of all channels was negative.", SEEN),
    (2096, "u16", 0.1, "meter_voltage_volts", 'channel="1"', "Voltage of a meter channel.", SEEN),
    (2097, "u16", 0.1, "meter_voltage_volts", 'channel="2"', "Voltage of a meter channel.", SEEN),
    (2098, "u16", 0.1, "meter_voltage_volts", 'channel="3"', "Voltage of a meter channel.", SEEN),
    (2099, "u32",0.01, "meter_current_amperes", 'channel="1"', "Current of a meter channel.", SEEN),
    (2101, "u32",0.01, "meter_current_amperes", 'channel="2"', "Current of a meter channel.", SEEN),
    (2103, "u32",0.01, "meter_current_amperes", 'channel="3"', "Current of a meter channel.", SEEN),
    (2105, "s32",   1, "meter_channel_power_watts", 'channel="1"', "Power of a meter channel; positive is export or generation.", SEEN),
    (2105, "s32",   1, "meter_power_export_watts", "", "Power exported to the grid; negative while importing.", SEEN),
    (2107, "s32",   1, "meter_channel_power_watts", 'channel="2"', "Power of a meter channel; positive is export or generation.", SEEN),
    (2107, "s32",   1, "meter_power_generation_watts", "", "Power generated by the PV array; small negative values are the inverter's own consumption at night.", SEEN),
    (2109, "s32",   1, "meter_channel_power_watts", 'channel="3"', "Power of a meter channel; positive is export or generation.", SEEN),
    (2111, "s32",   1, "meter_sum_of_power_generation_and_export_watts", "", "Sum of the power of all channels; of little use where one channel is the grid and another the PV array.", SEEN),
)

HK3000 = (
    (2048, "u48",  10, "meter_channel_energy_export_watthours_total", 'channel="1"', "Cumulative energy exported or generated on a meter channel.", GUESS),
    (2051, "u48",  10, "meter_channel_energy_export_watthours_total", 'channel="2"', "Cumulative energy exported or generated on a meter channel.", GUESS),
    (2054, "u48",  10, "meter_channel_energy_export_watthours_total", 'channel="3"', "Cumulative energy exported or generated on a meter channel.", GUESS),
    (2057, "u48",   1, "meter_energy_export_decawatt_hours_total", "", "Cumulative energy exported to the grid.", GUESS),
    (2060, "u48",  10, "meter_channel_energy_import_watthours_total", 'channel="1"', "Cumulative energy imported on a meter channel.", GUESS),
    (2063, "u48",  10, "meter_channel_energy_import_watthours_total", 'channel="2"', "Cumulative energy imported on a meter channel.", GUESS),
    (2066, "u48",  10, "meter_channel_energy_import_watthours_total", 'channel="3"', "Cumulative energy imported on a meter channel.", GUESS),
    (2069, "u48",   1, "meter_energy_import_decawatt_hours_total", "", "Cumulative energy imported from the grid.", GUESS),
    (2096, "u16", 0.1, "meter_voltage_volts", 'channel="1"', "Voltage of a meter channel.", GUESS),
    (2097, "u16", 0.1, "meter_voltage_volts", 'channel="2"', "Voltage of a meter channel.", GUESS),
    (2098, "u16", 0.1, "meter_voltage_volts", 'channel="3"', "Voltage of a meter channel.", GUESS),
    (2099, "u32",0.01, "meter_current_amperes", 'channel="1"', "Current of a meter channel.", GUESS),
    (2101, "u32",0.01, "meter_current_amperes", 'channel="2"', "Current of a meter channel.", GUESS),
    (2103, "u32",0.01, "meter_current_amperes", 'channel="3"', "Current of a meter channel.", GUESS),
    (2105, "s32",   1, "meter_channel_power_watts", 'channel="1"', "Power of a meter channel; positive is export or generation.", GUESS),
    (2107, "s32",   1, "meter_channel_power_watts", 'channel="2"', "Power of a meter channel; positive is export or generation.", GUESS),
    (2109, "s32",   1, "meter_channel_power_watts", 'channel="3"', "Power of a meter channel; positive is export or generation.", GUESS),
    (2111, "s32",   1, "meter_power_export_watts", "", "Power exported to the grid; negative while importing.", GUESS),
)

GRID = (
    (30103, "u16",      1, "inverter_input_voltage_dc_decivolts", "", "Input DC voltage to inverter.", SEEN),
    (30103, "u16",    0.1, "inverter_string_voltage_volts", 'string="1"', "DC voltage of a PV input.", SEEN),
    (30104, "u16",      1, "inverter_input_current_dc_deciamps", "", "Input DC current to inverter.", SEEN),
    (30104, "u16",    0.1, "inverter_string_current_amperes", 'string="1"', "DC current of a PV input.", SEEN),
    (30105, "u16",    0.1, "inverter_string_voltage_volts", 'string="2"', "DC voltage of a PV input.", SEEN),
    (30106, "u16",    0.1, "inverter_string_current_amperes", 'string="2"', "DC current of a PV input.", SEEN),
    (30107, "u16",    0.1, "inverter_string_voltage_volts", 'string="3"', "DC voltage of a PV input.", MAP),
    (30108, "u16",    0.1, "inverter_string_current_amperes", 'string="3"', "DC current of a PV input.", MAP),
    (30109, "u16",    0.1, "inverter_string_voltage_volts", 'string="4"', "DC voltage of a PV input.", MAP),
    (30110, "u16",    0.1, "inverter_string_current_amperes", 'string="4"', "DC current of a PV input.", MAP),
    (30111, "u16",    0.1, "inverter_string_voltage_volts", 'string="5"', "DC voltage of a PV input.", MAP),
    (30112, "u16",    0.1, "inverter_string_current_amperes", 'string="5"', "DC current of a PV input.", MAP),
    (30113, "u16",    0.1, "inverter_string_voltage_volts", 'string="6"', "DC voltage of a PV input.", MAP),
    (30114, "u16",    0.1, "inverter_string_current_amperes", 'string="6"', "DC current of a PV input.", MAP),
    (30115, "u16",    0.1, "inverter_line_voltage_volts", 'line="12"', "AC voltage between two phases.", MAP),
    (30116, "u16",    0.1, "inverter_line_voltage_volts", 'line="23"', "AC voltage between two phases.", MAP),
    (30117, "u16",    0.1, "inverter_line_voltage_volts", 'line="31"', "AC voltage between two phases.", MAP),
    (30118, "u16",      1, "inverter_output_voltage_ac_decivolts", "", "Output AC voltage from inverter.", SEEN),
    (30118, "u16",    0.1, "inverter_phase_voltage_volts", 'phase="1"', "AC voltage of a phase.", SEEN),
    (30119, "u16",    0.1, "inverter_phase_voltage_volts", 'phase="2"', "AC voltage of a phase.", MAP),
    (30120, "u16",    0.1, "inverter_phase_voltage_volts", 'phase="3"', "AC voltage of a phase.", MAP),
    (30121, "u16",      1, "inverter_output_current_ac_deciamps", "", "Output AC current from inverter.", SEEN),
    (30121, "u16",    0.1, "inverter_phase_current_amperes", 'phase="1"', "AC current of a phase.", SEEN),
    (30122, "u16",    0.1, "inverter_phase_current_amperes", 'phase="2"', "AC current of a phase.", MAP),
    (30123, "u16",    0.1, "inverter_phase_current_amperes", 'phase="3"', "AC current of a phase.", MAP),
    (30124, "u16",      1, "inverter_output_frequency_ac_centihertz", "", "Output AC frequency from inverter.", SEEN),
    (30124, "u16",   0.01, "inverter_phase_frequency_hertz", 'phase="1"', "AC frequency of a phase.", SEEN),
    (30125, "u16",   0.01, "inverter_phase_frequency_hertz", 'phase="2"', "AC frequency of a phase.", MAP),
    (30126, "u16",   0.01, "inverter_phase_frequency_hertz", 'phase="3"', "AC frequency of a phase.", MAP),
    (30127, "u32l",    1, "inverter_power_output_watts", "", "Power output from inverter.", SEEN),
    (30129, "u16",      1, "inverter_work_mode", "", "Work mode: 0 waiting, 1 normal, 2 error, 4 checking.", SEEN),
    (30130, "u32",      1, "inverter_error_bitmap", "", "Error codes, a bitmap; 0 is no error.", MAP),
    (30132, "u16",      1, "inverter_warning_bitmap", "", "Warning codes, a bitmap; 0 is no warning.", SEEN),
    (30133, "u32",      1, "inverter_apparent_power_voltamperes", "", "Apparent power output.", SEEN),
    (30135, "s32",      1, "inverter_reactive_power_vars", "", "Reactive power output; negative is absorbing.", SEEN),
    (30137, "u32h",     1, "inverter_input_power_watts", "", "DC input power.", MAP),
    (30139, "s16",  0.001, "inverter_power_factor_ratio", "", "Power factor.", SEEN),
    (30141, "s16",      1, "inverter_internal_temperature_decidegrees_celsius", "", "Internal temperature of inverter.", SEEN),
    (30142, "s16",    0.1, "inverter_heatsink_temperature_celsius", "", "Temperature of the heat sink.", MAP),
    (30143, "s16",    0.1, "inverter_module_temperature_celsius", "", "Temperature of the power module.", MAP),
    (30144, "u16",      1, "inverter_energy_output_hectowatt_hours_day", "", "Cumulative energy output today.", SEEN),
    (30145, "u32",      1, "inverter_energy_output_hectowatt_hours_total", "", "Cumulative energy output total.", SEEN),
    (30147, "u32",      1, "inverter_uptime_hours_total", "", "Inverter total operation time.", SEEN),
    (30149, "u16",      1, "inverter_grid_code", "", "Grid (safety country) code the inverter is set to.", SEEN),
    (30163, "u16",    0.1, "inverter_bus_voltage_volts", "", "DC bus voltage.", SEEN),
    (30165, "u32",      1, "inverter_derating_bitmap", "", "Reasons for derating, a bitmap.", MAP),
    (30172, "u16",      1, "inverter_rssi_percent", "", "Inverter WLAN received signal strength indicator.", SEEN),
    (30195, "s32",      1, "inverter_meter_power_watts", "", "Power at the CT meter attached to the inverter.", MAP, (30209, 1)),
    (30210, "u16",  0.001, "inverter_leakage_current_amperes", "", "Residual (leakage) current.", MAP),
)

HYBRID = (
    (35103, "u16",   1, "inverter_input_voltage_dc_decivolts", "", "Input DC voltage to inverter.", SEEN),
    (35103, "u16", 0.1, "inverter_string_voltage_volts", 'string="1"', "DC voltage of a PV input.", SEEN),
    (35104, "u16",   1, "inverter_input_current_dc_deciamps", "", "Input DC current to inverter.", SEEN),
    (35104, "u16", 0.1, "inverter_string_current_amperes", 'string="1"', "DC current of a PV input.", SEEN),
    (35105, "u32",   1, "inverter_string_power_watts", 'string="1"', "DC power of a PV input.", SEEN),
    (35107, "u16", 0.1, "inverter_string_voltage_volts", 'string="2"', "DC voltage of a PV input.", SEEN),
    (35108, "u16", 0.1, "inverter_string_current_amperes", 'string="2"', "DC current of a PV input.", SEEN),
    (35109, "u32",   1, "inverter_string_power_watts", 'string="2"', "DC power of a PV input.", SEEN),
    (35111, "u16", 0.1, "inverter_string_voltage_volts", 'string="3"', "DC voltage of a PV input.", MAP),
    (35112, "u16", 0.1, "inverter_string_current_amperes", 'string="3"', "DC current of a PV input.", MAP),
    (35113, "u32",   1, "inverter_string_power_watts", 'string="3"', "DC power of a PV input.", MAP),
    (35115, "u16", 0.1, "inverter_string_voltage_volts", 'string="4"', "DC voltage of a PV input.", MAP),
    (35116, "u16", 0.1, "inverter_string_current_amperes", 'string="4"', "DC current of a PV input.", MAP),
    (35117, "u32",   1, "inverter_string_power_watts", 'string="4"', "DC power of a PV input.", MAP),
    (35121, "u16",   1, "inverter_output_voltage_ac_decivolts", "", "Output AC voltage from inverter.", SEEN),
    (35121, "u16", 0.1, "inverter_phase_voltage_volts", 'phase="1"', "AC voltage of a phase.", SEEN),
    (35122, "u16",   1, "inverter_output_current_ac_deciamps", "", "Output AC current from inverter.", SEEN),
    (35122, "u16", 0.1, "inverter_phase_current_amperes", 'phase="1"', "AC current of a phase.", SEEN),
    (35123, "u16",   1, "inverter_output_frequency_ac_centihertz", "", "Output AC frequency from inverter.", SEEN),
    (35123, "u16",0.01, "inverter_phase_frequency_hertz", 'phase="1"', "AC frequency of a phase.", SEEN),
    (35125, "s16",   1, "inverter_phase_power_watts", 'phase="1"', "AC power of a phase.", SEEN),
    (35126, "u16", 0.1, "inverter_phase_voltage_volts", 'phase="2"', "AC voltage of a phase.", SEEN),
    (35127, "u16", 0.1, "inverter_phase_current_amperes", 'phase="2"', "AC current of a phase.", SEEN),
    (35128, "u16",0.01, "inverter_phase_frequency_hertz", 'phase="2"', "AC frequency of a phase.", SEEN),
    (35130, "s16",   1, "inverter_phase_power_watts", 'phase="2"', "AC power of a phase.", SEEN),
    (35131, "u16", 0.1, "inverter_phase_voltage_volts", 'phase="3"', "AC voltage of a phase.", SEEN),
    (35132, "u16", 0.1, "inverter_phase_current_amperes", 'phase="3"', "AC current of a phase.", SEEN),
    (35133, "u16",0.01, "inverter_phase_frequency_hertz", 'phase="3"', "AC frequency of a phase.", SEEN),
    (35135, "s16",   1, "inverter_phase_power_watts", 'phase="3"', "AC power of a phase.", SEEN),
    (35138, "s16",   1, "inverter_power_output_watts", "", "Power output from inverter.", SEEN),
    (35140, "s16",   1, "inverter_active_power_watts", "", "Active power at the grid connection; positive is export.", SEEN),
    (35142, "s16",   1, "inverter_reactive_power_vars", "", "Reactive power output; negative is absorbing.", MAP),
    (35144, "s16",   1, "inverter_apparent_power_voltamperes", "", "Apparent power output.", MAP),
    (35145, "u16", 0.1, "inverter_backup_voltage_volts", 'phase="1"', "Voltage of a phase of the backup output.", SEEN),
    (35146, "u16", 0.1, "inverter_backup_current_amperes", 'phase="1"', "Current of a phase of the backup output.", SEEN),
    (35147, "u16",0.01, "inverter_backup_frequency_hertz", 'phase="1"', "Frequency of a phase of the backup output.", SEEN),
    (35150, "s16",   1, "inverter_backup_power_watts", 'phase="1"', "Power of a phase of the backup output.", SEEN),
    (35151, "u16", 0.1, "inverter_backup_voltage_volts", 'phase="2"', "Voltage of a phase of the backup output.", SEEN),
    (35152, "u16", 0.1, "inverter_backup_current_amperes", 'phase="2"', "Current of a phase of the backup output.", SEEN),
    (35153, "u16",0.01, "inverter_backup_frequency_hertz", 'phase="2"', "Frequency of a phase of the backup output.", SEEN),
    (35156, "s16",   1, "inverter_backup_power_watts", 'phase="2"', "Power of a phase of the backup output.", SEEN),
    (35157, "u16", 0.1, "inverter_backup_voltage_volts", 'phase="3"', "Voltage of a phase of the backup output.", SEEN),
    (35158, "u16", 0.1, "inverter_backup_current_amperes", 'phase="3"', "Current of a phase of the backup output.", SEEN),
    (35159, "u16",0.01, "inverter_backup_frequency_hertz", 'phase="3"', "Frequency of a phase of the backup output.", SEEN),
    (35162, "s16",   1, "inverter_backup_power_watts", 'phase="3"', "Power of a phase of the backup output.", SEEN),
    (35164, "s16",   1, "inverter_phase_load_watts", 'phase="1"', "Load on a phase.", SEEN),
    (35166, "s16",   1, "inverter_phase_load_watts", 'phase="2"', "Load on a phase.", SEEN),
    (35168, "s16",   1, "inverter_phase_load_watts", 'phase="3"', "Load on a phase.", SEEN),
    (35172, "s16",   1, "inverter_load_watts", "", "Load behind the inverter.", SEEN),
    (35174, "s16",   1, "inverter_internal_temperature_decidegrees_celsius", "", "Internal temperature of inverter.", SEEN),
    (35175, "s16", 0.1, "inverter_module_temperature_celsius", "", "Temperature of the power module.", MAP),
    (35176, "s16", 0.1, "inverter_heatsink_temperature_celsius", "", "Temperature of the heat sink.", SEEN),
    (35178, "u16", 0.1, "inverter_bus_voltage_volts", "", "DC bus voltage.", SEEN),
    (35180, "u16", 0.1, "battery_voltage_volts", 'battery="1"', "Battery voltage.", SEEN),
    (35181, "s16", 0.1, "battery_current_amperes", 'battery="1"', "Battery current; positive is discharging.", SEEN),
    (35182, "s32",   1, "battery_power_watts", 'battery="1"', "Battery power; positive is discharging.", SEEN),
    (35184, "u16",   1, "battery_mode", 'battery="1"', "Battery mode: 0 none, 1 standby, 2 discharging, 3 charging.", SEEN),
    (35185, "u16",   1, "inverter_warning_bitmap", "", "Warning codes, a bitmap; 0 is no warning.", MAP),
    (35186, "u16",   1, "inverter_grid_code", "", "Grid (safety country) code the inverter is set to.", SEEN),
    (35187, "u16",   1, "inverter_hybrid_work_mode", "", "Work mode of a hybrid: 0 waiting, 1 on grid, 2 off grid, 3 fault, 4 flashing, 5 checking.", MAP),
    (35189, "u32",   1, "inverter_error_bitmap", "", "Error codes, a bitmap; 0 is no error.", MAP),
    (35191, "u32",   1, "inverter_energy_output_hectowatt_hours_total", "", "Cumulative energy output total.", SEEN),
    (35193, "u32",   1, "inverter_energy_output_hectowatt_hours_day", "", "Cumulative energy output today.", SEEN),
    (35195, "u32", 100, "inverter_energy_export_watthours_total", "", "Cumulative energy exported.", SEEN),
    (35197, "u32",   1, "inverter_uptime_hours_total", "", "Inverter total operation time.", SEEN),
    (35200, "u32", 100, "inverter_energy_import_watthours_total", "", "Cumulative energy imported.", SEEN),
    (35203, "u32", 100, "inverter_energy_load_watthours_total", "", "Cumulative energy used by the load.", SEEN),
    (35206, "u32", 100, "battery_energy_charge_watthours_total", "", "Cumulative energy charged into the battery.", SEEN),
    (35209, "u32", 100, "battery_energy_discharge_watthours_total", "", "Cumulative energy discharged from the battery.", SEEN),
    (35262, "u16", 0.1, "battery_voltage_volts", 'battery="2"', "Battery voltage.", MAP),
    (35263, "s16", 0.1, "battery_current_amperes", 'battery="2"', "Battery current; positive is discharging.", MAP),
    (35264, "s32",   1, "battery_power_watts", 'battery="2"', "Battery power; positive is discharging.", MAP),
    (35266, "u16",   1, "battery_mode", 'battery="2"', "Battery mode: 0 none, 1 standby, 2 discharging, 3 charging.", MAP),
    (36001, "u16",   1, "inverter_rssi_percent", "", "Inverter WLAN received signal strength indicator.", SEEN),
    (36014, "u16",0.01, "meter_frequency_hertz", "", "Grid frequency at the meter.", SEEN, (36004, 1)),
    (36015, "f32", 0.1, "meter_energy_export_decawatt_hours_total", "", "Cumulative energy exported to the grid.", SEEN, (36004, 1)),
    (36017, "f32", 0.1, "meter_energy_import_decawatt_hours_total", "", "Cumulative energy imported from the grid.", SEEN, (36004, 1)),
    (36019, "s32",   1, "meter_channel_power_watts", 'channel="1"', "Power of a meter channel; positive is export or generation.", SEEN, (36004, 1)),
    (36021, "s32",   1, "meter_channel_power_watts", 'channel="2"', "Power of a meter channel; positive is export or generation.", SEEN, (36004, 1)),
    (36023, "s32",   1, "meter_channel_power_watts", 'channel="3"', "Power of a meter channel; positive is export or generation.", SEEN, (36004, 1)),
    (36025, "s32",   1, "meter_power_export_watts", "", "Power exported to the grid; negative while importing.", SEEN, (36004, 1)),
    (36052, "u16", 0.1, "meter_voltage_volts", 'channel="1"', "Voltage of a meter channel.", SEEN, (36004, 1)),
    (36053, "u16", 0.1, "meter_voltage_volts", 'channel="2"', "Voltage of a meter channel.", SEEN, (36004, 1)),
    (36054, "u16", 0.1, "meter_voltage_volts", 'channel="3"', "Voltage of a meter channel.", SEEN, (36004, 1)),
    (36055, "u16", 0.1, "meter_current_amperes", 'channel="1"', "Current of a meter channel.", SEEN, (36004, 1)),
    (36056, "u16", 0.1, "meter_current_amperes", 'channel="2"', "Current of a meter channel.", SEEN, (36004, 1)),
    (36057, "u16", 0.1, "meter_current_amperes", 'channel="3"', "Current of a meter channel.", SEEN, (36004, 1)),
    (37003, "s16", 0.1, "battery_temperature_celsius", 'battery="1"', "Battery temperature.", SEEN),
    (37004, "u16",   1, "battery_charge_limit_amperes", 'battery="1"', "Charge current limit set by the battery management system.", SEEN),
    (37005, "u16",   1, "battery_discharge_limit_amperes", 'battery="1"', "Discharge current limit set by the battery management system.", SEEN),
    (37007, "u16",0.01, "battery_state_of_charge_ratio", 'battery="1"', "Battery state of charge, 0 to 1.", SEEN),
    (37008, "u16",0.01, "battery_state_of_health_ratio", 'battery="1"', "Battery state of health, 0 to 1.", SEEN),
    (37009, "u16",   1, "battery_modules", 'battery="1"', "Number of battery modules.", SEEN),
    (39001, "s16", 0.1, "battery_temperature_celsius", 'battery="2"', "Battery temperature.", MAP),
    (39002, "u16",   1, "battery_charge_limit_amperes", 'battery="2"', "Charge current limit set by the battery management system.", MAP),
    (39003, "u16",   1, "battery_discharge_limit_amperes", 'battery="2"', "Discharge current limit set by the battery management system.", MAP),
    (39005, "u16",0.01, "battery_state_of_charge_ratio", 'battery="2"', "Battery state of charge, 0 to 1.", MAP),
    (39006, "u16",0.01, "battery_state_of_health_ratio", 'battery="2"', "Battery state of health, 0 to 1.", MAP),
    (39007, "u16",   1, "battery_modules", 'battery="2"', "Number of battery modules.", MAP),
)
# fmt: on
FAMILIES = {"HK1000": HK1000, "HK3000": HK3000, "GRID": GRID, "HYBRID": HYBRID}

Kind = collections.namedtuple("Kind", "words signed number")  # number: of the raw bits, None if they mean "not available"
KINDS = {
    "u16": Kind(1, False, lambda raw: raw),
    "s16": Kind(1, True, lambda raw: raw - (raw >> 15 << 16)),
    "u32": Kind(2, False, lambda raw: raw),
    "s32": Kind(2, True, lambda raw: raw - (raw >> 31 << 32)),
    "u48": Kind(3, False, lambda raw: raw),
    "f32": Kind(2, True, lambda raw: struct.unpack(">f", raw.to_bytes(4, "big"))[0]),
    "u32l": Kind(2, False, lambda raw: raw & 0xFFFF if raw >> 16 == 0xFFFF else raw),  # some D-NS leave the high word FFFF
    "u32h": Kind(2, False, lambda raw: None if raw == 0xFFFF else raw),  # 0000 FFFF is not available either
}

# Texts for the info metric, by name; a text in several ranges is joined with a blank.
INFO = {
    "model": ((40173, 40188), (35011, 35015)),
    "firmware": ((30221, 30226), (35021, 35026), (35027, 35032), (4864, 4871)),
    "module_firmware": ((30054, 30061), (4891, 4895)),
    "portal": ((40075, 40100), (4609, 4622)),
}
# The device's time, and the numbers of its versions: known, and no metric.
SILENT = ((30034, 30039), (30100, 30102), (35000, 35032), (35100, 35102))

# Every metric that is not a register's: name, type, labels, help.
DEVICE_LABELS = "device, model, serial"
# fmt: off
INTERNALS = (
    ("meter_unknown_register", "gauge", DEVICE_LABELS + ", register", "Register of a meter whose meaning is unknown, as an unsigned word."),
    ("inverter_unknown_register", "gauge", DEVICE_LABELS + ", register", "Register of an inverter whose meaning is unknown, as an unsigned word."),
    ("meter_time_sync_packets_total", "counter", DEVICE_LABELS, "Settings packets (function 03) of a meter."),
    ("inverter_time_sync_packets_total", "counter", DEVICE_LABELS, "Settings packets (function 03) of an inverter."),
    ("meter_metrics_packets_total", "counter", DEVICE_LABELS, "Data packets (functions 04 and 45) of a meter."),
    ("inverter_metrics_packets_total", "counter", DEVICE_LABELS, "Data packets (functions 04 and 45) of an inverter."),
    ("meter_time_sync_ack_packets_total", "counter", DEVICE_LABELS, "Confirmations of a write (function 10) of any device."),
    ("outbound_unknown_packets_total", "counter", "", "Packets from devices with a good checksum and another function."),
    ("inbound_unknown_packets_total", "counter", "", "Packets from the portal with a good checksum that were not let through."),
    ("sems_mitm_build_info", "gauge", "version, python", "Always 1."),
    ("sems_mitm_device_info", "gauge", DEVICE_LABELS + ", full_serial, firmware, module_firmware, portal", "Always 1; what the device says of itself."),
    ("sems_mitm_device_up", "gauge", DEVICE_LABELS, "1 while the last good frame of the device is not older than stale_after_seconds."),
    ("sems_mitm_device_last_packet_timestamp_seconds", "gauge", DEVICE_LABELS, "When the last good frame of the device came."),
    ("sems_mitm_device_clock_offset_seconds", "gauge", DEVICE_LABELS, "The device's clock less this machine's, at its last live packet."),
    ("sems_mitm_packets_total", "counter", "direction, type, verdict", "Packets by type and by what became of them."),
    ("sems_mitm_acks_total", "counter", DEVICE_LABELS, "Acknowledgements given to the device, by the portal or by the exporter."),
    ("sems_mitm_nacks_total", "counter", DEVICE_LABELS, "Packets of the device that the portal did not accept."),
    ("sems_mitm_buffered_packets_total", "counter", DEVICE_LABELS, "Buffered packets (function 45), which a device sends after an outage."),
    ("sems_mitm_rejected_values_total", "counter", "reason", "Values of live packets that were not taken."),
    ("sems_mitm_queue_bytes", "gauge", "", "Bytes that wait for the portal, in memory."),
    ("sems_mitm_queue_dropped_packets_total", "counter", "", "Packets that were dropped because a queue was full."),
    ("sems_mitm_unlisted_device_packets_total", "counter", "", "Good packets of devices without series of their own."),
    ("sems_mitm_device_connections", "gauge", "", "Device connections open now, and spools still being delivered."),
    ("sems_mitm_upstream_connections", "gauge", "", "Portal connections open now."),
    ("sems_mitm_refused_connections_total", "counter", "reason", "Device connections that were refused."),
    ("sems_mitm_upstream_connect_failures_total", "counter", "reason", "Attempts to reach the portal that failed."),
    ("sems_mitm_upstream_up", "gauge", "", "1 if the last attempt of any device to reach the portal succeeded."),
    ("sems_mitm_bytes_total", "counter", "direction", "Bytes read from devices (outbound) and from the portal (inbound)."),
    ("sems_mitm_http_closed_connections_total", "counter", "", "HTTP connections closed to make room for a newer one."),
    ("sems_mitm_suppressed_log_lines_total", "counter", "", "Log lines left out because the same was said within a minute."),
    ("sems_mitm_file_errors_total", "counter", "file", "Records that could not be written."),
    ("sems_mitm_stale_after_seconds", "gauge", "", "The value of --metrics.stale-after; 0 is never."),
    ("process_cpu_seconds_total", "counter", "", "Total user and system CPU time spent in seconds."),
    ("process_resident_memory_bytes", "gauge", "", "Resident memory size in bytes."),
    ("process_start_time_seconds", "gauge", "", "Start time of the process since unix epoch in seconds."),
    ("process_open_fds", "gauge", "", "Number of open file descriptors."),
    ("process_max_fds", "gauge", "", "Maximum number of open file descriptors."),
    ("batsignal_top", "untyped", "", "Upper edge of the bat at this machine's local time."),
    ("batsignal_bottom", "untyped", "", "Lower edge of the bat at this machine's local time."),
)
# fmt: on
# Counters with fixed labels start at 0: name, label, its values.
FIXED = (
    ("outbound_unknown_packets_total", "", ("",)),
    ("inbound_unknown_packets_total", "", ("",)),
    ("sems_mitm_rejected_values_total", "reason", ("dip", "not_finite")),
    ("sems_mitm_queue_dropped_packets_total", "", ("",)),
    ("sems_mitm_unlisted_device_packets_total", "", ("",)),
    ("sems_mitm_refused_connections_total", "reason", ("limit", "not_allowed", "loop")),
    ("sems_mitm_upstream_connect_failures_total", "reason", ("dns", "refused", "timeout", "loop", "other")),
    ("sems_mitm_bytes_total", "direction", ("outbound", "inbound")),
    ("sems_mitm_http_closed_connections_total", "", ("",)),
    ("sems_mitm_file_errors_total", "file", ("capture", "backfill")),
)

# A row as it is read: later are its registers behind the first, missing is the raw number that means "not available".
Value = collections.namedtuple("Value", "register later missing number multiply divide series counter when")


def _value(family, register, kind, scale, metric, labels, help_text, evidence, when=None) -> Value:
    count, signed, number = KINDS[kind]
    multiply, divide = (scale, 1) if scale >= 1 else (1, round(1 / scale))  # 66 / 10 is 6.6 to the last digit, 66 * 0.1 is not
    missing = (1 << 16 * count) - 1 if family == "GRID" or not signed else None  # elsewhere -1 is a value
    later = range(register + 1, register + count)
    return Value(register, later, missing, number, multiply, divide, (metric, labels), metric.endswith("_total"), when)


def _families() -> dict[str, tuple[str, str]]:
    """Metric name to (type, help). Raises ValueError for a table that contradicts itself."""
    families = {name: (kind, help_text) for name, kind, _, help_text in INTERNALS}
    for family, rows in FAMILIES.items():
        series = set()
        for row in rows:
            metric, labels, help_text = row[3:6]
            told = families.setdefault(metric, ("counter" if metric.endswith("_total") else "gauge", help_text))
            if told[1] != help_text or (metric, labels) in series:
                raise ValueError(f"{family} {row[0]}: {metric}{{{labels}}} stands twice, or with another help")
            series.add((metric, labels))
    return families


METRICS = _families()
VALUES = {family: tuple(_value(family, *row) for row in rows) for family, rows in FAMILIES.items()}
KNOWN = {
    family: frozenset(
        register
        for first, last in [(value.register, value.register + len(value.later)) for value in rows]
        + list(SILENT)
        + [r for ranges in INFO.values() for r in ranges]
        for register in range(first, last + 1)
    )
    for family, rows in VALUES.items()
}

# -------------------------------------------------------------------------------------------------------- checksum


def _crc_table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
        table.append(crc)
    return table


CRC_TABLE = _crc_table()
CRC_LOW, CRC_HIGH = bytes(crc & 0xFF for crc in CRC_TABLE), bytes(crc >> 8 for crc in CRC_TABLE)
LANES_FROM = 24  # frames of one size from which lanes beat the byte table


def crc16(data: bytes) -> int:
    """CRC-16/MODBUS of data; 4B37 for b"123456789"."""
    crc, table = 0xFFFF, CRC_TABLE
    for byte in data:
        crc = crc >> 8 ^ table[(crc ^ byte) & 0xFF]
    return crc


def _int(data: bytes) -> int:
    return int.from_bytes(data, "little")


def crc16_lanes(data: bytes, size: int) -> tuple[bytes, bytes]:
    """Low and high bytes of the CRCs of equally long frames, each without its last two bytes.

    data[i::size] is byte i of every frame: one step of the byte table carries all of them forward.
    """
    count, from_bytes = len(data) // size, int.from_bytes
    low = high = from_bytes(b"\xff" * count, "little")
    for i in range(size - 2):
        index = (low ^ from_bytes(data[i::size], "little")).to_bytes(count, "little")
        low = high ^ from_bytes(index.translate(CRC_LOW), "little")
        high = from_bytes(index.translate(CRC_HIGH), "little")
    return low.to_bytes(count, "little"), high.to_bytes(count, "little")


def first_bad(data: bytes, size: int, order: str) -> int:
    """Index of the first of the equally long frames in data whose last two bytes are not its CRC, -1 if none."""
    count = len(data) // size
    if count >= LANES_FROM:
        ends = data[size - 2 :: size], data[size - 1 :: size]
        lanes = crc16_lanes(data, size)
        if lanes == (ends if order == "little" else ends[::-1]):
            return -1
    for i in range(count):
        frame = data[i * size : (i + 1) * size]
        if crc16(frame[:-2]).to_bytes(2, order) != frame[-2:]:  # type: ignore[arg-type]
            return i
    return -1


# ---------------------------------------------------------------------------------------------------------- cipher
#
# A packet of n blocks is n 4 x 4 matrices. Transposed to (row, column, block) every step takes the whole packet at
# once: ShiftRows is slicing, SubBytes with the factors of MixColumns is bytes.translate, sums are xor of big integers.


def _times(factor: int, table: bytes) -> bytes:
    """Each byte of table times factor in GF(2^8)."""

    def product(a: int, b: int) -> int:
        result = 0
        while b:
            result ^= a if b & 1 else 0
            a, b = a << 1 ^ (0x11B if a & 0x80 else 0), b >> 1
        return result

    return bytes(product(value, factor) for value in table)


def _sbox() -> bytes:
    """FIPS 197, 5.1.1: the inverse in GF(2^8), then an affine map. p runs through the powers of 3, q is its inverse."""
    box, p, q = bytearray([0x63]) * 256, 1, 1
    while True:
        p ^= (p << 1 ^ (0x11B if p & 0x80 else 0)) & 0xFF
        for shift in 1, 2, 4:
            q ^= q << shift & 0xFF
        q ^= 0x09 if q & 0x80 else 0
        for turn in range(5):
            box[p] ^= (q << turn | q >> 8 - turn) & 0xFF
        if p == 1:
            return bytes(box)


SBOX = _sbox()
INVERSE_SBOX = bytes(SBOX.index(value) for value in range(256))
# A direction of the cipher: SubBytes fused with each factor of a row of MixColumns, SubBytes alone, turns of ShiftRows.
Direction = collections.namedtuple("Direction", "mixed plain turns")
ENCRYPT = Direction([_times(factor, SBOX) for factor in (2, 3, 1, 1)], SBOX, (0, 1, 2, 3))
DECRYPT = Direction([_times(factor, INVERSE_SBOX) for factor in (14, 11, 13, 9)], INVERSE_SBOX, (0, 3, 2, 1))
KEY = b"\xff" * 16  # every device and the portal use it
CHUNK = 64 * 16  # bytes at a time, so that the keys cached by size stay small: sizes come from the network


def _expanded(key: bytes) -> list[bytes]:
    """The eleven round keys of FIPS 197, 5.2."""
    words, factor = [key[i : i + 4] for i in range(0, 16, 4)], 1
    while len(words) < 44:
        word = words[-1]
        if len(words) % 4 == 0:
            word = (word[1:] + word[:1]).translate(SBOX)
            word = bytes([word[0] ^ factor]) + word[1:]
            factor = factor << 1 ^ (0x11B if factor & 0x80 else 0)
        words.append(bytes(a ^ b for a, b in zip(words[-4], word)))
    return [b"".join(words[i : i + 4]) for i in range(0, 44, 4)]


def _unmixed(key: bytes) -> bytes:
    """A round key as the equivalent inverse cipher wants it (FIPS 197, 5.3.5): through InvMixColumns."""
    mixed = bytearray(16)
    for i in range(16):
        for j in range(4):
            mixed[i] ^= DECRYPT.mixed[j][SBOX[key[i & 12 | (i + j) & 3]]]  # SBOX undoes the substitution in the table
    return bytes(mixed)


@functools.lru_cache(maxsize=32)
def _round_keys(key: bytes, blocks: int, decrypting: bool) -> list[int]:
    keys = _expanded(key)
    if decrypting:
        keys = [keys[10], *map(_unmixed, keys[9:0:-1]), keys[0]]
    return [_int(b"".join(bytes([k[4 * column + row]]) * blocks for row in range(4) for column in range(4))) for k in keys]


def _rounds(data: bytes, direction: Direction, key: bytes) -> bytes:
    """Every block of data through the cipher, for itself."""
    size = len(data)
    row, blocks = size // 4, size // 16
    first, *middle, last = _round_keys(key, blocks, direction is DECRYPT)
    cuts = [(r * row, r * row + turn * blocks, (r + 1) * row) for r, turn in enumerate(direction.turns)]
    own, next_row, third, fourth = direction.mixed  # what a byte is multiplied by for its own row, and for those above
    state = (_int(memoryview(data).cast("B", (blocks, 4, 4)).tobytes("F")) ^ first).to_bytes(size, "little")
    for round_key in middle:
        state = b"".join([part for start, cut, end in cuts for part in (state[cut:end], state[start:cut])])
        b, c, d = state.translate(next_row), state.translate(third), state.translate(fourth)
        mixed = _int(b[row:] + b[:row]) ^ _int(c[2 * row :] + c[: 2 * row]) ^ _int(d[3 * row :] + d[: 3 * row])
        state = (_int(state.translate(own)) ^ mixed ^ round_key).to_bytes(size, "little")
    state = b"".join([part for start, cut, end in cuts for part in (state[cut:end], state[start:cut])])
    state = (_int(state.translate(direction.plain)) ^ last).to_bytes(size, "little")
    return memoryview(state).cast("B", (4, 4, blocks)).tobytes("F")


def encrypt(data: bytes, iv: bytes, key: bytes = KEY) -> bytes:
    """AES-128-CBC of data, a multiple of 16 bytes, without padding; block after block, as each needs the one before."""
    blocks = [iv]
    for i in range(0, len(data), 16):
        blocks.append(_rounds((_int(blocks[-1]) ^ _int(data[i : i + 16])).to_bytes(16, "little"), ENCRYPT, key))
    return b"".join(blocks[1:])


def decrypt(data: bytes, iv: bytes, key: bytes = KEY) -> bytes:
    """The clear text of AES-128-CBC data, a multiple of 16 bytes."""
    clear = b"".join(_rounds(data[i : i + CHUNK], DECRYPT, key) for i in range(0, len(data), CHUNK))
    return (_int(clear) ^ _int((iv + data)[: len(data)])).to_bytes(len(data), "little")


# The portal answers thousands of packets of a second with the same IV and the same clear text.
encrypt_block = functools.lru_cache(maxsize=64)(encrypt)
decrypt_block = functools.lru_cache(maxsize=64)(decrypt)

# ---------------------------------------------------------------------------------------------------------- frames


class Wire:
    """One direction on the wire. head: bytes that name a frame's type and serial; cap: of the length field; order: of the
    CRC's bytes; patience: s for a frame to become whole; beat: bytes that may stand between frames.
    """

    def __init__(self, name: str, prefix: bytes, head: int, cap: int, order: str, patience: float, beat: bytes) -> None:
        self.name, self.prefix, self.head, self.cap = name, prefix, head, cap
        self.order, self.patience, self.beat = order, patience, beat


OUTBOUND = Wire("outbound", b"POSTGW", 30, 64 << 10, "big", 30, b"")
INBOUND = Wire("inbound", b"GW", 24, 4 << 10, "little", 5, b"\x01\x02")

# What a stream is made of. kind: "frame" (good CRC; frames of one size and head), "malformed" (bad CRC, or given up),
# "junk" or "keepalive"; count: how many packets it is, 0 if it goes on with the piece before it; size: of each part of
# data that can stand for itself.
Piece = collections.namedtuple("Piece", "kind data count size")


class Framer:
    """Cuts a stream into pieces, whatever the cut of its reads: `b"".join(p.data for p in pieces)` is the stream.

    After a bad frame the search goes on right behind its prefix. `rest` is what is not decided yet: an unfinished frame,
    or a few bytes that may become one; `since` is when it began.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.rest = bytearray()
        self.since = 0.0
        self._marks: list[tuple[int, float]] = []  # places in rest and when their bytes came, a second apart or more
        self._need = 0  # length of rest at which looking again can tell anything new
        self._ahead = 64  # frames to check at once: doubled by good ones, so that little is checked in vain
        self._budget = 0  # bytes of CRC that may still be spent on bad frames
        self._claimed = 0  # of the buffer: end of the bad frames found in it
        self._bad = 0  # bad frames that no piece has counted yet
        self._junk = False  # the last piece was junk: more of it is no new packet
        self._boundary = True  # at the start, or behind a frame or a keep-alive: where a keep-alive may stand

    def feed(self, data: bytes, now: float) -> list[Piece]:
        """The pieces that data completes, in order."""
        # a byte is checked once by the frame that holds it, unasked; the rest is for frames claimed inside bad ones
        self._budget = min(self._budget + (CRC_BUDGET - 1) * len(data), CRC_CREDIT)
        if not self.rest:
            self.since = now
            return self._scan(data, now)
        if not self._marks or now - self._marks[-1][1] >= 1:
            self._marks.append((len(self.rest), now))
        self.rest += data
        return self._scan(bytes(self.rest), now) if len(self.rest) >= self._need else []

    def expire(self, now: float) -> list[Piece]:
        """The pieces of an unfinished frame that is given up; due when `since` is `wire.patience` seconds ago."""
        return self._scan(bytes(self.rest), now, give_up=True) if self.rest else []

    def close(self, now: float) -> list[Piece]:
        """The pieces of what is left when the stream has ended."""
        pieces: list[Piece] = []
        while self.rest:
            pieces += self.expire(now)
        return pieces

    def _scan(self, buf: bytes, now: float, give_up: bool = False) -> list[Piece]:
        pieces: list[Piece] = []
        start = pos = 0  # from start to pos: neither frame nor keep-alive
        while True:
            if start == pos and self._boundary and self.wire.beat:
                start = pos = self._keepalives(buf, pos, pieces)
                if buf[pos:] == self.wire.beat[:1] and not give_up:
                    break
            pos, size = self._find(buf, pos)
            if pos == len(buf):
                break
            runs: list[tuple[int, int, int]] = []
            if not 0 < size <= len(buf) - pos:
                if not give_up:
                    break
                bad, give_up = True, False  # one at a time: what it hid may be still on its way
            elif pos < self._claimed and self._budget < size:
                pos = min(self._claimed, len(buf))
                continue
            else:
                runs, bad = self._good(buf, pos)
            if runs:
                self._skip(buf, start, pos, pieces)
                pieces += [Piece("frame", buf[at : at + size * count], count, size) for at, size, count in runs]
                at, size, count = runs[-1]
                start = pos = at + size * count
                self._boundary, self._junk, self._claimed = True, False, 0
            if bad:
                if pos >= self._claimed:
                    self._skip(buf, start, pos, pieces)
                    start = pos
                size = self._size(buf, pos)
                if size:
                    self._bad += 1
                    self._claimed = max(self._claimed, pos + size)
                pos = min(pos + len(self.wire.prefix), len(buf))
        self._skip(buf, start, pos, pieces)
        self._keep(buf, pos, now)
        return pieces

    def _keep(self, buf: bytes, pos: int, now: float) -> None:
        """Keep the bytes from pos for later."""
        self.since = next((when for place, when in reversed(self._marks) if place <= pos), self.since if self.rest else now)
        self._marks = [(place - pos, when) for place, when in self._marks if place > pos]
        self._claimed = max(self._claimed - pos, 0)
        size = self._size(buf, pos)
        self.rest = bytearray(buf[pos:])
        self._need = size or len(self.rest) + 1

    def _size(self, buf: bytes, pos: int) -> int:
        """The size that a frame at pos claims, 0 if there is no whole header at pos or it claims too much."""
        end = pos + len(self.wire.prefix) + 4
        if end > len(buf) or not buf.startswith(self.wire.prefix, pos):
            return 0
        length = int.from_bytes(buf[end - 4 : end], "big")
        return end - pos + length + 3 if length <= self.wire.cap else 0  # the field is one short, and the CRC

    def _find(self, buf: bytes, pos: int) -> tuple[int, int]:
        """Where a frame may begin from pos on, and the size it claims: 0 while its header is not whole."""
        prefix = self.wire.prefix
        while True:
            at = buf.find(prefix, pos)
            if at < 0:
                ends = (k for k in range(len(prefix) - 1, 0, -1) if buf.endswith(prefix[:k], pos))
                return len(buf) - next(ends, 0), 0
            size = self._size(buf, at)
            if size or at + len(prefix) + 4 > len(buf):
                return at, size
            pos = at + len(prefix)

    def _good(self, buf: bytes, pos: int) -> tuple[list[tuple[int, int, int]], bool]:
        """Runs (start, size, count) of whole frames from pos on with a good CRC; whether one with a bad CRC follows."""
        runs, left = [], self._ahead
        while left:
            start, size = pos, self._size(buf, pos)
            if not size or start + size > len(buf):
                break
            head, count, pos = buf[pos : pos + min(self.wire.head, size)], 1, pos + size
            while count < left and buf.startswith(head, pos) and pos + size <= len(buf):
                count, pos = count + 1, pos + size
            runs.append((start, size, count))
            left -= count
        end = self._first_bad(buf, runs)
        self._ahead = 1 if end < pos else min(2 * self._ahead, 4096)
        self._budget -= pos - end
        if end == pos:
            return runs, False
        return [(at, size, min(count, (end - at) // size)) for at, size, count in runs if at < end], True

    def _first_bad(self, buf: bytes, runs: list[tuple[int, int, int]]) -> int:
        """Where the first frame with a bad CRC begins, the end of the runs if there is none."""
        sizes: dict[int, list[tuple[int, int]]] = {}
        for at, size, count in runs:
            sizes.setdefault(size, []).append((at, count))
        end = runs[-1][0] + runs[-1][1] * runs[-1][2]
        for size, members in sizes.items():
            index = first_bad(b"".join([buf[at : at + size * count] for at, count in members]), size, self.wire.order)
            for at, count in members if index >= 0 else ():
                if index < count:
                    end = min(end, at + size * index)
                    break
                index -= count
        return end

    def _keepalives(self, buf: bytes, pos: int, pieces: list[Piece]) -> int:
        """Take the keep-alives at pos; where they end."""
        start, beat = pos, self.wire.beat
        while buf.startswith(beat, pos):
            pos += len(beat)
        if pos > start:
            pieces.append(Piece("keepalive", buf[start:pos], (pos - start) // len(beat), len(beat)))
            self._junk = False
        return pos

    def _skip(self, buf: bytes, start: int, end: int, pieces: list[Piece]) -> None:
        """Take the bytes from start to end as malformed where bad frames claimed them, and as junk behind that."""
        edge = min(max(self._claimed, start), end)
        if edge > start:
            pieces.append(Piece("malformed", buf[start:edge], self._bad, edge - start))
            self._bad, self._junk, self._boundary = 0, False, False
        if end > edge:
            pieces.append(Piece("junk", buf[edge:end], 0 if self._junk else 1, end - edge))
            self._junk, self._boundary = True, False


# --------------------------------------------------------------------------------------------------------- packets

SETTINGS, LIVE, BUFFERED, CONFIRMATION = 0x03, 0x04, 0x45, 0x10  # functions
FUNCTIONS = frozenset((SETTINGS, LIVE, BUFFERED, CONFIRMATION))
DATA = (SETTINGS, LIVE, BUFFERED)  # self-describing registers in a long envelope; the portal answers them
GRID_TIED, HYBRID_CLASS, METER = 1, 2, 3  # classes
CLOCK = {METER: 0x1216, GRID_TIED: 0x9D79, HYBRID_CLASS: 0xB090}  # first of the clock's three registers
CLOCK_TYPE = "0116"
TYPES = {f"{cls:02x}{function:02x}" for cls in (1, 2, 3) for function in FUNCTIONS} | {CLOCK_TYPE}

# Where the parts of an envelope begin; a time stands in the long one alone.
Form = collections.namedtuple("Form", "serial iv time cipher")
LONG, SHORT, ANSWER = Form(14, 30, 46, 52), Form(12, 28, None, 44), Form(8, 24, None, 40)

# What a frame is and whose: type is four hex digits, cls and function are its two bytes, owner is (kind of device, serial).
Address = collections.namedtuple("Address", "type cls function serial form owner")


def _form(function: int, size: int) -> Form | None:
    if function in DATA:
        return LONG
    body = size - 14  # from offset 12 to the CRC
    return SHORT if function == CONFIRMATION or body % 16 == 0 else LONG if body % 16 == 40 % 16 else None


@functools.lru_cache(maxsize=1024)
def address(head: bytes, size: int, wire: Wire) -> Address:
    """The address of a frame from its first wire.head bytes (of a shorter frame more: it is refused by its size).

    Raises ProtocolError for a bad envelope or serial number.
    """
    at = 10 if wire is OUTBOUND else 6
    if size < at + 4:
        raise ProtocolError("too short for a type", head)
    cls, function = head[at], head[at + 1]
    form = ANSWER if wire is INBOUND else _form(function, size)
    if form is None or size - 2 - form.cipher < 16 or (size - 2 - form.cipher) % 16:
        raise ProtocolError("the envelope does not fit the length", head)
    serial = head[form.serial : form.serial + 16]
    if not all(0x20 <= byte < 0x7F for byte in serial):
        raise ProtocolError("a serial number that is not printable ASCII", head)
    text = serial.decode("ascii")
    return Address(f"{cls:02x}{function:02x}", cls, function, text, form, (kind_of(cls), text))


def kind_of(cls: int) -> str:
    """The label `device` of a class."""
    return "meter" if cls == METER else "inverter"


# A packet is a frame in clear; mark is what stands between function and serial number of a long envelope.
Packet = collections.namedtuple("Packet", "wire type serial iv time clear mark", defaults=(b"\0\0",))


def decode(frame: bytes, wire: Wire) -> Packet:
    """The packet in a frame whose CRC is good. Raises ProtocolError; the inverse of `encode`."""
    where = address(frame[: wire.head], len(frame), wire)
    form, iv = where.form, frame[where.form.iv : where.form.iv + 16]
    clear = (decrypt_block if wire is INBOUND else decrypt)(frame[form.cipher : -2], iv)
    device_time = frame[form.time : form.time + 6] if form.time else b""
    return Packet(wire, where.type, where.serial, iv, device_time, clear, frame[12:14] if form is LONG else b"")


def encode(packet: Packet) -> bytes:
    """The frame of a packet: its envelope is long if it has a time. Clear text is a multiple of 16 bytes."""
    wire = packet.wire
    cipher = (encrypt_block if len(packet.clear) == 16 else encrypt)(packet.clear, packet.iv)
    mark = packet.mark if packet.time else b""
    body = bytes.fromhex(packet.type) + mark + packet.serial.encode("ascii") + packet.iv + packet.time + cipher
    frame = wire.prefix + (len(body) - 1).to_bytes(4, "big") + body  # one short; the CRC is not in it
    return frame + crc16(frame).to_bytes(2, wire.order)


def device_iv(stamp: bytes) -> bytes:
    """A device's IV: the packet's time, then zeros."""
    return stamp + bytes(10)


def blocks(clear: bytes) -> list[tuple[int, tuple[int, ...]]]:
    """The register ranges of a data payload: (first register, words). Raises ProtocolError unless it parses to its end."""
    found, pos = [], 1
    try:
        for _ in range(clear[0]):
            first, last = struct.unpack_from(">HH", clear, pos)
            if last < first:
                raise ProtocolError("a block's last register is before its first", clear)
            words = struct.unpack_from(f">{last - first + 1}H", clear, pos + 4)
            found.append((first, words))
            pos += 4 + 2 * len(words)
    except (struct.error, IndexError):
        raise ProtocolError("a block runs past the end", clear) from None
    if len(clear) - pos > 15 or clear[pos:].strip(b"\xff"):
        raise ProtocolError("padding that is not FF", clear)
    return found


def payload(ranges: list[tuple[int, tuple[int, ...]]]) -> bytes:
    """The clear text of register ranges, the inverse of `blocks`."""
    clear = bytes([len(ranges)])
    for first, words in ranges:
        clear += struct.pack(f">HH{len(words)}H", first, first + len(words) - 1, *words)
    return clear + b"\xff" * (-len(clear) % 16)


def registers(clear: bytes) -> dict[int, int]:
    """Register to word of a data payload; of a register given twice the later word. Raises ProtocolError."""
    found: dict[int, int] = {}
    for first, words in blocks(clear):
        found.update(zip(range(first, first + len(words)), words))
    return found


# -------------------------------------------------------------------------------------------------------- readings


def label_text(text: bytes | str) -> str:
    """A device's text for a label: ASCII 20 to 7E, blanks collapsed, at most 64 characters."""
    text = text.decode("latin-1") if isinstance(text, bytes) else text
    return " ".join("".join(c if "\x20" <= c < "\x7f" else " " for c in text).split())[:64].rstrip()


def label(name: str, value: str) -> str:
    """name="value" as the exposition format wants it."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'{name}="{escaped}"'


# values: (metric, labels) to number; not_finite: how many were no number; unknown: register to word; info: name to text
Reading = collections.namedtuple("Reading", "values not_finite unknown info")


def family(cls: int, serial: str) -> str:
    """The register family of a device's class and serial number."""
    if cls == METER:
        return "HK3000" if serial[1:5] == "3000" else "HK1000"
    return "HYBRID" if cls == HYBRID_CLASS else "GRID"  # so a class that nobody has seen too


def reading(name: str, words: dict[int, int]) -> Reading:
    """What the registers of a device of the family `name` mean."""
    values, not_finite, known = {}, 0, KNOWN[name]
    for register, later, missing, read, multiply, divide, series, counter, when in VALUES[name]:
        raw = words.get(register)
        for low in later:
            raw = raw << 16 | words[low] if raw is not None and low in words else None
        number = None if raw is None or raw == missing or when and words.get(when[0]) != when[1] else read(raw)
        if number is None:
            continue
        if number < 0 and counter or not math.isfinite(number):
            not_finite += 1
        else:
            values[series] = number * multiply if divide == 1 else number / divide
    unknown = [(register, word) for register, word in words.items() if register not in known and word not in (0, 0xFFFF)]
    return Reading(values, not_finite, dict(sorted(unknown)), info(words))


def info(words: dict[int, int]) -> dict[str, str]:
    """The texts of INFO that the registers hold, without the empty ones."""
    found = {}
    for name, ranges in INFO.items():
        text = " ".join(filter(None, (_text(words, first, last) for first, last in ranges)))
        port, comma, host = text.partition(",")  # HomeKit: port,host
        text = f"{host}:{port}" if name == "portal" and comma and port.isdigit() else text
        if text:
            found[name] = text
    return found


def _text(words: dict[int, int], first: int, last: int) -> str:
    if any(register not in words for register in range(first, last + 1)):
        return ""
    return label_text(struct.pack(f">{last - first + 1}H", *(words[register] for register in range(first, last + 1))))


# ---------------------------------------------------------------------------------------------- identity and time


FIXED_MODELS = {"91000HKU": "HomeKit 1000 Smart Meter", "53000DSC": "GW3000-DNS-30"}  # the original exporter's names


def model(serial: str, told: str = "") -> str:
    """The model of a serial number; told is the name that the device itself gave, if it has."""
    rating, kind = serial[1:5], serial[5:8]
    known = FIXED_MODELS.get(serial[:8]) or told
    if known:
        return known
    if kind == "HKU" and rating in ("1000", "3000"):
        return f"HomeKit {rating} Smart Meter"
    kilo = rating[3] == "K"
    size = int(rating[:3] if kilo else rating) if rating[: 3 if kilo else 4].isdigit() else 0
    return label_text(f"GoodWe {kind} {size} {'kW' if kilo else 'W'}" if size else f"GoodWe {kind}")


def identity(kind: str, serial: str, told: str = "") -> tuple[str, str, str]:
    """What tells a device's series from those of others: the values of device, model and serial."""
    return kind, model(serial, told), label_text(serial[-8:])


def device_labels(name: tuple[str, str, str]) -> str:
    """An identity as labels."""
    return ",".join(map(label, ("device", "model", "serial"), name))


@functools.lru_cache(maxsize=1024)
def device_time(stamp: bytes) -> datetime | None:
    """The calendar date of six bytes YY MM DD hh mm ss, in the device's local time; None if it is none."""
    try:
        return datetime(2000 + stamp[0], *stamp[1:6])
    except (ValueError, IndexError, TypeError):
        return None


def time_stamp(when: datetime) -> bytes:
    """The six bytes of a time, the inverse of `device_time`."""
    return bytes([when.year % 100, when.month, when.day, when.hour, when.minute, when.second])


def bat(when: datetime) -> tuple[float, float]:
    """Top and bottom of the bat at a time of day, in kW."""
    x = when.hour + when.minute / 60 - 12
    a, root = abs(x), math.sqrt
    wing = 3 * root(1 - (x / 7) ** 2) if a < 7 else 0.0
    if a <= 0.5:
        top = 2.25
    elif a <= 0.75:
        top = 3 * a + 0.75
    elif a <= 1:
        top = 9 - 8 * a
    elif a <= 3:
        top = 6 * root(10) / 7 + 1.5 - 0.5 * a - 3 * root(10) / 7 * root(4 - (a - 1) ** 2)
    else:
        top = wing
    if a <= 4:
        return top, a / 2 - (3 * root(33) - 7) / 112 * x**2 - 3 + root(1 - (abs(a - 2) - 1) ** 2)
    return top, -wing


EXPORT, GENERATION = 2105, 2107  # registers of a HomeKit 1000, s32


def with_bat(frame: bytes) -> bytes | None:
    """A HomeKit 1000's frame with the bat in place of generation and export, at its own time; None if it cannot be.

    Of a register given twice the later one counts, so every place that holds one is drawn over.
    """
    packet = decode(frame, OUTBOUND)
    when = device_time(packet.time)
    if when is None:
        return None
    top, bottom = bat(when)
    drawn = {}
    for register, kilowatts in ((GENERATION, top), (EXPORT, bottom)):
        high, low = struct.unpack(">HH", struct.pack(">i", int(1000 * kilowatts)))
        drawn.update({register: high, register + 1: low})
    try:
        ranges = blocks(packet.clear)
    except ProtocolError:
        return None
    clear = payload([(first, tuple(drawn.get(first + i, word) for i, word in enumerate(words))) for first, words in ranges])
    return encode(packet._replace(clear=clear))


# --------------------------------------------------------------------------------------------------------- metrics

log = logging.getLogger("sems_mitm")


class Troubles:
    """What goes wrong again and again as one log line a minute for each kind, with a count of those left out."""

    def __init__(self) -> None:
        self.suppressed = 0
        self._kinds: dict[str, list[float]] = {}  # kind to [when it may be said again, how often it was not]

    def say(self, kind: str, text: str, now: float, period: float = PERIOD, level: int = logging.WARNING) -> None:
        """Log text unless this kind (one of a few fixed words) was logged within the period."""
        last = self._kinds.setdefault(kind, [-math.inf, 0])
        if now < last[0]:
            last[1] += 1
            self.suppressed += 1
            return
        log.log(level, "%s%s", text, f" (and {last[1]:.0f} more like it)" if last[1] else "")
        last[:] = [now + period, 0]


PACKET_COUNTERS = {  # by function, for a kind of device; the original's names, one for the confirmations of all
    SETTINGS: "{}_time_sync_packets_total",
    LIVE: "{}_metrics_packets_total",
    BUFFERED: "{}_metrics_packets_total",
    CONFIRMATION: "meter_time_sync_ack_packets_total",
}


class Device:
    """What is known of one device. Times are monotonic but for `newest` and `offset`, which are of its own clock."""

    __slots__ = (
        "kind", "serial", "told", "name", "labels", "info", "counts", "gauges", "counters", "unknown", "good", "fresh", "newest", "offset",
        "day", "hidden", "version", "page", "_older", "_below",
    )  # fmt: skip

    def __init__(self, kind: str, serial: str, now: float) -> None:
        self.kind, self.serial = kind, serial
        self.is_told("")
        self.info = {"firmware": "", "module_firmware": "", "portal": ""}
        names = [name.format(kind) for name in PACKET_COUNTERS.values()]
        self.counts = dict.fromkeys([*names, "sems_mitm_acks_total", "sems_mitm_nacks_total", "sems_mitm_buffered_packets_total"], 0)
        self.gauges: dict[tuple[str, str], float] = {}
        self.counters: dict[tuple[str, str], float] = {}
        self.unknown: dict[int, int] = {}
        self.good = now  # when the last good frame came
        self.fresh = -math.inf  # when the last live packet came that counted as new
        self.newest = b""  # its time, six bytes
        self.offset: float | None = None
        self.day: tuple[datetime, dict[tuple[str, str], float]] | None = None  # today's first reading
        self.hidden = False  # another device has its labels
        self.version = 0  # rises with every change, so that an unchanged device is not rendered again
        self.page: tuple[tuple[int, bool], dict[str, str]] = ((-1, False), {})
        self._older = (b"", 0)  # the row of packets older than newest: the time of its last, its length
        self._below: dict[tuple[str, str], tuple[float, int]] = {}  # the row of a counter's values below the held one

    def is_told(self, model_name: str) -> None:
        """The device gave its model name; name tells its series from those of others, labels is that as text."""
        self.told = model_name
        self.name = identity(self.kind, self.serial, model_name)
        self.labels = device_labels(self.name)

    def new_ones(self, stamps: list[bytes]) -> list[int]:
        """Which of live packets, by their times in the order of arrival, count as new.

        One is that is not older than the newest, or the third older one in a row, rising. As the bytes of times compare, so
        do the times. What is no calendar date is new and takes no part.
        """
        found, newest, last, row = [], self.newest, *self._older
        for i, stamp in enumerate(stamps):
            if device_time(stamp):
                if stamp < newest:
                    row = row + 1 if stamp > last and row else 1
                    last = stamp
                    if row < DECODED:
                        continue
                newest, row = stamp, 0
            found.append(i)
        self.newest, self._older = newest, (last, row)
        return found

    def take(self, found: Reading, when: datetime | None, now: float, local: datetime) -> dict[str, int]:
        """Take a new live reading; how many of its values were rejected, by reason. `local` is this machine's time."""
        rejected = {"not_finite": found.not_finite, "dip": 0}
        self.fresh, self.unknown = now, dict(itertools.islice(found.unknown.items(), UNKNOWN_REGISTERS))
        self.gauges = {series: number for series, number in found.values.items() if not series[0].endswith("_total")}
        below: dict[tuple[str, str], tuple[float, int]] = {}
        for series, number in found.values.items():
            if series not in self.gauges and not self._rises(series, number, below):
                rejected["dip"] += 1
        self._below = below
        if when is not None:
            self.offset = (when - local).total_seconds()
        if self.day is None or self.day[0].date() != local.date():
            self.day = (local, {series: number for series, number in self.counters.items() if not series[1]})
        return rejected

    def _rises(self, series: tuple[str, str], number: float, below: dict[tuple[str, str], tuple[float, int]]) -> bool:
        """Take a counter's value unless it is a dip: the third in a row below the held one, none falling, is a new start."""
        if number < self.counters.get(series, number):
            last, row = self._below.get(series, (number, 0))
            row = row + 1 if number >= last else 1
            if row < DECODED:
                below[series] = (number, row)
                return False
        self.counters[series] = number
        return True

    def samples(self, stale: bool) -> list[tuple[str, str, float]]:
        """(metric, labels beside the three, number) of everything that does not change by itself."""
        found: list[tuple[str, str, float]] = [(name, "", number) for name, number in self.counts.items()]
        found += [(metric, labels, number) for (metric, labels), number in self.counters.items()]
        texts = {"full_serial": label_text(self.serial), **self.info}
        found.append(("sems_mitm_device_info", ",".join(label(name, text) for name, text in texts.items()), 1))
        if not stale:
            found += [(metric, labels, number) for (metric, labels), number in self.gauges.items()]
            found += [(f"{self.kind}_unknown_register", f'register="{register}"', word) for register, word in self.unknown.items()]
            if self.offset is not None:
                found.append(("sems_mitm_device_clock_offset_seconds", "", self.offset))
        return found


def page(labels: str, samples: list[tuple[str, str, float]]) -> dict[str, str]:
    """Metric name to its lines, for samples that share labels."""
    lines: dict[str, str] = {}
    for metric, more, number in samples:
        both = f"{labels},{more}" if labels and more else labels or more
        lines[metric] = f"{lines.get(metric, '')}{metric}{{{both}}} {number}\n" if both else f"{metric} {number}\n"
    return lines


def exposition(pages: list[dict[str, str]]) -> Iterator[str]:
    """Text format 0.0.4 of pages, a family at a time, sorted, each with its HELP and TYPE once."""
    for name in sorted(set().union(*pages)):
        kind, help_text = METRICS[name]
        yield f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
        parts = [lines[name] for lines in pages if name in lines]
        for at in range(0, len(parts), 64):  # a family of hundreds of devices is megabytes
            yield "".join(parts[at : at + 64])


PACKET_LABELS = ("direction", "type", "verdict")
LAST_PACKET = "sems_mitm_device_last_packet_timestamp_seconds"
LABELLED = TYPES | {"malformed", "keepalive", "junk"}


class Store:
    """All that the exporter shows. The packet thread writes and HTTP threads read, each under `lock`."""

    def __init__(self, stale_after: float = 300, max_devices: int = 256, batsignal: bool = False) -> None:
        self.lock = threading.RLock()
        self.stale_after, self.max_devices, self.batsignal = stale_after, max_devices, batsignal
        self.devices: dict[tuple[str, str], Device] = {}
        self.names: dict[tuple[str, str, str], Device] = {}
        self.totals = {(name, label(key, value) if key else ""): 0 for name, key, values in FIXED for value in values}
        self.packets: dict[tuple[str, str, str], int] = collections.defaultdict(int)
        self.gauges: dict[str, Callable[[], float | None]] = {}  # asked at the scrape; None is absent
        self.troubles = Troubles()
        self.started = time.time()
        self._types = set(LABELLED)  # that have a label of their own

    def add(self, name: str, count: int = 1, labels: str = "") -> None:
        """Add to a counter of FIXED."""
        self.totals[name, labels] += count

    def count(self, wire: Wire, kind: str, verdict: str, count: int) -> None:
        """Count packets whose fate is decided; kind is a type, malformed, keepalive or junk."""
        if kind not in self._types:
            if len(self._types) < len(LABELLED) + OTHER_TYPES:
                self._types.add(kind)
            else:
                kind = "other"
        self.packets[wire.name, kind, verdict] += count

    def device(self, where: Address, now: float) -> Device | None:
        """The device of an address, met anew or again; None if it gets no series."""
        device = self.devices.get(where.owner)
        if device is None:
            device = self._meet(Device(where.owner[0], where.owner[1], now), now)
        elif device.hidden:
            self._name(device, now)
        return None if device is None or device.hidden else device

    def _meet(self, device: Device, now: float) -> Device | None:
        if device.name in self.names:
            self._name(device, now)
            return None
        if len(self.devices) >= self.max_devices:
            silent = min(self.devices.values(), key=lambda other: other.good)
            if not self.is_stale(silent.good, now):
                text = "more devices than --sems.max-devices=%d: %s is passed on without metrics"
                self.troubles.say("max-devices", text % (self.max_devices, device.serial), now)
                return None
            del self.devices[silent.kind, silent.serial]
            self._unname(silent)
        self.devices[device.kind, device.serial] = device
        self.names[device.name] = device
        log.info("new device: %s %s", device.name[1], device.serial)
        return device

    def _name(self, device: Device, now: float) -> None:
        """Give the device the series of its name, or none if another has them."""
        device.hidden = self.names.setdefault(device.name, device) is not device
        if device.hidden:
            text = "another device has the labels of %s, which gets no metrics: %s"
            self.troubles.say("same-name", text % (device.serial, " ".join(device.name)), now)

    def _unname(self, device: Device) -> None:
        if self.names.get(device.name) is device:
            del self.names[device.name]

    def is_stale(self, since: float, now: float) -> bool:
        """Whether what was last heard at `since` (monotonic) is too old to be shown."""
        return bool(self.stale_after) and now - since > self.stale_after

    def learn(self, device: Device, found: dict[str, str], now: float) -> None:
        """Remember what a device says of itself; all its series move when its model becomes known."""
        device.info.update((name, text) for name, text in found.items() if name in device.info)
        told = found.get("model", device.told)
        if told != device.told:
            self._unname(device)
            device.is_told(told)
            self._name(device, now)
        device.version += 1

    def live(self, device: Device, packet: Packet, words: dict[int, int], now: float, wall: float) -> None:
        """Take a live packet that counts as new."""
        when = device_time(packet.time)
        found = reading(family(int(packet.type[:2], 16), packet.serial), words)
        for reason, count in device.take(found, when, now, datetime.fromtimestamp(wall)).items():
            self.add("sems_mitm_rejected_values_total", count, label("reason", reason))
        self.learn(device, found.info, now)

    def collect(self, now: float, wall: float) -> list[dict[str, str]]:
        """Pages for `exposition`. Only what changed is copied under the lock, and nothing is rendered there."""
        changed, pages, ages = [], [], []
        with self.lock:
            for device in self.devices.values():
                if device.hidden:
                    continue
                key = (device.version, self.is_stale(device.fresh, now))
                if device.page[0] != key:
                    changed.append((device, key, device.labels, device.samples(key[1])))
                pages.append(device)
                ages.append((device.labels, device.good))
            totals: list[tuple[str, str, float]] = [(name, labels, number) for (name, labels), number in self.totals.items()]
            totals += [("sems_mitm_packets_total", ",".join(map(label, PACKET_LABELS, key)), count) for key, count in self.packets.items()]
            totals += [(name, "", number) for name, number in ((name, ask()) for name, ask in self.gauges.items()) if number is not None]
        for device, key, labels, samples in changed:
            device.page = (key, page(labels, samples))
        up = "".join(f"sems_mitm_device_up{{{labels}}} {int(not self.is_stale(good, now))}\n" for labels, good in ages)
        last = "".join(f"{LAST_PACKET}{{{labels}}} {wall - now + good:.3f}\n" for labels, good in ages)
        ages_page = {"sems_mitm_device_up": up, LAST_PACKET: last} if ages else {}
        return [page("", totals + self._process(wall)), ages_page, *(device.page[1] for device in pages)]

    def _process(self, wall: float) -> list[tuple[str, str, float]]:
        version = ",".join((label("version", VERSION), label("python", sys.version.split()[0])))
        found = [
            ("sems_mitm_build_info", version, 1),
            ("sems_mitm_stale_after_seconds", "", self.stale_after),
            ("sems_mitm_suppressed_log_lines_total", "", self.troubles.suppressed),
            ("process_cpu_seconds_total", "", time.process_time()),
            ("process_start_time_seconds", "", round(self.started, 2)),
        ]
        if self.batsignal:
            found += zip(("batsignal_top", "batsignal_bottom"), ("", ""), bat(datetime.fromtimestamp(wall)))
        return found + process_gauges()


def process_gauges() -> list[tuple[str, str, float]]:
    """Memory and file descriptors of this process, as far as the system tells (Linux: all)."""
    found: list[tuple[str, str, float]] = []
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        found.append(("process_resident_memory_bytes", "", int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")))
    with contextlib.suppress(OSError):
        found.append(("process_open_fds", "", len(os.listdir("/dev/fd")) - 1))  # less the one that lists them
    found.append(("process_max_fds", "", resource.getrlimit(resource.RLIMIT_NOFILE)[0]))
    return found


# ----------------------------------------------------------------------------------------------------------- rules

FORWARD, LOCAL, SPOOL = "forward", "local", "spool"  # modes


def allowed(where: Address, clear: bytes, classes: set[int]) -> str:
    """What a frame from the portal is if it may pass to a device that has sent these classes: ack, nack, clock or ""."""
    if where.cls in classes and where.function in DATA and len(clear) == 16 and not any(clear[1:]):
        return {0: "ack", 2: "nack"}.get(clear[0], "")
    first, last = clear[:2], clear[2:4]
    clocks = [CLOCK[cls].to_bytes(2, "big") + (CLOCK[cls] + 2).to_bytes(2, "big") for cls in classes if cls in CLOCK]
    if where.type == CLOCK_TYPE and len(clear) == 16 and first + last in clocks:
        return "clock" if device_time(clear[4:10]) and not any(clear[10:]) else ""
    return ""


def ack(packet_type: str, serial: str, stamp: bytes) -> bytes:
    """The portal's answer to a packet of this type; stamp is its own local time, six bytes, which it turns round."""
    return encode(Packet(INBOUND, packet_type, serial, device_iv(stamp[::-1]), b"", bytes(16)))


def clock_write(cls: int, serial: str, stamp: bytes) -> bytes:
    """The portal's setting of a device's clock to stamp."""
    clear = struct.pack(">HH6s6x", CLOCK[cls], CLOCK[cls] + 2, stamp)
    return encode(Packet(INBOUND, CLOCK_TYPE, serial, device_iv(stamp[::-1]), b"", clear))


def answer(where: Address, local: datetime, clock: bool) -> bytes:
    """What the exporter answers in the portal's place, nothing to most functions. clock: whether it may set clocks."""
    if where.function not in DATA:
        return b""
    stamp = time_stamp(local)
    # A hybrid's clock registers are inferred: none of them is written until they are confirmed.
    sets = clock and where.function == SETTINGS and where.cls in (METER, GRID_TIED)
    return ack(where.type, where.serial, stamp) + (clock_write(where.cls, where.serial, stamp) if sets else b"")


_NAME, _OFFSET = r"(?:[A-Za-z]{3,}|<[A-Za-z0-9+-]{3,}>)", r"[+-]?(?:[01]?[0-9]|2[0-4])(?::[0-5][0-9]){0,2}"
_DATE = r",(?:M(?:[1-9]|1[0-2])\.[1-5]\.[0-6]|J?[0-9]{1,3})(?:/[+-]?[0-9]{1,3}(?::[0-5][0-9]){0,2})?"
ZONE_RULE = re.compile(f"{_NAME}{_OFFSET}(?:{_NAME}(?:{_OFFSET})?(?:{_DATE}{_DATE})?)?")  # POSIX, 8.3
ZONE_DIRECTORIES = ("/usr/share/zoneinfo", "/usr/lib/zoneinfo", "/usr/share/lib/zoneinfo", "/etc/zoneinfo", "/var/db/timezone/zoneinfo")


def zone_is_known(zone: str | None, exists: Callable[[str], bool]) -> bool:
    """Whether the TZ variable is one that the system understands; the C library takes any other for UTC, in silence."""
    if zone is None or ZONE_RULE.fullmatch(zone):
        return True
    name = zone.lstrip(":")
    return bool(name) and any(exists(os.path.join(directory, name)) for directory in ZONE_DIRECTORIES)


class Entry:
    """Frames that wait in an outbox, or bytes that are none (whole is False); key: what answers each of the frames.

    They have one size, or else 0 and a size each: what comes in small pieces is merged, as an entry costs more than a frame.
    """

    __slots__ = ("data", "size", "key", "whole", "sizes")

    def __init__(self, data: bytes, size: int, key: tuple[str, str] | None = None, whole: bool = True) -> None:
        self.data, self.size, self.key, self.whole = data, size, key, whole
        self.sizes: list[int] = []

    def each(self) -> list[int]:
        """The size of each frame."""
        return [self.size] * (len(self.data) // self.size) if self.size else self.sizes

    def takes(self, other: Entry) -> bool:
        """Take another entry in if it is of the same kind and both are small."""
        if self.key != other.key or self.whole != other.whole or len(self.data) + len(other.data) > ENTRY:
            return False
        if self.whole and (self.size != other.size or not self.size):
            self.size, self.sizes = 0, self.each()
            self.sizes += other.each()
        self.data += other.data
        self.size = self.size if self.whole else len(self.data)
        return True

    def edge(self, offset: int) -> int:
        """Where the frame begins that holds the byte at offset."""
        if self.size:
            return offset // self.size * self.size
        edges = itertools.takewhile(lambda edge: edge <= offset, itertools.accumulate(self.sizes, initial=0))
        return max(edges)

    def split(self, edge: int) -> Entry:
        """Take the frames before an edge out of it."""
        front = Entry(self.data[:edge], self.size, self.key, self.whole)
        self.data = self.data[edge:]
        while not self.size and sum(front.sizes) < edge:
            front.sizes.append(self.sizes.pop(0))
        return front


class Pool:
    """The memory of what waits in all outboxes together; outward: the bytes of it that wait for the portal."""

    def __init__(self, limit: int = QUEUES) -> None:
        self.limit, self.size, self.outward = limit, 0, 0
        self.outboxes: set[Outbox] = set()

    def shed(self) -> int:
        """Drop the oldest frames of the longest outbox until all fit; how many."""
        dropped = 0
        while self.size > self.limit:
            part = min(self.size - self.limit, 64 << 10)  # then another may be the longest
            longest = sorted(self.outboxes, key=lambda outbox: -outbox.size)
            count = next(filter(None, (outbox.shed(max(outbox.size - part, 0)) for outbox in longest)), 0)
            if not count:
                break  # what is left is half sent
            dropped += count
        return dropped


class Outbox:
    """Bytes that wait for a peer, in order and by whole frames.

    `offset` is how much of the first unsent entry has been sent already; with none, how much of the unfinished frame
    that the framer still holds. Frames with a key stay, once sent, until they are answered: answers match by order.
    """

    def __init__(self, pool: Pool, to_portal: bool) -> None:
        self.pool, self.to_portal = pool, to_portal
        self.unsent: collections.deque[Entry] = collections.deque()
        self.offset = 0
        self.size = 0  # bytes in unsent and flying
        self.backlog = 0  # bytes in unsent
        self.flying: collections.OrderedDict[int, Entry] = collections.OrderedDict()  # sent, not answered, by number
        self.misplaced: dict[tuple[str, str], int] = {}  # answers owed to frames that were dropped after they were sent
        self._keys: dict[tuple[str, str], collections.deque[int]] = {}  # key to its numbers in flying
        self._number = 0
        pool.outboxes.add(self)

    def close(self) -> None:
        """Forget everything."""
        self._resize(-self.backlog, self.backlog - self.size, -len(self.unsent) - len(self.flying))
        self.unsent.clear()
        self.flying.clear()
        self.pool.outboxes.discard(self)

    @property
    def has_frames(self) -> bool:
        """Whether whole frames wait, or answers are awaited; junk alone need not outlive its device."""
        return bool(self.flying) or any(entry.whole for entry in self.unsent)

    def put(self, data: bytes, size: int, key: tuple[str, str] | None = None, whole: bool = True) -> bool:
        """Add frames of this size, or what is no whole frame; whether all of it was sent already, while it was unfinished."""
        if not key and not self.unsent and self.offset >= len(data):
            self.offset -= len(data)
            return True
        entry = Entry(data, size, key, whole)
        merged = bool(self.unsent) and self.unsent[-1].takes(entry)
        if not merged:
            self.unsent.append(entry)
        self._resize(len(data), 0, 0 if merged else 1)
        return False

    def ready(self, most: int = BACKLOG) -> bytes:
        """The next unsent bytes, `most` of them or an entry more."""
        parts, length = [], -self.offset
        for entry in self.unsent:
            parts.append(entry.data)
            length += len(entry.data)
            if length >= most:
                break
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return data[self.offset :] if self.offset else data

    def took(self, count: int) -> list[Entry]:
        """The peer took so many bytes; the entries that are sent by that."""
        unsent, offset, sent = self.unsent, self.offset + count, []
        before = offset
        while unsent and offset >= len(unsent[0].data):
            sent.append(unsent.popleft())
            offset -= len(sent[-1].data)
        edge = unsent[0].edge(offset) if unsent else 0
        if edge:  # what is sent of it goes, and may be answered
            sent.append(unsent[0].split(edge))
            offset -= edge
            self._resize(0, 0, 1)
        self.offset = offset
        self._resize(offset - before, 0, -len(sent))
        for entry in sent:
            if entry.key:
                self._fly(entry)
        return sent

    def _fly(self, entry: Entry) -> None:
        """Keep sent frames until they are answered."""
        assert entry.key
        merged = bool(self.flying) and next(reversed(self.flying.values())).takes(entry)
        if not merged:
            self._number += 1
            self.flying[self._number] = entry
            self._keys.setdefault(entry.key, collections.deque()).append(self._number)
        self._resize(0, len(entry.data), 0 if merged else 1)

    def answered(self, key: tuple[str, str]) -> bool:
        """An answer came: the oldest unanswered frame of this key is done. Whether there was one."""
        if key in self.misplaced:
            self.misplaced[key] -= 1
            if not self.misplaced[key]:
                del self.misplaced[key]
            return False
        if key not in self._keys:
            return False
        self._land(self._keys[key][0])
        return True

    def _land(self, number: int) -> tuple[str, str]:
        """Take the first frame of an entry, the oldest of its key, out of those in flight; the key."""
        entry = self.flying[number]
        assert entry.key
        answered = entry.split(entry.each()[0])
        if not entry.data:
            del self.flying[number]
            self._keys[entry.key].popleft()
            if not self._keys[entry.key]:
                del self._keys[entry.key]
        self._resize(0, -len(answered.data), 0 if entry.data else -1)
        return entry.key

    def lost(self) -> None:
        """The connection is gone: everything unanswered goes again, from a frame's first byte."""
        if self.unsent:
            self._resize(-len(self.unsent[0].split(self.unsent[0].edge(self.offset)).data))
        self.offset = 0
        flying = sum(len(entry.data) for entry in self.flying.values())
        self._resize(flying, -flying)
        self.unsent.extendleft(reversed(self.flying.values()))
        self.flying.clear()
        self._keys.clear()
        self.misplaced.clear()

    def start_whole(self) -> None:
        """Let what waits begin with a whole frame: what a new connection gets first."""
        while self.unsent and not self.unsent[0].whole:
            self._resize(-len(self.unsent.popleft().data), 0, -1)

    def shed(self, limit: int) -> int:
        """Drop the oldest whole frames until `limit` bytes are left, but none that is half sent; how many."""
        dropped = 0
        while self.size > limit and self.flying:
            key = self._land(next(iter(self.flying)))
            self.misplaced[key] = self.misplaced.get(key, 0) + 1
            dropped += 1
        kept: list[Entry] = []
        while self.size > limit and self.unsent:
            entry = self.unsent.popleft()
            if self.offset and not kept:  # half of its first frame is sent
                kept.append(entry.split(entry.each()[0]))
                self._resize(0, 0, 1)
            edges = list(itertools.accumulate(entry.each(), initial=0))
            count = min(bisect.bisect_left(edges, self.size - limit), len(edges) - 1)
            entry.split(edges[count])
            self._resize(-edges[count], 0, 0 if entry.data else -1)
            dropped += count
            if entry.data:
                kept.append(entry)
        self.unsent.extendleft(reversed(kept))
        return dropped

    def _resize(self, unsent: int, flying: int = 0, entries: int = 0) -> None:
        self.backlog += unsent
        self.size += unsent + flying
        self.pool.size += unsent + flying + ENTRY_COST * entries
        self.pool.outward += unsent + flying if self.to_portal else 0


# --------------------------------------------------------------------------------------------------------- session


class Exporter:
    """What all sessions share: the settings, the store, the queues' pool, and where frames are recorded."""

    def __init__(self, store: Store, mode: str = FORWARD, zone_ok: bool = True, record: Callable[..., None] | None = None) -> None:
        self.store, self.mode, self.zone_ok, self.record = store, mode, zone_ok, record
        self.pool = Pool()
        self.sessions: set[Session] = set()
        self.done: list[Session] = []  # whose connections the network is to close

    def clock_ok(self, now: float, wall: float) -> bool:
        """Whether this machine's clock is good enough to set a device's by it."""
        if wall >= RELEASED and self.zone_ok:
            return True
        why = "TZ is no time zone that this system knows" if wall >= RELEASED else "this machine's own clock is wrong"
        self.store.troubles.say("clock", f"the devices' clocks are not set: {why}", now, CLOCK_PERIOD)
        return False

    def adopt(self, heir: Session, serial: str) -> None:
        """Give the undelivered spool of a device that has gone to its new session, so that the order stays."""
        for session in self.sessions:
            if session is not heir and session.device_gone and session.serial == serial:
                session.spool_moves(heir)
                self.done.append(session)

    def is_echo(self, frame: bytes, asking: Session, now: float) -> bool:
        """Whether another session sent this frame to the portal just now: the portal's name leads back here."""
        mark = hash(frame)
        up = (session for session in self.sessions if session is not asking and session.portal_up and not session.device_ended)
        others = (session for session in up if session.attempted <= asking.accepted)  # what came earlier is no far end of ours
        return any(mark == sent and now - when <= LOOP_WINDOW for session in others for when, sent in session.remembered())


class Session:
    """One device's connection and the portal's for it: bytes in, bytes out, no socket.

    The network feeds `from_device` and `from_portal`, sends what `to_portal` and `to_device` hold, and calls `digest`
    when the bytes are on their way: what is decoded there is not in a packet's way.
    """

    def __init__(self, exporter: Exporter, peer: str, now: float) -> None:
        self.exporter, self.store, self.peer = exporter, exporter.store, peer
        self.accepted = now
        self.attempted = now  # when the portal's connection was last asked for
        self.outward, self.inward = Framer(OUTBOUND), Framer(INBOUND)
        self.to_portal, self.to_device = Outbox(exporter.pool, True), Outbox(exporter.pool, False)
        self.serial = ""  # of the first good frame
        self.classes: set[int] = set()  # that the device has sent
        self.portal_up = False
        self.away = False  # the last attempt to reach the portal failed, or its connection is gone
        self.device_ended = False  # the device sends no more
        self.device_gone = False  # and its socket is closed: only a spool goes on
        self.refused = False  # this connection is our own, come back
        self.opening: tuple[float, int] | None = None  # when the portal was sent its connection's first frame, and its hash
        self.echoes: collections.deque[tuple[float, int]] = collections.deque(maxlen=ECHOES)
        self._waiting: dict[tuple[Device, int], list[Piece]] = {}  # frames to be decoded, by function
        exporter.sessions.add(self)

    # Outward: device -> portal

    def from_device(self, data: bytes, now: float, wall: float) -> None:
        """Take bytes that the device has sent."""
        self.store.add("sems_mitm_bytes_total", len(data), 'direction="outbound"')
        for piece in self.outward.feed(data, now):
            self._outward(piece, now, wall)

    def _outward(self, piece: Piece, now: float, wall: float) -> None:
        """Decide what becomes of a piece from the device."""
        kind, data, count, size = piece
        where = None
        if kind == "frame":
            self.refused = self.refused or not self.serial and self.exporter.is_echo(data[:size], self, now)
            where = self._recognised(data, count, size)
            kind = where.type if where else "malformed"
        if self.refused:
            return
        if where:
            self._meet(where, piece, now)
        mode = self.exporter.mode
        answered = mode != FORWARD and where is not None and self._answer(where, count, now, wall)
        verdict = "answered" if answered else "dropped" if mode == LOCAL else "forwarded"
        if mode != LOCAL:
            passed = self._drawn(data, size) if where and self.store.batsignal and draws_bat(where) else data
            verdict = "rewritten" if passed != data and not answered else verdict
            self._queue(passed, size, piece.kind == "frame", (where.type, where.serial) if where and answered else None, now)
        self.store.count(OUTBOUND, kind, verdict, count)
        if self.exporter.record:
            self._record(OUTBOUND, kind, verdict, data, size, wall)

    def _recognised(self, data: bytes, count: int, size: int) -> Address | None:
        """The address of frames with a good CRC, None if they are malformed."""
        if size > 13 and data[11] not in FUNCTIONS:  # in 13 bytes the CRC stands there
            self.store.add("outbound_unknown_packets_total", count)
        with contextlib.suppress(ProtocolError):
            return address(data[: OUTBOUND.head], size, OUTBOUND)
        return None

    def _meet(self, where: Address, piece: Piece, now: float) -> None:
        """Count the device's good frames, and keep those that are to be decoded."""
        self.classes.add(where.cls)
        if not self.serial:
            self.serial = where.serial
            if self.exporter.mode == SPOOL:
                self.exporter.adopt(self, where.serial)
        device = self.store.device(where, now)
        if device is None:
            self.store.add("sems_mitm_unlisted_device_packets_total", piece.count)
            return
        function = where.function
        device.good = now
        device.version += 1
        if function in PACKET_COUNTERS:
            device.counts[PACKET_COUNTERS[function].format(device.kind)] += piece.count
        if function == BUFFERED:
            device.counts["sems_mitm_buffered_packets_total"] += piece.count
        elif function in (LIVE, SETTINGS):
            waiting = self._waiting.get((device, function))
            if waiting is None:
                self._waiting[device, function] = [piece]
            else:
                waiting.append(piece)

    def _answer(self, where: Address, count: int, now: float, wall: float) -> bool:
        """Answer packets in the portal's place; whether they have an answer."""
        clock = where.function == SETTINGS and self.exporter.clock_ok(now, wall)
        reply = answer(where, datetime.fromtimestamp(wall), clock)
        if not reply:
            return False
        self.to_device.put(reply * count, len(reply))
        device = self.store.devices.get(where.owner)
        if device:
            device.counts["sems_mitm_acks_total"] += count
        return True

    def _drawn(self, data: bytes, size: int) -> bytes:
        """A HomeKit 1000's frames with the bat, but for what has begun to be sent as it is."""
        begun = 0 if self.to_portal.unsent else -(-self.to_portal.offset // size) * size
        frames = (data[at : at + size] for at in range(begun, len(data), size))
        return data[:begun] + b"".join([with_bat(frame) or frame for frame in frames])

    def _queue(self, data: bytes, size: int, whole: bool, key: tuple[str, str] | None, now: float) -> None:
        """Queue what goes to the portal; what waits for answers in small entries, which shrink with each."""
        if key is None:
            if self.to_portal.put(data, size, None, whole):
                self._echo(data, size, size, now)
        else:
            step = max(ENTRY // size, 1) * size
            for at in range(0, len(data), step):
                self.to_portal.put(data[at : at + step], size, key)
        if key or not self.portal_up:
            self._dropped(self.to_portal.shed(QUEUE))

    def _dropped(self, count: int) -> None:
        self.store.add("sems_mitm_queue_dropped_packets_total", count)

    def unfinished(self, now: float) -> bytes:
        """What of the device's unfinished frame may go to the portal already."""
        rest = self.outward.rest
        if self.exporter.mode != FORWARD or len(rest) <= self.to_portal.offset:
            return b""
        held = self.store.batsignal and not self.to_portal.offset and now - self.outward.since < HOLD and may_draw_bat(rest)
        return b"" if held else bytes(rest[self.to_portal.offset :])

    def streams(self) -> bool:
        """Whether what the device sends may go to the portal before it is looked at: nothing older waits, nothing is rewritten."""
        up_to_date = self.portal_up and not self.to_portal.unsent and self.to_portal.offset == len(self.outward.rest)
        return up_to_date and self.exporter.mode == FORWARD and not self.store.batsignal

    def outgoing(self, now: float) -> bytes:
        """The next bytes for the portal."""
        return self.to_portal.ready() or self.unfinished(now)

    def portal_took(self, count: int, now: float) -> None:
        """The portal's socket took so many bytes of `outgoing`."""
        if self.opening is None and self.to_portal.unsent:
            first = self.to_portal.unsent[0]
            self.opening = (now, hash(first.data[: first.size or first.sizes[0]]))
        for entry in self.to_portal.took(count)[-ECHOES:]:
            self._echo(entry.data, entry.size or entry.sizes[0], entry.size or entry.sizes[-1], now)

    def remembered(self) -> list[tuple[float, int]]:
        """When frames were sent to the portal, and their hashes: the connection's first one and the latest."""
        return [*self.echoes, self.opening] if self.opening else []

    def _echo(self, sent: bytes, first: int, last: int, now: float) -> None:
        """Remember frames that the portal was sent: the first of them and the last, by their sizes."""
        self.echoes.append((now, hash(sent[:first])))
        self.opening = self.opening or self.echoes[-1]
        if len(sent) > first:
            self.echoes.append((now, hash(sent[-last:])))

    def digest(self, now: float, wall: float) -> None:
        """Decode what came: metrics follow, and a trouble at the most.

        Of a long run of packets that count, the last three that can be read are enough: the rules look no further back.
        """
        for (device, function), pieces in self._waiting.items():
            count = sum(piece.count for piece in pieces)
            if function == SETTINGS:
                for _, words in self._read(pieces, range(count), DECODED, now):
                    self.store.learn(device, info(words), now)
                continue
            if count <= EXACT:  # what cannot be read takes no part in the order
                read = self._read(pieces, range(count), EXACT, now)
                new = [read[i] for i in device.new_ones([packet.time for packet, _ in read])]
            else:
                stamps = [data[at : at + 6] for _, data, _, size in pieces for at in range(LONG.time, len(data), size)]
                new = self._read(pieces, device.new_ones(stamps), DECODED, now)
            for packet, words in new:
                self.store.live(device, packet, words, now, wall)
        self._waiting.clear()

    def _read(self, pieces: list[Piece], indices: Sequence[int], most: int, now: float) -> list[tuple[Packet, dict[int, int]]]:
        """The last `most` readable packets of those that the indices name in the pieces, in order, with their registers."""
        starts = list(itertools.accumulate((piece.count for piece in pieces), initial=0))
        found: list[tuple[Packet, dict[int, int]]] = []
        for index in reversed(indices):
            place = bisect.bisect(starts, index) - 1
            _, data, _, size = pieces[place]
            at = (index - starts[place]) * size
            try:
                packet = decode(data[at : at + size], OUTBOUND)
                found.append((packet, registers(packet.clear)))
            except ProtocolError as error:
                self.store.troubles.say("payload", f"a packet of {self.serial} cannot be read: {error}", now)
            if len(found) == most:
                break
        return found[::-1]

    # Inward: portal -> device

    def from_portal(self, data: bytes, now: float, wall: float) -> None:
        """Take bytes that the portal has sent."""
        self.store.add("sems_mitm_bytes_total", len(data), 'direction="inbound"')
        for piece in self.inward.feed(data, now):
            self._inward(piece, now, wall)

    def _inward(self, piece: Piece, now: float, wall: float) -> None:
        """Decide what becomes of a piece from the portal, of each of its frames by itself."""
        kind, data, _, size = piece
        where = None
        if kind == "frame":
            with contextlib.suppress(ProtocolError):
                where = address(data[: INBOUND.head], size, INBOUND)
            kind = where.type if where else "malformed"
        for at in range(0, len(data), size):
            part = data[at : at + size]
            meaning = allowed(where, decode(part, INBOUND).clear, self.classes) if where else "keepalive" if kind == "keepalive" else ""
            verdict = self._pass(where, meaning, part, now)
            # 1 for each part, or all of a piece that is one part
            self.store.count(INBOUND, kind, verdict, piece.count * size // len(data))
            if not meaning:
                if piece.kind == "frame":
                    self.store.add("inbound_unknown_packets_total")
                text = f"blocked what the portal sent to {self.serial or self.peer}, type {kind}: {part[:LOG_HEX].hex()}"
                self.store.troubles.say("blocked", text, now)
            if self.exporter.record:
                self._record(INBOUND, kind, verdict, part, size, wall)

    def _pass(self, where: Address | None, meaning: str, frame: bytes, now: float) -> str:
        """Do with a frame from the portal what its meaning asks for; the verdict."""
        answers = meaning in ("ack", "nack")
        if where and answers:
            spooling = self.exporter.mode == SPOOL
            if spooling:
                self.to_portal.answered((where.type, where.serial))
            if meaning == "nack":
                self.store.troubles.say("nack", f"the portal did not accept a packet of {where.serial} (NACK), type {where.type}", now)
            device = self.store.devices.get(where.owner)
            if device and (meaning == "nack" or not spooling):  # a spooled packet was acknowledged when it came
                device.counts[f"sems_mitm_{meaning}s_total"] += 1
                device.version += 1
        if not meaning or self.device_gone or (self.exporter.mode == SPOOL and where):
            return "dropped"
        self.to_device.put(frame, len(frame))
        return "forwarded"

    # Life

    def due(self, now: float) -> float:
        """When `tick` gives an unfinished frame up, or `unfinished` lets it go without the bat; the earlier."""
        times = [framer.since + framer.wire.patience for framer in (self.outward, self.inward) if framer.rest]
        if self.store.batsignal and self.outward.rest and now < self.outward.since + HOLD:
            times.append(self.outward.since + HOLD)
        return min(times, default=math.inf)

    def tick(self, now: float, wall: float) -> None:
        """Give up unfinished frames that had their time."""
        for framer, take in ((self.outward, self._outward), (self.inward, self._inward)):
            if framer.rest and now >= framer.since + framer.wire.patience:
                for piece in framer.expire(now):
                    take(piece, now, wall)

    def device_closed(self, now: float, wall: float) -> None:
        """The device sends no more: its unfinished frame is what it is."""
        self.device_ended = True
        for piece in self.outward.close(now):
            self._outward(piece, now, wall)

    def portal_came(self) -> None:
        """The portal's connection stands. After one that failed, what waited begins with a whole frame."""
        if self.away:
            self.to_portal.start_whole()
        self.portal_up, self.away, self.opening = True, False, None

    def portal_failed(self) -> None:
        """An attempt failed, or the connection is gone."""
        self.portal_up, self.away = False, True

    def portal_lost(self, now: float, wall: float) -> None:
        """The portal's connection is gone; what it has not answered or taken goes again on the next."""
        self.portal_failed()
        self.to_portal.lost()
        for piece in self.inward.close(now):
            self._inward(piece, now, wall)
        self.inward = Framer(INBOUND)
        self._dropped(self.to_portal.shed(QUEUE))

    def spool_moves(self, heir: Session) -> None:
        """The device is back on another connection: what is kept for the portal goes there, before its own."""
        self.to_portal.lost()
        for entry in self.to_portal.unsent:
            heir.to_portal.put(entry.data, entry.size, entry.key, entry.whole)
        self.to_portal.close()

    def close(self) -> None:
        """Forget what waits."""
        self.to_portal.close()
        self.to_device.close()
        self.exporter.sessions.discard(self)

    def _record(self, wire: Wire, kind: str, verdict: str, data: bytes, size: int, wall: float) -> None:
        assert self.exporter.record
        for at in range(0, len(data), size):
            self.exporter.record(wall, self.peer, wire.name, kind, verdict, data[at : at + size])


def draws_bat(where: Address) -> bool:
    """Whether frames of this address get the bat: live and buffered data of a HomeKit 1000."""
    return where.function in (LIVE, BUFFERED) and family(where.cls, where.serial) == "HK1000"


def may_draw_bat(rest: bytes) -> bool:
    """Whether an unfinished frame may turn out to be one that gets the bat."""
    cls, function, serial = rest[10:11] or bytes([METER]), rest[11:12] or bytes([LIVE]), rest[LONG.serial : LONG.iv].decode("latin-1")
    fits = OUTBOUND.prefix.startswith(rest[: len(OUTBOUND.prefix)]) and cls[0] == METER and function[0] in (LIVE, BUFFERED)
    return fits and (len(serial) < 16 or family(METER, serial) == "HK1000")


# ----------------------------------------------------------------------------------------------------------- files


class RecordFile:
    """A file of one JSON object a line, each written at once; what cannot be written is counted and nothing else."""

    def __init__(self, path: str, name: str, store: Store) -> None:
        self.path, self.name, self.store = path, name, store
        self._file: int | None = None
        self._torn = False  # the last line of the file is not whole
        self.write("")

    def write(self, line: str) -> None:
        """Append a line; an empty one only opens the file."""
        try:
            if self._file is None:
                self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)
                with contextlib.suppress(OSError):  # not a regular file: nothing to look at
                    end = os.lseek(self._file, 0, os.SEEK_END)
                    self._torn = end > 0 and os.pread(self._file, 1, end - 1) != b"\n"
            data = ("\n" if self._torn and line else "").encode() + line.encode()
            written = os.write(self._file, data) if data else 0
            if written < len(data):
                self._torn = written > 0 or self._torn
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self._torn = self._torn and not line
        except OSError as error:
            self.store.add("sems_mitm_file_errors_total", 1, label("file", self.name))
            self.store.troubles.say(self.name, f"cannot write --sems.{self.name} {self.path}: {error.strerror}", time.monotonic())


class Files:
    """Where frames are recorded: all of them in the capture, buffered readings in the backfill file."""

    def __init__(self, store: Store, capture: str = "", backfill: str = "") -> None:
        self.capture = RecordFile(capture, "capture", store) if capture else None
        self.backfill = RecordFile(backfill, "backfill", store) if backfill else None

    def record(self, wall: float, peer: str, direction: str, kind: str, verdict: str, data: bytes) -> None:
        """Write a frame, or what is none, to the capture, and to the backfill file if it is buffered data."""
        line = capture_line(wall, peer, direction, verdict, data)
        if self.capture:
            self.capture.write(line)
        if self.backfill and direction == OUTBOUND.name and kind.endswith(f"{BUFFERED:02x}"):
            self.backfill.write(line)


def capture_line(wall: float, peer: str, direction: str, verdict: str, data: bytes) -> str:
    """A frame as a line of the capture file."""
    when = datetime.fromtimestamp(wall, timezone.utc).isoformat(timespec="milliseconds")
    return json.dumps({"time": when, "peer": peer, "direction": direction, "verdict": verdict, "hex": data.hex()}) + "\n"


# --------------------------------------------------------------------------------------------------------- network

Endpoint = collections.namedtuple("Endpoint", "family sockaddr")


def plain(host: str) -> str:
    """An address as plain IPv4 or IPv6, without a zone."""
    host = host.partition("%")[0]
    return host[7:] if host.lower().startswith("::ffff:") and "." in host else host


def is_global(host: str) -> bool:
    """Whether an address is one of the internet's."""
    address = ipaddress.ip_address(plain(host))
    return address.is_global and not address.is_multicast


def is_this_machine(host: str) -> bool:
    """Whether an address is one of this machine's: then a socket can be bound to it."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind((host, 0))
        return True
    return False


class Unresolved(OSError):
    """A name that cannot be resolved; `reason` is the label of the failures counter."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


def dns_query(name: str, number: int) -> bytes:
    """A DNS query (RFC 1035) for the A records of a name. Raises UnicodeError for what is no host name."""
    labels = name.rstrip(".").encode("idna").split(b".")
    question = b"".join(bytes([len(part)]) + part for part in labels) + b"\0\0\1\0\1"
    return struct.pack(">6H", number, 0x0100, 1, 0, 0, 0) + question


def dns_answer(data: bytes, query: bytes) -> list[str] | None:
    """The IPv4 addresses in the answer to a query, [] if the name does not exist, None if it tells nothing.

    Raises ProtocolError for what is no answer to this query: another's, forged, cut.
    """
    if data[:2] != query[:2] or len(data) < 12 or not data[2] & 0x80 or data[12 : len(query)].lower() != query[12:].lower():
        raise ProtocolError("not the answer to the question", data)
    if data[3] & 0x0F == 3:
        return []
    try:
        name, pos = _dns_name(data, 12)
        names, found, pos = {name}, [], pos + 4
        for _ in range(struct.unpack_from(">H", data, 6)[0] if data[3] & 0x0F == 0 else 0):
            owner, pos = _dns_name(data, pos)
            kind, cls, _, size = struct.unpack_from(">HHIH", data, pos)
            pos += 10 + size
            if pos > len(data):
                raise ProtocolError("a record runs past the end", data)
            if owner in names and cls == 1 and kind == 5:  # CNAME
                names.add(_dns_name(data, pos - size)[0])
            elif owner in names and cls == 1 and kind == 1 and size == 4:
                found.append(socket.inet_ntoa(data[pos - 4 : pos]))
    except struct.error:
        raise ProtocolError("a record runs past the end", data) from None
    return found or None


def _dns_name(data: bytes, pos: int) -> tuple[bytes, int]:
    """The name at pos, in lower case, and where it ends. A pointer leads back only, so it leads to an end."""
    parts, end, limit = [], 0, pos
    while True:
        if pos >= len(data):
            raise ProtocolError("a name runs past the end", data)
        length = data[pos]
        if length >= 0xC0 and pos + 1 < len(data):
            target = (length & 0x3F) << 8 | data[pos + 1]
            end = end or pos + 2
            if target >= limit:
                raise ProtocolError("a name that points forward", data)
            pos = limit = target
        elif length > 63 or pos + 1 + length > len(data):
            raise ProtocolError("a name that is none", data)
        elif length:
            parts.append(data[pos + 1 : pos + 1 + length].lower())
            pos += 1 + length
        else:
            return b".".join(parts), end or pos + 1


def ask_dns(server: tuple[str, int], name: str, timeout: float = 2) -> list[str] | None:
    """What a name server says of a name, as `dns_answer`; None too if it does not answer in time. Raises OSError."""
    query = dns_query(name, int.from_bytes(os.urandom(2), "big"))
    family, kind, _, _, sockaddr = socket.getaddrinfo(*server, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        sock.connect(sockaddr)  # the kernel drops what others send
        sock.send(query)
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                return dns_answer(sock.recv(4096), query)
            except ProtocolError:
                continue  # the true answer may still come
            except socket.timeout:  # TimeoutError since Python 3.10
                break
    return None


def system_addresses(host: str, port: int) -> list[Endpoint]:
    """What the system's name service says, [] for nothing."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return [Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found]


def is_literal(host: str) -> bool:
    """Whether a host is an address, or the one name that every system knows."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host.partition("%")[0]))
    return host.lower() == "localhost"


def resolve(host: str, port: int, servers: list[tuple[str, int]]) -> list[Endpoint]:
    """The portal's addresses. Raises Unresolved.

    The system's answer, if all of it is routable: the override that brings the devices here must not lead the exporter to
    itself. Otherwise what the servers say; if they say that there is no such name, the system's answer after all.
    """
    system = system_addresses(host, port)
    good = [address for address in system if is_global(address.sockaddr[0])]
    asked = [] if is_literal(host) or good and len(good) == len(system) else servers
    if system and not asked:
        return system
    unroutable = False
    for server in asked:
        try:
            found = ask_dns(server, host)
        except (OSError, UnicodeError):
            continue
        if found == [] and system:
            return system
        routable = [Endpoint(socket.AF_INET, (address, port)) for address in found or () if is_global(address)]
        if routable:
            return routable + good
        unroutable = unroutable or bool(found)
    if good:  # beside the override: an IPv6 address, say
        return good
    if unroutable:
        raise Unresolved(
            "loop",
            f"{host} is overridden at --sems.upstream-dns too: name a server there that knows its real address, or give that as --sems.upstream",
        )
    why = f" that can be used: here it is {system[0].sockaddr[0]}, and --sems.upstream-dns does not help" if system else ""
    raise Unresolved("dns", f"{host} has no address{why}")


class Resolver:
    """Looks the portal's name up, one request at a time, in a thread of its own: a look-up may take long."""

    def __init__(
        self, upstream: tuple[str, int], servers: list[tuple[str, int]], wanted: Callable[..., bool], done: Callable[..., None]
    ) -> None:
        self.upstream, self.servers, self.wanted, self.done = upstream, servers, wanted, done
        self._asked: queue.SimpleQueue[object] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def ask(self, who: object) -> None:
        """Have done(who, addresses or Unresolved) called, from the resolver's thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="resolver", daemon=True)
            self._thread.start()
        self._asked.put(who)

    def _run(self) -> None:
        while True:
            who = self._asked.get()
            if not self.wanted(who):  # it has gone while others waited for a slow answer
                continue
            try:
                self.done(who, resolve(*self.upstream, self.servers))
            except Unresolved as error:
                self.done(who, error)
            except (OSError, ValueError) as error:  # the system's resolver has its own ideas of what a name is
                self.done(who, Unresolved("dns", str(error)))


def tuned(sock: socket.socket) -> socket.socket:
    """A stream socket that does not block, does not wait for more to send, and notices a peer that is gone."""
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, seconds in (("TCP_KEEPIDLE", 120), ("TCP_KEEPINTVL", 30), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), seconds)
    return sock


def listeners(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for an address, without a host one for each family there is. Raises OSError."""
    found: list[socket.socket] = []
    wanted = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    for family, kind, protocol, _, sockaddr in sorted(set(wanted), key=lambda entry: entry[0] != socket.AF_INET):
        try:
            sock = socket.socket(family, kind, protocol)
        except OSError:
            continue  # a family that this system does not have
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            chosen = found[0].getsockname()[1] if found else port  # port 0: the same for both families
            sock.bind((sockaddr[0], chosen, *sockaddr[2:]))
            sock.listen(128)
        except OSError as error:
            sock.close()
            if found and (port == 0 or error.errno == errno.EADDRNOTAVAIL):
                continue
            for other in found:
                other.close()
            raise
        found.append(sock)
    if not found:
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return found


def endpoint_text(sockaddr: tuple) -> str:
    """HOST:PORT of a socket's address."""
    host = plain(sockaddr[0])
    return f"[{host}]:{sockaddr[1]}" if ":" in host else f"{host}:{sockaddr[1]}"


class Leg:
    """One socket of a link, in the selector with what it waits for."""

    def __init__(self, network: Network, sock: socket.socket, ready: Callable[[int], None]) -> None:
        self.network, self.sock, self.ready = network, sock, ready
        self.events = 0
        self.progress: float | None = None  # since when bytes wait for the peer, or when it last took some

    def watch(self, reading: bool, writing: bool) -> None:
        """Wait for these events from now on."""
        events = (selectors.EVENT_READ if reading else 0) | (selectors.EVENT_WRITE if writing else 0)
        if events == self.events:
            return
        selector = self.network.selector
        if not events:
            selector.unregister(self.sock)
        elif self.events:
            selector.modify(self.sock, events, self.ready)
        else:
            selector.register(self.sock, events, self.ready)
        self.events = events

    def waits(self, backlog: bool, now: float) -> float:
        """When the peer counts as lost if it takes nothing of what waits for it."""
        self.progress = (self.progress or now) if backlog else None
        return self.progress + STALL if self.progress else math.inf

    def send(self, data: bytes, now: float) -> int:
        """How much of data the socket took. Raises OSError if the peer is gone."""
        try:
            count = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        self.progress = now
        return count

    def read(self) -> bytes | None:
        """What the peer sent: nothing at the end, None if there is nothing yet. Raises OSError if it is gone."""
        buffer = self.network.buffer  # one for all: to allocate it for each packet costs more than to copy the packet
        try:
            return bytes(buffer[: self.sock.recv_into(buffer)])
        except (BlockingIOError, InterruptedError):
            return None

    def close(self) -> None:
        """Close the socket, and wait for it no more."""
        self.watch(False, False)
        self.sock.close()


class Link:
    """A session with its sockets: the device's, and the portal's when there is one."""

    def __init__(self, network: Network, sock: socket.socket, peer: str, now: float) -> None:
        self.network, self.session = network, Session(network.exporter, peer, now)
        self.device: Leg | None = Leg(network, sock, self.on_device)
        self.portal: Leg | None = None
        self.connecting = False  # the portal's socket is
        self.own_end = ""  # our end of the portal's connection
        self.asking = False  # the resolver is
        self.endpoints: list[Endpoint] = []  # of the portal, not tried in this attempt
        self.backoff: float = BACKOFF[0]
        self.retry = math.inf  # when to try the portal again
        self.since = now  # when the attempt to reach the portal, or its connection, began
        self.answered = now  # when the portal last answered what is kept for it, or the device went
        self.heard = now  # when the device last sent something
        self.ended = math.inf  # when all ends, after the device's last byte
        self.closing = False  # the device sends no more
        self.sent = False  # the portal was sent something
        self.alarm = math.inf  # when the network wakes it

    @property
    def local(self) -> bool:
        """Whether there is no portal."""
        return self.network.exporter.mode == LOCAL

    @property
    def spools(self) -> bool:
        """Whether what is sent is kept until the portal has answered it."""
        return self.network.exporter.mode == SPOOL

    # Device

    def on_device(self, events: int) -> None:
        """The device's socket is ready."""
        now, wall = time.monotonic(), time.time()
        if events & selectors.EVENT_READ and self.device and not self.closing:
            try:
                data = self.device.read()
            except OSError:
                return self.device_lost(now, wall)
            if data == b"":
                self.device_closed(now, wall)
            elif data:
                self.heard = now
                if self.session.streams():
                    self.stream(data, now, wall)
                with self.network.exporter.store.lock:  # a scrape sees a packet's count and its values, or neither
                    self.session.from_device(data, now, wall)
                    if self.session.refused:
                        return self.refuse()
                    self.flush(now, wall)
                    self.session.digest(now, wall)
                self.reach(now)
        if events & selectors.EVENT_WRITE:
            self.flush(now, wall)
        self.settle(now)

    def device_closed(self, now: float, wall: float) -> None:
        """The device sends no more; it may still read."""
        self.closing = True
        with self.network.exporter.store.lock:
            self.session.device_closed(now, wall)
            self.session.digest(now, wall)
        self.ended = now + STALL

    def device_lost(self, now: float, wall: float) -> None:
        """The device's socket is of no use any more."""
        if not self.closing:
            self.device_closed(now, wall)
        self.drop_device()
        self.settle(now)

    def drop_device(self) -> None:
        """Close the device's socket; the portal may still have something to take."""
        if self.device:
            self.device.close()
            self.answered = time.monotonic()
        self.device = None
        self.session.device_gone = True

    def refuse(self) -> None:
        """The device is this exporter."""
        self.network.refuse("loop", self.session.peer)
        self.end()

    # Portal

    def reach(self, now: float) -> None:
        """Begin an attempt to reach the portal, unless there is one or its time has not come."""
        if self.local or self.portal or self.asking or now < self.retry < math.inf:
            return
        self.retry, self.since = math.inf, now
        self.asking = True
        self.network.look_up(self)

    def on_lookup(self, found: list[Endpoint] | Unresolved) -> None:
        """The resolver has an answer."""
        self.asking = False
        now = time.monotonic()
        if isinstance(found, Unresolved):
            self.failed(found.reason, str(found), now)
        else:
            self.endpoints = list(found)
            self.connect(now)
        self.settle(now)

    def connect(self, now: float) -> None:
        """Try the next of the portal's addresses."""
        endpoint = self.endpoints.pop(0)
        self.since = self.session.attempted = now
        if self.network.is_own(endpoint):
            text = f"the portal's address {endpoint_text(endpoint.sockaddr)} is this exporter's own"
            return self.failed("loop", text + ": check --sems.upstream and --sems.upstream-dns", now)
        try:
            sock = tuned(socket.socket(endpoint.family, socket.SOCK_STREAM))
        except OSError as error:
            return self.failed("other", f"no socket: {error.strerror}", now)
        self.portal, self.connecting = Leg(self.network, sock, self.on_portal), True
        try:
            sock.connect(endpoint.sockaddr)
        except BlockingIOError:
            pass
        except OSError as error:
            return self.failed(reason_of(error.errno), error.strerror or str(error), now)
        self.own_end = endpoint_text(sock.getsockname())
        self.network.own_ends.add(self.own_end)

    def failed(self, reason: str, text: str, now: float) -> None:
        """An address of the portal could not be reached."""
        self.drop_portal()
        if self.endpoints:
            return self.connect(now)
        self.session.portal_failed()
        store = self.network.exporter.store
        with store.lock:
            store.add("sems_mitm_upstream_connect_failures_total", 1, label("reason", reason))
            self.network.upstream_up = 0
            store.troubles.say(f"portal {reason}", f"cannot reach the portal {self.network.settings.upstream_text}: {text}", now)
        self.later(now)

    def later(self, now: float) -> None:
        """Try again after the back-off; a device that has gone and spooled nothing is done."""
        self.retry = now + self.backoff * random.uniform(0.7, 1)
        self.backoff = min(2 * self.backoff, BACKOFF[1])
        if self.closing and not self.spools:
            self.end()

    def on_portal(self, events: int) -> None:
        """The portal's socket is ready."""
        now, wall = time.monotonic(), time.time()
        if self.connecting:
            if not self.connected(now):
                return self.settle(now)
        elif events & selectors.EVENT_READ and self.portal:
            try:
                data = self.portal.read()
            except OSError:
                data = b""
            if data == b"":
                self.portal_lost(now, wall)
            elif data:
                self.backoff = BACKOFF[0]
                kept = self.session.to_portal.size
                with self.network.exporter.store.lock:
                    self.session.from_portal(data, now, wall)
                if self.session.to_portal.size < kept:
                    self.answered = now
        self.flush(now, wall)
        self.settle(now)

    def connected(self, now: float) -> bool:
        """Whether the portal's connection stands now."""
        assert self.portal
        code = self.portal.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.failed(reason_of(code), os.strerror(code), now)
            return False
        self.connecting, self.since, self.answered = False, now, now
        self.session.portal_came()
        self.endpoints.clear()
        if not self.network.upstream_up:
            text = f"the portal is there: {endpoint_text(self.portal.sock.getpeername())}"
            self.network.exporter.store.troubles.say("portal there", text, now, level=logging.INFO)
        self.network.upstream_up = 1
        return True

    def portal_lost(self, now: float, wall: float) -> None:
        """The portal's connection is gone; the device's stays."""
        if now - self.since >= PROVEN:
            self.backoff = BACKOFF[0]
        with self.network.exporter.store.lock:
            self.session.portal_lost(now, wall)
        self.drop_portal()
        self.flush(now, wall)
        self.later(now)

    def drop_portal(self) -> None:
        """Close the portal's socket, connected or not."""
        self.network.own_ends.discard(self.own_end)
        if self.portal:
            self.portal.close()
        self.portal, self.connecting = None, False

    # Both

    def stream(self, data: bytes, now: float, wall: float) -> None:
        """Pass on what came from the device at once, as much as the portal's socket takes."""
        assert self.portal
        try:
            self.session.portal_took(self.portal.send(data, now), now)
            self.sent = True
        except OSError:
            self.portal_lost(now, wall)

    def flush(self, now: float, wall: float) -> None:
        """Send what the sockets take."""
        session = self.session
        try:
            while self.portal and not self.connecting and (data := session.outgoing(now)):
                count = self.portal.send(data, now)
                self.sent = self.sent or count > 0
                session.portal_took(count, now)
                if count < len(data):
                    break
        except OSError:
            return self.portal_lost(now, wall)
        try:
            while self.device and (data := session.to_device.ready()):
                count = self.device.send(data, now)
                session.to_device.took(count)
                if count < len(data):
                    break
        except OSError:
            self.device_lost(now, wall)

    def settle(self, now: float) -> None:
        """What the sockets wait for now, and when to look again at the latest."""
        if self not in self.network.links:
            return
        session, mode = self.session, self.network.exporter.mode
        if self.portal and len(session.to_portal.misplaced) > MISPLACED:
            return self.portal_lost(now, time.time())
        up = self.portal is not None and not self.connecting
        to_portal, to_device = session.to_portal.backlog, session.to_device.backlog
        outgoing = up and bool(to_portal or session.unfinished(now))
        if self.closing and self.done(now, outgoing, bool(to_device)):
            return self.end()
        times = [self.alarm, session.due(now), math.inf if self.network.stopping else self.retry, math.inf if self.spools else self.ended]
        if self.portal:
            self.portal.watch(self.connecting or to_device < BACKLOG, self.connecting or outgoing)
            times.append(self.since + CONNECT_TIMEOUT if self.connecting else self.portal.waits(outgoing, now))
        if self.device:
            room = (not up or to_portal < BACKLOG) and (mode == FORWARD or to_device < BACKLOG)
            self.device.watch(room and not self.closing, to_device > 0)
            times += [self.device.waits(to_device > 0, now), self.heard + SILENCE]
        elif up and self.spools:
            times.append(self.answered + ANSWER_TIMEOUT)
        self.network.wake(self, min(times))

    def done(self, now: float, outgoing: bool, incoming: bool) -> bool:
        """Whether nothing is left to do for a device that sends no more; sees to the next step if something is."""
        if self.local or self.spools and self.device:
            if incoming and self.device:
                return False
            self.drop_device()
        if self.local:
            return True
        if self.spools:
            return not self.session.to_portal.has_frames and not outgoing
        if not self.portal:
            return not self.asking
        if self.connecting or outgoing:
            return False
        if self.ended > now + LINGER:
            self.ended = now + LINGER
            with contextlib.suppress(OSError):
                self.portal.sock.shutdown(socket.SHUT_WR)
        return not self.sent

    def on_alarm(self, now: float, wall: float) -> None:
        """One of the times of `settle` has come."""
        with self.network.exporter.store.lock:
            self.session.tick(now, wall)
            self.session.digest(now, wall)
        if self.closing and now >= self.ended and not self.spools:
            return self.end()
        if self.device and (now >= self.heard + SILENCE or self.device.progress and now >= self.device.progress + STALL):
            return self.device_lost(now, wall)
        stalled = self.portal and self.portal.progress and now >= self.portal.progress + STALL
        unanswered = self.spools and self.session.portal_up and not self.device and now >= self.answered + ANSWER_TIMEOUT
        if self.connecting and now >= self.since + CONNECT_TIMEOUT:
            self.failed("timeout", f"no answer for {CONNECT_TIMEOUT} s", now)
        elif stalled or unanswered:
            self.portal_lost(now, wall)
        elif now >= self.retry and not self.network.stopping:
            self.reach(now)
        self.flush(now, wall)
        self.settle(now)

    def unsent(self) -> bool:
        """Whether a socket may still take something that waits."""
        to_portal, to_device = self.session.to_portal.backlog, self.session.to_device.backlog
        return bool(self.device and to_device or self.portal and to_portal)

    def end(self) -> None:
        """Close both sockets and forget the session."""
        self.drop_device()
        self.drop_portal()
        with self.network.exporter.store.lock:
            self.session.close()
        self.network.links.discard(self)
        self.alarm = math.inf  # the network may forget it


def reason_of(code: int | None) -> str:
    """The label of a failure for an errno of connect."""
    return "refused" if code == errno.ECONNREFUSED else "timeout" if code == errno.ETIMEDOUT else "other"


class Network:
    """The loop: accepts devices, wakes links, stops in good order. All of it in one thread."""

    def __init__(self, exporter: Exporter, settings: Settings) -> None:
        self.exporter, self.settings = exporter, settings
        self.selector = selectors.DefaultSelector()
        self.links: set[Link] = set()
        self.buffer = memoryview(bytearray(RECV_SIZE))
        self.own_ends: set[str] = set()  # our ends of the portal's connections
        self.upstream_up: int | None = None
        self.listening = listeners(*settings.listen_address)
        self.port: int = self.listening[0].getsockname()[1]  # where devices connect
        self.listening_at = {sock.getsockname()[:2] for sock in self.listening}  # and where HTTP does
        self.resolver = Resolver(settings.upstream, settings.upstream_dns, self.links.__contains__, self._found)
        self._alarms: list[tuple[float, int, Link]] = []
        self._order = 0
        self._paused = math.inf  # when accepting goes on
        self._answers: collections.deque[tuple[Link, list[Endpoint] | Unresolved]] = collections.deque()
        self._wake_in, self._wake_out = socket.socketpair()
        for sock in (*self.listening, self._wake_in, self._wake_out):
            sock.setblocking(False)
        self.selector.register(self._wake_in, selectors.EVENT_READ, self._on_wake)
        self._accepting(True)
        self.stopping = False
        gauges = exporter.store.gauges
        gauges["sems_mitm_queue_bytes"] = lambda: exporter.pool.outward
        gauges["sems_mitm_device_connections"] = lambda: len(self.links)
        gauges["sems_mitm_upstream_connections"] = lambda: sum(session.portal_up for session in list(exporter.sessions))
        gauges["sems_mitm_upstream_up"] = lambda: self.upstream_up

    def wake(self, link: Link, when: float) -> None:
        """Call the link's on_alarm at that time, or earlier if it is to be woken earlier anyway."""
        if when < link.alarm:
            link.alarm = when
            self._order += 1
            heapq.heappush(self._alarms, (when, self._order, link))
            if len(self._alarms) > 64 + 4 * len(self.links):  # mostly times that were overtaken by earlier ones
                self._alarms = [entry for entry in self._alarms if entry[2].alarm == entry[0]]
                heapq.heapify(self._alarms)

    def look_up(self, link: Link) -> None:
        """Have the link's on_lookup called with the portal's addresses."""
        host, port = self.settings.upstream
        if is_literal(host) and host.lower() != "localhost":
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            link.on_lookup([Endpoint(family, (host, port))])
        else:
            self.resolver.ask(link)

    def _found(self, link: Link, found: list[Endpoint] | Unresolved) -> None:
        self._answers.append((link, found))
        self.interrupt()

    def interrupt(self) -> None:
        """Wake the loop, from any thread."""
        with contextlib.suppress(OSError):
            self._wake_out.send(b"\0")

    def _on_wake(self, _: int) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._wake_in.recv(4096):
                pass
        while self._answers:
            link, found = self._answers.popleft()
            if link in self.links:
                link.on_lookup(found)

    def is_own(self, endpoint: Endpoint) -> bool:
        """Whether an address is one where this exporter listens."""
        host, port = endpoint.sockaddr[:2]
        return any((own, port) in self.listening_at for own in ("0.0.0.0", "::", plain(host))) and is_this_machine(host)

    def refuse(self, reason: str, peer: str) -> None:
        """Count and log a device connection that is refused."""
        text = {
            "limit": f"more than --sems.max-connections={self.settings.max_connections}",
            "not_allowed": "its address is not in --sems.allow-from",
            "loop": "it is our own connection to the portal that came back; let --sems.upstream lead to the real portal,"
            " and redirect only what the devices send, not this machine",
        }[reason]
        store = self.exporter.store
        with store.lock:
            store.add("sems_mitm_refused_connections_total", 1, label("reason", reason))
            store.troubles.say(f"refused {reason}", f"refused the connection from {peer}: {text}", time.monotonic())

    def _accepting(self, yes: bool) -> None:
        for sock in self.listening:
            if yes:
                self.selector.register(sock, selectors.EVENT_READ, functools.partial(self._on_accept, sock))
            else:
                self.selector.unregister(sock)
        self._paused = math.inf if yes else time.monotonic() + 1

    def _on_accept(self, listening: socket.socket, _: int) -> None:
        for _ in range(64):  # then the others have their turn
            try:
                sock, sockaddr = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors or memory: the connections there are go on
                self.exporter.store.troubles.say("accept", f"cannot accept a connection: {error.strerror}", time.monotonic())
                return self._accepting(False)
            peer = endpoint_text(sockaddr)
            reason = self._objection(ipaddress.ip_address(plain(sockaddr[0])), peer)
            if reason:
                sock.close()
                self.refuse(reason, peer)
                continue
            now = time.monotonic()
            try:
                link = Link(self, tuned(sock), peer, now)
            except OSError:  # gone already
                sock.close()
                continue
            self.links.add(link)
            link.settle(now)

    def _objection(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address, peer: str) -> str:
        allowed_from = self.settings.allow_from
        if allowed_from and not any(address in network for network in allowed_from):
            return "not_allowed"
        if peer in self.own_ends:
            return "loop"
        return "limit" if len(self.links) >= self.settings.max_connections else ""

    def run(self) -> None:
        """Serve until `stop`, then send what is queued."""
        while not self.stopping:
            self._turn(math.inf)
        self._finish()

    def stop(self) -> None:
        """End `run`; for signal handlers and other threads."""
        self.stopping = True
        self.interrupt()

    def _turn(self, until: float) -> None:
        """Wait for the next event or alarm, and see to it."""
        when = min(self._alarms[0][0] if self._alarms else math.inf, self._paused, until)
        ready = self.selector.select(None if when == math.inf else max(when - time.monotonic(), 0))
        for key, events in ready:
            if key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # closed by one before it
                key.data(events)
                self._tidy()
        now = time.monotonic()
        due = []  # at first, as an alarm may set the next
        while self._alarms and self._alarms[0][0] <= now:
            due.append(heapq.heappop(self._alarms))
        for when, _, link in due:
            if link in self.links and link.alarm == when:
                link.alarm = math.inf
                link.on_alarm(now, time.time())
        self._tidy()
        if now >= self._paused:
            self._accepting(True)

    def _tidy(self) -> None:
        """After each event: what all links together hold stays bounded, and done sessions go."""
        exporter = self.exporter
        if exporter.pool.size > exporter.pool.limit:
            with exporter.store.lock:
                exporter.store.add("sems_mitm_queue_dropped_packets_total", exporter.pool.shed())
        while exporter.done:
            session = exporter.done.pop()
            for link in [link for link in self.links if link.session is session]:
                link.end()

    def _finish(self) -> None:
        """Stop accepting, send what is queued for two seconds at most, close everything."""
        end = time.monotonic() + SHUTDOWN
        if self._paused == math.inf:
            self._accepting(False)
        self._paused = math.inf
        for sock in self.listening:
            sock.close()
        for link in self.links:
            link.closing = True  # reads no more
        while any(link.unsent() for link in self.links) and time.monotonic() < end:
            self._turn(end)
        for link in list(self.links):
            link.end()
        self.selector.close()
        self._wake_in.close()
        self._wake_out.close()


# ------------------------------------------------------------------------------------------------------------ HTTP


def household(values: dict[str, list[float]], today: dict[str, float]) -> dict[str, float | None]:
    """What a household looks at: of a device's gauges, each with its values, and of what its counters gained today."""

    def total(*metrics: str) -> float | None:
        return next((sum(values[metric]) for metric in metrics if metric in values), None)

    def scaled(number: float | None, divide: float) -> float | None:
        return None if number is None else number / divide

    generation, export = total("meter_power_generation_watts"), total("meter_power_export_watts")
    charge = values.get("battery_state_of_charge_ratio")
    generated = scaled(total("inverter_energy_output_hectowatt_hours_day"), 10)
    return {
        "generation_watts": total("meter_power_generation_watts", "inverter_string_power_watts", "inverter_power_output_watts"),
        "house_watts": total("inverter_load_watts") if generation is None or export is None else generation - export,
        "export_watts": export,
        "battery_watts": total("battery_power_watts"),
        "battery_charge_percent": round(100 * sum(charge) / len(charge), 1) if charge else None,
        "generated_today_kilowatt_hours": scaled(today.get("meter_energy_generation_decawatt_hours_total"), 100)
        if generated is None
        else generated,
        "imported_today_kilowatt_hours": scaled(today.get("meter_energy_import_decawatt_hours_total"), 100),
        "exported_today_kilowatt_hours": scaled(today.get("meter_energy_export_decawatt_hours_total"), 100),
    }


def device_overview(device: Device, store: Store, now: float, local: datetime) -> dict:
    """A device in /api/devices, without what is not known."""
    series = {} if store.is_stale(device.fresh, now) else {**device.gauges, **device.counters}
    values: dict[str, list[float]] = {}
    for (metric, _), number in series.items():
        values.setdefault(metric, []).append(number)
    since, first = device.day or (local, {})
    counters = device.counters if since.date() == local.date() else {}
    # a counter that a dip has set back has gained nothing
    today = {key[0]: max(number - first[key], 0) for key, number in counters.items() if not key[1] and key in first}
    told = {
        **dict(zip(("device", "model", "serial"), device.name)),
        "full_serial": label_text(device.serial),
        **device.info,
        "up": not store.is_stale(device.good, now),
        "age_seconds": round(now - device.good, 1),
        "today_since": since.isoformat(timespec="seconds") if today else None,
        **household(values, today),
        "values": {flat(*key): number for key, number in series.items()},
    }
    return {name: value for name, value in told.items() if value is not None}


def overview(store: Store, settings: Settings, now: float, wall: float) -> dict:
    """What /api/devices and the page show."""
    local = datetime.fromtimestamp(wall)
    with store.lock:
        devices = [device_overview(device, store, now, local) for device in store.devices.values() if not device.hidden]
        up, queued = (store.gauges.get(f"sems_mitm_{name}", lambda: None)() for name in ("upstream_up", "queue_bytes"))
        blocked = store.totals["inbound_unknown_packets_total", ""]
    upstream = {
        "mode": settings.mode,
        "address": "" if settings.mode == LOCAL else settings.upstream_text,
        "up": None if up is None else bool(up),
        "queue_bytes": queued or 0,
    }
    return {"devices": devices, "upstream": upstream, "blocked": blocked}


def flat(metric: str, labels: str) -> str:
    """A metric with its label as one word: meter_voltage_volts_channel_1."""
    return metric + "".join(f"_{word}" for word in re.findall(r"\w+", labels))


STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#5a6472;--back:#f4f5f7;--card:#fff;--line:#dde1e6;--sun:#a15c00;--good:#17693b;--bad:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#a3adba;--back:#14181d;--card:#1d232a;--line:#323a44;--sun:#ffb454;--good:#6fd394;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--back);color:var(--ink);font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.25rem;margin:0}h2{font-size:1.1rem;margin:0}
header,footer{display:flex;flex-wrap:wrap;gap:.25rem 1rem;align-items:baseline;justify-content:space-between}
main{display:grid;gap:1rem;margin:1rem 0;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr))}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem}
p{margin:.25rem 0}.dim,dt,footer{color:var(--dim);font-size:.875rem}.good{color:var(--good)}.bad{color:var(--bad)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(8rem,1fr));gap:.75rem 1rem;margin:1rem 0;align-items:end}
dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}.sun{color:var(--sun)}
a{color:inherit}code{font-size:.95em}li{margin:.25rem 0}ol{padding-left:1.25rem}
"""

# What a card shows: key of `household`, title, title while negative (then without the sign), unit, decimals, class.
CARD = (
    ("generation_watts", "Solar", "", "W", 0, "sun"),
    ("house_watts", "House", "", "W", 0, ""),
    ("export_watts", "To the grid", "From the grid", "W", 0, ""),
    ("battery_watts", "From the battery", "Into the battery", "W", 0, ""),
    ("battery_charge_percent", "Battery", "", "%", 0, ""),
    ("generated_today_kilowatt_hours", "Generated today", "", "kWh", 1, "sun"),
    ("imported_today_kilowatt_hours", "From the grid today", "", "kWh", 1, ""),
    ("exported_today_kilowatt_hours", "To the grid today", "", "kWh", 1, ""),
)

SET_UP = """<section><h2>No device has connected yet</h2><ol>
<li>Give this machine a fixed address, and let your router's or Pi-hole's name service answer <code>{host}</code> with it.</li>
<li>Power-cycle the device's Wi-Fi or LAN module: it asks for the name when it starts.</li>
<li>It connects to port {port} within a minute or two, and appears here.</li></ol>
<p>Nothing after five minutes? <code>python3 sems_mitm.py doctor</code> on this machine says what is missing.
To try without a device: <code>python3 sems_mitm.py demo</code>.</p></section>"""


def span(seconds: float) -> str:
    """An age in words."""
    units = ((86400, "day"), (3600, "hour"), (60, "minute"))
    size, word = next((unit for unit in units if seconds >= unit[0]), (1, "second"))
    return f"{seconds // size:.0f} {word}{'' if seconds // size == 1 else 's'}"


def card(device: dict) -> str:
    """A device on the page; every text of a device is escaped."""
    since = device.get("today_since", "")[11:16]
    rows = []
    for key, title, negative, unit, decimals, css in CARD:
        number = device.get(key)
        if number is not None:
            title, number = (negative, -number) if negative and number < 0 else (title, number)
            late = f" (since {since})" if "_today_" in key and since > "00:15" and device["device"] == "meter" else ""
            rows.append(f'<div><dt>{title}{late}</dt><dd class="{css}">{number:,.{decimals}f} {unit}</dd></div>')
    asleep = "" if device["device"] == "meter" else " (an inverter sleeps at night)"
    state = '<span class="good">reporting</span>' if device["up"] else f'<span class="bad">silent</span>{asleep}'
    shown = f"<dl>{''.join(rows)}</dl>" if rows else '<p class="dim">No current values.</p>'
    firmware = f" · firmware {html.escape(device['firmware'])}" if device["firmware"] else ""
    return (
        f"<section><h2>{html.escape(device['model'])}</h2><p>{state}, last packet {span(device['age_seconds'])} ago</p>{shown}"
        f'<p class="dim">{html.escape(device["device"])} · serial {html.escape(device["full_serial"])}{firmware}</p></section>'
    )


def portal_state(upstream: dict) -> str:
    """The portal's state on the page."""
    if upstream["mode"] == LOCAL:
        return "Local: no portal, the exporter answers"
    state = {None: "not tried yet", True: '<span class="good">reachable</span>', False: '<span class="bad">away</span>'}[upstream["up"]]
    waiting = f", {upstream['queue_bytes']:,} bytes wait for it" if upstream["queue_bytes"] else ""
    return f"Portal {html.escape(upstream['address'])}: {state}{waiting}"


def html_page(told: dict, settings: Settings) -> str:
    """The page at /."""
    devices = "".join(map(card, told["devices"])) or SET_UP.format(host=html.escape(settings.upstream[0]), port=settings.listen_address[1])
    blocked = told["blocked"]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="refresh" content="30"><link rel="icon" href="data:,"><title>sems_mitm</title>'
        f"<style>{STYLE}</style></head><body><header><h1>sems_mitm</h1><p>{portal_state(told['upstream'])}</p></header><main>{devices}</main>"
        f"<footer><p>{blocked} packet{'' if blocked == 1 else 's'} from the portal blocked</p>"
        f'<p><a href="{html.escape(settings.telemetry_path)}">Metrics</a> · <a href="/api/devices">JSON</a> · version {VERSION}</p></footer></body></html>'
    )


class Web:
    """The HTTP side: a thread for each connection, of which there are not many; the oldest makes room for the newest."""

    def __init__(self, store: Store, settings: Settings, is_ready: Callable[[], bool]) -> None:
        self.store, self.settings, self.is_ready = store, settings, is_ready
        self.listening = listeners(*settings.web_address)
        self._open: dict[socket.socket, int] = {}  # connections, the oldest first, and the bytes of their answers
        self._lock = threading.Lock()
        self.rendering = threading.Lock()  # one large answer at a time

    @property
    def port(self) -> int:
        """Where HTTP is served."""
        return self.listening[0].getsockname()[1]

    def start(self) -> None:
        """Serve, in threads that end with the process."""
        for sock in self.listening:
            threading.Thread(target=self._accept, args=(sock,), name="http", daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, peer = listening.accept()
            except OSError as error:
                if listening.fileno() < 0:
                    return
                if error.errno != errno.ECONNABORTED:  # out of descriptors: some will be closed
                    time.sleep(0.5)
                continue
            with self._lock:
                if len(self._open) >= HTTP_CONNECTIONS:
                    self._make_room(next(iter(self._open)))
                self._open[sock] = 0
            try:
                threading.Thread(target=self._serve, args=(sock, peer), name="http", daemon=True).start()
            except RuntimeError:  # no more threads
                self._end(sock)

    def _serve(self, sock: socket.socket, peer: tuple) -> None:
        try:
            with contextlib.suppress(OSError, ValueError):  # the client went, or its connection made room
                sock.settimeout(HTTP_TIMEOUT)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                Requests(sock, peer, self)  # type: ignore[arg-type]
        finally:
            self._end(sock)

    def carries(self, sock: socket.socket, size: int) -> None:
        """An answer of so many bytes waits for a client; the oldest that wait for others make room when all are too much."""
        with self._lock:
            if sock in self._open:
                self._open[sock] = size
            others = [other for other, waiting in self._open.items() if waiting and other is not sock]
            while others and sum(self._open.values()) > HTTP_BYTES:
                self._make_room(others.pop(0))

    def _make_room(self, sock: socket.socket) -> None:
        self._close(sock)
        with self.store.lock:
            self.store.add("sems_mitm_http_closed_connections_total")

    def _close(self, sock: socket.socket) -> None:
        """Make the connection's thread come to its end."""
        self._open.pop(sock, None)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    def _end(self, sock: socket.socket) -> None:
        with self._lock:
            self._close(sock)
        sock.close()

    def close(self) -> None:
        """Listen no more, and end the connections there are."""
        for sock in self.listening:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        with self._lock:
            for sock in list(self._open):
                self._close(sock)


PLAIN = "text/plain; charset=utf-8"


class RequestHead:
    """What the base class reads a request from, bounded: it takes a hundred headers of 64 KiB each."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self.file, self.left = file, HTTP_HEAD
        self.close = file.close

    def readline(self, size: int) -> bytes:
        """A line. Raises ProtocolError when the request's lines together are too long."""
        line = self.file.readline(min(size, self.left))
        self.left -= len(line)
        if not self.left:
            raise ProtocolError("a request's head is too long", line)
        return line


class Requests(http.server.BaseHTTPRequestHandler):
    """The requests of one HTTP connection."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    command = ""  # until a request line is read
    server: Web  # type: ignore[assignment]

    def setup(self) -> None:
        super().setup()
        self.rfile = RequestHead(self.rfile)  # type: ignore[assignment]

    def handle_one_request(self) -> None:
        """Read a request and answer it."""
        self.rfile.left = HTTP_HEAD  # type: ignore[attr-defined]
        try:
            super().handle_one_request()
        except ProtocolError:
            self.send_error(431)
            self.wfile.flush()

    def do_GET(self) -> None:
        """Answer by the path; what no path names is 404."""
        web, path = self.server, self.requestline.split()[1].partition("?")[0]  # self.path lost all leading slashes but one
        now, wall = time.monotonic(), time.time()
        if path == web.settings.telemetry_path:
            self.reply(200, "text/plain; version=0.0.4; charset=utf-8", lambda: exposition(web.store.collect(now, wall)))
        elif path == "/":
            self.reply(200, "text/html; charset=utf-8", lambda: [html_page(overview(web.store, web.settings, now, wall), web.settings)])
        elif path == "/api/devices":
            told = functools.partial(overview, web.store, web.settings, now, wall)
            self.reply(200, "application/json", lambda: json.JSONEncoder(indent=1).iterencode(told()))
        elif path == "/-/healthy":
            self.reply(200, PLAIN, lambda: ["healthy\n"])
        elif path == "/-/ready":
            ready = web.is_ready()
            self.reply(200 if ready else 503, PLAIN, lambda: ["ready\n" if ready else "not ready\n"])
        else:
            self.reply(404, PLAIN, lambda: ["not found\n"])

    do_HEAD = do_GET

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what the base class cannot read, or what is no GET or HEAD."""
        code = 405 if code == 501 else code
        self.request_version = self.protocol_version  # the base class left it at 0.9, which has no headers
        self.close_connection = True  # its body, if there is one, is not read
        self.reply(code, PLAIN, lambda: [f"{http.HTTPStatus(code).phrase}\n"])

    def reply(self, code: int, content_type: str, text: Callable[[], Iterable[str]]) -> None:
        """Send an answer; its text is made one answer at a time, in parts: a large one is not in memory twice."""
        body, headers = bytearray(), {"Content-Type": content_type, **SAFE_HEADERS}
        if code == 405:
            headers["Allow"] = "GET, HEAD"
        with self.server.rendering:
            for part in text():
                body += part.encode()
            if len(body) > 512 and self.wants_gzip():
                packer = zlib.compressobj(1, wbits=31)
                body, headers["Content-Encoding"] = bytearray(packer.compress(body) + packer.flush()), "gzip"
            self.server.carries(self.connection, len(body))
        if self.close_connection:
            headers["Connection"] = "close"
        self.send_response_only(code)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.wfile.flush()
        self.server.carries(self.connection, 0)

    def wants_gzip(self) -> bool:
        """Whether the client takes gzip: named in Accept-Encoding, or *, and not with q=0 (RFC 9110, 12.5.3)."""
        accepted = self.headers.get("Accept-Encoding", "").lower() if getattr(self, "headers", None) else ""
        codings = (part.partition(";") for part in accepted.split(","))
        return any(name.strip() in ("gzip", "*") and not re.fullmatch(r"q=0(\.0*)?", weight.strip()) for name, _, weight in codings)

    def log_message(self, format: str, *args: object) -> None:
        log.debug("http %s %r", self.address_string(), format % args)


SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Vary": "Accept-Encoding",
}


# -------------------------------------------------------------------------------------------------- settings, serve

Settings = argparse.Namespace  # of serve: a value for each row of FLAGS, by its last column


def endpoint(text: str, port_from: int = 1) -> tuple[str, int]:
    """[HOST]:PORT as (host, port); no host is "". Raises ValueError that says what was expected, as all readers of flags."""
    match = re.fullmatch(r"(\[([0-9A-Fa-f:.%\w]*:[0-9A-Fa-f:.%\w]*)\]|[^\[\]:\s/@]*):([0-9]{1,5})", text)
    if not match or not port_from <= int(match[3]) <= 65535:
        raise ValueError("expected HOST:PORT, [v6]:PORT or :PORT")
    return match[2] or match[1], int(match[3])


def listen_endpoint(text: str) -> tuple[str, int]:
    """Where to listen; port 0 is a free one."""
    return endpoint(text, 0)


def portal_endpoint(text: str) -> tuple[str, int]:
    """Where to connect."""
    with contextlib.suppress(ValueError):
        host, port = endpoint(text)
        if host:
            return host, port
    raise ValueError("expected HOST:PORT or [v6]:PORT")


def name_servers(text: str) -> list[tuple[str, int]]:
    """HOST[:PORT] of name servers, comma-separated, or none."""
    if text == "none":
        return []
    found = []
    for part in text.split(","):
        part = part.strip()
        bare = part.count(":") > 1 and not part.startswith("[")
        try:
            found.append(portal_endpoint(f"[{part}]:53" if bare else part if re.search(r":[0-9]+$", part) else f"{part}:53"))
        except ValueError:
            raise ValueError("expected name servers such as 1.1.1.1,192.168.1.1:53, or none") from None
    return found


def networks(text: str) -> list:
    """Networks in CIDR, comma-separated."""
    try:
        return [ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if text]
    except ValueError:
        raise ValueError("expected networks such as 192.168.1.0/24, comma-separated") from None


def duration(text: str) -> float:
    """Seconds of 90s, 5m, 1h30m or 0."""
    match = re.fullmatch(r"(?=.)(?:(\d{1,6})d)?(?:(\d{1,6})h)?(?:(\d{1,6})m)?(?:(\d{1,6})s)?", text, re.ASCII)
    if text == "0":
        return 0
    if not match:
        raise ValueError("expected a duration such as 90s, 5m or 1h30m")
    return sum(int(count) * size for count, size in zip(match.groups(default="0"), (86400, 3600, 60, 1)))


def boolean(text: str) -> bool:
    """true, 1, yes or false, 0, no in any case."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise ValueError("expected true, false, 1, 0, yes or no")
    return values[text.lower()]


def count(text: str) -> int:
    """A positive whole number."""
    if not re.fullmatch(r"[1-9][0-9]{0,5}", text):
        raise ValueError("expected a positive whole number")
    return int(text)


def one_of(*words: str) -> Callable[[str], str]:
    """A reader that takes these words."""

    def word(text: str) -> str:
        if text not in words:
            raise ValueError(f"expected one of {', '.join(words)}")
        return text

    return word


def url_path(text: str) -> str:
    """A path as it stands in a request, without a query."""
    if not re.fullmatch(r"/[!-~]+", text) or "?" in text or text in ("/api/devices", "/-/healthy", "/-/ready"):
        raise ValueError("expected a path that begins with / and is not taken")
    return text


# Every flag of serve: name, default, reader, name in Settings, help. Its environment variable follows from its name.
# fmt: off
FLAGS = (
    ("sems.listen-address", ":20001", listen_endpoint, "listen_address", "where devices connect; HOST:PORT, [v6]:PORT or :PORT"),
    ("sems.upstream", "tcp.goodwe-power.com:20001", portal_endpoint, "upstream", "the portal"),
    ("sems.upstream-dns", "1.1.1.1,8.8.8.8", name_servers, "upstream_dns", "asked for the portal's address when the system's answer is nothing or not globally routable; none turns it off"),
    ("sems.mode", FORWARD, one_of(FORWARD, LOCAL, SPOOL), "mode", "forward: the portal answers the devices. local: no portal, the exporter answers. spool: the exporter answers, and delivers everything to the portal, however late"),
    ("sems-passthrough", "true", boolean, "passthrough", "false is --sems.mode local"),
    ("sems.allow-from", "", networks, "allow_from", "networks whose devices may connect, comma-separated CIDR"),
    ("sems.max-connections", "256", count, "max_connections", "device connections at once"),
    ("sems.max-devices", "256", count, "max_devices", "devices with series of their own"),
    ("sems.capture", "", str, "capture", "append every frame to this file"),
    ("sems.backfill", "", str, "backfill", "append buffered readings to this file"),
    ("web.listen-address", ":14028", listen_endpoint, "web_address", "where HTTP is served"),
    ("web.telemetry-path", "/metrics", url_path, "telemetry_path", "where the metrics are"),
    ("metrics.stale-after", "5m", duration, "stale_after", "when the gauges of a silent device go; 0 is never"),
    ("batsignal", "false", boolean, "batsignal", "Batman on the portal's graph"),
    ("debug", "false", boolean, "debug", "the same as --log.level debug"),
    ("log.level", "info", one_of("debug", "info", "warning", "error"), "log_level", "what is logged"),
)
# fmt: on
METAVARS = {
    listen_endpoint: "[HOST]:PORT",
    portal_endpoint: "HOST:PORT",
    name_servers: "HOST[:PORT],...",
    networks: "CIDR,...",
    count: "N",
    duration: "DURATION",
    boolean: "true|false",
    url_path: "/PATH",
    str: "FILE",
}
BOOLEANS = [name for name, _, reader, _, _ in FLAGS if reader is boolean]


def variable(flag: str) -> str:
    """The environment variable of a flag."""
    return flag.upper().replace(".", "_").replace("-", "_")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)


def spelled_out(arguments: list[str]) -> list[str]:
    """Arguments with --flag and --no-flag as --flag=true and --flag=false, and --flag VALUE as --flag=VALUE."""
    spelled = {f"--{name}": f"--{name}=true" for name in BOOLEANS}
    spelled.update({f"--no-{name}": f"--{name}=false" for name in BOOLEANS})
    valued, left, found = {f"--{name}" for name, *_ in FLAGS} - set(spelled), list(arguments), []
    while left:
        argument = left.pop(0)
        value = f"={left.pop(0)}" if argument in valued and left else ""  # it may begin with a -
        found.append(spelled.get(argument, argument) + value)
    return found


def serve_settings(arguments: list[str], environment: Mapping[str, str], command: str = "serve", about: str = "") -> Settings:
    """The settings of serve: the command line beats the environment, which beats the defaults. Raises UsageError.

    command and about are what --help says, for another command that takes the flags of serve.
    """
    description = about or "Prometheus exporter between GoodWe devices and the SEMS portal."
    parser = Parser(prog=f"sems_mitm.py {command}", description=description, allow_abbrev=False)
    for name, default, reader, key, text in FLAGS:
        metavar = METAVARS.get(reader, key.partition("_")[2].upper() or key.upper())
        parser.add_argument(
            f"--{name}",
            dest=key,
            metavar=metavar,
            help=f"{text} [{default or ('all' if reader is networks else 'off')}; {variable(name)}{f'; or --{name}, --no-{name}' if reader is boolean else ''}]".replace(
                "%", "%%"
            ),
        )
    given = vars(parser.parse_args(spelled_out(arguments)))
    settings, levels = Settings(), {}
    for name, default, reader, key, _ in FLAGS:
        told = ((2, f"--{name}", given[key]), (1, variable(name), environment.get(variable(name)) or None), (0, "", default))
        level, source, text = next((level, source, text) for level, source, text in told if text is not None)
        try:
            value = reader(text)
        except ValueError as error:
            if source != "DEBUG":  # shells set it to all sorts of things
                raise UsageError(f"{source}={ascii(text)[1:-1]}: {error}") from None
            log.warning("ignored: DEBUG=%s is neither true nor false", ascii(text))
            value, level = False, 0
        setattr(settings, key, value)
        levels[key] = level
    return reconciled(settings, levels)


def reconciled(settings: Settings, levels: dict[str, int]) -> Settings:
    """Settings with the two flags that name the mode made one. levels: where each value came from, 2 beats 1 beats 0."""
    local = settings.mode == LOCAL
    if levels["passthrough"] and levels["passthrough"] == levels["mode"] and settings.passthrough == local:
        names = ("--sems-passthrough", "--sems.mode") if levels["mode"] == 2 else ("SEMS_PASSTHROUGH", "SEMS_MODE")
        raise UsageError(f"{names[0]}={str(settings.passthrough).lower()} contradicts {names[1]}={settings.mode}")
    if levels["passthrough"] > levels["mode"]:
        settings.mode = FORWARD if settings.passthrough and local else LOCAL if not settings.passthrough else settings.mode
    settings.upstream_text = endpoint_text(settings.upstream)
    settings.log_level = "debug" if settings.debug and levels["debug"] >= levels["log_level"] else settings.log_level
    return settings


class BindError(OSError):
    """A port that cannot be had."""


def serve(arguments: list[str]) -> int:
    """Run the exporter until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = serve_settings(arguments, os.environ)
    logging.getLogger().setLevel(settings.log_level.upper())
    _, network, web = started(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: network.stop())
    log.info(
        "sems_mitm %s, mode %s: devices connect to port %d, metrics at http://HOST:%d%s",
        VERSION,
        settings.mode,
        network.port,
        web.port,
        settings.telemetry_path,
    )
    network.run()
    web.close()
    return 0


def started(settings: Settings) -> tuple[Store, Network, Web]:
    """An exporter whose ports are bound and whose HTTP is served; `network.run` is left to do. Raises BindError."""
    sys.setswitchinterval(0.0005)  # a scrape must not keep packets waiting for the interpreter
    store = Store(settings.stale_after, settings.max_devices, settings.batsignal)
    zone_ok = zone_is_known(os.environ.get("TZ"), os.path.isfile)
    files = Files(store, settings.capture, settings.backfill)
    exporter = Exporter(store, settings.mode, zone_ok, files.record if files.capture or files.backfill else None)
    try:
        what = ("sems.listen-address", settings.listen_address)
        network = Network(exporter, settings)
        what = ("web.listen-address", settings.web_address)
        web = Web(store, settings, lambda: not network.stopping)
    except (OSError, UnicodeError) as error:  # the latter for what cannot be a host's name
        raise BindError(f"--{what[0]}={endpoint_text(what[1])}: {getattr(error, 'strerror', None) or error}") from None
    network.listening_at.update(sock.getsockname()[:2] for sock in web.listening)
    web.start()
    gc.freeze()  # what is there now stays: the collector need not look at it again
    return store, network, web


# ------------------------------------------------------------------------------------------------------- simulator


class House:
    """A simulated household with a roof: power in W, energy in Wh, by a clock that its user moves on."""

    def __init__(self, seed: int = 1) -> None:
        self.random = random.Random(seed)
        self.clock: datetime | None = None
        self.generation = self.load = 0.0
        self.day, self.uptime, self.total = 0.0, 1667.0, 2_064_200.0  # of the inverter: Wh today, h, Wh
        self.energy = {
            "export": 270_780.0,
            "generation": 579_410.0,
            "import": 801_550.0,
            "standby": 70.0,
            "up": 783_400.0,
            "down": 734_840.0,
        }
        self._cloud = 0.2

    @property
    def export(self) -> float:
        """What goes to the grid; negative while it is bought."""
        return self.generation - self.load

    @property
    def daylight(self) -> bool:
        """Whether the inverter is awake."""
        return self.generation > 0

    def move(self, clock: datetime) -> None:
        """Let time pass until clock, at the powers of before, and find those of now."""
        hours = (clock - self.clock).total_seconds() / 3600 if self.clock else 0.0
        flows = {"export": self.export, "generation": self.generation, "import": -self.export, "standby": -self.generation}
        flows.update(up=self.generation + self.export, down=-self.generation - self.export)
        for name, power in flows.items():
            self.energy[name] += max(power, 0) * hours
        if self.clock and clock.date() != self.clock.date():
            self.day = 0.0
        if self.daylight:
            self.day += self.generation * hours
            self.total += self.generation * hours
            self.uptime += hours
        self.clock = clock
        self._weather(clock.hour + clock.minute / 60 + clock.second / 3600)

    def _weather(self, hour: float) -> None:
        self._cloud = min(max(self._cloud + self.random.uniform(-0.12, 0.12), 0), 0.85)
        height = math.sin(math.pi * (hour - 6.5) / 12.5) if 6.5 < hour < 19 else 0
        self.generation = round(3000 * height**1.3 * (1 - 0.8 * self._cloud), 0) if height > 0.02 else -7.0
        evening = 900 * math.exp(-((hour - 19.5) ** 2) / 4) + 700 * math.exp(-((hour - 7.5) ** 2) / 1.5)
        kettle = 1800 if 6 < hour < 22 and self.random.random() < 0.06 else 0
        self.load = round(220 + evening + kettle + self.random.uniform(0, 90), 0)


def words(number: float, count: int) -> tuple[int, ...]:
    """A whole number as big-endian registers, two's complement."""
    raw = int(number) & (1 << 16 * count) - 1
    return tuple(raw >> 16 * i & 0xFFFF for i in reversed(range(count)))


def text_words(text: str, count: int) -> tuple[int, ...]:
    """ASCII text in registers, filled up with NUL."""
    return struct.unpack(f">{count}H", text.encode("ascii").ljust(2 * count, b"\0"))


class Simulated:
    """A simulated device of a house: `settings()` and `live()` are its register ranges, for `payload`; live is empty while it is off."""

    cls, start = 0, ""  # class, and the first half of its serial number
    settings: Callable[[], list[tuple[int, tuple[int, ...]]]]
    live: Callable[[], list[tuple[int, tuple[int, ...]]]]

    def __init__(self, house: House, number: int = 1) -> None:
        self.house, self.serial = house, f"{self.start}{number:08d}"


class SimulatedMeter(Simulated):
    """A HomeKit 1000: channel 1 is the grid, channel 2 the inverter."""

    cls, start = METER, "91000HKU"

    def settings(self) -> list[tuple[int, tuple[int, ...]]]:
        """The register ranges of a settings packet: what it is, and where it reports to."""
        return [(4608, (12, *text_words("20001,tcp.goodwe-power.com", 15))), (4864, (*text_words("02053-05-000Me05", 8), 0, 4))]

    def live(self) -> list[tuple[int, tuple[int, ...]]]:
        """The register ranges of a live packet, none while the device is off."""
        house = self.house
        volts = 231.0 + house.export / 1500
        out, solar = house.export, house.generation
        energy = [int(house.energy[name] / 10) for name in ("export", "generation", "up", "import", "standby", "down")]
        exported, generated, up, imported, standby, down = (words(number, 3) for number in energy)
        counters = (*exported, *generated, 0, 0, 0, *up, *imported, *standby, 0, 0, 0, *down)
        amperes = (*words(abs(out) * 100 / volts, 2), *words(abs(solar) * 100 / volts, 2), 0, 0)
        powers = (*words(out, 2), *words(solar, 2), 0, 0, *words(out + solar, 2))
        return [(2048, counters), (2096, (int(volts * 10), int(volts * 10) + 1, 0, *amperes, *powers)), (5376, (25600, 0, 0, 71))]


class SimulatedInverter(Simulated):
    """A DNS G3: one string, one phase, off at night."""

    cls, start = GRID_TIED, "53000DSC"

    def settings(self) -> list[tuple[int, tuple[int, ...]]]:
        """The register ranges of a settings packet: what it is, and where it reports to."""
        return [(30221, text_words("410-02065-04", 6)), (40075, text_words("tcp.goodwe-power.com", 26))]

    def live(self) -> list[tuple[int, tuple[int, ...]]]:
        """The register ranges of a live packet, none while the device is off."""
        house = self.house
        if not house.daylight or not house.clock:
            return []
        power, volts = house.generation, 231.0 + house.generation / 1500
        string = 250 + 90 * min(power / 600, 1)
        stamp = struct.unpack(">3H", time_stamp(house.clock))
        none = (0xFFFF,)
        values = (
            *(int(string * 10), int(power * 10.3 / string), 0, 0), *none * 11,
            *(int(volts * 10), *none * 2, int(power * 10 / volts), *none * 2, 5001, *none * 2),
            *words(power, 2), 1, *words(0, 2), 0, *words(power * 1.01, 2), *words(-power / 20, 2), *none * 2, 990, *none,
            *(250 + int(power / 12), *none * 2, int(house.day / 100), *words(house.total / 100, 2), *words(house.uptime, 2), 85),
        )  # fmt: skip
        return [(30100, (*stamp, *values)), (30163, (3800,)), (30172, (59,))]


def simulated_frame(device: Simulated, function: int, when: datetime) -> bytes:
    """A frame of the device as it is now, with the time `when`; nothing while it is off."""
    ranges = device.settings() if function == SETTINGS else device.live()
    stamp = time_stamp(when)
    packet = Packet(OUTBOUND, f"{device.cls:02x}{function:02x}", device.serial, device_iv(stamp), stamp, payload(ranges))
    return encode(packet) if ranges else b""


class SimulatedConnection(threading.Thread):
    """Simulated devices of one house, each with its connection, until `stop`; they connect again when that is lost."""

    def __init__(self, target: tuple[str, int], devices: list[Simulated], interval: float, speed: float, start: datetime) -> None:
        super().__init__(name="simulator", daemon=True)
        self.target, self.devices, self.interval, self.speed, self.start_time = target, devices, interval, speed, start
        self.stopped, self.troubles = threading.Event(), Troubles()
        self._sockets: dict[str, socket.socket] = {}

    def run(self) -> None:
        begin = time.monotonic()
        while not self.stopped.is_set():
            house = self.devices[0].house
            house.move(self.start_time + timedelta(seconds=(time.monotonic() - begin) * self.speed))
            for device in self.devices:
                try:
                    self._report(device)
                except OSError as error:
                    text = f"simulated devices cannot reach {endpoint_text(self.target)}: {error.strerror or error}"
                    self.troubles.say("simulator", text, time.monotonic())
                    self._forget(device.serial)
            self.stopped.wait(self.interval)
        for serial in list(self._sockets):
            self._forget(serial)

    def stop(self) -> None:
        """Close the connections and end the thread."""
        self.stopped.set()
        self.join()

    def _report(self, device: Simulated) -> None:
        now = datetime.now()
        sock = self._sockets.get(device.serial)
        if sock is None:
            sock = self._sockets[device.serial] = socket.create_connection(self.target, timeout=5)
            sock.sendall(simulated_frame(device, SETTINGS, now))
        sock.sendall(simulated_frame(device, LIVE, now))
        sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            while sock.recv(4096):
                pass
            raise ConnectionResetError("closed by the peer")
        sock.settimeout(5)

    def _forget(self, serial: str) -> None:
        if serial in self._sockets:
            self._sockets.pop(serial).close()


class LocalPortal(socketserver.ThreadingTCPServer):
    """A stand-in for the portal: it answers as the real one does."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        super().__init__((host, port), LocalPortalConnection)
        threading.Thread(target=self.serve_forever, name="portal", daemon=True).start()


class LocalPortalConnection(socketserver.BaseRequestHandler):
    """One device's connection to it."""

    """One device's connection to it."""

    """One device's connection to it."""

    def handle(self) -> None:
        """Answer every good packet until the device goes."""
        framer = Framer(OUTBOUND)
        with contextlib.suppress(OSError):
            while data := self.request.recv(RECV_SIZE):
                for piece in framer.feed(data, time.monotonic()):
                    if piece.kind == "frame":
                        with contextlib.suppress(ProtocolError):
                            where = address(piece.data[: OUTBOUND.head], piece.size, OUTBOUND)
                            self.request.sendall(answer(where, datetime.now(), True) * piece.count)


def simulate(arguments: list[str]) -> int:
    """Simulated devices towards an exporter or a portal."""
    parser = Parser(prog="sems_mitm.py simulate", description=simulate.__doc__, allow_abbrev=False)
    parser.add_argument("target", metavar="HOST:PORT", nargs="?", help="where the devices connect")
    parser.add_argument("--interval", metavar="S", type=amount, default=60, help="seconds between packets [60]")
    parser.add_argument("--speed", metavar="N", type=amount, default=1, help="how fast the simulated day goes [1]")
    parser.add_argument("--houses", metavar="N", type=count, default=1, help="households, each with a HomeKit 1000 and a DNS G3 [1]")
    parser.add_argument("--capture", metavar="FILE", help="instead of connecting, write a capture of --days days until now to FILE")
    parser.add_argument("--days", metavar="N", type=amount, default=3, help="length of that capture [3]")
    given = parser.parse_args(arguments)
    if bool(given.target) == bool(given.capture):
        raise UsageError("simulate wants either HOST:PORT or --capture FILE")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        if given.capture:
            return simulate_capture(given.capture, given.days, given.interval)
        target = portal_endpoint(given.target)
    except ValueError as error:
        raise UsageError(f"{given.target!a}: {error}") from None
    except OSError as error:
        raise UsageError(f"--capture={given.capture}: {error.strerror}") from None
    connections = [SimulatedConnection(target, simulated_house(i), given.interval, given.speed, morning()) for i in range(given.houses)]
    for connection in connections:
        connection.start()
    print(f"{2 * given.houses} simulated devices towards {endpoint_text(target)}; Ctrl-C stops them", flush=True)
    wait_for_signal()
    for connection in connections:
        connection.stop()
    return 0


def amount(text: str) -> float:
    """A number between 0.001 and 100000."""
    number = float(text)
    if not 0.001 <= number <= 100_000:
        raise ValueError("out of range")
    return number


def morning() -> datetime:
    """When a simulated day begins: the inverter is awake."""
    return datetime.now().replace(hour=8, minute=0, second=0, microsecond=0)


def simulated_house(number: int) -> list[Simulated]:
    """The devices of a house; each house has serial numbers of its own."""
    house = House(number)
    return [SimulatedMeter(house, number + 1), SimulatedInverter(house, number + 1)]


def simulate_capture(path: str, days: float, interval: float) -> int:
    """Write what the devices of a house would have sent in the days until now; live packets, each at its own time."""
    devices, end = simulated_house(0), time.time()
    with open(path, "w", encoding="ascii") as file:
        wall = end - days * 86400
        while wall <= end:
            when = datetime.fromtimestamp(wall)
            devices[0].house.move(when)
            for device in devices:
                frame = simulated_frame(device, LIVE, when)
                file.write(capture_line(wall, "127.0.0.1:1", OUTBOUND.name, "forwarded", frame) if frame else "")
            wall += interval
    return 0


def wait_for_signal() -> None:
    """Until SIGINT or SIGTERM."""
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    stopped.wait()


def demo(arguments: list[str]) -> int:
    """No hardware and no cloud: a local portal, two simulated devices and the exporter between them."""
    Parser(prog="sems_mitm.py demo", description=demo.__doc__).parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    portal = LocalPortal()
    port = portal.server_address[1]
    settings = serve_settings([f"--sems.upstream=127.0.0.1:{port}"], {})
    settings.listen_address, settings.web_address = free_endpoint("127.0.0.1", 20001), free_endpoint("", 14028)
    _, network, web = started(settings)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: network.stop())
    devices = SimulatedConnection(("127.0.0.1", network.port), simulated_house(0), 1, 360, morning())
    devices.start()
    print(DEMO_TEXT.format(web=web.port, devices=network.port, portal=port), flush=True)
    network.run()
    devices.stop()
    web.close()
    portal.shutdown()
    portal.server_close()
    print("stopped")
    return 0


DEMO_TEXT = """A HomeKit 1000 and a DNS G3 send a solar day that takes four minutes.

  open  http://localhost:{web}/             the page
        http://localhost:{web}/metrics      what Prometheus scrapes
        http://localhost:{web}/api/devices  the same as JSON

devices -> 127.0.0.1:{devices} -> exporter -> 127.0.0.1:{portal}, a local portal. Ctrl-C stops it all."""


def free_endpoint(host: str, port: int) -> tuple[str, int]:
    """The first port from `port` on that can be listened on. Raises UsageError."""
    for number in range(port, port + 100):
        try:
            for sock in listeners(host, number):
                sock.close()
        except OSError:
            continue
        return host, number
    raise UsageError(f"no free port from {port} on")


# ---------------------------------------------------------------------------------------------------------- decode


def stretches(sources: list[str]) -> Iterator[tuple[str, bytes]]:
    """(direction or "", bytes) of each argument of decode: - is standard input, a file is read, all else is hex.

    Raises UsageError for what is neither.
    """
    typed = ""
    for source in sources:
        if source == "-" or os.path.isfile(source):
            yield from file_stretches(read_file(source))
        else:
            typed += f"{source} "
    if typed:
        yield "", from_hex(typed)


def read_file(path: str) -> bytes:
    """A file, or standard input for -. Raises UsageError."""
    try:
        if path == "-":
            return sys.stdin.buffer.read()
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None


def file_stretches(data: bytes) -> Iterator[tuple[str, bytes]]:
    """A capture's records, whole JSON or a line each, whatever is cut skipped; or hex; or the bytes themselves."""
    text = data.decode("latin-1")
    if not text.lstrip().startswith(("{", "[")):
        yield "", data if OUTBOUND.prefix in data else from_hex(text)
        return
    try:
        whole = json.loads(text)
        records = whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError):
        records = [record(line) for line in text.splitlines()]
    for entry in records:
        if isinstance(entry, dict) and isinstance(entry.get("hex"), str):
            with contextlib.suppress(UsageError):
                yield str(entry.get("direction", "")), from_hex(entry["hex"])


def record(line: str) -> object:
    """A line of a capture; None if it is cut."""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def from_hex(text: str) -> bytes:
    """Bytes of hex digits in any spacing. Raises UsageError."""
    digits = re.sub(r"0x|\\x|[\s,:;|\"'-]", "", text)
    try:
        return bytes.fromhex(digits)
    except ValueError:
        raise UsageError(f"neither a file nor whole bytes in hex: {text.strip()[:40]!a}") from None


def pieces_of(direction: str, data: bytes) -> list[tuple[Wire, Piece]]:
    """What is in captured bytes: of the direction, or of both if that is not known."""
    if direction == INBOUND.name:
        return [(INBOUND, piece) for piece in cut(INBOUND, data)]
    found = []
    for piece in cut(OUTBOUND, data):
        inward = [] if direction or piece.kind == "frame" else cut(INBOUND, piece.data)
        better = any(other.kind in ("frame", "keepalive") for other in inward)
        found += [(INBOUND, other) for other in inward] if better else [(OUTBOUND, piece)]
    return found


def cut(wire: Wire, data: bytes) -> list[Piece]:
    """The pieces of a whole stream, each frame by itself."""
    framer = Framer(wire)
    return [
        Piece(piece.kind, piece.data[at : at + piece.size], 1, piece.size)
        for piece in framer.feed(data, 0) + framer.close(0)
        for at in range(0, len(piece.data), piece.size)
    ]


def described(wire: Wire, piece: Piece, told: dict[str, str]) -> dict:
    """A piece as decode prints it. told: serial number to the model name that the device gave."""
    keys = ("direction", "type", "serial", "model", "time", "crc_ok", "envelope", "blocks", "values", "error", "hex")
    found: dict = dict.fromkeys(keys)
    found.update(direction=wire.name, type=piece.kind, crc_ok=piece.kind == "frame", hex=piece.data.hex())
    if piece.kind in ("junk", "keepalive"):
        found.update(crc_ok=None, error="no frame" if piece.kind == "junk" else None)
        return found
    if piece.kind == "malformed":
        found["error"] = "bad checksum, or cut"
    try:
        where = address(piece.data[: wire.head], len(piece.data), wire)
        packet = decode(piece.data, wire)
        found.update(type=where.type, serial=where.serial, model=model(where.serial, told.get(where.serial, "")))
        found.update(envelope={LONG: "long", SHORT: "short", ANSWER: "answer"}[where.form])
        stamp = device_time(packet.time or packet.iv[:6] if wire is OUTBOUND else packet.iv[5::-1])
        found.update(time=stamp and stamp.isoformat())
        found.update(contents(where, packet))
    except ProtocolError as error:
        found["error"] = found["error"] or str(error)
    return found


def contents(where: Address, packet: Packet) -> dict:
    """blocks and values of a packet. Raises ProtocolError."""
    if packet.wire is INBOUND:
        meaning = allowed(where, packet.clear, {where.cls, *CLOCK})
        first, last = struct.unpack_from(">HH", packet.clear)
        clock = device_time(packet.clear[4:10])
        write = {"first_register": first, "last_register": last, "clock": clock and clock.isoformat()} if where.type == CLOCK_TYPE else {}
        return {"values": {"meaning": meaning or "not let through", **write, "clear": packet.clear.hex()}}
    if where.function == CONFIRMATION:
        first, last, status = struct.unpack_from(">HHB", packet.clear)
        return {"values": {"first_register": first, "last_register": last, "status": status}}
    if where.function not in DATA:
        return {"values": {"clear": packet.clear.hex()}}
    ranges = blocks(packet.clear)
    taken = reading(family(where.cls, where.serial), registers(packet.clear))
    kind = kind_of(where.cls)
    values: dict = {f"{metric}{{{labels}}}" if labels else metric: number for (metric, labels), number in taken.values.items()}
    values.update({f'{kind}_unknown_register{{register="{register}"}}': word for register, word in taken.unknown.items()})
    shown = [{"first": first, "last": first + len(block) - 1, "words": list(block)} for first, block in ranges]
    return {"blocks": shown, "values": {**values, **taken.info}}


def redacted(wire: Wire, piece: Piece, aliases: dict[bytes, bytes]) -> Piece:
    """The piece with other serial numbers, in clear and in cipher, its CRC good or bad as it was."""
    data = piece.data
    if piece.kind not in ("frame", "malformed"):
        return piece._replace(data=replaced(data, aliases))
    try:
        packet = decode(data, wire)
    except ProtocolError:
        changed = replaced(data[:-2], aliases)
        good = piece.kind == "frame"
        return piece._replace(data=changed + (crc16(changed).to_bytes(2, wire.order) if good else data[-2:]))  # type: ignore[arg-type]
    serial = aliases[packet.serial.encode()].decode()
    frame = encode(packet._replace(serial=serial, clear=replaced(packet.clear, aliases)))
    if piece.kind == "malformed":
        frame = replaced(frame[:-1] + bytes([frame[-1] ^ 1]), aliases)  # what it claims may hold other frames in clear
    return piece._replace(data=frame)


def serials_in(data: bytes) -> list[bytes]:
    """What stands where frames of either direction have their serial number, whole or cut, good frame or not."""
    # 8 bytes behind a GW, that of POSTGW too if the envelope is short; 10 if it is long
    places = [match.start() + behind for match in re.finditer(b"GW", data) for behind in (8, 10)]
    found = [re.match(rb"[ -~]{9,16}", data[place : place + 16]) for place in places]
    return [match[0] for match, place in zip(found, places) if match and match.end() in (16, len(data) - place)]


def replaced(data: bytes, aliases: dict[bytes, bytes]) -> bytes:
    """Data with each serial number's alias in its place."""
    for serial, alias in aliases.items():
        data = data.replace(serial, alias)
    return data


def decode_command(arguments: list[str]) -> int:
    """Captured bytes, hex or capture files, as one JSON object a frame."""
    parser = Parser(prog="sems_mitm.py decode", description=decode_command.__doc__, allow_abbrev=False)
    parser.add_argument(
        "source", metavar="FILE|-|HEX", nargs="+", help="capture files, files with hex, - for standard input, or hex in any spacing"
    )
    parser.add_argument("--redact", action="store_true", help="with other serial numbers, everywhere, so that it can go into a bug report")
    given = parser.parse_args(arguments)
    found = [entry for direction, data in stretches(given.source) for entry in pieces_of(direction, data)]
    told: dict[str, str] = {}
    aliases: dict[bytes, bytes] = {}
    for wire, piece in found:
        with contextlib.suppress(ProtocolError):
            for serial in serials_in(piece.data):
                aliases.setdefault(serial, (serial[:8] + f"XXXX{len(aliases) + 1:04d}".encode())[: len(serial)])
            if wire is OUTBOUND and piece.kind == "frame":
                packet = decode(piece.data, wire)
                name = info(registers(packet.clear)).get("model")
                alias = aliases[packet.serial.encode()].decode()
                told.update({packet.serial: name, alias: name} if name else {})
    for wire, piece in found:
        print(json.dumps(described(wire, redacted(wire, piece, aliases) if given.redact else piece, told)))
    return 0


# -------------------------------------------------------------------------------------------------------- backfill


class Calendar:
    """Local times of one device to UTC, in the order in which they arrived.

    In the hour that a clock change repeats, a time is of the first pass until the times step back; where the device sends
    the newest first, of the second pass until they step forward.
    """

    def __init__(self) -> None:
        self.last: tuple[datetime, bytes] | None = None
        self.falling = False
        self.fold: int | None = None  # while in the repeated hour

    def utc(self, when: datetime, frame: bytes) -> float:
        """Seconds since 1970 of a frame's time."""
        first, second = when.timestamp(), when.replace(fold=1).timestamp()
        repeated = first < second and datetime.fromtimestamp(first) == when.replace(fold=0)
        last, self.last = self.last, (when, frame)
        if last and last[0] != when and not (repeated and self.fold is not None):
            self.falling = when < last[0]
        if not repeated:
            self.fold = None
        elif self.fold is None or last is None:
            self.fold = int(self.falling)
        elif last[1] != frame and (when == last[0] or (when < last[0]) != self.falling):
            self.fold = 1 - int(self.falling)
        return second if repeated and self.fold else first


def history(sources: Iterable[tuple[str, bytes]], extra: str) -> dict[str, dict[str, dict[float, float]]]:
    """Metric to series (labels) to samples, of the readings in captures."""
    frames = [
        piece.data
        for direction, data in sources
        for wire, piece in pieces_of(direction, data)
        if wire is OUTBOUND and piece.kind == "frame"
    ]
    told, calendars, found = {}, collections.defaultdict(Calendar), {name: {} for name in sorted(METRICS)}  # type: ignore[var-annotated]
    packets = []
    for frame in frames:
        with contextlib.suppress(ProtocolError):
            packet = decode(frame, OUTBOUND)
            all_words = registers(packet.clear)
            packets.append((frame, packet, all_words))
            if name := info(all_words).get("model"):
                told[packet.serial] = name
    for frame, packet, all_words in packets:
        cls, function, when = int(packet.type[:2], 16), int(packet.type[2:], 16), device_time(packet.time)
        if function not in (LIVE, BUFFERED) or when is None:
            continue
        labels_of_device = device_labels(identity(kind_of(cls), packet.serial, told.get(packet.serial, "")))
        seconds = calendars[packet.serial, function].utc(when, frame)
        for (metric, labels), number in reading(family(cls, packet.serial), all_words).values.items():
            series = ",".join(part for part in (labels_of_device, labels, extra) if part)
            found[metric].setdefault(series, {})[seconds] = number
    return found


def openmetrics(found: dict[str, dict[str, dict[float, float]]]) -> Iterator[str]:
    """OpenMetrics text: families together, the samples of a series by time, # EOF at the end."""
    for metric, series in found.items():
        if series:
            kind, help_text = METRICS[metric]
            name = metric[: -len("_total")] if kind == "counter" else metric
            yield f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
        for labels, samples in series.items():
            yield "".join(f"{metric}{{{labels}}} {number} {seconds:.0f}\n" for seconds, number in sorted(samples.items()))
    yield "# EOF\n"


def backfill(arguments: list[str]) -> int:
    """Capture files as OpenMetrics text for promtool tsdb create-blocks-from openmetrics."""
    parser = Parser(prog="sems_mitm.py backfill", description=backfill.__doc__, allow_abbrev=False)
    parser.add_argument("file", metavar="FILE", nargs="+", help="files of --sems.backfill or --sems.capture, - for standard input")
    parser.add_argument("--job", help="value of a label job, as your Prometheus gives it to this exporter")
    parser.add_argument("--instance", help="value of a label instance")
    parser.add_argument(
        "--label", metavar="NAME=VALUE", action="append", default=[], help="another label that your Prometheus adds; repeatable"
    )
    given = parser.parse_args(arguments)
    for path in given.file:
        if path != "-" and not os.path.isfile(path):
            raise UsageError(f"{path}: no such file")
    more = [("job", given.job), ("instance", given.instance), *(text.partition("=")[::2] for text in given.label)]
    for text in given.label:
        if not re.fullmatch(r"(?!(device|model|serial|job|instance)=)[a-zA-Z_][a-zA-Z0-9_]*=.+", text):
            raise UsageError(f"--label={text!a}: expected NAME=VALUE, and a name that is not there yet")
    extra = ",".join(label(name, value) for name, value in more if value)
    found = history(stretches(given.file), extra)
    sys.stdout.writelines(openmetrics(found))
    times = {seconds for series in found.values() for samples in series.values() for seconds in samples}
    shown = [time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds)) for seconds in sorted(times)]
    print(f"readings of {len(shown)} times" + (f", {shown[0]} to {shown[-1]}" if shown else ""), file=sys.stderr)
    return 0


# ---------------------------------------------------------------------------------------------------------- doctor

OK, WARN, FAIL = "ok", "warn", "fail"
Finding = collections.namedtuple("Finding", "state text step", defaults=("",))


def doctor(arguments: list[str]) -> int:
    """Check the set-up and say what to do next; takes the flags of serve."""
    settings = serve_settings(arguments, os.environ, "doctor", "Check the set-up and say what to do next; exit code 0 if nothing fails.")
    body = local_get(settings, "/api/devices")
    running = json.loads(body) if body else None
    if running:  # it may have other flags
        settings.mode = running["upstream"]["mode"]
        settings.upstream = portal_endpoint(running["upstream"]["address"] or settings.upstream_text)
    findings = [*port_findings(settings), *clock_findings(time.time(), os.environ.get("TZ")), *device_findings(settings, running)]
    if settings.mode == LOCAL:
        findings.append(Finding(OK, "mode local: no portal is needed"))
    else:
        findings += [*name_findings(settings), portal_finding(settings)]
    for finding in findings:
        print(f"{finding.state:4}  {finding.text}" + (f"\n      -> {finding.step}" if finding.step else ""))
    counts = collections.Counter(finding.state for finding in findings)
    print(f"\n{counts[OK]} ok, {counts[WARN]} to look at, {counts[FAIL]} to mend")
    return 1 if counts[FAIL] else 0


def port_findings(settings: Settings) -> Iterator[Finding]:
    """Whether the two ports are free, or the exporter has them."""
    running = local_get(settings, "/-/healthy") is not None
    for name, address in (("sems.listen-address", settings.listen_address), ("web.listen-address", settings.web_address)):
        where = endpoint_text(address)
        try:
            for sock in listeners(*address):
                sock.close()
            free = Finding(OK, f"port {where} is free")
            stopped = Finding(WARN, f"port {where} is free, though an exporter runs", f"start doctor with the exporter's --{name}")
            yield stopped if running else free
        except OSError as error:
            if running and error.errno == errno.EADDRINUSE:
                yield Finding(OK, f"port {where} is in use, and an exporter runs")
            else:
                step = (
                    f"end what uses it, or choose another with --{name}"
                    if error.errno == errno.EADDRINUSE
                    else f"choose another with --{name}"
                )
                yield Finding(FAIL, f"port {where} cannot be had: {error.strerror or error}", step)


def clock_findings(wall: float, zone: str | None) -> Iterator[Finding]:
    """Whether local time can be told."""
    local = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(wall))
    if wall < RELEASED:
        yield Finding(FAIL, f"this machine's clock is wrong: {local}", "let it get the time from the network, and start again")
    elif not zone_is_known(zone, os.path.isfile):
        yield Finding(
            FAIL,
            f"TZ={zone} is no time zone that this system knows",
            "install its time zones, or use a rule such as CET-1CEST,M3.5.0,M10.5.0/3",
        )
    else:
        yield Finding(OK, f"local time is {local}")
    if zone is None and time.timezone == 0 and not time.daylight:
        yield Finding(WARN, "the time zone is UTC", "if you do not live there, set TZ: devices have local time")


def device_findings(settings: Settings, running: dict | None) -> Iterator[Finding]:
    """What a running exporter has seen."""
    if running is None:
        yield Finding(WARN, "no exporter runs on this machine", "start it: python3 sems_mitm.py")
        return
    metrics = (local_get(settings, settings.telemetry_path) or b"").decode()
    if any(float(count) for count in re.findall(r'^sems_mitm_\w+_total\{reason="loop"\} (\S+)$', metrics, re.M)):
        step = "redirect only what the devices send, not this machine: a DNAT rule needs the devices' addresses (-s)"
        yield Finding(FAIL, "the exporter has met itself instead of the portal", step)
    devices = running["devices"]
    for device in devices:
        text = f"{device['model']} {device['full_serial']}: last packet {span(device['age_seconds'])} ago"
        yield (
            Finding(OK, text)
            if device["up"]
            else Finding(WARN, text, "an inverter is silent at night; otherwise look at its Wi-Fi, and power-cycle its module")
        )
    if not devices:
        yield Finding(WARN, "no device has connected yet", "let the portal's name lead here, then power-cycle the device's module")


def local_get(settings: Settings, path: str) -> bytes | None:
    """What an exporter on this machine answers, None if there is none."""
    host, port = settings.web_address
    connection = http.client.HTTPConnection(host if host not in ("", "0.0.0.0", "::") else "127.0.0.1", port, timeout=3)
    try:
        connection.request("GET", path)
        answered = connection.getresponse()
        body = answered.read(16 << 20)
        return body if answered.status == 200 and answered.getheader("Content-Security-Policy") else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def name_findings(settings: Settings) -> Iterator[Finding]:
    """What the name services say of the portal."""
    host, port = settings.upstream
    if is_literal(host):
        yield Finding(OK, f"the portal is given as {host}: no name service is asked")
        return
    system = sorted({plain(endpoint.sockaddr[0]) for endpoint in system_addresses(host, port)})
    nowhere = [address for address in system if ipaddress.ip_address(address).is_loopback or ipaddress.ip_address(address).is_unspecified]
    here = [address for address in system if is_this_machine(address) and address not in nowhere]
    if nowhere:
        text = f"this machine's name service says {host} is {', '.join(nowhere)}: that leads a device nowhere"
        yield Finding(WARN, text, "let the name service that the devices ask answer with this machine's address in your network")
    elif here:
        yield Finding(OK, f"this machine's name service says {host} is {', '.join(here)}: an override that leads here")
    elif not system:
        yield Finding(
            WARN, f"this machine's name service has no address for {host}", "if it is the one that your devices ask, add the override there"
        )
    elif any(map(is_global, system)):
        text = f"this machine's name service says {host} is {', '.join(system)}: no override"
        yield Finding(
            WARN, text, "fine if the devices ask another one, or are sent here by a DNAT rule or their own web page; else add the override"
        )
    else:
        yield Finding(
            WARN,
            f"this machine's name service says {host} is {', '.join(system)}: not this machine",
            "if that is the override, it leads to the wrong address",
        )
    if here and any(":" in address and is_global(address) for address in system):
        yield Finding(WARN, f"it also gives an IPv6 address for {host}", "a device with IPv6 would go there: answer none for this name")
    for server in settings.upstream_dns:
        yield server_finding(server, host)


def server_finding(server: tuple[str, int], host: str) -> Finding:
    """What one server of --sems.upstream-dns says of the portal."""
    where = endpoint_text(server)
    try:
        found = ask_dns(server, host)
    except (OSError, UnicodeError) as error:
        return Finding(
            WARN, f"{where} cannot be asked for {host}: {error}", "let --sems.upstream-dns name a server that this machine reaches"
        )
    if found is None:
        return Finding(
            WARN, f"{where} does not answer for {host}", "a firewall may keep UDP port 53 closed; name another in --sems.upstream-dns"
        )
    if not found:
        return Finding(WARN, f"{where} says that {host} does not exist", "look at --sems.upstream")
    if not any(map(is_global, found)):
        return Finding(
            FAIL,
            f"{where} says {host} is {', '.join(found)}: overridden too",
            "the router redirects all DNS; exempt this machine, or give --sems.upstream as an address",
        )
    return Finding(OK, f"{where} says {host} is {', '.join(found)}")


def portal_finding(settings: Settings) -> Finding:
    """Whether the portal can be reached."""
    try:
        host, port = settings.upstream
        found = resolve(host, port, settings.upstream_dns)
    except Unresolved as error:
        return Finding(
            FAIL,
            str(error),
            "look at this machine's network and at --sems.upstream-dns; until then devices are decoded, and in mode forward not answered",
        )
    for candidate in found:
        try:
            with socket.create_connection(candidate.sockaddr[:2], timeout=5):
                return Finding(OK, f"the portal answers at {endpoint_text(candidate.sockaddr)}")
        except OSError as error:
            why = error
    text = f"the portal at {endpoint_text(found[-1].sockaddr)} cannot be reached: {why}"
    return Finding(FAIL, text, "look at this machine's network and firewall; --sems.mode spool keeps what devices send until then")


# ---------------------------------------------------------------------------------------------------- command line


def version(arguments: list[str]) -> int:
    """Version, Python and platform as JSON."""
    Parser(prog="sems_mitm.py version", description=version.__doc__).parse_args(arguments)
    system = os.uname()
    print(
        json.dumps(
            {"version": VERSION, "python": sys.version.split()[0], "platform": f"{system.sysname} {system.release} {system.machine}"}
        )
    )
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": serve,
    "demo": demo,
    "simulate": simulate,
    "decode": decode_command,
    "backfill": backfill,
    "doctor": doctor,
    "version": version,
}
COMMANDS_TEXT = "\n".join(f"  {name:9} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit code: 0 fine, 1 failed, 2 wrong usage."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"usage: python3 sems_mitm.py [COMMAND] [...]\n\n{COMMANDS_TEXT}\n\nCOMMAND --help tells more; without one it is serve.")
        return 0
    command = "serve" if not arguments or arguments[0].startswith("-") else arguments[0]
    rest = arguments[1:] if arguments[:1] == [command] else arguments
    try:
        if command not in COMMANDS:
            raise UsageError(f"{command!a}: no such command; there are {', '.join(COMMANDS)}")
        return COMMANDS[command](rest)
    except (UsageError, BindError) as error:
        print("sems_mitm.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
