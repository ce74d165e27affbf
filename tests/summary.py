#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Counts the single tests behind the test programs of meson's logs, and pytest's in JUnit's XML.

Usage: summary.py [--failed N] TESTLOG.JSON|RESULTS.XML ...
Prints "N skipped" and, last, "N passed, N failed"; exits with 1 if anything failed. --failed adds
failures that meson does not know of.
"""
import argparse
import json
import re
import sys
import xml.etree.ElementTree


def total(pattern, text):
    return sum(int(number) for number in re.findall(pattern, text, re.M))


def count(test):
    """(passed, failed, skipped) of one program: of cmocka, of cargo, of ok / not ok, or itself."""
    text = test.get('stdout', '') + '\n' + test.get('stderr', '')
    good = test['result'] in ('OK', 'EXPECTEDFAIL')
    running = total(r'^\[==========\] Running (\d+) test', text)
    cargo = r'^test result: \w+\. .*?(\d+) '
    lines = re.findall(r'^(ok|not ok) \d+.*?(# SKIP.*)?$', text, re.M)
    if running:
        passed = total(r'^\[  PASSED  \] (\d+) test', text)
        skipped = total(r'^\[  SKIPPED \] (\d+) test', text)
        # What a crash kept from running has not passed.
        failed = running - passed - skipped
    elif re.search(cargo, text, re.M):
        passed, failed, skipped = (total(cargo + what, text)
                                   for what in ('passed', 'failed', 'ignored'))
    elif lines:
        skipped = sum(1 for _, skip in lines if skip)
        failed = sum(1 for result, _ in lines if result == 'not ok')
        passed = len(lines) - skipped - failed
    else:
        skipped = int(test['result'] == 'SKIP')
        passed = int(good)
        failed = int(not good and not skipped)
    if not good and not skipped and not failed:
        failed = 1
    return passed, failed, skipped


def count_suite(suite):
    """(passed, failed, skipped) of a testsuite element."""
    tests, errors, failures, skipped = (int(suite.get(name, 0)) for name in
                                        ('tests', 'errors', 'failures', 'skipped'))
    return tests - errors - failures - skipped, errors + failures, skipped


def counts_in(log):
    if log.endswith('.xml'):
        return map(count_suite, xml.etree.ElementTree.parse(log).iter('testsuite'))
    with open(log, encoding='utf-8') as lines:
        return [count(json.loads(line)) for line in lines]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--failed', type=int, default=0)
    parser.add_argument('logs', nargs='*')
    args = parser.parse_args()
    passed, failed, skipped = 0, args.failed, 0
    for log in args.logs:
        for counts in counts_in(log):
            passed, failed, skipped = (a + b for a, b in zip((passed, failed, skipped), counts))
    print(f'{skipped} skipped')
    print(f'{passed} passed, {failed} failed')
    return failed > 0


sys.exit(main())
