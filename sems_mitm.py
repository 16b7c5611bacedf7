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

    limits, errors               what is bounded, and why
    registers, internal metrics  what there is to know, a row a quantity
    checksum, cipher             CRC-16/MODBUS and AES-128-CBC, in table and matrix steps
    frames                       Framer: bytes in, one object a frame out, nothing lost
    packets                      addresses, envelopes, registers; encode is the inverse of decode
    readings, identity, bat      registers to values and texts; model, family, labels; the bat
    metrics                      devices and the store; a snapshot of it to exposition text
    rules                        what may pass, who answers, what waits: no socket, no clock, no thread
    files                        what is recorded: capture, backfill, and the journal of a spool
    network                      names, sockets, and the way to the portal
    modes                        Relay (forward), Answerer (local and spool), Courier (a serial number's spool)
    loop                         rounds of events, and a look at deadlines once a second
    household, page, HTTP        what a house makes and takes; /, /api, /metrics, /home-assistant.yaml
    settings, serve              the flags; how the parts above are put together
    simulator, demo              a house without hardware
    recordings                   packets, dumps and captures to the pieces of their streams
    decode, backfill, doctor, metrics, command line
"""

from __future__ import annotations

import argparse
import bisect
import collections
import contextlib
import errno
import fcntl
import functools
import gc
import html
import http.server
import io
import ipaddress
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import selectors
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import BinaryIO, Union

VERSION = "2.0.0"
RELEASED = 1795478400  # 2026-11-24: a machine whose clock is before this is wrong, and sets no device's clock

# ---------------------------------------------------------------------------------------------------------- limits

RECV_SIZE = 64 << 10  # one read: a burst, and no longer than the others may wait for it
EVENTS = 32  # of one round: what has come is sent on, and what waits is bounded, after so many
BACKLOG = 256 << 10  # waiting for a connected peer: above it the other side is not read
PATIENCE = {"outbound": 30, "inbound": 5}  # s for a frame to become whole
FIRST_ATTEMPT = 64 << 10  # of a device's bytes as they came, while the first attempt to reach the portal is under way
QUEUE = 1 << 20  # frames for an absent portal, a device: days of a HomeKit 1000, a packet of 166 bytes a minute
SPOOLED = 4 << 20  # the same in mode spool, objects counted in: over a week
QUEUES = 16 << 20  # all that waits, of all peers together, objects counted in: MemoryMax=64M leaves room for it
OBJECT = 120  # bytes that a waiting frame takes beside its own: the object, and its places in queues
STALL = 60  # s without progress of a backlog before a peer counts as lost
CONNECT_TIMEOUT = 10  # s for an attempt to reach the portal, all addresses together
STUCK = 60  # s after which a look-up counts as stuck, and another is begun
ADDRESSES = 4  # of the portal that an attempt tries
BACKOFF = (1, 60)  # s between attempts to reach the portal, doubling
SILENCE = 30 * 60  # s before a silent device's connection is closed, and a spool without work forgotten
LAST_ATTEMPT = 2  # s for an attempt under way when its device closes
LINGER = 1  # s for the portal's last words after the device has gone
ANSWER_TIMEOUT = 30  # s for the portal to answer what a spool has delivered
HOLD = 1  # s that an unfinished frame waits for the bat, and until the next look at deadlines
SHUTDOWN = 2  # s to send what is queued at the end
TICK = 1  # s between looks at deadlines
CRC_BUDGET = 8  # bytes of checksum on bad frames for each byte received: nested claims burn no core
DECODED = 3  # of a device's waiting live packets: what the dip rule needs to see
OTHER_TYPES = 32  # packet types beyond the known with a label of their own
UNKNOWN_REGISTERS = 128  # series of unknown registers a device
LOOP_WINDOW = 2  # s in which what we began to say to the portal and that comes back is a loop
OPENING = 46  # bytes of it that tell: they hold type, serial number and IV, which is the time
JOURNAL_MIN, JOURNAL_GROWTH = 1 << 20, 4  # a journal is written anew above so many bytes and times what is undelivered
JOURNAL_LINE = 150  # bytes of a line of it beside the frame's hex, about
JOURNAL_LONGEST = 1 << 20  # bytes of a line that are read at once: no frame needs so many
JOURNAL_RETRY = 5  # s between attempts to write a journal anew after a write that failed
HTTP_CONNECTIONS = 16  # at once
HTTP_GRACE = 2  # s that a connection has before it may have to make room
HTTP_HEAD = 16 << 10  # of a request, headers and all
HTTP_TIMEOUT = 30  # s for a request's head, and for a client to take an answer
HTTP_PIECE = 64 << 10  # bytes of an answer that are sent at once
LOG_HEX = 256  # bytes of a packet in a log line
PERIOD, CLOCK_PERIOD = 60, 3600  # s in which the same trouble is one line; a clock that is not good enough stays so

# ---------------------------------------------------------------------------------------------------------- errors


class ProtocolError(ValueError):
    """The peer sent nonsense; `data` is the bytes that failed. Any other exception on a peer's bytes is a bug."""

    def __init__(self, reason: str, data: bytes = b"") -> None:
        super().__init__(reason)
        self.data = data


class UsageError(ValueError):
    """A flag, variable or argument of the command line has a value that cannot be used: exit code 2."""


class StartError(OSError):
    """A port or a file that the exporter needs cannot be had: exit code 1."""


# ------------------------------------------------------------------------------------------------------- registers
#
# A quantity is a row: metric, label with its values in order, how it is read by the families at the head of the table
# (a column for each, or for two that agree; empty is not at all), help.
#
#     u16/10 35103 35107 35111? -     a kind (see KINDS), divided by 10 (* is multiplied) for the metric's unit; then the
#                                     first register for each label value: ? is from register maps alone, - is not there
#     s32 36025 if 36004=1            there only while that register of the same packet holds that word
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
        ("meter_energy_export_decawatt_hours_total", "", "u48 2048", "u48 2057", "f32/10 36015 if 36004=1",  "Cumulative energy exported to the grid."),
        ("meter_energy_import_decawatt_hours_total", "", "u48 2060", "u48 2069", "f32/10 36017 if 36004=1",  "Cumulative energy imported from the grid."),
        ("meter_power_export_watts",                 "", "s32 2105", "s32 2111", "s32 36025 if 36004=1",     "Power exported to the grid; negative while importing."),
        ("meter_frequency_hertz",                    "", "",         "",         "u16/100 36014 if 36004=1", "Grid frequency at the meter."),
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
        ("inverter_string_power_watts",     "string 1 2 3 4",     "",                                               "u32 35105 35109 35113? 35117?",        "DC power of a PV input."),
        ("inverter_line_voltage_volts",     "line 12 23 31",      "u16/10 30115? 30116? 30117?",                    "",                                     "AC voltage between two phases."),
        ("inverter_phase_voltage_volts",    "phase 1 2 3",        "u16/10 30118 30119? 30120?",                     "u16/10 35121 35126 35131",             "AC voltage of a phase."),
        ("inverter_phase_current_amperes",  "phase 1 2 3",        "u16/10 30121 30122? 30123?",                     "u16/10 35122 35127 35132",             "AC current of a phase."),
        ("inverter_phase_frequency_hertz",  "phase 1 2 3",        "u16/100 30124 30125? 30126?",                    "u16/100 35123 35128 35133",            "AC frequency of a phase."),
        ("inverter_phase_power_watts",      "phase 1 2 3",        "",                                               "s16 35125 35130 35135",                "AC power of a phase."),
        ("inverter_input_voltage_dc_decivolts",               "", "u16 30103",             "u16 35103",     "Input DC voltage to inverter."),
        ("inverter_input_current_dc_deciamps",                "", "u16 30104",             "u16 35104",     "Input DC current to inverter."),
        ("inverter_input_power_watts",                        "", "u32h 30137?",           "",              "DC input power."),
        ("inverter_bus_voltage_volts",                        "", "u16/10 30163",          "u16/10 35178",  "DC bus voltage."),
        ("inverter_output_voltage_ac_decivolts",              "", "u16 30118",             "u16 35121",     "Output AC voltage from inverter."),
        ("inverter_output_current_ac_deciamps",               "", "u16 30121",             "u16 35122",     "Output AC current from inverter."),
        ("inverter_output_frequency_ac_centihertz",           "", "u16 30124",             "u16 35123",     "Output AC frequency from inverter."),
        ("inverter_power_output_watts",                       "", "u32l 30127",            "s16 35138",     "Power output from inverter."),
        ("inverter_reactive_power_vars",                      "", "s32 30135",             "s16 35142?",    "Reactive power output; negative is absorbing."),
        ("inverter_apparent_power_voltamperes",               "", "u32 30133",             "s16 35144?",    "Apparent power output."),
        ("inverter_power_factor_ratio",                       "", "s16/1000 30139",        "",              "Power factor."),
        ("inverter_leakage_current_amperes",                  "", "u16/1000 30210?",       "",              "Residual (leakage) current."),
        ("inverter_meter_power_watts",                        "", "s32 30195? if 30209=1", "",              "Power at the CT meter attached to the inverter."),
        ("inverter_energy_output_hectowatt_hours_day",        "", "u16 30144",             "u32 35193",     "Cumulative energy output today."),
        ("inverter_energy_output_hectowatt_hours_total",      "", "u32 30145",             "u32 35191",     "Cumulative energy output total."),
        ("inverter_uptime_hours_total",                       "", "u32 30147",             "u32 35197",     "Inverter total operation time."),
        ("inverter_work_mode",                                "", "u16 30129",             "",              "Work mode: 0 waiting, 1 normal, 2 error, 4 checking."),
        ("inverter_error_bitmap",                             "", "u32 30130?",            "u32 35189?",    "Error codes, a bitmap; 0 is no error."),
        ("inverter_warning_bitmap",                           "", "u16 30132",             "u16 35185?",    "Warning codes, a bitmap; 0 is no warning."),
        ("inverter_derating_bitmap",                          "", "u32 30165?",            "",              "Reasons for derating, a bitmap."),
        ("inverter_grid_code",                                "", "u16 30149",             "u16 35186",     "Grid (safety country) code the inverter is set to."),
        ("inverter_internal_temperature_decidegrees_celsius", "", "s16 30141",             "s16 35174",     "Internal temperature of inverter."),
        ("inverter_heatsink_temperature_celsius",             "", "s16/10 30142?",         "s16/10 35176",  "Temperature of the heat sink."),
        ("inverter_module_temperature_celsius",               "", "s16/10 30143?",         "s16/10 35175?", "Temperature of the power module."),
        ("inverter_rssi_percent",                             "", "u16 30172",             "u16 36001",     "Inverter WLAN received signal strength indicator."),
    )),
    # hybrids alone: load, backup output, batteries
    (("HYBRID",), (
        ("inverter_phase_load_watts",       "phase 1 2 3", "s16 35164 35166 35168",     "Load on a phase."),
        ("inverter_backup_voltage_volts",   "phase 1 2 3", "u16/10 35145 35151 35157",  "Voltage of a phase of the backup output."),
        ("inverter_backup_current_amperes", "phase 1 2 3", "u16/10 35146 35152 35158",  "Current of a phase of the backup output."),
        ("inverter_backup_frequency_hertz", "phase 1 2 3", "u16/100 35147 35153 35159", "Frequency of a phase of the backup output."),
        ("inverter_backup_power_watts",     "phase 1 2 3", "s16 35150 35156 35162",     "Power of a phase of the backup output."),
        ("battery_power_watts",             "battery 1 2", "s32 35182 35264?",          "Battery power; positive is discharging."),
        ("battery_voltage_volts",           "battery 1 2", "u16/10 35180 35262?",       "Battery voltage."),
        ("battery_current_amperes",         "battery 1 2", "s16/10 35181 35263?",       "Battery current; positive is discharging."),
        ("battery_mode",                    "battery 1 2", "u16 35184 35266?",          "Battery mode: 0 none, 1 standby, 2 discharging, 3 charging."),
        ("battery_state_of_charge_ratio",   "battery 1 2", "u16/100 37007 39005?",      "Battery state of charge, 0 to 1."),
        ("battery_state_of_health_ratio",   "battery 1 2", "u16/100 37008 39006?",      "Battery state of health, 0 to 1."),
        ("battery_temperature_celsius",     "battery 1 2", "s16/10 37003 39001?",       "Battery temperature."),
        ("battery_charge_limit_amperes",    "battery 1 2", "u16 37004 39002?",          "Charge current limit set by the battery management system."),
        ("battery_discharge_limit_amperes", "battery 1 2", "u16 37005 39003?",          "Discharge current limit set by the battery management system."),
        ("battery_modules",                 "battery 1 2", "u16 37009 39007?",          "Number of battery modules."),
        ("inverter_active_power_watts",              "", "s16 35140",     "Active power at the grid connection; positive is export."),
        ("inverter_energy_export_watthours_total",   "", "u32*100 35195", "Cumulative energy exported."),
        ("inverter_energy_import_watthours_total",   "", "u32*100 35200", "Cumulative energy imported."),
        ("inverter_energy_load_watthours_total",     "", "u32*100 35203", "Cumulative energy used by the load."),
        ("inverter_hybrid_work_mode",                "", "u16 35187?",    "Work mode of a hybrid: 0 waiting, 1 on grid, 2 off grid, 3 fault, 4 flashing, 5 checking."),
        ("inverter_load_watts",                      "", "s16 35172",     "Load behind the inverter."),
        ("battery_energy_charge_watthours_total",    "", "u32*100 35206", "Cumulative energy charged into the battery."),
        ("battery_energy_discharge_watthours_total", "", "u32*100 35209", "Cumulative energy discharged from the battery."),
    )),
)
# fmt: on

FAMILIES = ("HK1000", "HK3000", "GRID", "HYBRID")
Quantity = collections.namedtuple("Quantity", "metric labels help read")  # read: family to how it is read there


def quantities(tables: Iterable[tuple[Sequence[str], Sequence[Sequence[str]]]]) -> tuple[Quantity, ...]:
    """The rows of tables. Raises ValueError for a row with other columns than its head."""
    found = []
    for heads, rows in tables:
        for metric, labels, *reads, text in rows:
            if len(reads) != len(heads):
                raise ValueError(f"{metric}: {len(reads)} columns under {len(heads)} heads")
            read = {family: how for head, how in zip(heads, reads) if how for family in head.split()}
            found.append(Quantity(metric, labels, text, read))
    return tuple(found)


QUANTITIES = quantities(TABLES)

# number: of the raw bits, None if they mean "not available"; int is the bits as they are
Kind = collections.namedtuple("Kind", "words signed number")
KINDS = {
    "u16": Kind(1, False, int),
    "s16": Kind(1, True, lambda raw: raw - (raw >> 15 << 16)),
    "u32": Kind(2, False, int),
    "s32": Kind(2, True, lambda raw: raw - (raw >> 31 << 32)),
    "u48": Kind(3, False, int),
    "f32": Kind(2, True, lambda raw: struct.unpack(">f", raw.to_bytes(4, "big"))[0]),
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
SILENT = ((30034, 30039), (30100, 30102), (35000, 35032), (35100, 35102))

# A series of a family as it is read. later: its registers behind the first; missing: the raw number that means "not
# available"; series: (metric, labels); when: (register, word) or None.
Value = collections.namedtuple("Value", "register later missing number multiply divide series counter when")


def metric_type(metric: str) -> str:
    """The type of a register's metric, by its name."""
    return "counter" if metric.endswith("_total") else "gauge"


def _parts(how: str) -> tuple[str, int, int, list[str], tuple[int, ...] | None]:
    """How a quantity is read: kind, multiply, divide, registers, condition."""
    how, _, condition = how.partition(" if ")
    form, *registers = how.split()
    kind, _, divide = form.partition("/")
    kind, _, multiply = kind.partition("*")  # two numbers, since 66 / 10 is 6.6 and 66 * 0.1 is not
    when = tuple(map(int, condition.split("="))) if condition else None
    return kind, int(multiply or 1), int(divide or 1), registers, when


def evidence(row: Quantity, family: str) -> list[str]:
    """Where each register that a row has in a family is known from."""
    known = GUESS if family == "HK3000" else SEEN
    registers = _parts(row.read[family])[3]
    return [MAP if register.endswith("?") else known for register in registers if register != "-"]


def row_values(row: Quantity, family: str) -> Iterator[Value]:
    """A row's values in a family that reads it. Raises ValueError for a row that makes no sense."""
    kind, multiply, divide, registers, when = _parts(row.read[family])
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind}")
    name, *labels = row.labels.split() or [""]
    texts = [f'{name}="{label}"' for label in labels] or [""]
    if len(registers) != len(texts):
        raise ValueError(f"{len(registers)} registers for {len(texts)} labels")
    words, signed, number = KINDS[kind]
    missing = (1 << 16 * words) - 1 if family == "GRID" or not signed else None  # elsewhere -1 is a value
    counter = metric_type(row.metric) == "counter"
    for register, text in zip(registers, texts):
        if register != "-":
            first = int(register.rstrip("?"))
            later = tuple(range(first + 1, first + words))
            yield Value(first, later, missing, number, multiply, divide, (row.metric, text), counter, when)


def family_values(family: str, rows: Sequence[Quantity] = QUANTITIES) -> tuple[Value, ...]:
    """All values of a family. Raises ValueError for rows that make no sense or contradict one another."""
    found: dict[tuple[str, str], Value] = {}
    for row in rows:
        try:
            for value in row_values(row, family) if family in row.read else ():
                if found.setdefault(value.series, value) is not value:
                    raise ValueError(f"the series {value.series[1]!r} stands twice")
        except ValueError as error:
            raise ValueError(f"{row.metric} in {family}: {error}") from None
    return tuple(found.values())


VALUES = {family: family_values(family) for family in FAMILIES}
NO_METRIC = {at for first, last in itertools.chain(SILENT, *INFO.values()) for at in range(first, last + 1)}
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

    # packets and connections
    ("sems_mitm_packets_total",                   "counter", "direction, type, verdict", (), "Packets by type and by what became of them."),
    ("sems_mitm_rejected_values_total",           "counter", "reason",    ("dip", "not_finite"), "Values of live packets that were not taken."),
    ("sems_mitm_queue_bytes",                     "gauge",   "",          (),    "Bytes that wait for the portal, in memory."),
    ("sems_mitm_queue_dropped_packets_total",     "counter", "",          ALONE, "Packets that were dropped because a queue was full."),
    ("sems_mitm_unlisted_device_packets_total",   "counter", "",          ALONE, "Good packets of devices without series of their own."),
    ("sems_mitm_device_connections",              "gauge",   "",          (),    "Device connections open now."),
    ("sems_mitm_upstream_connections",            "gauge",   "",          (),    "Portal connections open now."),
    ("sems_mitm_refused_connections_total",       "counter", "reason",    ("limit", "not_allowed", "loop"), "Device connections that were refused."),
    ("sems_mitm_upstream_connect_failures_total", "counter", "reason",    ("dns", "refused", "timeout", "loop", "other"), "Attempts to reach the portal that failed."),
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


def all_metrics(rows: Sequence[Quantity] = QUANTITIES) -> dict[str, tuple[str, str]]:
    """Name of every metric to (type, help). Raises ValueError if two rows disagree."""
    found = {name: (kind, meaning) for name, kind, _, _, meaning in INTERNALS}
    for row in rows:
        told = metric_type(row.metric), row.help
        if found.setdefault(row.metric, told) != told:
            raise ValueError(f"{row.metric}: another row has another type or help")
    return found


METRICS = all_metrics()


def unit(metric: str) -> str:
    """The unit of a metric, "" if it has none."""
    base = re.sub("_(total|day)$", "", metric)
    return next((unit for end, unit in UNITS.items() if base.endswith("_" + end)), "")


def metric_rows() -> list[tuple[str, ...]]:
    """Every metric, registers' first: name, type, labels, unit, meaning, families, where each of them is known from."""
    rows: list[tuple[str, ...]] = []
    for row in QUANTITIES:
        label, _, values = row.labels.partition(" ")
        labels = f"{DEVICE_LABELS}, {label} ({values})" if label else DEVICE_LABELS
        known = {family: " + ".join(sorted(set(evidence(row, family)))) for family in row.read}
        told = metric_type(row.metric), labels, unit(row.metric), row.help
        rows.append((row.metric, *told, ", ".join(known), ", ".join(known.values())))
    for name, kind, label, values, meaning in INTERNALS:
        labels = f"{label} ({' '.join(values)})" if label and values else label
        rows.append((name, kind, labels, unit(name), meaning, "", "exporter"))
    return rows


# -------------------------------------------------------------------------------------------------------- checksum


@functools.lru_cache(maxsize=1)
def _crc_table() -> list[int]:
    """What 16 bits shifted out of the register leave in it. The map is linear: bit by bit, then sums."""
    table = [0]
    for bit in range(16):
        crc = 1 << bit
        for _ in range(16):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
        table += [crc ^ lower for lower in table]
    return table


def crc16(data: bytes) -> int:
    """CRC-16/MODBUS of data; 4B37 for b"123456789". Two bytes a step: of 16 bits nothing is left when 16 go in."""
    table, crc, even = _crc_table(), 0xFFFF, len(data) & ~1
    words = (
        memoryview(data[:even]).cast("H") if sys.byteorder == "little" else struct.unpack(f"<{even // 2}H", data[:even])
    )
    for word in words:
        crc = table[crc ^ word]
    for byte in data[even:]:
        crc = crc >> 8 ^ table[((crc ^ byte) & 0xFF) << 8]
    return crc


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
            mixed[i] ^= _direction(True)[0][j][
                SBOX[key[i & 12 | (i + j) & 3]]
            ]  # SBOX undoes the substitution in the table
    return bytes(mixed)


@functools.lru_cache(maxsize=32)
def _round_keys(key: bytes, blocks: int, decrypting: bool) -> list[int]:
    keys = _expanded(key)
    if decrypting:
        keys = [keys[10], *map(_unmixed, keys[9:0:-1]), keys[0]]
    return [
        _int(b"".join(bytes([k[4 * column + row]]) * blocks for row in range(4) for column in range(4))) for k in keys
    ]


def _rounds(data: bytes, decrypting: bool, key: bytes) -> bytes:
    """Every block of data through the cipher, for itself."""
    mixed_boxes, box, turns = _direction(decrypting)
    size = len(data)
    row, blocks = size // 4, size // 16
    first, *middle, last = _round_keys(key, blocks, decrypting)
    cuts = [(r * row, r * row + turn * blocks, (r + 1) * row) for r, turn in enumerate(turns)]
    own, next_row, third, fourth = mixed_boxes  # what a byte is multiplied by for its own row, and for those above
    state = (_int(memoryview(data).cast("B", (blocks, 4, 4)).tobytes("F")) ^ first).to_bytes(size, "little")
    for round_key in middle:
        state = b"".join([part for start, cut, end in cuts for part in (state[cut:end], state[start:cut])])
        b, c, d = state.translate(next_row), state.translate(third), state.translate(fourth)
        mixed = _int(b[row:] + b[:row]) ^ _int(c[2 * row :] + c[: 2 * row]) ^ _int(d[3 * row :] + d[: 3 * row])
        state = (_int(state.translate(own)) ^ mixed ^ round_key).to_bytes(size, "little")
    state = b"".join([part for start, cut, end in cuts for part in (state[cut:end], state[start:cut])])
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
# MALFORMED  a frame with a bad CRC, or one that was given up; up to where it claimed to end
# JUNK       an unbroken run of bytes that are neither
# KEEPALIVE  a run of `01 02`
# MORE       goes on with the malformed frame or the junk before it: no packet of its own

FRAME, MALFORMED, JUNK, KEEPALIVE, MORE = "frame", "malformed", "junk", "keepalive", ""
Piece = tuple[str, bytes]


# One direction on the wire. overhead: bytes that a frame has beside its length field's number; head: bytes that name its type
# and serial; cap: of the length field; order: of the CRC's bytes; beat: what may stand between frames.
Wire = collections.namedtuple("Wire", "name prefix overhead head cap order beat")
OUTBOUND = Wire("outbound", b"POSTGW", 13, 30, 8 << 10, "big", b"")
INBOUND = Wire("inbound", b"GW", 9, 24, 4 << 10, "little", b"\x01\x02")
LENGTH = struct.Struct(">I")


class Framer:
    """Cuts a stream into pieces, whatever the cut of its reads.

    After a bad frame the search goes on right behind its prefix. `rest` is what is not decided yet: an unfinished frame,
    or a few bytes that may become one; `since` is when the wait for it began.
    """

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.rest = b""
        self.since = self._fed = 0.0
        self._claimed = 0  # of rest: up to where a bad frame before it claims the bytes
        self._bad = False  # that frame has no piece yet
        self._junk = False  # the last piece was junk: more of it is no new packet
        self._boundary = True  # at the start, or behind a frame or a keep-alive: where a keep-alive may stand
        self._checked = 0  # of rest: up to where a bad frame before it was checked, whatever good ones it hid
        self._budget = 0  # bytes of CRC that may be spent on frames claimed inside bad ones

    def feed(self, data: bytes, now: float) -> list[Piece]:
        """The pieces that data completes, in order."""
        # each byte is checked once by the frame that holds it, unasked
        self._budget = min(self._budget + (CRC_BUDGET - 1) * len(data), CRC_BUDGET * RECV_SIZE)
        self._fed = now
        return self._cut(self.rest + data)

    def expire(self, now: float) -> list[Piece]:
        """The pieces of an unfinished frame that has waited for too long, and is given up."""
        pieces: list[Piece] = []
        while self.rest and now - self.since >= PATIENCE[self.wire.name]:
            pieces += self._cut(self.rest, give_up=True)
        return pieces

    def close(self) -> list[Piece]:
        """The pieces of what is left when the stream has ended."""
        pieces: list[Piece] = []
        while self.rest:
            pieces += self._cut(self.rest, give_up=True)
        return pieces

    def _cut(self, buf: bytes, give_up: bool = False) -> list[Piece]:
        wire = self.wire
        pieces: list[Piece] = []
        size, header, overhead, order = len(wire.prefix), len(wire.prefix) + 4, wire.overhead, wire.order
        start = pos = 0  # from start to pos: neither a good frame nor a keep-alive
        while pos < len(buf):
            if wire.beat and self._boundary and start == pos:
                start = pos = self._beats(buf, pos, pieces)
                if buf[pos:] == wire.beat[:1] and not give_up:
                    break
            pos = self._find(buf, pos, give_up)
            whole_header = pos + header <= len(buf)
            if pos == len(buf) or not (whole_header or give_up):
                break
            length = LENGTH.unpack_from(buf, pos + size)[0] if whole_header else 0
            end = pos + length + overhead
            if length > wire.cap:
                pos += size
            elif end > len(buf) and not give_up:
                break
            elif pos < self._checked and end <= len(buf) and end - pos > self._budget:
                pos = self._checked
            elif end <= len(buf) and crc16(buf[pos : end - 2]) == int.from_bytes(buf[end - 2 : end], order):
                if start < pos:
                    self._skip(buf, start, pos, pieces)
                pieces.append((FRAME, buf[pos:end]))
                self._claimed, self._junk, self._boundary = 0, False, True
                start = pos = end
            else:
                start = self._reject(buf, start, pos, end, pieces)
                pos = min(pos + size, len(buf))
                give_up = False  # one at a time: what it hid may be still on its way
        self._skip(buf, start, pos, pieces)
        self._claimed, self._checked = max(self._claimed - pos, 0), max(self._checked - pos, 0)
        self.since = self.since if self.rest and not pos else self._fed
        self.rest = buf[pos:]
        return pieces

    def _find(self, buf: bytes, pos: int, give_up: bool) -> int:
        """Where a frame may begin from pos on: at a prefix, or at what may become one when more has come."""
        prefix, at = self.wire.prefix, buf.find(self.wire.prefix, pos)
        if at >= 0 or give_up:
            return at if at >= 0 else len(buf)
        return len(buf) - next((k for k in range(len(prefix) - 1, 0, -1) if buf.endswith(prefix[:k], pos)), 0)

    def _reject(self, buf: bytes, start: int, pos: int, end: int, pieces: list[Piece]) -> int:
        """Take the frame from pos to end as bad; the new start. What begins inside another's claim is part of that."""
        if end <= len(buf):
            self._budget -= end - pos if pos < self._checked else 0
            self._checked = max(self._checked, end)
        if pos >= self._claimed:
            self._skip(buf, start, pos, pieces)
            start, self._bad = pos, True
        self._claimed = max(self._claimed, end)
        return start

    def _beats(self, buf: bytes, pos: int, pieces: list[Piece]) -> int:
        """Take the keep-alives at pos; where they end."""
        start, beat = pos, self.wire.beat
        while buf.startswith(beat, pos):
            pos += len(beat)
        if pos > start:
            pieces.append((KEEPALIVE, buf[start:pos]))
            self._junk = False
        return pos

    def _skip(self, buf: bytes, start: int, end: int, pieces: list[Piece]) -> None:
        """Take the bytes from start to end as malformed where a bad frame claims them, and as junk behind that."""
        edge = min(max(self._claimed, start), end)
        if edge > start:
            pieces.append((MALFORMED if self._bad else MORE, buf[start:edge]))
            self._bad, self._junk, self._boundary = False, False, False
        if end > edge:
            pieces.append((MORE if self._junk else JUNK, buf[edge:end]))
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


