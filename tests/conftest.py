import gc
import os

import pytest

# Hub look-ups retry for half a minute before they fail; nothing here may reach the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# On tensors this small a second thread only waits for the first.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def imports_are_not_searched_for_garbage() -> None:
    """The Trainer collects garbage whenever it starts: most of a second with torch and transformers on the heap."""
    gc.collect()
    gc.freeze()
