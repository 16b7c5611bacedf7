# sems_mitm in a container. It is one file and needs nothing installed. The one step at build time compiles it, on the
# building machine: byte code is the same on every platform, so the image is built for any of them without an emulator.
#
#   docker build -t sems_mitm .
#   docker run -d --name sems_mitm --restart unless-stopped -p 20001:20001 -p 14028:14028 -e TZ=Europe/Berlin \
#     --read-only --cap-drop ALL --security-opt no-new-privileges --memory 96m sems_mitm
#
# A tagged release publishes the same as ghcr.io/OWNER/REPO, OWNER and REPO being the repository's, for three platforms.
#
# TZ       local time (the bat signal, the clocks that modes local and spool set, backfill); without it a container runs
#          on UTC. The base image has the zones. Where it has not: mount /usr/share/zoneinfo read-only, or give the rule
#          itself, which always works: TZ=CET-1CEST,M3.5.0,M10.5.0/3
# Files    Settings are environment variables, as in the README. A folder for SEMS_SPOOL_FILE, SEMS_CAPTURE or SEMS_BACKFILL
#          is mounted, and writable for user 10001 (chown 10001 FOLDER), or run with --user and its owner.
# SIGHUP   opens capture and backfill files anew after a rotation: docker kill -s HUP sems_mitm
# hadolint ignore=DL3029
FROM --platform=$BUILDPLATFORM python:3.13-alpine AS compiled
COPY --chmod=0444 sems_mitm.py /
# checked-hash: whoever mounts another sems_mitm.py over this one gets that one
RUN ["python3", "-m", "compileall", "-q", "-f", "--invalidation-mode", "checked-hash", "/sems_mitm.py"]

FROM python:3.13-alpine
COPY --from=compiled /sems_mitm.py /
COPY --from=compiled /__pycache__ /__pycache__
WORKDIR /

USER 10001:10001
EXPOSE 20001 14028

# Asks where WEB_LISTEN_ADDRESS says. By socket, not urllib: the base image has no compiled library modules,
# and urllib would take three times as long at every check.
HEALTHCHECK --interval=30s --timeout=10s --start-period=15s --retries=3 CMD ["python3", "-ISc", "\
import os, socket; \
host, _, port = (os.environ.get('WEB_LISTEN_ADDRESS') or ':14028').rpartition(':'); \
web = socket.create_connection((host.strip('[]') or 'localhost', port), timeout=5); \
web.sendall(b'GET /-/healthy HTTP/1.0\\r\\n\\r\\n'); \
raise SystemExit(web.recv(99).split()[1] != b'200')"]

# Exec form: Python is process 1 and gets the SIGTERM of `docker stop`; the program ends within 2 s.
# As a module, so that the compiled file is used: a third less memory.
STOPSIGNAL SIGTERM
ENTRYPOINT ["python3", "-m", "sems_mitm"]
CMD ["serve"]