def kind_of(cls: int) -> str:
    """The label `device` of a class."""
    return "meter" if cls == METER else "inverter"


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
        texts = [_text(words, first, last) for first, last in ranges if first in words]
        text = " ".join(filter(None, texts)) if texts else ""
        if text:
            port, comma, host = text.partition(",")  # HomeKit: port,host
            found[name] = f"{host}:{port}" if name == "portal" and comma and port.isdigit() else text
    return found


def reading(name: str, words: dict[int, int]) -> Reading:
    """What the registers of a device of the family `name` mean."""
    values, not_finite, known = {}, 0, KNOWN[name]
    for register, later, missing, number, multiply, divide, series, counter, when in VALUES[name]:
        raw = words.get(register)
        for low in later:
            raw = raw << 16 | words[low] if raw is not None and low in words else None
        if raw is None or raw == missing or when and words.get(when[0]) != when[1]:
            continue
        if number is not int:  # what is unsigned is its bits: finite, and not below 0
            raw = number(raw)
            if raw is None:
                continue
            if raw < 0 and counter or not math.isfinite(raw):
                not_finite += 1
                continue
        values[series] = raw * multiply if divide == 1 else raw / divide
    unknown = [
        (register, word) for register, word in words.items() if register not in known and word not in (0, 0xFFFF)
    ]
    return Reading(values, not_finite, dict(sorted(unknown)), info(words))


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
    clear = payload(
        [(first, tuple(drawn.get(first + i, word) for i, word in enumerate(words))) for first, words in ranges]
    )
    return encode(packet._replace(clear=clear))


# --------------------------------------------------------------------------------------------------------- metrics

log = logging.getLogger("sems_mitm")
Clock = Callable[[float], float]  # monotonic seconds to the seconds since 1970 of the time of day that is shown


def wall_clock(now: float) -> float:
    """The real clock: monotonic seconds to seconds since 1970."""
    return time.time() - time.monotonic() + now


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


class Order:
    """Which live packets of a device count as new, by their own times; as the six bytes of times compare, so do the times.

    One is new that is not older than the newest, or the third older one in a row, rising: a clock may be set back. What is
    no calendar date is new and takes no part.
    """

    def __init__(self) -> None:
        self._newest = b""
        self._last, self._row = b"", 0  # of the packets older than the newest: the time of the last, how many rise

    def is_new(self, stamp: bytes) -> bool:
        """Whether the next packet, of this time, counts as new."""
        if not device_time(stamp):
            return True
        if stamp < self._newest:
            self._row = self._row + 1 if stamp > self._last else 1
            self._last = stamp
            if self._row < 3:
                return False
        self._newest, self._row = stamp, 0
        return True


Series = tuple[str, str]  # metric, and its labels beside the device's three
# A day of a device: its date; when counting began, None for midnight; the counters from which it counts.
Day = collections.namedtuple("Day", "date since base")


class Live:
    """What the live packets of a device said. Times are monotonic but for `day`'s."""

    def __init__(self) -> None:
        self.gauges: dict[Series, float] = {}  # of the last reading
        self.counters: dict[Series, float] = {}  # held: they fall only by the dip rule
        self.unknown: dict[int, int] = {}
        self.fresh = -math.inf  # when the last reading came
        self.offset: float | None = None
        self.day: Day | None = None
        self._below: dict[
            Series, tuple[float, int]
        ] = {}  # a counter's values below the held one: the last, how many in a row

    def take(self, found: Reading, now: float, clock: Clock) -> int:
        """Take a reading that counts as new; how many of its counters were held back as dips."""
        local, gap = datetime.fromtimestamp(clock(now)), clock(now) - clock(self.fresh)
        is_new_day = not self.day or self.day.date != local.date()
        before = dict(self.counters) if is_new_day else {}
        self.fresh = now
        self.unknown = dict(itertools.islice(found.unknown.items(), UNKNOWN_REGISTERS))
        self.gauges, dips = {}, 0
        below: dict[Series, tuple[float, int]] = {}
        for series, number in found.values.items():
            if not series[0].endswith("_total"):
                self.gauges[series] = number
            elif self._is_dip(series, number, below):
                dips += 1
            else:
                self.counters[series] = number
        self._below = below
        if is_new_day:
            self._begin_day(local, gap, before)
        return dips

    def _is_dip(self, series: Series, number: float, below: dict[Series, tuple[float, int]]) -> bool:
        """Whether a counter's value is below the held one, and not yet the third in a row of which none falls."""
        if number >= self.counters.get(series, number):
            return False
        last, row = self._below.get(series, (number, 0))
        row = row + 1 if number >= last else 1
        below[series] = number, row
        return row < DECODED

    def _begin_day(self, local: datetime, gap: float, before: dict[Series, float]) -> None:
        """Count today from `before`, the counters of a reading a gap (in s) ago, if that was just before midnight; else from now."""
        goes_on = self.day and gap < 3600 and (local - timedelta(seconds=gap)).date() == self.day.date
        self.day = Day(local.date(), None if goes_on else local, before if goes_on else dict(self.counters))


PACKET_COUNTERS = {  # by kind of device and function; the original's names, one for the confirmations of all
    kind: {
        SETTINGS: f"{kind}_time_sync_packets_total",
        LIVE: f"{kind}_metrics_packets_total",
        BUFFERED: f"{kind}_metrics_packets_total",
        CONFIRMATION: "meter_time_sync_ack_packets_total",
    }
    for kind in ("meter", "inverter")
}
ACKS, NACKS, BUFFERED_PACKETS = "sems_mitm_acks_total", "sems_mitm_nacks_total", "sems_mitm_buffered_packets_total"


class Device:
    """What is known of one device, and its frames that wait to be decoded."""

    def __init__(self, where: Address, now: float) -> None:
        self.kind, self.serial = where.owner
        self.family = family(where.cls, where.serial)
        self.is_told("")
        self.info = {"firmware": "", "module_firmware": "", "portal": ""}
        self.counts = dict.fromkeys([*PACKET_COUNTERS[self.kind].values(), ACKS, NACKS, BUFFERED_PACKETS], 0)
        self.good = now  # when the last good frame came
        self.live, self.order = Live(), Order()
        self.waiting: dict[int, list[tuple[bytes, float]]] = {SETTINGS: [], LIVE: []}  # frames, and when they came
        self.version = 0  # rises with every change, so that an unchanged device is not rendered again
        self.page: tuple[tuple[int, bool], dict[str, str]] = ((-1, False), {})

    def is_told(self, model_name: str) -> None:
        """The device gave its model name; name tells its series from those of others, labels is that as text."""
        self.told = model_name
        self.name = identity(self.kind, self.serial, model_name)
        self.labels = device_labels(self.name)

    def samples(self, stale: bool) -> dict[Series, float]:
        """Everything that does not change by itself."""
        live, texts = self.live, {"full_serial": label_text(self.serial), **self.info}
        found: dict[Series, float] = {(name, ""): number for name, number in self.counts.items()}
        found["sems_mitm_device_info", ",".join(map(label, texts, texts.values()))] = 1
        found.update(live.counters)
        if not stale:
            found.update(live.gauges)
            unknown = f"{self.kind}_unknown_register"
            found.update(((unknown, f'register="{register}"'), word) for register, word in live.unknown.items())
            if live.offset is not None:
                found["sems_mitm_device_clock_offset_seconds", ""] = live.offset
        return found


def page(labels: str, samples: Mapping[Series, float]) -> dict[str, str]:
    """Metric name to its lines, for samples that share labels."""
    lines: dict[str, list[str]] = {}
    for (metric, more), number in samples.items():
        both = f"{labels},{more}" if labels and more else labels or more
        lines.setdefault(metric, []).append(f"{metric}{{{both}}} {number}\n" if both else f"{metric} {number}\n")
    return {metric: "".join(parts) for metric, parts in lines.items()}


def exposition(pages: list[dict[str, str]]) -> Iterator[str]:
    """Text format 0.0.4 of pages, a family at a time, sorted, each with its HELP and TYPE once."""
    for name in sorted(set().union(*pages)):
        kind, help_text = METRICS[name]
        yield f"# HELP {name} {help_text}\n# TYPE {name} {kind}\n"
        parts = [lines[name] for lines in pages if name in lines]
        for at in range(0, len(parts), 64):  # a family of hundreds of devices is megabytes
            yield "".join(parts[at : at + 64])


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


class FairLock:
    """A lock that is not taken again by the thread that had it while another waits: the loop would starve a scrape."""

    def __init__(self) -> None:
        self._turn, self._lock = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._turn:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


LABELLED = TYPES | {MALFORMED, KEEPALIVE, JUNK}


class Store:
    """All that the exporter shows. The loop writes and HTTP threads read, each under `lock`."""

    def __init__(
        self, stale_after: float = 300, max_devices: int = 256, batsignal: bool = False, clock: Clock = wall_clock
    ) -> None:
        self.lock = FairLock()
        self.stale_after, self.max_devices, self.batsignal, self.clock = stale_after, max_devices, batsignal, clock
        self.devices: dict[tuple[str, str], Device] = {}
        self.names: dict[tuple[str, str, str], Device] = {}  # the devices that are shown, by their identities
        self.undecoded: dict[Device, None] = {}  # devices with waiting frames, in the order of the first
        self.readings = 0  # taken so far
        self.totals = {(name, label(key, value) if key else ""): 0 for name, key, values in FIXED for value in values}
        self.packets: dict[tuple[str, str, str], int] = collections.defaultdict(int)
        self.gauges: dict[str, Callable[[], float | None]] = {}  # asked at the scrape; None is absent
        self.troubles = Troubles()

    def add(self, name: str, count: int = 1, labels: str = "") -> None:
        """Add to a counter of FIXED."""
        self.totals[name, labels] += count

    def count(self, wire: Wire, kind: str, verdict: str, count: int = 1) -> None:
        """Count packets whose fate is decided; kind is a type, malformed, keepalive or junk."""
        key = (wire.name, kind, verdict)
        if key not in self.packets and kind not in LABELLED:
            others = {seen for _, seen, _ in self.packets} - LABELLED
            key = key if kind in others or len(others) < OTHER_TYPES else (wire.name, "other", verdict)
        self.packets[key] += count

    def broke(self, where: str) -> None:
        """Count and log the exception of our own that is being handled; `where` names the boundary that contains it."""
        self.add("sems_mitm_internal_errors_total")
        text = f"an error of our own in {where}; please report it:\n{traceback.format_exc().rstrip()}"
        self.troubles.say(f"internal {where}", text, time.monotonic(), level=logging.ERROR)

    # Packets come

    def meet(self, where: Address, frame: bytes, now: float) -> None:
        """Count a good frame of a device, and keep it if it is to be decoded."""
        device = self.devices.get(where.owner) or self._newcomer(where, now)
        if device is None or not self._is_named(device, now):
            self.add("sems_mitm_unlisted_device_packets_total")
            return
        function = where.function
        device.good = now
        device.version += 1
        counter = PACKET_COUNTERS[device.kind].get(function)
        if counter:
            device.counts[counter] += 1
        if function == BUFFERED:
            device.counts[BUFFERED_PACKETS] += 1
        elif function == SETTINGS or function == LIVE and device.order.is_new(frame[LONG.time : LONG.time + 6]):
            waiting = device.waiting[function]
            waiting.append((frame, now))
            del waiting[:-DECODED]
            self.undecoded[device] = None

    def answered(self, owner: tuple[str, str], counter: str) -> None:
        """Count an ACK or NACK of a device."""
        device = self.devices.get(owner)
        if device:
            device.counts[counter] += 1
            device.version += 1

    def _newcomer(self, where: Address, now: float) -> Device | None:
        """A device met for the first time; None if it gets no series."""
        device = Device(where, now)
        if device.name in self.names:
            self._is_named(device, now)  # says so
            return None
        if len(self.devices) >= self.max_devices:
            silent = min(self.devices.values(), key=lambda other: other.good)
            if not self.is_stale(silent.good, now):
                text = f"more devices than --sems.max-devices={self.max_devices}: {where.serial} is passed on without metrics"
                self.troubles.say("max-devices", text, now)
                return None
            del self.devices[silent.kind, silent.serial]
            self.undecoded.pop(silent, None)
            self._unname(silent)
        self.devices[where.owner] = self.names[device.name] = device
        log.info("new device: %s %s", device.name[1], device.serial)
        return device

    def _is_named(self, device: Device, now: float) -> bool:
        """Whether the device has the series of its name; if no other has, it gets them."""
        if self.names.setdefault(device.name, device) is device:
            return True
        text = f"another device has the labels of {device.serial}, which gets no metrics: {' '.join(device.name)}"
        self.troubles.say("same-name", text, now)
        return False

    def _unname(self, device: Device) -> None:
        if self.names.get(device.name) is device:
            del self.names[device.name]

    def is_stale(self, since: float, now: float) -> bool:
        """Whether what was last heard at `since` (monotonic) is too old to be shown."""
        return bool(self.stale_after) and now - since > self.stale_after

    # Packets are decoded

    def digest(self, now: float) -> None:
        """Decode all that waits."""
        while self.undecoded:
            self.digest_one(now)

    def digest_one(self, now: float) -> None:
        """Decode what waits of one device. A reading that our own code cannot take is left out."""
        device = next(iter(self.undecoded))
        del self.undecoded[device]
        for function, waiting in device.waiting.items():
            frames = waiting[:]
            waiting.clear()
            for frame, came in frames:
                try:
                    self._decode(device, function, frame, came)
                except ProtocolError as error:
                    self.troubles.say("payload", f"a packet of {device.serial} cannot be read: {error}", now)
                except Exception:
                    self.broke("a reading")

    def _decode(self, device: Device, function: int, frame: bytes, came: float) -> None:
        packet = decode(frame, OUTBOUND)
        words = registers(packet.clear)
        if function == SETTINGS:
            return self._learn(device, info(words), came)
        device.family = family(frame[10], device.serial)
        found, live = reading(device.family, words), device.live
        self.add("sems_mitm_rejected_values_total", live.take(found, came, self.clock), label("reason", "dip"))
        self.add("sems_mitm_rejected_values_total", found.not_finite, label("reason", "not_finite"))
        when = device_time(packet.time)
        if when:
            live.offset = (when - datetime.fromtimestamp(self.clock(came))).total_seconds()
        self.readings += 1
        self._learn(device, found.info, came)

    def _learn(self, device: Device, found: dict[str, str], now: float) -> None:
        """Remember what a device says of itself; all its series move when its model becomes known."""
        device.info.update((name, text) for name, text in found.items() if name in device.info)
        told = found.get("model", device.told)
        if told != device.told:
            self._unname(device)
            device.is_told(told)
            self._is_named(device, now)
        device.version += 1

    # A scrape

    def collect(self, now: float) -> list[dict[str, str]]:
        """Pages for `exposition`. Only what changed is copied under the lock, and nothing is rendered there."""
        changed, shown = [], []
        with self.lock:
            self.digest(now)
            for device in self.names.values():
                key = (device.version, self.is_stale(device.live.fresh, now))
                if device.page[0] != key:
                    changed.append((device, key, device.labels, device.samples(key[1])))
                shown.append((device, device.labels, device.good))
            samples = self._samples(now)
        for device, key, labels, own in changed:
            device.page = (key, page(labels, own))
        for _, labels, good in shown:
            samples["sems_mitm_device_up", labels] = int(not self.is_stale(good, now))
            samples["sems_mitm_device_last_packet_timestamp_seconds", labels] = round(wall_clock(good), 3)
        return [page("", {**samples, **process_samples()}), *(device.page[1] for device, _, _ in shown)]

    def _samples(self, now: float) -> dict[Series, float]:
        """What is no device's."""
        found: dict[Series, float] = {**self.totals, ("sems_mitm_stale_after_seconds", ""): self.stale_after}
        found["sems_mitm_suppressed_log_lines_total", ""] = self.troubles.suppressed
        for key, count in self.packets.items():
            found["sems_mitm_packets_total", ",".join(map(label, ("direction", "type", "verdict"), key))] = count
        asked = ((name, ask()) for name, ask in self.gauges.items())
        found.update(((name, ""), number) for name, number in asked if number is not None)
        if self.batsignal:
            edges = bat(datetime.fromtimestamp(self.clock(now)))
            found["batsignal_top", ""], found["batsignal_bottom", ""] = edges
        return found


# ----------------------------------------------------------------------------------------------------------- rules

FORWARD, LOCAL, SPOOL = "forward", "local", "spool"  # modes


def allowed(where: Address, clear: bytes, classes: set[int]) -> str:
    """What a frame from the portal is if it may pass to a device that has sent these classes: ack, nack, clock or ""."""
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
ZONE_RULE = f"{_NAME}{_OFFSET}(?:{_NAME}(?:{_OFFSET})?(?:{_DATE}{_DATE})?)?"  # POSIX, 8.3
ZONE_DIRECTORIES = (
    "/usr/share/zoneinfo",
    "/usr/lib/zoneinfo",
    "/usr/share/lib/zoneinfo",
    "/etc/zoneinfo",
    "/var/db/timezone/zoneinfo",
)


def zone_is_known(zone: str | None, exists: Callable[[str], bool]) -> bool:
    """Whether the TZ variable is one that the system understands; the C library takes any other for UTC, in silence."""
    if zone is None:
        return exists("/etc/localtime")  # a bare container has none, and its UTC is nobody's time
    if re.fullmatch(ZONE_RULE, zone):
        return True
    name = zone.lstrip(":")
    return bool(name) and any(exists(os.path.join(directory, name)) for directory in ZONE_DIRECTORIES)


class Outbox:
    """Bytes that wait for a peer, in order: whole frames, or stretches of a stream."""

    def __init__(self) -> None:
        self._parts: collections.deque[bytes] = collections.deque()
        self._offset = 0  # of the first, how much is sent already
        self.size = 0  # bytes that wait
        self.owed = 0  # bytes that were taken and want an answer: of a Spool alone

    @property
    def undelivered(self) -> int:
        """Bytes that wait to be sent or answered."""
        return self.size + self.owed

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes, about."""
        return self.size + OBJECT * len(self._parts)

    def put(self, data: bytes) -> None:
        """Let data wait behind all else."""
        if data:
            self._parts.append(data)
            self.size += len(data)

    def ready(self) -> bytes:
        """The next bytes to send: of one part, or of several small ones."""
        first = self._parts[0][self._offset :] if self._offset else self._parts[0]
        if len(self._parts) == 1 or len(first) >= RECV_SIZE:
            return first
        count, length = 1, len(first)
        while count < len(self._parts) and length < RECV_SIZE:
            length += len(self._parts[count])
            count += 1
        return b"".join([first, *itertools.islice(self._parts, 1, count)])

    def took(self, count: int) -> list[bytes]:
        """The peer took so many bytes; the parts that are sent whole by that."""
        sent, self.size, self._offset = [], self.size - count, self._offset + count
        while self._parts and self._offset >= len(self._parts[0]):
            sent.append(self._parts.popleft())
            self._offset -= len(sent[-1])
        return sent

    def drop_oldest(self) -> bytes:
        """Take out the first part, of which nothing may be sent yet."""
        part = self._parts.popleft()
        self.size -= len(part)
        return part

    def put_back(self, parts: list[bytes]) -> None:
        """Let parts that were sent wait again, before all else, and what is half sent from its first byte."""
        self.size += sum(map(len, parts)) + self._offset
        self._offset = 0
        self._parts.extendleft(reversed(parts))

    def take_all(self) -> tuple[bytes, int]:
        """Take out all that waits: the bytes from the start of the first part, and how many of them are sent already."""
        data, sent = b"".join(self._parts), self._offset
        self._parts.clear()
        self.size = self._offset = 0
        return data, sent

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._parts)


class Spool(Outbox):
    """A serial number's frames for the portal: an outbox that keeps what is sent until it is answered.

    An answer names no frame: it is for the oldest unanswered one of its type.
    """

    def __init__(self) -> None:
        super().__init__()
        # the two bytes of a type to what is sent and not answered, oldest first: its number in the order of sending, and it
        self._sent: dict[bytes, collections.deque[tuple[int, bytes]]] = collections.defaultdict(collections.deque)
        self._numbers = itertools.count()

    @property
    def weight(self) -> int:
        """Bytes of memory that it takes, about; what is sent has a number beside its place."""
        return super().weight + self.owed + 2 * OBJECT * sum(map(len, self._sent.values()))

    def __iter__(self) -> Iterator[bytes]:
        """All that is not delivered, in order."""
        return itertools.chain(self._unanswered(), super().__iter__())

    def _unanswered(self) -> list[bytes]:
        return [frame for _, frame in sorted(itertools.chain(*self._sent.values()))]

    def took(self, count: int) -> list[bytes]:
        """The portal took so many bytes: keep the frames that get an answer."""
        sent = super().took(count)
        for frame in sent:
            if frame[11] in DATA:
                self._sent[frame[10:12]].append((next(self._numbers), frame))
                self.owed += len(frame)
        return sent

    def answered(self, packet_type: bytes) -> bool:
        """An answer of this type came; whether a frame was waiting for it."""
        if not self._sent.get(packet_type):
            return False
        self.owed -= len(self._sent[packet_type].popleft()[1])
        return True

    def lost(self) -> None:
        """The connection is gone: what is not answered goes again on the next."""
        self.put_back(self._unanswered())
        self._sent.clear()
        self.owed = 0

    def postpone(self, frame: bytes) -> None:
        """Let a frame that the portal does not like go behind all others, if it is still the first."""
        if next(iter(self._parts), None) is frame:
            self.put(self.drop_oldest())


def good_frames(data: bytes, now: float, sent: int = 0) -> list[bytes]:
    """The good frames of a device in a stretch of its stream, without those that are sent whole in its first bytes."""
    found, end = [], 0
    for kind, piece in Framer(OUTBOUND).feed(data, now):
        end += len(piece)
        with contextlib.suppress(ProtocolError):
            if kind == FRAME and end > sent and address_of(piece, OUTBOUND):
                found.append(piece)
    return found


def draws_bat(where: Address) -> bool:
    """Whether frames of this address get the bat: live and buffered data of a HomeKit 1000."""
    return where.function in (LIVE, BUFFERED) and family(where.cls, where.serial) == "HK1000"


def may_draw_bat(rest: bytes) -> bool:
    """Whether an unfinished frame may turn out to be one that gets the bat."""
    cls, function = rest[10:11] or bytes([METER]), rest[11:12] or bytes([LIVE])
    serial = rest[LONG.serial : LONG.iv].decode("latin-1")
    fits = (
        OUTBOUND.prefix.startswith(rest[: len(OUTBOUND.prefix)]) and cls[0] == METER and function[0] in (LIVE, BUFFERED)
    )
    return fits and family(METER, serial) == "HK1000"


# ----------------------------------------------------------------------------------------------------------- files


def capture_line(wall: float, peer: str, direction: str, verdict: str, data: bytes) -> str:
    """A frame as a line of the capture file."""
    when = datetime.fromtimestamp(wall, timezone.utc).isoformat(timespec="milliseconds")
    return (
        json.dumps({"time": when, "peer": peer, "direction": direction, "verdict": verdict, "hex": data.hex()}) + "\n"
    )


APPENDING = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK


class Appender:
    """An open file to which lines are appended, several in one call; a last line that was torn is ended first."""

    def __init__(self, file: int) -> None:
        self.file = file
        self._torn = False
        with contextlib.suppress(OSError):  # not a regular file: nothing to look at
            end = os.lseek(file, 0, os.SEEK_END)
            self._torn = end > 0 and os.pread(file, 1, end - 1) != b"\n"

    def append(self, lines: list[str]) -> int:
        """Write lines; how many bytes they are. Raises OSError if the file does not take them all."""
        data = "".join(["\n" if self._torn else "", *lines]).encode()
        written = os.write(self.file, data)
        self._torn = data[written - 1 : written] != b"\n" if written else self._torn
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written


def count_file_error(store: Store, name: str, path: str, error: OSError, count: int, more: str = "") -> None:
    """Count lines that a file did not take, and say so once a minute."""
    with store.lock:
        store.add("sems_mitm_file_errors_total", count, label("file", name))
        text = f"cannot write --sems.{name}{'-file' if name == 'spool' else ''} {path}: {error.strerror}{more}"
        store.troubles.say(f"file {name}", text, time.monotonic())


class RecordFile:
    """A file of lines; what it does not take is counted, said once a minute, and nothing else."""

    def __init__(self, path: str, name: str, store: Store) -> None:
        self.path, self.name, self.store = path, name, store
        self._appender: Appender | None = None
        self._lines: list[str] = []  # of this round
        self.flush(is_rotated=True)

    def put(self, line: str) -> None:
        """Append a line at the end of the round."""
        self._lines.append(line)

    def flush(self, is_rotated: bool = False) -> None:
        """Write the lines of this round, to a file opened anew if another stands under the name now."""
        lines, self._lines = self._lines, []
        if not lines and not is_rotated:
            return
        try:
            if is_rotated and self._appender:
                old, self._appender = self._appender, None
                os.close(old.file)
            self._appender = self._appender or Appender(os.open(self.path, APPENDING, 0o640))
            if lines:
                self._appender.append(lines)
        except OSError as error:
            count_file_error(self.store, self.name, self.path, error, len(lines))


class Files:
    """Where frames are recorded: all of them in the capture, buffered readings in the backfill file."""

    def __init__(self, store: Store, capture: str = "", backfill: str = "") -> None:
        self.capture = RecordFile(capture, "capture", store) if capture else None
        self.backfill = RecordFile(backfill, "backfill", store) if backfill else None
        self.open = [file for file in (self.capture, self.backfill) if file]
        self.are_rotated = False  # others stand under the names now

    def record(self, peer: str, wire: Wire, kind: str, verdict: str, data: bytes) -> None:
        """Record a piece of a stream; kind is its type, or what else it is."""
        if not self.open:
            return
        line = capture_line(time.time(), peer, wire.name, verdict, data)
        if self.capture:
            self.capture.put(line)
        if self.backfill and wire is OUTBOUND and kind.endswith(f"{BUFFERED:02x}"):
            self.backfill.put(line)

    def flush(self) -> None:
        """At the end of a round: open anew what was rotated, write what was recorded."""
        are_rotated, self.are_rotated = self.are_rotated, False
        for file in self.open:
            file.flush(are_rotated)


def synced(file: int) -> None:
    """Have the disk itself take what was written to a file. Raises OSError."""
    if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: its fsync stops at the disk's own cache
        fcntl.fcntl(file, fcntl.F_FULLFSYNC)
    else:
        os.fdatasync(file)


class Journal:
    """What the spools have not delivered, on the disk: a capture file that is a spool's memory after a power cut.

    A frame is put, and is on the disk after `commit`; whoever acknowledges it must do so later. Nothing marks a frame as
    delivered: the file is emptied when all are, and now and then it is written anew with those that are not.
    """

    def __init__(self, path: str, store: Store) -> None:
        """Raises StartError if the file cannot be had, or another process has it."""
        self.path, self.store = os.path.realpath(path), store  # a link leads to the disk that was chosen
        self.undelivered: Callable[[], Iterable[bytes]] = tuple  # asked when the file is written anew
        self._lines: list[str] = []  # of this round
        self._broken = False  # a write failed: frames are in memory alone until the file is written anew
        self._next = 0.0  # when that may be tried again
        try:
            self._appender = Appender(self._locked())
            self.size = os.fstat(self._appender.file).st_size
        except OSError as error:
            raise StartError(f"--sems.spool-file={path}: {error.strerror}") from None

    def _locked(self) -> int:
        """The file, opened and locked, so that no other process writes it. Raises OSError."""
        while True:
            file = os.open(self.path, APPENDING, 0o600)
            try:
                if not stat.S_ISREG(os.fstat(file).st_mode):
                    raise OSError(errno.EINVAL, "not a regular file")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file), os.stat(self.path)):  # else it was written anew meanwhile
                    return file
            except BlockingIOError:
                os.close(file)
                raise OSError(errno.EBUSY, "another process has it") from None
            except OSError:
                os.close(file)
                raise
            os.close(file)

    def load(self) -> list[bytes]:
        """The good frames in the file, in order. A line that holds none is passed over and counted."""
        found, bad = [], 0
        with open(self.path, "rb") as file:
            for line in iter(lambda: file.readline(JOURNAL_LONGEST), b""):
                try:
                    frames = good_frames(bytes.fromhex(json.loads(line)["hex"]), 0.0)
                except (ValueError, TypeError, KeyError, RecursionError):
                    frames = []
                bad += not frames
                found += frames
        if bad:
            with self.store.lock:
                self.store.add("sems_mitm_file_errors_total", bad, label("file", "spool"))
            log.warning("%d lines of --sems.spool-file %s hold no frame", bad, self.path)
        return found

    def put(self, peer: str, frame: bytes) -> None:
        """Append a frame with the next `commit`."""
        self._lines.append(capture_line(time.time(), peer, OUTBOUND.name, "answered", frame))

    def commit(self) -> None:
        """Have all frames of this round on the disk."""
        lines, self._lines = self._lines, []
        if not lines or self._broken:  # then the spools have them, and so will the file when it is written anew
            return
        try:
            self.size += self._appender.append(lines)
            synced(self._appender.file)
        except OSError as error:
            self._broken = True
            self._failed(error)

    def empty(self) -> None:
        """Nothing is undelivered."""
        if self.size and not self._broken:
            try:
                os.ftruncate(self._appender.file, 0)
                self._appender, self.size = Appender(self._appender.file), 0
            except OSError as error:
                self._broken = True
                self._failed(error)

    def tend(self, now: float) -> None:
        """Write the file anew if it is time to; once a second."""
        if now < self._next:
            return
        try:
            if not self._is_in_place():
                old, self._appender, self._broken = self._appender, Appender(self._locked()), True
                os.close(old.file)
            elif os.fstat(self._appender.file).st_size != self.size:  # somebody has cut it
                self._broken = True
        except OSError as error:
            self._broken = True
            return self._failed(error)
        has_grown = self.size > JOURNAL_MIN and self.size > JOURNAL_GROWTH * sum(
            2 * len(frame) + JOURNAL_LINE for frame in self.undelivered()
        )
        if self._broken or has_grown:
            self.rewrite()

    def _is_in_place(self) -> bool:
        """Whether the file still stands under its name. Raises OSError."""
        try:
            return os.path.samestat(os.fstat(self._appender.file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def rewrite(self) -> None:
        """Write the file anew, beside itself, with what is undelivered."""
        new = f"{self.path}.new"
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            file = os.open(new, APPENDING | os.O_EXCL, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with open(file, "wb", closefd=False) as buffered:
                    for frame in self.undelivered():
                        line = capture_line(time.time(), "spool", OUTBOUND.name, "answered", frame)
                        buffered.write(line.encode())
                synced(file)
                os.rename(new, self.path)
            except OSError:
                os.close(file)
                os.unlink(new)
                raise
            old, self._appender = self._appender, Appender(file)
            self.size, self._broken = os.fstat(file).st_size, False
            os.close(old.file)
            self._sync_directory()
        except OSError as error:
            self._failed(error)

    def _sync_directory(self) -> None:
        directory = os.open(os.path.dirname(os.path.abspath(self.path)), os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def _failed(self, error: OSError) -> None:
        self._next = time.monotonic() + JOURNAL_RETRY
        count_file_error(self.store, "spool", self.path, error, 1, "; the spool is in memory meanwhile")

    def close(self) -> None:
        """Let another process have the file."""
        os.close(self._appender.file)


# ------------------------------------------------------------------------------------------------- network: names

Endpoint = collections.namedtuple("Endpoint", "family sockaddr")


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


def is_literal(host: str) -> bool:
    """Whether a host is an address, or the one name that every system knows."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host.partition("%")[0]))
    return host.lower() == "localhost"


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


