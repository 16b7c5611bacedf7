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

    limits, errors; registers, internal metrics  what is bounded; what there is to know, a row a quantity
    checksum, cipher; frames                     CRC-16/MODBUS, AES-128-CBC; Framer: bytes in, pieces out, none lost
    packets                                      addresses, envelopes, registers; encode is the inverse of decode
    readings; identity and time                  registers to values and texts; model, family, labels; the bat
    counters; metrics                            protected from falls and jumps; devices, the store, exposition text
    rules                                        what is let through, who answers, what waits: no socket, no thread
    files                                        capture and backfill; the spool, a table of SQLite
    network                                      names; Connection, Reader, Peer; Portal and PortalLink
    modes; loop                                  Relay (forward), Answerer (local, spool), SpoolSender; the rounds
    household; page, API, Home Assistant; HTTP   what a house makes and takes, and how it is shown
    settings, serve; simulator; demo             the flags, how the parts are put together; a house without hardware
    recordings; decode; backfill; doctor         captures and dumps to pieces, JSON, OpenMetrics; checks of a set-up

One thread, that of Loop, does everything except name look-ups. A round: owners (Relay, Answerer, SpoolSender,
HttpClient) read and queue, and a Relay sends to the portal at once; the spool commits; owners settle, which is where
they answer and send what waits; files are written.
"""

from __future__ import annotations

import argparse
import binascii
import collections
import contextlib
import difflib
import errno
import functools
import gc
import html
import io
import ipaddress
import itertools
import json
import logging
import math
import operator
import os
import random
import re
import resource
import selectors
import shlex
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import BinaryIO, Union

sys.modules.setdefault("ssl", None)  # type: ignore[arg-type]  # http.server would load OpenSSL, 4 MB that nothing here uses
import http.server  # noqa: E402

if sys.modules["ssl"] is None:
    del sys.modules["ssl"]

VERSION = "3.0.0"
RELEASED = 1795996800  # 2026-11-30: a machine whose clock is before this is wrong, and sets no device's clock

# ---------------------------------------------------------------------------------------------------------- limits

RECV_SIZE = 16 << 10  # one read of a socket: enough for a burst, small enough that others need not wait
SEND_SIZE = 64 << 10  # one write: so many small pieces are joined
SOCKET_BUFFERS = 16 << 10  # the kernel's buffers of a connection, each way: 256 connections are memory, too
SEGMENT = 4 << 10  # bytes of a TCP segment at most
EVENTS = 32  # sockets that are read, or connections accepted, before a commit and a settle
PATIENCE = {"outbound": 30, "inbound": 5}  # s that the bytes of an unfinished frame wait for its end
BACKLOG = 256 << 10  # bytes that wait for a connected peer: above it the other side is not read
ANSWERS = 64 << 10  # bytes of our own answers that wait for a device: above it the device is not read
QUEUE = 1 << 20  # bytes of a device's frames that wait for an absent portal, as long as the device is connected
QUEUES = 16 << 20  # bytes in all queues in memory
SPOOL_MEMORY = (4 << 20, 16 << 20)  # bytes that a spool in memory holds: of a device, of all
SPOOL_FILE = (32 << 20, 256 << 20)  # the same in a file: three months of a HomeKit 1000
SPOOL_LOCKED = 2  # s to wait for the process before us to let its spool file go
SPOOL_RESERVE = (0.02, 1 << 20, 64 << 20)  # part of its disk that a spool file leaves free, at least, at most
NEWEST = 64  # waiting frames of a spool in which a repeat is recognized
WINDOW, WINDOW_OF_TYPE = 32, 16  # frames of a spool that are under way unanswered: all, of one type
HESITATION = 2  # s for which a type with WINDOW_OF_TYPE unanswered frames holds the other types back
GIVEN_UP = 3  # failed deliveries of a frame, each after an ACK for another frame, before it is deleted
ANSWER_TIMEOUT = 30  # s for the portal to answer a frame of a spool
STALL = 60  # s without progress of what waits for a peer, before it counts as lost
CONNECT_TIMEOUT = 10  # s for a look-up, and for an attempt to connect; if there are several addresses, half for each
ADDRESSES = 4  # of the portal that an attempt tries
BACKOFF = (1, 60)  # s between attempts to reach the portal, doubling
SILENCE = 30 * 60  # s before a silent device's connection is closed, and an idle spool's
STRANGER = 60  # s without a byte after which a device's connection is named in the log
STRANGERS_LISTED = 16  # hosts that do not speak this protocol and are remembered
LAST_ATTEMPT = 2  # s for an attempt under way when its device closes
LINGER = 2  # s for the portal's last words after its device has gone
SHUTDOWN = 2  # s to send what is queued at the end
TICK = 1  # s between looks at deadlines
SLOW = 1  # s in a file system after which the log names it
LOOP_WINDOW = 2  # s in which a device's connection that begins with what we sent to the portal is a loop
WRITES = 16  # to the portal that are remembered for each connection: the first, and the newest
RETURN_WINDOW = 60  # s in which a frame that left a spool and comes in again is a loop
SENT_FRAMES = 4096  # of spools that are remembered for that
DECODING = 0.25  # s that decoding can take before other work goes on
DECODED = 3  # of a device's waiting packets of a function: what the jump rule needs to see
OTHER_TYPES = 32  # packet types beyond the known with a label of their own
UNKNOWN_REGISTERS = 128  # series of unknown registers a device
HTTP_CONNECTIONS = 128  # at once
HTTP_HEAD = 16 << 10  # bytes of a request's head
HTTP_HEAD_TIMEOUT = 10  # s for a request's head
HTTP_ANSWER_TIMEOUT = 30  # s for a client to take an answer
HTTP_ANSWERS = 8 << 20  # bytes of answers that wait for slow clients
LOG_HEX = 256  # bytes of a packet in a log line
PERIOD, CLOCK_PERIOD = 60, 3600  # s in which the same trouble is one line; the second for a wrong clock

# ---------------------------------------------------------------------------------------------------------- errors


class ProtocolError(ValueError):
    """The peer sent nonsense. Any other exception on a peer's bytes is a bug."""


class UsageError(ValueError):
    """A flag, variable or argument of the command line has a value that cannot be used: exit code 2."""


class StartError(OSError):
    """A port, a file or a time zone that a command needs cannot be had: exit code 1."""


# ------------------------------------------------------------------------------------------------------- registers
#
# A quantity is a row: metric, label with its values in order, how it is read by the families at the head of the table
# (a column for each, or for two that agree; empty is not at all), help.
#
#     u16/10 35103 35107 35111? -     a kind (see KINDS), divided by 10 (* is multiplied) for the metric's unit; then the
#                                     first register for each label value: ? is from register maps alone, - is not there
#     s32 36025 if 36004=1            there only while that register of the same packet holds that word
#     u16 1 2 if 35184>0 35266>0      there only while that register is there and neither 0 nor FFFF; one condition is for
#                                     all label values, or each has its own
#     f32 36015, u64 36104            another place of the same number, which counts instead while it is above 0
#
# The words of a value follow one another, the high one first. A metric whose name ends with _total is a counter, any other
# a gauge. Names and units without a base unit are the original exporter's.

SEEN = "capture"  # in real traffic
MAP = "map"  # in public register maps alone
GUESS = "inferred"  # all of a HomeKit 3000, by its likeness to the 1000

# fmt: off
TABLES = (
    # the grid, by a HomeKit or by the meter of a hybrid
    (("HK1000", "HK3000", "HYBRID"), (
        ("meter_energy_export_decawatt_hours_total", "", "u48 2048", "u48 2057", "f32/10 36015 if 36004=1, u64 36104? if 36004=1", "Cumulative energy exported to the grid."),
        ("meter_energy_import_decawatt_hours_total", "", "u48 2060", "u48 2069", "f32/10 36017 if 36004=1, u64 36120? if 36004=1", "Cumulative energy imported from the grid."),
        ("meter_power_export_watts",                 "", "s32 2105", "s32 2111", "s32 36025 if 36004=1",                            "Power exported to the grid; negative while importing."),
        ("meter_frequency_hertz",                    "", "",         "",         "u16/100 36014 if 36004=1",                        "Grid frequency at the meter."),
    )),
    # the channels of a meter
    (("HK1000 HK3000", "HYBRID"), (
        ("meter_channel_energy_export_watthours_total", "channel 1 2 3", "u48*10 2048 2051 2054",  "",                                    "Cumulative energy exported or generated on a meter channel."),
        ("meter_channel_energy_import_watthours_total", "channel 1 2 3", "u48*10 2060 2063 2066",  "",                                    "Cumulative energy imported on a meter channel."),
        ("meter_channel_power_watts",                   "channel 1 2 3", "s32 2105 2107 2109",     "s32 36019 36021 36023 if 36004=1",    "Power of a meter channel; positive is export or generation."),
        ("meter_voltage_volts",                         "channel 1 2 3", "u16/10 2096 2097 2098",  "u16/10 36052 36053 36054 if 36004=1", "Voltage of a meter channel."),
        ("meter_current_amperes",                       "channel 1 2 3", "u32/100 2099 2101 2103", "u16/10 36055 36056 36057 if 36004=1", "Current of a meter channel."),
    )),
    # what a HomeKit 1000 makes of its channels: the first is the grid, the second the PV array
    (("HK1000",), (
        ("meter_energy_generation_decawatt_hours_total",                    "", "u48 2051", "Cumulative energy generated by the PV array."),
        ("meter_sum_of_energy_generation_and_export_decawatt_hours_total",  "", "u48 2057", "Cumulative energy while the sum of all channels was positive."),
        ("meter_sum_of_energy_import_less_generation_decawatt_hours_total", "", "u48 2069", "Cumulative energy while the sum of all channels was negative."),
        ("meter_power_generation_watts",                                    "", "s32 2107", "Power generated by the PV array; small negative values are the inverter's own consumption at night."),
        ("meter_sum_of_power_generation_and_export_watts",                  "", "s32 2111", "Sum of the power of all channels; of little use where one channel is the grid and another the PV array."),
    )),
    # inverters
    (("GRID", "HYBRID"), (
        ("inverter_string_voltage_volts",   "string 1 2 3 4 5 6", "u16/10 30103 30105 30107? 30109? 30111? 30113?", "u16/10 35103 35107 35111? 35115? - -", "DC voltage of a PV input."),
        ("inverter_string_current_amperes", "string 1 2 3 4 5 6", "u16/10 30104 30106 30108? 30110? 30112? 30114?", "u16/10 35104 35108 35112? 35116? - -", "DC current of a PV input."),
        ("inverter_string_power_watts",     "string 1 2 3 4 5 6", "u32 30150? 30152? 30154? 30156? 30158? 30160?",  "u32 35105 35109 35113? 35117? - -",    "DC power of a PV input."),
        ("inverter_line_voltage_volts",     "line 12 23 31",      "u16/10 30115? 30116? 30117?",                    "",                                     "AC voltage between two phases."),
        ("inverter_phase_voltage_volts",    "phase 1 2 3",        "u16/10 30118 30119? 30120?",                     "u16/10 35121 35126 35131",             "AC voltage of a phase."),
        ("inverter_phase_current_amperes",  "phase 1 2 3",        "u16/10 30121 30122? 30123?",                     "u16/10 35122 35127 35132",             "AC current of a phase."),
        ("inverter_phase_frequency_hertz",  "phase 1 2 3",        "u16/100 30124 30125? 30126?",                    "u16/100 35123 35128 35133",            "AC frequency of a phase."),
        ("inverter_phase_power_watts",      "phase 1 2 3",        "",                                               "n16 35125 35130 35135",                "AC power of a phase."),
        ("inverter_input_voltage_dc_decivolts",               "", "u16 30103",             "u16 35103",     "Input DC voltage to inverter."),
        ("inverter_input_current_dc_deciamps",                "", "u16 30104",             "u16 35104",     "Input DC current to inverter."),
        ("inverter_input_power_watts",                        "", "u32h 30137?",           "",              "DC input power."),
        ("inverter_bus_voltage_volts",                        "", "u16/10 30163",          "u16/10 35178",  "DC bus voltage."),
        ("inverter_output_voltage_ac_decivolts",              "", "u16 30118",             "u16 35121",     "Output AC voltage from inverter."),
        ("inverter_output_current_ac_deciamps",               "", "u16 30121",             "u16 35122",     "Output AC current from inverter."),
        ("inverter_output_frequency_ac_centihertz",           "", "u16 30124",             "u16 35123",     "Output AC frequency from inverter."),
        ("inverter_power_output_watts",                       "", "u32l 30127",            "s16 35138",     "Power output from inverter."),
        ("inverter_reactive_power_vars",                      "", "s32 30135",             "n16 35142?",    "Reactive power output; negative is absorbing."),
        ("inverter_apparent_power_voltamperes",               "", "u32 30133",             "n16 35144?",    "Apparent power output."),
        ("inverter_power_factor_ratio",                       "", "s16/1000 30139",        "",              "Power factor."),
        ("inverter_leakage_current_amperes",                  "", "n16/1000 30210?",       "",              "Residual (leakage) current."),
        ("inverter_meter_power_watts",                        "", "s32 30195? if 30209=1", "",              "Power at the CT meter attached to the inverter."),
        ("inverter_meter_energy_export_watthours_total",      "", "u32 30197? if 30209=1", "",              "Cumulative energy exported, by the CT meter attached to the inverter."),
        ("inverter_meter_energy_import_watthours_total",      "", "u32 30199? if 30209=1", "",              "Cumulative energy imported, by the CT meter attached to the inverter."),
        ("inverter_energy_output_hectowatt_hours_day",        "", "u16 30144",             "u32 35193",     "Cumulative energy output today."),
        ("inverter_energy_output_hectowatt_hours_total",      "", "u32 30145",             "u32 35191",     "Cumulative energy output total."),
        ("inverter_uptime_hours_total",                       "", "u32 30147",             "u32 35197",     "Inverter total operation time."),
        ("inverter_work_mode",                                "", "u16 30129",             "",              "Work mode: 0 waiting, 1 normal, 2 error, 4 checking."),
        ("inverter_error_bitmap",                             "", "u32 30130?",            "u32 35189?",    "Error codes, a bitmap; 0 is no error."),
        ("inverter_warning_bitmap",                           "", "u16 30132",             "u16 35185?",    "Warning codes, a bitmap; 0 is no warning."),
        ("inverter_derating_bitmap",                          "", "u32 30165?",            "",              "Reasons for derating, a bitmap."),
        ("inverter_grid_code",                                "", "u16 30149",             "u16 35186",     "Grid (safety country) code the inverter is set to."),
        ("inverter_internal_temperature_decidegrees_celsius", "", "n16 30141",             "n16 35174",     "Internal temperature of inverter."),
        ("inverter_heatsink_temperature_celsius",             "", "n16/10 30142?",         "n16/10 35176",  "Temperature of the heat sink."),
        ("inverter_module_temperature_celsius",               "", "n16/10 30143?",         "n16/10 35175?", "Temperature of the power module."),
        ("inverter_rssi_percent",                             "", "u16 30172",             "u16 36001",     "Inverter WLAN received signal strength indicator."),
    )),
    # hybrids alone: load, backup output, batteries
    (("HYBRID",), (
        ("inverter_phase_load_watts",       "phase 1 2 3", "n16 35164 35166 35168",     "Load on a phase."),
        ("inverter_backup_voltage_volts",   "phase 1 2 3", "u16/10 35145 35151 35157",  "Voltage of a phase of the backup output."),
        ("inverter_backup_current_amperes", "phase 1 2 3", "u16/10 35146 35152 35158",  "Current of a phase of the backup output."),
        ("inverter_backup_frequency_hertz", "phase 1 2 3", "u16/100 35147 35153 35159", "Frequency of a phase of the backup output."),
        ("inverter_backup_power_watts",     "phase 1 2 3", "n16 35150 35156 35162",     "Power of a phase of the backup output."),
        ("battery_mode",                     "battery 1 2", "u16 35184 35266?",                                       "Battery mode: 0 none, 1 standby, 2 discharging, 3 charging, 4 to be charged, 5 to be discharged."),
        ("battery_power_watts",              "battery 1 2", "s32 35182 35264? if 35184>0 35266>0",                    "Battery power; positive is discharging."),
        ("battery_voltage_volts",            "battery 1 2", "u16/10 35180 35262? if 35184>0 35266>0",                 "Battery voltage."),
        ("battery_current_amperes",          "battery 1 2", "s16/10 35181 35263? if 35184>0 35266>0",                 "Battery current; positive is discharging."),
        ("battery_state_of_charge_ratio",    "battery 1 2", "u16/100 37007 39005? if 35184>0 35266>0",                "Battery state of charge, 0 to 1."),
        ("battery_state_of_health_ratio",    "battery 1 2", "u16/100 37008 39006? if 35184>0 35266>0",                "Battery state of health, 0 to 1."),
        ("battery_temperature_celsius",      "battery 1 2", "n16/10 37003 39001? if 35184>0 35266>0",                 "Battery temperature."),
        ("battery_charge_limit_amperes",     "battery 1 2", "u16 37004 39002? if 35184>0 35266>0",                    "Charge current limit set by the battery management system."),
        ("battery_discharge_limit_amperes",  "battery 1 2", "u16 37005 39003? if 35184>0 35266>0",                    "Discharge current limit set by the battery management system."),
        ("battery_modules",                  "battery 1 2", "u16 37009 39007? if 35184>0 35266>0",                    "Number of battery modules."),
        ("inverter_active_power_watts",              "", "s16 35140",     "Active power at the grid connection; positive is export."),
        ("inverter_energy_export_watthours_total",   "", "u32*100 35195", "Cumulative energy that left the inverter at its grid terminals; not what the house exported."),
        ("inverter_energy_import_watthours_total",   "", "u32*100 35200", "Cumulative energy that the inverter took at its grid terminals; not what the house imported."),
        ("inverter_energy_load_watthours_total",     "", "u32*100 35203", "Cumulative energy used by the load."),
        ("inverter_hybrid_work_mode",                "", "u16 35187?",    "Work mode of a hybrid: 0 waiting, 1 on grid, 2 off grid, 3 fault, 4 flashing, 5 checking."),
        ("inverter_load_watts",                      "", "n16 35172",     "Load on the grid side of a hybrid, without its backup output."),
        ("inverter_backup_load_watts",               "", "n16 35170",     "Load on the backup output of a hybrid, all phases."),
        ("battery_energy_charge_watthours_total",    "", "u32*100 35206", "Cumulative energy charged into the battery."),
        ("battery_energy_discharge_watthours_total", "", "u32*100 35209", "Cumulative energy discharged from the battery."),
    )),
)
# fmt: on

FAMILIES = ("HK1000", "HK3000", "GRID", "HYBRID")
Quantity = collections.namedtuple("Quantity", "metric labels help read")  # read: family to how it is read there
QUANTITIES = tuple(
    Quantity(metric, labels, text, {family: how for head, how in zip(heads, reads) if how for family in head.split()})
    for heads, rows in TABLES
    for metric, labels, *reads, text in rows
)

# number: of the raw bits, None if they mean "not available"; int is the bits as they are
Kind = collections.namedtuple("Kind", "words signed number")
KINDS = {
    "u16": Kind(1, False, int),
    "s16": Kind(1, True, lambda raw: raw - (raw >> 15 << 16)),
    "u32": Kind(2, False, int),
    "s32": Kind(2, True, lambda raw: raw - (raw >> 31 << 32)),
    "u48": Kind(3, False, int),
    "u64": Kind(4, False, int),
    # 7FFF and FFFF are not available: a true -1 is given up
    "n16": Kind(1, True, lambda raw: None if raw in (0x7FFF, 0xFFFF) else raw - (raw >> 15 << 16)),
    # 0.0 is none: newer platforms leave the place unused
    "f32": Kind(2, True, lambda raw: struct.unpack(">f", raw.to_bytes(4, "big"))[0] or None),
    # some D-NS leave the high word FFFF: the low word is right
    "u32l": Kind(2, False, lambda raw: raw & 0xFFFF if raw >> 16 == 0xFFFF else raw),
    # 0000 FFFF is not available either
    "u32h": Kind(2, False, lambda raw: None if raw == 0xFFFF else raw),
}

# Texts for the info metric, by name: first and last register. A text in several ranges is joined with a blank.
INFO = {
    "model": ((40173, 40188), (35011, 35015)),
    "firmware": ((30221, 30226), (35021, 35026), (35027, 35032), (4864, 4871)),
    "module_firmware": ((30054, 30061), (4891, 4895)),
    "portal": ((40075, 40100), (4609, 4622)),
}
# The device's time, and the numbers of its versions: known, and no metric.
WITHOUT_METRIC = ((30034, 30039), (30100, 30102), (35000, 35032), (35100, 35102))

# A series of a family as it is read. later: its registers behind the first; missing: the raw number that means "not
# available"; series: (metric, labels); when: None, or a register and the words with which the value is there (not 0);
# instead: it counts in place of an earlier value of the series while it is above 0.
Value = collections.namedtuple("Value", "register later missing number multiply divide series counter when instead")


@functools.cache
def metric_type(metric: str) -> str:
    """The type of a register's metric, by its name."""
    return "counter" if metric.endswith("_total") else "gauge"


def evidence(row: Quantity, family: str) -> list[str]:
    """Where each register that a row has in a family is known from: map for 30195? in "u32 30195? if 30209=1"."""
    known = GUESS if family == "HK3000" else SEEN
    return [MAP if mark else known for mark in re.findall(r" \d+(\??)(?![\d?=>])", row.read[family])]


def row_values(row: Quantity, family: str) -> Iterator[Value]:
    """A row's values in a family that reads it."""
    name, *labels = row.labels.split() or [""]
    texts = [f'{name}="{label}"' for label in labels] or [""]
    counter = metric_type(row.metric) == "counter"
    for place, how in enumerate(row.read[family].split(", ")):
        how, _, conditions = how.partition(" if ")
        form, *registers = how.split()
        kind, _, divide = form.partition("/")
        kind, _, multiply = kind.partition("*")  # two numbers, since 66 / 10 is 6.6 and 66 * 0.1 is not
        words, signed, number = KINDS[kind]
        missing = (1 << 16 * words) - 1 if family == "GRID" or not signed else None  # elsewhere -1 is a value
        each = re.findall("([0-9]+)([=>])([0-9]+)", conditions)
        when = [(int(at), range(1, 0xFFFF) if sign == ">" else (int(word),)) for at, sign, word in each]
        for register, text, one in zip(registers, texts, itertools.cycle(when or [None])):
            if register != "-":
                first = int(register.rstrip("?"))
                later, series = tuple(range(first + 1, first + words)), (row.metric, text)
                scale = int(multiply or 1), int(divide or 1)
                yield Value(first, later, missing, number, *scale, series, counter, one, place > 0)


VALUES = {
    family: tuple(value for row in QUANTITIES if family in row.read for value in row_values(row, family))
    for family in FAMILIES
}
NO_METRIC = {at for first, last in itertools.chain(WITHOUT_METRIC, *INFO.values()) for at in range(first, last + 1)}
KNOWN = {
    family: NO_METRIC.union(*((value.register, *value.later) for value in values)) for family, values in VALUES.items()
}

# ------------------------------------------------------------------------------------------------ internal metrics
#
# Every metric that is not a register's: name, type, labels, what starts at 0, help. What starts at 0 are the values of the
# one label, or ALONE if the metric has none; anything else appears with its first number.

DEVICE_LABELS = "device, model, serial"
ALONE = ("",)

# fmt: off
INTERNALS = (
    # the original exporter's
    ("meter_unknown_register",            "gauge",   DEVICE_LABELS + ", register", (), "Register of a meter whose meaning is unknown, as an unsigned word."),
    ("inverter_unknown_register",         "gauge",   DEVICE_LABELS + ", register", (), "Register of an inverter whose meaning is unknown, as an unsigned word."),
    ("meter_time_sync_packets_total",     "counter", DEVICE_LABELS, (),    "Settings packets (function 03) of a meter."),
    ("inverter_time_sync_packets_total",  "counter", DEVICE_LABELS, (),    "Settings packets (function 03) of an inverter."),
    ("meter_metrics_packets_total",       "counter", DEVICE_LABELS, (),    "Data packets (functions 04 and 45) of a meter."),
    ("inverter_metrics_packets_total",    "counter", DEVICE_LABELS, (),    "Data packets (functions 04 and 45) of an inverter."),
    ("meter_time_sync_ack_packets_total", "counter", DEVICE_LABELS, (),    "Confirmations of a write (function 10) of any device."),
    ("outbound_unknown_packets_total",    "counter", "",            ALONE, "Packets from devices with a good checksum and another function."),
    ("inbound_unknown_packets_total",     "counter", "",            ALONE, "Packets from the portal with a good checksum that were not let through."),

    # devices
    ("sems_mitm_device_info",                          "gauge",   DEVICE_LABELS + ", full_serial, firmware, module_firmware, portal", (), "Always 1; what the device says of itself."),
    ("sems_mitm_device_up",                            "gauge",   DEVICE_LABELS, (), "1 while the last good frame of the device is not older than stale_after_seconds."),
    ("sems_mitm_device_last_packet_timestamp_seconds", "gauge",   DEVICE_LABELS, (), "When the last good frame of the device came."),
    ("sems_mitm_device_clock_offset_seconds",          "gauge",   DEVICE_LABELS, (), "The device's clock less this machine's, at its last live packet."),
    ("sems_mitm_acks_total",                           "counter", DEVICE_LABELS, (), "Acknowledgements given to the device, by the portal or by the exporter."),
    ("sems_mitm_nacks_total",                          "counter", DEVICE_LABELS, (), "Packets of the device that the portal did not accept."),
    ("sems_mitm_buffered_packets_total",               "counter", DEVICE_LABELS, (), "Buffered packets (function 45), which a device sends after an outage."),
    ("sems_mitm_unreadable_packets_total",             "counter", DEVICE_LABELS, (), "Good frames of the device whose payload cannot be read: settings, live and buffered packets that were decoded."),

    # packets and connections
    ("sems_mitm_packets_total",                   "counter", "direction, type, verdict", (), "Packets by type and by what became of them: forwarded (or waiting for that), rewritten, answered or dropped."),
    ("sems_mitm_rejected_values_total",           "counter", "reason",    ("fall", "jump", "not_finite"), "Values of live packets that were not taken."),
    ("sems_mitm_queue_bytes",                     "gauge",   "",          (),    "Bytes that wait for the portal: queues in memory, and the spool."),
    ("sems_mitm_queue_dropped_packets_total",     "counter", "",          ALONE, "Packets that were dropped because a queue was full."),
    ("sems_mitm_undeliverable_packets_total",     "counter", "",          ALONE, "Packets that the portal did not accept or answer three times, given up by mode spool."),
    ("sems_mitm_unlisted_device_packets_total",   "counter", "",          ALONE, "Good packets of devices without series of their own."),
    ("sems_mitm_device_connections",              "gauge",   "",          (),    "Device connections open now."),
    ("sems_mitm_upstream_connections",            "gauge",   "",          (),    "Portal connections open now."),
    ("sems_mitm_refused_connections_total",       "counter", "reason",    ("limit", "not_allowed", "loop"), "Device connections that were refused."),
    ("sems_mitm_upstream_connect_failures_total", "counter", "reason",    ("dns", "refused", "timeout", "loop", "other"), "Attempts to reach the portal that failed, and connections on which it stopped answering."),
    ("sems_mitm_upstream_up",                     "gauge",   "",          (),    "1 if the last attempt of any device to reach the portal succeeded, and its connection was not lost since."),
    ("sems_mitm_bytes_total",                     "counter", "direction", ("outbound", "inbound"), "Bytes read from devices (outbound) and from the portal (inbound)."),

    # the exporter itself
    ("sems_mitm_build_info",                    "gauge",   "version, python", (), "Always 1."),
    ("sems_mitm_stale_after_seconds",           "gauge",   "",     (),    "The value of --metrics.stale-after; 0 is never."),
    ("sems_mitm_http_closed_connections_total", "counter", "",     ALONE, "HTTP connections closed to make room for a newer one."),
    ("sems_mitm_suppressed_log_lines_total",    "counter", "",     (),    "Log lines left out because the same was said within a minute."),
    ("sems_mitm_file_errors_total",             "counter", "file", ("capture", "backfill", "spool"), "Records that could not be written, or read back."),
    ("sems_mitm_internal_errors_total",         "counter", "",     ALONE, "Faults of the exporter itself that were caught; the log has their tracebacks."),
    ("process_cpu_seconds_total",               "counter", "",     (),    "Total user and system CPU time spent in seconds."),
    ("process_resident_memory_bytes",           "gauge",   "",     (),    "Resident memory size in bytes."),
    ("process_start_time_seconds",              "gauge",   "",     (),    "Start time of the process since unix epoch in seconds."),
    ("process_open_fds",                        "gauge",   "",     (),    "Number of open file descriptors."),
    ("process_max_fds",                         "gauge",   "",     (),    "Maximum number of open file descriptors."),
    ("batsignal_top",                           "untyped", "",     (),    "Upper edge of the bat at this machine's local time."),
    ("batsignal_bottom",                        "untyped", "",     (),    "Lower edge of the bat at this machine's local time."),
)

# Unit by the end of a name, without _total or _day; the first that fits.
UNITS = {
    "decawatt_hours": "10 Wh", "hectowatt_hours": "100 Wh", "watthours": "Wh", "hours": "h", "seconds": "s", "bytes": "B",
    "watts": "W", "voltamperes": "VA", "vars": "var", "volts": "V", "amperes": "A", "hertz": "Hz",
    "decivolts": "0.1 V", "deciamps": "0.1 A", "centihertz": "0.01 Hz",
    "decidegrees_celsius": "0.1 °C", "celsius": "°C", "percent": "%", "ratio": "1",
}
# fmt: on

FIXED = tuple((name, label, values) for name, _, label, values, _ in INTERNALS if values)  # what starts at 0
METRICS = {name: (kind, meaning) for name, kind, _, _, meaning in INTERNALS}  # every metric to its type and help
METRICS.update((row.metric, (metric_type(row.metric), row.help)) for row in QUANTITIES)


@functools.cache  # there are so many metrics and no more; a page of 256 devices asks 40,000 times
def unit(metric: str) -> str:
    """The unit of a metric, "" if it has none."""
    base = re.sub("_(total|day)$", "", metric)
    return next((unit for end, unit in UNITS.items() if base.endswith("_" + end)), "")


def watt_hours(metric: str) -> int:
    """How many Wh one of an energy metric's unit is; 0 for a metric of anything else."""
    size = unit(metric)
    return int(size[: -len("Wh")] or 1) if size.endswith("Wh") else 0


def metric_rows() -> list[tuple[str, ...]]:
    """Every metric, registers' first: name, type, labels, unit, meaning, families, where each of them is known from."""
    rows: list[tuple[str, ...]] = []
    for row in QUANTITIES:
        label, _, values = row.labels.partition(" ")
        labels = f"{DEVICE_LABELS}, {label} ({values})" if label else DEVICE_LABELS
        known = {family: " + ".join(sorted(set(evidence(row, family)))) for family in row.read}
        columns = metric_type(row.metric), labels, unit(row.metric), row.help
        rows.append((row.metric, *columns, ", ".join(known), ", ".join(known.values())))
    for name, kind, label, values, meaning in INTERNALS:
        labels = f"{label} ({' '.join(values)})" if label and values else label
        rows.append((name, kind, labels, unit(name), meaning, "", "exporter"))
    return rows


# -------------------------------------------------------------------------------------------------------- checksum
#
# CRC-16/MODBUS is the remainder of a message by (x + 1)(x^15 + x + 1). Modulo x^15 + x + 1 the message folds as one big
# integer, since (x^15 + x + 1) to the power of 2^k is x^(15 * 2^k) + x^(2^k) + 1: what stands above x^(15 * 2^k) is
# added to what stands lower, twice. Modulo x + 1 it is the parity, which crc_hqx, whose polynomial has that factor too,
# knows.


@functools.lru_cache(maxsize=512)
def _folds(size: int) -> tuple[tuple[int, int, int, int], ...]:
    """The steps that fold a message of so many bytes to 15 bits: (mask of the part to fold, its bits, two shifts)."""
    bits, steps = 8 * size + 16, []
    while bits > 15:
        powers = [1 << k for k in range(bits.bit_length()) if 15 << k < bits]
        left, power = min((max(15 * power, bits - 14 * power), power) for power in powers)
        folded = bits - left
        steps.append(((1 << folded) - 1, folded, 14 * power - folded, 15 * power - folded))
        bits = left
    return tuple(steps)


def crc16(data: bytes | memoryview) -> int:
    """CRC-16/MODBUS of data; 4B37 for b"123456789". The first bit on the wire is the highest power, and bit 0 here."""
    rest = int.from_bytes(data, "little") ^ 0xFFFF
    for mask, folded, near, far in _folds(len(data)):
        high = rest & mask
        rest = rest >> folded ^ high << near ^ high << far
    rest <<= 1
    odd = f"{rest ^ binascii.crc_hqx(data, 0):b}".count("1") & 1
    return rest ^ 0xC001 if odd else rest


# ---------------------------------------------------------------------------------------------------------- cipher
#
# A packet of n blocks is n 4 x 4 matrices. Transposed to (row, column, block) every step takes the whole packet at
# once: ShiftRows is slicing, SubBytes with the factors of MixColumns is bytes.translate, sums are xor of big integers.


