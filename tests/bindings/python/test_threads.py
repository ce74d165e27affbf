# SPDX-License-Identifier: Apache-2.0
"""Threads: the interpreter runs during calls; objects behave as the header says."""
import gc
import threading
import time

import fkv
import numpy
import pytest

import oracle

LONG, HEADS, KV_HEADS, DIM = 2000, 8, 2, 64


def together(*tasks):
    """Runs functions in threads at the same time; their results. Raises what they raised."""
    results, barrier = [None] * len(tasks), threading.Barrier(len(tasks))

    def run(number, task):
        barrier.wait()
        try:
            results[number] = task()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(tasks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


class Slow:
    """A cache with a prompt on which attention takes long."""

    def __init__(self):
        random = numpy.random.default_rng(1)
        self.context = fkv.Context(threads=1)
        self.profile = fkv.Profile.exact(self.context, fkv.ModelParams(
            n_layers=1, n_q_heads=HEADS, n_kv_heads=KV_HEADS, head_dim=DIM), 'f32')
        self.cache = fkv.Cache(self.context, self.profile)
        self.sequence, self.plan = self.cache.sequence(), self.cache.plan()
        self.q, k, v = oracle.tokens(random, LONG, HEADS, KV_HEADS, DIM)
        self.plan.update([self.sequence], LONG)
        self.plan.append(0, k, v)
        self.expected = self.plan.attend(0, self.q)

    def attend(self):
        return self.plan.attend(0, self.q)

    def is_busy(self):
        try:
            self.plan.attend(0, self.q[:0])
        except fkv.BusyError:
            return True
        except fkv.InvalidError:  # it got as far as the shape
            return False

    def during(self, use):
        """Calls `use` once while another thread attends; whether that was refused as busy."""
        done = []

        def work():
            while not done:
                try:
                    done.append(self.attend())
                except fkv.BusyError:  # of is_busy()
                    pass

        thread = threading.Thread(target=work)
        thread.start()
        while thread.is_alive() and not self.is_busy():
            pass
        try:
            use(self)
            refused = False
        except fkv.BusyError:
            refused = True
        thread.join()
        assert (done[0] == self.expected).all()
        return refused


@pytest.fixture(scope='module')
def slow():
    return Slow()


def test_the_interpreter_runs_during_a_call(slow):
    ticks, stop = [], threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.perf_counter())
            time.sleep(5e-4)

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for _ in range(10):
            begin = time.perf_counter()
            slow.attend()
            end = time.perf_counter()
            margin = (end - begin) / 10
            if sum(begin + margin < t < end - margin for t in list(ticks)) >= 5:
                return
    finally:
        stop.set()
        thread.join()
    pytest.fail('no other thread ran while one attended')


@pytest.mark.parametrize('use', [
    lambda s: s.attend(), lambda s: s.plan.append(0, s.q, s.q), lambda s: s.plan.update([], 0),
    lambda s: s.plan.close(), lambda s: s.cache.sequence(), lambda s: s.sequence.free(),
    lambda s: s.cache.close(), lambda s: s.context.close() or s.plan.close(),
], ids=['attend', 'append', 'update', 'close-plan', 'create', 'free', 'close-cache',
        'close-context'])
def test_busy(use):
    """A second user of a plan, and a writer beside a reader, are sent away, and nothing changes."""
    for _ in range(5):
        slow = Slow()
        if slow.during(use):
            assert not slow.plan.closed and not slow.cache.closed and slow.sequence
            assert (slow.attend() == slow.expected).all()
            return
    pytest.fail('never refused')