def dns_answer(data: bytes, query: bytes) -> list[str] | None:
    """The IPv4 addresses in the answer to a query, [] if the name does not exist, None if it tells nothing.

    Raises ProtocolError for what is no answer to this query: another's, forged, cut.
    """
    if (
        data[:2] != query[:2]
        or len(data) < 12
        or not data[2] & 0x80
        or data[12 : len(query)].lower() != query[12:].lower()
    ):
        raise ProtocolError("not the answer to the question", data)
    if data[3] & 0x0F:
        return [] if data[3] & 0x0F == 3 else None
    found, pos = [], len(query)
    try:
        for _ in range(struct.unpack_from(">H", data, 6)[0]):
            pos = _dns_name_end(data, pos) + 10
            kind, cls, _, size = struct.unpack_from(">HHIH", data, pos - 10)
            if kind == 1 and cls == 1 and size == 4:
                found.append(socket.inet_ntoa(data[pos : pos + 4]))
            pos += size
    except (struct.error, IndexError, OSError):
        if not found:
            raise ProtocolError("a record runs past the end", data) from None
    return found or None


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
    except (OSError, ValueError):  # the system's resolver has its own ideas of what a name is
        return []
    return [Endpoint(family, sockaddr) for family, _, _, _, sockaddr in found]


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
        mend = "name a server there that knows its real address, or give that as --sems.upstream"
        raise Unresolved("loop", f"{host} is overridden at --sems.upstream-dns too: {mend}")
    why = (
        f" that can be used: here it is {system[0].sockaddr[0]}, and --sems.upstream-dns does not help"
        if system
        else ""
    )
    raise Unresolved("dns", f"{host} has no address{why}")


# ----------------------------------------------------------------------------------------------- network: sockets


def tuned(sock: socket.socket, idle: int, interval: int, patience: float = 0) -> socket.socket:
    """A stream socket that does not block, does not wait for more to send, and notices a peer that is gone.

    idle, interval: s of silence before keep-alives, and between them; patience: s that what is sent may stay unacknowledged.
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


# What the selector holds: ready(events, now) is called when a socket is, on behalf of an owner (a mode, or None).
Handler = collections.namedtuple("Handler", "ready owner")


class Connection:
    """A socket that does not block, with what waits for its peer; once closed, it does nothing.

    on_data(data, now) is told what came, on_end(error or None, now) that no more will. Both only put; `flush` sends.
    """

    def __init__(
        self, selector: selectors.BaseSelector, sock: socket.socket, outbox: Outbox, handler: Handler,
        on_data: Callable[[bytes, float], None], on_end: Callable[[OSError | None, float], None],
    ) -> None:  # fmt: skip
        self._selector, self.sock, self.outbox, self._handler = selector, sock, outbox, handler
        self.on_data, self.on_end = on_data, on_end
        self.is_open = True
        self._events = 0  # that the selector waits for
        self._room = 0  # how many bytes may come at once
        self._progress: float | None = None  # since when bytes wait for the peer, or when it last took some

    @property
    def backlog(self) -> int:
        """Bytes that wait for the peer."""
        return self.outbox.size if self.is_open else 0

    def watch(self, room: int, writing: bool = False) -> None:
        """Wait for the peer to speak, if there is room for so many bytes, and to take what waits (or, writing, to connect)."""
        self._room = min(room, RECV_SIZE)
        wants_write = writing or self.backlog > 0
        events = (selectors.EVENT_READ if room > 0 else 0) | (selectors.EVENT_WRITE if wants_write else 0)
        if events == self._events or not self.is_open:
            return
        if not events:
            self._selector.unregister(self.sock)
        elif self._events:
            self._selector.modify(self.sock, events, self._handler)
        else:
            self._selector.register(self.sock, events, self._handler)
        self._events = events

    def receive(self, now: float) -> bool:
        """Read once, if there is room, and tell what came; whether more may have."""
        if self._room <= 0:  # paused in the very round that found it ready
            return False
        try:
            data = self.sock.recv(self._room)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            self.on_end(error, now)
            return False
        if not data:
            self.on_end(None, now)
            return False
        self.on_data(data, now)
        return True

    def push(self, now: float) -> OSError | None:
        """Send what the peer takes; the error if it is gone. Tells no handler."""
        gone = None
        try:
            while self.backlog:
                data = self.outbox.ready()
                count = self.sock.send(data)
                self.outbox.took(count)
                self._progress = now
                if count < len(data):
                    break
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            gone = error
        self._progress = (self._progress or now) if self.backlog else None
        return gone

    def flush(self, now: float) -> None:
        """Send what the peer takes. If it is gone: what it still gave, then `on_end`."""
        error = self.push(now)
        if error:
            self._room = RECV_SIZE
            while self.is_open and self.receive(now):
                pass
            if self.is_open:
                self.on_end(error, now)

    def is_stalled(self, now: float) -> bool:
        """Whether the peer has taken nothing of what waits for it for too long."""
        return self._progress is not None and now - self._progress >= STALL

    def close(self) -> None:
        """Close the socket, and wait for it no more."""
        if self.is_open:
            if self._events:
                self._selector.unregister(self.sock)
            self.is_open = False
            self.sock.close()


# --------------------------------------------------------------------------------- network: the way to the portal


def reason_of(error: OSError) -> str:
    """The label of the failures counter for an error of connect."""
    told = {errno.ECONNREFUSED: "refused", errno.ETIMEDOUT: "timeout"}.get(error.errno or 0, "other")
    return getattr(error, "reason", told)


class Upstream:
    """The portal, as all lines to it see it: its name and addresses, whether it is there, our ends of the connections to it."""

    def __init__(
        self, settings: argparse.Namespace, store: Store, selector: selectors.BaseSelector, later: Callable[..., None]
    ) -> None:
        """later(work, owner): have the loop call work(now) on behalf of an owner or None; from any thread."""
        self.settings, self.store, self.selector, self._later = settings, store, selector, later
        self.up: int | None = None  # whether the last attempt of any line succeeded
        self.lines: set[Line] = set()  # that have a connection, standing or under way
        self.own_addresses: set[tuple[str, int]] = set()  # where this exporter listens
        self._waiting: dict[Line, None] = {}  # for the look-up that is under way
        self._asked = -math.inf  # when it began

    def look_up(self, line: Line, now: float) -> None:
        """Have the line's on_addresses called with the portal's addresses, or with Unresolved. One look-up serves all that wait."""
        host, port = self.settings.upstream
        with contextlib.suppress(ValueError):
            family = socket.AF_INET6 if ipaddress.ip_address(host.partition("%")[0]).version == 6 else socket.AF_INET
            return line.on_addresses([Endpoint(family, (host, port))], now)
        is_under_way = bool(self._waiting) and now - self._asked < STUCK
        self._waiting[line] = None
        if not is_under_way:
            self._asked = now
            try:
                threading.Thread(target=self._resolve, name="resolver", daemon=True).start()
            except RuntimeError:  # no thread to be had
                self._found(Unresolved("dns", "there is no thread for the look-up"))

    def _resolve(self) -> None:
        """In a thread of its own: a look-up may take long."""
        found: list[Endpoint] | Unresolved
        try:
            host, port = self.settings.upstream
            found = resolve(host, port, self.settings.upstream_dns)
        except Unresolved as error:
            found = error
        except Exception:
            with self.store.lock:
                self.store.broke("a look-up's result")
            found = Unresolved("other", "the look-up failed")
        self._later(lambda now: self._found(found), None)

    def _found(self, found: list[Endpoint] | Unresolved) -> None:
        """Tell all that wait, each as an event of its own."""
        waiting, self._waiting = self._waiting, {}
        for line in waiting:
            self._later(functools.partial(line.on_addresses, found), line.owner)

    def is_own(self, endpoint: Endpoint) -> bool:
        """Whether an address is one where this exporter listens."""
        host, port = plain(endpoint.sockaddr[0]), endpoint.sockaddr[1]
        return any((own, port) in self.own_addresses for own in ("0.0.0.0", "::", host)) and is_this_machine(host)

    def suspects(self, peer: str, now: float) -> list[Line]:
        """The lines that a connection from a peer may be the far end of: it says so, or NAT may hide it and they began just now.

        What the connection says then decides: a device on this machine may have the port of one of our ends by chance.
        """
        lines = (line for line in self.lines if line.up and line.may_come_back)
        return [line for line in lines if line.own_end == peer or now - line.began <= LOOP_WINDOW]

    def came(self, now: float) -> None:
        """A connection stands."""
        if not self.up:
            text = f"the portal is there: {self.settings.upstream_text}"
            self.store.troubles.say("portal there", text, now, level=logging.INFO)
        self.up = 1

    def failed(self, reason: str, text: str, now: float) -> None:
        """An attempt failed."""
        self.up = 0
        self.store.add("sems_mitm_upstream_connect_failures_total", 1, label("reason", reason))
        where = f"cannot reach the portal {self.settings.upstream_text}: {text}"
        self.store.troubles.say(f"portal {reason}", where, now)


class Line:
    """The way of one relay or courier to the portal: an attempt, a connection, the back-off until the next.

    Its owner has `on_portal`, `on_portal_up`, `on_portal_down`, `has_ended`, and an outbox that outlives connections.
    """

    def __init__(self, upstream: Upstream, owner: Relay | Courier, outbox: Outbox, inward: Inward) -> None:
        self.upstream, self.owner, self.outbox, self.inward = upstream, owner, outbox, inward
        self.connection: Connection | None = None
        self.up = False  # it stands
        self.since = 0.0  # when it did, or its attempt began
        self.own_end = ""  # our HOST:PORT of it
        self.opening, self.began = b"", -math.inf  # the first bytes sent on it, and when
        self.may_come_back = True  # they may: a device that repeats itself is taken for a loop once
        self.sent = False  # something was ever sent
        self.trying = False  # an attempt is under way: a look-up, or a connection that does not stand yet
        self._addresses: list[Endpoint] = []  # still to be tried in it
        self._patience = 0.0  # s for each
        self._backoff: float = BACKOFF[0]
        self._retry = 0.0  # when the next attempt may begin

    def reach(self, now: float) -> None:
        """Begin an attempt, unless there is one, or a connection, or its time has not come."""
        if not self.trying and not self.connection and now >= self._retry:
            self.trying, self.since = True, now
            self.upstream.look_up(self, now)

    def on_addresses(self, found: list[Endpoint] | Unresolved, now: float) -> None:
        """The look-up has an answer."""
        if not self.trying or self.connection:  # nobody waits for it any more
            return
        if isinstance(found, Unresolved):
            return self.failed(found.reason, str(found), now)
        self._addresses = list(found[:ADDRESSES])
        self._patience = CONNECT_TIMEOUT / len(self._addresses)
        self._try_next("other", "no address", now)

    def _try_next(self, reason: str, text: str, now: float) -> None:
        """Connect to the next address; after the last, the attempt has failed for the reason given."""
        self._disconnect()
        while self._addresses:
            endpoint, self.since = self._addresses.pop(0), now
            try:
                return self._connect(endpoint)
            except OSError as error:
                self._disconnect()
                reason, text = reason_of(error), error.strerror or str(error)
        self.failed(reason, text, now)

    def _connect(self, endpoint: Endpoint) -> None:
        """Begin to connect. Raises OSError."""
        if self.upstream.is_own(endpoint):
            where = endpoint_text(endpoint.sockaddr)
            raise Unresolved(
                "loop", f"its address {where} is this exporter's own: check --sems.upstream and --sems.upstream-dns"
            )
        sock = socket.socket(endpoint.family, socket.SOCK_STREAM)
        handler = Handler(self._on_ready, self.owner)
        self.connection = Connection(self.upstream.selector, sock, self.outbox, handler, self._on_data, self._on_end)
        self.upstream.lines.add(self)
        tuned(sock, 20, 10, STALL)
        code = sock.connect_ex(endpoint.sockaddr)
        if code not in (0, errno.EINPROGRESS):
            raise OSError(code, os.strerror(code))
        self.own_end = endpoint_text(sock.getsockname())
        self.connection.watch(0, writing=True)

    def _on_ready(self, events: int, now: float) -> None:
        assert self.connection
        if self.trying:
            code = self.connection.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                return self._try_next(reason_of(OSError(code, "")), os.strerror(code), now)
            self.trying, self.up, self.since, self.opening, self.may_come_back = False, True, now, b"", True
            self.upstream.came(now)
            self.owner.on_portal_up(now)
        elif events & selectors.EVENT_READ:
            self.connection.receive(now)

    def _on_data(self, data: bytes, now: float) -> None:
        self._backoff = BACKOFF[0]  # it is the portal, and well: the next attempt need not wait long
        self.owner.on_portal(self.inward.feed(data, now), now)

    def push(self, now: float) -> None:
        """Send what the portal takes, if it is there; a trouble is left to `flush`."""
        if self.connection and self.up and self.outbox.size:
            self.sent = True
            self.began = self.began if self.opening else now
            if len(self.opening) < OPENING:
                self.opening += self.outbox.ready()[: OPENING - len(self.opening)]
            self.connection.push(now)

    def flush(self, now: float) -> None:
        """Send what the portal takes; if it is gone, that ends the connection."""
        self.push(now)
        if self.connection and self.up and self.outbox.size:
            self.connection.flush(now)

    def watch(self, room: int) -> None:
        """Wait for the portal: that it connects, speaks if there is room for so many bytes, takes what waits."""
        if self.connection:
            self.connection.watch(room if self.up else 0, writing=self.trying)

    def look(self, now: float) -> None:
        """See to deadlines: an unfinished frame, an attempt that takes too long, a portal that takes nothing."""
        self.owner.on_portal(self.inward.expired(now), now)
        if self.connection and self.trying and now - self.since >= self._patience:
            self._try_next("timeout", f"no answer for {self._patience:.0f} s", now)
        elif self.trying and not self.connection and now - self.since >= CONNECT_TIMEOUT:
            self.failed("dns", f"the name services have not answered for {CONNECT_TIMEOUT} s", now)
        elif self.connection and self.up and self.connection.is_stalled(now):
            self._on_end(TimeoutError(errno.ETIMEDOUT, "it takes nothing"), now)

    def _on_end(self, error: OSError | None, now: float) -> None:
        """The connection is gone."""
        if error:
            self.upstream.up = 0
        self.ended(now)

    def failed(self, reason: str, text: str, now: float) -> None:
        """The attempt has failed."""
        self.upstream.failed(reason, text, now)
        self.ended(now)

    def ended(self, now: float) -> None:
        """An attempt or a connection has ended: the next waits for the back-off."""
        self.drop(now)
        self.owner.on_portal(self.inward.closed(now), now)
        self.owner.on_portal_down(now)

    def drop(self, now: float) -> None:
        """Have no connection, and no attempt before the back-off is over."""
        self._retry = now + self._backoff * random.uniform(0.7, 1)
        self._backoff = min(2 * self._backoff, BACKOFF[1])
        self._disconnect()
        self.trying = False

    def _disconnect(self) -> None:
        if self.connection:
            self.connection.close()
        self.upstream.lines.discard(self)
        self.connection, self.up, self.own_end = None, False, ""


# ----------------------------------------------------------------------------------------------------------- modes
#
# Three small things, each with its sockets and told by the loop what came:
#
#     Relay      forward: a device's connection and its portal connection, a pipe with a filter
#     Answerer   local, spool: a device's connection that the exporter answers; in spool it hands good frames to a courier
#     Courier    spool: what a serial number has for the portal, and its portal connection; it knows no device's connection
#
# A handler only puts. At the end of a round the loop has the journal on the disk, then calls `end_round` of each that was
# touched; `look` once a second. `close` ends it at once and feeds nothing to a handler again, so it may follow a fault of our own.


# What a reader makes of a piece: (kind, bytes, address of a good frame or None; inward also its meaning); kind is its type.
Taken = tuple


class Stream:
    """What comes on a connection, as pieces that are recognised. classes: those that the device has sent."""

    recognised: Callable[[list[Piece], float], list[Taken]]  # by direction

    def __init__(self, wire: Wire, loop: Loop, peer: str, classes: set[int]) -> None:
        self.wire, self.loop, self.peer, self.classes = wire, loop, peer, classes
        self.framer = Framer(wire)

    def feed(self, data: bytes, now: float) -> list[Taken]:
        """What data completes."""
        self.loop.store.add("sems_mitm_bytes_total", len(data), f'direction="{self.wire.name}"')
        return self.recognised(self.framer.feed(data, now), now)

    def expired(self, now: float) -> list[Taken]:
        """What a frame was that is unfinished for too long."""
        return self.recognised(self.framer.expire(now), now) if self.framer.rest else []

    def closed(self, now: float) -> list[Taken]:
        """What is left when the stream has ended; the next begins anew."""
        pieces, self.framer = self.framer.close(), Framer(self.wire)
        return self.recognised(pieces, now)

    def decide(self, kind: str, verdict: str, piece: bytes) -> None:
        """Count and record a piece whose fate is decided."""
        if kind:
            self.loop.store.count(self.wire, kind, verdict, len(piece) // 2 if kind == KEEPALIVE else 1)
        self.loop.files.record(self.peer, self.wire, kind, verdict, piece)


class Outward(Stream):
    """The reader of a device's connection: the store meets its good frames."""

    def recognised(self, pieces: list[Piece], now: float) -> list[Taken]:
        """Pieces with their addresses."""
        store, found = self.loop.store, []
        for kind, piece in pieces:
            where = None
            if kind == FRAME:
                if len(piece) > 13 and piece[11] not in FUNCTIONS:  # in 13 bytes the CRC stands there
                    store.add("outbound_unknown_packets_total")
                try:
                    where = address_of(piece, OUTBOUND)
                    kind = where.type
                except ProtocolError:
                    kind = MALFORMED
            if where:
                self.classes.add(where.cls)
                store.meet(where, piece, now)
            found.append((kind, piece, where))
        return found


class Inward(Stream):
    """The reader of a portal's connection: a piece has the meaning of `allowed`, or keepalive; without one it may not pass."""

    def recognised(self, pieces: list[Piece], now: float) -> list[Taken]:
        """Pieces with addresses and meanings."""
        return [self._read(kind, piece, now) for kind, piece in pieces]

    def _read(self, kind: str, piece: bytes, now: float) -> Taken:
        store, where, meaning = self.loop.store, None, KEEPALIVE if kind == KEEPALIVE else ""
        if kind == FRAME:
            try:
                where = address_of(piece, INBOUND)
                kind, meaning = where.type, allowed(where, decode(piece, INBOUND).clear, self.classes)
            except ProtocolError:
                kind = MALFORMED
            if not meaning:
                store.add("inbound_unknown_packets_total")
        if not meaning:
            what = f"blocked what the portal sent to {self.peer}, type {kind or JUNK}: {piece[:LOG_HEX].hex()}"
            store.troubles.say("blocked", what, now)
        if where and meaning == "nack":
            store.answered(where.owner, NACKS)
            text = f"the portal did not accept a packet of {where.serial} (NACK), type {where.type}"
            store.troubles.say("nack", text, now)
        return kind, piece, where, meaning


