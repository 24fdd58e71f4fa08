"""What a run clears away: an unfinished job that is begun anew, and the state of a finished one."""

import shutil
from pathlib import Path

from converters.budget import STAGING_FOLDER
from converters.checkpoint.journal import JOB_FILE, read_record
from converters.checkpoint.lock import LOCK_FILE, FolderLock
from converters.checkpoint.writer import disk_errors, remove_partials, sync_folder
from converters.update import UPDATE_FOLDER

FILES_FILE = "files.json"


def remove_unfinished(dst: Path, state: Path, *, keep_staging: bool) -> None:
    """Remove what the unfinished job in dst wrote or may have wanted to write, and nothing else."""
    names = (read_record(state / FILES_FILE) or {"files": []})["files"]
    with disk_errors(dst):
        remove_partials(dst, names)
        for name in names:
            (dst / name).unlink(missing_ok=True)
        # before the record of them goes, or a file could come back after a power loss and pass for another job's
        sync_folder(dst)
        if not keep_staging:
            shutil.rmtree(state / STAGING_FOLDER, ignore_errors=True)
        # the job last: as long as it stands, its list of files is the right one
        for path in sorted(state.iterdir(), key=lambda path: path.name == JOB_FILE):
            if not path.name.startswith(LOCK_FILE) and path.name != STAGING_FOLDER:
                path.unlink()
        sync_folder(state)


def remove_state(lock: FolderLock) -> None:
    """Remove the state folder, unless another part still holds it. The lock goes last, so that no run slips in."""
    if not lock.become_exclusive():
        return
    with disk_errors(lock.dst):
        shutil.rmtree(lock.state / UPDATE_FOLDER, ignore_errors=True)
        shutil.rmtree(lock.state / STAGING_FOLDER, ignore_errors=True)
        for path in lock.state.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()
        (lock.state / LOCK_FILE).unlink()
        lock.state.rmdir()
        sync_folder(lock.dst)
