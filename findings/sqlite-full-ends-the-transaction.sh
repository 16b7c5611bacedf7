#!/usr/bin/env bash
# SQLite: a full disk in the middle of a transaction ends the transaction, and what follows is committed row by row.
#
# One expects: an INSERT that fails is undone alone, the transaction stays open until COMMIT or ROLLBACK, and nothing is
# kept before the COMMIT.
# What happens: the INSERT that fails with "database or disk is full" rolls back every row of the transaction, by itself.
# The connection is in autocommit then; a loop that goes on commits each of its later rows at once, and only the COMMIT at
# its end says that there is no transaction. So the rows before the failure are lost, those after it are kept.
# A limit of pages stands for the full disk here.
# Seen with SQLite 3.54.1 (apsw 3.54.1.0), 2026-11-30. Who meets it: whoever collects a batch in one transaction, catches the
# error of a single row, and believes that COMMIT or ROLLBACK decides about the rest.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check 'apsw==3.54.1.0'
"$folder/venv/bin/python" - <<'EOF'
import sys

import apsw

database = apsw.Connection(":memory:")
database.execute("CREATE TABLE reading (number INTEGER PRIMARY KEY, data BLOB)")
database.execute("PRAGMA max_page_count = 20")
database.execute("BEGIN")
failed = []
for number in range(30):
    try:
        database.execute("INSERT INTO reading VALUES (?, ?)", (number, bytes(4000)))
    except apsw.FullError as error:
        failed.append(number)
        if len(failed) == 1:
            print(f"row {number}: {error}; in a transaction: {database.in_transaction}")
try:
    database.execute("COMMIT")
    committed = True
except apsw.SQLError as error:
    committed = False
    print("COMMIT:", error)
kept = [number for (number,) in database.execute("SELECT number FROM reading ORDER BY number")]
print(f"SQLite {apsw.sqlite_lib_version()}: failed: {failed}; kept: {kept}; the others were taken without an error, and are lost")
sys.exit(0 if not committed and len(failed) == 1 and kept == list(range(failed[0] + 1, 30)) else 1)
EOF