class DeviceEnd:
    """A device's connection, and its life: it may fall silent, take nothing, send its end and still read.

    Its owner's `on_bytes(data, now)` is told what came, then its `on_device(pieces, data, now)` the pieces that it completes.
    """

    def __init__(self, loop: Loop, sock: socket.socket, peer: str, now: float, owner: Relay | Answerer) -> None:
        handler = Handler(self._on_ready, owner)
        self.connection = Connection(loop.selector, sock, Outbox(), handler, self._on_data, self._on_end)
        self.outward = Outward(OUTBOUND, loop, peer, set())
        self.ended = False  # it sends no more
        self.suspects: list[Line] | None = None  # lines that it may be the far end of: they began as it does so far
        self._opening = b""
        self._owner, self._heard = owner, now

    def _on_ready(self, events: int, now: float) -> None:
        if events & selectors.EVENT_READ:
            self._heard = now
            self.connection.receive(now)

    def _on_data(self, data: bytes, now: float) -> None:
        if self._is_loop(data, now):
            self.outward.loop.door.refuse("loop", self.outward.peer, now)
            return self._owner.close()
        self._owner.on_bytes(data, now)
        self._owner.on_device(self.outward.feed(data, now), data, now)

    def _is_loop(self, data: bytes, now: float) -> bool:
        """Whether this is a connection of ours to the portal, come back: from its first byte it says the same."""
        if self.suspects is None:
            self.suspects = self.outward.loop.upstream.suspects(self.outward.peer, now)
        if not self.suspects:
            return False
        self._opening += data[: OPENING - len(self._opening)]
        same = [line for line in self.suspects if line.opening.startswith(self._opening)]
        self.suspects = [line for line in same if line.up and not line.owner.has_ended]
        if not self.suspects or len(self._opening) < OPENING:
            return False
        self.suspects[0].may_come_back = False
        return True

    def _on_end(self, error: OSError | None, now: float) -> None:
        if error:
            self.connection.close()
        if not self.ended:
            self.ended = True
            self._owner.on_device(self.outward.closed(now), b"", now)

    def watch(self, room: int) -> None:
        """Wait for the device: that it speaks if there is room for so many bytes, takes what waits."""
        self.connection.watch(0 if self.ended else room)

    def look(self, now: float) -> None:
        """See to deadlines: an unfinished frame; a device that is silent or takes nothing is gone."""
        is_held_long = now - self._heard >= PATIENCE[OUTBOUND.name]
        self.suspects = [] if is_held_long else self.suspects and [line for line in self.suspects if line.up]
        if self.outward.framer.rest:
            self._owner.on_device(self.outward.expired(now), b"", now)
        if self.connection.is_open and (now - self._heard >= SILENCE or self.connection.is_stalled(now)):
            self._on_end(TimeoutError(), now)


class Relay:
    """Mode forward: a device's connection and its portal connection, a pipe with a filter.

    While the portal is there, and while the first attempt to reach it is under way, bytes go (or wait) as they came; else
    only whole good frames wait.
    """

    def __init__(self, loop: Loop, sock: socket.socket, peer: str, now: float) -> None:
        self.loop = loop
        self.device = DeviceEnd(loop, sock, peer, now, self)
        self.outbox = Outbox()  # for the portal
        self.line = Line(loop.upstream, self, self.outbox, Inward(INBOUND, loop, peer, self.device.outward.classes))
        self._bat = loop.store.batsignal
        self._piping = True
        self._ahead = 0  # with the bat: how much of the unfinished frame is in the outbox already
        self._deadline: float | None = None  # when all ends, after the device's last byte
        self._half_closed = False  # the portal is told of the end

    @property
    def has_ended(self) -> bool:
        """Whether the device sends no more."""
        return self.device.ended

    @property
    def weight(self) -> int:
        """Bytes of memory that wait."""
        return self.outbox.weight + self.device.connection.outbox.weight

    @property
    def _is_pure(self) -> bool:
        """Whether bytes go (or wait) as they came."""
        return self._piping and not self._bat

    def on_bytes(self, data: bytes, now: float) -> None:
        """Pass bytes on as they came, and before they are looked at: that is what a packet is held up by."""
        if self._is_pure:
            self.outbox.put(data)
            self.line.push(now)

    def on_device(self, pieces: list[Taken], data: bytes, now: float) -> None:
        """Decide what becomes of what the device sent; a pipe without the bat has passed on its bytes."""
        for kind, piece, where in pieces:
            self.device.outward.decide(kind, "forwarded" if self._is_pure else self._queued(piece, where), piece)
        self._pass_rest(now)
        if data and not self.device.suspects:  # else it may be a loop, and another connection would be its next turn
            self.line.reach(now)

    def _queued(self, piece: bytes, where: Address | None) -> str:
        """Let a piece wait where bytes do not just pass, the portal is away or there is the bat; its verdict."""
        drawn = with_bat(piece) if self._bat and where and draws_bat(where) and not self._ahead else None
        if self._piping:
            self.outbox.put((drawn or piece)[self._ahead :])
            self._ahead = max(self._ahead - len(piece), 0)
        elif where:
            self.outbox.put(drawn or piece)
            self._shed(self.outbox.size - QUEUE)
        return "rewritten" if drawn else "forwarded" if self._piping or where else "dropped"

    def _pass_rest(self, now: float) -> None:
        """With the bat: pass on an unfinished frame that does not wait for it."""
        framer = self.device.outward.framer
        if not (self._piping and self._bat and framer.rest):
            return
        if self._ahead or now - framer.since >= HOLD or not may_draw_bat(framer.rest):
            self.outbox.put(framer.rest[self._ahead :])
            self._ahead = len(framer.rest)

    def on_portal(self, pieces: list[Taken], now: float) -> None:
        """Let through what has a meaning."""
        for kind, piece, where, meaning in pieces:
            passes = meaning and self.device.connection.is_open
            if passes:
                self.device.connection.outbox.put(piece)
            if meaning == "ack":
                self.loop.store.answered(where.owner, ACKS)
            self.line.inward.decide(kind, "forwarded" if passes else "dropped", piece)

    def on_portal_up(self, now: float) -> None:
        """The portal is there: first what waited, then what comes."""
        if not self._piping:
            self._piping = True
            self._pass_rest(now)
            if not self._bat:
                self.outbox.put(self.device.outward.framer.rest)
        self._deadline = None

    def on_portal_down(self, now: float) -> None:
        """An attempt failed, or the connection is gone: from now on only whole good frames wait."""
        if self._piping:
            data, sent = self.outbox.take_all()
            for frame in good_frames(data, now, sent):
                self.outbox.put(frame)
            self._piping, self._ahead = False, 0
        self._shed(self.outbox.size - QUEUE)

    def _shed(self, excess: int) -> None:
        """Drop the oldest frames, so many bytes of them."""
        while excess > 0 and self.outbox.size:
            excess -= len(self.outbox.drop_oldest())
            self.loop.store.add("sems_mitm_queue_dropped_packets_total")

    def lighten(self, excess: int, now: float) -> None:
        """All queues together are too heavy, and this one is the heaviest: drop its oldest frames."""
        if self.device.connection.outbox.weight > self.outbox.weight:
            return self.close()
        if self._piping:  # the portal takes nothing; what is sent of a frame cannot be taken back
            self.line.ended(now)
        self._shed(min(excess, self.outbox.size))

    def end_round(self, now: float) -> None:
        """Send what waits, both ways; wait for what may come next, or end."""
        self.line.flush(now)
        self.device.connection.flush(now)
        if self.device.ended and self._is_done(now):
            return self.close()
        limit = BACKLOG if self.line.up else FIRST_ATTEMPT if self._piping else 2 * QUEUE
        self.device.watch(limit - self.outbox.size)
        self.line.watch(BACKLOG - self.device.connection.backlog)

    def _is_done(self, now: float) -> bool:
        """Whether nothing is left to do for a device that sends no more; sees to the next step if something is."""
        if not self.line.up:
            self._deadline = self._deadline or now + LAST_ATTEMPT
            return not self.line.trying
        if self.outbox.size or self._half_closed:
            return False
        if not self.line.sent:
            return True
        assert self.line.connection
        self._half_closed, self._deadline = True, now + LINGER
        with contextlib.suppress(OSError):
            self.line.connection.sock.shutdown(socket.SHUT_WR)
        return False

    def look(self, now: float) -> None:
        """See to deadlines."""
        if self._deadline is not None and now >= self._deadline:
            return self.close()
        self.device.look(now)
        self.line.look(now)
        if self.line.since or self.outbox.size and not self.device.suspects:  # the device has sent something
            self.line.reach(now)

    def close(self) -> None:
        """Close both sockets, and be forgotten."""
        self.device.connection.close()
        self.line.drop(time.monotonic())
        self.loop.forget(self)


class Answerer:
    """Modes local and spool: a device's connection that the exporter answers."""

    def __init__(self, loop: Loop, sock: socket.socket, peer: str, now: float) -> None:
        self.loop = loop
        self.device = DeviceEnd(loop, sock, peer, now, self)

    @property
    def weight(self) -> int:
        """Bytes of memory that wait."""
        return self.device.connection.outbox.weight

    def on_bytes(self, data: bytes, now: float) -> None:
        """Nothing is passed on as it came."""

    def on_device(self, pieces: list[Taken], data: bytes, now: float) -> None:
        """Answer good frames, in mode spool those that are kept."""
        local = datetime.fromtimestamp(self.loop.store.clock(now))
        for kind, piece, where in pieces:
            verdict = "dropped"
            if where and self._is_kept(piece, where, now):
                clock = where.function == SETTINGS and self.loop.clock_ok(now)
                reply = answer(where, local, clock)
                if reply:
                    self.device.connection.outbox.put(reply)
                    self.loop.store.answered(where.owner, ACKS)
                    verdict = "answered"
                elif self.loop.settings.mode == SPOOL:
                    verdict = "forwarded"
            self.device.outward.decide(kind, verdict, piece)

    def _is_kept(self, frame: bytes, where: Address, now: float) -> bool:
        """Whether a good frame may be answered: in mode spool if it is kept for the portal."""
        if self.loop.settings.mode == LOCAL:
            return True
        if self.loop.depot.take(frame, where, now):
            return True
        text = f"the spool has no room for a packet of {where.serial}: it is not acknowledged, and stays the device's"
        self.loop.store.troubles.say("spool full", text, now)
        return False

    def lighten(self, excess: int, now: float) -> None:
        """All queues together are too heavy: this device takes none of its answers."""
        self.close()

    def end_round(self, now: float) -> None:
        """Send what waits; wait for what may come next, or end."""
        self.device.connection.flush(now)
        if self.device.ended and not self.device.connection.backlog:
            return self.close()
        self.device.watch(FIRST_ATTEMPT - self.weight)

    def look(self, now: float) -> None:
        """See to deadlines."""
        self.device.look(now)

    def close(self) -> None:
        """Close the socket, and be forgotten."""
        self.device.connection.close()
        self.loop.forget(self)


class Courier:
    """Mode spool: what a serial number has for the portal, and the portal connection that delivers it."""

    has_ended = False

    def __init__(self, loop: Loop, serial: str, now: float) -> None:
        self.loop, self.serial = loop, serial
        self.spool = Spool()
        self.line = Line(loop.upstream, self, self.spool, Inward(INBOUND, loop, serial, set()))
        self.heard = now  # when its device's last frame came
        self._since = now  # when the portal last answered, or was first sent what it owes an answer to

    @property
    def weight(self) -> int:
        """Bytes of memory that wait."""
        return self.spool.weight

    def keep(self, frame: bytes, where: Address) -> None:
        """Keep a frame, come what may: it is acknowledged."""
        self.line.inward.classes.add(where.cls)
        drawn = with_bat(frame) if self.loop.store.batsignal and draws_bat(where) else None
        self.spool.put(drawn or frame)

    def on_portal(self, pieces: list[Taken], now: float) -> None:
        """Note the portal's answers: nothing of it reaches a device."""
        for kind, piece, _, meaning in pieces:
            if meaning in ("ack", "nack") and self.spool.answered(piece[6:8]):
                self._since = now
            self.line.inward.decide(kind, "dropped", piece)

    def on_portal_up(self, now: float) -> None:
        """The portal is there."""

    def on_portal_down(self, now: float) -> None:
        """An attempt failed, or the connection is gone: what is not answered goes again."""
        self.spool.lost()

    def end_round(self, now: float) -> None:
        """Send what waits; go on, or wait for what may come next."""
        if not self.spool.owed:
            self._since = now
        self.line.flush(now)
        if self.spool.undelivered:
            self.line.reach(now)
        self.line.watch(RECV_SIZE)

    def look(self, now: float) -> None:
        """See to deadlines."""
        if not self.spool.undelivered and now - self.heard >= SILENCE:
            self.line.drop(now)
            return self.loop.depot.forget(self)
        self.line.look(now)
        if self.line.up and self.spool.owed and now - self._since >= ANSWER_TIMEOUT:
            suspect = next(iter(self.spool))
            self.line.failed("timeout", f"no answer to a packet of {self.serial} for {ANSWER_TIMEOUT} s", now)
            self.spool.postpone(suspect)

    def close(self) -> None:
        """After an error of our own: the connection goes, what is spooled stays."""
        self.line.drop(time.monotonic())
        self.spool.lost()


Owner = Union[Relay, Answerer, Courier]

# ------------------------------------------------------------------------------------------------------------ loop

REFUSALS = {
    "limit": "there are --sems.max-connections={max_connections} already",
    "not_allowed": "its address is not in --sems.allow-from",
    "loop": "it is our own connection to the portal that came back; let --sems.upstream lead to the real portal,"
    " and redirect only what the devices send, not this machine",
}


class Door:
    """Where devices come in. Out of descriptors it is shut for a moment, and the connections there are go on."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.is_shut = True
        for sock in loop.listening:
            sock.setblocking(False)

    def open(self) -> None:
        """Let devices in."""
        if self.is_shut:
            self.is_shut = False
            for sock in self.loop.listening:
                handler = Handler(functools.partial(self._on_ready, sock), None)
                self.loop.selector.register(sock, selectors.EVENT_READ, handler)

    def shut(self) -> None:
        """Let nobody in."""
        if not self.is_shut:
            self.is_shut = True
            for sock in self.loop.listening:
                self.loop.selector.unregister(sock)

    def _on_ready(self, listening: socket.socket, _: int, now: float) -> None:
        for _ in range(EVENTS):  # then the others have their turn
            try:
                sock, sockaddr = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors or memory
                text = f"cannot accept a connection: {error.strerror}"
                self.loop.store.troubles.say("accept", text, now)
                return self.shut()
            self._let_in(sock, sockaddr, now)

    def _let_in(self, sock: socket.socket, sockaddr: tuple, now: float) -> None:
        peer = endpoint_text(sockaddr)
        reason = self._objection(plain(sockaddr[0]))
        if reason:
            sock.close()
            return self.refuse(reason, peer, now)
        try:
            tuned(sock, 120, 30)
        except OSError:  # gone already
            return sock.close()
        mode = Relay if self.loop.settings.mode == FORWARD else Answerer
        owner = mode(self.loop, sock, peer, now)
        self.loop.owners[owner] = None
        self.loop.touch(owner)

    def _objection(self, host: str) -> str:
        settings = self.loop.settings
        if settings.allow_from and not any(ipaddress.ip_address(host) in network for network in settings.allow_from):
            return "not_allowed"
        return "limit" if self.loop.device_connections() >= settings.max_connections else ""

    def refuse(self, reason: str, peer: str, now: float) -> None:
        """Count and log a device's connection that is refused."""
        self.loop.store.add("sems_mitm_refused_connections_total", 1, label("reason", reason))
        why = REFUSALS[reason].format(**vars(self.loop.settings))
        self.loop.store.troubles.say(f"refused {reason}", f"refused the connection from {peer}: {why}", now)


class Depot:
    """Mode spool: the couriers, one for each serial number, and the journal that remembers for them."""

    def __init__(self, loop: Loop, journal: Journal | None) -> None:
        self.loop, self.journal = loop, journal
        self.couriers: dict[str, Courier] = {}
        self.room = QUEUES  # how many bytes may still be kept in this round, objects counted in
        if journal:
            journal.undelivered = lambda: itertools.chain(*(courier.spool for courier in self.couriers.values()))
            for frame in journal.load():
                where = address_of(frame, OUTBOUND)
                self._courier(where.serial, time.monotonic()).keep(frame, where)
            journal.rewrite()

    def take(self, frame: bytes, where: Address, now: float) -> bool:
        """Keep a good frame until it is delivered; whether there is room. The journal has it before it is acknowledged."""
        is_known = where.serial in self.couriers
        weight = len(frame) + OBJECT
        if weight > self.room or not is_known and len(self.couriers) >= self.loop.settings.max_connections:
            return False
        courier = self._courier(where.serial, now)
        if courier.spool.weight + weight > SPOOLED:
            return False
        self.room -= weight
        courier.keep(frame, where)
        courier.heard = now
        self.loop.touch(courier)
        if self.journal:
            self.journal.put(where.serial, frame)
        return True

    def _courier(self, serial: str, now: float) -> Courier:
        courier = self.couriers.get(serial)
        if courier is None:
            courier = self.couriers[serial] = Courier(self.loop, serial, now)
            self.loop.owners[courier] = None
            self.loop.touch(courier)
        return courier

    def forget(self, courier: Courier) -> None:
        """A courier has nothing to deliver, and its device has gone."""
        del self.couriers[courier.serial]
        self.loop.forget(courier)

    def remember(self) -> None:
        """Have this round's frames on the disk; the file emptied when nothing is undelivered."""
        if self.journal:
            self.journal.commit()
            if self.journal.size and not any(courier.spool.undelivered for courier in self.couriers.values()):
                self.journal.empty()


class Mailbox:
    """Work that other threads and signals hand to the loop."""

    def __init__(self, selector: selectors.BaseSelector, do: Callable[..., None]) -> None:
        """do(where, owner, work, now): has work(now) done at a boundary, on behalf of an owner or None."""
        self._do = do
        self._work: collections.deque[tuple] = collections.deque()
        self._in, self._out = socket.socketpair()
        for sock in (self._in, self._out):
            sock.setblocking(False)
        selector.register(self._in, selectors.EVENT_READ, Handler(self._on_ready, None))

    def put(self, work: Callable[[float], object], owner: Relay | Courier | None) -> None:
        """Have the loop call work(now); from any thread, and from a signal's handler."""
        self._work.append((work, owner))
        with contextlib.suppress(OSError):  # full: it is awake already
            self._out.send(b"\0")

    def _on_ready(self, _: int, now: float) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._in.recv(4096):
                pass
        while self._work:
            work, owner = self._work.popleft()
            self._do("an event of a connection", owner, work, now)

    def close(self) -> None:
        """Take no more."""
        self._in.close()
        self._out.close()


class Loop:
    """Rounds of events: handlers put, then the journal is on the disk, then what waits is sent; deadlines once a second.

    All of it in one thread, which holds the store's lock while it works on what is shown, and not while a disk does.
    """

    def __init__(
        self, store: Store, settings: argparse.Namespace, files: Files, journal: Journal | None = None
    ) -> None:
        """Raises OSError if the port cannot be had."""
        self.store, self.settings, self.files = store, settings, files
        self.listening = listeners(*settings.listen_address)
        self.port = self.listening[0].getsockname()[1]
        self.selector = selectors.DefaultSelector()
        self.mailbox = Mailbox(self.selector, self._do)
        self.upstream = Upstream(settings, store, self.selector, self.mailbox.put)
        self.owners: dict[Owner, None] = {}
        self.every_second: list[Callable[[float], None]] = []
        self.stopping = False
        self._touched: dict[Owner, None] = {}  # in this round
        self._next_look = 0.0
        self.door = Door(self)
        self.own_addresses = self.upstream.own_addresses  # where this exporter listens: no portal is there
        self.own_addresses.update(sock.getsockname()[:2] for sock in self.listening)
        self.depot = Depot(self, journal)
        store.gauges["sems_mitm_queue_bytes"] = self._queue_bytes
        store.gauges["sems_mitm_device_connections"] = self.device_connections
        store.gauges["sems_mitm_upstream_connections"] = lambda: sum(line.up for line in self.upstream.lines)
        store.gauges["sems_mitm_upstream_up"] = lambda: self.upstream.up

    def device_connections(self) -> int:
        """How many devices are connected."""
        return len(self.owners) - len(self.depot.couriers)

    def _queue_bytes(self) -> int:
        return sum(owner.line.outbox.undelivered for owner in self.owners if not isinstance(owner, Answerer))

    # What the modes ask for

    def touch(self, owner: Owner) -> None:
        """Have the owner send and settle at the end of the round."""
        self._touched[owner] = None

    def forget(self, owner: Owner) -> None:
        """The owner has closed its sockets for good."""
        self.owners.pop(owner, None)
        self._touched.pop(owner, None)

    def clock_ok(self, now: float) -> bool:
        """Whether this machine's clock is good enough to set a device's by it."""
        wall = self.store.clock(now)
        if wall >= RELEASED and zone_is_known(os.environ.get("TZ"), os.path.isfile):
            return True
        why = "TZ is no time zone that this system knows" if wall >= RELEASED else "this machine's own clock is wrong"
        self.store.troubles.say("clock", f"the devices' clocks are not set: {why}", now, CLOCK_PERIOD)
        return False

    # Rounds

    def run(self) -> None:
        """Serve until `stop`, then send what is queued."""
        while not self.stopping:
            self._round(math.inf)
        self._finish()

    def stop(self) -> None:
        """End `run`; for signal handlers and other threads."""
        self.stopping = True
        self.mailbox.put(bool, None)  # nothing to do but wake

    def reopen(self) -> None:
        """Open the capture and backfill files anew; for signal handlers and other threads."""
        self.files.are_rotated = True
        self.mailbox.put(bool, None)

    def _round(self, until: float) -> None:
        """Wait for what comes next, and see to it."""
        ready = self.selector.select(self._patience(until))
        now = time.monotonic()
        for at in range(0, len(ready), EVENTS):
            with self.store.lock:
                for key, events in ready[at : at + EVENTS]:
                    if key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # not closed by one before it
                        self._do("an event of a connection", key.data.owner, key.data.ready, events, now)
            self._end_round(now)
        if now >= self._next_look:
            self._look(now)
        elif not ready and self.store.undecoded:
            with self.store.lock:
                if self.store.undecoded:
                    self.store.digest_one(now)

    def _patience(self, until: float) -> float | None:
        """How long to wait for events: not while something is to be decoded, else until the next look at deadlines."""
        if self.store.undecoded:
            return 0
        if self.owners or self.door.is_shut or until < math.inf:
            return max(min(self._next_look, until) - time.monotonic(), 0)
        return None

    def _do(self, where: str, owner: Owner | None, work: Callable[..., object], *arguments: object) -> None:
        """Do work on behalf of an owner, which sends and settles at the end of the round.

        The boundary of an event and of a deadline: an error of our own ends the owner's connection, and nothing else.
        """
        if owner:
            self._touched[owner] = None
        try:
            work(*arguments)
        except Exception:
            self.store.broke(where)
            if owner:
                owner.close()

    def _end_round(self, now: float) -> None:
        """The journal first: what is sent now may be an acknowledgement."""
        self.files.flush()
        self.depot.remember()
        waits = False
        with self.store.lock:
            while self._touched:
                owner = next(iter(self._touched))
                self._do("an event of a connection", owner, owner.end_round, now)
                self._touched.pop(owner, None)
                waits = waits or owner.weight > 0
            if waits or self.depot.room < QUEUES:
                self._bound(now)

    def _bound(self, now: float) -> None:
        """See that all that waits has a bound: the heaviest queue of a device's connection gives way, spools take no more."""
        total = sum(owner.weight for owner in self.owners)
        self.depot.room = QUEUES - total
        while total > QUEUES:
            heaviest = max(self.owners, key=lambda owner: 0 if isinstance(owner, Courier) else owner.weight)
            before = heaviest.weight
            if isinstance(heaviest, Courier) or not before:
                return
            heaviest.lighten(total - QUEUES, now)
            total -= before - (heaviest.weight if heaviest in self.owners else 0)

    def _look(self, now: float) -> None:
        """Look at all deadlines."""
        self._next_look = now + TICK
        with self.store.lock:
            if not self.stopping:
                self.door.open()
            for owner in list(self.owners):
                self._do("a connection's deadline", owner, owner.look, now)
            for hook in self.every_second:
                self._do("a connection's deadline", None, hook, now)
        if self.depot.journal:
            self.depot.journal.tend(now)
        self._end_round(now)

    def _finish(self) -> None:
        """Stop accepting, send what is queued for two seconds at most, close everything."""
        end = time.monotonic() + SHUTDOWN
        self.door.shut()
        self._end_round(time.monotonic())
        while time.monotonic() < end and any(
            key.events & selectors.EVENT_WRITE for key in self.selector.get_map().values()
        ):
            self._round(end)
        for owner in list(self.owners):
            owner.close()
        self.close()

    def close(self) -> None:
        """Give back what `run` needs; it does so itself at its end."""
        for sock in self.listening:
            sock.close()
        self.selector.close()
        self.mailbox.close()
        if self.depot.journal:
            self.depot.journal.close()


# ------------------------------------------------------------------------------------------------------- household
#
# What a house makes and takes, in keys that do not depend on the model. Figures are key to number, and without what is
# not known. Flows are in W (generation_watts, house_watts; export_watts, negative while importing; battery_watts,
# positive while discharging) and %; energies in kWh.

# Of the house's figures, by their keys' first words: the families of devices that are asked; the first of which any is
# known count. HomeKit 1000s measure the roof, and an inverter beside them adds nothing; a hybrid's own meter is at the
# same grid as theirs.
ROOF, GRID_SIDE = (("HK1000",), ("GRID", "HYBRID")), (("HK1000", "HK3000"), ("HYBRID",))
ASKED = {
    "generation": ROOF, "generated": ROOF, "export": GRID_SIDE, "exported": GRID_SIDE, "imported": GRID_SIDE,
    "battery": (FAMILIES,),
}  # fmt: skip
SOLAR = ("meter_power_generation_watts", "inverter_string_power_watts", "inverter_power_output_watts")  # the first
COUNTED = {  # energies: the counters of which the first that there is counts, and how much of it is a kWh
    "generated": {"meter_energy_generation_decawatt_hours_total": 100, "inverter_energy_output_hectowatt_hours_total": 10},
    "imported": {"meter_energy_import_decawatt_hours_total": 100},
    "exported": {"meter_energy_export_decawatt_hours_total": 100},
    "battery_charged": {"battery_energy_charge_watthours_total": 1000},
    "battery_discharged": {"battery_energy_discharge_watthours_total": 1000},
}  # fmt: skip
DAILY = ("generated", "imported", "exported")
FLOWS = ("generation_watts", "house_watts", "export_watts", "battery_watts", "battery_charge_percent")
TODAY = tuple(f"{word}_today_kilowatt_hours" for word in DAILY)
KEYS = (*FLOWS, *TODAY, *(f"{word}_kilowatt_hours" for word in COUNTED))
SERIES: dict[str, list[Series]] = collections.defaultdict(list)  # of a metric, for all its labels
for _series in dict.fromkeys(value.series for values in VALUES.values() for value in values):
    SERIES[_series[0]].append(_series)


def total(gauges: dict[Series, float], *metrics: str) -> float | None:
    """The first of these metrics that there is, its labels together."""
    sets = ([gauges[series] for series in SERIES[metric] if series in gauges] for metric in metrics)
    return next((sum(numbers) for numbers in sets if numbers), None)


def flows(gauges: dict[Series, float]) -> dict[str, float]:
    """A device's flows by its last reading."""
    roof, export = total(gauges, "meter_power_generation_watts"), total(gauges, "meter_power_export_watts")
    load = total(gauges, "inverter_load_watts") if roof is None or export is None else roof - export
    batteries = [labels for _, labels in SERIES["battery_mode"] if gauges.get(("battery_mode", labels), 1)]  # 0: none
    powers, charges = (
        [gauges[metric, labels] for labels in batteries if (metric, labels) in gauges]
        for metric in ("battery_power_watts", "battery_state_of_charge_ratio")
    )
    percent = 100 * sum(charges) / len(charges) if charges else None
    found = zip(FLOWS, (total(gauges, *SOLAR), load, export, sum(powers) if powers else None, percent))
    return {key: round(number, 3) for key, number in found if number is not None}


