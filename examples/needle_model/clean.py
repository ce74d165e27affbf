# SPDX-License-Identifier: Apache-2.0
"""Documents of several formats as plain English prose in ASCII."""
from __future__ import annotations

import functools
import gzip
import html.parser
import re
import shutil
import subprocess
import unicodedata

HTML = re.compile(r'\.x?html?(\.en)?(\.utf8)?$')
TEXT = re.compile(r'\.(rst|txt|md|mkd|adoc)$')
MANUAL = re.compile(r'/man/man\d/[^/]+\.\d[a-z]*$')
# The sources of pages that are there as HTML, too; lists; and what is no documentation
NOT_WANTED = re.compile(r'/_sources/|/translations/|genindex|search\.html|/changelog|/copyright|modindex|'
                        r'LICENSE|requirements', re.I)

# What has an obvious writing in ASCII; the rest is decomposed, or dropped.
ASCII = str.maketrans({0x2018: "'", 0x2019: "'", 0x201c: '"', 0x201d: '"', 0x2010: '-', 0x2011: '-',
                       0x2012: '-', 0x2013: '-', 0x2014: '--', 0x2015: '--', 0x2212: '-', 0x2026: '...',
                       0x2022: '*', 0x00b7: '*', 0x2192: '->', 0x2190: '<-', 0x00d7: 'x', 0x00ab: '"',
                       0x00bb: '"', 0x00a9: '(c)', 0x2264: '<=', 0x2265: '>=', 0x00df: 'ss', 0x00a0: ' '})
CONTROLS = bytes(code for code in (*range(32), 127) if code not in b'\n\t')
NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalpha())
ENGLISH = frozenset('the of to and is in a for that be this it with are as by or an on if'.split())
SKIPPED = frozenset('head script style nav footer svg math button form select textarea'.split())
VOID = frozenset('area base br col embed hr img input link meta source track wbr'.split())
BLOCKS = frozenset('p div section article h1 h2 h3 h4 h5 h6 ul ol dl dt table pre blockquote hr'.split())
NAVIGATION = re.compile(r'\b(navigation|sphinxsidebar|headerlink|navheader|navfooter|breadcrumbs|toc|'
                        r'contents|footer)\b')
RUNNING_HEAD = re.compile(r'^\S.*\S\(\d\w*\)$')  # and foot, of manual pages
DEEPEST = 8           # columns of indentation that are kept
LEAST_LETTERS = .55   # of what is not space, in a paragraph: fewer is a table or a dump
LEAST_ENGLISH = .06   # of the words of a document
MOST_FOREIGN = .02    # characters of a document with no writing in ASCII
LONGEST_LINE = 4000
SHORTEST = 200        # bytes of a document


class _Page(html.parser.HTMLParser):
    """The text of a page, blocks apart, without what leads elsewhere."""

    def __init__(self):
        super().__init__()
        self.out = []
        self.open = []
        self.skip_from = None  # how many elements were open around the one that is skipped

    def handle_starttag(self, tag, attrs):
        if tag in BLOCKS:
            self.out.append('\n\n')
        elif tag in ('br', 'li', 'dd', 'tr'):
            self.out.append('\n')
        elif tag in ('td', 'th'):
            self.out.append('  ')
        if tag in VOID:
            return
        if self.skip_from is None and self._leads_elsewhere(tag, dict(attrs)):
            self.skip_from = len(self.open)
        self.open.append(tag)

    @staticmethod
    def _leads_elsewhere(tag, attrs) -> bool:
        return tag in SKIPPED or attrs.get('role') == 'navigation' or (
            tag not in ('html', 'body') and bool(NAVIGATION.search(attrs.get('class') or '')))

    def handle_endtag(self, tag):
        if tag in BLOCKS:
            self.out.append('\n\n')
        if tag not in self.open:
            return
        while self.open.pop() != tag:  # elements that were left open end with the one around them
            pass
        if self.skip_from is not None and len(self.open) <= self.skip_from:
            self.skip_from = None

    def handle_data(self, data):
        if self.skip_from is None:
            self.out.append(data if 'pre' in self.open else re.sub(r'\s*\n\s*', '\n',
                                                                   re.sub(r'[ \t\r]+', ' ', data)))


def from_html(text: str) -> str:
    page = _Page()
    page.feed(text)
    page.close()
    return ''.join(page.out)


@functools.cache
def has_groff() -> bool:
    return shutil.which('groff') is not None


def from_manual(data: bytes) -> str:
    """A manual page as groff shows it; nothing without groff, or of a page that only refers to another."""
    if data.lstrip().startswith(b'.so ') or not has_groff():
        return ''
    done = subprocess.run(['groff', '-t', '-mandoc', '-Tascii', '-P-cbou', '-rLL=90n', '-rHY=0'], input=data,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise OSError(f'groff ended with {done.returncode}')
    lines = done.stdout.decode('ascii', 'ignore').split('\n')
    # Without the lines at the top and bottom, and the spaces that make lines equally long.
    return '\n'.join(re.sub(r'(?<=\S) +', ' ', line) for line in lines if not RUNNING_HEAD.search(line))


def to_ascii(text: str) -> str:
    """'' if too much of it has no writing in ASCII."""
    text = unicodedata.normalize('NFKD', text.translate(ASCII))
    foreign = sum(1 for c in re.findall(r'[^\x00-\x7f]', text) if not unicodedata.combining(c))
    if foreign > MOST_FOREIGN * len(text):
        return ''
    return text.encode('ascii', 'ignore').translate(None, CONTROLS).decode()


def is_english(text: str) -> bool:
    words = re.findall(r'[a-z]+', text.lower())
    return sum(word in ENGLISH for word in words) >= LEAST_ENGLISH * len(words)


def _line(line: str) -> str:
    line = line.expandtabs(8).rstrip()
    bare = line.lstrip(' ')
    return ' ' * min(DEEPEST, len(line) - len(bare)) + re.sub(r' {3,}', '  ', bare)


def paragraphs(text: str) -> list[str]:
    """Those of a cleaned document that are text; [] if it is too short or not English."""
    kept = []
    text = '\n'.join(map(_line, to_ascii(text).split('\n')))
    for block in re.split(r'\n\s*\n', text):
        block = block.strip('\n')
        dense = block.encode().translate(None, b' \n')
        letters = len(dense.translate(None, NO_LETTERS))
        if letters >= LEAST_LETTERS * max(1, len(dense)) and max(map(len, block.split('\n'))) <= LONGEST_LINE:
            kept.append(block)
    if sum(map(len, kept)) < SHORTEST or not is_english('\n'.join(kept)):
        return []
    return kept


def wanted(path: str) -> bool:
    path = path.removesuffix('.gz')
    return not NOT_WANTED.search(path) and any(kind.search(path) for kind in (HTML, TEXT, MANUAL))


def read(path: str, data: bytes) -> list[str]:
    """The paragraphs of a file of which wanted() holds."""
    if path.endswith('.gz'):
        path, data = path.removesuffix('.gz'), gzip.decompress(data)
    if MANUAL.search(path):
        return paragraphs(from_manual(data))
    text = data.decode('utf-8', 'replace')
    return paragraphs(from_html(text) if HTML.search(path) else text)
