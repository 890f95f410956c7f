"""The process that stands for a fork of the warm one; see ``warm.py``.

``python -IS warm_client.py SOCKET WORDS`` imports no more than it must: it is to cost nothing.
"""

import json
import os
import signal
import socket
import sys

FORWARDED = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
FORWARDED += (signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Have a fork run what follows the socket, and end as it ends."""
    path, *words = sys.argv[1:]
    server = socket.socket(socket.AF_UNIX)
    try:
        server.connect(path)
    except OSError:  # it is gone
        os.execv(sys.executable, [sys.executable, *words])
    ignored = [int(n) for n in FORWARDED if signal.getsignal(n) is signal.SIG_IGN]
    for number in FORWARDED:
        if number not in ignored:
            signal.signal(number, lambda n, _: server.sendall(bytes([n])))
    job = {"words": words, "cwd": os.getcwd(), "ignored": ignored, "environment": dict(os.environ)}
    message = json.dumps(job).encode() + b"\n"
    sent = socket.send_fds(server, [message], [0, 1, 2])
    server.sendall(message[sent:])
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):  # whoever reads what the fork writes is to hear when it closes that
        os.dup2(nothing, stream)
    answer = b""
    while part := server.recv(64):
        answer += part
    code = int(answer or -signal.SIGKILL)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