def energies(counters: dict[Series, float], base: dict[Series, float] | None = None) -> dict[str, float]:
    """A device's energies by the words of COUNTED: for life, or what they gained since the counters were at base."""
    found: dict[str, float] = {}
    for word, metrics in COUNTED.items():
        for series, parts in (((metric, ""), parts) for metric, parts in metrics.items()):
            if word not in found and series in counters and (base is None or series in base):
                gained = counters[series] - (base[series] if base else 0)
                found[word] = round(max(gained, 0) / parts, 3)  # a counter that started anew has gained nothing
    return found


def today(live: Live) -> dict:
    """A device's energies of the day of its last reading, and since when they are counted if that is not midnight."""
    if live.day is None:
        return {}
    gained = {word: number for word, number in energies(live.counters, live.day.base).items() if word in DAILY}
    daily = live.gauges.get(("inverter_energy_output_hectowatt_hours_day", ""))
    if daily is not None:  # by the inverter's own count, which begins at midnight
        gained.pop("generated", None)
    since = {"today_since": live.day.since.isoformat(timespec="seconds")} if gained and live.day.since else {}
    gained.update({} if daily is None else {"generated": daily / 10})
    return {**{f"{word}_today_kilowatt_hours": gained[word] for word in DAILY if word in gained}, **since}


# A device of the house. told: the keys of what it knows while it is not silent; figures: what is known of it now.
Member = collections.namedtuple("Member", "family told figures")


def flow_member(device: Device, store: Store, now: float) -> Member:
    """A device's flows; the store's lock is held. They go when it is silent."""
    told = flows(device.live.gauges)
    return Member(device.family, told.keys(), {} if store.is_stale(device.live.fresh, now) else told)


def member(device: Device, store: Store, now: float) -> Member:
    """All figures of a device; the store's lock is held. Today's energies go at local midnight."""
    live, flowing = device.live, flow_member(device, store, now)
    gained, lifetime = today(live), energies(live.counters)
    if live.gauges and "battery_watts" not in flowing.told:  # it counts what goes into a battery that is not there
        lifetime = {word: number for word, number in lifetime.items() if "battery" not in word}
    counted = {f"{word}_kilowatt_hours": number for word, number in lifetime.items()}
    over = live.day is None or live.day.date != datetime.fromtimestamp(store.clock(now)).date()
    figures = {**flowing.figures, **({} if over else gained), **counted}
    return Member(device.family, {*flowing.told, *gained, *counted}, figures)


def house(members: Sequence[Member], keys: Iterable[str] = KEYS) -> dict:
    """The house's figures, each flow once. A member that is not known makes a sum unknown, not smaller."""
    found: dict = {}
    since: set[str] = set()
    for key in keys:
        for families in ASKED.get(key.partition("_")[0], ()):
            group = [one for one in members if one.family in families and key in one.told]
            known = [one.figures[key] for one in group if key in one.figures]
            if known and len(known) == len(group):
                found[key] = round(sum(known) / (len(known) if key.endswith("percent") else 1), 3)
                since.update(one.figures.get("today_since", "") for one in group if "_today_" in key)
            if known:
                break
    solar, export = found.get("generation_watts"), found.get("export_watts")
    if solar is not None:  # at night an inverter takes a few watts, and the roof gives none
        found["generation_watts"] = solar = max(solar, 0)
    has_battery = any("battery_watts" in one.told for one in members)
    if solar is not None and export is not None and ("battery_watts" in found or not has_battery):
        found["house_watts"] = round(solar - export + found.get("battery_watts", 0), 3)
    found["today_since"] = max(since, default="")
    return {key: found[key] for key in (*KEYS, "today_since") if found.get(key, "") != ""}


# A step of the picture. begin, end: seconds since 1970 of the shown time; means: of PICTURED, None is not known.
Point = collections.namedtuple("Point", "begin end means")
PICTURED = FLOWS[:4]
DAY = 86400
STEPS = 600  # of the picture, at most
STEP = 0.625  # s, the first: doubled eight times, 540 are a day; of the demo's day, four minutes, 384 are


class History:
    """The house's flows of the last day for the picture, as means in equal steps of time; in memory only.

    Steps are numbered on the monotonic axis and turned into shown time when drawn, so a clock that jumps does no harm.
    A flow holds from one reading to the next, at most until its device is silent.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.step = store, STEP
        self.sums: dict[int, list[float]] = {}  # of a step: of each flow the W·s, then of each the seconds it was known
        self._flows: list[float | None] = []  # since `_since`, at most until `_until`
        self._since = self._until = -math.inf
        self._readings = -1

    def note(self, now: float) -> None:
        """Look whether the flows have changed; about once a second, with the store's lock held."""
        store = self.store
        if store.readings == self._readings and now < self._until:
            return
        store.digest(now)
        devices = store.names.values()
        fresh = [device.live.fresh for device in devices if not store.is_stale(device.live.fresh, now)]
        newest = max(fresh, default=now) if store.readings != self._readings else now
        self._hold(min(max(newest, self._since), now))
        flowing = house([flow_member(device, store, now) for device in devices], FLOWS)
        self._flows = [flowing.get(key) for key in PICTURED]
        self._until = min(fresh, default=math.inf) + (store.stale_after or math.inf)
        self._readings = store.readings

    def _hold(self, now: float) -> None:
        """The flows have held until now, or until a device fell silent."""
        clock = self.store.clock
        oldest = now - DAY * DAY / (clock(now) - clock(now - DAY))  # a day of shown time ago
        self.sums = {number: sums for number, sums in self.sums.items() if number * self.step >= oldest}
        at, end = max(self._since, oldest), min(now, self._until)
        if self._flows.count(None) == len(self._flows):
            at = now  # nothing to add
        self._since = max(self._since, now)
        while now // self.step - min([*self.sums, at // self.step]) >= STEPS:
            self._double()
        while at < end:
            number = int(at // self.step)
            until = min((number + 1) * self.step, end)
            sums = self.sums.setdefault(number, [0.0] * 2 * len(PICTURED))
            for i, watts in enumerate(self._flows):
                if watts is not None:
                    sums[i] += watts * (until - at)
                    sums[i + len(PICTURED)] += until - at
            at = until

    def _double(self) -> None:
        """Make steps twice as long."""
        pairs, self.sums = self.sums, {}
        self.step *= 2
        for number, sums in pairs.items():
            self.sums[number // 2] = [a + b for a, b in zip(sums, self.sums.get(number // 2, itertools.repeat(0.0)))]

    def points(self, now: float) -> list[Point]:
        """The steps from the first of which anything is known until now, none left out; the store's lock is held."""
        self.note(now)
        self._hold(now)
        clock, count = self.store.clock, len(PICTURED)
        found = []
        for number in range(min(self.sums), math.ceil(now / self.step)) if self.sums else ():
            sums = self.sums.get(number, [0.0] * 2 * count)
            means = [watts / seconds if seconds else None for watts, seconds in zip(sums, sums[count:])]
            found.append(Point(clock(number * self.step), clock(min((number + 1) * self.step, now)), means))
        return found


# ------------------------------------------------------------------------------------------- page, API, Home Assistant
#
# What HTTP shows beside the metrics. `see` takes what is needed under the store's lock; all else is text made of that.

# A device as it is shown. age: s since its last packet; values: series to number, gauges only while it is not silent.
Shown = collections.namedtuple("Shown", "name serial info up age member values")
Seen = collections.namedtuple("Seen", "devices house upstream blocked")


def shown(device: Device, store: Store, now: float) -> Shown:
    """A device as it is shown; the store's lock is held."""
    live, age = device.live, round(max(now - device.good, 0), 1)
    values = {**({} if store.is_stale(live.fresh, now) else live.gauges), **live.counters}
    up = not store.is_stale(device.good, now)
    return Shown(device.name, label_text(device.serial), dict(device.info), up, age, member(device, store, now), values)


def see(store: Store, settings: argparse.Namespace, now: float) -> Seen:
    """Everything that the page and the API show, but for the picture."""
    with store.lock:
        store.digest(now)
        devices = [shown(device, store, now) for device in store.names.values()]
        up, waiting = (store.gauges.get(f"sems_mitm_{name}", lambda: None)() for name in ("upstream_up", "queue_bytes"))
        blocked = store.totals["inbound_unknown_packets_total", ""]
    address = "" if settings.mode == LOCAL else settings.upstream_text
    reachable = None if up is None else bool(up)
    upstream = {"mode": settings.mode, "address": address, "up": reachable, "queue_bytes": waiting or 0}
    return Seen(devices, house([device.member for device in devices]), upstream, blocked)


@functools.lru_cache(maxsize=1024)
def flat(metric: str, labels: str) -> str:
    """A metric with its label as one word: meter_voltage_volts_channel_1."""
    return "_".join((metric, *re.findall(r"\w+", labels)))


def devices_json(seen: Seen) -> Iterator[str]:
    """/api/devices."""
    yield '{"devices": ['
    for i, device in enumerate(seen.devices):
        told = dict(zip(("device", "model", "serial", "full_serial"), (*device.name, device.serial)))
        told = {**told, **device.info, "up": device.up, "age_seconds": device.age, **device.member.figures}
        values = {flat(*series): number for series, number in device.values.items()}
        yield f"{',' if i else ''}\n {json.dumps({**told, 'values': values})}"
    yield f'],\n"upstream": {json.dumps(seen.upstream)},\n"blocked": {seen.blocked}}}\n'


def household_json(seen: Seen) -> Iterator[str]:
    """/api/household."""
    devices = {device.serial: device.member.figures for device in seen.devices}
    yield json.dumps({"house": seen.house, "devices": devices}) + "\n"


# A household figure by its key: title on the page, title while it is negative (it has no sign then), colour; its name in
# Home Assistant.
TITLES = {
    "generation_watts": ("Solar", "", "solar", "solar power"),
    "house_watts": ("House", "", "", "house power"),
    "export_watts": ("To the grid", "From the grid", "grid", "power to the grid"),
    "battery_watts": ("From the battery", "Into the battery", "battery", "power from the battery"),
    "battery_charge_percent": ("Battery", "", "battery", "battery charge"),
    "generated_today_kilowatt_hours": ("Solar", "", "solar", "solar energy today"),
    "imported_today_kilowatt_hours": ("From the grid", "", "grid", "energy from the grid today"),
    "exported_today_kilowatt_hours": ("To the grid", "", "grid", "energy to the grid today"),
    "generated_kilowatt_hours": ("", "", "", "solar energy"),
    "imported_kilowatt_hours": ("", "", "", "energy from the grid"),
    "exported_kilowatt_hours": ("", "", "", "energy to the grid"),
    "battery_charged_kilowatt_hours": ("", "", "", "energy into the battery"),
    "battery_discharged_kilowatt_hours": ("", "", "", "energy from the battery"),
}
# By the last word of the key: unit, decimals on the page; Home Assistant's device_class and state_class.
FORMS = {
    "watts": ("W", 0, "power", "measurement"),
    "percent": ("%", 0, "battery", "measurement"),
    "hours": ("kWh", 1, "energy", "total_increasing"),
}
STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--dim:#566070;--back:#f4f5f7;--card:#fff;--line:#dde1e6;
--solar:#9a5800;--grid:#1a5fb4;--battery:#8a2a8a;--good:#17693b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--dim:#a3adba;--back:#14181d;--card:#1d232a;--line:#38414c;
--solar:#ffb454;--grid:#82b4ff;--battery:#e79be7;--good:#6fd394;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:64rem;padding:1rem;background:var(--back);color:var(--ink);font:1rem/1.5 system-ui,sans-serif;
overflow-wrap:anywhere}
h1{font-size:1.25rem;margin:0}h2{font-size:1.1rem;margin:0}p{margin:.25rem 0}b{font-weight:400}a{color:inherit}code{font-size:.95em}
header,footer{display:flex;flex-wrap:wrap;gap:.25rem 1rem;align-items:baseline;justify-content:space-between}
main{display:grid;gap:1rem;margin:1rem 0;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));align-items:start}
section{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:1rem}.wide{grid-column:1/-1}
small,.dim,dt,footer{color:var(--dim);font-size:.875rem;font-weight:400}.good{color:var(--good)}.bad{color:var(--bad)}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(7.5rem,1fr));gap:.75rem 1rem;margin:.5rem 0 0}
dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
.solar{color:var(--solar)}.grid{color:var(--grid)}.battery{color:var(--battery)}
figure{margin:1.5rem 0 0}figure>svg{display:block;width:100%;height:17rem;overflow:visible}
text{font-size:.8125rem;fill:var(--dim);paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
path{fill:none;stroke:currentColor;stroke-width:2px;vector-effect:non-scaling-stroke}
path.area{fill:currentColor;fill-opacity:.3;stroke-width:1px}path.house{stroke-width:2.5px}path.grid{stroke-dasharray:7 4}
path.battery{stroke-width:3px;stroke-dasharray:.1 6;stroke-linecap:round}path.rule{stroke:var(--line);stroke-width:1px}
path.zero{stroke:var(--dim);stroke-width:1px}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.25rem;margin:.5rem 0 0;padding:0;font-size:.875rem}
ul svg{width:2rem;height:.75rem;margin-right:.4rem;vertical-align:middle}li{margin:.25rem 0}ol{padding-left:1.25rem}
summary{cursor:pointer;margin-top:.5rem}table{border-collapse:collapse;width:100%;font-size:.875rem}
th,td{padding:.2rem 0;border-top:1px solid var(--line);text-align:left;font-weight:400;vertical-align:top}
td{text-align:right;padding-left:1rem;white-space:nowrap;font-variant-numeric:tabular-nums}
.level{transform:translate(2px,-4px)}@media(max-width:40rem){.other{display:none}}
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="refresh" content="30"><link rel="icon" href="data:,"><title>sems_mitm</title><style>{style}</style></head>
<body><header><h1>sems_mitm</h1><p>{portal}</p></header>
<main>
"""
FOOT = """</main>
<footer><p>{blocked} from the portal blocked</p>
<p><a href="{telemetry}">Metrics</a> · <a href="/api/devices">JSON</a> · <a href="/home-assistant.yaml">Home Assistant</a> · version {version}</p></footer></body></html>
"""
SECTION = '<section class="wide"><h2>{}</h2>{}</section>\n'
SILENT_HOUSE = '<p class="dim">Nothing is known now: what would tell it is silent.</p>'
SET_UP = """<ol>
<li>Give this machine a fixed address{now}, and let the name service of your router or Pi-hole answer <code>{host}</code>
with it.</li>
<li>Power-cycle the device's Wi-Fi or LAN module: it asks for the name when it starts.</li>
<li>It connects to port {port} of this machine within a minute or two, and appears here.</li></ol>
<p>Nothing after five minutes? <code>python3 sems_mitm.py doctor</code> on this machine says what is missing; in Docker it is
<code>docker exec sems_mitm python3 /sems_mitm.py doctor</code>.</p>
"""


def portal_state(upstream: dict) -> str:
    """The portal's state in words."""
    if upstream["mode"] == LOCAL:
        return "Local: no portal, the exporter answers"
    states = {None: "not tried yet", True: '<b class="good">reachable</b>', False: '<b class="bad">away</b>'}
    waiting = f", {upstream['queue_bytes']:,} bytes wait for it" if upstream["queue_bytes"] else ""
    return f"Portal {html.escape(upstream['address'])}: {states[upstream['up']]}{waiting}"


def minus(text: str) -> str:
    """A number's text with the sign that people write."""
    return text.replace("-", "−")


def in_words(key: str, number: float) -> tuple[str, str]:
    """A figure's title and text, without a sign where the title says it."""
    title, negative, *_ = TITLES[key]
    unit, decimals, *_ = FORMS[key.rpartition("_")[2]]
    title, number = (negative, -number) if negative and number < 0 else (title, number)
    return title, minus(f"{number:,.{decimals}f} {unit}")


def tiles(figures: dict, keys: Sequence[str]) -> str:
    """The figures that are known."""
    told = ((TITLES[key][2], *in_words(key, figures[key])) for key in keys if key in figures)
    found = "".join(f'<div><dt>{title}</dt><dd class="{css}">{text}</dd></div>' for css, title, text in told)
    return found and f"<dl>{found}</dl>"


@functools.lru_cache(maxsize=1024)
def quantity(metric: str, labels: str) -> str:
    """What a series is: Voltage of a meter channel (channel 1)."""
    label = " ".join(re.findall(r"\w+", labels))
    return html.escape(METRICS[metric][1].rstrip(".") + (f" ({label})" if label else ""))


@functools.lru_cache(maxsize=1024)
def shown_unit(metric: str) -> tuple[str, float]:
    """The unit in which a metric is shown, and by what its values are multiplied."""
    size, _, name = unit(metric).rpartition(" ")  # the original has units such as 0.1 V
    number = float(size or 1)
    return ("kWh", number / 1000) if name == "Wh" else (name.replace("1", ""), number)


def amount(metric: str, number: float) -> str:
    """A value with its unit."""
    name, multiply = shown_unit(metric)
    return minus(f"{round(number * multiply, 3) if multiply != 1 else number:,} {name}").rstrip()


def table(values: dict[Series, float]) -> str:
    """All values of a device, foldable."""
    told = ((quantity(*series), amount(series[0], number)) for series, number in values.items())
    rows = (f"<tr><th>{what}</th><td>{text}</td></tr>" for what, text in told)
    return f"<details><summary>All {len(values)} values</summary><table>{''.join(rows)}</table></details>"


def span(seconds: float) -> str:
    """An age in words."""
    units = ((86400, "day"), (3600, "hour"), (60, "minute"))
    size, word = next((unit for unit in units if seconds >= unit[0]), (1, "second"))
    return f"{seconds // size:.0f} {word}{'' if seconds // size == 1 else 's'}"


def card(device: Shown) -> str:
    """A device on the page; every text of a device is escaped."""
    kind, model, serial, firmware = map(html.escape, (*device.name[:2], device.serial, device.info["firmware"]))
    asleep = "" if kind == "meter" else " (an inverter sleeps at night)"
    state = '<b class="good">reporting</b>' if device.up else f'<b class="bad">silent</b>{asleep}'
    return (
        f"<section><h2>{model}</h2><p>{state}, last packet {span(device.age)} ago</p>"
        f'<p class="dim">{kind} · serial {serial}{f" · firmware {firmware}" if firmware else ""}</p>'
        f"{table(device.values) if device.values else ''}</section>\n"
    )


# The picture: of PICTURED, class and legend. Solar is an area, the others are lines of their own patterns.
LEGEND = (
    ("solar area", "Solar"),
    ("house", "House"),
    ("grid", "Grid: above 0 to it, below 0 from it"),
    ("battery", "Battery: above 0 out of it, below 0 into it"),
)
SWATCH = '<li><svg viewBox="0 0 32 12" aria-hidden="true"><path class="{}" d="{}"/></svg>{}</li>'
FIGURE = """<figure><svg role="img" aria-labelledby="title desc">
<title id="title">Power of the house in the last 24 hours</title><desc id="desc">{told}</desc>
<svg width="100%" height="{height}%" viewBox="{box}" preserveAspectRatio="none">{paths}</svg>
{texts}</svg><figcaption><ul>{legend}</ul></figcaption></figure>
"""
PLOT = 92  # % of the picture's height; the hours stand below


def axis_text(x: float, y: float, css: str, text: str) -> str:
    """A text at an axis, placed in % of the picture and within its sides."""
    anchor = "start" if x < 1 else "end" if x > 99 else "middle"
    return f'<text x="{x:.1f}%" y="{y:.1f}%" class="{css}" text-anchor="{anchor}">{minus(text)}</text>'


def outline(points: list[Point], which: int, left: float) -> str:
    """The path of a flow: a step for each point, broken where it is not known; solar's goes down to 0 and closes."""
    parts: list[str] = []
    for known, run in itertools.groupby(points, key=lambda point: point.means[which] is not None):
        if known:
            steps = [(point.begin - left, point.end - left, -round(point.means[which])) for point in run]
            line = "V".join(f"{y}H{end:.1f}" for _, end, y in steps)
            parts.append(f"M{steps[0][0]:.1f} {line}" if which else f"M{steps[0][0]:.1f} 0V{line}V0Z")
    return "".join(parts)


# Where the picture lies: shown time from left to right, W from low to high in round steps.
Axes = collections.namedtuple("Axes", "left right low high step")


def past_the_hour(moment: float) -> float:
    """Seconds since the last whole hour of local time."""
    local = datetime.fromtimestamp(moment)
    return local.minute * 60 + local.second + local.microsecond / 1e6


def axes_of(points: list[Point]) -> Axes:
    """Time from the first point to the last, or for less than two hours the whole hours around them; 0 and all powers."""
    begin, end = points[0].begin, points[-1].end
    if end - begin < 7200:
        begin -= past_the_hour(begin)
        end = begin + 3600 * math.ceil((end - begin) / 3600)
    known = [0.0, *(watts for point in points for watts in point.means if watts is not None)]
    lowest, highest = min(known), max(known)
    wanted = (highest - lowest or 500) / 7  # at least: seven steps, or a few less
    size = 10 ** math.floor(math.log10(wanted))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= wanted)
    low = step * math.floor(lowest / step)
    return Axes(begin, end, low, max(step * math.ceil(highest / step), low + step), step)


def whole_hours(axes: Axes) -> list[float]:
    """Whole hours of local time, as many as can be read, in seconds from the left."""
    width = axes.right - axes.left
    every = next(every for every in (1, 2, 3, 4) if width / 3600 / every <= 8 or every == 4)
    hours = range(round(-past_the_hour(axes.left) % 3600), round(width) + 1, 3600)
    return [at for at in hours if datetime.fromtimestamp(round(axes.left + at)).hour % every == 0]


def present(figures: dict) -> str:
    """The present figures in a sentence."""
    told = [" ".join(in_words(key, figures[key])) for key in FLOWS if key in figures]
    return f"Now: {'; '.join(told)}." if told else "Nothing is known now."


def picture(points: list[Point], figures: dict) -> str:
    """The house's flows as SVG, nothing if there is none. It is drawn in seconds and W and stretches; its texts do not."""
    drawn = [i for i in range(len(PICTURED)) if any(point.means[i] is not None for point in points)]
    if not drawn:
        return ""
    axes = axes_of(points)
    levels = [axes.low + i * axes.step for i in range(round((axes.high - axes.low) / axes.step) + 1)]
    width, height, hours = axes.right - axes.left, axes.high - axes.low, whole_hours(axes)
    rules = [f"M0 {-level:g}H{width:.0f}" for level in levels] + [
        f"M{at:.0f} {-axes.high:g}v{height:g}" for at in hours
    ]
    paths = [("rule", "".join(rules)), ("zero", f"M0 0H{width:.0f}")]
    paths += [(LEGEND[i][0], outline(points, i, axes.left)) for i in drawn]
    texts = [(0, PLOT * (axes.high - level) / height, "level", f"{level / 1000:g} kW") for level in levels]
    for i, at in enumerate(hours):
        clock = datetime.fromtimestamp(round(axes.left + at)).strftime("%H:%M")
        texts.append((100 * at / width, 100, "other" if i % 2 and len(hours) > 4 else "", clock))
    figure = FIGURE.format(
        told=present(figures),
        height=PLOT,
        box=f"0 {-axes.high:g} {width:.0f} {height:g}",
        paths="".join(f'<path class="{css}" d="{path}"/>' for css, path in paths),
        texts="".join(axis_text(*text) for text in texts),
        legend="".join(SWATCH.format(LEGEND[i][0], "M0 6H32" if i else "M1 11V3H31V11Z", LEGEND[i][1]) for i in drawn),
    )
    return SECTION.format("Power", figure)


def html_page(seen: Seen, points: list[Point], settings: argparse.Namespace, address: str) -> Iterator[str]:
    """The page at /, in parts. address: this machine's, if it is known."""
    yield HEAD.format(style=STYLE, portal=portal_state(seen.upstream))
    if seen.devices:
        yield SECTION.format("The house", tiles(seen.house, FLOWS) or SILENT_HOUSE)
        yield picture(points, seen.house)
        row, since = tiles(seen.house, TODAY), seen.house.get("today_since", "")[11:16]
        yield row and SECTION.format(f"Today <small>since {since}</small>" if since else "Today", row)
    else:
        now = f" (now {html.escape(address)})" if address else ""
        steps = SET_UP.format(now=now, host=html.escape(settings.upstream[0]), port=settings.listen_address[1])
        yield SECTION.format("No device has connected yet", steps)
    for device in sorted(seen.devices, key=lambda device: (device.name[0] != "meter", *device.name[1:])):
        yield card(device)
    yield FOOT.format(
        blocked=f"{seen.blocked:,} packet{'' if seen.blocked == 1 else 's'}",
        telemetry=html.escape(settings.telemetry_path),
        version=VERSION,
    )


PACKAGE = """# sems_mitm in Home Assistant: a package for the devices known now. Save it with
#     curl -fo /config/packages/sems_mitm.yaml http://{address}/home-assistant.yaml
# and have in configuration.yaml, once:
#     homeassistant:
#       packages: !include_dir_named packages
# Then restart Home Assistant; fetch it again when a device is new. For the Energy dashboard take the sensors without "today".
"""


def sensor(serial: str, name: str, key: str) -> dict[str, str]:
    """A sensor of Home Assistant; what is not known there is unavailable, without a word in its log."""
    unit, _, device_class, state_class = FORMS[key.rpartition("_")[2]]
    number = f"value_json.get('devices', {{}}).get('{serial}', {{}}).get('{key}')"
    return {
        "name": f"{name} {TITLES[key][3]}",
        "unique_id": f"{serial}_{key}",
        "device_class": device_class,
        "state_class": state_class,
        "unit_of_measurement": unit,
        "value_template": f"{{{{ {number} if value_json is defined else none }}}}",
        "availability": f"{{{{ value_json is defined and {number} is not none }}}}",
    }


def named_for_home(devices: Sequence[Shown]) -> list[tuple[Shown, str]]:
    """The devices of a package and their names: models, with the serial number's end where two are alike."""
    named = []
    for device in devices:
        if device.member.told and re.fullmatch("[A-Z0-9]{16}", device.serial):
            plain_text = " ".join(re.sub(r"[^A-Za-z0-9 .()/+-]", " ", device.name[1]).split())
            named.append((device, plain_text.replace(" Smart Meter", "") or device.name[0]))
    models = collections.Counter(name for _, name in named)
    return [(device, name if models[name] == 1 else f"{name} {device.serial[-8:]}") for device, name in named]


def counted_twice(named: list[tuple[Shown, str]]) -> str:
    """Comments that say which sensors to take where two devices count the same."""
    found = ""
    for word, what in (("generated", "roof"), ("imported", "grid")):
        key = f"{word}_kilowatt_hours"
        groups = [
            [name for device, name in named if device.member.family in families and key in device.member.told]
            for families in ASKED[word]
        ]
        if all(groups):
            better, other = (" and ".join(names) for names in groups)
            found += f"# {better} and {other} count the same {what}: take only the energies of {better} there.\n"
    return found


