# SPDX-License-Identifier: Apache-2.0
"""What the tests of the Python package share. They need the installed package, not its sources."""
import gc

import fkv
import numpy
import pytest

import oracle


def pytest_configure(config):
    config.addinivalue_line('markers', 'torch: needs torch')
    # An exception in a destructor must not go unseen.
    config.addinivalue_line('filterwarnings', 'error::pytest.PytestUnraisableExceptionWarning')
    config.addinivalue_line('filterwarnings', 'error::pytest.PytestUnhandledThreadExceptionWarning')


@pytest.fixture
def context():
    with fkv.Context(threads=1) as made:
        yield made


@pytest.fixture
def leak_free(context):
    """The context, which must hold nothing more after the test than before."""
    before = context.info.live_bytes
    yield context
    gc.collect()
    assert context.info.live_bytes == before


@pytest.fixture
def model():
    return oracle.model()


@pytest.fixture
def exact(context, model):
    return fkv.Profile.exact(context, model, 'f32')


@pytest.fixture
def cache(context, exact):
    return fkv.Cache(context, exact)


@pytest.fixture
def fourier(context, model):
    """A profile that compresses about half of the channels, early."""
    random = numpy.random.default_rng(5)
    shape = oracle.LAYERS, oracle.KV_HEADS, oracle.DIM
    return fkv.Profile.fourier(context, model, random.random(shape) < 0.5,
                               random.random(shape) < 0.5, oracle.FOURIER)


@pytest.fixture
def random():
    return numpy.random.default_rng(11)
