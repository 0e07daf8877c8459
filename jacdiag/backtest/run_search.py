"""Where the logs of runs are below a folder, and what each run is called."""

from __future__ import annotations

from pathlib import Path

from jacdiag.backtest.archive import is_packed
from jacdiag.backtest.event_files import has_event_files, is_event_file
from jacdiag.backtest.trainer_state import STATE_FILE, find_state, folder_of_run
from jacdiag.records.run_log import RUN_FILE


def find_logs(path: Path) -> list[Path]:
    """Return the logs at a path: a file, the log of a run's folder, or all logs below a folder.

    A folder of TensorBoard event files is a log as a whole.

    Args:
        path: of a file or a folder.
    """
    # 1. A file.
    if not path.is_dir():
        return [path]

    # 2. A folder that is a run, which is not searched for others.
    log = path / RUN_FILE
    if log.is_file():
        return [log]

    # 3. Logs of jacdiag below it, and logs of other programs of other runs.
    own = sorted(path.rglob(RUN_FILE))
    logs = [*own, *_logs_of_others(path, {log.parent for log in own})]
    if logs:
        return logs

    # 4. Tables, which may be of anything where there are logs.
    return sorted(path.rglob("*.csv"))


def _logs_of_others(folder: Path, own: set[Path]) -> list[Path]:
    """Return the logs of a Trainer and of TensorBoard at or below a folder, one for each run.

    Args:
        folder: to be searched.
        own: folders with a log of jacdiag. A run that has one is not read a second time.
    """
    # 1. A run of jacdiag may have event files next to its log.
    if folder in own:
        return []

    # 2. A folder that is a run is not searched. A Trainer keeps its event files inside of it, and
    # maybe a log of jacdiag, which is of the same run.
    log = _log_in(folder)
    if log is not None:
        holds_own = any(folder in other.parents for other in own)
        return [] if holds_own else [log]

    # 3. The folders in it.
    logs = []
    for below in sorted(folder.iterdir()):
        if below.is_dir() and not below.is_symlink():
            logs += _logs_of_others(below, own)
    return logs


def _log_in(folder: Path) -> Path | None:
    """Return the log of a Trainer or of TensorBoard that makes a folder a run; None without one."""
    state = find_state(folder)
    if state is not None:
        return state
    if has_event_files(folder):
        return folder
    return None


def name_of_run(log: Path) -> str:
    """Return the name of the run that a log is of: of its folder, or of its file.

    Args:
        log: as `find_logs` returns it.
    """
    folder = _folder_of_run(log)
    if folder is None:
        return log.stem
    return folder.name


def place_of_run(log: Path) -> tuple[str, ...]:
    """Return the folders (and the pack) in which a run's name is unique.

    Args:
        log: as `find_logs` returns it.
    """
    folder = _folder_of_run(log)
    if folder is not None:
        return folder.parent.parts[1:]
    folders = log.absolute().parent.parts[1:]
    if is_packed(log):
        return (*folders, log.name)
    return folders


def _folder_of_run(log: Path) -> Path | None:
    """Return the folder that a run has its name from; None if its file has the name."""
    if log.is_dir():
        return log.absolute()
    if log.name == STATE_FILE:
        return folder_of_run(log)
    if log.name == RUN_FILE or is_event_file(log):
        return log.absolute().parent
    return None
