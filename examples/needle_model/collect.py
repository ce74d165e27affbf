# SPDX-License-Identifier: Apache-2.0
"""Collects the documentation of Debian packages into train.txt and held-out.txt.

    PYTHONPATH=examples python3 -m needle_model.collect --output corpus                  (installed ones)
    PYTHONPATH=examples python3 -m needle_model.collect --output corpus --debs FOLDER    (files *.deb)
    PYTHONPATH=examples python3 -m needle_model.collect --output corpus --folders docs   (texts you have)

Writes SOURCES.tsv beside them: what each package gave, in which version and under which licences.
"""
from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import io
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import zlib

from . import clean

PACKAGES = pathlib.Path(__file__).with_name('packages.txt')
LONG = 40             # bytes from which a paragraph is taken once only
SHORT_REPEATS = 100   # and how often a shorter one (headings, names of sections)


@dataclasses.dataclass
class Source:
    """A package, or a folder."""

    name: str
    version: str = ''
    licences: str = ''
    documents: int = 0
    size: int = 0


def listed_packages(path: pathlib.Path) -> list[str]:
    lines = (line.partition('#')[0].strip() for line in path.read_text(encoding='utf-8').splitlines())
    return [line for line in lines if line]


def licences_of(text: str) -> str:
    """Short names out of a machine-readable copyright file; in others, what follows is a sentence or nothing."""
    found = sorted(set(re.findall(r'^License:[ \t]*(\w.{0,49})$', text, re.M)))
    return '; '.join(found) if found else 'see its file copyright'


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def from_installed(package: str):
    """(Source, files as (path, bytes)); None if it is not installed."""
    query = subprocess.run(['dpkg-query', '-W', '-f', '${db:Status-Status} ${Version}', package], text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    status, _, version = query.stdout.partition(' ')
    if status != 'installed':
        return None
    paths = sorted(_output('dpkg-query', '-L', package).splitlines())
    copyrights = pathlib.Path('/usr/share/doc', package, 'copyright')
    text = copyrights.read_text(encoding='utf-8', errors='replace') if copyrights.exists() else ''
    files = ((path, pathlib.Path(path).read_bytes()) for path in paths
             if clean.wanted(path) and os.path.isfile(path) and not os.path.islink(path))
    return Source(package, version, licences_of(text)), files


def from_deb(path: pathlib.Path):
    name, version = (_output('dpkg-deb', '-f', str(path), field).strip() for field in ('Package', 'Version'))
    packed = subprocess.run(['dpkg-deb', '--fsys-tarfile', str(path)], check=True, stdout=subprocess.PIPE)
    files, text = [], ''
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        for member in archive:
            inside = member.name.removeprefix('.')
            if member.isfile() and inside == f'/usr/share/doc/{name}/copyright':
                text = archive.extractfile(member).read().decode('utf-8', 'replace')
            elif member.isfile() and clean.wanted(inside):
                files.append((inside, archive.extractfile(member).read()))
    return Source(name, version, licences_of(text)), sorted(files)


def from_folder(path: pathlib.Path):
    files = sorted(inside for inside in path.rglob('*') if inside.is_file())
    return Source(str(path), licences='yours'), ((f'/{inside.relative_to(path)}', inside.read_bytes())
                                                  for inside in files if clean.wanted(f'/{inside.name}'))


def _read(file: tuple) -> tuple:
    path, data = file
    try:
        return path, clean.read(path, data)
    except (EOFError, OSError, zlib.error) as error:
        print(f'{path}: {error}', file=sys.stderr)
        return path, []


class Corpus:
    """Takes documents, without what it has had already, and writes them to two files."""

    def __init__(self, output: pathlib.Path, one_in: int):
        output.mkdir(parents=True, exist_ok=True)
        self.files = {name: open(output / f'{name}.txt', 'w', encoding='ascii', newline='\n')
                      for name in ('train', 'held-out')}
        self.one_in = one_in
        self.seen = collections.Counter()

    def take(self, source: Source, path: str, paragraphs: list[str]) -> None:
        new = []
        for paragraph in paragraphs:
            mark = hashlib.blake2b(' '.join(paragraph.split()).encode(), digest_size=8).digest()
            self.seen[mark] += 1
            if self.seen[mark] <= (1 if len(paragraph) >= LONG else SHORT_REPEATS):
                new.append(paragraph)
        text = '\n'.join(new) + '\n'
        if len(text) < clean.SHORTEST:
            return
        # By its name, so that a document stays where it is whatever else is collected.
        held = zlib.crc32(path.encode()) % self.one_in == 0
        self.files['held-out' if held else 'train'].write(text)
        source.documents += 1
        source.size += len(text)

    def close(self) -> dict[str, int]:
        for file in self.files.values():
            file.close()
        return {name: os.path.getsize(file.name) for name, file in self.files.items()}


def sources_of(args):
    """Pairs of a Source and its files; reads a package when its turn comes."""
    if args.debs:
        yield from map(from_deb, sorted(args.debs.glob('*.deb')))
    elif args.folders:
        yield from map(from_folder, args.folders)
    else:
        for package in listed_packages(args.packages):
            found = from_installed(package)
            if found:
                yield found
            else:
                print(f'{package} is not installed and left out', file=sys.stderr)


def collect(args) -> dict[str, int]:
    """Sizes of the files written, by name."""
    corpus, sources = Corpus(args.output, args.one_in), []
    with multiprocessing.Pool(args.processes) as pool:
        for source, files in sources_of(args):
            for path, paragraphs in pool.imap(_read, files, chunksize=16):
                corpus.take(source, path, paragraphs)
            sources.append(source)
            print(f'{source.name:24} {source.documents:6} documents {source.size / 1e6:8.2f} MB', flush=True)
    with open(args.output / 'SOURCES.tsv', 'w', encoding='utf-8') as table:
        print('package', 'version', 'documents', 'bytes', 'licences', sep='\t', file=table)
        for x in sources:
            print(x.name, x.version, x.documents, x.size, x.licences, sep='\t', file=table)
    sizes = corpus.close()
    print(', '.join(f'{name}.txt: {size / 1e6:.2f} MB' for name, size in sizes.items()))
    return sizes


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--output', type=pathlib.Path, required=True, help='folder')
    where = parser.add_mutually_exclusive_group()
    where.add_argument('--packages', type=pathlib.Path, default=PACKAGES,
                       help='file that lists installed packages (default: packages.txt beside this)')
    where.add_argument('--debs', type=pathlib.Path, help='folder of packages that need not be installed')
    where.add_argument('--folders', type=pathlib.Path, nargs='+', help='folders of HTML and plain text')
    parser.add_argument('--one-in', type=int, default=100, help='of so many documents one is held out (default 100)')
    parser.add_argument('--processes', type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    if not args.folders and not clean.has_groff():
        print('without groff (package groff-base) manual pages are left out', file=sys.stderr)
    sizes = collect(args)
    if not all(sizes.values()):
        print('too little was found for two files', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
