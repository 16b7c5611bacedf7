#!/usr/bin/env bash
# SQLite: DELETE … RETURNING of which one row is read has deleted, but not committed, and locks all others out.
#
# One expects: without BEGIN a statement is committed when it has run, and all changes of a RETURNING statement are made
# before its first row comes, so that the first row (as an "is there work" check takes it) means that all is done.
# What happens: the rows are gone for this connection; it is not in a transaction by its own word; yet nothing is committed
# until the last row is read or the cursor is closed: others still see the rows and cannot write, and after a kill the rows
# are there again.
# Seen with SQLite 3.54.1 (apsw 3.54.1.0), 2026-11-30. Who meets it: work queues in SQLite that take jobs with
# DELETE … RETURNING or UPDATE … RETURNING and call fetchone().
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'apsw==3.54.1.0'
"$folder/venv/bin/python" - <<'EOF'
import os
import sys
import tempfile

import apsw


def count(connection) -> int:
    return connection.execute("SELECT count(*) FROM job").get


with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "jobs")
    ours, theirs = apsw.Connection(path), apsw.Connection(path)
    ours.execute("PRAGMA journal_mode = WAL")
    ours.execute("CREATE TABLE job (id INTEGER PRIMARY KEY)")
    ours.execute("INSERT INTO job VALUES (1), (2), (3), (4), (5)")
    cursor = ours.execute("DELETE FROM job WHERE id <= 3 RETURNING id")
    first = next(cursor)
    half = ours.in_transaction, count(ours), count(theirs)
    try:
        theirs.execute("INSERT INTO job VALUES (6)")
        locked = False
    except apsw.BusyError:
        locked = True
    print(f"SQLite {apsw.sqlite_lib_version()}: first row {first}; in a transaction: {half[0]}; we see {half[1]} rows,", end=" ")
    print(f"others {half[2]}; others locked out: {locked}")
    rest = list(cursor)
    print(f"read to the end ({rest}): others see {count(theirs)}")
    is_so = half == (False, 2, 5) and locked and count(theirs) == 2
sys.exit(0 if is_so else 1)
EOF
