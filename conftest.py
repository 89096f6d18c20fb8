"""What every test starts from: one thread, one seed, and how hard hypothesis tries."""
import os

import pytest
import torch
from hypothesis import settings

settings.register_profile("default", deadline=None, max_examples=25)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True,
                          print_blob=True)
settings.register_profile("thorough", settings.get_profile("default"), max_examples=500)
settings.load_profile(os.environ.get(
    "HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") == "true" else "default"))

torch.set_num_threads(1)     # small tensors: a second thread costs more than it gives


@pytest.fixture(autouse=True)
def seeded():
    """Layers are initialised alike in every test (once a test, not once an example)."""
    torch.manual_seed(0)
