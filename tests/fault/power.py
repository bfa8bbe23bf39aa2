"""A disk whose power can be cut: ext4 on a loop device, shut down without flushing its log.

What was not made durable by fsync is gone when it is mounted again, as after a power
cut; kill -9 alone loses nothing that any process has written. It does not model a
drive that lies about its flushes. Needs root, losetup and mkfs.ext4.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

from tests.fault.figures import CannotTryError

#: ioctl(EXT4_IOC_SHUTDOWN): _IOR('X', 125, __u32); and its flag for "do not flush the log".
_SHUTDOWN = 0x8004587D
_NO_LOG_FLUSH = 2
_UNMOUNT_S = 20.0
_DISK_BYTES = 2 * 2**30


class PowerDisk:
    """A mounted file system at `mount`, to be closed in the end. Raises CannotTryError."""

    def __init__(self, folder: Path) -> None:
        if os.geteuid() != 0:
            raise CannotTryError("power cuts need root, to mount a loop device")
        for program in ("losetup", "mkfs.ext4", "mount", "umount"):
            if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
                raise CannotTryError(f"power cuts need {program}")
        self.mount = folder / "disk"
        self._image = folder / "disk.img"
        self._device = ""
        with self._image.open("wb") as image:
            image.truncate(_DISK_BYTES)
        try:
            self._device = _run("losetup", "--find", "--show", str(self._image)).strip()
            _run("mkfs.ext4", "-q", "-F", self._device)
            self.mount.mkdir()
            self.power_on()
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            raise CannotTryError(
                f"no ext4 on a loop device can be mounted here: {error}"
            ) from error

    def power_off(self) -> None:
        """From here on nothing reaches the disk, and what has not reached it is lost."""
        handle = os.open(self.mount, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(handle, _SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(handle)

    def take_out(self) -> None:
        """Unmounts it; whoever used it must have ended."""
        end = time.monotonic() + _UNMOUNT_S
        while True:
            try:
                _run("umount", str(self.mount))
            except subprocess.CalledProcessError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return

    def power_on(self) -> None:
        """Mounts it; the file system replays its log."""
        _run("mount", "-t", "ext4", self._device, str(self.mount))

    def close(self) -> None:
        """Unmounts and removes it."""
        if os.path.ismount(self.mount):
            self.take_out()
        if self._device:
            _run("losetup", "--detach", self._device)
            self._device = ""
        self._image.unlink(missing_ok=True)


def _run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"},
    )
    return done.stdout
