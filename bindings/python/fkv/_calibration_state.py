# SPDX-License-Identifier: Apache-2.0
"""What a calibration has seen so far, in a file from which it goes on after it was stopped.

The file is JSON: what the calibration is of, how many windows were observed and which, the state of the random
numbers, the calibrator's statistics, and a checksum. It is replaced as a whole, so that a process may be
killed at any time.
"""
from __future__ import annotations

import base64
import hashlib
import json
import os
from typing import Any

import numpy

from ._native import ffi, lib

FORMAT = 'fkv calibration state'
VERSION = 1
SAMPLES = 1024  #: values of each tensor that tell one model's weights from another's


def weights_digest(model) -> str:
    """Names, types, shapes and a sample of the values of all weights."""
    import torch
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}\n'.encode())
        if tensor.device.type == 'meta' or not tensor.numel():
            continue
        values = tensor.detach().reshape(-1)
        values = values[::max(1, len(values) // SAMPLES)].cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _window_bytes(ids: Any, weights: Any) -> bytes:
    data = numpy.asarray(ids, numpy.int64).tobytes()
    if weights is not None:
        data += b'w' + numpy.asarray(weights, numpy.float32).tobytes()
    return hashlib.sha256(data).digest()


def _checksum(content: dict) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class State:
    """The file of one calibration. Errors are ValueError or OSError, and leave the file as it was."""

    def __init__(self, path: Any, settings: dict):
        self.path = os.fspath(path)
        version = ffi.string(lib.fkv_version_string()).decode()
        self.settings = json.loads(json.dumps({'fkv': version, **settings}))  # as they come back
        self.done = 0
        self.seen = hashlib.sha256()

    def load(self, windows: list[tuple], generator) -> tuple[int, bytes]:
        """(windows that were observed, statistics); sets the generator. (0, b'') if there is no file."""
        try:
            with open(self.path, 'rb') as file:
                text = file.read()
        except FileNotFoundError:
            self._check_folder()
            return 0, b''
        content = self._read(text)
        self._compare(content['settings'])
        done = content['done']
        if done > len(windows):
            raise ValueError(f'{self.path} has seen {done} windows, more than the {len(windows)} there are '
                             'now')
        for ids, weights in windows[:done]:
            self.seen.update(_window_bytes(ids, weights))
        if self.seen.hexdigest() != content['windows']:
            raise ValueError(f'{self.path} is of a calibration on other texts; another file is needed')
        import torch
        generator.set_state(torch.tensor(list(base64.b64decode(content['generator'])), dtype=torch.uint8))
        self.done = done
        return done, base64.b64decode(content['calibrator'])

    def save(self, ids: Any, weights: Any, generator, calibrator) -> None:
        """After one more window."""
        self.seen.update(_window_bytes(ids, weights))
        self.done += 1
        content = {
            'format': FORMAT, 'version': VERSION, 'settings': self.settings, 'done': self.done,
            'windows': self.seen.hexdigest(),
            'generator': base64.b64encode(generator.get_state().numpy().tobytes()).decode(),
            'calibrator': base64.b64encode(calibrator.dumps()).decode()}
        content['checksum'] = _checksum(content)
        part = f'{self.path}.{os.getpid()}.part'
        try:
            with open(part, 'w', encoding='ascii') as file:
                json.dump(content, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, self.path)
        except BaseException:
            if os.path.exists(part):
                os.remove(part)
            raise

    def _check_folder(self) -> None:
        """Before the work, not after the first window."""
        folder = os.path.dirname(self.path) or '.'
        if not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f'{self.path} cannot be written: {folder} is no folder that can be written to')

    def _read(self, text: bytes) -> dict:
        try:
            content = json.loads(text)
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get('format') != FORMAT:
            raise ValueError(f'{self.path} is there and is no state of a calibration; it was left as it is')
        if content.get('version') != VERSION:
            raise ValueError(f'{self.path} has version {content.get("version")} of the format, '
                             f'{VERSION} is known here')
        if content.pop('checksum', None) != _checksum(content):
            raise ValueError(f'{self.path} is damaged: its checksum is another')
        return content

    def _compare(self, settings: dict) -> None:
        if settings == self.settings:
            return
        if settings.get('weights') != self.settings['weights']:
            raise ValueError(f'{self.path} is of a calibration of another model, or of its weights in another '
                             'type; another file is needed')
        for name, ours in self.settings.items():
            theirs = settings.get(name)
            if theirs == ours:
                continue
            if isinstance(ours, dict) and isinstance(theirs, dict):
                name, theirs, ours = next((f'{name}.{key}', theirs.get(key), value)
                                          for key, value in ours.items() if theirs.get(key) != value)
            raise ValueError(f'{self.path} is of a calibration with other settings: {name} was {theirs!r}, '
                             f'now {ours!r}; another file is needed')
        raise ValueError(f'{self.path} is of a calibration with other settings; another file is needed')