def home_assistant(seen: Seen, address: str) -> str:
    """A package of sensors on http://ADDRESS/api/household. Nothing from the network is more than a JSON string in it."""
    head, named = PACKAGE.format(address=address), named_for_home(seen.devices)
    if not named:
        return f"{head}#\n# No device is known yet: fetch it again when http://{address}/ shows one.\n{{}}\n"
    resource = json.dumps(f"http://{address}/api/household")
    lines = ["rest:", f"  - resource: {resource}", "    scan_interval: 60", "    sensor:"]
    for device, name in named:
        for key in (key for key in KEYS if key in device.member.told):
            first, *more = (f"{field}: {json.dumps(text)}" for field, text in sensor(device.serial, name, key).items())
            lines += [f"      - {first}", *(f"        {row}" for row in more)]
    return "\n".join((head + counted_twice(named), *lines, ""))


# ------------------------------------------------------------------------------------------------------------ HTTP
#
# The standard library's threading server, with a bound. One request a connection.

PLAIN, JSON = "text/plain; charset=utf-8", "application/json"
EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Vary": "Accept-Encoding",
    "Connection": "close",
}


class RequestHead:
    """What the base class reads a request from, bounded: it takes a hundred headers of 64 KiB each, and any time."""

    def __init__(self, request: http.server.BaseHTTPRequestHandler) -> None:
        self.sock, self.file, self.close = request.connection, request.rfile, request.rfile.close
        self.left, self.end = HTTP_HEAD, time.monotonic() + HTTP_TIMEOUT

    def readline(self, size: int) -> bytes:
        """A line. Raises ProtocolError when the lines together are too long, OSError when they take too long."""
        self.sock.settimeout(max(self.end - time.monotonic(), 0.001))
        line = self.file.readline(min(size, self.left))
        self.left -= len(line)
        if not self.left:
            raise ProtocolError("a request's head is too long", line)
        return line


def in_pieces(parts: Iterable[str]) -> Iterator[bytes]:
    """A text as bytes, so many at once as are good to send."""
    waiting = bytearray()
    for part in parts:
        waiting += part.encode()
        if len(waiting) >= HTTP_PIECE:
            yield bytes(waiting)
            waiting.clear()
    yield bytes(waiting)


