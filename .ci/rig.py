"""What bench and soak share: frames, and the program as users start it, a process that is seen from outside alone."""

from __future__ import annotations

import atexit
import contextlib
import functools
import http.client
import importlib.util
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time
from datetime import datetime, timedelta

LOCAL = "127.0.0.1"
PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "sems_mitm.py")
PAGE = os.sysconf("SC_PAGE_SIZE")


def module_of(path: str):
    """A program file as a module: it makes the frames, whichever program is measured."""
    spec = importlib.util.spec_from_file_location("sems_mitm", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sems_mitm"] = module
    spec.loader.exec_module(module)
    return module


sems = module_of(PROGRAM)

# ---------------------------------------------------------------------------------------------------------- frames

METER, INVERTER = "91000HKU{:08d}", "53000DSC{:08d}"  # made-up serial numbers
NOON = datetime(2026, 3, 21, 12, 0, 0)
METER_RANGES = [  # the first are registers that nobody knows: `numbered` needs some there
    (5632, (2,) * 12),
    (2048, (0, 0, 1, 0, 0, 2, *[0] * 6, 0, 0, 3, *[0] * 9)),
    (2096, (2400, 2401, 0, *[0] * 6, 0, 1500, 0, 2600, 0, 0, 0, 4100)),
    (5376, (25600, 1, 0, 65)),
]
INVERTER_RANGES = [(30163, (3806,) * 60), (30103, (3347, 31)), (30127, (0, 1051, 1)), (30144, (209, 0, 20642, 0, 1667))]
ANSWER_SIZE = 58  # of the portal's ACK, NACK and clock write


def frame(packet_type: str, serial: str, when: datetime, clear: bytes) -> bytes:
    """A device's frame; type 10 is a confirmation, with the short envelope."""
    stamp = bytes([when.year - 2000, when.month, when.day, when.hour, when.minute, when.second])
    in_envelope = b"" if packet_type.endswith("10") else stamp
    return sems.encode(sems.Packet(sems.OUTBOUND, packet_type, serial, stamp + bytes(10), in_envelope, clear))


def meter_frame(number: int, when: datetime, volts: int = 2400, function: str = "04") -> bytes:
    """Of a HomeKit 1000, 166 bytes as in captures; volts is channel 1's, in tenths."""
    unknown, energies, (first, words), more = METER_RANGES
    ranges = [unknown, energies, (first, (volts, *words[1:])), more]
    return frame(f"03{function}", METER.format(number), when, sems.payload(ranges))


def inverter_frame(number: int, when: datetime, volts: int = 3347) -> bytes:
    """Of a DNS G3; volts is the first input's, in tenths."""
    unknown, (first, words), *more = INVERTER_RANGES
    return frame("0104", INVERTER.format(number), when, sems.payload([unknown, (first, (volts, *words[1:])), *more]))


def settings_frame(number: int, when: datetime) -> bytes:
    """A HomeKit's settings packet, which is answered with an ACK and a clock write."""
    return frame("0303", METER.format(number), when, sems.payload(METER_RANGES[:3]))


def confirmation_frame(number: int, when: datetime) -> bytes:
    """A HomeKit's confirmation of a clock write, which nothing answers."""
    clear = struct.pack(">HHB11s", 0x1216, 0x1218, 0, b"\xff" * 11)
    return frame("0310", METER.format(number), when, clear)


def minute(count: int) -> datetime:
    """So many minutes after noon."""
    return NOON + timedelta(minutes=count)


def numbered(model: bytes, number: int) -> bytes:
    """A meter's or inverter's frame like model, so many seconds later; made much faster than model.

    The number is in the IV's last four bytes, so that no two frames begin alike; it alters two registers that nobody knows.
    """
    when = NOON + timedelta(seconds=number)
    stamp = bytes((when.year - 2000, when.month, when.day, when.hour, when.minute, when.second))
    body = model[:42] + number.to_bytes(4, "big") + stamp + model[52:-2]
    return body + sems.crc16(body).to_bytes(2, "big")


@functools.lru_cache(maxsize=4096)
def answer_to(packet_type: bytes, serial: str, status: int = 0) -> bytes:
    """The portal's ACK (status 2: NACK); packet_type is two bytes."""
    clear, iv = bytes([status]) + bytes(15), bytes.fromhex("000c15031a") + bytes(11)
    return sems.encode(sems.Packet(sems.INBOUND, packet_type.hex(), serial, iv, b"", clear))


def cut(data: bytes) -> tuple[list[bytes], bytes]:
    """The whole frames at the start of data, which holds nothing else, and the rest."""
    frames, at = [], 0
    while at + 13 <= len(data):
        end = at + int.from_bytes(data[at + 6 : at + 10], "big") + 13
        if data[at : at + 6] != b"POSTGW" or end > len(data):
            break
        frames.append(data[at:end])
        at = end
    return frames, data[at:]


# --------------------------------------------------------------------------------------------------- the program

signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what is registered with atexit is done then, too


def until(condition, seconds: float = 20, pause: float = 0.005):
    """The condition's first true value; fails when it does not come in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(pause)
    return value


def low_port() -> int:
    """A free port below those that connections take for their own end, so that it can be bound again and again."""
    while True:
        with contextlib.suppress(OSError), socket.create_server((LOCAL, random.randrange(16000, 32000))) as sock:
            return sock.getsockname()[1]


def http_get(port: int, path: str) -> bytes:
    """The body of an answer of status 200. Raises OSError for any other."""
    connection = http.client.HTTPConnection(LOCAL, port, timeout=30)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        if response.status != 200:
            raise OSError(response.status)
        return response.read()
    finally:
        connection.close()


def summed(metrics: dict, name: str, **labels: str) -> float:
    """The sum of a metric's series that have these labels."""
    wanted = [f'{label}="{text}"' for label, text in labels.items()]
    return sum(
        value
        for series, value in metrics.items()
        if series.partition("{")[0] == name and all(one in series for one in wanted)
    )


class Exporter:
    """The program, on ports that it keeps when it is started again."""

    def __init__(self, program: str, portal: int, *flags: str, as_module: bool = False, log: str = "") -> None:
        """log: where what it says is appended, the standard error if empty."""
        self.log = log
        self.ports = low_port(), low_port()
        names = "--sems.listen-address", "--web.listen-address", "--sems.upstream"
        where = [f"{name}={LOCAL}:{port}" for name, port in zip(names, (*self.ports, portal))]
        self.folder = os.path.dirname(os.path.abspath(program)) if as_module else None
        start = ["-m", os.path.basename(program)[:-3]] if as_module else ["-I", os.path.abspath(program)]
        self.command = [sys.executable, *start, "serve", "--log.level=error", *where, *flags]
        hidden = ("PYTHON", "SEMS", "WEB", "METRICS", "LOG", "DEBUG", "BATSIGNAL")
        self.environment = {name: text for name, text in os.environ.items() if not name.startswith(hidden)}
        self.start()

    def start(self) -> None:
        """Start it, and wait until it is ready."""
        with contextlib.ExitStack() as stack:
            stderr = stack.enter_context(open(self.log, "ab")) if self.log else None
            self.popen = subprocess.Popen(self.command, cwd=self.folder, env=self.environment, stderr=stderr)
        atexit.register(self.popen.kill)  # which does nothing to one that has ended
        until(self.is_ready)

    def is_ready(self) -> bool:
        """Whether it says so."""
        assert self.popen.poll() is None, f"it ended: {self.popen.returncode}"
        with contextlib.suppress(OSError):
            return bool(http_get(self.ports[1], "/-/ready"))
        return False

    def metrics(self) -> dict:
        """Series to value."""
        lines = http_get(self.ports[1], "/metrics").decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        return {series: float(value) for series, value in pairs}

    def memory(self) -> float:
        """Resident, in MB."""
        with open(f"/proc/{self.popen.pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * PAGE / 1e6

    def cpu(self) -> float:
        """Seconds of processor time so far, by the clock that clock_getcpuclockid(3) makes."""
        return time.clock_gettime(~self.popen.pid << 3 | 2)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it."""
        self.popen.send_signal(number)
        try:
            self.popen.wait(20)
        except subprocess.TimeoutExpired:
            print(f"{self.command[2]} did not end within 20 s of signal {number}: killed", flush=True)
            self.popen.kill()
            self.popen.wait()


def connected(port: int, buffer: int = 0) -> socket.socket:
    """A connection to a port; buffer: of its socket, each way."""
    sock = socket.socket()
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF) if buffer else ():
        sock.setsockopt(socket.SOL_SOCKET, option, buffer)
    sock.settimeout(60)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.connect((LOCAL, port))
    return sock


def receive(sock: socket.socket, count: int) -> bytes:
    """Exactly so many bytes. Raises EOFError."""
    data = bytearray()
    while len(data) < count:
        part = sock.recv(min(count - len(data), 1 << 20))
        if not part:
            raise EOFError(f"{len(data)} of {count} bytes")
        data += part
    return bytes(data)


def socket_memory() -> float:
    """What TCP's sockets of this machine hold, both ends of each connection, in MB."""
    with open("/proc/net/sockstat", encoding="ascii") as file:
        words = next(line.split() for line in file if line.startswith("TCP:"))
    return int(words[words.index("mem") + 1]) * PAGE / 1e6
