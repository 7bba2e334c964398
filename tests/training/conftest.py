import gc

import pytest
import tiny_pretraining
from transformers.utils import logging as transformers_logging

from mabert.data.shards import Shards

transformers_logging.disable_progress_bar()


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder with the text, the tokenizer and, once something has run, the shards of `tiny_pretraining.config`."""
    gc.freeze()  # each Trainer collects garbage; all that was imported is not worth half a second a run
    folder = tmp_path_factory.mktemp("pretraining")
    tiny_pretraining.prepare(folder)
    return folder


@pytest.fixture(scope="session")
def shards(prepared) -> Shards:
    """The tokenised text of `prepared`."""
    return tiny_pretraining.tokenise(prepared)