class Requests(http.server.BaseHTTPRequestHandler):
    """The one request of a connection."""

    server: Server
    disable_nagle_algorithm = True
    command = ""  # until the request is read
    answered = False

    def handle(self) -> None:
        """Read the request and answer it."""
        try:
            self.rfile = RequestHead(self)  # type: ignore[assignment]
            self.handle_one_request()
        except ProtocolError:
            self.send_error(431)
        except OSError:  # the client is gone, or too slow
            return
        except Exception:
            store = self.server.web.store
            with store.lock:
                store.broke("an HTTP request")
            if not self.answered:
                self.send_error(500)

    def do_GET(self) -> None:
        """Answer by the path; what no path names is 404."""
        path = self.requestline.split()[1].partition("?")[0]  # self.path lost all leading slashes but one
        web = self.server.web
        pages: dict[str, tuple[str, Callable[[], Iterable[str]]]] = {
            "/": ("text/html; charset=utf-8", self.page),
            "/api/devices": (JSON, lambda: devices_json(self.seen())),
            "/api/household": (JSON, lambda: household_json(self.seen())),
            "/home-assistant.yaml": (PLAIN, lambda: [home_assistant(self.seen(), self.host())]),
            web.settings.telemetry_path: (EXPOSITION, lambda: exposition(web.store.collect(time.monotonic()))),
        }
        if path in pages:
            self.answer(200, *pages[path])
        elif path == "/-/healthy":
            self.answer(200, PLAIN, "healthy\n")
        elif path == "/-/ready":
            self.answer(*(200, PLAIN, "ready\n") if web.is_ready() else (503, PLAIN, "not ready\n"))
        else:
            self.answer(404, *(JSON, "{}\n") if f"{path}/".startswith("/api/") else (PLAIN, "not found\n"))

    do_HEAD = do_GET

    def seen(self) -> Seen:
        """What is to be shown."""
        return see(self.server.web.store, self.server.web.settings, time.monotonic())

    def page(self) -> Iterator[str]:
        """The page for people."""
        web, seen = self.server.web, self.seen()
        with web.store.lock:
            points = web.history.points(time.monotonic())
        host = re.sub(r":[0-9]+$", "", self.host()).strip("[]")
        local = host.startswith("127.") or host in ("localhost", "::1")
        return html_page(seen, points, web.settings, own_address("192.0.2.1") if local else host)

    def host(self) -> str:
        """HOST:PORT by which the client reached this machine, as far as it says so plainly."""
        host = self.headers.get("Host", "")
        plain_host = re.fullmatch(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?", host)
        return host if plain_host else endpoint_text(self.connection.getsockname())

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer what cannot be read, or is no GET or HEAD: of those the base class says that it has none (501)."""
        code = 405 if code == 501 else code
        self.answer(code, PLAIN, f"{http.HTTPStatus(code).phrase}\n")

    def answer(self, status: int, content_type: str, text: str | Callable[[], Iterable[str]]) -> None:
        """Send an answer. A text that has to be made waits for its turn, a ready one does not."""
        if isinstance(text, str):
            self.start_answer(status, content_type, len(text))
            return self.deliver([text.encode()])
        web, is_gzip = self.server.web, self.wants_gzip()
        is_plain = not is_gzip and web.plain.acquire(blocking=False)
        try:
            with web.rendering:
                size, pieces = self.made(text, is_gzip, is_plain)
            self.start_answer(status, content_type, size, is_gzip)
            self.deliver(pieces if is_gzip or is_plain else map(zlib.decompress, pieces))
        finally:
            if is_plain:
                web.plain.release()

    def start_answer(self, status: int, content_type: str, size: int, packed: bool = False) -> None:
        """Send an answer's head."""
        headers = {"Content-Type": content_type, "Content-Length": str(size), **SAFE_HEADERS}
        headers.update({"Content-Encoding": "gzip"} if packed else {})
        headers.update({"Allow": "GET, HEAD"} if status == 405 else {})
        self.request_version = self.protocol_version  # of what the base class could not read it is 0.9, without a head
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.answered = True
        self.end_headers()

    def made(self, text: Callable[[], Iterable[str]], is_gzip: bool, is_plain: bool) -> tuple[int, list[bytes]]:
        """The size of an answer, and it in pieces: of one gzip file, as they are, or else each packed for itself.

        A slow client leaves it in memory for long. Raises OSError if the connection had to make room.
        """
        self.connection.getpeername()
        size, found, packer = 0, [], zlib.compressobj(1, wbits=31)
        for piece in in_pieces(text()):
            size += len(piece)
            found.append(packer.compress(piece) if is_gzip else piece if is_plain else zlib.compress(piece, 1))
        if is_gzip:
            found.append(packer.flush())
            size = sum(map(len, found))
        return size, found

    def deliver(self, pieces: Iterable[bytes]) -> None:
        """Send a body. Raises OSError if it cannot be sent in time."""
        end = time.monotonic() + HTTP_TIMEOUT
        for piece in pieces if self.command != "HEAD" else ():
            self.connection.settimeout(max(end - time.monotonic(), 0.001))
            self.connection.sendall(piece)

    def wants_gzip(self) -> bool:
        """Whether the client takes gzip: by its name, else as *, and not with q=0 (RFC 9110, 12.5.3)."""
        codings = (part.partition(";") for part in self.headers.get("Accept-Encoding", "").lower().split(","))
        weights = {name.strip(): weight.strip() for name, _, weight in codings}
        weight = weights.get("gzip", weights.get("*", "q=0"))
        return not re.fullmatch(r"q=0(\.0*)?", weight)

    def log_message(self, format: str, *args: object) -> None:
        log.debug("http %s %r", self.address_string(), format % args)


class Server(http.server.ThreadingHTTPServer):
    """The standard server on a socket that listens already: it asks no name service."""

    def __init__(self, listening: socket.socket, web: Web) -> None:
        self.address_family = listening.family
        super().__init__(listening.getsockname(), Requests, bind_and_activate=False)
        self.socket.close()
        self.socket, self.web = listening, web
        listening.setblocking(True)

    def serve(self) -> None:
        """Take connections until the socket is closed."""
        with contextlib.suppress(ValueError):  # it was closed just now
            while not self.web.closed:
                self.handle_request()

    def get_request(self) -> tuple[socket.socket, tuple]:
        """The next connection. Raises OSError, which the base class takes for "none"."""
        try:
            return self.socket.accept()
        except OSError as error:
            if error.errno != errno.ECONNABORTED and not self.web.closed:
                time.sleep(0.5)  # out of descriptors: without a pause the base class spins
            raise

    def process_request(self, request: socket.socket, client_address: tuple) -> None:  # type: ignore[override]
        """Serve a connection in a thread when there is room for it."""
        self.web.admit(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        """End a connection. What it still said is read, or its end would be a reset that takes the answer along."""
        with contextlib.suppress(OSError):
            request.shutdown(socket.SHUT_WR)
            request.setblocking(False)
            request.recv(HTTP_HEAD)
        self.web.leave(request)
        request.close()

    def handle_error(self, request: object, client_address: object) -> None:
        """The connection ends without a word: no thread, or no client. Our own errors end in Requests."""


class Web:
    """Where HTTP is served, and the connections that there are."""

    def __init__(
        self, store: Store, settings: argparse.Namespace, history: History, is_ready: Callable[[], bool]
    ) -> None:
        self.store, self.settings, self.history, self.is_ready = store, settings, history, is_ready
        self.listening = listeners(*settings.web_address)
        self.port = self.listening[0].getsockname()[1]
        self.rendering = threading.Lock()  # one answer is made at a time
        self.plain = threading.Semaphore(
            1
        )  # one answer at a time stands in memory unpacked: packing costs a scrape time
        self.closed = False
        self._open: dict[socket.socket, float] = {}  # connections, the oldest first, and since when
        self._left = threading.Condition()  # one of them is gone

    def start(self) -> None:
        """Serve, in threads that end with the process."""
        for sock in self.listening:
            threading.Thread(target=Server(sock, self).serve, name="http", daemon=True).start()

    def admit(self, sock: socket.socket) -> None:
        """Wait for room for one connection more; when all are old, the oldest makes it."""
        crowded = False
        with self._left:
            while len(self._open) >= HTTP_CONNECTIONS:
                oldest = next(iter(self._open))
                patience = self._open[oldest] + HTTP_GRACE - time.monotonic()
                crowded = patience <= 0
                if crowded:
                    self._shut(oldest)
                else:
                    self._left.wait(patience)
            self._open[sock] = time.monotonic()
        if crowded:
            with self.store.lock:
                self.store.add("sems_mitm_http_closed_connections_total")

    def leave(self, sock: socket.socket) -> None:
        """A connection has ended."""
        with self._left:
            self._shut(sock)
            self._left.notify()

    def _shut(self, sock: socket.socket) -> None:
        self._open.pop(sock, None)
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # its thread notices

    def close(self) -> None:
        """Listen no more, and end the connections there are."""
        self.closed = True
        for sock in self.listening:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits for it
            sock.close()
        with self._left:
            for sock in list(self._open):
                self._shut(sock)


# -------------------------------------------------------------------------------------------------- settings, serve
#
# The environment is read like a command line that stands before the real one; argparse does the rest.

Settings = argparse.Namespace  # of serve: a value for each row of FLAGS, by its fourth column
HOST_ERRORS = (OSError, UnicodeError)  # of a host that cannot be had, or whose name cannot be one
HOST, V6, PORT = r"(\[[\w.%]*:[\w.%:]*\]|[^\[\]:\s/@,]+)", r"[\w.%]*(:[\w.%]*){2,}", r"(?!0+\b)[0-9]{1,5}"


class Reader:
    """How a flag's value is read: its name in --help, what is expected in words and as a pattern, and text to value."""

    def __init__(self, metavar: str, expected: str, pattern: str, value: Callable) -> None:
        self.metavar, self.expected, self.pattern, self.value = metavar, expected, re.compile(pattern, re.ASCII), value

    def __call__(self, text: str):
        """Raises ArgumentTypeError, for argparse."""
        with contextlib.suppress(ValueError, argparse.ArgumentTypeError):
            if self.pattern.fullmatch(text):
                return self.value(text)
        raise argparse.ArgumentTypeError(f"expected {self.expected}, not {text!a}")


def host_and_port(text: str) -> tuple[str, int]:
    """[HOST]:PORT as a pair, HOST without its brackets. Raises ValueError."""
    host, _, port = text.rpartition(":")
    if int(port) > 65535:
        raise ValueError(text)
    return host.strip("[]"), int(port)


def server_list(text: str) -> list[tuple[str, int]]:
    """HOST[:PORT] of name servers, comma-separated, as pairs. Raises ValueError."""
    parts = [] if text == "none" else re.split(" *, *", text)
    return [host_and_port(part if re.fullmatch(f"{HOST}:{PORT}", part) else f"{part}:53") for part in parts]


def seconds_of(text: str) -> int:
    """1h30m in seconds."""
    units = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    return sum(int(number) * units[unit] for number, unit in re.findall(r"(\d+)([dhms])", text))


# fmt: off
TRUE, TRUTH = ("true", "1", "yes"), ("BOOL", "true, false, 1, 0, yes or no", "(?i)true|false|1|0|yes|no")
listen_endpoint = Reader("[HOST]:PORT", "HOST:PORT, [v6]:PORT or :PORT", f"{HOST}?:[0-9]{{1,5}}", host_and_port)  # port 0: a free one
portal_endpoint = Reader("HOST:PORT", "HOST:PORT or [v6]:PORT", f"{HOST}:{PORT}", host_and_port)
name_servers = Reader("HOST[:PORT],...", "name servers such as 1.1.1.1,192.168.1.1:53, or none", f"({HOST}(:{PORT})?|{V6})( *, *({HOST}(:{PORT})?|{V6}))*", server_list)
networks = Reader("CIDR,...", "networks such as 192.168.1.0/24, comma-separated", ".*", lambda text: [ipaddress.ip_network(part.strip(), strict=False) for part in text.split(",") if text])
duration = Reader("DURATION", "a duration such as 90s, 5m or 1h30m", r"0|(?=\d)(\d{1,6}d)?(\d{1,6}h)?(\d{1,6}m)?(\d{1,6}s)?", seconds_of)
whole_number = Reader("N", "a positive whole number", "[1-9][0-9]{0,5}", int)
file_name = Reader("FILE", "a file", "(?s).*", str)
url_path = Reader("/PATH", "a path that begins with / and is not taken", r"(?!.*[?#])(?!/api/|/-/|/home-assistant\.yaml$)/[!-~]+", str)
mode_name = Reader("MODE", "forward, local or spool", "(?i)forward|local|spool", str.lower)
level_name = Reader("LEVEL", "debug, info, warning or error", "(?i)debug|info|warning|error", str.lower)
boolean = Reader(*TRUTH, lambda text: text.lower() in TRUE)
debug_level = Reader(*TRUTH, lambda text: "debug" if text.lower() in TRUE else "info")
SWITCHES = (boolean, debug_level)  # flags that need no value: --flag is true, --no-flag false

# Every flag of serve, as --help groups them: name, default, reader, attribute in Settings, help. The environment variable
# follows from the name. --debug sets what --log.level sets: the last one counts.
FLAG_GROUPS = (
    ("devices", (
        ("sems.listen-address", ":20001", listen_endpoint, "listen_address", "where devices connect; HOST:PORT, [v6]:PORT or :PORT"),
        ("sems.allow-from", "", networks, "allow_from", "networks whose devices may connect, comma-separated CIDR"),
        ("sems.max-connections", "256", whole_number, "max_connections", "device connections at once"),
        ("sems.max-devices", "256", whole_number, "max_devices", "devices with series of their own"),
        ("metrics.stale-after", "5m", duration, "stale_after", "when the gauges of a silent device go; 0 is never"),
    )),
    ("portal", (
        ("sems.upstream", "tcp.goodwe-power.com:20001", portal_endpoint, "upstream", "the portal"),
        ("sems.upstream-dns", "1.1.1.1,8.8.8.8", name_servers, "upstream_dns", "asked for the portal's address when the system's answer is nothing or not globally routable; none turns it off"),
        ("sems.mode", FORWARD, mode_name, "mode", "forward: the portal answers the devices. local: no portal, the exporter answers. spool: the exporter answers and delivers everything to the portal, however late"),
        ("sems-passthrough", "true", boolean, "passthrough", "the original's switch: false is --sems.mode local, unless that flag or its variable says otherwise"),
        ("batsignal", "false", boolean, "batsignal", "Batman on the portal's graph"),
    )),
    ("files", (
        ("sems.capture", "", file_name, "capture", "append every frame to this file"),
        ("sems.backfill", "", file_name, "backfill", "append buffered readings to this file, for the command backfill"),
        ("sems.spool-file", "", file_name, "spool_file", "mode spool only: a journal of what is not delivered yet, so that it outlives process and machine"),
    )),
    ("HTTP", (
        ("web.listen-address", ":14028", listen_endpoint, "web_address", "where HTTP is served"),
        ("web.telemetry-path", "/metrics", url_path, "telemetry_path", "where the metrics are"),
    )),
    ("log", (
        ("debug", "false", debug_level, "log_level", "the same as --log.level debug"),
        ("log.level", "info", level_name, "log_level", "debug, info, warning or error; one line an event, to stderr"),
    )),
)
# fmt: on
FLAGS = tuple(row for _, rows in FLAG_GROUPS for row in rows)


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
    rule = "A flag is followed by its default and its variable; a BOOL may be --flag, --flag=false or --no-flag."
    parser = Parser(command, f"{about} {rule}", f"python3 sems_mitm.py {command} [flags]")
    for title, rows in FLAG_GROUPS:
        group = parser.add_argument_group(title)
        for name, default, reader, key, text in rows:
            told = f"{text} [{default or ('all' if reader is networks else 'off')}] {variable(name)}"
            how: dict = {"dest": key, "default": default, "type": reader, "metavar": reader.metavar, "help": told}
            if reader in SWITCHES:
                how.update(nargs="?", const="true")
                hidden: dict = {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
                group.add_argument(f"--no-{name}", dest=key, action="store_const", const=reader("false"), **hidden)
            group.add_argument(f"--{name}", **how)
    parser.set_defaults(mode=None)  # --sems-passthrough decides where nobody names the mode
    return parser


def environment_arguments(environment: Mapping) -> list[str]:
    """The variables of flags as arguments. An empty one is unset."""
    given = {name: environment.get(variable(name), "") for name, *_ in FLAGS}
    if given["debug"] and not debug_level.pattern.fullmatch(given["debug"]):  # shells set it to all sorts of things
        log.warning("ignored: DEBUG=%a is neither true nor false", given.pop("debug"))
    return [f"--{name}={text}" for name, text in given.items() if text]


def joined(arguments: list[str]) -> list[str]:
    """Arguments with --flag VALUE as --flag=VALUE: VALUE may begin with a -."""
    valued = {f"--{name}" for name, _, reader, _, _ in FLAGS if reader not in SWITCHES}
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] in valued:
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def serve_settings(arguments: list[str], environment: Mapping, command: str = "serve", about: str = "") -> Settings:
    """The settings of serve: the command line beats the environment, which beats the defaults. Raises UsageError."""
    parser = serve_parser(command, about)
    try:
        settings = parser.parse_args(environment_arguments(environment))
    except UsageError as error:  # of a variable, not of the flag that it stands for
        raise UsageError(re.sub(r"^--([\w.-]+)", lambda flag: variable(flag[1]), str(error))) from None
    parser.parse_args(joined(arguments), settings)
    settings.mode = settings.mode or (FORWARD if settings.passthrough else LOCAL)
    settings.upstream_text = endpoint_text(settings.upstream)
    if settings.spool_file and settings.mode != SPOOL:
        raise UsageError(f"--sems.spool-file={settings.spool_file!a}: only with --sems.mode spool, not {settings.mode}")
    return settings


def zone_trouble() -> tuple[str, str]:
    """What is wrong with this machine's time zone, and what to do about it; empty if nothing is."""
    zone = os.environ.get("TZ")
    if zone_is_known(zone, os.path.isfile):
        return "", ""
    unknown = "TZ is not set, and there is no /etc/localtime"
    trouble = unknown if zone is None else f"TZ={zone} is no time zone that this system knows"
    return trouble, "install the system's time zones (tzdata), or let TZ be a rule such as CET-1CEST,M3.5.0,M10.5.0/3"


def bound(flag: str, address: tuple[str, int], bind: Callable):
    """What bind() makes, which has a port. Raises StartError that names the flag, and how to find the port's owner."""
    try:
        return bind()
    except HOST_ERRORS as error:
        hint = "; `ss -ltnp` shows what has it" if getattr(error, "errno", None) == errno.EADDRINUSE else ""
        raise StartError(f"--{flag}={endpoint_text(address)}: {error.args[-1]}{hint}") from None


def started(settings: Settings, clock: Clock = wall_clock) -> tuple[Store, Loop, Web]:
    """An exporter whose ports are bound and whose HTTP is served; `loop.run` is left to do. Raises StartError."""
    sys.setswitchinterval(0.0005)  # a scrape must not keep packets waiting for the interpreter
    store = Store(settings.stale_after, settings.max_devices, settings.batsignal, clock)
    journal = Journal(settings.spool_file, store) if settings.spool_file else None
    files, history = Files(store, settings.capture, settings.backfill), History(store)
    loop = bound("sems.listen-address", settings.listen_address, lambda: Loop(store, settings, files, journal))
    serving = functools.partial(Web, store, settings, history, lambda: not loop.stopping)
    try:
        web = bound("web.listen-address", settings.web_address, serving)
    except StartError:
        loop.close()
        raise
    loop.own_addresses.update(sock.getsockname()[:2] for sock in web.listening)
    loop.every_second.append(history.note)
    web.start()
    gc.freeze()  # what is there now stays: the collector need not look at it again
    return store, loop, web


def at_signal(stop: Callable[[], None]) -> None:
    """Have SIGTERM and SIGINT stop what runs."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop())


def serve(arguments: list[str]) -> int:
    """The exporter, until SIGTERM or SIGINT; also without a command."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = serve_settings(arguments, os.environ, "serve", f"{serve.__doc__}")
    at_signal(sys.exit)  # a start may take a while: a spool file is read
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logging.getLogger().setLevel(settings.log_level.upper())
    _, loop, web = started(settings)
    at_signal(loop.stop)
    signal.signal(signal.SIGHUP, lambda *_: loop.reopen())
    text = "sems_mitm %s, mode %s: devices connect to port %d, metrics at http://HOST:%d%s"
    log.info(text, VERSION, settings.mode, loop.port, web.port, settings.telemetry_path)
    trouble, step = zone_trouble()
    if trouble:
        log.warning("%s, so local time is unknown and no device's clock is set: %s", trouble, step)
    loop.run()
    web.close()
    return 0


# ------------------------------------------------------------------------------------------------------- simulator


class House:
    """A simulated household with a roof, and a battery if wanted: W and Wh, by a clock that its user moves on."""

    CAPACITY, RESERVE, STRONGEST = 10_000, 1_000, 3_000  # of the battery, Wh and W

    def __init__(self, seed: int, battery: bool) -> None:
        self.random, self.has_battery, self.stored = random.Random(seed), battery, 4_000.0 if battery else 0.0
        self.clock: datetime | None = None
        self.generation = self.load = self.battery = self._cloud = 0.0  # battery: positive while it gives
        self.today, self.uptime = 0.0, 1667.0  # generated, Wh; hours of sun
        self.energy = dict.fromkeys(self.flows(), 0.0)
        self.energy.update({"export": 270_780, "import": 801_550, "generation": 579_410, "load": 1_110_180})

    @property
    def export(self) -> float:
        """What goes to the grid; negative while it is bought."""
        return self.generation - self.load + self.battery

    def flows(self) -> dict[str, float]:
        """Power by the name of the energy that it adds to while it is positive."""
        return {
            "export": self.export, "import": -self.export, "generation": self.generation, "standby": -self.generation,
            "load": self.load, "discharge": self.battery, "charge": -self.battery,
        }  # fmt: skip

    def move(self, clock: datetime) -> None:
        """Let time pass until clock, at the powers of before, and find those of now."""
        if clock == self.clock:  # another of its devices has come here before
            return
        hours = (clock.timestamp() - self.clock.timestamp()) / 3600 if self.clock else 0.0
        for name, power in self.flows().items():
            self.energy[name] += max(power, 0) * hours
        self.stored = min(max(self.stored - self.battery * hours, 0), self.CAPACITY)
        self.today *= self.clock is not None and clock.date() == self.clock.date()
        self.today += max(self.generation, 0) * hours
        self.uptime += hours if self.generation > 0 else 0
        self.clock = clock
        self._weather(clock.hour + clock.minute / 60 + clock.second / 3600)

    def _weather(self, hour: float) -> None:
        self._cloud = min(max(self._cloud + self.random.uniform(-0.12, 0.12), 0), 0.85)
        height = math.sin(math.pi * (hour - 6.5) / 12.5) if 6.5 < hour < 19 else 0
        self.generation = round(3000 * height**1.3 * (1 - 0.8 * self._cloud), 0) if height > 0.02 else -7.0
        evening = 900 * math.exp(-((hour - 19.5) ** 2) / 4) + 700 * math.exp(-((hour - 7.5) ** 2) / 1.5)
        kettle = 1800 if 6 < hour < 22 and self.random.random() < 0.06 else 0
        self.load = round(220 + evening + kettle + self.random.uniform(0, 90), 0)
        lacking = min(max(self.load - self.generation, -self.STRONGEST), self.STRONGEST)
        useful = self.stored > self.RESERVE if lacking > 0 else self.stored < self.CAPACITY
        self.battery = lacking if self.has_battery and useful else 0.0


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
        "inverter_energy_output_hectowatt_hours_day": house.today / 100, "inverter_energy_output_hectowatt_hours_total": house.energy["generation"] / 100, "inverter_uptime_hours_total": house.uptime,
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
        "inverter_energy_output_hectowatt_hours_day": house.today / 100, "inverter_energy_output_hectowatt_hours_total": energy["generation"] / 100, "inverter_uptime_hours_total": house.uptime,
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


# A model that can be simulated: its class, the first half of its serial numbers, the register ranges of its settings packet,
# the first register of its time in a live one (0: none), and what that says.
Simulable = collections.namedtuple("Simulable", "cls start settings clock says")
PORTAL_TEXT = "tcp.goodwe-power.com"
# fmt: off
HOMEKIT = Simulable(METER, "91000HKU", [(4608, (12, *text_words(f"20001,{PORTAL_TEXT}", 15))), (4864, (*text_words("02053-05-000Me05", 8), 0, 4))], 0, meter_says)
DNS = Simulable(GRID_TIED, "53000DSC", [(30221, text_words("410-02065-04", 6)), (40075, text_words(PORTAL_TEXT, 26))], 30100, inverter_says)
HYBRID_ET = Simulable(HYBRID_CLASS, "9010KETU", [(35011, text_words("GW10K-ET", 5)), (35021, text_words("04029-08-S11", 6)), (40075, text_words(PORTAL_TEXT, 26))], 35100, hybrid_says)
# fmt: on


def register_words(name: str, told: dict) -> dict[int, int]:
    """Register to word of what a device of the family `name` says, the inverse of `reading`."""
    found: dict[int, int] = {}
    for value in VALUES[name]:
        metric, labels = value.series
        numbers = told.get(metric, ())
        numbers = numbers if isinstance(numbers, tuple) else (numbers,)
        at = int(re.sub(r"\D", "", labels) or 1) - 1
        if at < len(numbers):
            raw = numbers[at] * value.divide / value.multiply
            is_float = value.number is KINDS["f32"].number
            bits = int.from_bytes(struct.pack(">f", raw), "big") if is_float else round(raw)
            for place in reversed((value.register, *value.later)):
                found[place], bits = bits & 0xFFFF, bits >> 16
            found.update([value.when] if value.when else [])
    return found


class Simulated:
    """A simulated device in a house, and its connection."""

    def __init__(self, model: Simulable, house: House, number: int) -> None:
        self.model, self.house, self.serial = model, house, f"{model.start}{number:08d}"
        self.sock: socket.socket | None = None

    def frame(self, function: int, when: datetime) -> bytes:
        """Its frame as its house is now, with the time `when`; nothing while it is off."""
        cls, clock, stamp, ranges = self.model.cls, self.model.clock, time_stamp(when), self.model.settings
        if function == LIVE:
            found = register_words(family(cls, self.serial), self.model.says(self.house))
            if found and clock:
                found.update(zip(range(clock, clock + 3), struct.unpack(">3H", stamp)))
            ranges = []
            for register, word in sorted(found.items()):
                if not ranges or register != ranges[-1][0] + len(ranges[-1][1]):
                    ranges.append((register, []))
                ranges[-1][1].append(word)
        packet = Packet(OUTBOUND, f"{cls:02x}{function:02x}", self.serial, device_iv(stamp), stamp, payload(ranges))
        return encode(packet) if ranges else b""

    def report(self, target: tuple[str, int], when: datetime) -> None:
        """Send live data, on a new connection behind settings. Raises HOST_ERRORS."""
        live = self.frame(LIVE, when)
        if not live:  # it sleeps
            return self.hang_up()
        if not self.sock:
            self.sock = socket.create_connection(target, timeout=5)
            self.sock.sendall(self.frame(SETTINGS, when))
        self.sock.sendall(live)
        self.sock.settimeout(0)
        with contextlib.suppress(BlockingIOError):
            self.sock.recv(4096)  # the answers; if it is the end, the next packet will fail
        self.sock.settimeout(5)

    def hang_up(self) -> None:
        """Close the connection."""
        if self.sock:
            self.sock.close()
            self.sock = None


def simulated_house(number: int, hybrid: bool = False) -> list[Simulated]:
    """The devices of a house, counted from 0. No two devices of any houses end alike."""
    house, models = House(number, battery=hybrid), (HYBRID_ET,) if hybrid else (HOMEKIT, DNS)
    return [Simulated(model, house, 2 * number + i) for i, model in enumerate(models, 1)]


def simulation(
    target: tuple, devices: list, interval: float, clock: Clock, stamp: Clock, ended: threading.Event
) -> None:
    """Have devices report until it is ended. clock tells their houses' time of day, stamp the one in the packets."""
    troubles = Troubles()
    while not ended.is_set():
        now = time.monotonic()
        for device in devices:
            device.house.move(datetime.fromtimestamp(clock(now)))
            try:
                device.report(target, datetime.fromtimestamp(stamp(now)))
            except HOST_ERRORS as error:
                text = f"simulated devices cannot reach {endpoint_text(target)}: {error}"
                troubles.say("simulator", text, now)
                device.hang_up()
        ended.wait(interval)
    for device in devices:
        device.hang_up()


def day_clock(hour: float, speed: float) -> Clock:
    """A clock that stands at that hour of today now, and goes so many times as fast as the real one."""
    begin, today = time.monotonic(), datetime.now().replace(hour=0, minute=0, second=0, microsecond=0)
    start = (today + timedelta(hours=hour)).timestamp()
    return lambda now: start + speed * (now - begin)


def simulate_capture(path: str, days: float, interval: float, hybrid: bool) -> int:
    """Write what the devices of a house would have sent in the days until now, each packet at its own time."""
    try:
        lines = open(path, "x", encoding="ascii")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--capture={path!a}: expected a new file: {error.strerror}") from None
    devices, end = simulated_house(0, hybrid), time.time()
    wall, function = end - days * 86400, SETTINGS
    with lines:
        while wall <= end:
            for device in devices:
                device.house.move(datetime.fromtimestamp(wall))
                frame = device.frame(function, datetime.fromtimestamp(wall))
                if frame:
                    lines.write(capture_line(wall, "127.0.0.1:1", OUTBOUND.name, "forwarded", frame))
            wall, function = wall + interval, LIVE
    return 0


positive_number = Reader("N", "a number from 0.001 to 99999", r"(?![0.]+$)[0-9]{1,5}(\.[0-9]{1,3})?", float)


def simulate(arguments: list[str]) -> int:
    """Simulated devices towards an exporter or a portal, or a capture file of them."""
    parser = Parser("simulate", simulate.__doc__)
    # fmt: off
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("target", metavar="HOST:PORT", nargs="?", type=portal_endpoint, help="where the devices connect")
    parser.add_argument("--houses", metavar="N", type=whole_number, help="households, each a HomeKit 1000 and a DNS G3 [1]")
    parser.add_argument("--hybrid", action="store_true", help="each a hybrid with a battery and its own meter instead")
    parser.add_argument("--interval", metavar="S", type=positive_number, default=60, help="seconds between packets [60]")
    parser.add_argument("--speed", metavar="N", type=positive_number, default=1, help="how fast their day goes; packets carry real time [1]")
    either.add_argument("--capture", metavar="FILE", help="do not connect, write what a house would have sent to a new FILE")
    parser.add_argument("--days", metavar="N", type=positive_number, default=3, help="length of that capture, until now [3]")
    # fmt: on
    given = parser.parse_args(arguments)
    if given.capture and given.houses:
        raise UsageError("--houses: not with --capture, which is of one house")
    if given.capture:
        return simulate_capture(given.capture, given.days, given.interval, given.hybrid)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    devices = [device for i in range(given.houses or 1) for device in simulated_house(i, given.hybrid)]
    ended = threading.Event()
    at_signal(ended.set)
    where = endpoint_text(given.target)
    print(f"{len(devices)} simulated devices towards {where}; Ctrl-C stops them", flush=True)
    simulation(given.target, devices, given.interval, day_clock(8, given.speed), wall_clock, ended)
    return 0


# ------------------------------------------------------------------------------------------------------------ demo

SUNRISE, FAST = 6.75, 360  # when the demo's day begins, in hours; a day takes four minutes
DEMO_TEXT = """{who} a solar day that takes four minutes; it is 6:45 in the morning.

  open  http://localhost:{web}/               the page
        http://localhost:{web}/metrics        what Prometheus scrapes
        http://localhost:{web}/api/household  the house as JSON

devices -> 127.0.0.1:{devices} -> exporter -> {portal}, a local portal. Ctrl-C stops it all."""


def free_endpoint(host: str, port: int) -> str:
    """HOST:PORT of the first port from `port` on that can be listened on. Raises StartError."""
    for number in range(port, port + 100):
        with contextlib.suppress(OSError):
            for sock in listeners(host, number):
                sock.close()
            return f"{host}:{number}"
    raise StartError(f"no free port from {port} to {port + 99}")


@contextlib.contextmanager
def local_portal() -> Iterator[str]:
    """A stand-in for the portal on this machine, which is an exporter that answers; its HOST:PORT."""
    settings, store = serve_settings(["--sems.mode=local", "--sems.listen-address=127.0.0.1:0"], {}), Store()
    loop = Loop(store, settings, Files(store))
    thread = threading.Thread(target=loop.run, name="portal")
    thread.start()
    try:
        yield f"127.0.0.1:{loop.port}"
    finally:
        loop.stop()
        thread.join()


def demo(arguments: list[str]) -> int:
    """No hardware, no cloud: simulated devices sending a solar day, a local portal, the exporter between them."""
    parser = Parser("demo", demo.__doc__)
    parser.add_argument("--hybrid", action="store_true", help="a hybrid with a battery in place of the two devices")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    devices_at, web_at = free_endpoint("127.0.0.1", 20001), free_endpoint("", 14028)
    flags = [f"--sems.listen-address={devices_at}", f"--web.listen-address={web_at}", "--metrics.stale-after=10s"]
    clock, ended = day_clock(SUNRISE, FAST), threading.Event()
    with local_portal() as portal:
        settings = serve_settings([f"--sems.upstream={portal}", *flags], {})
        _, loop, web = started(settings, clock)
        at_signal(loop.stop)
        what = settings.listen_address, simulated_house(0, given.hybrid), 1, clock, clock, ended
        devices = threading.Thread(target=simulation, args=what)
        devices.start()
        who = "A hybrid with a battery sends" if given.hybrid else "A HomeKit 1000 and a DNS G3 send"
        print(DEMO_TEXT.format(who=who, web=web.port, devices=loop.port, portal=portal), flush=True)
        loop.run()
        ended.set()
        devices.join()
        web.close()
    print("stopped")
    return 0


# ------------------------------------------------------------------------------------------------------ recordings
#
# A file becomes pieces of streams, each with the time at which it was recorded. A recording of packets becomes what its
# GoodWe connections carried: records of pcap or pcapng become packets, packets become TCP segments, segments by their
# sequence numbers streams. Addresses keep connections apart here, and are in nothing that leaves this section.

PORTAL_PORT = (20001).to_bytes(2, "big")
BEGINNINGS = (b"POSTGW\0\0", b"GW\0\0")  # of frames: the caps of the length fields leave their first two bytes 0
LONGEST = {"record": 16 << 20, "line": 1 << 20, "fold": 64 << 10}  # bytes; above it a record is damage
SHORTEST = 16  # bytes that an array or a literal inside a text must have

# What a file lacks, each to how often.
Notes = collections.Counter[str]
CUT_END = "the file ends inside a record"
DAMAGED = "damaged records: {}"
SNAPPED = "packets that the snap length has cut: {}; record them whole, with -s 0"
GAPS = "gaps in the streams, where the recording lacks packets: {}"
TORN = "frames that are not whole at gaps, or where the recording begins or ends, left out: {}"
FRAGMENTS = "fragments of IP packets, which are not put together: {}"
OLD_BLOCKS = "packet blocks of an old kind, which are not read: {}; save the file as pcap"
LINK = "packets of link type {link}, which is not read: {{}}"
FOREIGN = "connections of port 20001 without a frame of GoodWe's, left out: {}"
FOREIGN_LINES = "lines that are no whole lines of a capture, passed over: {}"
LEFT_OUT = "pieces between good frames that can hold anything, left out: {}"

# captured: seconds since 1970, None if not known; wire, kind, data: of a piece; where: a sequence number
Recorded = collections.namedtuple("Recorded", "captured wire kind data where", defaults=(0,))
# time: seconds since 1970, None if not known; link: the type of its link; size: before the snap length cut it
RecordedPacket = collections.namedtuple("RecordedPacket", "time link data size")
# source, target: address and port; seq: the sequence number of data's first byte; syn: 1 or 0; cut: bytes missing, if > 0
Segment = collections.namedtuple("Segment", "source target seq syn data cut")

# fmt: off
PCAP = {  # the first four bytes: byte order, seconds of a unit of the fraction
    b"\xd4\xc3\xb2\xa1": ("<", 1e-6), b"\xa1\xb2\xc3\xd4": (">", 1e-6), b"\x4d\x3c\xb2\xa1": ("<", 1e-9), b"\xa1\xb2\x3c\x4d": (">", 1e-9),
}
MODIFIED_PCAP = (b"\x34\xcd\xb2\xa1", b"\xa1\xb2\xcd\x34")
PCAPNG, ORDERS = b"\n\r\r\n", {b"\x4d\x3c\x2b\x1a": "<", b"\x1a\x2b\x3c\x4d": ">"}
INTERFACE_BLOCK, OLD_BLOCK, SIMPLE_BLOCK, ENHANCED_BLOCK = 1, 2, 3, 6
LINKS = {  # link type: where the type of its contents stands (-1: nowhere), where they begin
    1: (12, 14), 113: (14, 16), 276: (0, 20), 0: (-1, 4), 108: (-1, 4), **dict.fromkeys((12, 14, 101, 228, 229), (-1, 0)),
}
VLAN_TAGS, IP_TYPES, ARP = (b"\x81\0", b"\x88\xa8", b"\x91\0"), (b"\x08\0", b"\x86\xdd"), b"\x08\6"
LOOPBACK_FAMILIES = (b"\2", b"\x0a", b"\x18", b"\x1c", b"\x1e")  # in a loopback header: IPv4, and IPv6 of several systems
IPV4, IPV6, TCP = struct.Struct(">BxH2xHxB2x4s4s"), struct.Struct(">4xHBx16s16s"), struct.Struct(">2s2sI4xBB")
IPV6_EXTENSIONS = {0: (8, 8), 43: (8, 8), 60: (8, 8), 51: (4, 8), 44: (0, 8)}  # bytes a unit of its length, and beside it
# fmt: on


def pcap_packets(file: BinaryIO, notes: Notes) -> Iterator[RecordedPacket]:
    """The packets of a pcap file. Raises ProtocolError for a header that is cut."""
    order, unit = PCAP[file.read(4)]
    header, record = file.read(20), struct.Struct(order + "4I")
    if len(header) < 20:
        raise ProtocolError("a pcap file without a whole header", header)
    link = struct.unpack_from(order + "I", header, 16)[0] & 0xFFFF  # above it: whether checksums follow the packets
    while len(head := file.read(16)) == 16:
        seconds, fraction, size, length = record.unpack(head)
        if size > LONGEST["record"]:
            notes[DAMAGED] += 1
            return
        data = file.read(size)
        if len(data) < size:
            break
        yield RecordedPacket(seconds + fraction * unit, link, data, length)
    notes.update([CUT_END] if head else [])


def pcapng_packets(file: BinaryIO, notes: Notes) -> Iterator[RecordedPacket]:
    """The packets of a pcapng file: of all its sections and interfaces."""
    order, interfaces = "<", []  # type: ignore[var-annotated]
    while len(head := file.read(8)) == 8:
        magic = file.read(4) if head.startswith(PCAPNG) else b""
        if magic:
            order, interfaces = ORDERS.get(magic, ""), []
        kind, size = struct.unpack(order + "2I", head)
        if not order or not 12 <= size <= LONGEST["record"]:
            notes[DAMAGED] += 1
            return
        body = magic + file.read(size - 8 - len(magic))
        if len(body) < size - 8:
            break
        try:
            if kind == INTERFACE_BLOCK:
                interfaces.append(interface(body, order))
            elif kind in (ENHANCED_BLOCK, SIMPLE_BLOCK):
                yield block_packet(kind, body, order, interfaces)
            elif kind == OLD_BLOCK:
                notes[OLD_BLOCKS] += 1
        except (IndexError, struct.error):
            notes[DAMAGED] += 1
    notes.update([CUT_END] if head else [])


def interface(body: bytes, order: str) -> tuple[int, int, float, int]:
    """Link type, snap length, seconds of a unit of time, seconds to add to it: of an interface description block."""
    link, snap_length = struct.unpack_from(order + "HxxI", body)
    unit, seconds, at = 1e-6, 0, 8
    while at + 8 <= len(body):  # the block's length ends it
        code, size = struct.unpack_from(order + "HH", body, at)
        value = body[at + 4 : at + 4 + size]
        if code == 9 and value:
            unit = (2.0 if value[0] & 0x80 else 10.0) ** -(value[0] & 0x7F)
        elif code == 14 and len(value) == 8:
            (seconds,) = struct.unpack(order + "q", value)
        at += 4 + size + -size % 4
    return link, snap_length, unit, seconds


def block_packet(kind: int, body: bytes, order: str, interfaces: list) -> RecordedPacket:
    """The packet of a pcapng block. Raises IndexError, struct.error for nonsense."""
    if kind == SIMPLE_BLOCK:
        (length,) = struct.unpack_from(order + "I", body)
        link, snap_length, _, _ = interfaces[0]
        return RecordedPacket(None, link, body[4 : min(4 + min(length, snap_length or length), len(body) - 4)], length)
    which, high, low, size, length = struct.unpack_from(order + "5I", body)
    link, _, unit, seconds = interfaces[which]
    return RecordedPacket((high << 32 | low) * unit + seconds, link, body[20 : min(20 + size, len(body) - 4)], length)


def ip_start(link: int, data: bytes) -> int:
    """Where the IP packet in a packet begins, behind VLAN tags; -1 if there is none."""
    kind, at = LINKS[link]
    while kind >= 0 and data[kind : kind + 2] in VLAN_TAGS:
        kind, at = at + 2, at + 4
    return at if kind < 0 or data[kind : kind + 2] in IP_TYPES else -1


def segment(packet: RecordedPacket, notes: Notes) -> Segment | None:
    """The TCP segment in a packet. Raises IndexError, struct.error for a packet that ends inside its headers."""
    data, at = packet.data, ip_start(packet.link, packet.data)
    version = data[at] >> 4 if at >= 0 else 0
    if version == 4:
        first, size, fragment, protocol, source, target = IPV4.unpack_from(data, at)
        at, end, fragment = at + (first & 15) * 4, at + size if size else packet.size, fragment & 0x1FFF
    elif version == 6:
        size, protocol, source, target = IPV6.unpack_from(data, at)
        at, end, fragment = at + 40, at + 40 + size if size else packet.size, 0
        while protocol in IPV6_EXTENSIONS and not fragment:
            unit, more = IPV6_EXTENSIONS[protocol]
            fragment = struct.unpack_from(">2xH", data, at)[0] & 0xFFF8 if protocol == 44 else 0
            protocol, at = data[at], at + more + unit * data[at + 1]
    if version not in (4, 6) or protocol != socket.IPPROTO_TCP or fragment:
        notes[FRAGMENTS] += version in (4, 6) and protocol == socket.IPPROTO_TCP
        return None
    source_port, target_port, seq, header, flags = TCP.unpack_from(data, at)
    syn = flags >> 1 & 1  # it has a sequence number of its own, before the data's
    payload = data[at + (header >> 4) * 4 : end]
    return Segment(source + source_port, target + target_port, (seq + syn) & 0xFFFFFFFF, syn, payload, end - len(data))


class Flow:
    """What one end of a connection sent: bytes as they came, and of each segment its place in the stream, size and time."""

    __slots__ = ("_end", "data", "first", "is_whole", "places", "sizes", "source", "target", "times")

    def __init__(self, source: bytes, target: bytes, first: int, is_whole: bool) -> None:
        self.source, self.target = source, target
        self.first, self.is_whole = first, is_whole  # the sequence number of place 0; whether that is the first byte
        self.data, self.places, self.sizes, self.times = bytearray(), array("q"), array("I"), array("d")
        self._end = 0  # of the segment that is furthest on

    def add(self, seq: int, data: bytes, time: float) -> None:
        """Keep a segment. Sequence numbers wrap around: it belongs where it is nearest to what came before."""
        place = self._end + ((seq - self.first - self._end + (1 << 31)) & 0xFFFFFFFF) - (1 << 31)
        self._end = max(self._end, place + len(data))
        self.data += data
        self.places.append(place)
        self.sizes.append(len(data))
        self.times.append(time)

    def wire(self) -> Wire:
        """The direction: towards port 20001 or away from it; otherwise, or between two of them, as the frames say."""
        to, back = (name.endswith(PORTAL_PORT) for name in (self.target, self.source))
        return OUTBOUND if (to if to != back else BEGINNINGS[0] in self.data) else INBOUND

    def stretches(self) -> Iterator[tuple[int, bytearray, array, array]]:
        """Runs of bytes without a gap: place, bytes, where in them segments end, when all up to there had come."""
        starts = array("Q", itertools.accumulate(self.sizes, initial=0))
        order = array("Q", sorted(range(len(self.places)), key=self.places.__getitem__))
        place = self.places[order[0]]
        place = end = 0 if self.is_whole and place >= -1 else place  # at -1 stands the byte of a keep-alive probe
        run, ends, times = bytearray(), array("Q"), array("d")
        for i in order:
            if self.places[i] > end:
                yield place, run, ends, times
                place = end = self.places[i]
                run, ends, times = bytearray(), array("Q"), array("d")
            new = self.places[i] + self.sizes[i] - end  # bytes that no segment before it held
            if new > 0:
                run += self.data[starts[i + 1] - new : starts[i + 1]]
                end += new
                ends.append(len(run))
                times.append(max(self.times[i], times[-1] if times else 0))
        yield place, run, ends, times

    def pieces(self, notes: Notes) -> Iterator[Recorded]:
        """The pieces of the stream, without those that a gap or an end of the recording tore."""
        wire = self.wire()
        for number, (place, data, ends, times) in enumerate(self.stretches()):
            notes[GAPS] += number > 0
            at = 0
            for kind, part, is_unfinished in merged(cut(wire, data)):
                begins_inside = kind == JUNK and not at and (number or not self.is_whole)
                at += len(part)
                if begins_inside or (is_unfinished and kind not in (FRAME, KEEPALIVE)):
                    notes[TORN] += 1
                else:
                    where = (self.first + place + at) & 0xFFFFFFFF
                    yield Recorded(times[bisect.bisect_left(ends, at)], wire, kind, part, where)


def connections(packets: Iterable[RecordedPacket], notes: Notes) -> list[list[Flow]]:
    """The flows of each connection to or from port 20001, or with a segment that begins like a frame."""
    flows: dict[bytes, Flow] = {}
    begun: dict[bytes, int] = {}  # after a SYN, until data comes: the sequence number of the first byte
    found: dict[bytes, list[Flow]] = collections.defaultdict(list)
    elsewhere = False  # such a connection has other ports: its packets cannot be picked out at a glance
    for number, packet in enumerate(packets):
        if packet.link not in LINKS:
            notes[LINK.format(link=packet.link)] += 1
        if packet.link not in LINKS or not (elsewhere or PORTAL_PORT in packet.data or BEGINNINGS[1] in packet.data):
            continue
        try:
            part = segment(packet, notes)
        except (IndexError, struct.error):  # the packet ends inside its headers
            notes[SNAPPED] += packet.size > len(packet.data)
            continue
        if not part:
            continue
        way, back = part.source + part.target, part.target + part.source
        at_port = PORTAL_PORT in (part.source[-2:], part.target[-2:])
        if at_port or way in flows or back in flows or part.data.startswith(BEGINNINGS):
            elsewhere |= not at_port
            notes[SNAPPED] += part.cut > 0
            if part.syn:
                begun[way] = part.seq
            if part.data:
                first, flow = begun.pop(way, None), flows.get(way)
                if flow is None or first not in (None, flow.first):  # the port is new, or used again
                    flow = flows[way] = Flow(
                        part.source, part.target, part.seq if first is None else first, first is not None
                    )
                    found[min(way, back)].append(flow)
                flow.add(part.seq, part.data, number * 1e-9 if packet.time is None else packet.time)
    return list(found.values())


def conversations(packets: Iterable[RecordedPacket], notes: Notes) -> Iterator[Recorded]:
    """What devices and the portal said in packets, in the order of time; what was recorded twice, once."""
    found: list[Recorded] = []
    waiting = connections(packets, notes)
    while waiting:  # what is done with is let go: a recording can be large
        flows, lacks, before = waiting.pop(), collections.Counter(), len(found)  # type: ignore[var-annotated]
        is_ours = any(BEGINNINGS[1] in flow.data for flow in flows)
        while flows:
            found += flows.pop(0).pieces(lacks)
        if is_ours or any(piece.kind != JUNK for piece in found[before:]):
            notes.update(lacks)
        else:
            del found[before:]
            notes[FOREIGN] += 1
    found.sort(key=lambda piece: piece.captured)
    recent: collections.deque[tuple[int, bytes]] = collections.deque(maxlen=64)  # another interface's, behind NAT too
    for piece in found:
        if (piece.where, piece.data) not in recent:
            recent.append((piece.where, piece.data))
            yield piece._replace(captured=piece.captured if piece.captured >= 86400 else None)


def cut(wire: Wire, data: bytes | bytearray) -> Iterator[tuple[str, bytes, bool]]:
    """The pieces of a stream: kind, bytes, and whether it is what the end of the stream left unfinished."""
    framer = Framer(wire)
    for at in range(0, len(data), RECV_SIZE):
        yield from ((*piece, False) for piece in framer.feed(bytes(data[at : at + RECV_SIZE]), 0))
    yield from ((*piece, True) for piece in framer.close())


def merged(pieces: Iterable[tuple[str, bytes, bool]]) -> Iterator[tuple[str, bytes, bool]]:
    """Pieces with what goes on with another."""
    kind, parts, is_unfinished = "", [], False  # type: ignore[var-annotated]
    for piece in pieces:
        if piece[0] != MORE and parts:
            yield kind, b"".join(parts), is_unfinished
            parts = []
        if not parts:
            kind, _, is_unfinished = piece
        parts.append(piece[1])
    if parts:
        yield kind, b"".join(parts), is_unfinished


def pieces_of(direction: str, data: bytes, captured: float | None = None) -> Iterator[Recorded]:
    """The pieces of captured bytes: of their direction, or of both if that is not known ("")."""
    wire = INBOUND if direction == INBOUND.name else OUTBOUND
    for kind, part, _ in merged(cut(wire, data)):
        inward = [] if direction or kind == FRAME else list(merged(cut(INBOUND, part)))
        if any(each in (FRAME, KEEPALIVE) for each, _, _ in inward):
            yield from (Recorded(captured, INBOUND, each, data) for each, data, _ in inward)
        else:
            yield Recorded(captured, wire, kind, part)


# Text. A line of a dump is an offset, hex, and often the bytes as text; xxd and tcpdump put a colon behind the offset.
DUMP_LINE = re.compile(r"(\s*)(?:0x)?([0-9a-f]{4,8})(?:(:)(?=\s)|(?=\s|$))\s*(.*)", re.I)
DUMP_BYTES = re.compile(
    r"((?:(?:[0-9a-f]{2})+(?: (?!\s)|(?=\s|$)))*)(?: {1,2}([0-9a-f]{2}(?: [0-9a-f]{2}){0,7})(?=\s|$))?", re.I
)
ONLY_HEX = re.compile(r"\s*[0-9a-f]{2,}(\s+[0-9a-f]{2,})*\s*", re.I)
HEX_RUN = re.compile(r"(?<!\w)[0-9a-f]{2}(?:[\s,:;-]*[0-9a-f]{2}){11,}", re.I)
LITERAL = re.compile(r"""(["'])((?:\\.|(?!\1)[^\\])*)(?:\1|$)""", re.S)
ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|([0-7]{1,3})|(.))", re.S | re.I)
SEPARATORS = str.maketrans("", "", " \t\r\n\f\v,:;|\"'-")
C_BYTE = re.compile(r"\b0x([0-9a-f]{1,2})\b", re.I)
ESCAPED = dict(zip("abfnrtv", "\a\b\f\n\r\t\v"))


def line_bytes(text: str) -> bytes:
    """The bytes in a line of a dump, behind its offset: up to two blanks, which can also stand between two halves."""
    first, second = DUMP_BYTES.match(re.split(r"[|>]", text)[0]).groups()  # type: ignore[union-attr]
    found = bytes.fromhex(first)
    return found + bytes.fromhex(second) if second and len(found) == 8 else found


def number_of(offset: str, base: int) -> int:
    """An offset in a dump as a number, -1 if it has other digits than the base."""
    return int(offset, base) if max(int(digit, 16) for digit in offset) < base else -1


def dumps(text: str) -> list[bytes]:
    """What the dumps in a text hold: an offset of 0 begins another, indented or not; [] if it is no text with dumps.

    An offset is hex, octal or decimal: the base in which it is the number of bytes so far. A `*` stands for equal lines.
    """
    found: list[bytearray] = []
    current: dict[str, bytearray] = {}  # by indentation: a dump of both directions indents one
    base, last, is_folded = 0, b"", False
    for line in (match[0] for match in re.finditer(r"[^\r\n]+", text)):
        match = DUMP_LINE.match(line)
        indent, offset, colon, rest = match.groups("") if match else ("", "", "", "")
        part, dump = line_bytes(rest), current.get(indent)
        if offset and dump and is_folded:
            place = number_of(offset, base or (8 if len(offset) == 7 else 16))
            dump += last * ((min(place, LONGEST["fold"]) - len(dump)) // len(last))
        bases = [each for each in (16, 8, 10) if offset and dump and number_of(offset, each) == len(dump)]
        if bases and dump:
            dump += part
            base = bases[0]
        elif part and (colon or not int(offset, 16)):
            current[indent] = bytearray(part)
            found.append(current[indent])
        elif not found and ONLY_HEX.fullmatch(line):
            return []
        last, is_folded = part or last, line.strip() == "*"
    return [bytes(dump) for dump in found]


def unescaped(match: re.Match) -> str:
    r"""The character of an escape, as C and Python have them: \x0a, \12, \n."""
    digits, octal, other = match.groups()
    return chr(int(digits, 16)) if digits else chr(int(octal, 8) & 0xFF) if octal else ESCAPED.get(other, other)


def from_hex(text: str) -> bytes:
    """Bytes of hex digits in any spacing, nothing for anything else."""
    with contextlib.suppress(ValueError):
        return bytes.fromhex(text.replace("0x", "").replace("0X", "").replace("\\x", "").translate(SEPARATORS))
    return b""


def from_text(text: str) -> list[bytes]:
    """The bytes in a text without dumps, one after another: hex, literals with escapes, arrays of C, hex in sentences."""
    plain = from_hex(text)
    if plain:
        return [plain]
    literals = [match[2] for match in LITERAL.finditer(text) if "\\x" in match[2]] if "\\x" in text else []
    arrays = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.S).split("}") if re.search("0x", text, re.I) else []
    found = [ESCAPE.sub(unescaped, "".join(literals)).encode("latin-1", "replace")]
    found += (bytes(int(match[1], 16) for match in C_BYTE.finditer(part)) for part in arrays)
    found += filter(lambda data: BEGINNINGS[1] in data, map(from_hex, HEX_RUN.findall(text)))
    return [data for data in found if len(data) >= SHORTEST]


def is_ip(data: bytes) -> bool:
    """Whether bytes look like an IP packet."""
    is_v6 = len(data) >= 40 and data[0] >> 4 == 6 and data[6] in (socket.IPPROTO_TCP, 17, 58, *IPV6_EXTENSIONS)
    return is_v6 or (len(data) >= 20 and 0x45 <= data[0] <= 0x4F)


def link_of(data: bytes) -> int | None:
    """The link type of a packet in a dump, from what stands where; None for what is no packet."""
    if data.startswith(BEGINNINGS):
        return None
    for link in (1, 113, 276):
        at = LINKS[link][0]
        if data[at : at + 2] in (*IP_TYPES, *VLAN_TAGS, ARP) and (at or data[2:4] == b"\0\0"):
            return link
    return 101 if is_ip(data) else 0 if data[:4].strip(b"\0") in LOOPBACK_FAMILIES and is_ip(data[4:]) else None


def text_pieces(text: str, notes: Notes) -> Iterator[Recorded]:
    """The pieces in what people paste. Raises ProtocolError if there is nothing of the kind."""
    dumped, packets, streams = dumps(text), [], []
    for data in dumped or from_text(text):
        link = link_of(data)
        if link is not None:
            packets.append(RecordedPacket(None, link, data, len(data)))
        elif not dumped or BEGINNINGS[1] in data:
            streams.append(data)
    if not packets and not streams and not dumped:
        raise ProtocolError("text without bytes in hex" if text.strip() else "nothing in it")
    yield from conversations(packets, notes)
    for data in streams:
        yield from shown_pieces(data, notes, is_known=not dumped or data.startswith(BEGINNINGS))


def shown_pieces(data: bytes, notes: Notes, is_known: bool) -> Iterator[Recorded]:
    """The pieces of bytes; if it is not known what they are, good frames alone: addresses can stand between them."""
    for piece in pieces_of("", data):
        if is_known or piece.kind == FRAME:
            yield piece
        else:
            notes[LEFT_OUT] += 1


def capture_pieces(file: BinaryIO, notes: Notes) -> Iterator[Recorded]:
    """The pieces in the lines of a capture file, or of what decode printed. Raises ProtocolError if no line is whole."""
    is_empty = True
    while line := file.readline(LONGEST["line"]):
        line = line.strip(b"\0\xef\xbb\xbf\r\n")
        try:
            entry = json.loads(line)
            data, direction = bytes.fromhex(entry["hex"]), str(entry.get("direction", ""))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            notes[FOREIGN_LINES] += bool(line.strip())
            continue
        is_empty = False
        yield from pieces_of(direction, data, captured_at(entry))
    if is_empty:
        raise ProtocolError("not a whole line of a capture in it")


def captured_at(entry: dict) -> float | None:
    """When a line was captured, None if it does not say that with its zone."""
    with contextlib.suppress(ValueError, OverflowError):
        when = datetime.fromisoformat(str(entry.get("captured") or entry.get("time")).replace("Z", "+00:00"))
        return when.timestamp() if when.tzinfo else None
    return None


class Unzipped(io.RawIOBase):
    """A gzipped file as it was; where it is cut or damaged, it ends."""

    def __init__(self, file: BinaryIO, notes: Notes) -> None:
        super().__init__()
        import gzip  # the exporter never needs it

        self._file, self._notes = gzip.GzipFile(fileobj=file), notes

    def readable(self) -> bool:
        """As io.BufferedReader asks."""
        return True

    def readinto(self, buffer) -> int:
        """Fill a buffer, or a part of it; how much."""
        data = b""
        try:
            data = self._file.read1(len(buffer))
        except (EOFError, OSError, zlib.error) as error:
            if getattr(error, "errno", None):  # the system's, not gzip's
                raise
            self._notes[CUT_END] = 1
        buffer[: len(data)] = data
        return len(data)


def recording(raw: BinaryIO, notes: Notes) -> Iterator[Recorded]:
    """The pieces in a file: packets, lines of a capture, frames as they are, or text; gzipped or not.

    Raises ProtocolError if it is nothing of the kind.
    """
    with io.BufferedReader(raw, RECV_SIZE) as plain:  # type: ignore[type-var]
        is_zipped = plain.peek().startswith(b"\x1f\x8b")
        file = io.BufferedReader(Unzipped(plain, notes), RECV_SIZE) if is_zipped else plain
        head = file.peek()
        if head[:4] in PCAP:
            yield from conversations(pcap_packets(file, notes), notes)
        elif head.startswith(PCAPNG):
            yield from conversations(pcapng_packets(file, notes), notes)
        elif head.startswith(MODIFIED_PCAP):
            raise ProtocolError("a modified pcap file, which is not read: save it as pcap")
        elif re.search(rb'(?m)^[\0\xef\xbb\xbf\s]*\{.*"hex"', head):
            yield from capture_pieces(file, notes)
        else:
            yield from other_pieces(file.read(), notes)


def other_pieces(data: bytes, notes: Notes) -> Iterator[Recorded]:
    """The pieces in text, or in bytes as they are. Raises ProtocolError."""
    is_utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    if is_utf16 or not re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", data):
        text = data.decode("utf-16" if is_utf16 else "latin-1", "replace")
        del data  # a text is held once
        yield from text_pieces(text, notes)
    elif BEGINNINGS[1] in data:
        yield from shown_pieces(data, notes, is_known=data.startswith(BEGINNINGS))
    else:
        raise ProtocolError("neither a recording nor text")


# ---------------------------------------------------------------------------------------------------------- decode


def called(path: str) -> str:
    """A file's name in a message."""
    return "standard input" if path == "-" else path


def recorded(path: str, notes: Notes) -> Iterator[Recorded]:
    """The pieces in a file, or in standard input (-). Raises UsageError if it cannot be read, StartError for another's."""
    if path == "-" and (not sys.stdin or sys.stdin.buffer.closed):
        raise UsageError("standard input is closed")
    try:
        with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
            yield from recording(file, notes)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None
    except ProtocolError as error:
        raise StartError(f"{called(path)}: {error}") from None


def missing(notes: Notes) -> list[str]:
    """What a recording lacks, in words; what the snap length explains is not said again."""
    explained = {GAPS, TORN} if notes[SNAPPED] else set()
    return [text.format(count) for text, count in notes.items() if count and text not in explained]


def good_packets(pieces: Iterable[Recorded]) -> Iterator[tuple[bytes, Packet]]:
    """The good frames among pieces, with their packets."""
    for piece in pieces:
        with contextlib.suppress(ProtocolError):
            if piece.kind == FRAME:
                yield piece.data, decode(piece.data, piece.wire)


def frames_in(path: str) -> dict[bytes, Packet]:
    """The good frames in a file with their packets; says what the file lacks. Raises StartError if there are none."""
    notes: Notes = collections.Counter()
    found = dict(good_packets(recorded(path, notes)))
    if not found:
        raise StartError(f"{called(path)}: {'; '.join(['not a single good frame in it', *missing(notes)])}")
    for text in missing(notes):
        print(f"{called(path)}: {text}", file=sys.stderr)
    return found


def told_models(packets: Iterable[Packet]) -> dict[str, str]:
    """Serial number to the model name that the device gave."""
    told: dict[str, str] = {}
    for packet in packets:
        if packet.wire is OUTBOUND:
            with contextlib.suppress(ProtocolError):
                told[packet.serial] = info(registers(packet.clear)).get("model") or told.get(packet.serial, "")
    return told


def contents(where: Address, packet: Packet) -> dict:
    """blocks and values of a packet. Raises ProtocolError."""
    clear = packet.clear
    if packet.wire is INBOUND:
        told: dict = {"meaning": allowed(where, clear, {where.cls, *CLOCK}) or "not let through"}
        if where.type == CLOCK_TYPE:
            when = device_time(clear[4:10])
            told.update(zip(("first_register", "last_register"), struct.unpack_from(">HH", clear)))
            told.update(clock=when and when.isoformat())
        return {"values": {**told, "clear": clear.hex()}}
    if where.function == CONFIRMATION:
        first, last, status = struct.unpack_from(">HHB", clear)
        return {"values": {"first_register": first, "last_register": last, "status": status}}
    if where.function not in DATA:
        return {"values": {"clear": clear.hex()}}
    ranges = blocks(clear)
    taken = reading(family(where.cls, where.serial), registers(clear))
    values = {f"{metric}{{{labels}}}" if labels else metric: n for (metric, labels), n in taken.values.items()}
    unknown = f"{kind_of(where.cls)}_unknown_register"
    values.update((f'{unknown}{{register="{register}"}}', word) for register, word in taken.unknown.items())
    shown = [{"first": first, "last": first + len(words) - 1, "words": list(words)} for first, words in ranges]
    return {"blocks": shown, "values": {**values, **taken.info}}


SAID = [
    "direction",
    "type",
    "serial",
    "model",
    "time",
    "captured",
    "crc_ok",
    "envelope",
    "blocks",
    "values",
    "error",
    "hex",
]
ENVELOPES = {LONG: "long", SHORT: "short", ANSWER: "answer"}


def utc_text(seconds: float | None) -> str | None:
    """Seconds since 1970 in ISO 8601, None for what no clock shows."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return (
            datetime.fromtimestamp(round(seconds, 6), timezone.utc).isoformat(timespec="microseconds")
            if seconds
            else None
        )
    return None


def described(piece: Recorded, models: dict[str, str]) -> dict:
    """A piece as decode prints it. models: serial number to the name that the device gave so far; a new one is kept."""
    captured, wire, kind, data, _ = piece
    found: dict = dict.fromkeys(SAID)
    found.update(direction=wire.name, type=kind, captured=utc_text(captured), hex=data.hex())
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


def renamed(data: bytes, packet: Packet, aliases: dict[str, str]) -> bytes:
    """A frame with other serial numbers. The cipher does not depend on the one in the envelope."""
    clear, alias = packet.clear, aliases[packet.serial]
    for serial, other in aliases.items():
        clear = clear.replace(serial.encode(), other.encode())
    if clear != packet.clear:
        return encode(packet._replace(serial=alias, clear=clear))
    at = address_of(data, packet.wire).form.serial
    frame = data[:at] + alias.encode() + data[at + len(alias) : -2]
    return frame + crc16(frame).to_bytes(2, packet.wire.order)


def redacted(pieces: Iterable[Recorded]) -> list[Recorded]:
    """The good frames among pieces with other serial numbers, in clear and in cipher; says how many others there were."""
    kept, others = [], 0
    for piece in pieces:
        good = [packet for _, packet in good_packets([piece])]
        kept += [(piece, packet) for packet in good]
        others += not good
    serials = dict.fromkeys(packet.serial for _, packet in kept)
    aliases = {serial: f"{serial[:8]}XXXX{number:04d}" for number, serial in enumerate(serials, 1)}
    left_out = f"{len(kept)} good frames, {others} other pieces left out."
    if kept:
        print(left_out, "XXXX0001, XXXX0002, ... count the devices up and are no real serial numbers.", file=sys.stderr)
    return [piece._replace(data=renamed(piece.data, packet, aliases)) for piece, packet in kept]


def decode_command(arguments: list[str]) -> int:
    """Recorded traffic or pasted hex as one JSON object a frame."""
    parser = Parser("decode", decode_command.__doc__)
    sources = (
        "capture files, pcap and pcapng files, files with hex or dumps, gzipped or not, - for standard input; or hex"
    )
    parser.add_argument("source", metavar="FILE|-|HEX", nargs="+", help=sources)
    good_only = "good frames only, with other serial numbers, for a bug report"
    parser.add_argument("--redact", action="store_true", help=good_only)
    given = parser.parse_args(arguments)
    typed = " ".join(source for source in given.source if source != "-" and not os.path.exists(source))
    files: list[tuple[str, Notes]] = [
        (source, collections.Counter()) for source in given.source if source == "-" or os.path.exists(source)
    ]
    typed_pieces = list(typed_hex(typed)) if typed else []
    pieces: Iterable[Recorded] = itertools.chain(*(recorded(path, notes) for path, notes in files), typed_pieces)
    models: dict[str, str] = {}
    where, good = ", ".join([called(path) for path, _ in files] + ["the hex given"] * bool(typed)), 0
    for piece in redacted(pieces) if given.redact else pieces:
        said = described(piece, models)
        good += piece.kind == FRAME and said["serial"] is not None
        print(json.dumps(said))
    lines = [f"{called(path)}: {text}" for path, notes in files for text in missing(notes)]
    if not good:
        raise StartError("; ".join([f"not a single good frame in {where}", *lines]))
    for line in lines:
        print(line, file=sys.stderr)
    return 0


def typed_hex(text: str) -> Iterator[Recorded]:
    """The pieces of what stands on the command line. Raises UsageError."""
    try:
        yield from text_pieces(text, collections.Counter())
    except ProtocolError:
        raise UsageError(f"neither a file nor whole bytes in hex: {text[:40]!a}") from None


# -------------------------------------------------------------------------------------------------------- backfill

Samples = dict[str, dict[str, dict[float, float]]]  # metric to series (labels) to seconds since 1970 to number


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


def samples_of(packets: list[Packet], extra: str) -> Samples:
    """The readings in packets. No packet stands there twice."""
    found: Samples = {metric: {} for metric in sorted(METRICS)}
    told, by_device = told_models(packets), collections.defaultdict(list)
    for packet in packets:
        when = device_time(packet.time)
        if when and int(packet.type[2:], 16) in (LIVE, BUFFERED):
            by_device[packet.type, packet.serial].append((when, packet))
    for (kind, serial), several in by_device.items():
        cls = int(kind[:2], 16)
        labels_of_device = device_labels(identity(kind_of(cls), serial, told.get(serial, "")))
        for (_, packet), seconds in zip(several, utc_seconds([when for when, _ in several])):
            with contextlib.suppress(ProtocolError):
                for (metric, labels), number in reading(family(cls, serial), registers(packet.clear)).values.items():
                    series = ",".join(filter(None, (labels_of_device, labels, extra)))
                    found[metric].setdefault(series, {})[seconds] = number
    return found


def openmetrics(found: Samples) -> Iterator[str]:
    """OpenMetrics text: families together, the samples of a series by time, # EOF at the end."""
    for metric, series in found.items():
        if series:
            kind, meaning = METRICS[metric]
            name = metric[: -len("_total")] if kind == "counter" else metric
            yield f"# HELP {name} {meaning}\n# TYPE {name} {kind}\n"
        for labels, samples in series.items():
            yield from (f"{metric}{{{labels}}} {samples[at]} {at:.0f}\n" for at in sorted(samples))
    yield "# EOF\n"


OWN_LABELS = "|".join([*DEVICE_LABELS.split(", "), *(row.labels.split(" ")[0] for row in QUANTITIES if row.labels)])
NEW_LABEL = rf"(?s)(?!__|({OWN_LABELS})=)[a-zA-Z_][a-zA-Z0-9_]*=.+"
extra_label = Reader("", "NAME=VALUE with a name that no series has", NEW_LABEL, lambda text: text.split("=", 1))


def backfill(arguments: list[str]) -> int:
    """Captures and recordings as OpenMetrics text for promtool tsdb create-blocks-from openmetrics."""
    parser = Parser("backfill", backfill.__doc__)
    # fmt: off
    parser.add_argument("file", metavar="FILE", nargs="+", help="files of --sems.backfill or --sems.capture, or recordings as decode takes them; - for standard input")
    parser.add_argument("--job", help="value of a label job, as your Prometheus gives it to this exporter")
    parser.add_argument("--instance", help="value of a label instance")
    parser.add_argument("--label", metavar="NAME=VALUE", type=extra_label, action="append", default=[], help="another label that your Prometheus adds; repeatable")
    # fmt: on
    given = parser.parse_args(arguments)
    trouble, step = zone_trouble()
    if trouble:
        raise StartError(f"{trouble}, so the times would be wrong: {step}")
    frames: dict[bytes, Packet] = {}
    for path in given.file:
        frames.update(frames_in(path))
    extra = {"job": given.job, "instance": given.instance, **dict(given.label)}
    labels = ",".join(label(name, value) for name, value in extra.items() if value)
    found = samples_of([packet for packet in frames.values() if packet.wire is OUTBOUND], labels)
    times = sorted({seconds for series in found.values() for samples in series.values() for seconds in samples})
    if not times:
        raise StartError(f"{' '.join(given.file)}: no readings in it")
    sys.stdout.writelines(openmetrics(found))
    first, last = (time.strftime("%Y-%m-%d %H:%M %Z", time.localtime(seconds)) for seconds in (times[0], times[-1]))
    print(f"readings of {len(times)} times, {first} to {last}", file=sys.stderr)
    return 0


# ---------------------------------------------------------------------------------------------------------- doctor

OK, WARN, FAIL = "ok", "warn", "fail"
Finding = tuple[str, ...]  # state, what is so, what to do


def first_true(*rows: tuple) -> Finding:
    """Of rows of a condition and a finding that whose condition is true."""
    return next(row[1:] for row in rows if row[0])


def in_container() -> bool:
    """Whether this runs in a container of Docker or Podman."""
    return os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")


def local_answer(settings: Settings, path: str) -> bytes:
    """What a program on this machine answers to a GET on the exporter's port, head and all; b"" if there is none."""
    host, port = settings.web_address
    host = "127.0.0.1" if host in ("", "0.0.0.0", "::") else host
    answer, deadline = b"", time.monotonic() + 10
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=3) as sock:
        sock.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        while len(answer) < 16 << 20 and time.monotonic() < deadline and (data := sock.recv(RECV_SIZE)):
            answer += data
    return answer


