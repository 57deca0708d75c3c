"""The command line that all commands share: a name, dotted settings, flags."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from pipeline.nearest_names import unknown

ENVIRONMENT = {  # set before ray and mlflow are imported; what the user has set stays
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # in a job, what the driver passes on is added to its own
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "300",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_AIR_NEW_OUTPUT": "0",  # what there is to say of a sweep, we say
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours ends the MLflow runs as well
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


PREEMPTED = 75
"""Exit code of a run that was stopped and can go on: sysexits.h's EX_TEMPFAIL, "try again"."""


@dataclass(frozen=True)
class Arguments:
    """What a command was given: ``NAME key=value ... --flag ...``."""

    names: tuple[str, ...]
    settings: Mapping[str, str]
    flags: frozenset[str]


def read_arguments(
    argv: Iterable[str], *, usage: str, flags: Iterable[str] = (), most_names: int = 1
) -> Arguments:
    """Sort a command line into names, settings and flags; ``--help`` prints the usage and leaves.

    Raises:
        ValueError: An unknown flag, a setting given twice, or too many names.
    """
    names: list[str] = []
    settings: dict[str, str] = {}
    given = set()
    for word in argv:
        if word in ("-h", "--help"):
            print(usage.strip())
            raise SystemExit(0)
        if word.startswith("-"):
            if word not in flags:
                raise unknown("option", word, ["--help", *flags])
            given.add(word)
        elif "=" in word:
            key, _, value = word.partition("=")
            if key in settings:
                raise ValueError(f"{key} is given twice: {settings[key]!r} and {value!r}")
            settings[key] = value
        else:
            names.append(word)
    if len(names) > most_names:
        raise ValueError(f"at most {most_names} name(s), got {' '.join(names)}")
    return Arguments(tuple(names), settings, frozenset(given))


def main(run: Callable[[list[str]], int]) -> NoReturn:
    """Run a command: bad input ends with code 2 and one line, a failed run with code 1."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        code = run(sys.argv[1:])
    except ValueError as error:
        code = fail(str(error), 2)
    except OSError as error:  # ConnectionError is one
        code = fail(explain(error), 1)
    except KeyboardInterrupt:
        code = fail("interrupted", 130)
    except Exception as error:
        if not from_library(error):
            raise
        code = fail(f"{type(error).__name__}: {explain(error)}", 1)
    sys.stdout.flush()
    raise SystemExit(code)


LIBRARIES = ("ray", "mlflow", "safetensors", "safetensors_rust", "sqlalchemy", "pyarrow", "PIL")
"""Packages whose errors a setting, an address or a file can fix; ours and torch's are bugs."""
HELP = {
    errno.ENAMETOOLONG: "; a shorter name= or storage= fits",
    errno.ENOTDIR: "; storage= must be a folder, and a part of this path is a file",
    errno.EEXIST: "; storage= must be a folder, and this is a file",
    errno.ENOENT: "; it cannot be made there: choose another storage=",
    errno.EACCES: "; the right to write there is missing: choose another storage=",
    errno.EROFS: "; that disk is read-only: choose another storage=",
    errno.ENOSPC: "; the disk is full",
}


def from_library(error: BaseException) -> bool:
    """Tell whether an error's class, or one that it derives from, is of one of ``LIBRARIES``."""
    kinds = type(error).__mro__
    return any(kind.__module__.partition(".")[0] in LIBRARIES for kind in kinds)


def explain(error: BaseException) -> str:
    """Write an error in one line: of one about a file its name and what helps."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error) or type(error).__name__
    path = f" {error.filename}" if error.filename else ""
    return f"{error.strerror}:{path}{HELP.get(error.errno, '')}"


def fail(text: str, code: int) -> int:
    """Print one line to the error stream; return the exit code."""
    print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
    return code