def test_readers_beside_each_other(slow):
    """Queries of what another thread uses, and work on another cache of the same context."""
    random, results = numpy.random.default_rng(3), []
    q, k, v = oracle.tokens(random, 1, HEADS, KV_HEADS, DIM)
    other = fkv.Cache(slow.context, slow.profile)

    def use(slow):
        results.append((len(slow.sequence), slow.cache.stats().tokens, slow.profile.info.head_dim))
        with other.sequence() as mine, other.plan() as plan:
            plan.update([mine], 1)
            results.append(plan.append_attend(0, q, k, v))

    assert slow.during(use) is False
    assert results[0] == (LONG, LONG, DIM)
    numpy.testing.assert_allclose(results[1], numpy.repeat(v, HEADS // KV_HEADS, axis=1), rtol=1e-6)


def test_garbage_while_another_thread_attends():
    for _ in range(5):
        slow = Slow()
        garbage = [slow.cache.sequence()]

        def drop(slow):
            garbage.clear()
            gc.collect()

        slow.during(drop)
        waited = len(slow.cache._garbage)
        assert slow.cache.stats().sequences == 1 and not slow.cache._garbage
        if waited:
            return
    pytest.fail('the sequence was never dropped during the call')


def test_garbage_that_waited_is_freed_by_the_next_use():
    for use in (lambda s: s.cache.sequence(), lambda s: s.plan.update([s.sequence], 0),
                lambda s: s.cache.stats()):
        for _ in range(5):
            slow = Slow()
            garbage = [slow.cache.sequence()]
            slow.during(lambda s: garbage.clear())
            if slow.cache._garbage:
                break
        assert slow.cache._garbage, 'the sequence was never dropped during the call'
        use(slow)
        assert not slow.cache._garbage


def test_eight_threads_on_one_cache(context, fourier):
    """Each with its own plan: the bits of one thread."""
    random = numpy.random.default_rng(7)
    cache = fkv.Cache(context, fourier)
    sequences = [cache.sequence() for _ in range(8)]
    for number, sequence in enumerate(sequences):
        oracle.fill(cache, sequence, random, 100 + 30 * number)
    plans, queries = [cache.plan() for _ in sequences], oracle.tokens(random, 8)[0]
    for plan, sequence in zip(plans, sequences):
        plan.update([sequence], 1)

    def attend(number):
        return [[out.tobytes() for layer in range(2)
                 for out in plans[number].attend(layer, queries[number:number + 1], lse=True)]
                for _ in range(50)]

    alone = [attend(number) for number in range(8)]
    assert together(*(lambda n=n: attend(n) for n in range(8))) == alone
    assert all(results == [results[0]] * 50 for results in alone)


def test_eight_threads_on_one_sequence(context, exact):
    random = numpy.random.default_rng(8)
    cache = fkv.Cache(context, exact)
    sequence = cache.sequence()
    oracle.fill(cache, sequence, random, 200)
    plans, q = [cache.plan() for _ in range(8)], oracle.tokens(random, 1)[0]
    for plan in plans:
        plan.update([sequence], 1)
    results = together(*(lambda p=p: {p.attend(1, q).tobytes() for _ in range(100)}
                         for p in plans))
    assert len(set.union(*results)) == 1


def test_threads_with_own_caches(context, exact):
    """Everything from creation to closing, in eight threads of one context."""
    def work():
        random, outs = numpy.random.default_rng(9), []
        for _ in range(5):
            with fkv.Cache(context, exact) as cache, cache.plan() as plan:
                with cache.sequence() as sequence:
                    for count in (7, 1, 30):
                        plan.update([sequence], count)
                        for layer in range(2):
                            outs.append(plan.append_attend(layer, *oracle.tokens(random, count))
                                        .tobytes())
        return outs

    alone = work()
    before = context.info.live_bytes
    assert all(result == alone for result in together(*[work] * 8))
    assert context.info.live_bytes == before


def test_threads_with_own_contexts(model):
    def work(threads):
        random = numpy.random.default_rng(10)
        with fkv.Context(threads=threads) as context:
            cache = fkv.Cache(context, fkv.Profile.exact(context, model))
            sequence = cache.sequence()
            oracle.fill(cache, sequence, random, 100)
            return sequence.read(1)[0].tobytes()

    assert len(set(together(*(lambda n=n: work(n) for n in (1, 2, 1, 3))))) == 1


def test_one_plan_in_many_threads(context, exact):
    """Right, or refused; never something else."""
    random = numpy.random.default_rng(12)
    cache = fkv.Cache(context, exact)
    sequence, plan = cache.sequence(), cache.plan()
    oracle.fill(cache, sequence, random, 300)
    plan.update([sequence], 1)
    q = oracle.tokens(random, 1)[0]
    expected = plan.attend(0, q)

    def work():
        right = refused = 0
        for _ in range(200):
            try:
                out = plan.attend(0, q)
            except fkv.BusyError as error:
                assert error.status is fkv.Status.BUSY
                refused += 1
            else:
                assert (out == expected).all()
                right += 1
        return right, refused

    results = together(*[work] * 6)
    assert all(sum(pair) == 200 for pair in results) and sum(right for right, _ in results) > 0


def test_appends_in_two_threads(context, exact):
    """Two plans that write to one cache: each step is whole, done once, or refused."""
    random = numpy.random.default_rng(13)
    cache = fkv.Cache(context, exact)
    given = [oracle.tokens(random, 40) for _ in range(2)]
    sequences = [cache.sequence() for _ in given]
    plans = [cache.plan() for _ in given]

    def again(call, *arguments):
        while True:
            try:
                return call(*arguments)
            except fkv.BusyError:
                time.sleep(1e-5)

    def work(number):
        for token in range(40):
            again(plans[number].update, [sequences[number]], 1)
            for layer in range(2):
                again(plans[number].append, layer, *(x[token:token + 1] for x in given[number][1:]))

    together(lambda: work(0), lambda: work(1))
    for sequence, (_, k, v) in zip(sequences, given):
        assert len(sequence) == 40
        for layer in range(2):
            assert (sequence.read(layer)[1] == v).all()
            numpy.testing.assert_allclose(sequence.read(layer)[0], oracle.rotate(k, range(40)),
                                          atol=1e-6)
