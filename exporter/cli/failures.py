"""The one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import click

from exporter.errors import ExporterError, Interrupted


def guarded(call: Callable[[], Any], as_json: bool) -> int:
    """Run `call`; report what it raises; the exit code. EXPORTER_DEBUG=1 shows tracebacks."""
    try:
        result = call()
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        hint = e.ctx.command_path + " --help" if isinstance(e, click.UsageError) and e.ctx else None
        return _report(e.format_message(), hint, e.exit_code, as_json)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`): nothing is left to say.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (KeyboardInterrupt, click.Abort) as stop:
        if isinstance(stop, click.Abort):  # at a question, whose line has not ended
            print(file=sys.stderr)
        stopped = Interrupted("interrupted", hint="run the same command to go on from here")
        return _report(stopped.message, stopped.hint, stopped.exit_code, as_json)
    except ExporterError as e:
        _debug()
        return _report(e.message, e.hint, e.exit_code, as_json)
    except OSError as e:
        _debug()
        return _report(*_of_system(e), 1, as_json)
    except MemoryError:
        _debug()
        return _report("out of memory", "--max-memory makes the pieces smaller", 1, as_json)
    except Exception as e:
        _debug()
        what = f"internal error: {type(e).__name__}: {e}".splitlines()[0][:300]
        return _report(what, "EXPORTER_DEBUG=1 shows where; please report it", 1, as_json)


def stoppable() -> None:
    """A job scheduler's polite stop and a lost terminal are interruptions like any other; nohup stays nohup."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)


def _of_system(e: OSError) -> tuple[str, str | None]:
    where = f"{e.filename}: " if e.filename else ""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{where}the disk is full", "free some space and run the same command to go on from here"
    if e.errno == errno.EFBIG:
        return f"{where}the file is larger than this disk or user may have", "choose another --out"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where}{e.strerror}", "choose another --out, or change its permissions"
    return f"{where}{e.strerror or e}", None


def _debug() -> None:
    if os.environ.get("EXPORTER_DEBUG"):
        import traceback

        traceback.print_exc()


def _report(message: str, hint: str | None, code: int, as_json: bool) -> int:
    print(f"error: {one_line(message)}", file=sys.stderr)
    if hint:
        print(f"  hint: {one_line(hint)}", file=sys.stderr)
    if as_json:
        with contextlib.suppress(OSError):  # stdout may be what failed
            print(json.dumps({"status": "error", "message": message, "hint": hint, "exit_code": code}))
    return code


def one_line(text: str) -> str:
    """A path may hold anything: line ends and terminal codes are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