def _int(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _double(a: int) -> int:
    """a times 2 in GF(2^8)."""
    return a << 1 ^ (0x11B if a & 0x80 else 0)


def _times(factor: int, table: bytes) -> bytes:
    """Each byte of table times factor, at least 1, in GF(2^8)."""
    if factor == 1:
        return table
    doubled = map(_double, _times(factor // 2, table))
    return bytes(a ^ b if factor % 2 else a for a, b in zip(doubled, table))


def _sbox() -> bytes:
    """FIPS 197, 5.1.1: the inverse in GF(2^8), then an affine map. The powers of 3 are all bytes but 0."""
    box, powers = bytearray([0x63]) * 256, [1]
    while len(powers) < 255:
        powers.append(powers[-1] ^ _double(powers[-1]))
    for p, inverse in zip(powers, powers[:1] + powers[:0:-1]):
        for turn in range(5):
            box[p] ^= (inverse << turn | inverse >> 8 - turn) & 0xFF
    return bytes(box)


SBOX = _sbox()


@functools.lru_cache(maxsize=2)
def _direction(decrypting: bool) -> tuple[list[bytes], bytes, tuple[int, ...]]:
    """SubBytes fused with each factor of a row of MixColumns, SubBytes alone, turns of ShiftRows."""
    box = bytes(SBOX.index(value) for value in range(256)) if decrypting else SBOX
    factors = (14, 11, 13, 9) if decrypting else (2, 3, 1, 1)
    return [_times(factor, box) for factor in factors], box, (0, 3, 2, 1) if decrypting else (0, 1, 2, 3)


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
            factor = _double(factor)
        words.append(bytes(a ^ b for a, b in zip(words[-4], word)))
    return [b"".join(words[i : i + 4]) for i in range(0, 44, 4)]


def _unmixed(key: bytes) -> bytes:
    """A round key as the equivalent inverse cipher wants it (FIPS 197, 5.3.5): through InvMixColumns."""
    mixed = bytearray(16)
    for i in range(16):
        for j in range(4):
            place = SBOX[key[i & 12 | (i + j) & 3]]  # undoes the substitution in the table
            mixed[i] ^= _direction(True)[0][j][place]
    return bytes(mixed)


@functools.lru_cache(maxsize=32)
def _round_keys(key: bytes, blocks: int, decrypting: bool) -> list[int]:
    keys = _expanded(key)
    if decrypting:
        keys = [keys[10], *map(_unmixed, keys[9:0:-1]), keys[0]]
    order = [4 * column + row for row in range(4) for column in range(4)]
    return [_int(b"".join(key[at : at + 1] * blocks for at in order)) for key in keys]


def _rounds(data: bytes, decrypting: bool, key: bytes) -> bytes:
    """Every block of data through the cipher, for itself."""
    mixed_boxes, box, turns = _direction(decrypting)
    size = len(data)
    row, blocks = size // 4, size // 16
    first, *middle, last = _round_keys(key, blocks, decrypting)
    cuts = [(r * row, r * row + turn * blocks, (r + 1) * row) for r, turn in enumerate(turns)]
    shifted = operator.itemgetter(*(slice(*ends) for start, cut, end in cuts for ends in ((cut, end), (start, cut))))
    own, next_row, third, fourth = mixed_boxes  # what a byte is multiplied by for its own row, and for those above
    state = (_int(memoryview(data).cast("B", (blocks, 4, 4)).tobytes("F")) ^ first).to_bytes(size, "little")
    for round_key in middle:
        state = b"".join(shifted(state))
        b, c, d = state.translate(next_row), state.translate(third), state.translate(fourth)
        mixed = _int(b[row:] + b[:row]) ^ _int(c[2 * row :] + c[: 2 * row]) ^ _int(d[3 * row :] + d[: 3 * row])
        state = (_int(state.translate(own)) ^ mixed ^ round_key).to_bytes(size, "little")
    state = b"".join(shifted(state))
    state = (_int(state.translate(box)) ^ last).to_bytes(size, "little")
    return memoryview(state).cast("B", (4, 4, blocks)).tobytes("F")


def encrypt(data: bytes, iv: bytes, key: bytes = KEY) -> bytes:
    """AES-128-CBC of data, a multiple of 16 bytes, without padding; block after block, as each needs the one before."""
    blocks = [iv]
    for i in range(0, len(data), 16):
        blocks.append(_rounds((_int(blocks[-1]) ^ _int(data[i : i + 16])).to_bytes(16, "little"), False, key))
    return b"".join(blocks[1:])


def decrypt(data: bytes, iv: bytes, key: bytes = KEY) -> bytes:
    """The clear text of AES-128-CBC data, a multiple of 16 bytes."""
    clear = b"".join(_rounds(data[i : i + CHUNK], True, key) for i in range(0, len(data), CHUNK))
    return (_int(clear) ^ _int((iv + data)[: len(data)])).to_bytes(len(data), "little")


# The portal answers thousands of packets of a second with the same IV and the same clear text.
encrypt_block = functools.lru_cache(maxsize=64)(encrypt)
decrypt_block = functools.lru_cache(maxsize=64)(decrypt)

# ---------------------------------------------------------------------------------------------------------- frames
#
# What a stream is made of, each as (kind, bytes); the bytes joined are the stream again.
# FRAME      one frame with a good CRC
# MALFORMED  a frame with a bad CRC, or one whose end did not come
# JUNK       bytes that are neither, up to the next frame or to the end of what has come
# KEEPALIVE  `01 02`

FRAME, MALFORMED, JUNK, KEEPALIVE = "frame", "malformed", "junk", "keepalive"
Piece = tuple[str, bytes]

# One direction on the wire. overhead: bytes that a frame has beside its length field's number; head: bytes that name
# its type and serial; cap: of the length field; order: of the CRC's bytes; keepalive: a keep-alive, which can stand between
# frames.
Wire = collections.namedtuple("Wire", "name prefix overhead head cap order keepalive")
OUTBOUND = Wire("outbound", b"POSTGW", 13, 30, 8 << 10, "big", b"")
INBOUND = Wire("inbound", b"GW", 9, 24, 4 << 10, "little", b"\x01\x02")
LENGTH = struct.Struct(">I")


class Framer:
    """Cuts a stream into pieces, wherever its reads were cut.

    A frame with a bad CRC ends where another begins inside it, so that a good frame behind a torn one is found at once:
    except inside the second of two bad frames in a row, and only as long as there is a budget of bytes that may be checked
    twice. Any other bad frame is taken whole, so each byte is checked about twice at most.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.rest = b""  # the bytes of an unfinished frame, which wait for its end
        self._since = 0.0  # when the wait for its end began
        self._is_torn = False  # the last frame was bad and ended where this one begins
        self._budget = wire.cap  # bytes that may be checked again
        self._at_boundary = True  # at the start, or behind a frame or a keep-alive: where a keep-alive can stand

    def feed(self, data: bytes, now: float) -> list[Piece]:
        """The pieces that data completes, in order."""
        data = self.rest + data if self.rest else data
        pieces, taken = self._cut(data)
        if taken or not self.rest:
            self._since = now
        self.rest = data[taken:]
        return pieces

    def expire(self, now: float) -> list[Piece]:
        """The pieces of an unfinished frame whose end has not come in time."""
        is_late = self.rest and now - self._since >= PATIENCE[self.wire.name]
        return self._give_up(now) if is_late else []

    def close(self) -> list[Piece]:
        """The pieces of what is left when the stream has ended."""
        pieces: list[Piece] = []
        while self.rest:
            pieces += self._give_up(0.0)
        return pieces

    def _give_up(self, now: float) -> list[Piece]:
        """Take the unfinished frame as malformed up to where another begins in it, and cut what is behind."""
        data, self.rest = self.rest, b""
        end = self._start(data, 1)
        kind = MALFORMED if data.startswith(self.wire.prefix) else JUNK
        self._is_torn, self._at_boundary = end < len(data), False
        return [(kind, data[:end]), *self.feed(data[end:], now)]

    def _cut(self, data: bytes) -> tuple[list[Piece], int]:
        """The whole pieces of data, and how many bytes they are."""
        wire, pieces, pos, size = self.wire, [], 0, len(data)  # type: ignore[var-annotated]
        prefix, header, overhead, keepalive = wire.prefix, len(wire.prefix) + 4, wire.overhead, wire.keepalive
        while pos < size:
            if keepalive and self._at_boundary and data.startswith(keepalive[:1], pos):
                if data.startswith(keepalive, pos):
                    pieces.append((KEEPALIVE, keepalive))
                    pos += len(keepalive)
                    continue
                if pos + 1 == size:  # the first byte of one, perhaps
                    break
            start = self._start(data, pos)
            if start > pos:
                pieces.append((JUNK, data[pos:start]))
                self._at_boundary = self._is_torn = False
                pos = start
            if pos + header > size:
                break
            end = pos + LENGTH.unpack_from(data, pos + len(prefix))[0] + overhead
            if end > size:
                break
            frame, inner = data[pos:end], end
            is_good = crc16(frame[:-2]) == int.from_bytes(frame[-2:], wire.order)
            if not (is_good or self._is_torn):
                inner = min(self._start(data, pos + len(prefix)), end)
                if inner < end and inner + header > size:  # whether another begins there, its length will tell
                    break
                if end - inner > self._budget:
                    inner = end
            self._budget = min(self._budget + inner - pos, wire.cap) - (end - inner)
            pieces.append((FRAME, frame) if is_good else (MALFORMED, data[pos:inner]))
            self._at_boundary, self._is_torn = is_good, inner < end
            pos = inner
        return pieces, pos

    def _start(self, data: bytes, pos: int) -> int:
        """Where a frame can begin: at a prefix whose length is possible, or at the first bytes of one at the end."""
        wire, start = self.wire, pos
        prefix = wire.prefix
        while (pos := data.find(prefix, pos)) >= 0:
            at = pos + len(prefix)
            if at + 4 > len(data) or LENGTH.unpack_from(data, at)[0] <= wire.cap:
                return pos
            pos += 1
        tails = range(len(prefix) - 1, 0, -1)
        return len(data) - next((tail for tail in tails if data.endswith(prefix[:tail], start)), 0)


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


def kind_of(cls: int) -> str:
    """The label `device` of a class."""
    return "meter" if cls == METER else "inverter"


@functools.lru_cache(maxsize=1024)
def address(head: bytes, size: int, wire: Wire) -> Address:
    """The address of a frame from its first wire.head bytes, or all of a shorter one, which its size rejects.

    Raises ProtocolError for a bad envelope or serial number.
    """
    at = 10 if wire is OUTBOUND else 6
    if size < at + 4:
        raise ProtocolError("too short for a type")
    cls, function = head[at], head[at + 1]
    # Of an unknown function the length tells: what is behind the type of a short envelope is whole blocks.
    is_short = function == CONFIRMATION or function not in DATA and (size - 14) % 16 == 0
    form = ANSWER if wire is INBOUND else SHORT if is_short else LONG
    if size - 2 - form.cipher < 16 or (size - 2 - form.cipher) % 16:
        raise ProtocolError("the envelope does not fit the length")
    serial = head[form.serial : form.serial + 16]
    if not all(0x20 <= byte < 0x7F for byte in serial):
        raise ProtocolError("a serial number that is not printable ASCII")
    text = serial.decode("ascii")
    return Address(f"{cls:02x}{function:02x}", cls, function, text, form, (kind_of(cls), text))


def address_of(frame: bytes, wire: Wire) -> Address:
    """The address of a frame. Raises ProtocolError."""
    return address(frame[: wire.head], len(frame), wire)


# A packet is a frame in clear; mark is what stands between function and serial number of a long envelope.
Packet = collections.namedtuple("Packet", "wire type serial iv time clear mark", defaults=(b"\0\0",))


def decode(frame: bytes, wire: Wire) -> Packet:
    """The packet in a frame whose CRC is good. Raises ProtocolError; the inverse of `encode`."""
    where = address_of(frame, wire)
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
                raise ProtocolError("a block's last register is before its first")
            words = struct.unpack_from(f">{last - first + 1}H", clear, pos + 4)
            found.append((first, words))
            pos += 4 + 2 * len(words)
    except (struct.error, IndexError):
        raise ProtocolError("a block runs past the end") from None
    if len(clear) - pos > 15 or clear[pos:].strip(b"\xff"):
        raise ProtocolError("padding that is not FF")
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
    return " ".join(re.sub("[^\x20-\x7e]", " ", text).split())[:64].rstrip()


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


def _text(words: dict[int, int], first: int, last: int) -> str:
    """The text in a range of registers, "" if one is missing."""
    found = [words[register] for register in range(first, last + 1) if register in words]
    return label_text(struct.pack(f">{len(found)}H", *found)) if len(found) == last - first + 1 else ""


def info(words: dict[int, int]) -> dict[str, str]:
    """The texts of INFO that the registers hold, without the empty ones."""
    found = {}
    for name, ranges in INFO.items():
        text = " ".join(filter(None, [_text(words, *ends) for ends in ranges if ends[0] in words]))
        if text:
            port, comma, host = text.partition(",")  # HomeKit: port,host
            found[name] = f"{host}:{port}" if name == "portal" and comma and port.isdigit() else text
    return found


def reading(name: str, words: dict[int, int]) -> Reading:
    """What the registers of a device of the family `name` mean."""
    values, not_finite, known = {}, 0, KNOWN[name]
    for register, later, missing, number, multiply, divide, series, counter, when, instead in VALUES[name]:
        raw = words.get(register)
        for low in later:
            raw = raw << 16 | words[low] if raw is not None and low in words else None
        if raw is None or raw == missing or instead and not raw or when and words.get(when[0], 0) not in when[1]:
            continue
        if number is not int:  # what is unsigned is its bits: finite, and not below 0
            raw = number(raw)
            if raw is None:
                continue
            if raw < 0 and counter or not math.isfinite(raw):
                not_finite += 1
                continue
        values[series] = raw * multiply if divide == 1 else raw / divide
    unknown = sorted((at, word) for at, word in words.items() if at not in known and word not in (0, 0xFFFF))
    return Reading(values, not_finite, dict(unknown), info(words))


# ---------------------------------------------------------------------------------------------- identity and time

FIXED_MODELS = {"91000HKU": "HomeKit 1000 Smart Meter", "53000DSC": "GW3000-DNS-30"}  # the original exporter's names


def model(serial: str, given_name: str = "") -> str:
    """The model of a serial number; given_name is what the device itself sends, if it does."""
    rating, kind = serial[1:5], serial[5:8]
    known = FIXED_MODELS.get(serial[:8]) or given_name
    if known:
        return known
    if kind == "HKU" and rating in ("1000", "3000"):
        return f"HomeKit {rating} Smart Meter"
    kilo = rating[3] == "K"
    size = int(rating[:3] if kilo else rating) if rating[: 3 if kilo else 4].isdigit() else 0
    return label_text(f"GoodWe {kind} {size} {'kW' if kilo else 'W'}" if size else f"GoodWe {kind}")


def identity(kind: str, serial: str, given_name: str = "") -> tuple[str, str, str]:
    """What tells a device's series from those of others: the values of device, model and serial."""
    return kind, model(serial, given_name), label_text(serial[-8:])


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


EXPORT, GENERATION = 2105, 2107  # registers of a HomeKit 1000, s32, one behind the other


def with_bat(frame: bytes) -> bytes | None:
    """A HomeKit 1000's frame with the bat in place of generation and export, at its own time; None if it cannot be.

    Of a register given twice the later one counts, so every place that holds one is drawn over.
    """
    packet = decode(frame, OUTBOUND)
    when = device_time(packet.time)
    if when is None:
        return None
    top, bottom = bat(when)
    watts = struct.pack(">ii", int(1000 * bottom), int(1000 * top))
    drawn = dict(zip(range(EXPORT, GENERATION + 2), struct.unpack(">4H", watts)))
    try:
        ranges = blocks(packet.clear)
    except ProtocolError:
        return None
    ranges = [(first, tuple(drawn.get(first + i, word) for i, word in enumerate(words))) for first, words in ranges]
    return encode(packet._replace(clear=payload(ranges)))


# -------------------------------------------------------------------------------------------------------- counters

Series = tuple[str, str]  # metric, and its labels beside the device's three
DAY = 86400
STRONGEST = 100_000  # W: more than any house makes or takes
LONGEST = 3600  # s without a reading for which that counts at most

# What became of a counter's reading. Shown as it is: TAKEN, and three that do not say when the difference was made:
# RESET (the counter began again at 0), RISEN (a jump that three readings confirm), WRONG_FIRST (the first was wrong).
# Held back: FALL, JUMP.
TAKEN, RESET, RISEN, WRONG_FIRST, FALL, JUMP = "", "reset", "risen", "wrong first", "fall", "jump"
HELD_BACK = (FALL, JUMP)
Count = collections.namedtuple("Count", "number at")  # a reading of a counter: its value, and its time in s


class HeldCounter:
    """One counter of a device, protected from falls and jumps.

    Prometheus, Home Assistant and `today` take any fall for a reset, after which they add the whole new value. So a
    value is shown when a house could have made the difference since the last one that was shown, and else held back
    until other readings confirm it: of 1001 5000 1002 5001 5002 5003 1003, each a minute after the other, 1001 and 1002
    are taken, 5003 is the third in a row that agrees and has risen, and 1003 is a fall. The clock must not go back.
    """

    def __init__(self, metric: str, number: float, now: float) -> None:
        self.shown = Count(number, now)  # the last reading that was taken
        self.confirmed = self.shown  # the last taken one after which the next reading was not below it
        self.gained: float = 0  # from the first reading on
        self._doubted = False  # a lower reading fits `confirmed`, so `shown` can be the wrong one
        self._wh, self._readings = watt_hours(metric), 1
        self._row: list[Count] = []  # held-back readings in a row that agree: the first two and the last of them

    def could_make(self, seconds: float) -> float:
        """How much of the counter's unit is possible in a time; hours run twice as fast as the clock at most."""
        if not self._wh:
            return 2 * seconds / 3600 + 1
        return (STRONGEST * min(seconds, LONGEST) / 3600 + 1000) / self._wh

    def _agree(self, one: Count, later: Count) -> bool:
        return one.number <= later.number <= one.number + self.could_make(later.at - one.at)

    def take(self, number: float, now: float) -> str:
        """What becomes of the next reading: TAKEN, RESET, RISEN, WRONG_FIRST, FALL or JUMP."""
        new, row = Count(number, now), self._row
        self._readings += 1
        fits_shown, fits_confirmed = self._agree(self.shown, new), self._agree(self.confirmed, new)
        if fits_shown and (fits_confirmed or not self._doubted):  # a value in doubt must not carry a second one
            return self._show(new, number - self.shown.number, TAKEN, self.confirmed if self._doubted else self.shown)
        is_fall = number < self.shown.number
        self._doubted |= is_fall and fits_confirmed
        goes_on = row and is_fall == (row[-1].number < self.shown.number) and self._agree(row[-1], new)
        self._row = [*row[:2], new] if goes_on else [new]
        if is_fall:
            return self._fallen(new)
        return JUMP if len(self._row) < 3 else self._show(new, number - self.shown.number, RISEN, self._row[1])

    def _show(self, new: Count, gained: float, why: str, confirmed: Count) -> str:
        self.gained += gained
        self.shown, self.confirmed, self._row, self._doubted = new, confirmed, [], False
        return why

    def _fallen(self, new: Count) -> str:
        first = self._row[0]
        is_second = self._readings == 3 and first is not new  # of two after the first reading of all
        if is_second and first.number > 0 and 10 * new.number < self.shown.number:
            return self._show(new, 0, WRONG_FIRST, new)
        is_low = 2 * new.number < self.confirmed.number
        was_made = all(count.number <= self.could_make(count.at - self.shown.at) for count in (first, new))
        # What stands still for a day is a fault as likely as a reset, and nothing is lost until it counts.
        if is_low and was_made and new.at - first.at >= DAY and new.number > first.number:
            return self._show(new, new.number, RESET, new)
        return FALL


def judged(held: dict[Series, HeldCounter], values: Mapping[Series, float], now: float) -> dict[Series, str]:
    """What became of each counter of a reading of a device with these counters, to which the new ones are added.

    A group that is all 0 is left out: an inverter that boots reports that. The meter of a hybrid is a group of its own.
    """
    found: dict[Series, str] = {}
    counted = {series: number for series, number in values.items() if metric_type(series[0]) == "counter"}
    groups = {series[0].startswith("meter_") for series, number in counted.items() if number}
    for series, number in counted.items():
        if series[0].startswith("meter_") not in groups:
            continue
        if series in held:
            found[series] = held[series].take(number, now)
        else:
            held[series], found[series] = HeldCounter(series[0], number, now), TAKEN
    return found


COUNTED = {  # energies of a household: of these counters the first that a device has is used
    "generated": ("meter_energy_generation_decawatt_hours_total", "inverter_energy_output_hectowatt_hours_total"),
    "imported": ("meter_energy_import_decawatt_hours_total", "inverter_meter_energy_import_watthours_total"),
    "exported": ("meter_energy_export_decawatt_hours_total", "inverter_meter_energy_export_watthours_total"),
    "battery_charged": ("battery_energy_charge_watthours_total",),
    "battery_discharged": ("battery_energy_discharge_watthours_total",),
}
ENERGIES = {(metric, "") for metrics in COUNTED.values() for metric in metrics}
WITHOUT_BATTERY = {series for series in ENERGIES if not series[0].startswith("battery")}
BATTERIES = {("battery_power_watts", label("battery", number)) for number in "12"}
OWN_DAY = ("inverter_energy_output_hectowatt_hours_day", "")  # an inverter's own count of the day
OWN_TOTAL = ("inverter_energy_output_hectowatt_hours_total", "")  # in the same unit
CLOCK_STEP = 60  # s that this machine's clock can be off the monotonic one from one look to the next: else it was set
CLOCK_AGREES = 600  # s between a device's clock and ours: its day is ours

# A day of a device: its date; when counting began, None for midnight, and the same on the clock of the counter rules;
# what the counters had gained at that time; what an inverter itself counted of the day before it, None if not known.
Day = collections.namedtuple("Day", "date since at base before", defaults=(None,))


class Live:
    """What the live packets of a device said."""

    def __init__(self) -> None:
        self.gauges: dict[Series, float] = {}  # of the last reading
        self.counters: dict[Series, float] = {}  # as they are shown
        self.held: dict[Series, HeldCounter] = {}
        self.unknown: dict[int, int] = {}
        self.fresh = -math.inf  # when the last reading came, monotonic
        self.at = -math.inf  # when the last one came that had a counter, on the clock of the counter rules
        self.offset: float | None = None  # s of the device's clock less ours
        self.day: Day | None = None
        # Whether any reading had a battery. Without one an inverter counts what goes into a battery that is not there;
        # but one whose battery is silent for a packet has it still.
        self.has_battery = False

    def take(
        self, found: Reading, came: float, rules_at: float, local: datetime, own: float | None
    ) -> dict[Series, str]:
        """Take a reading that came at `came`, which is `rules_at` on their clock; what became of its counters.

        local: the time of day; own: an inverter's own count of the day, if its day is ours. What the energies gained
        over a silence or by a confirmed jump can be of an earlier day: then counting begins anew.
        """
        before = {series: self.held[series].shown for series in self.energies()}
        said = judged(self.held, found.values, rules_at)
        is_new = not {RESET, RISEN, WRONG_FIRST}.isdisjoint(map(said.get, before))
        is_unsure = is_new or bool(said) and self._is_over_midnight(before, rules_at)
        self.fresh, self.at = (
            max(self.fresh, came),
            rules_at if said else self.at,
        )  # a repeated frame can have come since
        self.unknown = dict(itertools.islice(found.unknown.items(), UNKNOWN_REGISTERS))
        self.gauges = {series: number for series, number in found.values.items() if metric_type(series[0]) == "gauge"}
        self.counters = {series: counter.shown.number for series, counter in self.held.items()}
        self.has_battery = self.has_battery or not BATTERIES.isdisjoint(self.gauges)
        if not self.day or is_unsure and not self._slept(own):
            self.begin(local, local, rules_at)
        if said.get(OWN_TOTAL, FALL) not in HELD_BACK and own is not None:
            self._complete(own)
        return said

    def _is_over_midnight(self, before: dict[Series, Count], rules_at: float) -> bool:
        """Whether part of what was gained can be yesterday's: the device, or a counter that has gained much, was last
        heard before the day began, and over an hour ago."""
        begun = min(self.day.at, rules_at - LONGEST) if self.day else -math.inf
        gained = ((self.held[series], last) for series, last in before.items() if last.at < begun)
        return self.at < begun or any(one.shown.number - last.number > one.could_make(0) for one, last in gained)

    def energies(self) -> set[Series]:
        """The counters of the energies that a house lives by, without those of a battery that is not there."""
        return (ENERGIES if self.has_battery else WITHOUT_BATTERY) & self.held.keys()

    def gained(self) -> dict[Series, float]:
        """What the energies have gained in the day."""
        base = self.day.base if self.day else {}
        return {series: self.held[series].gained - base.get(series, 0) for series in self.energies()}

    def _slept(self, own: float | None) -> bool:
        """Whether by its own count of the day all that it counted is today's: a grid-tied inverter sleeps at night."""
        return self.energies() == {OWN_TOTAL} and own is not None and self.gained()[OWN_TOTAL] <= own + 1

    def begin(self, when: datetime, since: datetime | None, at: float) -> None:
        """Begin to count the day of `when` anew, at midnight or `since`, which is `at` for the counter rules."""
        base = {series: counter.gained for series, counter in self.held.items()}
        self.day = Day(when.date(), since, at, base)

    def _complete(self, own: float) -> None:
        """Add what the inverter itself counted of the day before counting began, once: it must not come and go."""
        if self.day and self.day.since and self.day.before is None:
            before = own - self.gained()[OWN_TOTAL]
            if 0 <= before <= STRONGEST * (self.day.since.hour + 1) / watt_hours(OWN_DAY[0]):
                self.day = self.day._replace(before=before)


class Window:
    """The part of a day in which all devices count of which a house's day is made, and the most that was used in it."""

    def __init__(self) -> None:
        self.since: datetime | None = None  # None is midnight
        self.base: dict[str, dict[str, float]] = {}  # what the devices had counted of their days before it
        self.used = 0.0  # kWh
        self._begun: dict[str, tuple] = {}  # a device's day and since when it counts, by serial number

    def move(self, begun: dict[str, tuple], gained: dict[str, dict[str, float]], now: datetime) -> None:
        """If other devices count, or other days: begin where they all began, or else now."""
        if begun != self._begun:
            (_, since), *others = set(begun.values())
            self._begun, self.used = begun, 0.0
            self.since, self.base = (now, gained) if others else (since, {})


# --------------------------------------------------------------------------------------------------------- metrics

log = logging.getLogger("sems_mitm")
Clock = Callable[[float], float]  # of monotonic seconds


def wall_clock(now: float) -> float:
    """The real clock: monotonic seconds to seconds since 1970."""
    return time.time() - time.monotonic() + now


class Days:
    """The clocks by which days go: the time of day that is shown, as seconds since 1970, and the counter rules'."""

    def __init__(self, shown: Clock, rules: Clock) -> None:
        self.shown, self.rules = shown, rules
        self.looked = datetime.min  # the time of day at the last look
        self.window = Window()  # of what the house has used
        self._ahead = 0.0  # s that the time of day was ahead of the rules' clock then

    def look(self, now: float, lives: Iterable[Live]) -> None:
        """Begin the day of all devices at midnight; anew, if the clock was set since the last look."""
        wall, rules = self.shown(now), self.rules(now)
        was_set = abs(wall - rules - self._ahead) > CLOCK_STEP
        self.looked, self._ahead = datetime.fromtimestamp(wall), wall - rules
        for live in lives:
            if live.day and (live.day.date != self.looked.date() or was_set and live.day.since):
                live.begin(self.looked, self.looked if was_set else None, rules)


class Troubles:
    """What goes wrong again and again as one log line a period for each kind, with a count of those left out."""

    def __init__(self) -> None:
        self.suppressed = 0
        self._kinds: dict[str, list[float]] = {}  # kind to [when it may be said again, how often it was not]

    def say(self, kind: str, text: str, now: float, period: float = PERIOD, level: int = logging.WARNING) -> None:
        """Log text unless this kind (one of few) was logged within the period."""
        last = self._kinds.setdefault(kind, [-math.inf, 0])
        if now < last[0]:
            last[1] += 1
            self.suppressed += 1
            return
        log.log(level, "%s%s", text, f" (and {last[1]:.0f} more like it)" if last[1] else "")
        last[:] = [now + period, 0]


ACKS, NACKS, UNREADABLE = (f"sems_mitm_{name}_total" for name in ("acks", "nacks", "unreadable_packets"))


class Device:
    """What is known of one device, and its frames that wait to be decoded."""

    def __init__(self, where: Address, now: float) -> None:
        self.kind, self.serial = where.owner
        self.family = family(where.cls, where.serial)
        self.name = identity(self.kind, self.serial)  # tells its series from those of others
        self.info = {"firmware": "", "module_firmware": "", "portal": ""}
        self.packets = dict.fromkeys(FUNCTIONS, 0)  # how many of a function
        self.counts = dict.fromkeys((ACKS, NACKS, UNREADABLE), 0)
        self.last_frame = now  # when the last good frame came
        self.last_live = b""  # the last live frame
        self.live = Live()
        self.waiting: dict[int, list[tuple[bytes, float]]] = {name: [] for name in DATA}  # frames, and when they came

    def samples(self, stale: bool) -> dict[Series, float]:
        """What the device said; gauges only while it is not silent."""
        live, packets, texts = self.live, self.packets, {"full_serial": label_text(self.serial), **self.info}
        found: dict[Series, float] = {
            ("sems_mitm_device_info", ",".join(map(label, texts, texts.values()))): 1,
            (f"{self.kind}_time_sync_packets_total", ""): packets[SETTINGS],
            (f"{self.kind}_metrics_packets_total", ""): packets[LIVE] + packets[BUFFERED],
            ("sems_mitm_buffered_packets_total", ""): packets[BUFFERED],
            ("meter_time_sync_ack_packets_total", ""): packets[CONFIRMATION],  # of inverters, too
            **{(name, ""): number for name, number in self.counts.items()},
            **live.counters,
        }
        if not stale:
            found.update(live.gauges)
            unknown = f"{self.kind}_unknown_register"
            found.update(((unknown, f'register="{register}"'), word) for register, word in live.unknown.items())
            if live.offset is not None:
                found["sems_mitm_device_clock_offset_seconds", ""] = live.offset
        return found


def exposition(families: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Text format 0.0.4 of the lines of each metric: sorted, each with its HELP and TYPE once."""
    for name in sorted(families):
        kind, help_text = METRICS[name]
        yield f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
        yield from families[name]


STARTED = round(time.time(), 2)


def process_samples() -> dict[Series, float]:
    """Samples of this process, as far as the system tells (Linux: all)."""
    found: dict[Series, float] = {
        ("sems_mitm_build_info", f"{label('version', VERSION)},{label('python', sys.version.split()[0])}"): 1,
        ("process_cpu_seconds_total", ""): time.process_time(),
        ("process_start_time_seconds", ""): STARTED,
        ("process_max_fds", ""): resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    with contextlib.suppress(OSError), open("/proc/self/statm", "rb") as file:
        found["process_resident_memory_bytes", ""] = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):
        found["process_open_fds", ""] = len(os.listdir("/dev/fd")) - 1  # less the one that lists them
    return found


LABELLED = TYPES | {MALFORMED, KEEPALIVE, JUNK}


class Store:
    """All that the exporter shows: what devices said, and counters."""

    def __init__(
        self,
        stale_after: float = 300,
        max_devices: int = 256,
        batsignal: bool = False,
        clock: Clock = wall_clock,
        rules_clock: Clock = float,
    ) -> None:
        self.stale_after, self.max_devices, self.batsignal = stale_after, max_devices, batsignal
        self.days = Days(clock, rules_clock)
        self.devices: dict[tuple[str, str], Device] = {}
        self.names: dict[tuple[str, str, str], Device] = {}  # the devices that are shown, by their identities
        self.undecoded: dict[Device, None] = {}  # devices with waiting frames, in the order of the first
        self.totals = {(name, label(key, value) if key else ""): 0 for name, key, values in FIXED for value in values}
        self.packets: dict[tuple[str, str, str], int] = collections.defaultdict(int)
        self.gauges: dict[str, Callable[[], float | None]] = {}  # asked at the scrape; None is absent
        self.strangers: dict[str, str] = {}  # hosts that connect and do not speak this protocol, and what they said
        self.troubles = Troubles()

    def clock(self, now: float) -> float:
        """The time of day that is shown, in seconds since 1970."""
        return self.days.shown(now)

    def add(self, name: str, count: int = 1, labels: str = "") -> None:
        """Add to a counter of FIXED."""
        self.totals[name, labels] += count

    def count(self, wire: Wire, kind: str, verdict: str) -> None:
        """Count a packet whose fate is decided; kind is a type, malformed, keepalive or junk."""
        key = (wire.name, kind, verdict)
        if key not in self.packets and kind not in LABELLED:
            others = {seen for _, seen, _ in self.packets} - LABELLED
            key = key if kind in others or len(others) < OTHER_TYPES else (wire.name, "other", verdict)
        self.packets[key] += 1

    def count_own_error(self, where: str) -> None:
        """Count and log the exception of our own that is being handled; `where` names the boundary that contains it."""
        self.add("sems_mitm_internal_errors_total")
        text = f"an error of our own in {where}; please report it:\n{traceback.format_exc().rstrip()}"
        self.troubles.say(f"internal {where}", text, time.monotonic(), level=logging.ERROR)

    # Packets come

    def meet(self, where: Address, frame: bytes, now: float) -> None:
        """Count a good frame of a device, and keep it if it is to be decoded."""
        device, function = self.devices.get(where.owner) or self._newcomer(where, now), where.function
        if device is None or self.names.get(device.name) is not device and not self._is_named(device, now):
            self.add("sems_mitm_unlisted_device_packets_total")
            return
        device.last_frame = now
        if function in FUNCTIONS:
            device.packets[function] += 1
        if function == LIVE:
            if frame == device.last_live:  # the device repeats itself, which is no second reading
                device.live.fresh = now
                return
            device.last_live = frame
        if function in DATA:
            waiting = device.waiting[function]
            waiting.append((frame, now))
            del waiting[:-DECODED]
            self.undecoded[device] = None

    def answered(self, owner: tuple[str, str], counter: str) -> None:
        """Count an ACK or NACK of a device."""
        if owner in self.devices:
            self.devices[owner].counts[counter] += 1

    def _newcomer(self, where: Address, now: float) -> Device | None:
        """A device met for the first time; None if it gets no series."""
        device = Device(where, now)
        if len(self.devices) >= self.max_devices:
            text = f"more devices than --sems.max-devices={self.max_devices}: {where.serial} gets no metrics"
            self.troubles.say("max-devices", text, now)
        elif self._is_named(device, now):
            self.devices[where.owner] = device
            log.info("new device: %s %s", device.name[1], device.serial)
            return device
        return None

    def _is_named(self, device: Device, now: float) -> bool:
        """Whether the device has the series of its name; if no other has, it gets them."""
        if self.names.setdefault(device.name, device) is device:
            return True
        text = f"another device has the labels of {device.serial}, which gets no metrics: {' '.join(device.name)}"
        self.troubles.say("same-name", text, now)
        return False

    def is_stale(self, since: float, now: float) -> bool:
        """Whether what was last heard at `since` (monotonic) is too old to be shown."""
        return bool(self.stale_after) and now - since > self.stale_after

    def name_stranger(self, host: str, said: str, now: float) -> None:
        """Remember and log a host that connects and does not speak this protocol. said: tls, or nothing."""
        if len(self.strangers) < STRANGERS_LISTED or host in self.strangers:
            self.strangers[host] = said
        what = "begins with a TLS client hello" if said == "tls" else f"has sent nothing for {STRANGER} s"
        text = (
            f"{host} has connected and {what}: perhaps a module that does not speak this protocol, "
            "such as a WiFi/LAN Kit-20 with WLA... on its label"
        )
        self.troubles.say(f"stranger {said}", text, now)

    # Packets are decoded

    def look(self, now: float) -> None:
        """Begin a day at midnight, and decode what waits. Called once a second, and before anything is shown. What
        takes longer than DECODING is left to the next look, since all connections wait."""
        self.days.look(now, (device.live for device in self.devices.values()))
        end = time.monotonic() + DECODING
        while self.undecoded and time.monotonic() < end:
            device = next(iter(self.undecoded))
            del self.undecoded[device]
            for waiting in device.waiting.values():
                while waiting:
                    self._decode(device, *waiting.pop(0))

    def _decode(self, device: Device, frame: bytes, came: float) -> None:
        """Decode a device's frame. A reading that our own code cannot take is left out."""
        try:
            packet = decode(frame, OUTBOUND)
            words, function = registers(packet.clear), frame[11]
            if function == SETTINGS:
                self._learn(device, info(words), came)
            elif function == LIVE:
                device.family = family(frame[10], device.serial)
                found = reading(device.family, words)
                self._take(device, found, device_time(packet.time), came)
                self._learn(device, found.info, came)
        except ProtocolError as error:
            device.counts[UNREADABLE] += 1
            self.troubles.say("payload", f"a packet of {device.serial} cannot be read: {error}", came)
        except Exception:
            self.count_own_error("a reading")

    def _take(self, device: Device, found: Reading, stamp: datetime | None, came: float) -> None:
        """Take a device's reading of its own time `stamp`, which came at `came`."""
        live, days, own = device.live, self.days, None
        at, local = days.rules(came), datetime.fromtimestamp(days.shown(came))
        if stamp:
            live.offset = (stamp - local).total_seconds()
            if abs(live.offset) <= CLOCK_AGREES and stamp.date() == days.looked.date():
                own = found.values.get(OWN_DAY)
        self.add("sems_mitm_rejected_values_total", found.not_finite, 'reason="not_finite"')
        for (metric, labels), why in live.take(found, came, at, days.looked, own).items():
            if why in HELD_BACK:
                self.add("sems_mitm_rejected_values_total", 1, label("reason", why))
            last = live.held[metric, labels].shown
            if why == FALL and at - last.at >= DAY:
                text = (
                    f"{metric} of {device.serial} stays at {last.number}: the device has counted less for a day; if "
                    "that is right, restart the exporter, which then shows the device's own value"
                )
                self.troubles.say(f"held {device.serial} {metric} {labels}", text, came, DAY)

    def _learn(self, device: Device, found: dict[str, str], now: float) -> None:
        """Remember what a device says of itself; all its series move when its model becomes known."""
        device.info.update((name, text) for name, text in found.items() if name in device.info)
        name = identity(device.kind, device.serial, found["model"]) if "model" in found else device.name
        if name != device.name:
            if self.names.get(device.name) is device:
                del self.names[device.name]
            device.name = name
            self._is_named(device, now)

    # A scrape

    def collect(self, now: float) -> dict[str, list[str]]:
        """The lines of each metric, for `exposition`: the exporter's own, and those of each device."""
        self.look(now)
        found: dict[str, list[str]] = collections.defaultdict(list)
        for (metric, labels), number in {**self._samples(now), **process_samples()}.items():
            found[metric].append(f"{metric}{{{labels}}} {number}\n" if labels else f"{metric} {number}\n")
        for device in self.names.values():
            samples, own = device.samples(self.is_stale(device.live.fresh, now)), device_labels(device.name)
            samples["sems_mitm_device_up", ""] = int(not self.is_stale(device.last_frame, now))
            samples["sems_mitm_device_last_packet_timestamp_seconds", ""] = round(wall_clock(device.last_frame), 3)
            for (metric, labels), number in samples.items():
                found[metric].append(f"{metric}{{{own}{',' if labels else ''}{labels}}} {number}\n")
        return found

    def _samples(self, now: float) -> dict[Series, float]:
        """What is no device's."""
        found: dict[Series, float] = {**self.totals, ("sems_mitm_stale_after_seconds", ""): self.stale_after}
        found["sems_mitm_suppressed_log_lines_total", ""] = self.troubles.suppressed
        for key, count in self.packets.items():
            found["sems_mitm_packets_total", ",".join(map(label, ("direction", "type", "verdict"), key))] = count
        asked = ((name, ask()) for name, ask in self.gauges.items())
        found.update(((name, ""), number) for name, number in asked if number is not None)
        if self.batsignal:
            found["batsignal_top", ""], found["batsignal_bottom", ""] = bat(datetime.fromtimestamp(self.clock(now)))
        return found


# ----------------------------------------------------------------------------------------------------------- rules

FORWARD, LOCAL, SPOOL = "forward", "local", "spool"  # modes


def allowed(where: Address, clear: bytes, classes: set[int]) -> str:
    """What a frame from the portal is if it may pass to a device that has sent these classes: ack, nack, clock or
    ""."""
    if where.cls in classes and where.function in DATA and len(clear) == 16 and not any(clear[1:]):
        return {0: "ack", 2: "nack"}.get(clear[0], "")
    clocks = [struct.pack(">HH", CLOCK[cls], CLOCK[cls] + 2) for cls in classes if cls in CLOCK]
    if where.type == CLOCK_TYPE and len(clear) == 16 and clear[:4] in clocks:
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
ZONE_RULE = f"{_NAME}{_OFFSET}(?:{_NAME}(?:{_OFFSET})?{_DATE}{_DATE})?"  # POSIX, 8.3
ZONE_DIRECTORIES = (
    "/usr/share/zoneinfo",
    "/usr/lib/zoneinfo",
    "/usr/share/lib/zoneinfo",
    "/etc/zoneinfo",
    "/var/db/timezone/zoneinfo",
)


def zone_is_known(zone: str | None, begins: Callable[[str], bytes]) -> bool:
    """Whether the TZ variable is one that the system understands; the C library takes any other for UTC, in silence.

    begins: the first bytes of the file at a path, none if there is no file. A rule with a summer time must say when it
    is: without, musl has it all year, and glibc by the dates of the United States.
    """
    if zone is None:
        return bool(begins("/etc/localtime"))  # a bare container has none, and its UTC is nobody's time
    if re.match(_NAME + _OFFSET, zone):
        return bool(re.fullmatch(ZONE_RULE, zone))
    paths = (os.path.join(directory, zone.lstrip(":")) for directory in ZONE_DIRECTORIES)
    return any(begins(path).startswith(b"TZif") for path in paths)


class Outbox:
    """Pieces that wait for a peer, in order; `size` is the bytes that are not sent yet."""

    def __init__(self) -> None:
        self._pieces: collections.deque[bytes] = collections.deque()
        self._sent = 0  # bytes of the first piece that are sent
        self.size = 0

    def put(self, piece: bytes) -> None:
        """Add a piece behind all others."""
        self._pieces.append(piece)
        self.size += len(piece)

    def ready(self) -> bytes | memoryview:
        """The next bytes to send: the rest of the first piece, or several small pieces."""
        first = self._pieces[0]
        if self._sent or len(self._pieces) == 1 or len(first) >= SEND_SIZE:
            return memoryview(first)[self._sent : self._sent + SEND_SIZE]
        pieces, length = [], 0
        for piece in self._pieces:
            pieces.append(piece)
            length += len(piece)
            if length >= SEND_SIZE:
                break
        return b"".join(pieces)

    def first(self) -> bytes:
        """The first piece of which nothing is sent yet, if that is the next."""
        return b"" if self._sent else self._pieces[0]

    def took(self, count: int) -> None:
        """Remove so many bytes, which the peer has taken."""
        self.size -= count
        self._sent += count
        while self._pieces and self._sent >= len(self._pieces[0]):
            self._sent -= len(self._pieces.popleft())

    def restart(self, is_wanted: Callable[[bytes], bool]) -> None:
        """Called when the connection is lost: keep only wanted pieces, a half-sent one from its first byte."""
        self._pieces = collections.deque(filter(is_wanted, self._pieces))
        self._sent, self.size = 0, sum(map(len, self._pieces))

    def shed(self, excess: int) -> int:
        """Drop the oldest pieces that are not half sent, until so many bytes are dropped; how many pieces these
        were."""
        count, half_sent = 0, [self._pieces.popleft()] if self._sent else []
        while excess > 0 and self._pieces:
            piece = self._pieces.popleft()
            self.size -= len(piece)
            excess -= len(piece)
            count += 1
        self._pieces.extendleft(half_sent)
        return count


def is_good_frame(piece: bytes) -> bool:
    """Whether a piece of a device's stream is a frame with good CRC, envelope and serial number."""
    with contextlib.suppress(ProtocolError):
        return Framer(OUTBOUND).feed(piece, 0.0) == [(FRAME, piece)] and bool(address_of(piece, OUTBOUND))
    return False


def draws_bat(where: Address) -> bool:
    """Whether frames of this address get the bat: live and buffered data of a HomeKit 1000."""
    return where.function in (LIVE, BUFFERED) and family(where.cls, where.serial) == "HK1000"


Departure = collections.namedtuple("Departure", "first latest")  # when a frame left for the portal


class SentFrames:
    """Hashes of the frames that have left spools lately: a device that sends one of them can be ourselves."""

    def __init__(self) -> None:
        self._departures: collections.OrderedDict[int, Departure] = collections.OrderedDict()

    def note(self, frame: bytes, now: float) -> None:
        """Remember that a frame leaves."""
        before = self._departures.pop(hash(frame), None)
        self._departures[hash(frame)] = Departure(before.first if before else now, now)
        if len(self._departures) > SENT_FRAMES:
            self._departures.popitem(last=False)

    def is_back(self, frame: bytes, waits: bool, now: float) -> bool:
        """Whether a frame that comes in from a device has left within the last minute.

        A frame that still waits is sent again and again, which would renew that minute for ever; so for it the first
        departure counts, for any other the latest.
        """
        departure = self._departures.get(hash(frame), Departure(-math.inf, -math.inf))
        return now - (departure.first if waits else departure.latest) < RETURN_WINDOW

    def forget(self, frame: bytes) -> None:
        """Called when a device's frame is new: the next departure is its first."""
        self._departures.pop(hash(frame), None)


# ----------------------------------------------------------------------------------------------------------- files


def first_bytes(path: str) -> bytes:
    """The first bytes of a file, none if it cannot be read."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:
        return file.read(4)
    return b""


def capture_line(wall: float, peer: str, direction: str, verdict: str, data: bytes) -> str:
    """A frame as a line of the capture file."""
    when = datetime.fromtimestamp(wall, timezone.utc).isoformat(timespec="milliseconds")
    return (
        json.dumps({"time": when, "peer": peer, "direction": direction, "verdict": verdict, "hex": data.hex()}) + "\n"
    )


class RecordFile:
    """A file to which lines are appended. What cannot be written is counted, logged once a minute and discarded."""

    def __init__(self, path: str, name: str, store: Store) -> None:
        self.path, self.name, self.store = path, name, store
        self.lines: list[str] = []  # of this round
        self._file: io.FileIO | None = None
        self._is_torn = False  # the last line has no end
        self.flush()

    def flush(self) -> None:
        """Write the lines of this round; the file is made if it is not there."""
        lines, self.lines = self.lines, []
        try:
            self._file = self._file or self._opened()
            if lines:
                self._append(self._file, "".join(lines).encode())
        except OSError as error:
            self.store.add("sems_mitm_file_errors_total", len(lines), label("file", self.name))
            text = f"cannot write --sems.{self.name} {self.path}: {error.strerror}"
            self.store.troubles.say(f"file {self.name}", text, time.monotonic())

    def close(self) -> None:
        """Close the file; the next lines go to the one that stands under the name then."""
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            if file:
                file.close()

    def _opened(self) -> io.FileIO:
        """The file, open for appending, even if it is a pipe that nobody reads."""
        file = io.FileIO(self.path, "a+", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK, 0o640))
        end = file.seek(0, os.SEEK_END) if file.seekable() else 0
        self._is_torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        return file

    def _append(self, file: io.FileIO, lines: bytes) -> None:
        """Append lines; a last line that was torn is ended first. Raises OSError if the file does not take them all."""
        data = b"\n" + lines if self._is_torn else lines
        written = os.write(file.fileno(), data)
        if written:
            self._is_torn = data[written - 1 : written] != b"\n"
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Files:
    """Where frames are recorded: all of them in the capture, buffered readings in the backfill file."""

    def __init__(self, store: Store, capture: str = "", backfill: str = "") -> None:
        self.capture = RecordFile(capture, "capture", store) if capture else None
        self.backfill = RecordFile(backfill, "backfill", store) if backfill else None
        self.open = [file for file in (self.capture, self.backfill) if file]

    def record(self, peer: str, wire: Wire, kind: str, verdict: str, data: bytes) -> None:
        """Record a piece of a stream; kind is its type, or what else it is."""
        if not self.open:
            return
        line = capture_line(time.time(), peer, wire.name, verdict, data)
        if self.capture:
            self.capture.lines.append(line)
        if self.backfill and wire is OUTBOUND and kind.endswith(f"{BUFFERED:02x}"):
            self.backfill.lines.append(line)

    def has_lines(self) -> bool:
        """Whether anything is recorded and not written."""
        return any(file.lines for file in self.open)

    def flush(self) -> None:
        """At the end of a round: write what was recorded."""
        for file in self.open:
            if file.lines:
                file.flush()

    def close(self) -> None:
        """Write and close all."""
        self.flush()
        for file in self.open:
            file.close()

    def reopen(self) -> None:
        """Called after a rotation of logs: open the files that have these names now."""
        self.close()
        for file in self.open:
            file.flush()


# ----------------------------------------------------------------------------------------------- files: the spool

SPOOL_ID = int.from_bytes(b"SEMS", "big")  # PRAGMA application_id of a spool file
SPOOL_SCHEMA = f"""
PRAGMA auto_vacuum = FULL;
BEGIN;
PRAGMA application_id = {SPOOL_ID};
CREATE TABLE spool (serial TEXT, type TEXT, id INTEGER, count INTEGER, mark INTEGER, frame BLOB,
                    PRIMARY KEY (serial, type, id)) WITHOUT ROWID;
CREATE TABLE totals (serial TEXT PRIMARY KEY, bytes INTEGER, last INTEGER, acked INTEGER) WITHOUT ROWID;
COMMIT;
"""
# Of a Debian build, secure_delete alone would write 28 MB to delete 28 MB. In exclusive mode there is no -shm file, and
# a second process is locked out.
BEFORE_SCHEMA = (
    "locking_mode = EXCLUSIVE", "secure_delete = OFF", "synchronous = FULL", "temp_store = MEMORY", "cache_size = -256",
)  # fmt: skip
AFTER_SCHEMA = ("journal_mode = WAL", "wal_autocheckpoint = 64")

DISK_TROUBLE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO)  # which can pass
NO_ANSWER = "none"
# A frame of the spool. type: of the answer to it, or NO_ANSWER; id: its place; count: failed deliveries (see GIVEN_UP);
# mark: what `acked` was at the last of them.
Row = collections.namedtuple("Row", "type id count mark frame")


class Total:
    """What the table holds of a serial number: bytes, the last id, and how many frames the portal has acknowledged."""

    __slots__ = ("acked", "bytes", "last")

    def __init__(self, size: int = 0, last: int = 0, acked: int = 0) -> None:
        self.bytes, self.last, self.acked = size, last, acked

    def row(self) -> tuple[int, int, int]:
        """Its columns in the table `totals`."""
        return self.bytes, self.last, self.acked


def check_spool_file(path: str) -> None:
    """Make the file if it is not there. Raises StartError for one that is not ours, OSError if it cannot be opened."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    try:
        is_regular, head = stat.S_ISREG(os.fstat(file).st_mode), b""
        if is_regular:
            head = os.pread(file, 100, 0)
    finally:
        os.close(file)
    name = f"--sems.spool-file={path}"
    if not is_regular:
        raise StartError(f"{name}: it is not a regular file")
    if head.lstrip().startswith(b"{"):
        raise StartError(
            f"{name}: it holds lines of version 2 or of a capture; let version 2 deliver them, or give another path"
        )
    if head and not (head.startswith(b"SQLite format 3\0") and head[68:72] == SPOOL_ID.to_bytes(4, "big")):
        raise StartError(f"{name}: it is another program's file; give another path")


class SpoolTable:
    """The frames that mode spool has not delivered yet, a row a frame, in an SQLite database: a file, or memory.

    The frames of a round are stored by `commit`, before they are acknowledged; what is delivered is deleted with the
    next frames or at the next look; so after a kill what was under way, or delivered just before, is sent again.
    """

    def __init__(self, path: str, store: Store) -> None:
        """Raises StartError if the file cannot be used. A disk that is full or read-only is tried again at each
        look."""
        try:
            import sqlite3  # 3 MB that only this mode needs
        except ImportError:
            raise StartError("mode spool needs Python's module sqlite3, which this Python does not have") from None
        self._sqlite, self._path, self._store = sqlite3, os.path.abspath(path) if path else ":memory:", store
        self._limits = SPOOL_FILE if path else SPOOL_MEMORY
        self._db: sqlite3.Connection | None = None
        self.totals: dict[str, Total] = {}
        self.is_stored = True  # whether the new frames of this round are stored
        self.size = 0  # bytes of all frames
        self._new: list[tuple[str, str, int, bytes]] = []  # serial, type, id, frame
        # what is not written yet: serial, type, id of a row to its new id, count, mark, or None where it is delivered
        self._changes: dict[tuple[str, str, int], tuple[int, int, int] | None] = {}
        self._changed: set[str] = set()  # serial numbers whose totals are not written yet
        try:
            self._open()
        except (OSError, sqlite3.Error) as error:
            is_trouble = isinstance(error, sqlite3.OperationalError) or getattr(error, "errno", 0) in DISK_TROUBLE
            if is_trouble:
                return self._failed(getattr(error, "strerror", "") or str(error), 0)
            if isinstance(error, StartError):
                raise
            raise StartError(f"--sems.spool-file={path}: {error}; give another path") from None

    def _open(self) -> None:
        """Raises OSError, StartError, or an error of sqlite3."""
        is_file = self._path != ":memory:"
        if is_file:
            check_spool_file(self._path)
        db = self._sqlite.connect(self._path, isolation_level=None, timeout=SPOOL_LOCKED, check_same_thread=False)
        try:
            # A frame of over a quarter of a page takes pages of its own: in memory that counts, in a file each write.
            db.execute(f"PRAGMA page_size = {4096 if is_file else 16384}")
            for pragma in BEFORE_SCHEMA:
                db.execute(f"PRAGMA {pragma}")
            if not db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                db.executescript(SPOOL_SCHEMA)
            for pragma in AFTER_SCHEMA:
                db.execute(f"PRAGMA {pragma}").fetchall()
            for serial, *numbers in db.execute("SELECT serial, bytes, last, acked FROM totals"):
                self.totals[serial] = Total(*numbers)
            self.size = sum(total.bytes for total in self.totals.values())
        except self._sqlite.Error as error:
            db.close()
            if "locked" in str(error):
                raise StartError(f"--sems.spool-file={self._path}: another process has it") from None
            raise
        self._db = db

    # New frames

    @property
    def is_open(self) -> bool:
        """Whether the database could be opened."""
        return self._db is not None

    def has_room(self, serial: str, size: int) -> bool:
        """Whether a frame of so many bytes can be kept."""
        if not self.is_open:
            self._failed("it cannot be opened; what devices send is not acknowledged meanwhile", 1)
            return False
        of_one, of_all = self._limits
        own = self.totals[serial].bytes if serial in self.totals else 0
        return own + size <= of_one and self.size + size <= of_all

    def put(self, serial: str, kind: str, frame: bytes) -> int:
        """Add a frame, which the next `commit` stores; its id."""
        total = self.totals.setdefault(serial, Total())
        total.bytes += len(frame)
        self.size += len(frame)
        total.last += 1
        self._new.append((serial, kind, total.last, frame))
        return total.last

    def commit(self) -> list[tuple[str, str, int, bytes]]:
        """Store the new frames of a round and set `is_stored`; returns the frames that could not be stored."""
        new, self._new = self._new, []
        self._changed.update(serial for serial, *_ in new)
        # Changes alone wait for the next frames or the next look; only when WINDOW of them wait are they written now.
        is_due = new or len(self._changes) >= WINDOW
        trouble = self._write(new) if is_due else ""
        self.is_stored = not (trouble and new)
        if trouble:
            for serial, _, _, frame in new:
                self.totals[serial].bytes -= len(frame)
                self.size -= len(frame)
            self._failed(f"{trouble}; what devices send is not acknowledged meanwhile" if new else trouble, len(new))
        return new if trouble else []

    def _write(self, new: list[tuple[str, str, int, bytes]]) -> str:
        """Write new frames and all changes that wait, in one transaction; what prevents it."""
        db = self._db
        if db is None or new and not self._disk_has_room():
            return "no space is left on its disk" if db else "it cannot be opened"
        delivered = [row for row, place in self._changes.items() if place is None]
        moved = [(*place, *row) for row, place in self._changes.items() if place]
        totals = [(one, *self.totals[one].row()) for one in self._changed if one in self.totals]
        statements = (
            ("DELETE FROM spool WHERE serial = ? AND type = ? AND id = ?", delivered),
            ("UPDATE spool SET id = ?, count = ?, mark = ? WHERE serial = ? AND type = ? AND id = ?", moved),
            ("INSERT INTO spool VALUES (?, ?, ?, 0, 0, ?)", new),
            ("REPLACE INTO totals VALUES (?, ?, ?, ?)", totals),
        )
        try:
            db.execute("BEGIN IMMEDIATE")
            for statement, rows in statements:
                if rows:
                    db.executemany(statement, rows)
            db.execute("COMMIT")
        except Exception as error:
            # "full" has rolled back by itself already; nothing of the transaction counts, whatever the error was
            with contextlib.suppress(self._sqlite.Error):
                db.execute("ROLLBACK")
            if not isinstance(error, self._sqlite.Error):
                self._store.count_own_error("the spool")
            return str(error) or type(error).__name__
        self._changes.clear()
        self._changed.clear()
        return ""

    def _disk_has_room(self) -> bool:
        """Whether the disk has more room than the part that is left free: SQLite needs some to delete, too."""
        if self._path == ":memory:":
            return True
        part, least, most = SPOOL_RESERVE
        with contextlib.suppress(OSError):
            disk = os.statvfs(self._path)
            return disk.f_bavail * disk.f_frsize >= min(max(part * disk.f_blocks * disk.f_frsize, least), most)
        return True  # it does not say: the write will

    # What is there

    def types(self, serial: str) -> dict[str, int]:
        """The types of a serial number's frames, and the last id of each."""
        last, kind = {}, "~"  # behind all
        query = "SELECT type, id FROM spool WHERE serial = ? AND type < ? ORDER BY type DESC, id DESC LIMIT 1"
        while rows := self._rows(query, serial, kind):
            ((kind, last[kind]),) = rows
        return last

    def next(self, serial: str, kind: str, after: int) -> Row | None:
        """The first frame of a type with an id above `after` that can be sent."""
        query = "SELECT type, id, count, mark, frame FROM spool WHERE serial = ? AND type = ? AND id > ? ORDER BY id LIMIT 1"
        while rows := self._rows(query, serial, kind, after):
            row = Row(*rows[0])
            if (serial, kind, row.id) not in self._changes:
                return row
            after = row.id  # that change is not written yet
        return None

    def frame(self, serial: str, row: Row) -> bytes:
        """The frame of a row."""
        query = "SELECT frame FROM spool WHERE serial = ? AND type = ? AND id = ?"
        rows = self._rows(query, serial, row.type, row.id)
        return rows[0][0] if rows else b""

    def newest(self, serial: str, kinds: Iterable[str]) -> list[bytes]:
        """The newest frames of a serial number, NEWEST at most, oldest first."""
        query = "SELECT id, frame FROM spool WHERE serial = ? AND type = ? ORDER BY id DESC LIMIT ?"
        rows = sorted(itertools.chain(*(self._rows(query, serial, kind, NEWEST) for kind in kinds)))
        return [frame for _, frame in rows[-NEWEST:]]

    def _rows(self, statement: str, *values: object) -> list[tuple]:
        """All rows that a statement gives, none if the database cannot be used."""
        if self._db is None:
            return []
        try:
            return self._db.execute(statement, values).fetchall()
        except self._sqlite.Error as error:
            self._failed(str(error), 1)
            return []

    # What becomes of it

    def deliver(self, serial: str, row: Row, size: int) -> None:
        """Delete a frame of so many bytes, with the next frames or at the next look."""
        self._changes[serial, row.type, row.id] = None
        self.totals[serial].bytes -= size
        self.size -= size
        self._changed.add(serial)

    def move_behind(self, serial: str, row: Row, count: int, mark: int) -> int:
        """Let a frame wait behind all others of its serial number, with the next frames or at the next look; its new
        id."""
        total = self.totals[serial]
        total.last += 1
        self._changes[serial, row.type, row.id] = (total.last, count, mark)
        self._changed.add(serial)
        return total.last

    def apply(self) -> None:
        """Write the changes that wait, but not while new frames do: the totals count those already."""
        if self._changed and not self._new:
            trouble = self._write([])
            if trouble:
                self._failed(trouble, 0)

    def forget(self, serial: str) -> None:
        """Drop the total of a serial number without frames."""
        self.apply()
        if self._changed:
            return  # that could not be written
        if self.totals.pop(serial, None):
            self._rows("DELETE FROM totals WHERE serial = ? AND bytes = 0", serial)

    def tend(self) -> None:
        """Write what waits, and open the file if that was not possible before; called once a second."""
        if self._db is None:
            try:
                self._open()
            except (OSError, self._sqlite.Error) as error:
                return self._failed(str(error), 0)
        self.apply()

    def _failed(self, trouble: str, count: int) -> None:
        """Count frames that are not stored, say so, and have SQLite give back what it can."""
        self._store.add("sems_mitm_file_errors_total", count, label("file", "spool"))
        self._store.troubles.say(
            "file spool", f"cannot use --sems.spool-file {self._path}: {trouble}", time.monotonic()
        )
        if self._db:
            with contextlib.suppress(self._sqlite.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def close(self) -> None:
        """Write what waits, and let another process have the file."""
        self.commit()
        self.apply()
        if self._db:
            with contextlib.suppress(self._sqlite.Error):
                self._db.close()
            self._db = None


# ------------------------------------------------------------------------------------------------- network: names

PORTAL_NAME = "tcp.goodwe-power.com"
Endpoint = collections.namedtuple("Endpoint", "family sockaddr")
HOST_ERRORS = (OSError, UnicodeError)  # of a host that cannot be had, or whose name cannot be one


def plain(host: str) -> str:
    """An address as plain IPv4 or IPv6, without a zone."""
    host = host.partition("%")[0]
    return host[7:] if host.lower().startswith("::ffff:") and "." in host else host


def endpoint_text(sockaddr: tuple) -> str:
    """HOST:PORT of a socket's address."""
    host = plain(sockaddr[0])
    return f"[{host}]:{sockaddr[1]}" if ":" in host else f"{host}:{sockaddr[1]}"


def is_global(host: str) -> bool:
    """Whether an address is one of the internet's."""
    address = ipaddress.ip_address(plain(host))
    return address.is_global and not address.is_multicast


def own_address(host: str) -> str:
    """This machine's address towards another, "" if there is no way: that of a UDP socket, which sends nothing."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))
        return plain(probe.getsockname()[0])
    return ""


def is_this_machine(host: str) -> bool:
    """Whether an address is one of this machine's: from there the kernel would talk to it.

    Whether a socket can be bound to it tells nothing where ip_nonlocal_bind is set.
    """
    address = ipaddress.ip_address(plain(host))
    return address.is_loopback or address.is_unspecified or own_address(str(address)) == str(address)


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


def _dns_name_end(data: bytes, pos: int) -> int:
    """Where the name at pos ends; a pointer ends it. Raises IndexError."""
    while 0 < data[pos] < 0xC0:
        pos += 1 + data[pos]
    return pos + (2 if data[pos] else 1)


def dns_answer(data: bytes, query: bytes) -> list[str]:
    """The IPv4 addresses in the answer to a query. Raises ProtocolError for what is no answer to it: another's,
    forged, cut."""
    is_answer = len(data) >= 12 and data[:2] == query[:2] and data[2] & 0x80
    if not is_answer or data[12 : len(query)].lower() != query[12:].lower():
        raise ProtocolError("not the answer to the question")
    addresses, pos = [], len(query)
    try:
        for _ in range(struct.unpack_from(">H", data, 6)[0]):
            pos = _dns_name_end(data, pos) + 10
            kind, cls, _, size = struct.unpack_from(">HHIH", data, pos - 10)
            if kind == 1 and cls == 1 and size == 4:
                addresses.append(socket.inet_ntoa(data[pos : pos + 4]))
            pos += size
    except (struct.error, IndexError, OSError):
        if not addresses:
            raise ProtocolError("a record runs past the end") from None
    return addresses


def ask_dns(server: tuple[str, int], name: str, timeout: float = 2) -> list[str] | None:
    """The addresses that a name server gives for a name; None if it does not answer in time. Raises OSError."""
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
                continue  # the true answer can still come
            except socket.timeout:  # TimeoutError since Python 3.10
                break
    return None


def system_addresses(host: str, port: int) -> list[Endpoint]:
    """The addresses that the system's name service gives, [] if it gives none."""
    with contextlib.suppress(OSError, ValueError):  # the system's resolver has its own ideas of what a name is
        entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return [Endpoint(family, sockaddr) for family, _, _, _, sockaddr in entries]
    return []


def literal_addresses(host: str, port: int) -> list[Endpoint]:
    """The addresses of a host that is an address or `localhost`, [] for any other name. Asks nobody."""
    with contextlib.suppress(ValueError):
        family = socket.AF_INET6 if ipaddress.ip_address(host.partition("%")[0]).version == 6 else socket.AF_INET
        return [Endpoint(family, (host, port))]
    both = [Endpoint(socket.AF_INET, ("127.0.0.1", port)), Endpoint(socket.AF_INET6, ("::1", port))]
    return both if host.lower() == "localhost" else []


def resolve(host: str, port: int, servers: list[tuple[str, int]]) -> list[Endpoint]:
    """The portal's addresses. Raises Unresolved.

    The servers are asked first: in this network the name leads to this machine, which must not connect to itself. Then
    the system's answer counts, but for addresses of this machine.
    """
    if literal := literal_addresses(host, port):
        return literal
    for server in servers:
        with contextlib.suppress(OSError, UnicodeError):
            routable = [address for address in ask_dns(server, host) or () if is_global(address)]
            if routable:
                return [Endpoint(socket.AF_INET, (address, port)) for address in routable]
    system = system_addresses(host, port)
    others = [address for address in system if not is_this_machine(address.sockaddr[0])]
    if others:
        return others
    if not system:
        raise Unresolved("dns", f"{host} has no address, neither at --sems.upstream-dns nor here")
    where = system[0].sockaddr[0]
    change = "let --sems.upstream-dns name a server that knows its real address, or give that as --sems.upstream"
    raise Unresolved(
        "loop", f"{host} leads to this machine ({where}), and --sems.upstream-dns gives no other address: {change}"
    )


# ----------------------------------------------------------------------------------------------- network: sockets


def tuned(sock: socket.socket, idle: int, interval: int, patience: float = 0) -> socket.socket:
    """A stream socket that does not block, does not wait for more to send, and notices a peer that is gone.

    idle, interval: s of silence before keep-alives, and between them; patience: s that what is sent can stay
    unacknowledged.
    """
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = (
        ("TCP_KEEPIDLE", idle), ("TCP_KEEPALIVE", idle), ("TCP_KEEPINTVL", interval), ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", int(1000 * patience)),
    )  # fmt: skip
    for name, value in options:
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return sock


def with_small_buffers(sock: socket.socket) -> socket.socket:
    """The same socket: the kernel holds little for it. Before `listen` and `connect`, or the windows are set
    already."""
    for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFERS)
    # On the loopback interface one segment would fill the buffer, and each wait for a delayed acknowledgement: 40 ms.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)
    return sock


def listeners(host: str, port: int) -> list[socket.socket]:
    """Listening sockets for an address, without a host one for each family there is. Raises OSError."""
    sockets: list[socket.socket] = []
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
            chosen = sockets[0].getsockname()[1] if sockets else port  # port 0: the same for both families
            sock.bind((sockaddr[0], chosen, *sockaddr[2:]))
            with_small_buffers(sock).listen(128)
            sock.setblocking(False)
        except OSError as error:
            sock.close()
            if sockets and (port == 0 or error.errno == errno.EADDRNOTAVAIL):
                continue
            for other in sockets:
                other.close()
            raise
        sockets.append(sock)
    if not sockets:
        raise OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return sockets


class Connection:
    """A connected socket that does not block, and the pieces that wait for its peer.

    `receive` and `send` set `ended` when the peer sends no more, and `error` when the connection is lost. Whoever owns
    it closes it; the selector holds (owner, connection).
    """

    def __init__(self, loop: Loop, sock: socket.socket, owner: Owner, outbox: Outbox, now: float) -> None:
        self.loop, self.sock, self.outbox = loop, sock, outbox
        self.owner: Owner | None = owner
        self.ended = False
        self.error: OSError | None = None
        self.heard = now  # when the peer last sent something, or connected
        self._events = 0  # that the selector waits for
        self._progress: float | None = None  # when the peer last took something of what waits, or that began to wait

    def receive(self, now: float) -> bytes:
        """Read once."""
        data = b""
        try:
            data = self.sock.recv(RECV_SIZE)
            self.ended = not data
        except (BlockingIOError, InterruptedError):
            self.ended = self.error is not None  # nothing more comes from a peer that is lost
        except OSError as error:
            self.ended, self.error = True, error
        if data:
            self.heard = now
        return data

    def send(self, now: float) -> None:
        """Send what the peer takes of what waits."""
        outbox = self.outbox
        try:
            while outbox.size and not self.error:
                data = outbox.ready()
                count = self.sock.send(data)
                outbox.took(count)
                self._progress = now
                if count < len(data):
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.error = error
        self._progress = (self._progress or now) if outbox.size else None

    def watch(self, reading: bool, connecting: bool = False) -> None:
        """Have the selector wait until the peer sends, if it is read, and until it takes what waits or has connected."""
        is_writing = connecting or self.outbox.size > 0 and not self.error
        events = selectors.EVENT_READ * (reading and not self.ended) | selectors.EVENT_WRITE * is_writing
        if events == self._events:
            return
        selector = self.loop.selector
        if not events:
            selector.unregister(self.sock)
        elif self._events:
            selector.modify(self.sock, events, (self.owner, self))
        else:
            selector.register(self.sock, events, (self.owner, self))
        self._events = events

    def is_stalled(self, now: float) -> bool:
        """Whether the peer has taken nothing of what waits for it for too long."""
        return self._progress is not None and now - self._progress >= STALL

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket, if it is not closed yet, and forget the owner: they refer to each other."""
        if self._events:
            self.loop.selector.unregister(self.sock)
            self._events = 0
        self.ended, self.error = True, self.error or ConnectionAbortedError()
        self.sock.close()
        self.owner = None


# What a peer has sent: kind (packet type, malformed, junk, keepalive), bytes, address of a good frame or None, and of what
# the portal sends the meaning that `allowed` gives it, or keepalive; "" for what is not let through.
Message = tuple[str, bytes, Union[Address, None], str]


class Peer:
    """A device or the portal: recognizes, counts and records what it sends. `connection` is its latest."""

    connection: Connection

    def __init__(self, loop: Loop, wire: Wire, name: str, classes: set[int]) -> None:
        """name: HOST:PORT of the device, or a spool's serial number; classes: those that the device has sent."""
        self.loop, self.wire, self.name, self.classes = loop, wire, name, classes
        self.framer = Framer(wire)
        self._in_junk = False  # a run of junk, which is one packet, can go on

    def pieces(self, now: float) -> list[Piece]:
        """Read once: the pieces that are complete. At the end of the stream the rest is one, too."""
        data = self.connection.receive(now)
        self.loop.store.add("sems_mitm_bytes_total", len(data), f'direction="{self.wire.name}"')
        pieces = self.framer.feed(data, now)
        return pieces + self.framer.close() if self.connection.ended else pieces

    def read(self, now: float) -> list[Message]:
        """Read once: the messages that are complete."""
        return self.recognized(self.pieces(now), now)

    def rest(self, now: float) -> list[Message]:
        """The messages that the kernel still has from a peer to which nothing can be sent any more."""
        messages: list[Message] = []
        while self.connection.error and not self.connection.ended:
            messages += self.read(now)
        return messages

    def overdue(self, now: float) -> list[Message]:
        """The messages of an unfinished frame whose end has not come in time."""
        return self.recognized(self.framer.expire(now), now)

    def recognized(self, pieces: list[Piece], now: float) -> list[Message]:
        """The messages of pieces."""
        recognize = self._outward if self.wire is OUTBOUND else self._inward
        return [recognize(kind, data, now) for kind, data in pieces]

    def _outward(self, kind: str, data: bytes, now: float) -> Message:
        """A device's piece."""
        if kind != FRAME:
            return kind, data, None, ""
        if len(data) > 13 and data[11] not in FUNCTIONS:  # in 13 bytes the CRC stands there
            self.loop.store.add("outbound_unknown_packets_total")
        try:
            where = address_of(data, OUTBOUND)
        except ProtocolError:
            return MALFORMED, data, None, ""
        self.classes.add(where.cls)
        return where.type, data, where, ""

    def _inward(self, kind: str, data: bytes, now: float) -> Message:
        """The portal's piece; what is not let through is logged."""
        store, where, meaning = self.loop.store, None, KEEPALIVE if kind == KEEPALIVE else ""
        if kind == FRAME:
            try:
                where = address_of(data, INBOUND)
                kind, meaning = where.type, allowed(where, decode(data, INBOUND).clear, self.classes)
            except ProtocolError:
                kind = MALFORMED
            if not meaning:
                store.add("inbound_unknown_packets_total")
        if not meaning:
            text = f"blocked what the portal sent to {self.name}, type {kind}: {data[:LOG_HEX].hex()}"
            store.troubles.say("blocked", text, now)
        if where and meaning == "nack":
            store.answered(where.owner, NACKS)
            text = f"the portal did not accept a packet of {where.serial} (NACK), type {where.type}"
            store.troubles.say("nack", text, now)
        return kind, data, where, meaning

    def decide(self, message: Message, verdict: str, now: float) -> None:
        """Count and record a message whose fate is decided; the store meets a device's good frame."""
        kind, data, where, _ = message
        if kind != JUNK or not self._in_junk:
            self.loop.store.count(self.wire, kind, verdict)
        if where and self.wire is OUTBOUND:
            self.loop.store.meet(where, data, now)
        self._in_junk = kind == JUNK
        self.loop.files.record(self.name, self.wire, kind, verdict, data)
        if log.isEnabledFor(logging.DEBUG):
            serial = where.serial[-8:] if where else "-"
            log.debug("%s %s %s, %d bytes: %s", self.wire.name, kind, serial, len(data), verdict)


class DevicePeer(Peer):
    """A device. Its connection can be a loop; or it is a stranger, which does not speak this protocol."""

    def __init__(self, loop: Loop, sock: socket.socket, owner: Owner, name: str, now: float) -> None:
        super().__init__(loop, OUTBOUND, name, set())
        self.connection = Connection(loop, sock, owner, Outbox(), now)
        self.is_loop = False
        self._connected_at = now
        self._has_begun = self._was_named = False  # its first piece is complete; the log has named it

    def read(self, now: float) -> list[Message]:
        """Read once: the messages that are complete."""
        return self._checked(self.pieces(now), LOOP_WINDOW, now)

    def overdue(self, now: float) -> list[Message]:
        """See to deadlines: an unfinished frame, a silent device, one that takes nothing."""
        connection, framer, window = self.connection, self.framer, LOOP_WINDOW + PATIENCE[OUTBOUND.name]
        is_silent = not (self._has_begun or framer.rest) and now - self._connected_at >= STRANGER
        if is_silent and not self._was_named:
            self._was_named = True
            self._name_stranger("nothing", now)
        pieces = framer.expire(now)
        is_gone = not connection.ended and now - connection.heard >= SILENCE
        if is_gone or connection.is_stalled(now):
            connection.ended, connection.error = True, TimeoutError()
            pieces += framer.close()
        return self._checked(pieces, window, now)

    def _checked(self, pieces: list[Piece], window: float, now: float) -> list[Message]:
        """The messages of pieces; none if the first piece of the connection has come back from the portal."""
        if pieces and not self._has_begun:
            self._has_begun, (_, first) = True, pieces[0]
            if first.startswith(b"\x16\x03"):  # a TLS record with a client hello
                self._name_stranger("tls", now)
            self.is_loop = self.loop.portal.notice_loop(first, self.name, window, now)
        messages = self.recognized(pieces, now)
        if not self.is_loop:
            return messages
        self.refuse(messages, now)
        return []

    def refuse(self, messages: list[Message], now: float) -> None:
        """Called when the connection is a loop: what comes on it is dropped, and is no device's."""
        self.is_loop = True
        for kind, piece, _, _ in messages:
            self.decide((kind, piece, None, ""), "dropped", now)

    def _name_stranger(self, said: str, now: float) -> None:
        self.loop.store.name_stranger(self.name.rpartition(":")[0].strip("[]"), said, now)


# --------------------------------------------------------------------------------- network: the way to the portal


def reason_of(error: OSError) -> str:
    """The label of the failures counter for an error of connect."""
    known = {errno.ECONNREFUSED: "refused", errno.ETIMEDOUT: "timeout"}.get(error.errno or 0, "other")
    return getattr(error, "reason", known)


class Write:
    """A write to the portal: the hash of the piece with which it begins, and when it was."""

    __slots__ = ("at", "is_noticed", "key")

    def __init__(self, piece: bytes, now: float) -> None:
        self.key, self.at = hash(piece), now
        self.is_noticed = False  # it has come back


class Portal:
    """The portal, as all links to it see it: its name, its addresses, whether it is there, what was sent to it."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.up: int | None = None  # whether the last attempt of any link succeeded, and its connection was not lost
        self.writes: dict[PortalLink, list[Write]] = {}  # of each link that is connected
        self._waiting: dict[PortalLink, None] = {}  # for the look-up that is under way
        self._is_looking = False  # in a thread
        self._late: tuple[list[Endpoint], float] = ([], -math.inf)  # addresses that came when nobody waited, and when

    def look_up(self, link: PortalLink, now: float) -> None:
        """Have the link's `addressed` called with the portal's addresses, or with what prevents it."""
        host, port = self.loop.settings.upstream
        late, came = self._late
        self._late = ([], -math.inf)
        known = literal_addresses(host, port) or (late if now - came < 2 * BACKOFF[1] else [])
        if known:
            return link.addressed(known, now)
        self._waiting[link] = None
        if not self._is_looking:
            self._is_looking = True
            try:
                threading.Thread(target=self._resolve, args=(host, port), name="resolver", daemon=True).start()
            except RuntimeError:
                self._resolved(Unresolved("dns", "this system starts no thread for the look-up"), now)

    def _resolve(self, host: str, port: int) -> None:
        """In a thread: a look-up can take long. There is one at a time, so that one that hangs costs one thread."""
        answer: list[Endpoint] | Exception
        try:
            answer = resolve(host, port, self.loop.settings.upstream_dns)
        except Exception as error:
            answer = error
        self.loop.mailbox.put(functools.partial(self._resolved, answer))

    def _resolved(self, answer: list[Endpoint] | Exception, now: float) -> None:
        """Called when the look-up has ended."""
        self._is_looking = False
        waiting, self._waiting = self._waiting, {}
        if isinstance(answer, list) and not waiting:
            self._late = (answer, now)
        for link in waiting:
            result = answer if isinstance(answer, (list, Unresolved)) else Unresolved("other", "the look-up failed")
            self.loop.touch(link.owner)
            self.loop.do("a look-up's result", link.owner, link.addressed, result, now)
        if isinstance(answer, Exception) and not isinstance(answer, Unresolved):
            raise answer

    def disconnected(self, link: PortalLink) -> None:
        """Called when a link waits for no look-up and has no connection any more."""
        self._waiting.pop(link, None)
        self.writes.pop(link, None)

    def is_own(self, endpoint: Endpoint) -> bool:
        """Whether an address is one where this exporter listens."""
        host, port = plain(endpoint.sockaddr[0]), endpoint.sockaddr[1]
        own = {sock.getsockname()[:2] for listener in self.loop.listeners for sock in listener.sockets}
        return any((name, port) in own for name in ("0.0.0.0", "::", host)) and is_this_machine(host)

    def note_write(self, link: PortalLink, piece: bytes, now: float) -> None:
        """Remember a write of a link, which begins with this piece."""
        writes = self.writes[link]
        writes.append(Write(piece, now))
        if len(writes) > WRITES:
            del writes[1]  # a loop's connection begins with the first, or with a new one if it is made anew

    def notice_loop(self, piece: bytes, peer: str, window: float, now: float) -> bool:
        """Whether a device's connection is a loop: it begins with the piece with which a write of ours began.

        If its address is our own end of that connection, it is certainly one. Else a write counts within `window` s,
        and once, since a device can repeat what it sent; what comes back again has left in another write.
        """
        for link, writes in self.writes.items():
            for write in writes:
                is_recent = now - write.at <= window and not write.is_noticed
                if write.key == hash(piece) and (link.end == peer or is_recent):
                    write.is_noticed = True
                    return True
        return False

    def connected(self, link: PortalLink, now: float) -> None:
        """Called when a link is connected."""
        self.writes[link] = []
        if not self.up:
            text = f"connected to the portal {self.loop.settings.upstream_text}"
            self.loop.store.troubles.say("portal there", text, now, level=logging.INFO)
        self.up = 1

    def failed(self, reason: str, text: str, now: float) -> None:
        """Called when an attempt has failed."""
        self.up = 0
        self.loop.store.add("sems_mitm_upstream_connect_failures_total", 1, label("reason", reason))
        where = f"cannot reach the portal {self.loop.settings.upstream_text}: {text}"
        self.loop.store.troubles.say(f"portal {reason}", where, now)


IDLE, LOOKING, CONNECTING, UP = "idle", "looking", "connecting", "up"  # states of a link


class PortalLink:
    """The way of one owner to the portal: an attempt, a connection, the wait until the next attempt.

    `outbox` outlives connections. `was_lost` is set when an attempt has failed or a connection has ended; the owner
    resets it, and decides what keeps waiting.
    """

    def __init__(self, loop: Loop, owner: Owner, name: str, classes: set[int]) -> None:
        self.loop, self.owner = loop, owner
        self.outbox = Outbox()
        self.peer = Peer(loop, INBOUND, name, classes)
        self.state, self.was_lost, self.has_sent = IDLE, False, False  # has_sent: anything, on any connection
        self.end = ""  # our HOST:PORT of the connection
        self._until = 0.0  # when the wait, the look-up or the attempt to connect is over
        self._addresses: list[tuple[Endpoint, float]] = []  # still to be tried, and for how long
        self._backoff = float(BACKOFF[0])  # s until the next attempt

    def can_begin(self, now: float) -> bool:
        """Whether there is no attempt and no connection, and the wait is over."""
        return self.state == IDLE and now >= self._until

    def reach(self, now: float) -> None:
        """Begin an attempt if that is possible."""
        if self.can_begin(now):
            self.state, self._until = LOOKING, now + CONNECT_TIMEOUT
            self.loop.portal.look_up(self, now)

    def addressed(self, answer: list[Endpoint] | Unresolved, now: float) -> None:
        """Called when the portal's addresses are known, or cannot be known."""
        if self.state != LOOKING:
            return
        if isinstance(answer, Unresolved):
            return self._fail(answer.reason, str(answer), now)
        patience = CONNECT_TIMEOUT / (2 if len(answer) > 1 else 1)
        self._addresses = [(endpoint, patience) for endpoint in answer[:ADDRESSES]]
        self._try_next("other", "it has no address", now)

    def _try_next(self, reason: str, text: str, now: float) -> None:
        """Connect to the next address; if none is left, the attempt has failed for this reason."""
        self._disconnect()
        while self._addresses:
            endpoint, patience = self._addresses.pop(0)
            try:
                self._until = now + patience
                return self._connect(endpoint, now)
            except OSError as error:
                self._disconnect()
                reason, text = reason_of(error), error.strerror or str(error)
        self._fail(reason, text, now)

    def _connect(self, endpoint: Endpoint, now: float) -> None:
        """Begin to connect. Raises OSError."""
        if self.loop.portal.is_own(endpoint):
            where = endpoint_text(endpoint.sockaddr)
            change = "check --sems.upstream and --sems.upstream-dns"
            raise Unresolved("loop", f"its address {where} is this exporter's own: {change}")
        sock = with_small_buffers(socket.socket(endpoint.family, socket.SOCK_STREAM))
        self.peer.connection = Connection(self.loop, sock, self.owner, self.outbox, now)
        self.peer.framer, self.state = Framer(INBOUND), CONNECTING
        tuned(sock, 20, 10, STALL)
        code = sock.connect_ex(endpoint.sockaddr)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        self.end = endpoint_text(sock.getsockname())
        self.peer.connection.watch(False, connecting=True)

    def ready(self, events: int, now: float) -> list[Message]:
        """Called when the socket is ready: what the portal sent."""
        connection, messages = self.peer.connection, []
        if self.state == CONNECTING:
            code = connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                self._try_next(reason_of(OSError(code, "")), os.strerror(code), now)
            else:
                self.state = UP
                self.loop.portal.connected(self, now)
        elif events & selectors.EVENT_READ:
            messages = self.peer.read(now)
            if messages or not connection.ended:
                self._backoff = BACKOFF[0]  # it answers: the next attempt need not wait long
            self._notice_end(now)
        return messages

    def write(self, now: float) -> list[Message]:
        """Send what the portal takes; if it is gone, what it still sent."""
        if self.state != UP or not self.outbox.size:
            return []
        self.has_sent = True
        if self.outbox.first():
            self.loop.portal.note_write(self, self.outbox.first(), now)
        self.peer.connection.send(now)
        messages = self.peer.rest(now)
        self._notice_end(now)
        return messages

    def _notice_end(self, now: float) -> None:
        if self.peer.connection.ended:
            self.lose(self.peer.connection.error, now)

    def watch(self, reading: bool) -> None:
        """Have the selector wait for the portal: until it has connected, sends, takes what waits."""
        if self.state in (CONNECTING, UP):
            self.peer.connection.watch(reading and self.state == UP, connecting=self.state == CONNECTING)

    def overdue(self, now: float) -> list[Message]:
        """See to deadlines: an unfinished frame, an attempt that takes too long, a portal that takes nothing."""
        messages: list[Message] = []
        if self.state == UP:
            messages = self.peer.overdue(now)
            if self.peer.connection.is_stalled(now):
                text = f"the portal has taken nothing for {STALL} s: it is connected to anew"
                self.loop.store.troubles.say("portal stalled", text, now)
                self.lose(TimeoutError(), now)
        elif self.state == LOOKING and now >= self._until:
            self._fail("dns", f"the name servers have not answered for {CONNECT_TIMEOUT} s", now)
        elif self.state == CONNECTING and now >= self._until:
            self._try_next("timeout", "it does not answer", now)
        return messages

    def _fail(self, reason: str, text: str, now: float) -> None:
        """The attempt has failed."""
        self.loop.portal.failed(reason, text, now)
        self.drop(now)

    def lose(self, error: OSError | None, now: float) -> None:
        """The connection has ended, by an error or without one."""
        if error:
            self.loop.portal.up = 0
        self.drop(now)

    def drop(self, now: float) -> None:
        """Have no connection, and begin no attempt before the wait is over."""
        self._disconnect()
        self.state, self.was_lost = IDLE, True
        self._until = now + self._backoff * random.uniform(0.7, 1)
        self._backoff = min(2 * self._backoff, BACKOFF[1])

    def _disconnect(self) -> None:
        self.loop.portal.disconnected(self)
        if self.state in (CONNECTING, UP):
            self.peer.connection.close()
        self.end = ""


# ----------------------------------------------------------------------------------------------------------- modes
#
# Four owners of connections. The loop calls them so:
#
#     ready(connection, events, now)   a socket of theirs is ready: they read, and put pieces where they are to go
#     settle(now)                      the end of a round that touched them: writes, a lost connection, the end, in this order
#     look(now)                        once a second: deadlines
#     close()                          at once, whatever the state; also after an error of our own
#
#     Relay        mode forward: a device's connection and its connection to the portal
#     Answerer     modes local and spool: a device's connection that the exporter answers
#     SpoolSender  mode spool: what a serial number has for the portal, and the connection that delivers it
#     HttpClient   in the section HTTP


class Relay:
    """Mode forward: while the portal is connected, or the first attempt is under way, every piece goes to it; else good
    frames wait for it, and nothing else."""

    def __init__(self, loop: Loop, sock: socket.socket, name: str, now: float) -> None:
        self.loop = loop
        self.device = DevicePeer(loop, sock, self, name, now)
        self.link = PortalLink(loop, self, name, self.device.classes)
        self._portal_is_away = False  # set by settle when the link was lost, cleared when it is connected
        self._deadline: float | None = None  # when to close both connections, after the device has closed its own
        self._is_half_closed = False  # towards the portal

    @property
    def waiting(self) -> int:
        """Bytes in its queues."""
        return self.link.outbox.size + self.device.connection.outbox.size

    def ready(self, connection: Connection, events: int, now: float) -> None:
        """Called when one of the two sockets is ready."""
        if connection is not self.device.connection:
            return self._pass_inward(self.link.ready(events, now), now)
        if events & selectors.EVENT_READ:
            self._pass_outward(self.device.read(now), now)

    def _pass_outward(self, messages: list[Message], now: float) -> None:
        """Send what the device sent to the portal, or queue it; count afterwards, because counting takes time."""
        outbox, draws, verdicts = self.link.outbox, self.loop.store.batsignal, []
        for _, piece, where, _ in messages:
            passes = bool(where) or not self._portal_is_away
            drawn = with_bat(piece) if draws and where and draws_bat(where) else None
            if passes:
                outbox.put(drawn or piece)
            if where:
                self.link.reach(now)
            verdicts.append("rewritten" if drawn else "forwarded" if passes else "dropped")
        self._bound_queue()
        self._pass_inward(self.link.write(now), now)
        for message, verdict in zip(messages, verdicts):
            self.device.decide(message, verdict, now)

    def _pass_inward(self, messages: list[Message], now: float) -> None:
        """Queue what the portal is allowed to send for the device."""
        for message in messages:
            _, piece, where, meaning = message
            passes = meaning and not self.device.connection.error
            if passes:
                self.device.connection.outbox.put(piece)
            if passes and meaning == "ack" and where:
                self.loop.store.answered(where.owner, ACKS)
            self.link.peer.decide(message, "forwarded" if passes else "dropped", now)

    def _bound_queue(self) -> None:
        """Bound what waits for an absent portal."""
        if self._portal_is_away and self.link.outbox.size > QUEUE:
            self.shed(self.link.outbox.size - QUEUE)

    def shed(self, excess: int) -> int:
        """Free so many bytes, or some: drop the oldest frames for the portal; where none is left, end a device that
        takes no answers. How many bytes that frees."""
        before = self.waiting
        self.loop.store.add("sems_mitm_queue_dropped_packets_total", self.link.outbox.shed(excess))
        if self.waiting < before:
            return before - self.waiting
        self.close()
        return before

    def settle(self, now: float) -> None:
        """Send what waits, both ways; wait for what can come next, or end."""
        device, link = self.device, self.link
        if device.is_loop:
            return self.loop.refuse(self, "loop", now)
        device.connection.send(now)
        self._pass_outward(device.rest(now), now)
        self._pass_inward(link.write(now), now)
        if link.was_lost:
            link.was_lost, self._portal_is_away = False, True
            link.outbox.restart(is_good_frame)
            self._bound_queue()
        elif link.state == UP:
            self._portal_is_away = False
            if not self._is_half_closed:
                self._deadline = None  # it was that of the attempt
        if device.connection.ended and self._finish(now):
            return self.close()
        device.connection.watch(self._portal_is_away or link.outbox.size < BACKLOG)
        link.watch(device.connection.outbox.size < BACKLOG)

    def _finish(self, now: float) -> bool:
        """Take the next step for a device that sends no more; whether nothing is left to do."""
        if self.link.outbox.size and not self._portal_is_away:
            self.link.reach(now)
        if self.link.state == IDLE:
            return True  # what waits for an absent portal goes with its device
        if self.link.state != UP:
            self._deadline = self._deadline or now + LAST_ATTEMPT
        elif not self.link.has_sent and not self.link.outbox.size:
            return True
        elif not self.link.outbox.size and not self._is_half_closed:
            self.link.peer.connection.half_close()
            self._is_half_closed, self._deadline = True, now + LINGER
        return False

    def look(self, now: float) -> None:
        """See to deadlines; open the portal's connection for bytes that wait."""
        if self._deadline is not None and now >= self._deadline:
            return self.close()
        self._pass_outward(self.device.overdue(now), now)
        self._pass_inward(self.link.overdue(now), now)
        is_waiting = self.link.outbox.size or self.device.framer.rest and not self._portal_is_away
        if is_waiting and not self.device.is_loop:
            self.link.reach(now)

    def close(self) -> None:
        """Close both sockets, and leave the loop."""
        self.device.connection.close()
        self.link.drop(time.monotonic())
        self.loop.forget(self)


class Answerer:
    """Modes local and spool: a device's connection that the exporter answers, in mode spool after the commit."""

    def __init__(self, loop: Loop, sock: socket.socket, name: str, now: float) -> None:
        self.loop = loop
        self.device = DevicePeer(loop, sock, self, name, now)
        self._messages: list[tuple[Message, bool]] = []  # of this round, and whether each is kept

    @property
    def waiting(self) -> int:
        """Bytes in its queue."""
        return self.device.connection.outbox.size

    def ready(self, connection: Connection, events: int, now: float) -> None:
        """Called when the socket is ready."""
        if events & selectors.EVENT_READ:
            self._take(self.device.read(now), now)

    def _take(self, messages: list[Message], now: float) -> None:
        """Have the spool keep good frames. If one is ours that comes back, none: the device sends all of them again."""
        spools = self.loop.spools
        if spools and any(where and spools.is_back(frame, where, now) for _, frame, where, _ in messages):
            return self.device.refuse(messages, now)
        for message in messages:
            _, frame, where, _ = message
            is_kept = where is not None and (not spools or spools.take(frame, where, now))
            self._messages.append((message, is_kept))

    def settle(self, now: float) -> None:
        """Answer and send; wait for what can come next, or end."""
        if self.device.is_loop:
            return self.loop.refuse(self, "loop", now)
        self.answer(now)
        self.loop.write_files(now)  # a frame is in the capture before its answer leaves
        connection = self.device.connection
        connection.send(now)
        self._take(self.device.rest(now), now)
        if connection.ended and not self._messages and (connection.error or not connection.outbox.size):
            return self.close()
        if self._messages:  # the rest of a device that has gone: the next round commits it
            self.loop.touch(self)
        connection.watch(connection.outbox.size < ANSWERS)

    def answer(self, now: float) -> None:
        """Answer the frames of this round that are kept, and decide the fate of all; called after the commit."""
        messages, self._messages = self._messages, []
        spools, local = self.loop.spools, datetime.fromtimestamp(self.loop.store.clock(now))
        for message, is_kept in messages:
            _, frame, where, _ = message
            verdict, reply = "dropped", b""
            if where and is_kept and (not spools or spools.table.is_stored):
                sets_clock = where.function == SETTINGS and self.loop.has_good_clock(now)
                reply = answer(where, local, sets_clock)
                verdict = "answered" if reply else "forwarded" if spools else "dropped"
                if spools:
                    spools.note_reply(frame, where, reply)
            self.device.decide(message, verdict, now)
            if where and reply:
                self.device.connection.outbox.put(reply)
                self.loop.store.answered(where.owner, ACKS)

    def look(self, now: float) -> None:
        """See to deadlines."""
        self._take(self.device.overdue(now), now)

    def close(self) -> None:
        """Close the socket, and leave the loop."""
        messages, self._messages = self._messages, []
        for message, _ in messages:
            self.device.decide(message, "dropped", time.monotonic())
        self.device.connection.close()
        self.loop.forget(self)


class UnderWay:
    """A frame of a spool that is under way: its row without the frame, its size and hash, and when it was sent."""

    __slots__ = ("at", "is_passed_over", "key", "row", "size")

    def __init__(self, row: Row, now: float) -> None:
        self.row, self.size, self.key, self.at = row._replace(frame=b""), len(row.frame), hash(row.frame), now
        self.is_passed_over = False  # a frame that was sent later is acknowledged


class SpoolSender:
    """Mode spool: what a serial number has for the portal, and the connection that delivers it.

    The portal's answers name no frame: one is for the oldest unanswered frame of its type. What is unanswered when the
    connection ends is sent again on the next.
    """

    def __init__(self, spools: Spools, serial: str, now: float) -> None:
        self.spools, self.serial = spools, serial
        self.heard = now  # when its device's last frame came
        self._last = spools.table.types(serial)  # of each type, the last id in the table
        self._search_after: dict[str, int] = {}  # of each type: no row up to this id is to be sent on this connection
        self._newest = dict.fromkeys(map(hash, spools.table.newest(serial, self._last)))  # of the frames that wait
        self._under_way: list[UnderWay] = []  # oldest first
        self._has_answered = False  # the portal has, on this connection
        self._acknowledged_at = -math.inf  # when it last acknowledged a frame there
        # of frames that were put behind: id to type, and until when they are not sent again on this connection
        self._held_until: dict[int, tuple[str, float]] = {}
        self._own_answers: collections.deque[bytes] = collections.deque(maxlen=WINDOW)  # to frames under way
        classes = {int(kind[:2], 16) for kind in self._last if kind != NO_ANSWER}
        self.link = PortalLink(spools.loop, self, serial, classes)

    @property
    def waiting(self) -> int:
        """Bytes in its queue; the table has bounds of its own."""
        return self.link.outbox.size

    @property
    def undelivered(self) -> int:
        """Bytes that the portal has not acknowledged."""
        total = self.spools.table.totals.get(self.serial)
        return total.bytes if total else 0

    # Receiving

    def has(self, frame: bytes) -> bool:
        """Whether a frame is one of the newest that wait."""
        return hash(frame) in self._newest

    def put(self, frame: bytes, where: Address) -> None:
        """Keep a new frame."""
        self.link.peer.classes.add(where.cls)
        kind = where.type if where.function in DATA else NO_ANSWER
        self._last[kind] = self.spools.table.put(self.serial, kind, frame)
        self._newest[hash(frame)] = None
        if len(self._newest) > NEWEST:
            del self._newest[next(iter(self._newest))]

    def not_stored(self, frame: bytes) -> None:
        """Called when the table could not store a new frame."""
        self._newest.pop(hash(frame), None)

    def note_reply(self, frame: bytes, reply: bytes) -> None:
        """Called when a device has got an answer to a frame. If that is under way, the device can be a second exporter,
        to which we are the portal's way: the same answer coming back from the portal would be our own."""
        if reply and any(one.key == hash(frame) for one in self._under_way):
            self._own_answers.append(Framer(INBOUND).feed(reply, 0.0)[0][1])

    # The portal answers

    def ready(self, connection: Connection, events: int, now: float) -> None:
        """Called when the socket to the portal is ready."""
        self._take(self.link.ready(events, now), now)

    def _take(self, messages: list[Message], now: float) -> None:
        """Note the portal's answers. Nothing of the portal's reaches a device."""
        for message in messages:
            kind, piece, where, meaning = message
            if piece in self._own_answers:
                self._own_answers.remove(piece)
            elif meaning in ("ack", "nack") and where and where.serial == self.serial:
                self._note_answer(kind, meaning == "ack", now)
            self.link.peer.decide(message, "dropped", now)

    def _note_answer(self, kind: str, is_ack: bool, now: float) -> None:
        """The portal has acknowledged or refused the oldest unanswered frame of a type."""
        at = next((at for at, frame in enumerate(self._under_way) if frame.row.type == kind), None)
        if at is None:
            return
        self._has_answered = True
        if not is_ack:
            return self._put_behind(self._under_way[at], now)
        self._acknowledged_at = now
        self.spools.table.totals[self.serial].acked += 1
        for frame in self._under_way[:at]:
            frame.is_passed_over = True
        self._deliver(self._under_way[at])

    def _deliver(self, frame: UnderWay) -> None:
        """A frame is done with."""
        self._under_way.remove(frame)
        self._newest.pop(frame.key, None)
        self.spools.table.deliver(self.serial, frame.row, frame.size)

    def _put_behind(self, frame: UnderWay, now: float) -> None:
        """Let a frame that the portal does not like wait behind all others; at the third count against it, give it up.

        It counts only if the portal has acknowledged another frame since the last count: a portal that likes nothing
        costs no frame.
        """
        table, row = self.spools.table, frame.row
        count, mark, acked = row.count, row.mark, table.totals[self.serial].acked
        if acked > mark:
            count, mark = count + 1, acked
        if count >= GIVEN_UP:
            data = table.frame(self.serial, row)[:LOG_HEX].hex()
            text = f"gave up a packet of {self.serial}, type {row.type}, that the portal does not accept: {data}"
            self.spools.loop.store.troubles.say("given up", text, now, level=logging.ERROR)
            self.spools.loop.store.add("sems_mitm_undeliverable_packets_total")
            return self._deliver(frame)
        self._under_way.remove(frame)
        self._last[row.type] = table.move_behind(self.serial, row, count, mark)
        self._held_until[self._last[row.type]] = (row.type, now + ANSWER_TIMEOUT)

    # Sending

    def settle(self, now: float) -> None:
        """Send what waits, as much as can be under way; see to a lost connection; wait for what can come next."""
        if self.link.state == UP:
            self._send(now)
            self._take(self.link.write(now), now)
        if self.link.state == UP and not self.link.outbox.size:  # what gets no answer is done once sent
            for frame in [frame for frame in self._under_way if frame.row.type == NO_ANSWER]:
                self._deliver(frame)
                self.spools.loop.touch(self)  # the next can go
        if self.link.was_lost:
            self._start_anew(now)
        if self.undelivered and self.link.can_begin(now) and self._next(now):
            self.link.reach(now)
        self.link.watch(True)

    def _start_anew(self, now: float) -> None:
        """The connection has ended: what is unanswered is sent again. If the portal has answered nothing on it, its
        oldest frame can be why, and goes behind the others."""
        self.link.was_lost = False
        self.link.outbox.restart(lambda piece: False)
        unanswered = [frame for frame in self._under_way if frame.row.type != NO_ANSWER]
        if unanswered and not self._has_answered:
            self.spools.loop.portal.up = 0
            self._put_behind(unanswered[0], now)  # the new connection sends it at once, but last
        for of_connection in (self._held_until, self._under_way, self._own_answers, self._search_after):
            of_connection.clear()
        self._has_answered, self._acknowledged_at = False, -math.inf

    def _send(self, now: float) -> None:
        """Queue the next frames for the portal."""
        outbox, draws = self.link.outbox, self.spools.loop.store.batsignal
        while len(self._under_way) < WINDOW and outbox.size < SEND_SIZE:
            if len(self._held_until) >= WINDOW and self._acknowledged_at == -math.inf:
                break  # it can be that it refuses everything
            row = self._next(now)
            if row is None:
                break
            self._search_after[row.type] = row.id
            drawn = with_bat(row.frame) if draws and draws_bat(address_of(row.frame, OUTBOUND)) else None
            outbox.put(drawn or row.frame)
            self.spools.sent.note(drawn or row.frame, now)
            self._under_way.append(UnderWay(row, now))

    def _next(self, now: float) -> Row | None:
        """The oldest row to send. A type with WINDOW_OF_TYPE unanswered frames blocks all types until its oldest has
        waited for HESITATION s; after that it is passed over."""
        table, skipped = self.spools.table, {*self._held_until, *(frame.row.id for frame in self._under_way)}
        rows = []
        for kind, last in self._last.items():
            unanswered = [frame.at for frame in self._under_way if frame.row.type == kind]
            is_full = len(unanswered) >= WINDOW_OF_TYPE
            after = self._search_after.get(kind, 0)
            if after < last and not (is_full and now - unanswered[0] >= HESITATION):
                row = table.next(self.serial, kind, after)
                while row and row.id in skipped:
                    row = table.next(self.serial, kind, row.id)
                rows += [(row.id, is_full, row)] if row else []
        _, is_full, oldest = min(rows, default=(0, False, None))
        return None if is_full else oldest  # if its type is full, all others wait for it

    # Deadlines

    def look(self, now: float) -> None:
        """See to deadlines: a spool without work, answers that do not come."""
        if not self.undelivered and now - self.heard >= SILENCE:
            return self.spools.forget(self)
        self._take(self.link.overdue(now), now)
        for at, (kind, until) in list(self._held_until.items()):
            if now >= until:
                del self._held_until[at]
                self._search_after[kind] = min(self._search_after.get(kind, 0), at - 1)
        late = [frame for frame in self._under_way if now - frame.at >= ANSWER_TIMEOUT and frame.row.type != NO_ANSWER]
        passed_over = [frame for frame in late if frame.is_passed_over]
        for frame in passed_over:
            self._put_behind(frame, now)
        if passed_over:
            self.link.lose(None, now)  # or an answer that still comes would be taken for the next frame's
        elif late and now - self._acknowledged_at >= ANSWER_TIMEOUT:
            text = f"no answer to a packet of {self.serial} for {ANSWER_TIMEOUT} s"
            self.spools.loop.portal.failed("timeout", text, now)
            self._has_answered = False  # whatever it answered before, the oldest frame can be why it no longer does
            self.link.lose(None, now)

    def close(self) -> None:
        """End the connection, and leave the loop; what is spooled stays: `Spools.wake` makes another sender for it."""
        self.link.drop(time.monotonic())
        self.spools.senders.pop(self.serial, None)
        self.spools.loop.forget(self)


class Spools:
    """Mode spool: the table of all spools, and a sender for each serial number that has something in it, or a device."""

    def __init__(self, loop: Loop, table: SpoolTable) -> None:
        self.loop, self.table = loop, table
        self.senders: dict[str, SpoolSender] = {}
        self.sent = SentFrames()

    def wake(self, now: float) -> None:
        """Make a sender for each serial number with frames, as many as can be active. Called every second."""
        for serial, total in self.table.totals.items():
            if total.bytes:
                self._sender(serial, now)

    def _sender(self, serial: str, now: float) -> SpoolSender | None:
        """The sender of a serial number, made if it is not there; None if as many as can be are active."""
        if serial not in self.senders and len(self.senders) < self.loop.settings.max_connections:
            sender = self.senders[serial] = SpoolSender(self, serial, now)
            self.loop.owners[sender] = None
            self.loop.touch(sender)
        return self.senders.get(serial)

    def is_back(self, frame: bytes, where: Address, now: float) -> bool:
        """Whether a device's good frame is one that left here within the last minute: then its connection is a loop."""
        sender = self.senders.get(where.serial)
        return self.sent.is_back(frame, sender is not None and sender.has(frame), now)

    def take(self, frame: bytes, where: Address, now: float) -> bool:
        """Whether a device's good frame is kept. It can be answered once the table has stored this round's."""
        sender = self.senders.get(where.serial)
        if not sender or not sender.has(frame):
            sender = self._sender(where.serial, now) if self.table.has_room(where.serial, len(frame)) else None
            if not sender:
                text = f"the spool has no room for a packet of {where.serial}, or cannot store it: it is not acknowledged, and stays the device's"
                self.loop.store.troubles.say("spool full", text, now)
                return False
            sender.put(frame, where)
            self.sent.forget(frame)
        sender.heard = now
        self.loop.touch(sender)
        return True

    def note_reply(self, frame: bytes, where: Address, reply: bytes) -> None:
        """Called when a device has got an answer."""
        if where.serial in self.senders:
            self.senders[where.serial].note_reply(frame, reply)

    def forget(self, sender: SpoolSender) -> None:
        """Called when a sender has nothing to deliver, and its device has gone."""
        sender.close()
        self.table.forget(sender.serial)

    def commit(self) -> None:
        """Store the frames of this round."""
        for serial, _, _, frame in self.table.commit():
            if serial in self.senders:
                self.senders[serial].not_stored(frame)

    def look(self, now: float) -> None:
        """Have the table write what waits; called once a second."""
        self.table.tend()
        self.wake(now)


Owner = Union[Relay, Answerer, SpoolSender, "HttpClient"]

# ------------------------------------------------------------------------------------------------------------ loop

REFUSALS = {
    "limit": "there are --sems.max-connections={max_connections} already",
    "not_allowed": "its address is not in --sems.allow-from",
    "loop": "it is our own connection to the portal that comes back, or a device repeats itself; let --sems.upstream lead to the real portal,"
    " and redirect only what the devices send, not this machine",
}


class Listener:
    """Listening sockets of one kind. Out of descriptors it pauses until the next look; the connections there go on."""

    def __init__(
        self, loop: Loop, sockets: list[socket.socket], admit: Callable[[socket.socket, tuple, float], None]
    ) -> None:
        self.loop, self.sockets, self._admit = loop, sockets, admit
        self.port = sockets[0].getsockname()[1]
        self.is_open = False

    def open(self) -> None:
        """Have the selector wait for connections."""
        if not self.is_open:
            self.is_open = True
            for sock in self.sockets:
                self.loop.selector.register(sock, selectors.EVENT_READ, (self, sock))

    def pause(self) -> None:
        """Accept nobody."""
        if self.is_open:
            self.is_open = False
            for sock in self.sockets:
                self.loop.selector.unregister(sock)

    def ready(self, listening: socket.socket, events: int, now: float) -> None:
        """Accept connections, so many that the others have their turn."""
        for _ in range(EVENTS):
            try:
                sock, sockaddr = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors or memory
                self.loop.store.troubles.say("accept", f"cannot accept a connection: {error.strerror}", now)
                return self.pause()
            try:
                tuned(sock, 120, 30)
            except OSError:  # gone already
                sock.close()
                continue
            self._admit(sock, sockaddr, now)

    def close(self) -> None:
        """Listen no more."""
        self.pause()
        for sock in self.sockets:
            sock.close()


class Mailbox:
    """Work that another thread or a signal's handler hands to the loop, which a byte wakes."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self._work: collections.deque[Callable[[float], object]] = collections.deque()
        self._in, self._out = socket.socketpair()
        for sock in (self._in, self._out):
            sock.setblocking(False)
        loop.selector.register(self._in, selectors.EVENT_READ, (self, self._in))

    def put(self, work: Callable[[float], object]) -> None:
        """Have the loop call work(now); from any thread, and from a signal's handler."""
        self._work.append(work)
        with contextlib.suppress(OSError):  # full: the loop is awake already; closed: it has ended
            self._out.send(b"\0")

    def ready(self, sock: socket.socket, events: int, now: float) -> None:
        """Do the work."""
        with contextlib.suppress(BlockingIOError):
            while sock.recv(4096):
                pass
        while self._work:
            self.loop.do("work from another thread", None, self._work.popleft(), now)

    def wake_at_signals(self) -> None:
        """Have a signal write a byte at once: Python's own handlers run only when the loop is awake."""
        signal.set_wakeup_fd(self._out.fileno(), warn_on_full_buffer=False)

    def close(self) -> None:
        """Take no more."""
        with contextlib.suppress(ValueError):  # not in the main thread, which alone sees signals
            signal.set_wakeup_fd(-1)
        self._in.close()
        self._out.close()


class Loop:
    """Rounds of events: owners read and queue, the spool commits, owners settle; a look at deadlines once a second.

    Everything happens in the thread that calls `run`, so there is no lock.
    """

    def __init__(self, store: Store, settings: argparse.Namespace, files: Files) -> None:
        """Raises OSError if the devices' port cannot be had, StartError for a spool file."""
        self.store, self.settings, self.files = store, settings, files
        self.owners: dict[Owner, None] = {}
        self.portal = Portal(self)
        self.spools: Spools | None = None
        self.listeners: list[Listener] = []  # none once it is to stop
        self.every_second: list[Callable[[float], object]] = [store.look]
        self._touched: dict[Owner, None] = {}  # owners that settle at the end of the round
        self._next_look = 0.0
        self.selector = selectors.DefaultSelector()
        self.mailbox = Mailbox(self)
        try:
            self.listeners.append(Listener(self, listeners(*settings.listen_address), self._admit))
            if settings.mode == SPOOL:
                self.spools = Spools(self, SpoolTable(settings.spool_file, store))
                self.spools.wake(time.monotonic())
        except BaseException:
            self.close()
            raise
        store.gauges["sems_mitm_queue_bytes"] = self._queue_bytes
        store.gauges["sems_mitm_device_connections"] = self.device_connections
        store.gauges["sems_mitm_upstream_connections"] = lambda: len(self.portal.writes)
        store.gauges["sems_mitm_upstream_up"] = lambda: self.portal.up

    def device_connections(self) -> int:
        """How many devices are connected."""
        return sum(isinstance(owner, (Relay, Answerer)) for owner in self.owners)

    def _queue_bytes(self) -> int:
        """Bytes that wait for the portal."""
        relays = sum(owner.link.outbox.size for owner in self.owners if isinstance(owner, Relay))
        return relays + (self.spools.table.size if self.spools else 0)

    # What the owners ask for

    def touch(self, owner: Owner) -> None:
        """Have the owner settle at the end of the round."""
        self._touched[owner] = None

    def forget(self, owner: Owner) -> None:
        """Called when the owner has closed its sockets for good."""
        self.owners.pop(owner, None)
        self._touched.pop(owner, None)

    def has_good_clock(self, now: float) -> bool:
        """Whether this machine's clock is good enough to set a device's by it."""
        wall = self.store.clock(now)
        if wall >= RELEASED and zone_is_known(os.environ.get("TZ"), first_bytes):
            return True
        why = "TZ is no time zone that this system knows" if wall >= RELEASED else "this machine's own clock is wrong"
        self.store.troubles.say("clock", f"the devices' clocks are not set: {why}", now, CLOCK_PERIOD)
        return False

    # Accepting

    def _admit(self, sock: socket.socket, sockaddr: tuple, now: float) -> None:
        """Give a device's connection an owner, or refuse it."""
        name = endpoint_text(sockaddr)
        reason = self._objection(plain(sockaddr[0]))
        if reason:
            sock.close()
            return self._say_refused(reason, name, now)
        owner = (Relay if self.settings.mode == FORWARD else Answerer)(self, sock, name, now)
        self.owners[owner] = None
        self.touch(owner)

    def _objection(self, host: str) -> str:
        networks = self.settings.allow_from
        if networks and not any(ipaddress.ip_address(host) in network for network in networks):
            return "not_allowed"
        return "limit" if self.device_connections() >= self.settings.max_connections else ""

    def refuse(self, owner: Relay | Answerer, reason: str, now: float) -> None:
        """Count and log a device's connection that is refused, and close it."""
        self._say_refused(reason, owner.device.name, now)
        owner.close()

    def _say_refused(self, reason: str, name: str, now: float) -> None:
        self.store.add("sems_mitm_refused_connections_total", 1, label("reason", reason))
        why = REFUSALS[reason].format(**vars(self.settings))
        self.store.troubles.say(f"refused {reason}", f"refused the connection from {name}: {why}", now)

    # Rounds

    def run(self) -> None:
        """Serve until `stop`, then send what is queued."""
        for listener in self.listeners:
            listener.open()
        while self.listeners:
            self._round(math.inf)
        self._finish()

    def stop(self) -> None:
        """End `run`; for signal handlers and other threads."""
        self.mailbox.put(self._stop_listening)

    def _stop_listening(self, now: float) -> None:
        listeners, self.listeners = self.listeners, []
        for listener in listeners:
            listener.close()

    def reopen(self) -> None:
        """Open the capture and backfill files anew; for signal handlers and other threads."""
        self.mailbox.put(lambda now: self.files.reopen())

    def do(self, where: str, owner: Owner | None, work: Callable[..., object], *arguments: object) -> bool:
        """Do work on behalf of an owner, or of nobody; whether it went well.

        The one boundary: an error of our own is counted and logged, ends the owner's connections, and nothing else.
        """
        try:
            work(*arguments)
        except Exception:
            self.store.count_own_error(where)
            if owner and not self.do("the end of a connection", None, owner.close):
                self.forget(owner)
            return False
        return True

    def _round(self, until: float) -> None:
        """Wait for what comes next, and see to it."""
        ready = self.selector.select(self._time_to_wait(until))
        now = time.monotonic()
        for at in range(0, len(ready), EVENTS):
            for key, events in ready[at : at + EVENTS]:
                if key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # not closed by one before it
                    owner, connection = key.data
                    self._call(owner, connection, events, now)
            self._end_round(now)
        if now >= self._next_look:
            self._look(now)
            self._end_round(now)

    def _call(self, owner: Owner, connection: Connection, events: int, now: float) -> None:
        """Have an owner, or a listener or the mailbox, see to its socket."""
        is_owner = owner in self.owners
        if is_owner:
            self.touch(owner)
        self.do("an event", owner if is_owner else None, owner.ready, connection, events, now)

    def _time_to_wait(self, until: float) -> float | None:
        """How long to wait for events: until the next look at deadlines, if there is anything to look at."""
        if self._touched or self.files.has_lines():
            return 0
        is_closed = not all(one.is_open for one in self.listeners) or self.spools and not self.spools.table.is_open
        if self.owners or self.store.undecoded or until < math.inf or is_closed:
            return max(min(self._next_look, until) - time.monotonic(), 0)
        return None

    def _end_round(self, now: float) -> None:
        """Commit the spool; then all settle, which is when answers leave; write the files."""
        touched, self._touched = self._touched, {}
        if self.spools:
            self.spools.table.is_stored = False  # until it says so
            self.do("the end of a round", None, self._timed, "--sems.spool-file", self.spools.commit, now)
        for owner in sorted(touched, key=lambda owner: isinstance(owner, SpoolSender)):  # the devices' answers first
            if owner in self.owners:
                self.do("the end of a round", owner, owner.settle, now)
        self.write_files(now)
        if touched:
            self.do("the bounds of the queues", None, self._bound)

    def write_files(self, now: float) -> None:
        """Write what is recorded and not written yet."""
        self.do("the files", None, self._timed, "--sems.capture or --sems.backfill", self.files.flush, now)

    def _timed(self, what: str, work: Callable[[], None], now: float) -> None:
        """Do work on a disk, and say so if it takes long: all else waits for it."""
        begin = time.monotonic()
        work()
        took = time.monotonic() - begin
        if took > SLOW:
            text = f"the disk of {what} took {took:.1f} s, and all connections waited for it: use a local disk"
            self.store.troubles.say("slow disk", text, now)

    def _bound(self) -> None:
        """Keep all queues together within bounds, at the cost of the longest of mode forward."""
        excess = sum(owner.waiting for owner in self.owners if not isinstance(owner, HttpClient)) - QUEUES
        while excess > 0:
            relays = [owner for owner in self.owners if isinstance(owner, Relay) and owner.waiting]
            if not relays:
                return
            excess -= max(relays, key=lambda relay: relay.waiting).shed(excess)

    def _look(self, now: float) -> None:
        """Look at all deadlines."""
        self._next_look = now + TICK
        for listener in self.listeners:
            self.do("a look", None, listener.open)
        for owner in list(self.owners):
            self.touch(owner)
            self.do("a look", owner, owner.look, now)
        if self.spools:
            self.do("a look", None, self._timed, "--sems.spool-file", functools.partial(self.spools.look, now), now)
        for hook in self.every_second:
            self.do("a look", None, hook, now)
        if self.store.undecoded:  # there was too much for one look
            self._next_look = now

    def _finish(self) -> None:
        """Accept nobody, send what is queued for two seconds at most, close everything."""
        end = time.monotonic() + SHUTDOWN
        self._end_round(time.monotonic())
        while time.monotonic() < end and any(
            key.events & selectors.EVENT_WRITE for key in self.selector.get_map().values()
        ):
            self._round(end)
        for owner in list(self.owners):
            self.do("the end", None, owner.close)
        self.close()

    def close(self) -> None:
        """Release sockets, files and the selector; `run` calls this at its end."""
        self._stop_listening(0.0)
        self.files.close()
        if self.spools:
            self.spools.table.close()
        self.mailbox.close()
        self.selector.close()


# ------------------------------------------------------------------------------------------------------- household
#
# What a house makes and takes, in keys that do not depend on the model. Figures are key to number, and without what is
# not known. Flows are in W (generation_watts, house_watts; export_watts, negative while importing, and grid_watts, the
# same the other way round; battery_watts, positive while discharging) and %; energies in kWh.

# What people call a figure: title and colour on the page; name and icon of its sensor in Home Assistant.
ENERGIES_CALLED = {
    "generated": ("Solar", "solar", "solar energy", "solar-power"),
    "used": ("Used", "house", "energy used", "home-lightning-bolt"),
    "imported": ("From the grid", "bought", "energy from the grid", "transmission-tower-export"),
    "exported": ("To the grid", "sold", "energy to the grid", "transmission-tower-import"),
    "battery_charged": ("Into the battery", "battery", "energy into the battery", "battery-arrow-down"),
    "battery_discharged": ("From the battery", "battery", "energy from the battery", "battery-arrow-up"),
}
SHARES = {
    "self_sufficiency_percent": ("Self-sufficiency", "", "self-sufficiency today", "home-percent"),
    "self_consumption_percent": ("Self-consumption", "", "self-consumption today", "solar-power-variant"),
}
KEYS: dict[str, tuple[str, ...]] = {  # all figures, in their order
    "generation_watts": ("Solar", "solar", "solar power", "solar-power"),
    "house_watts": ("House", "house", "house power", "home-lightning-bolt"),
    "export_watts": (),  # grid_watts has the sign of Home Assistant and of the picture
    "grid_watts": ("From the grid", "bought", "grid power", "transmission-tower"),
    "battery_watts": ("From the battery", "battery", "power from the battery", "home-battery"),
    "battery_charge_percent": ("Battery", "battery", "battery charge", "battery"),
    **{f"{word}_today_kilowatt_hours": (*row[:2], f"{row[2]} today", row[3]) for word, row in ENERGIES_CALLED.items()},
    **SHARES,
    **{f"{word}_kilowatt_hours": row for word, row in ENERGIES_CALLED.items()},
}
# How an energy adds to what a house has used.
USED = {"generated": 1, "imported": 1, "exported": -1, "battery_discharged": 1, "battery_charged": -1}


def flows(family: str, gauges: Mapping[Series, float]) -> dict[str, float]:
    """A device's flows by its last reading."""
    values: dict[str, list[float]] = collections.defaultdict(list)
    for (metric, _), number in gauges.items():
        values[metric].append(number)

    def total(*metrics: str) -> float:
        """The first of these metrics that there is, its labels together; nan is not known."""
        return next((sum(values[metric]) for metric in metrics if metric in values), math.nan)

    solar = "inverter_string_power_watts" if family == "HYBRID" else "inverter_power_output_watts"
    export = total("meter_power_export_watts", "inverter_meter_power_watts", "inverter_active_power_watts")
    load = total("inverter_power_output_watts") - total("inverter_active_power_watts")
    if "meter_power_generation_watts" in values:
        load = total("meter_power_generation_watts") - total("meter_power_export_watts")
    elif math.isnan(load):
        load = total("inverter_load_watts") + sum(values["inverter_backup_load_watts"])
    charges = values["battery_state_of_charge_ratio"]
    found = {
        "generation_watts": total("meter_power_generation_watts", solar),
        "house_watts": load,
        "export_watts": export,
        "battery_watts": total("battery_power_watts"),
        "battery_charge_percent": 100 * sum(charges) / len(charges) if charges else math.nan,
        "grid_watts": 0 - export,
    }
    return {key: round(number, 3) for key, number in found.items() if not math.isnan(number)}


def energies(counters: Mapping[Series, float]) -> dict[str, float]:
    """Energies, in kWh, by the words of COUNTED: of counters, or of what they gained."""
    return {
        word: round(counters[metric, ""] * watt_hours(metric) / 1000, 3)
        for word, metrics in COUNTED.items()
        for metric in reversed(metrics)  # the first that there is counts
        if (metric, "") in counters
    }


# A device of the house. knows: the keys of what it knows while it is not silent; figures: what is known of it now;
# metered: a hybrid's own meter speaks; begun: its day, and since when it counts that; gained: what it has gained since.
Member = collections.namedtuple("Member", "serial family knows figures metered begun gained")


def member(device: Device, store: Store, now: float) -> Member:
    """All figures of a device. Flows go when it is silent, and today's energies at local midnight."""
    live, day = device.live, device.live.day
    present = flows(device.family, live.gauges)
    lifetime = energies({series: live.counters[series] for series in live.energies()})
    today: dict = {}
    begun, gained = None, {}
    if day and day.date == datetime.fromtimestamp(store.clock(now)).date():
        begun, gained = (day.date, day.since), energies(live.gained())
        whole = {}  # of the day from midnight on
        if day.before is not None:
            whole["generated"] = round(gained["generated"] + day.before * watt_hours(OWN_DAY[0]) / 1000, 3)
        today = {f"{word}_today_kilowatt_hours": energy for word, energy in {**gained, **whole}.items()}
        if day.since and gained.keys() - whole.keys():
            today["today_since"] = day.since.isoformat(timespec="seconds")
    knows = {*present, *(f"{word}{end}_kilowatt_hours" for word in lifetime for end in ("_today", ""))}
    figures = {} if store.is_stale(live.fresh, now) else dict(present)
    figures.update({**today, **{f"{word}_kilowatt_hours": number for word, number in lifetime.items()}})
    metered = ("meter_power_export_watts", "") in live.gauges
    return Member(device.serial, device.family, knows, figures, metered, begun, gained)


def sources(key: str, members: Sequence[Member]) -> list[list[Member]]:
    """The groups of devices that know a figure of the house; the first of which any is known counts, so each flow once.

    HomeKit 1000s measure the roof, and an inverter beside them adds nothing; but their second channel sees what a
    hybrid gives and takes, the battery's share included. A hybrid without a meter knows its own terminals alone.
    """
    roofs, kits, hybrids, grid_tied = (
        [one for one in members if one.family == name] for name in ("HK1000", "HK3000", "HYBRID", "GRID")
    )
    word = key.partition("_")[0]
    if word in ("generation", "generated"):
        groups = [roofs, hybrids + grid_tied]
        return groups[::-1] if any(key in one.knows for one in hybrids) else groups
    if word in ("exported", "imported"):
        return [roofs, kits, hybrids, grid_tied]
    if word in ("export", "grid"):
        return [roofs, kits, [one for one in hybrids if one.metered], grid_tied, hybrids]
    return [roofs, hybrids] if word == "house" else [[*members]]


def knowing(key: str, members: Sequence[Member]) -> list[Member]:
    """The devices whose sum is a figure of the house; none if it is not known."""
    for several in sources(key, members):
        group = [one for one in several if key in one.knows]
        known = [one for one in group if key in one.figures]
        if len(known) == len(group) > 0:
            return known
        if known or key.startswith("generat") and any(one.family == "HYBRID" for one in group):
            return []  # a member that is not known makes a sum unknown, not smaller; no roof stands in for a hybrid
    return []


def day_of_house(members: Sequence[Member], window: Window, now: datetime) -> dict:
    """What a house has used today and its two shares, made of gains over one window."""
    words = ("generated", "imported", "exported")
    groups = {word: knowing(f"{word}_today_kilowatt_hours", members) for word in words}
    # A HomeKit 1000 sees all that an inverter gives and takes.
    roofs = [one for one in groups["exported"] if one.family == "HK1000"]
    parts = dict.fromkeys(words, roofs)
    if not roofs:
        batteries = [one for one in members if "battery_charged_today_kilowatt_hours" in one.knows]
        parts = {**groups, "battery_discharged": batteries, "battery_charged": batteries}
    is_known = all(word in one.gained for word, group in parts.items() for one in group)
    if not (is_known and groups["imported"] and all(parts[word] for word in words)):
        return {}
    everyone = [one for group in (*parts.values(), *groups.values()) for one in group]
    window.move({one.serial: one.begun for one in everyone}, {one.serial: one.gained for one in everyone}, now)

    def sum_of(word: str, group: Sequence[Member]) -> float:
        return sum(one.gained[word] - window.base.get(one.serial, {}).get(word, 0) for one in group)

    used = round(sum(USED[word] * sum_of(word, group) for word, group in parts.items()), 3)
    window.used = max(window.used, used)  # its parts are counted in steps, and not all at once: it must not fall
    made, bought, sold = (sum_of(word, group) for word, group in groups.items())
    found: dict = {"used_today_kilowatt_hours": window.used}
    for key, whole, other in zip(SHARES, (window.used, made), (bought, sold)):
        if whole > 0:
            found[key] = round(min(max(100 * (whole - other) / whole, 0), 100), 1)
    return {**found, "today_since": window.since.isoformat(timespec="seconds")} if window.since else found


def house(members: Sequence[Member], window: Window | None = None, now: datetime = datetime.min) -> dict:
    """The house's figures, each flow once."""
    found: dict = {}
    since = {""}
    for key in KEYS:
        group = knowing(key, members)
        if group:
            numbers = [one.figures[key] for one in group]
            found[key] = round(sum(numbers) / (len(numbers) if key == "battery_charge_percent" else 1), 3)
            since.update(one.figures.get("today_since", "") for one in group if "_today_" in key)
    if "generation_watts" in found:  # at night an inverter takes a few watts, and the roof gives none
        found["generation_watts"] = max(found["generation_watts"], 0)
        if "export_watts" in found and not any("house_watts" in one.figures for one in members):
            found["house_watts"] = round(found["generation_watts"] - found["export_watts"], 3)
    found.update(day_of_house(members, window or Window(), now))
    found["today_since"] = max(*since, found.get("today_since", ""))
    return {key: found[key] for key in (*KEYS, "today_since") if found.get(key, "") != ""}


def household(store: Store, now: float) -> tuple[dict[Device, Member], dict]:
    """All devices, and the figures of their house, which remember what was shown of the day: it must not fall."""
    store.look(now)
    members = {device: member(device, store, now) for device in store.names.values()}
    return members, house([*members.values()], store.days.window, datetime.fromtimestamp(store.clock(now)))


# A minute of the picture. time: seconds since 1970 of the shown time; watts: of PICTURED, None is not known.
Point = collections.namedtuple("Point", "time watts")
PICTURED = ("generation_watts", "house_watts", "grid_watts", "battery_watts")  # sources are positive
UNKNOWN = [None] * len(PICTURED)


class History:
    """The house's flows of the last 24 hours for the picture, in memory only: one point a minute of the shown time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._points: collections.deque[Point] = collections.deque()
        self._noted = math.inf  # when `note` was last called: without connections the loop sleeps

    def note(self, now: float) -> None:
        """Add a point if a new minute has begun. Called once a second."""
        points, moment = self._points, self.store.clock(now)
        while points and points[-1].time > moment:  # the clock was set back
            points.pop()
        while points and points[0].time < moment - DAY:
            points.popleft()
        if points and now - self._noted > 2 * PERIOD:
            points.append(Point(points[-1].time + PERIOD, UNKNOWN))
        self._noted = now
        if not points or points[-1].time // 60 < moment // 60:
            point = self._present(now)
            points.extend([point] if points or point.watts != UNKNOWN else [])

    def _present(self, now: float) -> Point:
        figures = household(self.store, now)[1]
        return Point(self.store.clock(now), [figures.get(key) for key in PICTURED])

    def points(self, now: float) -> list[Point]:
        """The points from the first of which anything is known, and one for now. While nothing is known it is a gap."""
        self.note(now)
        points = [*self._points, self._present(now)]
        return list(itertools.dropwhile(lambda point: point.watts == UNKNOWN, points))


# ------------------------------------------------------------------------------------------- page, API, Home Assistant
#
# What HTTP shows beside the metrics: `see` takes a snapshot of the store, all else is text made of that.

# A device as it is shown. age: s since its last packet; asleep: silent, as an inverter is while the roof gives nothing;
# values: series to number, gauges only while it is not silent.
Shown = collections.namedtuple("Shown", "name serial info up asleep age member values")
Seen = collections.namedtuple("Seen", "devices house upstream blocked strangers time")  # time: s since 1970, as shown
ASLEEP = 100  # W at most of the roof, or of an inverter's last packet, when the inverter goes to sleep


def see(store: Store, settings: argparse.Namespace, now: float) -> Seen:
    """Everything that the page and the API show, but for the picture."""
    members, figures = household(store, now)
    devices = []
    for device, about in members.items():
        live, up = device.live, not store.is_stale(device.last_frame, now)
        last = {} if up else flows(device.family, live.gauges)
        asleep = not up and device.kind != "meter" and {**last, **figures}.get("generation_watts", 0) < ASLEEP
        age = round(max(now - device.last_frame, 0), 1)
        values = {**({} if store.is_stale(live.fresh, now) else live.gauges), **live.counters}
        devices.append(Shown(device.name, device.serial, dict(device.info), up, asleep, age, about, values))
    asked = [store.gauges.get(f"sems_mitm_{name}", lambda: None)() for name in ("upstream_up", "queue_bytes")]
    reached, waiting = None if asked[0] is None else bool(asked[0]), asked[1] or 0
    address = "" if settings.mode == LOCAL else settings.upstream_text
    upstream = {"mode": settings.mode, "address": address, "up": reached, "queue_bytes": waiting}
    blocked = store.totals["inbound_unknown_packets_total", ""]
    return Seen(devices, figures, upstream, blocked, dict(store.strangers), store.clock(now))


def devices_json(seen: Seen) -> str:
    """/api/devices. A device's values have flat names, such as meter_voltage_volts_channel_1."""
    devices = []
    for device in seen.devices:
        name = dict(zip(("device", "model", "serial", "full_serial"), (*device.name, device.serial)))
        about = {**name, **device.info, "up": device.up, "age_seconds": device.age, **device.member.figures}
        values = {
            "_".join((series[0], *re.findall(r"\w+", series[1]))): number for series, number in device.values.items()
        }
        devices.append({**about, "values": values})
    strangers = [{"host": host, "said": said} for host, said in seen.strangers.items()]
    found = {"devices": devices, "upstream": seen.upstream, "blocked": seen.blocked, "strangers": strangers}
    return json.dumps(found) + "\n"


def household_json(seen: Seen) -> str:
    """/api/household."""
    devices = {device.serial: device.member.figures for device in seen.devices}
    return json.dumps({"house": seen.house, "devices": devices}) + "\n"


NEGATIVE = {"grid_watts": ("To the grid", "sold"), "battery_watts": ("Into the battery", "battery")}  # without its sign
NOW = (*PICTURED, "battery_charge_percent")
UNIT_OF = {  # by a key's last word: unit and decimals; device_class and state_class in Home Assistant
    "watts": ("W", 0, "power", "measurement"),
    "percent": ("%", 0, "", "measurement"),
    "hours": ("kWh", 1, "energy", "total_increasing"),
}
REFRESH = 30  # s between reloads of the page, where the settings say nothing else
STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#566070;--back:#f4f5f5;--card:#fff;--line:#dde1e6;--good:#17693b;--bad:#b3261e;
--solar:#9a6c00;--house:#3274d9;--bought:#e55400;--sold:#37872d;--battery:#a352cc}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#a3adba;--back:#111217;--card:#181b1f;--line:#343b45;--good:#6fd394;
--bad:#ff8a80;--solar:#e0b400;--house:#5794f2;--bought:#fa6400;--sold:#56a64b;--battery:#b877d9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--back);color:var(--ink);font:1rem/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.25rem;margin:0}h2{font-size:1.1rem;margin:0}p{margin:.25rem 0}b{font-weight:400}a{color:inherit}code{font-size:.95em}
header,footer{display:flex;flex-wrap:wrap;gap:.25rem 1rem;align-items:baseline;justify-content:space-between}
main{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
section{flex:1 1 20rem;min-width:0;background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem}
section.wide{flex-basis:100%}
small,.dim,dt,footer{color:var(--dim);font-size:.875rem;font-weight:400}.asleep{color:var(--dim)}.good{color:var(--good)}.bad{color:var(--bad)}
dl{display:grid;grid-template-columns:repeat(var(--columns),1fr);gap:.5rem 1rem;margin:.5rem 0 0}
dt{line-height:1.3}dd{margin:0;font-size:1.75rem;line-height:1.25;font-variant-numeric:tabular-nums;white-space:nowrap}
dd small{color:inherit;font-size:1.25rem}dl.now dd{font-size:clamp(1.75rem,4.5vw,2.75rem)}
@media(max-width:48rem){dl{grid-template-columns:1fr 1fr}div:last-child:nth-child(odd){grid-column:1/-1}}
.solar{color:var(--solar)}.house{color:var(--house)}.bought{color:var(--bought)}.sold{color:var(--sold)}
.battery{color:var(--battery)}
figure{margin:1.25rem 0 0}figure>svg{display:block;width:calc(100% - 4.5rem);height:17rem;margin:0 1rem 2rem 3.5rem;overflow:visible}
text{font-size:.8125rem;fill:var(--dim)}text.level{transform:translate(-.5rem,.3em)}text.time{transform:translateY(1.2rem)}
text.midnight{fill:var(--ink);font-weight:600}
path{fill:none;stroke:currentColor;stroke-width:2px;vector-effect:non-scaling-stroke;stroke-linejoin:round}
path.area{fill:currentColor;fill-opacity:.3;stroke-width:1px}path.house{stroke-width:2.5px}
path.grid{stroke:url(#grid)}path.grid,path.bought,path.sold{stroke-dasharray:7 4}path.battery{stroke-width:3px;stroke-dasharray:.1 6;stroke-linecap:round}
path.rule{stroke:var(--line);stroke-width:1px}path.zero,path.midnight{stroke:var(--dim);stroke-width:1px}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:0;padding:0;font-size:.875rem}
ul svg{width:2rem;height:.75rem;margin-right:.4rem;vertical-align:middle}li{margin:.25rem 0}ol{padding-left:1.25rem}
summary{cursor:pointer;margin-top:.5rem}table{border-collapse:collapse;width:100%;font-size:.875rem}
th,td{padding:.2rem 0;border-top:1px solid var(--line);text-align:left;font-weight:400;vertical-align:top}
td{text-align:right;padding-left:1rem;white-space:nowrap;font-variant-numeric:tabular-nums}
@media(max-width:40rem){.other{display:none}}
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="refresh" content="{refresh}"><link rel="icon" href="data:,"><title>sems_mitm</title><style>{style}</style></head>
<body><header><h1>sems_mitm</h1><p>{portal}</p></header>
<main>
"""
FOOT = """</main>
<footer><p>{blocked} from the portal blocked</p>
<p><a href="{telemetry}">Metrics</a> · <a href="/api/devices">JSON</a> · <a href="/home-assistant.yaml">Home Assistant</a> · version {version}</p></footer></body></html>
"""
SECTION = '<section class="wide"><h2>{}</h2>{}</section>\n'
TILE = '<div><dt>{}</dt><dd class="{}">{}<small> {}</small></dd></div>'
CARD = '<section><h2>{model}</h2><p>{state}, last packet {last}</p><p class="dim">{about}</p>{table}</section>\n'
VALUES_TABLE = "<details><summary>All values ({count})</summary><table>{cells}</table></details>"
SILENT_HOUSE = '<p class="dim">Nothing is known now: the devices that measure the house are silent.</p>'
AWAY = "; what is shown here does not need it. To see why, run <code>{doctor}</code> on this machine"
ON_LOOPBACK = """<p><b class="bad">Port {port} is open on {host} only: no other machine reaches it.</b> Start the exporter with
<code>--sems.listen-address=:{port}</code>.</p>
"""
SET_UP = """<ol>
<li>Give this machine a fixed address{now}, and let the name service of your router or Pi-hole answer <code>{name}</code>
with it.</li>
<li>Power-cycle the device's Wi-Fi or LAN module: it asks for the name when it starts.</li>
<li>It connects to port {port} of this machine within a minute or two, and appears here.</li></ol>
<p>Nothing after five minutes? <code>{doctor}</code> on this machine says what is missing.</p>
"""


IN_CONTAINER = any(map(os.path.exists, ("/.dockerenv", "/run/.containerenv")))  # of Docker or Podman


def doctor_command() -> str:
    """How doctor is run on this machine, for HTML; in a container by the name that the README gives that."""
    command = f"python3 {html.escape(shlex.quote(os.path.abspath(__file__)))} doctor"
    return "docker exec sems_mitm python3 -m sems_mitm doctor" if IN_CONTAINER else command


def portal_state(upstream: dict) -> str:
    """The portal's state in words, with the next step where there is one."""
    if upstream["mode"] == LOCAL:
        return "Local: no portal, the exporter answers"
    states = {None: "not tried yet", True: '<b class="good">reachable</b>', False: '<b class="bad">away</b>'}
    waiting = f", {upstream['queue_bytes']:,} bytes wait for it" if upstream["queue_bytes"] else ""
    step = AWAY.format(doctor=doctor_command()) if upstream["up"] is False else ""
    return f"Portal {html.escape(upstream['address'])}: {states[upstream['up']]}{waiting}{step}"


def minus(text: str) -> str:
    """A number's text with the sign that people write."""
    return text.replace("-", "−")


def in_words(key: str, number: float) -> tuple[str, str, str, str]:
    """A figure's title, colour, number and unit; the number has no sign where the title says it."""
    title, colour = KEYS[key][:2]
    unit_name, decimals = UNIT_OF[key.rpartition("_")[2]][:2]
    number = round(number, decimals) + 0.0  # without the sign of a 0
    if number < 0 and key in NEGATIVE:
        (title, colour), number = NEGATIVE[key], -number
    return title, colour, minus(f"{number:,.{decimals}f}"), unit_name


def tile_row(keys: Iterable[str], figures: dict, css: str) -> str:
    """The figures that are known, in rows of equal length."""
    known = [in_words(key, figures[key]) for key in keys if key in figures]
    columns = len(known) if len(known) <= 6 else (len(known) + 1) // 2
    tiles = "".join(TILE.format(*words) for words in known)
    return f'<dl class="{css}" style="--columns:{columns}">{tiles}</dl>' if known else ""


# The foldable table. A quantity's name is its metric's, without kind of device and unit, or one of these.
NAMES = {
    "meter_power_export_watts": "Power to the grid",
    "meter_channel_power_watts": "Power",
    "meter_channel_energy_export_watthours_total": "Energy out",
    "meter_channel_energy_import_watthours_total": "Energy in",
    "meter_energy_export_decawatt_hours_total": "Energy to the grid",
    "meter_energy_import_decawatt_hours_total": "Energy from the grid",
    "meter_power_generation_watts": "Solar power",
    "meter_energy_generation_decawatt_hours_total": "Solar energy",
    "inverter_meter_power_watts": "Power at the CT meter",
    "inverter_meter_energy_export_watthours_total": "Energy to the grid",
    "inverter_meter_energy_import_watthours_total": "Energy from the grid",
    "inverter_active_power_watts": "Power at the grid connection",
    "inverter_energy_output_hectowatt_hours_day": "Energy generated today",
    "inverter_energy_output_hectowatt_hours_total": "Energy generated",
    "inverter_energy_export_watthours_total": "Energy out of its grid terminals",
    "inverter_energy_import_watthours_total": "Energy into its grid terminals",
    "inverter_energy_load_watthours_total": "Energy used",
    "inverter_uptime_hours_total": "Time of operation",
    "inverter_hybrid_work_mode": "Work mode",
    "inverter_error_bitmap": "Errors",
    "inverter_warning_bitmap": "Warnings",
    "inverter_derating_bitmap": "Derating",
    "inverter_rssi_percent": "Wi-Fi signal",
    "battery_energy_charge_watthours_total": "Energy into the battery",
    "battery_energy_discharge_watthours_total": "Energy from the battery",
}
UNITS_SHOWN = {"Wh": ("kWh", 0.001), "1": ("", 1.0)}  # in place of a metric's unit, and by what it is multiplied


def amount(metric: str, number: float) -> str:
    """A value for people: with its unit, a mode in words."""
    if metric.endswith("_mode"):  # its help names the modes
        return dict(re.findall(r"(\d+) ([a-z ]+)", METRICS[metric][1])).get(f"{number:g}", f"{number:g}")
    if metric.endswith("_bitmap"):
        return f"{number:#x}" if number else "none"
    size, _, name = unit(metric).rpartition(" ")  # the original has units such as 0.1 V
    name, factor = ("%", 100.0) if metric.startswith("battery_state") else UNITS_SHOWN.get(name, (name, 1.0))
    return minus(f"{round(number * float(size or 1) * factor, 3):,.12g} {name}").rstrip()


@functools.cache
def quantities_shown(name: str) -> dict[Series, str]:
    """What is shown of a family, in a few words, such as String voltage: a series for each quantity.

    Of those of the same registers it is the one in V and not in 0.1 V, without a channel.
    """
    by_rank = sorted(VALUES[name], key=lambda value: (unit(value.series[0])[:2] == "0.", value.series[1]), reverse=True)
    best = {(value.register, *value.later): value.series for value in by_rank}.values()  # the last one counts
    ends = f"^(meter|inverter)_|(_({'|'.join(UNITS)}))?(_total|_day)?$"
    series = dict.fromkeys(value.series for value in VALUES[name] if value.series in best)
    return {one: NAMES.get(one[0]) or re.sub(ends, "", one[0]).replace("_", " ").capitalize() for one in series}


def table_rows(name: str, values: dict[Series, float]) -> list[tuple[str, str]]:
    """(what, how much) of a device of the family `name`, without channels and strings of which all is 0."""
    there = {"", *(labels for (_, labels), number in values.items() if number)}
    known = [series for series in quantities_shown(name) if series in values]
    known = [(metric, labels) for metric, labels in known if labels in there or labels.endswith('"1"')]
    several = {labels.partition("=")[0] for _, labels in known if labels and not labels.endswith('"1"')}
    rows = []
    for series in known:
        what, (kind, _, which) = quantities_shown(name)[series], series[1].replace('"', "").partition("=")
        if kind in several:
            what += f", {which}" if kind in what.lower() else f", {kind} {which}"
        rows.append((what, amount(series[0], values[series])))
    return rows


def span(seconds: float) -> str:
    """An age in words."""
    units = ((86400, "day"), (3600, "hour"), (60, "minute"))
    size, word = next((unit for unit in units if seconds >= unit[0]), (1, "second"))
    return f"{seconds // size:.0f} {word}{'' if seconds // size == 1 else 's'}"


def card(device: Shown) -> str:
    """A device on the page; every text of a device is escaped."""
    kind, model, serial, firmware = map(html.escape, (*device.name[:2], device.serial, device.info["firmware"]))
    silent = ("asleep", "asleep until the sun is up") if device.asleep else ("bad", "silent")
    css, state = ("good", "reporting") if device.up else silent
    rows = table_rows(device.member.family, device.values)
    cells = "".join(f"<tr><th>{html.escape(what)}</th><td>{text}</td></tr>" for what, text in rows)
    return CARD.format(
        model=model,
        state=f'<b class="{css}">{state}</b>',
        last=f"{span(device.age)} ago" if device.age >= 1 else "just now",
        about=f"{kind} · serial {serial}{f' · firmware {firmware}' if firmware else ''}",
        table=VALUES_TABLE.format(count=len(rows), cells=cells) if rows else "",
    )


# The picture: of PICTURED, class of the path, and legend by the class of the swatch. Solar is an area, the others are lines
# of their own patterns.
LEGENDS = (
    ("solar area", {"solar area": "Solar"}),
    ("house", {"house": "House"}),
    ("grid", {"bought": "Bought from the grid (above 0)", "sold": "Sold to the grid (below 0)"}),
    ("battery", {"battery": "Battery (above 0: out of it, below 0: into it)"}),
)
SWATCH = '<li><svg viewBox="0 0 32 12" aria-hidden="true"><path class="{}" d="{}"/></svg>{}</li>'
FIGURE = """<figure><svg role="img" aria-labelledby="title desc">
<title id="title">Power of the house in the last 24 hours</title><desc id="desc">{now}</desc>
<svg width="100%" height="100%" viewBox="{box}" preserveAspectRatio="none">
<linearGradient id="grid" gradientUnits="userSpaceOnUse" x1="0" x2="0" y1="{top}" y2="{bottom}">
<stop offset="{zero}" class="bought" stop-color="currentColor"/><stop offset="{zero}" class="sold" stop-color="currentColor"/>
</linearGradient>{paths}</svg>
{texts}</svg><figcaption><ul>{legend}</ul></figcaption></figure>
"""


def outline(points: list[Point], which: int, left: float) -> str:
    """The path of a flow in minutes and W, broken where it is not known; solar's goes down to 0 and closes.

    What is known holds until the next point: a point that is alone is a line, too.
    """
    path = ""
    spans = zip(points, [point.time for point in points[1:]] + [points[-1].time])
    for known, run in itertools.groupby(spans, lambda pair: pair[0].watts[which] is not None):
        if known:
            pairs = list(run)
            corners = [(point.time, point.watts[which]) for point, _ in pairs]
            corners.append((pairs[-1][1], corners[-1][1]))
            if not which:
                corners = [(corners[0][0], 0), *corners, (corners[-1][0], 0)]
            line = " ".join(f"{(at - left) / 60:.1f} {-round(watts)}" for at, watts in corners)
            path += f"M{line}" if which else f"M{line}Z"
    return path


# Where the picture lies: shown time from left to right, W from low to high; what is labelled: levels of W, and whole
# hours of local time, of a day every so many.
Axes = collections.namedtuple("Axes", "left right low high levels hours every")


def axes_of(points: list[Point]) -> Axes:
    """Time from the minute of the first point to the last, with midnight labelled; 0 and all powers in round steps."""
    left = points[0].time // 60 * 60
    right = max(points[-1].time, left + 1)
    known = [0.0, *(watts for point in points for watts in point.watts if watts is not None)]
    wanted = max(max(known) - min(known), 500) / 7  # W a step, at least: seven steps, or a few less
    size = 10 ** math.floor(math.log10(wanted))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= wanted)
    low = step * math.floor(min(known) / step)
    high = max(step * math.ceil(max(known) / step), low + step)
    levels = [low + i * step for i in range(round((high - low) / step) + 1)]
    every = next((every for every in (1, 2, 3) if (right - left) / 3600 / every <= 8), 4)
    quarters = range(math.ceil(left / 900) * 900, math.floor(right) + 1, 900)  # by which time zones differ
    hours = [hour for hour in map(datetime.fromtimestamp, quarters) if hour.minute == 0 and hour.hour % every == 0]
    return Axes(left, right, low, high, levels, hours, every)


def axis_text(x: float, y: float, css: str, text: str) -> str:
    """A text at an axis, placed in % of the plot: levels left of it, all else below."""
    anchor = "end" if css == "level" else "middle"
    return f'<text x="{x:.1f}%" y="{y:.1f}%" class="{css}" text-anchor="{anchor}">{minus(text)}</text>'


def time_texts(axes: Axes) -> Iterator[str]:
    """The labels below the plot: whole hours, the date at midnight; without two hours both ends."""
    if len(axes.hours) < 2:
        for x, moment in ((0, axes.left), (100, axes.right)):
            yield axis_text(x, 100, "time", f"{datetime.fromtimestamp(moment):%H:%M}")
    for hour in axes.hours:
        x = 100 * (hour.timestamp() - axes.left) / (axes.right - axes.left)
        if len(axes.hours) > 1 or 15 < x < 85:
            is_second = len(axes.hours) > 4 and hour.hour // axes.every % 2  # a phone has no room for it
            css = "time midnight" if not hour.hour else "time other" if is_second else "time"
            yield axis_text(x, 100, css, f"{hour:%H:%M}" if hour.hour else f"{hour.day} {hour:%b}")


def rules(axes: Axes) -> Iterator[tuple[str, str]]:
    """(class, path) of the lines behind the flows, in minutes and W."""
    width, height = (axes.right - axes.left) / 60, axes.high - axes.low
    across = [f"M0 {-level:g}H{width:.2f}" for level in axes.levels]
    down = [(hour.hour, f"M{(hour.timestamp() - axes.left) / 60:.1f} {-axes.high:g}v{height:g}") for hour in axes.hours]
    yield "rule", "".join([*across, *(path for hour, path in down if hour)])
    yield "zero", f"M0 0H{width:.2f}"
    yield from (("midnight", path) for hour, path in down if not hour)


def picture(points: list[Point], figures: dict) -> str:
    """The house's flows as SVG, or nothing. The plot is in minutes and W and stretches; its texts do not."""
    drawn = [i for i in range(len(PICTURED)) if any(point.watts[i] is not None for point in points)]
    if not drawn:
        return ""
    axes = axes_of(points)
    height = axes.high - axes.low
    paths = [*rules(axes), *((LEGENDS[i][0], outline(points, i, axes.left)) for i in drawn)]
    scale = [axis_text(0, 100 * (axes.high - level) / height, "level", f"{level / 1000:g} kW") for level in axes.levels]
    legend = [(css, "M0 6H32" if i else "M1 11V3H31V11Z", text) for i in drawn for css, text in LEGENDS[i][1].items()]
    known = (in_words(key, figures[key]) for key in NOW if key in figures)
    sentence = "; ".join(f"{title} {number} {unit_name}" for title, _, number, unit_name in known)
    figure = FIGURE.format(
        now=f"Now: {sentence}." if sentence else "Nothing is known now.",
        box=f"0 {-axes.high:g} {(axes.right - axes.left) / 60:.2f} {height:g}",
        top=f"{-axes.high:g}",
        bottom=f"{-axes.low:g}",
        zero=f"{axes.high / height:.4f}",
        paths="".join(f'<path class="{css}" d="{path}"/>' for css, path in paths),
        texts="".join((*scale, *time_texts(axes))),
        legend="".join(SWATCH.format(*row) for row in legend),
    )
    return SECTION.format("Power, last 24 hours", figure)


def html_page(seen: Seen, points: list[Point], settings: argparse.Namespace, address: str) -> Iterator[str]:
    """The page at /, in parts. address: this machine's, if it is known."""
    yield HEAD.format(style=STYLE, portal=portal_state(seen.upstream), refresh=getattr(settings, "refresh", REFRESH))
    if seen.devices:
        yield SECTION.format("The house", tile_row(NOW, seen.house, "now") or SILENT_HOUSE)
        yield picture(points, seen.house)
        row = tile_row([key for key in KEYS if "_today_" in key or key in SHARES], seen.house, "today")
        since = seen.house.get("today_since", "")[11:16]
        title = f"Today <small>since {since}</small>" if since not in ("", "00:00") else "Today"
        yield row and SECTION.format(title, row)
    else:
        now = f" (now {html.escape(address)})" if address else ""
        name = PORTAL_NAME if literal_addresses(*settings.upstream) else settings.upstream[0]  # an address is no name
        host, port = settings.listen_address
        steps = (ON_LOOPBACK if re.fullmatch(r"localhost|127[0-9.]+|::1", host) else "") + SET_UP
        steps = steps.format(now=now, host=host, name=html.escape(name), port=port, doctor=doctor_command())
        yield SECTION.format("No device has connected yet", steps)
    for device in sorted(seen.devices, key=lambda device: (device.name[0] != "meter", *device.name[1:])):
        yield card(device)
    yield FOOT.format(
        blocked=f"{seen.blocked:,} packet{'' if seen.blocked == 1 else 's'}",
        telemetry=html.escape(settings.telemetry_path),
        version=VERSION,
    )


PACKAGE = """# sems_mitm in Home Assistant: a package. Devices in it, as known on {time}:
{devices}
# Save it with
#     curl --create-dirs -fo /config/packages/sems_mitm.yaml http://{address}/home-assistant.yaml
# and have in configuration.yaml, once:
#     homeassistant:
#       packages: !include_dir_named packages
# Restart Home Assistant the first time; later, when the file is new, call the action rest.reload. Fetch the file again when a
# device is new, and by day if an inverter is missing: it sleeps at night, and after a restart the exporter does not know it.
#
# Energy dashboard, which sensor for which field (take the devices' energies: those of the house are sums, which are others
# for as long as a device is not known after a restart):
{fields}
rest:
  - resource: {resource}
    scan_interval: 60
    sensor:
{sensors}
"""
HOUSE = "House"
# Fields of the Energy dashboard, and the key that goes there: powers of the house, and energies of devices, because the
# counters of one device never change places with those of another.
FIELDS = (
    ("Grid, energy imported from the grid", "imported_kilowatt_hours"),
    ("Grid, energy exported to the grid", "exported_kilowatt_hours"),
    ("Grid, power (positive is bought: the standard direction)", "grid_watts"),
    ("Solar panels, energy", "generated_kilowatt_hours"),
    ("Solar panels, power", "generation_watts"),
    ("Battery, energy discharged", "battery_discharged_kilowatt_hours"),
    ("Battery, energy charged", "battery_charged_kilowatt_hours"),
    ("Battery, power (positive is discharging: the standard direction)", "battery_watts"),
)


def sensor_name(name: str, key: str) -> str:
    """What a sensor is called: the house's power is not the "House house power"."""
    return f"{name} {KEYS[key][2]}".replace(f"{HOUSE} house", HOUSE)


def sensor(path: Sequence[str], name: str, key: str) -> str:
    """A sensor for a key under path in /api/household, in YAML; what is not known is unavailable there."""
    unit_name, _, device_class, state_class = UNIT_OF[key.rpartition("_")[2]]
    is_today = "_today_" in key
    if path[-1] == "house" and device_class == "energy" and not is_today:
        # After a restart the sum is another until all devices are known: a fall is no reset. A day's does fall to 0.
        state_class = "total"
    number = f"value_json{''.join(f'.get({part!r}, {{}})' for part in path)}.get('{key}')"
    fields = {
        "name": sensor_name(name, key),
        "unique_id": f"{path[-1]}_{key}",
        "device_class": "battery" if key == "battery_charge_percent" else device_class,
        "state_class": state_class,
        "unit_of_measurement": unit_name,
        "icon": f"mdi:{KEYS[key][3]}",
        "value_template": f"{{{{ {number} if value_json is mapping else none }}}}",
        "availability": f"{{{{ value_json is mapping and {number} is not none }}}}",
        "json_attributes_path": "$" + "".join(f"['{part}']" for part in path) if is_today else "",
        "json_attributes": ["today_since"] if is_today else "",
    }
    return "      - " + "\n        ".join(f"{field}: {json.dumps(value)}" for field, value in fields.items() if value)


def named_for_home(devices: Sequence[Shown]) -> dict[str, str]:
    """Serial number to name of the devices of a package: models, with the serial number's end where two are alike."""
    known = [device for device in devices if device.member.knows and re.fullmatch("[A-Z0-9]{16}", device.serial)]
    models = [re.sub(r"[^A-Za-z0-9.()/+-]+", " ", device.name[1]).strip() for device in known]
    names = [model.replace(" Smart Meter", "") or device.name[0] for model, device in zip(models, known)]
    ends = [f" {device.serial[-8:]}" if names.count(name) > 1 else "" for name, device in zip(names, known)]
    return {device.serial: name + end for device, name, end in zip(known, names, ends)}


def counting(names: dict[str, str], members: Sequence[Member], key: str) -> list[list[str]]:
    """Names of the devices that count a key: those that the house takes, then those that count the same."""
    groups = ([names[one.serial] for one in group if key in one.knows] for group in sources(key, members))
    return [*filter(None, groups)]


def energy_fields(names: dict[str, str], members: Sequence[Member], of_house: Iterable[str]) -> Iterator[str]:
    """Comments: which sensor goes into which field of the Energy dashboard, and which count the same."""
    for field, key in FIELDS:
        takers = counting(names, members, key) if key.endswith("hours") else [[HOUSE]] if key in of_house else []
        if takers:
            yield f"#     {field}: {', '.join(sensor_name(name, key) for name in takers[0])}"
    for word, what in (("generated", "roof"), ("imported", "grid")):
        first, *again = counting(names, members, f"{word}_kilowatt_hours") or [[]]
        others = dict.fromkeys(name for group in again for name in group if name not in first)
        if others:
            better, other = " and ".join(first), " and ".join(others)
            yield f"# {better} and {other} count the same {what}: take only the energies of {better} there."


def keys_of_house(members: Sequence[Member]) -> set[str]:
    """The keys that a house of these devices has when none is silent and the day is not young."""
    keys = set(house([one._replace(figures=dict.fromkeys(one.knows, 1)) for one in members]))
    has_day = keys.issuperset(f"{word}_today_kilowatt_hours" for word in ("generated", "imported", "exported"))
    return keys.union(("used_today_kilowatt_hours", *SHARES) if has_day else ())


def home_assistant(seen: Seen, address: str) -> str:
    """A package of sensors on http://ADDRESS/api/household. Nothing from the network is more than a JSON string in it.
    Empty while no device is known.
    """
    names = named_for_home(seen.devices)
    if not names:
        return ""
    members = [device.member for device in seen.devices if device.serial in names]
    of_house = keys_of_house(members)
    owners = [
        (["house"], HOUSE, of_house),
        *((["devices", one.serial], names[one.serial], one.knows) for one in members),
    ]
    sensors = [sensor(path, name, key) for path, name, keys in owners for key in KEYS if key in keys and KEYS[key]]
    return PACKAGE.format(
        address=address,
        time=f"{datetime.fromtimestamp(seen.time):%Y-%m-%d at %H:%M}",
        devices="\n".join(f"#     {name}, {serial}" for serial, name in names.items()),
        fields="\n".join(energy_fields(names, members, of_house)),
        resource=json.dumps(f"http://{address}/api/household"),
        sensors="\n".join(sensors),
    )


# ------------------------------------------------------------------------------------------------------------ HTTP
#
# An HTTP client is a connection of the loop like any other. When its head is there, the standard library's handler
# parses it and writes the answer, both in memory. One request a connection.

PLAIN, JSON, HTML = "text/plain; charset=utf-8", "application/json", "text/html; charset=utf-8"
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Vary": "Accept-Encoding",
    "Connection": "close",
}


class Request(http.server.BaseHTTPRequestHandler):
    """A request, from its head to its answer, both as bytes."""

    command = ""  # until the head is parsed
    wfile: io.BytesIO

    def __init__(self, web: Web, head: bytes, local: str) -> None:
        """local: HOST:PORT of this machine by which the client has come."""
        self.web, self.local = web, local
        self.rfile, self.wfile = io.BytesIO(head), io.BytesIO()

    def do_GET(self) -> None:
        """Answer by the path; what no path names is 404."""
        target = self.requestline.split()[1]  # self.path lost all leading slashes but one
        target = re.sub("(?i)^https?://[^/?]*", "", target)  # absolute: GET http://host/metrics
        path, now, loop = target.partition("?")[0] or "/", time.monotonic(), self.web.loop
        seen, points = functools.partial(see, loop.store, loop.settings, now), self.web.history.points
        answers: dict[str, tuple[str, Callable[[], Iterable[str]]]] = {
            "/": (HTML, lambda: html_page(seen(), points(now), loop.settings, self.address())),
            "/api/devices": (JSON, lambda: devices_json(seen())),
            "/api/household": (JSON, lambda: household_json(seen())),
            "/-/healthy": (PLAIN, lambda: "healthy\n"),
            loop.settings.telemetry_path: (EXPOSITION, lambda: exposition(loop.store.collect(now))),
        }
        if path in answers:
            content_type, text = answers[path]
            self.answer(200, content_type, "".join(text()))
        elif path == "/-/ready":
            self.answer(*(200, PLAIN, "ready\n") if loop.listeners else (503, PLAIN, "not ready\n"))
        elif path == "/home-assistant.yaml":
            package, address = home_assistant(seen(), self.host()), self.host()
            none = f"No device is known yet: fetch this again when http://{address}/ shows one.\n"
            self.answer(*(200, PLAIN, package) if package else (503, PLAIN, none))  # 503: a file fetched before stays
        else:
            self.answer(404, *(JSON, "{}\n") if f"{path}/".startswith("/api/") else (PLAIN, "not found\n"))

    do_HEAD = do_GET

    def address(self) -> str:
        """This machine's address in the network, as far as it is known."""
        host = re.sub(r":[0-9]+$", "", self.host()).strip("[]")
        return own_address("192.0.2.1") if host.startswith("127.") or host in ("localhost", "::1") else host

    def host(self) -> str:
        """HOST:PORT by which the client reached this machine, as far as it says so plainly."""
        host = self.headers.get("Host", "")
        is_plain = re.fullmatch(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?", host)
        return host if is_plain else self.local

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what cannot be parsed, or is no GET or HEAD: of those the base class says that it has none (501)."""
        code = 405 if code == 501 else code
        self.answer(code, PLAIN, f"{http.HTTPStatus(code).phrase}\n")

    def answer(self, status: int, content_type: str, text: str) -> None:
        """Write an answer, packed if the client takes that."""
        body, headers = text.encode(), {"Content-Type": content_type, **SAFE_HEADERS}
        if self.wants_gzip():
            packer = zlib.compressobj(1, wbits=31)
            body, headers["Content-Encoding"] = packer.compress(body) + packer.flush(), "gzip"
        if status == 405:
            headers["Allow"] = "GET, HEAD"
        self.request_version = self.protocol_version  # of what the base class could not parse it is 0.9, without a head
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body if self.command != "HEAD" else b"")

    def wants_gzip(self) -> bool:
        """Whether the client takes gzip: by its name, else as *, and not with q=0 (RFC 9110, 12.5.3)."""
        accepted = getattr(self, "headers", {}).get("Accept-Encoding", "").lower()  # no headers: no head was parsed
        codings = (part.partition(";") for part in accepted.split(","))
        weights = {name.strip(): weight.strip() for name, _, weight in codings}
        return not re.fullmatch(r"q=0(\.0*)?", weights.get("gzip", weights.get("*", "q=0")))


def head_of(data: bytes) -> bytes:
    """The head of a request, empty until it is whole: up to an empty line, or an HTTP/0.9 line of two words."""
    line, newline, _ = data.partition(b"\n")
    if newline and len(line.split()) < 3:
        return line + newline
    end = re.search(rb"\n\r?\n", data)
    return data[: end.end()] if end else b""


class HttpClient:
    """A connection to HTTP: its request's head is collected, then answered, then it is closed."""

    def __init__(self, web: Web, sock: socket.socket, now: float) -> None:
        self.web, self.loop = web, web.loop
        self.connection = Connection(web.loop, sock, self, Outbox(), now)
        self.is_answered = False
        self.began = now  # to send its head, or to take the answer
        self._head = b""

    @property
    def waiting(self) -> int:
        """Bytes that it has not taken yet."""
        return self.connection.outbox.size

    def ready(self, connection: Connection, events: int, now: float) -> None:
        """Called when the socket is ready."""
        if events & selectors.EVENT_READ:
            data = connection.receive(now)
            if not self.is_answered:
                self._head = (self._head + data).lstrip(b"\r\n")  # empty lines before a request (RFC 9112, 2.2)
                head = head_of(self._head)
                if head or len(self._head) > HTTP_HEAD:
                    self._answer(head or self._head, now)

    def _answer(self, head: bytes, now: float) -> None:
        """Queue the answer to a request's head; after an error of our own it is 500."""
        self.is_answered, self.began, self._head = True, now, b""
        request = Request(self.web, head, endpoint_text(self.connection.sock.getsockname()))
        if len(head) > HTTP_HEAD:
            request.send_error(431)
        elif not self.loop.do("an HTTP request", None, request.handle_one_request):
            request.send_error(500)
        self.connection.outbox.put(request.wfile.getvalue())

    def settle(self, now: float) -> None:
        """Send the answer; the end."""
        connection = self.connection
        connection.send(now)
        is_over = not self.waiting if self.is_answered else connection.ended
        if connection.error or is_over:
            return self.close()
        if self.waiting:
            self.web.bound(self)
        connection.watch(not self.is_answered)

    def look(self, now: float) -> None:
        """See to deadlines."""
        if now - self.began >= (HTTP_ANSWER_TIMEOUT if self.is_answered else HTTP_HEAD_TIMEOUT):
            self.close()

    def close(self) -> None:
        """Close the socket; what the client still said is read, or a reset would take the answer along."""
        with contextlib.suppress(OSError):
            self.connection.sock.recv(4 * SOCKET_BUFFERS)  # all that the kernel can have
        self.connection.close()
        self.web.clients.pop(self, None)
        self.loop.forget(self)


class Web:
    """Where HTTP is served: its clients, the oldest first, and what they are shown."""

    def __init__(self, loop: Loop, history: History) -> None:
        """Raises OSError if the port cannot be had."""
        self.loop, self.history = loop, history
        self.clients: dict[HttpClient, None] = {}
        self.listener = Listener(loop, listeners(*loop.settings.web_address), self._admit)
        loop.listeners.append(self.listener)

    def _admit(self, sock: socket.socket, sockaddr: tuple, now: float) -> None:
        """Serve a connection; if there are too many, end the one that takes longest to complete its request."""
        client = HttpClient(self, sock, now)
        self.clients[client] = self.loop.owners[client] = None
        self.loop.touch(client)
        if len(self.clients) > HTTP_CONNECTIONS:
            self._make_room(min(self.clients, key=lambda one: (one is client, one.is_answered)))

    def bound(self, newest: HttpClient) -> None:
        """Bound what answers take that nobody reads: the oldest others are closed."""
        excess = sum(client.waiting for client in self.clients) - HTTP_ANSWERS
        for client in [client for client in self.clients if client.waiting and client is not newest]:
            if excess > 0:
                excess -= client.waiting
                self._make_room(client)

    def _make_room(self, client: HttpClient) -> None:
        self.loop.store.add("sems_mitm_http_closed_connections_total")
        client.close()


# -------------------------------------------------------------------------------------------------- settings, serve
#
# The environment is read like a command line that stands before the real one; argparse does the rest.

Settings = argparse.Namespace  # of serve: a value for each row of FLAGS, by its fifth column


class FlagType:
    """The type of a flag's value: its name in --help, what is expected in words, and text to value or ValueError.

    Only text that is all of the pattern can be a value.
    """

    def __init__(self, metavar: str, expected: str, value: Callable = str, pattern: str = ".*") -> None:
        self.metavar, self.expected, self.value, self.pattern = metavar, expected, value, pattern

    def __call__(self, text: str):
        """Raises ArgumentTypeError, for argparse."""
        with contextlib.suppress(ValueError):
            if re.fullmatch(self.pattern, text, re.ASCII | re.DOTALL):
                return self.value(text)
        raise argparse.ArgumentTypeError(f"expected {self.expected}, not {text!a}")


def endpoint(text: str, is_peer: bool = False) -> tuple[str, int]:
    """[HOST]:PORT as a pair, HOST without its brackets; a peer needs both, and not port 0. Raises ValueError."""
    matched = re.fullmatch(r"(\[[^\[\]]*\]|[^\s/@,:\[\]]*):([0-9]{1,5})", text)
    host, port = (matched[1].strip("[]"), int(matched[2])) if matched else ("", 65536)
    if text.startswith("["):
        ipaddress.IPv6Address(host)
    if port > 65535 or is_peer and not (host and port):
        raise ValueError(text)
    return host, port


def server_list(text: str) -> list[tuple[str, int]]:
    """HOST[:PORT] of name servers, comma-separated, as pairs; port 53 is the default. Raises ValueError."""
    servers = []
    for part in [] if text == "none" else map(str.strip, text.split(",")):
        try:
            servers.append((str(ipaddress.ip_address(part)), 53))
        except ValueError:
            servers.append(endpoint(part if ":" in part.rpartition("]")[2] else f"{part}:53", is_peer=True))
    return servers


def seconds_of(text: str) -> int:
    """1h30m in seconds."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))


# fmt: off
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")
TRUTH = ("BOOL", "true, false, 1, 0, yes or no")
boolean = FlagType(*TRUTH, lambda text: text.lower() in TRUE, f"(?i){'|'.join(TRUE + FALSE)}")
debug_level = FlagType(*TRUTH, lambda text: "debug" if boolean(text) else "info")
listen_endpoint = FlagType("[HOST]:PORT", "HOST:PORT, [v6]:PORT or :PORT", endpoint)  # port 0: a free one
portal_endpoint = FlagType("HOST:PORT", "HOST:PORT or [v6]:PORT", functools.partial(endpoint, is_peer=True))
name_servers = FlagType("HOST[:PORT],...", "name servers such as 1.1.1.1,192.168.1.1:53, or none", server_list)
networks = FlagType("CIDR,...", "networks such as 192.168.1.0/24, comma-separated", lambda text: [ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if text])
duration = FlagType("DURATION", "a duration such as 90s, 5m or 1h30m", seconds_of, r"0|(?=\d)(\d{1,6}d)?(\d{1,6}h)?(\d{1,6}m)?(\d{1,6}s)?")
whole_number = FlagType("N", "a positive whole number", int, "[1-9][0-9]{0,5}")
file_name = FlagType("FILE", "a file")
url_path = FlagType("/PATH", "a path that begins with / and is not taken", str, r"(?!.*[?#])(?!/api/|/-/|/home-assistant\.yaml$)/[!-~]+")
mode_name = FlagType("MODE", "forward, local or spool", str.lower, "(?i)forward|local|spool")
level_name = FlagType("LEVEL", "debug, info, warning or error", str.lower, "(?i)debug|info|warning|error")
SWITCHES = (boolean, debug_level)  # flags that need no value: --flag is true, --no-flag false

# Every flag of serve: its group in --help, name, default, type, attribute in Settings, help. The environment variable
# follows from the name. --debug sets what --log.level sets: the last one counts.
FLAGS = (
    ("devices", "sems.listen-address", ":20001", listen_endpoint, "listen_address", "where devices connect; HOST:PORT, [v6]:PORT or :PORT"),
    ("devices", "sems.allow-from", "", networks, "allow_from", "networks whose devices may connect, comma-separated CIDR"),
    ("devices", "sems.max-connections", "256", whole_number, "max_connections", "device connections at once"),
    ("devices", "sems.max-devices", "256", whole_number, "max_devices", "devices with series of their own"),
    ("devices", "metrics.stale-after", "5m", duration, "stale_after", "when the gauges of a silent device go; 0 is never"),
    ("portal", "sems.upstream", f"{PORTAL_NAME}:20001", portal_endpoint, "upstream", "the portal"),
    ("portal", "sems.upstream-dns", "1.1.1.1,8.8.8.8", name_servers, "upstream_dns", "name servers that are asked for the portal's address, before the system is; none turns it off"),
    ("portal", "sems.mode", FORWARD, mode_name, "mode", "forward: the portal answers the devices. local: no portal, the exporter answers. spool: the exporter answers and delivers everything to the portal, however late"),
    ("portal", "sems-passthrough", "true", boolean, "passthrough", "the original's switch: false is --sems.mode local, unless that flag or its variable says otherwise"),
    ("portal", "batsignal", "false", boolean, "batsignal", "Batman on the portal's graph"),
    ("files", "sems.capture", "", file_name, "capture", "append every frame to this file"),
    ("files", "sems.backfill", "", file_name, "backfill", "append buffered readings to this file, for the command backfill"),
    ("files", "sems.spool-file", "", file_name, "spool_file", "mode spool only: an SQLite file with what is not delivered yet, so that it outlives process and machine"),
    ("HTTP", "web.listen-address", ":14028", listen_endpoint, "web_address", "where HTTP is served"),
    ("HTTP", "web.telemetry-path", "/metrics", url_path, "telemetry_path", "where the metrics are"),
    ("log", "debug", "false", debug_level, "log_level", "the same as --log.level debug"),
    ("log", "log.level", "info", level_name, "log_level", "debug, info, warning or error; one line an event, to stderr; debug adds a line a packet"),
)
# fmt: on


def variable(flag: str) -> str:
    """The environment variable of a flag."""
    return re.sub("[.-]", "_", flag.upper())


class Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one line, and does not guess at flags cut short."""

    def __init__(self, command: str, about: str | None, usage: str | None = None) -> None:
        layout = functools.partial(argparse.HelpFormatter, max_help_position=32)
        super().__init__(f"python3 sems_mitm.py {command}", usage, about, allow_abbrev=False, formatter_class=layout)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(re.sub("^argument ", "", message))


def serve_parser(command: str, about: str) -> Parser:
    """The flags of serve."""
    rule = "A flag is followed by its default and its variable; a BOOL can be --flag, --flag=false or --no-flag."
    parser = Parser(command, f"{about} {rule}", f"python3 sems_mitm.py {command} [flags]")
    groups: dict = {}
    for title, name, default, kind, key, text in FLAGS:
        group = groups[title] = groups.get(title) or parser.add_argument_group(title)
        shown = f"{text} [{default or ('all' if kind is networks else 'off')}] {variable(name)}"
        how: dict = {"dest": key, "default": default, "type": kind, "metavar": kind.metavar, "help": shown}
        if kind in SWITCHES:
            how.update(nargs="?", const="true")
            hidden: dict = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
            group.add_argument(f"--no-{name}", dest=key, action="store_const", const=kind("false"), **hidden)
        group.add_argument(f"--{name}", **how)
    parser.set_defaults(mode=None)  # --sems-passthrough decides where nobody names the mode
    return parser


def unknown_variables(environment: Mapping) -> str:
    """A warning of SEMS_ variables that no flag has, with the nearest that exists; empty if there are none."""
    known = {variable(name).removeprefix("SEMS_"): variable(name) for _, name, *_ in FLAGS}
    unknown = sorted(name for name in environment if name.startswith("SEMS_") and name not in known.values())
    near = {name: difflib.get_close_matches(name[5:], known, 1) for name in unknown}
    names = [f"{name!a} (is {known[keys[0]]} meant?)" if keys else f"{name!a}" for name, keys in near.items()]
    return f"ignored variables that no flag has: {', '.join(names)}" if names else ""


def serve_settings(arguments: list[str], environment: Mapping, command: str = "serve", about: str = "") -> Settings:
    """The settings of serve: the command line beats the environment, which beats the defaults. Raises UsageError.

    An empty variable is unset.
    """
    parser, given = serve_parser(command, about), {name: environment.get(variable(name)) for _, name, *_ in FLAGS}
    if (given["debug"] or "no").lower() not in (*TRUE, *FALSE):  # shells set it to all sorts of things
        log.warning("ignored DEBUG=%a, which is neither true nor false", given.pop("debug"))
    try:
        settings = parser.parse_args([f"--{name}={text}" for name, text in given.items() if text])
    except UsageError as error:  # of a variable, not of the flag that it stands for
        raise UsageError(re.sub(r"^--([\w.-]+)", lambda flag: variable(flag[1]), str(error))) from None
    valued = {f"--{name}" for _, name, _, kind, *_ in FLAGS if kind not in SWITCHES}
    rest = iter(arguments)  # --flag VALUE is --flag=VALUE: VALUE can begin with a -
    line = ["=".join([argument, *itertools.islice(rest, int(argument in valued))]) for argument in rest]
    parser.parse_args(line, settings)
    settings.mode = settings.mode or (FORWARD if settings.passthrough else LOCAL)
    settings.upstream_text = endpoint_text(settings.upstream)
    if settings.spool_file and settings.mode != SPOOL:
        raise UsageError(f"--sems.spool-file={settings.spool_file!a}: only with --sems.mode spool, not {settings.mode}")
    return settings


def zone_trouble() -> tuple[str, str]:
    """What is wrong with this machine's time zone, and what to do about it; empty if nothing is."""
    zone = os.environ.get("TZ")
    if zone_is_known(zone, first_bytes):
        return "", ""
    trouble = f"TZ={zone} is no time zone that this system knows"
    if zone is None:
        trouble = "TZ is not set, and there is no /etc/localtime"
    return trouble, "install the system's time zones (tzdata), or let TZ be a rule such as CET-1CEST,M3.5.0,M10.5.0/3"


def started(settings: Settings, clock: Clock = wall_clock, rules_clock: Clock = float) -> tuple[Store, Loop, Web]:
    """An exporter whose ports are bound; `loop.run` is left to do. Raises StartError."""
    store = Store(settings.stale_after, settings.max_devices, settings.batsignal, clock, rules_clock)
    files, history = Files(store, settings.capture, settings.backfill), History(store)
    flag, address = "sems.listen-address", settings.listen_address
    with contextlib.ExitStack() as undo:
        try:
            loop = Loop(store, settings, files)
            undo.callback(loop.close)
            flag, address = "web.listen-address", settings.web_address
            web = Web(loop, history)
        except StartError:
            raise
        except HOST_ERRORS as error:
            hint = "; `ss -ltnp` shows what has it" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
            raise StartError(f"--{flag}={endpoint_text(address)}: {error.args[-1]}{hint}") from None
        undo.pop_all()
    loop.every_second.append(history.note)
    gc.freeze()  # what is there now stays: the collector need not look at it again
    return store, loop, web


def notify_systemd() -> None:
    """Say that the exporter is ready to systemd, which sets NOTIFY_SOCKET for a unit of Type=notify (sd_notify(3))."""
    name = os.environ.get("NOTIFY_SOCKET", "")
    if name:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(re.sub("^@", "\0", name))
            sock.send(b"READY=1")


class JournalFormatter(logging.Formatter):
    """A log line for systemd's journal, which has a time of its own: priority and text, on each line of a traceback."""

    PRIORITIES = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}

    def format(self, record: logging.LogRecord) -> str:
        """The lines of a record, each with its priority (sd-daemon(3))."""
        start = f"<{self.PRIORITIES.get(record.levelno, 4)}>"
        return "\n".join(start + line for line in super().format(record).splitlines())


def at_signal(stop: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT call stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def serve(arguments: list[str]) -> int:
    """The exporter, until SIGTERM or SIGINT; also without a command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    if os.environ.get("JOURNAL_STREAM"):
        logging.getLogger().handlers[0].setFormatter(JournalFormatter())
    settings = serve_settings(arguments, os.environ, "serve", f"{serve.__doc__}")
    at_signal(sys.exit)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.getLogger().setLevel(settings.log_level.upper())
    unknown = unknown_variables(os.environ)
    if unknown:
        log.warning(unknown)
    _, loop, web = started(settings)
    at_signal(loop.stop)
    loop.mailbox.wake_at_signals()
    signal.signal(signal.SIGHUP, lambda *_: loop.reopen())
    text = "sems_mitm %s, mode %s: devices connect to port %d, metrics at http://HOST:%d%s"
    log.info(text, VERSION, settings.mode, loop.listeners[0].port, web.listener.port, settings.telemetry_path)
    trouble, step = zone_trouble()
    if trouble:
        log.warning("%s, so local time is unknown and no device's clock is set: %s", trouble, step)
    notify_systemd()
    loop.run()
    return 0


# ------------------------------------------------------------------------------------------------------- simulator


class House:
    """A simulated household with a roof, perhaps a battery: W and Wh, by a clock that its user moves on."""

    CAPACITY, RESERVE, STRONGEST = 10_000, 1_000, 3_000  # of the battery, Wh and W

    def __init__(self, battery: bool) -> None:
        self.random, self.has_battery, self.stored = random.Random(0), battery, 4_000.0 if battery else 0.0
        self.clock: datetime | None = None
        self.generation = self.load = self.battery = self.export = self._cloud = 0.0  # battery: positive while it gives
        self.today = 0.0  # generated, Wh
        self.energy = dict.fromkeys(self.flows(), 0.0)
        self.energy.update(
            {"export": 270_780, "import": 801_550, "generation": 579_410, "load": 1_110_180, "sun": 1667}
        )

    def flows(self) -> dict[str, float]:
        """Power by the name of the energy that it adds to while it is positive; the sun adds hours."""
        return {
            "export": self.export, "import": -self.export, "generation": self.generation, "standby": -self.generation,
            "load": self.load, "discharge": self.battery, "charge": -self.battery, "sun": self.generation > 0,
        }  # fmt: skip

    def move(self, clock: datetime) -> None:
        """Let time pass until clock, at the powers of before, and find those of now."""
        before, self.clock = self.clock or clock, clock
        hours = (clock.timestamp() - before.timestamp()) / 3600
        for name, power in self.flows().items():
            self.energy[name] += max(power, 0) * hours
        self.stored = min(max(self.stored - self.battery * hours, 0), self.CAPACITY)
        self.today = max(self.generation, 0) * hours + (self.today if clock.date() == before.date() else 0)
        hour = clock.hour + clock.minute / 60 + clock.second / 3600
        self._cloud = min(max(self._cloud + self.random.uniform(-0.12, 0.12), 0), 0.85)
        height = math.sin(math.pi * (hour - 6.5) / 12.5) if 6.5 < hour < 19 else 0
        self.generation = round(3000 * height**1.3 * (1 - 0.8 * self._cloud), 0) if height > 0.02 else -7.0
        evening = 900 * math.exp(-((hour - 19.5) ** 2) / 4) + 700 * math.exp(-((hour - 7.5) ** 2) / 1.5)
        kettle = 1800 if 6 < hour < 22 and self.random.random() < 0.06 else 0
        self.load = round(220 + evening + kettle + self.random.uniform(0, 90), 0)
        lacking = min(max(self.load - self.generation, -self.STRONGEST), self.STRONGEST)
        useful = self.stored > self.RESERVE if lacking > 0 else self.stored < self.CAPACITY
        self.battery = lacking if self.has_battery and useful else 0.0
        self.export = self.generation - self.load + self.battery


# What a device says of its house: metric to a number, or to a tuple with one for each value of its label.


def meter_says(house: House) -> dict:
    """A HomeKit 1000: channel 1 is the grid, channel 2 the inverter."""
    out, solar, energy, volts = house.export, house.generation, house.energy, 231.0 + house.export / 1500
    return {
        "meter_channel_power_watts": (out, solar, 0), "meter_sum_of_power_generation_and_export_watts": out + solar,
        "meter_voltage_volts": (volts, volts + 0.1, 0), "meter_current_amperes": (abs(out) / volts, abs(solar) / volts, 0),
        "meter_channel_energy_export_watthours_total": (energy["export"], energy["generation"], 0),
        "meter_channel_energy_import_watthours_total": (energy["import"], energy["standby"], 0),
    }  # fmt: skip


def inverter_says(house: House) -> dict:
    """A DNS G3: one string, one phase, nothing at night."""
    power, volts, string = house.generation, 231.0 + house.generation / 1500, 250 + 90 * min(house.generation / 600, 1)
    return {} if power <= 0 else {
        "inverter_power_output_watts": power, "inverter_apparent_power_voltamperes": power * 1.01, "inverter_reactive_power_vars": -power / 20, "inverter_power_factor_ratio": 0.99,
        "inverter_string_voltage_volts": (string, 0), "inverter_string_current_amperes": (power * 1.03 / string, 0), "inverter_bus_voltage_volts": 380,
        "inverter_phase_voltage_volts": volts, "inverter_phase_current_amperes": power / volts, "inverter_phase_frequency_hertz": 50.01,
        "inverter_energy_output_hectowatt_hours_day": house.today / 100, "inverter_energy_output_hectowatt_hours_total": house.energy["generation"] / 100, "inverter_uptime_hours_total": house.energy["sun"],
        "inverter_work_mode": 1, "inverter_error_bitmap": 0, "inverter_warning_bitmap": 0, "inverter_grid_code": 85,
        "inverter_internal_temperature_decidegrees_celsius": 250 + power / 12, "inverter_rssi_percent": 59,
    }  # fmt: skip


def hybrid_says(house: House) -> dict:
    """A hybrid with two strings, three phases, a battery and a meter of its own."""
    solar, out, energy, battery = max(house.generation, 0), house.export, house.energy, house.battery
    power, mode = solar + battery, 1 + (battery != 0) + (battery < 0)  # standby, discharging, charging
    return {
        "inverter_power_output_watts": power, "inverter_active_power_watts": out, "inverter_load_watts": house.load, "inverter_hybrid_work_mode": 1,
        "inverter_string_voltage_volts": (600 if solar else 0,) * 2, "inverter_string_current_amperes": (solar * 0.001, solar * 0.0007), "inverter_string_power_watts": (solar * 0.6, solar * 0.4),
        "inverter_phase_voltage_volts": (231, 232, 230), "inverter_phase_current_amperes": (abs(power) / 693,) * 3, "inverter_phase_frequency_hertz": (50.01,) * 3, "inverter_phase_power_watts": (power / 3,) * 3,
        "inverter_energy_output_hectowatt_hours_day": house.today / 100, "inverter_energy_output_hectowatt_hours_total": energy["generation"] / 100, "inverter_uptime_hours_total": energy["sun"],
        "inverter_energy_export_watthours_total": energy["export"], "inverter_energy_import_watthours_total": energy["import"], "inverter_energy_load_watthours_total": energy["load"],
        "inverter_internal_temperature_decidegrees_celsius": 250 + abs(power) / 12, "inverter_rssi_percent": 59,
        "battery_power_watts": battery, "battery_voltage_volts": 380, "battery_current_amperes": battery / 380, "battery_mode": mode, "battery_temperature_celsius": 24,
        "battery_state_of_charge_ratio": house.stored / house.CAPACITY, "battery_state_of_health_ratio": 0.98,
        "battery_energy_charge_watthours_total": energy["charge"], "battery_energy_discharge_watthours_total": energy["discharge"],
        "meter_power_export_watts": out, "meter_channel_power_watts": (out / 3,) * 3, "meter_frequency_hertz": 50.01,
        "meter_energy_export_decawatt_hours_total": energy["export"] / 10, "meter_energy_import_decawatt_hours_total": energy["import"] / 10,
    }  # fmt: skip


def text_words(text: str, size: int) -> tuple[int, ...]:
    """ASCII text in registers, filled up with NUL."""
    return struct.unpack(f">{size}H", text.encode("ascii").ljust(2 * size, b"\0"))


# A model that can be simulated: its class, the first half of its serial numbers, the register ranges of its settings
# packet, and what a live one says.
Simulable = collections.namedtuple("Simulable", "cls start settings says")
# fmt: off
HOMEKIT = Simulable(METER, "91000HKU", [(4608, (12, *text_words(f"20001,{PORTAL_NAME}", 15))), (4864, (*text_words("02053-05-000Me05", 8), 0, 4))], meter_says)
DNS = Simulable(GRID_TIED, "53000DSC", [(30221, text_words("410-02065-04", 6)), (40075, text_words(PORTAL_NAME, 26))], inverter_says)
HYBRID_ET = Simulable(HYBRID_CLASS, "9010KETU", [(35011, text_words("GW10K-ET", 5)), (35021, text_words("04029-08-S11", 6)), (40075, text_words(PORTAL_NAME, 26))], hybrid_says)
# fmt: on


def register_words(name: str, says: dict) -> dict[int, int]:
    """Register to word of what a device of the family `name` says, the inverse of `reading`."""
    words: dict[int, int] = {}
    for value in VALUES[name]:
        metric, labels = value.series
        numbers = says.get(metric, ())
        numbers = numbers if isinstance(numbers, tuple) else (numbers,)
        at = int(re.sub(r"\D", "", labels) or 1) - 1
        if at < len(numbers) and not value.instead:
            raw = numbers[at] * value.divide / value.multiply
            is_float = value.number is KINDS["f32"].number
            bits = int.from_bytes(struct.pack(">f", raw), "big") if is_float else round(raw)
            for place in reversed((value.register, *value.later)):
                words[place], bits = bits & 0xFFFF, bits >> 16
            words.update([(value.when[0], *value.when[1])] if value.when and len(value.when[1]) == 1 else [])
    return words


class Simulated:
    """A simulated device in a house."""

    def __init__(self, model: Simulable, house: House, number: int) -> None:
        self.model, self.house, self.serial = model, house, f"{model.start}{number:08d}"

    def frame(self, function: int, when: datetime) -> bytes:
        """Its frame as its house is now, with the time `when`; nothing while it is off."""
        cls, stamp, ranges = self.model.cls, time_stamp(when), self.model.settings
        if function == LIVE:
            words = register_words(family(cls, self.serial), self.model.says(self.house))
            ranges = [(register, (word,)) for register, word in sorted(words.items())]
        packet = Packet(OUTBOUND, f"{cls:02x}{function:02x}", self.serial, device_iv(stamp), stamp, payload(ranges))
        return encode(packet) if ranges else b""


def simulated_house(hybrid: bool = False) -> list[Simulated]:
    """The devices of a house. No two of their serial numbers end alike."""
    house, models = House(battery=hybrid), (HYBRID_ET,) if hybrid else (HOMEKIT, DNS)
    return [Simulated(model, house, number) for number, model in enumerate(models, 1)]


def simulation(target: tuple[str, int], devices: list[Simulated], clock: Clock) -> None:
    """Have devices report once a second, for ever; clock gives their time of day. What is off has no connection."""
    sockets: dict[Simulated, socket.socket] = {}
    while True:
        when = datetime.fromtimestamp(clock(time.monotonic()))
        devices[0].house.move(when)
        for device in devices:
            data = device.frame(LIVE, when)
            try:
                if data and device not in sockets:
                    sockets[device] = socket.create_connection(target)
                    data = device.frame(SETTINGS, when) + data
                if data:
                    sockets[device].sendall(data)
                    sockets[device].recv(4096, socket.MSG_DONTWAIT)  # answers; after the end the next packet fails
            except BlockingIOError:
                pass
            except OSError:
                data = b""
            if not data and device in sockets:
                sockets.pop(device).close()
        time.sleep(1)


# ------------------------------------------------------------------------------------------------------------ demo

# The demo's day, which hurries through the dark hours: s of real time, and the hour of the day then. It begins slowly,
# so that its first packets come at midnight, and ends slowly, so that who looks after four minutes sees a whole day.
PACE = ((0, 0), (3, 0.001), (17, 6.5), (210, 20), (225, 23.9), (260, 24))
DEMO_REFRESH = 5  # s between reloads of its page
DEMO_TEXT = """{who} a solar day: it is midnight, the sun is up in 20 seconds, and after four minutes the day is over.

  open  http://localhost:{web}/               the page
        http://localhost:{web}/metrics        what Prometheus scrapes
        http://localhost:{web}/api/household  the house as JSON

devices -> {devices} -> exporter -> {portal}, a local portal. Ctrl-C stops it all."""


def day_clock() -> Clock:
    """A clock that stands at midnight of today now, and goes by PACE, day after day."""
    begin, today = time.monotonic(), datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)

    def clock(now: float) -> float:
        days, at = divmod(now - begin, PACE[-1][0])
        (left, low), (right, high) = next(pair for pair in zip(PACE, PACE[1:]) if at < pair[1][0])
        return today.timestamp() + 86400 * days + 3600 * (low + (high - low) * (at - left) / (right - left))

    return clock


def free_endpoint(host: str, port: int) -> str:
    """HOST:PORT of the first port from `port` on that can be listened on. Raises StartError."""
    for number in range(port, port + 100):
        with contextlib.suppress(OSError):
            for sock in listeners(host, number):
                sock.close()
            if number != port:
                print(f"Port {port} is in use, the demo takes {number}.")
            return f"{host}:{number}"
    raise StartError(f"no free port from {port} to {port + 99}")


def demo(arguments: list[str]) -> int:
    """No hardware, no cloud: simulated devices sending a solar day, a local portal, the exporter between them."""
    parser = Parser("demo", demo.__doc__)
    parser.add_argument("--hybrid", action="store_true", help="a hybrid with a battery in place of the two devices")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    store = Store()
    stand_in = Loop(store, serve_settings(["--sems.mode=local", "--sems.listen-address=127.0.0.1:0"], {}), Files(store))
    threading.Thread(target=stand_in.run, name="portal", daemon=True).start()
    portal, devices_at = f"127.0.0.1:{stand_in.listeners[0].port}", free_endpoint("127.0.0.1", 20001)
    flags = [f"--sems.upstream={portal}", f"--sems.listen-address={devices_at}", "--metrics.stale-after=10s"]
    settings, clock = serve_settings([*flags, f"--web.listen-address={free_endpoint('', 14028)}"], {}), day_clock()
    settings.refresh = DEMO_REFRESH
    _, loop, web = started(settings, clock, clock)
    at_signal(loop.stop)
    what = settings.listen_address, simulated_house(given.hybrid), clock
    threading.Thread(target=simulation, args=what, name="devices", daemon=True).start()
    who = "A hybrid with a battery sends" if given.hybrid else "A HomeKit 1000 and a DNS G3 send"
    print(DEMO_TEXT.format(who=who, web=web.listener.port, devices=devices_at, portal=portal), flush=True)
    loop.run()
    print("stopped")
    return 0


# ------------------------------------------------------------------------------------------------------ recordings
#
# A file becomes pieces of streams, each with the time at which it was recorded. Of a recording of packets: records become
# packets, packets TCP segments, segments by their sequence numbers streams. Addresses keep connections apart here, and
# are in nothing that leaves this section.

PORTAL_PORT = (20001).to_bytes(2, "big")
MARK = b"GW\0\0"  # in the first 8 bytes of each frame: the caps of the length fields leave their first two bytes 0
LONGEST_RECORD, LONGEST_LINE = 16 << 20, 1 << 20  # bytes; above it a record is damage
SHORTEST = 16  # bytes that an array or a literal inside a text must have

# What a file lacks, each to how often.
Notes = collections.Counter[str]
CUT_END = "the file ends inside a record"
DAMAGED = "damaged records: {}"
SNAPPED = "packets that the snap length has cut: {}; record them whole, with -s 0"
GAPS = "gaps in the streams, where the recording lacks packets: {}"
TORN = "frames that are not whole at gaps, or where the recording begins or ends, left out: {}"
UNREAD = "{} are not read; left out: {{}}"
FOREIGN_LINES = "lines that are no whole lines of a capture, passed over: {}"
LEFT_OUT = "pieces between good frames that can hold anything, left out: {}"

# captured: seconds since 1970, None if not known; wire, kind, data: of a piece; where: a sequence number
Recorded = collections.namedtuple("Recorded", "captured wire kind data where", defaults=(0,))
# time: seconds since 1970, None if not known; link: the type of its link; size: before the snap length cut it
RecordedPacket = collections.namedtuple("RecordedPacket", "time link data size")
# What one end of a connection sent. outward: 1 to port 20001, -1 from it, 0 if the port does not say; first: the sequence
# number of place 0; is_whole: whether that is the first byte; segments: (place, time, bytes) of each, as they came
Stream = collections.namedtuple("Stream", "outward first is_whole segments")

PCAP = {  # the first four bytes: byte order, seconds of a unit of the fraction
    b"\xd4\xc3\xb2\xa1": ("<", 1e-6), b"\xa1\xb2\xc3\xd4": (">", 1e-6), b"\x4d\x3c\xb2\xa1": ("<", 1e-9), b"\xa1\xb2\x3c\x4d": (">", 1e-9),
}  # fmt: skip
MODIFIED_PCAP = (b"\x34\xcd\xb2\xa1", b"\xa1\xb2\xcd\x34")
PCAPNG, ORDERS = b"\n\r\r\n", {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
INTERFACE_BLOCK, OLD_BLOCK, SIMPLE_BLOCK, ENHANCED_BLOCK = 1, 2, 3, 6
LINKS = {  # link type: where the type of its contents stands (-1: nowhere), where they begin
    1: (12, 14), 113: (14, 16), 276: (0, 20), 0: (-1, 4), 108: (-1, 4), **dict.fromkeys((12, 14, 101, 228, 229), (-1, 0)),
}  # fmt: skip
VLAN_TAGS, IP_TYPES = (b"\x81\0", b"\x88\xa8", b"\x91\0"), (b"\x08\0", b"\x86\xdd")
IPV4, IPV6, TCP = struct.Struct(">BxH2xHxB2x4s4s"), struct.Struct(">4xHBx16s16s"), struct.Struct(">2s2sI4xBB")
FRAGMENT, IPV6_EXTENSIONS = 44, (0, 43, 44, 60)  # hop-by-hop, routing, fragment, destination options
TCP_IN_IP = re.compile(rb"[\x45-\x4f].{8}\x06|[\x60-\x6f].{5}[\x06\0\x2b\x2c\x3c]", re.S)
# What stands in the head of a packet, damaged or not: the type of what it holds, the portal's port, an IP header.
IP_HEADER = rb"[\x45-\x4f].{8}[\x01\x06\x11]|[\x60-\x6f].{5}[\x06\0\x11\x3a]"
PACKET_SIGN = re.compile(rb"\x08[\0\x06]|\x86\xdd|\x81\0|\x88\xa8|\x4e\x21|" + IP_HEADER, re.S)


def exactly(file: BinaryIO, size: int) -> bytes:
    """So many bytes of a file. Raises EOFError if it ends before, struct.error for a size that no record has."""
    if not 0 <= size <= LONGEST_RECORD:
        raise struct.error(size)
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def pcap_packets(file: io.BufferedReader) -> Iterator[RecordedPacket]:
    """The packets of a pcap file. Both raise EOFError, struct.error or IndexError where a file is cut or damaged."""
    order, unit = PCAP[exactly(file, 4)]
    (link,) = struct.unpack(order + "16xI", exactly(file, 20))  # its upper half: whether checksums follow the packets
    record = struct.Struct(order + "4I")
    while file.peek(1):
        seconds, fraction, size, length = record.unpack(exactly(file, 16))
        yield RecordedPacket(seconds + fraction * unit, link & 0xFFFF, exactly(file, size), length)


def pcapng_packets(file: io.BufferedReader, notes: Notes) -> Iterator[RecordedPacket]:
    """The packets of a pcapng file: of all its sections and interfaces."""
    order, interfaces = "<", []  # type: ignore[var-annotated]
    while file.peek(1):
        head = exactly(file, 12)
        if head.startswith(PCAPNG):  # a section
            order, interfaces = ORDERS.get(head[8:], order), []
        kind, size = struct.unpack_from(order + "2I", head)
        body = head[8:] + exactly(file, size - 12)  # at its end stands the size again
        try:
            if kind == INTERFACE_BLOCK:
                (link,) = struct.unpack_from(order + "H", body)
                option = body[8:-4].partition(struct.pack(order + "2H", 9, 1))[2]
                resolution = option[0] if option else 6  # digits behind the point of its times, binary from 128 on
                interfaces.append((link, (2.0 if resolution & 0x80 else 10.0) ** -(resolution & 0x7F)))
            elif kind == SIMPLE_BLOCK:
                (length,) = struct.unpack_from(order + "I", body)
                yield RecordedPacket(None, interfaces[0][0], body[4:-4][:length], length)
            elif kind == ENHANCED_BLOCK:
                which, high, low, size, length = struct.unpack_from(order + "5I", body)
                link, unit = interfaces[which]
                yield RecordedPacket((high << 32 | low) * unit, link, body[20 : 20 + size], length)
            elif kind == OLD_BLOCK:
                notes[UNREAD.format("old packet blocks (save the file as pcap)")] += 1
        except (IndexError, struct.error):
            notes[DAMAGED] += 1


def until_cut(items: Iterable, notes: Notes) -> Iterator:
    """Items from a file, up to where it or its gzip is cut or damaged."""
    try:
        yield from items
    except (struct.error, IndexError):
        notes[DAMAGED] += 1
    except (EOFError, OSError, zlib.error) as error:
        if getattr(error, "errno", None):  # the system's, not gzip's
            raise
        notes[CUT_END] = 1


def ip_start(link: int, data: bytes) -> int:
    """Where the IP packet in a packet begins, behind VLAN tags; its end if there is none."""
    kind, at = LINKS[link]
    while data[kind : kind + 2] in VLAN_TAGS:
        kind, at = at + 2, at + 4
    return at if kind < 0 or data[kind : kind + 2] in IP_TYPES else len(data)


def segment(packet: RecordedPacket, notes: Notes) -> tuple[bytes, bytes, int, int, bytes] | None:
    """The TCP segment in a packet: source and target with their ports, number of its first byte, whether it is a SYN, data."""
    data, at = packet.data, ip_start(packet.link, packet.data)
    version, fragment = data[at] >> 4, 0
    if version == 4:
        first, size, fragment, protocol, source, target = IPV4.unpack_from(data, at)
        end, at, fragment = at + size, at + (first & 15) * 4, fragment & 0x1FFF
    elif version == 6:
        size, protocol, source, target = IPV6.unpack_from(data, at)
        end, at = at + 40 + size, at + 40
        while protocol in IPV6_EXTENSIONS and not fragment:
            fragment = struct.unpack_from(">2xH", data, at)[0] >> 3 if protocol == FRAGMENT else 0
            protocol, at = data[at], at + 8 + 8 * data[at + 1]
    if version not in (4, 6) or protocol != socket.IPPROTO_TCP:
        return None
    if fragment:
        notes[UNREAD.format("fragments of IP packets")] += 1
        return None
    source_port, target_port, seq, header, flags = TCP.unpack_from(data, at)
    is_syn = flags >> 1 & 1  # it has a sequence number of its own, before the data's
    payload = data[at + (header >> 4) * 4 : end if size else None]  # 0: merged before it was recorded
    return source + source_port, target + target_port, (seq + is_syn) & 0xFFFFFFFF, is_syn, payload


def connections(packets: Iterable[RecordedPacket], notes: Notes) -> Iterable[list[Stream]]:
    """The streams of each connection to or from port 20001, or with a segment that begins like a frame."""
    latest: dict[tuple[bytes, bytes], Stream] = {}
    found: dict[frozenset[bytes], list[Stream]] = collections.defaultdict(list)
    is_elsewhere = False  # a connection has other ports: its packets cannot be known at a glance
    for number, packet in enumerate(packets):
        is_cut, part = packet.size > len(packet.data), None
        try:
            if packet.link not in LINKS:
                notes[UNREAD.format(f"packets of link type {packet.link}")] += 1
            elif is_elsewhere or PORTAL_PORT in packet.data or MARK in packet.data:
                part = segment(packet, notes)
        except (IndexError, struct.error):  # it ends inside its headers
            notes[SNAPPED] += is_cut
        if not part:
            continue
        source, target, seq, is_syn, data = part
        way, ends, ports = (source, target), frozenset((source, target)), (source[-2:], target[-2:])
        if ends in found or PORTAL_PORT in ports or MARK in data[:8]:
            notes[SNAPPED] += is_cut
            is_elsewhere |= PORTAL_PORT not in ports
            stream = latest.get(way)
            if not stream or is_syn and seq != stream.first:  # the port is new, or used again
                stream = latest[way] = Stream((ports[1] == PORTAL_PORT) - (ports[0] == PORTAL_PORT), seq, is_syn, [])
                found[ends].append(stream)
            if data:
                last = stream.segments[-1][0] if stream.segments else 0  # numbers wrap around: the place nearest to it
                place = last + ((seq - stream.first - last + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
                stream.segments.append((place, number * 1e-9 if packet.time is None else packet.time, data))
    return found.values()


def run_pieces(wire: Wire, parts: list[tuple], end: int) -> Iterator[tuple[float, str, bytes, bool]]:
    """The pieces of segments, taken off parts' end up to a gap: time, kind, bytes, whether the gap left them unfinished."""
    framer, captured = Framer(wire), 0.0
    while parts and parts[-1][0] <= end:
        place, when, data = parts.pop()
        new = data[max(end - place, 0) :]
        if new:
            captured, end = max(captured, when), end + len(new)
            yield from ((captured, *piece, False) for piece in framer.feed(new, 0))
    yield from ((captured, *piece, True) for piece in framer.close())


def stream_pieces(stream: Stream, notes: Notes) -> Iterator[Recorded]:
    """The pieces of a stream, without those that a gap or an end of the recording tore."""
    parts = sorted(stream.segments, reverse=True)
    stream.segments.clear()
    outward = stream.outward or any(OUTBOUND.prefix in data for _, _, data in parts)
    wire = OUTBOUND if outward > 0 else INBOUND
    first = parts[-1][0] if parts else 0
    is_inside = not stream.is_whole or first < -1  # of a frame, perhaps; at -1 stands the byte of a keep-alive probe
    while parts:
        at, last = parts[-1][0] if is_inside else 0, ""
        for captured, kind, part, is_unfinished in run_pieces(wire, parts, at):
            at += len(part)
            is_inside = is_inside and kind == JUNK
            if not is_inside and (kind in (FRAME, KEEPALIVE) or not is_unfinished):
                yield Recorded(captured, wire, kind, part, (stream.first + at) & 0xFFFFFFFF)
            else:
                notes[TORN] += (last, kind) != (JUNK, JUNK)  # junk comes in a piece for each segment
            last = kind
        notes[GAPS] += bool(parts)
        is_inside = True


def conversations(packets: Iterable[RecordedPacket], notes: Notes) -> Iterator[Recorded]:
    """What devices and the portal said in packets, in the order of time; what was recorded twice, once."""
    found: list[Recorded] = []
    for streams in connections(packets, notes):
        lacks = Notes()
        pieces = [piece for stream in streams for piece in stream_pieces(stream, lacks)]
        if any(piece.kind != JUNK for piece in pieces):  # else another program uses the port
            notes.update(lacks)
            found += pieces
    found.sort(key=lambda piece: piece.captured)
    recent: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=64)  # another interface's, behind NAT too
    for piece in found:
        if (piece.where, piece.data) not in recent:
            recent.append((piece.where, piece.data))
            yield piece


def cut(wire: Wire, data: bytes) -> list[Piece]:
    """The pieces of a whole stream."""
    framer = Framer(wire)
    return framer.feed(data, 0) + framer.close()


def pieces_of(direction: str, data: bytes, captured: float | None = None) -> Iterator[Recorded]:
    """The pieces of captured bytes: of their direction, or of both if that is not known ("")."""
    wire = INBOUND if direction == INBOUND.name else OUTBOUND
    for kind, part in cut(wire, data):
        inward = [] if direction or kind == FRAME else cut(INBOUND, part)
        if any(each in (FRAME, KEEPALIVE) for each, _ in inward):
            yield from (Recorded(captured, INBOUND, *each) for each in inward)
        else:
            yield Recorded(captured, wire, kind, part)


# Text. A line of a dump is an offset, hex in one or two columns, and often the bytes as text; xxd and tcpdump put a colon
# behind the offset. Columns are one or two blanks apart, and the text is behind two: so a second one needs 8 bytes before.
DUMP_LINE = re.compile(r"(?im)^[^\S\n]*(?:0x)?([0-9a-f]{4,8}):?[ \t]+((?:[0-9a-f]{2})+(?: (?:[0-9a-f]{2})+)*)(?: {1,2}([0-9a-f]{2}(?: [0-9a-f]{2}){0,7}))?(?=\s|$)")  # fmt: skip
SEPARATORS = str.maketrans("", "", " \t\r\n\f\v,:;|\"'-")
LITERAL = re.compile(r"""(?<!\w)[bB]?(?:"([^"]*)|'([^']*))["']?""")
ESCAPE = re.compile(r"\\(?:x[0-9a-fA-F]{2}|[0-3]?[0-7]{1,2}|[abfnrtv])")
COMMENT, ARRAY = re.compile(r"(?m)/\*.*?(?:\*/|$)|//.*"), re.compile(r"(?i)(?:\b0x[0-9a-f]{1,2}\b[,\s]*)+")


def dumps(text: str) -> list[bytes]:
    """What the dumps in a text hold, each from an offset of 0 on; other offsets count its bytes: hex, octal or decimal."""
    found: list[bytearray] = []
    for offset, first, second in DUMP_LINE.findall(text):
        part = bytes.fromhex(first)
        part += bytes.fromhex(second) if len(part) == 8 else b""
        size = len(found[-1]) if found else 0
        if not offset.strip("0"):
            found.append(bytearray(part))
        elif offset.lstrip("0").lower() in (f"{size:x}", f"{size:o}", f"{size}"):
            found[-1] += part
    return [bytes(dump) for dump in found]


def typed(text: str) -> list[bytes]:
    """The bytes in a text without dumps: hex and nothing else, or literals with escapes and arrays of C."""
    with contextlib.suppress(ValueError):
        return [bytes.fromhex(re.sub(r"(?i)0x|\\x", "", text).translate(SEPARATORS))]
    closed = re.sub(r"""\\(["'\\])""", lambda match: f"\\x{ord(match[1]):02x}", text)  # no literal holds its quote
    literal = "".join(part for parts in LITERAL.findall(closed) for part in parts if "\\x" in part)
    found = [ESCAPE.sub(lambda match: match[0].encode().decode("unicode_escape"), literal).encode("latin-1", "replace")]
    found += (
        bytes(int(each, 16) for each in re.split(r"[,\s]+", array) if each)
        for array in ARRAY.findall(COMMENT.sub("", text))
    )
    return [data for data in found if len(data) >= SHORTEST]


def text_pieces(text: str, notes: Notes) -> Iterator[Recorded]:
    """The pieces in what people paste. Raises ProtocolError if there is nothing of the kind."""
    dumped, others = dumps(text), typed(text)
    if not any(dumped + others):
        raise ProtocolError("text without bytes in hex" if text.strip() else "nothing in it")
    best = max(filter(any, (dumped, others)), key=lambda several: any(MARK in data for data in several))
    yield from byte_pieces(best, notes, is_alone=not dumped and len(others) == 1)


def byte_pieces(several: list[bytes], notes: Notes, is_alone: bool = False) -> Iterator[Recorded]:
    """The pieces of packets, and of other bytes: good frames alone of those that can hold addresses.

    is_alone: these bytes, and nothing but them, were pasted as hex: they are shown unless they look like a packet.
    """
    packets, others = [], []
    for data in several:
        link = next((link for link in (1, 113, 276, 101, 0) if TCP_IN_IP.match(data, ip_start(link, data))), None)
        if link is not None:
            packets.append(RecordedPacket(None, link, data, len(data)))
        elif MARK in data or (is_alone and not PACKET_SIGN.search(data, 0, 64)):
            others.append(data)
    yield from conversations(packets, notes)
    for data in others:
        for piece in pieces_of("", data):
            if piece.kind == FRAME or MARK in data[:8] or MARK not in data:
                yield piece
            else:  # it can hold addresses
                notes[LEFT_OUT] += 1


def capture_pieces(file: BinaryIO, notes: Notes) -> Iterator[Recorded]:
    """The pieces in the lines of a capture file, or of what decode printed."""
    for line in until_cut(iter(lambda: file.readline(LONGEST_LINE), b""), notes):
        line = line.strip(b"\0\xef\xbb\xbf\r\n")
        try:
            entry = json.loads(line)
            data, direction = bytes.fromhex(entry["hex"]), str(entry.get("direction", ""))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            notes[FOREIGN_LINES] += bool(line.strip())
        else:
            yield from pieces_of(direction, data, captured_at(entry))


def captured_at(entry: dict) -> float | None:
    """When a line was captured, None if it does not say that with its zone."""
    with contextlib.suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(str(entry.get("captured") or entry.get("time")).replace("Z", "+00:00"))
        return when.timestamp() if when.tzinfo else None
    return None


def recording(raw: BinaryIO, notes: Notes) -> Iterator[Recorded]:
    """The pieces in a file: packets, lines of a capture, text, frames as they are; gzipped or not. Raises ProtocolError."""
    import gzip  # the exporter never needs it

    with io.BufferedReader(raw, RECV_SIZE) as plain:  # type: ignore[type-var]
        is_gzip = plain.peek().startswith(b"\x1f\x8b")
        file: io.BufferedReader = gzip.GzipFile(fileobj=plain) if is_gzip else plain  # type: ignore[assignment]
        head = b"".join(until_cut(map(file.peek, [RECV_SIZE]), notes))
        if head[:4] in (*PCAP, PCAPNG):
            packets = pcapng_packets(file, notes) if head.startswith(PCAPNG) else pcap_packets(file)
            yield from conversations(until_cut(packets, notes), notes)
        elif head.startswith(MODIFIED_PCAP):
            raise ProtocolError("a modified pcap file, which is not read: save it as pcap")
        elif re.search(rb'(?m)^[\0\xef\xbb\xbf\s]*\{"', head):
            yield from capture_pieces(file, notes)  # type: ignore[arg-type]
        else:
            data = b"".join(until_cut(iter(lambda: file.read1(RECV_SIZE), b""), notes))
            if not re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", data):
                yield from text_pieces(data.decode("latin-1"), notes)
            elif MARK in data:
                yield from byte_pieces([data], notes)
            else:
                raise ProtocolError("neither a recording nor text")


# ---------------------------------------------------------------------------------------------------------- decode


def called(path: str) -> str:
    """A file's name in a message."""
    return "standard input" if path == "-" else path


def recorded(path: str, notes: Notes) -> Iterator[Recorded]:
    """The pieces in a file, or in standard input (-). Raises UsageError if it cannot be read, StartError for another's."""
    if path == "-" and not sys.stdin:
        raise UsageError("standard input is closed")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            yield from recording(file, notes)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except ProtocolError as error:
        raise StartError(f"{called(path)}: {error}") from None


def say_missing(files: dict[str, Notes], good: int) -> None:
    """Say on stderr what recordings lack; no more than the snap length explains it. Raises StartError without good frames."""
    lines = [
        f"{called(path)}: {text.format(count)}"
        for path, notes in files.items()
        for text, count in notes.items()
        if count and not (notes[SNAPPED] and text in (GAPS, TORN))
    ]
    if not good:
        raise StartError("; ".join([f"not a single good frame in {', '.join(map(called, files))}", *lines]))
    sys.stderr.writelines(f"{line}\n" for line in lines)


def good_packets(pieces: Iterable[Recorded]) -> Iterator[tuple[Recorded, Packet]]:
    """The good frames among pieces, with their packets."""
    for piece in pieces:
        with contextlib.suppress(ProtocolError):
            if piece.kind == FRAME:
                yield piece, decode(piece.data, piece.wire)


def contents(where: Address, packet: Packet) -> dict:
    """blocks and values of a packet. Raises ProtocolError."""
    clear, values = packet.clear, {"clear": packet.clear.hex()}
    if packet.wire is INBOUND:
        values = {"meaning": allowed(where, clear, {where.cls, *CLOCK}) or "not let through", **values}
        if where.type == CLOCK_TYPE:
            when = device_time(clear[4:10])
            first, last = struct.unpack_from(">HH", clear)
            values.update(first_register=first, last_register=last, clock=when and when.isoformat())
    elif where.function == CONFIRMATION:
        values = dict(zip(("first_register", "last_register", "status"), struct.unpack_from(">HHB", clear)))
    elif where.function in DATA:
        ranges, taken = blocks(clear), reading(family(where.cls, where.serial), registers(clear))
        values = {f"{metric}{{{labels}}}" if labels else metric: n for (metric, labels), n in taken.values.items()}
        unknown = f"{kind_of(where.cls)}_unknown_register"
        values.update((f'{unknown}{{register="{register}"}}', word) for register, word in taken.unknown.items())
        shown = [{"first": first, "last": first + len(words) - 1, "words": list(words)} for first, words in ranges]
        return {"blocks": shown, "values": {**values, **taken.info}}
    return {"values": values}


SAID = ["direction", "type", "serial", "model", "time", "captured", "crc_ok", "envelope", "blocks", "values", "error", "hex"]  # fmt: skip
ENVELOPES = {LONG: "long", SHORT: "short", ANSWER: "answer"}
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def described(piece: Recorded, models: dict[str, str]) -> dict:
    """A piece as decode prints it. models: serial number to the name that the device gave so far; a new one is kept."""
    captured, wire, kind, data, _ = piece
    found: dict = dict.fromkeys(SAID)
    found.update(direction=wire.name, type=kind, hex=data.hex())
    if captured and 86400 <= captured < 1 << 37:  # below it a packet's number stands for its time, above it is no year
        found["captured"] = (EPOCH + timedelta(seconds=captured)).isoformat(timespec="microseconds")
    if kind in (JUNK, KEEPALIVE):
        return {**found, "error": "no frame" if kind == JUNK else None}
    found.update(crc_ok=kind == FRAME, error=None if kind == FRAME else "bad checksum, or cut")
    try:
        where, packet = address_of(data, wire), decode(data, wire)
        serial, when = where.serial, device_time(packet.time or packet.iv[:6] if wire is OUTBOUND else packet.iv[5::-1])
        found.update(type=where.type, serial=serial, model=model(serial, models.get(serial, "")))
        found.update(time=when and when.isoformat(), envelope=ENVELOPES[where.form])
        found.update(contents(where, packet))
        if wire is OUTBOUND and "model" in found["values"]:
            models[serial] = found["values"]["model"]
            found["model"] = model(serial, models[serial])
    except ProtocolError as error:
        found["error"] = found["error"] or str(error)
    return found


def redacted(pieces: Iterable[Recorded]) -> Iterator[Recorded]:
    """The good frames among pieces with other serial numbers, in clear and in cipher; says how many others there were."""
    every = list(pieces)
    kept = list(good_packets(every))
    serials = dict.fromkeys(packet.serial for _, packet in kept)
    aliases = {serial: f"{serial[:8]}XXXX{number:04d}" for number, serial in enumerate(serials, 1)}
    left_out = f"{len(kept)} good frames, {len(every) - len(kept)} other pieces left out."
    if kept:
        print(left_out, "XXXX0001, XXXX0002, ... count the devices up and are no real serial numbers.", file=sys.stderr)
    for piece, packet in kept:
        clear = packet.clear
        for serial, alias in aliases.items():
            clear = clear.replace(serial.encode(), alias.encode())
        yield piece._replace(data=encode(packet._replace(serial=aliases[packet.serial], clear=clear)))


def decode_command(arguments: list[str]) -> int:
    """Recorded traffic or pasted hex as one JSON object a frame."""
    parser = Parser("decode", decode_command.__doc__)
    parser.add_argument("source", metavar="FILE|-|HEX", nargs="+", help="capture files, pcap and pcapng files, files with hex or dumps, gzipped or not, - for standard input; or hex")  # fmt: skip
    parser.add_argument("--redact", action="store_true", help="good frames only, with other serial numbers, for a bug report")  # fmt: skip
    given = parser.parse_args(arguments)
    files = {path: Notes() for path in given.source if path == "-" or os.path.exists(path)}
    hexes = " ".join(source for source in given.source if source not in files)
    notes = Notes()
    try:
        typed = list(text_pieces(hexes, notes)) if hexes else []
    except ProtocolError:
        raise UsageError(f"neither a file nor whole bytes in hex: {hexes[:40]!a}") from None
    pieces: Iterable[Recorded] = itertools.chain(*itertools.starmap(recorded, files.items()), typed)
    models: dict[str, str] = {}
    good = 0
    for piece in redacted(pieces) if given.redact else pieces:
        said = described(piece, models)
        good += piece.kind == FRAME and said["serial"] is not None
        print(json.dumps(said))
    say_missing({**files, "the hex given": notes} if hexes else files, good)
    return 0


# -------------------------------------------------------------------------------------------------------- backfill

EARLIEST = datetime(2010, 1, 1)  # older than any of these devices: a clock that was never set
HEAD_SPAN = 3 * 3600  # s that Prometheus keeps in its head before they become a block
Samples = dict[str, dict[str, dict[float, float]]]  # metric to series (labels) to seconds since 1970 to number
Readings = dict[tuple[int, str], dict[float, Reading]]  # class and serial number to seconds since 1970 to reading


def utc_seconds(times: list[datetime]) -> list[float]:
    """Local times of one device, in the order in which they came, as seconds since 1970.

    In the hour that a clock change repeats, times are of the first pass until they step back, then of the second; where
    a device sends the newest first, the other way round.
    """
    doubtful = [i for i, when in enumerate(times) if when.timestamp() < when.replace(fold=1).timestamp()]
    back = sum(times[j] < times[i] for i, j in zip(doubtful, doubtful[1:]))
    found, second, last = [when.timestamp() for when in times], False, datetime.min
    for i in doubtful if 2 * back < len(doubtful) else reversed(doubtful):
        second = last.date() == times[i].date() and (second or times[i] <= last)
        last, found[i] = times[i], times[i].replace(fold=second).timestamp()
    return found


def readings_of(packets: Iterable[Packet], now: float) -> tuple[Readings, dict[str, str], collections.Counter]:
    """The readings in packets, each once; and by serial number the model's name, and how many were later than now."""
    times: dict[tuple[str, str], list] = collections.defaultdict(list)
    found: Readings = collections.defaultdict(dict)
    names, later = {}, collections.Counter()  # type: ignore[var-annotated]
    latest = datetime.fromtimestamp(now) + timedelta(days=1)  # above it not even a clock of 32 bits can say it
    for packet in packets:
        with contextlib.suppress(ProtocolError):
            words, when = registers(packet.clear), device_time(packet.time)
            names[packet.serial] = info(words).get("model") or names.get(packet.serial, "")
            if when and int(packet.type[2:], 16) in (LIVE, BUFFERED):
                if EARLIEST <= when <= latest:
                    times[packet.type, packet.serial].append((when, words))
                else:
                    later[packet.serial] += 1
    for (kind, serial), several in times.items():
        cls = int(kind[:2], 16)
        for (_, words), seconds in zip(several, utc_seconds([when for when, _ in several])):
            if seconds <= now:
                found[cls, serial][seconds] = reading(family(cls, serial), words)
            else:
                later[serial] += 1
    return found, names, later


def samples_of(readings: Readings, names: dict[str, str], extra: str) -> tuple[Samples, collections.Counter]:
    """The samples of readings; and by serial number how many values of counters their rules hold back."""
    found: Samples = {metric: {} for metric in sorted(METRICS)}
    held: collections.Counter = collections.Counter()
    owners: dict[str, tuple] = {}  # of labels
    for (cls, serial), by_time in readings.items():
        labels_of_device = device_labels(identity(kind_of(cls), serial, names.get(serial, "")))
        if owners.setdefault(labels_of_device, (cls, serial)) != (cls, serial):
            print(f"{serial}: left out, since another device has its labels", file=sys.stderr)
            continue
        counters: dict[Series, HeldCounter] = {}
        for seconds in sorted(by_time):
            values = by_time[seconds].values
            said = judged(counters, values, seconds)
            for (metric, labels), number in values.items():
                series = ",".join(filter(None, (labels_of_device, labels, extra)))
                samples, why = found[metric].setdefault(series, {}), said.get((metric, labels))
                held[serial] += why in (*HELD_BACK, WRONG_FIRST)
                if why == WRONG_FIRST:
                    samples.clear()  # of the first, which stands alone
                if metric_type(metric) == "gauge" or why not in (None, *HELD_BACK):
                    samples[seconds] = number
    return found, held


def openmetrics(found: Samples) -> Iterator[str]:
    """OpenMetrics text: families together, the samples of a series by time, # EOF at the end."""
    for metric, series in found.items():
        if any(series.values()):
            kind, meaning = METRICS[metric]
            name = metric[: -len("_total")] if kind == "counter" else metric
            yield f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n"
        for labels, samples in series.items():
            yield from (f"{metric}{{{labels}}} {samples[at]} {at:.0f}\n" for at in sorted(samples))
    yield "# EOF\n"


def report(times: list[float], now: float) -> None:
    """Say on stderr of what times readings are there, and what their user has to know before the blocks are moved."""
    moments = times[0], times[-1], times[-1] + HEAD_SPAN + 60
    begin, end, safe = (time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds)) for seconds in moments)
    print(f"readings of {len(times)} time{'' if len(times) == 1 else 's'}, {begin} to {end}", file=sys.stderr)
    if now < times[-1] + HEAD_SPAN:
        print(
            f"Wait until {safe} before you move the blocks into Prometheus's data: at its next start it drops the live samples "
            "of all series from before a block's end, and the last three hours are in no block of its own yet",
            file=sys.stderr,
        )


OWN_LABELS = "|".join([*DEVICE_LABELS.split(", "), *(row.labels.split(" ")[0] for row in QUANTITIES if row.labels)])
NEW_LABEL = rf"(?s)(?!__|({OWN_LABELS})=)[a-zA-Z_][a-zA-Z0-9_]*=.+"
extra_label = FlagType("", "NAME=VALUE with a name that no series has", lambda text: text.split("=", 1), NEW_LABEL)


def backfill(arguments: list[str]) -> int:
    """Captures and recordings as OpenMetrics text for promtool tsdb create-blocks-from openmetrics."""
    parser = Parser("backfill", backfill.__doc__)
    parser.add_argument("file", metavar="FILE", nargs="+", help="files of --sems.backfill or --sems.capture, or recordings as decode takes them; - for standard input")  # fmt: skip
    parser.add_argument("--job", help="value of a label job, as your Prometheus gives it to this exporter")  # fmt: skip
    parser.add_argument("--instance", help="value of a label instance")  # fmt: skip
    parser.add_argument("--label", metavar="NAME=VALUE", type=extra_label, action="append", default=[], help="another label that your Prometheus adds; repeatable")  # fmt: skip
    given = parser.parse_args(arguments)
    trouble, step = zone_trouble()
    if trouble:
        raise StartError(f"{trouble}, so the times would be wrong: {step}")
    frames: dict[bytes, Packet] = {}
    for path in dict.fromkeys(given.file):
        notes = Notes()
        found = {piece.data: packet for piece, packet in good_packets(recorded(path, notes))}
        say_missing({path: notes}, len(found))
        frames.update(found)
    extra = {"job": given.job, "instance": given.instance, **dict(given.label)}
    labels = ",".join(label(name, value) for name, value in extra.items() if value)
    now = time.time()
    readings, names, later = readings_of(frames.values(), now)  # answers have no time
    samples, held = samples_of(readings, names, labels)
    readings_left = f"readings that are later than now, or older than {EARLIEST.year}"
    values_left = "values of counters that fell, or rose more than is possible"
    for counts, what in ((later, readings_left), (+held, values_left)):
        sys.stderr.writelines(f"{serial}: left out {count} {what}\n" for serial, count in sorted(counts.items()))
    times = sorted({seconds for series in samples.values() for values in series.values() for seconds in values})
    if not times:
        raise StartError(f"{' '.join(given.file)}: no readings in it")
    sys.stdout.writelines(openmetrics(samples))
    report(times, now)
    return 0


# ---------------------------------------------------------------------------------------------------------- doctor

OK, WARN, FAIL = "ok", "warn", "fail"
Finding = tuple[str, ...]  # state, what is so, what to do


def first_true(*rows: tuple) -> Finding:
    """Of rows of a condition and a finding that whose condition is true."""
    return next(row[1:] for row in rows if row[0])


def local_get(settings: Settings, path: str) -> bytes | None:
    """The body that a program on this machine answers to a GET on the exporter's port, None if it says nothing."""
    host, port = settings.web_address
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    answer, deadline = b"", time.monotonic() + 10
    with contextlib.suppress(*HOST_ERRORS), socket.create_connection((host, port), timeout=3) as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        while len(answer) < 16 << 20 and time.monotonic() < deadline and (data := sock.recv(RECV_SIZE)):
            answer += data
    return answer.partition(b"\r\n\r\n")[2] if answer else None


def running_exporter(settings: Settings) -> dict | None:
    """What an exporter on this machine says on /api/devices, None if none runs: any web server can have its port."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        said = json.loads(local_get(settings, "/api/devices") or b"null")
        return said if said["upstream"]["mode"] in (FORWARD, LOCAL, SPOOL) else None
    return None


# fmt: off
def machine_findings(settings: Settings, running: dict | None) -> Iterator[Finding]:
    """Where this runs; whether its variables, ports, clock and time zone are right."""
    addresses = {"sems.listen-address": settings.listen_address, "web.listen-address": settings.web_address}
    unknown = unknown_variables(os.environ)
    if unknown:
        yield WARN, unknown, "correct their names, or unset them"
    if IN_CONTAINER:
        ports = " ".join(f"-p {port}:{port}" for _, port in addresses.values())
        yield OK, "this runs in a container: its ports, names, clock and files are not the host's", f"publish the ports ({ports}), give it TZ, and let the portal's name lead to the host"
    for flag, address in addresses.items():
        port, error = f"port {endpoint_text(address)}", None
        try:
            for sock in listeners(*address):
                sock.close()
        except HOST_ERRORS as caught:
            error = caught
        yield first_true(
            (not error and not running, OK, f"{port} is free", ""),
            (not error, WARN, f"{port} is free, though an exporter runs", f"start doctor with the exporter's --{flag}"),
            (getattr(error, "errno", None) != errno.EADDRINUSE, FAIL, f"{port} cannot be had: {error and error.args[-1]}", f"choose another with --{flag}"),
            (running, OK, f"{port} is in use, and an exporter runs", ""),
            (address == settings.web_address and local_get(settings, "/") is not None, FAIL, f"{port} is in use: another program answers there, and no exporter", f"end that program (`ss -ltnp` shows which), or choose another port with --{flag}"),
            (True, FAIL, f"{port} is in use", f"`ss -ltnp` shows what has it: end that, or choose another with --{flag}"),
        )
    local, trouble = time.strftime("%Y-%m-%d %H:%M:%S %Z"), zone_trouble()
    yield first_true(
        (time.time() < RELEASED, FAIL, f"this machine's clock is wrong: {local}", "let it get the time from the network, and start again"),
        (trouble[0], FAIL, *trouble),
        (True, OK, f"local time is {local}", ""),
    )
    if not os.environ.get("TZ") and time.timezone == 0 and not time.daylight:
        yield WARN, "the time zone is UTC", "if you do not live there, set TZ: devices have local time"


def device_findings(settings: Settings, running: dict | None) -> Iterator[Finding]:
    """What a running exporter has seen."""
    if running is None:
        yield WARN, "no exporter runs on this machine", "start it: python3 sems_mitm.py"
        return
    shown = (local_get(settings, settings.telemetry_path) or b"").decode("utf-8", "replace")
    if re.search(r'^sems_mitm_\w+_total\{reason="loop"\} [^0]', shown, re.M):
        yield FAIL, "the exporter has met itself instead of the portal, or a device has repeated itself at once", "redirect only what the devices send, not this machine: a DNAT rule needs the devices' addresses (-s)"
    for device in running["devices"]:
        text, advice = "{model} {full_serial}: last packet {0} ago".format(span(device["age_seconds"]), **device), "look at its Wi-Fi, and power-cycle its module"
        yield first_true(
            (device["up"], OK, text, ""),
            (device["device"] == "inverter", WARN, text, f"an inverter sleeps at night; otherwise {advice}"),
            (True, WARN, text, advice),
        )
    strangers = running.get("strangers", [])  # not of version 2
    for stranger in strangers:
        said = "begins TLS" if stranger["said"] == "tls" else "sends nothing"
        yield WARN, f"{label_text(stranger['host'])} connects and {said}: its module does not speak this protocol", "newer modules (WiFi/LAN Kit-20, \"WLA...\" on the label) speak TLS with the cloud and cannot be read here: let its names lead to the cloud again"
    if not running["devices"] and not strangers:
        yield WARN, "no device has connected yet", "let the portal's name lead here, then power-cycle the device's module"


def system_findings(host: str, system: list[str]) -> Iterator[Finding]:
    """What this machine's name service says of the portal's name."""
    nowhere = [address for address in system if re.fullmatch(r"127\..*|0\.0\.0\.0|::1?", address)]
    here = [address for address in system if is_this_machine(address) and address not in nowhere]
    says = f"this machine's name service says {host} is {', '.join(nowhere or here or system)}"
    yield first_true(
        (not system, WARN, f"this machine's name service has no address for {host}", "if it is the one that your devices ask, add the override there"),
        (nowhere, WARN, f"{says}: that leads a device nowhere", "let the name service that the devices ask answer with this machine's address in your network"),
        (here, OK, f"{says}: an override that leads here", ""),
        (any(map(is_global, system)), WARN, f"{says}: no override", "fine if the devices ask another one, or come by a DNAT rule or their own settings; else add the override"),
        (IN_CONTAINER, OK, f"{says}: right if that is the host", ""),
        (True, WARN, f"{says}: not this machine", "if that is the override, it leads to the wrong address"),
    )
    if here and any(":" in address and is_global(address) for address in system):
        yield WARN, f"it also gives an IPv6 address for {host}", "a device with IPv6 would go there: answer none for this name"


def server_finding(server: tuple[str, int], host: str) -> Finding:
    """What one server of --sems.upstream-dns says of the portal."""
    where = endpoint_text(server)
    try:
        addresses = ask_dns(server, host)
    except HOST_ERRORS as error:
        return WARN, f"{where} cannot be asked for {host}: {error}", "let --sems.upstream-dns name a server that this machine reaches"
    says = f"{where} says {host} is {', '.join(addresses or ())}"
    return first_true(
        (addresses is None, WARN, f"{where} does not answer for {host}", "a firewall may keep UDP port 53 closed; name another in --sems.upstream-dns"),
        (not addresses, WARN, f"{where} says that {host} does not exist", "most likely a firewall redirects port 53 and answers in its place: exempt this machine, or give --sems.upstream as an address; else look at --sems.upstream"),
        (any(map(is_global, addresses or ())), OK, says, ""),
        (True, FAIL, f"{says}: overridden too", "the router redirects all DNS; exempt this machine, or give --sems.upstream as an address"),
    )


def portal_findings(settings: Settings, running: dict | None) -> Iterator[Finding]:
    """What the name services say of the portal, and whether it can be reached."""
    host, port = settings.upstream
    if settings.mode == LOCAL:
        yield OK, "mode local: no portal is needed", ""
        return
    if literal_addresses(host, port):
        yield OK, f"the portal is given as {host}: no name service is asked", ""
    else:
        yield from system_findings(host, sorted({plain(found.sockaddr[0]) for found in system_addresses(host, port)}))
        yield from (server_finding(server, host) for server in settings.upstream_dns)
    try:
        candidates = resolve(host, port, settings.upstream_dns)
    except Unresolved as error:
        yield FAIL, str(error), "look at this machine's network and at --sems.upstream-dns; until then devices are decoded, and in mode forward not answered"
        return
    for candidate in candidates[:ADDRESSES]:
        where = endpoint_text(candidate.sockaddr)
        try:
            socket.create_connection(candidate.sockaddr[:2], timeout=5).close()
        except OSError as error:
            why = f"the portal at {where} cannot be reached: {error.strerror or error}"
        else:
            yield OK, f"the portal answers at {where}", ""
            return
    yield FAIL, why, "look at this machine's network and firewall; --sems.mode spool keeps what devices send until then"
# fmt: on


def doctor(arguments: list[str]) -> int:
    """Check the set-up and say what to do next; takes the flags of serve."""
    settings = serve_settings(arguments, os.environ, "doctor", f"{doctor.__doc__} Exit code 1 if something fails.")
    running = running_exporter(settings)
    if running:  # it can have other flags
        settings.mode = running["upstream"]["mode"]
        settings.upstream = portal_endpoint(running["upstream"]["address"] or settings.upstream_text)
    counts: collections.Counter[str] = collections.Counter()
    for check in (machine_findings, device_findings, portal_findings):
        for state, text, step in check(settings, running):
            counts[state] += 1
            print(f"{state:4}  {text}" + (f"\n      -> {step}" if step else ""))
    print(f"\n{counts[OK]} ok, warnings: {counts[WARN]}, errors: {counts[FAIL]}")
    return 1 if counts[FAIL] else 0


# ---------------------------------------------------------------------------------------------------- command line


def metrics(arguments: list[str]) -> int:
    """Every metric there is: name, type, labels, unit and meaning, where it is known from."""
    Parser("metrics", metrics.__doc__).parse_args(arguments)
    rows = [("name", "type", "labels", "unit", "meaning", "families", "known from"), *metric_rows()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    return 0


def version(arguments: list[str]) -> int:
    """Version, Python and platform as JSON."""
    Parser("version", version.__doc__).parse_args(arguments)
    platform = "{0.sysname} {0.release} {0.machine}".format(os.uname())
    print(json.dumps({"version": VERSION, "python": sys.version.split()[0], "platform": platform}))
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": serve, "demo": demo, "decode": decode_command, "backfill": backfill, "doctor": doctor,
    "metrics": metrics, "version": version,
}  # fmt: skip


def command_line(arguments: list[str]) -> int:
    """Run the command that arguments name, without one serve. Raises UsageError, StartError."""
    first = arguments[0] if arguments else ""
    if first in ("-h", "--help"):
        what, usage = f"{__doc__}".partition("\n")[0], "usage: python3 sems_mitm.py [COMMAND] [...]"
        commands = [f"  {name:9} {command.__doc__}" for name, command in COMMANDS.items()]
        print(what, "", usage, "", *commands, "", "COMMAND --help tells more; without one it is serve.", sep="\n")
        return 0
    if first == "--version":
        return version(arguments[1:])
    if not first or first.startswith("-"):
        return serve(arguments)
    if first not in COMMANDS:
        raise UsageError(f"{first!a}: no such command; there are {', '.join(COMMANDS)}")
    return COMMANDS[first](arguments[1:])


STDOUT_ERRORS = (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: list[str] | None = None) -> int:
    """Run the program; the exit code: 0 fine, 1 failed, 2 wrong usage."""
    for stream in ("stdout", "stderr"):  # None if it is closed
        setattr(sys, stream, getattr(sys, stream) or open(os.devnull, "w"))  # noqa: SIM115
    with contextlib.suppress(AttributeError):  # a terminal without the degree sign shows its number
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        try:
            return command_line(sys.argv[1:] if argv is None else argv)
        finally:
            print(end="", flush=True)
    except (UsageError, StartError) as error:
        print("sems_mitm.py:", " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        if error.errno not in STDOUT_ERRORS:
            raise
        if error.errno != errno.EPIPE:  # else `| head` has seen enough
            print(f"sems_mitm.py: cannot write to standard output: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