def local_get(settings: Settings, path: str) -> bytes | None:
    """The body that a web server on the exporter's port answers, None without one."""
    head, _, body = local_answer(settings, path).partition(b"\r\n\r\n")
    return body if re.match(rb"HTTP/1\.\d 200\b", head) else None


def running_exporter(settings: Settings) -> dict | None:
    """What an exporter on this machine says on /api/devices, None if none runs: any web server can have its port."""
    with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
        said = json.loads(local_get(settings, "/api/devices") or b"null")
        upstream, devices = said["upstream"], said["devices"]
        if (
            upstream["mode"] in (FORWARD, LOCAL, SPOOL)
            and isinstance(upstream["address"], str)
            and isinstance(devices, list)
        ):
            return said if all(set(device) >= DEVICE_KEYS for device in devices) else None
    return None


DEVICE_KEYS = {"device", "model", "full_serial", "up", "age_seconds"}  # of a device on /api/devices
STRANGERS = {"tls": "begins TLS", "nothing": "sends nothing"}


# fmt: off
def machine_findings(settings: Settings, running: dict | None) -> Iterator[Finding]:
    """Where this runs; whether its ports are free, or the exporter has them; whether local time can be told."""
    addresses = {"sems.listen-address": settings.listen_address, "web.listen-address": settings.web_address}
    if in_container():
        ports = " ".join(f"-p {port}:{port}" for _, port in addresses.values())
        yield OK, "this runs in a container: its ports, names, clock and files are not the host's", f"publish the ports ({ports}), give it TZ, and let the portal's name lead to the host"
    for flag, address in addresses.items():
        port, error, number = f"port {endpoint_text(address)}", None, None
        try:
            for sock in listeners(*address):
                sock.close()
        except HOST_ERRORS as caught:
            error, number = caught, getattr(caught, "errno", None)
        yield first_true(
            (not error and not running, OK, f"{port} is free", ""),
            (not error, WARN, f"{port} is free, though an exporter runs", f"start doctor with the exporter's --{flag}"),
            (number != errno.EADDRINUSE, FAIL, f"{port} cannot be had: {error and error.args[-1]}", f"choose another with --{flag}"),
            (running, OK, f"{port} is in use, and an exporter runs", ""),
            (address == settings.web_address and local_answer(settings, "/"), FAIL, f"{port} is in use: another program answers there, and no exporter", f"end that program (`ss -ltnp` shows which), or choose another port with --{flag}"),
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
    page = (local_get(settings, settings.telemetry_path) or b"").decode()
    if re.search(r'^sems_mitm_\w+_total\{reason="loop"\} [^0]', page, re.M):
        yield FAIL, "the exporter has met itself instead of the portal", "redirect only what the devices send, not this machine: a DNAT rule needs the devices' addresses (-s)"
    for device in running["devices"]:
        text, asleep = "{model} {full_serial}: last packet {0} ago".format(span(device["age_seconds"]), **device), "look at its Wi-Fi, and power-cycle its module"
        yield first_true(
            (device["up"], OK, text, ""),
            (device["device"] == "inverter", WARN, text, f"an inverter sleeps at night; otherwise {asleep}"),
            (True, WARN, text, asleep),
        )
    strangers = running.get("strangers") or []
    for stranger in strangers:
        said = STRANGERS.get(stranger["said"], "sends no frame")
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
        (in_container(), OK, f"{says}: right if that is the host", ""),
        (True, WARN, f"{says}: not this machine", "if that is the override, it leads to the wrong address"),
    )
    if here and any(":" in address and is_global(address) for address in system):
        yield WARN, f"it also gives an IPv6 address for {host}", "a device with IPv6 would go there: answer none for this name"


def server_finding(server: tuple[str, int], host: str) -> Finding:
    """What one server of --sems.upstream-dns says of the portal."""
    where = endpoint_text(server)
    try:
        found = ask_dns(server, host)
    except HOST_ERRORS as error:
        return WARN, f"{where} cannot be asked for {host}: {error}", "let --sems.upstream-dns name a server that this machine reaches"
    says = f"{where} says {host} is {', '.join(found or ())}"
    return first_true(
        (found is None, WARN, f"{where} does not answer for {host}", "a firewall may keep UDP port 53 closed; name another in --sems.upstream-dns"),
        (not found, WARN, f"{where} says that {host} does not exist", "most likely a firewall redirects port 53 and answers in its place: exempt this machine, or give --sems.upstream as an address; else look at --sems.upstream"),
        (any(map(is_global, found or ())), OK, says, ""),
        (True, FAIL, f"{says}: overridden too", "the router redirects all DNS; exempt this machine, or give --sems.upstream as an address"),
    )


def portal_findings(settings: Settings, running: dict | None) -> Iterator[Finding]:
    """What the name services say of the portal, and whether it can be reached."""
    host, port = settings.upstream
    if settings.mode == LOCAL:
        yield OK, "mode local: no portal is needed", ""
        return
    if is_literal(host):
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
            text = f"the portal at {where} cannot be reached: {error.strerror or error}"
        else:
            yield OK, f"the portal answers at {where}", ""
            return
    yield FAIL, text, "look at this machine's network and firewall; --sems.mode spool keeps what devices send until then"
# fmt: on


def doctor(arguments: list[str]) -> int:
    """Check the set-up and say what to do next; takes the flags of serve."""
    settings = serve_settings(arguments, os.environ, "doctor", f"{doctor.__doc__} Exit code 1 if something fails.")
    running = running_exporter(settings)
    if running:  # it may have other flags
        settings.mode = running["upstream"]["mode"]
        settings.upstream = portal_endpoint(running["upstream"]["address"] or settings.upstream_text)
    counts: collections.Counter[str] = collections.Counter()
    for check in (machine_findings, device_findings, portal_findings):
        for state, text, step in check(settings, running):
            counts[state] += 1
            print(f"{state:4}  {text}" + (f"\n      -> {step}" if step else ""))
    print(f"\n{counts[OK]} ok, {counts[WARN]} to look at, {counts[FAIL]} to mend")
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
    "serve": serve, "demo": demo, "simulate": simulate, "decode": decode_command, "backfill": backfill, "doctor": doctor,
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
