"""transformers, quiet."""

import gc

import pytest
import transformers


@pytest.fixture(autouse=True)
def quiet_transformers():
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session", autouse=True)
def small_heap():
    """patch_model looks through all live objects for a model around its own:
    here, hundreds of times in one process.
    """
    gc.collect()
    gc.freeze()
